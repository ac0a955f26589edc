"""Leave-one-out of data with latents of their own, beside refits in closed form."""

from __future__ import annotations

import functools
import logging
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import nn

import pyro_vae as pv
from pyro_vae.export.marginal import Integrals
from tests.arviz_calls import elpd, elpd_of_data, groups, loo
from tests.models import HierarchicalNormal

MODEL = HierarchicalNormal(prior=3.0, spread=1.0, noise=0.7)


def data(count=20, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return 1 + MODEL.width * torch.randn(count, dtype=dtype, generator=generator)


def export(guide, x, num_draws=1000, **options):
    settings = {"log_likelihood": "marginal", "predictive": False, "seed": 0}
    return pv.to_arviz(MODEL, guide, x, num_draws=num_draws, **{**settings, **options})


def monte_carlo(tree):
    """The standard error of each datum's -log mean exp(-value), by the delta method, [N]."""
    value = tree["log_likelihood"]["marginal"].values.reshape(-1, len(tree["observed_data"]["x"]))
    inverse = np.exp(value.min(0) - value)
    return inverse.std(0) / inverse.mean(0) / len(value) ** 0.5


# --- against refits


def test_loo_agrees_with_refits():
    """20 data, each left out and the rest fitted anew, in closed form: within 5 standard errors.

    The exact guide has the integral for any K: what is left is the error of 1000 draws of mu.
    """
    x = data()
    tree = export(MODEL.posterior, x, num_particles=2)
    found, refits = loo(tree), MODEL.leave_one_out(x).numpy()
    error = monte_carlo(tree)
    assert (abs(elpd_of_data(found) - refits) < 5 * error + 1e-4).all()
    assert abs(elpd(found) - refits.sum()) < 5 * np.sqrt((error**2).sum())
    assert abs(elpd(found) - refits.sum()) < 0.1 * found.se  # ArviZ's own error, over data
    assert found.pareto_k.max() < 0.7
    assert tree["constant_data"]["marginal_se"].values.max() < 1e-9
    assert tree["constant_data"]["marginal_se"].dims == ("data",)
    # What is said of data given their own latents is another thing, and az.loo knows it.
    pointwise = loo(pv.to_arviz(MODEL, MODEL.posterior, x, data_plate=False, seed=0))
    assert pointwise.pareto_k.max() > 0.7
    assert elpd(pointwise) > refits.sum() + 1


def test_what_the_integrals_cost_is_said(caplog):
    """A guide of z half as wide again and off, K = 8: the bias is what the errors say it is.

    Mean over 5 seeds; the exact guide of mu is that of both, so the draws are the same.
    """
    x = data()

    def rough(x):
        return MODEL.posterior(x, widen=1.5, shift=0.4)

    refits, found, said = MODEL.leave_one_out(x).numpy().sum(), [], []
    for seed in range(5):
        tree = export(rough, x, num_draws=200, num_particles=8, seed=seed)
        found.append(elpd(loo(tree)) - refits)
        said.append({**tree.attrs}["marginal_loo_bias"])
    error = np.std(found, ddof=1) / 5**0.5
    assert np.mean(said) < -0.4  # it is not nothing
    assert abs(np.mean(found) - np.mean(said)) < 5 * error + 0.2 * abs(np.mean(said))
    assert not caplog.text
    far = export(lambda x: MODEL.posterior(x, shift=2.5), x, num_draws=20, num_particles=4)
    assert "has a standard error of more than 0.5 nats, by 4 particles" in caplog.text
    assert far.attrs["log_likelihood"] == "log p(x_n | global latents), by IWAE-4"


def test_integrals_are_those_of_each_draw():
    """-1/2 log(2 pi v) - (x - mu)^2 / 2v, for each draw of mu, at any dtype and one datum."""
    for x in (data(3, torch.float32), data(1)):
        tree = export(MODEL.posterior, x, num_draws=7, num_particles=3)
        mu = tree["posterior"]["mu"].values[..., None]
        exact = stats.norm(mu, MODEL.width).logpdf(x.numpy())
        np.testing.assert_allclose(tree["log_likelihood"]["marginal"], exact, atol=1e-5)
        assert tree["log_likelihood"]["marginal"].dims == ("chain", "draw", "data")
        assert groups(tree)["log_likelihood"].sizes["data"] == len(x)


def test_the_error_of_integrals():
    found = Integrals(np.zeros((2, 3)), np.array([[0.1, 0.2, 0.0], [0.3, 0.2, 0.0]]))
    np.testing.assert_allclose(found.of_data, [0.05**0.5, 0.2, 0])
    assert math.isclose(found.loo_bias, -(0.05 + 0.04))


def test_annealed_chains_in_the_place_of_particles():
    """Where a guide is four widths off: exact within errors, and particles are nats too low."""
    x = data(4)

    def far(x):
        return MODEL.posterior(x, shift=4 * MODEL.noise / 2**0.5)

    bound = functools.partial(pv.ais, num_chains=16, num_steps=60, progress=False)
    tree = export(far, x, num_draws=2, bound=bound)
    mu = tree["posterior"]["mu"].values[0][:, None]
    exact = stats.norm(mu, MODEL.width).logpdf(x.numpy())
    value, error = (
        tree["log_likelihood"]["marginal"].values[0],
        tree["constant_data"]["marginal_se"],
    )
    assert (abs(value - exact) < 5 * error.values + 0.02).all() and (error < 0.9).all()
    assert tree.attrs["log_likelihood"].endswith("by AIS-60")
    plain = export(far, x, num_draws=2, num_particles=16)
    assert np.array_equal(tree["posterior"]["mu"], plain["posterior"]["mu"])
    assert (exact - plain["log_likelihood"]["marginal"].values[0]).mean() > 1


@pytest.mark.slow
def test_loo_by_annealed_chains_agrees_with_refits():
    """Five data and the exact guide of mu, within 5 errors of 60 draws."""
    x = data(5)
    bound = functools.partial(pv.ais, num_chains=8, num_steps=10, progress=False, compile=False)
    tree = export(MODEL.posterior, x, num_draws=60, bound=bound)
    error = np.hypot(monte_carlo(tree), tree["constant_data"]["marginal_se"].values)
    refits = MODEL.leave_one_out(x).numpy()
    assert (abs(elpd_of_data(loo(tree)) - refits) < 5 * error + 0.02).all()


# --- models of other kinds


def test_summed_out_discrete_and_inner_plates_and_two_observed_sites():
    """A class per datum, summed out, an effect integrated: by quadrature."""

    def model(x, y):
        shift = pyro.sample("shift", dist.Normal(x.new_zeros(2), 2.0).to_event(1))
        with pyro.plate("data", len(x), dim=-2):
            c = pyro.sample("c", dist.Bernoulli(x.new_full((1,), 0.3)))
            z = pyro.sample("z", dist.Normal(shift[0] + 2 * c, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)
            with pyro.plate("inner", 2, dim=-1):
                pyro.sample("x", dist.Normal(z + shift[1], 0.8), obs=x)

    def guide(x, y):
        pyro.sample("shift", dist.Normal(x.new_zeros(2), 0.5).to_event(1))
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(y, 1.0))

    x, y = data(6).reshape(3, 2), data(3).reshape(3, 1)
    options = {"num_draws": 4, "num_particles": 1000, "log_likelihood": "marginal", "seed": 0}
    tree = pv.to_arviz(model, guide, x, y, data_plate="data", **options)
    found, error = (
        tree["log_likelihood"]["marginal"].values[0],
        tree["constant_data"]["marginal_se"],
    )
    grid = np.linspace(-12, 12, 4001)
    for s, shift in enumerate(tree["posterior"]["shift"].values[0]):
        prior = 0.7 * stats.norm(shift[0], 1).pdf(grid) + 0.3 * stats.norm(shift[0] + 2, 1).pdf(
            grid
        )
        for n in range(3):
            seen = stats.norm(grid + shift[1], 0.8).pdf(x[n].numpy()[:, None]).prod(0)
            density = prior * seen * stats.norm(grid, 0.5).pdf(y[n].item())
            exact = np.log(np.trapezoid(density, grid))
            assert abs(found[s, n] - exact) < 6 * error.values[n] + 1e-4
    assert float(error.max()) < 0.1


@pytest.mark.slow
def test_an_amortized_guide_and_a_guide_of_its_own():
    model, x = HierarchicalNormal(0.5, 1.0, 0.7), data(12, torch.float32)
    alone = pyro.poutine.block(model, expose=["mu"])
    guides = [
        pv.AmortizedGuide(
            model,
            Zeros(),
            example=x,
            global_guide=pyro.infer.autoguide.AutoNormal(alone),
            top_down=top_down,
        )
        for top_down in (False, True)
    ]
    # One Gaussian of all latents, correlated: each datum's conditional given those before it.
    full = pv.families.FullRankNormal()
    whole = pv.LocalGuide(model, num_data=1, example=x, family=full, data_plate=False)
    local = pv.refine(model, guides[0], x, given={"mu": 0.6}, seed=0, progress=False)
    options = {"log_likelihood": "marginal", "num_draws": 5, "num_particles": 2000, "seed": 0}
    whole = pv.refine(model, whole, x, data_plate=False, seed=0, progress=False)
    for guide, of_datum in [*((g, None) for g in (*guides, whole)), (whole, local)]:
        tree = pv.to_arviz(model, guide, x, local_guide=of_datum, **options)
        exact = stats.norm(tree["posterior"]["mu"].values[..., None], model.width).logpdf(x)
        error = tree["constant_data"]["marginal_se"].values
        assert error.max() < 0.2
        assert (abs(tree["log_likelihood"]["marginal"].values - exact) < 6 * error + 1e-3).all()


class Zeros(nn.Module):
    """An encoder that sees nothing: a guide as wide as the prior."""

    def forward(self, x):
        return x.new_zeros(len(x), 4)


def test_masks_that_depend_on_the_globals():
    """A datum is masked where mu is negative: then it has no latent, and its integral is 0."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=mu > 0):
            z = pyro.sample("z", dist.Normal(mu + x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + mu) / 2, 0.5**0.5))

    x = data(3)
    options = {"log_likelihood": "marginal", "num_draws": 8, "num_particles": 2, "seed": 0}
    tree = pv.to_arviz(model, guide, x, predictive=False, **options)
    mu = tree["posterior"]["mu"].values[..., None]
    assert (mu > 0).any() and (mu < 0).any()
    exact = np.where(mu > 0, stats.norm(mu, 2**0.5).logpdf(x), 0.0)
    np.testing.assert_allclose(tree["log_likelihood"]["marginal"], exact, atol=1e-9)


# --- refusals


def test_refusals():
    def local(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def shared(x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def of_mu(x):
        pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))

    def of_z(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    x, options = data(3), {"num_draws": 3, "log_likelihood": "marginal"}
    with pytest.raises(ValueError, match=r"the model has none: its data are independent"):
        pv.to_arviz(local, of_z, x, **options)
    with pytest.raises(
        ValueError, match=r"latents of each datum, in the plate of .* no local latents"
    ):
        pv.to_arviz(shared, of_mu, x, **options)
    with pytest.raises(ValueError, match=r"log_likelihood='both': one of \('pointwise', 'marg"):
        pv.to_arviz(local, of_z, x, num_draws=3, log_likelihood="both")
    auto = pyro.infer.autoguide.AutoMultivariateNormal(MODEL)
    auto(x)
    with pytest.raises(ValueError, match=r"given the global ones \(local_guide\); of this one: "):
        export(auto, x, num_draws=2)
    with pytest.raises(ValueError, match="num_particles=0"):
        export(MODEL.posterior, x, num_particles=0)


def test_chains_have_it_too(caplog):
    x = data(4)
    caplog.set_level(logging.ERROR)
    settings = {"num_draws": 30, "num_warmup": 30, "seed": 0, "progress": False}
    samples = pv.sample_posterior(MODEL, MODEL.posterior, x, data_plate=False, **settings)
    tree = samples.to_arviz(log_likelihood="marginal", num_particles=2)
    found = tree["log_likelihood"]["marginal"]
    assert found.dims == ("chain", "draw", "data") and found.shape == (4, 30, 4)
    exact = stats.norm(tree["posterior"]["mu"].values[..., None], MODEL.width).logpdf(x)
    np.testing.assert_allclose(found, exact, atol=1e-9)
