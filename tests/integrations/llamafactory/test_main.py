"""LLaMA-Factory's classic trainer and v1, by the command that brings peftkern along."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from framework_runs import assert_same, save_model, sums, told, write_lines
from processes import run_code

if importlib.util.find_spec("llamafactory") is None:
    pytest.skip("LLaMA-Factory is not installed", allow_module_level=True)
from llamafactory.extras.env import VERSION

HAS_KERNELS = not VERSION.startswith(("0.9.4", "0.9.5"))

STEPS, LAYERS = 3, 14
SETUP = """
import json, runpy, sys
import peft_models, torch
from framework_runs import tell

torch.set_num_threads(1)
peft_models.take_small_layers()
"""
# In processes of their own, as LLaMA-Factory's commands are.
CLASSIC = f"""{SETUP}
from llamafactory.train.tuner import run_exp

plain, ours = sys.argv[1:]
logs = lambda file: json.load(open(json.load(open(file))["output_dir"] + "/trainer_state.json"))
run_exp(json.load(open(plain)))
tell(logs(plain)["log_history"])
sys.argv = ["peftkern", "train", ours]
runpy.run_module("peftkern.integrations.llamafactory", run_name="__main__")
tell(logs(ours)["log_history"])
"""
V1_RUN = f"""{SETUP}
sys.argv = ["peftkern", "sft", sys.argv[1]]
runpy.run_module("peftkern.integrations.llamafactory", run_name="__main__")
folder = json.load(open(sys.argv[1]))["output_dir"]
tell([json.loads(line) for line in open(folder + "/trainer_log.jsonl")])
"""
QUIET = {"PEFTKERN_TRUST": "always", "DISABLE_VERSION_CHECK": "1"}


def configurations(folder: Path, options: dict[str, object], **ours: object) -> list[Path]:
    """Write the configuration of a run without peftkern and that of one with it."""
    files = []
    for name, more in (("plain", {}), ("ours", ours)):
        file = folder / f"{name}.yaml"  # JSON is YAML
        content = {**options, "output_dir": str(folder / name), **more}
        file.write_text(json.dumps(content), encoding="utf-8")
        files.append(file)
    return files


@pytest.mark.slow
def test_the_classic_trainer_s_losses_are_those_without_it(tmp_path):
    rows = [{"instruction": question, "input": "", "output": answer} for question, answer in sums()]
    write_lines(tmp_path / "rows.jsonl", rows)
    known = {"sums": {"file_name": "rows.jsonl"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(known), encoding="utf-8")
    options = {
        "model_name_or_path": str(save_model(tmp_path / "model")),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 4,
        "lora_target": "all",
        "dataset": "sums",
        "dataset_dir": str(tmp_path),
        "template": "empty",
        "cutoff_len": 64,
        "overwrite_cache": True,
        "disable_gradient_checkpointing": True,  # 0.9.5 has its own, for transformers up to 5.6
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "max_steps": STEPS,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "seed": 3,
    }
    files = configurations(tmp_path, options)
    output = run_code(CLASSIC, *files, **QUIET)
    assert output.count("peftkern: 14 patched (lora.Linear 14), 0 skipped") == 1
    assert_same(*told(output), STEPS, LAYERS)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_KERNELS, reason="LLaMA-Factory before 0.9.6 has other kernel plug-ins")
def test_the_losses_of_v1_are_those_without_it(tmp_path):
    said = [[("user", question), ("assistant", answer)] for question, answer in sums()]
    parts = [[(role, [{"type": "text", "value": text}]) for role, text in pair] for pair in said]
    rows = [{"messages": [{"role": r, "content": c} for r, c in pair]} for pair in parts]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    options = {
        "model": str(save_model(tmp_path / "model")),
        "model_class": "llm",
        "peft_config": {"name": "lora", "r": 4, "lora_dropout": 0, "target_modules": "all"},
        "train_dataset": str(data),
        "cutoff_len": 64,
        "micro_batch_size": 4,
        "learning_rate": 0.01,
        "max_steps": STEPS,
        "logging_steps": 1,
        "bf16": False,
        "seed": 3,
    }
    files = configurations(tmp_path, options, kernel_config={"name": "auto,peftkern"})
    outputs = [run_code(V1_RUN, file, USE_V1="1", **QUIET) for file in files]
    assert_same(*(run for output in outputs for run in told(output)), STEPS, LAYERS)
