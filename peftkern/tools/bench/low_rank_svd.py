"""SVD of many layers' updates beside torch's ways to compute it, as cases of `peftkern bench`.

The composition is QR of both factors, SVD of the r x r product, and two products. Batched, on
tensors stacked beforehand, it needs layers of one shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftkern.functional import low_rank_svd as functional
from peftkern.tools.bench.adalora import ADDRESSES
from peftkern.tools.bench.base_layers import Layer, Tensors
from peftkern.tools.bench.cases import Problem

WAITS = "cuSOLVER waits for the host"
SVD = tuple[Tensor | None, Tensor, Tensor | None]


def inputs(problem: Problem, draw: Callable[..., Tensor]) -> Tensors:
    layers, n, k, r = problem.M, problem.N, problem.K, problem.r
    return {"B": draw(layers, n, r), "A": draw(layers, r, k) / k**0.5}


def results(problem: Problem, tensors: Tensors) -> Tensors:
    """Compose the SVD of the first layer in the dtype of the tensors."""
    return named(problem, composition(tensors["B"][:1], tensors["A"][:1], with_vectors(problem)))


def with_vectors(problem: Problem) -> bool:
    return problem.op == "low_rank_svd"


def named(problem: Problem, svd: SVD) -> Tensors:
    """Name the compared results: the singular values of layer 0 and, with vectors, its update."""
    U, S, Vh = svd[:3]
    found = {"S": S[0]}
    if with_vectors(problem):
        found["update"] = (U[0].double() * S[0].double()) @ Vh[0].double()
    return found


def composition(B: Tensor, A: Tensor, vectors: bool, driver: str | None = None) -> SVD:
    if not vectors:
        R_B, R_A = torch.linalg.qr(B, mode="r")[1], torch.linalg.qr(A.mT, mode="r")[1]
        return None, torch.linalg.svdvals(R_B @ R_A.mT, driver=driver), None
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, driver=driver)
    return Q_B @ U, S, Vh @ Q_A.mT


def build_by(run: Callable[[Tensor, Tensor, bool], SVD], why: str, lists: bool = False) -> Callable:
    """Return a provider's function for `run(B, A, vectors)` of stacks, or of lists of matrices."""

    def build(problem: Problem, tensors: Tensors, copies: int) -> list[Layer]:
        def layer() -> Layer:
            B, A = tensors["B"].clone(), tensors["A"].clone()
            if lists:
                B, A = ([one.clone() for one in stack.unbind()] for stack in (B, A))
            call = lambda: run(B, A, with_vectors(problem))  # noqa: E731
            return Layer(call, collect=lambda svd: named(problem, svd), no_graph=why)

        return [layer() for _ in range(copies)]

    return build


def _ours(B: list[Tensor], A: list[Tensor], vectors: bool) -> SVD:
    if vectors:
        return functional.low_rank_svd(B, A)
    return None, functional.low_rank_svdvals(B, A), None


ours = build_by(_ours, ADDRESSES, lists=True)
composed = build_by(composition, WAITS)
