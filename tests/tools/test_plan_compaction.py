"""What `peftkern plan` says of AdaLoRA's compaction, against a model that is compacted."""

from __future__ import annotations

from dataclasses import replace

import pytest
from adalora_models import optimizer_of
from peft import AdaLoraConfig, get_peft_model
from peft_models import text_batch
from transformers import LlamaConfig, LlamaForCausalLM

import peftkern
from peftkern.integrations.peft.adalora_compact import compact_
from peftkern.integrations.peft.adalora_layers import layers_of
from peftkern.tools.plan.plan import Planner, Training
from peftkern.tools.plan.rates import Rates
from peftkern.tools.plan.work import Work

pytestmark = pytest.mark.usefixtures("small_layers")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 64}
CONFIG = LlamaConfig(**SIZES, num_attention_heads=2, num_key_value_heads=2)
R, TARGET, TOKENS = 8, 2, 40
TRAINING = Training(
    "adalora",
    r=R,
    target_r=TARGET,
    dtype="fp32",
    sequence=TOKENS,
    checkpointing=False,
    device="cpu",
)


@pytest.fixture(scope="module")
def planner():
    return Planner(CONFIG, TRAINING)


@pytest.fixture(scope="module")
def plans(planner):
    return planner.compacted()


def test_bytes_are_those_of_a_compacted_model(plans):
    linear = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config = AdaLoraConfig(init_r=R, total_step=10, **linear)
    model = get_peft_model(LlamaForCausalLM(CONFIG), config)
    peftkern.patch(model)
    optimizer = optimizer_of(model)
    model(**text_batch()).loss.backward()
    optimizer.step()
    kept = [True] * TARGET + [False] * (R - TARGET)
    tuner, pattern = model.base_model, {}
    for path, layer in layers_of(tuner).items():
        layer.lora_E["default"].data[TARGET:] = 0
        pattern[f"{path}.lora_E.default"] = kept
    tuner.peft_config["default"].rank_pattern = pattern

    def check(plan) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        assert plan.trainable == sum(p.numel() for p in trained)
        assert plan.phases["optimizer"]["gradients"] == sum(p.nbytes for p in trained)
        states = [v for held in optimizer.state.values() for v in held.values() if v.dim()]
        steps = 4 * len(trained)  # a count for each parameter
        assert plan.fixed["optimizer states"] == sum(v.nbytes for v in states) + steps
        adapters = [p for n, p in model.named_parameters() if "lora_" in n or "ranknum" in n]
        assert plan.fixed["adapters"] == sum(p.nbytes for p in adapters)
        assert "importance" not in plan.fixed

    check(plans[0])
    compact_(model, optimizer)
    check(plans[1])


def test_work_is_the_products_of_a_step(planner, plans):
    """4 products of tokens with each weight but the embedding, 6 with each adapter, 7 of them with
    each other in attention, and the Gram matrix of each factor with its gradient."""
    before, after = (plan.work for plan in plans)
    linear = 4 * (4 * 64 * 64 + 3 * 64 * 96)
    elements = 4 * (4 * (64 + 64) + 3 * (64 + 96))
    adapters = 6 * TOKENS * elements
    grams, fewer = ((r * (r + 1) + 2 * r**2) * elements for r in (R, TARGET))
    fallen = (R - TARGET) * adapters + grams - fewer
    assert before.flops - after.flops == pytest.approx(fallen, rel=0.02)
    attention = 4 * 7 * 2 * TOKENS**2 * 64
    no_gradient = 3 * 2 * TOKENS * 64 * (64 + R)  # goes from q, k and v to the embedding
    base = before.flops - R * adapters - grams - attention + no_gradient
    assert base == 4 * TOKENS * (linear + 64 * 64)
    # AdamW reads a parameter, its gradient and two states, and writes three of them, at least.
    assert before.nbytes - after.nbytes > 28 * (R - TARGET) * elements
    assert planner.plan().work.nbytes > before.nbytes  # with the importance


def test_several_devices_send_less_of_what_is_compacted():
    pruned, compacted = Planner(CONFIG, replace(TRAINING, devices=2, shard="ddp")).compacted()
    sizes = [one.communication["all-reduce, backward"]["bytes"] for one in (pruned, compacted)]
    assert sizes == [4 * pruned.trainable, 4 * compacted.trainable]


def test_an_op_takes_the_time_of_its_arithmetic_or_of_its_traffic():
    rates = Rates(flops=100.0, memory=10.0, cache=20.0, cache_bytes=40)
    work = Work({("step", 200, 10): 3, ("step", 0, 40): 2, ("step", 0, 100): 1})
    assert work.seconds(rates) == 3 * 2 + 2 * 2 + 10
    assert (work.flops, work.nbytes) == (600, 210)


def test_bitsandbytes_states_shrink_as_well():
    training = replace(TRAINING, optimizer="paged-adamw")
    before, after = Planner(CONFIG, training).compacted()
    states = [plan.fixed["optimizer states"] for plan in (before, after)]
    assert states == [8 * plan.trainable for plan in (before, after)]
    assert states[1] * R == states[0] * TARGET


def test_a_config_of_peft_s_has_a_budget_too():
    adapter = {"peft_type": "ADALORA", "init_r": R, "target_r": 3, "total_step": 9}
    adapter["target_modules"] = ["q_proj"]
    plan = Planner(CONFIG, replace(TRAINING, method="lora", adapter=adapter)).compacted()[1]
    assert plan.trainable == 4 * TARGET * (1 + 64 + 64)
