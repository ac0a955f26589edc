"""Results come back from their files, and a report is made of them."""

from __future__ import annotations

import matplotlib
import pytest
import torch
import xarray as xr

import pyro_vae as pv
from pyro_vae.evaluation.saved import kind_of, report, report_of_files
from tests.evaluation.off_guides import GUIDES, MODEL
from tests.models import factor_analysis
from tests.report.cases import (
    calibration_dataset,
    comparison_dataset,
    coverage_dataset,
    models_dataset,
    outliers_dataset,
    repair_dataset,
    sandwich_dataset,
)

matplotlib.use("Agg")


def test_real_results_are_known_and_round_trip(tmp_path):
    """Of compare, repair and bdmc themselves: what a file gives back makes the same page."""
    model = factor_analysis("correlated")
    torch.manual_seed(0)
    x = model.data(4)
    guide = pv.LocalGuide(model, num_data=4, example=x)
    options = {"seed": 0, "progress": False}
    found = {
        "comparison": pv.compare(
            model, {"mine": guide}, x, num_particles=50, max_steps=5, **options
        ),
        "repair": pv.repair(model, guide, x, rungs=("importance",), num_particles=1000, **options),
        "sandwich": pv.bdmc(model, guide, x, num_data=4, num_chains=2, num_steps=3, **options),
    }
    datasets = {name: result.dataset for name, result in found.items()}
    for name, dataset in datasets.items():
        assert kind_of(dataset) == name
        dataset.to_netcdf(tmp_path / f"{name}.nc", engine="h5netcdf")
    assert report_of_files([tmp_path]) == report(datasets)


def test_the_other_results_are_known_and_round_trip(tmp_path):
    """Of sbc, coverage, compare_models and outliers; their own page is that of the report."""
    guide = GUIDES["exact"]
    x = 2**0.5 * torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    few = {"num_simulations": 40, "num_draws": 19, "seed": 0}
    options = {"rungs": ("importance",), "num_particles": 1000, "seed": 0, "progress": False}
    found = {
        "calibration": pv.sbc(MODEL, guide, x, **few),
        "coverage": pv.coverage(MODEL, guide, x, **few),
        "models": pv.compare_models({"a": (MODEL, guide), "b": (MODEL, guide)}, x, **options),
        "outliers": pv.outliers(MODEL, guide, x, calibration=x + 0.1, num_particles=50, seed=0),
    }
    datasets = {name: result.dataset for name, result in found.items()}
    for name, result in found.items():
        assert kind_of(result.dataset) == name
        result.dataset.to_netcdf(tmp_path / f"{name}.nc", engine="h5netcdf")
        assert result.to_html(tmp_path / "own.html", title="Report of posteriors") == report(
            {name: result.dataset}
        )
        assert "<table>" in result._repr_html_()
    text = report_of_files([tmp_path])
    assert text == report(datasets)
    assert all(finding.text for result in found.values() for finding in result.findings())


def test_several_results_of_a_kind_are_named():
    text = report({"tight": coverage_dataset(off=-0.2), "good": coverage_dataset()})
    assert "Coverage of credible regions: tight" in text


def test_of_a_folder_other_files_are_left_out(tmp_path):
    comparison_dataset(encoder=0.2).to_netcdf(tmp_path / "comparison-train.nc")
    comparison_dataset(encoder=2.0).to_netcdf(tmp_path / "comparison-test.nc")
    xr.Dataset({"z": ("datum", [1.0])}).to_netcdf(tmp_path / "posterior.nc")
    text = report_of_files([tmp_path])
    assert "does not generalize" in text
    with pytest.raises(ValueError, match=r"posterior.nc: the dataset of a Comparison"):
        report_of_files([tmp_path / "posterior.nc"])


def test_files_of_one_name(tmp_path):
    for folder, encoder in (("a", 0.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        comparison_dataset(encoder=encoder).to_netcdf(tmp_path / folder / "test.nc")
    text = report_of_files([tmp_path / "a", tmp_path / "b"])
    assert "Findings: test" in text and f"Findings: {tmp_path / 'b' / 'test'}" in text


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="no netCDF file"):
        report_of_files([tmp_path])
    with pytest.raises(ValueError, match="nothing to report"):
        report({})
    with pytest.raises(ValueError, match="mine: the dataset of"):
        report({"mine": xr.Dataset()})
    with pytest.raises(FileNotFoundError):
        report_of_files([tmp_path / "none.nc"])
    whole = tmp_path / "whole.nc"
    comparison_dataset(encoder=0.2).to_netcdf(whole)
    (tmp_path / "cut.nc").write_bytes(whole.read_bytes()[:1000])
    for path in (tmp_path / "cut.nc", tmp_path):
        with pytest.raises(OSError, match=r"cut\.nc: "):
            report_of_files([path])
    lacking = comparison_dataset(encoder=0.2)
    del lacking.attrs["num_particles"]
    for dataset in (lacking, comparison_dataset(encoder=0.2).drop_vars("pareto_k")):
        with pytest.raises(ValueError, match=r"mine: .*(pareto_k|num_particles).*; the dataset of"):
            report({"mine": dataset})


@pytest.mark.parametrize(
    "dataset",
    [
        repair_dataset(),
        sandwich_dataset(),
        calibration_dataset(),
        coverage_dataset(),
        models_dataset({"a": 0.0, "b": 1.0}),
        outliers_dataset(),
    ],
    ids=["repair", "bdmc", "calibration", "coverage", "models", "outliers"],
)
def test_each_kind_alone(dataset):
    assert report({"it": dataset}).count("<h2>") == 3
