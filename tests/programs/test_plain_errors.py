"""Errors of a user's model are told as they were raised, wherever the model runs."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

import pyro_vae as pv
from pyro_vae.programs.plain_errors import text_of

X = torch.linspace(-1.0, 1.0, 6)


class OwnError(ValueError):
    """Cannot be made from a text alone, as Pyro would try to."""

    def __init__(self, site, code):
        super().__init__(f"site {site} has code {code}")
        self.code = code


def broken(error):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            error()

    return model


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))


def own():
    raise OwnError("x", 7)


WAYS = {
    "describe": lambda model: pv.describe(model, X),
    "fit": lambda model: pv.fit(model, guide, X, loss=Trace_ELBO(), progress=False),
    "elbo": lambda model: pv.elbo(model, guide, X, num_particles=2),
    "loss": lambda model: pv.ELBO()(model, guide)(X),
    "particles": lambda model: pv.IWAE(3)(model, guide)(X),
    "step": lambda model: pv.CompiledSVI(
        model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()
    ).step(X),
    "evaluate": lambda model: pv.CompiledSVI(
        model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()
    ).evaluate_loss(X),
    "guide": lambda model: pv.LocalGuide(model, num_data=6, example=X),
    "impute": lambda model: pv.impute(pv.MissingData(model), guide, X, num_particles=2),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_no_table_of_sites(way):
    """Of an error of the user's own class, and of PyTorch's."""
    with pytest.raises((OwnError, TypeError)) as caught:
        way(broken(own))
    if isinstance(caught.value, OwnError):
        assert caught.value.code == 7
    assert "Trace Shapes" not in str(caught.value)
    with pytest.raises(RuntimeError, match="must match the size") as caught:
        way(broken(lambda: torch.ones(2) + torch.ones(3)))
    assert "Trace Shapes" not in str(caught.value)


def test_what_pyro_adds_is_kept():
    """Which site has no density there."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Exponential(1.0), obs=x)

    svi = pv.CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    with pytest.raises(ValueError, match="Error while computing log_prob at site 'x'") as caught:
        svi.step(X)
    assert "Trace Shapes" not in str(caught.value)


def test_text_of():
    assert text_of(ValueError("a\nb\nTrace Shapes:\n z 3 |")) == "a\nb"
    assert text_of(ValueError("a")) == "a"
    # Where a site's name is long, Pyro indents the title to its width.
    assert text_of(ValueError("a\n      Trace Shapes:    \n guide$$$weight 3 |")) == "a"
