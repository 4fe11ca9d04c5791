"""Which weights are quantized: those that transformers would, so that it loads the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from checkpoint_folders import LLAMA, configure, save_llama
from quantized_folders import convert
from tolerances import ABSMAX_CODE_BIN, ABSMAX_CODE_MISMATCH, DYNAMIC_MAP_RTOL, NF4_MAX_HALF_GAP
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaModel,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5Model,
)

import peftkern
from peftkern.formats.nf4 import NF4Weight, dynamic_map
from peftkern.tools.checkpoints.checkpoint import CheckpointError, read_checkpoint
from peftkern.tools.quantize.linear_weights import find_weights


def on_the_fly(source: Path, cls: Any = AutoModelForCausalLM, **config: Any) -> nn.Module:
    config = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32, **config}
    settings = BitsAndBytesConfig(load_in_4bit=True, **config)
    return cls.from_pretrained(source, quantization_config=settings)


def four_bit(model: nn.Module) -> dict[str, bnb.nn.Linear4bit]:
    return {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


def assert_same_model(got: nn.Module, expected: nn.Module, run: bool = True) -> None:
    """The same layers in 4 bits, the same bytes, and then the same output, bit for bit.

    bitsandbytes' own CPU quantizer of a nested absmax looks codes up by bins, in a table that
    torch.linspace has made: what differs is bounded, and taken over before outputs are compared.
    """
    layers, others = four_bit(got), four_bit(expected)
    assert layers.keys() == others.keys() and layers
    state, other_state = got.state_dict(), expected.state_dict()
    assert state.keys() == other_state.keys()
    off, count = 0, 0
    for key, value in state.items():
        assert value.dtype is other_state[key].dtype, key
        if key.endswith("weight.absmax") and value.dtype is torch.uint8:
            code = torch.tensor(dynamic_map())
            mine, theirs = value.long(), other_state[key].long()
            same_bin = (code[mine] - code[theirs]).abs() <= ABSMAX_CODE_BIN
            assert (same_bin | ((mine - theirs).abs() <= 1)).all()
            off, count = off + int((mine != theirs).sum()), count + value.numel()
        elif key.endswith("weight.nested_quant_map"):
            torch.testing.assert_close(value, other_state[key], rtol=DYNAMIC_MAP_RTOL, atol=0)
        else:
            assert torch.equal(value, other_state[key]), key
    assert off <= ABSMAX_CODE_MISMATCH * count + 1
    for name, layer in layers.items():
        mine, theirs = layer.weight.quant_state, others[name].weight.quant_state
        theirs.absmax = mine.absmax
        if mine.nested:
            theirs.state2.code = mine.state2.code
    ids = torch.arange(2 * 9).view(2, 9) % 47
    more = {"decoder_input_ids": ids} if got.config.is_encoder_decoder else {}
    for model in (got, expected):
        model.train()  # in eval mode bitsandbytes repacks weights in place on some CPUs
    assert not run or torch.equal(got(ids, **more)[0], expected(ids, **more)[0])


SOME = {"skip": ["model.layers.0.mlp", "v_proj"], "compute_dtype": "float16"}


@pytest.mark.parametrize(
    ("dtype", "sharded", "tied", "options"),
    [
        *((torch.float32, False, False, {}), (torch.float16, True, True, {})),
        *((torch.bfloat16, True, False, {}), (torch.bfloat16, False, True, {})),
        *((torch.bfloat16, False, False, {"double_quant": two, **SOME}) for two in (True, False)),
    ],
)
def test_transformers_loads_what_it_would_have_quantized(tmp_path, dtype, sharded, tied, options):
    """With every option, too."""
    source = save_llama(tmp_path / "src", dtype, sharded=sharded, tie_word_embeddings=tied)
    convert(source, tmp_path / "out", shard_bytes=30_000 if sharded else 10**9, **options)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1 or not sharded
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert got.dtype is dtype and len(four_bit(got)) == (14 - 3 - 2 if options else 14)
    how = {
        "bnb_4bit_use_double_quant": options.get("double_quant", True),
        "bnb_4bit_compute_dtype": torch.float16 if options else dtype,
        "llm_int8_skip_modules": ["lm_head", *SOME["skip"]] if options else None,
    }
    config = got.hf_quantizer.quantization_config
    assert config.bnb_4bit_compute_dtype is how["bnb_4bit_compute_dtype"]
    assert_same_model(got, on_the_fly(source, **how))


def test_blocksize_reaches_the_loaded_model(tmp_path):
    source = save_llama(tmp_path / "src", torch.float32)
    convert(source, tmp_path / "out", blocksize=256)
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    dense = AutoModelForCausalLM.from_pretrained(source)
    for name, layer in four_bit(got).items():
        state = layer.weight.quant_state
        assert state.blocksize == 256
        w = NF4Weight.from_bitsandbytes(layer.weight)
        weight = dense.get_submodule(name).weight
        error = (peftkern.dequantize_nf4(w) - weight).abs().max() / weight.abs().max()
        assert error < NF4_MAX_HALF_GAP
        assert state.dtype is torch.float32


GPT2 = {"vocab_size": 48, "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
EXPERTS = {**LLAMA, "num_local_experts": 3, "intermediate_size": 32}
T5 = {"d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 2, "num_heads": 4, "dropout_rate": 0}
VISION = {"image_size": 32, "patch_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2}
VISION = CLIPVisionConfig(hidden_size=64, intermediate_size=96, **VISION)
PARTS = {"vision_config": VISION, "text_config": LlamaConfig(**LLAMA), "image_token_index": 47}
BART = {"encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 64, "dropout": 0}
BART |= dict.fromkeys(("encoder_layers", "decoder_layers"), 1) | {"vocab_size": 48, "d_model": 64}
BART |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
BERT = {**LLAMA, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
NANO = {**LLAMA, "head_dim": 16, "num_kv_shared_layers": 0, "intermediate_size": [96, 96]}
NANO |= {"vocab_size_per_layer_input": 48, "hidden_size_per_layer_input": 16, "laurel_rank": 8}
NANO |= {"altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0]}
NANO |= {"layer_types": ["sliding_attention", "full_attention"]}
QWEN_VL = {**LLAMA, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
TOWER = {"depth": 1, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4}
QWEN_VL = {"text_config": QWEN_VL, "vision_config": TOWER | {"out_hidden_size": 64}}
STATES = {"vocab_size": 48, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
MODELS = {  # and how many of their weights are quantized
    "no head": (lambda: LlamaModel(LlamaConfig(**LLAMA)), 14),
    "Conv1D": (lambda: GPT2LMHeadModel(GPT2Config(**GPT2, **NO_DROPOUT)), 8),
    "fused experts": (lambda: MixtralForCausalLM(MixtralConfig(**EXPERTS)), 8),
    "encoder and decoder": (lambda: T5Model(T5Config(vocab_size=48, **T5)), 28),
    "vision": (lambda: LlavaModel(LlavaConfig(**PARTS)), 28),
    "encoder": (lambda: BertForMaskedLM(BertConfig(**BERT)), 13),
    "tied encoder and decoder": (lambda: BartForConditionalGeneration(BartConfig(**BART)), 16),
    "last layer by the tie alone": (lambda: Gemma3nForCausalLM(Gemma3nTextConfig(**NANO)), 31),
    "vision, text": (lambda: Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**QWEN_VL)), 21),
    "state space": (lambda: MambaForCausalLM(MambaConfig(**STATES)), 8),
}
# transformers itself takes some of their weights in 4 bits for dense ones.
NOT_RUN = ("last layer by the tie alone", "state space")


@pytest.mark.parametrize("kind", MODELS)
def test_other_models(tmp_path, kind):
    """With transposed weights, experts that transformers fuses, layers kept in float32, two parts.

    Those without a head are loaded under prefixes that the tensors do not have.
    """
    make, quantized = MODELS[kind]
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "src")
    skip = ["experts"] if kind == "fused experts" else []
    summary = convert(tmp_path / "src", tmp_path / "out", double_quant=False, skip=skip)
    assert summary.plan.quantized.tensors == quantized
    got = type(model).from_pretrained(tmp_path / "out")
    assert_same_model(got, on_the_fly(tmp_path / "src", type(model)), run=kind not in NOT_RUN)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["NewForCausalLM"]}, "has no architecture 'NewForCausalLM'"),
        ({"architectures": None}, "has no architecture None"),
        ({"architectures": ["AutoModel"]}, "has no architecture 'AutoModel'"),
        ({"hidden_size": 128}, "does not fit"),
        ({"num_attention_heads": "many"}, "cannot build LlamaForCausalLM"),
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers': expected at most 10000"),
        *(({"skip": name}, "skip: .*q_proj, .*down_proj") for name in ("no", "(", "embed_tokens")),
        ({"skip": r"model.layers.*"}, "no tensor is the weight of a linear layer"),
    ],
)
def test_config_or_names_to_skip_that_do_not_fit(tmp_path, change, words):
    source, skip = save_llama(tmp_path / "src"), [change["skip"]] if "skip" in change else []
    configure(source, **change)
    with pytest.raises(CheckpointError, match=words):
        find_weights(read_checkpoint(source), skip=skip)
