"""Weights of annealed chains are unbiased, forward and backward; schedules go from 0 to 1."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.particles.estimators import Estimate
from pyro_vae.sampling.annealing import Annealer, Path
from pyro_vae.sampling.streams import Stream
from tests.models import GammaPoisson, NormalModel, encoder, factor_analysis
from tests.sampling.pairs import (
    chain_after_data,
    chain_after_data_evidence,
    integrals,
    local,
    masked_model,
    normal_mixture,
    normal_mixture_joint,
    only_block,
    two_sites,
    two_sites_evidence,
    two_sites_posterior,
)

F64 = torch.float64
STARTS = ("guide", "prior")
SCHEDULES = ("linear", "sigmoidal", "adaptive")
COUNTS = torch.tensor([0.0, 3.0, 8.0], dtype=F64)
REALS = torch.tensor([-1.0, 0.5, 3.0], dtype=F64)


def annealer(model, guide, *batch, start="guide", chains=1000, steps=8, schedule="adaptive", **kw):
    made, rows, block = only_block(model, guide, *batch, **kw)
    return Annealer(made, rows, block, start, chains, steps, schedule)


def mean_is_one(relative, errors=4.5):
    """Whether numbers [C, N] have the mean one, by their standard errors, which are small."""
    error = relative.std(0) / len(relative) ** 0.5
    assert (error < 0.15).all()
    assert ((relative.mean(0) - 1).abs() < errors * error + 1e-10).all()


# --- the mean of the weights is the evidence


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("start", STARTS)
def test_the_mean_of_the_weights_is_the_evidence(start, schedule):
    """Gamma-Poisson with few steps: 4.5 standard errors of 3,000 chains."""
    model = GammaPoisson()
    made = annealer(
        model, local(model, COUNTS), COUNTS, start=start, schedule=schedule, chains=3000, steps=5
    )
    weights = made.forward(made.path())[0]
    assert weights.shape == (3000, 3) and weights.dtype == F64
    mean_is_one((weights - model.log_evidence(COUNTS)).exp())


@pytest.mark.parametrize("start", STARTS)
def test_the_mean_of_inverse_weights_is_the_inverse_evidence(start):
    """Backward from exact draws of the posterior: 4.5 standard errors of 3,000 chains."""
    model = GammaPoisson()
    made = annealer(model, local(model, COUNTS), COUNTS, start=start, chains=3000, steps=8)
    torch.manual_seed(1)
    z = torch.distributions.Gamma(2 + COUNTS, 2.0).sample((3000,)).log().unsqueeze(-1)
    weights = made.backward(made.path(), z)[0]
    mean_is_one((model.log_evidence(COUNTS) - weights).exp())


@pytest.mark.parametrize("start", STARTS)
def test_two_sites_forward_and_backward(start):
    x = torch.tensor([[1.0, -1.0], [1.0, 1.5]], dtype=F64)
    made = annealer(two_sites, local(two_sites, x), x, start=start, chains=3000, steps=24)
    path, exact = made.path(), two_sites_evidence(x)
    mean_is_one((made.forward(path)[0] - exact).exp())
    torch.manual_seed(1)
    mean, covariance = two_sites_posterior(x)
    z = dist.MultivariateNormal(mean, covariance).sample((3000,))
    mean_is_one((exact - made.backward(path, z)[0]).exp())


def test_a_discrete_latent_is_summed_out():
    made = annealer(normal_mixture, local(normal_mixture, REALS), REALS, start="prior", chains=3000)
    exact = normal_mixture_joint(REALS).logsumexp(-1)
    mean_is_one((made.forward(made.path())[0] - exact).exp())


@pytest.mark.parametrize("start", STARTS)
def test_a_latent_that_follows_observed_values(start):
    x = torch.tensor([[5.0, 5.5], [-4.0, -3.0]], dtype=F64)
    guide = local(chain_after_data, x)
    with torch.no_grad():
        guide.table[:, 0, 0] = x[:, 0]
    made = annealer(chain_after_data, guide, x, start=start, chains=3000)
    mean_is_one((made.forward(made.path())[0] - chain_after_data_evidence(x)).exp())


def test_masked_latents_leave_the_evidence():
    seen = torch.tensor([True, False, False])
    guide = pv.LocalGuide(masked_model, num_data=3, example=(REALS, seen)).double()
    made = annealer(masked_model, guide, REALS, seen, chains=3000)
    weights = made.forward(made.path())[0][:, 1:]
    mean_is_one((weights - dist.Normal(0.0, 1.49**0.5).log_prob(REALS[1:])).exp())
    with pytest.raises(ValueError, match="start='prior'"):
        annealer(masked_model, guide, REALS, seen, start="prior").path()


def test_all_latents_as_one_datum():
    model = NormalModel()
    guide = local(model, REALS, data_plate=False)
    made = annealer(model, guide, REALS, chains=3000, data_plate=False)
    weights = made.forward(made.path())[0]
    assert weights.shape == (3000, 1)
    mean_is_one((weights - model.log_evidence(REALS).sum()).exp())


def test_from_the_exact_posterior_every_weight_is_the_evidence():
    model = NormalModel()
    made = annealer(model, model.posterior, REALS, chains=8, steps=3)
    path, exact = made.path(), model.log_evidence(REALS).expand(8, -1)
    torch.testing.assert_close(made.forward(path)[0], exact)
    z = torch.randn(8, 3, 1, dtype=F64)
    torch.testing.assert_close(made.backward(path, z)[0], exact)


def test_one_step_is_importance_sampling():
    """T = 1: no transition, w = p(x, z) / q(z) of draws of the base."""
    model = factor_analysis()
    x = model.data(4)
    made = annealer(model, local(model, x), x, chains=50, steps=1)
    point = made.density()(made.first(1))
    torch.testing.assert_close(made.forward(made.path())[0], point.ratio)


def test_a_draw_of_no_density_has_no_weight():
    """A prior that the likelihood refuses below zero: the evidence of half of it, 4.5 errors."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Exponential(torch.where(z > 0, 1.0, math.nan).to(x)), obs=x)

    x = torch.tensor([0.5, 2.0], dtype=F64)
    with pyro.validation_enabled(False):
        made = annealer(model, local(NormalModel(), x), x, start="prior", chains=2000, steps=3)
        weights = made.forward(made.path())[0]
    assert not weights.isnan().any() and (weights == -math.inf).double().mean() > 0.3
    mean_is_one((weights + x).exp() * 2)
    # A reverse chain that begins there has an infinite w: 1 / w adds nothing to the upper bound.
    with pyro.validation_enabled(False):
        starts = torch.tensor([-1.0, 1.0], dtype=F64).reshape(2, 1, 1).expand(2, 2, 1)
        backward = made.backward(made.path(), starts)[0]
    assert (backward[0] == math.inf).all() and backward[1].isfinite().all()


def test_chains_that_all_begin_where_there_is_no_density_are_told():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Uniform(z - 1, z + 1, validate_args=False), obs=x)

    for x, hopeless in (([60.0, 70.0], True), ([60.0, 0.0], False)):
        x = torch.tensor(x, dtype=F64)
        made = annealer(model, local(NormalModel(), x), x, start="prior", chains=50, steps=3)
        assert made.is_hopeless() == hopeless
        assert (made.forward(made.path())[0] == -math.inf).all(0).tolist() == [True, hopeless]


# --- closing on the evidence


@pytest.mark.slow
def test_a_sandwich_around_the_evidence_of_factor_analysis():
    """Ten latents, a guide that is off: lower and upper are within 0.1 nat of one another."""
    model = factor_analysis(features=12, latents=10)
    torch.manual_seed(0)
    x = model.data(4)
    posterior = dist.MultivariateNormal(
        model.posterior_mean(x), precision_matrix=model.posterior_precision
    )
    guide = local(model, x)
    with torch.no_grad():  # a mean field around the posterior's mean
        guide.table[..., 0] = posterior.mean
        guide.table[..., 1] = -0.5 * model.posterior_precision.diagonal().log()
    made = annealer(model, guide, x, chains=64, steps=600, compile="replay")
    path, exact = made.path(), model.log_evidence(x)
    lower = Estimate.iwae(made.forward(path)[0])
    upper = Estimate.iwae(-made.backward(path, posterior.sample((64,)))[0])
    assert ((-upper.value - lower.value).abs() < 0.1).all()
    assert ((lower.value - exact).abs() < 4.5 * lower.std_error + 1e-3).all()
    assert ((upper.value + exact).abs() < 4.5 * upper.std_error + 1e-3).all()


def modes_far_apart(x):
    """z ~ Normal(0, 3), x ~ Normal(z ** 2, 1): modes at both roots of x."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 3.0))
        pyro.sample("x", dist.Normal(z.square(), 1.0), obs=x)


def test_both_modes_are_reached_from_the_prior_where_a_guide_sees_one():
    x = torch.tensor([9.0, 16.0], dtype=F64)
    guide = local(modes_far_apart, x)
    with torch.no_grad():
        guide.table[:, 0, 0] = x.sqrt()
        guide.table[:, 0, 1] = -(2 * x.sqrt()).log()
    one_mode = pv.iwae_bound(modes_far_apart, guide, x, num_particles=1000, seed=0)
    made = annealer(modes_far_apart, guide, x, start="prior", chains=400, steps=30)
    exact = integrals(made.density(), 2, 1.0)
    assert ((one_mode.value - (exact - math.log(2))).abs() < 0.03).all()
    found = Estimate.iwae(made.forward(made.path())[0])
    assert (found.std_error < 0.2).all()
    assert ((found.value - exact).abs() < 4.5 * found.std_error).all()


# --- paths


def path_of(schedule, start="prior", steps=20, chains=300):
    model = GammaPoisson()
    made = annealer(
        model,
        local(model, COUNTS),
        COUNTS,
        start=start,
        schedule=schedule,
        steps=steps,
        chains=chains,
    )
    return made, made.path()


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 12])
def test_powers_go_from_zero_to_one(schedule, start, steps):
    _, path = path_of(schedule, start, steps, chains=8)
    assert path.powers.shape == (steps + 1, 3) == path.steps.shape
    assert path.scales.shape == (steps + 1, 3, 1)
    assert (path.powers[0] == 0).all() and (path.powers[-1] == 1).all()
    assert (path.powers.diff(dim=0) > 0).all()
    assert (path.steps > 0).all() and (path.scales > 0).all()
    assert path.steps.isfinite().all() and path.scales.isfinite().all()


def test_powers_by_formula():
    _, linear = path_of("linear", chains=4)
    even = torch.linspace(0, 1, 21, dtype=F64)
    torch.testing.assert_close(linear.powers, even.unsqueeze(1).expand(-1, 3))
    _, sigmoidal = path_of("sigmoidal", chains=4)
    sigmoid = torch.sigmoid(4 * (2 * even - 1))
    exact = (sigmoid - sigmoid[0]) / (sigmoid[-1] - sigmoid[0])
    torch.testing.assert_close(sigmoidal.powers, exact.unsqueeze(1).expand(-1, 3))


def spreads(made, path):
    """Standard deviation over chains of what each step adds to log weights, [T, N]."""
    ratios, density, stream = [], made.density(), Stream(0, 99)
    point = density(made.first(1))
    for number in range(1, len(path.powers)):
        ratios.append(point.ratio.double().std(0))
        if number < len(path.powers) - 1:
            point, _, _ = path.kernel(number)(density, point, path.powers[number], stream)
    return path.powers.diff(dim=0) * torch.stack(ratios)


def test_an_adaptive_schedule_is_even():
    """What a step adds spreads alike within a factor of three; by the others it does not."""
    model, widest = NormalModel(noise=0.5), {}
    for schedule in SCHEDULES:
        options = {"start": "prior", "schedule": schedule, "steps": 40, "chains": 300}
        made = annealer(model, local(model, REALS), REALS, **options)
        spread = spreads(made, made.path())
        widest[schedule] = spread.amax(0) / spread.amin(0)
    assert (widest["linear"] > 5).all() and (widest["sigmoidal"] > 20).all()
    assert (widest["adaptive"] < 3).all()


def test_a_path_has_the_kernel_of_its_nearest_pilot():
    powers = torch.tensor([[0.0], [0.5], [1.0]], dtype=F64)
    path = Path(powers, 2 * powers + 1, powers.unsqueeze(-1) + 3)
    kernel = path.kernel(1)
    assert kernel.step.tolist() == [2.0] and kernel.scale.tolist() == [[3.5]]


def test_step_sizes_are_near_the_wanted_acceptance():
    """0.7 on average over the second half of a pilot of many chains, to 0.12."""
    made, path = path_of("linear", steps=40, chains=300)
    density, stream, accepted = made.density(), Stream(0, 98), []
    point = density(made.first(1))
    for number in range(1, 41):
        point, acceptance, _ = path.kernel(number)(density, point, path.powers[number], stream)
        accepted.append(acceptance.mean(0))
    assert ((torch.stack(accepted[15:]).mean(0) - 0.7).abs() < 0.12).all()


# --- random numbers, progress


def test_one_seed_gives_one_answer():
    model = factor_analysis()
    torch.manual_seed(0)
    x = model.data(4)
    guide = pv.AmortizedGuide(model, encoder(6), example=x)
    found = []
    for seed in (1, 1, 2):
        before = torch.get_rng_state()
        made = annealer(model, guide, x, chains=4, steps=4, seed=seed)
        path = made.path()
        found.append((path.powers, made.forward(path)[0]))
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(*found[:2], strict=True))
    assert not any(torch.equal(a[1:-1], b[1:-1]) for a, b in zip(*found[1:], strict=True))


def test_the_pilot_has_draws_of_its_own():
    made, _ = path_of("linear", start="guide")
    assert not torch.equal(made.first(0), made.first(1))
    made, _ = path_of("linear", start="prior")
    assert not torch.equal(made.first(0), made.first(1))


def test_progress_counts_data_and_steps():
    made, path = path_of("linear", steps=5, chains=4)
    told = []
    made.forward(path, told.append)
    assert sum(told) == 5 * 3
    made.backward(path, torch.zeros(4, 3, 1, dtype=F64), told.append)
    assert sum(told) == 2 * 5 * 3


def test_single_precision():
    model = GammaPoisson()
    x = COUNTS.float()
    guide = pv.LocalGuide(model, num_data=3, example=x)
    made = annealer(model, guide, x, chains=2000, steps=6)
    path = made.path()
    assert path.powers.dtype == F64 and path.scales.dtype == torch.float32
    weights = made.forward(path)[0]
    assert weights.dtype == F64
    mean_is_one((weights - model.log_evidence(COUNTS)).exp())


def test_moves_make_chains_leave_their_draw_and_leave_weights_unbiased():
    """All chains of a repetition begin at one exact draw; 200 data alike, 4.5 standard errors."""
    model, count = NormalModel(), 200
    x = torch.full((count,), 0.7, dtype=F64)
    made = annealer(model, local(model, x), x, chains=4, steps=8)
    torch.manual_seed(1)
    z = model.posterior_of(x).sample().expand(4, -1).unsqueeze(-1)
    exact, path = model.log_evidence(x), made.path()
    for moves, left in ((0, 0.0), (5, 1.0)):
        weights, moved = made.backward(path, z, moves=moves)
        assert moved.shape == (4, count) and moved.double().mean() == pytest.approx(left, abs=0.02)
        mean_is_one((exact - weights).exp().mean(0).unsqueeze(-1))


# --- a guide that is a point beside the posterior


def point_guide(model, x, shares):
    """A guide with the posterior's middle, and a share of its width for each datum."""
    guide = local(model, x)
    exact = model.posterior_of(x)
    with torch.no_grad():
        guide.table[:, 0, 0] = exact.loc
        guide.table[:, 0, 1] = (exact.scale * torch.tensor(shares, dtype=F64)).log()
    return guide


def test_a_guide_far_too_narrow_is_widened_to_the_curvature():
    """Of a Gaussian it becomes the posterior, so that every weight is the evidence.

    As it is, weights of one of 1e-4 are alike, and 2 to 4 nats too low. One that is half as wide
    as the posterior, or wider, stays as it is.
    """
    model = NormalModel()
    x = torch.tensor([-1.0, 0.5, 3.0, 1.0, 1.0, 1.0], dtype=F64)
    shares = [1e-6, 1e-4, 0.2, 0.5, 1.0, 2.0]
    made = annealer(model, point_guide(model, x, shares), x, chains=4, steps=3)
    _, width = made._wider
    expected = torch.tensor([1e6, 1e4, 5.0, 1.0, 1.0, 1.0], dtype=F64)
    torch.testing.assert_close(width[:, 0], expected, rtol=1e-3, atol=0)
    weights, _ = made.forward(made.path())
    # Gradients over draws of 1e-6 are rounded.
    exact = model.log_evidence(x)[:3].expand(4, 3)
    torch.testing.assert_close(weights[:, :3], exact, rtol=0, atol=1e-3)


def test_where_the_posterior_curves_upward_the_prior_says_how_wide():
    """x ~ Normal(z^2, 0.5) at z = 0 and x = 9: a minimum between two modes, and a prior of 2."""

    def square(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 2.0))
            pyro.sample("x", dist.Normal(z.square(), 0.5), obs=x)

    x = torch.tensor([9.0], dtype=F64)
    guide = local(square, x)
    with torch.no_grad():
        guide.table[:, 0, 0], guide.table[:, 0, 1] = 0.0, math.log(0.01)
    made = annealer(square, guide, x, chains=4, steps=3)
    assert float(made._wider[1]) * 0.01 == pytest.approx(2.0, rel=0.25)


def test_from_the_prior_nothing_is_widened():
    model = NormalModel()
    guide = point_guide(model, REALS, [1e-4] * 3)
    assert annealer(model, guide, REALS, start="prior")._wider == ()


def test_the_density_of_a_widened_guide_is_normalized():
    """Its integral over a grid is one, at power 0, and the evidence at power 1."""
    model = NormalModel()
    made = annealer(model, point_guide(model, REALS, [0.2, 0.1, 0.25]), REALS)
    for power, exact in ((0.0, torch.zeros(3, dtype=F64)), (1.0, model.log_evidence(REALS))):
        found = integrals(made.density(), 3, power)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)
