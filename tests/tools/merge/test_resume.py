"""A merge that was killed: nothing looks finished, and the next run ends with the same bytes."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoint_folders import contents
from merged_folders import make_model, merge, save_adapter, save_both
from processes import killed

from peftkern.tools.adapters import read_adapter
from peftkern.tools.checkpoints.checkpoint import CheckpointError, read_checkpoint
from peftkern.tools.checkpoints.staging import FILES, WORK
from peftkern.tools.merge.merge import MANIFEST, merge_checkpoint
from peftkern.tools.merge.plan import Options

EVENTS = ("pwrite", "copy_file_range", "replace", "fsync", "ftruncate", "unlink")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A base of three shards, with a file beside them, and an adapter."""
    config = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}
    model = make_model(num_hidden_layers=1)
    base, adapter = save_both(tmp_path, model, shards="40KB", **config)
    (base / "tokenizer.json").write_text("{}")
    return base, adapter


def killed_at(number: int, run: Callable[[], Any]) -> bool:
    """Run in a child that is killed at that event, half of its bytes written; was it?"""
    count = itertools.count()

    def dying(name: str, function: Any) -> Any:
        def event(*arguments: Any, **keywords: Any) -> Any:
            if next(count) == number:
                if name == "pwrite":
                    file, data, offset = arguments
                    function(file, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return event

    def run_until_then() -> None:
        for name in EVENTS:
            setattr(os, name, dying(name, getattr(os, name)))
        run()

    return killed(run_until_then)


def test_killed_anywhere_it_goes_on_to_the_same_bytes(tmp_path: Path, folders) -> None:
    merge(*folders, to=tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    resumed = set()
    for number in itertools.count(0, 3):
        out = tmp_path / f"out{number}"
        if not killed_at(number, lambda out=out: merge(*folders, to=out)):
            break
        # Everything is there, or no config by which it would be loaded.
        there = {n: d for n, d in contents(out).items() if not n.startswith(".peftkern-")}
        assert there == whole or "config.json" not in there
        resumed.add(merge(*folders, to=out, force="config.json" in there).resumed)
        assert contents(out) == whole
    assert number > 20 and resumed >= {0, 1, 2}


def test_full_disk_leaves_what_can_be_resumed(tmp_path: Path, folders, monkeypatch) -> None:
    """Also where it is met by a tensor that is copied."""
    out, write = tmp_path / "out", os.pwrite
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def copy(*arguments: Any) -> int:
        raise full

    def written(file: int, data: Any, offset: int) -> int:
        if isinstance(data, bytes) and offset:  # of a copy, behind the header
            raise full
        return write(file, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "copy_file_range", copy)
        patch.setattr(os, "pwrite", written)
        with pytest.raises(OSError, match="No space left"):
            merge(*folders, to=out)
    assert (out / WORK / FILES).exists()
    merge(*folders, to=out)
    merge(*folders, to=tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def stop_after_first_file(base: Path, adapter: Path, out: Path) -> None:
    seen: list[str] = []

    def stopping(count: int, name: str) -> None:
        seen.append(name)
        if (out / WORK / MANIFEST).exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(base, adapter, to=out, progress=stopping)
    assert [path.name for path in out.iterdir()] == [WORK]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest", "junk", "note"])
def test_what_was_changed_since_is_written_again(tmp_path: Path, folders, damage: str) -> None:
    out = tmp_path / "out"
    merge(*folders, to=tmp_path / "whole")
    stop_after_first_file(*folders, out)
    manifest = out / WORK / MANIFEST
    notes = json.loads(manifest.read_text())
    first = out / WORK / FILES / next(iter(notes))
    data = first.read_bytes()
    if damage == "flip":
        first.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "truncate":
        os.truncate(first, len(data) // 2)
    elif damage == "delete":
        first.unlink()
    elif damage == "manifest":
        os.truncate(manifest, 40)
    elif damage == "junk":
        manifest.write_text('{"a": 3, "b": {"state": [1, 2], "changes": {"c": [1]}}}')
    else:
        first.write_bytes(data)
    assert merge(*folders, to=out).resumed == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_unfinished_run_with_other_options_or_adapters(tmp_path: Path, folders) -> None:
    """It is named, and by force started over."""
    base, adapter = folders
    out, other = tmp_path / "out", tmp_path / "other"
    stop_after_first_file(base, adapter, out)
    before = contents(out)
    save_adapter(other, make_model(num_hidden_layers=1), seed=6, target_modules=["q_proj"])
    for arguments, options, words in (
        ([adapter], {"out": "fp32"}, "out keep, not fp32"),
        ([other], {}, "another set of adapters"),
        ([adapter, other], {}, "another set of adapters"),
    ):
        with pytest.raises(CheckpointError, match=words):
            merge(base, *arguments, to=out, **options)
    assert contents(out) == before
    assert merge(base, other, to=out, force=True).resumed == 0
    merge(base, other, to=tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_unfinished_run_with_other_scaling(tmp_path: Path, folders) -> None:
    """Of the same tensors and the same config: a file of another format brings it itself."""
    base, path = folders
    out = tmp_path / "out"
    stop_after_first_file(base, path, out)
    adapter, checkpoint = read_adapter(path), read_checkpoint(base)
    updates = {k: replace(u, scaling=u.scaling * 2) for k, u in adapter.updates.items()}
    other = replace(adapter, updates=updates)
    with pytest.raises(CheckpointError, match="another set of adapters"):
        merge_checkpoint(checkpoint, [(other, 1.0)], out, Options())


def test_base_that_changes_while_it_is_read(tmp_path: Path, folders) -> None:
    base, adapter = folders
    first = next(base.glob("*.safetensors"))
    for change in (os.utime, lambda path: os.truncate(path, 300)):
        touched = iter([change])

        def once(count: int, name: str, touched: Any = touched) -> None:
            for one in touched:
                one(first)

        copy = tmp_path / "copy"
        shutil.copytree(base, copy)
        with pytest.raises(CheckpointError, match="changed while it was read"):
            merge(base, adapter, to=tmp_path / "out", progress=once)
        assert not (tmp_path / "out").exists()
        shutil.rmtree(base)
        shutil.move(copy, base)
