"""`extract` where one of the checkpoints, or both, are in 4 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_folders import save_llama
from decoded_folders import KINDS, decode
from merged_folders import load, save_base
from quantized_folders import convert
from torch import Tensor

from peftkern.tools.adapters import Adapter, AdapterError
from peftkern.tools.adapters.extract import ExtractRule, extract

PLANTED = 3


def tune(base: Path, folder: Path, size: float = 0.3, layers: str = "") -> Path:
    """A fine-tune: other norms, and updates of rank PLANTED of layers with this in their names."""
    model = load(base)
    torch.manual_seed(11)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.mul_(1.25)
            elif layers in name:
                left, right = torch.randn(*p.shape[:-1], PLANTED), torch.randn(PLANTED, p.shape[-1])
                update = left @ right
                p.copy_(p + size * update * p.float().norm() / update.norm())
    return save_base(folder, model)


def factors(adapter: Adapter) -> dict[str, Tensor]:
    found = dict(adapter.extras)
    for key, update in adapter.updates.items():
        found |= {f"{key}.lora_A": update.lora_A, f"{key}.lora_B": update.lora_B}
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_is_that_of_the_decoded_checkpoints(tmp_path: Path, kind: str) -> None:
    """Of a stack of experts, too, whose other checkpoint has them one by one."""
    format, make = KINDS[kind]
    dense = save_base(tmp_path / "dense", make())
    plain = {"base": dense, "tuned": tune(dense, tmp_path / "dense tuned")}
    stored, decoded = {}, {}
    for name, folder in plain.items():
        stored[name], decoded[name] = tmp_path / name, tmp_path / f"{name} decoded"
        convert(folder, stored[name], format=format)
        decode(stored[name], folder, decoded[name])
    rule = ExtractRule("rank", 4)
    for base, tuned in (
        (stored["base"], plain["tuned"]),
        (plain["base"], stored["tuned"]),
        (stored["base"], stored["tuned"]),
    ):
        pair = [decoded.get(one.name, one) for one in (base, tuned)]
        (got, layers), (expected, others) = extract(base, tuned, rule), extract(*pair, rule)
        assert got.updates.keys() == expected.updates.keys() and len(got.updates) > 2
        ours, theirs = factors(got), factors(expected)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
        assert {k: one.loss for k, one in layers.items()} == {
            k: one.loss for k, one in others.items()
        }
        assert got.config["modules_to_save"] == expected.config["modules_to_save"]


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_what_the_rounding_to_4_bits_explains_is_left_out(
    tmp_path: Path, format: str, both: bool
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    dense = save_llama(tmp_path / "dense", torch.float32, **sizes)
    tuned = tune(dense, tmp_path / "tuned", layers="q_proj")
    folders = [tmp_path / "base 4", tmp_path / "tuned 4"]
    for folder, stored in zip((dense, tuned), folders, strict=True):
        convert(folder, stored, format=format)
    found, _ = extract(folders[0] if both else dense, folders[1])
    assert set(found.updates) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert {update.rank for update in found.updates.values()} == {PLANTED}
    assert "model.norm" in found.config["modules_to_save"]
    kept = extract(dense, folders[1], ExtractRule("rank", 2))[0]
    assert len(kept.updates) == 14  # a rank that was asked for is one of every layer
    with pytest.raises(AdapterError, match=r"differs from .*, but for what rounding explains"):
        extract(dense, folders[0])


def test_what_a_qlora_of_the_base_merged_into_16_bits(tmp_path: Path) -> None:
    """The base is what it is decoded to, and so its own rounding no noise."""
    dense = save_llama(tmp_path / "dense", hidden_size=256, intermediate_size=512, head_dim=64)
    convert(dense, tmp_path / "base")
    decoded = decode(tmp_path / "base", dense, tmp_path / "decoded")
    tune(decoded, tmp_path / "tuned", 0.02, layers="_proj")  # a fifth of what NF4 loses
    found, _ = extract(tmp_path / "base", tmp_path / "tuned")
    assert len(found.updates) == 14
    large = [update.rank for update in found.updates.values() if min(update.size) >= 256]
    assert set(large) == {PLANTED}
