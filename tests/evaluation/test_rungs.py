"""Each rung alone, on a model whose posterior is known."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.evaluation import rungs
from pyro_vae.evaluation.repair import repair
from pyro_vae.evaluation.rungs import EVERY_RUNG, Found, _with_rows
from tests.sampling.test_importance import counts, gamma_poisson, local, normals, square


@pytest.mark.slow
@pytest.mark.parametrize("rung", EVERY_RUNG)
def test_each_rung_gives_the_posterior(rung):
    x = counts()
    guide = pv.refine(gamma_poisson, local(gamma_poisson, x), x, seed=1, progress=False)
    found = repair(gamma_poisson, guide, x, rungs=(rung,), seed=0, progress=False, compile=False)
    assert found.good.all()
    mean, std = (x + 2) / 1.5, (x + 2).sqrt() / 1.5
    assert ((found.draws["z"].mean(0) - mean).abs() < 0.2 * std).all()
    # Four standard errors of the standard deviation of 256 effective draws of a Gamma(x + 2).
    error = ((2 + 6 / (x + 2)) / (4 * 256)).sqrt()
    assert ((found.draws["z"].std(0) / std - 1).abs() < 4 * error).all()
    evidence = dist.NegativeBinomial(2.0, probs=torch.tensor(1 / 1.5).double()).log_prob(x)
    off = np.abs(found.dataset["log_evidence"].values - evidence.numpy())
    assert (off < 5 * found.dataset["log_evidence_se"].values).all()


def test_errors_of_weights_are_how_far_log_evidence_is_off():
    def posterior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5).to_event(1))

    x = torch.randn(300, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    options = {"rungs": ("importance",), "num_particles": 1000, "audit": 0, "num_draws": 1}
    found = repair(normals, posterior, x, seed=0, progress=False, compile=False, **options).dataset
    exact = dist.Normal(x.new_zeros(()), 2**0.5).log_prob(x).sum(1)
    far = (found["log_evidence"].values - exact.numpy()) / found["log_evidence_se"].values
    assert 0.85 < np.sqrt(np.square(far).mean()) < 1.15


def annealed(x):
    options = {"rungs": ("annealed",), "seed": 0, "progress": False, "compile": False}
    return repair(square, local(square, x), x, **options).dataset["ess"].values


def test_few_annealed_chains_go_first_and_the_rest_for_those_of_promise(monkeypatch):
    """Narrow modes at x = 9 leave fewer effective chains than the wide posterior at 0.2."""
    x = torch.tensor([9.0, 0.2], dtype=torch.float64)
    monkeypatch.setattr(rungs, "_ANNEALED_STEPS", 60)
    monkeypatch.setattr(rungs, "_HOPELESS", 1.1)  # of nothing are more effective than there are
    first = annealed(x)
    assert first[0] < first[1] <= 64
    monkeypatch.setattr(rungs, "_HOPELESS", 0.0)
    every = annealed(x)
    assert (every > 2 * first).all() and every[1] > 64
    monkeypatch.setattr(rungs, "_HOPELESS", float(first.mean()) / 64)
    some = annealed(x)
    assert some[0] == first[0]
    assert 64 < some[1] <= 512


@pytest.mark.parametrize("hopeless", [0.0, 0.5])
def test_chains_that_went_first_count_among_all(monkeypatch, hopeless):
    """log p(x) is the mean weight of 64 chains and of 448 with random numbers of their own."""
    found: list[torch.Tensor] = []
    forward = rungs.Annealer.forward

    def noted(annealer, *args, **options):
        log_weights, z = forward(annealer, *args, **options)
        found.append(log_weights)
        return log_weights, z

    monkeypatch.setattr(rungs.Annealer, "forward", noted)
    monkeypatch.setattr(rungs, "_ANNEALED_STEPS", 60)
    monkeypatch.setattr(rungs, "_HOPELESS", hopeless)  # of the first datum fewer are effective
    x = torch.tensor([9.0, 0.2], dtype=torch.float64)
    options = {"rungs": ("annealed",), "seed": 0, "progress": False, "compile": False, "audit": 0}
    data = repair(square, local(square, x), x, **options).dataset
    (first, more), some = found, slice(1, 2) if hopeless else slice(0, 2)
    assert first.shape == (64, 2) and more.shape == (448, some.stop - some.start)
    every = torch.cat([first[:, some], more])
    np.testing.assert_allclose(data["log_evidence"][some], every.logsumexp(0) - np.log(512))
    if hopeless:
        alone = first[:, 0].logsumexp(0) - np.log(64)
        np.testing.assert_allclose(data["log_evidence"][0], alone)
    assert not (more[:64] == first[:, some]).any()


def test_rows_that_are_found_anew():
    def found(n: int, value: float) -> Found:
        numbers = torch.full((n,), value, dtype=torch.float64)
        draws = {"z": torch.full((5, n, 2), value), "one": torch.full((5, n), value)}
        return Found(numbers > 1, *[numbers] * 5, draws)

    old, new = found(3, 1.0), found(2, 2.0)
    both = _with_rows(old, torch.tensor([2, 0]), new)
    assert both.good.tolist() == [True, False, True]
    for name in ("log_evidence", "error", "pareto_k", "ess", "rhat"):
        assert getattr(both, name).tolist() == [2.0, 1.0, 2.0]
    assert both.draws["z"][0, :, 0].tolist() == [2.0, 1.0, 2.0]
    assert both.draws["one"][4].tolist() == [2.0, 1.0, 2.0]
    assert old.ess.tolist() == [1.0] * 3 and float(old.draws["z"].max()) == 1.0
