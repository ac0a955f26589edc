"""Active units: of which latents the posterior mean moves with the data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor
from torch.distributions import Categorical

from pyro_vae.diagnostics.rate_distortion import RateDistortion, measured
from pyro_vae.diagnostics.rates import in_common_mode, pieces_of
from pyro_vae.diagnostics.units import check_over_data, units_of
from pyro_vae.markup import result
from pyro_vae.particles.blocks import Chunk
from pyro_vae.particles.estimators import StreamingELBO
from pyro_vae.particles.evaluator import Evaluator, prepare
from pyro_vae.particles.global_latents import given_text
from pyro_vae.particles.run import Run
from pyro_vae.programs.messages import as_count
from pyro_vae.programs.nodes import is_circular, plain_distribution
from pyro_vae.programs.purposes import Purpose
from pyro_vae.programs.types import DataPlate, GivenValues, Particles, Program

__all__ = ["ActiveUnits", "active_units"]


@dataclass(frozen=True)
class ActiveUnits:
    """The result of :func:`active_units`.

    Attributes:
        dataset: dim unit, each number of each latent site. ``activity``, a share of the prior's
            variance, with its standard error over the data ``activity_se``; ``active``, whether it
            is above the attribute ``threshold``; ``rate`` in nats per datum with its Monte Carlo
            error ``rate_se``, nan where the site does not factorize into units. Coordinate
            ``site_of``; attribute ``given``: which global latents are fixed.
    """

    dataset: xr.Dataset

    @property
    def num_active(self) -> int:
        """How many units are active."""
        return int(self.dataset["active"].sum())

    def summary(self) -> pd.DataFrame:
        """Return the dataset as a table, a row per unit."""
        return self.dataset.to_dataframe()

    def __repr__(self) -> str:
        data = self.dataset
        threshold, value = data.attrs["threshold"], data["activity"].values
        near = np.abs(value - threshold) < 2 * data["activity_se"].values
        lines = [
            f"{self.num_active} of {data.sizes['unit']} units are active: the data explain more "
            f"than {threshold:g} of the prior's variance"
        ]
        if near.any():
            names = ", ".join(data["unit"].values[near])
            lines.append(f"within two standard errors of that: {names}")
        if np.isnan(value).any():
            names = ", ".join(data["unit"].values[np.isnan(value)])
            lines.append(f"nan, for their prior has no variance: {names}")
        given = [f"given {data.attrs['given']}"] if data.attrs["given"] else []
        return "\n".join([*lines, *given])

    def _repr_html_(self) -> str:
        return result(self.summary(), repr(self).splitlines())


def active_units(
    model: Program,
    guide: Program,
    *batch: Any,
    threshold: float = 0.01,
    num_particles: int = 100,
    given: GivenValues | None = None,
    chunk_size: int | None = None,
    data_plate: DataPlate = None,
    particles: Particles = "auto",
    seed: int | None = None,
) -> ActiveUnits:
    r"""Return how much of each latent's prior variance the data explain (Burda et al. 2016).

    .. math:: A_u = \mathrm{Cov}_x(\mathbb{E}_{q(z | x)}[z_u] - \mathbb{E}_p[z_u]) \,/\,
                    \mathrm{Var}_p(z_u)

    With a standard normal prior that is Burda, Grosse & Salakhutdinov's
    :math:`\mathrm{Cov}_x(\mathbb{E}_{q(z | x)}[z_u])`. Other priors are measured in units of their
    own variance, and where the prior of a datum depends on its covariates, what these say is no
    activity. Means and variances are those of the sites' distributions, given the draws of earlier
    sites, where these say them; else of draws. The noise of draws adds nothing to the activity: it
    is subtracted without bias, as in an analysis of variance.

    Args:
        model: a Pyro model.
        guide: a Pyro guide of its latent sites, of any make.
        *batch: their arguments, at least 3 data.
        threshold: a unit above it is active.
        num_particles: K, draws for each datum, at least 2.
        given: values of global latent sites, as in :func:`pyro_vae.log_weights`.
        chunk_size: pairs (particle, datum) scored at once for the rates; bounds memory only. The
            moments take as many at once as bounds do by default, whatever it is: draws of the prior
            come in groups, and other groups would be other draws.
        data_plate: as in :func:`pyro_vae.log_weights`, but not False.
        particles: as in :func:`pyro_vae.log_weights`.
        seed: of the draws; None takes one from the global random state.

    Returns:
        ActiveUnits: a number per unit, with its standard error over the data as a sample of others.

    Raises:
        ValueError: for what :func:`pyro_vae.log_weights` refuses, fewer than 3 data or one datum
            in all, latents that a mask leaves out, and those whose values have no mean: names
            (Categorical) and angles.

    References:
        Burda, Grosse & Salakhutdinov (2016). Importance weighted autoencoders. ICLR.

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
        >>> found = pv.active_units(model, posterior, torch.tensor([-2.0, 0.0, 2.0]))
        >>> found.dataset.activity.values.tolist(), found.num_active
        ([1.0, 0.0], 1)
    """
    if not 0 <= threshold < math.inf:
        raise ValueError(f"threshold={threshold!r}: a share of the prior's variance is needed")
    num_particles = as_count("num_particles", num_particles, 2)
    evaluator, fixed = prepare(model, guide, batch, given, data_plate, seed, particles)
    check_over_data(evaluator, "active_units", 3)
    runner = in_common_mode(evaluator)

    def spread_of(chunks: Iterable[Chunk]) -> tuple[Tensor, Tensor, dict[str, list[str]]]:
        stream, labels = StreamingELBO(), dict[str, list[str]]()
        for number, piece in enumerate(p for chunk in chunks for p in pieces_of(runner, chunk)):
            key = (Purpose.UNITS_PRIOR, piece.rows.start, number)
            prior = runner.prior_run(piece.rows, piece.guide.num_particles, key)
            with runner.evaluating():
                means, variances, labels = _moments(runner, piece.guide, prior)
            stream.update(torch.cat([means, variances], -1))
        return stream.value, stream.std_error.square() * num_particles, labels

    found = evaluator.over_blocks(spread_of, num_particles, chunk_size)
    *columns, (labels, *_) = zip(*found, strict=True)
    values, spreads = (torch.cat(column).cpu() for column in columns)
    dataset = _dataset(values, spreads, labels, num_particles, threshold)
    units = dataset["unit"].values
    rates = pd.DataFrame(columns=["rate", "rate_se"], dtype=float)
    if not evaluator.pair.point_sites:  # whose rate is infinite
        rates = RateDistortion(measured(evaluator, num_particles, chunk_size)).units()
    for name in ("rate", "rate_se"):
        dataset[name] = ("unit", rates[name].reindex(units).to_numpy(dtype=float))
    dataset.attrs["given"] = given_text(fixed)
    return ActiveUnits(dataset)


def _moments(
    evaluator: Evaluator, guide: Run, prior: Run
) -> tuple[Tensor, Tensor, dict[str, list[str]]]:
    """Return what is measured of each unit, [K, n, U] each, and their names by site.

    First the guide's mean less the prior's. Then the prior's variance, and its mean, whose variance
    over particles is to be added. They are given earlier draws, whose noise is in them.
    """
    columns, labels = [], {}
    for name, _ in guide.latents():
        if name in evaluator.structure.sites:
            mean, _, labels[name] = _of_site(evaluator, name, guide)
            prior_mean, variance, _ = _of_site(evaluator, name, prior)
            columns.append((mean - prior_mean, variance, prior_mean))
    differences, variances, prior_means = (torch.cat(c, -1) for c in zip(*columns, strict=True))
    return differences, torch.cat([variances, prior_means], -1), labels


def _of_site(evaluator: Evaluator, name: str, run: Run) -> tuple[Tensor, Tensor, list[str]]:
    """Return mean and variance of a site's numbers given earlier draws, [K, n, d], and names.

    Of a distribution that does not say them the mean is the draw, and the variance zero.
    """
    nodes = run.nodes(name)
    for fn in (node["fn"] for node in nodes):
        if is_circular(fn) or isinstance(plain_distribution(fn), Categorical):
            raise ValueError(
                f"active_units: latent site {name!r} ({type(plain_distribution(fn)).__name__}) has "
                "values without a mean, names or angles; rate_distortion says what it carries"
            )
    try:
        pairs = [(node["fn"].mean, node["fn"].variance) for node in nodes]
    except (NotImplementedError, AttributeError):
        pairs = [(node["value"], torch.zeros_like(node["value"])) for node in nodes]
    found, labels = [], list[str]()
    for each in zip(*pairs, strict=True):
        unfolded = run.mode.unfold(list(each), run.shapes[name].event_ndim, run.num_particles)
        numbers, labels = units_of(evaluator, name, unfolded, run.num_particles, run.num_data)
        found.append(numbers.double())
    return found[0], found[1], labels


def _dataset(
    values: Tensor,
    spreads: Tensor,
    labels: dict[str, list[str]],
    num_particles: int,
    threshold: float,
) -> xr.Dataset:
    """Return activities with their standard errors over the data.

    Args:
        values: means over particles of what :func:`_moments` returns, [N, 3 U].
        spreads: their variances over particles, likewise.
        labels: of the units, by site.
        num_particles: K.
        threshold: above which a unit is active.
    """
    mean, variance, _ = values.chunk(3, -1)
    noise, _, of_prior_mean = spreads.chunk(3, -1)
    num_data = len(mean)
    # Between data less within them: E[s^2 / K] is what the noise of K draws adds to the first.
    squares = (mean - mean.mean(0)).square() * num_data / (num_data - 1)
    moved = squares - noise / num_particles
    prior_variance = variance + of_prior_mean
    whole = prior_variance.mean(0)
    activity = moved.mean(0) / whole
    influence = (moved - activity * prior_variance) / whole
    error = influence.std(0) / math.sqrt(num_data)
    known = whole.isfinite() & (whole > 0)
    activity, error = (torch.where(known, each, math.nan) for each in (activity, error))
    return xr.Dataset(
        {
            "activity": ("unit", activity.numpy()),
            "activity_se": ("unit", error.numpy()),
            "active": ("unit", (activity > threshold).numpy()),
        },
        coords={
            "unit": [label for each in labels.values() for label in each],
            "site_of": ("unit", [name for name, each in labels.items() for _ in each]),
        },
        attrs={"threshold": threshold, "num_particles": num_particles},
    )
