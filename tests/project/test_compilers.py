"""Every C++ compiler of this machine: builds, sees the same machine, runs on torch's threads."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
from building import KERNEL_OBJECTS, libraries, run_checked
from paths import ROOT

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Prints the OpenMP runtimes and the number of threads, with torch's pool of three, and again after
# `work` has run on three threads: of the same pool or of a second one.
OPENMP_PROBE = """
import os, re, torch
def state():
    with open("/proc/self/maps") as file:
        runtimes = set(re.findall(r"/\\S*/lib(?:gomp|omp|iomp5)[^/]*\\.so\\S*", file.read()))
    return sorted(runtimes), len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
torch.ones(1 << 22).sum()
print(state())
{work}
print(state())
"""


def openmp_states(work: str) -> tuple[str, str]:
    """Before and after `work`."""
    before, after = run_checked(sys.executable, "-c", OPENMP_PROBE.format(work=work)).splitlines()
    assert "omp" in before
    return before, after


@linux_only
def test_module_runs_on_torchs_openmp():
    before, after = openmp_states(
        "import peftkern\n"
        "with peftkern.use_backend('cpu'): peftkern.quantize_nf4(torch.ones(1 << 22))"
    )
    assert before == after


def compilers() -> list[str]:
    """g++, clang++ and their versions on PATH, each once; or else the default one."""
    folders = map(Path, os.environ["PATH"].split(os.pathsep))
    found = {
        path.resolve(): str(path)
        for folder in folders
        for path in sorted(folder.glob("*++*"))
        if re.fullmatch(r"(g|clang)\+\+(-\d+)?", path.name)
    }
    return sorted(found.values()) or ["c++"]


COMPILER_PROBE = """
#include <sched.h>
#include <atomic>
#include "peftkern/isa.h"
#include "peftkern/parallel.h"

extern "C" bool built(int isa) { return peftkern::isa_built(static_cast<peftkern::Isa>(isa)); }
extern "C" bool available(int isa) {
  return peftkern::isa_available(static_cast<peftkern::Isa>(isa));
}

// A task per thread, and each waits for all of them: no thread can take two.
struct Meeting {
  int* thread_of;
  std::atomic<int> missing;
};

extern "C" void meet(int threads, int* thread_of) {
  Meeting meeting{thread_of, {threads}};
  const auto task = [](void* context, int64_t i, int thread) {
    Meeting& m = *static_cast<Meeting*>(context);
    m.thread_of[i] = thread;
    for (--m.missing; m.missing > 0;) sched_yield();
  };
  peftkern::parallel_tasks(threads, threads, task, &meeting);
}
"""


def built_by(compiler: str) -> Path | None:
    """The folder of this tree's own build, if that is the compiler: it has compiled everything."""
    folder = ROOT / "build" / sysconfig.get_config_var("SOABI")
    with contextlib.suppress(FileNotFoundError):
        cache = (folder / "CMakeCache.txt").read_text()
        used = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.*)$", cache, re.MULTILINE)[1]
        if Path(used).resolve() == Path(shutil.which(compiler)).resolve():
            return folder
    return None


@pytest.fixture(params=compilers(), scope="module")
def compiled(request, tmp_path_factory) -> Path:
    """A library by that compiler: what asks the machine, and what runs threads.

    Compiled besides are the kernels whose instructions compilers have had the most trouble with.
    """
    folder = tmp_path_factory.mktemp("compiler")
    stems = ("isa", "parallel", "isa_avx512_bf16", "isa_amx")
    objects = [KERNEL_OBJECTS / f"{stem}.cpp.o" for stem in stems]
    if build := built_by(request.param):
        objects = [build / path for path in objects]
    else:
        run_checked(
            *("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DPEFTKERN_MODULE=OFF"),
            *(f"-DCMAKE_CXX_COMPILER={request.param}", "-DPEFTKERN_WERROR=ON"),
            f"-DPython_EXECUTABLE={sys.executable}",
        )
        rules = (folder / "build.ninja").read_text()
        run_checked("ninja", "-C", folder, *(o for o in objects if f"build {o}:" in rules))
    (folder / "probe.cpp").write_text(COMPILER_PROBE)
    run_checked(
        *(request.param, "-std=c++17", "-shared", "-fPIC", "-I", ROOT / "csrc" / "include"),
        *("-o", "probe.so", "probe.cpp", *objects[:2], "-ldl"),
        cwd=folder,
    )
    return folder / "probe.so"


def test_each_compiler_finds_the_same_instruction_sets(compiled):
    from peftkern import _cpu

    library = ctypes.CDLL(str(compiled))
    names = ["scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16"]
    built = {name for i, name in enumerate(names) if library.built(i)} & set(_cpu.built_isas())
    available = {name for i, name in enumerate(names) if library.available(i)}
    assert "scalar" in built
    assert available & built == set(_cpu.isas()) & built


@linux_only
def test_each_compiler_runs_on_torchs_openmp(compiled):
    assert not any("omp" in name for name in libraries(compiled))
    before, after = openmp_states(
        "import ctypes\n"
        "thread_of = (ctypes.c_int * 3)()\n"
        f"ctypes.CDLL({str(compiled)!r}).meet(3, thread_of)\n"
        "assert sorted(thread_of) == [0, 1, 2]"
    )
    assert before == after
