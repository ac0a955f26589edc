"""An epoch over data in chunks of rows, each of which is read once: blocks are shuffled."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyro_vae.programs.batch import Batch, joined
from pyro_vae.programs.on_demand import OnDemand

_TOGETHER = 2**27  # bytes of rows that are shuffled together
_ROWS = 1024  # in a block, of data that lie in no chunks


class ShuffledBlocks:
    """The rows of an epoch: blocks in a random order, and those of some blocks shuffled together.

    Rows of one block are near each other in an epoch. Where the data lie in an order (sorted by
    class, say), minibatches are less mixed than those of rows that are shuffled.

    Args:
        data: to be read by blocks; the global random state decides the order.
        together: bytes of rows that are shuffled together, and kept: at least a block.

    Attributes:
        order: the numbers of all rows, [N].
    """

    def __init__(self, data: OnDemand, together: int = _TOGETHER) -> None:
        self._data, count = data, data.count
        self._block = block = data.block if data.block > 1 else _ROWS
        num_blocks = -(-count // block)
        per_group = max(1, together // max(1, block * (data.nbytes // count)))
        self._groups = torch.randperm(num_blocks).split(per_group)
        self._group_of = torch.empty(num_blocks, dtype=torch.long)
        self._start_of = torch.empty(num_blocks, dtype=torch.long)  # in its group
        order = []
        for number, group in enumerate(self._groups):
            sizes = (count - group * block).clamp(max=block)
            self._group_of[group] = number
            self._start_of[group] = start = sizes.cumsum(0) - sizes
            first = (group * block - start).repeat_interleave(sizes)
            rows = first + torch.arange(len(first))
            order.append(rows[torch.randperm(len(rows))])
        self.order = torch.cat(order)
        self._kept: dict[int, Batch] = {}

    def rows(self, index: Tensor) -> Batch:
        """Return these rows; those of a group that was read last, or before it, are in memory."""
        numbers = index.cpu()
        of_block = numbers // self._block
        group, parts, places = self._group_of[of_block], [], []
        for one in dict.fromkeys(group.tolist()):
            here = torch.nonzero(group == one).flatten()
            start = self._start_of[of_block[here]]
            parts.append(self._read(one).rows(start + numbers[here] % self._block))
            places.append(here)
        found = parts[0] if len(parts) == 1 else joined(parts).rows(torch.cat(places).argsort())
        return replace(found, numbers=numbers)

    def _read(self, group: int) -> Batch:
        if group not in self._kept:
            while len(self._kept) > 1:
                del self._kept[next(iter(self._kept))]
            size = self._block
            starts = [int(block) * size for block in self._groups[group]]
            self._kept[group] = joined([self._data.rows(slice(at, at + size)) for at in starts])
        return self._kept[group]
