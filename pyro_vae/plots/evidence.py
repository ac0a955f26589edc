"""Figures of log p(x) from both sides, datum by datum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vae.plots.results import BLUE, GREY, VERMILION, axes, number, title_and_legend

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

# How many times wider than the median the widest may be before the axis is bent.
_WIDE = 20.0


def plot_evidence(
    dataset: xr.Dataset, exact: np.ndarray | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the bounds on log p(x) of each datum from both sides, in order of their width.

    From the middle of the two, or from the exact value where it is known, because data differ by
    many more nats than the bounds of one. Error bars are one standard error over chains. Bounds
    that are not to be trusted are hollow. Where a few data are far wider than the rest the axis is
    logarithmic away from zero.

    Args:
        dataset: that of a :class:`~pyro_vae.Sandwich`.
        exact: log p(x) of each datum, [N], in nats, where it is known.
        ax: where to draw; new axes if None.

    Returns:
        The axes.

    Raises:
        ValueError: for another dataset, or ``exact`` that is not [N].
    """
    if missing := [name for name in ("lower", "upper") if name not in dataset]:
        raise ValueError(f"the dataset has no {' and no '.join(missing)}: that of a Sandwich has")
    lower, upper = (np.asarray(dataset[name], float) for name in ("lower", "upper"))
    if exact is not None and np.shape(exact) != lower.shape:
        raise ValueError(f"exact: wanted shape {[*lower.shape]}, found {[*np.shape(exact)]}")
    finite = np.isfinite(upper) & np.isfinite(lower)
    lower, upper = np.where(finite, lower, np.nan), np.where(finite, upper, np.nan)
    middle = (lower + upper) / 2 if exact is None else np.asarray(exact, float)
    order = np.flatnonzero(finite)[np.argsort((upper - lower)[finite], kind="stable")]
    ax = axes(ax, (7.2, 4.2))
    place, bad = np.arange(order.size), np.asarray(dataset["untrusted"], bool)[order]
    ax.vlines(place, (lower - middle)[order], (upper - middle)[order], color=GREY, linewidth=0.6)
    size = float(np.clip(300 / max(1, order.size), 2.0, 5.0))
    handles: list[Artist] = []
    for name, value, color in (("upper", upper, VERMILION), ("lower", lower, BLUE)):
        error = np.nan_to_num(np.asarray(dataset[f"{name}_se"], float))[order]
        look: dict[str, Any] = {"fmt": "o", "ms": size, "color": color, "elinewidth": 0.7}
        for some, inside in ((~bad, color), (bad, "white")):
            ax.errorbar(place[some], (value - middle)[order][some], error[some], mfc=inside, **look)
        dot: dict[str, Any] = {"marker": "o", "ls": "", "ms": 5}
        handles += ax.plot([], [], label=f"{name} bound", color=color, **dot)
    ax.axhline(0.0, color="black", linewidth=0.8, zorder=0)
    from_where = "the middle of the bounds" if exact is None else "the exact log p(x)"
    ax.set(xlabel="datum, by the width of its bounds", ylabel=f"nats from {from_where}")
    _bend(ax, (upper - lower)[order])
    ax.grid(axis="y", alpha=0.3)
    if bad.any():
        label = f"not to be trusted ({bad.sum()} data)"
        handles += ax.plot([], [], label=label, mfc="white", color="black", **dot)
    if lost := int((~finite).sum()):
        label = f"{lost} data without a finite bound are left out"
        handles += ax.plot([], [], ls="", label=label)
    width = (upper - lower)[order]
    mean = f"{number(width.mean(), 3)} nats apart on average" if width.size else "no bounds"
    title_and_legend(ax, f"log p(x) from both sides: {mean}", columns=3, handles=handles)
    return ax


def _bend(ax: Axes, widths: np.ndarray) -> None:
    """Make the axis logarithmic away from zero where a few data are far wider than the rest."""
    some = widths[widths > 0]
    if some.size and some.max() > _WIDE * (median := float(np.median(some))):
        ax.set_yscale("symlog", linthresh=max(median, 1e-3))
