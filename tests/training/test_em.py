"""EM is coordinate ascent of the ELBO: exact steps never fall, and reach the known optimum."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.mixture import GaussianMixture
from torch import nn

import pyro_vae as pv
from pyro_vae.guides.exact import ExactGuide
from pyro_vae.training.em import NonFiniteHalfStepError, em
from tests.models import NormalModel
from tests.training.em_models import (
    START,
    half_steps,
    hierarchical,
    mixture,
    mixture_data,
    mixture_log_joint,
    mixture_params,
    spread,
    spread_data,
    spread_evidence,
    wide,
)

# --- exact: a mixture of Gaussians ------------------------------------------------------------


def test_an_exact_mixture_against_scikit_learn():
    """Weights, means, variances and likelihood to 1e-4; no half-step below the one before."""
    x = mixture_data(300)
    guide = ExactGuide(mixture, example=x)
    result = em(mixture, guide, x, tolerance=1e-9, num_iterations=200, progress=False)
    assert result.converged and result.stopped_by == "tolerance"
    assert (np.diff(result.history["elbo"]) > -1e-9).all()
    assert set(result.history["elbo_std_error"]) == {0.0}
    evidence = mixture_log_joint(x).logsumexp(-1).mean().item()
    assert result.elbo == pytest.approx(evidence, abs=1e-12)
    theirs = GaussianMixture(
        3,
        covariance_type="diag",
        tol=1e-12,
        reg_covar=1e-12,
        max_iter=5000,
        weights_init=np.full(3, 1 / 3),
        means_init=START.numpy(),
        precisions_init=np.ones((3, 2)),
    ).fit(x.numpy())
    weights, means, scales = (parameter.detach().numpy() for parameter in mixture_params())
    assert result.elbo == pytest.approx(theirs.score(x.numpy()), abs=1e-4)
    np.testing.assert_allclose(weights, theirs.weights_, atol=1e-4)
    np.testing.assert_allclose(means, theirs.means_, atol=1e-4)
    np.testing.assert_allclose(scales**2, theirs.covariances_, atol=1e-4)
    # The guide follows the parameters again, and holds their posterior.
    probs = torch.softmax(mixture_log_joint(x), -1).detach()
    torch.testing.assert_close(guide.posterior(x)["c"], probs)


def test_each_exact_e_step_gives_log_p_x():
    """The gap opens in an M-step and closes in the next E-step, to rounding."""
    x = mixture_data(40)
    seen = []
    for iterations in (1, 2, 3):
        pyro.clear_param_store()
        result = em(
            mixture,
            ExactGuide(mixture, example=x),
            x,
            num_iterations=iterations,
            tolerance=1e-12,
            progress=False,
        )
        seen.append(mixture_log_joint(x).logsumexp(-1).mean().item())
        assert result.stopped_by == "num_iterations" and result.iterations == iterations
    np.testing.assert_allclose(half_steps(result, "E")[1:], seen, rtol=0, atol=1e-12)
    assert (half_steps(result, "E")[1:] > half_steps(result, "M")).all()
    assert result.history["iteration"] == [0, 1, 1, 2, 2, 3, 3]
    assert result.history["half_step"] == list("EMEMEME")


# --- variational: probabilistic principal components ------------------------------------------


class PPCA(nn.Module):
    """x = W z + mu + noise, with parameters in a module."""

    def __init__(self, loadings, mean, noise):
        super().__init__()
        self.loadings = nn.Parameter(loadings.clone())
        self.mean = nn.Parameter(mean.clone())
        self.log_noise = nn.Parameter(torch.tensor(math.log(noise), dtype=loadings.dtype))

    def forward(self, x):
        pyro.module("ppca", self)
        with pyro.plate("data", len(x)):
            zero = x.new_zeros(self.loadings.shape[1])
            z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
            location = z @ self.loadings.T + self.mean
            pyro.sample("x", dist.Normal(location, self.log_noise.exp()).to_event(1), obs=x)

    @torch.no_grad()
    def log_evidence(self, x):
        covariance = self.loadings @ self.loadings.T
        covariance += (2 * self.log_noise).exp() * torch.eye(len(self.mean), dtype=x.dtype)
        return dist.MultivariateNormal(self.mean, covariance).log_prob(x).mean().item()

    @classmethod
    def best(cls, x, latents):
        """The maximum likelihood of Tipping & Bishop (1999), with orthogonal loadings."""
        values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
        noise = values[:-latents].mean()
        loadings = vectors[:, -latents:] * (values[-latents:] - noise).sqrt()
        return cls(loadings, x.mean(0), float(noise.sqrt()))


def ppca_data():
    generator = torch.Generator().manual_seed(3)
    loadings = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    z = torch.randn(60, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    return z @ loadings.T + 0.5 * noise + 1.0


def ppca_start(x):
    generator = torch.Generator().manual_seed(4)
    best = PPCA.best(x, 2)
    turned = best.loadings.detach() + 0.3 * torch.randn(
        4, 2, generator=generator, dtype=torch.float64
    )
    return best, PPCA(turned, x.mean(0) - 0.2, 0.8)


def test_variational_em_goes_up():
    x = ppca_data()[:20]
    best, model = ppca_start(x)
    guide = pv.LocalGuide(model, num_data=20, example=x)
    result = em(model, guide, x, num_iterations=2, e_steps=40, num_particles=50, progress=False)
    assert (np.diff(result.history["elbo"]) > 0).all()
    limit = best.log_evidence(x) + 4 * result.elbo_std_error
    assert half_steps(result, "E")[0] < result.elbo < limit
    assert result.elbo < model.log_evidence(x) + 4 * result.elbo_std_error
    # The guide belongs to the parameters: the ELBO is that of pv.elbo.
    bound = pv.elbo(model, guide, x, num_particles=1000, seed=9)
    error = math.hypot(bound.mean_std_error, result.elbo_std_error)
    assert abs(bound.mean - result.elbo) < 4 * error
    assert all(p.grad is None for p in (*model.parameters(), *guide.parameters()))


@pytest.mark.slow
def test_variational_em_reaches_the_maximum_likelihood():
    """At the maximum loadings are orthogonal up to a turn, so the mean field has no gap there.

    The maximum is the closed form of Tipping & Bishop; draws in the M-step cost about
    parameters / (2 * particles * data) nats per datum, here 4e-4; 25 exact iterations would
    end 5e-4 short.
    """
    x = ppca_data()
    best, model = ppca_start(x)
    guide = pv.LocalGuide(model, num_data=60, example=x)
    result = em(model, guide, x, num_iterations=25, num_particles=300, progress=False)
    assert model.log_evidence(x) == pytest.approx(best.log_evidence(x), abs=2e-3)
    assert result.elbo == pytest.approx(best.log_evidence(x), abs=4 * result.elbo_std_error + 5e-3)


# --- points -----------------------------------------------------------------------------------


def test_map_em():
    """Points: z = (x + mean) / 2, mean = mean of z; the fixed point is the mean of x.

    Each iteration halves the distance, from which the whole path is known.
    """
    x = torch.tensor([1.0, 2.0, 3.0, 10.0], dtype=torch.float64)
    guide = pv.LocalGuide(hierarchical, num_data=4, example=x, family=pv.families.Delta())
    result = em(hierarchical, guide, x, num_iterations=60, tolerance=1e-10, progress=False)
    assert result.converged
    assert (np.diff(result.history["elbo"]) > -1e-12).all()
    assert set(result.history["elbo_std_error"]) == {0.0}
    mean = pyro.param("mean").item()
    assert mean == pytest.approx(4.0, abs=1e-4)
    torch.testing.assert_close(guide.table[:, 0, 0].detach(), (x + 4) / 2, rtol=0, atol=1e-4)
    # log p(x, z) at the point, less its constants: (x - mean)^2 / 4 of each.
    path = half_steps(result, "E") + math.log(2 * math.pi)
    means = 4 - 4 * 0.5 ** np.arange(len(path))
    expected = [-((x.numpy() - m) ** 2).mean() / 4 for m in means]
    np.testing.assert_allclose(path, expected, atol=1e-6)


# --- Monte Carlo ------------------------------------------------------------------------------


def test_the_elbo_of_a_monte_carlo_m_step():
    """It is log p(x) before plus what E_q[log p(x, z)] gained: below log p(x) after."""
    x = spread_data(40)
    result = em(
        spread, wide, x, e_step="importance", num_particles=20_000, num_iterations=1, progress=False
    )
    before, between, after = result.history["elbo"]
    # The exact E-step and M-step: second moments of z under the posterior at mean 0, scale 1.
    best_mean = (x / 2).mean()
    best_scale = (0.5 + (x / 2 - best_mean).square().mean()).sqrt()
    gain = (
        dist.Normal(best_mean, best_scale).log_prob(x / 2)
        - 0.25 / best_scale**2
        - (dist.Normal(0.0, 1.0).log_prob(x / 2) - 0.25)
    ).mean()
    error = max(result.history["elbo_std_error"])
    assert error < 0.01
    assert abs(before - spread_evidence(x, 0.0, 1.0)) < 4 * error
    assert abs(between - before - gain.item()) < 4 * error
    assert between < after
    assert abs(after - spread_evidence(x, best_mean, best_scale)) < 4 * error + 1e-3


def test_more_data_than_a_block():
    """Blocks of data and of particles come together in their places."""
    x = spread_data(300)
    result = em(spread, wide, x, e_step="importance", num_iterations=1, progress=False)
    # 4 standard errors, of which the bias of a log mean is one.
    error = result.history["elbo_std_error"][0]
    assert error < 0.01
    assert abs(result.history["elbo"][0] - spread_evidence(x, 0.0, 1.0)) < 4 * error
    mean, scale = (pyro.param(name).detach() for name in ("mean", "scale"))
    exact = spread_evidence(x, mean, scale)
    assert abs(result.elbo - exact) < 4 * result.elbo_std_error + 1e-3
    before, between, after = result.history["elbo"]
    assert before + 0.3 < between < after


def test_discrete_latents_are_summed_out_beside_a_local_guide():
    """c is summed out inside E_q[log p(x, z)]: variational EM of z alone goes up."""

    def model(x):
        means = pyro.param("means", torch.tensor([-1.0, 1.0], dtype=torch.float64))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(2, dtype=torch.float64)))
            z = pyro.sample("z", dist.Normal(means[c], 0.5))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = torch.cat([torch.linspace(-4, -2, 8), torch.linspace(1, 4, 8)]).double()
    guide = pv.LocalGuide(model, num_data=16, example=x, family=pv.families.Delta())
    result = em(model, guide, x, num_iterations=60, tolerance=1e-9, progress=False)
    assert (np.diff(result.history["elbo"]) > -1e-9).all()
    # The components are far apart: each mean is that of its own data.
    wanted = torch.tensor([-3.0, 2.5], dtype=torch.float64)
    torch.testing.assert_close(pyro.param("means").detach(), wanted, rtol=0, atol=0.02)


def test_float32():
    x = mixture_data(100).float()

    def model(x):
        means = pyro.param("means", START.float())
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(means[c], 1.0).to_event(1), obs=x)

    result = em(model, ExactGuide(model, example=x), x, num_iterations=10, progress=False)
    assert (np.diff(result.history["elbo"]) > -1e-5).all()
    assert result.elbo > result.history["elbo"][0] + 0.1


def test_one_seed_one_result():
    x = spread_data(20)
    results = []
    for seed in (0, 0, 1):
        pyro.clear_param_store()
        torch.manual_seed(5)
        results.append(
            em(spread, wide, x, e_step="importance", num_iterations=2, seed=seed, progress=False)
        )
        drawn = torch.rand(1).item()
        torch.manual_seed(5)
        assert torch.rand(1).item() == drawn
    first, second, third = (result.history["elbo"] for result in results)
    assert first == second and first != third


# --- refusals ---------------------------------------------------------------------------------


def test_parameters_of_the_guide_are_not_touched():
    def guide(x):
        shift = pyro.param("shift", torch.tensor(0.1, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.7 * x + 0.6 + shift, 1.2))

    x = spread_data(10)
    guide(x)
    em(spread, guide, x, e_step="importance", num_iterations=1, progress=False)
    assert pyro.param("shift").item() == 0.1
    assert pyro.param("mean").item() != 0.0


def test_a_model_without_parameters_is_refused():
    model = NormalModel()
    x = torch.zeros(4)
    guide = pv.LocalGuide(model, num_data=4, example=x)
    with pytest.raises(ValueError, match="(?s)no parameters to train.*em estimates the parameters"):
        em(model, guide, x, progress=False)


def test_minibatches_are_refused():
    def model(x):
        mean = pyro.param("mean", torch.tensor(0.0))
        with pyro.plate("data", 50, subsample=x):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="plate 'data' holds 10 of 50 entries: EM takes all"):
        em(model, wide, torch.zeros(10), e_step="importance", progress=False)


def test_global_latents_are_refused():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"\['mean'\] lie outside the data plate"):
        em(model, wide, torch.zeros(10), e_step="importance", progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "e_step='auto' is for an ExactGuide or a LocalGuide, found function"),
        ({"e_step": "exact"}, "'exact' needs an ExactGuide, which enumerates"),
        ({"e_step": "variational"}, "'variational' refines the rows of a LocalGuide"),
        ({"e_step": "gibbs"}, "e_step='gibbs': one of"),
        ({"e_step": ["nuts"]}, r"e_step=\['nuts'\]: one of"),
        ({"e_step": "importance", "num_particles": 1}, "needs at least 2"),
        ({"num_iterations": 0}, "num_iterations=0"),
        ({"m_steps": 1.5}, "m_steps=1.5"),
        ({"e_steps": 0}, "e_steps=0"),
        ({"num_particles": 0}, "num_particles=0"),
        ({"tolerance": 0.0}, "tolerance=0.0: a positive"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        em(spread, wide, spread_data(5), progress=False, **options)


def test_an_infinite_elbo_is_named():
    def model(x):
        mean = pyro.param("mean", torch.tensor(0.5, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(mean.expand(len(x)) * 0 + 9.0, 10.0))
            pyro.sample("x", dist.Normal(z + mean, 1.0), obs=x)

    with pytest.raises(NonFiniteHalfStepError, match="E-step of iteration 0") as caught:
        em(model, wide, spread_data(5), e_step="importance", progress=False)
    assert (caught.value.half_step, caught.value.iteration) == ("E", 0)


def test_repr():
    x = mixture_data(20)
    guide = ExactGuide(mixture, example=x)
    result = em(mixture, guide, x, num_iterations=1, progress=False)
    assert repr(result).startswith("EMResult(stopped_by='num_iterations', iterations=1, elapsed=")


# --- M-steps: undone where they gain nothing or fail ----------------------------------------


def test_a_torch_optimizer_for_the_m_step():
    """Twenty steps of Adam are no maximum; the ELBO goes up all the same."""
    x = mixture_data(100)
    result = em(
        mixture,
        ExactGuide(mixture, example=x),
        x,
        optim=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
        m_steps=20,
        num_iterations=5,
        progress=False,
    )
    assert (np.diff(result.history["elbo"]) > -1e-12).all()
    assert half_steps(result, "E")[-1] > half_steps(result, "E")[0] + 0.1


def test_an_m_step_that_gains_nothing_is_undone():
    x = mixture_data(50)
    mixture(x)
    before = {name: value.clone() for name, value in pyro.get_param_store().items()}
    result = em(
        mixture,
        ExactGuide(mixture, example=x),
        x,
        optim=lambda parameters: torch.optim.SGD(parameters, lr=1e3),
        m_steps=1,
        num_iterations=1,
        progress=False,
    )
    after = dict(pyro.get_param_store().items())
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert result.history["elbo"][0] == pytest.approx(result.history["elbo"][2], abs=1e-12)


def test_a_failing_m_step_is_named_and_undone():
    """The gradient of sqrt at zero is infinite, and nan by the chain rule."""

    def model(x):
        mean = pyro.param("mean", torch.tensor(0.5, dtype=torch.float64))
        broken = torch.where(mean > 2, (mean * 0).sqrt(), mean)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(broken, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = spread_data(5)
    guide = pv.LocalGuide(model, num_data=5, example=x, family=pv.families.Delta())
    with pytest.raises(NonFiniteHalfStepError, match="M-step of iteration 1") as caught:
        em(model, guide, x, progress=False)
    assert (caught.value.half_step, caught.value.iteration) == ("M", 1)
    assert pyro.param("mean").item() == 0.5


def test_a_line_search_that_goes_too_far_comes_back():
    """Outside (-1, 1) the density is nan; the maximum, at 0.9, is inside."""

    def model(x):
        shift = pyro.param("shift", torch.tensor(-0.9, dtype=torch.float64))
        location = shift + 0 * (1 - shift**2).log()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(location, 0.1))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    x = torch.full((6,), 0.9, dtype=torch.float64)
    guide = pv.LocalGuide(model, num_data=6, example=x, family=pv.families.Delta())
    em(model, guide, x, num_iterations=40, tolerance=1e-12, progress=False)
    assert pyro.param("shift").item() == pytest.approx(0.9, abs=1e-3)
