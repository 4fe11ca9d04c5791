"""End to end: training steps of Llama-shaped models as `peftkern bench --model` measures them; and
whether one step of a large model fits into a given memory.

PEFT alone and patched live in two processes, on the same random weights, and take turns. Before the
clock runs, the losses of the first steps are compared. Peak memory is what a step holds beyond
model and optimizer, beside what `peftkern plan` predicts.

On a CPU: LoRA, QLoRA and AdaLoRA over four narrow layers. On a GPU: Llama-3-8B, QLoRA and LoRA at
512, 2048 and 8192 tokens, with gradient checkpointing and without; LLaMA-65B in NF4 with the
allocator capped at 48 GB; then four layers of Llama-3-8B's width. A case that would not end within
--budget is not begun.

python bench/bench_e2e.py [--device cuda] [--only qlora]
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from specs import Options, Question, Steps
from suite import main, steps_test

from peftkern.tools.bench import memory, training_step
from peftkern.tools.bench.gpu_timer import first_line
from peftkern.tools.bench.peers import bitsandbytes_missing
from peftkern.tools.bench.record import OURS
from peftkern.tools.bench.training_step import Job
from peftkern.tools.bench.training_worker import Worker
from peftkern.tools.plan.plan import Training, plan
from peftkern.tools.plan.presets import PRESETS, linears

Config = dict[str, Any]  # fields of a config.json: of a preset, scaled
LAYERS, VOCABULARY = 4, 8192  # of the narrow models
VOCABULARY_OVER_HIDDEN = 32  # of Llama 3; a narrow toy need not spend its time on the vocabulary
TIMED = 10  # steps
# A case's time, estimated conservatively: starting and drawing both sides, the steps of each, two
# thirds of which are not timed, and what one reaches at least.
BUILD_SECONDS, STEPS, FLOPS, HOST_SECONDS = 40.0, 30, 250e12, 0.3
CAP = 48 * 10**9
FIT_STEPS = 2  # the first makes the optimizer's states, the second has them from its start
LR = 2e-4  # as QLoRA is used


def scaled(model: Config, hidden: int, layers: int) -> Config:
    """Scale to another width with the same proportions, and to at most so many layers."""
    model = {**model, "num_hidden_layers": min(layers, model["num_hidden_layers"])}
    if hidden == model["hidden_size"]:
        return model
    heads = max(1, hidden // model["head_dim"])
    kv_heads = heads * model["num_key_value_heads"] // model["num_attention_heads"]
    return model | {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, kv_heads),
        "head_dim": hidden // heads,
        "intermediate_size": hidden * model["intermediate_size"] // model["hidden_size"],
        "vocab_size": min(model["vocab_size"], VOCABULARY_OVER_HIDDEN * hidden),
    }


def needed_seconds(model: Config, tokens: int, checkpointing: bool) -> float:
    """Estimate the seconds of a case by counting: weights are multiplied twice, and once more where
    activations are recomputed."""
    weights = sum(k * n for k, n in linears(model).values()) * model["num_hidden_layers"]
    head = model["hidden_size"] * model["vocab_size"]
    flops = 2 * tokens * ((3 if checkpointing else 2) * weights + 2 * head)
    return BUILD_SECONDS + 2 * STEPS * max(HOST_SECONDS, flops / FLOPS)


def job_of(
    options: Options, model: Config, folder: Path, method: str, tokens: int, checkpointing: bool
) -> Job:
    """Make the job of a model of random weights; its config lies in the folder."""
    tokens = max(2, options.m(tokens))
    longest = {"max_position_embeddings": max(8192, tokens)}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    (folder / "config.json").write_text(json.dumps(model | longest | ends), encoding="utf-8")
    asked = training_step.Options(
        model=str(folder),
        method="lora" if method == "qlora" else method,
        base="nf4" if method == "qlora" else "bf16",
        targets="all-linear",
        batch=1,
        sequence=tokens,
        checkpointing=checkpointing,
        layers=None,
        steps=TIMED,
    )
    return training_step.plan(asked, str(options.r), "bf16", options.device.type, seed=0)


def case(name: str, method: str, tokens: int, hidden: int, **how: Any) -> Steps:
    """Return the case of Llama-3-8B's proportions.

    how: layers; vocabulary, at most so large; checkpointing.
    """

    def model(options: Options) -> Config:
        found = scaled(PRESETS["llama3-8b"], options.k, options.depth(how.get("layers", 32)))
        return found | {"vocab_size": min(found["vocab_size"], how.get("vocabulary", 1 << 20))}

    checkpointing = how.get("checkpointing", True)
    return Steps(
        f"e2e/{name}/{'nf4' if method == 'qlora' else 'bf16'}",
        lambda options, folder: job_of(
            options, model(options), folder, method, tokens, checkpointing
        ),
        shape=(hidden, hidden),
        seconds=lambda options: needed_seconds(model(options), options.m(tokens), checkpointing),
    )


def whole(method: str, tokens: int, checkpointing: bool = True) -> Steps:
    """Return the case of the whole model."""
    name = f"llama3-8b-{method}-{tokens}-tokens{'' if checkpointing else '-no-checkpointing'}"
    return case(name, method, tokens, 4096, checkpointing=checkpointing)


def few_layers(method: str, tokens: int, hidden: int) -> Steps:
    name = f"{method}-{LAYERS}-layers-{tokens}-tokens"
    how = {"layers": LAYERS, "vocabulary": VOCABULARY, "checkpointing": False}
    one = case(name, method, tokens, hidden, **how)
    return replace(one, seconds=lambda options: 0.0)


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
    cap: int = CAP,
) -> None:
    """Measure whether whole optimizer steps of LLaMA-65B stay within `cap` bytes of allocations:
    NF4, r=64 adapters on every linear layer, gradient checkpointing.

    note: called with the prediction, then the progress, then the answer. The optimizer keeps
    float32 states, which are bitsandbytes' for bf16 adapters; where that does not run, torch's, in
    bf16. They are not paged: what a driver moves to the host would be in no figure.
    """
    device, options = options.device, replace(options, r=64)
    model = scaled(PRESETS["llama-65b"], options.k, options.depth(80))
    with_bnb = device.type == "cuda" and bitsandbytes_missing(device) is None
    training = Training(
        "qlora",
        r=64,
        adapter_dtype=adapter,
        optimizer="adamw-32bit" if adapter == "bf16" and with_bnb else "adamw",
        sequence=max(2, options.m(512)),
        device=device.type,
    )
    planned = plan(model, training)
    note(
        question=f"do {FIT_STEPS} optimizer steps fit?",
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

    def within_time() -> float:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no time left after {seconds:.0f} s")
        return time.monotonic()

    def run() -> None:
        started = within_time()
        with tempfile.TemporaryDirectory() as folder:
            job = job_of(options, model, Path(folder), "qlora", 512, checkpointing=True)
            worker = Worker(OURS)
            worker.start(asdict(job.step), torch.get_num_threads())
        if adapter == "bf16":
            for parameter in worker.trained:
                parameter.data = parameter.data.bfloat16()
        worker.begin(optimizer_of(training.optimizer)(worker.trained, lr=LR))
        note(reached="model", build_s=time.monotonic() - started)
        took, losses, batch = [], [], worker.batch(0)
        for done in range(FIT_STEPS):
            started = within_time()
            losses.append(worker.train(batch))  # synchronizes
            took.append(time.monotonic() - started)
            note(reached=f"step {done + 1}", step_s=took, losses=losses)

    with capped(device, cap):
        answer(run, device, cap, note)


def optimizer_of(name: str) -> type[torch.optim.Optimizer]:
    if name == "adamw":
        return torch.optim.AdamW
    from bitsandbytes.optim import AdamW32bit

    return AdamW32bit


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


def fit_question(adapter: str) -> Question:
    def ask(options: Options, seconds: float | None, note: Callable[..., None]) -> None:
        does_it_fit(options, seconds, note, adapter=adapter)

    name = f"e2e/llama-65b-r64-512-tokens-{CAP // 10**9}GB-{adapter}-adapters/nf4"
    return Question(name, ask, shape=(8192, 8192))


METHODS = ("qlora", "lora", "adalora")
CASES = [few_layers(method, 256, 1024) for method in METHODS]


def gpu_cases(device: torch.device) -> list[Steps | Question]:
    """Return the cases and questions, most wanted first."""
    return [
        whole("qlora", 2048),
        whole("qlora", 512),
        whole("lora", 2048),
        fit_question("bf16"),
        whole("qlora", 8192),
        whole("qlora", 2048, checkpointing=False),
        whole("lora", 512),
        whole("lora", 8192),
        fit_question("fp32"),
        *(few_layers(method, 2048, 4096) for method in METHODS),
    ]


test_e2e = steps_test(CASES)

if __name__ == "__main__":
    sys.exit(main("e2e", CASES, gpu_cases))
