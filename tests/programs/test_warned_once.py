"""Warnings that are said once for each owner and text."""

from __future__ import annotations

import logging

import pyro
import pyro.distributions as dist
import torch

import pyro_vae as pv
from pyro_vae.programs.warned_once import forget, warn_once
from tests.runs import warned

X = torch.linspace(-1.0, 1.0, 6)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))


def test_a_loop_of_losses_warns_once(caplog):
    """A model that takes no plate of particles, under a new loss each time."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            assert z.ndim == 1
            pyro.sample("x", dist.Normal(z, 1.0 + 0 * x.sum()), obs=x * len(x) / 6)

    for _ in range(4):
        pv.IWAE(3)(model, guide)(X)
        pv.elbo(model, guide, X, num_particles=3, seed=0)
    told = [text for text in warned(caplog) if "which is slow" in text]
    assert told
    assert len(told) == len(set(told))


def test_once_for_each_owner_and_text(caplog):
    """Numbers aside; a method is its object's."""

    class Owner:
        def method(self):
            pass

    logger = logging.getLogger("pyro_vae.test")
    one, other = Owner(), Owner()
    for number in range(3):
        warn_once(logger, (one.method, guide), "slow: %s", f"by {number}.5e-3 nats")
        warn_once(logger, (other, guide), "slow: %s", "by 1 nats")
        warn_once(logger, (one, guide), "fast")
    assert warned(caplog) == ["slow: by 0.5e-3 nats", "slow: by 1 nats", "fast"]
    forget()
    warn_once(logger, (one, guide), "fast")
    assert len(warned(caplog)) == 4
