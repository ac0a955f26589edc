"""Pyro's own losses in fit: what pyro.infer.SVI trains, fit trains, to the same numbers."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pyro_vae as pv
from tests.runs import warned


def networks():
    torch.manual_seed(0)
    return nn.Linear(2, 4).double(), nn.Linear(4, 2).double()


def positive_latents():
    """The scale is a latent: a draw of the prior is often no scale, one of the guide always."""
    decoder, encoder = networks()

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            scale = z.sum(-1, keepdim=True)
            pyro.sample("x", dist.Normal(decoder(z), scale).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(encoder(x), 0.1).to_event(1))

    return model, guide


def a_number_of_columns():
    """A latent tells how many columns there are; the guide's is the number of the data's."""

    def model(x):
        n = pyro.sample("n", dist.Poisson(x.new_tensor(2.0)))
        loc = pyro.param("loc", x.new_zeros(4))[: int(n)]
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0 * x[:, 0], 1.0))
            pyro.sample("x", dist.Normal(loc + z[:, None], 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.sample("n", dist.Delta(x.new_tensor(4.0)))
        loc = pyro.param("guide_loc", x.new_zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc + x.mean(-1), 0.5))

    return model, guide


def global_latents():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("mu_loc", x.new_zeros(4))
        pyro.sample("mu", dist.Normal(loc, 0.1).to_event(1))

    return model, guide


def grey_pixels():
    """Intensities under a Bernoulli likelihood that does not validate them."""
    decoder, encoder = networks()

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pixels = dist.Bernoulli(logits=decoder(z), validate_args=False)
            pyro.sample("x", pixels.to_event(1), obs=x.sigmoid())

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    return model, guide


CASES = [
    (positive_latents, False, None),
    (a_number_of_columns, False, None),
    (global_latents, True, "each step takes all data, for there is no data plate"),
    (grey_pixels, False, "observed sites ['x'] have values outside the support"),
]


@pytest.mark.parametrize(("make", "whole", "told"), CASES)
def test_what_svi_trains_fit_trains(make, whole, told, caplog):
    """To rounding, in steps of all data; equal rows, so that their order makes no difference."""
    x = torch.linspace(-1.0, 1.0, 4, dtype=torch.float64).expand(20, 4).clone()
    pyro.clear_param_store()
    svi = SVI(*make(), pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO())
    torch.manual_seed(0)
    losses = []
    for _ in range(5):
        if not whole:
            torch.randperm(20)  # as fit shuffles
        losses.append(svi.step(x))
    pyro.clear_param_store()
    options = {"optim": pyro.optim.SGD({"lr": 1e-3}), "epochs": 5, "batch_size": 20, "seed": 0}
    result = pv.fit(*make(), x, loss=Trace_ELBO(), progress=False, **options)
    found = [-elbo * (1 if whole else 20) for elbo in result.history["elbo"]]
    assert found == pytest.approx(losses, rel=1e-9)
    assert [told in text for text in warned(caplog)] == ([] if told is None else [True])


def test_no_bound_takes_what_has_no_density():
    x = torch.zeros(5, 4, dtype=torch.float64)
    pyro.clear_param_store()
    with pytest.raises(
        ValueError, match=r"'x': values outside .*validate_args=False lets training"
    ):
        pv.elbo(*grey_pixels(), x, num_particles=2)
    assert "Bernoulli" in str(pv.describe(grey_pixels()[0], x))


def test_what_is_wrong_under_the_guide_too_is_refused():
    """By the message of the look at the model alone."""
    model, guide = positive_latents()
    x = torch.zeros(5, 4, dtype=torch.float64)
    x[2, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        pv.fit(model, guide, x, loss=Trace_ELBO(), progress=False)
