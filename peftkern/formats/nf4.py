"""bitsandbytes' formats, NF4 and FP4: nibble order, blocks, nested absmax, files, validation.

Their code values and block sizes are rows of `peftkern.formats.table`; all else is the same.

A weight of `numel` values is flattened row-major and cut into blocks of `blocksize` values that
ignore row ends. Value `i` becomes the 4-bit index of one of `NF4_CODE`; the value with the even
index sits in the HIGH nibble of byte `i // 2`, and an odd tail is padded with code 7 (0.0).

    value[i] = cast(CODE[code[i]] * absmax[i // blocksize])         product in float32, one rounding

With double quantization `absmax` is stored in 8 bits, in blocks of 256, and is rebuilt in float32
with two roundings (no fused multiply-add):

    absmax[j] = nested_code[q[j]] * nested_absmax[j // 256] + nested_offset

Quantization takes the nearest value of `x * (1 / max(absmax, 1e-38))` in float32 by comparing with
the float32 midpoints of neighbours; a tie takes the lower code and a NaN takes the highest, so a
block of zeros becomes code 7 with absmax 0. FP4 does the same in the order of its values (NaN: code
3, 1.0), with its own zero, code 0, as the pad.

Source: Dettmers et al. 2023, arXiv:2305.14314; layout and keys as bitsandbytes reads and writes.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.utils.weak import WeakIdKeyDictionary

from peftkern.formats.table import FORMATS, FP4, NF4, NF4_CODE, NUMBERS, code_of

__all__ = ["NF4Weight"]
BLOCKSIZES = NF4.blocksizes
NESTED_BLOCKSIZE = NF4.nested_blocksize
ABSMAX_FLOOR = 1e-38  # smallest divisor of a block: a block of zeros has a finite reciprocal

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_STORAGES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
_INT64_MAX = 2**63 - 1
STATE_BYTES = 256  # room for the JSON of a weight of two dimensions
STATE_KEYS = {row.name: f"quant_state.bitsandbytes__{row.name}" for row in (NF4, FP4)}
STATE_KEY = STATE_KEYS["nf4"]
_STATE_BYTES_MAX = 1 << 16  # bitsandbytes writes about 200 bytes; anything huge is not its state

# {a table that is not on a CPU: (version of its data, the format whose table that is, or None)}
_compared_maps: WeakIdKeyDictionary = WeakIdKeyDictionary()


class ArgumentError(ValueError):
    """An argument that a function does not take, found before anything was computed."""


class RepackedWeightError(ArgumentError):
    """A weight that bitsandbytes' CPU inference path has repacked in place.

    Its nibbles could be put back, but its absmax was rounded to bfloat16 and the nested form was
    dropped, so the weight that was quantized is gone: reload it, or keep such layers on
    bitsandbytes.
    """


class TruncatedWeightError(ArgumentError):
    """A weight one of whose tensors is too short: whoever reads it leaves a buffer."""


def nf4_code(device: torch.device | str = "cpu") -> Tensor:
    """Return the sixteen values as a new float32 tensor."""
    return code_of(NF4, device)


_CPU_CODES = {name: code_of(FORMATS[NUMBERS[name]]) for name in STATE_KEYS}


@functools.cache
def nf4_midpoints() -> tuple[float, ...]:
    """Return the 15 float32 decision thresholds: `x > midpoint[i]` means code `i + 1` or higher."""
    code = nf4_code()
    return tuple(((code[:-1] + code[1:]) / 2).tolist())


@functools.cache
def dynamic_map() -> tuple[float, ...]:
    """Return the 256 ascending float32 values that absmax is quantized to.

    A signed dynamic exponent: decade 10^(e-6) for e = 0..6 holds 2^e equal steps of [0.1, 1] at
    their centers, with both signs, plus 0 and 1. Source: Dettmers 2015, arXiv:1511.04561, with the
    rounding of bitsandbytes' create_dynamic_map.
    """
    values = [0.0, 1.0]
    first = torch.tensor(0.1, dtype=torch.float32, device="cpu")
    for exponent in range(7):
        # torch.linspace where the processor fuses its products and sums; elsewhere it rounds twice.
        steps = 2**exponent
        step = ((1 - first) / steps).double()
        i = torch.arange(steps + 1, dtype=torch.float64, device="cpu")
        edges = torch.where(2 * i < steps, first + step * i, 1 - step * (steps - i)).float()
        centers = (edges[:-1] + edges[1:]) / 2
        positive = (10.0 ** (exponent - 6) * centers).tolist()
        values += positive + [-value for value in positive]
    return tuple(sorted(values))


def numel_of(shape: Any, field: str = "shape") -> int:
    """Return the number of elements of a shape; refuse anything but sizes that fit in int64."""
    if not isinstance(shape, (tuple, list)):
        raise refuse(field, "a tuple of sizes", shape)
    numel = 1
    for size in shape:
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= _INT64_MAX:
            raise refuse(field, "integers in [0, 2^63)", shape)
        numel *= size
    if numel > _INT64_MAX:
        raise refuse(field, "fewer than 2^63 elements", shape)
    return numel


@dataclass(frozen=True, eq=False, repr=False)
class NF4Weight:
    """A weight in NF4, or in FP4, as stored: nothing here is dense.

    Args:
        packed: uint8 [(numel + 1) // 2], contiguous; [n, 1] is flattened by a view.
        absmax: float32 [nblocks], or uint8 [nblocks] when nested.
        shape: shape of the weight; blocks run over its row-major order.
        blocksize: 32, 64, ... or 4096.
        dtype: float32, float16 or bfloat16: of the weight before it was quantized.
        nested_absmax: float32 [ceil(nblocks / 256)], or None when absmax is plain.
        nested_code: float32 [256], or None when absmax is plain.
        nested_offset: float32 0-d, or None when absmax is plain.
        nested_blocksize: 256, or 0 when absmax is plain.
        quant_type: "nf4" or "fp4".

    Raises: ValueError that begins with the field, then what is accepted and what came
        (TruncatedWeightError where a tensor is too short). Sizes are checked against each other as
        Python integers, so that no kernel can leave a buffer; no data is read.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    blocksize: int
    dtype: torch.dtype
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    nested_offset: Tensor | None = None
    nested_blocksize: int = 0
    quant_type: str = "nf4"

    def __post_init__(self) -> None:
        numel = numel_of(self.shape)
        _check_quant_type(self.quant_type)
        if type(self.shape) is not tuple:
            object.__setattr__(self, "shape", tuple(self.shape))
        if type(self.blocksize) is not int or self.blocksize not in BLOCKSIZES:
            raise refuse("blocksize", f"one of {BLOCKSIZES}", self.blocksize)
        if not isinstance(self.dtype, torch.dtype) or self.dtype not in DTYPE_NAMES:
            raise refuse("dtype", f"one of {list(_DTYPES)}", self.dtype)

        packed = self.packed
        if isinstance(packed, Tensor) and packed.dim() == 2 and packed.shape[1] == 1:
            if packed.layout is not torch.strided or not packed.is_contiguous():
                raise refuse("packed", "contiguous memory", packed)
            packed = packed.view(-1)
            object.__setattr__(self, "packed", packed)
        check_tensor("packed", packed, torch.uint8, (numel + 1) // 2, None)
        device = packed.device

        nblocks = -(-numel // self.blocksize)
        if self.nested_absmax is None:
            _check_plain(self)
            check_tensor("absmax", self.absmax, torch.float32, nblocks, device)
            return
        if type(self.nested_blocksize) is not int or self.nested_blocksize != NESTED_BLOCKSIZE:
            raise refuse("nested_blocksize", NESTED_BLOCKSIZE, self.nested_blocksize)
        nested_blocks = -(-nblocks // NESTED_BLOCKSIZE)
        check_tensor("absmax", self.absmax, torch.uint8, nblocks, device)
        check_tensor("nested_absmax", self.nested_absmax, torch.float32, nested_blocks, device)
        check_tensor("nested_code", self.nested_code, torch.float32, 256, device)
        check_tensor("nested_offset", self.nested_offset, torch.float32, None, device)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nblocks(self) -> int:
        return -(-math.prod(self.shape) // self.blocksize)

    @property
    def nested(self) -> bool:
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Size in bytes, tables included."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors that ops take beside `layout`: packed codes, then block scales as stored."""
        if self.nested_absmax is None:
            return self.packed, self.absmax
        nested = (self.nested_absmax, self.nested_code, self.nested_offset)
        return self.packed, self.absmax, *nested

    @property
    def layout(self) -> tuple[int, ...]:
        """Integers by which ops read `tensors`: see `peftkern.formats.table`."""
        return (NUMBERS[self.quant_type], self.blocksize, self.nested_blocksize, *self.shape)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> NF4Weight:
        """Return the weight on another device; itself if it is already there."""
        moved = {k: t.to(device, non_blocking=non_blocking) for k, t in self._tensors().items()}
        if all(moved[k] is t for k, t in self._tensors().items()):
            return self
        return NF4Weight(
            **moved,
            shape=self.shape,
            blocksize=self.blocksize,
            dtype=self.dtype,
            nested_blocksize=self.nested_blocksize,
            quant_type=self.quant_type,
        )

    @classmethod
    def from_bitsandbytes(cls, param: Any, quant_state: Any = None) -> NF4Weight:
        """View a quantized bitsandbytes `Params4bit` without copying it.

        Args: quant_state, of a plain tensor, as FSDP leaves of a `Params4bit`.
        Raises: RepackedWeightError if its CPU inference path has rewritten it in place; ValueError
            naming the field for anything else that is none (not quantized yet, malformed).
        """
        if not isinstance(param, Tensor):
            raise refuse("weight", "a bitsandbytes Params4bit", param)
        # Read through __dict__: QuantState's own __getattr__ costs 1 us per absent attribute.
        if quant_state is None:
            quant_state = getattr(param, "quant_state", None)
        state = getattr(quant_state, "__dict__", None)
        if state is None:
            raise ArgumentError("quant_state: missing; the weight has not been quantized yet")
        if state.get("packing_format_for_cpu"):
            raise RepackedWeightError(
                "weight: expected bitsandbytes' storage layout, got the one that it repacks into, "
                "in place, for CPU inference (absmax is rounded to bfloat16 there)"
            )
        quant_type = state.get("quant_type")
        _check_quant_type(quant_type)
        _check_quant_map(state.get("code"), quant_type)
        with torch._C.DisableTorchFunctionSubclass():  # Params4bit adds 1 us to every attribute
            storage = getattr(param, "quant_storage", param.dtype)
            if storage is not param.dtype:
                raise refuse("quant_storage", f"{storage} as recorded", param.dtype)
            packed = _as_bytes(param.detach())
        pieces = (packed, state.get("absmax"), state.get("shape"), state.get("blocksize"))
        if state.get("state2") is None:
            return cls(*pieces, state.get("dtype"), quant_type=quant_type)
        nested = getattr(state["state2"], "__dict__", None)
        if nested is None:
            raise refuse("state2", "a bitsandbytes QuantState", state["state2"])
        _check_nested_dtype(nested.get("dtype"))
        return cls(
            *pieces,
            state.get("dtype"),
            nested_absmax=nested.get("absmax"),
            nested_code=nested.get("code"),
            nested_offset=state.get("offset"),
            nested_blocksize=nested.get("blocksize"),
            quant_type=quant_type,
        )

    @classmethod
    def from_state_dict(cls, sd: Mapping[str, Any], prefix: str = "") -> NF4Weight:
        """Read `{prefix}weight` and its companions, in bitsandbytes' keys, without copying them.

        `prefix` is the module's, with its dot: `"model.layers.0.mlp.up_proj."`.

        Raises: ValueError naming the key or the field that is missing or malformed.
        """
        name = prefix + "weight"
        weight = _tensor_at(sd, name)
        expected = "fp4" if f"{name}.{STATE_KEYS['fp4']}" in sd else "nf4"
        key = STATE_KEYS[expected]
        state = _unpack_state(_tensor_at(sd, f"{name}.{key}"), key)
        quant_type = state.get("quant_type")
        if quant_type != expected:
            raise refuse("quant_type", f"'{expected}', as its key says", quant_type)
        _check_quant_map(_tensor_at(sd, f"{name}.quant_map"), quant_type)
        packed = _as_bytes(weight.detach())
        fields = {
            "packed": packed,
            "absmax": _tensor_at(sd, f"{name}.absmax"),
            "shape": state.get("shape"),
            "blocksize": state.get("blocksize"),
            "dtype": _dtype_named(state.get("dtype"), "dtype"),
            "quant_type": quant_type,
        }
        nested_tensors = (f"{name}.nested_absmax", f"{name}.nested_quant_map")
        nested_items = ("nested_blocksize", "nested_dtype", "nested_offset")
        if any(key in sd for key in nested_tensors) or any(key in state for key in nested_items):
            _check_nested_dtype(_dtype_named(state.get("nested_dtype"), "nested_dtype"))
            fields["nested_absmax"] = _tensor_at(sd, nested_tensors[0])
            fields["nested_code"] = _tensor_at(sd, nested_tensors[1])
            fields["nested_offset"] = torch.tensor(
                _float_of(state.get("nested_offset"), "nested_offset"),
                dtype=torch.float32,
                device=packed.device,
            )
            fields["nested_blocksize"] = state.get("nested_blocksize")
        return cls(**fields)

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """Return the weight in bitsandbytes' keys, byte for byte what it writes to safetensors.

        `bitsandbytes.nn.Params4bit.from_prequantized` reads it. Packed bytes and absmax are shared
        with this object.
        """
        name = prefix + "weight"
        items: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": DTYPE_NAMES[self.dtype],
            "shape": self.shape,
        }
        tensors = {
            name: self.packed.view(-1, 1),
            f"{name}.absmax": self.absmax,
            f"{name}.quant_map": code_of(FORMATS[NUMBERS[self.quant_type]], self.device),
        }
        if self.nested_absmax is not None:
            items["nested_blocksize"] = self.nested_blocksize
            items["nested_dtype"] = "float32"
            items["nested_offset"] = self.nested_offset.item()
            tensors[f"{name}.nested_absmax"] = self.nested_absmax
            # One table serves many weights and safetensors refuses tensors that share memory.
            tensors[f"{name}.nested_quant_map"] = self.nested_code.clone()
        text = json.dumps(items).encode("utf-8")
        key = f"{name}.{STATE_KEYS[self.quant_type]}"
        tensors[key] = torch.tensor(list(text), dtype=torch.uint8)
        return tensors

    def _tensors(self) -> dict[str, Tensor]:
        names = ("packed", "absmax", "nested_absmax", "nested_code", "nested_offset")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def __repr__(self) -> str:
        absmax = "nested" if self.nested else "plain"
        fp4 = "" if self.quant_type == "nf4" else f", quant_type='{self.quant_type}'"
        return (
            f"NF4Weight(shape={self.shape}, blocksize={self.blocksize}, absmax={absmax}, "
            f"dtype={DTYPE_NAMES[self.dtype]}, device='{self.device}'{fp4})"
        )


def _brief(value: Any) -> str:
    """Describe a value, short enough for an error message."""
    if isinstance(value, Tensor):
        kind = value.dtype if value.layout is torch.strided else f"{value.layout} {value.dtype}"
        return f"a {kind} tensor of shape {tuple(value.shape)} on {value.device}"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int beyond Python's limit on digits, a deep list
        text = f"a {type(value).__name__} too large to print"
    return text if len(text) <= 120 else text[:117] + "..."


def refuse(field: str, expected: Any, came: Any) -> ArgumentError:
    """Return the error of a field."""
    return ArgumentError(f"{field}: expected {expected}, got {_brief(came)}")


def check_tensor(
    field: str, tensor: Any, dtype: torch.dtype, length: int | None, device: torch.device | None
) -> None:
    """Check for a contiguous tensor of `length` values in one dimension, 0-d where it is None."""
    if (
        isinstance(tensor, Tensor)
        and tensor.dtype is dtype
        and tensor.layout is torch.strided
        and tensor.shape == (() if length is None else (length,))
        and (device is None or tensor.device == device)
    ):
        if not tensor.is_contiguous():
            raise refuse(field, "contiguous memory", tensor)
        return
    shape = "[]" if length is None else f"[{length}]"
    where = "" if device is None else f" on {device}"
    error = refuse(field, f"a {dtype} tensor of shape {shape}{where}", tensor)
    if isinstance(tensor, Tensor) and tensor.numel() < (length or 1):
        raise TruncatedWeightError(*error.args)
    raise error


def _check_plain(w: NF4Weight) -> None:
    """Check that without nested_absmax the other nested fields are absent too."""
    for field, absent in (("nested_code", None), ("nested_offset", None), ("nested_blocksize", 0)):
        value = getattr(w, field)
        if type(value) is not type(absent) or value != absent:
            raise refuse(field, f"{absent} without nested_absmax", value)


def _check_quant_type(quant_type: Any) -> None:
    if not isinstance(quant_type, str) or quant_type not in STATE_KEYS:
        raise refuse("quant_type", "'nf4' or 'fp4'", quant_type)


def _check_nested_dtype(dtype: Any) -> None:
    """Check it: bitsandbytes rounds absmax to it after each step; only float32 is NF4."""
    if dtype is not torch.float32:
        raise refuse("nested_dtype", "float32", dtype)


def _check_quant_map(code: Any, quant_type: str) -> None:
    """Refuse a table other than the format's: the kernels have that one built in."""
    check_tensor("quant_map", code, torch.float32, 16, None)
    if code.is_meta or torch.compiler.is_compiling() or detect_fake_mode((code,)) is not None:
        return  # there is no data to read
    expected = f"{quant_type.upper()}'s sixteen values"
    if code.is_cpu:
        if not torch.equal(code, _CPU_CODES[quant_type]):
            raise refuse("quant_map", expected, code.tolist())
        return
    version, found = _compared_maps.get(code, (None, None))
    if version != _version(code):
        if code.is_cuda and torch.cuda.is_current_stream_capturing():
            raise refuse("quant_map", "one that was read before this graph capture", code)
        compare_quant_maps([code])
        found = _compared_maps[code][1]
    if found != quant_type:
        raise refuse("quant_map", expected, code)


def compare_quant_maps(codes: Iterable[Tensor]) -> None:
    """Compare tables with the formats', and remember it of those that are not on a CPU.

    Reading one waits for its device: here once for all, else once for each of them and version of
    its data. What is no such table is passed over.
    """
    on_device: dict[torch.device, list[Tensor]] = {}
    for code in codes:
        known = isinstance(code, Tensor) and not (code.is_cpu or code.is_meta)
        if known and code.dtype is torch.float32 and code.shape == (len(NF4_CODE),):
            on_device.setdefault(code.device, []).append(code)
    for tables in on_device.values():
        for code, values in zip(tables, torch.stack(tables).cpu(), strict=True):
            names = [name for name, own in _CPU_CODES.items() if torch.equal(values, own)]
            _compared_maps[code] = (_version(code), names[0] if names else None)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _as_bytes(data: Tensor) -> Tensor:
    """View the packed bytes behind any quant_storage as uint8; never a conversion."""
    if data.dtype is torch.uint8:
        return data
    if data.dtype not in _STORAGES:
        raise refuse("quant_storage", f"one of {_STORAGES}", data.dtype)
    if data.layout is not torch.strided or not data.is_contiguous():
        raise refuse("weight", "contiguous memory", data)
    if data.dim() != 1 and not (data.dim() == 2 and data.shape[1] == 1):
        raise refuse("weight", "shape [n] or [n, 1]", data)
    return data.view(-1).view(torch.uint8)


def _tensor_at(sd: Mapping[str, Any], key: str) -> Tensor:
    if key not in sd:
        raise ValueError(f"{key}: missing from the state dict")
    if not isinstance(sd[key], Tensor) or sd[key].layout is not torch.strided:
        raise refuse(key, "a dense tensor", sd[key])
    return sd[key]


def _dtype_named(name: Any, field: str) -> torch.dtype:
    if not isinstance(name, str) or name not in _DTYPES:
        raise refuse(field, f"one of {list(_DTYPES)}", name)
    return _DTYPES[name]


def _float_of(value: Any, field: str) -> float:
    """Read a JSON number; a NaN or an infinity stays, for a weight that held one."""
    if isinstance(value, float):
        return value
    if type(value) is int and abs(value) < 2**127:
        return float(value)
    raise refuse(field, "a number", value)


def _unpack_state(blob: Tensor, key: str) -> dict[str, Any]:
    """Parse the JSON bytes that bitsandbytes keeps in a uint8 tensor."""
    if blob.dtype is not torch.uint8 or blob.dim() != 1 or blob.is_meta:
        raise refuse(key, "uint8 bytes", blob)
    if len(blob) > _STATE_BYTES_MAX:
        raise refuse(key, f"at most {_STATE_BYTES_MAX} bytes", blob)
    try:
        state = json.loads(bytes(blob.tolist()))
    except (ValueError, RecursionError) as error:  # ValueError covers bad UTF-8 and bad JSON
        raise ValueError(f"{key}: expected JSON in UTF-8, got {error}") from None
    if not isinstance(state, dict):
        raise refuse(key, "a JSON object", state)
    return state
