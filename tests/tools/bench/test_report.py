"""The HTML report of `peftkern bench`: what stands in it, what cannot get into it, and how a
browser shows it."""

from __future__ import annotations

import functools
import json
import math
import operator
import re
from html.parser import HTMLParser
from pathlib import Path

import browser
import pytest
from bench_records import case, provider, record
from command_line import refused
from hypothesis import given
from hypothesis import strategies as st
from paths import TESTS
from processes import run_code

from peftkern.cli import main
from peftkern.tools.bench import charts, report
from peftkern.tools.bench import record as records
from peftkern.tools.bench.record import Record
from peftkern.tools.bench.terminal import number

VOID = {"meta"}
HOSTILE = (
    "\"'></textarea></title></style><script>alert(1)</script><img src=x onerror=alert(2)>--><!--"
)
ODD = "\x00\x1b[31m\u202e\ud800 & <b> \u2028"


class Page(HTMLParser):
    """Everything that a page consists of; fails on a tag that is not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.structure: list[tuple[str, tuple[str, ...]]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.structure.append((tag, tuple(name for name, _ in attrs)))
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.texts.setdefault(tag, []).append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, (tag, self.open, self.getpos())

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    @property
    def record(self) -> Record:
        (text,) = self.texts["textarea"]
        return json.loads(text)


def with_text(words: str) -> Record:
    """Those words wherever somebody else's text can stand, names of things included."""
    bad = [
        provider(words, 2.0, note=words),
        provider("a" + words, wrong=words),
        provider("b" + words, failed=words),
    ]
    found = record(
        case(provider(words, 1.0), *bad, shape=words, command=words, op=words),
        case(provider(words, 1.0), *bad, m=32, shape=words, command=words, op=words),
        command=words,
        device=words,
        not_reached=[words],
        not_installed={words: words},
    )
    facts = found["environment"]
    facts |= dict.fromkeys(("cpu", "isa", "commit", "date", "python"), words)
    facts |= {"isas": [words], "versions": {words: words}, "variables": {words: words}}
    return found


def edge_records() -> dict[str, Record]:
    gpu = {"name": "Some GPU", "capability": "9.0", "multiprocessors": 132, "cuda": None}
    gpu |= {"memory": 80 << 30, "l2_cache": 50 << 20}
    wrong = provider("peftkern", wrong="error nan rms, nan max; bound 0.0049 rms", error_rms=None)
    failed = provider("peft", failed="killed by SIGABRT", error_rms=None, error_max=None)
    ms, rs = (1, 8, 16, 64, 256, 1024), (1, 2, 4, 8, 16, 32, 48, 56, 64, 99)
    everything = [
        case(provider("peftkern", m / 100 + r / 50), provider("peft", m / 90), m=m, r=r)
        for m in ms
        for r in rs
    ]
    peaks = {
        m: [provider(name, peak_bytes=m * n) for name, n in (("peftkern", 1000), ("peft", 2000))]
        for m in (16, 32)
    }
    none = dict.fromkeys(("tflop_s", "share_of_roof", "peak_bytes", "error_rms", "error_max"))
    dequantize = {"op": "nf4_dequantize", "mode": "forward", "flops": 0}
    found = {
        "no case": record(not_reached=["lora_linear/a", "lora_linear/b"], roof={}),
        "all wrong": record(case(wrong, failed), case(wrong, failed, m=32)),
        "alone": record(case(provider("peftkern", 1.0))),
        "one sample": record(
            case(provider("peftkern", 1.0, 1.0, samples_ms=[1.0]), provider("peft", 2.0, 1.0))
        ),
        "huge ratios": record(
            case(provider("peftkern", 1e-9), provider("peft", 1e12, 1e6), provider("x", 1e-9)),
            case(provider("peftkern", 1e12, 1e6), provider("peft", 1e-9), m=1 << 30),
        ),
        "60 cases": record(*everything),
        "GPU": record(
            case(provider("peftkern", 1.0, **none), provider("peft", 1.5, **none)),
            case(provider("peftkern", 1.0, **none), m=None, r=None, **dequantize),
            gpu=gpu,
        ),
        "memory": record(*(case(*peaks[m], m=m, mode="memory") for m in peaks)),
        "interpreter, busy": record(case(provider("peftkern", 1.0), provider("frozen", 1.0))),
        "hostile": with_text(HOSTILE),
        "odd": with_text(ODD),
        "long": with_text("A_long-label/with.no#space" * 20),
    }
    facts = found["interpreter, busy"]["environment"]
    facts |= {"interpreter": True, "load_average": [64.0, 1.0, 1.0], "isa": None, "isas": []}
    return found


EDGES = edge_records()


@pytest.fixture(params=EDGES)
def any_record(request) -> Record:
    return EDGES[request.param]


def test_a_report_has_every_part():
    charts = ["Speed-up", "Roofline", "Over rows M", "Over rank r"]
    tables = ["Every result", "Environment", "Raw samples"]
    assert Page(report.render(EDGES["60 cases"])).texts["h2"] == charts + tables


def test_every_number_is_there(any_record):
    records.check(any_record)
    page = Page(report.render(any_record))
    assert page.record == json.loads(json.dumps(any_record))
    rows = iter(page.rows[1:])  # after the head of the table
    for one in any_record["cases"]:
        (head,) = next(rows)
        assert number(one["floor_ms"]) in head
        for row in one["providers"].values():
            shown = " ".join(next(rows))
            if row["median_ms"] is not None:
                for key in ("median_ms", "p20_ms", "p80_ms"):
                    assert number(row[key]) in shown
            for key, form in (("gb_s", ".3g"), ("tflop_s", ".3g"), ("error_rms", ".1e")):
                if row[key] is not None:
                    assert format(row[key], form) in shown
            if row["peak_bytes"] is not None:
                assert number(row["peak_bytes"] / 1e6) in shown
            assert ("WRONG" in shown, "FAILED" in shown) == (
                row["wrong"] is not None,
                row["failed"] is not None,
            )
    assert list(rows) == []


def test_a_page_refers_to_nothing_but_itself(any_record):
    html = report.render(any_record)
    page = Page(html)
    tags = {tag for tag, _ in page.structure}
    assert not tags & {"script", "img", "link", "iframe", "object", "embed", "form", "base"}
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in ("src", "srcset", "action", "style"), (tag, name)
        if name == "href":
            assert value.startswith("#") and value[1:] in ids
    assert not re.search(r"https?:|url\(|@import|javascript:|data:", html)
    assert "default-src 'none'" in html


def test_strings_of_a_record_become_text():
    """Whatever they are: the page has the same tags with the same attributes."""
    benign = Page(report.render(with_text("a word")))
    hostile = Page(report.render(EDGES["hostile"]))
    assert hostile.structure == benign.structure
    assert HOSTILE in hostile.texts["pre"]
    odd = Page(report.render(EDGES["odd"]))
    assert odd.structure == benign.structure
    assert not re.search("[\x00\x1b\u202e]", report.render(EDGES["odd"]))


def test_coordinates_are_numbers_within_the_chart(any_record):
    page = Page(report.render(any_record))
    found = [
        (name, float(value.rstrip("%")), value.endswith("%"))
        for tag, name, value in page.attributes
        if tag in ("line", "use", "rect", "text") and name in ("x", "y", "x1", "x2", "y1", "y2")
    ]
    for name, value, relative in found:
        assert math.isfinite(value)
        assert 0 <= value <= (100 if relative else 340), name
    if any(one["against"] for one in any_record["cases"]):
        assert any(relative for *_, relative in found)


def test_losses_stand_beside_wins():
    ours, wrong = provider("peftkern", 1.0), provider("peftkern", wrong="error 1")
    found = record(
        case(ours, provider("peft", 2.0), provider("near", 1.05), provider("fast", 0.5)),
        case(ours, provider("peft", 3.0), provider("peft2", failed="no"), m=32),
        case(wrong, provider("peft", 0.1), m=64),
        case(ours, provider("frozen", 0.1), m=128),  # less work: no loss
        not_reached=["a", "b"],
    )
    page = Page(report.render(found))
    tiles = [re.match(r"(\d+)(\D+?)(?:peftkern: (\d))?$", item) for item in page.texts["li"][:6]]
    assert [tile.groups() for tile in tiles] == [
        ("2", "faster", None),
        ("1", "slower", None),
        ("1", "≈ in the noise", None),
        ("1", "WRONG", "1"),
        ("1", "FAILED", "0"),
        ("2", "not reachedcases", None),
    ]
    notes = page.texts["li"][6:]
    least = "Least favorable: 0.50x beside fast, lora_linear layer 16x64x128, r=4, bf16, full"
    assert notes[0] == least
    assert notes[1].startswith("Most favorable: 3.00x beside peft, lora_linear layer 32x64x128")
    assert "WRONG error 1 (peftkern, lora_linear layer 64x64x128, r=4, bf16, full)" in notes
    assert "FAILED no (peft2, lora_linear layer 32x64x128, r=4, bf16, full)" in notes


@given(st.floats(0.5, 2.0), st.floats(1.0, 1.5), st.floats(1.0, 1.5))
def test_a_whisker_includes_1_exactly_within_the_noise(median, ours, theirs):
    found = record(case(provider("peftkern", 1.0, ours), provider("peft", median, theirs)))
    bar = Page(report.figures.speed_ups(found)).texts["li"][1]
    low, high = 1 / ours * median / theirs, ours * median * theirs
    if min(abs(low - 1), abs(high - 1)) > 1e-9:  # rounding
        assert ("≈" in bar) == (low <= 1 <= high), bar


@given(
    st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=9),
    st.floats(1.01, 2),
    st.floats(1.5, 10),
    st.integers(4, 8),
)
def test_an_axis_holds_its_values_and_ticks(values, margin, least, most):
    axis = charts.axis(values, 90.0, 10.0, margin=margin, least=least)
    assert axis.high / axis.low >= least * 0.999
    ticks = axis.ticks(most)
    assert ticks == sorted(set(ticks)) and len(ticks) <= most
    for value in (*values, *ticks):
        assert 10 - 1e-6 <= axis.at(value) <= 90 + 1e-6


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("cases.0.M", "16", "record.cases[0].M: expected a whole number"),
        ("cases.0.flops", True, "record.cases[0].flops: expected a whole number"),
        ("cases.0.dtype", "int8", "record.cases[0].dtype: expected one of bfloat16, float16"),
        ("cases.0.against", "nobody", "record.cases[0].against: there is no provider 'nobody'"),
        ("cases.0.providers", [], "record.cases[0].providers: expected an object, got []"),
        ("cases.0.providers.peft.p20_ms", None, "median, p20 and p80 are [2.0, None"),
        ("cases.0.providers.peft.median_ms", -1.0, "expected a number, 0 or from 1e-30 to 1e+30"),
        ("cases.0.providers.peft.samples_ms", [1.0, "x"], ".samples_ms[1]: expected a number"),
        ("cases.0.providers.peft.wrong", "it is", "has a time, but is not good"),
        ("environment.variables", {"A": None}, "record.environment.variables['A']: expected text"),
        ("roof", {"copy": 1.0}, "record.roof.bfloat16: missing, for record.cases[0]"),
        ("format", "peftkern bench 0", "not a record of `peftkern bench --json`"),
    ],
)
def test_a_broken_record_is_one_clear_line(path, value, complaint, tmp_path, capfd):
    found = record(case(provider("peftkern", 1.0), provider("peft", 2.0)))
    records.check(found)
    *way, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    functools.reduce(operator.getitem, way, found)[last] = value
    (tmp_path / "old.json").write_text(json.dumps(found))
    out = tmp_path / "out.html"
    refused(capfd, complaint, "bench", "--from", tmp_path / "old.json", "--html", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--from", "no/such.json"], "no/such.json"),
        (["--from", "conftest.py"], "conftest.py: expected JSON in UTF-8"),
        (["--from", "conftest.py", "--op", "x"], "--from: measures nothing, so that --op"),
        (["--from", "conftest.py", "--json", "x.json"], "so that --json has no effect"),
        (["--html", "no/such/folder/x.html"], "--html: no/such/folder/x.html: there is no folder"),
        (["--html", "."], "--html: . is a folder"),
    ],
)
def test_bad_options_are_one_line(arguments, complaint, capfd, monkeypatch):
    monkeypatch.chdir(TESTS)
    refused(capfd, complaint, "bench", *arguments)


def test_an_earlier_record_can_be_compared_and_exported(tmp_path, capfd):
    for name, ms in (("old.json", 1.0), ("new.json", 1.5)):
        one = record(case(provider("peftkern", ms), provider("peft", 2.0)))
        (tmp_path / name).write_text(json.dumps(one))
    arguments = ["bench", f"--from={tmp_path / 'new.json'}", f"--compare={tmp_path / 'old.json'}"]
    assert main([*arguments, f"--csv={tmp_path / 'new.csv'}", "--fail-if=40%"]) == 1
    assert "SLOWER" in capfd.readouterr().out
    assert len((tmp_path / "new.csv").read_text().splitlines()) == 3
    assert main([*arguments, "--fail-if=60%"]) == 0


def printed(found: Record, tmp_path: Path, capfd, *more: str) -> tuple[int, str]:
    (tmp_path / "run.json").write_text(json.dumps(found))
    status = main(["bench", f"--from={tmp_path / 'run.json'}", *more])
    return status, capfd.readouterr().out


@pytest.mark.parametrize("load", [4.7, 2.1])
def test_a_busy_machine_is_told_before_all_else(load, tmp_path, capfd):
    busy = record(case(provider("peftkern", 1.0), provider("peft", 2.0)))
    _, quiet = printed(busy, tmp_path, capfd)
    assert "busy" not in quiet and "busy" not in report.render(busy)
    busy["environment"]["load_average"] = [load, 1.0, 1.0]
    said = f"machine busy: load {load} on 2 threads; numbers will be noisy"
    assert printed(busy, tmp_path, capfd)[1].splitlines()[0] == said
    page = Page(report.render(busy))
    assert page.texts["li"].index(said) < min(
        i for i, text in enumerate(page.texts["li"]) if "favorable" in text
    )


def test_what_is_above_the_roof_is_flagged(tmp_path, capfd):
    rows = provider("peftkern", 1.0, share_of_roof=1.25), provider("peft", 2.0, share_of_roof=1.0)
    found = record(case(*rows))
    above = "125% of the roof: its data stayed in a cache, it reads more than it writes, or"
    _, out = printed(found, tmp_path, capfd)
    table = [line for line in out.splitlines() if "[" in line and "%" in line]
    ours, theirs = (line for line in table if line.startswith("peft"))
    assert "125%!" in ours and "100%" in theirs and "100%!" not in theirs
    assert out.count("of the roof") == 1
    assert f"peftkern, lora_linear/M16/r4/full: {above}" in " ".join(out.split())
    page = Page(report.render(found))
    assert any(above in text for text in page.texts["li"])
    cells = [row for row in page.rows if row[0] in ("peftkern", "peft")]
    assert [row[3] for row in cells] == ["125.0%!", "100.0%"]


@pytest.mark.parametrize(("size", "said"), [(1 << 24, " in cache"), (1 << 27, ""), (None, "")])
def test_the_roof_of_copies_says_where_it_was_measured(size, said, tmp_path, capfd):
    found = record(case(provider("peftkern", 1.0)))
    if size is not None:
        found["roof"]["copy_bytes"] = size
    assert f"roof: copies 20 GB/s{said}, products" in printed(found, tmp_path, capfd)[1]
    assert report.render(found).count(f"copies 20 GB/s{said},") == 2  # roofline and environment


def test_a_comparison_says_slower_or_faster(tmp_path, capfd):
    old, new = (record(case(provider("peftkern", ms), provider("peft", 2.0))) for ms in (1.0, 0.63))
    for before, after, said in ((old, new, "faster by 37.0%"), (new, old, "slower by 58.7%")):
        (tmp_path / "old.json").write_text(json.dumps(before))
        status, out = printed(after, tmp_path, capfd, f"--compare={tmp_path / 'old.json'}")
        assert said in out and "by -" not in out
        assert status == said.startswith("slower")


def test_a_record_without_a_case_is_printed(tmp_path, capfd):
    status, out = printed(EDGES["no case"], tmp_path, capfd)
    assert status == 1 and "lora_linear/a: not reached within 9 s" in out


def test_a_report_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "old.html"
    path.write_text("before")
    broken = record(case(provider("peftkern", 1.0)))
    del broken["environment"]["cpu"]
    with pytest.raises(KeyError):
        report.write_html(broken, path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_the_report_needs_no_plotting_library():
    code = "import sys, peftkern.tools.bench.report; print('matplotlib' in sys.modules)"
    assert run_code(code) == "False\n"


WIDTH = "document.documentElement.scrollWidth"
# Text that its neighbor covers: tick labels of one axis, whose boxes have an area in common.
OVERLAPS = """[...document.querySelectorAll("svg")].flatMap(svg => {
  const boxes = [...svg.querySelectorAll("text")].map(one => one.getBoundingClientRect());
  return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 4 && b.top < a.bottom - 4));
}).length"""


@pytest.mark.skipif(not browser.FOUND, reason="there is no chromium on PATH")
def test_a_browser_shows_every_record_without_a_complaint(tmp_path):
    """No message on the console, no request, no horizontal scrolling of the page, no label over
    another; on a phone and a desk, light and dark."""
    seen = set()
    with browser.page(tmp_path / "profile") as page:
        for name, one in EDGES.items():
            path = tmp_path / "report.html"
            report.write_html(one, path)
            for width, height, dark in ((320, 600, True), (390, 844, False), (1280, 900, True)):
                page.open(path, width, height, dark)
                where = f"{name}, {width} pixels"
                assert page.messages == [], where
                assert page.requests == [path.as_uri()], where
                assert page.value(WIDTH) == width, where
                assert page.value(OVERLAPS) == 0, where
                assert page.value("document.querySelector('h1').innerText") == "peftkern bench"
                seen.add((dark, page.value("getComputedStyle(document.body).backgroundColor")))
    assert len(seen) == 2 and len({color for _, color in seen}) == 2
