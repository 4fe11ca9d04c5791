"""The demo as a measurement: whole training steps, with PEFT alone and with peftkern.

Options of bench/studies/qlora_finetune.py may follow: python bench/bench_demo.py --steps 400
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from folders import RESULTS, slug

from peftkern.tools.bench import machine
from peftkern.tools.bench.record import OURS, Record
from peftkern.tools.bench.rows import Row, case_record, new_record


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench_demo.py")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args, argv = parser.parse_known_args(argv)
    environment = machine.describe(torch.get_num_threads())
    script = machine.ROOT / "bench" / "studies" / "qlora_finetune.py"
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "demo.json"
        done = subprocess.run([sys.executable, str(script), *argv, "--json", str(path)])
        if done.returncode != 0:
            return done.returncode
        found = json.loads(path.read_text())
    target = args.out / slug(environment) / "demo.json"
    elapsed = time.monotonic() - began
    command = shlex.join(["python", "bench/bench_demo.py", *argv])
    record = as_record(found, environment, command=command, elapsed_s=elapsed)
    machine.write_json(target, record)
    print(f"written: {target}")
    return 0


def as_record(found: dict, environment: dict, **more: object) -> Record:
    """Turn what the demo wrote into a record: the steps are its case, both runs its answer."""
    options, runs = found["options"], found["runs"]
    keys = {OURS: "peftkern", "PEFT": "peft"}
    rows = {
        name: Row(
            samples=runs[key]["step_seconds"],
            peak_bytes=round(runs[key]["tensor_peak_mb"] * 1e6),
        )
        for name, key in keys.items()
    }
    tokens = options["batch"] * options["seq"]
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[options["dtype"]]
    facts = {"name": "demo/whole step", "op": "training_step", "shape": "demo", "M": tokens}
    facts |= {"N": None, "K": None, "r": options["rank"], "dtype": dtype, "mode": "full"}
    labels = {name: name for name in rows}
    case = case_record(facts, rows, work=(0, 0), roof={}, labels=labels, tokens=tokens)
    for name, key in keys.items():  # without the steps of its warm-up
        case["providers"][name] |= {f"{k}_ms": v for k, v in runs[key]["step_ms"].items()}
    sizes = {name: value for name, value in options.items() if isinstance(value, int)}
    answer = {"name": "demo/runs", "said": "see its cases", **found}
    return new_record(
        environment,
        {},
        bench="demo",
        device="cpu",
        options=sizes,
        cases=[case],
        answers=[answer],
        **{"seed": options["seed"], "budget_s": None, **more},
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
