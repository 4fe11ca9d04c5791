"""Command line, `peftkern COMMAND` or `python -m peftkern COMMAND`.

One module per command, named like it; the work itself is done by a module of the library, whose
imports wait until the command runs. Bad input is one line on stderr and exit status 2.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import sys
from typing import Annotated, Any

import typer

from peftkern.cli import adapter
from peftkern.cli.bench import bench
from peftkern.cli.doctor import doctor
from peftkern.cli.explain import explain
from peftkern.cli.frame import EXIT_BAD_INPUT, InputError, Stopped, add_commands
from peftkern.cli.init import init
from peftkern.cli.merge import merge
from peftkern.cli.monitor import monitor
from peftkern.cli.plan import plan
from peftkern.cli.quantize import quantize
from peftkern.cli.ranks import ranks
from peftkern.cli.tune import tune

EXIT_STOPPED = 130
EXIT_PIPE = 1  # as typer's
_UNWRITABLE = {errno.EPIPE, errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO}
_EXTRA = {"peft", "transformers", "accelerate", "bitsandbytes"}
# click's, which typer vendors under another name or imports, depending on its version.
_UsageError: type[Exception] = typer.BadParameter.__base__

app = typer.Typer(
    name="peftkern",
    help="Kernels for parameter-efficient fine-tuning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(adapter.app)
add_commands(app, bench, doctor, explain, init, merge, monitor, plan, quantize, ranks, tune)


@app.command()
def version() -> None:
    """Print the version."""
    import peftkern

    print(peftkern.__version__)


def _print_version(asked: bool) -> None:
    if asked:
        version()
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


@functools.cache  # typer takes most of a short command's time for it
def _command() -> Any:
    """Return the command line as click has it, without the "<bool>" that typer puts after flags."""
    commands = [group := typer.main.get_command(app)]
    for command in commands:
        commands += getattr(command, "commands", {}).values()
        for parameter in command.get_params(typer.Context(command)):
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
    return group


def main(arguments: list[str] | None = None) -> int:
    """Run a command line (default: that of this process) and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that its encoding lacks becomes "?"
            stream.reconfigure(errors="replace")
    try:
        status = _command()(args=arguments, prog_name="peftkern", standalone_mode=False) or 0
        if status == EXIT_STOPPED:  # so typer answers Ctrl-C, or leaves it to others
            raise KeyboardInterrupt
        if sys.stdout is not None:
            sys.stdout.flush()  # what cannot be written is told here, not when Python ends
        return status
    except typer.Exit as done:
        return done.exit_code
    except (typer.Abort, KeyboardInterrupt, Stopped) as done:
        print(f"peftkern: {str(done) or 'stopped'}", file=sys.stderr)
        return EXIT_STOPPED
    except InputError as error:
        complaint = str(error)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        complaint = f"this needs pip install 'peftkern[peft]': {error}"
    except OSError as error:
        if error.errno not in _UNWRITABLE or error.filename is not None:
            raise
        _drop_output()
        if error.errno == errno.EPIPE:  # `| head`: whoever reads has enough
            return EXIT_PIPE
        complaint = f"the output cannot be written: {error.strerror}"
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            return EXIT_BAD_INPUT
        complaint = _with_value(error, arguments)
    print("peftkern: error:", " ".join(complaint.split()), file=sys.stderr)
    return EXIT_BAD_INPUT


def _with_value(error: Any, arguments: list[str]) -> str:
    """Return a complaint of typer's, which leaves out what came for an option."""
    text = error.format_message()
    names = [name for name in getattr(getattr(error, "param", None), "opts", ()) if name[0] == "-"]
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in names and (value := value if equals else following) not in text:
            return f"{text}, got {value!r}"
    return text


def _drop_output() -> None:
    """Let Python's last flush of standard output succeed."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
