"""`NF4Stack`: bit-equal to bitsandbytes, dense to whoever reads it, written to with a word."""

from __future__ import annotations

import copy
import io
import math
import warnings

import bitsandbytes as bnb
import pytest
import torch
from accelerate.utils import set_module_tensor_to_device
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from peak_memory import LargestTensor
from torch import Tensor, nn

from peftkern import NF4Weight, dequantize_nf4, quantize_nf4
from peftkern.layers.expert_stack import expert_weight, set_stack
from peftkern.layers.nf4_stack import NF4Stack

E, N, K = 5, 12, 32
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dense(dtype: torch.dtype = torch.bfloat16, shape: tuple[int, ...] = (E, N, K)) -> Tensor:
    return torch.randn(shape).to(dtype)


def equal(a: NF4Stack, b: NF4Stack) -> bool:
    return torch.equal(a._packed, b._packed) and torch.equal(a._absmax, b._absmax)


class Experts(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(dense(dtype))
        self.down_proj = nn.Parameter(dense(dtype, (E, K, N)))


class InNF4(Experts):
    def __init__(self, blocksize: int = 64) -> None:
        super().__init__()
        for name, weight in list(self._parameters.items()):
            set_stack(self, name, NF4Stack.from_dense(weight, blocksize=blocksize))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_those_of_each_expert_alone_and_of_bitsandbytes(dtype):
    weight = dense(
        dtype, (E, N, 2 * K)
    )  # its rows are whole blocks: else bitsandbytes errs on a CPU
    stack = NF4Stack.from_dense(weight)
    for expert in range(E):
        alone = quantize_nf4(weight[expert], double_quant=False)
        assert torch.equal(stack._packed[expert], alone.packed)
        assert torch.equal(stack._absmax[expert], alone.absmax)
        packed, state = bnb.functional.quantize_4bit(weight[expert], blocksize=64, quant_type="nf4")
        assert torch.equal(stack._packed[expert], packed.view(-1))
        assert torch.equal(stack[expert], bnb.functional.dequantize_4bit(packed, state))
    module = nn.Module()
    module.weight = nn.Parameter(weight)
    replace_parameter_4bit(module, "weight", blocksize=64)
    theirs = module.parametrizations.weight
    assert torch.equal(theirs.original.view(E, -1), stack._packed)
    assert torch.equal(theirs[0].quant_state.absmax, stack._absmax.view(-1))
    assert torch.equal(module.weight, stack.dequantize())


def test_it_is_a_dense_parameter_to_whoever_reads_it():
    stack = nn.Parameter(NF4Stack.from_dense(dense()), requires_grad=False)
    assert isinstance(stack, nn.Parameter) and stack.is_leaf and not stack.requires_grad
    assert (tuple(stack.shape), stack.dtype, stack.dim()) == ((E, N, K), torch.bfloat16, 3)
    whole = stack.dequantize()
    ids = torch.tensor([[3, 1], [3, 0]])
    for read in (
        lambda w: w[2],
        lambda w: w[-1],
        lambda w: w[torch.tensor(2)],
        lambda w: w[1:4],
        lambda w: w[ids],
        lambda w: w[torch.tensor([True, False, True, False, False])],
        lambda w: w[:, 3],
        lambda w: w[torch.arange(N) % 2 == torch.zeros(E, 1)],
        lambda w: torch.ops.aten.slice.Tensor(w, 0, 2),
        lambda w: w[ids, 1],
        lambda w: w.transpose(-2, -1),
        lambda w: w + 1,
        lambda w: torch.empty_like(whole).copy_(w),
        lambda w: w.to(torch.int8),
    ):
        assert torch.equal(read(stack), read(whole))
        assert type(read(stack)) is Tensor
    w = expert_weight(stack)
    assert isinstance(w, NF4Weight) and w.shape == (E, N, K) and not w.nested
    assert w.packed.data_ptr() == stack._packed.data_ptr()
    assert torch.equal(dequantize_nf4(w), whole)
    assert expert_weight(whole) is whole
    assert repr(stack).startswith("NF4Stack(shape=(5, 12, 32), blocksize=64, dtype=torch.bfloat16")


def test_only_the_experts_that_are_read_are_decoded(monkeypatch):
    stack = NF4Stack.from_dense(dense())
    decoded = []

    def dequantize(w: NF4Weight, dtype: torch.dtype) -> Tensor:
        decoded.append(w.numel)
        return dequantize_nf4(w, dtype)

    monkeypatch.setattr("peftkern.layers.expert_stack.dequantize", dequantize)
    assert stack[2].numel() + stack[1:3].numel() + stack[[4, 4]].numel() == 5 * N * K
    assert decoded == [N * K, 2 * N * K, 2 * N * K]


def test_quantizing_takes_no_more_than_one_experts_memory():
    weight = dense()
    with LargestTensor(floating=True) as largest:
        NF4Stack.from_dense(weight)
    assert 0 < largest.numel <= N * K


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_cast_keeps_the_bytes(dtype):
    module = InNF4()
    before = module.gate_up_proj.clone()
    module.to(dtype)
    stack = module.gate_up_proj
    assert isinstance(stack, NF4Stack) and stack.dtype is dtype and equal(stack, before)
    assert torch.equal(stack[1].double(), dequantize_nf4(before.nf4, dtype)[1].double())
    stack.data = stack.data.to(torch.float32)  # as k-bit preparation does
    assert stack.dtype is torch.float32 and stack[0].dtype is torch.float32
    assert equal(stack, before)
    assert module.to("meta").gate_up_proj.device.type == "meta"
    with pytest.raises(TypeError, match="data: expected an NF4Stack"):
        stack.data = torch.zeros(E, N, K)


def test_copies_are_their_own():
    module = InNF4()
    twin = copy.deepcopy(module)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    before = module.gate_up_proj.clone()
    for other in (twin, loaded):
        assert equal(other.gate_up_proj, before) and not other.gate_up_proj.requires_grad
        with pytest.warns(UserWarning, match="quantized to NF4 again"):
            other.gate_up_proj.data.copy_(dense())
        assert not equal(other.gate_up_proj, before)
        assert set(other.state_dict()) == set(module.state_dict())
    assert equal(module.gate_up_proj, before)


def test_accelerate_moves_both_parts():
    module = InNF4()
    before = module.gate_up_proj.clone()
    set_module_tensor_to_device(module, "gate_up_proj", "cpu")
    assert equal(module.gate_up_proj, before)
    set_module_tensor_to_device(module, "gate_up_proj", "meta")
    assert type(module.gate_up_proj) is NF4Stack and module.gate_up_proj.is_meta
    with pytest.raises(TypeError, match="cannot be offloaded part by part"):
        NF4Stack(before._packed, requires_grad=False)


def test_processes_share_both_parts():
    module = InNF4()
    before = module.gate_up_proj.clone()
    assert not module.gate_up_proj.is_shared()
    module.share_memory()
    assert module.gate_up_proj.is_shared() and equal(module.gate_up_proj, before)


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_added_is_quantized_again_and_the_error_reported(sign):
    stack = nn.Parameter(NF4Stack.from_dense(dense()), requires_grad=False)
    before, whole = stack.clone(), stack.dequantize()
    delta = dense()
    delta[1] = 0
    with pytest.warns(UserWarning, match="4 of 5 experts were quantized to NF4 again") as caught:
        if sign == 1:
            stack.data += delta
        else:
            stack.data -= delta
    for expert in range(E):
        wanted = whole[expert].float() + sign * delta[expert].float()
        w = quantize_nf4(wanted, double_quant=False)
        assert expert == 1 or torch.equal(stack._packed[expert], w.packed)
    assert torch.equal(stack._packed[1], before._packed[1])
    error = (stack.dequantize().float() - whole.float() - sign * delta.float())[delta != 0].norm()
    said = str(caught[0].message)
    assert float(said.rsplit(" ", 1)[1]) == pytest.approx(error.item(), rel=1e-2)
    assert float(said.split("norm ")[1].split(",")[0]) == pytest.approx(
        delta.norm().item(), rel=1e-2
    )


def test_nothing_is_written_that_would_be_lost():
    stack = NF4Stack.from_dense(dense())
    before = stack.clone()
    for value in (math.nan, math.inf):
        delta = torch.zeros(E, N, K)
        delta[-1, 0, 0] = value
        with pytest.raises(ValueError, match="no infinity and no NaN"):
            stack += delta
    for write in (
        lambda w: w.mul_(2),
        lambda w: w.zero_(),
        lambda w: w.add_(1.0),
        lambda w: w.set_(dense()),
        lambda w: torch.add(dense(), 1, out=w),
        lambda w: torch._foreach_add_([w], 1.0),
    ):
        with pytest.raises((NotImplementedError, TypeError)):
            write(stack)
    assert equal(stack, before)


def test_a_copy_of_what_it_reads_as_changes_nothing():
    """DDP copies the dense values of a model onto itself when it starts."""
    stack = NF4Stack.from_dense(dense() * 1.01)
    before = stack.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stack.copy_(stack.dequantize())
        stack.copy_(before)
    assert equal(stack, before)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"a multiple of 64 values.* got 3 x 32"):
        NF4Stack.from_dense(torch.randn(2, 3, 32))
    with pytest.raises(ValueError, match=r"expected \[experts, N, K\]"):
        NF4Stack.from_dense(torch.randn(64, 64))
    with pytest.raises(ValueError, match="blocksize: expected one of"):
        NF4Stack.from_dense(dense(), blocksize=48)
    with pytest.raises(ValueError, match="weight: expected one of"):
        NF4Stack.from_dense(dense(torch.float64))
    stack = NF4Stack.from_dense(dense())
    with pytest.raises(ValueError, match=r"weight: expected .*\[12, 32\].*, got \(32, 12\)"):
        stack.set_expert(0, torch.randn(K, N))
    with pytest.raises(ValueError, match=r"shape: \[5, 12, 33\] does not fit"):
        NF4Stack(stack._packed, stack._absmax, (E, N, K + 1), torch.float32)
    with pytest.raises(ValueError, match="blocksize: expected one of"):
        NF4Stack(stack._packed, stack._absmax[:, :4], (E, N, K), torch.float32)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64])
def test_the_state_dict_is_plain_and_loads(assign, blocksize):
    module, other = InNF4(blocksize), InNF4()
    state = module.state_dict()
    assert {key: (value.dtype, tuple(value.shape)) for key, value in state.items()} == {
        "gate_up_proj": (torch.uint8, (E, N * K // 2)),
        "gate_up_absmax": (torch.float32, (E, N * K // blocksize)),
        "down_proj": (torch.uint8, (E, N * K // 2)),
        "down_absmax": (torch.float32, (E, N * K // blocksize)),
    }
    assert all(type(value) is Tensor for value in state.values())
    outer = nn.ModuleDict({"experts": other})
    prefixed = {f"experts.{key}": value for key, value in state.items()}
    outer.load_state_dict(prefixed, assign=assign)
    for name in ("gate_up_proj", "down_proj"):
        assert equal(getattr(other, name), getattr(module, name))
        assert getattr(other, name).blocksize == blocksize


def test_it_loads_what_bitsandbytes_writes_and_dense_weights():
    theirs = Experts()
    weight = theirs.gate_up_proj.detach().clone()
    replace_parameter_4bit(theirs, "gate_up_proj", blocksize=64)
    replace_parameter_4bit(theirs, "down_proj", blocksize=64)
    module = InNF4()
    module.load_state_dict(theirs.state_dict())
    assert equal(module.gate_up_proj, NF4Stack.from_dense(weight))
    module.load_state_dict({"gate_up_proj": weight.flip(0)}, strict=False)
    assert equal(module.gate_up_proj, NF4Stack.from_dense(weight.flip(0)))
    module.load_state_dict({"gate_up_proj": module.gate_up_proj.flip(0)}, strict=False)
    nested = Experts()
    replace_parameter_4bit(nested, "gate_up_proj", blocksize=64, compress_statistics=True)
    with pytest.raises(RuntimeError, match="gate_up_proj: absmax: expected float32"):
        module.load_state_dict(nested.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match=r"gate_up_proj: shape: .* does not fit"):
        broken = {
            "gate_up_proj": torch.zeros(3, dtype=torch.uint8),
            "gate_up_absmax": torch.ones(E, 6),
        }
        module.load_state_dict(broken, strict=False)
    with pytest.raises(RuntimeError, match=r"Missing key.*down_proj"):
        module.load_state_dict({"gate_up_proj": weight})


def test_ddp_keeps_the_bytes_and_trains_beside_them(tmp_path):
    module = InNF4()
    module.lora = nn.Parameter(torch.randn(K, K, dtype=torch.bfloat16))
    module.forward = lambda x: torch.bmm(x @ module.lora, module.gate_up_proj[[0, 2]].mT)
    before = [module.gate_up_proj.clone(), module.down_proj.clone()]
    options = {"init_method": f"file://{tmp_path}/start", "rank": 0, "world_size": 1}
    torch.distributed.init_process_group("gloo", **options)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            parallel = nn.parallel.DistributedDataParallel(module)
        parallel(torch.randn(2, 3, K, dtype=torch.bfloat16)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert module.lora.grad is not None
    assert equal(module.gate_up_proj, before[0]) and equal(module.down_proj, before[1])


def test_it_compiles():
    module = InNF4()
    ids = torch.tensor([3, 0, 3])

    def function(x: Tensor, ids: Tensor) -> Tensor:
        return torch.bmm(x, module.gate_up_proj[ids].transpose(1, 2)) @ module.down_proj.mT[0]

    x = torch.randn(3, 2, K, dtype=torch.bfloat16, requires_grad=True)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, ids), function(x, ids))
    (grad,) = torch.autograd.grad(compiled(x, ids).sum(), x)
    assert torch.equal(grad, torch.autograd.grad(function(x, ids).sum(), x)[0])


def test_a_compiled_function_takes_stacks_of_other_sizes():
    ids = torch.tensor([1, 3])
    compiled = torch.compile(lambda w: w[ids] + 1, backend="aot_eager", fullgraph=True)
    for shape in ((E, N, K), (E, 2 * N, K), (E + 1, N, 2 * K)):
        stack = NF4Stack.from_dense(dense(shape=shape))
        assert torch.equal(compiled(stack), stack[ids] + 1)


def test_a_stack_that_was_pickled_before_there_were_turned_ones():
    stack = NF4Stack.from_dense(torch.randn(2, 8, 64))
    old = copy.copy(stack.__dict__)
    del old["turned"]
    stack.__dict__.clear()
    stack.__dict__.update(old)
    assert stack.dequantize().shape == (2, 8, 64) and not stack.clone().turned
