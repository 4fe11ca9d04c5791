"""Codes that exist in our packing alone: reads, writes, copies and state dicts of a module."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from peftkern.formats.int4_layouts import GPTQ, HQQ
from peftkern.integrations.peft.repacked import Repacked


def made(parameter: bool) -> tuple[Repacked, Tensor]:
    generator = torch.Generator().manual_seed(0)
    packing, shape, dtype = (
        (HQQ, (6, 32), torch.uint8) if parameter else (GPTQ, (4, 6), torch.int32)
    )
    info = torch.iinfo(dtype)
    original = torch.randint(info.min, info.max, shape, generator=generator).to(dtype)
    return Repacked(packing.pack(original), packing, shape, dtype, parameter), original


class Holder(nn.Module):
    def __init__(self, held: Tensor, parameter: bool) -> None:
        super().__init__()
        (self._parameters if parameter else self._buffers)["codes"] = held


@pytest.mark.parametrize("parameter", [True, False])
def test_whatever_reads_it_gets_the_original(parameter):
    held, original = made(parameter)
    assert held.shape == original.shape and held.dtype is original.dtype
    assert isinstance(held, nn.Parameter) is parameter and not held.requires_grad
    assert torch.equal(held, original) and torch.equal(held >> 2, original >> 2)
    assert torch.equal(held[1:, ::2].t().contiguous(), original[1:, ::2].t())
    assert type(held.detach()) is Tensor and torch.equal(held.data, original)
    assert held.cpu().sum() == original.sum()
    module = Holder(held, parameter)
    state = module.state_dict()
    assert torch.equal(load(save(state))["codes"], original)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer)["codes"], original)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin.codes) is (nn.Parameter if parameter else Tensor)
        assert torch.equal(twin.codes, original)
    assert type(module.codes) is Repacked
    compiled = torch.compile(lambda x: x + held.sum(), backend="eager")
    assert compiled(torch.ones(())) == original.sum() + 1


@pytest.mark.parametrize("parameter", [True, False])
def test_other_codes_are_packed_and_nothing_else_is_written(parameter):
    held, original = made(parameter)
    module, other = Holder(held, parameter), original.flip(0)
    module.load_state_dict({"codes": other})
    assert type(module.codes) is Repacked and torch.equal(module.codes, other)
    held.data = original
    assert torch.equal(held, original)
    for write in (
        lambda: held.add_(1),
        lambda: held.copy_(original.float()),
        lambda: setattr(held, "data", original[:1]),
        lambda: setattr(held, "data", original.to("meta")),
    ):
        with pytest.raises(NotImplementedError, match="`unpatch` first"):
            write()
    assert torch.equal(held, original)
