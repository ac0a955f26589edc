"""Sections hold the numbers of the results that they are of."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib import pyplot as plt

from pyro_vae.evaluation.calibration import Calibration
from pyro_vae.evaluation.comparison import Comparison
from pyro_vae.evaluation.coverage import Coverage
from pyro_vae.evaluation.model_comparison import ModelComparison
from pyro_vae.evaluation.outliers import Outliers
from pyro_vae.evaluation.repair import Repair
from pyro_vae.report import sections
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


def of(**datasets):
    tables = {part: Comparison(each, {}).summary() for part, each in datasets.items()}
    return sections.of_comparisons(datasets, tables)


def rows(table) -> dict[str, list[str]]:
    return {row[0]: list(row[1:]) for row in table.rows}


def test_one_comparison():
    found = of(**{"": comparison_dataset(encoder=2.0, family=0.5)})
    numbers, worst = found.tables
    table = rows(numbers)
    assert table[""] == ["amortized", "mean-field"]
    assert table["amortization gap (encoder)"] == ["2.000 ± 0.002", "0.000 ± 0.000"]
    assert table["gaps measured against"] == ["mean-field", "itself"]
    assert table["log p(x)"][0].startswith("-11.950")
    assert list(found.findings) == [""]
    assert worst.rows[1][:2] == ["39", f"{2.5 * 1.5:.3f}"] and len(worst.rows) == 11


def test_held_out_data_come_first_and_are_compared():
    found = of(train=comparison_dataset(encoder=0.2), test=comparison_dataset(encoder=2.0))
    assert list(found.findings) == ["test", "train"]
    assert found.findings["test"][0].about == "generalization"
    assert all(each.about != "generalization" for each in found.findings["train"])
    assert [table.caption[:5] for table in found.tables[::2]] == ["test:", "train"]


def test_errors_of_a_figure_are_those_of_the_table():
    dataset = comparison_dataset(encoder=2.0, error=0.3)
    dataset["amortization_gap_skewness"][0] = 40.0  # of each datum much, of their mean little
    found = of(**{"": dataset})
    error = Comparison(dataset, {}).summary().loc["amortized", "amortization_gap_se"]
    ax = found.drawings[0].draw()
    assert f"2.00 ± {error:.2f}" in " ".join(text.get_text() for text in ax.texts)
    assert rows(found.tables[0])["amortization gap (encoder)"][0] == f"2.000 ± {error:.3f}"
    plt.close("all")


def test_a_repair():
    dataset = repair_dataset(bad=2)
    found = sections.of_repair(dataset, Repair(dataset, {}).summary())
    rungs, bad = found.tables
    assert rungs.rows[1][:4] == ["importance", "9", "4", "4"]
    assert [row[0] for row in bad.rows[1:]] == ["7", "8"]
    assert bad.rows[1][1:4] == ["full rank", "-5.000 ± 0.100", "500"]
    assert len(sections.of_repair(repair_dataset(bad=0), Repair(dataset, {}).summary()).tables) == 1


def test_a_sandwich():
    dataset = sandwich_dataset()
    found = rows(sections.of_sandwich(dataset).tables[0])
    assert found["lower"] == ["-8.025 ± 0.004"] and found["width"] == ["0.050 ± 0.004"]
    assert np.isclose(float(dataset["lower"].mean()), -8.025)


def test_ranks_and_coverage():
    dataset = calibration_dataset(spread=1.5)
    found = rows(sections.of_calibration(dataset, Calibration(dataset).summary()).tables[0])
    assert found["z[0]"] == ["1e-09", "4e-09", "0.000 ± 0.020", "1.500 ± 0.030"]
    dataset = coverage_dataset(off=-0.2)
    found = rows(sections.of_coverage(dataset, Coverage(dataset).summary()).tables[0])
    assert found["density"][2:] == ["0.300 ± 0.010", "0.600 ± 0.010", "0.750 ± 0.010"]


def test_models():
    dataset = models_dataset({"small": 0.0, "large": 1.0})
    found = sections.of_models(dataset, ModelComparison(dataset).summary())
    table = rows(found.tables[0])
    assert table["small"][0] == "-5.000 ± 0.001" and table["small"][-2:] == ["0", "worse"]
    assert table["small"][1] == "-1.000 ± 0.001" and table["large"][-1] == "best"
    assert "'large'" in found.drawings[0].draw().get_title(loc="left")
    plt.close("all")


def test_outliers():
    dataset = outliers_dataset(found=12)
    found = sections.of_outliers(dataset, Outliers(dataset).summary())
    table = rows(found.tables[0])
    assert len(table) == 13 and table["88"][:3] == ["0.01", "yes", "-50"]
    assert "200 calibration data" in found.lead[0]
