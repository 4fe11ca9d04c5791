"""AdaLoRA's step before and after compaction to the budget, beside what `peftkern plan` says.

Two copies of a Llama train to AdaLoRA's last mask; one is compacted then, in the other pruned
triplets stay, as zeros. Their further steps alternate and are measured in CPU time, so that other
work on the machine moves both alike. The plan counts FLOPs and bytes of every op, at the rates that
this machine reaches just now.

    python bench/studies/adalora_compaction.py                # two minutes on one core
    python bench/studies/adalora_compaction.py --hidden 1024 --r 32 --target-r 16 --json c.json

Exit status: 0, the time that is left is within a tenth of the plan's; 1, not; 2, bad input.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftkern
from peftkern.integrations.peft.adalora_compact import compact_
from peftkern.integrations.peft.adalora_steps import AdaLoraSteps
from peftkern.tools.plan.plan import Planner, Training
from peftkern.tools.plan.rates import measured

TOLERANCE = 0.1
LAST = 4  # the step of the last mask


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"hidden": 512, "layers": 4, "r": 64, "target-r": 32, "sequence": 256, "steps": 12}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    found = parser.parse_args(arguments)
    for name in (*sizes, "threads"):
        if vars(found)[name.replace("-", "_")] < 1:
            parser.error(f"--{name}: expected at least 1")
    if found.hidden % 64 or found.target_r > found.r:
        parser.error("--hidden, --target-r: expected a multiple of 64, and at most --r")
    return found


def model_config(options: argparse.Namespace) -> LlamaConfig:
    sizes = {"hidden_size": options.hidden, "num_hidden_layers": options.layers, "vocab_size": 1024}
    sizes |= {"intermediate_size": options.hidden * 11 // 4, "num_attention_heads": 8}
    return LlamaConfig(**sizes, num_key_value_heads=8, use_cache=False)


def trained(options: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train to the last mask; nothing is compacted."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(model_config(options))
    ranks = {"init_r": options.r, "target_r": options.target_r}
    schedule = {"total_step": 2 * LAST, "tinit": 1, "tfinal": LAST, "deltaT": 1}
    linear = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, AdaLoraConfig(**ranks, **schedule, **linear))
    peftkern.patch(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    steps = AdaLoraSteps(model, optimizer, 2 * LAST, compact=None)
    for seed in range(LAST):
        step(model, optimizer, batch(options, seed))
    steps.close()
    return model, optimizer


def batch(options: argparse.Namespace, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1024, (1, options.sequence), generator=generator)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    """Return the CPU time of a training step."""
    start = time.process_time()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - start


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of what is trained, of as large a gradient, and of the optimizer's states."""
    tensors = [t for s in optimizer.state.values() for t in s.values() if t.dim()]
    tensors += 2 * [p for p in model.parameters() if p.requires_grad]
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(options: argparse.Namespace) -> dict[str, dict]:
    model, optimizer = trained(options)
    pairs = {"pruned": (model, optimizer), "compacted": copy.deepcopy((model, optimizer))}
    compact_(*pairs["compacted"])
    times: dict[str, list[float]] = {name: [] for name in pairs}
    for seed in range(options.steps + 3):
        for name, pair in pairs.items():
            times[name].append(step(*pair, batch(options, seed)))
    return {
        name: {
            "seconds": statistics.median(times[name][3:]),  # layers are tried in the first steps
            "bytes": held(*pair),
            "trainable": sum(p.numel() for p in pair[0].parameters() if p.requires_grad),
        }
        for name, pair in pairs.items()
    }


def planned(options: argparse.Namespace) -> dict[str, dict]:
    training = Training(
        "adalora",
        r=options.r,
        target_r=options.target_r,
        dtype="fp32",
        sequence=options.sequence,
        checkpointing=False,
        device="cpu",
    )
    plans = Planner(model_config(options), training).compacted()
    rates = measured("cpu", "fp32")
    print(f"plan: each op at {rates}")
    parts = ("adapters", "optimizer states")
    return {
        name: {
            "seconds": plan.work.seconds(rates),
            "bytes": sum(plan.fixed[part] for part in parts)
            + plan.phases["optimizer"]["gradients"],
            "trainable": plan.trainable,
            "flops": plan.work.flops,
        }
        for name, plan in zip(("pruned", "compacted"), plans, strict=True)
    }


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    plan, found = planned(options), measure(options)
    left = {}
    for name, sides in (("plan", plan), ("measured", found)):
        before, after = sides["pruned"], sides["compacted"]
        left[name] = after["seconds"] / before["seconds"]
        print(
            f"{name:8}  step {before['seconds'] * 1e3:6.0f} -> {after['seconds'] * 1e3:6.0f} ms CPU"
            f" ({left[name] - 1:+.1%}), trained with its states "
            f"{before['bytes'] / 1e6:.1f} -> {after['bytes'] / 1e6:.1f} MB, "
            f"{before['trainable'] / 1e6:.2f} -> {after['trainable'] / 1e6:.2f} million parameters"
        )
    off = left["measured"] / left["plan"] - 1
    print(f"the time that is left is {off:+.1%} off the plan's")
    if options.json:
        record = {"options": vars(options) | {"json": None}, "plan": plan, "measured": found}
        options.json.write_text(json.dumps(record, indent=2))
    return 0 if abs(off) <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
