"""Programs of examples/ run as they are, are short enough to copy, and are served by kernels."""

from __future__ import annotations

import pytest
from paths import EXAMPLES, ROOT
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
MOST_LINES = 60


def test_every_example_is_tested():
    assert sorted(SERVED) == sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", SERVED)
def test_example_runs(name: str):
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    peftkern.reset_stats()
    status, said, error = run_here(str(path.relative_to(ROOT)))
    assert status == 0, error
    op, words = SERVED[name]
    assert op in said and words in said, said
    assert peftkern.stats().fallbacks == {}, said
