"""The update of an optimizer, recorded once: the same as its own steps."""

from __future__ import annotations

import copy
import functools
import itertools
import logging

import pyro
import pyro.distributions as dist
import pyro.infer
import pyro.optim
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae as pv
from tests.runs import TRACED, D, Run, data, functions, located_guide, replayed, same, some, vae


class Growing(nn.Module):
    def __init__(self):
        super().__init__()
        self.mu = nn.Parameter(torch.zeros(D, dtype=torch.float64))

    def forward(self, x, more=False):
        pyro.module("growing", self)
        mu = self.mu
        if more:
            mu = mu + pyro.param("more", torch.ones(D, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def growing():
    return Growing(), lambda x, more=False: located_guide(x)


def test_parameters_that_come_later():
    """By a branch of its own; they are trained, as pyro.infer.SVI does: to 1e-9."""
    flags = [False, False, False, True, True, True, False, True, False]
    calls = [(data(seed=i), flag) for i, flag in enumerate(flags)]
    options = {"optim": lambda: pyro.optim.Adam({"lr": 0.05})}
    run = replayed(growing, calls, **options)
    e, r = "eager", "replayed"
    assert run.modes == [e, r, r, e, r, r, r, r, r]
    assert not torch.equal(pyro.param("more"), torch.ones(D, dtype=torch.float64))
    groups = run.svi.optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == 4
    same_as_pyro = Run("pyro", growing, calls, **options)
    assert run.losses == pytest.approx(same_as_pyro.losses, rel=1e-9)


@pytest.mark.slow
def test_frozen_parameters_stay():
    def make():
        model, guide = vae()
        model.net.requires_grad_(False)
        return model, guide

    run = replayed(make)
    assert run.modes == TRACED
    torch.manual_seed(0)
    for name, value in make()[0].net.state_dict().items():
        assert torch.equal(run.state[f"model.net.{name}"], value)


def test_gradients_are_gone_after_a_step():
    run = Run("replay")
    parameters = [p for g in run.svi.optimizer.param_groups for p in g["params"]]
    assert parameters
    assert all(p.grad is None for p in parameters)


OPTIMIZERS = {
    "SGD": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "SGD, weight decay": functools.partial(torch.optim.SGD, lr=0.01, weight_decay=0.1),
    "SGD, fused": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, fused=True),
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=0.01),
    "AdamW": functools.partial(torch.optim.AdamW, lr=0.01),
    "AdamW, fused": functools.partial(torch.optim.AdamW, lr=0.01, fused=True),
    "Adam, amsgrad": functools.partial(torch.optim.Adam, lr=0.01, amsgrad=True, fused=True),
    "Adagrad, fused": functools.partial(torch.optim.Adagrad, lr=0.01, fused=True),
    "pyro Adam": lambda: pyro.optim.Adam({"lr": 0.01, "betas": (0.9, 0.95)}),
    "pyro ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.01, "clip_norm": 0.5}),
    "pyro RMSprop": lambda: pyro.optim.RMSprop({"lr": 0.01}),
}


@pytest.mark.parametrize("optim", some(OPTIMIZERS, ["SGD", "RMSprop", "pyro ClippedAdam"]))
def test_optimizers(optim):
    run = replayed(vae, [(data(seed=i),) for i in range(8)], optim=optim)
    assert run.modes == ["eager"] + ["replayed"] * 7


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pyro ClippedAdam", "pyro RMSprop"])
def test_optimizers_of_pyro(name):
    """One for all parameters gives what one each gives, to 1e-9."""
    optim = OPTIMIZERS[name]
    run = Run("replay", functions, optim=optim)
    wanted = Run("pyro", functions, optim=optim)
    same(run, wanted, rtol=1e-9)


@pytest.mark.slow
def test_several_groups():
    """With a learning rate each, one of them not all ours."""
    other = nn.Parameter(torch.zeros(()))

    def make():
        model, guide = vae()
        made = torch.optim.Adam(
            [
                {"params": model.parameters(), "lr": 0.05},
                {"params": guide.parameters(), "lr": 0.001},
                {"params": [other]},
            ],
            fused=True,
        )
        return model, guide, made

    def run_it(how):
        torch.manual_seed(0)
        model, guide, optimizer = make()
        svi = pv.CompiledSVI(model, guide, optimizer, Trace_ELBO(), compile=how)
        torch.manual_seed(1)
        return [svi.step(data()) for _ in range(8)], svi

    (found, svi), (wanted, _) = run_it("replay"), run_it(False)
    assert svi.mode == "replayed"
    assert found == wanted
    assert other.item() == 0


def set_rate(run, rate):
    for group in run.svi.optimizer.param_groups:
        group["lr"] = rate


def test_a_learning_rate_that_is_set():
    """Counts at the next step, and back again."""
    rates = [0.05, 0.05, 0.05, 0.5, 0.0, 0.0, 0.05, 0.5]
    states = []

    def before(step, run):
        if step:
            set_rate(run, rates[step])
            states.append({n: p.detach().clone() for n, p in run.model.named_parameters()})

    run = replayed(calls=[(data(seed=i),) for i in range(8)], before=before)
    assert run.modes == ["eager"] + ["replayed"] * 7
    states = states[-7:]  # before steps 1 to 7 of the replayed run
    still = [torch.equal(a["noise"], b["noise"]) for a, b in itertools.pairwise(states)]
    assert still == [rate == 0.0 for rate in rates[1:-1]]


@pytest.mark.slow
def test_a_learning_rate_at_each_step():
    """More settings than are remembered."""

    def before(step, run):
        if step:
            set_rate(run, 0.05 / step)

    replayed(calls=[(data(seed=i),) for i in range(12)], before=before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.1),
        lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    ],
    ids=["StepLR", "ExponentialLR"],
)
@pytest.mark.parametrize("start", [1, 4])
def test_a_scheduler_of_torch(scheduler, start):
    """Before and after the optimizer's step has been recorded."""

    def before(step, run):
        if step == start:
            run.scheduler = scheduler(run.svi.optimizer)
        elif step > start:
            run.scheduler.step()

    run = replayed(calls=[(data(seed=i),) for i in range(12)], before=before)
    assert run.svi.optimizer.param_groups[0]["lr"] < 0.05
    assert run.scheduler.last_epoch == 11 - start


def test_a_state_dict_that_is_loaded():
    """Tensors of the state are replaced by others."""
    saved = {}

    def before(step, run):
        if step == 3:
            saved["state"] = copy.deepcopy(run.svi.optimizer.state_dict())
        if step in (6, 9):
            run.svi.optimizer.load_state_dict(copy.deepcopy(saved["state"]))

    run = replayed(calls=[(data(seed=i),) for i in range(12)], before=before)
    assert run.modes == ["eager"] + ["replayed"] * 11
    assert {int(s["step"]) for s in run.svi.optimizer.state.values()} == {6}


def test_hooks_of_the_optimizer_run():
    """Such as the clipping of gradients in place."""
    norms = []

    def before(step, run):
        if step != 2:
            return
        parameters = [p for g in run.svi.optimizer.param_groups for p in g["params"]]

        def clip(optimizer, args, kwargs):
            norms.append(float(nn.utils.clip_grad_norm_(parameters, 0.1)))

        run.svi.optimizer.register_step_pre_hook(clip)

    replayed(calls=[(data(seed=i),) for i in range(6)], before=before)
    assert len(norms) == 2 * 4
    assert min(norms) > 0.1


@pytest.mark.slow
def test_an_optimizer_whose_step_cannot_be_recorded(caplog):
    """It reads numbers: its own step is taken, from the state that it had, each time."""

    class Reading(torch.optim.Adam):
        def step(self, closure=None):
            state = next(iter(self.state.values()), None)
            if state is not None and state["step"] > 1e6:
                raise AssertionError
            return super().step(closure)

    optim = functools.partial(Reading, lr=0.05, fused=True)
    with caplog.at_level(logging.INFO, "pyro_vae"):
        run = replayed(calls=[(data(seed=i),) for i in range(8)], optim=optim)
    assert run.modes == ["eager"] + ["replayed"] * 7
    assert {int(s["step"]) for s in run.svi.optimizer.state.values()} == {8}
    assert any("the optimizer's step is not part of the graph" in m for m in caplog.messages)
