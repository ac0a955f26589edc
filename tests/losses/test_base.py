"""What all losses have in common: their interface to Pyro and torch, plans of pairs, state."""

from __future__ import annotations

import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, ReweightedWakeSleep, Trace_ELBO, TraceGraph_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae.programs.batch import as_batch
from tests.losses.gradients import losses_and_gradients
from tests.models import encoder, factor_analysis, log_normal_model


@pytest.fixture
def setting():
    model = factor_analysis()
    torch.manual_seed(0)
    x = model.data(9)
    return model, pv.AmortizedGuide(model, encoder(6), example=x), x


def test_as_a_module_for_a_plain_torch_loop(setting):
    model, guide, x = setting
    loss = pv.ELBO(kl="sample")(model, guide)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.02)
    first = loss(x).item()
    for _ in range(200):
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()
    assert loss(x).item() < first - 10


@pytest.mark.parametrize(
    ("pyros", "ours"),
    [
        (RenyiELBO(alpha=0, num_particles=2), pv.IWAE(2)),
        (ReweightedWakeSleep(num_particles=2), pv.WakeSleep(2)),
        (TraceGraph_ELBO(), pv.ELBO(estimator="score")),
    ],
)
def test_as_a_module_where_pyros_are_none(setting, pyros, ours):
    """Trap: Pyro's have no differentiable_loss."""
    model, guide, x = setting
    with pytest.raises((AttributeError, NotImplementedError)):
        pyros(model, guide)(x)
    module = ours(model, guide)
    module(x).backward()
    assert all(bool((p.grad != 0).any()) for p in guide.parameters())
    assert {id(p) for p in guide.parameters()} <= {id(p) for p in module.parameters()}


class Picky(nn.Module):
    """Takes latents of given shapes only."""

    def __init__(self, takes):
        super().__init__()
        self.takes = takes

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            if not self.takes(z):
                raise ValueError("not this shape")
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def test_networks_that_take_no_particles_get_the_batch_repeated(caplog):
    """At the same draws: 12 normals are 2 times 6, for fewer than 16 come one by one."""
    model, x = Picky(lambda z: z.ndim == 2), torch.randn(3, 2, dtype=torch.float64)
    guide = pv.LocalGuide(model, num_data=3, example=x)
    loss = pv.ELBO(2, kl="sample")
    value, gradient = losses_and_gradients(loss, model, guide, x)
    assert [plan.mode.name for plan, *_ in loss._plans.values()] == ["repeat"]
    assert caplog.messages == []
    wanted, wanted_gradient = losses_and_gradients(Trace_ELBO(2), model, guide, x)
    assert value == pytest.approx(wanted, rel=1e-12)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-10, atol=1e-10)


def test_networks_that_take_neither_are_looped_and_said_so(caplog):
    model, x = Picky(lambda z: z.shape == (3, 2)), torch.randn(3, 2, dtype=torch.float64)
    guide = pv.LocalGuide(model, num_data=3, example=x)
    loss = pv.ELBO(4, kl="sample")
    loss.loss(model, guide, x)
    assert caplog.text.count("particles run in a loop, which is slow") == 1
    value, gradient = losses_and_gradients(loss, model, guide, x)
    wanted, wanted_gradient = losses_and_gradients(Trace_ELBO(4), model, guide, x)
    assert value == pytest.approx(wanted, rel=1e-12)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-10, atol=1e-10)


def test_latents_that_cannot_be_reparameterized_are_refused_by_name():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Poisson(1.0))
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Poisson(1.0))

    with pytest.raises(ValueError, match=r"site 'c' \(Poisson\) cannot be reparameterized"):
        pv.ELBO().loss(model, guide, torch.zeros(2))


def test_a_guide_without_a_latent_site_is_refused_in_training(setting):
    model, _, x = setting
    with pytest.raises(ValueError, match=r"no sample statement for .* \['z'\]"):
        pv.ELBO().loss(model, lambda x: None, x)


@pytest.mark.parametrize("loss", [pv.ELBO(2), pv.IWAE(2, "dreg"), pv.WakeSleep(2, insomnia=0.5)])
def test_a_used_loss_is_pickled_without_the_pair(loss, setting):
    model, guide, x = setting
    torch.manual_seed(0)
    value = loss.loss(model, guide, x)
    copy = pickle.loads(pickle.dumps(loss))
    assert copy._plans == {}
    torch.manual_seed(0)
    assert copy.loss(model, guide, x) == value


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


def test_a_loss_takes_a_sparse_argument_where_no_rows_are_taken():
    def model(x):
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.sparse.sum(x, 1).to_dense())

    def guide(x):
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    x = torch.eye(4).to_sparse()
    assert pv.ELBO().loss(model, guide, x) > 0
    with pytest.raises(TypeError, match="argument 0 of the batch is sparse"):
        pv.ELBO(2).loss(model, guide, x)
