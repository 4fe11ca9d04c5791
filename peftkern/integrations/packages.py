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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

PEERS = ("peft", "transformers", "bitsandbytes", "accelerate", "trl", "triton")
IMPORT_SECONDS = 300.0  # a busy machine may need minutes


@dataclass(frozen=True)
class Version:
    """Package beside this one. accepted: ">=0.17", "" if any will do, None if that is unknown.

    imports: None if it was not tried, "" if it imports, else the error. defects: (what it computes
    wrongly here, what to do about it).
    """

    name: str
    version: str | None
    accepted: str | None
    imports: str | None = None
    defects: tuple[tuple[str, str], ...] = ()


def installed_version(name: str) -> str | None:
    """Return the version that a package's own metadata tell; it is not imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


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
_IMPORT = """
import importlib, json, sys
def say(*words):
    print("\\n" + sys.argv[1] + json.dumps(words), flush=True)
def unusable(name):
    if name == "bitsandbytes":  # imports without its library, and fails when it is used
        library = getattr(importlib.import_module("bitsandbytes.cextension"), "lib", None)
        if type(library).__name__.startswith("ErrorHandler"):
            return LIBRARY + ": " + str(getattr(library, "error_msg", ""))
    return ""
def defects(name):
    return [wrong_rows(), no_gradient()] if name == "bitsandbytes" else []
def wrong_rows():  # that are no multiple of the block, on a CPU
    import torch
    from bitsandbytes import functional
    weight = torch.linspace(-1, 1, 960).view(10, 96)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    error = (functional.dequantize_4bit(packed, state) - weight).abs().max().item()
    if error > HALF_GAP:
        return ("dequantizes NF4 weights wrongly on a CPU where in_features is no multiple of "
                "the block: off by %.2g of the largest value" % error, "peftkern.patch avoids it")
def no_gradient():  # of what eval mode has repacked, on a CPU with AVX512-BF16
    import torch
    from bitsandbytes.nn import Linear4bit
    layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").cpu()
    x, grads = torch.linspace(-1, 1, 256).view(4, 64).bfloat16(), []
    for evaluated in (False, True):
        with torch.no_grad():
            evaluated and layer.eval()(x)
        leaf = x.clone().requires_grad_()
        layer.train()(leaf).sum().backward()
        grads.append(leaf.grad)
    if grads[1] is None or (grads[1] - grads[0]).norm() > grads[0].norm() / 10:
        return ("repacks a 4-bit weight in place when its layer runs in eval mode on this CPU, and "
                "then no gradient passes the layer: training after an evaluation goes wrong",
                "peftkern.patch before the first evaluation avoids it; else load the model again")
for name in sys.argv[2:]:
    say(name, None, [])
    try:
        importlib.import_module(name)
        say(name, unusable(name), [])
        say(name, unusable(name), [found for found in defects(name) if found])
    except BaseException as caught:
        say(name, type(caught).__name__ + ": " + str(caught), [])
""".replace("LIBRARY", repr(BNB_LIBRARY)).replace("HALF_GAP", "0.152")  # of absmax


@contextlib.contextmanager
def importing(names: list[str]) -> Iterator[Any]:
    """Import packages in another process meanwhile; gives a function that waits for the answers.

    Its argument is how many seconds to wait from then on; it returns {name: (error, defects)}, ""
    and () if there is none, without the packages after one that crashed or took too long.
    """
    mark = secrets.token_hex()  # of the lines that are not the packages' own
    command = [sys.executable, "-c", _IMPORT, mark, *names]
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

    def wait(seconds: float) -> dict[str, tuple[str, tuple[tuple[str, str], ...]]]:
        try:
            output, _ = process.communicate(timeout=seconds)
            unfinished = f"it ends Python with status {process.returncode} while it is imported"
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            unfinished = f"it is not imported after {seconds:g} s"
        answers = {}
        for line in output.splitlines():
            if line.startswith(mark):
                name, error, defects = json.loads(line.removeprefix(mark))
                text = unfinished if error is None else one_line(error)
                answers[name] = (text, tuple(map(tuple, defects)))
        return answers

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
