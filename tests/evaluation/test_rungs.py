"""Each rung alone, on a model whose posterior is known."""

from __future__ import annotations

import numpy as np
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.evaluation.repair import repair
from pyro_vae.evaluation.rungs import RUNGS
from tests.sampling.test_importance import counts, gamma_poisson, local


@pytest.mark.slow
@pytest.mark.parametrize("rung", RUNGS)
def test_each_rung_gives_the_posterior(rung):
    x = counts()
    guide = pv.refine(gamma_poisson, local(gamma_poisson, x), x, seed=1, progress=False)
    found = repair(gamma_poisson, guide, x, rungs=(rung,), seed=0, progress=False, compile=False)
    assert found.good.all()
    mean, std = (x + 2) / 1.5, (x + 2).sqrt() / 1.5
    assert ((found.draws["z"].mean(0) - mean).abs() < 0.2 * std).all()
    assert (found.draws["z"].std(0) / std - 1).abs().max() < 0.15
    evidence = dist.NegativeBinomial(2.0, probs=torch.tensor(1 / 1.5).double()).log_prob(x)
    off = np.abs(found.dataset["log_evidence"].values - evidence.numpy())
    assert (off < 5 * found.dataset["log_evidence_se"].values).all()
