"""What tests of calibration say follows from their numbers."""

from __future__ import annotations

import pytest

from pyro_vae.evaluation.calibration import Calibration
from pyro_vae.evaluation.coverage import Coverage
from tests.report.cases import calibration_dataset, coverage_dataset


def ranks(**options):
    return Calibration(calibration_dataset(**options)).findings()


def test_a_calibrated_guide():
    (one,) = ranks()
    assert one.severity == "good" and "all 4 quantities" in one.text
    assert one.evidence == {"smallest adjusted_p_value": 1.0, "error_rate": 0.01}


def test_latents_that_are_off():
    (one,) = ranks(spread=1.5)
    assert one.severity == "bad"
    assert one.text == (
        "By z[0], z[1] (2 of 4 quantities) draws are too narrow (of the first, simulated latents "
        "are spread 1.500 ± 0.030 times as wide as draws)"
    )
    assert "richer family" in one.advice and one.evidence["smallest adjusted_p_value"] == 4e-9
    (one,) = ranks(spread=0.7)
    assert "too wide" in one.text and "richer" not in one.advice
    (one,) = ranks(shift=0.5)
    assert "too low" in one.text and "0.500 ± 0.020 standard deviations" in one.text
    assert "spread" not in one.text


def test_log_densities_beside_latents_are_no_advice_of_their_own():
    first, *rest = ranks(spread=1.5, logs=(-0.9, -0.4))
    assert first.advice and len(rest) == 2 and not any(each.advice for each in rest)
    assert "draws fit the data better" in rest[1].text


def test_a_guide_that_returns_the_prior_is_said():
    first, second = ranks(logs=(0.5, 0.9))
    assert first.text.endswith("as one does that returns the prior")
    assert first.evidence["adjusted_p_value of log p(x | z)"] == pytest.approx(4e-6)
    assert "less probable" in second.text and not second.advice
    (one,) = ranks(logs=(0.5, 0.0))
    assert "prior" not in one.text and one.advice


def test_doubt_of_resampled_draws():
    first, second = ranks(doubt="for 3 of 50 data weights are bad")
    assert (first.severity, first.text) == ("warning", "For 3 of 50 data weights are bad")
    assert second.severity == "good"


def test_coverage():
    found = Coverage(coverage_dataset()).findings()
    assert [each.severity for each in found] == ["good", "good"]
    assert "level 0.8 hold 0.800 ± 0.010" in found[0].text
    first, second = Coverage(coverage_dataset(off=-0.2)).findings()
    assert (first.severity, second.severity) == ("bad", "good")
    assert "less often than they say: the guide is too narrow" in first.text
    assert "hold 0.600 ± 0.010" in first.text
    assert "more often" in Coverage(coverage_dataset(off=0.04)).findings()[0].text
