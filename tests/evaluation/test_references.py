"""Which refined guide a guide is measured against."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv


def test_a_hand_written_guide_is_compared_against_its_family(compared):
    model, x, _, _ = compared

    def hand(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(model.posterior_mean(x), 0.5).to_event(1))

    found = pv.compare(model, {"hand": hand}, x, num_particles=2000, seed=0)
    data = found.dataset.sel(guide="hand")
    exact = model.elbo_of(x, model.posterior_mean(x), torch.full((30, 3), 0.5).double())
    optimum = model.log_evidence(x) - model.mean_field_gap
    gap = (optimum - exact).numpy()
    assert (abs(data.amortization_gap.values - gap) < 5 * data.amortization_gap_se + 1e-3).all()


def test_a_guide_of_no_family_has_no_split_unless_a_reference_is_named(compared):
    model, x, guide, _ = compared
    both = {"exact": model.posterior, "amortized": guide}
    data = pv.compare(model, both, x, num_particles=500, seed=0).dataset
    assert data.approximation_gap.sel(guide="exact").isnull().all()
    assert data.reference.sel(guide="exact") == ""
    named = pv.compare(model, both, x, num_particles=500, reference="exact", seed=0)
    data = named.dataset
    assert float(abs(data.approximation_gap).max()) < 1e-9  # the exact guide has no gap
    assert (data.amortization_gap.sel(guide="amortized") > 0).all()
    assert (data.pareto_k.sel(guide="exact") == 0).all()
    assert float(abs(data.ess.sel(guide="exact") - 500).max()) < 1e-6


def test_a_conditional_guide_is_no_mean_field():
    """q(z1) q(z2 | z1), exact: not of the Normal family, whatever its sites' distributions."""
    scale = 0.1

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
            b = pyro.sample("b", dist.Normal(a, scale))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def exact(x):
        variance = 1 + scale**2
        with pyro.plate("data", len(x)):
            a = pyro.sample(
                "a", dist.Normal(x / (1 + variance), (variance / (1 + variance)) ** 0.5)
            )
            precision = 1 / scale**2 + 1
            pyro.sample("b", dist.Normal((a / scale**2 + x) / precision, precision**-0.5))

    x = torch.randn(6, dtype=torch.float64)
    marginal = torch.distributions.Normal(x.new_zeros(()), x.new_tensor(2 + scale**2).sqrt())
    evidence = marginal.log_prob(x).numpy()
    found = pv.compare(
        model, {"exact": exact, "mf": pv.families.Normal()}, x, num_particles=500, seed=0
    ).dataset
    assert abs(found.elbo.sel(guide="exact").values - evidence).max() < 1e-9
    assert abs(found.log_evidence.values - evidence).max() < 1e-9  # not hidden by the mean field
    assert found.amortization_gap.sel(guide="exact").isnull().all()
    assert (found.approximation_gap.sel(guide="mf") > 1.0).all()


def test_names_and_kinds_of_guides_are_checked(compared):
    model, x, guide, _ = compared
    with pytest.raises(TypeError, match="a mapping from names"):
        pv.compare(model, guide, x)
    with pytest.raises(TypeError, match=r"guides\['mf'\]: a guide or a family is needed"):
        pv.compare(model, {"mf": pv.families.Normal}, x)
    with pytest.raises(ValueError, match="the name of the refined guide"):
        pv.compare(model, {"Normal per datum": guide}, x, num_particles=10)
