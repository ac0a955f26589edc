"""What a minibatch counts for where all data share latents."""

from __future__ import annotations

import logging
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.training.minibatches import MinibatchELBO, TrainingData
from tests.models import NormalModel

NUM_DATA, BATCH_SIZE = 50, 16  # the last minibatch has two data
STATED = "shared by all data"


@pytest.fixture(autouse=True)
def _own_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def make_data(num_data=NUM_DATA):
    generator = torch.Generator().manual_seed(0)
    return 1.5 + 1.25**0.5 * torch.randn(num_data, generator=generator, dtype=torch.float64)


def plate(kind, x, num_data=NUM_DATA):
    """A plate that leaves its full size to fit, or says it in one of three ways."""
    if kind == "no size":
        return pyro.plate("data")
    if kind == "full size":
        return pyro.plate("data", num_data, subsample=x)
    return pyro.plate("data", len(x))


def model_of(kind, num_data=NUM_DATA):
    """mu ~ Normal(0, 10), z ~ Normal(mu, 1), x ~ Normal(z, 1/2)."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 10.0))
        scale = num_data / len(x) if kind == "scale" else 1.0
        with plate(kind, x, num_data), poutine.scale(scale=scale):
            z = pyro.sample("z", dist.Normal(mu, torch.ones_like(x)))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    return model


def guide_of(kind, num_data=NUM_DATA):
    """Normal mu; z given mu and x as the posterior has it, up to its parameters' start."""

    def guide(x):
        loc = pyro.param("loc", torch.tensor(1.0, dtype=x.dtype))
        sd = pyro.param("sd", torch.tensor(0.3, dtype=x.dtype), constraint=constraints.positive)
        mu = pyro.sample("mu", dist.Normal(loc, sd))
        width = pyro.param("width", torch.tensor(0.2, dtype=x.dtype).sqrt())
        scale = num_data / len(x) if kind == "scale" else 1.0
        with plate(kind, x, num_data), poutine.scale(scale=scale):
            pyro.sample("z", dist.Normal(mu / 5 + 4 * x / 5, width))

    return guide


def trained(kind, loss, **options):
    pyro.clear_param_store()
    options = {"epochs": 3, "batch_size": BATCH_SIZE, "compile": False, **options}
    result = pv.fit(
        *(model_of(kind), guide_of(kind), make_data()),
        loss=loss(),
        optim=lambda parameters: torch.optim.SGD(parameters, lr=1e-4),
        progress=False,
        **options,
    )
    parameters = {name: p.item() for name, p in pyro.get_param_store().items()}
    return result.history["elbo"], parameters


LOSSES = {
    "ELBO": pv.ELBO,
    "ELBO of 3": lambda: pv.ELBO(3),
    "stl": lambda: pv.ELBO(estimator="stl"),
    "IWAE": lambda: pv.IWAE(3),
    "Trace_ELBO": Trace_ELBO,
    "TraceGraph_ELBO": TraceGraph_ELBO,
    "TraceEnum_ELBO": lambda: TraceEnum_ELBO(strict_enumeration_warning=False),
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", ["full size", "scale", "no size"])
def test_a_plate_of_the_minibatch_s_size_is_as_one_that_says_its_own(name, kind):
    """Under one seed, to rounding: also the last minibatch, of another size."""
    told, parameters = trained("len", LOSSES[name])
    wanted, wanted_parameters = trained(kind, LOSSES[name])
    assert told == pytest.approx(wanted, rel=1e-10)
    assert parameters == pytest.approx(wanted_parameters, rel=1e-9)
    assert parameters["loc"] != pytest.approx(1.0)


@pytest.mark.parametrize("options", [{"drop_last": True}, {"schedule": pv.schedules.Constant(0.5)}])
def test_without_the_last_minibatch_and_with_a_schedule(options):
    assert trained("len", pv.ELBO, **options)[1] == pytest.approx(
        trained("full size", pv.ELBO, **options)[1], rel=1e-9
    )


@pytest.mark.parametrize("loss", [pv.ELBO, Trace_ELBO, lambda: pv.IWAE(3)])
def test_recorded_steps_are_the_eager_ones(loss):
    options = {"epochs": 8, "compile": "replay"}
    assert trained("len", loss, **options)[1] == pytest.approx(
        trained("len", loss, epochs=8)[1], rel=1e-6
    )


@pytest.mark.slow
def test_compiled_steps_are_the_eager_ones():
    assert trained("len", pv.ELBO, epochs=30, compile=True)[1] == pytest.approx(
        trained("len", pv.ELBO, epochs=30)[1], rel=1e-6
    )


@pytest.mark.slow
def test_the_exact_posterior_of_what_is_shared():
    """sd of mu = (N / 1.25 + 0.01)^-1/2 = 0.025; by unscaled minibatches of 500 it is 0.05."""
    num_data = 2000
    x = make_data(num_data)
    guide = guide_of("len", num_data)
    for rate in (0.05, 0.005, 0.0005):
        pv.fit(
            *(model_of("len", num_data), guide, x),
            loss=pv.ELBO(estimator="stl"),
            optim=lambda parameters, rate=rate: torch.optim.Adam(parameters, lr=rate),
            batch_size=500,
            max_steps=600,
            progress=False,
        )
    store = pyro.get_param_store()
    exact = (num_data / 1.25 + 0.01) ** -0.5
    assert store["sd"].item() == pytest.approx(exact, rel=0.05)
    assert store["loc"].item() == pytest.approx(float(x.sum()) / 1.25 * exact**2, abs=exact / 2)


@pytest.mark.parametrize(
    ("kind", "batch_size", "said"),
    [("len", 16, 1), ("len", 128, 0), ("full size", 16, 0), ("scale", 16, 0)],
)
def test_it_is_said_once(kind, batch_size, said, caplog):
    with caplog.at_level(logging.WARNING):
        trained(kind, pv.ELBO, batch_size=batch_size)
    told = [record.message for record in caplog.records if STATED in record.message]
    assert len(told) == said
    if said:
        assert "['mu']" in told[0]
        assert "(50 / 16)" in told[0]
        assert "pyro.plate('data', 50, subsample=x)" in told[0]


def test_without_global_latents_nothing_is_scaled():
    local = NormalModel(noise=0.5)
    x = make_data()
    guide = pv.LocalGuide(local, num_data=NUM_DATA, example=x)
    result = pv.fit(local, guide, x, batch_size=16, epochs=1, compile=False, progress=False)
    assert result.steps == 4
    data = TrainingData(local, guide, x, 16, None, None)
    assert data.full_size(local) is local


def weighted(weight):
    def model(x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 10.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            with poutine.scale(scale=weight):
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    return model


def test_a_scale_that_may_be_a_weight_or_a_wrong_size_is_refused():
    with pytest.raises(ValueError, match=r"\['mu'\].*num_data / batch_size = 3.125.*'x' by 7") as e:
        pv.fit(weighted(7.0), guide_of("len"), make_data(), batch_size=16, progress=False)
    assert "pyro.plate('data', num_data, subsample=x)" in str(e.value)


def test_a_weight_is_no_matter_where_no_minibatch_is_smaller():
    pv.fit(weighted(7.0), guide_of("len"), make_data(), epochs=1, progress=False)


def test_a_fixed_scale_of_the_minibatch_is_the_model_s_own():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 10.0))
        with pyro.plate("data", len(x)), poutine.scale(scale=NUM_DATA / 16):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    data = TrainingData(model, guide_of("scale"), make_data(), 16, None, None)
    assert data.full_size(data) is data


def test_nobody_says_how_many_data_there_are():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(make_data())

    with pytest.raises(ValueError, match=r"\['mu'\] are shared by all data, of which nobody says"):
        pv.fit(model_of("len"), guide_of("len"), Endless(), batch_size=16, progress=False)


def test_a_loader_knows_how_many():
    loader = DataLoader(TensorDataset(make_data()), batch_size=16)
    data = TrainingData(model_of("len"), guide_of("len"), loader, 128, None, None)
    assert data.elbo(NUM_DATA * math.pi, 16) == MinibatchELBO(-math.pi, 16)


def test_compiled_svi_does_not_know_and_stays_as_svi():
    x = make_data()
    losses = []
    for make in (pv.CompiledSVI, pyro.infer.SVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        optim = pyro.optim.Adam({"lr": 0.01})
        svi = make(model_of("len"), guide_of("len"), optim, loss=Trace_ELBO())
        losses.append([svi.step(x[:16]) for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize(
    ("divides", "alone"), [(True, False), (True, True), (False, True)], ids=["all", "x", "none"]
)
def test_a_factor_that_is_scaled_by_hand(divides, alone):
    """A likelihood as pyro.factor, times N / B or not: the one is left alone, the other scaled."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 10.0))
        times = NUM_DATA / len(x) if divides else 1.0
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=1.0 if alone else times):
                z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.factor("x", times * dist.Normal(z, 0.5).log_prob(x))

    if divides and alone:
        with pytest.raises(ValueError, match=r"shared by all data.* but not \['z'\]"):
            TrainingData(model, guide_of("len"), make_data(), 16, None, None)
        return
    data = TrainingData(model, guide_of("len"), make_data(), 16, None, None)
    assert (data.full_size(model) is model) == divides
    assert data.elbo(NUM_DATA * 2.0, 16) == MinibatchELBO(-2.0, 16)


@pytest.mark.parametrize("left", ["z", "y"])
def test_a_scale_of_some_sites_alone_is_refused(left):
    """An sd that is 0.029 came out as 0.037; as 0.020 where fit scaled the rest, and x twice."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 10.0))
        full = NUM_DATA / len(x)
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=1.0 if left == "z" else full):
                z = pyro.sample("z", dist.Normal(mu, torch.ones_like(x)))
            with poutine.scale(scale=full):
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)
            with poutine.scale(scale=1.0 if left == "y" else full):
                pyro.sample("y", dist.Normal(z, 0.5), obs=x)

    with pytest.raises(ValueError, match=rf"shared by all data.* but not \['{left}'\]"):
        pv.fit(model, guide_of("size"), make_data(), epochs=1, batch_size=BATCH_SIZE)


@pytest.mark.parametrize("weight", [0.5, 0.25])
def test_a_warm_up_beside_the_scale_is_taken(weight, caplog):
    def model(x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 10.0))
        with pyro.plate("data", len(x)), poutine.scale(scale=NUM_DATA / len(x)):
            with poutine.scale(scale=weight):
                z = pyro.sample("z", dist.Normal(mu, torch.ones_like(x)))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    result = pv.fit(model, guide_of("scale"), make_data(), epochs=1, batch_size=BATCH_SIZE)
    assert math.isfinite(result.history["elbo"][-1])
    assert STATED not in caplog.text


@pytest.mark.parametrize("kind", ["full size", "scale"])
@pytest.mark.parametrize("batch_size", [BATCH_SIZE, NUM_DATA])
def test_validation_data_are_scaled_as_the_model_says(kind, batch_size):
    """mu at 1.5, z as its posterior: log p(x) at mu, less KL / N; it was 50 / 7 times that."""
    seen = make_data()[:7] - 1.5
    sd = 1e-6

    def guide(x):
        mu = pyro.sample("mu", dist.Normal(pyro.param("loc", x.new_tensor(1.5)), sd))
        scale = NUM_DATA / len(x) if kind == "scale" else 1.0
        with plate(kind, x), poutine.scale(scale=scale):
            pyro.sample("z", dist.Normal(mu / 5 + 4 * x / 5, 0.2**0.5))

    result = pv.fit(
        model_of(kind),
        guide,
        make_data(),
        validation_data=seen,
        batch_size=batch_size,
        epochs=1,
        loss=pv.ELBO(kl="sample"),
        optim=lambda parameters: torch.optim.SGD(parameters, lr=1e-12),
        compile=False,
        progress=False,
    )
    log_p = dist.Normal(1.5, 1.25**0.5).log_prob(seen).mean()
    wide = dist.Normal(0.0, 10.0)
    kl = torch.distributions.kl_divergence(dist.Normal(1.5, sd), wide) / NUM_DATA
    assert result.history["validation_elbo"][0] == pytest.approx(float(log_p - kl), abs=0.1)
