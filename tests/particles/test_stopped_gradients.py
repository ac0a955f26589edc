"""Stopped gradients: expectations, scales, points and enumeration, by other routes."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide

import pyro_vae as pv
from pyro_vae.programs.handlers import LatentScale
from tests.losses.gradients import X, agree, enumerated_after_a_draw, mean_gradients, normal_pair

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_dreg_by_hand_with_parameters_of_another_type_than_the_data(dtype, rtol, vectorize):
    """Tucker et al. 2019, in float64: paths by the squares of their normalized weights."""
    x = torch.tensor([0.7, -1.2], dtype=torch.float64)
    slope, log_scale = (torch.tensor(v, dtype=dtype, requires_grad=True) for v in (0.3, -0.2))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=dtype), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x.to(dtype), log_scale.exp()))

    torch.manual_seed(0)
    pv.IWAE(3, "dreg", vectorize_particles=vectorize).loss_and_grads(model, guide, x)
    torch.manual_seed(0)
    noise = torch.randn(3, 2, dtype=dtype).double()
    loc, scale = slope.detach().double() * x, log_scale.detach().double().exp()
    z = loc + scale * noise
    log_weights = -(z**2) / 2 - (x - z) ** 2 / 2 + noise**2 / 2  # and a constant
    path = torch.softmax(log_weights, 0) ** 2 * (x - 2 * z + noise / scale)
    assert slope.grad.item() == pytest.approx(-(path * x).sum().item(), rel=rtol)
    assert log_scale.grad.item() == pytest.approx(-(path * scale * noise).sum().item(), rel=rtol)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("num_particles", [1, 2, 5])
def test_dreg_by_hand_where_all_is_one_datum(num_particles, vectorize):
    """A normal without plates, each of its draws a number: the bound and its DReG gradient."""
    x = torch.tensor(0.7)
    loc, log_scale = (torch.tensor(v, requires_grad=True) for v in (0.4, -0.2))

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    loss = pv.IWAE(num_particles, "dreg", vectorize_particles=vectorize, data_plate=False)
    torch.manual_seed(0)
    found = loss.loss_and_grads(model, guide, x)
    torch.manual_seed(0)
    noise, scale = torch.randn(num_particles), math.exp(-0.2)
    z = 0.4 + scale * noise
    constant = math.log(scale) - math.log(2 * math.pi) / 2
    log_weights = constant - z**2 / 2 - (x - z) ** 2 / 2 + noise**2 / 2
    bound = torch.logsumexp(log_weights, 0) - math.log(num_particles)
    path = torch.softmax(log_weights, 0) ** 2 * (x - 2 * z + noise / scale)
    assert found == pytest.approx(-bound.item(), rel=1e-12)
    assert loc.grad.item() == pytest.approx(-path.sum().item(), rel=1e-12)
    assert log_scale.grad.item() == pytest.approx(-(path * scale * noise).sum().item(), rel=1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.5, 4.0])
def test_dreg_under_warm_up_has_the_expectation_of_pathwise(beta):
    model, guide, parameters = normal_pair()
    scale = LatentScale(beta)
    model, guide = scale(model), scale(guide)
    rows = X.repeat(50)
    found = [
        mean_gradients(pv.IWAE(6, e), model, guide, parameters, 200, rows)
        for e in ("dreg", "pathwise")
    ]
    agree(*found)


@pytest.mark.parametrize("loss", [pv.IWAE(1, "stl"), pv.IWAE(3, "stl")], ids=repr)
def test_stl_weighs_the_density_of_each_latent_by_its_own_scale(loss):
    """z2 depends on z1 in the guide: the derivative by z1 is of two densities, scaled apart."""
    x = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    scale = torch.tensor([0.5, 0.25, 2.0], dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(zero, 1.0))
            with poutine.scale(scale=scale):
                z2 = pyro.sample("z2", dist.Normal(z1[..., None], 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z1 + z2[..., 0], 1.0), obs=x)

    def guide(x):
        a = pyro.param("a", zero + 0.4)
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(a * x, 1.0))
            with poutine.scale(scale=scale):
                pyro.sample("z2", dist.Normal((2 * a * z1)[..., None], 0.5).to_event(1))

    pyro.clear_param_store()
    torch.manual_seed(0)
    found = loss.loss_and_grads(model, guide, x)
    # The same by hand: paths through the draws alone, the parameter of the densities stopped.
    torch.manual_seed(0)
    noise = [torch.randn(loss.num_particles, 3, dtype=torch.float64) for _ in range(2)]
    a = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    z1 = a * x + noise[0]
    z2 = 2 * a * z1 + 0.5 * noise[1]
    log_weights = (
        dist.Normal(z1 + z2, 1.0).log_prob(x)
        + dist.Normal(zero, 1.0).log_prob(z1)
        + scale * dist.Normal(z1, 1.0).log_prob(z2)
        - dist.Normal(a.detach() * x, 1.0).log_prob(z1)
        - scale * dist.Normal(2 * a.detach() * z1, 0.5).log_prob(z2)
    )
    bound = (torch.logsumexp(log_weights, 0) - math.log(loss.num_particles)).sum()
    bound.backward()
    assert found == pytest.approx(-bound.item(), rel=1e-12)
    gradient = pyro.param("a").unconstrained().grad
    assert gradient.item() == pytest.approx(-a.grad.item(), rel=1e-10)


def test_dreg_needs_one_scale_for_all_latents():
    def model(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            with poutine.scale(scale=0.5):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(u + z, 1.0), obs=x)

    guide = pv.LocalGuide(model, num_data=3, example=X)
    with pytest.raises(ValueError, match="'dreg' needs one scale for all latent sites"):
        pv.IWAE(4, "dreg").loss_and_grads(model, guide, X)
    assert math.isfinite(pv.IWAE(4).loss_and_grads(model, guide, X))


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["dreg", "stl"])
def test_a_point_has_no_score(estimator):
    """The gradient of a Delta's parameter is that of the bound: nothing to weigh or leave out."""
    point = torch.full((3,), 0.3, requires_grad=True)
    loc = torch.full((3,), 0.4, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(u + z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("u", dist.Delta(point))
            pyro.sample("z", dist.Normal(loc, 1.0))

    found = [
        mean_gradients(pv.IWAE(6, e), model, guide, [point], 1500, X)
        for e in (estimator, "pathwise")
    ]
    agree(*found)
    # Alone, with no other draw: the family of points.
    local = pv.LocalGuide(model, num_data=3, example=X, family=pv.families.Delta())
    slopes = [
        torch.autograd.grad(
            pv.IWAE(5, e).differentiable_loss(model, local, X), list(local.parameters())
        )[0]
        for e in (estimator, "pathwise")
    ]
    torch.testing.assert_close(*slopes)


def test_a_point_made_of_draws_and_parameters_is_refused():
    def model():
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(s, 1.0), obs=torch.tensor(2.0))

    guide = autoguide.AutoStructured(model, conditionals={"s": "normal"}, dependencies={})
    guide()
    for loss in (pv.ELBO(estimator="stl"), pv.IWAE(4, "dreg", data_plate=False)):
        with pytest.raises(ValueError, match="site 's' is a point made of other draws and of par"):
            loss.loss_and_grads(model, guide)
    assert math.isfinite(pv.ELBO().loss_and_grads(model, guide))


def test_stl_with_an_enumerated_proposal_that_depends_on_a_draw():
    model, guide, parameters = enumerated_after_a_draw(twice=False)
    rows = X.repeat(30)
    agree(
        *(
            mean_gradients(pv.ELBO(kl="sample", estimator=e), model, guide, parameters, 300, rows)
            for e in ("stl", "pathwise")
        )
    )


def test_stl_with_draws_that_depend_on_an_enumerated_proposal_is_refused():
    model, guide, _ = enumerated_after_a_draw(twice=True)
    with pytest.raises(ValueError, match=r"site 'u' depends on \['c'\], which are enumerated"):
        pv.ELBO(estimator="stl").loss_and_grads(model, guide, X)
