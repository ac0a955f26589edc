"""Runs of several seeds: each is that of fit alone, and what is said of how far they agree."""

from __future__ import annotations

import functools
import logging
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.training.fit_many import _alignment, _distance
from tests.models import factor_analysis
from tests.runs import Model, some
from tests.training.fits import equal_histories, make_data, make_guide, model, parameters_of

D = 3


def x_of(num_data=70, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_data, D, dtype=torch.float64, generator=generator)


def no_layers():
    return ()


def normed():
    return nn.BatchNorm1d(4), nn.Dropout(0.3)


def vae(seed, layers=no_layers, family=None):
    """Without a seed of its own: fit_many seeds the call."""
    net = Model()
    encoder = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), *layers()).double()
    return net, pv.AmortizedGuide(net, encoder, example=x_of(), family=family)


def alone(make, seed, x, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pair = make(seed)
    return pv.fit(*pair, x, seed=seed, progress=False, **options), pair


def equal_to_single_runs(make, x, *, seeds=(3, 5, 8), at_once=True, rtol=1e-9, **options):
    """Histories and parameters, to rounding."""
    options = {"epochs": 40, "batch_size": 32, "compile": "replay"} | options
    fits = pv.fit_many(make, x, seeds=seeds, progress=False, **options)
    assert (fits.dataset.attrs["one_by_one"] == "") is at_once, fits.dataset.attrs["one_by_one"]
    for number, seed in enumerate(seeds):
        wanted, pair = alone(make, seed, x, **options)
        found = fits.results[number]
        assert found.steps == wanted.steps and found.stopped_by == wanted.stopped_by
        for name, column in wanted.history.items():
            assert found.history[name] == pytest.approx(column, rel=rtol, nan_ok=True), name
        for one, other in zip(fits.pairs[number], pair, strict=True):
            if isinstance(one, nn.Module):
                for name, value in other.state_dict().items():
                    mine = one.state_dict()[name]
                    torch.testing.assert_close(mine, value, rtol=1e-7, atol=1e-9, msg=name)
    return fits


CASES = {
    "VAE": (vae, {}),
    "BatchNorm, Dropout": (functools.partial(vae, layers=normed), {}),
    "IWAE": (vae, {"loss": pv.IWAE(4)}),
    "Trace_ELBO": (vae, {"loss": pyro.infer.Trace_ELBO(), "rtol": 1e-6}),
    "full rank": (  # whose matrices are filled in place, which no vmap takes
        functools.partial(vae, family=pv.families.FullRankNormal()),
        {"at_once": False},
    ),
    "clipped, warm-up": (vae, {"clip_norm": 0.5, "schedule": pv.schedules.LinearWarmup(60)}),
    "validation, patience": (
        vae,
        {"validation_data": x_of(20, seed=1), "patience": 3, "min_delta": 1e-3},
    ),
    "SGD, momentum": (vae, {"optim": functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9)}),
    "RMSprop": (vae, {"optim": functools.partial(torch.optim.RMSprop, lr=1e-3)}),
    "amsgrad": (vae, {"optim": functools.partial(torch.optim.Adam, lr=0.01, amsgrad=True)}),
    "all data at each step": (vae, {"batch_size": 100, "epochs": 30}),
}


@pytest.mark.parametrize("case", some(CASES, ["clipped, warm-up"]))
def test_each_run_is_that_of_fit(case):
    make, options = case
    equal_to_single_runs(make, x_of(), **options)


@pytest.mark.slow
def test_a_compiled_run_too():
    equal_to_single_runs(vae, x_of(), compile=True, rtol=1e-6)


@pytest.mark.slow
def test_memory_is_apart_in_the_end():
    fits = pv.fit_many(vae, x_of(), num_runs=2, epochs=40, batch_size=32, progress=False)
    first, second = (parameters_of(guide) for _, guide in fits.pairs)
    with torch.no_grad():
        for parameter in fits.pairs[0][1].parameters():
            parameter.add_(1.0)
    assert not torch.equal(first[0], parameters_of(fits.pairs[0][1])[0])
    torch.testing.assert_close(parameters_of(fits.pairs[1][1]), second, rtol=0, atol=0)
    again = pv.fit(*fits.pairs[0], x_of(), epochs=40, compile="replay", progress=False)
    assert again.steps == 40


class Discrete(nn.Module):
    """Draws a Gamma variable, whose random numbers depend on parameters."""

    def __init__(self):
        super().__init__()
        self.log_rate = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(x.new_full((1,), 2.0), self.log_rate.exp()).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


class GammaGuide(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 2).double()

    def forward(self, x):
        shape, rate = nn.functional.softplus(self.net(x)).add(0.5).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(shape, rate).to_event(1))


def test_random_numbers_that_depend_on_parameters_take_steps_one_by_one(caplog):
    x = make_data(40).abs()
    fits = equal_to_single_runs(
        lambda seed: (Discrete(), GammaGuide()), x, at_once=False, seeds=(0, 1), rtol=0
    )
    assert "what parameters say" in fits.dataset.attrs["one_by_one"]
    assert "each run takes its steps by itself" in caplog.text


@pytest.mark.slow
def test_a_table_of_rows_takes_steps_one_by_one():
    x = make_data(40)

    def make(seed):
        return model, pv.LocalGuide(model, num_data=40, example=x)

    fits = equal_to_single_runs(make, x, at_once=False, seeds=(0, 1), rtol=0)
    assert "a LocalGuide" in fits.dataset.attrs["one_by_one"]


# --- what is said ------------------------------------------------------------------------


def linear(seed):
    return model, make_guide(make_data(60), seed)


@pytest.mark.slow
def test_runs_of_one_optimum_agree():
    """The linear encoder, whose optimum is the exact posterior: log p(x), and z itself."""
    x = make_data(60)
    adam = functools.partial(torch.optim.Adam, lr=0.02)
    fits = pv.fit_many(linear, x, num_runs=3, epochs=400, optim=adam, progress=False)
    data = fits.dataset
    evidence = torch.distributions.Normal(0.0, 2**0.5).log_prob(x).mean().item()
    error = data["elbo_se"].values
    assert (np.abs(data["elbo"].values - evidence) < 4 * error).all() and error.max() < 0.1
    assert float(data["below_best"].max()) < 0.01
    off = ~np.eye(3, dtype=bool)
    assert data["distance"].values[off].max() < 0.2
    assert data["alignment"].values[off].min() > 0.99
    assert fits.best == int(np.argmax(data["elbo"].values))
    assert float(data["below_best"][fits.best]) == 0.0
    assert (data["alignment_se"].values[off] < 0.01).all()
    assert "3 runs, best run" in repr(fits)
    assert list(fits.summary().index) == [0, 1, 2]


@pytest.mark.slow
def test_rotated_latents_are_far_and_aligned():
    """Factor analysis with free loadings: z is known up to a rotation, and so are its means."""
    fa = factor_analysis()
    x = fa.data(200)

    def make(seed):
        own = pv.zoo.FactorAnalysis(x.shape[1], fa.num_latents).double()
        encoder = nn.Linear(x.shape[1], 16).double()
        return own, pv.AmortizedGuide(own, encoder, example=x)

    adam = functools.partial(torch.optim.Adam, lr=0.02)
    fits = pv.fit_many(make, x, num_runs=3, epochs=300, optim=adam, progress=False)
    data, off = fits.dataset, ~np.eye(3, dtype=bool)
    assert data["distance"].values[off].max() > 1.0
    assert data["alignment"].values[off].min() > 0.9
    assert float(data["below_best"].max()) < 0.3


def test_distance_and_alignment_by_hand():
    rng = np.random.default_rng(0)
    means = rng.standard_normal((400, 2))
    variance = np.full((400, 2), 0.25)
    rows = np.arange(400)
    noise = math.sqrt(2 / 200 * 0.25) * 0
    shifted = means + np.array([1.0, 0.0]) + noise
    # A shift of two standard deviations in one of two units, less the noise of 200 draws.
    assert _distance(means, shifted, (variance, variance), rows) == pytest.approx(
        math.sqrt((4 + 0) / 2 - 2 / 200)
    )
    rotation = np.linalg.qr(rng.standard_normal((2, 2)))[0]
    assert _alignment(means, 3 * means @ rotation + 1, rows) == pytest.approx(1.0)
    other = rng.standard_normal((400, 2))
    assert _alignment(means, other, rows) < 0.05
    mixed = means + other  # of two independent halves of equal variance
    assert _alignment(means, mixed, rows) == pytest.approx(0.5, abs=0.08)


# --- failures and refusals -----------------------------------------------------------------


def test_a_run_that_fails_leaves_the_others(caplog):
    def make(seed):
        net, guide = vae(seed)
        if seed == 1:
            with torch.no_grad():
                net.noise.fill_(-370.0)
        return net, guide

    with caplog.at_level(logging.WARNING, "pyro_vae"):
        fits = pv.fit_many(make, x_of(), num_runs=3, epochs=40, batch_size=32, progress=False)
    assert [error is None for error in fits.errors] == [True, False, True]
    assert isinstance(fits.errors[1], pv.NonFiniteLossError)
    assert "the run of seed 1 failed" in caplog.text
    assert np.isnan(fits.dataset["elbo"].values).tolist() == [False, True, False]
    assert fits.best in {0, 2} and "1 runs failed" in repr(fits)
    wanted, _ = alone(make, 2, x_of(), epochs=40, batch_size=32)
    assert fits.results[2].history["elbo"] == pytest.approx(wanted.history["elbo"], rel=1e-9)


def test_what_all_runs_raise_is_raised():
    with pytest.raises(ValueError, match="epochs"):
        pv.fit_many(vae, x_of(), epochs=0, progress=False)


def test_parameters_in_common_are_refused():
    shared = vae(0)
    with pytest.raises(ValueError, match="runs 0 and 1 share parameters; make"):
        pv.fit_many(lambda seed: shared, x_of(), epochs=2, progress=False)

    def store_guide(x):
        location = pyro.param("location", torch.zeros(1, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(location.expand(len(x), 1), 1.0).to_event(1))

    pyro.clear_param_store()
    with pytest.raises(ValueError, match="share parameters in Pyro's store"):
        pv.fit_many(lambda seed: (model, store_guide), make_data(), epochs=2, progress=False)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"seed": 3}, ValueError, r"seed: it is of one run; seeds=\[...\]"),
        ({"checkpoint": "a"}, ValueError, "checkpoint: it is of one run; use pv.fit"),
        ({"callbacks": [print]}, ValueError, "callbacks: it is of one run"),
        ({"stop": None}, ValueError, "stop: it is of one run"),
        ({"epocs": 3}, TypeError, "no argument 'epocs'"),
        ({"num_runs": 1}, ValueError, "num_runs"),
        ({"seeds": [1, 1]}, ValueError, r"seeds=\[1, 1\]: at least 2 are needed, all different"),
        ({"seeds": [1]}, ValueError, "at least 2"),
        ({"optim": pyro.optim.Adam({"lr": 0.1})}, TypeError, "optim: it moves the parameters of"),
    ],
)
def test_arguments_that_several_runs_cannot_have(options, error, told):
    with pytest.raises(error, match=told):
        pv.fit_many(vae, x_of(), progress=False, **options)


def test_what_makes_no_pairs_is_refused():
    with pytest.raises(TypeError, match="make: a function from a seed to .*, found a tuple"):
        pv.fit_many(vae(0), x_of())


def test_the_random_state_stays_and_other_threads_are_kept_out():
    before = torch.get_rng_state()
    one = pv.fit_many(linear, make_data(60), num_runs=2, epochs=2, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    two = pv.fit_many(linear, make_data(60), num_runs=2, epochs=2, progress=False)
    for a, b in zip(one.results, two.results, strict=True):
        equal_histories(a.history, b.history)


def test_ctrl_c_ends_all_runs():
    class Interrupting(pv.ELBO):
        def loss_and_grads(self, *args, **kwargs):
            self.count = getattr(self, "count", 0) + 1
            if self.count == 4:
                raise KeyboardInterrupt
            return super().loss_and_grads(*args, **kwargs)

    fits = pv.fit_many(
        linear, make_data(60), num_runs=2, epochs=9, loss=Interrupting(), progress=False
    )
    assert {result.stopped_by for result in fits.results} == {"interrupted"}
