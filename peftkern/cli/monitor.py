"""Command `peftkern monitor`: a recorded run, finished or not, or two of them compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftkern.cli.options import Html


def monitor(
    run: Annotated[Path, typer.Argument(help="JSONL file of a TrainingMonitor or callback.")],
    other: Annotated[
        Path | None, typer.Argument(help="One to compare with it.", show_default=False)
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on while the file grows, until Ctrl-C.")
    ] = False,
    html: Html = None,
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

    from peftkern.cli.frame import InputError, bad_input, check_page, write_page
    from peftkern.tools.monitor import terminal
    from peftkern.tools.monitor.run import Run
    from peftkern.tools.monitor.summary import compare, summary

    files = {"--html": html, "--svg": svg}
    files = {option: path for option, path in files.items() if path is not None}
    if follow and (as_json or files):
        raise InputError("--follow: accepted without --html, --svg and --json")
    for option, path in files.items():
        check_page(option, path)
    runs = [Run(path) for path in (run, other) if path is not None]
    with bad_input(), contextlib.suppress(KeyboardInterrupt):
        for one in runs:
            one.read()
        if follow:
            terminal.follow(runs)
            return
    for option, path in files.items():
        from peftkern.tools.monitor import page

        write_page(path, {"--html": page.html, "--svg": page.svg}[option](runs))
    if as_json:
        answer = {"runs": [summary(one) for one in runs]}
        answer["comparison"] = compare(*runs) if runs[1:] else None
        print(json.dumps(answer, indent=2, allow_nan=False))
    else:
        terminal.show(runs)
