"""`quantize_`: which layers it replaces, which it leaves alone, and that it says so."""

from __future__ import annotations

import copy
import warnings
import weakref

import bitsandbytes as bnb
import pytest
import torch
import transformers
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AutoHfQuantizer

import peftkern
from peftkern.layers import NF4Linear

K = 64


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, K)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(K, K), "up_proj": nn.Linear(K, K)}) for _ in range(2)
        )
        self.shared = self.layers[0]["q_proj"]
        self.lm_head = nn.Linear(K, 10, bias=False)

    def forward(self, ids):
        h = self.embed(ids)
        for layer in self.layers:
            h = h + layer["up_proj"](layer["q_proj"](h).relu())
        return self.lm_head(self.shared(h))


def kinds(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules(remove_duplicate=False) if type(m) is NF4Linear]


def test_quantize_swaps_every_linear_but_the_head():
    model = Model()
    dense = copy.deepcopy(model)
    names = peftkern.quantize_(model, blocksize=32, double_quant=False)
    assert sorted(names) == sorted(kinds(model))
    assert set(names) == {"shared", *(f"layers.{i}.{p}_proj" for i in (0, 1) for p in ("q", "up"))}
    assert model.shared is model.layers[0]["q_proj"]  # one layer in two places stays one
    assert type(model.lm_head) is nn.Linear
    assert model.layers[1]["up_proj"].nf4.blocksize == 32
    ids = torch.randint(10, (2, 5))
    assert (model(ids) - dense(ids)).abs().mean() < 0.1 * dense(ids).abs().mean()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": ["up_proj"]}, ["layers.0.up_proj", "layers.1.up_proj"]),
        ({"include": ["layers.1"]}, ["layers.1.q_proj", "layers.1.up_proj"]),
        ({"include": ["1.q_proj"]}, ["layers.1.q_proj"]),
        ({"include": ["lm_head"], "exclude": ()}, ["lm_head"]),
        ({"exclude": ["layers", "shared"]}, ["lm_head"]),
        ({"include": []}, []),
    ],
)
def test_quantize_filters(options, expected):
    model = Model()
    assert peftkern.quantize_(model, **options) == expected
    assert kinds(model) == expected


def test_quantize_leaves_adapters_subclasses_and_odd_dtypes():
    class Mine(nn.Linear):
        pass

    model = nn.ModuleDict({"mine": Mine(K, K), "plain": nn.Linear(K, K)})
    model["wide"] = nn.Linear(K, K, dtype=torch.float64)
    model["lora_A"] = nn.ModuleDict({"default": nn.Linear(K, 4)})
    for replaced in (["plain"], []):
        with pytest.warns(UserWarning, match="most of the weights .* 4,096 in Mine"):
            assert peftkern.quantize_(model) == replaced


def test_quantize_errors():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        peftkern.quantize_("model")
    with pytest.raises(TypeError, match=r"use NF4Linear\.from_linear"):
        peftkern.quantize_(nn.Linear(K, K))
    with pytest.raises(TypeError, match="include: expected names in a list or tuple"):
        peftkern.quantize_(Model(), include="q_proj")
    model = Model()
    with pytest.raises(ValueError, match=r"include: no nn\.Linear has 'k_proj' in its name"):
        peftkern.quantize_(model, include=["q_proj", "k_proj"])
    assert kinds(model) == []


def test_quantize_lets_go_of_the_dense_weights_one_by_one(monkeypatch):
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8)))
    alive = weakref.WeakSet(layer.weight for layer in model)
    left, quantized = [], NF4Linear._set_stored

    def spy(layer, w):
        left.append(len(alive))
        quantized(layer, w)

    monkeypatch.setattr(NF4Linear, "_set_stored", spy)
    assert len(peftkern.quantize_(model)) == 8
    assert left[-1] <= 2 and not alive


T5 = {"vocab_size": 64, "d_model": K, "d_ff": 96, "num_layers": 1, "num_heads": 4, "d_kv": 16}
SMALL = {"vocab_size": 64, "hidden_size": K, "num_hidden_layers": 2}
TINY = {**SMALL, "intermediate_size": 96, "num_attention_heads": 4}
FAMILIES = {
    "LlamaForCausalLM": transformers.LlamaConfig(**TINY),
    "LlamaForSequenceClassification": transformers.LlamaConfig(**TINY, pad_token_id=0),
    "GPTNeoXForCausalLM": transformers.GPTNeoXConfig(**TINY),
    "BertForMaskedLM": transformers.BertConfig(**TINY),
    "BertForSequenceClassification": transformers.BertConfig(**TINY),
    "T5ForConditionalGeneration": transformers.T5Config(**T5, decoder_start_token_id=0),
    "MambaForCausalLM": transformers.MambaConfig(**SMALL),
    "RwkvForCausalLM": transformers.RwkvConfig(**SMALL),
}
READ = {  # beyond what transformers itself leaves out
    "MambaForCausalLM": {"dt_proj", "x_proj", "out_proj"},
    "RwkvForCausalLM": {"attention.output", "feed_forward.value"},
    "BertForSequenceClassification": {"classifier"},  # which bitsandbytes takes, having a bias
}


def family(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return getattr(transformers, name)(copy.deepcopy(FAMILIES[name]))


@pytest.mark.filterwarnings("ignore:quantize_ leaves as they are")
@pytest.mark.parametrize("name", FAMILIES)
def test_what_transformers_leaves_out_is_left_out(name):
    with torch.device("meta"):
        theirs = family(name)
    config = BitsAndBytesConfig(load_in_4bit=True)
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(theirs, device_map={"": "cpu"}, dtype=torch.bfloat16)
    wanted = {n for n, m in theirs.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    left = READ.get(name, set())
    assert set(peftkern.quantize_(family(name))) == {
        n for n in wanted if not any(f".{n}".endswith(f".{part}") for part in left)
    }


@pytest.mark.filterwarnings("ignore:quantize_ leaves as they are")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_quantized_models_compute(name, training):
    model = family(name).train(training)
    peftkern.quantize_(model)
    ids = torch.arange(6).view(1, 6)
    inputs = {"input_ids": ids}
    if "Sequence" not in name:
        inputs["labels"] = ids
    logits = model(**inputs).logits
    assert torch.isfinite(logits).all()
    if training:
        logits.sum().backward()
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


def test_the_layers_that_are_read_are_named_once():
    model = family("T5ForConditionalGeneration")
    with pytest.warns(UserWarning) as caught:
        peftkern.quantize_(model)
    (warning,) = caught
    said = str(warning.message)
    assert "whose weight T5DenseActDense.forward reads: encoder.block.0.layer.1" in said
    assert warning.filename == __file__


@pytest.mark.parametrize("padded", [False, True])
def test_torchs_encoder_runs(padded):
    layer = nn.TransformerEncoderLayer(K, 4, 96, batch_first=True)
    model = nn.Sequential(nn.Linear(K, K)).append(nn.TransformerEncoder(layer, 2)).eval()
    with pytest.warns(UserWarning, match=r"1\.layers\.0\.linear1"):
        assert peftkern.quantize_(model) == ["0"]
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    with torch.no_grad():
        y = model[1](model[0](torch.randn(2, 5, K)), src_key_padding_mask=mask)
    assert y.shape == (2, 5, K)


def test_tied_and_computed_weights_stay():
    model = Model()
    model.out = nn.Linear(K, 10, bias=False)
    model.out.weight = model.embed.weight
    model.normed = torch.nn.utils.weight_norm(nn.Linear(K, K))
    with pytest.warns(UserWarning) as caught:
        names = peftkern.quantize_(model)
    assert {"out", "normed"}.isdisjoint(names) and len(names) == 5
    assert "tied to another module's: out" in str(caught[0].message)
    assert "computed (weight_norm, pruning): normed" in str(caught[0].message)
    assert model.out.weight is model.embed.weight


def test_the_heads_of_transformers_models_can_be_asked_for():
    model = family("LlamaForSequenceClassification")
    assert "score" not in peftkern.quantize_(copy.deepcopy(model))
    assert "score" in peftkern.quantize_(copy.deepcopy(model), exclude=())
    wrapped = nn.ModuleDict({"inner": model})
    assert peftkern.quantize_(wrapped, include=["score"]) == []
    assert peftkern.quantize_(wrapped, include=["score"], exclude=()) == ["inner.score"]


def test_models_that_mostly_stay_dense_say_so():
    sizes = TINY | {"num_key_value_heads": 2, "num_local_experts": 4, "intermediate_size": 40}
    experts = transformers.MixtralConfig(**sizes)
    with pytest.warns(UserWarning, match="most of the weights .* in MixtralExperts") as caught:
        peftkern.quantize_(transformers.MixtralForCausalLM(experts), blocksize=4096)
    assert "experts' sizes are no multiple of blocksize 4096: model.lay" in str(caught[0].message)
    gpt2 = transformers.GPT2Config(vocab_size=64, n_embd=K, n_layer=1, n_head=4)
    with pytest.warns(UserWarning, match="most of the weights .* 49,152 in Conv1D"):
        assert peftkern.quantize_(transformers.GPT2LMHeadModel(gpt2)) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peftkern.quantize_(family("LlamaForCausalLM"))
        peftkern.quantize_(transformers.MixtralForCausalLM(experts), include=["q_proj"])


def test_errors_name_the_layer():
    model = family("LlamaForCausalLM")
    name = "model.layers.1.mlp.up_proj"
    broken = copy.deepcopy(model)
    sparse = broken.get_submodule(name).weight.detach().to_sparse()
    broken.get_submodule(name).weight = nn.Parameter(sparse)
    with pytest.raises(ValueError, match=rf"^{name}: weight: expected a dense tensor"):
        peftkern.quantize_(broken)
    peftkern.quantize_(model)
    with pytest.raises(ValueError, match=rf"^NF4Linear {name}: x: expected "):
        model.get_submodule(name)(torch.randn(2, K + 1))
