"""Trajectories go back to where they came from, and kernels leave densities as they are."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_vae.sampling.hmc import Kernel, Point, StepSizes
from pyro_vae.sampling.streams import Stream
from tests.sampling.densities import ByFormula, gaussian, log_gamma, zero

F64 = torch.float64
# Skewed, correlated and with a part to a power: nothing quadratic about it.
banana = ByFormula(
    lambda z: -0.5 * z[..., 0].square() - 0.5 * (z[..., 1] - z[..., 0].square()).square(),
    lambda z: -torch.cosh(0.5 * z[..., 0] * z[..., 1]),
)
POWER = torch.tensor([0.0, 0.4, 1.0], dtype=F64)


def kernel_of(kind, *, size=2, num_steps=5, step=(0.1, 0.2, 0.3)):
    generator = torch.Generator().manual_seed(1)
    scale = 0.5 + torch.rand(len(step), size, generator=generator, dtype=F64)
    if kind == "full":
        below = torch.randn(len(step), size, size, generator=generator, dtype=F64).tril(-1)
        scale = torch.diag_embed(scale) + 0.5 * below
    return Kernel(torch.tensor(step, dtype=F64), scale, num_steps)


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_a_trajectory_with_its_momentum_turned_goes_back(kind):
    kernel = kernel_of(kind)
    z, momentum = some(4, 3, 2), some(4, 3, 2, seed=1)
    end, final = kernel._leapfrog(banana, banana(z), POWER, momentum)
    assert ((end.z - z).abs() > 0.01).any(-1).all()
    back, turned = kernel._leapfrog(banana, end, POWER, -final)
    torch.testing.assert_close(back.z, z, rtol=0, atol=1e-12)
    torch.testing.assert_close(turned, -momentum, rtol=0, atol=1e-12)


def differentiable(z):
    """The density, with slopes that have a gradient."""
    base, ratio = banana.base(z), banana.ratio(z)
    slopes = [torch.autograd.grad(t.sum(), [z], create_graph=True)[0] for t in (base, ratio)]
    return Point(z, base, ratio, *slopes)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_trajectories_preserve_volume(kind):
    kernel = kernel_of(kind)

    def moved(flat):
        z, momentum = flat.reshape(2, 1, 3, 2)
        point, final = kernel._leapfrog(differentiable, differentiable(z), POWER, momentum)
        return torch.stack([point.z, final]).flatten()

    at = some(12).requires_grad_()
    jacobian = torch.autograd.functional.jacobian(moved, at)
    assert not torch.allclose(jacobian, torch.eye(12, dtype=F64), atol=0.1)
    torch.testing.assert_close(torch.linalg.det(jacobian).abs(), torch.ones((), dtype=F64))


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_a_leapfrog_step_by_hand(kind):
    kernel = kernel_of(kind, num_steps=1)
    z, momentum = some(1, 3, 2), some(1, 3, 2, seed=1)
    end, final = kernel._leapfrog(banana, banana(z), POWER, momentum)
    for n in range(3):
        root = kernel.scale[n] if kind == "full" else kernel.scale[n].diag()

        def slope(at, n=n):
            at = at.clone().requires_grad_()
            height = banana.base(at) + POWER[n] * banana.ratio(at)
            return torch.autograd.grad(height, [at])[0]

        half = momentum[0, n] + 0.5 * kernel.step[n] * root.T @ slope(z[0, n])
        there = z[0, n] + kernel.step[n] * root @ half
        torch.testing.assert_close(end.z[0, n], there)
        torch.testing.assert_close(final[0, n], half + 0.5 * kernel.step[n] * root.T @ slope(there))


def test_short_steps_keep_the_energy():
    """The error of a trajectory of one length falls with the square of the step size."""
    z, momentum = some(8, 3, 2), some(8, 3, 2, seed=1)
    errors = []
    for halvings in range(3):
        step = tuple(0.1 / 2**halvings for _ in range(3))
        kernel = kernel_of("full", num_steps=8 * 2**halvings, step=step)
        end, final = kernel._leapfrog(banana, banana(z), POWER, momentum)
        before = banana(z).height(POWER) - 0.5 * momentum.square().sum(-1)
        errors.append((end.height(POWER) - 0.5 * final.square().sum(-1) - before).abs().mean())
    assert 3.5 < errors[0] / errors[1] < 4.5 and 3.5 < errors[1] / errors[2] < 4.5


def run(kernel, density, z, power, count, seed=0):
    """Move chains a number of times: the point, and mean acceptance and divergences of data."""
    point, stream = density(z), Stream(seed, 1)
    accepted, diverged = 0.0, 0.0
    for _ in range(count):
        point, acceptance, lost = kernel(density, point, power, stream)
        accepted, diverged = accepted + acceptance.mean(0) / count, diverged + lost.sum(0)
    return point, accepted, diverged


def agree(draws, exact, errors=4.5):
    """Whether means and squares over chains [C, ...] are known numbers, to standard errors."""
    for found, wanted in zip((draws, draws.square()), exact, strict=True):
        error = found.std(0) / len(found) ** 0.5
        assert ((found.mean(0) - wanted).abs() < errors * error).all()


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_a_gaussian_is_left_as_it_is(kind):
    """From exact draws, with steps so large that many are rejected; 20,000 chains."""
    covariance = torch.tensor([[2.0, 0.9], [0.9, 0.7]], dtype=F64).expand(3, 2, 2)
    root = torch.linalg.cholesky(covariance)
    z = torch.einsum("nde,cne->cnd", root, some(20_000, 3, 2))
    kernel = kernel_of(kind, num_steps=2, step=(0.9, 1.2, 0.8))
    point, acceptance, _ = run(kernel, gaussian(covariance.inverse()), z, POWER, 3)
    assert 0.1 < acceptance.min() < 0.6 and acceptance.max() < 0.97
    assert (point.z != z).any(-1).double().mean() > 0.5
    agree(point.z, (0.0, covariance.diagonal(dim1=-2, dim2=-1)))
    product = point.z.prod(-1)
    assert ((product.mean(0) - 0.9).abs() < 4.5 * product.std(0) / 20_000**0.5).all()


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_a_skewed_density_is_left_as_it_is_at_every_power(kind):
    """A log of a Gamma, whose moments are polygamma functions; 20,000 chains, 4.5 errors."""
    shape = 1.5 + 0.7 * POWER
    gamma = torch.distributions.Gamma(shape.unsqueeze(-1).expand(3, 2), 1.0)
    torch.manual_seed(0)
    z = gamma.sample((20_000,)).log()
    point, acceptance, _ = run(
        kernel_of(kind, num_steps=3, step=(0.9, 0.8, 0.7)), log_gamma, z, POWER, 4
    )
    assert acceptance.min() > 0.2 and acceptance.max() < 0.97
    mean, variance = torch.digamma(shape), torch.polygamma(1, shape)
    agree(point.z, (mean.unsqueeze(-1), (variance + mean.square()).unsqueeze(-1)))
    third = (point.z - mean.unsqueeze(-1)).pow(3)
    skew = torch.polygamma(2, shape).unsqueeze(-1)
    assert ((third.mean(0) - skew).abs() < 4.5 * third.std(0) / 20_000**0.5).all()


def test_chains_from_elsewhere_arrive():
    """At the density of each datum's own power, to 4.5 errors of 4,000 chains."""
    kernel = kernel_of("diagonal", num_steps=4, step=(0.3, 0.3, 0.3))
    point, _, _ = run(kernel, log_gamma, some(4000, 3, 2) - 1, POWER, 50)
    shape = (1.5 + 0.7 * POWER).unsqueeze(-1)
    mean, variance = torch.digamma(shape), torch.polygamma(1, shape)
    agree(point.z, (mean, variance + mean.square()))


def test_a_chain_does_not_know_of_other_data():
    z = some(5, 3, 2)
    one, _, _ = run(kernel_of("full"), banana, z, POWER, 3)
    changed = z.clone()
    changed[:, 1] += 1
    other, _, _ = run(kernel_of("full"), banana, changed, POWER, 3)
    assert torch.equal(one.z[:, [0, 2]], other.z[:, [0, 2]])
    assert not torch.equal(one.z[:, 1], other.z[:, 1])


def test_every_term_of_a_point_is_that_of_its_place():
    point, acceptance, _ = run(
        kernel_of("diagonal", step=(0.6, 0.9, 1.2)), banana, some(50, 3, 2), POWER, 5
    )
    assert 0.05 < acceptance.min() < 0.99
    there = banana(point.z)
    for name in ("base", "ratio", "base_slope", "ratio_slope"):
        torch.testing.assert_close(getattr(point, name), getattr(there, name))


def test_the_step_size_varies_by_a_quarter():
    """In a flat density a trajectory goes as far as its steps are long."""
    flat = ByFormula(zero, zero)
    kernel = Kernel(torch.ones(1, dtype=F64), torch.ones(1, 1, dtype=F64), 1)
    lengths = []
    for seed in range(200):
        stream = Stream(seed)
        point, _, _ = kernel(flat, flat(torch.zeros(1, 1, 1, dtype=F64)), POWER[:1], stream)
        lengths.append(point.z.item() / Stream(seed).normal(point.z).item())
    assert 0.75 <= min(lengths) < 0.77 and 1.23 < max(lengths) <= 1.25


# --- what is no number


def nan_slopes(z):
    point = banana(z)
    beyond = (z[..., 0] > 0).unsqueeze(-1)
    return Point(
        z,
        point.base,
        point.ratio,
        point.base_slope.masked_fill(beyond, math.nan),
        point.ratio_slope,
    )


BROKEN = {
    "-inf": lambda z: torch.where(z[..., 0] > 0, -math.inf, banana.base(z)),
    "inf": lambda z: torch.where(z[..., 0] > 0, math.inf, banana.base(z)),
    "nan": lambda z: torch.where(z[..., 0] > 0, math.nan, banana.base(z)),
}


@pytest.mark.parametrize("kind", [*BROKEN, "slopes"])
def test_where_there_is_no_density_chains_do_not_go(kind):
    density = nan_slopes if kind == "slopes" else ByFormula(BROKEN[kind], banana.ratio)
    z = some(400, 3, 2)
    z[..., 0] = -z[..., 0].abs()
    point, acceptance, diverged = run(kernel_of("full"), density, z, POWER, 5)
    assert (point.z[..., 0] <= 0).all() and (point.z != z).any(-1).double().mean() > 0.7
    for term in (point.z, point.base, point.ratio, point.base_slope, point.ratio_slope):
        assert term.isfinite().all()
    assert acceptance.isfinite().all() and (diverged > 0).all()


def test_a_half_of_a_gaussian_is_left_as_it_is():
    """With walls that reject: mean sqrt(2/pi), 20,000 chains, 4.5 errors."""
    wall = ByFormula(
        lambda z: torch.where(z[..., 0] > 0, -0.5 * z.square().sum(-1), -math.inf), zero
    )
    z = some(20_000, 1, 1).abs()
    kernel = Kernel(torch.tensor([0.7], dtype=F64), torch.ones(1, 1, dtype=F64), 2)
    point, _, diverged = run(kernel, wall, z, POWER[2:], 4)
    assert (diverged > 1000).all()
    agree(point.z, ((2 / math.pi) ** 0.5, 1.0))


def test_from_where_there_is_no_density_chains_come_back():
    outside = ByFormula(BROKEN["-inf"], banana.ratio)
    z = some(50, 3, 2)
    z[..., 0] = z[..., 0].abs()
    point, _, _ = run(kernel_of("diagonal", step=(0.3, 0.3, 0.3)), outside, z, POWER, 40)
    assert (point.z[..., 0] <= 0).double().mean() > 0.9


def test_steps_out_of_all_numbers_are_rejected_and_the_model_does_not_see_them():
    seen = []

    def density(z):
        seen.append(z)
        return banana(z)

    z = some(10, 3, 2)
    kernel = kernel_of("diagonal", step=(1e200, 1e308, 0.1))
    point, acceptance, diverged = run(kernel, density, z, POWER, 3)
    assert all(z.isfinite().all() for z in seen)
    assert torch.equal(point.z[:, :2], z[:, :2]) and (acceptance[:2] == 0).all()
    assert (diverged[:2] == 30).all() and diverged[2] == 0 and acceptance[2] > 0.9
    assert point.height(POWER).isfinite().all()


def test_a_trajectory_that_was_lost_is_no_step_that_stayed():
    """Where nothing pulls, its momentum is as good as before: it is rejected all the same."""
    flat, z = ByFormula(zero, zero), some(50, 1, 1)
    kernel = Kernel(torch.tensor([1e308], dtype=F64), torch.full((1, 1), 9.0, dtype=F64), 1)
    point, acceptance, diverged = run(kernel, flat, z, POWER[2:], 1)
    lost = (point.z == z).double().mean()
    assert lost > 0.8 and diverged > 0.8 * 50
    assert acceptance < 0.2


def test_a_height_that_is_no_number_is_minus_infinity():
    numbers = torch.tensor([[0.0, math.nan, math.inf, -math.inf]], dtype=torch.float32)
    point = Point(numbers, numbers, torch.ones_like(numbers), numbers, numbers)
    height = point.height(torch.full((4,), 0.5, dtype=F64))
    assert height.dtype == F64
    assert height.tolist() == [[0.5, -math.inf, -math.inf, -math.inf]]


def test_single_precision_stays_single_precision():
    z = some(6, 3, 2).float()
    kernel = kernel_of("full")
    kernel = Kernel(kernel.step, kernel.scale.float(), kernel.num_steps)
    point, acceptance, _ = run(kernel, banana, z, POWER, 3)
    assert point.z.dtype == torch.float32 and acceptance.dtype == F64


# --- step sizes


@pytest.mark.parametrize("target", [0.6, 0.8, 0.95])
def test_step_sizes_reach_the_wanted_acceptance(target):
    """From far too small, right, and far too large; to 0.06 after 300 transitions."""
    sizes = StepSizes(torch.tensor([1e-3, 0.5, 50.0], dtype=F64), target)
    scale, stream, point = torch.ones(3, 2, dtype=F64), Stream(0), log_gamma(some(50, 3, 2))
    for _ in range(300):
        kernel = Kernel(sizes.current, scale, 3)
        point, acceptance, _ = kernel(log_gamma, point, POWER, stream)
        sizes.update(acceptance.mean(0))
    kernel = Kernel(sizes.average, scale, 3)
    _, acceptance, _ = run(kernel, log_gamma, point.z, POWER, 100)
    assert ((acceptance - target).abs() < 0.06).all()


def test_step_sizes_by_the_recursion_of_dual_averaging():
    """Hoffman & Gelman (2014), algorithm 5, written out: gamma 0.05, t_0 10, kappa 0.75."""
    start, target = torch.tensor([0.3, 2.0], dtype=F64), 0.8
    sizes = StepSizes(start, target)
    log_mean, error = start.log(), torch.zeros(2, dtype=F64)
    generator = torch.Generator().manual_seed(0)
    for m in range(1, 20):
        acceptance = torch.rand(2, generator=generator, dtype=F64)
        error = (1 - 1 / (m + 10)) * error + (target - acceptance) / (m + 10)
        log_step = (10 * start).log() - m**0.5 / 0.05 * error
        log_mean = m**-0.75 * log_step + (1 - m**-0.75) * log_mean
        sizes.update(acceptance)
        torch.testing.assert_close(sizes.current, log_step.exp())
        torch.testing.assert_close(sizes.average, log_mean.exp())


def test_step_sizes_begin_anew():
    sizes = StepSizes(torch.tensor([0.1, 0.2]), 0.8)
    assert sizes.current.dtype == F64
    torch.testing.assert_close(sizes.average, sizes.current)
    sizes.update(torch.tensor([0.1, 0.9], dtype=F64))
    sizes.restart(torch.tensor([1.0, 2.0], dtype=F64))
    assert sizes.current.tolist() == [1.0, 2.0] == sizes.average.tolist()
    fresh = StepSizes(torch.tensor([1.0, 2.0]), 0.8)
    for each in (sizes, fresh):
        each.update(torch.tensor([0.5, 0.5], dtype=F64))
    torch.testing.assert_close(sizes.current, fresh.current)
