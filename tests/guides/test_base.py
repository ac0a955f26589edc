"""What guides of a family have in common: starts, scales, densities, what is refused."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_vae as pv
from tests.models import NormalModel, log_normal_model


def test_positive_latents_are_sampled_from_the_family_itself():
    """No Delta: the density of the log-normal proposal is at the site."""
    x = torch.tensor([3.0, 0.5], dtype=torch.float64)
    guide = pv.LocalGuide(log_normal_model, num_data=2, example=x)
    node = poutine.trace(guide).get_trace(x).nodes["s"]
    location, log_scale = guide.table[:, 0].unbind(-1)
    expected = torch.distributions.LogNormal(location, log_scale.exp()).log_prob(node["value"])
    torch.testing.assert_close(node["fn"].log_prob(node["value"]), expected)


def test_discrete_latents_are_refused_by_name():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(c.float(), 1.0), obs=x)

    with pytest.raises(ValueError, match=r"latent site 'c' \(Categorical\)"):
        pv.LocalGuide(model, num_data=2, example=torch.zeros(2))


def test_a_prior_whose_parents_vary():
    """Dirichlet(w), w ~ Gamma(1/8): one draw of w may leave a single corner, others do not."""

    def model(x):
        with pyro.plate("topics", 8):
            w = pyro.sample("w", dist.Gamma(1 / 8, 1.0))
        z = pyro.sample("z", dist.Dirichlet(w))
        pyro.sample("x", dist.Multinomial(13, z), obs=x)

    x = torch.tensor([3.0, 1, 0, 2, 5, 0, 1, 1])
    for seed in range(8):
        torch.manual_seed(seed)
        guide = pv.LocalGuide(model, num_data=1, example=(x,), data_plate=False)
        assert torch.isfinite(guide.table).all()

    def point(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(1.0, 1.0, validate_args=False))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="'z': its prior does not vary"):
        pv.LocalGuide(point, num_data=2, example=torch.zeros(2))


@pytest.mark.parametrize(
    "call", [pv.elbo, pv.iwae_bound, pv.ELBO(1).loss, pv.ELBO(3).loss, pv.IWAE(2).loss]
)
def test_a_helper_of_which_no_latent_is_made_is_refused(call):
    """Its entropy of 1.42 nats would count: log p(x) is -1.39 at x = 0.5, the ELBO -0.2."""

    model = NormalModel()

    def guide(x):
        with pyro.plate("data", len(x)):
            noise = dist.Normal(torch.zeros_like(x), 1.0)
            e = pyro.sample("e", noise, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(x / 2 + 0.3 * e, 0.7))

    with pytest.raises(ValueError, match=r"auxiliary sites \['e'\] .* no bound"):
        call(model, guide, torch.tensor([0.5, -1.0]))


def test_a_helper_that_the_model_samples_too_has_its_bound():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("e", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            e = pyro.sample("e", dist.Normal(x / 2, 1.5))
            pyro.sample("z", dist.Normal(x / 4 + e / 3, 0.7))

    x = torch.tensor([0.5, -1.0])
    bound = pv.iwae_bound(model, guide, x, num_particles=20_000, seed=0)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x)
    assert ((bound.value - exact).abs() < 5 * bound.std_error + 1e-3).all()


X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def nested(x):
    """Three entries z inside each datum, and u beside them."""
    with pyro.plate("data", len(x), dim=-2):
        u = pyro.sample("u", dist.Gamma(x.new_ones(()), 1.0))
        with pyro.plate("inner", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z * u, 1.0), obs=x)


@pytest.mark.parametrize(
    "family", [pv.families.FullRankNormal(), pv.families.LowRankNormal(2)], ids=repr
)
def test_the_sum_over_entries_is_the_joint_density(family):
    guide = pv.LocalGuide(nested, num_data=4, example=X, family=family)
    with torch.no_grad():
        guide.table.add_(0.3 * torch.randn_like(guide.table))
    trace = poutine.trace(guide).get_trace(X)
    trace.compute_log_prob()
    u, z = trace.nodes["u"], trace.nodes["z"]
    assert z["log_prob"].shape == (4, 3)
    whole = family.conditional(guide.table, 4, guide.table.new_zeros(4, 0), slice(0, 4))
    log_u = u["value"].log()
    coordinates = torch.cat([log_u, z["value"]], -1)
    # Of u itself the density has the slope of the logarithm.
    wanted = whole.log_prob(coordinates) - log_u[:, 0]
    found = u["log_prob"][:, 0] + z["log_prob"].sum(-1)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-9, atol=1e-9, check_dtype=False)


def test_a_family_without_a_density_of_each_coordinate_is_refused():
    class Whole(pv.families.FullRankNormal):
        def conditional(self, params, size, before, columns):
            joint = super().conditional(params, size, before, columns)
            return dist.TransformedDistribution(joint, [dist.transforms.AffineTransform(0.0, 1.0)])

    guide = pv.LocalGuide(nested, num_data=4, example=X, family=Whole())
    with pytest.raises(
        ValueError, match=r"'z' has batch dimensions inside a datum.*coordinate_log"
    ):
        guide(X)
