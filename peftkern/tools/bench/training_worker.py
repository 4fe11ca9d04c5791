"""Process that trains a model: `python -m peftkern.tools.bench.training_worker PROVIDER PARENT`.

Commands come as JSON lines on standard input (`peftkern.tools.bench.worker.answer`):

    {"do": "start", "step", "threads"}    -> {}: the model with its adapters
    {"do": "losses", "steps", "noise"}    -> {"losses", "resolution", "note", "said"}: first steps
    {"do": "run"}                         -> {"samples"}: seconds of one more step
    {"do": "memory"}                      -> {"peak_bytes", "held_bytes", "free_bytes"}

PEFT and ours draw the same numbers. With `noise` each adapter layer's output is off by a rounding
error or two of its dtype: how far the losses move then is what a right implementation may differ.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import inspect
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import peftkern
from peftkern.tools import models
from peftkern.tools.bench import memory
from peftkern.tools.bench.base_layers import random_nf4
from peftkern.tools.bench.cases import available_memory
from peftkern.tools.bench.peers import bitsandbytes_missing, nf4_layer
from peftkern.tools.bench.record import OURS
from peftkern.tools.bench.rows import calls_of_ours
from peftkern.tools.bench.training_step import Step
from peftkern.tools.bench.worker import answer
from peftkern.tools.quiet import quiet

LR = 1e-3
# Of what is zero in a new adapter, which would hide its errors.
STD = {"lora_B": 0.02, "lora_E": 2.0}
# AdaLoRA in the middle of its schedule, where it allocates at every step.
ADALORA_STEPS, ADALORA_START = 1_000_000, 500_000
# Errors of a product's results in units of the dtype's eps: 16-bit results are rounded once or
# twice, float32 sums thousands of terms in an order of its own.
ROUNDING = {torch.bfloat16: 0.5, torch.float16: 0.5, torch.float32: 8.0}


class Worker:
    """Implementation of the commands, one method each."""

    def __init__(self, name: str) -> None:
        self.name = name

    def start(self, step: dict, threads: int) -> dict:
        """Build everything; weights are the same in every process of a seed."""
        self.step = step = Step(**step)
        self.device = torch.device(step.device)
        if self.device.type == "cpu":
            torch.set_num_threads(threads)
        net = base_model(step, self.device)
        net.config.use_cache = False
        if step.checkpointing:
            net.gradient_checkpointing_enable({"use_reentrant": False})
            net.enable_input_require_grads()
        torch.manual_seed(step.seed + 1)
        self.model = get_peft_model(net, adapters(step)).train()
        for name, parameter in self.model.named_parameters():
            for group in STD:
                if f".{group}" in name:
                    parameter.data.normal_(0, STD[group])
        self.patched()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.first = [p.detach().to("cpu", copy=True) for p in self.trained]
        self.inputs = inspect.signature(net.forward).parameters
        self.vocabulary = net.config.get_text_config().vocab_size
        return {}

    def patched(self) -> list[str]:
        """Patch our side, which a second call leaves as it is; return the report as it is now."""
        if self.name != OURS:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the report says them, too
            return [f"peftkern.patch: {peftkern.patch(self.model)}"]

    def restart(self) -> None:
        for parameter, value in zip(self.trained, self.first, strict=True):
            parameter.data.copy_(value)
        self.begin(torch.optim.AdamW(self.trained, lr=LR))

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.done = optimizer, 0
        if self.step.method == "adalora":
            self.model.base_model.rankallocator.reset_ipt()

    def batch(self, number: int) -> dict[str, Tensor]:
        """Draw a batch. Tokens are of the vocabulary's first half: the last ones stand for
        images."""
        generator = torch.Generator().manual_seed(self.step.seed + 2 + number)
        size = (self.step.batch, self.step.sequence)
        ids = torch.randint(1, max(2, self.vocabulary // 2), size, generator=generator)
        given = {"input_ids": ids, "labels": ids}
        given |= {name: torch.zeros_like(ids) for name in self.inputs if "token_type_ids" in name}
        return {name: tensor.to(self.device) for name, tensor in given.items()}

    def train(self, batch: dict[str, Tensor]) -> float:
        """Run a step: forward, backward, AdamW. Reading the loss waits for a GPU."""
        torch.manual_seed(self.step.seed + self.done)  # of dropout
        loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        if self.step.method == "adalora":
            self.model.base_model.update_and_allocate(ADALORA_START + self.done)
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        self.resolution = torch.finfo(loss.dtype).eps
        return loss.item()

    def losses(self, steps: int, noise: bool = False) -> dict:
        """Train on one batch, so that a wrong gradient shows in the next loss."""
        self.restart()
        batch = self.batch(0)
        peftkern.reset_stats()
        with rounding_errors(self.model) if noise else contextlib.nullcontext():
            found = [self.train(batch) for _ in range(steps)]
        calls = calls_of_ours() if self.name == OURS else {}
        answer = {"losses": found, "resolution": self.resolution, "calls": calls}
        return answer | {"said": self.patched()}

    def run(self) -> dict:
        batch = self.batch(self.done)
        began = time.perf_counter()
        self.train(batch)
        return {"samples": [time.perf_counter() - began]}

    def memory(self) -> dict:
        """Measure a step's peak beyond what was allocated before, and all that is held in one."""
        forget_peak(self.device)
        self.train(self.batch(self.done))
        held = held_bytes(self.device)
        batch = self.batch(self.done)
        peak = memory.peak_bytes(lambda: self.train(batch), self.device)
        return {"peak_bytes": peak, "held_bytes": held, "free_bytes": free_bytes(self.device)}


def adapters(step: Step) -> LoraConfig:
    """Return the PEFT config of a step's method."""
    common = {"lora_alpha": 2 * step.r, "target_modules": step.modules}
    if step.method == "adalora":
        schedule = {"tinit": 1, "tfinal": 1, "total_step": ADALORA_STEPS}
        return AdaLoraConfig(init_r=step.r, target_r=max(1, step.r // 2), **schedule, **common)
    experts = {"target_parameters": step.parameters} if step.parameters else {}
    return LoraConfig(r=step.r, use_dora=step.method == "dora", **experts, **common)


@quiet()
def base_model(step: Step, device: torch.device) -> Any:
    """Load or build the frozen model; without weights no dense weight of an NF4 layer is drawn."""
    config = models.read_config(step.model)
    if step.layers is not None:
        models.set_layers(config, step.layers)
    dtype = getattr(torch, step.dtype)
    torch.manual_seed(step.seed)
    own = models.quantization(config)
    if step.weights:
        return load(step, config, dtype, device, step.base == "nf4" and not own)
    if own:
        del config.quantization_config
    net = models.empty_model(config, dtype, buffers=True)
    if step.base == "nf4":
        generator = torch.Generator(device).manual_seed(step.seed)
        models.replace_linear_layers(
            net, lambda n, k, bias: nf4_layer(random_nf4(n, k, dtype, generator), bias)
        )
        net.is_loaded_in_4bit = True  # what transformers sets, and PEFT asks for
    return models.draw_weights(net, device)


def load(step: Step, config: Any, dtype: torch.dtype, device: torch.device, quantize: bool) -> Any:
    """Load the weights, quantized by bitsandbytes on the way, or by ours where it does not run."""
    how: dict[str, Any] = {"config": config, "dtype": dtype, "device_map": {"": str(device)}}
    by_bitsandbytes = quantize and bitsandbytes_missing(device) is None
    if by_bitsandbytes:
        from transformers import BitsAndBytesConfig

        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if models.saved_with_nf4_experts(config):
        importlib.import_module("peftkern.integrations.transformers.nf4_experts")  # registers it
    net = models.auto_class(config).from_pretrained(step.model, local_files_only=True, **how)
    if quantize and not by_bitsandbytes:
        peftkern.quantize_(net, exclude=["lm_head", *models.expert_weights(net)])
    return net.requires_grad_(False)


@contextlib.contextmanager
def rounding_errors(model: nn.Module) -> Iterator[None]:
    """Let the output of every adapter layer be off by rounding errors; gradients are, too."""

    def disturb(layer: nn.Module, given: tuple, y: Any) -> Any:
        if not isinstance(y, Tensor):
            return None  # of a router: indices, too
        size = ROUNDING[y.dtype] * torch.finfo(y.dtype).eps
        return y * (1 + size * torch.empty_like(y).normal_(generator=generator))

    # Of its own, so that dropout draws the same as without.
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    hooks = [layer.register_forward_hook(disturb) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def forget_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):  # then the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def held_bytes(device: torch.device) -> int:
    """Return the peak since `forget_peak`: of torch's allocator on a GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that another process could have."""
    return torch.cuda.mem_get_info()[0] if device.type == "cuda" else available_memory()


if __name__ == "__main__":
    answer(Worker(sys.argv[1]), int(sys.argv[2]))
