"""README's result tables, written between its two markers from bench/results/<device>/*.json.

python bench/make_tables.py           rewrite the section
python bench/make_tables.py --check   exit 1 if it is not what the results say
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
PLOTS = "bench/plots"  # where bench/make_plots.py writes
THEMES = ("light", "dark")
ORDER = (
    "demo",
    "e2e",
    "nf4_lora_linear",
    "nf4",
    "lora_linear",
    "grouped_linear",
    "dora",
    "rosa",
    "adalora",
    "low_rank_svd",
    "formulations",
)
TITLES = {
    "demo": "QLoRA fine-tuning, whole training step",
    "nf4_lora_linear": "NF4 linear layer with LoRA",
    "nf4": "NF4 quantization",
    "lora_linear": "Dense linear layer with LoRA",
    "grouped_linear": "Experts of a mixture with LoRA",
    "dora": "DoRA layer, dense and NF4",
    "rosa": "RoSA's sparse products against dense ones",
    "low_rank_svd": "SVD of 224 low-rank updates",
    "adalora": "AdaLoRA, per step",
    "e2e": "Whole training steps of Llama-shaped stacks",
    "formulations": "Ways to compute the update",
}
NAMES_SAY_SIZES = ("adalora", "dora", "e2e", "grouped_linear")
OURS = "peftkern"


def milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def timing(row: dict) -> str:
    if row["wrong"]:
        return "WRONG"
    middle = milliseconds(row["median_ms"])
    return f"{middle} [{milliseconds(row['p20_ms'])}-{milliseconds(row['p80_ms'])}]"


def peer_cell(case: dict, peer: str) -> str:
    """Format the peer's time, its ratio to peftkern's, and the target with its mark."""
    ours, theirs = case["variants"][OURS], case["variants"].get(peer)
    if theirs is None:
        return ""
    if theirs["wrong"] or ours["wrong"]:
        return "WRONG" if theirs["wrong"] else milliseconds(theirs["median_ms"])
    text = milliseconds(theirs["median_ms"])
    text += f", **{theirs['median_ms'] / ours['median_ms']:.2f}x**"
    if "graph" in ours and "graph" in theirs:
        text += f" / {theirs['graph']['median_ms'] / ours['graph']['median_ms']:.2f}x"
    for target in case["targets"]:
        if target["peer"] == peer:
            mark = "✓" if target["met"] else "✗"
            text += f" ({target['at_least']:.3g}x {mark})"
    return text


def gpu_cells(case: dict) -> list[str]:
    """Format the time in a replayed graph, the kernel launches of a call, and peak memory."""
    ours = case["variants"][OURS]
    limits = [target for target in case["targets"] if "launches_at_most" in target]
    launches = str(ours.get("launches", ""))
    for limit in limits:
        launches += f" ({limit['launches_at_most']} {'✓' if limit['met'] else '✗'})"
    peak = f"{ours['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in ours else ""
    return [milliseconds(ours["graph"]["median_ms"]) if "graph" in ours else "", launches, peak]


def cases_table(record: dict) -> str:
    peers = list(dict.fromkeys(p for c in record["cases"] for p in c["variants"] if p != OURS))
    on_gpu = record["machine"].get("gpu") is not None
    rows = []
    for case in record["cases"]:
        share = case["share_of_floor"]
        floor = f"{share:.0%}" if share is not None else ""
        cells = [case["name"].partition("/")[2], timing(case["variants"][OURS]), floor]
        cells += gpu_cells(case) if on_gpu else []
        rows.append(cells + [peer_cell(case, peer) for peer in peers])
    more = ["in a graph", "launches", "peak MB"] if on_gpu else []
    return markdown(["ms", OURS, "of floor", *more, *peers], rows)


def steps_table(record: dict) -> str:
    """Format training steps: throughput of both, peak memory beside its prediction."""
    rows = []
    for case in record["cases"]:
        ours, theirs = case["variants"][OURS], case["variants"]["PEFT"]
        cells = [case["name"].partition("/")[2], timing(ours), peer_cell(case, "PEFT")]
        for variant in (ours, theirs):
            speed = variant.get("tokens_s")
            cells += [f"{speed:.0f}" if speed else "", megabytes(variant)]
        rows.append(cells)
    header = ["ms", OURS, "PEFT", "tokens/s", "MB (planned)", "PEFT tokens/s", "PEFT MB (planned)"]
    return markdown(header, rows)


def megabytes(variant: dict) -> str:
    if "peak_bytes" not in variant:
        return ""
    return f"{variant['peak_bytes'] / 1e6:.0f} ({variant['planned_bytes'] / 1e6:.0f})"


def answers_table(answers: list[dict]) -> str:
    """Format the answers of runs: whether a model fits."""
    rows = []
    for answer in answers:
        fits = {True: "**fits** ✓", False: "**does not fit** ✗"}.get(
            answer.get("fits"), "no answer"
        )
        if answer.get("stopped") and answer.get("fits") is None:
            fits += f": {answer['stopped']}"
        peak = answer.get("peak_bytes")
        steps = answer.get("step_s") or []
        rows.append(
            [
                answer["name"].partition("/")[2],
                fits,
                f"{peak / 1e9:.2f}" if peak else "",
                f"{answer['planned_bytes'] / 1e9:.2f}" if "planned_bytes" in answer else "",
                ", ".join(f"{seconds:.1f}" for seconds in steps),
            ]
        )
    return markdown(["one model, a given memory", "", "peak GB", "planned GB", "steps, s"], rows)


def demo_table(record: dict) -> str:
    alone, patched = record["runs"]["peft"], record["runs"]["peftkern"]
    summary = record["summary"]

    def step(run: dict) -> str:
        return timing({**{f"{k}_ms": v for k, v in run["step_ms"].items()}, "wrong": None})

    def memory(label: str, key: str) -> list[str]:
        less = patched[key] - alone[key]
        mark = "✓" if less < 0 else "✗"
        return [label, f"{alone[key]:.0f}", f"{patched[key]:.0f}", f"{less:+.0f} ({mark})"]

    faster = f"**{summary['speedup']:.2f}x** ({'✓' if summary['speedup'] > 1 else '✗'})"
    rows = [
        ["step, ms", step(alone), step(patched), faster],
        memory("peak process memory, MB", "resident_peak_mb"),
        memory("peak tensors in a step, MB", "tensor_peak_mb"),
        [
            "final loss",
            f"{alone['final_loss']:.4f}",
            f"{patched['final_loss']:.4f}",
            f"curves part by {summary['loss_mean_rel_diff']:.1e} on average, at most "
            f"{summary['loss_max_rel_diff']:.1e}",
        ],
    ]
    return markdown(["", "PEFT", "PEFT + peftkern", ""], rows)


def heading(stem: str, record: dict) -> str:
    """Format the heading: stem, machine and versions."""
    facts, size = record["machine"], record["options"]
    gpu = facts.get("gpu")
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v)
    text = f"**{TITLES[stem]}**"
    if "cases" not in record:
        text += f" ({size['steps']} steps, {size['batch']}x{size['seq']} tokens)"
    elif gpu:
        text += f" (r={size['r']})"
    elif stem not in NAMES_SAY_SIZES:
        text += f" ({size['n']}x{size['k']}, r={size['r']})"
    where = f"{facts['cpu']}, {facts['threads']} threads, {facts['isa']}"
    if gpu:
        where = f"{gpu['name']}, CUDA {gpu['cuda']}"
    return f"{text}. {where}; commit {facts['commit']}, {facts['date'][:10]}; {versions}."


def shown(results: Path) -> dict[str, dict[str, dict]]:
    """Return {device: {stem: record}} in table order, without records of Triton's interpreter."""
    found = {}
    for device in sorted(path for path in results.iterdir() if path.is_dir()):
        records = {path.stem: json.loads(path.read_text()) for path in device.glob("*.json")}
        kept = {
            stem: records[stem]
            for stem in ORDER
            if stem in records
            and not records[stem]["machine"].get("interpreter")
            and (records[stem].get("cases") != [] or records[stem].get("answers"))
        }
        if kept:
            found[device.name] = kept
    return found


def plot_name(device: str, theme: str) -> str:
    return f"{device}-{theme}.svg"


def picture(device: str) -> str:
    """Return the HTML of the device's plot, for either background."""
    light, dark = (f"{PLOTS}/{plot_name(device, theme)}" for theme in THEMES)
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="Speed-up over each peer, {device}"></picture>'
    )


def decoders_table(answers: list[dict]) -> str:
    """Format the speed of each NF4 lookup table, or its wrong bits, or why none was run."""
    rows = []
    for answer in answers:
        if not answer["decoders"]:
            rows.append([f"not measured: {answer.get('stopped', 'cut off')}", "", ""])
        for name, found in answer["decoders"].items():
            rates = [found.get(key) for key in ("weights_per_clock", "packed_gb_s")]
            cells = [f"{rates[0]:.1f}", f"{rates[1]:.0f}"] if all(rates) else ["WRONG", ""]
            rows.append([name, *cells])
    return markdown(["decoding", "weights per clock and SM", "packed GB/s"], rows)


def alike(cases: list[dict]) -> list[list[dict]]:
    """Group the cases that have the same variants."""
    groups: dict[tuple[str, ...], list[dict]] = {}
    for case in cases:
        groups.setdefault(tuple(case["variants"]), []).append(case)
    return list(groups.values())


def tables(stem: str, record: dict) -> list[str]:
    if "cases" not in record:
        return [demo_table(record)]
    if stem == "formulations":
        found = [cases_table({**record, "cases": cases}) for cases in alike(record["cases"])]
        decoders = [answer for answer in record.get("answers", []) if "decoders" in answer]
        return [*found, *([decoders_table(decoders)] if decoders else [])]
    if stem != "e2e":
        return [cases_table(record)]
    found = [steps_table(record)] if record["cases"] else []
    return [*found, *([answers_table(record["answers"])] if record.get("answers") else [])]


def section(results: Path) -> str:
    """Format everything between the markers."""
    parts, on_gpu = [], False
    for device, records in shown(results).items():
        parts.append(picture(device))
        for stem, record in records.items():
            on_gpu |= record["machine"].get("gpu") is not None
            parts += [heading(stem, record), *tables(stem, record)]
    if not parts:
        return "No results are recorded yet: `make bench` measures this machine."
    legend = (
        "Medians [p20-p80] of one interleaved run. Peers: their time, how many times peftkern's"
        " that is, and the target for that ratio (✓ met, ✗ missed). Floor: counted bytes and FLOPs"
        " at the measured copy bandwidth and dense matrix product. Method, and what bounds the"
        " misses: [bench/README.md](bench/README.md)."
    )
    if on_gpu:
        legend += (
            " On a GPU single calls are timed, launches included; after the slash is the ratio in"
            " replayed graphs, without them."
        )
    return "\n\n".join([legend, *parts])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make_tables.py")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if outdated")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    args = parser.parse_args(argv)
    text = args.readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        print(f"make_tables.py: error: {args.readme} needs {BEGIN} and {END}", file=sys.stderr)
        return 2
    head, rest = text.split(BEGIN)
    new = f"{head}{BEGIN}\n{section(args.results)}\n{END}{rest.split(END)[1]}"
    if args.check:
        print("README's results are up to date" if new == text else "run bench/make_tables.py")
        return int(new != text)
    args.readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
