"""The training loop: batches, validation, checkpoint, resume, progress; it knows no loss."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn

from tqdm.auto import tqdm

from pyro_vae.programs.processes import note_interrupts
from pyro_vae.schedules import shortfall
from pyro_vae.training import run_state
from pyro_vae.training.callbacks import Callbacks, Step
from pyro_vae.training.checkpoints import Checkpoints
from pyro_vae.training.fit_result import Epoch, FitResult, FitStop
from pyro_vae.training.interrupts import HeldInterrupt
from pyro_vae.training.minibatches import mean_elbo
from pyro_vae.training.parameters import State
from pyro_vae.training.run_state import OpenEpoch
from pyro_vae.training.steps import TrainingSteps
from pyro_vae.training.stopping import Plateau
from pyro_vae.training.validation import Validation

logger = logging.getLogger(__name__)

_SHOWN = 50  # steps that the running ELBO of the bar is the mean of
_HISTORY = (
    *("epoch", "step", "elbo", "elbo_std_error"),
    *("validation_elbo", "validation_elbo_std_error", "beta"),
)


@dataclass
class Progress:
    """How far training has come, as a checkpoint holds it beside the parameters."""

    step: int = 0
    epoch: int = 0
    elapsed: float = 0.0
    best_elbo: float = -math.inf
    best_epoch: int = 0
    skipped: int = 0
    history: dict[str, list[float]] = field(default_factory=lambda: {n: [] for n in _HISTORY})


@dataclass
class Trainer:
    """The loop over epochs: steps, validation, callbacks, checkpoint."""

    steps: TrainingSteps
    validation: Validation | None
    limits: Mapping[FitStop, int]  # of steps, epochs, epochs without a gain: those that a user gave
    plateau: Plateau  # of the validation ELBO
    callbacks: Callbacks
    checkpoints: Checkpoints | None
    settings: run_state.Settings  # of the run, which a checkpoint must have too
    state: Progress = field(default_factory=Progress)
    best: State | None = None  # at the end of the epoch that validated best
    opened: OpenEpoch | None = None  # that is under way
    unsaved: bool = False  # whether what is in memory is whole, and on no disk
    ended: bool = False  # by a callback

    def run(self, progress: bool) -> FitResult:
        """Train until a limit is reached, and leave the best parameters in place."""
        self._resume()
        self.ended = self.callbacks.are_done()
        state, total, schedule = self.state, self.steps.expected, self.steps.schedule
        if total and total > state.step and (text := shortfall(schedule, total)):
            logger.warning("training will end by %s", text)
        several = self.steps.processes.size > 1
        noted = note_interrupts(self.steps.stop) if several else nullcontext()
        bars = tqdm(total=total, initial=state.step, disable=not progress, unit="step")
        with bars as bar, noted:
            try:
                stopped_by = self._loop(bar)
            except KeyboardInterrupt:
                stopped_by = "interrupted"
                self.steps.read()
                state.step = self.steps.taken
                if self.unsaved:  # in a callback, say: the epoch is whole
                    self._save()
            finally:
                self.steps.drop_gradients()
        kept = f"step {state.step}"
        if self.best is not None:
            self.steps.parameters.restore(self.best)
            kept = f"epoch {state.best_epoch}, the best on the validation data"
        if stopped_by == "interrupted":
            text = "interrupted after step %d; model and guide keep the parameters of %s"
            logger.warning(text, state.step, kept)
        if short := shortfall(schedule, state.step):
            logger.warning("training ended (%s) at %s", stopped_by, short)
        if state.skipped:
            text = "%d of %d steps had a loss or a gradient that was not finite, and were skipped"
            logger.warning(text, state.skipped, state.step)
        counts = state.step, state.elapsed, state.best_epoch, state.skipped
        return FitResult(state.history, stopped_by, *counts)

    def _reached(self) -> FitStop | None:
        """Return the limit that is reached; None while training goes on."""
        state = self.state
        counts = {"max_steps": state.step, "epochs": state.epoch, "patience": self.plateau.stalled}
        reached = (name for name, limit in self.limits.items() if counts[name] >= limit)
        return next(reached, None)

    def _loop(self, bar: tqdm[NoReturn]) -> FitStop:
        reached: FitStop | None = None
        while self.opened is not None or not (self.ended or (reached := self._reached())):
            opened = self.opened = self.opened or self._open()
            is_whole = self._take_steps(opened, bar)
            if not is_whole and self.unsaved:
                self._save()  # before the epoch is closed: a longer run goes on inside it
            self._close_epoch(opened, bar, is_whole=is_whole)
            if self.steps.stopped:
                raise KeyboardInterrupt
            # After them: the checkpoint holds what they set, such as a learning rate.
            if self.unsaved and (self._is_due(whole=True) or self.ended or self._reached()):
                self._save()
        return self.callbacks.ended_by if reached is None else reached

    def _is_due(self, *, whole: bool) -> bool:
        return self.checkpoints is not None and self.checkpoints.due(self.steps.taken, whole=whole)

    def _open(self) -> OpenEpoch:
        if self.checkpoints is None:
            return OpenEpoch({})
        return OpenEpoch(run_state.random_states(self.steps.data.source))

    def _take_steps(self, opened: OpenEpoch, bar: tqdm[NoReturn]) -> bool:
        """Take the steps that are left of an epoch; return whether it is whole then."""
        state, data, begin = self.state, self.steps.data, time.perf_counter() - self.state.elapsed
        max_steps, elbos = self.limits.get("max_steps", math.inf), opened.elbos
        start, now = self.steps.taken, None
        if opened.batches:  # of a checkpoint: the order of the data is drawn once more
            now = run_state.random_states(data.source)
            run_state.set_random_states(opened.begin, data.source)
        self.unsaved = False
        found: object = ()

        def read() -> None:
            elbos.extend(self.steps.read())
            bar.update(self.steps.taken - state.step)
            state.step, state.skipped = self.steps.taken, self.steps.skipped
            # At each step, because the time of an epoch that is broken off counts too.
            state.elapsed = time.perf_counter() - begin
            self._show(bar, mean_elbo(elbos[-_SHOWN:])[0], refresh=False)

        def ready() -> None:
            nonlocal now
            if now is not None:
                run_state.set_random_states(now, data.source)
            now = None

        with HeldInterrupt() as interrupt:
            batches = data.epoch(opened.batches, ready)
            while not self.ended and self.steps.taken < max_steps and not interrupt.pending:
                if (found := next(batches, None)) is None:
                    break
                self.steps.take(*found)
                opened.batches += 1
                interrupt.pending |= self.steps.stopped
                if known := self.steps.due or self.callbacks.reads_loss:
                    read()
                if self.callbacks.of_steps:
                    elbo = elbos[-1].value if known else math.nan
                    told, ended = Step(self.steps.taken, state.epoch + 1, elbo), False
                    try:
                        ended = self.callbacks.step(told)
                    except KeyboardInterrupt:  # the step is whole, and all of them were called
                        interrupt.pending = True
                    self.ended |= self.steps.processes.any(ended)
                if self._is_due(whole=False):
                    read()
                    opened.factor = self.steps.factor
                    self._save()
            ready()  # where there was no step to take
            if self.steps.taken > start:
                read()
                opened.factor = self.steps.factor
            self.unsaved = self.checkpoints is not None
        # A loader that does not know its length has none left only where it says so.
        return found is None or opened.batches == data.steps_per_epoch

    def _close_epoch(self, opened: OpenEpoch, bar: tqdm[NoReturn], *, is_whole: bool) -> None:
        """Score an epoch, add it to the history, and call what is called after it."""
        state, begin = self.state, time.perf_counter() - self.state.elapsed
        elbo, elbo_error = mean_elbo(opened.elbos)
        validation = error = math.nan
        if self.validation is not None:
            validation, error = self.validation.score()
        with HeldInterrupt():  # a scheduler that was not called would leave another run
            self.steps.remember()
            self.opened = None
            state.epoch += 1
            state.elapsed = time.perf_counter() - begin
            row = (state.epoch, state.step, elbo, elbo_error, validation, error, opened.factor)
            for name, value in zip(_HISTORY, row, strict=True):
                state.history[name].append(value)
            if self.validation is None:
                state.best_epoch = state.epoch
            else:
                self.plateau.add(validation)
                if validation > state.best_elbo:
                    state.best_elbo, state.best_epoch = validation, state.epoch
                    self.best = self.steps.last
            self.unsaved = is_whole and self.checkpoints is not None
            self._show(bar, elbo, refresh=True)
            told = Epoch(state.epoch, state.step, elbo, validation, state.elapsed)
            try:
                self.ended = self.steps.agree(self.callbacks.epoch(told) or self.ended)
            finally:
                if self.callbacks.given:
                    self.steps.last = self.steps.parameters.state()  # which they may have changed

    def _show(self, bar: tqdm[NoReturn], elbo: float, *, refresh: bool) -> None:
        shown = {"epoch": str(self.state.epoch), "ELBO": f"{elbo:.2f}"}
        if self.state.epoch and self.validation is not None:
            shown["validation"] = f"{self.state.history['validation_elbo'][-1]:.2f}"
        bar.set_postfix(shown, refresh=refresh)

    # --- checkpoints

    def _save(self) -> None:
        """Write a checkpoint of what is in memory, if one is wanted and the state is whole."""
        # What an update made infinite, the next step refuses: it is worse than what is on disk.
        if self.checkpoints is not None and self.steps.parameters.finite():
            progress = dict(vars(self.state))
            opened = self.opened if self.opened and self.opened.batches else None
            known = self.callbacks, self.settings, progress, self.best, opened
            self.checkpoints.write(run_state.gather(self.steps, *known), self.state.step)
        self.unsaved = False

    def _take_up(self, content: Mapping[str, Any]) -> None:
        """Go on from the content of a checkpoint; raise ValueError for one of another run."""
        steps = self.steps
        steps.initialize()
        before = steps.parameters.state()
        try:
            run_state.check(content, steps, self.callbacks, self.settings)
            other = run_state.other_settings(content, steps.optimizer)
            progress = Progress(**content["progress"])
            self.best, self.opened, missing = run_state.put_back(content, steps, self.callbacks)
        except Exception as error:
            steps.parameters.restore(before)
            if isinstance(error, (KeyError, TypeError, AttributeError, IndexError, RuntimeError)):
                raise ValueError(f"it holds something else than a run of fit: {error}") from error
            raise
        self.state = progress
        for name in _HISTORY:  # a column that an earlier version did not write is unknown
            progress.history.setdefault(name, [math.nan] * progress.epoch)
        for elbo in progress.history["validation_elbo"] if self.validation is not None else ():
            self.plateau.add(elbo)
        steps.agree(False)
        if other:
            text = "the optimizer goes on with the settings of the checkpoint: %s"
            logger.warning(text, ", ".join(other))
        if missing:
            text = "the checkpoint has the state of callbacks that are not here: %s"
            logger.warning(text, ", ".join(missing))

    def _resume(self) -> None:
        """Go on from the last good checkpoint, if there is one."""
        if self.checkpoints is None or (path := self.checkpoints.resume(self._take_up)) is None:
            return
        state = self.state
        logger.info("resumed from %s at step %d, epoch %d", path, state.step, state.epoch)
        if self._reached() == "patience":
            logger.warning(
                "%s is of a run that patience=%d has stopped after epoch %d: nothing is trained "
                "beyond it. To train on, raise patience; more epochs alone change nothing",
                *(path, self.limits["patience"], state.epoch),
            )
