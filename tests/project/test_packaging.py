"""What is built and shipped: the generated table, one ISA per object, the module, the archives."""

from __future__ import annotations

import email
import importlib.util
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from building import KERNEL_OBJECTS, libraries, run, run_checked, symbols
from paths import ROOT

from peftkern.formats.nf4 import nf4_midpoints
from peftkern.formats.table import E2M1_CODE, FP4_CODE, NF4_CODE, UINT4_CODE

GENERATOR = ROOT / "csrc" / "generate_nf4_table.py"
TABLE = ROOT / "peftkern" / "formats" / "table.py"
x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="these ISAs are x86-64's")


# ---- the generated header


def float32_bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def header_bits(text: str, name: str) -> list[int]:
    body = re.search(rf"constexpr float {name}\[\d+\] = {{(.*?)}};", text, re.DOTALL).group(1)
    return [float32_bits(float.fromhex(v)) for v in re.findall(r"(\S+)f,", body)]


def test_generated_header_equals_python_table(tmp_path):
    run_checked(sys.executable, GENERATOR, TABLE, tmp_path / "table.h")
    text = (tmp_path / "table.h").read_text()
    code = [struct.unpack("<f", struct.pack("<f", value))[0] for value in NF4_CODE]
    midpoints = [(low + high) / 2 for low, high in itertools.pairwise(code)]
    assert header_bits(text, "kNF4Code") == [float32_bits(value) for value in code]
    for name, values in (
        ("kFP4Code", FP4_CODE),
        ("kE2M1Code", E2M1_CODE),
        ("kUInt4Code", UINT4_CODE),
    ):
        assert header_bits(text, name) == [float32_bits(value) for value in values]
    assert header_bits(text, "kNF4Midpoint") == [float32_bits(value) for value in midpoints]
    # what the reference quantizes with
    assert header_bits(text, "kNF4Midpoint") == [float32_bits(v) for v in nf4_midpoints()]


@pytest.mark.parametrize(
    "source", ["X = 1", "NF4_CODE = (0.0, 1.0)", f"NF4_CODE = {tuple(range(15, -1, -1))}"]
)
def test_generator_refuses_a_broken_table(tmp_path, source):
    (tmp_path / "table.py").write_text(source)
    answer = run(sys.executable, GENERATOR, tmp_path / "table.py", tmp_path / "table.h")
    assert answer.returncode != 0
    assert "NF4_CODE" in answer.stderr
    assert not (tmp_path / "table.h").exists()


# ---- one instruction set per object file


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> dict[str, Path]:
    """Object files of the kernels by stem, brought up to date."""
    target = tmp_path_factory.mktemp("lib")
    run_checked(sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", target)
    folder = ROOT / "build" / sysconfig.get_config_var("SOABI") / KERNEL_OBJECTS
    sources = {path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp")} - {"bind"}
    found = {path.name.split(".")[0]: path for path in folder.glob("*.o")}
    assert sources <= set(found)
    return {stem: found[stem] for stem in sorted(sources)}


def isa_of(stem: str) -> str:
    match = re.search(r"_(avx2|avx512|avx512_bf16|amx)$", stem)
    return match.group(1) if match else "plain"


def features(path: Path) -> set[str]:
    """Which of the instruction-set markers the code of an object file contains."""
    markers = {
        "tile": r"%tmm\d",
        "bf16": r"\bv(dpbf16ps|cvtne2?ps2?2?bf16)",
        "avx512": r"%zmm\d|%k[0-7]\b|%[xy]mm(1[6-9]|2\d|3[01])\b",
        "avx": r"^\s*[0-9a-f]+:\s+v[a-z]",
    }
    text = run_checked("objdump", "-d", "--no-show-raw-insn", path)
    return {name for name, pattern in markers.items() if re.search(pattern, text, re.MULTILINE)}


@x86_only
def test_each_object_file_uses_only_its_instruction_set(objects):
    allowed = {
        "plain": set(),
        "avx2": {"avx"},
        "avx512": {"avx", "avx512"},
        "avx512_bf16": {"avx", "avx512", "bf16"},
        "amx": {"avx", "avx512", "bf16", "tile"},
    }
    used = {stem: features(path) for stem, path in objects.items()}
    excess = {stem: found - allowed[isa_of(stem)] for stem, found in used.items()}
    assert {stem: found for stem, found in excess.items() if found} == {}
    for isa, marker in [("avx2", "avx"), ("avx512", "avx512"), ("avx512_bf16", "bf16")]:
        assert any(marker in used[stem] for stem in used if isa_of(stem) == isa), isa


@x86_only
def test_isa_object_files_share_no_function(objects):
    """A weak function (an inline one, a template) of an AVX-512 file could replace everybody's."""
    weak = {
        stem: [line for line in symbols(path) if re.search(r" [Wu] ", line)]
        for stem, path in objects.items()
        if isa_of(stem) != "plain"
    }
    assert weak
    assert {stem: lines for stem, lines in weak.items() if lines} == {}


@x86_only
def test_each_isa_object_file_exports_its_table_alone(objects):
    for stem, path in objects.items():
        if isa_of(stem) != "plain" or stem == "isa_scalar":
            exported = [line for line in symbols(path) if re.search(r" [BDRT] ", line)]
            (table,) = exported
            assert re.search(r" [RD] peftkern::k\w+Kernels$", table)


# ---- the module


@pytest.fixture(scope="module")
def module_path() -> Path:
    from peftkern import _cpu

    return Path(_cpu.__file__)


def test_module_links_only_system_libraries(module_path):
    """And no OpenMP: auditwheel would pack a copy of it into the wheel."""
    system = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libpthread.so.0", "libdl.so.2"}
    needed = libraries(module_path)
    assert {"libc.so.6"} <= needed <= system | {"libc.so.6", "ld-linux-x86-64.so.2"}


def test_module_exports_only_its_init_function(module_path):
    exported = [line.split(maxsplit=2)[2] for line in symbols(module_path, "-D")]
    assert "PyInit__cpu" in exported
    assert [name for name in exported if "peftkern" in name] == []


# ---- the archives


def test_sdist_holds_what_a_build_needs(tmp_path):
    run_checked(
        *(sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path),
        *("sdist", "--dist-dir", tmp_path),
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        members = {m.name.partition("/")[2]: m for m in tar.getmembers()}
    wanted = ["CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"]
    wanted += ["peftkern/kernels/NUMERICS.md"]  # a file below a real folder, no longer a link
    for folder in ("csrc", "peftkern"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".cpp", ".h", ".py", ".cu", ".cuh"}:
                wanted.append(path.relative_to(ROOT).as_posix())
    wanted += [f"peftkern/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").glob("*.*")]
    templates = ROOT / "peftkern/tools/templates"
    wanted += [path.relative_to(ROOT).as_posix() for path in templates.iterdir()]
    assert set(wanted) - set(members) == set()
    assert all(members[name].isfile() for name in wanted)
    assert not any(name.endswith(".so") for name in members)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run_checked(
        *(sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", folder),
        *("build", "--build-base", folder / "build", "bdist_wheel", "--dist-dir", folder),
    )
    (archive,) = folder.glob("*.whl")
    return archive


def test_wheel_holds_the_package_only(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert f"peftkern/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}" in names
    assert {"peftkern/kernels/NUMERICS.md", "peftkern/py.typed"} <= names
    assert {p.relative_to(ROOT).as_posix() for p in (ROOT / "peftkern").rglob("*.py")} <= names
    assert {f"peftkern/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").glob("*.*")} <= names
    templates = ROOT / "peftkern/tools/templates"
    assert {path.relative_to(ROOT).as_posix() for path in templates.iterdir()} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"peftkern"}


def test_wheel_takes_the_torch_that_is_there(wheel):
    """Any build of 2.8 or newer satisfies it: pip replaces no CPU build by one for CUDA."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        told = email.message_from_bytes(archive.read(name))
    assert "torch>=2.8" in told.get_all("Requires-Dist")
    assert [one for one in told.get_all("Requires-Dist") if "nvidia" in one] == []
    assert (told["License-Expression"] or told["License"]) == "Apache-2.0"
    assert "Typing :: Typed" in told.get_all("Classifier")


ONE_OPENMP = """
import pathlib, re, torch, peftkern
torch.set_num_threads(2)
w = peftkern.quantize_nf4(torch.randn(256, 256))
peftkern.nf4_linear(torch.randn(64, 256), w)
assert {name for _, name in peftkern.stats().calls} == {"cpu"}, peftkern.stats()
maps = pathlib.Path("/proc/self/maps").read_text()
print(peftkern.__file__)
print(*set(re.findall("/.*/lib(?:gomp|omp|iomp5)[-.].*", maps)), sep="\\n")
"""


def test_published_wheel_brings_no_second_openmp(wheel, tmp_path):
    """As `ci/wheels.sh` packs it: torch's runtime has threads, another would have some more."""
    pytest.importorskip("auditwheel", reason="of `make wheel`")
    options = ("--exclude", "libgomp.so.1", "--wheel-dir", tmp_path)
    run_checked(sys.executable, "-m", "auditwheel", "repair", *options, wheel)
    (archive,) = tmp_path.glob("*manylinux*.whl")
    names = zipfile.ZipFile(archive).namelist()
    assert [name for name in names if ".libs/" in name] == []
    zipfile.ZipFile(archive).extractall(tmp_path / "site")
    path = str(tmp_path / "site")
    answer = run(sys.executable, "-c", ONE_OPENMP, cwd=tmp_path, PYTHONPATH=path)
    assert answer.returncode == 0, answer.stderr
    package, *runtimes = answer.stdout.splitlines()
    assert package.startswith(path) and len(runtimes) == 1, answer.stdout


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The programs of an environment with the wheel, and with the packages of this one.

    A line of a .pth file is a folder alone: peftkern's own development install is not among them.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    (site / "packages.pth").write_text(sysconfig.get_path("purelib"))
    options = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
    options += ("--no-compile",)
    run_checked(
        *(sys.executable, "-m", "pip", "--python", folder / "bin" / "python"),
        *("install", *options, wheel),
    )
    return folder / "bin"


def test_readme_is_true_of_a_wheel_where_there_is_no_compiler(installed, tmp_path):
    """Its code runs as it is pasted, kernels trusted by what they do there; doctor is content."""
    clean = {"PATH": str(installed), "PYTHONPATH": "", "PEFTKERN_CACHE": str(tmp_path / "cache")}
    assert shutil.which("cc", path=clean["PATH"]) is None
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 15
    code += "print(peftkern.__file__)\n"
    (tmp_path / "pasted.py").write_text(code)
    trust = {"PEFTKERN_TRUST": "auto"}
    done = run(installed / "python", "pasted.py", cwd=tmp_path, **clean, **trust)
    assert done.returncode == 0, done.stderr
    assert "14 patched" in done.stdout and "nf4_lora_linear_backward" in done.stdout
    assert done.stdout.splitlines()[-1].startswith(str(installed.parent))
    done = run(installed / "peftkern", "doctor", cwd=tmp_path, **clean)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ": healthy" in done.stdout.splitlines()[0]


# ---- building on other machines: a small project under the same CMakeLists.txt and setup.py


@pytest.fixture
def project(tmp_path) -> Path:
    for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "csrc/generate_nf4_table.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    files = {
        "README.md": "",
        "peftkern/__init__.py": '__version__ = "0"',
        "peftkern/formats/table.py": TABLE.read_text(),
        "csrc/cpu/bind.cpp": 'extern "C" int PyInit__cpu() { return 0; }',
        "csrc/cpu/sum.cpp": '#include "peftkern/nf4_table.h"\nfloat sum() { return PEFTKERN_X86; }',
        "csrc/cpu/sum_avx2.cpp": "#include <immintrin.h>\n__m256 a;",
        "csrc/cpu/sum_amx.cpp": "#include <immintrin.h>\nvoid b() { _tile_dpbf16ps(0, 1, 2); }",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def build(project: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=project, **env)


def compile_commands(project: Path) -> dict[str, str]:
    """By "cpu/sum.cpp"."""
    (path,) = project.glob("build/*/compile_commands.json")
    entries = json.loads(path.read_text())
    return {"/".join(Path(e["file"]).parts[-2:]): e["command"] for e in entries}


def test_first_compiler_error_ends_the_output(project):
    (project / "csrc/cpu/bind.cpp").write_text("#include <no_such_header.h>")
    answer = build(project)
    assert answer.returncode != 0
    last = "\n".join(answer.stderr.splitlines()[-8:])
    assert re.search(r"bind\.cpp:1:\d+: fatal error: no_such_header\.h", last), answer.stderr


def test_everything_that_is_missing_is_named_at_once(project):
    """On a Python that has setuptools and nothing else."""
    venv.create(project / "venv")
    (project / "site").mkdir()
    for package in ("setuptools", "_distutils_hack"):
        (folder,) = importlib.util.find_spec(package).submodule_search_locations
        (project / "site" / package).symlink_to(folder)
    tools = {"PATH": str(project / "venv/bin"), "PYTHONPATH": str(project / "site")}
    answer = run(project / "venv/bin/python", "setup.py", "build_ext", cwd=project, **tools)
    assert answer.returncode != 0
    assert re.search(
        r"^error: building peftkern needs cmake >= 3\.18 \(`pip install cmake`\), "
        r"ninja \(`pip install ninja`\), (pybind11 \(`pip install pybind11`\), )?"
        r"a C\+\+ compiler \(`apt install g\+\+`\)$",
        answer.stderr,
        re.MULTILINE,
    ), answer.stdout + answer.stderr


def test_what_cannot_build_gets_one_line(project):
    """A compiler that CXX names and that is not there."""
    answer = build(project, CXX="/nowhere/g++ -m64")
    assert answer.returncode != 0
    assert last_lines(answer).endswith(
        "error: building peftkern needs a C++ compiler (`apt install g++`); CXX is /nowhere/g++"
    )


@pytest.mark.parametrize(
    "hidden",
    [
        "sys.modules['fcntl'] = None",
        "sys.platform = 'darwin'",
        "import os; os.environ['PEFTKERN_NATIVE'] = '0'",
    ],
)
def test_a_notice_takes_the_place_of_native_modules(project, hidden):
    """As on Windows, which has no fcntl, on macOS, which has it, and where they are not wanted."""
    code = (
        f"import runpy, setuptools, setuptools.command.bdist_wheel, sys, sysconfig; {hidden}\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    answer = run(sys.executable, "-c", code, "bdist_wheel", cwd=project)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert re.search(
        "^peftkern: no native kernels (on|with) .*: PyTorch's own", answer.stdout, re.M
    )
    (archive,) = (project / "dist").iterdir()
    assert archive.name == "peftkern-0-py3-none-any.whl"
    names = zipfile.ZipFile(archive).namelist()
    assert "peftkern/__init__.py" in names and not any("_cpu" in name for name in names)
    answer = run(sys.executable, "-c", code, "cuda_emulated", cwd=project)
    assert answer.returncode != 0
    assert last_lines(answer).splitlines()[-1].startswith("error: no native modules are built ")


def test_native_modules_that_are_not_wanted_leave_nothing_behind(project):
    for name in ("_cpu", "_cuda"):
        file = f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
        (project / "peftkern" / file).write_text("of an earlier build")
    answer = build(project, PEFTKERN_NATIVE="0", CXX="/nowhere/g++")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert built(project) == set()
    answer = build(project, PEFTKERN_NATIVE="no")
    assert answer.returncode != 0
    assert last_lines(answer) == "error: PEFTKERN_NATIVE: expected 0 or 1, got 'no'"


@x86_only
def test_compiler_without_amx_leaves_amx_out(project):
    compiler = project / "old-compiler"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *-mamx*) echo "unknown option -mamx-tile" >&2; exit 1;; esac\n'
        'exec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    answer = build(project, CXX=str(compiler))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "cannot build amx" in answer.stdout
    commands = compile_commands(project)
    assert "cpu/sum_amx.cpp" not in commands
    assert "-mavx2" in commands["cpu/sum_avx2.cpp"]
    assert "-DPEFTKERN_HAVE_AMX=0" in commands["cpu/sum.cpp"]
    assert "-DPEFTKERN_HAVE_AVX2=1" in commands["cpu/sum.cpp"]


def test_other_processor_builds_the_plain_files(project):
    answer = build(project, CMAKE_ARGS="-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    commands = compile_commands(project)
    assert set(commands) == {"cpu/bind.cpp", "cpu/sum.cpp"}
    assert "-DPEFTKERN_X86=0" in commands["cpu/sum.cpp"]
    assert "-mavx" not in commands["cpu/sum.cpp"]


# ---- CUDA in that small project


@pytest.fixture
def cuda_project(project) -> Path:
    """The small project with kernels: one for every architecture, one for 90a alone."""
    files = {
        "bind.cpp": """
            extern "C" int count();
            extern "C" __attribute__((visibility("default"))) int PyInit__cuda() { return count(); }
            const char* names = PEFTKERN_CUDA_ARCHITECTURES;
        """,
        "one.cu": """
            #include <peftkern/nf4_table.h>
            __global__ void kernel(float* p) { *p = 1; }
            extern "C" int count() {
              int n = 0;
              kernel<<<1, 1>>>(nullptr);
              return cudaGetDeviceCount(&n) == cudaSuccess ? n : 0;
            }
        """,
        "two_sm90a.cu": """
            __global__ void fence() { asm volatile("wgmma.fence.sync.aligned;"); }
        """,
    }
    (project / "csrc/cuda").mkdir()
    for name, text in files.items():
        (project / "csrc/cuda" / name).write_text(text)
    for name in ("base", "nf4_checks"):
        (project / f"csrc/cpu/{name}.cpp").touch()
    return project


def compilers_of_cuda() -> list[Path]:
    folders = [*os.environ["PATH"].split(os.pathsep), "/usr/local/cuda/bin"]
    return [Path(folder) / "nvcc" for folder in folders if (Path(folder) / "nvcc").exists()]


def no_nvcc() -> dict[str, str]:
    """The environment in which CMake finds none."""
    ignored = ";".join(str(path.parent) for path in compilers_of_cuda())
    unset = dict.fromkeys(("CUDACXX", "CUDA_HOME", "CUDA_PATH"), "")
    return {**unset, "CMAKE_ARGS": shlex.join([f"-DCMAKE_IGNORE_PATH={ignored}"])}


needs_nvcc = pytest.mark.skipif(not compilers_of_cuda(), reason="needs nvcc")


def built(project: Path) -> set[str]:
    return {path.name.split(".")[0] for path in (project / "peftkern").glob("*.so")}


def last_lines(answer: subprocess.CompletedProcess[str]) -> str:
    return " ".join("\n".join(answer.stderr.splitlines()[-14:]).split())


def test_cuda_without_its_compiler(cuda_project):
    """In one folder, where CMake asks the compiler once."""
    for wanted, status, says, modules in (
        ("1", 1, "PEFTKERN_CUDA=1: found no nvcc on PATH, in CUDA_HOME or in", set()),
        ("yes", 1, "PEFTKERN_CUDA: expected 0, 1 or auto, got 'yes'", set()),
        ("", 0, "peftkern: built _cpu; PEFTKERN_CUDA=1 builds CUDA's kernels, too", {"_cpu"}),
        ("auto", 0, "peftkern: no CUDA kernels: found no nvcc", {"_cpu"}),
    ):
        answer = build(cuda_project, PEFTKERN_CUDA=wanted, **no_nvcc())
        assert answer.returncode == status, answer.stdout + answer.stderr
        assert says in (last_lines(answer) if status else answer.stdout)
        assert built(cuda_project) == modules
    # what is not wanted leaves nothing behind
    name = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    (cuda_project / "peftkern" / name).write_text("of an earlier build")
    answer = build(cuda_project, PEFTKERN_CUDA="0")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert built(cuda_project) == {"_cpu"} and "nvcc" not in answer.stdout


@needs_nvcc
def test_cuda_is_not_built_because_nvcc_happens_to_be_here(cuda_project):
    answer = build(cuda_project, PEFTKERN_CUDA="")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert built(cuda_project) == {"_cpu"}


@pytest.mark.parametrize(
    ("wanted", "version", "compiles", "complaint"),
    [
        ("auto", "11.8", "true", "is 11.8, older than 12.0"),
        ("1", "12.4", "echo 'error: unsupported GNU version!'; exit 1", "error: unsupported GNU"),
    ],
)
def test_unusable_nvcc(cuda_project, version, compiles, complaint, wanted):
    nvcc = cuda_project / "nvcc"
    nvcc.write_text(
        f"""#!/bin/sh
        case "$*" in
          --version) echo "Cuda compilation tools, release {version}, V{version}.99";;
          --list-gpu-arch) printf 'compute_80\\ncompute_90\\n';;
          *) {compiles};;
        esac
        """
    )
    nvcc.chmod(0o755)
    answer = build(cuda_project, PEFTKERN_CUDA=wanted, CUDACXX=str(nvcc))
    if wanted == "1":
        assert answer.returncode != 0
        assert "PEFTKERN_CUDA=1: " in last_lines(answer) and complaint in last_lines(answer)
    else:
        assert answer.returncode == 0, answer.stdout + answer.stderr
        notice = next(line for line in answer.stdout.splitlines() if "no CUDA kernels" in line)
        assert complaint in notice
        assert built(cuda_project) == {"_cpu"}


@needs_nvcc
def test_unknown_architecture_is_named(cuda_project):
    for arch in ("70a", "sm_80", "80a", "90a-real"):  # an error even where a missing nvcc is none
        answer = build(cuda_project, PEFTKERN_CUDA="auto", PEFTKERN_CUDA_ARCHS=f"80;{arch}")
        assert answer.returncode != 0
        message = last_lines(answer)
        assert f"PEFTKERN_CUDA_ARCHS: nvcc does not know '{arch}', but" in message
        assert " 80 " in message


@needs_nvcc
def test_architectures_become_options_of_each_file(cuda_project):
    answer = build(cuda_project, PEFTKERN_CUDA="1", PEFTKERN_CUDA_ARCHS="80;90a")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert built(cuda_project) == {"_cpu", "_cuda"}
    assert "peftkern: built _cpu and _cuda\n" in answer.stdout
    commands = compile_commands(cuda_project)
    targets = {name: re.findall(r"-gencode[= ]\S*code=(\w+)", commands[name]) for name in commands}
    assert targets["cuda/one.cu"] == ["sm_80", "sm_90a", "compute_80"]
    assert targets["cuda/two_sm90a.cu"] == ["sm_90a"]
    assert "sm_80 sm_90a compute_80" in commands["cuda/bind.cpp"]
    (module,) = (cuda_project / "peftkern").glob("_cuda*.so")
    needed = set(re.findall(r"NEEDED\s+(\S+)", run_checked("objdump", "-p", module)))
    assert not any("cuda" in name for name in needed)
    exported = {line.split(maxsplit=2)[2] for line in symbols(module, "-D")}
    assert "PyInit__cuda" in exported
    assert not any("cuda" in name for name in exported - {"PyInit__cuda"})
    # without 90a its file is not compiled, and the next build without CUDA removes the module
    answer = build(cuda_project, PEFTKERN_CUDA="1", PEFTKERN_CUDA_ARCHS="80")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "cuda/two_sm90a.cu" not in compile_commands(cuda_project)
    assert build(cuda_project, PEFTKERN_CUDA="0").returncode == 0
    assert built(cuda_project) == {"_cpu"}


@needs_nvcc
def test_first_error_of_nvcc_ends_the_output(cuda_project):
    (cuda_project / "csrc/cuda/one.cu").write_text("__global__ int wrong() { return 0; }")
    answer = build(cuda_project, PEFTKERN_CUDA="1", PEFTKERN_CUDA_ARCHS="80")
    assert answer.returncode != 0
    assert "one.cu(1): error: a __global__ function must have" in last_lines(answer)
