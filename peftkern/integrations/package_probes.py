"""Program that imports packages one by one and tries what some versions of them do wrongly.

`importing` in packages.py runs it in a process that may crash or hang: `... MARK LIBRARY
PACKAGE...`. Lines that begin with MARK are JSON, [package, error] or [package, probe, answer,
cause, cure]; a later one replaces an earlier one, and null stands for the reason why the process
ended. An error is "" for none, or LIBRARY and the reason for a bitsandbytes without its own.
"""

import importlib
import importlib.util
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
        return (
            "dequantizes NF4 weights wrongly on a CPU where in_features is no multiple of the "
            f"block: off by {error:.2g} of the largest value"
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
        return (
            "repacks 4-bit weights in eval mode on this CPU and loses their gradients: training "
            "after an evaluation goes wrong"
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
        return "makes the experts of a 4-bit mixture float32 in prepare_model_for_kbit_training"


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
        return (
            "trains no experts that bitsandbytes.nn.parametrize has quantized: "
            f"{str(error).splitlines()[0]!r}"
        )
    model.merge_adapter()
    if (model(x) - before).abs().max() > before.abs().max() / 10:
        return "loses the adapter of quantized experts in merge_adapter, silently"


def dense_experts():
    """Ask whether load_in_4bit quantizes a stack of experts."""
    import torch
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True))
    model = make_experts(torch.bfloat16)
    if not quantizer.param_needs_quantization(model, "experts.gate_up_proj"):
        return "leaves the experts of a mixture in 16 bits with load_in_4bit"


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
            return (
                "saves no experts that bitsandbytes.nn.parametrize has quantized: "
                f"{str(error).splitlines()[0]!r}"
            )


_OURS = "quantize experts by peftkern.quantize_(model) or `peftkern quantize`"
_AVOIDED = "peftkern.patch avoids it"
_EARLY = "peftkern.patch before the first evaluation; else load the model again"
_PARAMETRIZE = "bitsandbytes.nn.parametrize"
_STACKED = "transformers.integrations.moe"  # before transformers 5 each expert is a Linear
# By package (probe, the modules without which its defect cannot show, what to do about that).
PROBES = {
    "bitsandbytes": ((wrong_rows, (), _AVOIDED), (no_gradient, (), _EARLY)),
    "peft": (
        (wide_experts, ("bitsandbytes",), _OURS),
        (parametrized_experts, (_PARAMETRIZE,), _OURS),
    ),
    "transformers": (
        (dense_experts, ("bitsandbytes", _STACKED), _OURS),
        (unsaved_experts, (_PARAMETRIZE, _STACKED), _OURS),
    ),
}


def is_here(module):
    """Return whether a module is installed; its packages are imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def answers(name):
    """Yield (probe, answer, cause, cure) of the probes of a package, each first as unfinished.

    "present": cause says what is wrong. "unknown": it says why the probe cannot be run.
    """
    for probe, modules, cure in PROBES.get(name, ()):
        yield probe.__name__, "unknown", None, ""
        try:
            if not all(map(is_here, modules)):
                yield probe.__name__, "absent", "", ""
                continue
            cause = probe()
            yield (probe.__name__, *(("present", cause, cure) if cause else ("absent", "", "")))
        except Exception as caught:
            yield probe.__name__, "unknown", f"{type(caught).__name__}: {caught}", ""


def main(names):
    """Import each package, and say how that went."""
    for name in names:
        say(name, None)
        try:
            importlib.import_module(name)
            say(name, unusable(name))
        except BaseException as caught:
            say(name, f"{type(caught).__name__}: {caught}")
            continue
        for answer in answers(name):
            say(name, *answer)


def say(*words):
    print("\n" + sys.argv[1] + json.dumps(words), flush=True)


if __name__ == "__main__":
    main(sys.argv[3:])
