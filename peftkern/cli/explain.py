"""Command `peftkern explain`: the back end that would serve a call, and refusals of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from peftkern.cli.options import Json

if TYPE_CHECKING:
    from peftkern.backends.dispatch import Explanation


def explain(
    op: Annotated[str, typer.Argument(help="A function or an op, such as nf4_lora_linear.")],
    shape: Annotated[
        str, typer.Argument(help="MxNxK: M rows, a weight [N, K]; NxK for what has no rows.")
    ],
    dtype: Annotated[
        str, typer.Option(help="Of x and the weight: bf16, fp16, fp32 or fp64.")
    ] = "bf16",
    r: Annotated[int, typer.Option("--r", help="Rank of the adapter.")] = 16,
    adapter_dtype: Annotated[
        str, typer.Option(help="Of lora_A and lora_B, the same names.")
    ] = "fp32",
    mode: Annotated[str, typer.Option(help="forward, backward, full or no-grad.")] = "full",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N.", show_default="cuda if there is one")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say which back end would serve a call of this size, and why not the others.

    Nothing is computed, and no memory of that size is taken.

    Example: peftkern explain nf4_lora_linear 16x4096x4096 --dtype bf16 --r 16
    """
    import json

    from peftkern.cli.frame import bad_input, dtype_name, present_device
    from peftkern.tools.doctor import sample_calls

    dtype = dtype_name("--dtype", dtype, tuple(sample_calls.DTYPES))
    adapter_dtype = dtype_name("--adapter-dtype", adapter_dtype, tuple(sample_calls.DTYPES))
    place = present_device(device)
    with bad_input("r", "mode"):
        sample = sample_calls.sample_of(
            op,
            shape,
            r=r,
            dtype=sample_calls.DTYPES[dtype],
            factors=sample_calls.DTYPES[adapter_dtype],
            device=place,
        )
        explanation = sample_calls.explain(op, sample, mode)
    note = None
    if op == "lora_linear" and place.type == "cpu" and sample_calls.is_small(sample):
        note = (
            "In a model that peftkern.patch has patched, a dense layer this small stays with "
            "PEFT's own operations on a CPU, which are as fast."
        )
    if as_json:
        answer = {
            "op": op,
            "shape": shape,
            "dtype": dtype,
            "r": r,
            "adapter_dtype": adapter_dtype,
            "mode": mode,
            "device": str(place),
            **explanation.as_dict(),
            "note": note,
        }
        print(json.dumps(answer, indent=2))
        return
    _print(f"{op} {shape} {dtype}, rank {r} {adapter_dtype}, on {place}", explanation, note)


def _print(title: str, explanation: Explanation, note: str | None) -> None:
    from peftkern.tools import tables

    console = tables.console()
    shown, last = tables.table("op", "back end", "verdict", whole=2), None
    for op, backend, verdict in explanation.rows:
        style = "bold green" if verdict == "chosen" else None
        shown.add_row("" if op == last else op, backend, verdict, style=style)
        last = op
    console.print(title, style="bold")
    tables.show(console, shown)
    console.print(explanation.machine)
    if note:
        console.print(note)
