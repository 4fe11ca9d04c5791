"""Handling of input and output shared by the commands: errors, dtypes, sizes, files."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    import torch

    from peftkern.tools.adapters import Adapter

EXIT_BAD_INPUT = 2
# The name in help and output, and the full name, which is accepted, too.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def add_commands(app: typer.Typer, *commands: Callable[..., None]) -> None:
    """Make commands of functions, their docstrings without line breaks, which typer would keep."""
    for command in commands:
        help = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(command.__doc__))
        app.command(help=help)(command)


class InputError(Exception):
    """Unusable input; the message states what came and what is accepted."""


class Stopped(Exception):
    """Ctrl-C, with the line to tell about it."""


@contextlib.contextmanager
def bad_input(*options: str) -> Iterator[None]:
    """Turn a ValueError or OSError about the user's input into an InputError. Wrap nothing more:
    the same error from elsewhere is a defect and keeps its traceback.

    options: arguments of the library that are options here; a message about one names it as such.
    """
    try:
        yield
    except OSError as error:
        file = error.filename if error.strerror else None
        raise InputError(f"{file}: {error.strerror}" if file else str(error)) from error
    except ValueError as error:
        raise InputError(in_words(error, *options)) from error


def in_words(error: ValueError, *options: str) -> str:
    """Return an error's message in one line: "--adapter-dtype: ..." of "adapter_dtype: ..."."""
    message = " ".join(str(error).split())
    name, colon, rest = message.partition(":")
    return f"--{name.replace('_', '-')}:{rest}" if colon and name in options else message


@contextlib.contextmanager
def checkpoint_run(destination: Path | None, *options: str) -> Iterator[None]:
    """Turn what can go wrong with checkpoints into an InputError, and say whether the run can be
    repeated. options: as for `bad_input`."""
    from peftkern.tools.checkpoints.checkpoint import CheckpointError
    from peftkern.tools.checkpoints.staging import WORK

    def resumable() -> bool:
        return destination is not None and os.path.exists(destination / WORK)

    try:
        yield
    except CheckpointError as error:
        raise InputError(in_words(error, *options)) from error
    except OSError as error:  # a full disk, an unreadable file
        hint = "; the same command goes on from there" if resumable() else ""
        raise InputError(f"{error}{hint}") from error
    except KeyboardInterrupt:
        if resumable():
            raise Stopped("stopped; the same command goes on from here") from None
        raise


@contextlib.contextmanager
def progress_bar(total: int, what: str = "") -> Iterator[Callable[..., None]]:
    """Show a bar on a terminal; yield what takes how many were finished, and the name of the last.

    what: is counted; bytes without it.
    """
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    count = progress.MofNCompleteColumn() if what else progress.DownloadColumn()
    text = progress.TextColumn("{task.description}", markup=False)
    columns = (text, progress.BarColumn(), count, progress.TimeRemainingColumn())
    silent = not console.is_terminal
    with progress.Progress(*columns, console=console, transient=True, disable=silent) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, name=what: bar.update(task, advance=done, description=name)


@contextlib.contextmanager
def model_packages() -> Iterator[None]:
    """Turn the absence of a package without which no model can be loaded into an InputError."""
    try:
        yield
    except ImportError as error:
        raise InputError(
            "expected peft, transformers 5 or newer, accelerate and bitsandbytes: "
            f"pip install -U 'peftkern[peft]' ({error})"
        ) from None


def read_adapter(path: Path, layout: str | None = None) -> Adapter:
    """Read an adapter that an argument names. Raises: InputError in one line."""
    from peftkern.tools import adapters
    from peftkern.tools.adapters.experts import LAYOUTS

    if layout is not None and layout not in LAYOUTS:
        raise InputError(f"--layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    with bad_input():
        return adapters.read_adapter(path, expert_layout=layout)


def check_page(option: str, path: Path | None) -> None:
    """Check, before anything is computed, that a page or chart can be drawn and written there.

    Raises: InputError.
    """
    if path is not None:
        from peftkern.tools import pages
        from peftkern.tools.bench import machine

        with bad_input():
            machine.check_target(option, path)
            pages.require(option)


def refuse_useless(context: typer.Context, useless: Callable[[str], bool], why: str) -> None:
    """Refuse options that have no effect. Raises: InputError with `why` about the first of them."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name)
        if useless(parameter.name) and source is not None and source.name == "COMMANDLINE":
            raise InputError(why.format(parameter.opts[0]))


def write_page(path: Path, text: str) -> None:
    from peftkern.tools.bench import machine

    with bad_input():  # a full disk
        machine.write_text(path, text)


def weighted_adapter(text: str) -> tuple[Path, float]:
    """Split "folder:0.5"; a path that exists with its colon is a path, of weight 1.

    Raises: InputError.
    """
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    number = re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", weight, re.ASCII | re.IGNORECASE)
    if number is None or not math.isfinite(float(weight)):
        raise InputError(f"{text}: expected ADAPTER or ADAPTER:WEIGHT, with a finite number")
    return Path(path), float(weight)


def dtype_name(option: str, text: str, accepted: Sequence[str]) -> str:
    """Return "bf16" of bf16 or bfloat16.

    Raises: InputError if it is none of `accepted`.
    """
    short = {name: short for short, name in DTYPES.items()}.get(text, text)
    if short not in accepted:
        raise InputError(f"{option}: expected one of {', '.join(accepted)}, got {text!r}")
    return short


def present_device(text: str | None) -> torch.device:
    """Return the device that --device names; without it a GPU if there is one, else the CPU.

    Raises: InputError if it is not present.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text is None:
        return torch.device("cuda" if count else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", text, re.ASCII):
        raise InputError(f"--device: expected cpu, cuda or cuda:N, got {text!r}")
    if text != "cpu" and not count:
        raise InputError(f"--device {text}: torch {torch.__version__} sees no GPU on this machine")
    device = torch.device(text)
    if (device.index or 0) >= max(count, 1):
        raise InputError(f"--device {text}: expected one of {count} GPUs, numbered from 0")
    return device


def parse_bytes(option: str, text: str) -> int:
    """Parse "48GB" as 48 * 10^9 bytes, "48GiB" as 48 * 2^30; case does not matter.

    Raises: InputError stating what is accepted.
    """
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,12})?) *([KMGT]I?B)", text.strip().upper(), re.ASCII)
    count = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if not count:
        raise InputError(
            f"{option}: expected a size like 48GB (10^9) or 48GiB (2^30), got {text!r}"
        )
    return count
