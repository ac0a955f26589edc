"""Losses beside Pyro's: equal where Pyro's are right, and right where they are not."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceMeanField_ELBO,
)
from torch import nn

import pyro_vae as pv
from tests.losses.gradients import (
    X,
    agree,
    enumerated_after_a_draw,
    losses_and_gradients,
    mean_gradients,
)
from tests.models import NormalModel, encoder, factor_analysis, log_normal_model


@pytest.fixture
def setting():
    model = factor_analysis()
    torch.manual_seed(0)
    x = model.data(9)
    return model, pv.AmortizedGuide(model, encoder(6), example=x), x


PAIRS = {
    "sample": (pv.ELBO(kl="sample"), Trace_ELBO()),
    "sample, particles in a plate": (
        pv.ELBO(5, kl="sample"),
        Trace_ELBO(5, vectorize_particles=True, max_plate_nesting=1),
    ),
    "sample, particles in a loop": (
        pv.ELBO(5, kl="sample", vectorize_particles=False),
        Trace_ELBO(5),
    ),
    "analytic": (pv.ELBO(), TraceMeanField_ELBO()),
    "analytic, particles in a plate": (
        pv.ELBO(5),
        TraceMeanField_ELBO(5, vectorize_particles=True, max_plate_nesting=1),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_loss_and_gradient_are_pyros_under_one_seed(setting, name):
    ours, pyros = PAIRS[name]
    value, gradient = losses_and_gradients(ours, *setting)
    wanted, wanted_gradient = losses_and_gradients(pyros, *setting)
    assert value == pytest.approx(wanted, rel=1e-12)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("ours", "pyros"), [PAIRS["sample"], PAIRS["analytic"]])
def test_steps_of_svi_are_pyros_under_one_seed(ours, pyros):
    def run(loss):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model = factor_analysis()
        x = model.data(9)
        guide = pv.AmortizedGuide(model, encoder(6), example=x)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=loss)
        torch.manual_seed(1)
        return [svi.step(x) for _ in range(20)]

    assert run(ours) == pytest.approx(run(pyros), rel=1e-10)


def test_the_analytic_kl_is_the_sampled_one_on_average(setting):
    """Two estimates of one ELBO: they agree within 4 standard errors of 200 draws."""
    model, guide, x = setting
    torch.manual_seed(0)
    draws = {
        kl: torch.tensor([pv.ELBO(kl=kl).loss(model, guide, x) for _ in range(200)])
        for kl in ("analytic", "sample")
    }
    error = math.hypot(*(d.std().item() / 200**0.5 for d in draws.values()))
    assert abs(draws["analytic"].mean() - draws["sample"].mean()) < 4 * error


def test_elbo_on_the_exact_posterior_is_the_evidence(setting):
    model, _, x = setting
    loss = pv.ELBO(3, kl="sample").loss(model, model.posterior, x)
    assert loss == pytest.approx(-model.log_evidence(x).sum().item(), abs=1e-9)


# --- where Pyro's losses are wrong ---------------------------------------------------


def auto_normal(x):
    return pyro.infer.autoguide.AutoNormal(
        log_normal_model, create_plates=lambda x: pyro.plate("data", len(x))
    )


@pytest.mark.slow
def test_a_density_hidden_in_a_delta_is_kept():
    """Trap: TraceMeanField_ELBO drops the log_density of AutoNormal's Delta.

    s ~ LogNormal(0, 1), x ~ Normal(s, 1), x = 3: the best Gaussian on log s has median
    2.115; TraceMeanField_ELBO ends at 1.342.
    """
    x = torch.tensor([3.0], dtype=torch.float64)
    medians = {}
    for name, loss in (("ours", pv.ELBO(20)), ("pyro", TraceMeanField_ELBO(20))):
        pyro.clear_param_store()
        torch.manual_seed(0)
        guide = auto_normal(x)
        guide(x)
        optim = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.01 ** (1 / 1500)})
        svi = SVI(log_normal_model, guide, optim, loss=loss)
        for _ in range(1500):
            svi.step(x)
        medians[name] = guide.median()["s"].item()
    assert medians["ours"] == pytest.approx(2.115, abs=0.02)
    assert medians["pyro"] == pytest.approx(1.342, abs=0.05)


def normal_pair(model_mask=None, model_scale=1.0, guide_mask=None, guide_scale=1.0):
    def handled(fn, mask, scale):
        fn = fn if mask is None else poutine.mask(fn, mask=mask)
        return poutine.scale(fn, scale=scale)

    def model(x):
        with pyro.plate("data", len(x)):
            z = handled(prior, model_mask, model_scale)(x)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def prior(x):
        return pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            handled(lambda x: pyro.sample("z", dist.Normal(x, 0.5)), guide_mask, guide_scale)(x)

    return model, guide


@pytest.mark.parametrize("options", [{"model_scale": 3.0}, {"guide_scale": 3.0}])
def test_a_scale_on_one_side_only(options):
    """Trap: TraceMeanField_ELBO takes the guide's scale and mask and ignores the model's."""
    x = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    model, guide = normal_pair(**options)
    told = pv.explain(pv.ELBO(), model, guide, x)["z"]
    assert told.startswith("sampled: model and guide")
    torch.manual_seed(0)
    ours = pv.ELBO().loss(model, guide, x)
    torch.manual_seed(0)
    assert ours == pytest.approx(Trace_ELBO().loss(model, guide, x), rel=1e-12)
    analytic = [TraceMeanField_ELBO().loss(model, guide, x) for _ in range(200)]
    draws = torch.tensor([pv.ELBO().loss(model, guide, x) for _ in range(200)])
    gap = abs(sum(analytic) / 200 - draws.mean().item())
    assert gap > 6 * draws.std().item() / math.sqrt(200)  # Pyro's is another number


def test_a_mask_of_the_model_alone_masks_the_guide_too():
    """Trap: for Pyro a latent that the model masks keeps its proposal's entropy, or its KL."""
    x = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    mask = torch.tensor([True, False, True])
    both = normal_pair(model_mask=mask, guide_mask=mask)
    model, guide = normal_pair(model_mask=mask)
    assert pv.explain(pv.ELBO(), model, guide, x)["z"].startswith("analytic")
    for kl, pyros in (("analytic", TraceMeanField_ELBO()), ("sample", Trace_ELBO())):
        losses = []
        for loss, pair in (
            (pv.ELBO(kl=kl), (model, guide)),
            (pyros, both),  # Pyro's is right where both are masked
            (pyros, (model, guide)),
        ):
            torch.manual_seed(0)
            losses.append(loss.loss(*pair, x))
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
        assert abs(losses[0] - losses[2]) > 0.1


def test_the_same_scale_and_mask_on_both_sides_stay_analytic():
    x = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    mask = torch.tensor([True, False, True])
    model, guide = normal_pair(mask, 3.0, mask, 3.0)
    assert pv.explain(pv.ELBO(), model, guide, x)["z"].startswith("analytic: closed form")
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(x, 0.5), torch.distributions.Normal(torch.zeros_like(x), 1.0)
    )
    torch.manual_seed(0)
    trace = poutine.trace(guide).get_trace(x)
    likelihood = dist.Normal(trace.nodes["z"]["value"], 1.0).log_prob(x).sum()
    torch.manual_seed(0)
    found = pv.ELBO().loss(model, guide, x)
    assert found == pytest.approx((3 * kl[mask].sum() - likelihood).item(), rel=1e-12)


# --- importance weights: one for each datum, and scales outside the logarithm --------------

_NUM, _MINIBATCH, _PARTICLES, _WIDE = 200, 20, 100, 1.5


def wide_pair(how):
    """z ~ N(0, 1), x ~ N(z, 1); the guide is 1.5 wide, where the posterior is 0.71 wide."""

    def plate(x):
        return (
            pyro.plate("data", _NUM, subsample=x) if how == "plate" else pyro.plate("data", len(x))
        )

    def model(x):
        with plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with plate(x):
            pyro.sample("z", dist.Normal(x / 2, _WIDE))

    if how == "scale":
        scale = _NUM / _MINIBATCH
        return poutine.scale(model, scale=scale), poutine.scale(guide, scale=scale)
    return model, guide


@pytest.mark.parametrize("how", ["plate", "scale"])
def test_a_scale_stands_outside_the_logarithm(how):
    """Trap: RenyiELBO puts it inside, and is far above log p(x) in the mean.

    IWAE-K lies below log p(x) by c / 2K for each datum to first order, where c is the
    variance of w / p(x).
    """
    model, guide = wide_pair(how)
    generator = torch.Generator().manual_seed(0)
    x = 2**0.5 * torch.randn(_NUM, dtype=torch.float64, generator=generator)
    evidence = dist.Normal(0.0, 2**0.5).log_prob(x).sum().item()
    losses = {
        "ours": pv.IWAE(_PARTICLES),
        "pyro": RenyiELBO(
            alpha=0, num_particles=_PARTICLES, vectorize_particles=True, max_plate_nesting=1
        ),
    }
    bounds = {}
    for name, loss in losses.items():
        torch.manual_seed(0)
        passes = [
            -sum(loss.loss(model, guide, part) for part in x.split(_MINIBATCH)) * _MINIBATCH / _NUM
            for _ in range(25)
        ]
        bounds[name] = torch.tensor(passes)
    variance = _WIDE / (0.5 * math.sqrt(4 - _WIDE**-2)) - 1
    wanted = evidence - _NUM * variance / (2 * _PARTICLES)
    error = bounds["ours"].std().item() / 5
    assert abs(bounds["ours"].mean().item() - wanted) < 4 * error < 1.2
    assert bounds["ours"].mean() < evidence
    assert bounds["pyro"].mean() > evidence + 30


@pytest.mark.parametrize("num_data", [1, 40])
def test_every_datum_has_weights_of_its_own(num_data):
    """Trap: for ReweightedWakeSleep the whole batch has one, and one draw gets it all.

    The posterior is N(x / 2, 1 / 2), the guide N(x / 2 + shift, 1): the forward KL has
    the derivative shift for each datum.
    """

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("mean", x.new_zeros(())), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        shift = pyro.param("shift", x.new_tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + shift, 1.0))

    x = torch.linspace(-1.0, 1.0, num_data, dtype=torch.float64)
    options = {"num_particles": 100, "vectorize_particles": True}
    losses = {
        "ours": pv.WakeSleep(100),
        "pyro": ReweightedWakeSleep(insomnia=1.0, max_plate_nesting=1, **options),
    }
    found = {}
    for name, loss in losses.items():
        pyro.clear_param_store()
        torch.manual_seed(0)
        slopes = []
        for _ in range(60 if num_data > 1 else 200):
            loss.loss_and_grads(model, guide, x)
            shift = pyro.get_param_store()._params["shift"]
            slopes.append(shift.grad.item() / num_data)
            shift.grad = None
        slopes = torch.tensor(slopes)
        found[name] = slopes.mean().item(), slopes.std().item() / math.sqrt(len(slopes))
    # The weights of 100 draws leave an error of a few per cent.
    assert found["ours"][0] == pytest.approx(0.5, abs=0.02 + 4 * found["ours"][1])
    assert found["ours"][1] < 0.01
    if num_data == 1:
        assert found["pyro"][0] == pytest.approx(0.5, abs=0.02 + 4 * found["pyro"][1])
    else:
        assert found["pyro"][0] < 0.35


def test_wake_phi_is_the_derivative_of_weighted_log_densities():
    x = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)

    model = NormalModel()

    def guide(x):
        shift = pyro.param("shift", x.new_tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + shift, 0.8))

    loss = pv.WakeSleep(5)
    loss.loss(model, guide, x)
    torch.manual_seed(0)
    loss.loss_and_grads(model, guide, x)
    torch.manual_seed(0)
    z = x / 2 + 0.5 + 0.8 * torch.normal(torch.zeros(5, 3, dtype=x.dtype), torch.ones(()).double())
    log_weights = (
        dist.Normal(0.0, 1.0).log_prob(z)
        + dist.Normal(z, 1.0).log_prob(x)
        - dist.Normal(x / 2 + 0.5, 0.8).log_prob(z)
    )
    wanted = -(torch.softmax(log_weights, 0) * (z - x / 2 - 0.5) / 0.64).sum()
    assert pyro.get_param_store()._params["shift"].grad.item() == pytest.approx(wanted.item())


def test_dreg_has_the_mean_of_the_pathwise_gradient_and_less_noise():
    """Within 4 standard errors of 30 x 300 data; "stl" has another mean (Tucker et al. 2019)."""
    x = torch.full((300,), 1.0, dtype=torch.float64)

    model = NormalModel()

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.numbers = nn.Parameter(torch.tensor([-0.5, 0.2], dtype=torch.float64))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x / 2 + self.numbers[0], self.numbers[1].exp()))

    guide, found = Guide(), {}
    for estimator in ("pathwise", "dreg", "stl"):
        loss = pv.IWAE(5, estimator=estimator)
        draws = [losses_and_gradients(loss, model, guide, x, seed)[1] for seed in range(30)]
        found[estimator] = torch.stack(draws)

    def apart(one, other):
        errors = [found[name].std(0) / 30**0.5 for name in (one, other)]
        return (found[one].mean(0) - found[other].mean(0)).abs() / torch.hypot(*errors)

    assert (apart("pathwise", "dreg") < 4).all()
    assert (apart("dreg", "stl") > 6).any()
    assert (found["dreg"].std(0) < 0.8 * found["pathwise"].std(0)).all()


def exp_twin(loc, scale):
    """A log normal as transforms of constrained sites make them."""
    exp = dist.transforms.ComposeTransform([dist.transforms.ExpTransform()])
    return dist.TransformedDistribution(dist.Normal(loc, scale), exp)


@pytest.mark.parametrize(
    ("proposal", "prior"),
    [
        (
            lambda: dist.MultivariateNormal(torch.ones(2), 2 * torch.eye(2)),
            lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1),
        ),
        (lambda: dist.LogNormal(1.0, 0.5), lambda: exp_twin(0.0, 1.0)),
    ],
)
def test_a_kl_that_pyro_samples_in_silence(proposal, prior):
    """Trap: TraceMeanField_ELBO draws where no KL is registered. The data tell nothing of z."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", proposal())

    x = torch.zeros(3)
    assert pv.explain(pv.ELBO(), model, guide, x)["z"].startswith("analytic: closed form between")
    draws = {
        name: torch.tensor([loss.loss(model, guide, x) for _ in range(20)])
        for name, loss in (("ours", pv.ELBO()), ("pyro", TraceMeanField_ELBO()))
    }
    assert (draws["ours"] == draws["ours"][0]).all()
    assert draws["pyro"].std() > 0.3


def test_an_auto_normal_is_scored_at_its_points():
    """Trap: its sites are Deltas, whose KL for Pyro drops the density that they carry."""
    x = torch.tensor([3.0, 0.5], dtype=torch.float64)
    guide = auto_normal(x)
    guide(x)
    told = pv.explain(pv.ELBO(), log_normal_model, guide, x)
    assert told["s"] == "analytic: a point: its log density less the model's there"
    assert told["s_unconstrained"] == "sampled: auxiliary site of the guide"
    values = []
    for loss in (pv.ELBO(), Trace_ELBO(), TraceMeanField_ELBO()):
        torch.manual_seed(0)
        values.append(loss.loss(log_normal_model, guide, x))
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    assert abs(values[0] - values[2]) > 0.1


# --- baselines of the score function -------------------------------------------------------


def poisson_model(x):
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Poisson(x.new_tensor(2.0)))
        pyro.sample("x", dist.Normal(c, 1.0), obs=x)


def poisson_guide(x):
    rate = pyro.param("rate", x.new_tensor(3.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("c", dist.Poisson(rate.expand(len(x))))


def slope_of_rate(loss, x, seed):
    torch.manual_seed(seed)
    loss.loss_and_grads(poisson_model, poisson_guide, x)
    rate = pyro.get_param_store()._params["rate"]
    found, rate.grad = rate.grad.item(), None
    return found


def test_running_baselines_are_state():
    x = torch.tensor([1.0, 4.0], dtype=torch.float64)
    loss = pv.ELBO(estimator="score")
    assert loss.state_dict() == {}
    with torch.no_grad():
        loss.loss(poisson_model, poisson_guide, x)
    assert loss.state_dict() == {}  # an evaluation leaves them alone
    slope_of_rate(loss, x, 0)
    assert list(loss.state_dict()) == ["c"]
    saved = {name: value.clone() for name, value in loss.state_dict().items()}
    wanted = slope_of_rate(loss, x, 1)
    other = pv.ELBO(estimator="score")
    assert slope_of_rate(other, x, 1) != pytest.approx(wanted)
    other.load_state_dict(saved)
    assert slope_of_rate(other, x, 1) == wanted
    assert other.state_dict()["c"] == loss.state_dict()["c"] != saved["c"]


@pytest.mark.parametrize("particles", [1, 4])
def test_the_score_gradient_is_right_on_average(particles):
    """Within 4 standard errors of the derivative of the ELBO, summed over all counts."""
    x = torch.tensor([1.0, 4.0], dtype=torch.float64)
    counts = torch.arange(60, dtype=torch.float64)
    log_rate = torch.tensor(3.0, dtype=torch.float64).log().requires_grad_()
    log_guide = dist.Poisson(log_rate.exp()).log_prob(counts)
    log_joint = dist.Poisson(2.0).log_prob(counts) * 2 + dist.Normal(
        counts.unsqueeze(-1), 1.0
    ).log_prob(x).sum(-1)
    (exact,) = torch.autograd.grad(-(log_guide.exp() * (log_joint - 2 * log_guide)).sum(), log_rate)
    loss = pv.ELBO(particles, estimator="score")
    slopes = torch.tensor([slope_of_rate(loss, x, seed) for seed in range(200)])
    error = slopes.std().item() / 200**0.5
    assert abs(slopes.mean().item() - exact.item()) < 4 * error < 0.6 * abs(exact.item())


# --- what is refused, and what falls back ---------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_particles": 0}, "num_particles=0: a whole number of at least 1"),
        ({"kl": "exact"}, "kl='exact': 'analytic' or 'sample'"),
        ({"estimator": "reinforce"}, "estimator='reinforce': 'pathwise'"),
    ],
)
def test_unknown_options_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        pv.ELBO(**arguments)


def test_global_latents_are_trained_as_well():
    """No data plate is needed to train: Bayesian linear regression to its exact evidence."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide(x):
        n = len(x)
        pyro.sample("mu", dist.Normal(x.sum() / (n + 1), (n + 1) ** -0.5))

    x = torch.randn(8, dtype=torch.float64)
    covariance = torch.eye(8, dtype=x.dtype) + 1
    exact = torch.distributions.MultivariateNormal(torch.zeros_like(x), covariance).log_prob(x)
    assert pv.ELBO(kl="sample").loss(model, guide, x) == pytest.approx(-exact.item(), rel=1e-12)


def mixture_with_globals(x):
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.sample("x", dist.Normal(loc[c], 1.0), obs=x)


@pytest.mark.usefixtures("float64")
@pytest.mark.slow
@pytest.mark.parametrize("num_particles", [1, 3])
def test_the_score_beside_globals_in_a_plate_of_their_own(num_particles):
    """A plate of components at the data's dimension: its sites are no data."""
    logits = torch.tensor([0.5, -0.5, 0.1, 0.3, -0.2, 0.4, 0.0], requires_grad=True)
    x = torch.linspace(-2, 3, 7)

    def guide_of(infer):
        def guide(x):
            with pyro.plate("components", 2):
                pyro.sample("loc", dist.Delta(torch.tensor([-1.0, 2.0])))
            with pyro.plate("data", len(x)):
                probabilities = torch.stack([logits, -logits], -1)
                pyro.sample("c", dist.Categorical(logits=probabilities), infer=infer)

        return guide

    exact = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(
        mixture_with_globals, guide_of({"enumerate": "parallel"}), x
    )
    (wanted,) = torch.autograd.grad(exact, [logits])
    score = pv.ELBO(num_particles, estimator="score")
    found = mean_gradients(score, mixture_with_globals, guide_of({}), [logits], 2500, x)
    agree(found, (wanted, torch.zeros(7)))


# --- free bits: a floor under the KL of each latent dimension, on average over the data


class TwoDimensions(nn.Module):
    """A guide N(loc, 1) of the prior N(0, 1): the KL of a dimension is loc^2 / 2."""

    def __init__(self, how="event", num_data=None, mask=None):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([2.0, 0.2], dtype=torch.float64))
        self.how, self.num_data, self.mask = how, num_data, mask

    def sites(self, x, loc, observe=False):
        outer = (
            pyro.plate("data", len(x), dim=-1)
            if self.num_data is None
            else pyro.plate("data", self.num_data, subsample=x, dim=-1)
        )
        with outer, poutine.mask(mask=True if self.mask is None else self.mask):
            if self.how == "inner plate":
                with pyro.plate("dimensions", 2, dim=-2):
                    pyro.sample("z", dist.Normal(loc.unsqueeze(-1), 1.0))
            elif self.how == "two sites":
                for i in range(2):
                    pyro.sample(f"z{i}", dist.Normal(loc[i], 1.0))
            elif self.how == "dense":
                pyro.sample("z", dist.MultivariateNormal(loc, torch.eye(2, dtype=loc.dtype)))
            else:
                pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            if observe:
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def model(self, x):
        self.sites(x, torch.zeros_like(self.loc), observe=True)

    def forward(self, x):
        self.sites(x, self.loc)


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("how", ["event", "inner plate", "two sites"])
def test_free_bits_leave_the_value_and_the_dimensions_above_the_floor(how, particles):
    """KLs of 2 and 0.02 nats a datum, of which the floor is half a nat."""
    x = torch.zeros(4, dtype=torch.float64)
    guide = TwoDimensions(how)
    plain = losses_and_gradients(pv.ELBO(particles), guide.model, guide, x)
    freed = losses_and_gradients(pv.ELBO(particles, free_bits=0.5), guide.model, guide, x)
    assert freed[0] == pytest.approx(plain[0], rel=1e-12)
    assert plain[1].tolist() == pytest.approx([4 * 2.0, 4 * 0.2])
    assert freed[1].tolist() == pytest.approx([4 * 2.0, 0.0], abs=1e-12)


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 3), ({"num_data": 30}, 30), ({"mask": torch.tensor([True, False, True])}, 2)],
)
def test_the_floor_is_of_a_datum(options, count):
    """Just below and just above the KL of 0.02 nats, whatever scale or mask the data have."""
    x = torch.zeros(3, dtype=torch.float64)
    guide = TwoDimensions(**options)
    for floor, wanted in ((0.0199, 0.2 * count), (0.0201, 0.0)):
        _, gradient = losses_and_gradients(pv.ELBO(free_bits=floor), guide.model, guide, x)
        assert gradient.tolist() == pytest.approx([2.0 * count, wanted], abs=1e-12)


def test_free_bits_need_a_kl_of_each_dimension():
    x, guide = torch.zeros(3, dtype=torch.float64), TwoDimensions("dense")
    with pytest.raises(ValueError, match=r"free_bits: latent site 'z' has no KL of each dim"):
        pv.ELBO(free_bits=0.1).loss_and_grads(guide.model, guide, x)


@pytest.mark.usefixtures("float64")
def test_free_bits_with_enumerated_proposals_are_refused():
    model, guide, _ = enumerated_after_a_draw(twice=False)
    with pytest.raises(ValueError, match=r"free_bits: the guide enumerates \['c'\]"):
        pv.ELBO(free_bits=0.1).loss_and_grads(model, guide, X)


@pytest.mark.usefixtures("float64")
def test_free_bits_are_of_each_component_of_a_plate_that_is_not_the_datas():
    loc = torch.tensor([0.1, 2.0, 0.1], requires_grad=True)

    def model(x):
        with pyro.plate("components", 3):
            pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("components", 3):
            pyro.sample("m", dist.Normal(loc, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    loss = pv.ELBO(free_bits=0.05).differentiable_loss(model, guide, X)
    (slope,) = torch.autograd.grad(loss, [loc])
    torch.testing.assert_close(slope, torch.tensor([0.0, 2.0, 0.0]))


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("summed_out", [False, True])
def test_free_bits_of_a_guide_that_proposes_nothing_are_none(summed_out, particles):
    """The evidence, and its derivative by the means, of one normal or of a mixture of two."""
    logits = torch.tensor([0.3, 0.7] if summed_out else [1.0], dtype=torch.float64).log()
    means = torch.tensor([-1.0, 2.0] if summed_out else [0.4], dtype=torch.float64)
    means.requires_grad_()

    def model(x):
        with pyro.plate("data", len(x)):
            loc = means[pyro.sample("c", dist.Categorical(logits=logits))] if summed_out else means
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x):
        pass

    evidence = torch.logsumexp(logits + dist.Normal(means, 1.0).log_prob(X[:, None]), -1).sum()
    (wanted,) = torch.autograd.grad(-evidence, [means])
    found = pv.ELBO(particles, free_bits=0.5).loss_and_grads(model, guide, X)
    assert found == pytest.approx(-evidence.item(), rel=1e-12)
    torch.testing.assert_close(means.grad, wanted, rtol=1e-12, atol=1e-12)
