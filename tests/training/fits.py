"""Fits of the normal model, whose optimum is the exact posterior."""

from __future__ import annotations

import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from tests.models import NormalModel

HISTORY = [
    "epoch",
    "step",
    "elbo",
    "elbo_std_error",
    "validation_elbo",
    "validation_elbo_std_error",
    "beta",
]


model = NormalModel()


def make_data(num_data=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2**0.5 * torch.randn(num_data, 1, dtype=torch.float64, generator=generator)


def make_guide(x, seed=0, fn=model):
    """A linear encoder, whose optimum is the exact posterior."""
    torch.manual_seed(seed)
    return pv.AmortizedGuide(fn, nn.Linear(1, 1).double(), example=x)


def exact_elbo(guide, x):
    """Of the guide as it is, in closed form, [N]."""
    location, log_scale = guide.family_params(x).detach().unbind(-1)
    return model.elbo_of(x, location, log_scale.exp())


def parameters_of(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def run(x, guide=None, fn=model, **options):
    guide = make_guide(x, fn=fn) if guide is None else guide
    options = {"epochs": 2, "batch_size": 16, "progress": False} | options
    return pv.fit(fn, guide, x, **options), guide


def equal_histories(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name] == pytest.approx(other[name], rel=0, abs=0, nan_ok=True), name


class Fresh:
    """Data drawn anew for each epoch; remembers what it gave."""

    def __init__(self, x):
        self.x, self.given = x, []

    def epoch(self, generator):
        noise = torch.rand(self.x.shape, generator=generator, dtype=self.x.dtype)
        self.given.append(self.x + 0.1 * noise)
        return self.given[-1]


class Drawn:
    """Data drawn anew for each step, about those in a tuple; remembers what eager steps got."""

    def __init__(self, x):
        self.source, self.given = (x,), []

    def draw(self, x):
        drawn = x + 0.1 * torch.randn_like(x)
        self.given.append(drawn.detach())
        return (drawn,)


def ctrl_c(epoch):
    """Return a callback that raises KeyboardInterrupt after an epoch."""

    def callback(told):
        if told.epoch == epoch:
            raise KeyboardInterrupt

    return callback


class Interrupting(Trace_ELBO):
    """Raises KeyboardInterrupt in the loss of a step, counted from 1."""

    def __init__(self, step):
        super().__init__()
        self.countdown = step

    def loss_and_grads(self, *args, **kwargs):
        self.countdown -= 1
        if self.countdown == 0:
            raise KeyboardInterrupt
        return super().loss_and_grads(*args, **kwargs)
