"""What callbacks and learning rate schedulers did before a checkpoint counts after it."""

from __future__ import annotations

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    LambdaLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

import pyro_vae as pv

X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 3).double()

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 0.5).to_event(1), obs=x)


def set_rate(optimizer, model):
    def decay(epoch):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.5 ** (epoch.epoch // 3)

    return [decay]


def in_a_lambda(optimizer, model):
    scheduler = StepLR(optimizer, 3, 0.5)
    return [lambda epoch: scheduler.step()]


def in_an_object(optimizer, model):
    class Trainer:
        def __init__(self):
            self.state = {"scheduler": StepLR(optimizer, 3, 0.5)}

        def after(self, epoch):
            self.state["scheduler"].step()

    return [Trainer().after]


def in_a_partial(optimizer, model):
    def step(scheduler, epoch):
        scheduler.step()

    return [functools.partial(step, StepLR(optimizer, 3, 0.5))]


def plateau(optimizer, model):
    return [ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.1)]


def sequence(optimizer, model):
    first = LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch))
    return [SequentialLR(optimizer, [first, StepLR(optimizer, 2, 0.5)], milestones=[3])]


def noise(optimizer, model):
    """A callback that draws, and changes parameters."""

    def shake(epoch):
        with torch.no_grad():
            model.net.bias.add_(0.1 * torch.randn(3))

    return [shake]


CALLBACKS = {
    "a rate that is set": set_rate,
    "StepLR": lambda optimizer, model: [StepLR(optimizer, 3, 0.5)],
    "MultiStepLR": lambda optimizer, model: [MultiStepLR(optimizer, [2, 5], 0.5)],
    "OneCycleLR": lambda optimizer, model: [OneCycleLR(optimizer, 0.1, total_steps=20)],
    "ReduceLROnPlateau": plateau,
    "SequentialLR": sequence,
    "in a lambda": in_a_lambda,
    "in an object": in_an_object,
    "in a partial": in_a_partial,
    "noise": noise,
}


def trained(callbacks, epochs, path, rates):
    torch.manual_seed(1)
    model = Model()
    guide = pv.AmortizedGuide(model, nn.Linear(3, 4).double(), example=X)
    optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=0.05)
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    pv.fit(
        model,
        guide,
        X,
        optim=optimizer,
        epochs=epochs,
        batch_size=16,
        callbacks=callbacks(optimizer, model),
        checkpoint=path,
        progress=False,
    )
    return [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]


@pytest.mark.parametrize("callbacks", CALLBACKS.values(), ids=CALLBACKS)
def test_a_resumed_run_has_the_rates_of_a_whole_one(callbacks, tmp_path):
    rates, resumed_rates = [], []
    whole = trained(callbacks, 8, tmp_path / "whole", rates)
    for epochs in (3, 4, 8):
        resumed = trained(callbacks, epochs, tmp_path / "parts", resumed_rates)
    assert resumed_rates == rates
    assert callbacks is noise or len(set(rates)) > 1
    torch.testing.assert_close(resumed, whole, rtol=0.0, atol=0.0)


def test_the_rate_halves_each_third_epoch(tmp_path):
    rates = []
    for epochs in (2, 5, 8):
        trained(lambda optimizer, model: [StepLR(optimizer, 3, 0.5)], epochs, tmp_path / "a", rates)
    assert rates == pytest.approx([0.05] * 3 + [0.025] * 3 + [0.0125] * 2)


def test_another_number_of_schedulers_is_refused(tmp_path):
    path = tmp_path / "a"
    trained(lambda optimizer, model: [StepLR(optimizer, 3, 0.5)], 1, path, [])
    with pytest.raises(ValueError, match="with 1 learning rate schedulers .* and here are 0"):
        trained(lambda optimizer, model: [], 2, path, [])


def test_a_scheduler_that_no_callback_holds_is_refused(tmp_path):
    kept = []

    def callbacks(optimizer, model):
        kept.append(StepLR(optimizer, 3, 0.5))
        return []

    with pytest.raises(ValueError, match=r"in no callback.*callbacks=\[scheduler\]"):
        trained(callbacks, 1, tmp_path / "a", [])
