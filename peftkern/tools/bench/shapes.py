"""Linear layers of well-known models, and the parsers of the command line's lists."""

from __future__ import annotations

import re
from dataclasses import dataclass

from peftkern.tools.plan import presets

# (N, K) of the linear layers of a block, of the models that `peftkern plan` knows by name.
PRESETS = {
    model: {name: (N, K) for name, (K, N) in presets.linears(config).items()}
    for model, config in presets.PRESETS.items()
    if presets.linears(config)
}
# (E, N, K) of the experts' layers, from the config.json that the authors publish.
EXPERT_PRESETS = {
    "qwen3-30b-a3b": {"gate_up_proj": (128, 1536, 2048), "down_proj": (128, 2048, 768)},
    "mixtral-8x7b": {"gate_up_proj": (8, 28672, 4096), "down_proj": (8, 4096, 14336)},
    "gpt-oss-20b": {"gate_up_proj": (32, 5760, 2880), "down_proj": (32, 2880, 2880)},
    "deepseek-v3": {"gate_up_proj": (256, 4096, 7168), "down_proj": (256, 7168, 2048)},
}
# Sizes in the order of their letters, and an example.
FORMS = {"MNK": "256x4096x4096", "NK": "4096x4096", "MNKE": "256x1024x512x64"}
LARGEST = 1 << 24  # of one dimension; the machine's memory is checked later


@dataclass(frozen=True)
class Shape:
    """Weight of N rows and K columns, or E of them; M rows of activations where the shape fixes
    them."""

    name: str
    N: int
    K: int
    M: int | None = None
    E: int | None = None


def parse_shapes(text: str, option: str = "--shapes", sizes: str = "MNK") -> list[Shape]:
    """Parse shapes of a comma-separated list, each size once, in the order given.

    A preset stands for its q, k, v, o, gate, up and down projections, or those of its experts;
    those of equal size are one shape, named after the first. sizes: one of FORMS.
    Raises: ValueError naming the option, the input and the accepted forms.
    """
    presets = EXPERT_PRESETS if "E" in sizes else PRESETS
    layers = {f"{model}-{name}": n for model, of in presets.items() for name, n in of.items()}
    accepted = f"{', '.join(presets)}, one layer of them ({next(iter(layers))}), or"
    accepted += f" {'x'.join(sizes)} ({FORMS[sizes]}), each from 1 to {LARGEST}"
    shapes: dict[tuple, Shape] = {}
    for part in items(option, text, accepted):
        found = {name: n for name, n in layers.items() if part in (name, name.rpartition("-")[0])}
        given = [dict(zip("ENK" if "E" in sizes else "NK", n, strict=True)) for n in found.values()]
        if re.fullmatch(r"[0-9]{1,9}(x[0-9]{1,9})*", part) and part.count("x") == len(sizes) - 1:
            given = [dict(zip(sizes, map(int, part.split("x")), strict=True))]
            found = ["x".join(map(str, given[0].values()))]
        if not found or not all(1 <= n <= LARGEST for one in given for n in one.values()):
            raise ValueError(f"{option}: {part!r} is not one of {accepted}")
        for name, one in zip(found, given, strict=True):
            shapes.setdefault(tuple(one.values()), Shape(name, **one))
    return list(shapes.values())


def items(option: str, text: str, accepted: str) -> list[str]:
    """Split a comma-separated list into its distinct parts."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ValueError(f"{option}: {text!r} has an empty entry; accepted: {accepted}")
    return list(dict.fromkeys(parts))


def numbers(option: str, text: str, largest: int) -> list[int]:
    """Parse a comma-separated list of distinct whole numbers from 1 to `largest`."""
    accepted = f"whole numbers from 1 to {largest}, with commas between them"
    parts = items(option, text, accepted)
    for part in parts:
        if not re.fullmatch(r"[0-9]{1,9}", part) or not 1 <= int(part) <= largest:
            raise ValueError(f"{option}: {part!r}; accepted: {accepted}")
    return list(dict.fromkeys(map(int, parts)))


def chosen(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    """Split a comma-separated list into its distinct parts, all of them among `known`."""
    parts = items(option, text, ", ".join(known))
    for part in parts:
        if part not in known:
            raise ValueError(f"{option}: {part!r} is not one of {', '.join(known)}")
    return parts


def seconds(option: str, text: str) -> float:
    """Parse a time: 90, 90s, 1.5m; more than zero, at most a day."""
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)(s|m|h)?", text.strip())
    value = float(match[1]) * {"m": 60, "h": 3600}.get(match[2], 1) if match else 0.0
    if not 0 < value <= 86400:
        raise ValueError(f"{option}: {text!r}; accepted: a time up to a day, such as 60s or 5m")
    return value


def percent(option: str, text: str) -> float:
    """Parse "5%" to 0.05: from 0% to 1000%, the sign may be left out."""
    match = re.fullmatch(r"([0-9]{1,4}(?:\.[0-9]{1,6})?)\s*%?", text.strip())
    if not match or float(match[1]) > 1000:
        raise ValueError(f"{option}: {text!r}; accepted: a percentage such as 5%")
    return float(match[1]) / 100
