"""Plans of pairs in training: modes, and looks that are made anew where they no longer fit."""

from __future__ import annotations

import copy
import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.programs.batch import as_batch
from tests.losses.gradients import X, normal_pair

pytestmark = pytest.mark.usefixtures("float64")


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
    loss._run(model, guide, as_batch(x))
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


def test_a_loss_remembers_several_pairs_and_forgets_the_oldest():
    loss = pv.IWAE(3)
    pairs = [normal_pair()[:2] for _ in range(20)]
    for model, guide in pairs:
        loss.loss(model, guide, X)
    assert len(loss._plans) == 16
    plans = dict(loss._plans)
    loss.loss(*pairs[-1], X)
    assert loss._plans == plans


class _Standardizing(nn.Module):
    """Normalizes by the batch's own mean and spread in training mode."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 2)

    def forward(self, x):
        h = self.linear(x.flatten(1))
        return (h - h.mean(0)) / h.std(0) if self.training else h


class _Transposed(nn.Module):
    """Takes one batch dimension, so that particles repeat the batch."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(2, 4), nn.ConvTranspose2d(1, 1, 2, stride=2)

    def forward(self, z):
        return self.conv(self.linear(z).reshape(len(z), 1, 2, 2))


@pytest.mark.parametrize("make", [pv.IWAE, functools.partial(pv.ELBO, kl="sample")])
def test_an_encoder_that_normalizes_over_the_batch_is_not_repeated(make):
    """Of one latent the guide sees each datum once in a plate, but K times in a repeated batch."""
    encoder, decoder = _Standardizing(), _Transposed()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(3), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 0.7).to_event(1))

    x = torch.randn(5, 1, 4, 4)
    found = []
    for together in (True, False):
        torch.manual_seed(2)
        loss = make(10, vectorize_particles=together)
        found.append(float(loss(model, guide)(x).detach()))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
