"""Trainings under DeepSpeed's ZeRO on this CPU, for `engines.in_ranks`."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from engines import optimizer_of, share
from torch import Tensor, nn

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # half a minute to compile
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def config_of(stage: int, accumulate: int = 1, **options: Any) -> dict[str, Any]:
    """A config of DeepSpeed; options but "bf16" and "clip" go into its part on ZeRO.

    It clips gradients of its own accord, here only to the norm that is given. Stage 3 gathers and
    drops every parameter, also the small ones that it would keep.
    """
    bf16 = options.pop("bf16", False)
    clip = options.pop("clip", 0.0)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, **options}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
    }


def engine_of(
    model: nn.Module, config: dict[str, Any], optimizer: torch.optim.Optimizer | None = None
) -> deepspeed.DeepSpeedEngine:
    optimizer = optimizer or optimizer_of(model)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
    return engine


def zero_curve(engine: deepspeed.DeepSpeedEngine, steps: range) -> Tensor:
    """Losses of the whole batch of each step, which this rank takes its rows of."""
    found, parts = [], engine.gradient_accumulation_steps()
    for step in steps:
        batch = {name: rows.chunk(parts) for name, rows in share(step).items()}
        losses = []
        for i in range(parts):
            loss = engine(**{name: rows[i] for name, rows in batch.items()}).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach().float())
        found.append(sum(losses) / parts)
    curve = torch.stack(found)
    dist.all_reduce(curve)
    return curve / dist.get_world_size()
