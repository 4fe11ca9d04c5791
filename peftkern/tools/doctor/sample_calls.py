"""Arguments of every op for a given shape, without the memory that such a call would need.

Dispatch reads shapes, dtypes and devices, never values: each tensor here is one element, expanded
to its shape. The arguments of an op are those of its schema, found by their names.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import torch

from peftkern.backends import dispatch, ops
from peftkern.backends.cpu import crossovers
from peftkern.formats.nf4 import BLOCKSIZES, numel_of
from peftkern.formats.table import FORMATS, NUMBERS, fields

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
# Public functions that run more than the op of their name.
FUNCTIONS = {
    "lora_linear": ("lora_linear_forward", "lora_linear_backward"),
    "nf4_linear": ("nf4_lora_linear_forward", "nf4_lora_linear_backward"),
    "nf4_lora_linear": ("nf4_lora_linear_forward", "nf4_lora_linear_backward"),
    "quantize_nf4": ("nf4_quantize", "nf4_quantize_absmax"),
    "dequantize_nf4": ("nf4_dequantize",),
    "dora_linear": (  # over a dense weight, and over an NF4 one
        *("dora_norm", "lora_linear_forward", "lora_linear_backward"),
        *("nf4_dora_norm", "nf4_lora_linear_forward", "nf4_lora_linear_backward"),
    ),
    "grouped_lora_linear": (  # over a dense weight, and over an NF4 one
        *("grouped_linear_forward", "grouped_linear_backward"),
        *("nf4_grouped_linear_forward", "nf4_grouped_linear_backward"),
    ),
    "orthogonality_loss": ("adalora_orthogonality_forward", "adalora_orthogonality_backward"),
}
MODES = ("forward", "backward", "full", "no-grad")
_WITH_ROWS = ("x", "dy", "gate_up")
_GROUPS = 8  # of the rows of a grouped layer


@dataclass(frozen=True)
class Sample:
    """Sizes of a user's call: activations [M, K], weight [N, K], factors of rank r.

    dtype is that of activations and weight; PEFT keeps the factors in float32. format: of 4-bit
    weights, a row of `peftkern.formats.table`.
    Raises: ValueError naming the field, the accepted values and the input.
    """

    M: int
    N: int
    K: int
    r: int = 16
    dtype: torch.dtype = torch.bfloat16
    factors: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    lora: bool = True
    format: str = "nf4"

    def __post_init__(self) -> None:
        for name in ("M", "N", "K", "r"):
            size = getattr(self, name)
            if type(size) is not int or size < 1:
                raise ValueError(f"{name}: expected a positive number, got {size!r}")
        M, N, K, r = self.M, self.N, self.K, self.r
        for shape in ((N, K), (M, K), (M, N), (r, K), (N, r), (r, r), (M, r)):
            numel_of(shape)

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        one = torch.zeros((), dtype=dtype or self.dtype, device=self.device)
        return one.expand(shape)

    def value(self, name: str) -> Any:
        """Return the argument of that name, the same in all schemas; KeyError if there is none."""
        M, N, K, r = self.M, self.N, self.K, self.r
        f32 = functools.partial(self.tensor, dtype=torch.float32)
        nblocks = -(-N * K // BLOCKSIZES[1])
        triplet = [self.tensor(*shape, dtype=self.factors) for shape in ((r, 1), (r, K), (N, r))]
        lora_A, lora_B = triplet[1:] if self.lora else (None, None)
        values = {
            "x": self.tensor(M, K),
            "dy": self.tensor(M, N),
            "S": f32(M, r),
            "weight": self.tensor(N, K),
            "out": self.tensor(N, K),
            "dtype": self.dtype,
            "w": self._parts(BLOCKSIZES[1], N, K),
            "layout": self._layout(BLOCKSIZES[1], N, K),
            "absmax": f32(nblocks),
            "offset": f32(),
            "code": f32(256),
            "blocksize": BLOCKSIZES[1],
            "lora_A": lora_A,
            "lora_B": lora_B,
            "lora_E": triplet[0],
            "scaling": 1.0,
            "dropout_p": 0.0,
            "needs": [True] * 4,
            "vectors": True,
            "mode": "accurate",
            "params": triplet,
            "grads": triplet,
            "exp_avg_ipt": f32(r * (1 + K + N)),
            "exp_avg_unc": f32(r * (1 + K + N)),
            "beta1": 0.85,
            "beta2": 0.85,
            "scores": f32(r),
            "budget": r,
            "threshold_ties": False,
            "squared": False,
            "dloss": f32(),
            "residual": f32(2 * r * r),
            "factors": f32(2),
            "y": self.tensor(M, N),
            "values": f32(N),  # of a sparse matrix with one place in each row
            "crow": self.tensor(N + 1, dtype=torch.int32),
            "col": self.tensor(N, dtype=torch.int32),
            "order": self.tensor(N, dtype=torch.int32),
            "offsets": self.tensor(_GROUPS, dtype=torch.int32),
            "transposed": False,
            "gate_up": self.tensor(M, 2 * N),
            "row_weights": f32(M),
            "top_k_index": self.tensor(M, 2, dtype=torch.int64),
            "top_k_weights": self.tensor(M, 2),
            "num_experts": _GROUPS,
            "da": self.tensor(M, N),
            "need_gate_up": True,
            "need_weights": True,
            "need_z": True,
            "need_squares": True,
        }
        return values[name]

    def value_of_groups(self, name: str) -> Any:
        """Return the argument of that name of a grouped layer, which has a matrix per group."""
        value = self.value(name)
        if name in ("weight", "lora_A", "lora_B") and value is not None:
            return value.expand(_GROUPS, *value.shape)
        whole = (BLOCKSIZES[0], _GROUPS, self.N, self.K)  # no block is shared by two groups
        if name == "w":
            return self._parts(*whole)
        return self._layout(*whole) if name == "layout" else value

    def _layout(self, blocksize: int, *shape: int) -> list[int]:
        """Return the layout of a 4-bit weight; a format of another block size has its first."""
        sizes = FORMATS[NUMBERS[self.format]].blocksizes
        own = blocksize if blocksize in sizes else sizes[0]
        return [NUMBERS[self.format], own, 0, *shape]

    def _parts(self, blocksize: int, *shape: int) -> list[torch.Tensor]:
        found = fields(self._layout(blocksize, *shape))
        return [self.tensor(length, dtype=dtype) for _, dtype, length in found]

    def value_of_svd(self, name: str) -> Any:
        """Return the argument of that name of an SVD that is written to given tensors."""
        k = min(self.N, self.r, self.K)
        f32 = functools.partial(self.tensor, dtype=torch.float32)
        i64 = self.tensor(1, dtype=torch.int64)
        outputs = {"U": f32(self.N, k), "S": f32(k), "Vh": f32(k, self.K), "rank": i64, "info": i64}
        outputs["accuracy"] = "accurate"
        return outputs[name] if name in outputs else self.value(name)

    def arguments(self, op: str) -> tuple[Any, ...]:
        """Return positional arguments of an op of `torch.ops.peftkern`.

        Raises: LookupError naming an argument that is unknown here.
        """
        value_of = self.value_of_groups if "grouped" in op else self.value
        value_of = self.value_of_svd if op == "low_rank_svd_out" else value_of
        found = []
        for argument in getattr(torch.ops.peftkern, op).default._schema.arguments:
            kind = str(argument.type)
            try:
                value = value_of(argument.name)
            except KeyError:
                if not kind.startswith("Optional["):
                    raise LookupError(f"no sample of its argument {argument.name!r}") from None
                value = None
            wrap = kind.startswith("List[") and not isinstance(value, list)
            found.append([value] if wrap else value)
        return tuple(found)


def ops_of(name: str, mode: str = "full") -> tuple[str, ...]:
    """Return the ops that a public function, or an op's own name, runs in a mode.

    Raises: ValueError listing the names, or the modes.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if name in ops.SCHEMAS:
        return (name,)
    if name not in FUNCTIONS:
        names = ", ".join(sorted([*FUNCTIONS, *ops.SCHEMAS]))
        raise ValueError(f"op: expected one of {names}, got {name!r}")
    if mode == "full":
        return FUNCTIONS[name]
    backward = tuple(op for op in FUNCTIONS[name] if op.endswith("_backward"))
    if mode == "backward" and backward:
        return backward
    return tuple(op for op in FUNCTIONS[name] if op not in backward)


def sample_of(name: str, shape: str, **options: Any) -> Sample:
    """Parse the sample of a function or op from MxNxK, or NxK where there are no rows.

    Raises: ValueError naming the shape.
    """
    with_rows = any(
        argument.name in _WITH_ROWS
        for op in ops_of(name)
        for argument in getattr(torch.ops.peftkern, op).default._schema.arguments
    )
    wanted = "MxNxK" if with_rows else "NxK"
    sizes = shape.split("x")
    if len(sizes) != (3 if with_rows else 2) or not all(
        re.fullmatch(r"\d{1,19}", s) for s in sizes
    ):
        example = "16x4096x4096" if with_rows else "4096x4096"
        raise ValueError(f"shape: expected {wanted} for {name}, like {example}, got {shape!r}")
    rows = [] if with_rows else [1]
    return Sample(*rows, *map(int, sizes), lora=name != "nf4_linear", **options)


def explain(name: str, sample: Sample, mode: str = "full") -> dispatch.Explanation:
    """Explain the dispatch of a call of that size; nothing runs.

    Raises: ValueError naming the defect.
    """
    return dispatch.explain({op: sample.arguments(op) for op in ops_of(name, mode)})


def is_small(sample: Sample) -> bool:
    """Return whether a patched dense layer leaves such a CPU call to PEFT."""
    small = crossovers.crossover("dense") > sample.M * (sample.K + sample.N)
    return small and dispatch.forced_backend() is None
