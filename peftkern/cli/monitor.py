"""Command `peftkern monitor`: a recorded run, finished or not, or two of them compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from types import ModuleType


def monitor(
    run: Annotated[Path, typer.Argument(help="JSONL file of a TrainingMonitor or callback.")],
    other: Annotated[
        Path | None, typer.Argument(help="One to compare with it.", show_default=False)
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on while the file grows, until Ctrl-C.")
    ] = False,
    svg: Annotated[Path | None, typer.Option(help="Write the charts, one SVG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Show a run that peftkern.monitor records: loss, tokens/s, memory, ranks, kernels, fallbacks.

    The file may still be growing. Of two runs: their curves side by side, medians with the ratio of
    the second to the first, and how far their losses are apart.

    Example: peftkern monitor run.jsonl
    """
    import contextlib
    import json

    from peftkern.cli.frame import InputError, bad_input
    from peftkern.tools.bench.machine import write_text
    from peftkern.tools.monitor import terminal
    from peftkern.tools.monitor.run import Run
    from peftkern.tools.monitor.summary import compare, summary

    if follow and (as_json or svg):
        raise InputError("--follow: accepted without --json and --svg")
    page = _page("--svg", svg)
    runs = [Run(path) for path in (run, other) if path is not None]
    with bad_input(), contextlib.suppress(KeyboardInterrupt):
        for one in runs:
            one.read()
        if follow:
            terminal.follow(runs)
            return
    if svg is not None:
        write_text(svg, page.svg(runs))
    if as_json:
        answer = {"runs": [summary(one) for one in runs]}
        answer["comparison"] = compare(*runs) if runs[1:] else None
        print(json.dumps(answer, indent=2, allow_nan=False))
    else:
        terminal.show(runs)


def _page(option: str, path: Path | None) -> ModuleType | None:
    """Return what draws, if that is wanted, before anything is read.

    Raises: InputError if it cannot draw or the file cannot be one.
    """
    from peftkern.cli.frame import InputError

    if path is None:
        return None
    if not path.parent.is_dir() or (path.exists() and not path.is_file()):
        raise InputError(f"{option}: {path}: expected a file in a folder that is there")
    try:
        from peftkern.tools.monitor import page
    except ModuleNotFoundError as error:
        raise InputError(f"{option}: needs `pip install 'peftkern[report]'` ({error})") from error
    return page
