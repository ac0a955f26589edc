"""Tests of pyro_vae.families.annealed: the weights' mean by quadrature, and what steps keep."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pyro_vae import families
from pyro_vae.families import Annealed

BASES = [families.Normal(), families.FullRankNormal(), families.LowRankNormal(1)]
each_base = pytest.mark.parametrize("base", BASES, ids=repr)


def some_params(family, *lead, size=2):
    torch.manual_seed(0)
    return 0.5 * torch.randn(*lead, *family.params_shape(size), dtype=torch.float64)


def nodes(count, dims):
    """Gauss-Hermite nodes and weights of a standard normal in some dimensions."""
    at, weight = np.polynomial.hermite_e.hermegauss(count)
    weight = weight / weight.sum()
    grid = np.stack(np.meshgrid(*[at] * dims, indexing="ij"), -1).reshape(-1, dims)
    weights = np.stack(np.meshgrid(*[weight] * dims, indexing="ij"), -1).prod(-1).reshape(-1)
    return torch.as_tensor(grid), torch.as_tensor(weights)


@pytest.mark.parametrize("num_steps", [1, 2])
@pytest.mark.parametrize("factor", [1.0, -0.7], ids=["the slope", "another slope"])
def test_the_mean_weight_is_the_integral_whatever_the_steps_are(num_steps, factor):
    """E[exp(log w)] = E_N[exp r], by quadrature over noise and momenta; for any field of kicks."""
    family = Annealed(families.Normal(), num_steps)
    params = some_params(family, size=1)
    noise, weight = nodes(60 if num_steps == 1 else 40, num_steps + 1)

    def ratio(u):
        return torch.sin(1.3 * u[..., 0]) - 0.4 * u[..., 0] ** 2

    def slope(u):
        return factor * (1.3 * torch.cos(1.3 * u) - 0.8 * u)

    u, gained = family.walk(params, 1, noise, slope)
    found = (weight * torch.exp(ratio(u) + gained)).sum()
    line, on_line = nodes(60, 1)
    wanted = (on_line * torch.exp(ratio(line))).sum()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)
    assert gained.abs().max() > 0.01  # the steps do something


def test_steps_without_a_slope_turn_noise_and_momentum():
    """The base stays what it is: u' = cos(e) u + sin(e) v, and nothing is gained."""
    family = Annealed(families.Normal(), 1)
    params = some_params(family, 5)
    noise = torch.randn(7, 5, 4, dtype=torch.float64)
    u, gained = family.walk(params, 2, noise, torch.zeros_like)
    angle = math.pi / 2 * params[..., 4:6].sigmoid()
    torch.testing.assert_close(u, angle.cos() * noise[..., :2] + angle.sin() * noise[..., 2:])
    assert torch.equal(gained, torch.zeros(7, 5, dtype=torch.float64))


def test_one_step_by_hand():
    family = Annealed(families.Normal(), 1)
    params = torch.zeros(family.params_shape(1), dtype=torch.float64)  # an angle of 45 degrees
    noise = torch.tensor([[0.3, -1.1]], dtype=torch.float64)
    u, gained = family.walk(params, 1, noise, lambda u: 2 * u)
    cos, sin = math.cos(math.pi / 8), math.sin(math.pi / 8)
    here, v = cos * 0.3 - sin * 1.1, -cos * 1.1 - sin * 0.3
    kick = math.pi / 4 * 2 * here
    kick = kick / math.sqrt(1 + kick**2)
    assert float(u) == pytest.approx(cos * here + sin * (v + kick))
    assert float(gained) == pytest.approx(-(v * kick + kick**2 / 2))


def test_a_slope_that_is_no_number_is_no_kick():
    family = Annealed(families.Normal(), 3)
    noise = torch.randn(4, 8, dtype=torch.float64)
    for wild in (torch.full((4, 2), value) for value in (math.nan, math.inf)):
        u, gained = family.walk(some_params(family), 2, noise, lambda u, slope=wild: slope)
        assert u.isfinite().all()
        assert torch.equal(gained, torch.zeros(4, dtype=torch.float64))
    _, gained = family.walk(some_params(family), 2, noise, lambda u: 1e30 * u)
    assert gained.abs().max() < 3 * 2 * (0.5 + 10)  # each kick is at most one


@each_base
@pytest.mark.parametrize("num_steps", [1, 3])
def test_shapes_and_parts(base, num_steps):
    family = Annealed(base, num_steps)
    mean, std = torch.randn(5, 2, dtype=torch.float64), torch.rand(5, 2, dtype=torch.float64) + 0.5
    params = family.initial(mean, std)
    assert params.shape == (5, *family.params_shape(2))
    torch.testing.assert_close(family.base_params(params, 2), base.initial(mean, std))
    steps = family.steps(params, 2)
    assert steps.angle.shape == (5, base.num_noise(2))
    torch.testing.assert_close(steps.angle, torch.full_like(steps.angle, 0.2))
    levels = torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps
    torch.testing.assert_close(steps.power, levels.expand(5, -1))
    if num_steps == 1:
        assert steps.damping is None
    else:
        torch.testing.assert_close(steps.damping, torch.full((5, 1), 0.9, dtype=torch.float64))
    assert family.num_noise(2) == (num_steps + 1) * base.num_noise(2)
    noise = torch.randn(4, 5, family.num_noise(2), dtype=torch.float64)
    begun = base.from_noise(base.initial(mean, std), 2, noise[..., : base.num_noise(2)])
    torch.testing.assert_close(family.from_noise(params, 2, noise), begun)
    units = family.units(params, 2)
    assert units.shape == params.shape
    assert (units > 0).all()
    assert family.is_resolved(params, 2).all()


def test_a_start_at_a_gaussian_and_a_shift_are_the_bases():
    base = families.FullRankNormal()
    family = Annealed(base, 2)
    mean = torch.randn(3, 2, dtype=torch.float64)
    tril = torch.tensor([[1.0, 0.0], [0.4, 0.7]], dtype=torch.float64).expand(3, 2, 2)
    params = family.from_gaussian(mean, tril)
    own = base.from_gaussian(mean, tril)
    torch.testing.assert_close(family.base_params(params, 2), own)
    shift = 0.1 * torch.randn_like(params)
    moved = family.shifted(params, 2, shift)
    wanted = base.shifted(own, 2, family.base_params(shift, 2))
    torch.testing.assert_close(family.base_params(moved, 2), wanted)
    torch.testing.assert_close(moved[..., 5:], params[..., 5:] + shift[..., 5:])


@each_base
@pytest.mark.parametrize("num_steps", [1, 3])
def test_gradient_reaches_every_parameter(base, num_steps):
    family = Annealed(base, num_steps)
    params = some_params(family, 3).requires_grad_()
    noise = torch.randn(64, 3, family.num_noise(2), dtype=torch.float64)
    own = family.base_params(params, 2)

    def slope(u):
        return -base.from_noise(own, 2, u).sum(-1, keepdim=True) * torch.ones_like(u)

    u, gained = family.walk(params, 2, noise, slope)
    (base.from_noise(own, 2, u).square().sum() + gained.square().sum()).backward()
    assert not (params.grad == 0).any()


def test_equal_options_make_equal_families():
    one, other = Annealed(families.Normal(), 4), Annealed(families.Normal(), 5)
    assert one == Annealed(families.Normal(), 4) != other
    assert len({one, Annealed(families.Normal(), 4.0), other}) == 2
    assert repr(one) == "Annealed(base=Normal(), num_steps=4)"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Annealed(families.Delta(), 2), ValueError, "is a point"),
        (lambda: Annealed(Annealed(families.Normal(), 2), 2), ValueError, "has steps already"),
        (lambda: Annealed(families.Normal, 2), TypeError, "an instance of a family is needed"),
        (lambda: Annealed(families.Normal(), 0), ValueError, "num_steps=0"),
        (lambda: Annealed(families.Normal(), 1.5), ValueError, "num_steps=1.5"),
    ],
)
def test_bad_options_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
