"""Every reference model predicts, reconstructs and makes data of its own."""

from __future__ import annotations

import numpy as np
import pytest

import pyro_vae as pv
from tests.laws.registry import ENTRIES, N, pair

CASES = [(name, missing) for name in ENTRIES for missing in (False, True)]


@pytest.mark.parametrize(
    ("name", "missing"), [case for case in CASES if ENTRIES[case[0]].missing or not case[1]]
)
def test_predictions(name, missing):
    """Means of both are the same numbers; what masks leave out is NaN in all of them alike."""
    model, guide, batch = pair(name, missing=missing)
    options = {"num_draws": 40, "keep_draws": 3, "seed": 0}
    found, plain = (f(model, guide, batch, **options) for f in (pv.predict, pv.reconstruct))
    whole = {
        each[: -len(end)]
        for each in found
        for end in ("_mean", "_probability")
        if each.endswith(end)
    }
    observed = {row["site"] for row in pv.describe(model, batch).rows if row["kind"] == "observed"}
    assert whole == observed
    for site in observed:
        end = "_probability" if f"{site}_probability" in found else "_mean"
        value, error = found[f"{site}{end}"], found[f"{site}{end}_se"].values
        assert value.sizes["datum"] == N and value.dims[0] == "datum"
        np.testing.assert_array_equal(value, plain[f"{site}{end}"])
        gone = np.isnan(value.values)
        assert not gone[0].all() and (np.isnan(error) == gone).all() and (error[~gone] >= 0).all()
        assert found[site].shape[:2] == (3, N)
    made = pv.generate(model, 7, like=batch, sites=sorted(observed), seed=0)
    assert all(made[site].sizes["draw"] == 7 for site in observed)
