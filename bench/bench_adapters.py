"""Weighted sums of adapters and their truncation, beside PEFT's svd combination of live models.

`combine`: two adapters over 32 layers of 4096x4096, cut back to their rank. PEFT decomposes dense
updates, one layer of which is timed and multiplied, with reduced matrices (its default, full ones,
costs more). `resize`: rank 128 to 32 over 224 layers, with reading and writing the files.

The oracle decomposes the product of both QR decompositions in float64.

python bench/bench_adapters.py [--only combine] [--seconds 2]
"""

from __future__ import annotations

import functools
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from specs import Case, Options, Spec, Target, Variant
from suite import benchmark_test, main
from torch import Tensor, nn

from peftkern.methods.low_rank_algebra import concatenate, truncate
from peftkern.methods.rank_rules import RankRule
from peftkern.tools.adapters import Adapter, Update, read_adapter, write_adapter
from peftkern.tools.adapters.resize import resize
from peftkern.tools.bench.low_rank_svd import composition
from peftkern.tools.bench.record import OURS

LAYERS, WEIGHTS = 32, (0.7, 0.3)
OF_MODEL = 224
BEFORE, AFTER = 128, 32
PEFT, DENSE = f"PEFT's svd, one x {LAYERS}", f"dense torch SVD, one x {OF_MODEL}"
PAIRS = list[tuple[Tensor, Tensor]]


def draw(layers: int, n: int, k: int, r: int) -> PAIRS:
    torch.manual_seed(0)
    return [(torch.randn(n, r), torch.randn(r, k) / k**0.5) for _ in range(layers)]


def exact(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the singular values that stay and the truncated product, in float64."""
    U, S, Vh = composition(B.double(), A.double(), True)
    return S[:rank], (U[:, :rank] * S[:rank]) @ Vh[:rank]


def found(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Return singular values and product of a result, whose factors have orthogonal columns."""
    return B.double().norm(dim=0) * A.double().norm(dim=1), B.double() @ A.double()


def combine_by_us(adapters: list[PAIRS], r: int) -> PAIRS:
    layers = zip(*adapters, strict=True)
    sums = [
        concatenate([(*pair, weight) for pair, weight in zip(pairs, WEIGHTS, strict=True)])
        for pairs in layers
    ]
    lora_B, lora_A = map(list, zip(*sums, strict=True))
    return truncate(lora_B, lora_A, [1.0] * len(sums), RankRule("rank", r))[0]


def peft_model(adapters: list[PAIRS], r: int) -> nn.Module:
    """Make a model of one layer that has both adapters of the first layer."""
    (B, A), *_ = adapters[0]
    net = nn.Sequential(nn.Linear(A.shape[1], B.shape[0], bias=False, device="cpu"))
    config = LoraConfig(r=r, lora_alpha=r, target_modules=["0"])
    model = get_peft_model(net, config, adapter_name="a")
    model.add_adapter("b", config)
    layer = model.base_model.model[0]
    for name, pairs in zip("ab", adapters, strict=True):
        layer.lora_B[name].weight.data, layer.lora_A[name].weight.data = pairs[0]
    return model


def combine_by_peft(model: nn.Module, r: int) -> tuple[Tensor, Tensor]:
    options = {"combination_type": "svd", "svd_rank": r, "svd_full_matrices": False}
    model.add_weighted_adapter(["a", "b"], list(WEIGHTS), "sum", **options)
    layer = model.base_model.model[0]
    pair = layer.lora_B["sum"].weight.data, layer.lora_A["sum"].weight.data
    model.delete_adapter("sum")
    return pair


def build_combine(options: Options, r: int) -> Case:
    n, k, layers = options.n, options.k, options.depth(LAYERS)
    pairs = draw(2 * layers, n, k, r)
    adapters = [pairs[:layers], pairs[layers:]]
    first = [(*one[0], weight) for one, weight in zip(adapters, WEIGHTS, strict=True)]
    oracle, model = exact(*concatenate(first), r), peft_model(adapters, r)
    ours = Variant(lambda i: combine_by_us(adapters, r), oracle, lambda all_: found(*all_[0]))
    theirs = Variant(
        lambda i: combine_by_peft(model, r), oracle, lambda pair: found(*pair), multiplied=layers
    )
    size = 4 * layers * (n + k) * r
    return Case({OURS: ours, PEFT: theirs}, 3 * size, 0, torch.float32)


def build_resize(options: Options) -> Case:
    n, k, layers = options.n, options.k, options.depth(OF_MODEL)
    pairs = draw(layers, n, k, BEFORE)
    folder = tempfile.TemporaryDirectory()
    source, target = Path(folder.name) / "a", Path(folder.name) / "b"
    updates = {f"layer.{i}": Update(f"layer.{i}", "weight", "linear", A, B, 1.0)
               for i, (B, A) in enumerate(pairs)}  # fmt: skip
    config = {"peft_type": "LORA", "r": BEFORE, "lora_alpha": BEFORE}
    write_adapter(Adapter(config | {"target_modules": list(updates)}, updates), source)
    (B, A), *_ = pairs
    oracle, update = exact(B, A, AFTER), B @ A

    def ours(i: int, folder: tempfile.TemporaryDirectory = folder) -> tuple[Tensor, Tensor]:
        shutil.rmtree(target, ignore_errors=True)
        smaller, _ = resize(read_adapter(source), RankRule("rank", AFTER))
        write_adapter(smaller, target)
        first = smaller.updates["layer.0"]
        return first.lora_B, first.lora_A

    def dense(i: int) -> tuple[Tensor, Tensor]:
        U, S, Vh = torch.linalg.svd(update, full_matrices=False)
        return U[:, :AFTER] * S[:AFTER], Vh[:AFTER]

    variants = {
        OURS: Variant(ours, oracle, lambda pair: found(*pair)),
        DENSE: Variant(dense, oracle, lambda pair: found(*pair), multiplied=layers),
    }
    return Case(variants, 4 * layers * (n + k) * (BEFORE + AFTER), 0, torch.float32)


def combine_spec(r: int, at_least: float) -> Spec:
    build = functools.partial(build_combine, r=r)
    name = f"adapters/combine-{LAYERS}-layers-r{r}/fp32"
    return Spec(name, build, (OURS, PEFT), PEFT, (Target(PEFT, at_least),))


SPECS = [
    combine_spec(64, 500.0),
    combine_spec(16, 5000.0),
    Spec(f"adapters/resize-{OF_MODEL}-layers-r{BEFORE}-to-{AFTER}/fp32", build_resize,
         (OURS, DENSE), DENSE),
]  # fmt: skip

test_adapters = benchmark_test(SPECS)

if __name__ == "__main__":
    sys.exit(main("adapters", SPECS))
