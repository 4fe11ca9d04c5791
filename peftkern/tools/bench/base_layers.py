"""Layers of providers, and frozen linear layers as users have them: dense, or bitsandbytes' NF4."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftkern.backends.device import has_products
from peftkern.formats.nf4 import NESTED_BLOCKSIZE, NF4_CODE, NF4Weight, dynamic_map

BLOCKSIZE = 64
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """Layer of a provider: `run(x)`, or `run()` of what is no layer.

    adapter: leaves lora_A, lora_B and DoRA's magnitude, or (). collect: names the results of
    `run()`, a single tensor's name is that of the op. no_graph: a reason against a CUDA graph; a
    failed capture can break all that comes later. multiplied: too slow to repeat, so one call is
    timed and its time multiplied by this.
    """

    run: Callable[..., object]
    adapter: tuple[Tensor, ...] = ()
    collect: Callable[[object], Tensors] | None = None
    no_graph: str | None = None
    multiplied: int = 0


def has(package: str) -> bool:
    """Return whether a package is installed; a folder of that name is not enough."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def product(a: Tensor, b: Tensor) -> Tensor:
    """Compute a @ b in plain torch for a bound of errors, gradients alike.

    Where torch has no products of the dtype, and takes half a minute for a layer, it is computed
    in float32 and rounded once: no result of the dtype is nearer to the exact one, so that the
    bound is not looser than by torch's own.
    """
    if has_products(a.dtype, a.device):
        return a @ b
    return (a.float() @ b.float()).to(a.dtype)


def linear(weight: Tensor) -> nn.Linear:
    n, k = weight.shape
    layer = nn.Linear(k, n, bias=False, device="meta")  # meta: draws no weight to throw away
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def prequantized(
    packed: Tensor, stats: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> nn.Module:
    """Build bitsandbytes' layer over packed bytes and their `stats`, in its own keys."""
    import bitsandbytes as bnb

    (n, k), kind = shape, {"compute_dtype": dtype, "quant_type": "nf4"}
    layer = bnb.nn.Linear4bit(k, n, bias=False, device="meta", **kind)
    layer.weight = bnb.nn.Params4bit.from_prequantized(
        packed, stats, device=packed.device, module=layer
    )
    return layer


def random_nf4(n: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> NF4Weight:
    """Draw an NF4 weight [n, k] with double quantization as packed bytes.

    The 16 values are equally likely and absmax is within 10% of what makes the standard deviation
    k^-1/2, that of a layer which keeps the size of its input.
    """
    device = generator.device
    blocks = -(-n * k // BLOCKSIZE)

    def octets(count: int) -> Tensor:
        return torch.randint(256, (count,), dtype=torch.uint8, device=device, generator=generator)

    rms = (sum(value * value for value in NF4_CODE) / len(NF4_CODE)) ** 0.5
    offset = torch.tensor(k**-0.5 / rms, device=device)
    return NF4Weight(
        packed=octets((n * k + 1) // 2),
        absmax=octets(blocks),
        shape=(n, k),
        blocksize=BLOCKSIZE,
        dtype=dtype,
        nested_absmax=(0.1 * offset).repeat(-(-blocks // NESTED_BLOCKSIZE)),
        nested_code=torch.tensor(dynamic_map(), device=device),
        nested_offset=offset,
        nested_blocksize=NESTED_BLOCKSIZE,
    )
