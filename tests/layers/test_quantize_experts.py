"""`quantize_` on models with fused experts, alone and with PEFT before or after it."""

from __future__ import annotations

import copy
import io
import weakref

import pytest
import torch
from expert_models import add_experts_lora, expert_parameters, tiny_moe
from peft import prepare_model_for_kbit_training
from torch import nn

import peftkern
from peftkern.layers.expert_stack import stacks_of
from peftkern.layers.nf4_stack import NF4Stack

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
IDS = torch.arange(12).view(2, 6)


def mixtral(implementation: str = "eager", dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny_moe("Mixtral", num_hidden_layers=1).to(dtype).train()
    model.set_experts_implementation(implementation)
    return model


def dequantized(model: nn.Module) -> nn.Module:
    """A copy with the dense values of its experts, its linear layers as they are."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for name, stack in stacks_of(module).items():
            module._parameters[name] = nn.Parameter(stack.dequantize())
    return twin.requires_grad_(False)


def step(model: nn.Module) -> dict[str, torch.Tensor]:
    """Logits, and the gradients of what is trained."""
    model.zero_grad()
    output = model(input_ids=IDS, labels=IDS)
    output.loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert found and all(grad is not None for grad in found.values())
    return {"logits": output.logits, **found}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "Llama4Text", "JetMoe"])
def test_every_family_reads_its_experts(family):
    model = tiny_moe(family)
    wanted = set(expert_parameters(model))
    names = peftkern.quantize_(model)
    stacks = {f"{path}.{own}" for path, m in model.named_modules() for own in stacks_of(m)}
    assert stacks == wanted <= set(names)
    assert torch.equal(model(input_ids=IDS).logits, dequantized(model)(input_ids=IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_peft_before_and_after(implementation, dtype):
    before = mixtral(implementation, dtype)
    names = peftkern.quantize_(before)
    assert names[-2:] == [f"model.layers.0.mlp.experts.{n}_proj" for n in ("gate_up", "down")]
    wanted = step(add_experts_lora(dequantized(before)))
    assert_same(step(add_experts_lora(before)), wanted)
    after = add_experts_lora(mixtral(implementation, dtype))
    peftkern.quantize_(after)
    assert_same(step(after), wanted)


@pytest.mark.parametrize(
    ("implementation", "backend"),
    [("eager", "eager"), ("eager", "aot_eager"), ("batched_mm", "eager")],
)
def test_every_implementation_compiles(implementation, backend):
    """The loop over experts breaks the graph: what it reads is decoded between two of them."""
    model = mixtral(implementation)
    peftkern.quantize_(model)
    torch._dynamo.reset()  # what it has compiled for other models counts against its limit
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_k_bit_preparation_keeps_the_bytes_and_trains(reentrant):
    model = mixtral(dtype=torch.bfloat16)
    peftkern.quantize_(model)
    experts = model.model.layers[0].mlp.experts
    packed = experts.gate_up_proj._packed.clone()
    model.is_loaded_in_4bit = True
    kwargs = {"use_reentrant": reentrant}
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=kwargs)
    stack = experts.gate_up_proj
    assert isinstance(stack, NF4Stack) and torch.equal(stack._packed, packed)
    model = add_experts_lora(model)
    found = step(model)
    model.base_model.model.gradient_checkpointing_disable()
    assert_same(found, step(model))


def test_a_merge_is_quantized_again_and_reported():
    model = add_experts_lora(mixtral())
    peftkern.quantize_(model, include=["experts"])
    with torch.no_grad():
        adapter = model(input_ids=IDS).logits
        with pytest.warns(UserWarning, match="6 of 6 experts were quantized to NF4 again"):
            model.merge_adapter()
        merged = model(input_ids=IDS).logits
        with model.disable_adapter(), pytest.warns(UserWarning, match="quantized to NF4 again"):
            frozen = model(input_ids=IDS).logits
    assert (merged - adapter).norm() < 0.5 * (frozen - adapter).norm()


def test_save_and_load():
    model = add_experts_lora(mixtral())
    peftkern.quantize_(model)
    twin = add_experts_lora(mixtral())
    torch.manual_seed(7)
    for parameter in twin.parameters():
        nn.init.normal_(parameter)
    peftkern.quantize_(twin)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    wanted = step(model)
    assert_same(step(twin), wanted)
    assert_same(step(copy.deepcopy(twin)), wanted)


def test_the_dense_weights_are_let_go_of_one_by_one(monkeypatch):
    model = mixtral()
    weights = [weakref.ref(p) for p in model.model.layers[0].mlp.experts.parameters()]
    alive = []
    whole = NF4Stack.from_dense.__func__

    def from_dense(cls, *args, **kwargs):
        alive.append(sum(weight() is not None for weight in weights))
        return whole(cls, *args, **kwargs)

    monkeypatch.setattr(NF4Stack, "from_dense", classmethod(from_dense))
    peftkern.quantize_(model)
    assert alive == [2, 1] and all(weight() is None for weight in weights)


def test_experts_can_be_chosen_and_left_out():
    down = "model.layers.0.mlp.experts.down_proj"
    assert peftkern.quantize_(mixtral(), include=["down_proj"]) == [down]
    names = peftkern.quantize_(mixtral(), exclude=["lm_head", "experts"])
    assert len(names) == 4 and "experts" not in "".join(names)
