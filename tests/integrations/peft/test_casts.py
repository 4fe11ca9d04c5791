"""Layers that read the same input in float32 cast it once, and nothing else differs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from adalora_models import quantize_4bit_
from peft import PeftModel, prepare_model_for_kbit_training
from peft_models import TARGETS, add_lora, fallbacks, fill_adapters, text_batch, tiny_llama
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import peftkern
from peftkern.integrations.peft import casts, trial
from peftkern.integrations.peft.casts import cast as cast_for

BF16 = torch.bfloat16
_readers: list[object] = []  # all alive, so that each has an id of its own


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast for a layer that comes for the first time."""
    if torch.compiler.is_compiling():
        return cast_for(x, dtype, None)
    _readers.append(object())
    return cast_for(x, dtype, _readers[-1])


@pytest.fixture(autouse=True)
def share_small_inputs(monkeypatch) -> None:
    monkeypatch.setattr(casts, "GRADIENT_MINIMUM", 0)
    monkeypatch.setattr(casts, "_last", None)


def qlora(checkpointing: dict | None = None, **config: object) -> PeftModel:
    base = quantize_4bit_(tiny_llama(), compute_dtype=BF16)
    how = {"use_gradient_checkpointing": checkpointing is not None}
    base = prepare_model_for_kbit_training(base, **how, gradient_checkpointing_kwargs=checkpointing)
    model = add_lora(base, **config)
    fill_adapters(model)
    peftkern.patch(model)
    peftkern.reset_stats()
    return model.train()


def step(model: PeftModel, autocast: bool) -> list[Tensor]:
    """Loss and gradients of a step."""
    torch.manual_seed(3)
    model.zero_grad()
    with torch.autocast("cpu", BF16, enabled=autocast):
        loss = model(**text_batch()).loss
    loss.backward()
    return [loss.detach(), *[p.grad.clone() for p in model.parameters() if p.requires_grad]]


def count_casts(run: Callable[[], object]) -> int:
    """How many of the casts of a model's layers are not of the tensor before."""
    made = 0

    def counted(x: Tensor, dtype: torch.dtype, reader: object, *, copy: bool = False) -> Tensor:
        nonlocal made
        before = casts._last
        result = cast_for(x, dtype, reader, copy=copy)
        made += not copy and casts._last is not before
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(casts, "cast", counted)
        run()
    return made


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": True}, {"use_reentrant": False}])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_is_bit_identical(checkpointing, autocast, dropout, monkeypatch):
    model = qlora(checkpointing, lora_dropout=dropout)
    runs = 2 if checkpointing else 1
    made = count_casts(lambda: step(model, autocast))
    # In two blocks: q, k and v, gate and up, down, and o, which autocast gives bfloat16 anyway.
    assert made == runs * 2 * (3 if autocast else 4)
    got = step(model, autocast)
    assert fallbacks() == {}
    monkeypatch.setattr(casts, "cast", lambda x, dtype, reader, copy=False: x.to(dtype, copy=copy))
    expected = step(model, autocast)
    assert len(got) == 1 + 2 * 2 * len(TARGETS)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_autograd_keeps_one_copy_for_layers_that_read_the_same_input(monkeypatch):
    model, batch = qlora(), text_batch()
    counts = []
    for shared in (True, False):
        if not shared:
            monkeypatch.setattr(
                casts, "cast", lambda x, dtype, reader, copy=False: x.to(dtype, copy=copy)
            )
        kept: dict[int, Tensor] = {}

        def pack(t: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            if t.dtype is BF16 and t.shape == (*batch["input_ids"].shape, 64):
                kept[data_of(t)] = t
            return t

        with (
            torch.autocast("cpu", BF16),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        ):
            model(**batch)
        counts.append(len(kept))
    assert counts[1] - counts[0] == 2 * 3  # of k, v and up in two blocks


def test_generate_casts_once(monkeypatch):
    model = qlora().eval()
    prompt = text_batch(rows=2, length=6)["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    tokens = []
    assert count_casts(lambda: tokens.append(model.generate(prompt, **options))) == 4 * 2 * 4
    monkeypatch.setattr(casts, "cast", lambda x, dtype, reader, copy=False: x.to(dtype, copy=copy))
    assert torch.equal(tokens[0], model.generate(prompt, **options))


def data_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def test_gradients_add_up_in_the_dtype_of_the_input():
    """0.5 + 2**-10 + 2**-10 is 0.5 in bfloat16."""
    x = torch.ones(4, requires_grad=True)
    parts = [cast(x, BF16) for _ in range(3)]
    assert len({data_of(part) for part in parts}) == 1
    torch.autograd.backward(parts, [torch.full((4,), g, dtype=BF16) for g in (0.5, 2e-3, 2e-3)])
    rounded = torch.tensor(2e-3, dtype=BF16).item()
    assert torch.equal(x.grad, torch.full((4,), 0.5 + rounded + rounded))
    assert x.grad[0] != (torch.tensor(0.5, dtype=BF16) + rounded + rounded)


def test_second_derivatives():
    x = torch.randn(5, requires_grad=True)
    results = []
    for convert in (cast, Tensor.to):
        y = sum(convert(x, BF16).pow(3) for _ in range(3)).sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        results += [(first, *torch.autograd.grad(first.square().sum(), x))]
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("graph", [True, False])
def test_what_makes_another_cast(graph):
    x = torch.randn(6)
    x = x.requires_grad_().clone() if graph else x
    first = cast(x, BF16)
    assert data_of(cast(x, BF16)) == data_of(first)
    with torch.no_grad():
        assert data_of(cast(x, BF16)) == data_of(first)
        assert not cast(x, BF16).requires_grad
        half = cast(x, torch.float16)
        assert torch.equal(half, x.half())
        first = cast(x, BF16)
        x.mul_(3)
        assert torch.equal(cast(x, BF16), x.bfloat16()) and data_of(cast(x, BF16)) != data_of(first)
        last = cast(x, BF16)
        same = x.view_as(x)  # another tensor
        assert data_of(cast(same, BF16)) != data_of(last)
    assert cast(x, torch.float32) is x


def test_the_data_goes_with_the_input():
    x = torch.randn(6)
    data = weakref.ref(cast(x, BF16).untyped_storage())
    assert casts._last is not None
    del x
    gc.collect()
    assert casts._last is None and data() is None
    x, y = torch.randn(6), torch.randn(6)
    first = cast(x, BF16)
    held = weakref.ref(first)
    cast(y, BF16)
    del first
    assert held() is None and casts._last.key[0] == id(y)


def test_small_inputs_with_a_gradient_are_cast_each(monkeypatch):
    """An autograd function in Python takes longer."""
    monkeypatch.setattr(casts, "GRADIENT_MINIMUM", 7)
    for size, shares in ((6, False), (7, True)):
        x = torch.randn(size, requires_grad=True)
        assert (data_of(cast(x, BF16)) == data_of(cast(x, BF16))) is shares
        with torch.no_grad():
            assert data_of(cast(x, BF16)) == data_of(cast(x, BF16))


def test_nothing_is_shared_in_inference_mode():
    x = torch.randn(6)
    with torch.inference_mode():
        cast(x, BF16)
        inside = torch.randn(6)
        assert data_of(cast(inside, BF16)) != data_of(cast(inside, BF16))
    assert casts._last is None and not cast(x, BF16).is_inference()
    assert torch.equal(cast(inside, BF16), inside.bfloat16())


def test_nothing_is_shared_in_a_trial(monkeypatch):
    """It would time a layer that casts nothing."""
    seen = []
    monkeypatch.setattr(
        casts, "cast", lambda x, dtype, reader: seen.append(x) or cast_for(x, dtype, reader)
    )
    layer, x = next(m for m in qlora().modules() if hasattr(m, "lora_A")), torch.randn(3, 64)
    trial._ours(layer, x)
    assert len(seen) == 1 and casts._last is None
    layer(x)
    assert len(seen) == 2 and casts._last is not None


def test_nothing_is_shared_with_a_trace():
    x = torch.randn(6)
    held = cast(x, BF16)
    graph = make_fx(lambda t: (cast(t, BF16), cast(t, BF16)))(x)
    assert sum("_to_copy" in str(node.target) for node in graph.graph.nodes) == 2
    assert data_of(casts._last.data) == data_of(held)
    compiled = torch.compile(lambda t: cast(t, BF16) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), x.bfloat16() * 2)


def test_threads_cast_what_they_are_given():
    inputs = [torch.full((64,), float(i)) for i in range(8)]

    def run(i: int) -> bool:
        return all(bool((cast(inputs[(i + j) % 8], BF16) == (i + j) % 8).all()) for j in range(200))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(8)))


@pytest.mark.parametrize("write", ["data", "numpy"])
def test_a_layer_that_comes_again_casts_again(write: str) -> None:
    """What writes past autograd's versions does so between two calls of one layer."""
    layer, sibling = object(), object()
    x = torch.zeros(4, 8)
    for value in range(1, 4):
        if write == "data":
            x.data.fill_(value)
        else:
            x.numpy().fill(value)
        for reader in (layer, sibling):
            assert (cast_for(x, BF16, reader) == value).all()
