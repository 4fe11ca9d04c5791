"""What methods do where several processes train one model: read whole factors, decide alike.

FSDP2 holds every parameter as a DTensor, of which a process has a part. Methods that read a factor
as a matrix gather it (factors are small) and write back the part that is here. What FSDP1 and
DeepSpeed's ZeRO-3 leave of a parameter tells nothing of its shape: it is refused by name.

What is drawn or chosen in one process (a rank, a mask, a seed) is that of the first everywhere.
Every process has to call what asks for it, as often and in one order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peftkern.functional.arguments import IN_FLAT_PARAMETER, SHARD_OTHERWISE

# Its WORLD is what `dist.is_initialized` asks for, in two calls more: small layers ask each time.
_GROUPS = dist.GroupMember if dist.is_available() else None
_FLAT = "_fsdp_flattened"  # attribute that FSDP1 leaves at the parameters in its flat ones


def several() -> bool:
    """Return whether a process group of more than one process is there."""
    return _GROUPS is not None and _GROUPS.WORLD is not None and dist.get_world_size() > 1


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, as FSDP2 makes of parameters and their gradients."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return all of a sharded tensor, which the processes gather together; others as they are.

    Gradients: tensor.
    """
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def are_plain(parameters: Sequence[Tensor]) -> bool:
    """Return whether no engine has any of these: then nothing has to be asked of each.

    FSDP2's are of another type, FSDP1 and DeepSpeed leave attributes; what else has some is asked.
    """
    return {*map(type, parameters)} <= {nn.Parameter} and not any(p.__dict__ for p in parameters)


def with_gradient(parameter: Tensor) -> Tensor:
    """Return a sharded parameter whole, as a leaf with its gradient; others as they are."""
    if not is_sharded(parameter):
        return parameter
    gathered = parameter.detach().full_tensor()
    if parameter.grad is not None:
        gathered.grad = parameter.grad.full_tensor()
    return gathered


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """Return of a whole tensor, equal in all processes, what `like` would hold of it.

    A DTensor for a sharded `like`; the tensor itself for others.
    """
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def stepped_by_deepspeed(parameter: Tensor) -> bool:
    """Return whether the optimizer of DeepSpeed's ZeRO, of any stage, has a master of it."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer")


def check_unheld(name: str, parameter: Tensor, why: str) -> None:
    """Raise ValueError if DeepSpeed's ZeRO has the step of a parameter, as a part of flat ones."""
    if stepped_by_deepspeed(parameter):
        raise ValueError(
            f"{name}: DeepSpeed's ZeRO steps on flat parts of all parameters, {why}; "
            f"{SHARD_OTHERWISE}"
        )


def in_pieces(tensor: Tensor) -> bool:
    """Return whether FSDP1 or DeepSpeed's ZeRO-3 has left a piece of a matrix, or nothing."""
    return (getattr(tensor, _FLAT, False) and tensor.dim() != 2) or hasattr(tensor, "ds_id")


def check_readable(
    named: Iterable[tuple[str, Tensor]], method: str, model: nn.Module | None = None
) -> None:
    """Raise ValueError, naming the parameter, if FSDP1 or DeepSpeed's ZeRO-3 holds one in pieces.

    Args: named, the parameters that `method` reads as matrices; model, that they are of, whose
        modules are looked through, too.
    """
    wrapped = model is not None and any(map(_is_fsdp1, model.modules()))
    for name, tensor in named:
        check_not_flat(name, tensor, method, wrapped)
        if hasattr(tensor, "ds_id"):
            raise ValueError(
                f"{name}: DeepSpeed's ZeRO-3 holds it in pieces, and {method} reads it whole; "
                "train under DistributedDataParallel, or shard the model by fully_shard"
            )


def check_not_flat(name: str, tensor: Tensor, method: str, wrapped: bool = False) -> None:
    """Raise ValueError if FSDP1 shards a matrix in a flat parameter, or could (`wrapped`)."""
    lost = not isinstance(tensor, nn.Parameter) and several()  # use_orig_params=False
    if wrapped or lost or (getattr(tensor, _FLAT, False) and tensor.dim() != 2):
        raise ValueError(
            f"{name}: {IN_FLAT_PARAMETER}, and {method} reads it whole; {SHARD_OTHERWISE}"
        )


def _is_fsdp1(module: nn.Module) -> bool:
    """Return whether a module shards its parameters; with NO_SHARD they stay as they are."""
    strategy = getattr(module, "sharding_strategy", None)
    return type(module).__name__ == "FullyShardedDataParallel" and strategy.name != "NO_SHARD"


def of_first(value: int, device: torch.device) -> int:
    """Return the number that the first process gives here."""
    if not several():
        return value
    shared = torch.tensor(value, dtype=torch.int64, device=device)
    dist.broadcast(shared, 0)
    return int(shared)


def any_of(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set in any process."""
    if not several():
        return flag
    shared = torch.tensor(int(flag), device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return bool(shared)


def agree(content: bytes, device: torch.device) -> bool:
    """Return whether all processes give the same bytes: one reduction of two integers."""
    if not several():
        return True
    digest = int.from_bytes(hashlib.sha256(content).digest()[:7], "big")
    extremes = torch.tensor([digest, -digest], dtype=torch.int64, device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    return bool(extremes[0] == -extremes[1])


def sums_of_all(index: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """Add up what the processes have at each index, int64 [n], n of each process its own.

    Returns: ascending indices and their sums, the first process's, so that no order of sums tells
        processes apart.
    """
    if not several():
        return index, score
    indices, scores = _gathered(index), _gathered(score)
    index, place = torch.cat(indices).unique(return_inverse=True)
    score = score.new_zeros(len(index)).index_add_(0, place, torch.cat(scores))
    dist.broadcast(score, 0)
    return index, score


def _gathered(tensor: Tensor) -> list[Tensor]:
    """Return the vector of each process."""
    count = torch.tensor(len(tensor), device=tensor.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    lengths = [int(c) for c in counts]
    padded = tensor.new_zeros(max(lengths))
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return [part[:length] for part, length in zip(parts, lengths, strict=True)]
