"""Do several models observe the same data? Densities of other data, or units, do not compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyro.distributions as dist

from pyro_vae.programs.nodes import plain_distribution, plain_support
from pyro_vae.programs.sites import Site, Structure, array_of

_ROUNDING = 1e-5  # of float32 data and of the same in float64


@dataclass(frozen=True, slots=True)
class Observed:
    """What a model observes at one site.

    Attributes:
        name: the site.
        distribution: the name of its likelihood.
        values: ``[N, *inner plates, *event]``; 0 where a mask leaves them out.
        left_out: which of them a mask leaves out, likewise.
        discrete: whether the likelihood is a probability and no density; None where it does not
            declare its support.
    """

    name: str
    distribution: str
    values: np.ndarray
    left_out: np.ndarray
    discrete: bool | None

    @classmethod
    def of(cls, site: Site, structure: Structure) -> Observed:
        """Return what a model observes at a site."""
        out = array_of(site.left_out, site, structure)
        values = np.where(out, 0, array_of(site.value, site, structure))
        support = plain_support(site.fn)
        discrete = None if support is None else bool(support.is_discrete)
        return cls(site.name, site.distribution, values, out, discrete)

    def is_like(self, other: Observed) -> bool:
        """Return whether another model's site has the same values, and leaves out the same."""
        return (
            self.values.shape == other.values.shape
            and bool((self.left_out == other.left_out).all())
            and np.allclose(self.values, other.values, rtol=_ROUNDING, atol=_ROUNDING**2)
        )


def check_same_data(structures: Mapping[str, Structure]) -> None:
    """Raise ValueError for models whose densities of the data are not of one measure.

    They must observe the same values for as many data, under whatever name: other units change a
    density by a factor, and a probability does not compare with a density.

    Args:
        structures: of each model, by its name, on the same batch.
    """
    (first, structure), *others = structures.items()
    wanted = _observed(first, structure)
    for name, other in others:
        if other.num_data != structure.num_data:
            raise ValueError(
                f"models[{first!r}] sees {structure.num_data} data in this batch and "
                f"models[{name!r}] {other.num_data}: log p(x) of each datum is compared, so their "
                "data plates must be of the same data; name the plate with data_plate="
            )
        found = _observed(name, other)
        for mine, theirs in _pairs((first, wanted), (name, found)):
            _check_pair((first, mine), (name, theirs))


def _observed(model: str, structure: Structure) -> dict[str, Observed]:
    for site in structure.observed:
        if isinstance(plain_distribution(site.fn), dist.Unit):
            raise ValueError(
                f"models[{model!r}]: the pyro.factor {site.name!r} does not say of what it is a "
                "density, and so cannot be compared; observe the values in a sample statement, "
                "with a distribution of your own that has this log_prob"
            )
    return {site.name: Observed.of(site, structure) for site in structure.observed}


def _pairs(
    one: tuple[str, dict[str, Observed]], other: tuple[str, dict[str, Observed]]
) -> list[tuple[Observed, Observed]]:
    """Return the sites of two models in pairs: by name, or else by their values."""
    (first, mine), (name, theirs) = one, other
    if mine.keys() == theirs.keys():
        return [(site, theirs[key]) for key, site in mine.items()]
    left, pairs = list(theirs.values()), []
    for site in mine.values():
        like = next((each for each in left if site.is_like(each)), None)
        if like is None or len(mine) != len(theirs):
            raise ValueError(
                f"models[{first!r}] observes {_shapes(mine)} and models[{name!r}] "
                f"{_shapes(theirs)}: not the same values of each datum, so their log p(x) are of "
                "different data. Let both observe all of the same values"
            )
        left.remove(like)
        pairs.append((site, like))
    return pairs


def _shapes(sites: dict[str, Observed]) -> str:
    return ", ".join(f"{name!r} {list(site.values.shape)}" for name, site in sites.items())


def _check_pair(one: tuple[str, Observed], other: tuple[str, Observed]) -> None:
    (first, mine), (name, theirs) = one, other
    who = f"observed site {mine.name!r} of models[{first!r}] and {theirs.name!r} of "
    who += f"models[{name!r}]"
    if mine.values.shape != theirs.values.shape:
        shapes = [list(site.values.shape) for site in (mine, theirs)]
        raise ValueError(f"{who} have shapes {shapes[0]} and {shapes[1]}: not the same data")
    if bool((mine.left_out != theirs.left_out).any()):
        raise ValueError(
            f"{who} leave out other values (masks, or missing data): log p(x) is of what is left, "
            "and so of different data. Mask the same values in both"
        )
    if not mine.is_like(theirs):
        raise ValueError(
            f"{who} hold other values: densities of other values, or of the same in other units, "
            "do not compare (of x / 16 it is 16 times that of x). Let both observe the same "
            "values; TransformedDistribution puts a density into the units of the data"
        )
    if mine.discrete != theirs.discrete:
        kinds = [_KINDS[site.discrete] for site in (mine, theirs)]
        raise ValueError(
            f"{who}: the first is {mine.distribution}, {kinds[0]}, the second "
            f"{theirs.distribution}, {kinds[1]}; the two do not compare. Take a likelihood of the "
            "same kind in both"
        )


_KINDS = {
    True: "a probability of discrete values",
    False: "a density of continuous values",
    None: "which does not say (it declares no support)",
}
