"""Command `peftkern bench`: a table of this machine against the installed peers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftkern.cli.frame import InputError, bad_input

# Options that apply even if nothing is measured.
WITH_FROM = ("from_", "csv", "html", "compare", "fail_if", "repro")


def bench(
    context: typer.Context,
    op: Annotated[
        str,
        typer.Option(
            help="one or more of nf4_lora_linear, lora_linear, nf4_linear, nf4_dequantize,"
            " nf4_quantize, dora_linear, nf4_dora_linear, rosa_forward, rosa_sddmm; of as many"
            " layers as M says: low_rank_svd, low_rank_svdvals, adalora_update,"
            " adalora_orthogonality; or grouped_linear, the layers of experts"
        ),
    ] = "nf4_dequantize,nf4_lora_linear,lora_linear",  # the cheapest first
    shapes: Annotated[
        str | None,
        typer.Option(
            help="llama3-8b, llama2-7b, qwen2.5-7b, llama-65b, ...: their linear layers, or one of"
            " them (llama3-8b-q_proj); MxNxK: M rows, a weight [N, K]; of grouped_linear"
            " qwen3-30b-a3b, mixtral-8x7b, gpt-oss-20b, deepseek-v3, or MxNxKxE: E weights",
            show_default="llama3-8b-q_proj, on a GPU llama3-8b; 256x512x512x32, qwen3-30b-a3b",
        ),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            help="rows of activations for presets",
            show_default="256, on a GPU 4096; 1 with no-grad",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32")] = "bf16",
    mode: Annotated[
        str | None,
        typer.Option(
            help="forward, backward, full (both), no-grad (inference), memory (its peak alone)",
            show_default="full; forward for what has no gradients",
        ),
    ] = None,
    r: Annotated[str, typer.Option("--r", help="LoRA rank")] = "16",
    baselines: Annotated[
        str,
        typer.Option(
            help="auto: what is installed; or of frozen, peft, grouped_mm, composed (torch's own"
            " operators), bitsandbytes, compile, torch, unsloth, liger, module:function"
        ),
    ] = "auto",
    budget: Annotated[str, typer.Option(help="how long the whole run may take: 60s, 5m")] = "60s",
    seconds: Annotated[
        str, typer.Option(help="time to measure each implementation of a case, at most")
    ] = "1.5s",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda", show_default="cuda if there is one")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="threads of a CPU", show_default="all cores")
    ] = None,
    seed: Annotated[int, typer.Option(help="what weights and inputs are drawn from")] = 0,
    json: Annotated[Path | None, typer.Option(help="write everything measured here")] = None,
    csv: Annotated[Path | None, typer.Option(help="write a line per case and provider")] = None,
    html: Annotated[
        Path | None, typer.Option(help="write a report, one file for a browser")
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option("--from", help="measure nothing: show this earlier --json, write its files"),
    ] = None,
    compare: Annotated[Path | None, typer.Option(help="an earlier --json to compare with")] = None,
    fail_if: Annotated[
        str | None,
        typer.Option(
            help="with --compare: exit 1 if a case became slower by more", show_default="5%"
        ),
    ] = None,
    repro: Annotated[bool, typer.Option(help="print how to measure each case again")] = False,
) -> None:
    """Measure peftkern beside the peers installed here: in a minute, every result checked first.

    Lists take commas. Each implementation runs in a process of its own, on the same weights and
    inputs; a wrong result shows WRONG and no time, a crash FAILED. Exit status 1: peftkern was
    wrong or failed, nothing was measured, or --compare found a case slower.

    Example: peftkern bench --shapes llama3-8b --dtype bf16 --budget 5m --json new.json
    """
    from peftkern.tools.bench import command, record

    with bad_input():
        given = {name: value for name, value in context.params.items() if name != "from_"}
        options = command.Options(**given)
        if from_ is not None:
            _refuse_others(context)
            earlier = record.read(from_)
            outputs = command.outputs(options, {case["name"] for case in earlier["cases"]})
        else:
            plan = command.plan(options)
    try:
        status = command.execute(plan) if from_ is None else command.tell(earlier, outputs)
    except command.BenchError as error:
        raise InputError(str(error)) from error
    raise typer.Exit(status)


def _refuse_others(context: typer.Context) -> None:
    """Refuse options that would only decide what is measured."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name)
        if parameter.name not in WITH_FROM and source is not None and source.name == "COMMANDLINE":
            raise ValueError(
                f"--from: measures nothing, so that {parameter.opts[0]} has no effect; accepted"
                " with it: --csv, --html, --compare, --fail-if, --repro"
            )
