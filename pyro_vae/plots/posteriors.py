"""Figures of posteriors: where a repair ended, and a guide's draws beside those of chains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vae.plots.results import BLUE, CYCLE, GREY, VERMILION, axes, pyplot, title_and_legend

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

_GRID = 64  # points of a density along each axis
_SHARES = (0.9, 0.5)  # of the draws, that a contour holds


def plot_rungs(dataset: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Draw the share of the data at each rung of a repair, good and without a good verdict.

    A pale bar is the share that was tried there, which the rungs above left without a good
    verdict. In it, stacked, stand the data that ended there: those with a good verdict, and
    those that have none.

    Args:
        dataset: that of a :class:`~pyro_vae.Repair`.
        ax: where to draw; new axes if None.

    Returns:
        The axes.

    Raises:
        ValueError: for another dataset.
    """
    if missing := [name for name in ("rung", "good", "tried", "seconds") if name not in dataset]:
        raise ValueError(f"the dataset has no {' and no '.join(missing)}: that of a Repair has")
    rungs = [str(name) for name in dataset["rung_name"].values]
    ended, good = np.asarray(dataset["rung"].values), np.asarray(dataset["good"].values, bool)
    tried = np.asarray(dataset["tried"].transpose("rung_name", "datum").values, bool).sum(1)
    seconds = np.asarray(dataset["seconds"].values, float)
    ax = axes(ax, (7.2, 1.5 + 0.45 * len(rungs)))
    look: dict[str, Any] = {"height": 0.62}
    for place, rung in enumerate(rungs):
        here = [int(np.sum((ended == rung) & which)) for which in (good, ~good)]
        shares = [count / good.size for count in (tried[place], *here)]
        first = place == 0
        ax.barh(place, shares[0], color="#DDDDDD", label="tried" if first else "_", **look)
        named = ("good verdict here", "no good verdict on any rung")
        left = 0.0
        for share, color, label in zip(shares[1:], (BLUE, VERMILION), named, strict=True):
            ax.barh(place, share, left=left, color=color, label=label if first else "_", **look)
            left += share
        text = "none left" if not tried[place] else f"{here[0]} of {tried[place]} good"
        text += f", {seconds[place]:.1f} s" if tried[place] else ""
        ax.text(1.02, place, text, va="center", fontsize="small")
    ax.set_yticks(range(len(rungs)), rungs)
    ax.tick_params(axis="y", length=0)
    ax.set(xlim=(0.0, 1.35), ylim=(len(rungs) - 0.5, -0.5))
    ax.set_xticks(np.linspace(0, 1, 6), [f"{share:.0%}" for share in np.linspace(0, 1, 6)])
    ax.spines["bottom"].set_bounds(0.0, 1.0)
    ax.set_xlabel(f"share of {good.size} data")
    title_and_legend(ax, f"Repair: {good.mean():.0%} of the data have a good verdict", columns=3)
    return ax


def plot_widths(dataset: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Draw the smallest and largest width of a guide beside chains, datum by datum.

    Args:
        dataset: of :class:`pyro_vae.DrawsCheck`.
        ax: where to draw; new axes if None.

    Returns:
        The axes.
    """
    ax = axes(ax, (6.4, 3.6))
    at = np.arange(dataset.sizes["datum"])
    for color, name in zip(CYCLE, ("narrowest", "widest"), strict=False):
        values, errors = dataset[name].values, 1.96 * dataset[f"{name}_se"].values
        ax.errorbar(at, values, errors, fmt="o", ms=4, color=color, label=f"{name} direction")
    width = dataset.attrs["width"]
    ax.axhspan(1 - width, 1 + width, color=GREY, alpha=0.2, lw=0, label="good")
    ax.set_xlabel("datum")
    ax.set_ylabel("standard deviation / that of the posterior")
    good = dataset["good"].values
    title_and_legend(
        ax, f"Draws of the guide are good for {good.mean():.0%} of the data", columns=3
    )
    return ax


def plot_posterior_pair(
    chains: np.ndarray,
    guides: Mapping[str, np.ndarray],
    names: tuple[str, str],
    title: str = "One posterior",
    ax: Axes | None = None,
) -> Axes:
    """Draw two latents of one datum: draws of chains as dots, guides as contours over them.

    The contours hold half and nine tenths of a guide's draws, by a Gaussian kernel density with
    Scott's bandwidth (1992) in the coordinates that make the draws round.

    Args:
        chains: [S, 2], of the exact posterior.
        guides: by name, draws [S', 2].
        names: of the two latents.
        title: which datum, for instance.
        ax: where to draw; new axes if None.

    Returns:
        The axes.

    Raises:
        ValueError: for draws that are not [S, 2] with S of 3 or more, or are not finite.
    """
    draws = {"chains": np.asarray(chains, float)}
    draws |= {name: np.asarray(each, float) for name, each in guides.items()}
    for name, each in draws.items():
        if each.ndim != 2 or each.shape[1] != 2 or len(each) < 3 or not np.isfinite(each).all():
            wanted = "finite draws of shape [S, 2] with S of 3 or more"
            raise ValueError(f"{name}: {wanted} are needed, found {list(each.shape)}")
    ax = axes(ax, (5.6, 5.6))
    dots: dict[str, Any] = {"s": 5, "alpha": 0.35, "linewidths": 0.0, "color": GREY}
    ax.scatter(*draws["chains"].T, label="draws of chains", **dots)
    every = np.concatenate([np.quantile(each, [0.002, 0.998], axis=0) for each in draws.values()])
    low, high = every.min(0), every.max(0)
    margin = 0.06 * (high - low)
    across, up = np.linspace(low - margin, high + margin, _GRID).T
    for color, (name, each) in zip(CYCLE, guides.items(), strict=False):
        points = np.stack(np.meshgrid(across, up), -1).reshape(-1, 2)
        density, at_draws = _density(np.asarray(each, float), points)
        levels = np.unique(np.quantile(at_draws, [1 - share for share in _SHARES]))
        ax.contour(across, up, density.reshape(_GRID, _GRID), levels, colors=[color])
        ax.plot([], [], color=color, label=f"{name} (50%, 90%)")
    ax.set(xlim=(across[0], across[-1]), ylim=(up[0], up[-1]))
    ax.set(xlabel=names[0], ylabel=names[1])
    ax.grid(alpha=0.3)
    handles, _ = ax.get_legend_handles_labels()
    handles[0] = pyplot().Line2D([], [], marker="o", ls="", color=GREY, label="draws of chains")
    title_and_legend(ax, title, columns=1, handles=handles)
    return ax


def _density(draws: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a kernel density of draws [S, 2] at points [P, 2] and at the draws, up to a factor."""
    covariance = np.cov(draws.T) * len(draws) ** (-1 / 3)
    root = np.linalg.inv(np.linalg.cholesky(covariance + 1e-12 * np.trace(covariance) * np.eye(2)))
    whitened = draws @ root.T
    found = []
    for some in (points @ root.T, whitened):
        squared = np.square(some[:, np.newaxis] - whitened).sum(-1)
        found.append(np.exp(-0.5 * squared).mean(1))
    return found[0], found[1]
