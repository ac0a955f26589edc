"""Gradient estimators against exact derivatives: unbiased where they say so, and noiseless.

The replicates of an estimate are the data of one batch: each datum has the same x, and its
own copy of the parameters, which come as arguments. One backward then gives as many
independent gradients as there are data.
"""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.particles.plan import Needs, plan
from pyro_vae.particles.stopped_gradients import StoppedGradients
from pyro_vae.particles.training_run import TrainingRun
from pyro_vae.programs.batch import as_batch
from pyro_vae.programs.pair import Pair
from tests.models import encoder, factor_analysis, log_normal_model

# x ~ Normal(w z, e^s), z ~ Normal(a, 1);  q(z | x) = Normal(c x + d, e^r), off the posterior.
X = 1.3
THETA = torch.tensor([0.4, 1.2, -0.3], dtype=torch.float64)  # a, w, s
PHI = torch.tensor([0.3, 0.1, -0.2], dtype=torch.float64)  # c, d, r


def model(x, theta, phi):
    a, w, s = theta.unbind(-1)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(w * z, s.exp()), obs=x)


def guide(x, theta, phi):
    c, d, r = phi.unbind(-1)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(c * x + d, r.exp()))


def score_guide(x, theta, phi):
    c, d, r = phi.unbind(-1)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(c * x + d, r.exp()).has_rsample_(False))


def gradients(loss, num_replicates, *, guide=guide, calls=1, seed=0, x=X, theta=THETA, phi=PHI):
    """Gradients of the loss by (theta, phi), [replicates, 3] each; of the last of some calls."""
    torch.manual_seed(seed)
    data = torch.full((num_replicates,), x, dtype=torch.float64)
    theta, phi = (p.expand(num_replicates, 3).clone().requires_grad_() for p in (theta, phi))
    for _ in range(calls):
        theta.grad = phi.grad = None
        loss.loss_and_grads(model, guide, data, theta, phi)
    none = torch.zeros_like(data)[:, None]
    return tuple(none if p.grad is None else p.grad for p in (theta, phi))


def log_normal(value, location, log_scale):
    scaled = (value - location) / log_scale.exp()
    return -0.5 * scaled**2 - log_scale - 0.5 * math.log(2 * math.pi)


def log_weight(noise, x, theta, phi):
    (a, w, s), (c, d, r) = theta, phi
    z = c * x + d + r.exp() * noise
    zero = torch.zeros_like(s)
    return log_normal(z, a, zero) + log_normal(x, w * z, s) - log_normal(z, c * x + d, r)


def exact_elbo(x, theta, phi):
    (a, w, s), (c, d, r) = theta, phi
    m, variance = c * x + d, (2 * r).exp()
    misfit = (x - w * m) ** 2 + w**2 * variance
    log_likelihood = -0.5 * math.log(2 * math.pi) - s - misfit / (2 * (2 * s).exp())
    return log_likelihood - (0.5 * (variance + (m - a) ** 2 - 1) - r)


NOISE = torch.linspace(-11, 11, 401, dtype=torch.float64)
NOISE_WEIGHTS = torch.softmax(-0.5 * NOISE**2, 0)


def exact_iwae(x, theta, phi, num_particles):
    r"""E log((w_1 + ... + w_K) / K), to rounding, by two quadratures in one dimension.

    log S is the integral over u of exp(-e^u) - exp(-e^u S) (Frullani), and the expectation
    of exp(-t S) the K-th power of that of exp(-t w). The trapezoidal rule converges faster
    than any power.
    """
    log_w = log_weight(NOISE, x, theta, phi)
    u = torch.linspace(-40.0, 80.0, 961, dtype=torch.float64)
    laplace = torch.exp(-torch.exp(u[:, None] + log_w)) @ NOISE_WEIGHTS
    integrand = torch.exp(-u.exp()) - laplace**num_particles
    return torch.trapezoid(integrand, u) - math.log(num_particles)


def exact_gradients(bound, x=X, theta=THETA, phi=PHI):
    """Derivatives of minus the bound by (theta, phi)."""
    theta, phi = theta.clone().requires_grad_(), phi.clone().requires_grad_()
    found = torch.autograd.grad(-bound(x, theta, phi), [theta, phi], allow_unused=True)
    return tuple(torch.zeros(3).double() if g is None else g for g in found)


def assert_mean(draws, exact, errors=4.0):
    """The mean of independent rows is the exact one, within so many standard errors."""
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() <= errors * error + 1e-12).all(), (
        draws.mean(0) - exact
    ) / error


def assert_other_mean(draws, exact, errors=10.0):
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() > errors * error).any()


# --- the references themselves ---------------------------------------------------------


def test_the_references_agree():
    """The quadrature for K is the closed ELBO at K = 1, and a Gauss-Hermite product at 2."""
    assert exact_iwae(X, THETA, PHI, 1).item() == pytest.approx(
        exact_elbo(X, THETA, PHI).item(), abs=1e-10
    )
    nodes, weights = np.polynomial.hermite.hermgauss(120)
    noise = torch.as_tensor(nodes * math.sqrt(2))
    weights = torch.as_tensor(weights / math.sqrt(math.pi))

    def hermite(x, theta, phi):
        log_w = log_weight(noise, x, theta, phi)
        pairs = torch.logaddexp(log_w[:, None], log_w) - math.log(2)
        return (weights[:, None] * weights * pairs).sum()

    assert exact_iwae(X, THETA, PHI, 2).item() == pytest.approx(
        hermite(X, THETA, PHI).item(), abs=1e-8
    )
    ours = exact_gradients(lambda *p: exact_iwae(*p, 2))
    for found, wanted in zip(ours, exact_gradients(hermite), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7)


# --- the ELBO --------------------------------------------------------------------------

ELBOS = {
    "pathwise, analytic": ({}, guide),
    "pathwise, sampled": ({"kl": "sample"}, guide),
    "stl": ({"estimator": "stl"}, guide),
    "score, analytic": ({"estimator": "score"}, score_guide),
    "score, sampled": ({"estimator": "score", "kl": "sample"}, score_guide),
    "score, of what can be reparameterized": ({"estimator": "score"}, guide),
}


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("name", ELBOS)
def test_elbo_gradients_are_unbiased(name, num_particles, vectorize):
    """Within 4 standard errors of 20000 replicates of the closed form's derivative."""
    options, proposal = ELBOS[name]
    loss = pv.ELBO(num_particles, vectorize_particles=vectorize, **options)
    # The second call: the running baseline of a single particle is then at work.
    found = gradients(loss, 20_000, guide=proposal, calls=2)
    for draws, exact in zip(found, exact_gradients(exact_elbo), strict=True):
        assert_mean(draws, exact)


@pytest.mark.parametrize("num_particles", [1, 3])
def test_a_baseline_takes_noise_out_of_the_score(num_particles):
    loss = pv.ELBO(num_particles, estimator="score")
    noise = {}
    for calls in (1, 2):  # the first call of one particle has no baseline yet
        noise[calls] = gradients(loss, 20_000, guide=score_guide, calls=calls)[1].std(0)
        if num_particles > 1:
            break
        loss = pv.ELBO(num_particles, estimator="score")
    pathwise = gradients(pv.ELBO(num_particles), 20_000)[1].std(0)
    if num_particles == 1:
        assert (noise[2] < 0.9 * noise[1]).all()
    assert (noise[max(noise)] < 6 * pathwise).all()


def test_the_score_estimator_keeps_paths_of_other_sites():
    """z1 has no reparameterization, z2 ~ q(z2 | z1) has one: both parts, to the exact ELBO.

    z1, z2 ~ Normal(0, 1), x ~ Normal(z1 + z2, 1); q = Normal(m, e^r) Normal(b z1, 0.7).
    """

    def model(x, phi):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros_like(x), 1.0))
            z2 = pyro.sample("z2", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z1 + z2, 1.0), obs=x)

    def guide(x, phi):
        m, r, b = phi.unbind(-1)
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(m, r.exp()).has_rsample_(False))
            pyro.sample("z2", dist.Normal(b * z1, 0.7))

    def bound(phi):
        m, r, b = phi
        variance = (2 * r).exp()
        misfit = (X - (1 + b) * m) ** 2 + (1 + b) ** 2 * variance + 0.49
        kl1 = 0.5 * (variance + m**2 - 1) - r
        kl2 = 0.5 * (0.49 + b**2 * (m**2 + variance) - 1) - math.log(0.7)
        return -0.5 * misfit - kl1 - kl2

    point = torch.tensor([0.2, -0.3, 0.4], dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad(-bound(point), point)
    x = torch.full((20_000,), X, dtype=torch.float64)
    for kl in ("analytic", "sample"):
        for num_particles in (1, 4):
            torch.manual_seed(0)
            loss = pv.ELBO(num_particles, kl=kl, estimator="score")
            phi = point.detach().expand(len(x), 3).clone().requires_grad_()
            for _ in range(2):
                phi.grad = None
                loss.loss_and_grads(model, guide, x, phi)
            assert_mean(phi.grad, exact)


@pytest.mark.parametrize("local", [False, True])
def test_the_score_estimator_of_a_global_latent(local):
    """Its draw earns what all data earn: mu ~ Normal(0, 1), x_n ~ Normal(mu, 1), 3 data.

    Or z_n ~ Normal(mu, 1) in between, with q(z_n) = Normal(0.2 x_n, 0.5).
    """
    x = torch.tensor([0.3, -0.8, 1.9], dtype=torch.float64)
    m, r = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.2, -0.5))

    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0)) if local else mu
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("mu", dist.Normal(m, r.exp()).has_rsample_(False))
        if local:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.2 * x, 0.5))

    variance = (2 * r).exp()
    seen = 0.2 * x if local else x
    bound = -0.5 * ((seen - m) ** 2 + variance).sum() - (0.5 * (variance + m**2 - 1) - r)
    exact = torch.stack(torch.autograd.grad(-bound, [m, r]))
    for num_particles in (1, 4):
        torch.manual_seed(0)
        loss, draws = pv.ELBO(num_particles, estimator="score"), []
        for _ in range(300):
            m.grad = r.grad = None
            loss.loss_and_grads(model, guide, x)
            draws.append(torch.stack([m.grad, r.grad]))
        assert_mean(torch.stack(draws), exact)


def test_auto_normal_on_a_positive_site():
    """stl and pathwise of an auxiliary site and its Delta: the derivative by quadrature."""
    x = torch.full((20_000,), 3.0, dtype=torch.float64)

    def bound(m, log_scale):
        u = m + log_scale.exp() * NOISE
        joint = log_normal(u, torch.zeros_like(m), torch.zeros_like(m))
        likelihood = log_normal(x[0], u.exp(), torch.zeros_like(m))
        return (NOISE_WEIGHTS * (joint + likelihood - log_normal(u, m, log_scale))).sum()

    location, scale = 0.5, 0.4
    point = [torch.tensor(v, dtype=x.dtype, requires_grad=True) for v in (location, scale)]
    exact = torch.autograd.grad(-bound(point[0], point[1].log()), point)
    for num_particles in (1, 3):
        for options in ({"estimator": "stl"}, {"kl": "sample"}, {"kl": "analytic"}):
            pyro.clear_param_store()
            torch.manual_seed(0)
            guide = pyro.infer.autoguide.AutoNormal(
                log_normal_model, create_plates=lambda x: pyro.plate("data", len(x))
            )
            guide(x)
            locations, scales = guide.parameters()
            with torch.no_grad():
                locations.fill_(location)
                scales.fill_(scale + math.log(-math.expm1(-scale)))  # softplus gives the scale
            loss = pv.ELBO(num_particles, vectorize_particles=False, **options)
            loss.loss_and_grads(log_normal_model, guide, x)
            assert_mean(locations.grad, exact[0])
            assert_mean(scales.grad, exact[1] * -math.expm1(-scale))


# --- the importance-weighted bound --------------------------------------------------------


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("num_particles", [1, 2, 5])
@pytest.mark.parametrize("estimator", ["pathwise", "dreg"])
def test_iwae_gradients_are_unbiased(estimator, num_particles, vectorize):
    """Within 4 standard errors of 40000 replicates of the derivative by quadrature."""
    loss = pv.IWAE(num_particles, estimator=estimator, vectorize_particles=vectorize)
    exact = exact_gradients(lambda *p: exact_iwae(*p, num_particles))
    for draws, wanted in zip(gradients(loss, 40_000), exact, strict=True):
        assert_mean(draws, wanted)


def test_stl_of_several_particles_is_biased_and_of_one_is_the_elbos():
    """Tucker et al. 2019: for K > 1 the expectation is another; by more than 20 errors here."""
    ours = gradients(pv.IWAE(1, estimator="stl"), 1000)
    elbos = gradients(pv.ELBO(1, estimator="stl"), 1000)
    for found, wanted in zip(ours, elbos, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    theta, phi = gradients(pv.IWAE(5, estimator="stl"), 40_000)
    exact_theta, exact_phi = exact_gradients(lambda *p: exact_iwae(*p, 5))
    assert_mean(theta, exact_theta)
    assert_other_mean(phi, exact_phi, errors=20)


def test_the_estimators_of_iwae_share_value_and_model_gradient():
    results = []
    for estimator in ("pathwise", "stl", "dreg"):
        theta, _ = gradients(pv.IWAE(4, estimator=estimator), 50)
        torch.manual_seed(0)
        x = torch.full((50,), X, dtype=torch.float64)
        batch = (x, THETA.expand(50, 3), PHI.expand(50, 3))
        results.append((pv.IWAE(4, estimator=estimator).loss(model, guide, *batch), theta))
    for value, theta in results[1:]:
        assert value == pytest.approx(results[0][0], rel=1e-13)
        torch.testing.assert_close(theta, results[0][1], rtol=1e-12, atol=1e-12)


def test_signal_to_noise_of_dreg_grows_with_particles_and_of_pathwise_falls():
    """As 1 / sqrt(K) (Rainforth et al. 2018), and as sqrt(K) (Tucker et al. 2019); to 15 %."""
    ratio = {}
    for estimator in ("pathwise", "dreg"):
        for num_particles in (10, 100):
            _, phi = gradients(pv.IWAE(num_particles, estimator=estimator), 10_000)
            _, exact = exact_gradients(lambda *p, k=num_particles: exact_iwae(*p, k))
            ratio[estimator, num_particles] = exact.abs() / phi.std(0)
    grown, fallen = (ratio[e, 100] / ratio[e, 10] for e in ("dreg", "pathwise"))
    expected = torch.full((3,), math.sqrt(10), dtype=torch.float64)
    torch.testing.assert_close(grown, expected, rtol=0.15, atol=0)
    torch.testing.assert_close(fallen, 1 / expected, rtol=0.15, atol=0)
    assert (ratio["dreg", 10] > 5 * ratio["pathwise", 10]).all()


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("data_dim", [-1, -2])
def test_paths_of_latents_in_inner_plates(data_dim, vectorize):
    """dreg scales each draw by its own datum's share: paired with pathwise, 4 standard errors."""
    row = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)

    def arrange(table):
        return table if data_dim == -2 else table.T

    def model(x, phi):
        with pyro.plate("data", len(x), dim=data_dim):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            with pyro.plate("feature", 3, dim=-3 - data_dim):
                u = pyro.sample("u", dist.Normal(z, 0.5))
                pyro.sample("x", dist.Normal(u, 1.0), obs=arrange(x))

    def guide(x, phi):
        m, b, r = (arrange(p[:, None]) for p in phi.unbind(-1))
        with pyro.plate("data", len(x), dim=data_dim):
            z = pyro.sample("z", dist.Normal(m, 0.6))
            with pyro.plate("feature", 3, dim=-3 - data_dim):
                pyro.sample("u", dist.Normal(b * z + 0.3 * arrange(x), r.exp()))

    draws = []
    for estimator in ("dreg", "pathwise", "stl"):
        loss = pv.IWAE(3, estimator=estimator, vectorize_particles=vectorize, data_plate="data")
        phi = torch.tensor([0.4, 0.2, -0.5], dtype=torch.float64).repeat(20_000, 1)
        phi.requires_grad_()
        torch.manual_seed(0)
        loss.loss_and_grads(model, guide, row.expand(20_000, 3), phi)
        draws.append(phi.grad)
    assert_mean(draws[0] - draws[1], torch.zeros(3, dtype=row.dtype))
    assert_other_mean(draws[2] - draws[1], torch.zeros(3, dtype=row.dtype))


def test_dreg_of_auto_normal_on_a_positive_site():
    """Through the auxiliary draw and its Delta: paired with pathwise, 4 standard errors."""
    x = torch.full((20_000,), 3.0, dtype=torch.float64)
    draws = []
    for estimator in ("dreg", "pathwise"):
        pyro.clear_param_store()
        guide = pyro.infer.autoguide.AutoNormal(
            log_normal_model, create_plates=lambda x: pyro.plate("data", len(x)), init_scale=0.5
        )
        guide(x)
        locations, scales = guide.parameters()
        with torch.no_grad():
            locations.fill_(0.5)
        torch.manual_seed(0)
        loss = pv.IWAE(3, estimator=estimator, vectorize_particles=False)
        loss.loss_and_grads(log_normal_model, guide, x)
        draws.append(torch.stack([locations.grad, scales.grad], -1))
    assert draws[1].mean(0).abs().min() > 0.01
    assert_mean(draws[0] - draws[1], torch.zeros(2, dtype=x.dtype))


# --- wake and sleep -------------------------------------------------------------------


def test_wake_theta_is_iwaes():
    """Under one seed, exactly."""
    wanted, _ = gradients(pv.IWAE(6), 40)
    found, _ = gradients(pv.WakeSleep(6), 40)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def forward_cross_entropy(x, theta, phi):
    """E_{p(z | x)} log q(z | x), in closed form, with the posterior held."""
    (a, w, s), (c, d, r) = theta.detach(), phi
    precision = 1 + w**2 / (2 * s).exp()
    mean = (a + w * x / (2 * s).exp()) / precision
    return -0.5 * (1 / precision + (mean - c * x - d) ** 2) / (2 * r).exp() - r


def exact_wake_of_two(x, theta, phi):
    """E sum_k w_k log q(z_k) of two draws, weights and draws held, by quadrature."""
    noise, weights = NOISE, NOISE_WEIGHTS
    c, d, r = phi.detach()
    log_w = log_weight(noise, x, theta.detach(), phi.detach())
    log_q = log_normal(c * x + d + r.exp() * noise, phi[0] * x + phi[1], phi[2])
    share = torch.sigmoid(log_w[:, None] - log_w)
    return (weights[:, None] * weights * (share * log_q[:, None] + (1 - share) * log_q)).sum()


@pytest.mark.parametrize("vectorize", [True, False])
def test_wake_phi_of_two_particles(vectorize):
    _, draws = gradients(pv.WakeSleep(2, vectorize_particles=vectorize), 40_000)
    _, exact = exact_gradients(exact_wake_of_two)
    assert_mean(draws, exact)


def test_wake_phi_tends_to_the_forward_kl():
    """Its bias falls as 1 / K: at K = 2 plain, at K = 400 within 4 standard errors + 2 %."""
    _, exact = exact_gradients(forward_cross_entropy)
    _, few = gradients(pv.WakeSleep(2), 20_000)
    assert_other_mean(few, exact)
    _, many = gradients(pv.WakeSleep(400), 4_000)
    error = many.std(0) / math.sqrt(len(many))
    assert ((many.mean(0) - exact).abs() < 4 * error + 0.02 * exact.abs()).all()


def test_sleep_phi_is_the_forward_kl_of_dreams():
    """Of log q(z | x) at (z, x) ~ p; theta gets the wake gradient alone."""

    def bound(x, theta, phi):
        (a, w, s), (c, d, r) = theta.detach(), phi
        mean = (1 - c * w) * a - d
        variance = (1 - c * w) ** 2 + (c * s.exp()) ** 2
        return -0.5 * (mean**2 + variance) / (2 * r).exp() - r

    theta, phi = gradients(pv.WakeSleep(2, insomnia=0.0), 40_000)
    assert_mean(phi, exact_gradients(bound)[1])
    assert_mean(theta, exact_gradients(lambda *p: exact_iwae(*p, 2))[0])
    mixed = gradients(pv.WakeSleep(2, insomnia=0.3), 40_000)[1]
    wake = exact_gradients(exact_wake_of_two)[1]
    assert_mean(mixed, 0.3 * wake + 0.7 * exact_gradients(bound)[1])


def test_sleep_phi_alone_needs_one_particle():
    theta, _ = gradients(pv.WakeSleep(1, insomnia=0.0), 20_000)
    assert_mean(theta, exact_gradients(exact_elbo)[0])


# --- no noise at the exact posterior ---------------------------------------------------


class Chain(nn.Module):
    """z2 ~ Normal(0, 1), z1 ~ Normal(alpha z2, tau), x ~ Normal(z1, sigma)."""

    alpha, tau, sigma = 0.8, 0.6, 0.5

    def forward(self, x, phi):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros_like(x), 1.0))
            z1 = pyro.sample("z1", dist.Normal(self.alpha * z2, self.tau))
            pyro.sample("x", dist.Normal(z1, self.sigma), obs=x)

    @property
    def posterior(self):
        """m2 = phi[0] x, log s2 = phi[1]; m1 = phi[2] z2 + phi[3] x, log s1 = phi[4]."""
        noise = self.tau**2 + self.sigma**2
        precision2 = 1 + self.alpha**2 / noise
        precision1 = self.tau**-2 + self.sigma**-2
        return torch.tensor(
            [
                self.alpha / noise / precision2,
                -0.5 * math.log(precision2),
                self.alpha / self.tau**2 / precision1,
                1 / self.sigma**2 / precision1,
                -0.5 * math.log(precision1),
            ],
            dtype=torch.float64,
        )


def chain_guide(x, phi):
    p = phi.unbind(-1)
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(p[0] * x, p[1].exp()))
        pyro.sample("z1", dist.Normal(p[2] * z2 + p[3] * x, p[4].exp()))


class PickyChain(Chain):
    """Refuses dimensions of particles."""

    def forward(self, x, phi):
        def refuse(z):
            if z.ndim != 1:
                raise ValueError("one dimension only")
            return z

        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros_like(x), 1.0))
            z1 = pyro.sample("z1", dist.Normal(self.alpha * refuse(z2), self.tau))
            pyro.sample("x", dist.Normal(refuse(z1), self.sigma), obs=x)


RUNS = {
    "in a plate": (Chain(), True, "plate"),
    "in a loop": (Chain(), False, "loop"),
    "repeated": (PickyChain(), True, "repeat"),
}
NOISELESS = {
    "ELBO stl": lambda k, v: pv.ELBO(k, estimator="stl", vectorize_particles=v),
    "IWAE stl": lambda k, v: pv.IWAE(k, estimator="stl", vectorize_particles=v),
    "IWAE dreg": lambda k, v: pv.IWAE(k, estimator="dreg", vectorize_particles=v),
}


@pytest.mark.parametrize("num_particles", [1, 5])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("loss", NOISELESS)
def test_no_noise_where_a_hierarchical_guide_is_exact(loss, run, num_particles):
    model, vectorize, mode = RUNS[run]
    objective = NOISELESS[loss](num_particles, vectorize)
    x = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)
    phi = model.posterior.expand(4, 5).clone().requires_grad_()
    value = objective.loss_and_grads(model, chain_guide, x, phi)
    ((found, *_),) = objective._plans.values()
    assert found.mode.name == (mode if num_particles > 1 else "loop")
    assert phi.grad.abs().max() < 1e-10
    std = math.sqrt(model.alpha**2 + model.tau**2 + model.sigma**2)
    evidence = torch.distributions.Normal(torch.zeros_like(x), std).log_prob(x).sum().item()
    assert value == pytest.approx(-evidence, abs=1e-10)
    phi.grad = None
    pathwise = pv.IWAE(num_particles, vectorize_particles=vectorize)
    pathwise.loss_and_grads(model, chain_guide, x, phi)
    assert phi.grad.abs().max() > 1e-2  # the others have noise there


CHAIN_PHI = torch.tensor([0.4, -0.5, 0.7, 0.2, -0.6], dtype=torch.float64)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("loss", "pathwise"), [("ELBO stl", pv.ELBO(3, kl="sample")), ("IWAE dreg", pv.IWAE(3))]
)
def test_a_hierarchical_guide_off_the_posterior(loss, pathwise, run):
    """As the pathwise gradient on average: 4 paired standard errors of 20000 replicates."""
    model, vectorize, _ = RUNS[run]
    x = torch.full((20_000,), 1.1, dtype=torch.float64)
    draws = []
    for objective in (NOISELESS[loss](3, vectorize), pathwise):
        objective.loss(model, chain_guide, x[:9], CHAIN_PHI.expand(9, 5))
        torch.manual_seed(0)
        phi = CHAIN_PHI.expand(len(x), 5).clone().requires_grad_()
        objective.loss_and_grads(model, chain_guide, x, phi)
        draws.append(phi.grad)
    assert_mean(draws[0] - draws[1], torch.zeros(5, dtype=x.dtype))
    assert draws[0].mean(0).abs().max() > 0.05  # there is something to get wrong


def test_stl_of_iwae_is_biased_for_a_hierarchical_guide_too():
    x = torch.full((20_000,), 1.1, dtype=torch.float64)
    draws = []
    for objective in (pv.IWAE(3, estimator="stl"), pv.IWAE(3)):
        phi = CHAIN_PHI.expand(len(x), 5).clone().requires_grad_()
        torch.manual_seed(0)
        objective.loss_and_grads(Chain(), chain_guide, x, phi)
        draws.append(phi.grad)
    assert_other_mean(draws[0] - draws[1], torch.zeros(5, dtype=x.dtype))


class Picky(nn.Module):
    """A factor analysis whose network takes matrices only."""

    def __init__(self, exact):
        super().__init__()
        self.exact = exact

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            if z.ndim != 2:
                raise ValueError("matrices only")
            location = z @ self.exact.loadings.T + self.exact.mean
            pyro.sample("x", dist.Normal(location, self.exact.noise).to_event(1), obs=x)


@pytest.mark.parametrize("run", ["plate", "repeat", "loop"])
@pytest.mark.parametrize("loss", NOISELESS)
def test_no_noise_where_a_correlated_guide_is_exact(loss, run):
    exact = factor_analysis(latents=2)
    torch.manual_seed(0)
    x = exact.data(5)
    loc = exact.posterior_mean(x).requires_grad_()
    tril = torch.linalg.cholesky(torch.linalg.inv(exact.posterior_precision)).requires_grad_()

    def guide(x):
        rows = len(x) // len(loc)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc.repeat(rows, 1), scale_tril=tril.tril()))

    model = Picky(exact) if run == "repeat" else exact
    objective = NOISELESS[loss](6, run != "loop")
    value = objective.loss_and_grads(model, guide, x)
    ((found, *_),) = objective._plans.values()
    assert found.mode.name == run
    assert value == pytest.approx(-exact.log_evidence(x).sum().item(), abs=1e-9)
    assert max(loc.grad.abs().max(), tril.grad.abs().max()) < 1e-10


@pytest.mark.parametrize("loss", NOISELESS)
def test_no_noise_for_a_guide_of_the_library(loss):
    """A diagonal family on a model whose posterior is diagonal."""
    exact = factor_analysis("orthogonal")
    torch.manual_seed(0)
    x = exact.data(4)
    guide = pv.LocalGuide(exact, num_data=4, example=x)
    mean, std = exact.posterior_mean(x), exact.posterior_precision.diagonal().rsqrt()
    (table,) = guide.parameters()
    with torch.no_grad():
        moments = pv.families.Normal().from_moments(mean, std.expand_as(mean))
        table.copy_(moments.reshape(table.shape))
    value = NOISELESS[loss](5, True).loss_and_grads(exact, guide, x)
    assert value == pytest.approx(-exact.log_evidence(x).sum().item(), abs=1e-9)
    assert table.grad.abs().max() < 1e-10


# --- guides that run twice -------------------------------------------------------------


class DropoutGuide(nn.Module):
    """z2 ~ q(z2 | x), z1 ~ q(z1 | z2, x), with dropout in both networks."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(1, 16), nn.Dropout(0.5), nn.Linear(16, 2)).double()
        self.second = nn.Sequential(nn.Linear(2, 16), nn.Dropout(0.5), nn.Linear(16, 2)).double()

    def forward(self, x, phi):
        with pyro.plate("data", len(x)):
            m, r = self.first(x[:, None]).unbind(-1)
            z2 = pyro.sample("z2", dist.Normal(m, r.exp()))
            both = torch.stack(torch.broadcast_tensors(z2, x), -1)
            m, r = self.second(both).unbind(-1)
            pyro.sample("z1", dist.Normal(m, r.exp()))


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_second_run_of_the_guide_sees_the_same_dropout(vectorize):
    """To 1e-12 the density of the first run, whose noise differs from seed to seed."""
    model, guide = Chain(), DropoutGuide()
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)
    batch = (x, x)
    pair = Pair(model, guide, as_batch(batch))
    particles = "auto" if vectorize else "loop"
    made = plan(pair, Needs(3, particles, data_plate=None, data="needed", enumeration="no"))
    assert guide.training
    gradients = StoppedGradients()
    run = TrainingRun(made, model, guide, as_batch(batch), 3, tracer=gradients.trace)
    after = torch.get_rng_state()
    stopped, natural = gradients.guide_terms(run, scaled=False), run.guide_terms()
    assert torch.equal(torch.get_rng_state(), after)
    for name in ("z1", "z2"):
        torch.testing.assert_close(stopped[name], natural[name], rtol=1e-12, atol=1e-12)
    other = TrainingRun(made, model, guide, as_batch(batch), 3).guide_terms()
    assert (other["z1"] - natural["z1"]).abs().max() > 0.01


@pytest.mark.parametrize("vectorize", [True, False])
def test_the_value_and_the_random_stream_of_stl_are_the_sampled_elbos(vectorize):
    model, guide = Chain(), DropoutGuide()
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)
    found = []
    for options in ({"estimator": "stl"}, {"kl": "sample"}):
        loss = pv.ELBO(3, vectorize_particles=vectorize, **options)
        torch.manual_seed(5)
        found.append((loss.loss_and_grads(model, guide, x, x), torch.rand(()).item()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    assert found[0][1] == found[1][1]


def test_every_parameter_of_an_amortized_guide_gets_a_gradient():
    exact = factor_analysis()
    torch.manual_seed(0)
    x = exact.data(8)
    guide = pv.AmortizedGuide(exact, encoder(6), example=x)
    for loss in (
        pv.ELBO(estimator="stl"),
        pv.ELBO(3, estimator="score"),
        pv.IWAE(3),
        pv.IWAE(3, estimator="stl"),
        pv.IWAE(3, estimator="dreg"),
        pv.WakeSleep(3),
        pv.WakeSleep(3, insomnia=0.0),
    ):
        guide.zero_grad()
        loss.loss_and_grads(exact, guide, x)
        for name, parameter in guide.named_parameters():
            assert parameter.grad is not None, (loss, name)
            assert parameter.grad.abs().sum() > 0, (loss, name)
            assert torch.isfinite(parameter.grad).all(), (loss, name)
