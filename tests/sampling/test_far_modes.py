"""The mode that a base density does not reach: where it is, how wide, and that there is none."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.sampling.far_modes import far_mode, is_missed, log_gaussian
from pyro_vae.sampling.prepare import ready
from tests.sampling.pairs import masked_model
from tests.sampling.test_importance import gamma_poisson, local, square

F64 = torch.float64


def found(model, guide, *batch, seed=0):
    made = ready(model, guide, batch, None, None, seed, False)
    ((rows, block),) = made.each()
    return far_mode(made, rows, block, made.base_centre(rows))


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_the_other_one_of_two_modes(side: float):
    """z ~ Normal(0, 2), x ~ Normal(z^2, 0.5), x = 9: modes where z^2 = 9 - 1/32, f'' = -16 z^2."""
    x = torch.tensor([9.0], dtype=F64)
    far = found(square, local(square, x, loc=side * 3.0, log_scale=math.log(0.083)), x)
    z = math.sqrt(9 - 1 / 32)
    assert far.is_far.tolist() == [True]
    torch.testing.assert_close(far.mean, torch.tensor([[-side * z]], dtype=F64), rtol=1e-4, atol=0)
    width = torch.tensor([[[1 / (4 * z)]]], dtype=F64)
    torch.testing.assert_close(far.factor, width, rtol=1e-3, atol=0)


def test_a_base_that_holds_both_modes_reaches_them():
    x = torch.tensor([9.0], dtype=F64)
    assert not found(square, local(square, x, log_scale=math.log(3.0)), x).is_far.any()


def test_one_mode_in_reach_is_not_far():
    x = torch.tensor([0.0, 3.0, 12.0], dtype=F64)
    guide = local(gamma_poisson, x)
    with torch.no_grad():  # near the posterior's logarithm
        guide.table[:, 0, 0] = ((x + 2) / 1.5).log()
        guide.table[:, 0, 1] = -0.5 * (x + 2).log()
    far = found(gamma_poisson, guide, x)
    assert not far.is_far.any()
    # Gamma(a, b) has in log z the mode log(a / b) and the curvature a.
    expected = ((x + 2) / 1.5).log().unsqueeze(-1)
    torch.testing.assert_close(far.mean, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_a_mode_that_few_draws_of_the_prior_lead_to(seed: int):
    """x ~ Normal(z1 + z2, 0.3), z2 ~ Normal(z1^2, 0.5), at x = 5.1: the smaller root of z1 + z1^2.

    A hundredth of the prior leads there, and it holds a tenth of the posterior: draws under which
    the datum is likeliest do.
    """

    def model(x):
        with pyro.plate("data", len(x)):
            first = pyro.sample("z1", dist.Normal(x.new_tensor(0.0), 1.0))
            second = pyro.sample("z2", dist.Normal(first.square(), 0.5))
            pyro.sample("x", dist.Normal(first + second, 0.3), obs=x)

    x = torch.tensor([5.1, 4.7], dtype=F64)
    guide = pv.LocalGuide(model, num_data=2, example=x)
    root = -0.5 + (0.25 + x).sqrt()
    with torch.no_grad():
        guide.table[..., 0] = torch.stack([root, root.square()], -1)
        guide.table[..., 1] = -2.0
    far = found(model, guide, x, seed=seed)
    assert far.is_far.all()
    assert (far.mean[:, 0] - (-0.5 - (0.25 + x).sqrt())).abs().max() < 0.2


def test_in_many_dimensions_draws_of_the_base_are_no_far_modes():
    """Of 30 standard normal latents no datum says anything: the mode is the middle."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(30), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(0 * z[..., 0], 1.0), obs=x)

    x = torch.zeros(4, dtype=F64)
    guide = local(model, x)
    far = found(model, guide, x)
    assert not far.is_far.any()
    with torch.no_grad():  # 5 standard deviations in one of them: inside of what the rest spreads
        guide.table[:2, 0, 0] = 5.0
        guide.table[2:, 0, 0] = 12.0
    assert found(model, guide, x).is_far.tolist() == [False, False, True, True]


def test_density_and_draws_are_those_of_torch():
    torch.manual_seed(0)
    factor = torch.randn(3, 2, 2, dtype=F64).tril()
    factor.diagonal(dim1=-2, dim2=-1).abs_()
    mean, z = torch.randn(3, 2, dtype=F64), torch.randn(5, 3, 2, dtype=F64)
    exact = dist.MultivariateNormal(mean, scale_tril=factor).log_prob(z)
    torch.testing.assert_close(log_gaussian(mean, factor, z), exact)
    x = torch.tensor([9.0], dtype=F64)
    far = found(square, local(square, x, loc=3.0, log_scale=-2.5), x)
    noise = torch.randn(4, 1, 1, dtype=F64)
    torch.testing.assert_close(far.draws(noise), far.mean + far.factor[0] * noise)
    torch.testing.assert_close(
        far.log_density(noise), dist.Normal(far.mean, far.factor[0]).log_prob(noise)[..., 0]
    )


def test_without_a_prior_there_is_nowhere_to_climb_from():
    x, there = torch.zeros(2, dtype=F64), torch.tensor([True, False])
    guide = pv.LocalGuide(masked_model, num_data=2, example=(x, there)).double()
    with pytest.raises(ValueError, match="start='prior'"):
        found(masked_model, guide, x, there)


# --- what chains miss


def asked(first, second, *, share_of_second=0.0, weight_of_second=1.0, log_mass=None):
    """A mixture of two Gaussians by its weights, and draws of which a share is of the second.

    z ~ Normal(0, 3); x, flat, has the mixture of Normal(-3, 0.1) and Normal(3, 0.1) over the prior.
    """

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 3.0))
            weights = x.new_tensor([first, second]).log()
            places = x.new_tensor([-3.0, 3.0])
            height = (weights + dist.Normal(places, 0.1).log_prob(z.unsqueeze(-1))).logsumexp(-1)
            pyro.factor("f", height - dist.Normal(0.0, 3.0).log_prob(z))
            pyro.sample("x", dist.Normal(0 * z, 1.0), obs=x)

    x = torch.zeros(2, dtype=F64)
    made = ready(model, local(model, x, loc=-3.0, log_scale=-2.3), (x,), None, None, 0, False)
    ((rows, block),) = made.each()
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 2, 1, generator=generator, dtype=F64)
    side = torch.rand(4000, 2, 1, generator=generator) < share_of_second
    z = torch.where(side, 3.0, -3.0) + 0.1 * z
    weights = torch.where(side, weight_of_second, 1.0)[..., 0].to(F64)
    there = math.log(first) - 0.5 * math.log(2 * math.pi)
    log_mass = torch.full((2,), there if log_mass is None else log_mass, dtype=F64)
    return is_missed(made, rows, block, z, log_mass, weights / weights.sum(0)).tolist()


@pytest.mark.parametrize(("second", "missed"), [(0.5, True), (0.02, True), (0.005, False)])
def test_a_mode_counts_by_its_share(second: float, missed: bool):
    assert asked(1 - second, second) == [missed] * 2


@pytest.mark.parametrize(("visited", "missed"), [(0.0, True), (0.0002, True), (0.01, False)])
def test_a_mode_that_was_visited_is_not_missed(visited: float, missed: bool):
    """It holds 0.03: a hundredth of the draws is in reach of no Gaussian of them all, but there."""
    assert asked(0.97, 0.03, share_of_second=visited) == [missed] * 2


def test_a_mode_is_small_beside_a_large_mass():
    assert asked(0.5, 0.5, log_mass=10.0) == [False] * 2


@pytest.mark.parametrize(("of_second", "missed"), [(1.0, False), (0.0, True)])
def test_draws_count_by_their_weights(of_second: float, missed: bool):
    """A hundredth of the draws is at the second mode; without weight they have not been there."""
    assert asked(0.97, 0.03, share_of_second=0.01, weight_of_second=of_second) == [missed] * 2
