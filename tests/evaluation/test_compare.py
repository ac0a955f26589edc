"""Gaps: they add up, match closed forms, and carry honest paired errors."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from tests.models import NormalModel, encoder


def test_gaps_add_up_exactly(compared):
    data = compared[3].dataset
    total = data.log_evidence - data.elbo
    both = data.approximation_gap + data.amortization_gap
    assert float(abs(total - both).max()) < 1e-12


def test_gaps_are_the_closed_forms(compared):
    """Each datum within 5 standard errors, and refine's tolerance of 1e-3, of the exact."""
    model, x, guide, found = compared
    data = found.dataset.sel(guide="amortized")
    params = guide.family_params(x).detach()
    elbo = model.elbo_of(x, params[..., 0], params[..., 1].exp())
    optimum = model.log_evidence(x) - model.mean_field_gap
    for name, exact in {
        "elbo": elbo,
        "log_evidence": model.log_evidence(x),
        "approximation_gap": model.mean_field_gap.expand(30),
        "amortization_gap": optimum - elbo,
    }.items():
        error = abs(data[name].values - exact.numpy())
        assert (error < 5 * data[f"{name}_se"].values + 1e-3).all(), name


def test_a_bad_encoder_does_not_hide_its_own_gap(compared):
    """Through a hopeless encoder IWAE falls short of log p(x); the comparison must not."""
    model, x, _, _ = compared
    hopeless = pv.AmortizedGuide(model, encoder(6), example=x)
    with torch.no_grad():
        hopeless.head.bias.add_(torch.tensor([8.0, -2.0] * 3))
    alone = pv.iwae_bound(model, hopeless, x, num_particles=5000, seed=0)
    found = pv.compare(model, {"bad": hopeless}, x, seed=0).dataset
    assert alone.mean < model.log_evidence(x).mean() - 5
    error = abs(found.log_evidence.values - model.log_evidence(x).numpy())
    assert (error < 5 * found.log_evidence_se.values + 1e-3).all()
    assert list(found.guide.values) == ["bad", "Normal per datum"]


def test_only_families(compared):
    model, x, _, _ = compared
    found = pv.compare(model, {"mf": pv.families.Normal()}, x, num_particles=1000, seed=0)
    gap = found.dataset.approximation_gap.sel(guide="mf").values
    error = found.dataset.approximation_gap_se.sel(guide="mf").values
    assert (abs(gap - model.mean_field_gap.item()) < 5 * error + 1e-3).all()


def test_results_do_not_depend_on_the_chunk_size(compared):
    model, x, guide, found = compared
    local = found.guides["mean-field"]
    both = {"amortized": guide, "local": local}
    a, b = (
        pv.compare(
            model, both, x, num_particles=600, reference="local", chunk_size=c, seed=0
        ).dataset
        for c in (None, 500)
    )
    for name in a.data_vars:
        if a[name].dtype.kind == "f":
            assert float(abs(a[name] - b[name]).max()) < 1e-9
        else:
            assert (a[name] == b[name]).all()


def test_one_datum_models_are_compared():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide(scale):
        return lambda x: pyro.sample("mu", dist.Normal(x.sum() / (len(x) + 1), scale))

    x = torch.randn(8, dtype=torch.float64)
    covariance = torch.eye(8, dtype=x.dtype) + 1
    exact = torch.distributions.MultivariateNormal(torch.zeros_like(x), covariance).log_prob(x)
    found = pv.compare(
        model, {"exact": guide(1 / 3), "wide": guide(0.5)}, x, reference="exact",
        data_plate=False, num_particles=1000, seed=0,
    ).dataset  # fmt: skip
    assert float(abs(found.log_evidence - exact.item()).max()) < 1e-8
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(0.0, 0.5), torch.distributions.Normal(0.0, 1 / 3)
    ).item()
    gap = found.amortization_gap.sel(guide="wide").item()
    assert abs(gap - kl) < 4 * found.amortization_gap_se.sel(guide="wide").item()


def test_bad_arguments_are_refused(compared):
    model, x, guide, _ = compared
    with pytest.raises(ValueError, match="guides is empty"):
        pv.compare(model, {}, x)
    with pytest.raises(ValueError, match=r"reference='best' is not among the guides \['a'\]"):
        pv.compare(model, {"a": guide}, x, reference="best")
    with pytest.raises(TypeError, match=r"guides\['a'\]: a guide or a family is needed"):
        pv.compare(model, {"a": 3}, x)


def test_particles_by_repeat_are_compared_too():
    """A convolutional decoder: guides cross-score on the repeated batch."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.ConvTranspose2d(1, 1, 3))

        def forward(self, x):
            pyro.module("conv", self)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(3), obs=x)

    torch.manual_seed(0)
    model, x = Model(), (torch.rand(5, 1, 4, 4) > 0.5).float()
    guide = pv.AmortizedGuide(model, nn.Flatten(), example=x)
    found = pv.compare(model, {"amortized": guide}, x, num_particles=300, seed=0).dataset
    refined = found.iwae_bound.sel(guide="Normal per datum")
    assert (abs(found.log_evidence - refined) < 5 * found.iwae_bound_se.max("guide") + 0.05).all()
    assert (found.amortization_gap.sel(guide="amortized") > -0.05).all()


def test_a_guide_that_takes_all_the_data_or_none_beside_one_that_can_be_cut():
    """300 data are two blocks for one guide and one for the other: rows must stay aligned."""

    model = NormalModel()
    torch.manual_seed(0)
    data = torch.randn(300, dtype=torch.float64)

    def whole(x):
        with pyro.plate("data", 300):
            pyro.sample("z", dist.Normal(data / 2, data.new_tensor(0.5).sqrt()))

    net = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 2).double())
    guide = pv.AmortizedGuide(model, net, example=data)
    found = pv.compare(
        model, {"cut": guide, "whole": whole}, data, reference="whole", num_particles=50, seed=0
    ).dataset
    evidence = torch.distributions.Normal(0.0, data.new_tensor(2.0).sqrt()).log_prob(data).numpy()
    assert abs(found.elbo.sel(guide="whole").values - evidence).max() < 1e-9
    assert abs(found.log_evidence.values - evidence).max() < 1e-9


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


def test_a_refined_guide_brings_the_global_latents_it_was_fitted_at():
    def model(x):
        g = pyro.sample("g", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(g, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    x, given = torch.randn(3, dtype=torch.float64), {"g": torch.tensor(0.7, dtype=torch.float64)}
    local = pv.refine(model, guide, x, given=given, seed=0)
    both = {"local": local, "full rank": pv.families.FullRankNormal()}
    found = pv.compare(model, both, x, num_particles=50, seed=0).dataset
    evidence = torch.distributions.Normal(0.7, 2**0.5).log_prob(x)
    assert abs(found.log_evidence.values - evidence.numpy()).max() < 1e-3
    assert found.attrs["given"] == "g at the values passed"
