"""The exact answers that tests rely on: by integrals and sums that know nothing of Pyro."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from tests.models import BetaBernoulli, GammaPoisson, NormalModel, factor_analysis, mixture

X = torch.tensor([0.3, -1.1, 2.0], dtype=torch.float64)
COUNTS = torch.tensor([0.0, 1.0, 7.0], dtype=torch.float64)
FLIPS = torch.tensor([[0.0, 0, 0], [1, 0, 1], [1, 1, 1]], dtype=torch.float64)
CASES = {
    "normal": (NormalModel(1.5, 0.8), X, torch.linspace(-9, 9, 100_001).double(), "z"),
    "Gamma-Poisson": (
        GammaPoisson(2.5, 0.5),
        COUNTS,
        torch.linspace(1e-6, 80, 400_001).double(),
        "rate",
    ),
    "Beta-Bernoulli": (BetaBernoulli(), FLIPS, torch.linspace(0, 1, 100_003).double()[1:-1], "p"),
}


def log_joint(model, x, **values):
    """Summed over sites, of the one datum that x is."""
    trace = poutine.trace(poutine.condition(model, data=values)).get_trace(x)
    sites = (n for name, n in trace.nodes.items() if n["type"] == "sample" and name != "data")
    return sum(node["fn"].log_prob(node["value"]) for node in sites)


@pytest.mark.parametrize("name", CASES)
def test_the_evidence_is_the_integral(name):
    model, x, grid, site = CASES[name]
    for row in x:
        rows = row.expand(len(grid), *row.shape)
        density = log_joint(model, rows, **{site: grid}).exp()
        found = model.log_evidence(row.unsqueeze(0))
        torch.testing.assert_close(
            torch.trapezoid(density, grid).log(), found[0], rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("name", CASES)
def test_joint_less_posterior_is_the_evidence(name):
    model, x, _, site = CASES[name]
    node = poutine.trace(model.posterior).get_trace(x).nodes[site]
    ratio = log_joint(model, x, **{site: node["value"]}) - node["fn"].log_prob(node["value"])
    torch.testing.assert_close(ratio, model.log_evidence(x), rtol=0, atol=1e-12)


def test_columns_of_the_normal_model_are_independent():
    model, x = NormalModel(0.7, 0.3), torch.stack([X, X.flip(0)], -1)
    torch.testing.assert_close(
        model.log_evidence(x), model.log_evidence(X) + model.log_evidence(X.flip(0))
    )


def test_elbos_of_normal_guides():
    """By quadrature of the guide's density times log p(x, z) - log q(z)."""
    model, grid = NormalModel(1.5, 0.8), torch.linspace(-9, 9, 100_001).double()
    q = torch.distributions.Normal(torch.tensor(0.4).double(), torch.tensor(0.6).double())
    for value in X:
        joint = log_joint(model, value.expand(len(grid)), z=grid)
        wanted = torch.trapezoid(q.log_prob(grid).exp() * (joint - q.log_prob(grid)), grid)
        found = model.elbo_of(value.unsqueeze(0), q.loc, q.scale)
        assert found.item() == pytest.approx(wanted.item(), abs=1e-9)


def test_the_best_normal_of_a_gamma_poisson():
    """The gap is the difference of two ELBOs by quadrature over log rate, and least at zero."""
    model, u = GammaPoisson(0.7, 1.3), torch.linspace(-12, 6, 200_001).double()
    x = torch.tensor([4.0]).double()

    def elbo(m, s):
        q = torch.distributions.Normal(m, s)
        joint = log_joint(model, x.expand(len(u)), rate=u.exp()) + u
        return torch.trapezoid(q.log_prob(u).exp() * (joint - q.log_prob(u)), u)

    scale = (4.7) ** -0.5
    best = torch.tensor(4.7 / 2.3).double().log() - scale**2 / 2, torch.tensor(scale).double()
    off = best[0] + 0.2, best[1] * 1.3
    wanted = (elbo(*best) - elbo(*off)).item()
    assert model.normal_gap(x, *off).item() == pytest.approx(wanted, abs=1e-6)
    assert abs(model.normal_gap(x, *best).item()) < 1e-12


def test_a_mixture_sums_over_its_values():
    by_hand = sum(
        weight * dist.Normal(mean, 1.0).log_prob(X).exp()
        for weight, mean in zip(mixture.weights, mixture.means, strict=True)
    )
    torch.testing.assert_close(mixture.log_evidence(X), by_hand.log())


def test_factor_analysis():
    """Joint less posterior at any z; the mean field's gap is that of its best ELBO."""
    model = factor_analysis()
    x = model.data(3)
    z = torch.randn(3, 3, dtype=torch.float64)
    posterior = torch.distributions.MultivariateNormal(
        model.posterior_mean(x), precision_matrix=model.posterior_precision
    )
    ratio = log_joint(model, x, z=z) - posterior.log_prob(z)
    torch.testing.assert_close(ratio, model.log_evidence(x), rtol=0, atol=1e-10)
    best = model.posterior_precision.diagonal() ** -0.5
    gap = model.log_evidence(x) - model.elbo_of(x, model.posterior_mean(x), best)
    torch.testing.assert_close(gap, model.mean_field_gap.expand(3), rtol=0, atol=1e-10)
