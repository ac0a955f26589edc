"""The loss of a pair and its gradients, by graphs that are compared with eager runs."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro
import pyro.util
import torch
from torch import Tensor

from pyro_vae.compiler import gradient_hooks
from pyro_vae.compiler.agreement import gradients_differ, losses_differ
from pyro_vae.compiler.arguments import VaryingNumbers, form_of, rebuilt
from pyro_vae.compiler.graph import Graph
from pyro_vae.compiler.replayer import Objection, Replayer
from pyro_vae.compiler.tracing import UntraceableError, trace
from pyro_vae.compiler.watched import Watched
from pyro_vae.losses.base import Objective
from pyro_vae.programs.guide_kinds import RowGuide
from pyro_vae.programs.handlers import ParamStatements
from pyro_vae.programs.messages import plain_errors, warn_once
from pyro_vae.programs.pyro_internals import handlers_at_work
from pyro_vae.programs.state import called_modules, module_of, unwrapped
from pyro_vae.programs.types import Program
from pyro_vae.torch_internals import parameters_of, unchecked_samples
from pyro_vae.training.optimizers import drop_gradients
from pyro_vae.training.step_state import Step, StepEntry, StepState

logger = logging.getLogger(__name__)

_WORTHWHILE_CALLS = 64  # of a signature, below which tracing it has been a waste
_MAX_WASTED = 8  # signatures, after which others are traced when they have been called so often
# Calls of a signature at which its graph is compared: the first, and ever more rarely.
_COMPARED = frozenset(2 * 4**k for k in range(12))
# In "auto": fewer steps than these run eagerly, because tracing takes as long as some of them.
_FEW_STEPS = 100
_MAX_COMPARED_NUMBERS = 4  # values of numbers that vary at which a graph is compared
_MAX_FAILURES = 3  # traces that the same code stopped, after which there are no more
_BACKWARD_AGAIN = (
    "parameters have gradient hooks, and the loss goes backward through them several times in a "
    "step; each time, PyTorch calls the hooks"
)
_EACH_NUMBER = (
    "a number among the arguments differs from call to call, and steps are traced anew for each "
    "value, which is slower, because it cannot be a tensor: %s"
)


class TracedLoss(Replayer[StepEntry, Step, tuple[Tensor, list[Tensor | None]], Any]):
    """Loss and gradients of a model and a guide, by a graph that is traced once and replayed.

    The first call with a signature of arguments (shapes, dtypes, values of what is no tensor) runs
    eagerly. The second traces, and compares the graph's loss and gradients with eager's under
    one seed; so do some later ones, ever more rarely. Where they differ, or there is no
    tracing, this signature runs eagerly from then on, and a warning says why.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        loss_and_grads: as pyro.infer.ELBO.loss_and_grads: from model, guide and arguments to the
            loss, gradients added to the parameters'.
        compile: "auto", "replay", True or False, as in :func:`pyro_vae.fit`.
        steps: calls to expect; None where that is not known.
        state: the loss that has a state, carried from call to call; None where there is none.
        modes: whether train() and eval() make a difference; not where each call is in one mode.
        owners: objects, beside model and guide, whose plain attributes the loss depends on.
        wanted: returns parameters whose gradients are wanted, whether Pyro knows of them or not.
        setting: returns what a graph is for beside the arguments.

    Attributes:
        mode: how the last call ran: "eager", "replayed" or "compiled".
        parameters: all that were met so far, each once: those that Pyro knows of
            (:class:`ParamStatements`), and those wanted.
        current: those of the last call, and the rows of a table that it was differentiated by.
        unregistered: those that got a gradient in the first call which is not wanted: of modules
            that Pyro does not know of.
        health: a number of the last call that is finite only if the loss and all gradients are
            (a sum of them all, which may also overflow), 0-dimensional; None where not wanted.
        checked: whether it is wanted, False at first; not to be changed once there is a graph.
    """

    _is, _captures = "are", True

    def __init__(
        self,
        model: Program,
        guide: Program,
        loss_and_grads: Callable[..., Any],
        *,
        compile: str | bool = "auto",
        steps: int | None = None,
        state: Objective | None = None,
        modes: bool = True,
        owners: tuple[object, ...] = (),
        wanted: Callable[[], Iterable[Tensor]] = tuple,
        setting: Callable[[], Hashable] = tuple,
    ) -> None:
        pair = unwrapped(model), unwrapped(guide)
        super().__init__("training steps", compile, pair)
        self.model, self.guide, self.loss_and_grads = model, guide, loss_and_grads
        self.steps, self.checked, self.mode = steps, False, "eager"
        self.health: Tensor | None = None
        self.parameters: list[Tensor] = []
        self.current: list[Tensor] = []
        self.unregistered: list[Tensor] = []
        self._state, self._modes, self._wanted, self._setting = state, modes, wanted, setting
        self._roots = (model, guide, *owners)
        self._calls = 0
        self._numbers = VaryingNumbers()
        self._failures = Counter[str]()  # of traces, by what stopped them
        self._last_change: str | None = None  # that made a graph useless
        self._num_wasted = 0  # signatures that were forgotten before they were worth their tracing
        self._warned: set[str] = set()
        self._table = pair[1] if isinstance(pair[1], RowGuide) else None

    def __getstate__(self) -> dict[str, Any]:
        # A graph is of these very tensors, and of places in these very objects: a copy traces anew.
        return {**vars(self), "_entries": {}}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss, a 0-dimensional tensor or what eager gives; set the gradients.

        Gradients of before are dropped.
        """
        self._calls += 1
        self.mode = "eager"
        step = self._as_step(args, kwargs) if self._may_record() else None
        if step is None:
            return self._learn(StepEntry(given_up=True), args, kwargs)
        entry = step.entry
        entry.calls += 1
        entry.last_call = self._calls
        if entry.given_up or not entry.known:
            return self._learn(entry, args, kwargs)
        if not entry.backward_once and entry.graph is not None and entry.with_hooks():
            return self._give_up(step, Objection(_BACKWARD_AGAIN))
        # Where the number is not known, a run is as likely as not to go on for as long as it has.
        calls, compared = entry.calls, entry.compared
        expected = calls if self.steps is None else self.steps * calls / self._calls
        new = step.numbers not in compared and len(compared) < _MAX_COMPARED_NUMBERS
        return self._advance(step, expected, is_due=new or calls in _COMPARED)

    def graph_of(self, *args: Any, **kwargs: Any) -> tuple[Graph, list[Tensor]] | None:
        """Return the graph that serves a call, and the parameters whose gradients it gives.

        Its results are the loss, :attr:`health` or None, and a gradient for each parameter; None
        where there is no graph, or hooks are on the gradients.
        """
        step = self._as_step(args, kwargs) if self._may_record() else None
        if step is None or step.entry.graph is None or step.numbers or step.entry.with_hooks():
            return None
        return step.entry.graph, step.entry.parameters

    def _may_record(self) -> bool:
        """Return whether a graph may serve this call, whatever its arguments."""
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            self._warn("torch.autocast is on")
            return False
        few = self.compile == "auto" and self.steps is not None and self.steps < _FEW_STEPS
        return self.compile is not False and not few and not handlers_at_work()

    # --- signatures of arguments

    def _as_step(self, args: tuple[object, ...], kwargs: dict[str, object]) -> Step | None:
        """Return a call as a graph takes it; None where none could."""
        rows = None if self._table is None else self._table.given_rows
        structure = (args, kwargs, rows)
        inputs: list[Tensor] = []
        form = form_of(structure, inputs)
        if form is None:
            self._warn("an argument is neither a tensor nor a plain value that can be told apart")
            return None
        if any(tensor.requires_grad for tensor in inputs):
            self._warn("an argument requires gradients, which no graph would give it")
            return None
        setting = torch.get_default_dtype(), torch.is_grad_enabled(), self._setting()
        numbers: tuple[int | float, ...] = ()
        key, entry = None, self._find((form, *setting))
        if entry is None:
            key, structure, numbers = self._numbers.as_tensors(structure, inputs)
            inputs = []
            form = form_of(structure, inputs)
            entry = self._find((form, *setting))
        if entry is not None and not entry.holds():  # as after train() or eval()
            self._num_wasted += entry.calls < _WORTHWHILE_CALLS
            self._last_change = entry.watched.changed() or self._last_change
            entry = None
        entry = self._new_entry((form, *setting)) if entry is None else entry
        return Step(entry, inputs, args, kwargs, structure, numbers, key)

    def _new_entry(self, signature: Hashable) -> StepEntry:
        """Return an entry for a signature; one that waits where others were not worth a trace."""
        # Where the same code stops every trace, it will stop the next one.
        hopeless = max(self._failures.values(), default=0) >= _MAX_FAILURES
        new = StepEntry(given_up=hopeless)
        dropped = self._add(signature, new)
        self._num_wasted += sum(entry.calls < _WORTHWHILE_CALLS for entry in dropped)
        num_idle = sum(
            entry.graph is not None
            and entry.calls < _WORTHWHILE_CALLS < self._calls - entry.last_call
            for entry in self._entries.values()
        )
        if self._num_wasted + num_idle > _MAX_WASTED:
            new.min_calls = _WORTHWHILE_CALLS
            what = f" ({self._last_change})" if self._last_change else ""
            self._warn(
                f"arguments, or values that the step reads beside them{what}, differ every few "
                "steps; pad arguments to a few shapes, and make numbers that change tensors, "
                "written to in place"
            )
        return new

    def _warn(self, reason: str) -> None:
        """Say once why steps run eagerly."""
        if reason not in self._warned:
            self._warned.add(reason)
            text = "training steps run eagerly, which is slower: %s"
            warn_once(logger, self._owners, text, reason)

    @property
    def _leaf(self) -> list[Tensor]:
        """The rows of a table that this call is differentiated by, where they are a tensor."""
        held = None if self._table is None else self._table.in_force
        return [] if held is None or self._table is None or held is self._table.table else [held]

    # --- eager runs

    def _learn(self, entry: StepEntry, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
        """Run eagerly, and note the parameters and modules that the step uses."""
        leaf = self._leaf
        wanted = [*self._wanted(), *leaf]
        drop_gradients([*self.parameters, *wanted])
        first = ParamStatements(checked=self._calls == 1)
        with called_modules() as called, first as statements:
            loss = self._loss_and_grads(args, kwargs)
        owners = filter(None, map(module_of, self._owners))
        modules = {id(m): m for owner in owners for m in owner.modules()} | called
        stated = list(statements.tensors(modules.values()))
        own = [p for m in modules.values() for p in parameters_of(m).values() if p is not None]
        held = set(map(id, own))
        found = {id(tensor): tensor for _, tensor in stated}
        found.update((id(p), p) for p in wanted if id(p) in held or p.grad is not None)
        entry.parameters = self.current = [p for p in found.values() if p.requires_grad]
        entry.num_hooks = -1
        entry.unregistered = [p for p in own if id(p) not in found]
        self.unregistered = [p for p in entry.unregistered if p.grad is not None]
        met = set(map(id, [*self.parameters, *leaf]))
        self.parameters += [p for p in entry.parameters if id(p) not in met]
        if not entry.given_up and entry.calls >= entry.min_calls:
            names, entry.known = [name for name, _ in stated], True
            entry.watched = Watched(self._roots, modules.values(), names, modes=self._modes)
            if any(p.grad is not None and p.grad.is_sparse for p in entry.parameters):
                entry.given_up = True
                self._warn("a gradient is sparse, as of nn.Embedding(sparse=True)")
        self.health = self._health(loss, [parameter.grad for parameter in entry.parameters])
        return loss

    def _loss_and_grads(self, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
        """Run the loss eagerly; errors are raised without Pyro's table."""
        with plain_errors():
            return self.loss_and_grads(self.model, self.guide, *args, **kwargs)

    @torch.no_grad()
    def _health(self, loss: Tensor | float, gradients: list[Tensor | None]) -> Tensor | None:
        """Return a number that is finite only if the loss and all gradients are."""
        if not self.checked:
            return None
        total = torch.as_tensor(loss).detach()
        for gradient in gradients:
            if gradient is not None:
                total = total + gradient.sum().to(total)
        return total

    # --- what the life of a graph asks of a step

    def _trace(self, step: Step) -> Graph:
        entry = step.entry
        entry.watched.expect()
        start = self._save(step)
        parameters, table = entry.parameters, self._table

        def function(*tensors: Tensor) -> list[Tensor | None]:
            args, kwargs, rows = rebuilt(step.structure, iter(tensors))
            # Gradients that the update does not move, and does not drop, would be added to.
            drop_gradients([*parameters, *entry.unregistered])
            # Hooks aside, which each step calls.
            given = nullcontext() if table is None or rows is None else table.rows_as_given(rows)
            with given, _without_checks(), gradient_hooks.aside(parameters):
                loss = self._loss_and_grads(args, kwargs)
            if not isinstance(loss, Tensor):
                raise UntraceableError(f"the loss is {type(loss).__name__}, no tensor")
            gradients = [parameter.grad for parameter in parameters]
            drop_gradients([*parameters, *entry.unregistered])
            return [loss.detach(), self._health(loss, gradients), *gradients]

        try:
            graph = trace(function, step.inputs, writable=start.writable)
            held = entry.watched.holds_tensors()
        finally:
            start.restore(values=True)
        if not held:
            raise UntraceableError("a run puts new tensors in the place of buffers or parameters")
        return graph

    def _save(self, step: Step) -> StepState:
        return StepState(step.entry.watched, step.inputs, self._state)

    def _run(self, step: Step) -> tuple[Tensor, list[Tensor | None]]:
        """Run a step eagerly, its hooks aside; return loss and gradients.

        Notes what a graph of it would miss.
        """
        entry, known = step.entry, step.entry.parameters
        drop_gradients(known)
        # The user's hooks run once in a step, on the gradients that are kept.
        statements = ParamStatements()
        with gradient_hooks.aside(known), gradient_hooks.counted(known) as counts, statements:
            loss = torch.as_tensor(self._loss_and_grads(step.args, step.kwargs)).detach()
        entry.backward_once = max(counts, default=0) <= 1
        ids = set(map(id, known))
        stated = [tensor for _, tensor in statements.tensors(entry.watched.modules.values())]
        step.new = [p for p in stated if p.requires_grad and id(p) not in ids]
        step.changed = entry.watched.changed(plain=True)
        return loss, [parameter.grad for parameter in known]

    def _replay(self, step: Step, graph: Graph) -> Any:
        """Run a step by its graph, and give each parameter its gradient."""
        # What comes out is not differentiated, and operators have less to keep account of.
        with torch.inference_mode():
            loss, self.health, *gradients = graph(*step.inputs)
        self.current = step.entry.parameters
        for parameter, gradient in zip(self.current, gradients, strict=True):
            parameter.grad = gradient
        self.mode = "compiled" if graph.compiled else "replayed"
        return loss

    def _objection(
        self, step: Step, wanted: tuple[Tensor, list[Tensor | None]], found: Tensor, *, exact: bool
    ) -> Objection | None:
        if step.new:  # as where one was replaced in a module that is registered, but never called
            return Objection("a step has other parameters")
        if step.changed is not None:
            return Objection(
                f"a step changes a value that it may read at the next one ({step.changed}); make "
                "it a buffer, which is part of a graph, or change it outside of model and guide"
            )
        if step.entry.with_hooks() and not step.entry.backward_once:
            return Objection(_BACKWARD_AGAIN)
        gradients = [parameter.grad for parameter in step.entry.parameters]
        reason = losses_differ(wanted[0], found, exact=exact)
        reason = reason or gradients_differ(*wanted, gradients, exact=exact)
        return Objection(reason, differs=True) if reason else None

    def _finish(self, step: Step, found: Any, *, compared: bool) -> Any:
        entry = step.entry
        if compared:
            entry.watched.settle()
            entry.compared.add(step.numbers)
        if hooked := entry.with_hooks():
            gradient_hooks.call(hooked)
        return found

    def _give_up(self, step: Step, objection: Objection) -> Any:
        self.mode = "eager"
        entry = step.entry
        entry.graph = None
        if step.new:
            drop_gradients(step.new)
            return self._learn(entry, step.args, step.kwargs)
        reason = objection.reason
        if objection.differs:
            reason = f"the graph of a step does not agree: {reason}"
        if step.numbers:  # with a graph for each number, as before
            self._numbers.refuse(step.key)
            warn_once(logger, self._owners, _EACH_NUMBER, reason)
            return self._learn(StepEntry(given_up=True), step.args, step.kwargs)
        entry.given_up = True
        self._failures["differs" if objection.differs else reason] += 1
        self._warn(reason)
        return self._learn(entry, step.args, step.kwargs)


@contextmanager
def _without_checks() -> Iterator[None]:
    """Keep Pyro's losses from looking for NaN, of which they only warn, and distributions likewise.

    Distributions that were made before, with validation on, look at the values that they score.
    """
    util: Any = pyro.util
    looks = util.torch_isnan, util.torch_isinf
    util.torch_isnan = util.torch_isinf = lambda value: False
    try:
        with pyro.validation_enabled(False), unchecked_samples():
            yield
    finally:
        util.torch_isnan, util.torch_isinf = looks
