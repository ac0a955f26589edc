"""The training loop: batches, validation, checkpoint, resume, progress; it knows no loss."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from tqdm.auto import tqdm

from pyro_vae.programs.state import random_state, set_random_state
from pyro_vae.schedules import shortfall
from pyro_vae.training import checkpoints
from pyro_vae.training.callbacks import Callbacks, Step
from pyro_vae.training.fit_result import Epoch, FitResult, FitStop
from pyro_vae.training.minibatches import MinibatchELBO, mean_elbo
from pyro_vae.training.parameters import State
from pyro_vae.training.steps import TrainingSteps, Validation
from pyro_vae.training.stopping import Plateau

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
    checkpoint: str | os.PathLike[str] | None
    state: Progress = field(default_factory=Progress)
    best: State | None = None  # at the end of the epoch that validated best
    unsaved: bool = False
    ended: bool = False  # by a callback

    def run(self, progress: bool) -> FitResult:
        """Train until a limit is reached, and leave the best parameters in place."""
        if self.checkpoint is not None and os.path.exists(self.checkpoint):
            self._resume(self.checkpoint)
        state, total, schedule = self.state, self.steps.expected, self.steps.schedule
        if total and total > state.step and (text := shortfall(schedule, total)):
            logger.warning("training will end by %s", text)
        with tqdm(total=total, initial=state.step, disable=not progress, unit="step") as bar:
            try:
                stopped_by = self._loop(bar)
            except KeyboardInterrupt:
                stopped_by = "interrupted"
                self.steps.read()
                state.step = self.steps.taken
                if self.unsaved:  # in a callback: the epoch is whole
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

    def _loop(self, bar: tqdm[NoReturn]) -> FitStop:
        state = self.state
        while not self.ended:
            stalled = self.plateau.stalled
            counts = {"max_steps": state.step, "epochs": state.epoch, "patience": stalled}
            if reached := [name for name, limit in self.limits.items() if counts[name] >= limit]:
                return reached[0]
            epoch = self._epoch(bar)
            self.unsaved = self.checkpoint is not None
            self.ended |= self.callbacks.epoch(epoch)
            if self.callbacks.given:
                self.steps.last = self.steps.parameters.state()  # which they may have changed
            # After them: the checkpoint holds what they set, such as a learning rate.
            self._save()
        return "callback"

    def _epoch(self, bar: tqdm[NoReturn]) -> Epoch:
        state, begin = self.state, time.perf_counter() - self.state.elapsed
        max_steps = self.limits.get("max_steps", math.inf)
        elbos: list[MinibatchELBO] = []

        def read() -> None:
            elbos.extend(self.steps.read())
            bar.update(self.steps.taken - state.step)
            state.step, state.skipped = self.steps.taken, self.steps.skipped
            # At each step, because the time of an epoch that is broken off counts too.
            state.elapsed = time.perf_counter() - begin
            self._show(bar, mean_elbo(elbos[-_SHOWN:])[0], refresh=False)

        for index, batch in self.steps.data.epoch():
            self.steps.take(index, batch)
            if known := self.steps.due or self.callbacks.reads_loss:
                read()
            if self.callbacks.of_steps:
                elbo = elbos[-1].value if known else math.nan
                self.ended |= self.callbacks.step(Step(self.steps.taken, state.epoch + 1, elbo))
            if self.ended or self.steps.taken >= max_steps:
                break
        read()
        beta = self.steps.factor  # before validation, which has none
        elbo, elbo_error = mean_elbo(elbos)
        validation = error = math.nan
        if self.validation is not None:
            validation, error = self.validation.score()
        self.steps.remember()
        state.epoch += 1
        state.elapsed = time.perf_counter() - begin
        row = (state.epoch, state.step, elbo, elbo_error, validation, error, beta)
        for name, value in zip(_HISTORY, row, strict=True):
            state.history[name].append(value)
        if self.validation is None:
            state.best_epoch = state.epoch
        else:
            self.plateau.add(validation)
            if validation > state.best_elbo:
                state.best_elbo, state.best_epoch = validation, state.epoch
                self.best = self.steps.last
        self._show(bar, elbo, refresh=True)
        return Epoch(state.epoch, state.step, elbo, validation, state.elapsed)

    def _show(self, bar: tqdm[NoReturn], elbo: float, *, refresh: bool) -> None:
        shown = {"epoch": str(self.state.epoch), "ELBO": f"{elbo:.2f}"}
        if self.state.epoch and self.validation is not None:
            shown["validation"] = f"{self.state.history['validation_elbo'][-1]:.2f}"
        bar.set_postfix(shown, refresh=refresh)

    # --- checkpoints

    def _save(self) -> None:
        """Write the checkpoint, if one is wanted."""
        if self.checkpoint is None:
            return
        optimizer, loss = self.steps.optimizer, self.steps.objective
        schedulers = checkpoints.schedulers_of(self.callbacks.given, optimizer)
        content = {
            "schedulers": [scheduler.state_dict() for scheduler in schedulers],
            "last": self.steps.last,
            "best": self.best,
            "optimizer": optimizer.state_dict(),
            "optimizer_type": type(optimizer).__name__,
            "loss": {} if loss is None else loss.state_dict(),
            "callbacks": self.callbacks.state(),
            "progress": dict(vars(self.state)),
            "random_state": random_state(),
        }
        checkpoints.save(content, self.checkpoint)
        self.unsaved = False

    def _resume(self, checkpoint: str | os.PathLike[str]) -> None:
        """Go on from a checkpoint; raise ValueError for one of another pair or optimizer."""
        content, steps = checkpoints.load(checkpoint), self.steps
        steps.initialize()
        here, there = type(steps.optimizer).__name__, content["optimizer_type"]
        written = f"{os.fspath(checkpoint)} was written with"
        if here != there:
            raise ValueError(f"{written} the optimizer {there}, not {here}")
        progress = self.state = Progress(**content["progress"])
        steps.resume(content["last"], progress.step, progress.epoch)
        steps.skipped = progress.skipped
        schedulers = checkpoints.schedulers_of(self.callbacks.given, steps.optimizer)
        saved = content.get("schedulers", [])
        if len(saved) != len(schedulers):
            raise ValueError(
                f"{written} {len(saved)} learning rate schedulers among the callbacks, and here "
                f"are {len(schedulers)}: they go on from their state in it; pass the same callbacks"
            )
        steps.optimizer.load_state_dict(content["optimizer"])
        for scheduler, state in zip(schedulers, saved, strict=True):
            scheduler.load_state_dict(state)
        if steps.objective is not None:
            steps.objective.load_state_dict(content.get("loss", {}))
        self.best = content["best"]
        for name in _HISTORY:  # a column that an earlier version did not write is unknown
            progress.history.setdefault(name, [math.nan] * progress.epoch)
        for elbo in progress.history["validation_elbo"] if self.validation is not None else ():
            self.plateau.add(elbo)
        if missing := self.callbacks.load(content.get("callbacks", [])):
            text = "%s the state of callbacks that are not here: %s"
            logger.warning(text, written, ", ".join(missing))
        set_random_state(content["random_state"])
        logger.info("resumed from %s at epoch %d", checkpoint, progress.epoch)
