"""Data drawn from a model: the moments of the model, a seed of their own, latents as given."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_vae.zoo.simulation import draw


class Shifted(nn.Module):
    """z ~ Normal(0, 1), x ~ Normal(z + 3, 0.5), after a BatchNorm's running mean of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1, affine=False, dtype=torch.float64)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x[:, 0]), 1.0))
            location = self.norm(z.unsqueeze(-1)) + 3
            return pyro.sample("x", dist.Normal(location, 0.5).to_event(1), obs=x)


def test_observed_sites_are_drawn_from_the_model():
    """Mean 3 and variance 1 + 0.5^2, to four standard errors of 20,000 draws."""
    x = draw(Shifted(), torch.full((20_000, 1), 99.0, dtype=torch.float64), seed=0)
    assert x.shape == (20_000, 1)
    assert x.mean().item() == pytest.approx(3.0, abs=4 * (1.25 / 20_000) ** 0.5)
    assert x.var().item() == pytest.approx(1.25, rel=4 * (2 / 20_000) ** 0.5)


def test_given_latents_are_not_drawn():
    z = torch.linspace(-50, 50, 11, dtype=torch.float64)
    x = draw(Shifted(), z.new_zeros(11, 1), seed=0, given={"z": z})
    assert (x[:, 0] - z - 3).abs().max() < 6 * 0.5


def test_the_seed_is_its_own_and_the_model_stays_as_it_was():
    model, blank = Shifted().train(), torch.zeros(5, 1, dtype=torch.float64)
    state = torch.get_rng_state()
    first, again, other = (draw(model, blank, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert model.training and model.norm.running_mean.tolist() == [0.0]
    assert not first.requires_grad
