"""What is said of each datum, against algebra: log p(x), replicas, statistics, features."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.diagnostics.outlier_scores import Scorer, encoder_of, features_of
from pyro_vae.programs.batch import as_batch
from tests.models import NormalModel

X = torch.tensor([-3.0, 0.1, 1.5, 6.0], dtype=torch.float64)
SMALL = 4 * 0.5 / 4000**0.5  # four standard errors of a share of 4000 particles


def ask(model, guide, x=X, seed=0, **options):
    settings = {"num_particles": 4000, "statistics": {}, "given": None, "data_plate": None}
    settings |= {"compile": False, **options}
    return Scorer(model, guide, **settings).score(as_batch(x), seed)


def cdf(z):
    return torch.special.ndtr(torch.as_tensor(z)).numpy()


@pytest.fixture(scope="module", params=[1.0, 1.4], ids=["the posterior", "a wider guide"])
def asked(request):
    model = NormalModel(noise=0.5)

    def guide(x: Tensor) -> None:
        exact = model.posterior_of(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(exact.loc, request.param * exact.scale))

    statistics = {"value": lambda sites: sites["x"], "constant": lambda sites: 0 * sites["x"] + 1}
    return model, ask(model, guide, statistics=statistics), request.param


def test_log_evidence_is_that_of_the_formula(asked):
    model, found, _ = asked
    errors = (found.log_evidence - model.log_evidence(X).numpy()) / (found.std_error + 1e-9)
    assert np.abs(errors).max() < 5
    assert found.good.all()


def test_log_likelihood_beside_that_of_replicas(asked):
    """With x - z of N(x - m, v) and a replica's of N(0, s^2), both given x, by quadrature."""
    model, found, _ = asked
    posterior = model.posterior_of(X)
    node = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    weight = torch.exp(-0.5 * node**2)
    weight = weight / weight.sum()
    away = (X[:, None] - posterior.loc[:, None] - posterior.scale[:, None] * node).abs() / 0.5
    share = (2 * torch.special.ndtr(-away) * weight).sum(1).numpy()
    np.testing.assert_allclose(found.predictive_p["log_likelihood"], share, atol=1.5 * SMALL)
    squares = ((X - posterior.loc) ** 2 + posterior.variance) / 0.5**2
    above = ((0.5 - 0.5 * squares) / 0.5**0.5).numpy()
    np.testing.assert_allclose(found.predictive["log_likelihood"], above, rtol=0.1, atol=0.1)


def test_a_statistic_beside_that_of_replicas(asked):
    """Replicas of x have mean m and variance v + s^2; the spread is that of the guide's draws."""
    model, found, scale = asked
    posterior = model.posterior_of(X)
    away = X - posterior.loc
    above = (away / (scale**2 * posterior.variance + 0.5**2).sqrt()).numpy()
    np.testing.assert_allclose(found.predictive["value"], above, rtol=0.05, atol=0.1)
    share = cdf(away / (posterior.variance + 0.5**2).sqrt())
    np.testing.assert_allclose(found.predictive_p["value"], share, atol=1.5 * SMALL)


def test_a_constant_is_a_tie(asked):
    _, found, _ = asked
    assert not found.predictive["constant"].any()
    np.testing.assert_allclose(found.predictive_p["constant"], 0.5)


def test_discrete_latents_that_are_summed_out_are_drawn():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.3)))
            pyro.sample("x", dist.Normal(3 * c, 1.0), obs=x)

    found = ask(model, pv.ExactGuide(model, example=X))
    parts = torch.stack(
        [math.log(w) + dist.Normal(3.0 * c, 1.0).log_prob(X) for c, w in ((0, 0.7), (1, 0.3))]
    )
    np.testing.assert_allclose(found.log_evidence, parts.logsumexp(0))
    away = torch.stack([X, X - 3]).abs()
    share = (parts.softmax(0) * 2 * torch.special.ndtr(-away)).sum(0).numpy()
    np.testing.assert_allclose(found.predictive_p["log_likelihood"], share, atol=SMALL)


def test_missing_values_are_in_no_replica():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0)).unsqueeze(-1)
            pyro.sample("x", dist.Normal(z.expand(*z.shape[:-1], 2), 0.5).to_event(1), obs=x)

    def posterior(x: Tensor) -> None:
        precision = 1 + (~x.isnan()).sum(-1) / 0.25
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.nansum(-1) / 0.25 / precision, precision**-0.5))

    seen = []

    def total(sites):
        seen.append(sites["x"].isnan().double().mean().item())
        return sites["x"].nansum(-1)

    holes = torch.stack([X, torch.full_like(X, math.nan)], 1)
    found = ask(pv.MissingData(model), posterior, holes, statistics={"total": total})
    alone = NormalModel(noise=0.5)
    np.testing.assert_allclose(found.log_evidence, alone.log_evidence(X).numpy())
    whole = ask(alone, alone.posterior, statistics={"total": lambda sites: sites["x"]})
    for name in ("log_likelihood", "total"):
        one, other = found.predictive_p[name], whole.predictive_p[name]
        np.testing.assert_allclose(one, other, atol=1.5 * SMALL)
    assert set(seen) == {0.5}


def test_data_that_the_model_does_not_allow():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(x.new_zeros(()), 1.0))
            fn = dist.Uniform(z, z + 1.0, validate_args=False)
            pyro.sample("x", fn, obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(x.new_zeros(()), 1.0))

    found = ask(model, guide, torch.tensor([-3.0, 0.5, 1.5, 6.0]))
    exact = [-math.inf, math.log(0.5), math.log(0.5), -math.inf]
    np.testing.assert_allclose(found.log_evidence, exact, atol=0.1)
    assert found.good.tolist() == [False, True, True, False]
    # Log likelihoods of zero, or of minus infinity.
    assert found.predictive["log_likelihood"].tolist() == [-math.inf, 0.0, 0.0, -math.inf]
    np.testing.assert_allclose(found.predictive_p["log_likelihood"], [0.0, 0.5, 0.5, 0.0])


def test_refuses_data_that_are_one_datum():
    model = NormalModel()
    with pytest.raises(ValueError, match="data_plate=False says that all is"):
        ask(model, model.posterior, data_plate=False)


@pytest.mark.parametrize(
    "statistic", [lambda sites: sites["x"].sum(), lambda sites: sites["x"] * math.nan]
)
def test_refuses_a_statistic_that_is_no_number_for_each(statistic):
    model = NormalModel()
    with pytest.raises(ValueError, match=r"statistics\['odd'\] returned shape .* with \d nan"):
        ask(model, model.posterior, statistics={"odd": statistic})


def test_features_of_blocks_are_those_of_all_in_eval_mode():
    network = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.BatchNorm1d(5))
    x = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0))
    found = features_of(network, as_batch(x))
    assert network.training
    with torch.no_grad():
        wanted = network.eval()(x)
    np.testing.assert_allclose(found, wanted.double().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (lambda x: x.sum(), r"\[4, F\], a row per datum, needed; got \[\]"),
        (lambda x: (x, x), "needed; got tuple"),
        (lambda x: torch.where(x < 0, math.nan, x)[:, None], r"of 1 data are not finite: \[0\]"),
    ],
)
def test_refuses_features_that_are_not_rows(network, says):
    with pytest.raises(ValueError, match=says):
        features_of(network, as_batch(X))


def test_the_encoder_of_a_guide():
    model, encoder = NormalModel(), nn.Linear(2, 3)
    guide = pv.AmortizedGuide(model, encoder, example=torch.zeros(3, 2))
    assert encoder_of(guide) is encoder
    assert encoder_of(pyro.poutine.scale(guide, 2.0)) is encoder
    assert encoder_of(model.posterior) is None
