"""What the package promises of models and guides: hierarchies, and refusals by name."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv


class Encoder(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.layer = nn.Linear(1, width).double()

    def forward(self, x):
        return torch.tanh(self.layer(x.unsqueeze(-1)))


def hierarchy(x):
    """z2 ~ N(0, 1), z1 ~ N(z2, 0.3), x ~ N(z1, 0.3), and one site that depends on neither."""
    zero = x.new_zeros(())
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(zero, 1.0))
        z1 = pyro.sample("z1", dist.Normal(z2, 0.3))
        pyro.sample("apart", dist.Normal(zero, 1.0))
        pyro.sample("x", dist.Normal(z1, 0.3), obs=x)


@pytest.fixture
def x():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return 1.1 * torch.randn(64, dtype=torch.float64)


# --- hierarchies ---------------------------------------------------------------------------------


def test_a_top_down_guide_follows_the_model(x):
    guide = pv.AmortizedGuide(hierarchy, Encoder(), example=x, top_down=True)
    assert guide.parents == {"z2": (), "z1": ("z2",), "apart": ()}
    assert len(guide.conditioners) == 1


def test_a_top_down_guide_closes_the_gap_of_a_mean_field(x):
    """The exact posterior is Gaussian, with z1 linear in z2: within its reach, not the other's."""
    exact = dist.Normal(0.0, (1 + 2 * 0.3**2) ** 0.5).log_prob(x).mean().item()
    gaps = {}
    for top_down in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            guide = pv.AmortizedGuide(hierarchy, Encoder(), example=x, top_down=top_down)
        pv.fit(
            hierarchy,
            guide,
            x,
            loss=pv.ELBO(8, estimator="stl"),
            optim=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
            max_steps=400,
            progress=False,
        )
        gaps[top_down] = exact - pv.elbo(hierarchy, guide, x, num_particles=500, seed=0).mean
    assert gaps[False] > 0.2
    assert gaps[True] < 0.1


@pytest.mark.parametrize("dim", [-1, -2])
def test_a_top_down_guide_with_plates_inside_a_datum(dim, x):
    x = x[:5]

    def model(x):
        shape = [len(x), *[1] * (-dim - 1)]
        with pyro.plate("data", len(x), dim=dim):
            a = pyro.sample("a", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            with pyro.plate("inner", 3, dim=-1 if dim == -2 else -2):
                s = pyro.sample("s", dist.LogNormal(a.sum(-1), 1.0))
                pyro.sample("y", dist.Normal(s, 1.0), obs=x.reshape(shape))
            pyro.sample("x", dist.Normal(a[..., 0], 1.0), obs=x.reshape(shape))

    guide = pv.AmortizedGuide(model, Encoder(), example=x, top_down=True)
    assert guide.parents["s"] == ("a",)
    nn.init.normal_(guide.conditioners["1"][-1].weight)
    plate = pv.log_weights(model, guide, x, num_particles=4, particles="plate", seed=0)
    chunked = pv.log_weights(model, guide, x, num_particles=4, chunk_size=3, seed=0)
    torch.testing.assert_close(plate.total, chunked.total)
    local = pv.refine(model, guide, x, max_steps=5, seed=0)
    assert local.table.shape == (5, 5, 2)


def test_top_down_and_a_joint_family_are_one_too_many(x):
    with pytest.raises(ValueError, match="FullRankNormal.*joint over the sites already"):
        pv.AmortizedGuide(
            hierarchy, Encoder(), example=x, family=pv.families.FullRankNormal(), top_down=True
        )


def test_a_comparison_says_nothing_of_a_top_down_guide_s_own_family(x):
    guide = pv.AmortizedGuide(hierarchy, Encoder(), example=x, top_down=True)
    found = pv.compare(hierarchy, {"top-down": guide}, x[:4], num_particles=20, seed=0)
    assert found.dataset["amortization_gap"].isnull().all()
    named = pv.compare(
        hierarchy,
        {"top-down": guide, "full": pv.families.FullRankNormal()},
        x[:4],
        num_particles=200,
        max_steps=250,
        reference="full",
        seed=0,
    )
    assert (named.dataset["amortization_gap"].sel(guide="top-down") > 0).all()


def test_families_of_other_options_have_references_of_their_own(x):
    guides = {
        f"rank {rank}": pv.AmortizedGuide(
            hierarchy, Encoder(), example=x, family=pv.families.LowRankNormal(rank)
        )
        for rank in (1, 2)
    }
    found = pv.compare(hierarchy, guides, x[:4], num_particles=20, max_steps=2, seed=0)
    families = {name: found.guides[name].family.rank for name in found.guides}
    references = dict(
        zip(found.dataset["guide"].values, found.dataset["reference"].values, strict=True)
    )
    assert all(families[references[f"rank {rank}"]] == rank for rank in (1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["stl", "dreg"])
@pytest.mark.parametrize("make", ["top-down", "full rank", "flow"])
def test_gradients_of_dependent_guides_agree(make, estimator, x):
    """In expectation, STL (K = 1) and DReG give the pathwise gradient; here with many particles."""
    options = {
        "top-down": {"top_down": True},
        "full rank": {"family": pv.families.FullRankNormal()},
        "flow": {"family": pv.families.Flow(bins=4, hidden=2)},
    }[make]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        guide = pv.AmortizedGuide(hierarchy, Encoder(3), example=x, **options)
        for parameter in guide.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)

    def gradient(loss, repeats):
        found = []
        for seed in range(repeats):
            torch.manual_seed(seed)
            total = loss.differentiable_loss(hierarchy, guide, x[:4])
            flat = torch.autograd.grad(total, list(guide.parameters()), allow_unused=True)
            found.append(torch.cat([g.flatten() for g in flat if g is not None]))
        found = torch.stack(found)
        return found.mean(0), found.std(0) / repeats**0.5

    with torch.random.fork_rng():
        if estimator == "dreg":
            pairs = pv.IWAE(3), pv.IWAE(3, estimator="dreg")
        else:
            pairs = pv.ELBO(3), pv.ELBO(3, estimator=estimator, kl="sample")
        (one, one_error), (other, other_error) = (gradient(loss, 400) for loss in pairs)
    error = (one_error**2 + other_error**2).sqrt()
    assert ((one - other).abs() < 5 * error + 1e-9).all()
    assert (one.abs() > 5 * one_error).any()


# --- what is not promised is refused by name -----------------------------------------------------


def test_a_datum_that_depends_on_the_latents_of_others_is_refused(x):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z - z.mean(-1, keepdim=True), 1.0), obs=x)

    guide = pv.LocalGuide(model, num_data=len(x), example=x)
    with pytest.raises(ValueError, match="depends on the latents of other data, by up to"):
        pv.log_weights(model, guide, x, num_particles=3)
    whole = pv.LocalGuide(model, num_data=1, example=x, data_plate=False)
    assert pv.elbo(model, whole, x, num_particles=3, data_plate=False).value.shape == (1,)


def test_latents_of_changing_dimension_are_refused(x):
    def model(x):
        size = int(torch.randint(1, 50, ()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(size), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    message = r"site 'z' is not the same in two runs.*changing number or dimension"
    with pytest.raises(ValueError, match=message):
        pv.describe(model, x)
    with pytest.raises(ValueError, match=message):
        pv.LocalGuide(model, num_data=len(x), example=x)


def test_latents_of_changing_number_are_refused(x):
    def model(x):
        with pyro.plate("data", len(x)):
            z = 0.0
            for step in range(int(torch.randint(1, 50, ()))):
                z = z + pyro.sample(f"z{step}", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="is not the same in two runs.*no such site"):
        pv.AmortizedGuide(model, Encoder(), example=x)


def test_a_latent_in_a_subsampled_inner_plate_is_refused(x):
    def model(x):
        with pyro.plate("data", len(x)), pyro.plate("inner", 10, subsample_size=2):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="plate 'inner', of which a run sees 2 of 10 entries"):
        pv.LocalGuide(model, num_data=len(x), example=x, data_plate="data")
