"""Walk of a QLoRA product from the public function to C++: frames, files, forms of its weight."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

import peftkern
from peftkern import NF4Weight

PACKAGE = str(Path(peftkern.__file__).parent)
FRAMES_MOST = 16  # of this package, to which x is passed
FILES_MOST = 7  # on the way from the function to the C++ kernel, two of them C++
CALLS_MOST = 31  # of functions of this package, whatever is passed to them


def parts(value: Any) -> list[Any]:
    return [value, *value] if isinstance(value, (list, tuple)) else [value]


def passed(frame: FrameType) -> list[Any]:
    """Return the arguments of a call and what lists and tuples among them hold."""
    return [part for value in list(frame.f_locals.values()) for part in parts(value)]


def ours(frame: FrameType | None) -> list[FrameType]:
    """Return the frames of this package on the stack."""
    found = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            found.append(frame)
        frame = frame.f_back
    return found


def walk(call: Callable[[], Tensor]) -> tuple[list[tuple[str, list[Any]]], set[str]]:
    """Return every call of this package's functions, and the files on the stack below C++."""
    calls, files = [], set()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls.append((frame.f_code.co_name, passed(frame)))
        elif event == "c_call" and argument.__name__ == "nf4_lora_linear_forward":
            files.update(found.f_code.co_filename for found in ours(frame))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return calls, files


def test_walk_of_a_qlora_forward_is_short():
    x = torch.randn(4, 128, requires_grad=True)
    w = peftkern.quantize_nf4(torch.randn(256, 128))
    lora_A = torch.randn(8, 128, requires_grad=True)
    lora_B = torch.randn(256, 8, requires_grad=True)

    def call() -> Tensor:
        return peftkern.nf4_lora_linear(x, w, lora_A, lora_B, scaling=2.0)

    with peftkern.use_backend(None):
        call()  # imports
        calls, files = walk(call)

    def holds_x(part: Any) -> bool:
        return isinstance(part, Tensor) and part.data_ptr() == x.data_ptr()

    with_x = [name for name, found in calls if any(map(holds_x, found))]
    assert len(with_x) <= FRAMES_MOST, with_x
    assert len(calls) <= CALLS_MOST, [name for name, _ in calls]
    assert len(files) + len({"bind.cpp", "nf4_lora_linear.cpp"}) <= FILES_MOST, files


def test_weight_changes_its_form_three_times():
    """NF4Weight, then tensors and layout, then the tuple that C++ reads."""
    x, w = torch.randn(4, 128), peftkern.quantize_nf4(torch.randn(256, 128))
    calls, _ = walk(lambda: peftkern.nf4_linear(x, w))
    forms = set()
    for name, found in calls:
        if any(isinstance(part, NF4Weight) for part in found):
            forms.add("NF4Weight")
        elif any(part is w.packed for part in found) and name != "address":
            forms.add("tensors and layout")
    address = w.packed.data_ptr()
    given = []

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call" and argument.__name__ == "nf4_lora_linear_forward":
            tuples = [v for v in frame.f_locals.values() if isinstance(v, tuple)]
            given.append([v for v in tuples if not any(isinstance(part, Tensor) for part in v)])

    sys.setprofile(profile)
    try:
        peftkern.nf4_linear(x, w)
    finally:
        sys.setprofile(None)
    assert [sum(address in value for value in values) for values in given] == [1]
    assert forms == {"NF4Weight", "tensors and layout"}
