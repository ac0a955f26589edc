"""Is a guide right over all data that a model makes? Simulation-based calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.evaluation.rank_tests import rank_dataset, settings_text, way_off
from pyro_vae.evaluation.simulations import Settings, Simulate, Simulations
from pyro_vae.markup import result
from pyro_vae.particles.blocks import Chunk
from pyro_vae.particles.global_latents import given_text
from pyro_vae.programs.types import DataPlate, GivenValues, Particles, Program, Values
from pyro_vae.report import calibrating, sections
from pyro_vae.report.findings import Finding
from pyro_vae.report.page import page, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Calibration", "sbc"]

# Quantities that depend on the data: they see what ranks of latents alone cannot.
_LOG_JOINT, _LOG_LIKELIHOOD = "log p(x, z)", "log p(x | z)"
_SHOWN = 10  # rows in a text


@dataclass(frozen=True)
class Calibration:
    """The result of :func:`sbc`.

    Attributes:
        dataset: dims simulation, quantity, level. ``ranks`` [simulation, quantity], from 0 to
            ``num_draws``; -1 where a mask leaves a latent out, and ``num_ranks`` of them count. Of
            each quantity ``p_value``, that its ranks are uniform, by their ECDF (exact),
            ``adjusted_p_value`` (Holm), and ``chi_squared_p_value``. By the normal scores of the
            ranks, ``shift``: by how many standard deviations of the draws the simulated quantity
            lies above them, and ``spread``, how many times as wide it is; 0 and 1 of a calibrated
            guide, each with its standard error ``_se``. A spread far above 1 is cut short, for no
            rank is beyond L. Of each quantity and level ``ecdf_difference``, the
            share of ranks below the level less the level, and ``band_lower`` and ``band_upper``,
            which it leaves anywhere, of any quantity, with probability ``error_rate`` at most.
            Coordinate ``site_of``: the latent site of a quantity; "" of a log density. Attributes:
            ``num_simulations``, ``num_draws``, ``error_rate``, ``resampled``, ``doubt``, ``given``.
    """

    dataset: xr.Dataset

    @property
    def passed(self) -> bool:
        """Whether no quantity is rejected: true of an exact guide with 1 - ``error_rate``."""
        return bool((self.dataset["p_value"] > self._threshold).all())

    @property
    def rejected(self) -> list[str]:
        """The quantities whose ranks are not uniform, by the adjusted p-value."""
        data = self.dataset
        off = data["adjusted_p_value"].values <= data.attrs["error_rate"]
        return [str(name) for name in data["quantity"].values[off]]

    def summary(self) -> pd.DataFrame:
        """Return a row per quantity, the smallest p-values first.

        ``finding`` says of those that are rejected in which way the guide is wrong.
        """
        data, rejected = self.dataset, self.rejected
        names = ["p_value", "adjusted_p_value", "chi_squared_p_value"]
        names += ["shift", "shift_se", "spread", "spread_se"]
        table = data[names].to_dataframe()[names]
        found = (_finding(data.sel(quantity=n)) if n in rejected else "" for n in table.index)
        table["finding"] = list(found)
        return table.sort_values("p_value", kind="stable")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the ECDFs of the ranks with bands; needs the extra ``plots``."""
        from pyro_vae.plots.calibration import plot_ranks

        return plot_ranks(self.dataset, ax=ax)

    def findings(self) -> list[Finding]:
        """Return what the numbers say in plain words, the worst first."""
        return calibrating.of_calibration(self.dataset, self.summary())

    def to_html(
        self, path: str | Path | None = None, title: str = "Ranks of simulated latents"
    ) -> str:
        """Return a page of findings, a table and a figure; needs the extra ``plots``.

        Args:
            path: a file to write it to as well.
            title: of the page.
        """
        section = sections.of_calibration(self.dataset, self.summary())
        return written(page(title, [section]), path)

    def _repr_html_(self) -> str:
        names = ["p_value", "shift", "shift_se", "spread", "spread_se", "finding"]
        return result(self.summary()[names], [*self._lines(), self.dataset.attrs["doubt"]])

    @property
    def _threshold(self) -> float:
        return float(self.dataset.attrs["error_rate"] / self.dataset.sizes["quantity"])

    def __repr__(self) -> str:
        lines, doubt = self._lines(), self.dataset.attrs["doubt"]
        if not self.passed:
            table = self.summary()
            off = table[table["finding"] != ""][["p_value", "adjusted_p_value", "finding"]]
            lines.append(off.head(_SHOWN).to_string(float_format="%.2g"))
        return "\n".join([*lines, doubt] if doubt else lines)

    def _lines(self) -> list[str]:
        """Return what was simulated, and what came of it."""
        data = self.dataset
        exact = f"(an exact guide is rejected with probability {data.attrs['error_rate']:g})"
        many, off = data.sizes["quantity"], len(self.rejected)
        if self.passed:
            said = (
                f"passed: the ranks of all {many} quantities may be uniform; the smallest p-value "
                f"is {float(data['p_value'].min()):.3g} {exact}"
            )
        else:
            said = (
                f"not calibrated: the ranks of {off} of {many} quantities are not uniform {exact}"
            )
        return [f"simulation-based calibration, {settings_text(data)}", said]


def sbc(
    model: Program,
    guide: Program,
    *batch: Any,
    num_simulations: int = 2000,
    num_draws: int = 99,
    simulate: Simulate | None = None,
    dream: Callable[[Values], Any] | None = None,
    resample: Literal["psis"] | None = None,
    num_particles: int | None = None,
    error_rate: float = 0.01,
    given: GivenValues | None = None,
    chunk_size: int | None = None,
    data_plate: DataPlate = None,
    particles: Particles = "auto",
    seed: int | None = None,
) -> Calibration:
    r"""Test whether a guide is the posterior, over all data that the model makes.

    Latents and data are drawn from the model, :math:`(z^*, x) \sim p(z)\, p(x | z)`, and the guide
    draws :math:`z_1, \ldots, z_L \sim q(z | x)`. Where q is the posterior, :math:`z^*` is one more
    draw of it, and the rank of any quantity of latents and data is uniform on 0, ..., L:

    .. math:: r = \#\{l : f(z_l, x) < f(z^*, x)\}

    (Cook, Gelman & Rubin 2006; Talts et al. 2018). The quantities are each number of each latent
    site that the guide proposes, and :math:`\log p(x, z)` and :math:`\log p(x | z)`, because the
    first alone cannot tell a guide that returns the prior, which is right on average over the data
    (Modrák et al. 2023). Equal values are put in a random order.

    Each datum is a simulation of its own, and all are one batch. With ``data_plate=False`` each is
    a whole batch, latents that all data share included; the guide must then be a function of the
    whole batch, and takes as many runs as there are simulations.

    Args:
        model: a Pyro model.
        guide: a Pyro guide that takes any data: an amortized one, or one written by hand.
        *batch: an example of their arguments: observed values are drawn, all else (covariates,
            lengths, masks, which values are missing) stays, row by row; rows are taken again from
            the first where they are fewer than simulations. Not needed with ``simulate``.
        num_simulations: S, at least 20.
        num_draws: L, of the guide for each simulation, at least 19.
        simulate: a function from a number S to (latents, batch): a mapping from each latent site to
            values ``[S, ...]``, and the model's arguments with a row for each; PyTorch's random
            numbers are seeded. With ``data_plate=False`` it is called for each simulation with 1,
            and returns a site's values as the model shapes them, and the batch.
        dream: where the arguments are not just the observed values: from a mapping (observed site
            to value) to the arguments that hold them.
        resample: None for the guide itself; "psis" for L of its draws chosen by Pareto-smoothed
            importance weights, the posterior of :func:`pyro_vae.to_arviz` with that argument.
        num_particles: how many draws these are chosen from; by default 10 L.
        error_rate: the probability at which an exact guide may be rejected, over all quantities.
        given: values of global latent sites, as in :func:`pyro_vae.log_weights`: latents and data
            are drawn given these.
        chunk_size: pairs (particle, datum) scored at once; bounds memory only.
        data_plate: as in :func:`pyro_vae.log_weights`.
        particles: as in :func:`pyro_vae.log_weights`.
        seed: of all random numbers; None takes one from the global random state.

    Returns:
        A Calibration: ranks, and a p-value of each quantity.

    Raises:
        ValueError: for what :func:`pyro_vae.log_weights` refuses; where the model cannot be drawn
            from, and where it is not plain which argument holds an observed site's values; for
            latents that the model masks by what it draws; for a guide of other data (the rows of a
            LocalGuide or of Pyro's AutoNormal), or one that looks at the other data of a batch;
            for latents of ``simulate`` that are missing, misshapen or impossible.

    References:
        Cook, Gelman & Rubin (2006). Validation of software for Bayesian models using posterior
        quantiles. Journal of Computational and Graphical Statistics 15.
        Talts, Betancourt, Simpson, Vehtari & Gelman (2018). Validating Bayesian inference
        algorithms with simulation-based calibration. arXiv:1804.06788.
        Modrák, Moon, Kim, Bürkner, Huurre, Faltejsková, Gelman & Vehtari (2023). Simulation-based
        calibration checking for Bayesian computation: the choice of test quantities shapes
        sensitivity. Bayesian Analysis.
        Säilynoja, Bürkner & Vehtari (2022). Graphical test for discrete uniformity. Statistics and
        Computing 32.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_vae as pv
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def narrow(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5))  # the posterior's is 0.5**0.5
        >>> found = pv.sbc(model, narrow, torch.zeros(1), num_simulations=500, seed=0)
        >>> found.passed, found.summary().finding["z"]
        (False, 'draws are too narrow')
    """
    settings = Settings(
        who="sbc",
        num_simulations=num_simulations,
        num_draws=num_draws,
        simulate=simulate,
        dream=dream,
        resample=resample,
        num_particles=num_particles,
        error_rate=error_rate,
        given=given,
        data_plate=data_plate,
        particles=particles,
        chunk_size=chunk_size,
        seed=seed,
    ).checked(batch)
    simulations = Simulations(model, guide, batch, settings)
    found = simulations.ranks(_with_logs, num_exact=len(simulations.labels))
    labels = [*simulations.labels, _LOG_JOINT, _LOG_LIKELIHOOD]
    there = np.pad(found.there, ((0, 0), (0, 2)), constant_values=True)
    some = np.flatnonzero(there.any(0))  # of what is never there nothing can be said
    names, sites = ([of[k] for k in some] for of in (labels, [*simulations.site_of, "", ""]))
    dataset = rank_dataset(found.ranks[:, some], names, "quantity", settings, there[:, some])
    dataset = dataset.assign_coords(site_of=("quantity", sites))
    dataset.attrs |= {"doubt": found.doubt, "given": given_text(simulations.given)}
    return Calibration(dataset)


def _with_logs(chunk: Chunk, numbers: Tensor, there: Tensor, index: slice) -> Tensor:
    """Return the numbers of the latents, log p(x, z) and log p(x | z), [K, n, U + 2]."""
    logs = torch.stack([chunk.weights.log_joint, chunk.weights.log_likelihood], -1)
    return torch.cat([numbers, logs.to(numbers)], -1)


def _finding(row: xr.Dataset) -> str:
    """Return in which way a quantity's ranks are off, in words."""
    if str(row["site_of"].item()):
        return way_off(row)
    higher = float(row["shift"]) > 0
    if str(row["quantity"].item()) == _LOG_JOINT:
        return f"draws are {'less' if higher else 'more'} probable than the simulated latents"
    return f"draws fit the data {'worse' if higher else 'better'} than the simulated latents"
