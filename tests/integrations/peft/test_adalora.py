"""AdaLoRA of PEFT under `peftkern.patch`: the same masks, losses and files."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
import trainers
from adalora_models import STEPS, adalora_llama, optimizer_of
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora.layer import AdaLoraLayer, RankAllocator, SVDLinear
from peft.tuners.adalora.model import AdaLoraModel
from peft_models import (
    K,
    Net,
    fallbacks,
    make_conv1d,
    make_linear,
    make_linear4bit,
    patched_copy,
    served_by_us,
    text_batch,
    tiny_llama,
)
from safetensors.torch import load_file
from tolerances import (
    AUTOCAST_RTOL,
    BF16_LOSS_RTOL,
    COMPACTED_RTOL,
    GOLDEN_RTOL,
    LOGITS,
    LOSS_CURVE_RTOL,
)
from torch import Tensor, nn

import peftkern
from peftkern.integrations.peft import adalora
from peftkern.integrations.peft.adalora_compact import compact_
from peftkern.integrations.transformers.callbacks import AdaLoraCallback


def train(model: PeftModel, steps: range, optimizer=None) -> tuple[list[float], list]:
    """Losses, and the rank pattern after every step."""
    optimizer = optimizer or optimizer_of(model)
    losses, patterns = [], []
    for step in steps:
        torch.manual_seed(step)
        loss = model(**text_batch(seed=step)).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
        patterns.append(model.peft_config["default"].rank_pattern)
    return losses, patterns


def assert_close_losses(got: list[float], wanted: list[float], rtol: float) -> None:
    torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), rtol=rtol, atol=0)


def triplet_grads(model: nn.Module, seed: int, share: float = 1.0) -> None:
    """The same random weights and gradients for every model that is asked with this seed."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(p.shape, generator=generator) * share
            p.data += 0.01 * noise
            p.grad = torch.randn(p.shape, generator=generator) * torch.rand((), generator=generator)


def test_masks_over_a_full_schedule_are_pefts(backend: str) -> None:
    theirs = adalora_llama(deltaT=1)
    ours = copy.deepcopy(theirs)
    assert "adalora.AdaLoraModel" in str(peftkern.patch(ours))
    masks = 0
    for step in range(1, STEPS + 1):
        for model in (theirs, ours):
            triplet_grads(model, step)
            model.base_model.update_and_allocate(step)
        pattern = theirs.peft_config["default"].rank_pattern
        assert ours.peft_config["default"].rank_pattern == pattern
        masks += pattern is not None
        for (name, a), (_, b) in zip(
            theirs.named_parameters(), ours.named_parameters(), strict=True
        ):
            assert torch.equal(a, b), name
        allocators = theirs.base_model.rankallocator, ours.base_model.rankallocator
        for attribute in ("exp_avg_ipt", "exp_avg_unc"):
            a, b = (getattr(allocator, attribute) for allocator in allocators)
            assert sorted(a) == sorted(b)
            assert all(torch.equal(a[name], b[name]) for name in a)
    assert masks == STEPS - 5


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "nf4"])
def test_training_follows_peft(kind: str) -> None:
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    theirs = adalora_llama(dtype, kind == "nf4", lora_dropout=0.1)
    for name, p in theirs.named_parameters():
        if "ranknum" in name:
            p.requires_grad_(False)  # PEFT trains it for these models; ours never does
    ours = copy.deepcopy(theirs)
    report = peftkern.patch(ours)
    assert report.skipped == {} and len(report.patched) == 14 + 1
    peftkern.reset_stats()
    wanted, their_patterns = train(theirs, range(1, STEPS + 1))
    got, our_patterns = train(ours, range(1, STEPS + 1))
    assert fallbacks() == {} and served_by_us() == 14 * STEPS
    assert sum(map(sum, our_patterns[-1].values())) == 2 * 14
    if kind == "bfloat16":  # two runs of PEFT part as far when one bit of a sum changes
        assert_close_losses(got[:5], wanted[:5], BF16_LOSS_RTOL)
        return
    assert_close_losses(got, wanted, LOSS_CURVE_RTOL)
    assert our_patterns == their_patterns


def one_layer(proj: nn.Module, **config) -> PeftModel:
    net = Net(proj)
    net.is_loaded_in_4bit = isinstance(proj, bnb.nn.Linear4bit)
    torch.manual_seed(2)
    settings = {"target_modules": ["proj"], "total_step": 20, "init_r": 4, "lora_alpha": 6}
    model = get_peft_model(net, AdaLoraConfig(**{**settings, **config}))
    fill(model)
    return model


def fill(model: nn.Module) -> None:
    """PEFT starts lora_E at zero and the vectors small, which would hide a wrong update."""
    torch.manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.normal_()


def outputs(model: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    x = torch.randn(3, 5, K, generator=torch.Generator().manual_seed(4)).to(dtype).requires_grad_()
    torch.manual_seed(5)
    y = model(x)
    trained = [p for n, p in model.named_parameters() if p.requires_grad and "ranknum" not in n]
    leaves = [x, *trained]
    grads = torch.autograd.grad(y.float().square().sum(), leaves, allow_unused=True)
    return [y, *grads]


def assert_same_outputs(theirs: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    ours = patched_copy(theirs)
    peftkern.reset_stats()
    got = outputs(ours, dtype)
    assert served_by_us() == 1 and fallbacks() == {}
    for g, w in zip(got, outputs(theirs, dtype), strict=True):
        assert (g is None) == (w is None)
        if w is not None:
            scale = w.float().abs().max().item()
            torch.testing.assert_close(g, w, rtol=0, atol=GOLDEN_RTOL[dtype] * scale)


@pytest.mark.parametrize("make", [make_linear, make_conv1d, make_linear4bit])
@pytest.mark.parametrize("config", [{}, {"lora_dropout": 0.3}, {"lora_alpha": -1}], ids=str)
def test_layer_gives_pefts_output_and_gradients(make, config: dict) -> None:
    assert_same_outputs(one_layer(make(), **config))


@pytest.mark.parametrize("make", [make_linear, make_linear4bit])
def test_layer_in_bfloat16_and_under_autocast(make) -> None:
    assert_same_outputs(one_layer(make(torch.bfloat16)), torch.bfloat16)
    theirs = one_layer(make())
    ours = patched_copy(theirs)
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = outputs(ours), outputs(theirs)
    for g, w in zip(got, wanted, strict=True):
        assert g.dtype is w.dtype
        scale = w.float().abs().max().item()
        torch.testing.assert_close(g, w, rtol=0, atol=AUTOCAST_RTOL * scale)


@pytest.mark.parametrize("make", [make_linear, make_linear4bit])
def test_several_active_adapters(make) -> None:
    model = one_layer(make())
    frozen = AdaLoraConfig(target_modules=["proj"], total_step=20, init_r=3, inference_mode=True)
    model.add_adapter("second", frozen)
    fill(model)
    model.base_model.set_adapter(["default", "second"], inference_mode=True)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name and "default" in name)
    assert_same_outputs(model)


def test_unusual_states_fall_back() -> None:
    theirs = one_layer(make_linear()).eval()
    ours = patched_copy(theirs)
    x = torch.randn(2, K)
    peftkern.reset_stats()
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(ours(x), theirs(x))
    for model in (ours, theirs):
        model.merge_adapter()
    assert torch.equal(ours(x), theirs(x))
    assert fallbacks() == {"adapters are disabled": 1, "adapters are merged": 1}
    assert served_by_us() == 0


@pytest.mark.parametrize("make", [make_linear, make_linear4bit])
def test_a_scaling_for_each_output_is_pefts(make) -> None:
    theirs = one_layer(make()).eval()
    ours = patched_copy(theirs)
    x = torch.randn(2, K, requires_grad=True)
    for model in (ours, theirs):
        layer = next(m for m in model.modules() if isinstance(m, AdaLoraLayer))
        layer.scaling["default"] = torch.linspace(0.5, 1.5, layer.out_features)
    peftkern.reset_stats()
    torch.testing.assert_close(ours(x), theirs(x))
    assert fallbacks() == {"scaling is no number": 1}


def test_patch_changes_classes_alone_and_unpatch_restores_them() -> None:
    model = adalora_llama()
    before, keys = copy.deepcopy(model.base_model.rankallocator.__dict__), list(model.state_dict())
    said = repr(model)
    report = peftkern.patch(model)
    assert report.kinds == {"adalora.SVDLinear": 14, "adalora.AdaLoraModel": 1}
    assert list(model.state_dict()) == keys and repr(model) == said
    assert peftkern.patch(model).patched == report.patched  # once more changes nothing
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer) is not SVDLinear and isinstance(layer, SVDLinear)
    assert peftkern.unpatch(model) == report.patched
    assert type(layer) is SVDLinear and type(model.base_model) is AdaLoraModel
    allocator = model.base_model.rankallocator
    assert type(allocator) is RankAllocator and allocator.__dict__.keys() == before.keys()
    assert peftkern.unpatch(model) == []


def test_patch_and_unpatch_in_the_middle_of_training() -> None:
    """PEFT and peftkern hand the EMAs over in both directions."""
    wanted, patterns = train(adalora_llama(), range(1, STEPS + 1))
    model = adalora_llama()
    optimizer = optimizer_of(model)
    got = []
    for steps in (range(1, 13), range(13, 23), range(23, 38), range(38, 39), range(39, STEPS + 1)):
        losses, seen = train(model, steps, optimizer)
        got += losses
        if isinstance(model.base_model.rankallocator, adalora.PatchedRankAllocator):
            peftkern.unpatch(model)
        else:
            peftkern.patch(model)
    assert_close_losses(got, wanted, LOSS_CURVE_RTOL)
    assert seen[-1] == patterns[-1]


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_patched_model_can_be_copied(way: str) -> None:
    model = adalora_llama()
    peftkern.patch(model)
    optimizer = optimizer_of(model)
    train(model, range(1, 20), optimizer)
    if way == "deepcopy":
        twin, twin_optimizer = copy.deepcopy((model, optimizer))
    else:
        twin, twin_optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    wanted = train(model, range(20, STEPS + 1), optimizer)
    assert train(twin, range(20, STEPS + 1), twin_optimizer) == wanted


def assert_close_logits(model: nn.Module, other: nn.Module) -> None:
    ids = text_batch()["input_ids"]
    torch.testing.assert_close(model(ids).logits, other(ids).logits, **LOGITS)


def test_saved_adapters_are_pefts(tmp_path: Path) -> None:
    models = adalora_llama(), adalora_llama()
    peftkern.patch(models[1])
    for model, name in zip(models, ("theirs", "ours"), strict=True):
        train(model, range(1, STEPS + 1))
        model.save_pretrained(tmp_path / name)
    folders = tmp_path / "theirs", tmp_path / "ours"
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    theirs, ours = ((folder / "adapter_config.json").read_text() for folder in folders)
    assert ours == theirs

    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    assert_close_logits(loaded, models[1].eval())
    peftkern.patch(loaded)
    assert_close_logits(loaded, models[1])
    assert isinstance(loaded(**text_batch()).loss, Tensor)  # PEFT: no trainable_adapter_name


def test_training_goes_on_after_saving_and_loading(tmp_path: Path) -> None:
    """The pruned adapter loads with its rank pattern and trains past the final mask."""
    model = adalora_llama()
    peftkern.patch(model)
    optimizer = optimizer_of(model)
    train(model, range(1, 45), optimizer)
    model.save_pretrained(tmp_path)  # takes the adapter's name out of the pattern's keys
    train(model, range(45, STEPS + 1), optimizer)
    fresh = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    peftkern.patch(fresh)
    train(fresh, range(45, STEPS + 1))
    pattern = fresh.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == 28


def test_an_adapter_saved_between_masks_trains_on_where_peft_crashes(tmp_path: Path) -> None:
    """It has fewer triplets than PEFT's budget counts at first."""
    schedule = {"total_step": 12, "tinit": 1, "tfinal": 3, "deltaT": 2}
    model = adalora_llama(**schedule)
    train(model, range(1, 7))
    model.save_pretrained(tmp_path)
    loaded = [
        PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True) for _ in range(2)
    ]
    with pytest.raises(RuntimeError, match="selected number k out of range"):
        train(loaded[0], range(7, 13))
    peftkern.patch(loaded[1])
    _, patterns = train(loaded[1], range(7, 13))
    assert sum(map(sum, patterns[-1].values())) == 28


@pytest.mark.parametrize("target_r", [pytest.param(6, marks=pytest.mark.long), 9])
def test_a_budget_of_everything_prunes_nothing(target_r: int) -> None:
    """PEFT's kthvalue refuses k = 0."""
    model = adalora_llama(target_r=target_r)
    with pytest.raises(Exception, match="kthvalue"):
        train(adalora_llama(target_r=target_r), range(1, 8))
    peftkern.patch(model)
    if target_r > 6:  # the budget grows past what there is
        assert model.base_model.rankallocator.target_bgt > 14 * 6
    _, patterns = train(model, range(1, STEPS + 1))
    assert all(all(kept) for kept in patterns[-1].values())


def test_missing_and_bad_gradients() -> None:
    model = adalora_llama()
    peftkern.patch(model)
    with pytest.raises(ValueError, match="before zero_grad"):
        model.base_model.update_and_allocate(1)
    triplet_grads(model, 1)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    for group in (layer.lora_A, layer.lora_E, layer.lora_B):
        group["default"].grad = None
    for step in range(1, 39):
        model.base_model.update_and_allocate(step)
    pattern = model.peft_config["default"].rank_pattern
    assert sum(pattern["model.layers.1.mlp.up_proj.lora_E.default"]) == 0
    assert sum(map(sum, pattern.values())) == 28

    model = adalora_llama()
    peftkern.patch(model)
    triplet_grads(model, 1)
    model.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].grad[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"not finite in model\.layers\.1\.mlp\.up_proj;"):
        model.base_model.update_and_allocate(1)


def test_scores_that_say_nothing_do_not_prune_everything() -> None:
    models = adalora_llama(tinit=0, deltaT=1), adalora_llama(tinit=0, deltaT=1)
    peftkern.patch(models[1])
    alive = []
    for model in models:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        model.base_model.update_and_allocate(1)
        alive.append(sum(map(sum, model.peft_config["default"].rank_pattern.values())))
    assert alive == [0, models[1].base_model.rankallocator.budget_schedule(1)[0]]


def test_masking_without_a_pattern_is_explained() -> None:
    model = adalora_llama()
    peftkern.patch(model)
    with pytest.raises(ValueError, match="rank_pattern: expected the pattern of step"):
        model.base_model.update_and_allocate(STEPS - 1)


def test_ranknum_does_not_drift() -> None:
    """PEFT lets the optimizer move it where the base is 16-bit, and forgets it when saving."""
    model = adalora_llama(torch.bfloat16)
    ranknums = [p for n, p in model.named_parameters() if "ranknum" in n]
    for p in ranknums:
        p.data = p.data.float()
        p.requires_grad_()
    peftkern.patch(model)
    train(model, range(1, 6))
    assert all(p.item() == 6.0 and not p.requires_grad for p in ranknums)


def test_orthogonality_term_is_pefts() -> None:
    theirs = adalora_llama(orth_reg_weight=0.7)
    ours = patched_copy(theirs)
    plain = theirs.base_model.model(**text_batch()).loss
    results = []
    for model in (theirs, ours):
        loss = model(**text_batch()).loss
        A = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
        results.append((loss.detach(), torch.autograd.grad(loss, A)[0]))
    assert results[0][0] > plain + 0.5
    torch.testing.assert_close(results[1], results[0])
    assert peftkern.stats().calls["adalora_orthogonality_backward", "cpu"] >= 1
    ours.peft_config["default"].orth_reg_weight = -1
    with pytest.raises(ValueError, match="orth_reg_weight"):
        ours(**text_batch())


def test_conv2d_layers_stay_pefts_but_are_allocated() -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.proj = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(self.conv(x).mean((2, 3)))

    patterns = []
    for patched in (False, True):
        torch.manual_seed(1)
        config = AdaLoraConfig(target_modules=["conv", "proj"], total_step=9, init_r=4, target_r=1)
        model = get_peft_model(Conv(), config)
        if patched:
            report = peftkern.patch(model)
            assert list(report.skipped.values()) == ["adalora.SVDConv2d has no kernel"]
        for step in range(1, 10):
            triplet_grads(model, step)
            model.base_model.update_and_allocate(step)
        patterns.append(model.peft_config["default"].rank_pattern)
    assert patterns[0] == patterns[1] and sum(map(sum, patterns[0].values())) == 2


def test_compaction_of_a_peft_model(tmp_path: Path) -> None:
    model = adalora_llama(orth_reg_weight=0.0)
    with pytest.raises(ValueError, match=r"after peftkern\.patch"):
        compact_(model)
    peftkern.patch(model)
    optimizer = optimizer_of(model)
    train(model, range(1, 38), optimizer)
    with pytest.raises(ValueError, match="have come back since"):
        compact_(model, optimizer)
    train(model, range(38, 42), optimizer)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    ranks = compact_(twin, twin_optimizer)
    assert sum(ranks.values()) == 28 and len(ranks) == 14
    for p, state in twin_optimizer.state.items():
        assert state["exp_avg"].shape == p.shape
    wanted = train(model, range(42, STEPS + 1), optimizer)[0]
    got = train(twin, range(42, STEPS + 1), twin_optimizer)[0]
    assert_close_losses(got, wanted, COMPACTED_RTOL)
    twin.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert_close_logits(loaded, twin.eval())


trainer = functools.partial(trainers.trainer, max_steps=20, gradient_accumulation_steps=2)


@pytest.mark.parametrize("patched", [False, True])
def test_trainer_allocates_with_the_callback(tmp_path: Path, patched: bool) -> None:
    model = adalora_llama(total_step=1000, tinit=2, tfinal=5, deltaT=2)
    seen, plain = [], model.base_model.update_and_allocate

    def spy(step: int) -> None:
        alive = [p for n, p in model.named_parameters() if "lora_A" in n and p.numel()]
        grads = [p.grad for p in alive]
        seen.append((step, all(g is not None and bool(g.abs().sum() >= 0) for g in grads)))
        plain(step)

    model.base_model.update_and_allocate = spy
    if patched:
        peftkern.patch(model)
    with pytest.warns(UserWarning, match="total_step of the AdaLoRA config is 1000"):
        trainer(model, tmp_path, [AdaLoraCallback()]).train()
    assert seen == [(step, True) for step in range(1, 21)]
    config = model.peft_config["default"]
    assert config.total_step == 20
    assert sum(map(sum, config.rank_pattern.values())) == 28
    alive = sum(int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n)
    assert alive <= 28


def test_callback_leaves_out_steps_that_the_scaler_skipped() -> None:
    from transformers import TrainerState

    model = adalora_llama(tinit=0, tfinal=2, deltaT=1, total_step=10)
    peftkern.patch(model)
    seen = []
    model.base_model.update_and_allocate = seen.append
    for step in range(10):
        state = TrainerState(global_step=step)
        optimizer = SimpleNamespace(step_was_skipped=step != 3)
        AdaLoraCallback().on_optimizer_step(None, state, None, model=model, optimizer=optimizer)
    assert seen == [4, 8, 9, 10]


def test_trainer_callback_complains(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="AdaLoRA adapter in training"):
        trainer(tiny_llama(), tmp_path, [AdaLoraCallback()]).train()
    model = adalora_llama(tinit=10, tfinal=10)
    with pytest.raises(ValueError, match="tinit, tfinal"):
        trainer(model, tmp_path, [AdaLoraCallback()]).train()
