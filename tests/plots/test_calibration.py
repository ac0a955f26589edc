"""Figures of calibration: drawn curves, bands and words against the numbers they are of."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import xarray as xr

matplotlib.use("Agg")

from matplotlib import colors
from matplotlib import pyplot as plt

from pyro_vae import plots

LEVEL = np.array([0.25, 0.5, 0.75])


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def ranks(p_values=(0.5, 1e-3), counts=(100, 100)):
    names = [f"q{k}" for k in range(len(p_values))]
    curves = np.outer(np.arange(1, len(names) + 1), [0.01, 0.02, 0.01])
    halves = 1 / np.sqrt(np.array(counts))[:, None] * np.ones(3)
    return xr.Dataset(
        {
            "num_ranks": ("quantity", np.array(counts)),
            "p_value": ("quantity", np.array(p_values)),
            "ecdf_difference": (("quantity", "level"), curves),
            "band_lower": (("quantity", "level"), -halves),
            "band_upper": (("quantity", "level"), halves),
        },
        coords={"quantity": names, "level": LEVEL},
        attrs={"error_rate": 0.05},
    )


def curves(ax):
    """Return label, colour and heights of every curve."""
    lines = (line for line in ax.lines if len(line.get_xdata()) == 3)
    return [
        (line.get_label(), colors.to_hex(line.get_color()), line.get_ydata().tolist())
        for line in lines
    ]


def test_curves_that_leave_the_band_are_named():
    dataset = ranks()
    ax = plots.plot_ranks(dataset)
    heights = dataset["ecdf_difference"].values.tolist()
    assert curves(ax) == [
        ("q1", "#d55e00", heights[1]),
        ("1 inside the band", "#999999", heights[0]),
    ]
    (band,) = ax.collections
    assert band.get_paths()[0].get_extents().y1 == pytest.approx(0.1)
    title = ax.get_title(loc="left")
    assert title == "Simulation-based calibration: 1 of 2 quantities leave the band"
    ax = plots.plot_ranks(ranks((0.03, 0.5)))  # 0.03 is above 0.05 / 2
    assert ax.get_title(loc="left") == "Simulation-based calibration: calibrated"


def test_fewer_ranks_have_a_band_of_their_own():
    ax = plots.plot_ranks(ranks(counts=(100, 25)))
    tops = sorted(band.get_paths()[0].get_extents().y1 for band in ax.collections)
    assert tops == pytest.approx([0.1, 0.2])


def test_of_many_the_furthest_are_named():
    ax = plots.plot_ranks(ranks(tuple(1e-9 * (20 - k) for k in range(20)), (100,) * 20))
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["q19", "q18", "q17", "q16", "q15", "q14", "and 14 more"]


def coverage(p_values=(0.5, 1e-3)):
    return xr.Dataset(
        {
            "p_value": ("region", np.array(p_values)),
            "expected_coverage": (("region", "level"), np.array([LEVEL + 0.01, LEVEL - 0.2])),
            "band_lower": (("region", "level"), np.array([LEVEL - 0.05] * 2)),
            "band_upper": (("region", "level"), np.array([LEVEL + 0.05] * 2)),
        },
        coords={"region": ["density", "TARP"], "level": LEVEL},
        attrs={"error_rate": 0.05},
    )


def test_coverage_against_level():
    ax = plots.plot_coverage(coverage())
    assert curves(ax) == [
        ("regions of highest density", "#0072b2", (LEVEL + 0.01).tolist()),
        ("balls around reference points, not calibrated", "#d55e00", (LEVEL - 0.2).tolist()),
    ]
    assert ax.get_title(loc="left") == "Expected coverage: not calibrated"
    ax = plots.plot_coverage(coverage((0.5, 0.03)))
    assert ax.get_title(loc="left") == "Expected coverage: calibrated"


@pytest.mark.parametrize("plot", [plots.plot_ranks, plots.plot_coverage])
def test_another_dataset_is_refused(plot):
    with pytest.raises(ValueError, match="the dataset has no"):
        plot(xr.Dataset({"x": ("datum", [1.0])}))
