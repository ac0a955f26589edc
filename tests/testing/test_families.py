"""Each way in which a family can be wrong breaks the law of that name."""

from __future__ import annotations

from dataclasses import dataclass

import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_vae import families, testing


@dataclass(frozen=True)
class Laplace(families.FactorizedFamily):
    """A right one, as a user writes it; the others change one thing."""

    params_per_coordinate = 2

    def marginal(self, params):
        return dist.Laplace(params[..., 0], params[..., 1].exp())

    def from_moments(self, mean, std):
        return torch.stack([mean, (std / 2**0.5).log()], -1)


@dataclass(frozen=True)
class StudentT(families.FactorizedFamily):
    """Right too: no cdf, heavy tails, draws that carry no gradient of the noise."""

    params_per_coordinate = 2

    def marginal(self, params):
        return dist.StudentT(3.0, params[..., 0], params[..., 1].exp())

    def from_moments(self, mean, std):
        return torch.stack([mean, (std / 3**0.5).log()], -1)

    def quantile(self, params, noise):
        level = torch.special.ndtr(noise).numpy()
        return params[..., 0] + params[..., 1].exp() * torch.as_tensor(stats.t.ppf(level, 3.0))


class Half(dist.Laplace):
    """Its density integrates to 1/2."""

    def log_prob(self, value):
        return super().log_prob(value) - 0.6931

    def expand(self, batch_shape, _instance=None):
        return Half(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


class Wide(dist.Laplace):
    """Draws are one and a half times as wide as the density says."""

    def rsample(self, sample_shape=()):
        drawn = super().rsample(sample_shape)
        return self.loc + 1.5 * (drawn - self.loc)

    def sample(self, sample_shape=()):
        with torch.no_grad():
            return self.rsample(sample_shape)

    def expand(self, batch_shape, _instance=None):
        return Wide(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


class Detached(dist.Laplace):
    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape).detach()

    def expand(self, batch_shape, _instance=None):
        return Detached(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


class DoesNotIntegrate(Laplace):
    def marginal(self, params):
        return Half(params[..., 0], params[..., 1].exp())


class DrawsOtherThanItsDensity(Laplace):
    def marginal(self, params):
        return Wide(params[..., 0], params[..., 1].exp())


class DetachedDraws(Laplace):
    def marginal(self, params):
        return Detached(params[..., 0], params[..., 1].exp())


class DetachedScale(Laplace):
    def marginal(self, params):
        return dist.Laplace(params[..., 0], params[..., 1].detach().exp())


class NoiseOtherThanTheMarginal(Laplace):
    def quantile(self, params, noise):
        return params[..., 0] + params[..., 1].exp() * noise


class WrongMoments(Laplace):
    def from_moments(self, mean, std):
        return torch.stack([mean, std.log()], -1)


class NegativeUnits(Laplace):
    def coordinate_units(self, params):
        return params


class HalfGradient(Laplace):
    """Its values are right, and half of the scale's gradient is lost."""

    def marginal(self, params):
        scale = params[..., 1].exp()
        return dist.Laplace(params[..., 0], (scale + scale.detach()) / 2)


class HalfGradientOfDraws(Laplace):
    """The same of rsample alone."""

    def marginal(self, params):
        class Drawn(dist.Laplace):
            def rsample(self, sample_shape=()):
                drawn = super().rsample(sample_shape)
                return (drawn + drawn.detach()) / 2

            def expand(self, batch_shape, _instance=None):
                return Drawn(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

        return Drawn(params[..., 0], params[..., 1].exp())


class Mixes(Laplace):
    """A datum's distribution depends on the other data."""

    def marginal(self, params):
        if params.ndim > 2:
            params = params - 0.1 * params.mean(0)
        return super().marginal(params)


class Moves(Laplace):
    def shifted(self, params, size, shift):
        return params + 0.1 + shift


class NeverResolved(Laplace):
    def is_resolved(self, params, size):
        return super().is_resolved(params, size) & False


class NotFromGaussian(Laplace):
    def from_gaussian(self, mean, scale_tril):
        return self.initial(mean, torch.ones_like(mean))


class Single(Laplace):
    def marginal(self, params):
        return dist.Laplace(params[..., 0].float(), params[..., 1].float().exp())


class Unequal(Laplace):
    def __eq__(self, other):
        return self is other

    __hash__ = object.__hash__


class LooksAhead(families.FullRankNormal):
    """Its conditionals forget what came before."""

    def conditional(self, params, size, before, columns):
        return super().conditional(params, size, torch.zeros_like(before), columns)


BROKEN = {
    DoesNotIntegrate: "the density integrates to one",
    DrawsOtherThanItsDensity: "the score of draws has mean zero",
    DetachedDraws: "a gradient reaches every parameter",
    DetachedScale: "a gradient reaches every parameter",
    NoiseOtherThanTheMarginal: "draws of noise have the density",
    WrongMoments: "moments come back",
    NegativeUnits: "units are positive",
    HalfGradient: "gradients are right",
    HalfGradientOfDraws: "gradients are right",
    Mixes: "each datum is its own",
    Moves: "units are positive",
    NeverResolved: "all coordinates have the right shapes",
    NotFromGaussian: "moments come back",
    Single: "float64 stays",
    Unequal: "equal options make equal families",
    LooksAhead: "the conditionals make the joint",
}


@pytest.mark.parametrize("kind", [Laplace, StudentT])
def test_a_right_one(kind):
    found = testing.check_family(kind())
    assert len(found.kept) == 18 and not found.expected


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_wrong_one_is_caught(kind):
    with pytest.raises(testing.LawError, match=f"(?m)^- {BROKEN[kind]}: "):
        testing.check_family(kind())
