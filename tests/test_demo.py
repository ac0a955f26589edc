"""The demo as a user runs it: true, complete, and the same for one seed."""

from __future__ import annotations

import contextlib
import html
import io
import os
import re

import arviz as az
import numpy as np
import pandas as pd
import pytest
import torch

from pyro_vae import cli
from pyro_vae.demo import Settings, run

os.environ.setdefault("MPLBACKEND", "Agg")
TINY = Settings(
    num_latents=3,
    hidden=(16, 16),
    epochs=2,
    num_data=8,
    refine_steps=400,
    num_particles=200,
    num_draws=20,
    num_repaired=3,
    rungs=("importance", "refined"),
    num_sandwiched=2,
    num_annealed=5,
    num_transitions=20,
)
FIGURES = {"training", "gaps", "gap_distribution", "pareto_k", "reconstructions", "latents"}
FIGURES |= {"rungs", "posterior", "evidence"}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        comparisons = run(TINY, output=folder, progress=False)
    return comparisons, folder, told.getvalue()


def test_it_writes_what_it_promises(ran):
    comparisons, folder, told = ran
    files = {path.name for path in folder.iterdir()}
    data = {"posterior.nc", "gaps.csv", "repair.csv", "report.html"}
    data |= {f"{name}.nc" for name in ("comparison-train", "comparison-test", "repair", "bounds")}
    assert files == data | {f"{name}.png" for name in FIGURES}
    table = pd.read_csv(folder / "gaps.csv")
    assert set(table["part"]) == {"train", "test"} and len(table) == 2 * 2 * 8
    total = table["log_evidence"] - table["elbo"]
    np.testing.assert_allclose(
        total, table["approximation_gap"] + table["amortization_gap"], atol=1e-9
    )
    tree = az.from_netcdf(folder / "posterior.nc")
    assert tree["posterior"]["z"].dims == ("chain", "draw", "datum", "latent")
    assert "approximation gap" in told and "median ESS" in told
    repairs = pd.read_csv(folder / "repair.csv")
    assert set(repairs["rung"]) <= {"importance", "refined"} and len(repairs) == 3
    for share in (repairs["good"] & (repairs["rung"] == "refined")).mean(), repairs["good"].mean():
        assert share in (0, 1) or f"{share:.0%}" in told
    mean = comparisons["test"].summary().loc["amortized", "elbo"]
    assert f"{mean:.3f} ±" in told


def test_its_report_is_what_the_command_makes(ran):
    """And the findings that it prints are the report's."""
    _, folder, told = ran
    written = (folder / "report.html").read_text(encoding="utf-8")
    assert f"in one page: {folder / 'report.html'}" in told
    assert cli.main(["report", str(folder), "--output", str(folder / "again.html")]) == 0
    again = (folder / "again.html").read_text(encoding="utf-8")
    (folder / "again.html").unlink()
    title = "The demo on digits"
    assert again.split("<section>")[1:] == written.split("<section>")[1:]
    assert title in written
    for line in re.findall(r"^- \w+: (.{10,60}?)[;:.,\n]", told, re.MULTILINE):
        assert html.escape(line) in written


def test_one_seed_one_result(ran, tmp_path):
    same, other = (
        run(TINY, output=tmp_path, seed=seed, progress=False)["test"].dataset for seed in (0, 1)
    )
    assert same.equals(ran[0]["test"].dataset)
    assert not same.equals(other)


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
    assert "in one page:" in capsys.readouterr().out
