"""What a loss does with each site, and why."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

import pyro_vae as pv
from pyro_vae.programs.batch import as_batch
from tests.models import encoder, factor_analysis, log_normal_model


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
    run = pv.ELBO(num_particles)._run(model, guide, as_batch(x))
    assert set(pv.ELBO(num_particles)._analytic(run)) == {"u"}
