"""Hooks on the gradients of parameters run at each step, those that came later too."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from tests.runs import Run, same, warned

X = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


def model(x):
    w = pyro.param("w", torch.tensor(5.0, dtype=torch.float64))
    with pyro.plate("d", len(x)):
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


def guide(x):
    pass


def leaf():
    return pyro.param("w").unconstrained()


def run(how, before, steps=12, **options):
    return Run(
        how,
        lambda: (model, guide),
        [(X,)] * steps,
        optim=lambda: pyro.optim.SGD({"lr": 0.1}),
        before=before,
        **options,
    )


def test_they_come_and_go():
    """By algebra: w falls by 0.1 times the sum of w - x; clamped at 1, by 0.1; frozen, not."""

    def steps(w):
        for step in range(12):
            gradient = 3 * w - 6.0
            if 3 <= step < 6:
                gradient = min(gradient, 0.5)
            w -= 0.1 * (0.0 if step >= 9 else gradient)
        return w

    handles, seen = [], []

    def before(step, run):
        if step == 3:
            handles.append(leaf().register_hook(lambda g: g.clamp(-0.5, 0.5)))
            handles.append(leaf().register_hook(lambda g: seen.append(g.item())))
        if step == 6:
            handles.pop(0).remove()
        if step == 9:
            leaf().register_post_accumulate_grad_hook(lambda p: p.grad.zero_())

    found = run("replay", before)
    assert found.modes == ["eager"] + ["replayed"] * 11
    assert pyro.param("w").item() == pytest.approx(steps(5.0), rel=1e-12)
    assert len(seen) == 9
    assert seen[:3] == [0.5] * 3


@pytest.mark.parametrize("how", ["replay", pytest.param(True, marks=pytest.mark.slow)])
def test_as_in_pyro(how):
    """A hook that was there before the first step; numbers that it reads are numbers."""
    seen = []

    def before(step, run):
        if step == 1:
            leaf().register_hook(lambda g: seen.append(g.item()))
            leaf().register_hook(lambda g: g.mul_(0.5))

    wanted = run("pyro", before)
    kept, seen = seen, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's own compiler
        found = run(how, before)
    same(found, wanted, rtol=1e-12)
    assert seen == pytest.approx(kept, rel=1e-12)
    assert found.modes[-1] == ("compiled" if how is True else "replayed")


def test_several_ways_back(caplog):
    """Three particles one by one go backward three times, and so often the hooks are called."""

    def before(step, run):
        if step == 4:
            leaf().register_hook(lambda g: g.clamp(-0.5, 0.5))

    def loss():
        return Trace_ELBO(num_particles=3)

    found = run("replay", before, loss=loss)
    same(found, run("pyro", before, loss=loss), rtol=1e-12)
    assert found.modes == ["eager"] + ["replayed"] * 3 + ["eager"] * 8
    (message,) = warned(caplog)
    assert "the loss goes backward through them several times" in message


def test_a_hook_of_a_module_that_comes_later():
    def make():
        net = nn.Linear(1, 1, bias=False).double()

        def model(x):
            pyro.module("net", net)
            with pyro.plate("d", len(x)):
                pyro.sample("x", dist.Normal(net(x[:, None])[:, 0], 1.0), obs=x)

        nets.append(net)
        return model, guide

    def before(step, run):
        if step == 3:
            handles.append(nets[-1].register_forward_hook(lambda net, x, y: 2 * y))
        if step == 6:
            handles.pop().remove()

    nets, handles = [], []
    options = {"optim": lambda: pyro.optim.SGD({"lr": 0.1}), "before": before}
    runs = [Run(how, make, [(X,)] * 9, **options) for how in ("pyro", "replay")]
    same(*runs, rtol=1e-12)
    assert runs[1].modes == ["eager", "replayed", "replayed"] * 3
