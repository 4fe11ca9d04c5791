"""Small mixtures of experts with PEFT's `target_parameters`: transformers' own classes."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tolerances import EXPERTS_RTOL, RATIO, errors, floors
from torch import Tensor, nn

import peftkern

VOCABULARY, K, E, TOP = 64, 32, 6, 2

# What families call the same thing; a config ignores the names of the others.
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": K, "intermediate_size": 48}
_SIZES |= {"moe_intermediate_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 64}
_SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_SIZES |= dict.fromkeys(_COUNTS, E)
_SIZES |= dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk"), TOP)
_SIZES |= {"kv_channels": 8}  # JetMoE's head_dim
_SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES |= {"attn_implementation": "eager", "initializer_range": 0.2}
_LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_LATENT |= {"num_key_value_heads": 4}
_SHARED = {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
_SHARED |= {"num_shared_experts": 1}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
_DELTA = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
_DELTA |= {"linear_value_head_dim": 8, "shared_expert_intermediate_size": 16}
_DELTA |= {"layer_types": ["linear_attention", "full_attention"], "decoder_sparse_step": 1}

# Families whose experts are served: {the name of their configuration: what is its own}.
FAMILIES: dict[str, dict[str, Any]] = {
    "Afmoe": {**_MIXED, "num_dense_layers": 0, "num_shared_experts": 1},
    "AriaText": {"moe_num_shared_experts": 1},
    "Cohere2Moe": _MIXED,
    "DeepseekV2": {**_SHARED, **_LATENT, "topk_method": "greedy", "q_lora_rank": None},
    "DeepseekV3": {**_SHARED, **_LATENT, "n_group": 2, "q_lora_rank": 8},
    "DeepseekV4": {"mlp_layer_types": ["moe", "moe"]},
    "Dots1": _SHARED,
    "Ernie4_5_Moe": {"moe_layer_start_index": 0, "moe_num_shared_experts": 1},
    "ExaoneMoe": {**_SHARED, **_MIXED, "mlp_layer_types": ["sparse", "sparse"]},
    "FlexOlmo": {},
    "Gemma4Text": {
        **_MIXED,
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "num_kv_shared_layers": 0,
        "global_head_dim": 8,
        "num_global_key_value_heads": 2,
    },
    "Glm4Moe": _SHARED,
    "Glm4MoeLite": {
        **_SHARED,
        **_LATENT,
        "q_lora_rank": 8,
        "mlp_layer_types": ["sparse", "sparse"],
    },
    "GptOss": _MIXED,
    "GraniteMoe": {},
    "GraniteMoeShared": {"shared_intermediate_size": 16},
    "HunYuanMoEV1": {"num_shared_expert": 1},
    "Jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "mamba_d_state": 4,
        "mamba_d_conv": 2,
        "mamba_expand": 1,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "Lfm2Moe": {"num_dense_layers": 0, "layer_types": ["conv", "full_attention"]},
    "MiniMax": {"layer_types": ["linear_attention", "full_attention"]},
    "MiniMaxM2": {},
    "Mixtral": {},
    "NemotronH": {
        **_SHARED,
        "layers_block_type": ["moe", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 4,
        "n_groups": 1,
        "moe_shared_expert_intermediate_size": 16,
    },
    "Olmoe": {},
    "Phimoe": {"router_jitter_noise": 0.9},
    "Qwen2Moe": {"decoder_sparse_step": 1, "shared_expert_intermediate_size": 16},
    "Qwen3Moe": {},
    "Qwen3Next": _DELTA,
    "Qwen3_5MoeText": _DELTA,
    "SolarOpen": _SHARED,
}
# Families whose experts compute something else, and what they are called.
REFUSED = {"Llama4Text": "Llama4TextExperts", "JetMoe": "JetMoeParallelExperts"}


def tiny_moe(family: str = "Qwen3Moe", *, seed: int = 0, **sizes: int) -> nn.Module:
    """A causal model of one or two layers of experts."""
    own = {**FAMILIES.get(family, {}), **sizes}
    config = getattr(transformers, f"{family}Config")(**{**_SIZES, **own})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.eval()  # no jitter of a router


GPT_OSS = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 32}
GPT_OSS |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
GPT_OSS |= {"num_experts_per_tok": 2, "initializer_range": 0.2, "attn_implementation": "eager"}


def save_gpt_oss(folder: Path, vocab_size: int = VOCABULARY) -> tuple[Path, Path]:
    """Write a small gpt-oss in MXFP4, as OpenAI ships it, and the same in bfloat16: two folders."""
    from peftkern.integrations.transformers import MXFP4ExpertsConfig

    torch.manual_seed(0)
    config = transformers.GptOssConfig(**GPT_OSS, vocab_size=vocab_size)
    model = transformers.GptOssForCausalLM(config).bfloat16()
    for name, parameter in model.named_parameters():
        if name.endswith("proj_bias"):
            nn.init.normal_(parameter, std=0.1)
    dense = folder.with_name(f"{folder.name}-bf16")
    model.save_pretrained(dense)
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=MXFP4ExpertsConfig()
    )
    quantized.save_pretrained(folder)
    return folder, dense


def expert_parameters(model: nn.Module) -> list[str]:
    """The full names of the weights of fused experts."""
    ends = ("input_linear.weight", "output_linear.weight")  # of JetMoE's
    named = model.named_parameters()
    return [n for n, p in named if p.dim() == 3 and ("experts" in n or n.endswith(ends))]


def add_experts_lora(model: nn.Module, **config: Any) -> PeftModel:
    """A PeftModel whose adapters on the experts contribute to the output."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": []}
    settings |= {"target_parameters": expert_parameters(model)}
    torch.manual_seed(5)
    adapted = get_peft_model(model, LoraConfig(**{**settings, **config}))
    fill_lora_B(adapted)
    return adapted


def fill_lora_B(model: nn.Module) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)


class ExpertNet(nn.Module):
    """A layer of experts called `experts`."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts
        torch.manual_seed(1)
        for p in experts.parameters():
            nn.init.normal_(p, std=K**-0.5)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor, **named: Any) -> Tensor:
        return self.experts(x, index, weights, **named)


# What modules of experts alone read of their configuration.
_ALONE = {"hidden_act": "silu", "mlp_hidden_act": "relu2", "moe_latent_size": None}
_ALONE |= {"swiglu_alpha": 1.7, "swiglu_limit": 1.0, "moe_hidden_size": K, "post_norm_eps": 1e-6}
_ALONE |= {"expert_ffn_hidden_size": 16, "zero_expert_num": 0}
_ALONE |= dict.fromkeys(("mlp_gate_softcap", "mlp_up_softcap"), 2.0)
# Experts that differ in layout, bias or gate, each of a folder of transformers.
ALONE = {
    "qwen3_moe": "Qwen3MoeExperts",
    "gpt_oss": "GptOssExperts",
    "nemotron_h": "NemotronHExperts",
    "aria": "AriaExperts",
    "openai_privacy_filter": "OpenAIPrivacyFilterExperts",
    "deepseek_v4": "DeepseekV4Experts",
    "minimax_m3_vl": "MiniMaxM3VLExperts",
    "inkling2": "Inkling2Experts",
    "beam": "BeamExperts",
}
LAYOUTS = ["qwen3_moe", "gpt_oss", "nemotron_h"]
REFUSED_ALONE = {
    "muse_spark": ("MuseSparkExperts", "the experts end in a norm"),
    "longcat_flash": ("LongcatFlashExperts", "base_layer is LongcatFlashExperts"),
    "step3p7": ("Step3p7Experts", "base_layer is Step3p7Experts"),
}


def expert_net(
    folder: str = "qwen3_moe",
    *,
    dtype: torch.dtype = torch.float32,
    implementation: str = "grouped_mm",
    adapter_dtype: torch.dtype | None = None,
    num_experts: int = E,
    quantized: bool = False,
    **config: Any,
) -> PeftModel:
    """A PeftModel around an ExpertNet.

    adapter_dtype: of the factors; PEFT's own is float32. quantized: experts are, before PEFT.
    """
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    kind = getattr(module, ALONE.get(folder) or REFUSED_ALONE[folder][0])
    sizes = {name: num_experts if name in _COUNTS else size for name, size in _SIZES.items()}
    settings = SimpleNamespace(**sizes, **_ALONE, _experts_implementation=implementation)
    model = ExpertNet(kind(settings)).to(dtype)
    config = {"target_parameters": expert_parameters(model), **config}
    if quantized:
        peftkern.quantize_(model)
    adapted = add_experts_lora(model, **config)
    if adapter_dtype is not None:
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.data = p.data.to(adapter_dtype)
    return adapted


def wrapper_of(model: nn.Module) -> nn.Module:
    """The outermost wrapper of `expert_net`."""
    return model.base_model.model.experts


def wrappers_of(model: nn.Module) -> list[nn.Module]:
    """Both wrappers of `expert_net`, the outermost first."""
    return [wrapper_of(model), wrapper_of(model).base_layer]


def inputs(T: int = 20, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, and for each its experts, the last of which have none, and their weights."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(T, K, generator=generator).to(dtype)
    scores = torch.rand(T, E - 2, generator=generator)
    weights, index = scores.topk(TOP)
    return x, index, weights


def outputs_and_gradients(model: nn.Module, *given: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of what has one: parameters, and floating inputs by place."""
    model.zero_grad(set_to_none=True)
    given = [t.detach().clone() for t in given]
    floating = {str(i): t.requires_grad_() for i, t in enumerate(given) if t.is_floating_point()}
    y = model(*given)
    y = getattr(y, "logits", y)
    generator = torch.Generator().manual_seed(12)
    y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype))
    found = {"y": y.detach(), **{name: t.grad for name, t in floating.items()}}
    return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_as_near_as_peft(model: nn.Module, oracle: nn.Module, *given: Tensor) -> None:
    """Served, and on the root of the mean square as near to float64 as PEFT's fold.

    The largest error of a few hundred values that were rounded three times on the way is luck.
    """
    x, index, weights = given
    exact = outputs_and_gradients(oracle, x.double(), index, weights.double())
    eager = outputs_and_gradients(model, *given)
    twin = patched_copy(model)
    peftkern.reset_stats()
    got = outputs_and_gradients(twin, *given)
    assert served() == 1 and fallbacks() == {} and got.keys() == eager.keys()
    for name, theirs in eager.items():
        assert got[name].dtype is theirs.dtype and got[name].isfinite().all()
        bound = RATIO * errors(theirs, exact[name])[0] + floors(x.dtype)[0]
        assert errors(got[name], exact[name])[0] <= bound, name


def oracle_of(model: nn.Module) -> nn.Module:
    """The same experts and adapters in float64, as PEFT computes them by the experts' own loop."""
    twin = copy.deepcopy(model).double()
    wrapper_of(twin).get_base_layer().config._experts_implementation = "eager"
    return twin


def patched_copy(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    peftkern.patch(twin)
    return twin


def served() -> int:
    """Layers of experts that our ops have answered since the last `peftkern.reset_stats()`."""
    calls = peftkern.stats().calls
    products = sum(n for (op, _), n in calls.items() if op.endswith("grouped_linear_forward"))
    assert products % 2 == 0
    return products // 2


def fallbacks() -> dict[str, int]:
    """Reasons for which experts went to PEFT's forward since the last reset."""
    counted = peftkern.stats().fallbacks
    return {why: n for (op, why), n in counted.items() if op == "lora_experts"}


def assert_like_peft(model: nn.Module, *given: Tensor, layers: int = 1) -> None:
    """Served by our ops; output and gradients are those of PEFT's fold, relative to the largest."""
    twin = patched_copy(model)
    expected = outputs_and_gradients(model, *given)
    peftkern.reset_stats()
    got = outputs_and_gradients(twin, *given)
    assert served() == layers and fallbacks() == {}
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error = (got[name] - value).abs().max() / value.abs().max().clamp(min=1e-30)
        assert error <= EXPERTS_RTOL, f"{name}: {error:.3g}"
