"""Figures of results.

Each function draws on the Matplotlib axes it is given, or on new ones, and returns them; none
shows or saves a figure. Where a function takes datasets, that is the ``dataset`` of one
:class:`~pyro_vae.Comparison`, or several of them by name, such as ``{"train": ..., "test": ...}``.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

    from pyro_vae.training.fit_result import FitResult

    Datasets: TypeAlias = xr.Dataset | Mapping[str, xr.Dataset]
    Tables: TypeAlias = pd.DataFrame | Mapping[str, pd.DataFrame]

# Okabe and Ito (2008): told apart under the common kinds of colour blindness.
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BLUE, VERMILION, _, _, _ORANGE, _ = CYCLE
# Petroff (2021): ten colours for categories.
_TEN = (
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)
GREY = "#999999"
_STYLES = ("-", "--", ":", "-.")


def plot_history(result: FitResult, ax: Axes | None = None) -> Axes:
    """Draw the ELBO over the epochs of a fit, with the best validation epoch marked.

    Bands are one standard error. The axis is cut below where the first epochs would flatten all
    the others, and says so.

    Args:
        result: what :func:`pyro_vae.fit` returned.
        ax: where to draw; new axes if None.

    Returns:
        The axes.

    Raises:
        ValueError: if the fit was stopped before its first epoch ended.
    """
    history = {name: np.asarray(values, dtype=float) for name, values in result.history.items()}
    epoch = history["epoch"]
    if epoch.size == 0:
        raise ValueError("nothing to plot: the fit has no finished epoch")
    validation = history.get("validation_elbo", np.full_like(epoch, np.nan))
    ax = axes(ax, (6.4, 4.0))
    _draw_curve(ax, history, "elbo", "training", BLUE)
    title = "ELBO of the training data"
    if np.isfinite(validation).any():
        _draw_curve(ax, history, "validation_elbo", "validation", VERMILION)
        best = int(np.nanargmax(validation))
        label = f"best validation: {number(validation[best])} nats, epoch {epoch[best]:.0f}"
        ax.plot(epoch[best], validation[best], "o", ms=8, mfc="none", mec="black", label=label)
        title = "ELBO of the training and the held-out data"
    clipped = _limit_history(ax, np.concatenate([history["elbo"], validation]))
    ax.set(xlabel=f"epoch ({clipped})" if clipped else "epoch", ylabel="ELBO [nats per datum]")
    ax.locator_params(axis="x", integer=True)
    title_and_legend(ax, title, columns=3)
    return ax


def plot_gaps(
    datasets: Datasets, ax: Axes | None = None, *, summaries: Tables | None = None
) -> Axes:
    """Draw what each guide loses: its approximation gap and its amortization gap, stacked.

    A bar starts at zero, which is log p(x), and ends at log p(x) - ELBO, both means over the
    data. Error bars are one Monte Carlo standard error of the mean. A guide whose gap could not
    be split has one grey bar.

    Args:
        datasets: a comparison's dataset, or several by name.
        ax: where to draw; new axes if None.
        summaries: that of each, or of the one: then errors of means are those of the table, which
            know how skewed the errors of single data are. Else the latter are taken as normal.

    Returns:
        The axes.
    """
    rows = _rows(datasets, summaries)
    ax = axes(ax, (8.0, 1.6 + 0.42 * (rows[-1].position + 1)))
    is_split = [_draw_gap(ax, row) for row in rows]
    _label_rows(ax, rows, lambda row: f"log p(x) = {_mean(row, 'log_evidence')} nats")
    # Numbers stand to the right of the bars.
    low, high = ax.get_xlim()
    ax.set_xlim(low, high + 0.45 * (high - low))
    ax.axvline(0.0, color="black", linewidth=1.0)
    ax.set_xlabel("nats lost per datum, below log p(x)")
    bars = {BLUE: "approximation gap (family)", _ORANGE: "amortization gap (encoder)"}
    bars |= {} if all(is_split) else {GREY: "gap, not split"}
    handles = [_handle(color, label) for color, label in bars.items()]
    title_and_legend(ax, "Where the ELBO loses to log p(x)", columns=3, handles=handles)
    return ax


def plot_gap_distribution(datasets: Datasets, ax: Axes | None = None) -> Axes:
    """Draw the share of the data whose gap log p(x) - ELBO is below a value, for each guide.

    Where some data have an ELBO of minus infinity, their gaps are below no value, and the curve
    ends short of 1.

    Args:
        datasets: a comparison's dataset, or several by name.
        ax: where to draw; new axes if None.

    Returns:
        The axes.
    """
    rows, ax = _rows(datasets), axes(ax, (6.4, 4.2))
    colors = dict(zip(dict.fromkeys(r.guide for r in rows), itertools.cycle(CYCLE), strict=False))
    styles = dict(zip(dict.fromkeys(r.name for r in rows), itertools.cycle(_STYLES), strict=False))
    for row in rows:
        gap = np.asarray(row.dataset["log_evidence"] - row.dataset["elbo"].sel(guide=row.guide))
        known = np.sort(gap[~np.isnan(gap)])
        gap = known[np.isfinite(known)]  # an infinite one is below no value: the curve ends there
        share = np.arange(1, gap.size + 1) / known.size
        ax.step(gap, share, where="post", color=colors[row.guide], linestyle=styles[row.name])
    ax.set_ylim(0.0, 1.02)
    ax.set(xlabel="gap log p(x) − ELBO of a datum [nats]", ylabel="share of the data below")
    ax.grid(alpha=0.3)
    handles = [_handle(color, guide, "-") for guide, color in colors.items()]
    if len(styles) > 1:
        handles += [_handle("black", name, style) for name, style in styles.items()]
    title_and_legend(ax, "The gap, datum by datum", columns=4, handles=handles)
    return ax


def plot_pareto_k(datasets: Datasets, ax: Axes | None = None) -> Axes:
    """Draw a histogram of Pareto k-hat for each guide, with the share above its threshold.

    Above it the tail of the weights is heavy, which matters where it carries weight
    (:mod:`pyro_vae.diagnostics.verdict`).

    Values outside -0.5 to 1.5, infinite ones among them, are counted at the ends. Data without
    an estimate are left out and counted beside.

    Args:
        datasets: a comparison's dataset, or several by name.
        ax: where to draw; new axes if None.

    Returns:
        The axes.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024). Pareto smoothed importance sampling.
        Journal of Machine Learning Research 25(72).
    """
    rows = _rows(datasets)
    ax = axes(ax, (8.0, 1.6 + 0.6 * (rows[-1].position + 1)))
    values = [np.asarray(row.dataset["pareto_k"].sel(guide=row.guide), float) for row in rows]
    width, low, high = 0.05, -0.5, 1.5
    edges = low + width * np.arange(round((high - low) / width) + 1)
    known = [k[~np.isnan(k)] for k in values]
    within = (k.clip(low + width / 2, high - width / 2) for k in known)
    shares = [np.histogram(k, edges)[0] / max(1, k.size) for k in within]
    tallest = max(float(share.max()) for share in shares) or 1.0
    thresholds = [float(row.dataset.attrs["pareto_k_threshold"]) for row in rows]
    for row, k, all_k, share, at in zip(rows, known, values, shares, thresholds, strict=True):
        colors = [BLUE if edge < at - width / 2 else VERMILION for edge in edges[:-1]]
        bottom = row.position + 0.42
        # The axis of rows points down, the bars up.
        ax.bar(edges[:-1], -0.8 * share / tallest, width, bottom, align="edge", color=colors)
        ax.hlines(bottom, low, high, color="black", linewidth=0.6)
        text = f"{np.mean(k > at):.1%} above" if k.size else "none known"
        if k.size < all_k.size:
            text += f"\n{all_k.size - k.size} of {all_k.size} unknown"
        ax.text(high + 0.04, row.position + 0.1, text, va="center", fontsize="small")
    _label_rows(ax, rows, lambda row: f"{row.dataset.sizes['datum']} data")
    names = " or ".join(f"{at:.2f}" for at in sorted(set(thresholds)))
    for at in sorted(set(thresholds)):
        ax.axvline(at, color="black", linestyle="--", linewidth=1.0)
    ax.set_xlim(low - width, high + 0.45)
    ticks = {-0.5: "≤ −0.5", 0.0: "0", 0.5: "0.5", 1.0: "1", 1.5: "≥ 1.5"}
    ax.set_xticks(list(ticks), list(ticks.values()))
    ax.set_xlabel("Pareto k-hat of a datum's importance weights")
    heavy = _handle(VERMILION, f"above {names}: a heavy tail")
    handles = [_handle(BLUE, f"up to {names}"), heavy]
    title_and_legend(ax, "How heavy is the tail of the weights?", columns=2, handles=handles)
    return ax


def plot_latents(
    means: np.ndarray, labels: np.ndarray | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the posterior means of the data, on their two principal components if L > 2.

    Args:
        means: [N, L], with L >= 2.
        labels: [N], a class for each datum, for the colours.
        ax: where to draw; new axes if None.

    Returns:
        The axes.

    Raises:
        ValueError: if ``means`` is not [N, L] with N >= 2 and L >= 2, or ``labels`` not [N].
    """
    means = np.asarray(means, dtype=float)
    if means.ndim != 2 or min(means.shape) < 2:
        wanted = "[N, L] with N and L of 2 or more"
        raise ValueError(f"means: wanted shape {wanted}, found {list(means.shape)}")
    if labels is not None and np.shape(labels) != (len(means),):
        raise ValueError(f"labels: wanted shape [{len(means)}], found {list(np.shape(labels))}")
    points, names = _two_dimensions(means)
    ax = axes(ax, (6.4, 5.4))
    dots: dict[str, Any] = {"s": 14, "alpha": 0.8, "linewidths": 0.0}
    if labels is None:
        ax.scatter(*points.T, color=BLUE, **dots)
    else:
        classes = np.unique(labels)
        colors: Sequence[Any] = _TEN
        if len(classes) > len(_TEN):  # so many are ordered, not told apart
            colors = pyplot().get_cmap("viridis")(np.linspace(0.0, 1.0, len(classes)))
        for color, label in zip(colors, classes, strict=False):
            ax.scatter(*points[labels == label].T, color=color, label=str(label), **dots)
        columns = 1 + (len(classes) - 1) // 20
        look: dict[str, Any] = {"ncols": columns, "frameon": False, "markerscale": 2.0}
        ax.legend(title="label", loc="center left", bbox_to_anchor=(1.0, 0.5), **look)
    # One unit is as long on both axes: distances can be read.
    ax.set_aspect("equal", adjustable="datalim")
    ax.set(xlabel=names[0], ylabel=names[1])
    ax.grid(alpha=0.3)
    ax.set_title("Posterior means of the latents", loc="left")
    return ax


class _Mean(NamedTuple):
    value: float
    std_error: float

    @property
    def error(self) -> float | None:
        """The standard error; None where it is not known, or zero."""
        return self.std_error if np.isfinite(self.std_error) and self.std_error > 0.0 else None

    def __str__(self) -> str:
        if self.error is None:
            return number(self.value)
        # To the first digit of the standard error, and never fewer than two decimals.
        digits = max(2, min(6, -int(np.floor(np.log10(self.error)))))
        return f"{number(self.value, digits)} ± {number(self.error, digits)}"


def _mean(row: _Row, name: str) -> _Mean:
    """Average over the data; draws of different data are independent."""
    of_guide = row.dataset[name]
    if "guide" in of_guide.dims:
        of_guide = of_guide.sel(guide=row.guide)
    value, error = float(of_guide.mean(skipna=False)), np.nan
    if row.table is not None:
        error = row.table.loc[row.guide].to_dict().get(f"{name}_se", np.nan)
    elif f"{name}_se" in row.dataset:
        found = row.dataset[f"{name}_se"]
        errors = found.sel(guide=row.guide) if "guide" in found.dims else found
        error = float(np.sqrt((np.asarray(errors, dtype=float) ** 2).sum()) / errors.size)
    return _Mean(value, error)


def _two_dimensions(means: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Return the points [N, 2] and what their two coordinates are."""
    if means.shape[1] == 2:
        return means, ["latent 1", "latent 2"]
    centered = means - means.mean(axis=0)
    _, singular, directions = np.linalg.svd(centered, full_matrices=False)
    total = (singular**2).sum()
    share = singular**2 / total if total > 0.0 else np.zeros_like(singular)
    of = f"of {means.shape[1]} latents"
    names = [f"principal component {i + 1} {of} ({share[i]:.0%} of the variance)" for i in (0, 1)]
    return centered @ directions[:2].T, names


class _Row(NamedTuple):
    position: float
    name: str
    dataset: xr.Dataset
    guide: str
    is_first: bool
    table: pd.DataFrame | None = None


def _rows(datasets: Datasets, summaries: Tables | None = None) -> list[_Row]:
    """Give each guide of each dataset a row, and leave a row for a heading above them."""
    rows, position = [], 0.0
    # A Dataset is a Mapping too, of its variables.
    named = {"": datasets} if hasattr(datasets, "data_vars") else datasets
    tables = {"": summaries} if hasattr(summaries, "columns") else summaries or {}
    for name, dataset in cast("Mapping[str, xr.Dataset]", named).items():
        for index, guide in enumerate(map(str, dataset["guide"].values)):
            position += 1.0
            table = cast("Mapping[str, pd.DataFrame]", tables).get(name)
            rows.append(_Row(position, name, dataset, guide, index == 0, table))
        position += 1.0
    if not rows:
        raise ValueError("nothing to plot: no dataset, or none with a guide")
    return rows


def pyplot() -> ModuleType:
    """Return matplotlib.pyplot, or raise ImportError with the way to install it."""
    try:
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "pyro-vae[plots]"') from error


def axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Return axes to draw on: new ones of a size in inches where none are given.

    Raises:
        TypeError: for what is no Axes, such as a figure or an array of subplots.
    """
    if ax is None:
        _, ax = pyplot().subplots(figsize=size, layout="constrained")
    elif not hasattr(ax, "spines"):
        raise TypeError(
            f"ax={type(ax).__name__}: one Matplotlib Axes is needed, as plt.subplots() returns it "
            "beside its figure; of an array of them pass one entry"
        )
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def title_and_legend(
    ax: Axes, title: str, *, columns: int, handles: Sequence[Artist] | None = None
) -> None:
    """Put the legend between the title and the axes, where no data can be."""
    handles = ax.get_legend_handles_labels()[0] if handles is None else handles
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "frameon": False}
    legend = ax.legend(handles=handles, ncols=columns, fontsize="small", borderaxespad=0.2, **place)
    ax.set_title(title, loc="left", pad=8 + 15 * (-(-len(legend.get_texts()) // columns)))


def _label_rows(ax: Axes, rows: list[_Row], describe: Callable[[_Row], str]) -> None:
    """Name the guide of each row, and head the rows of each dataset."""
    ax.set_yticks([row.position for row in rows], [row.guide for row in rows])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(rows[-1].position + 0.6, -0.1)
    look: dict[str, Any] = {"va": "center", "fontsize": "small", "fontweight": "bold"}
    for row in rows:
        if row.is_first:
            text = f"{row.name}: {describe(row)}".removeprefix(": ")
            ax.text(0.01, row.position - 0.72, text, transform=ax.get_yaxis_transform(), **look)


def _draw_gap(ax: Axes, row: _Row) -> bool:
    """Draw a guide's bar and its numbers; return whether the gap could be split in two."""
    names = {BLUE: "approximation_gap", _ORANGE: "amortization_gap"}
    parts = {color: _mean(row, name) for color, name in names.items()}
    is_split = all(np.isfinite(mean.value) for mean in parts.values())
    if not is_split:
        evidence, elbo = _mean(row, "log_evidence"), _mean(row, "elbo")
        error = float(np.hypot(evidence.std_error, elbo.std_error))
        parts = {GREY: _Mean(evidence.value - elbo.value, error)}
    end = rightmost = 0.0
    look: dict[str, Any] = {"height": 0.62, "error_kw": {"capsize": 3, "elinewidth": 1.0}}
    for color, mean in parts.items():
        if not np.isfinite(mean.value):  # no bar is as long: the number beside says it
            continue
        ax.barh(row.position, mean.value, left=end, xerr=mean.error, color=color, **look)
        end += mean.value
        rightmost = max(rightmost, end + (mean.error or 0.0))
    text, beside = " + ".join(map(str, parts.values())), (rightmost, row.position)
    ax.annotate(text, beside, (7, 0), textcoords="offset points", va="center", fontsize="small")
    return is_split


def _draw_curve(
    ax: Axes, history: Mapping[str, np.ndarray], name: str, label: str, color: str
) -> None:
    """Draw a quantity of the history, with a band of one standard error where it has one."""
    known = np.isfinite(history[name])
    epoch, value = (history[each][known] for each in ("epoch", name))
    # A single epoch makes no line.
    ax.plot(epoch, value, color=color, label=label, marker="." if epoch.size < 30 else None)
    if (errors := history.get(f"{name}_std_error")) is not None:
        error = errors[known]
        ax.fill_between(epoch, value - error, value + error, color=color, alpha=0.2, linewidth=0)


def _limit_history(ax: Axes, elbo: np.ndarray) -> str:
    """Cut the axis below the first epochs if they would flatten the others, and say so."""
    elbo = elbo[np.isfinite(elbo)]
    ax.grid(alpha=0.3)
    if elbo.size == 0:
        return ""
    highest, lowest = elbo.max(), elbo.min()
    bottom = highest - 2.0 * (highest - np.quantile(elbo, 0.15))
    if lowest >= bottom or bottom >= highest:
        return ""
    ax.set_ylim(bottom, highest + 0.06 * (highest - bottom))
    return f"the ELBO axis is cut; its lowest value is {number(lowest)} nats"


def _handle(color: str, label: str, style: str | None = None) -> Artist:
    """Return an entry of a legend: a patch, or a line of some style."""
    if style is None:
        return pyplot().Rectangle((0, 0), 1, 1, color=color, label=label)
    return pyplot().Line2D([], [], color=color, linestyle=style, label=label)


def number(value: float, digits: int = 2) -> str:
    """Return a number in words of a figure."""
    # A minus sign as on the ticks, and no "-0.00".
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")
