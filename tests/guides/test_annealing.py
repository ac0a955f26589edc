"""Tests of pyro_vae.guides.annealing: bounds of guides with steps, beside exact evidence."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pyro_vae.families import Annealed, FullRankNormal, Normal
from pyro_vae.particles.evaluator import prepare

N, SIGMA = 4, 0.5


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def data(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def conjugate(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2).to(x), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, SIGMA).to_event(1), obs=x)


def evidence(x):
    return dist.Normal(torch.zeros_like(x), math.sqrt(1 + SIGMA**2)).log_prob(x).sum(-1)


def local(model, x, family, num_data=N, shake=0.1, **options):
    guide = pv.LocalGuide(model, num_data=num_data, example=x, family=family, **options).double()
    with torch.no_grad():
        guide.table += shake * torch.randn_like(guide.table)
    return guide


def check_mean_weight(model, guide, x, log_evidence, num_particles=4000, **options):
    """The mean weight is p(x) within 4 standard errors, for each datum."""
    bound = pv.iwae_bound(model, guide, x, num_particles=num_particles, seed=1, **options)
    assert ((bound.value - log_evidence).abs() < 4 * bound.std_error).all()
    assert (bound.std_error < 0.2).all()


@pytest.mark.parametrize("base", [Normal(), FullRankNormal()], ids=repr)
@pytest.mark.parametrize("num_steps", [1, 3])
def test_the_mean_weight_is_the_evidence(base, num_steps):
    x = data(N, 2)
    guide = local(conjugate, x, Annealed(base, num_steps))
    check_mean_weight(conjugate, guide, x, evidence(x))


@pytest.mark.parametrize("particles", ["plate", "repeat", "loop"])
def test_steps_from_the_exact_posterior_lose_nothing(particles):
    """Every log weight is the log evidence, to rounding, whatever the steps are."""
    x = data(N, 2)
    guide = local(conjugate, x, Annealed(Normal(), 3), shake=1.0)
    width = math.sqrt(SIGMA**2 / (1 + SIGMA**2))
    exact = Normal().initial(x / (1 + SIGMA**2), torch.full_like(x, width))
    with torch.no_grad():
        guide.table[:, :4] = exact.flatten(1)
    options = {"num_particles": 5, "particles": particles, "seed": 0}
    weights = pv.log_weights(conjugate, guide, x, **options).total
    torch.testing.assert_close(weights, evidence(x).expand(5, -1), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_an_encoder_learns_steps_and_the_bound_rises():
    """A base that cannot leave its mean: steps alone move draws to a posterior of correlation."""
    mixing = torch.tensor([[1.0, 0.9], [0.9, 1.0]])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ mixing, 0.4).to_event(1), obs=x)

    x = torch.randn(20, 2) @ (mixing @ mixing + 0.16 * torch.eye(2)).sqrt()
    truth = dist.MultivariateNormal(torch.zeros(2), mixing @ mixing + 0.16 * torch.eye(2)).log_prob(
        x
    )
    gaps = {}
    for name, family in {"base": Normal(), "steps": Annealed(Normal(), 4)}.items():
        torch.manual_seed(0)
        guide = pv.AmortizedGuide(model, nn.Linear(2, 8), example=x, family=family)
        optim = torch.optim.Adam(guide.parameters(), lr=0.03)
        pv.fit(model, guide, x, loss=pv.ELBO(8), optim=optim, max_steps=250, progress=False)
        bound = pv.elbo(model, guide, x, num_particles=1000, seed=0)
        gaps[name] = float(truth.mean()) - bound.mean
        assert gaps[name] > -4 * bound.mean_std_error
    assert gaps["steps"] < gaps["base"] - 0.2


def test_constrained_sites_of_a_datum():
    """Gamma and Beta, by quadrature over both."""

    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, torch.ones(len(x)).to(x)))
            share = pyro.sample("share", dist.Beta(2.0, torch.ones(len(x)).to(x)))
            pyro.sample("x", dist.Poisson(rate * share), obs=x)

    x = torch.tensor([0.0, 1.0, 2.0, 4.0], dtype=torch.float64)
    at = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    rate, share = (at * 30).unsqueeze(1), at.unsqueeze(0)
    density = dist.Gamma(2.0, 1.0).log_prob(rate) + dist.Beta(2.0, 1.0).log_prob(share)
    joint = [density + dist.Poisson(rate * share).log_prob(value) for value in x]
    truth = torch.stack([j.logsumexp((0, 1)) for j in joint]) + math.log(30 / 2000 / 2000)
    check_mean_weight(model, local(model, x, Annealed(Normal(), 2)), x, truth)


def test_latents_that_are_masked_are_not_there():
    """A datum without its second latent has the evidence of a model without it."""
    there = torch.tensor([True, False, True, False])

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(len(x)).to(x), 1.0))
            with poutine.mask(mask=there):
                b = pyro.sample("b", dist.Normal(0.5 * a, 1.0))
            pyro.sample("x", dist.Normal(a + torch.where(there, b, 0.0), SIGMA), obs=x)

    x = data(N)
    variance = torch.where(there, 1.5**2 + 1 + SIGMA**2, 1 + SIGMA**2)
    truth = dist.Normal(0.0, variance.sqrt()).log_prob(x)
    for base in (Normal(), FullRankNormal()):
        check_mean_weight(model, local(model, x, Annealed(base, 2)), x, truth)


def test_discrete_latents_are_summed_out_at_every_step():
    means = torch.tensor([-2.0, 2.0], dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7]).to(x)))
            z = pyro.sample("z", dist.Normal(means[c], 1.0))
            pyro.sample("x", dist.Normal(z, SIGMA), obs=x)

    x = data(N)
    parts = dist.Normal(means, math.sqrt(1 + SIGMA**2)).log_prob(x.unsqueeze(1))
    truth = (parts + torch.tensor([0.3, 0.7]).double().log()).logsumexp(1)
    guide = local(model, x, Annealed(Normal(), 2))
    with torch.no_grad():  # wide over both modes: the prior's middle is at the heavier one
        guide.table[:, :2] = torch.tensor([0.0, 0.9])
    check_mean_weight(model, guide, x, truth)
    assert prepare(model, guide, (x,), None, None, 0)[0].modes["guide"] == "plate"


def test_all_latents_jointly_as_one_datum():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(()).to(x), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, SIGMA), obs=x)

    x = data(3)
    covariance = torch.ones(3, 3).double() + (1 + SIGMA**2) * torch.eye(3).double()
    truth = dist.MultivariateNormal(torch.zeros(3).double(), covariance).log_prob(x)
    guide = local(model, x, Annealed(FullRankNormal(), 2), num_data=1, data_plate=False)
    check_mean_weight(model, guide, x, truth, num_particles=30_000, data_plate=False)


def test_a_minibatch_counts_for_all_data_and_not_in_its_steps():
    """Loss of a minibatch: N / B times that of its rows, at the same draws."""

    def model(x, num_data=N):
        with pyro.plate("data", num_data, subsample=x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).to(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, SIGMA).to_event(1), obs=x)

    x = data(N, 2)
    found, guide = [], local(conjugate, x, Annealed(Normal(), 2))
    for program in (conjugate, model):
        other = pv.LocalGuide(program, num_data=N, example=x, family=guide.family)
        other.load_state_dict(guide.state_dict())
        with other.rows(torch.tensor([1, 3])):
            torch.manual_seed(3)
            found.append(pv.ELBO(2)(program, other)(x[[1, 3]]))
    torch.testing.assert_close(found[1], N / 2 * found[0])


@pytest.mark.slow
def test_refining_finds_the_exact_posterior_and_says_so():
    x = data(N, 2)
    guide = pv.refine(
        conjugate,
        local(conjugate, x, Normal()),
        x,
        family=Annealed(Normal(), 2),
        max_steps=400,
        seed=0,
        progress=False,
    )
    assert guide.converged.all()
    bound = pv.elbo(conjugate, guide, x, num_particles=100, seed=0)
    assert (evidence(x) - bound.value < 0.02).all()


@pytest.mark.slow
def test_comparisons_chains_and_containers_take_it():
    x = data(N, 2)
    guide = local(conjugate, x, Annealed(Normal(), 2), shake=0.1)
    options = {"num_particles": 500, "max_steps": 50, "seed": 0, "progress": False}
    compared = pv.compare(conjugate, {"steps": guide, "base": Normal()}, x, **options).dataset
    for name in ("steps", "base"):
        gap = compared["approximation_gap"].sel(guide=name)
        assert float(gap.mean()) > -4 * float(gap.std())
    chains = pv.ais(conjugate, guide, x, num_steps=20, seed=0, progress=False)
    assert ((chains.value - evidence(x)).abs() < 5 * chains.std_error + 1e-9).all()
    drawn = pv.sample_posterior(conjugate, guide, x, num_draws=200, seed=0, progress=False)
    mean = torch.as_tensor(drawn.draws["z"]).mean((0, 1))
    torch.testing.assert_close(mean, x / (1 + SIGMA**2), rtol=0, atol=0.15)
    tree = pv.to_arviz(conjugate, guide, x, num_draws=20, seed=0)
    assert set(tree["posterior"].data_vars) == {"z"}
    # One rate: the noise of all sites is one draw, of density one.
    rate = pv.rate_distortion(conjugate, guide, x, num_particles=500, seed=0)
    assert rate.dataset.sizes["unit"] == 1


def test_pyros_own_loss_is_the_same_and_no_closed_form_is_taken():
    x = data(N, 2)
    guide = local(conjugate, x, Annealed(Normal(), 2))
    found = []
    for loss in (pv.ELBO(kl="analytic"), pyro.infer.Trace_ELBO(), pyro.infer.TraceMeanField_ELBO()):
        torch.manual_seed(5)
        found.append(torch.as_tensor(loss.loss(conjugate, guide, x)))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_the_gradient_is_that_of_the_bound_at_the_same_noise():
    """By finite differences of the loss, in parameters of base and steps alike."""
    x = data(2, 2)
    guide = local(conjugate, x, Annealed(Normal(), 2), num_data=2)

    def loss():
        torch.manual_seed(7)
        return pv.ELBO(3)(conjugate, guide)(x)

    loss().backward()
    slope, direction = guide.table.grad.clone(), torch.randn_like(guide.table)
    with torch.no_grad():
        guide.table += 1e-5 * direction
        above = loss()
        guide.table -= 2e-5 * direction
        below = loss()
    torch.testing.assert_close((above - below) / 2e-5, (slope * direction).sum(), rtol=1e-6, atol=0)


def test_a_replayed_step_is_an_eager_one():
    x = data(N, 2)
    found = []
    for how in (False, "replay"):
        torch.manual_seed(0)
        guide = local(conjugate, x, Annealed(Normal(), 2))
        loss = pv.CompiledSVI(
            conjugate, guide, pyro.optim.Adam({"lr": 0.01}), pv.IWAE(3), compile=how
        )
        torch.manual_seed(1)
        found.append([loss.step(x) for _ in range(4)] + [guide.table.detach().clone()])
    assert found[0][:-1] == found[1][:-1]
    assert torch.equal(found[0][-1], found[1][-1])


def test_a_state_comes_back():
    x = data(N, 2)
    guide = local(conjugate, x, Annealed(Normal(), 2))
    other = pv.LocalGuide(conjugate, num_data=N, example=x, family=Annealed(Normal(), 2)).double()
    other.load_state_dict(guide.state_dict())
    one, two = (
        pv.log_weights(conjugate, g, x, num_particles=3, seed=0).total for g in (guide, other)
    )
    assert torch.equal(one, two)


def test_a_guide_keeps_the_models_parameters_to_the_model():
    model = pv.zoo.VAE(3, 2, hidden=[4])
    guide = pv.AmortizedGuide(
        model, nn.Linear(3, 5), example=torch.zeros(2, 3), family=Annealed(Normal(), 2)
    )
    owned = set(map(id, model.parameters()))
    assert not owned & set(map(id, guide.parameters()))


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        return 3 * z**2 * grad


def _observing(of_z):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(of_z(z), 1.0), obs=x)

    return model


def test_what_steps_cannot_follow_is_refused_by_name():
    x, family = torch.zeros(3), Annealed(Normal(), 2)
    cases = {
        r"\['x'\] depends on the latents and has no derivative": _observing(
            lambda z: torch.as_tensor(z.detach().numpy() ** 2)
        ),
        "an operation without second derivatives": _observing(_Cube.apply),
    }
    for message, model in cases.items():
        with pytest.raises(ValueError, match=message):
            pv.LocalGuide(model, num_data=3, example=x, family=family)

    def drawing(x):
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    with pytest.raises(ValueError, match="draws its own minibatch in plate 'data'"):
        pv.LocalGuide(drawing, num_data=3, example=x, family=family)
    two = pv.zoo.TwoLayerVAE(3, (2, 2), hidden=[3])
    with pytest.raises(ValueError, match="top_down with Annealed"):
        pv.AmortizedGuide(
            two, nn.Linear(3, 4), example=torch.zeros(2, 3), family=family, top_down=True
        )


def test_gradients_that_need_the_density_of_given_draws_are_refused():
    x = data(N, 2)
    guide = local(conjugate, x, Annealed(Normal(), 2))
    for loss in (pv.ELBO(estimator="stl"), pv.IWAE(3, "stl"), pv.IWAE(3, "dreg")):
        with pytest.raises(ValueError, match=r"Annealed.*estimator='pathwise'"):
            loss(conjugate, guide)(x)
    with pytest.raises(ValueError, match=r"Annealed.*wake-sleep needs it"):
        pv.WakeSleep(3)(conjugate, guide)(x)


def test_draws_of_another_guide_have_no_density():
    """NaN, and never that of a draw on another way."""
    x = data(N, 2)
    evaluator, _ = prepare(
        conjugate, local(conjugate, x, Annealed(Normal(), 2)), (x,), None, None, 0
    )
    rows = slice(0, N)
    values, log_guide = evaluator.draw(rows, 5, (0,))
    torch.testing.assert_close(evaluator.score_guide(rows, values), log_guide)
    assert evaluator.score_guide(rows, {"z": values["z"]}).isnan().all()
    assert not evaluator.can_score(evaluator)


def _two_modes(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.5))
        pyro.sample("x", dist.Normal(z**2, 0.5), obs=x)


def _funnel(x):
    with pyro.plate("data", len(x)):
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(0.0, s))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


@pytest.mark.slow
@pytest.mark.parametrize("model", [_two_modes, _funnel])
def test_the_bound_rises_with_the_steps_and_stays_below_the_evidence(model):
    """Evidence by quadrature: over z, and over log s with z integrated by hand."""
    x = torch.tensor([0.3, 1.0])
    at = torch.linspace(-14, 14, 40_001, dtype=torch.float64).unsqueeze(1)
    if model is _two_modes:
        joint = dist.Normal(0.0, 1.5).log_prob(at) + dist.Normal(at**2, 0.5).log_prob(x.double())
    else:
        wide = dist.Normal(0.0, (at.exp() ** 2 + 0.25).sqrt())
        joint = dist.Normal(0.0, 1.0).log_prob(at) + wide.log_prob(x.double())
    truth = joint.logsumexp(0) + math.log(float(at[1] - at[0]))
    gaps, errors = [], []
    for num_steps in (1, 4):
        torch.manual_seed(0)
        family = Annealed(Normal(), num_steps)
        guide = pv.LocalGuide(model, num_data=2, example=x, family=family)
        for rate in (0.05, 0.01):
            optim = torch.optim.Adam(guide.parameters(), lr=rate)
            pv.fit(model, guide, x, loss=pv.ELBO(16), optim=optim, max_steps=250, progress=False)
        bound = pv.elbo(model, guide, x, num_particles=10_000, seed=0)
        assert (bound.value < truth + 4 * bound.std_error).all()
        gaps.append(float(truth.mean()) - bound.mean)
        errors.append(bound.mean_std_error)
    assert gaps[1] < gaps[0] - 4 * sum(errors)
