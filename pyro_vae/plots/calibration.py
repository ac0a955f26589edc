"""Figures of calibration: ranks of simulated latents, and the coverage of credible regions."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vae.plots.results import BLUE, CYCLE, GREY, VERMILION, axes, title_and_legend

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

_NAMED = 6  # quantities that a legend names


def plot_ranks(dataset: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Draw how far the ECDF of each quantity's ranks is from that of uniform ones, with bands.

    Of a calibrated guide all of them stay inside the band, at all levels at once, with probability
    1 - ``error_rate``. Those that leave it are coloured, the furthest ones by name; the others are
    grey. Where a mask leaves some out of some simulations, each number of ranks has its own band.

    Args:
        dataset: that of a :class:`~pyro_vae.Calibration`.
        ax: where to draw; new axes if None.

    Returns:
        The axes.

    Raises:
        ValueError: for another dataset.

    References:
        Säilynoja, Bürkner & Vehtari (2022). Graphical test for discrete uniformity and its
        applications. Statistics and Computing 32.
    """
    if "quantity" not in dataset.dims or "ecdf_difference" not in dataset:
        raise ValueError("the dataset has no ecdf_difference by quantity, as that of a Calibration")
    ax = axes(ax, (7.2, 4.4))
    level = np.asarray(dataset["level"], float)
    rate = float(dataset.attrs["error_rate"])
    counts = np.asarray(dataset["num_ranks"])
    bands = [int(np.flatnonzero(counts == count)[0]) for count in np.unique(counts)]
    for index in bands:
        _fill(ax, level, dataset.isel(quantity=index), 1 / len(bands))
    p_values = np.asarray(dataset["p_value"], float)
    order = np.argsort(p_values, kind="stable")
    off = [q for q in order if p_values[q] <= rate / len(p_values)]
    inside = [q for q in order if q not in off]
    look: dict[str, Any] = {"where": "mid", "linewidth": 1.4}
    for place, (q, color) in enumerate(zip(off, itertools.cycle(CYCLE[1:] + CYCLE[:1]))):
        one = dataset.isel(quantity=q)
        label = str(one["quantity"].item()) if place < _NAMED else None
        ax.step(level, one["ecdf_difference"], color=color, label=label, **look)
    for place, q in enumerate(inside):
        label = f"{len(inside)} inside the band" if not place else None
        one = dataset.isel(quantity=q)
        ax.step(level, one["ecdf_difference"], color=GREY, label=label, **look | {"linewidth": 0.9})
    if len(off) > _NAMED:
        ax.plot([], [], ls="", label=f"and {len(off) - _NAMED} more")
    ax.axhline(0.0, color="black", linewidth=0.8)
    ax.set(xlabel="rank, as a share", ylabel="share of ranks below, less the expected share")
    ax.set_xlim(0.0, 1.0)
    ax.grid(alpha=0.3)
    what = f"{len(off)} of {len(p_values)} quantities leave the band" if off else "calibrated"
    title_and_legend(ax, f"Simulation-based calibration: {what}", columns=4)
    return ax


def plot_coverage(dataset: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Draw the expected coverage of credible regions against their level, with bands.

    Of a calibrated guide it is the level: the diagonal. Below it regions hold the simulated latents
    less often than they say. The band holds all curves of an exact guide, at all levels at once,
    with probability 1 - ``error_rate``.

    Args:
        dataset: that of a :class:`~pyro_vae.Coverage`.
        ax: where to draw; new axes if None.

    Returns:
        The axes.

    Raises:
        ValueError: for another dataset.

    References:
        Hermans, Delaunoy, Rozet, Wehenkel, Begy & Louppe (2022). A crisis in simulation-based
        inference? TMLR.
        Lemos, Coogan, Hezaveh & Perreault-Levasseur (2023). Sampling-based accuracy testing of
        posterior estimators for general inference. ICML.
    """
    if "region" not in dataset.dims or "expected_coverage" not in dataset:
        raise ValueError("the dataset has no expected_coverage by region, as that of a Coverage")
    ax = axes(ax, (5.2, 5.2))
    level = np.asarray(dataset["level"], float)
    _fill(ax, level, dataset.isel(region=0))
    threshold = float(dataset.attrs["error_rate"]) / dataset.sizes["region"]
    words = {"density": "regions of highest density", "TARP": "balls around reference points"}
    passed = True
    for name, color in zip(map(str, dataset["region"].values), (BLUE, VERMILION), strict=False):
        one = dataset.sel(region=name)
        off = float(one["p_value"]) <= threshold
        passed &= not off
        label = words[name] + (", not calibrated" if off else "")
        ax.step(level, one["expected_coverage"], where="mid", color=color, label=label)
    ax.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    ax.set(xlabel="level of a credible region", ylabel="share of simulated latents inside")
    ax.set(xlim=(0.0, 1.0), ylim=(0.0, 1.0), aspect="equal")
    ax.grid(alpha=0.3)
    what = "calibrated" if passed else "not calibrated"
    title_and_legend(ax, f"Expected coverage: {what}", columns=1)
    return ax


def _fill(ax: Axes, level: np.ndarray, one: xr.Dataset, share: float = 1.0) -> None:
    """Fill the band of a curve, the paler the smaller its share in what is filled."""
    lower, upper = (np.asarray(one[name], float) for name in ("band_lower", "band_upper"))
    look: dict[str, Any] = {"step": "mid", "color": BLUE, "linewidth": 0}
    ax.fill_between(level, lower, upper, alpha=0.15 * share + 0.05, **look)
