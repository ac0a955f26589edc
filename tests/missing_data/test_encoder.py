"""The encoder that sees which values are missing."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import pyro_vae as pv
from tests.missing_data.models import NAN, PartlySeen, data, scattered
from tests.models import encoder, factor_analysis


def test_an_encoder_that_sees_the_mask_learns():
    exact = PartlySeen(factor_analysis("orthogonal"))
    x = scattered(data(200))
    model = pv.MissingData(exact.model)
    torch.manual_seed(0)
    guide = pv.AmortizedGuide(model, pv.MissingEncoder(encoder(12, 32)), example=x)
    before = pv.elbo(model, guide, x, num_particles=100, seed=0).mean
    pv.fit(model, guide, x, epochs=40, batch_size=50, progress=False, seed=0,
           optim=functools.partial(torch.optim.Adam, lr=0.02))  # fmt: skip
    after = pv.elbo(model, guide, x, num_particles=100, seed=0)
    best = float(exact.log_evidence(x).mean())
    assert before < best - 3
    assert best - 1 < after.mean < best + 4 * after.mean_std_error


def test_the_encoder_sees_filled_data_and_mask():
    x = torch.tensor([[1.5, NAN], [NAN, 2.0]])
    seen = (~x.isnan()).float()
    wanted = torch.cat([torch.tensor([[1.5, 0.0], [0.0, 2.0]]), seen], -1)
    assert torch.equal(pv.MissingEncoder(nn.Identity())(x), wanted)
    filled = pv.MissingEncoder(nn.Identity(), fill=torch.tensor([5.0, 6.0]))(x)
    assert torch.equal(filled[:, :2], torch.tensor([[1.5, 6.0], [5.0, 2.0]]))
    images = x.reshape(2, 1, 1, 2)
    assert pv.MissingEncoder(nn.Identity(), dim=1)(images).shape == (2, 2, 1, 2)
    assert torch.equal(
        pv.MissingEncoder(nn.Identity())(x[:, 0]), torch.tensor([[1.5, 1.0], [0.0, 0.0]])
    )


def test_the_encoder_keeps_other_arguments():
    class Both(nn.Module):
        def forward(self, x, label):
            return torch.cat([x, label], -1)

    x, label = torch.tensor([[NAN, 2.0]]), torch.tensor([[7.0]])
    with pytest.raises(
        ValueError, match=r"arguments \[0, 1\] are floating-point tensors; say with"
    ):
        pv.MissingEncoder(Both())(x, label)
    found = pv.MissingEncoder(Both(), values=0)(x, label)
    assert torch.equal(found, torch.tensor([[0.0, 2.0, 0.0, 1.0, 7.0]]))
    found = pv.MissingEncoder(Both(), values="x")(x=x, label=label)
    assert torch.equal(found, torch.tensor([[0.0, 2.0, 0.0, 1.0, 7.0]]))


def test_the_encoder_refuses_to_append_the_mask_to_the_data():
    with pytest.raises(
        ValueError, match="dim=0 of data of shape .* is that of the data themselves"
    ):
        pv.MissingEncoder(nn.Identity(), dim=0)(torch.ones(2, 3))
