"""What users do with a PEFT model works on a patched one as it does on an unpatched one."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_models import (
    K,
    N,
    Net,
    add_lora,
    fallbacks,
    fill_adapters,
    layer_of,
    lora_net,
    make_conv1d,
    make_linear,
    make_linear4bit,
    patched_copy,
    served_by_us,
    text_batch,
    tiny_llama,
)
from peft_oracle import dora_net, norms_computed
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import peftkern
from peftkern.integrations.peft.lora import PatchedLinear
from peftkern.layers import NF4Linear

pytestmark = pytest.mark.usefixtures("form_the_product_again")
Make = Callable[[], nn.Module]
MAKERS = [make_linear, make_linear4bit]
NETS = [lora_net, dora_net]
every_make = pytest.mark.parametrize("make", MAKERS)
every_net = pytest.mark.parametrize("net_of", NETS)


def served() -> int:
    """Calls of a layer that our ops served; DoRA has one norm in each."""
    return norms_computed() or served_by_us()


def assert_same_model(got: nn.Module, expected: nn.Module, x: Tensor | None = None) -> None:
    """The same keys, the same bits in them, and outputs that agree."""
    ours, theirs = got.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for name in theirs:
        assert ours[name].dtype is theirs[name].dtype and torch.equal(ours[name], theirs[name]), (
            name
        )
    x = torch.randn(3, K) if x is None else x
    # An input with a gradient keeps bitsandbytes from its bfloat16 inference path.
    x = x.clone().requires_grad_()
    torch.testing.assert_close(got(x), expected(x))


def pair(make: Make, net_of: Callable[..., PeftModel] = lora_net, **config: object) -> tuple:
    model = net_of(make(), **config)
    return model, patched_copy(model)


def save_other_adapter(
    directory: Path, make: Make, net_of: Callable[..., PeftModel] = lora_net, **config: object
) -> str:
    other = net_of(make(), seed=8, **config)
    fill_adapters(other, seed=9)
    other.save_pretrained(directory)
    return str(directory)


@every_net
@every_make
def test_save_pretrained_writes_the_same_files(make, net_of, tmp_path):
    model, twin = pair(make, net_of, lora_bias=net_of is lora_net)
    model.save_pretrained(tmp_path / "peft")
    twin.save_pretrained(tmp_path / "patched")
    ours, theirs = (
        load_file(tmp_path / side / "adapter_model.safetensors") for side in ("patched", "peft")
    )
    assert list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)
    config = "adapter_config.json"
    assert (tmp_path / "patched" / config).read_text() == (tmp_path / "peft" / config).read_text()
    net = Net(make())
    net.is_loaded_in_4bit = make is make_linear4bit
    loaded = PeftModel.from_pretrained(net, tmp_path / "patched")
    x = torch.randn(2, K, requires_grad=True)
    expected = loaded(x)
    report = peftkern.patch(loaded)
    assert report.patched and report.falling_back == {}
    torch.testing.assert_close(loaded(x), expected)
    torch.testing.assert_close(loaded(x), twin(x))


@every_net
@every_make
def test_load_set_disable_and_delete_adapter(make, net_of, tmp_path):
    path = save_other_adapter(tmp_path, make, net_of, r=7, lora_alpha=3)
    model, twin = pair(make, net_of)
    for net in (model, twin):
        net.load_adapter(path, "other", is_trainable=True)
    assert_same_model(twin, model)
    x = torch.randn(3, K, requires_grad=True)
    outputs = {}
    for name in ("other", "default"):
        for net in (model, twin):
            net.set_adapter(name)
        peftkern.reset_stats()
        outputs[name] = twin(x)
        assert served() == 1
        torch.testing.assert_close(outputs[name], model(x))
        trained = [n for n, p in twin.named_parameters() if p.requires_grad]
        assert trained == [n for n, p in model.named_parameters() if p.requires_grad]
    with model.disable_adapter(), twin.disable_adapter():
        disabled = twin(x)
        torch.testing.assert_close(disabled, model(x))
    torch.testing.assert_close(twin(x), outputs["default"])
    for output in (outputs["other"], disabled):
        assert not torch.allclose(output, outputs["default"])
    for net in (model, twin):
        net.set_adapter("other")
        net.delete_adapter("default")
    assert_same_model(twin, model)


@pytest.mark.parametrize(
    ("make", "net_of"), [*itertools.product(MAKERS, NETS), (make_conv1d, lora_net)]
)
@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit", "ignore:Unmerge lora module")
def test_merge_and_unmerge(make, net_of):
    """DoRA's norm is of the weight as it is: that of PEFT's merge and unmerge through `.data`."""
    model, twin = pair(make, net_of, fan_in_fan_out=make is make_conv1d)
    x = torch.randn(2, K, requires_grad=True)
    before = twin(x)
    for net in (model, twin):
        net.merge_adapter()
    assert_same_model(twin, model)
    around = {"rtol": 1e-4, "atol": 1e-4}
    if make is not make_linear4bit:
        torch.testing.assert_close(twin(x), before, **around)
    for net in (model, twin):
        net.train().unmerge_adapter()
    if make is not make_linear4bit:  # PEFT alone does not come back to 4 bits
        assert_same_model(twin, model)
    peftkern.reset_stats()
    dense_dora = make is make_linear and net_of is dora_net
    torch.testing.assert_close(twin(x), before, **(around if dense_dora else {}))
    assert served() == 1


@pytest.mark.parametrize(
    ("how", "net_of"),
    [("merge_and_unload", lora_net), ("merge_and_unload", dora_net), ("unload", lora_net)],
)
@every_make
@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit")
def test_leaving_peft(make, how, net_of):
    model, twin = pair(make, net_of)
    got, expected = getattr(twin, how)(), getattr(model, how)()
    assert isinstance(got.proj, type(expected.proj)) and repr(got) == repr(expected)
    assert_same_model(got, expected)
    assert not any("lora" in name for name, _ in got.named_parameters())
    peftkern.unpatch(got)
    assert type(got.proj) is type(expected.proj)


@pytest.mark.parametrize("combination", ["cat", "linear", "svd"])
@every_make
def test_add_weighted_adapter(make, combination, tmp_path):
    path = save_other_adapter(tmp_path, make)
    model, twin = pair(make)
    for net in (model, twin):
        net.load_adapter(path, "other")
        torch.manual_seed(0)
        net.add_weighted_adapter(
            ["default", "other"], [0.7, -0.4], "mix", combination_type=combination
        )
        net.set_adapter("mix")
    peftkern.reset_stats()
    assert_same_model(twin, model)
    assert served_by_us() == 1


@every_make
@pytest.mark.parametrize("prepared", [False, True])
def test_hotswap(make, prepared, tmp_path):
    path = save_other_adapter(tmp_path, make, r=3 if prepared else 4, lora_alpha=9)
    model, twin = pair(make)
    x = torch.randn(3, K)
    for net in (model, twin):
        if prepared:
            prepare_model_for_compiled_hotswap(net, target_rank=8)
    before = twin(x)
    for net in (model, twin):
        hotswap_adapter(net, path, adapter_name="default", torch_device="cpu")
    assert isinstance(layer_of(twin).scaling["default"], Tensor if prepared else float)
    peftkern.reset_stats()
    assert_same_model(twin, model, x)
    assert served_by_us() == 1 and not torch.allclose(twin(x), before)


@every_make
def test_state_dict_round_trip(make):
    model, twin = pair(make)
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        layer_of(twin).lora_A["default"].weight.zero_()
    assert list(twin.state_dict()) == list(state)
    twin.load_state_dict({k: v for k, v in state.items() if "lora_" in k}, strict=False)
    assert_same_model(twin, model)


def test_casting_the_whole_model():
    model, twin = pair(make_linear)
    for dtype in (torch.bfloat16, torch.float32):
        for net in (model, twin):
            net.to(dtype)
        peftkern.reset_stats()
        x = torch.randn(3, K, dtype=dtype)
        torch.testing.assert_close(twin(x), model(x), rtol=2**-6, atol=2**-6)
        assert served_by_us() == 1


def test_a_new_adapter_with_new_targets_needs_another_patch():
    model = add_lora(tiny_llama(), target_modules=["q_proj"])
    assert len(peftkern.patch(model).patched) == 2
    model.add_adapter("wide", LoraConfig(target_modules=["q_proj", "v_proj"], r=3))
    assert sum(type(m) is PatchedLinear for m in model.modules()) == 2
    report = peftkern.patch(model)
    assert len(report.patched) == 4
    model.set_adapter("wide")
    peftkern.reset_stats()
    model(**text_batch())
    assert served_by_us() == 4


@pytest.mark.parametrize(
    ("make", "net_of", "dropout"),
    [
        *itertools.product(MAKERS, NETS, (0.0, 0.3)),
        *itertools.product([make_conv1d], [lora_net], (0.0, 0.3)),
    ],
)
def test_compile_fullgraph(make, net_of, dropout):
    model = net_of(make(), lora_dropout=dropout, fan_in_fan_out=make is make_conv1d)
    peftkern.patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(layer_of(model), fullgraph=True, backend="aot_eager")
    results = []
    for call in (layer_of(model), compiled):
        x = torch.ones(2, 3, K, requires_grad=True)
        torch.manual_seed(0)
        y = call(x)
        y.square().sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        results.append([y.detach(), x.grad, *gradients])
    assert len(results[0]) == (4 if net_of is lora_net else 5)
    torch.testing.assert_close(*results)


def code_of(graph: torch.fx.GraphModule) -> str:
    """The code of a graph and of those inside it: strict tracing nests an autograd function."""
    return "".join(m.code for m in graph.modules() if isinstance(m, torch.fx.GraphModule))


def test_compile_calls_the_op_and_sees_a_change_of_state():
    torch._dynamo.reset()  # what it has compiled for other layers counts against its limit
    model = lora_net(make_linear())
    peftkern.patch(model)
    graphs = []

    def backend(graph, inputs):
        graphs.append(code_of(graph))
        return graph

    compiled = torch.compile(layer_of(model), fullgraph=True, backend=backend)
    x = torch.randn(2, K)
    torch.testing.assert_close(compiled(x), model(x))
    assert "lora_linear_forward" in graphs[0]
    layer_of(model).enable_adapters(False)
    torch.testing.assert_close(compiled(x), model(x))
    assert "lora_linear_forward" not in graphs[1]
    layer_of(model).enable_adapters(True)
    layer_of(model).scaling["default"] = 7.0
    torch.testing.assert_close(compiled(x), model(x))


def graphs_of(model: nn.Module, calls: Callable[[Callable[[Tensor], Tensor]], None]) -> int:
    """Count the graphs of a layer that some calls compile."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    calls(torch.compile(layer_of(model), fullgraph=True, backend=counter))
    return counter.frame_count


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_schedule_of_scaling_compiles_as_often_as_in_peft(make, autocast):
    """The first other value makes a graph for all."""
    model, twin = pair(make)
    steps = {net: [] for net in (model, twin)}

    def calls(net, compiled):
        for scaling in (1.5, 0.5, -2.0, 3.0, 0.0):
            layer_of(net).scaling["default"] = scaling
            x = torch.randn(3, K, generator=torch.Generator().manual_seed(0)).requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                y = compiled(x)
            y.square().mean().backward()
            trained = [p for p in net.parameters() if p.requires_grad]
            steps[net] += [y.detach(), x.grad, *(p.grad.clone() for p in trained)]
            net.zero_grad()

    counts = [graphs_of(net, functools.partial(calls, net)) for net in (twin, model)]
    assert counts == [2, 2]
    bound = {"rtol": 0.02, "atol": 0.02} if autocast else {"rtol": 2e-5, "atol": 2e-6}
    torch.testing.assert_close(steps[twin], steps[model], **bound)


@pytest.mark.parametrize("make", MAKERS)
def test_modes_compile_as_often_as_in_peft(make):
    """Without dropout a graph of training serves in evaluation."""
    model, twin = pair(make)

    def calls(net, compiled):
        for training, gradients in itertools.product((True, False), repeat=2):
            net.train(training)
            with torch.set_grad_enabled(gradients):
                compiled(torch.randn(3, K))

    ours, theirs = (graphs_of(net, functools.partial(calls, net)) for net in (twin, model))
    assert ours == theirs


@pytest.mark.parametrize("make", MAKERS)
def test_tensors_without_memory_pass_through(make):
    """As estimators of memory send them through real weights; what was read stays real."""
    model, twin = pair(make)
    x = torch.randn(3, K, requires_grad=True)
    for net in (model, twin):
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = torch.empty(3, K, requires_grad=True)
            y = net(fake)
            y.sum().backward()
        assert (type(y), y.shape, fake.grad.shape) == (FakeTensor, (3, N), (3, K))
        net.zero_grad()
    torch.testing.assert_close(twin(x), model(x))


# bitsandbytes' Params4bit does not survive non-strict export, patched or not.
@pytest.mark.parametrize(
    ("make", "strict"), [(make_linear, True), (make_linear, False), (make_linear4bit, True)]
)
def test_export(make, strict):
    model = lora_net(make()).eval()
    peftkern.patch(model)
    layer = layer_of(model)
    x = torch.randn(2, K)
    rows = torch.export.Dim("rows", min=1)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},), strict=strict)
    assert "lora_linear_forward" in code_of(program.graph_module)
    for count in (2, 5):
        x = torch.randn(count, K)
        torch.testing.assert_close(program.module()(x), layer(x))


def test_generate_gives_the_same_tokens():
    model = add_lora(tiny_llama()).eval()
    fill_adapters(model)
    twin = patched_copy(model)
    prompt = text_batch(rows=2, length=6)["input_ids"]
    peftkern.reset_stats()
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    got = twin.generate(input_ids=prompt, **options)
    assert torch.equal(got, model.generate(input_ids=prompt, **options))
    assert served_by_us() == 12 * 14 and fallbacks() == {}


def test_quantize_then_peft_then_patch():
    """A QLoRA model without bitsandbytes: our NF4 layers under PEFT's adapters."""
    base = tiny_llama()
    names = peftkern.quantize_(base)
    assert len(names) == 14 and "lm_head" not in names
    model = add_lora(base)
    fill_adapters(model)
    twin = patched_copy(model)
    batch = text_batch()
    losses = [net(**batch).loss for net in (twin, model)]
    torch.testing.assert_close(*losses)
    peftkern.reset_stats()
    twin(**batch).loss.backward()
    assert served_by_us() == 14 and fallbacks() == {}
    with pytest.raises(RuntimeError):  # PEFT cannot add to bytes
        model.merge_and_unload()
    with pytest.warns(UserWarning, match="a weight was quantized to NF4 again"):
        merged = twin.merge_and_unload()
    assert sum(type(module) is NF4Linear for module in merged.modules()) == 14
    assert type(merged.lm_head) is nn.Linear


def test_lora_over_our_nf4linear_is_served_by_nf4():
    model = lora_net(NF4Linear.from_linear(make_linear()))
    peftkern.patch(model)
    peftkern.reset_stats()
    assert model(torch.randn(2, K)).shape == (2, N)
    assert [op for op, _ in peftkern.stats().calls] == ["nf4_lora_linear_forward"]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_a_merge_into_our_nf4linear_is_quantized_and_taken_back_exactly(config, double_quant):
    base = NF4Linear.from_linear(make_linear(torch.bfloat16), double_quant=double_quant)
    model = lora_net(base, **config)
    peftkern.patch(model)
    for name in ("other", "broken"):
        model.add_adapter(name, model.peft_config["default"])
    nn.init.constant_(layer_of(model).lora_B["broken"].weight, torch.nan)
    x = torch.randn(5, K, dtype=torch.bfloat16)
    expected, state = model(x), {k: v.clone() for k, v in base.state_dict().items()}
    with model.disable_adapter():
        frozen = model(x)
    with pytest.warns(UserWarning, match="quantized to NF4 again: what was added has norm"):
        model.merge_adapter()
    assert base.nf4.dtype is torch.bfloat16 and base.nf4.nested is double_quant
    assert (model(x) - expected).norm() < 0.5 * (frozen - expected).norm()
    with pytest.warns(UserWarning, match="quantized to NF4 again"):
        model.merge_adapter(adapter_names=["other"])
    with pytest.raises(ValueError, match="finite"):
        model.merge_adapter(adapter_names=["broken"])
    base.float().cpu().bfloat16()
    with pytest.warns(UserWarning, match="merged into 4-bit weights, which PEFT cannot undo"):
        peftkern.unpatch(model)
    peftkern.patch(model)
    model.unmerge_adapter()
    found = base.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert torch.equal(model(x), expected) and "frozen_weight" not in layer_of(model).__dict__


def test_a_merge_into_our_nf4linear_that_fails_changes_nothing():
    model = lora_net(NF4Linear.from_linear(make_linear()))
    peftkern.patch(model)
    layer = layer_of(model)
    before = layer.base_layer.weight
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = torch.nan
    for safely in (False, True):
        with pytest.raises(ValueError, match="NaN"):
            model.merge_adapter(safe_merge=safely)
    assert layer.base_layer.weight is before and not layer.merged
    assert type(layer.base_layer) is NF4Linear


def test_weights_of_our_nf4linear_that_came_while_merged_are_not_replaced():
    model = lora_net(NF4Linear.from_linear(make_linear()))
    peftkern.patch(model)
    layer = layer_of(model)
    other = NF4Linear.from_linear(make_linear())
    with pytest.warns(UserWarning, match="quantized to NF4 again"):
        model.merge_adapter()
    layer.base_layer.load_state_dict(other.state_dict())
    wanted = other.dequantize() - layer.get_delta_weight("default")
    with pytest.warns(UserWarning, match="quantized to NF4 again"):
        model.unmerge_adapter()
    wanted = peftkern.quantize_nf4(wanted.detach())
    assert torch.equal(layer.base_layer.weight.flatten(), wanted.packed)
