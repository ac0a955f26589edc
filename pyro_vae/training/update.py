"""The update of an optimizer, recorded once and repeated."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, optim

from pyro_vae.compiler.agreement import same_state
from pyro_vae.compiler.captured import Place, Unchanged
from pyro_vae.compiler.graph import Graph
from pyro_vae.compiler.tracing import UntraceableError, trace
from pyro_vae.torch_internals import copy_all, largest_magnitudes, step_hooks
from pyro_vae.training.clipping import Clip
from pyro_vae.training.optimizers import PyroLink, drop_gradients, parameters_in
from pyro_vae.training.row_rules import has_row_state, rule_of
from pyro_vae.training.table_rows import RowStep, TableRows

logger = logging.getLogger(__name__)

_MAX_SETTINGS = 4  # of an optimizer (its learning rate) that are traced
# Refuse sparse gradients.
_NO_SPARSE = (optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.RMSprop)

Loss = Tensor | float | None


class Update:
    """The update of an optimizer, recorded once and repeated where it is one of tensors alone.

    That is the case of PyTorch's fused optimizers, which keep all their state in tensors. The
    graph is one of its own, beside that of loss and gradients: a learning rate is a constant of it,
    and a new rate traces these few operations alone.

    Of a table with a row per datum, the rows of a minibatch alone may move, each by moments and a
    step count of its own; where the optimizer has no rule for that, the whole table does.

    Args:
        optimizer: a torch optimizer.
        clip: how the gradients of a step are clipped.
        rows: of a guide's table, which a step may be differentiated by; None for no such guide.
        lasting: whether a mark of failure stays for all later steps; else it is of the last one.

    Attributes:
        failed: for losses that are read later: a number, 0-dimensional, that becomes one with a
            loss or a gradient that is not finite; a fused optimizer skips its update
            then, as after loss scaling. None where failures are not marked.

    Raises:
        ValueError: for an optimizer that evaluates the loss itself.
    """

    def __init__(
        self,
        optimizer: optim.Optimizer,
        clip: Clip | None = None,
        rows: TableRows | None = None,
        *,
        lasting: bool = True,
    ) -> None:
        closure = inspect.signature(optimizer.step).parameters["closure"]
        if closure.default is inspect.Parameter.empty:
            raise ValueError(
                f"optim: a step of {type(optimizer).__name__} evaluates the loss several times, on "
                "other random numbers each time: it would compare noise. Use one of one evaluation "
                "(torch.optim.Adam); pyro_vae.em and pyro_vae.refine have their L-BFGS"
            )
        self.optimizer = optimizer
        self.failed: Tensor | None = None
        self._clip, self._lasting = clip, lasting
        self._rule = None if rows is None else rule_of(optimizer)
        if rows is not None and self._rule is None:
            rows.whole_because = f"{type(optimizer).__name__} has no rule for rows by themselves"
        self._rows = rows
        self._row_step: RowStep | None = None  # of this step
        self._group: dict[str, Any] | None = None  # that of the table
        self._prepared: tuple[int, ...] = ()  # tensors of the table's state, by identity
        self._link: PyroLink | None = vars(optimizer).get("pyro_link")
        self._takes_sparse = isinstance(optimizer, optim.SparseAdam)
        self._graphs: dict[Hashable, Graph] = {}
        self._repeated: dict[int, _Repeated] = {}  # by the index of the rows that move
        self._num_added = -1  # parameters that add() was given last
        self._refused = False  # True once tracing failed

    def add(self, parameters: list[Tensor]) -> None:
        """Take up parameters that the optimizer does not have yet.

        Args:
            parameters: all of them, in a list that only grows from call to call.
        """
        if len(parameters) == self._num_added:
            return
        self._num_added = len(parameters)
        known = set(map(id, parameters_in(self.optimizer)))
        if new := [p for p in parameters if id(p) not in known]:
            if self._link is None:
                self.optimizer.add_param_group({"params": new})
            else:
                self._link.add(new)
            self._graphs.clear()
            self._repeated.clear()

    def forget(self) -> None:
        """Record the update anew: the optimizer's state has come to lie elsewhere."""
        self._graphs.clear()
        self._last = None

    def drop_gradients(self) -> None:
        """Leave the parameters without a gradient."""
        for group in self.optimizer.param_groups:
            drop_gradients(group["params"])
        if self._rows is not None:
            self._rows.drop()

    def gradients(self) -> list[Tensor]:
        """Return the gradients of now: of the parameters, and of the rows of a table."""
        found = [p.grad for p in parameters_in(self.optimizer) if p.grad is not None]
        rows = None if self._rows is None else self._rows.gradient
        return found if rows is None else [*found, rows]

    @property
    def is_fused(self) -> bool:
        """Whether a loss that is not finite stops all updates, without a look at it."""
        own = None if self._rows is None or self._rule is None else self._rows.table
        groups = self.optimizer.param_groups
        return all(g.get("fused") or all(p is own for p in g["params"]) for g in groups)

    def __call__(self, loss: Loss = None, *, traced: bool) -> None:
        """Take a step of the optimizer on the gradients that the parameters have.

        Args:
            loss: of these gradients, a number or a tensor of one; where failures are marked.
            traced: whether they come from a graph.
        """
        if self._link is not None:
            self._link.pull()
        self._row_step = self._rows_to_move()
        if not (traced and self._may_record()):
            self._step(loss)
        elif not self._repeats_last(loss):
            self._record_or_replay(loss)
        if self._link is not None:
            self._link.push()

    def _may_record(self) -> bool:
        """Return whether a step runs no Python that a graph would leave out."""
        hooks = step_hooks(self.optimizer)
        if self._refused or any(hook is not _refuse_whole for hook in hooks):
            return False
        return "step" not in vars(self.optimizer)  # where a learning rate scheduler puts its own

    def _repeats_last(self, loss: Loss) -> bool:
        """Take the same step as the last time, where nothing but numbers changed; say whether."""
        rows = self._row_step
        index = None if rows is None else rows.index
        last = self._repeated.get(id(index))
        if last is None or last.index is not index:  # in a copy, identities are others
            return False
        if last.graph.capturable or not last.holds():
            return False
        inputs: list[Any] = []
        for parameter in last.parameters:
            if (gradient := parameter.grad) is None:
                return False
            inputs.append(gradient)
        if rows is not None:
            inputs.append(rows.gradient)
        if self.failed is not None:
            inputs.append(loss)
        last.graph(*inputs)
        return True

    def _record_or_replay(self, loss: Loss) -> None:
        """Take a step by the graph for these settings, or trace it."""
        moved, rows = self._moved(), self._row_step
        states = [self.optimizer.state.get(parameter) for parameter in moved]
        # What a first step would make of the state is no constant of the graph.
        may = all(states) and (bool(states) or rows is not None) and self.is_fused
        if rows is not None and self._rule is not None:
            may = may and rows.lasts and rows.index is not None and self._rule.tensors_alone
            states += [self._state_of_table] if self._state_of_table else []
        if not may:
            self._step(loss)
            return
        key = self._key(states)
        inputs: list[Any] = self._inputs(moved)
        inputs += [] if self.failed is None else [loss]
        if (graph := self._graphs.get(key)) is not None:
            self._replay(graph, inputs)
        elif len(self._graphs) >= _MAX_SETTINGS:
            self._step(loss)  # as with a learning rate that changes at each step
        elif (recorded := self._recorded(inputs)) is not None:
            self._graphs[key] = recorded

    def _replay(self, graph: Graph, inputs: list[Tensor]) -> None:
        """Take a step by a graph, and remember it for the next one."""
        if graph.capturable:
            self._capture(graph, inputs)
        graph(*inputs)
        rows, moved = self._row_step, self._moved()
        index = None if rows is None else rows.index
        self._repeated.pop(id(index), None)
        if len(moved) + (rows is not None) == len(parameters_in(self.optimizer)):
            states = [self._state_of_table] if rows is not None and self._state_of_table else []
            states += [self.optimizer.state[parameter] for parameter in moved]
            repeated = _Repeated(self.optimizer, graph, moved, states, index)
            self._repeated[id(index)] = repeated

    # --- the rows of a table

    def _table_group(self) -> dict[str, Any] | None:
        """Return the group of settings that the table is in; None where it is in none."""
        if self._rows is None:
            return None
        table, groups = self._rows.table, self.optimizer.param_groups
        if not any(group is self._group for group in groups):
            held = (group for group in groups if any(p is table for p in group["params"]))
            self._group = next(held, None)
        return self._group

    @property
    def _state_of_table(self) -> dict[str, Any]:
        """The optimizer's state of the table, made where it is not there."""
        state: dict[str, Any] = self.optimizer.state[self._of_table.table]
        return state

    @property
    def _of_table(self) -> TableRows:
        if self._rows is None:
            raise RuntimeError("there is no table")
        return self._rows

    def _rows_to_move(self) -> RowStep | None:
        """Return the rows that move by states of their own; None where the optimizer moves all."""
        if self._rows is None or (group := self._table_group()) is None:
            return None
        rows, table = self._rows, self._rows.table
        by_rows = rows.gradient is not None and table.grad is None and self._rule is not None
        if not by_rows:
            if (gradient := rows.whole_gradient()) is None:
                return None
            table.grad = gradient
            # An optimizer that does not know the mark of a failure is not to move what it spares.
            marked = self.failed is not None and not group.get("fused")
            if self._rule is None or not (has_row_state(self._state_of_table) or marked):
                return None
        if self._rule is None:
            return None
        state = self._state_of_table
        if not state or (*map(id, state.values()),) != self._prepared:
            self._rule.prepare(group, table, state)
            self._prepared = (*map(id, state.values()),)
        if all(hook is not _refuse_whole for hook in step_hooks(self.optimizer)):
            single = [] if self._link is None else [self._link.single(table)]
            for optimizer in (self.optimizer, *single):
                optimizer.register_step_pre_hook(_refuse_whole)
        step = rows.step(whole=not by_rows)
        table.grad = None
        return step

    # --- what there is to move

    def _moved(self) -> list[Any]:
        """Return the parameters that have a gradient."""
        return [p for p in parameters_in(self.optimizer) if p.grad is not None]

    def _key(self, states: list[Any]) -> Hashable:
        """Return what a graph of the update is for: settings, what moves, and its state."""
        groups, own = self.optimizer.param_groups, ("params", "param_names")
        settings = [value for group in groups for name, value in group.items() if name not in own]
        # By identity, because load_state_dict and others put new tensors into the state.
        tensors = [id(next(iter(state.values()))) for state in states]
        index = None if self._row_step is None else id(self._row_step.index)
        there = [p.grad is None for p in parameters_in(self.optimizer)]
        return (*settings, *there, *tensors, index)

    def _snapshot(self) -> tuple[list[Tensor], Callable[[], None]]:
        """Return copies of all that a step writes to, of a table its rows, and what undoes it."""
        moved, rows = self._moved(), self._row_step
        states = [value for p in moved for value in self.optimizer.state[p].values()]
        whole = [*moved, *(value for value in states if isinstance(value, Tensor))]
        whole += [] if self.failed is None else [self.failed]
        parts = [] if rows is None else rows.written(self._state_of_table)
        values = _copies(whole)
        of_rows = [] if rows is None else [rows.of(part).detach().clone() for part in parts]

        @torch.no_grad()
        def put_back() -> None:
            copy_all(whole, values)
            for part, value in zip(parts, of_rows, strict=True):
                if rows is not None:
                    rows.put(part, value)

        return [*values, *of_rows], put_back

    # --- steps of the optimizer itself

    def _step(self, loss: Loss) -> None:
        """Take a step of the optimizer itself, on gradients that it takes."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse != self._takes_sparse:
                    parameter.grad = self._fitting(parameter, group)
                if parameter.grad.is_inference():  # which nothing outside of a graph may write to
                    parameter.grad = parameter.grad.clone()
        self._move(loss)

    def _move(self, loss: Loss) -> None:
        """Take the optimizer's step; mark a failure where failures are marked."""
        optimizer: Any = self.optimizer
        if self.failed is None:
            self._clip_gradients()
            optimizer.step()
            self._move_rows()
            return
        gradients = [gradient for gradient in self._inputs(self._moved()) if gradient.numel()]
        largest = largest_magnitudes(gradients) if gradients else []
        loss = torch.as_tensor(loss, device=self.failed.device).detach().reshape(())
        finite = torch.stack([loss, *largest]).isfinite().all()
        failed = (~finite).to(self.failed)
        self.failed.copy_(torch.maximum(self.failed, failed) if self._lasting else failed)
        self._clip_gradients()
        optimizer.found_inf = self.failed
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf
        self._move_rows()

    def _move_rows(self) -> None:
        """Let the rows of a table take their step."""
        if self._row_step is not None and self._rule is not None:
            group = self._table_group() or {}
            self._row_step.take(self._rule, group, self._state_of_table, self.failed)

    def _clip_gradients(self) -> None:
        """Clip the gradients that parameters and rows have, where that is wanted."""
        if not self._clip:
            return
        moved, rows = self._moved(), self._row_step
        clipped = self._clip(self._inputs(moved))
        _set_gradients(moved, clipped)
        if rows is not None:
            self._row_step = replace(rows, gradient=clipped[-1])

    def _inputs(self, moved: list[Any]) -> list[Tensor]:
        """Return the gradients of parameters, and that of the rows which move."""
        of_rows = [] if self._row_step is None else [self._row_step.gradient]
        return [*(parameter.grad for parameter in moved), *of_rows]

    def _fitting(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Return a gradient as the optimizer takes it, sparse or not; raise where it cannot."""
        kind = type(self.optimizer)
        if self._takes_sparse or kind in _NO_SPARSE:
            found, other = ("dense", "sparse") if self._takes_sparse else ("sparse", "dense")
            raise TypeError(
                f"optim: the gradient of a parameter of shape {tuple(parameter.shape)} is {found} "
                f"(of an nn.Embedding?), and {kind.__name__} takes {other} ones alone. Make it "
                "sparse=False, or take torch.optim.SGD or torch.optim.Adagrad, which take both"
            )
        # The fused kernels take dense ones alone; where they are zero, nothing moves.
        gradient: Any = parameter.grad
        return gradient.to_dense() if group.get("fused") else gradient

    # --- graphs

    def _capture(self, graph: Graph, inputs: list[Tensor]) -> None:
        """Go over to one launch, where a trial of it does as the graph does."""
        _, put_back = self._snapshot()
        error = "launched at once, they do not agree"

        def outcome() -> list[Tensor]:
            """Take a step and come back."""
            graph(*inputs)
            found, _ = self._snapshot()
            put_back()
            return found

        wanted = outcome()
        try:
            # They lie where they lay, being themselves the results of one launch.
            graph.capture(*inputs, adopt=True)
            if same_state(wanted, outcome()):
                return
        except RuntimeError as raised:
            error = str(raised)
        graph.release()
        logger.warning("the kernels of the optimizer's step are launched one by one: %s", error)

    def _recorded(self, inputs: list[Tensor]) -> Graph | None:
        """Take a step and return the graph of it; None where it cannot be recorded."""
        moved, rows = self._moved(), self._row_step
        _, put_back = self._snapshot()

        def function(*tensors: Tensor) -> list[Tensor | None]:
            _set_gradients(moved, tensors)
            if rows is not None:
                self._row_step = replace(rows, gradient=tensors[len(moved)])
            self._move(tensors[-1])
            return []

        try:
            return trace(function, inputs)
        except UntraceableError as error:
            logger.info("the optimizer's step is not part of the graph: %s", error)
        finally:
            self._row_step = rows
        self._refused = True
        put_back()
        _set_gradients(moved, inputs)
        self._step(inputs[-1])
        return None


class _Repeated:
    """The graph of an update of all parameters, and what of the optimizer it is for.

    That nothing has changed is found by identity, in a fraction of the time of comparing values.
    """

    def __init__(
        self,
        optimizer: optim.Optimizer,
        graph: Graph,
        parameters: list[Tensor],
        states: list[dict[str, Any]],
        index: Tensor | None,
    ) -> None:
        self.graph, self.parameters, self.index = graph, parameters, index
        groups = optimizer.param_groups
        places = [Place(optimizer, name, is_item=False) for name in ("param_groups", "state")]
        places += [Place(groups, i) for i in range(len(groups))]
        places += [Place(group, name) for group in groups for name in group]
        places += [Place(optimizer.state, p) for p in optimizer.state]
        # load_state_dict and others put new tensors into the state.
        places += [Place(state, next(iter(state))) for state in states]
        # Whether settings, state and parameters are those of the graph.
        self.holds = Unchanged([groups, *(group["params"] for group in groups)], places).holds


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _set_gradients(parameters: list[Tensor], gradients: Sequence[Tensor]) -> None:
    """Give each parameter its gradient; a number may follow, the loss of them."""
    for parameter, gradient in zip(parameters, gradients, strict=False):
        parameter.grad = gradient


def _refuse_whole(optimizer: optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Raise ValueError for a step of the optimizer alone on a table whose rows count their own."""
    for parameter in parameters_in(optimizer):
        if parameter.grad is not None and has_row_state(optimizer.state.get(parameter, {})):
            raise ValueError(
                f"this optimizer holds moments and a step count for each row of a table of "
                f"{len(parameter)} rows, as pyro_vae.fit and pyro_vae.CompiledSVI train it: go on "
                "with one of these, or make a new optimizer"
            )
