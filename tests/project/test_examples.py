"""Programs of examples/ run as they are, are short enough to copy, and are served by kernels."""

from __future__ import annotations

import re

import pytest
from paths import EXAMPLES, ROOT
from processes import run_python
from scripts import run_here

import peftkern

SERVED = {  # what must have been served, and what the program says at the end
    "adalora_trainer": ("nf4_lora_linear_backward", "rank "),
    "moe_qlora": ("nf4_grouped_linear_backward", "in NF4: 12 linear layers"),
    "own_layer": ("nf4_lora_linear_backward", "2 patched (__main__.MyLoRA 2)"),
    "plain_torch": ("nf4_lora_linear_backward", "adapters: hidden.lora_A (16, 512)"),
    "qlora_trainer": ("nf4_lora_linear_backward", "peftkern/tokens_per_second"),
    "quickstart": ("nf4_lora_linear_backward", "step 20: loss"),
}
LAUNCHED = "fsdp_qlora"  # by a launcher, in two processes
OF_DEEPSPEED = "zero3_lora"  # tests/integrations/engines/test_zero.py launches it
MOST_LINES = 60


def test_every_example_is_tested_and_short():
    programs = {path.stem: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    assert sorted([*SERVED, LAUNCHED, OF_DEEPSPEED]) == sorted(programs)
    lines = {name: len(text.splitlines()) for name, text in programs.items()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}
    for page in ("README.md", "CONTRIBUTING.md"):
        assert f"at most {MOST_LINES} lines" in (ROOT / page).read_text(encoding="utf-8"), page


@pytest.mark.parametrize("name", SERVED)
def test_example_runs(name: str):
    peftkern.reset_stats()
    status, said, error = run_here(str((EXAMPLES / f"{name}.py").relative_to(ROOT)))
    assert status == 0, error
    op, words = SERVED[name]
    assert op in said and words in said, said
    assert peftkern.stats().fallbacks == {}, said


@pytest.mark.more
def test_the_example_of_fsdp_is_launched_as_it_says():
    """On CPUs, by the config file that users copy; every layer is served, its losses fall.

    tests/integrations/engines/test_fsdp.py trains QLoRA as accelerate wraps it, without a launcher.
    """
    launch = ("-m", "accelerate.commands.launch", "--main_process_port", "0")
    config = EXAMPLES / f"{LAUNCHED}.yaml"
    program = EXAMPLES / f"{LAUNCHED}.py"
    done = run_python(*launch, "--config_file", config, program, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(x) for x in re.findall(r"^step \d+: loss (\S+)$", done.stdout, re.MULTILINE)]
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.5, done.stdout
    assert re.search(r"nf4_lora_linear_backward +cpu +140$", done.stdout, re.MULTILINE)
    assert "fell back" not in done.stdout and done.stdout.count("back end") == 1
