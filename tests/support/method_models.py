"""Small models and a plain AdamW that the tests of the methods share."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from peftkern.layers import LoRALinear, NF4LoRALinear

K, H, N, RANK = 24, 32, 20, 4
ALPHA = 6  # a scaling of 1.5: neither 1 nor 2


class Net(nn.Module):
    """Two linear layers of different shapes."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(K, H, dtype=dtype), nn.Linear(H, N, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def net_of(make: Callable[[nn.Linear], nn.Module], dtype: torch.dtype = torch.float64) -> Net:
    """Net of layers that `make` makes of the same linear ones."""
    torch.manual_seed(1)
    net = Net(dtype)
    net.up, net.down = make(net.up), make(net.down)
    return net


def our_net(dtype: torch.dtype = torch.float64, *, nf4: bool = False) -> Net:
    cls = NF4LoRALinear if nf4 else LoRALinear
    options = {"r": RANK, "lora_alpha": ALPHA, "adapter_dtype": dtype}
    make = functools.partial(cls.from_linear, **options)
    return net_of(make, torch.float32 if nf4 else dtype)


def peft_net(dtype: torch.dtype = torch.float64, **config) -> nn.Module:
    torch.manual_seed(1)
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["up", "down"], **config}
    return get_peft_model(Net(dtype), LoraConfig(**settings)).to(dtype)


def fill_(model: nn.Module, std: float = 0.1) -> None:
    """lora_B away from its zero, which would hide much."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=std)


def batches(steps: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    draw = {"generator": generator, "dtype": dtype}
    return [(torch.randn(16, K, **draw), torch.randn(16, N, **draw)) for _ in range(steps)]


def backward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    loss = (model(batch[0]) - batch[1]).square().mean()
    loss.backward()
    return loss


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Iterable, *schedules: Any
) -> list[float]:
    losses = []
    for batch in data:
        losses.append(backward(model, batch).item())
        optimizer.step()
        optimizer.zero_grad()
        for schedule in schedules:
            schedule.step()
    return losses


class PlainAdamW:
    """AdamW written down from the paper, for one parameter."""

    def __init__(self, p: Tensor, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0) -> None:
        self.p, self.lr, self.betas, self.eps, self.decay = p, lr, betas, eps, weight_decay
        self.t, self.m, self.v = 0, torch.zeros_like(p), torch.zeros_like(p)

    def step(self, g: Tensor) -> None:
        self.t += 1
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        m, v = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        new = self.p - self.lr * self.decay * self.p - self.lr * m / (v.sqrt() + self.eps)
        with torch.no_grad():
            self.p.copy_(new)


def plain_lora_fa(A: Tensor, gB: Tensor, s: float) -> Tensor:
    return gB @ torch.linalg.inv(A @ A.T) / s**2


def plain_lora_pro(A: Tensor, B: Tensor, gA: Tensor, gB: Tensor, s: float) -> tuple:
    """The paper's formulas with plain inverses and the Sylvester equation as a linear system."""
    inverse_B, inverse_A = torch.linalg.inv(B.T @ B), torch.linalg.inv(A @ A.T)
    r = A.shape[0]
    one = torch.eye(r, dtype=A.dtype)
    system = torch.kron(B.T @ B, one) + torch.kron(one, A @ A.T)
    right = -(inverse_B @ gA @ A.T) / s**2
    X = torch.linalg.solve(system, right.reshape(-1)).view(r, r)
    project = torch.eye(B.shape[0], dtype=A.dtype) - B @ inverse_B @ B.T
    return inverse_B @ gA / s**2 + X @ A, project @ gB @ inverse_A / s**2 - B @ X


def twins(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    return model, copy.deepcopy(model)


def relative_difference(got: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest difference of two lists of tensors, relative to each one's largest value."""
    return max(
        ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
        for a, b in zip(got, expected, strict=True)
    )


class Count(TorchDispatchMode):
    """How often each aten op is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


class HostCopies(TorchDispatchMode):
    """Counts copies between a CPU and tensors that pretend to be on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._pretence = FakeTensorMode()

    def __enter__(self) -> HostCopies:
        self._pretence.__enter__()
        return super().__enter__()

    def __exit__(self, *raised) -> None:
        super().__exit__(*raised)
        self._pretence.__exit__(*raised)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in (*args, out) if isinstance(t, Tensor)}
        self.count += len(devices) > 1
        return out
