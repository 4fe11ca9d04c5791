"""AdaLoRA's steps under DeepSpeed's ZeRO, whose optimizer has what the allocator works on.

Of each trained parameter DeepSpeed keeps a master in float32, in parts over the processes. A step
drops the gradients, and writes the masters over the parameters: a mask on these alone is undone by
the next one. In stage 3 the parameters are in parts themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from functools import wraps
from typing import Any

from torch import Tensor, nn

from peftkern.methods.processes import held_by_deepspeed

__all__: list[str] = []

_within: ContextVar[bool] = ContextVar("peftkern_within_zero_step", default=False)


def out_of_reach(parameter: Tensor) -> bool:
    """Return whether DeepSpeed holds a parameter, and this is no call of `after_steps`."""
    return held_by_deepspeed(parameter) and not _within.get()


def after_steps(
    optimizer: Any, parameters: Sequence[nn.Parameter], call: Callable[[], Any]
) -> Callable[[], None]:
    """Call after every step of DeepSpeed's optimizer, with all as it would be without DeepSpeed.

    Parameters are whole then, and have the gradients of the step after clipping. A step that is
    skipped, for its gradients are not finite, is none.

    Args: optimizer, `engine.optimizer`, or what accelerate has around it; parameters, those that
        are held.
    Returns: what ends it. Raises: ValueError on another optimizer.
    """
    optimizer = _zero_optimizer(optimizer)
    step = optimizer.step

    @wraps(step)
    def stepped(*args: Any, **kwargs: Any) -> Any:
        gradients = _gradients(parameters)
        scale = 1 / getattr(optimizer, "loss_scale", 1)
        result = step(*args, **kwargs)
        if getattr(optimizer, "overflow", False):
            return result
        scale *= _clipped(optimizer)
        with whole(parameters, written=True):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = (gradient * scale).to(parameter.dtype)
            token = _within.set(True)
            try:
                call()
            finally:
                _within.reset(token)
                for parameter in parameters:
                    parameter.grad = None
        return result

    optimizer.step = stepped

    def end() -> None:
        if optimizer.__dict__.get("step") is stepped:
            del optimizer.step

    return end


@contextlib.contextmanager
def whole(parameters: Iterable[nn.Parameter], *, written: bool = False) -> Iterator[None]:
    """Let all of these be whole inside, those that stage 3 holds in parts too; others are.

    Args: written, whether their processes write to them, all the same.
    """
    parts = [p for p in parameters if hasattr(p, "ds_id")]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts, modifier_rank=0 if written else None):
        yield


def zero_masters(parameters: Sequence[nn.Parameter]) -> None:
    """Put a zero into the masters wherever a parameter, which is whole, has one."""
    if not parameters:
        return
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    for parameter in parameters:
        master = safe_get_full_fp32_param(parameter).view(parameter.shape)
        safe_set_full_fp32_param(parameter, master.masked_fill_(parameter == 0, 0))


def _zero_optimizer(optimizer: Any) -> Any:
    """Return DeepSpeed's optimizer in what is around it. Raises: ValueError if there is none."""
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    found = optimizer
    while found is not None and not isinstance(found, ZeROOptimizer):
        found = getattr(found, "optimizer", None)
    if found is None:
        raise ValueError(
            "optimizer: DeepSpeed holds the parameters: expected engine.optimizer, of ZeRO stage "
            f"1, 2 or 3, got {type(optimizer).__name__}"
        )
    return found


def _gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return the mean gradients of all processes, scaled as the loss was."""
    from deepspeed.utils import safe_get_full_grad

    return [safe_get_full_grad(parameter).clone() for parameter in parameters]


def _clipped(optimizer: Any) -> float:
    """Return what a step has multiplied its gradients by, for their norm."""
    limit, norm = optimizer.clip_grad, optimizer._global_grad_norm
    if not limit or norm is None:
        return 1.0
    return 1 / max((float(norm) + 1e-6) / limit, 1.0)


def held(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return those that DeepSpeed holds."""
    return [parameter for parameter in parameters if held_by_deepspeed(parameter)]
