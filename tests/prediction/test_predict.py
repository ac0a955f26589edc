"""Predictions against algebra: conjugate models, every kind of site, guide and missing value."""

from __future__ import annotations

import functools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from tests.models import (
    MEANS,
    BetaBernoulli,
    GammaPoisson,
    HierarchicalNormal,
    NormalModel,
    factor_analysis,
    mixture,
)

F64 = torch.float64
SURE = 5.0  # standard errors
predict = functools.partial(pv.predict, seed=0)
X = torch.tensor([-2.0, 0.0, 1.0, 3.0], dtype=F64)


def is_right(found, name, mean, sd=None, loose=0.1):
    """Whether the mean is within its errors, and these are not zero; the sd to a share."""
    value, error = (found[f"{name}_{what}"].values for what in ("mean", "mean_se"))
    mean = np.asarray(mean)
    assert value.shape == mean.shape
    assert (np.abs(value - mean) < SURE * error + 1e-9).all(), np.abs(value - mean) / error
    if sd is not None:
        np.testing.assert_allclose(found[f"{name}_sd"].values, np.asarray(sd), rtol=loose)


# --- against algebra


def test_a_linear_gaussian_model():
    """Means have less noise than averages of draws, and draws their sd: 1.5**0.5."""
    model = NormalModel()
    found = predict(model, model.posterior, X, num_draws=4000, keep_draws=4000)
    is_right(found, "x", X / 2, np.full(4, 1.5**0.5), 0.03)
    np.testing.assert_allclose(found["x_mean_se"], (0.5 / 4000) ** 0.5, rtol=0.1)
    draws = found["x"].values
    assert found["x"].dims == ("draw", "datum") and draws.shape == (4000, 4)
    assert (np.abs(draws.mean(0) - X.numpy() / 2) < SURE * (1.5 / 4000) ** 0.5).all()
    np.testing.assert_allclose(draws.std(0), 1.5**0.5, rtol=0.06)
    assert found["pareto_k"].dims == ("datum",) and found.attrs["doubt"] == ""


def test_counts():
    """A negative binomial: mean (2 + x) / 2, and the variance that much and a half of it more."""
    model, x = GammaPoisson(), torch.tensor([0.0, 3.0, 8.0], dtype=F64)
    found = predict(model, model.posterior, x, num_draws=4000)
    mean = (2 + x) / 2
    is_right(found, "x", mean, (mean + mean / 2).sqrt(), 0.05)
    assert (found["x"].values == found["x"].values.round()).all()


def test_rare_counts_have_an_error():
    """Of no draw above zero an average would be 0 and its error too."""

    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0 + 0 * x, 2e4 + 0 * x))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(2.0 + x, 2e4 + 1 + 0 * x))

    found = predict(model, guide, torch.zeros(2, dtype=F64), num_draws=500)
    is_right(found, "x", np.full(2, 2 / 20001.0))
    assert (found["x_mean_se"] > 1e-6).all() and (found["x_mean_se"] < 1e-5).all()


def test_probabilities_of_zero_and_one():
    model, x = BetaBernoulli(), torch.tensor([[0.0], [1.0]], dtype=F64)
    found = predict(model, model.posterior, x, num_draws=2000)
    a, b = model.a + x, model.b + 1 - x
    mean = a / (a + b)
    is_right(found, "x", mean, (mean * (1 - mean)).sqrt(), 0.02)


def test_factor_analysis_predicted_and_reconstructed():
    model = factor_analysis("correlated")
    torch.manual_seed(0)
    x = model.data(3)
    mean = model.posterior_mean(x) @ model.loadings.T + model.mean
    covariance = model.loadings @ torch.linalg.inv(model.posterior_precision) @ model.loadings.T
    options = {"num_draws": 4000, "keep_draws": 3}
    of_mean = covariance.diagonal().expand_as(mean)
    found = pv.reconstruct(model, model.posterior, x, seed=0, **options)
    is_right(found, "x", mean, of_mean.sqrt(), 0.06)
    assert found["x"].dims == ("draw", "datum", "x_dim_0")
    found_new = predict(model, model.posterior, x, **options)
    is_right(found_new, "x", mean, (of_mean + model.noise**2).sqrt(), 0.05)
    # A draw of a reconstruction lies in the plane of the loadings.
    away = torch.as_tensor(found["x"].values) - model.mean
    inside = away @ model.loadings @ torch.linalg.pinv(model.loadings)
    assert not torch.allclose(inside, torch.zeros_like(inside))
    residual = away - away @ torch.linalg.pinv(model.loadings).T @ model.loadings.T
    assert residual.abs().max() < 1e-9


def classes(x, y):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        logits = torch.stack([z, -z, 0 * z], -1)
        pyro.sample("y", dist.Categorical(logits=logits), obs=y)


def of_x(x, y=None):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def class_probabilities(x):
    """By quadrature over z ~ Normal(x / 2, 0.5)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    z = x.numpy()[:, None] / 2 + 0.5**0.5 * nodes
    each = np.exp(np.stack([z, -z, 0 * z], -1))
    each /= each.sum(-1, keepdims=True)
    return (weights[:, None] * each).sum(1) / weights.sum()


@pytest.mark.parametrize("known", [True, False])
def test_classes_have_probabilities(known):
    """Also where the class is None: nobody knows it yet, and the guide does not look at it."""
    y = torch.tensor([0, 1, 2, 0]) if known else None
    found = predict(classes, of_x, X, y, sites=["y"], num_draws=2000)
    value, error = found["y_probability"], found["y_probability_se"].values
    assert value.dims == ("datum", "y_class") and "y_mean" not in found
    assert (np.abs(value.values - class_probabilities(X)) < SURE * error).all()
    assert (error > 0).all() and np.allclose(value.values.sum(-1), 1)
    assert set(np.unique(found["y"])) == {0, 1, 2} and found["y"].dims == ("draw", "datum")
    made = pv.reconstruct(classes, of_x, X, y, num_draws=50, keep_draws=7, seed=0)
    if known:
        assert made["y"].dims == ("draw", "datum", "y_class") and made["y"].shape == (7, 4, 3)


def regression(x, y=None):
    slope = pyro.sample("slope", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        mean = pyro.deterministic("line", slope * x)
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def of_slope(x, y=None):
    pyro.sample("slope", dist.Normal(x.new_tensor(2.0), 0.3))


@pytest.mark.parametrize("y", [None, X])
def test_a_regression_of_new_covariates(y):
    """Mean 2 x, variance (0.3 x)^2 + 0.25; the slope is one draw for all data."""
    x = torch.tensor([0.0, 1.0, -3.0, 10.0], dtype=F64)
    found = predict(regression, of_slope, x, y, sites=["y", "line", "slope"], num_draws=4000)
    is_right(found, "y", 2 * x, ((0.3 * x) ** 2 + 0.25).sqrt(), 0.05)
    is_right(found, "slope", 2.0, 0.3, 0.05)
    assert found["y"].dims == ("draw", "datum") == found["line"].dims
    assert found["slope"].dims == ("draw",)
    slope = found["line"].values / np.where(x == 0, 1, x)
    np.testing.assert_allclose(slope[:, 1:], found["slope"].values[:, None].repeat(3, 1))


def chain(x, y):
    """Of an observed value depend another one and a deterministic one."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        seen = pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.deterministic("twice", 2 * seen)
        pyro.sample("y", dist.Normal(3 * seen, 0.1), obs=y)


@pytest.mark.parametrize("data_plate", [None, False])
def test_what_depends_on_an_observed_value_follows_its_draw(data_plate):
    options = {"sites": ["x", "y", "twice"], "num_draws": 3000, "data_plate": data_plate}
    found = predict(chain, of_x, X, X, **options)
    is_right(found, "twice", X, np.full(4, 2 * 1.5**0.5), 0.06)
    is_right(found, "y", 1.5 * X, np.full(4, (9 * 1.5 + 0.01) ** 0.5), 0.06)
    np.testing.assert_allclose(found["twice"], 2 * found["x"])
    assert np.abs(found["y"] - 3 * found["x"]).max() < 0.6
    alone = predict(chain, of_x, X, X, sites=["twice"], num_draws=3000, data_plate=data_plate)
    np.testing.assert_array_equal(alone["twice"], found["twice"])


def test_numbers_of_a_dtype_that_numpy_has_not():
    found = predict(NormalModel(), NormalModel().posterior, X.bfloat16(), num_draws=200)
    is_right(found, "x", X / 2)
    assert found["x"].dtype == np.float32


def test_a_class_that_is_not_known_of_global_latents():
    def model(x, y=None):
        slope = pyro.sample("slope", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=slope * x), obs=y)

    found = predict(model, of_slope, X, None, num_draws=3000)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    logits = X.numpy()[:, None] * (2 + 0.3 * nodes)
    is_right(found, "y", (weights / (1 + np.exp(-logits))).sum(1) / weights.sum())


# --- latents of all kinds


def test_global_and_local_latents_are_drawn_jointly():
    """Given all data z has the mean and variance that mu's add to."""
    model = HierarchicalNormal()
    found = predict(model, model.posterior, X, sites=["x", "mu", "z"], num_draws=4000)
    mu, variance = model.posterior_of_mu(X)
    is_right(found, "x", mu + (X - mu) / 2, np.full(4, (variance / 4 + 0.5 + 1) ** 0.5), 0.05)
    is_right(found, "z", mu + (X - mu) / 2, np.full(4, (variance / 4 + 0.5) ** 0.5), 0.05)
    is_right(found, "mu", mu, variance**0.5, 0.05)
    assert found["z"].dims == ("draw", "datum") and found["mu_mean"].dims == ()
    fixed = predict(model, model.posterior, X, given={"mu": torch.tensor(1.0, dtype=F64)})
    assert fixed.attrs["given"] and (fixed["x_sd"].values < 1.3).all()
    is_right(fixed, "x", 1 + (X - 1) / 2, np.full(4, 1.5**0.5), 0.1)


def test_discrete_latents_are_drawn_from_their_posterior():
    x = torch.tensor([-2.0, 0.5, 3.0], dtype=F64)
    found = predict(mixture, lambda x: None, x, sites=["x", "c"], num_draws=3000)
    shares = (mixture.log_joint(x) - mixture.log_evidence(x)[:, None]).exp()
    value, error = found["c_probability"].values, found["c_probability_se"].values
    assert (np.abs(value - shares.numpy()) < SURE * error + 1e-3).all()
    mean = shares @ MEANS
    is_right(found, "x", mean, (1 + shares @ MEANS**2 - mean**2).sqrt(), 0.05)


def test_all_as_one_datum():
    model = NormalModel()
    found = predict(model, model.posterior, X, data_plate=False, num_draws=2000)
    is_right(found, "x", X / 2, np.full(4, 1.5**0.5), 0.06)
    assert found["x"].dims == ("draw", "data") and found["pareto_k"].dims == ()


def test_guides_of_all_kinds():
    model = NormalModel()
    mean = {"num_draws": 1000, "keep_draws": 0, "seed": 1}
    local = pv.refine(model, model.posterior, X, seed=0, progress=False)
    found = pv.predict(model, local, X, **mean)
    is_right(found, "x", X / 2)
    with local.rows(torch.tensor([1, 3])):
        is_right(pv.predict(model, local, X[[1, 3]], **mean), "x", X[[1, 3]] / 2)
    encoder = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 1)).double()
    amortized = pv.AmortizedGuide(model, encoder, example=X)
    assert pv.predict(model, amortized, X[:3], **mean)["x_mean"].shape == (3,)
    auto = AutoNormal(HierarchicalNormal(), create_plates=lambda x: pyro.plate("data", 4))
    auto(X)
    found = pv.predict(HierarchicalNormal(), auto, X, sites=["x", "mu"], **mean)
    assert found["x_mean"].dims == ("datum",) and "x" not in found
    medians = auto.median(X)
    is_right(found, "mu", medians["mu"].detach())


# --- what data may be


def test_missing_values_are_predicted_and_condition_nothing():
    model = pv.MissingData(factor_analysis("correlated"))
    inner, x = factor_analysis("correlated"), torch.zeros(2, 6, dtype=F64)
    x[0], x[1, 1:] = torch.nan, torch.nan

    def guide(x):
        with pyro.plate("data", len(x)):
            size = inner.num_latents
            pyro.sample("z", dist.Normal(x.new_zeros(size), 1.0).to_event(1))

    found = predict(model, guide, x, num_draws=4000, resample="psis")
    prior = (inner.loadings @ inner.loadings.T).diagonal() + inner.noise**2
    is_right({k: v[:1] for k, v in found.items()}, "x", inner.mean[None], prior.sqrt()[None], 0.06)
    # Of the second one the first value is seen.
    column = inner.loadings[0]
    covariance = inner.loadings @ column
    mean = inner.mean + covariance * (0 - inner.mean[0]) / (column @ column + inner.noise**2)
    is_right({k: v[1:] for k, v in found.items()}, "x", mean[None])
    assert found["x"].notnull().all()


def test_what_a_mask_leaves_out_is_nan():
    def model(x, lengths):
        seen = torch.arange(3) < lengths.unsqueeze(-1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            normal = dist.Normal(z.unsqueeze(-1), torch.ones(3, dtype=F64)).mask(seen)
            pyro.sample("x", normal.to_event(1), obs=x)

    def guide(x, lengths):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0 * x[:, 0], 1.0))

    lengths = torch.tensor([3, 1])
    found = predict(model, guide, torch.zeros(2, 3, dtype=F64), lengths)
    gone = [[False] * 3, [False, True, True]]
    for name in ("x_mean", "x_mean_se", "x_sd"):
        assert (found[name].isnull() == gone).all()
    assert (found["x"].isnull() == gone).all()


def test_inner_plates_several_sites_and_names():
    def model(x, y):
        with pyro.plate("item", 3, dim=-2), pyro.plate("data", len(y), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, y):
        with pyro.plate("item", 3, dim=-2), pyro.plate("data", len(y), dim=-1):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    def transposed(x):
        return model(x.T, x)

    x = torch.arange(6.0, dtype=F64).reshape(2, 3)
    coords = {"datum": ["a", "b"], "item": ["p", "q", "r"]}
    options = {"num_draws": 500, "coords": coords, "data_plate": "data"}
    found = predict(transposed, lambda x: guide(x.T, x), x, **options)
    assert found["x"].dims == ("draw", "datum", "item")
    is_right(found, "x", x / 2)
    assert found["x_mean"].sel(datum="b", item="p").item() == pytest.approx(1.5, abs=0.3)
    named = predict(
        transposed, lambda x: guide(x.T, x), x, num_draws=5, data_plate="data", dims={"x": ["test"]}
    )
    assert named["x_sd"].dims == ("datum", "test")


def test_more_data_than_a_block_and_one_seed():
    model, x = NormalModel(), torch.linspace(-1, 1, 300)
    one, two, other = (predict(model, model.posterior, x, seed=s, num_draws=50) for s in (3, 3, 4))
    assert one.equals(two) and not one.equals(other) and one["x_mean"].dtype == np.float64
    assert one["x"].dtype == np.float32 and one["x"].shape == (50, 300)
    is_right(one, "x", x.double() / 2)


def test_weights_bring_a_guide_that_is_off_to_the_posterior():
    model = NormalModel()

    def off(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + 0.5, 1.0))

    plain = predict(model, off, X, num_draws=4000)
    assert (np.abs(plain["x_mean"] - X.numpy() / 2) > 0.4).all()
    found = predict(model, off, X, num_draws=4000, keep_draws=2000, resample="psis")
    is_right(found, "x", X / 2, np.full(4, 1.5**0.5), 0.05)
    error = (1.5 / 2000 * 3) ** 0.5
    assert (np.abs(found["x"].mean("draw") - X.numpy() / 2) < SURE * error).all()
    assert found.attrs["resampled"] == "psis"


def test_a_distribution_without_a_mean_and_one_whose_mean_is_not_its_own():
    """Averages of draws then: of a LogNormal by transform, and of a class with other draws."""

    class Doubled(dist.Normal):
        def sample(self, sample_shape=()):
            return super().sample(sample_shape) + 10

        rsample = sample

        def expand(self, batch_shape, _instance=None):
            return Doubled(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    exp = [torch.distributions.transforms.ExpTransform()]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 0.1))
            pyro.sample("x", dist.TransformedDistribution(dist.Normal(z, 0.5), exp), obs=x.exp())
            pyro.sample("y", Doubled(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0 * x, 0.1))

    found = predict(model, guide, X, num_draws=4000)
    is_right(found, "x", np.full(4, np.exp(0.26 / 2)))
    is_right(found, "y", np.full(4, 10.0))
    with pytest.raises(ValueError, match="distribution of the observed site 'x' does not say"):
        pv.reconstruct(model, guide, X, seed=0)


def test_what_has_no_mean_has_none():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Cauchy(z, 1.0), obs=x)

    found = predict(model, of_x, X, num_draws=50)
    assert found["x_mean"].isnull().all() and found["x"].notnull().all()


def test_data_that_are_read_on_demand(tmp_path):
    """By rows for latents of each datum; in memory where they are drawn jointly."""
    x = torch.linspace(-1, 1, 600)
    np.save(tmp_path / "x.npy", x.numpy())
    read = np.load(tmp_path / "x.npy", mmap_mode="r")
    model, joint = NormalModel(), HierarchicalNormal()
    for data in (read, TensorDataset(x), DataLoader(TensorDataset(x), batch_size=64)):
        for one in (model, joint):
            options = {"num_draws": 20, "keep_draws": 2}
            found = predict(one, one.posterior, data, **options)
            assert found.equals(predict(one, one.posterior, x, **options))
            assert found["x_mean"].dims == ("datum",)


def test_a_factor_is_not_predicted():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.factor("f", -z.square())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    assert "f_mean" not in predict(model, of_x, X, num_draws=5)
    with pytest.raises(ValueError, match=r"no \['f'\]"):
        predict(model, of_x, X, sites=["f"])


@pytest.mark.parametrize("num_draws", [1, 2])
def test_few_draws(num_draws):
    found = predict(NormalModel(), NormalModel().posterior, X, num_draws=num_draws)
    assert found["x_mean_se"].isnull().all() == (num_draws == 1)
    assert found["x_sd"].isnull().all() == (num_draws == 1)  # of one there is no spread
    assert found["x"].shape == (num_draws, 4) and found["x_mean"].notnull().all()


# --- refusals


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sites": ["w"]}, r"the model has no \['w'\], only \['z', 'x'\]"),
        ({"sites": []}, "name some of"),
        ({"num_draws": 0}, "num_draws=0"),
        ({"keep_draws": -1}, "keep_draws=-1"),
        ({"resample": "all"}, "resample='all'"),
        ({"dims": {"w": ["a"]}}, "dims names"),
        ({"dims": {"x": ["a"]}}, r"dims\['x'\]=\['a'\]: 0 names"),
        ({"coords": {"datum": [1]}}, r"coords\['datum'\] has 1 labels, for 4"),
        ({"coords": {"item": [1]}}, "coords names"),
    ],
)
def test_bad_input(options, says):
    with pytest.raises(ValueError, match=says):
        predict(NormalModel(), NormalModel().posterior, X, **options)


def test_weights_of_what_is_not_known():
    with pytest.raises(ValueError, match=r"\['y'\] has none; take resample=None"):
        predict(regression, of_slope, X, None, resample="psis")
    assert "pareto_k" not in predict(regression, of_slope, X, None, num_draws=20)
