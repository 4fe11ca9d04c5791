"""What is read of a monitor's file, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
from monitor_runs import read, start, step, write

from peftkern.monitor import TrainingMonitor
from peftkern.tools.monitor.run import Mask, Run
from peftkern.tools.monitor.summary import compare, summary

PRUNED = {"a.q": [1], "a.k": [0]}


def mask(**of: object) -> dict[str, object]:
    return {"type": "ranks", "step": 1, "ranks": {"q": 1}, **of}


def test_what_a_monitor_writes_is_what_is_read(tmp_path):
    path = tmp_path / "run.jsonl"
    with TrainingMonitor("cpu", jsonl=path, every=2) as monitor:
        started = monitor.ranks({"a.q": [True, False], "a.k": [True, True]})
        for i in range(4):
            monitor.step(tokens=3, loss=float(i))
        monitor.ranks({"a.q": 1, "a.k": 2})  # as before
        monitor.ranks({"a.q": 0, "a.k": 2})
    assert started == {"kept": 3, "pruned": 0, "revived": 0}
    run, ours = read(path), monitor.summary()
    facts = summary(run)
    assert (facts["steps"], facts["tokens"], facts["finished"]) == (4, 12, True)
    assert facts["seconds"] == pytest.approx(ours.seconds)
    assert run.curve("loss") == ([2, 4], [1.0, 3.0])
    assert run.ranks == [(0, {"a.q": 1, "a.k": 2}), (4, {"a.q": 0, "a.k": 2})]
    assert run.mean_ranks() == {"q": ([0, 4], [1.0, 0.0]), "k": ([0, 4], [2.0, 2.0])}
    assert facts["peaks"]["process_peak_rss_bytes"] > 0


def test_what_a_mask_moved_and_what_it_was_drawn_from_is_read(tmp_path):
    path = tmp_path / "run.jsonl"
    with TrainingMonitor("cpu", jsonl=path, every=0) as monitor:
        monitor.step()
        importance = {"a.q": 0.5, "a.k": math.inf}
        found = monitor.ranks(
            {"a.q": [True, False], "a.k": [False, True]}, importance=importance, budget=2.5
        )
        assert found == {"kept": 2, "pruned": 2, "revived": 0}
        monitor.step()
        monitor.ranks({"a.q": [False, True], "a.k": [False, True]})  # of the same ranks
        monitor.step()
        monitor.ranks({"a.q": [False, False], "a.k": [True]})  # a triplet of a.k was dropped
    run = read(path)
    first, second, third = run.masks
    known = pytest.approx({"a.q": 0.5, "a.k": math.nan}, nan_ok=True)
    assert first == (1, Mask(2, 2.5, known, PRUNED, {}))
    assert second == (2, Mask(2, None, {}, {"a.q": [0]}, {"a.q": [1]}))
    assert third == (3, Mask(1, None, {}, {"a.q": [1]}, {}))
    assert summary(run)["masks"][0] == {
        **{"step": 1, "kept": 2, "budget": 2.5, "importance": 0.5, "pruned": 2, "revived": 0}
    }
    json.dumps(summary(run), allow_nan=False)


def test_a_growing_file_is_read_on_and_its_last_line_waits_until_it_is_whole(tmp_path):
    path = write(tmp_path / "run.jsonl", start(), step(1), rest='{"type": "st')
    run = Run(path)
    assert [record["step"] for record in run.read()] == [1]
    assert (run.ignored, run.finished) == (1, False)
    with path.open("a") as file:
        file.write(json.dumps(step(2))[len('{"type": "st') :] + "\n")
    assert [record["step"] for record in run.read()] == [2]
    assert (run.ignored, run.curve("loss")) == (0, ([1, 2], [4.0, 2.0]))
    assert run.read() == []
    write(path, start())
    with pytest.raises(ValueError, match="expected a file that a monitor appends to"):
        run.read()


def test_a_process_that_was_cut_off_and_one_that_went_on(tmp_path):
    path = write(tmp_path / "run.jsonl", start(), step(1), step(2), rest='{"type": "st\n')
    with path.open("a") as file:
        file.write("".join(json.dumps(r) + "\n" for r in (start(), step(1), {"type": "summary"})))
    run = read(path)
    assert (run.ignored, run.finished, len(run.starts)) == (1, True, 2)
    assert run.curve("tokens")[0] == [1, 2, 3]


def test_steps_of_a_trainer_that_are_repeated_replace_those_before(tmp_path):
    first = [step(i, global_step=i, loss=1.0) for i in (1, 2, 3)]
    again = [step(i, global_step=i + 1, loss=2.0) for i in (1, 2)]
    run = read(write(tmp_path / "run.jsonl", start(), *first, start(), *again))
    assert run.curve("loss") == ([1, 2, 3], [1.0, 2.0, 2.0])
    assert summary(run)["steps"] == run.totals["kernel_calls"] / 2 == 5  # which ran


def test_numbers_that_are_not_finite_are_counted_and_in_no_statistics(tmp_path):
    records = [step(1), step(2, loss=None), step(3, tokens_per_second=None)]
    facts = summary(read(write(tmp_path / "run.jsonl", start(), *records)))
    assert facts["values"]["loss"] == {"first": 4.0, "last": 4.0 / 3}
    assert facts["not_finite"] == {"loss": 1}
    assert facts["tokens_per_second"]["median"] == 20.0
    json.dumps(facts, allow_nan=False)


def test_files_before_the_format_had_a_name_are_read(tmp_path):
    before = start()
    del before["format"]
    assert len(read(write(tmp_path / "run.jsonl", before, step(1))).points) == 1


@pytest.mark.parametrize(
    ("records", "rest", "why"),
    [
        ([start(format="peftkern monitor 9")], "", "format is 'peftkern monitor 9', not"),
        ([step(1)], "", "line 1 is no start"),
        ([], "[1]\n", "line 1 is no start"),
        ([], "\x00\x01", "no complete line"),
        ([], "hello\n", "line 1: .*expected JSON"),
        ([], "hello\n{}\n", "line 2 is no start"),
        ([], f"{10**400}\n", "line 1: .*308 digits"),
        ([start(), {"type": "other"}], "", "line 2: .*other"),
        ([start(), {"loss": 1.0}], "", "line 2: KeyError"),
        ([start()], "[]\n", "line 2: TypeError"),
        ([start(), step(1, steps=0)], "", "line 2: ZeroDivisionError"),
        ([start(), step(1, seconds=None)], "", "line 2: ArithmeticError"),
        ([start(), step(1, step="1")], "", "line 2: TypeError"),
        ([start(), step(1, calls=[1])], "", "line 2: AttributeError"),
        ([start(), {"type": "ranks", "step": 1, "ranks": {"q": "x"}}], "", "line 2: TypeError"),
        ([start(), mask(importance=[1])], "", "line 2: AttributeError"),
        ([start(), mask(pruned={"q": [0.5]})], "", "line 2: TypeError"),
    ],
)
def test_another_file_is_refused_in_one_line(tmp_path, records, rest, why):
    path = write(tmp_path / "run.jsonl", *records, rest=rest)
    with pytest.raises(ValueError, match=rf"run\.jsonl: expected the JSON lines.*{why}") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_two_runs_are_compared_at_their_common_steps(tmp_path):
    one = read(write(tmp_path / "a.jsonl", start(), *(step(i, loss=1.0) for i in (1, 2, 3))))
    faster = {"step_seconds": 0.25, "tokens_per_second": 40.0, "process_peak_rss_bytes": 1000}
    records = [step(2, loss=1.5, **faster), step(3, loss=0.75), step(4, loss=9.0, **faster)]
    other = read(write(tmp_path / "b.jsonl", start(), *records))
    found = compare(one, other)
    assert found["loss"] == {"steps": 2, "mean": 0.375, "max": 0.5, "max_at": 2, "last": -0.25}
    assert found["ratios"]["step_seconds"] == 0.5
    assert found["ratios"]["tokens_per_second"] == 2.0
    assert found["ratios"]["process_peak_rss_bytes"] == 1.0
    none = read(write(tmp_path / "c.jsonl", start(), step(9, loss=math.nan)))
    assert compare(one, none)["loss"] is None
