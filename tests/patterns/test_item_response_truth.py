"""The stored posterior of item responses: converged, of its data, near the mode's curvature."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import pyro_vae as pv

DATA = Path(__file__).parents[2] / "benchmarks" / "data"
PERSONS, ITEMS = 400, 100
MODELS = pytest.mark.parametrize("model", ["rasch", "two_parameter"])


def stored(model: str) -> dict[str, np.ndarray]:
    path = DATA / f"item_response_{model}.npz"
    assert path.stat().st_size < 100_000
    with np.load(path) as file:
        return dict(file)


@MODELS
def test_the_chains_have_converged(model):
    truth = stored(model)
    size = PERSONS + ITEMS * (2 if model == "two_parameter" else 1) + 1
    for name in ("mean", "sd", "mean_se", "sd_se", "ess", "rhat"):
        assert truth[name].shape == (size,) and np.isfinite(truth[name]).all()
    assert truth["rhat"].max() < 1.01 and truth["ess"].min() > 400
    assert (truth["mean_se"] / truth["sd"]).max() < 0.05


@MODELS
def test_the_responses_are_simulated_with_a_seed(model):
    zoo = pv.zoo.ItemResponse(ITEMS, discrimination=model == "two_parameter")
    whole, responses = zoo.simulate(PERSONS, seed=0), stored(model)["responses"]
    asked = torch.from_numpy(responses) >= 0
    assert torch.equal(torch.from_numpy(responses)[asked].float(), whole[asked])
    assert float(asked.float().mean()) == pytest.approx(0.25, abs=4 * (0.1875 / 40_000) ** 0.5)


def test_near_the_gaussian_of_the_mode():
    """Rasch's posterior is nearly Gaussian: Newton's mode and its curvature, in plain PyTorch."""
    truth = stored("rasch")
    responses = torch.from_numpy(truth["responses"]).double()
    asked = (responses >= 0).double()
    z = torch.zeros(PERSONS + ITEMS, dtype=torch.float64)
    prior = torch.cat([torch.ones(PERSONS), torch.full((ITEMS,), 1.5**-2)]).double()
    for _ in range(20):
        p = (z[:PERSONS, None] - z[PERSONS:]).sigmoid()
        left, weight = (responses - p) * asked, p * (1 - p) * asked
        slope = torch.cat([left.sum(1), -left.sum(0)]) - prior * z
        curvature = torch.diag(prior + torch.cat([weight.sum(1), weight.sum(0)]))
        curvature[:PERSONS, PERSONS:] = -weight
        curvature[PERSONS:, :PERSONS] = -weight.T
        z = z + torch.linalg.solve(curvature, slope)
    assert slope.abs().max() < 1e-9
    sd = torch.linalg.inv(curvature).diagonal().sqrt()
    off = (z.numpy() - truth["mean"][:-1]) / truth["sd"][:-1]
    ratio = sd.numpy() / truth["sd"][:-1]
    assert np.abs(off).max() < 0.5 and np.median(np.abs(off)) < 0.1
    assert ratio.min() > 0.85 and ratio.max() < 1.05 and abs(np.median(ratio) - 1) < 0.03
