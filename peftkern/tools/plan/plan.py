"""Memory of a fine-tune, counted before it is run.

`plan` builds the model from its config without memory, with the quantization, the adapters, the
optimizer and the batch that are named, and runs one training step on fake tensors while a tracker
sums the live ones: transformers', PEFT's, bitsandbytes' and peftkern's own code is what runs. Any
model of transformers that trains on tokens and labels can be planned. tests/tools/test_plan.py
holds it to torch's own allocator on a CPU; what differs on a GPU is counted and was not measured:

- the caching allocator rounds to 512 bytes, and reserves more than is allocated;
- AdamW there updates all tensors at once and needs their square roots at the same time;
- dropout keeps one byte for each element, and peftkern's a seed;
- peftkern makes an NF4 weight dense for one matmul at a time, as bitsandbytes does (neither does
  for a few rows; that is left out).

The model is trained with use_cache off, one micro-batch to a step, on batches without padding and
without images, and its `outputs` are dropped before backward. The CUDA context, cuBLAS workspaces,
fragmentation and what else runs on the device are not in it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from peftkern.formats.nf4 import STATE_KEYS
from peftkern.formats.table import FORMATS, NUMBERS
from peftkern.tools.quiet import quiet

if TYPE_CHECKING:
    from peftkern.tools.plan.work import Work

DENSE = ("bf16", "fp32")
ACCEPTED = {  # in the fields of Training that are names
    "method": ("lora", "qlora", "adalora", "dora", "full"),
    "dtype": ("bf16", "fp32"),
    "adapter_dtype": ("bf16", "fp32"),
    "optimizer": ("adamw", "adamw-32bit", "adamw-8bit", "paged-adamw", "paged-adamw-8bit", "sgd"),
    "attention": ("sdpa", "eager"),
    "device": ("cuda", "cpu"),
    "base": (*DENSE, *NUMBERS),
    "shard": (None, "ddp", "fsdp2", "zero3"),
    "param_dtype": (None, "bf16", "fp32"),
    "reduce_dtype": (None, "bf16", "fp32"),
}
ALL = ("all-linear",)
PHASES = ("forward", "backward", "optimizer")
_LARGEST = 2**32


@dataclass(frozen=True)
class Training:
    """Training configuration.

    method: lora, qlora (4-bit base), adalora, dora, full. targets: names of the linear layers with
    adapters, and of parameters of experts (gate_up_proj, down_proj), which have one for each
    expert; ("all-linear",): all of them. adapter: the fields of a PEFT config in the place of
    method, r, targets and dropout. base: dtype or 4-bit format of the frozen linear layers and
    experts (None: nf4 for qlora, else `dtype`): nf4 and fp4 as bitsandbytes has them, the others as
    `layers.BlockLinear`; mxfp4 of gpt-oss is that of its experts alone, as it is shipped.
    blocksize: of the format (None: 64, of int4 128). dtype: of activations and of all weights that
    are not quantized; adapter_dtype: of the adapters, which PEFT keeps in float32. double_quant:
    absmax of nf4 and fp4 in 8 bits. optimizer: adamw (torch's, states in the dtype of what is
    trained), sgd (no momentum), or bitsandbytes' adamw-32bit, adamw-8bit, paged-adamw,
    paged-adamw-8bit. patched: after `peftkern.patch`. autocast: the forward pass in bf16 where
    torch.autocast does so. prepare_kbit: after PEFT's prepare_model_for_kbit_training. device: cuda
    or cpu. target_r: of adalora, the triplets of a layer that compaction leaves on average
    (`Planner.compacted`).

    devices, shard: so many devices share the model by ddp, fsdp2 (`fully_shard` of each decoder
    layer) or zero3 (DeepSpeed), each with `batch` sequences of its own; bytes are then those of
    one. Of fsdp2 alone: reshard, the `reshard_after_forward` of layers; param_dtype, reduce_dtype,
    those of its `MixedPrecisionPolicy`: dtype and adapter_dtype are then what is stored.
    """

    method: str = "lora"
    r: int = 16
    targets: tuple[str, ...] = ALL
    base: str | None = None
    blocksize: int | None = None
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
    autocast: bool = False
    prepare_kbit: bool = False
    adapter: dict[str, Any] | None = None
    target_r: int | None = None
    devices: int = 1
    shard: str | None = None
    reshard: bool = True
    param_dtype: str | None = None
    reduce_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.base is None:
            object.__setattr__(self, "base", "nf4" if self.method == "qlora" else self.dtype)
        for name, accepted in ACCEPTED.items():
            value = getattr(self, name)
            if value not in accepted:
                names = ", ".join(filter(None, accepted))
                raise ValueError(f"{name}: expected one of {names}, got {value!r}")
        for name in ("r", "batch", "sequence"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= _LARGEST:
                raise ValueError(f"{name}: expected an integer from 1 to {_LARGEST}, got {value!r}")
        if self.adapter is not None and self.method == "full":
            raise ValueError("adapter: expected none with method full")
        if self.target_r is not None:
            self._check_target()
        self._check_devices()
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {self.dropout}")
        self._check_base()

    def _check_base(self) -> None:
        formats = ", ".join(NUMBERS)
        if self.method == "qlora" and not self.quantized:
            raise ValueError(
                f"base: qlora has a 4-bit base ({formats}), got {self.base}; see method lora"
            )
        if self.method == "full" and self.quantized:
            raise ValueError(f"base: method full trains bf16 or fp32 weights, got {self.base}")
        if not self.quantized and self.base != self.dtype:
            raise ValueError(
                f"base: expected one of {formats}, or the dtype of the activations, {self.dtype}, "
                f"got {self.base}"
            )
        if self.quantized and not self.of_bitsandbytes and self.is_sharded:
            raise ValueError(
                f"base: {self.base} is planned on one device or on ddp, nf4 and fp4 on "
                f"{self.shard}, too; got {self.base}"
            )
        if self.quantized:
            FORMATS[NUMBERS[self.base]].chosen_blocksize(self.blocksize)
        elif self.blocksize is not None:
            raise ValueError(f"blocksize: expected none in a dense base, got {self.blocksize!r}")

    @property
    def quantized(self) -> bool:
        """Whether the base is in a 4-bit format."""
        return self.base in NUMBERS

    @property
    def of_bitsandbytes(self) -> bool:
        """Whether the base is in a format of bitsandbytes."""
        return self.base in STATE_KEYS

    @property
    def is_sharded(self) -> bool:
        """Whether each device holds a part of the weights."""
        return self.shard in ("fsdp2", "zero3")

    @property
    def blocks(self) -> int:
        """Values in a block of the base's format."""
        return FORMATS[NUMBERS[self.base]].chosen_blocksize(self.blocksize)

    @property
    def adaptive(self) -> bool:
        """Whether the adapters are AdaLoRA's."""
        if self.adapter is None:
            return self.method == "adalora"
        return self.adapter.get("peft_type") == "ADALORA"

    @property
    def init_r(self) -> int:
        """Triplets or ranks of a layer before any is pruned."""
        return self.r if self.adapter is None else self.adapter.get("init_r", 12)

    def computed(self) -> Training:
        """Return the training with the dtypes of its forward pass, which engines cast to."""
        if self.shard == "zero3":
            return replace(self, adapter_dtype=self.dtype)
        if self.param_dtype is None:
            return self
        kind = self.param_dtype
        base = self.base if self.base not in DENSE else kind
        return replace(self, dtype=kind, adapter_dtype=kind, base=base)

    def compacted(self) -> Training:
        """Return the training as it is after compaction to target_r."""
        if self.adapter is None:
            return replace(self, r=self.target_r, target_r=None)
        adapter = {**self.adapter, "init_r": self.target_r, "target_r": self.target_r}
        return replace(self, adapter=adapter, target_r=None)

    def _check_devices(self) -> None:
        if type(self.devices) is not int or not 1 <= self.devices <= _LARGEST:
            raise ValueError(
                f"devices: expected an integer from 1 to {_LARGEST}, got {self.devices!r}"
            )
        if self.shard is None and self.devices > 1:
            raise ValueError(
                f"devices: expected 1 unless the model is shared by ddp, fsdp2 or zero3, got "
                f"{self.devices}"
            )
        if self.shard is not None and self.devices == 1:
            raise ValueError(f"devices: {self.shard} needs at least 2, got 1")
        own = {"param_dtype": None, "reduce_dtype": None, "reshard": True}
        for name, value in own.items():
            if self.shard != "fsdp2" and getattr(self, name) != value:
                raise ValueError(f"{name}: an option of shard fsdp2, got shard {self.shard}")
        if self.adaptive and self.is_sharded:
            raise ValueError(f"shard: adalora is planned on ddp alone, got {self.shard}")

    def _check_target(self) -> None:
        if not self.adaptive:
            raise ValueError("target_r: expected none, as only adalora prunes to a budget")
        if type(self.target_r) is not int or not 1 <= self.target_r <= self.init_r:
            raise ValueError(
                f"target_r: expected an integer from 1 to {self.init_r}, the triplets at first, "
                f"got {self.target_r!r}"
            )


@dataclass(frozen=True)
class Plan:
    """Bytes by part, the base model's number of parameters and that of trained ones, the work.

    The parts of `fixed` are live throughout; `phases[name][part]` is what else is live at the peak
    of a phase of the step, and `totals[name]` the sum of both. `work`: of the ops of a step.
    """

    parameters: int
    trainable: int
    fixed: dict[str, int]
    phases: dict[str, dict[str, int]]
    work: Work
    communication: dict[str, dict[str, int]] = field(default_factory=dict)
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
        found = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "work"}
        found |= {"peak": self.peak, "peak_phase": self.peak_phase}
        return {**found, "flops": self.work.flops, "moved_bytes": self.work.nbytes}


@contextlib.contextmanager
def _libraries() -> Iterator[None]:
    """Silence the libraries' advice, and turn an ImportError into what planning needs."""
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        raise ValueError(
            f"planning needs transformers and PEFT, and bitsandbytes for nf4: pip install"
            f" 'peftkern[peft]' ({error})"
        ) from error


def _after_masks(plan: Plan) -> Plan:
    """Return a plan without the importance of AdaLoRA's triplets."""
    from peftkern.tools.plan.work import IMPORTANCE

    fixed = {part: nbytes for part, nbytes in plan.fixed.items() if part != "importance"}
    return replace(plan, fixed=fixed, work=plan.work.without(IMPORTANCE))


def read_model(name: str) -> Any:
    """Read the transformers config of a preset, or the config.json at `name` or in that folder.

    Raises: ValueError naming the defect and what is accepted; OSError if it cannot be read.
    """
    with _libraries():
        from peftkern.tools.models import read_config

        config = read_config(name, "model")
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # a training names its own base
    return config


def plan(model: Any, training: Training) -> Plan:
    """Count the memory of a training step after the first, when the optimizer has its states.

    Args: model, a transformers config, or its fields as in config.json.
    Returns: a Plan, in bytes.
    Raises: ValueError for a training that this model cannot have.
    """
    return Planner(model, training).plan()


def largest(model: Any, training: Training, name: str, budget: int) -> int:
    """Find the largest `name` ("batch" or "sequence") whose peak is within `budget` bytes, or 0."""
    return Planner(model, training).largest(name, budget)


class Planner:
    """Plans of one training for several batches and sequences: the model is built once."""

    def __init__(self, model: Any, training: Training) -> None:
        with _libraries():
            from peftkern.tools import models
            from peftkern.tools.plan.step import Steps

            config = models.from_config(model) if isinstance(model, dict) else model
            self._config = config
            if training.of_bitsandbytes:
                import bitsandbytes  # noqa: F401
            self.training, self._steps = training, Steps(config, training)
        self._plans: dict[tuple[int, int], Plan] = {}

    def plan(self, **sizes: int) -> Plan:
        """Return the plan of the training, with another batch or sequence if given."""
        asked = replace(self.training, **sizes)
        key = (asked.batch, asked.sequence)
        if key not in self._plans:
            with _libraries():
                from peftkern.tools.plan.work import Work

                trace = self._steps.trace(*key)
            counts, fixed = trace.pop("counts"), trace.pop("fixed")
            work = Work(trace.pop("work"))
            moved = self._communication(trace.pop("communication"))
            phases = {}
            for phase in PHASES:
                found = (parts for segment, parts in trace.items() if segment[0] == phase)
                phases[phase] = dict(max(found, key=Counter.total))
            numbers = counts["parameters"], counts["trainable"]
            self._plans[key] = Plan(*numbers, dict(fixed), phases, work, moved)
        return self._plans[key]

    def _communication(self, counted: Counter) -> dict[str, dict[str, int]]:
        """Name the collectives of a step, and say what each device sends."""
        from peftkern.tools.plan.sharding import sent

        found: dict[str, dict[str, int]] = {}
        for (collective, phase, what), number in counted.items():
            one = found.setdefault(f"{collective}, {phase}", {})
            one[what] = number
            if what == "bytes":
                one["sent"] = sent(collective, number, self.training.devices)
        return found

    def compacted(self) -> tuple[Plan, Plan]:
        """Return the plan after AdaLoRA's last mask, and after compaction to target_r.

        No importance is kept from then on. Every layer has target_r triplets here, as it is on
        average; what is saved depends on which layers keep more.
        """
        return tuple(
            _after_masks(plan)
            for plan in (self.plan(), Planner(self._config, self.training.compacted()).plan())
        )

    def largest(self, name: str, budget: int) -> int:
        """Find the largest `name` whose peak is within `budget` bytes, or 0.

        The search begins at the training's own. The next one is guessed from the line through the
        last that fits and the first that does not; both neighbors of the answer have been run.
        """

        def peak(value: int) -> int:
            return self.plan(**{name: value}).peak

        low = getattr(self.training, name)
        high = min(2 * low, _LARGEST)
        if peak(low) > budget:
            low, high = 1, low
            if peak(low) > budget:
                return 0
        while high < _LARGEST and peak(high) <= budget:
            slope = max((peak(high) - peak(low)) / (high - low), 1.0)
            guess = high + int((budget - peak(high)) / slope) + 1
            low, high = high, min(max(guess, high + 1), 64 * high, _LARGEST)
        turn = 0
        while high - low > 1:
            share = (budget - peak(low)) / max(peak(high) - peak(low), 1)
            guess = low + int(share * (high - low)) if turn % 3 < 2 else (low + high) // 2
            guess = min(max(guess, low + 1), high - 1)
            low, high = (guess, high) if peak(guess) <= budget else (low, guess)
            turn += 1
        return low
