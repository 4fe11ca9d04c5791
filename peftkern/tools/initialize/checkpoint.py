"""Initialization of a checkpoint's adapters from its weights, one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftkern.methods.initialization.from_weights import QUANTIZED
from peftkern.methods.initialization.loftq import Storage
from peftkern.methods.initialization.report import InitReport
from peftkern.tools.checkpoints.checkpoint import Checkpoint, CheckpointError
from peftkern.tools.checkpoints.decoded import DecodedInfo
from peftkern.tools.initialize.request import Request, Target, find_targets
from peftkern.tools.initialize.starts import Starts
from peftkern.tools.quantize.file_plan import Choice, Options, plan_files
from peftkern.tools.quantize.linear_weights import find_weights
from peftkern.tools.quantize.quantized_checkpoint import (
    Progress,
    Summary,
    check_request,
    quantize_checkpoint,
)


@dataclass(frozen=True)
class Job:
    """A checked request: what becomes of the checkpoint's tensors, and which of them start."""

    checkpoint: Checkpoint
    destination: Path
    choice: Choice
    quantization_config: dict[str, Any] | None
    options: Options
    starts: Starts

    def check(self, force: bool) -> Summary:
        """Describe what would be written. Raises: CheckpointError if the destination is unfit."""
        plan = plan_files(self.checkpoint, self.choice, self.options)
        return check_request(self.checkpoint, self.destination, plan, force, self.starts)

    def run(self, force: bool, progress: Progress) -> InitReport:
        """Write the new base, and the adapter in its folder `adapter`; a stopped run resumes."""
        quantize_checkpoint(
            self.checkpoint,
            self.destination,
            self.choice,
            self.quantization_config,
            self.options,
            force=force,
            progress=progress,
            rewriter=self.starts,
        )
        return self.starts.report()


def prepare(
    checkpoint: Checkpoint,
    destination: str | os.PathLike,
    request: Request,
    options: Options,
    names: Sequence[str] | str = (),
) -> Job:
    """Check a request: "pissa" and "olora" write a dense base, "qpissa" and "loftq" one in NF4.

    Args: checkpoint, dense, or `decoded`; names, of linear layers, by default all but the output
        embeddings, and of parameters of experts.
    Raises: CheckpointError for what the checkpoint or its architecture does not have.
    """
    targets, config = find_targets(checkpoint, names, request.rank_of, method=request.method)
    together = tuple(target.sources for target in targets.values() if target.sources)
    choice, quantization_config, storage = Choice({}, together=together), None, None
    if request.method in QUANTIZED:
        storage = Storage(options.blocksize, options.double_quant)
        choice, quantization_config = find_weights(
            checkpoint, blocksize=options.blocksize, double_quant=options.double_quant
        )
        if request.method == "loftq":
            _check_loss(checkpoint, targets, options)
        targets = dict(_of_stacks(targets, choice))
        quantized = {*choice.linear, *choice.stacks}
        apart = [target.name for name, target in targets.items() if name not in quantized]
        if apart:
            raise CheckpointError(
                f"target: {apart[0]} is not quantized, which {request.method} needs"
            )
        config.fan_in_fan_out = False  # what is quantized is never transposed
    base = os.path.abspath(destination)
    starts = Starts(request, targets, config, base, storage, options.device)
    parts = (checkpoint, Path(destination), choice, quantization_config, options)
    return Job(*parts, starts)


def _check_loss(checkpoint: Checkpoint, targets: Mapping[str, Target], options: Options) -> None:
    """Raise CheckpointError for a weight of which the new 4 bits lose nothing: both factors would
    be zero, and stay so."""
    for name, target in targets.items():
        info = checkpoint.tensors[name]
        if isinstance(info, DecodedInfo) and info.weight.four_bit[:2] == options.four_bit[:2]:
            raise CheckpointError(
                f"target: {target.name}: loftq starts from what NF4 loses of a weight, and this "
                "one is in nf4; expected the weights that it was quantized from"
            )


def _of_stacks(targets: dict[str, Target], choice: Choice) -> Iterator[tuple[str, Target]]:
    """Yield targets by the names of what is quantized: experts become one stack."""
    for name, target in targets.items():
        stack = choice.stacks.get(target.name)
        if stack is not None:
            how = {"count": stack.shape[0], "sources": (), "turned": stack.turned}
            name, target = target.name, replace(target, transposed=False, **how)
        yield name, target
