"""Markdown tables of one record of bench/results/<device>/*.json, and the line above them."""

from __future__ import annotations

from peftkern.tools.bench.record import OURS
from peftkern.tools.bench.rows import ratio, ratio_at_least, target_mark
from peftkern.tools.bench.timer import number

TITLES = {  # in the order of the tables
    "demo": "QLoRA fine-tuning, whole training step",
    "e2e": "Whole training steps of Llama-shaped stacks",
    "nf4_lora_linear": "NF4 linear layer with LoRA",
    "nf4": "NF4 quantization",
    "lora_linear": "Dense linear layer with LoRA",
    "grouped_linear": "Experts of a mixture with LoRA",
    "dora": "DoRA layer, dense and NF4",
    "rosa": "RoSA's sparse products against dense ones",
    "adalora": "AdaLoRA, per step",
    "low_rank_svd": "SVD of 224 low-rank updates",
    "truncated_svd": "Largest singular values of a weight",
    "adapters": "Sums of adapters, and truncation",
    "merge": "Merging an adapter into a checkpoint",
    "initialization": "Starting values of LoRA from a weight",
    "plan": "Memory of a step, planned and measured",
    "formulations": "Ways to compute the update",
}
NAMES_SAY_SIZES = ("adalora", "dora", "e2e", "grouped_linear", "plan")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def timing(row: dict) -> str:
    if bound := row.get("at_least_ms"):
        return f"> {number(bound)}"
    if row["median_ms"] is None:
        return "WRONG" if row["wrong"] else "FAILED"
    middle = number(row["median_ms"])
    return f"{middle} [{number(row['p20_ms'])}-{number(row['p80_ms'])}]"


def times(case: dict, peer: str) -> str:
    """Format the peer's time over ours, or a lower bound of it; "" without either."""
    if least := ratio_at_least(case, peer):
        return f"**> {least:.2f}x**"
    return f"**{found:.2f}x**" if (found := ratio(case, peer)) else ""


def peer_cell(case: dict, peer: str) -> str:
    """Format the peer's time, its ratio to peftkern's, and the target with its mark."""
    theirs = case["providers"].get(peer)
    if theirs is None:
        return ""
    text = timing(theirs) if theirs["median_ms"] is None else number(theirs["median_ms"])
    if not (found := times(case, peer)):
        return text
    text += f", {found}"
    if replayed := ratio(case, peer, "graph_ms"):
        text += f" / {replayed:.2f}x"
    for target in case["targets"]:
        if target["peer"] == peer:
            text += f" ({target['at_least']:.3g}x {target_mark(target)})"
    return text


def gpu_cells(case: dict) -> list[str]:
    """Format the time in a replayed graph, the kernel launches of a call, and peak memory."""
    ours = case["providers"][OURS]
    launches = str(ours["launches"] or "")
    for target in case["targets"]:
        if most := target["launches_at_most"]:
            launches += f" ({most} {target_mark(target)})"
    graph, peak = ours["graph_ms"], ours["peak_bytes"]
    return [number(graph) if graph else "", launches, f"{peak / 1e6:.0f}" if peak else ""]


def cases_table(record: dict) -> str:
    cases = record["cases"]
    labels = {n: row["label"] for c in cases for n, row in c["providers"].items() if n != OURS}
    on_gpu = record["environment"]["gpu"] is not None
    rows = []
    for case in cases:
        ours = case["providers"][OURS]
        share = ours["share_of_roof"]
        cells = [short(case), timing(ours), f"{share:.0%}" if share else ""]
        cells += gpu_cells(case) if on_gpu else []
        rows.append(cells + [peer_cell(case, peer) for peer in labels])
    more = ["in a graph", "launches", "peak MB"] if on_gpu else []
    return markdown(["ms", OURS, "of floor", *more, *labels.values()], rows)


def short(case: dict) -> str:
    return case["name"].partition("/")[2]


def steps_table(record: dict) -> str:
    """Format training steps: throughput of both, peak memory beside its prediction."""
    rows = []
    for case in record["cases"]:
        ours, theirs = case["providers"][OURS], case["providers"]["PEFT"]
        cells = [short(case), timing(ours), peer_cell(case, "PEFT")]
        for row in (ours, theirs):
            cells += [f"{row['tokens_s']:.0f}" if row["tokens_s"] else "", megabytes(row)]
        rows.append(cells)
    header = ["ms", OURS, "PEFT", "tokens/s", "MB (planned)", "PEFT tokens/s", "PEFT MB (planned)"]
    return markdown(header, rows)


def megabytes(row: dict) -> str:
    if row["peak_bytes"] is None:
        return ""
    return f"{row['peak_bytes'] / 1e6:.0f} ({row['planned_bytes'] / 1e6:.0f})"


def plan_table(record: dict) -> str:
    """Format peaks of steps as measured, with how far their plans are off."""
    rows = []
    for case in record["cases"]:
        cells = [short(case)]
        for row in (case["providers"][OURS], case["providers"]["PEFT"]):
            measured, planned = row["peak_bytes"], row["planned_bytes"]
            cells += [f"{measured / 1e6:.2f}", f"{planned / measured - 1:+.1%}"]
        rows.append(cells)
    return markdown(["MB beyond the model", OURS, "plan", "PEFT", "plan"], rows)


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
    (case,), (answer,) = record["cases"], record["answers"]
    rows, runs, summary = case["providers"], answer["runs"], answer["summary"]
    alone, patched = runs["peft"], runs[OURS]

    def memory(label: str, key: str) -> list[str]:
        less = patched[key] - alone[key]
        mark = "✓" if less < 0 else "✗"
        return [label, f"{alone[key]:.0f}", f"{patched[key]:.0f}", f"{less:+.0f} ({mark})"]

    faster = ratio(case, "PEFT")
    losses = [f"{run['final_loss']:.4f}" for run in (alone, patched)]
    apart = f"curves part by {summary['loss_mean_rel_diff']:.1e} on average, at most "
    mark = "✓" if faster > 1 else "✗"
    cells = [
        ["step, ms", timing(rows["PEFT"]), timing(rows[OURS]), f"**{faster:.2f}x** ({mark})"],
        memory("peak process memory, MB", "resident_peak_mb"),
        memory("peak tensors in a step, MB", "tensor_peak_mb"),
        ["final loss", *losses, apart + f"{summary['loss_max_rel_diff']:.1e}"],
    ]
    return markdown(["", "PEFT", "PEFT + peftkern", ""], cells)


def heading(stem: str, record: dict) -> str:
    """Format the heading: stem, machine and versions."""
    facts, size = record["environment"], record["options"]
    gpu = facts["gpu"]
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v)
    text = f"**{TITLES[stem]}**"
    if stem == "demo":
        text += f" ({size['steps']} steps, {size['batch']}x{size['seq']} tokens)"
    elif gpu:
        text += f" (r={size['r']})"
    elif stem not in NAMES_SAY_SIZES:
        text += f" ({size['n']}x{size['k']}, r={size['r']})"
    where = f"{facts['cpu']}, {facts['threads']} threads, {facts['isa']}"
    if gpu:
        where = f"{gpu['name']}, CUDA {gpu['cuda']}"
    return f"{text}. {where}; commit {facts['commit']}, {facts['date'][:10]}; {versions}."


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
        groups.setdefault(tuple(case["providers"]), []).append(case)
    return list(groups.values())


def tables(stem: str, record: dict) -> list[str]:
    if stem == "demo":
        return [demo_table(record)]
    if stem == "plan":
        return [plan_table(record)]
    if stem == "formulations":
        found = [cases_table({**record, "cases": cases}) for cases in alike(record["cases"])]
        decoders = [answer for answer in record["answers"] if "decoders" in answer]
        return [*found, *([decoders_table(decoders)] if decoders else [])]
    if stem != "e2e":
        return [cases_table(record)]
    found = [steps_table(record)] if record["cases"] else []
    return [*found, *([answers_table(record["answers"])] if record["answers"] else [])]
