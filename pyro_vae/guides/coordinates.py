"""Where a latent site's coordinates lie among those of a datum, and moments to start from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributions import Independent, Normal, Transform, biject_to, constraints

from pyro_vae.programs.nodes import is_circular
from pyro_vae.programs.preimages import Preimage, preimage_key
from pyro_vae.programs.sites import Plate, Site, Structure
from pyro_vae.programs.state import Look, preserved_rng
from pyro_vae.programs.structure import ModelLooks, run_model
from pyro_vae.programs.supports import flat_transforms, support_of
from pyro_vae.programs.types import Node

_PRIOR_DRAWS = 1000
_PARENT_RUNS = 50  # of the model, where the draws of one do not vary
_BEYOND = 1e4  # a coordinate beyond the edge of any support that is mapped to
_WIDEST = 3.0  # standard deviation of a start on the reals, where they are mapped to a support


@dataclass(frozen=True)
class Coordinates:
    """Where one latent site's unconstrained coordinates lie among the D of a datum.

    A site's tensor has batch dimensions, then those of the event. Its coordinates are rows
    ``[..., N, d]``. Between the two stand *spread* rows: batch dimensions aligned with
    the plates, of size 1 where they lie inside the datum, then d.

    Attributes:
        name: the site.
        transform: from the reals to the site's support.
        support: that support in words.
        inner: the plates inside the data plate that the site is in.
        batch: the sizes of its batch dimensions, 1 at the data's.
        event: the event dimensions of the unconstrained value.
        data_dim: the data's batch dimension, negative; None where all is one datum.
        columns: its slice of the D coordinates of a datum.
    """

    name: str
    transform: Transform = field(compare=False)  # torch's have no equality; the support says it
    support: str
    inner: tuple[Plate, ...]
    batch: tuple[int, ...]
    event: tuple[int, ...]
    data_dim: int | None
    columns: slice

    @classmethod
    def of(cls, site: Site, data_plate: Plate | None, start: int) -> Coordinates:
        """Return the coordinates of a latent site that begin at column ``start``."""
        inner = _inner_plates(site, data_plate)
        if support_of(site.fn) is None:
            raise ValueError(
                f"latent site {site.name!r}: {site.distribution} declares no support. Give the "
                "class one (support = constraints.real_vector), or write the guide by hand"
            )
        try:
            transform = biject_to(_support(site))
        except NotImplementedError as error:
            raise ValueError(
                f"latent site {site.name!r} ({site.distribution}) has the support "
                f"{site.fn.support}, which no bijection maps to the reals; a continuous guide "
                "cannot propose it. Sum it out in the model, or write the guide by hand"
            ) from error
        event = tuple(transform.inverse_shape(site.event_shape))
        data_dim = None if data_plate is None else data_plate.dim
        sizes = enumerate(site.batch_shape, -len(site.batch_shape))
        batch = tuple(1 if axis == data_dim else size for axis, size in sizes)
        columns = slice(start, start + math.prod(batch) * math.prod(event))
        return cls(site.name, transform, site.support_text, inner, batch, event, data_dim, columns)

    @property
    def preimage_key(self) -> str | None:
        """The name that preimages of the site's draws go by; None where none are kept."""
        return preimage_key(self.name, flat_transforms([self.transform]))

    def unconstrained(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return what draws of sites are made of, by their preimages where a guide keeps them.

        NaN or infinite where a draw lies outside of the support.
        """
        kept = values.get(self.preimage_key or "")
        return self.transform.inv(values[self.name]) if kept is None else kept

    def value(self, z: Tensor) -> Tensor:
        """Return the value of unconstrained coordinates, inside the support."""
        return Preimage(z, tuple(flat_transforms([self.transform]))).value

    def edges(self, like: Tensor) -> Tensor:
        """Return the smallest and largest coordinates whose values a dtype tells apart, [2, d].

        Infinite where the support is the reals. A logit of 16 and one of 20 are the same
        probability in single precision.

        Args:
            like: of the dtype and on the device.
        """
        size = math.prod(self.event)
        if self.is_identity:
            one = like.new_full((math.prod(self.batch) * size,), math.inf)
            return torch.stack([-one, one])
        far = torch.eye(size, dtype=like.dtype, device=like.device) * _BEYOND
        z = torch.stack([-far, far]).reshape(2 * size, *self.event)
        back = self.transform.inv(self.value(z)).reshape(2, size, size).diagonal(dim1=1, dim2=2)
        # What comes back is no edge; what comes back as no number is not told.
        inside = back.isfinite() & (back.abs() < _BEYOND / 2)
        infinite = back.new_tensor([[-math.inf], [math.inf]])
        return torch.where(inside, back, infinite).repeat(1, math.prod(self.batch))

    @property
    def is_plain(self) -> bool:
        """Whether a datum has one event of the site, not several in batch dimensions."""
        return math.prod(self.batch) == 1

    def spread(self, rows: Tensor) -> Tensor:
        """Align rows [..., N, d] with the plates: ``[..., 1, N, 1, d]``."""
        *lead, num_data, width = rows.shape
        batch = [1] * len(self.batch)
        if self.data_dim is not None:
            batch[self.data_dim] = num_data
        return rows.reshape(*lead, *batch, width)

    def arrange(self, spread: Tensor) -> Tensor:
        """Bring spread rows to the site's shape, ``[..., *batch, *event]``."""
        dims = spread.ndim - 1
        inside = [dims + axis for axis in self.inside]
        lead = [size for axis, size in enumerate(spread.shape[:-1]) if axis not in inside]
        value = spread.reshape(*lead, *(self.batch[axis] for axis in self.inside), *self.event)
        return value.movedim(tuple(range(len(lead), dims)), tuple(inside))

    def flatten(self, value: Tensor) -> Tensor:
        """Undo :meth:`arrange`: spread rows of an unconstrained value of the site."""
        dims = value.ndim - len(self.event)
        inside = [dims + axis for axis in self.inside]
        lead = dims - len(inside)
        moved = value.movedim(tuple(inside), tuple(range(lead, dims)))
        rows = moved.reshape(*moved.shape[:lead], -1)
        for axis in inside:
            rows = rows.unsqueeze(axis)
        return rows

    def rows(self, value: Tensor) -> Tensor:
        """Return the rows [K, N, d] of an unconstrained value ``[K, *batch, *event]``."""
        spread = self.flatten(value)
        return spread.reshape(spread.shape[0], -1, spread.shape[-1])

    @property
    def inside(self) -> list[int]:
        """Its batch dimensions that lie inside a datum, negative."""
        return [axis for axis in range(-len(self.batch), 0) if axis != self.data_dim]

    @property
    def is_identity(self) -> bool:
        """Whether the site lives on the reals as it is."""
        return not flat_transforms([self.transform])


def coordinates_of(structure: Structure, proposer: str) -> tuple[Coordinates, ...]:
    """Return the coordinates of all sites that a guide of a datum's latents proposes, in order.

    These are the continuous latents of the data plate; of the model where all is one datum.
    Discrete ones of finite support are left to be summed out. ValueError where no latent is
    continuous, with the name of the guide's class, and for a site that has no coordinates.
    """
    plate = structure.data_plate
    latents = structure.global_latents if plate is None else structure.local_latents
    found = side_by_side(latents, plate)
    if not found:
        discrete = ", ".join(f"latent site {site.name!r} ({site.distribution})" for site in latents)
        raise ValueError(
            f"no latent site is continuous, only {discrete}: {proposer} proposes continuous sites, "
            "leaves discrete ones to be summed out. Use pyro_vae.ExactGuide(model, example=batch)"
        )
    return found


def side_by_side(latents: Iterable[Site], plate: Plate | None) -> tuple[Coordinates, ...]:
    """Return the coordinates of the continuous ones of some latents, columns side by side."""
    found: list[Coordinates] = []
    for site in (site for site in latents if not site.enumerable):
        found.append(Coordinates.of(site, plate, found[-1].columns.stop if found else 0))
    return tuple(found)


def _inner_plates(site: Site, data_plate: Plate | None) -> tuple[Plate, ...]:
    inner = tuple(plate for plate in site.plates if plate != data_plate)
    for plate in inner:
        if plate.size != plate.full_size:
            raise ValueError(
                f"latent site {site.name!r} is in plate {plate.name!r}, of which a run sees "
                f"{plate.size} of {plate.full_size} entries: a guide with parameters for each "
                "cannot know which. Subsample the data plate alone, or write the guide by hand"
            )
    return inner


def _support(site: Site) -> constraints.Constraint:
    """Return the support of a site; ValueError where it differs within the batch."""
    support, events = site.fn.support, 0
    if is_circular(site.fn):
        if site.distribution != "VonMises":
            raise ValueError(
                f"latent site {site.name!r} ({site.distribution}) lives on a torus, which no "
                "bijection maps to the reals; write the guide by hand"
            )
        support, events = constraints.interval(-math.pi, math.pi), len(site.event_shape)
    while hasattr(support, "base_constraint"):  # independent, or of a mixture
        events += getattr(support, "reinterpreted_batch_ndims", 0)
        support = support.base_constraint
    ends = (name for name in ("lower_bound", "upper_bound") if hasattr(support, name))
    bounds = {name: _common_bound(site, getattr(support, name), events) for name in ends}
    if bounds and not support.is_discrete:
        support = type(support)(**bounds)
    return constraints.independent(support, events) if events else support


def _common_bound(site: Site, bound: Tensor | float, events: int) -> Tensor | float:
    """Return the bound of all data; a plain number where it is one, which is known to be alike."""
    if not isinstance(bound, Tensor):
        return bound
    if bound.ndim > events:
        # Uniform(0, 1) in a plate has a bound for each datum, all alike.
        rows = bound.reshape(-1, *bound.shape[bound.ndim - events :])
        if not bool((rows == rows[0]).all()):
            raise ValueError(
                f"latent site {site.name!r} ({site.distribution}): its support differs from datum "
                "to datum, or with another latent. Give it a fixed support, and scale the value: "
                "low + (high - low) * u with u in the unit interval"
            )
        bound = rows[0]
    return bound.item() if bound.numel() == 1 else bound


def prior_moments(
    looks: ModelLooks, structure: Structure, coordinates: Sequence[Coordinates]
) -> tuple[Tensor, Tensor]:
    """Return mean and width of the prior in unconstrained coordinates, over draws and data, [D].

    Raises:
        ValueError: for a site whose prior is a point.
    """
    found = []
    with torch.no_grad(), preserved_rng(next(iter(structure.sites.values())).value.device):
        torch.manual_seed(0)  # the start of a guide is part of its definition
        for mine in coordinates:
            draws = structure.sites[mine.name].fn.sample((_PRIOR_DRAWS,))
            mean, std = _of_site(mine, draws)
            if not bool((std > 0).all()):  # given these parents, which have a prior too
                draws = _of_other_parents(looks, mine.name, draws)
                mean, std = _of_site(mine, draws)
                if bool((draws == draws[:1]).all()):
                    raise ValueError(
                        f"latent site {mine.name!r}: its prior does not vary (a point), so there "
                        "is nothing to infer. Use pyro.deterministic, or condition on it"
                    )
                # It varies between a few values, or between the ends of its support.
                mean = torch.where(mean.isfinite(), mean, 0.0)
                std = torch.where(std > 0, std, _WIDEST)
            # Wide on the reals may be beyond all numbers once mapped to the support.
            found.append((mean, std if mine.is_identity else std.clamp(max=_WIDEST)))
    means, stds = zip(*found, strict=True)
    return torch.cat(means), torch.cat(stds)


def _of_site(mine: Coordinates, draws: Tensor) -> tuple[Tensor, Tensor]:
    return middle_moments(mine.rows(mine.transform.inv(draws)).flatten(0, 1))


def _of_other_parents(looks: ModelLooks, name: str, draws: Tensor) -> Tensor:
    """Return draws of a latent from its prior, its parents drawn anew for some of them."""
    found = []
    for seed in range(1, _PARENT_RUNS + 1):
        with Look() as look:
            sites = run_model(looks.model, looks.batch, seed=seed).sites
        if look.error is None:  # a draw that the model cannot take says nothing
            found.append(sites[name].fn.sample((_PRIOR_DRAWS // _PARENT_RUNS,)))
    return torch.cat(found) if found else draws


def middle_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of draws [K, ...], over the first dimension.

    Of heavy tails, which have no moments, median and half the distance of the 16 % and 84 %
    quantiles of those that are finite.
    """
    if rows.dtype in (torch.float16, torch.bfloat16):  # which PyTorch has no quantiles of
        mean, std = middle_moments(rows.float())
        return mean.to(rows.dtype), std.to(rows.dtype)
    some = rows[:: -(-len(rows) // 10_000)]
    # Sorted, NaN last: torch.nanquantile takes 2**24 numbers at most.
    some = torch.where(some.isfinite(), some, math.nan).sort(dim=0).values
    last = (some.isfinite().sum(0, keepdim=True) - 1).clamp_min(0)
    places = ((level * last).round().long() for level in (0.16, 0.5, 0.84))
    low, median, high = (some.gather(0, place)[0] for place in places)
    mean, std, middle = rows.mean(0), rows.std(0), (high - low) / 2
    light = (std < 2 * middle) | (std == 0)
    return torch.where(light, mean, median), torch.where(light, std, middle)


def normal_moments(nodes: Sequence[Node]) -> tuple[Tensor, Tensor] | None:
    """Return mean and standard deviation of a site of independent Normals, given several runs.

    None where it is no Normal, or is not alike in all runs: it depends on another draw.
    """
    found = []
    for node in nodes:
        fn = node["fn"]
        while isinstance(fn, Independent):
            fn = fn.base_dist
        if not isinstance(fn, Normal):
            return None
        found.append((fn.loc, fn.scale))
    loc, scale = found[0]
    alike = all(torch.equal(loc, a) and torch.equal(scale, b) for a, b in found)
    return (loc, scale) if alike else None
