"""Arguments of a model that no observed site holds: covariates, offsets, lengths, masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.sites import Site
from pyro_vae.programs.state import arguments_of
from pyro_vae.programs.types import Program


def covariates(evaluator: Evaluator, taken: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """Return the arguments that are numbers and not observed, by their names in the model.

    An argument is observed if it has the memory or the values of an observed site. One without a
    name (``*args``) is ``argument_<position>``; one whose name is taken has that put in front.
    Of data that are read on demand they are those of the rows that were looked at first.

    Args:
        evaluator: of the pair and its batch.
        taken: names that are in use.
    """
    seen = [site for site in evaluator.pair.structure.observed if isinstance(site.value, Tensor)]
    numbers = _numbers(evaluator, evaluator.pair.batch, set(taken))
    return {
        name: np.asarray(value) if isinstance(value, int | float) else value.numpy(force=True)
        for name, value in numbers
        if not (isinstance(value, Tensor) and any(_holds(value, each) for each in seen))
    }


def of_rows(
    evaluator: Evaluator, rows: slice, names: Iterable[str], taken: Iterable[str] = ()
) -> dict[str, np.ndarray]:
    """Return those :func:`covariates` of some names that have a row for each datum, of some rows.

    Args:
        evaluator: of the pair, and a batch that is read on demand.
        rows: of which data.
        names: that :func:`covariates` gave.
        taken: names that are in use.
    """
    numbers = dict(_numbers(evaluator, evaluator.batch.rows(rows), set(taken)))
    some = {name: numbers[name] for name in names}
    return {
        name: value.numpy(force=True)
        for name, value in some.items()
        if isinstance(value, Tensor) and value.ndim
    }


def _numbers(
    evaluator: Evaluator, batch: Batch, taken: set[str]
) -> Iterator[tuple[str, Tensor | float]]:
    """Yield the arguments that are numbers, with their names."""
    for name, value in _named(evaluator.pair.model, batch):
        dense = isinstance(value, Tensor) and value.layout == torch.strided
        if (dense and not value.is_complex()) or isinstance(value, int | float):
            yield (f"argument_{name}" if name in taken else name), value


def _named(model: Program, batch: Batch) -> Iterator[tuple[str, Any]]:
    """Yield the arguments with their names."""
    names = list(arguments_of(model))
    for position, value in enumerate(batch.args):
        yield names[position] if position < len(names) else f"argument_{position}", value
    yield from batch.kwargs.items()


def _holds(argument: Tensor, site: Site) -> bool:
    """Return whether an observed value is a part of an argument, or equal to it where it counts."""
    observed: Tensor = site.value
    if not observed.numel() or not argument.numel():
        return False
    last = sum((n - 1) * step for n, step in zip(observed.shape, observed.stride(), strict=True))
    ends = (observed.data_ptr() + observed.element_size() * offset for offset in (0, last))
    if argument.dtype == observed.dtype and all(_has_address(argument, end) for end in ends):
        return True
    if argument.numel() != observed.numel():
        return False
    value = argument.reshape(observed.shape)
    free = value.isnan() | site.left_out.broadcast_to(observed.shape)
    return bool(((value.to(observed) == observed) | free).all())


def _has_address(argument: Tensor, address: int) -> bool:
    """Return whether a tensor has an element at an address of memory.

    Columns of one table share their memory, and are arguments of their own.
    """
    rest, odd = divmod(address - argument.data_ptr(), argument.element_size())
    if rest < 0 or odd:
        return False
    steps = sorted(zip(argument.stride(), argument.shape, strict=True), reverse=True)
    for step, size in steps:
        if step:
            place = min(rest // step, size - 1)
            rest -= place * step
    return rest == 0
