"""Plots of the measured speed-ups, from bench/results/<device>/*.json, as SVG files for docs/.

One file per device and background, with every pair of peftkern and a peer that was timed, drawn as
in the report of `peftkern bench`: bars to the right of 1 are peftkern's wins, bars to the left its
losses, gray ones are within the noise.
The same results give the same bytes: no date, no random identifiers, text left to the reader's
fonts.

python bench/make_plots.py           write docs/plots/
python bench/make_plots.py --check   exit 1 if a file is missing or outdated
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from folders import RESULTS
from make_tables import PLOTS, ROOT, THEMES, plot_name, shown
from record_tables import TITLES, short

from peftkern.tools import charts
from peftkern.tools.bench.report_figures import bar_of, compares

WIDTH = 720  # of a page's column, about
LEGEND = (
    "the peer's time over peftkern's, log scale, p20 to p80: blue faster, orange slower, gray noise"
)


def pairs(record: dict) -> list[charts.Bar]:
    return [
        bar_of(case, peer, f"{short(case)} · {theirs['label']}")
        for case in record["cases"]
        for peer, theirs in case["providers"].items()
        if compares(case, peer)
    ]


def drawn(records: dict[str, dict], theme: str) -> str:
    """Draw the SVG of one device."""
    panels = [(TITLES[stem], rows) for stem, one in records.items() if (rows := pairs(one))]
    figure = charts.bars(panels, title="Speed-up over each peer", description=LEGEND, width=WIDTH)
    return charts.svg(figure, theme)


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
    parser.add_argument("--results", type=Path, default=RESULTS)
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
