"""Active units of linear Gaussians, where the variance of the posterior mean is known."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta

import pyro_vae as pv
from pyro_vae.diagnostics.active_units import _dataset
from tests.models import NormalModel, factor_analysis, mixture

pytestmark = pytest.mark.usefixtures("float64")


def drawn_posterior(x):
    """The posterior of NormalModel() by a distribution that does not say its mean."""
    with pyro.plate("data", len(x)):
        base = dist.Normal(x / 2, 0.5**0.5).to_event(x.ndim - 1)
        shift = dist.transforms.AffineTransform(0.0, 1.0)
        pyro.sample("z", dist.TransformedDistribution(base, shift))


def test_of_a_gaussian_posterior_it_is_the_variance_of_its_mean():
    model = factor_analysis()
    x = model.data(300)
    found = pv.active_units(model, model.posterior, x, num_particles=2, chunk_size=100)
    mean = model.posterior_mean(x)
    np.testing.assert_allclose(found.dataset["activity"], mean.var(0), atol=1e-12)
    # The jackknife: leave each datum out in turn.
    left_out = torch.stack([torch.cat([mean[:n], mean[n + 1 :]]).var(0) for n in range(300)])
    jackknife = (299 / 300 * (left_out - left_out.mean(0)).square().sum(0)).sqrt()
    np.testing.assert_allclose(found.dataset["activity_se"], jackknife, rtol=0.01)
    assert found.dataset["rate"].isnull().all()  # the posterior does not factorize
    assert found.num_active == 3 and "3 of 3 units are active" in repr(found)


def test_a_prior_variance_that_varies_has_its_part_in_the_error():
    """By the jackknife, where it is drawn and varies with the mean."""
    mean = torch.randn(200, 1)
    variance = 1 + mean.square() + torch.rand(200, 1)
    values = torch.cat([mean, variance, torch.zeros(200, 1)], 1)
    spreads = torch.cat([torch.rand(200, 1), torch.zeros(200, 2)], 1)

    def activity(rows):
        return _dataset(values[rows], spreads[rows], {"z": ["z"]}, 5, 0.01)

    left_out = np.array(
        [activity(torch.arange(200) != n)["activity"].values[0] for n in range(200)]
    )
    jackknife = math.sqrt(199 / 200 * np.square(left_out - left_out.mean()).sum())
    found = activity(slice(None))["activity_se"].values[0]
    assert found == pytest.approx(jackknife, rel=0.02)


def test_the_noise_of_draws_is_taken_out():
    """Two draws each: the variance of their mean is 0.25 more, over 200 units in the mean."""
    x = 2**0.5 * torch.randn(60, 200)
    model = NormalModel()
    few = {"num_particles": 2, "seed": 0}
    exact = pv.active_units(model, model.posterior, x, **few).dataset["activity"]
    drawn = pv.active_units(model, drawn_posterior, x, **few).dataset["activity"]
    error = (drawn - exact).values
    assert error.std() > 0.03
    assert abs(error.mean()) < 4 * error.std() / 200**0.5


@pytest.mark.parametrize("guide", [NormalModel().posterior, drawn_posterior])
def test_standard_errors_are_those_of_other_data(guide):
    """300 independent units, each of 100 data of the model: the mean moves by half of the prior."""
    x = 2**0.5 * torch.randn(100, 300)
    found = pv.active_units(NormalModel(), guide, x, num_particles=4, seed=0).dataset
    z = ((found["activity"] - 0.5) / found["activity_se"]).values
    assert 0.85 < z.std() < 1.25 and abs(z.mean()) < 0.35


def test_it_is_a_share_of_the_variance_of_the_prior():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(3.0, 10.0))
            pyro.sample("x", dist.Normal(z, 10.0), obs=x)

    def posterior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + 3) / 2, 50**0.5))

    x = 3 + 200**0.5 * torch.randn(50)
    found = pv.active_units(model, posterior, x, num_particles=2).dataset
    np.testing.assert_allclose(found["activity"], x.var() / 400)


def test_what_covariates_say_is_no_activity():
    def model(c, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(c, 2.0))
            y = pyro.sample("y", dist.Normal(c, 2.0))
            pyro.sample("x", dist.Normal(z, 2.0), obs=x)
        return y

    def guide(c, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((c + x) / 2, 2**0.5))
            pyro.sample("y", dist.Normal(c, 2.0))

    c = 5 * torch.randn(100)
    x = c + 8**0.5 * torch.randn(100)
    found = pv.active_units(model, guide, c, x, num_particles=2)
    np.testing.assert_allclose(found.dataset["activity"], [(x - c).var() / 16, 0], atol=1e-12)
    np.testing.assert_allclose(found.dataset["rate"].values[1], 0, atol=1e-12)
    assert found.dataset["active"].values.tolist() == [True, False]
    assert found.num_active == 1


def test_a_site_given_another():
    """z, y given z, x given y, each of variance one more: E[y | x] = 2 x / 3, Var(y) = 2."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            y = pyro.sample("y", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    def posterior(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x / 3, (2 / 3) ** 0.5))
            pyro.sample("y", dist.Normal((z + x) / 2, 0.5**0.5))

    x = 3**0.5 * torch.randn(200)
    found = pv.active_units(model, posterior, x, num_particles=2000, seed=0).dataset
    np.testing.assert_allclose(found["activity"], [x.var() / 9, x.var() * 4 / 9 / 2], rtol=0.03)


def test_the_threshold_and_what_is_near_it():
    model = NormalModel()
    x = torch.linspace(-1.0, 1.0, 20)[:, None] * torch.tensor([0.0, 0.3, 3.0])
    found = pv.active_units(model, model.posterior, x, num_particles=2)
    activity = x.var(0) / 4
    assert found.dataset["active"].values.tolist() == (activity > 0.01).tolist()
    assert found.num_active == 1 and "within two standard errors of that: z[1]" in repr(found)
    lower = pv.active_units(model, model.posterior, x, num_particles=2, threshold=0.001)
    assert lower.num_active == 2
    # What the posterior mean moves by is what its rate is of.
    rate = math.log(2) / 2 + (0.5 + (x / 2).square() - 1) / 2
    np.testing.assert_allclose(found.summary()["rate"], rate.mean(0))


def test_points_have_a_mean_and_no_rate():
    model, x = NormalModel(), torch.tensor([-1.0, 0.0, 1.0])
    guide = AutoDelta(model)
    guide(x)
    with torch.no_grad():
        pyro.module("guide", guide)
        guide.z.copy_(x)
    found = pv.active_units(model, guide, x, num_particles=2).dataset
    np.testing.assert_allclose(found["activity"], [1.0])
    assert found["rate"].isnull().all()


def test_a_prior_without_a_variance_is_no_unit_of_measure():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Cauchy(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    found = pv.active_units(model, guide, torch.randn(9), num_particles=2)
    assert found.dataset["activity"].isnull().all() and found.num_active == 0
    assert "nan, for their prior has no variance: z" in repr(found)


def test_what_has_no_mean_is_refused():
    x = torch.randn(9)
    guide = pv.ExactGuide(mixture, example=x)
    with pytest.raises(ValueError, match="'c' .Categorical. has values without a mean"):
        pv.active_units(mixture, guide, x)

    def circle(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.VonMises(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def on_it(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.VonMises(0 * x, 1.0))

    with pytest.raises(ValueError, match="'z' .VonMises. has values without a mean"):
        pv.active_units(circle, on_it, x)


def test_refusals():
    model = NormalModel()
    with pytest.raises(ValueError, match="active_units needs at least 3 data"):
        pv.active_units(model, model.posterior, torch.zeros(2))
    with pytest.raises(ValueError, match="threshold=-1"):
        pv.active_units(model, model.posterior, torch.zeros(3), threshold=-1)
    with pytest.raises(ValueError, match="num_particles"):
        pv.active_units(model, model.posterior, torch.zeros(3), num_particles=1)


def test_global_latents_are_given():
    def model(x):
        shift = pyro.sample("shift", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - 2) / 2, 0.5**0.5))

    x = torch.randn(5)
    found = pv.active_units(model, guide, x, given={"shift": 2.0}, num_particles=2)
    np.testing.assert_allclose(found.dataset["activity"], [x.var() / 4])
    assert "given shift at the values passed" in repr(found)
