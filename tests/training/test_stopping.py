"""When training stops: patience on a smoothed validation ELBO."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pyro_vae.training.stopping import Plateau
from tests.training.fits import equal_histories, make_data, run

VALUES = [-5.0, -3.0, -3.5, -2.9, -2.95, -2.85, -3.0, -2.8, -2.9]


def stalled_by_hand(values, min_delta, smoothing):
    """After each value, by the weights written out."""
    found, reached, at = [], -math.inf, 0
    for t in range(len(values)):
        weights = smoothing ** np.arange(t, -1.0, -1.0)
        mean = np.average(values[: t + 1], weights=weights)
        if mean > reached + min_delta:
            reached, at = mean, t
        found.append(t - at)
    return found


@pytest.mark.parametrize(
    ("min_delta", "smoothing"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.5), (0.2, 0.8)]
)
def test_stalled_epochs(min_delta, smoothing):
    plateau, found = Plateau(min_delta, smoothing), []
    for value in VALUES:
        plateau.add(value)
        found.append(plateau.stalled)
    assert found == stalled_by_hand(VALUES, min_delta, smoothing)
    assert max(found) > 0


def test_a_slow_rise_counts_once_it_is_enough():
    """By 0.04 an epoch, of which every third is 0.1 above the last that counted."""
    plateau, found = Plateau(min_delta=0.1), []
    for epoch in range(7):
        plateau.add(-1 + 0.04 * epoch)
        found.append(plateau.stalled)
    assert found == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"min_delta": -0.1}, "min_delta=-0.1: nats per datum"),
        ({"min_delta": math.nan}, "min_delta=nan"),
        ({"min_delta": "x"}, "min_delta='x': a number is needed"),
        ({"smoothing": None}, "smoothing=None: a number is needed"),
        ({"smoothing": 1.0}, r"smoothing=1.0: the weight of earlier epochs"),
        ({"smoothing": -0.5}, r"smoothing=-0.5"),
    ],
)
def test_numbers_out_of_range(options, told):
    with pytest.raises(ValueError, match=told):
        Plateau(**options)
    with pytest.raises(ValueError, match=told):
        run(make_data(), patience=2, validation_data=make_data(5), **options)


def test_without_patience_they_are_refused():
    for options in ({"min_delta": 0.1}, {"smoothing": 0.5}):
        with pytest.raises(ValueError, match="are for patience: give it"):
            run(make_data(), validation_data=make_data(5), **options)


def told_by(values, **options):
    """Train at a rate of 0, with the validation ELBO of each epoch put in the place of its own."""
    from pyro_vae.training.validation import Validation

    scores = iter(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validation, "score", lambda self: (next(scores), 0.1))
        return run(make_data(), epochs=len(values), validation_data=make_data(5), **options)[0]


@pytest.mark.parametrize(("min_delta", "smoothing"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.9)])
def test_fit_stops_by_it_and_keeps_the_best_epoch_itself(min_delta, smoothing):
    patience = 2
    stalled = stalled_by_hand(VALUES, min_delta, smoothing)
    end = next((n + 1 for n, count in enumerate(stalled) if count >= patience), None)
    result = told_by(VALUES, patience=patience, min_delta=min_delta, smoothing=smoothing)
    assert result.stopped_by == ("epochs" if end is None else "patience")
    seen = VALUES[:end]
    assert result.history["validation_elbo"] == seen
    assert result.best_epoch == 1 + int(np.argmax(seen))


def test_a_resumed_run_counts_as_a_whole_one(tmp_path):
    path, options = tmp_path / "run.pt", {"patience": 3, "min_delta": 0.3, "smoothing": 0.3}
    whole = told_by(VALUES, **options)
    assert whole.stopped_by == "patience" and len(whole.history["epoch"]) > 4
    told_by(VALUES[:4], checkpoint=path, **options)
    # The rest of the scores, after the epochs that the checkpoint holds.
    from pyro_vae.training.validation import Validation

    scores = iter(VALUES[4:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validation, "score", lambda self: (next(scores), 0.1))
        resumed, _ = run(
            make_data(),
            epochs=len(VALUES),
            validation_data=make_data(5),
            checkpoint=path,
            **options,
        )
    assert resumed.stopped_by == "patience"
    equal_histories(whole.history, resumed.history)
