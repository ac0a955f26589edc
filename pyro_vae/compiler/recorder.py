"""Functions of tensors that are called again and again, run by graphs where that pays."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae.compiler.arguments import check_compile
from pyro_vae.compiler.graph import Graph, UntraceableError, trace
from pyro_vae.programs.state import random_state, set_random_state
from pyro_vae.programs.warned_once import warn_once

__all__ = ["Recorder"]

logger = logging.getLogger(__name__)

# In "auto": recording is for what takes at least so long. It may be measured, for a replay gives
# the same to the last bit.
_SECONDS_TO_RECORD = 1.0
_KINDS = 16  # of inputs whose graphs are kept


class Recorder:
    """Runs functions of tensors, each by a graph where it is called often enough.

    For functions that do the same whenever they are called: evaluation, not training. A graph is
    compared with the function itself under the same random numbers; where they differ, or
    there is no tracing, the function goes on as it is, and a logged message says why.

    Args:
        what: the name of what is run, in messages.
        compile: "auto", "replay", True or False, as in :class:`pyro_vae.CompiledSVI`.
    """

    def __init__(self, what: str, compile: str | bool) -> None:
        check_compile(compile)
        self.what = what
        self.compile = compile
        self._graphs: dict[Any, Graph] = {}
        self._seconds: dict[Any, float] = {}  # of an eager call
        self._refused: set[Any] = set()  # names of functions
        self._uncompilable = self._has_compiled = False

    def __call__(
        self,
        key: tuple[Any, ...],
        function: Callable[..., Sequence[Tensor]],
        inputs: Sequence[Tensor],
        calls: int,
        *,
        check: bool = False,
    ) -> Sequence[Any]:
        """Return what the function returns.

        Args:
            key: the function's name, and what else tells its inputs' layout from others: by it,
                graphs are found again.
            function: of the inputs, to tensors.
            inputs: tensors.
            calls: how many of this kind are to be expected.
            check: whether to compare the graph with this function once more, as where it was
                recorded from another that should be its equal.
        """
        auto = self.compile == "auto"
        if self.compile is False or key[0] in self._refused:
            return function(*inputs)
        graph = self._graphs.get(key)
        if graph is None:
            # The first call may be the only one: the last chunk has a size of its own.
            if key in self._seconds and not (
                auto and calls * self._seconds[key] < _SECONDS_TO_RECORD
            ):
                return self._proven(key, function, inputs, None)
            begin = time.perf_counter()
            result = function(*inputs)
            seconds = time.perf_counter() - begin
            self._seconds[key] = min(seconds, self._seconds.get(key, seconds))
            return result
        if check:
            return self._proven(key, function, inputs, graph)
        wanted = self.compile is True and not graph.compiled
        if not self._uncompilable and (
            wanted or (auto and graph.pays(calls, again=self._has_compiled))
        ):
            try:
                graph.compile(*inputs)
            except RuntimeError as error:
                self._uncompilable = True
                told = "%s is replayed, not compiled: %s"
                warn_once(logger, (Recorder,), told, self.what, error)
            else:
                self._has_compiled = True
                logger.info("%s is compiled", self.what)
                return self._proven(key, function, inputs, graph)
        return graph(*inputs)

    def _proven(
        self,
        key: tuple[Any, ...],
        function: Callable[..., Sequence[Tensor]],
        inputs: Sequence[Tensor],
        graph: Graph | None,
    ) -> Sequence[Any]:
        """Compare the function with its graph, which is recorded if there is none."""
        before = random_state()
        wanted = function(*inputs)
        after = random_state()
        reason = ""
        try:
            if graph is None:
                set_random_state(before)
                graph = trace(function, inputs)
            set_random_state(before)
            # Results of float64 may be made of numbers of float32.
            single = any(tensor.dtype == torch.float32 for tensor in inputs)
            if any(
                _differ(*pair, graph.compiled, single)
                for pair in zip(wanted, graph(*inputs), strict=True)
            ):
                reason = "its graph gives other numbers"
        except UntraceableError as error:
            reason = str(error)
        set_random_state(after)
        if reason or graph is None:
            self._refused.add(key[0])
            self._graphs.pop(key, None)
            # Another number, of a function that can be traced, is nothing to be expected.
            level = logging.INFO if graph is None else logging.WARNING
            logger.log(level, "%s runs eagerly, which is slower: %s", self.what, reason)
        else:
            while len(self._graphs) >= _KINDS:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = graph
        return wanted


def _differ(wanted: Tensor, found: Any, compiled: bool, single: bool) -> bool:
    """Whether two results are apart by more than rounding; of compiled code, in another order."""
    double = wanted.dtype == torch.float64 and not single
    tolerance = (1e-7 if double else 1e-3) if compiled else (1e-10 if double else 1e-5)
    return not torch.allclose(
        wanted, found.to(wanted), rtol=tolerance, atol=tolerance, equal_nan=True
    )
