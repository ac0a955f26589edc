"""Figures of outliers: which data are drawn where, and what is left out."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

matplotlib = pytest.importorskip("matplotlib")

from pyro_vae.plots.outliers import plot_outliers  # noqa: E402


def dataset(*, with_distance=True, far=9.0):
    columns = {
        "distance": ("datum", [1.0, 2.0, far]),
        "calibration_distance": ("calibration", [1.0, 1.5, 2.0, 2.5]),
        "predictive": ("datum", [0.1, -1.0, -40.0]),
        "calibration_predictive": ("calibration", [0.5, -0.5, 0.0, 1.0]),
        "log_evidence": ("datum", [-10.0, -np.inf, -90.0]),
        "calibration_log_evidence": ("calibration", [-9.0, -10.0, -11.0, -12.0]),
        "outlier": ("datum", [False, False, True]),
    }
    if not with_distance:
        columns = {name: each for name, each in columns.items() if "distance" not in name}
    return xr.Dataset(columns, attrs={"level": 0.05, "exact": 1})


def test_draws_calibration_data_ordinary_ones_and_outliers():
    ax = plot_outliers(dataset())
    old, ordinary, strange, _ = ax.lines
    assert old.get_xdata().tolist() == [1.0, 1.5, 2.0, 2.5]
    assert (ordinary.get_xdata().tolist(), ordinary.get_ydata().tolist()) == ([1.0], [-10.0])
    assert (strange.get_xdata().tolist(), strange.get_ydata().tolist()) == ([9.0], [-90.0])
    assert ax.get_xscale() == "linear"
    said = [text.get_text() for text in ax.get_legend().get_texts()]
    assert "1 without a finite score are left out" in said
    assert ax.get_title("left") == "1 of 3 data are outliers at level 0.05"
    matplotlib.pyplot.close("all")


def test_an_axis_with_data_far_out_is_logarithmic():
    assert plot_outliers(dataset(far=1000.0)).get_xscale() == "symlog"
    ax = plot_outliers(dataset(with_distance=False))
    assert ax.get_xscale() == "symlog"
    assert ax.get_xlabel() == "log likelihood, sd above replicas"
    matplotlib.pyplot.close("all")


def test_refuses_another_dataset():
    with pytest.raises(ValueError, match="has no outlier"):
        plot_outliers(xr.Dataset())
