"""Trust: what this machine has shown of every kernel, kept from run to run.

Nothing serves a user because it was fast and right somewhere else. A *program* (an op's kernel for
dtypes, shape classes and options) is right once its first result here agreed with torch in float32;
one that raised, erred or took the process down is demoted. A *class* of layers is ours once it was
timed here against PEFT's own forward and not slower. Until then the peer's path answers.

    auto      check and measure at first use, keep the verdicts in the user's cache folder
    readonly  the same, but write nothing
    off       check and measure nothing: what the cache does not trust does not serve
    always    kernels serve whatever they take, unchecked

`PEFTKERN_TRUST` picks the mode once per process, `use_mode` for the length of a block. Verdicts
belong to a fingerprint of device, versions and kernels; a change in any of them forgets them all.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from peftkern.backends import journal
from peftkern.backends.cpu import module as cpu
from peftkern.backends.device import device_info
from peftkern.formats.json_files import read_json

try:
    import fcntl
except ImportError:  # not POSIX: two processes that write at once may lose a verdict, no more
    fcntl = None

MODES = ("auto", "readonly", "off", "always")
RIGHT = "right"
OURS, PEER = "peftkern", "PEFT"
CHECKED_CALLS = (1, 10, 100, 1000)  # a tail or a rare shape may be the culprit
LOCK_SECONDS = 1.0  # that a write waits for another one: a stopped process must not stop this one
_PACKAGES = ("torch", "triton", "bitsandbytes", "peft")

_forced: str | None = None  # of the process: backward passes run in torch's own threads


def out_of_memory(error: BaseException) -> bool:
    """Return whether memory was short, which is no fault of a kernel; a CPU says so in words."""
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


class Distrusted(RuntimeWarning):
    """A kernel was demoted: it raised, gave a wrong result, or ended an earlier process."""


@functools.cache
def _mode_of_process() -> str:
    name = os.environ.get("PEFTKERN_TRUST") or "auto"
    if name not in MODES:
        raise ValueError(f"PEFTKERN_TRUST: expected one of {MODES}, got {name!r}")
    return name


def mode() -> str:
    """Return the mode in force.

    Raises: ValueError listing the modes if PEFTKERN_TRUST names none of them.
    """
    return _forced or _mode_of_process()


@contextlib.contextmanager
def use_mode(name: str) -> Iterator[None]:
    """Put a mode in force in this process for the length of a `with` block.

    Raises: ValueError listing the modes if there is none of that name.
    """
    if name not in MODES:
        raise ValueError(f"mode: expected one of {MODES}, got {name!r}")
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def cache_folder() -> Path:
    """Return the folder of the verdicts: $PEFTKERN_CACHE, or peftkern in the user's cache."""
    own = os.environ.get("PEFTKERN_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "peftkern"


@functools.cache
def fingerprint(device: torch.device) -> dict[str, Any]:
    """Return all that a verdict on this device depends on.

    The device and how much of it there is, the driver, the packages on both sides of a contest, and
    a hash of the kernels themselves.
    """
    info = device_info(device)
    found: dict[str, Any] = {"device": info.name, "type": info.type}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "capability": getattr(properties, "gcnArchName", None)
            or f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": _driver(device),
        }
    elif device.type == "cpu":
        module, _ = cpu.cpu_module()
        found |= {"isa": None if module is None else cpu.cpu_isa(), "threads": info.threads}
    for package in (*_PACKAGES, "peftkern"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["kernels"] = _hash_of_kernels()
    return found


def _driver(device: torch.device) -> str | None:
    if torch.version.hip:
        return torch.version.hip
    with contextlib.suppress(OSError):
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split("\n")[0]
    return torch.version.cuda


@functools.cache
def _hash_of_kernels() -> str:
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted([*package.glob("kernels/*.py"), *package.glob("_c*.so")]):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Ledger:
    """Verdicts about one device, in memory and in its file.

    programs: {program: RIGHT, or the reason for which it is demoted}.
    classes: {class: {"side": OURS or PEER or a back end, "ratio": ours over the peer's, ...}}.
    crossovers: {name: size}, as `peftkern tune` measured them; see `cpu/crossovers.py`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.programs: dict[str, str] = {}
        self.classes: dict[str, dict[str, Any]] = {}
        self.crossovers: dict[str, int] = {}
        self._lock = threading.Lock()
        self._unwritable = False
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # no permission: in memory
            self._read()
            found = journal.guilty(self.path.parent, self._name, self._writes())
            for program, reason in found.items():
                self.demote(program, reason)

    @functools.cached_property
    def path(self) -> Path:
        """File of this fingerprint."""
        return cache_folder() / "trust" / f"{self._name}.json"

    @functools.cached_property
    def _name(self) -> str:
        text = json.dumps(fingerprint(self.device), sort_keys=True)
        return f"{self.device.type}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def _read(self) -> None:
        programs, classes = verdicts(self.path)
        self.programs.update(programs)
        self.classes.update(classes)
        self.crossovers.update(crossovers(self.path))

    @contextlib.contextmanager
    def first_launch(self, program: str) -> Iterator[None]:
        """Let the next process know if a program takes this one down, or its context on a GPU."""
        with contextlib.ExitStack() as stack:
            if self._writes():
                try:
                    stack.enter_context(journal.launch(self.path.parent, self._name, program))
                except OSError:
                    self._unwritable = True
            try:
                yield
            finally:
                if _context_is_lost(self.device):  # then nobody answers, and no call demotes it
                    self.demote(program, "its first launch ended the context of the device")

    def demote(self, program: str, reason: str, *, keep: bool = True) -> None:
        """Record, loudly, that a program must not serve; keep: for later processes, too."""
        self.programs[program] = reason
        if keep:
            self._write("programs", program, reason)
        with contextlib.suppress(Distrusted):  # where warnings are errors, too
            warnings.warn(
                f"peftkern: {program} is demoted: {reason}. Another path serves; "
                "`peftkern doctor` lists it, `peftkern doctor --forget` tries again.",
                Distrusted,
                stacklevel=2,
            )

    def approve(self, program: str) -> None:
        """Record that a program was right."""
        if self.programs.get(program) != RIGHT:
            self.programs[program] = RIGHT
            self._write("programs", program, RIGHT)

    def decide(self, name: str, verdict: dict[str, Any], *, keep: bool = True) -> dict[str, Any]:
        """Record the verdict of a contest, or adopt the one that another rank was first with.

        Args: keep, for later processes, too. Ranks of another fingerprint have their own.
        """
        verdict = _agreed(f"{self._name}/{name}", verdict)
        self.classes[name] = verdict
        if keep:
            self._write("classes", name, verdict)
        return verdict

    def cross(self, name: str, size: int) -> None:
        """Record a crossover that was measured here."""
        self.crossovers[name] = size
        self._write("crossovers", name, size)

    def adopt(self, name: str) -> dict[str, Any] | None:
        """Return the verdict on a class: this machine's, or that of another rank."""
        verdict = self.classes.get(name)
        if verdict is None:
            verdict = _agreed(f"{self._name}/{name}", None)
            if verdict is not None:
                self.classes[name] = verdict
        return verdict

    def _writes(self) -> bool:
        return mode() == "auto" and not self._unwritable

    def _write(self, section: str, name: str, value: Any) -> None:
        """Add one verdict to the file: read, changed and replaced under a lock."""
        if not self._writes():
            return
        try:
            with self._lock, _file_lock(self.path):
                programs, classes = verdicts(self.path)
                kept = {"programs": programs, "classes": classes}
                kept["crossovers"] = crossovers(self.path)
                kept[section][name] = value
                _replace(self.path, {"fingerprint": fingerprint(self.device), **kept})
        except (OSError, RuntimeError):
            self._unwritable = True


def verdicts(path: Path) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Read the programs and classes of a file; nothing of one that is damaged or not there."""
    try:
        data = read_json(path)
        programs, classes = data["programs"], data["classes"]
        programs = {str(k): str(v) for k, v in programs.items()}
        classes = {str(k): v for k, v in classes.items() if isinstance(v["side"], str)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}, {}
    return programs, classes


def crossovers(path: Path) -> dict[str, int]:
    """Read the crossovers of a file; nothing of one that is damaged or not there."""
    try:
        found = {str(k): int(v) for k, v in read_json(path)["crossovers"].items()}
        return {name: size for name, size in found.items() if size >= 0}
    except (OSError, ValueError, OverflowError, LookupError, TypeError, AttributeError):
        return {}


def files() -> list[Path]:
    """Return the files of every fingerprint in the cache folder."""
    return sorted((cache_folder() / "trust").glob("*.json"))


def forget() -> int:
    """Remove every verdict and mark from the cache folder and this process; returns the files."""
    folder, verdicts_ = cache_folder() / "trust", files()
    rests = (path for suffix in (".lock", ".tmp") for path in folder.glob(f"*{suffix}"))
    for path in (*verdicts_, *rests, *journal.files(folder)):
        path.unlink(missing_ok=True)
    reset()
    return len(verdicts_)


_ledgers: dict[torch.device, Ledger] = {}
_listeners: list[Any] = []


def ledger(device: torch.device) -> Ledger:
    """Return the verdicts about a device."""
    found = _ledgers.get(device)
    if found is None:
        found = _ledgers.setdefault(device, Ledger(device))
    return found


def on_reset(function: Any) -> Any:
    """Register what keeps verdicts of its own in memory, to be called by `reset`."""
    _listeners.append(function)
    return function


def reset() -> None:
    """Forget what this process knows; the files stay, and are read again."""
    _ledgers.clear()
    fingerprint.cache_clear()
    for function in _listeners:
        function()


def _agreed(key: str, verdict: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the first verdict that any rank of the process group gave, this one's among them.

    It goes through the group's key-value store: nobody waits for a rank that meets other shapes.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return verdict
    store = torch.distributed.distributed_c10d._get_default_store()
    key = f"peftkern/trust/{key}"
    try:
        if verdict is not None:
            return json.loads(store.compare_set(key, "", json.dumps(verdict)))
        return json.loads(store.get(key)) if store.check([key]) else None
    except (RuntimeError, ValueError):  # a store without comparisons: each rank for itself
        return verdict


def _context_is_lost(device: torch.device) -> bool:
    """Return whether an error has left a GPU's context of no use to this process."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with open(path.with_suffix(".lock"), "a", encoding="utf-8") as file:
        begin = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - begin > LOCK_SECONDS:
                    break
                time.sleep(0.005)
        yield


def _replace(path: Path, data: dict[str, Any]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
