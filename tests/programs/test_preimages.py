"""Draws at the edge of a support: densities against 400 digits, bounds against exact evidence."""

from __future__ import annotations

import math
from typing import ClassVar

import mpmath as mp
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td
from torch.distributions import constraints

import pyro_vae as pv
from pyro_vae.programs.preimages import Preimage, density

F64 = torch.float64
A, B = mp.mpf("0.25"), mp.mpf(3)


def scalar(value):
    return torch.tensor(float(value), dtype=F64)


def sigmoid(z):
    return 1 / (1 + mp.e ** (-z))


def log_norm(z):
    return -(z**2) / 2 - mp.log(2 * mp.pi) / 2


POSITIVE = {
    "Gamma": (
        dist.Gamma(scalar(A), scalar(B)),
        lambda v: A * mp.log(B) + (A - 1) * mp.log(v) - B * v - mp.loggamma(A),
    ),
    "InverseGamma": (
        dist.InverseGamma(scalar(A), scalar(B)),
        lambda v: A * mp.log(B) - (A + 1) * mp.log(v) - B / v - mp.loggamma(A),
    ),
    "LogNormal": (
        dist.LogNormal(scalar(A), scalar(B)),
        lambda v: log_norm((mp.log(v) - A) / B) - mp.log(B) - mp.log(v),
    ),
    "Weibull": (
        dist.Weibull(scalar(B), scalar(A)),
        lambda v: mp.log(A / B) + (A - 1) * mp.log(v / B) - (v / B) ** A,
    ),
    "HalfCauchy": (
        dist.HalfCauchy(scalar(B)),
        lambda v: mp.log(2 / (mp.pi * B * (1 + (v / B) ** 2))),
    ),
    "Exponential": (dist.Exponential(scalar(B)), lambda v: mp.log(B) - B * v),
}
UNIT = {
    "Beta": (
        dist.Beta(scalar(A), scalar(B)),
        lambda t: (A - 1) * mp.log(t) + (B - 1) * mp.log(1 - t) - mp.log(mp.beta(A, B)),
    ),
    "Kumaraswamy": (
        dist.Kumaraswamy(scalar(A), scalar(B)),
        lambda t: mp.log(A * B) + (A - 1) * mp.log(t) + (B - 1) * mp.log(1 - t**A),
    ),
    "Uniform": (dist.Uniform(scalar(0), scalar(1)), lambda t: 0),
    # A law of the interval that is a mapped one itself.
    "logit-normal": (
        dist.TransformedDistribution(dist.Normal(scalar(A), scalar(B)), td.SigmoidTransform()),
        lambda t: log_norm((mp.log(t / (1 - t)) - A) / B) - mp.log(B * t * (1 - t)),
    ),
}


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("z", [-900.0, -50.0, 0.3, 4.0])
def test_positive_numbers_by_their_logarithm(name, z):
    fn, exact = POSITIVE[name]
    preimage = Preimage(torch.tensor(z, dtype=F64), (td.ExpTransform(),))
    with mp.workdps(400):
        wanted = float(exact(mp.e ** mp.mpf(z)))
    assert density(fn, preimage.value, preimage).item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", UNIT)
@pytest.mark.parametrize("z", [-900.0, -40.0, 0.3, 40.0, 300.0])
def test_shares_by_both_their_logarithms(name, z):
    fn, exact = UNIT[name]
    preimage = Preimage(torch.tensor(z, dtype=F64), (td.SigmoidTransform(),))
    with mp.workdps(400):
        wanted = float(exact(sigmoid(mp.mpf(z))))
    assert density(fn, preimage.value, preimage).item() == pytest.approx(wanted, rel=1e-11)


def sticks(z):
    """Shares that are broken off by torch's convention, and the log determinant."""
    shares, left, slope = [], mp.mpf(1), mp.mpf(0)
    for i, number in enumerate(z):
        share = sigmoid(mp.mpf(number) - mp.log(len(z) - i))
        slope += mp.log(share) + mp.log(1 - share) + mp.log(left)
        shares.append(share * left)
        left *= 1 - share
    return [*shares, left], slope


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("z", [[0.3, -1.0], [60.0, -5.0], [-200.0, 300.0], [30.0, 30.0]])
def test_shares_of_a_whole(dtype, z):
    preimage = Preimage(torch.tensor(z, dtype=dtype), (td.StickBreakingTransform(),))
    alpha = [mp.mpf("0.25"), mp.mpf("0.5"), mp.mpf(2)]
    with mp.workdps(400):
        shares, slope = sticks(z)
        prior = sum((a - 1) * mp.log(y) for a, y in zip(alpha, shares, strict=True))
        prior += mp.loggamma(sum(alpha)) - sum(map(mp.loggamma, alpha))
        proposal = sum(log_norm(mp.mpf(number)) for number in z) - slope
    base = dist.Normal(torch.zeros(2, dtype=dtype), 1.0).to_event(1)
    tolerance = 1e-12 if dtype == F64 else 1e-6
    for fn, wanted in (
        (dist.Dirichlet(torch.tensor([0.25, 0.5, 2.0], dtype=dtype)), prior),
        (dist.TransformedDistribution(base, td.StickBreakingTransform()), proposal),
    ):
        found = density(fn, preimage.value, preimage).item()
        assert found == pytest.approx(float(wanted), rel=tolerance)


@pytest.mark.parametrize("z", [[0.3, -1.0, 0.5], [20.0, 0.1, -0.3], [50.0, -60.0, 3.0]])
def test_correlations(z):
    preimage = Preimage(torch.tensor(z, dtype=F64), (td.CorrCholeskyTransform(),))
    eta = 0.75
    with mp.workdps(400):
        one = [1 - mp.tanh(mp.mpf(number)) ** 2 for number in z]
        slope = sum(map(mp.log, one)) + mp.log(one[1]) / 2
        diagonal = [mp.log(one[0]) / 2, mp.log(one[1] * one[2]) / 2]
        height = sum((2 * (eta - 1) + 3 - i) * d for i, d in zip((2, 3), diagonal, strict=True))
        proposal = sum(log_norm(mp.mpf(number)) for number in z) - slope
    prior = dist.LKJCholesky(3, torch.tensor(eta, dtype=F64))
    at_identity = prior.log_prob(torch.eye(3, dtype=F64)).item()
    guide = dist.TransformedDistribution(
        dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1), td.CorrCholeskyTransform()
    )
    found = density(prior, preimage.value, preimage).item()
    assert found == pytest.approx(float(height) + at_identity, rel=1e-12)
    assert density(guide, preimage.value, preimage).item() == pytest.approx(float(proposal))


# --- through the package


def topic_counts(x):
    with pyro.plate("documents", len(x)):
        shares = pyro.sample("shares", dist.Dirichlet(torch.full((3,), 0.1, dtype=F64)))
        pyro.sample("x", dist.Multinomial(20, shares), obs=x)


def dirichlet_multinomial(x, alpha):
    total = math.lgamma(21) - torch.lgamma(x + 1).sum(1) + torch.lgamma(alpha.sum())
    total = total - torch.lgamma(alpha.sum() + x.sum(1))
    return total + (torch.lgamma(x + alpha) - torch.lgamma(alpha)).sum(1)


COUNTS = torch.tensor([[20.0, 0, 0], [0, 20, 0], [10, 0, 10]], dtype=F64)


@pytest.mark.slow
def test_a_sparse_dirichlet_is_bounded_by_its_evidence():
    exact = dirichlet_multinomial(COUNTS, torch.full((3,), 0.1, dtype=F64))
    guide = pv.LocalGuide(topic_counts, num_data=3, example=COUNTS)
    refined = pv.refine(topic_counts, guide, COUNTS, seed=0, max_steps=400)
    bound = pv.elbo(topic_counts, refined, COUNTS, num_particles=1000, seed=0)
    assert (bound.value < exact + 5 * bound.std_error).all()
    assert (bound.value > exact - 1.5).all()
    wide = pv.iwae_bound(topic_counts, refined, COUNTS, num_particles=20_000, seed=1)
    assert (wide.value < exact + 5 * wide.std_error).all()
    assert (wide.value - exact).abs().max() < 0.2


@pytest.mark.parametrize("family", [pv.families.Normal(), pv.families.FullRankNormal()])
@pytest.mark.parametrize("estimator", ["pathwise", "stl", "dreg"])
def test_losses_at_the_edge(family, estimator):
    """Where all mass of q is so far out that the shares round, log w is still the formula's."""
    guide = pv.LocalGuide(topic_counts, num_data=3, example=COUNTS, family=family)
    with torch.no_grad():
        guide.table[..., :1].fill_(80.0) if guide.table.ndim == 3 else guide.table[:, :2].fill_(80)
    torch.manual_seed(0)
    value = pv.IWAE(5, estimator).loss_and_grads(topic_counts, guide, COUNTS)
    assert math.isfinite(value)
    assert guide.table.grad is not None
    assert guide.table.grad.isfinite().all()
    bound = pv.iwae_bound(topic_counts, guide, COUNTS, num_particles=2000, seed=0)
    assert (bound.value < dirichlet_multinomial(COUNTS, torch.full((3,), 0.1, dtype=F64))).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "prior"),
    [
        (torch.float32, dist.Uniform(0.0, 1.0)),
        (F64, dist.Beta(torch.tensor(1.0), torch.tensor(1.0))),
    ],
)
def test_a_share_refined_from_a_guide_by_hand(dtype, prior):
    """x of 3 coins with one share of heads, 3 heads: p(x) = 1/4, and 1/4, 1/12 for the others."""

    def model(x):
        with pyro.plate("data", len(x)):
            t = pyro.sample("t", prior)
            pyro.sample("x", dist.Binomial(3, t), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            # A share that rounds to one, or to zero, in most of its draws.
            far = dist.Normal(torch.tensor([60.0, 0.0, -60.0], dtype=dtype), 20.0)
            pyro.sample("t", dist.TransformedDistribution(far, td.SigmoidTransform()))

    x = torch.tensor([3.0, 1.0, 0.0], dtype=dtype)
    refined = pv.refine(model, guide, x, seed=0, max_steps=1200)
    found = pv.elbo(model, refined, x, num_particles=2000, seed=0)
    exact = -math.log(4)  # for each number of heads
    assert (found.value < exact + 5 * found.std_error).all()
    assert (found.value > exact - 0.2).all()
    wide = pv.iwae_bound(model, guide, x, num_particles=2000, seed=0)
    assert (wide.value < exact + 5 * wide.std_error.nan_to_num()).all()


class _Horn(dist.TorchDistribution):
    """p(t) = (1 - t)^-0.9 / 10 on the unit interval, by someone who has no log(1 - t)."""

    arg_constraints: ClassVar[dict] = {}
    support = constraints.unit_interval
    has_rsample = False

    def __init__(self, batch_shape=()):
        super().__init__(torch.Size(batch_shape), validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return _Horn(batch_shape)

    def sample(self, sample_shape=()):
        return 1 - torch.rand((*sample_shape, *self.batch_shape), dtype=F64) ** 10

    def log_prob(self, value):
        return math.log(0.1) - 0.9 * (1 - value).log()


def horn(x):
    with pyro.plate("data", len(x)):
        t = pyro.sample("t", _Horn())
        pyro.sample("x", dist.Normal(t, 1.0), obs=x)


def test_a_prior_that_cannot_be_told_at_the_edge_is_refused():
    def guide(x, loc):
        with pyro.plate("data", len(x)):
            far = dist.Normal(torch.full((len(x),), loc, dtype=F64), 1.0)
            pyro.sample("t", dist.TransformedDistribution(far, td.SigmoidTransform()))

    x = torch.zeros(2, dtype=F64)
    assert pv.elbo(horn, lambda x: guide(x, 20.0), x, seed=0).value.isfinite().all()
    with pytest.raises(ValueError, match=r"log p\(z\).*at the edge of a support"):
        pv.elbo(horn, lambda x: guide(x, 40.0), x, seed=0)


def test_draws_of_a_beta_that_round_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            t = pyro.sample("t", dist.Beta(torch.tensor(0.05), torch.tensor(0.05)))
            pyro.sample("x", dist.Bernoulli(t), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("t", dist.Beta(torch.tensor(0.06), torch.tensor(0.06)))

    with pytest.raises(ValueError, match=r"draws of latent site 't' lie at the edge.*float32"):
        pv.iwae_bound(model, guide, torch.ones(3), num_particles=1000, seed=0)
