"""What every test runs under: poisoned memory, fixed seeds, no network, every back end."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Kernels are what is tested: they serve from the first call on, and no verdict is read or written.
os.environ["PEFTKERN_TRUST"] = "always"
# Inductor's cache of graphs outlives the process, and its key leaves the instruction set out: what
# was generated for 16 lanes is then compiled for 8, and is wrong (torch 2.13).
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")

import cuda_emulated
import pytest
import torch
from grids import MOST_CASES, axes_of, covering

if not torch.cuda.is_available():  # before Triton's kernels are imported, which ask for it once
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings
from tolerances import FUZZ_EXAMPLES, FUZZ_EXAMPLES_LONG, FUZZ_EXAMPLES_MORE, FUZZ_EXAMPLES_WIDE

import peftkern
from peftkern.backends import trust
from peftkern.backends.cpu import module as cpu
from peftkern.backends.cuda import module as cuda
from peftkern.backends.programs import PLAIN
from peftkern.monitor.clocks import WallClock

# A shell's background job ignores Ctrl-C, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes, or drawing it, is the machine's business.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
fixed = settings(untimed, derandomize=True, database=None)
settings.register_profile("peftkern", fixed, max_examples=FUZZ_EXAMPLES)
settings.register_profile("more", fixed, max_examples=FUZZ_EXAMPLES_MORE)
settings.register_profile("wide", fixed, max_examples=FUZZ_EXAMPLES_WIDE)
# `pytest --hypothesis-profile=long` draws new examples each time, for as long as it takes.
settings.register_profile("long", untimed, max_examples=FUZZ_EXAMPLES_LONG)
settings.load_profile("peftkern")


def pytest_collection_finish() -> None:
    """Leave what is imported by now, and thousands of tests, out of every collection of garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def interpreter_without_detours() -> None:
    """Triton's interpreter computes what it does anyway, in a third of the time."""
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        import quick_interpreter

        quick_interpreter.install()


@pytest.fixture(autouse=True)
def poisoned_memory_and_seeds() -> Iterator[None]:
    """New memory is NaN (integers: the largest value), so that reading it shows in the result.

    Torch fills it itself in deterministic mode, below Python, so torch.compile and the allocations
    inside its own ops are covered; warn_only leaves out the errors of that mode.
    """
    random.seed(0)
    torch.manual_seed(0)
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    os.sched_setaffinity(0, cores)


@pytest.fixture(autouse=True)
def device_is_alive(request: pytest.FixtureRequest) -> Iterator[None]:
    """A kernel that wrote out of bounds fails here, in its own test; nothing after it can run."""
    yield
    if "gpu" not in request.keywords or not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:  # which gets another process
            print(f"{request.node.nodeid}: {error}", file=sys.__stderr__, flush=True)
            os._exit(1)
        pytest.exit(f"{request.node.nodeid}: {error}", returncode=1)


@pytest.fixture(params=["cpu", *PLAIN])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on the native kernels and on plain torch; a missing library fails the test."""
    with peftkern.use_backend(request.param):
        yield request.param


# Whole programs, which `make test` leaves to `make test-all`: scripts, commands with processes of
# their own, builds, ranks of a process group, whole models under a training loop.
PROGRAMS = (
    "bench",
    "cli/test_bench.py",
    "cli/test_plan.py",
    "cuda/test_build.py",
    "integrations/engines",
    "integrations/peft/test_distributed.py",
    "integrations/transformers/test_adalora_resume.py",
    "kernels/test_aot.py",
    "project/test_compilers.py",
    "project/test_examples.py",
    "project/test_packaging.py",
    "tools/bench/test_training_step.py",
    "tools/test_plan.py",
    "tools/test_plan_compaction.py",
    "tools/test_plan_devices.py",
    "tools/test_plan_experts.py",
    "tools/test_plan_formats.py",
    "tools/test_tune.py",
)
_ISAS = cpu.cpu_isas() or ["no native library"]
_BEST = {"backend": "cpu", **dict.fromkeys(("every_backend", "every_kernel", "isa"), _ISAS[-1])}


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark whole programs `slow`, and `more` what a test has beyond every value of its parameters.

    Which cases have every value: `grids.covering`.
    """
    programs = [Path(__file__).parent / path for path in PROGRAMS]
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if any(item.path.is_relative_to(program) for program in programs):
            item.add_marker(pytest.mark.slow)
        marks = {mark.name for mark in item.iter_markers()}
        if hasattr(item, "callspec") and not {"more", "long"} & marks:
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in tests.values():
        if len(cases) > MOST_CASES:
            kept = covering([axes_of(case, _BEST) for case in cases], _BEST)
            for case in (case for i, case in enumerate(cases) if i not in kept):
                case.add_marker(pytest.mark.more)


@contextlib.contextmanager
def _on(name: str) -> Iterator[str]:
    if name in PLAIN:
        with peftkern.use_backend(name):
            yield name
        return
    with cpu.use_isa(name), peftkern.use_backend("cpu"):
        yield name


@pytest.fixture(params=[*_ISAS, *PLAIN])
def every_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """`backend`, but once per instruction set of this machine."""
    with _on(request.param) as name:
        yield name


@pytest.fixture(params=[*_ISAS, "reference"])
def every_kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """`every_backend` of a family for which "torch" means the reference."""
    with _on(request.param) as name:
        yield name


@pytest.fixture
def small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patched dense layers compute small products too."""
    import peft_models  # and with it PEFT, transformers and bitsandbytes

    peft_models.take_small_layers(monkeypatch.setattr)


@pytest.fixture
def own_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder of the test's own, and the mode that users have."""
    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path / "cache"))
    trust.reset()
    with trust.use_mode("auto"):
        yield
    trust.reset()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The monitor's clock on a CPU, which stands still but for the test: `clock.now += 1.0`."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(WallClock, "mark", staticmethod(lambda: clock.now))
    return clock


@pytest.fixture
def triton_inside_its_tensors() -> Iterator[None]:
    """Run the test on Triton's kernels in the interpreter, every address of which is checked."""
    from interpreted import bounds_checked  # which needs Triton

    with peftkern.use_backend("triton"), bounds_checked():
        yield


@pytest.fixture
def emulated_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Run the test on the CUDA kernels, compiled for this CPU: the module that holds them."""
    module = cuda_emulated.load()
    monkeypatch.setattr(cuda, "cuda_module", lambda: (module, None))
    with peftkern.use_backend("cuda"):
        yield module
