"""Free bits: a floor under the KL of each latent dimension, on average over the data."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_vae as pv
from tests.losses.gradients import X, enumerated_after_a_draw, losses_and_gradients


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
