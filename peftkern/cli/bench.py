"""Command `peftkern bench`: a table of this machine against the installed peers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftkern.cli.frame import InputError, bad_input, refuse_useless

# Options that apply even if nothing is measured; of --model alone, and of all but --model.
WITH_FROM = ("from_", "csv", "html", "compare", "fail_if", "repro")
OF_MODEL = ("model", "method", "base", "targets", "batch", "sequence", "layers", "checkpointing")
OF_MODEL += ("steps",)
PANEL = "With --model"
OF_OPS = ("op", "shapes", "rows", "mode", "baselines", "format_", "seconds")
FROM = (
    "--from: measures nothing, so that {} has no effect; accepted with it: --csv, --html,"
    " --compare, --fail-if, --repro"
)


def bench(
    context: typer.Context,
    op: Annotated[
        str,
        typer.Option(
            help="One or more of nf4_lora_linear, lora_linear, nf4_linear, nf4_dequantize,"
            " nf4_quantize, dora_linear, nf4_dora_linear, rosa_forward, rosa_sddmm; of as many"
            " layers as M says: low_rank_svd, low_rank_svdvals, adalora_update,"
            " adalora_orthogonality; or grouped_linear, the layers of experts."
        ),
    ] = "nf4_dequantize,nf4_lora_linear,lora_linear",  # the cheapest first
    shapes: Annotated[
        str | None,
        typer.Option(
            help="llama3-8b, llama2-7b, qwen2.5-7b, llama-65b, ...: their linear layers, or one of"
            " them (llama3-8b-q_proj); MxNxK: M rows, a weight [N, K]; of grouped_linear"
            " qwen3-30b-a3b, mixtral-8x7b, gpt-oss-20b, deepseek-v3, or MxNxKxE: E weights.",
            show_default="llama3-8b-q_proj, on a GPU llama3-8b; 256x512x512x32, qwen3-30b-a3b",
        ),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            help="Rows of activations for presets.",
            show_default="256, on a GPU 4096; 1 with no-grad",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="bf16, fp16, fp32.", show_default="bf16; with --model its own"),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="forward, backward, full (both), no-grad (inference), memory (its peak alone).",
            show_default="full; forward for what has no gradients",
        ),
    ] = None,
    r: Annotated[str, typer.Option("--r", help="LoRA rank.")] = "16",
    baselines: Annotated[
        str,
        typer.Option(
            help="auto: what is installed; or of frozen, peft, grouped_mm, composed (torch's own"
            " operators), bitsandbytes, compile, torch, unsloth, liger, module:function."
        ),
    ] = "auto",
    format_: Annotated[
        str,
        typer.Option("--format", help="Of weights in 4 bits: nf4, fp4, mxfp4, nvfp4, int4."),
    ] = "nf4",
    budget: Annotated[str, typer.Option(help="How long the whole run may take: 60s, 5m.")] = "60s",
    seconds: Annotated[
        str, typer.Option(help="Time to measure each implementation of a case, at most.")
    ] = "1.5s",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda.", show_default="cuda if there is one")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of a CPU.", show_default="all cores")
    ] = None,
    seed: Annotated[int, typer.Option(help="What weights and inputs are drawn from.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write everything measured here.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write a line per case and provider.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a report, one file for a browser.")
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option("--from", help="Measure nothing: show this earlier --json, write its files."),
    ] = None,
    compare: Annotated[Path | None, typer.Option(help="An earlier --json to compare with.")] = None,
    fail_if: Annotated[
        str | None,
        typer.Option(
            help="With --compare: exit 1 if a case became slower by more.", show_default="5%"
        ),
    ] = None,
    repro: Annotated[bool, typer.Option(help="Print how to measure each case again.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="Measure training steps of this model of transformers: its folder, its"
            " config.json, or llama3-8b, ...; random weights where there are none.",
            rich_help_panel=PANEL,
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="lora, adalora, dora.", rich_help_panel=PANEL)
    ] = "lora",
    base: Annotated[
        str | None,
        typer.Option(
            help="Its weights: bf16, fp16, fp32, nf4.",
            show_default="as its config says",
            rich_help_panel=PANEL,
        ),
    ] = None,
    targets: Annotated[
        str,
        typer.Option(
            help="What gets LoRA: all-linear, experts included, or names such as q_proj,v_proj.",
            rich_help_panel=PANEL,
        ),
    ] = "all-linear",
    batch: Annotated[int, typer.Option(help="Sequences of a step.", rich_help_panel=PANEL)] = 1,
    sequence: Annotated[
        int, typer.Option(help="Tokens of a sequence.", rich_help_panel=PANEL)
    ] = 512,
    layers: Annotated[
        int | None,
        typer.Option(
            help="Only so many layers, so that it fits.", show_default="all", rich_help_panel=PANEL
        ),
    ] = None,
    checkpointing: Annotated[
        bool,
        typer.Option("--checkpointing", help="Recompute activations.", rich_help_panel=PANEL),
    ] = False,
    steps: Annotated[int, typer.Option(help="Steps that are timed.", rich_help_panel=PANEL)] = 10,
) -> None:
    """Measure peftkern beside the peers installed here: in a minute, every result checked first.

    Lists take commas. Each implementation runs in a process of its own, on the same weights and
    inputs; a wrong result shows WRONG and no time, a crash FAILED. Exit status 1: peftkern was
    wrong or failed, no case was reached, or --compare found a case slower; 2: bad input, or
    --budget ended before the first case.

    With --model DIR: whole steps (forward, backward, AdamW) of PEFT beside PEFT and peftkern.patch;
    losses that differ by more than rounding errors explain are WRONG.

    Example: peftkern bench --shapes llama3-8b --dtype bf16 --budget 5m --json new.json
    """
    from peftkern.tools.bench import command, record, training_step

    with bad_input():
        given = {name: value for name, value in context.params.items() if name != "from_"}
        own = {name: given.pop(name) for name in OF_MODEL}
        given["format"] = given.pop("format_")
        training = None if model is None else training_step.Options(**own)
        options = command.Options(**given, training=training)
        if from_ is not None:
            refuse_useless(context, lambda name: name not in WITH_FROM, FROM)
            with command.naming("--from"):
                earlier = record.read(from_)
            outputs = command.outputs(options, {case["name"] for case in earlier["cases"]})
        else:
            if model is None:
                refuse_useless(context, lambda name: name in OF_MODEL, "{}: needs --model")
            else:
                refuse_useless(
                    context, lambda name: name in OF_OPS, "{}: has no effect with --model"
                )
            plan = command.plan(options)
    try:
        status = command.execute(plan) if from_ is None else command.tell(earlier, outputs)
    except command.BenchError as error:
        raise InputError(str(error)) from error
    raise typer.Exit(status)
