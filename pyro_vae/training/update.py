"""The update of an optimizer, recorded once and repeated."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, optim

from pyro_vae.compiler.agreement import same_state
from pyro_vae.compiler.captured import Place, Unchanged
from pyro_vae.compiler.graph import Graph
from pyro_vae.compiler.tracing import UntraceableError, trace
from pyro_vae.torch_internals import copy_all, has_step_hooks, largest_magnitudes
from pyro_vae.training.clipping import Clip
from pyro_vae.training.optimizers import PyroLink, drop_gradients, parameters_in

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

    Args:
        optimizer: a torch optimizer.
        clip: how the gradients of a step are clipped.
        lasting: whether a mark of failure stays for all later steps; else it is of the last one.

    Attributes:
        failed: for losses that are read later: a number, 0-dimensional, that becomes one with a
            loss or a gradient that is not finite; a fused optimizer skips its update
            then, as after loss scaling. None where failures are not marked.

    Raises:
        ValueError: for an optimizer that evaluates the loss itself.
    """

    def __init__(
        self, optimizer: optim.Optimizer, clip: Clip | None = None, *, lasting: bool = True
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
        self._link: PyroLink | None = vars(optimizer).get("pyro_link")
        self._takes_sparse = isinstance(optimizer, optim.SparseAdam)
        self._graphs: dict[Hashable, Graph] = {}
        self._last: _Repeated | None = None
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
            self._last = None

    def drop_gradients(self) -> None:
        """Leave the parameters without a gradient."""
        for group in self.optimizer.param_groups:
            drop_gradients(group["params"])

    def __call__(self, loss: Loss = None, *, traced: bool) -> None:
        """Take a step of the optimizer on the gradients that the parameters have.

        Args:
            loss: of these gradients, a number or a tensor of one; where failures are marked.
            traced: whether they come from a graph.
        """
        if self._link is not None:
            self._link.pull()
        if not (traced and self._may_record()):
            self._step(loss)
        elif not self._repeats_last(loss):
            self._record_or_replay(loss)
        if self._link is not None:
            self._link.push()

    def _may_record(self) -> bool:
        """Return whether a step runs no Python that a graph would leave out."""
        if self._refused or has_step_hooks(self.optimizer):
            return False
        return "step" not in vars(self.optimizer)  # where a learning rate scheduler puts its own

    def _repeats_last(self, loss: Loss) -> bool:
        """Take the same step as the last time, where nothing but numbers changed; say whether."""
        last = self._last
        if last is None or last.graph.capturable or not last.holds():
            return False
        inputs: list[Any] = []
        for parameter in last.parameters:
            if (gradient := parameter.grad) is None:
                return False
            inputs.append(gradient)
        if self.failed is not None:
            inputs.append(loss)
        last.graph(*inputs)
        return True

    def _record_or_replay(self, loss: Loss) -> None:
        """Take a step by the graph for these settings, or trace it."""
        moved = self._moved()
        states = [self.optimizer.state.get(parameter) for parameter in moved]
        fused = all(group.get("fused") for group in self.optimizer.param_groups)
        # What a first step would make of the state is no constant of the graph.
        if not fused or not states or not all(states):
            self._step(loss)
            return
        key = self._key(states)
        marked = [] if self.failed is None else [loss]
        inputs = [*(parameter.grad for parameter in moved), *marked]
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
        is_whole = all(parameter.grad is not None for parameter in parameters_in(self.optimizer))
        self._last = _Repeated(self.optimizer, graph) if is_whole else None

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
        return (*settings, *[p.grad is None for p in parameters_in(self.optimizer)], *tensors)

    def _written(self) -> list[Tensor]:
        """Return what a step writes to, the optimizer's state aside."""
        return [*self._moved(), *([] if self.failed is None else [self.failed])]

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
            return
        gradients = [p.grad for p in self._moved() if p.grad.numel()]
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

    def _clip_gradients(self) -> None:
        """Clip the gradients that the parameters have, where that is wanted."""
        if self._clip:
            moved = self._moved()
            _set_gradients(moved, self._clip([parameter.grad for parameter in moved]))

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
        state = self.optimizer.state
        values = [value for parameter in self._moved() for value in state[parameter].values()]
        tensors = [*self._written(), *(value for value in values if isinstance(value, Tensor))]
        before, error = _copies(tensors), "launched at once, they do not agree"

        def outcome() -> list[Tensor]:
            """Take a step and come back."""
            graph(*inputs)
            found = _copies(tensors)
            _put_back(tensors, before)
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
        moved, tensors = self._moved(), self._written()
        state, before = copy.deepcopy(self.optimizer.state_dict()), _copies(tensors)

        def function(*tensors: Tensor) -> list[Tensor | None]:
            _set_gradients(moved, tensors)
            self._move(tensors[-1])
            return []

        try:
            return trace(function, inputs)
        except UntraceableError as error:
            logger.info("the optimizer's step is not part of the graph: %s", error)
        self._refused = True
        _put_back(tensors, before)
        _set_gradients(moved, inputs)
        self.optimizer.load_state_dict(state)
        self._step(inputs[-1])
        return None


class _Repeated:
    """The graph of an update of all parameters, and what of the optimizer it is for.

    That nothing has changed is found by identity, in a fraction of the time of comparing values.
    """

    def __init__(self, optimizer: optim.Optimizer, graph: Graph) -> None:
        self.graph, self.parameters = graph, parameters_in(optimizer)
        groups = optimizer.param_groups
        places = [Place(optimizer, name, is_item=False) for name in ("param_groups", "state")]
        places += [Place(groups, i) for i in range(len(groups))]
        places += [Place(group, name) for group in groups for name in group]
        for parameter in self.parameters:
            state = optimizer.state[parameter]
            # load_state_dict and others put new tensors into the state.
            places += [Place(optimizer.state, parameter), Place(state, next(iter(state)))]
        # Whether settings, state and parameters are those of the graph.
        self.holds = Unchanged([groups, *(group["params"] for group in groups)], places).holds


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _set_gradients(parameters: list[Tensor], gradients: Sequence[Tensor]) -> None:
    """Give each parameter its gradient; a number may follow, the loss of them."""
    for parameter, gradient in zip(parameters, gradients, strict=False):
        parameter.grad = gradient


@torch.no_grad()
def _put_back(tensors: list[Tensor], values: list[Tensor]) -> None:
    copy_all(tensors, values)
