"""Structures of models that once gave wrong numbers, against brute force."""

from __future__ import annotations

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.poutine import block
from torch import nn
from torch.distributions import AffineTransform, SigmoidTransform

import pyro_vae as pv
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.batch import as_batch
from pyro_vae.refinement.starts import answer_of as start_of
from tests.models import NormalModel

FAMILIES = [
    pv.families.Normal(),
    pv.families.FullRankNormal(),
    pv.families.LowRankNormal(2),
    pv.families.Flow(bins=4, hidden=2),
]
families = pytest.mark.parametrize("family", FAMILIES, ids=repr)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def column_encoder():
    return nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 4)).double()


def perturbed(guide):
    with torch.no_grad():
        guide.table.add_(0.3 * torch.randn_like(guide.table))
    return guide


# --- plates on both sides of the data's -------------------------------------------------------


def both_sides(x):
    left, right = pyro.plate("left", 2, dim=-3), pyro.plate("right", 3, dim=-1)
    with pyro.plate("data", len(x), dim=-2):
        a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
        with left:
            b = pyro.sample("b", dist.Normal(a, 1.0))
            with right:
                c = pyro.sample("c", dist.Normal(b * 0.5, 1.0))
                pyro.sample("x", dist.Normal(c, 0.5), obs=x.transpose(0, 1))
        with right:
            loc = a.unsqueeze(-1).expand(*a.shape, 2)
            d = pyro.sample("d", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("y", dist.Normal(d.sum(-1), 0.5), obs=x[:, 0])


@families
def test_draws_of_noise_are_scored_as_the_joint(family):
    """A site with fewer plates than one before it has its own shape all the same."""
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    guide = perturbed(
        pv.LocalGuide(both_sides, num_data=4, example=x, family=family, data_plate="data")
    )
    evaluator = Evaluator(both_sides, guide, as_batch(x), data_plate="data", seed=0)
    size = guide.num_coordinates
    noise = torch.randn(5, family.num_noise(size), dtype=torch.float64)
    values = guide.from_noise(guide.table, noise)
    found = evaluator.score_guide(slice(0, 4), evaluator.from_single(values))
    z = family.from_noise(guide.table, size, noise.unsqueeze(1).expand(-1, 4, -1))
    joint = family.conditional(guide.table, size, guide.table.new_zeros(4, 0), slice(0, size))
    torch.testing.assert_close(found, joint.log_prob(z), rtol=1e-8, atol=1e-8)
    posterior = pv.to_arviz(both_sides, guide, x, num_draws=2, data_plate="data")["posterior"]
    assert posterior["d"].shape == (1, 2, 4, 3, 2)


# --- supports ---------------------------------------------------------------------------------


def test_an_angle_lives_on_the_circle():
    def model(y):
        with pyro.plate("data", len(y)):
            t = pyro.sample("t", dist.VonMises(y.new_zeros(()), 0.5))
            pyro.sample("y", dist.Normal(t.cos(), 1.0), obs=y)

    y = torch.tensor([-1.0, 0.3, 1.2], dtype=torch.float64)
    grid = torch.linspace(-math.pi, math.pi, 20_001, dtype=torch.float64)[:-1, None]
    joint = dist.VonMises(0.0, 0.5).log_prob(grid) + dist.Normal(grid.cos(), 1.0).log_prob(y)
    exact = joint.logsumexp(0) + math.log(2 * math.pi / 20_000)
    guide = pv.LocalGuide(model, num_data=3, example=y)
    refined = pv.refine(model, guide, y, max_steps=250, seed=0)
    bound = pv.iwae_bound(model, refined, y, num_particles=20_000, seed=1)
    assert ((bound.value - exact).abs() < 4 * bound.std_error + 1e-3).all()

    def on_the_line(y):
        with pyro.plate("data", len(y)):
            pyro.sample("t", dist.Normal(y, 10.0))

    with pytest.raises(ValueError, match="'t' is an angle.*no bound"):
        pv.elbo(model, on_the_line, y)
    with pytest.raises(ValueError, match="'t' is an angle.*no bound"):
        pv.elbo(model, on_the_line, y, data_plate=False)


@pytest.mark.parametrize(
    ("proposal", "refused"),
    [
        (dist.TransformedDistribution(dist.Normal(0.0, 2.0), AffineTransform(0.0, 2.0)), True),
        (dist.Uniform(-10.0, 10.0), True),
        (dist.Uniform(0.0, 2 * math.pi), False),
        (
            dist.TransformedDistribution(
                dist.Normal(0.0, 2.0), [SigmoidTransform(), AffineTransform(-math.pi, 2 * math.pi)]
            ),
            False,
        ),
    ],
    ids=["line", "wide", "round", "squeezed"],
)
def test_an_angle_is_proposed_once_round_its_circle(proposal, refused):
    def model(y):
        with pyro.plate("data", len(y)):
            t = pyro.sample("t", dist.VonMises(y.new_zeros(()), 0.5))
            pyro.sample("y", dist.Normal(t.cos(), 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("t", proposal)

    y = torch.tensor([-1.0, 0.3, 1.2])
    grid = torch.linspace(-math.pi, math.pi, 20_001, dtype=torch.float64)[:-1, None]
    joint = dist.VonMises(0.0, 0.5).log_prob(grid) + dist.Normal(grid.cos(), 1.0).log_prob(y)
    exact = joint.logsumexp(0) + math.log(2 * math.pi / 20_000)
    if refused:
        with pytest.raises(ValueError, match="'t' is an angle.*no bound"):
            pv.iwae_bound(model, guide, y)
    else:
        bound = pv.iwae_bound(model, guide, y, num_particles=20_000, seed=0)
        assert ((bound.value - exact).abs() < 5 * bound.std_error + 1e-3).all()


def test_an_autoguide_of_an_angle_has_no_bound():
    def model(y):
        with pyro.plate("data", len(y)):
            pyro.sample("t", dist.VonMises(y.new_zeros(()), 0.5).expand([len(y)]))
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    y = torch.tensor([-1.0, 0.3, 1.2])
    guide = AutoNormal(model, init_scale=50.0)  # log p(x) + 3 nats, if that were a bound
    with pytest.raises(ValueError, match="'t' is an angle.*no bound"):
        pv.elbo(model, guide, y)


def test_a_support_that_differs_from_datum_to_datum_is_refused():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Uniform(torch.zeros_like(y), 1 + y.abs()))
            pyro.sample("y", dist.Normal(z, 0.3), obs=y)

    y = torch.randn(5, dtype=torch.float64)
    with pytest.raises(ValueError, match="'z' .*support differs from datum to datum"):
        pv.AmortizedGuide(model, column_encoder(), example=y)


@pytest.mark.parametrize(
    "prior",
    [
        dist.Uniform(0.0, 2.0),
        dist.Pareto(1.0, 3.0),
        dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([-1.0, 1.0]), 0.5)
        ),
    ],
    ids=lambda prior: type(prior).__name__,
)
def test_priors_with_bounds_and_mixtures_are_proposed(prior):
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", prior)
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    y = torch.tensor([0.5, 1.5])
    guide = pv.LocalGuide(model, num_data=2, example=y)
    assert guide(y)["z"].shape == (2,)
    assert torch.isfinite(pv.elbo(model, guide, y, num_particles=10, seed=0).value).all()


@pytest.mark.parametrize(
    "prior",
    [dist.Gamma(0.1, 0.1), dist.InverseGamma(0.1, 0.1), dist.Cauchy(0.0, 1.0)],
    ids=lambda prior: type(prior).__name__,
)
def test_a_fresh_guide_of_a_heavy_tailed_prior_trains(prior):
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", prior)
            pyro.sample("y", dist.Normal(z.clamp(-50, 50), 1.0), obs=y)

    y = torch.tensor([0.5, 1.5, 2.0])
    guide = pv.LocalGuide(model, num_data=3, example=y)
    assert pv.elbo(model, guide, y, num_particles=100, seed=0).mean > -5000
    result = pv.fit(model, guide, y, max_steps=20, progress=False)
    assert math.isfinite(result.history["elbo"][-1])


def test_a_prior_that_is_a_point_is_refused():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Delta(y.new_zeros(())))
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    with pytest.raises(ValueError, match="'z': its prior does not vary"):
        pv.LocalGuide(model, num_data=2, example=torch.zeros(2))


def test_shares_at_the_edge_of_the_numbers_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            theta = pyro.sample("theta", dist.Dirichlet(torch.full((10,), 0.02)))
            pyro.sample("x", dist.Poisson(5 * theta).to_event(1), obs=x)

    def by_hand(x):
        with pyro.plate("data", len(x)):
            pyro.sample("theta", dist.Dirichlet(torch.full((10,), 0.02)))

    x = torch.ones(3, 10)
    with pytest.raises(ValueError, match="latent site 'theta' lie at the edge .*Use float64"):
        pv.log_weights(model, by_hand, x, num_particles=1000, seed=0)
    guide = pv.LocalGuide(model, num_data=3, example=x)
    with torch.no_grad():
        guide.table[..., 1] += 3
    # A guide of ours knows what its draws were before they rounded: 10 shares that sum to one
    # make at most e^-5 (1 / 2)^10 likely.
    bound = pv.iwae_bound(model, guide, x, num_particles=1000, seed=0)
    assert (bound.value < -5 - 10 * math.log(2)).all()


# --- refine begins at the guide's answer ------------------------------------------------------


@families
def test_refine_starts_at_the_parameters_of_its_own_family(family):
    model = NormalModel()
    x = torch.randn(4, 3, dtype=torch.float64)
    guide = perturbed(pv.LocalGuide(model, num_data=4, example=x, family=family))
    local = pv.LocalGuide(model, num_data=4, example=x, family=family)
    start = start_of(local, guide, Evaluator(model, guide, as_batch(x), seed=0))
    assert torch.equal(start, guide.table)


# --- global parts -----------------------------------------------------------------------------


def with_items(x):
    items = pyro.plate("items", 3, dim=-1)
    with items:
        d = pyro.sample("d", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x), dim=-2), items:
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z + d, 1.0), obs=x)


def item_guide(x):
    items = AutoNormal(block(with_items, expose=["d"])).double()
    return pv.AmortizedGuide(
        with_items, nn.Linear(3, 4).double(), example=x, global_guide=items, data_plate="data"
    )


def test_a_global_guide_may_share_an_inner_plate():
    x = torch.randn(5, 3, dtype=torch.float64)
    guide = item_guide(x)
    for loss in (pv.ELBO(2), pv.IWAE(3, data_plate="data")):
        pv.fit(with_items, guide, x, loss=loss, max_steps=2, progress=False, data_plate="data")
    assert pv.elbo(with_items, guide, x, data_plate="data").value.shape == (5,)


def test_a_copy_of_a_guide_shares_no_global_parameters():
    x = torch.randn(5, 3, dtype=torch.float64)
    guide = item_guide(x)
    other = copy.deepcopy(guide)
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    pv.fit(with_items, other, x, max_steps=3, progress=False, data_plate="data")
    after = guide.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    moved = [n for n, v in other.state_dict().items() if not torch.equal(v, before[n])]
    assert any("global_guide" in name for name in moved)


def test_two_bare_autoguides_are_said_to_share(caplog):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("schools", 8):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    first, second = AutoNormal(model), AutoNormal(model)
    for guide in (first, second):
        pv.fit(model, guide, torch.zeros(8), max_steps=1, progress=False, data_plate=False)
    assert "module_local_params" in caplog.text
    caplog.clear()
    pyro.clear_param_store()
    with pyro.settings.context(module_local_params=True):
        guides = [AutoNormal(model), AutoNormal(model)]
        for guide in guides:
            pv.fit(model, guide, torch.zeros(8), max_steps=1, progress=False, data_plate=False)
    assert not caplog.text


# --- hierarchies and masks --------------------------------------------------------------------


def test_top_down_follows_through_a_discrete_latent():
    def model(y):
        with pyro.plate("data", len(y)):
            z1 = pyro.sample("z1", dist.Normal(y.new_zeros(()), 1.0))
            c = pyro.sample("c", dist.Bernoulli(logits=z1))
            z2 = pyro.sample("z2", dist.Normal(3 * c, 1.0))
            pyro.sample("y", dist.Normal(z2, 1.0), obs=y)

    y = torch.randn(5, dtype=torch.float64)
    guide = pv.AmortizedGuide(model, column_encoder(), example=y, top_down=True)
    assert guide.parents == {"z1": (), "z2": ("z1",)}


def test_a_mask_of_the_guide_alone_is_refused():
    model = NormalModel(noise=0.1)

    def guide(x):
        with pyro.plate("data", len(x)):
            exact = dist.Normal(x / 1.01, (1 / 101) ** 0.5)
            pyro.sample("z", exact.mask(torch.tensor([True, False, True])))

    with pytest.raises(ValueError, match="guide masks the latent site 'z' where"):
        pv.elbo(model, guide, torch.zeros(3))
    with pytest.raises(ValueError, match="guide masks the latent site 'z' where"):
        pv.ELBO().loss(model, guide, torch.zeros(3))


def test_what_masks_leave_out_is_nan_in_arviz():
    model = pv.zoo.DeepMarkovModel(2, 1, hidden=[3])
    sequences, lengths = model.simulate(4, num_steps=3)
    guide = pv.AmortizedGuide(model, model.make_encoder(3), example=(sequences, lengths))
    tree = pv.to_arviz(model, guide, sequences, lengths, num_draws=3, seed=0)
    past = torch.as_tensor(lengths < 3)
    assert past.any() and not past.all()
    for group, name in (("posterior", "z_3"), ("posterior_predictive", "x_3")):
        values = torch.as_tensor(tree[group][name].values)
        assert values[:, :, past].isnan().all()
        assert not values[:, :, ~past].isnan().any()
    assert torch.as_tensor(tree["observed_data"]["x_3"].values)[past].isnan().all()


def test_a_batch_by_name_for_a_plain_sequential():
    model = pv.zoo.VAE(3, 2, hidden=[3])
    x = model.simulate(5)
    guide = pv.AmortizedGuide(model, model.make_encoder([4]), example={"x": x})
    assert pv.elbo(model, guide, {"x": x}, num_particles=2).value.shape == (5,)
