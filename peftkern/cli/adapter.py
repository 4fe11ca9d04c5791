"""Commands `peftkern adapter ...`: LoRA adapters looked at, checked, changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftkern.cli.adapter_algebra import combine, extract, resize
from peftkern.cli.adapter_convert import convert
from peftkern.cli.frame import (
    InputError,
    add_commands,
    bad_input,
    check_page,
    read_adapter,
    write_page,
)
from peftkern.cli.options import Html, Json

FAILED = 1  # exit status of a check that did not pass
Source = Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder or safetensors file.")]
Layout = Annotated[
    str | None,
    typer.Option(
        help="Of experts, where the file does not tell: peft, peft-old-moe, unsloth or "
        "unsloth-old-moe."
    ),
]

app = typer.Typer(
    name="adapter",
    help="LoRA adapters: look into them, check them, change them.",
    no_args_is_help=True,
)


def inspect(
    adapter: Source,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="A row for each layer.")] = False,
    experts: Annotated[
        bool, typer.Option("--experts", help="A row for each expert of a stack, too.")
    ] = False,
    layout: Layout = None,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Show what is in an adapter: the spectrum of each update, and what its file and config tell.

    |D| is the Frobenius norm of an update scaling * B A. true: its rank; stable: |D|^2 over its
    largest singular value squared; effective: exp of the entropy of its singular values.

    Example: peftkern adapter inspect my-adapter --html my-adapter.html
    """
    import json

    from peftkern.tools.adapters import inspect, terminal

    check_page("--html", html)
    found = inspect.inspect(read_adapter(adapter, layout))
    if html is not None:
        from peftkern.tools.adapters import page

        write_page(html, page.html(found))
    if as_json:
        print(json.dumps(found.as_dict(), indent=2, allow_nan=False))
    else:
        terminal.show(found, per_layer, experts)


def verify(
    adapter: Source,
    base: Annotated[
        Path | None, typer.Option(help="Folder of the model it is for, in safetensors.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="An adapter whose updates should be the same.")
    ] = None,
    tol: Annotated[
        float, typer.Option(help="Largest difference of an update, relative to its norm.")
    ] = 1e-6,
    layout: Layout = None,
    as_json: Json = False,
) -> None:
    """Check an adapter: its keys, shapes and numbers, a base that it fits, another that is equal.

    Exit status 1 if a check fails, 2 if the adapter cannot be read at all.

    Example: peftkern adapter verify my-adapter --base ~/models/llama3-8b
    """
    import json

    from peftkern.tools.adapters import verify

    if not tol >= 0:
        raise InputError(f"--tol: expected a number from 0 on, got {tol}")
    ours = read_adapter(adapter, layout)
    other = None if against is None else read_adapter(against, layout)
    with bad_input():
        checks = verify.verify(ours, base=base, against=other, tol=tol)
    if as_json:
        print(json.dumps([check._asdict() for check in checks], indent=2))
    else:
        for check in checks:
            print(f"{'ok' if check.passed else 'FAILED'}: {check.name}: {check.detail}")
    if not all(check.passed for check in checks):
        raise typer.Exit(FAILED)


add_commands(app, inspect, verify, resize, combine, extract, convert)
