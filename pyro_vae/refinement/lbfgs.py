"""Many small deterministic problems at once: L-BFGS with a problem in each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# From rows [n, d] to the value of each, [n]; or to that and its gradient, [n, d].
Objective = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]

_HISTORY = 10
_TRIALS = 30  # of the step length
_DECREASE, _CURVATURE = 1e-4, 0.9  # the weak Wolfe conditions


class Minimum(NamedTuple):
    """Where rows ended.

    Attributes:
        rows: [n, d].
        promised: the fall that the last direction of each promised to first order, [n], which is
            small at an optimum and not where a row runs away.
        steps: the iterations taken.
    """

    rows: Tensor
    promised: Tensor
    steps: int


def minimize_rows(objective: Objective, start: Tensor, max_steps: int) -> Minimum:
    """Minimise every row's objective by itself, all rows in one evaluation.

    L-BFGS (Nocedal & Wright 2006, algorithm 7.4) with a step length of each row by
    bisection until the weak Wolfe conditions hold (Lewis & Overton 2013). No row ends
    above its start. A value that is not finite counts as too long a step.

    Args:
        objective: from [n, d] to [n], or to that and its gradient [n, d]; each value depends on
            its own row alone.
        start: [n, d], where the objective is finite.
        max_steps: iterations at most.

    Example:
        >>> import torch
        >>> minimize_rows(lambda x: (x - 3).square().sum(1), torch.zeros(2, 1), 50).rows
        tensor([[3.],
                [3.]])
    """
    x = start.detach()
    value, slope_at = _value_and_gradient(objective, x)
    steps, changes = list[Tensor](), list[Tensor]()
    done = torch.zeros_like(value, dtype=torch.bool)
    promised = torch.full_like(value, torch.inf)
    taken = 0
    while taken < max_steps and not bool(done.all()):
        direction, before = _direction(slope_at, steps, changes), done
        slope = _dot(slope_at, direction)
        if steps:  # a fall below the rounding of the objective cannot be seen
            done |= -slope < torch.finfo(x.dtype).eps * value.abs()
        uphill = ~(slope < 0)
        direction = torch.where(uphill[:, None], -slope_at, direction)
        slope = torch.where(uphill, -_dot(slope_at, slope_at), slope)
        promised = torch.where(before, promised, -slope)
        first = 1 / slope_at.abs().sum(1).clamp_min(torch.finfo(x.dtype).tiny)
        length = torch.ones_like(value) if steps else first.clamp_max(1.0)
        length = torch.where(done | (slope == 0), 0.0, length)
        new, new_value, new_slope_at = _search(objective, x, value, direction, slope, length)
        better = new_value < value
        new = torch.where(better[:, None], new, x)
        new_slope_at = torch.where(better[:, None], new_slope_at, slope_at)
        steps = [*steps, new - x][-_HISTORY:]
        changes = [*changes, new_slope_at - slope_at][-_HISTORY:]
        x, value, slope_at = new, torch.where(better, new_value, value), new_slope_at
        # A row that no step improves has reached the rounding of its objective.
        done |= ~better
        taken += 1
    return Minimum(x, promised, taken)


def _search(
    objective: Objective, x: Tensor, value: Tensor, direction: Tensor, slope: Tensor, length: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best trial of each row: its place, value and gradient."""
    best, best_value, best_gradient = x, value, torch.zeros_like(x)
    low, high = torch.zeros_like(length), torch.full_like(length, torch.inf)
    settled = length == 0
    for _ in range(_TRIALS):
        trial = x + length[:, None] * direction
        found, gradient = _value_and_gradient(objective, trial)
        enough = found <= value + _DECREASE * length * slope
        better = (found < best_value) & ~settled & torch.isfinite(gradient).all(1)
        best = torch.where(better[:, None], trial, best)
        best_value = torch.where(better, found, best_value)
        best_gradient = torch.where(better[:, None], gradient, best_gradient)
        flat = _dot(gradient, direction) >= _CURVATURE * slope
        settled = settled | (enough & flat)
        if bool(settled.all()):
            break
        high = torch.where(settled | enough, high, length)
        low = torch.where(~settled & enough, length, low)
        longer = torch.where(torch.isinf(high), 2 * length, (low + high) / 2)
        length = torch.where(settled, length, longer)
    return best, best_value, best_gradient


def _direction(gradient: Tensor, steps: list[Tensor], changes: list[Tensor]) -> Tensor:
    """Return minus the inverse Hessian's estimate times the gradient, row by row."""
    q, kept, weights = gradient, [], []
    finfo = torch.finfo(gradient.dtype)
    scale = torch.ones_like(gradient[:, 0])
    for step, change in zip(steps, changes, strict=True):
        curvature, length = _dot(step, change), _dot(step, step).sqrt().clamp_min(finfo.tiny)
        # A pair without positive curvature says nothing of the inverse Hessian.
        good = curvature > finfo.eps * _dot(change, change).sqrt() * length
        kept.append(torch.where(good, 1 / torch.where(good, curvature, 1.0), 0.0))
        scale = torch.where(good, curvature / _dot(change, change), scale)
    for step, change, inverse in reversed(list(zip(steps, changes, kept, strict=True))):
        weights.append(inverse * _dot(step, q))
        q = q - weights[-1][:, None] * change
    q = scale[:, None] * q
    for step, change, inverse, weight in zip(steps, changes, kept, reversed(weights), strict=True):
        q = q + (weight - inverse * _dot(change, q))[:, None] * step
    return -q


def _value_and_gradient(objective: Objective, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        found = objective(x)
        if not isinstance(found, Tensor):
            return found
        (gradient,) = torch.autograd.grad(found.sum(), [x])
    return found.detach(), gradient


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)
