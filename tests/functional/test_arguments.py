"""Every public function refuses an argument of another kind in one line that names it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from torch import Tensor

import peftkern
from peftkern import NF4Weight
from peftkern.functional import adalora as importance
from peftkern.functional import dora
from peftkern.functional import low_rank_svd as svd
from peftkern.functional import rosa as sparse
from peftkern.functional.truncated_svd import truncated_svd
from peftkern.methods import shifted_sparse_attention

M, N, K, R = 3, 64, 128, 4
DENSE = torch.randn(N, K)
NF4 = peftkern.quantize_nf4(DENSE)
MASK = sparse.SparseMask.from_indices(torch.arange(4), torch.arange(4), (N, K))
LAYER = {"x": torch.randn(M, K), "lora_A": torch.randn(R, K), "lora_B": torch.randn(N, R)}
OPTIONS = {"scaling": 2.0, "bias": torch.randn(N), "dropout_p": 0.1}
FACTORS = {"lora_B": torch.randn(N, R), "lora_A": torch.randn(R, K)}
HEADS = torch.randn(1, 2, 8, 4)


def params4bit(storage: torch.dtype = torch.uint8) -> bnb.nn.Params4bit:
    weight = bnb.nn.Params4bit(
        DENSE.clone(), requires_grad=False, quant_type="nf4", quant_storage=storage
    )
    return weight.to("cpu")


PARAMS4BIT = params4bit()
# What no argument is; each of them, but what an argument may be, goes to every argument.
WRONG: dict[str, Any] = {
    "None": None,
    "list": [1.0, 2.0],
    "text": "text",
    "array": np.ones((N, K)),
    "tensor": torch.ones(7, 5, 3),
    "nf4": NF4,
    "params4bit": PARAMS4BIT,
}

CALLS: dict[str, tuple[Callable, dict[str, Any]]] = {
    "lora_linear": (peftkern.lora_linear, {**LAYER, "weight": DENSE, **OPTIONS}),
    "nf4_linear": (peftkern.nf4_linear, {"x": LAYER["x"], "w": NF4, "bias": OPTIONS["bias"]}),
    "nf4_lora_linear": (peftkern.nf4_lora_linear, {**LAYER, "w": NF4, **OPTIONS}),
    "dora_norm": (dora.dora_norm, {"weight": DENSE, **FACTORS, "scaling": 2.0}),
    "dora_linear": (
        dora.dora_linear,
        {**LAYER, "weight": DENSE, "magnitude": torch.ones(N), **OPTIONS},
    ),
    "rosa_linear": (
        sparse.rosa_linear,
        {**LAYER, "weight": NF4, "values": torch.ones(MASK.nnz), "mask": MASK, **OPTIONS},
    ),
    "from_indices": (
        sparse.SparseMask.from_indices,
        {"rows": torch.arange(4), "columns": torch.arange(4), "shape": (N, K)},
    ),
    "from_csr": (
        sparse.SparseMask.from_csr,
        {"crow": MASK.crow, "col": MASK.col, "shape": (N, K)},
    ),
    "quantize_nf4": (peftkern.quantize_nf4, {"weight": DENSE, "blocksize": 64}),
    "dequantize_nf4": (
        peftkern.dequantize_nf4,
        {"w": NF4, "dtype": torch.float32, "out": torch.empty(N, K)},
    ),
    "low_rank_svd": (
        svd.low_rank_svd,
        {**FACTORS, "scaling": 1.0, "mode": "fast", "out": svd.low_rank_svd(**FACTORS)},
    ),
    "low_rank_svdvals": (svd.low_rank_svdvals, {**FACTORS, "scaling": 1.0, "mode": "fast"}),
    "spectral_stats": (svd.spectral_stats, {"S": torch.ones(R)}),
    "allocate_rank": (
        svd.allocate_rank,
        {
            **{"S": [torch.ones(R)], "budget": 2e3, "cost": "bytes", "r_min": 0, "r_max": 4},
            **{"shapes": [(N, K)], "itemsize": 4, "exact": True},
        },
    ),
    "truncate_lora": (
        svd.truncate_lora,
        {"svd": svd.low_rank_svd(**FACTORS), "ranks": 2, "form": "balanced"},
    ),
    "merge_lora": (
        svd.merge_lora,
        {"adapters": [tuple(FACTORS.values())], "weights": [1.0], "mode": "fast"},
    ),
    "truncated_svd": (
        truncated_svd,
        {
            **{"weight": DENSE, "rank": 2, "minus": DENSE, "oversample": 4, "sweeps": 2},
            **{"tol": 1e-3, "certify": False, "seed": 0},
        },
    ),
    "adalora_importance_": (
        importance.adalora_importance_,
        {
            "params": [torch.ones(R, 1), torch.ones(R, K), torch.ones(N, R)],
            "grads": [torch.ones(R, 1), None, torch.ones(N, R)],
            "exp_avg_ipt": torch.zeros(R * (1 + K + N)),
            "exp_avg_unc": torch.zeros(R * (1 + K + N)),
            "beta1": 0.85,
            "beta2": 0.85,
        },
    ),
    "adalora_allocate_": (
        importance.adalora_allocate_,
        {
            **{"scores": torch.ones(R), "lora_E": [torch.ones(R, 1)], "budget": 2},
            **{"ties": "exact", "cost": [1.5], "r_min": 0, "r_max": 4},
        },
    ),
    "orthogonality_loss": (
        importance.orthogonality_loss,
        {"lora_A": [torch.ones(R, K)], "lora_B": [torch.ones(N, R)]},
    ),
    "shifted_sparse_attention": (
        shifted_sparse_attention,
        {
            **{"q": HEADS, "k": HEADS, "v": HEADS, "group_size": 4},
            **{"attention_mask": torch.ones(1, 8, dtype=torch.bool), "scale": 0.5},
            "dropout_p": 0.0,
        },
    ),
}
# What an argument may be beside what stands above.
ALSO_RIGHT = {
    **{(call, "bias"): {"None"} for call in CALLS},
    ("dora_norm", "weight"): {"nf4"},
    ("dora_linear", "weight"): {"nf4"},
    ("quantize_nf4", "weight"): {"tensor"},
    ("dequantize_nf4", "dtype"): {"None"},
    ("dequantize_nf4", "out"): {"None"},
    ("low_rank_svd", "out"): {"None"},
    ("allocate_rank", "cost"): {"None"},
    ("allocate_rank", "r_max"): {"None"},
    ("adalora_allocate_", "r_max"): {"None"},
    ("merge_lora", "weights"): {"None"},
    ("truncated_svd", "weight"): {"nf4"},
    ("truncated_svd", "minus"): {"nf4", "None"},
    ("truncated_svd", "sweeps"): {"None"},
    ("shifted_sparse_attention", "attention_mask"): {"None"},
    ("shifted_sparse_attention", "scale"): {"None"},
}
# The functions of singular values promise a TypeError for another kind.
TYPE_ERRORS = {"low_rank_svd", "low_rank_svdvals", "spectral_stats", "allocate_rank"}
TYPE_ERRORS |= {"truncate_lora", "merge_lora"}


def refused(function: Callable, arguments: dict[str, Any], error: Any = ValueError) -> str:
    with pytest.raises(error) as caught:
        function(**arguments)
    return str(caught.value)


@pytest.mark.parametrize("call", CALLS)
def test_the_calls_are_right(call):
    function, arguments = CALLS[call]
    function(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()})


@pytest.mark.parametrize(
    ("call", "argument"), [(call, name) for call, (_, names) in CALLS.items() for name in names]
)
def test_wrong_kinds_are_refused_by_name(call, argument):
    function, arguments = CALLS[call]
    errors = (ValueError, TypeError) if call in TYPE_ERRORS else ValueError
    for kind, wrong in WRONG.items():
        fits = type(wrong) is NF4Weight is type(arguments[argument])
        if fits or kind in ALSO_RIGHT.get((call, argument), ()):
            continue
        said = refused(function, arguments | {argument: wrong}, errors)
        assert re.match(rf"{argument}\b|[\w, ]*\b{argument}\b.*: expected", said), (kind, said)
        assert "\n" not in said and "expected" in said, (kind, said)


def unusual(tensor: Tensor) -> dict[str, Tensor]:
    """What is a tensor of that shape and none to compute with."""
    tensor = tensor.detach()
    rows = [*tensor] if tensor.dim() > 1 else [tensor]
    found = {"sparse": tensor.to_sparse(), "nested": torch.nested.nested_tensor(rows)}
    return found | {"jagged": torch.nested.nested_tensor(rows, layout=torch.jagged)}


def other_dtypes(tensor: Tensor) -> dict[str, Tensor]:
    if not tensor.is_floating_point():
        return {"float": tensor.double()}
    return {"integers": tensor.detach().long(), "complex": tensor.detach().to(torch.complex64)}


EXPERTS = {name: torch.randn(shape) for name, shape in (("up", (2, 2 * N, K)), ("down", (2, K, N)))}
OF_EXPERTS: dict[str, tuple[Callable, dict[str, Any]]] = {
    "route": (peftkern.route, {"top_k_index": torch.zeros(M, 1).long(), "num_experts": 2}),
    "grouped_lora_linear": (
        peftkern.grouped_lora_linear,
        {
            **{"x": LAYER["x"], "weight": DENSE[None], "lora_A": FACTORS["lora_A"][None]},
            **{"lora_B": FACTORS["lora_B"][None], "bias": torch.randn(1, N), "scaling": 1.0},
            "offsets": torch.tensor([M], dtype=torch.int32),
        },
    ),
    "lora_experts": (
        peftkern.lora_experts,
        {
            **{"hidden": LAYER["x"], "top_k_index": torch.zeros(M, 1).long()},
            **{"top_k_weights": torch.ones(M, 1)},
            **{name: peftkern.ExpertLinear(weight) for name, weight in EXPERTS.items()},
        },
    ),
}


TENSORS = [
    (call, name)
    for call, (_, arguments) in (CALLS | OF_EXPERTS).items()
    for name, value in arguments.items()
    if isinstance(value, Tensor)
]


@pytest.mark.parametrize(("call", "argument"), TENSORS)
def test_tensors_of_other_layouts_and_dtypes_are_refused_by_name(call, argument):
    function, arguments = (CALLS | OF_EXPERTS)[call]
    value = arguments[argument]
    for kind, wrong in (unusual(value) | other_dtypes(value)).items():
        said = refused(function, arguments | {argument: wrong})
        assert said.startswith(f"{argument}: expected") and "\n" not in said, (kind, said)


LISTS = [("allocate_rank", "S")]
LISTS += [("adalora_importance_", name) for name in ("params", "grads")]
LISTS += [("adalora_allocate_", "lora_E"), ("orthogonality_loss", "lora_A")]
LISTS += [("orthogonality_loss", "lora_B")]


@pytest.mark.parametrize(("call", "argument"), LISTS)
def test_tensors_of_other_layouts_and_dtypes_are_refused_in_lists(call, argument):
    function, arguments = CALLS[call]
    values = arguments[argument]
    for i, value in enumerate(values):
        if value is None:
            continue
        for kind, wrong in (unusual(value) | other_dtypes(value)).items():
            given = arguments | {argument: [*values[:i], wrong, *values[i + 1 :]]}
            said = refused(function, given)
            assert said.startswith(f"{argument}[{i}]: expected"), (kind, said)
            assert "\n" not in said, (kind, said)


@pytest.mark.parametrize("call", OF_EXPERTS)
def test_wrong_kinds_are_refused_of_experts_too(call):
    function, arguments = OF_EXPERTS[call]
    function(**arguments)
    for argument in arguments:
        for kind in ("list", "text", "array", "tensor"):
            said = refused(function, arguments | {argument: WRONG[kind]})
            named = re.match(r"\w+: expected ", said) and argument in said
            assert named and "\n" not in said, (kind, said)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        *(("from_indices", name) for name in ("rows", "columns")),
        *(("from_csr", name) for name in ("crow", "col")),
        *(("adalora_importance_", "exp_avg_unc"), ("lora_experts", "top_k_weights")),
        ("allocate_rank", "S"),
    ],
)
def test_tensors_without_values_are_refused_where_these_are_read(call, argument):
    function, arguments = (CALLS | OF_EXPERTS)[call]
    value = arguments[argument]
    given = [value[0].to("meta")] if isinstance(value, list) else value.to("meta")
    assert refused(function, arguments | {argument: given}).startswith(argument)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("call", [call for call, (_, a) in CALLS.items() if {"w", "weight"} & {*a}])
def test_the_weight_of_bitsandbytes_is_told_how_to_convert_it(call, storage):
    function, arguments = CALLS[call]
    (argument,) = {"w", "weight"} & {*arguments}
    said = refused(function, arguments | {argument: params4bit(storage)})
    assert said.startswith(f"{argument}: expected ")
    assert said.endswith(
        f", got a bitsandbytes Params4bit: NF4Weight.from_bitsandbytes({argument}) converts it"
    )


def test_both_sides_are_named():
    x, A, B = LAYER.values()
    said = refused(peftkern.nf4_linear, {"x": x, "w": DENSE})
    assert said == (
        "w: expected an NF4Weight or BlockWeight, as quantize_nf4 and its kin make of a dense "
        "tensor, got [64, 128] torch.float32 on cpu"
    )
    said = refused(
        peftkern.lora_linear, {"x": x, "weight": NF4, "lora_A": A, "lora_B": B, "scaling": 1.0}
    )
    assert said == f"weight: expected a dense tensor, got {NF4}"
    said = refused(peftkern.nf4_linear, {"x": x.tolist(), "w": NF4})
    assert said.startswith("x: expected a tensor of one of ") and said.endswith("got a list")


def test_the_conversion_that_is_named_works():
    x = LAYER["x"]
    converted = peftkern.NF4Weight.from_bitsandbytes(PARAMS4BIT)
    wanted = bnb.functional.dequantize_4bit(PARAMS4BIT.data, PARAMS4BIT.quant_state)
    assert torch.equal(peftkern.dequantize_nf4(converted), wanted)
    assert peftkern.nf4_linear(x, converted).shape == (M, N)


def test_a_params4bit_that_is_not_quantized_is_dense():
    weight = bnb.nn.Params4bit(DENSE.clone(), requires_grad=False, quant_type="nf4")
    _, A, B = LAYER.values()
    got = peftkern.lora_linear(LAYER["x"], weight, A, B, scaling=1.0)
    assert torch.equal(got, peftkern.lora_linear(LAYER["x"], DENSE, A, B, scaling=1.0))


@pytest.mark.parametrize("scaling", [2, np.float32(2), np.array(2.0), torch.tensor(2.0), True])
def test_numbers_of_every_kind_are_a_scaling(scaling):
    _, A, B = LAYER.values()
    got = peftkern.lora_linear(LAYER["x"], DENSE, A, B, scaling=scaling, dropout_p=np.float32(0))
    wanted = peftkern.lora_linear(LAYER["x"], DENSE, A, B, scaling=float(scaling))
    assert torch.allclose(got, wanted)


EXPLAINED = ("lora_linear", "nf4_linear", "nf4_lora_linear", "dora_linear", "dequantize_nf4")


@pytest.mark.parametrize("call", [*EXPLAINED, "quantize_nf4"])
def test_explain_refuses_as_the_function_does(call):
    _, arguments = CALLS[call]
    assert peftkern.explain(call, **arguments).rows
    for argument in set(arguments) & {"x", "w", "weight", "lora_A", "lora_B", "bias", "out"}:
        for kind, wrong in WRONG.items():
            anything = argument in ("x", "bias", "out") and isinstance(wrong, Tensor)  # of any size
            anything |= type(wrong) is NF4Weight is type(arguments[argument])
            if anything or kind in ALSO_RIGHT.get((call, argument), ()):
                continue
            said = refused(peftkern.explain, {"op_name": call, **arguments, argument: wrong})
            assert said.startswith(f"{argument}: expected") and "\n" not in said, (kind, said)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((None,), "op_name: expected one of"),
        ((["nf4_linear"],), "op_name: expected one of"),
        (("nf4_quantize",), "nf4_quantize: expected 2 arguments, got 0"),
        (("nf4_quantize", None, 64), "weight: expected a tensor, got None"),
        (("low_rank_svd", DENSE, [DENSE], [1.0], True, "fast"), "lora_B: expected a list of"),
        (("low_rank_svd", [3], [DENSE], [1.0], True, "fast"), "lora_B: expected a tensor, got 3"),
    ],
)
def test_explain_names_what_an_op_cannot_take(args, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        peftkern.explain(*args)


STACK = peftkern.layers.NF4Stack.from_dense(torch.randn(3, N, K))
# Arguments that are integers, and calls that 2 fits.
INTEGERS: dict[str, Callable[[Any], object]] = {
    "num_experts": lambda n: peftkern.route(torch.zeros(M, 1).long(), n),
    "budget": lambda n: importance.adalora_allocate_(torch.ones(R), [torch.ones(R, 1)], n),
    "ranks": lambda n: svd.truncate_lora(svd.low_rank_svd(**FACTORS), n),
    "r_min": lambda n: svd.allocate_rank([torch.ones(R)], 4, r_min=n),
    "r_max": lambda n: svd.allocate_rank([torch.ones(R)], 4, r_max=n),
    "shapes": lambda n: svd.rank_costs("bytes", [(N, n)]),
    "itemsize": lambda n: svd.rank_costs("bytes", [(N, K)], itemsize=n),
    "rank": lambda n: truncated_svd(DENSE, n),
    "oversample": lambda n: truncated_svd(DENSE, 2, oversample=n),
    "sweeps": lambda n: truncated_svd(DENSE, 2, sweeps=n),
    "seed": lambda n: truncated_svd(DENSE, 2, seed=n),
    "expert": lambda n: STACK.expert(n),
}


@pytest.mark.parametrize("argument", INTEGERS)
def test_integers_of_every_kind_are_taken_and_nothing_else(argument):
    call = INTEGERS[argument]
    for right in (2, np.int64(2), np.uint8(2), torch.tensor(2)):
        call(right)
    wrong = (2.0, np.float64(2), torch.tensor(2.0), True, "2", -4, 2**63, math.nan, [2.0])
    for given in wrong:
        said = refused(call, {"n": given}, (ValueError, TypeError))
        assert said.startswith(f"{argument}: expected ") and "\n" not in said, (given, said)


def test_no_expert_is_written_by_what_is_no_place():
    before = [part.clone() for part in STACK.parts]
    for place in (None, True, slice(None), 1.0, 3):
        with pytest.raises(
            ValueError, match="expert: expected an integer of at least -3 and at most 2"
        ):
            STACK.set_expert(place, torch.zeros(N, K))
    assert all(map(torch.equal, STACK.parts, before))
