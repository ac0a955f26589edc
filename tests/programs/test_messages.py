"""What a user is told: errors as they were raised, warnings once, whole numbers or a refusal."""

from __future__ import annotations

import logging
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

import pyro_vae as pv
from pyro_vae.programs.messages import as_count, as_seed, said, text_of, warn_once
from tests.models import factor_analysis
from tests.runs import warned

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


# --- warnings that are said once for each owner and text


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
    said.clear()
    warn_once(logger, (one, guide), "fast")
    assert len(warned(caplog)) == 4


# --- whole numbers: 1e3 is 1000 everywhere, or refused in one sentence


@pytest.mark.parametrize("value", [1000, 1e3, np.int64(1000), np.float32(1000), torch.tensor(1000)])
def test_a_whole_number_of_any_type_is_an_int(value):
    found = as_count("num_particles", value)
    assert found == 1000 and type(found) is int


def test_a_whole_number_that_no_float_holds():
    assert as_count("seed", 10**400) == 10**400
    assert as_count("seed", 2**62 + 1) == 2**62 + 1


@pytest.mark.parametrize("value", [0, -3, 2.5, math.nan, math.inf, "7", True, None, torch.ones(2)])
def test_what_is_none_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"^num_draws=.*: a whole number of at least 1 is needed$"):
        as_count("num_draws", value)


def test_counts_written_as_floats_give_the_same_numbers():
    model = factor_analysis()
    x = model.data(3)
    guide = model.posterior
    for function in (pv.elbo, pv.iwae_bound):
        one, other = (function(model, guide, x, num_particles=k, seed=0) for k in (40, 4e1))
        assert torch.equal(one.value, other.value) and one.name == other.name
    weights = pv.log_weights(model, guide, x, num_particles=4e1, chunk_size=1e1, seed=0)
    assert weights.total.shape == (40, 3)
    compared = pv.compare(model, {"exact": guide}, x, num_particles=4e1, seed=0).dataset
    assert compared.attrs["log_evidence_from"] == "IWAE-40 through 'exact'"
    assert pv.to_arviz(model, guide, x, num_draws=1e1, seed=0)["posterior"].sizes["draw"] == 10
    assert pv.IWAE(1e1).loss(model, guide, x) == pytest.approx(pv.IWAE(10).loss(model, guide, x))
    local = pv.LocalGuide(model, num_data=3.0, example=x, family=pv.families.LowRankNormal(1.0))
    assert pv.refine(model, local, x, max_steps=1e1, seed=0).table.shape[0] == 3
    fitted = pv.fit(model, local, x, batch_size=2.0, epochs=1e0, max_steps=2.0, progress=False)
    assert fitted.steps == 2


def test_a_seed_is_a_number_or_drawn():
    assert as_seed(np.int64(3)) == 3 and as_seed(0) == 0
    torch.manual_seed(0)
    first, second = as_seed(None), as_seed(None)
    torch.manual_seed(0)
    assert as_seed(None) == first != second
    for seed in (-1, 0.5, "0"):
        with pytest.raises(ValueError, match="seed=.*: a whole number of at least 0 is needed"):
            as_seed(seed)
