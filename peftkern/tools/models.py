"""Models of transformers by their config alone, and with random weights where there are none."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftkern.formats.json_files import brief, read_json
from peftkern.layers.quantize import expert_parameters
from peftkern.tools.plan.presets import PRESETS
from peftkern.tools.quiet import quiet

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@quiet()  # its advice on configs would interrupt the output of a command
def read_config(path: str, argument: str = "--model") -> Any:
    """Read the config of a model: a preset, a config.json, or the folder of one.

    Raises: OSError, or ValueError in one line that names the argument.
    """
    if path in PRESETS:
        return from_config(PRESETS[path])
    from transformers import AutoConfig

    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        name = r"[\w-][\w.-]*"
        if re.fullmatch(f"{name}(/{name})?(?<!json)", path) and not Path(path).exists():
            get = f"hf download {path} config.json --local-dir DIR"
            raise ValueError(
                f"{argument}: no folder {path} here; download config.json first: {get}; or take one"
                f" of {', '.join(PRESETS)}"
            )
        raise ValueError(f"{argument}: {path}: expected a config.json, or the folder of one")
    found = read_json(file)
    kind = found.get("model_type") if isinstance(found, dict) else None
    if not isinstance(kind, str):
        raise ValueError(f"{argument}: {file}: expected the config of a transformers model")
    try:
        config = AutoConfig.from_pretrained(str(file), trust_remote_code=False)
    except Exception as error:  # transformers raises errors of many kinds, in several lines
        why = " ".join(str(error).split()).split(". ")[0]
        raise ValueError(f"{argument}: {file}: model_type {kind!r}: {why}") from error
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0  # as T5's; no config without weights needs to say it
    return config


@quiet()
def from_config(fields: dict[str, Any]) -> Any:
    """Make a transformers config of the fields of a config.json, but for its quantization.

    Raises: ValueError in one line if transformers has no such model, or refuses a field.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    fields = {k: v for k, v in fields.items() if k != "quantization_config"}
    kind = fields.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"model_type: transformers has no {brief(kind)}")
    try:
        return AutoConfig.for_model(kind, **fields)
    except Exception as error:  # each config class has its own
        raise ValueError(f"{kind}: {' '.join(str(error).split())}") from error


def auto_class(config: Any, argument: str = "--model") -> Any:
    """Return the Auto class that builds the model of a config for training on tokens.

    Raises: ValueError in one line if there is none.
    """
    import transformers

    names = ["AutoModelForCausalLM", "AutoModelForImageTextToText"]
    names = ["AutoModelForSeq2SeqLM"] if config.is_encoder_decoder else names
    for name in names:
        if type(config) in getattr(transformers, name)._model_mapping:
            return getattr(transformers, name)
    kind = f"model_type {config.model_type!r}"
    raise ValueError(
        f"{argument}: {kind} does not learn from tokens alone: no {' or '.join(names)}"
    )


def has_weights(path: str) -> bool:
    """Return whether the folder of a config holds weights, too."""
    return path not in PRESETS and any(any(Path(path).glob(kind)) for kind in WEIGHTS)


def dtype_of(config: Any) -> str:
    """Return the dtype of a config in short, "bf16" if it has none."""
    known = {"torch.float16": "fp16", "torch.float32": "fp32"}
    return known.get(str(config.dtype), "bf16")


def quantization(config: Any) -> dict[str, Any] | None:
    """Return how a config says that its weights are quantized; None: they are not."""
    found = getattr(config, "quantization_config", None)
    return found if isinstance(found, dict) or found is None else found.to_dict()


def saved_with_nf4_experts(config: Any) -> bool:
    """Return whether weights are of a model that `NF4ExpertsConfig` had loaded."""
    return "nf4_experts" in str((quantization(config) or {}).get("quant_method"))


def set_layers(config: Any, layers: int) -> int:
    """Shorten a model to at most so many layers, in place; return how many it had."""
    text = config.get_text_config()
    had = text.num_hidden_layers
    for name, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == had:  # layer_types and its like
            setattr(text, name, value[:layers])
    for name in ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"):
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(layers, getattr(text, name)))
    return had


@quiet()
def empty_model(config: Any, dtype: torch.dtype, *, buffers: bool = False) -> Any:
    """Build the model of a config, whose dtype becomes this one, on meta: without memory.

    buffers: they alone are real, on the CPU.
    """
    from accelerate import init_empty_weights

    auto = auto_class(config)
    with init_empty_weights(include_buffers=False) if buffers else torch.device("meta"):
        return auto.from_config(config, dtype=dtype)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of a model by name, transformers' Conv1D included, but the output
    embeddings."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    modules = model.named_modules()
    return {name: m for name, m in modules if isinstance(m, (nn.Linear, Conv1D)) and m is not head}


def sizes(linear: nn.Module) -> tuple[int, int]:
    """Return N and K of a weight [N, K]; a Conv1D's is [K, N]."""
    n, k = linear.weight.shape
    return (n, k) if isinstance(linear, nn.Linear) else (k, n)


def expert_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights [E, N, K] of fused experts by name."""
    modules = model.named_modules()
    return {
        f"{name}.{own}": m._parameters[own] for name, m in modules for own in expert_parameters(m)
    }


def adapter_targets(model: nn.Module, targets: str) -> tuple[list[str], list[str]]:
    """Return the full names of linear layers and of experts' weights, PEFT's `target_modules` and
    `target_parameters`, that targets names by their last parts: "q_proj,gate_up_proj".

    "all-linear" is all of both, but no router, which PEFT would add to that itself.
    Raises: ValueError in one line that names --targets.
    """
    found = [list(linear_layers(model)), list(expert_weights(model))]
    if targets == "all-linear":
        return tuple(found)
    names = {name.strip() for name in targets.split(",")}
    known = {name.rpartition(".")[2] for some in found for name in some}
    if missing := sorted(names - known):
        accepted = ", ".join(["all-linear", *sorted(known)])
        raise ValueError(f"--targets: {missing[0]!r} is no linear layer; accepted: {accepted}")
    return tuple([name for name in some if name.rpartition(".")[2] in names] for some in found)


@torch.no_grad()
def draw_weights(model: nn.Module, device: torch.device) -> nn.Module:
    """Draw the parameters that are on meta, in place: matrices keep the size of their input."""
    made: dict[int, nn.Parameter] = {}  # tied ones stay tied
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is None or not old.is_meta:
                continue
            if id(old) not in made:
                new = torch.zeros_like(old, device=device)
                if old.dim() > 1:
                    new.normal_(0, old.shape[-1] ** -0.5)
                elif name == "weight":  # of a norm
                    new.fill_(1.0)
                made[id(old)] = nn.Parameter(new, requires_grad=False)
            module._parameters[name] = made[id(old)]
    return model.to(device)


def replace_linear_layers(
    model: nn.Module, make: Callable[[int, int, nn.Parameter | None], nn.Module]
) -> None:
    """Put `make(N, K, bias)` in the place of each linear layer, in place, but of those that
    transformers keeps in float32."""
    kept = set(model._keep_in_fp32_modules or ())
    for name, old in linear_layers(model).items():
        if kept.isdisjoint(name.split(".")):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, make(*sizes(old), old.bias))
