"""The training loop: batches, validation, checkpoint, resume, progress; it knows no loss."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyro.infer
import pyro.optim
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_vae import checkpoints
from pyro_vae.batches import Batch, EpochData, as_batch
from pyro_vae.guides import LocalGuide
from pyro_vae.handlers import LatentScale
from pyro_vae.logweights import non_finite_sites
from pyro_vae.objectives import ELBO
from pyro_vae.parameters import Parameters
from pyro_vae.results import FitResult
from pyro_vae.sites import evaluation, inspect, preserved_rng

__all__ = ["Epoch", "NonFiniteLossError", "fit"]

logger = logging.getLogger(__name__)

_DEFAULT_EPOCHS = 100
_SHOWN = 50  # steps that the running ELBO of the bar is the mean of
_HISTORY = (
    "epoch",
    "step",
    "elbo",
    "elbo_std_error",
    "validation_elbo",
    "validation_elbo_std_error",
)


class NonFiniteLossError(ArithmeticError):
    """Training met a loss or gradient that is not finite, and stopped.

    Model and guide keep the parameters of the last good step.

    Attributes:
        step: the step that failed, counted from 1.
        sites: the sites whose value or log density is not finite.
    """

    def __init__(self, message: str, step: int, sites: list[str]) -> None:
        super().__init__(message)
        self.step = step
        self.sites = sites


@dataclass(frozen=True)
class Epoch:
    """What a callback of :func:`fit` is told at the end of an epoch.

    Attributes:
        epoch: counted from 1.
        step: optimizer steps so far.
        elbo: mean over the epoch, in nats per datum.
        validation_elbo: in nats per datum; nan without validation data.
        elapsed: seconds of training and validation so far.
    """

    epoch: int
    step: int
    elbo: float
    validation_elbo: float
    elapsed: float


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
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
    compile: str | bool = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    callbacks: Iterable[Callable[[Epoch], bool | None]] = (),
    data_plate: str | bool | None = None,
) -> FitResult:
    """Train a model/guide pair by stochastic variational inference.

    Every step takes a minibatch, shuffled anew at each epoch. Ctrl-C ends training and
    keeps what was learned. With validation data, the parameters that scored best on
    them are kept. A LocalGuide is told which rows each minibatch holds.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        data: a tensor, a tuple or a mapping of them, first dimension the datum; or an
            object with ``epoch(generator)`` that draws such data anew for each epoch.
        loss: a pyro.infer.ELBO, Pyro's or ours; pyro_vae.ELBO() by default.
        optim: a function from parameters to a torch optimizer (a class will do), a torch
            optimizer, or a pyro.optim object with plain arguments; Adam with a learning
            rate of 0.001 by default.
        schedule: the factor on the latent terms of model and guide (KL warm-up) at each
            step, counted from 0; validation is never scaled.
        batch_size: data in a minibatch; the last of an epoch may be smaller.
        epochs: passes over the data at most; 100 where max_steps is not given either.
        max_steps: optimizer steps at most.
        validation_data: like data, without ``epoch``; scored after each epoch on the same
            random numbers.
        patience: epochs without a better validation ELBO after which to stop.
        seed: of everything random in here; the global random state stays as it was. None
            draws from the global random state.
        device: where modules and minibatches go; as they are by default.
        compile: "auto" or False. Steps run eagerly in this version.
        checkpoint: a file written after each epoch, whole or not at all, with the last and
            the best parameters. Where it exists, training resumes from it and goes on as
            if it had not been interrupted.
        progress: whether to show a bar.
        callbacks: called with an Epoch after each; one that returns True ends training.
        data_plate: as in :func:`pyro_vae.log_weights`; with False every step takes all
            the data, and ELBOs are of the whole.

    Returns:
        A FitResult.

    Raises:
        NonFiniteLossError: for a loss or gradient that is not finite, naming step and
            sites; the parameters are those of the last good step.
        ValueError: for data that are empty, hold NaN or lie outside the likelihood's
            support, a guide that does not fit the model, or arguments that do not go
            together.

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
    _check_arguments(batch_size, epochs, max_steps, patience, validation_data, compile)
    if epochs is None and max_steps is None:
        epochs = _DEFAULT_EPOCHS
    for module in (model, guide):
        if device is not None and isinstance(module, nn.Module):
            module.to(device)
    source = _Source(data, device)
    validation = None
    if validation_data is not None:
        if isinstance(guide, LocalGuide):
            raise ValueError(
                "validation_data: a LocalGuide has parameters for the training data alone; "
                "use an AmortizedGuide, or leave validation_data out"
            )
        validation = _to(as_batch(validation_data), device)
    with preserved_rng(source.batch.device) if seed is not None else contextlib.nullcontext():
        if seed is not None:
            torch.manual_seed(seed)
        trainer = _Trainer(
            model, guide, source, validation, loss, optim, schedule, batch_size, seed, data_plate
        )
        if checkpoint is not None and os.path.exists(checkpoint):
            trainer.resume(checkpoint)
        stopped_by = trainer.run(epochs, max_steps, patience, checkpoint, progress, callbacks)
    return trainer.result(stopped_by)


def _check_arguments(
    batch_size: int,
    epochs: int | None,
    max_steps: int | None,
    patience: int | None,
    validation_data: Any,
    compiled: str | bool,
) -> None:
    numbers = {
        "batch_size": batch_size,
        "epochs": epochs,
        "max_steps": max_steps,
        "patience": patience,
    }
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: at least 1 is needed")
    if patience is not None and validation_data is None:
        raise ValueError(
            "patience counts epochs without a better validation ELBO: give validation_data"
        )
    if compiled not in ("auto", False):
        raise ValueError(f"compile={compiled!r}: 'auto' or False is needed; steps run eagerly")


def _to(batch: Batch, device: torch.device | str | None) -> Batch:
    return batch if device is None else batch.to(device)


class _Source:
    """The training data: the same at each epoch, or drawn anew."""

    def __init__(self, data: Any, device: torch.device | str | None) -> None:
        self._fresh = data if isinstance(data, EpochData) else None
        self._device = device
        # An epoch drawn to look at: the epochs to come have a generator of their own.
        first = data.epoch(torch.Generator().manual_seed(0)) if self._fresh else data
        self.batch = _to(as_batch(first), device)
        self.batch.check_finite()

    def epoch(self) -> Batch:
        if self._fresh is None:
            return self.batch
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ()).item()))
        return _to(as_batch(self._fresh.epoch(generator)), self._device)


@dataclass
class _Progress:
    """Where training stands: what a checkpoint holds beside the parameters."""

    step: int = 0
    epoch: int = 0
    elapsed: float = 0.0
    best_elbo: float = -math.inf
    best_epoch: int = 0
    history: dict[str, list[float]] = field(default_factory=lambda: {n: [] for n in _HISTORY})


class _Trainer:
    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        source: _Source,
        validation: Batch | None,
        loss: pyro.infer.ELBO | None,
        optim: Any,
        schedule: Callable[[int], float] | None,
        batch_size: int,
        seed: int | None,
        data_plate: str | bool | None,
    ) -> None:
        self.model, self.guide = model, guide
        self.source, self.validation = source, validation
        self.loss: Any = ELBO() if loss is None else loss
        if not isinstance(self.loss, pyro.infer.ELBO):
            raise TypeError(f"loss={loss!r}: an instance of a pyro.infer.ELBO is needed")
        self.schedule = schedule
        self.seed = seed
        self.size = source.batch.size
        self._latent_scale = LatentScale()
        self._scaled = (
            (model, guide)
            if schedule is None
            else (self._latent_scale(model), self._latent_scale(guide))
        )
        # The whole data once: values outside a likelihood's support are refused here.
        structure = inspect(model, source.batch, data_plate=data_plate)
        plate = structure.data_plate
        whole = self.size is None or plate is None or plate.drawn
        self.batch_size = (self.size or 1) if whole else min(batch_size, self.size or 1)
        self._whole = whole
        first = source.batch if whole else source.batch.rows(slice(0, self.batch_size))
        with self._rows(None if whole else torch.arange(self.batch_size)):
            self.parameters = Parameters(model, guide, first)
        self._full_size: int | None = None  # where the loss is scaled to all the data
        if plate is None:
            self._full_size = 1
        else:
            seen = inspect(model, first, data_plate=plate.name).data_plate
            if (seen is not None and seen.size != seen.full_size) or self.size is None:
                self._full_size = plate.full_size
        self.optimizer = _optimizer(optim, self.parameters.trained)
        self.state = _Progress()
        self.best: Any = None

    # --- the loop

    def run(
        self,
        epochs: int | None,
        max_steps: int | None,
        patience: int | None,
        checkpoint: str | os.PathLike[str] | None,
        progress: bool,
        callbacks: Iterable[Callable[[Epoch], bool | None]],
    ) -> str:
        """Train; return what ended it, and leave the best parameters in place."""
        state, callbacks = self.state, list(callbacks)
        per_epoch = 1 if self._whole else math.ceil((self.size or 1) / self.batch_size)
        total = min(
            math.inf if epochs is None else epochs * per_epoch,
            math.inf if max_steps is None else max_steps,
        )
        bar = tqdm(
            total=int(total), initial=state.step, disable=not progress, unit="step", leave=True
        )
        stopped_by = "epochs" if max_steps is None else "max_steps"
        with bar:
            try:
                while state.step < total:
                    if patience is not None and state.epoch - state.best_epoch >= patience:
                        stopped_by = "patience"
                        break
                    told = self._epoch(bar, int(total))
                    if checkpoint is not None:
                        checkpoints.save(self._content(), checkpoint)
                    answers = [callback(told) for callback in callbacks]
                    if any(answers):
                        stopped_by = "callback"
                        break
            except KeyboardInterrupt:
                stopped_by = "interrupted"
        if state.step == total and epochs is not None and total == epochs * per_epoch:
            stopped_by = "epochs" if stopped_by == "max_steps" else stopped_by
        if self.best is not None:
            self.parameters.restore(self.best)
        if stopped_by == "interrupted":
            kept = (
                f"the parameters of epoch {state.best_epoch}, the best on the validation data"
                if self.best is not None
                else f"the parameters of step {state.step}"
            )
            logger.warning(
                "interrupted in epoch %d at step %d; kept %s", state.epoch + 1, state.step, kept
            )
        return stopped_by

    def _epoch(self, bar: Any, total: int) -> Epoch:
        state, begin = self.state, time.perf_counter()
        before = state.elapsed
        losses: list[float] = []
        sizes: list[int] = []
        for index, batch in self._minibatches():
            losses.append(self._step(index, batch))
            sizes.append(self._data_in(batch))
            state.step += 1
            # On an interrupt the time of a broken epoch counts too.
            state.elapsed = before + time.perf_counter() - begin
            bar.update()
            elbo, _ = _mean(losses[-_SHOWN:], sizes[-_SHOWN:])
            bar.set_postfix(self._postfix(elbo), refresh=False)
            if state.step >= total:
                break
        elbo, elbo_error = _mean(losses, sizes)
        validation, validation_error = self._validate()
        state.epoch += 1
        state.elapsed = before + time.perf_counter() - begin
        row = (state.epoch, state.step, elbo, elbo_error, validation, validation_error)
        for name, value in zip(_HISTORY, row, strict=True):
            state.history[name].append(value)
        if self.validation is None:
            state.best_epoch = state.epoch
        elif validation > state.best_elbo:
            state.best_elbo, state.best_epoch = validation, state.epoch
            self.best = self.parameters.state()
        bar.set_postfix(self._postfix(elbo), refresh=True)
        return Epoch(state.epoch, state.step, elbo, validation, state.elapsed)

    def _postfix(self, elbo: float) -> dict[str, str]:
        shown = {"epoch": str(self.state.epoch), "ELBO": f"{elbo:.2f}"}
        if self.state.epoch and self.validation is not None:
            shown["validation"] = f"{self.state.history['validation_elbo'][-1]:.2f}"
        return shown

    def _minibatches(self) -> Iterator[tuple[Tensor | None, Batch]]:
        batch = self.source.epoch()
        if self._whole or batch.size is None:
            yield None, batch
            return
        for index in torch.randperm(batch.size).split(self.batch_size):
            yield index, batch.rows(index)

    def _step(self, index: Tensor | None, batch: Batch) -> float:
        """Take one step and return the loss; leave the parameters alone if it is not finite."""
        if self.schedule is not None:
            self._latent_scale.factor = self.schedule(self.state.step)
        random_state = torch.get_rng_state()
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with self._rows(index):
                loss = float(self.loss.loss_and_grads(*self._scaled, *batch.args, **batch.kwargs))
        except Exception as error:
            if self.state.step:
                error.add_note(
                    f"in step {self.state.step + 1} of training; model and guide keep the "
                    "parameters of the step before"
                )
            raise
        gradients = [p.grad for p in self.parameters.trained if p.grad is not None]
        finite = math.isfinite(loss) and (
            not gradients
            or bool(torch.isfinite(torch.stack([g.abs().max() for g in gradients])).all())
        )
        if not finite:
            self._refuse(loss, index, batch, random_state)
        self.optimizer.step()
        return loss

    def _refuse(
        self, loss: float, index: Tensor | None, batch: Batch, random_state: Tensor
    ) -> None:
        """Raise NonFiniteLossError, after a second look with the same random numbers."""
        torch.set_rng_state(random_state)
        with self._rows(index):
            sites = non_finite_sites(self.model, self.guide, batch)
        self.optimizer.zero_grad(set_to_none=True)
        step = self.state.step + 1
        what = "the gradient" if math.isfinite(loss) else f"the loss ({loss})"
        where = (
            "at sites " + ", ".join(sites)
            if sites
            else "though every site's log density is finite: the derivative of one is not"
        )
        raise NonFiniteLossError(
            f"{what} of step {step} is not finite, {where}. Model and guide keep the parameters "
            "of the step before. Try a smaller learning rate, or bound the scale or logit there",
            step,
            sites,
        )

    def _validate(self) -> tuple[float, float]:
        if self.validation is None:
            return math.nan, math.nan
        losses, sizes = [], []
        with (
            torch.no_grad(),
            evaluation(self.model, self.guide),
            preserved_rng(self.validation.device),
        ):
            torch.manual_seed(0 if self.seed is None else self.seed)
            size = self.validation.size or 1
            for start in range(0, size, self.batch_size):
                batch = self.validation.rows(slice(start, start + self.batch_size))
                losses.append(
                    float(self.loss.loss(self.model, self.guide, *batch.args, **batch.kwargs))
                )
                sizes.append(self._data_in(batch))
        return _mean(losses, sizes)

    def _data_in(self, batch: Batch) -> int:
        """How many data a batch's loss speaks for."""
        if self._full_size is not None:
            return self._full_size
        return batch.size or 1

    def _rows(self, index: Tensor | None) -> contextlib.AbstractContextManager[None]:
        if isinstance(self.guide, LocalGuide) and index is not None:
            return self.guide.rows(index)
        return contextlib.nullcontext()

    # --- checkpoints

    def _content(self) -> dict[str, Any]:
        state = self.state
        return {
            "last": self.parameters.state(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "progress": {name: getattr(state, name) for name in _Progress.__dataclass_fields__},
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }

    def resume(self, checkpoint: str | os.PathLike[str]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: where it is not one, or of another pair.
        """
        content = checkpoints.load(checkpoint)
        self.parameters.restore(content["last"])
        self.best = content["best"]
        self.optimizer.load_state_dict(content["optimizer"])
        self.state = _Progress(**content["progress"])
        torch.set_rng_state(content["rng"])
        if content["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(content["cuda_rng"])
        logger.info("resumed from %s at epoch %d", checkpoint, self.state.epoch)

    def result(self, stopped_by: str) -> FitResult:
        state = self.state
        return FitResult(state.history, stopped_by, state.step, state.elapsed, state.best_epoch)


def _mean(losses: list[float], sizes: list[int]) -> tuple[float, float]:
    """Return the ELBO per datum and its standard error over minibatches."""
    total = sum(sizes)
    mean = -sum(losses) / total
    if len(losses) < 2:
        return mean, math.nan
    residuals = [(-loss - mean * size) ** 2 for loss, size in zip(losses, sizes, strict=True)]
    count = len(losses)
    return mean, math.sqrt(sum(residuals) * count / (count - 1)) / total


def _optimizer(optim: Any, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Return one torch optimizer for all parameters."""
    if optim is None:
        return torch.optim.Adam(parameters, lr=1e-3)
    if isinstance(optim, torch.optim.Optimizer):
        return optim
    if isinstance(optim, pyro.optim.PyroOptim):
        if not isinstance(optim.pt_optim_args, dict):
            raise ValueError(
                "optim: a pyro.optim object whose arguments are a function of the parameter's "
                "name cannot be translated; pass a function from parameters to a torch optimizer"
            )
        if optim.pt_clip_args:
            raise ValueError(
                "optim: clip_args of a pyro.optim object cannot be translated; use "
                "pyro.optim.ClippedAdam, or a torch optimizer that clips"
            )
        return optim.pt_optim_constructor(parameters, **optim.pt_optim_args)
    made: Any = optim(parameters) if callable(optim) else None  # type: ignore[operator]
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(
            f"optim={optim!r}: a function from parameters to a torch optimizer, a torch "
            "optimizer, or a pyro.optim object is needed"
        )
    return made
