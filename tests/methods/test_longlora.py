"""Shifted sparse attention against dense attention under the mask that its definition gives."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tolerances import LOGITS
from torch import Tensor
from torch.overrides import TorchFunctionMode

from peftkern.integrations.transformers.longlora import (
    disable_shifted_sparse_attention,
    enable_shifted_sparse_attention,
)
from peftkern.methods.longlora import shifted_sparse_attention


def allowed(H: int, T: int, G: int, is_causal: bool) -> Tensor:
    """[H, T, T], from the definition."""
    shift = (torch.arange(H) >= H // 2) * (G // 2)
    group = (torch.arange(T) + shift[:, None]) // G
    seen = group[:, :, None] == group[:, None, :]
    return seen.tril() if is_causal else seen


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Softmax over the allowed pairs, zeros where there is none."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return torch.where(seen.any(-1, keepdim=True), weights, 0.0) @ v


def draw(B: int, H: int, H_kv: int, T: int, D: int = 4) -> list[Tensor]:
    heads = (H, H_kv, H_kv)
    return [torch.randn(B, h, T, D, dtype=torch.float64, requires_grad=True) for h in heads]


def compare(got: Tensor, wanted: Tensor, inputs: list[Tensor]) -> None:
    """Values and gradients."""
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(wanted)
    for mine, theirs in zip(
        torch.autograd.grad(got, inputs, upstream),
        torch.autograd.grad(wanted, inputs, upstream),
        strict=True,
    ):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@settings(max_examples=settings.default.max_examples // 4)
@given(
    T=st.integers(1, 21),
    half=st.integers(1, 6),
    heads=st.sampled_from([(2, 2), (2, 1), (4, 4), (4, 2), (4, 1), (6, 3)]),
    B=st.integers(1, 2),
    is_causal=st.booleans(),
    padded=st.sampled_from(["no", "left", "right", "holes"]),
)
def test_equals_dense_attention_under_its_mask(T, half, heads, B, is_causal, padded):
    (H, H_kv), G = heads, 2 * half
    inputs = draw(B, H, H_kv, T)
    seen = allowed(H, T, G, is_causal).expand(B, H, T, T)
    mask = None
    if padded != "no":
        mask = torch.ones(B, T, dtype=torch.bool)
        cut = torch.randint(0, T + 1, (B,))
        position = torch.arange(T)
        for b in range(B):
            if padded == "holes":
                mask[b] = torch.rand(T) < 0.5
            else:
                mask[b] = position >= cut[b] if padded == "left" else position < cut[b]
        seen = seen & mask[:, None, None, :]
    got = shifted_sparse_attention(*inputs, G, attention_mask=mask, is_causal=is_causal)
    compare(got, dense(*inputs, seen), inputs)


@pytest.mark.parametrize("shape", [(2, 4), (1, 1), (2, 1)])
def test_mask_of_pairs(shape):
    B, H, T, G = 2, 4, 13, 4
    inputs = draw(B, H, 2, T)
    mask = torch.rand(*shape, T, T) < 0.6
    got = shifted_sparse_attention(*inputs, G, attention_mask=mask)
    compare(got, dense(*inputs, allowed(H, T, G, True) & mask), inputs)


def test_no_token_sees_its_future_and_the_halves_are_linked():
    """Which inputs an output depends on: the pairs of the definition, and no other."""
    H, T, G = 2, 12, 4
    q, k, v = draw(1, H, H, T)
    y = shifted_sparse_attention(q, k, v, G)
    depends = torch.zeros(H, T, T, dtype=torch.bool)
    for h in range(H):
        for i in range(T):
            (grad,) = torch.autograd.grad(y[0, h, i].sum(), v, retain_graph=True)
            depends[h, i] = grad[0, h].abs().sum(-1) > 0
    assert torch.equal(depends, allowed(H, T, G, True))
    assert not depends.triu(1).any()
    full, rest = G * (G + 1) // 2, (G // 2) * (G // 2 + 1) // 2
    assert depends.sum((1, 2)).tolist() == [3 * full, 2 * full + 2 * rest]


def test_scale_and_dropout_of_the_weights():
    q, k, v = draw(1, 2, 2, 12)
    got = shifted_sparse_attention(q, k, v, 4, scale=2.0)
    compare(got, dense(q * 2.0 * 4**0.5, k, v, allowed(2, 12, 4, True)), [q, k, v])
    ones = torch.ones_like(v)  # the weights of a token add to one, but not those that are dropped
    whole = shifted_sparse_attention(q, k, ones, 4)
    dropped = shifted_sparse_attention(q, k, ones, 4, dropout_p=0.5)
    torch.testing.assert_close(whole, ones)
    assert not torch.allclose(dropped, whole)


@pytest.mark.parametrize("masked", [True, False])
def test_heads_of_keys_are_repeated_where_there_is_a_mask(masked):
    """torch's kernels for shared heads take no mask on a GPU, other than the one that computes all
    scores."""
    calls = []

    class Seen(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention:
                calls.append((args[1].shape[1], kwargs))
            return func(*args, **(kwargs or {}))

    mask = torch.ones(1, 12, dtype=torch.bool) if masked else None
    with Seen():
        shifted_sparse_attention(*draw(1, 8, 4, 12), 4, attention_mask=mask)
    assert len(calls) == 5
    for heads, options in calls:
        assert heads == (4 if masked else 2)
        assert options.get("enable_gqa", False) is not masked


@pytest.mark.parametrize(("B", "T", "masked"), [(0, 8, True), (1, 0, True), (0, 0, False)])
def test_empty_batch(B, T, masked):
    inputs = draw(B, 4, 2, T)
    mask = torch.ones(B, T, dtype=torch.bool) if masked else None
    y = shifted_sparse_attention(*inputs, 4, attention_mask=mask)
    assert y.shape == (B, 4, T, 4)
    y.sum().backward()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"group_size": 3}, "group_size: expected an even number"),
        ({"group_size": 0}, "group_size: expected an even number"),
        ({"q": torch.ones(1, 3, 8, 4)}, "q: expected .* even H"),
        ({"k": torch.ones(1, 3, 8, 4)}, "k: expected .* divisor of 2"),
        ({"v": torch.ones(1, 2, 8, 4).half()}, "v: expected torch.float32"),
        ({"v": torch.ones(1, 1, 8, 4)}, "v: expected .* like k"),
        ({"attention_mask": torch.ones(1, 8)}, "attention_mask: expected bool"),
        ({"attention_mask": torch.ones(1, 7, dtype=torch.bool)}, "attention_mask: expected bool"),
    ],
)
def test_wrong_arguments_are_named(change, complaint):
    arguments = {name: torch.ones(1, 2, 8, 4) for name in "qkv"} | {"group_size": 4} | change
    with pytest.raises(ValueError, match=complaint):
        shifted_sparse_attention(**arguments)


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
WIDE = {**SIZES, **HEADS, "head_dim": 8}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
BART = {"vocab_size": 64, "d_model": 32, "max_position_embeddings": 64, "init_std": 0.3}
for part in ("encoder", "decoder"):
    BART |= {f"{part}_layers": 1, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 48}
VISION = {"image_size": 8, "patch_size": 4, "num_attention_heads": 4, **SIZES}
del VISION["vocab_size"]
MODELS = {
    "llama": ("LlamaForCausalLM", {**SIZES, **HEADS}),
    "t5": ("T5ForConditionalGeneration", {**T5, "dropout_rate": 0.0}),
    "bart": ("BartForConditionalGeneration", {**BART, "dropout": 0.0, "attention_dropout": 0.0}),
    "gemma2": ("Gemma2ForCausalLM", {**WIDE, "attn_logit_softcapping": 1.0}),
    "gpt_oss": ("GptOssForCausalLM", {**WIDE, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "mpt": ("MptForCausalLM", {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 1}),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": transformers.LlamaConfig(**SIZES, num_attention_heads=4),
            "vision_config": transformers.CLIPVisionConfig(**VISION),
            "image_token_index": 63,
        },
    ),
}


def build(kind: str) -> transformers.PreTrainedModel:
    """A small model of that kind, whose attention is sharp enough to matter."""
    torch.manual_seed(0)
    name, config = MODELS[kind]
    cls = getattr(transformers, name)
    return cls(cls.config_class(**copy.deepcopy(config)))


def test_transformers_model_trains_sparse_and_evaluates_full():
    model, plain = build("llama"), build("llama")
    ids = torch.randint(0, 64, (2, 24))
    for size in (4, 8):
        enable_shifted_sparse_attention(model, size)
    assert model.config._attn_implementation.endswith("_8")
    sparse = model.train()(ids).logits
    assert not torch.allclose(sparse, plain.train()(ids).logits, atol=1e-4)
    torch.testing.assert_close(model.eval()(ids).logits, plain.eval()(ids).logits)
    assert torch.equal(model.generate(ids, max_length=30), plain.generate(ids, max_length=30))
    for _ in range(2):
        disable_shifted_sparse_attention(model)
        assert model.config._attn_implementation == plain.config._attn_implementation
    torch.testing.assert_close(model.train()(ids).logits, plain.train()(ids).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_its_sequences_alone(side):
    """What the tokens of a sequence get does not depend on the padding after them; before them it
    moves the borders of the groups, so that those are compared with a group's length of padding."""
    model = build("llama").train()
    enable_shifted_sparse_attention(model, 8)
    long, short = torch.randint(0, 64, (24,)), torch.randint(0, 64, (16,))
    pad, ones = torch.zeros(8, dtype=torch.long), torch.ones(16, dtype=torch.long)
    order = slice(None) if side == "right" else slice(None, None, -1)
    ids = torch.stack([long, torch.cat([short, pad][order])])
    mask = torch.stack([torch.ones_like(long), torch.cat([ones, pad][order])])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    both = model(ids, attention_mask=mask, position_ids=positions)
    alone = model(short[None]).logits[0]
    got = both.logits[1, :16] if side == "right" else both.logits[1, 8:]
    torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both.logits[0], model(long[None]).logits[0], rtol=1e-4, atol=1e-5)
    both.logits[mask.bool()].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_peft_model_with_checkpointing_trains():
    base = build("llama")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    enable_shifted_sparse_attention(model, 8)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    ids = torch.randint(0, 64, (2, 21))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def inputs_of(kind: str, T: int = 12) -> dict[str, Tensor]:
    ids = torch.randint(1, 60, (2, T), generator=torch.Generator().manual_seed(1))
    twice = {"decoder_input_ids": ids} if kind in ("bart", "t5") else {}
    return {"input_ids": ids, **twice, "use_cache": False}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_one_group_for_all_is_the_models_own_attention(kind, training):
    """A group of twice the length holds every token, shifted or not."""
    model, plain = build(kind).train(training), build(kind).train(training)
    inputs = inputs_of(kind)
    enable_shifted_sparse_attention(model, 24)
    wanted = plain(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, wanted, **LOGITS)
    small = build(kind).train(training)
    enable_shifted_sparse_attention(small, 4)
    assert torch.allclose(small(**inputs).logits, wanted, atol=1e-4) is not training


def test_encoders_and_cross_attention_stay_full():
    """Of BART, the decoder's self-attention alone is sparse, and no token sees its future."""
    model, plain = build("bart").train(), build("bart").train()
    inputs = inputs_of("bart")
    enable_shifted_sparse_attention(model, 4)
    got, wanted = model(**inputs), plain(**inputs)
    assert torch.equal(got.encoder_last_hidden_state, wanted.encoder_last_hidden_state)
    changed = {**inputs, "decoder_input_ids": inputs["decoder_input_ids"].clone()}
    changed["decoder_input_ids"][:, 7:] = 61
    assert torch.equal(model(**changed).logits[:, :7], got.logits[:, :7])
    # The first group of unshifted heads is what a decoder without sparsity has, too.
    torch.testing.assert_close(got.logits[:, :2], wanted.logits[:, :2], **LOGITS)


def test_a_vision_tower_stays_full_and_gets_its_own_attention_back():
    model = build("llava")
    model.set_attn_implementation({"": "sdpa", "text_config": "sdpa", "vision_config": "eager"})
    parts = (model.config, model.config.text_config, model.config.vision_config)
    tower, image = model.model.vision_tower, torch.randn(1, 3, 8, 8)
    wanted = tower.eval()(image).last_hidden_state
    for size in (2, 4):
        enable_shifted_sparse_attention(model, size)
    got = tower.train()(image).last_hidden_state
    torch.testing.assert_close(got, wanted, **LOGITS)
    disable_shifted_sparse_attention(model)
    assert [part._attn_implementation for part in parts] == ["sdpa", "sdpa", "eager"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kind", "name"), [("t5", "position_bias"), ("gemma2", "softcap"), ("gpt_oss", "s_aux")]
)
def test_attention_with_more_than_products_is_refused(kind, name, training):
    model = build(kind).train(training)
    before = model.config._attn_implementation
    enable_shifted_sparse_attention(model, 4)
    with pytest.raises(ValueError, match=f"^{name}: expected None"):
        model(**inputs_of(kind))
    disable_shifted_sparse_attention(model)
    assert model.config._attn_implementation == before
    model(**inputs_of(kind))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("llava", "expected causal attention, which CLIPVisionModel has"),
        ("mpt", "MptForCausalLM does not let its attention be chosen"),
    ],
)
def test_a_model_that_is_refused_stays_as_it_was(kind, says):
    model = build(kind)
    model = model.model.vision_tower if kind == "llava" else model
    configs = [model.config, getattr(model.config, "attn_config", model.config)]
    before = [config._attn_implementation for config in configs]
    with pytest.raises(ValueError, match=says):
        enable_shifted_sparse_attention(model, 4)
    assert [config._attn_implementation for config in configs] == before
    disable_shifted_sparse_attention(model)


def test_scale_and_dropout_of_the_model_are_used():
    """The scaling that a layer has, and dropout of the weights in training alone."""
    model, plain = build("llama").train(), build("llama").train()
    inputs = inputs_of("llama")
    enable_shifted_sparse_attention(model, 24)
    for one in (model, plain):
        for layer in one.model.layers:
            layer.self_attn.scaling *= 3
    wanted = plain(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, wanted, **LOGITS)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    torch.manual_seed(0)
    first = model(**inputs).logits
    assert not torch.allclose(first, wanted, atol=1e-4)
    assert not torch.equal(model(**inputs).logits, first)
    torch.testing.assert_close(model.eval()(**inputs).logits, wanted, **LOGITS)


def test_switch_refuses_what_it_cannot_serve():
    with pytest.raises(ValueError, match="group_size"):
        enable_shifted_sparse_attention(build("llama"), 5)
    with pytest.raises(ValueError, match="model: expected a transformers"):
        enable_shifted_sparse_attention(torch.nn.Linear(2, 2), 4)
