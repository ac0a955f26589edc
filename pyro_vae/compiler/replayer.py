"""Replayer: calls of a function run eagerly at first, then by graphs that agree with eager runs."""

from __future__ import annotations

import abc
import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from pyro_vae.compiler.arguments import check_compile
from pyro_vae.compiler.graph import Graph
from pyro_vae.compiler.tracing import UntraceableError
from pyro_vae.programs.messages import warn_once

logger = logging.getLogger(__name__)

_ONE_BY_ONE = "the kernels of %s are launched one by one: %s"
_MAX_ENTRIES = 16  # signatures that are remembered


@dataclass(slots=True)
class Entry:
    """Cached state for one signature of arguments (shapes, dtypes, plain values).

    Attributes:
        graph: None before it is traced, and after it was given up.
    """

    graph: Graph | None = None


class Call(Protocol):
    """One call, as a graph takes it."""

    @property
    def entry(self) -> Entry:
        """The entry of its signature."""

    @property
    def inputs(self) -> Sequence[Tensor]:
        """The tensors that the graph is called with."""


@dataclass(frozen=True, slots=True)
class Objection:
    """Why a graph is not used.

    Attributes:
        reason: in words.
        differs: whether its numbers are not those of an eager run.
    """

    reason: str
    differs: bool = False


class Saved(Protocol):
    """The state that a call starts from."""

    def restore(self, *, values: bool = False) -> None:
        """Go back to it; Python's values too, as after a run that is no call."""


EntryT = TypeVar("EntryT", bound=Entry)
CallT = TypeVar("CallT", bound=Call)
EagerT = TypeVar("EagerT")  # what an eager run leaves to compare
ResultT = TypeVar("ResultT")


class Replayer(abc.ABC, Generic[EntryT, CallT, EagerT, ResultT]):
    """Runs calls by graphs, one for each signature of arguments.

    A call of a new signature runs eagerly. A later one is traced; then, from one state, it runs
    eagerly and by the graph, and the graph is kept if both agree. Later ones are replayed, and
    compared again where the graph was compiled or captured, or where the subclass asks for it.
    Where a trace fails, or a comparison, calls run eagerly from then on, and a logged message says
    why. Numbers are to be the same, however calls run.

    A subclass finds or makes the entry of a call, runs it eagerly while there is reason to, and
    hands it to :meth:`_advance` from then on. It says how to trace, to save state, to run either
    way, and to compare.

    Args:
        what: the name of what is run, in messages.
        compile: "auto", "replay", True or False, as in :class:`pyro_vae.CompiledSVI`.
        owners: whom messages are about, as in :func:`warn_once`.
    """

    _is = "is"  # or "are", as what is run asks for
    # Whether graphs are launched at once where they can be (on a CUDA device): results are then
    # overwritten by the next call.
    _captures = False

    def __init__(self, what: str, compile: str | bool, owners: tuple[object, ...]) -> None:
        check_compile(compile)
        self.compile = compile
        self._what, self._owners = what, owners
        self._entries: dict[Hashable, EntryT] = {}
        self._has_compiled = False

    # --- what a subclass implements

    @abc.abstractmethod
    def _trace(self, call: CallT) -> Graph:
        """Return the graph of a call, and leave all state as it was found.

        Raises:
            UntraceableError: where there is none.
        """

    @abc.abstractmethod
    def _save(self, call: CallT) -> Saved:
        """Return the state that the call starts from."""

    @abc.abstractmethod
    def _run(self, call: CallT) -> EagerT:
        """Run a call eagerly, to be compared."""

    @abc.abstractmethod
    def _replay(self, call: CallT, graph: Graph) -> ResultT:
        """Run a call by its graph."""

    @abc.abstractmethod
    def _objection(
        self, call: CallT, wanted: EagerT, found: ResultT, *, exact: bool
    ) -> Objection | None:
        """Return what speaks against a graph after both runs; None where they agree."""

    @abc.abstractmethod
    def _finish(self, call: CallT, found: ResultT, *, compared: bool) -> ResultT:
        """Return the results of a call that ran by its graph, after what Python does with them."""

    @abc.abstractmethod
    def _give_up(self, call: CallT, objection: Objection) -> ResultT:
        """Return the results of a call that no graph serves, from the state that it starts from."""

    # --- the life of a graph

    def _find(self, signature: Hashable) -> EntryT | None:
        """Return the entry of a signature, now the last one used; None where there is none."""
        entry = self._entries.pop(signature, None)
        if entry is not None:
            self._entries[signature] = entry
        return entry

    def _add(self, signature: Hashable, entry: EntryT) -> list[EntryT]:
        """Remember an entry; return those that were used least recently, and are forgotten."""
        dropped = []
        while len(self._entries) >= _MAX_ENTRIES:
            dropped.append(self._entries.pop(next(iter(self._entries))))
        self._entries[signature] = entry
        return dropped

    def _advance(self, call: CallT, expected: float, *, is_due: bool) -> ResultT:
        """Return the results of a call that ran eagerly before, by its graph where that works.

        Args:
            call: of a function.
            expected: calls of its signature that there will be.
            is_due: whether to compare this one once more.
        """
        graph = call.entry.graph
        if graph is None:
            try:
                graph = call.entry.graph = self._trace(call)
            except UntraceableError as error:
                return self._give_up(call, Objection(str(error)))
            message = "%s %s a graph of %d operations"
            logger.info(message, self._what, self._is, graph.num_operations)
            return self._compare(call, graph)
        if self._compile_pays(graph, expected):
            return self._compile(call, graph)
        if graph.capturable and self._captures:
            return self._capture(call, graph)
        if is_due:
            return self._compare(call, graph)
        return self._finish(call, self._replay(call, graph), compared=False)

    def _compare(self, call: CallT, graph: Graph) -> ResultT:
        """Run a call eagerly and by its graph, from one state; keep the graph if they agree."""
        start = self._save(call)
        wanted = self._run(call)
        start.restore()
        found = self._replay(call, graph)
        objection = self._objection(call, wanted, found, exact=not graph.compiled)
        if objection is None:
            return self._finish(call, found, compared=True)
        start.restore(values=True)
        if not (graph.captured and objection.differs):
            call.entry.graph = None
            return self._give_up(call, objection)
        graph.release()
        reason = f"launched at once, they do not agree: {objection.reason}"
        logger.warning(_ONE_BY_ONE, self._what, reason)
        return self._compare(call, graph)

    def _compile_pays(self, graph: Graph, calls: float) -> bool:
        """Return whether compiling takes less time than it saves in the calls that are left."""
        if graph.compiled or graph.uncompilable or self.compile == "replay":
            return False
        return self.compile is True or graph.pays(calls, compiled_before=self._has_compiled)

    def _compile(self, call: CallT, graph: Graph) -> ResultT:
        try:
            graph.compile(*call.inputs)
        except RuntimeError as error:
            message = f"%s {self._is} replayed, not compiled: %s"
            warn_once(logger, self._owners, message, self._what, error)
            return self._finish(call, self._replay(call, graph), compared=False)
        self._has_compiled = True
        logger.info("%s %s compiled", self._what, self._is)
        return self._compare(call, graph)

    def _capture(self, call: CallT, graph: Graph) -> ResultT:
        """Go over to one launch a call; stay with the graph as it is where that fails."""
        start = self._save(call)
        try:
            graph.capture(*call.inputs)
        except RuntimeError as error:
            logger.warning(_ONE_BY_ONE, self._what, error)
        start.restore()
        return self._compare(call, graph)
