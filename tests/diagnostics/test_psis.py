"""Pareto smoothing under whichever ArviZ is installed, 0.x or 1.x."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import arviz as az
import numpy as np
import pytest
import xarray as xr

PACKAGE = Path(__file__).parents[2] / "pyro_vae"


def load(path):
    spec = importlib.util.spec_from_file_location(f"{path.stem}_by_path", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pareto = load(PACKAGE / "diagnostics" / "psis.py")


IS_1 = int(az.__version__.split(".")[0]) >= 1


def arviz_psis(log_weights):
    """ArviZ's own, by the way that its users take."""
    if not IS_1:
        return az.psislw(log_weights)
    # The accessor smooths the inverse of what it is given.
    smoothed, k = xr.DataArray(-log_weights, dims=("datum", "draw")).azstats.psislw(dim="draw")
    return smoothed.values, k.values


def test_psis_is_arviz():
    log_weights = 2.0 * np.random.default_rng(1).normal(size=(4, 1000)) - 90.0
    given = log_weights.copy()
    smoothed, k = pareto.psis(log_weights)
    wanted_smoothed, wanted_k = arviz_psis(log_weights.copy())
    np.testing.assert_allclose(smoothed, wanted_smoothed, rtol=0, atol=1e-12)
    np.testing.assert_allclose(k, wanted_k, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(log_weights, given)


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_psis_finds_the_tail_of_pareto_weights(shape):
    # Excesses of a Pareto variable of index 1/shape are generalized Pareto of that very shape.
    # ArviZ shrinks its estimate from M tail draws toward 0.5 with the weight of 10 draws.
    rows, num_particles = 40, 5000
    tail = int(3 * num_particles**0.5)
    uniform = np.random.default_rng(2).uniform(size=(rows, num_particles))
    _, k = pareto.psis(-shape * np.log(uniform) - 90.0)
    wanted = (tail * shape + 10 * 0.5) / (tail + 10)
    std_error = k.std(ddof=1) / rows**0.5
    assert std_error < 0.02
    assert k.mean() == pytest.approx(wanted, abs=4 * std_error)
    # The other end of the same weights is bounded: the sign is the right one.
    _, k = pareto.psis(shape * np.log(uniform) - 90.0)
    assert (k < 0.5 * shape).all()


def test_smoothing_changes_the_tail_only():
    num_particles = 1000
    tail = int(3 * num_particles**0.5) + 1  # one more in ArviZ 0.x, which rounds up
    log_weights = np.random.default_rng(3).normal(size=(3, num_particles))
    smoothed, _ = pareto.psis(log_weights)
    np.testing.assert_allclose(np.exp(smoothed).sum(axis=1), 1.0, rtol=1e-12)
    order = np.argsort(log_weights, axis=1)
    shift = np.take_along_axis(smoothed - log_weights, order, axis=1)
    np.testing.assert_allclose(np.ptp(shift[:, :-tail], axis=1), 0.0, atol=1e-12)
    assert (np.ptp(shift[:, -tail:], axis=1) > 1e-3).all()
    # Quantiles keep the order, and none is above the largest raw weight.
    assert (np.diff(np.take_along_axis(smoothed, order, axis=1), axis=1) >= 0).all()
    assert (shift[:, -1] <= shift[:, 0] + 1e-12).all()


@pytest.mark.parametrize("num_particles", [1, 10, 1000])
def test_equal_weights_have_no_tail(num_particles):
    noise = np.random.default_rng(4).normal(size=(1, num_particles))
    level = np.array([[-700.0], [0.0], [3.0]])
    smoothed, k = pareto.psis(level + 1e-10 * noise)
    np.testing.assert_array_equal(k, 0.0)
    np.testing.assert_allclose(smoothed, -np.log(num_particles), rtol=0, atol=1e-8)


def test_equal_to_rounding_means_less_in_float32():
    # Some units in the last place of -700 in float32, which is 6e-5.
    log_weights = -700.0 + 3e-4 * np.random.default_rng(4).normal(size=(1, 1000))
    assert np.ptp(log_weights.astype(np.float32)) > 1e-3
    np.testing.assert_array_equal(pareto.psis(log_weights.astype(np.float32))[1], 0.0)
    _, k = pareto.psis(log_weights)
    assert np.isfinite(k).all()
    assert (k != 0.0).all()


def test_a_tail_of_equal_weights_is_not_heavy():
    log_weights = np.repeat([0.0, 5.0], [800, 200])[None]
    smoothed, k = pareto.psis(log_weights)
    np.testing.assert_array_equal(k, 0.0)
    np.testing.assert_allclose(smoothed, log_weights - np.log(800 + 200 * np.exp(5.0)), atol=1e-12)


@pytest.mark.parametrize("background", [-np.inf, -1e4, -50.0])
def test_a_handful_that_carries_all_the_weight_is_infinitely_heavy(background):
    log_weights = np.full((1, 1000), background)
    log_weights[0, :10] = np.random.default_rng(5).normal(size=10)
    smoothed, k = pareto.psis(log_weights)
    np.testing.assert_array_equal(k, np.inf)
    np.testing.assert_allclose(
        np.exp(smoothed), np.exp(log_weights) / np.exp(log_weights).sum(), rtol=1e-12
    )


def test_a_fit_that_fails_inside_arviz_is_no_number(monkeypatch):
    def fail(log_weights, efficiency):
        return np.full_like(log_weights, np.nan), np.full(len(log_weights), np.nan)

    monkeypatch.setattr(pareto, "_arviz_psislw", fail)
    log_weights = np.random.default_rng(9).normal(size=(2, 100))
    smoothed, k = pareto.psis(log_weights)
    np.testing.assert_array_equal(k, np.inf)
    np.testing.assert_allclose(np.ptp(smoothed - log_weights, axis=1), 0.0, atol=1e-12)


def test_weights_of_zero_below_the_tail_do_not_matter():
    log_weights = np.random.default_rng(6).normal(size=(1, 1000))
    zeroed = np.where(log_weights < 0.0, -np.inf, log_weights)
    np.testing.assert_allclose(pareto.psis(zeroed)[1], pareto.psis(log_weights)[1], rtol=1e-12)
    assert (np.exp(pareto.psis(zeroed)[0])[log_weights < 0.0] == 0.0).all()


def test_a_failed_row_does_not_touch_its_neighbours():
    good = np.random.default_rng(7).normal(size=(1, 1000))
    few = np.full((1, 1000), -np.inf)
    few[0, 0] = 0.0
    smoothed, k = pareto.psis(np.concatenate([few, good, np.zeros((1, 1000))]))
    assert k[0] == np.inf
    assert k[2] == 0.0
    np.testing.assert_array_equal(k[1:2], pareto.psis(good)[1])
    np.testing.assert_array_equal(smoothed[1:2], pareto.psis(good)[0])


@pytest.mark.parametrize("num_particles", [10, 29, 30, 57, 225, 226, 1003, 5000])
def test_the_largest_weights_tell_their_k_hat(num_particles):
    """In any order: equal ones, and those of a light tail, of a heavy one, and of zeros below."""
    scale = np.array([0.0, 0.1, 3.0, 8.0])[:, np.newaxis]
    log_weights = scale * np.random.default_rng(2).normal(size=(4, num_particles)) - 700
    log_weights[2, : num_particles // 2] = -np.inf
    size = pareto.tail_length(num_particles)
    assert size == num_particles if num_particles < 30 else size < num_particles / 4 + 1
    largest = np.sort(log_weights, axis=1)[:, -size:]
    found = pareto.pareto_k_of_largest(largest, num_particles)
    np.testing.assert_array_equal(found, pareto.psis(log_weights)[1])
    with pytest.raises(ValueError, match=rf"wanted shape \[N, {size}\] for K = {num_particles}"):
        pareto.pareto_k_of_largest(largest[:, 1:], num_particles)


def test_too_few_particles_for_a_tail():
    log_weights = np.random.default_rng(8).normal(size=(2, 30))
    assert np.isfinite(pareto.psis(log_weights)[1]).all()
    smoothed, k = pareto.psis(log_weights[:, :29])
    assert np.isnan(k).all()
    plain = np.exp(log_weights[:, :29])
    np.testing.assert_allclose(np.exp(smoothed), plain / plain.sum(axis=1, keepdims=True))


def test_no_data():
    smoothed, k = pareto.psis(np.zeros((0, 100)))
    assert smoothed.shape == (0, 100)
    assert k.shape == (0,)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "log_weights: 2 of 4 rows hold nan: rows 1, 3"),
        (np.inf, "log_weights: 2 of 4 rows hold inf: rows 1, 3"),
    ],
)
def test_psis_refuses_rows(value, message):
    log_weights = np.zeros((4, 50))
    log_weights[[1, 3], 7] = value
    with pytest.raises(ValueError, match=message):
        pareto.psis(log_weights)


def test_psis_refuses_rows_without_weight():
    log_weights = np.zeros((4, 50))
    log_weights[2] = -np.inf
    with pytest.raises(ValueError, match=r"1 of 4 rows hold only -inf.*: rows 2"):
        pareto.psis(log_weights)


@pytest.mark.parametrize("shape", [(50,), (2, 3, 50), (2, 0)])
def test_psis_refuses_shapes(shape):
    with pytest.raises(ValueError, match=r"log_weights: wanted shape \[N, K\] with K > 0, found "):
        pareto.psis(np.zeros(shape))
