"""torch.distributed.checkpoint takes the state dicts of 4-bit layers, in one process as in many."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from expert_models import tiny_moe
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

import peftkern
from peftkern.layers import BlockLinear, NF4Linear
from peftkern.layers.state_keys import any_key


def linear(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(NF4Linear(64, 32), BlockLinear(64, 32, format="mxfp4"), nn.Linear(32, 8))


def experts(seed: int) -> nn.Module:
    model = tiny_moe(seed=seed)
    peftkern.quantize_(model)
    return model


@pytest.mark.parametrize("make", [linear, experts])
@pytest.mark.parametrize("full", [False, True])
def test_a_state_dict_is_taken_and_loaded(make, full):
    model, other = make(seed=0), make(seed=1)
    options = StateDictOptions(full_state_dict=full)
    state, expected = get_model_state_dict(model, options=options), model.state_dict()
    assert state.keys() == expected.keys() and any(k.endswith("absmax") for k in state)
    for twin in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        name = next(key for key in expected if key.endswith("absmax"))
        assert not torch.equal(twin.state_dict()[name], expected[name])
        set_model_state_dict(twin, state, options=options)
        loaded = get_model_state_dict(twin)
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_no_protocol_is_found_by_a_name_that_has_all_names():
    assert any_key.absmax.quant_state is any_key
    for name in ("__deepcopy__", "_fqn_modifiers"):
        with pytest.raises(AttributeError):
            getattr(any_key, name)
    assert copy.deepcopy(any_key).weight
