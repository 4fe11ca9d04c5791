"""Command `peftkern plan MODEL`: the memory of a fine-tune, by part and by phase."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from peftkern.tools.plan.plan import Plan, Training
    from peftkern.tools.plan.rates import Rates

DOES_NOT_FIT = 1
_PHASES = {
    "forward": "forward pass",
    "backward": "backward pass",
    "optimizer": "optimizer's step",
}
_MODEL = "A preset (llama3-8b, llama-65b, qwen2.5-7b, ...), a config.json, or the folder of one."


def plan(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help=_MODEL)],
    method: Annotated[str, typer.Option(help="lora, qlora, adalora, dora or full.")] = "lora",
    r: Annotated[int, typer.Option("--r", help="Rank of the adapters.")] = 16,
    targets: Annotated[
        str, typer.Option(help="all-linear, experts too, or names such as q_proj,v_proj.")
    ] = "all-linear",
    base: Annotated[
        str | None,
        typer.Option(
            help="Frozen layers: bf16, fp32, nf4 (qlora's default), fp4, mxfp4, nvfp4 or int4.",
        ),
    ] = None,
    blocksize: Annotated[
        int | None, typer.Option(help="Values in a block: of int4 32, 64, 128 or 256.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Activations and what is not quantized: bf16 or fp32.")
    ] = "bf16",
    double_quant: Annotated[
        bool, typer.Option(help="absmax of nf4 and fp4 in 8 bits, not 32.")
    ] = True,
    adapter_dtype: Annotated[str, typer.Option(help="fp32 (PEFT's default) or bf16.")] = "fp32",
    optimizer: Annotated[
        str,
        typer.Option(help="adamw, adamw-32bit, adamw-8bit, paged-adamw, paged-adamw-8bit or sgd."),
    ] = "adamw",
    batch: Annotated[int, typer.Option(help="Sequences in a step.")] = 1,
    sequence: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 2048,
    checkpointing: Annotated[
        bool, typer.Option(help="Gradient checkpointing of every layer.")
    ] = True,
    attention: Annotated[str, typer.Option(help="sdpa or eager.")] = "sdpa",
    dropout: Annotated[float, typer.Option(help="lora_dropout.")] = 0.0,
    adapter: Annotated[
        Path | None,
        typer.Option(help="adapter_config.json in the place of --r, --targets, --dropout."),
    ] = None,
    autocast: Annotated[bool, typer.Option(help="Under torch.autocast in bf16.")] = False,
    prepare_kbit: Annotated[
        bool, typer.Option(help="After PEFT's prepare_model_for_kbit_training.")
    ] = False,
    patched: Annotated[bool, typer.Option(help="After peftkern.patch, or PEFT alone.")] = True,
    device: Annotated[str, typer.Option(help="To train on: cuda or cpu.")] = "cuda",
    target_r: Annotated[
        int | None,
        typer.Option(
            help="AdaLoRA's budget, triplets of a layer: what compaction to it brings.",
        ),
    ] = None,
    devices: Annotated[int, typer.Option(help="Devices that share the model by --shard.")] = 1,
    shard: Annotated[
        str | None, typer.Option(help="ddp, fsdp2 (a unit for each layer) or zero3 (DeepSpeed).")
    ] = None,
    reshard: Annotated[
        bool, typer.Option(help="fsdp2: free layers after forward, gather them again.")
    ] = True,
    param_dtype: Annotated[
        str | None, typer.Option(help="fsdp2: dtype to gather and compute in, bf16 or fp32.")
    ] = None,
    reduce_dtype: Annotated[
        str | None, typer.Option(help="fsdp2: dtype to reduce gradients in, bf16 or fp32.")
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(help="Memory of a device, 48GB or 48GiB: does it fit, what would?"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: bytes.")] = False,
) -> None:
    """Count the memory of a fine-tune before it is run: by part, at the peak of each phase.

    It needs neither the weights nor a GPU. With --fit also the largest batch and sequence that fit;
    exit status 1 if this one does not. With --target-r also what AdaLoRA's compaction brings; on
    the device that is here its rates are measured for that, in some seconds. With --devices and
    --shard it is the memory of each device, whose --batch is its own, and what they communicate.

    Example: peftkern plan llama-65b --method qlora --sequence 512 --fit 48GB

    On eight devices: peftkern plan llama3-70b --devices 8 --shard fsdp2 --fit 80GB
    """
    from peftkern.cli.frame import bad_input, dtype_name, parse_bytes, refuse_useless
    from peftkern.tools import tables
    from peftkern.tools.plan import plan as planning

    if adapter is not None:
        useless = ("r", "targets", "dropout")
        refuse_useless(context, lambda name: name in useless, "{}: has no effect with --adapter")
    budget = None if fit is None else parse_bytes("--fit", fit)
    if base is not None:
        base = dtype_name("--base", base, planning.ACCEPTED["base"])
    names = [name.strip() for name in targets.split(",") if name.strip()]
    options = [option.name for option in fields(planning.Training)]
    dtypes = planning.ACCEPTED["dtype"]
    with bad_input(*options):
        given = {name: context.params[name] for name in options} | {
            "targets": tuple(names),
            "base": base,
            "adapter": None if adapter is None else _read_adapter(adapter),
            "dtype": dtype_name("--dtype", dtype, dtypes),
            "adapter_dtype": dtype_name("--adapter-dtype", adapter_dtype, dtypes),
            "param_dtype": param_dtype and dtype_name("--param-dtype", param_dtype, dtypes),
            "reduce_dtype": reduce_dtype and dtype_name("--reduce-dtype", reduce_dtype, dtypes),
        }
        training = planning.Training(**given)
        config = planning.read_model(model)
        planner = planning.Planner(config, training)
        found = planner.plan()
    after = rates = None
    if target_r is not None:
        from peftkern.tools.plan.rates import measured

        after, rates = planner.compacted(), measured(training.device, training.dtype)
    fitting = None
    if budget is not None:
        fitting = {
            "budget": budget,
            "fits": found.peak <= budget,
            **{f"largest_{name}": planner.largest(name, budget) for name in ("batch", "sequence")},
        }
    if as_json:
        report = {
            "model": {"name": model, "config": json.loads(config.to_json_string())},
            "training": asdict(training),
            "plan": found.as_dict(),
            "fit": fitting,
            **({} if after is None else {"compaction": _compaction(after, rates)}),
        }
        print(json.dumps(report, indent=2))
    else:
        console = tables.console()
        _print(console, model, training, found, fitting)
        if after is not None:
            _print_compaction(console, training, after, rates)
    if fitting is not None and not fitting["fits"]:
        raise typer.Exit(DOES_NOT_FIT)


def _read_adapter(path: Path) -> dict:
    """Read a PEFT config, or that in a folder."""
    from peftkern.formats.json_files import read_json

    found = read_json(path / "adapter_config.json" if path.is_dir() else path)
    if not isinstance(found, dict) or "peft_type" not in found:
        raise ValueError(f"adapter: {path}: expected a PEFT config with a peft_type")
    return found


def _compaction(after: tuple[Plan, Plan], rates: Rates | None) -> dict:
    """Return the plans of a model that is pruned and of the same compacted."""
    found = {}
    for name, plan in zip(("pruned", "compacted"), after, strict=True):
        found[name] = plan.as_dict()
        if rates is not None:
            found[name]["seconds"] = plan.work.seconds(rates)
    return found


def _print_compaction(
    console: Console, training: Training, after: tuple[Plan, Plan], rates: Rates | None
) -> None:
    from peftkern.tools import tables

    rows = {"trained parameters, million": [plan.trainable / 1e6 for plan in after]}
    for part in ("adapters", "optimizer states"):
        rows[f"{part}, MB"] = [plan.fixed.get(part, 0) / 1e6 for plan in after]
    rows["gradients, MB"] = [plan.phases["optimizer"]["gradients"] / 1e6 for plan in after]
    rows["peak, MB"] = [plan.peak / 1e6 for plan in after]
    rows["products of a step, GFLOP"] = [plan.work.flops / 1e9 for plan in after]
    rows["read and written, GB"] = [plan.work.nbytes / 1e9 for plan in after]
    if rates is not None:
        rows["a step at least, ms"] = [plan.work.seconds(rates) * 1e3 for plan in after]
    table = _table(console, "pruned", "compacted", "falls by")
    for name, (pruned, compacted) in rows.items():
        share = 1 - compacted / pruned if pruned else 0.0
        table.add_row(name, f"{pruned:.4g}", f"{compacted:.4g}", f"{share:.1%}")
    text = f"AdaLoRA after its last mask, pruned to {training.target_r} of {training.init_r}"
    text += " triplets a layer, and compacted:"
    tables.say(console, text)
    console.print(table)
    if rates is not None:
        text = f"Each op at {rates}, whichever takes longer, as measured here; what starts an op"
        tables.say(console, f"{text} comes on top.")


def _print(
    console: Console, name: str, training: Training, found: Plan, fitting: dict | None
) -> None:
    from peftkern.tools import tables

    unit, size = ("GB", 1e9) if found.peak >= 1e9 else ("MB", 1e6)

    def number(nbytes: int) -> str:
        return f"{nbytes / size:.2f}" if nbytes else "-"

    tables.say(console, _describe(name, training, found))
    phases = list(found.phases)
    table = _table(console, *phases)
    for part, nbytes in found.fixed.items():
        if nbytes:
            table.add_row(part, *[number(nbytes)] * len(phases))
    table.add_section()
    for part in found.phases[phases[0]]:
        values = [found.phases[phase][part] for phase in phases]
        if any(values):
            table.add_row(part, *map(number, values))
    table.add_section()
    table.add_row("total", *[number(found.totals[phase]) for phase in phases], style="bold")
    shared = f", on each of {training.devices} devices" if training.shard else ""
    tables.say(console, f"{unit} at the peak of each phase of a step{shared}:")
    console.print(table)
    if training.shard:
        _print_communication(console, training, found)
    peak = f"{found.peak / 1e9:.2f} GB = {found.peak / 2**30:.2f} GiB"
    if found.peak < 1e9:
        peak = f"{found.peak / 1e6:.2f} MB = {found.peak / 2**20:.2f} MiB"
    tables.say(console, f"peak {peak}, in the {_PHASES[found.peak_phase]}")
    if fitting is not None:
        tables.say(console, _verdict(training, found, fitting))
    tables.say(console, _caveat(training))


def _print_communication(console: Console, training: Training, found: Plan) -> None:
    """Print what the devices of a plan send each other."""
    from peftkern.tools import tables

    rows = {name: one for name, one in found.communication.items() if one["bytes"]}
    largest = max((one["bytes"] for one in rows.values()), default=0)
    unit, size = ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6)
    table = _table(console, f"size, {unit}", f"a device sends, {unit}")
    for name, one in rows.items():
        table.add_row(name, *(f"{one[key] / size:.2f}" for key in ("bytes", "sent")))
    table.add_section()
    total = sum(one["sent"] for one in rows.values())
    table.add_row("total", "", f"{total / size:.2f}", style="bold")
    text = f"Communicated in a step by {training.shard}, as a ring does: (N - 1) / N of what is"
    text += " gathered or scattered, 2 (N - 1) / N of what is all-reduced, and as much received:"
    tables.say(console, text)
    console.print(table)


def _table(console: Console, *headings: str) -> Table:
    """Build a table of numbers beside names; on a narrow terminal without lines and with one space
    between columns, so that no word breaks at 40."""
    from rich import box
    from rich.table import Table

    from peftkern.tools.tables import NARROW

    narrow = console.width < NARROW
    lines = None if narrow else box.HEAVY_HEAD
    table = Table(box=lines, pad_edge=not narrow, collapse_padding=narrow)
    table.add_column(overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    return table


def _describe(name: str, training: Training, found: Plan) -> str:
    text = f"{name}: {_count(found.parameters)} parameters, {_count(found.trainable)} trained. "
    if training.adapter is not None:
        text += f"adapters of the given config in {training.adapter_dtype}"
    elif training.method == "full":
        text += "full"
    else:
        text += f"{training.method} r={training.r} on {', '.join(training.targets)}"
        text += f", adapters {training.adapter_dtype}"
    nested = training.of_bitsandbytes and training.double_quant
    quantized = f" in blocks of {training.blocks}" if training.quantized else ""
    quantized += ", double-quantized" if nested else ""
    text += f", base {training.base}{quantized}, activations {training.dtype}"
    text += f", {training.optimizer}, batch {training.batch}, sequence {training.sequence}"
    if training.shard:
        text += f" on each of {training.devices} devices by {training.shard}"
        text += "" if training.reshard else " that keeps layers whole"
        text += f", gathered in {training.param_dtype}" if training.param_dtype else ""
        text += f", reduced in {training.reduce_dtype}" if training.reduce_dtype else ""
    text += ", checkpointing" if training.checkpointing else ", no checkpointing"
    text += f", {training.attention} attention, {training.device}"
    if training.method != "full":
        text += ", patched by peftkern" if training.patched else ", PEFT alone"
    text += ", autocast" if training.autocast else ""
    return text + (", prepared for k-bit training" if training.prepare_kbit else "")


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} billion" if n >= 1e9 else f"{n / 1e6:.2f} million"


def _verdict(training: Training, found: Plan, fitting: dict) -> str:
    budget = fitting["budget"]
    unit, size = ("GB", 1e9) if budget >= 1e9 else ("MB", 1e6)
    left = (budget - found.peak) / size
    text = f"{'fits' if fitting['fits'] else 'DOES NOT FIT'} {budget / size:.2f} {unit}: "
    text += f"{left:.2f} {unit} left" if fitting["fits"] else f"{-left:.2f} {unit} too much"
    batch, sequence = fitting["largest_batch"], fitting["largest_sequence"]
    text += f"; largest batch at sequence {training.sequence}: {batch or 'none'}"
    return text + f"; longest sequence at batch {training.batch}: {sequence or 'none'}"


def _caveat(training: Training) -> str:
    if training.device == "cpu":
        text = "Bytes of tensors; oneDNN's scratch and native code's come on top."
    else:
        text = "Bytes of tensors, counted, not measured on a GPU: the CUDA context, cuBLAS'"
        text += " workspaces and fragmentation come on top."
    if training.optimizer.startswith("paged"):
        text += " Paged optimizer states may move to the host's memory."
    return text
