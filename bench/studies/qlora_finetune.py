"""QLoRA fine-tuning on the CPU, once with PEFT alone and once with peftkern.

A Llama-architecture transformers model with bitsandbytes 4-bit linears (NF4, double
quantization) and PEFT adapters learns real text. Both runs get the same weights, batches and
seeds; each lives in its own process, so that peak memory is that run's own, and the two take
turns of a few steps, so that a busy machine slows both alike.

    python bench/studies/qlora_finetune.py                      # random weights, nothing downloaded
    python bench/studies/qlora_finetune.py --model ./my-llama   # a local model and its tokenizer
    python bench/studies/qlora_finetune.py --text notes.txt --steps 400

Exit status: 0, the loss curves agree; 1, they do not, or a run failed; 2, bad input.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qlora_training import WARM_UP, InputError, read_text

TITLES = {"peft": "PEFT", "peftkern": "PEFT + peftkern"}
TURNS = 10  # times each run gets the machine
# The curves agree if they part by no more than this in any of the first 50 steps, and on average
# over all. bf16 training is chaotic: another summation order alone moves a loss by some 1e-3, and a
# late step on an easy batch by more, which is why single late steps are shown but do not decide. A
# wrong gradient leaves this band within a few steps.
AGREE = 1e-2


class Run:
    """Process of one run: it answers requests for steps with losses and times."""

    def __init__(
        self, name: str, options: argparse.Namespace, script: str = "qlora_training.py"
    ) -> None:
        self.name, self.losses, self.seconds = name, [], []
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed in stop()
        path = Path(__file__).with_name(script)
        self.process = subprocess.Popen(
            [sys.executable, str(path), json.dumps({**vars(options), "run": name})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def ask(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            tail = "".join(self.log.readlines()[-25:])
            raise RuntimeError(f"the run with {TITLES[self.name]} failed:\n{tail}")
        message = json.loads(line)
        if "error" in message:
            raise InputError(message["error"])
        return message

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()


def take_turns(runs: list[Run], options: argparse.Namespace) -> dict[str, dict]:
    """Initialize both runs, then train them in turns under a progress bar."""
    from rich import progress

    columns = (
        progress.TextColumn("{task.description:<16}"),
        progress.BarColumn(20),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[state]:<24}"),
        progress.TimeRemainingColumn(),
    )
    results: dict[str, dict] = {}
    with progress.Progress(*columns) as bars:
        bar = {
            run.name: bars.add_task(TITLES[run.name], total=options.steps, state="import and load")
            for run in runs
        }
        for run in runs:  # both initialize concurrently
            results[run.name] = run.answer()["about"]
            bars.update(bar[run.name], state="ready")
        turn = max(1, options.steps // TURNS)
        deadline = time.monotonic() + (options.seconds or math.inf)
        for done in range(0, options.steps, turn):
            if time.monotonic() > deadline:
                bars.console.print(f"stopped after {done} steps: --seconds {options.seconds:g}")
                break
            steps = min(turn, options.steps - done)
            for run in runs:
                run.ask(str(steps))
                for _ in range(steps):
                    answer = run.answer()
                    run.losses.append(answer["loss"])
                    run.seconds.append(answer["seconds"])
                    state = f"loss {answer['loss']:.3f} {answer['seconds'] * 1e3:5.0f} ms/step"
                    bars.update(bar[run.name], advance=1, state=state)
            runs = runs[::-1]  # ABBA: neither always goes first
        for run in runs:
            run.ask("end")
            results[run.name].update(run.answer()["figures"])
            results[run.name].update(losses=run.losses, step_seconds=run.seconds)
    return results


def percentile(samples: list[float], share: float) -> float:
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def compare(results: dict[str, dict]) -> dict:
    """Compare times without the warm-up steps, and the distance of the loss curves."""
    for run in results.values():
        steps = run["step_seconds"]
        timed = steps[min(WARM_UP, len(steps) - 1) :]
        run["step_ms"] = {
            "median": statistics.median(timed) * 1e3,
            "p20": percentile(timed, 0.2) * 1e3,
            "p80": percentile(timed, 0.8) * 1e3,
        }
        run["final_loss"] = statistics.fmean(run["losses"][-10:])
    alone, patched = (results[name] for name in TITLES)
    apart = [abs(a - b) / abs(a) for a, b in zip(alone["losses"], patched["losses"], strict=True)]
    apart = [d if math.isfinite(d) else math.inf for d in apart]
    return {
        "steps": len(apart),
        "speedup": alone["step_ms"]["median"] / patched["step_ms"]["median"],
        "loss_max_rel_diff": max(apart),
        "loss_max_rel_diff_step": apart.index(max(apart)) + 1,
        "loss_max_rel_diff_first_50": max(apart[:50]),
        "loss_mean_rel_diff": statistics.fmean(apart),
        "losses_agree": max(apart[:50]) <= AGREE and statistics.fmean(apart) <= AGREE,
    }


def show(
    options: argparse.Namespace,
    results: dict[str, dict],
    summary: dict,
    titles: dict[str, str],
    of_losses: str = "",
) -> None:
    """Print what was patched, and both runs side by side; of_losses: how their ends compare."""
    from rich.console import Console
    from rich.table import Table

    alone, patched = (results[name] for name in titles)
    tokens, count = options.batch * options.seq, summary["steps"]
    table = Table("", *titles.values(), "")
    for column in table.columns[1:]:
        column.justify = "right"

    def row(label: str, text, change: str = "") -> None:
        table.add_row(label, text(alone), text(patched), change)

    def megabytes(label: str, key: str) -> None:
        row(label, lambda run: f"{run[key]:.0f} MB", f"{patched[key] - alone[key]:+.0f} MB")

    row(
        "step, median [p20-p80]",
        lambda run: "{median:.0f} ms [{p20:.0f}-{p80:.0f}]".format(**run["step_ms"]),
        f"{summary['speedup']:.2f}x",
    )
    row("tokens per second", lambda run: f"{tokens / run['step_ms']['median'] * 1e3:.0f}")
    megabytes("peak process memory", "resident_peak_mb")
    megabytes("peak tensors in a step", "tensor_peak_mb")
    table.add_section()
    for step in sorted({1, count // 4, count // 2, count * 3 // 4, count} - {0}):
        row(f"loss at step {step}", lambda run, i=step - 1: f"{run['losses'][i]:.5f}")
    row("mean of the last 10", lambda run: f"{run['final_loss']:.5f}", of_losses)
    console = Console(highlight=False)
    console.print(f"\n{patched['report']['text']}\n", markup=False)
    console.print(table)
    console.print(f"{patched['stats']}\n", markup=False)


def conclude(summary: dict) -> None:
    """Print whether the loss curves agree, and the speed-up."""
    verdict = "agree" if summary["losses_agree"] else "DO NOT AGREE"
    print(
        f"The loss curves {verdict}: they part by at most {summary['loss_max_rel_diff']:.1e}"
        f" relative (step {summary['loss_max_rel_diff_step']} of {summary['steps']};"
        f" {summary['loss_max_rel_diff_first_50']:.1e} in the first 50 steps),"
        f" by {summary['loss_mean_rel_diff']:.1e} on average."
    )
    print(f"Speed-up of the whole training step: {summary['speedup']:.2f}x")


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def at_least(low, kind=int):
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least {low}")
        return value

    return parse


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n\n")[0], prog="qlora_finetune.py")
    add = parser.add_argument
    add("--steps", type=at_least(1), default=200, help="optimizer steps of each run (200)")
    add("--text", metavar="FILE", help="text to learn (default: Python's language reference)")
    add("--model", metavar="DIR", help="local transformers model (default: random weights)")
    add("--seq", type=at_least(2), default=128, help="tokens per sequence (128)")
    add("--batch", type=at_least(1), default=1, help="sequences per step (1)")
    add("--seed", type=at_least(0), default=0)
    add("--rank", type=at_least(1), default=16, help="LoRA rank (16); alpha is twice the rank")
    add("--dropout", type=at_least(0.0, float), default=0.0, help="LoRA dropout (0, as in PEFT)")
    add("--lr", type=at_least(0.0, float), default=3e-4, help="AdamW's learning rate (3e-4)")
    add("--hidden", type=at_least(64), default=2048, help="width of the random model (2048)")
    add("--layers", type=at_least(1), default=2, help="layers of the random model (2)")
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    add("--seconds", type=at_least(0, float), default=150, help="train no longer (150; 0: no end)")
    add("--json", metavar="FILE", help="write all that was measured to FILE")
    options = parser.parse_args(argv)
    if options.dropout >= 1:
        parser.error(f"argument --dropout: {options.dropout} is not below 1")
    if options.hidden % 64:
        parser.error(f"argument --hidden: {options.hidden} is not a multiple of 64")
    if options.model is not None and not os.path.isfile(os.path.join(options.model, "config.json")):
        parser.error(f"argument --model: no config.json in {options.model}")
    if options.json is not None:
        try:
            open(options.json, "a").close()  # fail now rather than after the training
        except OSError as error:
            parser.error(f"argument --json: {options.json}: {error.strerror}")
    if options.dtype == "auto":
        options.dtype = "bf16" if has_bf16_arithmetic() else "fp32"
    return options


def has_bf16_arithmetic() -> bool:
    """Return whether the CPU has bf16 instructions; emulated products are slower than fp32."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    for package in ("peftkern", "peft", "transformers", "bitsandbytes"):
        if importlib.util.find_spec(package) is None:
            print(f"qlora_finetune.py: error: no {package} here: try `make demo`", file=sys.stderr)
            return 2
    runs: list[Run] = []
    try:
        read_text(options.text)  # fail now rather than after the imports
        model = options.model or f"random Llama, hidden {options.hidden}, layers {options.layers}"
        print(f"{model}: NF4 with double quantization, LoRA r={options.rank}, {options.dtype}")
        print(f"{options.steps} steps of {options.batch}x{options.seq} tokens", flush=True)
        runs.extend(Run(name, options) for name in TITLES)
        results = take_turns(runs, options)
    except InputError as error:
        print(f"qlora_finetune.py: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"qlora_finetune.py: {error}", file=sys.stderr)
        return 1
    finally:
        for run in runs:
            run.stop()
    summary = compare(results)
    show(options, results, summary, TITLES)
    conclude(summary)
    if options.json:
        record = {"options": vars(options), "summary": summary, "runs": results}
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if summary["losses_agree"] else 1


if __name__ == "__main__":
    sys.exit(main())
