"""Factor analysis and probabilistic PCA: every answer is exact."""

from __future__ import annotations

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from tests.zoo.cases import linear


@pytest.mark.parametrize("kind", [pv.zoo.FactorAnalysis, pv.zoo.ProbabilisticPCA])
def test_every_log_weight_of_the_exact_posterior_is_the_evidence(kind: type):
    case = linear(kind)
    model, x = case.model, case.batch

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", model.posterior(x))

    exact = model.log_evidence(x).detach()
    weights = pv.log_weights(model, guide, x, num_particles=20, seed=0)
    torch.testing.assert_close(weights.total, exact.expand(20, -1), rtol=1e-12, atol=1e-12)
    covariance = model.loadings @ model.loadings.T + torch.diag(model.noise**2)
    by_hand = dist.MultivariateNormal(model.mean, covariance).log_prob(x)
    torch.testing.assert_close(exact, by_hand.detach(), rtol=1e-12, atol=1e-12)


def test_noise_scales():
    assert pv.zoo.FactorAnalysis(5, 2).log_noise.shape == (5,)
    model = pv.zoo.ProbabilisticPCA(5, 2)
    assert model.log_noise.shape == (1,)
    assert model.noise.shape == (5,)


@pytest.mark.parametrize("num_latents", [0, 6])
def test_a_wrong_number_of_factors(num_latents: int):
    with pytest.raises(ValueError, match=f"num_latents={num_latents}: between 1 and num_features"):
        pv.zoo.FactorAnalysis(5, num_latents)


def test_the_evidence_of_small_noise_is_right_in_float32():
    """Of a low-rank marginal it would be a difference of large numbers."""
    model = pv.zoo.FactorAnalysis(20, 3)
    with torch.no_grad():
        model.log_noise.fill_(-6.0)
    x = model.simulate(5)
    found = model.log_evidence(x)
    exact = copy.deepcopy(model).double().log_evidence(x.double())
    assert (found - exact).abs().max() < 1e-2
