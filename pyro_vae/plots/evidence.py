"""Figures of log p(x), datum by datum: bounds from both sides, or several bounds from below."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyro_vae.plots.results import BLUE, CYCLE, GREY, VERMILION, axes, number, title_and_legend

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

# How many times wider than the median the widest may be before the axis is bent.
_WIDE = 20.0


def plot_evidence(
    dataset: xr.Dataset, exact: np.ndarray | None = None, ax: Axes | None = None
) -> Axes:
    """Draw bounds on log p(x) of each datum, in order of how far they are apart.

    Of a :class:`~pyro_vae.Sandwich` both sides, from the middle of the two, or from the exact value
    where it is known: data differ by many more nats than the bounds of one. Of a
    :class:`~pyro_vae.Comparison` the importance-weighted bound of each guide, and that of annealed
    chains where there are any, from what stands for log p(x) there (or from the exact value).

    Error bars are one standard error. Bounds that are not to be trusted are hollow: of a guide
    those with a bad verdict on its weights, of chains those that few carry or that miss a mode.
    Where a few data are far wider than the rest the axis is logarithmic away from zero.

    Args:
        dataset: that of a Sandwich or of a Comparison.
        exact: log p(x) of each datum, [N], in nats, where it is known.
        ax: where to draw; new axes if None.

    Returns:
        The axes.

    Raises:
        ValueError: for another dataset, or ``exact`` that is not [N].
    """
    if "lower" in dataset and "upper" in dataset:
        series, middle = _sides(dataset)
        where, what = "the middle of the bounds", "log p(x) from both sides"
    elif "iwae_bound" in dataset and "log_evidence" in dataset:
        series, middle = _below(dataset)
        where, what = "log p(x) of the comparison", "Lower bounds on log p(x)"
    else:
        raise ValueError(
            "the dataset has no lower and upper, as that of a Sandwich, and no iwae_bound and "
            "log_evidence, as that of a Comparison"
        )
    if exact is not None:
        if np.shape(exact) != middle.shape:
            raise ValueError(f"exact: wanted shape {[*middle.shape]}, found {[*np.shape(exact)]}")
        middle, where = np.asarray(exact, float), "the exact log p(x)"
    # A bound that a datum has not is no number; a datum with an infinite one is left out.
    values = np.stack([each.value for each in series])
    finite = ~np.isinf(values).any(0) & np.isfinite(middle)
    heights = np.where(finite, values, np.nan) - np.where(finite, middle, np.nan)
    apart = np.full(middle.shape, np.nan)
    apart[finite] = np.nanmax(heights[:, finite], 0) - np.nanmin(heights[:, finite], 0)
    width = heights[0] - heights[-1] if "lower" in dataset else apart
    order = np.flatnonzero(finite)[np.argsort(width[finite], kind="stable")]
    ax = axes(ax, (7.2, 4.2))
    handles = _draw(ax, series, heights[:, order], order)
    if lost := int((~finite).sum()):
        label = f"{lost} data without a finite bound are left out"
        handles += ax.plot([], [], ls="", label=label)
    ax.axhline(0.0, color="black", linewidth=0.8, zorder=0)
    ax.set(xlabel="datum, by how far its bounds are apart", ylabel=f"nats from {where}")
    _bend(ax, apart[order])
    ax.grid(axis="y", alpha=0.3)
    mean = "no bounds"
    if order.size:
        mean = f"{number(float(width[order].mean()), 3)} nats apart on average"
    ax.locator_params(axis="x", integer=True)
    columns = 3 if "lower" in dataset else 2  # names of guides are long
    title_and_legend(ax, f"{what}: {mean}", columns=columns, handles=handles)
    return ax


class _Series(NamedTuple):
    label: str
    color: str
    value: np.ndarray
    error: np.ndarray
    bad: np.ndarray


def _sides(dataset: xr.Dataset) -> tuple[list[_Series], np.ndarray]:
    """Return the upper and the lower bound of each datum, and their middle."""
    bad = np.asarray(dataset["untrusted"], bool)
    found = []
    for name, color in (("upper", VERMILION), ("lower", BLUE)):
        value, error = (np.asarray(dataset[f"{name}{end}"], float) for end in ("", "_se"))
        found.append(_Series(f"{name} bound", color, value, error, bad))
    with np.errstate(invalid="ignore"):
        return found, (found[0].value + found[1].value) / 2


def _below(dataset: xr.Dataset) -> tuple[list[_Series], np.ndarray]:
    """Return the bound by each guide's weights, that of annealed chains, and log p(x)."""
    found = []
    count = dataset.attrs["num_particles"]
    guides = list(map(str, dataset["guide"].values))
    for guide, color in zip(guides, itertools.cycle(CYCLE[:2] + CYCLE[3:]), strict=False):
        one = dataset.sel(guide=guide)
        value, error = (np.asarray(one[f"iwae_bound{end}"], float) for end in ("", "_se"))
        bad = ~np.asarray(one["good"], bool)
        found.append(_Series(f"IWAE-{count} through {guide!r}", color, value, error, bad))
    if "ais" in dataset:
        value, error = (np.asarray(dataset[f"ais{end}"], float) for end in ("", "_se"))
        bad = ~np.asarray(dataset["ais_good"], bool)
        found.append(_Series("annealed chains", CYCLE[2], value, error, bad))
    return found, np.asarray(dataset["log_evidence"], float)


def _draw(ax: Axes, series: list[_Series], heights: np.ndarray, order: np.ndarray) -> list[Artist]:
    """Draw points with errors, a line from the lowest to the highest; return the legend's."""
    place = np.arange(order.size)
    if order.size:
        ends = np.nanmin(heights, 0), np.nanmax(heights, 0)
        ax.vlines(place, *ends, color=GREY, linewidth=0.6)
    size = float(np.clip(300 / max(1, order.size), 2.0, 5.0))
    dot: dict[str, Any] = {"marker": "o", "ls": "", "ms": 5}
    handles: list[Artist] = []
    hollow = np.zeros(order.size, dtype=bool)
    for each, height in zip(series, heights, strict=True):
        known, bad = np.isfinite(height), each.bad[order]
        error = np.nan_to_num(each.error)[order]
        look: dict[str, Any] = {"fmt": "o", "ms": size, "color": each.color, "elinewidth": 0.7}
        for some, inside in ((known & ~bad, each.color), (known & bad, "white")):
            ax.errorbar(place[some], height[some], error[some], mfc=inside, **look)
        hollow |= known & bad
        handles += ax.plot([], [], label=each.label, color=each.color, **dot)
    if hollow.any():
        label = f"not to be trusted ({hollow.sum()} data)"
        handles += ax.plot([], [], label=label, mfc="white", color="black", **dot)
    return handles


def _bend(ax: Axes, widths: np.ndarray) -> None:
    """Make the axis logarithmic away from zero where a few data are far wider than the rest."""
    some = widths[widths > 0]
    if some.size and some.max() > _WIDE * (median := float(np.median(some))):
        ax.set_yscale("symlog", linthresh=max(median, 1e-3))
