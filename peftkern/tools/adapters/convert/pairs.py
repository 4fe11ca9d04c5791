"""A pair of factors from a file, of a linear layer or a convolution, as an update."""

from __future__ import annotations

from torch import Tensor

from peftkern.tools.adapters.adapter import AdapterError, Update


def check_floating(name: str, tensor: Tensor, source: str) -> None:
    """Raise AdapterError for a tensor of integers."""
    if not tensor.is_floating_point():
        raise AdapterError(f"{source}: {name}: expected floating point, got {tensor.dtype}")


def to_update(
    module: str,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    source: str,
    *,
    magnitude: Tensor | None = None,
    bias: Tensor | None = None,
) -> Update:
    """Return the update of lora_A [r, n] and lora_B [m, r], or [r, cin, kh, kw] and [m, r, 1, 1].

    Raises: AdapterError naming the module, for what is no pair.
    """
    ones = [1] * (lora_A.ndim - 2)
    fits = lora_A.ndim in (2, 3, 4) and lora_A.shape[0] > 0 and lora_B.ndim == lora_A.ndim
    if not fits or list(lora_B.shape[1:]) != [lora_A.shape[0], *ones] or not lora_A.numel():
        raise AdapterError(
            f"{source}: {module}: expected factors [r, n] and [m, r], or those of a convolution, "
            f"got {list(lora_A.shape)} and {list(lora_B.shape)}"
        )
    for name, tensor in (("magnitude", magnitude), ("bias", bias)):
        if tensor is not None and tensor.numel() != lora_B.shape[0]:
            raise AdapterError(
                f"{source}: {module}: expected a {name} of {lora_B.shape[0]} values, got "
                f"{list(tensor.shape)}"
            )
    kind, shape = ("conv", tuple(lora_A.shape)) if ones else ("linear", ())
    pair = lora_A.flatten(1), lora_B.flatten(1)
    return Update(module, "weight", kind, *pair, scaling, shape, magnitude, bias)
