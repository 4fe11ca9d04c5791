"""The replay of DeepSpeed's gathers, on steps of a few modules. tests/integrations/engines/
test_zero_plan.py holds it to DeepSpeed itself."""

from __future__ import annotations

import pytest

from peftkern.tools.plan.gathering import (
    BACKWARD,
    FORWARD,
    Event,
    Gathering,
    Limits,
    Weight,
    expanded,
)

WIDE = Limits(live=1000, ahead=0, reuse=1000, small=0)


def visits(phase: str, index: int, computes: str | None = None) -> list[Event]:
    """Enter and leave a layer of 10 elements in float32."""
    owner = "layers", index
    weights = (Weight(owner, "weight", 10, 4, stays=False, trained=False),)
    how = phase, owner, "layer"
    return [
        Event(*how, enters, computes or phase, weights, (phase, owner, i))
        for i, enters in enumerate((True, False))
    ]


def step(*indices: int) -> list[Event]:
    forward = [event for i in indices for event in visits(FORWARD, i)]
    return forward + [event for i in reversed(indices) for event in visits(BACKWARD, i)]


@pytest.mark.parametrize(
    ("limits", "forward", "backward", "most"),
    [
        (WIDE, [40, 40, 40], [], 120),  # all are kept for the backward pass
        (WIDE._replace(reuse=5), [40, 40, 40], [40, 40], 40),  # the last one is next at once
        (WIDE._replace(ahead=1), [40, 40, 40], [], 120),
        (WIDE._replace(ahead=15), [40, 80], [], 120),  # two in one buffer, then copied out of it
        (WIDE._replace(ahead=1, reuse=5), [40] * 4, [40], 120),  # for the backward pass, too
        (WIDE._replace(ahead=30, reuse=5, live=10), [40, 40, 40], [40, 40], 40),  # none ahead
    ],
)
def test_what_is_gathered_and_kept(limits, forward, backward, most):
    found = Gathering(step(0, 1, 2), limits, 2)
    assert found.calls == [(FORWARD, n) for n in forward] + [(BACKWARD, n) for n in backward]
    assert max(moment.after[0] for moment in found.moments) == most
    buffers = [moment.after[1] for moment in found.moments]
    assert max(buffers) == (80 if limits.ahead == 15 else 0) and buffers[-1] == 0


def test_pieces_are_padded_and_small_parameters_are_not_gathered():
    assert Gathering(step(0), WIDE, 4).calls == [(FORWARD, 48)]
    small = [
        event._replace(weights=tuple(w._replace(stays=True) for w in event.weights))
        for event in step(0, 1)
    ]
    found = Gathering(small, WIDE, 4)
    assert found.calls == [] and found.moments[0].within == (0, 0)


def test_a_checkpoint_keeps_frozen_weights_until_its_module_is_left():
    """As it began in the backward pass of another module, which is then the owner."""
    outer = [event._replace(name="outer", weights=()) for event in visits(BACKWARD, 0)]
    again = visits(BACKWARD, 0, computes=FORWARD)
    found = Gathering([*visits(FORWARD, 0), outer[0], *again, outer[1]], WIDE._replace(reuse=0), 2)
    assert [moment.after[0] for moment in found.moments] == [40, 0, 0, 40, 40, 0]


def test_layers_that_were_not_run_are_as_those_that_were():
    shown = expanded(step(0, 4), {"layers": [0, 4, 4, 4, 4]})
    assert [(e.phase, e.owner, e.weights, e.enters) for e in shown] == [
        (e.phase, e.owner, e.weights, e.enters) for e in step(0, 1, 2, 3, 4)
    ]
    assert {event.moment[1] for event in shown} == {("layers", 0), ("layers", 4)}
