"""Docstrings of this project as Markdown: fields and formulas keep their lines."""

from __future__ import annotations

import re
from typing import Any

import griffe

FIELD = re.compile(r"^(\s*)([\w, *.]+: )(?=\S)")
STARTS = ("Args", "Returns", "Raises", "Gradients", "Source", "State dict", "Errors", "Yields")


def markdown(text: str) -> str:
    """Return a docstring with a list item for each line that begins with the name of a field.

    Lines that a formula stands on (an assignment, and nothing of a sentence) become code.
    """
    out: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.split("\n")
        if any(line.startswith("    ") for line in lines) and not FIELD.match(lines[0]):
            out.append(block)
        elif all(re.match(r"^\s*\S+(?: \S+)? (?:=|<-) ", line) for line in lines[:1]):
            out.append("\n".join(f"    {line}" for line in lines))
        else:
            out.append(_listed(lines))
    return "\n\n".join(out)


def _listed(lines: list[str]) -> str:
    out: list[str] = []
    for line in lines:
        found = FIELD.match(line)
        name = found[2].removesuffix(": ").strip() if found else ""
        if found and (name.split(",")[0] in STARTS or re.fullmatch(r"[\w*]+(, [\w*]+)*", name)):
            if out and not out[-1].startswith("- "):
                out.append("")
            out.append(f"- **{name}**: {line[found.end() :]}")
        elif out and out[-1] != "" and any(o.startswith("- ") for o in out):
            out.append(f"  {line.strip()}")
        else:
            out.append(line)
    return "\n".join(out)


class Docstrings(griffe.Extension):
    """Rewriting of each docstring when it is loaded."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
