"""A model whose values of discrete latents do not run together as each alone is refused."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv

X = torch.tensor([[0.3, -1.0], [2.0, 1.0], [0.5, 0.2]], dtype=torch.float64)
LOSSES = (
    pv.ELBO(),
    pv.ELBO(3),
    pv.IWAE(1),
    pv.IWAE(2),
    pv.IWAE(2, vectorize_particles=False),
    pv.WakeSleep(2),
)


def inner(likelihood, count=2, values=2):
    """A discrete latent of each feature, of which a likelihood sees what it should not."""
    probs = torch.arange(1.0, values + 1).double()

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            with pyro.plate("features", count, dim=-1):
                c = pyro.sample("c", dist.Categorical(probs))
                pyro.sample("x", dist.Normal(z + likelihood(c.to(x)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True), 0.5))

    return model, guide


def sees_the_mean(c):
    return 3 * c - 2 * c.mean(-1, keepdim=True)


def sees_its_neighbour(c):
    return 3 * c - torch.roll(c, 1, -1)


def sees_one_pair_of_values(c):
    return 3 * c + ((c == 3) & (torch.roll(c, 1, -1) == 1)).to(c)


WRONG = {
    "mean": inner(sees_the_mean),
    "mean of one of many": inner(sees_the_mean, count=13),
    "neighbour": inner(sees_its_neighbour),
    "one pair of values": inner(sees_one_pair_of_values, values=4),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("rows", [1, 3])
def test_an_entry_that_sees_the_values_of_others_is_refused(name, rows):
    model, guide = WRONG[name]
    x = X[:rows] if "many" not in name else torch.randn(rows, 13).double()
    told = r"all values of \['c'\] at once differs .* at site 'x'.*values of others"
    for loss in LOSSES:
        with pytest.raises(ValueError, match=told):
            loss.loss(model, guide, x)
    for function in (pv.elbo, pv.iwae_bound):
        with pytest.raises(ValueError, match=told):
            function(model, guide, x, num_particles=2)


def test_what_an_entry_may_see_is_summed_out_exactly():
    """Its own value, and that of an outer plate: all assignments by hand."""
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.4, dtype=torch.float64)))
            with pyro.plate("features", 2, dim=-1):
                c = pyro.sample("c", dist.Categorical(weights))
                pyro.sample("x", dist.Normal(3 * c - 2 * a, 1.0), obs=x)

    def guide(x):
        pass

    total = []
    for a, *c in itertools.product((0, 1), (0, 1, 2), (0, 1, 2)):
        means = 3.0 * torch.tensor(c).double() - 2.0 * a
        prior = math.log((0.6, 0.4)[a]) + weights[list(c)].log().sum()
        total.append(prior + dist.Normal(means, 1.0).log_prob(X).sum(-1))
    exact = torch.logsumexp(torch.stack(total), 0)
    found = pv.log_weights(model, guide, X, num_particles=2).total
    torch.testing.assert_close(found, exact.expand(2, -1))
    assert -pv.ELBO().loss(model, guide, X) == pytest.approx(exact.sum().item(), rel=1e-12)


def test_values_that_cannot_follow_each_other_are_no_discrepancy():
    """A chain that only moves on: most assignments have a density of zero."""
    moves = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]).double()
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).double()

    def model(x):
        with pyro.plate("data", len(x)):
            state = torch.zeros((), dtype=torch.long)
            for step in range(x.shape[1]):
                state = pyro.sample(f"c{step}", dist.Categorical(moves[state]))
                pyro.sample(f"x{step}", dist.Normal(state.to(x), 1.0), obs=x[:, step])

    alpha = torch.full((4, 3), -torch.inf).double()
    alpha[:, 0] = 0.0
    for step in range(5):
        alpha = torch.logsumexp(alpha[:, :, None] + moves.log(), 1)
        alpha = alpha + dist.Normal(torch.arange(3.0).double(), 1.0).log_prob(x[:, step, None])
    exact = torch.logsumexp(alpha, 1)

    def guide(x):
        pass

    assert -pv.ELBO().loss(model, guide, x) == pytest.approx(exact.sum().item(), rel=1e-10)
    torch.testing.assert_close(pv.elbo(model, guide, x, num_particles=1).value, exact)
