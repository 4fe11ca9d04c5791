"""Interruptions, damage and destinations: a checkpoint is there whole, or not at all."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoint_folders import contents
from quantized_folders import FILES_OF_SMALL, SMALL, convert_small, refused, stopped

from peftkern.tools.checkpoints import staging
from peftkern.tools.checkpoints.staging import FILES, WORK
from peftkern.tools.quantize.quantized_checkpoint import MANIFEST

BESIDE = {  # what is copied; test_companions.py has the layouts of repositories
    *("tokenizer.json", "LICENSE", "USE_POLICY", "additional_chat_templates/tools.jinja"),
    *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
}
NOT_BESIDE = {".gitattributes", ".git/", "original/consolidated.00.pth", "pytorch_model.bin"}


OF_FILES = dict(zip(FILES_OF_SMALL, (1, 1, 5), strict=True))  # tensors of SMALL


def add_files(folder: Path, names: set[str]) -> None:
    for name in names:
        path = folder / (f"{name}file" if name.endswith("/") else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")


def test_files_and_folders_are_there_whole_or_not_at_all(tmp_path, small, monkeypatch):
    """Copied or named, also when it was stopped while they were copied."""
    add_files(small, BESIDE | NOT_BESIDE)
    options = {"shard_bytes": 1500}
    summary = convert_small(small, tmp_path / "whole", **options)
    assert (set(summary.copied), set(summary.left)) == (BESIDE, NOT_BESIDE)
    copied = contents(tmp_path / "whole")
    own = {"config.json", "model.safetensors.index.json", *FILES_OF_SMALL}
    assert copied.keys() == own | BESIDE
    assert all(copied[name] == f"content of {name}".encode() for name in BESIDE)
    out, copyfile = tmp_path / "out", shutil.copyfile

    def stopping(source: Path, target: Path) -> None:
        copyfile(source, target)
        if Path(source).parent.name == "2_Dense":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "copyfile", stopping)
        convert_small(small, out, **options)
    assert [path.name for path in out.iterdir()] == [WORK]
    (small / "USE_POLICY").unlink()  # what a run before has copied goes with it
    (tmp_path / "whole" / "USE_POLICY").unlink()
    assert convert_small(small, out, **options).resumed == len(SMALL)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("damaged", [False, True])
def test_stopped_at_any_file_that_is_moved(tmp_path, small, monkeypatch, damaged):
    """The rest is moved then; a file of weights that was damaged where it lies is written again."""
    add_files(small, BESIDE)
    options = {"shard_bytes": 1500}
    convert_small(small, tmp_path / "whole", **options)
    whole, replace = contents(tmp_path / "whole"), os.replace
    for last in range(len(whole)):
        out, moved = tmp_path / f"out{last}", []

        def moving(source: Path, target: Path, moved: list = moved, last: int = last) -> None:
            if WORK not in Path(target).parts:
                if len(moved) == last:
                    raise KeyboardInterrupt
                moved.append(Path(target))
            replace(source, target)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", moving)
            convert_small(small, out, **options)
        assert not (out / "config.json").exists() and len(moved) == last
        shards = [path for path in moved if path.suffix == ".safetensors" and path.parent == out]
        for path in shards if damaged else ():
            path.write_bytes(path.read_bytes()[:-1] + b"x")
        expected = len(SMALL) if not damaged else len(SMALL) - sum(OF_FILES[p.name] for p in shards)
        assert convert_small(small, out, **options).resumed == expected
        assert contents(out) == whole


def test_no_space_is_needed_twice_by_what_was_moved(tmp_path, small, monkeypatch):
    out, replace = tmp_path / "out", os.replace

    def moving(source: Path, target: Path) -> None:
        if Path(target) == out / "config.json":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", moving)
        convert_small(small, out)
    usage = SimpleNamespace(total=10**12, used=10**12, free=1 << 24)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert convert_small(small, out).resumed == len(SMALL)


def test_source_that_changes_while_it_is_read(tmp_path, small):
    def changing(count: int, name: str) -> None:
        if name == "three.weight":
            os.utime(small / "model-00001-of-00002.safetensors")

    refused("changed while it was read", small, tmp_path / "out", progress=changing)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "put",
    [
        lambda path: path.write_text("mine"),
        lambda path: path.symlink_to("../elsewhere"),
        lambda path: (path / "config.json").mkdir(parents=True),
    ],
    ids=["file", "link", "folder"],
)
def test_no_copy_goes_through_a_link_or_replaces_a_folder(tmp_path, small, put):
    add_files(small, {"1_Pooling/config.json"})
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    convert_small(small, out)
    shutil.rmtree(out / "1_Pooling")
    elsewhere.mkdir()
    put(out / "1_Pooling")
    before = contents(tmp_path)
    refused(r"1_Pooling.*: expected a (folder|file) or nothing", small, out, force=True)
    assert contents(tmp_path) == before and list(elsewhere.iterdir()) == []


def test_stopped_anywhere_it_goes_on_to_the_same_bytes(tmp_path, small):
    """By Ctrl-C, once or twice, or by an error of the system."""
    options = {"shard_bytes": 1500}
    convert_small(small, tmp_path / "whole", **options)
    whole = contents(tmp_path / "whole")
    for calls in range(len(SMALL)):
        out, error = tmp_path / f"out{calls}", OSError if calls % 3 == 2 else KeyboardInterrupt
        stopped(calls, small, out, error=error, **options)
        assert [path.name for path in out.iterdir()] == [WORK]
        if calls % 2:  # once more, before it gets to the end
            stopped(1, small, out, **options)
        assert convert_small(small, out, **options).resumed == min(calls, 2)
        assert contents(out) == whole


# What is noted of the first file: nothing that can be read, or no note, or of another content.
NOTES = [1, ["0", 0.1], [[], 0.1, ""], ["0", {}, ""], ["0", float("nan"), ""], ["0", 0.1, None]]
NOTES = [json.dumps({FILES_OF_SMALL[0]: note}) for note in (*NOTES, ["0", 0.1, ""])]
MANIFESTS = ["[1]", "[" * 100_000, "\xff", *NOTES]


@pytest.mark.parametrize(
    "damage",
    ["flip", "truncate", "delete", "header", "metadata", "other", "cut manifest", *MANIFESTS],
    ids=lambda damage: damage[:40],
)
def test_what_was_lost_is_written_again(tmp_path, small, damage):
    """What is not the content that the manifest tells, too: other files, manifests of junk."""
    options = {"shard_bytes": 1500}
    convert_small(small, tmp_path / "whole", **options)
    out = tmp_path / "out"
    stopped(5, small, out, **options)
    first, second = (out / WORK / FILES / name for name in FILES_OF_SMALL[:2])
    manifest, data = out / WORK / MANIFEST, first.read_bytes()
    middle = len(data) // 2
    damaged = {
        "flip": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "truncate": data[: len(data) * 2 // 3],
        "header": b"\0" * 100 + data[100:],
        "metadata": data.replace(b'{"format":"pt"}', b'{"format":"tf"}'),
        "other": second.read_bytes(),
    }
    if damage in damaged:
        first.write_bytes(damaged[damage])
    elif damage == "delete":
        first.unlink()
    elif damage == "cut manifest":
        os.truncate(manifest, 100)
    else:
        manifest.write_bytes(damage.encode("latin-1"))
    resumed = convert_small(small, out, **options).resumed
    assert resumed == (1 if damage in damaged or damage == "delete" else 0)
    assert contents(out) == contents(tmp_path / "whole")


def test_unfinished_run_with_other_options_or_source(tmp_path, small):
    """It is named, and by force started over."""
    add_files(small, BESIDE)
    out = tmp_path / "out"
    stopped(3, small, out)
    before = contents(out)
    for options, words in (
        ({"blocksize": 128}, "blocksize 64, not 128"),
        ({"double_quant": False}, "double_quant True, not False"),
        ({"shard_bytes": 7}, "shard_bytes 5000000000, not 7"),
        ({"linear": {"one.weight": False}}, "another choice of tensors"),
    ):
        refused(words, small, out, **options)
    shutil.copytree(small, tmp_path / "other")
    os.utime(tmp_path / "other" / "model-00001-of-00002.safetensors")
    refused("another source", tmp_path / "other", out)
    assert contents(out) == before
    (out / WORK / FILES / "2_Dense").mkdir(parents=True)
    (out / WORK / FILES / "2_Dense" / "old").write_text("of a run with other options")
    assert convert_small(small, out, blocksize=128, force=True).resumed == 0
    convert_small(small, tmp_path / "whole", blocksize=128)
    assert contents(out) == contents(tmp_path / "whole")


def test_second_process_is_refused(tmp_path, small):
    out = tmp_path / "out"
    convert_small(small, out, progress=lambda *_: refused("another process", small, out))
    assert (out / "config.json").exists()


@pytest.mark.parametrize("words", ["reads back differently", "File too large"])
def test_disk_that_returns_other_bytes_or_is_full(tmp_path, small, monkeypatch, words):
    out, save_file = tmp_path / "out", staging.save_file

    def faulty(tensors: dict, path: Path, metadata: dict) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000 if "large" in words else -1, limits[1]))
        try:
            save_file(tensors, path, metadata)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=words):
        patch.setattr(staging, "save_file", faulty)
        convert_small(small, out)
    assert [path.name for path in out.iterdir()] == [WORK]
    assert convert_small(small, out).resumed == 0


def test_destination_that_cannot_be_used(tmp_path, small):
    held = tmp_path / "held"
    held.mkdir()
    (held / "file").write_text("x")
    before = contents(tmp_path)
    refused("it holds 'file'", small, held)
    refused("got a file", small, held / "file")
    refused("file is a file", small, held / "file" / "below" / "it")
    refused("this folder holds none", small, held, force=True)
    link = tmp_path / "link"
    link.symlink_to(small)
    for destination in (small, small / "below" / "it", tmp_path, link / "x"):
        refused("apart from the source", small, destination)
    link.unlink()
    assert contents(tmp_path) == before


def test_force_replaces_a_checkpoint_and_nothing_else(tmp_path, small):
    out = tmp_path / "out"
    convert_small(small, out, shard_bytes=1500)
    (out / "notes.txt").write_text("mine")
    refused("--force replaces", small, out)
    before = contents(out)
    stopped(4, small, out, force=True)
    after = contents(out)
    assert {name: after[name] for name in before} == before  # the old one until the new is complete
    convert_small(small, out, force=True)
    convert_small(small, tmp_path / "whole")
    assert contents(out) == {**contents(tmp_path / "whole"), "notes.txt": b"mine"}


def test_no_space(tmp_path, small, monkeypatch):
    usage = SimpleNamespace(total=10**12, used=10**12, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused("GB of free space", small, tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_a_work_folder_without_fcntl(tmp_path, monkeypatch):
    """As on Windows, where nothing locks it."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    spec = importlib.util.spec_from_file_location("staging_elsewhere", staging.__file__)
    elsewhere = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(elsewhere)
    with elsewhere.work_folder(tmp_path / "new", {"format": 1}, force=False) as work:
        assert work.name == WORK and json.loads((work / "run.json").read_text()) == {"format": 1}


def test_a_finished_run_that_is_killed_while_it_cleans_is_finished(tmp_path, small, monkeypatch):
    """No run that is repeated goes on with what is left of the work folder."""
    convert_small(small, tmp_path / "whole")

    def killed(folder: Path, *args, **kwargs) -> None:
        for path in sorted(Path(folder).rglob("*"))[:1]:
            path.unlink() if path.is_file() else path.rmdir()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        convert_small(small, tmp_path / "out")
    refused("expected a new or empty folder", small, tmp_path / "out")
    convert_small(small, tmp_path / "out", force=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
