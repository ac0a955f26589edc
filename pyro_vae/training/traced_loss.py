"""The loss of a pair and its gradients, by graphs that are proven against eager runs."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.util
import torch
from torch import Tensor, nn

from pyro_vae.compiler import gradient_hooks
from pyro_vae.compiler.arguments import check_compile, form_of, rebuilt
from pyro_vae.compiler.graph import Graph, UntraceableError, trace
from pyro_vae.compiler.varying_numbers import VaryingNumbers
from pyro_vae.compiler.watched import Watched
from pyro_vae.programs.handlers import ParamStatements
from pyro_vae.programs.plain_errors import plain_errors
from pyro_vae.programs.pyro_internals import StoreContents, handlers_at_work
from pyro_vae.programs.row_guide import RowGuide
from pyro_vae.programs.state import (
    called_modules,
    module_of,
    random_state,
    set_random_state,
    unwrapped,
)
from pyro_vae.programs.warned_once import warn_once

__all__ = ["TracedLoss"]

logger = logging.getLogger(__name__)

_KINDS = 16  # of arguments remembered at most
_LONG = 20  # items of a list that are looked at
_WORTH = 64  # calls of a kind, below which tracing it has been a waste
_WASTED = 8  # kinds, after which others are traced when they have been called so often
# Calls of one kind at which a graph is compared with eager: the first, and ever more rarely.
_CHECKED = frozenset(2 * 4**k for k in range(12))
# In "auto": fewer steps than these run eagerly, for tracing takes as long as some of them.
_FEW_STEPS = 100
_ONE_BY_ONE = "the kernels of a training step are launched one by one: %s"
_BACKWARD_AGAIN = (
    "parameters have gradient hooks, and the loss goes backward through them several times in a "
    "step; each time, PyTorch calls the hooks"
)
_EACH_NUMBER = (
    "a number among the arguments differs from call to call, and steps are traced anew for each "
    "value, which is slower, for it cannot be a tensor: %s"
)
_NUMBERS = 4  # values of numbers that vary at which a graph is compared
_FAILURES = 3  # traces that the same code stopped, after which there are no more


@dataclass
class _Kind:
    """Cached state for one argument signature (shapes, dtypes, plain values).

    Attributes:
        calls: so far.
        last: the number of the last one, among those of all kinds.
        wait: calls that run eagerly before it is traced.
        graph: of loss and gradients; None before it is traced, and where it cannot be.
        eager: whether it was given up.
        parameters: whose gradients the graph returns.
        unregistered: parameters of modules that nobody told Pyro of, and whose gradients nobody
            wants.
        watched: what the graph takes for constant; None before the first run.
        backward_once: whether a step goes backward through each parameter once.
        hooked: the parameters with gradient hooks, when PyTorch's hooks were last counted.
        hooks: that count.
        compared: values of varying numbers at which the graph was compared.
    """

    calls: int = 0
    last: int = 0
    wait: int = 0
    graph: Graph | None = None
    eager: bool = False
    parameters: list[Tensor] = field(default_factory=list)
    unregistered: list[Tensor] = field(default_factory=list)
    watched: Watched | None = None
    backward_once: bool = True
    hooked: list[Tensor] = field(default_factory=list)
    hooks: int = -1
    compared: set[Any] = field(default_factory=set)

    def not_among(self, statements: ParamStatements) -> list[Tensor]:
        """Return the parameters of a run that are not those whose gradients the graph returns."""
        modules = () if self.watched is None else self.watched.modules.values()
        known = {id(parameter) for parameter in self.parameters}
        told = statements.tensors(modules)
        return [tensor for _, tensor in told if tensor.requires_grad and id(tensor) not in known]

    def holds(self) -> bool:
        """Whether what was found is as it was; attributes may change until there is a graph."""
        if self.watched is None:
            return True
        return self.watched.holds_tensors() if self.graph is None else self.watched.holds()

    def changed(self) -> str | None:
        """Say where a value lies that is another one than the graph is for."""
        return None if self.watched is None else self.watched.changed()

    def with_hooks(self) -> list[Tensor]:
        """Return the parameters that have gradient hooks now."""
        if self.hooks != (now := gradient_hooks.mark()):
            self.hooked, self.hooks = gradient_hooks.hooked(self.parameters), now
        return self.hooked


@dataclass(slots=True)
class _Call:
    """The arguments of a call, and how a graph takes them.

    Attributes:
        args: positional ones.
        kwargs: keywords.
        structure: both and the rows of a table, with tensors in the place of varying numbers.
        inputs: the tensors in it.
        numbers: those that vary.
        key: of the arguments but their numbers, where these vary.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    structure: Any
    inputs: list[Tensor]
    numbers: tuple[Any, ...] = ()
    key: Any = None


class TracedLoss:
    """Loss and gradients of a model and a guide, by a graph that is traced once and replayed.

    The first call with a kind of arguments (shapes, dtypes, values of what is no tensor) runs
    eagerly. The second traces, and compares the graph's loss and gradients with eager's under
    one seed; so do some later ones, ever more rarely. Where they differ, or there is no
    tracing, this kind of arguments runs eagerly from then on, and a warning says why.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        loss_and_grads: as pyro.infer.ELBO.loss_and_grads: from model, guide and arguments to the
            loss, gradients added to the parameters'.
        compile: "auto", "replay", True or False, as in :func:`pyro_vae.fit`.
        steps: calls to expect; None if nobody knows.
        state: of the loss, carried from call to call: an object with state_dict and
            load_state_dict, or None.
        modes: whether train() and eval() make a difference; not where each call is in one mode.
        checked: whether ``health`` is wanted.
        owners: objects, beside model and guide, whose plain attributes the loss depends on.
        wanted: returns parameters whose gradients are wanted, whether Pyro knows of them or not.

    Attributes:
        mode: how the last call ran: "eager", "replayed" or "compiled".
        parameters: all that were met so far, each once: those that Pyro was told of
            (:class:`ParamStatements`), and those wanted.
        current: those of the last call.
        unregistered: those that got a gradient in the first call which nobody wants: of modules
            that Pyro was not told of.
        health: a number of the last call that is finite only if the loss and all gradients are
            (a sum of them all, which may also overflow), 0-dimensional; None where nobody wants it.
        checked: whether somebody does; not to be changed after the first call.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        loss_and_grads: Callable[..., Any],
        *,
        compile: str | bool = "auto",
        steps: int | None = None,
        state: Any = None,
        modes: bool = True,
        checked: bool = False,
        owners: tuple[Any, ...] = (),
        wanted: Callable[[], Iterable[Tensor]] = tuple,
    ) -> None:
        check_compile(compile)
        self.model, self.guide = model, guide
        self.loss_and_grads = loss_and_grads
        self.compile = compile
        self.steps = steps
        self.mode = "eager"
        self.health: Tensor | None = None
        self._state = state
        self._modes = modes
        self.checked = checked
        self._owners = owners
        self._wanted = wanted
        self.parameters: list[Tensor] = []
        self.current: list[Tensor] = []
        self.unregistered: list[Tensor] = []
        self._calls = 0
        self._kinds: dict[Any, _Kind] = {}
        self._numbers = VaryingNumbers()
        self._failures: dict[str, int] = {}  # of traces, by what stopped them
        self._differing: str | None = None  # what made a graph useless last
        self._wasted = 0  # kinds that were forgotten before they were worth their tracing
        self._told: set[str] = set()
        self._pair = unwrapped(model), unwrapped(guide)
        own = self._pair[1]
        self._table = own if isinstance(own, RowGuide) else None

    def __getstate__(self) -> dict[str, Any]:
        # A graph is of these very tensors, and of places in these very objects: a copy traces anew.
        return {**vars(self), "_kinds": {}}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss, a 0-dimensional tensor or what eager gives; set the gradients.

        Gradients of before are dropped.
        """
        self._calls += 1
        self.mode = "eager"
        few = self.steps is not None and self.steps < _FEW_STEPS
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            self._tell("torch.autocast is on")
            return self._run_once(args, kwargs)
        if self.compile is False or (self.compile == "auto" and few) or handlers_at_work():
            return self._run_once(args, kwargs)
        inputs: list[Tensor] = []
        rows = None if self._table is None else self._table.given_rows
        form = form_of((args, kwargs, rows), inputs)
        if form is None:
            self._tell("an argument is neither a tensor nor a plain value that can be told apart")
            return self._run_once(args, kwargs)
        if any(tensor.requires_grad for tensor in inputs):
            self._tell("an argument requires gradients, which no graph would give it")
            return self._run_once(args, kwargs)
        call = _Call(args, kwargs, (args, kwargs, rows), inputs)
        dtype, recorded = torch.get_default_dtype(), torch.is_grad_enabled()
        signature = (form, dtype, recorded)
        kind = self._kinds.pop(signature, None)
        if kind is None:
            form, call = self._with_tensors(form, call)
            signature = (form, dtype, recorded)
            kind = self._kinds.pop(signature, None)
        if kind is not None:
            self._kinds[signature] = kind  # the last used
            if not kind.holds():  # as after train() or eval()
                self._wasted += kind.calls < _WORTH
                self._differing = kind.changed() or self._differing
                kind = None
        if kind is None:
            kind = self._remember(signature)
        kind.calls += 1
        kind.last = self._calls
        if kind.eager:
            return self._watch(kind, args, kwargs)
        if kind.watched is None:  # as after a first run that ended in an error
            loss = self._watch(kind, args, kwargs)
            if any(p.grad is not None and p.grad.is_sparse for p in kind.parameters):
                kind.eager = True
                self._tell("a gradient is sparse, as of nn.Embedding(sparse=True)")
            return loss
        if kind.graph is None:
            return self._trace(kind, call)
        if not kind.backward_once and kind.with_hooks():
            return self._give_up(kind, _BACKWARD_AGAIN, call)
        if self._pays(kind, kind.graph):
            return self._compile(kind, kind.graph, call)
        if kind.graph.capturable:
            return self._capture(kind, kind.graph, call)
        new = call.numbers not in kind.compared and len(kind.compared) < _NUMBERS
        if kind.calls in _CHECKED or new:
            return self._checked(kind, kind.graph, call)
        return self._replay(kind, kind.graph, call.inputs)

    def _with_tensors(self, form: Any, call: _Call) -> tuple[Any, _Call]:
        """Return the form and the call with tensors in the place of numbers that vary."""
        key = self._numbers.meet(call.structure)
        if key is None:
            return form, call
        structure, numbers = self._numbers.as_tensors(key, call.structure, call.inputs)
        if not numbers:
            return form, call
        inputs: list[Tensor] = []
        form = form_of(structure, inputs)
        return form, _Call(call.args, call.kwargs, structure, inputs, numbers, key)

    # --- kinds of arguments

    def _remember(self, signature: Any) -> _Kind:
        while len(self._kinds) >= _KINDS:
            least = self._kinds.pop(next(iter(self._kinds)))  # used least recently
            self._wasted += least.calls < _WORTH
        idle = sum(
            kind.graph is not None and kind.calls < _WORTH < self._calls - kind.last
            for kind in self._kinds.values()
        )
        wait = 0
        if self._wasted + idle > _WASTED:
            wait = _WORTH
            what = f" ({self._differing})" if self._differing else ""
            self._tell(
                f"arguments, or values that the step reads beside them{what}, differ every few "
                "steps; pad arguments to a few shapes, and make numbers that change tensors, "
                "written to in place"
            )
        # Where the same code stops every trace, it will stop the next one.
        hopeless = max(self._failures.values(), default=0) >= _FAILURES
        self._kinds[signature] = _Kind(eager=hopeless, wait=wait)
        return self._kinds[signature]

    def _run_once(self, args: Any, kwargs: Any) -> Any:
        """Run eagerly, without a view to a graph."""
        return self._watch(_Kind(eager=True), args, kwargs)

    def _watch(self, kind: _Kind, args: Any, kwargs: Any) -> Any:
        """Run eagerly, and find the parameters and modules in use."""
        wanted = list(self._wanted())
        _drop_gradients([*self.parameters, *wanted])
        first = ParamStatements(checked=self._calls == 1)
        with called_modules() as called, first as statements:
            loss = self._eager(args, kwargs)
        modules: dict[int, nn.Module] = {}
        for fn in (self.model, self.guide):
            if (module := module_of(unwrapped(fn))) is not None:
                modules.update((id(m), m) for m in module.modules())
        modules.update(called)
        told = list(statements.tensors(modules.values()))
        names = [name for name, _ in told]
        found = {id(tensor): tensor for _, tensor in told}
        held = {id(p) for module in modules.values() for p in module._parameters.values()}
        found.update((id(p), p) for p in wanted if id(p) in held or p.grad is not None)
        kind.parameters = [p for p in found.values() if p.requires_grad]
        kind.hooks = -1
        kind.unregistered = [
            p
            for module in modules.values()
            for p in module._parameters.values()
            if p is not None and id(p) not in found
        ]
        self.current = kind.parameters
        self.unregistered = [p for p in kind.unregistered if p.grad is not None]
        known = {id(parameter) for parameter in self.parameters}
        self.parameters += [p for p in kind.parameters if id(p) not in known]
        if not kind.eager and kind.calls >= kind.wait:
            roots = (self.model, self.guide, *self._owners)
            kind.watched = Watched(roots, modules.values(), names, modes=self._modes)
        self.health = self._health(loss, [parameter.grad for parameter in kind.parameters])
        return loss

    # --- ways to run

    def _rows(self, rows: Tensor | None) -> contextlib.AbstractContextManager[None]:
        if self._table is None or rows is None:
            return contextlib.nullcontext()
        return self._table.rows_as_given(rows)

    @torch.no_grad()
    def _health(self, loss: Any, gradients: list[Tensor | None]) -> Tensor | None:
        if not self.checked:
            return None
        total = torch.as_tensor(loss).detach()
        for gradient in gradients:
            if gradient is not None:
                total = total + gradient.sum().to(total)
        return total

    def _eager(self, args: Any, kwargs: Any) -> Any:
        with plain_errors():
            return self.loss_and_grads(self.model, self.guide, *args, **kwargs)

    def _replay(self, kind: _Kind, graph: Graph, inputs: list[Tensor]) -> Any:
        loss = self._run_graph(kind, graph, inputs)
        if hooked := kind.with_hooks():
            gradient_hooks.call(hooked)
        return loss

    def _run_graph(self, kind: _Kind, graph: Graph, inputs: list[Tensor]) -> Any:
        # Nobody differentiates by what comes out, and operators have less to keep account of.
        with torch.inference_mode():
            loss, self.health, *gradients = graph(*inputs)
        for parameter, gradient in zip(kind.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.current = kind.parameters
        self.mode = "compiled" if graph.compiled else "replayed"
        return loss

    def _give_up(self, kind: _Kind, reason: str, call: _Call, cause: str = "") -> Any:
        self.mode = "eager"
        kind.graph = None
        if call.numbers:  # with a graph for each number, as before
            self._numbers.refuse(call.key)
            warn_once(logger, self._pair, _EACH_NUMBER, reason)
            return self._run_once(call.args, call.kwargs)
        kind.eager = True
        self._failures[cause or reason] = self._failures.get(cause or reason, 0) + 1
        self._tell(reason)
        return self._watch(kind, call.args, call.kwargs)

    def _tell(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            told = "training steps run eagerly, which is slower: %s"
            warn_once(logger, self._pair, told, reason)

    def _trace(self, kind: _Kind, call: _Call) -> Any:
        if kind.watched is not None:
            kind.watched.expect()
        start = _Start(kind, call.inputs, self._state)

        def function(*tensors: Tensor) -> list[Tensor | None]:
            args, kwargs, rows = rebuilt(call.structure, iter(tensors))
            # Else those that nothing moves, and nobody drops, would be added to.
            _drop_gradients([*kind.parameters, *kind.unregistered])
            with (
                self._rows(rows),
                pyro.validation_enabled(False),
                _without_warnings(),
                gradient_hooks.aside(kind.parameters),  # for each step calls them
            ):
                loss = self._eager(args, kwargs)
            if not isinstance(loss, Tensor):
                raise UntraceableError(f"the loss is {type(loss).__name__}, no tensor")
            gradients = [parameter.grad for parameter in kind.parameters]
            _drop_gradients([*kind.parameters, *kind.unregistered])
            return [loss.detach(), self._health(loss, gradients), *gradients]

        try:
            graph = kind.graph = trace(function, call.inputs, writable=start.writable)
        except UntraceableError as error:
            start.again(values=True)
            return self._give_up(kind, str(error), call)
        moved = kind.watched is not None and not kind.watched.holds_tensors()
        start.again(values=True)
        if moved:
            reason = "a run puts new tensors in the place of buffers or parameters"
            return self._give_up(kind, reason, call)
        logger.info("a training step is %d operations", graph.num_operations)
        return self._checked(kind, graph, call)

    def _checked(self, kind: _Kind, graph: Graph, call: _Call) -> Any:
        """Run eagerly and by the graph from one start; keep the graph's answer if they agree."""
        start = _Start(kind, call.inputs, self._state)
        _drop_gradients(kind.parameters)
        # Those of the user run once in a step, on the gradients that are kept.
        known = kind.parameters
        with (
            gradient_hooks.aside(known),
            gradient_hooks.counted(known) as counts,
            ParamStatements() as statements,
        ):
            loss = torch.as_tensor(self._eager(call.args, call.kwargs)).detach()
        kind.backward_once = max(counts, default=0) <= 1
        gradients = [parameter.grad for parameter in kind.parameters]
        own = None if kind.watched is None else kind.watched.changed(plain=True)
        if new := kind.not_among(statements):
            # As where one was replaced in a module that is registered, but never called.
            start.again(values=True)
            _drop_gradients(new)
            self.mode, kind.graph = "eager", None
            return self._watch(kind, call.args, call.kwargs)
        start.again()
        found = self._run_graph(kind, graph, call.inputs)
        cause = "differs"
        reason = difference = _difference(
            loss,
            gradients,
            found,
            [parameter.grad for parameter in kind.parameters],
            exact=self.mode == "replayed",
        )
        if own is not None:
            cause = reason = (
                f"a step changes a value that it may read at the next one ({own}); make it a "
                "buffer, which is part of a graph, or change it outside of model and guide"
            )
        elif kind.with_hooks() and not kind.backward_once:
            cause = reason = _BACKWARD_AGAIN
        elif reason is not None:
            reason = f"the graph of a step does not agree: {reason}"
        if reason is None:
            if kind.watched is not None:
                kind.watched.settle()
            kind.compared.add(call.numbers)
            gradient_hooks.call(kind.with_hooks())
            return found
        start.again(values=True)
        if graph.captured and cause == "differs":
            graph.release()
            logger.warning(_ONE_BY_ONE, f"launched at once, they do not agree: {difference}")
            return self._checked(kind, graph, call)
        return self._give_up(kind, reason, call, cause)

    # --- the compiler

    def _pays(self, kind: _Kind, graph: Graph) -> bool:
        """Whether compiling takes less time than it saves in the steps that are left."""
        if self.compile is True:
            return not (graph.compiled or graph.uncompilable)
        # Where nobody knows, a run is as likely as not to go on for as long as it has.
        expected = kind.calls if self.steps is None else self.steps * kind.calls / self._calls
        if self.compile != "auto" or graph.compiled:
            return False
        again = any(k.graph is not None and k.graph.compiled for k in self._kinds.values())
        return graph.pays(expected, again=again)

    def _compile(self, kind: _Kind, graph: Graph, call: _Call) -> Any:
        try:
            graph.compile(*call.inputs)
        except RuntimeError as error:
            told = "training steps are replayed, not compiled: %s"
            warn_once(logger, self._pair, told, error)
            return self._replay(kind, graph, call.inputs)
        logger.info("training steps are compiled from step %d on", self._calls)
        return self._checked(kind, graph, call)

    def _capture(self, kind: _Kind, graph: Graph, call: _Call) -> Any:
        """Go over to one launch a step; stay with the graph as it is where that fails."""
        start = _Start(kind, call.inputs, self._state)
        try:
            graph.capture(*call.inputs)
        except RuntimeError as error:
            logger.warning(_ONE_BY_ONE, error)
        start.again()
        return self._checked(kind, graph, call)


class _Start:
    """The state that a step starts from, but for the parameters, to come back to."""

    def __init__(self, kind: _Kind, inputs: list[Tensor], state: Any) -> None:
        self._random = random_state()
        buffers = () if kind.watched is None else kind.watched.buffers()
        self._written = [(tensor, tensor.clone()) for tensor in (*buffers, *inputs)]
        self._loss, self._saved = state, None if state is None else state.state_dict()
        self._values = None if kind.watched is None else kind.watched.snapshot()
        self._stored = (
            StoreContents.now()
        )  # in which a loss may put new tensors: TraceGraph_ELBO's baselines

    @property
    def writable(self) -> list[Tensor]:
        """What a step may write to, because it can be undone."""
        baselines = () if self._loss is None else self._loss.carried
        return [*(tensor for tensor, _ in self._written), *baselines]

    def again(self, *, values: bool = False) -> None:
        """Go back.

        Args:
            values: whether Python's values go back too, as after a run that is no step.
        """
        if values:
            self._stored.restore()
            if self._values is not None:
                self._values()
        set_random_state(self._random)
        with torch.no_grad():
            for tensor, value in self._written:
                tensor.copy_(value)
        if self._loss is not None:
            self._loss.load_state_dict(self._saved)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep Pyro's losses from looking for NaN, which they would but warn of.

    And distributions that were made before, with validation on, from looking at values.
    """
    distribution: Any = torch.distributions.Distribution
    validate = distribution._validate_sample
    looks = {name: getattr(pyro.util, name) for name in ("torch_isnan", "torch_isinf")}
    for name in looks:
        setattr(pyro.util, name, lambda value: False)
    distribution._validate_sample = lambda self, value: None
    try:
        yield
    finally:
        distribution._validate_sample = validate
        for name, look in looks.items():
            setattr(pyro.util, name, look)


def _drop_gradients(parameters: list[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _difference(
    loss: Tensor,
    gradients: list[Tensor | None],
    found_loss: Tensor,
    found: list[Tensor | None],
    *,
    exact: bool,
) -> str | None:
    """Return how two losses and their gradients differ by more than rounding; None if not."""
    double = loss.dtype == torch.float64
    if exact:  # the same operations, in the same order
        tolerance = 1e-10 if double else 1e-5
    else:
        tolerance = 1e-7 if double else 1e-3
    same = functools.partial(torch.allclose, equal_nan=True)
    if not bool(loss.isfinite()) and not bool(found_loss.isfinite()):
        return None  # the caller will tell: there is nothing more to compare
    if not same(loss, found_loss.to(loss), rtol=tolerance, atol=tolerance):
        return f"its loss is {float(found_loss):.7g}, and {float(loss):.7g} in an eager step"
    sizes = [
        float(g.abs().nan_to_num(posinf=0.0).max()) if g is not None and g.numel() else 0.0
        for g in gradients
    ]
    # Where gradients vanish, what is left of them is the rounding of what they are the sum of.
    floor = max([1e-3 * max(sizes, default=0.0), 1e-3 * (1 + abs(float(loss)))])
    for index, (a, b) in enumerate(zip(gradients, found, strict=True)):
        if (a is None) != (b is None):
            return f"parameter {index} has a gradient in one and none in the other"
        if a is None or b is None:
            continue
        if not same(a, b, rtol=0.0, atol=tolerance * max(sizes[index], floor)):
            gap = float((a - b).abs().max())
            return (
                f"the gradients of parameter {index}, of shape {tuple(a.shape)}, "
                f"differ by {gap:.3g}"
            )
    return None
