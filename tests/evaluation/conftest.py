"""The comparison that several tests read."""

from __future__ import annotations

import pytest
import torch

import pyro_vae as pv
from tests.models import encoder, factor_analysis


@pytest.fixture(scope="module")
def compared():
    model = factor_analysis("correlated")
    torch.manual_seed(1)
    x = model.data(30)
    torch.manual_seed(0)
    guide = pv.AmortizedGuide(model, encoder(6), example=x)
    pv.fit(model, guide, x, epochs=200, progress=False, batch_size=30)
    found = pv.compare(model, {"amortized": guide, "mean-field": pv.families.Normal()}, x, seed=0)
    return model, x, guide, found
