"""The compiled kernels on a GPU: numerics, streams, graphs, torch.compile, PEFT, large sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from gpu_cases import (
    check_finite,
    check_ops_against_reference,
    check_subsets,
    dense_cases,
    draw_seed,
    nf4_cases,
    run_ops,
    same_bits,
)
from gpu_runs import (
    CUDA,
    NEEDS_GPU,
    assert_patched_is_the_same,
    bf16_linear,
    capture,
    launches,
    linear4bit,
    on_a_busy_stream,
)
from linear_cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    KINDS,
    SHAPES,
    Operands,
    check_accuracy,
    layouts,
    ours,
)
from nf4_weights import assert_same_every_time
from op_cases import Checkpointed, Layer, op_cases, run
from tolerances import assert_as_accurate_as_torch
from torch import Tensor, nn

import peftkern
from peftkern import NF4Weight
from peftkern.backends import ops
from peftkern.formats.nf4 import BLOCKSIZES, dynamic_map

pytestmark = [*NEEDS_GPU, pytest.mark.usefixtures("triton_serves")]

DENSE_SHAPES = [*SHAPES, (40, 21, 50, 130), (16, 512, 256, 256), (512, 1024, 1024, 16)]
NF4_SHAPES = [
    (1, 33, 64, 3),
    (5, 40, 320, 17),
    (3, 21, 70, 5),
    (32, 1024, 2048, 16),
    (128, 512, 1024, 64),
    (300, 512, 1024, 16),
]
LAUNCHES_MOST = 3


def cases_of(kind: str) -> Callable[..., list[Operands]]:
    return dense_cases if kind == "lora_linear" else nf4_cases


def draw(kind: str, shape: tuple[int, ...], *dtypes: torch.dtype, **options) -> Operands:
    return cases_of(kind)(shape, *dtypes, device=CUDA, **options)[0]


# Numerics


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("shape", [(3, 1031), (0, 7), (1,), (1024, 4096)], ids=str)
def test_nf4_codec_is_the_references_bit_for_bit(shape, blocksize, double_quant):
    for dtype in (F32, F16, BF16):
        dense = (torch.randn(shape) * 0.05).to(dtype)
        wanted = peftkern.quantize_nf4(dense, blocksize=blocksize, double_quant=double_quant)
        got = ops.nf4_quantize(dense.to(CUDA), blocksize)
        plain = ops.nf4_quantize(dense, blocksize)
        assert all(same_bits(g.cpu(), w) for g, w in zip(got, plain, strict=True))
        on_gpu = wanted.to(CUDA)
        with peftkern.use_backend("reference"):
            expected = {d: peftkern.dequantize_nf4(wanted, d) for d in (F32, F16, BF16)}
        with peftkern.use_backend("triton"):
            for other, value in expected.items():
                assert same_bits(peftkern.dequantize_nf4(on_gpu, other).cpu(), value)
                out = torch.empty(shape, dtype=other, device=CUDA)
                peftkern.dequantize_nf4(on_gpu, out=out)
                assert same_bits(out.cpu(), value)
    peftkern.reset_stats()  # the expected values are a CPU's


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "shape"),
    [*product(["lora_linear"], DENSE_SHAPES), *product(["nf4_lora_linear"], NF4_SHAPES)],
    ids=str,
)
def test_values_and_gradients(kind, shape, dtypes):
    cases = cases_of(kind)(shape, *dtypes, device=CUDA, bias=shape[0] != 5)
    with peftkern.use_backend("triton"):
        check_accuracy(cases, ours)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("rows", [0, 1, 8, 128, 300])
def test_nf4_linear_without_adapters(rows, dtype):
    w = peftkern.quantize_nf4(torch.randn(130, 192).to(dtype)).to(CUDA)
    bias = torch.randn(130, device=CUDA, dtype=dtype)

    def results(backend: str, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        torch.manual_seed(rows)
        x = torch.randn(rows, 192, device=CUDA).to(dtype).to(wide).requires_grad_()
        with peftkern.use_backend(backend):
            y = peftkern.nf4_linear(x, w, bias.to(wide))
            y.backward(torch.ones_like(y))
        return y.detach(), x.grad

    runs = (results("triton", dtype), results("reference", dtype), results("reference", F64))
    assert_as_accurate_as_torch(*runs)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (F16, F16)])
def test_dropout_from_a_seed(dtypes, dropout_p):
    for shape in ((21, 33, 77, 3), (21, 33, 77, 65), (600, 256, 512, 16)):
        check_ops_against_reference(dense_cases(shape, *dtypes, device=CUDA), dropout_p)
    for shape in ((21, 12, 64, 3), (300, 256, 512, 65)):
        check_ops_against_reference(nf4_cases(shape, *dtypes, device=CUDA), dropout_p)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapters", [F32, BF16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("r", [8, 16, 64])
@pytest.mark.parametrize("M", [17, 200, 700, 4300])
def test_what_training_runs(M, r, dropout_p, adapters, kind):
    """Tiles of every size: the largest are for more rows than 32 for each processor."""
    check_ops_against_reference(
        cases_of(kind)((M, 512, 1024, r), BF16, adapters, device=CUDA), dropout_p
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "misaligned", "3-d"])
def test_layouts_give_the_same(kind, layout):
    o = draw(kind, (6, 20, 64, 4), BF16, F32)
    changed = {k: layouts(getattr(o, k).cpu())[layout] for k in ("x", "dy")}
    if layout == "misaligned":  # a copy to the device would be aligned
        changed = {k: torch.cat((v.new_zeros(1), v.reshape(-1))) for k, v in changed.items()}
        changed = {k: v.to(CUDA)[1:].view_as(getattr(o, k)) for k, v in changed.items()}
    elif layout == "sliced":
        changed = {k: v.repeat_interleave(2, -1).to(CUDA)[..., ::2] for k, v in changed.items()}
    else:
        changed = {k: v.to(CUDA) for k, v in changed.items()}
    with peftkern.use_backend("triton"):
        wanted, got = run_ops(o), run_ops(replace(o, **changed))
    for name, value in wanted.items():  # cuBLAS may take another algorithm for another alignment
        torch.testing.assert_close(got[name].reshape(value.shape), value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B", "dy", "bias"])
def test_nan_and_inf_propagate(kind, name, value):
    for M, dtype in ((20, BF16), (300, F32)):
        o = draw(kind, (M, 20, 64, 4), dtype, F32)
        getattr(o, name).view(-1)[3] = value
        check_finite(o)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch_and_stride_0(kind):
    o = draw(kind, (1, 20, 64, 4), BF16, F32)
    with peftkern.use_backend("triton"):
        empty = run_ops(replace(o, x=o.x[:0], dy=o.dy[:0]), draw_seed(CUDA))
        assert empty["y"].shape == (0, 20) and empty["dx"].shape == (0, 64)
        assert all((empty[name] == 0).all() for name in ("dA", "dB", "dbias"))
        dense = run_ops(replace(o, x=o.x.repeat(5, 1), dy=o.dy.repeat(5, 1)))
        expanded = run_ops(replace(o, x=o.x.expand(5, 64), dy=o.dy.expand(5, 20)))
    assert all(torch.equal(dense[name], expanded[name]) for name in dense)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("M", [8, 600])
def test_equal_bits_every_time(kind, M):
    o = replace(draw(kind, (M, 1024, 2048, 16), BF16, F32), dropout_p=0.1)
    keep = draw_seed(CUDA)
    with peftkern.use_backend("triton"):
        assert_same_every_time(lambda: run_ops(o, keep).values())


# Streams, graphs, devices


@pytest.mark.parametrize("kind", KINDS)
def test_other_stream(kind):
    o = draw(kind, (64, 512, 512, 16), BF16, F32)
    wanted = run_ops(o)
    x, dy = torch.zeros_like(o.x), torch.zeros_like(o.dy)
    got = on_a_busy_stream(lambda: run_ops(replace(o, x=x, dy=dy)), [x, dy], [o.x, o.dy])
    torch.testing.assert_close(got, wanted)


def step(o: Operands, x: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Output and gradients of one call, without .grad: what a graph can record."""
    y = ours(o, x, *leaves, None)
    return y, *torch.autograd.grad(y, (x, *leaves), o.dy)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("M", [8, 300])
def test_graph_replays_what_eager_computes(kind, M):
    o = draw(kind, (M, 256, 512, 16), BF16, F32)
    x = o.x.clone().requires_grad_()
    leaves = [o.lora_A.requires_grad_(), o.lora_B.requires_grad_()]
    graph, results = capture(lambda: step(o, x, leaves))
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(results, step(o, x, leaves))


@pytest.mark.parametrize("kind", KINDS)
def test_graph_draws_a_new_mask_at_each_replay(kind):
    o = replace(draw(kind, (8, 256, 512, 16), BF16, F32), dropout_p=0.5)
    x = o.x.clone().requires_grad_()
    leaves = [o.lora_A.requires_grad_(), o.lora_B.requires_grad_()]
    graph, results = capture(lambda: step(o, x, leaves))
    outputs = []
    for _ in range(3):
        graph.replay()
        outputs.append(results[0].clone())
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])
    assert all(torch.isfinite(result).all() for result in results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("kind", KINDS)
def test_device_that_is_not_current(kind):
    o = draw(kind, (8, 256, 512, 16), BF16, F32)
    wanted = run_ops(o)
    moved = {k: v.to("cuda:1") for k, v in vars(o).items() if isinstance(v, (Tensor, NF4Weight))}
    assert torch.cuda.current_device() == 0
    got = run_ops(replace(o, **moved))
    assert torch.cuda.current_device() == 0
    for name in wanted:
        assert got[name].device == torch.device("cuda:1")
        torch.testing.assert_close(got[name].to("cuda:0"), wanted[name])


# What torch asks of an op


def layer_on_gpu(kind: str, **options: Any) -> Layer:
    layer = Layer(kind, **options).to(CUDA)
    layer.w = layer.w.to(CUDA)
    return layer


def to_cuda(args: tuple) -> tuple:
    """Operands on the GPU, in lists, too; a mask becomes the seed that stands for one there."""

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(element) for element in value]
        if not isinstance(value, Tensor):
            return value
        return draw_seed(CUDA) if value.dtype is torch.bool else value.to(CUDA)

    return tuple(moved(value) for value in args)


@pytest.mark.parametrize("op", sorted(ops.SCHEMAS))
def test_opcheck(op):
    for args in op_cases()[op]:
        torch.library.opcheck(getattr(ops, op), to_cuda(args))
    peftkern.reset_stats()  # op_cases quantises on a CPU


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile_fullgraph(kind, mode):
    layer = layer_on_gpu(kind)
    peftkern.reset_stats()  # the layer was quantised on a CPU
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for _ in range(4):  # reduce-overhead warms up, records, then replays
        x = torch.randn(5, layer.weight.shape[1], device=CUDA)
        wanted = run(layer, x)
        torch.compiler.cudagraph_mark_step_begin()
        got = [t.clone() for t in run(compiled, x)]
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_replays_dropout(kind, reentrant):
    layer = layer_on_gpu(kind, dropout_p=0.4)
    peftkern.reset_stats()
    x = torch.randn(5, layer.weight.shape[1], device=CUDA)
    for got, wanted in zip(run(Checkpointed(layer, reentrant), x), run(layer, x), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_obeys_the_block_around_forward(kind):
    o = draw(kind, (40, 20, 64, 4), BF16, F32)  # more rows than CUDA C++ is preferred for
    x = o.x.clone().requires_grad_()
    peftkern.reset_stats()
    with peftkern.use_backend("reference"):
        y = ours(o, x, o.lora_A, o.lora_B, None)
    y.sum().backward()
    assert {backend for _, backend in peftkern.stats().calls} == {"reference"}
    peftkern.reset_stats()
    ours(o, x, o.lora_A, o.lora_B, None).sum().backward()
    assert {backend for _, backend in peftkern.stats().calls} == {"triton"}
    assert peftkern.stats().fallbacks == {}


@pytest.mark.parametrize(
    ("kind", "M", "dropout_p"),
    [
        ("lora_linear", 512, 0.0),
        ("lora_linear", 8192, 0.1),
        ("nf4_lora_linear", 8, 0.1),
        ("nf4_lora_linear", 4096, 0.0),
    ],
)
def test_few_launches_forward(kind, M, dropout_p):
    o = replace(draw(kind, (M, 4096, 4096, 16), BF16, F32), dropout_p=dropout_p)
    with torch.no_grad():
        names = launches(lambda: ours(o, o.x, o.lora_A, o.lora_B, None))
    assert 0 < len(names) <= LAUNCHES_MOST, names


# PEFT


@pytest.mark.parametrize(
    "draw_proj", [bf16_linear, partial(linear4bit, True), partial(linear4bit, False)]
)
def test_patched_peft_model(draw_proj):
    proj = draw_proj()
    op = "lora_linear" if type(proj) is nn.Linear else "nf4_lora_linear"
    assert_patched_is_the_same(proj, {f"{op}_forward", f"{op}_backward"})


# Sizes


def test_more_than_2_to_31_values():
    """Dequantised (bf16: 4.3 GB) and quantised; the last blocks are those of a small weight."""
    blocksize, tail = 64, 64 * 256 * 3 + 64
    numel = 2**31 + 64 * 256 + tail
    generator = torch.Generator(CUDA).manual_seed(1)
    packed = torch.randint(
        0, 256, (numel // 2,), dtype=torch.uint8, device=CUDA, generator=generator
    )
    blocks = numel // blocksize
    q = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=CUDA, generator=generator)
    nested = torch.rand(-(-blocks // 256), device=CUDA, generator=generator)
    code, offset = torch.tensor(dynamic_map(), device=CUDA), torch.tensor(0.125, device=CUDA)
    w = NF4Weight(packed, q, (numel,), blocksize, BF16, nested, code, offset, 256)
    first = numel - tail  # a whole number of nested blocks
    small = NF4Weight(
        packed[first // 2 :],
        q[first // blocksize :],
        (tail,),
        blocksize,
        BF16,
        nested[first // blocksize // 256 :],
        code,
        offset,
        256,
    )
    with peftkern.use_backend("triton"):
        dense = peftkern.dequantize_nf4(w)
        got = ops.nf4_quantize(dense, blocksize)
    with peftkern.use_backend("reference"):
        assert same_bits(dense[first:], peftkern.dequantize_nf4(small))
        wanted = ops.nf4_quantize(dense[first:], blocksize)
    assert torch.equal(got[0][first // 2 :], wanted[0])
    assert same_bits(got[1][first // blocksize :], wanted[1])


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_wanted_is_computed(kind):
    o = draw(kind, (64, 256, 512, 16), BF16, F32)
    with peftkern.use_backend("triton"):
        check_subsets(o, [tuple(i == wanted for i in range(4)) for wanted in range(4)])
