"""What is kept of training steps: for each signature of arguments, and where a step starts from."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_vae.compiler import gradient_hooks
from pyro_vae.compiler.replayer import Entry
from pyro_vae.compiler.watched import Watched
from pyro_vae.programs.handlers import ParamStatements
from pyro_vae.programs.pyro_internals import StoreContents
from pyro_vae.programs.state import random_state, set_random_state
from pyro_vae.torch_internals import num_hooks_made


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
        watched: what the graph takes for constant; None before the first run.
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
    watched: Watched | None = None
    backward_once: bool = True
    hooked: list[Tensor] = field(default_factory=list)
    num_hooks: int = -1
    compared: set[Hashable] = field(default_factory=set)

    def not_among(self, statements: ParamStatements) -> list[Tensor]:
        """Return the parameters of a run that are not those whose gradients the graph returns."""
        modules = () if self.watched is None else self.watched.modules.values()
        known = {id(parameter) for parameter in self.parameters}
        stated = statements.tensors(modules)
        return [tensor for _, tensor in stated if tensor.requires_grad and id(tensor) not in known]

    def holds(self) -> bool:
        """Return whether what was found is as it was; attributes may change before the trace."""
        if self.watched is None:
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
    """

    entry: StepEntry
    inputs: list[Tensor]
    args: tuple[object, ...]
    kwargs: dict[str, object]
    structure: Any
    numbers: tuple[int | float, ...] = ()
    key: Hashable = None
    new: Sequence[Tensor] = ()


@dataclass(frozen=True, slots=True)
class EagerStep:
    """What an eager run leaves to compare.

    Attributes:
        loss: detached.
        gradients: of the entry's parameters.
        changed: where a value lies that the step changes, and may read at the next one.
    """

    loss: Tensor
    gradients: list[Tensor | None]
    changed: str | None


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
