"""Stacks of experts under PEFT's `target_parameters`: names, layouts, and what tells which.

PEFT wraps each targeted parameter of a module once, the first that the model registered innermost:
gate_up_proj has the keys `experts.base_layer.lora_A`, down_proj `experts.lora_A`. All experts of a
parameter share two matrices, A [E*r, n] and B [m, r*E]. Rows e*r to (e+1)*r of A are expert e;
which columns of B, and which of the two matrices takes the input, is the layout:

    peft              columns e, E+e, 2E+e, ... of B; A takes the input: PEFT 0.19.1 and newer
    peft-old-moe      the same columns, but input and output exchanged: A [E*r, m], B [n, r*E]
    unsloth           columns e*r to (e+1)*r of B: Unsloth before September 2026
    unsloth-old-moe   the same, input and output exchanged

Each is a relabeling of the others: no bit changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from peftkern.formats.json_files import brief
from peftkern.formats.rank_patterns import PREFIX
from peftkern.tools.adapters.adapter import AdapterError, Update
from peftkern.tools.adapters.targets import is_module_target, parameter_targets

LAYOUTS = ("peft", "peft-old-moe", "unsloth", "unsloth-old-moe")
# As the experts of transformers register them: of a module's wrappers the first is the innermost.
REGISTERED = ("gate_up_proj", "gate_proj", "up_proj", "gate_up_proj_bias", "down_proj")
_MARKER = "lora_B_layout"  # of Unsloth, in the config
_MARKED = {"rank_major": "peft", "grouped_by_expert": "unsloth"}
_SETTLED = (0, 19, 1)  # the first PEFT that reads its own files as "peft"


def regroup(A: Tensor, B: Tensor, experts: int, layout: str) -> tuple[Tensor, Tensor]:
    """Return lora_A [E, r, n] and lora_B [E, m, r] of a file's matrices, as views."""
    rank = A.shape[0] // experts
    A = A.reshape(experts, rank, A.shape[1])
    if layout.startswith("unsloth"):
        B = B.reshape(B.shape[0], experts, rank).permute(1, 0, 2)
    else:
        B = B.reshape(B.shape[0], rank, experts).permute(2, 0, 1)
    return (B.mT, A.mT) if layout.endswith("old-moe") else (A, B)


def ungroup(A: Tensor, B: Tensor, layout: str = "peft") -> tuple[Tensor, Tensor]:
    """Return a file's matrices of lora_A [E, r, n] and lora_B [E, m, r]."""
    if layout.endswith("old-moe"):
        A, B = B.mT, A.mT
    order = (1, 0, 2) if layout.startswith("unsloth") else (1, 2, 0)
    return A.reshape(-1, A.shape[2]), B.permute(order).reshape(B.shape[1], -1)


def split_wrapper(name: str) -> tuple[str, int]:
    """Return the module of a wrapper, and how many wrappers it lies inside of."""
    depth = 0
    while name.endswith(".base_layer"):
        name, depth = name.removesuffix(".base_layer"), depth + 1
    return name, depth


def wrapper(module: str, parameter: str, others: Iterable[str]) -> str:
    """Return the name of a parameter's wrapper among all targeted ones of the module."""
    ranked = sorted(others, key=_registered)
    return module + ".base_layer" * (len(ranked) - 1 - ranked.index(parameter))


def wrapped_parameters(
    config: Mapping[str, Any], wrappers: Iterable[str], source: str
) -> dict[str, tuple[str, str]]:
    """Name (module, parameter) of each wrapper that stands for a targeted parameter.

    Raises: AdapterError where target_parameters does not tell which is which.
    """
    depths: dict[str, dict[int, str]] = {}
    for name in wrappers:
        module, depth = split_wrapper(name)
        depths.setdefault(module, {})[depth] = name
    found: dict[str, tuple[str, str]] = {}
    for module, names in depths.items():
        parameters = sorted(set(parameter_targets(config, module)), key=_registered)
        if not parameters or (set(names) == {0} and is_module_target(config, module)):
            if set(names) != {0}:
                where = f"{source}: {PREFIX}{names[max(names)]}"
                raise AdapterError(f"{where}: target_parameters names no parameter of it")
            continue
        if sorted(names) != list(range(len(parameters))):
            raise AdapterError(
                f"{source}: {PREFIX}{names[min(names)]}: holds updates of {len(names)} parameters, "
                f"target_parameters names {', '.join(parameters)}"
            )
        if len(parameters) > 1 and not set(parameters) <= set(REGISTERED):
            raise AdapterError(
                f"{source}: {PREFIX}{names[max(names)]}: one of {', '.join(parameters)}, "
                "whose order nothing in the file tells"
            )
        inner = len(parameters) - 1
        found |= {name: (module, parameters[inner - depth]) for depth, name in names.items()}
    return found


def find_layout(
    config: Mapping[str, Any],
    stacks: Sequence[Update],
    hidden: int | None,
    asked: str | None,
    source: str,
) -> tuple[str, str]:
    """Tell the layout of the stacks of one file, or take the one that was asked for.

    Both matrices of one module tell input from output: gate_up_proj [2I, H] and down_proj [H, I]
    fit one way only. So does a hidden size that other layers show. Which columns of B belong to
    an expert no shape tells: PEFT's are known, Unsloth's if its marker is there.

    Args: stacks: their factors as they are in the file; hidden: inputs of the attention's
        projections, if all agree.
    Returns: the layout, and the evidence in words.
    Raises: AdapterError asking for a layout where nothing tells, or where the shapes rule out the
        one that was asked for.
    """
    shown = _shown(stacks, hidden)
    if len({old for old, _ in shown}) > 1:
        raise AdapterError(f"{source}: its experts have two layouts: {shown[0][1]}, {shown[-1][1]}")
    if asked is not None:
        if shown and shown[0][0] != asked.endswith("old-moe"):
            raise AdapterError(f"{source}: not in layout {asked}: {shown[0][1]}")
        return asked, "as asked for"
    packing, why = _packing(config, stacks, source)
    if shown:
        old, seen = shown[0]
    elif _version(config) >= _SETTLED:
        old, seen = False, f"written by PEFT {config['peft_version']}"
    else:
        one = stacks[0]
        raise AdapterError(
            f"{source}: {PREFIX}{one.module}.{one.parameter}: A {list(one.lora_A.shape)} and B "
            f"{list(one.lora_B.shape)} do not tell input from output, which PEFT before 0.19.1 "
            f"exchanged: --layout {packing} or {_exchanged(packing)}"
        )
    return _exchanged(packing) if old else packing, f"{seen}; {why}"


def _exchanged(packing: str) -> str:
    return f"{packing}-old-moe"


def _shown(stacks: Sequence[Update], hidden: int | None) -> list[tuple[bool, str]]:
    """List what shapes tell: whether input and output are exchanged, and what shows it."""
    found, modules = [], {}
    for one in stacks:
        m, n = one.lora_B.shape[0], one.lora_A.shape[1]
        modules.setdefault(one.module, {})[one.parameter] = (m, n)
        takes, gives = (n, m) if one.parameter.startswith(("gate", "up")) else (m, n)
        if hidden in (takes, gives) and takes != gives:
            where = f"{one.module}.{one.parameter} is {m} x {n}"
            found.append((gives == hidden, f"{where} beside a hidden size of {hidden}"))
    for module, sizes in modules.items():
        if {"gate_up_proj", "down_proj"} <= sizes.keys():
            (up, into), (out, inner) = sizes["gate_up_proj"], sizes["down_proj"]
            said = f"gate_up_proj {up} x {into} and down_proj {out} x {inner} of {module}"
            if (into, up) == (out, 2 * inner):
                found.append((False, f"{said} fit as they are"))
            elif (up, into) == (inner, 2 * out):
                found.append((True, f"{said} fit with input and output exchanged"))
    return found


def _packing(config: Mapping[str, Any], stacks: Sequence[Update], source: str) -> tuple[str, str]:
    """Tell which columns of B belong to an expert. Raises: AdapterError."""
    if (marker := config.get(_MARKER)) is not None:
        if marker not in _MARKED:
            raise AdapterError(
                f"{source}: {_MARKER}: expected one of {', '.join(_MARKED)}, got {brief(marker)}"
            )
        return _MARKED[marker], f"{_MARKER} is {marker}"
    if not _of_unsloth(config):
        return "peft", "columns as PEFT packs them"
    raise AdapterError(
        f"{source}: {PREFIX}{stacks[0].module}.{stacks[0].parameter}: Unsloth packed columns of B "
        f"in two ways, and without {_MARKER} nothing tells which: --layout peft or unsloth"
    )


def settled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config that say of stacks of experts: layout "peft"."""
    fields = {}
    if _version(config) < _SETTLED:
        fields["peft_version"] = ".".join(map(str, _SETTLED))
    if _MARKER in config or _of_unsloth(config):
        fields[_MARKER] = next(iter(_MARKED))
    return fields


def _of_unsloth(config: Mapping[str, Any]) -> bool:
    origin = f"{config.get('auto_mapping')} {config.get('base_model_name_or_path')}"
    return "unsloth" in origin.lower()


def _version(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the version of PEFT that wrote a config; () where it does not say."""
    found = re.match(r"(\d{1,4})\.(\d{1,4})\.(\d{1,4})(?!\.?dev)", str(config.get("peft_version")))
    return tuple(map(int, found.groups())) if found else ()


def _registered(parameter: str) -> tuple[int, str]:
    known = parameter in REGISTERED
    return REGISTERED.index(parameter) if known else len(REGISTERED), parameter
