"""Laws of every variational family: its methods describe one and the same distribution."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to, constraints, kl_divergence

from pyro_vae import families

DENSITIES = [families.Normal()]
FAMILIES = [*DENSITIES, families.Delta()]
law = pytest.mark.parametrize("family", FAMILIES, ids=repr)
density_law = pytest.mark.parametrize("family", DENSITIES, ids=repr)


def some_params(family):
    return torch.randn(4, 3, family.params_per_coordinate, dtype=torch.float64)


@law
def test_shapes_of_a_marginal(family):
    marginal = family.marginal(some_params(family))
    assert marginal.batch_shape == (4, 3)
    assert marginal.event_shape == ()
    assert marginal.has_rsample


@law
def test_moments_come_back(family):
    mean, std = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.1
    marginal = family.marginal(family.from_moments(mean, std))
    torch.testing.assert_close(marginal.mean, mean)
    wanted = std if family.has_density else torch.zeros_like(std)
    torch.testing.assert_close(marginal.variance.sqrt(), wanted)


@law
def test_params_come_back(family):
    params = some_params(family)
    torch.testing.assert_close(family.params_of(family.marginal(params)), params)
    assert family.params_of(dist.Gamma(torch.ones(2), 1.0)) is None


@density_law
def test_from_noise_draws_from_the_marginal(family):
    """Quantile for quantile: standard normal noise at a level gives the marginal's quantile."""
    params = some_params(family)
    levels = torch.tensor([0.01, 0.3, 0.5, 0.9], dtype=torch.float64)
    noise = dist.Normal(0.0, 1.0).icdf(levels).reshape(-1, 1, 1).expand(-1, 4, 3)
    drawn = family.from_noise(params, noise)
    assert drawn.shape == (4, 4, 3)
    torch.testing.assert_close(
        family.marginal(params).cdf(drawn), levels.reshape(-1, 1, 1).expand(-1, 4, 3)
    )


@law
def test_gradient_reaches_every_parameter(family):
    params = some_params(family).requires_grad_()
    value = family.from_noise(params, torch.randn(1, 4, 3, dtype=torch.float64))
    value.sum().backward()
    assert (params.grad != 0).all()


@density_law
def test_gradient_of_the_density_reaches_every_parameter(family):
    params = some_params(family).requires_grad_()
    value = family.marginal(params).sample()
    family.marginal(params).log_prob(value).sum().backward()
    assert (params.grad != 0).all()


@law
@pytest.mark.parametrize(
    "support",
    [constraints.real, constraints.positive, constraints.unit_interval, constraints.simplex],
    ids=str,
)
def test_mapped_to_a_support(family, support):
    """Draws lie in the support and have the density that the change of variables gives."""
    transform = biject_to(support)
    params = some_params(family)
    mapped = family.mapped(params, transform)
    value = mapped.sample()
    assert support.check(value).all()
    base = family.marginal(params).to_event(transform.domain.event_dim)
    if not family.has_density:
        assert torch.equal(value, transform(params[..., 0]))
        assert torch.equal(mapped.log_prob(value), torch.zeros(mapped.batch_shape))
        return
    z = transform.inv(value)
    expected = base.log_prob(z) - transform.log_abs_det_jacobian(z, value)
    torch.testing.assert_close(mapped.log_prob(value), expected)


def test_a_point_ignores_noise():
    params = some_params(families.Delta())
    drawn = families.Delta().from_noise(params, torch.randn(5, 4, 3, dtype=torch.float64))
    assert torch.equal(drawn, params[..., 0].expand(5, 4, 3))


def test_a_delta_that_carries_a_density_is_no_point():
    """AutoNormal's Delta on a constrained support stands for a distribution."""
    carrier = dist.Delta(torch.ones(2), log_density=torch.tensor([0.0, -0.3]))
    assert families.Delta().params_of(carrier) is None


@density_law
def test_a_unit_is_the_same_change_at_any_scale(family):
    """A small step of a unit costs the same KL, whatever the parameters."""
    params = some_params(family)
    units = family.units(params)
    assert units.shape == params.shape
    for column in range(family.params_per_coordinate):
        step = torch.zeros_like(params)
        step[..., column] = 1e-3 * units[..., column]
        cost = kl_divergence(family.marginal(params), family.marginal(params + step))
        torch.testing.assert_close(cost, cost[0, 0].expand_as(cost), rtol=1e-6, atol=1e-13)
        assert 1e-7 < cost[0, 0] < 1e-5
