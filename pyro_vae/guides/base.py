"""What guides of a family have in common: from parameters to proposals and sample statements."""

from __future__ import annotations

import contextlib
import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeGuard

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.distributions.util import sum_rightmost
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.families.annealed import Annealed
from pyro_vae.families.base import FactorizedFamily, Family
from pyro_vae.families.gaussian import Normal
from pyro_vae.guides.annealing import Annealing, Walked
from pyro_vae.guides.coordinates import Coordinates, coordinates_of, prior_moments
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.guide_kinds import DeclaredGuide, RowGuide
from pyro_vae.programs.handlers import Registered, register
from pyro_vae.programs.moved import moved
from pyro_vae.programs.preimages import KeepDraws
from pyro_vae.programs.sites import Plate, Structure
from pyro_vae.programs.structure import ModelLooks
from pyro_vae.programs.types import Distribution, Values

_STABILITY_RUNS = 5  # of the model
_NO_SHAPE = torch.Size()
_GAUSSIAN = (torch.distributions.MultivariateNormal, torch.distributions.LowRankMultivariateNormal)
# From a site, and spread rows of the draws of sites before it, to what its parameters gain by them.
Added = Callable[[Coordinates, Values], Tensor | None]


class FamilyGuide(Registered, DeclaredGuide):
    """A guide whose proposals are of a variational family.

    A subclass gives :meth:`family_params`, the family's parameters for each datum of a batch; one
    whose proposals are of no family overrides :meth:`_proposed`.

    Args:
        looks: what runs of the model have shown.
        structure: of the model.
        family: the variational family; families.Normal() by default.

    Attributes:
        family: the variational family.
        coordinates: where each latent site's coordinates lie.
        num_coordinates: D, unconstrained coordinates of a datum.
        annealing: what moves its draws; None for a family without steps.

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
                f"family={family!r}: an instance of a family is needed, such as Normal()"
            )
        self.global_guide = None
        self.held: Values = {}  # of the global latents, in a local part
        plate = self._data_plate = structure.data_plate
        self._is_subsampled = plate is not None and looks.is_subsampled(plate)
        self.coordinates = coordinates_of(structure, type(self).__name__)
        self.site_names = tuple(coordinates.name for coordinates in self.coordinates)
        self.num_coordinates = self.coordinates[-1].columns.stop
        prior = self.family.initial(*prior_moments(looks, structure, self.coordinates))
        self.register_buffer("_prior_params", prior, persistent=False)
        self.annealing = None
        if isinstance(self.family, Annealed):
            known = structure, self.coordinates, self.family, self._proposal
            self.annealing = Annealing(looks, *known)
            self.annealing.check_slopes(prior, looks.batch, structure.num_data)

    @abstractmethod
    def family_params(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the family's parameters for a batch, [N, P]: P is family.params_shape(D)."""

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every continuous latent site of a datum; the Pyro guide.

        Returns:
            Site name to value.
        """
        register(self)
        return self._sample_batch(Batch(args, kwargs), {})

    def _sample_batch(self, batch: Batch, shared: Values) -> dict[str, Tensor]:
        """Sample every site of a batch, given values of the global latents that are known."""
        plate = self._data_plate
        if plate is not None and plate.drawn:  # under its name, the minibatch of the replayed model
            with pyro.plate(plate.name, plate.full_size, plate.size, dim=plate.dim) as index:
                drawn = torch.as_tensor(index)
                with self.rows(drawn) if isinstance(self, RowGuide) else contextlib.nullcontext():
                    proposed = self._proposed(batch.rows(drawn), shared)
                return self._sample(*proposed)
        params, added = self._proposed(batch, shared)
        walked = None
        if self.annealing is not None:
            with self._in_plate(len(params)):
                noise = self.annealing.draw_noise(params)
            # Outside of the guide's plate: the model has its own in that place.
            walked = self.annealing.walk(batch, shared, params, noise)
        with self._in_plate(len(params)):
            return self._sample(params, added, walked)

    @contextlib.contextmanager
    def _in_plate(self, num_data: int) -> Iterator[None]:
        """Make what is sampled inside the context that of so many data."""
        if (plate := self._data_plate) is None:
            yield
            return
        scale = plate.full_size / num_data if self._is_subsampled else 1.0
        (made,) = hidden_plates([replace(plate, size=num_data)]).values()
        with made, poutine.scale(scale=scale):
            yield

    def _proposed(self, batch: Batch, shared: Values) -> tuple[Tensor, Added | None]:
        """Return the family's parameters, and what a site's gain by draws before it, [N, P]."""
        return self.family_params(*batch.args, **batch.kwargs), None

    def _sample(
        self, params: Tensor, added: Added | None, walked: Walked | None = None
    ) -> dict[str, Tensor]:
        plates = hidden_plates(plate for one in self.coordinates for plate in one.inner)
        values: dict[str, Tensor] = {}
        before: dict[str, Tensor] = {}
        if walked is not None:
            walked.score()
        if isinstance(self.family, Annealed):
            params = self.family.base_params(params, self.num_coordinates)
        for coordinates in self.coordinates:
            name = coordinates.name
            more = None if added is None else added(coordinates, before)
            try:
                fn = self._proposal(params, coordinates, list(before.values()), more)
            except ValueError as error:  # of PyTorch, which does not know whose parameters they are
                what = (
                    "whose parameters overflow: rescale the data, or bound what the encoder gives"
                )
                error.add_note(f"at the guide's site {name!r}, {what}")
                raise
            if walked is not None:
                fn = moved(fn, walked.draws[name])
            with contextlib.ExitStack() as stack:
                for plate in coordinates.inner:
                    stack.enter_context(plates[plate.name])
                kept = stack.enter_context(KeepDraws())
                value = values[name] = pyro.sample(name, fn)
            if self.is_dependent:
                z = kept.draws[name] if name in kept.draws else coordinates.transform.inv(value)
                before[name] = coordinates.flatten(z)
        return values

    def _proposal(
        self,
        params: Tensor,
        coordinates: Coordinates,
        before: Sequence[Tensor],
        more: Tensor | None = None,
    ) -> Distribution:
        """Return a site's proposal by parameters [N, P], of the base where the family has steps.

        Args:
            params: of all coordinates.
            coordinates: the site's.
            before: spread rows of the draws of the sites before it, where it may depend on them.
            more: what the parameters gain, in spread rows.
        """
        family = self.family.base if isinstance(self.family, Annealed) else self.family
        own = params[:, coordinates.columns] if isinstance(family, FactorizedFamily) else params
        rows = coordinates.spread(own.flatten(1))
        rows = (rows if more is None else rows + more).unflatten(-1, own.shape[1:])
        return proposal(family, rows, self.num_coordinates, coordinates, before)

    def local_part(self, given: Values) -> FamilyGuide:
        """Return this guide without its global part, held at values; the parameters are shared."""
        local = copy.copy(self)
        local._modules = {k: m for k, m in self._modules.items() if k != "global_guide"}
        vars(local).update(global_guide=None, held=dict(given))
        return local

    @property
    def is_dependent(self) -> bool:
        """Whether a site's proposal may depend on the draws of sites before it."""
        return len(self.coordinates) > 1 and not isinstance(self.family, FactorizedFamily)

    @property
    def sees_draws(self) -> bool:
        """Whether parameters of a datum's proposals depend on draws, of globals or of its own."""
        return False

    def from_noise(self, params: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Return draws made of standard normal noise, differentiable by the parameters.

        Of parameters [N, P] and noise [K, num_noise], the same for every datum: site name to values
        [K, batch..., event...]; and beside them what those on a constrained support are made of,
        under the names of :mod:`pyro_vae.programs.preimages`.
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


def hidden_plates(plates: Iterable[Plate | CondIndepStackFrame]) -> dict[str, pyro.plate]:
    """Return Pyro's plates by name, hidden: others may have their names, or take their indices."""
    by_name = {plate.name: plate for plate in plates}
    with poutine.block(hide=list(by_name)):
        return {n: pyro.plate(n, plate.size, dim=plate.dim) for n, plate in by_name.items()}


def of_family(guide: object) -> TypeGuard[FamilyGuide]:
    """Return whether a guide's proposals are all that its family and its parameters say."""
    return isinstance(guide, FamilyGuide) and not guide.sees_draws


def refuse_globals(structure: Structure, advice: str) -> None:
    """Raise ValueError, with advice, for latent sites outside the data plate."""
    if structure.data_plate is not None and structure.global_latents:
        names = [site.name for site in structure.global_latents]
        raise ValueError(
            f"the latent sites {names} lie outside the data plate {structure.data_plate.name!r}: "
            f"they are global. {advice}, or condition the model on a value"
        )


def proposal(
    family: Family, params: Tensor, size: int, coordinates: Coordinates, before: Sequence[Tensor]
) -> Distribution:
    """Return the distribution of a site, given the unconstrained values of the sites before it.

    On real support it is the family's own, elsewhere mapped to the support. Parameters and values
    are spread rows; the parameters of a factorized family are the site's own.
    """
    transform = coordinates.transform
    if coordinates.preimage_key is not None:
        # Remembered, so that losses of Pyro's, too, score a draw by what it was made of.
        transform = transform.with_cache(1)
    if isinstance(family, FactorizedFamily):
        arranged = coordinates.arrange(params.movedim(-1, 0)).movedim(0, -1)
        if not coordinates.is_identity:
            return family.mapped(arranged, transform)
        return family.marginal(arranged).to_event(transform.domain.event_dim)
    shape = torch.broadcast_shapes(*(rows.shape[:-1] for rows in before))
    while len(shape) > len(coordinates.batch) and shape[0] == 1:
        shape = shape[1:]  # a dimension of a site before this one
    known = [
        r.reshape(r.shape[max(0, r.ndim - 1 - len(shape)) :]).expand(*shape, -1) for r in before
    ]
    seen = torch.cat(known, -1) if before else params[..., :0]
    base = _of_site(family.conditional(params, size, seen, coordinates.columns), coordinates)
    return base if coordinates.is_identity else dist.TransformedDistribution(base, [transform])


def _of_site(joint: Any, coordinates: Coordinates) -> Distribution:
    """Return a distribution over a site's coordinates [..., d] in the site's own shape."""
    is_gaussian = isinstance(joint, _GAUSSIAN)
    if coordinates.is_plain and len(coordinates.event) == 1:
        return joint
    if coordinates.is_plain and not coordinates.event and is_gaussian:
        return dist.Normal(joint.loc[..., 0], joint.variance[..., 0].sqrt())
    single = coordinates.columns.stop - coordinates.columns.start == 1
    if not (single or is_gaussian or hasattr(joint, "coordinate_log_prob")):
        raise ValueError(
            f"latent site {coordinates.name!r} has batch dimensions inside a datum, or an event "
            f"that is no vector: {type(joint).__name__} needs a method coordinate_log_prob"
        )
    return _Arranged(joint, coordinates)


class _Arranged(TorchDistribution):
    """A joint distribution over a site's coordinates, where the site is a batch inside a datum.

    Its draws in the batch depend on one another. The log density of each is that given those
    before it: their sum is the joint's, and where a mask leaves some of them out, those
    left out are auxiliary draws, which no bound minds.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(self, joint: Any, coordinates: Coordinates) -> None:
        self._joint, self._coordinates = joint, coordinates
        batch_shape = torch.broadcast_shapes(joint.batch_shape, coordinates.batch)
        super().__init__(batch_shape, torch.Size(coordinates.event), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The reals."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Arranged:
        """Return the distribution of another batch shape."""
        sizes = list(batch_shape)
        for axis in self._coordinates.inside:
            sizes[axis] = 1  # the joint has its coordinates instead
        return _Arranged(self._joint.expand(torch.Size(sizes)), self._coordinates)

    def rsample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        """Return draws, differentiable by the parameters."""
        return self._coordinates.arrange(self._joint.rsample(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of each entry of the batch, given those before it."""
        spread = self._coordinates.flatten(value)
        if spread.shape[-1] == 1:
            log_prob = self._joint.log_prob(spread).unsqueeze(-1)
        elif isinstance(self._joint, _GAUSSIAN):
            log_prob = _gaussian_log_prob(self._joint, spread)
        else:
            log_prob = self._joint.coordinate_log_prob(spread)
        return sum_rightmost(self._coordinates.arrange(log_prob), len(self.event_shape))


def _gaussian_log_prob(joint: Any, value: Tensor) -> Tensor:
    """Return the log density of each coordinate given those before it, of the value's shape."""
    difference = (value - joint.loc).unsqueeze(-1)
    is_full = isinstance(joint, torch.distributions.MultivariateNormal)
    factor = joint.scale_tril if is_full else torch.linalg.cholesky(joint.covariance_matrix)
    noise = torch.linalg.solve_triangular(factor, difference, upper=False).squeeze(-1)
    scale = factor.diagonal(dim1=-2, dim2=-1)
    return -0.5 * (noise.square() + math.log(2 * math.pi)) - scale.log()
