"""`peftkern plan` against torch's own allocator: real models, real steps, on a CPU."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from plan_configs import LLAMA_CONFIG
from plan_steps import DTYPES, Measured, counted, nbytes
from tolerances import FUZZ_EXAMPLES, PLAN_RTOL
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import peftkern
from peftkern.tools.plan import plan as planning
from peftkern.tools.plan.plan import (
    PRESETS,
    Architecture,
    Training,
    from_config,
    largest,
    read_model,
)
from peftkern.tools.plan.training_step import Memory, Step

pytestmark = pytest.mark.usefixtures("small_layers")
LLAMA = Architecture(256, 2, 4, 2, 704, 1024, 64)
QWEN = Architecture(192, 2, 6, 2, 512, 1536, 32, tied=True, qkv_bias=True)


IN_TRANSFORMERS = {
    **{"vocabulary": "vocab_size", "hidden": "hidden_size", "intermediate": "intermediate_size"},
    **{"layers": "num_hidden_layers", "heads": "num_attention_heads", "head_dim": "head_dim"},
    **{"kv_heads": "num_key_value_heads", "tied": "tie_word_embeddings"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[Architecture, str]:
    """Random models as checkpoints: bitsandbytes quantizes while transformers loads."""
    made = {}
    for shape, config, kind in (
        (LLAMA, LlamaConfig, LlamaForCausalLM),
        (QWEN, Qwen2Config, Qwen2ForCausalLM),
    ):
        torch.manual_seed(0)
        names = {ours: getattr(shape, name) for name, ours in IN_TRANSFORMERS.items()}
        tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        made[shape] = str(tmp_path_factory.mktemp("model"))
        kind(config(**names, **tokens)).save_pretrained(made[shape])
    return made


def make_model(folder: str, training: Training) -> nn.Module:
    """The model that `training` describes, as a user of transformers and PEFT makes it."""
    loading = {"dtype": DTYPES[training.dtype], "attn_implementation": training.attention}
    if training.base == "nf4":
        loading["device_map"] = "cpu"
        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=training.double_quant,
            bnb_4bit_compute_dtype=DTYPES[training.dtype],
        )
    model = AutoModelForCausalLM.from_pretrained(folder, **loading)
    model.config.use_cache = False
    if training.checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    if training.method != "full":
        common = {
            "lora_dropout": training.dropout,
            "target_modules": list(training.targets),
            "task_type": "CAUSAL_LM",
        }
        if training.method == "adalora":
            steps = {"total_step": 100, "tinit": 5, "tfinal": 5}
            config = AdaLoraConfig(init_r=training.r, target_r=2, **steps, **common)
        else:
            config = LoraConfig(r=training.r, use_dora=training.method == "dora", **common)
        torch.manual_seed(1)
        model = get_peft_model(
            model, config, autocast_adapter_dtype=training.adapter_dtype == "fp32"
        )
    if training.patched:
        report = peftkern.patch(model)
        assert (report.skipped, report.falling_back) == ({}, {})
    return model.train()


def check(folders, shape: Architecture, training: Training) -> None:
    measured = vars(Measured(make_model(folders[shape], training), shape, training))
    count = counted(shape, training)
    for name in ("gradients", "states"):
        assert count[name] == measured[name], name
    for name in ("forward", "held", "step", "optimizer"):
        assert count[name] == pytest.approx(measured[name], rel=PLAN_RTOL), name


STEPS = [*itertools.product(("lora", "qlora"), ("fp32", "bf16"), (False, True), (False, True))]


@pytest.mark.parametrize(
    ("method", "dtype", "checkpointing", "patched", "sequence"),
    [  # half of them, in which each pair of choices occurs; half of these with each length
        pytest.param(*step, n, marks=[pytest.mark.long] * (i.bit_count() % 2 or n != lengths[0]))
        for i, step in enumerate(STEPS)
        for lengths in [(96, 224) if (i ^ i >> 1) & 2 else (224, 96)]
        for n in lengths
    ],
)
def test_step_agrees_with_the_allocator(folders, method, dtype, checkpointing, patched, sequence):
    choices = {"dtype": dtype, "checkpointing": checkpointing, "patched": patched}
    training = Training(method, r=8, batch=2, sequence=sequence, device="cpu", **choices)
    check(folders, LLAMA, training)


CPU = Training("lora", r=4, batch=2, patched=False, checkpointing=False, device="cpu")


@pytest.mark.parametrize(
    "training",
    [
        replace(CPU, dropout=0.1),
        replace(CPU, dropout=0.1, patched=True),
        replace(CPU, attention="eager", checkpointing=True),
        replace(CPU, attention="eager", patched=True),
        replace(CPU, adapter_dtype="bf16", targets=("q_proj", "v_proj"), patched=True),
        Training("qlora", r=32, batch=3, targets=("o_proj", "up_proj", "down_proj"), device="cpu"),
        replace(CPU, method="full"),
        replace(CPU, method="full", checkpointing=True),
        replace(CPU, method="dora"),
        replace(CPU, method="dora", base="nf4", checkpointing=True, dropout=0.1),
        replace(CPU, method="adalora"),
        replace(CPU, method="adalora", base="nf4", checkpointing=True),
        replace(CPU, method="adalora", patched=True),
        replace(CPU, method="lora", optimizer="sgd", base="nf4", dtype="fp32", double_quant=False),
    ],
    ids=lambda t: "-".join([t.method, t.base, t.attention, "peft" if not t.patched else "patched"]),
)
def test_step_of_a_model_with_biases_and_tied_embeddings_agrees(folders, training):
    check(folders, QWEN, replace(training, sequence=160))


def test_saved_tensors_are_those_that_torch_saves(folders):
    """Every activation by its size, for bf16 under PEFT alone and patched."""
    for patched in (False, True):
        training = replace(CPU, patched=patched, sequence=64)
        model = make_model(folders[LLAMA], training)
        frozen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved = {}

        def pack(tensor: Tensor, saved=saved, frozen=frozen) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in frozen:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        ids = torch.randint(LLAMA.vocabulary, (2, 64))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(input_ids=ids, labels=ids).loss
        step = Step(planning.step_shapes(LLAMA, training), Memory())
        out = step.forward()
        buffers = {id(b): b.nbytes for node in step.nodes for b in node.saved}
        small = 8 * 2 * 64 + 4  # labels, and the weight of the mean
        assert sorted(n for n in saved.values() if n > small) == sorted(
            n for n in buffers.values() if n > small
        )
        del loss, out


@pytest.mark.parametrize(
    ("shape", "dtype", "base"),
    [
        *((LLAMA, "fp32", "dense"), (LLAMA, "bf16", "nf4"), (LLAMA, "fp32", "nf4-single")),
        *((QWEN, "bf16", "dense"), (QWEN, "fp32", "nf4"), (QWEN, "bf16", "nf4-single")),
    ],
)
def test_weights_are_counted_to_the_byte(folders, shape, dtype, base):
    training = Training(
        "lora" if base == "dense" else "qlora", r=4, dtype=dtype, double_quant=base == "nf4"
    )
    model = make_model(folders[shape], training)
    found = dict.fromkeys(("linear layers", "embeddings", "lm_head", "norms, biases"), 0)
    found["adapters"] = 0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "lora_" in name:
            part = "adapters"
        elif "embed_tokens" in name:
            part = "embeddings"
        elif "lm_head" in name:
            part = "lm_head"
        elif "_proj" in name and not name.endswith("bias"):
            part = "linear layers"
        else:
            part = "norms, biases"
        found[part] += nbytes([tensor, *_tables(tensor)])
    fixed = planning.plan(shape, training).fixed
    assert {name: fixed[name] for name in found} == found


def _tables(weight: Tensor) -> list[Tensor]:
    """What bitsandbytes keeps beside a quantized weight."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return []
    nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return [state.absmax, state.code, *nested]


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("adamw-8bit", bnb.optim.AdamW8bit), ("adamw-32bit", bnb.optim.AdamW32bit)],
)
def test_states_of_bitsandbytes_optimizers_are_counted_to_the_byte(folders, name, optimizer):
    training = replace(CPU, optimizer=name, r=16)  # some adapters are too small for 8 bits
    model = make_model(folders[QWEN], training)
    trained = [p for p in model.parameters() if p.requires_grad]
    states = optimizer(trained)
    for p in trained:
        p.grad = torch.ones_like(p)
    states.step()
    own = ("state1", "state2", "absmax1", "absmax2")  # the rest is shared between tensors
    held = [state[key] for state in states.state.values() for key in own if key in state]
    assert planning.plan(QWEN, training).fixed["optimizer states"] == nbytes(held)


@pytest.mark.parametrize("patched", [False, True], ids=["peft", "patched"])
def test_importance_of_adalora_is_counted_to_the_byte(folders, patched):
    training = Training("adalora", r=4, dtype="fp32", patched=patched, device="cpu")
    model = make_model(folders[QWEN], training)
    ids = torch.randint(QWEN.vocabulary, (1, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    allocator = model.base_model.rankallocator
    allocator.update_ipt(model.base_model)
    names = ("exp_avg_ipt", "exp_avg_unc", *(() if patched else ("ipt",)))
    held = nbytes(t for name in names for t in getattr(allocator, name).values())
    assert planning.plan(QWEN, training).fixed["importance"] == held


def test_llama_65b_in_4_bits_trains_within_48_gb():
    """The published count: linear layers 33.4 GB, embeddings and lm_head 1.05, adapters with their
    gradients 3.2, Adam's states in float32 6.4."""
    training = Training(
        "qlora", r=64, adapter_dtype="bf16", optimizer="paged-adamw", sequence=512, patched=True
    )
    plan = planning.plan(PRESETS["llama-65b"], training)
    gb = {name: count / 1e9 for name, count in plan.fixed.items()}
    assert gb["linear layers"] == pytest.approx(33.4, abs=0.05)
    assert gb["embeddings"] + gb["lm_head"] == pytest.approx(1.05, abs=0.005)
    gradients = plan.phases["optimizer"]["gradients"] / 1e9
    assert gb["adapters"] + gradients == pytest.approx(3.2, abs=0.005)
    assert gb["optimizer states"] == pytest.approx(6.4, abs=0.005)
    assert plan.phases["forward"]["checkpoints"] == 80 * 512 * 8192 * 2
    assert plan.totals["optimizer"] / 1e9 == pytest.approx(44.05, abs=0.05)
    assert plan.peak < 48e9
    full = planning.plan(PRESETS["llama-65b"], Training("full", sequence=512))
    assert full.peak > 4 * 2 * 65e9  # weights, gradients and two states in bf16


PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama-65b": 65_285_660_672,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "olmoe-1b-7b": 6_919_161_856,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_number_of_parameters(name):
    training = Training(sequence=8, targets=PRESETS[name].targets())
    assert planning.plan(PRESETS[name], training).parameters == PUBLISHED[name]


@pytest.mark.parametrize(
    ("preset", "config"), [("llama2-7b", LlamaConfig()), ("mistral-7b", MistralConfig())]
)
def test_preset_is_what_transformers_defaults_to(preset, config):
    assert from_config(config.to_dict()) == PRESETS[preset]


trainings = st.builds(
    Training,
    **{name: st.sampled_from(names) for name, names in planning.ACCEPTED.items() if name != "base"},
    r=st.integers(1, 40),
    batch=st.integers(1, 5),
    sequence=st.integers(1, 300),
    checkpointing=st.booleans(),
    patched=st.booleans(),
    dropout=st.sampled_from([0.0, 0.1]),
    targets=st.lists(st.sampled_from(planning.MODULES), min_size=1, unique=True).map(tuple),
)


@settings(max_examples=FUZZ_EXAMPLES // 5)
@given(trainings, st.sampled_from(["batch", "sequence", "r"]), st.integers(1, 50))
def test_more_of_anything_takes_no_less(training, name, more):
    plan = planning.plan(QWEN, training)
    counts = [*plan.fixed.values(), *(n for p in plan.phases.values() for n in p.values())]
    assert min(counts) >= 0
    grown = replace(training, **{name: getattr(training, name) + more})
    after = planning.plan(QWEN, grown).totals
    assert all(after[phase] >= total for phase, total in plan.totals.items())


@settings(max_examples=FUZZ_EXAMPLES // 8)
@given(trainings)
def test_parts_sum_to_the_total_and_everything_is_freed(training):
    memory = Memory(512 if training.device == "cuda" else 1)
    step = Step(planning.step_shapes(QWEN, training), memory)
    for peak, parts in step.run().values():
        assert sum(parts.values()) == peak
    assert memory.total == memory.live["gradients"] == sum(memory.live.values())
    step.gradients.clear()
    assert memory.total == 0


@pytest.mark.parametrize("name", ["batch", "sequence"])
def test_largest_is_the_last_that_fits(name):
    training = Training(sequence=64, device="cpu")
    budget = planning.plan(LLAMA, replace(training, batch=3, sequence=70)).peak
    found = largest(LLAMA, training, name, budget)
    assert found > 1
    assert planning.plan(LLAMA, replace(training, **{name: found})).peak <= budget
    assert planning.plan(LLAMA, replace(training, **{name: found + 1})).peak > budget
    assert largest(LLAMA, training, name, 1000) == 0


def test_config_of_a_saved_model_gives_its_dimensions(folders, tmp_path):
    for shape, folder in folders.items():
        assert read_model(folder) == shape
    config = {"model_type": "llama", "attention_bias": True, "mlp_bias": True}
    config |= {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config |= {"intermediate_size": 96, "vocab_size": 32}
    path = tmp_path / "any.json"
    path.write_text(json.dumps(config))
    biases = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
    assert read_model(str(path)) == Architecture(64, 1, 4, 4, 96, 32, 16, **biases)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"model_type": "mamba"},
            "model_type: expected one of llama, mistral, qwen2, mixtral, olmoe, qwen3_moe, "
            "got 'mamba'",
        ),
        ({"hidden_size": None}, "hidden_size: expected an integer from 1 to 4294967296, got None"),
        ({"vocab_size": 1.5}, "vocab_size: expected an integer from 1 to 4294967296, got 1.5"),
        ({"num_hidden_layers": True}, "num_hidden_layers: expected .* 1 to 1000, got True"),
        ({"num_attention_heads": 7}, "num_attention_heads: expected a divisor of 64, got 7"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of 4, got 3"),
    ],
)
def test_wrong_config_is_refused_in_words(tmp_path, changes, complaint):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_CONFIG, **changes}))
    with pytest.raises(ValueError, match=complaint):
        read_model(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"method": "prefix"}, "method: expected one of lora, qlora"),
        ({"r": 0}, "r: expected an integer from 1 to 4294967296, got 0"),
        ({"sequence": 2.0}, "sequence: expected"),
        ({"dropout": 1.0}, "dropout: expected"),
        ({"targets": ("q_proj", "wq")}, "targets: expected .* got wq"),
        ({"targets": ()}, "targets: expected .* got none"),
        ({"method": "qlora", "base": "bf16"}, "base: qlora has an nf4 base"),
        ({"method": "full", "base": "nf4"}, "base: method full"),
        ({"base": "fp32", "dtype": "bf16"}, "base: expected nf4 or"),
        ({"optimizer": "lion"}, "optimizer: expected"),
    ],
)
def test_wrong_training_is_refused_in_words(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        Training(**changes)
