"""Result types: their arithmetic and how they print."""

from __future__ import annotations

import pytest
import torch

from pyro_vae.evaluation.bounds import Bound


def test_bound():
    bound = Bound("IWAE-7", torch.tensor([-1.0, -2.0]), torch.tensor([0.3, 0.4]), 7)
    assert bound.mean == -1.5
    assert bound.mean_std_error == pytest.approx(0.25)
    assert repr(bound) == "IWAE-7: -1.5000 ± 0.2500 nats per datum (2 data)"
