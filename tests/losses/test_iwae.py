"""Objectives of importance weights, and of summed discrete latents: their values and limits."""

from __future__ import annotations

import contextlib
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae.particles.estimators import iwae_bound
from tests.losses.normal import (
    LOSSES,
    NOISE,
    NORMAL,
    WEIGHT,
    X,
    guide,
    log_weights_by_hand,
    mixed,
    model,
    parts,
    posterior,
    subsampled_guide,
    value,
)
from tests.models import MEANS, TABLE, WEIGHTS, encoder, factor_analysis, mixture

# --- the bound ---------------------------------------------------------------------------


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("num_particles", [1, 2, 7, 100])
@pytest.mark.parametrize("name", LOSSES)
def test_the_evidence_at_the_exact_posterior(name, num_particles, vectorize):
    options = {"insomnia": 0.0} if name == "wake" and num_particles == 1 else {}
    loss = LOSSES[name](num_particles, vectorize_particles=vectorize, **options)
    wanted = -NORMAL.log_evidence(X).sum().item()
    assert value(loss, model, posterior, X) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_the_reduction_of_the_weights_by_hand(name):
    """Of each datum's, not of the batch's: the two differ."""
    wanted = -iwae_bound(log_weights_by_hand(X, 6)).sum().item()
    assert value(LOSSES[name](6), model, guide, X) == pytest.approx(wanted, rel=1e-12)
    of_the_batch = -iwae_bound(log_weights_by_hand(X, 6).sum(1, keepdim=True)).sum().item()
    assert abs(wanted - of_the_batch) > 0.1


def test_the_loss_and_log_weights_agree_on_average():
    """Two routes to one number: within 4 standard errors of 150 draws each."""
    loss = pv.IWAE(5)
    draws = torch.tensor([value(loss, model, guide, X, seed=s) for s in range(150)])
    bounds = torch.tensor(
        [
            -iwae_bound(pv.log_weights(model, guide, X, num_particles=5, seed=s).total).sum()
            for s in range(150)
        ]
    )
    error = math.hypot(draws.std().item(), bounds.std().item()) / math.sqrt(150)
    assert abs(draws.mean().item() - bounds.mean().item()) < 4 * error


def test_the_bound_rises_with_particles_to_the_evidence():
    """Means of 40 losses of 200 replicates of each datum: steps of over 4 standard errors."""
    x = X.repeat(200)
    means, errors = [], []
    for num_particles in (1, 2, 5, 20, 200):
        loss = pv.IWAE(num_particles)
        draws = torch.tensor([-value(loss, model, guide, x, seed=s) / 200 for s in range(40)])
        means.append(draws.mean().item())
        errors.append(draws.std().item() / math.sqrt(40))
    for i in range(4):
        assert means[i + 1] - means[i] > 4 * math.hypot(errors[i], errors[i + 1])
    exact = NORMAL.log_evidence(X).sum().item()
    assert means[-2] < exact
    assert means[-1] == pytest.approx(exact, abs=0.03)
    assert exact - means[-1] < 0.2 * (exact - means[-2])


def test_one_particle_is_the_elbo():
    wanted = value(pv.ELBO(kl="sample"), model, guide, X)
    assert value(pv.IWAE(1), model, guide, X) == pytest.approx(wanted, rel=1e-12)


# --- particles by repeat -----------------------------------------------------------------


class Matrices(nn.Module):
    """A factor analysis whose network takes matrices only, of a scaled, subsampled plate."""

    def __init__(self, exact, scale=1.0, num_data=None):
        super().__init__()
        self.exact, self.scale, self.num_data = exact, scale, num_data

    def forward(self, x, weights=1.0):
        full = len(x) if self.num_data is None else self.num_data
        scale = self.scale * weights
        with pyro.plate("data", full, subsample=x), poutine.scale(scale=scale):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            if z.ndim != 2:
                raise ValueError("matrices only")
            location = z @ self.exact.loadings.T + self.exact.mean
            pyro.sample("x", dist.Normal(location, self.exact.noise).to_event(1), obs=x)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("num_data", [None, 60])
def test_scales_where_the_batch_is_repeated(name, num_data):
    exact = factor_analysis(latents=2)
    torch.manual_seed(0)
    x = exact.data(6)
    loss = LOSSES[name](5)
    found = value(loss, Matrices(exact, 2.0, num_data), exact.posterior, x)
    ((plan, *_),) = loss._plans.values()
    assert plan.mode.name == "repeat"
    times = 2.0 * (1 if num_data is None else 10)
    assert found == pytest.approx(-times * exact.log_evidence(x).sum().item(), rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_the_data_where_the_batch_is_repeated(name):
    exact = factor_analysis(latents=2)
    torch.manual_seed(0)
    x, weights = exact.data(6), torch.linspace(0.5, 3.0, 6, dtype=torch.float64)
    loss = LOSSES[name](5)
    found = value(loss, Matrices(exact), lambda x, weights: exact.posterior(x), x, weights)
    ((plan, *_),) = loss._plans.values()
    assert plan.mode.name == "repeat"
    assert found == pytest.approx(-(weights * exact.log_evidence(x)).sum().item(), rel=1e-12)


# --- masks, plates, one datum ------------------------------------------------------------


@pytest.mark.parametrize("on", ["model", "both"])
@pytest.mark.parametrize("name", LOSSES)
def test_masked_data_count_for_nothing(name, on):
    mask = torch.tensor([True, False, True, True, False])
    masked = poutine.mask(model, mask=mask)
    proposal = poutine.mask(guide, mask=mask) if on == "both" else guide
    wanted = -iwae_bound(log_weights_by_hand(X, 6))[mask].sum().item()
    assert value(LOSSES[name](6), masked, proposal, X) == pytest.approx(wanted, rel=1e-12)


def test_a_masked_observation_leaves_the_prior():
    mask = torch.tensor([True, False, True, True, False])

    def missing(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            with poutine.mask(mask=mask):
                pyro.sample("x", dist.Normal(WEIGHT * z, NOISE), obs=x)

    likelihood, prior, proposal = parts(X, 6)
    wanted = -iwae_bound(likelihood * mask + prior - proposal).sum().item()
    assert value(pv.IWAE(6), missing, guide, X) == pytest.approx(wanted, rel=1e-12)


ROWS = torch.linspace(-2, 2, 15, dtype=torch.float64).reshape(5, 3)


def nested(data_dim, local=True):
    """z [N] and u [N, D], in plates; x [N, D]."""

    def arrange(x):
        return x if data_dim == -2 else x.T

    def model(x):
        with pyro.plate("data", len(x), dim=data_dim):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            with pyro.plate("feature", x.shape[1], dim=-3 - data_dim):
                u = pyro.sample("u", dist.Normal(z, 0.5)) if local else z
                pyro.sample("x", dist.Normal(u, 1.0), obs=arrange(x))

    def guide(x):
        mean = x.mean(1, keepdim=True)
        with pyro.plate("data", len(x), dim=data_dim):
            pyro.sample("z", dist.Normal(arrange(0.5 * mean), 0.6))
            if local:
                with pyro.plate("feature", x.shape[1], dim=-3 - data_dim):
                    pyro.sample("u", dist.Normal(arrange(0.4 * x), 0.8))

    def exact(x):
        variance = 1 / (1 + x.shape[1])
        with pyro.plate("data", len(x), dim=data_dim):
            mean = x.sum(1, keepdim=True) * variance
            pyro.sample("z", dist.Normal(arrange(mean), math.sqrt(variance)))

    return model, guide, exact


def as_events():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            u = pyro.sample("u", dist.Normal(z[..., None].expand(*z.shape, 3), 0.5).to_event(1))
            pyro.sample("x", dist.Normal(u, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x.mean(1), 0.6))
            pyro.sample("u", dist.Normal(0.4 * x, 0.8).to_event(1))

    return model, guide


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_inner_plates_are_summed_within_a_datum(name, vectorize):
    """A data plate at -2 with features at -1 is a plate of vectors, under one seed.

    At -1, with features at -2, the draws lie otherwise: checked by the exact posterior.
    """
    loss = LOSSES[name](4, data_plate="data", vectorize_particles=vectorize)
    wanted = value(LOSSES[name](4, vectorize_particles=vectorize), *as_events(), ROWS)
    assert value(loss, *nested(-2)[:2], ROWS) == pytest.approx(wanted, rel=1e-12)
    covariance = torch.eye(3, dtype=ROWS.dtype) + 1
    evidence = dist.MultivariateNormal(torch.zeros(3).double(), covariance).log_prob(ROWS)
    for data_dim in (-1, -2):
        pair = nested(data_dim, local=False)
        found = value(loss, pair[0], pair[2], ROWS)
        assert found == pytest.approx(-evidence.sum().item(), rel=1e-12)


def test_both_orders_of_plates_are_one_bound():
    """Within 4 standard errors of 150 losses each."""
    draws = {}
    for data_dim in (-1, -2):
        loss = pv.IWAE(4, data_plate="data")
        pair = nested(data_dim)[:2]
        draws[data_dim] = torch.tensor([value(loss, *pair, ROWS, seed=s) for s in range(150)])
    error = math.hypot(*(d.std().item() for d in draws.values())) / math.sqrt(150)
    assert abs(draws[-1].mean() - draws[-2].mean()) < 4 * error


@pytest.mark.parametrize("name", LOSSES)
def test_one_weight_of_all_data(name):
    wanted = -iwae_bound(log_weights_by_hand(X, 6).sum(1, keepdim=True)).sum().item()
    loss = LOSSES[name](6, data_plate=False)
    assert value(loss, model, guide, X) == pytest.approx(wanted, rel=1e-12)


def global_model(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def global_posterior(x):
    n = len(x)
    pyro.sample("mu", dist.Normal(x.sum() / (n + 1), (n + 1) ** -0.5))


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_global_latents_are_one_datum(name, vectorize):
    covariance = torch.eye(5, dtype=X.dtype) + 1
    exact = dist.MultivariateNormal(torch.zeros_like(X), covariance).log_prob(X).item()
    loss = LOSSES[name](6, data_plate=False, vectorize_particles=vectorize)
    assert value(loss, global_model, global_posterior, X) == pytest.approx(-exact, rel=1e-12)


# --- what is refused ---------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "pathwise"])
def test_global_latents_are_refused(name):
    def both(x):
        pyro.sample("mu", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        model(x)

    def both_guide(x):
        pyro.sample("mu", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        guide(x)

    with pytest.raises(
        ValueError, match=r"latent sites \['mu'\] lie outside the data plate 'data'"
    ):
        LOSSES[name](3).loss(both, both_guide, X)
    with pytest.raises(pv.DataPlateError):
        LOSSES[name](3).loss(global_model, global_posterior, X)


@pytest.mark.parametrize("name", LOSSES)
def test_a_subsampled_inner_plate_is_refused(name):
    def inner(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            with pyro.plate("feature", 30, subsample=torch.arange(3), dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def proposal(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.mean(1, keepdim=True), 1.0))

    with pytest.raises(ValueError, match="'feature', of which a datum sees 3 of 30 entries"):
        LOSSES[name](3, data_plate="data").loss(inner, proposal, ROWS)


@pytest.mark.parametrize("name", ["pathwise", "stl", "dreg"])
def test_proposals_that_cannot_be_reparameterized_are_refused(name):
    def proposal(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.3 * x, 0.7).has_rsample_(False))

    with pytest.raises(ValueError, match=r"site 'z' .*cannot be reparameterized.*pv\.WakeSleep"):
        LOSSES[name](3).loss(model, proposal, X)
    assert math.isfinite(pv.WakeSleep(3).loss(model, proposal, X))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pv.IWAE(0), "num_particles=0: a whole number of at least 1"),
        (lambda: pv.IWAE(2.5), "num_particles=2.5: a whole number of at least 1"),
        (lambda: pv.IWAE(3, estimator="score"), "estimator='score': 'pathwise', 'stl' or 'dreg'"),
        (lambda: pv.WakeSleep(1), "num_particles=1: wake-phi needs at least 2"),
        (lambda: pv.WakeSleep(0, insomnia=0.0), "num_particles=0: a whole number of at least 1"),
        (lambda: pv.WakeSleep(3, insomnia=1.5), "insomnia=1.5: a share of wake-phi from 0 to 1"),
        (lambda: pv.WakeSleep(3, insomnia=-0.1), "insomnia=-0.1"),
        (lambda: pv.ELBO(estimator="stl", kl="analytic"), "estimator='stl' needs kl='sample'"),
    ],
)
def test_unknown_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_they_say_what_they_are():
    assert repr(pv.IWAE(5, estimator="dreg")) == "IWAE(num_particles=5, estimator='dreg')"
    assert repr(pv.WakeSleep(5, insomnia=0.5)) == "WakeSleep(num_particles=5, insomnia=0.5)"
    told = pv.explain(pv.IWAE(5), model, guide, X)
    assert told == {"z": "sampled: an importance weight has no analytic part"}


@pytest.mark.parametrize("loss", [pv.IWAE(4, estimator="dreg"), pv.WakeSleep(4, insomnia=0.5)])
def test_in_pyros_svi_and_as_a_module(loss):
    exact = factor_analysis("orthogonal")
    torch.manual_seed(0)
    x = exact.data(6)
    amortized = pv.AmortizedGuide(exact, encoder(6), example=x)
    svi = SVI(exact, amortized, pyro.optim.Adam({"lr": 0.05}), loss=loss)
    before = svi.evaluate_loss(x)
    for _ in range(60):
        svi.step(x)
    assert svi.evaluate_loss(x) < before
    module = loss(exact, amortized)
    amortized.zero_grad()
    module(x).backward()
    assert all(p.grad is not None for p in amortized.parameters())


# --- discrete latents --------------------------------------------------------------------

SHIFTS = torch.tensor([-0.5, 1.0], dtype=torch.float64)


def nothing(x):
    pass


@pytest.mark.parametrize("num_particles", [1, 4])
@pytest.mark.parametrize("make", [pv.ELBO, pv.IWAE])
def test_a_discrete_latent_left_out_is_summed_out(make, num_particles):
    wanted = -mixture.log_evidence(X).sum().item()
    assert value(make(num_particles), mixture, nothing, X) == pytest.approx(wanted, rel=1e-12)
    told = pv.explain(make(num_particles), mixture, nothing, X)
    assert told == {"c": "summed out: discrete, and not proposed by the guide"}


@pytest.mark.parametrize("subsample", [False, True])
def test_a_discrete_latent_beside_a_continuous_one(subsample):
    """By hand, of the same draws of z: the log of the sum over c, then over particles."""
    torch.manual_seed(0)
    q = dist.Normal(0.3 * X, torch.full_like(X, 0.7))
    z = q.rsample((4,))
    prior = dist.Normal(torch.zeros_like(z), 1.0).log_prob(z)
    likelihood = mixture.log_evidence(X - z)
    log_w = likelihood + prior - q.log_prob(z)

    def pair(x):
        return mixed(x, subsample)

    proposal = subsampled_guide if subsample else guide
    scale = 40 if subsample else 1
    for loss, wanted in (
        (pv.ELBO(4, kl="sample"), log_w.mean(0)),
        (pv.ELBO(4, estimator="stl"), log_w.mean(0)),
        (
            pv.ELBO(4),
            likelihood.mean(0)
            - torch.distributions.kl_divergence(q, dist.Normal(torch.zeros_like(X), 1.0)),
        ),
        (pv.IWAE(4), iwae_bound(log_w)),
        (pv.IWAE(4, estimator="dreg"), iwae_bound(log_w)),
        (pv.WakeSleep(4), iwae_bound(log_w)),
    ):
        found = value(loss, pair, proposal, X)
        assert found == pytest.approx(-scale * wanted.sum().item(), rel=1e-12), loss


def test_a_discrete_latent_left_out_is_summed_for_the_gradient_too():
    """dreg with c summed out has no noise where q is p(z | x): a linear-Gaussian c-free fit."""
    exact_weights = WEIGHTS.log()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(WEIGHT * z, NOISE), obs=x)
            c = pyro.sample("c", dist.Categorical(logits=exact_weights))
            pyro.sample("y", dist.Normal(MEANS[c], 1.0), obs=x)

    precision = 1 + WEIGHT**2 / NOISE**2
    slope = torch.tensor(WEIGHT / NOISE**2 / precision, dtype=X.dtype, requires_grad=True)

    def proposal(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, precision**-0.5))

    loss = pv.IWAE(5, estimator="dreg")
    found = loss.loss_and_grads(model, proposal, X)
    wanted = -(NORMAL.log_evidence(X) + mixture.log_evidence(X)).sum().item()
    assert found == pytest.approx(wanted, rel=1e-12)
    assert abs(slope.grad) < 1e-10


LOGITS = torch.tensor([0.5, -0.3, 0.1], dtype=torch.float64)
LOGITS2 = torch.tensor([[0.2, -0.2], [0.4, 0.6], [-1.0, 0.3]], dtype=torch.float64)


def enumerating(logits=LOGITS):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample(
                "c",
                dist.Categorical(logits=logits + 0.2 * x[:, None] * MEANS),
                infer={"enumerate": "parallel"},
            )

    return guide


@pytest.mark.parametrize("num_particles", [1, 3])
def test_a_discrete_proposal_is_enumerated_in_the_elbo(num_particles):
    log_q = torch.log_softmax(LOGITS + 0.2 * X[:, None] * MEANS, -1)
    joint = WEIGHTS.log() + dist.Normal(MEANS, 1.0).log_prob(X[:, None])
    wanted = -(log_q.exp() * (joint - log_q)).sum().item()
    for loss in (pv.ELBO(num_particles), pv.ELBO(num_particles, kl="sample")):
        assert value(loss, mixture, enumerating(), X) == pytest.approx(wanted, rel=1e-12)
    pyros = TraceEnum_ELBO(max_plate_nesting=1).loss(mixture, enumerating(), X)
    assert wanted == pytest.approx(pyros, rel=1e-12)
    # An importance weight sums it out instead.
    evidence = -mixture.log_evidence(X).sum().item()
    found = value(pv.IWAE(num_particles), mixture, enumerating(), X)
    assert found == pytest.approx(evidence, rel=1e-12)


def test_the_gradient_of_an_enumerated_proposal_is_exact():
    logits = LOGITS.clone().requires_grad_()
    found, wanted = [], []
    torch.manual_seed(0)
    for loss, into in (
        (pv.ELBO(), found),
        (pv.ELBO(kl="sample"), found),
        (pv.ELBO(2), found),
        (TraceEnum_ELBO(max_plate_nesting=1), wanted),
    ):
        logits.grad = None
        loss.differentiable_loss(mixture, enumerating(logits), X).backward()
        into.append(logits.grad)
    assert wanted[0].abs().max() > 0.1
    for gradient in found:
        torch.testing.assert_close(gradient, wanted[0], rtol=1e-10, atol=1e-12)


def two_sites(inner=False):
    """c1 per datum, c2 given c1: per datum, or for each of two features in an inner plate."""

    infer = {"enumerate": "parallel"}

    def within(size):
        return pyro.plate("feature", size, dim=-1) if inner else contextlib.nullcontext()

    def model(x):
        with pyro.plate("data", len(x), dim=-2 if inner else -1):
            c1 = pyro.sample("c1", dist.Categorical(WEIGHTS))
            with within(2):
                c2 = pyro.sample("c2", dist.Categorical(TABLE[c1]))
                pyro.sample("x", dist.Normal(MEANS[c1] + SHIFTS[c2], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2 if inner else -1):
            c1 = pyro.sample("c1", dist.Categorical(logits=LOGITS), infer=infer)
            with within(2):
                pyro.sample("c2", dist.Categorical(logits=LOGITS2[c1]), infer=infer)

    return model, guide


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_two_discrete_sites_one_given_the_other(inner, num_particles):
    """Enumerated in the guide: the sum by hand, and Pyro's; left out: the evidence."""
    x = ROWS[:, :2] if inner else X
    columns = x if inner else x[:, None]  # [N, D]
    log_q1, log_q2 = torch.log_softmax(LOGITS, -1), torch.log_softmax(LOGITS2, -1)
    locations = MEANS[:, None] + SHIFTS
    likelihood = dist.Normal(locations, 1.0).log_prob(columns[..., None, None])  # [N, D, 3, 2]
    joint2 = TABLE.log() + likelihood
    gain = (log_q2.exp() * (joint2 - log_q2)).sum(-1).sum(1)  # [N, 3]
    elbo = (log_q1.exp() * (WEIGHTS.log() - log_q1 + gain)).sum()
    model, guide = two_sites(inner)
    options = {"data_plate": "data"} if inner else {}
    for loss in (pv.ELBO(num_particles, **options), pv.ELBO(num_particles, kl="sample", **options)):
        assert value(loss, model, guide, x) == pytest.approx(-elbo.item(), rel=1e-12)
    pyros = TraceEnum_ELBO(max_plate_nesting=2 if inner else 1).loss(model, guide, x)
    assert -elbo.item() == pytest.approx(pyros, rel=1e-12)
    evidence = torch.logsumexp(WEIGHTS.log() + torch.logsumexp(joint2, -1).sum(1), -1).sum()
    for loss in (pv.ELBO(num_particles, **options), pv.IWAE(num_particles, **options)):
        assert value(loss, model, nothing, x) == pytest.approx(-evidence.item(), rel=1e-12)


def test_score_and_enumeration_agree_on_average():
    """Value, and gradient by the logits: within 4 standard errors of 20000 replicates."""
    x = torch.full((20_000,), 0.8, dtype=torch.float64)

    def run(infer, loss):
        logits = LOGITS.expand(len(x), 3).clone().requires_grad_()

        def guide(x, logits):
            with pyro.plate("data", len(x)):
                pyro.sample("c", dist.Categorical(logits=logits), infer=infer)

        def model(x, logits):
            mixture(x)

        torch.manual_seed(0)
        for _ in range(2):
            logits.grad = None
            value = loss.loss_and_grads(model, guide, x, logits)
        return value / len(x), logits.grad

    wanted, exact = run({"enumerate": "parallel"}, pv.ELBO())
    assert exact.std(0).max() < 1e-12
    log_q = torch.log_softmax(LOGITS, -1)
    joint = WEIGHTS.log() + dist.Normal(MEANS, 1.0).log_prob(x[0])
    spread = ((log_q.exp() * (joint - log_q - (-wanted)) ** 2).sum()).sqrt().item()
    for kl in ("analytic", "sample"):
        for num_particles in (1, 4):
            found, draws = run({}, pv.ELBO(num_particles, kl=kl, estimator="score"))
            error = draws.std(0) / math.sqrt(len(x))
            assert ((draws.mean(0) - exact[0]).abs() < 4 * error).all()
            assert abs(found - wanted) < 6 * spread / math.sqrt(len(x) * num_particles)


# --- the variance that is learned ----------------------------------------------------------


def test_a_batch_of_one_datum_that_is_repeated_counts_as_one():
    x = torch.tensor([[0.5, -1.0]]).double()

    def model(x):
        with pyro.plate("data", 1, subsample=x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            if z.ndim != 2:
                raise ValueError("a network of matrices alone")
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", 1, subsample=x):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5).to_event(1))

    wanted = -dist.Normal(torch.zeros(2).double(), 2**0.5).log_prob(x).sum().item()
    for loss in (pv.IWAE(4), pv.ELBO(4, kl="sample")):
        assert loss.loss(model, guide, x) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_a_scale_that_varies_within_a_datum_is_refused(name):
    model, guide, _ = nested(-2)
    scaled = poutine.scale(model, scale=torch.rand(5, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"a scale of shape \(5, 3\), which varies within a datum"):
        LOSSES[name](3, data_plate="data").loss(scaled, guide, ROWS)
