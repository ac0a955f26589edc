"""Figures of models compared with one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vae.plots.results import BLUE, GREY, axes, number, title_and_legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_model_differences(
    table: Mapping[str, np.ndarray],
    models: Sequence[str],
    reference: str,
    *,
    num_data: int,
    ax: Axes | None = None,
) -> Axes:
    """Draw how far each model's mean log p(x) is from that of a reference, with two errors.

    A thick bar is two Monte Carlo standard errors, for these data; a thin one two standard errors
    over data, for new ones. A hollow dot is that of a model with data whose bound is not to be
    trusted.

    Args:
        table: columns [M] of :meth:`pyro_vae.ModelComparison.summary`, by name.
        models: their names, [M].
        reference: the name of the one that differences are from.
        num_data: how many data they are means over.
        ax: where to draw; new axes if None.

    Returns:
        The axes.
    """
    ax = axes(ax, (7.2, 1.5 + 0.45 * len(models)))
    names = ("difference", "difference_se", "difference_se_new")
    difference, inner, outer = (np.asarray(table[name], float) for name in names)
    hollow = np.asarray(table["untrusted"]) > 0
    place = np.arange(len(models))
    thin: dict[str, Any] = {"ls": "", "color": GREY, "elinewidth": 1.5, "capsize": 3}
    shown = np.isfinite(difference)
    outer, inner = np.nan_to_num(2 * outer), np.nan_to_num(2 * inner)
    where = place[shown]
    handles: list[Any] = [
        ax.errorbar(difference[shown], where, xerr=error[shown], label=label, **look)
        for error, label, look in (
            (outer, "± 2 standard errors, new data", thin),
            (inner, "± 2 Monte Carlo errors, these data", {**thin, "color": BLUE, "elinewidth": 5}),
        )
    ]
    dot: dict[str, Any] = {"marker": "o", "ls": "", "ms": 6, "color": BLUE, "zorder": 4}
    ax.plot(difference[shown & ~hollow], place[shown & ~hollow], **dot)
    some = shown & hollow
    if hollow.any():
        label = "bounds not to be trusted"
        handles += ax.plot(difference[some], place[some], mfc="white", label=label, **dot)
    for at, text in zip(place, table["verdict"], strict=True):
        ax.annotate(
            str(text), (1.02, at), xycoords=("axes fraction", "data"), va="center", fontsize="small"
        )
    ax.axvline(0.0, color="black", linewidth=0.8, zorder=0)
    ax.set_yticks(place, models)
    ax.set_ylim(len(models) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", alpha=0.3)
    ax.set_xlabel(f"log p(x), nats per datum from {reference!r}")
    best = float(np.asarray(table["log_evidence"], float)[list(models).index(reference)])
    title = f"{num_data} held-out data: {reference!r} at {number(best)} nats per datum"
    title_and_legend(ax, title, columns=2, handles=handles)
    return ax
