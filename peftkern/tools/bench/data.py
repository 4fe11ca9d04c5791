"""Input tensors of a case, the same for every provider, and their float64 results.

One process draws them and writes a safetensors file that the others read: same weights, same
adapters, same inputs, regardless of what a library draws or quantizes by itself.

    weight  [N, K] of the case's dtype; of an NF4 op the packed bytes, dequantized and rounded
    nf4.*   the packed weight in bitsandbytes' keys, of FP4 as well; mxfp4.*, nvfp4.*, int4.* those
            of the other formats by field
    x, dy   [M, K], [M, N] of that dtype
    lora_A, lora_B   [r, K], [N, r] float32
    offsets int32 [E]: ends of the groups' rows, of a grouped op; its weight is [E, N, K], and the
            adapters are as PEFT keeps them, [E * r, K] and [N, r * E]
    magnitude   [N] float32, of DoRA
    rows    [<= 64] int64: those of y and dx that are compared
    y, dx, lora_A.grad, lora_B.grad   float64, of the whole op
    frozen.y, frozen.dx   float64, of the layer without its adapter

The oracle takes the values that the packed bytes stand for, in float64. A product's rows do not
depend on each other, so that 64 of them, the first and the last among them, are enough; the
adapters' gradients are sums over all rows and are compared whole. An op that is no layer has a
module of its own (rosa, low_rank_svd, adalora), whose plain expression runs in both precisions.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftkern
from peftkern import functional
from peftkern.backends.tolerances import errors
from peftkern.formats.block_weight import NAMES, BlockWeight, QuantizedWeight
from peftkern.formats.nf4 import NF4Weight, nf4_code
from peftkern.formats.table import fields
from peftkern.tools.bench import adalora, low_rank_svd, rosa
from peftkern.tools.bench.base_layers import product
from peftkern.tools.bench.cases import SCALING, Problem

CHECKED_ROWS = 64
CHUNK = 4 << 20  # values that are held in float64 at once


OWN = dict.fromkeys(("rosa_forward", "rosa_sddmm"), rosa)
OWN |= dict.fromkeys(("low_rank_svd", "low_rank_svdvals"), low_rank_svd)
OWN |= dict.fromkeys(("adalora_update", "adalora_orthogonality"), adalora)


def prepare(problem: Problem, seed: int, path: Path, device: torch.device) -> dict[str, float]:
    """Write the case's file; return the error of eager torch in the same dtypes, for the bound."""
    tensors = inputs(problem, seed, device)
    oracle = oracle_of(problem, tensors)
    found = eager_errors(problem, tensors, {**tensors, **oracle})
    kept = {name: tensor.contiguous().cpu() for name, tensor in {**tensors, **oracle}.items()}
    staged = path.with_suffix(".part")
    save_file(kept, staged)
    os.replace(staged, path)
    return found


def eager_errors(
    problem: Problem, tensors: dict[str, Tensor], oracle: dict[str, Tensor]
) -> dict[str, float]:
    """Return the errors of eager torch as `compare` does, for the bound of ours."""
    return compare(problem, _eager(problem, tensors), oracle)


def load(path: Path, device: torch.device) -> dict[str, Tensor]:
    return load_file(path, device=str(device))


def compare(
    problem: Problem, got: dict[str, Tensor], oracle: dict[str, Tensor], adapted: bool = True
) -> dict[str, float]:
    """Return relative errors against float64, the largest over the results of the case.

    Raises: ValueError naming the result that is missing, of another shape or of another dtype.
    """
    dtype, found = getattr(torch, problem.dtype), []
    for name in wanted(problem, adapted):
        if name not in got:
            raise ValueError(f"{name}: expected a tensor, got none")
        result = got[name].detach()
        right = oracle[name if adapted or name not in ("y", "dx") else f"frozen.{name}"]
        if name in ("y", "dx") and result.dtype is not dtype:
            raise ValueError(f"{name}: expected {dtype}, got {result.dtype}")
        if name in ("y", "dx") and problem.kind.rows:
            result = result.reshape(-1, result.shape[-1])
            if result.shape[0] != problem.M:
                raise ValueError(f"{name}: expected {problem.M} rows, got {result.shape[0]}")
            result = result[oracle["rows"].to(result.device)]
        if result.shape != right.shape:
            expected = tuple(right.shape)
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(result.shape)}")
        found.append(errors(result, right))
    return {"rms": _worst(rms for rms, _ in found), "max": _worst(top for _, top in found)}


def _worst(values) -> float:
    """Return the largest; NaN, which no comparison finds, before all others."""
    values = list(values)
    return max(values) if all(value == value for value in values) else float("nan")


def wanted(problem: Problem, adapted: bool) -> list[str]:
    """Return the names of a call's results."""
    if not problem.kind.rows:
        return list(problem.kind.results)
    names = ["y"] if problem.goes_forward else []
    if problem.trains:
        names += ["dx"]
        if adapted and problem.kind.lora:
            names += ["lora_A.grad", "lora_B.grad"]
            names += ["magnitude.grad"] if problem.kind.dora else []
    return names


def nf4_values64(weight: NF4Weight, start: int, stop: int) -> Tensor:
    """Decode values `start` to `stop` of a weight, row-major, in float64 and plain torch."""
    packed, device = weight.packed[start // 2 : (stop + 1) // 2], weight.device
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)
    codes = codes[start % 2 : start % 2 + stop - start]
    absmax = weight.absmax.double()
    if weight.nested:
        groups = torch.arange(weight.nblocks, device=device) // weight.nested_blocksize
        absmax = weight.nested_code.double()[weight.absmax.long()]
        absmax = absmax * weight.nested_absmax.double()[groups] + weight.nested_offset.double()
    blocks = torch.arange(start, stop, device=device) // weight.blocksize
    return nf4_code(device).double()[codes.long()] * absmax[blocks]


def _stored(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors of a packed weight for a case's file."""
    if isinstance(weight, NF4Weight):
        return weight.state_dict("nf4.")
    names = [field.name for field in fields(weight.layout)]
    return {f"{weight.format}.{n}": t for n, t in zip(names, weight.tensors, strict=True)}


def packed_weight(tensors: dict[str, Tensor]) -> QuantizedWeight:
    """Read the packed weight of a case."""
    if "nf4.weight" in tensors:
        return NF4Weight.from_state_dict(tensors, "nf4.")
    format = next(name for name in NAMES if f"{name}.packed" in tensors)
    own = {n.partition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{format}.")}
    dense = tensors["weight"]
    blocksize = dense.numel() // own["scale"].numel()
    return BlockWeight(format, **own, shape=dense.shape, dtype=dense.dtype, blocksize=blocksize)


def inputs(problem: Problem, seed: int, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    m, n, k, r, dtype = problem.M, problem.N, problem.K, problem.r, getattr(torch, problem.dtype)
    groups = problem.E or 1

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    if problem.op in OWN:
        return OWN[problem.op].inputs(problem, draw)
    weight = draw(*([groups] if problem.E else []), n, k).div_(k**0.5).to(dtype)
    tensors = {"weight": weight}
    if problem.E:
        ends = torch.tensor(problem.group_sizes).cumsum(0)
        tensors["offsets"] = ends.to(torch.int32).to(device)
    if problem.kind.nf4:
        with peftkern.use_backend(None):  # even if the case forces a back end
            packed = getattr(functional, f"quantize_{problem.format}")(weight)
        tensors |= _stored(packed)
        with peftkern.use_backend("reference"):
            tensors["weight"] = functional.dequantize(packed, dtype)
    if problem.kind.rows:
        tensors |= {"x": draw(m, k).to(dtype), "dy": draw(m, n).to(dtype)}
        count = min(m, CHECKED_ROWS)
        tensors["rows"] = torch.linspace(0, m - 1, count, dtype=torch.float64).round().long()
    if problem.kind.lora:
        kind = getattr(torch, problem.adapter_dtype)
        tensors["lora_A"] = (draw(groups * r, k) / k**0.5).to(kind)
        tensors["lora_B"] = (draw(n, r * groups) * 0.1).to(kind)
    if problem.kind.dora:
        tensors["magnitude"] = weight.float().norm(dim=1) * (1 + 0.1 * draw(n).clamp(-2, 2))
    return tensors


def oracle_of(
    problem: Problem, tensors: dict[str, Tensor], keep: Tensor | None = None
) -> dict[str, Tensor]:
    """Compute a case's results in float64; `keep`: the mask of dropout, where there is any."""
    if problem.op in OWN:
        wide = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
        return OWN[problem.op].results(problem, wide)
    if problem.E:
        return _grouped_oracle(problem, tensors)
    n, k, weight = problem.N, problem.K, tensors["weight"]
    packed = packed_weight(tensors) if problem.kind.nf4 else None
    if packed is not None and problem.format != "nf4":
        with peftkern.use_backend("reference"):
            packed, weight = None, functional.dequantize(packed, torch.float64)

    def weight64(start: int, stop: int) -> Tensor:
        if packed is None:
            return weight[start:stop].double()
        return nf4_values64(packed, start * k, stop * k).view(-1, k)

    if problem.op == "nf4_quantize":
        return {"values": weight.double()}
    if not problem.kind.rows:
        return {"y": weight64(0, n)}
    rows = tensors["rows"].to(weight.device)
    x, dy = (tensors[name][rows].double() for name in ("x", "dy"))
    y, dx = x.new_zeros(len(rows), n), x.new_zeros(len(rows), k)
    step = max(1, CHUNK // k)
    for start in range(0, n, step):
        part = weight64(start, min(n, start + step))
        y[:, start : start + step] = x @ part.T
        dx += dy[:, start : start + step] @ part
    oracle = {"frozen.y": y, "frozen.dx": dx}
    if not problem.kind.lora:
        return {**oracle, "y": y.clone(), "dx": dx.clone()}
    a, b = tensors["lora_A"].double(), tensors["lora_B"].double()
    x, dy = tensors["x"].double(), tensors["dy"].double()
    if problem.kind.dora:
        # Every provider computes with the values in its own dtype.
        return oracle | _dora_oracle(tensors, weight.double(), rows)
    factor = 1.0 if keep is None else keep.double() / (1.0 - problem.dropout)
    dropped = x * factor
    s, ds = SCALING * (dropped @ a.T), SCALING * (dy @ b)
    return {
        **oracle,
        "y": y + s[rows] @ b.T,
        "dx": dx + ((ds @ a) * factor)[rows],
        "lora_A.grad": ds.T @ dropped,
        "lora_B.grad": dy.T @ s,
    }


def _dora_oracle(tensors: dict[str, Tensor], weight: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """Compute DoRA, whose norm is a constant to the gradients, as in PEFT."""
    names = ("lora_A", "lora_B", "magnitude", "x", "dy")
    a, b, magnitude, x, dy = (tensors[name].double() for name in names)
    total = weight + SCALING * b @ a
    norm = torch.linalg.norm(total, dim=1)
    z, scaled = x @ total.T, dy * (magnitude / norm)
    ds = SCALING * scaled @ b
    return {
        "y": z[rows] * (magnitude / norm),
        "dx": scaled[rows] @ total,
        "lora_A.grad": ds.T @ x,
        "lora_B.grad": SCALING * scaled.T @ (x @ a.T),
        "magnitude.grad": (dy * z).sum(0) / norm,
    }


def by_group(a: Tensor, b: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return PEFT's adapters of each group, [E, r, K] and [E, N, r], as views."""
    r = len(a) // groups
    return a.view(groups, r, -1), b.view(-1, r, groups).permute(2, 0, 1)


def _grouped_oracle(problem: Problem, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compute group by group: of y and dx the compared rows, of the adapters everything."""
    a, b = by_group(tensors["lora_A"], tensors["lora_B"], problem.E)
    grad_a, grad_b = (torch.zeros_like(t, dtype=torch.float64) for t in (a, b))
    rows = tensors["rows"].to(a.device)
    y = a.new_zeros(len(rows), problem.N, dtype=torch.float64)
    dx = a.new_zeros(len(rows), problem.K, dtype=torch.float64)
    adapted = {"y": y.clone(), "dx": dx.clone()}
    begin = 0
    for group, end in enumerate(tensors["offsets"].tolist()):
        here = (rows >= begin) & (rows < end)
        x, dy = (tensors[name][begin:end].double() for name in ("x", "dy"))
        a64, b64 = a[group].double(), b[group].double()
        s, ds = SCALING * (x @ a64.T), SCALING * (dy @ b64)
        grad_a[group], grad_b[group] = ds.T @ x, dy.T @ s
        if here.any():
            weight, local = tensors["weight"][group].double(), rows[here] - begin
            y[here], dx[here] = x[local] @ weight.T, dy[local] @ weight
            adapted["y"][here] = y[here] + s[local] @ b64.T
            adapted["dx"][here] = dx[here] + ds[local] @ a64
        begin = end
    return {
        "frozen.y": y,
        "frozen.dx": dx,
        **adapted,
        "lora_A.grad": grad_a.view(-1, problem.K),
        "lora_B.grad": grad_b.permute(1, 2, 0).reshape(problem.N, -1),
    }


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x @ weight[e].T of each group, as transformers runs frozen experts."""
    return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)


def grouped_update(x: Tensor, a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Compute the update as two more products over the groups, in the dtype of x."""
    a, b = (t.to(x.dtype).contiguous() for t in by_group(a, b, len(offsets)))
    return grouped_mm(grouped_mm(x, a, offsets), b, offsets) * SCALING


def _eager(problem: Problem, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run the op in plain torch and its own dtypes, as PEFT writes it."""
    if problem.op in OWN:
        return OWN[problem.op].results(problem, tensors)
    if problem.op == "nf4_quantize":
        with peftkern.use_backend("reference"):
            return {"values": quantized_values(peftkern.quantize_nf4(tensors["weight"]))}
    if not problem.kind.rows:
        return {"y": tensors["weight"]}
    names = ("lora_A", "lora_B", *(["magnitude"] if problem.kind.dora else []))
    names = ("x", *(names if problem.kind.lora else ()))
    leaves = {name: tensors[name].clone().requires_grad_() for name in names}
    adapter = {name: leaf for name, leaf in leaves.items() if name != "x"}
    if problem.E:
        y = _eager_grouped(problem, tensors, leaves)
    else:
        y = _eager_linear(leaves["x"], tensors["weight"], *adapter.values())
    gradients = torch.autograd.grad(y, list(leaves.values()), tensors["dy"])
    names = wanted(dataclasses.replace(problem, mode="full"), adapted=True)
    return dict(zip(names, (y.detach(), *gradients), strict=True))


def quantized_values(weight: NF4Weight) -> Tensor:
    return peftkern.dequantize_nf4(weight, torch.float32)


def _eager_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    magnitude: Tensor | None = None,
) -> Tensor:
    y = product(x, weight.T)
    if a is None:
        return y
    update = F.linear(F.linear(x.to(a.dtype), a), b) * SCALING
    if magnitude is None:
        return (y + update).to(x.dtype)
    norm = (weight.to(a.dtype) + SCALING * b @ a).norm(dim=1).detach()
    return ((y + update) * (magnitude / norm)).to(x.dtype)


def _eager_grouped(problem: Problem, tensors: dict[str, Tensor], leaves: dict[str, Tensor]):
    groups = leaves["x"].split(problem.group_sizes)
    adapters = by_group(leaves["lora_A"], leaves["lora_B"], problem.E)
    operands = zip(groups, tensors["weight"], *adapters, strict=True)
    return torch.cat([_eager_linear(*one) for one in operands])
