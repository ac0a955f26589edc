"""Validation: one number for one pair, and rows that are not finite by name."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from tests.training.fits import exact_elbo, make_data, model, run


def test_validation_is_right_and_the_same_numbers_each_time():
    """Nothing moves at rate 0: one number for all epochs, near the exact ELBO."""
    x, validation = make_data(), make_data(500, seed=5)
    result, guide = run(
        x,
        epochs=3,
        batch_size=40,
        validation_data=validation,
        optim=lambda ps: torch.optim.SGD(ps, lr=0.0),
    )
    values = result.history["validation_elbo"]
    assert values[0] == values[1] == values[2]
    error = result.history["validation_elbo_std_error"][0]
    exact = exact_elbo(guide, validation).mean().item()
    assert values[0] == pytest.approx(exact, abs=5 * error)
    assert 0 < error < 0.1
    assert result.best_epoch == 1


def test_validation_data_for_a_local_guide():
    x = make_data()
    guide = pv.LocalGuide(model, num_data=40, example=x)
    with pytest.raises(ValueError, match="a LocalGuide has parameters for the training data alone"):
        run(x, guide, validation_data=x)


@pytest.mark.parametrize("compile", [False, "replay"])
def test_a_validation_row_that_overflows_is_named(compile):
    def counts(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Poisson(z.exp()).to_event(1), obs=x)

    x = torch.ones(40, 1, dtype=torch.float64)
    held_out = torch.ones(12, 1, dtype=torch.float64)
    held_out[9] = 1e308
    guide = pv.AmortizedGuide(
        counts, nn.Sequential(nn.Linear(1, 2), nn.Tanh()).double(), example=x[:5]
    )
    with pytest.raises(pv.NonFiniteLossError, match=r"validation_data: .* rows 9 \(1 of") as caught:
        run(x, guide, validation_data=held_out, batch_size=8, epochs=2, compile=compile)
    assert caught.value.sites == ["'x' of the model"]
