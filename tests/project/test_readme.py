"""README's code runs, its links lead somewhere; the files around it agree with the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from paths import ROOT

import peftkern

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", "CONTRIBUTING.md", "docs/measurements.md")
LINK = re.compile(r"(?:\]\(|(?:src|srcset|href)=\")([^)\"\s]+)")
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def test_readme_is_short():
    assert len(README.splitlines()) <= 120


def test_every_way_to_install_brings_what_that_code_imports():
    ways = re.findall(r"^\S* ?pip install (.*)$", README, re.MULTILINE)
    assert ways and [way for way in ways if not way.endswith(("'.[peft]'", " peft"))] == []


def test_the_methods_are_where_readme_says():
    table = README.partition("| plain PyTorch |")[2].partition("Names are of")[0]
    names = set(re.findall(r"`(\w+)`", table)) - {"quantize_"}
    assert len(names) > 10 and peftkern.quantize_
    homes = peftkern.layers, peftkern.methods
    assert [name for name in names if not any(hasattr(home, name) for home in homes)] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page: str):
    targets = LINK.findall((ROOT / page).read_text(encoding="utf-8"))
    files = [one.partition("#")[0] for one in targets if not one.startswith(("https://", "#"))]
    assert [name for name in files if not (ROOT / page).parent.joinpath(name).exists()] == []


def test_the_picture_is_the_same_on_both_backgrounds():
    """But for its colors."""
    light, dark = (
        (ROOT / "docs" / "images" / f"how-it-fits-{theme}.svg").read_text(encoding="utf-8")
        for theme in ("light", "dark")
    )
    color = re.compile(r"#[0-9a-f]{6}")
    assert light != dark and color.sub("", light) == color.sub("", dark)


def test_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == peftkern.__version__ and citation["license"] == "Apache-2.0"
    newest = re.search(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == peftkern.__version__


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_issue_templates_ask_for_the_doctor(path: Path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert form["name"] and form["description"]
    fields = {field["id"]: field for field in form["body"]}
    assert len(fields) == len(form["body"])
    assert all(field["type"] == "textarea" for field in fields.values())
    assert "peftkern doctor --json" in fields["doctor"]["attributes"]["label"]
