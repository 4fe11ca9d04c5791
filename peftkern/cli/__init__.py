"""Command line, `peftkern COMMAND` or `python -m peftkern COMMAND`.

One module per command, named like it; the work itself is done by a module of the library, whose
imports wait until the command runs. Bad input is one line on stderr and exit status 2.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import Annotated, Any

import typer

from peftkern.cli.bench import bench
from peftkern.cli.doctor import doctor
from peftkern.cli.explain import explain
from peftkern.cli.frame import EXIT_BAD_INPUT, InputError
from peftkern.cli.monitor import monitor
from peftkern.cli.plan import plan
from peftkern.cli.quantize import quantize
from peftkern.cli.tune import tune

# click's, which typer vendors under another name or imports, depending on its version.
_UsageError: type[Exception] = typer.BadParameter.__base__

app = typer.Typer(
    name="peftkern",
    help="Kernels for parameter-efficient fine-tuning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (bench, doctor, explain, monitor, plan, quantize, tune):
    # typer keeps the line breaks of a docstring.
    _help = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(_command.__doc__))
    app.command(help=_help)(_command)


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


def _command() -> Any:
    """Return the command line as click has it, without the "<bool>" that typer puts after flags."""
    group = typer.main.get_command(app)
    for command in (group, *group.commands.values()):
        for parameter in command.get_params(typer.Context(command)):
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
    return group


def main(arguments: list[str] | None = None) -> int:
    """Run a command line (default: that of this process) and return its exit status."""
    try:
        return _command()(args=arguments, prog_name="peftkern", standalone_mode=False) or 0
    except typer.Exit as done:
        return done.exit_code
    except (typer.Abort, KeyboardInterrupt):
        print("peftkern: stopped", file=sys.stderr)
        return 130
    except InputError as error:
        print(f"peftkern: error: {error}", file=sys.stderr)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            print(f"peftkern: error: {error.format_message()}", file=sys.stderr)
    return EXIT_BAD_INPUT
