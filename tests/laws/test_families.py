"""Laws of every variational family: its methods describe one and the same distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import biject_to, constraints, kl_divergence

import pyro_vae as pv
from pyro_vae import families


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


def some_params(family, *lead, size=D):
    return 0.7 * torch.randn(*lead, *family.params_shape(size), dtype=torch.float64)


def whole(family, params, size=D):
    nothing = params.new_zeros(*params.shape[: params.ndim - len(family.params_shape(size))], 0)
    return family.conditional(params, size, nothing, slice(0, size))


# --- each family by itself -------------------------------------------------------------------


@law
def test_shapes_of_all_coordinates(family):
    found = whole(family, some_params(family, 3))
    assert found.batch_shape == (3,)
    assert found.event_shape == (D,)
    assert found.has_rsample
    assert found.rsample((2,)).shape == (2, 3, D)


@law
def test_moments_come_back(family):
    mean, std = torch.randn(D, dtype=torch.float64), torch.rand(D, dtype=torch.float64) + 0.1
    params = family.initial(mean, std)
    assert params.shape == family.params_shape(D)
    noise = torch.randn(200_000, family.num_noise(D), dtype=torch.float64)
    draws = family.from_noise(params, D, noise)
    wanted = std if family.has_density else torch.zeros_like(std)
    torch.testing.assert_close(draws.std(0), wanted, rtol=0.02, atol=0)
    torch.testing.assert_close(draws.mean(0), mean, rtol=0, atol=0.02)


@pytest.mark.parametrize("family", [families.FullRankNormal(), families.Flow()], ids=repr)
def test_starts_as_independent_gaussians(family):
    mean, std = torch.randn(D, dtype=torch.float64), torch.rand(D, dtype=torch.float64) + 0.1
    z = torch.randn(5, D, dtype=torch.float64)
    found = whole(family, family.initial(mean, std)).log_prob(z)
    torch.testing.assert_close(found, dist.Normal(mean, std).to_event(1).log_prob(z))


@density_law
def test_the_conditionals_make_the_joint(family):
    params = some_params(family, 3)
    z = whole(family, params).sample()
    parts = [
        family.conditional(params, D, z[..., :start], slice(start, stop)).log_prob(z[:, start:stop])
        for start, stop in ((0, 1), (1, 3), (3, D))
    ]
    torch.testing.assert_close(sum(parts), whole(family, params).log_prob(z))


@density_law
def test_draws_made_of_noise_have_the_density(family):
    """By change of variables, or the covariance of a linear map."""
    params = some_params(family)
    noise = torch.randn(family.num_noise(D), dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda e: family.from_noise(params, D, e.unsqueeze(0))[0], noise
    )
    z = family.from_noise(params, D, noise.unsqueeze(0))[0]
    found = whole(family, params)
    if family.num_noise(D) != D:
        torch.testing.assert_close(jacobian @ jacobian.T, found.covariance_matrix)
        return
    normal = dist.Normal(0.0, 1.0).log_prob(noise).sum()
    torch.testing.assert_close(found.log_prob(z), normal - torch.linalg.slogdet(jacobian)[1])


@density_law
def test_a_draw_is_made_of_the_noise_that_its_density_says(family):
    """Draws of the conditionals, one after the other, have the joint's moments."""
    params = some_params(family)
    params = params.expand(50_000, *params.shape)
    a = family.conditional(params, D, params.new_zeros(50_000, 0), slice(0, 2)).sample()
    b = family.conditional(params, D, a, slice(2, D)).sample()
    reference = family.from_noise(
        params, D, torch.randn(50_000, family.num_noise(D), dtype=torch.float64)
    )
    drawn = torch.cat([a, b], -1)
    for power in (1, 2):
        gap = (drawn**power).mean(0) - (reference**power).mean(0)
        spread = ((drawn**power).var(0) + (reference**power).var(0)) / 50_000
        assert (gap.abs() < 4 * spread.sqrt()).all()
    products = [(z[:, 0] * z[:, 3] - z[:, 0].mean() * z[:, 3].mean()) for z in (drawn, reference)]
    error = math.sqrt(sum(float(p.var()) for p in products) / 50_000)
    assert abs(float(products[0].mean() - products[1].mean())) < 4 * error


@law
def test_gradient_reaches_every_parameter(family):
    params = some_params(family).requires_grad_()
    noise = torch.randn(64, family.num_noise(D), dtype=torch.float64)
    value = family.from_noise(params, D, noise)
    total = value.square().sum()
    if family.has_density:
        total = total + whole(family, params).log_prob(3 * value.detach()).square().sum()
    total.backward()
    unused = params.grad == 0
    if isinstance(family, families.Flow):
        # Just the weights that the order of the coordinates rules out: of units of degree 0, 1, 2,
        # six see a coordinate, as many do not, and those that do say nothing to it.
        assert int(unused.sum()) == 6 + 6 * (3 * family.bins + 1)
    else:
        assert not unused.any()


@law
def test_a_unit_is_positive(family):
    params = some_params(family, 3)
    units = family.units(params, D)
    assert units.shape == params.shape
    assert (units > 0).all()


@density_law
def test_float64_stays(family):
    params = some_params(family, 2)
    found = whole(family, params)
    assert found.rsample().dtype == torch.float64
    assert found.log_prob(torch.zeros(D, dtype=torch.float64)).dtype == torch.float64


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


@factorized_law
def test_from_noise_draws_from_the_marginal(family):
    """Quantile for quantile: standard normal noise at a level gives the marginal's quantile."""
    params = some_params(family)
    levels = torch.tensor([0.01, 0.3, 0.5, 0.9], dtype=torch.float64).unsqueeze(-1)
    drawn = family.from_noise(params, D, dist.Normal(0.0, 1.0).icdf(levels).expand(-1, D))
    torch.testing.assert_close(family.marginal(params).cdf(drawn), levels.expand(-1, D))


@pytest.mark.parametrize("family", [*FACTORIZED, families.Delta()], ids=repr)
@pytest.mark.parametrize(
    "support",
    [constraints.real, constraints.positive, constraints.unit_interval, constraints.simplex],
    ids=str,
)
def test_mapped_to_a_support(family, support):
    """Draws lie in the support and have the density that the change of variables gives."""
    transform = biject_to(support)
    params = some_params(family, 3)
    mapped = family.mapped(params, transform)
    value = mapped.sample()
    assert support.check(value).all()
    base = family.marginal(params).to_event(transform.domain.event_dim)
    if not family.has_density:
        assert torch.equal(value, transform(params[..., 0]))
        assert torch.equal(mapped.log_prob(value), torch.zeros(mapped.batch_shape))
        return
    z = transform.inv(value)
    expected = base.log_prob(z) - transform.log_abs_det_jacobian(z, value)
    torch.testing.assert_close(mapped.log_prob(value), expected)


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
