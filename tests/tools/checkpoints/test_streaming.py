"""Files written piece by piece."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from peftkern.tools.checkpoints import streaming


@pytest.mark.skipif(sys.platform != "linux", reason="the call is Linux's")
def test_writing_back_begins_without_an_error_and_without_a_change(tmp_path: Path) -> None:
    assert (call := streaming._sync_file_range()) is not None
    with open(tmp_path / "file", "wb+") as file:
        file.write(b"x" * 10_000)
        file.flush()
        assert call(file.fileno(), 0, 8192, streaming._START_WRITING) == 0
        streaming.start_writeback(file.fileno(), 4096, 1 << 40)  # beyond the end
    assert (tmp_path / "file").read_bytes() == b"x" * 10_000
    read, write = os.pipe()
    streaming.start_writeback(write, 0, 1)  # what cannot be written back is no error
    os.close(read), os.close(write)
