"""Rate and distortion: the two parts of a negative ELBO, and the latents that carry no rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.diagnostics.rates import Piece, SiteRate, in_common_mode, pieces_of, rates_of
from pyro_vae.markup import result
from pyro_vae.particles.blocks import Chunk
from pyro_vae.particles.estimators import StreamingELBO, calibrated, mean_std_error
from pyro_vae.particles.evaluator import Evaluator, prepare
from pyro_vae.particles.global_latents import given_text
from pyro_vae.programs.messages import as_count
from pyro_vae.programs.sites import Structure
from pyro_vae.programs.types import DataPlate, GivenValues, Particles, Program

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLLAPSED", "RateDistortion", "rate_distortion"]

# Nats per datum below which a latent carries nothing. Of a Gaussian latent it is the information
# in a posterior mean whose variance over the data is 2 % of the prior's.
COLLAPSED = 0.01
_QUANTITIES = ("rate", "distortion", "code_length")
_PARTS = ("", "_se", "_skewness")
_SHOWN = 10  # names of units in a line


@dataclass(frozen=True)
class RateDistortion:
    """The result of :func:`rate_distortion`, in nats.

    Attributes:
        dataset: dims (datum, site, unit). Of each datum ``rate``, ``distortion`` and their sum
            ``code_length``; ``num_dimensions``, the observed numbers, nan where a pyro.factor
            hides them. Of each datum and latent site ``site_rate``; of each datum and unit
            ``unit_rate``. A unit is one number of a site where guide and prior factorize over
            them, else the whole site; ``unit_there`` is the share of draws in which no mask leaves
            it out. Each estimate has its Monte Carlo standard error ``<name>_se`` (value ± 1.96 of
            them covers with probability 0.95) and ``<name>_skewness``, from which errors of means
            over data are made. Coordinates: ``site_of`` of each unit, and ``form`` of each site's
            rate, "analytic" or "sampled". Attribute ``given``: which global latents are fixed.
    """

    dataset: xr.Dataset

    @property
    def bits(self) -> xr.Dataset:
        """Rate, distortion and code length of each datum in bits, with standard errors."""
        return self._lengths() / math.log(2)

    @property
    def bits_per_dimension(self) -> xr.Dataset:
        """The same, divided by the number of observed values of each datum."""
        return self.bits / self.dataset["num_dimensions"]

    def summary(self) -> pd.DataFrame:
        """Return a row for rate, distortion and code length, and one for the rate of each site.

        Means over the data with Monte Carlo standard errors: in nats and bits per datum, and in
        bits per dimension, those of all data over all their observed numbers.
        """
        data = self.dataset
        rows = {name: self._mean(data, name) for name in _QUANTITIES}
        for site in data["site"].values if data.sizes["site"] > 1 else ():
            rows[f"rate of {site}"] = self._mean(data.sel(site=site), "site_rate")
        per_dimension = math.log(2) * float(data["num_dimensions"].mean())
        table = {}
        for name, unit in (("nats", 1.0), ("bits", math.log(2)), ("bits_per_dim", per_dimension)):
            for column, part in ((name, 0), (f"{name}_se", 1)):
                table[column] = [row[part] / unit if unit else math.nan for row in rows.values()]
        return pd.DataFrame(table, index=pd.Index(list(rows), name="quantity"))

    def units(self) -> pd.DataFrame:
        """Return a row per unit: its site, its mean ``rate`` in nats per datum, and its ``state``.

        The mean is over the data in which the unit is there. The state is "collapsed" where the
        rate is below 0.01 nats, two standard errors included; "active" where it is above, likewise;
        else "unclear": take more particles.
        """
        data = self.dataset
        rows = []
        for unit in data["unit"].values:
            one = data.sel(unit=unit)
            there = float(one["unit_there"].mean())
            mean, error = (n / there if there else math.nan for n in self._mean(one, "unit_rate"))
            near = abs(mean - COLLAPSED) < 2 * error
            state = "unclear" if near else "collapsed" if mean < COLLAPSED else "active"
            state = state if there else "never there"
            rows.append({"site": str(one["site_of"].item()), "rate": mean, "rate_se": error})
            rows[-1]["state"] = state
        columns = ["site", "rate", "rate_se", "state"]
        return pd.DataFrame(rows, index=pd.Index(data["unit"].values, name="unit"), columns=columns)

    @property
    def collapsed(self) -> list[str]:
        """The units that carry less than 0.01 nats per datum: the posterior is the prior there."""
        units = self.units()
        return [str(name) for name in units.index[units["state"] == "collapsed"]]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw it in the plane of rate and distortion; needs the extra ``plots``.

        :func:`pyro_vae.plots.plot_rate_distortion` draws several models in one.
        """
        from pyro_vae.plots.diagnostics import plot_rate_distortion

        return plot_rate_distortion(self.summary(), ax)

    def _lengths(self) -> xr.Dataset:
        return self.dataset[[f"{name}{part}" for name in _QUANTITIES for part in ("", "_se")]]

    def _mean(self, data: xr.Dataset, name: str) -> tuple[float, float]:
        """Return the mean over the data of a variable, and its Monte Carlo standard error."""
        value, error, skewness = (data[f"{name}{part}"].values for part in _PARTS)
        of_mean = mean_std_error(
            torch.tensor(error), torch.tensor(skewness), data.attrs["num_particles"]
        )
        return float(value.mean()), float(of_mean)

    def __repr__(self) -> str:
        table = self.summary()
        shown = pd.DataFrame(
            {
                column.replace("_", " "): [
                    f"{value:.4f} ± {error:.4f}"
                    for value, error in zip(table[column], table[f"{column}_se"], strict=True)
                ]
                for column in ("nats", "bits", "bits_per_dim")
            },
            index=pd.Index([name.replace("_", " ") for name in table.index], name=""),
        )
        return "\n".join([self._head(), shown.to_string(), *self._collapse_text()])

    def _repr_html_(self) -> str:
        return result(self.summary(), [self._head(), *self._collapse_text()])

    def _head(self) -> str:
        data = self.dataset
        given = f"; given {data.attrs['given']}" if data.attrs["given"] else ""
        return f"per datum, mean of {data.sizes['datum']} ± Monte Carlo standard error{given}"

    def _collapse_text(self) -> list[str]:
        states = self.units()["state"]
        lines = [
            f"{(states == 'active').sum()} of {len(states)} units of the latents are active: "
            f"their rate is at least {COLLAPSED} nats"
        ]
        for state, what in (
            ("collapsed", "collapsed, the posterior is the prior"),
            ("unclear", "unclear, more particles would tell"),
        ):
            if names := [str(name) for name in states.index[states == state]]:
                more = ", ..." if len(names) > _SHOWN else ""
                lines.append(f"{what} ({len(names)}): {', '.join(names[:_SHOWN])}{more}")
        return lines


def rate_distortion(
    model: Program,
    guide: Program,
    *batch: Any,
    num_particles: int = 100,
    given: GivenValues | None = None,
    chunk_size: int | None = None,
    data_plate: DataPlate = None,
    particles: Particles = "auto",
    seed: int | None = None,
) -> RateDistortion:
    r"""Return what each datum costs to be told: the rate for z, and the distortion for x given z.

    .. math::
        R = \mathrm{KL}(q(z | x), p(z)), \quad D = -\mathbb{E}_q[\log p(x | z)], \quad
        R + D = -\mathrm{ELBO} \ge -\log p(x)

    (Alemi et al. 2018). The sum is the code length of bits-back coding (Hinton & van Camp 1993):
    the same estimate as that of :func:`pyro_vae.elbo` with this seed. The rate is in closed form,
    site by site, wherever a :class:`pyro_vae.ELBO` has one, and the distortion is what is left of
    the code length: near the exact posterior both have next to no Monte Carlo error. It says, too,
    which latents have collapsed onto the prior.

    Bits are nats / log 2, bits per dimension bits over the observed numbers of a datum, without
    those that are missing or masked. Of continuous x a density is a code length only relative to
    the unit that x is measured in: x in units of 1/256 of it costs 8 bits per dimension more.

    Args:
        model: a Pyro model.
        guide: a Pyro guide of its latent sites, of any make.
        *batch: their arguments.
        num_particles: K, draws for each datum, at least 2.
        given: values of global latent sites, as in :func:`pyro_vae.log_weights`: rates are then
            those of the other latents, given these.
        chunk_size: pairs (particle, datum) scored at once; bounds memory only.
        data_plate: as in :func:`pyro_vae.log_weights`; False for one datum, whose rate is that
            of all latents.
        particles: as in :func:`pyro_vae.log_weights`.
        seed: of the draws; None takes one from the global random state.

    Returns:
        A RateDistortion: per datum, per latent site and per unit of the latents.

    Raises:
        ValueError: for what :func:`pyro_vae.log_weights` refuses, and for a guide that proposes a
            point, whose rate is infinite.

    References:
        Alemi, Poole, Fischer, Dillon, Saurous & Murphy (2018). Fixing a broken ELBO. ICML.
        Hinton & van Camp (1993). Keeping the neural networks simple by minimizing the description
        length of the weights. COLT.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_vae as pv
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)
        >>> def posterior(x):
        ...     location = torch.stack([x / 2, torch.zeros_like(x)], -1)
        ...     scale = torch.tensor([0.5**0.5, 1.0])
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(location, scale).to_event(1))
        >>> found = pv.rate_distortion(model, posterior, torch.tensor([0.0, 2.0]))
        >>> found.dataset.rate.values.round(4)  # log(2) / 2 - 1/4 + x^2 / 8
        array([0.0966, 0.5966])
        >>> found.collapsed
        ['z[1]']
    """
    num_particles = as_count("num_particles", num_particles, 2)
    evaluator, fixed = prepare(model, guide, batch, given, data_plate, seed, particles)
    if points := evaluator.pair.point_sites:
        raise ValueError(
            f"the guide proposes one point for {points}: its rate is infinite, for a point takes "
            "infinitely many bits to say. Take a guide with a density"
        )
    dataset = measured(evaluator, num_particles, chunk_size)
    dataset.attrs["given"] = given_text(fixed)
    infinite = torch.as_tensor(dataset["code_length"].values) == math.inf
    evaluator.warn_of_outside("minus the code length", infinite)
    return RateDistortion(dataset)


def measured(evaluator: Evaluator, num_particles: int, chunk_size: int | None) -> xr.Dataset:
    """Return the dataset of a :class:`RateDistortion`, without what globals are given."""
    runner = in_common_mode(evaluator)

    def rated(chunks: Iterable[Chunk]) -> tuple[tuple[Tensor, ...], Any]:
        stream = StreamingELBO()
        for piece in (p for chunk in chunks for p in pieces_of(runner, chunk, chunk_size)):
            rates = rates_of(runner, piece)
            columns = _columns(piece, rates)
            stream.update(torch.cat(list(columns.values()), -1))
        error = calibrated(stream.std_error, stream.skewness, num_particles)
        widths = {name: each.shape[-1] for name, each in columns.items()}
        known = {
            n: ("analytic" if r.closed else "sampled", list(r.labels)) for n, r in rates.items()
        }
        return (stream.value, error, stream.skewness), (widths, known)

    found_blocks = evaluator.over_blocks(rated, num_particles, chunk_size)
    blocks, layouts = zip(*found_blocks, strict=True)
    columns, rates = layouts[-1]
    arrays: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    widths = list(columns.values())
    for part, found in zip(_PARTS, zip(*blocks, strict=True), strict=True):
        of_columns = torch.cat(found).cpu().split(widths, -1)
        for name, numbers in zip(columns, of_columns, strict=True):
            if name in _QUANTITIES:
                arrays[f"{name}{part}"] = (("datum",), numbers.squeeze(-1).numpy())
            elif name != "unit_there" or not part:
                arrays[f"{name}{part}"] = (("datum", name.partition("_")[0]), numbers.numpy())
    forms = [form for form, _ in rates.values()]
    return xr.Dataset(
        {**arrays, "num_dimensions": ("datum", num_dimensions(evaluator.structure).numpy())},
        coords={
            "datum": np.arange(evaluator.num_data),
            "site": list(rates),
            "form": ("site", forms),
            "unit": [label for _, labels in rates.values() for label in labels],
            "site_of": ("unit", [name for name, (_, labels) in rates.items() for _ in labels]),
        },
        attrs={"num_particles": num_particles, "units": "nats"},
    )


def _columns(piece: Piece, rates: Mapping[str, SiteRate]) -> dict[str, Tensor]:
    """Return numbers of each particle and datum by the name of their variable, [K, n, *]."""
    code_length = -piece.log_weights.double()
    rate = sum((each.total.double() for each in rates.values()), torch.zeros_like(code_length))
    # What is left of the code length: closed forms of rates are control variates of it.
    rest = code_length - rate
    distortion = torch.where(rest.isfinite(), rest, -piece.log_likelihood.double())
    found = {"rate": rate, "distortion": distortion, "code_length": code_length}
    none, every = rate.new_empty(*rate.shape, 0), rates.values()
    return {
        **{name: each.unsqueeze(-1) for name, each in found.items()},
        "site_rate": torch.cat([none, *(each.total.unsqueeze(-1) for each in every)], -1),
        "unit_rate": torch.cat([none, *(each.units for each in every)], -1),
        "unit_there": torch.cat([none, *(each.there for each in every)], -1),
    }


def num_dimensions(structure: Structure) -> Tensor:
    """Return how many observed numbers a datum has that no mask leaves out, [N], float64.

    nan where a pyro.factor stands for a likelihood: it does not say of how many.
    """
    total = torch.zeros(structure.num_data, dtype=torch.float64)
    for site in structure.observed:
        if site.distribution == "Unit":
            return torch.full_like(total, math.nan)
        out = site.left_out
        seen = ~out.expand(torch.broadcast_shapes(out.shape, site.value.shape))
        if structure.data_dim is None:
            total += seen.sum().cpu()
        else:
            axis = seen.ndim - len(site.event_shape) + structure.data_dim
            total += seen.movedim(axis, 0).reshape(len(total), -1).sum(1).cpu()
    return total
