"""Moments of weighted draws taken in by pieces are those of all of them at once."""

from __future__ import annotations

import numpy as np
import torch

from pyro_vae.particles.estimators import Estimate, calibrated
from pyro_vae.particles.weighted_moments import WeightedMoments


def test_moments_are_those_of_all_draws_at_once():
    generator = np.random.default_rng(0)
    weights = generator.dirichlet(np.ones(30), size=4)
    draws = torch.as_tensor(1e3 + generator.normal(size=(30, 4, 2)))
    moments = WeightedMoments(weights)
    for piece in draws.split(7):
        moments.update(piece)
    found = moments.results()
    shares = torch.as_tensor(weights.T).unsqueeze(-1)
    mean = (shares * draws).sum(0)
    influence = 30 * shares * (draws - mean)
    estimate = Estimate(mean, influence)
    # The sum of squares over K^2, where std_error takes K (K - 1).
    plain = estimate.std_error * (29 / 30) ** 0.5
    error = calibrated(plain, estimate.skewness, 30)
    np.testing.assert_allclose(found["mean"], mean.numpy(), rtol=1e-12)
    np.testing.assert_allclose(
        found["sd"], (shares * (draws - mean) ** 2).sum(0).sqrt().numpy(), rtol=1e-9
    )
    np.testing.assert_allclose(found["mean_se"], error.numpy(), rtol=1e-6)


def test_a_single_particle_tells_no_error():
    moments = WeightedMoments(np.array([[1.0, 0.0]]))
    moments.update(torch.tensor([[2.0], [5.0]]))
    found = moments.results()
    assert found["mean"] == 2.0
    assert found["sd"] == 0.0
    assert np.isnan(found["mean_se"]).all()


def test_of_means_the_variance_within_counts_in_the_sd_alone():
    """Two means with equal weights: the law of total variance, and the error of the mean alone."""
    moments = WeightedMoments(np.array([[0.5, 0.5]]))
    for mean, variance in ((1.0, 4.0), (3.0, 2.0)):
        moments.update(torch.tensor([[mean]]), torch.tensor([[variance]]))
    plain = WeightedMoments(np.array([[0.5, 0.5]]))
    plain.update(torch.tensor([[1.0], [3.0]]))
    found = moments.results()
    assert found["mean"] == 2.0 and np.isclose(found["sd"] ** 2, 1.0 + 3.0)
    assert found["mean_se"] == plain.results()["mean_se"]
