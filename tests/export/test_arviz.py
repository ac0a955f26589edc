"""ArviZ's container: right values in right places, and ArviZ works on it."""

from __future__ import annotations

import re

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae import arviz_versions as arviz_bridge
from tests.arviz_calls import elpd, loo, plot_trace, psense
from tests.models import HierarchicalNormal, NormalModel, encoder, factor_analysis


@pytest.fixture(scope="module")
def exported():
    model = factor_analysis("correlated")
    torch.manual_seed(0)
    x = model.data(12)
    guide = pv.refine(model, model.posterior, x, seed=0)
    return model, guide, x, pv.to_arviz(model, guide, x, num_draws=400, seed=0)


def test_groups_dimensions_and_labels(exported):
    model, guide, x, tree = exported
    posterior = tree["posterior"]["z"]
    assert posterior.dims == ("chain", "draw", "datum", "z_dim_0")
    assert posterior.shape == (1, 400, 12, 3)
    for group in ("posterior_predictive", "prior_predictive"):
        assert tree[group]["x"].shape == (1, 400, 12, 6)
    assert tree["prior"]["z"].shape == (1, 400, 12, 3)
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "datum")
    assert set(tree["sample_stats"].data_vars) == {"log_p", "log_q", "log_weight"}
    np.testing.assert_array_equal(tree["observed_data"]["x"].values, x.numpy())
    labelled = pv.to_arviz(
        model, guide, x, num_draws=5, coords={"datum": list("abcdefghijkl"), "factor": [1, 2, 3]},
        dims={"z": ["factor"], "x": ["feature"]}, seed=0,
    )  # fmt: skip
    assert labelled["posterior"]["z"].sel(datum="c", factor=2).shape == (1, 5)
    assert labelled["observed_data"]["x"].dims == ("datum", "feature")


def test_values_are_the_spines(exported):
    model, guide, x, tree = exported
    weights = pv.log_weights(model, guide, x, num_particles=400, seed=0)
    stats = tree["sample_stats"]
    np.testing.assert_allclose(stats["log_weight"].values[0], weights.total)
    np.testing.assert_allclose(stats["log_p"].values[0], weights.log_joint)
    np.testing.assert_allclose(stats["log_q"].values[0], weights.log_guide)
    np.testing.assert_allclose(tree["log_likelihood"]["x"].values[0], weights.log_likelihood)
    z = torch.as_tensor(tree["posterior"]["z"].values[0])
    location = z @ model.loadings.T + model.mean
    by_hand = torch.distributions.Normal(location, model.noise).log_prob(x).sum(-1)
    np.testing.assert_allclose(tree["log_likelihood"]["x"].values[0], by_hand)


def test_predictive_draws_are_draws_of_the_model(exported):
    """Means and variances within 5 standard errors of 400 draws of 12 data."""
    model, _, _, tree = exported
    x = tree["prior_predictive"]["x"].values[0].reshape(-1, 6)
    variance = (model.loadings @ model.loadings.T).diagonal().numpy() + model.noise**2
    n = len(x)
    assert (abs(x.mean(0) - model.mean.numpy()) < 5 * np.sqrt(variance / n)).all()
    assert (abs(x.var(0) / variance - 1) < 5 * np.sqrt(2 / n)).all()
    z = tree["posterior"]["z"].values[0]
    residual = tree["posterior_predictive"]["x"].values[0] - (
        z @ model.loadings.T.numpy() + model.mean.numpy()
    )
    assert abs(residual.std() / model.noise - 1) < 5 / np.sqrt(2 * residual.size)


def test_arviz_works_on_the_written_file(exported, tmp_path):
    tree = exported[3]
    arviz_bridge.write(tree, tmp_path / "posterior.nc")
    read = az.from_netcdf(tmp_path / "posterior.nc")
    summary = az.summary(read, var_names=["z"], kind="stats")
    assert len(summary) == 36
    np.testing.assert_allclose(
        summary["mean"].astype(float),
        tree["posterior"]["z"].mean(("chain", "draw")).values.ravel(),
        atol=6e-4 * 10,
    )
    found = loo(read, var_name="x")
    assert np.isfinite(elpd(found)) and found.n_data_points == 12


@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")  # of ArviZ itself
def test_arviz_plots_the_traces(exported):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    try:
        plot_trace(exported[3].sel(datum=[0]), ["z"])
        lines = [line for axes in pyplot.gcf().axes for line in axes.get_lines()]
        assert sum(len(line.get_xdata()) == 400 for line in lines) == 3
    finally:
        pyplot.close("all")


def test_psis_resampling_moves_draws_towards_the_posterior():
    """A guide off by half a deviation: resampled means come back, within 5 errors of ESS."""
    model = factor_analysis("orthogonal")
    x = model.data(10)
    deviation = torch.linalg.inv(model.posterior_precision).diagonal().sqrt()
    mean = model.posterior_mean(x)

    def guide(x):
        with pyro.plate("data", len(x)):
            location = model.posterior_mean(x) + 0.5 * deviation
            pyro.sample("z", dist.Normal(location, 1.2 * deviation).to_event(1))

    tree = pv.to_arviz(model, guide, x, num_draws=4000, resample="psis", seed=0)
    shift = (tree["posterior"]["z"].values[0].mean(0) - mean.numpy()) / deviation.numpy()
    plain = pv.to_arviz(model, guide, x, num_draws=4000, seed=0, predictive=False)
    ess = pv.iwae_bound(model, guide, x, num_particles=4000, seed=0)
    assert ess.std_error.max() < 0.1
    assert abs(shift).max() < 5 / np.sqrt(1000)  # the smallest ESS is above 1,000
    raw = (plain["posterior"]["z"].values[0].mean(0) - mean.numpy()) / deviation.numpy()
    assert raw.min() > 0.4
    assert "log_weight" not in tree["sample_stats"] and tree.attrs["resampled"] == "psis"
    # What belongs to a draw moved with it.
    z = torch.as_tensor(tree["posterior"]["z"].values[0])
    by_hand = torch.distributions.Normal(z @ model.loadings.T + model.mean, model.noise)
    np.testing.assert_allclose(
        tree["log_likelihood"]["x"].values[0], by_hand.log_prob(x).sum(-1), rtol=1e-9
    )
    assert "posterior_predictive" not in plain


def test_the_note_stands_where_r_hat_would_be_believed(exported):
    """A guide that is far off has R-hat 1, or of one chain none, and all its draws effective."""
    model, x = NormalModel(), torch.zeros(2)

    def wrong(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x + 5, 0.1))

    tree = pv.to_arviz(model, wrong, x, num_draws=1000, seed=0)
    summary = az.summary(tree, var_names=["z"], round_to="none")
    assert abs(summary["r_hat"].astype(float).fillna(1.0) - 1).max() < 0.02
    assert summary["ess_bulk"].astype(float).min() > 700
    for attrs in (tree.attrs, tree["posterior"].attrs):
        assert "neither says how well it fits; constant_data has k-hat" in attrs["note"]
        assert attrs["log_likelihood"].startswith("log p(x | all latents)")
    assert (tree["constant_data"]["pareto_k"] > 0.7).all()


def test_power_scaling_is_that_of_the_posterior():
    """z ~ N(0, 1), x ~ N(z, 1): a prior to the power a gives z | x ~ N(x / (a + 1), 1 / (a + 1)).

    Of one datum, since data are independent: both pull alike, at x = 0 on the variance alone, at
    x = 4 on the mean as well. ArviZ calls 0.05 sensitive.
    """
    model, x = NormalModel(), torch.tensor([0.0, 4.0], dtype=torch.float64)
    tree = pv.to_arviz(model, model.posterior, x, num_draws=4000, predictive=False, seed=0)
    found = np.array(
        [
            [float(psense(tree.sel(datum=[n]), of)["z"].max()) for n in range(2)]
            for of in ("prior", "likelihood")
        ]
    )
    assert (found[:, 0] > 0.02).all() and (found[:, 1] > 0.15).all()
    np.testing.assert_allclose(found[0], found[1], rtol=0.25)


def test_power_scaling_of_a_model_with_globals():
    """A prior 40 times as wide as the posterior has no pull on it; the data have."""
    model = HierarchicalNormal(prior=30.0, spread=1.0, noise=1.0)
    x = torch.randn(10, dtype=torch.float64) + 5
    options = {"log_likelihood": "marginal", "num_particles": 2, "num_draws": 500, "seed": 0}
    tree = pv.to_arviz(model, model.posterior, x, predictive=False, **options)
    prior, likelihood = psense(tree, "prior", ["mu"]), psense(tree, "likelihood")
    assert float(prior["mu"]) < 0.01 and float(likelihood["mu"]) > 0.05


def test_more_data_than_a_block_stay_in_order():
    model = factor_analysis("orthogonal")
    x = model.data(300)
    tree = pv.to_arviz(model, model.posterior, x, num_draws=200, seed=0)
    mean = tree["posterior"]["z"].values[0].mean(0)
    deviation = torch.linalg.inv(model.posterior_precision).diagonal().sqrt().numpy()
    error = abs(mean - model.posterior_mean(x).numpy()) / deviation
    assert error.max() < 5.5 / np.sqrt(200)  # the largest of 900
    assert tree["posterior_predictive"]["x"].shape == (1, 200, 300, 6)


def test_inner_plates_and_a_hand_written_pair_in_the_store():
    decoder = nn.Linear(1, 3)

    def model(x):
        pyro.module("decoder", decoder)
        data = pyro.plate("data", len(x), dim=-2)
        with data:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("feature", 3, dim=-1):
                w = pyro.sample("w", dist.Normal(decoder(z), 1.0))
                pyro.sample("x", dist.Poisson(w.exp()), obs=x)

    def guide(x):
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True) * 0, scale))
            with pyro.plate("feature", 3, dim=-1):
                pyro.sample("w", dist.Normal((x + 1).log(), scale))

    x = torch.tensor([[0.0, 1, 2], [3, 0, 1]])
    tree = pv.to_arviz(model, guide, x, num_draws=7, seed=0)
    assert tree["posterior"]["w"].dims == ("chain", "draw", "datum", "feature")
    assert tree["posterior_predictive"]["x"].dims == ("chain", "draw", "datum", "feature")
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "datum")
    w = torch.as_tensor(tree["posterior"]["w"].values[0])
    np.testing.assert_allclose(
        tree["log_likelihood"]["x"].values[0],
        torch.distributions.Poisson(w.exp()).log_prob(x).sum(-1),
        rtol=1e-5,
    )


def test_one_datum_models_keep_pointwise_log_likelihoods():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        with pyro.plate("schools", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide(x):
        pyro.sample("mu", dist.Normal(x.sum() / (len(x) + 1), (len(x) + 1) ** -0.5))

    x = torch.randn(8, dtype=torch.float64)
    tree = pv.to_arviz(model, guide, x, data_plate=False, num_draws=300, seed=0)
    assert tree["posterior"]["mu"].dims == ("chain", "draw")
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "schools")
    assert tree["sample_stats"]["log_weight"].dims == ("chain", "draw")
    assert az.loo(tree, var_name="x").n_data_points == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draws": 0}, "num_draws=0"),
        ({"resample": "sir"}, "resample='sir': None or 'psis'"),
        ({"dims": {"y": ["a"]}}, r"dims names \['y'\], which are not sites"),
        ({"dims": {"z": ["a", "b"]}}, r"dims\['z'\]=\['a', 'b'\]: 1 names are needed"),
        ({"coords": {"datum": [1, 2]}}, "datum"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    model = factor_analysis()
    with pytest.raises(ValueError, match=message):
        pv.to_arviz(model, model.posterior, model.data(3), **{"num_draws": 4, **options})


def test_a_guide_of_a_network_that_takes_no_particles():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.ConvTranspose2d(1, 1, 3))

        def forward(self, x):
            pyro.module("conv", self)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(3), obs=x)

    model, x = Model(), torch.zeros(5, 1, 4, 4)
    guide = pv.AmortizedGuide(model, nn.Flatten(), example=x)
    tree = pv.to_arviz(model, guide, x, num_draws=6, seed=0)
    assert tree["posterior_predictive"]["x"].shape == (1, 6, 5, 1, 4, 4)
    z = torch.as_tensor(tree["posterior"]["z"].values[0])
    with torch.no_grad():
        logits = torch.stack([model.net(draw) for draw in z])
    expected = torch.distributions.Bernoulli(logits=logits).log_prob(x).sum((-3, -2, -1))
    np.testing.assert_allclose(tree["log_likelihood"]["x"].values[0], expected, rtol=1e-5)


def test_an_encoder_in_the_loop():
    model = factor_analysis()
    x = model.data(5)
    guide = pv.AmortizedGuide(model, encoder(6), example=x)
    a, b = (pv.to_arviz(model, guide, x, num_draws=3, seed=4)["posterior"]["z"] for _ in range(2))
    np.testing.assert_array_equal(a.values, b.values)


def test_deterministic_sites_do_not_stand_in_the_way():
    """Predictive draws follow the deterministic value: the residual has the noise's deviation."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            twice = pyro.deterministic("twice", 2 * z)
            pyro.sample("x", dist.Normal(twice, 1.0), obs=x)

    x = torch.randn(10, dtype=torch.float64)
    guide = pv.LocalGuide(model, num_data=10, example=x)
    tree = pv.to_arviz(model, guide, x, num_draws=500, seed=0)
    residual = tree["posterior_predictive"]["x"] - 2 * tree["posterior"]["z"]
    assert residual.shape == (1, 500, 10)
    assert abs(float(residual.std()) - 1) < 5 / (2 * 5000) ** 0.5


def test_non_centred_eight_schools_as_one_datum():
    """Partial pooling with a deterministic effect, through Pyro's own autoguides."""
    sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            theta = pyro.deterministic("theta", mu + tau * eta)
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
    for auto in (
        pyro.infer.autoguide.AutoNormal,
        pyro.infer.autoguide.AutoMultivariateNormal,
        pyro.infer.autoguide.AutoDelta,
    ):
        guide = auto(model)
        guide(y)
        tree = pv.to_arviz(model, guide, y, data_plate=False, num_draws=50, seed=0)
        assert tree["posterior"]["eta"].dims == ("chain", "draw", "schools")
        assert tree["posterior_predictive"]["y"].shape == (1, 50, 8)


# --- deterministic sites -------------------------------------------------------------------------


def test_deterministic_sites_have_the_plates_of_one_datum(exported):
    sigma = torch.tensor([15.0, 10, 16])

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("schools", 3):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            theta = pyro.deterministic("theta", mu + 5 * eta)
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    y = torch.tensor([28.0, 8, -3])
    guide = pyro.infer.autoguide.AutoNormal(model)
    guide(y)
    posterior = pv.to_arviz(model, guide, y, data_plate=False, num_draws=40, seed=0)["posterior"]
    assert posterior["theta"].dims == ("chain", "draw", "schools")
    wanted = posterior["mu"].values[..., None] + 5 * posterior["eta"].values
    np.testing.assert_allclose(posterior["theta"], wanted, rtol=1e-4, atol=1e-4)


# --- likelihoods that are not like others --------------------------------------------------------


def hidden_markov(x):
    """Of any length: the likelihood has no duration of its own."""
    one = torch.eye(1)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        start = dist.Normal(torch.zeros(1), 1.0).to_event(1)
        seen = dist.Normal(z[..., None, None], 1.0).to_event(1)
        pyro.sample("x", dist.GaussianHMM(start, one, start, one, seen), obs=x)


def by_hand(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))


def test_a_hidden_markov_model_is_drawn_as_long_as_its_data():
    """Of the prior, x_t is z + a random walk from a start + noise: its variance is 3 + t."""
    x = torch.randn(40, 3, 1)
    tree = pv.to_arviz(hidden_markov, by_hand, x, num_draws=500, seed=0)
    drawn = tree["prior_predictive"]["x"].values[0, ..., 0]
    assert drawn.shape == (500, 40, 3)
    assert tree["posterior_predictive"]["x"].shape == (1, 500, 40, 3, 1)
    variance = drawn.reshape(-1, 3).var(0)
    assert (abs(variance / np.array([4.0, 5.0, 6.0]) - 1) < 5 * np.sqrt(2 / 20_000)).all()


def test_without_predictive_draws_nothing_observed_is_drawn():
    class NoDraws(dist.Normal):
        def sample(self, sample_shape=()):
            raise NotImplementedError("no sampler")

        rsample = sample

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", NoDraws(z, 1.0), obs=x)

    x = torch.randn(4)
    tree = pv.to_arviz(model, by_hand, x, num_draws=5, predictive=False, seed=0)
    assert tree["prior"]["z"].shape == (1, 5, 4)
    with pytest.raises(ValueError, match=r"'x': its NoDraws likelihood cannot.*no sampler.*False"):
        pv.to_arviz(model, by_hand, x, num_draws=5, seed=0)


def test_observed_values_are_broadcast_to_their_likelihood():
    def model(x):
        with pyro.plate("inner", 1, dim=-2), pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(5)
    guide = pv.LocalGuide(model, num_data=5, example=x, data_plate="data")
    tree = pv.to_arviz(model, guide, x, num_draws=4, data_plate="data", seed=0)
    assert tree["observed_data"]["x"].dims == ("datum", "inner")
    np.testing.assert_array_equal(tree["observed_data"]["x"].values[:, 0], x)


@pytest.mark.parametrize("data_plate", [None, False])
def test_resampled_draws_say_for_how_many_data_they_are_not_to_be_trusted(data_plate, caplog):
    model = NormalModel()

    def narrow(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, torch.where(x > 0, 0.7, 0.01)))

    x = torch.tensor([1.0, -1.0, 2.0, -2.0])
    options = {"num_draws": 1000, "data_plate": data_plate, "seed": 1}
    tree = pv.to_arviz(model, narrow, x, resample="psis", **options)
    counted = "for 1 of 1 data" if data_plate is False else "for 2 of 4 data"
    attrs = {**tree.attrs, **tree["posterior"].attrs}  # ArviZ 1.x and 0.x
    assert attrs["doubt"].startswith(f"{counted} the importance weights are not to be trusted")
    assert counted in caplog.text
    weights = pv.log_weights(model, narrow, x, num_particles=1000, data_plate=data_plate, seed=1)
    found = tree["constant_data"]
    np.testing.assert_allclose(found["pareto_k"], pv.pareto_k(weights), atol=1e-6)
    assert found["ess"].dims == ("datum",)
    caplog.clear()
    pv.to_arviz(model, narrow, x[x > 0], resample="psis", num_draws=1000, seed=0)
    assert not caplog.text


@pytest.mark.parametrize(("scale", "shift", "doubted"), [(1, 0, 0), (0.25, 0, 30), (1, 2.5, 36)])
def test_resampled_draws_are_doubted_by_the_rule_of_all_weights(scale, shift, doubted, caplog):
    """In sds: the best guide of a skewed posterior, one a quarter as wide, and one beside it.

    Weights of the first are exp(0.02 (z^3 - 3 z) / 6): of k-hat above 0.7, and nearly equal.
    """

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.factor("f", 0.02 * (z**3 - 3 * z) / 6)
            pyro.sample("x", dist.Normal(z * 0, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_tensor(float(shift)), scale))

    x = torch.zeros(40, dtype=torch.float64)
    options = {"num_draws": 4000, "predictive": False, "seed": 0}
    tree = pv.to_arviz(model, guide, x, resample="psis", **options)
    if doubted:
        counted = int(re.search(r"for (\d+) of 40 data the importance weights", caplog.text)[1])
        assert counted >= doubted
    else:
        assert (tree["constant_data"]["pareto_k"] > 0.7).all() and not caplog.text


def test_data_that_require_gradients():
    x = torch.linspace(-1, 1, 4).requires_grad_()

    model = NormalModel()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    tree = pv.to_arviz(model, guide, x, num_draws=3, seed=0)
    np.testing.assert_array_equal(tree["observed_data"]["x"].values, x.detach().numpy())
