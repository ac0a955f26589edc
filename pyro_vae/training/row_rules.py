"""Updates of optimizers by rows of a parameter, each with moments and a step count of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor, optim

from pyro_vae.guides.table_file import empty_beside, file_of, full_like

Group: TypeAlias = Mapping[str, Any]  # the settings of a parameter group
Moments: TypeAlias = dict[str, Tensor]  # what an optimizer keeps of rows, by name, each [B, ...]

STEP = "step"  # in an optimizer's state: of one number, or of one for each row


class RowRule(ABC):
    """What an optimizer does to a row that has a gradient, written for B rows at once.

    A subclass names the moments of a row, and says how a step moves it.

    Attributes:
        tensors_alone: whether a step is one of tensors alone, which a graph may repeat.
    """

    tensors_alone = True

    @abstractmethod
    def moments(self, group: Group) -> Mapping[str, float]:
        """Return the moments that the optimizer keeps, by name, each with its first value."""

    def counts(self, group: Group) -> bool:
        """Return whether a step depends on the number of steps before it."""
        return True

    @abstractmethod
    def step(self, group: Group, rows: Tensor, gradient: Tensor, state: Moments) -> Tensor:
        """Return rows [B, ...] after a step, and put what becomes of their state into ``state``.

        Args:
            group: settings.
            rows: parameters, [B, ...].
            gradient: of the loss by them, [B, ...].
            state: moments [B, ...], and under ``STEP`` the steps that each row has taken, [B].
        """

    def prepare(self, group: Group, table: Tensor, state: dict[str, Any]) -> None:
        """Give a parameter the state of its rows, where it has none yet; on disk beside one there.

        A state of all rows together, as after steps that took all of them, is that of each.
        """
        moments, on_disk = self.moments(group), file_of(table) is not None
        missing = [name for name in moments if not isinstance(state.get(name), Tensor)]
        if self.counts(group) and not has_row_state(state):
            # SGD does not count: where there is a momentum, there was a step.
            before = float(state.get(STEP, 0.0 if missing else 1.0))
            counts = torch.full((len(table),), before, dtype=torch.float32, device=table.device)
            state[STEP] = counts
        elif has_row_state(state) and state[STEP].device != table.device:  # as it was loaded
            state[STEP] = state[STEP].to(table.device)
        for name, value in moments.items():
            if name in missing:
                state[name] = full_like(table, value)
            elif on_disk and file_of(state[name]) is None:
                state[name] = empty_beside(table.detach()).copy_(state[name])


class _Adam(RowRule):
    r"""Adam, and AdamW, whose weights decay where a row takes a step (Loshchilov & Hutter 2019).

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        \theta \leftarrow \theta
        - \eta\, \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    with t the steps of the row itself (Kingma & Ba 2015).
    """

    def __init__(self, *, decoupled: bool = False) -> None:
        self._decoupled = decoupled

    def moments(self, group: Group) -> Mapping[str, float]:
        names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))
        return dict.fromkeys(names, 0.0)

    def step(self, group: Group, rows: Tensor, gradient: Tensor, state: Moments) -> Tensor:
        (beta1, beta2), rate = group["betas"], rate_of(group)
        # Before PyTorch 2.7, AdamW does not say so in its groups.
        if self._decoupled or group.get("decoupled_weight_decay", False):
            gradient = slope_of({**group, "weight_decay": 0}, rows, gradient)
            rows = rows * (1 - rate * group["weight_decay"])
        else:
            gradient = slope_of(group, rows, gradient)
        step = state[STEP] = state[STEP] + 1
        mean = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * gradient
        square = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * gradient.square()
        if group["amsgrad"]:
            square = state["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], square)
        # Of few steps, float32 would leave four digits of 1 - beta ** step.
        steps = step.double()
        size = spread(rate / (1 - beta1**steps), rows)
        root = square.sqrt() / spread((1 - beta2**steps).sqrt(), rows)
        return rows - size * mean / (root + group["eps"])


class _ClippedAdam(RowRule):
    """Pyro's Adam of gradients that are clipped entry by entry; its own step moves the rate."""

    tensors_alone = False

    def moments(self, group: Group) -> Mapping[str, float]:
        return {"exp_avg": 0.0, "exp_avg_sq": 0.0}

    def step(self, group: Group, rows: Tensor, gradient: Tensor, state: Moments) -> Tensor:
        beta1, beta2 = group["betas"]
        gradient = gradient.clamp(-group["clip_norm"], group["clip_norm"])
        gradient = slope_of(group, rows, gradient)
        step = state[STEP] = state[STEP] + 1
        mean = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * gradient
        spread_out = gradient - mean if group["centered_variance"] else gradient
        square = state["exp_avg_sq"] = (
            beta2 * state["exp_avg_sq"] + (1 - beta2) * spread_out.square()
        )
        steps = step.double()
        size = rate_of(group) * (1 - beta2**steps).sqrt() / (1 - beta1**steps)
        return rows - spread(size, rows) * mean / (square.sqrt() + group["eps"])


class _SGD(RowRule):
    """Stochastic gradient descent, with a momentum for each row."""

    def moments(self, group: Group) -> Mapping[str, float]:
        return {"momentum_buffer": 0.0} if group["momentum"] else {}

    def counts(self, group: Group) -> bool:
        # A row's first momentum is its gradient: what starts at zero, and nothing dampens, is that.
        return bool(group["momentum"] and group["dampening"])

    def step(self, group: Group, rows: Tensor, gradient: Tensor, state: Moments) -> Tensor:
        gradient = slope_of(group, rows, gradient)
        if momentum := group["momentum"]:
            kept = momentum * state["momentum_buffer"]
            if self.counts(group):
                later = kept + (1 - group["dampening"]) * gradient
                is_first = (state[STEP] == 0).reshape(-1, *[1] * (rows.ndim - 1))
                buffer = torch.where(is_first, gradient, later)
                state[STEP] = state[STEP] + 1
            else:
                buffer = kept + gradient
            state["momentum_buffer"] = buffer
            gradient = gradient + momentum * buffer if group["nesterov"] else buffer
        return rows - rate_of(group) * gradient


class _Adagrad(RowRule):
    """Adagrad (Duchi, Hazan & Singer 2011): its sums of squares are by row as they are."""

    def moments(self, group: Group) -> Mapping[str, float]:
        return {"sum": group["initial_accumulator_value"]}

    def step(self, group: Group, rows: Tensor, gradient: Tensor, state: Moments) -> Tensor:
        gradient = slope_of(group, rows, gradient)
        before = state[STEP].double()
        state[STEP] = state[STEP] + 1
        size = spread(rate_of(group) / (1 + before * group["lr_decay"]), rows)
        total = state["sum"] = state["sum"] + gradient.square()
        return rows - size * gradient / (total.sqrt() + group["eps"])


# By the very class: one that inherits may do something else.
RULES: Mapping[type[optim.Optimizer], RowRule] = {
    optim.Adam: _Adam(),
    optim.AdamW: _Adam(decoupled=True),
    optim.SGD: _SGD(),
    optim.Adagrad: _Adagrad(),
    ClippedAdam: _ClippedAdam(),
}


def rule_of(optimizer: optim.Optimizer) -> RowRule | None:
    """Return how an optimizer moves rows; None for one that is not known to move them alone."""
    if any(group.get("differentiable") for group in optimizer.param_groups):
        return None
    return RULES.get(type(optimizer))


def has_row_state(state: Mapping[str, Any]) -> bool:
    """Return whether a parameter's state counts the steps of each row."""
    step = state.get(STEP)
    return isinstance(step, Tensor) and step.ndim == 1


def slope_of(group: Group, rows: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient that a step goes down, that of a penalty on weights added."""
    gradient = -gradient if group.get("maximize") else gradient
    decay = group["weight_decay"]
    return gradient + decay * rows if decay else gradient


def rate_of(group: Group) -> Any:
    """Return the learning rate of now, a number or a tensor of no dimension."""
    rate = group["lr"]
    return rate.reshape(()) if isinstance(rate, Tensor) else rate


def spread(numbers: Tensor, rows: Tensor) -> Tensor:
    """Return a number for each row, [B], in the dtype of rows [B, ...] and broadcasting with it."""
    return numbers.to(rows.dtype).reshape(-1, *[1] * (rows.ndim - 1))
