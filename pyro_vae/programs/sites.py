"""Sites and plates of a model, as one run saw them, and what they are to the data."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyro_vae.programs.nodes import is_enumerable, left_out, plain_distribution, plain_support


@dataclass(frozen=True)
class Plate:
    """A vectorized plate as one run of the model saw it.

    Attributes:
        name: the plate's name.
        dim: its batch dimension, negative.
        size: entries in this run (the size of the minibatch where it is subsampled).
        full_size: entries in all.
        drawn: whether the model draws the subsample itself (subsample_size=...).
    """

    name: str
    dim: int
    size: int
    full_size: int
    drawn: bool = False


@dataclass(frozen=True)
class Site:
    """A sample statement of the model, as one run saw it.

    Attributes:
        name: the site's name.
        kind: "local latent", "global latent", "latent" (data plate unknown) or "observed".
        fn: its distribution in that run.
        batch_shape: plates and other batch dimensions.
        event_shape: shape of one event.
        plates: the vectorized plates around it.
        value: its value in that run: drawn from the prior, or observed.
        mask: the mask on it (poutine.mask, obs_mask); None where there is none.
        missing: which of its values are missing; None where the model takes no missing data.
        scale: what its log density is multiplied with, by subsampled plates and poutine.scale.
    """

    name: str
    kind: str
    fn: Any
    batch_shape: torch.Size
    event_shape: torch.Size
    plates: tuple[Plate, ...]
    value: Tensor
    mask: Tensor | bool | None
    missing: Tensor | None = None
    scale: Any = 1.0

    @property
    def own_scale(self) -> Tensor:
        """Its scale without that of subsampled plates."""
        scale = torch.as_tensor(self.scale, dtype=torch.float64)
        for plate in self.plates:
            scale = scale * plate.size / plate.full_size
        return scale

    @property
    def support(self) -> Any:
        """The constraint on its values."""
        return self.fn.support

    @property
    def support_text(self) -> str:
        """The support in words, with its bounds."""
        support = plain_support(self)
        if support is None:
            return "not declared"
        bounds = [
            _bound_text(getattr(support, name))
            for name in ("lower_bound", "upper_bound")
            if hasattr(support, name)
        ]
        name = type(support).__name__.removeprefix("_")
        return f"{name}({', '.join(bounds)})" if bounds else name

    @property
    def distribution(self) -> str:
        """The name of its distribution, without Independent and Masked around it."""
        return type(plain_distribution(self.fn)).__name__

    @property
    def left_out(self) -> Tensor:
        """Which of its values masks leave out, missing ones among them; of its whole shape."""
        return left_out(self.fn, self.mask, self.value.device)

    @property
    def validated(self) -> bool:
        """Whether its distribution looks at values before it gives their density.

        What its maker said counts, see :func:`_default_validation_told_apart`.
        """
        return vars(plain_distribution(self.fn)).get("_validate_args", True) is not False

    @property
    def enumerable(self) -> bool:
        """Whether it is discrete, of finite support, and so can be summed out."""
        return is_enumerable(self.fn)


@dataclass(frozen=True)
class Structure:
    """What a model is made of.

    Attributes:
        sites: name to Site, in the order of the model.
        data_plate: the plate of the data; None where the model is treated as one datum.
        max_plate_nesting: number of batch dimensions that plates, and sites in none, take up.
        num_data: data in this batch (1 where the model is treated as one datum).
        sequential: plates that are iterated over (``for i in pyro.plate(...)``) and draw a
            subsample: their sites are others in each run.
    """

    sites: Mapping[str, Site]
    data_plate: Plate | None
    max_plate_nesting: int
    num_data: int
    sequential: tuple[str, ...] = ()
    local_latents: tuple[Site, ...] = field(init=False)
    global_latents: tuple[Site, ...] = field(init=False)
    observed: tuple[Site, ...] = field(init=False)

    def __post_init__(self) -> None:
        for attribute, kind in (
            ("local_latents", "local latent"),
            ("global_latents", "global latent"),
            ("observed", "observed"),
        ):
            found = tuple(site for site in self.sites.values() if site.kind == kind)
            object.__setattr__(self, attribute, found)

    @property
    def data_dim(self) -> int | None:
        """The data plate's batch dimension, negative; None for one datum."""
        return None if self.data_plate is None else self.data_plate.dim

    def drawing(self, names: Collection[str]) -> Structure:
        """Return this structure with plates of which a subsample is drawn: by the guide, say."""
        if not names:
            return self

        def drawing(plate: Plate) -> Plate:
            return replace(plate, drawn=plate.drawn or plate.name in names)

        sites = {
            name: replace(site, plates=tuple(map(drawing, site.plates)))
            for name, site in self.sites.items()
        }
        plate = None if self.data_plate is None else drawing(self.data_plate)
        return replace(self, sites=sites, data_plate=plate)

    def require_no_sequential(self) -> None:
        """Raise ValueError for a model that draws a subsample of a plate that is iterated over."""
        if self.sequential:
            raise ValueError(
                f"the model draws a subsample of the sequential plate {self.sequential[0]!r} "
                "(subsample_size=...), and so has other sites in each run, which have no density "
                "in common; iterate over all of it, or train with pyro_vae.ELBO"
            )

    def require_no_globals(self) -> None:
        """Raise ValueError if a latent site lies outside the data plate."""
        if self.data_plate is not None and self.global_latents:
            names = names_of(self.global_latents)
            raise ValueError(
                f"the latent sites {names} lie outside the data plate "
                f"{self.data_plate.name!r}: they are global, and a bound for each datum needs "
                "them fixed. ELBO and IWAE(estimator='pathwise') train them; for a bound, pass "
                f"their values (given={{{names[0]!r}: value}}), or give an AmortizedGuide a "
                "global_guide that knows its median; or pass data_plate=False to treat the whole "
                "batch as one datum"
            )


def names_of(things: Iterable[Site | Plate]) -> list[str]:
    """Return the names of some sites or plates, for a message."""
    return [thing.name for thing in things]


def _bound_text(bound: Any) -> str:
    values = torch.as_tensor(bound).unique()
    return f"{values.item():g}" if values.numel() == 1 else "varies"
