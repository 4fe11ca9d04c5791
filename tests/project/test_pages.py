"""Pages of docs/: Python blocks run, links lead somewhere, the reference is complete."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from command_line import commands_of
from paths import ROOT

from peftkern import cli
from peftkern.backends import reasons

DOCS = ROOT / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if p.stem != "compatibility-results")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ANY_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"[$`] ?peftkern ((?:adapter )?\w+)((?: [^\n#`]*)?)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With small models for "model", "moe", "gpt-oss" and the one that frameworks load by name."""
    from expert_models import save_gpt_oss
    from framework_runs import letters_llama, letters_tokenizer
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    found = tmp_path_factory.mktemp("pages")
    for path in (found / "model", found / "HuggingFaceTB" / "SmolLM2-135M"):
        letters_llama().save_pretrained(path)
        letters_tokenizer().save_pretrained(path)
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
    sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).save_pretrained(found / "moe")
    save_gpt_oss(found / "gpt-oss", vocab_size=128)
    return found


def name(page: Path) -> str:
    return str(page.relative_to(DOCS))


WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_python_blocks_run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as a reader pastes them into one session."""
    text = page.read_text(encoding="utf-8")
    if page.parent.name == "frameworks":
        for package in re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE):
            pytest.importorskip(package)
    monkeypatch.chdir(folder)
    session: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(page), "exec"), session)


def test_command_lines_have_options_that_exist() -> None:
    """In blocks, and in text as `peftkern bench --html`."""
    commands = commands_of(cli.app)
    seen = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for command, rest in COMMAND.findall(text):
            known = {
                name for p in commands[command].params for name in (*p.opts, *p.secondary_opts)
            }
            given = set(re.findall(r"(?<= )--[\w-]+", rest))
            assert given <= known, f"{name(page)}: peftkern {command} {given - known}"
            seen += 1
    assert seen > 20


def slug(heading: str) -> str:
    """The anchor of a heading, as Python-Markdown makes it."""
    words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", words).strip().lower())


@pytest.fixture(scope="module")
def texts(hooks: ModuleType) -> dict[str, str]:
    """{page: Markdown} as mkdocs gets it, what is generated among it."""
    found = {name(page): page.read_text(encoding="utf-8") for page in PAGES}
    found |= hooks.reference()
    return {page: hooks.on_page_markdown(text) for page, text in found.items()}


def links(text: str) -> Iterator[str]:
    yield from LINK.findall(ANY_BLOCK.sub("", text))


def test_links_and_anchors_lead_somewhere(texts: dict[str, str]) -> None:
    anchors = {page: {slug(h) for h in HEADING.findall(text)} for page, text in texts.items()}
    broken = []
    for page, text in texts.items():
        for link in links(text):
            if link.startswith(("https://", "http://", "mailto:")):
                continue
            path, _, anchor = link.partition("#")
            target = (DOCS / page).parent.joinpath(path).resolve() if path else DOCS / page
            found = str(target.relative_to(DOCS)) if target.is_relative_to(DOCS) else str(target)
            there = found in texts or target.is_file()
            if not there or (anchor and found in texts and anchor not in anchors[found]):
                broken.append(f"{page}: {link}")
    assert broken == []


def test_every_page_is_in_the_navigation(texts: dict[str, str]) -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"^ +- (?:.*: )?([\w./-]+\.md)$", config, re.MULTILINE))
    wanted = {page for page in texts if not page.startswith("reference/peftkern")}
    assert wanted - listed == set()


def test_every_mark_is_filled(texts: dict[str, str], hooks: ModuleType) -> None:
    raw = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for mark in hooks.GENERATED:
        assert raw.count(hooks.MARK.format(mark)) == 1
        assert not any(hooks.MARK.format(mark) in text for text in texts.values())


def test_the_reference_has_every_public_name(texts: dict[str, str], hooks: ModuleType) -> None:
    modules = hooks.public_modules()
    assert {"peftkern", "peftkern.layers", "peftkern.methods"} <= set(modules)
    index = texts["reference/index.md"]
    for module in modules:
        for public, path in hooks.public_names(module).items():
            assert f"[`{public}`][{path}]" in index
            pages = [text for text in texts.values() if f"::: {path}\n" in text]
            assert len(pages) == 1, f"{module}.{public}"
    paths = {path for module in modules for path in hooks.public_names(module).values()}
    for home, _, own in (path.rpartition(".") for path in sorted(paths)):
        assert ast.get_docstring(definition(home, own)), f"{home}.{own}: no docstring"


def definition(module: str, name: str) -> ast.AST:
    """Where a module defines a class or function, or itself for a constant, told by its comment."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return next((node for node in tree.body if getattr(node, "name", "") == name), tree)


def test_every_reason_has_its_cure_on_the_page(texts: dict[str, str]) -> None:
    page = texts["troubleshooting.md"]
    for rows in (*reasons.TABLE.values(), reasons.WARNINGS):
        for cure in rows.values():
            assert cure in page
    assert page.count("\n| `") >= sum(map(len, reasons.TABLE.values())) + len(reasons.WARNINGS)
