"""What a family has by default: starts from a Gaussian, units, and independent coordinates."""

from __future__ import annotations

from dataclasses import dataclass

import pyro.distributions as dist
import torch

from pyro_vae.families import FactorizedFamily


@dataclass(frozen=True)
class Laplace(FactorizedFamily):
    """A family as a user writes it: no more than is asked for."""

    params_per_coordinate = 2

    def marginal(self, params):
        return dist.Laplace(params[..., 0], params[..., 1].exp())

    def from_moments(self, mean, std):
        return torch.stack([mean, (std / 2**0.5).log()], -1)


def test_a_gaussian_start_is_as_wide_as_each_coordinate_given_all_others():
    """The best mean field of a Gaussian has variances 1 / diag of the precision."""
    root = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.3, 0.0], [-0.5, 0.2, 0.8]], dtype=torch.float64)
    mean = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    found = Laplace().marginal(Laplace().from_gaussian(mean, root))
    precision = torch.linalg.inv(root @ root.T)
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.variance, 1 / precision.diagonal())


def test_conditionals_are_the_marginals_of_their_columns():
    family, params = Laplace(), torch.randn(4, 3, 2, dtype=torch.float64)
    value = torch.randn(4, 2, dtype=torch.float64)
    found = family.conditional(params, 3, torch.zeros(4, 1), slice(1, 3))
    wanted = dist.Laplace(params[:, 1:, 0], params[:, 1:, 1].exp()).log_prob(value).sum(-1)
    torch.testing.assert_close(found.log_prob(value), wanted)


def test_noise_goes_through_the_quantiles():
    """P(draw < value) is that of the noise."""
    family, params = Laplace(), torch.tensor([[[0.5, -1.0]]], dtype=torch.float64)
    noise = torch.linspace(-4, 4, 17, dtype=torch.float64).reshape(17, 1, 1)
    draws = family.from_noise(params, 1, noise)
    found = dist.Laplace(0.5, torch.tensor(-1.0).double().exp()).cdf(draws)
    torch.testing.assert_close(found, torch.special.ndtr(noise))


def test_units_are_ones_and_a_shift_is_added():
    family, params = Laplace(), torch.randn(4, 3, 2)
    assert torch.equal(family.units(params, 3), torch.ones_like(params))
    shift = torch.randn(4, 3, 2)
    assert torch.equal(family.shifted(params, 3, shift), params + shift)
    assert family.num_noise(3) == 3 and family.params_shape(3) == (3, 2)
