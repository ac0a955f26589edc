"""Whether a pair speaks for rows by their place in the batch, or for whatever rows it is given."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_vae.programs.answers import SLACK, Answers, agree, rows_of, shuffled
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.sites import Plate
from pyro_vae.programs.state import Look, looking
from pyro_vae.programs.traces import trace_pair
from pyro_vae.programs.types import Program


class NotSetUpError(Exception):
    """An autoguide of Pyro's has seen no batch yet, from which it makes its parameters."""


@contextlib.contextmanager
def set_up_before() -> Iterator[None]:
    """Raise NotSetUpError where one of Pyro's autoguides would be set up inside the context."""

    def refuse(module: nn.Module, inputs: Any) -> None:
        if getattr(module, "prototype_trace", module) is None:
            raise NotSetUpError(type(module).__name__)

    hook = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True, slots=True)
class PairOnRows:
    """A pair on some rows of the data.

    Attributes:
        model: a Pyro model.
        guide: a Pyro guide.
        batch: rows of the data, the first ones.
        plate: the data plate.
        rows: from rows that a batch holds to the context in which the guide knows them.
    """

    model: Program
    guide: Program
    batch: Batch
    plate: Plate
    rows: Callable[[Tensor], contextlib.AbstractContextManager[Any]]

    def _answers(self) -> Answers:
        """Return what a run of the pair says."""
        size = self.batch.size or 1
        with self.rows(torch.arange(size)):
            return Answers.of(*trace_pair(self.model, self.guide, self.batch), self.plate, size)

    def _given(self, found: Answers, index: Tensor) -> Answers:
        """Return the answers for the same draws of these rows."""
        with self.rows(index):
            return found.given(self.model, self.guide, self.batch.rows(index), index)

    def bound_to_order(self) -> str | None:
        """Return which of the pair has parameters or values of its own for each row, by its place.

        The pair is run on permuted rows, with its draws permuted alike. An amortized guide's
        terms are then permuted, and their gradients by its parameters the same; those of a
        table with a row per datum come to lie on other rows, whatever values the table holds.

        Returns:
            "guide" or "model"; None where neither has, or it cannot be told.

        Raises:
            Exception: what the pair raises on this batch.
        """
        size = self.batch.size
        if size is None or size < 2:
            return None
        order, permuted = torch.arange(size), shuffled(size)
        with looking(self.model, self.guide, device=self.batch.device, gradients=True):
            torch.manual_seed(0)
            with torch.no_grad():
                found = self._answers()
            if found.sizes - {1, size}:
                return "guide"  # it answers for another number of data than it was given
            here = self._given(found, order)
            role = here.differs(self._given(found, permuted), permuted)
            # Else random numbers beside the sites' own, of which nothing can be told.
            alike = role is not None and not here.differs(self._given(found, order), order)
            return role if alike else None

    def divides_by_size(self, names: Collection[str]) -> bool:
        """Return whether the model divides log densities of its data by the size of their batch.

        Half of the rows are run alone, with the draws that they have among all: the terms of
        each site must then be larger by size / half, row by row.

        Args:
            names: of observed sites in the plate.
        """
        size = self.batch.size or 1
        half = torch.arange(size // 2)
        with Look(), looking(self.model, self.guide, device=self.batch.device):
            found = self._answers()
            whole = self._given(found, torch.arange(size)).terms["model"]
            alone = self._given(found, half).terms["model"]
            keys = [f"log density of {name}" for name in names]
            wanted = {key: rows_of(whole[key], half, size) * size / len(half) for key in keys}
            return all(agree(alone[key], wanted[key], slack=SLACK) for key in keys)
        return False
