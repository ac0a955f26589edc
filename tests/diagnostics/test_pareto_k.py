"""k-hat per datum, and what a loss does with each site."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.diagnostics.pareto_k import SmoothedWeights
from tests.models import factor_analysis


def test_k_hat_is_the_tail_index_of_the_ratio():
    """Proposal N(0, s^2) for a standard normal, s < 1: weights have tail index 1 - s^2.

    w(z) ~ exp(c z^2), c = (1/s^2 - 1)/2, so P(w > t) falls as t^(-1/(1 - s^2)) up to logs,
    which bias k-hat at finite K: 0.1 of tolerance.
    """
    torch.manual_seed(0)
    scales = torch.tensor([0.5, 0.8], dtype=torch.float64)
    z = scales * torch.randn(100_000, 2, dtype=torch.float64)
    ratio = dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(0.0, scales).log_prob(z)
    assert (pv.pareto_k(ratio) - (1 - scales**2)).abs().max() < 0.12


def test_k_hat_of_a_datum_does_not_grow_with_the_number_of_data():
    """Trap: psis_diagnostic sums the weights over the data, so that its k-hat grows with N."""
    model = factor_analysis("correlated")
    torch.manual_seed(0)
    x = model.data(1).expand(60, -1).contiguous()
    variance = 1 / model.posterior_precision.diagonal()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(model.posterior_mean(x), variance.sqrt()).to_event(1))

    def pyros(n):
        torch.manual_seed(0)
        return pyro.infer.importance.psis_diagnostic(
            model, guide, x[:n], num_particles=2000, max_plate_nesting=1
        )

    alone = pv.pareto_k(pv.log_weights(model, guide, x[:1], num_particles=2000, seed=0))
    many = pv.pareto_k(pv.log_weights(model, guide, x, num_particles=2000, seed=0))
    assert many.shape == (60,) and abs(many.median() - alone.item()) < 0.2
    assert pyros(60) > pyros(1) + 0.3


def test_constant_weights_have_no_tail():
    model = factor_analysis()
    x = model.data(3)
    weights = pv.log_weights(model, model.posterior, x, num_particles=200)
    assert pv.pareto_k(weights).tolist() == [0.0, 0.0, 0.0]
    assert math.isnan(pv.pareto_k(torch.randn(5, 1)).item())


def test_k_hat_wants_a_matrix():
    with pytest.raises(ValueError, match=r"shape \[K, N\] are needed, found \(3,\)"):
        pv.pareto_k(torch.zeros(3))


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
    assert np.isnan(smoothed.weights[1]).all() and np.isinf(smoothed.raw.pareto_k[1])
    with pytest.raises(ValueError, match=r"every importance weight is zero for 1 of 2 data: \[1\]"):
        smoothed.draw(5, [0])
