"""What a site is expected to be, given draws before it, against the distributions themselves."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.particles.evaluator import prepare
from pyro_vae.prediction.expectations import expected_of, is_categorical

X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
ROWS = slice(0, 3)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0 * x, 1.0))


def expected(make, *, particles="auto"):
    """Those of a likelihood given z, and the draws of z, [5, 3]."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", make(z), obs=torch.ones_like(x))  # of any support

    evaluator, _ = prepare(model, guide, (X,), None, None, 0, particles)
    values, _ = evaluator.draw(ROWS, 5, (0,))
    run = evaluator.predictive_run(ROWS, 5, values, (1,))
    return expected_of(run, "x"), values["z"]


@pytest.mark.parametrize("particles", ["plate", "repeat", "loop"])
@pytest.mark.parametrize(
    ("make", "mean", "variance"),
    [
        (lambda z: dist.Normal(z, 2.0), lambda z: z, lambda z: 4 + 0 * z),
        (lambda z: dist.Poisson(z.exp()), torch.exp, torch.exp),
        (lambda z: dist.Normal(z, 1.0).mask(z > 0), lambda z: z, lambda z: 1 + 0 * z),
    ],
)
def test_means_and_variances_by_particle(particles, make, mean, variance):
    found, z = expected(make, particles=particles)
    torch.testing.assert_close(found.mean, mean(z))
    torch.testing.assert_close(found.variance, variance(z))


@pytest.mark.parametrize("particles", ["plate", "repeat", "loop"])
def test_probabilities_of_classes(particles):
    def make(z):
        return dist.Categorical(logits=torch.stack([z, 0 * z, 1 - z, 2 * z], -1))

    found, z = expected(make, particles=particles)
    torch.testing.assert_close(found.mean, make(z).probs)
    assert found.variance is None and is_categorical(make(z)) and is_categorical(make(z).mask(True))


def test_where_a_distribution_does_not_say():
    exp = [torch.distributions.transforms.ExpTransform()]
    assert expected(lambda z: dist.TransformedDistribution(dist.Normal(z, 1.0), exp))[0] is None
    assert expected(lambda z: dist.VonMises(z, 1.0))[0] is None  # a direction, and no average


def test_where_draws_are_far_from_what_it_says():
    class Off(dist.Normal):
        def sample(self, sample_shape=()):
            return super().sample(sample_shape) + 20.0

        rsample = sample

        def expand(self, batch_shape, _instance=None):
            return Off(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    assert expected(lambda z: Off(z, 1.0))[0] is None


def rare(x):
    """Of which class 1 has probability 1e-3, of a latent that nothing tells about."""
    with pyro.plate("data", len(x)):
        pyro.sample("c", dist.Categorical(torch.tensor([0.999, 0.001])))
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def of_z(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def test_a_class_that_no_draw_has_is_not_certain_to_be_impossible():
    found = pv.predict(rare, of_z, torch.zeros(50), sites="c", num_draws=100, seed=0)
    made = pv.generate(rare, 20, sites="c", seed=0)
    assert (found["c_probability"][:, 1] == 0).any() and made["c_probability"][1] == 0
    for each in (found, made):
        gap = np.abs(each["c_probability"] - [0.999, 0.001])
        assert (gap < 4 * each["c_probability_se"]).all()
        unseen = each["c_probability_se"].values[each["c_probability"] == 0]
        assert (unseen < 0.05).all()
