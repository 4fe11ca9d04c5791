"""Patched models under FSDP: two gloo processes train as one that is not patched does, and every
layer is served in each, also where the base or a factor is a unit of its own."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import expert_models
import pytest
import torch
import torch.distributed as dist
from engine_runs import named
from engines import CURVE, LAYERS, STEPS, in_ranks, loss_curve, nf4_llama, outcome, share
from fsdp import (
    ADAPTED,
    accelerated,
    flat,
    flat_layers,
    in_factors,
    in_layers,
    in_leaves,
    in_one,
    small_llama,
)
from peft import LoraConfig
from peft_models import K, N, fallbacks, layer_of, lora_net, make_linear, served_by_us, text_batch
from peft_models import take_small_layers as compute_small_layers
from rows import FSDP_ROWS, Row
from tolerances import BF16_LOSS_RTOL, RATIO
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)

import peftkern
from peftkern.layers import NF4Stack

BF16 = torch.bfloat16
SHORT = 8  # steps of what differs in the method alone, or in a wrap that hides less


def moe(quantized: bool = False) -> nn.Module:
    model = expert_models.tiny_moe()
    if quantized:
        peftkern.quantize_(model, include=["experts"])
    return expert_models.add_experts_lora(model).train()


def flat_layers_around_experts(model: nn.Module) -> nn.Module:
    """FSDP1: decoder layers, but for the frozen weights of experts."""
    weights = [p for n, p in model.named_parameters() if "experts" in n and not p.requires_grad]
    return flat_layers(model, ignored_states=weights)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "LoRA": small_llama,
    "DoRA": functools.partial(small_llama, use_dora=True),
    "QLoRA (bitsandbytes)": functools.partial(small_llama, storage=torch.float32),
    "QLoRA (bitsandbytes, uint8 storage)": functools.partial(small_llama, storage=torch.uint8),
    "QLoRA (peftkern.quantize_)": nf4_llama,
    "experts": moe,
    "experts in 4 bits": functools.partial(moe, quantized=True),
}
WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "FSDP2, the model as a unit": in_one,
    "FSDP2, a decoder layer as a unit": in_layers,
    "FSDP2, the base and each factor as a unit": in_leaves,
    "FSDP2 as accelerate wraps": functools.partial(accelerated, version=2, ram_efficient=True),
    "FSDP2 as accelerate wraps for PEFT": functools.partial(
        accelerated, version=2, peft_policy=True
    ),
    "FSDP1, PEFT's wrap policy": flat,
    "FSDP1, PEFT's wrap policy, use_orig_params=False": functools.partial(
        flat, use_orig_params=False
    ),
    "FSDP1, a decoder layer as a unit": flat_layers,
    "FSDP1, a decoder layer as a unit, experts in ignored_states": flat_layers_around_experts,
}


def steps_for(row: Row) -> int:
    whole = "FSDP2, a decoder layer as a unit", "FSDP1, PEFT's wrap policy"
    return STEPS if row.method == "LoRA" and row.engine in whole else SHORT


def trained(rank: int, row: Row) -> tuple[Tensor, str, dict[str, str]]:
    """Losses of a patched model in units, what `stats()` says, and what a report would have."""
    compute_small_layers()
    model = MODELS[row.method]()
    peftkern.patch(model)
    model = WRAPS[row.engine](model)
    report = peftkern.patch(model, dry_run=True)
    peftkern.reset_stats()
    count = steps_for(row)
    losses = loss_curve(model, steps=range(count))
    if not row.method.startswith("experts"):
        calls = LAYERS if "QLoRA" in row.method else ADAPTED  # those without an adapter, too
        return losses, outcome(count * calls), report.falling_back
    said = "served" if expert_models.served() == 2 * count else str(expert_models.fallbacks())
    return losses, said, report.falling_back


REFUSED = [row for row in FSDP_ROWS if row.outcome.startswith("refused: ")]
# accelerate remembers for as long as a process lives that it has been told of FSDP.
ALONE = [row for row in FSDP_ROWS if "accelerate" in row.engine]
TOGETHER = [row for row in FSDP_ROWS if row not in (*REFUSED, *ALONE)]


def trained_together(rank: int) -> dict[Row, tuple]:
    """By each row in turn: a fork of a process that has imported so much takes its time."""
    for row in REFUSED:
        with pytest.raises(Exception, match=row.outcome.removeprefix("refused: ")):
            trained(rank, row)
    return {row: named(str(row), trained, rank, row) for row in TOGETHER}


def curves_alone(rank: int) -> dict[str, Tensor]:
    """Losses of one process that is not patched, the most steps of each method."""
    steps = {row.method: steps_for(row) for row in sorted((*ALONE, *TOGETHER), key=steps_for)}
    return {method: loss_curve(MODELS[method](), steps=range(n)) for method, n in steps.items()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return in_ranks(curves_alone, 1, tmp_path_factory.mktemp("one"))[0]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Row, tuple]]:
    return in_ranks(trained_together, 2, tmp_path_factory.mktemp("two"))


def assert_served(row: Row, ranks: list[tuple], expected: dict[str, Tensor]) -> None:
    assert row.processes == len(ranks)
    for losses, said, falling_back in ranks:
        assert (said, falling_back) == (row.outcome, {})
        torch.testing.assert_close(losses, expected[row.method][: len(losses)], **CURVE)


def name_of(row: Row) -> str:
    return f"{row.engine}: {row.method}"


@pytest.mark.parametrize("row", TOGETHER, ids=name_of)
def test_rows(row, expected, together):
    """Those that are refused, too, as `trained_together` asserts in every rank."""
    assert_served(row, [found[row] for found in together], expected)


@pytest.mark.parametrize("row", ALONE, ids=name_of)
def test_rows_of_accelerate(row, expected, tmp_path):
    assert_served(row, in_ranks(trained, row.processes, tmp_path, row), expected)


class State(NamedTuple):
    """A step of a model in units: how it is made and wrapped, and what is around its forward.

    steps: micro-batches. outcome: as `stats()` has it.
    """

    wrap: Callable[[nn.Module], nn.Module]
    make: Callable[[], nn.Module] = small_llama
    around: Callable[..., contextlib.AbstractContextManager] = contextlib.nullcontext
    prepare: Callable[[nn.Module], None] = lambda model: None
    steps: int = 1
    calls: int = 1  # of a layer in a micro-batch
    outcome: str = "served"
    trains: bool = True

    @property
    def in_bf16(self) -> bool:
        return self.around is autocast or "bfloat16" in str(self.wrap) or "bf16" in str(self.wrap)


def autocast(model: nn.Module) -> contextlib.AbstractContextManager:
    return torch.autocast("cpu", BF16)


def without_adapters(model: nn.Module) -> contextlib.AbstractContextManager:
    return model.disable_adapter()


def without_gradients(model: nn.Module) -> contextlib.AbstractContextManager:
    return torch.no_grad()


def no_sync(model: nn.Module) -> contextlib.AbstractContextManager:
    """Of the first micro-batch alone."""
    first = model.__dict__.setdefault("first_batch", [True])
    last = not first or not first.pop()
    if isinstance(model, FullyShardedDataParallel):
        return contextlib.nullcontext() if last else model.no_sync()
    model.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def checkpoint(model: nn.Module, reentrant: bool) -> None:
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()


def hook_factors(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if name.endswith("lora_B.default"):
            module.register_forward_hook(lambda module, inputs, y: y * 0.5)


def two_adapters() -> nn.Module:
    model = small_llama()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    model.base_model.set_adapter(["default", "other"])
    return model


def served_in_one_rank(model: nn.Module) -> None:
    if dist.get_rank():
        from peftkern.backends.cpu import crossovers

        crossovers.crossover = lambda name: 1 << 40  # PEFT computes all of them


MP1 = {"mixed_precision": MixedPrecision(param_dtype=BF16, cast_forward_inputs=True)}
MP1_UNCAST = {"mixed_precision": MixedPrecision(param_dtype=BF16)}
MP2 = {"mp_policy": MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)}
OFFLOAD = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
WITH = functools.partial
STATES = {
    "mixed precision": State(WITH(in_leaves, **MP2)),
    "mixed precision, DoRA": State(WITH(in_factors, **MP2), MODELS["DoRA"]),
    "mixed precision, FSDP1": State(WITH(flat, **MP1)),
    "mixed precision under autocast, FSDP1": State(WITH(flat, **MP1_UNCAST), around=autocast),
    "accelerate's mixed precision": State(WITH(accelerated, version=2, mixed_precision="bf16")),
    "autocast": State(in_leaves, around=autocast),
    "kept whole after forward": State(WITH(in_leaves, reshard_after_forward=False)),
    "offload to the CPU": State(WITH(in_leaves, **OFFLOAD)),
    "checkpointing": State(in_leaves, prepare=WITH(checkpoint, reentrant=False), calls=2),
    "reentrant checkpointing": State(in_leaves, prepare=WITH(checkpoint, reentrant=True), calls=2),
    "checkpointing, FSDP1": State(flat, prepare=WITH(checkpoint, reentrant=False), calls=2),
    "accumulation": State(in_leaves, around=no_sync, steps=2),
    "accumulation, FSDP1": State(flat, around=no_sync, steps=2),
    "two adapters": State(in_leaves, two_adapters),
    "dropout and bias": State(in_leaves, WITH(small_llama, lora_dropout=0.2, lora_bias=True)),
    "a module is saved": State(in_leaves, WITH(small_llama, modules_to_save=["lm_head"])),
    "evaluation": State(in_leaves, around=without_gradients, trains=False),
    "evaluation, FSDP1": State(flat, around=without_gradients, trains=False),
    "adapters are disabled": State(
        in_leaves, around=without_adapters, trains=False, outcome="adapters are disabled"
    ),
    "a hook of the user's": State(in_leaves, prepare=hook_factors, outcome="lora_B is FSDPLinear"),
    "one rank is served": State(in_factors, prepare=served_in_one_rank, outcome="by rank"),
    "one rank is served, FSDP1": State(flat, prepare=served_in_one_rank, outcome="by rank"),
}


def step_of(state: State, patched: bool) -> tuple[Tensor, Tensor, str]:
    """Losses, all gradients in one vector, and what `stats()` says."""
    torch.manual_seed(3)
    model = state.make()
    if patched:
        peftkern.patch(model)
    whole = state.wrap(model)
    state.prepare(model)
    peftkern.reset_stats()
    torch.manual_seed(11)
    losses = []
    for step in range(state.steps):
        with state.around(model if state.around is without_adapters else whole):
            losses.append(whole(**share(step)).loss)
            if state.trains:
                losses[-1].backward()
    grads = [p.grad for p in whole.parameters() if p.grad is not None]
    parts = [(g.full_tensor() if hasattr(g, "full_tensor") else g).reshape(-1) for g in grads]
    said = outcome(ADAPTED * state.steps * state.calls) if patched else ""
    return torch.stack(losses).detach().float(), torch.cat([*parts, torch.zeros(1)]), said


def steps_of_all(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, state in STATES.items():
        compute_small_layers()
        found[name] = [step_of(state, patched) for patched in (False, True)]
        if state.in_bf16:
            exact = (
                State(in_factors, state.make) if "FSDP1" not in name else State(flat, state.make)
            )
            found[name].append(step_of(exact, False))
    return found


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_ranks(steps_of_all, 2, tmp_path_factory.mktemp("steps"))


@pytest.mark.parametrize("name", STATES)
def test_states(name, steps):
    """Losses and gradients are PEFT's in the same units; in bfloat16 they err no more than those.

    Ranks that are served and ranks that are not agree on the order of what they send each other.
    """
    state = STATES[name]
    for rank, found in enumerate(steps):
        peer, ours, *exact = found[name]
        by_rank = "small dense product: PEFT's own operations are as fast" if rank else "served"
        assert ours[2] == (by_rank if state.outcome == "by rank" else state.outcome)
        assert bool(ours[1].any()) is state.trains
        if exact:
            torch.testing.assert_close(ours[0], exact[0][0], rtol=BF16_LOSS_RTOL, atol=0)
            error, error_of_peer = ((one[1] - exact[0][1]).norm() for one in (ours, peer))
            assert error <= RATIO * error_of_peer
        else:
            torch.testing.assert_close(ours[0], peer[0], **CURVE)
            torch.testing.assert_close(ours[1], peer[1], rtol=1e-4, atol=1e-6)


@contextlib.contextmanager
def unchanged(*modules: nn.Module) -> Iterator[None]:
    """Nothing of a call stays on these."""

    def seen() -> list[tuple]:
        return [
            (type(m), {k: v for k, v in vars(m).items() if k != "_parameters"}) for m in modules
        ]

    before = seen()
    hooks = [list(m._forward_hooks) + list(m._forward_pre_hooks) for m in modules]
    yield
    assert seen() == before
    assert hooks == [list(m._forward_hooks) + list(m._forward_pre_hooks) for m in modules]


def parts_in_turn(rank: int) -> dict[str, str]:
    """What went wrong in each part, which computes in a group of one process."""
    compute_small_layers()
    found = {}
    for part in PARTS:
        try:
            part()
        except Exception:
            found[part.__name__] = traceback.format_exc()
    return found


def units(**policies: Any) -> tuple[nn.Module, list[nn.Module]]:
    model = lora_net(make_linear())
    peftkern.patch(model)
    layer = layer_of(model)
    roles = {"base_layer": layer.base_layer}
    roles |= {name: getattr(layer, name)["default"] for name in ("lora_A", "lora_B")}
    mesh = init_device_mesh("cpu", (1,))
    for role, module in roles.items():
        policy = policies.get(role, policies.get("all"))
        fully_shard(module, mesh=mesh, **({} if policy is None else {"mp_policy": policy}))
    peftkern.reset_stats()
    return model, [layer, *roles.values()]


def leaves_nothing_behind() -> None:
    model, modules = units()
    x = torch.randn(3, K)
    model(x)  # FSDP's own first call
    with unchanged(*modules):
        model(x)
    with unchanged(*modules), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(3, K + 1))
    peftkern.reset_stats()
    expected = lora_net(make_linear())(x)
    torch.testing.assert_close(model(x), expected)
    assert served_by_us() == 1 and fallbacks() == {}
    assert repr(model).count("FSDPLinear") == 3
    peftkern.unpatch(model)
    torch.testing.assert_close(model(x), expected)
    assert served_by_us() == 1


def layers_that_are_units() -> None:
    """A layer stays a unit when it is patched, and when it is given back."""
    model, mesh, x = lora_net(make_linear()), init_device_mesh("cpu", (1,)), torch.randn(3, K)
    expected = model(x)
    layer = fully_shard(layer_of(model), mesh=mesh)
    for _ in range(2):
        assert peftkern.patch(model).skipped == {}
        assert isinstance(layer, FSDPModule) and peftkern.is_patched(layer)
        peftkern.reset_stats()
        torch.testing.assert_close(model(x), expected)
        assert served_by_us() == 1 and fallbacks() == {}
        assert peftkern.patch(model, dry_run=True).patched == peftkern.unpatch(model)
        assert isinstance(layer, FSDPModule) and not peftkern.is_patched(layer)
        torch.testing.assert_close(model(x), expected)
    with peftkern.patched(model):
        assert isinstance(layer, FSDPModule) and peftkern.is_patched(layer)
    assert type(layer).__name__ == "FSDPLinear" and not peftkern.is_patched(layer)
    layer.reshard()  # of FSDPModule


def experts_in_4_bits() -> None:
    """Shards of them are dense, which is said where FSDP2 has made them so; ignored, they stay."""
    for ignored, patch_first in itertools.product((False, True), repeat=2):
        model = moe(quantized=True)
        stacks = {p for p in model.parameters() if isinstance(p, NF4Stack)}
        if patch_first:
            peftkern.patch(model)
        options = {"ignored_params": stacks} if ignored else {}
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)), **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if not patch_first:
                peftkern.patch(model)
            said = ["are dense in the shards" in str(one.message) for one in caught]
            assert any(said) is not (ignored or patch_first)
            model(**text_batch())
        said = [str(one.message) for one in caught if "are dense in" in str(one.message)]
        assert len(said) == (not ignored)
        assert ignored or said[0].startswith(f"{len(stacks)} stacks of experts")


def casts_that_differ() -> None:
    model, _ = units(lora_A=MixedPrecisionPolicy(param_dtype=BF16))
    with pytest.raises(RuntimeError, match="dtype"):  # of PEFT's own operations
        model(torch.randn(3, K))
    assert list(fallbacks()) == ["mixed precision of lora_A is not that of base_layer"]


def output_dtype_is_kept() -> None:
    model, _ = units(all=MixedPrecisionPolicy(param_dtype=BF16, output_dtype=torch.float32))
    assert model(torch.randn(3, K)).dtype is torch.float32
    assert served_by_us() == 1 and fallbacks() == {}
    model, _ = units(
        base_layer=MixedPrecisionPolicy(param_dtype=BF16),
        lora_A=MixedPrecisionPolicy(param_dtype=BF16),
        lora_B=MixedPrecisionPolicy(param_dtype=BF16, output_dtype=torch.float32),
    )
    assert model(torch.randn(3, K)).dtype is BF16  # what the base gives
    assert served_by_us() == 1 and fallbacks() == {}


def calls_that_others_see() -> None:
    """What hooks into every module, or into the backward pass of one, sees PEFT's calls."""
    model, _ = units()
    x = torch.randn(3, K)
    seen: list[tuple] = []

    def see(module: nn.Module, inputs: Any, y: Tensor) -> None:
        seen.append((type(module).__name__, y.shape))

    with nn.modules.module.register_module_forward_hook(see):
        model(x)
    assert list(fallbacks()) == ["global module hooks"]
    assert seen[:3] == [("FSDPLinear", (3, N)), ("Identity", (3, K)), ("FSDPLinear", (3, 4))]
    model, before = flat(lora_net(make_linear())), len(seen)
    peftkern.patch(model)
    peftkern.reset_stats()
    factor = layer_of(model.module).lora_B["default"].module
    factor.register_full_backward_hook(lambda *found: seen.append(found))
    model(x).sum().backward()
    assert len(seen) == before + 1 and seen[-1][1][0].shape == (3, 4)
    assert list(fallbacks()) == ["lora_B is FullyShardedDataParallel"]


def merged_and_disabled() -> None:
    """PEFT takes the adapters out of the shards, and not out of what is gathered for a call."""
    x, model = torch.randn(3, K), lora_net(make_linear())
    with model.disable_adapter():
        expected = model(x)
    model.merge_adapter()
    peftkern.patch(model)
    fully_shard(layer_of(model).base_layer, mesh=init_device_mesh("cpu", (1,)))
    peftkern.reset_stats()
    with model.disable_adapter():
        try:
            torch.testing.assert_close(model(x), expected)
        except RuntimeError as error:  # torch refuses to mix them; PEFT does not get further
            assert "DTensor" in str(error), error
    assert list(fallbacks()) == ["adapters are merged and disabled"]


def compiled() -> None:
    model, _ = units()
    x = torch.randn(3, K, requires_grad=True)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), expected)


PARTS = (leaves_nothing_behind, layers_that_are_units, experts_in_4_bits, casts_that_differ)
PARTS += (output_dtype_is_kept, calls_that_others_see, merged_and_disabled, compiled)


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return in_ranks(parts_in_turn, 1, tmp_path_factory.mktemp("parts"))[0]


@pytest.mark.parametrize("part", PARTS)
def test_one_layer(part, wrong):
    assert part.__name__ not in wrong, wrong[part.__name__]


@pytest.mark.parametrize(
    ("storage", "asked", "said"),
    [(torch.uint8, "true", True), (torch.float32, "true", False), (torch.uint8, "", False)],
)
def test_uint8_storage_is_a_warning(storage, asked, said, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", asked)
    model = small_llama(storage=storage)
    warned = (
        pytest.warns(UserWarning, match="14 4-bit weights are stored as uint8")
        if said
        else (contextlib.nullcontext())
    )
    with warned:
        report = peftkern.patch(model)
    assert len(report.warnings) == said and os.environ["ACCELERATE_USE_FSDP"] == asked
