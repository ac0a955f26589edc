"""How often the user's model is run to find something out: each run answers several questions."""

from __future__ import annotations

import importlib

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.batch import as_batch
from pyro_vae.programs.state import evaluation, mode_reads

WEIGHT = torch.tensor([[1.0, -0.5, 0.3], [0.2, 0.8, -1.0]])
X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))


class Counted:
    """A linear model, and how often it ran."""

    def __init__(self):
        self.runs = 0

    def __call__(self, x):
        self.runs += 1
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ WEIGHT, 1.0).to_event(1), obs=x)


@pytest.fixture
def pair():
    torch.manual_seed(0)
    model = Counted()
    guide = pv.AmortizedGuide(model, nn.Linear(3, 4), example=X)
    model.runs = 0
    return model, guide


@pytest.mark.parametrize("batch_size", [8, 20, 128])
@pytest.mark.parametrize(("loss", "most"), [(pv.IWAE(5), 6), (pv.ELBO(), 4)], ids=["IWAE", "ELBO"])
def test_the_first_step_of_fit(pair, loss, most, batch_size):
    """Under the prior, with the guide's draws, on a part, another particle alone, all; the step."""
    model, guide = pair
    pv.fit(model, guide, X, loss=loss, batch_size=batch_size, max_steps=1, progress=False)
    assert model.runs <= most


def test_a_bound(pair):
    """Under the prior twice, with the guide's draws, two particles alone, all; and the bound."""
    model, guide = pair
    pv.iwae_bound(model, guide, X, num_particles=10, seed=0)
    assert model.runs <= 7


def test_refine_before_it_searches(pair, monkeypatch):
    """Beside what a bound looks at, stability in five runs in all, and one part of the data."""
    model, guide = pair

    def search(*args):
        raise KeyboardInterrupt

    module = importlib.import_module("pyro_vae.refinement.refine")
    monkeypatch.setattr(module, "starts_of", search)
    with pytest.raises(KeyboardInterrupt):
        pv.refine(model, guide, X, seed=0, progress=False)
    assert model.runs <= 11


def test_another_guide_of_a_model_takes_runs_for_its_modes_alone(pair):
    model, guide = pair
    first = Evaluator(model, guide, as_batch(X), seed=0)
    local = pv.LocalGuide(model, num_data=20, example=first.pair.looks)
    before = model.runs
    second = Evaluator(model, local, as_batch(X), seed=0, like=first)
    assert model.runs <= before + 4
    assert second.modes == first.modes == {"guide": "plate", "model": "plate"}


class Doubled(nn.Module):
    """Doubles in training mode."""

    def forward(self, x):
        return 2 * x if self.training else x


def test_a_mode_that_is_read_is_seen():
    plain, moody = nn.Linear(1, 1), Doubled()
    with evaluation(plain, moody), mode_reads() as read:
        moody(plain(torch.zeros(1)))
    assert list(read.values()) == [moody]
    assert plain.training and moody.training
    assert "training" not in vars(nn.Module)
