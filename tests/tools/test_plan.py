"""`peftkern plan` against torch's own allocator: real models, real steps, on a CPU."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from plan_configs import LLAMA_CONFIG
from plan_steps import DTYPES, check, counted, measured, nbytes, tables
from tiny_models import tiny_config
from tolerances import PLAN_RTOL
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DeepseekV3Config,
    LlamaConfig,
    MistralConfig,
    OlmoeConfig,
    Qwen2Config,
)

import peftkern
from peftkern.tools.plan import plan as planning
from peftkern.tools.plan import step
from peftkern.tools.plan.plan import Planner, Training, largest, read_model
from peftkern.tools.plan.presets import PRESETS

pytestmark = pytest.mark.usefixtures("small_layers")
NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
SIZES = {"num_hidden_layers": 2, "num_key_value_heads": 2, **NO_TOKENS}
LLAMA = LlamaConfig(hidden_size=256, num_attention_heads=4, intermediate_size=704, **SIZES)
QWEN = Qwen2Config(hidden_size=192, num_attention_heads=6, intermediate_size=512, **SIZES)
LLAMA.vocab_size, QWEN.vocab_size, QWEN.tie_word_embeddings = 1024, 1536, True


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Random models as checkpoints: bitsandbytes quantizes while transformers loads."""
    made = {}
    for config in (LLAMA, QWEN):
        torch.manual_seed(0)
        made[config.model_type] = str(tmp_path_factory.mktemp("model"))
        AutoModelForCausalLM.from_config(config).save_pretrained(made[config.model_type])
    return made


def make_model(folders: dict[str, str], config, training: Training) -> nn.Module:
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
    model = AutoModelForCausalLM.from_pretrained(folders[config.model_type], **loading)
    model.config.use_cache = False
    if training.prepare_kbit:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, training.checkpointing)
    if training.checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    if training.method != "full":
        targets = list(training.targets)
        common = {
            "lora_dropout": training.dropout,
            "target_modules": "all-linear" if targets == ["all-linear"] else targets,
            "task_type": "CAUSAL_LM",
        }
        if training.method == "adalora":
            steps = {"total_step": 100, "tinit": 5, "tfinal": 5}
            adapters = AdaLoraConfig(init_r=training.r, target_r=2, **steps, **common)
        else:
            adapters = LoraConfig(r=training.r, use_dora=training.method == "dora", **common)
        torch.manual_seed(1)
        wide = training.adapter_dtype == "fp32"
        model = get_peft_model(model, adapters, autocast_adapter_dtype=wide)
    if training.patched:
        report = peftkern.patch(model)
        assert (report.skipped, report.falling_back) == ({}, {})
    return model.train()


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
    check(make_model(folders, LLAMA, training), LLAMA, training)


SHARED, ZERO3 = ({"devices": 2, "shard": name} for name in ("fsdp2", "zero3"))
CPU = Training("lora", r=4, batch=2, sequence=160, patched=False, checkpointing=False, device="cpu")


@pytest.mark.parametrize(
    "training",
    [
        replace(CPU, patched=True),
        replace(CPU, patched=True, checkpointing=True),
        replace(CPU, patched=True, base="nf4", dropout=0.1),
    ],
)
def test_a_first_step_has_the_peak_of_the_plan(folders, training):
    """Its layers copy what the model may write to, as no later step does."""
    model = make_model(folders, LLAMA, training)
    first, count = measured(model, training, first=True), counted(LLAMA, training)
    assert first == {name: pytest.approx(count[name], rel=PLAN_RTOL) for name in first}
    later = measured(model, training)
    assert max(first.values()) > max(later["forward"], later["backward"])


def more(training: Training):
    """What other cases have under checkpointing, over NF4 or patched."""
    return pytest.param(training, marks=pytest.mark.more)


@pytest.mark.parametrize(
    "training",
    [
        replace(CPU, dropout=0.1),
        replace(CPU, dropout=0.1, patched=True),
        replace(CPU, attention="eager", checkpointing=True),
        more(replace(CPU, attention="eager", patched=True)),
        replace(CPU, adapter_dtype="bf16", targets=("q_proj", "v_proj"), patched=True),
        Training("qlora", r=32, batch=3, targets=("o_proj", "up_proj", "down_proj"), device="cpu"),
        more(replace(CPU, method="full")),
        replace(CPU, method="full", checkpointing=True),
        more(replace(CPU, method="dora")),
        replace(CPU, method="dora", patched=True),
        replace(CPU, method="dora", base="nf4", checkpointing=True, dropout=0.1),
        more(replace(CPU, method="adalora")),
        replace(CPU, method="adalora", base="nf4", checkpointing=True),
        replace(CPU, method="adalora", patched=True),
        replace(CPU, method="lora", optimizer="sgd", base="nf4", dtype="fp32", double_quant=False),
        replace(CPU, autocast=True, base="nf4", patched=True),
        more(replace(CPU, autocast=True, dtype="fp32", base="fp32")),
        more(replace(CPU, prepare_kbit=True, base="nf4", checkpointing=True)),
        replace(CPU, prepare_kbit=True, autocast=True, base="nf4", patched=True),
    ],
    ids=lambda t: "-".join([t.method, t.base, t.attention, "peft" if not t.patched else "patched"]),
)
def test_step_of_a_model_with_biases_and_tied_embeddings_agrees(folders, training):
    training = replace(training, sequence=160)
    check(make_model(folders, QWEN, training), QWEN, training)


def test_any_config_of_peft_is_planned():
    """In the place of method, r, targets and dropout."""
    given = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}
    found = planning.plan(LLAMA, replace(CPU, adapter=given, r=99))
    assert found == planning.plan(LLAMA, replace(CPU, targets=("q_proj", "v_proj")))
    found = planning.plan(LLAMA, replace(CPU, adapter={"peft_type": "IA3"}))
    assert 0 < found.trainable < 10_000


@pytest.mark.parametrize(
    ("config", "dtype", "base"),
    [
        *((LLAMA, "fp32", "dense"), (LLAMA, "bf16", "nf4"), (LLAMA, "fp32", "nf4-single")),
        *((QWEN, "bf16", "dense"), (QWEN, "fp32", "nf4"), (QWEN, "bf16", "nf4-single")),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_weights_are_counted_to_the_byte(folders, config, dtype, base):
    training = Training(
        "lora" if base == "dense" else "qlora", r=4, dtype=dtype, double_quant=base == "nf4"
    )
    training = replace(training, sequence=8)
    model = make_model(folders, config, training)
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
        found[part] += nbytes([tensor, *tables(tensor)])
    fixed = planning.plan(config, training).fixed
    assert {name: fixed.get(name, 0) for name in found} == found


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("adamw-8bit", bnb.optim.AdamW8bit), ("adamw-32bit", bnb.optim.AdamW32bit)],
)
def test_states_of_bitsandbytes_optimizers_are_counted_to_the_byte(folders, name, optimizer):
    training = replace(CPU, optimizer=name, r=16)  # some adapters are too small for 8 bits
    model = make_model(folders, QWEN, training)
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
    training = Training("adalora", r=4, dtype="fp32", patched=patched, device="cpu", sequence=8)
    model = make_model(folders, QWEN, training)
    ids = torch.randint(QWEN.vocab_size, (1, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    allocator = model.base_model.rankallocator
    allocator.update_ipt(model.base_model)
    names = ("exp_avg_ipt", "exp_avg_unc", *(() if patched else ("ipt",)))
    held = nbytes(t for name in names for t in getattr(allocator, name).values())
    if patched:
        held += nbytes([allocator._importance.scores])
    assert planning.plan(QWEN, training).fixed["importance"] == held


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [
        pytest.param("llama", True, marks=pytest.mark.long),
        pytest.param("llama", False, marks=pytest.mark.long),
        ("gemma3_text", False),
        pytest.param("gpt_oss", False, marks=pytest.mark.long),
        ("gpt_oss", True),
    ],
)
def test_layers_that_were_not_run_are_counted_as_if_they_were(kind, checkpointing, monkeypatch):
    """Two of each kind and three, then a line; the kinds of gpt-oss and Gemma alternate.

    Of the work that is the sums: ops over lists, a fused optimizer's, grow with the layers.
    """
    config = tiny_config(kind)
    config.num_hidden_layers = 7
    if kind != "llama":
        config.layer_types = (config.layer_types * 7)[:7]
    training = Training(r=4, sequence=48, checkpointing=checkpointing)
    extended = planning.plan(config, training).as_dict()
    monkeypatch.setattr(step, "_RUN", 7)
    assert planning.plan(config, training).as_dict() == extended


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
    "llama3-405b": 405_853_388_800,
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
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_number_of_parameters(name):
    from peftkern.tools.models import empty_model, from_config

    model = empty_model(from_config(PRESETS[name]), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("preset", "config"),
    [
        ("llama2-7b", LlamaConfig()),
        ("mistral-7b", MistralConfig()),
        ("deepseek-v3", DeepseekV3Config()),
        ("olmoe-1b-7b", OlmoeConfig(intermediate_size=1024)),
    ],
)
def test_preset_is_what_transformers_defaults_to(preset, config):
    default = config.to_dict()
    assert {
        key: default[key] for key in PRESETS[preset] if default.get(key) is not None
    }.items() <= (PRESETS[preset].items())


@pytest.mark.parametrize("method", ["lora", "qlora", "adalora", "full"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_more_of_anything_takes_no_less(method, device):
    training = Training(method, r=4, sequence=40, device=device, checkpointing=device == "cuda")
    planner = Planner(LLAMA, training)
    plan = planner.plan()
    counts = [*plan.fixed.values(), *(n for p in plan.phases.values() for n in p.values())]
    assert min(counts) >= 0
    grown = [planner.plan(batch=2), planner.plan(sequence=41), planner.plan(batch=3, sequence=64)]
    grown += [planning.plan(LLAMA, replace(training, r=7))]
    for after in grown:
        assert all(after.totals[phase] >= total for phase, total in plan.totals.items())


@pytest.mark.parametrize("name", ["batch", "sequence"])
def test_largest_is_the_last_that_fits(name):
    training = Training(sequence=64, device="cpu")
    budget = planning.plan(LLAMA, replace(training, batch=3, sequence=70)).peak
    found = largest(LLAMA, training, name, budget)
    assert found > 1
    assert planning.plan(LLAMA, replace(training, **{name: found})).peak <= budget
    assert planning.plan(LLAMA, replace(training, **{name: found + 1})).peak > budget
    assert largest(LLAMA, training, name, 1000) == 0


def test_config_of_a_saved_model_is_read(folders, tmp_path):
    for kind, folder in folders.items():
        assert (
            read_model(folder).to_diff_dict() == AutoConfig.from_pretrained(folder).to_diff_dict()
        )
        assert read_model(folder).model_type == kind
    path = tmp_path / "any.json"
    path.write_text(json.dumps({**LLAMA_CONFIG, "quantization_config": {"quant_method": "mxfp4"}}))
    found = read_model(str(path))
    assert found.hidden_size == 64 and not hasattr(found, "quantization_config")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "llama9"}, "model_type 'llama9'"),
        ({"model_type": None}, "expected the config of a transformers model"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"vocab_size": 1.5}, "vocab_size"),
        ({"num_attention_heads": 7}, "num_attention_heads|attention heads"),
        ({"num_key_value_heads": 3}, "model: a step of it does not run"),
        ({"model_type": "vit"}, "model: model_type 'vit' does not learn from tokens alone"),
    ],
)
def test_wrong_config_is_refused_in_words(tmp_path, changes, complaint):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_CONFIG, **changes}))
    with pytest.raises(ValueError, match=complaint) as caught:
        planning.plan(read_model(str(tmp_path)), Training(sequence=8))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"method": "prefix"}, "method: expected one of lora, qlora"),
        ({"r": 0}, "r: expected an integer from 1 to 4294967296, got 0"),
        ({"sequence": 2.0}, "sequence: expected"),
        ({"dropout": 1.0}, "dropout: expected"),
        ({"method": "qlora", "base": "bf16"}, "base: qlora has a 4-bit base"),
        ({"method": "full", "base": "nf4"}, "base: method full"),
        (
            {"base": "fp32", "dtype": "bf16"},
            "base: expected one of nf4, fp4, .*, int4, or",
        ),
        ({"optimizer": "lion"}, "optimizer: expected"),
        ({"base": "int4", "blocksize": 16}, "blocksize: expected one of 32, .* in int4, got 16"),
        ({"base": "mxfp4", "blocksize": 64}, "blocksize: expected 32 in mxfp4, got 64"),
        ({"blocksize": 64}, "blocksize: expected none in a dense"),
        ({"target_r": 2}, "target_r: expected none, as only adalora"),
        (
            {"method": "adalora", "r": 8, "target_r": 9},
            "target_r: expected an integer from 1 to 8, .* got 9",
        ),
        ({"method": "adalora", "target_r": 0}, "target_r: expected an integer from 1"),
        ({**SHARED, "devices": 0}, "devices: expected an integer from 1 to"),
        (
            {"devices": 2},
            "devices: expected 1 unless the model is shared by ddp, fsdp2 or zero3, got 2",
        ),
        ({"shard": "fsdp2"}, "devices: fsdp2 needs at least 2, got 1"),
        ({**SHARED, "shard": "fsdp"}, "shard: expected one of ddp, fsdp2, zero3, got 'fsdp'"),
        (
            {**SHARED, "shard": "ddp", "param_dtype": "bf16"},
            "param_dtype: an option of shard fsdp2, .*ddp",
        ),
        ({**ZERO3, "reshard": False}, "reshard: an option of shard fsdp2, got .*zero3"),
        ({**SHARED, "param_dtype": "fp16"}, "param_dtype: expected one of bf16, fp32, got 'fp16'"),
        ({**SHARED, "method": "adalora"}, "shard: adalora is planned on ddp alone, got fsdp2"),
        ({**SHARED, "base": "int4"}, "base: int4 is planned on one device or"),
    ],
)
def test_wrong_training_is_refused_in_words(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        Training(**changes)


LORA = {"peft_type": "LORA"}


@pytest.mark.parametrize(
    ("kind", "changes", "complaint"),
    [
        (
            "llama",
            {"targets": ("q_proj", "wq")},
            "--targets: 'wq' is no linear layer; accepted: all-linear",
        ),
        ("llama", {"targets": ()}, "--targets: '' is no linear layer; accepted"),
        ("llama", {"targets": ("gate_up_proj",)}, "'gate_up_proj' is no linear layer"),
        ("llama", {"adapter": {"peft_type": "LORAX"}}, "adapter: PEFT has no such config"),
        ("llama", {"adapter": {**LORA, "rank": 3}}, "adapter: PEFT has no such config"),
        ("llama", {"adapter": {**LORA, "target_modules": ["wq"]}}, "adapter: .*wq"),
        ("llama", {"base": "int4"}, "base: int4 does not fit a layer: shape: .* multiple of 128"),
        ("mixtral", {"targets": ("gate_proj",)}, "--targets: 'gate_proj' .*: .*gate_up_proj"),
        ("mixtral", {"method": "dora"}, "targets: experts' down_proj, gate_up_proj .* not of dora"),
        ("mixtral", {"method": "adalora"}, "targets: .* not of adalora; name linear layers"),
        ("mixtral", {"base": "mxfp4"}, "base: experts are kept in nf4, .* got mxfp4 for mixtral"),
        ("mixtral", {**SHARED, "base": "nf4"}, "base: experts in nf4 are whole .* got fsdp2"),
        ("mixtral", {**ZERO3, "base": "nf4"}, "base: experts in nf4 are whole .* got zero3"),
        ("gpt_oss", {"base": "fp4"}, "base: experts are kept in nf4, .* got fp4 for gpt_oss"),
    ],
)
def test_training_that_a_model_cannot_have_is_refused_in_words(kind, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        planning.plan(tiny_config(kind), replace(CPU, **changes))


@pytest.mark.parametrize("missing", ["transformers", "peft", "bitsandbytes"])
def test_a_library_that_is_missing_is_named_in_one_line(missing, monkeypatch):
    for name in ("build", "step"):
        monkeypatch.delitem(sys.modules, f"peftkern.tools.plan.{name}", raising=False)
        monkeypatch.delattr(f"peftkern.tools.plan.{name}", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=f"planning needs transformers and PEFT.*{missing}"):
        planning.plan(LLAMA_CONFIG, Training("qlora", sequence=8))
