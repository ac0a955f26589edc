"""Refined guides for the tests, and how far they are from exact optima."""

from __future__ import annotations

import torch

import pyro_vae as pv
from pyro_vae.particles.evaluator import Evaluator
from pyro_vae.programs.batch import as_batch
from pyro_vae.programs.structure import ModelLooks
from pyro_vae.refinement.blocks import Blocks
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


def blocks_of(model, x, *, family=None):
    """Return the blocks of data of a table of a family, run eagerly."""
    looks = ModelLooks(model, as_batch(x))
    guide = pv.LocalGuide(model, num_data=len(x), example=looks, family=family)
    whole = Evaluator(model, guide, looks.batch, seed=0, gradients=True)
    return Blocks(looks, whole, guide, None, False)
