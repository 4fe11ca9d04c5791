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


class Checkpoint(NamedTuple):
    """One line of the table of checkpoints: two processes that save, and others that go on.

    outcome: "resumes", with the losses of the training bit for bit, or "fails: " and the error that
    unpatched models have, too.
    """

    engine: str
    writer: str
    method: str
    outcome: str


DCP = "torch.distributed.checkpoint"
ACCELERATE = "accelerate's save_state"
TRAINER = "the Trainer, killed between steps"
CHECKPOINTS = (
    Checkpoint("FSDP2", DCP, "LoRA", "resumes"),
    Checkpoint("FSDP2", DCP, "QLoRA (bitsandbytes)", "resumes"),
    Checkpoint("FSDP2", DCP, "QLoRA (peftkern.quantize_)", "resumes"),
    Checkpoint("FSDP2", DCP, "AdaLoRA", "resumes"),
    Checkpoint("FSDP2 SHARDED_STATE_DICT", ACCELERATE, "QLoRA (bitsandbytes)", "resumes"),
    Checkpoint("FSDP2 SHARDED_STATE_DICT", ACCELERATE, "AdaLoRA", "resumes"),
    Checkpoint(
        "FSDP2 FULL_STATE_DICT",
        ACCELERATE,
        "QLoRA (peftkern.quantize_)",
        "fails: `base_layer.weight.absmax`",
    ),
    Checkpoint("DDP", ACCELERATE, "LoRA", "resumes"),
    Checkpoint("DDP", ACCELERATE, "QLoRA (peftkern.quantize_)", "resumes"),
    Checkpoint("DDP", ACCELERATE, "AdaLoRA", "resumes"),
    Checkpoint(
        "DDP", ACCELERATE, "QLoRA (bitsandbytes)", "fails: `Unexpected key(s) in state_dict`"
    ),
    Checkpoint("DDP", TRAINER, "LoRA", "resumes"),
    Checkpoint("FSDP2", TRAINER, "QLoRA (bitsandbytes)", "resumes"),
)
ROWS: tuple[Row, ...] = ()


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
