"""CompiledSVI and fit: however steps run, they are the same steps; and where a graph is no use."""

from __future__ import annotations

import contextvars
import functools
import inspect
import itertools
import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pyro.optim
import pytest
import torch
from pyro import poutine
from pyro.infer import ReweightedWakeSleep, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.schedules import LinearWarmup
from pyro_vae.training import traced_loss
from pyro_vae.training import update as update_module
from tests.runs import (
    TRACED,
    D,
    Model,
    Run,
    adam,
    data,
    functions,
    located,
    located_guide,
    normed,
    replayed,
    same,
    some,
    vae,
    warned,
)

# --- the same steps --------------------------------------------------------------------


@pytest.mark.parametrize("loss", [pytest.param(Trace_ELBO, marks=pytest.mark.slow), pv.ELBO])
def test_a_hundred_steps_to_the_last_bit(loss):
    calls = [(data(seed=i % 7),) for i in range(100)]
    run = replayed(vae, calls, loss=loss)
    assert run.modes == ["eager"] + ["replayed"] * 99
    assert run.losses[-1] != run.losses[0]


@pytest.mark.slow
def test_a_hundred_compiled_steps():
    """To 1e-8: sums are in another order."""
    calls = [(data(seed=i % 7),) for i in range(100)]
    eager = Run(False, vae, calls)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's own compiler
        run = Run(True, vae, calls)
    assert run.modes[0] == "eager"
    assert set(run.modes[3:]) == {"compiled"}
    same(run, eager, rtol=1e-8)


class Registered(Model):
    """Pyro's own SVI trains no others."""

    def forward(self, x: Tensor, beta: float | Tensor = 1.0) -> None:
        pyro.module("model", self)
        super().forward(x, beta)


def registered():
    model = Registered()
    return model, pv.AmortizedGuide(model, nn.Linear(D, 4).double(), example=data())


def with_modules():
    """pyro.module inside of functions, with BatchNorm, which Pyro's store does not hold."""
    # No bias before a BatchNorm: its gradient is nothing but rounding, which Adam blows up.
    first = nn.Linear(2, 4, bias=False)
    decoder = nn.Sequential(first, nn.BatchNorm1d(4), nn.Linear(4, D)).double()
    encoder = nn.Linear(D, 4).double()

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        location, scale = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(location, scale.exp()).to_event(1))

    return model, guide


def regression(x: Tensor) -> None:
    """Global latents, one of them positive."""
    weights = pyro.sample("weights", dist.Normal(x.new_zeros(D - 1), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.Gamma(x.new_full((), 2.0), 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x[:, :-1] @ weights, noise), obs=x[:, -1])


def auto(kind):
    def make():
        torch.set_default_dtype(torch.float64)
        return regression, kind(regression)

    return make


PAIRS = {
    "modules": registered,
    "functions": functions,
    "pyro.module": with_modules,
    "AutoNormal": auto(AutoNormal),
    "AutoMultivariateNormal": auto(AutoMultivariateNormal),
}


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("make", some(PAIRS, ["functions", "pyro.module"]))
def test_fifty_steps_are_those_of_pyro(make, loss):
    """One optimizer for all parameters in the place of one each, to rounding: 1e-9."""
    calls = [(data(seed=i % 5),) for i in range(50)]
    options = {"loss": loss, "optim": lambda: pyro.optim.Adam({"lr": 0.02})}
    wanted = Run("pyro", make, calls, **options)
    run = replayed(make, calls, **options)
    assert run.modes[-1] == "replayed"
    assert run.losses == pytest.approx(wanted.losses, rel=1e-9)
    for name, value in run.state.items():
        torch.testing.assert_close(value, wanted.state[name], rtol=1e-9, atol=1e-9, msg=name)
    assert torch.equal(run.random, wanted.random)


LOSSES = {
    "score": lambda: pv.ELBO(kl="sample", estimator="score"),
    "score, two particles": lambda: pv.ELBO(2, kl="sample", estimator="score"),
    "WakeSleep": lambda: pv.WakeSleep(3),
    "WakeSleep sleep": lambda: pv.WakeSleep(3, insomnia=0.5),
    "dreg": lambda: pv.IWAE(3, estimator="dreg"),
    "IWAE": lambda: pv.IWAE(3),
    "free bits": lambda: pv.ELBO(free_bits=0.1),
    "particles in a loop": lambda: Trace_ELBO(num_particles=2),
}


@pytest.mark.parametrize("loss", some(LOSSES, ["score", "WakeSleep", "dreg"]))
def test_objectives(loss):
    calls = [(data(seed=i),) for i in range(12)]
    eager = Run(False, vae, calls, loss=loss)
    run = Run("replay", vae, calls, loss=loss)
    same(run, eager)
    assert run.modes == ["eager"] + ["replayed"] * 11


def test_the_baseline_of_the_score_estimator():
    """A running mean that the loss carries, of a latent that is not reparameterized."""

    def make():
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Poisson(x.new_ones(())))
                pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)

        def guide(x):
            rate = pyro.param("rate", 2 * x.new_ones(()), constraint=dist.constraints.positive)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Poisson(rate))

        return model, guide

    calls = [(data(seed=i),) for i in range(12)]
    options = {"loss": LOSSES["score"]}
    eager, run = Run(False, make, calls, **options), Run("replay", make, calls, **options)
    same(run, eager)
    assert run.modes == ["eager"] + ["replayed"] * 11
    assert list(run.loss.state_dict()) == ["z"]
    assert torch.equal(run.loss.state_dict()["z"], eager.loss.state_dict()["z"])
    assert not torch.equal(
        Run(False, make, **options).loss.state_dict()["z"], eager.loss.state_dict()["z"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_default_dtype_is_part_of_a_kind(dtype):
    """Of two runs of one object, in each: numbers that Python makes have another type."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        shift = pyro.param("shift", torch.zeros(D, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(shift, torch.ones(D)).to_event(1))

    def before(step, run):
        torch.set_default_dtype(dtype if step >= 3 else torch.float64)

    run = replayed(lambda: (model, guide), before=before)
    wanted = ["eager", "replayed", "replayed"]
    assert run.modes == (wanted * 2 if dtype == torch.float32 else TRACED)


# --- arguments -------------------------------------------------------------------------


def test_rows_of_a_local_guide_that_change():
    x = data(8)
    index = [torch.randperm(8, generator=torch.Generator().manual_seed(i))[:3] for i in range(10)]

    def make():
        model = Model()
        return model, pv.LocalGuide(model, num_data=8, example=x)

    def before(step, run):
        return run.guide.rows(index[step])

    run = replayed(make, [(x[i],) for i in index], before=before)
    assert run.modes == ["eager"] + ["replayed"] * 9
    assert (run.guide.table != make()[1].table).any(-1).any(-1).all()  # each row was met


@pytest.mark.slow
def test_all_rows_and_some_are_two_kinds():
    x = data(4)

    def make():
        model = Model()
        return model, pv.LocalGuide(model, num_data=4, example=x)

    def before(step, run):
        return None if step < 3 else run.guide.rows(torch.tensor([3, 1, 0, 2]))

    run = replayed(make, [(x,)] * 6, before=before)
    assert run.modes == ["eager", "replayed", "replayed"] * 2


def test_another_shape_is_traced_anew_and_the_first_is_kept():
    calls = [(data(n, seed=i),) for i, n in enumerate([6, 6, 4, 4, 6, 4, 6, 5])]
    run = replayed(vae, calls)
    r, e = "replayed", "eager"
    assert run.modes == [e, r, e, r, r, r, r, e]


@pytest.mark.slow
def test_more_kinds_than_are_remembered(caplog):
    """The oldest is forgotten, and right when it comes again."""
    sizes = [*range(2, 22), 2, 2, 3]
    run = replayed(vae, [(data(n),) for n in sizes])
    assert run.modes == ["eager"] * 21 + ["replayed", "eager"]
    assert not warned(caplog)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_and_strides_are_told_apart(dtype):
    x = data()
    calls = [(x,), (x,), (x.T.contiguous().T,), (x.T.contiguous().T,), (x.to(dtype),), (x,)]

    def make():
        model = Model()

        def converted(x):
            model(x.double())

        return converted, pv.LocalGuide(model, num_data=6, example=x)

    run = replayed(make, calls)
    r, e = "replayed", "eager"
    assert run.modes == [e, r, e, r, r if dtype == torch.float64 else e, r]


@pytest.mark.slow
def test_a_float_that_changes():
    """Each number is a kind of its own; one that comes back is replayed."""
    run = replayed(vae, [(data(), 0.1 * i) for i in (1, 2, 3, 1, 1, 2)])
    assert run.modes == ["eager"] * 3 + ["replayed"] * 3
    run = replayed(vae, [(data(), v) for v in (1, 1.0, True, 1, 1.0, True)])
    assert run.modes == ["eager"] * 3 + ["replayed"] * 3


def test_a_tensor_that_changes():
    """An input of the graph."""
    calls = [(data(), torch.tensor(0.1 + 0.1 * i, dtype=torch.float64)) for i in range(6)]
    run = replayed(vae, calls)
    assert run.modes == TRACED
    assert len(set(run.losses)) == 6


@pytest.mark.slow
def test_arguments_that_are_containers():
    class Contained(nn.Module):
        def __init__(self):
            super().__init__()
            self.mu = nn.Parameter(torch.zeros(D, dtype=torch.float64))

        def forward(self, batch, names=("x", 0), flag=None):
            x, (beta,) = batch["x"], batch["rest"]
            with pyro.plate("data", len(x)), poutine.scale(scale=beta):
                z = pyro.sample("z", dist.Normal(self.mu, 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def make():
        def guide(batch, names=("x", 0), flag=None):
            located_guide(batch["x"])

        return Contained(), guide

    calls = [
        ({"x": data(seed=i), "rest": [torch.tensor(0.5 + i, dtype=torch.float64)]}, ("x", 1), None)
        for i in range(6)
    ]
    assert replayed(make, calls).modes == TRACED


def test_an_argument_that_cannot_be_told_apart(caplog):
    calls = [(data(), np.asarray(0.1 * i)) for i in range(6)]

    def make():
        def model(x, beta):
            located(x * float(beta))

        def guide(x, beta):
            located_guide(x)

        return model, guide

    run = replayed(make, calls)
    assert run.modes == ["eager"] * 6
    (message,) = warned(caplog)
    assert message == (
        "training steps run eagerly, which is slower: an argument is neither a tensor nor a plain "
        "value that can be told apart"
    )


# --- state between steps ---------------------------------------------------------------


def test_state_that_cannot_be_watched_is_seen_by_a_later_comparison(caplog):
    """At the 8th step; it changes before the 6th. The learning rate is 0: losses are comparable."""

    def run_it(how):
        beta = contextvars.ContextVar("beta", default=1.0)

        def model(x):
            with poutine.scale(scale=beta.get()):
                located(x)

        def before(step, run):
            beta.set(1.0 if step < 5 else 2.0)

        calls = [(data(),)] * 10
        optim = functools.partial(torch.optim.Adam, lr=0.0)
        return Run(how, lambda: (model, located_guide), calls, optim=optim, before=before)

    eager, run = run_it(False), run_it("replay")
    e, r = ["eager"], ["replayed"]
    assert run.modes == e + r * 6 + e * 3
    assert run.losses[:5] == eager.losses[:5]
    assert run.losses[7:] == eager.losses[7:]
    (message,) = warned(caplog)
    assert message.startswith("training steps run eagerly, which is slower: the graph of a step ")
    assert "its loss is " in message
    assert message.endswith(f"{eager.losses[7]:.7g} in an eager step")
    assert torch.equal(run.random, eager.random)


@pytest.mark.slow
def test_a_random_choice_of_python_s_is_caught_when_traced(caplog):
    """What differs between two runs of the second step is no function of tensors."""

    def make():
        calls = itertools.count(1)

        def model(x):
            located(x * next(calls))

        return model, located_guide

    run = Run("replay", make)
    assert run.modes == ["eager"] * 6
    (message,) = warned(caplog)
    assert "the graph of a step does not agree" in message


# --- where a graph is no use -----------------------------------------------------------


def test_control_flow_on_data(caplog):
    """One warning, which names the line."""

    def make():
        def model(x):
            if x.sum() > 0:
                located(x)
            else:
                located(-x)

        return model, located_guide

    calls = [(data(seed=i),) for i in range(8)]
    run = replayed(make, calls)
    assert len({bool(x.sum() > 0) for (x,) in calls}) == 2
    assert run.modes == ["eager"] * 8
    (message,) = warned(caplog)
    lines, first = inspect.getsourcelines(test_control_flow_on_data)
    line = first + next(i for i, text in enumerate(lines) if "if x.sum() > 0:" in text)
    assert message == (
        "training steps run eagerly, which is slower: Python reads a number out of a tensor, "
        f"which may decide what it does next (test_svi.py, line {line}: if x.sum() > 0:)"
    )


def test_other_kinds_are_traced_all_the_same():
    """A kind that cannot be is eager by itself."""

    def make():
        def model(x):
            if len(x) == 4:
                x = x[x[:, 0].argsort()]
                assert float(x.sum()) < 100
            located(x)

        return model, located_guide

    run = replayed(make, [(data(n),) for n in (4, 4, 6, 6, 4, 6)])
    assert run.modes == ["eager"] * 3 + ["replayed", "eager", "replayed"]


def test_a_loss_that_is_a_pair(caplog):
    """Pyro's reweighted wake-sleep."""
    run = replayed(functions, loss=lambda: ReweightedWakeSleep(num_particles=3))
    assert run.modes == ["eager"] * 6
    assert all(isinstance(v, float) for pair in run.losses for v in pair)
    assert all(len(pair) == 2 for pair in run.losses)
    (message,) = warned(caplog)
    assert "the loss is tuple, no tensor" in message


def test_a_loss_that_is_a_function():
    def loss():
        elbo = Trace_ELBO()
        return lambda model, guide, x: elbo.differentiable_loss(model, guide, x) + 7.0

    run = replayed(functions, loss=loss)
    assert run.modes == TRACED
    plain = Run(False, functions)
    assert run.losses == pytest.approx([v + 7 for v in plain.losses], rel=1e-12)


@pytest.mark.slow
def test_loss_and_grads_of_one_s_own():
    """In the place of those of the loss; here, twice the gradients."""

    def double(model, guide, x):
        loss = Trace_ELBO().differentiable_loss(model, guide, x)
        (2 * loss).backward()
        return loss

    found = []
    for how in (False, "replay"):
        pyro.clear_param_store()
        torch.manual_seed(0)
        svi = pv.CompiledSVI(
            located,
            located_guide,
            functools.partial(torch.optim.SGD, lr=0.01),
            Trace_ELBO(),
            double,
            compile=how,
        )
        found.append([svi.step(data()) for _ in range(6)])
    assert svi.mode == "replayed"
    assert found[0] == found[1]
    torch.manual_seed(0)
    pyro.clear_param_store()
    svi = pv.CompiledSVI(
        located, located_guide, functools.partial(torch.optim.SGD, lr=0.02), Trace_ELBO()
    )
    assert [svi.step(data()) for _ in range(6)] == pytest.approx(found[0], rel=1e-12)


def test_handlers_around_a_step_are_honoured():
    def before(step, run):
        return poutine.scale(scale=3.0) if step in (0, 3) else None

    run = replayed(before=before)
    e, r = "eager", "replayed"
    assert run.modes == [e, e, r, e, r, r]


def test_a_handler_that_wraps_the_model():
    def make():
        model, guide = vae()
        return poutine.scale(model, scale=0.5), poutine.scale(guide, scale=0.5)

    run = replayed(make)
    assert run.modes == TRACED
    assert run.losses[0] == pytest.approx(Run(False).losses[0] / 2)


def test_validation_stays_as_it_was():
    """Distributions do not validate in a graph, and do afterwards."""
    run = Run("replay")
    assert run.modes[-1] == "replayed"
    with pytest.raises(ValueError, match="scale"):
        dist.Normal(torch.zeros(()), -torch.ones(()))


def test_nan_in_the_data_makes_a_loss_that_is_nan_under_replay():
    """And no exception: the first step validates, replays do not."""
    run = Run("replay", functions, [(data(),)] * 3)
    assert math.isnan(run.svi.step(torch.full_like(data(), math.nan)))


# --- parameters and optimizers ---------------------------------------------------------


def test_the_optimizer_is_there_after_the_first_step():
    model, guide = vae()
    svi = pv.CompiledSVI(model, guide, adam, Trace_ELBO())
    assert svi.optimizer is None
    assert svi.mode == "eager"
    svi.step(data())
    assert isinstance(svi.optimizer, torch.optim.Adam)


# --- the loss without a step -----------------------------------------------------------


def test_evaluate_loss():
    run = Run("replay")
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    torch.manual_seed(4)
    found = run.svi.evaluate_loss(data(seed=5))
    torch.manual_seed(4)
    assert found == Trace_ELBO().loss(run.model, run.guide, data(seed=5))
    assert isinstance(found, float)
    assert all(torch.equal(v, before[name]) for name, v in run.model.state_dict().items())
    assert all(p.grad is None for p in run.model.parameters())
    torch.manual_seed(4)
    assert run.svi.step(data(seed=5)) == pytest.approx(found, rel=1e-12)


def test_evaluate_loss_of_a_pair():
    run = Run(False, functions, loss=lambda: ReweightedWakeSleep(num_particles=3))
    found = run.svi.evaluate_loss(data())
    assert isinstance(found, tuple)
    assert [type(value) for value in found] == [float, float]


# --- what is refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_samples": 5}, "num_samples=5: it serves pyro.infer.SVI.run, which Pyro deprecates"),
        ({"compile": "fast"}, "compile='fast': 'auto', 'replay', True or False is needed"),
        ({"compile": 1}, "compile=1: 'auto', 'replay', True or False is needed"),
    ],
)
def test_bad_options(options, told):
    model, guide = vae()
    with pytest.raises(ValueError, match=f"^{told}"):
        pv.CompiledSVI(model, guide, adam, Trace_ELBO(), **options)


@pytest.mark.parametrize(
    ("optim", "error", "told"),
    [
        (3, TypeError, "optim=3: a function from parameters to a torch optimizer"),
        (lambda parameters: None, TypeError, "a function from parameters to a torch optimizer"),
        (
            torch.optim.Adam([torch.zeros(1, requires_grad=True)]),
            ValueError,
            "optim: none of its parameters is one of the model or the guide",
        ),
        (
            pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 1.0}),
            ValueError,
            "optim: a pyro.optim object with clip_args cannot be translated",
        ),
        (
            pyro.optim.Adam(lambda name: {"lr": 0.1}),
            ValueError,
            "with arguments that are a function of the parameter cannot be translated",
        ),
        (
            pyro.optim.ExponentialLR(
                {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9}
            ),
            ValueError,
            "with a learning rate scheduler cannot be translated",
        ),
    ],
    ids=["number", "none", "of others", "clip_args", "function", "scheduler"],
)
def test_bad_optimizers(optim, error, told):
    model, guide = vae()
    svi = pv.CompiledSVI(model, guide, optim, Trace_ELBO())
    with pytest.raises(error) as caught:
        svi.step(data())
    assert told in str(caught.value)


def test_an_error_of_the_model_passes():
    """In an eager step, and in one that is traced: there as what it is."""

    def model(x):
        if len(x) == 4:
            raise KeyError("four")
        located(x)

    pyro.clear_param_store()
    svi = pv.CompiledSVI(model, located_guide, adam, Trace_ELBO(), compile="replay")
    for _ in range(3):
        svi.step(data())
    with pytest.raises(KeyError, match="four"):
        svi.step(data(4))
    svi.step(data())
    assert svi.mode == "replayed"


# --- when it compiles ------------------------------------------------------------------


def refuse_to_compile(monkeypatch):
    calls = []

    def compile(self, *inputs):
        calls.append(1)
        self.uncompilable = True
        raise RuntimeError("CppCompileError: there is none")

    monkeypatch.setattr(traced_loss.Graph, "compile", compile)
    return calls


def test_without_a_compiler_steps_are_replayed(monkeypatch, caplog):
    calls = refuse_to_compile(monkeypatch)
    run, eager = Run(True), Run(False)
    assert run.modes == TRACED
    same(run, eager)
    assert len(calls) == 1
    (message,) = warned(caplog)
    assert message == ("training steps are replayed, not compiled: CppCompileError: there is none")


@pytest.mark.slow
def test_auto_compiles_where_it_pays(monkeypatch):
    """By a model of the machine: 10 s and more, against microseconds an operation."""
    calls = refuse_to_compile(monkeypatch)
    for num_steps, compiles in [(0, 0), (2000, 0), (10_000_000, 1)]:
        pyro.clear_param_store()
        svi = pv.CompiledSVI(located, located_guide, adam, Trace_ELBO(), num_steps=num_steps)
        for _ in range(4):
            svi.step(data())
        assert svi.mode == "replayed"
        assert len(calls) == compiles


def test_replay_never_compiles(monkeypatch):
    calls = refuse_to_compile(monkeypatch)
    pyro.clear_param_store()
    svi = pv.CompiledSVI(
        located, located_guide, adam, Trace_ELBO(), num_steps=10**8, compile="replay"
    )
    for _ in range(6):
        svi.step(data())
    assert svi.mode == "replayed"
    assert not calls


def test_few_steps_run_eagerly():
    svi = pv.CompiledSVI(located, located_guide, adam, Trace_ELBO(), num_steps=99)
    for _ in range(4):
        svi.step(data())
        assert svi.mode == "eager"


# --- fit -------------------------------------------------------------------------------

OPTIONS = {"batch_size": 8, "epochs": 3, "progress": False}


def fitted(how, tmp_path=None, make=vae, **options):
    pyro.clear_param_store()
    torch.manual_seed(0)
    model, guide = make()
    x = data(20)
    options = OPTIONS | {"optim": adam} | options
    return pv.fit(model, guide, x, compile=how, **options).history, model, guide


def same_fits(one, other, rtol):
    assert one[0].keys() == other[0].keys()
    for name, column in one[0].items():
        assert column == pytest.approx(other[0][name], rel=rtol, abs=0, nan_ok=True), name
    for mine, its in zip(one[1:], other[1:], strict=True):
        torch.testing.assert_close(mine.state_dict(), its.state_dict(), rtol=rtol, atol=rtol)


FITS = {
    "plain": {},
    "schedule": {"schedule": LinearWarmup(7)},
    "validation": {"validation_data": data(5, seed=3)},
    "both": {"schedule": LinearWarmup(7), "validation_data": data(13, seed=3), "patience": 2},
    "score": {"loss": pv.ELBO(kl="sample", estimator="score")},
    "pyro": {"loss": TraceMeanField_ELBO(), "optim": pyro.optim.Adam({"lr": 0.05})},
}


def count_replays(monkeypatch) -> list[str]:
    modes = []
    call = traced_loss.TracedLoss.__call__

    def counting(self, *args, **kwargs):
        loss = call(self, *args, **kwargs)
        modes.append(self.mode)
        return loss

    monkeypatch.setattr(traced_loss.TracedLoss, "__call__", counting)
    return modes


@pytest.mark.parametrize("options", some(FITS, ["both", "pyro"]))
def test_fits_are_the_same_fit(options, monkeypatch):
    """Nine steps of two shapes, and the parameters that validated best: to the last bit."""
    modes = count_replays(monkeypatch)
    eager = fitted(False, make=normed, **options)
    assert set(modes) == {"eager"}
    modes.clear()
    replay = fitted("replay", make=normed, **options)
    assert modes.count("replayed") >= 5
    same_fits(replay, eager, rtol=1e-12)


@pytest.mark.slow
def test_a_compiled_fit_is_the_same_fit(monkeypatch):
    """To 1e-7: compiled sums are in another order, in 9 steps."""
    modes = count_replays(monkeypatch)
    eager = fitted(False, **FITS["both"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's own compiler
        compiled = fitted(True, **FITS["both"])
    assert modes.count("compiled") >= 3
    same_fits(compiled, eager, rtol=1e-7)


@pytest.mark.slow
def test_a_fit_of_a_local_guide():
    def make():
        model = Model()
        return model, pv.LocalGuide(model, num_data=20, example=data(20))

    same_fits(fitted("replay", make=make), fitted(False, make=make), rtol=1e-12)


@pytest.mark.parametrize(
    "hows",
    [
        ("replay", "replay"),
        pytest.param((False, "replay"), marks=pytest.mark.slow),
        pytest.param(("replay", False), marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_resumed(hows, tmp_path):
    """Whole or in two parts, however each runs."""
    path = tmp_path / "checkpoint"
    options = {"schedule": LinearWarmup(12), "validation_data": data(5, seed=3)}
    whole = fitted(False, make=normed, **options, epochs=5)
    fitted(hows[0], make=normed, **options, checkpoint=path, epochs=2)
    resumed = fitted(hows[1], make=normed, **options, checkpoint=path, epochs=5)
    same_fits(resumed, whole, rtol=1e-12)


def test_a_few_steps_of_fit_stay_eager(monkeypatch):
    """Tracing takes as long as some of them: below a hundred."""
    modes = count_replays(monkeypatch)
    fitted("auto", max_steps=99, epochs=None)
    assert modes == ["eager"] * 99
    modes.clear()
    monkeypatch.setattr(update_module, "trace", None)
    monkeypatch.setattr(traced_loss, "trace", None)
    with pytest.raises(TypeError):
        fitted("auto", max_steps=100, epochs=None)


def test_a_hundred_steps_of_fit_are_replayed(monkeypatch):
    modes = count_replays(monkeypatch)
    replay = fitted("auto", max_steps=100, epochs=None)
    assert modes.count("replayed") > 90
    same_fits(replay, fitted(False, max_steps=100, epochs=None), rtol=1e-12)


class Exploding(nn.Module):
    """A buffer grows at each run, until exp(exp(grown)) ** 2 overflows in the density of x."""

    def __init__(self):
        super().__init__()
        self.register_buffer("grown", torch.zeros((), dtype=torch.float64))
        self.mu = nn.Parameter(torch.zeros(D, dtype=torch.float64))

    def forward(self, x):
        self.grown.add_(0.5)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.mu, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * self.grown.exp().exp(), 1.0).to_event(1), obs=x)


def test_a_step_that_is_not_finite_is_named_under_replay(monkeypatch):
    """Step, sites and parameters as in an eager run."""
    modes = count_replays(monkeypatch)

    def make():
        return Exploding(), located_guide

    told = []
    for how in (False, "replay"):
        modes.clear()
        pyro.clear_param_store()
        torch.manual_seed(0)
        model, guide = make()
        with pytest.raises(pv.NonFiniteLossError) as caught:
            pv.fit(model, guide, data(8), optim=adam, compile=how, batch_size=8, progress=False)
        error = caught.value
        assert str(error).startswith(
            f"the loss (inf) of step {error.step} is not finite, at sites 'x' of the model"
        )
        told.append((error.step, error.sites, model.mu.tolist()))
    assert modes.count("replayed") > 5
    assert told[0] == told[1]
    assert told[0][0] > 6
    assert told[0][1] == ["'x' of the model"]


def test_sparse_arguments_run_eagerly():
    """As pyro.infer.SVI takes them."""
    x = torch.eye(4, dtype=torch.float64)

    def sparse_model(x):
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(torch.zeros(4, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x.to_dense())

    def sparse_guide(x):
        slope = pyro.param("sparse_slope", torch.tensor(0.1, dtype=x.dtype))
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(slope * x.to_dense(), 1.0).to_event(1))

    losses = []
    for make in (pyro.infer.SVI, pv.CompiledSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        optim = pyro.optim.Adam({"lr": 0.1})
        svi = make(sparse_model, sparse_guide, optim, loss=pyro.infer.Trace_ELBO())
        losses.append([svi.step(x.to_sparse()) for _ in range(4)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
