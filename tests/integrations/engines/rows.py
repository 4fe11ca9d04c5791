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


DDP_ROWS = (
    *(
        Row("DDP", method, "served", 2)
        for method in ("LoRA", "DoRA", "AdaLoRA", "QLoRA (bitsandbytes)", "experts")
    ),
    Row("DDP", "LoRA", "served", 4),
    Row("DDP, static_graph", "LoRA", "served", 2),
    Row("DDP, find_unused_parameters", "LoRA", "served", 2),
    Row("DDP, gradient accumulation under no_sync", "LoRA", "served", 2),
    Row("DDP, a rank has fewer batches (join)", "LoRA", "served", 2),
    Row("DDP, a rank has fewer rows", "LoRA", "served", 2),
    Row("DDP, reentrant checkpointing (static_graph)", "LoRA", "served", 2),
    Row("DDP, checkpointing", "LoRA", "served", 2),
    Row("DDP, autocast to bfloat16", "LoRA", "served", 2),
    Row("DDP, communication hook", "LoRA", "served", 2),
)

TP_ROWS = (
    Row("Tensor parallel (transformers)", "LoRA", "served", 2),
    Row(
        "Tensor parallel (transformers)",
        "LoRA, adapters disabled",
        "tensor parallel: not with one active adapter alone",
        2,
    ),
    Row(
        "Tensor parallel (transformers)",
        "DoRA",
        "refused: mixed torch.Tensor and DTensor, says PEFT alone",
        2,
    ),
)
_OF_LAYERS = (
    "AdaLoRA (RankAllocator)",
    "LoRA-FA",
    "LoRA-Pro",
    "LoRA-Pro (hook)",
    "RoSA",
    "Delta-LoRA",
    "Delta-LoRA (in place)",
)
_FLAT = "refused: FullyShardedDataParallel holds it in pieces of a flat parameter"
METHOD_ROWS = (
    *(
        Row(engine, method, "served", 2)
        for engine in ("DDP", "FSDP2, a layer as a unit")
        for method in (*_OF_LAYERS, "DyLoRA", "Quantum-PEFT")
    ),
    Row("DDP", "LongLoRA", "served", 2),
    Row("FSDP2, a decoder layer as a unit", "LongLoRA", "served", 2),
    Row("FSDP2, a decoder layer as a unit", "AdaLoRA", "served", 2),
    *(Row("FSDP1", method, _FLAT, 2) for method in (*_OF_LAYERS, "AdaLoRA")),
)

ROWS: tuple[Row, ...] = (*DDP_ROWS, *TP_ROWS, *METHOD_ROWS)


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
