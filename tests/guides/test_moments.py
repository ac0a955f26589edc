"""Moments that guides start from: of draws, of heavy tails, of Normal proposals, of the prior."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch

from pyro_vae.guides.coordinates import coordinates_of
from pyro_vae.guides.moments import middle_moments, normal_moments, prior_moments
from pyro_vae.programs.batch import as_batch
from pyro_vae.programs.structure import ModelLooks
from tests.models import NormalModel, log_normal_model


def test_light_tails_have_their_moments():
    rows = 2 + 3 * torch.randn(5000, 2, generator=torch.Generator().manual_seed(0))
    mean, std = middle_moments(rows)
    assert torch.equal(mean, rows.mean(0)) and torch.equal(std, rows.std(0))


def test_heavy_tails_have_those_of_the_middle():
    """A Cauchy variable: median 5, and half the distance of its 16 % and 84 % quantiles, 1.82."""
    uniform = (torch.arange(9999, dtype=torch.float64) + 0.5) / 9999
    rows = 5 + torch.tan(math.pi * (uniform - 0.5)).unsqueeze(1)
    mean, std = middle_moments(rows)
    assert abs(mean.item() - 5) < 1e-2
    assert abs(std.item() - math.tan(math.pi * 0.34)) < 2e-2


def test_values_that_are_not_finite_count_for_nothing():
    rows = torch.cat([torch.full((10, 1), math.inf), torch.linspace(-1, 1, 100).unsqueeze(1)])
    mean, std = middle_moments(rows)
    assert abs(mean.item()) < 0.05 and abs(std.item() - 0.68) < 0.05


def test_half_precision():
    rows = torch.linspace(-1, 1, 101).unsqueeze(1).to(torch.bfloat16)
    mean, std = middle_moments(rows)
    assert mean.dtype == torch.bfloat16 and abs(float(std) - 0.58) < 0.02


def test_normals_are_read_off_where_they_are_alike():
    def node(loc, fn=dist.Normal):
        return {"fn": fn(torch.tensor([loc, 0.0]), 2.0).to_event(1)}

    loc, scale = normal_moments([node(1.0), node(1.0)])
    assert loc.tolist() == [1.0, 0.0] and scale.tolist() == [2.0, 2.0]
    assert normal_moments([node(1.0), node(2.0)]) is None
    assert normal_moments([node(1.0, dist.Laplace)]) is None


def of_prior(model, x):
    looks = ModelLooks(model, as_batch(x))
    structure = looks.structure()
    return prior_moments(looks, structure, coordinates_of(structure, "a guide"))


def test_the_prior_in_unconstrained_coordinates():
    """Of z ~ Normal(0, 1), and of log s for s ~ LogNormal(0, 1): 0 and 1 to 1000 draws a datum."""
    state = torch.get_rng_state()
    for model in (NormalModel(), log_normal_model):
        mean, std = of_prior(model, torch.ones(20, dtype=torch.float64))
        assert mean.shape == std.shape == (1,)
        assert abs(mean.item()) < 0.15 and abs(std.item() - 1) < 0.15
    assert torch.equal(torch.get_rng_state(), state)
