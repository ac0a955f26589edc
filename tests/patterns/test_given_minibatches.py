"""Who takes the minibatch: the model, the guide, an argument; and arguments of other lengths."""

from __future__ import annotations

import functools
import logging
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae as pv

X = torch.arange(6.0, dtype=torch.float64)
HALF = 0.5**0.5


@pytest.fixture(autouse=True)
def _own_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def log_evidence(x):
    return dist.Normal(x.new_zeros(()), 2**0.5).log_prob(x)


def model_of(**options):
    """z ~ Normal(0, 1), x ~ Normal(z, 1), rows by the plate's index."""

    def model(x):
        with pyro.plate("data", 6, **options) as index:
            prior = dist.Normal(x.new_zeros(()), 1.0).expand([len(index)])
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    return model


def posterior_of(**options):
    def guide(x):
        with pyro.plate("data", 6, **options) as index:
            pyro.sample("z", dist.Normal(x[index] / 2, HALF))

    return guide


LOSSES = {
    "ELBO": lambda: pv.ELBO(kl="sample"),
    "ELBO of 3": lambda: pv.ELBO(3, kl="sample"),
    "score": lambda: pv.ELBO(2, kl="sample", estimator="score"),
    "IWAE": lambda: pv.IWAE(3),
    "dreg": lambda: pv.IWAE(3, "dreg"),
    "WakeSleep": lambda: pv.WakeSleep(3),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("who", ["model", "guide"])
def test_drawn_minibatches_have_the_evidence_on_average(name, who):
    """With the exact posterior each is 3 log p(x) of its rows: a mean over all pairs of rows."""
    draws = {"subsample_size": 2}
    model = model_of(**(draws if who == "model" else {}))
    guide = posterior_of(**draws)
    exact = log_evidence(X)
    pairs = [3 * float(exact[i] + exact[j]) for i in range(6) for j in range(i)]
    loss = LOSSES[name]()
    torch.manual_seed(0)
    found = torch.tensor([-loss.loss(model, guide, X) for _ in range(60)], dtype=torch.float64)
    assert len({round(value, 6) for value in found.tolist()}) > 5
    if name in ("ELBO of 3", "score"):  # a mean over minibatches
        error = found.std() / 60**0.5
        assert abs(found.mean() - exact.sum()) < 5 * error
    else:
        assert all(min(abs(value - pair) for pair in pairs) < 1e-9 for value in found.tolist())


def test_a_second_run_of_the_guide_sees_the_same_minibatch():
    """Sticking the landing runs a guide of dependent proposals twice; replayed as eager."""

    def model(x):
        with pyro.plate("data", 6, subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0))
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(w, 1.0), obs=x[index])

    def guide(x):
        slope = pyro.param("slope", lambda: x.new_tensor(0.2))
        with pyro.plate("data", 6, subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(slope * x[index], 1.0))
            pyro.sample("w", dist.Normal(slope * (x[index] + z), 1.0))

    histories = []
    for make in (pyro.infer.SVI, functools.partial(pv.CompiledSVI, compile="replay")):
        pyro.clear_param_store()
        torch.manual_seed(0)
        svi = make(model, guide, pyro.optim.SGD({"lr": 1e-3}), loss=pv.ELBO(estimator="stl"))
        losses = [svi.step(X) for _ in range(40)]
        histories.append([*losses, pyro.param("slope").item()])
        mode = getattr(svi, "mode", "eager")
    assert mode == "replayed"
    assert histories[1] == pytest.approx(histories[0], rel=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_a_plate_of_fixed_size_whose_index_takes_the_data(name):
    """It has no fewer rows to be looked at."""
    loss = LOSSES[name]().loss(model_of(), posterior_of(), X)
    assert loss == pytest.approx(-float(log_evidence(X).sum()), rel=1e-9)


@pytest.mark.slow
def test_functions_of_a_plate_of_fixed_size():
    model, guide = model_of(), posterior_of()
    exact = log_evidence(X)
    assert torch.allclose(pv.elbo(model, guide, X, num_particles=3).value, exact)
    refined = pv.refine(model, guide, X)
    assert torch.allclose(pv.elbo(model, refined, X, num_particles=3).value, exact, atol=1e-3)
    comparison = pv.compare(model, {"exact": guide}, X, num_particles=20)
    assert comparison.dataset.elbo.values[0] == pytest.approx(exact.numpy())
    encoder = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 4)).double()
    amortized = pv.AmortizedGuide(model, encoder, example=X)
    for trained in (amortized, pv.LocalGuide(model, num_data=6, example=X)):
        result = pv.fit(model, trained, X, batch_size=2, epochs=3, progress=False)
        assert result.steps == 3  # of all the rows


def test_a_guide_that_draws_has_no_bound_for_each_datum():
    with pytest.raises(ValueError, match="the guide draws its own minibatch in plate 'data'"):
        pv.elbo(model_of(), posterior_of(subsample_size=2), X, num_particles=2)

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6, subsample_size=2) as index:
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x[index])

    def guide(x):
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="the model draws its own minibatch in plate 'data'"):
        pv.elbo(model, guide, X.float(), num_particles=2, data_plate=False)


@pytest.mark.parametrize("batch_size", [2, 128])
def test_fit_takes_all_the_data_where_the_guide_draws(batch_size, caplog):
    with caplog.at_level(logging.WARNING):
        result = pv.fit(
            *(model_of(), guide_with_slope, X),
            batch_size=batch_size,
            epochs=80,
            validation_data=X,
            optim=lambda parameters: torch.optim.Adam(parameters, lr=0.05),
            progress=False,
        )
    assert result.steps == 80
    assert pyro.param("slope").item() == pytest.approx(0.5, abs=0.15)
    assert not [record for record in caplog.records if "in their order" in record.message]


def guide_with_slope(x):
    slope = pyro.param("slope", torch.tensor(0.0, dtype=x.dtype))
    with pyro.plate("data", 6, subsample_size=2) as index:
        pyro.sample("z", dist.Normal(slope * x[index], HALF))


def test_a_subsample_that_is_given_runs_at_once(caplog):
    """As a plate of particles, not in a loop."""

    def model(index):
        with pyro.plate("data", 6, len(index), index) as rows:
            z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X[rows])

    def guide(index):
        with pyro.plate("data", 6, len(index), index) as rows:
            pyro.sample("z", dist.Normal(X[rows] / 2, HALF))

    with caplog.at_level(logging.WARNING):
        loss = pv.ELBO(5, kl="sample").loss(model, guide, torch.tensor([4, 1]))
    assert loss == pytest.approx(-3 * float(log_evidence(X[[4, 1]]).sum()), rel=1e-9)
    assert not caplog.records


@pytest.mark.parametrize("name", LOSSES)
def test_arguments_of_other_first_dimensions(name):
    """The prior's mean beside the data: Normal(m, 1) and x ~ Normal(z, 1), in three dimensions."""

    def model(x, mean):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x, mean):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + mean) / 2, HALF).to_event(1))

    x = torch.linspace(-2, 2, 24, dtype=torch.float64).reshape(8, 3)
    mean = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    exact = dist.Normal(mean, 2**0.5).log_prob(x).sum()
    loss = LOSSES[name]().loss(model, guide, x, mean)
    assert loss == pytest.approx(-float(exact), rel=1e-9)
    svi = pv.CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss=LOSSES[name]())
    assert svi.evaluate_loss(x, mean) == pytest.approx(-float(exact), rel=1e-9)


def test_a_plate_without_a_size_around_an_unexpanded_likelihood():
    """Beta(10, 10) and five tosses: log p(x) = log B(13, 12) - log B(10, 10)."""
    tosses = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)

    def model(x):
        f = pyro.sample("f", dist.Beta(x.new_tensor(10.0), 10.0))
        with pyro.plate("data"):
            pyro.sample("x", dist.Bernoulli(f), obs=x)

    def guide(x):
        pyro.sample("f", dist.Beta(x.new_tensor(13.0), 12.0))

    def log_beta(a, b):
        return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

    exact = log_beta(13, 12) - log_beta(10, 10)
    for loss in (
        pv.ELBO(3, kl="sample"),
        pv.IWAE(3, data_plate=False),
        pv.WakeSleep(3, data_plate=False),
    ):
        assert loss.loss(model, guide, tosses) == pytest.approx(-exact, rel=1e-9)
    weights = pv.log_weights(model, guide, tosses, num_particles=3, data_plate=False)
    assert weights.total.flatten().tolist() == pytest.approx([exact] * 3, rel=1e-9)
    pv.to_arviz(model, guide, tosses, num_draws=5, data_plate=False)


def test_a_sequential_plate_that_draws_under_several_particles():
    """They share the subsample: with the exact posterior, each is twice its rows' evidence."""

    def model(x):
        for i in pyro.plate("rows", 4, subsample_size=2):
            z = pyro.sample(f"z_{i}", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        for i in pyro.plate("rows", 4, subsample_size=2):
            pyro.sample(f"z_{i}", dist.Normal(x[i] / 2, HALF))

    x = X[:4]
    exact = log_evidence(x)
    pairs = [2 * float(exact[i] + exact[j]) for i in range(4) for j in range(i)]
    for loss in (pv.ELBO(kl="sample"), pv.ELBO(3, kl="sample"), Trace_ELBO(num_particles=1)):
        for seed in range(12):
            torch.manual_seed(seed)
            value = -loss.loss(model, guide, x)
            assert min(abs(value - pair) for pair in pairs) < 1e-9
    with pytest.raises(ValueError, match="subsample of the sequential plate 'rows'"):
        pv.IWAE(3, data_plate=False).loss(model, guide, x)
