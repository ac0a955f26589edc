"""A mask on a latent belongs to the draw that it came with: against algebra and quadrature."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_vae as pv
from pyro_vae.programs.masks import Descendants

X = torch.linspace(-1, 3, 8, dtype=torch.float64)


def t(value):
    return torch.tensor(value, dtype=torch.float64)


def spike_and_slab(inside=False):
    """m says whether h is there: x ~ Normal(m (2 + h), 1)."""

    def model(x):
        with pyro.plate("data", len(x)):
            m = pyro.sample("m", dist.Bernoulli(t(0.4)))
            slab = dist.Normal(t(0.0), 1.0)
            if inside:
                h = pyro.sample("h", slab.mask(m > 0))
            else:
                with poutine.mask(mask=m > 0):
                    h = pyro.sample("h", slab)
            pyro.sample("x", dist.Normal(m * (2.0 + h), 1.0), obs=x)

    return model


def log_joints(x):
    """log p(x, m) for m = 1 and m = 0, h integrated out."""
    slab = math.log(0.4) + dist.Normal(t(2.0), 2**0.5).log_prob(x)
    return slab, math.log(0.6) + dist.Normal(t(0.0), 1.0).log_prob(x)


def proposal(logits, masked=False):
    def guide(x):
        with pyro.plate("data", len(x)):
            m = pyro.sample("m", dist.Bernoulli(logits=logits(x)))
            with poutine.mask(mask=(m > 0) if masked else torch.tensor(True)):
                pyro.sample("h", dist.Normal((x - 2) / 2, 0.5**0.5))

    return guide


def slab_alone(width):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Normal((x - 2) / 2, width))

    return guide


@pytest.mark.parametrize("particles", ["plate", "repeat", "loop"])
@pytest.mark.parametrize("inside", [False, True])
def test_the_exact_posterior_under_a_mask_by_draw_weighs_all_draws_alike(particles, inside):
    slab, spike = log_joints(X)
    guide = proposal(lambda x: log_joints(x)[0] - log_joints(x)[1], masked=not inside)
    found = pv.log_weights(
        spike_and_slab(inside), guide, X, num_particles=20, particles=particles, chunk_size=24
    )
    torch.testing.assert_close(found.total, torch.logaddexp(slab, spike).expand(20, -1))
    whole = pv.log_weights(
        spike_and_slab(inside), guide, X, num_particles=5, data_plate=False
    ).total
    torch.testing.assert_close(whole, torch.logaddexp(slab, spike).sum().expand(5, 1))


def test_results_of_all_kinds_take_the_mask_of_each_draw():
    """ELBO of the guide m ~ Bernoulli(sigmoid(2x - 2)) by a sum of two terms."""
    slab, spike = log_joints(X)
    share = torch.sigmoid(2 * X - 2)
    exact = share * (slab - share.log()) + (1 - share) * (spike - (1 - share).log())
    evidence = torch.logaddexp(slab, spike)
    model, guide = spike_and_slab(), proposal(lambda x: 2 * x - 2, masked=True)
    bound = pv.elbo(model, guide, X, num_particles=2000, seed=0)
    assert ((bound.value - exact).abs() < 5 * bound.std_error + 1e-9).all()
    bound = pv.iwae_bound(model, guide, X, num_particles=2000, seed=0)
    assert ((bound.value - evidence).abs() < 5 * bound.std_error + 1e-3).all()
    compared = pv.compare(model, {"guide": guide}, X, num_particles=500, seed=0)
    log_evidence = torch.as_tensor(compared.dataset["log_evidence"].values)
    assert (log_evidence - evidence).abs().max() < 0.1
    data = pv.to_arviz(model, guide, X, num_draws=500, predictive=False, seed=0)
    weights = torch.as_tensor(data["sample_stats"]["log_weight"].values).reshape(500, 8)
    torch.testing.assert_close(
        (torch.logsumexp(weights, 0) - math.log(500)), evidence, atol=0.1, rtol=0
    )


def test_a_mask_by_a_continuous_latent_in_an_inner_plate():
    """h_d is there where z > d - 1; log p(x) by quadrature over z."""
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    order = torch.arange(2.0).double()

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(t([0.0]), 1.0))
            with pyro.plate("inner", 2, dim=-1), poutine.mask(mask=z > order - 0.5):
                h = pyro.sample("h", dist.Normal(t(0.0), 1.0))
            mean = z + torch.where(z > order - 0.5, h, torch.zeros(()))
            with pyro.plate("again", 2, dim=-1):
                pyro.sample("x", dist.Normal(mean, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True) / 2, 0.8))
            with pyro.plate("inner", 2, dim=-1):
                pyro.sample("h", dist.Normal(x / 2, 0.8))

    z = torch.linspace(-6, 6, 4001).double()[:, None, None]
    width = torch.where(z > order - 0.5, t(1.25), t(0.25)).sqrt()
    terms = dist.Normal(z, width).log_prob(x).sum(-1) + dist.Normal(t(0.0), 1.0).log_prob(z[..., 0])
    exact = torch.logsumexp(terms, 0) + math.log(12 / 4000)
    bound = pv.iwae_bound(model, guide, x, num_particles=20_000, seed=0)
    assert ((bound.value - exact).abs() < 5 * bound.std_error).all()
    assert bound.std_error.max() < 0.05


@pytest.mark.parametrize("inside", [False, True])
def test_a_latent_masked_by_one_that_is_summed_out(inside):
    slab, spike = log_joints(X)
    evidence = torch.logaddexp(slab, spike)
    model, guide = spike_and_slab(inside), slab_alone(1.0)
    bound = pv.iwae_bound(model, guide, X, num_particles=20_000, seed=0)
    assert ((bound.value - evidence).abs() < 5 * bound.std_error + 1e-3).all()
    # log w = log sum_m p(m) p(x | m, h) + log p(h) - log q(h), and its mean by quadrature.
    h = torch.linspace(-9, 9, 6001).double()[:, None]
    likelihood = torch.logaddexp(
        math.log(0.4) + dist.Normal(2 + h, 1.0).log_prob(X),
        math.log(0.6) + dist.Normal(t(0.0), 1.0).log_prob(X),
    )
    q = dist.Normal((X - 2) / 2, 1.0).log_prob(h)
    exact = (q.exp() * (likelihood + dist.Normal(t(0.0), 1.0).log_prob(h) - q)).sum(0) * 18 / 6000
    elbo = pv.elbo(model, guide, X, num_particles=20_000, seed=0)
    assert ((elbo.value - exact).abs() < 5 * elbo.std_error).all()
    for loss in (
        pv.ELBO(2000, kl="sample"),
        pv.ELBO(2000),
        pv.ELBO(100, vectorize_particles=False),
        pv.ELBO(100, estimator="stl"),
    ):
        torch.manual_seed(0)
        assert -loss.loss(model, guide, X) == pytest.approx(exact.sum().item(), abs=0.5)
    for loss in (pv.IWAE(5000), pv.IWAE(5000, estimator="dreg"), pv.WakeSleep(5000)):
        torch.manual_seed(0)
        assert -loss.loss(model, guide, X) == pytest.approx(evidence.sum().item(), abs=0.2)


def test_a_latent_that_no_value_of_a_summed_out_site_lets_be_is_not_there():
    """Its mask is m > 0 and seen: where it was not seen, neither prior nor proposal counts."""
    seen = torch.arange(8) % 2 == 0

    def model(x):
        with pyro.plate("data", len(x)):
            m = pyro.sample("m", dist.Bernoulli(t(0.4)))
            with poutine.mask(mask=(m > 0) & seen):
                h = pyro.sample("h", dist.Normal(t(0.0), 1.0))
            pyro.sample("x", dist.Normal(m * (2.0 + torch.where(seen, h, t(0.0))), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Normal((x - 2) / 2, 1.0))

    alone = math.log(0.4) + dist.Normal(t(2.0), 1.0).log_prob(X)
    exact = torch.logaddexp(alone, log_joints(X)[1])[~seen]
    found = pv.log_weights(model, guide, X, num_particles=3, seed=0)
    torch.testing.assert_close(found.total[:, ~seen], exact.expand(3, -1))
    assert (found.log_guide[:, ~seen] == 0).all() and (found.log_guide[:, seen] != 0).all()


def mixture(masked):
    means = t([-1.0, 2.0])

    def on(fn):
        return fn.mask(torch.tensor([True, True, True])) if masked else fn

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(t(0.3)))
            z = pyro.sample("z", on(dist.Normal(means[c.long()], 1.0)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", on(dist.Normal(x / 2, 1.0)))

    return model, guide


@pytest.mark.parametrize(
    "loss",
    [
        pv.ELBO(kl="sample"),
        pv.ELBO(3),
        pv.IWAE(2),
        pv.IWAE(2, vectorize_particles=False),
        pv.IWAE(3, estimator="dreg"),
        pv.WakeSleep(2),
    ],
    ids=repr,
)
def test_a_proposal_below_a_summed_out_site_counts_once_under_a_mask_of_its_own(loss):
    x = t([0.3, -1.0, 2.0])
    losses = []
    for masked in (False, True):
        torch.manual_seed(0)
        losses.append(loss.loss(*mixture(masked), x))
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    if loss.num_particles == 1:
        model, guide = mixture(False)
        pyros = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)
        torch.manual_seed(0)
        wanted = pyros.loss(pyro.infer.config_enumerate(model), guide, x)
        assert losses[1] == pytest.approx(wanted, rel=1e-12)


def test_a_guide_that_masks_a_draw_that_the_model_keeps_is_refused():
    """In one draw of a thousand, and whichever draw a look happened to see."""

    def guide(x):
        with pyro.plate("data", len(x)):
            m = pyro.sample("m", dist.Bernoulli(t(0.5)))
            u = pyro.sample("u", dist.Uniform(t(0.0), 1.0), infer={"is_auxiliary": True})
            with poutine.mask(mask=(m > 0) & (u > 0.001)):
                pyro.sample("h", dist.Normal((x - 2) / 2, 0.5**0.5))

    with pytest.raises(ValueError, match="masks the latent site 'h' where the model does not"):
        pv.elbo(spike_and_slab(), guide, X, num_particles=5000, seed=0)


@pytest.mark.parametrize("inside", [False, True])
def test_a_sleep_phase_teaches_proposals_that_some_values_mask(inside):
    """For all data h is dreamt from its prior: the mean gradient by hand, 4 standard errors."""
    loc = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Normal(loc.expand(len(x)), 1.0))

    loss, found = pv.WakeSleep(1, insomnia=0.0), []
    torch.manual_seed(0)
    for _ in range(200):
        loc.grad = None
        loss.differentiable_loss(spike_and_slab(inside), guide, X).backward()
        found.append(loc.grad)
    gradients = torch.stack(found)
    assert abs(gradients.mean() - len(X) * 0.5) < 4 * gradients.std() / 200**0.5
    assert gradients.std() / 200**0.5 < 0.3  # a mask by what is dreamt would say 1.6 for 4


@pytest.mark.slow
@pytest.mark.parametrize("loss", [pv.ELBO(), pv.IWAE(4, "dreg")], ids=repr)
@pytest.mark.parametrize("masked", [False, True])
def test_traced_steps_take_the_same_masks(loss, masked):
    """150 steps, eager and replayed: the same losses, and no bound above log p(x) at their end."""
    x = t([0.3, -1.0, 2.0])
    model, _ = mixture(masked) if masked else (spike_and_slab(), None)
    name = "z" if masked else "h"

    def guide(x):
        loc = pyro.param("loc", torch.zeros_like(x))
        scale = pyro.param("scale", torch.ones_like(x), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            fn = dist.Normal(loc, scale)
            pyro.sample(name, fn.mask(torch.tensor([True] * 3)) if masked else fn)

    runs = []
    for compiled in (False, "replay"):
        pyro.clear_param_store()
        torch.manual_seed(0)
        optim = pyro.optim.Adam({"lr": 0.02})
        svi = pv.CompiledSVI(model, guide, optim, loss=loss, compile=compiled)
        runs.append([svi.step(x) for _ in range(150)])
        assert svi.mode == ("replayed" if compiled else "eager")
    assert runs[0] == pytest.approx(runs[1], rel=1e-10)
    if masked:
        terms = [
            math.log(w) + dist.Normal(t(c), 2**0.5).log_prob(x)
            for w, c in ((0.7, -1.0), (0.3, 2.0))
        ]
    else:
        terms = log_joints(x)
    evidence = torch.logsumexp(torch.stack(list(terms)), 0)
    bound = pv.iwae_bound(model, guide, x, num_particles=20_000, seed=0)
    assert ((bound.value - evidence).abs() < 5 * bound.std_error + 1e-3).all()
    elbo = pv.elbo(model, guide, x, num_particles=20_000, seed=0)
    assert (elbo.value < evidence + 3 * elbo.std_error).all()


# --- what is computed from draws


def test_descendants_are_found_through_views_and_writes_to_them():
    z, data = torch.randn(3), torch.randn(3)
    with Descendants([z]) as found:
        written, untouched = torch.zeros(2, 3), torch.zeros(2, 3)
        written[0] = z.exp()
        of_data = (data > 0) & (data < 1)
        both = of_data & (z > 0)
    assert found.includes(written) and found.includes(both) and found.includes(z[1:])
    assert not found.includes(untouched) and not found.includes(of_data)
    assert not found.includes(None) and not found.read


def test_a_number_read_out_of_a_descendant_is_noted():
    z, data = torch.ones(3), torch.ones(3)
    with Descendants([z]) as found:
        assert bool((data > 0).all()) and not found.read
        assert bool((z.exp() > 0).all())
    assert found.read
