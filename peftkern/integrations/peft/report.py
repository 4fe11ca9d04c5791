"""Report of `peftkern.patch`: what is served, what is not, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from peftkern.backends import trust

__all__ = ["PatchReport"]


@dataclass
class PatchReport:
    """Report of what `patch` did.

    patched: names of the layers that run peftkern's forward now, those of an earlier call included;
        of the wrappers around one module of experts the outermost, which answers for all.
    skipped: {name: reason} of adapter layers that were left alone.
    left_out: {name: reason} of those that `include` or `exclude` leaves out.
    falling_back: {name: reason} of patched layers whose present state sends them to PEFT's forward;
        it is looked at again at every call.
    kinds: how many layers of each PEFT class were patched.
    without_adapter: names of bitsandbytes' layers, and of experts in NF4, with no patched adapter
        that are served as well.
    small: {name: rows} of patched dense layers on a CPU that PEFT computes as fast below so many
        rows (batch times sequence), if those are more than 512; 0 for any number of them.
    unmeasured: how many classes of patched layers (op, shape, rank, device) have no verdict yet.
    bypassed: {name: what reads it} of patched layers whose weights a fused kernel of another
        library reads, and which it never calls.
    backends: {device type: what serves there}.
    dry_run: whether nothing was changed, and `patched` are those that `patch` would patch.
    warnings: what the user should put right; `patch` gives them as warnings, too.
    """

    patched: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    falling_back: dict[str, str] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    without_adapter: list[str] = field(default_factory=list)
    small: dict[str, int] = field(default_factory=dict)
    unmeasured: int = 0
    bypassed: dict[str, str] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)
    dry_run: bool = False
    warnings: list[str] = field(default_factory=list)

    @property
    def unserved(self) -> dict[str, str]:
        """{name: reason} of layers with an adapter that no kernel serves as they are now."""
        read = {name: f"{by} reads past it" for name, by in self.bypassed.items()}
        return {**self.skipped, **self.falling_back, **read}

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as lists, dictionaries, strings and numbers, fit for json.dumps."""
        return {
            "patched": list(self.patched),
            "skipped": dict(self.skipped),
            "left_out": dict(self.left_out),
            "falling_back": dict(self.falling_back),
            "kinds": dict(self.kinds),
            "without_adapter": list(self.without_adapter),
            "small": dict(self.small),
            "unmeasured": self.unmeasured,
            "bypassed": dict(self.bypassed),
            "backends": dict(self.backends),
            "dry_run": self.dry_run,
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        if self.patched or self.skipped or self.left_out:
            text = f"{len(self.patched)} {'would be patched' if self.dry_run else 'patched'}"
            if self.kinds:
                text += f" ({counted(self.kinds.elements())})"
            text += f", {len(self.skipped)} skipped"
            if self.skipped:
                text += f": {counted(self.skipped.values())}"
        else:
            text = "0 patched: the model has no PEFT adapter layers"
        if self.left_out:
            text += f"; left out: {counted(self.left_out.values())}"
        if self.without_adapter:
            text += f"; {len(self.without_adapter)} 4-bit layers without an adapter served, too"
        if self.falling_back:
            reasons = counted(self.falling_back.values())
            text += f"; {len(self.falling_back)} of the patched fall back for now: {reasons}"
        if self.small:
            rows = max(self.small.values())
            pays = f"from {rows:,} rows (batch x sequence) on" if rows else "in none of them"
            text += f"; {len(self.small)} are small dense layers: kernels pay {pays}"
        if self.unmeasured:
            until = ": their own forward serves"
            if trust.mode() != "off":
                until += " until each was tried (twice called)"
            text += f"; {_plural(self.unmeasured, 'class', 'classes')} unmeasured{until}"
        for device, backend in self.backends.items():
            text += f"; on {device}: {backend}"
        for warning in self.warnings:
            text += f"; WARNING: {warning}"
        return text


def _plural(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def counted(words: Iterable[str]) -> str:
    """Write how often each comes: "lora.Linear 14, lora.Embedding 1"."""
    return ", ".join(f"{word} {count}" for word, count in Counter(words).most_common())
