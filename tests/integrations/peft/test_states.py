"""A patched model through whatever a user does to it, beside the same model unpatched."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from adalora_models import quantize_4bit_
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft_models import (
    EXACTLY,
    K,
    N,
    add_lora,
    fill_adapters,
    lora_net,
    make_linear,
    make_linear4bit,
    served_by_us,
    text_batch,
    tiny_llama,
)
from torch import Tensor, nn

import peftkern
from peftkern.backends.programs import PLAIN
from peftkern.integrations.peft.fallback import PatchedForward

pytestmark = pytest.mark.filterwarnings("ignore")


class Pair(nn.Module):
    """Two layers, so that a mistake in one reaches the gradients of the other."""

    def __init__(self, make: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.up, self.act, self.down = make(), nn.ReLU(), nn.Linear(N, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


plain_absmax = functools.partial(make_linear4bit, double_quant=False)
adalora = functools.partial(AdaLoraConfig, init_r=4, total_step=50)
lora = functools.partial(LoraConfig, r=4)
MODELS = {  # the base, the layers with an adapter, and its config
    "dense": (make_linear, ["up", "down"], functools.partial(lora, lora_dropout=0.1)),
    "NF4": (make_linear4bit, ["up"], lora),
    "NF4, plain absmax": (plain_absmax, ["up", "down"], lora),
    "NF4 without an adapter": (make_linear4bit, ["down"], lora),
    "DoRA": (make_linear4bit, ["up"], functools.partial(lora, use_dora=True)),
    "AdaLoRA": (make_linear4bit, ["up", "down"], adalora),
}


def build(kind: str) -> PeftModel:
    make, targets, config = MODELS[kind]
    net = Pair(make)
    net.is_loaded_in_4bit = make is not make_linear
    torch.manual_seed(2)
    model = get_peft_model(net, config(target_modules=targets))
    fill_adapters(model)
    return model


def bases(model: nn.Module) -> list[bnb.nn.Linear4bit]:
    return [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]


def snapshot(model: nn.Module) -> list[dict[str, Tensor]]:
    """The bytes of every 4-bit weight, in all their parts."""
    return [
        {k: v.clone() for k, v in base.state_dict().items() if k.startswith("weight")}
        for base in bases(model)
    ]


class Tagged(Tensor):
    """A subclass that follows the results of torch's operations."""


class Life:
    """An unpatched model and its patched twin, to which the same is done."""

    def __init__(self, kind: str) -> None:
        self.model = build(kind)
        self.twin = copy.deepcopy(self.model)
        self.frozen = snapshot(self.model)
        self.before_merge: list[Any] | None = None
        self.pickled = False
        peftkern.patch(self.twin)

    @property
    def both(self) -> tuple[nn.Module, nn.Module]:
        return self.model, self.twin

    def compare(self, run: Callable[[nn.Module], Any]) -> None:
        """The same values, or the same kind of error."""
        results = []
        for model in self.both:
            for base in bases(model):  # while unpatched: bitsandbytes would repack it in eval mode
                base.__dict__["support_avx512bf16_for_cpu"] = False
            torch.manual_seed(9)
            try:
                results.append(run(model))
            except (RuntimeError, TypeError, NotImplementedError) as error:
                results.append(type(error))
        expected, got = results
        if isinstance(expected, type) or isinstance(got, type):
            assert got == expected
        else:
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)

    def check(self) -> None:
        if not self.merged:
            for before, now in zip(self.frozen, snapshot(self.twin), strict=True):
                assert list(before) == list(now)
                assert all(torch.equal(before[k], now[k]) for k in before)

    @property
    def merged(self) -> bool:
        return any(getattr(m, "merged", False) for m in self.twin.modules())

    @property
    def patched(self) -> bool:
        return any(isinstance(m, PatchedForward) for m in self.twin.modules())

    @property
    def adalora(self) -> bool:
        return isinstance(self.model.peft_config["default"], AdaLoraConfig)

    @property
    def dora(self) -> bool:
        return getattr(self.model.peft_config["default"], "use_dora", False)

    @property
    def hooked(self) -> bool:
        return any("forward" in m.__dict__ for m in self.model.modules())

    # What users do.

    def step(self) -> None:
        def run(model: nn.Module) -> list[Tensor]:
            model.train()
            x = sample().requires_grad_()
            y = model(x)
            y.square().mean().backward()
            return [y.detach(), x.grad]

        self.compare(run)
        for model, twin in zip(self.model.parameters(), self.twin.parameters(), strict=True):
            if model.grad is not None and twin.grad is not None:
                with torch.no_grad():  # both by the same gradient: errors are not to add up
                    model -= 0.01 * model.grad
                    twin.copy_(model)
            model.grad = twin.grad = None

    def evaluate(self) -> None:
        with torch.no_grad():
            self.compare(lambda model: model.eval()(sample()))

    def infer(self) -> None:
        with torch.inference_mode():
            self.compare(lambda model: model.eval()(sample()).clone())

    def disable(self) -> None:
        def run(model: PeftModel) -> Tensor:
            with model.disable_adapter():
                return model(sample())

        if not self.merged:
            self.compare(run)

    def train_input_of_inference(self) -> None:
        with torch.inference_mode():
            x = sample()
        self.compare(lambda model: model.train()(x).detach())

    def merge(self) -> None:
        if self.merged or self.adalora or not self.patched or self.pickled:
            return  # PEFT alone gives no frozen weight back, and merges into no pickled one
        self.before_merge = [
            (base.weight, copy.deepcopy(base.weight), base.bias.data.clone())
            for base in bases(self.model)
        ]
        for model in self.both:
            model.merge_adapter()

    def merge_in_inference_mode(self) -> None:
        if self.dora:
            return  # PEFT cannot unmerge it
        with torch.inference_mode():
            self.merge()

    def unmerge(self) -> None:
        if not self.merged:
            return
        for model in self.both:
            model.unmerge_adapter()
        for base, (_, weight, bias) in zip(bases(self.model), self.before_merge, strict=True):
            base.weight, base.quant_state = weight, weight.quant_state  # PEFT's own is not exact
            base.bias.data = bias

    def save(self) -> None:
        for model in self.both:
            buffer = io.BytesIO()
            torch.save(model.state_dict(), buffer)
        assert list(self.model.state_dict()) == list(self.twin.state_dict())

    def deepcopy(self) -> None:
        self.model, self.twin = copy.deepcopy(self.both)

    def unpickle(self) -> None:
        if self.hooked or self.merged or self.dora:  # of which PEFT alone makes nothing any more
            return
        self.model, self.twin = (pickle.loads(pickle.dumps(model)) for model in self.both)
        self.pickled = True

    def offload(self) -> None:
        for model in self.both:
            model.to("cpu")

    def patch(self) -> None:
        report = peftkern.patch(self.twin)
        assert not set(report.patched) & set(report.skipped)

    def unpatch(self) -> None:
        if not self.merged:  # PEFT alone would not give the frozen weight back
            peftkern.unpatch(self.twin)

    def hook(self, base: bool = False) -> None:
        for model in self.both:
            layer = model.base_model.model.up
            if base and hasattr(layer, "get_base_layer"):
                layer = layer.get_base_layer()
            add_hook_to_module(layer, AlignDevicesHook(io_same_device=True))

    def hook_base(self) -> None:
        self.hook(base=True)

    def unhook(self) -> None:
        for model in self.both:
            for module in model.modules():
                remove_hook_from_module(module)

    def call_in_threads(self) -> None:
        def run(model: nn.Module) -> Tensor:
            model.eval()  # dropout's masks come from one generator
            with ThreadPoolExecutor(4) as pool:
                results = list(pool.map(lambda x: model(x).detach(), [sample()] * 4))
            assert all(torch.equal(y, results[0]) for y in results)
            return results[0]

        self.compare(run)

    def trace(self) -> None:
        def run(model: nn.Module) -> Tensor:
            model.eval()
            with torch.no_grad():
                traced = torch.jit.trace(model, sample(), check_trace=False)
                return traced(sample())

        self.compare(run)

    def feed_subclass(self) -> None:
        def run(model: nn.Module) -> Tensor:
            y = model.train()(sample().as_subclass(Tagged))
            assert type(y) is Tagged
            return y.detach().as_subclass(Tensor)

        self.compare(run)

    def feed_sparse(self) -> None:
        for layout in (Tensor.to_sparse, Tensor.to_sparse_csr):
            self.compare(lambda model, layout=layout: model.train()(layout(sample())).detach())

    def feed_nested(self) -> None:
        def run(model: nn.Module) -> Tensor:
            nested = torch.nested.nested_tensor(list(sample().split([2, 3])))
            return torch.cat([y.detach() for y in model.train()(nested).unbind()])

        self.compare(run)

    def feed_wrong_shape(self) -> None:
        self.compare(lambda model: model.train()(torch.randn(2, K + 1)))


def sample() -> Tensor:
    return torch.randn(5, K, generator=torch.Generator().manual_seed(1))


ACTIONS = sorted(
    name
    for name, action in vars(Life).items()
    if callable(action) and name not in ("__init__", "compare", "check")  # properties are not
)


@pytest.mark.parametrize("kind", sorted(MODELS))
@settings(
    max_examples=settings.default.max_examples // 15, suppress_health_check=[HealthCheck.too_slow]
)
@given(actions=st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=8))
def test_any_sequence(kind: str, actions: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        life = Life(kind)
        for name in actions:
            getattr(life, name)()
        life.unhook()
        life.unmerge()
        life.patch()
        for last in (life.step, life.evaluate, life.disable, life.check):
            last()


@pytest.mark.parametrize(
    ("dtype", "bias"), [(torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)]
)
@pytest.mark.parametrize("make", [make_linear, make_linear4bit])
@pytest.mark.parametrize("backend", ["cpu", *PLAIN, "triton"])
def test_policy_equals_reference(make, dtype, bias, backend) -> None:
    """With lora_B = 0 a model with its adapters and one without them agree bit for bit."""
    model = lora_net(make(dtype, bias=bias), adapter_dtype=torch.float32)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(p)
    peftkern.patch(model)
    for rows in ((1,), (40,)) if backend == "triton" else ((1,), (5,), (2, 3), (40,)):
        x = torch.randn(*rows, K, dtype=dtype)
        for training in (True, False):
            model.train(training)
            with peftkern.use_backend(backend), torch.no_grad():
                policy = model(x)
                with model.disable_adapter():
                    reference = model(x)
                assert torch.equal(policy, reference)
                model.merge_adapter()
                merged = model(x)
                model.unmerge_adapter()
                if make is make_linear:
                    assert torch.equal(policy, merged)
    assert served_by_us() > 0


@pytest.mark.parametrize("make", [make_linear, make_linear4bit])
def test_policy_equals_reference_in_a_whole_model(make) -> None:
    """As DPO has it: training mode, eval mode, and after them a step."""
    base = tiny_llama(torch.bfloat16)
    if make is make_linear4bit:
        quantize_4bit_(base, compute_dtype=torch.bfloat16)
    model = add_lora(base)
    peftkern.patch(model)
    frozen = snapshot(model)
    batch = text_batch()
    for training in (True, False, True):
        model.train(training)
        with torch.no_grad():
            policy = model(**batch).logits
            with model.disable_adapter():
                reference = model(**batch).logits
        torch.testing.assert_close(policy, reference, **EXACTLY)
    model(**batch).loss.backward()
    for before, now in zip(frozen, snapshot(model), strict=True):
        assert all(torch.equal(before[k], now[k]) for k in before)


def test_unmerge_puts_the_frozen_weight_back() -> None:
    """PEFT quantizes anew when it merges, and once more when it takes the adapter out."""
    model = lora_net(make_linear4bit())
    peftkern.patch(model)
    frozen = snapshot(model)
    bias = bases(model)[0].bias.data.clone()
    for copies in range(3):
        model.merge_adapter()
        assert not torch.equal(snapshot(model)[0]["weight"], frozen[0]["weight"])
        if copies == 1:
            model = copy.deepcopy(model)
        if copies == 2:
            with model.disable_adapter():  # unmerges
                model(sample())
        else:
            model.unmerge_adapter()
        now = snapshot(model)
        assert all(torch.equal(frozen[0][k], now[0][k]) for k in frozen[0])
        assert torch.equal(bases(model)[0].bias.data, bias)
        assert bases(model)[0].weight.bnb_quantized
    assert not any("frozen" in key for key in model.state_dict())


def test_threads_that_unmerge() -> None:
    """Of a merged and disabled model the first call takes the adapters out."""
    model = lora_net(make_linear4bit())
    peftkern.patch(model)
    frozen = snapshot(model)
    x = sample()
    with model.disable_adapter():
        expected = model(x)
    for _ in range(20):
        model.merge_adapter()
        with model.disable_adapter(), ThreadPoolExecutor(4) as pool:
            results = list(pool.map(model, [x] * 4))
        assert all(torch.equal(y, expected) for y in results)
        assert all(torch.equal(frozen[0][k], snapshot(model)[0][k]) for k in frozen[0])


def test_dora_leaves_nothing_behind() -> None:
    model = lora_net(make_linear4bit(), use_dora=True)
    peftkern.patch(model)
    layer = model.base_model.model.proj
    before = dict(layer.__dict__)
    model.merge_adapter()
    model.unmerge_adapter()
    assert layer._caches == {} and layer.__dict__.keys() == before.keys()


@pytest.mark.parametrize("how", ["load", "assign"])
def test_a_weight_that_comes_while_merged_is_not_lost(how: str) -> None:
    """It is PEFT's to take the adapter out of that one."""
    model, other = lora_net(make_linear4bit()), lora_net(make_linear4bit(double_quant=True), seed=8)
    peftkern.patch(model)
    with torch.no_grad():
        for net in (model, other):
            net.merge_adapter()
    if how == "load":
        loaded = {k: v.clone() for k, v in other.state_dict().items() if "absmax" not in k}
        model.load_state_dict(loaded, strict=False)
    else:
        bases(model)[0].weight = bases(other)[0].weight
    expected = copy.deepcopy(model)
    peftkern.unpatch(expected)
    for net in (model, expected):
        net.unmerge_adapter()
    assert torch.equal(snapshot(model)[0]["weight"], snapshot(expected)[0]["weight"])


@pytest.mark.parametrize("state", ["disabled", "merged", "merged in inference mode"])
@pytest.mark.parametrize("make", [make_linear, make_linear4bit])
def test_compiled_in_any_state(make, state: str) -> None:
    model = lora_net(make())
    peftkern.patch(model)
    if state == "disabled":
        model.base_model.disable_adapter_layers()
    else:
        with torch.inference_mode("inference" in state):
            model.merge_adapter()
    x = sample().requires_grad_()
    expected = model(x)
    torch._dynamo.reset()
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (got, expected)]
    torch.testing.assert_close(*grads)
