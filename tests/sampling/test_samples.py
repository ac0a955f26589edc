"""Samples say for which data they can be trusted, and warn of the others."""

from __future__ import annotations

import dataclasses
import logging
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from tests.models import NormalModel

F64 = torch.float64
FOUR = torch.ones(4, dtype=F64)


def samples(**changes):
    """Two chains of 500 draws of four data, all of which have converged."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2, 500, 4, 3, generator=generator)
    found = pv.PosteriorSamples(
        draws={"z": draws, "s": draws[..., 0].exp()},
        log_joint=torch.zeros(2, 500, 4, dtype=F64),
        rhat=1.005 * FOUR,
        ess=400 * FOUR,
        ess_tail=300 * FOUR,
        acceptance=0.8 * FOUR,
        divergences=torch.zeros(4, dtype=torch.long),
        step_size=0.5 * FOUR,
        num_steps=(4,),
        given={},
    )
    return dataclasses.replace(found, **changes)


def numbers(*values):
    return torch.tensor(values, dtype=F64)


def test_what_has_converged():
    assert samples().converged.tolist() == [True] * 4


@pytest.mark.parametrize(
    "changes",
    [
        {"rhat": numbers(1.0, 1.0101, float("nan"), float("inf"))},
        {"ess": numbers(201.0, 199.0, float("nan"), 0.0)},
        {"ess_tail": numbers(201.0, 199.0, float("nan"), 0.0)},
        {"divergences": torch.tensor([9, 10, 500, 1000])},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_has_not(changes, caplog):
    found = samples(**changes)
    assert found.converged.tolist() == [True, False, False, False]
    with caplog.at_level(logging.WARNING):
        found.warn()
    (record,) = caplog.records
    assert "chains of 3 of 4 data have not converged" in record.getMessage()


def test_the_warning_has_the_worst_numbers(caplog):
    found = samples(
        rhat=numbers(1.0, 1.2345, 1.0, 1.0),
        ess=numbers(400, 77, 400, 400),
        ess_tail=numbers(400, 400, 55, 400),
        divergences=torch.tensor([0, 3, 4, 0]),
    )
    with caplog.at_level(logging.WARNING):
        found.warn()
    assert [record.getMessage() for record in caplog.records] == [
        "sample_posterior: chains of 2 of 4 data have not converged (the largest R-hat is 1.234, "
        "the smallest effective sample size 55, 2 data have divergences). Give them more draws "
        "(num_draws), a longer warm-up (num_warmup) or a better guide"
    ]


def test_nothing_is_said_where_all_have_converged(caplog):
    with caplog.at_level(logging.DEBUG):
        samples().warn()
    assert not caplog.records


def test_chains_that_have_no_numbers_at_all_are_said_to_have_not_converged(caplog):
    nan = torch.full((4,), float("nan"), dtype=F64)
    with caplog.at_level(logging.WARNING):
        samples(rhat=nan, ess=nan, ess_tail=nan).warn()
    assert "4 of 4 data" in caplog.text and "effective sample size 0" in caplog.text


def test_moments_are_over_chains_and_draws():
    found = samples()
    for site in ("z", "s"):
        flat = found.draws[site].double().reshape(1000, *found.draws[site].shape[2:])
        torch.testing.assert_close(found.mean(site), flat.mean(0))
        torch.testing.assert_close(found.std(site), flat.std(0))
        assert found.mean(site).dtype == F64
    assert found.mean("z").shape == (4, 3) and found.std("s").shape == (4,)


def test_to_arviz():
    """All groups, with their chains: values by PyTorch, of chains that stay in their order."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            s = pyro.sample("s", dist.LogNormal(x.new_zeros(len(x)), 0.5))
            pyro.sample("x", dist.Normal(a.sum(-1), s), obs=x)

    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    guide = pv.LocalGuide(model, num_data=3, example=x)
    settings = {"num_draws": 20, "num_warmup": 20, "seed": 0, "progress": False}
    samples = pv.sample_posterior(model, guide, x, num_chains=3, **settings)
    made = samples.to_arviz(coords={"datum": ["a", "b", "c"]}, dims={"a": ["axis"]})
    assert made.posterior["a"].dims == ("chain", "draw", "datum", "axis")
    assert made.posterior["a"].shape == (3, 20, 3, 2)
    assert made.sample_stats["lp"].dims == ("chain", "draw", "datum")
    assert made.constant_data["rhat"].dims == ("datum",)
    np.testing.assert_array_equal(made.posterior["a"], samples.draws["a"])
    np.testing.assert_array_equal(made.sample_stats["lp"], samples.log_joint)
    a, s = samples.draws["a"], samples.draws["s"]
    seen = torch.distributions.Normal(a.sum(-1), s).log_prob(x)
    prior = torch.distributions.LogNormal(0.0, 0.5).log_prob(s)
    standard = torch.distributions.Normal(0.0, 1.0).log_prob(a).sum(-1)
    np.testing.assert_allclose(made.log_likelihood["x"], seen, atol=1e-6)
    np.testing.assert_allclose(made.log_prior["s"], prior, atol=1e-6)
    np.testing.assert_allclose(made.unconstrained_posterior["s"], s.log(), atol=1e-6)
    np.testing.assert_allclose(made.sample_stats["log_p"], seen + prior + standard, atol=1e-6)
    lp = seen + prior + standard + s.log()  # in coordinates, where ds = s d log s
    np.testing.assert_allclose(made.sample_stats["lp"], lp, atol=1e-6)
    residual = (made.posterior_predictive["x"].values - a.sum(-1).numpy()) / s.numpy()
    assert abs(residual.std() - 1) < 5 / (2 * residual.size) ** 0.5
    assert "note" not in made.attrs and made.prior_predictive["x"].shape == (3, 20, 3)


def test_copies_are_without_their_model():
    x = torch.tensor([0.5, -1.0], dtype=torch.float64)
    model = NormalModel()
    settings = {"num_draws": 8, "num_warmup": 20, "seed": 0, "progress": False}
    found = pv.sample_posterior(model, model.posterior, x, **settings)
    again = pickle.loads(pickle.dumps(found))
    torch.testing.assert_close(again.draws["z"], found.draws["z"])
    with pytest.raises(ValueError, match="are without their model: make the container before"):
        again.to_arviz()


def test_to_arviz_of_one_datum():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(x.new_tensor(0.0), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    guide = pv.LocalGuide(model, num_data=1, example=x, data_plate=False)
    settings = {"num_draws": 20, "num_warmup": 20, "seed": 0, "progress": False}
    made = pv.sample_posterior(model, guide, x, data_plate=False, **settings).to_arviz()
    assert made.posterior["mu"].dims == ("chain", "draw")
    assert made.constant_data["rhat"].dims == ("datum",)


def test_a_missed_mode_is_no_convergence(caplog):
    found = samples(missed=torch.tensor([False, True, False, False]))
    assert found.converged.tolist() == [True, False, True, True]
    with caplog.at_level(logging.WARNING):
        found.warn()
    assert "chains of 1 of 4 data have not converged" in caplog.text
    assert "Chains of 1 data have not visited a mode that holds more than 0.01 of" in caplog.text
