"""Check of the function that reads a registered layer: does the layer compute what its parts say?

A layer is run once on three rows of numbers that are made up, without its dropout, and compared to
y = x W^T + bias + scaling * (x A^T) B^T with its gradients: a lora_B that is still zero hides what
the others are. The first row is zero, of which a bias alone is left.
"""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkern.backends.reference.nf4 import nf4_dequantize
from peftkern.formats.block_weight import QuantizedWeight
from peftkern.formats.nf4 import NF4Weight
from peftkern.integrations.parts import LoRAParts
from peftkern.integrations.peft import trial
from peftkern.layers.quantized_linear import QuantizedLinear

ROWS = 3
# Of a sum's terms: more than roundings make of it, less than a part that is missing.
_LARGEST = {2: 2.0**-5, 4: 2.0**-8, 8: 2.0**-8}  # by the bytes of a number


class WrongPartsError(ValueError):
    """Error of a function that gives no parts of a layer."""


def parts(layer: nn.Module, read: Callable[[Any], Any]) -> LoRAParts | str:
    """Read the parts of a layer, or the reason that the function gives for its own forward.

    Raises: WrongPartsError if it gives something else, or raises.
    """
    try:
        found = read(layer)
    except Exception as error:
        raise WrongPartsError(f"read raised {_first_line(error)}") from error
    if not isinstance(found, str):
        _check_kinds(found)
    return found


def has_adapter(layer: nn.Module, read: Callable[[Any], Any]) -> bool:
    """Return whether a layer has an adapter now, so that it can be compared with its parts.

    Raises: WrongPartsError.
    """
    found = parts(layer, read)
    return not isinstance(found, str) and found.lora_A is not None


def _check_kinds(found: Any) -> None:
    if not isinstance(found, LoRAParts):
        raise _wrong(found, "", "LoRAParts, or a reason in words")
    base, A, B, scaling, dropout, bias = found
    if not isinstance(base, Tensor | QuantizedWeight | nn.Module):
        raise _wrong(base, "base", "a weight or a layer")
    if not isinstance(base, nn.Module) and len(base.shape) != 2:
        raise _wrong(base, "base", "a weight [N, K]")
    if isinstance(base, nn.Module) and bias is not None:
        raise _wrong(bias, "bias", "None, for the base is a layer and has its own")
    if bias is not None and not isinstance(bias, Tensor):
        raise _wrong(bias, "bias", "a tensor")
    if not isinstance(dropout, (nn.Module, numbers.Real)):
        raise _wrong(dropout, "dropout", "a module or a number")
    if not isinstance(scaling, (numbers.Real, Tensor)):
        raise _wrong(scaling, "scaling", "a number or a 0-dim tensor")
    for name, factor in (("lora_A", A), ("lora_B", B)):
        if (A is not None or B is not None) and not (
            isinstance(factor, Tensor) and factor.dim() == 2
        ):
            raise _wrong(factor, name, "a tensor of two dimensions")


def _wrong(value: Any, name: str, expected: str) -> WrongPartsError:
    came = f"{list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    return WrongPartsError(f"read gives {came}{name and f' as {name}'}, expected {expected}")


def is_four_bit(found: LoRAParts) -> bool:
    """Return whether the base is quantized."""
    base = found.base
    return isinstance(base, QuantizedWeight | QuantizedLinear) or hasattr(base, "quant_state")


def sizes_of(found: LoRAParts) -> tuple[int, int]:
    """Return N and K of the base."""
    base = found.base
    if not isinstance(base, nn.Module):
        return tuple(base.shape)
    if hasattr(base, "nf"):  # transformers' Conv1D
        return base.nf, base.nx
    return base.out_features, base.in_features


def dropout_p(found: LoRAParts, training: bool) -> float:
    """Return the probability with which the adapter's input is dropped now."""
    drop = found.dropout
    if isinstance(drop, nn.Module):
        return drop.p if drop.training and type(drop) is nn.Dropout else 0.0
    return float(drop) if training else 0.0


def disagreement(
    layer: nn.Module, original: type[nn.Module], read: Callable[[Any], Any]
) -> str | None:
    """Return how the forward of a layer with an adapter differs from its parts; None if not.

    Args: original, the class whose forward is asked. Nothing is left of it: no attribute of the
        layer, no gradient, no random number.
    """
    found = parts(layer, read)
    weight = next(t for t in (found.base, found.lora_A) if not isinstance(t, nn.Module))
    device = weight.device
    if device.type == "meta":
        return "its weights are on meta: patch it when they are loaded"
    try:
        with trial.aside(device), _as_before(layer), torch.autocast(device.type, enabled=False):
            return _difference(layer, original, read) or _other_dropout(layer, original, read)
    except WrongPartsError as error:
        return str(error)
    except Exception as error:
        return f"its forward cannot be compared with its parts: {_first_line(error)}"


def _difference(layer: nn.Module, original: type, read: Callable[[Any], Any]) -> str | None:
    """Compare outputs and gradients without dropout."""
    _set_training(layer, False)
    found = parts(layer, read)
    if isinstance(found, str):
        return f"read gives no parts in eval mode: {found}"
    x = _rows(found)
    leaves = [t for t in (found.lora_A, found.lora_B) if t is not None and t.requires_grad]
    with torch.enable_grad():
        y = original.forward(layer, x)
        base, update = _formula(found, x)
    N, _ = sizes_of(found)
    if not isinstance(y, Tensor) or y.shape != (1, ROWS, N) or y.dtype is not x.dtype:
        came = f"{y.dtype} {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        return f"forward gives {came}, expected {x.dtype} {[1, ROWS, N]} of such an input"
    largest = max(_LARGEST[t.dtype.itemsize] for t in (x, *leaves))
    size = base.norm(dim=-1) + update.norm(dim=-1)
    far = (y - base - update).norm(dim=-1)
    if not (far <= largest * size).all():
        share = (far / size).nan_to_num(posinf=1.0).max()
        return f"forward differs from the parts that read gives by {share:.0%} of their size"
    dy = torch.ones_like(y)
    ours, theirs = (
        torch.autograd.grad(out, [x, *leaves], dy, allow_unused=True) for out in (base + update, y)
    )
    names = ["x", *("lora_A" if leaf is found.lora_A else "lora_B" for leaf in leaves)]
    for name, mine, its in zip(names, ours, theirs, strict=True):
        if its is None or not (mine - its).norm() <= largest * (mine.norm() + its.norm()):
            return f"the gradient of {name} differs from that of the parts that read gives"
    return None


def _formula(found: LoRAParts, x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute base and update in plain torch."""
    base, A, B, bias = found.base, found.lora_A, found.lora_B, found.bias
    if isinstance(base, nn.Module):
        bias = base.bias
        base = getattr(base, "quantized_weight", None) or base.weight
        if getattr(base, "quant_state", None) is not None:
            base = NF4Weight.from_bitsandbytes(base)
        elif base is not None and hasattr(found.base, "nf"):
            base = base.t()  # transformers' Conv1D
    if isinstance(base, QuantizedWeight):
        base = nf4_dequantize(list(base.tensors), list(base.layout), x.dtype)
    y = F.linear(x, base.detach(), None if bias is None else bias.to(x.dtype))
    if A is None:
        return y, torch.zeros_like(y)
    update = F.linear(F.linear(x.to(A.dtype), A), B) * found.scaling
    return y, update.to(y.dtype)


def _rows(found: LoRAParts) -> Tensor:
    """Make up an input [1, 3, K], its first row zero, in the dtype that the layer computes in."""
    base = found.base
    weight = base.weight if isinstance(base, nn.Module) else base
    dtype = weight.dtype
    if is_four_bit(found) and isinstance(base, nn.Module):
        own = isinstance(base, QuantizedLinear)
        dtype = base.quantized_weight.dtype if own else base.compute_dtype
        dtype = dtype or (torch.float32 if found.lora_A is None else found.lora_A.dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, ROWS, sizes_of(found)[1], generator=generator)
    x[:, 0] = 0.0
    return x.to(weight.device, dtype).requires_grad_()


def _other_dropout(layer: nn.Module, original: type, read: Callable[[Any], Any]) -> str | None:
    """Compare whether random numbers are drawn in training: their values tell nothing."""
    _set_training(layer, True)
    found = parts(layer, read)
    if isinstance(found, str):
        return f"read gives no parts in training mode: {found}"
    p, x = dropout_p(found, True), _rows(found)
    if x.device.type not in ("cpu", "cuda"):  # where nothing is served either
        return None
    before = _random_state(x.device)
    original.forward(layer, x)
    drawn = not torch.equal(before, _random_state(x.device))
    if drawn and p == 0.0:
        return "forward draws random numbers in training, read gives no dropout"
    if p > 0.0 and not drawn:
        return f"read gives a dropout of {p:g}, forward draws no random numbers in training"
    return None


def _random_state(device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()


def _set_training(layer: nn.Module, training: bool) -> None:
    """Set the mode alone: `train` may do more, such as to merge."""
    for module in layer.modules():
        module.__dict__["training"] = training


@contextlib.contextmanager
def _as_before(layer: nn.Module) -> Iterator[None]:
    """Put back the attributes of a layer and of what it holds."""
    kept = [(module, dict(module.__dict__)) for module in layer.modules()]
    try:
        yield
    finally:
        for module, attributes in kept:
            module.__dict__.clear()
            module.__dict__.update(attributes)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
