"""Modes of particles: the first that agrees with particles one by one."""

from __future__ import annotations

import logging

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.batch import as_batch
from tests.models import NormalModel
from tests.particles.models import ConvModel


def test_a_network_that_takes_no_particles_gets_the_batch_repeated():
    torch.manual_seed(0)
    model, x = ConvModel(), torch.randn(5, 1, 4, 4, dtype=torch.float64)
    guide = pv.AmortizedGuide(model, nn.Flatten(), example=x)
    scorer = Evaluator(model, guide, as_batch(x), seed=0)
    assert scorer.modes == {"guide": "plate", "model": "repeat"}
    by_repeat = pv.log_weights(model, guide, x, num_particles=6, seed=0)
    (chunk,) = scorer.chunks(6)
    by_hand = [
        poutine.trace(poutine.condition(model.eval(), data={"z": z})).get_trace(x).nodes
        for z in chunk.values["z"]
    ]
    likelihood = torch.stack([n["x"]["fn"].log_prob(x) for n in by_hand])
    torch.testing.assert_close(by_repeat.log_likelihood, likelihood)


def test_a_wrong_broadcast_is_found_and_another_way_taken():
    """Reshaping by the batch size mixes data up, silently, once there are particles."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            location = z.reshape(len(x), -1).flip(-1).reshape(z.shape)
            pyro.sample("x", dist.Normal(location, 1.0).to_event(1), obs=x)

    x = torch.randn(4, 2, dtype=torch.float64)
    guide = pv.AmortizedGuide(model, nn.Linear(2, 3).double(), example=x)
    scorer = Evaluator(model, guide, as_batch(x), seed=0)
    assert scorer.modes == {"guide": "plate", "model": "repeat"}
    with pytest.raises(ValueError, match=r"model's log density .*plate: .*differ"):
        pv.log_weights(model, guide, x, num_particles=2, particles="plate")


def test_falling_back_to_a_loop_says_so(caplog):
    def model(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            if z.ndim != 2 or len(z) != 3:
                raise ValueError("only [3, 2]")
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.zeros(3, 2)
    guide = pv.LocalGuide(model, num_data=3, example=x)
    with caplog.at_level(logging.WARNING):
        pv.log_weights(model, guide, x, num_particles=2)
    assert "the model runs particle by particle" in caplog.text and "only [3, 2]" in caplog.text


def test_a_random_density_is_refused():
    class Dropping(nn.Module):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                noise = torch.randn(len(x))
                pyro.sample("x", dist.Normal(z + noise, 1.0), obs=x)

    model, x = Dropping(), torch.zeros(4)
    guide = pv.LocalGuide(model, num_data=4, example=x)
    with pytest.raises(ValueError, match=r"dropout in training mode"):
        pv.log_weights(model, guide, x, num_particles=2)


def test_one_datum_is_not_repeated():
    model, x = NormalModel(), torch.zeros(3)
    options = {"data_plate": False, "particles": "repeat", "num_particles": 2}
    with pytest.raises(ValueError, match="particles='repeat' needs a data plate to repeat along"):
        pv.log_weights(model, model.posterior, x, **options)
