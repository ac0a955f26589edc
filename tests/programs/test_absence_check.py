"""A latent that the model masks everywhere is not there, or its mask is a flat prior: refused."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

import pyro_vae as pv

X = torch.linspace(-1, 1, 5, dtype=torch.float64)
ZERO = torch.zeros(5, dtype=torch.float64)
MESSAGE = "'x' depends on draws of \\['z'\\] that the model masks everywhere"


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def flat(x):
    """A mask that stands for a flat prior: no evidence to bound."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(ZERO, 1.0).mask(False))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def flat_by_data(x):
    """A mask of the data that happens to leave out all of them."""
    with pyro.plate("data", len(x)):
        with poutine.mask(mask=x > 2):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def through_another(x):
    """Nothing that is observed sees the draw, but another latent's prior does."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(ZERO, 1.0).mask(False))
        w = pyro.sample("w", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


def absent(x):
    with pyro.plate("data", len(x)):
        with poutine.mask(mask=x > 0):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
        pyro.sample("x", dist.Normal(torch.where(x > 0, z, ZERO), 1.0), obs=x)


def absent_with_all_that_depends(x):
    with pyro.plate("data", len(x)), poutine.mask(mask=x > 0):
        z = pyro.sample("z", dist.Normal(ZERO, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


USES = {
    "ELBO": lambda model, guide: pv.ELBO().loss(model, guide, X),
    "IWAE": lambda model, guide: pv.IWAE(3).loss(model, guide, X),
    "bounds": lambda model, guide: pv.elbo(model, guide, X, num_particles=3),
    "compare": lambda model, guide: pv.compare(model, {"g": guide}, X, num_particles=3),
    "refine": lambda model, guide: pv.refine(model, guide, X, max_steps=1),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("model", [flat, flat_by_data])
def test_a_mask_for_a_flat_prior_is_refused(model, use):
    with pytest.raises(ValueError, match=MESSAGE):
        USES[use](model, guide)


def test_an_autoguide_is_no_way_around():
    with pytest.raises(ValueError, match=MESSAGE):
        pv.ELBO().loss(flat_by_data, AutoNormal(flat_by_data), X)


def test_what_sees_the_draw_may_be_a_latent():
    def both(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))
            pyro.sample("w", dist.Normal(x, 1.0))

    with pytest.raises(ValueError, match="'w' depends on draws of \\['z'\\]"):
        pv.elbo(through_another, both, X, num_particles=3)


def test_absent_latents_are_taken():
    """By algebra: the guide is exact where the latent is there, x ~ Normal(0, sqrt(2))."""
    there = dist.Normal(ZERO, 2**0.5).log_prob(X)
    for model, elsewhere in (
        (absent, dist.Normal(ZERO, 1.0).log_prob(X)),
        (absent_with_all_that_depends, ZERO),
    ):
        wanted = torch.where(X > 0, there, elsewhere)
        torch.testing.assert_close(pv.elbo(model, guide, X, num_particles=3).value, wanted)
        assert pv.ELBO(kl="sample").loss(model, guide, X) == pytest.approx(-float(wanted.sum()))
