"""Patched models under DDP, FSDP and DTensor: processes of their own, forked from one that has
imported everything."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import run_code

ADALORA = """
def adalora(rank):
    torch.set_num_threads(1 + rank)  # must not matter
    model = adalora_llama(deltaT=1)
    peftkern.patch(model)
    wrapped = DistributedDataParallel(model)
    optimizer = optimizer_of(model)
    digest = hashlib.sha256()
    for step in range(1, STEPS + 1):
        wrapped(**text_batch(seed=100 * rank + step)).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        digest.update(json.dumps(model.peft_config["default"].rank_pattern).encode())
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == 28
    digests = [None, None]
    dist.all_gather_object(digests, digest.hexdigest())
    assert digests[0] == digests[1], "ranks drew other masks"
"""

ADALORA_STEPS = """
def adalora_steps(rank):
    model = adalora_llama(deltaT=1)
    optimizer = optimizer_of(model)
    measured = RankBudget(cost=lambda name: len(name) + rank * (len(name) % 3))  # the first's count
    steps = AdaLoraSteps(model, optimizer, STEPS, budget=measured)
    wrapped = DistributedDataParallel(model)
    for step in range(1, 21):
        wrapped(**text_batch(seed=100 * rank + step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert steps.step == 20 and model.peft_config["default"].rank_pattern
    try:  # of gradients that nobody has reduced
        model(**text_batch(seed=rank)).loss.backward()
        for p in model.parameters():
            if rank and p.grad is not None:
                p.grad = p.grad.flip(0) * 100
        optimizer.step()
    except RuntimeError as error:
        assert "mask of step 21 is not the same in all processes" in str(error), error
    else:
        raise AssertionError("other masks went unseen")
"""

ADALORA_COMPACT = """
def compacting_losses(rank, compact, hook=False, **options):
    schedule = {"total_step": 14, "tinit": 2, "tfinal": 4, "deltaT": 3}
    model = adalora_llama(orth_reg_weight=0.0, **schedule)
    optimizer = optimizer_of(model)
    AdaLoraSteps(model, optimizer, 14, compact=compact)
    wrapped = DistributedDataParallel(model, **options)
    if hook:
        wrapped.register_comm_hook(None, allreduce_hook)
    found = []
    for step in range(1, 15):
        loss = wrapped(**text_batch(seed=100 * rank + step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    rows = sum(len(p) for n, p in model.named_parameters() if "lora_E" in n)
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])
    gathered = [torch.empty_like(weights) for _ in range(2)]
    dist.all_gather(gathered, weights)
    assert torch.equal(*gathered), "ranks drifted apart"
    return torch.stack(found), rows

def adalora_compact(rank):
    expected, rows = compacting_losses(rank, None)
    assert rows == 14 * 6
    for options in ({"gradient_as_bucket_view": True}, {"find_unused_parameters": True}):
        got, rows = compacting_losses(rank, "final", **options)
        assert rows == 28, rows
        torch.testing.assert_close(got, expected, rtol=COMPACTED_RTOL, atol=0)
    got, rows = compacting_losses(rank, 3, static_graph=True)
    assert rows == 28 and torch.equal(got[:4], expected[:4]) and got.isfinite().all()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got, rows = compacting_losses(rank, "final", hook=True)
    assert rows == 14 * 6 and torch.equal(got, expected)
    said = [str(w.message) for w in caught if "AdaLoRA keeps what it" in str(w.message)]
    assert len(said) == 1 and "with a communication hook keeps its buckets" in said[0], said
"""

ADALORA_SHARDED = """
def adalora_losses(model, wrapped, rank, compact=None):
    optimizer = optimizer_of(model)
    AdaLoraSteps(model, optimizer, STEPS, compact=compact)
    found = []
    for step in range(1, STEPS + 1):
        loss = wrapped(**text_batch(seed=100 * rank + step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == 28
    return torch.stack(found)

def adalora_sharded(rank):
    model, twin = adalora_llama(deltaT=1), adalora_llama(deltaT=1)
    peftkern.patch(model)
    expected = adalora_losses(model, DistributedDataParallel(model), rank)
    mesh = init_device_mesh("cpu", (2,))
    peftkern.patch(twin)
    for layer in twin.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(twin, mesh=mesh)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = adalora_losses(twin, twin, rank, "final")  # masks are compared at every step
    said = [str(w.message) for w in caught if "AdaLoRA keeps what it" in str(w.message)]
    assert len(said) == 1 and said[0].endswith("FSDP has sharded the parameters"), said
    torch.testing.assert_close(got, expected, rtol=LOSS_CURVE_RTOL, atol=0)
    save_state(twin.base_model, sys.argv[1], STEPS, write=rank == 0)
    dist.barrier()
    state = read_state(sys.argv[1])
    E = twin.base_model.model.model.layers[0].self_attn.q_proj.lora_E["default"]
    assert type(E).__name__ == "DTensor" and len(E.to_local()) == 3
    whole = E.full_tensor().detach()
    assert torch.equal(state.triplets["model.layers.0.self_attn.q_proj.lora_E"], whole)
    try:
        load_state(twin, sys.argv[1])
    except ValueError as error:
        assert "does not load into shards: load before fully_shard" in str(error), error
    else:
        raise AssertionError("loaded into shards")
"""

SHARDED = """
def role(model, name):
    layer = layer_of(model)
    return layer.base_layer if name == "base_layer" else getattr(layer, name)["default"]

def sharded(rank):
    mesh = init_device_mesh("cpu", (1,))
    x = torch.randn(3, K)
    for name in ("base_layer", "lora_A", "lora_B"):
        model = lora_net(make_linear())
        expected = model(x)
        peftkern.patch(model)
        fully_shard(role(model, name), mesh=mesh)
        peftkern.reset_stats()
        torch.testing.assert_close(model(x), expected)
        assert served_by_us() == 1 and fallbacks() == {}, peftkern.stats()
    for name in ("lora_A", "base_layer"):
        model = lora_net(make_linear())
        peftkern.patch(model)
        leaf = role(model, name)
        leaf.weight = nn.Parameter(distribute_tensor(leaf.weight.data, mesh, [Replicate()]), False)
        peftkern.reset_stats()
        try:
            model(x)
        except RuntimeError as error:  # torch refuses to mix them; PEFT would not get further
            assert "DTensor" in str(error), error
        part = "base weight" if name == "base_layer" else name
        assert fallbacks() == {f"{part} is DTensor": 1}, fallbacks()
    sharded_experts(mesh)
    model = lora_net(make_linear())
    expected = model(x)
    peftkern.patch(model)
    fully_shard(layer_of(model), mesh=mesh)  # unsharded before the layer's forward: served
    peftkern.reset_stats()
    y = model(x)
    torch.testing.assert_close(y, expected)
    assert served_by_us() == 1 and fallbacks() == {}, peftkern.stats()
    y.sum().backward()
    assert layer_of(model).lora_B["default"].weight.grad is not None

def sharded_experts(mesh):
    model = expert_models.expert_net()
    expected = model(*expert_models.inputs())
    peftkern.patch(model)
    wrapper = expert_models.wrapper_of(model)
    fully_shard(wrapper, mesh=mesh)  # unsharded before its forward: served
    peftkern.reset_stats()
    torch.testing.assert_close(model(*expert_models.inputs()), expected)
    assert expert_models.served() == 1 and expert_models.fallbacks() == {}, peftkern.stats()
    model = expert_models.expert_net()
    peftkern.patch(model)
    experts = expert_models.wrapper_of(model).get_base_layer()
    data = experts.down_proj.data
    experts.down_proj = nn.Parameter(distribute_tensor(data, mesh, [Replicate()]), False)
    peftkern.reset_stats()
    try:
        model(*expert_models.inputs())
    except RuntimeError as error:  # torch refuses to mix them; PEFT would not get further
        assert "DTensor" in str(error), error
    assert expert_models.fallbacks() == {"down_proj is DTensor": 1}, expert_models.fallbacks()
"""

FOUR_BIT = """
def sharded_layer(how):
    model = lora_net(make_linear4bit(quant_storage=torch.float32))
    peftkern.patch(model)
    if how == "fully_shard":
        return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    parameters = how == "parameters"
    if not parameters:  # one flat parameter is trained or it is not
        model.requires_grad_(False)
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, use_orig_params=parameters, device_id=cpu)

def gradients(model, x):
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad]

def four_bit(rank):
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(rank))
    expected = gradients(lora_net(make_linear4bit()), x.clone().requires_grad_())
    for how in ("parameters", "views", "fully_shard"):
        model = sharded_layer(how)
        peftkern.reset_stats()
        torch.testing.assert_close(gradients(model, x.clone().requires_grad_()), expected)
        assert served_by_us() == 1 and fallbacks() == {}, (how, peftkern.stats())
"""

PARTS = ("adalora", "adalora_steps", "adalora_compact", "adalora_sharded", "sharded", "four_bit")
PROCESSES = f"""
import hashlib, json, sys, torch, warnings, torch.distributed as dist, torch.multiprocessing as mp
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
import expert_models, peftkern
from adalora_models import STEPS, adalora_llama, optimizer_of
from peft_models import *
from peftkern.integrations.peft.adalora_state import load_state, read_state, save_state
from peftkern.integrations.peft.adalora_steps import AdaLoraSteps
from peftkern.methods import RankBudget
from tolerances import COMPACTED_RTOL, LOSS_CURVE_RTOL
{ADALORA}{ADALORA_STEPS}{ADALORA_COMPACT}{ADALORA_SHARDED}{SHARDED}{FOUR_BIT}
def work(rank, name, world_size):
    torch.set_num_threads(1)
    take_small_layers()
    where = f"file://{{sys.argv[1]}}/{{name}}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world_size)
    globals()[name](rank)
    dist.destroy_process_group()

for name in {PARTS}:
    count = 1 if name == "sharded" else 2
    try:
        mp.start_processes(work, args=(name, count), nprocs=count, start_method="fork")
        print(name, "is right")
    except mp.ProcessRaisedException as error:
        print(name, error)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> str:
    folder: Path = tmp_path_factory.mktemp("stores")
    return run_code(PROCESSES, folder)


@pytest.mark.parametrize("name", PARTS)
def test_ranks_agree_and_shards_fall_back(said, name):
    """AdaLoRA draws one mask, a sharded part goes to PEFT by name.

    Sharded 4-bit layers are served under both generations of FSDP, with what the weight is in a
    forward: a view, or a parameter.
    """
    assert f"{name} is right" in said, said
