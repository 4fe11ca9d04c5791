"""JSON from outside, by the reader and by every command that reads it: right, or one line."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_records import case, provider
from bench_records import record as bench_record
from checkpoint_folders import save_llama
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plan_configs import LLAMA_CONFIG
from tolerances import FUZZ_MODEL_EXAMPLES

from peftkern.cli import main
from peftkern.formats.json_files import BYTES_MAX, DEPTH_MAX, parse_json, read_json


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b'{"a": [1, 2.5, null, true, "\xc3\xa9"]}', {"a": [1, 2.5, None, True, "é"]}),
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        (b"1e999", float("inf")),
        (b"[-Infinity]", [float("-inf")]),
        (b"-" + b"9" * 308, -int("9" * 308)),
        (b'{"a": 1, "a": 2}', {"a": 2}),
    ],
)
def test_json_is_read(data, value):
    assert parse_json(data) == value


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "expected JSON in UTF-8, got Expecting value"),
        (b"{'a': 1}", "expected JSON in UTF-8, got Expecting property name"),
        (b'"\xff"', "expected JSON in UTF-8, got 'utf-8' codec can't decode"),
        ('"é"'.encode("utf-16"), "expected JSON in UTF-8"),
        (b'{"a": ["\\ud800"]}', "surrogates not allowed"),
        (b'{"\\udfff": 1}', "surrogates not allowed"),
        (b"1" * 309, "expected JSON in UTF-8, got an integer of more than 308 digits"),
        (b"1" * 5000, "got an integer of more than 308 digits"),
        (nested(DEPTH_MAX + 1), "levels, got deeper nesting"),
        (nested(100_000), "levels, got deeper nesting"),
        (b'{"a":' * 100_000, "levels, got deeper nesting"),
    ],
)
def test_what_is_no_json_is_told_in_one_line(data, words):
    with pytest.raises(ValueError, match=words) as caught:
        parse_json(data)
    assert len(str(caught.value).splitlines()) == 1


def test_deepest_json_that_is_read_can_be_shown_and_written_again():
    value = parse_json(nested(DEPTH_MAX))
    assert json.loads(json.dumps(value, indent=1)) == value and repr(value) == "[" * 64 + "]" * 64


def test_name_twice_where_that_is_forbidden():
    assert parse_json(b'{"a": {"b": 1}, "b": 2}', unique=True) == {"a": {"b": 1}, "b": 2}
    with pytest.raises(ValueError, match="a name twice"):
        parse_json(b'{"x": {"a": 1, "a": 1}}', unique=True)


def test_only_regular_files_of_a_bounded_size_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    (tmp_path / "link").symlink_to("/dev/zero")
    for name, words in (
        ("pipe", "pipe: expected a file of JSON, got a pipe, socket or device"),
        ("link", "link: expected a file of JSON, got a pipe, socket or device"),
        (".", "expected a file of JSON, got a folder"),
    ):
        with pytest.raises(ValueError, match=words):
            read_json(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(BYTES_MAX + 1)
    with pytest.raises(ValueError, match=f"large: expected at most {BYTES_MAX} bytes"):
        read_json(tmp_path / "large")


# Every command that reads JSON.

HUGE = 10**300
CONFIG = {**LLAMA_CONFIG, "head_dim": 16, "num_key_value_heads": 2, "tie_word_embeddings": False}
RECORD = bench_record(
    case(provider("peftkern", 1.0), provider("peft", 2.0)), case(provider("peftkern"), r=2)
)
EARLIER = {"format": RECORD["format"], "environment": {}, "cases": RECORD["cases"]}


def answer(*arguments: object) -> tuple[int, str, str]:
    """Status, and what it says on a terminal of UTF-8; any exception but the command's fails."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        status = main([str(argument) for argument in arguments])
    said = []
    for stream in streams:
        stream.flush()
        said.append(stream.buffer.getvalue().decode())
    return status, *said


def assert_refused(status: int, out: str, error: str) -> None:
    assert (status, out) == (2, ""), (status, out, error)
    assert error.startswith("peftkern: error: ") and len(error.splitlines()) == 1, error


def refused(*arguments: object) -> str:
    assert_refused(*(said := answer(*arguments)))
    return said[2]


def plan(folder: Path, data: bytes) -> tuple[object, ...]:
    (folder / "config.json").write_bytes(data)
    return "plan", folder


def plan_of_a_file(folder: Path, data: bytes) -> tuple[object, ...]:
    (folder / "any.json").write_bytes(data)
    return "plan", folder / "any.json"


def quantize(folder: Path, data: bytes) -> tuple[object, ...]:
    shutil.copytree(LLAMA, folder / "src")
    (folder / "src" / "config.json").write_bytes(data)
    return "quantize", folder / "src", folder / "dst"


def quantize_of_an_index(folder: Path, data: bytes) -> tuple[object, ...]:
    shutil.copytree(LLAMA, folder / "src")
    os.replace(folder / "src" / "model.safetensors", folder / "src" / "model-1.safetensors")
    (folder / "src" / "model.safetensors.index.json").write_bytes(data)
    return "quantize", folder / "src", folder / "dst"


def bench_from(folder: Path, data: bytes) -> tuple[object, ...]:
    (folder / "old.json").write_bytes(data)
    return "bench", "--from", folder / "old.json", "--repro"


def bench_compare(folder: Path, data: bytes) -> tuple[object, ...]:
    (folder / "old.json").write_bytes(data)
    (folder / "new.json").write_text(json.dumps(RECORD))
    return "bench", "--from", folder / "new.json", "--compare", folder / "old.json"


Command = Callable[[Path, bytes], tuple[object, ...]]
COMMANDS = [plan, plan_of_a_file, quantize, quantize_of_an_index, bench_from, bench_compare]


@pytest.fixture(scope="module", autouse=True)
def llama(tmp_path_factory) -> Path:
    global LLAMA
    LLAMA = save_llama(tmp_path_factory.mktemp("llama") / "src")
    return LLAMA


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"\xff\xfe{",
        b"{",
        b"[]",
        b"null",
        b"NaN",
        b"1" * 5000,
        nested(100_000),
        b'{"a":' * 100_000,
        b'{"model_type": "\\ud800", "format": "\\ud800"}',
    ],
    ids=lambda data: repr(data[:9]),
)
def test_what_is_no_json_object_is_one_line_and_status_2(tmp_path, command, data):
    assert ".json: " in refused(*command(tmp_path, data))
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("option", ["--from", "--compare"])
def test_bench_reads_files_only(tmp_path, option):
    for path, words in ((tmp_path, "a folder"), ("/dev/zero", "a pipe, socket or device")):
        assert f"{path}: expected a file of JSON, got {words}" in refused("bench", option, path)
    assert "No such file" in refused("bench", option, tmp_path / "none.json")


def test_plan_reads_files_only(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    for path in (tmp_path, tmp_path / "config.json", "/dev/zero"):
        assert "expected a config.json, or the folder of one" in refused("plan", path)


leaves = st.one_of(
    st.sampled_from([None, True, False, 0, -1, 1, 2**63, HUGE, -HUGE, 1e308, 5e-324, 10**9]),
    st.sampled_from([float("nan"), float("inf"), float("-inf"), "", "1", "\x1b[2J", "a\nb", "é"]),
    st.integers(-4, 300),
)
junk = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=4,
)


@st.composite
def damaged(draw: st.DrawFn, *wholes: Any) -> bytes:
    """A right document of which one or two values, at any level, are others, missing or deeper."""
    document = copy.deepcopy(draw(st.sampled_from(wholes)))
    for _ in range(draw(st.integers(1, 2))):
        parent = document
        while True:
            keys = list(parent) if isinstance(parent, dict) else range(len(parent))
            key = draw(st.sampled_from(keys))
            inner = parent[key]
            if not isinstance(inner, (dict, list)) or not inner or draw(st.integers(0, 3)) == 0:
                break
            parent = inner
        how = draw(st.sampled_from(["other", "other", "other", "missing", "deeper"]))
        if how == "missing" and len(parent) > 1:
            del parent[key]
        else:
            parent[key] = [[inner]] if how == "deeper" else draw(junk)
    return json.dumps(document).encode()


def check(command: Command, data: bytes) -> None:
    """Used, or refused: nothing else."""
    with tempfile.TemporaryDirectory() as name:
        status, out, error = answer(*command(Path(name), data))
        # 1 has a meaning there: slower, or a result that is missing.
        assert status in ((0, 1, 2) if command in (bench_from, bench_compare) else (0, 2))
        if status == 2:
            assert_refused(status, out, error)
            assert not (Path(name) / "dst").exists()


@given(damaged(CONFIG))
@example(json.dumps({**CONFIG, "tie_word_embeddings": "false"}).encode())
@example(json.dumps({**CONFIG, "vocab_size": HUGE}).encode())
def test_plan_of_any_config(data):
    check(plan, data)


@given(damaged(RECORD))
@example(json.dumps({**RECORD, "cases": [], "roof": {}}).encode())
def test_bench_from_any_record(data):
    check(bench_from, data)


@given(damaged(RECORD, EARLIER))
@example(json.dumps({**EARLIER, "cases": [{**RECORD["cases"][0], "name": [1]}]}).encode())
@example(json.dumps(EARLIER).replace("1.0", str(HUGE)).encode())
@example(json.dumps(EARLIER).replace("1.0", "1e-320").encode())
def test_bench_compared_with_any_record(data):
    check(bench_compare, data)


@settings(max_examples=FUZZ_MODEL_EXAMPLES)
@given(st.data())
def test_quantize_of_any_config(data):
    check(quantize, data.draw(damaged(json.loads((LLAMA / "config.json").read_bytes()))))


@pytest.mark.parametrize("value", [10**9, HUGE, float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["num_hidden_layers", "num_local_experts"])
def test_quantize_builds_no_model_of_a_billion_layers(tmp_path, key, value):
    config = json.loads((LLAMA / "config.json").read_bytes())
    for changed in ({**config, key: value}, {**config, "text_config": {key: value}}):
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        error = refused(*quantize(folder, json.dumps(changed).encode()))
        assert f"'{key}': expected at most 10000, got " in error
