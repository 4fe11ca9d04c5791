"""Schemas of the ops: the one place that gives an op its operands, in order and by name.

Autograd functions pass all of an op's operands. Its implementations take them all; what only asks
about a call (a refusal, a fake, a size) names those that it reads.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch

_W = "Tensor[] w, SymInt[] layout"  # a quantized weight: peftkern/formats/table.py
SCHEMAS = {
    "nf4_quantize": "(Tensor weight, int blocksize) -> (Tensor packed, Tensor absmax)",
    "nf4_quantize_absmax": "(Tensor absmax, Tensor offset, Tensor code, int blocksize) "
    "-> (Tensor q, Tensor nested_absmax)",
    "nf4_dequantize": f"({_W}, ScalarType dtype) -> Tensor",
    "nf4_dequantize_out": f"({_W}, Tensor(a!) out) -> ()",
    "lora_linear_forward": "(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, "
    "float scaling, Tensor? keep, float dropout_p) -> (Tensor y, Tensor S)",
    "lora_linear_backward": "(Tensor dy, Tensor? x, Tensor? S, Tensor? weight, Tensor lora_A, "
    "Tensor lora_B, float scaling, Tensor? keep, float dropout_p, bool[4] needs) "
    "-> (Tensor dx, Tensor dA, Tensor dB, Tensor dbias)",
    "nf4_lora_linear_forward": f"(Tensor x, {_W}, Tensor? lora_A, "
    "Tensor? lora_B, Tensor? bias, float scaling, Tensor? keep, float dropout_p) "
    "-> (Tensor y, Tensor S)",
    "nf4_lora_linear_backward": f"(Tensor dy, Tensor? x, Tensor? S, {_W}, "
    "Tensor? lora_A, Tensor? lora_B, float scaling, Tensor? keep, float dropout_p, "
    "bool[4] needs) -> (Tensor dx, Tensor dA, Tensor dB, Tensor dbias)",
    "route": "(Tensor top_k_index, Tensor? top_k_weights, int num_experts) "
    "-> (Tensor rows, Tensor offsets, Tensor inverse, Tensor row_weights)",
    "grouped_linear_forward": "(Tensor x, Tensor? rows, Tensor offsets, Tensor? weight, "
    "bool transposed, Tensor? lora_A, Tensor? lora_B, Tensor? bias, float scaling) "
    "-> (Tensor y, Tensor S)",
    "grouped_linear_backward": "(Tensor dy, Tensor offsets, Tensor? x, Tensor? rows, Tensor? S, "
    "Tensor? weight, bool transposed, Tensor? lora_A, Tensor? lora_B, float scaling, "
    "bool[4] needs) -> (Tensor dx, Tensor dA, Tensor dB, Tensor dbias)",
    "nf4_grouped_linear_forward": f"(Tensor x, Tensor? rows, Tensor offsets, {_W}, "
    "bool transposed, Tensor? lora_A, Tensor? lora_B, Tensor? bias, float scaling) "
    "-> (Tensor y, Tensor S)",
    "nf4_grouped_linear_backward": "(Tensor dy, Tensor offsets, Tensor? x, Tensor? rows, "
    f"Tensor? S, {_W}, bool transposed, Tensor? lora_A, Tensor? lora_B, float scaling, "
    "bool[4] needs) -> (Tensor dx, Tensor dA, Tensor dB, Tensor dbias)",
    "swiglu_forward": "(Tensor gate_up, Tensor row_weights) -> Tensor",
    "swiglu_backward": "(Tensor da, Tensor gate_up, Tensor row_weights, bool need_gate_up, "
    "bool need_weights) -> (Tensor dgate_up, Tensor drow_weights)",
    "dora_norm": "(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling) -> Tensor",
    "nf4_dora_norm": f"({_W}, ScalarType dtype, Tensor lora_A, Tensor lora_B, "
    "float scaling) -> Tensor",
    "gram_product": "(Tensor weight, Tensor x, bool need_z, bool need_squares) "
    "-> (Tensor y, Tensor z, Tensor squares)",
    "nf4_gram_product": f"({_W}, Tensor x, bool need_z, bool need_squares) "
    "-> (Tensor y, Tensor z, Tensor squares)",
    "low_rank_svd": "(Tensor[] lora_B, Tensor[] lora_A, float[] scaling, bool vectors, str mode) "
    "-> (Tensor U, Tensor S, Tensor Vh, Tensor rank, Tensor info)",
    # `mode` is a name that torch's functionalization keeps for itself.
    "low_rank_svd_out": "(Tensor[] lora_B, Tensor[] lora_A, float[] scaling, str accuracy, "
    "Tensor(a!)[] U, Tensor(b!)[] S, Tensor(c!)[] Vh, Tensor(d!) rank, Tensor(e!) info) -> ()",
    "adalora_importance_": "(Tensor(a!) exp_avg_ipt, Tensor(b!) exp_avg_unc, Tensor[] params, "
    "Tensor?[] grads, float beta1, float beta2) -> Tensor",
    "adalora_allocate_": "(Tensor scores, Tensor(a!)[] lora_E, SymInt budget, "
    "bool threshold_ties) -> Tensor",
    "adalora_orthogonality_forward": "(Tensor[] lora_A, Tensor[] lora_B, bool squared) "
    "-> (Tensor loss, Tensor residual, Tensor factors)",
    "adalora_orthogonality_backward": "(Tensor dloss, Tensor residual, Tensor factors, "
    "Tensor[] lora_A, Tensor[] lora_B) -> Tensor[]",
    "rosa_sddmm": "(Tensor dy, Tensor x, Tensor crow, Tensor col) -> Tensor",
    "rosa_spmm_": "(Tensor(a!) y, Tensor x, Tensor values, Tensor crow, Tensor col, "
    "Tensor? order) -> ()",
}


@functools.cache
def operands(op: str) -> tuple[str, ...]:
    """Return the names of an op's operands."""
    schema = torch._C.parse_schema(op + SCHEMAS[op])
    return tuple(argument.name for argument in schema.arguments)


def reads(op: str, function: Callable[..., Any]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Return what picks, of a tuple of all of an op's operands, those that a function names.

    For one that takes `*args` that is `tuple`: all of them, as they are.
    """
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters.values()):
        return tuple
    places = [operands(op).index(name) for name in parameters]
    if len(places) == 1:
        return operator.itemgetter(slice(places[0], places[0] + 1))
    return operator.itemgetter(*places)


def by_name(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of some of an op's operands, by their names, as one of all of them."""
    pick = reads(op, function)
    return function if pick is tuple else lambda *args: function(*pick(args))
