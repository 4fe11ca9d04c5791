"""`MXFP4Stack`: gpt-oss's blocks and scales that read as dense experts, either way round."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from peftkern.formats.block_weight import BlockWeight
from peftkern.layers import Experts, LoRAExperts
from peftkern.layers.expert_stack import expert_weight, set_stack, stacks_of
from peftkern.layers.mxfp4_stack import MXFP4Stack

E, N, K = 3, 6, 64
either_way = pytest.mark.parametrize("turned", [False, True])


def parts(n: int = N, k: int = K) -> tuple[Tensor, Tensor]:
    """Blocks and scales of a checkpoint, of every code."""
    torch.manual_seed(0)
    blocks = torch.randint(256, (E, n, k // 32, 16), dtype=torch.uint8)
    return blocks, torch.randint(110, 130, (E, n, k // 32), dtype=torch.uint8)


def made(turned: bool, dtype: torch.dtype = torch.bfloat16) -> MXFP4Stack:
    return MXFP4Stack.from_blocks(*parts(), dtype=dtype, turned=turned)


@either_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_reads_as_what_transformers_decodes_of_the_same_memory(turned, dtype):
    blocks, scales = parts()
    stack = MXFP4Stack.from_blocks(blocks, scales, dtype=dtype, turned=turned)
    dense = convert_moe_packed_tensors(blocks, scales, dtype=dtype)  # [E, K, N]
    dense = dense if turned else dense.transpose(1, 2)
    assert stack.shape == dense.shape and stack.dtype is dtype
    ids = torch.tensor([[2, 0], [1, 1]])
    for read in (lambda w: w[1], lambda w: w[ids], lambda w: w[1:], lambda w: w + 0):
        assert torch.equal(read(stack), read(dense))
    w = expert_weight(stack)
    assert isinstance(w, BlockWeight) and w.shape == (E, N, K)
    assert w.packed.data_ptr() == blocks.data_ptr() and w.scale.data_ptr() == scales.data_ptr()


@either_way
def test_copies_casts_and_files_keep_the_bytes(turned):
    module = nn.Module()
    set_stack(module, "gate_up_proj", made(turned))
    twin = copy.deepcopy(module).half()
    assert twin.gate_up_proj.dtype is torch.float16 and twin.gate_up_proj.turned is turned
    blocks, scales = parts()
    state = module.state_dict()
    assert list(state) == ["gate_up_proj_blocks", "gate_up_proj_scales"]
    assert torch.equal(state["gate_up_proj_blocks"], blocks)
    assert torch.equal(state["gate_up_proj_scales"], scales)
    for part in twin.gate_up_proj.parts:
        part.zero_()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    twin.load_state_dict(torch.load(file))
    assert torch.equal(twin.gate_up_proj._packed, module.gate_up_proj._packed)
    assert twin.gate_up_proj.dtype is torch.float16
    del state["gate_up_proj_scales"]
    with pytest.raises(RuntimeError, match="gate_up_proj: expected both of"):
        twin.load_state_dict(state)


@either_way
def test_what_is_added_is_quantized_again(turned):
    stack = made(turned, torch.float32)
    before, added = stack.dequantize(), torch.zeros(stack.shape)
    stack += added
    assert torch.equal(stack.dequantize(), before)
    added[1] = 3 * before[1]
    with pytest.warns(UserWarning, match=r"1 of 3 experts were quantized to MXFP4 again"):
        stack += added
    assert torch.equal(stack[1], 4 * before[1]) and torch.equal(stack[0], before[0])
    with pytest.raises(ValueError, match="MXFP4 has no infinity and no NaN"):
        stack += torch.full(stack.shape, torch.inf)


@either_way
def test_layers_for_plain_torch_take_them(turned):
    """Whichever way a module of experts has its weights: gradients of the adapters are the same."""
    up = MXFP4Stack.from_blocks(*parts(2 * 32, K), dtype=torch.float32, turned=turned)
    down = MXFP4Stack.from_blocks(*parts(K, 32), dtype=torch.float32, turned=turned)
    frozen = Experts(up, down, transposed=turned)
    dense = Experts(up.dequantize(), down.dequantize(), transposed=turned)
    results = []
    for experts in (frozen, dense):
        torch.manual_seed(2)
        layer = LoRAExperts(experts, r=4)
        for B in layer.lora_B.values():
            nn.init.normal_(B, std=0.1)
        x = torch.randn(5, K, generator=torch.Generator().manual_seed(3)).requires_grad_()
        index = torch.tensor([[0, 1], [1, 2], [0, 2], [1, 0], [2, 1]])
        y = layer(x, index, torch.rand(5, 2, generator=torch.Generator().manual_seed(4)))
        (y / y.detach().std()).square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    assert len(stacks_of(frozen)) == 2 and not stacks_of(dense)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_what_does_not_fit_is_refused():
    blocks, scales = parts()
    dtype = torch.bfloat16
    with pytest.raises(ValueError, match=r"blocks: expected uint8 \[experts, N, K / 32, 16\]"):
        MXFP4Stack.from_blocks(blocks.view(E, N, -1), scales, dtype=dtype)
    with pytest.raises(ValueError, match=r"scales: expected uint8 \[3, 6, 2\], got torch.float32"):
        MXFP4Stack.from_blocks(blocks, scales.float(), dtype=dtype)
    with pytest.raises(ValueError, match="rows of a multiple of 32 values, got 33"):
        MXFP4Stack.from_dense(torch.randn(2, 4, 33))
    with pytest.raises(ValueError, match="does not fit packed"):
        MXFP4Stack(blocks.view(E, -1), scales.view(E, -1), (E, N, K + 32), dtype)
    with pytest.raises(TypeError, match="expected packed, scale, shape and dtype, or another"):
        MXFP4Stack(blocks.view(E, -1))
    with pytest.raises(NotImplementedError, match="got weights kept in MXFP4"):
        made(False).zero_()
