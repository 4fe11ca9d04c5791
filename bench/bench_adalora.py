"""AdaLoRA's work per step against PEFT's and against the best of torch's foreach operators.

Per element: read the parameter, its gradient and two EMAs, write the EMAs: 24 bytes in float32.
The orthogonality loss reads every matrix forward and backward and writes its gradient: 12 bytes.

On a GPU peftkern is its own RankAllocator, which never synchronizes. Under PEFT (`patched PEFT`)
the mask has to become rank_pattern, a list on the host. The foreach operators are replayed there as
a CUDA graph over fixed tensors, the least that torch's own operators can take.

python bench/bench_adalora.py [--device cuda] [--only llama] [--seconds 2]
"""

from __future__ import annotations

import functools
import sys

import graphs
import torch
from suite import OURS, Case, Options, Spec, Target, benchmark_test, main, of_problem
from torch import Tensor

from peftkern.tools.bench import adalora
from peftkern.tools.bench.base_layers import Layer, Tensors
from peftkern.tools.bench.cases import WHOLE_LLAMA, Problem

PEFT, FOREACH = "PEFT", "foreach"
PATCHED, REPLAYED = "patched PEFT", "foreach in a CUDA graph"
R = 12
BLOCK = 7  # linear layers


def replayed(problem: Problem, tensors: Tensors, copies: int) -> list[Layer]:
    """Build the foreach operators as graphs over fixed tensors; without a GPU as they are."""
    drawn = [adalora.views(problem, tensors[name]) for name in ("factors", "slopes")]

    def layer() -> Layer:
        state = adalora.Foreach(problem, *([part.clone() for part in parts] for parts in drawn))
        run = captured(state) if tensors["factors"].is_cuda else state.update
        return Layer(run, collect=state.named, no_graph="a graph already")

    return [layer() for _ in range(copies)]


def captured(state: adalora.Foreach):
    """Capture an update as a graph; the state is restored afterwards."""
    lora_E = [E.clone() for E in state.params[::3]]
    masks = []
    graph = graphs.captured(lambda i: masks.append(state.update()), length=1)
    torch._foreach_copy_(state.params[::3], lora_E)
    torch._foreach_zero_(state.importance + state.uncertainty)

    def replay() -> Tensor:
        graph.replay()
        return masks[-1]

    return replay


def build(options: Options, op: str, llama: bool, peers: dict) -> Case:
    """Build a case of 96 square layers, or of LLaMA-7B's; of smaller sizes a few."""
    if llama:
        size = min(options.k, 4096)
        layers, shape = BLOCK * (32 if size == 4096 else 1), WHOLE_LLAMA
    else:
        size = min(options.n, options.k, 1024)
        layers, shape = 96 if size == 1024 else 4, ""
    problem = Problem(op, shape, layers, size, size, R, "float32", "forward")
    return of_problem(options, problem, peers)


def spec(op: str, llama: bool, peers: dict, *targets: Target, **more) -> Spec:
    label = f"adalora/{op}-{'llama-7b' if llama else '96x1024x1024'}/fp32"
    name = {"update_and_allocate": "adalora_update"}.get(op, f"adalora_{op}")
    build_it = functools.partial(build, op=name, llama=llama, peers=peers)
    return Spec(label, build_it, tuple(peers), PEFT, targets, **more)


UPDATE, LOSS = "update_and_allocate", "orthogonality"
TWO = {OURS: "peftkern", PEFT: "peft"}
THREE = {**TWO, FOREACH: "composed"}
SMALL = {"shape": (1024, 1024)}
SPECS = [
    spec(UPDATE, False, THREE, Target(PEFT, 6.0), **SMALL),
    spec(UPDATE, True, THREE),
    spec(LOSS, False, TWO, Target(PEFT, 3.0), **SMALL),
    spec(LOSS, True, TWO),
]


def gpu_specs(device: torch.device) -> list[Spec]:
    """Return the cases of each step; on a GPU the orthogonality loss is torch's own."""
    peers = {OURS: adalora.allocator, PATCHED: "peftkern", PEFT: "peft", REPLAYED: replayed}
    targets = Target(PEFT, 50.0), Target(REPLAYED, 3.0)
    return [spec(UPDATE, True, peers, *targets, shape=(4096, 4096), most_launches=4)]


test_adalora = benchmark_test(SPECS)

if __name__ == "__main__":
    sys.exit(main("adalora", SPECS, gpu_specs))
