"""Steps: what is said and undone where a loss, a gradient or an update is not finite."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae as pv
from tests.training.fits import exact_elbo, make_data, make_guide, model, parameters_of, run, same


class Breaking(nn.Module):
    """Breaks at a given run in training mode, in the way that is asked for."""

    def __init__(self, how, at):
        super().__init__()
        self.how, self.at, self.runs = how, at, 0
        self.scale = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        pyro.module("breaking", self)
        self.runs += self.training and torch.is_grad_enabled()
        broken = self.runs == self.at
        scale = self.scale.exp()
        if broken and self.how == "overflow":
            scale = (self.scale + 1000.0).exp()
        if broken and self.how == "nan":
            scale = scale * math.nan
        if broken and self.how == "gradient":
            scale = scale + (self.scale - self.scale).sqrt()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("how", "told", "sites"),
    [
        (
            "overflow",
            r"the loss \(inf\) of step 5 is not finite, at sites 'x'",
            ["'x' of the model"],
        ),
        (
            "nan",
            r"the loss of step 5 is not finite, at sites 'x' of the model",
            ["'x' of the model"],
        ),
        ("gradient", "the gradient of step 5 is not finite, though each site's", []),
    ],
)
@pytest.mark.parametrize("loss", [None, Trace_ELBO()])
@pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")  # Pyro's own, before ours
def test_a_step_that_is_not_finite(how, told, sites, loss):
    x = make_data()
    unbroken, sound = make_guide(x), Breaking("not", 0)
    run(x, unbroken, fn=sound, epochs=None, max_steps=4, loss=loss)
    guide, broken = make_guide(x), Breaking(how, 5)
    with pytest.raises(pv.NonFiniteLossError, match=told) as raised:
        run(x, guide, fn=broken, loss=loss)
    assert raised.value.step == 5
    assert raised.value.sites == sites
    assert "keep the parameters of the step before" in str(raised.value)
    assert same(parameters_of(guide), parameters_of(unbroken))
    assert same(parameters_of(broken), parameters_of(sound))
    assert all(p.isfinite().all() for p in [*guide.parameters(), *broken.parameters()])


def test_a_guide_that_is_not_finite_is_named():
    x = make_data()
    guide = make_guide(x)
    with torch.no_grad():
        guide.head.bias[1] = 800.0  # a log scale
    with pytest.raises(pv.NonFiniteLossError, match="'z' of the guide") as raised:
        run(x, guide)
    assert raised.value.step == 1


def test_the_second_look_has_the_same_random_numbers():
    """The scale overflows for a latent beyond 2.5, which few minibatches of 4 hold."""

    def rare(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            scale = torch.where(z > 2.5, math.inf, 1.0)
            pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)

    x = make_data() * 0.0
    optim = {"optim": lambda ps: torch.optim.SGD(ps, lr=0.0)}
    with pytest.raises(pv.NonFiniteLossError, match="loss") as raised:
        run(x, fn=rare, batch_size=4, epochs=100, **optim)
    assert raised.value.step > 5
    assert raised.value.sites == ["'x' of the model"]


def test_an_update_that_overflows_is_taken_back():
    """A rate that makes the parameters themselves infinite at step 4, in epoch 2."""
    x = make_data()
    guide, rates = make_guide(x), []
    kept = []

    def optim(parameters):
        rates.append(torch.optim.SGD(parameters, lr=1e-3))
        return rates[0]

    def grow(told):
        kept.extend(parameters_of(guide))
        rates[0].param_groups[0]["lr"] = math.inf

    with pytest.raises(pv.NonFiniteLossError, match="keep the parameters of the end of epoch 1"):
        run(x, guide, optim=optim, callbacks=[grow])
    assert same(parameters_of(guide), kept)


def test_another_error_in_a_step_passes_with_the_step_noted():
    class Failing(Trace_ELBO):
        def loss_and_grads(self, *args, **kwargs):
            raise RuntimeError("of the loss")

    with pytest.raises(RuntimeError, match="of the loss") as raised:
        run(make_data(), loss=Failing())
    assert raised.value.__notes__ == ["in step 1 of training"]


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
