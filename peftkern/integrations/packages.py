"""Packages beside this one: their versions, and the errors of importing them.

Versions are read from metadata; a package is imported in a process of its own, with a time limit,
so that one that is missing, broken or slow harms nobody.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PEERS = ("peft", "transformers", "bitsandbytes", "accelerate", "trl", "triton")
# Whose layers or kernels are read or used where they are installed; they are not imported for that.
OPTIONAL = ("hqq", "torchao", "gptqmodel", "autoawq", "kernels")
IMPORT_SECONDS = 300.0  # a busy machine may need minutes


@dataclass(frozen=True)
class Version:
    """Package beside this one. accepted: ">=0.17", "" if any will do, None if that is unknown.

    imports: None if that was not tried, else whether it does, and its error if not.
    """

    name: str
    version: str | None
    accepted: str | None
    imports: bool | None = None
    error: str = ""


@dataclass(frozen=True)
class Answer:
    """Answer of a probe of an installed package: does it go wrong here as some versions do?

    answer: "present", "absent", or "unknown" where the probe cannot be run. cause: what goes wrong,
    or why that is unknown; cure: what to do if it is present.
    """

    package: str
    probe: str
    answer: str
    cause: str
    cure: str


def installed_version(name: str) -> str | None:
    """Return the version that a package's own metadata tell; it is not imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_pure() -> bool:
    """Return True if peftkern was installed without native modules: asked for, or not Linux."""
    try:
        told = importlib.metadata.distribution("peftkern").read_text("WHEEL")
    except importlib.metadata.PackageNotFoundError:
        return False  # run from a folder that was never installed
    return "Root-Is-Purelib: true" in (told or "")


def accepted(name: str) -> str | None:
    """Return the versions of a package that pyproject.toml accepts; "" for any."""
    try:
        requirements = importlib.metadata.requires("peftkern") or []
    except importlib.metadata.PackageNotFoundError:
        return None  # run from a folder that was never installed
    for requirement in requirements:
        found = re.match(r"([A-Za-z0-9._-]+)\s*([^;\[\s]*)", requirement)
        if found and found[1].lower().replace("_", "-") == name and found[2]:
            return found[2]
    return ""


@contextlib.contextmanager
def needed_by(what: str) -> Iterator[None]:
    """Guard imports of what only the extra "peft" installs: an error says how to install it."""
    try:
        yield
    except ImportError as error:
        said = f"{what} needs PEFT and transformers: pip install 'peftkern[peft]' ({error})"
        raise type(error)(said, name=error.name, path=error.path) from error


# How the error of a bitsandbytes begins that imports, and then fails when it is used.
BNB_LIBRARY = "its native library is not usable"
Found = tuple[dict[str, str], list[Answer]]
_PROBES = Path(__file__).with_name("package_probes.py")


@contextlib.contextmanager
def importing(names: list[str]) -> Iterator[Callable[[float], Found]]:
    """Import packages in another process meanwhile; gives a function that waits for the answers.

    Its argument is how many seconds to wait from then on; it returns the errors by package, "" if
    there is none, without the packages after one that crashed or took too long, and the answers of
    the probes.
    """
    mark = secrets.token_hex()  # of the lines that are not the packages' own
    # As text: run as a file, its folder would hide the packages that modules here are named after.
    program = _PROBES.read_text(encoding="utf-8")
    command = [sys.executable, "-c", program, mark, BNB_LIBRARY, *names]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONPATH": path},
    )

    def wait(seconds: float) -> Found:
        try:
            output, _ = process.communicate(timeout=seconds)
            unfinished = f"ends Python with status {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            unfinished = f"takes more than {seconds:g} s"
        errors, answers = {}, {}
        for line in output.splitlines():
            if not line.startswith(mark):
                continue
            name, *words = json.loads(line.removeprefix(mark))
            doing = "importing" if len(words) == 1 else "trying"
            words = [f"{doing} it {unfinished}" if w is None else one_line(w) for w in words]
            if len(words) == 1:
                errors[name] = words[0]
            else:
                answers[name, words[0]] = Answer(name, *words)
        return errors, list(answers.values())

    try:
        yield wait
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version up to what is no number: (2, 13, 0) of 2.13.0+cpu."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in found[0].split(".")) if found else ()


def one_line(error: object) -> str:
    return " ".join(str(error).split())
