"""Results of training: how they print."""

from __future__ import annotations

import math

from pyro_vae.training.result import FitResult


def test_fit_result():
    history = {"epoch": [1, 2], "elbo": [-3.0, -2.0]}
    result = FitResult(history, "epochs", 20, 1.26, 2)
    assert repr(result) == (
        "FitResult(stopped_by='epochs', epochs=2, steps=20, elapsed=1.3s, elbo=-2.0000)"
    )
    empty = FitResult({"epoch": [], "elbo": []}, "interrupted", 3, math.pi, 0)
    assert repr(empty) == ("FitResult(stopped_by='interrupted', epochs=0, steps=3, elapsed=3.1s)")
