"""ms-swift's own command with an external plug-in, against the same run without it."""

from __future__ import annotations

import importlib.util

import pytest
from framework_runs import assert_same, save_model, sums, told, write_lines
from processes import run_code

if importlib.util.find_spec("swift") is None:
    pytest.skip("ms-swift is not installed", allow_module_level=True)

STEPS, LAYERS = 3, 14
# In a process of its own: importing ms-swift changes classes of PEFT.
RUN = """
import json, os, sys
import peft_models, torch
from framework_runs import tell
from swift.pipelines import sft_main

torch.set_num_threads(1)
peft_models.take_small_layers()
options = sys.argv[2:]
for more in ([], ["--external_plugins", sys.argv[1], "--callbacks", "peftkern"]):
    tell(sft_main([*options, *more])["log_history"])
"""


@pytest.mark.slow
def test_the_losses_are_those_without_it(tmp_path):
    said = [[("user", question), ("assistant", answer)] for question, answer in sums()]
    rows = [{"messages": [{"role": r, "content": c} for r, c in pair]} for pair in said]
    plugin = tmp_path / "use_peftkern.py"
    plugin.write_text("import peftkern.integrations.swift\n")
    options = {
        "model": save_model(tmp_path / "model"),
        "model_type": "llama",
        "template": "dummy",
        "torch_dtype": "float32",
        "dataset": write_lines(tmp_path / "rows.jsonl", rows),
        "split_dataset_ratio": 0,
        "load_from_cache_file": "false",
        "tuner_type": "lora",
        "target_modules": "all-linear",
        "lora_dropout": 0,
        "output_dir": tmp_path / "out",
        "save_strategy": "no",
        "report_to": "none",
        "max_steps": STEPS,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "check_model": "false",
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", value)]
    output = run_code(RUN, plugin, *arguments, PEFTKERN_TRUST="always")
    assert "peftkern: 14 patched (lora.Linear 14), 0 skipped" in output
    assert_same(*told(output), STEPS, LAYERS)
