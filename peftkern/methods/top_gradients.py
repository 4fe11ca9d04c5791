"""Places where the gradient of a weight was largest, found without a dense gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.functional.rosa import SparseMask

_BLOCK = 1 << 20  # entries of dW at once
_BLOCKS = 8  # and not more than this part of it


class TopGradients:
    """Largest entries of the sum over passes of |dW|^power, in memory of `capacity` entries.

    Each backward pass makes dW in blocks of rows, at most an eighth of it and 2^20 entries, adds
    the sums of the entries that are kept to it, and keeps the `capacity` largest of all: index
    (int64) and sum (float32), up to twice as many and a block while it runs.

    One pass: exactly the entries that a sort of the whole dW has first. Several: exact sums since
    the pass that let an entry in; what it had before, less than the smallest sum kept then, is
    lost. So an entry is missed, against sums over the whole of dW, if it was never among the
    `capacity` largest or came in late: capacity is a multiple of what is chosen in the end for that
    reason. Of the mask that the dense sum of eight passes gives on a planted problem, four times as
    many candidates find all of it where that mask is the planted one, and 83 to 88% where noise
    hides a tenth of the planted places from the dense sum itself (once as many: 84 to 93%, and 60
    to 74%).

    Each backward pass counts by itself: where several add up to a step, the sum is of their sizes,
    not the size of their sum, and they are several passes to what is said above. A pass counts by
    the size of its gradient: where the scale of the loss changes, by GradScaler or otherwise, the
    passes weigh differently.

    NaN and Inf count as nothing: what an entry had stays, and an entry is never kept for them.
    """

    def __init__(self, shape: tuple[int, int], capacity: int, power: int) -> None:
        self.shape, self.capacity, self.power = shape, capacity, power
        self.index = torch.empty(0, dtype=torch.int64)  # ascending
        self.score = torch.empty(0)
        self.begun = False  # whether there was a pass
        self._lost = False

    @torch.no_grad()
    def add(self, dy: Tensor, x: Tensor) -> None:
        """Take in one backward pass: dy [..., N], x [..., K]. Autocast does not round dW."""
        with torch.autocast(x.device.type, enabled=False):
            self._add(dy, x)

    def _add(self, dy: Tensor, x: Tensor) -> None:
        N, K = self.shape
        wide = torch.promote_types(x.dtype, torch.float32)
        x, dy = x.reshape(-1, K).to(wide), dy.reshape(-1, N)
        rows = max(1, min(_BLOCK // K, -(-N // _BLOCKS)))
        index, score = self.index.to(x.device), self.score.to(x.device)
        floor = score.min() if len(score) == self.capacity else score.new_zeros(())
        edges = torch.arange(0, N + rows, rows, device=x.device) * K
        edges = torch.searchsorted(index, edges).tolist()
        kept: list[tuple[Tensor, Tensor]] = []
        count = 0
        finite = torch.zeros((), dtype=torch.bool, device=x.device)
        for i, start in enumerate(range(0, N, rows)):
            sums = (dy[:, start : start + rows].to(wide).t() @ x).abs_().pow_(self.power).float()
            sums = sums.view(-1)
            usable = sums.isfinite()
            finite |= usable.any()
            sums.masked_fill_(~usable, -1.0)  # below every floor
            before = slice(edges[i], edges[i + 1])
            mine = index[before] - start * K
            sums[mine] = sums[mine].clamp(min=0.0) + score[before]
            places = (sums >= floor).nonzero().squeeze(1)
            kept.append((places + start * K, sums[places]))
            count += len(places)
            if count > 2 * self.capacity:
                kept = [self._largest(kept)]
                count, floor = self.capacity, kept[0][1].min()
        self.index, self.score = self._largest(kept)
        self.begun = True
        self._lost = self._lost or not finite

    def take_lost(self) -> bool:
        """Return whether a pass since the last call had nothing finite.

        Also if all so far had so little that there are fewer than `capacity` entries.
        """
        lost, self._lost = self._lost, False
        return lost or (self.begun and len(self.index) < self.capacity)

    def _largest(self, kept: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return the `capacity` largest of all, in the order of their index."""
        index, score = (torch.cat(parts) for parts in zip(*kept, strict=True))
        if len(score) <= self.capacity:
            return index, score
        best = score.topk(self.capacity, sorted=False).indices.sort().values
        return index[best], score[best]

    def mask(self, nnz: int) -> SparseMask:
        """Return the nnz largest.

        Raises: ValueError if fewer were kept: no gradient came, or most of it was not finite.
        """
        if len(self.index) < nnz:
            raise ValueError(
                f"mask: {nnz} places are wanted, gradients of {len(self.index)} were collected"
            )
        index = self.index[self.score.topk(nnz, sorted=False).indices]
        K = self.shape[1]
        return SparseMask.from_indices(index // K, index % K, self.shape)
