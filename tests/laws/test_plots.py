"""Every figure is one Matplotlib Axes, yours or new: functions of plots, and .plot of results."""

from __future__ import annotations

import inspect

import matplotlib
import pytest

matplotlib.use("Agg")

from matplotlib import pyplot as plt

import pyro_vae as pv
from pyro_vae import diagnostics, evaluation, missing_data, plots, sampling, training
from tests.report.cases import comparison_dataset, models_dataset, outliers_dataset

FUNCTIONS = {name: getattr(plots, name) for name in plots.__all__}
FOLDERS = (diagnostics, evaluation, missing_data, sampling, training, pv)
RESULTS = {
    each.__name__: each.plot
    for folder in FOLDERS
    for each in map(folder.__dict__.get, folder.__all__)
    if inspect.isclass(each) and hasattr(each, "plot")
}


def test_none_is_left_out():
    assert len(FUNCTIONS) > 15
    assert {"Comparison", "Repair", "Imputation", "Calibration", "RateDistortion"} <= set(RESULTS)


@pytest.mark.parametrize("name", [*FUNCTIONS, *RESULTS])
def test_axes_in_and_axes_out(name):
    signature = inspect.signature({**FUNCTIONS, **RESULTS}[name])
    assert signature.return_annotation == "Axes"
    assert signature.parameters["ax"].annotation == "Axes | None"
    assert signature.parameters["ax"].default is None


DRAWN = {
    "plot_gaps": lambda ax: plots.plot_gaps(comparison_dataset(), ax=ax),
    "plot_pareto_k": lambda ax: plots.plot_pareto_k(comparison_dataset(), ax=ax),
    "plot_outliers": lambda ax: plots.plot_outliers(outliers_dataset(), ax=ax),
    "ModelComparison": lambda ax: pv.evaluation.ModelComparison(
        models_dataset({"a": 0.0, "b": 1.0})
    ).plot(ax=ax),
}


@pytest.mark.parametrize("name", DRAWN)
def test_the_axes_are_the_given_ones(name):
    figure, both = plt.subplots(1, 2)
    assert DRAWN[name](both[1]) is both[1] and not both[0].has_data()
    assert isinstance(DRAWN[name](None), plt.Axes)
    for wrong in (both, figure, [both[0]]):
        with pytest.raises(TypeError, match="one Matplotlib Axes is needed"):
            DRAWN[name](wrong)
    plt.close("all")
