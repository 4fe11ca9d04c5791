"""What the tests of this folder show of each engine: the table of docs/multi-gpu.md.

python tests/integrations/engines/rows.py          # prints it, and the table of checkpoints
python tests/integrations/engines/rows.py --write  # puts both where they belong
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parents[3] / "docs" / "multi-gpu.md"


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
_UNIT = "FSDP2, a decoder layer as a unit"
CHECKPOINT_ROWS = (
    Row("DDP", "LoRA", "served", 2),
    Row("DDP", "QLoRA (peftkern.quantize_)", "served", 2),
    Row("DDP", "AdaLoRA", "served", 2),
    Row(_UNIT, "LoRA", "served", 2),
    Row(_UNIT, "QLoRA (bitsandbytes)", "served", 2),
    Row(_UNIT, "QLoRA (peftkern.quantize_)", "served", 2),
    Row(_UNIT, "AdaLoRA", "served", 2),
)

ROWS: tuple[Row, ...] = tuple(dict.fromkeys((*CHECKPOINT_ROWS,)))  # several tests may show one


def table(rows: Iterable[Row] = ROWS) -> str:
    """Markdown: the methods of an engine with the same outcome on one line."""
    lines: dict[tuple[str, str], tuple[list[str], set[str]]] = {}
    for row in rows:
        said = row.outcome
        if said != "served" and not said.startswith("refused"):
            said = f"falls back: `{said}`"
        methods, processes = lines.setdefault((row.engine, said), ([], set()))
        if row.method not in methods:
            methods.append(row.method)
        processes.add(str(row.processes or 1))
    engines = list(dict.fromkeys(engine for engine, _ in lines))
    cells = [
        (engine, ", ".join(methods), said, ", ".join(sorted(processes)))
        for (engine, said), (methods, processes) in lines.items()
    ]
    cells.sort(key=lambda line: engines.index(line[0]))
    return markdown("Engine", "Method", "A patched layer", "Processes in its test", lines=cells)


def checkpoint_table(checkpoints: Iterable[Checkpoint] = CHECKPOINTS) -> str:
    """Markdown: the methods that one engine and writer treat alike on one line."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for one in checkpoints:
        lines.setdefault((one.writer, one.engine, one.outcome), []).append(one.method)
    cells = [
        (writer, engine, ", ".join(methods), outcome.replace("fails:", "fails, unpatched, too:"))
        for (writer, engine, outcome), methods in lines.items()
    ]
    return markdown("Saved by", "Engine", "Method", "Another run", lines=cells)


def markdown(*heads: str, lines: Iterable[tuple[str, ...]]) -> str:
    rule = tuple("---" for _ in heads)
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, rule, *lines))


def with_tables(page: str) -> str:
    """The page with both tables between their comments."""
    for name, text in (("rows", table()), ("checkpoints", checkpoint_table())):
        before, begin, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        if not (begin and end):
            raise ValueError(f"{PAGE}: expected <!-- {name} --> and <!-- end of {name} -->")
        page = f"{before}{begin}\n{text}\n\n{end}{after}"
    return page


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table(), checkpoint_table(), sep="\n\n")
