"""Chains give the exact posterior of every datum, and say where they do not."""

from __future__ import annotations

import logging
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from tqdm.auto import tqdm

import pyro_vae as pv
from pyro_vae.diagnostics.convergence import Convergence
from pyro_vae.particles import pair_runner
from pyro_vae.sampling import chains
from pyro_vae.sampling.chains import _is_slow, _learned, _log_mass, _Settings, _steps, _warm_up
from pyro_vae.sampling.hmc import Kernel, Point
from pyro_vae.sampling.streams import Stream
from tests.models import GammaPoisson, NormalModel, encoder, factor_analysis, log_normal_model
from tests.sampling.pairs import (
    local,
    masked_model,
    normal_mixture,
    normal_mixture_joint,
    only_block,
    two_sites,
    two_sites_posterior,
)
from tests.sampling.test_importance import absolute

F64 = torch.float64
COUNTS = torch.tensor([0.0, 3.0, 8.0], dtype=F64)
REALS = torch.tensor([-1.0, 0.5, 3.0], dtype=F64)


def sample(model, guide, *batch, **options):
    """Few draws by recorded graphs, unless said otherwise."""
    defaults = {"num_chains": 4, "num_draws": 200, "num_warmup": 60, "seed": 0}
    options = {**defaults, "compile": "replay", "progress": False, **options}
    return pv.sample_posterior(model, guide, *batch, **options)


def agree(samples, site, mean, std, errors=5.5):
    """Whether means and standard deviations are known ones, to Monte Carlo standard errors.

    Each of hundreds to ``errors`` of them, and all together: where there are many, the mean of
    their squares is below 1.25 squared.
    """
    draws = samples.draws[site].double().numpy()
    flat = draws.reshape(*draws.shape[:2], -1)
    squares = (flat - flat.mean((0, 1))) ** 2
    shape = draws.shape[2:]
    sizes, of_squares = (Convergence.of(part).ess_bulk.reshape(shape) for part in (flat, squares))
    mean, std = torch.as_tensor(mean).numpy(), torch.as_tensor(std).numpy()
    # The error of a variance, from the spread of the squares that it is a mean of.
    error = squares.std((0, 1)).reshape(shape) / of_squares**0.5
    for off in (
        (samples.mean(site).numpy() - mean) / (std / sizes**0.5),
        (samples.std(site).numpy() ** 2 - std**2) / error,
    ):
        assert np.abs(off).max() < errors
        assert off.size < 100 or (off**2).mean() < 1.25**2


@pytest.fixture(scope="module")
def setting():
    model = factor_analysis()
    torch.manual_seed(0)
    x = model.data(50)
    return model, x, pv.AmortizedGuide(model, encoder(6), example=x)


@pytest.fixture(scope="module")
def drawn(setting):
    return sample(*_pair(setting), num_draws=400, num_warmup=100)


def _pair(setting):
    model, x, guide = setting
    return model, guide, x


# --- known posteriors


def test_factor_analysis(setting, drawn):
    """Correlated posteriors of 50 data from a guide that knows nothing: 4.5 standard errors."""
    model, x, _ = setting
    assert drawn.draws["z"].shape == (4, 400, 50, 3) and drawn.draws["z"].dtype == F64
    assert (drawn.rhat < 1.02).all() and (drawn.rhat < 1.01).double().mean() > 0.8
    covariance = model.posterior_precision.inverse()
    std = covariance.diagonal().sqrt().expand(50, 3)
    agree(drawn, "z", model.posterior_mean(x), std)
    draws = drawn.draws["z"].flatten(0, 1)
    centred = draws - draws.mean(0)
    found = torch.einsum("knd,kne->de", centred, centred) / (50 * 1599)
    torch.testing.assert_close(found, covariance, rtol=0, atol=0.03 * float(covariance.max()))


def test_what_is_said_of_factor_analysis(drawn):
    for numbers in (drawn.rhat, drawn.ess, drawn.ess_tail, drawn.acceptance, drawn.step_size):
        assert numbers.shape == (50,) and numbers.isfinite().all()
    assert drawn.divergences.shape == (50,) and not drawn.divergences.is_floating_point()
    assert int(drawn.divergences.sum()) == 0 and drawn.converged.double().mean() > 0.8
    # More than the 0.8 that was wanted, as whole steps make up no longer trajectories.
    assert 0.75 < drawn.acceptance.mean() < 0.95 and (drawn.step_size > 0).all()
    assert len(drawn.num_steps) == 1 and drawn.given == {}


def test_log_joint_is_that_of_the_draws(setting, drawn):
    model, x, _ = setting
    posterior = dist.MultivariateNormal(
        model.posterior_mean(x), precision_matrix=model.posterior_precision
    )
    exact = model.log_evidence(x) + posterior.log_prob(drawn.draws["z"])
    torch.testing.assert_close(drawn.log_joint, exact)


def test_diagnostics_are_the_worst_of_coordinates_and_log_joint(drawn):
    quantities = torch.cat([drawn.draws["z"], drawn.log_joint.unsqueeze(-1)], -1).numpy()
    for n in (0, 17, 49):
        of_one = [Convergence.of(quantities[:, :, n, [m]]) for m in range(4)]
        assert float(drawn.rhat[n]) == pytest.approx(max(float(c.rhat[0]) for c in of_one))
        assert float(drawn.ess[n]) == pytest.approx(min(float(c.ess_bulk[0]) for c in of_one))
        tail = min(float(c.ess_tail[0]) for c in of_one)
        assert float(drawn.ess_tail[n]) == pytest.approx(tail)


def test_gamma_poisson_with_its_quantiles():
    """The rate given a count is a Gamma: moments, and five quantiles to 4.5 binomial errors."""
    model = GammaPoisson()
    found = sample(model, local(model, COUNTS), COUNTS)
    exact = torch.distributions.Gamma(2 + COUNTS, 2.0)
    agree(found, "rate", exact.mean, exact.stddev)
    rate = found.draws["rate"].flatten(0, 1)
    size = torch.minimum(found.ess, found.ess_tail)
    for level in (0.05, 0.25, 0.5, 0.75, 0.95):
        grid = torch.linspace(1e-4, 40, 400_001, dtype=F64)
        cdf = torch.special.gammainc(2 + COUNTS.unsqueeze(-1), 2 * grid)
        point = grid[(cdf - level).abs().argmin(-1)]
        error = (level * (1 - level) / size).sqrt()
        assert (((rate < point).double().mean(0) - level).abs() < 4.5 * error).all()


def test_a_hierarchy_of_two_sites():
    x = torch.tensor([[1.0, -1.0], [4.0, 5.0]], dtype=F64)
    found = sample(two_sites, local(two_sites, x), x)
    mean, covariance = two_sites_posterior(x)
    std = covariance.diagonal().sqrt().expand(2, 3)
    assert found.draws["m"].shape == (4, 200, 2, 1) and found.draws["z"].shape == (4, 200, 2, 2)
    agree(found, "m", mean[:, :1], std[:, :1])
    agree(found, "z", mean[:, 1:], std[:, 1:])


def test_a_discrete_latent_is_drawn_from_its_exact_posterior():
    """With one mode of z for each value: shares to 4.5 standard errors, z given c alike."""
    x = torch.tensor([-0.6, 0.0, 0.4], dtype=F64)
    found = sample(normal_mixture, local(normal_mixture, x), x, num_draws=300)
    c, z = found.draws["c"], found.draws["z"]
    assert c.shape == z.shape == (4, 300, 3) and set(c.unique().tolist()) == {0, 1}
    share = normal_mixture_joint(x).softmax(-1)[:, 1]
    error = (share * (1 - share) / found.ess).sqrt()
    assert ((c.double().mean((0, 1)) - share).abs() < 4.5 * error).all()
    means = torch.tensor([-2.0, 1.5], dtype=F64)
    for value in (0, 1):  # the posterior of z given c is Normal((m + 4 x) / 5, 1 / 5)
        mine = torch.where(c == value, z, math.nan).flatten(0, 1)
        count = (c == value).double().mean((0, 1)) * found.ess
        off = mine.nanmean(0) - (means[value] + 4 * x) / 5
        assert (off.abs() < 4.5 * (0.2 / count).sqrt()).all()


def test_all_latents_as_one_datum():
    model = NormalModel()
    guide = local(model, REALS, data_plate=False)
    found = sample(model, guide, REALS, data_plate=False)
    assert found.draws["z"].shape == (4, 200, 3) and found.rhat.shape == (1,)
    exact = model.posterior_of(REALS)
    agree(found, "z", exact.loc, exact.scale)


def with_a_global(x):
    mean = pyro.sample("mean", dist.Normal(x.new_zeros(()), 10.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_globals_are_held_where_they_are_given():
    value = torch.tensor(4.0, dtype=F64)
    found = sample(with_a_global, globals_guide, REALS, given={"mean": value})
    assert set(found.draws) == {"z"} and torch.equal(found.given["mean"], value)
    agree(found, "z", (REALS + 4) / 2, torch.full((3,), 0.5**0.5, dtype=F64))
    with pytest.raises(ValueError, match="'mean'"):
        sample(with_a_global, globals_guide, REALS)


def test_masked_latents_disturb_no_other():
    """Of data without w the posterior of z is a Normal; w has the density of the guide there."""
    seen = torch.tensor([True, False, False])
    guide = pv.LocalGuide(masked_model, num_data=3, example=(REALS, seen)).double()
    found = sample(masked_model, guide, REALS, seen)
    assert found.draws["w"].shape == (4, 200, 3) and (found.rhat < 1.05).all()
    exact_mean, exact_std = REALS / 1.49, torch.full((3,), (0.49 / 1.49) ** 0.5, dtype=F64)
    z = found.draws["z"][..., 1:].double()
    error = 4.5 * exact_std[1:] / found.ess[1:].sqrt()
    assert ((z.mean((0, 1)) - exact_mean[1:]).abs() < error).all()
    assert ((z.flatten(0, 1).std(0) / exact_std[1:] - 1).abs() < 0.15).all()


def test_sequences_of_different_lengths():
    """A linear state space model: states by the joint Gaussian, to 4.5 standard errors."""

    def model(x, lengths):
        with pyro.plate("data", len(x)):
            z = x.new_zeros(len(x))
            for t in range(x.shape[1]):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t}", dist.Normal(0.8 * z, 1.0))
                    pyro.sample(f"x_{t}", dist.Normal(z, 0.7), obs=x[:, t])

    x = torch.tensor([[1.0, -0.5, 2.0], [0.3, 1.5, 0.0]], dtype=F64)
    lengths = torch.tensor([3, 2])
    guide = pv.LocalGuide(model, num_data=2, example=(x, lengths)).double()
    found = sample(model, guide, x, lengths)
    for n, length in enumerate([3, 2]):
        step = torch.eye(length, dtype=F64) - 0.8 * torch.diag(
            torch.ones(length - 1, dtype=F64), -1
        )
        precision = step.T @ step + torch.eye(length, dtype=F64) / 0.49
        mean = torch.linalg.solve(precision, x[n, :length] / 0.49)
        std = precision.inverse().diagonal().sqrt()
        for t in range(length):
            off = found.mean(f"z_{t}")[n] - mean[t]
            assert abs(off) < 4.5 * std[t] / found.ess[n].sqrt()
            assert abs(found.std(f"z_{t}")[n] / std[t] - 1) < 0.12


@pytest.mark.slow
def test_a_deep_markov_model_runs():
    torch.manual_seed(0)
    model = pv.zoo.DeepMarkovModel(3, 2, hidden=[4]).double()
    x, lengths = torch.randn(2, 4, 3, dtype=F64), torch.tensor([4, 2])
    guide = pv.LocalGuide(model, num_data=2, example=(x, lengths)).double()
    found = sample(model, guide, x, lengths, num_draws=40, num_warmup=40)
    assert (found.rhat < 1.3).all() and found.log_joint.isfinite().all()
    assert found.draws["z_4"].shape == (4, 40, 2, 2)


# --- where it starts


def test_draws_outside_of_the_support_are_replaced():
    """A Normal proposes values below zero, which have no coordinates; moments by quadrature."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("s", dist.Normal(x.new_zeros(()), 1.0))

    found = sample(log_normal_model, guide, REALS)
    assert found.log_joint.isfinite().all() and found.draws["s"].min() > 0
    s = torch.linspace(1e-5, 30, 300_001, dtype=F64).unsqueeze(-1)
    density = dist.LogNormal(0.0, 1.0).log_prob(s) + dist.Normal(s, 1.0).log_prob(REALS)
    weights = density.softmax(0)
    mean = (weights * s).sum(0)
    agree(found, "s", mean, (weights * (s - mean).square()).sum(0).sqrt())


def positive_mixture(x):
    """rate ~ Gamma(2, 1), c a coin, x ~ Poisson(rate) or Poisson(3 rate)."""
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.0))
        c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.5)))
        pyro.sample("x", dist.Poisson(rate * (1 + 2 * c)), obs=x)


@pytest.mark.parametrize("kind", ["hand-written", "amortized"])
def test_any_guide_of_a_positive_latent_beside_a_discrete_one(kind):
    """Hand-written ones know of no coordinates; moments and shares by quadrature."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(2 + x, 2.0))

    if kind == "amortized":
        reads = torch.nn.Sequential(torch.nn.Unflatten(0, (-1, 1)), encoder(1))
        guide = pv.AmortizedGuide(positive_mixture, reads, example=COUNTS)
    found = sample(positive_mixture, guide, COUNTS)
    rate = torch.linspace(1e-5, 40, 400_001, dtype=F64).unsqueeze(-1)
    prior = dist.Gamma(torch.tensor(2.0, dtype=F64), 1.0).log_prob(rate)
    joint = torch.stack([dist.Poisson(rate * f).log_prob(COUNTS) + prior for f in (1.0, 3.0)])
    weights = (joint - joint.logsumexp((0, 1))).exp()
    mean = (weights * rate).sum((0, 1))
    agree(found, "rate", mean, (weights * (rate - mean).square()).sum((0, 1)).sqrt())
    share = weights[1].sum(0)
    error = (share * (1 - share) / found.ess).sqrt()
    assert ((found.mean("c") - share).abs() < 4.5 * error).all()


def test_points_are_a_start():
    model = NormalModel()
    guide = local(model, REALS, family=pv.families.Delta())
    found = sample(model, guide, REALS, num_draws=200)
    exact = model.posterior_of(REALS)
    agree(found, "z", exact.loc, exact.scale)


def test_a_guide_far_away_is_a_start():
    model = NormalModel(noise=0.1)
    guide = local(model, REALS)
    with torch.no_grad():
        guide.table[:, 0, 0], guide.table[:, 0, 1] = 30.0, -5.0
    found = sample(model, guide, REALS, num_draws=200)
    exact = model.posterior_of(REALS)
    agree(found, "z", exact.loc, exact.scale)


def test_refined_rows_are_a_start_and_their_globals_are_kept():
    value = torch.tensor(4.0, dtype=F64)
    guide = pv.refine(
        with_a_global,
        globals_guide,
        REALS,
        given={"mean": value},
        max_steps=1,
        seed=0,
        progress=False,
    )
    found = sample(with_a_global, guide, REALS, num_draws=100)
    assert torch.equal(found.given["mean"], value)
    assert ((found.mean("z") - (REALS + 4) / 2).abs() < 0.3).all()


def globals_guide(x):
    pyro.sample("mean", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 1.0))


# --- seeds, graphs, blocks, dtypes


SHORT = {"num_draws": 8, "num_warmup": 20, "num_chains": 2, "compile": False}


def test_a_seed_decides_and_the_global_random_state_stays(setting):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = sample(*_pair(setting), **SHORT, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    again = sample(*_pair(setting), **SHORT, seed=3)
    other = sample(*_pair(setting), **SHORT, seed=4)
    assert torch.equal(one.draws["z"], again.draws["z"])
    assert torch.equal(one.log_joint, again.log_joint) and torch.equal(one.rhat, again.rhat)
    assert (one.draws["z"] != other.draws["z"]).all()


def test_without_a_seed_the_global_random_state_decides(setting):
    found = []
    for number in (7, 7, 8):
        torch.manual_seed(number)
        found.append(sample(*_pair(setting), **SHORT, seed=None).draws["z"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_graphs_change_nothing(setting):
    eager = sample(*_pair(setting), **SHORT)
    replayed = sample(*_pair(setting), **{**SHORT, "compile": "replay"})
    torch.testing.assert_close(replayed.draws["z"], eager.draws["z"], rtol=0, atol=1e-8)
    torch.testing.assert_close(replayed.log_joint, eager.log_joint, rtol=0, atol=1e-8)
    torch.testing.assert_close(replayed.step_size, eager.step_size)


def test_data_in_blocks_come_in_order(monkeypatch, setting):
    monkeypatch.setattr(pair_runner, "_DRAW_DATA", 3)
    model, x, _ = setting
    x = x[:6]
    guide = pv.AmortizedGuide(model, encoder(6), example=x)
    found = sample(model, guide, x, num_draws=100)
    assert found.draws["z"].shape == (4, 100, 6, 3) and len(found.num_steps) == 2
    assert found.rhat.shape == found.divergences.shape == found.step_size.shape == (6,)
    std = model.posterior_precision.inverse().diagonal().sqrt().expand(6, 3)
    agree(found, "z", model.posterior_mean(x), std)


def test_single_precision():
    model = GammaPoisson()
    x = COUNTS.float()
    found = sample(model, pv.LocalGuide(model, num_data=3, example=x), x)
    assert found.draws["rate"].dtype == torch.float32 and found.log_joint.dtype == F64
    exact = torch.distributions.Gamma(2 + COUNTS, 2.0)
    agree(found, "rate", exact.mean, exact.stddev)


def test_one_datum_and_two_chains():
    model = NormalModel()
    x = REALS[:1]
    found = sample(model, local(model, x), x, num_chains=2)
    assert found.draws["z"].shape == (2, 200, 1)
    exact = model.posterior_of(x)
    agree(found, "z", exact.loc, exact.scale)


def test_modules_keep_their_mode_and_parameters(setting):
    guide = setting[2]
    guide.train()
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    found = sample(*_pair(setting), **SHORT)
    assert guide.training and not found.draws["z"].requires_grad
    for name, value in guide.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in guide.parameters())


# --- modes that chains have not visited


@pytest.mark.parametrize("size", [1, 3])
def test_chains_that_agree_in_one_of_many_modes_have_not_converged(size, caplog):
    """|z| with noise of 0.1: of 2^D equal modes all chains are in one."""
    x = 0.7 + torch.rand(3, size, generator=torch.Generator().manual_seed(1), dtype=F64)
    guide = pv.LocalGuide(absolute, num_data=3, example=x)
    with torch.no_grad():
        guide.table[..., 0], guide.table[..., 1] = x / 1.01, -0.5 * math.log(101)
    with caplog.at_level(logging.WARNING):
        few = {"num_chains": 2, "num_draws": 100, "num_warmup": 100}
        found = sample(absolute, guide, x, **few)
    assert (found.draws["z"] > 0).all()
    assert found.missed.all() and not found.converged.any()
    assert "Chains of 3 data have not visited a mode" in caplog.text


def test_the_mass_where_chains_are_is_that_of_a_gaussian():
    """Of draws of a Gaussian, log p(x, z) its density times e^2: 2, to the error of the draws."""
    generator = torch.Generator().manual_seed(0)
    root = torch.tensor([[1.0, 0.0], [0.9, 0.1]], dtype=F64)
    z = torch.randn(20_000, 3, 2, generator=generator, dtype=F64) @ root.T
    height = 2 + dist.MultivariateNormal(torch.zeros(2, dtype=F64), scale_tril=root).log_prob(z)
    assert (_log_mass(z, height) - 2).abs().max() < 0.05
    # Of too few draws for a covariance it is no less.
    assert (_log_mass(z[:19], height[:19]) > 2).all()


# --- warnings and bad input


def funnel(x):
    """Neal's funnel for each datum, of which x says next to nothing."""
    with pyro.plate("data", len(x)):
        v = pyro.sample("v", dist.Normal(x.new_zeros(()), 3.0))
        scale = (v / 2).exp().unsqueeze(-1).expand(*v.shape, 5)
        z = pyro.sample("z", dist.Normal(torch.zeros_like(scale), scale).to_event(1))
        pyro.sample("x", dist.Normal(z[..., 0], 100.0), obs=x)


def test_a_warning_says_how_many_have_not_converged(caplog):
    x = torch.zeros(3, dtype=F64)
    with caplog.at_level(logging.WARNING):
        found = sample(funnel, local(funnel, x), x, num_chains=2, num_draws=20, num_warmup=20)
    failed = int((~found.converged).sum())
    assert failed > 0
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"sample_posterior: chains of {failed} of 3 data have not converged"
    )


def test_nothing_is_said_where_chains_converge(caplog):
    model = NormalModel()
    with caplog.at_level(logging.WARNING):
        found = sample(model, local(model, REALS), REALS, num_chains=2, num_draws=600)
    assert found.converged.all() and not caplog.records


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_chains": 1}, "num_chains=1: a whole number of at least 2"),
        ({"num_draws": 3}, "num_draws=3: a whole number of at least 4"),
        ({"num_warmup": 19}, "num_warmup=19: a whole number of at least 20"),
        ({"num_draws": 2.5}, "num_draws=2.5"),
        ({"target_acceptance": 0.0}, r"target_acceptance=0.0: a number in \(0, 1\)"),
        ({"target_acceptance": 1.0}, r"target_acceptance=1.0: a number in \(0, 1\)"),
        ({"target_acceptance": math.nan}, r"target_acceptance=nan: a number in \(0, 1\)"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_input_is_refused_by_name(options, message):
    model = NormalModel()
    with pytest.raises(ValueError, match=message):
        sample(model, local(model, REALS), REALS, **options)


# --- parts


def test_the_scale_of_many_draws_is_a_root_of_their_covariance():
    """In whole windows the pull of five draws towards independence is small."""
    generator = torch.Generator().manual_seed(0)
    root = torch.tensor([[1.0, 0.0], [0.9, 0.1]], dtype=F64)
    window = torch.randn(4, 5000, 3, 2, generator=generator, dtype=F64) @ root.T + 7
    kernel = _learned(Kernel(torch.ones(3), torch.ones(3, 2, dtype=F64), 4), window)
    covariance = kernel.scale @ kernel.scale.mT
    torch.testing.assert_close(covariance, (root @ root.T).expand(3, 2, 2), rtol=0.05, atol=0)
    assert torch.equal(kernel.step, torch.ones(3)) and kernel.num_steps == 4


def test_the_scale_of_few_draws_is_of_each_coordinate_and_half_of_what_was_known():
    """Of 5 draws of two coordinates: variances in equal parts with those before."""
    window = torch.randn(1, 5, 3, 2, dtype=F64)
    kernel = _learned(Kernel(torch.ones(3), torch.full((3, 2), 2.0, dtype=F64), 4), window)
    exact = (window.var((0, 1), correction=0) / 2 + 2.0).sqrt()
    torch.testing.assert_close(kernel.scale, exact)


def test_chains_that_did_not_move_have_a_scale():
    window = torch.zeros(4, 100, 3, 2, dtype=F64)
    kernel = _learned(Kernel(torch.ones(3), torch.ones(3, 2, dtype=F64), 4), window)
    assert kernel.scale.isfinite().all()


def test_draws_that_follow_closely_are_slow():
    """Of a first-order process, whose autocorrelation is known."""
    noise = torch.randn(4, 2000, 40, 2, dtype=F64)
    for share, slow in ((0.3, False), (0.7, True)):
        window = noise.clone()
        for t in range(1, 2000):
            window[:, t] += share * window[:, t - 1]
        assert _is_slow(window).tolist() == [slow] * 40
        window[:, :, 0, 1] = noise[:, :, 0, 1].cumsum(1)
        assert _is_slow(window).tolist() == [True, *[slow] * 39]


def warmed_up(data, num_warmup):
    """Chains of a standard normal after the warm-up: density, power, point and kernel."""

    def density(z):
        height = -0.5 * z.square().sum(-1)
        return Point(z, height, torch.zeros_like(height), -z, torch.zeros_like(z))

    power = torch.ones(data, dtype=F64)
    kernel = Kernel(0.5 * power, torch.ones(data, 1, dtype=F64), 4)
    point = density(torch.randn(4, data, 1, dtype=F64, generator=torch.Generator().manual_seed(0)))
    settings = _Settings(4, 4, num_warmup, 0.8)
    with tqdm(disable=True) as bar:
        found = _warm_up(density, point, kernel, power, Stream(0, 1), settings, bar)
    return density, power, *found


def test_trajectories_do_not_come_back_to_the_height_where_they_began():
    """Rounded up to whole steps they were half a turn long."""
    density, power, point, kernel = warmed_up(30, 100)
    stream, heights = Stream(0, 2), []
    for _ in range(200):
        point, _, _ = kernel(density, point, power, stream)
        heights.append(point.base)
    sizes = Convergence.of(torch.stack(heights, 1).numpy()).ess_bulk
    assert np.median(sizes) > 0.5 * 4 * 200  # a quarter of them before


@pytest.mark.parametrize(("share", "lengthened"), [(0.5, True), (0.025, False)])
def test_slow_data_alone_have_longer_trajectories(share, lengthened, monkeypatch):
    slow = torch.arange(40) < share * 40
    monkeypatch.setattr(chains, "_is_slow", lambda _: slow)
    *_, kernel = warmed_up(40, 100)
    length = kernel.step * kernel.num_steps
    assert bool((length[~slow] <= math.pi / 2 + 1e-12).all())
    assert bool((length[slow] > math.pi / 2 + 1e-12).any()) == lengthened


def test_steps_of_a_trajectory():
    assert _steps(torch.tensor([0.5, 0.1, 1.0]), math.pi / 2) == 4
    assert _steps(torch.tensor([100.0]), 1.0) == 1
    assert _steps(torch.tensor([1e-9]), 1.0) == 64


def test_scales_are_learned_of_correlated_posteriors(setting):
    """With a full scale the step size is that of independent coordinates."""
    model, x, guide = setting
    made, _, _ = only_block(model, guide, x)
    found = sample(model, guide, x, num_draws=20, num_warmup=150)
    assert made.blocks.size == 3
    assert found.step_size.median() > 0.5


# --- against other samplers, and much longer


def eight_schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.LogNormal(y.new_zeros(()), 1.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(y.new_zeros(()), 1.0))
        pyro.sample("y", dist.Normal(mu + tau * theta, sigma), obs=y)


@pytest.mark.slow
def test_eight_schools_are_those_of_nuts():
    """Means and standard deviations to 4.5 standard errors of both samplers together."""
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=F64)
    sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=F64)
    guide = pv.LocalGuide(eight_schools, num_data=1, example=(y, sigma), data_plate=False).double()
    found = sample(
        eight_schools, guide, y, sigma, data_plate=False, num_draws=4000, num_warmup=1000
    )
    assert (found.rhat < 1.01).all()
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(eight_schools), num_samples=2000, warmup_steps=300, disable_progbar=True)
    mcmc.run(y, sigma)
    for site, other in mcmc.get_samples().items():
        mine = found.draws[site].double()
        theirs = other.double().reshape(1, 2000, -1)
        sizes = [
            Convergence.of(d.reshape(*d.shape[:2], -1).numpy())
            for d in (mine, theirs.reshape(4, 500, -1))
        ]
        flat, theirs = mine.reshape(16_000, -1), theirs[0]
        variances = [
            d.var(0) / torch.as_tensor(s.ess_bulk)
            for d, s in zip((flat, theirs), sizes, strict=True)
        ]
        off = flat.mean(0) - theirs.mean(0)
        assert (off.abs() < 4.5 * (variances[0] + variances[1]).sqrt()).all()
        assert ((flat.std(0) / theirs.std(0) - 1).abs() < 0.1).all()


@pytest.mark.slow
def test_long_chains_of_factor_analysis_all_converge(setting):
    """1000 draws of four chains: R-hat below 1.01 for all of 50 data, moments to 4.5 errors."""
    model, x, _ = setting
    found = sample(*_pair(setting), num_draws=1500, num_warmup=400)
    assert found.converged.all()
    std = model.posterior_precision.inverse().diagonal().sqrt().expand(50, 3)
    agree(found, "z", model.posterior_mean(x), std)
