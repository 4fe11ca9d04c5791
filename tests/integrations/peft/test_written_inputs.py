"""`h += layer(h)` runs where PEFT runs it, on the gradients of `h = h + layer(h)`."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable

import own_layers
import pytest
import torch
from call_counts import calls_of
from expert_models import expert_net, inputs
from peft import AdaLoraConfig, get_peft_model
from peft_models import (
    K,
    Net,
    fallbacks,
    fill_adapters,
    layer_of,
    lora_net,
    make_linear,
    make_linear4bit,
    served_by_us,
)
from peft_oracle import dora_net
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.integrations.peft import written_inputs

BF16 = torch.bfloat16
WRITTEN = "the input is copied, for the model writes to it"
pytestmark = pytest.mark.usefixtures("small_layers")


def adalora_net() -> nn.Module:
    settings = {"target_modules": ["proj"], "total_step": 9, "init_r": 4, "lora_dropout": 0.1}
    model = get_peft_model(Net(make_linear()), AdaLoraConfig(**settings))
    fill_adapters(model)
    return model


def experts_net() -> nn.Module:
    model, (_, index, weights) = expert_net(), inputs(3)
    fill_adapters(model)
    model.register_forward_pre_hook(lambda _, given: (*given, index, weights))
    return model


CASES = {
    "dropout": lambda: lora_net(make_linear(), lora_dropout=0.1),
    "4 bits": lambda: lora_net(make_linear4bit(), lora_dropout=0.1),
    "cast": lambda: lora_net(make_linear(BF16)),
    "cast over 4 bits": lambda: lora_net(make_linear4bit(BF16)),
    "DoRA": lambda: dora_net(make_linear(), lora_dropout=0.1),
    "AdaLoRA": adalora_net,
    "experts": experts_net,
}


def made(case: str) -> nn.Module:
    return CASES[case]().train()


def patched(case: str) -> nn.Module:
    model = made(case)
    peftkern.patch(model)
    peftkern.reset_stats()
    return model


def source_of(model: nn.Module) -> Tensor:
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    torch.manual_seed(1)
    width = frozen[0].shape[-1] if frozen[0].dim() == 3 else K  # of experts
    return torch.randn(3, width, dtype=frozen[0].dtype, requires_grad=True)


def step(
    model: nn.Module,
    written: bool | list[bool] = True,
    reentrant: bool | None = None,
) -> list[Tensor]:
    """Gradients of a step that calls the layer once for each of `written`."""
    model.zero_grad()
    source = source_of(model)
    writes = written if isinstance(written, list) else [written]

    def forward(x: Tensor) -> Tensor:
        total = x.sum() * 0
        for scale, write in enumerate(writes, 2):
            h = x * scale
            total = total + model(h).float().square().sum()
            h = h.mul_(3) if write else h * 3
            total = total + h.float().square().sum()
        return total

    torch.manual_seed(2)
    if reentrant is None:
        forward(source).backward()
    else:
        checkpoint(forward, source, use_reentrant=reentrant).backward()
    return [source.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def counted() -> int:
    return sum(n for (_, why), n in peftkern.stats().fallbacks.items() if why == WRITTEN)


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("case", CASES)
def test_written_inputs_have_the_gradients_of_others(case: str, reentrant: bool | None) -> None:
    expected = step(patched(case), False, reentrant)
    step(made(case), True, reentrant)  # PEFT runs it
    model = patched(case)
    assert_same(step(model, True, reentrant), expected)
    assert counted() == 0
    for _ in range(2):
        assert_same(step(model, True, reentrant), expected)
    assert counted() == (4 if reentrant is False else 2)
    assert "h = h + layer(h)" in str(peftkern.stats())


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("written", [[True, False], [False, True]])
def test_one_written_input_of_several(written: list[bool], reentrant: bool | None) -> None:
    model = patched("dropout")
    expected = step(patched("dropout"), [False, False], reentrant)
    for _ in range(3):
        assert_same(step(model, written, reentrant), expected)
    assert counted() == (8 if reentrant is False else 4)


def saves_itself(model: nn.Module, h: Tensor) -> bool:
    """Whether what a call saves for backward has the memory of its input."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(h)
    return any(torch._C._is_alias_of(tensor, h) for tensor in saved)


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("case", CASES)
def test_copies_end_with_the_first_step_that_writes_to_none(
    case: str, reentrant: bool | None
) -> None:
    model = patched(case)
    for _ in range(2):  # before a backward pass nothing is known
        assert not saves_itself(model, source_of(model) * 2)
    first, second = (step(model, False, reentrant) for _ in range(2))
    assert_same(second, first)
    assert saves_itself(model, source_of(model) * 2)
    assert not fallbacks()


@pytest.mark.parametrize("case", ["cast", "experts"])
def test_a_copy_is_all_that_is_held(case: str) -> None:
    model = patched(case)
    h = source_of(model) * 2
    memory = weakref.ref(h.untyped_storage())
    y = model(h)
    del h
    assert memory() is None
    y.sum().backward()


def test_what_peft_does_not_copy_is_not_copied() -> None:
    model = lora_net(make_linear()).train()
    peftkern.patch(model)
    assert saves_itself(model, source_of(model) * 2)
    for net in (model, lora_net(make_linear()).train()):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            step(net)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_under_autocast(dtype: torch.dtype) -> None:
    """Which casts another input itself: of that both sides save the cast."""
    results = []
    for written in (False, True):
        model = lora_net(make_linear(dtype)).train()
        peftkern.patch(model)
        peftkern.reset_stats()
        with torch.autocast("cpu", BF16):
            results.append([step(model, written) for _ in range(2)])
        assert counted() == (written and dtype is BF16)
    for got, expected in zip(*results, strict=True):
        assert_same(got, expected)


@pytest.mark.usefixtures("own_layers_registered")
def test_layers_that_were_registered() -> None:
    results = []
    for written in (False, True):
        model = Net(own_layers.layer(dropout=0.1)).train()
        peftkern.patch(model)
        peftkern.reset_stats()
        results.append([step(model, written) for _ in range(2)])
        assert counted() == written and served_by_us() == 2
    for got, expected in zip(*results, strict=True):
        assert_same(got, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_nothing_of_it_stands_on_a_layer(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = patched("dropout")
    before, keys = dict(layer_of(model).__dict__), list(model.state_dict())
    expected = step(model)
    step(model)
    assert layer_of(model).__dict__ == before and list(model.state_dict()) == keys
    assert counted() == 1
    twin = copied(model)
    assert_same(step(twin), expected)
    assert counted() == 1  # it learns by itself
    peftkern.unpatch(model)
    step(model)
    peftkern.patch(model)
    assert_same(step(model), expected)
    assert counted() == 2


def test_what_is_known_goes_with_the_layer() -> None:
    known = len(written_inputs._layers)
    model = patched("dropout")
    step(model)
    assert len(written_inputs._layers) == known + 1
    del model
    assert len(written_inputs._layers) == known


def test_a_graph_has_no_copies() -> None:
    model = lora_net(make_linear(BF16)).train()
    peftkern.patch(model)

    def run(x: Tensor, write: bool) -> Tensor:
        h = x * 2
        y = model(h)
        h = h.mul_(3) if write else h * 3
        return y.float().square().sum() + h.float().square().sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    results = []
    for write in (False, True):
        model.zero_grad()
        x = source_of(model)
        compiled(x, write).backward()
        results.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert_same(*results)
    assert layer_of(model) not in written_inputs._layers


@pytest.mark.usefixtures("own_trust")
def test_trials_learn_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their inputs are copies that nobody writes to."""
    monkeypatch.setattr("peftkern.backends.contest.SLOWER", 1e9)
    model = patched("dropout")
    for _ in range(6):
        step(model)
        with torch.no_grad():  # an optimizer's step
            for p in model.parameters():
                p.add_(0)
    assert served_by_us() > 2 and counted() > 0


def test_calls_that_save_nothing_pay_nothing() -> None:
    model = patched("dropout")
    step(model, False)
    x = source_of(model).detach()
    with torch.no_grad():
        called = calls_of(model, x)
    assert not {"answered", "only_ours_saves"} & set(called)
    called = calls_of(model, x)
    assert called.count("answered") == called.count("cast") == 1  # a copy is another cast
