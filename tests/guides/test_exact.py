"""The exact posterior as a guide: every log weight is log p(x), to rounding."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae.evaluation.bounds import elbo, log_weights
from pyro_vae.guides.exact import ExactGuide
from tests.models import MEANS, TABLE, WEIGHTS

GRID = torch.tensor([[0.1, -2.0], [1.3, 0.4], [-0.7, 2.2]], dtype=torch.float64)


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Mixture(nn.Module):
    """A mixture of Gaussians with parameters to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(WEIGHTS.log())
        self.means = nn.Parameter(MEANS.clone())

    def forward(self, x: Tensor) -> None:
        pyro.module("mixture", self)
        with pyro.plate("data", 50, subsample=x):
            c = pyro.sample("c", dist.Categorical(logits=self.logits))
            pyro.sample("x", dist.Normal(self.means[c], 1.0), obs=x)

    def joint(self, x: Tensor) -> Tensor:
        fit = dist.Normal(self.means, 1.0).log_prob(x.unsqueeze(-1))
        return self.logits.log_softmax(-1) + fit


def table(x):
    """Three sites that depend on one another, of three families."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Categorical(WEIGHTS))
        b = pyro.sample("b", dist.Bernoulli(TABLE[a, 1]))
        weights = TABLE[a] + 0.1 * b.unsqueeze(-1)
        c = pyro.sample("c", dist.OneHotCategorical(weights))
        pyro.sample("x", dist.Normal(MEANS[a] + b - 2 * c[..., 0], 0.7), obs=x)


def table_by_hand(x):
    joint = []
    for a, b, c in itertools.product(range(3), range(2), range(2)):
        weights = TABLE[a] + 0.1 * b
        term = WEIGHTS[a].log() + TABLE[a, b].log() + (weights / weights.sum())[c].log()
        joint.append(term + dist.Normal(MEANS[a] + b - 2 * (c == 0), 0.7).log_prob(x))
    return torch.stack(joint).reshape(3, 2, 2, len(x))


def nested(y):
    """A site in a plate inside the data plate depends on one outside of it."""
    with pyro.plate("data", y.shape[0], dim=-2):
        c = pyro.sample("c", dist.Categorical(WEIGHTS.expand(y.shape[0], 1, 3)))
        with pyro.plate("inner", y.shape[1], dim=-1):
            d = pyro.sample("d", dist.Bernoulli(TABLE[c, 1].expand_as(c * y.new_ones(y.shape))))
            pyro.sample("y", dist.Normal(GRID[c, d.long()], 1.0), obs=y)


def nested_by_hand(y):
    leaf = TABLE.log()[..., None, None] + dist.Normal(GRID[..., None, None], 1.0).log_prob(y)
    return WEIGHTS.log()[:, None] + leaf.logsumexp(1).sum(-1)


CASES = {
    "mixture": (Mixture(), data(7), lambda x: Mixture().joint(x).logsumexp(-1).detach()),
    "table": (table, data(7), lambda x: table_by_hand(x).flatten(0, 2).logsumexp(0)),
    "nested": (nested, data(5, 3), lambda y: nested_by_hand(y).logsumexp(0)),
}


@pytest.mark.parametrize("particles", ["plate", "repeat", "loop"])
@pytest.mark.parametrize("case", CASES)
def test_every_log_weight_is_the_evidence(case: str, particles: str):
    model, x, by_hand = CASES[case]
    guide = ExactGuide(model, example=x)
    total = log_weights(model, guide, x, num_particles=6, particles=particles).total
    torch.testing.assert_close(total, by_hand(x).expand(6, -1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
def test_chunks_change_nothing(chunk_size: int):
    model, x, by_hand = CASES["nested"]
    guide = ExactGuide(model, example=x)
    total = log_weights(model, guide, x, num_particles=6, chunk_size=chunk_size, seed=3).total
    torch.testing.assert_close(total, by_hand(x).expand(6, -1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_pyro_sums_over_the_proposals(case: str, particles: int):
    model, x, by_hand = CASES[case]
    guide = ExactGuide(model, example=x)
    loss = pyro.infer.TraceEnum_ELBO(
        max_plate_nesting=2, num_particles=particles, vectorize_particles=particles > 1
    )
    scale = 50 / len(x) if case == "mixture" else 1.0
    assert loss.loss(model, guide, x) == pytest.approx(-scale * by_hand(x).sum().item(), abs=1e-9)


def test_a_whole_batch_as_one_datum():
    def model(y):
        k = pyro.sample("k", dist.Categorical(WEIGHTS))
        with pyro.plate("rows", len(y)):
            c = pyro.sample("c", dist.Bernoulli(TABLE[k, 1]))
            pyro.sample("y", dist.Normal(GRID[k, c.long()], 1.0), obs=y)

    y = data(6)
    guide = ExactGuide(model, example=y, data_plate=False)
    total = log_weights(model, guide, y, num_particles=5, data_plate=False).total
    leaf = TABLE.log()[..., None] + dist.Normal(GRID[..., None], 1.0).log_prob(y)
    want = (WEIGHTS.log() + leaf.logsumexp(1).sum(-1)).logsumexp(0)
    torch.testing.assert_close(total, want.expand(5, 1), rtol=0, atol=1e-12)


def test_the_posterior_is_the_responsibilities():
    model, x = Mixture(), data(7)
    guide = ExactGuide(model, example=x)
    torch.testing.assert_close(
        guide.posterior(x)["c"], model.joint(x).softmax(-1).detach(), rtol=0, atol=1e-12
    )
    with torch.no_grad():
        model.means.add_(1.0)  # the model as it is now
    torch.testing.assert_close(
        guide.posterior(x)["c"], model.joint(x).softmax(-1).detach(), rtol=0, atol=1e-12
    )


def test_the_posterior_of_sites_in_plates():
    y = data(5, 3)
    found = ExactGuide(nested, example=y).posterior(y)
    joint = nested_by_hand(y)
    torch.testing.assert_close(found["c"], joint.softmax(0).T.unsqueeze(1), rtol=0, atol=1e-12)
    leaf = TABLE.log()[..., None, None] + dist.Normal(GRID[..., None, None], 1.0).log_prob(y)
    want = (joint.softmax(0)[:, None, :, None] * leaf.softmax(1)).sum(0).permute(1, 2, 0)
    torch.testing.assert_close(found["d"], want, rtol=0, atol=1e-12)


def test_the_gradient_of_the_elbo_is_the_evidences():
    model, x = Mixture(), data(7)
    guide = ExactGuide(model, example=x)
    loss = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)
    found = torch.autograd.grad(
        loss.differentiable_loss(model, guide, x), [model.logits, model.means]
    )
    evidence = 50 / 7 * model.joint(x).logsumexp(-1).sum()
    want = torch.autograd.grad(-evidence, [model.logits, model.means])
    torch.testing.assert_close(found, want, rtol=0, atol=1e-10)


def test_frozen_is_an_e_step():
    model, x = Mixture(), data(40) * 2
    guide = ExactGuide(model, example=x)
    loss = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)
    before = model.joint(x).logsumexp(-1).sum().item()
    weights = guide.posterior(x)["c"]
    with guide.frozen(x):
        with torch.no_grad():  # the M-step in closed form
            model.means.copy_((weights * x[:, None]).sum(0) / weights.sum(0))
            model.logits.copy_(weights.mean(0).log())
        gradient = torch.autograd.grad(
            loss.differentiable_loss(model, guide, x), [model.logits, model.means]
        )
        bound = -loss.loss(model, guide, x) * 40 / 50
    for part in gradient:  # the maximum of the expected log joint
        torch.testing.assert_close(part, torch.zeros_like(part), rtol=0, atol=1e-10)
    after = model.joint(x).logsumexp(-1).sum().item()
    assert before < bound < after
    free = -loss.loss(model, guide, x) * 40 / 50
    assert free == pytest.approx(after, abs=1e-9)


def test_frozen_refuses_other_data():
    x = data(7)
    guide = ExactGuide(Mixture(), example=x)
    with guide.frozen(x):
        guide(x.clone())
        with pytest.raises(ValueError, match="posterior is frozen for"):
            guide(x + 1)
    guide(x + 1)


def test_frozen_takes_arguments_by_keyword():
    x = data(7)
    guide = ExactGuide(Mixture(), example={"x": x})
    with guide.frozen(x=x), guide.frozen({"x": x}):
        guide(x=x)
        with pytest.raises(ValueError, match="posterior is frozen for"):
            guide(x=x + 1)


def test_masked_data_count_for_nothing():
    keep = torch.tensor([True, False, True, True, False, True, True])

    def model(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=keep):
            c = pyro.sample("c", dist.Categorical(WEIGHTS))
            pyro.sample("x", dist.Normal(MEANS[c], 1.0), obs=x)

    x = data(7)
    guide = ExactGuide(model, example=x)
    want = Mixture().joint(x).logsumexp(-1).sum(-1).detach()
    want = (Mixture().joint(x).logsumexp(-1) * keep).detach()
    total = log_weights(model, guide, x, num_particles=3).total
    torch.testing.assert_close(total, want.expand(3, -1), rtol=0, atol=1e-12)
    loss = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, x)
    assert loss == pytest.approx(-want.sum().item(), abs=1e-9)


def test_values_that_the_data_rule_out():
    def model(x):
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.4, dtype=torch.float64)))
            pyro.sample("x", dist.Normal(0.0, torch.ones_like(x)), obs=x)
            allowed = (x > 0) == (b > 0.5)
            pyro.factor("sign", torch.where(allowed, 0.0, -torch.inf).to(x))

    x = torch.tensor([-0.2, 1.5], dtype=torch.float64)
    with pyro.validation_enabled(False):
        guide = ExactGuide(model, example=x)
        total = log_weights(model, guide, x, num_particles=4).total
    chances = torch.tensor([0.6, 0.4], dtype=torch.float64).log()
    want = chances + dist.Normal(0.0, 1.0).log_prob(x)
    torch.testing.assert_close(total, want.expand(4, 2), rtol=0, atol=1e-12)


def test_it_has_no_parameters_and_leaves_the_models_mode():
    model, x = Mixture(), data(7)
    guide = ExactGuide(model, example=x)
    assert not list(guide.parameters()) and not guide.state_dict()
    guide(x)
    assert model.training
    trace = poutine.trace(guide).get_trace(x)
    assert set(trace.nodes) - {"_INPUT", "_RETURN"} == {"c"}
    assert trace.nodes["c"]["scale"] == pytest.approx(50 / 7)


def test_draws_differ_by_particle():
    torch.manual_seed(0)
    x = data(1)
    guide = ExactGuide(Mixture(), example=x)
    with pyro.plate("particles", 20_000, dim=-2):
        draws = guide(x)["c"]
    want = guide.posterior(x)["c"][0]
    found = torch.bincount(draws.flatten(), minlength=3) / draws.numel()
    error = (want * (1 - want) / draws.numel()).sqrt()
    assert bool(((found - want).abs() < 4 * error).all())


def test_the_elbo_has_no_noise():
    model, x = Mixture(), data(7)
    bound = elbo(model, ExactGuide(model, example=x), x, num_particles=10)
    assert float(bound.std_error.max()) < 1e-12


def test_continuous_latents_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(WEIGHTS))
            z = pyro.sample("z", dist.Normal(MEANS[c], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"'z' \(Normal\) has no finitely many values.*'z' alone"):
        ExactGuide(model, example=data(3))


def test_other_discrete_families_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            n = pyro.sample("n", dist.Binomial(3, torch.tensor(0.3, dtype=x.dtype)))
            pyro.sample("x", dist.Normal(n, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"'n' is Binomial: an ExactGuide proposes Categorical"):
        ExactGuide(model, example=data(3))


def test_global_latents_are_refused():
    def model(x):
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3, dtype=x.dtype)))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(WEIGHTS))
            pyro.sample("x", dist.Normal(MEANS[c] + k, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"\['k'\] lie outside the data plate 'data'"):
        ExactGuide(model, example=data(3))


def test_a_model_that_draws_its_minibatch_is_refused():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=2) as index:
            c = pyro.sample("c", dist.Categorical(WEIGHTS))
            pyro.sample("x", dist.Normal(MEANS[c], 1.0), obs=x[index])

    with pytest.raises(ValueError, match="draws its own minibatch in plate 'data'"):
        ExactGuide(model, example=data(5))
