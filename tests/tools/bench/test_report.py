"""The HTML report of `peftkern bench`: what stands in it, what cannot get into it, and how a
browser shows it."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import operator
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import browser
import pytest
from bench_records import case, provider, record
from command_line import refused
from hypothesis import given
from hypothesis import strategies as st
from processes import run_code

from peftkern.cli import main
from peftkern.tools import charts
from peftkern.tools.bench import record as records
from peftkern.tools.bench import report, report_figures
from peftkern.tools.bench.names import about, people
from peftkern.tools.bench.record import Record
from peftkern.tools.bench.terminal import number, title

VOID = {"meta", "input", "wbr"}
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
        "stopped": record(
            case(provider("peftkern", 1.0), provider("peft", at_least_ms=4e3), against="peft")
        ),
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
def edge(request) -> str:
    return request.param


@functools.cache
def rendered(name: str) -> str:
    return report.render(EDGES[name])


def test_a_report_has_every_part():
    figures = ["Roofline", "Over tokens", "Over rank", "Memory", "Every call"]
    tables = ["Every result", "Environment", "Repeat it"]
    assert Page(rendered("60 cases")).texts["h2"] == figures + tables


def test_every_number_is_there(edge):
    whole = EDGES[edge]
    records.check(whole)
    page = Page(rendered(edge))
    assert page.record == json.loads(json.dumps(whole))
    rows = iter(page.rows[1:])  # after the head of the table
    again = iter([text for text in page.texts["p"] if "ms at the roof" in text])
    for one in whole["cases"]:
        assert f"{number(one['floor_ms'])} ms at the roof" in next(again)
        for row in one["providers"].values():
            shown = " ".join(next(rows))
            if "\x00" not in one["shape"]:
                assert people(one) in shown and about(one) in shown
            if row["median_ms"] is not None:
                for key in ("median_ms", "p20_ms", "p80_ms"):
                    assert number(row[key]) in shown
            for key, form in (("gb_s", ".3g"), ("tflop_s", ".3g"), ("error_rms", ".1e")):
                if row[key] is not None:
                    assert format(row[key], form) in shown
            if row["peak_bytes"] is not None:
                assert number(row["peak_bytes"] / 1e6) in shown
            for kind in ("wrong", "failed"):
                assert (f" {kind} " in shown) == (row[kind] is not None)
    assert list(rows) == list(again) == []


def test_a_page_refers_to_nothing_but_itself(edge):
    """And runs nothing but the script whose hash is in its policy."""
    html = rendered(edge)
    page = Page(html)
    tags = {tag for tag, _ in page.structure}
    assert not tags & {"img", "link", "iframe", "object", "embed", "form", "base"}
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in ("src", "srcset", "action", "style"), (tag, name)
        if name == "href":
            assert value.startswith("#") and value[1:] in ids
    assert not re.search(r"https?:|url\(|@import|javascript:|data:", html)
    (policy,) = (value for _, name, value in page.attributes if value.startswith("default-src"))
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy and "*" not in policy
    for tag in ("style", "script"):
        (text,) = page.texts[tag]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_strings_of_a_record_become_text():
    """Whatever they are: the page has the same tags with the same attributes, but for the lines
    that a chart breaks a text into."""
    benign, drawn = outline(Page(report.render(with_text("a word"))))
    for name in ("hostile", "odd"):
        assert outline(Page(rendered(name))) == (benign, drawn)
    assert HOSTILE in Page(rendered("hostile")).texts["pre"]
    assert not re.search("[\x00\x1b\u202e]", rendered("odd"))


def outline(page: Page) -> tuple[list, set[str]]:
    """The elements of the page, and the kinds of those within its charts."""
    kinds = {"defs", "desc", "g", "path", "svg", "text", "title", "use"}
    inside = {tag for tag, _ in page.structure} & kinds
    return [one for one in page.structure if one[0] not in kinds], inside


def test_coordinates_are_numbers_within_the_chart(edge):
    one = EDGES[edge]
    found = re.findall("<svg .*?</svg>", rendered(edge), re.DOTALL)
    assert bool(found) == bool(one["cases"])
    for text in found:
        root = ElementTree.fromstring(text)
        width, height = map(float, root.get("viewBox").split()[2:])
        for parent in root.iter("defs"):
            parent.clear()  # a marker is drawn around 0
        for element in root.iter():
            xy = element.get("x", "0"), element.get("y", "0")
            points = [xy, *re.findall(r"(-?[\d.e+-]+) (-?[\d.e+-]+)", element.get("d", ""))]
            for x, y in points:
                assert -1 <= float(x) <= width + 1 and -1 <= float(y) <= height + 1, (x, y, text)


def test_a_stopped_call_is_a_lower_bound_and_marked_as_one(tmp_path, capfd):
    ours = provider("peftkern", 100.0)
    stopped = provider("peft", at_least_ms=4500.0, error_rms=None, error_max=None)
    found = record(
        case(ours, provider("fast", 25.0), stopped, against="fast"),
        case(ours, stopped, m=32, against="peft"),
        case(provider("peftkern", 9000.0), stopped, m=64, against="peft"),  # it says nothing
    )
    records.check(found)
    _, out = printed(found, tmp_path, capfd, f"--csv={tmp_path / 'new.csv'}")
    lines = [line.split() for line in out.splitlines() if line.startswith("peft ")]
    assert lines == [[*["peft", ">", "4500", ">"], f"{least}x"] for least in ("45", "45", "0.5")]
    said = "lower bounds, of first calls that were stopped: peft, lora_linear/M16/r4/full: > 4.5 s"
    flat = " ".join(out.split())
    assert said in flat and flat.count("> 4.5 s a call") == 3
    assert "1 faster" not in out and "2 faster, 1 slower" in out
    assert (tmp_path / "new.csv").read_text().count(",4500.0,") == 3
    page = Page(report.render(found))
    assert [row[2:4] for row in page.rows[1:] if row[1] == "peft"] == [
        ["> 4500", "> 45.00x"],
        ["> 4500", "> 45.00x"],
        ["> 4500", "> 0.50x"],
    ]
    assert sum(said in text for text in page.texts["p"]) == 1
    (title,) = page.texts["h1"]
    assert title.startswith("At least 1.78x faster than fast and peft on this machine: ")
    assert "geometric mean of 3 cases; 1 case is slower; a lower bound of 2 cases; 0" in title
    bars = report_figures.bars(found)
    assert [(bar.says, bar.color, bar.low) for bar in bars[1:]] == [
        ("> 45.00x", "faster", None),
        ("> 0.50x", "level", None),
    ]


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
    assert page.texts["h1"] == [
        "2.45x faster than peft on this machine: "
        "geometric mean of 2 cases; none is slower; 1 wrong; 2 cases not reached"
    ]
    (legend,) = (" ".join(text.split()) for text in page.texts["p"] if "Beside every" in text)
    assert legend.endswith("2 faster, 1 slower, 1 within noise.")
    words = "dense layer with LoRA, forward + backward, r=4, bf16"
    assert page.texts["li"] == [
        f"Least favorable: 0.50x beside fast, layer, 16 tokens {words}",
        f"Most favorable: 3.00x beside peft, layer, 32 tokens {words}",
        f"failed peft2, layer, 32 tokens {words}: no",
        f"wrong peftkern, layer, 64 tokens {words}: error 1",
    ]


def test_a_whole_step_has_no_weight_and_a_script_no_budget():
    step = case(provider("peftkern", 1.0), N=None, K=None, r=None, command="", op="training_step")
    page = Page(report.render(record(step, budget_s=None, not_reached=["a"])))
    assert page.rows[1][0] == "layer, 16 tokenstraining step, forward + backward, bf16"
    assert "budget" not in page.texts["dt"] and "Not reached: a" in page.texts["p"]


@pytest.mark.parametrize(
    ("medians", "said"),
    [
        ([2.0, 0.5, 2.0], ("1.26x faster than peft", "mean of 3 cases; 1 case is slower; 0 wrong")),
        ([0.5], ("2.00x slower than peft", "mean of 1 case; 1 case is slower; 0 wrong")),
        ([1.0], ("As fast as peft", "mean of 1 case; none is slower; 1 within noise; 0 wrong")),
    ],
)
def test_the_headline_is_the_geometric_mean(medians, said):
    cases = [
        case(provider("peftkern", 1.0), provider("peft", ms), m=m)
        for m, ms in enumerate(medians, 1)
    ]
    first, second = report.headline(record(*cases))
    assert first == f"{said[0]} on this machine" and second == f"geometric {said[1]}"


@pytest.mark.parametrize(
    ("shape", "m", "said"),
    [
        ("llama3-8b-q_proj", 256, "Llama-3-8B q_proj, 256 tokens"),
        ("qwen3-30b-a3b-gate_up_proj", 1, "Qwen3-30B-A3B gate_up_proj, 1 token"),
        ("gpt-oss-20b-down_proj", None, "GPT-OSS-20B down_proj"),
        ("mixtral-8x7b-down_proj", 2, "Mixtral-8x7B down_proj, 2 tokens"),
        ("16x64x128", 16, "64 x 128, 16 tokens"),
        ("64x128", None, "64 x 128"),
        ("anything", 3, "anything, 3 tokens"),
    ],
)
def test_cases_have_names_for_people(shape, m, said):
    assert people(case(provider("peftkern", 1.0), m=m, shape=shape)) == said


def test_a_case_says_in_which_format_its_weight_is():
    for other, said in (("", "NF4 layer"), ("int4/", "INT4 layer")):
        one = case(provider("peftkern", 1.0)) | {"op": "nf4_linear"}
        one["name"] = f"nf4_linear/{other}64x128"
        assert about(one).startswith(f"{said}, ")
        assert ("int4" in title(one)) == bool(other)


@given(st.floats(0.5, 2.0), st.floats(1.0, 1.5), st.floats(1.0, 1.5))
def test_a_whisker_includes_1_exactly_within_the_noise(median, ours, theirs):
    found = record(case(provider("peftkern", 1.0, ours), provider("peft", median, theirs)))
    (bar,) = report_figures.bars(found)
    low, high = 1 / ours * median / theirs, ours * median * theirs
    assert (bar.low, bar.high) == (pytest.approx(low), pytest.approx(high))
    if min(abs(low - 1), abs(high - 1)) > 1e-9:  # rounding
        assert ("≈" in bar.says) == (bar.color == "level") == (low <= 1 <= high), bar


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
    html = report.render(busy)
    assert html.index(said) < html.index("<h1>")


def test_what_is_above_the_roof_is_flagged(tmp_path, capfd):
    rows = provider("peftkern", 1.0, share_of_roof=1.25), provider("peft", 2.0, share_of_roof=1.0)
    found = record(case(*rows), case(provider("peftkern", 1.0, share_of_roof=1.4), m=32))
    above = "above the roof (data stayed in a cache, more was read than written, or the"
    _, out = printed(found, tmp_path, capfd)
    table = [line for line in out.splitlines() if "[" in line and "%" in line]
    ours, theirs, _ = (line for line in table if line.startswith("peft"))
    assert "125%!" in ours and "100%" in theirs and "100%!" not in theirs
    assert out.count("above the roof") == 1 and above in out
    listed = [
        f"peftkern, lora_linear/M{m}/r4/full: {share}%" for m, share in ((16, 125), (32, 140))
    ]
    assert f"machine was busy before): {'; '.join(listed)}" in " ".join(out.split())
    page = Page(report.render(found))
    assert sum(above in text for text in page.texts["p"]) == 1
    assert [row[4] for row in page.rows[1:]] == ["125.0%!", "100.0%", "140.0%!"]


@pytest.mark.parametrize(("size", "said"), [(1 << 24, " in cache"), (1 << 27, ""), (None, "")])
def test_the_roof_of_copies_says_where_it_was_measured(size, said, tmp_path, capfd):
    found = record(case(provider("peftkern", 1.0)))
    if size is not None:
        found["roof"]["copy_bytes"] = size
    assert f"roof: copies 20 GB/s{said}, products" in printed(found, tmp_path, capfd)[1]
    # roofline and environment
    assert len(re.findall(f"copies 20 GB/s{said}[,<]", report.render(found))) == 2


def test_a_comparison_says_slower_or_faster(tmp_path, capfd):
    old, new = (record(case(provider("peftkern", ms), provider("peft", 2.0))) for ms in (1.0, 0.63))
    for before, after, said in ((old, new, "faster by 37.0%"), (new, old, "slower by 58.7%")):
        (tmp_path / "old.json").write_text(json.dumps(before))
        compare = f"--compare={tmp_path / 'old.json'}"
        status, out = printed(after, tmp_path, capfd, compare, "--fail-if=58%")
        assert said in out and "by -" not in out
        assert status == ("SLOWER" in out) == said.startswith("slower")
        assert printed(after, tmp_path, capfd, compare, "--fail-if=59%")[0] == 0
        page = Page(report.render(after, before))
        assert page.texts["h2"][0] == "Compared with 2026-11-24"
        (row,) = (row for row in page.rows if "ratio to peft" in row)
        assert row[-1] == said


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


def test_a_report_without_matplotlib_is_refused_before_anything_is_measured(
    tmp_path, capfd, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    complaint = "--html: needs matplotlib: pip install 'peftkern[report]'"
    refused(capfd, complaint, "bench", "--html", tmp_path / "out.html")


def test_only_a_report_needs_a_plotting_library():
    code = "import sys, peftkern.tools.bench.command; print('matplotlib' in sys.modules)"
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
        for name in EDGES:
            path = tmp_path / "report.html"
            path.write_text(rendered(name), encoding="utf-8")
            for width, height, dark in ((320, 600, True), (360, 844, False), (1440, 900, True)):
                page.open(path, width, height, dark)
                where = f"{name}, {width} pixels"
                assert page.messages == [], where
                assert page.requests == [path.as_uri()], where
                assert page.value(WIDTH) == width, where
                assert page.value(OVERLAPS) == 0, where
                said = charts.clean(": ".join(filter(None, report.headline(EDGES[name]))))
                shown = page.value("document.querySelector('h1').innerText")
                assert shown.split() == said.split(), where
                seen.add((dark, page.value("getComputedStyle(document.body).backgroundColor")))
    assert len(seen) == 2 and len({color for _, color in seen}) == 2


SORTED = """(() => {
  const [table] = document.querySelectorAll(".results");
  const column = () => [...table.tBodies[0].rows].map(row => row.cells[2].dataset.value);
  return [1, 2].map(() => (table.querySelectorAll("button")[2].click(), column()));
})()"""


@pytest.mark.skipif(not browser.FOUND, reason="there is no chromium on PATH")
def test_a_table_is_sorted_by_a_click(tmp_path):
    found = record(
        case(provider("peftkern", 10.0), provider("peft", 9.0), provider("x", failed="no")),
        case(provider("peftkern", 100.0), provider("peft", 2.0), m=32),
    )
    report.write_html(found, tmp_path / "report.html")
    with browser.page(tmp_path / "profile") as page:
        page.open(tmp_path / "report.html", 1440, 900)
        up, down = page.value(SORTED)
        assert page.messages == []
    assert up[:4] == ["2.0", "9.0", "10.0", "100.0"] and down[:4] == up[3::-1]
