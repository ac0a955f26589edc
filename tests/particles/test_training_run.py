"""Runs in training: which terms there are, and with which scales."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_vae as pv
from tests.losses.gradients import X

pytestmark = pytest.mark.usefixtures("float64")


def test_enumerated_proposals_under_a_mask_are_counted_once():
    labels, seen = torch.tensor([0, 1, 2]), torch.tensor([True, False, True])
    means, weights = torch.tensor([0.0, 2.0, -2.0]), torch.tensor([0.2, 0.3, 0.5])

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(weights), obs=labels, obs_mask=seen)
            pyro.sample("x", dist.Normal(means[c], 1.0), obs=x)

    def proposal(x):
        return dist.Categorical(logits=torch.stack([x, -x, 0 * x], -1))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c_unobserved", proposal(x), infer={"enumerate": "parallel"})

    log_joint = weights.log() + dist.Normal(means, 1.0).log_prob(X.unsqueeze(-1))
    known = log_joint.gather(1, labels.unsqueeze(1)).squeeze(1)
    q = proposal(X).probs
    unknown = (q * (log_joint - q.log())).sum(-1)
    exact = torch.where(seen, known, unknown).sum()
    assert pv.ELBO().loss(model, guide, X) == pytest.approx(-exact.item(), rel=1e-12)


@pytest.mark.parametrize("inside", [True, False])
def test_a_deterministic_site_changes_no_weight(inside):
    weights = torch.linspace(0.5, 2.0, 20)
    slope = torch.tensor(0.3)

    def model_of(told):
        def model(x):
            if told and not inside:
                pyro.deterministic("u", x.sum())
            with pyro.plate("data", 300, subsample=x):
                if told and inside:
                    pyro.deterministic("u", 2 * x)
                with poutine.scale(scale=weights):
                    z = pyro.sample("z", dist.Normal(0.0, 1.0))
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        return model

    def guide(x):
        with pyro.plate("data", 300, subsample=x):
            pyro.sample("z", dist.Normal(slope * x, 1.0))

    x = torch.linspace(-2, 3, 20)
    values = []
    for told in (False, True):
        torch.manual_seed(0)
        values.append(pv.IWAE(10).loss(model_of(told), guide, x))
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_an_exact_guide_carries_the_models_scale():
    weights = torch.tensor([5.0, 0.1, 1.0])

    def model(x):
        loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(x)), poutine.scale(scale=weights):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("x", dist.Normal(loc[c], 1.0), obs=x)

    pyro.clear_param_store()
    guide = pv.ExactGuide(model, example=X)
    log_joint = torch.tensor([0.4, 0.6]).log() + dist.Normal(
        torch.tensor([-1.0, 1.0]), 1.0
    ).log_prob(X.unsqueeze(-1))
    exact = (weights * torch.logsumexp(log_joint, -1)).sum().item()
    for loss in (pv.ELBO(), pv.IWAE(3)):
        assert loss.loss(model, guide, X) == pytest.approx(-exact, rel=1e-12)
        assert loss.loss(model, lambda x: None, X) == pytest.approx(-exact, rel=1e-12)
    history = torch.tensor(pv.em(model, guide, X, progress=False).history["elbo"])
    assert (history.diff() > -1e-9).all()
    for step in ("importance", "nuts"):
        with pytest.raises(ValueError, match=r"site 'c' has the scale .*poutine.scale"):
            pv.em(model, guide, X, e_step=step, progress=False)


def test_a_site_that_the_guide_observes_has_no_place_in_the_bound():
    """With the exact posterior, the loss is -log p(x, t); Trace_ELBO's is off by log q(t)."""
    t = torch.tensor([0.2, -0.4, 1.5])

    def model(x, t):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("t", dist.Normal(z, 1.0), obs=t)

    for name, infer in {"t": {}, "of the guide": {"is_auxiliary": True}}.items():

        def guide(x, t, name=name, infer=infer):
            a = pyro.param("a", torch.tensor(0.3))
            with pyro.plate("data", len(x)):
                pyro.sample(name, dist.Normal(a + x, 1.0), obs=t, infer=infer)
                pyro.sample("z", dist.Normal((x + t) / 3, 3**-0.5))

        both = torch.distributions.MultivariateNormal(
            torch.zeros(2), torch.eye(2) + torch.ones(2, 2)
        )
        evidence = both.log_prob(torch.stack([X, t], -1)).sum()
        log_q = dist.Normal(0.3 + X, 1.0).log_prob(t).sum()
        for loss in (pv.ELBO(kl="sample"), pv.ELBO(3, "sample"), pv.IWAE(4)):
            pyro.clear_param_store()
            assert loss.loss(model, guide, X, t) == pytest.approx(-evidence.item(), rel=1e-12)
        with warnings.catch_warnings(action="ignore"):  # a site of the guide that is observed
            pyros = pyro.infer.Trace_ELBO().loss(model, guide, X, t)
        assert pyros == pytest.approx((log_q - evidence).item(), rel=1e-12)
        adam = pyro.optim.Adam({"lr": 0.1})
        svi = pv.CompiledSVI(model, guide, adam, pv.ELBO(kl="sample"))
        for _ in range(5):
            assert svi.step(X, t) == pytest.approx(-evidence.item(), rel=1e-12)
        assert pyro.param("a").item() == 0.3  # no gradient makes t improbable
        found = pv.elbo(model, guide, X, t, num_particles=3, seed=0).value.sum()
        assert found.item() == pytest.approx(evidence.item(), rel=1e-12)
