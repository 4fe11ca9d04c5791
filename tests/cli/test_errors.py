"""Wrong input of every kind, to every option of every command; output that cannot be written."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_folders import save_llama
from command_line import commands_of, refused
from merged_folders import load, save_adapter
from monitor_runs import start, step, write
from paths import ROOT
from processes import environment

from peftkern.cli import app, main
from peftkern.tools.bench import command as bench
from peftkern.tools.doctor import doctor
from peftkern.tools.tune import tune

KINDS = {
    "empty": "",
    "negative": "-1",
    "zero": "0",
    "fraction": "1.5",
    "not a number": "nan",
    "huge": "9" * 400,
    "not ASCII": "größe-\u4e2d",
    "two lines": "a\nb",
    "missing": "no/such",
    "folder": "folder",
    "not JSON": "file",
    "other JSON": "list.json",
    "unwritable": "/proc/self/mem/x",
}
RUNS = {  # what each command is given besides the option that is wrong
    "adapter combine": "adapter adapter out",
    "adapter convert": "adapter out --to mlx",
    "adapter extract": "llama tuned out",
    "adapter inspect": "adapter",
    "adapter resize": "adapter out --rank 2",
    "adapter verify": "adapter",
    "bench": "--shapes 2x64x64 --op lora_linear --baselines frozen",
    "doctor": "--forget",
    "explain": "lora_linear 2x64x64",
    "init": "pissa llama out",
    "merge": "llama adapter out",
    "monitor": "run.jsonl",
    "plan": "llama",
    "quantize": "llama out",
    "ranks": "llama --rank 4",
    "tune": "--shape 64x64 --rows 1",
    "version": "",
}
MANY = ("adapter combine", "merge")  # which take any number of adapters
COMMANDS = commands_of(app)
PARAMETERS = [
    pytest.param(name, parameter, id=f"{name} {parameter.opts[0]}")
    for name, command in COMMANDS.items()
    for parameter in command.params
    if not getattr(parameter, "is_flag", False)
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "folder").mkdir()
    (folder / "file").write_text("x")
    (folder / "list.json").write_text("[]")
    write(folder / "run.jsonl", start(), step(1))
    save_llama(folder / "tuned", seed=4)
    save_adapter(folder / "adapter", load(save_llama(folder / "llama")), target_modules=["q_proj"])
    return folder


@pytest.fixture(autouse=True)
def unmeasured(files, monkeypatch):
    """What is accepted is not run for minutes."""
    monkeypatch.chdir(files)
    monkeypatch.setenv("PEFTKERN_CACHE", str(files.with_name("cache")))
    monkeypatch.setattr(bench, "execute", lambda plan: 0)
    monkeypatch.setattr(tune, "run", lambda job, progress: tune.Outcome())


def given(name: str, parameter, value: str) -> list[str]:
    words, options = RUNS[name].split(), getattr(parameter, "opts", [])
    if parameter.param_type_name == "option":
        return [*name.split(), *words, options[0], value]
    arguments = [one.name for one in COMMANDS[name].params if one.param_type_name == "argument"]
    at = arguments.index(parameter.name)
    end = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    return [*name.split(), *words[end:], "--", *words[:at], value, *words[at + 1 : end]]


def new_files(folder: Path, before: set[Path]) -> Iterator[Path]:
    yield from (path for path in folder.iterdir() if path not in before)


def test_every_command_is_here():
    assert set(COMMANDS) == set(RUNS)


@pytest.mark.parametrize(("name", "parameter"), PARAMETERS)
def test_wrong_values_are_one_line_that_names_them(name, parameter, files, capfd):
    """Or accepted: "0" is a seed, and a file to write may have any name."""
    before = set(files.iterdir())
    accepted = []
    for kind, value in KINDS.items():
        status = main(given(name, parameter, value))
        out, error = capfd.readouterr()
        if status == 2:
            assert out == "" and error.startswith("peftkern: error: "), (kind, error)
            assert len(error.splitlines()) == 1, (kind, error)
            shown = " ".join(value.split())
            named = {parameter.opts[0].removeprefix("--"), parameter.name.upper(), shown or "."}
            assert any(word in error for word in named), (kind, error)
            assert not list(new_files(files, before)), kind
        else:
            assert status in (0, 1) and "Traceback" not in error, (kind, error)
            accepted.append(kind)
        for path in new_files(files, before):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert len(accepted) < len(KINDS) - 2, accepted


@pytest.mark.parametrize("name", RUNS)
def test_unknown_options_and_words_too_many_are_told(name, capfd):
    refused(capfd, "No such option: --loud", *name.split(), "--loud")
    complaint = "out: expected an adapter" if name in MANY else "one-more"
    refused(
        capfd, complaint, *name.split(), *RUNS[name].split(), "one-more", "one-more", "one-more-out"
    )


def test_what_typer_says_of_a_number_has_the_value(capfd):
    for words in (["--r", "1.5"], ["--r=1.5"]):
        refused(capfd, "got '1.5'", "explain", "lora_linear", "2x3x4", *words)
        refused(capfd, "'--r'", "explain", "lora_linear", "2x3x4", *words)


def test_options_without_effect_are_told(capfd):
    refused(capfd, "--targets: of the layers of --model", "tune", "--targets", "q_proj")
    refused(capfd, "--shape: '' has an empty entry", "tune", "--shape", "")


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))


@pytest.mark.slow
@pytest.mark.parametrize("words", ["version", "explain --help", "explain lora_linear 2x3x4 --json"])
def test_output_that_cannot_be_written_is_one_line(words, tmp_path):
    command = [sys.executable, "-m", "peftkern", *words.split()]
    how = {"stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "env": environment()}
    for file, before in (("/dev/full", None), (tmp_path / "out", limited)):
        with open(file, "w") as out:
            done = subprocess.run(command, stdout=out, preexec_fn=before, **how)
        assert done.returncode == 2
        assert done.stderr.startswith("peftkern: error: the output cannot be written: ")
        assert len(done.stderr.splitlines()) == 1
    with subprocess.Popen(command, stdout=subprocess.PIPE, **how) as process:
        process.stdout.close()  # as `| head` does when it has enough
        assert process.stderr.read() == "" and process.wait() == 1
    closed = subprocess.run([*command], preexec_fn=lambda: os.close(1), **how)
    assert (closed.returncode, closed.stderr) == (0, "")


def test_ctrl_c_is_one_line_and_status_130(monkeypatch, capfd):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "diagnose", interrupted)
    assert main(["doctor"]) == 130
    assert capfd.readouterr().err.splitlines()[-1] == "peftkern: stopped"


def test_a_defect_keeps_its_traceback(monkeypatch):
    """An OSError of a file is no output that cannot be written."""

    def broken() -> None:
        raise FileNotFoundError(2, "No such file", "a")

    monkeypatch.setattr(doctor, "diagnose", broken)
    with pytest.raises(FileNotFoundError):
        main(["doctor"])
