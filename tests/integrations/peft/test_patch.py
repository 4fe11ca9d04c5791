"""patch, unpatch and their report: which layers are swapped, and that nothing else changes."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import pickle
import sys
from types import SimpleNamespace

import pytest
import torch
from call_counts import calls_of
from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model
from peft.tuners import lora
from peft.tuners.lora.tp_layer import LoraParallelLinear
from peft_models import (
    TARGETS,
    K,
    Net,
    add_lora,
    fill_adapters,
    layer_of,
    lora_net,
    make_linear,
    make_linear4bit,
    served_by_us,
    tiny_llama,
)
from processes import run_code, run_python_over, without
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftkern
from peftkern.backends import trust
from peftkern.backends.cpu import crossovers
from peftkern.backends.cpu import module as native
from peftkern.backends.cpu.module import cpu_isa
from peftkern.integrations.peft import serve

# Python and C functions, before every forward pass of a layer; where it is too small for a kernel
CALLS_OF_THE_CHECKS, CALLS_OF_SMALL_LAYERS = 60, 14


def test_patch_names_every_lora_layer():
    model = add_lora(tiny_llama())
    report = peftkern.patch(model)
    expected = [n for n, m in model.named_modules() if isinstance(m, lora.Linear)]
    assert report.patched == expected and len(expected) == 2 * len(TARGETS)
    assert report.skipped == {} and report.falling_back == {}
    assert str(report).startswith("14 patched (lora.Linear 14), 0 skipped; ")


@pytest.mark.parametrize("make", [make_linear, make_linear4bit])
@pytest.mark.parametrize("inner", ["", "base_model", "base_model.model", "base_model.model.proj"])
def test_patch_takes_any_module_that_holds_layers(inner, make):
    model = lora_net(make())
    kind = type(layer_of(model))
    report = peftkern.patch(model.get_submodule(inner))
    assert [f"{inner}.{name}".strip(".") for name in report.patched] == ["base_model.model.proj"]
    said = f"1 patched (lora.{kind.__name__} 1), 0 skipped; on cpu: C++ ({cpu_isa()})"
    assert str(report) == said and type(layer_of(model)) is not kind


def test_patch_changes_forward_alone():
    model = lora_net(make_linear(), lora_dropout=0.1)
    layer = layer_of(model)
    before, keys = dict(layer.__dict__), list(model.state_dict())
    peftkern.patch(model)
    assert layer.__dict__ == before
    assert list(model.state_dict()) == keys
    kind = type(layer)
    assert issubclass(kind, lora.Linear)
    own = kind.__mro__[: kind.__mro__.index(lora.Linear)]
    overridden = {n for base in own for n in vars(base) if hasattr(lora.Linear, n)}
    assert {n for n in overridden if not n.startswith("__")} - {"_abc_impl"} == {
        "forward",
        "merge",  # PEFT's, but for NF4Linear
        "unmerge",
    }


@pytest.mark.parametrize("make", [make_linear, make_linear4bit])
def test_repr_reads_as_before_and_unpatch_restores_exactly(make):
    model = lora_net(make(), lora_dropout=0.1)
    layer, said = layer_of(model), repr(model)
    kinds, before = [type(m) for m in model.modules()], dict(layer.__dict__)
    peftkern.patch(model)
    assert repr(model) == said and "Patched" not in said
    assert peftkern.unpatch(model) == ["base_model.model.proj"]
    assert [type(m) for m in model.modules()] == kinds and layer.__dict__ == before
    assert peftkern.unpatch(model) == []
    peftkern.reset_stats()
    model(torch.randn(2, K))
    assert served_by_us() == 0


def test_patch_is_idempotent():
    model = lora_net(make_linear())
    first = peftkern.patch(model)
    kind = type(layer_of(model))
    second = peftkern.patch(model)
    assert second == first and type(layer_of(model)) is kind
    peftkern.unpatch(model)
    assert type(layer_of(model)) is lora.Linear


@pytest.mark.parametrize("function", [peftkern.patch, peftkern.unpatch])
@pytest.mark.parametrize("wrong", [None, "model", {}, nn.Linear])
def test_a_non_module_is_a_type_error(function, wrong):
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got \w+"):
        function(wrong)


def test_nothing_to_patch_is_a_report():
    report = peftkern.patch(nn.Sequential(nn.Linear(4, 4)))
    assert report.patched == [] and report.skipped == {}
    assert str(report) == "0 patched: the model has no PEFT adapter layers"


def test_other_layers_are_skipped_with_a_reason():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, K)
            self.conv = nn.Conv1d(K, K, 3, padding=1)
            self.attention = nn.MultiheadAttention(K, 4, batch_first=True)
            self.head = nn.Linear(K, 8)

        def forward(self, ids):
            h = self.conv(self.table(ids).transpose(1, 2)).transpose(1, 2)
            return self.head(self.attention(h, h, h)[0])

    targets = ["table", "conv", "attention", "head"]
    model = get_peft_model(Mixed(), LoraConfig(target_modules=targets))
    fill_adapters(model)
    ids = torch.randint(10, (2, 5))
    expected = model(ids)
    report = peftkern.patch(model)
    prefix = "base_model.model."
    # PEFT wraps the output projection of an attention too, reads its weights and never calls it.
    inside = prefix + "attention.base_layer.out_proj"
    assert report.patched == [inside, prefix + "head"]
    assert report.falling_back == {inside: "base_layer is NonDynamicallyQuantizableLinear"}
    assert report.skipped == {
        prefix + "table": "lora.Embedding has no kernel",
        prefix + "conv": "lora.Conv1d has no kernel",
        prefix + "attention": "lora.MultiheadAttention has no kernel",
    }
    assert str(report).startswith("2 patched (lora.Linear 2), 3 skipped: lora.")
    torch.testing.assert_close(model(ids), expected)


def test_other_tuners_are_skipped():
    config = IA3Config(target_modules=["proj"], feedforward_modules=[])
    report = peftkern.patch(get_peft_model(Net(make_linear()), config))
    assert report.patched == []
    assert list(report.skipped.values()) == ["ia3.Linear has no kernel"]


def test_parallel_layers_of_megatron_are_left_to_peft(monkeypatch):
    """PEFT tells them by the classes of megatron-core, for which others stand here."""

    class RowParallelLinear(nn.Linear):
        input_is_parallel = True

        def __init__(self, input_size, output_size, bias, **options):
            super().__init__(input_size, output_size, bias)
            self.input_size, self.output_size = input_size, output_size

    parallel = SimpleNamespace(RowParallelLinear=RowParallelLinear, ColumnParallelLinear=type(None))
    core = SimpleNamespace(tensor_parallel=parallel)
    monkeypatch.setitem(sys.modules, "megatron.core", core)
    how = {"megatron_config": SimpleNamespace(), "init_lora_weights": False}
    config = LoraConfig(target_modules=["proj"], **how)
    base = RowParallelLinear(K, K, bias=False)
    with pytest.raises(KeyError, match="fan_in_fan_out"):  # PEFT 0.21.2
        get_peft_model(Net(base), config)
    how = {"backend": parallel, "r": 4, "megatron_config": config.megatron_config}
    layer = LoraParallelLinear(base, "default", config, **how)
    report = peftkern.patch(Net(layer))
    assert (report.patched, report.skipped) == (
        [],
        {"proj": "lora.LoraParallelLinear has no kernel"},
    )


def test_layers_that_are_not_pefts_own_are_skipped():
    class Mine(lora.Linear):
        pass

    replaced, derived = (layer_of(lora_net(make_linear())) for _ in range(2))
    replaced.forward = functools.partial(lora.Linear.forward, replaced)
    derived.__class__ = Mine
    for layer, why in ((replaced, "forward is replaced"), (derived, "Mine has no kernel")):
        kind = type(layer)
        report = peftkern.patch(layer)
        assert report.patched == [] and why in str(report) and type(layer) is kind


def test_layers_whose_class_has_another_forward_are_skipped(monkeypatch):
    model = lora_net(make_linear())
    x, own = torch.randn(2, K), lora.Linear.forward
    monkeypatch.setattr(lora.Linear, "forward", lambda self, x: own(self, x) * 2)
    expected = model(x)
    report = peftkern.patch(model)
    assert report.patched == [] and "forward is replaced on the class" in str(report)
    assert torch.equal(model(x), expected)


def test_report_tells_what_falls_back_now_and_is_json():
    model = add_lora(tiny_llama(), alora_invocation_tokens=[1])
    model.base_model.model.extra = get_peft_model(
        Net(make_linear()), VeraConfig(target_modules=["proj"])
    )
    report = peftkern.patch(model)
    assert len(report.patched) == 14
    assert set(report.falling_back.values()) == {"lora_variant ALoraLinearVariant"}
    told = "; 14 of the patched fall back for now: lora_variant ALoraLinearVariant 14"
    assert told in str(report)
    read = json.loads(json.dumps(report.as_dict()))
    assert list(read) == [field.name for field in dataclasses.fields(report)]
    assert read == report.as_dict()
    assert read["kinds"] == {"lora.Linear": 14} and len(read["falling_back"]) == 14
    assert list(read["skipped"].values()) == ["vera.Linear has no kernel"]


def test_report_names_the_back_end():
    model = lora_net(make_linear())
    assert peftkern.patch(model).backends == {"cpu": f"C++ ({cpu_isa()})"}
    with peftkern.use_backend("reference"):
        assert peftkern.patch(model).backends == {"cpu": "reference, as asked for"}


def test_report_tells_of_unmeasured_classes(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path))
    model = add_lora(tiny_llama())
    assert peftkern.patch(model).unmeasured == 0  # every test runs under "always"
    trust.reset()
    with trust.use_mode("auto"):
        report = peftkern.patch(model)
        # q and o, k and v, gate and up, down
        assert report.unmeasured == report.as_dict()["unmeasured"] == 4
        said = (
            "; 4 classes unmeasured: their own forward serves until each was tried (twice called)"
        )
        assert said in str(report)
        ledger = trust.ledger(torch.device("cpu"))
        verdict = {"side": trust.PEER, "why": "slower"}
        ledger.decide("lora_linear/LoRA 64x64 r=4 float32 rows<16", verdict)
        assert peftkern.patch(model).unmeasured == 3
        with trust.use_mode("off"):
            assert "; 3 classes unmeasured: their own forward serves; on cpu" in str(
                peftkern.patch(model)
            )
        with peftkern.use_backend("cpu"):
            assert peftkern.patch(model).unmeasured == 0
    trust.reset()


def test_report_tells_of_small_dense_layers(monkeypatch):
    monkeypatch.setattr(crossovers, "crossover", crossovers.COUNTED.get)
    report = peftkern.patch(add_lora(tiny_llama()))
    q_proj = next(name for name in report.small if name.endswith("q_proj"))
    assert len(report.small) == 14 and report.small[q_proj] == (1 << 19) // (64 + 64)
    assert "; 14 are small dense layers: kernels pay from 5,462 rows" in str(report)
    report = peftkern.patch(lora_net(make_linear(), use_dora=True))
    assert list(report.small.values()) == [0] and "kernels pay in none of them" in str(report)


def test_report_without_the_native_library(monkeypatch):
    monkeypatch.setattr(native, "cpu_module", lambda: (None, "the native library is not usable"))
    with pytest.warns(UserWarning, match="plain PyTorch serves: the native library is not usable"):
        report = peftkern.patch(lora_net(make_linear()))
    assert "WARNING: plain PyTorch" in str(report)


def test_layers_that_bitsandbytes_serves_are_not_reported_as_ours():
    net = nn.Sequential(make_linear4bit(), make_linear4bit())
    net[0].weight.quant_state.code = net[0].weight.quant_state.code.flip(0)
    net[1].weight.quant_state.code = net[1].weight.quant_state.code.half()
    report = peftkern.patch(net)
    assert report.without_adapter == [] and "served" not in str(report)
    x, expected = torch.randn(3, K), copy.deepcopy(net[0])
    peftkern.unpatch(expected)
    peftkern.reset_stats()
    assert torch.equal(net[0](x), expected(x)) and served_by_us() == 0


def test_layers_without_an_adapter_are_served():
    net = nn.Sequential(make_linear4bit(), nn.ReLU(inplace=True), nn.Linear(96, 64))
    report = peftkern.patch(net)
    assert report.patched == [] and report.without_adapter == ["0"]
    assert "0 patched: the model has no PEFT adapter layers; 1 4-bit layer" in str(report)
    x = torch.randn(3, K)
    peftkern.reset_stats()
    with torch.no_grad():
        got = net.eval()(x)
    assert served_by_us() == 1
    assert not net[0].weight.quant_state.__dict__.get("packing_format_for_cpu")
    peftkern.unpatch(net)
    torch.testing.assert_close(got, net.train()(x))
    assert served_by_us() == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("make", [make_linear, make_linear4bit])
def test_patched_model_is_copied(make, copied):
    model = lora_net(make())
    peftkern.patch(model)
    x = torch.randn(3, K)
    expected = model(x)
    peftkern.reset_stats()
    twin = copied(model)
    assert type(layer_of(twin)) is type(layer_of(model))
    assert torch.equal(twin(x), expected) and served_by_us() == 1
    with torch.no_grad():
        layer_of(twin).lora_B["default"].weight.zero_()
    assert torch.equal(model(x), expected)


class Computed(TorchDispatchMode):
    """Names of the operations that gave a tensor and no view of what they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.names.append(str(func))
        return result


@pytest.mark.parametrize("four_bit", [False, True])
def test_patch_computes_and_copies_nothing(four_bit):
    model = lora_net(make_linear4bit() if four_bit else make_linear())
    with Computed() as computed:
        report = peftkern.patch(model)
        peftkern.unpatch(model)
    assert len(report.patched) == 1 and computed.names == []


def test_checks_per_call_are_cheap():
    """What patch adds to a call before any arithmetic: it looks at the layer and its weight."""
    model = lora_net(make_linear4bit(), lora_dropout=0.1)
    peftkern.patch(model)
    layer = layer_of(model)
    names, x = serve.active_names(layer), torch.randn(3, K)
    layer(x)  # of bitsandbytes' weight a record is kept
    called = calls_of(serve.active_names, layer)
    called += calls_of(serve.read_state, layer, names, x.device)
    called += calls_of(serve.read_base, layer.get_base_layer(), x, False)
    assert len(called) <= CALLS_OF_THE_CHECKS, called


@pytest.mark.parametrize("given", [None, [1.0], 3])
def test_what_is_no_tensor_is_refused_as_peft_refuses_it(given):
    model, told = lora_net(make_linear()), []
    for patch in (lambda model: None, peftkern.patch):
        patch(model)
        with pytest.raises(TypeError) as caught:
            layer_of(model)(given)
        told.append(str(caught.value))
    assert told[0] == told[1]


@pytest.mark.parametrize("training", [True, False])
def test_layers_that_are_left_to_peft_cost_few_calls(training, monkeypatch):
    """Each is a microsecond: after PEFT's own operations nothing of ours is in the caches."""
    monkeypatch.setattr(crossovers, "crossover", lambda name: 1 << 40)
    model = lora_net(make_linear(), lora_dropout=0.1).train(training)
    layer, x = layer_of(model), torch.randn(1, K)
    with torch.set_grad_enabled(training):
        theirs = calls_of(layer, x)
        peftkern.patch(model)
        peftkern.reset_stats()
        layer(x)  # the first of a reason is logged
        ours = calls_of(layer, x)
    assert len(ours) - len(theirs) <= CALLS_OF_SMALL_LAYERS, ours
    (why,) = peftkern.stats().fallbacks
    assert why == ("lora_linear", "small dense product: PEFT's own operations are as fast")


WITHOUT_NATIVE_MODULES = """
import sys
for name in ("peftkern._cpu", "peftkern._cuda", "fcntl"):
    sys.modules[name] = None
import pytest, torch, peftkern
from peft_models import *
take_small_layers()
for make in (make_linear, make_linear4bit):
    model = lora_net(make(), lora_dropout=0.1)
    with pytest.warns(UserWarning, match="plain PyTorch serves: the native library"):
        twin = patched_copy(model)
    results = []
    for net in (twin, model):
        torch.manual_seed(0)
        x = torch.ones(3, K, requires_grad=True)
        y = net(x)
        y.square().sum().backward()
        results.append([y, x.grad, *[p.grad for p in net.parameters() if p.grad is not None]])
    torch.testing.assert_close(*results)
    assert served_by_us() and fallbacks() == {}
assert {backend for _, backend in peftkern.stats().calls} <= {"torch", "reference"}
print("served")
"""


@pytest.mark.slow
def test_without_native_modules_torch_serves():
    """As on Windows and macOS."""
    assert "served" in run_code(WITHOUT_NATIVE_MODULES)


@pytest.mark.slow
def test_patch_works_without_bitsandbytes(tmp_path):
    code = (
        "import torch, peftkern, importlib.util\n"
        "from peft import LoraConfig, get_peft_model\n"
        "assert importlib.util.find_spec('bitsandbytes') is None\n"
        "net = torch.nn.Sequential(torch.nn.Linear(512, 512))\n"
        "model = get_peft_model(net, LoraConfig(target_modules=['0']))\n"
        "print(peftkern.patch(model)); model(torch.randn(600, 512)); print(peftkern.stats())\n"
    )
    done = run_python_over(without(tmp_path / "site", "bitsandbytes"), "-c", code)
    assert done.returncode == 0, done.stderr
    assert "1 patched (lora.Linear 1), 0 skipped" in done.stdout
    assert "lora_linear_forward" in done.stdout
