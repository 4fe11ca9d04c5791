"""Training step that `peftkern bench --model` measures: its options, its model, its record.

A step is forward, backward and AdamW of a user's own model with adapters.
"""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftkern.tools import models
from peftkern.tools.bench.cases import DTYPES, SHORT, available_memory
from peftkern.tools.bench.shapes import LARGEST, chosen, numbers
from peftkern.tools.plan.plan import Training, read_model
from peftkern.tools.plan.plan import plan as plan_memory
from peftkern.tools.plan.presets import PRESETS

OP = "training_step"
BASES = ("nf4", *DTYPES)
METHODS = ("lora", "adalora", "dora")
MAX_RANK = 4096
NF4_BYTES = 0.516  # of a value with double quantization


@dataclass(frozen=True)
class Options:
    """Options as typed; see `peftkern bench --help`."""

    model: str
    method: str
    base: str | None
    targets: str
    batch: int
    sequence: int
    checkpointing: bool
    layers: int | None
    steps: int


@dataclass(frozen=True)
class Step(Options):
    """A training step, as a worker needs it.

    base: "nf4", "bf16", ..., or the method by which the weights are quantized. weights: those of
    the folder, else random. modules, parameters: the full names of what gets adapters.
    """

    dtype: str
    r: int
    seed: int
    device: str
    weights: bool
    modules: list[str]
    parameters: list[str]


@dataclass(frozen=True)
class Job:
    """A step to measure. work: bytes and FLOPs that it needs at least; said: notes for people;
    routed: rounding errors may send a token to another expert."""

    step: Step
    work: tuple[int, int]
    said: list[str]
    routed: bool

    @property
    def facts(self) -> dict:
        """Those of a record's case."""
        step = self.step
        size = f"{step.batch}x{step.sequence}"
        path = Path(step.model).resolve()
        file = path.parent.name if path.stem == "config" else path.stem
        named = step.model in PRESETS or path.is_dir()
        parts = [path.name if named else file, step.base]
        parts += [step.method] if step.method != METHODS[0] else []
        parts += [f"{step.layers}-layers"] if step.layers else []
        parts += ["checkpointing"] if step.checkpointing else []
        parts += [step.targets.replace(",", "+")] if step.targets != "all-linear" else []
        shape = "-".join(parts)
        return {
            "name": f"{OP}/{shape}/{size}/r{step.r}/{step.dtype}",
            "op": OP,
            "shape": shape,
            "M": step.batch * step.sequence,
            **{"N": None, "K": None, "r": step.r, "dtype": step.dtype, "mode": "full"},
        }

    def command(self, threads: int, budget: float) -> str:
        """Return the command that measures this again."""
        step, words = self.step, ["peftkern", "bench"]
        for field in dataclasses.fields(Options):
            value = getattr(step, field.name)
            if value is None or value is False or (field.name == "base" and value not in BASES):
                continue
            words += [f"--{field.name}"] if value is True else [f"--{field.name}", str(value)]
        words += ["--dtype", SHORT[step.dtype], "--r", str(step.r), "--device", step.device]
        words += ["--threads", str(threads)] if step.device == "cpu" else []
        return shlex.join([*words, "--seed", str(step.seed), "--budget", f"{budget:g}s"])


def plan(options: Options, r: str, dtype: str | None, device: str, seed: int) -> Job:
    """Check the options. Raises: ValueError or OSError, one line, naming the option."""
    for name, least in {"batch": 1, "sequence": 2, "layers": 1, "steps": 1}.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= LARGEST:
            raise ValueError(f"--{name}: expected {least} to {LARGEST}, got {value}")
    rank = _one("--r", numbers("--r", r, MAX_RANK))
    _one("--method", chosen("--method", options.method, METHODS))
    config, weights = models.read_config(options.model), models.has_weights(options.model)
    models.auto_class(config)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and options.sequence > limit:
        raise ValueError(f"--sequence: {options.sequence}: the model takes at most {limit} tokens")
    base, dtype = _base_and_dtype(options, config, dtype, weights)
    had = None if options.layers is None else models.set_layers(config, options.layers)
    try:
        model = models.empty_model(config, getattr(torch, dtype))
    except Exception as error:  # of any kind: sizes of a config that do not go together
        raise ValueError(f"--model: {options.model}: {type(error).__name__}: {error}") from error
    if options.checkpointing and not model.supports_gradient_checkpointing:
        raise ValueError(f"--checkpointing: {type(model).__name__} does not support it")
    modules, parameters = models.adapter_targets(model, options.targets)
    if parameters and options.method != METHODS[0]:
        raise ValueError(f"--targets: experts have no {options.method}; name linear layers")
    size = _weight_bytes(model, base)
    _check_fit(size, device)
    step = Step(
        **{**dataclasses.asdict(options), "base": base},
        dtype=dtype,
        r=rank,
        seed=seed,
        device=device,
        weights=weights,
        modules=modules,
        parameters=parameters,
    )
    routed = dtype != "float32" and bool(models.expert_weights(model))
    return Job(step, (2 * size, _flops(model, step)), _said(model, step, had), routed)


def planned_bytes(step: Step, patched: bool) -> int | None:
    """Return what `peftkern plan` says of a step's peak beyond model and optimizer; None of what it
    does not plan."""
    try:
        training = Training(
            step.method,
            r=step.r,
            targets=tuple(step.targets.split(",")),
            base=step.base,
            dtype=SHORT[step.dtype],
            batch=step.batch,
            sequence=step.sequence,
            checkpointing=step.checkpointing,
            patched=patched,
            device=step.device,
        )
        config = read_model(step.model)
        if step.layers is not None:
            models.set_layers(config, step.layers)
        found = plan_memory(config, training)
    except ValueError:
        return None
    return found.peak - sum(found.fixed.values())


def _said(model: Any, step: Step, had: int | None) -> list[str]:
    """Describe what is built, `had`: its layers before --layers."""
    count = sum(p.numel() for p in model.parameters())
    origin = "the folder's weights" if step.weights else "random weights"
    said = [f"{type(model).__name__}, {count:,} parameters, {origin}, random tokens in batches of"]
    said[0] += f" {step.batch} x {step.sequence}"
    if had is not None:
        said.append(f"{min(step.layers, had)} of {had} layers (--layers)")
    if (
        step.base == "nf4"
        and models.expert_weights(model)
        and not models.saved_with_nf4_experts(model.config)
    ):
        said.append(f"experts stay in {step.dtype}, as transformers leaves them")
    if hasattr(model.config, "vision_config"):
        said.append("no images: tokens alone")
    return said


def _one(option: str, found: list) -> Any:
    if len(found) != 1:
        raise ValueError(f"{option}: with --model one value, got {', '.join(map(str, found))}")
    return found[0]


def _base_and_dtype(
    options: Options, config: Any, dtype: str | None, weights: bool
) -> tuple[str, str]:
    """Return the base, "nf4" or a dtype or how the weights are quantized, and the dtype."""
    own = models.quantization(config)
    base = options.base and _one("--base", chosen("--base", options.base, BASES))
    dense = base if base in DTYPES else None
    if dtype is not None:
        dtype = _one("--dtype", chosen("--dtype", dtype, tuple(DTYPES)))
        if dense not in (None, dtype):
            raise ValueError(f"--dtype: {dtype}, but --base is {dense}")
    short = dtype or dense or models.dtype_of(config)
    if own is not None:
        method = str(own.get("quant_method", "bitsandbytes"))
        stored = (
            "nf4" if own.get("load_in_4bit") or models.saved_with_nf4_experts(config) else method
        )
        if weights and base not in (None, stored):
            raise ValueError(f"--base: the weights are quantized already ({stored}); leave it out")
        if not (weights or base or stored == "nf4"):
            raise ValueError(f"--base: the config names {method}; without weights choose another")
        base = base or stored
    return base or short, DTYPES[short]


def _weight_bytes(model: Any, base: str) -> int:
    size = sum(p.numel() * p.itemsize for p in model.parameters())
    if base == "nf4":
        packed = [layer.weight for layer in models.linear_layers(model).values()]
        size -= sum(int(w.numel() * (w.itemsize - NF4_BYTES)) for w in packed)
    return size


def _check_fit(size: int, device: str) -> None:
    free = available_memory()
    if device == "cuda":
        free = torch.cuda.get_device_properties(device).total_memory
    if free is not None and size > free:
        raise ValueError(
            f"--model: its weights alone have {size / 1e9:.1f} GB, this machine has"
            f" {free / 1e9:.1f} GB; --layers measures fewer layers, --base nf4 smaller ones"
        )


def _flops(model: Any, step: Step) -> int:
    """Count a lower bound: the model's forward, and as much for the gradients of activations, and
    again where they are recomputed; 0 where the model does not run without numbers."""
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.zeros(step.batch, step.sequence, dtype=torch.long, device="meta")
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval().to("meta", torch.bfloat16)(input_ids=ids, labels=ids)
    except Exception:  # of many kinds: control flow that reads numbers
        return 0
    return (3 if step.checkpointing else 2) * counter.get_total_flops()
