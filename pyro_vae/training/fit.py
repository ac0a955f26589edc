"""The training loop: batches, validation, checkpoint, resume, progress; it knows no loss."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import pyro.infer
import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from pyro_vae.compiler.arguments import check_compile
from pyro_vae.guides.local import LocalGuide
from pyro_vae.losses.base import Objective
from pyro_vae.losses.elbo import ELBO
from pyro_vae.programs.batch import Batch, EpochData, StepData
from pyro_vae.programs.guide_kinds import RowGuide
from pyro_vae.programs.messages import as_count
from pyro_vae.programs.state import (
    Look,
    module_of,
    one_thread,
    random_state,
    seeded,
    set_random_state,
)
from pyro_vae.programs.types import Compile, DataPlate, Program
from pyro_vae.refinement.refine import promised_gain
from pyro_vae.schedules import shortfall
from pyro_vae.training import checkpoints
from pyro_vae.training.fit_result import Epoch, FitResult, FitStop
from pyro_vae.training.minibatches import MinibatchELBO, TrainingData, mean_elbo
from pyro_vae.training.parameters import State
from pyro_vae.training.steps import TrainingSteps, Validation

logger = logging.getLogger(__name__)

_SHOWN = 50  # steps that the running ELBO of the bar is the mean of
_HISTORY = (
    *("epoch", "step", "elbo", "elbo_std_error"),
    *("validation_elbo", "validation_elbo_std_error", "beta"),
)

# Called after each epoch; one that returns True ends training.
Callback: TypeAlias = Callable[[Epoch], bool | None] | LRScheduler


def fit(
    model: Program,
    guide: Program,
    data: Any,
    *,
    loss: pyro.infer.ELBO | None = None,
    optim: Any = None,
    schedule: Callable[[int], float] | None = None,
    batch_size: int = 128,
    epochs: int | None = None,
    max_steps: int | None = None,
    validation_data: Any = None,
    patience: int | None = None,
    seed: int | None = 0,
    device: torch.device | str | None = None,
    compile: Compile = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    callbacks: Iterable[Callback] = (),
    data_plate: DataPlate = None,
    drop_last: bool = False,
) -> FitResult:
    r"""Train a model/guide pair by stochastic variational inference.

    Every step takes a minibatch of B of the N data, shuffled anew at each epoch, and moves all
    parameters along the gradient of a loss such as

    .. math:: -\frac{N}{B} \sum_{n \in \text{minibatch}} \mathrm{ELBO}_n
        \quad\text{or, without latents that all data share,}\quad
        -\sum_{n \in \text{minibatch}} \mathrm{ELBO}_n

    (stochastic variational inference, Hoffman, Blei, Wang & Paisley 2013). Ctrl-C ends training
    and keeps the parameters of the last step. With validation data, the parameters with the best
    validation ELBO are kept. A LocalGuide uses the rows of each minibatch. Where another guide, or
    the model, has parameters for each row by its place (AutoNormal), every step takes all the
    data in their order, and a warning says so.

    Where all data share latents and the data plate has the size of the minibatch, the terms in the
    plate are scaled by N / B, as by ``pyro.plate(name, num_data, subsample=x)`` in the model,
    and a warning says so. Unscaled, there would seem to be fewer data.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        data: a tensor or an array, a tuple or a mapping of them, first dimension the datum; a
            torch Dataset, of which each step reads its rows; a DataLoader or an IterableDataset,
            whose batches are the minibatches; or an object that draws such data anew, for
            each step (:class:`pyro_vae.programs.batch.StepData`) or each epoch
            (:class:`pyro_vae.programs.batch.EpochData`).
        loss: a pyro.infer.ELBO, Pyro's or ours; pyro_vae.ELBO() by default.
        optim: a function from parameters to a torch optimizer (a class will do), a torch
            optimizer, or a pyro.optim object with plain arguments; Adam with a learning
            rate of 0.001 by default.
        schedule: the factor on the latent terms of model and guide at each step, counted
            from 0: one of pyro_vae.schedules (KL warm-up), or any function. Validation is
            never scaled. The history has the factor of each epoch's last step as beta; a
            logged warning names a warm-up that training cuts short.
        batch_size: data in a minibatch; the last of an epoch may be smaller. A DataLoader has
            its own.
        epochs: passes over the data at most; 100 where max_steps is not given either.
        max_steps: optimizer steps at most.
        validation_data: like data, without ``epoch``; scored after each epoch on the same
            random numbers.
        patience: epochs without a better validation ELBO after which to stop.
        seed: of everything random in here; the global random state stays as it was. None
            draws from the global random state.
        device: where modules and minibatches go; as they are by default.
        compile: how steps run, as in :class:`pyro_vae.CompiledSVI`: "auto" records the
            operations of a step as a graph and replays them, and compiles the graph where
            training is long enough for that to save time (few steps run eagerly); "replay"
            never compiles, True at once, False runs eagerly. Losses are the same to rounding.
        checkpoint: a file written after each epoch and its callbacks, whole or not at all, with
            the last and the best parameters. Where it exists, training resumes from it, with the
            optimizer's settings in it and the state of schedulers among the callbacks, or that
            they hold, and goes on as if it had not been interrupted. Other state of callbacks
            is not saved. An epoch that max_steps cut short is not taken up again.
        progress: whether to show a bar.
        callbacks: called with an Epoch after each; one that returns True ends training. A
            torch.optim.lr_scheduler takes a step after each (ReduceLROnPlateau by the validation
            ELBO, or the training ELBO where there is none).
        data_plate: as in :func:`pyro_vae.log_weights`; with False every step takes all
            the data, and ELBOs are of the whole.
        drop_last: whether an epoch leaves out a last minibatch that is smaller than the others;
            which data it would have held is another matter in each epoch.

    Returns:
        A FitResult.

    Raises:
        NonFiniteLossError: for a loss or gradient that is not finite, naming step and
            sites; the parameters are those of the last good step.
        ValueError: for data that are empty, hold NaN or lie outside the likelihood's
            support, a guide that does not fit the model, a checkpoint of another pair, a
            factor of the schedule that is negative or not finite, or arguments that do not
            go together.
        FileNotFoundError: for a checkpoint in a folder that does not exist.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_vae as pv
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.linspace(-1, 1, 50)
        >>> guide = pv.LocalGuide(model, num_data=50, example=x)
        >>> pv.fit(model, guide, x, epochs=2, progress=False).stopped_by
        'epochs'
    """
    batch_size = as_count("batch_size", batch_size)
    epochs = 100 if epochs is None and max_steps is None else epochs
    given: dict[FitStop, Any] = {"max_steps": max_steps, "epochs": epochs, "patience": patience}
    limits = {name: as_count(name, limit) for name, limit in given.items() if limit is not None}
    _check_data(guide, data, validation_data, patience)
    loss = ELBO() if loss is None else loss
    _check_loss(loss, schedule)
    check_compile(compile)
    _check_folder(checkpoint)
    for module in filter(None, map(module_of, (model, guide) if device is not None else ())):
        module.to(device)
    # Pyro's own losses ask for no data plate, and never run the model under its prior.
    as_svi = not isinstance(loss, Objective)
    training = TrainingData(
        model, guide, data, batch_size, device, data_plate, drop_last, as_svi=as_svi
    )
    held_out = None if validation_data is None else training.validation(validation_data)
    per_epoch = training.steps_per_epoch
    by_epochs = limits["epochs"] * per_epoch if "epochs" in limits and per_epoch else None
    total = min(filter(None, (limits.get("max_steps"), by_epochs)), default=None)
    with one_thread(), seeded(training.batch.device, seed):
        steps = TrainingSteps(training, loss, optim, schedule, compile, total)
        validation = None if held_out is None else Validation(steps, held_out, seed)
        result = _Trainer(steps, validation, limits, list(callbacks), checkpoint).run(progress)
    if isinstance(guide, RowGuide):
        drawn_anew = isinstance(data, (EpochData, StepData))
        guide.remember(None if drawn_anew else training.batch, guide.given)
        if not drawn_anew:
            result = replace(result, promised=_promised(model, guide, training.batch))
        if result.unfinished and result.stopped_by != "interrupted":
            text = (
                "the rows of the LocalGuide are not at their optimum: %s. Train longer, with a "
                "learning rate that falls to nothing; or call pyro_vae.refine, which starts at "
                "modes of the posterior and says of each row whether it has converged"
            )
            logger.warning(text, result.unfinished)
    return result


def _promised(model: Program, guide: Program, batch: Batch) -> tuple[float, float]:
    """Return what is left to gain for a LocalGuide of all data jointly; nan for any other."""
    if isinstance(guide, LocalGuide) and guide.is_whole and guide.family.has_density:
        with Look() as look:
            return promised_gain(model, guide, batch)
        logger.info("what is left to gain is not known: %s", look.error)
    return math.nan, math.nan


def _check_data(guide: Program, data: Any, validation_data: Any, patience: int | None) -> None:
    """Raise ValueError or TypeError for data that do not go with the guide, or with patience."""
    rows = isinstance(guide, RowGuide)
    if rows and isinstance(data, (DataLoader, IterableDataset)):
        what = f"which rows a batch holds, and a {type(data).__name__} does not say; pass tensors"
        raise ValueError(f"data: a LocalGuide must know {what}, or a torch Dataset with a length")
    if validation_data is None:
        if patience is not None:
            what = "patience counts epochs without a better validation ELBO: give validation_data"
            raise ValueError(what)
    elif rows:
        what = "a LocalGuide has parameters for the training data alone; use an AmortizedGuide"
        raise ValueError(f"validation_data: {what}, or leave validation_data out")
    elif isinstance(validation_data, (int, float)):
        what = "data are needed, like those to train on; split them before, as in x[:800], x[800:]"
        raise TypeError(f"validation_data={validation_data!r}: {what}")
    elif isinstance(validation_data, (EpochData, StepData)):
        what = "is drawn anew each time, so that epochs could not be compared; pass one draw of it"
        raise ValueError(f"validation_data {what} (a StochasticBinarization has fixed(seed=0))")


def _check_folder(checkpoint: str | os.PathLike[str] | None) -> None:
    """Raise FileNotFoundError for a checkpoint in a folder that is not there."""
    if checkpoint is not None and not Path(checkpoint).absolute().parent.is_dir():
        raise FileNotFoundError(f"checkpoint={os.fspath(checkpoint)!r}: its folder does not exist")


def _check_loss(loss: Any, schedule: Any) -> None:
    """Raise TypeError where either has another type."""
    if not isinstance(loss, pyro.infer.ELBO):
        raise TypeError(f"loss={loss!r}: an instance of a pyro.infer.ELBO is needed")
    if isinstance(loss, pyro.infer.ReweightedWakeSleep):
        raise TypeError("loss: ReweightedWakeSleep has two losses, of model and guide")
    if schedule is not None and (isinstance(schedule, type) or not callable(schedule)):
        what = "a function from a step to the factor is needed, such as schedules.Constant(beta)"
        raise TypeError(f"schedule={schedule!r}: {what}")


@dataclass
class _Progress:
    """How far training has come, as a checkpoint holds it beside the parameters."""

    step: int = 0
    epoch: int = 0
    elapsed: float = 0.0
    best_elbo: float = -math.inf
    best_epoch: int = 0
    history: dict[str, list[float]] = field(default_factory=lambda: {n: [] for n in _HISTORY})


@dataclass
class _Trainer:
    """The loop over epochs: steps, validation, callbacks, checkpoint."""

    steps: TrainingSteps
    validation: Validation | None
    limits: Mapping[FitStop, int]  # of steps, epochs, epochs without a gain: those that a user gave
    callbacks: list[Callback]
    checkpoint: str | os.PathLike[str] | None
    state: _Progress = field(default_factory=_Progress)
    best: State | None = None  # at the end of the epoch that validated best
    unsaved: bool = False

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
        return FitResult(state.history, stopped_by, state.step, state.elapsed, state.best_epoch)

    def _loop(self, bar: tqdm[NoReturn]) -> FitStop:
        state, ended = self.state, False
        while not ended:
            stalled = state.epoch - state.best_epoch
            counts = {"max_steps": state.step, "epochs": state.epoch, "patience": stalled}
            if reached := [name for name, limit in self.limits.items() if counts[name] >= limit]:
                return reached[0]
            epoch = self._epoch(bar)
            self.unsaved = self.checkpoint is not None
            ended = self._call_back(epoch)
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
            state.step = self.steps.taken
            # At each step, because the time of an epoch that is broken off counts too.
            state.elapsed = time.perf_counter() - begin
            self._show(bar, mean_elbo(elbos[-_SHOWN:])[0], refresh=False)

        for index, batch in self.steps.data.epoch():
            self.steps.take(index, batch)
            if self.steps.due:
                read()
            if self.steps.taken >= max_steps:
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
        elif validation > state.best_elbo:
            state.best_elbo, state.best_epoch, self.best = validation, state.epoch, self.steps.last
        self._show(bar, elbo, refresh=True)
        return Epoch(state.epoch, state.step, elbo, validation, state.elapsed)

    def _show(self, bar: tqdm[NoReturn], elbo: float, *, refresh: bool) -> None:
        shown = {"epoch": str(self.state.epoch), "ELBO": f"{elbo:.2f}"}
        if self.state.epoch and self.validation is not None:
            shown["validation"] = f"{self.state.history['validation_elbo'][-1]:.2f}"
        bar.set_postfix(shown, refresh=refresh)

    def _call_back(self, epoch: Epoch) -> bool:
        """Call all callbacks; return whether one of them ends training."""
        ended = False
        for callback in self.callbacks:
            if isinstance(callback, ReduceLROnPlateau):
                callback.step(-(epoch.elbo if self.validation is None else epoch.validation_elbo))
            elif isinstance(callback, LRScheduler):
                callback.step()
            else:
                ended |= bool(callback(epoch))
        if self.callbacks:
            self.steps.last = self.steps.parameters.state()  # which they may have changed
        return ended

    # --- checkpoints

    def _save(self) -> None:
        """Write the checkpoint, if one is wanted."""
        if self.checkpoint is None:
            return
        optimizer, loss = self.steps.optimizer, self.steps.objective
        schedulers = checkpoints.schedulers_of(self.callbacks, optimizer)
        content = {
            "schedulers": [scheduler.state_dict() for scheduler in schedulers],
            "last": self.steps.last,
            "best": self.best,
            "optimizer": optimizer.state_dict(),
            "optimizer_type": type(optimizer).__name__,
            "loss": {} if loss is None else loss.state_dict(),
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
        progress = self.state = _Progress(**content["progress"])
        steps.resume(content["last"], progress.step, progress.epoch)
        schedulers = checkpoints.schedulers_of(self.callbacks, steps.optimizer)
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
        set_random_state(content["random_state"])
        logger.info("resumed from %s at epoch %d", checkpoint, progress.epoch)
