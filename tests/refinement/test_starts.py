"""Where refinement begins: at a guide's answer, read off or matched, at rivals, at modes."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from tqdm.auto import tqdm

import pyro_vae as pv
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.batch import as_batch
from pyro_vae.refinement.climbing import Climber
from pyro_vae.refinement.starts import answer_of, best_of, find_modes, gaussian_at
from tests.models import GammaPoisson, NormalModel, factor_analysis
from tests.refinement.guides import blocks_of, gamma_poisson_gap


def test_hand_written_guides_are_read_off_or_matched():
    """A Normal guide is the exact start; another is matched by the moments of its draws."""
    model = factor_analysis("correlated")
    x = model.data(8)
    location = torch.randn(8, 3, dtype=torch.float64)

    def normal(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(location, 0.3).to_event(1))

    table = pv.refine(model, normal, x, max_steps=1, seed=0).table
    assert table.shape == (8, 3, 2)
    local = pv.LocalGuide(model, num_data=8, example=x)
    start = answer_of(local, normal, Evaluator(model, normal, as_batch(x), seed=0))
    torch.testing.assert_close(start[..., 0], location)
    torch.testing.assert_close(start[..., 1].exp(), torch.full_like(location, 0.3))
    evaluator = Evaluator(model, model.posterior, as_batch(x), seed=0)
    start = answer_of(local, model.posterior, evaluator)
    deviation = torch.linalg.inv(model.posterior_precision).diagonal().sqrt()
    # 256 draws: 5 standard errors.
    assert ((start[..., 0] - model.posterior_mean(x)).abs() < 5 * deviation / 16).all()


@pytest.mark.parametrize("a", [0.02, 0.3])
def test_a_start_far_from_the_posterior(a):
    """The prior of log rate lies at -35: its rows were "converged", 920 nats too low."""
    x = torch.tensor([20.0, 1, 10], dtype=torch.float64)
    model = GammaPoisson(a, 1.0)
    guide = pv.refine(model, pv.LocalGuide(model, num_data=3, example=x), x, seed=0)
    assert guide.converged.all()
    assert gamma_poisson_gap(a, x, guide).max() < 0.02


def test_a_guide_with_heavy_tails_is_a_start_like_another():
    """Gamma(0.05) draws reach down to 1e-60: medians, not means, and other starts beside them."""
    x = torch.tensor([20.0, 3.0, 5.0], dtype=torch.float64)
    model = GammaPoisson(0.3, 1.0)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(x.new_full((len(x),), 0.05), x.new_tensor(0.8)))

    refined = pv.refine(model, guide, x, seed=0)
    assert refined.converged.all()
    assert gamma_poisson_gap(0.3, x, refined).max() < 0.02


def test_of_a_gaussian_posterior():
    model = factor_analysis("correlated")
    x = model.data(3)
    (block,) = blocks_of(model, x).at(torch.arange(3))
    mean = model.posterior_mean(x)
    places = mean + torch.randn(4, 3, 3, dtype=torch.float64)
    modes, height = find_modes(block, places)
    torch.testing.assert_close(modes, mean.expand(4, -1, -1), rtol=0, atol=1e-4)
    assert (height.max(0).values - height.min(0).values).max() < 1e-6
    found, scale_tril = gaussian_at(block, modes[0])
    torch.testing.assert_close(found, mean, rtol=0, atol=1e-6)
    covariance = torch.linalg.inv(model.posterior_precision)
    torch.testing.assert_close(
        scale_tril @ scale_tril.mT, covariance.expand(3, -1, -1), rtol=1e-6, atol=1e-8
    )


def test_each_place_has_its_mode():
    """x is near z squared: a mode on either side of zero, each where its slope vanishes."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.square(), 0.2), obs=x)

    x = torch.tensor([0.4], dtype=torch.float64)
    (block,) = blocks_of(model, x).at(torch.arange(1))
    modes, height = find_modes(block, torch.tensor([[[0.5]], [[-0.9]]], dtype=torch.float64))
    wanted = (0.4 - 0.2**2 / 2) ** 0.5  # of -z^2 / 2 - (x - z^2)^2 / (2 * 0.2^2)
    assert (modes.abs() - wanted).abs().max() < 1e-5  # a first step may cross zero
    assert abs(height[0] - height[1]) < 1e-6


def test_the_weight_of_the_prior():
    model, x = NormalModel(noise=0.5), torch.tensor([1.0, -2.0], dtype=torch.float64)
    (block,) = blocks_of(model, x).at(torch.arange(2))
    modes, _ = find_modes(block, torch.zeros(1, 2, 1).double(), prior=0.25)
    wanted = x * 4 / (4 + 0.25)  # precisions 4 of the likelihood, a quarter of the prior's
    torch.testing.assert_close(modes[0, :, 0], wanted, rtol=0, atol=1e-5)


def test_where_the_density_is_zero_stays_minus_infinity():
    """A start and a place outside of it: no height, no ELBO, and another start is better."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.factor("inside", torch.where(z.abs() < 8, 0.0 * z, -torch.inf))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([0.5, -1.0], dtype=torch.float64)
    guide = pv.LocalGuide(model, num_data=2, example=x)
    blocks = blocks_of(model, x)
    (block,) = blocks.at(torch.arange(2))
    heights = find_modes(block, torch.full((1, 2, 1), 30.0, dtype=torch.float64))[1]
    assert (heights == -torch.inf).all()
    inside = guide.table.detach()
    outside = inside.clone()
    outside[..., 0], outside[..., 1] = 30.0, -1.0
    climber = Climber(blocks, 0.02, tqdm(disable=True))
    chosen, elbos = best_of(climber, block, torch.stack([outside, inside]))
    assert (elbos[0] == -torch.inf).all()
    assert chosen.tolist() == [1, 1]
