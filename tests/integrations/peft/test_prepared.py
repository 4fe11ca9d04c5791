"""Prepared weights: believed while nothing has changed, and never kept by anything else."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import bitsandbytes as bnb
import pytest
import torch
from peft_models import K, layer_of, lora_net, make_linear4bit
from torch import Tensor

import peftkern
from peftkern import NF4Weight
from peftkern.integrations.peft import prepared


def quantized(double_quant: bool = True) -> bnb.nn.Params4bit:
    return make_linear4bit(double_quant=double_quant).weight


def view(weight: bnb.nn.Params4bit) -> NF4Weight:
    read = weight, weight.quant_state
    return prepared.kept(*read) or prepared.prepare(*read)


def as_read_anew(weight: bnb.nn.Params4bit) -> bool:
    found, fresh = view(weight), NF4Weight.from_bitsandbytes(weight)
    same = [a.data_ptr() == b.data_ptr() and torch.equal(a, b) for a, b in zip(
        found.tensors, fresh.tensors, strict=True)]  # fmt: skip
    return all(same) and found.layout == fresh.layout and found.dtype is fresh.dtype


@pytest.mark.parametrize("double_quant", [True, False])
def test_unchanged_weight_is_read_once(double_quant):
    weight = quantized(double_quant)
    assert view(weight) is view(weight)
    assert as_read_anew(weight)


def other_codes(weight: bnb.nn.Params4bit) -> None:
    weight.data = weight.data.clone()


def other_absmax(weight: bnb.nn.Params4bit) -> None:
    weight.quant_state.absmax = weight.quant_state.absmax.clone()


def memory_of_absmax(weight: bnb.nn.Params4bit) -> None:
    weight.quant_state.absmax.data = weight.quant_state.absmax.data.clone()


def other_state(weight: bnb.nn.Params4bit) -> None:
    weight.quant_state = copy.deepcopy(weight.quant_state)


def other_scales(weight: bnb.nn.Params4bit) -> None:
    weight.quant_state.state2.absmax = 2 * weight.quant_state.state2.absmax


def memory_of_scales(weight: bnb.nn.Params4bit) -> None:
    weight.quant_state.state2.code.data = 2 * weight.quant_state.state2.code.data


def other_dtype(weight: bnb.nn.Params4bit) -> None:
    weight.quant_state.dtype = torch.bfloat16


CHANGES = [
    other_codes, other_absmax, memory_of_absmax, other_state, other_scales, memory_of_scales,
    other_dtype,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weight_is_read_again(change):
    weight = quantized()
    before = view(weight)
    change(weight)
    assert view(weight) is not before
    assert as_read_anew(weight)
    assert view(weight) is view(weight)


def of_another_type(weight: bnb.nn.Params4bit) -> None:
    weight.quant_state.quant_type = "fp4"


def of_another_table(weight: bnb.nn.Params4bit) -> None:
    weight.quant_state.code[3] += 0.5


def of_fewer_scales(weight: bnb.nn.Params4bit) -> None:
    weight.quant_state.absmax = weight.quant_state.absmax[:-1]


def shrunk_in_place(weight: bnb.nn.Params4bit) -> None:
    weight.quant_state.absmax.resize_(weight.quant_state.absmax.numel() - 1)


def repacked(weight: bnb.nn.Params4bit) -> None:
    weight.quant_state.packing_format_for_cpu = True


REFUSED = [of_another_type, of_another_table, of_fewer_scales, shrunk_in_place, repacked]


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_weight_that_is_none_any_more_is_refused(change):
    weight = quantized()
    view(weight)
    change(weight)
    with pytest.raises(ValueError) as fresh:
        NF4Weight.from_bitsandbytes(weight)
    with pytest.raises(type(fresh.value), match="^" + str(fresh.value)[:12]):
        view(weight)


def test_record_goes_with_its_weight():
    weight = quantized()
    view(weight)
    key = id(weight)
    assert key in prepared._records
    del weight
    gc.collect()
    assert key not in prepared._records


def in_an_array(weight: bnb.nn.Params4bit) -> weakref.ref:
    """Put codes into memory that tells when it is given back."""
    codes = weight.data.numpy().copy()
    weight.data = torch.from_numpy(codes)
    return weakref.ref(codes)


def test_memory_of_a_moved_layer_is_free_at_once():
    model = lora_net(make_linear4bit())
    peftkern.patch(model)
    base = layer_of(model).base_layer
    codes = in_an_array(base.weight)
    model(torch.randn(2, K))
    assert id(base.weight) in prepared._records
    model._apply(torch.clone)  # as `to` does from one device to another
    gc.collect()
    assert codes() is None


def test_nothing_is_kept_of_memory_that_deepspeed_gathers():
    weight = quantized()
    weight.ds_id = 0
    codes = in_an_array(weight)
    assert as_read_anew(weight) and id(weight) not in prepared._records
    weight.data = torch.empty(0, dtype=torch.uint8)
    gc.collect()
    assert codes() is None


def test_copies_pickles_and_moved_layers_have_none():
    model = lora_net(make_linear4bit())
    peftkern.patch(model)
    x = torch.randn(2, K)
    expected = model(x)
    names, size = set(vars(layer_of(model).base_layer)), len(pickle.dumps(model))
    assert torch.equal(model(x), expected)
    assert set(vars(layer_of(model).base_layer)) == names
    assert len(pickle.dumps(model)) == size
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to("cpu")):
        layer = layer_of(twin)
        assert torch.equal(twin(x), expected)
        with torch.no_grad():
            layer.base_layer.weight.quant_state.state2.absmax.zero_()
            layer.base_layer.weight.quant_state.offset.zero_()
        without_base: Tensor = twin(x)
        assert not torch.equal(without_base, expected)
        assert twin is model or torch.equal(model(x), expected)
