"""When stochastic training has converged: stages of falling learning rates, averaged and compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pyro_vae.diagnostics.convergence import split_rhat

_BLOCKS = 8  # of steps, of equal length, whose averages are held; the last half is looked at
_TRACKED = 64  # numbers among the parameters, beside the loss
_DRAWS = 512  # of each that are held, at most
_RHAT = 1.1  # of iterates that are taken for stationary

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
    """Return the mean of several settings of the same tensors."""
    return [torch.stack(list(same)).mean(0) for same in zip(*settings, strict=True)]


class Tracked:
    """Numbers followed from step to step: some of the parameters, and the loss.

    Of each tensor at least one, at random from a fixed seed, of small ones all. Every step at first;
    once 512 are held, every second one is dropped, and only every second step counts.

    Args:
        tensors: of the parameters.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        total = sum(tensor.numel() for tensor in tensors)
        self._places = []
        for tensor in tensors:
            size = tensor.numel()
            share = size if total <= _TRACKED else min(size, max(1, _TRACKED * size // total))
            places = torch.randperm(size, generator=generator)[:share]
            self._places.append(places.to(tensor.device))
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.rows: list[Tensor] = []
        self.stride, self.steps = 1, 0

    @torch.no_grad()
    def add(self, tensors: Sequence[Tensor], elbo: float) -> None:
        """Take up a step."""
        self.steps += 1
        if self.steps % self.stride:
            return
        pairs = zip(tensors, self._places, strict=True)
        found = [tensor.detach().reshape(-1)[places].double().cpu() for tensor, places in pairs]
        self.rows.append(torch.cat([*found, torch.tensor([elbo], dtype=torch.float64)]))
        if len(self.rows) >= _DRAWS:
            self.rows, self.stride = self.rows[1::2], 2 * self.stride

    def stationary(self, steps: int) -> bool:
        """Return whether the last steps are draws of one distribution, by the R-hat of halves."""
        rows = self.rows[-(steps // self.stride) :]
        if len(rows) < 8:
            return False
        found = split_rhat(torch.stack(rows).numpy()[np.newaxis])
        return not (found >= _RHAT).any()  # nan where a number stands still


@dataclass
class Stages:
    r"""Whether training has converged, step by step.

    Args:
        tensors: what is trained, and buffers to average with it.
        scores: the ELBO of several settings of them.
        tolerance: nats per datum.
        level: of a false alarm.
        factor: on the learning rate, from stage to stage.
        window: steps of a stage at least.

    Attributes:
        average: of the last half of the present stage, once it is stationary.
        left: what is left to gain, in nats per datum, and its standard error.
        stage: counted from 0.
    """

    tensors: Sequence[Tensor]
    scores: Scores
    tolerance: float
    level: float = 0.05
    factor: float = 0.5
    window: int = 200
    average: list[Tensor] = field(default_factory=list)
    left: tuple[float, float] = (math.nan, math.nan)
    stage: int = 0

    def __post_init__(self) -> None:
        self._z = NormalDist().inv_cdf(1 - self.level)
        self._before: list[Tensor] = []  # the average of the stage before
        self._least = self.window
        self._tracked = Tracked(self.tensors)
        self._blocks = Blocks(-(-self.window // _BLOCKS))
        self._steps = 0  # of this stage
        self._checks = 0

    def add(self, elbo: float) -> Verdict:
        """Take up a step that was taken; say what follows from it."""
        self._steps += 1
        self._tracked.add(self.tensors, elbo)
        whole = self._blocks.add(self.tensors)
        num_blocks = len(self._blocks.means)
        if not whole or num_blocks not in (_BLOCKS * 3 // 4, _BLOCKS) or self._steps < self._least:
            return "go on"
        half = num_blocks // 2
        if not self._tracked.stationary(half * self._blocks.length):
            return "go on"
        return self._compare(self._blocks.means[-half:])

    def _compare(self, blocks: list[list[Tensor]]) -> Verdict:
        """Compare the average of stationary iterates with that of the stage before."""
        self._checks += 1
        self.average = average = _mean(blocks)
        if not self._before:
            return self._lower(average)
        elbos = self.scores([average, self._before, *blocks], self._checks)
        settings = elbos.double()
        num_blocks = len(blocks)
        gain = settings[0] - settings[1]
        # The average of B blocks is as far below its expectation as this, in the mean.
        noise = (settings[0] - settings[2:]) / (num_blocks - 1)
        rest = gain / (1 / self.factor - 1)
        count = rest.shape[0]
        error = float(rest.std() / math.sqrt(count)) if count > 1 else 0.0
        by_block = noise.mean(1)
        noise_error = float(by_block.std() / math.sqrt(num_blocks))
        low, wobble = float(rest.mean()), float(by_block.mean())
        self.left = max(low, 0.0) + max(wobble, 0.0), math.hypot(error, noise_error)
        if max(low, 0.0) + self._z * error > self.tolerance / 2:
            return self._lower(average)
        if self.left[0] + self._z * self.left[1] > self.tolerance:
            return "go on"
        return "converged"

    def _lower(self, average: list[Tensor]) -> Verdict:
        self._before, self._least = average, self._steps
        self._tracked.clear()
        self._blocks = Blocks(-(-self.window // _BLOCKS))
        self._steps = 0
        self.stage += 1
        return "lower"
