"""Triplets that leave a layer: its parameters, their gradients, and what an optimizer holds.

Parameters keep their identity, so that groups of optimizers, hooks and whatever else refers to them
stays as it is. Understood are states of the parameter's shape (all of torch's optimizers but
LBFGS), stacks of them, factors of them (Adafactor of torch and of transformers), and bitsandbytes'
8-bit ones, codes with a scale for each block of 256.
"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["check_states", "forget_misfits_", "grow_triplets_", "shrink_triplets_"]

_DIMENSIONS = 0, 0, 1  # of lora_E [r, 1], lora_A [r, K], lora_B [N, r] along which triplets lie
_BLOCK = 256  # elements with one scale in bitsandbytes' 8-bit states
_FACTORS = {"exp_avg_sq_row": 0, "exp_avg_sq_col": 1}  # of transformers' Adafactor, by dimension
_FACTORED = {**_FACTORS, "row_var": 0, "col_var": 1}  # and of torch's, which keeps the dimension
_PLAIN_VALUES = (Number, str, torch.dtype, torch.device, type(None))
_SCALES = ("absmax", "qmap", "unorm_vec", "gnorm_vec")  # of bitsandbytes' beside its states


def check_states(
    optimizer: torch.optim.Optimizer | None, layers: Iterable[tuple[nn.Parameter, ...]]
) -> None:
    """Raise ValueError naming a state of the optimizer that no triplet can leave.

    Args: layers, (lora_E, lora_A, lora_B) of each. Ask before the first of them shrinks.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer: LBFGS keeps all parameters in one history")
    for triplets in layers if optimizer is not None else ():
        for parameter, dim in zip(triplets, _DIMENSIONS, strict=True):
            held = optimizer.state.get(parameter, {})
            try:
                _check_values(held)
                for name, value, _ in _tensors(held):
                    _axis(name, value, parameter.shape, dim)
            except ValueError as error:
                kind = type(optimizer).__name__
                raise ValueError(f"optimizer: {error}, in the state of {kind}") from None


def _check_values(held: dict[str, Any]) -> None:
    """Raise ValueError naming what may hold tensors besides (the preconditioners of Shampoo)."""
    for name, value in held.items():
        if not (isinstance(value, Tensor) or _is_plain(value)):
            raise ValueError(f"{name} is a {type(value).__name__}, expected a tensor or a number")


def _is_plain(value: Any) -> bool:
    """Return whether a value holds no tensor, nor an object that may hold one."""
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, _PLAIN_VALUES)


def forget_misfits_(
    optimizer: torch.optim.Optimizer, layers: Iterable[tuple[nn.Parameter, ...]]
) -> int:
    """Forget what an optimizer holds of parameters that have another number of triplets now.

    Fused steps would read and write beyond it. It starts anew, as for a parameter never seen.
    Returns: of how many parameters.
    """
    count = 0
    for triplets in layers:
        for parameter, dim in zip(triplets, _DIMENSIONS, strict=True):
            held = optimizer.state.get(parameter, {})
            if any(_misfits(name, v, parameter.shape, dim) for name, v, _ in _tensors(held)):
                del optimizer.state[parameter]
                count += 1
    return count


def _misfits(name: str, value: Tensor, shape: torch.Size, dim: int) -> bool:
    """Return whether a state is of a parameter that differs from this one in triplets alone."""
    if name in _FACTORED:
        along = _FACTORED[name]
        return value.shape[0 if value.dim() == 1 else along] != shape[along]
    sizes = value.shape[value.dim() - len(shape) :]  # the last ones, of a stack
    if len(sizes) != len(shape) or sizes[dim] == shape[dim]:
        return False
    return all(sizes[other] == shape[other] for other in range(len(shape)) if other != dim)


def shrink_triplets_(
    lora_E: nn.Parameter,
    lora_A: nn.Parameter,
    lora_B: nn.Parameter,
    keep: Tensor,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Drop the triplets where `keep` [r] is False from three parameters, in place.

    Their gradients and the optimizer's states of them (AdamW: exp_avg, exp_avg_sq) shrink with
    them. 8-bit states are quantized anew where blocks are cut, to the nearest code.
    """
    if keep.shape != (lora_E.shape[0],) or keep.dtype is not torch.bool:
        raise ValueError(
            f"keep: expected bool [{lora_E.shape[0]}], got {keep.dtype} {list(keep.shape)}"
        )
    index = keep.nonzero().flatten()
    if len(index) == len(keep):
        return
    for parameter, dim in zip((lora_E, lora_A, lora_B), _DIMENSIONS, strict=True):
        held = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        for name, value, scales in list(_tensors(held)):
            axis = _axis(name, value, parameter.shape, dim)
            if axis is None:
                continue
            if scales is None:
                held[name] = _in_place(value, value.index_select(axis, index))
            else:
                absmax = held[scales]
                codes, held[scales] = _select_blockwise(
                    value, absmax, held[scales.replace("absmax", "qmap")], axis, index
                )
                held[name] = _in_place(value, codes)
        _shrink_(parameter, dim, index)


def grow_triplets_(
    lora_E: nn.Parameter, lora_A: nn.Parameter, lora_B: nn.Parameter, here: Tensor
) -> None:
    """Make room for triplets that were dropped, in place: zeros where `here` [r] is False.

    Gradients grow along; an optimizer's states do not, see `forget_misfits_`.
    """
    index = here.nonzero().flatten()
    for parameter, dim in zip((lora_E, lora_A, lora_B), _DIMENSIONS, strict=True):
        grad = parameter.grad
        wide = _grown(parameter.data, dim, index, len(here))
        _set_data_(parameter, wide, None if grad is None else _grown(grad, dim, index, len(here)))


def _grown(tensor: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
    """Return a larger tensor that has these slices at the indices, and zeros elsewhere."""
    shape = [*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]]
    return tensor.new_zeros(shape).index_copy_(dim, index, tensor)


def _shrink_(parameter: nn.Parameter, dim: int, index: Tensor) -> None:
    grad, kept = parameter.grad, parameter.data.index_select(dim, index)
    _set_data_(parameter, kept, None if grad is None else grad.index_select(dim, index))


def _set_data_(parameter: nn.Parameter, kept: Tensor, grad: Tensor | None) -> None:
    """Give a parameter other data, and a gradient, of another size."""
    parameter.grad = None  # its shape has to follow the data's
    # Where a graph of the last step is alive, so is the node that accumulates gradients, and it
    # insists on the old shape: torch makes another one when the dtype of the data changes.
    other = torch.float32 if kept.dtype is torch.float64 else torch.float64
    parameter.data = kept.new_empty(0, dtype=other)
    parameter.data = kept
    parameter.grad = grad


def _tensors(held: dict[str, Any]) -> Iterable[tuple[str, Tensor, str | None]]:
    """Yield (name, tensor, name of its scales or None) of what is held for one parameter."""
    for name, value in held.items():
        if not isinstance(value, Tensor) or ("state1" in held and name.startswith(_SCALES)):
            continue
        scales = name.replace("state", "absmax")
        yield name, value, scales if value.dtype is torch.uint8 and scales in held else None


def _axis(name: str, value: Tensor, shape: torch.Size, dim: int) -> int | None:
    """Return the axis of a state along which the triplets of its parameter lie, None if none does.

    Raises: ValueError if that cannot be told.
    """
    if type(value) in (Tensor, nn.Parameter):
        stacked = value.dim() - len(shape)
        if stacked >= 0 and value.shape[stacked:] == shape:
            return stacked + dim
        if value.numel() == 1:  # a count of steps
            return None
        sides = zip(value.shape, shape, strict=False)
        if stacked == 0 and all(size in (1, whole) for size, whole in sides):
            return dim if value.shape[dim] == shape[dim] else None
        if name in _FACTORS and value.shape == (shape[_FACTORS[name]],):
            return 0 if _FACTORS[name] == dim else None
    kind, given = type(value).__name__, list(value.shape)
    raise ValueError(f"{name} is {kind} {given} for a parameter {list(shape)}")


def _in_place(old: Tensor, kept: Tensor) -> Tensor:
    """Keep a state of bitsandbytes' paged optimizers in its managed memory, which it never frees.

    What lies behind it there is touched no more, and so on no device.
    """
    if not getattr(old, "is_paged", False):
        return kept
    place = old.flatten()[: kept.numel()].view(kept.shape).copy_(kept)
    place.is_paged, place.page_deviceid = True, old.page_deviceid
    return place


def _select_blockwise(
    codes: Tensor, absmax: Tensor, qmap: Tensor, axis: int, index: Tensor
) -> tuple[Tensor, Tensor]:
    """Select from a state in 8 bits: codes, and the absolute maximum of each block of the flat one.

    Blocks that are kept whole stay as they are.
    """
    if absmax.dim() > 1:  # several of them in a stack (AdEMAMix)
        pairs = zip(codes, absmax, strict=True)
        parts = [_select_blockwise(c, a, qmap, axis - 1, index) for c, a in pairs]
        return torch.stack([c for c, _ in parts]), torch.stack([a for _, a in parts])
    row = codes[0].numel() if len(codes) else 0
    if axis == 0 and row % _BLOCK == 0:
        scales = absmax.view(len(codes), -1).index_select(0, index)
        return codes.index_select(0, index), scales.flatten()
    scales = absmax.repeat_interleave(_BLOCK)[: codes.numel()].view(codes.shape)
    values = (qmap[codes.long()] * scales).index_select(axis, index)
    padded = torch.zeros(-(-values.numel() // _BLOCK) * _BLOCK, device=values.device)
    padded[: values.numel()] = values.flatten()
    blocks = padded.view(-1, _BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = blocks / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    nearest = torch.bucketize(scaled, (qmap[1:] + qmap[:-1]) / 2)
    return nearest.flatten()[: values.numel()].view(values.shape).to(torch.uint8), absmax
