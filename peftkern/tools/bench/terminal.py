"""Record of `peftkern bench` as text and tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from peftkern.tools.bench.cases import SHORT
from peftkern.tools.bench.compare import Change
from peftkern.tools.bench.names import other_format
from peftkern.tools.bench.record import OURS, Case, Provider, Record
from peftkern.tools.bench.rows import ratio, ratio_at_least, target_mark, within_noise
from peftkern.tools.bench.timer import number

# Widths from which a table has intervals, and throughput and errors; of names, if there is no more.
NARROW, WIDE, LABEL = 60, 110, 16


def speed_up(case: Case, name: str) -> tuple[float, bool] | None:
    """Return another's time over peftkern's, and whether that is within the noise: the intervals
    from the 20th to the 80th percentile overlap."""
    if name == OURS or (found := ratio(case, name)) is None:
        return None
    return found, within_noise(case["providers"][OURS], case["providers"][name])


def bench_report(record: Record, width: int) -> Iterable[RenderableType]:
    """Format the output of `peftkern bench`: machine, ceilings, table, absent baselines."""
    facts, roof = record["environment"], record["roof"]
    where = facts["gpu"]["name"] if facts["gpu"] else f"{facts['cpu']}, {facts['isa'] or 'no ISA'}"
    rates = [f"{roof[d] / 1e12:.3g} TFLOP/s {short}" for d, short in SHORT.items() if d in roof]
    if busy := busy_machine(record):
        yield Text(busy, style="yellow")
    yield Text(f"{where}, {facts['threads']} threads", style="bold")
    if "copy" in roof:
        yield Text(f"roof: {copies(record)}, products {', '.join(rates)}")
    for case in record["cases"]:
        yield ""
        yield bench_table(case, record, width)
    yield ""
    if record["cases"]:
        yield summary(record)
    for case in record["cases"]:
        for row in case["providers"].values():
            if why := row["wrong"] or row["failed"]:
                kind = "WRONG" if row["wrong"] else "FAILED"
                yield Text(f"{kind} {row['label']}, {case['name']}: {why}", style="red")
            if row["note"]:
                yield Text(f"{row['label']}, {case['name']}: left to others: {row['note']}")
        for said in case.get("said", []):
            yield Text(said)
        for reason, count in case.get("fell_back", {}).items():
            yield Text(f"{case['name']}: fell back {count} times: {reason}")
    for warning in filter(None, (stopped(record), above_roof(record))):
        yield Text(warning, style="yellow")
    for facts in record.get("answers", []):
        yield Text(answer(facts))
    for name, why in (record["not_installed"] | record.get("failed", {})).items():
        yield Text(f"{name}: {why}")
    for name in record["not_reached"]:
        budget = f"{record['budget_s']:g} s"
        yield Text(f"{name}: not reached within {budget} (--budget)", style="yellow")


def answer(facts: dict) -> str:
    """Format the notes of a question in a line: its own text, or whether something fits, measured
    beside planned."""
    fits, stopped = facts.get("fits"), facts.get("stopped")
    said = facts.get("said") or {True: "fits", False: "does not fit", None: "no answer"}[fits]
    sizes = [
        f"{label} {facts[key] / 1e9:.2f} GB"
        for label, key in (("peak", "peak_bytes"), ("planned", "planned_bytes"))
        if key in facts
    ]
    limit = f" into {facts['cap_bytes'] / 1e9:.0f} GB" if "cap_bytes" in facts else ""
    return "; ".join([f"{facts['name']}: {said}{limit}", *sizes, *([stopped] if stopped else [])])


Cell = Callable[[Case, str], RenderableType]


def bench_table(case: Case, record: Record, width: int) -> Table:
    """Build a line per provider, of as many columns as leave room for the names."""
    labels = [row["label"] for one in record["cases"] for row in one["providers"].values()]
    longest = max(map(len, labels))
    room, columns = width - min(longest, LABEL), {}
    for header, cell in _columns(record, width).items():
        least = max(len(header), 22 if "[" in header else 7)
        if room >= least + 2:
            room, columns[header] = room - least - 2, (least, cell)
    grid = Table(box=None, pad_edge=False, title=title(case), title_justify="left")
    grid.title_style = "bold"
    grid.add_column("", width=min(longest, min(longest, LABEL) + room), overflow="fold")
    for header, (least, _) in columns.items():
        grid.add_column(Text(header), justify="right", no_wrap=True, width=least)
    for name, row in case["providers"].items():
        label = Text(row["label"], style="bold" if name == OURS else "")
        grid.add_row(label, *(cell(case, name) for _, cell in columns.values()))
    return grid


def _columns(record: Record, width: int) -> dict[str, Cell]:
    """Return the cells by header, the most important first; those that no row has are left out."""
    every: dict[str, Cell] = {
        "ms [p20-p80]" if width >= NARROW else "ms": lambda case, name: _time(case, name, width),
        **{"speed-up": _speed_up_cell, "of roof": _share_cell, "peak MB": _of("peak_bytes", 1e6)},
        **{"target": _target_cell, "in a graph": _graph_cell, "launches": _of("launches")},
        **{"tokens/s": _of("tokens_s"), "held MB": _of("held_bytes", 1e6)},
        **{"steps/s": _steps_cell, "planned MB": _of("planned_bytes", 1e6)},
    }
    known = {
        header: cell
        for header, cell in every.items()
        if any(str(cell(case, name)) for case in record["cases"] for name in case["providers"])
    }
    more = {"GB/s": "gb_s", "TFLOP/s": "tflop_s", "error": "error_rms"} if width >= WIDE else {}
    forms = {"error_rms": "{:.1e}"}
    return known | {h: _of(key, form=forms.get(key, "{:.3g}")) for h, key in more.items()}


def _of(key: str, unit: float = 1.0, form: str = "") -> Cell:
    """Return the cells of a field, which are empty where the result is not good."""

    def cell(case: Case, name: str) -> str:
        row = case["providers"][name]
        if row.get(key) is None or row["wrong"] or row["failed"]:
            return ""
        return form.format(row[key]) if form else number(row[key] / unit)

    return cell


def _time(case: Case, name: str, width: int) -> Text:
    row = case["providers"][name]
    if row["wrong"] or row["failed"]:
        return Text("WRONG" if row["wrong"] else "FAILED", style="bold red")
    if bound := row.get("at_least_ms"):
        return Text(f"> {number(bound)}")
    if not row["median_ms"]:
        return Text("")
    median, low, high = (number(row[key]) for key in ("median_ms", "p20_ms", "p80_ms"))
    return Text(f"{median} [{low}-{high}]" if width >= NARROW else median)


def _share_cell(case: Case, name: str) -> Text:
    share = case["providers"][name]["share_of_roof"]
    if share is None:
        return Text("")
    return Text(f"{share:.0%}!", style="yellow") if share > 1 else Text(f"{share:.0%}")


def _target_cell(case: Case, name: str) -> Text:
    for target in case.get("targets", []):
        if target["peer"] == name:
            style = {True: "green", False: "red", None: ""}[target["met"]]
            return Text(f"{target['at_least']:.3g}x {target_mark(target)}", style=style)
    return Text("")


def _graph_cell(case: Case, name: str) -> str:
    if name == OURS or (found := ratio(case, name, "graph_ms")) is None:
        return ""
    return f"{found:.2f}x"


def _steps_cell(case: Case, name: str) -> str:
    median = case["providers"][name]["median_ms"]
    return number(1e3 / median) if median and case.get("tokens") else ""


def busy_machine(record: Record) -> str | None:
    """Return a warning that others used the measured processor, or None."""
    facts = record["environment"]
    load, threads = facts["load_average"][0], max(1, facts["threads"])
    if facts["gpu"] or load <= threads:
        return None
    return f"machine busy: load {load:.1f} on {threads} threads; numbers will be noisy"


def copies(record: Record) -> str:
    """Format the copy bandwidth, and whether it is that of a cache."""
    facts, roof = record["environment"], record["roof"]
    cache = facts["gpu"]["l2_cache"] if facts["gpu"] else facts["last_level_cache"]
    where = " in cache" if 0 < 2 * roof.get("copy_bytes", 0) <= cache else ""
    return f"copies {roof['copy'] / 1e9:.3g} GB/s{where}"


def above_roof(record: Record) -> str | None:
    """Return a warning that lists the results above the roof: the ceiling was not one."""
    found = [
        f"{row['label']}, {case['name']}: {row['share_of_roof']:.0%}"
        for case in record["cases"]
        for row in case["providers"].values()
        if is_above(row)
    ]
    if not found:
        return None
    why = "data stayed in a cache, more was read than written, or the machine was busy before"
    return f"above the roof ({why}): {'; '.join(found)}"


def is_above(row: Provider) -> bool:
    return (row["share_of_roof"] or 0.0) > 1.0


def first_call(row: Provider) -> str | None:
    """Return the lower bound of a call's time, if that is all that is known."""
    bound = row.get("at_least_ms")
    return f"> {number(bound / 1e3)} s a call" if bound else None


def stopped(record: Record) -> str | None:
    """Return a line that lists the lower bounds, and says what they are."""
    found = [
        f"{row['label']}, {case['name']}: {bound}"
        for case in record["cases"]
        for row in case["providers"].values()
        if (bound := first_call(row))
    ]
    return f"lower bounds, of first calls that were stopped: {'; '.join(found)}" if found else None


def title(case: Case, without: str = "") -> str:
    """Format a case's title; `without`: "M" or "r" to leave out."""
    size = f"{case['N']}x{case['K']}" if case["N"] else ""
    shape = "" if case["shape"] in (size, f"{case['M']}x{size}") else f"{case['shape']} "
    if case["M"] is not None and without != "M":
        size = f"{case['M']}x{size}" if size else f"{case['M']} tokens"
    rank = f", r={case['r']}" if case["r"] and without != "r" else ""
    op = " ".join(filter(None, (case["op"], other_format(case))))
    return f"{op} {shape}{size}{rank}, {SHORT[case['dtype']]}, {case['mode']}"


def _speed_up_cell(case: Case, name: str) -> Text:
    if bound := ratio_at_least(case, name):
        return Text(f"> {number(bound)}x", style="green" if bound > 1 else "dim")
    found = speed_up(case, name)
    if found is None:
        return Text("")
    ratio, noise = found
    if noise:
        return Text(f"≈ {ratio:.2f}x", style="dim")
    return Text(f"{ratio:.2f}x", style="green" if ratio > 1 else "red")


def beside(record: Record) -> list[tuple[Case, str, float, bool]]:
    """Yield every comparison of equal work: case, provider, speed-up, whether within the noise."""
    return [
        (case, name, *found)
        for case in record["cases"]
        for name in case["providers"]
        if (found := speed_up(case, name)) is not None and not is_bound(case, name)
    ]


def beside_stopped(record: Record) -> list[tuple[Case, str, float]]:
    """Yield every comparison of equal work of which only a lower bound is known."""
    return [
        (case, name, least)
        for case in record["cases"]
        for name in case["providers"]
        if (least := ratio_at_least(case, name)) is not None and not is_bound(case, name)
    ]


def is_bound(case: Case, name: str) -> bool:
    """Return whether a provider is a bound, not a peer: without an adapter it does less."""
    return name == "frozen" and bool(case["r"])


def counts(record: Record) -> tuple[int, int, int]:
    """Count how often peftkern was faster, slower, and alike: losses like wins. A lower bound
    of the speed-up counts if it is above 1."""
    found = [(ratio, noise) for *_, ratio, noise in beside(record)]
    alike = sum(noise for _, noise in found)
    faster = sum(ratio > 1 and not noise for ratio, noise in found)
    surely = sum(least > 1 for *_, least in beside_stopped(record))
    return faster + surely, len(found) - faster - alike, alike


def summary(record: Record) -> Text:
    faster, slower, alike = counts(record)
    if not faster + slower + alike:
        return Text("")
    said = f"{faster} faster, {slower} slower, {alike} within noise (≈)"
    return Text(f"peftkern beside those that do the same: {said}; speed-up: their time over ours")


def comparison(
    found: list[Change], silent: dict[str, str], fail_if: float
) -> Iterable[RenderableType]:
    """Format the findings of --compare, the worst last, where it is read first."""
    if found:
        grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for name in ("compared", "by", "before", "now", "change", ""):
            grid.add_column(name, justify="left" if name in ("compared", "by") else "right")
        for change in sorted(found, key=lambda change: change.slower):
            bad = change.slower > fail_if
            mark = Text("SLOWER", style="bold red") if bad else Text("ok", style="green")
            word = "slower" if change.slower > 0 else "faster"
            amount = f"{word} by {abs(change.slower):.1%}"
            figures = f"{change.before:.3g}", f"{change.after:.3g}", amount
            grid.add_row(change.case, change.by, *figures, mark)
        yield grid
    for name, why in silent.items():
        yield Text(f"{name}: not compared: {why}", style="yellow")
    bad = sum(change.slower > fail_if for change in found)
    said = f"{bad} of {len(found)} cases slower by more than {fail_if:.1%}"
    yield Text(said if found else "nothing could be compared", style="" if found else "red")
