"""The command line as a user meets it: real processes, their output, their exit status."""

from __future__ import annotations

import inspect
import io
import itertools
import json
import os
import re
import shlex
import sys

import bench_records as of
import pytest
from checkpoint_folders import save_llama
from command_line import commands_of, refused, run, told
from merged_folders import load, save_adapter
from monitor_runs import start
from monitor_runs import write as write_run
from processes import run_code, run_python_over, without

import peftkern
from peftkern.cli import app, main
from peftkern.cli.frame import InputError, bad_input, dtype_name, parse_bytes
from peftkern.tools.bench import command as bench_command
from peftkern.tools.tune import tune


def test_version_is_the_package_s(capfd):
    done = run("version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{peftkern.__version__}\n", "")
    assert told(capfd, "--version") == done.stdout


LIGHT = """
import sys
from peftkern.cli import main
for arguments in sys.argv[1:]:
    main(arguments.split())
print(*{"torch", "numpy", "peft", "transformers"}.intersection(sys.modules), "end")
"""


def test_help_and_version_do_not_wait_for_torch():
    asked = ["--help", "--version", "version", "nonsense", *(f"{name} --help" for name in COMMANDS)]
    assert run_code(LIGHT, *asked).splitlines()[-1] == "end"


def test_bad_input_is_one_line_and_status_2(capfd):
    refused(capfd, "No such command 'nonsense'", "nonsense")
    refused(capfd, "No such option: --loud", "version", "--loud")
    refused(capfd, "Missing argument 'ADAPTER'.\n", "adapter", "inspect")


@pytest.mark.parametrize("command", [name for name in commands_of(app) if name != "version"])
def test_help_of_a_command_fits_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = [line.rstrip() for line in told(capsys, *command.split(), "--help").splitlines()]
    assert any(f"peftkern {command}" in line for line in lines)
    prose = lines[: next(i for i, line in enumerate(lines) if line.startswith("╭"))]
    assert max(map(len, lines)) <= 80
    assert not any("<bool>" in line for line in lines)
    # Filled, not broken where the source is: the next word would not have fitted.
    for line, after in itertools.pairwise(prose):
        assert not (line and after) or len(line) + 1 + len(after.split()[0]) > 79


TYPED = "absmax adamw adapter_config all auto bf16 cpu ddp dense forward fp32 fsdp2 llama3 lora"
TYPED += " lora_alpha lora_dropout nf4 peft pissa sdpa weights"


@pytest.mark.parametrize("command", [name for name in commands_of(app) if name != "version"])
def test_help_of_every_option_is_a_sentence(command):
    """It begins with a capital, or with a name as it is typed."""
    for option in inspect.signature(COMMANDS[command], eval_str=True).parameters.values():
        for one in getattr(option.annotation, "__metadata__", ()):
            first = re.match(r"\w+", one.help)[0]
            assert first[0].isupper() or first in TYPED.split(), one.help
            assert one.help.endswith((".", "?")), one.help


def example(name: str) -> list[str]:
    """The command that the help of a command shows, split as a shell does."""
    (text,) = re.findall(r"Example: (peftkern .*)", inspect.cleandoc(COMMANDS[name].__doc__))
    return [os.path.expanduser(word) for word in shlex.split(text)][1:]


COMMANDS = {name: command.callback for name, command in commands_of(app).items()}
EXAMPLES = [name for name, function in COMMANDS.items() if "Example:" in function.__doc__]
assert {"bench", "explain", "merge", "monitor", "plan", "quantize", "tune"} < set(EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_of_the_help_does_what_it_promises(name, tmp_path, monkeypatch):
    """`bench` and `tune` are told apart from a run of minutes, which has tests of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    models, about_adapters = tmp_path / "models", name == "merge" or name.startswith("adapter")
    if name in ("init", "quantize", "ranks") or about_adapters:
        base = save_llama(models / "llama3-8b")
    if about_adapters:
        for folder in ("my-adapter", "runs/adapter"):
            save_adapter(tmp_path / folder, load(base), target_modules=["q_proj"])
    if name == "adapter extract":
        save_llama(models / "my-tune", seed=4)
    write_run(tmp_path / "run.jsonl", start())
    ran = []
    monkeypatch.setattr(bench_command, "execute", lambda plan: ran.append(plan.budget) or 0)
    ready = lambda job, progress: ran.append(job.budget) or tune.Outcome()  # noqa: E731
    monkeypatch.setattr(tune, "run", ready)
    assert main(example(name)) == 0
    assert ran == ([300.0] if name in ("bench", "tune") else [])
    made = {"init": "llama3-8b-pissa", "merge": "merged", "quantize": "llama3-8b-nf4"}
    made["adapter extract"] = "my-tune"
    written = {made[name]} if name in made else set()
    assert {one.name for one in models.glob("*")} - {"llama3-8b"} == written


def test_help_is_shown_when_asked_and_when_nothing_is(capfd):
    assert "version" in told(capfd, "--help")
    assert main([]) == 2 and "version" in "".join(capfd.readouterr())


@pytest.mark.parametrize("text", ["48", "GB", "-1GB", "0GB", "nanGB", "1e9GB", "4PB", "4 G B", ""])
def test_what_is_no_size(text):
    with pytest.raises(InputError, match="--fit: expected a size like 48GB"):
        parse_bytes("--fit", text)


@pytest.mark.parametrize(
    ("text", "count"),
    [("48GB", 48 * 10**9), ("1.5 GiB", 3 * 2**29), (" 7kb ", 7000), ("2tib", 2**41)],
)
def test_sizes_know_their_units(text, count):
    assert parse_bytes("--fit", text) == count


def test_dtypes_have_a_short_and_a_full_name():
    assert dtype_name("--dtype", "bf16", ("bf16",)) == "bf16"
    assert dtype_name("--dtype", "bfloat16", ("bf16",)) == "bf16"
    for text in ("float32", "fp32", "half", ""):
        with pytest.raises(InputError, match=f"--dtype: expected one of bf16, fp16, got '{text}'"):
            dtype_name("--dtype", text, ("bf16", "fp16"))


def test_library_s_names_become_options():
    for message, said in [
        ("adapter_dtype: expected\n bf16", "--adapter-dtype: expected bf16"),
        ("model: expected", "model: expected"),
        ("adapter_dtype is missing", "adapter_dtype is missing"),
    ]:
        with pytest.raises(InputError) as caught, bad_input("adapter_dtype"):
            raise ValueError(message)
        assert str(caught.value) == said


def test_file_that_cannot_be_read_is_named():
    with pytest.raises(InputError) as caught, bad_input():
        open("no/such/file")  # noqa: SIM115  (it does not open)
    assert str(caught.value) == "no/such/file: No such file or directory"


def test_an_output_without_unicode_is_no_traceback(tmp_path, monkeypatch):
    one = of.case(of.provider("peftkern", 1.0), of.provider("peft", 1.01))
    (tmp_path / "run.json").write_text(json.dumps(of.record(one)))
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    assert main(["bench", f"--from={tmp_path / 'run.json'}"]) == 0
    assert "? 1.01x" in output.buffer.getvalue().decode("ascii")


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_tables_fit_the_terminal_and_names_stand_whole(columns, tmp_path, monkeypatch, capfd):
    ours, theirs = of.provider("peftkern", 1.0), of.provider("bitsandbytes + PEFT, eval", 1.5)
    (tmp_path / "run.json").write_text(json.dumps(of.record(of.case(ours, theirs))))
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = told(capfd, "bench", f"--from={tmp_path / 'run.json'}").splitlines()
    assert max(map(len, lines)) <= columns
    assert "peftkern" in [line.split(" ")[0] for line in lines] and "1.50x" in "".join(lines)
    assert ("[0.952-1.05]" in "".join(lines)) == (columns > 40)


WITHOUT = """
import sys
from peftkern.cli import main
sys.stderr = sys.stdout
print([main(arguments.split()) for arguments in sys.argv[1:]])
"""


@pytest.mark.slow
def test_what_needs_an_extra_says_so_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    commands = ["bench --model llama3.2-1b", f"tune --model {tmp_path}", "plan llama3.2-1b"]
    commands.append(f"quantize {tmp_path} {tmp_path / 'new'}")
    commands.append(f"merge {tmp_path} {tmp_path} {tmp_path / 'new'}")
    absent = without(tmp_path / "site", "peft", "transformers", "accelerate")
    done = run_python_over(absent, "-c", WITHOUT, *commands)
    *lines, statuses = done.stdout.splitlines()
    assert statuses == "[2, 2, 2, 2, 2]" and len(lines) == 5, lines
    for line in lines:
        assert line.startswith("peftkern: error: ") and "pip install" in line
        assert "peftkern[peft]" in line
