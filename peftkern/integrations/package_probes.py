"""Program that imports packages one by one and tries what some versions of them do wrongly.

`importing` in packages.py runs it in a process that may crash or hang: `python -c TEXT MARK LIBRARY
PACKAGE...`. Lines that begin with MARK are JSON: a package, its error (null while it is tried, ""
for none, LIBRARY and the reason for a bitsandbytes without its own), and [what is wrong, what to do
about it] of each defect. A defect of experts counts only if it shows: a probe that cannot be run,
say without bitsandbytes, tells nothing.
"""

import contextlib
import importlib
import json
import sys
import tempfile

_HALF_GAP = 0.152  # of absmax: the largest error of NF4


def unusable(name):
    """Say why a package that imports fails when it is used."""
    if name == "bitsandbytes":
        library = getattr(importlib.import_module("bitsandbytes.cextension"), "lib", None)
        if type(library).__name__.startswith("ErrorHandler"):
            return f"{sys.argv[2]}: {getattr(library, 'error_msg', '')}"
    return ""


def wrong_rows():
    """Dequantize rows that are no multiple of the block, on a CPU."""
    import torch
    from bitsandbytes import functional

    weight = torch.linspace(-1, 1, 960).view(10, 96)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    error = (functional.dequantize_4bit(packed, state) - weight).abs().max().item()
    if error > _HALF_GAP:
        yield (
            "dequantizes NF4 weights wrongly on a CPU where in_features is no multiple of "
            f"the block: off by {error:.2g} of the largest value",
            "peftkern.patch avoids it",
        )


def no_gradient():
    """Take the gradient of what eval mode has repacked, on a CPU with AVX512-BF16."""
    import torch
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").cpu()
    x, grads = torch.linspace(-1, 1, 256).view(4, 64).bfloat16(), []
    for evaluated in (False, True):
        with torch.no_grad():
            evaluated and layer.eval()(x)
        leaf = x.clone().requires_grad_()
        layer.train()(leaf).sum().backward()
        grads.append(leaf.grad)
    if grads[1] is None or (grads[1] - grads[0]).norm() > grads[0].norm() / 10:
        yield (
            "repacks a 4-bit weight in place when its layer runs in eval mode on this CPU, and "
            "then no gradient passes the layer: training after an evaluation goes wrong",
            "peftkern.patch before the first evaluation avoids it; else load the model again",
        )


def make_experts(dtype):
    """Return a module with a stack of experts, as transformers holds them."""
    import torch
    from torch import nn

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.ones(2, 64, 64, dtype=dtype))

        def forward(self, x):
            return x @ self.gate_up_proj[0].T

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = Experts()

        def forward(self, x):
            return self.experts(x)

    return Model()


def wide_experts():
    """Prepare a 4-bit model whose experts are in bfloat16."""
    import peft
    import torch

    model = make_experts(torch.bfloat16)
    model.is_loaded_in_4bit = True
    peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if model.experts.gate_up_proj.dtype is torch.float32:
        yield (
            "makes the experts of a 4-bit mixture float32 in prepare_model_for_kbit_training: "
            "twice their bytes",
            "peftkern.quantize_(model) first: experts in 4 bits are left as they are",
        )


def parametrized_experts():
    """Train and merge an adapter of experts that bitsandbytes has quantized."""
    import peft
    import torch
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    model = make_experts(torch.float32)
    replace_parameter_4bit(model.experts, "gate_up_proj", quant_type="nf4")
    targets = {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **targets))
    x = torch.ones(1, 64)
    try:
        before = model(x).detach()
        model(x)
    except RuntimeError as error:
        yield (
            "trains no adapter of experts that bitsandbytes.nn.parametrize has quantized: the "
            f"second forward pass raises {str(error).splitlines()[0]!r}",
            "quantize them with peftkern.quantize_(model) instead",
        )
        return
    model.merge_adapter()
    if (model(x) - before).abs().max() > before.abs().max() / 10:
        yield (
            "loses the adapter of quantized experts in merge_adapter, silently",
            "quantize them with peftkern.quantize_(model) instead",
        )


def dense_experts():
    """Ask whether load_in_4bit quantizes a stack of experts."""
    import torch
    import transformers.integrations.moe  # noqa: F401  before transformers 5 each is a Linear
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True))
    model = make_experts(torch.bfloat16)
    if not quantizer.param_needs_quantization(model, "experts.gate_up_proj"):
        yield (
            "leaves the experts of a mixture in 16 bits with load_in_4bit",
            "peftkern.quantize_(model) quantizes them, peftkern quantize a checkpoint's",
        )


def unsaved_experts():
    """Save a mixture whose experts bitsandbytes has quantized."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 64}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    few = {"vocab_size": 8, "num_hidden_layers": 1, "num_experts": 2, "num_experts_per_tok": 1}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **few))
    for name in ("gate_up_proj", "down_proj"):
        replace_parameter_4bit(model.model.layers[0].mlp.experts, name, quant_type="nf4")
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
        except ValueError as error:
            yield (
                "does not save a mixture whose experts bitsandbytes.nn.parametrize has quantized: "
                f"save_pretrained raises {str(error).splitlines()[0]!r}",
                "quantize them with peftkern.quantize_(model), or the checkpoint with peftkern "
                "quantize",
            )


def defects(name):
    """Yield the defects of a package that show here."""
    if name == "bitsandbytes":
        yield from wrong_rows()
        yield from no_gradient()
    of_experts = {
        "peft": (wide_experts, parametrized_experts),
        "transformers": (dense_experts, unsaved_experts),
    }
    for probe in of_experts.get(name, ()):
        with contextlib.suppress(Exception):  # a version that a probe does not fit: nothing known
            yield from probe()


def main(names):
    """Import each package, and say how that went."""
    for name in names:
        say(name, None, [])
        try:
            importlib.import_module(name)
            say(name, unusable(name), [])
            say(name, unusable(name), list(defects(name)))
        except BaseException as caught:
            say(name, f"{type(caught).__name__}: {caught}", [])


def say(*words):
    print("\n" + sys.argv[1] + json.dumps(words), flush=True)


if __name__ == "__main__":
    main(sys.argv[3:])
