"""Losses where scales, masks, enumeration, points and networks meet: against other routes."""

from __future__ import annotations

import copy
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, autoguide
from torch import nn

import pyro_vae as pv
from pyro_vae.programs.handlers import LatentScale
from tests.models import NormalModel

X = torch.tensor([0.7, -1.2, 3.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def mean_gradients(loss, model, guide, parameters, count, *batch):
    """Return the mean of independent gradients, and its standard error."""
    torch.manual_seed(0)
    found = torch.stack(
        [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(
                        loss.differentiable_loss(model, guide, *batch), parameters
                    )
                ]
            )
            for _ in range(count)
        ]
    )
    return found.mean(0), found.std(0) / math.sqrt(count)


def agree(one, other):
    """Within 4 standard errors of the difference, and sharper than the value itself."""
    (mean, error), (wanted, wanted_error) = one, other
    total = torch.hypot(error, wanted_error)
    assert (4 * total < wanted.abs()).any()
    assert ((mean - wanted).abs() < 4 * total + 1e-12).all(), (mean, wanted, total)


def normal_pair():
    slope = torch.tensor(0.3, requires_grad=True)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, 1.0))

    return NormalModel(), guide, [slope]


# --- doubly reparameterized gradients ---------------------------------------------------------


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


# --- enumerated proposals ---------------------------------------------------------------------


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


def enumerated_after_a_draw(twice):
    parameters = torch.tensor([0.5, -0.3], requires_grad=True)
    means, tilt = torch.tensor([0.0, 2.0]), torch.tensor([1.0, -1.0])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7])))
            u = pyro.sample("u", dist.Normal(means[c], 1.0)) if twice else means[c]
            pyro.sample("x", dist.Normal(z + u, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(parameters[0] * x, parameters[1].exp()))
            logits = z.unsqueeze(-1) * tilt + 0.2
            c = pyro.sample("c", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            if twice:
                pyro.sample("u", dist.Normal(means[c] + z, 1.0))

    return model, guide, [parameters]


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


def test_markov_proposals_that_share_dimensions_are_refused():
    table = torch.tensor([[0.7, 0.3], [0.2, 0.8]])

    def chain(x=None, infer=None):
        c = 0
        for t in pyro.markov(range(4)):
            c = pyro.sample(f"c{t}", dist.Categorical(table[c]), infer=infer or {})
            if x is not None:
                pyro.sample(f"x{t}", dist.Normal(c * 1.0, 1.0), obs=x[t])

    def model(x):
        chain(x)

    def guide(x):
        chain(infer={"enumerate": "parallel"})

    with pytest.raises(ValueError, match=r"dimensions that some share \(pyro.markov\)"):
        pv.ELBO().loss(model, guide, torch.zeros(4))
    # Left out of the guide, they are summed out: the forward algorithm.
    alpha = table[0] * torch.exp(dist.Normal(torch.arange(2.0), 1.0).log_prob(torch.tensor(0.0)))
    for _ in range(3):
        likelihood = dist.Normal(torch.arange(2.0), 1.0).log_prob(torch.tensor(0.0)).exp()
        alpha = (alpha @ table) * likelihood
    found = pv.ELBO(data_plate=False).loss(model, lambda x: None, torch.zeros(4))
    assert found == pytest.approx(-alpha.sum().log().item(), rel=1e-12)


def test_free_bits_with_enumerated_proposals_are_refused():
    model, guide, _ = enumerated_after_a_draw(twice=False)
    with pytest.raises(ValueError, match=r"free_bits: the guide enumerates \['c'\]"):
        pv.ELBO(free_bits=0.1).loss_and_grads(model, guide, X)


# --- one loss, several kinds of call -------------------------------------------------------------


@pytest.mark.parametrize("how", ["flag", "mapping", "attribute"])
def test_a_latent_that_is_sometimes_observed(how):
    """Which sites are summed out is looked at again when the call changes."""
    labels, means = torch.tensor([0, 1, 1]), torch.tensor([0.0, 2.0])
    switch = {"seen": True}

    def pair(x, observed):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7])), obs=observed)
            z = pyro.sample("z", dist.Normal(means[c], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def propose(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    if how == "flag":

        def model(x, seen):
            pair(x, labels if seen else None)

        def guide(x, seen):
            propose(x)

        with_labels, without = (X, True), (X, False)
    elif how == "mapping":

        def model(batch):
            pair(batch["x"], batch["y"])

        def guide(batch):
            propose(batch["x"])

        with_labels, without = ({"x": X, "y": labels},), ({"x": X, "y": None},)
    else:

        def model(x):
            pair(x, labels if switch["seen"] else None)

        guide = propose
        with_labels = without = (X,)
    loss = pv.ELBO(kl="sample")
    values = []
    for used in (loss, pv.ELBO(kl="sample")):
        if used is loss:
            switch["seen"] = True
            used.loss(model, guide, *with_labels)
        switch["seen"] = False
        used.loss(model, guide, *without)
        torch.manual_seed(0)
        values.append(used.loss(model, guide, *without))
    assert values[0] == values[1]


# --- networks -----------------------------------------------------------------------------------


class Centered(nn.Module):
    """A normalization of a user's own."""

    def __init__(self, in_training_only):
        super().__init__()
        self.in_training_only = in_training_only

    def forward(self, h):
        if self.in_training_only and not self.training:
            return h
        return (h - h.mean(0)) / (1 + h.std(0))


NORMALIZATIONS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), "loop"),
    "BatchNorm1d, no statistics": (lambda: nn.BatchNorm1d(6, track_running_stats=False), "loop"),
    "BatchNorm2d": (
        lambda: nn.Sequential(nn.Unflatten(-1, (3, 2, 1)), nn.BatchNorm2d(3), nn.Flatten()), "loop"
    ),
    "with dropout": (lambda: nn.Sequential(nn.Dropout(0.0), Centered(True)), "loop"),
    "of a user's own": (lambda: Centered(False), "loop"),
    "of a user's own, in training": (lambda: Centered(True), "loop"),
    "frozen": (lambda: nn.BatchNorm1d(6).eval(), "repeat"),
    "InstanceNorm1d": (
        lambda: nn.Sequential(nn.Unflatten(-1, (2, 3)), nn.InstanceNorm1d(2), nn.Flatten()),
        "repeat",
    ),
    "LayerNorm": (lambda: nn.LayerNorm(6), "plate"),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_particles_are_not_normalized_with_one_another(name):
    """Each particle's batch has statistics of its own, as in a loop: the same loss to rounding."""
    make, mode = NORMALIZATIONS[name]
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(2, 6), make(), nn.Linear(6, 4)).double()
    x = torch.randn(5, 4, dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(layers(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :2] / 2, 0.7).to_event(1))

    before = copy.deepcopy(layers.state_dict())
    loss = pv.ELBO(3, kl="sample")
    loss._run(model, guide, (x,), {})
    assert {plan.mode.name for plan, *_ in loss._plans.values()} == {mode}
    layers.load_state_dict(before)
    torch.manual_seed(1)
    found = loss.loss(model, guide, x)
    torch.manual_seed(1)
    shapes = [(5, 2)] * 3 if mode == "loop" else [(3, 5, 2)]
    noise = torch.cat([torch.randn(shape, dtype=x.dtype).reshape(-1, 5, 2) for shape in shapes])
    layers.load_state_dict(before)
    z = x[:, :2] / 2 + 0.7 * noise
    terms = [
        dist.Normal(layers(one), 1.0).log_prob(x).sum() + dist.Normal(0.0, 1.0).log_prob(one).sum()
        - dist.Normal(x[:, :2] / 2, 0.7).log_prob(one).sum()
        for one in z
    ]  # fmt: skip
    assert found == pytest.approx(-torch.stack(terms).mean().item(), rel=1e-10)


def test_a_pair_planned_in_eval_mode_is_planned_anew_for_training():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    x = torch.randn(5, 4)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(layers(z), 1.0).to_event(1), obs=x)

    guide = pv.LocalGuide(model, num_data=5, example=x)
    loss = pv.ELBO(3)
    for training, mode in ((False, "repeat"), (True, "loop"), (False, "loop")):
        layers.train(training)
        loss.loss(model, guide, x)
        assert {plan.mode.name for plan, *_ in loss._plans.values()} == {mode}


def test_a_network_that_asserts_its_shape_gets_the_batch_repeated():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            assert z.ndim == 2
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.zeros(3, 2)
    guide = pv.LocalGuide(model, num_data=3, example=x)
    loss = pv.ELBO(3)
    loss.loss(model, guide, x)
    assert [plan.mode.name for plan, *_ in loss._plans.values()] == ["repeat"]


# --- plates of the same dimension, deterministic sites --------------------------------------------


def mixture_with_globals(x):
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.sample("x", dist.Normal(loc[c], 1.0), obs=x)


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


# --- sleep, and scales of an exact guide ----------------------------------------------------------


def test_the_argument_that_is_observed_is_told_by_what_it_is_not_by_its_numbers():
    location = torch.tensor(0.0, requires_grad=True)
    saw = []

    def model(t, y):
        with pyro.plate("data", len(t)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Bernoulli(logits=z + 3 * t), obs=y)

    def guide(t, y):
        saw.append(t)
        with pyro.plate("data", len(t)):
            pyro.sample("z", dist.Normal(location + y - t, 1.0))

    loss = pv.WakeSleep(5, insomnia=0.0)
    same = torch.tensor([1.0, 0.0])
    loss.differentiable_loss(model, guide, same, same.clone())
    assert all(torch.equal(t, same) for t in saw)

    def two(a, b):
        with pyro.plate("data", len(a)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("a", dist.Normal(z, 1.0), obs=a + 0)
            pyro.sample("b", dist.Normal(z, 1.0), obs=b + 0)

    with pytest.raises(ValueError, match=r"values of the observed site 'a' \(candidates: \[0, 1\]"):
        pv.WakeSleep(5, insomnia=0.0).loss_and_grads(two, guide, same, same.clone())


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


# --- a guide that observes -------------------------------------------------------------------


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


def test_a_loss_remembers_several_pairs_and_forgets_the_oldest():
    loss = pv.IWAE(3)
    pairs = [normal_pair()[:2] for _ in range(20)]
    for model, guide in pairs:
        loss.loss(model, guide, X)
    assert len(loss._plans) == 16
    plans = dict(loss._plans)
    loss.loss(*pairs[-1], X)
    assert loss._plans == plans
