"""Names of layers: in the arguments `include` and `exclude`, which all functions read alike, and in
what is told of many."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Chosen(NamedTuple):
    """Choice of layers by their names.

    A name has "mlp.up_proj" if that stands in it as consecutive dotted parts. include: only layers
    whose name has one of these, None for all; exclude: never those whose name has one of these.
    """

    include: tuple[str, ...] | None
    exclude: tuple[str, ...]

    @classmethod
    def of(
        cls,
        include: Iterable[str] | None,
        exclude: Iterable[str] | None,
        default: tuple[str, ...] = (),
    ) -> Chosen:
        """Read both arguments. Args: default, what is left out if `exclude` is None.

        Raises: TypeError if one of them is a string, and not a list of them.
        """
        wanted = None if include is None else _listed("include", include)
        return cls(wanted, default if exclude is None else _listed("exclude", exclude))

    def reason_against(self, name: str) -> str | None:
        """Return the argument that leaves a layer out, None if it is chosen."""
        if self.include is not None and not has_parts(name, self.include):
            return "not in include"
        return "in exclude" if has_parts(name, self.exclude) else None

    def unknown(self, names: Iterable[str]) -> str | None:
        """Return the first entry of `include` that is in none of these names."""
        names = list(names)
        entries = self.include or ()
        return next((e for e in entries if not any(has_parts(n, (e,)) for n in names)), None)


def has_parts(name: str, entries: Iterable[str]) -> bool:
    """Return whether one of the entries stands in a name as consecutive dotted parts."""
    return any(f".{entry}." in f".{name}." for entry in entries)


def shortened(names: Sequence[str], most: int, separator: str = ", ") -> str:
    """Return the first names: "a, b and 3 more", or "a; b; and 3 more" of whole clauses."""
    text = separator.join(names[:most])
    if len(names) <= most:
        return text
    return f"{text}{separator.strip(', ')} and {len(names) - most} more"


def _listed(argument: str, value: Iterable[str]) -> tuple[str, ...]:
    if isinstance(value, str):
        raise TypeError(f"{argument}: expected names in a list or tuple, got the string {value!r}")
    return tuple(value)
