"""Laws of every variational family: its methods describe one and the same distribution."""

from __future__ import annotations

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae import families, testing
from pyro_vae.testing.families import laws_of, some_params, whole


@dataclass(frozen=True)
class Laplace(families.FactorizedFamily):
    """A family as a user writes it."""

    params_per_coordinate = 2

    def marginal(self, params):
        return dist.Laplace(params[..., 0], params[..., 1].exp())

    def from_moments(self, mean, std):
        return torch.stack([mean, (std / 2**0.5).log()], -1)


FACTORIZED = [families.Normal(), Laplace()]
JOINT = [families.FullRankNormal(), families.LowRankNormal(2), families.Flow(bins=4, hidden=3)]
DENSITIES = [*FACTORIZED, *JOINT]
FAMILIES = [*DENSITIES, families.Delta()]
law = pytest.mark.parametrize("family", FAMILIES, ids=repr)
density_law = pytest.mark.parametrize("family", DENSITIES, ids=repr)
joint_law = pytest.mark.parametrize("family", JOINT, ids=repr)
factorized_law = pytest.mark.parametrize("family", FACTORIZED, ids=repr)
D = 4


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


# --- each family by itself -------------------------------------------------------------------

# Just the weights that the order of the coordinates rules out: of units of degree 0, 1, 2, six see
# a coordinate, as many do not, and those that do say nothing to it.
FLOW = families.Flow(bins=4, hidden=3)
UNUSED = 6 + 6 * (3 * FLOW.bins + 1)
GRADIENTS = "a gradient reaches every parameter"


@law
def test_it_keeps_the_laws(family):
    why = {GRADIENTS: f"{UNUSED} weights are masked"} if family == FLOW else {}
    found = testing.check_family(family, expected_failures=why)
    assert set(found.kept) | set(why) == set(laws_of(family))
    if why:
        assert found.expected[GRADIENTS].startswith(f"{UNUSED} of ")


@pytest.mark.parametrize("family", [families.FullRankNormal(), families.Flow()], ids=repr)
def test_starts_as_independent_gaussians(family):
    mean, std = torch.randn(D, dtype=torch.float64), torch.rand(D, dtype=torch.float64) + 0.1
    z = torch.randn(5, D, dtype=torch.float64)
    found = whole(family, family.initial(mean, std)).log_prob(z)
    torch.testing.assert_close(found, dist.Normal(mean, std).to_event(1).log_prob(z))


def test_equal_options_make_equal_families():
    assert families.LowRankNormal(2) == families.LowRankNormal(2) != families.LowRankNormal(3)
    assert len({families.Flow(), families.Flow(), families.Flow(bins=4)}) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: families.LowRankNormal(0), "rank=0"),
        (lambda: families.Flow(bins=1), "bins=1"),
        (lambda: families.Flow(hidden=0), "hidden=0"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- factorized families ---------------------------------------------------------------------


def test_a_point_ignores_noise():
    params = some_params(families.Delta())
    drawn = families.Delta().from_noise(params, D, torch.randn(5, D, dtype=torch.float64))
    assert torch.equal(drawn, params[..., 0].expand(5, D))


def test_a_unit_of_a_normal_is_the_same_change_at_any_scale():
    """A small step of a unit costs the same KL, whatever the parameters."""
    family = families.Normal()
    params = some_params(family, 3)
    units = family.units(params, D)
    for column in range(2):
        step = torch.zeros_like(params)
        step[..., column] = 1e-3 * units[..., column]
        cost = kl_divergence(family.marginal(params), family.marginal(params + step))
        torch.testing.assert_close(cost, cost[0, 0].expand_as(cost), rtol=1e-6, atol=1e-13)
        assert 1e-7 < cost[0, 0] < 1e-5


# --- a family over the sites of a model --------------------------------------------------------


def many_sites(dim):
    """Sites of every shape and several supports, the data plate at ``dim``."""

    def model(x):
        zero = x.new_zeros(())
        shape = [len(x), *[1] * (-dim - 1)]
        with pyro.plate("data", len(x), dim=dim):
            a = pyro.sample("a", dist.Normal(zero, 1.0))
            b = pyro.sample("b", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            c = pyro.sample("c", dist.LogNormal(a, 1.0))
            theta = pyro.sample("theta", dist.Dirichlet(x.new_ones(3)))
            matrix = pyro.sample("matrix", dist.Normal(x.new_zeros(2, 2), 1.0).to_event(2))
            with pyro.plate("inner", 2, dim=-1 if dim == -2 else -2):
                d = pyro.sample("d", dist.Normal(c, 1.0))
                e = pyro.sample("e", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                loc = d + e.sum(-1) + matrix.sum((-1, -2))
                pyro.sample("y", dist.Normal(loc, 1.0), obs=x.reshape(shape))
            loc = a + b.sum(-1) + theta[..., 0]
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x.reshape(shape))

    return model


SITES = ["a", "b", "c", "theta", "matrix", "d", "e"]
COLUMNS = 1 + 3 + 1 + 2 + 4 + 2 + 4


@pytest.fixture
def data():
    return torch.linspace(-1, 1, 5, dtype=torch.float64)


def random_guide(model, family, x):
    guide = pv.LocalGuide(model, num_data=len(x), example=x, family=family)
    with torch.no_grad():
        guide.table.add_(0.3 * torch.randn_like(guide.table))
    return guide


@density_law
@pytest.mark.parametrize("dim", [-1, -2])
def test_the_sites_together_are_the_family(family, dim, data):
    """The log densities of the sites sum to the joint's, less the change of variables."""
    model = many_sites(dim)
    guide = random_guide(model, family, data)
    assert guide.num_coordinates == COLUMNS
    trace = poutine.trace(guide).get_trace(data)
    assert list(trace.nodes["_RETURN"]["value"]) == SITES
    total, rows = torch.zeros(5, dtype=torch.float64), []
    for coordinates in guide.coordinates:
        node = trace.nodes[coordinates.name]
        log_prob = node["fn"].log_prob(node["value"])
        z = coordinates.transform.inv(node["value"])
        rows.append(coordinates.rows(z.unsqueeze(0))[0])
        density = log_prob + coordinates.transform.log_abs_det_jacobian(z, node["value"])
        total += density.movedim(density.ndim + dim, 0).reshape(5, -1).sum(1)
    joint = whole(family, guide.table.detach(), COLUMNS)
    torch.testing.assert_close(total, joint.log_prob(torch.cat(rows, -1)), rtol=1e-9, atol=1e-9)


@law
@pytest.mark.parametrize("dim", [-1, -2])
def test_draws_of_noise_lie_where_the_sites_do(family, dim, data):
    model = many_sites(dim)
    guide = random_guide(model, family, data)
    noise = torch.randn(3, family.num_noise(COLUMNS), dtype=torch.float64)
    values = guide.from_noise(guide.table, noise)
    trace = poutine.trace(guide).get_trace(data)
    joint = family.from_noise(guide.table, COLUMNS, noise.unsqueeze(1).expand(-1, 5, -1))
    for coordinates in guide.coordinates:
        name = coordinates.name
        assert values[name].shape[1:] == trace.nodes[name]["value"].shape
        z = coordinates.rows(coordinates.transform.inv(values[name]))
        torch.testing.assert_close(z, joint[..., coordinates.columns], rtol=1e-6, atol=1e-6)


@law
@pytest.mark.parametrize("dim", [-1, -2])
def test_particles_together_are_particles_alone(family, dim, data):
    model = many_sites(dim)
    guide = random_guide(model, family, data)
    plate = pv.log_weights(model, guide, data, num_particles=3, particles="plate", seed=0)
    assert plate.total.shape == (3, 5)
    chunked = pv.log_weights(model, guide, data, num_particles=3, chunk_size=4, seed=0)
    torch.testing.assert_close(chunked.total, plate.total)


@law
def test_a_guide_of_the_family_trains_saves_and_loads(family, data):
    model = many_sites(-1)
    encoder = torch.nn.Sequential(torch.nn.Unflatten(0, (-1, 1)), torch.nn.Linear(1, 8)).double()
    guide = pv.AmortizedGuide(model, encoder, example=data, family=family)
    result = pv.fit(model, guide, data, max_steps=3, batch_size=5, progress=False)
    assert result.steps == 3
    other = pv.AmortizedGuide(model, encoder, example=data, family=family)
    other.load_state_dict(guide.state_dict())
    assert torch.equal(other.family_params(data), guide.family_params(data))


@pytest.mark.parametrize("family", JOINT[:2], ids=repr)
def test_a_site_on_the_reals_is_sampled_from_the_family(family, data):
    """Never through a point, so that the KL is analytic."""
    guide = random_guide(many_sites(-1), family, data)
    told = pv.explain(pv.ELBO(), many_sites(-1), guide, data)
    assert told["a"] == "analytic: closed form between Normal and Normal"
    assert told["b"].startswith("analytic: closed form between")
    assert told["d"].startswith("sampled")


def test_masks_inside_a_datum_leave_auxiliary_draws(data):
    """A latent masked in the model is not there, whatever the family: the bound says so.

    With e masked entry by entry, IWAE of many particles finds the evidence of the rest.
    """
    seen = torch.tensor([[True, False, True]] * 5)

    def model(x):
        data, inner = pyro.plate("data", len(x), dim=-2), pyro.plate("inner", 3, dim=-1)
        with data, inner, poutine.mask(mask=seen[: len(x)]):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.unsqueeze(-1).expand(-1, 3))

    exact = 2 * dist.Normal(0.0, 2**0.5).log_prob(data)
    for family in JOINT:
        guide = pv.LocalGuide(model, num_data=5, example=data, family=family, data_plate="data")
        with torch.no_grad():
            guide.table.add_(0.3 * torch.randn_like(guide.table))
        bound = pv.iwae_bound(model, guide, data, num_particles=20_000, seed=1, data_plate="data")
        assert ((bound.value - exact).abs() < 4 * bound.std_error + 1e-3).all(), family
