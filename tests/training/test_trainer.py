"""The training loop: how it stops, what it tells, what it keeps."""

from __future__ import annotations

import logging
import math

import torch
from pyro.infer import Trace_ELBO

from tests.training.fits import (
    HISTORY,
    Interrupting,
    make_data,
    make_guide,
    parameters_of,
    run,
    same,
)


def test_patience_stops_and_the_best_parameters_are_back():
    """A rate that grows out of hand: validation gets worse after some epochs."""
    x, validation = make_data(), make_data(20, seed=5)
    guide, seen = make_guide(x), []

    def optim(parameters):
        return torch.optim.SGD(parameters, lr=2e-3)

    def worsen(told):
        seen.append((told.validation_elbo, parameters_of(guide)))
        if told.epoch >= 4:
            with torch.no_grad():
                guide.head.bias.add_(0.5)

    result, _ = run(
        x, guide, epochs=50, validation_data=validation, patience=3, optim=optim, callbacks=[worsen]
    )
    scores = [score for score, _ in seen]
    best = max(range(len(scores)), key=scores.__getitem__)
    assert result.stopped_by == "patience"
    assert result.best_epoch == best + 1 == 4
    assert len(seen) == best + 1 + 3
    assert result.history["validation_elbo"] == scores
    assert same(parameters_of(guide), seen[best][1])
    assert not same(parameters_of(guide), seen[-1][1])


def test_max_steps_within_an_epoch():
    x = make_data()  # 3 steps an epoch
    result, _ = run(x, epochs=None, max_steps=4)
    assert result.stopped_by == "max_steps"
    assert result.steps == 4
    assert result.history["step"] == [3, 4]
    result, _ = run(x, epochs=2, max_steps=100)
    assert result.stopped_by == "epochs"
    assert result.history["step"] == [3, 6]


def test_history_and_callbacks():
    x, told = make_data(), []
    answers = iter([None, False, True])
    result, _ = run(
        x, epochs=9, callbacks=[lambda epoch: next(answers), lambda epoch: told.append(epoch)]
    )
    assert result.stopped_by == "callback"
    assert list(result.history) == HISTORY
    assert {len(column) for column in result.history.values()} == {3}
    assert result.history["epoch"] == [epoch.epoch for epoch in told] == [1, 2, 3]
    assert result.history["step"] == [epoch.step for epoch in told] == [3, 6, 9]
    assert result.history["elbo"] == [epoch.elbo for epoch in told]
    assert result.history["beta"] == [1.0, 1.0, 1.0]
    assert all(math.isnan(epoch.validation_elbo) for epoch in told)
    assert all(error > 0 for error in result.history["elbo_std_error"])
    elapsed = [epoch.elapsed for epoch in told]
    assert 0 < elapsed[0] < elapsed[1] < elapsed[2] == result.elapsed
    assert result.best_epoch == 3


def test_the_bar(capsys):
    run(make_data(), progress=True, validation_data=make_data(5))
    told = capsys.readouterr().err
    assert "6/6" in told
    assert "ELBO=-" in told
    assert "validation=-" in told
    run(make_data())
    assert capsys.readouterr().err == ""


def test_ctrl_c_in_a_step_keeps_what_was_learned(caplog):
    x = make_data()
    unbroken = make_guide(x)
    run(x, unbroken, epochs=None, max_steps=4, loss=Trace_ELBO())
    guide = make_guide(x)
    with caplog.at_level(logging.WARNING, logger="pyro_vae"):
        result, _ = run(x, guide, epochs=10, loss=Interrupting(5))
    assert result.stopped_by == "interrupted"
    assert result.steps == 4
    assert result.history["step"] == [3]
    assert "interrupted after step 4; model and guide keep the parameters of step 4" in caplog.text
    assert same(parameters_of(guide), parameters_of(unbroken))
    assert "interrupted" in repr(result)


def test_ctrl_c_in_the_first_epoch_and_with_validation(caplog):
    x = make_data()
    start = make_guide(x)
    result, guide = run(x, loss=Interrupting(1), validation_data=x)
    assert result.steps == 0
    assert {len(column) for column in result.history.values()} == {0}
    assert same(parameters_of(guide), parameters_of(start))
    caplog.clear()
    result, _ = run(x, loss=Interrupting(5), validation_data=x)
    assert "the parameters of epoch 1, the best on the validation data" in caplog.text
