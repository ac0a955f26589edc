"""Each way in which a guide can be wrong breaks the law of that name."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae import testing

X = torch.linspace(-1.0, 2.0, 6, dtype=torch.float64)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


class Guide(nn.Module):
    """A right one; the others change one thing."""

    def __init__(self):
        super().__init__()
        self.numbers = nn.Parameter(torch.tensor([0.5, 0.1, -0.5], dtype=torch.float64))

    def forward(self, x):
        pyro.module("guide", self)
        slope, intercept, log_scale = self.read()
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.proposal(slope * x + intercept, log_scale.exp()))

    def read(self):
        return self.numbers

    def proposal(self, loc, scale):
        return dist.Normal(loc, scale)


class Unreached(Guide):
    def __init__(self):
        super().__init__()
        self.spare = nn.Parameter(torch.zeros((), dtype=torch.float64))


class Detached(Guide):
    def read(self):
        return self.numbers.detach()


class Unsaved(Guide):
    """Counts its training steps in an attribute that no state_dict holds."""

    steps = 0

    def read(self):
        if self.training:
            self.steps += 1
        return self.numbers + 0.1 * self.steps


class NotFinite(Guide):
    def proposal(self, loc, scale):
        return dist.Normal(loc, 1e200 * scale)


class OtherDensity(dist.Normal):
    """Says another density at every call."""

    def log_prob(self, value):
        return super().log_prob(value) + torch.rand(())

    def expand(self, batch_shape, _instance=None):
        return OtherDensity(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


class Noisy(Guide):
    def proposal(self, loc, scale):
        return OtherDensity(loc, scale)


BROKEN = {
    Unreached: "a gradient reaches every parameter",
    Detached: "a gradient reaches every parameter",
    Unsaved: "what is trained is saved",
    NotFinite: "log weights are finite, and the same in chunks",
    Noisy: "particles together are particles alone",
}


def encoder():
    return nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 4)).double()


@pytest.mark.parametrize(
    "make",
    [
        Guide,
        lambda: pv.AmortizedGuide(model, encoder(), example=X),
        lambda: pv.LocalGuide(model, num_data=6, example=X),
    ],
    ids=["own", "amortized", "local"],
)
def test_a_right_one(make):
    torch.manual_seed(0)
    guide = make()
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    found = testing.check_guide(model, guide, X)
    assert len(found.kept) == 5
    assert all(torch.equal(before[n], value) for n, value in guide.state_dict().items())


def test_a_guide_of_all_data_jointly():
    def whole(x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    guide = pv.LocalGuide(whole, num_data=1, example=X, data_plate=False)
    assert len(testing.check_guide(whole, guide, X, data_plate=False).kept) == 5


def test_a_function_has_fewer_laws():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    assert len(testing.check_guide(model, guide, X).kept) == 2


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_wrong_one_is_caught(kind):
    with pytest.raises(testing.LawError, match=f"(?m)^- {BROKEN[kind]}: "):
        testing.check_guide(model, kind(), X)


def test_an_expected_failure():
    why = {"a gradient reaches every parameter": "spare is for later"}
    found = testing.check_guide(model, Unreached(), X, expected_failures=why)
    assert "spare" in found.expected["a gradient reaches every parameter"]
