"""What the guides of a family have in common: from parameters of a datum to sample statements."""

from __future__ import annotations

import contextlib
import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.families.gaussian import FactorizedFamily, Family, Normal
from pyro_vae.guides.coordinates import Coordinates
from pyro_vae.guides.proposals import proposal
from pyro_vae.programs.batch import Batch, as_batch
from pyro_vae.programs.declared_guide import DeclaredGuide
from pyro_vae.programs.handlers import Registered, register
from pyro_vae.programs.looks import check_stable, run_model
from pyro_vae.programs.preimages import KeepDraws
from pyro_vae.programs.sites import Plate, Site, Structure
from pyro_vae.programs.state import Look, preserved_rng
from pyro_vae.programs.structure import is_subsampled

__all__ = ["Conditionals", "FamilyGuide", "normal_moments", "of_family"]

# From a site, and the draws of the sites before it, to the parameters of its proposal.
Conditionals = Callable[[Coordinates, Mapping[str, Tensor]], Tensor]

# Draws from a latent's prior that place the start of its guide.
_PRIOR_DRAWS = 1000
_PRIOR_RUNS = 50  # of the model, where the draws of one do not vary
_WIDEST = 3.0  # standard deviation of a start on the reals, where they are mapped to a support


class FamilyGuide(Registered, DeclaredGuide):
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
        family: Family | None,
        structure: Structure,
    ) -> None:
        super().__init__()
        self.global_guide = None
        batch = as_batch(example)
        check_stable(model, batch, structure, runs=5)
        self.family = Normal() if family is None else family
        if not isinstance(self.family, Family):
            raise TypeError(
                f"family={family!r}: an instance of a family is needed, such as "
                "pyro_vae.families.Normal()"
            )
        plate = structure.data_plate
        self._data_plate = plate
        self._subsampled = plate is not None and is_subsampled(model, batch, plate)
        latents = structure.global_latents if plate is None else structure.local_latents
        proposed = [site for site in latents if not site.enumerable]
        if not proposed:
            discrete = ", ".join(
                f"latent site {site.name!r} ({site.distribution})" for site in latents
            )
            raise ValueError(
                f"no latent site is continuous, only {discrete}: {type(self).__name__} proposes "
                "continuous sites, and leaves discrete ones of finite support to be "
                "summed out. Use pyro_vae.ExactGuide(model, example=batch)"
            )
        coordinates, start = [], 0
        for site in proposed:
            _check_inner_plates(site, plate)
            coordinates.append(Coordinates.of(site, plate, start))
            start = coordinates[-1].columns.stop
        self.coordinates = tuple(coordinates)
        self.num_coordinates = start
        self.register_buffer(
            "_prior_params", self._prior_moments(model, batch, structure), persistent=False
        )

    _prior_params: Tensor

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
        if self._data_plate is None:
            return self._sample(self._conditionals(args, kwargs)[1])
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
                with self._chosen_rows(drawn):
                    params_of = self._conditionals(chosen.args, chosen.kwargs)[1]
                return self._sample(params_of)
        num_data, params_of = self._conditionals(args, kwargs)
        scale = self._data_plate.full_size / num_data if self._subsampled else 1.0
        with poutine.block(hide=[self._data_plate.name]):
            # Hidden, for a replayed model would take its indices for its own.
            plate = pyro.plate(self._data_plate.name, num_data, dim=self._data_plate.dim)
        with plate, poutine.scale(scale=scale):
            return self._sample(params_of)

    def _conditionals(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[int, Conditionals]:
        """Return N, and what gives a site's parameters, given the draws of sites before it.

        The parameters are spread, the draws spread rows by name; see :func:`proposal`.
        """
        params = self.family_params(*args, **kwargs)

        def params_of(coordinates: Coordinates, before: Mapping[str, Tensor]) -> Tensor:
            mine = params
            if isinstance(self.family, FactorizedFamily):
                mine = params[:, coordinates.columns]
            return coordinates.spread(mine.flatten(1)).unflatten(-1, mine.shape[1:])

        return params.shape[0], params_of

    def _sample(self, params_of: Conditionals) -> dict[str, Tensor]:
        plates = {p.name: p for coordinates in self.coordinates for p in coordinates.inner}
        with poutine.block(hide=list(plates)):
            # Hidden, for a guide of global latents may have plates of the same names.
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

    @property
    def site_names(self) -> tuple[str, ...]:
        """The sites that the guide samples by itself, those of its global part aside."""
        return tuple(coordinates.name for coordinates in self.coordinates)

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

    def _prior_moments(
        self, model: Callable[..., Any], batch: Batch, structure: Structure
    ) -> Tensor:
        """Return parameters with the prior's moments, over draws and data: [P]."""
        means, stds = [], []
        device = next(iter(structure.sites.values())).value.device
        with torch.no_grad(), preserved_rng(device):
            torch.manual_seed(0)  # the start of a guide is part of its definition
            for coordinates in self.coordinates:
                draws = structure.sites[coordinates.name].fn.sample((_PRIOR_DRAWS,))
                mean, std = self._moments_of(coordinates, draws)
                if not bool((std > 0).all()):  # given these parents, which have a prior too
                    draws = _from_other_parents(model, batch, coordinates.name, draws)
                    mean, std = self._moments_of(coordinates, draws)
                    if bool((draws == draws[:1]).all()):
                        raise ValueError(
                            f"latent site {coordinates.name!r}: its prior does not vary (a point), "
                            "so there is nothing to infer. Use pyro.deterministic, or condition "
                            "on it"
                        )
                    # It varies between a few values, or between the ends of its support.
                    mean = torch.where(mean.isfinite(), mean, 0.0)
                    std = torch.where(std > 0, std, _WIDEST)
                means.append(mean)
                # Wide on the reals may be beyond all numbers once mapped to the support.
                stds.append(std if coordinates.is_identity else std.clamp(max=_WIDEST))
        return self.family.initial(torch.cat(means), torch.cat(stds))

    def _moments_of(self, coordinates: Coordinates, draws: Tensor) -> tuple[Tensor, Tensor]:
        return _moments(coordinates.rows(coordinates.transform.inv(draws)).flatten(0, 1))

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

    def params_from(
        self, runs: Sequence[Mapping[str, Any]], values: Mapping[str, Tensor]
    ) -> Tensor:
        """Return parameters that match another guide's proposals, [N, P].

        Args:
            runs: the latent nodes of two runs of that guide. Where a proposal is Normal, on a
                real support, and the same in both (it does not depend on another draw), its
                moments are read off; elsewhere they are those of the draws.
            values: draws of that guide, [K, batch..., event...] for each name; their preimages
                too where it keeps them.
        """
        means, stds = [], []
        for coordinates in self.coordinates:
            moments = None
            if coordinates.is_identity:
                moments = normal_moments([nodes[coordinates.name] for nodes in runs])
            if moments is None:
                # Of the middle: heavy tails have no moments, and draws outside of the support no
                # coordinates.
                mean, std = _moments(coordinates.rows(coordinates.unconstrained(values)))
            else:
                mean, std = (coordinates.rows(m.unsqueeze(0))[0] for m in moments)
            means.append(mean)
            stds.append(std)
        return self.family.initial(torch.cat(means, -1), torch.cat(stds, -1))


def _from_other_parents(
    model: Callable[..., Any], batch: Batch, name: str, draws: Tensor
) -> Tensor:
    """Return draws of a latent from the prior, its parents drawn anew for some of them."""
    found = [draws]
    for seed in range(1, _PRIOR_RUNS + 1):
        with Look() as look:
            sites = run_model(model, batch, seed=seed).sites
        if look.error is None:  # a draw that the model cannot take says nothing
            found.append(sites[name].fn.sample((_PRIOR_DRAWS // _PRIOR_RUNS,)))
    return torch.cat(found[1:] or found)


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each column; of heavy tails, those of the middle."""
    if rows.dtype in (torch.float16, torch.bfloat16):  # which PyTorch has no quantiles of
        mean, std = _moments(rows.float())
        return mean.to(rows.dtype), std.to(rows.dtype)
    some = rows[:: -(-len(rows) // 10_000)]
    # Sorted, NaN last: torch.nanquantile takes 2**24 numbers at most.
    some = torch.where(some.isfinite(), some, math.nan).sort(dim=0).values
    last = (some.isfinite().sum(0, keepdim=True) - 1).clamp_min(0)
    low, median, high = (
        some.gather(0, (level * last).round().long())[0] for level in (0.16, 0.5, 0.84)
    )
    mean, std, middle = rows.mean(0), rows.std(0), (high - low) / 2
    light = (std < 2 * middle) | (std == 0)
    return torch.where(light, mean, median), torch.where(light, std, middle)


def of_family(guide: Any) -> TypeGuard[FamilyGuide]:
    """Return whether a guide's proposals are all that its family and its parameters say."""
    return isinstance(guide, FamilyGuide) and not getattr(guide, "parents", None)


def normal_moments(nodes: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
    """Return mean and std of a site that is independent Normals, alike in several runs; or None."""
    found = []
    for node in nodes:
        fn = node["fn"]
        while isinstance(fn, torch.distributions.Independent):
            fn = fn.base_dist
        if not isinstance(fn, torch.distributions.Normal):
            return None
        found.append((fn.loc, fn.scale))
    loc, scale = found[0]
    if any(not torch.equal(loc, a) or not torch.equal(scale, b) for a, b in found):
        return None
    return loc, scale


def _check_inner_plates(site: Site, data_plate: Plate | None) -> None:
    for plate in site.plates:
        if plate != data_plate and plate.size != plate.full_size:
            raise ValueError(
                f"latent site {site.name!r} is in plate {plate.name!r}, of which a run sees "
                f"{plate.size} of {plate.full_size} entries: a guide with parameters for each "
                "entry cannot know which. Subsample the data plate alone, or write the guide by "
                "hand"
            )


def refuse_globals(structure: Structure, advice: str) -> None:
    if structure.data_plate is not None and structure.global_latents:
        names = [site.name for site in structure.global_latents]
        raise ValueError(
            f"the latent sites {names} lie outside the data plate {structure.data_plate.name!r}: "
            f"they are global. {advice}, or condition the model on a value"
        )
