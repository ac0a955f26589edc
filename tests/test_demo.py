"""The demo as a user runs it: true, complete, and the same for one seed."""

from __future__ import annotations

import os

import arviz as az
import numpy as np
import pandas as pd
import pytest
import torch

from pyro_vae import cli
from pyro_vae.demo import Settings, run

os.environ.setdefault("MPLBACKEND", "Agg")
TINY = Settings(
    num_latents=3, hidden=(16, 16), epochs=2, num_data=8, num_particles=200, num_draws=20
)
FIGURES = {"training", "gaps", "gap_distribution", "pareto_k", "reconstructions", "latents"}


def test_it_writes_what_it_promises(tmp_path, capsys):
    comparisons = run(TINY, output=tmp_path / "new" / "folder", progress=False)
    told = capsys.readouterr().out
    files = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert files == {"posterior.nc", "gaps.csv"} | {f"{name}.png" for name in FIGURES}
    table = pd.read_csv(tmp_path / "new" / "folder" / "gaps.csv")
    assert set(table["part"]) == {"train", "test"} and len(table) == 2 * 2 * 8
    total = table["log_evidence"] - table["elbo"]
    np.testing.assert_allclose(
        total, table["approximation_gap"] + table["amortization_gap"], atol=1e-9
    )
    tree = az.from_netcdf(tmp_path / "new" / "folder" / "posterior.nc")
    assert tree["posterior"]["z"].dims == ("chain", "draw", "datum", "latent")
    assert "guide" in told and "approximation gap" in told and "share k-hat > 0.7" in told
    mean = comparisons["test"].summary().loc["amortized", "elbo"]
    assert f"{mean:.3f} ±" in told


def test_one_seed_one_result(tmp_path):
    a, b, c = (
        run(TINY, output=tmp_path, seed=seed, progress=False)["test"].dataset for seed in (1, 1, 2)
    )
    assert a.equals(b) and not a.equals(c)


def test_grey_images_are_binarized(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (60, 6, 6), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x_train=images, x_test=images[:12])
    run(TINY, data=tmp_path / "images.npz", output=tmp_path / "out", progress=False)
    assert "Bernoulli likelihood" in capsys.readouterr().out


@pytest.mark.slow
def test_the_quick_demo_from_the_command_line(tmp_path, capsys):
    state = torch.get_rng_state()
    assert cli.main(["demo", "--quick", "--output", str(tmp_path)]) == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert "On held-out images" in capsys.readouterr().out
