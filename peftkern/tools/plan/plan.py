"""Memory of a fine-tune, counted before it is run.

`plan` adds the permanent memory (weights, adapters, optimizer states) to the peaks of one training
step, which `training_step` simulates allocation by allocation. All of it is arithmetic over
shapes. tests/tools/test_plan.py holds it to torch's own allocator on a CPU, for small models; the
differences of a GPU are counted and have not been measured:

- the caching allocator rounds to 512 bytes, and reserves more than is allocated;
- AdamW there updates all tensors at once and needs their square roots at the same time;
- dropout keeps one byte for each element, and peftkern's a seed;
- peftkern makes an NF4 weight dense for one matmul at a time, as bitsandbytes does (neither does
  for a few rows; that is left out), and of experts in NF4 one at a time.

DoRA is counted as PEFT runs it, patched or not: savings of `peftkern.patch` are left out.

The model is planned in one dtype, without autocast. PEFT's prepare_model_for_kbit_training
makes embeddings, norms and lm_head float32, and with them the activations between layers; neither
that nor the casts of autocast is counted. The model is trained with use_cache off, one micro-batch
to a step, on batches without padding, and its `outputs` are dropped before backward.

The CUDA context, cuBLAS workspaces, fragmentation and what else runs on the device are not in it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from peftkern.formats.json_files import brief, read_json
from peftkern.formats.nf4 import STATE_BYTES, state_dict_bytes
from peftkern.tools.plan.mixture import Mixture
from peftkern.tools.plan.training_step import (
    ACTIVATIONS,
    CHECKPOINTS,
    F32,
    GRADIENTS,
    LOGITS,
    TEMPORARIES,
    Linear,
    Memory,
    Shapes,
    Step,
)

ACCEPTED = {  # in the fields of Training that are names
    "method": ("lora", "qlora", "adalora", "dora", "full"),
    "dtype": ("bf16", "fp32"),
    "adapter_dtype": ("bf16", "fp32"),
    "optimizer": ("adamw", "adamw-32bit", "adamw-8bit", "paged-adamw", "paged-adamw-8bit", "sgd"),
    "attention": ("sdpa", "eager"),
    "device": ("cuda", "cpu"),
    "base": ("bf16", "fp32", "nf4"),
}
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = (*MODULES, "gate_up_proj")  # the last one of a mixture of experts alone
MIXTURES = ("mixtral", "olmoe", "qwen3_moe")
ARCHITECTURES = ("llama", "mistral", "qwen2", *MIXTURES)

_BYTES = {"bf16": 2, "fp32": 4}
_BLOCK = 64  # bitsandbytes' default, and the only one of its 4-bit config
_MIN_8BIT, _BLOCK_8BIT = 4096, 256  # of bitsandbytes' 8-bit optimizers
_LARGEST = 2**32
_MOST_LAYERS = 1000  # each is simulated


@dataclass(frozen=True)
class Architecture:
    """Dimensions of a Llama-shaped decoder; mixture: experts in the place of the MLP; qk_norm: q
    and k are normalized by heads ("head") or whole ("all")."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    head_dim: int
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    mixture: Mixture | None = None
    qk_norm: str = ""

    def stacks(self) -> dict[str, tuple[int, int]]:
        """Return {parameter: (K, N)} of an expert of one layer."""
        return {} if self.mixture is None else self.mixture.stacks(self.hidden)

    def targets(self) -> tuple[str, ...]:
        """Return the names of all that can have an adapter."""
        return (*self.linears(), *self.stacks())

    def norms(self) -> int:
        """Return the number of weights of one layer's norms."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return 2 * self.hidden + {"": 0, "head": 2 * self.head_dim, "all": q + kv}[self.qk_norm]

    def linears(self) -> dict[str, tuple[int, int, bool]]:
        """Return {name: (K, N, bias)} of one layer."""
        h, i = self.hidden, self.intermediate
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = {
            "q_proj": (h, q, self.qkv_bias),
            "k_proj": (h, kv, self.qkv_bias),
            "v_proj": (h, kv, self.qkv_bias),
            "o_proj": (q, h, self.o_bias),
        }
        if self.mixture is not None:
            return attention
        return {
            **attention,
            "gate_proj": (h, i, self.mlp_bias),
            "up_proj": (h, i, self.mlp_bias),
            "down_proj": (i, h, self.mlp_bias),
        }


def _preset(hidden, layers, heads, kv_heads, intermediate, vocabulary, **other) -> Architecture:
    sizes = (hidden, layers, heads, kv_heads, intermediate, vocabulary, hidden // heads)
    return Architecture(*sizes, **other)


# From the config.json that the authors publish with each model.
PRESETS = {
    "llama2-7b": _preset(4096, 32, 32, 32, 11008, 32000),
    "llama2-13b": _preset(5120, 40, 40, 40, 13824, 32000),
    "llama2-70b": _preset(8192, 80, 64, 8, 28672, 32000),
    "llama-65b": _preset(8192, 80, 64, 64, 22016, 32000),
    "llama3-8b": _preset(4096, 32, 32, 8, 14336, 128256),
    "llama3-70b": _preset(8192, 80, 64, 8, 28672, 128256),
    "llama3.2-1b": _preset(2048, 16, 32, 8, 8192, 128256, tied=True),
    "llama3.2-3b": _preset(3072, 28, 24, 8, 8192, 128256, tied=True),
    "mistral-7b": _preset(4096, 32, 32, 8, 14336, 32000),
    "qwen2.5-0.5b": _preset(896, 24, 14, 2, 4864, 151936, tied=True, qkv_bias=True),
    "qwen2.5-7b": _preset(3584, 28, 28, 4, 18944, 152064, qkv_bias=True),
    "qwen2.5-14b": _preset(5120, 48, 40, 8, 13824, 152064, qkv_bias=True),
    "qwen2.5-32b": _preset(5120, 64, 40, 8, 27648, 152064, qkv_bias=True),
    "mixtral-8x7b": _preset(
        *(4096, 32, 32, 8, 14336, 32000), mixture=Mixture(8, 2, 14336, normalized=True, wide=True)
    ),
    "qwen3-30b-a3b": Architecture(
        *(2048, 48, 32, 4, 768, 151936, 128),
        mixture=Mixture(128, 8, 768, normalized=True, wide=False),
        qk_norm="head",
    ),
    "olmoe-1b-7b": _preset(
        *(2048, 16, 16, 16, 1024, 50304),
        mixture=Mixture(64, 8, 1024, normalized=False, wide=False),
        qk_norm="all",
    ),
}


@dataclass(frozen=True)
class Training:
    """Training configuration.

    method: lora, qlora (NF4 base), adalora, dora, full. targets: the linear layers with adapters,
    and of a mixture the experts' gate_up_proj and down_proj, which have one for each expert.
    base: dtype of the frozen linear layers (None: nf4 for qlora, else `dtype`); dtype: of
    activations and of all weights that are not quantized; adapter_dtype: of the adapters, which
    PEFT keeps in float32. double_quant: NF4's absmax in 8 bits. optimizer: adamw (torch's, states
    in the dtype of what is trained), sgd (no momentum), or bitsandbytes' adamw-32bit, adamw-8bit,
    paged-adamw, paged-adamw-8bit. patched: after `peftkern.patch`. device: cuda or cpu.
    """

    method: str = "lora"
    r: int = 16
    targets: tuple[str, ...] = MODULES
    base: str | None = None
    dtype: str = "bf16"
    adapter_dtype: str = "fp32"
    double_quant: bool = True
    optimizer: str = "adamw"
    batch: int = 1
    sequence: int = 2048
    checkpointing: bool = True
    attention: str = "sdpa"
    patched: bool = True
    dropout: float = 0.0
    device: str = "cuda"

    def __post_init__(self) -> None:
        if self.base is None:
            object.__setattr__(self, "base", "nf4" if self.method == "qlora" else self.dtype)
        for name, accepted in ACCEPTED.items():
            value = getattr(self, name)
            if value not in accepted:
                raise ValueError(f"{name}: expected one of {', '.join(accepted)}, got {value!r}")
        for name in ("r", "batch", "sequence"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= _LARGEST:
                raise ValueError(f"{name}: expected an integer from 1 to {_LARGEST}, got {value!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {self.dropout}")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            names = f"all-linear or some of {', '.join(TARGETS)}"
            raise ValueError(f"targets: expected {names}, got {', '.join(unknown) or 'none'}")
        if self.method == "qlora" and self.base != "nf4":
            raise ValueError(f"base: qlora has an nf4 base, got {self.base}; see method lora")
        if self.method == "full" and self.base == "nf4":
            raise ValueError("base: method full trains bf16 or fp32 weights, got nf4")
        if self.base != "nf4" and self.base != self.dtype:
            raise ValueError(
                f"base: expected nf4 or the dtype of the activations, {self.dtype}, got {self.base}"
            )


@dataclass(frozen=True)
class Plan:
    """Bytes by part, the base model's number of parameters and that of trained ones.

    The parts of `fixed` are live throughout; `phases[name][part]` is what else is live at the peak
    of a phase of the step, and `totals[name]` the sum of both.
    """

    parameters: int
    trainable: int
    fixed: dict[str, int]
    phases: dict[str, dict[str, int]]
    totals: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        always = sum(self.fixed.values())
        totals = {name: always + sum(parts.values()) for name, parts in self.phases.items()}
        object.__setattr__(self, "totals", totals)

    @property
    def peak(self) -> int:
        return max(self.totals.values())

    @property
    def peak_phase(self) -> str:
        return max(self.totals, key=self.totals.__getitem__)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.peak, "peak_phase": self.peak_phase}


def read_model(name: str) -> Architecture:
    """Read a preset, or the config.json at `name` or in the folder `name`.

    Raises: ValueError naming the defect and what is accepted; OSError if it cannot be read.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ValueError(
            f"model: expected a folder with a config.json, its path, or one of "
            f"{', '.join(PRESETS)}; got {name!r}"
        )
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    try:
        return from_config(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def from_config(config: dict[str, Any]) -> Architecture:
    """Read the dimensions of a transformers config of a known architecture.

    Raises: ValueError naming the entry, what came and what is accepted.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"model_type: expected one of {', '.join(ARCHITECTURES)}, got {brief(kind)}"
        )

    def size(key: str, default: int | None = None, most: int = _LARGEST) -> int:
        value = config.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{key}: expected an integer from 1 to {most}, got {brief(value)}")
        return value

    def flag(key: str) -> bool:
        value = config.get(key)
        if not isinstance(value, bool | None):
            raise ValueError(f"{key}: expected true or false, got {brief(value)}")
        return bool(value)

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    if config.get("head_dim") is None and hidden % heads:
        raise ValueError(f"num_attention_heads: expected a divisor of {hidden}, got {heads}")
    kv_heads = size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(f"num_key_value_heads: expected a divisor of {heads}, got {kv_heads}")
    biased = kind in ("llama", "olmoe", "qwen3_moe") and flag("attention_bias")
    mixture = _mixture(config, kind, size, flag) if kind in MIXTURES else None
    return Architecture(
        hidden=hidden,
        layers=size("num_hidden_layers", most=_MOST_LAYERS),
        heads=heads,
        kv_heads=kv_heads,
        intermediate=size("intermediate_size") if mixture is None else mixture.width,
        vocabulary=size("vocab_size"),
        head_dim=size("head_dim", hidden // heads),
        tied=flag("tie_word_embeddings"),
        qkv_bias=biased or kind == "qwen2",
        o_bias=biased,
        mlp_bias=kind == "llama" and flag("mlp_bias"),
        mixture=mixture,
        qk_norm={"qwen3_moe": "head", "olmoe": "all"}.get(kind, ""),
    )


def _mixture(config: dict[str, Any], kind: str, size: Any, flag: Any) -> Mixture:
    """Read the experts; refuse layers that the step does not describe.

    Args: size, flag: readers of a positive integer and of a boolean of `config`.
    """
    # Of layers without experts, of noise in the router's input, of clamps: what is accepted.
    plain = {
        "qwen3_moe": {"mlp_only_layers": ([], None), "decoder_sparse_step": (1, None)},
        "mixtral": {"router_jitter_noise": (0, None)},
        "olmoe": {"clip_qkv": (None,)},
    }[kind]
    for key, accepted in plain.items():
        if config.get(key) not in accepted:
            raise ValueError(f"{key}: expected {accepted[0]}, got {brief(config[key])}")
    names = ("num_experts", "num_local_experts")
    experts = size(next((name for name in names if config.get(name) is not None), names[0]))
    top = size("num_experts_per_tok", most=experts)
    width = size("moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size")
    normalized = kind == "mixtral" or flag("norm_topk_prob")
    return Mixture(experts, top, width, normalized, wide=kind == "mixtral")


def plan(model: Architecture, training: Training) -> Plan:
    """Count the memory of a training step after the first, when the optimizer has its states.

    Returns: a Plan, in bytes. Raises: ValueError for a training of which the model has not all
        targets, or that is not counted for a mixture of experts.
    """
    _check(model, training)
    shapes = step_shapes(model, training)
    trained = _trained(model, training, shapes.linears)
    fixed = {**_weights(model, training), **_adapters(training, trained)}
    memory = Memory(512 if training.device == "cuda" else 1)
    step = Step(shapes, memory)
    phases = {name: _parts(parts) for name, (_, parts) in step.run().items()}
    phases["optimizer"] = {
        **_parts({GRADIENTS: memory.total}),
        TEMPORARIES: _optimizer_scratch(training, trained),
    }
    return Plan(_parameters(model), sum(trained), fixed, phases)


def largest(model: Architecture, training: Training, name: str, budget: int) -> int:
    """Find the largest `name` ("batch" or "sequence") whose peak is within `budget` bytes, or 0."""

    def fits(value: int) -> bool:
        return plan(model, replace(training, **{name: value})).peak <= budget

    if not fits(1):
        return 0
    low, high = 1, 2
    while high < _LARGEST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _check(model: Architecture, training: Training) -> None:
    """Refuse what the step does not describe."""
    names = {**model.linears(), **model.stacks()}
    unknown = [name for name in training.targets if name not in names]
    if unknown and training.method != "full":
        raise ValueError(
            f"targets: expected all-linear or some of {', '.join(names)}, got {', '.join(unknown)}"
        )
    if model.mixture is None:
        return
    if training.method not in ("lora", "qlora"):
        raise ValueError(f"method: expected lora or qlora for experts, got {training.method}")
    adapted = any(name in training.targets for name in model.stacks())
    if adapted and (not training.patched or training.dropout):
        raise ValueError(
            "targets: experts with adapters are counted as peftkern.patch runs them, without "
            "dropout; PEFT alone makes a second stack of them"
        )
    if not adapted and training.base == "nf4":
        raise ValueError(
            "targets: experts in nf4 without adapters are made dense by transformers, which is "
            "not counted; add gate_up_proj,down_proj"
        )


def _linears(model: Architecture, training: Training) -> dict[str, Linear]:
    linears = {}
    for name, (K, N, bias) in model.linears().items():
        method = {"qlora": "lora"}.get(training.method, training.method)
        if method != "full" and name not in training.targets:
            method = "frozen"
        patched = training.patched and method in ("lora", "adalora")
        linears[name] = Linear(name, K, N, bias, training.base == "nf4", method, patched)
    K, N = model.hidden, model.vocabulary
    head = "full" if training.method == "full" else "frozen"
    linears["lm_head"] = Linear("lm_head", K, N, False, False, head, False)
    return linears


def step_shapes(model: Architecture, training: Training) -> Shapes:
    """Return the shapes for `peftkern.tools.plan.training_step.Step`."""
    known = {**vars(model), **vars(training)}
    return Shapes(
        **{f.name: known[f.name] for f in fields(Shapes) if f.name in known},
        linears=_linears(model, training),
        adapted_stacks=tuple(name for name in model.stacks() if name in training.targets),
        size=_BYTES[training.dtype],
        adapter_size=_BYTES[training.adapter_dtype],
        eager_attention=training.attention == "eager",
        train_all=training.method == "full",
        ranknum_trained=training.dtype != "fp32",
        cuda=training.device == "cuda",
    )


def _parameters(model: Architecture) -> int:
    h = model.hidden
    layer = sum(K * N + N * bias for K, N, bias in model.linears().values()) + model.norms()
    if model.mixture is not None:
        per_expert = sum(K * N for K, N in model.stacks().values())
        layer += model.mixture.experts * (per_expert + h)  # and a row of the router
    return model.layers * layer + model.vocabulary * h * (2 - model.tied) + h


def _weights(model: Architecture, training: Training) -> dict[str, int]:
    """Return bytes of the base model in memory."""
    size = _BYTES[training.dtype]
    layer = sum(_linear_bytes(K * N, training) for K, N, _ in model.linears().values())
    vectors = sum(N for _, N, bias in model.linears().values() if bias) + model.norms()
    table = model.vocabulary * model.hidden * size
    # Rotary frequencies: half a head in float32, twice (transformers keeps the original too).
    rotary = 2 * -(-model.head_dim // 2) * F32
    return {
        "linear layers": model.layers * layer,
        **_expert_weights(model, training),
        "embeddings": table,
        "lm_head": 0 if model.tied else table,
        "norms, biases": (model.layers * vectors + model.hidden) * size + rotary,
    }


def _expert_weights(model: Architecture, training: Training) -> dict[str, int]:
    """Return bytes of the experts, in NF4 as peftkern keeps them: their absmax is not nested."""
    if model.mixture is None:
        return {}
    numel = model.mixture.experts * sum(K * N for K, N in model.stacks().values())
    nf4 = numel // 2 + numel // _BLOCK * F32
    size = nf4 if training.base == "nf4" else numel * _BYTES[training.base]
    router = model.mixture.experts * model.hidden * _BYTES[training.dtype]
    return {"experts": model.layers * size, "routers": model.layers * router}


def _linear_bytes(numel: int, training: Training) -> int:
    """Return bytes of a weight in memory: NF4 as bitsandbytes keeps it, with its tables."""
    if training.base != "nf4":
        return numel * _BYTES[training.base]
    how = {"blocksize": _BLOCK, "double_quant": training.double_quant}
    offset = F32 * training.double_quant  # a tensor here, in a file it is in the JSON
    return state_dict_bytes(numel, **how) - STATE_BYTES + offset


def _trained(model: Architecture, training: Training, linears: dict[str, Linear]) -> list[int]:
    """Return the element count of each trained tensor."""
    r, sizes = training.r, []
    for linear in linears.values():
        if linear.name == "lm_head":
            continue
        if linear.method == "full":
            sizes += [linear.K * linear.N, *([linear.N] if linear.bias else [])]
        elif linear.method != "frozen":
            sizes += [r * linear.K, r * linear.N]
        if linear.method == "dora":
            sizes.append(linear.N)
        if linear.method == "adalora":
            ranknum_trained = training.dtype != "fp32" and not linear.patched
            sizes += [r, *([1] if ranknum_trained else [])]
    if model.mixture is not None:
        per_rank = model.mixture.experts * r
        for name, (K, N) in model.stacks().items():
            sizes += [per_rank * K, per_rank * N] if name in training.targets else []
    if training.method == "full":
        table = model.vocabulary * model.hidden
        sizes = [*sizes, model.hidden, model.hidden] * model.layers
        return [*sizes, model.hidden, *[table] * (2 - model.tied)]
    return sizes * model.layers


def _adapters(training: Training, trained: list[int]) -> dict[str, int]:
    full = training.method == "full"
    size = _BYTES[training.dtype if full else training.adapter_dtype]
    parts = {
        "adapters": 0 if full else sum(trained) * size,
        "optimizer states": sum(_state_bytes(n, size, training.optimizer) for n in trained),
    }
    if training.method == "adalora":
        # Two moving averages of every element; PEFT keeps the importance itself, too.
        parts["importance"] = sum(trained) * (2 * F32 if training.patched else 3 * size)
    return parts


def _state_bytes(numel: int, size: int, optimizer: str) -> int:
    """Return bytes of the optimizer's states of one tensor."""
    if optimizer == "sgd":
        return 0
    if optimizer == "adamw":
        return 2 * numel * size + F32  # the step counter is a tensor
    if optimizer.endswith("8bit") and numel >= _MIN_8BIT:
        return 2 * (numel + -(-numel // _BLOCK_8BIT) * F32)
    return 2 * numel * F32


def _optimizer_scratch(training: Training, trained: list[int]) -> int:
    """Return the workspace of torch's AdamW: on a GPU the square roots of all second moments.

    On a CPU one by one: the root, its corrected copy, and the copy of the tensor before.
    """
    if training.optimizer != "adamw":
        return 0
    size = _BYTES[training.dtype if training.method == "full" else training.adapter_dtype]
    if training.device == "cuda":
        return sum(trained) * size
    return max(2 * n + before for before, n in zip([0, *trained], trained, strict=False)) * size


def _parts(found: dict[str, int]) -> dict[str, int]:
    names = (GRADIENTS, ACTIVATIONS, CHECKPOINTS, LOGITS, TEMPORARIES)
    return {name: found.get(name, 0) for name in names}
