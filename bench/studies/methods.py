"""Every method on one small language model: parameters, memory, time and loss.

A Llama over bytes is first trained in full on prose, the language reference that comes with every
Python; each method then fine-tunes a copy of it on Python source, modules of the standard library.
One table: trained parameters, bytes of optimizer state, the peak of what a step allocates, time of
a step, and the loss on source that no step has seen.

    python bench/studies/methods.py                                # minutes on two cores
    python bench/studies/methods.py --only LoRA LoRA-FA --steps 50 --json methods.json

A method is a class below: its change of the model, its optimizer, and its hooks before and after a
step. Exit status: 0, all were trained; 2, bad input.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's log lines; read at import

import torch
from qlora_training import InputError, random_llama, read_text, token_ids
from torch import Tensor, nn

from peftkern import methods
from peftkern.integrations.transformers.longlora import enable_shifted_sparse_attention
from peftkern.layers import LoRALinear, NF4Linear, NF4LoRALinear
from peftkern.tools.bench.machine import write_json
from peftkern.tools.bench.memory import peak_bytes

SOURCES = ("argparse", "statistics", "textwrap", "tarfile", "zipfile")  # of the standard library
HELD_OUT = 0.1  # share of the text held out for the loss in the table
EVALUATED = 8  # batches
FULL = "full fine-tuning"
WARM_UP = 2  # steps whose time is not counted
METHODS: dict[str, type[Method]] = {}


def method(name: str) -> Callable[[type[Method]], type[Method]]:
    """Register a class under a name of the table."""

    def enter(cls: type[Method]) -> type[Method]:
        METHODS[name] = cls
        return cls

    return enter


class Method:
    """LoRA; methods override the differences. Each run gets a new object."""

    module: ClassVar[str | None] = None  # of peftkern.methods
    lr: ClassVar[float] = 4e-3

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options

    @classmethod
    def unfit(cls, options: argparse.Namespace) -> str | None:
        """Return why the method cannot train a model of these sizes, or None."""
        return None

    @property
    def update(self) -> dict[str, float]:
        """Rank and scaling, the same for all."""
        return {"r": self.options.rank, "lora_alpha": 2 * self.options.rank}

    def make(self, linear: nn.Linear) -> nn.Module:
        """Return what stands in the place of a linear layer."""
        return LoRALinear.from_linear(linear, **self.update)

    def adapt(self, model: nn.Module) -> None:
        """Change the model, whose parameters are all frozen."""
        for parent in list(model.model.layers.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, self.make(child))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.0)

    def before_step(self, step: int) -> None:
        """Run before the forward pass of step 1, 2, ..."""

    def after_step(self, step: int) -> None:
        """Run after the optimizer's step, while gradients still exist."""


@method(FULL)
class Full(Method):
    lr = 1e-3

    def adapt(self, model: nn.Module) -> None:
        model.model.layers.requires_grad_(True)


@method("LoRA")
class LoRA(Method):
    pass


@method("QLoRA")
class QLoRA(Method):
    def make(self, linear: nn.Linear) -> nn.Module:
        return NF4LoRALinear.from_linear(linear, **self.update)


@method("LoRA-FA")
class LoRAFA(Method):
    module = "lora_fa"

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return methods.LoRAFAOptimizer(model, lr=self.lr)


@method("LoRA-Pro")
class LoRAPro(Method):
    module = "lora_pro"

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return methods.LoRAProAdamW(model, lr=self.lr)


@method("LoRA-Pro (full moments)")
class LoRAProFull(Method):
    module = "lora_pro"
    lr = Full.lr  # its steps are those of full fine-tuning

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return methods.LoRAProAdamW(model, lr=self.lr, full_moments=True)


@method("Delta-LoRA")
class DeltaLoRA(Method):
    module = "delta_lora"

    def make(self, linear: nn.Module) -> nn.Module:
        return methods.DeltaLoRALinear(linear, **self.update)

    def adapt(self, model: nn.Module) -> None:
        super().adapt(model)
        self.schedule = methods.DeltaLoRAScheduler(model, self.options.steps // 4)

    def after_step(self, step: int) -> None:
        self.schedule.step()


@method("Delta-LoRA (NF4)")
class DeltaLoRANF4(DeltaLoRA):
    def make(self, linear: nn.Linear) -> nn.Module:
        return super().make(NF4Linear.from_linear(linear))


@method("Delta-LoRA (in place)")
class DeltaLoRAInPlace(Method):
    module = "delta_lora"

    def adapt(self, model: nn.Module) -> None:
        super().adapt(model)
        self.schedule = methods.InPlaceDeltaLoRA(model, start_step=self.options.steps // 4)

    def after_step(self, step: int) -> None:
        self.schedule.step()


@method("DoRA")
class DoRA(Method):
    module = "dora"

    def make(self, linear: nn.Module) -> nn.Module:
        return methods.DoRALinear(linear, **self.update)


@method("DoRA (NF4)")
class QDoRA(DoRA):
    def make(self, linear: nn.Linear) -> nn.Module:
        return super().make(NF4Linear.from_linear(linear))


@method("DyLoRA")
class DyLoRA(Method):
    """DyLoRA; its loss is that of the largest rank."""

    module = "dylora"

    def make(self, linear: nn.Linear) -> nn.Module:
        return methods.DyLoRALinear(linear, **self.update)

    def adapt(self, model: nn.Module) -> None:
        super().adapt(model)
        self.model, self.generator = model, torch.Generator().manual_seed(self.options.seed)

    def before_step(self, step: int) -> None:
        methods.sample_rank(self.model, generator=self.generator)

    def after_step(self, step: int) -> None:
        methods.set_rank(self.model, self.options.rank)


@method("Quantum-PEFT")
class QuantumPEFT(Method):
    module = "quantum_peft"
    lr = 2e-2  # of angles, in radians

    def make(self, linear: nn.Linear) -> nn.Module:
        return methods.QuantumPEFTLinear(linear, **self.update)


@method("RoSA")
class RoSA(Method):
    """RoSA of half the rank, with about as many values in the sparse update as that saves."""

    module = "rosa"

    def make(self, linear: nn.Module) -> nn.Module:
        rank = max(1, self.options.rank // 2)
        values = rank * (linear.in_features + linear.out_features)
        return methods.RoSALinear(linear, r=rank, lora_alpha=2 * rank, nnz=values)

    def adapt(self, model: nn.Module) -> None:
        super().adapt(model)
        self.schedule = methods.RoSAScheduler(model, max(1, self.options.steps // 4))

    def after_step(self, step: int) -> None:
        self.schedule.step()


@method("RoSA (NF4)")
class RoSANF4(RoSA):
    def make(self, linear: nn.Linear) -> nn.Module:
        return super().make(NF4Linear.from_linear(linear))


@method("LongLoRA")
class LongLoRA(Method):
    """LoRA, with attention in groups of half a sequence while it trains."""

    module = "longlora"

    @classmethod
    def unfit(cls, options: argparse.Namespace) -> str | None:
        return "it needs an even number of heads, of 64 each" if options.hidden % 128 else None

    def adapt(self, model: nn.Module) -> None:
        super().adapt(model)
        enable_shifted_sparse_attention(model, max(2, self.options.seq // 4 * 2))


class Batches:
    """Random pieces of a text, the same for every method, and its held-out end."""

    def __init__(self, text: bytes, options: argparse.Namespace) -> None:
        ids = token_ids(text, None)
        end = len(ids) - int(len(ids) * HELD_OUT)
        if min(end, len(ids) - end) <= options.seq:
            raise InputError(f"--seq {options.seq}: the text has only {len(ids)} bytes")
        self.trained, self.held_out = ids[:end], ids[end:]
        self.options = options

    def draw(self, ids: Tensor, generator: torch.Generator) -> Tensor:
        seq, batch = self.options.seq, self.options.batch
        starts = torch.randint(len(ids) - seq, (batch,), generator=generator).tolist()
        return torch.stack([ids[s : s + seq] for s in starts]).long()

    def loss(self, model: nn.Module) -> float:
        """Compute the loss on the held-out text."""
        generator = torch.Generator().manual_seed(1)
        model.eval()
        with torch.no_grad():
            ids = (self.draw(self.held_out, generator) for _ in range(EVALUATED))
            losses = [model(input_ids=i, labels=i, use_cache=False).loss.item() for i in ids]
        model.train()
        return statistics.fmean(losses)


def train(
    model: nn.Module, work: Method, batches: Batches, steps: int, tick: Callable[[], None]
) -> dict[str, float]:
    """Train one run and return its figures; the model is changed."""
    optimizer = work.optimizer(model)
    generator = torch.Generator().manual_seed(0)
    model.train()
    seconds = []

    def step(number: int) -> None:
        ids = batches.draw(batches.trained, generator)
        work.before_step(number)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        work.after_step(number)
        optimizer.zero_grad(set_to_none=True)

    for number in range(1, steps + 1):
        start = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - start)
        tick()
    loss = batches.loss(model)
    states = [t for state in optimizer.state.values() for t in state.values()]
    kept = sum(t.numel() * t.element_size() for t in states if isinstance(t, Tensor))
    return {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "optimizer_bytes": kept,
        "peak_bytes": peak_bytes(lambda: step(steps + 1), torch.device("cpu")),
        "step_ms": 1e3 * statistics.median(seconds[WARM_UP:] or seconds),
        "loss": loss,
    }


def source_text() -> bytes:
    modules = (importlib.import_module(name) for name in SOURCES)
    return "\n".join(inspect.getsource(module) for module in modules).encode()


def show(results: dict[str, dict[str, float]], before: float) -> None:
    from peftkern.tools import tables

    console = tables.console(None if sys.stdout.isatty() else 100)
    columns = ("method", "trained", "optimizer kB", "step's peak MB", "step ms", "loss")
    grid = tables.table(*columns, numbers=True)
    for name, run in results.items():
        grid.add_row(
            name,
            f"{run['trainable']:,}",
            f"{run['optimizer_bytes'] / 1e3:,.0f}",
            f"{run['peak_bytes'] / 1e6:.1f}",
            f"{run['step_ms']:.1f}",
            f"{run['loss']:.3f}",
        )
    tables.section(console, f"Loss before fine-tuning: {before:.3f}", grid)
    there = {getattr(methods, name).__module__.rpartition(".")[2] for name in methods.__all__}
    absent = sorted(there - {cls.module for cls in METHODS.values()})
    if absent:
        console.print(f"of peftkern.methods, without an entry here: {', '.join(absent)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", nargs="+", choices=list(METHODS), metavar="METHOD", help="; ".join(METHODS)
    )
    parser.add_argument("--steps", type=int, default=80, help="fine-tuning steps (80)")
    parser.add_argument("--pretrain", type=int, default=200, help="steps in full before (200)")
    parser.add_argument("--hidden", type=int, default=128, help="width, a multiple of 64 (128)")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seq", type=int, default=64, help="bytes in a sequence (64)")
    parser.add_argument("--batch", type=int, default=16, help="sequences in a batch (16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", help="fine-tune on this file instead")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(argv)
    for name in ("steps", "pretrain", "hidden", "layers", "rank", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if options.hidden % 64:
        parser.error(f"--hidden: {options.hidden} is not a multiple of 64")
    for name in options.only or ():
        if reason := METHODS[name].unfit(options):
            parser.error(f"--hidden {options.hidden}: not with {name}: {reason}")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: {options.json.parent} is not a folder")
    if options.seq < 2:
        parser.error(f"--seq: expected at least 2, got {options.seq}")
    return options


def main(argv: list[str] | None = None) -> int:
    from rich.console import Console
    from rich.progress import Progress

    options = parse(argv)
    try:
        prose = Batches(read_text(None), options)
        batches = Batches(
            source_text() if options.text is None else read_text(options.text), options
        )
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    base = random_llama(options)
    results = {}
    with Progress(transient=True, console=Console(stderr=True)) as bars:
        bar = bars.add_task("training the base", total=options.pretrain)
        work = METHODS[FULL](options)
        train(base, work, prose, options.pretrain, lambda: bars.advance(bar))
        before = batches.loss(base)
        fit = [name for name, cls in METHODS.items() if not cls.unfit(options)]
        for name in options.only or fit:
            bar = bars.add_task(name, total=options.steps)
            model = copy.deepcopy(base).requires_grad_(False)
            torch.manual_seed(options.seed)
            work = METHODS[name](options)
            work.adapt(model)
            results[name] = train(
                model, work, batches, options.steps, lambda bar=bar: bars.advance(bar)
            )
    show(results, before)
    if options.json is not None:
        record = {"loss_before": before, "threads": torch.get_num_threads(), "methods": results}
        write_json(options.json, record, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
