"""Reasons and warnings of this library in one table, each with its cure.

`peftkern.stats()` counts why a call fell back, in the words of the place that refused it. The table
has the template of each of them, `{...}` for what a call fills in, so that the troubleshooting page
is written from it. Nothing imports this where a model runs; a test holds it to the code.
"""

from __future__ import annotations

import functools
import re

NOTHING = "Nothing to do"
_PEFT = f"{NOTHING}: the result is the same, from PEFT's own forward."
_NEXT = f"{NOTHING}: the result is the same, from the next back end."
_DTYPE = f"{_NEXT} float32, bfloat16 and float16 are what kernels take."
_HOOK = "A hook must see the call, so PEFT makes it. Remove the hook, or put it on an outer module."
_MERGED = "`model.unmerge_adapter()` or `model.enable_adapter_layers()`, if you did not mean it."
_SUBCLASS = "Kernels read plain dense tensors. Convert it, or leave the call to PEFT."
_MOVE = "Move the tensors to one device; a GPU needs one that torch sees (`peftkern doctor`)."
_FORGET = "`peftkern doctor --forget` tries again; report it with `peftkern doctor --json`."
_TUNE = "Two calls decide; `peftkern tune` decides ahead of time."
_EXPERTS = "PEFT computes these experts; their other layers are served."
_READ = "Correct the function given to `register_layer`; until then the layer is left alone."
_ARCH = "Rebuild with `PEFTKERN_CUDA_ARCHS` for this GPU; Triton's kernels serve it meanwhile."

# {group: {template: cure}}
TABLE: dict[str, dict[str, str]] = {
    "The state of a layer": {
        "adapters are disabled": f"Expected in `disable_adapter()`. Else {_MERGED}",
        "adapters are merged": f"Expected after merging. To train: {_MERGED}",
        "adapters are merged and disabled": f"PEFT takes the adapters out again. {_MERGED}",
        "no active adapter": "`model.set_adapter(name)`, if one should be active.",
        "{class} has no kernel": (
            "Patched are PEFT's own LoRA and AdaLoRA layers, and those of registered classes: "
            "`peftkern.register_layer(cls, read=...)`."
        ),
        "forward is replaced on the instance": "Patch before whatever replaces it, or undo that.",
        "forward is replaced on the class": "Undo that, or leave these layers to it.",
        "global module hooks": "Remove the hook registered for every module of the process.",
        "hooks on {role}": _HOOK,
        "forward of {role} is replaced": "Another library has put a forward there: undo that.",
        "accelerate's hook on {role} {does}": (
            "Keep a layer on one device. Offload alone is no reason: what it loads is served."
        ),
        "parts are loaded to several devices": "Give the modules of a layer one execution device.",
        "mixed precision of {role} is not that of base_layer": (
            "Give the factors the `MixedPrecisionPolicy` of the layer around them."
        ),
        "extra arguments: {names}": "For example `adapter_names`, one adapter per row. " + _PEFT,
        "{role} is {kind}": _SUBCLASS,
        "base_layer is {kind}": (
            "Served are nn.Linear, Conv1D, Linear4bit, NF4Linear, BlockLinear, HQQLinear, NVFP4 "
            "and unpacked int4 of torchao, GPT-QModel's TorchLinear and AwqTorchLinear; for "
            "experts, those of transformers' own functions."
        ),
        "base weight is {kind}": _SUBCLASS,
        "base weight is trained": (
            "Freeze it: `weight.requires_grad_(False)`. Under FSDP1 with `use_orig_params`, wrap "
            "with PEFT's `fsdp_auto_wrap_policy`, which keeps what is trained apart."
        ),
        "lora_A has a bias": _PEFT,
        "scaling is no number": _PEFT,
        "lora_dropout is {module}": "Only nn.Dropout with p below 1, and not in place, is served.",
        "lora_variant {kind}": "Of PEFT's variants DoRA alone is served. " + _PEFT,
        "lora_magnitude_vector is {kind}": _PEFT,
        "lora_magnitude_vector is on {device}": "Set `ephemeral_gpu_offload=False`.",
        "DoRA over Conv1D": _PEFT,
        "DoRA's norms are cached": "Within `peft.helpers.DoraCaching` PEFT has less to compute.",
        "tensor parallel: adapters are disabled or merged, or none is active": _PEFT,
        "tensor parallel: dropout of several adapters": (
            "Give their configs `lora_dropout=0`, or activate one: `model.set_adapter(name)`."
        ),
        "tensor parallel: more than plain LoRA": _PEFT,
        "tensor parallel: lora_A or lora_B is not split as the base is": (
            "Let PEFT make the adapter over the split model: `get_peft_model` after "
            "`from_pretrained(distributed_config=...)`."
        ),
        "tensor parallel: compiled": f"{NOTHING}: in a graph, PEFT's own forward computes it.",
    },
    "Inputs and dtypes": {
        "input is a nested tensor": "Pad it: `torch.nested.to_padded_tensor`.",
        "input is {kind}": "PEFT says what is wrong: a layer takes a tensor.",
        "input was made in inference mode": "Use `torch.no_grad()`, or clone the input.",
        "torch.func transform": "Use autograd: vmap, grad and jvp go through PEFT.",
        "torch.jit.trace": "Use `torch.compile` or `torch.export`.",
        "input is {dtype}, base weight is {dtype}": "Cast one of them, or train under autocast.",
        "lora_A is {dtype}, lora_B is {dtype}": "Cast the adapter to one floating dtype.",
        "base computes in {dtype} under autocast": (
            "`bnb_4bit_compute_dtype` should be the dtype of autocast, or float32."
        ),
        "adapter input is {dtype}, base computes in {dtype}": (
            "`bnb_4bit_compute_dtype` should be the dtype of the activations."
        ),
        "adapter is {dtype}, its input {dtype}": "Keep adapters in float32 or the input's dtype.",
        "{argument}: expected {what}": (
            "The kernels do not take this argument and PEFT may: it answers, with its own error "
            "if there is one."
        ),
    },
    "4-bit weights": {
        "quant_type is {type}, expected nf4 or fp4": (
            'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), or "fp4".'
        ),
        "quant_state is missing": "The weight is quantized when the layer moves: `model.to(...)`.",
        "quant_state: missing; the weight has not been quantized yet": (
            "The weight is quantized when the layer moves: `model.to(...)`."
        ),
        "quant_storage is {dtype} over {dtype} data": (
            "Load again with one `bnb_4bit_quant_storage`, and do not cast the model. Under FSDP "
            "it is the dtype of mixed precision, which would cast the packed weights."
        ),
        "weight is not quantized as [out_features, in_features]": "Quantize a matrix.",
        "compiled over a base of another library": (
            "A base of GPTQ, AWQ, HQQ or torchao is read between graphs: run it without "
            "`torch.compile`, or leave it to PEFT."
        ),
        "weight is repacked for bitsandbytes' CPU inference": (
            "Call `peftkern.patch` before the first evaluation, then nothing is repacked."
        ),
    },
    "Experts": {
        "target parameter {name}": "Served are the gate, up and down projections. " + _PEFT,
        "experts are {dtype} and {dtype}": "Load them in one floating dtype.",
        "adapter of {name} does not fit the experts": "The adapter is of another model.",
        "base_layer is parametrized": "Remove the parametrization.",
        "{name} has {count} dimensions": "A router's weight is no stack of experts. " + _PEFT,
        "there is one expert": _PEFT,
        "the experts end in a norm": _EXPERTS,
        "experts_implementation is {name}": (
            "`model.set_experts_implementation(...)`: eager, grouped_mm or batched_mm."
        ),
        "input is {dtype} of {count} dimensions": "Experts take [tokens, K] in a floating dtype.",
        "{implementation} computes in {dtype}, experts are {dtype}": (
            "`grouped_mm` casts the input itself; or use one dtype for both."
        ),
        "no fused experts that ask for an implementation": _EXPERTS,
        "the experts are not in 4 bits": "`peftkern.quantize_(model)`, or load experts in 4 bits.",
    },
    "AdaLoRA": {
        "DeepSpeed holds the gradients": (
            "Give the masks to `AdaLoraCallback`, or to `AdaLoraSteps` made after "
            "`deepspeed.initialize`: those of PEFT are undone by the next step."
        ),
        "rankallocator is {kind}": "`peftkern.patch(model)` again: the allocator is not patched.",
        "parameters are sharded": "PEFT computes the term. Call DeepSpeed's engine, not the model.",
    },
    "Layers that `initialize_` leaves": {
        "{kind}, expected a linear layer": "Embeddings, experts and such keep PEFT's start.",
        "its adapters are merged": "`model.unmerge_adapter()` first.",
        "{variant} has factors of its own": "Methods set lora_A and lora_B; of variants DoRA's.",
        "it has no values yet, it is on the meta device": "Call `initialize_` after loading.",
        "a weight in another format, {kind} of {dtype}": (
            "Started are float32, bfloat16, float16, and the 4 bits of bitsandbytes, NF4Linear and "
            "BlockLinear. Or `peftkern init` on the dense base."
        ),
        "its weight is {name}, too, which would change with it": (
            "Untie it, leave the layer out of `target_modules`, or use EVA, which leaves "
            "the base alone."
        ),
        "no direction of its inputs is among those that explain most": (
            "EVA's budget went to other layers: a larger `r`, or `EvaConfig(rho=1)` for one rank."
        ),
        "there is one expert, whose update PEFT does not transpose": "PEFT's start is kept.",
    },
    "Parameters of experts that `suggest_ranks` leaves": {
        "the inputs of a parameter are not seen, as those of a layer are": (
            "By `weights`, `gradients` or `gora`; or give its rank in `rank_pattern`."
        ),
        "{shape} of {dtype}, expected matrices of floats": "Give its rank in `rank_pattern`.",
        "{kind} has no gradient": "By `weights`, or from the dense model.",
    },
    "Layers that were registered": {
        "base is {kind}": (
            "A base that is a layer is nn.Linear, Conv1D, Linear4bit, NF4Linear or BlockLinear; of "
            "others `read` may give the weight."
        ),
        "input is given by its name": "Call the layer as `layer(x)`.",
        "compiled before its parts were checked": (
            "Run the layer once with its adapter before `torch.compile`."
        ),
        "its weights are on meta: patch it when they are loaded": "`peftkern.patch` after loading.",
        "read gives {what}{name}, expected {what}": _READ,
        "read raised {error}": _READ,
        "read gives no parts in eval mode: {reason}": _READ,
        "read gives no parts in training mode: {reason}": _READ,
        "read gives a dropout of {p}, forward draws no random numbers in training": _READ,
        "its forward cannot be compared with its parts: {error}": (
            "The shapes of the parts do not fit, or the forward takes more than x."
        ),
        "forward gives {what}, expected {dtype} {shape} of such an input": (
            "Served are layers that give [..., N] in the dtype of their input."
        ),
        "forward differs from the parts that read gives by {share} of their size": _READ,
        "the gradient of {name} differs from that of the parts that read gives": _READ,
        "forward draws random numbers in training, read gives no dropout": _READ,
    },
    "Speed": {
        "small dense product: torch's own operations are as fast": (
            "Nothing to do: kernels pay from more rows on (`print(report)` says how many)."
        ),
        "torch's own operations measured faster for this shape": (
            "Nothing to do: `peftkern tune` on this GPU may find a faster kernel."
        ),
        "small dense product: PEFT's own operations are as fast": (
            "Nothing to do: kernels pay from more rows on (`print(report)` says how many)."
        ),
        "PEFT's own operations measured faster for this shape": (
            "Nothing to do: `peftkern tune` on this GPU may find a faster kernel."
        ),
        "the layer's own forward serves: {why}": (
            "Measured here: ours was slower, or failed. If the machine was busy then: "
            "`peftkern tune --again`."
        ),
        "the layer's own forward serves until this machine has measured such a layer": _TUNE,
        "the layer's own forward serves until the training step that it began is over": (
            "Nothing to do: forward and recomputation of a step are one side's."
        ),
        "compiled before this machine measured such a layer": (
            "Run two steps before `torch.compile`, or `peftkern tune` first."
        ),
    },
    "Inputs that are written to": {
        "the input is copied, for the model writes to it": (
            "A served layer saves a copy for backward, as PEFT does. `h = h + layer(h)` instead "
            "of `h += layer(h)` needs none."
        ),
    },
    "Trust": {
        "unchecked on this machine (PEFTKERN_TRUST=off)": "Unset PEFTKERN_TRUST, or tune first.",
        "unchecked, and a graph is being captured": "Run one step before capturing the graph.",
        "wrong at call {n}: {what}": f"A kernel was wrong; torch's result is used. {_FORGET}",
        "raised at call {n}: {error}": f"A kernel failed, and another one answered. {_FORGET}",
        "an earlier process ended during its first launch ({how})": _FORGET,
        "its first launch ended the context of the device": _FORGET,
        "raised {error}": f"Our side of a trial failed, and PEFT serves. {_FORGET}",
    },
    "Triton": {
        "triton is not installed": "`pip install triton`.",
        "no kernel for {device}": "CPUs and CUDA or ROCm GPUs have kernels. " + _PEFT,
        "{arch} is none of {archs}, where no kernel spills": _NEXT,
        "compute capability {major}.{minor} is below 8.0": (
            "Kernels need an Ampere GPU or newer. " + _PEFT
        ),
        "Triton was not tried before this graph was captured": "Run one step before capturing.",
        "the result of a test kernel is wrong": f"Triton is broken here. {_FORGET}",
        "{name}Error: {text}": (
            "Triton's first kernel did not run; the end of the line says what to install. Then "
            "`peftkern doctor --forget`."
        ),
        "dropout's mask is given, and the kernels draw it from a seed": _NEXT,
        "there are more than {count} rows": "Use a smaller batch. " + _NEXT,
        "the weight has {count} rows or columns, above {limit}": _NEXT,
        "there are {count} groups, not 1 to {limit}": _NEXT,
        "the results of {count} rows are more tiles than a launch has": "Use a smaller batch.",
        "the dtypes are {dtype} and {dtype}": _DTYPE,
        "x has {count} rows, above {limit}": _NEXT,
        "a factor of length {length} has more than {count} tiles": _NEXT,
        "Triton does not compile products of float64 matrices for AMD": _NEXT,
    },
    "CUDA C++": {
        "the CUDA library peftkern._cuda is not usable ({error})": (
            "Optional. Install with nvcc on PATH and `PEFTKERN_CUDA=1`; Triton serves without it."
        ),
        "the kernels are a CPU's, not for {device}": "A test's emulation: rebuild the library.",
        "the kernels are CUDA's, and this PyTorch is ROCm's": "Triton's kernels serve ROCm.",
        "the kernels are built with CUDA {version}, which finds no GPU: the driver {state}": (
            "Update the driver, or rebuild with an older CUDA."
        ),
        "the kernels are built for {archs}, not for sm_{major}{minor}": _ARCH,
        "the kernels are built for {archs}, not for sm_90a": _ARCH,
        "the weight is {N} x {K}, not 1 to {limit} each": _NEXT,
        "blocks of {size} are below {least} or cross rows of {K}": _NEXT,
        "rows of {K} are not a multiple of {unit}, or blocks of {size} below it": _NEXT,
        "the packed weight does not begin at a multiple of 8 bytes": _NEXT,
        "dropout is left to other back ends": _NEXT,
        "more than {count} rows need compute capability 9.0, not {major}.{minor}": _NEXT,
        "the rank is {r}, more than {limit}": _NEXT,
    },
    "Any back end": {
        "the native library peftkern._cpu is not usable ({error})": (
            "Plain torch serves. `peftkern doctor` says how to build or reinstall it."
        ),
        "tensors are on {device}": _MOVE,
        "tensors are on {device} and {device}": _MOVE,
        "tensors are {dtypes}": _DTYPE,
        "the dtype is {dtype}": _DTYPE,
        "the dtype of {name} is {dtype}": _DTYPE,
        "{name} are {dtype}": _DTYPE,
        "the factors are {dtype}": _DTYPE,
        "the EMAs are {dtype}": "Keep them in float32.",
        "scores are {dtype}": "Keep them in float32.",
        "the rank is {r}, not 1 to {limit}": _NEXT,
        "the rank is {r}, above {limit}": _NEXT,
        "the weight is empty": _NEXT,
        "no kernel decodes {format}": (
            f"{NOTHING}: the result is the same, decoded by torch's own operations."
        ),
        "blocks cross the groups' weights": "Use a blocksize that divides an expert's weight.",
    },
}

# What is said by `warnings.warn` or the log, once, and not counted.
WARNINGS: dict[str, str] = {
    "peftkern: {program} is demoted: {reason}. Another path serves; `peftkern doctor` lists it, "
    "`peftkern doctor --forget` tries again.": (
        f"A kernel was wrong, raised, or ended an earlier process. Results are right. {_FORGET}"
    ),
    "peftkern: Triton's kernels do not serve {device}: {reason}. PEFT's own forward, or plain "
    "torch, serves instead.": "Install what the reason names, then `peftkern doctor --forget`.",
    "{name}: merged into 4-bit weights, which PEFT cannot undo: unmerge before `unpatch`, or "
    "`patch` again before `unmerge`": "`peftkern.patch(model)`, then `model.unmerge_adapter()`.",
    "{count} modules of experts are laid out for kernels of transformers that have no gradients: "
    "what is below them learns wrongly": (
        "gpt-oss in MXFP4: `from_pretrained(name, config=MXFP4ExpertsConfig.of_checkpoint(name))`."
    ),
    "lora_ga: no gradient reaches {layers}: left at the default initialization": (
        "No batch uses these layers: more batches, or leave them out of `target_modules`."
    ),
    "eva: no batch runs through experts of {parameters}: left at the default "
    "initialization": "Their update starts at zero all the same: more batches, or none is needed.",
    "{backend} serves: {why}": "No kernel runs on this device: `peftkern doctor` has the cure.",
    "{count} of the patched layers are never called, for fused kernels read their weights: "
    "{functions}; switch those off for peftkern to serve the layers": (
        "Axolotl: `lora_mlp_kernel`, `lora_qkv_kernel` and `lora_o_kernel` to false. Or leave "
        "these layers to those kernels: results are right either way."
    ),
    "{count} 4-bit weights are stored as uint8, which FSDP does not shard well: FSDP1 raises, "
    "accelerate leaves them whole on every device, and before it did, FSDP2 trained on wrong "
    "weights; load them with bnb_4bit_quant_storage=torch.bfloat16, or the dtype of mixed "
    "precision": (
        "As it says, in `BitsAndBytesConfig`; `float32` without mixed precision over a model in "
        "float32."
    ),
    "{count} stacks of experts in 4 bits are dense in the shards of FSDP2, and take the memory of "
    "dense ones: leave them whole on every device by ignored_params of fully_shard, or train under "
    "DistributedDataParallel": (
        "`{p for p in model.parameters() if isinstance(p, (NF4Stack, MXFP4Stack))}`, of "
        "`peftkern.layers`. accelerate: `ignored_modules` of its plugin. Results are right anyway."
    ),
    "none of the {count} layers that peftkern has patched was called in a forward pass of the "
    "model: nothing was served. Fused kernels of another library that read the weights past the "
    "layers do this, and so do inputs that take another way": (
        "`print(report)` names fused kernels that are known; switch them off, or do without "
        "`patch`."
    ),
    "A 4-bit weight had been repacked by bitsandbytes' CPU inference path, which rounds its absmax "
    "to bfloat16; it is back in the storage layout so that gradients pass through it.": (
        "Call `peftkern.patch` before the first evaluation; to have the exact weights, reload."
    ),
    "a weight was quantized to {format} again: what was added has norm {x}, the rounding error has "
    "{y}": "Expected when adapters merge into 4 bits. Merge into 16 bits to lose nothing.",
    "{said}{count} of {count} experts were quantized to {format} again: what was added has norm "
    "{x}, the rounding error has {y}": (
        "Expected when adapters merge into 4-bit experts; unmerging puts the old bytes back."
    ),
    "{prefix}weight: not loaded, for this layer has no memory (it is on the meta device) and "
    "nothing can be copied into it; pass assign=True": "`load_state_dict(state, assign=True)`.",
    "quantize_ leaves as they are: {what}": (
        "Layers that cannot be NF4, with the reason. `skip=` says that you meant it."
    ),
    "AdaLoRA: {count} optimizer steps and no update_and_allocate: no rank changes, this trains as "
    "LoRA of rank init_r. Give the Trainer AdaLoraCallback() of "
    "peftkern.integrations.transformers, or make AdaLoraSteps(model, optimizer, steps) of "
    "peftkern.integrations.peft.adalora_steps before a loop of your own": (
        "As it says; for a constant rank, train with LoraConfig."
    ),
    "AdaLoRA keeps what it has pruned in memory: {error}": (
        "The training goes on as in PEFT. `AdaLoraCallback(compact=None)` asks for that; plain "
        "DistributedDataParallel, torch's and bitsandbytes' optimizers can be compacted."
    ),
    "AdaLoRA: the optimizer's states of {count} parameters are of another number of triplets: they "
    "start anew": (
        "Expected where training goes on from the best model, or from a checkpoint without "
        "adalora_state.safetensors; else load the optimizer's states of the same step."
    ),
    "AdaLoRA goes on with another schedule: {fields}": (
        "Expected when the config was changed to resume with; else resume with the old one."
    ),
    "AdaLoRA goes on with the budget of the checkpoint, not with the one that was given now: "
    "costs, floors or caps differ": (
        "Expected of costs that are measured in each process. For another budget, start anew from "
        "the adapter."
    ),
    "{folder} has no {file}: the importance of triplets starts anew, and those that the mask had "
    "pruned are zero with random vectors; after the last mask that is as it was, before it "
    "training goes another way": "Train with AdaLoraCallback(), whose checkpoints have that file.",
    "AdaLoRA's state is not in the checkpoints of a hyperparameter search without hp_name: they "
    "resume with another importance of the triplets": (
        "`hyperparameter_search(hp_name=...)`, so that the folder of a trial is known."
    ),
    "AdaLoRA resumes with another importance of the triplets: {error}": (
        "Under DeepSpeed the callback looks into `output_dir` for the checkpoint: resume there."
    ),
    "total_step of the AdaLoRA config is {count}, this training takes {count} steps: using "
    "{count}": "Set `AdaLoraConfig(total_step=...)` to the steps of the training.",
    "{file}: no further records ({error})": "The monitor's file cannot be written: free the disk.",
    "peftkern: {report}": (
        "From PeftKernCallback: nothing was patched, or layers were skipped or fall back; the "
        "reasons are in the text and above."
    ),
}


def cure(reason: str) -> str | None:
    """Return the cure of a reason that was counted, with or without its back end in front."""
    _, found, bare = reason.partition(": ")
    for text in (bare, reason) if found and reason.split(": ")[0] in _BACKENDS else (reason,):
        for pattern, does in _patterns():
            if pattern.fullmatch(text):
                return does
    return None


_BACKENDS = ("triton", "cuda", "cpu", "torch")


@functools.cache
def _patterns() -> tuple[tuple[re.Pattern[str], str], ...]:
    """Return a pattern for every template, the one with the most words of its own first."""
    rows = [row for group in TABLE.values() for row in group.items()]
    rows.sort(key=lambda row: -len(re.sub(r"\{\w+\}", "", row[0])))
    return tuple((re.compile(_pattern(template), re.DOTALL), does) for template, does in rows)


def _pattern(template: str) -> str:
    return ".*".join(re.escape(part) for part in re.split(r"\{\w+\}", template))
