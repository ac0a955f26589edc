"""What is called while training goes on: at each step, after each epoch, at the end."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_vae.programs.messages import as_path
from pyro_vae.training.fit_result import Epoch, FitResult, FitStop

Each: TypeAlias = Literal["epoch", "step"]

_HOOKS = ("on_step", "on_epoch", "on_end")


@dataclass(frozen=True, slots=True)
class Step:
    """The argument of a callback's ``on_step``, after a step.

    Attributes:
        step: counted from 1.
        epoch: that the step is of, counted from 1.
        elbo: of the minibatch, in nats per datum; nan where the step was skipped
            (``on_nan="skip"``), or was not read (:attr:`Callback.reads_loss`).
    """

    step: int
    epoch: int
    elbo: float


class Callback:
    """Called by :func:`pyro_vae.fit` while it trains. A subclass has the methods that it needs.

    Any object with one of the three methods will do; a plain function is an ``on_epoch``. An
    exception that one raises ends training: model and guide keep the parameters as they are, and
    the last checkpoint stays. Ctrl-C in one ends training when all of them have been called; a
    second one breaks off the one that it comes in.

    Attributes:
        reads_loss: whether ``on_step`` looks at the ELBO. On a CUDA device, where losses are
            otherwise read every 50 steps, that waits for each step.
        first_only: whether, of several processes that train together, the first alone calls it,
            because it writes a file, say.

    Example:
        >>> class Largest(Callback):
        ...     best = float("-inf")
        ...     def on_step(self, step):
        ...         self.best = max(self.best, step.elbo)
        >>> watcher = Largest()
        >>> watcher.on_step(Step(step=1, epoch=1, elbo=-3.5))
        >>> watcher.best
        -3.5
    """

    reads_loss = True
    first_only = False
    stopped_by: FitStop = "callback"  # what a result says of training that it ends
    done = False  # whether it has ended training, and would again

    def on_step(self, step: Step) -> bool | None:
        """Called after each step; True ends training, after an epoch that is cut short."""
        return None

    def on_epoch(self, epoch: Epoch) -> bool | None:
        """Called after each epoch and its validation; True ends training."""
        return None

    def on_end(self, result: FitResult) -> None:
        """Called once when training has ended, by Ctrl-C too, but by no other exception."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint is to hold: tensors, numbers, strings, lists and dicts."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned when a checkpoint was written."""


# A function is called after each epoch, and ends training by returning True.
CallbackLike: TypeAlias = Callback | Callable[[Epoch], bool | None] | LRScheduler


class EachStep(Callback):
    """A learning rate scheduler of torch that takes a step after each training step.

    A scheduler that is itself among the callbacks takes one after each epoch.

    Args:
        scheduler: of the optimizer that ``fit`` is given, such as a OneCycleLR.

    Raises:
        TypeError: for anything else, or a ReduceLROnPlateau, which goes by epochs.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
        >>> scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=600)
        >>> callbacks = [EachStep(scheduler)]  # pv.fit(..., optim=optimizer, callbacks=callbacks)
    """

    reads_loss = False

    def __init__(self, scheduler: LRScheduler) -> None:
        if not issubclass(type(scheduler), LRScheduler):
            what = "a scheduler of torch.optim.lr_scheduler is needed"
            raise TypeError(f"EachStep({type(scheduler).__name__}): {what}, of the optim of fit")
        if isinstance(scheduler, ReduceLROnPlateau):
            what = "ReduceLROnPlateau goes by the ELBO of an epoch; pass it as a callback itself"
            raise TypeError(f"EachStep: {what}")
        self.scheduler = scheduler

    def on_step(self, step: Step) -> None:
        """Take a step of the scheduler."""
        self.scheduler.step()


class CSV(Callback):
    """A file of comma-separated values with a row for each epoch or step, written at once.

    A run that resumes from a checkpoint first cuts the file back to the rows that the checkpoint
    knows, so that none is there twice. Any other run begins the file anew with its first row;
    given the same object once more, it adds its rows.

    Args:
        path: of the file; its folder must exist.
        each: "epoch" for columns epoch, step, elbo, validation_elbo and elapsed
            (:class:`pyro_vae.Epoch`); "step" for step, epoch and elbo (:class:`Step`).

    Raises:
        ValueError: for another ``each``, and for a path that is a folder.
        FileNotFoundError: for a folder that does not exist.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "log.csv")
        >>> log = CSV(path, each="step")
        >>> log.on_step(Step(step=1, epoch=1, elbo=-2.5))
        >>> path.read_text().split()
        ['step,epoch,elbo', '1,1,-2.5']
    """

    first_only = True

    def __init__(self, path: str | os.PathLike[str], each: Each = "epoch") -> None:
        self.path, self.each, self._size = as_path("CSV", path), _each(each), 0
        self.reads_loss = each == "step"
        if not self.path.absolute().parent.is_dir():
            raise FileNotFoundError(f"CSV({os.fspath(path)!r}): its folder does not exist")
        if self.path.is_dir():
            raise ValueError(f"CSV({os.fspath(path)!r}) is a folder; name a file in it")

    def on_step(self, step: Step) -> None:
        """Write a row, where there is one for each step."""
        if self.each == "step":
            self._write(step)

    def on_epoch(self, epoch: Epoch) -> None:
        """Write a row, where there is one for each epoch."""
        if self.each == "epoch":
            self._write(epoch)

    def _write(self, row: Step | Epoch) -> None:
        columns = asdict(row)
        with self.path.open("r+b" if self._size and self.path.exists() else "wb") as file:
            file.truncate(self._size)  # rows of another run, or since the checkpoint
            file.seek(0, os.SEEK_END)
            rows = (
                [list(columns.values())] if file.tell() else [list(columns), list(columns.values())]
            )
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(rows)
            file.write(text.getvalue().encode())
            self._size = file.tell()

    def state_dict(self) -> dict[str, Any]:
        """Return how many bytes are written."""
        return {"size": self._size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after as many bytes."""
        self._size = min(state["size"], self.path.stat().st_size if self.path.exists() else 0)


class TensorBoard(Callback):
    """Curves for TensorBoard: the ELBO of each epoch, or step, in nats per datum.

    Needs ``pip install 'pyro-vae[tensorboard]'``. A run that resumes from a checkpoint hides what
    was written after it.

    Args:
        folder: of the event files, one folder for each run.
        each: "epoch" for elbo, validation_elbo; "step" for those, and the ELBO of each step.

    Raises:
        ImportError: where TensorBoard is not installed.
        ValueError: for another ``each``.

    Example:
        >>> callbacks = [TensorBoard("runs/first")]  # doctest: +SKIP
    """

    first_only = True

    def __init__(self, folder: str | os.PathLike[str], each: Each = "epoch") -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # an extra
        except ImportError as error:
            what = "TensorBoard is needed: pip install 'pyro-vae[tensorboard]'"
            raise ImportError(what) from error
        self.folder, self.each = os.fspath(folder), _each(each)
        self.reads_loss = each == "step"
        self._make: Callable[..., Any] = SummaryWriter
        self._writer: Any = None
        self._last: int | None = None  # step that a checkpoint knows

    def on_step(self, step: Step) -> None:
        """Add the ELBO of a step, where each is wanted."""
        if self.each == "step":
            self._add({"elbo/step": step.elbo}, step.step)

    def on_epoch(self, epoch: Epoch) -> None:
        """Add the ELBOs of an epoch, and write what was added."""
        found = {"elbo/training": epoch.elbo, "elbo/validation": epoch.validation_elbo}
        self._add({tag: value for tag, value in found.items() if value == value}, epoch.step)
        self._writer.flush()

    def _add(self, values: Mapping[str, float], step: int) -> None:
        if self._writer is None:
            purged = None if self._last is None else self._last + 1
            self._writer = self._make(self.folder, purge_step=purged)
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._last = step

    def on_end(self, result: FitResult) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def state_dict(self) -> dict[str, Any]:
        """Return the last step that was added."""
        return {"last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after it."""
        self._last, self._writer = state["last"], None


def _each(each: Each) -> Each:
    if each not in ("epoch", "step"):
        raise ValueError(f'each={each!r}: "epoch" or "step" is needed')
    return each


class Callbacks:
    """The callbacks of a run, each called when it wants to be.

    Args:
        given: as in :func:`pyro_vae.fit`.
        is_first: whether this is the first of the processes that train together.

    Attributes:
        given: the same, in order.
        reads_loss: whether one looks at the ELBO of each step.
        of_steps: whether one is called at each step.
        ended_by: what a result says of training that one of them has ended.

    Raises:
        TypeError: for what can be called at no time.
    """

    def __init__(self, given: Iterable[CallbackLike], *, is_first: bool = True) -> None:
        self.given: Sequence[Any] = list(given)
        for callback in self.given:
            _check(callback)
        self.ended_by: FitStop = "callback"
        of_steps = [c for c in self.given if _hook(c, "on_step")]
        self.of_steps = bool(of_steps)
        self.reads_loss = any(getattr(c, "reads_loss", True) for c in of_steps)
        here = [c for c in self.given if is_first or not getattr(c, "first_only", False)]
        self._hooks = {
            name: [(c, hook) for c in here if (hook := _hook(c, name))] for name in _HOOKS
        }

    def are_done(self) -> bool:
        """Return whether one has ended training, before it was taken up again."""
        done = [c for c in self.given if isinstance(c, Callback) and c.done]
        self.ended_by = done[0].stopped_by if done else self.ended_by
        return bool(done)

    def step(self, step: Step) -> bool:
        """Call those of a step; return whether one ends training."""
        return self._call("on_step", step, f"step {step.step}")

    def epoch(self, epoch: Epoch) -> bool:
        """Call those of an epoch; return whether one ends training."""
        return self._call("on_epoch", epoch, f"epoch {epoch.epoch}")

    def end(self, result: FitResult) -> None:
        """Call those of the end."""
        self._call("on_end", result, "the end of training")

    def _call(self, name: str, told: Any, when: str) -> bool:
        ended = False
        interrupt: KeyboardInterrupt | None = None
        for callback, hook in self._hooks[name]:
            try:
                if hook(told):
                    ended, self.ended_by = True, getattr(callback, "stopped_by", "callback")
            except KeyboardInterrupt as raised:
                interrupt = raised  # those after it, a scheduler say, are not called again
            except Exception as error:
                error.add_note(f"in the callback {_name(callback)}, after {when}")
                raise
        if interrupt is not None:
            raise interrupt
        return ended

    def state(self) -> list[dict[str, Any]]:
        """Return the states of those that have one, in order, with the names of their types."""
        return [
            {"type": type(callback).__name__, "state": state}
            for callback in self.given
            if _has_state(callback) and (state := callback.state_dict())
        ]

    def load(self, saved: Sequence[Mapping[str, Any]]) -> list[str]:
        """Give those of each type their states, in order; return the types of states left over."""
        left = list(saved)
        for callback in filter(_has_state, self.given):
            for entry in left:
                if entry["type"] == type(callback).__name__:
                    callback.load_state_dict(entry["state"])
                    left.remove(entry)
                    break
        return [entry["type"] for entry in left]


def _check(callback: object) -> None:
    if isinstance(callback, type):
        what = f"an object is needed: {callback.__name__}(...)"
        raise TypeError(f"callbacks: {callback.__name__} is a class; {what}")
    if not any(_hook(callback, name) for name in _HOOKS):
        what = "a function of an Epoch, a learning rate scheduler or a pv.callbacks.Callback"
        raise TypeError(f"callbacks: {callback!r} has nothing to call; {what} is needed")


def _hook(callback: Any, name: str) -> Callable[[Any], Any] | None:
    """Return what to call; None for a method that a subclass has not filled in."""
    if isinstance(callback, LRScheduler):
        return _stepped(callback) if name == "on_epoch" else None
    found = getattr(callback, name, None)
    if callable(found):
        empty = isinstance(callback, Callback) and (
            getattr(type(callback), name) is getattr(Callback, name) and name not in vars(callback)
        )
        return None if empty else found
    hooked = any(callable(getattr(callback, other, None)) for other in _HOOKS)
    return callback if name == "on_epoch" and callable(callback) and not hooked else None


def _stepped(scheduler: LRScheduler) -> Callable[[Epoch], None]:
    def step(epoch: Epoch) -> None:
        if isinstance(scheduler, ReduceLROnPlateau):
            validated = epoch.validation_elbo == epoch.validation_elbo  # not nan
            scheduler.step(-(epoch.validation_elbo if validated else epoch.elbo))
        else:
            scheduler.step()

    return step


def _has_state(callback: object) -> bool:
    methods = ("state_dict", "load_state_dict")
    is_scheduler = isinstance(callback, LRScheduler)  # of which a checkpoint has its own entry
    return not is_scheduler and all(callable(getattr(callback, name, None)) for name in methods)


def _name(callback: object) -> str:
    return getattr(callback, "__qualname__", type(callback).__name__)
