"""Parent side of the workers: start or fork them, query them, detect their end."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import IO

from peftkern.tools.bench import machine
from peftkern.tools.bench.record import OURS


class WorkerError(Exception):
    """Failure of a worker's command; the message is one line."""


class WorkerGoneError(WorkerError):
    """Crash of a worker, or its end for being too slow."""


class WorkerSlowError(WorkerGoneError):
    """Missed deadline of a worker, which would miss the next one, too."""


FORKED_END = 10.0  # seconds within which a killed worker ends


def _start(module: str, *arguments: str, **files: object) -> subprocess.Popen:
    """Start a module of this tree in a session of its own, so that its children can be stopped
    with it, and Ctrl-C reaches the parent alone."""
    path = [str(machine.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments, str(os.getpid())],
        env={"HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": os.pathsep.join(path)},
        start_new_session=True,
        **files,
    )


class Nursery:
    """The process that forks workers for a CPU: see `nursery`."""

    def __init__(self) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        self.requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            files = {"stdin": theirs, "stdout": self.log, "stderr": self.log}
            self.popen = _start("peftkern.tools.bench.nursery", **files)

    def ask(self, request: dict, files: list[int], deadline: float) -> dict:
        """Send a request; return its answer. Raises: WorkerGoneError if there is none."""
        began = time.monotonic()
        try:
            socket.send_fds(self.requests, [json.dumps(request).encode()], files)
            self.requests.settimeout(max(1e-3, deadline - began))
            if said := self.requests.recv(1 << 16):
                return json.loads(said)
            how = _last_words(self.popen.wait(), self.log)
        except TimeoutError:
            how = f"no answer within {time.monotonic() - began:.0f} s while importing"
        except OSError as error:
            how = str(error)
        self.stop()
        raise WorkerGoneError(how)

    def stop(self) -> None:
        """Kill it, which ends all that it has forked."""
        self.popen.kill()
        self.popen.wait()
        self.requests.close()
        self.log.close()

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None


class Forked:
    """A worker that a nursery has forked after importing some packages, as a subprocess.Popen."""

    def __init__(
        self, nursery: Nursery, name: str, packages: list[str], log: int, deadline: float
    ) -> None:
        self.nursery, self.status = nursery, None
        given, write = os.pipe()
        read, said = os.pipe()
        self.stdin, self.stdout = open(write, "wb"), open(read, "rb")  # noqa: SIM115
        try:
            request = {"fork": name, "packages": packages}
            self.pid = nursery.ask(request, [given, said, log], deadline)["pid"]
        except WorkerGoneError:
            self.stdin.close()
            self.stdout.close()
            raise
        finally:
            os.close(given)
            os.close(said)

    def wait(self) -> int:
        if self.status is None:
            try:
                asked = {"wait": self.pid}
                self.status = self.nursery.ask(asked, [], time.monotonic() + FORKED_END)["status"]
            except WorkerGoneError:
                self.status = -signal.SIGKILL  # with the nursery
        return self.status


class Process:
    """A running worker: that of this tool, or a `module` of another one; `fork(log)` starts it
    otherwise, writing its errors to that file."""

    def __init__(
        self,
        name: str,
        module: str = "peftkern.tools.bench.worker",
        fork: Callable[[int], Forked] | None = None,
    ) -> None:
        self.name = name
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        self.popen: subprocess.Popen | Forked
        if fork is not None:
            self.popen = fork(self.log.fileno())
        else:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
            self.popen = _start(module, name, **pipes)
        self.received = b""

    def send(self, do: str, **arguments: object) -> None:
        line = json.dumps({"do": do, **arguments}) + "\n"
        with contextlib.suppress(BrokenPipeError):  # `receive` reports the reason
            self.popen.stdin.write(line.encode())
            self.popen.stdin.flush()

    def receive(self, deadline: float, doing: str) -> dict:
        """Wait for the next answer.

        Raises: WorkerError if that is an error; WorkerGoneError if the process ended, or was
            stopped because the deadline (of time.monotonic) passed before it answered.
        """
        answers, errors = receive_all({self.name: self}, math.inf, deadline, doing)
        if errors:
            raise errors[self.name]
        return answers[self.name]

    def read(self) -> None:
        """Read the available bytes. Raises: WorkerGoneError at the end."""
        more = os.read(self.popen.stdout.fileno(), 1 << 20)
        if not more:
            how = _last_words(self.popen.wait(), self.log)
            self.stop()
            raise WorkerGoneError(how)
        self.received += more

    def answer(self) -> dict:
        """Parse the received answer. Raises: WorkerError if that is an error."""
        line, _, self.received = self.received.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def too_slow(self, began: float, doing: str) -> WorkerSlowError:
        self.stop()
        return WorkerSlowError(f"no answer within {time.monotonic() - began:.0f} s while {doing}")

    def ask(self, deadline: float, doing: str, do: str, **arguments: object) -> dict:
        self.send(do, **arguments)
        return self.receive(deadline, doing)

    def stop(self) -> None:
        """Kill the process and its children, in any state."""
        if self.popen.stdin.closed:
            return  # by an earlier call; its pid may be reused by now
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        for file in (self.popen.stdin, self.popen.stdout, self.log):
            with contextlib.suppress(BrokenPipeError):
                file.close()


def _last_words(status: int, log: IO[bytes]) -> str:
    """Describe how a process ended, with the error of its log if there is one."""
    log.seek(0)
    said = first_error(log.read().decode(errors="replace"))
    if status < 0:
        how = f"killed by {signal.Signals(-status).name}"
    else:
        how = f"ended with exit status {status}"
    return f"{how}: {said}" if said else how


def first_error(said: str) -> str:
    """Return the line of a log that names the error: of a traceback the last, else the first."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", line)]
    fatal = [line for line in lines if "fatal" in line.lower() or "terminate called" in line]
    return (fatal or named or lines or [""])[0][:300]


def ask_all(
    processes: dict[str, Process],
    patience: float,
    deadline: float,
    doing: str,
    do: str,
    **arguments: object,
) -> tuple[dict[str, dict], dict[str, WorkerError]]:
    """Send a command to all at once; return what `receive_all` does."""
    for process in processes.values():
        process.send(do, **arguments)
    return receive_all(processes, patience, deadline, doing)


def receive_all(
    processes: dict[str, Process], patience: float, deadline: float, doing: str
) -> tuple[dict[str, dict], dict[str, WorkerError]]:
    """Wait for an answer of each; return the answers, and the errors of those without one.

    When most have answered, OURS among them, those still busy are stopped after `patience` more
    seconds: then they are slow, not the machine, and there is something to measure. At the deadline
    they are stopped in any case.
    """
    answers: dict[str, dict] = {}
    errors: dict[str, WorkerError] = {}
    began, end = time.monotonic(), deadline
    with selectors.DefaultSelector() as selector:
        for name, process in processes.items():
            selector.register(process.popen.stdout, selectors.EVENT_READ, name)
        while waiting := len(processes) - len(answers) - len(errors):
            ours = OURS not in processes or OURS in answers or OURS in errors
            if end == deadline and ours and 2 * waiting < len(processes):
                end = min(deadline, time.monotonic() + patience)
            left = end - time.monotonic()
            events = selector.select(max(0.0, left))
            if not events and left <= 0:
                break
            for key, _ in events:
                process = processes[key.data]
                try:
                    process.read()
                    if b"\n" in process.received:
                        selector.unregister(key.fileobj)
                        answers[key.data] = process.answer()
                except WorkerError as error:
                    errors[key.data] = error
                    if isinstance(error, WorkerGoneError):
                        selector.unregister(key.fd)
    for name in processes.keys() - answers.keys() - errors.keys():
        errors[name] = processes[name].too_slow(began, doing)
    return answers, errors
