"""What a repair and a sandwich say follows from their numbers."""

from __future__ import annotations

import numpy as np
import pytest

from pyro_vae.evaluation.rungs import EVERY_RUNG
from pyro_vae.report.mending import _RUNGS, of_repair, of_sandwich
from tests.report.cases import repair_dataset, sandwich_dataset


def of(about, dataset):
    return [each for each in of_repair(dataset) if each.about == about]


def test_verdicts():
    (one,) = of("verdicts", repair_dataset(bad=0))
    assert one.severity == "good" and "Every one of 9" in one.text
    (one,) = of("verdicts", repair_dataset(bad=2))
    assert one.severity == "warning" and one.text.endswith("data 7, 8")
    assert one.evidence["good"] == pytest.approx(7 / 9)
    assert "'annealed' and 'chains'" in one.advice
    assert of("verdicts", repair_dataset(bad=5))[0].severity == "bad"


def test_rungs_say_what_was_wrong():
    found = of("rungs", repair_dataset(ended=(4, 3, 3), bad=1))
    assert [each.evidence for each in found] == [
        {"good on 'importance'": 0.4}, {"good on 'refined'": pytest.approx(0.3)},
        {"good on 'full rank'": 0.2},
    ]  # fmt: skip
    assert "40% of the data the guide's answer" in found[0].text
    assert len(of("rungs", repair_dataset(ended=(4, 0, 3), bad=3))) == 1
    assert set(_RUNGS) == set(EVERY_RUNG)


def test_audits():
    (one,) = of("audit", repair_dataset(audited=8))
    assert one.severity == "good" and "25% of all verdicts" in one.text  # 0.75^8 = 0.1
    (one,) = of("audit", repair_dataset(audited=8, wrong=2))
    assert one.severity == "warning" and "2 of 8" in one.text
    (one,) = of("audit", repair_dataset())
    assert one.severity == "note" and one.evidence == {"audited": 0}
    assert not of("audit", repair_dataset(bad=9))


def test_a_sandwich():
    found = of_sandwich(sandwich_dataset())
    assert [each.severity for each in found] == ["note", "good"]
    assert "0.050 ± 0.004" in found[1].text
    assert of_sandwich(sandwich_dataset(width=0.2))[0].severity == "note"
    one, *rest = of_sandwich(sandwich_dataset(untrusted=2))
    assert one.severity == "warning" and "For 2 of 5" in one.text and len(rest) == 2
    one, *rest = of_sandwich(sandwich_dataset(untrusted=5))
    assert one.severity == "bad" and len(rest) == 1
    simulated = sandwich_dataset().assign_attrs(simulated=np.int64(1))
    assert [each.about for each in of_sandwich(simulated)] == ["log p(x)"]
