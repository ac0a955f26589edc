"""LocalGuide: a variational family whose parameters come from a table, a row per datum."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.families.base import Family
from pyro_vae.guides.base import FamilyGuide, refuse_globals
from pyro_vae.guides.coordinates import prior_moments
from pyro_vae.guides.table_file import file_of, open_table, write_out
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.guide_kinds import RowGuide
from pyro_vae.programs.messages import as_count
from pyro_vae.programs.structure import ModelLooks
from pyro_vae.programs.types import DataPlate, Program

logger = logging.getLogger(__name__)


class LocalGuide(FamilyGuide, RowGuide):
    """A guide with a row of parameters for each datum: no encoder, no amortization.

    Args:
        model: a Pyro model with latent sites in the plate of its data.
        num_data: rows of the table.
        example: a batch to read shapes from; a few rows do.
        family: the variational family; families.Normal() by default.
        data_plate: the name of the plate of the data, where it is not plain; False for all
            latents of the model jointly, as one datum, in one row.
        init_scale: how wide each row's proposals are at first, in standard deviations of the prior
            in unconstrained coordinates, whatever the family; about the prior's mean. Pyro's
            AutoNormal begins at 0.1, of whatever unit its latents are in.
        storage: a file to hold the table, for tables larger than memory: an array of NumPy, which
            is read and written in place. One that is there is taken with the numbers in it, else
            it is made. Moments of rows, and the copies that :func:`pyro_vae.fit` keeps, then lie
            beside it, in files without a name that are gone with the process. None for memory.

    Attributes:
        table: the parameters, [num_data, P]: P is family.params_shape(D), for a factorized family
            (D, params_per_coordinate).
        converged: [num_data], whether :func:`pyro_vae.refine` found each row's optimum.
        given: the values of global latent sites that its rows were fitted at, by name.

    In :func:`pyro_vae.fit`, and in :class:`pyro_vae.CompiledSVI` inside ``guide.rows(index)``, a
    step moves the rows of its minibatch alone, each by moments and a step count of its own.

    What :func:`pyro_vae.refine` or :func:`pyro_vae.fit` has fitted rows to is remembered: their
    bounds on other data are refused, in another order too. ``guide.rows(index)`` says
    which of the data a batch holds.

    Raises:
        DataPlateError: where no plate is plainly that of the data.
        ValueError: where no latent site is continuous, for a discrete one of infinitely many
            values, a global one, num_data < 1, an init_scale that is no finite number above 0,
            or one for a family without a width (a point); for a file of another size or dtype.
        FileNotFoundError: for a file in a folder that does not exist.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_vae as pv
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.zeros(5)
        >>> guide = pv.LocalGuide(model, num_data=5, example=x)
        >>> with guide.rows(torch.tensor([0, 3])):
        ...     guide(x[[0, 3]])["z"].shape
        torch.Size([2])
    """

    def __init__(
        self,
        model: Program,
        *,
        num_data: int,
        example: Any,
        family: Family | None = None,
        data_plate: DataPlate = None,
        init_scale: float = 1.0,
        storage: str | os.PathLike[str] | None = None,
    ) -> None:
        num_data = as_count("num_data", num_data)
        _check_scale(init_scale)
        looks = ModelLooks.of(model, example)
        structure = looks.structure(data_plate)
        refuse_globals(structure, "Train an AmortizedGuide(global_guide=...) with them")
        if structure.data_plate is None and num_data != 1:
            raise ValueError(
                f"num_data={num_data}: with data_plate=False the whole batch is one datum"
            )
        super().__init__(looks, structure, family)
        start = self._prior_params
        if init_scale != 1:
            mean, std = prior_moments(looks, structure, self.coordinates)
            start = self.family.initial(mean, init_scale * std)
            if torch.equal(start, self._prior_params):
                what = f"families.{type(self.family).__name__} is a point, and has no width"
                raise ValueError(f"init_scale={init_scale}: {what}; leave init_scale out")
        if storage is None:
            table = start.repeat(num_data, *[1] * start.ndim)
        else:
            table = open_table(storage, start, num_data)
        self._make_rows(table, is_whole=structure.data_plate is None)

    def of_rows(self, rows: slice | Tensor) -> LocalGuide:
        """Return a guide of some of the rows, with a copy of their parameters."""
        return self.with_table(self.table.detach()[rows].clone())

    def with_table(self, table: Tensor) -> LocalGuide:
        """Return a guide of the same family with other rows, [n, P], fitted to nothing yet."""
        other = copy.copy(self)
        for kind in ("_parameters", "_buffers", "_modules"):
            setattr(other, kind, dict(getattr(self, kind)))
        other._non_persistent_buffers_set = set(self._non_persistent_buffers_set)
        other._make_rows(table, is_whole=self.is_whole)
        return other

    def family_params(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the rows of the table for a batch, [N, P]: P is family.params_shape(D)."""
        self.check_size(Batch(args, kwargs).size)
        table = self.in_force
        return table if self.given_rows is None else table[self.given_rows]

    def flush(self) -> None:
        """Wait until a table in a file is on the disk itself.

        What was written is in the file for all processes at once, and survives this one however
        it ends; a power failure it survives once it is flushed.
        """
        write_out(self.table)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        path = file_of(self.table)
        moved = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if path is not None and file_of(self.table) is None:
            text = "the table was copied to another device or dtype: %s keeps the numbers of before"
            logger.warning(text, path)
        return moved


def _check_scale(init_scale: Any) -> None:
    """Raise ValueError for a width that is no finite number above 0."""
    is_number = isinstance(init_scale, (int, float, np.number)) and init_scale is not True
    if not is_number or not 0 < float(init_scale) < math.inf:
        raise ValueError(f"init_scale={init_scale!r}: a finite number above 0 is needed")
