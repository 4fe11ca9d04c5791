"""Build script: compiles csrc/ with CMake and Ninja into peftkern/_cpu.*.so, and where it is asked
to into peftkern/_cuda.*.so. Never imports torch. Native modules are Linux's: elsewhere, and with
PEFTKERN_NATIVE=0, a notice says that PyTorch's own operations take their place, and the package is
installed without them, as pure Python.

From the environment: PEFTKERN_NATIVE=1|0, PEFTKERN_CUDA=0|1|auto (0: the default; 1: without a
usable nvcc an error; auto: nvcc decides), PEFTKERN_CUDA_ARCHS="80;90a", and CMAKE_ARGS for CMake,
for example "-DPEFTKERN_WERROR=ON". Objects stay in build/<python abi>/: rebuilding is incremental.

`python setup.py cuda_emulated` builds build/<python abi>/_cuda_emulated.so: the CUDA kernels,
compiled for the CPU, which tests load.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

ROOT = Path(__file__).resolve().parent
CMAKE_MINIMUM = (3, 18)
MODULES = ("peftkern._cpu", "peftkern._cuda")
CUDA = MODULES[1]
CXX_COMPILERS = ("c++", "CC", "g++", "clang++", "icpx", "icx", "xlC")  # as CMake searches


def not_native() -> str | None:
    """Return why no native module is built, or None if they are."""
    wanted = os.environ.get("PEFTKERN_NATIVE") or "1"
    if wanted not in ("0", "1"):
        raise SystemExit(f"error: PEFTKERN_NATIVE: expected 0 or 1, got {wanted!r}")
    if fcntl is None or sys.platform != "linux":
        return f"on {sys.platform}"
    return "with PEFTKERN_NATIVE=0" if wanted == "0" else None


class Missing(Exception):
    """Missing requirement of a build, and how to get it."""


def find_tool(name: str, minimum: tuple[int, ...] = ()) -> str:
    """Find the build tool `name`: the one beside this Python if there is one, else from PATH."""
    scripts = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent)]
    rejected = ""
    for folder in [*scripts, *os.environ.get("PATH", "").split(os.pathsep)]:
        path = shutil.which(name, path=folder) if folder else None
        if path is None:
            continue
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        version = re.search(r"(\d+)\.(\d+)", answer.stdout)
        # A pip-installed launcher whose package is not visible here fails; the next may work.
        if answer.returncode == 0 and version and tuple(map(int, version.groups())) >= minimum:
            return path
        rejected += f"; not usable: {path} ({(answer.stdout + answer.stderr).strip()[:80]!r})"
    wanted = name + (f" >= {'.'.join(map(str, minimum))}" if minimum else "")
    raise Missing(f"{wanted} (`pip install {name}`{rejected})")


def find_compiler() -> str:
    """Find the C++ compiler that CMake will take, or the options that name one."""
    options = os.environ.get("CMAKE_ARGS", "")
    if re.search(r"-DCMAKE_(CXX_COMPILER|TOOLCHAIN_FILE)\b", options):
        return options
    chosen = shlex.split(os.environ.get("CXX", ""))[:1]
    for name in chosen or CXX_COMPILERS:
        if shutil.which(name):
            return name
    raise Missing(f"a C++ compiler (`apt install g++`){f'; CXX is {chosen[0]}' if chosen else ''}")


def pybind11_include() -> str:
    """Find the pybind11 headers: the package's, the system's, or the copy torch ships."""
    if importlib.util.find_spec("pybind11") is not None:
        import pybind11

        return pybind11.get_include()
    torch = importlib.util.find_spec("torch")  # finds the folder, runs nothing
    folders = [Path(sysconfig.get_path("include")), Path("/usr/include")]
    if torch is not None:
        folders += [Path(folder) / "include" for folder in torch.submodule_search_locations]
    for folder in folders:
        if (folder / "pybind11" / "pybind11.h").exists():
            print(f"peftkern: package pybind11 is missing, using the headers in {folder}")
            return str(folder)
    raise Missing("pybind11 (`pip install pybind11`)")


def find_requirements() -> dict[str, str]:
    """Locate the build requirements. Raises: CompileError naming all that are missing."""
    finders = {
        "cmake": lambda: find_tool("cmake", CMAKE_MINIMUM),
        "ninja": lambda: find_tool("ninja"),
        "pybind11": pybind11_include,
        "compiler": find_compiler,
    }
    found, missing = {}, []
    for name, find in finders.items():
        try:
            found[name] = find()
        except Missing as what:
            missing.append(str(what))
    if missing:
        raise CompileError(f"building peftkern needs {', '.join(missing)}")
    return found


def build_folder() -> Path:
    """Return CMake's build folder for this Python."""
    if NOT_NATIVE:
        raise CompileError(f"no native modules are built {NOT_NATIVE}")
    return ROOT / "build" / sysconfig.get_config_var("SOABI")


def first_error(log: str) -> str:
    """Return the first compiler, linker or CMake error in `log`, with the lines that explain it."""
    lines = log.splitlines()
    pattern = re.compile(r"\berror:|\bError at\b|CMake Error|undefined reference|^FAILED:")
    hits = [i for i, line in enumerate(lines) if pattern.search(line)]
    real = [i for i in hits if not lines[i].startswith("FAILED:")] or hits
    start = real[0] if real else max(0, len(lines) - 20)
    return "\n".join(lines[start : start + 12])


def run_tool(command: list[str], step: str, quiet: bool) -> None:
    """Run one build step; raise with its first error if it fails. `quiet`: notices and failures."""
    if not quiet:
        print("+ " + shlex.join(command), flush=True)
    # A `make` above may name its job server's file descriptors here: they are not inherited, and
    # Ninja refuses to start without them.
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    )
    log = []
    for line in process.stdout:
        log.append(line)
        if not quiet or line.startswith("peftkern: "):
            sys.stdout.write(line)
            sys.stdout.flush()
    if process.wait() != 0:
        if quiet:
            sys.stdout.writelines(log)
            sys.stdout.flush()
        raise CompileError(
            f"peftkern: {step} failed (exit status {process.returncode}). First error:\n\n"
            f"{first_error(''.join(log))}\n"
        )


@contextlib.contextmanager
def locked(build_dir: Path) -> Iterator[None]:
    """Lock `build_dir` against other builds: CMake and Ninja do not."""
    build_dir.parent.mkdir(exist_ok=True)
    with open(f"{build_dir}.lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def builds_cuda(build_dir: Path) -> bool:
    """Return whether CMake builds peftkern._cuda."""
    cache = (build_dir / "CMakeCache.txt").read_text(encoding="utf-8")
    return "\nPEFTKERN_BUILDS_CUDA:INTERNAL=ON\n" in cache


def remove_stale(module: Path) -> None:
    """Remove an earlier build's module, which would be imported or packed with stale kernels."""
    if module.exists():
        print(f"peftkern: removing {module}, which this build does not make")
        module.unlink()


def replace_file(source: Path, destination: Path) -> None:
    """Replace a module atomically: a process may have the old file mapped."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    staged = destination.with_name(f".{destination.name}.{os.getpid()}")
    shutil.copyfile(source, staged)
    os.replace(staged, destination)


class CMakeBuild(build_ext):
    """Configure, build, and copy the modules to where setuptools expects them."""

    def run(self) -> None:
        super().run()
        if NOT_NATIVE and self.inplace:
            for name in MODULES:
                remove_stale(ROOT / self.get_ext_filename(name))

    def build_extensions(self) -> None:
        build_dir = build_folder()
        with locked(build_dir):
            cmake = self.configure(build_dir)
            if not builds_cuda(build_dir):
                self.extensions[:] = [ext for ext in self.extensions if ext.name != CUDA]
                remove_stale(Path(self.get_ext_fullpath(CUDA)))
            targets = [ext.name.rpartition(".")[2] for ext in self.extensions]
            self.compile(cmake, build_dir, targets)
            for ext, target in zip(self.extensions, targets, strict=True):
                replace_file(build_dir / f"{target}.so", Path(self.get_ext_fullpath(ext.name)))
        hint = "" if "_cuda" in targets else "; PEFTKERN_CUDA=1 builds CUDA's kernels, too"
        print(f"peftkern: built {' and '.join(targets)}{hint}")

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        if CUDA not in [ext.name for ext in self.extensions]:
            remove_stale(ROOT / self.get_ext_filename(CUDA))

    def configure(self, build_dir: Path) -> str:
        """Run CMake; returns its path."""
        found = find_requirements()
        self.discard_foreign_cache(build_dir)
        run_tool(
            [
                found["cmake"],
                *("-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"),
                f"-DCMAKE_MAKE_PROGRAM={found['ninja']}",
                f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DPEFTKERN_PYBIND11_INCLUDE={found['pybind11']}",
                f"-DPEFTKERN_CUDA={os.environ.get('PEFTKERN_CUDA') or '0'}",
                f"-DPEFTKERN_CUDA_ARCHS={os.environ.get('PEFTKERN_CUDA_ARCHS', '')}",
                *shlex.split(os.environ.get("CMAKE_ARGS", "")),
            ],
            "configuring",
            not self.verbose,
        )
        return found["cmake"]

    def compile(self, cmake: str, build_dir: Path, targets: list[str]) -> None:
        command = [cmake, "--build", str(build_dir), "--target", *targets]
        run_tool(command, "compiling", not self.verbose)

    @staticmethod
    def discard_foreign_cache(build_dir: Path) -> None:
        """Drop a build folder that was configured for another copy of the source tree."""
        cache = build_dir / "CMakeCache.txt"
        home = f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT.as_posix()}\n"
        if cache.exists() and home not in cache.read_text(encoding="utf-8"):
            shutil.rmtree(build_dir)


class EmulatedCuda(CMakeBuild):
    """The CUDA kernels compiled for the CPU, for tests: nothing of it is installed."""

    description = "build build/<python abi>/_cuda_emulated.so, which the tests load"

    def run(self) -> None:
        build_dir = build_folder()
        with locked(build_dir):
            self.compile(self.configure(build_dir), build_dir, ["_cuda_emulated"])


NOT_NATIVE = not_native()
if NOT_NATIVE:
    print(f"peftkern: no native kernels {NOT_NATIVE}: PyTorch's own operations serve")
# The field's name changed with setuptools 77, as did its spelling in pyproject.toml.
LICENSE = "license_expression" if int(setuptools.__version__.split(".")[0]) >= 77 else "license"
setup(
    **{LICENSE: "Apache-2.0"},
    ext_modules=[] if NOT_NATIVE else [Extension(name, sources=[]) for name in MODULES],
    cmdclass={"build_ext": CMakeBuild, "cuda_emulated": EmulatedCuda},
)
