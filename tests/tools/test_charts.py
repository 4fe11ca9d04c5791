"""Charts: what is drawn lies within its axes, reads in either theme, and is the same each time."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from peftkern.tools import charts
from peftkern.tools.canvas import scale
from peftkern.tools.charts import Bar, Series

HOSTILE = "$x$ </text><script>alert(1)</script> \x00\u202e \ud800 & \\frac{"


def figures(words: str = "some words") -> list:
    bars = [
        Bar(words, "2.00x", 2.0, "faster", 1.5, 1e9, note=words, tip=words),
        Bar("b" * 200, "0.50x", 0.5, "slower", note="c " * 200),
        Bar(words, "failed", None, "error"),
    ]
    series = Series(words, 0, [1, 10], [2, 3], [1, 2], [3, 4], [words, words])
    said = {"title": words, "description": words}
    return [
        charts.bars([(words, bars), ("", bars[:1])], **said, width=charts.WIDE),
        charts.bars([("", bars)], **said, width=charts.NARROW),
        charts.bars([("", [Bar(words, "7 MB", 7.0)])], **said, origin=0, unit=""),
        charts.lines([series], **said, x_label=words, y_label=words, log_x=True, log_y=True),
        charts.lines([series], **said, roof=(0.5, 4.0), joined=False, names=[(1, words)]),
        charts.lines([], **said),
        charts.strips([(words, 0, [1.0, 2.0, 4.0], 2.0), ("b", 1, [3.0], 3.0)], **said),
    ]


def test_the_same_data_gives_the_same_bytes_in_the_colors_of_the_theme():
    light, dark, page = (
        [charts.svg(figure, theme) for figure in figures()] for theme in ("light", "dark", "page")
    )
    assert light == [charts.svg(figure, "light") for figure in figures()]
    for one, other, third in zip(light, dark, page, strict=True):
        assert re.sub("#[0-9a-f]{6}", "", one) == re.sub("#[0-9a-f]{6}", "", other)
        assert "#" not in re.sub('href="#|id="#', "", third)
        for name, (day, night) in charts.COLORS.items():
            assert (day in one) == (night in other) == (f"var(--{name})" in third)


def test_a_drawing_says_what_it_shows_and_refers_to_nothing():
    for figure in figures():
        text = charts.svg(figure)
        root = ElementTree.fromstring(text)
        assert root.get("role") == "img" and root.get("aria-label") == "some words"
        assert [child.text for child in root[:2]] == ["some words"] * 2
        assert not re.search(
            r"style=|<style|url\(|<metadata|<!|https?://(?!www.w3.org/2000/svg)", text
        )


def test_whatever_the_text_it_stays_text():
    kinds = {"svg", "g", "path", "text", "tspan", "title", "desc", "use", "defs"}
    for figure in figures(HOSTILE):
        text = charts.svg(figure, "page")
        root = ElementTree.fromstring(text)
        assert {element.tag for element in root.iter()} <= kinds
        assert not re.search("[\x00\u202e\ud800]", text)
        assert root.get("aria-label") == charts.clean(HOSTILE)


def test_ids_on_one_page_differ():
    both = [charts.svg(figures()[3], "page", salt) for salt in ("a", "b")]
    ids = [set(re.findall(' id="([^"]+)"', text)) for text in both]
    assert ids[0] and not ids[0] & ids[1]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from([charts.NARROW, charts.WIDE]),
)
def test_an_axis_holds_its_values_and_ticks(values, log, width):
    bars = [Bar("a", "b", value) for value in values]
    series = Series("a", 0, values, values)
    axes = [
        charts.bars([("", bars)], title="t", width=width, origin=float(log)).axes[0].xaxis,
        charts.lines([series], title="t", log_x=log, width=width).axes[0].xaxis,
    ]
    for axis in axes:
        low, high = axis.get_view_interval()
        assert low < high and all(low <= value <= high for value in values)
        ticks = list(axis.get_majorticklocs())
        assert ticks == sorted(set(ticks)) and len(ticks) <= 8
        assert all(low <= tick <= high for tick in ticks)
        assert list(axis.get_minorticklocs()) == []


@pytest.mark.parametrize(
    ("values", "ticks"),
    [([4, 6, 8], [4, 6, 8]), ([0.5, 1, 2], [0.5, 1, 1.5, 2]), ([-0.5, 2.5], [0, 1, 2])],
    ids=["steps", "losses", "layers"],
)
def test_between_steps_or_layers_there_is_no_tick(values, ticks):
    axis = Figure().subplots()
    scale(axis, "x", values, False, 1.1, ())
    assert axis.get_xticks().tolist() == ticks


@pytest.mark.parametrize("ticks", [[16, 17, 18, 1024], [1, 2, 4, 8, 16, 32, 48, 56, 64, 99]])
def test_given_ticks_that_lack_room_are_left_out(ticks):
    series = Series("a", 0, ticks, ticks)
    figure = charts.lines([series], title="t", log_x=True, ticks=ticks)
    shown = list(figure.axes[0].get_xticks())
    assert set(shown) < set(ticks) and shown[0] == ticks[0]
