"""Pages that mkdocs gets from the code: the reference, the cures of every reason, what was tested.

`make site` runs these as hooks of mkdocs; tests call the functions without it.
"""

from __future__ import annotations

import ast
import importlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # about kernels that it did not find

ROOT = Path(__file__).resolve().parents[1]
DOCS, PACKAGE = ROOT / "docs", ROOT / "peftkern"
INTERNAL = ("backends", "formats", "tools", "cli")  # not for users
SHIM = "https://unpkg.com/iframe-worker/shim"
FROM_NETWORK = re.compile(r"(?:src=|<link [^>]*href=|url\()[\"']?((?:https?:)?//[^\"' )>]+)")
MARK = "<!-- {} -->"


def public_modules() -> list[str]:
    """Return the modules that have an `__all__`, `peftkern` first, without the internal ones.

    A module whose names the packages offer, too, is a detail of these.
    """
    packages, modules = [], []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[1] not in INTERNAL and listed(path) is not None:
            is_package = parts[-1] == "__init__"
            found = packages if is_package else modules
            found.append(".".join(parts[:-1] if is_package else parts))
    offered = {path for module in packages for path in public_names(module).values()}
    own = [module for module in modules if not set(public_names(module).values()) <= offered]
    return sorted(packages + own)


def listed(path: Path) -> ast.expr | None:
    """Return what a file assigns to `__all__`, if it does."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return node.value
    return None


def source(module: str) -> Path:
    """Return the file of a module, which may need packages that are not here."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def summary_of(module: str) -> list[str]:
    """Return the first paragraph of a module's docstring."""
    text = ast.get_docstring(ast.parse(source(module).read_text(encoding="utf-8"))) or ""
    return text.partition("\n\n")[0].splitlines()


def public_names(module: str) -> dict[str, str]:
    """Return {name: where it is defined} for the `__all__` of a module."""
    try:
        package = importlib.import_module(module)
    except ImportError:  # of a framework that is not here: its plug-in defines what it offers
        return {name: f"{module}.{name}" for name in ast.literal_eval(listed(source(module)))}
    found = {}
    for name in sorted(package.__all__, key=str.lower):
        value = getattr(package, name)
        home, own = getattr(value, "__module__", module), getattr(value, "__qualname__", name)
        found[name] = f"{home}.{own}" if home.startswith("peftkern") else f"{module}.{name}"
    return found


def reference() -> dict[str, str]:
    """Return {page: text}: a page for each public module, and one that lists them.

    A name that several modules offer stands on the page of the first; the others link to it.
    """
    pages: dict[str, str] = {}
    shown: dict[str, str] = {}
    index = ["# API reference", "", "What is listed here is public; [versioning](../versioning.md)"]
    index += ["says what that promises.", ""]
    for module in public_modules():
        page = f"{module}.md"
        summary = summary_of(module)
        lines = [f"# {module}", "", *summary, ""]
        index += [f"## [`{module}`]({page})", "", *summary, ""]
        elsewhere = []
        for name, path in public_names(module).items():
            index.append(f"[`{name}`][{path}]{{ .name }}")
            if path in shown:
                elsewhere.append(f"- [`{name}`][{path}], of `{shown[path]}`")
            else:
                shown[path] = module
                lines += [f"::: {path}", ""]
        index.append("")
        if elsewhere:
            lines += ["## Also here", "", *elsewhere, ""]
        pages[f"reference/{page}"] = "\n".join(lines)
    return {"reference/index.md": "\n".join(index), **pages}


def cures() -> str:
    """Return the tables of reasons and warnings, as Markdown."""
    from peftkern.backends.reasons import TABLE, WARNINGS

    def table(title: str, head: str, rows: dict[str, str]) -> Iterator[str]:
        yield from (title, "", f"| {head} | What to do |", "| --- | --- |")
        for template, cure in rows.items():
            ticks = "``" if "`" in template else "`"
            space = " " if "`" in template else ""
            yield f"| {ticks}{space}{template}{space}{ticks} | {cure} |"
        yield ""

    lines = ["## Reasons", ""]
    for title, rows in TABLE.items():
        lines += table(f"### {title}", "Reason", rows)
    return "\n".join([*lines, *table("## Warnings", "Warning", WARNINGS)])


def tested() -> str:
    """Return the table that `tests/compat` writes, if it has."""
    page = DOCS / "compatibility-results.md"
    return page.read_text(encoding="utf-8") if page.exists() else "Not tested."


def changelog() -> str:
    """Return CHANGELOG.md; its links into the repository lead to what this site has of it."""
    path = ROOT / "CHANGELOG.md"
    if not path.exists():
        return "# Changelog\n\nNothing was released yet."
    return path.read_text(encoding="utf-8").replace("](docs/", "](")


GENERATED = {"reasons": cures, "tested": tested, "changelog": changelog}


def on_config(config: Any) -> Any:
    """Put the pages of the reference into the navigation, and leave out what is not there."""
    pages = reference()
    sections = (entry for entry in config["nav"] if isinstance(entry, dict))
    for name, entries in ((n, e) for section in sections for n, e in section.items()):
        if isinstance(entries, list):
            if name == "Reference":
                entries += [page for page in pages if page not in entries]
            entries[:] = [page for page in entries if page in pages or (DOCS / page).exists()]
    config["nav"] = [entry for entry in config["nav"] if entry not in ({"Frameworks": []},)]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the reference, which are nowhere on disk."""
    from mkdocs.structure.files import File

    for page, text in reference().items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put what is generated in the place of its mark."""
    for name, text in GENERATED.items():
        mark = MARK.format(name)
        if mark in markdown:
            markdown = markdown.replace(mark, text())
    return markdown


def on_post_page(output: str, config: Any, page: Any) -> str:
    """Take the stand-in for workers from here, which mkdocs-material takes from the network."""
    from mkdocs.utils import get_relative_url

    return output.replace(SHIM, get_relative_url("worker.js", page.url))


def on_post_template(output_content: str, **_: Any) -> str:
    """Do the same on the page for addresses that lead nowhere."""
    return output_content.replace(SHIM, "/worker.js")


def on_post_build(config: Any) -> None:
    """Fail where a public name has no entry in the built reference."""
    from mkdocs.exceptions import PluginError

    site = Path(config["site_dir"]) / "reference"
    built = "".join(page.read_text(encoding="utf-8") for page in site.glob("*.html"))
    paths = {path for module in public_modules() for path in public_names(module).values()}
    missing = sorted(path for path in paths if f'id="{path}"' not in built)
    if missing:
        raise PluginError(f"without an entry in the reference: {', '.join(missing)}")
    for page in site.parent.rglob("*.html"):
        asked = FROM_NETWORK.findall(page.read_text(encoding="utf-8"))
        if asked:
            raise PluginError(f"{page}: takes {asked[0]} from the network")
