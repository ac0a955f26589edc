"""Rate, distortion and code length of linear Gaussians against algebra; what has collapsed."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta

import pyro_vae as pv
from tests.models import BetaBernoulli, FactorAnalysis, NormalModel, factor_analysis, mixture

pytestmark = pytest.mark.usefixtures("float64")


def gaussian_rate(mean, covariance):
    """KL(Normal(mean, covariance), Normal(0, I)), [N]."""
    size = len(covariance)
    return 0.5 * (covariance.trace() + mean.square().sum(-1) - size - torch.logdet(covariance))


def gaussian_distortion(model: FactorAnalysis, x, mean, covariance):
    """-E_q log Normal(x; W z + mu, noise^2), [N]."""
    variance = model.noise**2
    errors = (x - model.mean - mean @ model.loadings.T).square().sum(-1)
    spread = (model.loadings @ covariance @ model.loadings.T).trace()
    return 0.5 * (len(model.mean) * math.log(2 * math.pi * variance) + (errors + spread) / variance)


def test_of_the_exact_posterior_all_is_exact_from_two_draws():
    model = factor_analysis()
    x = model.data(7)
    found = pv.rate_distortion(model, model.posterior, x, num_particles=2, seed=0).dataset
    mean, covariance = model.posterior_mean(x), torch.linalg.inv(model.posterior_precision)
    exact = {
        "rate": gaussian_rate(mean, covariance),
        "distortion": gaussian_distortion(model, x, mean, covariance),
        "code_length": -model.log_evidence(x),
    }
    for name, value in exact.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-10)
        assert (found[f"{name}_se"] < 1e-10).all()
    assert found["form"].values == ["analytic"]


def test_of_a_mean_field_guide_each_is_within_its_standard_error():
    model = factor_analysis()
    x = model.data(40)
    location, scale = model.posterior_mean(x) + 0.3, torch.tensor([0.2, 0.4, 1.5])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(model.posterior_mean(x) + 0.3, scale).to_event(1))

    found = pv.rate_distortion(model, guide, x, num_particles=2000, seed=0)
    data, covariance = found.dataset, torch.diag(scale**2)
    np.testing.assert_allclose(data["rate"], gaussian_rate(location, covariance), atol=1e-12)
    each = 0.5 * (scale**2 + location.square() - 1) - scale.log()
    np.testing.assert_allclose(data["unit_rate"], each, atol=1e-12)
    exact = gaussian_distortion(model, x, location, covariance).numpy()
    z = ((data["distortion"] - exact) / data["distortion_se"]).values
    assert (abs(z) < 4.5).all() and 0.6 < z.std() < 1.4
    bound = pv.elbo(model, guide, x, num_particles=2000, seed=0)
    np.testing.assert_allclose(data["code_length"], -bound.value, atol=1e-12)
    np.testing.assert_allclose(data["code_length_se"], bound.std_error, atol=1e-12)
    np.testing.assert_allclose(data["rate"] + data["distortion"], data["code_length"], atol=1e-12)


def test_units_of_length():
    model = factor_analysis(features=5)
    x = model.data(6)
    found = pv.rate_distortion(model, model.posterior, x, num_particles=2)
    nats = -model.log_evidence(x)
    np.testing.assert_allclose(found.bits["code_length"], nats / math.log(2))
    per_dimension = found.bits_per_dimension["code_length"]
    np.testing.assert_allclose(per_dimension, nats / math.log(2) / 5)
    row = found.summary().loc["code_length"]
    assert row["nats"] == pytest.approx(float(nats.mean()))
    assert row["bits"] == pytest.approx(float(nats.mean()) / math.log(2))
    assert row["bits_per_dim"] == pytest.approx(float(nats.mean()) / math.log(2) / 5)


def test_missing_numbers_are_no_dimensions():
    model = NormalModel()
    x = torch.tensor([[1.0, 2.0, math.nan], [0.5, math.nan, math.nan], [0.0, 1.0, 2.0]])

    def guide(x):
        seen = (~x.isnan()).to(x)
        with pyro.plate("data", len(x)):
            location, scale = seen * x.nan_to_num() / 2, (1 + seen).rsqrt()
            pyro.sample("z", dist.Normal(location, scale).to_event(1))

    found = pv.rate_distortion(pv.MissingData(model), guide, x, num_particles=2)
    assert found.dataset["num_dimensions"].values.tolist() == [2, 1, 3]
    marginal = torch.distributions.Normal(0.0, 2**0.5)
    each = (marginal.log_prob(x.nan_to_num()) * ~x.isnan()).sum(-1)
    np.testing.assert_allclose(found.dataset["code_length"], -each)
    # In all: all bits over all six numbers, not the mean of three ratios.
    total = -float(each.sum()) / math.log(2) / 6
    assert found.summary().loc["code_length", "bits_per_dim"] == pytest.approx(total)


def test_masked_rows_of_a_plate_are_no_dimensions():
    def model(x, there):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("parts", x.shape[1], dim=-1), pyro.poutine.mask(mask=there):
                pyro.sample("x", dist.Normal(torch.stack([z, -z], -1), 1.0).to_event(1), obs=x)

    x, there = torch.randn(4, 3, 2), torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 0, 1]])
    guide = pv.LocalGuide(model, num_data=4, example=(x, there.bool()), data_plate="data")
    found = pv.rate_distortion(model, guide, x, there.bool(), data_plate="data", num_particles=2)
    assert found.dataset["num_dimensions"].values.tolist() == [6, 2, 0, 4]


def test_a_factor_hides_how_many_numbers_it_is_of():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("x", -0.5 * (x - z).square())

    guide = pv.LocalGuide(model, num_data=3, example=torch.zeros(3))
    found = pv.rate_distortion(model, guide, torch.zeros(3), num_particles=2)
    assert found.dataset["num_dimensions"].isnull().all()
    assert found.summary()["bits_per_dim"].isna().all()
    assert found.summary()["bits"].notna().all()


def test_collapsed_units_are_named():
    """Rates of 0, 0.0098, 0.0128 and 2 nats: the first two carry nothing."""
    location = torch.tensor([0.0, 0.14, 0.16, 2.0])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(location.expand(len(x), 4), 1.0).to_event(1))

    found = pv.rate_distortion(model, guide, torch.zeros(5), num_particles=2)
    assert found.collapsed == ["z[0]", "z[1]"]
    assert found.units()["state"].tolist() == ["collapsed", "collapsed", "active", "active"]
    np.testing.assert_allclose(found.units()["rate"], location.square() / 2, atol=1e-12)
    assert "2 of 4 units of the latents are active" in repr(found)
    assert "collapsed, the posterior is the prior (2): z[0], z[1]" in repr(found)


def test_what_draws_do_not_tell_is_unclear():
    """A rate that is drawn has at first too large an error for a verdict; more draws tell."""

    def close(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.full((len(x),), -0.45), 0.95)
            pyro.sample("p", dist.TransformedDistribution(base, dist.transforms.SigmoidTransform()))

    model, x = BetaBernoulli(), torch.zeros(4, 2)
    few = pv.rate_distortion(model, close, x, num_particles=20, seed=0)
    assert few.dataset["form"].values == ["sampled"]
    assert few.units()["state"].tolist() == ["unclear"] and few.collapsed == []
    assert "unclear, more particles would tell (1): p" in repr(few)
    # By quadrature the rate is 0.0076.
    many = pv.rate_distortion(model, close, x, num_particles=40_000, seed=0)
    u = torch.linspace(-8, 8, 100_001)
    log_q = torch.distributions.Normal(-0.45, 0.95).log_prob(u)
    p = torch.distributions.Beta(2.0, 3.0).log_prob(u.sigmoid())
    log_p = p + torch.nn.functional.logsigmoid(u) + torch.nn.functional.logsigmoid(-u)
    rate = float((log_q.exp() * (log_q - log_p)).sum() * (u[1] - u[0]))
    row = many.units().loc["p"]
    assert abs(row["rate"] - rate) < 4 * row["rate_se"] and row["state"] == "collapsed"
    assert rate == pytest.approx(0.0076, abs=1e-4)


def test_steps_that_are_there_for_few_data_are_measured_on_these():
    """A second step that a tenth of the data has, with 0.05 nats there: 0.005 of all data."""

    def model(x, there):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            y = pyro.sample("y", dist.Normal(0.0, 1.0).mask(there))
            pyro.sample("x", dist.Normal(z + y * there, 1.0), obs=x)

    def guide(x, there):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.full_like(x, 0.1**0.5), 1.0))
            pyro.sample("y", dist.Normal(torch.full_like(x, 0.1**0.5), 1.0))

    x, there = torch.zeros(20), torch.arange(20) < 2
    units = pv.rate_distortion(model, guide, x, there, num_particles=3).units()
    np.testing.assert_allclose(units["rate"], [0.05, 0.05])
    assert units["state"].tolist() == ["active", "active"]
    units = pv.rate_distortion(model, guide, x, there & False, num_particles=3).units()
    assert units["state"].tolist() == ["active", "never there"]


def test_chunks_change_nothing():
    model = factor_analysis()
    x = model.data(300)
    guide = pv.LocalGuide(model, num_data=300, example=x)
    whole, parts = (
        pv.rate_distortion(model, guide, x, num_particles=60, seed=1, chunk_size=size).dataset
        for size in (None, 700)
    )
    for name in whole.data_vars:
        if not name.endswith("_skewness"):
            np.testing.assert_allclose(whole[name], parts[name], atol=1e-9, err_msg=name)


def test_the_chunk_size_bounds_what_is_run_at_once():
    seen = []

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            seen.append(z.numel())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = NormalModel().posterior
    most = {}
    for size in (None, 20):
        seen.clear()
        pv.rate_distortion(model, guide, torch.zeros(10), num_particles=200, chunk_size=size)
        most[size] = max(seen)
    assert most[None] == 2000
    assert most[20] < 100  # of looks at the model


def test_discrete_latents_and_their_exact_posterior():
    x = torch.tensor([-1.0, 0.3, 2.0])
    guide = pv.ExactGuide(mixture, example=x)
    found = pv.rate_distortion(mixture, guide, x, num_particles=5).dataset
    log_posterior = mixture.log_joint(x).log_softmax(-1)
    rate = (log_posterior.exp() * (log_posterior - mixture.weights.log())).sum(-1)
    np.testing.assert_allclose(found["rate"], rate, atol=1e-12)
    np.testing.assert_allclose(found["code_length"], -mixture.log_evidence(x), atol=1e-12)


def test_latents_that_are_summed_out_are_in_the_distortion():
    def nothing(x):
        pass

    x = torch.tensor([-1.0, 0.3, 2.0])
    found = pv.rate_distortion(mixture, nothing, x, num_particles=2)
    np.testing.assert_allclose(found.dataset["rate"], 0.0, atol=1e-12)
    np.testing.assert_allclose(found.dataset["distortion"], -mixture.log_evidence(x), atol=1e-12)
    assert "0 of 0 units" in repr(found)


def test_one_datum_in_all():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def posterior(x):
        pyro.sample("z", dist.Normal(x.sum() / (1 + len(x)), (1 + len(x)) ** -0.5))

    x = torch.randn(4)
    found = pv.rate_distortion(model, posterior, x, data_plate=False, num_particles=2).dataset
    rate = math.log(5) / 2 + (0.2 + (x.sum() / 5) ** 2 - 1) / 2
    np.testing.assert_allclose(found["rate"], [rate])
    assert found["num_dimensions"].values.tolist() == [4]
    covariance = torch.eye(4) + 1
    joint = torch.distributions.MultivariateNormal(torch.zeros(4), covariance)
    np.testing.assert_allclose(found["code_length"], [-joint.log_prob(x)])


def test_global_latents_are_given():
    def model(x):
        shift = pyro.sample("shift", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - 2) / 2, 0.5**0.5))

    x = torch.randn(3)
    found = pv.rate_distortion(model, guide, x, given={"shift": 2.0}, num_particles=2)
    exact = torch.distributions.Normal(2.0, 2**0.5).log_prob(x)
    np.testing.assert_allclose(found.dataset["code_length"], -exact)
    assert "given shift at the values passed" in repr(found)


def test_several_sites_have_a_row_each():
    torch.manual_seed(0)
    model = pv.zoo.TwoLayerVAE(6, (3, 2), hidden=[4]).double()
    x = model.simulate(5)
    guide = pv.AmortizedGuide(model, model.make_encoder([4]), example=x)
    found = pv.rate_distortion(model, guide, x, num_particles=50, seed=0)
    sites = found.dataset["site"].values.tolist()
    rows = found.summary()
    assert len(sites) == 2 and len(found.units()) == 5
    assert rows.loc["rate", "nats"] == pytest.approx(
        sum(rows.loc[f"rate of {name}", "nats"] for name in sites)
    )


def test_proposals_outside_the_support_cost_without_bound():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Exponential(1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))

    found = pv.rate_distortion(model, guide, torch.zeros(2), num_particles=50, seed=0).dataset
    assert np.isposinf(found["code_length"]).all() and np.isposinf(found["rate"]).all()
    assert np.isfinite(found["distortion"]).all()


def test_a_point_has_no_rate():
    model, x = NormalModel(), torch.zeros(3)
    guide = AutoDelta(model)
    with pytest.raises(ValueError, match="proposes one point for .*'z'.*rate is infinite"):
        pv.rate_distortion(model, guide, x, num_particles=2)


def test_one_particle_has_no_error():
    model, x = NormalModel(), torch.zeros(3)
    with pytest.raises(ValueError, match="num_particles"):
        pv.rate_distortion(model, model.posterior, x, num_particles=1)
