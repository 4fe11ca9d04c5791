"""RoSA's sparse products beside the dense ones that they replace, as cases of `peftkern bench`.

rosa_sddmm: the gradient of the values, dy.T @ x at the mask's places alone; `dense dW` makes all of
it and gathers. rosa_forward: y = x (W + S).T; `dense W + S` writes the sum at each call, as the
values have changed since the last, and multiplies once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.backends import ops
from peftkern.functional.rosa import SparseMask
from peftkern.tools.bench.base_layers import Layer, Tensors, product
from peftkern.tools.bench.cases import Problem

DENSE = {"rosa_sddmm": "dense dW", "rosa_forward": "dense W + S"}


def inputs(problem: Problem, draw: Callable[..., Tensor]) -> Tensors:
    m, n, k = problem.M, problem.N, problem.K
    dtype = getattr(torch, problem.dtype)
    x, dy = draw(m, k).to(dtype), draw(m, n).to(dtype)
    nnz = max(1, round(problem.density * n * k))
    flat = draw(n * k).argsort()[:nnz]
    mask = SparseMask.from_indices(flat // k, flat % k, (n, k))
    tensors = {"x": x, "dy": dy, "crow": mask.crow, "col": mask.col, "flat": mask.flat()}
    tensors["mask_values"] = draw(nnz) / 4
    if problem.op == "rosa_forward":
        tensors["weight"] = (draw(n, k) / k**0.5).to(dtype)
    return tensors


def results(problem: Problem, tensors: Tensors) -> Tensors:
    """Run the dense way in the dtype of the tensors."""
    if problem.op == "rosa_sddmm":
        return {"values.grad": product(tensors["dy"].T, tensors["x"]).view(-1)[tensors["flat"]]}
    return {"y": _dense_forward(tensors, tensors["x"], tensors["dy"])}


def _dense_gradient(tensors: Tensors, x: Tensor, dy: Tensor) -> Tensor:
    return (dy.T @ x).view(-1)[tensors["flat"]]


def _dense_forward(tensors: Tensors, x: Tensor, dy: Tensor) -> Tensor:
    total = tensors["weight"].clone()
    total.view(-1)[tensors["flat"]] += tensors["mask_values"].to(total.dtype)
    return F.linear(x, total)


def _ours_gradient(tensors: Tensors, x: Tensor, dy: Tensor) -> Tensor:
    return ops.rosa_sddmm(dy, x, tensors["crow"], tensors["col"])


def _ours_forward(tensors: Tensors, x: Tensor, dy: Tensor) -> Tensor:
    y = F.linear(x, tensors["weight"])
    ops.rosa_spmm_(y, x, tensors["mask_values"], tensors["crow"], tensors["col"], None)
    return y


def build_by(gradient: Callable, forward: Callable) -> Callable:
    def build(problem: Problem, tensors: Tensors, copies: int) -> list[Layer]:
        call = gradient if problem.op == "rosa_sddmm" else forward

        def layer() -> Layer:
            x, dy = tensors["x"].clone(), tensors["dy"].clone()
            return Layer(lambda: call(tensors, x, dy))

        return [layer() for _ in range(copies)]

    return build


ours = build_by(_ours_gradient, _ours_forward)
composed = build_by(_dense_gradient, _dense_forward)
