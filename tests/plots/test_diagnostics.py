"""Figures of diagnostics show the numbers that they are given."""

from __future__ import annotations

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from matplotlib import pyplot as plt
from scipy.special import logsumexp

import pyro_vae as pv
from pyro_vae import plots
from tests.report.cases import comparison_dataset
from tests.test_markup import guide, model

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def points(ax, number=0):
    """The points of errorbars, and the half lengths of their vertical bars."""
    line, _, bars = ax.containers[number]
    lengths = [(ends[1, 1] - ends[0, 1]) / 2 for ends in bars[-1].get_segments()]
    return np.stack([np.asarray(each, float) for each in line.get_data()]), np.array(lengths)


def test_bounds_by_the_number_of_particles():
    log_weights = np.random.default_rng(0).normal(size=(100, 3)) - 5.0
    ax = plots.plot_bounds(log_weights, exact=-4.5)
    (counts, values), errors = points(ax)
    assert counts.tolist() == [1, 2, 4, 8, 16, 32, 64, 100]
    np.testing.assert_allclose(values[0], log_weights.mean())
    np.testing.assert_allclose(values[-1], (logsumexp(log_weights, 0) - np.log(100)).mean())
    wanted = logsumexp(log_weights[:96].reshape(6, 16, 3), 1) - np.log(16)
    np.testing.assert_allclose(values[4], wanted.mean())
    np.testing.assert_allclose(errors[0], np.sqrt((log_weights.var(0, ddof=1) / 100).sum()) / 3)
    weights = np.exp(log_weights)
    relative = weights.var(0, ddof=1) / 100 / weights.mean(0) ** 2
    np.testing.assert_allclose(errors[-1], np.sqrt(relative.sum()) / 3)
    assert legend(ax) == ["the exact log p(x)"]


def test_errors_of_bounds_are_those_of_repetition():
    """60 repetitions: their spread is the error within 35%, about four errors of a spread."""
    generator = np.random.default_rng(1)
    found = []
    for _ in range(60):
        found.append(points(plots.plot_bounds(0.7 * generator.normal(size=(256, 4)))))
        plt.close("all")
    spread = np.std([each[0][1] for each in found], axis=0, ddof=1)
    errors = np.sqrt(np.mean([np.square(each[1]) for each in found], axis=0))
    assert (np.abs(spread / errors - 1) < 0.35).all()


def test_bounds_of_several_guides():
    one = np.zeros((4, 2))
    assert legend(plots.plot_bounds({"a": one, "b": one - np.inf})) == ["a", "b"]
    with pytest.raises(ValueError, match=r"b: log weights of shape \[K, N\] .* found \[4\]"):
        plots.plot_bounds({"a": one, "b": np.zeros(4)})
    with pytest.raises(ValueError, match="log_weights: log weights"):
        plots.plot_bounds(np.zeros((1, 4)))


def test_k_hat_against_the_gap():
    dataset = comparison_dataset(encoder=2.0, heavy=8)
    dataset["pareto_k"][0, 39] = np.inf
    ax = plots.plot_pareto_k_against_gap(dataset)
    good, bad = (ax.collections[i].get_offsets() for i in (0, 1))
    assert (len(good), len(bad)) == (31, 8)
    gap = (dataset["log_evidence"] - dataset["elbo"][0]).values
    np.testing.assert_allclose(bad, np.stack([gap[:8], np.full(8, 0.9)], 1))
    assert "1 without a finite gap and k-hat are left out" in legend(ax)


def test_the_plane_of_rate_and_distortion():
    def summary(rate, distortion):
        numbers = {"nats": [rate, distortion], "nats_se": [0.1, 0.2]}
        return pd.DataFrame(numbers, index=["rate", "distortion"])

    ax = plots.plot_rate_distortion({"a": summary(5.0, 90.0), "b": summary(8.0, 85.0)})
    ((x,), (y,)), errors = points(ax, 1)
    assert (x, y) == (8.0, 85.0) and errors.tolist() == pytest.approx([0.2])
    assert legend(ax) == ["a", "b"]
    assert len([line for line in ax.lines if line.get_linestyle() == ":"]) == 2
    plots.plot_rate_distortion(summary(5.0, 90.0))


def test_an_aggregate_posterior():
    numbers = {
        "shift": [0.0, 1.0], "shift_se": [0.1, 0.1], "spread": [1.0, 0.5], "spread_se": [0.1, 0.2],
        "adjusted_p_value": [0.6, 0.01],
    }  # fmt: skip
    dataset = xr.Dataset({n: ("unit", v) for n, v in numbers.items()}, {"unit": ["z[0]", "z[1]"]})
    ax = plots.plot_aggregate_posterior(dataset.assign(joint_p_value=0.02))
    ((x,), (y,)), errors = points(ax, 1)
    assert (x, y) == (1.0, 0.5) and errors.tolist() == pytest.approx([0.2])
    assert [text.get_text() for text in ax.texts] == ["z[1]"]
    assert "differs (adjusted p < 0.05): 1 of 2" in legend(ax)
    assert "joint p = 0.02" in ax.get_title(loc="left")


def test_results_draw_themselves():
    data = torch.linspace(-2.0, 2.0, 10)
    rates = pv.rate_distortion(model, guide, data, num_particles=10, seed=0)
    ((x,), (y,)), _ = points(rates.plot())
    assert [x, y] == pytest.approx(rates.summary().loc[["rate", "distortion"], "nats"].tolist())
    options = {"num_draws": 20, "num_permutations": 19, "seed": 0}
    ax = pv.aggregate_posterior(model, guide, data, **options).plot()
    assert sum(len(points(ax, i)[1]) for i in (0, 1)) == 2
