"""Callbacks: when they are called, what they are told, and what a resumed run makes of them."""

from __future__ import annotations

import csv
import math
import sys
import types

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, OneCycleLR, ReduceLROnPlateau

import pyro_vae as pv
from pyro_vae.training.callbacks import CSV, Callback, Callbacks, EachStep, Step, TensorBoard
from tests.runs import some
from tests.training.fits import make_data, make_guide, parameters_of, run, same


class Recording(Callback):
    """Writes down what it is told; ends training at a step, where one is given."""

    def __init__(self, end=None):
        self.steps, self.epochs, self.results, self.end = [], [], [], end

    def on_step(self, step):
        self.steps.append(step)
        return step.step == self.end

    def on_epoch(self, epoch):
        self.epochs.append(epoch)

    def on_end(self, result):
        self.results.append(result)


@pytest.mark.parametrize("compile", [False, "replay"])
def test_what_is_called_when(compile):
    """40 data in minibatches of 16: three steps an epoch, whose mean is the epoch's ELBO."""
    told, alone = Recording(), []
    result, guide = run(
        make_data(), epochs=2, callbacks=[told, alone.append], compile=compile, patience=None
    )
    assert [step.step for step in told.steps] == [1, 2, 3, 4, 5, 6]
    assert [step.epoch for step in told.steps] == [1, 1, 1, 2, 2, 2]
    assert told.epochs == alone and [epoch.epoch for epoch in alone] == [1, 2]
    assert told.results == [result]
    for number, epoch in enumerate(told.epochs):
        elbos = [step.elbo for step in told.steps[3 * number :][:3]]
        mean = (16 * elbos[0] + 16 * elbos[1] + 8 * elbos[2]) / 40
        assert epoch.elbo == pytest.approx(mean, rel=1e-12)
    unwatched, other = run(make_data(), epochs=2, compile=compile)
    assert unwatched.history["elbo"] == result.history["elbo"]
    assert same(parameters_of(guide), parameters_of(other))


def test_one_that_returns_true_after_a_step_ends_training_there():
    told = Recording(end=4)
    result, _ = run(make_data(), epochs=9, callbacks=[told])
    assert result.stopped_by == "callback"
    assert result.steps == len(told.steps) == 4
    assert result.history["step"] == [3, 4]
    assert told.results == [result]


def test_any_object_with_one_of_the_methods_will_do():
    class Mine:
        def on_end(self, result):
            self.result = result

    mine = Mine()
    result, _ = run(make_data(), callbacks=[mine])
    assert mine.result is result


def test_nothing_is_read_for_callbacks_that_do_not_look():
    assert not Callbacks([lambda epoch: None, Callback.__new__(OnlyEnd)]).of_steps
    watcher = Callbacks([Recording()])
    assert watcher.of_steps and watcher.reads_loss
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    stepper = Callbacks([EachStep(ExponentialLR(optimizer, 0.9))])
    assert stepper.of_steps and not stepper.reads_loss


class OnlyEnd(Callback):
    def on_end(self, result):
        pass


@pytest.mark.parametrize(
    ("callback", "told"),
    [
        (3, "callbacks: 3 has nothing to call"),
        (Recording, "Recording is a class; an object is needed"),
        (Callback(), "has nothing to call"),
    ],
)
def test_what_can_be_called_at_no_time_is_refused(callback, told):
    with pytest.raises(TypeError, match=told):
        run(make_data(), callbacks=[callback])


@pytest.mark.parametrize("hook", ["on_step", "on_epoch", "on_end"])
def test_an_exception_keeps_parameters_and_the_last_checkpoint(hook, tmp_path):
    class Failing(Callback):
        pass

    def fail(self, told):
        if hook == "on_end" or told.step == 6:
            raise OSError("no space left")

    setattr(Failing, hook, fail)
    x, path = make_data(), tmp_path / "run.pt"
    guide, whole = make_guide(x), make_guide(x)
    with pytest.raises(OSError, match="no space left") as raised:
        run(x, guide, epochs=2, checkpoint=path, callbacks=[Failing()])
    assert "in the callback" in raised.value.__notes__[-1]
    run(x, whole, epochs=2)
    assert same(parameters_of(guide), parameters_of(whole)), "those of step 6"
    assert all(parameter.grad is None for parameter in guide.parameters())
    resumed, _ = run(x, guide, epochs=2, checkpoint=path)
    assert resumed.history["step"] == [3, 6]
    assert same(parameters_of(guide), parameters_of(whole))


class Counting(Callback):
    def __init__(self):
        self.count, self.mean = 0, torch.zeros(())

    def on_step(self, step):
        self.count += 1
        self.mean = self.mean + (step.elbo - self.mean) / self.count

    def state_dict(self):
        return {"count": self.count, "mean": self.mean}

    def load_state_dict(self, state):
        self.count, self.mean = state["count"], state["mean"]


def test_the_state_of_callbacks_is_in_a_checkpoint(tmp_path, caplog):
    path, whole, first, second = tmp_path / "run.pt", Counting(), Counting(), Counting()
    run(make_data(), epochs=5, callbacks=[whole])
    run(make_data(), epochs=2, callbacks=[first], checkpoint=path)
    run(make_data(), epochs=5, callbacks=[lambda epoch: None, second], checkpoint=path)
    assert second.count == whole.count == 15
    assert torch.equal(second.mean, whole.mean)
    run(make_data(), epochs=6, checkpoint=path)
    assert "the state of callbacks that are not here: Counting" in caplog.text


# --- learning rates by step --------------------------------------------------------------

SCHEDULERS = {
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=40),
    "CosineAnnealingLR": lambda optimizer: CosineAnnealingLR(optimizer, 12),
    "ExponentialLR": lambda optimizer: ExponentialLR(optimizer, 0.9),
}


def rates_of(make, epochs, guide=None, compile="replay", **options):
    """The rate of each step."""
    x, rates = make_data(), []
    guide = make_guide(x) if guide is None else guide
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.05, fused=True)
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    callbacks = [EachStep(make(optimizer))]
    run(x, guide, optim=optimizer, callbacks=callbacks, epochs=epochs, compile=compile, **options)
    return rates, guide


@pytest.mark.parametrize("make", some(SCHEDULERS, ["OneCycleLR"]))
def test_a_scheduler_steps_after_each_step(make, tmp_path):
    """As in a plain loop of torch; and in parts, by a checkpoint."""
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=0.05)
    scheduler, wanted = make(optimizer), []
    for _ in range(12):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    found, guide = rates_of(make, 4)
    assert found == wanted and len(set(wanted)) > 6
    eager = rates_of(make, 4, compile=False)[1]
    torch.testing.assert_close(parameters_of(guide), parameters_of(eager), rtol=1e-12, atol=0)
    path = tmp_path / "run.pt"
    parts = rates_of(make, 1, checkpoint=path)[0]
    rest, resumed = rates_of(make, 4, checkpoint=path)
    assert parts + rest == wanted
    assert same(parameters_of(resumed), parameters_of(guide))


@pytest.mark.parametrize("optim", [None, torch.optim.Adam, "another"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_scheduler_of_another_optimizer_is_refused(optim, wrapped):
    """It would leave the learning rate of the run as it is, and say nothing."""
    x = make_data()
    guide = make_guide(x)
    scheduler = ExponentialLR(torch.optim.Adam(guide.parameters()), 0.5)
    optim = torch.optim.Adam(guide.parameters()) if optim == "another" else optim
    callback = EachStep(scheduler) if wrapped else scheduler
    with pytest.raises(ValueError, match="ExponentialLR moves the learning rate of another opt"):
        run(x, guide, optim=optim, callbacks=[callback])


def test_what_cannot_step_is_refused():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(TypeError, match="ReduceLROnPlateau goes by the ELBO of an epoch"):
        EachStep(ReduceLROnPlateau(optimizer))
    with pytest.raises(TypeError, match=r"EachStep\(Adam\): a scheduler of torch"):
        EachStep(optimizer)


# --- files ---------------------------------------------------------------------------------


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def stop_at(number):
    return lambda epoch: epoch.epoch == number


@pytest.mark.parametrize("each", ["epoch", "step"])
def test_a_csv_has_each_row_once(each, tmp_path):
    log, path = tmp_path / "log.csv", tmp_path / "run.pt"
    told = Recording()
    options = {"validation_data": make_data(5)}
    run(make_data(), epochs=5, callbacks=[CSV(log, each), told], **options)
    rows = rows_of(log)
    wanted = told.epochs if each == "epoch" else told.steps
    assert [int(row["step"]) for row in rows] == [one.step for one in wanted]
    assert [float(row["elbo"]) for row in rows] == [one.elbo for one in wanted]
    assert ("validation_elbo" in rows[0]) is (each == "epoch")
    # Anew; cut off after the row of epoch 3, before the checkpoint that would know it.
    run(make_data(), epochs=2, callbacks=[CSV(log, each)], checkpoint=path, **options)

    class Dies(Callback):
        def on_epoch(self, epoch):
            raise OSError("killed")

    with pytest.raises(OSError, match="killed"):
        run(make_data(), epochs=5, callbacks=[CSV(log, each), Dies()], checkpoint=path, **options)
    assert len(rows_of(log)) == 3 * (3 if each == "step" else 1)
    run(make_data(), epochs=5, callbacks=[CSV(log, each)], checkpoint=path, **options)
    again = rows_of(log)
    assert [row["elbo"] for row in again] == [row["elbo"] for row in rows]


def test_a_csv_that_is_gone_begins_anew(tmp_path):
    log, path = tmp_path / "log.csv", tmp_path / "run.pt"
    run(make_data(), epochs=2, callbacks=[CSV(log)], checkpoint=path)
    log.unlink()
    run(make_data(), epochs=4, callbacks=[CSV(log)], checkpoint=path)
    assert [row["epoch"] for row in rows_of(log)] == ["3", "4"]


def test_places_and_words_that_are_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        CSV(tmp_path / "no" / "log.csv")
    with pytest.raises(ValueError, match=r"is a folder; name a file in it"):
        CSV(tmp_path)
    with pytest.raises(ValueError, match="each='minute'"):
        CSV(tmp_path / "log.csv", each="minute")


def test_curves_for_tensorboard(monkeypatch, tmp_path):
    """By a stand-in of SummaryWriter; a resumed run hides what came after the checkpoint."""
    writers = []

    class Writer:
        def __init__(self, folder, purge_step=None):
            self.added, self.purge_step, self.closed = [], purge_step, False
            writers.append(self)

        def add_scalar(self, tag, value, step):
            self.added.append((tag, value, step))

        def flush(self):
            pass

        def close(self):
            self.closed = True

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    path, told = tmp_path / "run.pt", Recording()
    run(make_data(), epochs=1, callbacks=[TensorBoard(tmp_path, "step"), told], checkpoint=path)
    elbos = [("elbo/step", step.elbo, step.step) for step in told.steps]
    assert writers[0].added == [*elbos, ("elbo/training", told.epochs[0].elbo, 3)]
    run(make_data(), epochs=2, callbacks=[TensorBoard(tmp_path)], checkpoint=path)
    assert [writer.purge_step for writer in writers] == [None, 4]
    assert [entry[2] for entry in writers[1].added] == [6]
    assert all(writer.closed for writer in writers)


def test_without_tensorboard(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-vae\[tensorboard\]'"):
        TensorBoard(tmp_path)


def test_an_elbo_that_is_not_read_is_not_a_number():
    assert math.isnan(Step(1, 1, math.nan).elbo)
    assert pv.callbacks.Callback is Callback
