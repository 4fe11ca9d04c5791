"""`convert_adapter`: an adapter in another layout, without a change of any product, or refused.

    peft          PEFT's folder, its experts as PEFT 0.19.1 and newer pack them
    peft-old-moe  the same for PEFT 0.19.0 and older, which exchanged the experts' input and output
    per-expert    a pair for every expert: transformers 4, vLLM
    grouped       experts in three dimensions: SGLang, Megatron-Bridge
    diffusers     pytorch_lora_weights.safetensors
    kohya         one file of sd-scripts
    mlx           adapters.safetensors of mlx-lm
    lora          PEFT's folder of plain LoRA, from AdaLoRA, from an initialization that changed the
                  base (with the adapter as it was; exact but for LoftQ), from DoRA (with the base;
                  approximate)

Scaling becomes 1 in all of them: lora_B takes it, rounded once unless it is a power of two.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from peftkern.formats.json_files import brief
from peftkern.tools.adapters.adapter import (
    UNMERGEABLE,
    Adapter,
    AdapterError,
    Update,
    changed_base,
    check_finite,
)
from peftkern.tools.adapters.convert import base as bases
from peftkern.tools.adapters.convert import diffusers, grouped, kohya, mlx, per_expert, to_lora
from peftkern.tools.adapters.experts import LAYOUTS
from peftkern.tools.adapters.read import PEFT, reader_of
from peftkern.tools.adapters.source import MODEL, open_source
from peftkern.tools.adapters.write import Files, check_destination, file_tensors, fold, publish

Base = str | os.PathLike | None
_COMPONENTS = ("diffusers", "kohya")  # layouts whose names begin with a component
_EXCHANGED = "0.19.0"  # the last PEFT that exchanged the input and output of experts


@dataclass(frozen=True)
class Conversion:
    """What was converted, and what changed on the way.

    rounded: modules whose lora_B is rounded once, since their scaling is no power of two.
    losses: of DoRA's modules that became plain, what the best update of their rank leaves out.
    """

    source: str
    destination: str
    layout: str
    to: str
    modules: int
    rounded: tuple[str, ...] = ()
    losses: dict[str, to_lora.Loss] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def lost(self) -> float:
        """What all losses leave out of all of DoRA's updates, relative to their norm."""
        parts = self.losses.values()
        norm = math.sqrt(sum(one.norm**2 for one in parts))
        return math.sqrt(sum(one.lost**2 for one in parts)) / norm if norm else 0.0


def convert_adapter(
    source: str | os.PathLike | Adapter,
    destination: str | os.PathLike,
    to: str,
    *,
    from_layout: str | None = None,
    base: Base = None,
    initial: str | os.PathLike | Adapter | None = None,
    component: str | None = None,
    rank: int | None = None,
    force: bool = False,
) -> Conversion:
    """Write an adapter in another layout, whole or not at all.

    Args:
        source: a folder, a file, or an Adapter with PEFT's names, like one of a live model.
        to: one of TARGETS.
        from_layout: of the experts of source and initial, where nothing in them tells: one of
            experts.LAYOUTS.
        base: folder of the base model; needed from kohya, whose names are not invertible, and from
            DoRA to plain LoRA, and to per-expert and mlx of stacks of experts, whose kind of model
            it tells, unless the folder that the adapter names as its base is there.
        initial: the adapter as its initialization made it, to make plain LoRA of PiSSA's and kin.
        component: "unet", "text_encoder", ...: what a PEFT adapter is of, to diffusers and kohya;
            which one to take, from them.
        rank: of plain LoRA from DoRA; None for the adapter's own.
        force: replace the adapter in the destination.
    Raises: AdapterError, one line that names the file and the tensor; nothing is written then.
    """
    destination = Path(destination)
    if to not in TARGETS:
        raise AdapterError(f"to: expected one of {', '.join(TARGETS)}, got {to!r}")
    if from_layout is not None and from_layout not in LAYOUTS:
        raise AdapterError(
            f"from_layout: expected one of {', '.join(LAYOUTS)}, got {brief(from_layout)}"
        )
    if base is not None and not Path(base).is_dir():
        raise AdapterError(f"base: expected a folder, got {brief(str(base))}")
    if initial is not None and to != "lora":
        raise AdapterError(f"initial: makes plain LoRA, and {to} was asked for")
    if rank is not None and to != "lora":
        raise AdapterError(f"rank: of plain LoRA from DoRA, and {to} was asked for")
    if rank is not None and rank < 1:
        raise AdapterError(f"rank: expected an integer above 0, got {rank}")
    paths = [one for one in (source, initial) if not isinstance(one, Adapter)]
    check_destination(destination, force, *paths)
    read, layout = _read(source, from_layout)
    adapter = _named(read, layout, to, base, component)
    losses: dict[str, to_lora.Loss] = {}
    if to == "lora":
        if rank is not None and all(one.magnitude is None for one in adapter.updates.values()):
            raise AdapterError(f"rank: of plain LoRA from DoRA, and {read.source} has none")
        to_lora.check_lora(adapter, initial=initial is not None, base=base is not None)
        adapter = replace(adapter, config=to_lora.plain_config(adapter.config))
    folded = fold(adapter)
    rounded = [key for key, one in folded.updates.items() if not _exact(adapter.updates[key], one)]
    if to == "lora":
        start = None if initial is None else _read(initial, from_layout)[0]
        folded, losses = _plain(folded, base, start, rank)
    check_finite(folded)
    files = TARGETS[to](folded, base)
    publish(destination, files)
    names = read.source, str(destination), layout, to
    notes = (*adapter.notes, *(per_expert.warnings(files.tensors) if to == "per-expert" else ()))
    return Conversion(*names, len(folded.updates), tuple(rounded), losses, notes)


def _read(source: str | os.PathLike | Adapter, layout: str | None) -> tuple[Adapter, str]:
    """Return an adapter, and the name of the layout it is in."""
    if isinstance(source, Adapter):
        return source, PEFT
    opened = open_source(source)
    reader = reader_of(opened)
    return reader.read(opened, layout), reader.name


def _exact(update: Update, folded: Update) -> bool:
    return torch.equal(update.lora_B.double() * update.scaling, folded.lora_B.double())


def _named(adapter: Adapter, layout: str, to: str, base: Base, component: str | None) -> Adapter:
    """Return the adapter with the names that the target has: with a component, or without."""
    if layout == "kohya" and (base is not None or to != "kohya"):
        if base is None:
            raise AdapterError(
                f"{adapter.source}: kohya's names have _ for ., which of them only the names of "
                "the base tell: expected --base"
            )
        adapter = kohya.resolve(adapter, bases.component_modules(base))
    if (layout in _COMPONENTS) == (to in _COMPONENTS):
        if component is not None:
            raise AdapterError(f"component: {layout} to {to} has all or none, got {component!r}")
        return adapter
    if to in _COMPONENTS:
        if component not in diffusers.COMPONENTS:
            raise AdapterError(
                f"component: expected what {adapter.source} is of, one of "
                f"{', '.join(diffusers.COMPONENTS)}, got {component or 'none'}"
            )
        renamed = [
            replace(one, module=f"{component}.{one.module}") for one in adapter.updates.values()
        ]
        return adapter.with_updates(renamed)
    present = list(dict.fromkeys(name.partition(".")[0] for name in adapter.updates))
    taken = present[0] if component is None and len(present) == 1 else component
    if taken not in present:
        raise AdapterError(
            f"component: expected one of those in {adapter.source}, {', '.join(present)}, "
            f"got {component or 'none'}"
        )
    return adapter.with_updates(
        replace(one, module=one.module.removeprefix(f"{taken}."))
        for name, one in adapter.updates.items()
        if name.startswith(f"{taken}.")
    )


def _plain(
    adapter: Adapter, base: Base, initial: Adapter | None, rank: int | None
) -> tuple[Adapter, dict[str, to_lora.Loss]]:
    """Return the adapter as plain LoRA, and what DoRA's modules lost."""
    if initial is not None:
        start = fold(replace(initial, config=to_lora.plain_config(initial.config)))
        return fold(to_lora.subtract_initial(adapter, start)), {}
    if base is None or all(one.magnitude is None for one in adapter.updates.values()):
        return adapter, {}
    plain, losses = to_lora.undo_dora(adapter, bases.Weights(base, adapter), rank)
    return fold(plain), losses


def _check_portable(adapter: Adapter, to: str) -> None:
    """Raise AdapterError for what the layouts that are not PEFT's have no place for."""
    if adapter.extras:
        raise AdapterError(
            f"{adapter.source}: {next(iter(adapter.extras))}: {to}'s layout holds updates alone"
        )
    if method := changed_base(adapter.config):
        raise AdapterError(
            f"{adapter.source}: init_lora_weights: {method} changed the base, which {to}'s layout "
            "cannot say: convert it to lora first, with --initial"
        )
    for name, why in UNMERGEABLE.items():
        if adapter.config.get(name):
            raise AdapterError(f"{adapter.source}: {name}: {why}, which {to}'s layout cannot say")
    for key, update in adapter.updates.items():
        if update.parameter != "weight" and update.kind != "experts":
            raise AdapterError(
                f"{adapter.source}: {key}: {to}'s layout has updates of modules alone"
            )


def _with_experts(adapter: Adapter, to: str) -> Adapter:
    """Return the adapter with its experts in stacks. Raises: AdapterError if it has none."""
    gathered = _gathered(adapter)
    if all(update.kind != "experts" for update in gathered.updates.values()):
        raise AdapterError(f"{adapter.source}: has no experts, and {to} is a layout of experts")
    return gathered


def _gathered(adapter: Adapter) -> Adapter:
    if not any(map(per_expert.is_per_expert, adapter.updates.values())):
        return adapter
    return fold(per_expert.gather_experts(adapter))


def _peft(adapter: Adapter, *_: Base) -> Files:
    return Files(MODEL, file_tensors(adapter), {"format": "pt"}, adapter.config)


def _peft_gathered(adapter: Adapter, *_: Base) -> Files:
    return _peft(_gathered(adapter))


def _peft_old_moe(adapter: Adapter, *_: Base) -> Files:
    adapter = _with_experts(adapter, "peft-old-moe")
    exchanged = [
        replace(one, lora_A=one.lora_B.mT, lora_B=one.lora_A.mT) if one.kind == "experts" else one
        for one in adapter.updates.values()
    ]
    config = {**adapter.config, "peft_version": _EXCHANGED}
    return _peft(replace(adapter.with_updates(exchanged), config=config))


def _per_expert(adapter: Adapter, base: Base) -> Files:
    adapter = _with_experts(adapter, "per-expert")
    return _peft(fold(per_expert.scatter_experts(adapter, bases.is_mixtral(base, adapter))))


def _grouped(adapter: Adapter, *_: Base) -> Files:
    adapter = _with_experts(adapter, "grouped")
    stacks = [one for one in adapter.updates.values() if one.kind == "experts"]
    others = [one for one in adapter.updates.values() if one.kind != "experts"]
    kept = replace(adapter, updates={one.key: one for one in others})
    tensors = file_tensors(kept)
    for one in stacks:
        tensors |= grouped.named(one)
    return Files(MODEL, tensors, {"format": "pt"}, grouped.config(adapter))


def _diffusers(adapter: Adapter, *_: Base) -> Files:
    _check_portable(adapter, "diffusers")
    return Files(diffusers.FILE, *diffusers.write(adapter), None)


def _kohya(adapter: Adapter, base: Base) -> Files:
    _check_portable(adapter, "kohya")
    two = base is not None and (Path(base) / "text_encoder_2").is_dir()
    tensors, metadata = kohya.write(adapter, two_encoders=two)
    return Files(kohya.FILE, tensors, metadata, None)


def _mlx(adapter: Adapter, base: Base) -> Files:
    _check_portable(adapter, "mlx")
    adapter = _gathered(adapter)
    tensors, config = mlx.write(adapter, mixtral=bases.is_mixtral(base, adapter))
    return Files(mlx.FILE, tensors, {"format": "pt"}, config)


TARGETS: dict[str, Callable[..., Files]] = {
    "peft": _peft_gathered,
    "peft-old-moe": _peft_old_moe,
    "per-expert": _per_expert,
    "grouped": _grouped,
    "diffusers": _diffusers,
    "kohya": _kohya,
    "mlx": _mlx,
    "lora": _peft,
}
