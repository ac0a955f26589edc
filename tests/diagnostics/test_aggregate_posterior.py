"""The aggregate posterior of the right model passes at its level; others do not, and are named."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.diagnostics.aggregate_posterior import _moments, _tests
from pyro_vae.diagnostics.mmd import Swapped
from tests.models import GammaPoisson, NormalModel, mixture

pytestmark = pytest.mark.usefixtures("float64")


def guide_of(distribution):
    """A guide that proposes the same distribution, of a batch shape, for each datum."""

    def guide(x):
        with pyro.plate("data", len(x)):
            fn = distribution.expand([len(x), *x.shape[1:]])
            pyro.sample("z", fn.to_event(x.ndim - 1))

    return guide


@pytest.mark.parametrize("kind", ["prior", "posterior"])
def test_the_level_is_what_it_is_said_to_be(kind):
    """400 independent units, each a test of its own: 5 % of the p-values are at most 0.05."""
    model = NormalModel()
    x = 2**0.5 * torch.randn(40, 400)
    guide = guide_of(dist.Normal(0.0, 1.0)) if kind == "prior" else model.posterior
    found = pv.aggregate_posterior(model, guide, x, num_permutations=199, seed=0)
    p = found.dataset["p_value"].values
    assert abs((p <= 0.05).mean() - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 400)
    assert abs(p.mean() - 0.5) < 4 / math.sqrt(12 * 400)
    assert found.p_value > 0.001
    assert (found.dataset["adjusted_p_value"].values > 0.01).all()
    z = (found.dataset["shift"] / found.dataset["shift_se"]).values
    assert 0.85 < z.std() < 1.15 and abs(z.mean()) < 0.2
    z = ((found.dataset["spread"] - 1) / found.dataset["spread_se"]).values
    assert 0.85 < z.std() < 1.25 and abs(z.mean()) < 0.3


def test_of_data_that_were_fitted_to_it_rejects_less():
    """400 units whose data have the moments of the model: 1 to 2 % are rejected, not 5 %."""
    x = torch.randn(60, 400)
    x = 5**0.5 * (x - x.mean(0)) / x.std(0)
    model = NormalModel(weight=2.0)
    found = pv.aggregate_posterior(model, model.posterior, x, num_permutations=199, seed=0)
    assert (found.dataset["p_value"] <= 0.05).mean() < 0.03


def test_what_is_off_is_named():
    """Of six units one is shifted, one too narrow; of the others none is named."""
    location = torch.tensor([0.0, 0.0, 0.5, 0.0, 0.0, 0.0])
    scale = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5, 1.0])
    guide = guide_of(dist.Normal(location, scale))
    found = pv.aggregate_posterior(NormalModel(), guide, torch.zeros(300, 6), seed=0)
    off = found.summary().query("adjusted_p_value < 0.05")
    assert sorted(off.index) == ["z[2]", "z[4]"] and found.p_value == 0.001
    assert "2 of 6 units differ" in repr(found) and "z[4]" in repr(found)
    data = found.dataset
    assert (abs(data["shift"] - location.numpy()) < 4 * data["shift_se"]).all()
    assert (abs(data["spread"] - scale.numpy()) < 4 * data["spread_se"]).all()
    assert (data["adjusted_p_value"] >= data["p_value"]).all()


def test_a_dependence_shows_jointly():
    """Units of the right distribution each, and the same one: only the joint test sees it."""

    def guide(x):
        with pyro.plate("data", len(x)):
            tril = torch.tensor([[1.0, 0.0], [0.95, (1 - 0.95**2) ** 0.5]])
            fn = dist.MultivariateNormal(torch.zeros(2), scale_tril=tril)
            pyro.sample("z", fn.expand([len(x)]))

    found = pv.aggregate_posterior(NormalModel(), guide, torch.zeros(300, 2), seed=1)
    assert found.p_value == 0.001 and (found.dataset["p_value"] > 0.01).all()
    assert "none of 2 units differs by itself" in repr(found)


def test_a_monotone_map_of_a_latent_changes_nothing():
    """z and exp(z), of the same draws."""

    def log_model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)

    def log_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(x / 2, 0.5**0.5))

    model, x = NormalModel(), torch.randn(50)
    one = pv.aggregate_posterior(model, model.posterior, x, seed=0).dataset
    other = pv.aggregate_posterior(log_model, log_guide, x, seed=0).dataset
    np.testing.assert_allclose(one["joint_statistic"], other["joint_statistic"])
    np.testing.assert_allclose(one["p_value"], other["p_value"])


def test_priors_that_depend_on_covariates_pass():
    """Given its covariate each posterior is right; pooled, the two samples are correlated."""

    def model(c, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(c, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def posterior(c, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((c + x) / 2, 0.5**0.5))

    p = []
    for seed in range(40):
        c = 5 * torch.randn(60)
        x = c + 2**0.5 * torch.randn(60)
        found = pv.aggregate_posterior(model, posterior, c, x, num_permutations=99, seed=seed)
        p.append(found.p_value)
    # A permutation of the pooled draws would give p-values near one half and above.
    assert abs(np.mean(p) - 0.5) < 4 / math.sqrt(12 * 40) and min(p) < 0.15 and max(p) > 0.85
    off = pv.aggregate_posterior(model, posterior, c, x + 4, seed=0)
    assert off.p_value < 0.05


def test_the_adjusted_p_value_is_against_the_largest_statistic():
    one = Swapped(2.0, torch.tensor([0.0, 3.0, 1.0]))
    other = Swapped(0.5, torch.tensor([2.5, 0.0, 0.1]))
    found = _tests([one, other])
    assert found["p_value"] == [0.5, 0.5]
    assert found["adjusted_p_value"] == [(1 + 2) / 4, (1 + 3) / 4]  # largest: 2.5, 3, 1


def test_standard_errors_of_shift_and_spread_are_the_jackknifes():
    mine, prior = 2 + 3 * torch.randn(400, 1), torch.randn(400, 1)
    found = _moments(mine, prior)
    rows = [torch.arange(400) != n for n in range(400)]
    left_out = [_moments(mine[keep], prior[keep]) for keep in rows]
    for name in ("shift", "spread"):
        values = torch.stack([each[name] for each in left_out])
        jackknife = (399 / 400 * (values - values.mean(0)).square().sum(0)).sqrt()
        torch.testing.assert_close(found[f"{name}_se"], jackknife, rtol=0.02, atol=0)


def test_of_many_data_some_are_chosen():
    model = NormalModel()
    x = torch.cat([torch.zeros(300), torch.full((300,), 8.0)])
    found = pv.aggregate_posterior(model, model.posterior, x, num_draws=100, seed=0)
    assert found.dataset.attrs["num_pairs"] == 100
    # Half of them from either half: the first hundred rows alone would have a shift of 0.
    assert 1 < float(found.dataset["shift"][0]) < 3


def test_positive_and_discrete_latents():
    model = GammaPoisson()
    x = torch.poisson(torch.distributions.Gamma(2.0, 1.0).sample((150,)))
    assert pv.aggregate_posterior(model, model.posterior, x, seed=0).p_value > 0.01
    assert pv.aggregate_posterior(model, model.posterior, x + 3, seed=0).p_value == 0.001
    c = torch.distributions.Categorical(mixture.weights).sample((150,))
    x = mixture.means[c] + torch.randn(150)
    exact = pv.ExactGuide(mixture, example=x)
    assert pv.aggregate_posterior(mixture, exact, x, seed=0).p_value > 0.01
    x = mixture.means[torch.full((150,), 2)] + torch.randn(150)
    assert pv.aggregate_posterior(mixture, exact, x, seed=0).p_value == 0.001


def test_one_seed_one_result():
    model, x = NormalModel(), torch.randn(50)
    one, same, other = (
        pv.aggregate_posterior(model, model.posterior, x, seed=seed).dataset for seed in (3, 3, 4)
    )
    assert one.identical(same) and not one.identical(other)


def test_refusals():
    model = NormalModel()
    with pytest.raises(ValueError, match="aggregate_posterior needs at least 8 data"):
        pv.aggregate_posterior(model, model.posterior, torch.zeros(7))
    with pytest.raises(ValueError, match="num_draws"):
        pv.aggregate_posterior(model, model.posterior, torch.zeros(9), num_draws=7)
    with pytest.raises(ValueError, match="num_permutations"):
        pv.aggregate_posterior(model, model.posterior, torch.zeros(9), num_permutations=0)
