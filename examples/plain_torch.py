"""LoRA over NF4 without PEFT or transformers: layers of peftkern in a model of your own."""

from pydoc_data.topics import topics  # Python's language reference: text that is always there

import torch
from torch import nn

import peftkern
from peftkern.layers import NF4LoRALinear

WIDTH, CONTEXT = 512, 8


class NextByte(nn.Module):
    """The byte that follows CONTEXT others; its linear layers have NF4 weights and LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH // CONTEXT).requires_grad_(False)
        self.hidden = NF4LoRALinear.from_linear(nn.Linear(WIDTH, WIDTH), r=16, lora_alpha=32)
        self.head = NF4LoRALinear.from_linear(nn.Linear(WIDTH, 256), r=16, lora_alpha=32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.hidden(self.embed(ids).flatten(-2))))


torch.manual_seed(0)
model = NextByte()
text = torch.tensor(list("\n".join(topics.values()).encode()))
windows = text[: 20 * 256 + CONTEXT].unfold(0, CONTEXT + 1, 1)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
for step, batch in enumerate(windows.split(256), 1):
    logits = model(batch[:, :-1])
    loss = nn.functional.cross_entropy(logits, batch[:, -1])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")

adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
print(f"adapters: {', '.join(f'{name} {tuple(p.shape)}' for name, p in adapters.items())}")
model.head = model.head.merge()  # a dense nn.Linear that computes the same
print(peftkern.stats())
