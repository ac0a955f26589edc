"""Guides: a variational family and where its parameters come from.

AmortizedGuide = family of an encoder's output; LocalGuide = family of a table
with a row per datum. Both are nn.Modules and Pyro guides, made from the model's
structure, and sample the model's local latent sites under their own names.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae.batches import Batch, as_batch
from pyro_vae.coordinates import Coordinates
from pyro_vae.families import FactorizedFamily, Normal
from pyro_vae.handlers import register
from pyro_vae.sites import Structure, evaluation, inspect, is_subsampled, preserved_rng

__all__ = ["AmortizedGuide", "FamilyGuide", "LocalGuide", "own_params"]

# Draws from a latent's prior that place the start of its guide.
_PRIOR_DRAWS = 1000


class FamilyGuide(nn.Module):
    """What the guides of a family have in common; see the subclasses.

    A subclass gives :meth:`family_params`, the parameters of each datum.

    Attributes:
        family: the variational family.
        coordinates: where each latent site's coordinates lie.
        num_coordinates: D, unconstrained coordinates of a datum.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        example: Any,
        family: FactorizedFamily | None,
        data_plate: str | bool | None,
        *,
        globals_allowed: bool,
    ) -> None:
        super().__init__()
        batch = as_batch(example)
        structure = inspect(model, batch, data_plate=data_plate)
        if structure.data_plate is None:
            raise ValueError(
                f"{type(self).__name__} is for latents of each datum; with data_plate=False "
                "there are none. Use a guide of Pyro's (pyro.infer.autoguide)"
            )
        if not structure.local_latents:
            raise ValueError(f"no latent site lies inside the plate {structure.data_plate.name!r}")
        if not globals_allowed:
            names = [site.name for site in structure.global_latents]
            if names:
                raise ValueError(
                    f"the latent sites {names} lie outside the data plate "
                    f"{structure.data_plate.name!r}: they are global. Give a guide for them "
                    "(global_guide=...), or condition the model on a value"
                )
        self.family = Normal() if family is None else family
        if not isinstance(self.family, FactorizedFamily):
            raise TypeError(
                f"family={family!r}: an instance of a family is needed, such as "
                "pyro_vae.families.Normal()"
            )
        self._data_plate = structure.data_plate
        self._subsampled = is_subsampled(model, batch, structure.data_plate)
        proposed = [site for site in structure.local_latents if not site.enumerable]
        if not proposed:
            discrete = ", ".join(
                f"latent site {site.name!r} ({site.distribution})"
                for site in structure.local_latents
            )
            raise ValueError(
                f"no latent site is continuous, only {discrete}: {type(self).__name__} proposes "
                "continuous sites, and leaves discrete ones of finite support to be "
                "summed out. Use pyro_vae.ExactGuide(model, example=batch)"
            )
        coordinates, start = [], 0
        for site in proposed:
            coordinates.append(Coordinates.of(site, structure.data_plate, start))
            start = coordinates[-1].columns.stop
        self.coordinates = tuple(coordinates)
        self.num_coordinates = start
        self.register_buffer("_prior_params", self._prior_moments(structure), persistent=False)

    _prior_params: Tensor

    @abstractmethod
    def family_params(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the family's parameters for a batch, [N, D, params_per_coordinate]."""

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every continuous local latent site; the Pyro guide.

        Returns:
            Site name to value.
        """
        register(self)
        if self._data_plate.drawn:
            # The model draws its own minibatch from the whole data: draw it here,
            # under the plate's name, so that the replayed model takes the same.
            plate = pyro.plate(
                self._data_plate.name,
                self._data_plate.full_size,
                subsample_size=self._data_plate.size,
                dim=self._data_plate.dim,
            )
            with plate as index:
                drawn = torch.as_tensor(index)
                chosen = Batch(args, kwargs).rows(drawn)
                with self.rows(drawn) if isinstance(self, LocalGuide) else contextlib.nullcontext():
                    params = self.family_params(*chosen.args, **chosen.kwargs)
                return self._sample(params)
        params = self.family_params(*args, **kwargs)
        size = params.shape[0]
        scale = self._data_plate.full_size / size if self._subsampled else 1.0
        with poutine.block(hide=[self._data_plate.name]):
            # Hidden, for a replayed model would take its indices for its own.
            plate = pyro.plate(self._data_plate.name, size, dim=self._data_plate.dim)
        with plate, poutine.scale(scale=scale):
            return self._sample(params)

    def _sample(self, params: Tensor) -> dict[str, Tensor]:
        plates = {p.name: p for coordinates in self.coordinates for p in coordinates.inner}
        made = {p.name: pyro.plate(p.name, p.size, dim=p.dim) for p in plates.values()}
        values = {}
        for coordinates in self.coordinates:
            with contextlib.ExitStack() as stack:
                for plate in coordinates.inner:
                    stack.enter_context(made[plate.name])
                values[coordinates.name] = pyro.sample(
                    coordinates.name, self._distribution(coordinates, params)
                )
        return values

    def _distribution(self, coordinates: Coordinates, params: Tensor) -> Any:
        mine = coordinates.arrange(params, trailing=1)
        if not coordinates.is_identity:
            return self.family.mapped(mine, coordinates.transform)
        return self.family.marginal(mine).to_event(coordinates.transform.domain.event_dim)

    def _prior_moments(self, structure: Structure) -> Tensor:
        """Return parameters with the prior's moments, over draws and data: [D, p]."""
        moments = []
        device = structure.local_latents[0].value.device
        with torch.no_grad(), preserved_rng(device):
            torch.manual_seed(0)  # the start of a guide is part of its definition
            for coordinates in self.coordinates:
                fn = structure.sites[coordinates.name].fn
                draws = coordinates.transform.inv(fn.sample((_PRIOR_DRAWS,)))
                flat = coordinates.flatten(draws.movedim(0, -1), trailing=1)  # [N, d, draws]
                flat = flat.movedim(1, -1).reshape(-1, flat.shape[1])
                moments.append(self.family.from_moments(flat.mean(0), flat.std(0)))
        return torch.cat(moments)

    def from_noise(self, params: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Return draws made of standard normal noise, differentiable by the parameters.

        Args:
            params: [N, D, params_per_coordinate].
            noise: [K, D], the same for every datum.

        Returns:
            Site name to values, [K, batch..., event...].
        """
        z = self.family.from_noise(params, noise.unsqueeze(1))
        values = {}
        for coordinates in self.coordinates:
            arranged = coordinates.arrange(z.permute(1, 2, 0), trailing=1).movedim(-1, 0)
            values[coordinates.name] = coordinates.transform(arranged)
        return values

    def params_from(
        self, runs: Sequence[Mapping[str, Any]], values: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the parameters that match another guide's proposals, [N, D, p].

        Args:
            runs: the latent nodes of two runs of that guide. Where a proposal is of this
                family, on a real support, and the same in both (it does not depend on
                another draw), its parameters are read off; elsewhere the moments of the
                draws are matched.
            values: draws of that guide, [K, batch..., event...] for each name.
        """
        columns = []
        for coordinates in self.coordinates:
            params = None
            if coordinates.is_identity:
                params = own_params(self.family, [nodes[coordinates.name] for nodes in runs])
                if params is not None:
                    params = coordinates.flatten(params, trailing=1)
            if params is None:
                draws = coordinates.transform.inv(values[coordinates.name])
                flat = coordinates.flatten(draws.movedim(0, -1), trailing=1)  # [N, d, K]
                params = self.family.from_moments(flat.mean(-1), flat.std(-1))
            columns.append(params)
        return torch.cat(columns, 1)


class AmortizedGuide(FamilyGuide):
    r"""A guide whose parameters an encoder computes from the datum.

    .. math:: q_\phi(z | x) = \mathrm{family}(z; \mathrm{head}(\mathrm{encoder}_\phi(x)))

    Made from the model: it samples every continuous latent site of the data plate, under
    the site's name, mapped to the site's support; discrete ones are left to be summed out. The
    encoder returns features [N, F]; the guide adds the linear head. At the start every
    datum's proposal is close to the prior. All parameters exist after construction.

    Args:
        model: a Pyro model with latent sites in the plate of its data.
        encoder: called as ``encoder(*batch)``, or ``encoder(**batch)`` for a mapping;
            returns features [N, F].
        example: a batch (tensor, tuple or mapping) to read shapes from; a few rows do.
        family: the variational family; families.Normal() by default.
        data_plate: the name of the plate of the data, where it is not plain.
        global_guide: a Pyro guide for the latent sites outside the data plate, if the
            model has any, for example AutoNormal(poutine.block(model, expose=[...])).

    Raises:
        DataPlateError: where the data plate cannot be told.
        ValueError: where no latent site is continuous, for a discrete one of infinitely many
            values, global latents without a guide, or an encoder whose features are not [N, F].

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_vae as pv
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z.repeat(1, 2), 1.0).to_event(1), obs=x)
        >>> x = torch.zeros(5, 4)
        >>> guide = pv.AmortizedGuide(model, torch.nn.Linear(4, 8), example=x)
        >>> guide(x)["z"].shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: nn.Module,
        *,
        example: Any,
        family: FactorizedFamily | None = None,
        data_plate: str | bool | None = None,
        global_guide: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(
            model, example, family, data_plate, globals_allowed=global_guide is not None
        )
        self.encoder = encoder
        self.global_guide = global_guide
        batch = as_batch(example)
        if self._data_plate.drawn:
            batch = batch.rows(slice(0, self._data_plate.size))
        with torch.no_grad(), evaluation(encoder):
            features = self._features(batch.args, batch.kwargs)
        prior = self._prior_params.to(features)
        self.head = nn.Linear(
            features.shape[1], prior.numel(), device=features.device, dtype=features.dtype
        )
        with torch.no_grad():
            self.head.weight.mul_(0.1)
            self.head.bias.copy_(prior.flatten())
        if global_guide is not None:
            # Pyro's autoguides make their parameters at the first call.
            with torch.no_grad(), poutine.block(), preserved_rng(features.device):
                global_guide(*batch.args, **batch.kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site; the Pyro guide."""
        values: dict[str, Tensor] = {}
        if self.global_guide is not None:
            returned = self.global_guide(*args, **kwargs)
            values.update(returned if isinstance(returned, Mapping) else {})
        return {**values, **super().forward(*args, **kwargs)}

    def family_params(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the family's parameters for a batch, [N, D, params_per_coordinate]."""
        head = self.head(self._features(args, kwargs))
        return head.reshape(head.shape[0], self.num_coordinates, self.family.params_per_coordinate)

    def _features(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        features = self.encoder(*args, **kwargs)
        size = Batch(tuple(args), kwargs).size
        if not isinstance(features, Tensor) or features.ndim != 2 or features.shape[0] != size:
            found = (
                f"a tensor of shape {tuple(features.shape)}"
                if isinstance(features, Tensor)
                else type(features).__name__
            )
            raise ValueError(
                f"the encoder returned {found}; features of shape [{size}, F] are needed, a row "
                "for each datum of the batch"
            )
        return features


class LocalGuide(FamilyGuide):
    """A guide with a row of parameters for each datum: no encoder, no amortization.

    Args:
        model: a Pyro model with latent sites in the plate of its data.
        num_data: rows of the table.
        example: a batch to read shapes from; a few rows do.
        family: the variational family; families.Normal() by default.
        data_plate: the name of the plate of the data, where it is not plain.

    Attributes:
        table: the parameters, [num_data, D, params_per_coordinate].
        converged: [num_data], whether :func:`pyro_vae.refine` found each row's optimum.

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

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        num_data: int,
        example: Any,
        family: FactorizedFamily | None = None,
        data_plate: str | bool | None = None,
    ) -> None:
        if num_data < 1:
            raise ValueError(f"num_data={num_data}: a table needs at least one row")
        super().__init__(model, example, family, data_plate, globals_allowed=False)
        self.table = nn.Parameter(self._prior_params.repeat(num_data, 1, 1))
        self.register_buffer("converged", torch.zeros(num_data, dtype=torch.bool))
        self._rows: Tensor | None = None
        self._trial: Tensor | None = None

    @property
    def num_data(self) -> int:
        """Rows of the table."""
        return self.table.shape[0]

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
        before, self._rows = self._rows, index.to(self.table.device)
        try:
            yield
        finally:
            self._rows = before

    @contextlib.contextmanager
    def using(self, table: Tensor) -> Iterator[None]:
        """Take another table in place of the guide's own, to differentiate by it.

        Args:
            table: [num_data, D, params_per_coordinate].
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
        """Return the rows of the table for a batch, [N, D, params_per_coordinate]."""
        self.check_size(Batch(args, kwargs).size)
        table = self.table if self._trial is None else self._trial
        return table if self._rows is None else table[self._rows]

    def check_size(self, size: int | None) -> None:
        """Raise ValueError if a batch of this size does not match the rows in force."""
        wanted = self.num_data if self._rows is None else self._rows.shape[0]
        if size is None or size == wanted:
            return
        if self._rows is None:
            raise ValueError(
                f"this LocalGuide has a row for each of {wanted} data but the batch has {size}; "
                "say which rows a minibatch holds: with guide.rows(index): ..."
            )
        raise ValueError(f"guide.rows(index) names {wanted} rows but the batch has {size}")


def own_params(family: FactorizedFamily, nodes: Sequence[Any]) -> Tensor | None:
    """Return a site's parameters if it is of the family, and alike in several runs."""
    found = []
    for node in nodes:
        fn = node["fn"]
        while isinstance(fn, torch.distributions.Independent):
            fn = fn.base_dist
        found.append(family.params_of(fn))
    first = found[0]
    if first is None or any(p is None or not torch.equal(p, first) for p in found):
        return None
    return first
