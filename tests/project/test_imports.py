"""Imports point one way, and `import peftkern` stays light. Proved from the syntax tree."""

from __future__ import annotations

import ast
import importlib
import itertools
import re
import rlcompleter
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT
from processes import run_code, run_python_over, without

import peftkern

PACKAGE = ROOT / "peftkern"

# Names of earlier versions, in documents and in whole models that were pickled.
ALIASES = {
    "adalora": "methods.adalora",
    "dora": "functional.dora",
    "importance": "functional.adalora",
    "low_rank_svd": "functional.low_rank_svd",
    "nf4": "formats.nf4",
    "nf4_layer": "layers.nf4",
    "plan": "tools.plan.plan",
    "sparse": "functional.rosa",
    "svd_linear": "layers.svd",
}
BELOW = {
    "benchmark.providers": "tools.bench.providers",
    "integrations.adalora": "integrations.peft.adalora",
    "integrations.bitsandbytes": "integrations.peft.bitsandbytes",
    "integrations.longlora": "integrations.transformers.longlora",
    "methods.dora": "layers.dora",
}
# Folders are floors: a module imports from floors below its own and from its own, where nothing
# imports in a circle. Triton's kernels are a back end. What lies above `peftkern` itself may import
# it; aliases, which keep names of earlier versions, lie above all and are imported by nobody.
FLOORS = (
    {"formats"},
    {"backends", "kernels"},
    {"functional"},
    {"layers"},
    {"methods"},
    {"monitor"},
    {"integrations"},
    {"__init__"},
    {"tools"},
    {"cli"},
    {"__main__", "benchmark", *ALIASES},
)
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}
LIBRARIES = {"_cpu": "backends.cpu.module", "_cuda": "backends.cuda.module"}  # who may import them
ADDRESSES = "backends.pointers"
NOT_SHIPPED = {"tests", "bench", "examples", "setup"}
PEERS = {"peft", "transformers", "bitsandbytes", "accelerate"}
HEAVY = PEERS | {"triton", "matplotlib"}
FRAMEWORKS = {"axolotl", "lightning", "llamafactory", "swift"}  # whose plug-ins need them


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


def modules(package: Path) -> dict[str, Path]:
    paths = {*package.glob("*.py"), *package.glob("*/**/*.py")}  # kernels/ is a link
    return {module_name(path, package): path for path in sorted(paths)}


def module_of(target: str, names: dict[str, Path]) -> str:
    """The module that an absolute dotted name below peftkern leads to."""
    parts = target.split(".")[1:]
    while parts and ".".join(parts) not in names:
        parts.pop()
    return ".".join(parts) or "__init__"


def violations(package: Path = PACKAGE) -> list[str]:
    """Every import of a shipped file that breaks a rule, in words."""
    found, names = [], modules(package)
    graph: dict[str, set[str]] = {name: set() for name in names}
    for name, path in names.items():
        stem = name.split(".")[0]
        if stem not in FLOOR:
            found.append(f"{name}: has no place in FLOORS of {Path(__file__).name}")
            continue
        for target, line in imported_names(path, package):
            where = f"{name}:{line} imports {target}"
            top, *rest = target.split(".")
            if top in NOT_SHIPPED:
                found.append(f"{where}, which does not ship")
            elif top == "kernels":
                found.append(f"{where}; the name is peftkern.kernels")
            elif top in PEERS and stem not in {"integrations", "tools"}:
                found.append(f"{where}; only integrations and tools may")
            elif top == "triton" and stem not in {"kernels", "integrations"}:
                found.append(f"{where}; only kernels may")
            elif top == "peftkern" and rest and rest[0] in LIBRARIES:
                if LIBRARIES[rest[0]] != name:
                    found.append(f"{where}; only {LIBRARIES[rest[0]]} may")
            elif top == "peftkern":
                other = module_of(target, names)
                floor = FLOOR.get(other.split(".")[0], len(FLOORS))
                if floor > FLOOR[stem] or (floor == FLOOR[stem] == len(FLOORS) - 1):
                    found.append(f"{where}, against the direction of flow")
                graph[name].add(other)
    return found + [f"circle: {' -> '.join(circle)}" for circle in circles(graph)]


def circles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """Imports in a circle. A package names what its modules offer, and is passed over."""
    packages = {name for name in graph if any(other.startswith(f"{name}.") for other in graph)}
    below = {name: others - packages - {name} for name, others in graph.items()}
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> Iterator[list[str]]:
        if name in way:
            yield [*way[way.index(name) :], name]
        elif name not in done:
            for other in sorted(below.get(name, ())):
                yield from visit(other, [*way, name])
            done.add(name)

    for name in sorted(graph):
        yield from visit(name, [])


def test_imports_point_one_way():
    seen = {"__init__", "formats.nf4", "backends.dispatch", "kernels.nf4", "cli.bench"}
    assert seen <= set(modules(PACKAGE)) and violations() == []


BROKEN = {  # files, what they import, and what is said of them
    "backends/dispatch.py": ("def f():\n    import peftkern.layers", "direction"),
    "integrations/peft/patch.py": ("from ... import quantize_", "direction"),
    "backends/ops.py": ("from peftkern._cpu import isas", "only backends.cpu.module"),
    "functional/nf4.py": ("import bitsandbytes.functional", "only integrations"),
    "extra.py": ("", "no place"),
    "tools/a.py": ("def f():\n    from peftkern.tools import b", "tools.a -> tools.b -> tools.a"),
    "tools/b.py": ("from peftkern.tools.a import f", "tools.a -> tools.b -> tools.a"),
}


def test_wrong_imports_and_circles_are_found(tmp_path):
    for file, (line, _) in BROKEN.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(line)
    found, complaints = violations(tmp_path), {complaint for _, complaint in BROKEN.values()}
    assert all(any(complaint in text for text in found) for complaint in complaints)
    assert len(found) == len(BROKEN) - 1


def writes_to_the_environment(source: str) -> list[int]:
    """Lines that change os.environ when a file is imported, not run as a program."""
    if "environ" not in source and "putenv" not in source:  # most files, which need no tree
        return []
    found = []
    for top in ast.parse(source).body:
        program = isinstance(top, ast.If) and "__name__" in ast.unparse(top.test)
        for node in () if program or isinstance(top, ast.FunctionDef) else ast.walk(top):
            if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
                writes = ast.unparse(node.value) == "os.environ"
            elif isinstance(node, ast.Call):
                writes = re.fullmatch(
                    r"os\.(putenv|environ\.(setdefault|update|pop|clear))", ast.unparse(node.func)
                )
            else:
                writes = False
            if writes:
                found.append(node.lineno)
    return found


def test_no_import_changes_the_environment_of_the_process():
    assert writes_to_the_environment("os.environ.setdefault('A', '1')\ndel os.environ['A']") == [
        1,
        2,
    ]
    assert writes_to_the_environment("if __name__ == '__main__':\n    os.environ['A'] = '1'") == []
    for folder in ("peftkern", "kernels", "bench", "examples"):
        for path in (PACKAGE.parent / folder).rglob("*.py"):
            assert writes_to_the_environment(path.read_text(encoding="utf-8")) == [], path


def test_earlier_names_lead_to_the_same_modules():
    for earlier, now in (ALIASES | BELOW).items():
        same = [importlib.import_module(f"peftkern.{name}") for name in (earlier, now)]
        assert same[0] is same[1], earlier
    from peftkern.integrations.peft import PatchedLinear4bit
    from peftkern.integrations.transformers import AdaLoraCallback
    from peftkern.layers import _keep_fused_paths_away  # a hook in every pickled LoRALinear

    assert PatchedLinear4bit and AdaLoraCallback and _keep_fused_paths_away


def test_no_module_hides_a_public_function():
    """Importing a module sets its name in the package."""
    public = next(
        ast.literal_eval(node.value)
        for node in ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    )
    assert {path.stem for path in PACKAGE.glob("*.py")} & set(public) == set()


PUBLIC = ["functional", "layers", "methods", "monitor", "integrations.peft"]
PUBLIC += ["integrations.transformers"]


def test_public_names_are_stated_where_they_are_made_and_documented():
    for package in ("peftkern", *(f"peftkern.{name}" for name in PUBLIC)):
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if not hasattr(value, "__module__"):  # a constant
                continue
            assert value.__doc__, f"{package}.{name}"
            home = importlib.import_module(value.__module__)
            assert name in home.__all__, f"{package}.{name} is made in {home.__name__}"


def test_what_a_module_states_is_there():
    for name, path in modules(PACKAGE).items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        stated = any(ast.unparse(node).startswith("__all__ = ") for node in tree.body)
        if stated and name != "__init__" and not name.startswith("kernels"):
            try:
                module = importlib.import_module(f"peftkern.{name}")
            except ModuleNotFoundError as error:
                assert error.name in FRAMEWORKS, error
                continue
            assert all(hasattr(module, one) for one in module.__all__), name


def test_addresses_are_taken_in_one_place():
    takers = {
        name
        for name, path in modules(PACKAGE).items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "data_ptr"
    }
    assert takers == {ADDRESSES}


def test_addresses_are_of_tensors_that_outlive_them():
    """A function returns addresses of what it was given, never of a copy that ends with it."""
    makers = {"contiguous", "to", "float", "clone", "copy", "empty", "zeros", "stack", "cat"}
    takers = {"address", "optional", "strided", "fresh", "each", "addresses", "weight"}

    def called(node: ast.AST) -> set[str]:
        calls = (one.func for one in ast.walk(node) if isinstance(one, ast.Call))
        return {getattr(one, "attr", getattr(one, "id", "")) for one in calls}

    def holds_address(value: ast.AST, names: set[str]) -> bool:
        parts = value.elts if isinstance(value, ast.Tuple) else [value]
        return any(getattr(p, "id", None) in names or called(p) & takers for p in parts)

    found = []
    for path in modules(PACKAGE / "backends").values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or path.stem == "pointers":
                continue
            assigned = [one for one in ast.walk(node) if isinstance(one, ast.Assign)]
            taken = [one.targets for one in assigned if called(one.value) & takers]
            names = {n.id for to in taken for t in to for n in ast.walk(t) if hasattr(n, "id")}
            returns = [one for one in ast.walk(node) if isinstance(one, ast.Return) and one.value]
            if any(holds_address(one.value, names) for one in returns) and called(node) & makers:
                found.append(f"{path.name}: {node.name}")
    assert found == []


def test_native_code_includes_no_torch_header():
    suffixes = {".cpp", ".h", ".cu", ".cuh"}
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes]
    assert suffixes == {path.suffix for path in sources}
    for path in sources:
        includes = [line for line in path.read_text().splitlines() if line.startswith("#include")]
        bad = [line for line in includes if any(n in line for n in ("torch/", "ATen/", "c10/"))]
        assert bad == [], path


@pytest.mark.parametrize(
    ("code", "heavy"), [("peftkern", HEAVY | {"torch"}), ("peftkern.stats", HEAVY)]
)
def test_import_loads_no_peer_and_torch_at_the_first_use(code, heavy):
    code = (
        f"import sys, peftkern; {code}; "
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    loaded = set(run_code(code).split())
    assert "peftkern" in loaded
    assert loaded & heavy == set()
    assert ("torch" in loaded) == ("torch" not in heavy)


def test_first_use_inside_a_compiled_function():
    code = (
        "import torch, peftkern\n"
        "@torch.compile(backend='eager', fullgraph=True)\n"
        "def f(x, w, A, B): return peftkern.lora_linear(x, w, A, B, scaling=2.0)\n"
        "x, w, A, B = torch.ones(2, 4), torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1)\n"
        "print(f(x, w, A, B).unique().tolist())"
    )
    assert run_code(code) == "[12.0]\n"


def completions(text: str) -> list[str]:
    """What the interpreter's completion of names offers."""
    completer = rlcompleter.Completer({"peftkern": peftkern})
    found = (completer.complete(text, state) for state in itertools.count())
    return [name.rstrip("()") for name in itertools.takewhile(lambda name: name, found)]


def test_dir_lists_what_users_can_use_and_nothing_else():
    names = {name for name in dir(peftkern) if not name.startswith("_")}
    modules = {"adalora", "integrations", "layers", "low_rank_svd", "methods", "monitor", "sparse"}
    assert modules | {*peftkern.__all__} < names
    assert not {"Any", "importlib", "annotations", "TYPE_CHECKING", "backends", "dispatch"} & names
    assert all(getattr(peftkern, name) is not None for name in names)
    assert {"__version__", "__doc__", "__file__"} <= set(dir(peftkern))
    assert completions("peftkern.quantize_n") == [
        "peftkern.quantize_nf4",
        "peftkern.quantize_nvfp4",
    ]
    assert completions("peftkern.la") == ["peftkern.layers"]


CALLBACKS = "peftkern.integrations.transformers"
NEEDS = {  # code by what is absent and by what then says that it needs it
    "peft": {
        "peftkern.patch": "peftkern.patch(torch.nn.Linear(1, 1))",
        "peftkern.unpatch": "peftkern.unpatch(torch.nn.Linear(1, 1))",
        "peftkern.is_patched": "peftkern.is_patched(torch.nn.Linear(1, 1))",
        "peftkern.patched": "peftkern.patched(torch.nn.Linear(1, 1))",
        "peftkern.register_layer": "peftkern.register_layer(torch.nn.Linear)",
        CALLBACKS: f"from {CALLBACKS} import PeftKernCallback",
    },
    "transformers": {CALLBACKS: f"from {CALLBACKS} import MonitorCallback"},
}
TRY = """
import sys, torch, peftkern
from peftkern import *  # only to look at the names needs nothing
for code in sys.argv[1:]:
    try:
        exec(code)
    except ModuleNotFoundError as error:
        print(error)
"""


@pytest.mark.parametrize("absent", NEEDS)
def test_what_is_not_installed_is_told_with_how_to_install_it(absent, tmp_path):
    answer = run_python_over(without(tmp_path / "site", absent), "-c", TRY, *NEEDS[absent].values())
    assert answer.returncode == 0, answer.stderr
    said = answer.stdout.splitlines()
    assert len(said) == len(NEEDS[absent])
    for what, line in zip(NEEDS[absent], said, strict=True):
        how = f"{what} needs PEFT and transformers: pip install 'peftkern[peft]'"
        assert line.startswith(f"{how} (No module named '{absent}")
