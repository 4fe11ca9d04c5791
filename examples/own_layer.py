"""A LoRA layer of your own, or of a framework that is not PEFT, served by the same kernels."""

import math
from pydoc_data.topics import topics  # Python's language reference: text that is always there

import torch
from torch import nn

import peftkern

WIDTH, CONTEXT = 512, 8


class MyLoRA(nn.Module):
    """As many projects have it: other names than PEFT's, and a forward in plain PyTorch."""

    def __init__(self, base: nn.Linear, rank: int = 16, alpha: float = 32) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        self.scale = alpha / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * self.up(self.down(x))


def read(layer: MyLoRA) -> peftkern.LoRAParts:
    """Tell peftkern where the parts are; they are read anew at every call."""
    return peftkern.LoRAParts(layer.base, layer.down.weight, layer.up.weight, scaling=layer.scale)


torch.manual_seed(0)
embed = nn.Embedding(256, WIDTH // CONTEXT).requires_grad_(False)
layers = MyLoRA(nn.Linear(WIDTH, WIDTH)), nn.ReLU(), MyLoRA(nn.Linear(WIDTH, 256))
model = nn.Sequential(embed, nn.Flatten(-2), *layers)
peftkern.quantize_(model, include=["base"])  # the frozen weights in NF4; they may stay dense
peftkern.register_layer(MyLoRA, read)
print(peftkern.patch(model))

text = torch.tensor(list("\n".join(topics.values()).encode()))
windows = text[: 20 * 256 + CONTEXT].unfold(0, CONTEXT + 1, 1)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
for step, batch in enumerate(windows.split(256), 1):
    loss = nn.functional.cross_entropy(model(batch[:, :-1]), batch[:, -1])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
print(peftkern.stats())
