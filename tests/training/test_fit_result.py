"""What a result says of how training ended, and whether it is unfinished."""

from __future__ import annotations

import math

import pytest
import torch

import pyro_vae as pv


def test_a_result_says_how_training_ended():
    history = {"epoch": [1, 2], "elbo": [-3.0, -2.0]}
    result = pv.FitResult(history, "epochs", 20, 1.26, 2)
    assert repr(result) == (
        "FitResult(stopped_by='epochs', epochs=2, steps=20, elapsed=1.3s, elbo=-2.0000)"
    )
    empty = pv.FitResult({"epoch": [], "elbo": []}, "interrupted", 3, math.pi, 0)
    assert repr(empty) == ("FitResult(stopped_by='interrupted', epochs=0, steps=3, elapsed=3.1s)")


@pytest.mark.parametrize(("rise", "noise", "told"), [(1e-3, 0.1, True), (0.0, 0.1, False)])
def test_a_result_says_that_the_elbo_still_rises(rise, noise, told):
    """By the trend of a line with noise: 400 epochs rise by 0.1 from a quarter to the next."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.arange(400)
    elbo = rise * steps + noise * torch.randn(400, generator=generator)
    result = pv.FitResult({"epoch": steps.tolist(), "elbo": elbo.tolist()}, "epochs", 400, 1.0, 400)
    found, error = result.trend
    assert found == pytest.approx(100 * rise, abs=4 * error)
    # White noise: each quarter's mean has an error of a tenth of it; the rise within one adds.
    assert error < 0.03
    assert bool(result.unfinished) is told and ("still rises" in repr(result)) is told
    short = pv.FitResult({"epoch": [1] * 40, "elbo": [1.0] * 40}, "epochs", 40, 1.0, 40)
    assert math.isnan(short.trend[0]) and not short.unfinished
