"""Patched layers over kernels that err, raise, hang, crash or are slow: the numbers are PEFT's."""

from __future__ import annotations

import copy
import functools
import json
import signal
from pathlib import Path

import pytest
import read_only
import torch
import untrusted
from adalora_models import quantize_4bit_
from peft import LoraConfig
from peft_models import (
    K,
    add_lora,
    layer_of,
    lora_net,
    make_linear4bit,
    text_batch,
    tiny_llama,
)
from processes import run_code
from untrusted import Child
from waiting import wait_until

import peftkern
from peftkern.backends import contest, device, journal, trust
from peftkern.integrations.peft import casts, trial

pytestmark = pytest.mark.usefixtures("own_trust")
STEPS = 6
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def expected() -> list[float]:
    """In one thread, as in a fork: what a second one changes in torch's sums is the processor's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return untrusted.steps(STEPS, patched=False)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("fault", ["tail row", "backward", "raises", "no memory", "slow"])
def test_a_faulty_kernel_costs_nothing(fault: str, tmp_path: Path, expected: list[float]) -> None:
    first, again = (Child(tmp_path, fault, STEPS).report() for _ in range(2))
    for run in (first, again):
        assert run["losses"] == pytest.approx(expected, rel=1e-5)
    if fault == "slow":
        assert set(first["sides"].values()) == {trust.PEER}
        assert any("times as long" in reason for reason in again["fallbacks"])
        assert again["losses"] == expected  # PEFT's own forward, from the first call on
        return
    assert first["demoted"] and first["warned"]
    why = {"raises": "raised at call 1: RuntimeError: no such instruction", "no memory": "raised"}
    assert all(why.get(fault, "wrong at call 1") in text for text in first["demoted"].values())
    if fault == "no memory":  # which may be there the next time
        assert again["demoted"]
    else:
        assert not again["warned"] and again["demoted"] == first["demoted"]


def test_wrong_at_call_100_alone(tmp_path: Path) -> None:
    steps = 120
    run = Child(tmp_path, "call 100", steps).report()
    assert run["losses"] == pytest.approx(untrusted.steps(steps, patched=False), rel=1e-4)
    assert [text.split(":")[0] for text in run["demoted"].values()] == ["wrong at call 100"]


def test_what_crashes_is_not_tried_again(tmp_path: Path, expected: list[float]) -> None:
    child = Child(tmp_path, "crashes")
    child.process.join()
    assert child.process.exitcode == -signal.SIGSEGV
    again = Child(tmp_path, "crashes").report()
    assert again["losses"] == pytest.approx(expected, rel=1e-5)
    (why,) = set(again["demoted"].values())
    assert "an earlier process ended during its first launch" in why
    assert "Segmentation fault" in why
    assert not list(journal.files(tmp_path / "trust"))


@pytest.mark.parametrize("cured", [False, True])
def test_what_is_killed_once_is_tried_again(
    cured: bool, tmp_path: Path, expected: list[float]
) -> None:
    """A scheduler may have done it; what hangs twice is not tried a third time."""
    for _ in range(1 if cured else 2):
        child = Child(tmp_path, "hangs")
        marks = f"*.first-launch-{child.process.pid}-*"  # one that is cut short says nothing
        found = functools.partial((tmp_path / "trust").glob, marks)
        wait_until(lambda found=found: any(mark.stat().st_size for mark in found()))
        child.process.kill()
        child.process.join()
    again = Child(tmp_path, "none" if cured else "hangs").report()
    assert again["losses"] == pytest.approx(expected, rel=1e-5)
    assert bool(again["demoted"]) is not cured
    assert all("for the second time" in why for why in again["demoted"].values())
    assert not list(journal.files(tmp_path / "trust"))


def test_training_without_a_folder_to_write_to(expected: list[float]) -> None:
    nowhere = Path("/dev/null/cache")
    run = Child(nowhere, "none", HOME="/dev/null").report()
    assert run["losses"] == pytest.approx(expected, rel=1e-5)
    assert run["sides"] and not run["demoted"] and not run["warned"]


READ_ONLY = """
import sys
import read_only
read_only.refuse_writes(sys.argv[1], "/dev")  # before anything is imported
import json, pathlib
for folder in (*sys.argv[2:], pathlib.Path.cwd()):
    try:
        (pathlib.Path(folder) / "new").touch()
    except PermissionError:
        continue
    raise AssertionError(f"{folder} can be written")
import untrusted
from peftkern.backends import contest
contest.SLOWER = float("inf")
print(json.dumps(untrusted.report(lambda: untrusted.steps(6))))
"""


@pytest.mark.slow
@pytest.mark.skipif(not read_only.available(), reason="needs Landlock, of Linux 5.13")
def test_training_where_everything_is_read_only(tmp_path: Path, expected: list[float]) -> None:
    """Home, caches and the package, from the first import on.

    Without a temporary folder, where inductor has its own, PEFT cannot be imported.
    """
    temporary, home = tmp_path / "temporary", tmp_path / "home"
    temporary.mkdir()
    home.mkdir()
    caches = ("XDG_CACHE_HOME", "TRITON_CACHE_DIR")
    said = run_code(
        READ_ONLY,
        temporary,
        home,
        Path(peftkern.__file__).parent,
        **{name: str(home / name) for name in caches},
        **{"HOME": str(home), "TMPDIR": str(temporary)},
        **{"PEFTKERN_CACHE": "", "PEFTKERN_TRUST": "auto"},
    )
    run = json.loads(said.splitlines()[-1])
    assert run["losses"] == pytest.approx(expected, rel=1e-5)
    assert set(run["sides"].values()) == {trust.OURS} and run["calls"]
    assert not run["demoted"] and not run["warned"] and not list(home.iterdir())


def test_two_clocks_have_to_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that only the host's clock finds slow is not taken."""
    sides = []
    for slow_on_host in (False, True):
        trust.reset()
        trust.forget()

        def clock(call, slow=slow_on_host) -> dict[str, float]:
            before = peftkern.stats().calls.get((untrusted.FORWARD, "cpu"), 0)
            call()
            ours = peftkern.stats().calls.get((untrusted.FORWARD, "cpu"), 0) > before
            return {"host": 3.0 if ours and slow else 1.0, "device": 0.5 if ours else 1.0}

        monkeypatch.setattr(contest, "clock_of", lambda device, clock=clock: clock)
        untrusted.steps(3)
        sides += [verdict["side"] for verdict in trust.ledger(CPU).classes.values()]
    assert sides == [trust.OURS, trust.PEER]


def test_one_round_that_is_long_and_plain_is_enough() -> None:
    for theirs, rounds in ((9.0, 1), (2.0, contest.ROUNDS[0])):
        calls = {"theirs": 0, "ours": 0}

        def called(name: str, calls=calls) -> None:
            calls[name] += 1

        contenders = {name: functools.partial(called, name) for name in calls}

        def clock(call, theirs=theirs) -> dict[str, float]:
            call()
            return {"wall": theirs if call.args == ("theirs",) else 1.0}

        (outcome,) = contest.outcomes(contenders, clock, budget=0.0).values()
        assert outcome.unanimous and outcome.ratios == {"wall": 1 / theirs}
        assert set(calls.values()) == {1 + rounds}  # and the one before


@pytest.mark.parametrize("products", [True, False])
def test_the_first_call_is_tried_before_it_is_answered(
    products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch has no 16-bit products, a single backward pass of PEFT's takes minutes."""
    monkeypatch.setitem(device._PRODUCTS, torch.bfloat16, products)
    monkeypatch.setattr(contest, "SLOWER", float("inf"))
    net = lora_net(make_linear4bit(), lora_dropout=0.5).train()
    peftkern.patch(net)
    peftkern.reset_stats()
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.randn(30, K).requires_grad_()).float().sum().backward()
    served = trial.UNMEASURED not in {reason for _, reason in peftkern.stats().fallbacks}
    assert served is not products
    assert bool(trust.ledger(CPU).classes) is not products


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_training_is_that_of_always(
    reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the third step on, bit for bit; a forward and its recomputation are never mixed."""
    monkeypatch.setattr(contest, "SLOWER", float("inf"))
    batch = text_batch()

    def gradients(model, count: int) -> list[list[torch.Tensor]]:
        found = []
        for _ in range(count):
            torch.manual_seed(5)
            model.zero_grad()
            model(**batch).loss.backward()
            found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        return found

    def built():
        model = add_lora(quantize_4bit_(tiny_llama()), lora_dropout=0.3).train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        peftkern.patch(model)
        return model

    with trust.use_mode("always"):
        right = gradients(built(), 1)[0]
    steps = gradients(built(), 4)
    assert peftkern.stats().calls
    for step in steps[2:]:
        for ours, always in zip(step, right, strict=True):
            torch.testing.assert_close(ours, always, rtol=0, atol=0)
    for step in steps[:2]:  # PEFT's dropout is drawn otherwise: only finite, and some
        assert all(grad.isfinite().all() for grad in step)


def test_ranks_agree(tmp_path: Path) -> None:
    """The second rank, where the kernel is slow, adopts what the first has found."""
    ranks = [
        Child(tmp_path / str(rank), fault, 4, rank=rank, store=tmp_path / "store")
        for rank, fault in enumerate(("none", "slow"))
    ]
    sides = [rank.report()["sides"] for rank in ranks]
    assert sides[0] == sides[1] and set(sides[0].values()) == {trust.OURS}


def test_modes(tmp_path: Path) -> None:
    """off serves nothing that is unknown; readonly writes nothing; always asks nobody."""
    for mode, written, served in (("off", 0, 0), ("readonly", 0, 1), ("always", 0, 1)):
        peftkern.reset_stats()
        with trust.use_mode(mode):
            untrusted.steps(4)
        assert len(trust.files()) == written
        assert bool(peftkern.stats().calls) == bool(served), mode
        trust.reset()
    assert not (tmp_path / "cache").exists()


def test_a_trial_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generators, gradients and saved tensors of the step are those of PEFT alone."""
    model = lora_net(make_linear4bit(), lora_dropout=0.5).train()
    patched = lora_net(make_linear4bit(), lora_dropout=0.5).train()
    peftkern.patch(patched)
    x = torch.randn(30, K)
    for _ in range(2):  # the calls beside which the trial is held
        states, grads, packed = [], [], []
        for net in (model, patched):
            torch.manual_seed(1)
            net.zero_grad()
            count: list[int] = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, count=count: count.append(1) or t, lambda t: t
            ):
                y = net(x)
            y.sum().backward()
            states.append(torch.get_rng_state())
            grads.append([p.grad for p in net.parameters() if p.requires_grad])
            packed.append(len(count))
        assert torch.equal(*states) and packed[0] == packed[1]
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("side", [trust.OURS, trust.PEER])
def test_a_reference_pass_follows_the_policy(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever serves: adapters that add zero give the bits of a layer without them (DPO)."""
    ours = side == trust.OURS
    monkeypatch.setattr(contest, "SLOWER", float("inf") if ours else 0.0)
    model = lora_net(make_linear4bit(torch.bfloat16)).train()
    torch.nn.init.zeros_(model.base_model.model.proj.lora_B["default"].weight)
    peftkern.patch(model)
    x = torch.randn(40, K, dtype=torch.bfloat16)
    for _ in range(4):
        policy = model(x)
        with torch.no_grad(), model.disable_adapter():
            reference = model(x)
        torch.testing.assert_close(policy, reference, rtol=0, atol=0)
    assert {verdict["side"] for verdict in trust.ledger(CPU).classes.values()} == {side}


@pytest.mark.parametrize("between", ["another forward", "evaluation"])
def test_a_step_in_flight_keeps_its_side(between: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes between a checkpointed forward and its backward changes nothing for that."""
    monkeypatch.setattr(contest, "SLOWER", float("inf"))
    plain = add_lora(quantize_4bit_(tiny_llama())).train()
    model = copy.deepcopy(plain)
    peftkern.patch(model)
    batch, steps = text_batch(), 3
    for step in range(steps):
        found = []
        for net in (plain, model):
            net.gradient_checkpointing_enable({"use_reentrant": False})
            net.enable_input_require_grads()
            net.zero_grad()
            loss = net(**batch).loss
            if between == "another forward":
                loss = loss + net(**batch).loss
            elif net is model:  # bitsandbytes alone would rewrite its weights here
                with torch.no_grad():
                    net.eval()(**batch)
                net.train()
            if step == steps - 1:
                peftkern.reset_stats()
            loss.backward()
            found.append([p.grad for p in net.parameters() if p.requires_grad])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert peftkern.stats().calls  # in the end they are ours


def test_a_reference_pass_follows_once_the_layer_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also under PEFT's own `disable_adapter`, which freezes the adapters."""
    monkeypatch.setattr(contest, "SLOWER", float("inf"))
    model = lora_net(make_linear4bit(torch.bfloat16)).train()
    torch.nn.init.zeros_(model.base_model.model.proj.lora_B["default"].weight)
    peftkern.patch(model)
    x = torch.randn(200, K, dtype=torch.bfloat16)
    for _ in range(4):
        peftkern.reset_stats()
        policy = model(x)
        with torch.no_grad(), model.disable_adapter():
            reference = model(x)
        torch.testing.assert_close(policy, reference, rtol=0, atol=0)
        policy.float().sum().backward()
        model.zero_grad()
    assert not peftkern.stats().fallbacks


def test_a_new_forward_is_in_flight_until_its_own_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What follows it in the same step, here a reference pass, is not served by the other side."""
    monkeypatch.setattr(contest, "SLOWER", float("inf"))
    model = lora_net(make_linear4bit()).train()
    peftkern.patch(model)
    x = torch.randn(40, K)
    for served in (False, False, True):
        loss = model(x).sum()
        peftkern.reset_stats()
        with torch.no_grad(), model.disable_adapter():
            model(x)
        assert bool(peftkern.stats().fallbacks) is not served
        loss.backward()
        model.zero_grad()


@pytest.mark.parametrize("checkpoints", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_layers_without_adapters_switch_once_their_step_is_over(
    checkpoints: dict | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two forwards in flight both are PEFT's, and so are their recomputations."""
    monkeypatch.setattr(contest, "SLOWER", float("inf"))
    model = add_lora(quantize_4bit_(tiny_llama()), target_modules=["q_proj"]).train()
    model.enable_input_require_grads()
    if checkpoints is not None:
        model.gradient_checkpointing_enable(checkpoints)
    peftkern.patch(model)
    batch = text_batch()
    for step in range(2):
        losses = []
        for _ in range(2):
            peftkern.reset_stats()
            losses.append(model(**batch).loss)
            found = {reason for op, reason in peftkern.stats().fallbacks if op == "nf4_linear"}
            waiting = {trial.IN_FLIGHT} if losses[1:] else {trial.IN_FLIGHT, trial.UNMEASURED}
            assert found <= waiting and bool(found) is (step == 0)
        for loss in losses:
            peftkern.reset_stats()
            loss.backward()
            found = {reason for op, reason in peftkern.stats().fallbacks if op == "nf4_linear"}
            assert found == ({trial.IN_FLIGHT} if checkpoints and step == 0 else set())
        model.zero_grad()


def test_hooks_of_a_second_adapter_see_no_trial() -> None:
    model = lora_net(make_linear4bit()).train()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["proj"]))
    model.base_model.set_adapter(["default", "second"])
    peftkern.patch(model)
    seen: list[int] = []
    layer_of(model).lora_A["second"].register_forward_hook(lambda *call: seen.append(1))
    for calls in range(1, 5):
        model(torch.randn(20, K)).sum().backward()
        assert len(seen) == calls


def test_an_input_is_not_cast_where_peft_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "SLOWER", 0.0)
    model = lora_net(make_linear4bit(compute_dtype=torch.bfloat16)).train()
    peftkern.patch(model)
    x = torch.randn(40, K)
    for _ in range(2):
        model(x)
    assert {verdict["side"] for verdict in trust.ledger(CPU).classes.values()} == {trust.PEER}
    monkeypatch.setattr(casts, "_last", None)
    model(x)
    with torch.no_grad(), model.disable_adapter():
        model(x)
    assert casts._last is None
