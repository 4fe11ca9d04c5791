"""Direct launches, and the host's share of a layer's call, on a GPU that is not there.

Triton's interpreter has no launches: each test is a process without it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from paths import ROOT

pytest.importorskip("triton")
pytest.importorskip("bitsandbytes")

# Python calls of a patched layer's call; PEFT's own layer comes to 81 and 127.
CALLS_MOST = {
    "gpu/decode": 120,
    "gpu/train": 235,
    "gpu/train-autocast-dropout": 240,
    "cpu/decode": 96,
    "cpu/train": 178,
}


def run_compiled(*command: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "bench")])
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_calls_of_a_layer_are_few(tmp_path):
    path = tmp_path / "host.json"
    run_compiled("bench/bench_host_time.py", "--seconds=0.01", f"--json={path}")
    found = json.loads(path.read_text(encoding="utf-8"))
    calls = {name: found[name]["ours_calls"] for name in CALLS_MOST}
    assert all(calls[name] <= CALLS_MOST[name] for name in calls), calls


# Each launch, as the last function before the driver sees it, direct and through Triton.
SAME_LAUNCHES = """
import torch, triton
from triton import knobs
import faked_gpu
from faked_gpu import faked_gpu as gpu, _Launcher
from peftkern import quantize_nf4
from peftkern.kernels import launch as module, nf4, nf4_lora_linear as kernels
from peftkern.kernels.launch import forget_plans

seen = []
_Launcher.__call__ = lambda self, *args: seen.append((id(self), *args))

def described(call):
    launcher, *grid, stream, function, metadata, _, enter, leave = call[:10]
    args = [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in call[10:]]
    return launcher, *grid, stream, function, metadata, *args

w = quantize_nf4(torch.randn(128, 128))
A, B = torch.randn(16, 128), torch.randn(128, 16)

def calls(rows, dtype=torch.bfloat16, scaling=2.0, misaligned=False):
    x = torch.randn(rows * 128 + 1).to(dtype)[1 if misaligned else 0:][: rows * 128]
    x = x.view(rows, 128)
    keep = torch.randint(9, (1,))
    y, S = kernels.nf4_lora_linear_forward(x, w.tensors, w.layout, A, B, None, scaling, keep, 0.1)
    needs = [True, True, True, True]
    args = (w.tensors, w.layout, A, B, scaling, keep, 0.1, needs)
    kernels.nf4_lora_linear_backward(y, x, S, *args)

def launches(**how):
    seen.clear()
    calls(**how)
    return list(map(described, seen))

runs = []
real = triton.runtime.JITFunction.run
def counted(self, *args, **kwargs):
    runs.append(self)
    return real(self, *args, **kwargs)
triton.runtime.JITFunction.run = counted

with gpu():
    for how in (
        {"rows": 1}, {"rows": 7}, {"rows": 200}, {"rows": 16}, {"rows": 200, "scaling": 1.0},
        {"rows": 7, "dtype": torch.float32}, {"rows": 7, "dtype": torch.float16},
    ):
        through = launches(**how)
        assert 1 < len(runs) <= len(through), how  # two may be of one plan
        through_triton = len(runs)
        assert launches(**how) == through and len(runs) == through_triton, how
        runs.clear()
    before = launches(rows=7)
    assert not runs
    shifted = launches(rows=7, misaligned=True)  # other programs: Triton decides
    assert runs and [c[0] for c in shifted] != [c[0] for c in before]
    runs.clear()
    hooked = []
    with knobs.runtime.scope():
        watch = lambda metadata: hooked.append(metadata.get()["name"])
        if hasattr(knobs.runtime.launch_enter_hook, "add"):
            knobs.runtime.launch_enter_hook.add(watch)
        else:
            knobs.runtime.launch_enter_hook = watch
        assert launches(rows=7) == before and len(runs) == len(before)
        if hasattr(knobs.runtime.launch_enter_hook, "remove"):
            knobs.runtime.launch_enter_hook.remove(watch)
    runs.clear()
    taken = lambda *args, **kwargs: hooked.append("pre-run")
    kernels._nf4_forward_kernel.add_pre_run_hook(taken)
    assert launches(rows=7) == before and runs == [kernels._nf4_forward_kernel] and hooked
    kernels._nf4_forward_kernel.pre_run_hooks.remove(taken)
    runs.clear()
    forget_plans()
    assert launches(rows=7) == before and len(runs) == len(before)
    module._program = lambda *args: None  # a Triton that keeps its programs in another way
    forget_plans()
    for _ in range(2):
        runs.clear()
        assert launches(rows=7) == before and len(runs) == len(before)
print("as Triton launches")
"""


def test_direct_launches_are_those_of_triton():
    assert run_compiled("-c", SAME_LAUNCHES).endswith("as Triton launches\n")
