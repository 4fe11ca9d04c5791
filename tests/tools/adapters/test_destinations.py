"""Where adapters are written: whole or not at all, beside what was there."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable

import pytest
from adapters import CONFIG, MODEL, save
from processes import killed

from peftkern.tools.adapters import Adapter, AdapterError, read_adapter, write, write_adapter
from peftkern.tools.adapters.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore")

EVENTS = [(os, "replace"), (os, "unlink"), (os, "mkdir"), (os, "rmdir")]
EVENTS += [(write, "save_file"), (write, "sync_file")]


def killed_before(number: int, adapter: Adapter, force: bool) -> bool:
    """Write b in a child that ends before that event as if the machine had; did it?"""
    count = itertools.count()

    def dying(function: Callable) -> Callable:
        def event(*args: object, **kwargs: object) -> object:
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return event

    def run_until_then() -> None:
        for module, name in EVENTS:
            setattr(module, name, dying(getattr(module, name)))
        write_adapter(adapter, "b", force=force)

    return killed(run_until_then)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("linear", tmp_path / "a")
    return tmp_path


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("force", [False, True])
def test_a_run_that_is_killed_leaves_an_adapter_or_none(folder, force):
    """And the same command then writes it."""
    first = read_adapter("a")
    for number in range(30):
        if force:
            save("power of two", folder / "b", seed=1)
            (folder / "b" / "notes.txt").write_text("mine")
        if not killed_before(number, first, force):
            break
        if (folder / "b" / CONFIG).exists():  # the one that was there, or the new one
            read_adapter("b")
        write_adapter(first, "b", force=force)
        assert all(check.passed for check in verify(first, against=read_adapter("b")))
        assert [name for name in names(folder) if "unfinished" in name] == []
        if force:
            assert names(folder / "b") == sorted([CONFIG, MODEL, "README.md", "notes.txt"])
        else:
            assert names(folder / "b") == [CONFIG, MODEL]
            for name in names(folder / "b"):
                (folder / "b" / name).unlink()
    else:
        pytest.fail("never ended")
    assert number > 3


def test_what_is_there_is_left_alone(folder):
    adapter = read_adapter("a")
    (folder / "b").mkdir()
    write_adapter(adapter, "b")  # an empty folder
    with pytest.raises(AdapterError, match=r"holds 'adapter_config\.json' \(--force replaces"):
        write_adapter(adapter, "b")
    (folder / "c").mkdir()
    (folder / "c" / "notes.txt").write_text("mine")
    with pytest.raises(AdapterError, match="this folder holds none"):
        write_adapter(adapter, "c", force=True)
    (folder / "d").write_text("a file")
    with pytest.raises(AdapterError, match="got a file"):
        write_adapter(adapter, "d", force=True)
    assert names(folder / "c") == ["notes.txt"]
    write_adapter(adapter, "e/f/g")
    assert all(check.passed for check in verify(adapter, against=read_adapter("e/f/g")))


def test_files_have_the_mode_that_new_files_have(folder):
    write_adapter(read_adapter("a"), "b")
    (folder / "plain").write_text("")
    modes = {os.stat(path).st_mode for path in (folder / "b" / MODEL, folder / "plain")}
    assert len(modes) == 1


def test_an_adapter_is_written_over_itself(folder):
    adapter = read_adapter("a")
    os.chdir("a")
    write_adapter(adapter, ".", force=True)
    again = read_adapter(".")
    assert all(check.passed for check in verify(adapter, against=again))
    assert {update.scaling for update in again.updates.values()} == {1.0}


def test_a_link_to_an_empty_folder_is_followed(folder):
    (folder / "real").mkdir()
    (folder / "link").symlink_to("real")
    write_adapter(read_adapter("a"), "link")
    assert (folder / "link").is_symlink() and (folder / "real" / CONFIG).exists()
    assert names(folder) == ["a", "link", "real"]
