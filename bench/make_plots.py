"""Plots of the measured speed-ups, from bench/results/<device>/*.json, as SVG files for README.

One file per device and background, with every pair of peftkern and a peer that was timed: bars to
the right of 1 are peftkern's wins, bars to the left its losses, gray ones are within the noise.
The same results give the same bytes: no date, no random identifiers, text left to the reader's
fonts.

python bench/make_plots.py           write bench/plots/
python bench/make_plots.py --check   exit 1 if a file is missing or outdated
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from make_tables import PLOTS, ROOT, THEMES, TITLES, plot_name, short, shown

from peftkern.tools.bench.record import OURS
from peftkern.tools.bench.rows import ratio, within_noise

# Inches, because nothing is fitted: the width of text depends on the fonts of the machine.
WIDTH, LEFT, RIGHT, ROW = 8.0, 3.7, 7.5, 0.2
TITLE, TICKS, CAPTION = 0.35, 0.35, 0.3
INK = {"light": "#1f2328", "dark": "#e6edf3"}
LINES = {"light": "#d1d9e0", "dark": "#3d444d"}
# Blue and orange differ for the color-blind, too; both are readable on white and on near-black.
WIN, LOSS, ALIKE = "#3b82c4", "#d9730d", "#8b949e"
LEGEND = (
    "the peer's time over peftkern's, log scale: blue faster, orange slower, gray within the noise"
)


def pairs(record: dict) -> Iterator[tuple[str, float, bool]]:
    """Return ("case, against peer", peer's time over peftkern's, whether within the noise)."""
    for case in record["cases"]:
        ours = case["providers"][OURS]
        for peer, theirs in case["providers"].items():
            if peer != OURS and (found := ratio(case, peer)):
                yield f"{short(case)} · {theirs['label']}", found, within_noise(ours, theirs)


def drawn(records: dict[str, dict], theme: str) -> str:
    """Draw the SVG of one device."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    panels = {stem: list(pairs(record)) for stem, record in records.items()}
    panels = {stem: bars for stem, bars in panels.items() if bars}
    ink, lines = INK[theme], LINES[theme]
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "peftkern",
        "font.family": "sans-serif",
        "font.size": 8,
        "text.color": ink,
        "axes.labelcolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "axes.edgecolor": lines,
    }
    with matplotlib.rc_context(style):
        height = sum(TITLE + len(bars) * ROW + TICKS for bars in panels.values()) + CAPTION
        figure = pyplot.figure(figsize=(WIDTH, height))
        figure.patch.set_alpha(0)
        top = height
        for stem, bars in panels.items():
            bottom = top - TITLE - len(bars) * ROW
            place = (LEFT / WIDTH, bottom / height)
            size = ((RIGHT - LEFT) / WIDTH, len(bars) * ROW / height)
            panel(figure.add_axes((*place, *size)), TITLES[stem], bars, ink, lines)
            top = bottom - TICKS
        figure.text(0.5, 0.1 / height, LEGEND, ha="center")
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def panel(axis, title: str, bars: list[tuple[str, float, bool]], ink: str, lines: str) -> None:
    """Draw one stem: a bar from 1 to each ratio."""
    axis.set_title(title, loc="left", fontsize=9, fontweight="bold")
    axis.set_xscale("log")
    for y, (_, times, alike) in enumerate(bars):
        color = ALIKE if alike else WIN if times > 1 else LOSS
        axis.barh(y, times - 1, left=1, height=0.7, color=color)
        text = f"{'≈ ' if alike else ''}{times:.2f}x" if times < 100 else f"{times:.0f}x"
        side = "left" if times >= 1 else "right"
        axis.annotate(
            text,
            (times, y),
            xytext=(3 if times >= 1 else -3, 0),
            textcoords="offset points",
            ha=side,
            va="center",
            fontsize=7,
        )
    ratios = [times for _, times, _ in bars]
    axis.set_xlim(min(0.5, 0.4 * min(ratios)), max(2.0, 2.0 * max(ratios)))
    axis.set_ylim(len(bars) - 0.4, -0.6)  # from the top down
    axis.axvline(1, color=ink, linewidth=0.8)
    axis.set_yticks(range(len(bars)), [label for label, _, _ in bars])
    axis.tick_params(axis="y", length=0)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.xaxis.set_minor_formatter("")
    axis.grid(axis="x", color=lines, linewidth=0.5)
    axis.set_axisbelow(True)
    axis.set_facecolor("none")
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def plots(results: Path) -> dict[str, str]:
    """Return {file name: SVG} of every device that was measured."""
    return {
        plot_name(device, theme): drawn(records, theme)
        for device, records in shown(results).items()
        for theme in THEMES
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make_plots.py")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if outdated")
    parser.add_argument("--out", type=Path, default=ROOT / PLOTS)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    args = parser.parse_args(argv)
    wanted = plots(args.results)
    stale = []
    for name, text in wanted.items():
        path = args.out / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
    if args.check:
        print(f"run bench/make_plots.py: {', '.join(stale)}" if stale else "plots are up to date")
        return int(bool(stale))
    args.out.mkdir(parents=True, exist_ok=True)
    for name in stale:
        (args.out / name).write_text(wanted[name], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
