"""Each way in which a loss can be wrong breaks the law of that name; Pyro's own keep them."""

from __future__ import annotations

import pytest
import torch
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO

from pyro_vae import testing


class Own(ELBO):
    """A right one: Pyro's; the others change one thing."""

    def __init__(self):
        super().__init__()
        self.inner = Trace_ELBO(num_particles=2)

    def _get_trace(self, *args):
        raise NotImplementedError

    def loss(self, model, guide, *args):
        return self.inner.loss(model, guide, *args)

    def differentiable_loss(self, model, guide, *args):
        return self.inner.differentiable_loss(model, guide, *args)

    def loss_and_grads(self, model, guide, *args):
        loss = self.differentiable_loss(model, guide, *args)
        loss.backward()
        return float(loss.detach())


class WrongSign(Own):
    def loss(self, model, guide, *args):
        return -super().loss(model, guide, *args)


class AboveTheEvidence(Own):
    def loss(self, *args):
        return super().loss(*args) - 20.0

    def differentiable_loss(self, *args):
        return super().differentiable_loss(*args) - 20.0


class Detached(Own):
    def differentiable_loss(self, *args):
        loss = super().differentiable_loss(*args)
        return loss.detach() + 0 * loss


class Constant(Own):
    def loss(self, *args):
        return super().loss(*args) + 7.0

    def differentiable_loss(self, *args):
        return super().differentiable_loss(*args) + 7.0


class SeesTheMasked(Own):
    def differentiable_loss(self, model, guide, x, seen):
        return super().differentiable_loss(model, guide, x, seen) + 0.01 * x.sum()


class Uphill(Own):
    def loss_and_grads(self, model, guide, *args):
        loss = self.differentiable_loss(model, guide, *args)
        (-loss).backward()
        return float(loss.detach())


class HalfOfTheGuide(Own):
    """The values are right, and half of the guide's gradient is lost."""

    def differentiable_loss(self, model, guide, *args):
        loss = super().differentiable_loss(model, guide, *args)
        guide.numbers.requires_grad_(False)
        other = loss.detach() - super().differentiable_loss(model, guide, *args)
        guide.numbers.requires_grad_(True)
        return loss - (loss - loss.detach() + other) / 2


BROKEN = {
    HalfOfTheGuide: "the gradient is that of the loss in the mean",
    WrongSign: "at the exact posterior the loss is minus log p(x)",
    AboveTheEvidence: "elsewhere it is no less",
    Detached: "values and gradients agree, and reach every parameter",
    Constant: "a scale multiplies the loss",
    SeesTheMasked: "values that a mask leaves out do not matter",
    Uphill: "steps lower the loss",
}


@pytest.mark.parametrize("make", [Own, Trace_ELBO], ids=["own", "Trace_ELBO"])
def test_a_right_one(make):
    assert len(testing.check_loss(make()).kept) == 7


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_wrong_one_is_caught(kind):
    with pytest.raises(testing.LawError) as told:
        testing.check_loss(kind())
    assert f"- {BROKEN[kind]}: " in str(told.value)


def test_pyros_renyi_elbo_is_caught():
    """It puts the scale inside of the logarithm, and has no differentiable_loss."""
    with pytest.raises(testing.LawError) as told:
        testing.check_loss(RenyiELBO(alpha=0.0, num_particles=5, vectorize_particles=False))
    assert "- a scale multiplies the loss: " in str(told.value)
    assert "no differentiable_loss" in str(told.value) or "AttributeError" in str(told.value)
    assert torch.is_grad_enabled()
