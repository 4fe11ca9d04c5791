"""Models whose weights accelerate loads for each call, from memory or from disk: a patched layer
enters its modules, and is served where all of their weights are there."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_align_device_hook
from engines import nf4_llama, outcome
from fsdp import ADAPTED, small_llama
from peft_models import (
    K,
    assert_falls_back,
    fallbacks,
    layer_of,
    lora_net,
    make_linear,
    served_by_us,
    text_batch,
)
from rows import ACCELERATE_ROWS
from torch import nn

import peftkern

MODELS: dict[str, Callable[[], nn.Module]] = {
    "LoRA": small_llama,
    "DoRA": functools.partial(small_llama, use_dora=True),
    "QLoRA (bitsandbytes)": functools.partial(small_llama, storage=torch.uint8),
    "QLoRA (peftkern.quantize_)": nf4_llama,
}
CPU = torch.device("cpu")


def in_map(model: nn.Module, folder: Path, first: str) -> nn.Module:
    """A device map with the first decoder layer in another place."""
    inner = "base_model.model.model"
    places = dict.fromkeys(("embed_tokens", "layers.1", "norm", "rotary_emb"), "cpu")
    names = {f"{inner}.{name}": where for name, where in {**places, "layers.0": first}.items()}
    names["base_model.model.lm_head"] = "cpu"
    return dispatch_model(model, names, main_device="cpu", offload_dir=folder, force_hooks=True)


ENGINES: dict[str, Callable[[nn.Module, Path], Any]] = {
    "accelerate, device_map": functools.partial(in_map, first="cpu"),
    "accelerate, offload to the CPU": lambda model, folder: cpu_offload(model, CPU),
    "accelerate, offload to disk": lambda model, folder: disk_offload(model, folder, CPU),
}


@pytest.mark.parametrize("row", ACCELERATE_ROWS, ids=lambda row: f"{row.engine}: {row.method}")
@pytest.mark.parametrize("order", ["patch first", "patch last"])
def test_rows(row, order, tmp_path):
    model = MODELS[row.method]()
    expected = model(**text_batch()).loss
    if order == "patch first":
        peftkern.patch(model)
    if row.outcome.startswith("refused: "):
        with pytest.raises(NotImplementedError, match=row.outcome.removeprefix("refused: ")):
            ENGINES[row.engine](model, tmp_path)
            model(**text_batch())
        return
    ENGINES[row.engine](model, tmp_path)
    assert peftkern.patch(model).falling_back == {}
    peftkern.reset_stats()
    loss = model(**text_batch()).loss
    loss.backward()
    assert outcome(14 if "QLoRA" in row.method else ADAPTED) == row.outcome
    torch.testing.assert_close(loss, expected)


def test_one_layer_on_disk_and_one_in_memory(tmp_path):
    model = small_llama()
    expected = model(**text_batch()).loss
    in_map(model, tmp_path, "disk")
    peftkern.patch(model)
    peftkern.reset_stats()
    with torch.no_grad():
        torch.testing.assert_close(model(**text_batch()).loss, expected)
    assert outcome(ADAPTED) == "served"


def offloaded(**config: Any) -> nn.Module:
    model = lora_net(make_linear(), **config)
    attach_align_device_hook(model, "cpu", offload=True)
    peftkern.patch(model)
    peftkern.reset_stats()
    return model


def test_gradient_of_the_input():
    x, twin = (torch.randn(2, K).requires_grad_() for _ in range(2))
    twin.data.copy_(x.data)
    offloaded()(x).square().sum().backward()
    assert served_by_us() == 1 and fallbacks() == {}
    lora_net(make_linear())(twin).square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)


def test_weights_are_freed():
    """Nothing keeps what a hook has loaded, and the hooks are as they were."""
    model = offloaded()
    base = layer_of(model).base_layer
    loaded = []
    load = base._hf_hook.pre_forward

    def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = load(module, *args, **kwargs)
        loaded.append(weakref.ref(module.weight))
        return result

    base._hf_hook.pre_forward = watched
    before = [dict(vars(base)), type(base)]
    with torch.no_grad():
        model(torch.randn(2, K))
    gc.collect()
    assert served_by_us() == 1 and loaded[0]() is None and base.weight.is_meta
    assert {
        k: v for k, v in vars(base).items() if k in ("forward", "_old_forward", "_hf_hook")
    } == {k: v for k, v in before[0].items() if k in ("forward", "_old_forward", "_hf_hook")}
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(2, K + 1))
    with torch.no_grad():
        model(torch.randn(2, K))
    assert type(base) is before[1] and vars(base)["forward"] is before[0]["forward"]


def test_several_devices():
    """Two devices of a layer's parts: PEFT calls them, which on a meta device leads nowhere."""
    model = lora_net(make_linear())
    layer = layer_of(model)
    add_hook_to_module(layer.base_layer, AlignDevicesHook("cpu", offload=True))
    add_hook_to_module(layer.lora_A["default"], AlignDevicesHook("meta", offload=True))
    peftkern.patch(model)
    peftkern.reset_stats()
    with pytest.raises((RuntimeError, NotImplementedError)):
        model(torch.randn(2, K))
    assert fallbacks() == {"parts are loaded to several devices": 1}


def test_hooks_of_the_user_are_called():
    model = lora_net(make_linear())
    attach_align_device_hook(model, "cpu", offload=True)
    factor = layer_of(model).lora_B["default"]
    factor.register_forward_hook(lambda module, inputs, y: y * 0.5)
    assert_falls_back(model, "hooks on lora_B")
