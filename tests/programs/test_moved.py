"""Tests of pyro_vae.programs.moved: a density of one draw alone."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to, constraints, kl_divergence

from pyro_vae.programs.moved import Moved, Noise, moved, refuse_moved

BASE = dist.Normal(torch.tensor([0.3, -1.0]), 2.0).to_event(1)
DRAW = torch.tensor([[0.5, 1.0], [2.0, -3.0], [0.0, 0.0]])


def test_noise_is_normal_and_of_density_one():
    noise = Noise(3, torch.zeros((), dtype=torch.float64)).expand([4])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = noise.rsample((5000,))
    assert drawn.shape == (5000, 4, 3)
    assert drawn.dtype == torch.float64
    torch.testing.assert_close(drawn.mean((0, 1)), torch.zeros(3).double(), rtol=0, atol=0.03)
    torch.testing.assert_close(drawn.std((0, 1)), torch.ones(3).double(), rtol=0, atol=0.03)
    assert torch.equal(noise.log_prob(drawn), torch.zeros(5000, 4, dtype=torch.float64))


def test_a_draw_is_itself_and_scored_by_its_proposal():
    fn = Moved(BASE, DRAW)
    assert fn.batch_shape == (3,)
    assert torch.equal(fn.rsample(), DRAW)
    torch.testing.assert_close(fn.log_prob(DRAW), BASE.log_prob(DRAW))
    wider = fn.expand([2, 3])
    assert torch.equal(wider.rsample(), DRAW.expand(2, 3, 2))
    torch.testing.assert_close(wider.log_prob(DRAW), BASE.log_prob(DRAW).expand(2, 3))


def test_another_draw_has_no_density():
    other = DRAW.clone()
    other[1, 0] += 0.1
    found = Moved(BASE, DRAW).log_prob(other)
    assert found.isnan().tolist() == [False, True, False]
    rounded = DRAW * (1 + 1e-5)
    assert Moved(BASE, DRAW).log_prob(rounded).isfinite().all()
    with pytest.raises(ValueError, match="run the guide for each further one"):
        Moved(BASE, DRAW).rsample((2,))


def test_mapped_to_a_support():
    base = dist.Normal(torch.zeros(3), 1.0)
    draw = torch.tensor([0.5, -1.0, 2.0])
    mapped = dist.TransformedDistribution(base, [biject_to(constraints.positive)])
    fn = moved(mapped, draw)
    torch.testing.assert_close(fn.rsample(), draw.exp())
    torch.testing.assert_close(fn.log_prob(draw.exp()), mapped.log_prob(draw.exp()))


def test_no_closed_form_takes_it_for_its_proposal():
    """Else losses of Pyro's would take the KL of the draw before it was moved."""
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    kl_divergence(BASE, prior)
    with pytest.raises(NotImplementedError):
        kl_divergence(moved(BASE, DRAW), prior)
    mapped = [dist.TransformedDistribution(fn, [biject_to(constraints.positive)]) for fn in (BASE,)]
    with pytest.raises(NotImplementedError):
        kl_divergence(moved(mapped[0], DRAW), mapped[0])


def test_what_needs_the_density_of_given_draws_is_refused_by_name():
    refuse_moved(["z"], "take another")
    with pytest.raises(ValueError, match=r"Annealed.*no density of given draws: take another"):
        refuse_moved(["z", "_annealing_noise"], "take another")
