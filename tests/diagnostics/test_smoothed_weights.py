"""Pareto-smoothed importance weights, and draws by them."""

from __future__ import annotations

import numpy as np
import pytest

from pyro_vae.diagnostics.smoothed_weights import SmoothedWeights


def test_resampling_takes_particles_as_often_as_they_weigh():
    weights = np.array([[0.1, 0.2, 0.7], [0.5, 0.5, 0.0]])
    with np.errstate(divide="ignore"):
        smoothed = SmoothedWeights.of(np.log(weights))
    index, found = smoothed.draw(20_000, [0]), smoothed.weights
    np.testing.assert_allclose(found, weights, atol=1e-12)
    share = np.stack([(index == k).mean(0) for k in range(3)], axis=1)
    assert (np.abs(share - weights) <= 4 * np.sqrt(weights * (1 - weights) / 20_000)).all()


def test_weights_that_are_all_zero_are_said_and_not_drawn_from():
    log_weights = np.array([[0.0, -1.0, -2.0], [-np.inf] * 3])
    smoothed = SmoothedWeights.of(log_weights)
    assert np.isnan(smoothed.weights[1]).all() and np.isinf(smoothed.pareto_k[1])
    with pytest.raises(ValueError, match=r"every importance weight is zero for 1 of 2 data: \[1\]"):
        smoothed.draw(5, [0])
