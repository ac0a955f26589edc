"""LocalGuide: a variational family whose parameters come from a table, a row per datum."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.families.base import Family
from pyro_vae.guides.base import FamilyGuide, refuse_globals
from pyro_vae.programs.batch import Batch, rows_text
from pyro_vae.programs.counts import as_count
from pyro_vae.programs.model_looks import ModelLooks
from pyro_vae.programs.row_guide import RowGuide
from pyro_vae.programs.types import DataPlate, Program

__all__ = ["LocalGuide"]


_SAME_TABLE = 1e-5  # of its length: by less it has moved by rounding


_SAME_DATUM = 1e-4  # of its length: what two fingerprints of a datum may be apart


class LocalGuide(FamilyGuide, RowGuide):
    """A guide with a row of parameters for each datum: no encoder, no amortization.

    Args:
        model: a Pyro model with latent sites in the plate of its data.
        num_data: rows of the table.
        example: a batch to read shapes from; a few rows do.
        family: the variational family; families.Normal() by default.
        data_plate: the name of the plate of the data, where it is not plain; False for all
            latents of the model jointly, as one datum, in one row.

    Attributes:
        table: the parameters, [num_data, P]: P is family.params_shape(D), for a factorized family
            (D, params_per_coordinate).
        converged: [num_data], whether :func:`pyro_vae.refine` found each row's optimum.
        given: the values of global latent sites that its rows were fitted at, by name.

    What :func:`pyro_vae.refine` or :func:`pyro_vae.fit` has fitted rows to is remembered: their
    bounds on other data are refused, in another order too. ``guide.rows(index)`` says
    which of the data a batch holds.

    Raises:
        DataPlateError: where the data plate cannot be told.
        ValueError: where no latent site is continuous, for a discrete one of infinitely many
            values, a global one, or num_data < 1.

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

    converged: Tensor
    _fingerprints: Tensor
    _fitted: Tensor

    def __init__(
        self,
        model: Program,
        *,
        num_data: int,
        example: Any,
        family: Family | None = None,
        data_plate: DataPlate = None,
    ) -> None:
        num_data = as_count("num_data", num_data)
        looks = ModelLooks.of(model, example)
        structure = looks.structure(data_plate)
        refuse_globals(structure, "Train an AmortizedGuide(global_guide=...) with them")
        if structure.data_plate is None and num_data != 1:
            raise ValueError(
                f"num_data={num_data}: with data_plate=False the whole batch is one datum"
            )
        super().__init__(looks, structure, family)
        prior = self._prior_params
        self.table = nn.Parameter(prior.repeat(num_data, *[1] * prior.ndim))
        self.register_buffer("converged", torch.zeros(num_data, dtype=torch.bool))
        # Of the data that the rows were fitted to, and of the table then: infinite for none.
        self.register_buffer("_fingerprints", torch.zeros(num_data, dtype=torch.float64))
        self.register_buffer("_fitted", torch.tensor(math.inf, dtype=torch.float64))
        self._hold({})
        self._fits_any_data = False
        self._rows: Tensor | None = None
        self._trial: Tensor | None = None

    @property
    def num_data(self) -> int:
        """Rows of the table."""
        return self.table.shape[0]

    @property
    def given(self) -> dict[str, Tensor]:
        """The values of global latent sites that the rows were fitted at."""
        held = self._modules.get("_given")
        return {} if held is None else {_site_of(n): v for n, v in held.named_buffers()}

    def _hold(self, given: Mapping[str, Tensor]) -> None:
        self._modules.pop("_given", None)
        if given:
            self._given = nn.Module()
            for site, value in given.items():
                self._given.register_buffer(_buffer_of(site), value.detach().clone())

    def remember(self, batch: Batch | None, given: Mapping[str, Tensor] | None = None) -> None:
        """Remember what the rows were fitted to.

        Args:
            batch: a datum for each row; None forgets.
            given: the values of global latent sites.
        """
        self._hold(given or {})
        known = batch is not None and (self._data_plate is None or batch.size == self.num_data)
        self._fitted.fill_(math.inf)
        if batch is not None and known:
            number, _ = batch.fingerprints(whole=self._data_plate is None)
            self._fingerprints.copy_(number)
            self._fitted.copy_(self._checksum()[0])

    @property
    def is_start(self) -> bool:
        """Whether :meth:`for_any_data` is in force."""
        return self._fits_any_data

    @contextlib.contextmanager
    def for_any_data(self) -> Iterator[None]:
        """Take any batch of the right size, as a start for its rows."""
        before, self._fits_any_data = self._fits_any_data, True
        try:
            yield
        finally:
            self._fits_any_data = before

    def check_data(self, batch: Batch) -> None:
        """Raise ValueError where the rows in force were fitted to other data than these."""
        self.check_size(batch.size)
        checksum, length = self._checksum()
        # Rows that moved since speak for whatever moved them.
        moved = not bool((checksum - self._fitted.to(checksum)).abs() <= _SAME_TABLE * length)
        if self._fits_any_data or moved:
            return
        number, length = batch.fingerprints(whole=self._data_plate is None)
        wanted = self._fingerprints.to(number)
        if self._data_plate is not None:
            wanted = wanted[self.current_rows.to(wanted.device)]
        other = (number - wanted).abs() > _SAME_DATUM * length + torch.finfo(number.dtype).tiny
        if bool(other.any()):
            raise ValueError(
                f"{rows_text(other)} of the batch are not the data that this LocalGuide's rows "
                "were fitted to. Where the batch holds some of those data, say which: with "
                "guide.rows(index): ...; for other data, refine it on them: "
                "pyro_vae.refine(model, guide, *batch)"
            )

    def _checksum(self) -> tuple[Tensor, Tensor]:
        """Return a number that tells the table from others, and its length."""
        table = self.table.detach().flatten().to("cpu", torch.float64)
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(len(table), generator=generator, dtype=torch.float64)
        return table @ direction, table.norm()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # States of guides that remember nothing: of an earlier version.
        state_dict.setdefault(f"{prefix}_fingerprints", torch.zeros_like(self._fingerprints))
        state_dict.setdefault(f"{prefix}_fitted", torch.full_like(self._fitted, math.inf))
        held = f"{prefix}_given."
        self._hold(
            {
                _site_of(key.removeprefix(held)): value
                for key, value in state_dict.items()
                if key.startswith(held)
            }
        )
        super()._load_from_state_dict(state_dict, prefix, *args)

    @contextlib.contextmanager
    def rows(self, index: Tensor | slice) -> Iterator[None]:
        """Say which rows of the table the batches inside the context hold.

        Args:
            index: [n] integers below num_data, or a slice; row i of the batch is
                datum index[i].

        Raises:
            IndexError: for an index out of range.
        """
        if isinstance(index, slice):
            index = torch.arange(self.num_data)[index]
        if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise IndexError(
                f"rows: a 1-dimensional tensor of integers is needed, found {index.dtype} of "
                f"shape {tuple(index.shape)}"
            )
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.num_data:
            raise IndexError(
                f"rows: indices run from {int(index.min())} to {int(index.max())}, but the guide "
                f"has rows 0 to {self.num_data - 1}"
            )
        with self.rows_as_given(index):
            yield

    @property
    def given_rows(self) -> Tensor | None:
        """The rows of :meth:`rows` that are in force; None for all."""
        return self._rows

    @contextlib.contextmanager
    def rows_as_given(self, index: Tensor) -> Iterator[None]:
        """Use these rows inside the context, unchecked: rows [n] that were checked before."""
        before, self._rows = self._rows, index.to(self.table.device)
        try:
            yield
        finally:
            self._rows = before

    @contextlib.contextmanager
    def using(self, table: Tensor) -> Iterator[None]:
        """Take another table in place of the guide's own, to differentiate by it.

        Args:
            table: of the shape of the guide's own.
        """
        before, self._trial = self._trial, table
        try:
            yield
        finally:
            self._trial = before

    @property
    def current_rows(self) -> Tensor:
        """The rows that a batch holds now: those of :meth:`rows`, else all, [n]."""
        if self._rows is not None:
            return self._rows
        return torch.arange(self.num_data, device=self.table.device)

    def family_params(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the rows of the table for a batch, [N, P]: P is family.params_shape(D)."""
        self.check_size(Batch(args, kwargs).size)
        table = self.table if self._trial is None else self._trial
        return table if self._rows is None else table[self._rows]

    def _chosen_rows(self, index: Tensor) -> contextlib.AbstractContextManager[None]:
        return self.rows(index)

    def check_size(self, size: int | None) -> None:
        """Raise ValueError if a batch of this size does not match the rows in force."""
        wanted = self.num_data if self._rows is None else self._rows.shape[0]
        if size is None or size == wanted or self._data_plate is None:
            return
        if self._rows is None:
            raise ValueError(
                f"this LocalGuide has a row for each of {wanted} data but the batch has {size}; "
                "say which rows a minibatch holds: with guide.rows(index): ..."
            )
        raise ValueError(f"guide.rows(index) names {wanted} rows but the batch has {size}")


def _buffer_of(site: str) -> str:
    """Return a name for a buffer, which may hold no dot."""
    return site.replace(".", "|")


def _site_of(buffer: str) -> str:
    return buffer.replace("|", ".")
