"""Log weights as a result: their arithmetic, and how they print."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pyro_vae.particles.log_weights import LogWeights


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
