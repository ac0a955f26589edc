"""The M-step of EM: the model's parameters raise an objective, or stay as they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_vae.training.optimizers import make_optimizer
from pyro_vae.training.parameters import Parameters, all_finite
from pyro_vae.training.result import HalfStep


class NonFiniteHalfStepError(ArithmeticError):
    """EM met an ELBO or a gradient that is not finite, and stopped.

    The model keeps the parameters of the last good half-step.

    Attributes:
        half_step: "E" or "M".
        iteration: counted from 1; 0 for the first E-step.
    """

    def __init__(self, message: str, half_step: HalfStep, iteration: int) -> None:
        super().__init__(message)
        self.half_step = half_step
        self.iteration = iteration


class MStep:
    """Raises an objective in the model's parameters, or leaves them alone.

    Args:
        parameters: of the model.
        optim: as in :func:`pyro_vae.fit`; None for L-BFGS.
        steps: of the optimizer, at most.
    """

    def __init__(self, parameters: Parameters, optim: Any, steps: int) -> None:
        self.parameters, self.steps = parameters, steps
        self.optimizer = None if optim is None else make_optimizer(optim, parameters.trained)

    def run(self, objective: Callable[[], Tensor], iteration: int) -> None:
        """Maximise the objective; restore the parameters where nothing was gained.

        Args:
            objective: a deterministic function of the parameters, in nats per datum.
            iteration: for errors.

        Raises:
            NonFiniteHalfStepError: the parameters are those from before.
            ValueError: where the objective depends on none of them.
        """
        with torch.no_grad():
            before = float(objective().detach())
        self._state = self.parameters.state()
        with self.undone_on_error(), pyro.validation_enabled(False):
            self._climb(objective, before, iteration)
            if not self.parameters.finite():
                raise failure("a parameter", "M", iteration)
            with torch.no_grad():
                after = float(objective().detach())
            if math.isnan(after):
                raise failure("the objective", "M", iteration)
        if not after > before:
            self.parameters.restore(self._state)

    def _climb(self, objective: Callable[[], Tensor], before: float, iteration: int) -> None:
        """Move the parameters; ``before`` is the objective where they are."""
        trained = self.parameters.trained
        line_search, calls = self.optimizer is None, 0

        def closure() -> float:
            nonlocal calls
            calls += 1
            try:
                loss, gradients = self._differentiate(objective, iteration)
            except (NonFiniteHalfStepError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
                if calls == 1 or not line_search:
                    raise
                # A trial of the line search that went too far: a height turns it back, where
                # nan would be taken for a value.
                loss, gradients = 1e6 * (1 + abs(before)) - before, [None] * len(trained)
            for parameter, gradient in zip(trained, gradients, strict=True):
                if gradient is None:
                    gradient = torch.zeros_like(parameter)
                parameter.grad = gradient.contiguous()  # torch's L-BFGS takes views of it
            return loss

        if self.optimizer is None:
            torch.optim.LBFGS(
                trained,
                max_iter=self.steps,
                tolerance_grad=1e-9,
                tolerance_change=1e-12,
                history_size=20,
                line_search_fn="strong_wolfe",
            ).step(closure)
            return
        for _ in range(self.steps):
            self.optimizer.step(closure)

    def _differentiate(
        self, objective: Callable[[], Tensor], iteration: int
    ) -> tuple[float, list[Tensor | None]]:
        """Return minus the objective and its gradients, None for unused parameters."""
        loss = -objective()
        gradients = torch.autograd.grad(loss, self.parameters.trained, allow_unused=True)
        found = [gradient for gradient in gradients if gradient is not None]
        if not bool(torch.isfinite(loss)) or not all_finite(found):
            raise failure("the objective or its gradient", "M", iteration)
        if not found:
            raise ValueError("the ELBO does not depend on any parameter of the model")
        return float(loss.detach()), list(gradients)

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Go back to the parameters before the last M-step if anything is raised inside."""
        try:
            yield
        except BaseException:  # an interruption by the user too
            self.parameters.restore(self._state)
            raise
        finally:
            for parameter in self.parameters.trained:
                parameter.grad = None


def failure(what: str, half_step: HalfStep, iteration: int) -> NonFiniteHalfStepError:
    """Return the error for a quantity that is not finite in a half-step."""
    return NonFiniteHalfStepError(
        f"{what} is not finite in the {half_step}-step of iteration {iteration}. The model keeps "
        "the parameters of the last good half-step. Try another start, float64, or bound the "
        "scales there",
        half_step,
        iteration,
    )
