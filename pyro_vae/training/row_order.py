"""Whether a pair speaks for rows by their place in the batch, or for whatever rows it is given."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_vae.programs.agreement import agree
from pyro_vae.programs.answers import SLACK, Answers, rows_of, shuffled
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.sites import Plate
from pyro_vae.programs.state import Look, looking
from pyro_vae.programs.traces import trace_pair
from pyro_vae.programs.types import Program

# From the rows of the data that a batch holds to the context in which the guide knows them.
Rows = Callable[[Tensor], contextlib.AbstractContextManager[Any]]


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


def bound_to_order(
    model: Program,
    guide: Program,
    batch: Batch,
    plate: Plate | None,
    rows: Rows = lambda index: contextlib.nullcontext(),
) -> str | None:
    """Return which of a pair has parameters or values of its own for each row, by its place.

    The pair is run on permuted rows, with its draws permuted alike. An amortized guide's
    terms are then permuted, and their gradients by its parameters the same; those of a
    table with a row per datum come to lie on other rows, whatever values the table holds.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        batch: rows of the data, the first ones.
        plate: the data plate.
        rows: tells the guide which rows a batch holds, where it asks.

    Returns:
        "guide" or "model"; None where neither has, or it cannot be told.

    Raises:
        Exception: what the pair raises on this batch.
    """
    size = batch.size
    if size is None or size < 2 or plate is None:
        return None
    order = torch.arange(size)
    permuted = shuffled(size)
    with looking(model, guide, device=batch.device, gradients=True):
        torch.manual_seed(0)
        with rows(order), torch.no_grad():
            traces = trace_pair(model, guide, batch)
            found = Answers.of(*traces, plate, size)
        if found.sizes - {1, size}:
            return "guide"  # it answers for another number of data than it was given
        with rows(order):
            here = found.given(model, guide, batch, order)
        with rows(permuted):
            elsewhere = found.given(model, guide, batch.rows(permuted), permuted)
        role = here.differs(elsewhere, permuted)
        if role is None:
            return None
        with rows(order):
            again = found.given(model, guide, batch, order)
        # Else random numbers beside the sites' own, of which nothing can be told.
        return None if here.differs(again, order) else role


def divides_by_size(
    model: Program,
    guide: Program,
    batch: Batch,
    plate: Plate,
    names: Collection[str],
    rows: Rows = lambda index: contextlib.nullcontext(),
) -> bool:
    """Return whether a model divides the log densities of its data by the size of their batch.

    Half of the rows are run alone, with the draws that they have among all: the terms of
    each site must then be larger by size / half, row by row.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        batch: some rows of the data, the first ones.
        plate: the data plate.
        names: of observed sites in it.
        rows: as in :func:`bound_to_order`.
    """
    size = batch.size or 1
    order, half = torch.arange(size), torch.arange(size // 2)
    with Look(), looking(model, guide, device=batch.device):
        with rows(order):
            traces = trace_pair(model, guide, batch)
            found = Answers.of(*traces, plate, size)
            whole = found.given(model, guide, batch, order).terms["model"]
        with rows(half):
            alone = found.given(model, guide, batch.rows(half), half).terms["model"]
        keys = [f"log density of {name}" for name in names]
        return all(
            agree(alone[key], rows_of(whole[key], half, size) * size / len(half), slack=SLACK)
            for key in keys
        )
    return False
