"""A run that is cut at any step, and goes on from its checkpoint, is the run that was not cut."""

from __future__ import annotations

import datetime
import logging
import math
import os
import signal

import pytest
import torch

import pyro_vae as pv
from pyro_vae.training import checkpoints
from tests.training.fits import equal_histories
from tests.training.runs import KINDS, VALIDATION, Kind, trained

EPOCHS = 3  # of 3 steps each


class Killed(BaseException):
    """Raised in the middle of a run, as nothing but the disk survives."""


class KilledAfter(pv.callbacks.Callback):
    def __init__(self, step):
        self.last = step

    def on_step(self, step):
        if step.step == self.last:
            raise Killed


def callbacks_with(kind, extra):
    """Return the kind with one more callback, the last one."""

    def more(model, guide):
        found = kind.more(model, guide)
        return {**found, "callbacks": [*found.get("callbacks", []), extra]}

    return Kind(kind.pair, kind.data, kind.options, more)


def assert_same(one, other):
    equal_histories(one[0].history, other[0].history)
    assert one[0].steps == other[0].steps
    assert one[0].best_epoch == other[0].best_epoch
    assert one[0].stopped_by == other[0].stopped_by
    assert one[1].keys() == other[1].keys()
    for name in one[1]:
        assert torch.equal(one[1][name], other[1][name]), name


_REPLAYED_FAST = {"validation, warm-up", "local"}


@pytest.mark.parametrize(
    ("name", "compile"),
    [
        pytest.param(
            name,
            compile,
            marks=[pytest.mark.slow] if compile and name not in _REPLAYED_FAST else [],
        )
        for name in KINDS
        for compile in (False, "replay")
    ],
)
def test_a_run_that_max_steps_cuts_goes_on_where_it_was(name, compile, tmp_path):
    """In the first epoch, at its end, inside the second one."""
    kind, options = KINDS[name], {"compile": compile}
    per_epoch = 2 if kind.options.get("drop_last") else 3
    per_epoch = 1 if "data_plate" in kind.options else per_epoch
    whole = trained(kind, epochs=EPOCHS, **options)
    path = tmp_path / "run.ckpt"
    for cut in (1, 3, 5):
        part = trained(kind, max_steps=cut, epochs=EPOCHS, checkpoint=path, **options)
        assert part[0].steps == min(cut, EPOCHS * per_epoch)
        # Else the next one would begin anew, and come to the same numbers.
        assert checkpoints.load(path)["progress"]["step"] == part[0].steps
    assert_same(whole, trained(kind, epochs=EPOCHS, checkpoint=path, **options))
    # There is nothing left to do.
    assert_same(whole, trained(kind, epochs=EPOCHS, checkpoint=path, **options))


@pytest.mark.parametrize(("killed", "every"), [(2, 1), (3, 4), (7, 1), (7, 2), (7, 4)])
@pytest.mark.parametrize("name", ["validation, warm-up", "rows", "store"])
def test_no_more_than_an_interval_is_lost(name, killed, every, tmp_path):
    kind, path = KINDS[name], tmp_path / "run.ckpt"
    options = {"epochs": EPOCHS, "compile": False}
    whole = trained(kind, **options)
    options |= {"checkpoint": path, "checkpoint_every": every}
    with pytest.raises(Killed):
        trained(callbacks_with(kind, KilledAfter(killed)), **options)
    # The callback runs before the step's own checkpoint is written.
    saved = (killed - 1) // every * every
    if saved:
        assert checkpoints.load(path)["progress"]["step"] == saved
    else:
        assert not path.exists()
    assert_same(whole, trained(kind, **options))


def test_by_time(tmp_path):
    path, seen = tmp_path / "run.ckpt", []

    class Look(pv.callbacks.Callback):
        def on_step(self, step):
            seen.append(checkpoints.load(path)["progress"]["step"] if path.exists() else 0)

    kind = callbacks_with(KINDS["plain"], Look())
    trained(kind, epochs=2, checkpoint=path, checkpoint_every=datetime.timedelta(microseconds=1))
    assert seen == [0, 1, 2, 3, 4, 5]
    path.unlink()
    seen.clear()
    path.with_name("run.ckpt.prev1").unlink()
    trained(kind, epochs=2, checkpoint=path, checkpoint_every=datetime.timedelta(hours=1))
    assert seen == [0] * 6
    assert checkpoints.load(path)["progress"]["step"] == 6, "one is written at the end"


def test_fewer_files_than_epochs(tmp_path):
    """With an interval, an epoch's end is no reason to write."""
    path, seen = tmp_path / "run.ckpt", []

    def look(epoch):
        seen.append(checkpoints.load(path)["progress"]["step"] if path.exists() else 0)

    kind = callbacks_with(KINDS["plain"], look)
    trained(kind, epochs=4, checkpoint=path, checkpoint_every=5)
    assert seen == [0, 5, 5, 10]
    assert checkpoints.load(path)["progress"]["step"] == 12


@pytest.mark.parametrize("every", [0, -1, "30s", 1.5, datetime.timedelta(0), True])
def test_another_interval_is_refused(every, tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint_every=.*steps, a whole number.*timedelta"):
        trained(KINDS["plain"], epochs=1, checkpoint=tmp_path / "a", checkpoint_every=every)


def test_an_interval_without_a_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="name the file, checkpoint=path"):
        trained(KINDS["plain"], epochs=1, checkpoint_every=3)
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        trained(KINDS["plain"], epochs=1, checkpoint=tmp_path)


def test_the_same_script_again_changes_nothing(tmp_path):
    """It has no step to take, and writes its checkpoint once more."""
    kind, path = KINDS["plain"], tmp_path / "run.ckpt"
    whole = trained(kind, epochs=EPOCHS)
    for cut in (1, 1, 5, 5):
        trained(kind, max_steps=cut, epochs=EPOCHS, checkpoint=path)
    assert_same(whole, trained(kind, epochs=EPOCHS, checkpoint=path))


# --- Ctrl-C -----------------------------------------------------------------------------


class CtrlC(pv.callbacks.Callback):
    """Ctrl-C while a step is on its way."""

    def __init__(self, step):
        self.last = step

    def on_step(self, step):
        if step.step == self.last:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("step", [1, 3, 5])
@pytest.mark.parametrize("name", ["validation, warm-up", "rows", "loader with a generator"])
def test_ctrl_c_loses_no_step(name, step, tmp_path):
    kind, path = KINDS[name], tmp_path / "run.ckpt"
    whole = trained(kind, epochs=EPOCHS)
    begun, _ = trained(callbacks_with(kind, CtrlC(step)), epochs=EPOCHS, checkpoint=path)
    assert begun.stopped_by == "interrupted"
    assert begun.steps == checkpoints.load(path)["progress"]["step"] == step
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_same(whole, trained(kind, epochs=EPOCHS, checkpoint=path))


def test_a_second_ctrl_c_in_a_callback_loses_no_step(tmp_path):
    class Twice(pv.callbacks.Callback):
        def on_step(self, step):
            for _ in range(2 if step.step == 4 else 0):
                os.kill(os.getpid(), signal.SIGINT)

    kind, path = KINDS["one cycle"], tmp_path / "run.ckpt"
    whole = trained(kind, epochs=EPOCHS)
    begun, _ = trained(callbacks_with(kind, Twice()), epochs=EPOCHS, checkpoint=path)
    assert begun.stopped_by == "interrupted"
    assert begun.steps == checkpoints.load(path)["progress"]["step"] == 4
    assert_same(whole, trained(kind, epochs=EPOCHS, checkpoint=path))


def test_ctrl_c_in_validation_loses_no_step(tmp_path, monkeypatch):
    kind, path = KINDS["validation, warm-up"], tmp_path / "run.ckpt"
    whole = trained(kind, epochs=EPOCHS)
    from pyro_vae.training.validation import Validation

    def interrupted(self):
        self._steps.set_factor(1.0)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "score", interrupted)
        begun, _ = trained(kind, epochs=EPOCHS, checkpoint=path)
    assert begun.steps == checkpoints.load(path)["progress"]["step"] == 3
    assert begun.history["epoch"] == []
    assert_same(whole, trained(kind, epochs=EPOCHS, checkpoint=path))


class Halving(pv.callbacks.Callback):
    """Halves the learning rate after each epoch."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def on_epoch(self, epoch):
        self.optimizer.param_groups[0]["lr"] *= 0.5


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_after_an_epoch_leaves_out_no_callback(times, tmp_path):
    """A scheduler that was not called would be called once less in the run that goes on."""

    def with_rates(times):
        def interrupt(epoch):
            for _ in range(times if epoch.epoch == 2 else 0):
                os.kill(os.getpid(), signal.SIGINT)

        def more(model, guide):
            optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=0.02)
            return {"optim": optimizer, "callbacks": [interrupt, Halving(optimizer)]}

        return Kind(more=more)

    path, whole = tmp_path / "run.ckpt", trained(with_rates(0), epochs=EPOCHS)
    begun, _ = trained(with_rates(times), epochs=EPOCHS, checkpoint=path)
    assert begun.stopped_by == "interrupted"
    assert begun.history["epoch"] == [1, 2]
    assert_same(whole, trained(with_rates(0), epochs=EPOCHS, checkpoint=path))


def test_ctrl_c_while_an_epoch_is_closed(tmp_path, monkeypatch):
    from pyro_vae.training.steps import TrainingSteps

    def halving(model, guide):
        optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=0.02)
        return {"optim": optimizer, "callbacks": [Halving(optimizer)]}

    kind, path = Kind(more=halving), tmp_path / "run.ckpt"
    whole = trained(kind, epochs=EPOCHS)
    remember = TrainingSteps.remember

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        remember(self)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingSteps, "remember", interrupted)
        begun, _ = trained(kind, epochs=EPOCHS, checkpoint=path)
    assert begun.history["epoch"] == [1]
    assert_same(whole, trained(kind, epochs=EPOCHS, checkpoint=path))


# --- after a stop ------------------------------------------------------------------------


def test_a_run_that_patience_stopped_goes_on_where_patience_is_raised(tmp_path, caplog):
    def swinging(parameters):
        return torch.optim.Adam(parameters, lr=0.2)  # it swings about the optimum

    kind, path = (
        Kind(options={"validation_data": VALIDATION, "optim": lambda: swinging}),
        tmp_path / "a",
    )
    stopped = trained(kind, epochs=60, patience=1, checkpoint=path)
    assert stopped[0].stopped_by == "patience"
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="pyro_vae"):
        again = trained(kind, epochs=90, patience=1, checkpoint=path)
    assert "that patience=1 has stopped after epoch" in caplog.text
    assert "To train on, raise patience" in caplog.text
    assert_same(stopped, again)
    longer = trained(kind, epochs=60, patience=3)
    assert longer[0].steps > stopped[0].steps
    assert_same(longer, trained(kind, epochs=60, patience=3, checkpoint=path))


def test_an_optimizer_of_other_settings_and_of_other_groups(tmp_path, caplog):
    def slow(parameters):
        return torch.optim.Adam(parameters, lr=0.001)

    def grouped(parameters):
        return torch.optim.Adam([{"params": [p]} for p in parameters])

    kind, path = KINDS["plain"], tmp_path / "run.ckpt"
    whole = trained(kind, epochs=EPOCHS)
    trained(kind, epochs=1, checkpoint=path)
    with pytest.raises(ValueError, match=r"groups of so many parameters: \[8\], not \[1, 1, "):
        trained(kind, epochs=EPOCHS, checkpoint=path, optim=grouped)
    assert "goes on with" not in caplog.text
    assert_same(whole, trained(kind, epochs=EPOCHS, checkpoint=path, optim=slow))
    assert "goes on with the settings of the checkpoint: lr: 0.02 there, 0.001 here" in caplog.text


def test_a_callback_that_ended_training_inside_an_epoch(tmp_path):
    class Stop(pv.callbacks.Callback):
        def on_step(self, step):
            return step.step == 5

    kind, path = KINDS["validation, warm-up"], tmp_path / "run.ckpt"
    whole = trained(kind, epochs=EPOCHS)
    begun, _ = trained(callbacks_with(kind, Stop()), epochs=EPOCHS, checkpoint=path)
    assert begun.stopped_by == "callback"
    assert begun.history["step"] == [3, 5]
    assert checkpoints.load(path)["progress"]["step"] == 5
    assert_same(whole, trained(kind, epochs=EPOCHS, checkpoint=path))


def test_a_step_that_is_not_finite_leaves_the_last_good_checkpoint(tmp_path):
    """An update makes parameters infinite: no checkpoint holds them."""

    class Overflow(pv.callbacks.Callback):
        def __init__(self, model):
            self.model = model

        def on_step(self, step):
            if step.step == 4:
                with torch.no_grad():
                    self.model.net.weight.fill_(math.inf)

    kind, path = KINDS["plain"], tmp_path / "run.ckpt"
    broken = Kind(more=lambda model, guide: {"callbacks": [Overflow(model)]})
    with pytest.raises(pv.NonFiniteLossError, match="step 5"):
        trained(broken, epochs=EPOCHS, checkpoint=path, checkpoint_every=1)
    content = checkpoints.load(path)
    assert content["progress"]["step"] == 3
    whole = trained(kind, epochs=EPOCHS)
    assert_same(whole, trained(kind, epochs=EPOCHS, checkpoint=path))


# --- compiled steps ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of PyTorch's own compiler
@pytest.mark.parametrize("name", ["iwae"])
def test_compiled_steps_go_on_to_rounding(name, tmp_path):
    """A run that goes on is eager at first, and compiled code sums in another order."""
    kind, path, options = KINDS[name], tmp_path / "run.ckpt", {"epochs": 6, "compile": True}
    whole = trained(kind, **options)
    trained(kind, max_steps=8, checkpoint=path, **options)
    resumed = trained(kind, checkpoint=path, **options)
    for column, wanted in whole[0].history.items():
        assert resumed[0].history[column] == pytest.approx(wanted, rel=1e-7, nan_ok=True), column
    # Adam divides small gradients by their own size, rounding and all.
    torch.testing.assert_close(resumed[1], whole[1], rtol=1e-6, atol=1e-8)
