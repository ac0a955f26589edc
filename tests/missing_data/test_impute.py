"""Missing values given the seen ones: against exact conditionals; and the figure of images."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from tests.missing_data.models import NAN, PartlySeen, data, mixture, of, proposal, scattered
from tests.models import factor_analysis

DRAWS, PARTICLES = 4000, 8000


def conditional(row: Tensor) -> tuple[Tensor, Tensor]:
    """Exact mean and covariance of a datum's missing values given its seen ones."""
    model, seen = factor_analysis(), ~row.isnan()
    joint = model.loadings @ model.loadings.T + model.noise**2 * torch.eye(6, dtype=row.dtype)
    gain = torch.linalg.solve(joint[seen][:, seen], joint[seen][:, ~seen]).T
    mean = model.mean[~seen] + gain @ (row[seen] - model.mean[seen])
    return mean, joint[~seen][:, ~seen] - gain @ joint[seen][:, ~seen]


@pytest.fixture(scope="module", params=[1.0, 1.4], ids=["exact guide", "wider guide"])
def imputed(request):
    exact = PartlySeen(factor_analysis(), widen=request.param)
    x = scattered(data(8))
    model = pv.MissingData(exact.model)
    return x, request.param, pv.impute(
        model, exact.posterior, x, num_draws=DRAWS, num_particles=PARTICLES, seed=1
    )  # fmt: skip


def test_means_are_those_of_the_exact_conditional(imputed):
    x, _, result = imputed
    scores = []
    for n, row in enumerate(x):
        missing = row.isnan().numpy()
        mean, covariance = conditional(row)
        found = result.dataset.isel(datum=n)
        error = found["x_mean"].values[missing] - mean.numpy()
        scores.append(error / found["x_mean_se"].values[missing])
        sd = covariance.diagonal().sqrt().numpy()
        # The relative error of an sd of n normal draws is 1 / sqrt(2 n).
        relative = found["x_sd"].values[missing] / sd - 1
        assert (np.abs(relative) < 4 / np.sqrt(2 * found["ess"].values)).all()
    scores = np.concatenate(scores)
    assert np.abs(scores).max() < 4
    assert 0.5 < np.sqrt((scores**2).mean()) < 1.5  # the errors are as large as they claim


def test_draws_have_the_mean_and_covariance_of_the_exact_conditional(imputed):
    x, _, result = imputed
    for n, row in enumerate(x):
        missing = row.isnan().numpy()
        if not missing.any():
            continue
        mean, covariance = (value.numpy() for value in conditional(row))
        found = result.dataset.isel(datum=n)
        draws = found["x"].values[:, missing]
        effective = 1 / (1 / DRAWS + 1 / float(found["ess"]))
        sd = np.sqrt(covariance.diagonal())
        assert (np.abs(draws.mean(0) - mean) < 4 * sd / math.sqrt(effective)).all()
        # Wishart: Var(S_ij) = (C_ij^2 + C_ii C_jj) / n.
        spread = np.sqrt((covariance**2 + np.outer(sd**2, sd**2)) / effective)
        assert (np.abs(np.cov(draws.T).reshape(covariance.shape) - covariance) < 4 * spread).all()


def test_seen_values_come_back_untouched(imputed):
    x, _, result = imputed
    seen = ~x.isnan().numpy()
    ds = result.dataset
    np.testing.assert_array_equal(ds["x_observed"].values, seen)
    for name in ("x", "x_mean"):
        found = ds[name].values
        np.testing.assert_array_equal(
            found[..., seen], np.broadcast_to(x.numpy()[seen], found[..., seen].shape)
        )
    for name in ("x_sd", "x_mean_se"):
        assert not ds[name].values[seen].any()
        assert (ds[name].values[~seen] > 0).all()
    assert ds["x"].dims == ("draw", "datum", "x_dim_0")
    assert np.isfinite(ds["x"].values).all()


def test_k_hat_and_ess_are_those_of_the_weights(imputed):
    x, widen, result = imputed
    exact = PartlySeen(factor_analysis(), widen=widen)
    weights = pv.log_weights(
        pv.MissingData(exact.model), exact.posterior, x, num_particles=PARTICLES, seed=1
    )
    np.testing.assert_allclose(result.dataset["pareto_k"], pv.pareto_k(weights))
    if widen == 1.0:
        np.testing.assert_allclose(result.dataset["ess"], PARTICLES)
    assert (result.dataset["ess"].values[1:] > PARTICLES / 10).all()


def test_the_summary_says_how_much_was_missing(imputed):
    x, _, result = imputed
    text = repr(result)
    assert f"x: {int(x.isnan().sum())} of 48 values missing, in 7 of 8 data" in text
    assert f"{DRAWS} draws; weights of {PARTICLES} particles" in text


def test_one_seed_one_result_and_blocks_of_data():
    exact = PartlySeen(factor_analysis(), widen=1.2)
    x = scattered(data(300))  # more than the 256 data of a block
    model = pv.MissingData(exact.model)
    options = {"num_draws": 20, "num_particles": 100}
    first = pv.impute(model, exact.posterior, x, seed=3, **options).dataset
    again = pv.impute(model, exact.posterior, x, seed=3, **options).dataset
    assert first.identical(again)
    assert not first.equals(pv.impute(model, exact.posterior, x, seed=4, **options).dataset)
    assert dict(first.sizes) == {"draw": 20, "datum": 300, "x_dim_0": 6}
    wanted = torch.cat([conditional(row)[0] for row in x]).numpy()
    missing = x.isnan().numpy()
    score = (first["x_mean"].values[missing] - wanted) / first["x_mean_se"].values[missing]
    assert np.abs(score[np.isfinite(score)]).mean() < 1.2


def test_discrete_latents_are_drawn_from_their_posterior():
    x = torch.tensor([[-1.0, 0.5, NAN], [NAN, NAN, NAN]], dtype=torch.float64)
    result = pv.impute(
        pv.MissingData(mixture), lambda x: None, x, num_draws=10, num_particles=4000, seed=0
    ).dataset
    means = torch.tensor([[-1.0, 0.5], [1.0, -0.5]], dtype=torch.float64)
    joint = torch.distributions.Normal(means, 1.0).log_prob(x[0, :2]).sum(-1)
    posterior = (joint + torch.tensor([0.3, 0.7], dtype=torch.float64).log()).softmax(0)
    wanted = np.array([2.0 * posterior[0], 0.3 * 2.0])
    error = result["x_mean"].values[:, 2] - wanted
    assert (np.abs(error) < 4 * result["x_mean_se"].values[:, 2]).all()
    assert (result["x_mean_se"].values[:, 2] < 0.03).all()


def test_counts_under_a_mask_argument():
    model = pv.MissingData(
        of(
            lambda z, x: dist.Poisson(
                (0 * z + 1.0).unsqueeze(-1).exp().expand(*z.shape, 2)
            ).to_event(1)
        ),
        mask="seen",
    )
    x = torch.tensor([[3, 7], [0, 2]])
    seen = torch.tensor([[True, False], [True, True]])
    found = pv.impute(
        model,
        lambda x, seen: proposal(x.float()),
        x,
        seen,
        num_draws=50,
        num_particles=2000,
        seed=0,
    ).dataset
    draws = found["x"].values
    assert (draws[:, 0, 0] == 3).all()
    assert (draws[:, 1] == [0, 2]).all()
    assert (draws[:, 0, 1] == draws[:, 0, 1].round()).all()
    error = float(found["x_mean"][0, 1]) - math.e
    assert abs(error) < 4 * float(found["x_mean_se"][0, 1]) < 0.3


def test_inner_plates_and_several_sites():
    def model(x, y):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z, 0.1), obs=y.unsqueeze(-1))
            with pyro.plate("items", 3, dim=-1):
                pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.nanmean(-1, keepdim=True), 0.1))

    x, y = torch.tensor([[1.0, NAN, 1.0], [2.0, 2.0, NAN]]), torch.tensor([1.0, 2.0])
    found = pv.impute(pv.MissingData(model), guide, x, y, num_draws=5, seed=0)
    assert found.sites == ("x",)
    assert found.dataset["x"].dims == ("draw", "datum", "items")
    assert abs(found.dataset["x_mean"].values - [[1.0] * 3, [2.0] * 3]).max() < 0.2
    y = torch.tensor([NAN, 2.0])
    found = pv.impute(pv.MissingData(model), guide, x, y, num_draws=5, seed=0)
    assert found.sites == ("y", "x")
    assert found.dataset["y"].shape == (5, 2, 1)
    with pytest.raises(ValueError, match=r"the sites \['y', 'x'\] were imputed; name one"):
        found.plot()


def test_the_whole_batch_as_one_datum():
    def model(x):
        level = pyro.sample("level", dist.Normal(torch.zeros((), dtype=x.dtype), 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(level, 1.0), obs=x)

    x = torch.tensor([1.0, NAN, 3.0], dtype=torch.float64)
    variance = 1 / (2 + 1 / 100)

    def guide(x):
        loc = torch.as_tensor(4.0 * variance, dtype=x.dtype)
        pyro.sample("level", dist.Normal(loc, variance**0.5))

    found = pv.impute(
        pv.MissingData(model), guide, x, num_draws=50, num_particles=4000, data_plate=False, seed=0
    )
    ds = found.dataset
    assert ds["x"].dims == ("draw", "data")
    assert ds["pareto_k"].shape == ()
    assert (ds["x"].values[:, [0, 2]] == [1.0, 3.0]).all()
    assert abs(ds["x_mean"].values[1] - 4.0 * variance) < 4 * ds["x_mean_se"].values[1] < 0.1
    assert "in 1 of 1 data" in repr(found)
    with pytest.raises(ValueError, match="one datum: there are no rows"):
        found.plot()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (factor_analysis(), {}, r"no observed value is missing.*MissingData; .* \['x'\]"),
        (pv.MissingData(factor_analysis()), {}, "no observed value is missing"),
        (pv.MissingData(factor_analysis()), {"num_draws": 0}, "num_draws=0: .* at least 1"),
        (pv.MissingData(factor_analysis()), {"num_draws": 1.5}, "num_draws=1.5: .* whole number"),
    ],
)
def test_refusals(model, options, message):
    with pytest.raises(ValueError, match=message):
        pv.impute(model, factor_analysis().posterior, data(4), **options)


# --- the figure


def test_an_imputation_draws_itself():
    exact = PartlySeen(factor_analysis())
    x = scattered(data(4))
    result = pv.impute(pv.MissingData(exact.model), exact.posterior, x, num_draws=5, seed=0)
    ax = result.plot(shape=(2, 3), truth=data(4), num_draws=2, unit="volts")
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["seen", "mean", "draw 1", "draw 2", "truth"]
    assert ax.figure.axes[1].get_ylabel() == "volts"
    plt.close(ax.figure)
    with pytest.raises(ValueError, match=r"a datum has shape \[6\], which is no square"):
        result.plot()
    with pytest.raises(ValueError, match=r"site='y': the imputed sites are \['x'\]"):
        result.plot(site="y")


# --- values that are not there are not missing ---------------------------------------------------


def test_a_value_for_which_another_site_stands_is_not_imputed_from_its_prior():
    """With obs_mask the posterior of what was not seen is that of the site y_unobserved."""
    x, y = torch.tensor([3.0, 3.0, -3.0]), torch.tensor([1.0, math.nan, math.nan])

    def model(y, seen, x):
        with pyro.plate("data", len(y)):
            y = pyro.sample("y", dist.Normal(0.0, 1.0), obs=y, obs_mask=seen)
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    def guide(y, seen, x):
        with pyro.plate("data", len(y)):
            pyro.sample("y_unobserved", dist.Normal(x / 2, 0.5**0.5))

    batch = (y, ~y.isnan(), x)
    with pytest.raises(ValueError, match="no observed value is missing"):
        pv.impute(pv.MissingData(model), guide, *batch)
    tree = pv.to_arviz(pv.MissingData(model), guide, *batch, num_draws=2000, seed=0)
    found = tree["posterior"]["y_unobserved"].mean(("chain", "draw")).values
    assert np.isnan(found[0])
    np.testing.assert_allclose(found[1:], [1.5, -1.5], atol=0.08)


def test_padding_that_is_nan_is_no_missing_value():
    model = pv.zoo.DeepMarkovModel(2, 1, hidden=[3])
    sequences, lengths = model.simulate(4, num_steps=3)
    past = lengths < 3
    sequences[past, 2] = math.nan
    sequences[0, 0, 0] = math.nan
    whole = pv.MissingData(model)

    class Filled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = model.make_encoder(3)

        def forward(self, sequences, lengths):
            return self.encoder(sequences.nan_to_num(), lengths)

    guide = pv.AmortizedGuide(whole, Filled(), example=(sequences, lengths))
    imputed = pv.impute(whole, guide, sequences, lengths, num_particles=50, seed=0)
    assert imputed.sites == ("x_1",)
    assert (~imputed.dataset["x_1_observed"].values).sum() == 1


def test_a_single_particle_has_no_standard_error():
    model = pv.zoo.ProbabilisticPCA(3, 1)
    x = model.simulate(4)
    x[:, 0] = math.nan
    encoder = pv.MissingEncoder(torch.nn.Linear(6, 4))
    guide = pv.AmortizedGuide(pv.MissingData(model), encoder, example=x)
    imputed = pv.impute(pv.MissingData(model), guide, x, num_particles=1, seed=0)
    assert np.isnan(imputed.dataset["x_mean_se"].values[:, 0]).all()


# --- how far the weights are to be trusted


def test_an_imputation_says_for_how_many_data_it_is_not_to_be_trusted():
    """Two of three data through a proposal of a tenth of the posterior's width: k near 0.99."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0)).unsqueeze(-1)
            likelihood = dist.Normal(z.expand(*z.shape[:-1], 2), 1.0)
            pyro.sample("x", likelihood.to_event(1), obs=x)

    def guide(x):
        width = torch.where(x[:, 0] > 0, 1.0, 0.1).to(x) * 0.5**0.5
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0] / 2, width))

    x = torch.tensor([[1.0, NAN], [-1.0, NAN], [-2.0, NAN]], dtype=torch.float64)
    found = pv.impute(pv.MissingData(model), guide, x, num_particles=2000, seed=0)
    assert found.doubt.startswith("for 2 of 3 data the importance weights are not to be trusted")
    assert found.doubt in repr(found)
    good = pv.impute(pv.MissingData(model), guide, x[:1], num_particles=2000, seed=0)
    assert good.doubt == "" and "trusted" not in repr(good)
    few = pv.impute(pv.MissingData(model), guide, x[1:], num_particles=20, seed=0)
    assert "20 particles are too few for a k-hat" in few.doubt and "heavy" not in few.doubt


def test_weights_of_the_best_guide_are_trusted_whatever_their_k_hat():
    """Weights exp(0.02 (z^3 - 3 z) / 6) of a normal z: k-hat far above 0.7, ESS nearly K."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.factor("f", 0.02 * (z**3 - 3 * z) / 6)
            pyro.sample("x", dist.Normal(z * 0, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))

    x = torch.full((5,), NAN, dtype=torch.float64)
    found = pv.impute(pv.MissingData(model), guide, x, num_particles=5000, seed=0)
    assert (found.dataset["pareto_k"] > 0.7).all() and (found.dataset["ess"] > 4990).all()
    assert found.doubt == ""
