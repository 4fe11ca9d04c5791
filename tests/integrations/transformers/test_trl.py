"""PeftKernCallback in TRL's trainers, which make the adapter from their peft_config."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft_models
import pytest
import torch
from adalora_runs import Digests
from framework_runs import letters_llama, letters_tokenizer, save_model, sums
from peft import AdaLoraConfig, LoraConfig
from peft_models import TARGETS, served_by_us
from tolerances import LOGITS
from transformers import (
    BitsAndBytesConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
)

import peftkern
from peftkern.integrations.transformers import AdaLoraCallback, PeftKernCallback

trl = pytest.importorskip("trl", reason="TRL is not installed")
Dataset = pytest.importorskip("datasets").Dataset

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, LAYERS = 3, 14
ANSWERS = {
    "sft": [{"prompt": q, "completion": a} for q, a in sums()],
    "dpo": [{"prompt": q, "chosen": a, "rejected": a[::-1]} for q, a in sums()],
    "grpo": [{"prompt": q} for q, _ in sums()],
}
TRAINERS = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, {}),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, {}),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig, {"num_generations": 2, "max_completion_length": 8}),
}


def digits(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that differs among completions."""
    return [sum(letter.isalnum() for letter in text) / 8 for text in completions]


def train(
    kind: str,
    folder: Path,
    *,
    patched: bool,
    model: PreTrainedModel | None = None,
    **options: Any,
) -> Trainer:
    trainer_class, config_class, more = TRAINERS[kind]
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    quiet |= {"use_cpu": True, "bf16": False}
    run = {"per_device_train_batch_size": 4, "max_steps": STEPS, "learning_rate": 1e-2, "seed": 3}
    arguments = config_class(str(folder), **quiet, **run, **more, **options)
    keywords = {"reward_funcs": digits} if kind == "grpo" else {}
    trainer = trainer_class(
        model=model or letters_llama(),
        args=arguments,
        train_dataset=Dataset.from_list(ANSWERS[kind]),
        processing_class=letters_tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"),
        callbacks=[PeftKernCallback()] if patched else None,
        **keywords,
    )
    peftkern.reset_stats()
    trainer.train()
    return trainer


def column(trainer: Trainer, name: str) -> torch.Tensor:
    return torch.tensor([entry[name] for entry in trainer.state.log_history if name in entry])


CASES = [
    ("sft", {}, "loss"),
    ("sft", {"packing": True, "max_length": 64}, "loss"),
    ("dpo", {}, "loss"),
    ("dpo", {"precompute_ref_log_probs": True}, "loss"),
    ("grpo", {"beta": 0.1}, "kl"),
]


@pytest.mark.parametrize(("kind", "options", "reference"), CASES)
def test_the_losses_are_those_without_it(tmp_path, kind, options, reference):
    plain = train(kind, tmp_path, patched=False, **options)
    assert served_by_us() == 0
    ours = train(kind, tmp_path, patched=True, **options)
    assert served_by_us() >= STEPS * LAYERS
    assert set(peft_models.fallbacks()) <= {"adapters are disabled"}  # the reference, in float32
    for name in {"loss", "grad_norm", reference}:
        expected, got = column(plain, name), column(ours, name)
        assert len(expected) == STEPS, name
        torch.testing.assert_close(got, expected, **LOGITS)


def test_policy_and_reference_agree_over_nf4_until_the_first_step(tmp_path):
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    folder = save_model(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=nf4, device_map="cpu")
    trainer = train("dpo", tmp_path, patched=True, model=model, gradient_checkpointing=False)
    margins = column(trainer, "rewards/margins")
    assert margins[0] == 0 and margins[1:].abs().min() > 0
    assert column(trainer, "loss")[0] == pytest.approx(math.log(2), abs=0, rel=2**-12)
    assert peft_models.fallbacks() == {}


def test_adalora_over_nf4_keeps_its_diagonal_wide_and_resumes(tmp_path):
    """TRL casts lora_E to bfloat16; one callback keeps it float32, and goes on bit for bit."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    folder, digests = save_model(tmp_path / "model"), Digests()
    schedule = {"init_r": 6, "target_r": 2, "total_step": 99, "tinit": 1, "tfinal": 3, "deltaT": 2}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False}
    steps = {"max_steps": 12, "save_steps": 1, "learning_rate": 1e-2}

    def made(*callbacks: TrainerCallback) -> trl.SFTTrainer:
        return trl.SFTTrainer(
            model=LlamaForCausalLM.from_pretrained(
                folder, quantization_config=nf4, device_map="cpu"
            ),
            args=trl.SFTConfig(str(tmp_path), per_device_train_batch_size=4, **quiet, **steps),
            train_dataset=Dataset.from_list(ANSWERS["sft"]),
            processing_class=letters_tokenizer(),
            peft_config=AdaLoraConfig(**schedule, target_modules=TARGETS, task_type="CAUSAL_LM"),
            callbacks=list(callbacks),
        )

    def dtypes(trainer: Trainer, group: str) -> set[torch.dtype]:
        return {p.dtype for n, p in trainer.model.named_parameters() if group in n}

    alone = made()
    assert dtypes(alone, "lora_E") == {torch.bfloat16}
    trainer = made(AdaLoraCallback(), digests)
    assert dtypes(trainer, "lora_E") == dtypes(trainer, "ranknum") == {torch.float32}
    assert dtypes(trainer, "lora_A") == dtypes(trainer, "lora_B") == {torch.bfloat16}
    trainer.train()
    assert sum(map(sum, trainer.model.peft_config["default"].rank_pattern.values())) == 2 * LAYERS
    whole, digests.by_step = digests.by_step, {}
    made(AdaLoraCallback(), digests).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert digests.by_step == {k: v for k, v in whole.items() if k > 6}
