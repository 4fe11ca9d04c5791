"""Adapters of diffusers and of kohya: their own readers' formulas, names, and round trips."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapters import CLOSE, MODEL, deltas, refused
from peft import LoraConfig, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from peftkern.tools.adapters import read_adapter
from peftkern.tools.adapters.convert.run import convert_adapter

pytestmark = pytest.mark.filterwarnings("ignore")
FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(6, 6)])


class UNet(nn.Module):
    """Names as diffusers has them, underscores among them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 5, 3)
        block = nn.ModuleDict({"attn1": Attention(), "attn2": Attention()})
        self.down_blocks = nn.ModuleList([block])
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(4, 8)})


UNET = "conv_in|.*to_[qk]|.*to_out.0|.*linear_1"
CASES = {
    "plain": {},
    "power of two": {"lora_alpha": 1},
    "ranks": {"rank_pattern": {"to_q": 3, "conv_in": 4}, "alpha_pattern": {"to_k": 5}},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}


def make(case: str, folder: Path):
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": UNET, **CASES[case]})
    model = get_peft_model(UNet(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    model.save_pretrained(folder / "a")
    return model


@pytest.fixture
def base(tmp_path):
    """A pipeline's folder, as far as names go."""
    for component, model in (("unet", UNet()), ("text_encoder", Encoder())):
        (tmp_path / "base" / component).mkdir(parents=True)
        save_file(model.state_dict(), tmp_path / "base" / component / "model.safetensors")
    return tmp_path / "base"


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(4, 4)})])
        self.text_model = nn.ModuleDict({"layers": layers})


def load_as_diffusers(file: Path) -> dict:
    """Load the unet's part as diffusers does: the config in the header, PEFT for the rest."""
    with safe_open(file, "pt") as opened:
        fields = json.loads(opened.metadata()[METADATA])
    config = {name.removeprefix("unet."): value for name, value in fields.items()}
    state = {name.removeprefix("unet."): one for name, one in load_file(file).items()}
    model = inject_adapter_in_model(LoraConfig(**config), UNet())
    unexpected = set_peft_model_state_dict(model, state).unexpected_keys
    assert not unexpected
    layers = (layer for layer in model.modules() if isinstance(layer, LoraLayer))
    assert all(layer.scaling["default"] == 1 for layer in layers)
    return deltas(model)


@pytest.mark.parametrize("case", CASES)
def test_diffusers_loads_the_same_updates(case, tmp_path):
    wanted = deltas(make(case, tmp_path))
    done = convert_adapter(tmp_path / "a", tmp_path / "b", "diffusers", component="unet")
    assert (done.rounded == ()) == (case == "power of two")
    torch.testing.assert_close(load_as_diffusers(tmp_path / "b" / FILE), wanted, **CLOSE)


def as_kohya(file: Path) -> dict:
    """Compute the updates as sd-scripts merges them, by kohya's names."""
    state, found = load_file(file), {}
    for name in (key.removesuffix(".alpha") for key in state if key.endswith(".alpha")):
        down, up = (state[f"{name}.lora_{side}.weight"] for side in ("down", "up"))
        scale = state[f"{name}.alpha"].item() / len(down)
        if down.ndim == 2:
            found[name] = up @ down * scale
        else:
            conved = nn.functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)
            found[name] = conved * scale
    return found


@pytest.mark.parametrize("case", CASES)
def test_kohya_computes_the_same_updates(case, tmp_path):
    wanted = deltas(make(case, tmp_path))
    convert_adapter(tmp_path / "a", tmp_path / "b", "kohya", component="unet")
    wanted = {f"lora_unet_{name.replace('.', '_')}": one for name, one in wanted.items()}
    torch.testing.assert_close(as_kohya(tmp_path / "b" / FILE), wanted, **CLOSE)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_there_and_back(to, case, tmp_path, base):
    make(case, tmp_path)
    convert_adapter(tmp_path / "a", tmp_path / "p", "peft")
    convert_adapter(tmp_path / "p", tmp_path / "b", to, component="unet")
    done = convert_adapter(tmp_path / "b", tmp_path / "back", "peft", base=base)
    assert done.layout == to and done.rounded == ()
    mine, theirs = (load_file(tmp_path / name / MODEL) for name in ("back", "p"))
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype and torch.equal(mine[name], tensor), name


def test_kohyas_own_file_keeps_its_names_and_its_scaling(tmp_path, base):
    state = {
        "lora_te_text_model_layers_0_q_proj.lora_down.weight": torch.randn(3, 4).half(),
        "lora_te_text_model_layers_0_q_proj.lora_up.weight": torch.randn(4, 3).half(),
        "lora_te_text_model_layers_0_q_proj.alpha": torch.tensor(1.5, dtype=torch.bfloat16),
        "lora_unet_time_embedding_linear_1.lora_down.weight": torch.randn(2, 4),
        "lora_unet_time_embedding_linear_1.lora_up.weight": torch.randn(8, 2),
    }
    save_file(state, tmp_path / "mine.safetensors")
    done = convert_adapter(tmp_path / "mine.safetensors", tmp_path / "b", "diffusers", base=base)
    updates = read_adapter(tmp_path / "b").updates
    names = ["text_encoder.text_model.layers.0.q_proj", "unet.time_embedding.linear_1"]
    text, time = (updates[name] for name in names)
    te, unet = (list(state)[i].removesuffix(".lora_down.weight") for i in (0, 3))
    assert torch.equal(text.lora_A, state[f"{te}.lora_down.weight"]) and done.rounded == ()
    assert torch.equal(text.lora_B, state[f"{te}.lora_up.weight"] / 2)
    assert torch.equal(time.lora_B, state[f"{unet}.lora_up.weight"])  # no alpha: scaling 1
    for name in ("text_encoder", "unet"):
        convert_adapter(tmp_path / "b", tmp_path / name, "peft", component=name)
        assert len(read_adapter(tmp_path / name).updates) == 1
    convert_adapter(tmp_path / "b", tmp_path / "back", "kohya", base=base)
    back = load_file(tmp_path / "back" / FILE)
    assert torch.equal(back[f"{te}.lora_up.weight"], state[f"{te}.lora_up.weight"] / 2)
    assert back[f"{te}.alpha"] == 3 and back[f"{unet}.alpha"] == 2
    convert_adapter(tmp_path / "mine.safetensors", tmp_path / "same", "kohya")  # no base needed
    assert load_file(tmp_path / "same" / FILE).keys() == back.keys()


def test_two_text_encoders_have_numbers(tmp_path, base):
    (base / "text_encoder_2").mkdir()
    save_file(Encoder().state_dict(), base / "text_encoder_2" / "model.safetensors")
    pair = {"lora_A.weight": torch.ones(1, 4), "lora_B.weight": torch.ones(4, 1)}
    name = "text_model.layers.0.q_proj"
    for components in (["text_encoder"], ["text_encoder", "text_encoder_2"]):
        state = {f"{c}.{name}.{k}": t.clone() for c in components for k, t in pair.items()}
        folder = tmp_path / "-".join(components)
        folder.mkdir()
        save_file(state, folder / FILE)
        convert_adapter(folder, folder / "b", "kohya", base=base)
        written = {key.split("_text")[0] for key in load_file(folder / "b" / FILE)}
        assert written == {"lora_te1", "lora_te2"} if components[1:] else {"lora_te1"}
        convert_adapter(folder / "b", folder / "back", "diffusers", base=base)
        back = load_file(folder / "back" / FILE)
        assert back.keys() == state.keys()


DOWN, UP = "lora_unet_conv_in.lora_down.weight", "lora_unet_conv_in.lora_up.weight"
GOOD = {DOWN: torch.ones(2, 3, 3, 3), UP: torch.ones(5, 2, 1, 1)}
BAD = {
    "no partner": ({UP: None}, (UP, "expected it")),
    "another rank": ({DOWN: torch.ones(3, 3, 3, 3)}, ("lora_unet_conv_in", "[3, 3, 3, 3]")),
    "no pair": ({DOWN: torch.ones(2)}, ("lora_unet_conv_in", "[2]")),
    "no rank": ({DOWN: torch.ones(0, 3, 3, 3)}, ("lora_unet_conv_in", "[0, 3, 3, 3]")),
    "LoHa": ({"lora_unet_x.hada_w1_a": torch.ones(1)}, ("lora_unet_x.hada_w1_a", "another method")),
    "LoKr": ({"lora_unet_x.lokr_w1": torch.ones(1)}, ("lora_unet_x.lokr_w1", "lokr")),
    "Tucker": ({"lora_unet_conv_in.lora_mid.weight": torch.ones(1)}, ("lora_mid",)),
    "a stranger": ({"x.lora_down.weight": torch.ones(1, 1)}, ("x.lora_down.weight", "lora_unet_")),
    "alpha of 0": ({"lora_unet_conv_in.alpha": torch.tensor(0.0)}, ("conv_in.alpha", "got [0.0]")),
    "alpha NaN": ({"lora_unet_conv_in.alpha": torch.tensor(torch.nan)}, ("conv_in.alpha", "nan")),
    "alphas": ({"lora_unet_conv_in.alpha": torch.ones(2)}, ("conv_in.alpha", "[1.0, 1.0]")),
    "norms of columns": (
        {"lora_unet_conv_in.dora_scale": torch.ones(1, 3, 1, 1)},
        ("lora_unet_conv_in.dora_scale", "5 outputs", "[1, 3, 1, 1]"),
    ),
    "integers": ({DOWN: torch.ones(2, 3, 3, 3).int()}, (DOWN, "floating point", "int32")),
    "not finite": ({UP: torch.full((5, 2, 1, 1), torch.inf)}, ("conv_in", "NaN or infinity")),
}


@pytest.mark.parametrize("case", BAD)
def test_kohyas_files_with_a_defect(case, tmp_path, base):
    change, words = BAD[case]
    state = {name: one for name, one in (GOOD | change).items() if one is not None}
    save_file(state, tmp_path / "bad.safetensors")
    refused(tmp_path / "bad.safetensors", "diffusers", "bad.safetensors", *words, base=base)


def test_kohyas_names_need_a_base_that_has_them(tmp_path, base):
    save_file(GOOD, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", "peft", "a.safetensors", "--base")
    other = {key.replace("conv_in", "conv_out"): tensor for key, tensor in GOOD.items()}
    save_file(other, tmp_path / "b.safetensors")
    refused(tmp_path / "b.safetensors", "peft", "conv_out", "no module", base=base)
    save_file(GOOD, tmp_path / "c.safetensors")
    twins = {"conv.in.weight": torch.ones(1), "conv_in.weight": torch.ones(1)}
    save_file(twins, base / "unet" / "model.safetensors")
    refused(tmp_path / "c.safetensors", "peft", "unet.conv.in and unet.conv_in", base=base)
    refused(tmp_path / "a.safetensors", "peft", "a pipeline of diffusers", base=tmp_path)
    (base / "unet" / "model.safetensors").write_bytes(b"no")
    refused(tmp_path / "a.safetensors", "peft", "model.safetensors", "damaged", base=base)


def write_diffusers(folder: Path, change: dict, fields: dict | str) -> Path:
    pair = {"unet.x.lora_A.weight": torch.ones(2, 3), "unet.x.lora_B.weight": torch.ones(4, 2)}
    state = {name: one for name, one in (pair | change).items() if one is not None}
    text = fields if isinstance(fields, str) else json.dumps(fields)
    folder.mkdir()
    save_file(state, folder / FILE, metadata={METADATA: text})
    return folder


WRONG = {
    "no partner": ({"unet.x.lora_B.weight": None}, {}, ("unet.x.lora_B.weight",)),
    "another rank": ({"unet.x.lora_B.weight": torch.ones(4, 3)}, {}, ("unet.x", "[4, 3]")),
    "integers": ({"unet.x.lora_B.weight": torch.ones(4, 2).int()}, {}, ("lora_B", "int32")),
    "a bias": ({"unet.x.lora_B.bias": torch.ones(3)}, {}, ("unet.x", "bias of 4", "[3]")),
    "a stranger": ({"unet.y.hada_w1": torch.ones(1)}, {}, ("unet.y.hada_w1",)),
    "an earlier name": (
        {"unet.y.to_q_lora.down.weight": torch.ones(1)}, {}, ("to_q_lora.down", "before 0.26")),
    "no JSON": ({}, "{", (METADATA,)),
    "no object": ({}, "[1]", (METADATA, "an object")),
    "a rank that is not": ({}, {"unet.r": 4, "unet.lora_alpha": 4}, ("unet.x", "rank 4", "got 2")),
    "no number": ({}, {"unet.r": "2"}, ("unet: r", "a number")),
    "another method": ({}, {"unet.peft_type": "LOHA"}, ("unet: peft_type", "LOHA")),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_diffusers_files_with_a_defect(case, tmp_path):
    change, fields, words = WRONG[case]
    folder = write_diffusers(tmp_path / "a", change, fields)
    refused(folder, "peft", str(folder / FILE), *words)


def test_components_are_asked_for(tmp_path):
    make("plain", tmp_path)
    for to in ("diffusers", "kohya"):
        refused(tmp_path / "a", to, "component: ", "unet", "got none")
        refused(tmp_path / "a", to, "component: ", "got vae", component="vae")
    extra = {f"text_encoder.y.lora_{x}.weight": torch.ones(1, 1) for x in "AB"}
    folder = write_diffusers(tmp_path / "d", extra, {})
    refused(folder, "peft", "component: ", "text_encoder, unet", "got none")
    refused(folder, "peft", "component: ", "got text_encoder_2", component="text_encoder_2")


def test_what_these_layouts_cannot_hold(tmp_path):
    folder = write_diffusers(
        tmp_path / "a", {f"transformer.y.lora_{x}.weight": torch.ones(1, 1) for x in "AB"}, {}
    )
    refused(folder, "kohya", "transformer.y", "kohya's layout")
    biased = write_diffusers(tmp_path / "b", {"unet.x.lora_B.bias": torch.ones(4)}, {})
    refused(biased, "kohya", "unet.x", "lora_B.bias")
    twins = {f"unet.y_{z}.lora_{x}.weight": torch.ones(1, 1) for x in "AB" for z in "z"}
    twins |= {f"unet.y.{z}.lora_{x}.weight": torch.ones(1, 1) for x in "AB" for z in "z"}
    refused(write_diffusers(tmp_path / "c", twins, {}), "kohya", "unet.y", "another module")


def test_ranks_are_told_by_whole_names(tmp_path):
    """PEFT takes a pattern for the end of a name, so that "q" would be "a.q", too."""
    ranks = {"q": 3, "a.q": 2, "b.q": 2, "c+": 4}
    state = {f"unet.{name}.lora_A.weight": torch.ones(r, 5) for name, r in ranks.items()}
    state |= {f"unet.{name}.lora_B.weight": torch.ones(6, r) for name, r in ranks.items()}
    (tmp_path / "a").mkdir()
    save_file(state, tmp_path / "a" / FILE)
    convert_adapter(tmp_path / "a", tmp_path / "b", "diffusers")
    found = read_adapter(tmp_path / "b").updates
    assert {name.removeprefix("unet."): one.rank for name, one in found.items()} == ranks
    assert all(update.scaling == 1 for update in found.values())
