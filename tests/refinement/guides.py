"""Refined guides for the tests, and how far they are from exact optima."""

from __future__ import annotations

import torch

import pyro_vae as pv
from tests.models import GammaPoisson, encoder


def gamma_poisson_gap(a, x, guide):
    """How far the exact ELBO of rows lies below the optimum of the family."""
    location, log_scale = guide.table[:, 0].detach().unbind(-1)
    return GammaPoisson(a, 1.0).normal_gap(x, location, log_scale.exp())


def exact_elbo(model, x, guide):
    return model.elbo_of(x, guide.table[..., 0].detach(), guide.table[..., 1].exp().detach())


def amortized(model, x):
    torch.manual_seed(0)
    return pv.AmortizedGuide(model, encoder(x.shape[1]), example=x)
