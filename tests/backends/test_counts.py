"""on_fallback, and the logger: fallbacks are told as they come, and nobody's error matters."""

from __future__ import annotations

import ast
import logging
import sys
import threading

import pytest
import torch
from paths import ROOT
from peft_models import K, lora_net, make_linear

import peftkern
from peftkern.backends import counts

PAIR = ("lora_linear", "hooks on base_layer")


@pytest.fixture
def falls_back(small_layers: None):
    """A patched model that PEFT answers, for a reason."""
    model = lora_net(make_linear())
    base = model.base_model.model.proj.base_layer
    base.register_forward_hook(lambda *args: None)
    peftkern.patch(model)
    return lambda: model(torch.randn(2, K))


def test_each_reason_is_told_once(falls_back):
    told = []
    falls_back()
    handle = peftkern.on_fallback(lambda *pair: told.append(pair))
    assert told == []
    for _ in range(3):
        falls_back()
        peftkern.reset_stats()
    assert told == [PAIR]
    handle.remove()
    handle.remove()
    peftkern.on_fallback(lambda *pair: told.append(pair)).remove()
    falls_back()
    assert told == [PAIR] and not counts._listeners


def test_a_with_block_ends_the_calls_and_listeners_do_not_share_what_was_told(falls_back):
    outer, inner = [], []
    with peftkern.on_fallback(lambda *pair: outer.append(pair)):
        falls_back()
        with peftkern.on_fallback(lambda *pair: inner.append(pair)):
            falls_back()
        counts.record_fallback("op", "another")
    falls_back()
    assert outer == [PAIR, ("op", "another")] and inner == [PAIR]


def test_what_a_function_raises_goes_no_further(falls_back, caplog):
    told = []

    def broken(op: str, reason: str) -> None:
        raise RuntimeError("my own fault")

    expected = falls_back
    with peftkern.on_fallback(broken), peftkern.on_fallback(lambda *pair: told.append(pair)):
        assert expected().isfinite().all()
        falls_back()
    assert told == [PAIR]
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1 and errors[0].name == "peftkern" and errors[0].exc_info
    assert "given to on_fallback raised at lora_linear: hooks" in errors[0].message


def test_a_function_may_fall_back_count_and_leave(falls_back):
    told = []

    def curious(op: str, reason: str) -> None:
        told.append(peftkern.stats().fallbacks[op, reason])
        falls_back()
        handle.remove()

    handle = peftkern.on_fallback(curious)
    falls_back()
    falls_back()
    assert len(told) == 1


def test_threads_tell_once_and_lose_no_count():
    """Whoever reads in the meantime; threads take turns as often as they can."""
    told, times, begin = [], 2000, threading.Barrier(4)
    before = counts.recorded()

    def count():
        begin.wait()
        for _ in range(times):
            counts.record_fallback("op", "why")
            counts.record_call("op", "cpu")
            peftkern.stats()

    peftkern.reset_stats()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with peftkern.on_fallback(lambda *pair: told.append(pair)):
            threads = [threading.Thread(target=count) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert told == [("op", "why")]
    found = peftkern.stats()
    assert found.fallbacks == {("op", "why"): 4 * times}
    assert found.calls == {("op", "cpu"): 4 * times}
    assert counts.recorded() == before + 8 * times


@pytest.mark.parametrize("wrong", [None, "print", {}])
def test_what_cannot_be_called_is_a_type_error(wrong):
    with pytest.raises(TypeError, match="function: expected a callable, got a"):
        peftkern.on_fallback(wrong)


def test_the_logger_tells_each_reason_once(falls_back, caplog):
    peftkern.reset_stats()
    with caplog.at_level(logging.INFO, "peftkern"):
        falls_back()
        falls_back()
    said = [(record.name, record.levelname, record.message) for record in caplog.records]
    assert said == [("peftkern", "INFO", "lora_linear falls back: hooks on base_layer")]


def test_what_was_counted_is_known_after_a_reset():
    before = counts.recorded()
    counts.record_fallback("op", "why")
    counts.record_call("op", "cpu")
    assert counts.recorded() == before + 2
    peftkern.reset_stats()
    assert counts.recorded() == before + 2


def test_there_is_one_logger():
    names = [
        ast.unparse(node.args[0])
        for path in (ROOT / "peftkern").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "logging.getLogger"
    ]
    assert set(names) - {"'bitsandbytes'", "'transformers'"} == {"'peftkern'"}
