"""Scripts of bench/ and examples/ in this process, which has imported already what they need."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys

import torch
from paths import ROOT


def run_here(script: str, *arguments: object) -> tuple[int, str, str]:
    """Run a script as `python script arguments` does; its exit status, output and complaints."""
    path, said = ROOT / script, (io.StringIO(), io.StringIO())
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)  # which benches set
    before = sys.argv, sys.path
    sys.argv, sys.path = [str(path), *map(str, arguments)], [str(path.parent), *sys.path]
    status = 0
    try:
        with contextlib.redirect_stdout(said[0]), contextlib.redirect_stderr(said[1]):
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as stop:
        status = stop.code or 0
    finally:
        sys.argv, sys.path = before
        torch.set_num_threads(threads)
        os.sched_setaffinity(0, cores)
    return status, *(stream.getvalue() for stream in said)
