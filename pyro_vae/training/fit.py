"""fit: checks what it is given, makes the steps of it, and hands them to the training loop."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pyro.infer
import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, IterableDataset

from pyro_vae.compiler.arguments import check_compile
from pyro_vae.guides.local import LocalGuide
from pyro_vae.losses.base import Objective
from pyro_vae.losses.elbo import ELBO
from pyro_vae.programs.batch import Batch, EpochData, StepData
from pyro_vae.programs.guide_kinds import RowGuide
from pyro_vae.programs.messages import as_count, as_seed
from pyro_vae.programs.processes import Processes, alone, processes
from pyro_vae.programs.state import Look, module_of, one_thread, seeded
from pyro_vae.programs.types import Compile, DataPlate, Program
from pyro_vae.refinement.refine import promised_gain
from pyro_vae.training.callbacks import CallbackLike, Callbacks, EachStep
from pyro_vae.training.checkpoints import Checkpoints, Every
from pyro_vae.training.clipping import Clip
from pyro_vae.training.convergence import Converged
from pyro_vae.training.data_source import Shuffle
from pyro_vae.training.fit_result import FitResult, FitStop
from pyro_vae.training.minibatches import TrainingData
from pyro_vae.training.run_state import settings_of
from pyro_vae.training.steps import OnNan, TrainingSteps
from pyro_vae.training.stopping import Plateau
from pyro_vae.training.trainer import Trainer
from pyro_vae.training.validation import Validation

logger = logging.getLogger(__name__)

_UNFINISHED = (
    "the rows of the LocalGuide are not at their optimum: %s. Train longer, with a learning rate "
    "that falls to nothing; or call pyro_vae.refine, which starts at modes of the posterior and "
    "says of each row whether it has converged"
)


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
    min_delta: float = 0.0,
    smoothing: float = 0.0,
    seed: int | None = 0,
    device: torch.device | str | None = None,
    compile: Compile = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: Every = None,
    checkpoint_keep: int = 2,
    progress: bool = True,
    callbacks: Iterable[CallbackLike] = (),
    data_plate: DataPlate = None,
    drop_last: bool = False,
    shuffle: Shuffle = "rows",
    clip_norm: float | None = None,
    clip_value: float | None = None,
    on_nan: OnNan = "raise",
    distributed: bool = True,
    stop: Converged | None = None,
) -> FitResult:
    r"""Train a model/guide pair by stochastic variational inference.

    Every step takes a minibatch of B of the N data, shuffled anew at each epoch, and moves all
    parameters along the gradient of a loss such as

    .. math:: -\frac{N}{B} \sum_{n \in \text{minibatch}} \mathrm{ELBO}_n
        \quad\text{or, without latents that all data share,}\quad
        -\sum_{n \in \text{minibatch}} \mathrm{ELBO}_n

    (stochastic variational inference, Hoffman, Blei, Wang & Paisley 2013). Ctrl-C ends training
    and keeps the parameters of the last step. With validation data, the parameters with the best
    validation ELBO are kept. Where a guide or the model has parameters for each row by its place
    (AutoNormal), every step takes all the data in their order, and a warning says so.

    Of a LocalGuide the rows of the minibatch alone move, each by moments and a step count of its
    own, as by an optimizer for it alone: a step's cost does not depend on the number of rows. An
    optimizer without a rule for that moves the whole table, and a warning says so.

    Where all data share latents and the data plate has the size of the minibatch, the terms in the
    plate are scaled by N / B, as by ``pyro.plate(name, num_data, subsample=x)`` in the model,
    and a warning says so. Unscaled, there would seem to be fewer data.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        data: a tensor or an array, a tuple or a mapping of them, first dimension the datum. Of a
            memory-mapped, Zarr or HDF5 array, a sparse matrix of SciPy or PyTorch, an AnnData
            (:func:`pyro_vae.datasets.cells`) or a torch Dataset each step reads its rows, dense,
            and bad values are refused when they are read. A DataLoader's or an IterableDataset's
            batches are the minibatches. Or an object that draws such data anew, for
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
        min_delta: for patience, by how much a validation ELBO must be better to count, in nats per
            datum.
        smoothing: for patience, the weight of earlier epochs in a moving average of the validation
            ELBO, from 0 (the last epoch alone) to below 1. It decides when to stop. The parameters
            that are kept are those of the epoch with the best validation ELBO itself: scored on the
            same random numbers each time, it has no noise of draws.
        seed: of everything random in here; the global random state stays as it was. None
            draws from the global random state.
        device: where modules and minibatches go; as they are by default.
        compile: how steps run, as in :class:`pyro_vae.CompiledSVI`: "auto" records the
            operations of a step as a graph and replays them, and compiles the graph where
            training is long enough for that to save time (few steps run eagerly); "replay"
            never compiles, True at once, False runs eagerly. Losses are the same to rounding.
        checkpoint: a file with all that the run needs to go on as if it had not been interrupted,
            written whole or not at all. Where it exists, training resumes from it: parameters,
            optimizer and its settings, schedulers among the callbacks or that they hold, callbacks
            with state_dict and load_state_dict, history, random numbers (PyTorch's, NumPy's and
            Python's, and generators of a DataLoader), and the place in the epoch. Where it is
            damaged, or of another run, the one before it serves, and a logged warning says so.
        checkpoint_every: steps, or a datetime.timedelta, between two checkpoints, also inside an
            epoch; one after each epoch by default. One more is written when training ends.
        checkpoint_keep: how many checkpoints are kept: the file, and those before it beside it,
            with the ending .prev1, .prev2, ... Each holds the best parameters so far as well.
        progress: whether to show a bar.
        callbacks: functions, called with an Epoch after each, of which one that returns True ends
            training; objects with on_step, on_epoch and on_end
            (:class:`pyro_vae.callbacks.Callback`). A torch.optim.lr_scheduler takes a step after
            each epoch (ReduceLROnPlateau by the validation ELBO, or the training ELBO where there
            is none), in :class:`pyro_vae.callbacks.EachStep` after each step; it must be of
            ``optim``, a torch optimizer.
        data_plate: as in :func:`pyro_vae.log_weights`; with False every step takes all
            the data, and ELBOs are of the whole.
        drop_last: whether an epoch leaves out a last minibatch that is smaller than the others;
            which data it would have held is another matter in each epoch.
        shuffle: what of data in a file is shuffled. "rows": each minibatch is of any rows, and of a
            chunked file it opens as many chunks. "blocks": chunks (1,024 rows of a file without)
            are shuffled, and the rows of as many of them as are 128 MiB; each is opened once in an
            epoch. Where the rows of a file lie in an order, minibatches are less mixed. Rows of
            data in memory and of a torch Dataset are shuffled either way.
        clip_norm: the largest norm of the gradients of all parameters together; longer ones are
            shortened, as by ``torch.nn.utils.clip_grad_norm_``.
        clip_value: the largest number in a gradient, as in ``torch.nn.utils.clip_grad_value_``.
        on_nan: what becomes of a step whose loss or gradient is not finite. "raise" ends training
            with an error. "skip" leaves parameters, the optimizer's moments and buffers as they
            were, warns, counts the step, and goes on; after 20 in a row, and where a parameter is
            not finite, it ends like "raise".
        distributed: whether processes of an initialized torch.distributed group, or those that
            torchrun started, share each minibatch; False trains in each process by itself.
        stop: a rule that lowers the learning rate in stages and ends training when no more than a
            tolerance is left to gain: ``pv.Converged(tolerance=0.01)``. It sets averages of the
            parameters, and scores them on the training data; without it rates are left alone.
            Give max_steps or epochs as well, for it may never be reached.

    Returns:
        A FitResult.

    Raises:
        NonFiniteLossError: for a loss or gradient that is not finite, naming step and
            sites; the parameters are those of the last good step.
        ValueError: for data that are empty, hold NaN or lie outside the likelihood's
            support, a guide that does not fit the model, a checkpoint of another pair or of
            other settings (loss, optimizer, batch_size, number of data, seed), naming these, a
            factor of the schedule that is negative or not finite, or arguments that do not
            go together.
        FileNotFoundError: for a checkpoint in a folder that does not exist.
        OSError: where the first checkpoint cannot be written; of a later one (the disk is full) a
            logged warning tells, the one before stays, and training goes on.

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
    callbacks = _listed(callbacks)
    with alone(not distributed):
        together = processes()
    _check_stop(stop, callbacks, together)
    all_of_them = [*callbacks, *([] if stop is None else [stop])]
    called = Callbacks(all_of_them, is_first=together.is_first)
    plateau = Plateau(min_delta, smoothing)
    if patience is None and (min_delta or smoothing):
        raise ValueError("min_delta and smoothing are for patience: give it, in epochs")
    _check_data(guide, data, validation_data, patience)
    loss = ELBO() if loss is None else loss
    _check_loss(loss, schedule)
    check_compile(compile)
    clip = Clip(clip_norm, clip_value)
    files = _checkpoints(checkpoint, checkpoint_every, checkpoint_keep, together)
    for module in filter(None, map(module_of, (model, guide) if device is not None else ())):
        module.to(device)
    # Pyro's own losses ask for no data plate, and never run the model under its prior.
    as_svi = not isinstance(loss, Objective)
    with together.first_tells():
        training = TrainingData(
            model,
            guide,
            data,
            batch_size,
            device,
            data_plate,
            drop_last,
            shuffle=shuffle,
            processes=together,
            as_svi=as_svi,
        )
        held_out = None if validation_data is None else training.validation(validation_data)
    per_epoch = training.steps_per_epoch
    by_epochs = limits["epochs"] * per_epoch if "epochs" in limits and per_epoch else None
    total = min(filter(None, (limits.get("max_steps"), by_epochs)), default=None)
    begin = together.gather(as_seed(None))[0] if seed is None and together.size > 1 else seed
    with one_thread(), together.first_tells(), seeded(training.batch.device, begin):
        steps = TrainingSteps(
            training, loss, optim, schedule, compile, total, clip=clip, on_nan=on_nan
        )
        _check_schedulers(callbacks, optim, steps)
        if stop is not None:
            stop.begin(steps)
        validation = None if held_out is None else Validation(steps, held_out, seed)
        settings = settings_of(steps, seed, drop_last)
        trainer = Trainer(steps, validation, limits, plateau, called, files, settings)
        result = trainer.run(progress and together.is_first)
    if stop is not None and result.stopped_by == "converged":
        result = replace(result, promised=stop.left)
    if isinstance(guide, RowGuide):
        result = _with_rows(result, model, guide, training, data)
        if result.unfinished and result.stopped_by != "interrupted" and together.is_first:
            logger.warning(_UNFINISHED, result.unfinished)
    called.end(result)
    return result


def _with_rows(
    result: FitResult, model: Program, guide: RowGuide, training: TrainingData, data: Any
) -> FitResult:
    """Have a guide remember what its rows are fitted to; return with what is left to gain."""
    if isinstance(data, (EpochData, StepData)):
        guide.remember(None, guide.given)
        return result
    guide.remember(training.source.every, guide.given)
    promised = _promised(model, guide, training.batch)
    return result if math.isnan(promised[0]) else replace(result, promised=promised)


def _promised(model: Program, guide: Program, batch: Batch) -> tuple[float, float]:
    """Return what is left to gain for a LocalGuide of all data jointly; nan for any other."""
    if isinstance(guide, LocalGuide) and guide.is_whole and guide.family.has_density:
        with Look() as look:
            return promised_gain(model, guide, batch)
        logger.info("what is left to gain is not known: %s", look.error)
    return math.nan, math.nan


def _listed(callbacks: Any) -> list[CallbackLike]:
    if not isinstance(callbacks, Iterable):
        raise TypeError(f"callbacks={callbacks!r}: a list of them is needed")
    return list(callbacks)


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


def _checkpoints(
    path: str | os.PathLike[str] | None, every: Every, keep: int, together: Processes
) -> Checkpoints | None:
    """Return the checkpoints of the run; None where none are wanted."""
    if path is not None:
        return Checkpoints(path, every, keep, together)
    if every is not None:
        raise ValueError(f"checkpoint_every={every!r}: name the file, checkpoint=path")
    return None


def _check_stop(stop: Converged | None, callbacks: list[CallbackLike], together: Processes) -> None:
    """Raise TypeError or ValueError for a rule that is none, or that others interfere with."""
    if stop is not None and not issubclass(type(stop), Converged):
        raise TypeError(f"stop={stop!r}: a pv.Converged(...) is needed")
    rates = [c for c in callbacks if isinstance(c, (LRScheduler, EachStep))]
    if stop is not None and rates:
        what = "sets the learning rate, and so does a scheduler among the callbacks; leave one out"
        raise ValueError(f"stop: pv.Converged {what}")
    if stop is not None and together.size > 1:
        what = "compares parameters in one process; train with distributed=False, or without it"
        raise ValueError(f"stop: pv.Converged {what}")


def _check_schedulers(callbacks: list[CallbackLike], optim: Any, steps: TrainingSteps) -> None:
    """Raise ValueError for a scheduler of another optimizer, which would change nothing here."""
    given = [c.scheduler if isinstance(c, EachStep) else c for c in callbacks]
    late = bool(steps.parameters.late)
    found = optim if isinstance(optim, torch.optim.Optimizer) or late else steps.optimizer
    for scheduler in given:
        if isinstance(scheduler, LRScheduler) and scheduler.optimizer is not found:
            what = "moves the learning rate of another optimizer than that of this run"
            advice = "make one torch optimizer, and give it to both: fit(optim=optimizer)"
            raise ValueError(f"callbacks: {type(scheduler).__name__} {what}; {advice}")


def _check_loss(loss: Any, schedule: Any) -> None:
    """Raise TypeError where either has another type."""
    if not isinstance(loss, pyro.infer.ELBO):
        raise TypeError(f"loss={loss!r}: an instance of a pyro.infer.ELBO is needed")
    if isinstance(loss, pyro.infer.ReweightedWakeSleep):
        raise TypeError("loss: ReweightedWakeSleep has two losses, of model and guide")
    if schedule is not None and (isinstance(schedule, type) or not callable(schedule)):
        what = "a function from a step to the factor is needed, such as schedules.Constant(beta)"
        raise TypeError(f"schedule={schedule!r}: {what}")
