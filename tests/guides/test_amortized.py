"""Guides: one family, two sources of parameters; nothing shared, nothing misaligned."""

from __future__ import annotations

import io
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_vae as pv
from tests.models import encoder, factor_analysis


@pytest.fixture
def setting():
    model = factor_analysis()
    torch.manual_seed(0)
    return model, model.data(9)


def guides(model, x):
    return {
        "amortized": pv.AmortizedGuide(model, encoder(6), example=x),
        "local": pv.LocalGuide(model, num_data=len(x), example=x),
    }


@pytest.mark.parametrize("kind", ["amortized", "local"])
def test_all_parameters_exist_and_each_gets_a_gradient(setting, kind):
    model, x = setting
    guide = guides(model, x)[kind]
    before = {name: p.shape for name, p in guide.named_parameters()}
    pv.ELBO(kl="sample")(model, guide)(x).backward()
    assert {name: p.shape for name, p in guide.named_parameters()} == before
    for name, parameter in guide.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", ["amortized", "local"])
def test_save_and_load_without_a_training_step(setting, kind):
    model, x = setting
    guide, other = guides(model, x)[kind], guides(model, x)[kind]
    if kind == "local":
        nn.init.normal_(guide.table)
    file = io.BytesIO()
    torch.save(guide.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other.family_params(x), guide.family_params(x), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["amortized", "local"])
def test_a_new_guide_is_the_prior(setting, kind):
    """The start has the prior's moments: exact up to 1,000 draws, and the encoder's noise."""
    model, x = setting
    trace = poutine.trace(guides(model, x)[kind]).get_trace(x)
    fn = trace.nodes["z"]["fn"].base_dist
    assert fn.loc.abs().max() < 0.4 and (fn.scale.log().abs() < 0.4).all()


def test_a_simplex_latent():
    def model(x):
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Multinomial(5, p), obs=x)

    x = torch.tensor([[5.0, 0, 0], [1, 2, 2]])
    guide = pv.AmortizedGuide(model, nn.Linear(3, 4), example=x)
    assert guide.num_coordinates == 2
    refined = pv.refine(model, guide, x, seed=0)
    bound = pv.iwae_bound(model, refined, x, num_particles=20_000, seed=0)
    # Uniform over the 21 count vectors that sum to 5.
    uniform = -torch.log(torch.tensor(21.0, dtype=torch.float64))
    assert ((bound.value - uniform).abs() < 4 * bound.std_error + 1e-4).all()


@pytest.mark.parametrize("example_rows", [50, 10])
def test_subsampled_plates_scale_the_guide_as_the_model(example_rows):
    """Whether the example is a minibatch or the whole, q is scaled as p is."""

    def model(x):
        with pyro.plate("data", 50, subsample=x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(50)
    guide = pv.AmortizedGuide(
        model, nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 2)), example=x[:example_rows]
    )
    nodes = poutine.trace(guide).get_trace(x[:10]).nodes
    assert nodes["z"]["scale"] == 5.0
    assert poutine.trace(guide).get_trace(x).nodes["z"]["scale"] == 1.0


def test_a_plate_that_follows_the_batch_is_not_scaled(setting):
    model, x = setting
    guide = pv.AmortizedGuide(model, encoder(6), example=x)
    assert poutine.trace(guide).get_trace(x[:2]).nodes["z"]["scale"] == 1.0


def test_a_model_that_draws_its_own_minibatch():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=3) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    class Remember(nn.Linear):
        def forward(self, x):
            self.seen = x
            return super().forward(x.unsqueeze(-1))

    x = torch.arange(12.0)
    guide = pv.AmortizedGuide(model, Remember(1, 2), example=x)
    guide_trace = poutine.trace(guide).get_trace(x)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(x)
    assert torch.equal(model_trace.nodes["x"]["value"], guide.encoder.seen)
    assert guide_trace.nodes["z"]["scale"] == model_trace.nodes["z"]["scale"] == 4.0


def test_global_latents_get_the_global_guide():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(5)
    net = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 2))
    with pytest.raises(ValueError, match=r"\['mu'\] lie outside.*global_guide=\.\.\."):
        pv.AmortizedGuide(model, net, example=x)
    auto = pyro.infer.autoguide.AutoNormal(poutine.block(model, expose=["mu"]))
    guide = pv.AmortizedGuide(model, net, example=x, global_guide=auto)
    assert any("mu" in name for name, _ in guide.named_parameters())
    assert set(guide(x)) == {"mu", "z"}
    loss = pv.ELBO(kl="sample")(model, guide)(x)
    loss.backward()
    assert all(p.grad is not None for p in guide.parameters())


def test_bad_guides_are_refused(setting):
    model, x = setting
    with pytest.raises(ValueError, match=r"encoder returned a tensor of shape \(9, 2, 3\)"):
        pv.AmortizedGuide(model, nn.Unflatten(1, (2, 3)), example=x)
    with pytest.raises(ValueError, match=r"encoder returned a tensor of shape \(6, 9\)"):
        pv.AmortizedGuide(model, Transpose(), example=x)
    with pytest.raises(TypeError, match="family='normal': an instance of a family is needed"):
        pv.LocalGuide(model, num_data=9, example=x, family="normal")
    with pytest.raises(ValueError, match="num_data=0"):
        pv.LocalGuide(model, num_data=0, example=x)
    with pytest.raises(ValueError, match="with data_plate=False there are none"):
        pv.AmortizedGuide(model, nn.Linear(6, 2).double(), example=x, data_plate=False)
    with pytest.raises(ValueError, match="num_data=9: with data_plate=False the whole batch is"):
        pv.LocalGuide(model, num_data=9, example=x, data_plate=False)


class Transpose(nn.Module):
    def forward(self, x):
        return x.T


def _encoded(network):
    x = torch.linspace(-1.0, 1.0, 6)[:, None].expand(6, 3).clone()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample(
                "x", dist.Normal(z[..., None], 1.0).expand([*z.shape, 3]).to_event(1), obs=x
            )

    guide = pv.AmortizedGuide(model, network, example=x)
    return guide, pv.fit(model, guide, x, epochs=60, compile="replay", progress=False)


def test_encoders_of_torchscript():
    """As the module that they are made from; all their parameters are trained."""
    found = []
    for kind in (lambda net: net, torch.jit.script):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch would have no more of it
            net = kind(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh()))
        before = [p.detach().clone() for p in net.parameters()]
        found.append(_encoded(net)[1].history["elbo"])
        assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_an_encoder_that_is_a_function():
    """One without parameters will do; one that hides some is refused, for nobody finds them."""
    guide, result = _encoded(torch.tanh)
    assert sum(p.numel() for p in guide.parameters()) == 2 * 3 + 2
    assert len(result.history["elbo"]) == 60
    net = torch.nn.Linear(3, 4)
    told = r"parameters that are not its own .*\[4, 3\], \[4\]"
    for hiding in (lambda x: net(x), net.forward, pv.MissingEncoder(lambda x: net(x[:, :3]))):
        with pytest.raises(ValueError, match=told):
            _encoded(hiding)
