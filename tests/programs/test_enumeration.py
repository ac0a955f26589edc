"""Discrete sites summed out: exact to rounding against sums written by hand."""

from __future__ import annotations

import contextlib
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import pyro_vae as pv
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.batch import as_batch
from pyro_vae.programs.enumeration import (
    conditionals,
    contract,
    draw,
    enumerated,
    marginals,
    scaled_by,
    summed_out,
)
from pyro_vae.programs.nodes import sample_nodes
from pyro_vae.programs.traces import site_log_prob
from tests.models import MEANS, TABLE, WEIGHTS, mixture

GRID = torch.tensor([[0.1, -2.0], [1.3, 0.4], [-0.7, 2.2]], dtype=torch.float64)


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def run(model, names, nesting, *args, values=None):
    """A trace with sites enumerated, and its log densities."""
    fn = enumerated(model, names, -1 - nesting)
    if values is not None:
        trace = poutine.Trace()
        for name, value in values.items():
            trace.add_node(
                name, name=name, type="sample", is_observed=False, value=value, infer={}, fn=None
            )
        fn = poutine.replay(fn, trace=trace)
    trace = poutine.trace(fn).get_trace(*args)
    log_probs = {n: site_log_prob(n, node) for n, node in sample_nodes(trace)}
    return trace, log_probs


def test_a_mixture():
    x = data(7)
    trace, log_probs = run(mixture, ["c"], 1, x)
    found = contract(trace, log_probs, 1)
    joint = mixture.log_joint(x)
    torch.testing.assert_close(found[("c", "x")], joint.logsumexp(-1), rtol=0, atol=1e-12)
    assert list(found) == [("c", "x")]
    probabilities = marginals(trace, log_probs, 1)["c"]
    torch.testing.assert_close(probabilities, joint.softmax(-1), rtol=0, atol=1e-12)


def test_sites_that_nothing_discrete_touches_stay_as_they_are():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=x)
            c = pyro.sample("c", dist.Categorical(WEIGHTS))
            pyro.sample("x", dist.Normal(MEANS[c], 1.0), obs=x)

    trace, log_probs = run(model, ["c"], 1, data(4))
    found = contract(trace, log_probs, 1)
    assert set(found) == {("y",), ("c", "x")}
    assert found[("y",)] is log_probs["y"]


def nested(y):
    """Sites c in the data plate, d in a plate inside it, both with children."""
    with pyro.plate("data", y.shape[-1], dim=-1):
        c = pyro.sample("c", dist.Categorical(WEIGHTS))
        pyro.sample("z", dist.Normal(MEANS[c], 0.5), obs=y[0])
        with pyro.plate("inner", y.shape[0], dim=-2):
            d = pyro.sample("d", dist.Bernoulli(TABLE[c, 1]))
            pyro.sample("y", dist.Normal(GRID[c, d.long()], 1.0), obs=y)
            pyro.sample("w", dist.Normal(0.0, 1.0), obs=y)


def nested_by_hand(y):
    leaf = TABLE.log()[..., None, None] + dist.Normal(GRID[..., None, None], 1.0).log_prob(y)
    inner = leaf.logsumexp(1).sum(1)
    return WEIGHTS.log()[:, None] + dist.Normal(MEANS[:, None], 0.5).log_prob(y[0]) + inner


def test_inner_plates_are_products_inside_the_sum():
    y = data(4, 7)
    trace, log_probs = run(nested, ["c", "d"], 2, y)
    found = contract(trace, log_probs, 2)
    assert set(found) == {("w",), ("c", "z", "d", "y")}
    total = found[("c", "z", "d", "y")]
    torch.testing.assert_close(total, nested_by_hand(y).logsumexp(0), rtol=0, atol=1e-12)
    probabilities = marginals(trace, log_probs, 2)
    torch.testing.assert_close(
        probabilities["c"], nested_by_hand(y).softmax(0).T, rtol=0, atol=1e-12
    )
    assert probabilities["d"].shape == (4, 7, 2)
    torch.testing.assert_close(probabilities["d"].sum(-1), torch.ones(4, 7, dtype=y.dtype))


def test_an_inner_discrete_site_keeps_its_plate():
    def model(y):
        with pyro.plate("data", y.shape[0], dim=-2), pyro.plate("inner", y.shape[1], dim=-1):
            c = pyro.sample("c", dist.Categorical(WEIGHTS))
            pyro.sample("y", dist.Normal(MEANS[c], 1.0), obs=y)

    y = data(5, 3)
    found = contract(*run(model, ["c"], 2, y), 2)[("c", "y")]
    want = (WEIGHTS.log() + dist.Normal(MEANS, 1.0).log_prob(y[..., None])).logsumexp(-1)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


def chain(x):
    """Three sites that depend on one another, and a continuous one that depends on two."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Categorical(WEIGHTS))
        b = pyro.sample("b", dist.Bernoulli(TABLE[a, 1]))
        c = pyro.sample("c", dist.Categorical(TABLE[a.clamp(max=1)] + 0.1 * b.unsqueeze(-1)))
        z = pyro.sample("z", dist.Normal(GRID[a, c], 1.0))
        pyro.sample("x", dist.Normal(z + b, 0.3), obs=x)


def chain_by_hand(x, z):
    """Log joint of every value of (a, b, c), [3, 2, 2, N], and without x."""
    prior = []
    joint = []
    for a, b, c in itertools.product(range(3), range(2), range(2)):
        weights = TABLE[min(a, 1)] + 0.1 * b
        term = WEIGHTS[a].log() + TABLE[a, b].log() + (weights / weights.sum())[c].log()
        prior.append(term + dist.Normal(GRID[a, c], 1.0).log_prob(z))
        joint.append(prior[-1] + dist.Normal(z + b, 0.3).log_prob(x))
    return torch.stack(joint).reshape(3, 2, 2, *z.shape), torch.stack(prior)


def test_several_sites_and_a_continuous_latent_whose_prior_depends_on_them():
    x, z = data(6), data(6) * 0.3
    trace, log_probs = run(chain, ["a", "b", "c"], 1, x, values={"z": z})
    joint, prior = chain_by_hand(x, z)
    (found,) = contract(trace, log_probs, 1).values()
    torch.testing.assert_close(found, joint.flatten(0, 2).logsumexp(0), rtol=0, atol=1e-12)
    latent = {name: log_probs[name] for name in ("a", "b", "c", "z")}
    (found,) = contract(trace, latent, 1).values()
    torch.testing.assert_close(found, prior.logsumexp(0), rtol=0, atol=1e-12)


def test_conditionals_multiply_to_the_joint_posterior():
    x, z = data(6), data(6) * 0.3
    trace, log_probs = run(chain, ["a", "b", "c"], 1, x, values={"z": z})
    joint, _ = chain_by_hand(x, z)
    posterior = joint - joint.flatten(0, 2).logsumexp(0)
    tables = conditionals(trace, log_probs, 1)
    assert [table.name for table in tables] == ["a", "b", "c"]
    for values in itertools.product(range(3), range(2), range(2)):
        indices = {
            name: torch.full((6,), v) for name, v in zip(("a", "b", "c"), values, strict=True)
        }
        found = sum(table.given(indices)[..., indices[table.name][0]] for table in tables)
        torch.testing.assert_close(found, posterior[values], rtol=0, atol=1e-12)
    for name, axes in (("a", (1, 2)), ("b", (0, 2)), ("c", (0, 1))):
        want = posterior.exp().sum(axes).T
        found = marginals(trace, log_probs, 1)[name]
        torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


def test_draws_have_the_posterior_frequencies():
    torch.manual_seed(0)
    x = data(1).expand(40_000)
    trace, log_probs = run(mixture, ["c"], 1, x)
    chain = conditionals(trace, log_probs, 1)
    values = draw(chain)
    chosen = chain[0].logits.gather(-1, values["c"].unsqueeze(-1)).squeeze(-1)
    want = marginals(trace, log_probs, 1)["c"][0]
    torch.testing.assert_close(chosen.exp(), want[values["c"]])
    found = torch.bincount(values["c"], minlength=3) / len(x)
    error = (want * (1 - want) / len(x)).sqrt()
    assert bool(((found - want).abs() < 4 * error).all())


def test_particles_in_a_plate():
    x, z = data(6), data(5, 6) * 0.3

    def particles(x):
        with pyro.plate("particles", 5, dim=-2):
            chain(x)

    trace, log_probs = run(particles, ["a", "b", "c"], 2, x, values={"z": z})
    (found,) = contract(trace, log_probs, 2).values()
    want = torch.stack([chain_by_hand(x, row)[0].flatten(0, 2).logsumexp(0) for row in z])
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("nesting", [1, 3])
def test_gradients_are_those_of_the_sum_by_hand(nesting: int):
    x = data(7)
    means = MEANS.clone().requires_grad_()
    logits = torch.randn(3, dtype=torch.float64).requires_grad_()

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            c = pyro.sample("c", dist.Categorical(logits=logits))
            pyro.sample("x", dist.Normal(means[c], 1.0), obs=x)

    total = contract(*run(model, ["c"], nesting, x), nesting)[("c", "x")].sum()
    found = torch.autograd.grad(total, [means, logits])
    by_hand = logits.log_softmax(0) + dist.Normal(means, 1.0).log_prob(x[:, None])
    want = torch.autograd.grad(by_hand.logsumexp(-1).sum(), [means, logits])
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


def test_no_underflow_where_likelihoods_point_apart():
    """Pyro's contraction in log space gives -inf here: each factor's maximum is elsewhere."""
    apart = torch.tensor([0.0, 40.0])  # 800 nats apart

    def model():
        c = pyro.sample("c", dist.Categorical(torch.ones(2)))
        pyro.sample("x", dist.Normal(apart[c], 1.0), obs=torch.tensor(0.0))
        pyro.sample("y", dist.Normal(apart[c], 1.0), obs=torch.tensor(40.0))

    (found,) = contract(*run(model, ["c"], 0), 0).values()
    want = dist.Normal(0.0, 1.0).log_prob(torch.tensor([0.0, 40.0])).sum()
    assert found.item() == pytest.approx(want.item(), rel=1e-6)


def test_an_impossible_datum_has_density_zero_and_gradient_zero():
    low = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(2, dtype=torch.float64)))
            fn = dist.Uniform(low[c], 1.0, validate_args=False)
            pyro.sample("x", fn, obs=x)

    x = torch.tensor([0.5, 3.0], dtype=torch.float64)
    with pyro.validation_enabled(False):
        trace, log_probs = run(model, ["c"], 1, x)
        found = contract(trace, log_probs, 1)[("c", "x")]
    assert found[0] == 0 and found[1] == -torch.inf
    (gradient,) = torch.autograd.grad(found[0], low)
    assert bool(gradient.isfinite().all())
    (table,) = conditionals(trace, log_probs, 1)
    assert bool(table.logits.isfinite().all())


def test_half_labelled_data():
    """obs_mask: where the label is seen there is nothing to sum out."""
    x, labels = data(6), torch.tensor([0, 1, 2, 0, 1, 2])
    seen = torch.tensor([True, False, True, False, False, True])

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(WEIGHTS), obs=labels, obs_mask=seen)
            pyro.sample("x", dist.Normal(MEANS[c], 1.0), obs=x)

    trace, log_probs = run(model, ["c_unobserved"], 1, x)
    found = sum(contract(trace, log_probs, 1).values())
    joint = WEIGHTS.log() + dist.Normal(MEANS, 1.0).log_prob(x[:, None])
    want = torch.where(seen, joint.gather(1, labels[:, None])[:, 0], joint.logsumexp(1))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


def test_a_masked_site_is_not_there():
    x, keep = data(4), torch.tensor([True, False, True, False])

    def model(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=keep):
            mixture_body(x)

    def mixture_body(x):
        c = pyro.sample("c", dist.Categorical(WEIGHTS))
        pyro.sample("x", dist.Normal(MEANS[c], 1.0), obs=x)

    found = contract(*run(model, ["c"], 1, x), 1)[("c", "x")]
    joint = WEIGHTS.log() + dist.Normal(MEANS, 1.0).log_prob(x[:, None])
    torch.testing.assert_close(found, joint.logsumexp(1) * keep, rtol=0, atol=1e-12)


def test_a_markov_chain():
    transition = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64)
    means = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    y = data(5, 12)

    def model(y):
        with pyro.plate("data", len(y)):
            state = 0
            for t in pyro.markov(range(y.shape[1])):
                state = pyro.sample(f"c{t}", dist.Categorical(transition[state]))
                pyro.sample(f"y{t}", dist.Normal(means[state], 1.0), obs=y[:, t])

    names = [f"c{t}" for t in range(12)]
    trace, log_probs = run(model, names, 1, y)
    assert max(term.ndim for term in log_probs.values()) <= 3  # two dimensions take turns
    (found,) = contract(trace, log_probs, 1).values()
    forward = transition[0].log() + dist.Normal(means, 1.0).log_prob(y[:, :1])
    for t in range(1, 12):
        moved = (forward[:, :, None] + transition.log()).logsumexp(1)
        forward = moved + dist.Normal(means, 1.0).log_prob(y[:, t : t + 1])
    torch.testing.assert_close(found, forward.logsumexp(1), rtol=0, atol=1e-12)
    probabilities = marginals(trace, log_probs, 1)["c11"]
    torch.testing.assert_close(probabilities, forward.softmax(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "fn",
    [
        dist.Binomial(3, torch.tensor(0.3, dtype=torch.float64)),
        dist.OneHotCategorical(WEIGHTS),
        dist.Categorical(torch.ones(1, dtype=torch.float64)),
    ],
)
def test_other_discrete_distributions(fn):
    x = data(5)

    def number(c):
        return c @ torch.arange(3.0, dtype=torch.float64) if fn.event_shape else c

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", fn)
            pyro.sample("x", dist.Normal(number(c) * 1.0, torch.ones_like(x)), obs=x)

    support = fn.enumerate_support()
    joint = fn.log_prob(support) + dist.Normal(number(support), 1.0).log_prob(x[:, None])
    found = contract(*run(model, ["c"], 1, x), 1)
    torch.testing.assert_close(sum(found.values()), joint.logsumexp(1), rtol=0, atol=1e-12)


def test_annotations_of_the_user_do_not_count():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(WEIGHTS), infer={"enumerate": "sequential"})
            pyro.sample("b", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(MEANS[c], 1.0), obs=x)

    trace, _ = run(model, ["c"], 1, data(4))
    assert trace.nodes["c"]["value"].shape == (3, 1)
    assert trace.nodes["b"]["value"].shape == (4,)


def test_an_enumeration_around_it_is_left_alone():
    """A guide may ask its model for a posterior while it is enumerated itself."""
    seen = {}

    def outer():
        a = pyro.sample("a", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        with poutine.block():
            run(mixture, ["c"], 1, data(3))
        b = pyro.sample("b", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        seen.update(a=a.shape, b=b.shape)

    poutine.enum(outer, first_available_dim=-2)()
    assert seen == {"a": (2, 1), "b": (2, 1, 1)}


def test_which_sites_are_summed_out():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("b", dist.Bernoulli(0.5))

    model_trace = poutine.trace(chain).get_trace(data(3))
    guide_trace = poutine.trace(guide).get_trace(data(3))
    assert summed_out(model_trace, guide_trace) == ("a", "c")
    with pytest.raises(ValueError, match=r"latent site 'z' \(Normal\).*finite support"):
        summed_out(model_trace)


def test_a_count_without_bound_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("n", dist.Poisson(3.0))

    with pytest.raises(ValueError, match=r"'n' \(Poisson\); only discrete sites of finite"):
        summed_out(poutine.trace(model).get_trace(data(3)))


def test_a_global_site_is_refused_beside_a_data_plate():
    def model(x):
        c = pyro.sample("c", dist.Categorical(WEIGHTS))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(MEANS[c], 1.0), obs=x)

    trace = poutine.trace(model).get_trace(data(3))
    assert summed_out(trace) == ("c",)
    with pytest.raises(ValueError, match=r"'c', and it lies outside the data plate 'data'"):
        summed_out(trace, data_plate="data")


def test_a_global_site_of_one_datum_is_summed_outside_the_product():
    def model(x):
        c = pyro.sample("c", dist.Categorical(WEIGHTS))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(MEANS[c], 1.0), obs=x)

    x = data(4)
    (found,) = contract(*run(model, ["c"], 1, x), 1).values()
    want = WEIGHTS.log() + dist.Normal(MEANS, 1.0).log_prob(x[:, None]).sum(0)
    torch.testing.assert_close(found, want.logsumexp(0), rtol=0, atol=1e-12)


def test_plates_that_are_not_nested_are_refused():
    def model(y):
        rows = pyro.plate("rows", y.shape[0], dim=-2)
        columns = pyro.plate("columns", y.shape[1], dim=-1)
        with rows:
            a = pyro.sample("a", dist.Bernoulli(0.5))
        with columns:
            b = pyro.sample("b", dist.Bernoulli(0.5))
        with rows, columns:
            pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)

    trace, log_probs = run(model, ["a", "b"], 2, data(3, 4))
    with pytest.raises(ValueError, match="'b' and 'a' lie in plates that are not nested"):
        contract(trace, log_probs, 2)


def test_a_batch_dimension_without_a_plate_is_refused():
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            c = pyro.sample("c", dist.Categorical(WEIGHTS.expand(4, 3)))
            pyro.sample("x", dist.Normal(MEANS[c], 1.0).to_event(1), obs=x)

    with pyro.validation_enabled(False), pytest.raises(ValueError, match=r"site 'c'.*no plate's"):
        contract(*run(model, ["c"], 2, data(3, 4)), 2)


def test_a_model_that_cannot_broadcast_is_told_what_happened():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(WEIGHTS))
            features = torch.cat([c.unsqueeze(-1) * 1.0, x.unsqueeze(-1)], -1)
            pyro.sample("x", dist.Normal(features.sum(-1), 1.0), obs=x)

    with pytest.raises(RuntimeError, match=r"while \['c'\] are summed out"):
        run(model, ["c"], 1, data(4))


def test_scales_within_a_group_must_be_one():
    def model(x):
        with pyro.plate("data", len(x)), poutine.scale(scale=2.0):
            c = pyro.sample("c", dist.Categorical(WEIGHTS))
            with poutine.scale(scale=3.0 if len(x) == 4 else 1.0):
                pyro.sample("x", dist.Normal(MEANS[c], 1.0), obs=x)

    trace, _ = run(model, ["c"], 1, data(3))
    assert scaled_by(trace, ("c", "x")) == "x"
    trace, _ = run(model, ["c"], 1, data(4))
    with pytest.raises(ValueError, match=r"'x': 6.0, 'c': 2.0"):
        scaled_by(trace, ("c", "x"))


# --- bounds and weights of a guide that leaves discrete sites out ------------------------------


def gaussians(x):
    """c picks the mean of z, z that of x, and c shifts x as well; marginals in closed form."""
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(WEIGHTS))
        z = pyro.sample("z", dist.Normal(MEANS[c], 0.5))
        pyro.sample("x", dist.Normal(z + 0.3 * c, 0.8), obs=x)


def gaussians_evidence(x):
    spread = (0.5**2 + 0.8**2) ** 0.5
    shifted = MEANS + 0.3 * torch.arange(3)
    return (WEIGHTS.log() + dist.Normal(shifted, spread).log_prob(x[:, None])).logsumexp(1)


def gaussians_posterior(x):
    """The exact posterior of z, a mixture."""
    precision = 1 / 0.5**2 + 1 / 0.8**2
    shift = 0.3 * torch.arange(3)
    mean = (MEANS / 0.5**2 + (x[:, None] - shift) / 0.8**2) / precision
    weights = WEIGHTS.log() + dist.Normal(MEANS + shift, (0.5**2 + 0.8**2) ** 0.5).log_prob(
        x[:, None]
    )
    with pyro.plate("data", len(x)):
        components = dist.Normal(mean, precision**-0.5)
        pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=weights), components))


def proposal(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.5 * x, 1.0))


@pytest.mark.parametrize("particles", ["plate", "repeat", "loop"])
def test_the_exact_posterior_of_the_rest_has_weights_log_evidence(particles: str):
    x = data(9)
    weights = pv.log_weights(
        gaussians, gaussians_posterior, x, num_particles=6, particles=particles
    )
    want = gaussians_evidence(x).expand(6, -1)
    torch.testing.assert_close(weights.total, want, rtol=0, atol=1e-12)


def test_the_prior_is_that_of_the_rest_alone():
    x = data(9)
    torch.manual_seed(0)
    evaluator = Evaluator(gaussians, proposal, as_batch(x), seed=0)
    (chunk,) = evaluator.chunks(5)
    z = chunk.values["z"]
    prior = (WEIGHTS.log() + dist.Normal(MEANS, 0.5).log_prob(z[..., None])).logsumexp(-1)
    torch.testing.assert_close(chunk.weights.log_prior, prior, rtol=0, atol=1e-12)
    shift = 0.3 * torch.arange(3)
    joint = WEIGHTS.log() + dist.Normal(MEANS, 0.5).log_prob(z[..., None])
    joint = joint + dist.Normal(z[..., None] + shift, 0.8).log_prob(x[:, None])
    torch.testing.assert_close(chunk.weights.log_joint, joint.logsumexp(-1), rtol=0, atol=1e-12)
    assert evaluator.pair.summed_out == ("c",)


@pytest.mark.parametrize("chunk_size", [1, 7, 10_000])
def test_chunks_change_nothing(chunk_size: int):
    x = data(9)
    found, whole = (
        pv.log_weights(gaussians, proposal, x, num_particles=11, chunk_size=size, seed=2)
        for size in (chunk_size, None)
    )
    torch.testing.assert_close(found.total, whole.total, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.log_prior, whole.log_prior, rtol=0, atol=1e-12)


def test_modes_agree_on_the_same_draws():
    x = data(4)
    evaluators = [
        Evaluator(gaussians, proposal, as_batch(x), particles=mode, seed=0)
        for mode in ("plate", "repeat", "loop")
    ]
    (chunk,) = evaluators[0].chunks(3)
    rows = slice(0, 4)
    want = evaluators[0].score_model(rows, chunk.values)
    for evaluator in evaluators[1:]:
        torch.testing.assert_close(
            evaluator.score_model(rows, chunk.values), want, rtol=0, atol=1e-12
        )


def test_inner_plates_in_weights():
    """A site in a plate inside the data plate, which a latent outside of it moves."""

    def model(y):
        with pyro.plate("data", y.shape[0], dim=-2):
            z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
            with pyro.plate("inner", y.shape[1], dim=-1):
                d = pyro.sample("d", dist.Bernoulli(torch.sigmoid(z)))
                pyro.sample("y", dist.Normal(2 * d, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", y.shape[0], dim=-2):
            pyro.sample("z", dist.Normal(y.mean(-1, keepdim=True), 1.0))

    y = data(4, 3)
    evaluator = Evaluator(model, guide, as_batch(y), data_plate="data", seed=0)
    (chunk,) = evaluator.chunks(5)
    z = chunk.values["z"]
    on, off = (dist.Normal(m, 1.0).log_prob(y) for m in (2.0, 0.0))
    likelihood = torch.logaddexp(
        torch.nn.functional.logsigmoid(z) + on, torch.nn.functional.logsigmoid(-z) + off
    ).sum(-1)
    torch.testing.assert_close(chunk.weights.log_likelihood, likelihood, rtol=0, atol=1e-12)


def test_a_guide_that_proposes_everything_sums_nothing_out():
    def guide(x):
        proposal(x)
        with pyro.plate("labels", len(x)):
            pyro.sample("c", dist.Categorical(torch.ones(3, dtype=x.dtype)))

    evaluator = Evaluator(gaussians, guide, as_batch(data(5)), seed=0)
    assert evaluator.pair.summed_out == ()
    (chunk,) = evaluator.chunks(2)
    assert set(chunk.values) == {"z", "c"}


@pytest.mark.parametrize("particles", ["plate", "repeat", "loop"])
def test_a_guide_that_proposes_nothing_has_weights_log_evidence(particles: str):
    x = data(300)  # in two blocks
    weights = pv.log_weights(mixture, lambda x: None, x, num_particles=4, particles=particles)
    joint = WEIGHTS.log() + dist.Normal(MEANS, 1.0).log_prob(x.unsqueeze(-1))
    want = joint.logsumexp(-1).expand(4, -1)
    torch.testing.assert_close(weights.total, want, rtol=0, atol=1e-12)
    assert not weights.log_guide.any()


def test_one_datum_without_proposals():
    def model(x):
        k = pyro.sample("k", dist.Categorical(WEIGHTS))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(MEANS[k], 1.0), obs=x)

    x = data(4)
    bound = pv.elbo(model, lambda x: None, x, num_particles=3, data_plate=False)
    want = WEIGHTS.log() + dist.Normal(MEANS, 1.0).log_prob(x[:, None]).sum(0)
    torch.testing.assert_close(bound.value, want.logsumexp(0).reshape(1), rtol=0, atol=1e-12)


def test_arviz_without_proposals():
    x = data(6)
    posterior = pv.to_arviz(mixture, lambda x: None, x, num_draws=50, seed=0)["posterior"]
    assert set(posterior.data_vars) == {"c"}
    assert posterior["c"].shape == (1, 50, 6)


def test_values_that_do_not_run_together_as_alone_are_found():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(WEIGHTS))
            z = pyro.sample("z", dist.Normal(0.0, torch.ones_like(x)))
            mean = MEANS[c].mean(0) if c.ndim > 1 else MEANS[c]
            pyro.sample("x", dist.Normal(mean + z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"all values of \['c'\] at once differs"):
        pv.log_weights(model, proposal, data(4), num_particles=2)


def test_a_bound_of_many_particles_finds_the_evidence():
    """Within 5 standard errors, for each of 9 data."""
    x = data(9)
    bound = pv.iwae_bound(gaussians, proposal, x, num_particles=4000, seed=0)
    assert bool(((bound.value - gaussians_evidence(x)).abs() < 5 * bound.std_error + 1e-3).all())


def test_family_guides_leave_discrete_sites_out():
    x = data(9)
    guide = pv.LocalGuide(gaussians, num_data=9, example=x)
    assert [coordinates.name for coordinates in guide.coordinates] == ["z"]
    assert set(guide(x)) == {"z"}
    with pytest.raises(ValueError, match=r"only latent site 'c' \(Categorical\).*ExactGuide"):
        pv.LocalGuide(mixture, num_data=9, example=x)


def test_refine_and_compare():
    x = data(6)
    result = pv.compare(
        gaussians, {"hand": proposal, "family": pv.families.Normal()}, x, num_particles=500, seed=0
    )
    summary = result.dataset
    assert bool((summary["elbo"] <= gaussians_evidence(x).numpy() + 1e-6).all())
    evidence = torch.as_tensor(summary["log_evidence"].values)
    assert bool(((evidence - gaussians_evidence(x)).abs() < 0.2).all())


def test_arviz_gets_exact_draws_of_what_is_summed_out():
    """Posterior frequencies of c within 5 standard errors; the rest follows the draws of c."""
    x = data(5)
    draws = 4000
    tree = pv.to_arviz(gaussians, gaussians_posterior, x, num_draws=draws, seed=0)
    posterior = tree["posterior"]
    assert posterior["c"].dims == ("chain", "draw", "datum")
    c = torch.as_tensor(posterior["c"].values[0])
    z = torch.as_tensor(posterior["z"].values[0])
    shift = 0.3 * torch.arange(3)
    want = (
        WEIGHTS.log() + dist.Normal(MEANS + shift, (0.5**2 + 0.8**2) ** 0.5).log_prob(x[:, None])
    ).softmax(1)
    found = torch.nn.functional.one_hot(c, 3).double().mean(0)
    assert bool(((found - want).abs() < 5 * (want * (1 - want) / draws).sqrt() + 1e-9).all())
    likelihood = dist.Normal(z + 0.3 * c, 0.8).log_prob(x)
    stored = torch.as_tensor(tree["log_likelihood"]["x"].values[0])
    torch.testing.assert_close(stored, likelihood, rtol=0, atol=1e-12)
    residual = torch.as_tensor(tree["posterior_predictive"]["x"].values[0]) - z - 0.3 * c
    assert abs(residual.std() / 0.8 - 1) < 5 / (2 * residual.numel()) ** 0.5
    assert abs(residual.mean()) < 5 * 0.8 / residual.numel() ** 0.5
    prior = torch.as_tensor(tree["prior"]["c"].values[0])
    frequency = torch.nn.functional.one_hot(prior, 3).double().mean((0, 1))
    error = (WEIGHTS * (1 - WEIGHTS) / prior.numel()).sqrt()
    assert bool(((frequency - WEIGHTS).abs() < 5 * error).all())


@pytest.mark.parametrize("particles", ["plate", "repeat", "loop"])
def test_draws_are_laid_out_as_values_are(particles: str):
    """Each draw of d given z is where its z is: d follows the sign of z without doubt."""

    def model(y):
        with pyro.plate("data", y.shape[0], dim=-2):
            z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
            with pyro.plate("inner", 3, dim=-1):
                d = pyro.sample("d", dist.Bernoulli(torch.sigmoid(1e3 * z)))
                pyro.sample("y", dist.Normal(d, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", y.shape[0], dim=-2):
            pyro.sample("z", dist.Normal(0.0, y.new_ones(y.shape[0], 1)))

    evaluator = Evaluator(
        model, guide, as_batch(data(4, 3)), data_plate="data", particles=particles, seed=0
    )
    (chunk,) = evaluator.chunks(7)
    drawn = evaluator.draw_summed_out(chunk.rows, chunk.values, (9,))
    z, d = chunk.values["z"], drawn["d"]
    assert z.shape == (7, 4, 1) and d.shape == (7, 4, 3)
    assert bool((d == (z > 0)).all())


def test_the_table_of_sites_says_what_needs_no_guide():
    assert "discrete ['c']: summed out where no guide proposes them" in str(
        pv.describe(gaussians, data(3))
    )


def test_draws_that_the_prior_rules_out_weigh_nothing():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(WEIGHTS))
            z = pyro.sample("z", dist.Uniform(1.0 * c, c + 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    evaluator = Evaluator(model, proposal, as_batch(data(20)), seed=0)
    (chunk,) = evaluator.chunks(20)
    z = chunk.values["z"]
    outside = (z < 0) | (z > 3)
    assert bool(outside.any()) and not bool(outside.all())
    assert torch.equal(chunk.weights.total == -torch.inf, outside)
    drawn = evaluator.draw_summed_out(chunk.rows, chunk.values, (9,))["c"]
    assert torch.equal(drawn[~outside], z[~outside].floor().long())


def test_a_distribution_with_a_mask_of_its_own():
    x, keep = data(4), torch.tensor([True, False, True, False])

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(WEIGHTS).mask(keep))
            pyro.sample("x", dist.Normal(MEANS[c], 1.0).mask(keep), obs=x)

    found = contract(*run(model, ["c"], 1, x), 1)[("c", "x")]
    joint = WEIGHTS.log() + dist.Normal(MEANS, 1.0).log_prob(x[:, None])
    torch.testing.assert_close(found, joint.logsumexp(1) * keep, rtol=0, atol=1e-12)


def test_a_site_outside_the_plate_of_what_it_depends_on_is_refused():
    def model(y):
        with pyro.plate("data", y.shape[0], dim=-2):
            with pyro.plate("inner", y.shape[1], dim=-1):
                d = pyro.sample("d", dist.Bernoulli(0.5))
            count = d.sum(-1, keepdim=True)
            pyro.sample("y", dist.Normal(count, 1.0), obs=y.sum(-1, keepdim=True))

    trace, log_probs = run(model, ["d"], 2, data(4, 3))
    with pytest.raises(
        ValueError, match=r"'y' depends on 'd', which lies in the plate \['inner'\]"
    ):
        contract(trace, log_probs, 2)


@pytest.mark.parametrize("inner", [True, False])
def test_a_guide_that_enumerates_what_others_see_the_mean_of_is_refused(inner):
    """Of the four assignments of two entries, two would count."""
    x = torch.tensor([[0.3, -1.0], [2.0, 1.0], [0.5, 0.2]])

    def model(x):
        features = pyro.plate("features", 2, dim=-1)
        with pyro.plate("data", len(x), dim=-2):
            with features:
                c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.3)))
            mean = c.mean(-1, keepdim=True)
            with features if inner else contextlib.nullcontext():
                value = x if inner else x[:, :1]
                pyro.sample("x", dist.Normal(3 * (c if inner else 0) - 2 * mean, 1.0), obs=value)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("features", 2, dim=-1):
            pyro.sample("c", dist.Bernoulli(torch.tensor(0.4)), infer={"enumerate": "parallel"})

    with pytest.raises(ValueError, match=r"the guide enumerates \['c'\].*Leave infer") as error:
        pv.ELBO().loss(model, guide, x)
    assert "'x'" in str(error.value)


# --- proposals that the guide enumerates


X3 = torch.tensor([0.0, 1.0, 2.5], dtype=torch.float64)


def mixed_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7], dtype=x.dtype)))
        m = pyro.sample("m", dist.Bernoulli(torch.tensor([0.2, 0.6], dtype=x.dtype)[z]))
        pyro.sample("x", dist.Normal(2.0 * m + z, 1.0), obs=x)


def mixed_guide(x):
    logits = pyro.param("logits", torch.tensor([-2.0, -1.0, 2.0], dtype=x.dtype))
    with pyro.plate("data", len(x)):
        pyro.sample("m", dist.Bernoulli(logits=logits), infer={"enumerate": "parallel"})


def mixed_elbo(logits):
    """E_q(m)[log sum_z p(z) p(m | z) p(x | m, z) - log q(m)], by a sum of four terms."""
    total = torch.zeros((), dtype=X3.dtype)
    for m, log_q in (
        (0, -torch.nn.functional.softplus(logits)),
        (1, -torch.nn.functional.softplus(-logits)),
    ):
        terms = []
        for z, (p, q) in enumerate(((0.3, 0.2), (0.7, 0.6))):
            of_m = math.log(q if m else 1 - q)
            terms.append(math.log(p) + of_m + dist.Normal(2.0 * m + z, 1.0).log_prob(X3))
        joint = torch.logsumexp(torch.stack(terms), 0)
        total = total + (log_q.exp() * (joint - log_q)).sum()
    return total


@pytest.mark.parametrize(
    "loss",
    [pv.ELBO(), pv.ELBO(kl="sample"), pv.ELBO(3), pv.ELBO(2, vectorize_particles=False)],
    ids=repr,
)
def test_a_guide_enumerates_some_sites_and_the_model_sums_others(loss):
    pyro.clear_param_store()
    value = loss.loss_and_grads(mixed_model, mixed_guide, X3)
    logits = torch.tensor([-2.0, -1.0, 2.0], dtype=X3.dtype, requires_grad=True)
    exact = mixed_elbo(logits)
    exact.backward()
    assert value == pytest.approx(-exact.item(), rel=1e-12)
    found = pyro.param("logits").unconstrained().grad
    torch.testing.assert_close(found, -logits.grad, rtol=1e-10, atol=1e-12)


def test_enumerated_and_summed_sites_in_inner_plates():
    """m of each datum by the guide, c of each feature summed out given it: all by hand."""
    x = data(3, 2)

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            m = pyro.sample("m", dist.Bernoulli(torch.tensor(0.4, dtype=x.dtype)))
            with pyro.plate("features", 2, dim=-1):
                c = pyro.sample("c", dist.Categorical(WEIGHTS))
                pyro.sample("x", dist.Normal(MEANS[c] + 2 * m, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            probs = torch.tensor([[0.1], [0.5], [0.8]], dtype=x.dtype)
            pyro.sample("m", dist.Bernoulli(probs), infer={"enumerate": "parallel"})

    total = torch.zeros((), dtype=x.dtype)
    q = torch.tensor([0.1, 0.5, 0.8], dtype=x.dtype)
    for m, weight, prior in ((0, 1 - q, 0.6), (1, q, 0.4)):
        terms = WEIGHTS.log() + dist.Normal(MEANS + 2 * m, 1.0).log_prob(x[..., None])
        joint = torch.logsumexp(terms, -1).sum(-1) + math.log(prior)
        total = total + (weight * (joint - weight.log())).sum()
    for loss in (pv.ELBO(), pv.ELBO(2), pv.ELBO(2, vectorize_particles=False)):
        assert -loss.loss(model, guide, x) == pytest.approx(total.item(), rel=1e-12)


def test_values_of_a_plates_full_shape_where_the_guide_asks_for_them():
    """config_enumerate(guide, expand=True), for models that broadcast no values of size one."""
    x = data(6, 2)
    weights = data(5, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(x.new_ones(3)))
            both = torch.cat([z.expand(*y.shape[:-1], 2), y], -1)
            pyro.sample("x", dist.Normal(both @ weights, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))
            pyro.sample("y", dist.OneHotCategorical(x.new_ones(6, 3)))

    guide = pyro.infer.config_enumerate(guide, "parallel", expand=True)
    losses = []
    for loss in (pyro.infer.TraceEnum_ELBO(max_plate_nesting=1), pv.ELBO(kl="sample")):
        torch.manual_seed(0)
        losses.append(loss.loss(model, guide, x))
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
