"""What the guides of a family have in common: from parameters of a datum to sample statements."""

from __future__ import annotations

import contextlib
import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeGuard

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.families.base import FactorizedFamily, Family
from pyro_vae.families.gaussian import Normal
from pyro_vae.guides.coordinates import Coordinates, coordinates_of
from pyro_vae.guides.moments import prior_moments
from pyro_vae.guides.proposals import proposal
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.guide_kinds import DeclaredGuide
from pyro_vae.programs.handlers import Registered, register
from pyro_vae.programs.preimages import KeepDraws
from pyro_vae.programs.sites import Plate, Structure
from pyro_vae.programs.structure import ModelLooks
from pyro_vae.programs.types import Values

_STABILITY_RUNS = 5  # of the model

# From a site, and spread rows of the draws of sites before it, to its proposal's parameters, spread
# likewise: see :func:`pyro_vae.guides.proposals.proposal`.
Conditionals = Callable[[Coordinates, Values], Tensor]


class FamilyGuide(Registered, DeclaredGuide):
    """A guide whose proposals are of a variational family.

    A subclass gives :meth:`family_params`, the family's parameters for each datum of a batch; one
    whose proposals are of no family overrides :meth:`_conditionals`.

    Args:
        looks: what runs of the model have shown.
        structure: of the model.
        family: the variational family; families.Normal() by default.

    Attributes:
        family: the variational family.
        coordinates: where each latent site's coordinates lie.
        num_coordinates: D, unconstrained coordinates of a datum.

    Raises:
        TypeError: for a family that is no instance of Family.
        ValueError: where no latent site is continuous, for a site whose support no bijection maps
            to the reals or whose prior is a point, and for a model whose sites are others in
            another run.
    """

    _prior_params: Tensor

    def __init__(self, looks: ModelLooks, structure: Structure, family: Family | None) -> None:
        super().__init__()
        looks.check_stable(structure, _STABILITY_RUNS)
        self.family = Normal() if family is None else family
        if not isinstance(self.family, Family):
            raise TypeError(
                f"family={family!r}: an instance of a family is needed, such as "
                "pyro_vae.families.Normal()"
            )
        self.global_guide = None
        plate = self._data_plate = structure.data_plate
        self._is_subsampled = plate is not None and looks.is_subsampled(plate)
        self.coordinates = coordinates_of(structure, type(self).__name__)
        self.site_names = tuple(coordinates.name for coordinates in self.coordinates)
        self.num_coordinates = self.coordinates[-1].columns.stop
        prior = self.family.initial(*prior_moments(looks, structure, self.coordinates))
        self.register_buffer("_prior_params", prior, persistent=False)

    @abstractmethod
    def family_params(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the family's parameters for a batch, [N, P]: P is family.params_shape(D)."""

    def _chosen_rows(self, index: Tensor) -> contextlib.AbstractContextManager[None]:
        """Say which data a batch holds, where the guide minds."""
        return contextlib.nullcontext()

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every continuous latent site of a datum; the Pyro guide.

        Returns:
            Site name to value.
        """
        register(self)
        batch = Batch(args, kwargs)
        if self._data_plate is None:
            return self._sample(self._conditionals(batch)[1])
        if self._data_plate.drawn:
            return self._sample_minibatch(self._data_plate, batch)
        num_data, params_of = self._conditionals(batch)
        scale = self._data_plate.full_size / num_data if self._is_subsampled else 1.0
        with poutine.block(hide=[self._data_plate.name]):
            # Hidden: a replayed model would take its indices for its own.
            plate = pyro.plate(self._data_plate.name, num_data, dim=self._data_plate.dim)
        with plate, poutine.scale(scale=scale):
            return self._sample(params_of)

    def _sample_minibatch(self, plate: Plate, batch: Batch) -> dict[str, Tensor]:
        """Draw, under the plate's name, the minibatch that the replayed model takes; sample it."""
        minibatch = pyro.plate(
            plate.name, plate.full_size, subsample_size=plate.size, dim=plate.dim
        )
        with minibatch as index:
            drawn = torch.as_tensor(index)
            with self._chosen_rows(drawn):
                params_of = self._conditionals(batch.rows(drawn))[1]
            return self._sample(params_of)

    def _conditionals(self, batch: Batch) -> tuple[int, Conditionals]:
        """Return N, and the parameters of each site given the draws of sites before it."""
        params = self.family_params(*batch.args, **batch.kwargs)

        def params_of(coordinates: Coordinates, before: Values) -> Tensor:
            mine = params
            if isinstance(self.family, FactorizedFamily):
                mine = params[:, coordinates.columns]
            return coordinates.spread(mine.flatten(1)).unflatten(-1, mine.shape[1:])

        return params.shape[0], params_of

    def _sample(self, params_of: Conditionals) -> dict[str, Tensor]:
        plates = {p.name: p for coordinates in self.coordinates for p in coordinates.inner}
        with poutine.block(hide=list(plates)):
            # Hidden: a guide of global latents may have plates of the same names.
            made = {p.name: pyro.plate(p.name, p.size, dim=p.dim) for p in plates.values()}
        values: dict[str, Tensor] = {}
        before: dict[str, Tensor] = {}
        for coordinates in self.coordinates:
            fn = proposal(
                self.family,
                params_of(coordinates, before),
                self.num_coordinates,
                coordinates,
                list(before.values()),
            )
            with contextlib.ExitStack() as stack:
                for plate in coordinates.inner:
                    stack.enter_context(made[plate.name])
                kept = stack.enter_context(KeepDraws())
                value = values[coordinates.name] = pyro.sample(coordinates.name, fn)
            if self.is_dependent:
                z = kept.draws.get(coordinates.name, value)
                if z is value and not coordinates.is_identity:
                    z = coordinates.transform.inv(value)
                before[coordinates.name] = coordinates.flatten(z)
        return values

    def local_part(self) -> FamilyGuide:
        """Return this guide without its global part, the parameters shared."""
        local = copy.copy(self)
        local._modules = {k: m for k, m in self._modules.items() if k != "global_guide"}
        vars(local)["global_guide"] = None
        return local

    @property
    def is_dependent(self) -> bool:
        """Whether a site's proposal may depend on the draws of sites before it."""
        return len(self.coordinates) > 1 and not isinstance(self.family, FactorizedFamily)

    def from_noise(self, params: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Return draws made of standard normal noise, differentiable by the parameters.

        Args:
            params: [N, P].
            noise: [K, num_noise], the same for every datum.

        Returns:
            Site name to values, [K, batch..., event...]; and beside them what those on a
            constrained support are made of, under the names of :mod:`pyro_vae.programs.preimages`.
        """
        spread = noise.unsqueeze(1).expand(-1, params.shape[0], -1)
        return self.values_of(self.family.from_noise(params, self.num_coordinates, spread))

    def values_of(self, z: Tensor) -> dict[str, Tensor]:
        """Return values as :meth:`from_noise` does, of coordinates [K, N, D]."""
        values = {}
        for coordinates in self.coordinates:
            mine = coordinates.arrange(coordinates.spread(z[..., coordinates.columns]))
            values[coordinates.name] = coordinates.value(mine)
            if (key := coordinates.preimage_key) and self.family.has_density:
                values[key] = mine
        return values


def of_family(guide: object) -> TypeGuard[FamilyGuide]:
    """Return whether a guide's proposals are all that its family and its parameters say."""
    return isinstance(guide, FamilyGuide) and not getattr(guide, "parents", None)


def refuse_globals(structure: Structure, advice: str) -> None:
    """Raise ValueError, with advice, for latent sites outside the data plate."""
    if structure.data_plate is not None and structure.global_latents:
        names = [site.name for site in structure.global_latents]
        raise ValueError(
            f"the latent sites {names} lie outside the data plate {structure.data_plate.name!r}: "
            f"they are global. {advice}, or condition the model on a value"
        )
