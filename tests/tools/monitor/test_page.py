"""Drawings of runs: what is in them, and that the same run gives the same bytes."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import browser
import pytest
from monitor_runs import read, record_adalora, start, step, write

from peftkern.tools.monitor import page


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return read(record_adalora(tmp_path_factory.mktemp("adalora") / "run.jsonl"))


@pytest.fixture
def other(tmp_path):
    steps = (step(i, cuda_allocated_bytes=2**30) for i in range(1, 2001))
    return read(write(tmp_path / "other.jsonl", start(), *steps))


def labels(runs) -> list[str]:
    return [figure.words[0] for figure in page.figures(runs)]


def test_a_run_of_adalora_is_drawn_with_the_rank_of_each_layer(run):
    drawn = labels([run])
    assert drawn[:3] == ["loss", "grad norm", "learning rate"]
    assert {"tokens/s", "process RSS, GB", "kernel calls per step"} < set(drawn)
    of_layers = ["rank of each layer", "importance of each layer", "triplets moved by a mask"]
    assert drawn[-3:] == [f"{what}, run.jsonl" for what in of_layers]
    assert {"adalora rank", "adalora budget", "adalora importance"} < set(drawn)
    text = page.svg([run])
    root = ET.fromstring(text)
    tips = [one.text for one in root.findall(".//{*}title")]
    first, last = run.ranks[0][1], run.ranks[-1][1]
    (_, mask), *_ = [(step, mask) for step, mask in run.masks if mask.pruned]
    for layer, rank in last.items():
        (tip,) = [tip for tip in tips if tip.startswith(f"{layer}: {first[layer]} to {rank}")]
        numbers = ", ".join(map(str, mask.pruned.get(layer, ())))
        assert (f"pruned {numbers}" in tip) == bool(numbers)
        assert f"{layer}: {run.masks[-1][1].importance[layer]:.3g} in the last mask" in tips
    assert text == page.svg([run])


def test_two_runs_share_their_charts(run, other):
    drawn = labels([run, other])
    assert drawn.count("loss") == 1 and "difference of the losses" in drawn
    assert "cuda allocated, GB" not in drawn and "allocated, GB" in drawn
    text = page.svg([run, other])
    assert ">run.jsonl<" in text and ">other.jsonl<" in text
    assert len(text) < 300_000  # 2000 records are thinned


def test_numbers_that_are_not_finite_leave_no_trace(tmp_path):
    run = read(write(tmp_path / "run.jsonl", start(), step(1), step(2, loss=None), step(3)))
    assert "nan" not in page.svg([run]).lower()
    run = read(write(tmp_path / "none.jsonl", start()))
    ET.fromstring(page.svg([run]))
    assert labels([run]) == []


def test_a_page_holds_charts_tables_and_nothing_that_a_name_smuggles_in(run, tmp_path):
    path = write(tmp_path / "<img src=x>.jsonl", start(device_name="<script>"), step(1))
    hostile = read(path)
    text = page.html([run, hostile])
    assert text.count("<svg") == len(labels([run, hostile]))
    assert "<img" not in text and text.count("<script") == 1  # the base template's own
    assert "small dense product" in text and "losses" in text
    assert text == page.html([run, hostile])


@pytest.mark.skipif(not browser.FOUND, reason="there is no chromium on PATH")
def test_a_browser_shows_it_without_a_complaint(run, other, tmp_path):
    path = tmp_path / "run.html"
    with browser.page(tmp_path / "profile") as tab:
        for runs in ([run], [run, other]):
            path.write_text(page.html(runs), encoding="utf-8")
            for width, dark in ((360, True), (1440, False)):
                tab.open(path, width, 800, dark)
                assert tab.messages == [] and tab.requests == [path.as_uri()]
                assert tab.value("document.documentElement.scrollWidth") == width
