"""Journal of first launches: what a process leaves for the next one if a kernel ends it.

A mark lies in a folder while a program runs that was never right here; the next process reads it if
that one is gone. A crash has written into it, by `faulthandler`, and proves the program guilty. A
silent mark may be of a process that hung until it was killed, or of one that was killed from
outside meanwhile, by a scheduler or for its memory: it is noted, and the program runs once more.
Proof is a second one, of a launch that began after the first was noted. A launch that ends without
taking its process along clears the program. Crashes are silent where the user has `faulthandler`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

_MARK, _NOTED = ".first-launch-", ".ended-"


def files(folder: Path) -> Iterator[Path]:
    """Yield all that the journals in a folder consist of."""
    for part in (_MARK, _NOTED):
        yield from folder.glob(f"*{part}*")


@contextlib.contextmanager
def launch(folder: Path, name: str, program: str) -> Iterator[None]:
    """Leave a mark while a program runs that may take this process down.

    Args: name, of the journal. Raises: OSError if the folder cannot be written to.
    """
    pid, number = os.getpid(), _number(program)
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f"{name}{_MARK}{pid}-{number}"
    text = f"{platform.node()}\n{pid}\n{_started(pid)}\n{program}\n"
    mark.write_text(text, encoding="utf-8")
    try:
        with _crashes_written_to(mark):
            yield
    finally:
        for path in (mark, folder / f"{name}{_NOTED}{number}"):
            with contextlib.suppress(OSError):
                path.unlink()


@contextlib.contextmanager
def _crashes_written_to(mark: Path) -> Iterator[None]:
    if (
        faulthandler.is_enabled()
    ):  # what it writes to belongs to the user, and could not be put back
        yield
        return
    with open(mark, "a", encoding="utf-8") as file:
        faulthandler.enable(file, all_threads=False)
        try:
            yield
        finally:
            faulthandler.disable()


def guilty(folder: Path, name: str, keep: bool) -> dict[str, str]:
    """Return the programs that have ended earlier processes, each with what is known of that.

    Args: keep, whether to note what proves nothing, and to remove what has been read.
    """
    found: dict[str, str] = {}
    for mark in folder.glob(f"{name}{_MARK}*"):
        with contextlib.suppress(OSError, ValueError):  # one that was cut short says nothing
            host, pid, started, program, said = mark.read_text(encoding="utf-8").split("\n", 4)
            since = mark.stat().st_mtime
            if host != platform.node() or _alive(int(pid), started, since):
                continue
            noted = folder / f"{name}{_NOTED}{_number(program)}"
            again = noted.exists() and noted.stat().st_mtime < since
            if said or again:
                how = said.strip().split("\n")[0] if said else "for the second time"
                found[program] = f"an earlier process ended during its first launch ({how})"
            if keep:
                if not noted.exists():
                    noted.touch()
                mark.unlink(missing_ok=True)
    for program in found if keep else ():
        (folder / f"{name}{_NOTED}{_number(program)}").unlink(missing_ok=True)
    return found


def accuse(folder: Path, pid: int, reason: str) -> None:
    """Write into the marks of a process for what its launch was ended."""
    for mark in folder.glob(f"*{_MARK}{pid}-*"):
        with contextlib.suppress(OSError), open(mark, "a", encoding="utf-8") as file:
            file.write(reason)


def _number(program: str) -> str:
    return hashlib.sha256(program.encode()).hexdigest()[:16]


def _started(pid: int) -> str:
    """Return what tells a process from a later one of its number; "" if it does not run."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        return stat.rpartition(")")[2].split()[19]  # clock ticks from boot to its start
    except OSError:
        return ""


def _alive(pid: int, started: str, since: float) -> bool:
    """Return whether the process of a mark still runs."""
    if not os.path.isdir("/proc/self"):  # nothing to ask: as long as a first launch may take
        return time.time() - since < 600.0
    return started != "" and _started(pid) == started
