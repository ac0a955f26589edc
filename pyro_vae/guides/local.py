"""LocalGuide: a variational family whose parameters come from a table, a row per datum."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.families.base import Family
from pyro_vae.guides.base import FamilyGuide, refuse_globals
from pyro_vae.guides.coordinates import prior_moments
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.guide_kinds import RowGuide
from pyro_vae.programs.messages import as_count
from pyro_vae.programs.structure import ModelLooks
from pyro_vae.programs.types import DataPlate, Program


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
            or one for a family without a width (a point).

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
        table = start.repeat(num_data, *[1] * start.ndim)
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


def _check_scale(init_scale: Any) -> None:
    """Raise ValueError for a width that is no finite number above 0."""
    is_number = isinstance(init_scale, (int, float, np.number)) and init_scale is not True
    if not is_number or not 0 < float(init_scale) < math.inf:
        raise ValueError(f"init_scale={init_scale!r}: a finite number above 0 is needed")
