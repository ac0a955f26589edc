"""Evaluation: chunks and particles change nothing; plates, scales and masks; guides of any make."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormalMessenger
from pyro.infer.autoguide.initialization import init_to_value
from torch import nn

import pyro_vae as pv
from pyro_vae.particles.evaluator import Evaluator, prepare
from pyro_vae.programs.batch import as_batch
from tests.models import (
    NormalModel,
    encoder,
    factor_analysis,
    log_normal_evidence,
    log_normal_model,
)
from tests.particles.models import ConvModel

X300 = torch.randn(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def exact():
    model = factor_analysis()
    torch.manual_seed(1)
    return model, model.data(7)


# --- chunks and seeds change nothing -------------------------------------------------


@pytest.mark.parametrize("num_data", [3, 300])
def test_chunk_size_changes_no_result(num_data):
    model = factor_analysis()
    x = model.data(num_data)
    guide = pv.AmortizedGuide(model, encoder(6), example=x)
    whole = pv.log_weights(model, guide, x, num_particles=70, seed=3, chunk_size=10**6)
    assert whole.total.shape == (70, num_data)
    for chunk_size in (1000, 64, 7) if num_data == 3 else (40_000, 5000, 100):
        part = pv.log_weights(model, guide, x, num_particles=70, seed=3, chunk_size=chunk_size)
        torch.testing.assert_close(part.total, whole.total, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(part.log_guide, whole.log_guide, rtol=1e-12, atol=1e-12)


def test_blocks_in_turn_with_all_their_particles():
    model = NormalModel()
    evaluator, given = prepare(model, model.posterior, (X300,), None, None, 0)
    assert given == {}
    rows, particles = [], []
    for block in evaluator.blocks(50, 20):
        chunks = list(block)
        assert len({(c.rows.start, c.rows.stop) for c in chunks}) == 1
        rows.append(chunks[0].rows)
        particles.append(sum(c.weights.num_particles for c in chunks))
        wanted = model.log_evidence(X300[chunks[0].rows])
        for chunk in chunks:
            assert (chunk.weights.total - wanted).abs().max() < 1e-9
    assert particles == [50] * len(rows)
    assert [r.start for r in rows] == [0, *(r.stop for r in rows[:-1])]
    assert rows[-1].stop == 300 and len(rows) > 1


# --- draws of the prior ----------------------------------------------------------------


@pytest.mark.parametrize("particles", ["plate", "repeat", "loop"])
def test_the_prior_is_drawn_given_the_values_observed_before(particles):
    """z ~ Normal(first, 1) of an observed first number: to 4.5 standard errors of 500 draws."""

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(x.new_tensor([0.5, 0.5])))
            first = pyro.sample("first", dist.Normal(x.new_tensor([-1.0, 1.0])[c], 3.0), obs=x)
            z = pyro.sample("z", dist.Normal(first, 1.0))
            pyro.sample("second", dist.Normal(z, 1.0), obs=2 * x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    x = torch.tensor([-30.0, 0.0, 50.0], dtype=torch.float64)
    evaluator = Evaluator(model, guide, as_batch(x), particles=particles, seed=0)
    before = torch.get_rng_state()
    values = evaluator.draw_prior(slice(0, 3), 500, (1,))
    assert torch.equal(torch.get_rng_state(), before)
    z = evaluator.single_values(values)["z"]
    assert z.shape == (500, 3)
    error = z.std(0) / 500**0.5
    assert ((z.mean(0) - x).abs() < 4.5 * error).all() and ((z.std(0) - 1).abs() < 0.15).all()
    again = evaluator.draw_prior(slice(0, 3), 500, (1,))["z"]
    assert torch.equal(again, values["z"])
    some = evaluator.single_values(evaluator.draw_prior(slice(1, 3), 20, (2,)))["z"]
    assert some.shape == (20, 2) and ((some.mean(0) - x[1:]).abs() < 2).all()


# --- how particles are run -------------------------------------------------------------


def test_evaluation_leaves_batch_norm_and_the_mode_as_they_were():
    model, x = ConvModel().train(), torch.randn(5, 1, 4, 4, dtype=torch.float64)
    guide = pv.AmortizedGuide(model, nn.Flatten(), example=x)
    before = model.net[2].running_mean.clone()
    pv.log_weights(model, guide, x, num_particles=3)
    assert torch.equal(model.net[2].running_mean, before)
    assert model.training and model.net[2].training


def test_dropout_in_a_module_is_switched_off():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(self.drop(z), 1.0), obs=x)

    model, x = Dropping(), torch.zeros(4)
    guide = pv.LocalGuide(model, num_data=4, example=x)
    a, b = (pv.log_weights(model, guide, x, num_particles=2, seed=0) for _ in range(2))
    assert torch.equal(a.total, b.total)


# --- plates, scales, masks ------------------------------------------------------------


def test_plates_inside_the_data_plate_and_at_other_dims():
    """Inner plates are summed; the data plate may stand at another dimension than -1."""

    def model(x):  # x: [N, 3]
        data = pyro.plate("data", len(x), dim=-2)
        with data:
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("features", 3, dim=-1):
                w = pyro.sample("w", dist.Normal(z.expand(*z.shape[:-1], 3), 1.0))
                pyro.sample("x", dist.Normal(w, 0.5), obs=x)

    x = torch.randn(5, 3, dtype=torch.float64)
    guide = pv.AmortizedGuide(model, nn.Linear(3, 4).double(), example=x)
    assert {c.name: c.batch for c in guide.coordinates} == {"z": (1, 1), "w": (1, 3)}
    results = [
        pv.log_weights(model, guide, x, num_particles=6, particles=particles, seed=0).total
        for particles in ("plate", "repeat")
    ]
    torch.testing.assert_close(*results)
    # Exact: marginally x ~ Normal(0, J + (1 + 0.25) I).
    covariance = torch.ones(3, 3) + 1.25 * torch.eye(3)
    evidence = torch.distributions.MultivariateNormal(
        torch.zeros(3, dtype=x.dtype), covariance.double()
    ).log_prob(x)
    refined = pv.refine(model, guide, x, seed=0)
    bound = pv.iwae_bound(model, refined, x, num_particles=20_000, seed=0)
    assert ((bound.value - evidence).abs() < 5 * bound.std_error + 1e-3).all()


def test_a_model_as_one_datum(exact):
    """data_plate=False: one weight for the whole batch, the sum of the data's."""
    model, x = exact
    weights = pv.log_weights(model, model.posterior, x, num_particles=5, data_plate=False)
    assert weights.total.shape == (5, 1)
    torch.testing.assert_close(weights.total, model.log_evidence(x).sum().expand(5, 1))


def test_global_latents_alone_are_one_datum():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def posterior(x):
        n = len(x)
        pyro.sample("mu", dist.Normal(x.sum() / (n + 1), (n + 1) ** -0.5))

    x = torch.randn(10, dtype=torch.float64)
    covariance = torch.eye(10, dtype=x.dtype) + 1
    exact = torch.distributions.MultivariateNormal(torch.zeros_like(x), covariance).log_prob(x)
    weights = pv.log_weights(model, posterior, x, num_particles=6, data_plate=False)
    torch.testing.assert_close(weights.total, exact.expand(6, 1))
    with pytest.raises(pv.DataPlateError, match=r"no local latents.*\['mu'\].*data_plate=False"):
        pv.log_weights(model, posterior, x, num_particles=6)


def test_global_latents_beside_local_ones_are_refused_by_name():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    x = torch.zeros(4)
    with pytest.raises(ValueError, match=r"\['mu'\] lie outside the data plate 'data'"):
        pv.log_weights(model, guide, x, num_particles=2)
    values = {"mu": torch.tensor(0.3)}
    fixed = poutine.block(pyro.condition(model, data=values), hide=list(values))

    def local_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + 0.3) / 2, 0.5**0.5))

    weights = pv.log_weights(fixed, local_guide, x, num_particles=2)
    evidence = torch.distributions.Normal(0.3, 2**0.5).log_prob(x)
    torch.testing.assert_close(weights.total, evidence.expand(2, 4))


# --- guides of any make -----------------------------------------------------------------


def test_a_delta_with_its_density_counts():
    """AutoNormal on a constrained support: the density is in the Delta and an auxiliary site."""
    x = torch.tensor([3.0, 0.5, 1.0], dtype=torch.float64)
    guide = pyro.infer.autoguide.AutoNormal(
        log_normal_model, init_scale=1.0, create_plates=lambda x: pyro.plate("data", len(x))
    )
    bound = pv.iwae_bound(log_normal_model, guide, x, num_particles=20_000, seed=0)
    exact = torch.tensor([log_normal_evidence(v) for v in x.tolist()], dtype=torch.float64)
    assert ((bound.value - exact).abs() < 4 * bound.std_error).all()
    assert (bound.std_error < 0.05).all()


def test_draws_that_are_a_parameter_of_the_guide_are_constants():
    """A point is drawn as it is; no operation has been there to leave its gradient out."""
    x = torch.tensor([0.5, 2.0])
    guide = pyro.infer.autoguide.AutoDelta(log_normal_model)
    pv.fit(log_normal_model, guide, x, max_steps=1, progress=False)
    evaluator, _ = prepare(log_normal_model, guide, (x,), None, None, 0)
    values, _ = evaluator.draw(slice(0, 2), 3, (1,))
    assert not any(value.requires_grad for value in values.values())


def test_sites_that_the_guide_observes_are_no_proposals():
    model = factor_analysis()
    x = model.data(4)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x, 3.0).to_event(1), obs=x)
            pyro.sample(
                "z",
                dist.MultivariateNormal(
                    model.posterior_mean(x), precision_matrix=model.posterior_precision
                ),
            )

    weights = pv.log_weights(model, guide, x, num_particles=3)
    torch.testing.assert_close(weights.total, model.log_evidence(x).expand(3, 4))


def test_a_hand_written_pair_in_the_param_store():
    torch.manual_seed(0)
    decoder, head = nn.Linear(2, 5), nn.Linear(5, 4)

    def model(x):
        pyro.module("decoder", decoder)
        scale = pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), scale).to_event(1), obs=x)

    def guide(x):
        pyro.module("head", head)
        location, log_scale = head(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(location, log_scale.exp()).to_event(1))

    x = torch.randn(6, 5)
    weights = pv.log_weights(model, guide, x, num_particles=50, seed=0)
    repeated = pv.log_weights(model, guide, x, num_particles=50, seed=0, particles="repeat")
    assert weights.total.shape == (50, 6)
    torch.testing.assert_close(repeated.total, weights.total)
    with torch.no_grad():  # the guide's density by hand: standard normal noise, scaled
        log_scale = head(x).chunk(2, -1)[1]
        noise = -weights.log_guide.mean(0) - log_scale.sum(-1)
    # Two coordinates of (1 + log 2 pi) / 2 nats each: within 5 standard errors of 50 draws.
    torch.testing.assert_close(noise, torch.full((6,), 2.838), rtol=0, atol=5 / 50**0.5)


def test_two_latent_sites_and_two_observed_ones():
    """Hierarchical latents: the weights are sums over sites, whatever their order."""

    def model(x, y):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
            b = pyro.sample("b", dist.Normal(a, 2.0))
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)
            pyro.sample("y", dist.Normal(b, 0.5), obs=y)

    x, y = torch.randn(2, 5, dtype=torch.float64)
    covariance = torch.tensor([[2.0, 1.0], [1.0, 1 + 4 + 0.25]], dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(torch.zeros(2).double(), covariance).log_prob(
        torch.stack([x, y], -1)
    )
    # The prior is a guide like any other: naive Monte Carlo.
    naive = pv.iwae_bound(
        model, poutine.block(model, hide=["x", "y"]), x, y, num_particles=50_000, seed=0
    )
    assert ((naive.value - exact).abs() < 4 * naive.std_error).all()
    by_name = pv.iwae_bound(
        model, poutine.block(model, hide=["x", "y"]), {"x": x, "y": y}, num_particles=50_000, seed=0
    )
    assert torch.equal(naive.value, by_name.value)


# --- refusals -----------------------------------------------------------------------------


def test_a_model_that_draws_its_own_minibatch_is_refused(exact):
    def model(x):
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"draws its own minibatch in plate 'data'"):
        pv.log_weights(model, guide, torch.zeros(9), num_particles=2)


def test_methods_of_a_module_are_evaluated_in_eval_mode():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(self.drop(z), 1.0), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.drop(x), 1.0))

    both, x = Both(), torch.ones(4)
    a, b = (pv.log_weights(both.model, both.guide, x, num_particles=2, seed=0) for _ in range(2))
    assert torch.equal(a.total, b.total)
    assert both.drop.training


# --- what is not one density per datum -------------------------------------------------


@pytest.mark.parametrize("particles", ["plate", "repeat", "loop"])
def test_a_latent_that_the_model_masks_is_not_there(particles):
    """Masked rows weigh nothing; the others are as in the model without those rows."""
    model = factor_analysis()
    x = model.data(300)  # two blocks
    mask = torch.arange(300) % 3 != 0

    def masked(x, mask):
        with poutine.mask(mask=mask):
            return model(x)

    def guide(x, mask):
        return model.posterior(x)

    found = pv.log_weights(
        masked, guide, x, mask, num_particles=4, particles=particles, chunk_size=100
    )
    assert (found.total[:, ~mask] == 0).all()
    evidence = model.log_evidence(x)[mask].expand(4, -1)
    torch.testing.assert_close(found.total[:, mask], evidence)


def test_partly_observed_data_by_obs_mask():
    """y seen for some data: the bounds are log p of what is seen, by closed form."""

    def model(x, y, seen):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Normal(z, 1.0), obs=y, obs_mask=seen)

    x, y = torch.randn(2, 6, dtype=torch.float64)
    seen = torch.tensor([True, False, True, True, False, False])
    pair = torch.distributions.MultivariateNormal(
        torch.zeros(2).double(), torch.tensor([[2.0, 1], [1, 2]]).double()
    )
    alone = torch.distributions.Normal(0.0, 2**0.5)
    exact = torch.where(seen, pair.log_prob(torch.stack([x, y], -1)), alone.log_prob(x))
    guide = pv.LocalGuide(model, num_data=6, example=(x, y, seen))
    refined = pv.refine(model, guide, x, y, seen, seed=0)
    bound = pv.iwae_bound(model, refined, x, y, seen, num_particles=5000, seed=0)
    assert refined.converged[seen].all()
    # Where y is missing the model has it as a latent of its own, to be integrated out.
    assert ((bound.value - exact).abs() < 5 * bound.std_error + 1e-3).all()


# --- models that take one size of batch ---------------------------------------------------


def test_modules_that_plain_functions_close_over_run_in_eval_mode():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)).double().train()

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            location = net(z.reshape(-1, 2)).reshape(z.shape)
            pyro.sample("x", dist.Normal(location, 1.0).to_event(1), obs=x)

    x = torch.randn(300, 2, dtype=torch.float64)
    guide = pv.AmortizedGuide(model, nn.Linear(2, 3).double(), example=x)
    before = net[1].running_mean.clone()
    a, b = (
        pv.log_weights(model, guide, x, num_particles=4, seed=0, chunk_size=c).total
        for c in (None, 100)
    )
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert torch.equal(net[1].running_mean, before)
    assert net.training
    assert all(module.training for module in net.modules())


def test_a_mask_reaches_the_density_that_a_delta_hides():
    """AutoNormal's proposals are Deltas; the density is at an auxiliary site of another name."""
    seen = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=seen):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    auto = pyro.infer.autoguide.AutoNormal(
        model, create_plates=lambda x: pyro.plate("data", len(x), dim=-1)
    )
    weights = pv.log_weights(model, auto, x, num_particles=4, seed=0)
    assert (weights.total[:, ~seen] == 0).all()
    assert (weights.total[:, seen] != 0).all()

    joint = pyro.infer.autoguide.AutoMultivariateNormal(model)
    with pytest.raises(ValueError, match=r"masks the latent site 'z', but .*AutoMultivariate"):
        pv.ELBO().loss(model, joint, x)


def test_a_masked_factor_counts_where_it_is_seen():
    x, seen = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([True, False, True])

    def model(x: torch.Tensor, seen: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=seen):
                pyro.factor("x", -((z - x) ** 2))

    def guide(x: torch.Tensor, seen: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(2 * x / 3, 3**-0.5))

    weights = pv.log_weights(model, guide, x, seen, num_particles=4)
    # The guide is exact where the factor is seen: the integral of N(z; 0, 1) exp(-(z - x)^2).
    exact = -0.5 * math.log(3) - x**2 / 3
    torch.testing.assert_close(weights.total[:, seen], exact[seen].expand(4, 2))
    assert bool((weights.log_likelihood[:, ~seen] == 0).all())


# --- models without latents, sites outside of plates, draws without names


def test_without_latents_a_log_weight_is_log_p():
    x = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)

    def model(x):
        mean = pyro.param("mean", torch.tensor(0.5, dtype=x.dtype))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        pass

    exact = dist.Normal(torch.tensor(0.5, dtype=x.dtype), 1.0).log_prob(x)
    weights = pv.log_weights(model, guide, x, num_particles=2)
    torch.testing.assert_close(weights.total, exact.expand(2, -1))
    assert not weights.log_prior.any() and not weights.log_guide.any()
    whole = pv.iwae_bound(model, guide, x, num_particles=3, data_plate=False)
    assert whole.value.item() == pytest.approx(exact.sum().item(), rel=1e-12)
    for loss in (pv.ELBO(), pv.ELBO(3), pv.IWAE(3), pv.WakeSleep(3)):
        assert -loss.loss(model, guide, x) == pytest.approx(exact.sum().item(), rel=1e-12)
    optim = {"optim": lambda p: torch.optim.Adam(p, lr=0.1), "progress": False}
    pv.fit(model, guide, x, loss=pv.IWAE(2), epochs=300, **optim)
    assert pyro.param("mean").item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("events", [0, 1])
@pytest.mark.parametrize("particles", ["plate", "repeat", "loop"])
def test_a_leading_batch_dimension_outside_of_all_plates(events, particles):
    """Legal in Pyro, also where the model indexes it; by the exact posterior all weights agree."""
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x if events else x[:, 0]

    def model(x):
        with pyro.plate("data", len(x)):
            prior = dist.Normal(torch.zeros(1, *x.shape, dtype=x.dtype), 1.0).to_event(events)
            z = pyro.sample("z", prior)
            if particles != "plate":
                z = z[0]
            pyro.sample("x", dist.Normal(z, 1.0).to_event(events), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x / 2)[None], 0.5**0.5).to_event(events))

    exact = dist.Normal(x.new_zeros(()), 2**0.5).log_prob(x)
    exact = exact.sum(-1) if events else exact
    found = pv.log_weights(model, guide, x, num_particles=3, particles=particles).total
    torch.testing.assert_close(found, exact.expand(3, -1))
    for loss in (pv.ELBO(kl="sample"), pv.ELBO(3, kl="sample"), pv.IWAE(2)):
        assert -loss.loss(model, guide, x) == pytest.approx(exact.sum().item(), rel=1e-10)
    pv.to_arviz(model, guide, x, num_draws=2, seed=0)


def with_a_draw_without_a_name(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        f = dist.Normal(z, 0.5).rsample()
        pyro.sample("x", dist.Normal(f, 1.0), obs=x)


def test_a_draw_without_a_name_has_a_mean_over_particles_and_no_weight():
    x = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    q = dist.Normal(x / 2, 0.7)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", q)

    # E[log p(x | f)] with f of variance 0.7^2 + 0.5^2 about x / 2, less the KL.
    squares = (x / 2).square() + 0.7**2 + 0.25
    exact = -0.5 * math.log(2 * math.pi) - 0.5 * squares
    exact = exact - torch.distributions.kl_divergence(q, dist.Normal(torch.zeros(()), 1.0))
    model = with_a_draw_without_a_name
    torch.manual_seed(0)
    draws = torch.tensor([-pv.ELBO(20).loss(model, guide, x) for _ in range(100)]).double()
    assert abs(draws.mean() - exact.sum()) < 4 * draws.std() / 10
    told = "the model draws random numbers outside of sample statements.*pyro.sample.*pv.ELBO"
    for refused in (
        lambda: pv.elbo(model, guide, x),
        lambda: pv.elbo(model, guide, x, particles="plate"),
        lambda: pv.compare(model, {"guide": guide}, x),
        lambda: pv.IWAE(3).loss(model, guide, x),
    ):
        with pytest.raises(ValueError, match=told):
            refused()


@pytest.mark.parametrize("particles", ["plate", "loop"])
def test_a_messenger_guide_of_pyros(particles):
    """It keeps the prior of its sites in the trace: the ELBO by algebra."""
    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)

    model = NormalModel()
    pyro.clear_param_store()
    guide = AutoNormalMessenger(model, init_loc_fn=init_to_value(values={"z": x / 2}))
    guide(x)
    q = dist.Normal(x / 2, 0.1)
    exact = dist.Normal(x / 2, 1.0).log_prob(x) - 0.5 * 0.01
    exact = exact - torch.distributions.kl_divergence(q, dist.Normal(torch.zeros(()), 1.0))
    found = pv.elbo(model, guide, x, num_particles=500, particles=particles, seed=0)
    assert ((found.value - exact).abs() < 4 * found.std_error).all()
    assert -pv.ELBO(3).loss(model, guide, x) == pytest.approx(exact.sum().item(), abs=1.0)
    assert pv.refine(model, guide, x, seed=0).converged.all()


def test_values_by_datum_and_back():
    """The data plate is the inner one of the tensors: [K, 3, N] there, [K, N, 3] by datum."""

    def model(x):
        with pyro.plate("inner", 3, dim=-2), pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    x = X300[:15].reshape(5, 3)
    guide = pv.LocalGuide(model, num_data=5, example=x, data_plate="data").double()
    evaluator, _ = prepare(model, guide, (x,), None, "data", 0)
    values, _ = evaluator.draw(slice(0, 5), 4, (1,))
    single = evaluator.single_values(values)
    assert single["z"].shape == (4, 3, 5)
    by_datum = evaluator.by_datum(values)
    assert by_datum["z"].shape == (4, 5, 3)
    torch.testing.assert_close(evaluator.single_by_datum(by_datum), single)
