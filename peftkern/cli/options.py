"""Options that several commands have, and mean the same by."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Certify = Annotated[bool, typer.Option("--certify/--no-certify", help="Bound that excess as well.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda or cuda:N.")]
Force = Annotated[
    bool, typer.Option("--force", help="Replace the checkpoint in DST, or an unfinished run.")
]
ForceAdapter = Annotated[bool, typer.Option("--force", help="Replace the adapter in DST.")]
Html = Annotated[Path | None, typer.Option(help="Write a page, one file for a browser.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Length = Annotated[int, typer.Option(help="Number of tokens to take of each.")]
RsLora = Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank).")]
Seed = Annotated[int, typer.Option(help="Of what is drawn at random.")]
ShardSize = Annotated[str, typer.Option(help="Largest size of a file: 5GB or 500MiB.")]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        help="A linear layer, like q_proj; may be repeated.", show_default="all but the head"
    ),
]
Texts = Annotated[int, typer.Option(help="Number of texts to take.")]
