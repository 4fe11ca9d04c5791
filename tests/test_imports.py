"""Imports point one way, and `import peftkern` stays light. Proved from the syntax tree."""

from __future__ import annotations

import ast
import itertools
import rlcompleter
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from site_packages import python, without

import peftkern

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "peftkern"

# A module may import only modules of a lower rank, or of its own folder below peftkern/.
RANK = {
    "nf4": 0,
    "device": 0,
    "dropout": 0,
    "json_files": 0,
    "reference": 1,
    "autograd": 2,
    "arguments": 1,
    "native": 1,
    "native_cuda": 1,
    "kernels": 2,
    "cpu": 2,
    "cuda": 2,
    "dispatch": 3,
    "ops": 4,
    "functional": 5,
    "low_rank_svd": 5,
    "importance": 5,
    "dora": 6,
    "sparse": 6,
    "weight_readers": 0,
    "frozen_linear": 6,
    "svd_linear": 7,
    "nf4_layer": 7,
    "quantize": 8,
    "adalora": 8,
    "training_step": 7,
    "layers": 9,
    "methods": 10,
    "plan": 8,
    "checkpoint": 8,
    "monitor": 8,
    "packages": 8,
    "sample_calls": 8,
    "companions": 9,
    "nf4_layout": 9,
    "staging": 9,
    "nf4_checkpoint": 10,
    "integrations": 11,
    "__init__": 12,
    "benchmark": 13,
    "self_test": 14,
    "doctor": 15,
    "cli": 16,
    "__main__": 17,
}
LIBRARIES = {"_cpu": "native", "_cuda": "native_cuda"}  # and who alone may import them
NOT_SHIPPED = {"tests", "bench", "examples", "setup"}
PEERS = {"peft", "transformers", "bitsandbytes", "accelerate"}
HEAVY = PEERS | {"triton", "matplotlib"}


def shipped_files(package: Path = PACKAGE) -> list[Path]:
    return sorted({*package.glob("*.py"), *package.glob("*/**/*.py")})


def module_name(path: Path, package: Path) -> str:
    """Dotted name below the package: "nf4", "integrations.peft", "__init__"."""
    parts = list(path.relative_to(package).with_suffix("").parts)
    if len(parts) > 1 and parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def imported_names(path: Path, package: Path) -> Iterator[tuple[str, int]]:
    """Absolute dotted names of everything `path` imports, at any depth of the file."""
    folder = ["peftkern", *path.relative_to(package).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            base = [*base, *([node.module] if node.module else [])]
            yield from ((".".join([*base, alias.name]), node.lineno) for alias in node.names)


def violations(package: Path = PACKAGE) -> list[str]:
    """Every import of a shipped file that breaks a rule, in words."""
    found = []
    for path in shipped_files(package):
        name = module_name(path, package)
        stem = name.split(".")[0]
        if stem not in RANK:
            found.append(f"{name}: has no place in RANK of {Path(__file__).name}")
            continue
        for target, line in imported_names(path, package):
            where = f"{name}:{line} imports {target}"
            top, *rest = target.split(".")
            if top in NOT_SHIPPED:
                found.append(f"{where}, which does not ship")
            elif top == "kernels":
                found.append(f"{where}; the name is peftkern.kernels")
            elif top in PEERS and stem not in {"integrations", "benchmark"}:
                found.append(f"{where}; only integrations and benchmark may")
            elif top == "triton" and stem not in {"kernels", "integrations"}:
                found.append(f"{where}; only kernels may")
            elif top == "peftkern" and not (rest and LIBRARIES.get(rest[0]) == stem):
                other = rest[0] if rest and rest[0] in RANK else "__init__"
                same_folder = other == stem and path.parent != package
                if not same_folder and RANK[other] >= RANK[stem]:
                    found.append(f"{where}, against the direction of flow")
    return found


def test_imports_point_one_way():
    assert violations() == []


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("nf4.py", "from .functional import lora_linear", "direction"),
        ("nf4.py", "from . import device", "direction"),
        ("dispatch.py", "def f():\n    from peftkern import ops", "direction"),
        ("layers.py", "import peftkern", "direction"),
        ("ops.py", "from peftkern._cpu import isas", "direction"),
        ("native.py", "from peftkern import _cuda", "direction"),
        ("integrations/peft.py", "from .. import quantize_", "direction"),
        ("ops.py", "from tests.tolerances import bound", "does not ship"),
        ("layers.py", "import kernels.nf4", "peftkern.kernels"),
        ("functional.py", "import bitsandbytes.functional", "only integrations"),
        ("ops.py", "import triton", "only kernels"),
        ("extra.py", "", "no place"),
    ],
)
def test_wrong_import_is_found(tmp_path, file, line, complaint):
    path = tmp_path / "peftkern" / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert [complaint in text for text in violations(tmp_path / "peftkern")] == [True]


def test_right_imports_are_accepted(tmp_path):
    package = tmp_path / "peftkern"
    (package / "integrations").mkdir(parents=True)
    (package / "native.py").write_text("import torch\nfrom peftkern import _cpu\nfrom . import nf4")
    (package / "integrations" / "peft.py").write_text(
        "import peft\nfrom peftkern.layers import NF4Linear\nfrom . import bitsandbytes"
    )
    assert violations(package) == []


def test_every_shipped_file_is_seen():
    names = {module_name(path, PACKAGE) for path in shipped_files()}
    assert {"__init__", "nf4", "dispatch", "native", "integrations.peft"} <= names


def test_no_module_hides_a_public_function():
    """Importing a module sets its name in the package."""
    public = next(
        ast.literal_eval(node.value)
        for node in ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    )
    assert {path.stem for path in PACKAGE.glob("*.py")} & set(public) == set()


def test_addresses_are_taken_in_native_only():
    takers = {
        module_name(path, PACKAGE)
        for path in shipped_files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "data_ptr"
    }
    assert takers == {"native", "native_cuda"}


def test_native_code_includes_no_torch_header():
    suffixes = {".cpp", ".h", ".cu", ".cuh"}
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes]
    assert suffixes == {path.suffix for path in sources}
    for path in sources:
        includes = [line for line in path.read_text().splitlines() if line.startswith("#include")]
        bad = [line for line in includes if any(n in line for n in ("torch/", "ATen/", "c10/"))]
        assert bad == [], path


def test_import_loads_no_peer():
    code = (
        "import sys, torch; before = set(sys.modules); import peftkern; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr
    loaded = set(answer.stdout.split())
    assert "peftkern" in loaded
    assert loaded & HEAVY == set()


def completions(text: str) -> list[str]:
    """What the interpreter's completion of names offers."""
    completer = rlcompleter.Completer({"peftkern": peftkern})
    found = (completer.complete(text, state) for state in itertools.count())
    return [name.rstrip("()") for name in itertools.takewhile(lambda name: name, found)]


def test_dir_lists_what_users_can_use_and_nothing_else():
    names = {name for name in dir(peftkern) if not name.startswith("_")}
    modules = {"adalora", "integrations", "layers", "low_rank_svd", "methods", "monitor", "sparse"}
    assert modules | {*peftkern.__all__} < names
    assert not {"Any", "importlib", "annotations", "TYPE_CHECKING", "native", "dispatch"} & names
    assert all(getattr(peftkern, name) is not None for name in names)
    assert {"__version__", "__doc__", "__file__"} <= set(dir(peftkern))
    assert completions("peftkern.quant") == ["peftkern.quantize_", "peftkern.quantize_nf4"]
    assert completions("peftkern.la") == ["peftkern.layers"]


@pytest.mark.parametrize(
    ("absent", "code", "what"),
    [
        ("peft", "peftkern.patch(torch.nn.Linear(1, 1))", "peftkern.patch"),
        ("peft", "peftkern.unpatch(torch.nn.Linear(1, 1))", "peftkern.unpatch"),
        (
            "peft",
            "from peftkern.integrations.transformers import PeftKernCallback",
            "peftkern.integrations.transformers",
        ),
        (
            "transformers",
            "from peftkern.integrations.transformers import MonitorCallback",
            "peftkern.integrations.transformers",
        ),
    ],
)
def test_what_is_not_installed_is_told_with_how_to_install_it(absent, code, what, tmp_path):
    answer = python(without(tmp_path / "site", absent), "-c", f"import torch, peftkern\n{code}")
    assert answer.returncode == 1
    how = f"{what} needs PEFT and transformers: pip install 'peftkern[peft]'"
    said = answer.stderr.splitlines()[-1]
    assert said.startswith(f"ModuleNotFoundError: {how} (No module named '{absent}")
