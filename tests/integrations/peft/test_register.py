"""register_layer: layers of other frameworks, and of subclasses, are served as PEFT's are."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from own_layers import LoRALinear, Over, layer, read, results
from peft.tuners import lora
from peft_models import (
    K,
    N,
    fallbacks,
    layer_of,
    lora_net,
    make_conv1d,
    make_linear,
    make_linear4bit,
    served_by_us,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.backends import contest, trust
from peftkern.integrations.peft import own_layers
from peftkern.layers import NF4Linear

BF16 = torch.bfloat16


pytestmark = pytest.mark.usefixtures("own_layers_registered")


def pair(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A module and a patched copy of it."""
    twin = copy.deepcopy(module)
    report = peftkern.patch(twin)
    assert report.skipped == {} and report.falling_back == {}, str(report)
    return module, twin


def assert_same(module: nn.Module, twin: nn.Module, x: Tensor | None = None, **tolerance) -> None:
    x = torch.randn(5, K) if x is None else x
    expected = results(module, module, x)
    peftkern.reset_stats()
    got = results(twin, twin, x)
    assert len(got) == 4 and served_by_us() == 1 and fallbacks() == {}
    torch.testing.assert_close(got, expected, **tolerance)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("training", [False, True])
def test_a_layer_like_torchtune_s_is_served(use_bias, dropout, training):
    module, twin = pair(layer(use_bias=use_bias, dropout=dropout).train(training))
    assert_same(module, twin)
    assert_same(module, twin, torch.randn(2, 3, K))


def test_the_report_names_it():
    model = nn.Sequential(layer(), nn.ReLU())
    report = peftkern.patch(model, strict=True)
    assert report.patched == ["0"] and peftkern.is_patched(model)
    assert str(report).startswith("1 patched (own_layers.LoRALinear 1), 0 skipped; on cpu: ")


def test_zero_at_the_start_and_trained():
    """lora_b is zero in a new layer: what is checked are gradients."""
    module, twin = pair(layer(filled=False))
    for _ in range(3):
        for one in (module, twin):
            loss = one(torch.ones(4, K)).square().sum()
            loss.backward()
            with torch.no_grad():
                for p in one.parameters():
                    if p.grad is not None:
                        p -= 1e-3 * p.grad
            one.zero_grad()
    torch.testing.assert_close(twin.state_dict(), module.state_dict())
    assert twin.lora_b.weight.any()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_autocast(dtype):
    module, twin = pair(layer(dtype))
    x = torch.randn(3, K).to(dtype)
    peftkern.reset_stats()
    with torch.autocast("cpu", BF16):
        got, expected = (results(one, one, x) for one in (twin, module))
    assert served_by_us() == 1
    assert [t.dtype for t in got] == [t.dtype for t in expected]
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).norm() <= 2**-5 * theirs.norm()


def test_16_bit():
    module, twin = pair(layer(BF16))
    got, expected = (results(one, one, torch.ones(3, K, dtype=BF16)) for one in (twin, module))
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype is BF16 and (ours - theirs).norm() <= 2**-5 * theirs.norm()
    peftkern.reset_stats()
    twin(torch.ones(1, K, dtype=BF16))
    with pytest.raises(RuntimeError):  # the layer's own error
        twin(torch.ones(1, K))
    assert served_by_us() == 1
    assert fallbacks() == {"input is torch.float32, base weight is torch.bfloat16": 1}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    module, twin = pair(layer(dropout=0.3).train())

    def call(one: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: checkpoint(one, x, use_reentrant=use_reentrant)

    x = torch.randn(5, K)
    peftkern.reset_stats()
    torch.testing.assert_close(results(twin, call(twin), x), results(module, call(module), x))
    assert served_by_us() == 2


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compile_fullgraph(dropout):
    module, twin = pair(layer(dropout=dropout).train())
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    with torch.no_grad():
        x = torch.randn(3, K)
        torch.manual_seed(0)
        got = compiled(x)
        torch.manual_seed(0)
        torch.testing.assert_close(got, module(x))
        assert "lora_linear_forward" in graphs[0]
        twin.disabled = module.disabled = True
        torch.testing.assert_close(compiled(x), module(x))
        assert "lora_linear_forward" not in graphs[1]
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    twin.disabled = module.disabled = False
    torch.testing.assert_close(results(twin, compiled, x), results(module, module, x))


def test_state_dict_unpatch_and_repr():
    model = nn.Sequential(layer(dropout=0.1))
    said, keys = repr(model), list(model.state_dict())
    kinds, before = [type(m) for m in model.modules()], dict(vars(model[0]))
    peftkern.patch(model)
    assert repr(model) == said and list(model.state_dict()) == keys
    assert vars(model[0]) == before and isinstance(model[0], LoRALinear)
    model.load_state_dict(layer(dropout=0.1).state_dict(), strict=False)
    assert peftkern.unpatch(model) == ["0"]
    assert [type(m) for m in model.modules()] == kinds and vars(model[0]) == before
    with peftkern.patched(model):
        assert type(model[0]) is not LoRALinear
    assert type(model[0]) is LoRALinear


def test_a_pickled_layer_needs_nothing_to_be_loaded_and_a_copy_is_patched():
    _, twin = pair(layer())
    x = torch.randn(2, K)
    data, expected = pickle.dumps(twin), twin(x)
    for other in (copy.deepcopy(twin), pickle.loads(data)):
        peftkern.reset_stats()
        assert type(other) is type(twin) and torch.equal(other(x), expected)
        assert served_by_us() == 1
    del own_layers.SWAPS[LoRALinear]
    other = pickle.loads(data)
    assert type(other) is LoRALinear
    torch.testing.assert_close(other(x), expected)


def test_what_the_layer_says_it_is_goes_to_its_own_forward():
    module, twin = pair(layer())
    twin.disabled = module.disabled = True
    peftkern.reset_stats()
    x = torch.randn(2, K)
    assert torch.equal(twin(x), module(x)) and fallbacks() == {"adapters are disabled": 1}
    assert peftkern.patch(twin).falling_back == {"": "adapters are disabled"}


UNUSUAL = {
    "hooks on Linear": lambda one: one.lora_a.register_forward_hook(lambda *args: None),
    "base weight is trained": lambda one: one.weight.requires_grad_(),
    "lora_dropout is Dropout(p=0.5, inplace=True)": lambda one: setattr(
        one, "dropout", nn.Dropout(0.5, inplace=True).eval()
    ),
}


@pytest.mark.parametrize("reason", UNUSUAL)
def test_unusual_states_go_to_its_own_forward(reason):
    module, twin = pair(layer(dropout=0.5).eval())
    for one in (module, twin):
        UNUSUAL[reason](one)
    peftkern.reset_stats()
    x = torch.randn(2, K)
    assert torch.equal(twin(x.clone()), module(x.clone())) and fallbacks() == {reason: 1}


def test_input_by_name_and_more_of_it_go_to_its_own_forward():
    class Two(LoRALinear):
        def forward(self, inputs: Tensor, twice: bool | None = None) -> Tensor:
            y = super().forward(inputs)
            return 2 * y if twice else y

    peftkern.register_layer(Two, read)
    one = Two(K, N)
    expected = copy.deepcopy(one)
    assert peftkern.patch(one).patched == [""]
    x = torch.randn(2, K)
    peftkern.reset_stats()
    assert torch.equal(one(inputs=x), expected(x))
    assert torch.equal(one(x, twice=True), expected(x, twice=True))
    assert torch.equal(one(x, True), expected(x, True))
    assert fallbacks() == {
        "input is given by its name": 1,
        "extra arguments: twice": 1,
        "extra arguments: positional": 1,
    }
    one(x, twice=None)
    assert served_by_us() == 1


BASES = [make_linear, make_conv1d, make_linear4bit, lambda: NF4Linear.from_linear(make_linear())]


@pytest.mark.parametrize("make", BASES)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_a_base_that_is_a_layer(make, p):
    module, twin = pair(Over(make(), K, N, p=p).train())
    assert_same(module, twin)
    op = "lora_linear" if make in BASES[:2] else "nf4_lora_linear"
    assert {name for name, _ in peftkern.stats().calls} >= {f"{op}_forward", f"{op}_backward"}
    module.off = twin.off = True  # the base alone: a kernel where it is NF4
    x = torch.randn(3, K)
    peftkern.reset_stats()
    torch.testing.assert_close(twin(x), module(x))
    assert fallbacks() == ({"no active adapter": 1} if make in BASES[:2] else {})


def test_subclasses_are_others():
    class Mine(LoRALinear):
        pass

    (said,) = peftkern.patch(Mine(K, N)).skipped.values()
    assert said == "test_register.Mine has no kernel" or said.endswith(".Mine has no kernel")


class MyLinear(lora.Linear):
    """A company's own, with PEFT's forward."""

    def merge(self, *args, **kwargs):
        self.merges = getattr(self, "merges", 0) + 1
        return super().merge(*args, **kwargs)


def my_net(make=make_linear, **config) -> nn.Module:
    model = lora_net(make(), **config)
    layer_of(model).__class__ = MyLinear
    return model


@pytest.mark.parametrize("config", [{}, {"lora_dropout": 0.2}, {"use_dora": True}])
def test_a_subclass_of_peft_s_is_served_by_peft_s_path(config):
    peftkern.register_layer(MyLinear)
    model = my_net(**config)
    twin = copy.deepcopy(model)
    report = peftkern.patch(twin, strict=True)
    assert report.patched == ["base_model.model.proj"] and isinstance(layer_of(twin), MyLinear)
    assert repr(twin) == repr(model)
    x = torch.randn(4, K)
    peftkern.reset_stats()
    torch.testing.assert_close(results(twin, twin, x), results(model, model, x))
    assert fallbacks() == {} and sum(peftkern.stats().calls.values()) > 1
    twin.merge_adapter()
    assert layer_of(twin).merges == 1
    twin.unmerge_adapter()
    copied = pickle.loads(pickle.dumps(twin))
    assert type(layer_of(copied)) is type(layer_of(twin))
    peftkern.unpatch(twin)
    assert type(layer_of(twin)) is MyLinear


def test_a_subclass_that_is_not_registered_is_skipped():
    (said,) = peftkern.patch(my_net()).skipped.values()
    assert said.endswith(".MyLinear has no kernel")


class Doubled(lora.Linear):
    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return 2 * super().forward(x, *args, **kwargs)


class Elsewhere(lora.Linear):
    @property
    def active_adapters(self) -> list[str]:
        return []


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Doubled, "Doubled has a forward of its own, not that of PEFT's Linear"),
        (Elsewhere, "Elsewhere has a active_adapters of its own"),
        (LoRALinear, "LoRALinear is no subclass of peft.tuners.lora.layer.Linear"),
    ],
)
def test_a_class_that_needs_a_function_is_told_so(cls, why):
    with pytest.raises(ValueError, match=f"read: expected a function, for {why}"):
        peftkern.register_layer(cls)


def test_a_subclass_with_a_forward_of_its_own_is_served_by_its_parts():
    def of(layer: Doubled) -> peftkern.LoRAParts:
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        drop = layer.lora_dropout["default"]
        return peftkern.LoRAParts(layer.base_layer, A, B, layer.scaling["default"], drop)

    peftkern.register_layer(Doubled, of)
    model = lora_net(make_linear())
    layer_of(model).__class__ = Doubled
    (said,) = peftkern.patch(model).skipped.values()
    assert "differs from the parts that read gives" in said


@pytest.mark.parametrize("wrong", [None, "LoRALinear", int, nn.Linear(1, 1)])
def test_what_is_no_class_of_modules_is_a_type_error(wrong):
    with pytest.raises(TypeError, match=r"cls: expected a subclass of torch\.nn\.Module, got"):
        peftkern.register_layer(wrong, read)


def test_what_is_served_already_or_cannot_be_called():
    peftkern.patch(one := layer())
    for cls in (lora.Linear, lora.ParamWrapper, type(one)):
        with pytest.raises(ValueError, match="is served already"):
            peftkern.register_layer(cls, read)
    with pytest.raises(TypeError, match="read: expected a callable, got a str"):
        peftkern.register_layer(LoRALinear, "weight")


def test_a_class_registered_again_gets_the_new_function():
    one = layer()
    peftkern.patch(one)
    peftkern.register_layer(LoRALinear, lambda layer: "not now")
    assert peftkern.patch(one).falling_back == {"": "not now"}
    peftkern.unpatch(one)
    assert type(one) is LoRALinear


@pytest.mark.usefixtures("own_trust")
def test_trust_is_earned(monkeypatch):
    monkeypatch.setattr(contest, "SLOWER", float("inf"))
    module, twin = pair(layer())
    assert peftkern.patch(twin).unmeasured == 1
    peftkern.reset_stats()
    optimizers = [torch.optim.SGD(one.parameters(), lr=1e-3) for one in (module, twin)]
    for _ in range(4):
        x = torch.randn(200, K)
        for one, optimizer in zip((module, twin), optimizers, strict=True):
            optimizer.zero_grad()
            one(x).square().mean().backward()
            optimizer.step()
    assert peftkern.patch(twin).unmeasured == 0
    names = list(trust.ledger(torch.device("cpu")).classes)
    assert len(names) == 1 and "LoRA in LoRALinear 96x64 r=4" in names[0]
    peftkern.reset_stats()
    twin(x)
    assert served_by_us() == 1
    torch.testing.assert_close(twin.state_dict(), module.state_dict())
