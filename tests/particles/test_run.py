"""Runs of a guide or a model: values, masks and terms of several particles, by hand."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae.particles.modes import MODES
from pyro_vae.particles.run import Runner, is_latent, is_observed
from pyro_vae.programs.batch import as_batch
from pyro_vae.programs.sites import SiteShape
from tests.models import NormalModel, mixture

X = torch.tensor([0.3, -1.1, 2.0, 0.8], dtype=torch.float64)
SHAPES = {"z": SiteShape(1, 0), "x": SiteShape(1, 0), "c": SiteShape(1, 0)}
K = 3
every_mode = pytest.mark.parametrize("name", MODES)


def runner(program, name, summed_out=()):
    return Runner(program, as_batch(X), SHAPES, MODES[name](1, -1), summed_out)


@every_mode
def test_given_values_are_scored(name):
    z = torch.randn(K, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    run = runner(NormalModel(), name).run(slice(1, 3), K, {"z": z})
    normal = torch.distributions.Normal
    prior, likelihood = normal(0.0, 1.0).log_prob(z), normal(z, 1.0).log_prob(X[1:3])
    torch.testing.assert_close(run.term("z"), prior)
    torch.testing.assert_close(run.log_prob(is_observed), likelihood)
    torch.testing.assert_close(run.log_prob(is_latent), prior)
    torch.testing.assert_close(run.log_prob(), prior + likelihood)
    torch.testing.assert_close(run.pointwise("x"), likelihood)
    torch.testing.assert_close(run.values()["z"], z)


@every_mode
def test_draws_are_new_for_each_particle_and_datum(name):
    values = runner(NormalModel().posterior, name).run(slice(0, 4), K).values()["z"]
    assert values.shape == (K, 4)
    assert len(values.unique()) == K * 4


@every_mode
def test_a_mask_beside_the_sites_own(name):
    z = torch.zeros(K, 4, dtype=torch.float64)
    seen = torch.tensor([[True, False, True, True]] * 2 + [[False] * 4])
    run = runner(NormalModel(), name).run(slice(0, 4), K, {"z": z})
    wanted = torch.distributions.Normal(0.0, 1.0).log_prob(z) * seen
    torch.testing.assert_close(run.log_prob(is_latent, {"z": seen}), wanted)
    assert run.masks() == {}


@every_mode
def test_masks_of_the_model_are_found(name):
    def masked(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0).mask(x > 0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    found = runner(masked, name).run(slice(0, 4), K).masks()["z"]
    assert (found.expand(K, 4) == (X > 0)).all()


@every_mode
def test_discrete_sites_are_summed_out_and_drawn(name):
    run = runner(mixture, name, ("c",)).run(slice(0, 4), K)
    torch.testing.assert_close(run.log_prob(), mixture.log_evidence(X).expand(K, 4))
    drawn = runner(mixture, name, ("c",)).run(slice(0, 4), 2000 if name == "plate" else 20)
    values = drawn.draw_summed_out()["c"]
    if name == "plate":  # to four standard errors
        share = torch.stack([(values == c).double().mean(0) for c in range(3)], -1)
        exact = mixture.log_joint(X).softmax(-1)
        assert ((share - exact).abs() < 4 * (exact * (1 - exact) / 2000).sqrt() + 1e-9).all()
    assert set(values.unique().tolist()) <= {0, 1, 2}


def test_nothing_to_score():
    run = runner(NormalModel().posterior, "plate").run(slice(0, 4), K)
    with pytest.raises(ValueError, match="no site to score"):
        run.log_prob(is_observed)
