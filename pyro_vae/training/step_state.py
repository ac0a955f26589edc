"""What is kept of training steps: for each signature of arguments, and where a step starts from."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_vae.compiler import gradient_hooks
from pyro_vae.compiler.replayer import Entry
from pyro_vae.compiler.watched import Watched
from pyro_vae.losses.base import Objective
from pyro_vae.programs.pyro_internals import StoreContents
from pyro_vae.programs.state import random_state, set_random_state
from pyro_vae.torch_internals import copy_all, num_hooks_made


@dataclass(slots=True)
class StepEntry(Entry):
    """Cached state for one signature of arguments.

    Attributes:
        calls: so far.
        last_call: the number of the last one, among those of all signatures.
        min_calls: that run eagerly before one is traced.
        given_up: whether calls run eagerly for good.
        parameters: whose gradients the graph returns.
        unregistered: parameters of modules that Pyro does not know of, and that the caller does
            not want.
        known: whether a run has shown what to watch.
        watched: what the graph takes for constant.
        backward_once: whether a step goes backward through each parameter once.
        hooked: the parameters with gradient hooks, when PyTorch's hooks were last counted.
        num_hooks: that count.
        compared: values of varying numbers at which the graph was compared.
    """

    calls: int = 0
    last_call: int = 0
    min_calls: int = 0
    given_up: bool = False
    parameters: list[Tensor] = field(default_factory=list)
    unregistered: list[Tensor] = field(default_factory=list)
    known: bool = False
    watched: Watched = field(init=False)
    backward_once: bool = True
    hooked: list[Tensor] = field(default_factory=list)
    num_hooks: int = -1
    compared: set[Hashable] = field(default_factory=set)

    def holds(self) -> bool:
        """Return whether what was found is as it was; attributes may change before the trace."""
        if not self.known:
            return True
        return self.watched.holds_tensors() if self.graph is None else self.watched.holds()

    def with_hooks(self) -> list[Tensor]:
        """Return the parameters that have gradient hooks now."""
        if self.num_hooks != (now := num_hooks_made()):
            self.hooked, self.num_hooks = gradient_hooks.hooked(self.parameters), now
        return self.hooked


@dataclass(slots=True)
class Step:
    """A call of the loss, and how a graph takes it.

    Attributes:
        entry: of its signature.
        inputs: the tensors in the structure.
        args: positional arguments.
        kwargs: keywords.
        structure: both and the rows of a table, with tensors in the place of varying numbers.
        numbers: those that vary.
        key: of the arguments but their numbers, where these vary.
        new: parameters that an eager run met, and the graph does not know.
        changed: where a value lies that it changed, and may read at the next one.
    """

    entry: StepEntry
    inputs: list[Tensor]
    args: tuple[object, ...]
    kwargs: dict[str, object]
    structure: Any
    numbers: tuple[int | float, ...] = ()
    key: Hashable = None
    new: Sequence[Tensor] = ()
    changed: str | None = None


class StepState:
    """The state that a step starts from, but for the parameters, to come back to.

    Args:
        watched: what a graph of the step takes for constant.
        inputs: tensors among the arguments, which a step may write to.
        loss: whose state is carried from step to step; None where there is none.
    """

    def __init__(self, watched: Watched, inputs: list[Tensor], loss: Objective | None) -> None:
        self._random = random_state()
        self._written = [*watched.buffers(), *inputs]
        self._saved = [tensor.clone() for tensor in self._written]
        self._loss, self._of_loss = loss, {} if loss is None else loss.state_dict()
        self._values = watched.snapshot()
        # A loss may put new tensors into Pyro's store: TraceGraph_ELBO's baselines.
        self._store = StoreContents()

    @property
    def writable(self) -> list[Tensor]:
        """What a step may write to, because it can be undone."""
        return [*self._written, *(() if self._loss is None else self._loss.carried)]

    def restore(self, *, values: bool = False) -> None:
        """Go back.

        Args:
            values: whether Python's values go back too, as after a run that is no step.
        """
        if values:
            self._store.restore()
            self._values()
        set_random_state(self._random)
        if self._written:
            with torch.no_grad():
                copy_all(self._written, self._saved)
        if self._loss is not None:
            self._loss.load_state_dict(self._of_loss)
