"""What a training step starts from, parameters aside: to run it again from there."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pyro_vae.compiler.watched import Watched
from pyro_vae.programs.pyro_internals import StoreContents
from pyro_vae.programs.state import random_state, set_random_state

__all__ = ["LossState", "StepState"]


class LossState(Protocol):
    """A loss with state that it carries from step to step, as the running mean of a baseline."""

    @property
    def carried(self) -> list[Tensor]:
        """The tensors that a step writes to."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of them, by name."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Give them back their values."""


class StepState:
    """The state that a step starts from, but for the parameters, to come back to.

    Args:
        watched: what a graph of the step takes for constant; None where there is none yet.
        inputs: tensors among the arguments, which a step may write to.
        loss: whose state is carried from step to step; None where there is none.
    """

    def __init__(
        self, watched: Watched | None, inputs: list[Tensor], loss: LossState | None
    ) -> None:
        self._random = random_state()
        buffers = () if watched is None else watched.buffers()
        self._written = [(tensor, tensor.clone()) for tensor in (*buffers, *inputs)]
        self._loss, self._saved = loss, {} if loss is None else loss.state_dict()
        self._values = None if watched is None else watched.snapshot()
        # A loss may put new tensors into Pyro's store: TraceGraph_ELBO's baselines.
        self._store = StoreContents.now()

    @property
    def writable(self) -> list[Tensor]:
        """What a step may write to, because it can be undone."""
        carried = () if self._loss is None else self._loss.carried
        return [*(tensor for tensor, _ in self._written), *carried]

    def restore(self, *, values: bool = False) -> None:
        """Go back.

        Args:
            values: whether Python's values go back too, as after a run that is no step.
        """
        if values:
            self._store.restore()
            if self._values is not None:
                self._values()
        set_random_state(self._random)
        with torch.no_grad():
            for tensor, value in self._written:
                tensor.copy_(value)
        if self._loss is not None:
            self._loss.load_state_dict(self._saved)
