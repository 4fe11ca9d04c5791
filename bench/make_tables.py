"""Result tables of README and docs/, written between their markers from bench/results/.

README gets a few rows of every CPU, docs/measurements.md all that was measured.

python bench/make_tables.py           rewrite both sections
python bench/make_tables.py --check   exit 1 if one of them is not what the results say
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from folders import RESULTS
from record_tables import TITLES, heading, markdown, tables, times, timing

from peftkern.tools.bench import record as records
from peftkern.tools.bench.record import OURS
from peftkern.tools.bench.rows import ratio

ROOT = RESULTS.parents[1]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
PLOTS = "docs/plots"  # where bench/make_plots.py writes
THEMES = ("light", "dark")
SIDE_BY_SIDE = {
    "bitsandbytes + PEFT": "bnb",
    "bitsandbytes + PEFT, eval": "bnb eval",
    "dense + PEFT": "dense",
}
NO_RESULTS = "No results are recorded yet: `make bench` measures this machine."


def shown(results: Path) -> dict[str, dict[str, dict]]:
    """Return {device: {stem: record}} in table order, without records of Triton's interpreter and
    of an instruction set that stands in for another machine's."""
    return {
        device: kept
        for device, records in measured(results).items()
        if (kept := {stem: one for stem, one in records.items() if not stands_in(one)})
    }


def measured(results: Path) -> dict[str, dict[str, dict]]:
    """Return {device: {stem: record}} of all that was measured and not interpreted."""
    found = {}
    for device in sorted(path for path in results.iterdir() if path.is_dir()):
        paths = {stem: device / f"{stem}.json" for stem in TITLES}
        read = {stem: records.read(path) for stem, path in paths.items() if path.is_file()}
        found[device.name] = {
            stem: one
            for stem, one in read.items()
            if not one["environment"]["interpreter"] and (one["cases"] or one["answers"])
        }
    return found


def stands_in(record: dict) -> bool:
    """Return whether PEFTKERN_CPU_ISA held the kernels back from what the machine has."""
    facts = record["environment"]
    return facts["gpu"] is None and bool(facts["isas"]) and facts["isa"] != facts["isas"][-1]


def on_cpus(results: Path, stem: str = "nf4_lora_linear") -> list[dict[str, dict]]:
    """Return {stem: record} of every CPU and instruction set with this stem, oldest set first."""

    def age(one: dict[str, dict]) -> int:
        facts = one[stem]["environment"]
        return facts["isas"].index(facts["isa"])

    found = [one for one in measured(results).values() if stem in one]
    found = [one for one in found if one[stem]["environment"]["gpu"] is None]
    return sorted((one for one in found if one[stem]["environment"]["isa"]), key=age)


def machine(facts: dict) -> str:
    return f"{facts['cpu']}, {facts['threads']} threads"


def places(found: list[dict]) -> list[str]:
    """Name the instruction sets, and the machines if there are several."""
    facts = [one["environment"] for one in found]
    several = len(set(map(machine, facts))) > 1
    return [f"{machine(f)}, {f['isa']}" if several else f["isa"] for f in facts]


def summary(results: Path, stem: str = "nf4_lora_linear") -> str:
    """Format README's rows: peers' time over peftkern's, of cases that every CPU and set has."""
    found = on_cpus(results)
    if not found:
        return NO_RESULTS
    layers = [one[stem] for one in found]
    cases = [{case["name"]: case for case in record["cases"]} for record in layers]
    header, rows = [""], [[place] for place in places(layers)]
    for name in cases[0]:
        said = re.fullmatch(rf"{stem}/forward-M([0-9]+)/(\w+)", name)
        if said and all(name in others for others in cases):
            header.append(f"{said[1]} token{'' if said[1] == '1' else 's'}, {said[2]}")
            for row, one in zip(rows, cases, strict=True):
                row.append(headline(one[name]))
    if any("demo" in one for one in found):
        header.append("step of `make demo`")
        for row, one in zip(rows, found, strict=True):
            faster = ratio(one["demo"]["cases"][0], "PEFT") if "demo" in one else None
            row.append(f"**{faster:.2f}x**" if faster else "not measured")
    size, facts = layers[0]["options"], [one["environment"] for one in layers]
    machines = dict.fromkeys(map(machine, facts))
    dates = ", ".join(f"{f['isa']} {f['date'][:10]}" for f in facts)
    text = (
        "PEFT's time over peftkern's, for the forward of one NF4 layer with LoRA"
        f" ({size['n']}x{size['k']}, r={size['r']}) and for a training step. Bold: PEFT over"
        " bitsandbytes as it trains. In brackets: the fastest of that, of bitsandbytes' kernel of"
        " eval mode, and of PEFT over the dense weight; below 1x peftkern is the slower one."
        f" Measured on {' and '.join(machines)}: {dates}. A set that is not the machine's best is"
        " forced, which bitsandbytes' kernel of eval mode escapes. Times, spreads, versions and all"
        " other results: [measurements](docs/measurements.md)."
    )
    return f"{markdown(header, rows)}\n\n{text}"


def headline(case: dict) -> str:
    """Format the ratio of bitsandbytes under PEFT as it trains, then that of the fastest peer, of
    those whose time is known."""
    found = [one for peer in SIDE_BY_SIDE if (one := ratio(case, peer))]
    in_training = times(case, "bitsandbytes + PEFT")
    fastest = f" ({min(found):.2f}x)" if found else ""
    return f"{in_training}{fastest}" if in_training else ""


def side_by_side(results: Path, stem: str = "nf4_lora_linear") -> list[str]:
    """Format the forward passes of a stem with a group of columns for every CPU and instruction
    set, if there are several; where one lacks a case, its cells are empty."""
    found = [one[stem] for one in on_cpus(results, stem)]
    if len(found) < 2:
        return []
    names = {one["name"]: None for record in found for one in record["cases"]}
    names = [n for n in names if "/forward-M" in n]
    names.sort(key=lambda name: (name.rpartition("/")[2], int(re.findall("-M([0-9]+)", name)[0])))
    header, rows = [""], [[name.partition("/")[2]] for name in names]
    for record, where in zip(found, places(found), strict=True):
        header += [f"{where}: ms", *(f"{label} x" for label in SIDE_BY_SIDE.values())]
        cases = {case["name"]: case for case in record["cases"]}
        for name, cells in zip(names, rows, strict=True):
            cells += compared(cases[name]) if name in cases else [""] * (1 + len(SIDE_BY_SIDE))
    text = (
        f"**{TITLES[stem]}, forward, by instruction set**. peftkern's time, and how many times that"
        " each peer took beside it in the same run. A set that is not the machine's best is forced"
        " (`PEFTKERN_CPU_ISA`, and those of torch, oneDNN and MKL) and stands in for machines that"
        " have no more; clock and caches are still this machine's. bitsandbytes' kernel of eval"
        " mode chooses its set itself and cannot be held back: beside a forced avx2 or avx512 it"
        f" runs AVX-512-BF16. Measured: {when(found)}."
    )
    return [text, markdown(header, rows)]


def when(found: list[dict]) -> str:
    facts = [one["environment"] for one in found]
    return "; ".join(f"{f['isa']} {f['date'][:10]}, commit {f['commit']}" for f in facts)


def compared(case: dict) -> list[str]:
    """Format peftkern's time and the ratios of those that stand side by side."""
    return [timing(case["providers"][OURS]), *(times(case, peer) for peer in SIDE_BY_SIDE)]


def plot_name(device: str, theme: str) -> str:
    return f"{device}-{theme}.svg"


def picture(device: str) -> str:
    """Return the device's plot for either background, as GitHub and mkdocs-material read it."""
    folder = PLOTS.removeprefix("docs/")
    return " ".join(
        f"![Speed-up over each peer, {device}]({folder}/{plot_name(device, theme)}"
        f"#gh-{theme}-mode-only)"
        for theme in THEMES
    )


def section(results: Path) -> str:
    """Format everything between the markers."""
    parts, on_gpu, above, bounds = [], False, False, False
    for device, found in shown(results).items():
        parts.append(picture(device))
        for stem, record in found.items():
            on_gpu |= record["environment"]["gpu"] is not None
            above |= any((c["providers"][OURS]["share_of_roof"] or 0) > 1 for c in record["cases"])
            bounds |= any(
                row.get("at_least_ms") for c in record["cases"] for row in c["providers"].values()
            )
            parts += [heading(stem, record), *tables(stem, record)]
    parts += side_by_side(results)
    if not parts:
        return NO_RESULTS
    legend = (
        "Medians [p20-p80] of one interleaved run. Peers: their time, how many times peftkern's"
        " that is, and the target for that ratio (✓ met, ✗ missed, ? unknown from a lower bound)."
        " Floor: counted bytes and FLOPs at the measured copy bandwidth and dense matrix product."
        " Method, and what bounds the misses: `bench/README.md`."
    )
    if above:
        legend += (
            " Above 100% of it: what was written stayed in a cache, or more was read than written;"
            " the copy, beyond the caches and half of it writing, is no bound for that."
        )
    if bounds:
        legend += (
            " After a > stands a lower bound: the first call was stopped after that time; it says"
            " nothing more."
        )
    if on_gpu:
        legend += (
            " On a GPU single calls are timed, launches included; after the slash is the ratio in"
            " replayed graphs, without them."
        )
    return "\n\n".join([legend, *parts])


PAGES = {"README.md": summary, "docs/measurements.md": section}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make_tables.py")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if outdated")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder of the pages")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    stale = {}
    for name, write in PAGES.items():
        path = args.root / name
        text = path.read_text(encoding="utf-8")
        if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
            print(f"make_tables.py: error: {path} needs {BEGIN} and {END}", file=sys.stderr)
            return 2
        head, rest = text.split(BEGIN)
        new = f"{head}{BEGIN}\n{write(args.results)}\n{END}{rest.split(END)[1]}"
        if new != text:
            stale[path] = new
    if args.check:
        names = ", ".join(path.name for path in stale)
        print(f"run bench/make_tables.py: {names}" if stale else "the tables are up to date")
        return int(bool(stale))
    for path, new in stale.items():
        path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
