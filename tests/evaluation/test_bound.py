"""Result types: their arithmetic and how they print."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from pyro_vae.evaluation.bound import Bound
from pyro_vae.particles.log_weights import LogWeights
from pyro_vae.training.result import FitResult


def test_log_weights():
    parts = [torch.randn(4, 6, dtype=torch.float64) for _ in range(3)]
    weights = LogWeights(*parts)
    torch.testing.assert_close(weights.log_joint, parts[0] + parts[1])
    torch.testing.assert_close(weights.total, parts[0] + parts[1] - parts[2])
    assert repr(weights) == "LogWeights(num_particles=4, num_data=6)"
    for dim in (0, 1):
        chunks = [LogWeights(*each) for each in zip(*(p.split(3, dim) for p in parts), strict=True)]
        assert len(chunks) == 2
        assert torch.equal(LogWeights.concatenate(chunks, dim).log_guide, parts[2])
        assert torch.equal(LogWeights.concatenate(chunks, dim).total, weights.total)
    with pytest.raises(dataclasses.FrozenInstanceError):
        weights.log_prior = parts[0]


def test_bound():
    bound = Bound("IWAE-7", torch.tensor([-1.0, -2.0]), torch.tensor([0.3, 0.4]), 7)
    assert bound.mean == -1.5
    assert bound.mean_std_error == pytest.approx(0.25)
    assert repr(bound) == "IWAE-7: -1.5000 ± 0.2500 nats per datum (2 data)"


def test_fit_result():
    history = {"epoch": [1, 2], "elbo": [-3.0, -2.0]}
    result = FitResult(history, "epochs", 20, 1.26, 2)
    assert repr(result) == (
        "FitResult(stopped_by='epochs', epochs=2, steps=20, elapsed=1.3s, elbo=-2.0000)"
    )
    empty = FitResult({"epoch": [], "elbo": []}, "interrupted", 3, math.pi, 0)
    assert repr(empty) == ("FitResult(stopped_by='interrupted', epochs=0, steps=3, elapsed=3.1s)")
