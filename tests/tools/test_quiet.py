"""Planning from Python leaves other libraries, torch's settings and its generator as they were."""

from __future__ import annotations

import logging
import os
import warnings

import pytest
import torch
import transformers
from plan_configs import LLAMA_CONFIG

from peftkern.tools import models
from peftkern.tools.plan.plan import Training, plan, read_model
from peftkern.tools.plan.presets import PRESETS
from peftkern.tools.quiet import quiet


def state() -> dict:
    """What a process has one of."""
    return {
        "transformers": transformers.logging.get_verbosity(),
        "bitsandbytes": logging.getLogger("bitsandbytes").level,
        "filters": list(warnings.filters),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "environment": dict(os.environ),
        "generator": torch.get_rng_state().tolist(),
    }


@pytest.fixture(autouse=True)
def talkative():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_info()
    yield
    transformers.logging.set_verbosity(before)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_plan(method):
    before = state()
    plan(LLAMA_CONFIG, Training(method=method, batch=1, sequence=16, r=4))
    assert state() == before


def test_configs(tmp_path):
    before = state()
    preset = next(iter(PRESETS))
    read_model(preset)
    models.from_config(LLAMA_CONFIG)
    models.empty_model(models.read_config(preset), torch.bfloat16)
    with pytest.raises(ValueError, match="expected a config"):
        models.read_config(str(tmp_path))
    assert state() == before


def test_errors_are_logged():
    with quiet():
        assert transformers.logging.get_verbosity() == logging.ERROR
