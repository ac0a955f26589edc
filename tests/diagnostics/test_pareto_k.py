"""k-hat per datum, and what a loss does with each site."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

import pyro_vae as pv
from tests.models import encoder, factor_analysis, log_normal_model


def test_k_hat_is_the_tail_index_of_the_ratio():
    """Proposal N(0, s^2) for a standard normal, s < 1: weights have tail index 1 - s^2.

    w(z) ~ exp(c z^2), c = (1/s^2 - 1)/2, so P(w > t) falls as t^(-1/(1 - s^2)) up to logs,
    which bias k-hat at finite K: 0.1 of tolerance.
    """
    torch.manual_seed(0)
    scales = torch.tensor([0.5, 0.8], dtype=torch.float64)
    z = scales * torch.randn(100_000, 2, dtype=torch.float64)
    ratio = dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(0.0, scales).log_prob(z)
    assert (pv.pareto_k(ratio) - (1 - scales**2)).abs().max() < 0.12


def test_k_hat_of_a_datum_does_not_grow_with_the_number_of_data():
    """Trap: psis_diagnostic sums the weights over the data, so that its k-hat grows with N."""
    model = factor_analysis("correlated")
    torch.manual_seed(0)
    x = model.data(1).expand(60, -1).contiguous()
    variance = 1 / model.posterior_precision.diagonal()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(model.posterior_mean(x), variance.sqrt()).to_event(1))

    def pyros(n):
        torch.manual_seed(0)
        return pyro.infer.importance.psis_diagnostic(
            model, guide, x[:n], num_particles=2000, max_plate_nesting=1
        )

    alone = pv.pareto_k(pv.log_weights(model, guide, x[:1], num_particles=2000, seed=0))
    many = pv.pareto_k(pv.log_weights(model, guide, x, num_particles=2000, seed=0))
    assert many.shape == (60,) and abs(many.median() - alone.item()) < 0.2
    assert pyros(60) > pyros(1) + 0.3


def test_constant_weights_have_no_tail():
    model = factor_analysis()
    x = model.data(3)
    weights = pv.log_weights(model, model.posterior, x, num_particles=200)
    assert pv.pareto_k(weights).tolist() == [0.0, 0.0, 0.0]
    assert math.isnan(pv.pareto_k(torch.randn(5, 1)).item())


def test_k_hat_wants_a_matrix():
    with pytest.raises(ValueError, match=r"shape \[K, N\] are needed, found \(3,\)"):
        pv.pareto_k(torch.zeros(3))


def test_explain_names_each_site():
    model = factor_analysis()
    x = model.data(3)
    guide = pv.AmortizedGuide(model, encoder(6), example=x)
    assert pv.explain(pv.ELBO(), model, guide, x) == {
        "z": "analytic: closed form between Normal and Normal"
    }
    assert pv.explain(pv.ELBO(kl="sample"), model, guide, x) == {"z": "sampled: kl='sample'"}
    told = pv.explain(pv.ELBO(), model, model.posterior, x)
    assert told == {"z": "analytic: closed form between MultivariateNormal and Normal"}
    assert pv.explain(pv.ELBO(estimator="stl"), model, guide, x)["z"].startswith("sampled: stl")
    assert pv.explain(pv.IWAE(3), model, guide, x)["z"].startswith("sampled: an importance weight")
    auto = pyro.infer.autoguide.AutoNormal(
        log_normal_model, create_plates=lambda x: pyro.plate("data", len(x))
    )
    told = pv.explain(pv.ELBO(), log_normal_model, auto, torch.ones(2))
    assert told["s"].startswith("analytic: a point")
    assert told["s_unconstrained"] == "sampled: auxiliary site of the guide"
    with pytest.raises(TypeError, match="not Trace_ELBO"):
        pv.explain(Trace_ELBO(), model, guide, x)


@pytest.mark.parametrize("num_particles", [1, 3])
def test_explain_says_what_the_loss_does_below_a_summed_out_site(num_particles):
    """A prior that depends on c has no closed form beside it: the loss samples it, and says so."""
    x = torch.tensor([0.3, -1.0, 2.0])

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.3)))
            z = pyro.sample("z", dist.Normal(3 * c - 1, 1.0))
            u = pyro.sample("u", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + u + c, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))
            pyro.sample("u", dist.Normal(x / 4, 1.0))

    told = pv.explain(pv.ELBO(num_particles), model, guide, x)
    assert told["c"].startswith("summed out")
    assert told["z"].startswith("sampled: its prior depends on discrete latents")
    assert told["u"].startswith("analytic")
    torch.manual_seed(0)
    run = pv.ELBO(num_particles)._run(model, guide, (x,), {})
    assert set(pv.ELBO(num_particles)._analytic(run)) == {"u"}
