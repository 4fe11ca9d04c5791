"""End to end: whole training steps (forward, backward, AdamW) of Llama-shaped stacks, with PEFT
alone and patched; and whether one step of a large model fits into a given memory.

Both variants start from the same numbers and learn the same batch. Before the clock runs, the loss
and every adapter's gradient of the first step are compared with float64; of Llama-3-8B, whose
float64 weights would not fit, the first losses with PEFT's. Tokens per second are tokens over the
median; peak memory is what a step holds beyond model and optimizer, beside what `peftkern plan`
predicts. The base is NF4 by bitsandbytes where that runs, else by peftkern.layers.NF4Linear.

On a CPU: LoRA, QLoRA and AdaLoRA over four narrow layers. On a GPU: Llama-3-8B, QLoRA and LoRA at
512, 2048 and 8192 tokens, with gradient checkpointing and without; LLaMA-65B in NF4 with the
allocator capped at 48 GB; then four layers of Llama-3-8B's width. Both variants of a whole model
have trees of modules of their own over one frozen base, and cases with the same base share it. A
case that would not end within --budget is not begun.

python bench/bench_e2e.py [--device cuda] [--only qlora]
"""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from specs import Case, Options, Question, Spec, Variant
from stacks import Config, Trainer, scaled, stack
from suite import benchmark_test, main
from torch import nn

from peftkern.tools.bench import memory
from peftkern.tools.bench.gpu_timer import first_line
from peftkern.tools.bench.peers import bitsandbytes_missing
from peftkern.tools.bench.record import OURS
from peftkern.tools.plan.plan import PRESETS, Plan, Training, plan
from peftkern.tools.plan.presets import linears

PEFT = "PEFT"
BF16 = torch.bfloat16
LAYERS, VOCABULARY = 4, 8192  # of the stacks that float64 can follow
LR = 2e-4  # as QLoRA is used; the losses after it show a wrong gradient
CURVE = 5  # losses that are compared where gradients are not
# A case's time, estimated conservatively: drawing the model, what each variant runs beside its
# curve (timed calls and those before them, one for memory), and what a step reaches at least.
BUILD_SECONDS, CALLS, FLOPS, HOST_SECONDS = 15.0, 7, 250e12, 0.3
# bf16 gradients through four layers are off by a percent or two; AdaLoRA's by less.
GRADIENTS_WRONG = 0.1
CAP = 48 * 10**9
STEPS = 2  # the first makes the optimizer's states, the second has them from its start


def counted(model: Config, training: Training) -> tuple[int, int]:
    """Return bytes and FLOPs: weights are read and multiplied twice, and once more where
    activations are recomputed."""
    weights = sum(k * n for k, n in linears(model).values()) * model["num_hidden_layers"]
    head = model["hidden_size"] * model["vocab_size"]
    passes = 3 if training.checkpointing else 2
    size = {"nf4": 0.516, "bf16": 2.0, "fp32": 4.0}[training.base]
    tokens = training.batch * training.sequence
    traffic = passes * weights * size + 2 * 2 * head
    return int(traffic), 2 * tokens * (passes * weights + 2 * head)


def beyond_the_model(planned: Plan) -> int:
    return planned.peak - sum(planned.fixed.values())


class Bases:
    """Cache of the frozen base that cases share: only the last one, as two may not fit."""

    def __init__(self) -> None:
        self.drop()

    def drop(self) -> None:
        self.key, self.net = None, None

    def get(self, model: Config, training: Training, device: torch.device) -> nn.Module:
        key = (model, training.base, training.dtype, device)
        if key != self.key:
            self.drop()
            gc.collect()
            self.key, self.net = key, stack(model, training, device, lambda: None)
        return self.net


def needed_seconds(model: Config, training: Training) -> float:
    """Estimate the seconds of both variants of a whole model; about half of them is not timed."""
    step = max(HOST_SECONDS, counted(model, training)[1] / FLOPS)
    return BUILD_SECONDS + 2 * (CURVE + CALLS) * step


def build(options: Options, model: Config, training: Training, base: nn.Module | None) -> Case:
    """Build the variants of PEFT and ours. Over a shared `base` the oracle is PEFT's first losses;
    without one each has its own base, and the oracle is float64."""
    exact = base is None
    trainings = {
        OURS: replace(training, patched=True, device=options.device.type),
        PEFT: replace(training, patched=False, device=options.device.type),
    }
    trainers = {
        name: Trainer(model, one, options.device, lr=LR, keep_first=exact, over=base)
        for name, one in trainings.items()
    }
    report = trainers[OURS].report
    if report.skipped or len(report.patched) < model["num_hidden_layers"] * len(linears(model)):
        raise RuntimeError(f"peftkern.patch left layers out: {report}")
    oracle = trainers[PEFT].exact() if exact else (trainers[PEFT].curve(CURVE).double(),)
    gc.collect()

    def variant(name: str) -> Variant:
        trainer = trainers[name]
        return Variant(
            trainer.step,
            oracle,
            lambda loss: trainer.first() if exact else trainer.curve(CURVE),
            planned_bytes=beyond_the_model(plan(model, trainings[name])),
        )

    tokens = training.batch * training.sequence
    variants = {name: variant(name) for name in (OURS, PEFT)}
    return Case(variants, *counted(model, training), BF16, tokens)


def few_layers(options: Options, method: str, tokens: int) -> Case:
    """Spec of a few layers of Llama-3-8B's proportions, whose gradients float64 checks."""
    model = scaled(PRESETS["llama3-8b"], options.k, options.depth(LAYERS))
    model["vocab_size"] = min(VOCABULARY, model["vocab_size"])
    sequence = max(2, options.m(tokens))
    training = Training(method, r=options.r, sequence=sequence, checkpointing=False)
    return build(options, model, training, base=None)


def llama3_8b_spec(bases: Bases, method: str, tokens: int, checkpointing: bool = True) -> Spec:
    """Spec of the whole model."""

    def sized(options: Options) -> tuple[Config, Training]:
        model = scaled(PRESETS["llama3-8b"], options.k, options.depth(32))
        sequence = max(2, options.m(tokens))
        return model, Training(method, r=options.r, sequence=sequence, checkpointing=checkpointing)

    def built(options: Options) -> Case:
        model, training = sized(options)
        return build(options, model, training, bases.get(model, training, options.device))

    base = "nf4" if method == "qlora" else "bf16"
    suffix = "" if checkpointing else "-no-checkpointing"
    return Spec(
        f"e2e/llama3-8b-{method}-{tokens}-tokens{suffix}/{base}",
        built,
        (OURS, PEFT),
        PEFT,
        shape=(4096, 4096),
        seconds=lambda options: needed_seconds(*sized(options)),
    )


def few_layers_spec(method: str, tokens: int, hidden: int) -> Spec:
    base = "nf4" if method == "qlora" else "bf16"
    return Spec(
        f"e2e/{method}-{LAYERS}-layers-{tokens}-tokens/{base}",
        lambda options: few_layers(options, method, tokens),
        (OURS, PEFT),
        PEFT,
        peer_wrong=GRADIENTS_WRONG,
        shape=(hidden, hidden),
    )


@contextlib.contextmanager
def capped(device: torch.device, cap: int) -> Iterator[None]:
    """Cap torch's allocator at `cap` bytes of the GPU; a CPU's has no such limit."""
    if device.type != "cuda":
        yield
        return
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        gc.collect()
        torch.cuda.empty_cache()


def does_it_fit(
    options: Options,
    seconds: float | None,
    note: Callable[..., None],
    *,
    adapter: str,
    sequence: int = 512,
    cap: int = CAP,
) -> None:
    """Measure whether whole optimizer steps of LLaMA-65B stay within `cap` bytes of allocations:
    NF4, r=64 adapters on every linear layer, gradient checkpointing.

    note: called with the prediction, then the progress, then the answer. The optimizer keeps
    float32 states, which are bitsandbytes' for bf16 adapters; where that does not run, torch's, in
    bf16. They are not paged: what a driver moves to the host would be in no figure.
    """
    device = options.device
    model = scaled(PRESETS["llama-65b"], options.k, options.depth(80))
    with_bnb = device.type == "cuda" and bitsandbytes_missing(device) is None
    training = Training(
        "qlora",
        r=64,
        adapter_dtype=adapter,
        optimizer="adamw-32bit" if adapter == "bf16" and with_bnb else "adamw",
        sequence=max(2, min(sequence, options.m(sequence))),
        device=device.type,
    )
    planned = plan(model, training)
    note(
        question=f"do {STEPS} optimizer steps fit?",
        cap_bytes=cap,
        planned_bytes=planned.peak,
        planned_fit=planned.peak <= cap,
        layers=model["num_hidden_layers"],
        parameters=planned.parameters,
        trained=planned.trainable,
        tokens=training.sequence,
        r=training.r,
        adapter=adapter,
        optimizer=training.optimizer,
        reached="nothing",
    )
    deadline = float("inf") if seconds is None else time.monotonic() + seconds

    def within_time() -> None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no time left after {seconds:.0f} s")

    def run() -> None:
        started = time.monotonic()
        trainer = Trainer(model, training, device, lr=LR, tick=within_time)
        note(reached="model", build_s=time.monotonic() - started)
        took, losses = [], []
        for done in range(STEPS):
            within_time()
            started = time.monotonic()
            losses.append(trainer.step().item())  # synchronizes
            took.append(time.monotonic() - started)
            note(reached=f"step {done + 1}", step_s=took, losses=losses)

    with capped(device, cap):
        answer(run, device, cap, note)


def answer(
    run: Callable[[], None], device: torch.device, cap: int, note: Callable[..., None]
) -> None:
    """Run the steps and note the answer: out of memory is one, out of time is none."""
    try:
        peak = memory.peak_bytes(run, device)
        note(fits=peak <= cap, peak_bytes=peak)
    except torch.OutOfMemoryError as error:
        note(fits=False, stopped=first_line(error))
    except TimeoutError as error:
        note(fits=None, stopped=str(error))
    if device.type == "cuda":
        note(
            allocated_bytes=torch.cuda.max_memory_allocated(),
            reserved_bytes=torch.cuda.max_memory_reserved(),  # what the cap is about
        )


def fit_question(adapter: str, bases: Bases) -> Question:
    def ask(options: Options, seconds: float | None, note: Callable[..., None]) -> None:
        bases.drop()  # the cap is on all that the process holds
        does_it_fit(options, seconds, note, adapter=adapter)

    name = f"e2e/llama-65b-r64-512-tokens-{CAP // 10**9}GB-{adapter}-adapters/nf4"
    return Question(name, ask, shape=(8192, 8192))


METHODS = ("qlora", "lora", "adalora")
SPECS = [few_layers_spec(method, 256, 1024) for method in METHODS]


def gpu_specs(device: torch.device) -> list[Spec | Question]:
    """Return the cases and questions, most wanted first."""
    bases = Bases()
    whole = functools.partial(llama3_8b_spec, bases)

    return [
        whole("qlora", 2048),
        whole("qlora", 512),
        whole("lora", 2048),
        fit_question("bf16", bases),
        whole("qlora", 8192),
        whole("qlora", 2048, checkpointing=False),
        whole("lora", 512),
        whole("lora", 8192),
        fit_question("fp32", bases),
        *(few_layers_spec(method, 2048, 4096) for method in METHODS),
    ]


test_e2e = benchmark_test(SPECS)

if __name__ == "__main__":
    sys.exit(main("e2e", SPECS, gpu_specs))
