"""What a comparison of models and a search for outliers say follows from their numbers."""

from __future__ import annotations

import numpy as np
import pytest

from pyro_vae.evaluation.model_comparison import ModelComparison
from pyro_vae.evaluation.outliers import Outliers
from tests.report.cases import models_dataset, outliers_dataset


def models(differences, about=None, **options):
    found = ModelComparison(models_dataset(differences, **options)).findings()
    return [each for each in found if about in (None, each.about)]


def test_a_best_model():
    found = models({"small": 0.0, "large": 1.0})
    assert [each.severity for each in found] == ["note", "good", "good"]
    worse, best, bounds = found
    values = models_dataset({"small": 0.0, "large": 1.0})["log_evidence"].values
    error = (values[1] - values[0]).std(ddof=1) / 10  # of the mean of 100 data
    assert f"'small' predicts worse than 'large', by 1.000 ± {error:.3f} nats" in worse.text
    assert best.text.startswith("'large' gives") and best.evidence == {
        "log_evidence of 'large'": pytest.approx(-4.0)
    }
    assert "for all 100 data" in bounds.text


def test_models_that_the_data_do_not_tell_apart():
    first, _ = models({"small": 0.0, "large": 0.001})
    assert "may not tell 'small' from it" in first.text and first.text.endswith("is 'small'")
    assert first.evidence["difference of 'small'"] == pytest.approx(-0.001)
    first, _ = models({"small": 0.001, "large": 0.0})
    assert first.text.endswith("is 'small'") and "tell 'large' from it" in first.text


def test_a_bound_that_is_too_low():
    found = models({"small": 0.0, "large": 1.0}, untrusted={"small": 100})
    unclear, bounds, best = found
    assert unclear.severity == "warning" and "100 of 100 data" in unclear.text
    assert bounds.severity == "warning" and "of 'small' is not to be trusted" in bounds.text
    assert best.severity == "note" and "not of all" in best.text
    (few,) = models({"small": 0.0, "large": 1.0}, "log p(x)", untrusted={"small": 5})
    assert few.severity == "note"


def test_few_data():
    assert "20 data are few" in models({"a": 0.0, "b": 1.0}, "data", num_data=20)[0].text
    (one,) = models({"a": 0.0, "b": 1.0}, "data", num_data=1)
    assert one.severity == "warning" and "Bayes factor" in one.text
    assert models({"a": 0.0, "b": 1.0}, "data", num_data=30) == []


def test_data_that_no_model_allows():
    dataset = models_dataset({"a": 0.0, "b": 1.0})
    dataset["log_evidence"][:, 3] = -np.inf
    assert ModelComparison(dataset).findings()[0].text.startswith("No model allows all")


def strange(about="outliers", **options):
    found = Outliers(outliers_dataset(**options)).findings()
    return [each for each in found if each.about == about]


def test_outliers():
    (one,) = strange(found=40)
    assert one.severity == "bad" and "40 of 100 data" in one.text and "60, 61, 62" in one.text
    (one,) = strange(found=6)
    assert one.severity == "good" and "no more than chance gives: about 5.0" in one.text
    assert one.evidence["outliers"] == 6 and 0.3 < one.evidence["probability of as many"] < 0.5
    (one,) = strange(found=0)
    assert one.severity == "good" and one.evidence["probability of as many"] == 1
    (one,) = strange(found=6, adjusted=0.1)
    assert one.severity == "warning" and "of the 6 with an adjusted p-value" in one.text
    one, other = strange(found=40, exact=False)
    assert one.severity == "warning" and "training data" in one.text and other.severity == "note"


def test_scores():
    (one,) = strange("scores", found=7)
    assert one.evidence == {"log_evidence": 7} and "log p(x) is unlike" in one.text
    assert strange("scores") == []
    assert strange("log p(x)")[0].text.startswith("log p(x) of 1 of 100")
