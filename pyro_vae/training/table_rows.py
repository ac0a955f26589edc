"""The rows of a guide's table that a step takes, as a small tensor that it is differentiated by."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.guides.table_file import file_of
from pyro_vae.programs.guide_kinds import RowGuide
from pyro_vae.programs.messages import warn_once
from pyro_vae.programs.processes import Processes, Share
from pyro_vae.torch_internals import gradient_hooks_of, parameters_of
from pyro_vae.training.row_rules import Group, RowRule

logger = logging.getLogger(__name__)

_WHOLE = (
    "each step moves all %d rows of the LocalGuide's table, and costs as much: %s. Rows outside of "
    "the minibatch move by their moments. Under torch.optim.Adam, AdamW, SGD and Adagrad, and "
    "pyro.optim.ClippedAdam, a table without hooks has its %d rows of the minibatch moved alone"
)
_MAX_LEAVES = 16  # sizes of minibatches whose leaves are kept


class TableRows:
    """Takes the rows of a minibatch out of a guide's table, and puts them back after a step.

    What a step costs is then a matter of its rows, not of the table's. Inside :meth:`taking`, the
    guide has a table of these rows alone: the leaf, [B, ...], a tensor of its own that a loss is
    differentiated by. There is one for each B, so that a graph finds it where it was.

    Args:
        guide: with the table.

    Attributes:
        leaf: of the last step; None where that took the whole table.
        whole_because: why each step is to take the whole table; empty where it need not.
    """

    def __init__(self, guide: RowGuide) -> None:
        self._guide = guide
        self._leaves: dict[Hashable, tuple[Tensor, Tensor]] = {}  # with the rows that they are
        self._index = torch.empty(0, dtype=torch.long)
        self._repeats = False  # whether a row stands in the minibatch twice
        self.leaf: Tensor | None = None
        self.whole_because = ""

    @property
    def table(self) -> Tensor:
        """The whole table."""
        # A fraction of the time of an attribute; elsewhere than there where it is parametrized.
        held: Tensor | None = parameters_of(self._guide).get("table")
        return self._guide.table if held is None else held

    @property
    def gradient(self) -> Tensor | None:
        """The gradient by the leaf; None where there is none."""
        return None if self.leaf is None else self.leaf.grad

    def check_apart(self, processes: Processes) -> None:
        """Raise ValueError where processes hold the table in one file, which each would step."""
        path = file_of(self.table)
        place = None if path is None else (platform.node(), os.path.realpath(path))
        places = processes.gather(place)
        if place is not None and places.count(place) > 1:
            raise ValueError(
                f"the LocalGuide's table lies in {path}, and all processes would write to it, "
                "once each at each step: give each a file of its own (storage=f'rows.{rank}.npy')"
            )

    def serves(self, index: Tensor | None, *, repeats: bool = False) -> bool:
        """Return whether a step on these rows is to be differentiated by them alone.

        Not where they are all rows: as many as there are, if none is there twice. A warning says
        once why a step that takes a few moves the whole table, at its cost.
        """
        table = self.table
        if index is None or not table.requires_grad or not table.is_leaf:
            return False
        if index.shape[0] >= table.shape[0] and not repeats:
            return False
        hooked = "it has gradient hooks, which are for the gradient of all rows"
        if why := self.whole_because or (hooked if any(gradient_hooks_of(table)) else ""):
            warn_once(logger, (self._guide,), _WHOLE, len(table), why, len(index))
        return not why

    @contextlib.contextmanager
    def taking(self, index: Tensor, *, repeats: bool = False) -> Iterator[None]:
        """Give the guide these rows alone inside the context.

        Args:
            index: [B], in range.
            repeats: whether a row may be among them twice.
        """
        self.leaf, self._index = self._leaf(index)
        self._repeats = repeats
        # Copied to where they lie at each step: a graph of the update reads them there.
        self._index.copy_(index)
        with torch.no_grad():
            torch.index_select(self.table.detach(), 0, self._index, out=self.leaf.detach())
        with self._guide.using_all_of(self.leaf):
            yield

    def _leaf(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the leaf for so many rows, and where their numbers lie."""
        table = self.table
        key = index.shape[0], table.shape[1:], table.dtype, table.device
        if key not in self._leaves:
            if len(self._leaves) >= _MAX_LEAVES:
                del self._leaves[next(iter(self._leaves))]
            leaf = table.new_empty(len(index), *table.shape[1:]).requires_grad_()
            place = torch.empty(len(index), dtype=torch.long, device=table.device)
            self._leaves[key] = leaf, place
        return self._leaves[key]

    @torch.no_grad()
    def widen(self, index: Tensor, share: Share) -> None:
        """Take up all rows of a minibatch of which the leaf holds a share.

        The gradient of the others is zero, to be added to that of other processes.

        Args:
            index: [B], the rows of the minibatch, in range.
            share: which of these the leaf holds.
        """
        if self.leaf is None or share.is_all:
            return
        part, self.leaf.grad = self.leaf.grad, None
        self.leaf, self._index = self._leaf(index)
        self._index.copy_(index)
        torch.index_select(self.table.detach(), 0, self._index, out=self.leaf.detach())
        self.leaf.grad = None
        if part is not None:
            self.leaf.grad = torch.zeros_like(self.leaf)
            self.leaf.grad[share.rows] = part

    def drop(self) -> None:
        """Forget the rows of the last step, and their gradient."""
        if self.leaf is not None:
            self.leaf.grad = None
            self.leaf = None

    @torch.no_grad()
    def whole_gradient(self) -> Tensor | None:
        """Return the gradient by the whole table: of that by itself and that by the leaf."""
        mine, rows = self.table.grad, self.gradient
        if rows is None:
            return mine
        # Out of place: what a graph returns may not be written to.
        whole = torch.zeros_like(self.table) if mine is None else mine.clone()
        return whole.index_add_(0, self._index, rows)

    def step(self, *, whole: bool = False) -> RowStep | None:
        """Return the rows that are to move, those of the leaf or all; None without a gradient."""
        table = self.table.detach()
        if whole:
            gradient = self.whole_gradient()
            return None if gradient is None else RowStep(table, None, table, gradient)
        if self.leaf is None or self.leaf.grad is None:
            return None
        if not self._repeats:
            return RowStep(table, self._index, self.leaf.detach(), self.leaf.grad)
        index, place = self._index.unique(return_inverse=True)
        total = torch.zeros_like(table[: len(index)]).index_add_(0, place, self.leaf.grad)
        return RowStep(table, index, table[index], total, lasts=False)


@dataclass(frozen=True, slots=True)
class RowStep:
    """Rows of a table that are to move.

    Attributes:
        table: [N, ...], which is written to.
        index: [B], which rows, each once; None for all.
        rows: [B, ...], their present values.
        gradient: [B, ...], of the loss by them.
        lasts: whether index and rows lie where those of the next step of this size will.
    """

    table: Tensor
    index: Tensor | None
    rows: Tensor
    gradient: Tensor
    lasts: bool = True

    def written(self, state: Mapping[str, Any]) -> list[Tensor]:
        """Return the tensors [N, ...] of which the rows are written to: state, then the table."""
        return [*(value for value in state.values() if isinstance(value, Tensor)), self.table]

    @torch.no_grad()
    def take(
        self, rule: RowRule, group: Group, state: Mapping[str, Any], failed: Tensor | None
    ) -> None:
        """Let the rows take a step of an optimizer, each by its own state.

        Args:
            rule: of the optimizer.
            group: its settings for the table.
            state: its state of the table, as :meth:`RowRule.prepare` leaves it; written to.
            failed: a number that is not zero where nothing may move; None where all may.
        """
        before = {n: self.of(v) for n, v in state.items() if isinstance(v, Tensor)}
        after = dict(before)
        moved = rule.step(group, self.rows, self.gradient, after)
        old, new = [*before.values(), self.rows], [*after.values(), moved]
        if failed is not None:
            new = [torch.where(failed == 0, b, a) for a, b in zip(old, new, strict=True)]
        # The table last: where Ctrl-C comes in between, its rows are those of the step before.
        for target, value in zip(self.written(state), new, strict=True):
            self.put(target, value)

    def of(self, tensor: Tensor) -> Tensor:
        """Return the rows of a tensor [N, ...]."""
        return tensor if self.index is None else tensor.index_select(0, self.index)

    def put(self, tensor: Tensor, rows: Tensor) -> None:
        """Write the rows of a tensor [N, ...]."""
        if self.index is None:
            tensor.copy_(rows)
        else:
            tensor.index_copy_(0, self.index, rows)
