"""Check the installed peftkern beside whatever torch, PEFT and transformers are installed.

    python tests/compat/check.py

One line of JSON with the versions, then a line for each check: "ok", "absent" where bitsandbytes is
not installed, "not served: " and the reason where that transformers leaves experts to PEFT, or what
went wrong. Exit status 1 if anything did. Needs no network and no GPU.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("PEFTKERN_TRUST", "always")  # nothing is timed: every kernel serves
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import peftkern
from peftkern.backends.cpu import crossovers

VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SERVED_SINCE = (5, 3)  # of transformers: fused experts
FROZEN_SERVED_SINCE = (5, 7)  # in 4 bits, without an adapter
ERROR = 1e-4  # of float32 sums that are taken in another order, relative to the whole tensor
IDS = torch.arange(2 * 24).reshape(2, 24) % 64


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


class NotServed(Exception):
    """What these versions leave to PEFT, in words."""


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def mixture() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    few = {"head_dim": 32, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **few))
    if isinstance(model.model.layers[0].mlp.experts, nn.ModuleList):
        raise NotServed("no fused experts before transformers 5")
    return model


def with_lora(base: nn.Module, targets: list[str], experts: list[str] | None = None) -> PeftModel:
    """Return a PEFT model whose adapters already contribute to its output."""
    torch.manual_seed(1)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    config.target_parameters = experts
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Return the loss of a training step, its gradients and the parameters that it leaves."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    optimizer.step()
    found = {"loss": loss.detach()}
    for name, parameter in parameters.items():
        found |= {f"gradient of {name}": parameter.grad, name: parameter.detach()}
    return found


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys(), set(ours) ^ set(theirs)
    for name, expected in theirs.items():
        error = (ours[name] - expected).norm() / expected.norm()
        assert error <= ERROR, f"{name}: relative error {error:.1e}, expected at most {ERROR}"


def served() -> None:
    """Hold the kernels to having computed the calls since the last reset, on the CPU's library."""
    stats = peftkern.stats()
    backends = {backend for _, backend in stats.calls}
    wanted = "cpu" if importlib.util.find_spec("peftkern._cpu") else "torch"
    assert wanted in backends and not stats.fallbacks, str(stats)


def step_equals_peft(base: nn.Module, dense: nn.Module | None = None) -> None:
    """dense: what PEFT trains on in the place of `base`, if that has arithmetic of its own."""
    ours = with_lora(base, TARGETS)
    theirs = copy.deepcopy(ours) if dense is None else with_lora(dense, TARGETS)
    report = peftkern.patch(ours)
    assert len(report.patched) == 2 * len(TARGETS) and not report.skipped, str(report)
    peftkern.reset_stats()
    found = trained(ours)
    served()
    same(found, trained(theirs))
    assert sorted(peftkern.unpatch(ours)) == sorted(report.patched)


def dense_step() -> None:
    step_equals_peft(llama())


def nf4_step() -> None:
    base = llama()
    assert len(peftkern.quantize_(base)) == 2 * len(TARGETS)
    step_equals_peft(base)


def in_4_bits() -> nn.Module:
    """Load the model in bitsandbytes' NF4; by hand where transformers does so on GPUs alone."""
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    with tempfile.TemporaryDirectory() as folder:
        llama().save_pretrained(folder)
        try:
            options = {"quantization_config": nf4, "dtype": torch.float32}  # 4.57: else float16
            return AutoModelForCausalLM.from_pretrained(folder, **options)
        except RuntimeError as error:  # transformers 4.51
            if "available devices" not in str(error):
                raise
    model = llama()
    for name, dense in list(model.named_modules()):
        if isinstance(dense, nn.Linear) and name != "lm_head":
            sizes = dense.in_features, dense.out_features, dense.bias is not None
            layer = bnb.nn.Linear4bit(*sizes, torch.float32, quant_type="nf4")
            layer.load_state_dict(dense.state_dict())
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, layer.to("cpu").requires_grad_(False))
    model.is_loaded_in_4bit = True  # by which PEFT chooses its layers
    return model


def bitsandbytes_step() -> None:
    """Beside PEFT over the same weights, dequantized: some bitsandbytes round x to bfloat16."""
    import bitsandbytes as bnb

    base = in_4_bits()
    dense = llama()
    for name, layer in base.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            dense.get_submodule(name).weight.data.copy_(weight)
    step_equals_peft(base, dense)


def experts_step() -> None:
    experts_equal_peft(mixture(), EXPERTS)


def nf4_experts_step() -> None:
    experts_equal_peft(in_nf4(mixture()), EXPERTS)


def frozen_nf4_experts_step() -> None:
    experts_equal_peft(in_nf4(mixture()), None)


def in_nf4(base: nn.Module) -> nn.Module:
    assert len(peftkern.quantize_(base, include=["experts"])) == 2 * len(EXPERTS)
    return base


def experts_equal_peft(base: nn.Module, experts: list[str] | None) -> None:
    """Also where transformers is too old for kernels to serve them."""
    ours = with_lora(base, ATTENTION, experts)
    theirs = copy.deepcopy(ours)
    peftkern.patch(ours)
    peftkern.reset_stats()
    found = trained(ours)
    stats = peftkern.stats()
    same(found, trained(theirs))
    since = SERVED_SINCE if experts else FROZEN_SERVED_SINCE
    grouped = any("grouped_linear_backward" in op for op, _ in stats.calls)
    if not grouped and tuple(map(int, str(version("transformers")).split(".")[:2])) < since:
        reasons = [reason for op, reason in stats.fallbacks if op == "lora_experts"]
        raise NotServed(
            *reasons[:1] or ["this transformers runs experts by its own functions alone"]
        )
    served()
    assert grouped, str(stats)


def save_and_load() -> None:
    model = with_lora(llama(), TARGETS).eval()
    peftkern.patch(model)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(llama(), folder).eval()
        logits = {"logits": model(input_ids=IDS).logits}
        same({"logits": loaded(input_ids=IDS).logits}, logits)
        peftkern.patch(loaded)
        same({"logits": loaded(input_ids=IDS).logits}, logits)


def trainer_step() -> None:
    from transformers import Trainer, TrainingArguments

    from peftkern.integrations.transformers import PeftKernCallback

    examples = [{"input_ids": row, "labels": row} for row in IDS]
    peftkern.reset_stats()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, max_steps=1, use_cpu=True, report_to=[])
        model = with_lora(llama(), TARGETS)
        trainer = Trainer(model, arguments, train_dataset=examples, callbacks=[PeftKernCallback()])
        assert math.isfinite(trainer.train().training_loss)
    served()


CHECKS: dict[str, Callable[[], None]] = {
    "dense step equals PEFT's": dense_step,
    "NF4 step equals PEFT's": nf4_step,
    "bitsandbytes step equals PEFT's": bitsandbytes_step,
    "experts step equals PEFT's": experts_step,
    "NF4 experts step equals PEFT's": nf4_experts_step,
    "frozen NF4 experts step equals PEFT's": frozen_nf4_experts_step,
    "save and load": save_and_load,
    "Trainer": trainer_step,
}


@contextlib.contextmanager
def small_layers() -> Iterator[None]:
    """Serve small dense products, too, which PEFT computes as fast: the models here are tiny."""
    crossover, crossovers.crossover = crossovers.crossover, lambda name: 0
    try:
        yield
    finally:
        crossovers.crossover = crossover


def main() -> int:
    versions = {name: version(name) for name in VERSIONS}
    print(json.dumps({"python": platform.python_version(), **versions}))
    failed = 0
    for name, check in CHECKS.items():
        if "bitsandbytes" in name and versions["bitsandbytes"] is None:
            print(f"{name}: absent")
            continue
        try:
            with small_layers(), contextlib.redirect_stdout(sys.stderr):  # the Trainer prints
                check()
        except NotServed as reason:
            print(f"{name}: not served: {reason}")
        except Exception as error:  # a row of the table, whatever it is
            failed += 1
            said = (str(error).splitlines() or [""])[0]
            print(f"{name}: {type(error).__name__}: {said}")
        else:
            print(f"{name}: ok")
    return 1 if failed else 0


if __name__ == "__main__":
    print(f"# {Path(peftkern.__file__).parent}", file=sys.stderr)
    sys.exit(main())
