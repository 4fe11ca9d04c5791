"""What the tests of this folder show of each engine: the table of docs/multi-gpu.md.

python tests/integrations/engines/rows.py  # prints it
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One line of docs/multi-gpu.md: what a patched layer does under an engine, as its test shows.

    outcome: "served", or the reason as stats() counts it, or "refused: ..." where construction
    raises. processes: of the test; 0: one process.
    """

    engine: str
    method: str
    outcome: str
    processes: int


_LORAS = ("LoRA", "DoRA", "QLoRA (bitsandbytes)")
_BYTES = "QLoRA (bitsandbytes, uint8 storage)"
FSDP_ROWS = (
    Row("FSDP2, the model as a unit", "LoRA", "served", 2),
    *(Row("FSDP2, a decoder layer as a unit", method, "served", 2) for method in _LORAS),
    Row("FSDP2, a decoder layer as a unit", "experts", "served", 2),
    Row("FSDP2, a decoder layer as a unit", _BYTES, "served", 2),
    *(Row("FSDP2, the base and each factor as a unit", m, "served", 2) for m in _LORAS),
    *(Row("FSDP2 as accelerate wraps", m, "served", 2) for m in ("LoRA", _LORAS[2], _BYTES)),
    Row("FSDP2 as accelerate wraps for PEFT", "LoRA", "served", 2),
    *(Row("FSDP1, PEFT's wrap policy", method, "served", 2) for method in ("LoRA", _LORAS[2])),
    Row("FSDP1, PEFT's wrap policy", _BYTES, "refused: Cannot flatten integer dtype tensors", 2),
    Row("FSDP1, PEFT's wrap policy, use_orig_params=False", "LoRA", "served", 2),
    Row("FSDP1, PEFT's wrap policy, use_orig_params=False", "DoRA", "served", 2),
    Row("FSDP1, a decoder layer as a unit", "LoRA", "served", 2),
)
ACCELERATE_ROWS = (
    *(Row("accelerate, device_map", method, "served", 0) for method in _LORAS),
    *(Row("accelerate, offload to the CPU", m, "served", 0) for m in ("LoRA", "DoRA")),
    Row("accelerate, offload to disk", "LoRA", "served", 0),
    Row(
        "accelerate, offload to the CPU",
        "QLoRA (bitsandbytes)",
        "refused: Cannot copy out of meta tensor",
        0,
    ),
)
ZERO_ROWS = (
    Row("DeepSpeed ZeRO-1", "LoRA", "served", 2),
    *(
        Row(f"DeepSpeed ZeRO-{stage}", method, "served", 2)
        for stage in (2, 3)
        for method in (
            "LoRA",
            "LoRA in bfloat16",
            "DoRA",
            "AdaLoRA",
            "QLoRA (bitsandbytes)",
            "experts",
        )
    ),
    Row("DeepSpeed ZeRO-2, gradient accumulation", "LoRA", "served", 2),
    Row("DeepSpeed ZeRO-3, gradient accumulation", "LoRA", "served", 2),
    Row("DeepSpeed ZeRO-3, checkpointing", "LoRA", "served", 2),
    Row("DeepSpeed ZeRO-3, parameters and optimizer on the CPU", "LoRA", "served", 2),
)
ROWS: tuple[Row, ...] = FSDP_ROWS + ACCELERATE_ROWS + ZERO_ROWS


def table(rows: tuple[Row, ...] = ROWS) -> str:
    """Markdown, the rows of an engine together."""
    lines = [
        "| Engine | Method | A patched layer | Processes in its test |",
        "| --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda row: [r.engine for r in rows].index(row.engine)):
        said = row.outcome
        if said != "served" and not said.startswith("refused"):
            said = f"falls back: `{said}`"
        lines.append(f"| {row.engine} | {row.method} | {said} | {row.processes or 1} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
