"""Modes and curvature: of a Gaussian posterior they are its mean and covariance."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch

from pyro_vae.refinement.modes import find_modes, gaussian_at
from tests.models import NormalModel, factor_analysis
from tests.refinement.guides import blocks_of


def test_of_a_gaussian_posterior():
    model = factor_analysis("correlated")
    x = model.data(3)
    (block,) = blocks_of(model, x).at(torch.arange(3))
    mean = model.posterior_mean(x)
    places = mean + torch.randn(4, 3, 3, dtype=torch.float64)
    modes, height = find_modes(block, places)
    torch.testing.assert_close(modes, mean.expand(4, -1, -1), rtol=0, atol=1e-4)
    assert (height.max(0).values - height.min(0).values).max() < 1e-6
    found, scale_tril = gaussian_at(block, modes[0])
    torch.testing.assert_close(found, mean, rtol=0, atol=1e-6)
    covariance = torch.linalg.inv(model.posterior_precision)
    torch.testing.assert_close(
        scale_tril @ scale_tril.mT, covariance.expand(3, -1, -1), rtol=1e-6, atol=1e-8
    )


def test_each_place_has_its_mode():
    """x is near z squared: a mode on either side of zero, each where its slope vanishes."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.square(), 0.2), obs=x)

    x = torch.tensor([0.4], dtype=torch.float64)
    (block,) = blocks_of(model, x).at(torch.arange(1))
    modes, height = find_modes(block, torch.tensor([[[0.5]], [[-0.9]]], dtype=torch.float64))
    wanted = (0.4 - 0.2**2 / 2) ** 0.5  # of -z^2 / 2 - (x - z^2)^2 / (2 * 0.2^2)
    assert (modes.abs() - wanted).abs().max() < 1e-5  # a first step may cross zero
    assert abs(height[0] - height[1]) < 1e-6


def test_the_weight_of_the_prior():
    model, x = NormalModel(noise=0.5), torch.tensor([1.0, -2.0], dtype=torch.float64)
    (block,) = blocks_of(model, x).at(torch.arange(2))
    modes, _ = find_modes(block, torch.zeros(1, 2, 1).double(), prior=0.25)
    wanted = x * 4 / (4 + 0.25)  # precisions 4 of the likelihood, a quarter of the prior's
    torch.testing.assert_close(modes[0, :, 0], wanted, rtol=0, atol=1e-5)
