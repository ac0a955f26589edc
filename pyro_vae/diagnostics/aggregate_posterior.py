"""Is the aggregate posterior the prior? A test that is exact, of all latents and of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.diagnostics.mmd import Swapped, mmd_of_swaps, normal_scores, p_value_of
from pyro_vae.diagnostics.units import check_over_data, units_of
from pyro_vae.markup import result
from pyro_vae.particles.evaluator import Evaluator, prepare
from pyro_vae.particles.global_latents import given_text
from pyro_vae.programs.messages import as_count
from pyro_vae.programs.purposes import Purpose
from pyro_vae.programs.types import DataPlate, GivenValues, Particles, Program

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["AggregatePosterior", "aggregate_posterior"]

_FEWEST = 8  # pairs: with fewer no set of swaps is rare enough to reject


@dataclass(frozen=True)
class AggregatePosterior:
    """The result of :func:`aggregate_posterior`.

    Attributes:
        dataset: dim unit, each number of each latent site. Of all jointly ``joint_statistic``, the
            squared maximum mean discrepancy in units of its standard deviation under the null, and
            ``joint_p_value``; of each unit ``statistic``, ``p_value``, and ``adjusted_p_value``
            against the largest statistic of all units: below 0.05 for any unit in at most 5 % of
            the cases where none differs. ``shift``, the mean of the guide's draws less that of the
            prior's, in standard deviations of the latter, and ``spread``, the ratio of both
            standard deviations, with standard errors ``shift_se`` and ``spread_se``. Attributes:
            ``num_pairs``, ``num_permutations``, ``given``.
    """

    dataset: xr.Dataset

    @property
    def p_value(self) -> float:
        """Of all latents jointly."""
        return float(self.dataset["joint_p_value"])

    def summary(self) -> pd.DataFrame:
        """Return a row per unit, the smallest p-values first."""
        names = ["statistic", "p_value", "adjusted_p_value"]
        names += ["shift", "shift_se", "spread", "spread_se"]
        table = self.dataset[names].to_dataframe()[names]
        return table.sort_values("p_value", kind="stable")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw shift and spread of each unit; needs the extra ``plots``."""
        from pyro_vae.plots.diagnostics import plot_aggregate_posterior

        return plot_aggregate_posterior(self.dataset, ax)

    def __repr__(self) -> str:
        data = self.dataset
        given = f"; given {data.attrs['given']}" if data.attrs["given"] else ""
        lines = [
            f"aggregate posterior against prior, {data.attrs['num_pairs']} pairs of draws{given}: "
            f"p = {self.p_value:.4g}, statistic {float(data['joint_statistic']):.2f}"
        ]
        table = self.summary()
        off = table[table["adjusted_p_value"] < 0.05]
        if len(off):
            lines.append(f"{len(off)} of {len(table)} units differ (adjusted p < 0.05):")
            lines.append(off.head(10).to_string(float_format="%.3f"))
        else:
            lines.append(f"none of {len(table)} units differs by itself (adjusted p < 0.05)")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return result(self.summary(), repr(self).splitlines()[:1])


def aggregate_posterior(
    model: Program,
    guide: Program,
    *batch: Any,
    num_draws: int = 1000,
    num_permutations: int = 999,
    given: GivenValues | None = None,
    data_plate: DataPlate = None,
    particles: Particles = "auto",
    seed: int | None = None,
) -> AggregatePosterior:
    r"""Test whether the aggregate posterior :math:`\mathbb{E}_x[q(z | x)]` is the prior.

    The posterior of a right model, averaged over its data, is the prior: where it is not, the
    model's draws do not look like the data, for they come from latents that no datum has (Hoffman &
    Johnson 2016; Rosca et al. 2018), or the guide is wrong. One draw of the guide for each datum is
    compared with one of the prior by the maximum mean discrepancy (Gretton et al. 2012), in normal
    scores of each coordinate, so that a monotone map of a latent changes nothing. The null is that
    the two draws of a datum, which is itself a draw, may be swapped; its p-value by random swaps is
    exact for any number of data, and where priors depend on covariates of the datum too:

    .. math:: p = \frac{1 + \#\{b: T_b \ge T\}}{1 + B}

    On the data that a model was fitted to, which it meets better than others, it rejects less often
    than it says. A guide that has collapsed onto the prior passes:
    :func:`pyro_vae.rate_distortion` tells.

    Args:
        model: a Pyro model.
        guide: a Pyro guide of its latent sites, of any make.
        *batch: their arguments, at least 8 data.
        num_draws: pairs of draws at most, each of another datum; of more data, as many chosen at
            random. Time and memory grow with its square.
        num_permutations: B, random swaps.
        given: values of global latent sites, as in :func:`pyro_vae.log_weights`.
        data_plate: as in :func:`pyro_vae.log_weights`, but not False.
        particles: as in :func:`pyro_vae.log_weights`.
        seed: of the draws and the swaps; None takes one from the global random state.

    Returns:
        An AggregatePosterior: a p-value of all latents, and of each unit which of them are off.

    Raises:
        ValueError: for what :func:`pyro_vae.log_weights` refuses, fewer than 8 data or one datum
            in all, latents that a mask leaves out, and draws that are NaN.

    References:
        Gretton, Borgwardt, Rasch, Schölkopf & Smola (2012). A kernel two-sample test. JMLR 13.
        Hoffman & Johnson (2016). ELBO surgery: yet another way to carve up the variational
        evidence lower bound. NIPS workshop on advances in approximate Bayesian inference.
        Rosca, Lakshminarayanan & Mohamed (2018). Distribution matching in variational inference.
        arXiv:1802.06847.
        Westfall & Young (1993). Resampling-based multiple testing. Wiley.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_vae as pv
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def posterior(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> x = 2**0.5 * torch.randn(200, generator=torch.Generator().manual_seed(0))
        >>> pv.aggregate_posterior(model, posterior, x, seed=1).p_value > 0.05
        True
        >>> pv.aggregate_posterior(model, posterior, x + 2, seed=0).p_value
        0.001
    """
    num_draws = as_count("num_draws", num_draws, _FEWEST)
    num_permutations = as_count("num_permutations", num_permutations)
    evaluator, fixed = prepare(model, guide, batch, given, data_plate, seed, particles)
    check_over_data(evaluator, "aggregate_posterior", _FEWEST)
    rng = np.random.default_rng([evaluator.seed, Purpose.AGGREGATE_SWAPS])
    size = min(num_draws, evaluator.num_data)
    chosen = np.sort(rng.choice(evaluator.num_data, size, replace=False))
    signs = torch.from_numpy(rng.choice([-1.0, 1.0], (num_permutations, size)))
    mine, prior, labels = _draws(evaluator)
    mine, prior = mine[chosen], prior[chosen]
    x, y = normal_scores(mine, prior)
    units = [label for each in labels.values() for label in each]
    joint = mmd_of_swaps(x, y, signs)
    each = [mmd_of_swaps(x[:, [u]], y[:, [u]], signs) for u in range(len(units))]
    owners = [name for name, names in labels.items() for _ in names]
    dataset = xr.Dataset(
        {
            "joint_statistic": joint.statistic,
            "joint_p_value": joint.p_value,
            **{name: ("unit", column) for name, column in _tests(each).items()},
            **{name: ("unit", c.numpy()) for name, c in _moments(mine, prior).items()},
        },
        coords={"unit": units, "site_of": ("unit", owners)},
        attrs={"num_pairs": size, "num_permutations": num_permutations, "given": given_text(fixed)},
    )
    return AggregatePosterior(dataset)


def _draws(evaluator: Evaluator) -> tuple[Tensor, Tensor, dict[str, list[str]]]:
    """Return a draw of the guide and of the prior for each datum, [N, U], and the units' names."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    labels: dict[str, list[str]] = {}
    for rows in evaluator.data_blocks():
        size = rows.stop - rows.start
        values, _ = evaluator.draw(rows, 1, (Purpose.AGGREGATE_GUIDE, rows.start))
        of_prior = evaluator.draw_prior(rows, 1, (Purpose.AGGREGATE_PRIOR, rows.start))
        names = [name for name in values if name in evaluator.structure.sites]
        for side, of in zip(found, (values, of_prior), strict=True):
            each = {n: units_of(evaluator, n, of[n], 1, size) for n in names}
            side.append(torch.cat([numbers[0].double() for numbers, _ in each.values()], -1))
            labels = {n: own for n, (_, own) in each.items()}
    mine, prior = (torch.cat(side).cpu() for side in found)
    for draws, whose in ((mine, "the guide"), (prior, "the prior")):
        if bool(draws.isnan().any()):
            raise ValueError(
                f"aggregate_posterior: draws of {whose} are NaN for "
                f"{int(draws.isnan().any(1).sum())} of {len(draws)} data"
            )
    return mine, prior, labels


def _tests(each: list[Swapped]) -> dict[str, list[float]]:
    """Return statistic and p-values of each unit; the adjusted ones are against the largest."""
    largest = torch.stack([one.swapped for one in each]).amax(0)
    return {
        "statistic": [one.statistic for one in each],
        "p_value": [one.p_value for one in each],
        "adjusted_p_value": [p_value_of(one.statistic, largest) for one in each],
    }


def _moments(mine: Tensor, prior: Tensor) -> dict[str, Tensor]:
    """Return shift and spread of each unit, with standard errors: those of influences over data."""
    root = len(mine) ** 0.5
    centred, prior_centred = mine - mine.mean(0), prior - prior.mean(0)
    sd, prior_sd = mine.std(0), prior.std(0)
    shift, spread = (mine.mean(0) - prior.mean(0)) / prior_sd, sd / prior_sd
    of_sd, of_prior_sd = (
        (c / s).square() - 1 for c, s in ((centred, sd), (prior_centred, prior_sd))
    )
    of_shift = (centred - prior_centred) / prior_sd - 0.5 * shift * of_prior_sd
    of_spread = 0.5 * spread * (of_sd - of_prior_sd)
    return {
        "shift": shift,
        "shift_se": of_shift.std(0) / root,
        "spread": spread,
        "spread_se": of_spread.std(0) / root,
    }
