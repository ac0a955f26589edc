"""M-steps: undone where they gain nothing or fail."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.guides.exact import ExactGuide
from pyro_vae.training.em import NonFiniteHalfStepError, em
from tests.training.em_models import half_steps, mixture, mixture_data, spread_data


def test_a_torch_optimizer_for_the_m_step():
    """Twenty steps of Adam are no maximum; the ELBO goes up all the same."""
    x = mixture_data(100)
    result = em(
        mixture,
        ExactGuide(mixture, example=x),
        x,
        optim=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
        m_steps=20,
        num_iterations=5,
        progress=False,
    )
    assert (np.diff(result.history["elbo"]) > -1e-12).all()
    assert half_steps(result, "E")[-1] > half_steps(result, "E")[0] + 0.1


def test_an_m_step_that_gains_nothing_is_undone():
    x = mixture_data(50)
    mixture(x)
    before = {name: value.clone() for name, value in pyro.get_param_store().items()}
    result = em(
        mixture,
        ExactGuide(mixture, example=x),
        x,
        optim=lambda parameters: torch.optim.SGD(parameters, lr=1e3),
        m_steps=1,
        num_iterations=1,
        progress=False,
    )
    after = dict(pyro.get_param_store().items())
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert result.history["elbo"][0] == pytest.approx(result.history["elbo"][2], abs=1e-12)


def test_a_failing_m_step_is_named_and_undone():
    """The gradient of sqrt at zero is infinite, and nan by the chain rule."""

    def model(x):
        mean = pyro.param("mean", torch.tensor(0.5, dtype=torch.float64))
        broken = torch.where(mean > 2, (mean * 0).sqrt(), mean)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(broken, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = spread_data(5)
    guide = pv.LocalGuide(model, num_data=5, example=x, family=pv.families.Delta())
    with pytest.raises(NonFiniteHalfStepError, match="M-step of iteration 1") as caught:
        em(model, guide, x, progress=False)
    assert (caught.value.half_step, caught.value.iteration) == ("M", 1)
    assert pyro.param("mean").item() == 0.5


def test_a_line_search_that_goes_too_far_comes_back():
    """Outside (-1, 1) the density is nan; the maximum, at 0.9, is inside."""

    def model(x):
        shift = pyro.param("shift", torch.tensor(-0.9, dtype=torch.float64))
        location = shift + 0 * (1 - shift**2).log()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(location, 0.1))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    x = torch.full((6,), 0.9, dtype=torch.float64)
    guide = pv.LocalGuide(model, num_data=6, example=x, family=pv.families.Delta())
    em(model, guide, x, num_iterations=40, tolerance=1e-12, progress=False)
    assert pyro.param("shift").item() == pytest.approx(0.9, abs=1e-3)
