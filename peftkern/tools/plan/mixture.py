"""Experts of a mixture in a training step: their sizes, and what running them allocates.

With adapters they run as `peftkern.lora_experts`, which keeps x once, the rows between the two
layers and no row of the model's width; without as transformers' grouped_mm, which keeps the latter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftkern.tools.plan.training_step import Step, Tensor

F32, INT32, INT64 = 4, 4, 8  # bytes


@dataclass(frozen=True)
class Mixture:
    """Experts of width `width`, of which each token has `top`.

    normalized: a token's weights are divided by their sum; wide: they stay in float32.
    """

    experts: int
    top: int
    width: int
    normalized: bool
    wide: bool

    def stacks(self, hidden: int) -> dict[str, tuple[int, int]]:
        """Return {parameter: (K, N)} of one expert."""
        return {"gate_up_proj": (hidden, 2 * self.width), "down_proj": (self.width, hidden)}


def mixture(step: Step, x: Tensor, i: int) -> Tensor:
    """Run the router and the experts of layer `i`."""
    weights = _route(step, x)
    if step.shapes.adapted_stacks:
        return _adapted(step, x, weights, i)
    return _frozen(step, x, weights)


def _route(step: Step, x: Tensor) -> Tensor:
    """Router's softmax in float32 and the largest of it: [T, top], in its dtype."""
    s, T, m = step.shapes, step.tokens, step.shapes.mixture
    logits = step.op([x], T * m.experts * s.size, keeps=True)
    logits = step.cast(logits, T * m.experts * F32)
    scores = step.op([logits], T * m.experts * F32, saves_output=True)
    index = step.new(T * m.top * INT64)
    top = step.op([scores], T * m.top * F32, saves=[index])
    if m.normalized:
        total = step.op([top], T * F32)
        top = step.op([top, total], T * m.top * F32, saves=[top.buffer, total.buffer])
    return top if m.wide else step.cast(top, T * m.top * s.size)


def _adapted(step: Step, x: Tensor, weights: Tensor, i: int) -> Tensor:
    """Run `lora_experts` and, in backward, its gate once more."""
    s, m = step.shapes, step.shapes.mixture
    R = step.tokens * m.top
    narrow, row = R * m.width * s.size, R * s.hidden * s.size
    has = {name: name in s.adapted_stacks for name in ("gate_up_proj", "down_proj")}
    made = [step.new(R * INT32), step.new(R * INT64), step.new(2 * narrow)]  # rows, inverse, u
    made += [step.new(R * s.r * F32) for name in has if has[name]]
    saves = [*([x.buffer] if has["gate_up_proj"] else []), weights.buffer, *made]
    sizes = {
        name: [(f"{i}.{name}.lora_A", K), (f"{i}.{name}.lora_B", N)]
        for name, (K, N) in m.stacks(s.hidden).items()
        if has[name]
    }
    factor = s.r * m.experts * s.adapter_size
    trains = [(name, factor * size) for pair in sizes.values() for name, size in pair]
    # Beside what the whole op allocates, its output or its gradients, each stage has:
    copies = 4 if m.wide and s.size < F32 else 0  # of rows times weights in float32
    forward = max(narrow + 2 * row, (1 + max(copies, 1)) * narrow - x.nbytes)
    scores = 3 * R * m.width * F32 if s.size < F32 else narrow  # gradients of the weights
    held = 4 * narrow + row  # silu, gate, its weighted rows, their gradients, those of y
    later = x.nbytes + sum(factor * size for _, size in sizes.get("gate_up_proj", ()))
    backward = max(5 * narrow + 2 * row, held + max(scores, 4 * narrow) - later)
    # A GPU makes one expert in NF4 dense at a time, for many rows.
    scratch = 2 * m.width * s.hidden * s.size if s.cuda and s.linears["q_proj"].nf4 else 0
    return step.op(
        [x, weights],
        x.nbytes,
        saves=saves,
        saves_late=True,
        trains=trains,
        forward=forward + scratch,
        backward=backward + scratch,
    )


def _frozen(step: Step, x: Tensor, weights: Tensor) -> Tensor:
    """Run transformers' grouped_mm: rows gathered, two products, weighted and summed. Its function
    holds the gathered rows and the second product until it returns."""
    s, m = step.shapes, step.shapes.mixture
    R, nbytes = step.tokens * m.top, x.nbytes
    narrow, row = R * m.width * s.size, R * s.hidden * s.size
    order = step.new(R * INT64)
    rows = step.op([x], row, saves=[step.new(R * INT64)])
    up = step.op([rows], 2 * narrow, keeps=True)
    gate = step.op([up], narrow, saves=[up.buffer])
    product = step.op([gate, up], narrow, saves=[gate.buffer, up.buffer])
    gate = up = None
    out = step.op([product], row, keeps=True)
    product = None
    scores = step.op([weights], weights.nbytes, saves=[order])
    wide = max(row, R * s.hidden * F32 if m.wide else 0)
    weighted = step.op([out, scores], wide, saves=[out.buffer, scores.buffer])
    weighted = step.op([weighted], wide, saves=[step.new(R * INT64)])
    summed = step.op([weighted], wide // m.top)
    return step.cast(summed, nbytes)
