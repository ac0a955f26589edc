"""Steps of CompiledSVI and of Pyro's SVI under one seed, and whether two runs are the same."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pyro.optim
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.programs.batch import as_batch
from pyro_vae.programs.structure import ModelLooks

D = 3


def data(num_data=6, seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_data, D, dtype=torch.float64, generator=generator)


class Model(nn.Module):
    """z ~ Normal(0, 1), x ~ Normal(net(z), noise): a VAE, with a factor on z's log density."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), *layers, nn.Tanh(), nn.Linear(4, D)).double()
        self.noise = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.beta: float | Tensor = 1.0
        self.uses_noise = True

    def forward(self, x: Tensor, beta: float | Tensor = 1.0) -> None:
        with warnings.catch_warnings(action="ignore"):  # of frozen parameters
            pyro.module("model", self)
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=beta * self.beta):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            noise = self.noise.exp() if self.uses_noise else 1.0
            pyro.sample("x", dist.Normal(self.net(z), noise).to_event(1), obs=x)


def structure_of(model, *batch, **options):
    """The structure of a model, as a run on a batch shows it."""
    return ModelLooks(model, as_batch(*batch)).structure(**options)


def vae(*layers: nn.Module):
    """A model and a guide that register their parameters."""
    model = Model(*layers)
    encoder = nn.Sequential(nn.Linear(D, 4), nn.Tanh()).double()
    guide = pv.AmortizedGuide(model, _TakesBeta(encoder), example=data())
    return model, guide


class _TakesBeta(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, beta: float | Tensor = 1.0) -> Tensor:
        return self.encoder(x)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05, fused=True)


class Run:
    """Some steps under one seed.

    Attributes:
        losses: of the steps.
        modes: of the steps.
        state: parameters and buffers at the end, of modules and of Pyro's store.
        random: the random state at the end.
    """

    def __init__(self, how, make=vae, calls=None, *, loss=Trace_ELBO, optim=adam, before=None):
        pyro.clear_param_store()
        torch.manual_seed(0)
        self.model, self.guide = make()
        self.loss = loss()
        if inspect.isfunction(optim) and not inspect.signature(optim).parameters:
            optim = optim()  # made anew, for Pyro's objects keep what they were used on
        if how == "pyro":
            self.svi = SVI(self.model, self.guide, optim, self.loss)
        else:
            self.svi = pv.CompiledSVI(self.model, self.guide, optim, self.loss, compile=how)
        torch.manual_seed(1)
        self.losses, self.modes = [], []
        for step, call in enumerate([(data(),)] * 6 if calls is None else calls):
            context = before(step, self) if before is not None else None
            with context or contextlib.nullcontext():
                self.losses.append(self.svi.step(*call))
            self.modes.append(getattr(self.svi, "mode", None))
        self.random = torch.get_rng_state()
        self.state = {}
        for role, fn in (("model", self.model), ("guide", self.guide)):
            if isinstance(fn, nn.Module):
                for name, value in fn.state_dict().items():
                    self.state[f"{role}.{name}"] = value.clone()
        for number, value in enumerate(pyro.get_param_store().values()):
            self.state[f"store.{number}"] = value.detach().clone()


def same(one: Run, other: Run, rtol: float = 0.0) -> None:
    """To the last bit, or to a relative tolerance; random numbers to the last bit."""
    assert np.asarray(one.losses) == pytest.approx(np.asarray(other.losses), rel=rtol, abs=0)
    assert one.state.keys() == other.state.keys()
    for name, value in one.state.items():
        torch.testing.assert_close(value, other.state[name], rtol=rtol, atol=rtol, msg=name)
    assert torch.equal(one.random, other.random)


def replayed(*args, rtol: float = 0.0, **kwargs) -> Run:
    """Run eagerly and by replay, compare, and return the latter."""
    eager = Run(False, *args, **kwargs)
    assert set(eager.modes) == {"eager"}
    run = Run("replay", *args, **kwargs)
    same(run, eager, rtol)
    return run


def warned(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def some(choices, names):
    """All choices, and those not named slow."""
    return [
        pytest.param(choice, id=name, marks=() if name in names else (pytest.mark.slow,))
        for name, choice in choices.items()
    ]


TRACED = ["eager"] + ["replayed"] * 5


def located(x: Tensor) -> None:
    """Parameters in Pyro's store, one constrained."""
    mu = pyro.param("mu", torch.zeros(D, dtype=x.dtype))
    scale = pyro.param("scale", x.new_ones(()), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)


def located_guide(x: Tensor) -> None:
    shift = pyro.param("shift", torch.zeros(D, dtype=x.dtype))
    scale = pyro.param(
        "guide_scale", 0.5 * x.new_ones(D), constraint=dist.constraints.interval(0.01, 2.0)
    )
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2 + shift, scale).to_event(1))


def functions():
    return located, located_guide


def normed():
    return vae(nn.BatchNorm1d(4), nn.Dropout(0.3))
