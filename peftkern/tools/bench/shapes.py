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
ACCEPTED = f"{', '.join(PRESETS)}, one layer of them (llama3-8b-q_proj), or MxNxK (256x4096x4096)"
OF_EXPERTS = (
    f"{', '.join(EXPERT_PRESETS)}, one layer of them (qwen3-30b-a3b-down_proj), or MxNxKxE "
    "(256x1024x512x64)"
)
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


def parse_shapes(text: str) -> list[Shape]:
    """Parse shapes of a comma-separated list, each size once, in the order given.

    A preset stands for its q, k, v, o, gate, up and down projections; those of equal size are one
    shape, named after the first.
    Raises: ValueError naming --shapes, the input and the accepted forms.
    """
    shapes: dict[tuple, Shape] = {}
    for part in items("--shapes", text, ACCEPTED):
        for shape in _shapes_of(part):
            shapes.setdefault((shape.M, shape.N, shape.K), shape)
    return list(shapes.values())


def parse_expert_shapes(text: str) -> list[Shape]:
    """Parse shapes of layers over experts of a comma-separated list, in the order given.

    Raises: ValueError naming --shapes, the input and the accepted forms.
    """
    shapes: dict[str, Shape] = {}
    for part in items("--shapes", text, OF_EXPERTS):
        preset, _, layer = part.rpartition("-")
        if part in EXPERT_PRESETS:
            found = {f"{part}-{name}": sizes for name, sizes in EXPERT_PRESETS[part].items()}
        elif layer in EXPERT_PRESETS.get(preset, ()):
            found = {part: EXPERT_PRESETS[preset][layer]}
        else:
            found = {}
        shapes |= {name: Shape(name, n, k, E=e) for name, (e, n, k) in found.items()}
        match = re.fullmatch(r"([0-9]{1,9})" + r"x([0-9]{1,9})" * 3, part)
        sizes = [*map(int, match.groups())] if match else []
        if match and all(1 <= size <= LARGEST for size in sizes):
            m, n, k, e = sizes
            shapes[part] = Shape(part, n, k, m, e)
        elif not found:
            raise ValueError(
                f"--shapes: {part!r} is not one of {OF_EXPERTS}, each from 1 to {LARGEST}"
            )
    return list(shapes.values())


def parse_weights(option: str, text: str) -> list[Shape]:
    """Parse the same list with NxK for a weight, as what has no rows to fix.

    Raises: ValueError naming the option, the input and the accepted forms.
    """
    accepted = ACCEPTED.replace("MxNxK (256x4096x4096)", "NxK (4096x4096)")
    shapes: dict[tuple, Shape] = {}
    for part in items(option, text, accepted):
        match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", part)
        found = [Shape(part, *map(int, match.groups()))] if match else _preset(part)
        if not found or not all(1 <= size <= LARGEST for one in found for size in (one.N, one.K)):
            raise ValueError(f"{option}: {part!r} is not one of {accepted}, from 1 to {LARGEST}")
        for shape in found:
            shapes.setdefault((shape.N, shape.K), shape)
    return list(shapes.values())


def _preset(part: str) -> list[Shape]:
    """Return the layers of a preset, or one of them; none if that is no name of any."""
    if part in PRESETS:
        return [Shape(f"{part}-{layer}", *size) for layer, size in PRESETS[part].items()]
    preset, _, layer = part.rpartition("-")
    return [Shape(part, *PRESETS[preset][layer])] if layer in PRESETS.get(preset, ()) else []


def _shapes_of(part: str) -> list[Shape]:
    if found := _preset(part):
        return found
    if match := re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})x([0-9]{1,9})", part):
        m, n, k = map(int, match.groups())
        if not all(1 <= size <= LARGEST for size in (m, n, k)):
            raise ValueError(f"--shapes: {part}: each of M, N and K must be from 1 to {LARGEST}")
        return [Shape(f"{m}x{n}x{k}", n, k, m)]
    raise ValueError(f"--shapes: {part!r} is not one of {ACCEPTED}")


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
