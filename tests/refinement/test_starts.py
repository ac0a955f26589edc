"""Where refinement begins: at a guide's answer, read off or matched, and at rivals."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from tests.models import GammaPoisson, factor_analysis
from tests.refinement.guides import gamma_poisson_gap


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
    from pyro_vae.particles.evaluator import Evaluator
    from pyro_vae.programs.batch import as_batch
    from pyro_vae.refinement.starts import answer_of

    local = pv.LocalGuide(model, num_data=8, example=x)
    start = answer_of(local, normal, Evaluator(model, normal, as_batch(x), seed=0))
    torch.testing.assert_close(start[..., 0], location)
    torch.testing.assert_close(start[..., 1].exp(), torch.full_like(location, 0.3))
    start = answer_of(
        local, model.posterior, Evaluator(model, model.posterior, as_batch(x), seed=0)
    )
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
