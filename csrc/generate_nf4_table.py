"""Write the C++ header peftkern/nf4_table.h from NF4_CODE in peftkern/formats/table.py.

python csrc/generate_nf4_table.py peftkern/formats/table.py OUT/peftkern/nf4_table.h

The values are read from the syntax tree: a build machine needs no torch. Literals are hexadecimal
floats, so what the compiler reads is what Python rounded, bit for bit.
"""

from __future__ import annotations

import ast
import itertools
import struct
import sys
from pathlib import Path

TEMPLATE = """\
// Generated from peftkern/formats/table.py by csrc/generate_nf4_table.py.
#pragma once

namespace peftkern {{

// The 16 NF4 values, ascending, in [-1, 1].
constexpr float kNF4Code[16] = {{
{code}
}};

// kNF4Midpoint[i] lies halfway between kNF4Code[i] and kNF4Code[i + 1].
constexpr float kNF4Midpoint[15] = {{
{midpoint}
}};

}}  // namespace peftkern
"""


def to_float32(value: float) -> float:
    """Return the float32 nearest to `value`, as a Python float."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def read_code(source: str) -> list[float]:
    """NF4_CODE of the module text `source`, rounded to float32."""
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "NF4_CODE" for target in targets):
            code = [to_float32(value) for value in ast.literal_eval(node.value)]
            if len(code) != 16 or code != sorted(set(code)):
                raise ValueError(f"NF4_CODE must be 16 ascending values, got {code}")
            return code
    raise ValueError("NF4_CODE is not assigned at module level")


def render(code: list[float]) -> str:
    """Return the header text for the 16 float32 values `code`."""
    midpoint = [to_float32((low + high) / 2) for low, high in itertools.pairwise(code)]
    return TEMPLATE.format(code=_literals(code), midpoint=_literals(midpoint))


def _literals(values: list[float]) -> str:
    return "\n".join(f"    {value.hex()}f,  // {value:.9g}" for value in values)


def main(source: Path, header: Path) -> None:
    text = render(read_code(source.read_text(encoding="utf-8")))
    header.parent.mkdir(parents=True, exist_ok=True)
    # An unchanged header keeps its time stamp, so editing table.py rebuilds nothing needlessly.
    if not header.exists() or header.read_text(encoding="utf-8") != text:
        header.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
