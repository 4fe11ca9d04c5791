"""Weights of a base checkpoint, dense or in bitsandbytes' NF4, as one kind of value."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkern.formats.json_files import brief
from peftkern.formats.nf4 import STATE_KEY, NF4Weight
from peftkern.functional import dequantize_nf4
from peftkern.tools.checkpoints.checkpoint import (
    DTYPES,
    READ_ERRORS,
    Checkpoint,
    CheckpointError,
    TensorInfo,
    open_safetensors,
)

_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE_KEY)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Weight:
    """A tensor of the base; shape and dtype are those of its values.

    infos: the stored tensor, or those of an NF4 weight, its packed codes first. nf4: blocksize and
    whether absmax is nested; None for a dense tensor. transposed: NF4 holds [N, K] of a Conv1D's
    [K, N].
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    infos: tuple[TensorInfo, ...]
    nf4: tuple[int, bool] | None = None
    transposed: bool = False

    @property
    def info(self) -> TensorInfo:
        return self.infos[0]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.infos)

    def read(self) -> Tensor:
        """Return its values, decoded to its dtype."""
        found = self.stored()
        if isinstance(found, Tensor):
            return found
        dense = dequantize_nf4(found)
        return dense.T.contiguous() if self.transposed else dense

    def stored(self) -> Tensor | NF4Weight:
        """Return its values as they are stored."""
        if self.nf4 is not None:
            return _read_nf4(self.name, self.infos)
        with open_safetensors(self.info.file) as file:
            return file.get_tensor(self.name)


def find_weights(checkpoint: Checkpoint) -> dict[str, Weight]:
    """Find the weights of a checkpoint, in its order; of those in NF4 the small parts are read.

    Raises: CheckpointError for a quantized checkpoint that is not NF4 of bitsandbytes.
    """
    tensors = checkpoint.tensors
    config = checkpoint.config.get("quantization_config")
    if config is not None:
        _check_config(checkpoint, config)
    suffix = f".{STATE_KEY}"
    quantized = {name.removesuffix(suffix) for name in tensors if name.endswith(suffix)}
    parts = {f"{name}.{part}" for name in quantized for part in _PARTS}
    weights = {}
    for name, info in tensors.items():
        if name in quantized:
            found = [tensors[f"{name}.{p}"] for p in _PARTS if f"{name}.{p}" in tensors]
            weights[name] = _nf4_weight(name, (info, *found))
        elif name not in parts:
            weights[name] = Weight(name, DTYPES[info.dtype], info.shape, (info,))
    return weights


def _check_config(checkpoint: Checkpoint, config: Any) -> None:
    config = config if isinstance(config, dict) else {"quant_method": config}
    expected = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": "uint8",
    }
    for key, value in expected.items():
        came = config.get(key, value if key == "bnb_4bit_quant_storage" else None)
        if came != value:
            raise CheckpointError(
                f"{checkpoint.folder}: expected dense weights or NF4 of bitsandbytes, "
                f"got {key} {brief(came)}"
            )


def _nf4_weight(name: str, infos: tuple[TensorInfo, ...]) -> Weight:
    """Check the parts against each other; memory for the large ones is never touched."""
    with _damage_named(name, infos[0]):
        small = {f"{name}.{STATE_KEY}", f"{name}.quant_map"}
        state = _tensors([info for info in infos if info.name in small])
        for info in infos:
            state.setdefault(info.name, torch.empty(info.shape, dtype=DTYPES[info.dtype]))
        nf4 = NF4Weight.from_state_dict(state, name.removesuffix("weight"))
        return Weight(name, nf4.dtype, nf4.shape, infos, (nf4.blocksize, nf4.nested))


def _read_nf4(name: str, infos: tuple[TensorInfo, ...]) -> NF4Weight:
    return NF4Weight.from_state_dict(_tensors(infos), name.removesuffix("weight"))


def _tensors(infos: Iterable[TensorInfo]) -> dict[str, Tensor]:
    state = {}
    for info in infos:
        with open_safetensors(info.file) as file:
            state[info.name] = file.get_tensor(info.name)
    return state


@contextlib.contextmanager
def _damage_named(name: str, info: TensorInfo) -> Iterator[None]:
    try:
        yield
    except READ_ERRORS as error:
        raise CheckpointError(f"{info.file}: {name}: no NF4 weight: {error}") from None
