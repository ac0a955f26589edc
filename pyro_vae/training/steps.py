"""Steps of training; an error, or a step that is skipped, where they are not finite."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pyro_vae.losses.base import Objective
from pyro_vae.programs import state
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.guide_kinds import RowGuide
from pyro_vae.programs.handlers import LatentScale
from pyro_vae.programs.traces import non_finite_sites
from pyro_vae.programs.types import Compile
from pyro_vae.schedules import factor_at
from pyro_vae.training.clipping import Clip
from pyro_vae.training.joint_loss import Example, JointLoss
from pyro_vae.training.minibatches import MinibatchELBO, TrainingData
from pyro_vae.training.not_finite import Carried, NonFiniteLossError, NotFiniteError
from pyro_vae.training.optimizers import make_optimizer
from pyro_vae.training.parameters import Parameters, State, all_finite
from pyro_vae.training.table_rows import TableRows
from pyro_vae.training.traced_loss import TracedLoss
from pyro_vae.training.update import Update

logger = logging.getLogger(__name__)

# Where work is queued while Python goes on. To read a number there is to wait for all of it.
_QUEUED = frozenset({"cuda"})
_READ_EVERY = 50  # steps there
_MAX_SKIPPED = 20  # steps in a row

OnNan: TypeAlias = Literal["raise", "skip"]


@dataclass(frozen=True, slots=True)
class _Start:
    """What is needed to take a step again; ``batch`` is None where the rows are enough."""

    number: int  # counted from 1
    size: int | None
    index: Tensor | None
    batch: Batch | None
    random_state: state.RandomState


# What takes the steps of a run in its place: those of several runs at once.
taken_by: ContextVar[Callable[[TrainingSteps, Tensor | None, Batch], None] | None] = ContextVar(
    "taken_by", default=None
)


class TrainingSteps:
    """Takes the steps of training, each on a minibatch.

    On a CUDA device no step waits for the device: losses gather there and are read once in a
    while. From a loss or gradient on that is not finite, the device itself skips all updates, so
    that the parameters are those of the step before when the failure is read. Buffers, such as
    running means, have then seen the steps that were on their way.

    Args:
        data: of the minibatches, with model and guide.
        loss: a pyro.infer.ELBO.
        optim: as in :func:`pyro_vae.fit`.
        schedule: from a step, counted from 0, to the factor on the latent terms; or None.
        compile: as in :func:`pyro_vae.fit`.
        expected: steps in all, which decide whether compiling pays; None where not known.
        clip: how gradients are clipped.
        on_nan: as in :func:`pyro_vae.fit`.

    Attributes:
        taken: steps so far.
        skipped: those of them that moved nothing.
        in_a_row: of these, those after the last one that did.
        latest: the rows and the minibatch of the last one.
        seen: called with the loss of a step when all have their gradients; None for nothing.
        epochs: that were :meth:`remember`-ed.
        parameters: of model and guide.
        last: their state at the end of the last epoch.
        objective: the loss, if it is one of ours, with a state; else None.
        pair: model and guide, under the schedule's factor.

    Raises:
        IndexError: for a guide with fewer rows than there are data.
        ValueError: where there is nothing to train.
    """

    def __init__(
        self,
        data: TrainingData,
        loss: Any,
        optim: Any,
        schedule: Callable[[int], float] | None,
        compile: Compile,
        expected: int | None = None,
        *,
        clip: Clip | None = None,
        on_nan: OnNan = "raise",
    ) -> None:
        if on_nan not in ("raise", "skip"):
            raise ValueError(f'on_nan={on_nan!r}: "raise" or "skip" is needed')
        self.data, self._clip, self._skips = data, clip, on_nan == "skip"
        self.skipped = self.in_a_row = 0
        self.seen: Callable[[Any], None] | None = None
        self.latest: tuple[Tensor | None, Batch] = None, data.batch
        self.model, self.guide = model, guide = data.model, data.guide
        self.loss, self.schedule, self.compile, self.expected = loss, schedule, compile, expected
        self.objective = loss if isinstance(loss, Objective) else None
        self.taken = self.epochs = 0
        size = 0 if data.first_rows is None else data.num_data or 0
        if isinstance(guide, RowGuide) and size > guide.num_data:
            what = f"there are {size} data: make it with their num_data"
            raise IndexError(f"the LocalGuide has rows 0 to {guide.num_data - 1}, but {what}")
        pair = data.looked_at()
        with data.rows(data.first_rows):
            self.parameters = Parameters(model, guide, data.example, pair)
        for role, names in self.parameters.unregistered.items():
            if names:
                text = "parameters that are not registered with Pyro are trained too. %s: %s"
                logger.info(text, role, ", ".join(names))
        self.last = self.parameters.state()
        self._optim = optim
        self._rows = TableRows(guide) if isinstance(guide, RowGuide) else None
        self._update: Update | None = None
        self._latent_scale = LatentScale()
        self.pair = data.full_size(model), data.full_size(guide)
        if schedule is not None:
            self.pair = self._latent_scale(self.pair[0]), self._latent_scale(self.pair[1])
            # A tensor, which a graph reads where it is: a number would be a constant of it.
            like = next(p for p in self.parameters.trained if p.is_floating_point())
            self._latent_scale.factor = torch.ones((), dtype=like.dtype, device=like.device)
        self.processes = data.processes
        self._joint = joint = self.joint(self._loss_and_grads)
        self._traced = TracedLoss(
            *self.pair,
            joint or self._loss_and_grads,
            compile=compile,
            steps=expected,
            state=self.objective,
            owners=(*data.source.owners, loss),
            wanted=lambda: self.parameters.trained,
            setting=lambda: data.source.share,
        )
        if pair is not None and self.pair == (model, guide) and self.objective is not None:
            self.objective.take_up(pair)
        self._unread: list[tuple[_Start, Tensor]] = []  # and outcomes, [2], on the device
        self._elbos: list[MinibatchELBO] = []
        if not self.parameters.late:
            self._begin()
        if joint is not None:
            joint.state, joint.skips = self.objective, self._skips
            self._prepare(joint)

    def joint(self, function: Callable[..., Any]) -> JointLoss | None:
        """Return a loss that several processes share; None where there is but one."""
        if self.processes.size == 1:
            return None
        joint = JointLoss(self.processes, function)
        joint.is_scaled = self.data.is_scaled
        return joint

    def _prepare(self, joint: JointLoss) -> None:
        """Begin alike in all processes; refuse a loss that they cannot share."""
        self.processes.take_first(self.parameters.tensors().values())
        self.last = self.parameters.state()
        if self.data.whole:
            logger.warning("each step takes all data at once, and each process takes the same ones")
            return
        if self._rows is not None:
            self._rows.check_apart(self.processes)
        example = Example(*self.data.common(), self._using_rows)
        table = None if self._rows is None else self._rows.table
        joint.prepare(*self.pair, example, [p for p in self.parameters.trained if p is not table])
        self.drop_gradients()
        if self._rows is not None:
            self._rows.drop()
            self._rows.table.grad = None

    def _loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        drawn = self.data.source.drawn(Batch(args, kwargs))
        return self.loss.loss_and_grads(model, guide, *drawn.args, **drawn.kwargs)

    def _begin(self) -> Update:
        """Make the optimizer, now that all parameters have their first values."""
        self.last = self.parameters.state()
        trained = self.parameters.trained
        update = self._update = Update(
            make_optimizer(self._optim, trained), self._clip, self._rows, lasting=not self._skips
        )
        device, *others = {parameter.device for parameter in trained}
        # Only fused optimizers look at the mark: with others, the parameters would be lost.
        if update.is_fused and device.type in _QUEUED and not others:
            update.failed = torch.zeros((), dtype=torch.float32, device=device)  # as kernels read
        self._traced.checked = update.failed is None and self._joint is None
        return update

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer."""
        if self._update is None:
            raise RuntimeError("the optimizer is made in the first step, or by resume()")
        return self._update.optimizer

    @property
    def factor(self) -> float:
        """The factor on the latent terms at the last step."""
        return float(self._latent_scale.factor)

    def set_factor(self, factor: float) -> None:
        """Scale the latent terms, where there is a schedule."""
        if isinstance(self._latent_scale.factor, Tensor):
            self._latent_scale.factor.fill_(factor)

    def stop(self) -> None:
        """Have all processes stop at the end of the next step."""
        if self._joint is not None:
            self._joint.stop_wanted = True

    @property
    def stopped(self) -> bool:
        """Whether one of several processes wanted to stop at the last step."""
        return self._joint is not None and self._joint.stopped

    def agree(self, ended: bool) -> bool:
        """Return whether training ends in any process, and have all draw the same numbers again.

        After what may have drawn in one alone.
        """
        if self._joint is None:
            return ended
        self._joint.draw_alike(self.parameters.tensors())
        self._joint.stopped = self.processes.any(self._joint.stop_wanted)
        return self.processes.any(ended)

    def prepare_factor(self) -> None:
        """Give the latent terms the factor of the next step, where there is a schedule."""
        if self.schedule is not None:
            self.set_factor(factor_at(self.schedule, self.taken))

    def remember(self) -> None:
        """Keep the parameters at the end of an epoch, to come back to."""
        if self._joint is not None:
            self._joint.align(self.parameters.tensors())
        self.last = self.parameters.state()
        self.epochs += 1

    def drop_gradients(self) -> None:
        """Leave no gradients behind: those of a graph cannot be added to outside of it."""
        if self._update is not None:
            self._update.drop_gradients()

    def initialize(self) -> None:
        """Be ready for :meth:`resume`, which gives all parameters their values."""
        if self._update is None:
            self.parameters.initialize()
            self._begin()

    def resume(self, last: State, steps: int, epochs: int, now: State | None = None) -> None:
        """Go on from the parameters at the end of an epoch, or after it.

        Args:
            last: at the end of the epoch.
            steps: taken in all.
            epochs: that had ended.
            now: after these steps; None where that is the end of the epoch.

        Raises:
            ValueError: where they are another pair's.
        """
        self.parameters.restore(last if now is None else now)
        self.last, self.taken, self.epochs = last, steps, epochs

    @property
    def update(self) -> Update:
        """The update of the optimizer."""
        if self._update is None:
            raise RuntimeError("the update is made in the first step, or by resume()")
        return self._update

    @property
    def traced(self) -> TracedLoss:
        """The loss with its gradients, by graphs."""
        return self._traced

    def took(self, loss: float, size: int | None) -> None:
        """Count a step that was taken for this run, beside those of others."""
        self.in_a_row = 0
        self._elbos.append(self.data.elbo(loss, size))
        self.taken += 1

    @property
    def due(self) -> bool:
        """Whether it is time to :meth:`read`."""
        queues = self._update is not None and self._update.failed is not None
        return not queues or len(self._unread) >= _READ_EVERY

    def take(self, index: Tensor | None, batch: Batch) -> None:
        """Take a step; where several runs go together, when all of them have come to theirs."""
        if (taken := taken_by.get()) is not None:
            taken(self, index, batch)
        else:
            self.take_alone(index, batch)

    def take_alone(self, index: Tensor | None, batch: Batch) -> None:
        """Take a step.

        Args:
            index: rows of the data that are in the minibatch; None for all.
            batch: the minibatch.

        Raises:
            NonFiniteLossError: where the loss is not finite, or a gradient; here or, on a CUDA
                device, when it is read.
            ValueError: where nothing is to be learned.
        """
        try:
            self.prepare_factor()
            self.latest = index, batch
            size = batch.size
            if self._joint is not None and not self.data.whole:
                self._joint.use(self.data.source.share)
                size = self._joint.share.total
            start = _Start(self.taken + 1, size, index, batch, state.random_state())
            self._take(start, batch)
        except Exception:
            self._look()  # at steps before, one of which may have failed first
            raise

    def _take(self, start: _Start, batch: Batch) -> None:
        self.drop_gradients()
        carried = Carried(self.parameters, self.objective) if self._skips else None
        try:
            self._move(start, batch, carried)
        except NotFiniteError as error:
            if carried is not None:
                carried.restore()
            self._fail(error.what, start, error.sites, error.__cause__)
            # An eager step may have been broken off before its last draw, one of a graph was not.
            state.set_random_state(start.random_state)
            torch.manual_seed(int(torch.randint(2**62, ())))

    def _move(self, start: _Start, batch: Batch, carried: Carried | None) -> None:
        """Take a step; raise NotFiniteError where that is known at once."""
        loss, update = self._run(start, batch), self._ready()
        if self.seen is not None:
            self.seen(loss)
        failed = update.failed if self.taken else None  # the first step is looked at closely
        if failed is None:
            self._check(float(loss))
            self.in_a_row = 0
            self._elbos.append(self.data.elbo(float(loss), start.size))
        update(loss, traced=self._traced.mode != "eager")
        self.taken += 1
        if failed is not None:
            if carried is not None:
                carried.restore_where(failed)
            loss = torch.as_tensor(loss, dtype=torch.float64, device=failed.device)
            outcome = torch.stack([loss.detach().reshape(()), failed.double()])
            kept = start if self.data.source.streamed else replace(start, batch=None)
            self._unread.append((kept, outcome))

    def _ready(self) -> Update:
        """Return the update; parameters that were late exist now."""
        if self._update is not None:
            return self._update
        with self.data.rows(self.data.first_rows):
            self.parameters.find()
        return self._begin()

    def _run(self, start: _Start, batch: Batch) -> Any:
        """Return the loss of a step, with gradients at the parameters; explain a failure."""
        loss: Any = None
        error: Exception | None = None
        try:
            with self._using_rows(start.index):
                loss = self._traced(*batch.args, **batch.kwargs)
            self._ready()
        except (ValueError, RuntimeError) as raised:
            error = raised
        if self._joint is not None:
            loss, error = self._joint.total(loss, error, self._moving())
        if error is None:
            return loss
        self._look()
        # A distribution refuses NaN itself, before there is a loss.
        if sites := self._non_finite_sites(start):
            raise NotFiniteError("the loss", sites) from error
        error.add_note(f"in step {self.taken + 1} of training")
        if "more than 1 value per channel" in str(error):
            what = "a minibatch of 1 datum, which BatchNorm in training mode cannot normalize"
            advice = "pass drop_last=True (to a DataLoader), another batch_size, or more data"
            raise ValueError(f"step {start.number} has {what}; {advice}") from error
        raise error

    def _moving(self) -> list[Tensor]:
        """Return what has gradients to be added up: of a table, the rows of the minibatch."""
        rows, source, trained = self._rows, self.data.source, self.parameters.trained
        if rows is None or rows.leaf is None or source.index is None:
            return trained
        rows.widen(source.index, source.share)
        return [p for p in trained if p is not rows.table] + [rows.leaf]

    def _using_rows(self, index: Tensor | None) -> contextlib.AbstractContextManager[None]:
        """Give the guide the rows of a minibatch: alone, where they alone are to move."""
        rows = self._rows
        if rows is None or index is None or not rows.serves(index):
            return self.data.rows(index)
        return rows.taking(index)

    def read(self) -> list[MinibatchELBO]:
        """Return the ELBOs of the steps since the last call.

        Raises:
            NonFiniteLossError: for the first that is not finite, or whose gradient is not.
        """
        self._look()
        found, self._elbos = self._elbos, []
        return found

    def _look(self) -> None:
        """Wait for the device, and read the outcomes of the steps since."""
        if not self._unread:
            return
        outcomes = torch.stack([outcome for _, outcome in self._unread]).tolist()
        unread, self._unread = self._unread, []  # an interrupted wait has lost nothing
        for (start, _), (loss, failed) in zip(unread, outcomes, strict=True):
            if failed:
                what = "the gradient" if math.isfinite(loss) else f"the loss ({loss})"
                self._fail(what, start)
                continue
            self.in_a_row = 0
            self._elbos.append(self.data.elbo(loss, start.size))

    def _check(self, loss: float) -> None:
        """Raise an error for a loss or gradients that are not finite, or where there are none."""
        if not math.isfinite(loss):
            raise NotFiniteError(f"the loss ({loss})")
        health = self._traced.health if self._joint is None else self._joint.health
        if self.taken and health is not None and math.isfinite(float(health)):
            return
        gradients = [] if self._update is None else self._update.gradients()
        if not gradients:
            what = "the loss has no gradient by any parameter of the optimizer. Pyro's losses need"
            raise ValueError(f"{what} modules registered, by pyro.module or as a PyroModule")
        if not all_finite(gradients):
            raise NotFiniteError("the gradient")

    def _fail(
        self,
        what: str,
        start: _Start,
        sites: list[str] | None = None,
        cause: BaseException | None = None,
    ) -> None:
        """Count a step that is not finite as skipped, or raise NonFiniteLossError."""
        if not self._skips or not self.parameters.finite():
            raise self._failure(what, start, sites) from cause
        self.in_a_row += 1
        if self.in_a_row > _MAX_SKIPPED:
            error = self._failure(what, start, sites)
            error.add_note(f"on_nan='skip': the {_MAX_SKIPPED} steps before it were skipped too")
            raise error from cause
        self.skipped += 1
        if self.skipped == 1:  # to find the sites is to run the step again
            sites = self._non_finite_sites(start) if sites is None else sites
            where = f", at sites {', '.join(sites)}" if sites else ""
            text = "%s of step %d is not finite%s: it is skipped, and so are others like it"
            logger.warning(text, what, start.number, where)
        self._elbos.append(MinibatchELBO(math.nan, 0))
        self.drop_gradients()
        self.taken = max(self.taken, start.number)

    def _non_finite_sites(self, start: _Start) -> list[str]:
        """Return the sites whose term is not finite, rerunning the step from its random state."""
        found = self.processes.gather(self._own_non_finite_sites(start))
        return list(dict.fromkeys(site for sites in found for site in sites))

    def _own_non_finite_sites(self, start: _Start) -> list[str]:
        """Return those of this process's share."""
        source = self.data.source
        batch = source.minibatch(start.index) if start.batch is None else start.batch
        after, carried = state.random_state(), Carried(self.parameters, self.objective)
        state.set_random_state(start.random_state)
        try:
            with self.data.rows(start.index), self._joint or contextlib.nullcontext():
                return non_finite_sites(self.model, self.guide, source.drawn(batch))
        except (ValueError, RuntimeError):
            return []  # it fails as the step did: the caller's error is about that one
        finally:
            carried.restore()  # running means, which this run would make NaN
            state.set_random_state(after)

    def _failure(
        self, what: str, start: _Start, sites: list[str] | None = None
    ) -> NonFiniteLossError:
        """Return the error of a step, with finite parameters left in place."""
        sites = self._non_finite_sites(start) if sites is None else sites
        self.taken, kept = start.number - 1, "the step before"
        self.drop_gradients()
        if not self.parameters.finite():
            # The update before this step overflowed, or a running mean in this one.
            self.parameters.restore(self.last)
            kept = f"the end of epoch {self.epochs}" if self.epochs else "the start"
        return NonFiniteLossError.of(what, start.number, sites, kept)
