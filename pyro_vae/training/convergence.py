"""When stochastic training has converged: stages of falling rates, averaged and compared."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pyro_vae.diagnostics.convergence import split_rhat
from pyro_vae.programs import state
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.guide_kinds import RowGuide
from pyro_vae.programs.messages import as_number
from pyro_vae.schedules import Cyclical, Schedule
from pyro_vae.training.callbacks import Callback, Step
from pyro_vae.training.fit_result import FitStop
from pyro_vae.training.steps import TrainingSteps
from pyro_vae.training.traced_loss import TracedLoss

logger = logging.getLogger(__name__)

_EVALUATIONS = 32  # of each setting of the parameters
_BLOCKS = 8  # of steps, of equal length, whose averages are held; the last half is looked at
_FOLLOWED = 8  # minibatches whose ELBOs are followed from step to step
_DRAWS = 512  # of each that are held, at most
_RHAT = 1.2  # of iterates that are taken for stationary

# From several settings of the parameters to the ELBO of each on the same minibatches and random
# numbers, [settings, evaluations], in nats per datum; the number says which evaluations.
Scores: TypeAlias = Callable[[Sequence[Sequence[Tensor]], int], Tensor]
Verdict: TypeAlias = Literal["go on", "lower", "converged"]


@dataclass
class Blocks:
    """Averages of tensors over blocks of steps of equal length, in bounded memory.

    Where there are 8, neighbours are joined, and blocks are twice as long from then on.

    Args:
        length: steps of a block at first.

    Attributes:
        means: of the whole blocks, in order.
        count: steps in the block that is not whole.
    """

    length: int
    means: list[list[Tensor]] = field(default_factory=list)
    count: int = 0
    _now: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def add(self, tensors: Sequence[Tensor]) -> bool:
        """Take up a step; return whether it makes a block whole."""
        if len(self.means) == _BLOCKS:
            pairs = zip(self.means[::2], self.means[1::2], strict=True)
            self.means = [_mean(pair) for pair in pairs]
            self.length *= 2
        if not self.count:
            self._now = [tensor.detach().clone() for tensor in tensors]
        else:
            weight = 1 / (self.count + 1)
            for mean, tensor in zip(self._now, tensors, strict=True):
                mean.lerp_(tensor.detach(), weight)
        self.count += 1
        if self.count < self.length:
            return False
        self.means.append(self._now)
        self.count = 0
        return True


def _mean(settings: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return the mean of several settings of the same tensors; to the bit where they are equal."""
    found = []
    for first, *others in zip(*settings, strict=True):
        found.append(first + torch.stack([o - first for o in others]).sum(0) / len(settings))
    return found


@dataclass
class Followed:
    """Numbers that are read off the iterates every few steps, in bounded memory.

    Once 512 rows are held, every second one is dropped, and rows are twice as far apart.

    Attributes:
        stride: steps from row to row.
        rows: of numbers.
        steps: so far.
    """

    stride: int
    rows: list[Tensor] = field(default_factory=list)
    steps: int = 0

    def add(self, read: Callable[[], Tensor]) -> None:
        """Take up a step."""
        self.steps += 1
        if self.steps % self.stride:
            return
        self.rows.append(read())
        if len(self.rows) >= _DRAWS:
            self.rows, self.stride = self.rows[1::2], 2 * self.stride

    def stationary(self, steps: int) -> bool:
        """Return whether the last steps are draws of one distribution, by the R-hat of halves."""
        count = steps // self.stride
        if count < 8 or count > len(self.rows):
            return False
        draws = torch.stack(self.rows[-count:]).double().cpu().numpy()
        return not (split_rhat(draws[np.newaxis]) >= _RHAT).any()  # nan where one stands still


@dataclass
class Stages:
    """Whether training has converged, step by step: the rule of :class:`Converged`.

    Args:
        tensors: what is trained, and buffers to average with it.
        scores: the ELBO of several settings of them.
        follow: the ELBOs of the present one on fixed minibatches and random numbers.
        tolerance: nats per datum.
        level: of a false alarm.
        factor: on the learning rate, from stage to stage.
        window: steps of a stage at least.

    Attributes:
        average: of the last half of a stage, since it was last found to be stationary.
        left: what is left to gain, in nats per datum, and its standard error.
        stage: counted from 0.
    """

    tensors: Sequence[Tensor]
    scores: Scores
    follow: Callable[[], Tensor]
    tolerance: float
    level: float = 0.05
    factor: float = 0.5
    window: int = 400
    average: list[Tensor] = field(default_factory=list)
    left: tuple[float, float] = (math.nan, math.nan)
    stage: int = 0

    def __post_init__(self) -> None:
        self._before: list[Tensor] = []  # the average of the stage before
        self._least = self.window  # steps of a stage before it is looked at
        self._checks = 0
        self._begin()

    def _begin(self) -> None:
        """Begin a stage."""
        self._followed = Followed(max(1, self.window // 32))
        self._blocks = Blocks(-(-self.window // _BLOCKS))
        self._steps = 0

    def add(self) -> Verdict:
        """Take up a step that was taken; say what follows from it."""
        self._steps += 1
        self._followed.add(self.follow)
        whole = self._blocks.add(self.tensors)
        count = len(self._blocks.means)
        if not whole or count not in (_BLOCKS * 3 // 4, _BLOCKS) or self._steps < self._least:
            return "go on"
        half = count // 2
        if not self._followed.stationary(half * self._blocks.length):
            return "go on"
        blocks = self._blocks.means[-half:]
        self.average = _mean(blocks)
        return self._compare(blocks) if self._before else self._lower()

    def _compare(self, blocks: list[list[Tensor]]) -> Verdict:
        """Compare the average of stationary iterates with that of the stage before."""
        self._checks += 1
        elbos = self.scores([self.average, self._before, *blocks], self._checks).double().cpu()
        bias = (elbos[0] - elbos[1]) / (1 / self.factor - 1)
        by_block = (elbos[0] - elbos[2:]).mean(1) / (len(blocks) - 1)
        bias_error, noise_error = (
            float(found.std() / math.sqrt(len(found))) for found in (bias, by_block)
        )
        gain = max(float(bias.mean()), 0.0)
        self.left = gain + max(float(by_block.mean()), 0.0), math.hypot(bias_error, noise_error)
        z = NormalDist().inv_cdf(1 - self.level)
        if gain + z * bias_error > self.tolerance / 2:
            return self._lower()
        # Where noise is left alone, more steps at this rate mend it.
        return "go on" if self.left[0] + z * self.left[1] > self.tolerance else "converged"

    def _lower(self) -> Verdict:
        self._before, self._least = self.average, max(self._steps, self.window)
        self._begin()
        self.stage += 1
        return "lower"

    def state_dict(self) -> dict[str, Any]:
        """Return all that steps have left behind."""
        return {
            "blocks": dict(vars(self._blocks)),
            "followed": dict(vars(self._followed)),
            **{name: getattr(self, name) for name in _OF_STAGES},
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from it."""
        device = self.tensors[0].device
        for name in _OF_STAGES:
            setattr(self, name, _on(device, saved[name]))
        vars(self._followed).update(_on(device, saved["followed"]))
        vars(self._blocks).update(_on(device, saved["blocks"]))


_OF_STAGES = ("average", "left", "stage", "_before", "_least", "_checks", "_steps")


def _on(device: torch.device, value: Any) -> Any:
    """Return a value of a checkpoint with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _on(device, item) for name, item in value.items()}
    return type(value)(_on(device, item) for item in value) if isinstance(value, list) else value


class Converged(Callback):
    r"""Ends training when no more than a tolerance is left to gain; given to ``fit`` as ``stop``.

    A constant learning rate keeps the iterates moving about the optimum, so that a flat ELBO says
    little. Training goes in stages, each at half of the learning rate of the one before. A stage
    lasts until the last half of its steps is stationary: the ELBOs of 8 fixed minibatches, on fixed
    random numbers, all have a split R-hat below 1.2. (Of parameters it would often never be: those
    of a network drift for ever along directions that change nothing.) The average of these
    iterates, :math:`\bar\lambda_k`, is where the next stage starts. What is left to gain then is
    taken to be

    .. math::
        \frac{L(\bar\lambda_k) - L(\bar\lambda_{k-1})}{1 / f - 1}
        + \frac{1}{B (B - 1)} \sum_{b=1}^B \big(L(\bar\lambda_k) - L(\bar\lambda_{k,b})\big)

    nats per datum, with L the ELBO, f the factor on the rate, and :math:`\bar\lambda_{k,b}` the
    averages of the 3 or 4 blocks of steps that :math:`\bar\lambda_k` is the mean of. The first part
    is the bias of the rate, which falls at least as the rate does; the second one is the noise of
    the average. All ELBOs are of 32 minibatches, on common random numbers. Where the sum and its
    one-sided interval are within the tolerance, training ends, and model and guide get the last
    average. Where the first part is not, the rate is lowered; where the second one is not, the
    stage goes on.

    False alarms among 1,000 runs whose optimum is known are counted in the documentation, under
    Benchmarks. No rule can see a direction that moves so slowly that it seems to stand still.

    It holds some ten copies of the parameters, and 32 minibatches of a loader, in checkpoints too;
    and adds about a third to the time of a step.
    Buffers, such as running means, are averaged too.

    Args:
        tolerance: nats per datum, above 0.
        level: of the one-sided interval; of false alarms, about.
        factor: on the learning rate, in (0, 1).
        window: steps of a stage at least.

    Attributes:
        left: what is left to gain, in nats per datum, and its standard error.
        rates: of the stages so far, as factors on the first one.

    Raises:
        ValueError: for a number outside of its range.

    References:
        Welandawe, Andersen, Vehtari & Huggins (2022). A framework for improving the reliability of
        black-box variational inference, whose stages, averages and R-hat these are.

    Example:
        >>> import pyro_vae as pv
        >>> stop = pv.Converged(tolerance=0.01)  # pv.fit(..., max_steps=100_000, stop=stop)
        >>> stop.tolerance
        0.01
    """

    reads_loss = False
    stopped_by: FitStop = "converged"
    done = False

    def __init__(
        self,
        tolerance: float = 0.01,
        *,
        level: float = 0.05,
        factor: float = 0.5,
        window: int = 400,
    ) -> None:
        for name, value, least, most in (
            ("tolerance", tolerance, 0.0, math.inf),
            ("level", level, 0.0, 0.5),
            ("factor", factor, 0.0, 1.0),
            ("window", window, 15, math.inf),
        ):
            if not least < as_number(name, value) < most:
                raise ValueError(f"{name}={value!r}: a number between {least} and {most} is needed")
        self.tolerance, self.level, self.factor, self.window = tolerance, level, factor, window
        self._stages: Stages | None = None
        self._traced: TracedLoss | None = None  # the loss, without gradients
        self._steps: TrainingSteps | None = None
        self._saved: Mapping[str, Any] = {}
        self._rows: list[Tensor] = []  # of minibatches that are followed
        self._recent: list[tuple[Tensor | None, Batch]] = []  # of a loader, which are kept

    @property
    def left(self) -> tuple[float, float]:
        """What is left to gain, in nats per datum, and its standard error; nan where not known."""
        return (math.nan, math.nan) if self._stages is None else self._stages.left

    def begin(self, steps: TrainingSteps) -> None:
        """Watch these steps of training; called by ``fit``.

        Raises:
            ValueError: for cycles of the latent terms without an end, and for a table of rows that
                move in minibatches.
        """
        guide, data = steps.guide, steps.data
        rows = guide.num_data if isinstance(guide, RowGuide) and not data.whole else 0
        if data.batch_size < rows:
            what = "averages whole tables at each step, and a LocalGuide's rows move in minibatches"
            advice = "pyro_vae.refine says of each row whether it has converged"
            raise ValueError(f"stop: pv.Converged {what}; {advice}")
        schedule = steps.schedule
        if isinstance(schedule, Cyclical) and schedule.cycles is None:
            raise ValueError(f"stop: {schedule!r} has no end, so that nothing converges under it")
        self._steps, self._stages, self.done = steps, None, False
        self._rows, self._recent = [], []
        how = "replay" if steps.compile == "auto" else steps.compile
        self._traced = TracedLoss(
            *steps.pair, steps.loss.loss, compile=how, modes=False, owners=(steps.loss,)
        )

    def _watched(self, steps: TrainingSteps) -> Stages:
        """Return the stages, made at the first step: then all parameters are there."""
        if self._stages is None:
            floats = [b for b in steps.parameters.buffers if b.is_floating_point()]
            self._stages = Stages(
                [*steps.parameters.trained, *floats],
                self._scores,
                self._follow,
                **{name: getattr(self, name) for name in _SETTINGS},
            )
            if self._saved:
                self._stages.load_state_dict(self._saved["stages"])
                self._saved = {}
        return self._stages

    def on_step(self, step: Step) -> bool:
        """Take up a step; lower the rate, or end training at the average."""
        steps = self._steps
        if steps is None:
            raise ValueError(
                "pv.Converged is no callback: give it to fit as stop=pv.Converged(...)"
            )
        schedule = steps.schedule
        if isinstance(schedule, Schedule) and schedule.full_at(step.step - 1) != step.step - 1:
            self._stages = None
            return False  # the loss is not yet the one that is to converge
        if steps.data.source.streamed and len(self._recent) < _EVALUATIONS:
            self._recent.append(steps.latest)
            if len(self._recent) < _EVALUATIONS:
                return False
        stages = self._watched(steps)
        verdict = stages.add()
        if verdict == "go on":
            return False
        _put(stages.tensors, stages.average)
        self.done = verdict == "converged"
        if not self.done:
            for group in steps.optimizer.param_groups:
                group["lr"] = group["lr"] * self.factor
        text = "after step %d the iterates are stationary; left to gain: %.2g ± %.1g nats; %s"
        what = "converged" if self.done else "the learning rate is lowered"
        logger.info(text, step.step, *stages.left, what)
        return self.done

    def _follow(self) -> Tensor:
        """Return the ELBOs of the present parameters on the first minibatches that are drawn."""
        return self._elbos(0, _FOLLOWED)

    def _scores(self, settings: Sequence[Sequence[Tensor]], number: int) -> Tensor:
        """Return the ELBO of each setting on the same minibatches, [settings, evaluations]."""
        if self._stages is None:
            raise RuntimeError("there are no steps")
        tensors = self._stages.tensors
        held, found = [tensor.detach().clone() for tensor in tensors], []
        try:
            for setting in settings:
                _put(tensors, setting)
                found.append(self._elbos(number, _EVALUATIONS))
        finally:
            _put(tensors, held)
        return torch.stack(found)

    def _elbos(self, number: int, count: int) -> Tensor:
        """Return the ELBOs of so many minibatches, each on random numbers of its own."""
        steps, traced = self._steps, self._traced
        if steps is None or traced is None:
            raise RuntimeError("there are no steps")
        data, factor, found = steps.data, steps.factor, []
        steps.set_factor(1.0)
        running = state.evaluation(steps.model, steps.guide)
        with torch.no_grad(), state.preserved_rng(data.batch.device), running:
            torch.manual_seed(number)
            for index, batch in self._minibatches(steps, number, count):
                drawn = data.source.drawn(batch)
                with data.rows(index):
                    loss = torch.as_tensor(traced(*drawn.args, **drawn.kwargs))
                # A number per datum: that of the same loss is the same for all.
                found.append(loss.detach().double() * data.elbo(1.0, batch.size).value)
        steps.set_factor(factor)
        return torch.stack(found)

    def _minibatches(
        self, steps: TrainingSteps, number: int, count: int
    ) -> Sequence[tuple[Tensor | None, Batch]]:
        """Return minibatches; for number 0 the same ones each time. Of a loader, those it gave."""
        data = steps.data
        if data.source.streamed:
            return self._recent[:count]
        if data.whole or data.num_data is None:
            return [(None, data.source.minibatch(None))] * count
        if number or not self._rows:
            generator = torch.Generator().manual_seed(number)
            orders = (torch.randperm(data.num_data, generator=generator) for _ in range(count))
            rows = [order[: data.batch_size].to(data.batch.device) for order in orders]
            self._rows = self._rows if number else rows
        else:
            rows = self._rows
        return [(index, data.source.minibatch(index)) for index in rows]

    def state_dict(self) -> dict[str, Any]:
        """Return the stages so far."""
        recent = {"recent": [(b.args, b.kwargs, b.has_rows) for _, b in self._recent]}
        if self._stages is None:
            return {**self._saved, **recent}
        settings = {name: getattr(self, name) for name in _SETTINGS}
        return {"stages": self._stages.state_dict(), "done": self.done, **settings, **recent}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from them; with a smaller tolerance, also where they had converged."""
        if self._steps is not None:
            device = self._steps.data.batch.device
            recent = [Batch(*parts).to(device) for parts in saved.get("recent", ())]
            self._recent = [(None, batch) for batch in recent]
        self._saved = saved if "stages" in saved else {}
        if self._saved:
            left = saved["stages"]["left"]
            self.done = saved["done"] and saved["tolerance"] <= self.tolerance
            logger.debug("%s are left to gain", left)


@torch.no_grad()
def _put(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


_SETTINGS = ("tolerance", "level", "factor", "window")
