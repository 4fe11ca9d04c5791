"""Steps of a model that several devices share: what they send, what torch's allocator counts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from plan_steps import DTYPES, allocations
from tiny_models import SIZES, make_model, tiny_config
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from peftkern.tools import models
from peftkern.tools.plan.plan import Training

NAMES = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "broadcast_": "broadcast",
}


class Collectives(TorchDispatchMode):
    """Calls of collectives by name, and the bytes of the larger side of each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            name = NAMES[func._schema.name.removeprefix("c10d::")]
            sides = ([t for t in tree_iter(a) if isinstance(t, Tensor)] for a in args[:2])
            self.calls[name] += 1
            self.bytes[name] += max(sum(t.nbytes for t in side) for side in sides)
        return func(*args, **(kwargs or {}))


def shared_model(kind: str, training: Training) -> nn.Module:
    """Make the model of a training as a user does who spreads it over the process group."""
    if training.method == "full":
        config = tiny_config(kind)
        config.use_cache = False
        model = models.auto_class(config).from_config(config, dtype=DTYPES[training.dtype]).train()
        layers = model.model.layers
    else:
        model = make_model(kind, training)
        layers = model.base_model.model.model.layers
    if training.shard == "ddp":
        return DistributedDataParallel(model)
    dtypes = (DTYPES.get(name) for name in (training.param_dtype, training.reduce_dtype))
    policy = MixedPrecisionPolicy(**dict(zip(("param_dtype", "reduce_dtype"), dtypes, strict=True)))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=training.reshard)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


class Steps:
    """Steps of a model in this process, as `plan_steps.measured` has them."""

    def __init__(self, model: nn.Module, training: Training) -> None:

        self.model = model
        self.ids = torch.randint(SIZES["vocab_size"], (training.batch, training.sequence))
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        self.losses: list[Tensor] = []

    def forward(self) -> None:
        self.losses.append(self.model(input_ids=self.ids, labels=self.ids).loss)

    def backward(self) -> None:
        self.losses.pop().backward()

    def step(self) -> None:
        self.forward()
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def collectives(rank: int, kind: str, training: Training) -> tuple[dict, dict]:
    """Count the collectives of a third step: in the second, DDP's ranks agree on its buckets."""
    steps = Steps(shared_model(kind, training), training)
    steps.step()
    steps.step()
    with Collectives() as found:
        steps.step()
    return dict(found.calls), dict(found.bytes)


def peaks(kind: str, training: Training) -> dict[str, int]:
    """Measure the peak of each phase of a third step, and what a device holds, to the byte."""
    model = shared_model(kind, training)
    steps = Steps(model, training)
    steps.step()
    steps.step()
    phases = {"forward": steps.forward, "backward": steps.backward}
    held = allocations(**phases, optimizer=steps.optimizer.step)
    states = (t for state in steps.optimizer.state.values() for t in state.values())
    return {
        **{phase: max(totals) for phase, totals in held.items()},
        "gradients": held["backward"][-1],
        "states": sum(_local(t).nbytes for t in states),
        "held": sum(_local(t).nbytes for own in (model.parameters(), model.buffers()) for t in own),
    }


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
