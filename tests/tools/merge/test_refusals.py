"""What cannot be merged is one line that names it, before anything is written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import changing, configure, load_tensors
from merged_folders import make_model, merge, mixture, refused, save_adapter, save_base, save_both
from safetensors.torch import save_file
from torch import Tensor

from peftkern.tools.merge import placement

Q = "base_model.model.model.layers.0.self_attn.q_proj"
LAYERS = {"target_modules": ["q_proj", "down_proj"]}


def folders(tmp_path: Path, config: dict[str, Any] = LAYERS, **sizes: Any) -> tuple[Path, Path]:
    return save_both(tmp_path, make_model(**sizes), **config)


def edit(adapter: Path, change: Callable[[dict[str, Tensor]], Any], **config: Any) -> None:
    """Change the tensors and the config of an adapter."""
    with changing(adapter / "adapter_model.safetensors") as tensors:
        change(tensors)
    configure(adapter, "adapter_config.json", **config)


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def put(name: str, make: Callable[[Tensor | None], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: make(tensors.get(name))})


def with_nan(tensor: Tensor) -> Tensor:
    tensor[0, 0] = float("nan")
    return tensor


A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
TOKENS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
BROKEN = {
    "no such layer": (renamed("q_proj", "z_proj"), {}, r"z_proj.*no such layer"),
    "no such layer number": (renamed("layers.1.", "layers.7."), {}, r"layers\.7\..*no such layer"),
    "fits nothing": (
        put("base_model.model.score.weight", lambda _: torch.ones(3, 64)),
        {},
        r"score\.weight: fits nothing of the base",
    ),
    "shape": (put(A, lambda _: torch.ones(4, 65)), {}, r"update of \[64, 65\] does not fit"),
    "transposed": (
        lambda t: t.update({A: torch.ones(4, 96), B: torch.ones(64, 4)}),
        {},
        r"q_proj\.weight: an update of \[64, 96\]",
    ),
    "NaN": (put(A, with_nan), {}, r"q_proj.*holds NaN or infinity"),
    "infinite bias": (
        put("base_model.model.model.norm.weight", lambda _: torch.full((64,), float("inf"))),
        {},
        r"norm\.weight: holds NaN or infinity",
    ),
    "module of another size": (
        put("base_model.model.model.norm.weight", lambda _: torch.ones(65)),
        {},
        r"norm\.weight: shape \[65\] does not fit the base's \[64\]",
    ),
    "kind": (renamed("self_attn.q_proj", "input_layernorm"), {}, r"layer of type LlamaRMSNorm"),
    "rank": (lambda t: None, {"r": 5}, r"rank"),
    "kasa": (lambda t: None, {"kasa_config": {"beta": 1}}, "KaSA"),
    "arrow": (lambda t: None, {"arrow_config": {"top_k": 1}}, "Arrow"),
    "aLoRA": (lambda t: None, {"alora_invocation_tokens": [1]}, "invocation tokens"),
    "layer_replication": (lambda t: None, {"layer_replication": [[0, 2]]}, "layers of the base"),
    "other method": (lambda t: None, {"peft_type": "IA3"}, "peft_type"),
    "PiSSA": (lambda t: None, {"init_lora_weights": "pissa_niter_4"}, "--changed-base"),
    "OLoRA": (lambda t: None, {"init_lora_weights": "olora"}, "--changed-base"),
    "token rows": (
        put(TOKENS, lambda _: torch.ones(3, 64)),
        {"trainable_token_indices": [1, 2]},
        "3 rows, but trainable_token_indices",
    ),
    **{
        what: (
            put(TOKENS, lambda _, rows=rows: rows),
            {"trainable_token_indices": indices},
            f"{len(indices)} rows, but trainable_token_indices",
        )
        for what, rows, indices in (
            ("token twice", torch.ones(2, 64), [3, 3]),
            ("no token", torch.ones(0, 64), []),
            ("token 2^70", torch.ones(1, 64), [1 << 70]),
        )
    },
    "token beyond": (
        put(TOKENS, lambda _: torch.ones(1, 64)),
        {"trainable_token_indices": [48]},
        "up to number 48 do not fit",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_adapter_that_does_not_fit(tmp_path: Path, case: str) -> None:
    change, config, words = BROKEN[case]
    base, adapter = folders(tmp_path)
    edit(adapter, change, **config)
    refused(words, base, adapter)


def test_base_that_an_initialization_has_changed(tmp_path: Path) -> None:
    base, adapter = folders(tmp_path)
    edit(adapter, lambda t: None, init_lora_weights="pissa")
    merge(base, adapter, to=tmp_path / "out", changed_base=True)
    assert (tmp_path / "out" / "config.json").exists()


def test_a_name_that_is_no_path_belongs_to_no_base(tmp_path: Path) -> None:
    base, adapter = folders(tmp_path)
    for number, name in enumerate(("x" * 5000, "a\0b")):
        edit(adapter, lambda t: None, base_model_name_or_path=name)
        merge(base, adapter, to=tmp_path / f"out{number}")


def test_weight_that_is_no_float(tmp_path: Path) -> None:
    """Its scale may be anywhere; where no adapter changes it, it stays."""
    base, adapter = folders(tmp_path)
    for name, merged in (("mlp.gate_proj", False), ("self_attn.q_proj", True)):
        name = f"model.layers.1.{name}.weight"
        with changing(base / "model.safetensors") as tensors:
            tensors[name] = tensors[name].mul(100).to(torch.int8)
        if merged:
            refused(f"{name}: expected floating point to merge into, got torch.int8", base, adapter)
        else:
            merge(base, adapter, to=tmp_path / "stays")
            assert torch.equal(load_tensors(tmp_path / "stays")[name], tensors[name])


def test_sum_that_overflows(tmp_path: Path) -> None:
    """Found when it is computed; what was written by then is removed."""
    base, adapter = folders(tmp_path, dtype=torch.float16)
    edit(adapter, put(B, lambda tensor: tensor * 1e7))
    refused(r"layers\.0\.self_attn\.q_proj\.weight: holds NaN or infinity", base, adapter)


@pytest.mark.parametrize("alpha", [1e300, 2.0**1000])
def test_scaling_that_float32_does_not_hold(tmp_path: Path, alpha: float) -> None:
    base, adapter = folders(tmp_path)
    edit(adapter, lambda t: None, lora_alpha=alpha)
    refused(r"layers\.0\..*\.weight: holds NaN or infinity", base, adapter)


def test_update_whose_square_float32_does_not_hold(tmp_path: Path) -> None:
    """It is merged, and the report has numbers."""
    base, adapter = folders(tmp_path)
    edit(adapter, put(B, lambda tensor: torch.full_like(tensor, 1e30)))
    change = merge(base, adapter, to=tmp_path / "out").total
    assert all(map(math.isfinite, change)) and change.survival == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("name", ["mlp.up_proj.weight", "input_layernorm.weight"])
def test_value_that_another_dtype_does_not_hold(tmp_path: Path, name: str) -> None:
    """Of a tensor that no adapter changes: a matrix, and a vector."""
    base, adapter = folders(tmp_path)
    name = f"model.layers.1.{name}"
    with changing(base / "model.safetensors") as tensors:
        tensors[name].view(-1)[3] = 1e5
    refused(f"{name}: holds NaN or infinity", base, adapter, out="fp16")
    merge(base, adapter, to=tmp_path / "out", out="fp32")


def test_base_that_is_not_finite(tmp_path: Path) -> None:
    base, adapter = folders(tmp_path)
    with changing(base / "model.safetensors") as tensors:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("inf")
    refused(r"layers\.1\.mlp\.down_proj\.weight: holds NaN or infinity", base, adapter)


def test_adapters_that_cannot_be_combined(tmp_path: Path) -> None:
    model = make_model()
    base = save_base(tmp_path / "base", model)
    dora = save_adapter(tmp_path / "dora", model, **LAYERS, use_dora=True)
    plain = save_adapter(tmp_path / "plain", model, **LAYERS)
    saved = [
        save_adapter(tmp_path / f"saved{seed}", model, seed, **LAYERS, modules_to_save=["lm_head"])
        for seed in (1, 2)
    ]
    refused("is DoRA", base, dora, plain)
    refused("is DoRA", base, plain, dora)
    refused("is DoRA", base, (dora, 0.5))
    refused("which a weight of 0.5 cannot do", base, (saved[0], 0.5))
    refused("differs from that of another adapter", base, *saved)
    refused("expected a finite weight", base, (plain, float("nan")))
    merge(base, saved[0], saved[0], to=tmp_path / "twice")  # the same table twice is one


def test_convolution_with_groups(tmp_path: Path) -> None:
    sizes = {"family": "Wav2Vec2", "head": "Model", "num_conv_pos_embedding_groups": 4}
    sizes |= {"conv_dim": [32, 32], "conv_stride": [5, 2], "conv_kernel": [10, 3]}
    base = save_base(tmp_path / "base", make_model(**sizes))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    name = "base_model.model.encoder.pos_conv_embed.conv"
    tensors = {f"{name}.lora_A.weight": torch.ones(4, 16, 128)}
    tensors[f"{name}.lora_B.weight"] = torch.ones(64, 4, 1)
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["conv"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    refused("a convolution of 4 groups", base, adapter)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "gptq"}, "got quant_method 'gptq'"),
        ("fp8", "got quant_method 'fp8'"),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            "expected dense weights, NF4 or FP4 of bitsandbytes, or layers of peftkern's "
            "BlockLinearConfig, experts of its NF4ExpertsConfig or of gpt-oss in MXFP4, got "
            "load_in_4bit None",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "int4"},
            "got bnb_4bit_quant_type 'int4'",
        ),
        ({"quant_method": "peftkern_blocks", "format": "nf4"}, "config: format: expected one of"),
    ],
)
def test_base_that_is_quantized_otherwise(tmp_path: Path, config: Any, words: str) -> None:
    base, adapter = folders(tmp_path)
    configure(base, quantization_config=config)
    refused(words, base, adapter)


def test_parameter_that_loading_puts_together_otherwise(tmp_path: Path, monkeypatch) -> None:
    base, adapter = mixture(tmp_path, "Qwen3Moe")
    with monkeypatch.context() as patch:
        patch.setattr(placement, "_concatenates", lambda converter: False)
        refused("transformers puts it together from other tensors", base, adapter)
    with changing(base / "model.safetensors") as tensors:
        del tensors["model.layers.0.mlp.experts.2.up_proj.weight"]
    refused(
        "2 tensors of each of 4 experts, numbered from 0, got 7, expert 2 is not whole",
        base,
        adapter,
    )


@pytest.mark.parametrize(("number", "instead"), [("99", True), ("4", False), ("03", False)])
def test_experts_that_are_numbered_otherwise(tmp_path: Path, number: str, instead: bool) -> None:
    """In the place of the last of four, or as a fifth."""
    base, adapter = mixture(tmp_path, "Qwen3Moe")
    with changing(base / "model.safetensors") as tensors:
        for name in [name for name in tensors if ".experts.3." in name]:
            other = name.replace(".experts.3.", f".experts.{number}.")
            tensors[other] = tensors.pop(name) if instead else tensors[name].clone()
    refused("tensors of each of 4 experts, numbered from 0, got ", base, adapter)


def test_pickles(tmp_path: Path) -> None:
    base, adapter = folders(tmp_path)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refused("a pickle", base, adapter)
    (adapter / "adapter_model.bin").rename(adapter / "adapter_model.safetensors")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    refused("pickles", base, adapter)


@pytest.mark.parametrize("options", [{"out": "int8"}, {"as_trained": "int8"}, {"residual": -1}])
def test_options_that_there_are_not(tmp_path: Path, options: dict[str, Any]) -> None:
    refused(f"^{next(iter(options))}: expected", *folders(tmp_path), **options)


def test_a_base_without_its_head(tmp_path: Path) -> None:
    """An adapter of a model with a head fits the model without it, and the other way round."""
    with_head, adapter = folders(tmp_path)
    model = make_model(head="Model")
    base = save_base(tmp_path / "headless", model)
    merge(base, adapter, to=tmp_path / "out")
    merge(with_head, adapter, to=tmp_path / "other")
    other = load_tensors(tmp_path / "other")
    delta = {
        n
        for n, t in load_tensors(tmp_path / "out").items()
        if not torch.equal(t, load_tensors(base)[n])
    }
    changed = {n for n, t in other.items() if not torch.equal(t, load_tensors(with_head)[n])}
    assert {f"model.{name}" for name in delta} == changed
