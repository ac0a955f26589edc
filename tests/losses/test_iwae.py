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
from pyro_vae.programs.handlers import LatentScale
from tests.models import MEANS, TABLE, WEIGHTS, NormalModel, encoder, factor_analysis, mixture

X = torch.tensor([0.3, -1.1, 2.0, 0.8, -0.4], dtype=torch.float64)
model = NORMAL = NormalModel(weight=1.5, noise=0.8)
WEIGHT, NOISE = model.weight, model.noise
latent, posterior = model.sites, model.posterior
LOSSES = {
    "pathwise": lambda k, **options: pv.IWAE(k, **options),
    "stl": lambda k, **options: pv.IWAE(k, estimator="stl", **options),
    "dreg": lambda k, **options: pv.IWAE(k, estimator="dreg", **options),
    "wake": lambda k, **options: pv.WakeSleep(k, **options),
}


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.3 * x, 0.7))


def parts(x, num_particles, seed=0):
    """log p(x | z), log p(z), log q(z | x) of the draws that a plate of particles makes."""
    torch.manual_seed(seed)
    q = dist.Normal(0.3 * x, torch.full_like(x, 0.7))
    z = q.rsample((num_particles,))
    likelihood = dist.Normal(WEIGHT * z, NOISE).log_prob(x)
    return likelihood, dist.Normal(torch.zeros_like(z), 1.0).log_prob(z), q.log_prob(z)


def log_weights_by_hand(x, num_particles, seed=0):
    likelihood, prior, proposal = parts(x, num_particles, seed)
    return likelihood + prior - proposal


def value(loss, model, guide, *args, seed=0, **kwargs):
    torch.manual_seed(seed)
    return loss.loss(model, guide, *args, **kwargs)


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


# --- scales ------------------------------------------------------------------------------


def subsampled(x):
    with pyro.plate("data", 200, subsample=x):
        latent(x)


def subsampled_guide(x):
    with pyro.plate("data", 200, subsample=x):
        pyro.sample("z", dist.Normal(0.3 * x, 0.7))


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_the_scale_of_a_subsampled_plate_stands_outside(name, vectorize):
    """200 / 5 times the minibatch's loss, exactly, and unbiased for the whole data."""
    loss = LOSSES[name](6, vectorize_particles=vectorize)
    alone = value(LOSSES[name](6, vectorize_particles=vectorize), model, guide, X)
    assert value(loss, subsampled, subsampled_guide, X) == pytest.approx(40 * alone, rel=1e-12)
    assert value(loss, subsampled, guide, X) == pytest.approx(40 * alone, rel=1e-12)
    wanted = -40 * NORMAL.log_evidence(X).sum().item()
    assert value(loss, subsampled, posterior, X) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_scaled_as_the_loss_is(name):
    def gradient(model, scale_guide):
        torch.manual_seed(0)
        slope = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

        def proposal(x):
            with pyro.plate("data", 200, subsample=x) if scale_guide else pyro.plate("data", 5):
                pyro.sample("z", dist.Normal(slope * x, 0.7))

        LOSSES[name](6).loss_and_grads(model, proposal, X)
        return slope.grad

    alone = gradient(model, False)
    assert abs(alone) > 0.01
    for scale_guide in (True, False):
        torch.testing.assert_close(
            gradient(subsampled, scale_guide), 40 * alone, rtol=1e-10, atol=0
        )


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "scale",
    [2.5, torch.tensor(2.5).double(), torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0]).double()],
    ids=["number", "scalar tensor", "one for each datum"],
)
def test_a_scale_on_the_model_weighs_the_data(name, vectorize, scale):
    scaled = poutine.scale(model, scale=scale)
    bounds = iwae_bound(log_weights_by_hand(X, 6))
    loss = LOSSES[name](6)
    assert value(loss, scaled, guide, X) == pytest.approx(-(scale * bounds).sum().item(), rel=1e-12)
    loss = LOSSES[name](6, vectorize_particles=vectorize)
    wanted = -(scale * NORMAL.log_evidence(X)).sum().item()
    assert value(loss, scaled, posterior, X) == pytest.approx(wanted, rel=1e-12)
    # What the guide says of scales does not count.
    for other in (scale, 7.0):
        assert value(loss, scaled, poutine.scale(posterior, scale=other), X) == pytest.approx(
            wanted, rel=1e-12
        )


def test_a_scale_on_the_guide_alone_makes_no_difference():
    wanted = value(pv.IWAE(6), model, guide, X)
    for scale in (3.0, torch.arange(1.0, 6.0).double()):
        scaled = poutine.scale(guide, scale=scale)
        assert value(pv.IWAE(6), model, scaled, X) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("factor", [0.3, torch.tensor(0.3).double(), 0.0])
@pytest.mark.parametrize("name", LOSSES)
def test_warm_up_of_the_kl_stands_in_the_weight(name, factor):
    """log w = log p(x | z) + beta (log p(z) - log q(z | x)), the plate's scale outside."""
    likelihood, prior, proposal = parts(X, 6)
    wanted = -iwae_bound(likelihood + factor * (prior - proposal)).sum().item()
    scaled = [LatentScale(factor)(fn) for fn in (model, guide)]
    assert value(LOSSES[name](6), *scaled, X) == pytest.approx(wanted, rel=1e-12)
    both = [LatentScale(factor)(fn) for fn in (subsampled, subsampled_guide)]
    assert value(LOSSES[name](6), *both, X) == pytest.approx(40 * wanted, rel=1e-12)


def test_warm_up_of_the_elbo():
    likelihood, _, _ = parts(X, 6)
    kl = torch.distributions.kl_divergence(
        dist.Normal(0.3 * X, 0.7), dist.Normal(torch.zeros_like(X), 1.0)
    )
    scaled = [LatentScale(0.3)(fn) for fn in (subsampled, subsampled_guide)]
    wanted = -40 * (likelihood.mean(0) - 0.3 * kl).sum().item()
    assert value(pv.ELBO(6), *scaled, X) == pytest.approx(wanted, rel=1e-12)


def test_a_tempered_likelihood_stands_in_the_weight_too():
    """Observed sites of different scales: each within, the plate's scale outside."""

    def tempered(x):
        with pyro.plate("data", 200, subsample=x):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(WEIGHT * z, NOISE), obs=x)
            with poutine.scale(scale=0.1):
                pyro.sample("y", dist.Normal(z, 1.0), obs=x)

    torch.manual_seed(0)
    z = dist.Normal(0.3 * X, torch.full_like(X, 0.7)).rsample((6,))
    log_w = log_weights_by_hand(X, 6) + 0.1 * dist.Normal(z, 1.0).log_prob(X)
    wanted = -40 * iwae_bound(log_w).sum().item()
    assert value(pv.IWAE(6), tempered, guide, X) == pytest.approx(wanted, rel=1e-12)


def drawn_minibatch(fn):
    def run(x):
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            fn(x[rows])

    return run


def drawn_posterior(x):
    precision = 1 + WEIGHT**2 / NOISE**2
    pyro.sample("z", dist.Normal(WEIGHT * x / NOISE**2 / precision, precision**-0.5))


@pytest.mark.parametrize("name", LOSSES)
def test_a_model_that_draws_its_own_minibatch(name):
    """All particles see one minibatch; over the draws the loss is that of all data."""
    loss, pair = LOSSES[name](4), (drawn_minibatch(latent), drawn_minibatch(drawn_posterior))
    found = []
    for seed in range(60):
        found.append(value(loss, *pair, X, seed=seed))
        torch.manual_seed(seed)
        rows = poutine.trace(pair[1]).get_trace(X).nodes["data"]["value"]
        wanted = -2.5 * NORMAL.log_evidence(X[rows]).sum().item()
        assert found[-1] == pytest.approx(wanted, abs=1e-11)
    found = torch.tensor(found)
    error = found.std().item() / math.sqrt(60)
    assert abs(found.mean().item() + NORMAL.log_evidence(X).sum().item()) < 4 * error


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


@pytest.mark.parametrize("name", LOSSES)
def test_a_scale_that_varies_within_a_datum_is_refused(name):
    model, guide, _ = nested(-2)
    scaled = poutine.scale(model, scale=torch.rand(5, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"a scale of shape \(5, 3\), which varies within a datum"):
        LOSSES[name](3, data_plate="data").loss(scaled, guide, ROWS)


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


# --- sleep -------------------------------------------------------------------------------

LOADINGS = torch.tensor([[1.0, 0.3], [0.2, -0.7], [0.5, 0.5], [-1.0, 0.1]], dtype=torch.float64)


def decode(x, obs):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ LOADINGS.T, 0.5).to_event(1), obs=obs)


def sleep_gradients(model, guide_of, args, kwargs=None, seed=0, **options):
    """The sleep-phi gradient by a linear encoder's weights."""
    torch.manual_seed(9)
    weights = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def propose(features):
        with pyro.plate("data", len(features)):
            pyro.sample("z", dist.Normal(features @ weights, 0.6).to_event(1))

    torch.manual_seed(seed)
    loss = pv.WakeSleep(3, insomnia=0.0, **options)
    loss.loss_and_grads(model, guide_of(propose), *args, **(kwargs or {}))
    return weights.grad


@pytest.fixture
def images():
    return torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_the_observed_value_is_found_wherever_it_is(images):
    wanted = sleep_gradients(lambda x: decode(x, x), lambda q: q, (images,))
    assert wanted.abs().min() > 1e-3
    scale = torch.ones(7, 1, dtype=torch.float64)
    cases = {
        "second of the arguments": sleep_gradients(
            lambda s, x: decode(x, x), lambda q: lambda s, x: q(x), (scale, images)
        ),
        "keyword": sleep_gradients(
            lambda s, x=None: decode(x, x),
            lambda q: lambda s, x=None: q(x),
            (scale,),
            {"x": images},
        ),
        "reshaped": sleep_gradients(
            lambda x: decode(x, x.reshape(-1, 4)),
            lambda q: lambda x: q(x.reshape(-1, 4)),
            (images.reshape(7, 2, 2),),
        ),
        "dream=": sleep_gradients(
            lambda x: decode(x, 2 * x - 1),
            lambda q: lambda x: q(2 * x - 1),
            ((images + 1) / 2,),
            dream=lambda values: (values["x"] + 1) / 2,
        ),
        "dream= to several arguments": sleep_gradients(
            lambda s, x: decode(x, 2 * x - 1),
            lambda q: lambda s, x: q(2 * x - 1),
            (scale, (images + 1) / 2),
            dream=lambda values: (scale, (values["x"] + 1) / 2),
        ),
    }
    for name, found in cases.items():
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12, msg=name)


def test_dreams_do_not_depend_on_the_observed_values(images):
    """And the batch is not changed; another seed dreams otherwise."""
    before = images.clone()
    pair = (lambda x: decode(x, x), lambda q: q)
    first = sleep_gradients(*pair, (images,))
    assert torch.equal(images, before)
    torch.testing.assert_close(sleep_gradients(*pair, (images.flip(0),)), first)
    assert (sleep_gradients(*pair, (images,), seed=1) - first).abs().max() > 0.01


def test_sleep_in_a_minibatch_is_scaled(images):
    def subsampled(x):
        with pyro.plate("data", 70, subsample=x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ LOADINGS.T, 0.5).to_event(1), obs=x)

    wanted = sleep_gradients(lambda x: decode(x, x), lambda q: q, (images,))
    found = sleep_gradients(subsampled, lambda q: q, (images,))
    torch.testing.assert_close(found, 10 * wanted, rtol=1e-12, atol=1e-12)


def test_sleep_phases_that_cannot_be_had(images):
    with pytest.raises(
        ValueError, match="which argument of the batch holds the values.*'x'.*dream="
    ):
        sleep_gradients(lambda x: decode(x, 2 * x), lambda q: q, (images,))
    loss = pv.WakeSleep(3, insomnia=0.5)
    pair = (drawn_minibatch(latent), drawn_minibatch(drawn_posterior))
    with pytest.raises(ValueError, match="a sleep phase needs the minibatch as the batch"):
        loss.loss_and_grads(*pair, X)
    pyro.clear_param_store()
    positive = torch.tensor([0.5, 2.0], dtype=torch.float64)

    def log_normal(x):
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.LogNormal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(s, 1.0), obs=x)

    auto = pyro.infer.autoguide.AutoNormal(
        log_normal, create_plates=lambda x: pyro.plate("data", len(x))
    )
    with pytest.raises(ValueError, match="hides .an auxiliary site, or a Delta.; use insomnia=1"):
        pv.WakeSleep(3, insomnia=0.5, vectorize_particles=False).loss_and_grads(
            log_normal, auto, positive
        )


# --- discrete latents --------------------------------------------------------------------

SHIFTS = torch.tensor([-0.5, 1.0], dtype=torch.float64)
CHANCES = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]], dtype=torch.float64)


@pytest.mark.parametrize("insomnia", [1.0, 0.0])
def test_discrete_proposals_learn_the_exact_posterior(insomnia):
    """c in 3 values given an observation in 3: all 9 probabilities within 0.02."""
    logits = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(WEIGHTS))
            pyro.sample("x", dist.Categorical(CHANCES[c]), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=logits[x.long()]))

    # The dreams of a step are as many as its data; a wake phase has K draws for each.
    num_particles, copies = (30, 100) if insomnia == 1 else (10, 300)
    x = torch.arange(3, dtype=torch.float64).repeat(copies)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / 250))
    loss = pv.WakeSleep(num_particles, insomnia=insomnia)
    for _ in range(250):
        optimizer.zero_grad()
        loss.loss_and_grads(model, guide, x)
        optimizer.step()
        schedule.step()
    joint = WEIGHTS[:, None] * CHANCES
    exact = (joint / joint.sum(0)).T
    torch.testing.assert_close(torch.softmax(logits.detach(), -1), exact, rtol=0, atol=0.02)
    evidence = joint.sum(0).log().sum().item() * copies
    assert value(loss, model, guide, x) == pytest.approx(-evidence, rel=1e-3)


def test_bernoulli_proposals_learn_the_exact_posterior():
    """Values that are floats, and a wake phase with K = 20 only: within 0.03."""
    levels = torch.tensor([-1.0, 0.2, 1.5], dtype=torch.float64)
    x = levels.repeat(80)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(torch.full_like(x, 0.3)))
            pyro.sample("x", dist.Normal(2 * c - 1, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(logits=logits[torch.searchsorted(levels, x)]))

    optimizer = torch.optim.Adam([logits], lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / 200))
    loss = pv.WakeSleep(20)
    for _ in range(200):
        optimizer.zero_grad()
        loss.loss_and_grads(model, guide, x)
        optimizer.step()
        schedule.step()
    exact = torch.sigmoid(2 * levels + math.log(0.3 / 0.7))
    torch.testing.assert_close(torch.sigmoid(logits.detach()), exact, rtol=0, atol=0.03)


def nothing(x):
    pass


@pytest.mark.parametrize("num_particles", [1, 4])
@pytest.mark.parametrize("make", [pv.ELBO, pv.IWAE])
def test_a_discrete_latent_left_out_is_summed_out(make, num_particles):
    wanted = -mixture.log_evidence(X).sum().item()
    assert value(make(num_particles), mixture, nothing, X) == pytest.approx(wanted, rel=1e-12)
    told = pv.explain(make(num_particles), mixture, nothing, X)
    assert told == {"c": "summed out: discrete, and not proposed by the guide"}


def mixed(x, subsample=False):
    plate = pyro.plate("data", 200, subsample=x) if subsample else pyro.plate("data", len(x))
    with plate:
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        c = pyro.sample("c", dist.Categorical(WEIGHTS))
        pyro.sample("x", dist.Normal(MEANS[c] + z, 1.0), obs=x)


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
    for loss in (
        pv.ELBO(num_particles, **options),
        pv.ELBO(num_particles, kl="sample", **options),
    ):
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


@pytest.mark.parametrize("num_particles", [1, 3])
def test_a_proposal_that_depends_on_one_summed_out_is_refused(num_particles):
    def guide(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(MEANS[c], 1.0))

    with pytest.raises(
        ValueError, match=r"site 'z' depends on \['c'\], which ask to be enumerated"
    ):
        pv.IWAE(num_particles).loss(mixed, guide, X)


# --- the variance that is learned ----------------------------------------------------------


def trained_variance(exact, x, loss, steps, lr=0.05):
    """Variances [N, L] of a diagonal Gaussian for each datum, after training."""
    torch.manual_seed(0)
    guide = pv.LocalGuide(exact, num_data=len(x), example=x)
    optimizer = torch.optim.Adam(guide.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.005 ** (1 / steps))
    for _ in range(steps):
        optimizer.zero_grad()
        loss.loss_and_grads(exact, guide, x)
        optimizer.step()
        schedule.step()
    trace = poutine.trace(guide).get_trace(x)
    return trace.nodes["z"]["fn"].variance.detach()


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_variance_that_a_diagonal_guide_learns(direction):
    """On a correlated posterior: ELBO, 1 / diag of the precision; wake-phi, the variance; 1 %."""
    exact = factor_analysis(latents=2, features=2, seed=10)
    covariance = torch.linalg.inv(exact.posterior_precision)
    reverse, forward = 1 / exact.posterior_precision.diagonal(), covariance.diagonal()
    assert (forward / reverse).min() > 1.2  # far apart
    torch.manual_seed(0)
    x = exact.data(3)
    if direction == "reverse":
        found = trained_variance(exact, x, pv.ELBO(1000), 500)
    else:
        found = trained_variance(exact, x, pv.WakeSleep(4000), 400)
    wanted = reverse if direction == "reverse" else forward
    torch.testing.assert_close(found, wanted.expand_as(found), rtol=0.01, atol=0)


@pytest.mark.slow
def test_the_variance_that_sleep_learns():
    """An encoder that can be exact in its mean: the posterior's variances within 1 %."""
    exact = factor_analysis(latents=2, features=2, seed=10)
    weights = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    log_scale = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ weights + bias, log_scale.exp()).to_event(1))

    optimizer = torch.optim.Adam([weights, bias, log_scale], lr=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.005 ** (1 / 500))
    loss, x = pv.WakeSleep(1, insomnia=0.0), torch.zeros(2000, 2, dtype=torch.float64)
    for _ in range(500):
        optimizer.zero_grad()
        loss.loss_and_grads(exact, guide, x)
        optimizer.step()
        schedule.step()
    covariance = torch.linalg.inv(exact.posterior_precision)
    found = (2 * log_scale.detach()).exp()
    torch.testing.assert_close(found, covariance.diagonal(), rtol=0.01, atol=0)


def test_scales_that_differ_in_the_last_bit_are_one():
    """A plate of size 3 multiplies a scale by 3 and divides by 3: not the same number."""
    torch.manual_seed(0)
    x, y = torch.randn(4, 1).double(), torch.randn(4, 3).double()
    weight = torch.rand(4, 1).double() + 0.5

    def model(x, y, weight):
        data = pyro.plate("data", 40, subsample=x, dim=-2)
        with data, poutine.scale(scale=weight):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        with data, pyro.plate("features", 3, dim=-1), poutine.scale(scale=weight):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(x, y, weight):
        total = x + y.sum(-1, keepdim=True)
        with pyro.plate("data", 40, subsample=x, dim=-2):
            pyro.sample("z", dist.Normal(total / 5, 5**-0.5))

    covariance = torch.eye(4).double() + 1
    exact = torch.distributions.MultivariateNormal(torch.zeros(4).double(), covariance)
    wanted = -(10 * weight.squeeze(-1) * exact.log_prob(torch.cat([x, y], -1))).sum().item()
    loss = pv.IWAE(5, data_plate="data").loss(model, guide, x, y, weight)
    assert loss == pytest.approx(wanted, rel=1e-12)


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
