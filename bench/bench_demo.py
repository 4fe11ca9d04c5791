"""The demo as a measurement: whole training steps, with PEFT alone and with peftkern.

Options of examples/qlora_finetune.py may follow: python bench/bench_demo.py --steps 400
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from peftkern.tools.bench import machine


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench_demo.py")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "bench" / "results")
    args, argv = parser.parse_known_args(argv)
    facts = machine.describe(torch.get_num_threads())
    script = machine.ROOT / "examples" / "qlora_finetune.py"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "demo.json"
        done = subprocess.run([sys.executable, str(script), *argv, "--json", str(path)])
        if done.returncode != 0:
            return done.returncode
        record = json.loads(path.read_text())
    target = args.out / machine.slug(facts) / "demo.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"bench": "demo", "machine": facts, **record}) + "\n")
    print(f"written: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
