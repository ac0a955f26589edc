"""Annealed importance sampling: log weights of chains from a base density to the posterior.

Chains run with kernels that a pilot of its own random numbers has tuned, so that the weights are
exactly unbiased: a kernel that learns from its own chains would not leave the densities invariant.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from pyro_vae.programs.purposes import Purpose
from pyro_vae.refinement.blocks import Block
from pyro_vae.sampling.density import Start, TemperedDensity
from pyro_vae.sampling.far_modes import is_missed
from pyro_vae.sampling.hmc import Kernel, Point
from pyro_vae.sampling.prepare import Ready
from pyro_vae.sampling.streams import Stream

Schedule: TypeAlias = Literal["adaptive", "linear", "sigmoidal"]

_TARGET = 0.7  # acceptance
_GAIN = 0.3  # of a step size's logarithm, for each unit that acceptance is off
_MEMORY = 0.9  # of the pilot's running variance of coordinates
_STEPPED = 3  # leapfrog steps of a transition
_STEEP = 4.0  # of the sigmoidal schedule (Grosse, Ghahramani & Adams 2015)
_LOOKED_AT = 64  # draws of the base that tell how wide it is beside the posterior
_NARROW = 0.3  # times as wide as the posterior: a base that is less is widened
_SMALLEST = 1e-3  # the share of the widest spread that a part of the way counts for at least


@dataclass(frozen=True, slots=True)
class Path:
    """Powers from 0 to 1, and the kernel at each one.

    Attributes:
        powers: [T + 1, n], float64.
        steps: step sizes at each, [T + 1, n].
        scales: of coordinates, [T + 1, n, D].
    """

    powers: Tensor
    steps: Tensor
    scales: Tensor

    def kernel(self, number: int) -> Kernel:
        """Return the kernel at a power by its number."""
        return Kernel(self.steps[number], self.scales[number], _STEPPED)


@dataclass(frozen=True)
class Annealer:
    """Annealed chains of a block of n data.

    From a base that is a point beside the posterior no number of steps spreads the chains: to the
    last power but one they hold together, their weights are nearly equal, and all are too low. So a
    guide that is less than 0.3 times as wide as the posterior, in a coordinate, is widened there.

    Args:
        ready: the pair.
        rows: of the block.
        block: of the data.
        start: "guide" or "prior".
        num_chains: C.
        num_steps: T, powers after 0.
        schedule: "linear" and "sigmoidal" powers, or "adaptive": as many as the log ratio spreads
            on each part of the way, datum by datum, which holds the conditional effective sample
            size constant.
    """

    ready: Ready
    rows: slice
    block: Block
    start: Start
    num_chains: int
    num_steps: int
    schedule: Schedule

    def density(self) -> TemperedDensity:
        """Return the densities that chains move in."""
        calls = 2 * self.num_steps * _STEPPED
        table = self.ready.table[self.rows]
        return TemperedDensity(self.block, table, self.start, calls, self._wider)

    @functools.cached_property
    def _wider(self) -> tuple[Tensor, ...]:
        """The guide's middle and how many times it is widened, [n, D] each; none from the prior.

        Of the best Gaussian the mean curvature of -log p(x, z) over its draws is 1 / s^2 (Opper &
        Archambeau 2009, equation 8), which is measured by the regression of gradients on draws.
        """
        if self.start == "prior":
            return ()
        ready, rows, centre = self.ready, self.rows, self.ready.base_centre(self.rows)
        shape = _LOOKED_AT, rows.stop - rows.start, ready.blocks.num_noise
        stream = Stream(ready.evaluator.seed, Purpose.ANNEALED_WIDTH, rows.start)
        draws = ready.base_draws(rows, stream.normal(ready.table.new_empty(shape)))
        point = TemperedDensity(self.block, ready.table[rows], "guide", 1)(draws)
        away = draws.double() - draws.double().mean(0)
        of_base = (point.base_slope.double() * away).mean(0)
        of_posterior = of_base + (point.ratio_slope.double() * away).mean(0)
        share = (of_posterior / of_base).nan_to_num(nan=1.0)
        most = self.block.prior_scale.double() / away.square().mean(0).sqrt()
        # Where the curvature has the other sign the posterior has no width here but the prior's.
        width = torch.where(share > 0, share.clamp_min(1e-300).rsqrt(), torch.inf)
        width = torch.minimum(width, most).clamp_min(1.0)
        return centre, torch.where(share < _NARROW**2, width, 1.0).to(centre)

    def first(self, *key: int) -> Tensor:
        """Return draws of the density of power 0, [C, n, D]."""
        ready, rows, key = self.ready, self.rows, (Purpose.ANNEALED_STARTS, self.rows.start, *key)
        if self.start == "prior":
            return ready.prior_draws(rows, self.num_chains, key)
        shape = self.num_chains, rows.stop - rows.start, ready.blocks.num_noise
        stream = Stream(ready.evaluator.seed, *key)
        draws = ready.base_draws(rows, stream.normal(ready.table.new_empty(shape)))
        centre, width = self._wider
        return centre + width * (draws - centre)

    def is_hopeless(self, wave: int = 1) -> bool:
        """Whether no chain of a wave begins where the model has a density: every weight is zero."""
        density = TemperedDensity(
            self.block, self.ready.table[self.rows], self.start, 1, self._wider
        )
        return not bool(density(self.first(wave)).ratio.isfinite().any())

    def path(self) -> Path:
        """Return powers and kernels, as a pilot has found them."""
        density = self.density()
        point = density(self.first(0))
        num_data = point.base.shape[1]
        powers = _powers("linear" if self.schedule == "linear" else "sigmoidal", self.num_steps)
        powers = powers.to(point.z.device).unsqueeze(1).expand(-1, num_data)
        stream = Stream(self.ready.evaluator.seed, Purpose.ANNEALED_PILOT, self.rows.start)
        log_step = torch.zeros_like(powers[0])
        variance = point.z.double().var(0)
        steps, scales, spreads = [log_step.exp()], [variance.sqrt()], [_spread(point)]
        for power in powers[1:]:
            variance = _MEMORY * variance + (1 - _MEMORY) * point.z.double().var(0)
            scale = variance.clamp_min(torch.finfo(torch.float32).tiny).sqrt()
            kernel = Kernel(log_step.exp(), scale.to(point.z), _STEPPED)
            point, acceptance, _ = kernel(density, point, power, stream)
            log_step = log_step + _GAIN * (acceptance.mean(0) - _TARGET)
            steps.append(log_step.exp())
            scales.append(scale)
            spreads.append(_spread(point))
        pilot = Path(powers, torch.stack(steps), torch.stack(scales).to(point.z))
        if self.schedule != "adaptive":
            return pilot
        return _even(pilot, torch.stack(spreads))

    def forward(
        self, path: Path, report: Callable[[int], object] = int, wave: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Return log weights of chains from the base to the posterior, and where they end.

        Args:
            path: powers and kernels, made without these chains.
            report: is told after each step how many data have made it.
            wave: of chains, from 1 on, which tells their random numbers from those of others.

        Returns:
            [C, n], float64; and coordinates, [C, n, D], which with these weights are draws of the
            posterior.
        """
        density = self.density()
        point = density(self.first(wave))
        stream = Stream(self.ready.evaluator.seed, Purpose.ANNEALED_FORWARD, self.rows.start, wave)
        log_weights = torch.zeros_like(point.base, dtype=torch.float64)
        for number in range(1, len(path.powers)):
            log_weights += _increment(path, number, point, -torch.inf)
            if number < len(path.powers) - 1:
                point, _, _ = path.kernel(number)(density, point, path.powers[number], stream)
            report(log_weights.shape[1])
        return log_weights, point.z

    def misses(self, log_weights: Tensor, z: Tensor) -> Tensor:
        """Return for which data what :meth:`forward` gave misses a mode, [n].

        By :func:`pyro_vae.sampling.far_modes.is_missed`; of chains from the prior none.
        """
        if self.start == "prior":
            return torch.zeros_like(log_weights[0], dtype=torch.bool)
        mass = log_weights.logsumexp(0) - math.log(len(log_weights))
        weights = log_weights.softmax(0).nan_to_num(0.0)
        return is_missed(self.ready, self.rows, self.block, z, mass, weights, self.first(1))

    def backward(
        self, path: Path, z: Tensor, report: Callable[[int], object] = int, moves: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Return log weights of chains from draws of the posterior to the base, [C, n], float64.

        And which of them have left their draw before they went, [C, n].

        Args:
            path: as for :meth:`forward`.
            z: unconstrained coordinates drawn from the posterior, [C, n, D].
            report: as for :meth:`forward`.
            moves: transitions at the posterior before that. They leave each chain's start a draw
                of it, and chains that start at one draw forget it.
        """
        density = self.density()
        point = density(z)
        stream = Stream(self.ready.evaluator.seed, Purpose.ANNEALED_BACKWARD, self.rows.start)
        for _ in range(moves):
            point, _, _ = path.kernel(-1)(density, point, path.powers[-1], stream)
        moved = (point.z != z).any(-1)
        log_weights = torch.zeros_like(point.base, dtype=torch.float64)
        for number in range(len(path.powers) - 1, 0, -1):
            if number < len(path.powers) - 1:
                point, _, _ = path.kernel(number)(density, point, path.powers[number], stream)
            log_weights += _increment(path, number, point, torch.inf)
            report(log_weights.shape[1])
        return log_weights, moved


def _increment(path: Path, number: int, point: Point, unknown: float) -> Tensor:
    """Return what chains gain in log weight between two powers, [C, n].

    A ratio that is not finite is of a place that chains do not move to, where they may begin. What
    it counts as is ``unknown``: forward a weight w of zero, and backward a 1 / w of zero, so that
    the bound holds on its side.
    """
    ratio = point.ratio.double().nan_to_num(unknown, unknown, unknown)
    return (path.powers[number] - path.powers[number - 1]) * ratio


def _spread(point: Point) -> Tensor:
    """Return the standard deviation of the log ratio over chains, [n]."""
    return point.ratio.double().std(0)


def _powers(schedule: Schedule, num_steps: int) -> Tensor:
    """Return T + 1 powers from 0 to 1."""
    even = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    if schedule == "linear":
        return even
    sigmoid = torch.sigmoid(_STEEP * (2 * even - 1))
    return (sigmoid - sigmoid[0]) / (sigmoid[-1] - sigmoid[0])


def _even(pilot: Path, spread: Tensor) -> Path:
    """Return a path of as many powers, on whose parts the log ratio spreads alike.

    Args:
        pilot: a path.
        spread: standard deviation of the log ratio at each of its powers, [T + 1, n].
    """
    powers = pilot.powers
    spread = torch.nan_to_num(spread, nan=0.0, posinf=0.0)
    spread = torch.maximum(spread, _SMALLEST * spread.amax(0)).clamp_min(1e-12)
    # Smooth: a spread over few chains is a rough guess.
    width = max(1, len(spread) // 50)
    padded = torch.cat([spread[:1].expand(width, -1), spread, spread[-1:].expand(width, -1)])
    spread = padded.unfold(0, 2 * width + 1, 1).mean(-1)
    pieces = 0.5 * (spread[1:] + spread[:-1]) * powers.diff(dim=0)
    way = torch.cat([torch.zeros_like(pieces[:1]), pieces.cumsum(0)])
    wanted = torch.linspace(0, 1, len(powers), dtype=way.dtype, device=way.device).unsqueeze(1)
    wanted = (wanted * way[-1]).T.contiguous()
    right = torch.searchsorted(way.T.contiguous(), wanted).T.clamp(1, len(powers) - 1)
    below, above = way.gather(0, right - 1), way.gather(0, right)
    share = (wanted.T - below) / (above - below)
    found = torch.lerp(powers.gather(0, right - 1), powers.gather(0, right), share.clamp(0, 1))
    found[0], found[-1] = 0.0, 1.0
    nearest = torch.where(share > 0.5, right, right - 1)
    wide = nearest.unsqueeze(-1).expand(-1, -1, pilot.scales.shape[-1])
    return Path(found, pilot.steps.gather(0, nearest), pilot.scales.gather(0, wide))
