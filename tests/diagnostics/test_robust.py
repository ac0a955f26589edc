"""Robust moments: those of clean data, hardly moved by a fifth of strange ones."""

from __future__ import annotations

import numpy as np
import pytest

from pyro_vae.diagnostics.robust import RobustMoments

COVARIANCE = np.array([[4.0, 1.5, 0.0], [1.5, 1.0, 0.0], [0.0, 0.0, 0.01]])
MIDDLE = np.array([10.0, -3.0, 0.5])


def data(num_data=4000, seed=0):
    rng = np.random.default_rng(seed)
    return MIDDLE + rng.normal(size=(num_data, 3)) @ np.linalg.cholesky(COVARIANCE).T


def exact(x):
    centred = x - MIDDLE
    return np.sqrt(np.einsum("nf,fg,ng->n", centred, np.linalg.inv(COVARIANCE), centred))


def test_distances_of_a_gaussian_are_proportional_to_the_exact_ones():
    """By the factor that the covariance of its middle three quarters is smaller."""
    x = data()
    ratio = RobustMoments.of(x).distance(x) / exact(x)
    far = exact(x) > 1
    np.testing.assert_allclose(ratio[far], np.median(ratio), rtol=0.1)


def test_a_fifth_of_strange_data_does_not_hide_itself():
    x = data(1000)
    x[:200] = MIDDLE + np.array([6.0, -3.0, 0.0])  # against the correlation
    moments = RobustMoments.of(x)
    np.testing.assert_allclose(moments.middle, MIDDLE, atol=0.25)
    assert moments.distance(x[:200]).min() > np.quantile(moments.distance(x[200:]), 0.99)
    plain = np.linalg.inv(np.cov(x.T))  # which the strange data do hide from
    centred = x - x.mean(0)
    by_plain = np.sqrt(np.einsum("nf,fg,ng->n", centred, plain, centred))
    assert by_plain[:200].max() < np.quantile(by_plain[200:], 0.99)


@pytest.mark.parametrize("num_data", [2, 5, 40])
def test_fewer_data_than_features_and_units_that_are_off(num_data):
    rng = np.random.default_rng(0)
    x = np.maximum(rng.normal(-1.0, 1.0, (num_data, 20)), 0.0)  # mostly zeros
    x[:, 3] = 7.0  # always
    moments = RobustMoments.of(x)
    assert np.isfinite(moments.distance(x)).all()
    odd = x[:1].copy()
    odd[0, 3] = 70.0
    assert moments.distance(odd)[0] > moments.distance(x).max()


def test_a_single_point():
    moments = RobustMoments.of(np.ones((4, 2)))
    assert moments.distance(np.ones((1, 2)))[0] == 0
    assert moments.distance(np.full((1, 2), 2.0))[0] > 1e3


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("num_odd", [0, 1, 10])
def test_what_is_not_at_the_point_that_most_data_are_is_far(size, num_odd):
    """An indicator that is rarely on: three quarters of the data have no covariance."""
    x = np.zeros((50, size))
    x[:num_odd, 0] = 1.0
    distance = RobustMoments.of(x).distance(np.array([[0.0] * size, [1.0] * size, [2.0] * size]))
    assert np.isfinite(distance).all() and distance[0] == 0
    assert 1e3 < distance[1] < distance[2]
