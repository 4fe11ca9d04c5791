"""Plots of the measured speed-ups, from bench/results/<device>/*.json, as SVG files for docs/.

One file per device and background, with every pair of peftkern and a peer that was timed: bars to
the right of 1 are peftkern's wins, bars to the left its losses, gray ones are within the noise.
The same results give the same bytes: no date, no random identifiers, text left to the reader's
fonts.

python bench/make_plots.py           write docs/plots/
python bench/make_plots.py --check   exit 1 if a file is missing or outdated
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from make_tables import PLOTS, ROOT, THEMES, plot_name, shown
from record_tables import TITLES, short

from peftkern.tools import charts
from peftkern.tools.bench.record import OURS
from peftkern.tools.bench.rows import ratio, within_noise

WIDTH = 720  # of a page's column, about
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
    panels = []
    for stem, record in records.items():
        if rows := [bar(*pair) for pair in pairs(record)]:
            panels.append((TITLES[stem], rows))
    figure = charts.bars(panels, title="Speed-up over each peer", description=LEGEND, width=WIDTH)
    return charts.svg(figure, theme)


def bar(label: str, times: float, alike: bool) -> charts.Bar:
    says = f"{'≈ ' if alike else ''}{times:.2f}x" if times < 100 else f"{times:.0f}x"
    color = "level" if alike else "faster" if times > 1 else "slower"
    return charts.Bar(label, says, times, color)


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
