"""A comparison of models as arrays: means, both errors, verdicts, what the table says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import xarray as xr

from pyro_vae.evaluation.model_comparison import ModelComparison


def compared(values, errors=0.01, good=True, source="importance", given=""):
    values = np.atleast_2d(np.asarray(values, float))
    names = [f"model {number}" for number in range(len(values))]
    columns = {"log_evidence": values, "log_evidence_se": errors, "good": good, "source": source}
    full = {
        key: (("model", "datum"), np.broadcast_to(np.asarray(value, dtype=None), values.shape))
        for key, value in columns.items()
    }
    coords = {"model": names, "given": ("model", [given] * len(names))}
    return ModelComparison(xr.Dataset(full, coords))


def drawn(shift, num_data=200, spread=0.1, seed=0):
    """Log p(x) of a model, and of one that is shift lower on average, with paired noise."""
    rng = np.random.default_rng(seed)
    base = rng.normal(-10.0, 3.0, num_data)
    return np.stack([base, base - shift + rng.normal(0.0, spread, num_data)])


def test_differences_and_their_errors_are_those_of_numpy():
    values = drawn(0.1)
    errors = np.random.default_rng(1).uniform(0.001, 0.003, values.shape)
    table = compared(values, errors).summary()
    first, second = (table.loc[f"model {number}"] for number in (0, 1))
    difference = values[1] - values[0]
    assert second["difference"] == pytest.approx(difference.mean())
    assert second["difference_se"] == pytest.approx(np.sqrt((errors**2).sum()) / 200)
    assert second["difference_se_new"] == pytest.approx(difference.std(ddof=1) / 200**0.5)
    assert second["log_evidence_se"] == pytest.approx(np.sqrt((errors[1] ** 2).sum()) / 200)
    assert (first["difference"], first["difference_se"], first["difference_se_new"]) == (0, 0, 0)
    assert list(table["verdict"]) == ["best", "worse"]


def test_a_difference_is_paired():
    """The data differ by 3 nats, the difference of the models by 0.1."""
    unpaired = drawn(0.1).std(1).max() / 200**0.5
    assert compared(drawn(0.1)).summary()["difference_se_new"].iloc[1] < unpaired / 20


def test_the_error_for_new_data_is_never_below_that_for_these():
    table = compared(np.stack([np.zeros(50), np.full(50, -1.0)]), errors=0.5).summary()
    assert table["difference_se_new"].iloc[1] == table["difference_se"].iloc[1] > 0


def test_equal_models_are_not_distinguishable_and_the_first_is_preferred():
    found = compared(drawn(-0.008, seed=3))
    assert found.best == "model 1"
    assert found.indistinguishable == ("model 0", "model 1")
    assert found.preferred == "model 0"
    assert "the first in your order is 'model 0'" in repr(found)


def test_a_reference_of_ones_own():
    found = compared(drawn(0.1))
    assert list(found.summary("model 1")["verdict"]) == ["better", "reference"]
    assert found.summary("model 1")["difference"].iloc[0] > 0
    with pytest.raises(ValueError, match="reference='model 9': the models are"):
        found.summary("model 9")


@pytest.mark.parametrize(("few", "verdict"), [(True, "worse"), (False, "unclear")])
def test_a_bound_that_is_too_low_makes_no_model_worse(few, verdict):
    """Worse by 20 nats on untrusted data alone is unclear; worse on the others too, worse."""
    values = drawn(0.1 if few else 0.0)
    values[1, :10] = values[0, :10] - 20
    good = np.ones(values.shape, dtype=bool)
    good[1, :10] = False
    found = compared(values, good=good)
    row = found.summary().loc["model 1"]
    assert (row["verdict"], row["untrusted"]) == (verdict, 10)
    assert ("the difference may be the bound's" in repr(found)) == (verdict == "unclear")
    assert found.indistinguishable == ("model 0",)


def test_a_bound_of_the_best_that_is_too_low_does_no_harm():
    values = drawn(0.1)
    good = np.ones(values.shape, dtype=bool)
    good[0, :50] = False
    assert compared(values, good=good).summary().loc["model 1", "verdict"] == "worse"


def test_but_one_of_a_reference_does():
    values = drawn(0.0)
    values[1, :10] = values[0, :10] - 20
    good = np.ones(values.shape, dtype=bool)
    good[1, :10] = False
    assert compared(values, good=good).summary("model 1").loc["model 0", "verdict"] == "unclear"


def test_a_datum_that_a_model_does_not_allow():
    values = drawn(0.1)
    values[1, 0] = -math.inf
    row = compared(values).summary().loc["model 1"]
    assert row["difference"] == -math.inf
    assert math.isnan(row["difference_se_new"])
    assert row["verdict"] == "worse"
    good = np.ones(values.shape, dtype=bool)
    good[1, 0] = False
    assert compared(values, good=good).summary().loc["model 1", "verdict"] == "worse"
    assert "model 1: no draw of its latents gives 1 of 200 data a density" in repr(compared(values))
    assert "model 0: no draw" not in repr(compared(values))
    values[0, 0] = -math.inf
    assert compared(values).summary()["verdict"].iloc[1] == "unclear"


def test_one_datum_says_nothing_of_new_ones():
    found = compared([[-1.0], [-3.0]])
    assert math.isnan(found.summary()["difference_se_new"].iloc[1])
    assert found.summary()["verdict"].tolist() == ["best", "unclear"]
    assert compared([[-300.0], [-3.0]]).preferred == "model 1"  # not the first in the order
    assert "one datum says nothing of new data" in repr(found)


def test_the_table_says_where_numbers_are_from():
    text = repr(compared(drawn(0.1), given="w at the values passed"))
    for part in (
        "200 data; nats per datum; differences from 'model 0'",
        "model 1: log p(x) by importance (200); given w at the values passed",
    ):
        assert part in text
    assert "few" not in text
    assert "10 data are few" in repr(compared(drawn(0.1, num_data=10)))
