"""What Python may change between two steps, and a graph must not go on without knowing."""

from __future__ import annotations

import copy
import functools

import pyro
import pyro.distributions as dist
import pyro.nn
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_vae as pv
from tests.runs import D, Model, Run, adam, data, replayed, vae, warned


def at(step, change):
    """Do something to the run before one of its steps."""

    def before(number, run):
        if number == step:
            change(run)

    return before


def freeze(run):
    for parameter in run.model.net.parameters():
        parameter.requires_grad_(False)


def frozen_vae():
    model, guide = vae()
    for parameter in model.net.parameters():
        parameter.requires_grad_(False)
    return model, guide


def thaw(run):
    for parameter in run.model.net.parameters():
        parameter.requires_grad_(True)


@pytest.mark.parametrize(("make", "change"), [(vae, freeze), (frozen_vae, thaw)])
def test_parameters_frozen_and_thawed(make, change):
    before = []

    def changed(run):
        change(run)
        before.append(run.model.net[0].weight.detach().clone())

    run = replayed(make, [(data(),)] * 7, before=at(3, changed))
    moved = not torch.equal(before[-1], run.model.net[0].weight)
    assert moved == (change is thaw)


def test_a_submodule_that_is_swapped():
    def swap(run):
        run.model.net[1] = nn.Softplus()

    replayed(calls=[(data(),)] * 7, before=at(3, swap))


def test_a_setting_of_a_layer_of_torch():
    def forget(run):
        run.model.net[1].momentum = 0.9

    replayed(lambda: vae(nn.BatchNorm1d(4).double()), [(data(),)] * 7, before=at(3, forget))


def test_settings_in_a_dict():
    class Configured(Model):
        def __init__(self):
            super().__init__()
            self.config = {"beta": 1.0, "names": ["a"]}

        def forward(self, x, beta=1.0):
            super().forward(x, beta * self.config["beta"])

    def make():
        model = Configured()
        return model, pv.LocalGuide(model, num_data=6, example=data())

    def change(run):
        run.model.config["beta"] = 0.1

    replayed(make, [(data(),)] * 7, before=at(3, change))


def test_one_tensor_as_two_arguments():
    def make():
        def model(x, y):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z + 2 * x, 1.0).to_event(1), obs=y)

        guide = pv.LocalGuide(model, num_data=6, example=(data(), data()))
        return model, guide

    x = data()
    replayed(make, [(x, x)] * 3 + [(data(seed=1), x)] * 2)


def test_an_argument_that_the_model_also_closes_over():
    known = data()

    def make():
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x - known.mean(0))

        return model, pv.LocalGuide(model, num_data=6, example=known)

    replayed(make, [(known,)] * 3 + [(data(seed=1),)] * 2)


def test_a_batch_object_that_is_changed(caplog):
    class Rows:
        def __init__(self, x):
            self.x = x

    rows = Rows(data())

    def make():
        def model(rows):
            with pyro.plate("data", 6):
                z = pyro.sample("z", dist.Normal(rows.x.new_zeros(D), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=rows.x)

        return model, AutoNormal(model)

    def change(run):
        rows.x = data(seed=1)

    Run("replay", make, [(rows,)] * 4, before=at(2, change))
    assert any("neither a tensor nor a plain value" in text for text in warned(caplog))


def test_a_list_of_tensors_that_becomes_one(caplog):
    def make():
        def model(x, beta):
            with pyro.plate("data", len(x)):
                scale = torch.tensor([beta, beta, 1.0], dtype=x.dtype)
                z = pyro.sample("z", dist.Normal(x.new_zeros(D), scale).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        return model, AutoNormal(model)

    calls = [(data(), torch.tensor(0.5 + 0.1 * step)) for step in range(4)]
    wanted = Run(False, make, calls)
    found = Run("replay", make, calls)
    assert found.losses == wanted.losses
    assert any("torch.stack" in text for text in warned(caplog))


def test_a_write_to_what_is_no_buffer(caplog):
    counts = []

    def make():
        counts.append(torch.zeros(()))

        def model(x):
            counts[-1].add_(1)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        return model, pv.LocalGuide(model, num_data=6, example=data())

    Run(False, make)
    Run("replay", make)
    assert counts[0] == counts[1]
    assert any("register_buffer" in text for text in warned(caplog))


def test_a_first_step_that_fails():
    failing = [True]

    def make():
        model, guide = vae()

        def fails(x):
            if len(x) == 4 and failing:
                failing.clear()
                raise KeyboardInterrupt
            model(x)

        return fails, guide

    svi = pv.CompiledSVI(*make(), adam, Trace_ELBO(), compile="replay")
    svi.step(data())
    with pytest.raises(KeyboardInterrupt):
        svi.step(data(4))
    for _ in range(3):
        before = [p.detach().clone() for p in svi.guide.parameters()]
        svi.step(data(4))
        after = list(svi.guide.parameters())
        assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert svi.mode == "replayed"


def test_a_momentum_that_is_forgotten():
    def forget(run):
        run.svi.optimizer.state.clear()

    wanted = Run(False, calls=[(data(),)] * 7, before=at(4, forget))
    found = Run("replay", calls=[(data(),)] * 7, before=at(4, forget))
    assert found.losses == wanted.losses


def test_an_optimizer_moves_its_own_parameters_alone():
    model, guide = vae()
    before = model.net[0].weight.detach().clone()
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.1, fused=True)
    svi = pv.CompiledSVI(model, guide, optimizer, Trace_ELBO(), compile="replay")
    for _ in range(4):
        svi.step(data())
    assert svi.mode == "replayed" and torch.equal(before, model.net[0].weight)


def test_an_optimizer_of_named_parameters():
    model, guide = vae()
    named = [*model.named_parameters(), *((f"q.{n}", p) for n, p in guide.named_parameters())]
    optimizer = torch.optim.Adam(named, lr=0.1, fused=True)
    svi = pv.CompiledSVI(model, guide, optimizer, Trace_ELBO(), compile="replay")
    assert [svi.step(data()) for _ in range(4)][-1] > 0 and svi.mode == "replayed"


def test_a_copy_goes_its_own_way():
    model, guide = vae()
    svi = pv.CompiledSVI(model, guide, adam, pv.ELBO(), compile="replay")
    for _ in range(3):
        svi.step(data())
    other = copy.deepcopy(svi)
    before = model.net[0].weight.detach().clone()
    for _ in range(3):
        other.step(data())
    assert torch.equal(before, model.net[0].weight)
    assert not torch.equal(before, other.model.net[0].weight)


def test_a_prior_that_was_made_before():
    """Its validation was on when it was made."""

    class Regression(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            prior = dist.Normal(torch.zeros(D, dtype=torch.float64), 1.0).to_event(1)
            self.weight = pyro.nn.PyroSample(prior)

        def forward(self, x):
            mean = x @ self.weight
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, 1.0), obs=x[:, 0])

    def make():
        model = Regression()
        return model, AutoNormal(model)

    assert replayed(make, rtol=1e-12).modes[-1] == "replayed"


def test_many_shapes_are_too_many(caplog):
    model, guide = vae()
    svi = pv.CompiledSVI(model, guide, adam, Trace_ELBO(), compile="replay")
    for step in range(45):
        svi.step(data(num_data=1 + step % 40))
    assert svi.mode == "eager"
    assert sum("pad arguments to a few shapes" in text for text in warned(caplog)) == 1


def test_autocast_is_eager(caplog):
    model = Model().float()
    guide = pv.LocalGuide(model, num_data=6, example=data().float())
    svi = pv.CompiledSVI(model, guide, adam, Trace_ELBO(), compile="replay")
    for _ in range(3):
        svi.step(data().float())
    assert svi.mode == "replayed"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        svi.step(data().float())
    assert svi.mode == "eager" and any("autocast" in text for text in warned(caplog))


def test_validation_of_plain_functions_is_traced_once(monkeypatch):
    net = nn.Linear(2, D).double()

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    encoder = nn.Linear(D, 4).double()
    guide = pv.AmortizedGuide(model, encoder, example=data())
    traced = []
    from pyro_vae.training import traced_loss

    original = traced_loss.trace
    monkeypatch.setattr(
        traced_loss,
        "trace",
        lambda *args, **kwargs: (traced.append(1), original(*args, **kwargs))[1],
    )
    options = {"epochs": 5, "batch_size": 8, "progress": False, "compile": "replay"}
    pv.fit(model, guide, data(32), validation_data=data(16, seed=1), **options)
    assert len(traced) == 2  # of training and of validation


def test_a_warm_up_of_every_objective():
    """The factor of a warm-up is a tensor, whose number no loss may read."""
    for loss in (
        functools.partial(pv.ELBO),
        functools.partial(pv.IWAE, 3),
        functools.partial(pv.IWAE, 3, "dreg"),
        functools.partial(pv.WakeSleep, 3),
    ):
        found = []
        for how in (False, "replay"):
            pyro.clear_param_store()
            torch.manual_seed(0)
            model = Model()
            encoder = nn.Sequential(nn.Linear(D, 4), nn.Tanh()).double()
            guide = pv.AmortizedGuide(model, encoder, example=data())
            options = {"epochs": 4, "batch_size": 6, "progress": False, "compile": how}
            schedule = pv.schedules.LinearWarmup(8)
            result = pv.fit(
                model, guide, data(15), loss=loss(), schedule=schedule, seed=0, **options
            )
            found.append(result.history["elbo"])
        assert found[0] == pytest.approx(found[1], rel=1e-12, abs=0)


def test_a_baseline_that_is_replaced_in_the_store_is_updated_once_in_a_step():
    """TraceGraph_ELBO puts a new tensor there at each step: in a trace that is given up too."""
    x = torch.tensor([0.5, -1.0, 2.0])

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    def guide(x):
        q = pyro.param("q", torch.full((3,), 0.4), constraint=dist.constraints.unit_interval)
        baseline = {"use_decaying_avg_baseline": True, "baseline_beta": 0.8}
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(q), infer={"baseline": baseline})

    ends = []
    for make in (pyro.infer.SVI, functools.partial(pv.CompiledSVI, compile="replay")):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = make(model, guide, pyro.optim.SGD({"lr": 0.1}), loss=pyro.infer.TraceGraph_ELBO())
        losses = [svi.step(x) for _ in range(6)]
        ends.append((losses, pyro.param("q").tolist()))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-6)
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-6)
