"""Figures of diagnostics: bounds against K, k-hat against the gap, rates, aggregate posteriors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pyro_vae.plots.results import BLUE, CYCLE, GREY, VERMILION, axes, title_and_legend

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.axes import Axes

_FEWEST_GROUPS = 8  # of particles, from which on their spread tells an error
_NAMED = 12  # units that a figure names


def plot_bounds(
    log_weights: np.ndarray | Mapping[str, np.ndarray],
    exact: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""Draw the importance-weighted bound against its number of particles, mean over the data.

    .. math:: \mathbb{E} \log \frac{1}{k} \sum_{i=1}^k w_i, \qquad k = 1, 2, 4, \dots, K

    from log weights of K particles of each datum, cut into groups of k: the first is the ELBO.
    Bars are one standard error: from the spread of eight groups or more, else by the delta method.
    A curve that still rises at its end says that K is too small, or the guide too far.

    Args:
        log_weights: [K, N] in nats, as of ``pv.log_weights(...).total.numpy()``; several by name.
        exact: log p(x), mean over the data, where it is known.
        ax: where to draw; new axes if None.

    Returns:
        The axes.

    Raises:
        ValueError: for arrays that are not [K, N] with K of 2 or more.

    References:
        Burda, Grosse & Salakhutdinov (2016). Importance weighted autoencoders. ICLR.
    """
    named = log_weights if isinstance(log_weights, Mapping) else {"": log_weights}
    ax = axes(ax, (6.4, 4.2))
    for color, (name, each) in zip(itertools.cycle(CYCLE), named.items(), strict=False):
        weights = np.asarray(each, dtype=float)
        if weights.ndim != 2 or len(weights) < 2:
            wanted = "log weights of shape [K, N] with K of 2 or more"
            raise ValueError(f"{name or 'log_weights'}: {wanted}, found {list(weights.shape)}")
        counts = [2**i for i in range(int(np.log2(len(weights))) + 1)]
        counts += [len(weights)] if counts[-1] < len(weights) else []
        points = np.array([_bound(weights, count) for count in counts])
        look: dict[str, Any] = {"color": color, "marker": "o", "ms": 4, "capsize": 2}
        ax.errorbar(counts, points[:, 0], points[:, 1], label=name or "_", **look)
    if exact is not None:
        ax.axhline(exact, color="black", linewidth=0.8, label="the exact log p(x)")
    ax.set_xscale("log", base=2)
    ax.grid(alpha=0.3)
    ax.set(xlabel="particles k (1: the ELBO)", ylabel="IWAE-k bound [nats per datum]")
    title_and_legend(ax, "Bounds on log p(x) by the number of particles", columns=2)
    return ax


def _bound(log_weights: np.ndarray, count: int) -> tuple[float, float]:
    """Return the mean over the data of the bound of ``count`` particles, and its error."""
    num_groups, num_data = len(log_weights) // count, log_weights.shape[1]
    groups = log_weights[: num_groups * count].reshape(num_groups, count, num_data)
    highest = groups.max(1, keepdims=True)
    highest = np.where(np.isneginf(highest), 0.0, highest)
    weights = np.exp(groups - highest)
    with np.errstate(divide="ignore", invalid="ignore"):  # of weights that are all zero
        values = np.log(weights.mean(1)) + highest[:, 0]
        if num_groups >= _FEWEST_GROUPS or count == 1:
            variance = values.var(0, ddof=1) / num_groups
        else:  # of each group the relative variance of its mean weight
            relative = weights.var(1, ddof=1) / count / np.square(weights.mean(1))
            variance = relative.mean(0) / num_groups
    return float(values.mean()), float(np.sqrt(variance.sum()) / num_data)


def plot_pareto_k_against_gap(dataset: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Draw k-hat of each datum against its gap log p(x) - ELBO, for each guide.

    Where the two go together, weights fail on the data that the guide serves worst. A small gap
    beside a high k-hat is a light tail, or a tail that no draw has reached; hollow data have no
    good verdict on their weights.

    Args:
        dataset: that of a :class:`~pyro_vae.Comparison`.
        ax: where to draw; new axes if None.

    Returns:
        The axes.
    """
    ax = axes(ax, (6.4, 4.4))
    lost = 0
    for color, guide in zip(itertools.cycle(CYCLE), dataset["guide"].values, strict=False):
        one = dataset.sel(guide=guide)
        gap = np.asarray((dataset["log_evidence"] - one["elbo"]).values, float)
        k_hat, good = np.asarray(one["pareto_k"].values, float), np.asarray(one["good"].values)
        known = np.isfinite(gap) & np.isfinite(k_hat)
        lost += int((~known).sum())
        for some, inside in ((known & good, color), (known & ~good, "none")):
            look: dict[str, Any] = {"s": 18, "facecolors": inside, "edgecolors": color}
            ax.scatter(gap[some], k_hat[some], linewidths=0.8, **look)
        ax.plot([], [], "o", ls="", color=color, ms=5, label=str(guide))
    ax.plot([], [], "o", ls="", mfc="none", mec="black", ms=5, label="no good verdict")
    if lost:
        ax.plot([], [], ls="", label=f"{lost} without a finite gap and k-hat are left out")
    ax.axhline(dataset.attrs["pareto_k_threshold"], color="black", linestyle="--", linewidth=1.0)
    ax.axvline(0.0, color="black", linewidth=0.6)
    ax.grid(alpha=0.3)
    ax.set(xlabel="gap log p(x) − ELBO of a datum [nats]", ylabel="Pareto k-hat of its weights")
    title_and_legend(ax, "Do weights fail where the guide is far?", columns=2)
    return ax


def plot_rate_distortion(
    summaries: pd.DataFrame | Mapping[str, pd.DataFrame], ax: Axes | None = None
) -> Axes:
    """Draw models in the plane of rate and distortion, with lines of equal code length.

    Rate is what the latents carry, distortion what is left to code given them; their sum is the
    code length, minus the ELBO. On a line models are equally good, and differ in how much they
    leave to the latents (Alemi et al. 2018). Bars are one standard error.

    Args:
        summaries: ``summary()`` of a :class:`~pyro_vae.RateDistortion`, or several by name.
        ax: where to draw; new axes if None.

    Returns:
        The axes.

    References:
        Alemi, Poole, Fischer, Dillon, Saurous & Murphy (2018). Fixing a broken ELBO. ICML.
    """
    tables = {"": summaries} if hasattr(summaries, "columns") else summaries
    named = cast("Mapping[str, pd.DataFrame]", tables)
    ax = axes(ax, (5.6, 5.0))
    points = []
    for color, (name, table) in zip(itertools.cycle(CYCLE), named.items(), strict=False):
        numbers = table.loc[["rate", "distortion"], ["nats", "nats_se"]].to_numpy(dtype=float)
        (rate, rate_se), (distortion, distortion_se) = numbers.tolist()
        points.append((rate, distortion))
        look: dict[str, Any] = {"color": color, "capsize": 2, "label": name or "_"}
        ax.errorbar(rate, distortion, distortion_se, rate_se, fmt="o", **look)
    every = np.array(points)
    span = max(1e-3, *np.ptp(every, axis=0), 0.25 * float(every[:, 0].max()))
    low, high = every.min(0) - 0.4 * span, every.max(0) + 0.4 * span
    low[0] = max(low[0], min(0.0, every[:, 0].min()))
    ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    _draw_equal_lengths(ax, every.sum(1))
    ax.set(xlabel="rate [nats per datum]", ylabel="distortion [nats per datum]")
    title_and_legend(ax, "Rate and distortion; lines: equal code length", columns=2)
    return ax


def _draw_equal_lengths(ax: Axes, lengths: np.ndarray) -> None:
    """Draw a line through each point, along which the code length is the same."""
    for length in np.unique(np.round(lengths, 6)):
        ax.axline((0.0, length), slope=-1.0, color=GREY, linewidth=0.8, linestyle=":", zorder=0)


def plot_aggregate_posterior(dataset: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Draw how far the aggregate posterior of each unit is shifted from the prior, and how wide.

    A unit at (0, 1) has the prior's mean and standard deviation. Units whose test rejects
    (adjusted p below 0.05) are red, and the first twelve of them named. Bars are one standard
    error.

    Args:
        dataset: that of an :class:`~pyro_vae.AggregatePosterior`.
        ax: where to draw; new axes if None.

    Returns:
        The axes.
    """
    shift, shift_se, spread, spread_se, p_value = (
        np.asarray(dataset[name].values, float)
        for name in ("shift", "shift_se", "spread", "spread_se", "adjusted_p_value")
    )
    ax = axes(ax, (6.0, 5.0))
    off = p_value < 0.05
    labels = {False: "as the prior", True: "differs (adjusted p < 0.05)"}
    for differs, color in ((False, BLUE), (True, VERMILION)):
        some = off == differs
        look: dict[str, Any] = {"fmt": "o", "ms": 4, "color": color, "elinewidth": 0.8}
        label = f"{labels[differs]}: {some.sum()} of {off.size}"
        ax.errorbar(shift[some], spread[some], spread_se[some], shift_se[some], label=label, **look)
    for place in np.flatnonzero(off)[np.argsort(p_value[off], kind="stable")][:_NAMED]:
        name = str(dataset["unit"].values[place])
        at = (shift[place], spread[place])
        ax.annotate(name, at, (4, 4), textcoords="offset points", fontsize="small")
    ax.axvline(0.0, color="black", linewidth=0.6, zorder=0)
    ax.axhline(1.0, color="black", linewidth=0.6, zorder=0)
    ax.grid(alpha=0.3)
    ax.set(
        xlabel="shift of the mean [standard deviations of the prior]",
        ylabel="standard deviation / that of the prior",
    )
    joint = f"joint p = {float(dataset['joint_p_value']):.3g}"
    title_and_legend(ax, f"Aggregate posterior and prior: {joint}", columns=2)
    return ax
