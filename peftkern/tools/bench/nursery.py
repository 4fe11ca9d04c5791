"""Process that workers are forked from: `python -m peftkern.tools.bench.nursery PARENT`.

It imports what they need once, so that a worker starts at once, and another in the place of one
that was stopped. Requests come as JSON through the socket that is its standard input:

    {"fork": name, "packages": [...]}, with the worker's standard input, output and error -> {"pid"}
    {"wait": pid}                      -> {"status"}: as subprocess.Popen.returncode

It computes nothing: a fork of a process that has OpenMP's threads would wait for them forever. Nor
is it for CUDA, which a fork cannot use after its parent has.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import sys

from peftkern.tools.bench.worker import Worker, answer, die_with

FILES = 3  # of a worker: standard input, output, error


def serve(parent: int) -> None:
    """Answer requests until the other end is closed; in a forked worker, its commands."""
    die_with(parent)
    requests, own = socket.socket(fileno=os.dup(0)), os.getpid()
    while True:
        text, files, *_ = socket.recv_fds(requests, 1 << 16, FILES)
        if not text:
            return
        asked = json.loads(text)
        if "wait" in asked:
            status = os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1])
            requests.send(json.dumps({"status": status}).encode())
            continue
        for package in asked["packages"]:
            with contextlib.suppress(BaseException):  # the worker tries again, and reports it
                importlib.import_module(package)
        if not (pid := os.fork()):
            os.setpgid(0, 0)
            requests.close()
            for number, file in enumerate(files):
                os.dup2(file, number)
                os.close(file)
            return answer(Worker(asked["fork"]), own)
        with contextlib.suppress(OSError):  # it is over, or has done so itself
            os.setpgid(pid, pid)
        for file in files:
            os.close(file)
        requests.send(json.dumps({"pid": pid}).encode())


if __name__ == "__main__":
    os.environ.setdefault("PEFTKERN_TRUST", "always")  # kernels are what is measured
    serve(int(sys.argv[1]))
