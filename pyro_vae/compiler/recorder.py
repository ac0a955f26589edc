"""Functions of tensors that are called again and again, run by graphs where that pays."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from pyro_vae.compiler.agreement import numbers_agree
from pyro_vae.compiler.graph import Graph
from pyro_vae.compiler.replayer import Entry, Objection, Replayer
from pyro_vae.compiler.tracing import trace
from pyro_vae.programs.state import random_state, set_random_state

logger = logging.getLogger(__name__)

# In "auto": recording is for what takes at least so long. It may be measured, because a replay
# gives the same to the last bit.
_SECONDS_TO_RECORD = 1.0

Results = Sequence[Tensor]
Function = Callable[..., Results]


@dataclass(slots=True)
class _Timed(Entry):
    """An entry with the seconds of its fastest eager call; infinite before the first."""

    seconds: float = math.inf


class _Random:
    """The global random state; all that an evaluation changes."""

    def __init__(self) -> None:
        self._state = random_state()

    def restore(self, *, values: bool = False) -> None:
        """Go back to it."""
        set_random_state(self._state)


@dataclass(slots=True)
class _Call:
    """A call of a function.

    Attributes:
        entry: of its signature.
        inputs: tensors.
        function: of the inputs, to tensors.
        name: of the function.
        wanted: what the function returned, and the random state then; None before it ran eagerly.
    """

    entry: _Timed
    inputs: Sequence[Tensor]
    function: Function
    name: Hashable
    wanted: tuple[Results, _Random] | None = None


class Recorder(Replayer[_Timed, _Call, Results, Results]):
    """Runs functions of tensors, each by a graph where it is called often enough.

    For functions that do the same whenever they are called: evaluation, not training. A graph is
    compared with the function itself under the same random numbers; where they differ, or
    there is no tracing, the function goes on as it is, and a logged message says why.

    Args:
        what: the name of what is run, in messages.
        compile: "auto", "replay", True or False, as in :class:`pyro_vae.CompiledSVI`.
    """

    def __init__(self, what: str, compile: str | bool) -> None:
        super().__init__(what, compile, (Recorder,))
        self._refused: set[Hashable] = set()  # names of functions

    def __call__(
        self,
        key: tuple[Hashable, ...],
        function: Function,
        inputs: Sequence[Tensor],
        calls: int,
        *,
        check: bool = False,
    ) -> Results:
        """Return what the function returns.

        Args:
            key: the function's name, and what else its inputs have in common with those of other
                calls that one graph serves.
            function: of the inputs, to tensors.
            inputs: tensors.
            calls: of this kind that are to be expected.
            check: whether to compare the graph with this function once more, as where it was
                recorded from another that should be its equal.
        """
        if self.compile is False or key[0] in self._refused:
            return function(*inputs)
        entry = self._find(key)
        if entry is None:
            self._add(key, entry := _Timed())
        # Not at the first call, which may be the only one: the last chunk has a size of its own.
        often = self.compile != "auto" or calls * entry.seconds >= _SECONDS_TO_RECORD
        if entry.graph is None and not (often and entry.seconds < math.inf):
            begin = time.perf_counter()
            result = function(*inputs)
            entry.seconds = min(time.perf_counter() - begin, entry.seconds)
            return result
        return self._advance(_Call(entry, inputs, function, key[0]), calls, is_due=check)

    def _trace(self, call: _Call) -> Graph:
        start = _Random()
        self._run(call)
        start.restore()
        try:
            return trace(call.function, call.inputs)
        finally:
            start.restore()

    def _save(self, call: _Call) -> _Random:
        return _Random()

    def _run(self, call: _Call) -> Results:
        """Return what the function returns, with the random state that it leaves; it runs once."""
        if call.wanted is None:
            call.wanted = call.function(*call.inputs), _Random()
        results, state = call.wanted
        state.restore()
        return results

    def _replay(self, call: _Call, graph: Graph) -> Results:
        # None of which is None, as the function's are not.
        return cast("Results", graph(*call.inputs))

    def _objection(
        self, call: _Call, wanted: Results, found: Results, *, exact: bool
    ) -> Objection | None:
        if numbers_agree(wanted, found, call.inputs, exact=exact):
            return None
        return Objection("its graph gives other numbers", differs=True)

    def _finish(self, call: _Call, found: Results, *, compared: bool) -> Results:
        return self._run(call) if compared else found

    def _give_up(self, call: _Call, objection: Objection) -> Results:
        self._refused.add(call.name)
        # Other numbers, of a function that can be traced, are not to be expected.
        level = logging.WARNING if objection.differs else logging.INFO
        logger.log(level, "%s runs eagerly, which is slower: %s", self._what, objection.reason)
        return self._run(call)
