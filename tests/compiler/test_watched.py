"""Modes, attributes, buffers and parameters that change between two steps."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pyro.infer
import pyro.optim
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae as pv
from tests.runs import TRACED, D, Model, Run, data, functions, normed, replayed, same, vae, warned


def test_running_statistics_and_dropout():
    run = replayed(normed, [(data(seed=i),) for i in range(40)])
    assert run.modes == ["eager"] + ["replayed"] * 39
    assert int(run.state["model.net.1.num_batches_tracked"]) == 40


def test_train_and_eval_between_steps():
    def before(step, run):
        run.model.train(step not in (3, 4, 5))

    run = replayed(normed, [(data(seed=i),) for i in range(10)], before=before)
    e, r = "eager", "replayed"
    assert run.modes == [e, r, r, e, r, r, e, r, r, r]
    assert int(run.state["model.net.1.num_batches_tracked"]) == 7


def test_a_batch_norm_that_runs_twice_on_one_batch():
    """As an encoder does with particles one by one: its statistics move at each run."""

    def make():
        model = Model()
        encoder = nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4)).double()
        return model, pv.AmortizedGuide(model, encoder, example=data())

    run = replayed(make, [(data(),)] * 6, loss=lambda: Trace_ELBO(num_particles=2))
    assert run.modes == TRACED
    (count,) = (v for name, v in run.state.items() if name.endswith("num_batches_tracked"))
    assert int(count) == 12


def test_a_batch_norm_with_a_cumulative_mean_runs_eagerly(caplog):
    """Its weight is a number that Python reads out of a tensor."""

    def make():
        return vae(nn.BatchNorm1d(4, momentum=None))

    assert replayed(make).modes == ["eager"] * 6
    (message,) = warned(caplog)
    assert "reads a number out of a tensor" in message


def test_a_plain_attribute_that_changes():
    def before(step, run):
        run.model.beta = 0.1 if step >= 3 else 1.0

    assert replayed(before=before).modes == ["eager", "replayed", "replayed"] * 2


@pytest.mark.slow
def test_a_dropout_whose_probability_changes():
    def before(step, run):
        run.model.net[2].p = 0.9 if step >= 3 else 0.3

    assert replayed(normed, before=before).modes == ["eager", "replayed", "replayed"] * 2


def test_a_tensor_attribute_that_is_replaced():
    """One that is neither a parameter nor a buffer."""

    def before(step, run):
        run.model.beta = torch.tensor(1.0 + step // 3, dtype=torch.float64)

    replayed(before=before)


def test_a_tensor_attribute_that_is_written_to():
    def make():
        model, guide = vae()
        model.beta = torch.ones((), dtype=torch.float64)
        return model, guide

    def before(step, run):
        run.model.beta.fill_(0.3 + 0.3 * step)

    assert replayed(make, before=before).modes == TRACED


def test_a_number_that_python_reads_out_of_a_buffer(caplog):
    """No constant of the graph: it may change."""

    class Counting(Model):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            factor = float(self.count)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0 + factor).to_event(1))
                pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)

    def make():
        model = Counting()
        encoder = nn.Linear(D, 4).double()
        return model, pv.AmortizedGuide(model, encoder, example=data())

    def before(step, run):
        run.model.count.fill_(step)

    replayed(make, before=before)


@pytest.mark.slow
def test_a_buffer_that_is_replaced():
    class Buffered(Model):
        def __init__(self):
            super().__init__()
            self.register_buffer("shift", torch.zeros(D, dtype=torch.float64))

        def forward(self, x):
            super().forward(x + self.shift)

    def make():
        model = Buffered()
        return model, pv.LocalGuide(model, num_data=6, example=data())

    def before(step, run):
        if step == 3:
            run.model.shift = torch.ones(D, dtype=torch.float64)

    assert replayed(make, before=before).modes == ["eager", "replayed", "replayed"] * 2


def test_a_parameter_that_is_replaced():
    """The new one is trained, though Pyro's store keeps the old one under its name."""
    new = torch.full((D, 4), 0.1, dtype=torch.float64)

    def before(step, run):
        if step == 3:
            run.model.net[-1].weight = nn.Parameter(new.clone())

    run = replayed(before=before)
    assert run.modes == ["eager", "replayed", "replayed"] * 2
    assert not torch.equal(run.state["model.net.2.weight"], new)


@pytest.mark.parametrize("how", [False, "replay"])
def test_the_store_cleared_in_the_middle(how):
    """New parameters are trained from their start, as pyro.infer.SVI does: to 1e-9."""

    def before(step, run):
        if step == 4:
            pyro.clear_param_store()

    options = {"optim": lambda: pyro.optim.Adam({"lr": 0.1}), "before": before}
    calls = [(data(seed=i),) for i in range(10)]
    wanted = Run("pyro", functions, calls, **options)
    run = Run(how, functions, calls, **options)
    assert run.modes[-1] == ("replayed" if how else "eager")
    same(run, wanted, rtol=1e-9)
