"""Methods under DDP and FSDP2: two gloo processes lose what one does, masks, ranks and roundings
are the same in all; what cannot work says so where it is made."""

from __future__ import annotations

import functools
import json
import warnings

import pytest
import torch
import torch.distributed as dist
from engine_methods import F32, METHODS, adamw, losses_of, net_of, peft
from engine_runs import (
    adamw_of,
    batch_of,
    curve_alone,
    mean_over_ranks,
    model_of,
    named,
    products_of,
    products_served,
    share_of,
)
from engines import CURVE, STEPS, in_ranks
from fsdp import in_layers
from method_models import batches
from peft_models import add_lora, fill_adapters, take_small_layers, tiny_llama
from rows import METHOD_ROWS, Row
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import peftkern
from peftkern.integrations.peft.adalora_steps import AdaLoraSteps
from peftkern.integrations.transformers import longlora
from peftkern.layers import LoRALinear
from peftkern.methods import (
    InPlaceDeltaLoRA,
    LoRAProAdamW,
)
from peftkern.methods.adalora import RankAllocator

FEW = 8  # steps of LongLoRA


def sharded(model: nn.Module) -> nn.Module:
    """FSDP2, a layer as a unit."""
    net = getattr(getattr(model, "base_model", model), "model", model)
    for layer in (net.up, net.down):
        fully_shard(layer)
    return fully_shard(model)


def train(rank: int, name: str, engine: str) -> tuple[Tensor, dict[str, Tensor]]:
    method = METHODS[name]
    model = method.model()
    if name.startswith("LoRA-"):
        peftkern.patch(model)
    if name == "LoRA-FA":  # lora_A is frozen before any engine sees it
        peftkern.methods.freeze_lora_A(model)
    if engine == "DDP":
        wrapped = DistributedDataParallel(model, find_unused_parameters=method.unused)
    else:
        wrapped = sharded(model)
        assert all(isinstance(p, DTensor) for p in model.parameters())
    peftkern.reset_stats()
    losses = losses_of(method, wrapped, model, rank, dist.get_world_size())
    assert peftkern.stats().fallbacks == {}, peftkern.stats()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return losses, {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in state.items()}


SERVED = [row for row in METHOD_ROWS if row.method in METHODS and row.outcome == "served"]


def train_all(rank: int) -> dict[Row, tuple[Tensor, dict[str, Tensor]]]:
    """By each row in turn: a fork of a process that has imported so much takes its time."""
    take_small_layers()
    return {row: named(str(row), train, rank, row.method, row.engine) for row in SERVED}


def all_alone(rank: int) -> dict[str, Tensor]:
    take_small_layers()
    models = {name: method.model() for name, method in METHODS.items()}
    return {name: losses_of(METHODS[name], model, model, 0, 1) for name, model in models.items()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, Tensor]:
    return in_ranks(all_alone, 1, tmp_path_factory.mktemp("alone"))[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> list[dict]:
    return in_ranks(train_all, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("row", SERVED, ids=lambda row: f"{row.method}-{row.engine}")
def test_processes_train_as_one(row, expected, trained):
    """And hold the same masks, ranks and weights, bit for bit."""
    (ours, state), (theirs, others) = (found[row] for found in trained)
    assert row.processes == 2 and torch.equal(ours, theirs)
    torch.testing.assert_close(ours, expected[row.method], **CURVE)
    assert state.keys() == others.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, others[name]), name


def llama_of(method: str) -> nn.Module:
    if method == "AdaLoRA":
        return model_of(method)
    saved = ["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"]
    model = add_lora(tiny_llama(), modules_to_save=saved)
    longlora.enable_shifted_sparse_attention(model, 4)
    fill_adapters(model)
    return model.train()


def steps_of(method: str) -> int:
    """All of them where masks change on the way."""
    return STEPS if method == "AdaLoRA" else FEW


def train_llama(method: str, engine: str) -> tuple[Tensor, str]:
    model = llama_of(method)
    peftkern.patch(model)
    peftkern.reset_stats()
    wrapped = DistributedDataParallel(model) if engine == "DDP" else in_layers(model)
    optimizer = adamw_of(model)
    if method == "AdaLoRA":
        AdaLoraSteps(model, optimizer, STEPS, compact=None)
    found = []
    for step in range(1, steps_of(method) + 1):
        loss = wrapped(**batch_of(step, next(share_of(dist.get_rank(), 2)))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    assert products_served() == len(found) * products_of(model), peftkern.stats()
    masks = getattr(model.peft_config["default"], "rank_pattern", None)
    return mean_over_ranks(found), json.dumps(masks)


LLAMAS = [row for row in METHOD_ROWS if row.method in ("AdaLoRA", "LongLoRA")]
LLAMAS = [row for row in LLAMAS if row.outcome == "served"]


def train_llamas(rank: int) -> list[tuple[Tensor, str]]:
    take_small_layers()
    return [named(str(row), train_llama, row.method, row.engine) for row in LLAMAS]


def llamas_alone(rank: int) -> dict[str, Tensor]:
    methods = {row.method for row in LLAMAS}
    return {method: curve_alone(llama_of(method), steps=steps_of(method)) for method in methods}


def test_a_llama_trains_as_in_one_process(tmp_path):
    (curves,) = in_ranks(llamas_alone, 1, tmp_path / "alone")
    for row, ours, theirs in zip(LLAMAS, *in_ranks(train_llamas, 2, tmp_path), strict=True):
        torch.testing.assert_close(ours[0], curves[row.method], **CURVE, msg=str(row))
        assert torch.equal(ours[0], theirs[0]) and ours[1] == theirs[1]


def flattened(model: nn.Module, *parts: nn.Module) -> nn.Module:
    """FSDP1, each of some parts as a unit."""
    options = {"use_orig_params": True, "device_id": torch.device("cpu")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters that are trained beside frozen ones
        policy = functools.partial(lambda_auto_wrap_policy, lambda_fn=lambda m: m in parts)
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, **options)


def refused_by_fsdp1(rank: int) -> dict[str, str]:
    """What each method says of a model that FSDP1 has flattened, before it does anything."""
    said = {}
    for name in sorted(METHODS):
        method = METHODS[name]
        model = method.model()
        net = getattr(getattr(model, "base_model", model), "model", model)
        engine = flattened(model, net.up, net.down)
        with pytest.raises(ValueError) as error:
            method.optimizer(model)
            method.after(model)
            assert name == "Quantum-PEFT", name  # nothing of it is called before its forward
            engine(batches(1, F32)[0][0])
        said[name] = str(error.value)
    model = model_of("AdaLoRA")
    peftkern.patch(model)
    wrapped = flattened(model, *model.base_model.model.model.layers)
    for start in (
        lambda: AdaLoraSteps(model, adamw(model), STEPS),
        lambda: wrapped(**batch_of(1)),  # had it been made before
    ):
        with pytest.raises(ValueError) as error:
            start()
        said["AdaLoRA"] = str(error.value)
    return said


def refused_by_fsdp2(rank: int) -> dict[str, str]:
    said = {}
    svd = sharded(METHODS["AdaLoRA (RankAllocator)"].model())
    early, late = LoRAProAdamW(model := peft()), sharded(model)
    late(batches(1, F32)[0][0]).sum().backward()
    for name, kind, start in (
        ("optimizer", RuntimeError, early.step),
        ("full_moments", ValueError, lambda: LoRAProAdamW(model, full_moments=True)),
        ("compact_", ValueError, RankAllocator(svd, target_r=2, total_step=STEPS).compact_),
    ):
        with pytest.raises(kind) as error:
            start()
        said[name] = str(error.value)
    for group in early.param_groups:  # as accelerate's prepare does
        group["params"] = list(model.parameters())
    before = [p.full_tensor() for p in model.parameters() if p.requires_grad]
    early.step()
    after = [p.full_tensor() for p in model.parameters() if p.requires_grad]
    assert not any(map(torch.equal, before, after))
    return said


def test_what_cannot_work_says_so_where_it_is_made(tmp_path):
    ours, theirs = in_ranks(refused_by_fsdp1, 2, tmp_path / "1")
    assert ours == theirs
    for row in METHOD_ROWS:
        if row.engine == "FSDP1":
            assert row.outcome.removeprefix("refused: ") in ours[row.method]
            expected = "weight: " if row.method == "Quantum-PEFT" else "lora_"
            assert expected in ours[row.method]
    ours, theirs = in_ranks(refused_by_fsdp2, 2, tmp_path / "2")
    assert ours == theirs
    assert "up.lora_B among them): make it after fully_shard" in ours["optimizer"]
    assert "full_moments: expected False where FSDP2 shards the model" in ours["full_moments"]
    assert "lora_E: FSDP2 has sharded it; compact_ before" in ours["compact_"]


def round_in_place(rank: int) -> tuple[list[Tensor], str]:
    """Weights in bfloat16 after steps of ranks that are seeded differently."""
    torch.manual_seed(rank)
    model = net_of(lambda linear: LoRALinear.from_linear(linear.bfloat16(), r=4)).bfloat16()
    with pytest.raises(ValueError) as error:
        InPlaceDeltaLoRA(model, generator=torch.Generator().manual_seed(rank))
    follow = InPlaceDeltaLoRA(model, start_step=0)
    for step in range(3):
        with torch.no_grad():
            for p in (model.up.lora_A, model.down.lora_B):
                p.add_(0.01 * (step + 1))
        follow.step()
    return [model.up.weight.detach(), model.down.weight.detach()], str(error.value)


def test_weights_are_rounded_alike_in_all_processes(tmp_path):
    (ours, said), (theirs, _) = in_ranks(round_in_place, 2, tmp_path)
    assert all(map(torch.equal, ours, theirs))
    assert "generator: expected one state in all processes" in said
