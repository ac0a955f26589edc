"""Figures of outliers: strange data over those that they are compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vae.plots.results import BLUE, GREY, VERMILION, axes, title_and_legend

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

_LABELS = {
    "distance": "distance of the encoder's features",
    "log_evidence": "log p(x) [nats]",
    "predictive": "log likelihood, sd above replicas",
}
_WIDE = 20.0  # times the calibration data's median, beyond which the axis is logarithmic


def plot_outliers(dataset: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Draw two scores of each datum over those of the calibration data.

    Distance of features, or else what replicas say, across, on a logarithmic axis where a few data
    are far from the rest; log p(x) up.

    Args:
        dataset: that of :class:`~pyro_vae.Outliers`.
        ax: where to draw; new axes if None.

    Returns:
        The axes.

    Raises:
        ValueError: for another dataset.
    """
    if "outlier" not in dataset:
        raise ValueError("the dataset has no outlier: that of Outliers has")
    across = "distance" if "distance" in dataset else "predictive"
    ax = axes(ax, (6.4, 4.6))
    dot: dict[str, Any] = {"ls": "", "marker": "o", "mew": 0.0}
    names = (across, "log_evidence")
    old = [np.asarray(dataset[f"calibration_{name}"], float) for name in names]
    new = [np.asarray(dataset[name], float) for name in names]
    outlier = np.asarray(dataset["outlier"], bool)
    shown = np.isfinite(new).all(0)
    kind = "calibration" if dataset.attrs["exact"] else "training"
    ax.plot(*old, color=GREY, ms=3, alpha=0.5, label=f"{kind} data ({len(old[0])})", **dot)
    for some, color, label in ((~outlier, BLUE, "ordinary"), (outlier, VERMILION, "outliers")):
        points = [each[some & shown] for each in new]
        ax.plot(*points, color=color, ms=4, label=f"{label} ({some.sum()})", **dot)
    if lost := int((~shown).sum()):
        ax.plot([], [], ls="", label=f"{lost} without a finite score are left out")
    far = np.abs(np.concatenate([old[0], new[0][shown]]))
    if far.max() > _WIDE * np.median(np.abs(old[0])):
        ax.set_xscale("symlog", linthresh=float(np.median(np.abs(old[0]))))
    ax.set(xlabel=_LABELS[across], ylabel=_LABELS["log_evidence"])
    ax.grid(alpha=0.3)
    level = float(dataset.attrs["level"])
    title = f"{outlier.sum()} of {outlier.size} data are outliers at level {level:g}"
    title_and_legend(ax, title, columns=3)
    return ax
