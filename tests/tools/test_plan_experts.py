"""`peftkern plan` of many architectures, experts among them, against torch's own allocator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import bench_plan
import pytest
from plan_steps import check, nbytes
from tiny_models import ARCHITECTURES, make_model, tiny_config
from tolerances import PLAN_RTOL

from peftkern.layers.nf4_stack import NF4Stack
from peftkern.tools.bench.record import OURS
from peftkern.tools.plan import plan as planning
from peftkern.tools.plan.plan import Training
from peftkern.tools.plan.presets import PRESETS

pytestmark = pytest.mark.usefixtures("small_layers")
CPU = Training("lora", r=8, batch=2, sequence=160, device="cpu")
MIXTURES = ("mixtral", "qwen3_moe", "olmoe")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


# Of layers that no other has: Conv1D, an encoder, images, sinks and biases of experts, latent
# attention. The rest are Llamas to a plan, or mixtures, which are stepped below, too.
UNLIKE = ("llama", "gpt2", "t5", "gemma3", "gpt_oss", "deepseek_v3")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[pytest.mark.more] * (k not in UNLIKE)) for k in ARCHITECTURES],
)
def test_plan_of_an_architecture_agrees_with_the_allocator(kind):
    """As it is recorded in bench/results."""
    providers = bench_plan.case(kind)["providers"]
    assert set(providers) == {OURS, "PEFT"}
    for row in providers.values():
        assert row["planned_bytes"] == pytest.approx(row["peak_bytes"], rel=PLAN_RTOL)


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize(
    "training",
    [
        replace(CPU, dtype="fp32", base="fp32", checkpointing=False),
        replace(CPU, targets=("q_proj", "down_proj")),
        replace(CPU, targets=ATTENTION, checkpointing=False, patched=False),
        pytest.param(replace(CPU, targets=ATTENTION, dtype="fp32", base="fp32")),
    ],
    ids=["all-fp32", "down", "frozen-peft", "frozen-checkpointed"],
)
def test_step_agrees_with_the_allocator(kind, training):
    check(make_model(kind, training), tiny_config(kind), training)


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("base", ["bf16", "nf4"])
def test_weights_are_counted_to_the_byte(kind, base):
    training = replace(CPU, base=base, patched=base == "bf16", sequence=8)
    model = make_model(kind, training)
    found = dict.fromkeys(("experts", "routers", "adapters", "norms, biases"), 0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "lora_" in name:
            found["adapters"] += nbytes([tensor])
        elif isinstance(tensor, NF4Stack):
            found["experts"] += nbytes([tensor._packed, tensor._absmax])
        elif ".experts." in name:
            found["experts"] += nbytes([tensor])
        elif name.endswith("mlp.gate.weight"):
            found["routers"] += nbytes([tensor])
        elif "norm" in name or "inv_freq" in name:
            found["norms, biases"] += nbytes([tensor])
    fixed = planning.plan(tiny_config(kind), replace(training, patched=True)).fixed
    assert {name: fixed[name] for name in found} == found


def test_all_parts_of_a_large_mixture():
    """Qwen3-30B-A3B, r=16 on everything: the factors of all experts, and their optimizer's states,
    outweigh the experts in NF4."""
    model = PRESETS["qwen3-30b-a3b"]
    fixed: dict[str, Any] = planning.plan(model, Training("qlora", sequence=64)).fixed
    factors = 48 * 128 * 16 * (2048 + 1536 + 768 + 2048) * 4
    assert fixed["adapters"] > factors
    assert fixed["optimizer states"] > 2 * factors > fixed["experts"] * 0.25
    assert fixed["experts"] == 48 * 128 * 3 * 2048 * 768 * 9 // 16


def test_a_gpu_s_step_of_experts_is_not_in_blocks_of_a_cpu_s_cache():
    """A plan's tensors are a CPU's, but a GPU takes the gradients of all experts' gates at once."""
    planner = planning.Planner(tiny_config("mixtral"), replace(CPU, device="cuda", batch=1))
    few, many = (planner.plan(sequence=length).work.ops.values() for length in (64, 2048))
    assert sum(few) == sum(many)
