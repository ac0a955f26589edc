"""Each way in which a guide can be wrong breaks the law of that name."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae import testing
from pyro_vae.programs.batch import as_batch
from pyro_vae.testing.guides import _widths_agree

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


class Wide(Guide):
    """Draws a fifth wider than their density says, at every call."""

    by = 1.2

    def proposal(self, loc, scale):
        class Drawn(dist.Normal):
            def rsample(drawn, sample_shape=()):  # noqa: N805
                return loc + self.by * (super().rsample(sample_shape) - loc)

            def expand(drawn, batch_shape, _instance=None):  # noqa: N805
                return self.proposal(loc.expand(batch_shape), scale.expand(batch_shape))

        return Drawn(loc, scale)


class Narrow(Wide):
    by = 0.8


BROKEN = {
    Wide: "draws are as wide as their density: draws of z are about 1.[12]",
    Narrow: "draws are as wide as their density: draws of z are about 0.[78]",
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
    assert len(found.kept) == 6
    assert all(torch.equal(before[n], value) for n, value in guide.state_dict().items())


def test_a_guide_of_all_data_jointly():
    def whole(x):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    guide = pv.LocalGuide(whole, num_data=1, example=X, data_plate=False)
    assert len(testing.check_guide(whole, guide, X, data_plate=False).kept) == 6


MIXTURE = dist.Categorical(torch.tensor([0.3, 0.7]))
TWO_FAR_APART = dist.MixtureSameFamily(
    MIXTURE, dist.Normal(torch.tensor([-30.0, 5.0]), torch.tensor([0.1, 2.0]))
)
SKEW = torch.tensor([[1.0, 0.0, 0.0], [0.99, 0.1, 0.0], [-3.0, 0.5, 2.0]])
PROPOSALS = {
    "correlated": dist.MultivariateNormal(torch.zeros(3), scale_tril=SKEW),
    "two far apart": TWO_FAR_APART,
    "Student t": dist.StudentT(3.0, 1.0, 2.0),
    "Cauchy": dist.Cauchy(0.0, 1.0),
    "LogNormal": dist.LogNormal(1.0, 1.5),
    "Gamma": dist.Gamma(0.7, 2.0),
    "Beta": dist.Beta(2.0, 0.8),
    "Dirichlet": dist.Dirichlet(torch.tensor([1.0, 4.0, 0.6])),
    "inner plate": dist.Normal(torch.zeros(4), 1.0),
}


@pytest.mark.parametrize("name", PROPOSALS)
def test_widths_of_right_guides_of_any_shape(name):
    """Of another site first, and float32; no false alarm for any number of data."""
    fn = PROPOSALS[name]

    def proposed(x, obs=None):
        with pyro.plate("data", len(x), dim=-2):
            first = pyro.sample("first", dist.Normal(x.unsqueeze(1), 1.0))
            with pyro.plate("inner", 4 if name == "inner plate" else 1, dim=-1):
                pyro.sample("z", fn)
            if obs is not None:
                pyro.sample("x", dist.Normal(first, 1.0), obs=obs.unsqueeze(1))

    def likely(x):
        proposed(x, x)

    for size in (3, 5, 200):
        _widths_agree(likely, proposed, as_batch(torch.linspace(-1, 1, size)), None)


def test_widths_of_one_of_many_sites():
    """The second one alone is off, by a tenth in its unconstrained coordinate."""

    class Drawn(dist.LogNormal):
        def rsample(self, sample_shape=()):
            return super().rsample(sample_shape) ** 1.1

        def expand(self, batch_shape, _instance=None):
            return Drawn(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def off(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(torch.zeros(6), 1.0).to_event(1))
            pyro.sample("b", Drawn(torch.zeros(len(x)), torch.ones(len(x))))

    def likely(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(6), 1.0).to_event(1))
            b = pyro.sample("b", dist.LogNormal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(a.sum(-1), b), obs=x)

    with pytest.raises(testing.LawError, match=r"draws of b are about 1\.(09|1)"):
        _widths_agree(likely, off, as_batch(X.float()), None)


def test_a_function_has_fewer_laws():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    assert len(testing.check_guide(model, guide, X).kept) == 3


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_wrong_one_is_caught(kind):
    with pytest.raises(testing.LawError, match=f"(?m)^- {BROKEN[kind]}"):
        testing.check_guide(model, kind(), X)


def test_an_expected_failure():
    why = {"a gradient reaches every parameter": "spare is for later"}
    found = testing.check_guide(model, Unreached(), X, expected_failures=why)
    assert "spare" in found.expected["a gradient reaches every parameter"]
