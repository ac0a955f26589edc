"""Do credible regions hold what they say? Expected coverage of regions of all latents jointly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.evaluation.rank_tests import rank_dataset, settings_text
from pyro_vae.evaluation.simulations import Settings, Simulate, Simulations
from pyro_vae.markup import result
from pyro_vae.particles.blocks import Chunk
from pyro_vae.particles.global_latents import given_text
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.purposes import Purpose
from pyro_vae.programs.types import DataPlate, GivenValues, Particles, Program, Values
from pyro_vae.report import calibrating, sections
from pyro_vae.report.findings import Finding
from pyro_vae.report.page import page, written
from pyro_vae.sampling.streams import Stream

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Coverage", "coverage"]

_DENSITY, _TARP = "density", "TARP"
_AT_ONCE = 2**22  # distances between data that are held at once
_LEVELS = (0.5, 0.8, 0.95)  # of a summary


@dataclass(frozen=True)
class Coverage:
    """The result of :func:`coverage`.

    Attributes:
        dataset: dims simulation, region ("density", "TARP"), level. ``expected_coverage``, the
            share of the simulations whose latents lie in the credible region of a level, with its
            standard error ``expected_coverage_se``; an exact guide's is the level. ``band_lower``
            and ``band_upper``, which the expected coverage of an exact guide leaves anywhere, of
            any region, with probability ``error_rate`` at most. ``ranks`` [simulation, region]: how
            many draws of the guide lie further in than the simulated latents, from 0 to
            ``num_draws``; ``p_value``, that they are uniform, by their ECDF (exact),
            ``adjusted_p_value`` (Holm), ``chi_squared_p_value``. Attributes: ``num_simulations``,
            ``num_draws``, ``error_rate``, ``resampled``, ``doubt``, ``given``.
    """

    dataset: xr.Dataset

    @property
    def passed(self) -> bool:
        """Whether no region is rejected: true of an exact guide with 1 - ``error_rate``."""
        data = self.dataset
        return bool((data["p_value"] > data.attrs["error_rate"] / data.sizes["region"]).all())

    def summary(self) -> pd.DataFrame:
        """Return a row per region: expected coverage at levels about 0.5, 0.8, 0.95, and p-values.

        ``finding`` says of those that are rejected how their coverage is off.
        """
        data = self.dataset
        table = data[["p_value", "adjusted_p_value", "chi_squared_p_value"]].to_dataframe()
        for level in _LEVELS:
            one = data.sel(level=level, method="nearest")
            name = f"coverage at {float(one['level']):.2g}"
            table[name] = one["expected_coverage"].values
            table[f"{name}_se"] = one["expected_coverage_se"].values
        table["finding"] = [_finding(data.sel(region=name)) for name in table.index]
        return table

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw expected coverage against level, with bands; needs the extra ``plots``."""
        from pyro_vae.plots.calibration import plot_coverage

        return plot_coverage(self.dataset, ax=ax)

    def findings(self) -> list[Finding]:
        """Return what the numbers say in plain words, the worst first."""
        return calibrating.of_coverage(self.dataset, self.summary())

    def to_html(
        self, path: str | Path | None = None, title: str = "Coverage of credible regions"
    ) -> str:
        """Return a page of findings, a table and a figure; needs the extra ``plots``.

        Args:
            path: a file to write it to as well.
            title: of the page.
        """
        section = sections.of_coverage(self.dataset, self.summary())
        return written(page(title, [section]), path)

    def __repr__(self) -> str:
        table, doubt = self.summary(), self.dataset.attrs["doubt"]
        shown = table[["p_value"]].map("{:.2g}".format)
        for name in (name for name in table if f"{name}_se" in table):
            pairs = zip(table[name], table[f"{name}_se"], strict=True)
            shown[name] = [f"{value:.3f} ± {error:.3f}" for value, error in pairs]
        found = (f"{name}: {words}" for name, words in table["finding"].items() if words)
        lines = [*self._lines(), shown.to_string(), *found]
        return "\n".join([*lines, doubt] if doubt else lines)

    def _repr_html_(self) -> str:
        table = self.summary().drop(columns=["adjusted_p_value", "chi_squared_p_value"])
        return result(table, [*self._lines(), self.dataset.attrs["doubt"]])

    def _lines(self) -> list[str]:
        """Return what was simulated, and what came of it."""
        data = self.dataset
        return [
            f"expected coverage of credible regions, {settings_text(data)}",
            f"{'passed' if self.passed else 'not calibrated'} (an exact guide is rejected with "
            f"probability {data.attrs['error_rate']:g})",
        ]


def coverage(
    model: Program,
    guide: Program,
    *batch: Any,
    num_simulations: int = 2000,
    num_draws: int = 99,
    regions: Literal["both", "density", "tarp"] = "both",
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
) -> Coverage:
    r"""Test how often credible regions of a guide hold the latents that data were made of.

    Latents and data are simulated as by :func:`pyro_vae.sbc`, which looks at the latents one by
    one. Here regions of all latents jointly are asked how often they hold :math:`z^*`; of the exact
    posterior a region of level :math:`\alpha` does with probability :math:`\alpha`. Two kinds:

    - "density": the region of highest density of the guide, :math:`\{z : q(z | x) \ge c\}`
      (Hermans et al. 2022). Draws that are too narrow cover too little, too wide ones too much. A
      guide that returns the prior covers what it says.
    - "TARP": balls around a reference point (Lemos et al. 2023),

      .. math:: \{z : d(z, z_r) \le d(z^*, z_r)\}

      with d in standard deviations of each latent number. Reference points that know nothing of x
      leave a guide that returns the prior unseen. So :math:`z_r` is what the nearest data of as
      many other simulations were made of, moved by one random step for all simulations, as long as
      the latents are wide: no symmetry hides a bias then.

    Args:
        model: a Pyro model.
        guide: a Pyro guide that takes any data.
        *batch: as in :func:`pyro_vae.sbc`, and so are the following, but ``regions``.
        num_simulations: S.
        num_draws: L, of the guide for each simulation.
        regions: "density", "tarp" or "both". The first needs a guide whose density of any latents
            is known.
        simulate: likewise; for "tarp" it is called twice, and returns others the second time.
        dream: likewise.
        resample: likewise; of resampled draws the regions are those of the guide's density still.
        num_particles: likewise.
        error_rate: likewise, over all regions.
        given: likewise.
        chunk_size: likewise.
        data_plate: likewise.
        particles: likewise.
        seed: likewise.

    Returns:
        A Coverage: expected coverage by level, and a p-value of each kind of region.

    Raises:
        ValueError: for what :func:`pyro_vae.sbc` refuses, other ``regions``, a guide whose density
            at the simulated latents is not known, and a ``simulate`` that returns the same again.

    References:
        Hermans, Delaunoy, Rozet, Wehenkel, Begy & Louppe (2022). A crisis in simulation-based
        inference? Beware, your posterior approximations can be unfaithful. TMLR.
        Lemos, Coogan, Hezaveh & Perreault-Levasseur (2023). Sampling-based accuracy testing of
        posterior estimators for general inference. ICML.

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
        >>> found = pv.coverage(model, posterior, torch.zeros(1), num_simulations=500, seed=0)
        >>> found.passed
        True
        >>> density = found.dataset.expected_coverage.sel(region="density")
        >>> abs(float(density.sel(level=0.9, method="nearest")) - 0.9) < 0.04
        True
    """
    if regions not in ("both", "density", "tarp"):
        raise ValueError(f"regions={regions!r}: 'both', 'density' or 'tarp' is needed")
    settings = Settings(
        who="coverage",
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
    simulations = Simulations(model, guide, batch, settings, density=regions != "tarp")
    names = {"both": [_DENSITY, _TARP], "density": [_DENSITY], "tarp": [_TARP]}[regions]
    measures = {_DENSITY: _less_dense}
    if _TARP in names:
        measures[_TARP] = Distances.of(simulations).measure

    def measured(chunk: Chunk, numbers: Tensor, there: Tensor, index: slice) -> Tensor:
        return torch.stack([measures[name](chunk, numbers, there, index) for name in names], -1)

    found = simulations.ranks(measured)
    everywhere = np.ones(found.ranks.shape, dtype=bool)
    dataset = rank_dataset(found.ranks, names, "region", settings, everywhere)
    dataset = _as_coverage(dataset)
    dataset.attrs |= {"doubt": found.doubt, "given": given_text(simulations.given)}
    return Coverage(dataset)


def _less_dense(chunk: Chunk, numbers: Tensor, there: Tensor, index: slice) -> Tensor:
    """Return minus log q(z | x), [K, n]: small inside a region of highest density."""
    return -chunk.weights.log_guide.double()


@dataclass(frozen=True, slots=True)
class Distances:
    """Distances of latents from the reference point of their simulation.

    Attributes:
        reference: [S, U], in the latents' own units.
        scale: standard deviation of each number over the simulations, [U].
    """

    reference: Tensor
    scale: Tensor

    @classmethod
    def of(cls, simulations: Simulations) -> Distances:
        """Return those from what the nearest data of other simulations were made of, and a step."""
        mine = _flat(simulations.latents)
        batches, latents = simulations.others()
        others = _flat(latents)
        if torch.equal(mine, others):
            raise ValueError(
                "simulate= returned the same latents a second time, and the reference points of "
                "TARP are those of other simulations; draw new ones at each call, or pass "
                "regions='density'"
            )
        x, y = _features(simulations.batches), _features(batches)
        nearest = others[_nearest(x, y).to(others.device)]
        scale = mine.std(0)
        scale = torch.where(scale > 0, scale, 1.0)
        step = Stream(simulations.settings.seed or 0, Purpose.CALIBRATED_DIRECTION).normal(scale)
        step = step * len(step) ** 0.5 / step.norm()
        return cls(nearest + step * scale, scale)

    def measure(self, chunk: Chunk, numbers: Tensor, there: Tensor, index: slice) -> Tensor:
        """Return the distance of each draw [K, n, U] from its reference point, [K, n]."""
        # What is not there is zero in all draws, and adds the same to all.
        return ((numbers - self.reference[index]) / self.scale).norm(dim=-1)


def _flat(values: Values) -> Tensor:
    """Return the numbers of all sites, [S, U], float64."""
    return torch.cat([value.reshape(len(value), -1).double() for value in values.values()], 1)


def _features(batches: Sequence[Batch]) -> Tensor:
    """Return the data of each simulation as numbers in units of their standard deviation, [S, P].

    What is missing, NaN, is the mean.
    """
    found = []
    for batch in batches:
        tensors = [v for v in (*batch.args, *batch.kwargs.values()) if isinstance(v, Tensor)]
        rows = 1 if len(batches) > 1 else batch.size or 1
        wide = [each.reshape(rows, -1).double() for each in tensors if each.ndim and each.numel()]
        found.append(torch.cat(wide, 1))
    x = torch.cat(found)
    x = x - x.nanmean(0)
    x = torch.nan_to_num(x, nan=0.0)
    scale = x.std(0)
    return x / torch.where(scale > 0, scale, 1.0)


def _nearest(x: Tensor, y: Tensor) -> Tensor:
    """Return which row of y is nearest to each row of x."""
    parts = x.split(max(1, _AT_ONCE // len(y)))
    return torch.cat([torch.cdist(part, y).argmin(1) for part in parts])


def _as_coverage(ranks: xr.Dataset) -> xr.Dataset:
    """Return a dataset of ranks as one of expected coverage: the share of ranks below a level."""
    covered = ranks["ecdf_difference"] + ranks["level"]
    error = np.sqrt(covered * (1 - covered) / ranks["num_ranks"])
    kept = ranks[["ranks", "p_value", "adjusted_p_value", "chi_squared_p_value"]]
    return kept.assign(
        expected_coverage=covered,
        expected_coverage_se=error,
        band_lower=ranks["band_lower"] + ranks["level"],
        band_upper=ranks["band_upper"] + ranks["level"],
    )


def _finding(row: xr.Dataset) -> str:
    """Return how the coverage of a region is off, in words; "" where it is not rejected."""
    if float(row["adjusted_p_value"]) > row.attrs["error_rate"]:
        return ""
    more = float((row["expected_coverage"] - row["level"]).mean())
    often = f"{'more' if more > 0 else 'less'} often than they say"
    if str(row["region"].item()) == _TARP:
        return f"balls around reference points hold the simulated latents {often}"
    why = "the guide is too wide" if more > 0 else "the guide is too narrow, or elsewhere"
    return f"regions of highest density hold the simulated latents {often}: {why}"
