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

    outcome: "resumes", with the losses of the training bit for bit, and on what condition, or
    "fails: " and the error that unpatched models have, too.
    """

    engine: str
    writer: str
    method: str
    outcome: str


DCP = "torch.distributed.checkpoint"
ACCELERATE = "accelerate's save_state"
TRAINER = "the Trainer, killed between steps"
CHECKPOINTS = (
    *(Checkpoint("FSDP1", DCP, m, "resumes") for m in ("LoRA", "QLoRA (bitsandbytes)")),
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
    Checkpoint(
        "FSDP1 SHARDED_STATE_DICT",
        ACCELERATE,
        "LoRA",
        "resumes, if the optimizer has states before `load_state`",
    ),
    Checkpoint("DDP", ACCELERATE, "LoRA", "resumes"),
    Checkpoint("DDP", ACCELERATE, "QLoRA (peftkern.quantize_)", "resumes"),
    Checkpoint("DDP", ACCELERATE, "AdaLoRA", "resumes"),
    Checkpoint(
        "DDP", ACCELERATE, "QLoRA (bitsandbytes)", "fails: `Unexpected key(s) in state_dict`"
    ),
    Checkpoint("DDP", TRAINER, "LoRA", "resumes"),
    Checkpoint("DDP", TRAINER, "AdaLoRA", "resumes"),
    Checkpoint("FSDP2", TRAINER, "QLoRA (bitsandbytes)", "resumes"),
    Checkpoint("FSDP2", TRAINER, "AdaLoRA", "resumes"),
)
_LORAS = ("LoRA", "DoRA", "QLoRA (bitsandbytes)")
_OWN = "QLoRA (peftkern.quantize_)"
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
    *(
        Row("FSDP1, PEFT's wrap policy", m, "refused: Cannot flatten integer dtype tensors", 2)
        for m in (_BYTES, _OWN)
    ),
    Row("FSDP1, PEFT's wrap policy, use_orig_params=False", "LoRA", "served", 2),
    Row("FSDP1, PEFT's wrap policy, use_orig_params=False", "DoRA", "served", 2),
    Row("FSDP1, a decoder layer as a unit", "LoRA", "served", 2),
    *(
        Row(engine, method, outcome, 2)
        for method in ("experts", "experts in 4 bits")
        for engine, outcome in (
            (
                "FSDP1, a decoder layer as a unit",
                "refused: leave experts whole on every device by ignored_states",
            ),
            ("FSDP1, a decoder layer as a unit, experts in ignored_states", "served"),
        )
    ),
)
ACCELERATE_ROWS = (
    *(Row("accelerate, device_map", method, "served", 0) for method in _LORAS),
    *(Row("accelerate, offload to the CPU", m, "served", 0) for m in ("LoRA", "DoRA", _OWN)),
    *(Row("accelerate, offload to disk", m, "served", 0) for m in ("LoRA", _OWN)),
    Row(
        "accelerate, offload to the CPU",
        "QLoRA (bitsandbytes)",
        "refused: Cannot copy out of meta tensor",
        0,
    ),
)
_UNUSED = "refused: those of ranks that a step does not use"
ZERO_METHOD_ROWS = (
    *(
        Row("DeepSpeed ZeRO-2", method, "served", 2)
        for method in ("Delta-LoRA", "Delta-LoRA (in place)", "Quantum-PEFT")
    ),
    Row("DeepSpeed ZeRO-3", "Quantum-PEFT", "served", 2),
    *(Row(f"DeepSpeed ZeRO-{stage}", "DyLoRA", _UNUSED, 2) for stage in (1, 2, 3)),
    Row("DeepSpeed ZeRO-2", "RoSA", "refused: values without a mask among them", 2),
    Row("DeepSpeed ZeRO-2", "AdaLoRA (RankAllocator)", "refused: no gradients to read", 2),
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
    *(Row("Tensor parallel (transformers)", m, "served", 2) for m in ("LoRA", "two adapters")),
    Row(
        "Tensor parallel (transformers)",
        "LoRA, adapters disabled",
        "tensor parallel: adapters are disabled or merged, or none is active",
        2,
    ),
    Row(
        "Tensor parallel (transformers)",
        "DoRA",
        "refused: mixed torch.Tensor and DTensor, says PEFT alone",
        2,
    ),
    Row(
        "Tensor parallel (transformers)",
        "QLoRA (bitsandbytes)",
        "refused: object has no attribute 'compress_statistics', says PEFT alone",
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
    *(
        Row("FSDP1", method, _FLAT, 2)
        for method in (*_OF_LAYERS, "DyLoRA", "Quantum-PEFT", "AdaLoRA")
    ),
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

_SHOWN = (
    *DDP_ROWS,
    *FSDP_ROWS,
    *ACCELERATE_ROWS,
    *ZERO_ROWS,
    *ZERO_METHOD_ROWS,
    *TP_ROWS,
    *METHOD_ROWS,
    *CHECKPOINT_ROWS,
)
ROWS: tuple[Row, ...] = tuple(dict.fromkeys(_SHOWN))  # several tests may show one


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
