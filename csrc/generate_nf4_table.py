"""Write the C++ header peftkern/nf4_table.h from the codes in peftkern/formats/table.py.

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

{codes}
// kNF4Midpoint[i] lies halfway between kNF4Code[i] and kNF4Code[i + 1].
constexpr float kNF4Midpoint[15] = {{
{midpoint}
}};

}}  // namespace peftkern
"""


CODE = """\
constexpr float {name}[16] = {{
{values}
}};
"""

# Names there and here.
CODES = {
    "NF4_CODE": "kNF4Code",
    "FP4_CODE": "kFP4Code",
    "E2M1_CODE": "kE2M1Code",
    "UINT4_CODE": "kUInt4Code",
}


def to_float32(value: float) -> float:
    """Return the float32 nearest to `value`, as a Python float."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def read_codes(source: str) -> dict[str, list[float]]:
    """Return the codes that the module text `source` assigns, each rounded to float32."""
    codes = {}
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name) and target.id in CODES:
                codes[target.id] = [to_float32(value) for value in ast.literal_eval(node.value)]
    for name in CODES:
        if name not in codes:
            raise ValueError(f"{name} is not assigned at module level")
        if len(codes[name]) != 16:
            raise ValueError(f"{name} must be 16 values, got {codes[name]}")
    code = codes["NF4_CODE"]
    if code != sorted(set(code)):
        raise ValueError(f"NF4_CODE must be ascending, got {code}")
    return codes


def render(codes: dict[str, list[float]]) -> str:
    """Return the header text for the float32 values `codes`."""
    code = codes["NF4_CODE"]
    midpoint = [to_float32((low + high) / 2) for low, high in itertools.pairwise(code)]
    tables = [
        CODE.format(name=name, values=_literals(codes[python])) for python, name in CODES.items()
    ]
    return TEMPLATE.format(codes="\n".join(tables), midpoint=_literals(midpoint))


def _literals(values: list[float]) -> str:
    return "\n".join(f"    {value.hex()}f,  // {value:.9g}" for value in values)


def main(source: Path, header: Path) -> None:
    text = render(read_codes(source.read_text(encoding="utf-8")))
    header.parent.mkdir(parents=True, exist_ok=True)
    # An unchanged header keeps its time stamp, so editing table.py rebuilds nothing needlessly.
    if not header.exists() or header.read_text(encoding="utf-8") != text:
        header.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
