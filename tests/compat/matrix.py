"""Run check.py in a fresh environment for each row of versions, and write a table of the answers.

    python tests/compat/matrix.py [--row 3.11] [--row "torch 2.8.0"] [--wheels dist]

A row takes the wheel of its Python from dist/ (`ci/wheels.sh`), the interpreter pythonX.Y from PATH
and everything else by pip, whose own settings say from where: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL,
PIP_FIND_LINKS. torch is installed first and alone: give an index of CPU builds, or a row takes 6 GB
meanwhile. --row runs the rows that have the text in them; the others keep their line of the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import astuple, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHECK = Path(__file__).with_name("check.py")
TABLE = ROOT / "docs" / "compatibility-results.md"
COLUMNS = ("python", "torch", "transformers", "peft", "bitsandbytes", "result", "date")
HEADER = """`tests/compat/matrix.py` writes this table. Each row is a fresh environment, with no
compiler on its path: the wheel, these versions, `tests/compat/check.py` (a dense, an NF4 and a
bitsandbytes training step equal to PEFT's, so with LoRA on fused experts, dense and NF4, and with
frozen NF4 experts, saving and loading, the Trainer) and `peftkern doctor`, on a CPU.
"""


@dataclass(frozen=True)
class Row:
    """Versions that are installed together; bitsandbytes None: without it."""

    python: str
    torch: str
    transformers: str
    peft: str
    bitsandbytes: str | None

    def __str__(self) -> str:
        return " ".join(
            f"{name} {value}" for name, value in zip(COLUMNS, cells(self), strict=False)
        )


ROWS = (
    Row("3.10", "2.8.0", "4.51.3", "0.17.0", "0.46.0"),
    Row("3.11", "2.8.0", "4.57.6", "0.17.1", None),
    Row("3.11", "2.8.0", "4.57.6", "0.17.1", "0.46.1"),
    Row("3.12", "2.9.1", "4.57.6", "0.18.1", "0.48.2"),
    Row("3.12", "2.11.0", "5.0.0", "0.19.1", "0.49.2"),
    Row("3.13", "2.12.1", "5.12.0", "0.20.0", "0.50.0"),
    Row("3.11", "2.13.0", "5.24.0", "0.21.2", None),
    Row("3.11", "2.13.0", "5.24.0", "0.21.2", "0.50.2"),
    Row("3.13", "2.13.0", "5.24.0", "0.21.2", "0.50.2"),
)


def cells(row: Row) -> list[str]:
    return [value or "none" for value in astuple(row)]


def find_wheel(folder: Path, python: str) -> Path:
    found = sorted(folder.glob(f"peftkern-*-cp{python.replace('.', '')}-*.whl"))
    if not found:
        raise SystemExit(f"matrix.py: error: no wheel in {folder}: ci/wheels.sh python{python}")
    return found[-1]


def run(command: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that sees no package of this tree and no compiler: pip builds nothing."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "CC", "CXX")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"PATH": str(folder / "bin"), "PEFTKERN_CACHE": str(folder / "cache")}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=folder, env=environment
    )


def last_line(answer: subprocess.CompletedProcess[str]) -> str:
    lines = (answer.stdout + answer.stderr).strip().splitlines()
    return lines[-1] if lines else f"exit status {answer.returncode}"


def answer_of(row: Row, wheel: Path, folder: Path) -> str:
    """Return "ok", or the first thing that went wrong, of a row whose environment is `folder`."""
    interpreter = shutil.which(f"python{row.python}")
    if interpreter is None:
        return f"not run: no python{row.python} on PATH"
    python = folder / "bin" / "python"
    packages = {name: getattr(row, name) for name in ("transformers", "peft", "bitsandbytes")}
    pins = [f"{name}=={version}" for name, version in packages.items() if version]
    pip = [python, "-m", "pip", "install", "--quiet", "--only-binary=:all:", "--no-compile"]
    for command in (
        [interpreter, "-m", "venv", folder],
        [*pip, f"torch=={row.torch}", "numpy"],
        [*pip, wheel, *pins, "accelerate"],
    ):
        answer = run(command, folder)
        if answer.returncode:
            return f"not run: {last_line(answer)}"
    answer = run([python, CHECK], folder)
    print(answer.stdout, flush=True)
    versions, *lines = answer.stdout.splitlines() or [""]
    not_served = [line for line in lines if ": not served: " in line]
    if answer.returncode:
        right = {line for line in lines if line.endswith((": ok", ": absent"))} | {*not_served}
        return next((line for line in lines if line not in right), last_line(answer))
    seen = json.loads(versions)
    assert seen["torch"].startswith(row.torch), seen
    doctor = run([python, "-m", "peftkern", "doctor", "--json"], folder)
    if doctor.returncode:
        wrong = [f["cause"] for f in json.loads(doctor.stdout)["findings"]]
        return f"doctor: {wrong[0]}"
    reasons = dict.fromkeys(line.partition(": not served: ")[2] for line in not_served)
    return f"ok; experts not served: {'; '.join(reasons)}" if reasons else "ok"


def read_table(path: Path) -> dict[tuple[str, ...], tuple[str, str]]:
    """Return result and date by versions."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        values = tuple(cell.strip() for cell in line.strip("|").split("|"))
        if line.startswith("|") and len(values) == len(COLUMNS) and values[0][:1].isdigit():
            found[values[:-2]] = values[-2:]
    return found


def table_text(answers: dict[tuple[str, ...], tuple[str, str]]) -> str:
    """Return the document; a row that was never run says so."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for row in ROWS:
        key = tuple(cells(row))
        lines.append((*key, *answers.get(key, ("not run yet", ""))))
    return HEADER + "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--row", action="append", default=[], help="a part of a row's text")
    parser.add_argument("--wheels", type=Path, default=ROOT / "dist")
    parser.add_argument("--out", type=Path, default=TABLE)
    options = parser.parse_args(arguments)
    wanted = [row for row in ROWS if all(text in str(row) for text in options.row)]
    wheels = {row: find_wheel(options.wheels.resolve(), row.python) for row in wanted}
    bad = 0
    for row in wanted:
        print(row, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            result = answer_of(row, wheels[row], Path(folder))
        print(result, flush=True)
        bad += not result.startswith("ok")
        today = datetime.date.today().isoformat()
        answers = read_table(options.out) | {tuple(cells(row)): (result.replace("|", "/"), today)}
        options.out.write_text(table_text(answers), encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
