"""Axolotl's own training from a YAML file with the plug-in, against the same run without it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import yaml
from framework_runs import assert_same, save_model, sums, told, write_lines
from processes import run_code

if importlib.util.find_spec("axolotl") is None:
    pytest.skip("Axolotl is not installed", allow_module_level=True)

STEPS, LAYERS = 3, 14
# In a process of its own: importing Axolotl sets up the root logger and patches transformers.
RUN = """
import sys
import peft_models, torch
from framework_runs import tell
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets, load_preference_datasets
from axolotl.train import train

torch.set_num_threads(1)
peft_models.take_small_layers()
for file in sys.argv[1:]:
    cfg = load_cfg(file)
    load = load_preference_datasets if cfg.rl else load_datasets
    print("kernels:", cfg.lora_mlp_kernel, cfg.lora_qkv_kernel)
    torch.manual_seed(3)  # Axolotl draws lora_A before the trainer sets its own seed
    trainer = train(cfg=cfg, dataset_meta=load(cfg=cfg, cli_args=TrainerCliArgs()))[2]
    tell(trainer.state.log_history)
"""


def configuration(folder: Path, **more: object) -> dict[str, object]:
    """A YAML file's content that trains the tiny Llama on a CPU."""
    rows = [{"instruction": question, "output": answer} for question, answer in sums()]
    data = write_lines(folder / "rows.jsonl", rows)
    return {
        "base_model": str(save_model(folder / "model")),
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
        "datasets": [{"path": str(data), "type": "alpaca"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "sequence_len": 256,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "num_epochs": 1,
        "learning_rate": 0.01,
        "optimizer": "adamw_torch",
        "bf16": False,
        "tf32": False,
        "logging_steps": 1,
        "seed": 3,
        "save_strategy": "no",
        **more,
    }


def run(folder: Path, *configurations: dict[str, object]) -> str:
    files = [folder / f"{i}.yaml" for i in range(len(configurations))]
    for file, content in zip(files, configurations, strict=True):
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return run_code(RUN, *files, PEFTKERN_TRUST="always", AXOLOTL_DO_NOT_TRACK="1")


PLUGIN = {"plugins": ["peftkern.integrations.axolotl.PeftKernPlugin"]}


@pytest.mark.slow
def test_the_losses_are_those_without_it(tmp_path):
    off = dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)
    plain = configuration(tmp_path, **off)
    monitored = {"peftkern": {"monitor": str(tmp_path / "run.jsonl")}}
    output = run(tmp_path, plain, configuration(tmp_path, **PLUGIN, **monitored))
    assert output.count("peftkern: 14 patched (lora.Linear 14), 0 skipped") == 1
    assert output.count("kernels: False False") == 2  # which Axolotl would have turned on
    assert_same(*told(output), STEPS, LAYERS)
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) >= STEPS


RULES = """
import logging, sys
from peft_models import add_lora, tiny_llama
from peftkern.integrations.axolotl import FUSED, PeftKernPlugin

logging.getLogger("peftkern").addHandler(logging.StreamHandler(sys.stdout))
plugin, free, chosen = PeftKernPlugin(), {}, {"lora_mlp_kernel": True, "lora_o_kernel": False}
plugin.register(free)
assert free == dict.fromkeys(FUSED, False), free
plugin.register(chosen)
assert chosen == {"lora_mlp_kernel": True, "lora_o_kernel": False}, chosen
for cfg in (free, chosen):
    print("loaded")
    plugin.post_model_load(cfg, add_lora(tiny_llama()))
"""


@pytest.mark.slow
def test_kernels_of_axolotl_that_the_yaml_turns_on_are_a_warning():
    _, quiet, warned = run_code(RULES, AXOLOTL_DO_NOT_TRACK="1").split("loaded\n")
    assert "kernel" not in quiet
    assert warned.startswith("peftkern: lora_mlp_kernel: these kernels of Axolotl read the weights")
