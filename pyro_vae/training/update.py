"""The update of an optimizer, recorded once and repeated."""

from __future__ import annotations

import copy
import inspect
import logging
from typing import Any

import torch
from torch import Tensor

from pyro_vae.compiler.graph import Graph
from pyro_vae.compiler.identity_checks import identity_check
from pyro_vae.compiler.tracing import UntraceableError, trace
from pyro_vae.torch_internals import has_step_hooks, largest_magnitudes
from pyro_vae.training.optimizers import link_of

__all__ = ["Update"]

logger = logging.getLogger(__name__)


# Settings of an optimizer (its learning rate) that were met, and traced, at most.
_SETTINGS = 4


# Refuse sparse gradients.
_NO_SPARSE = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
)


class Update:
    """The update of an optimizer, recorded once and repeated where it is one of tensors alone.

    That is the case of PyTorch's fused optimizers, which keep all their state in tensors.

    Args:
        optimizer: a torch optimizer.

    Attributes:
        failed: for those who read losses later: a number, 0-dimensional, that becomes one with a
            loss or a gradient that is not finite and stays so; a fused optimizer skips its update
            then, as after loss scaling. None where nobody asked for it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if (
            inspect.signature(optimizer.step).parameters["closure"].default
            is inspect.Parameter.empty
        ):
            raise ValueError(
                f"optim: a step of {type(optimizer).__name__} evaluates the loss several times, "
                "which draws other random numbers each time: it would compare noise. Use an "
                "optimizer of one evaluation a step (torch.optim.Adam); pyro_vae.em and "
                "pyro_vae.refine have an L-BFGS of their own"
            )
        self.optimizer = optimizer
        self._link = link_of(optimizer)
        self._takes_sparse = isinstance(optimizer, torch.optim.SparseAdam)
        self.failed: Tensor | None = None
        self._graphs: dict[Any, Graph] = {}
        self._last: _Repeated | None = None
        self._num_added = -1  # parameters that add() was given last
        self._refused = False

    def add(self, parameters: list[Tensor]) -> None:
        """Take up parameters that the optimizer does not have yet.

        Args:
            parameters: all of them, in a list that only grows from call to call.
        """
        if len(parameters) == self._num_added:
            return
        self._num_added = len(parameters)
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        new = [p for p in parameters if id(p) not in known]
        if new:
            if self._link is None:
                self.optimizer.add_param_group({"params": new})
            else:
                self._link.add(new)
            self._graphs.clear()
            self._last = None

    def drop_gradients(self) -> None:
        """Do as Optimizer.zero_grad(), which takes as long as some operations of a small step."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def __call__(self, loss: Any = None, *, traced: bool) -> None:
        """Take a step of the optimizer on the gradients that the parameters have.

        Args:
            loss: of these gradients, a number or a tensor of one; where failures are marked.
            traced: whether they come from a graph.
        """
        if self._link is not None:
            self._link.pull()
        self._take(loss, traced=traced)
        if self._link is not None:
            self._link.push()

    def _take(self, loss: Any, *, traced: bool) -> None:
        if traced and self._last is not None and self._is_recordable(self._last):
            gradients = self._last.gradients()
            if gradients is not None:
                if self.failed is not None:
                    gradients.append(loss)
                self._last.graph(*gradients)
                return
        groups = self.optimizer.param_groups
        parameters = [parameter for group in groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters]
        state = self.optimizer.state
        # What a first step would make of the state is no constant of the graph.
        states = [state.get(p) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        if not traced or not states or not all(states) or not self._is_recordable():
            self._step(loss)
            return
        settings = (
            value
            for group in groups
            for name, value in group.items()
            if name not in ("params", "param_names")
        )
        # Of the state, for load_state_dict and others put a new one in its place.
        key = (
            *settings,
            *[gradient is None for gradient in gradients],
            *[id(next(iter(kept.values()))) for kept in states if kept],
        )
        given = [gradient for gradient in gradients if gradient is not None]
        if self.failed is not None:
            given.append(loss)
        if key in self._graphs:
            graph = self._graphs[key]
            if graph.capturable:
                self._capture(graph, given)
            graph(*given)
            is_whole = all(gradient is not None for gradient in gradients)
            self._last = _Repeated(self.optimizer, graph) if is_whole else None
        elif len(self._graphs) >= _SETTINGS:
            self._step(loss)  # as with a learning rate that changes at each step
        elif (recorded := self._recorded(given)) is not None:
            self._graphs[key] = recorded

    def _step(self, loss: Any) -> None:
        for group in self.optimizer.param_groups:
            for parameter in moving(group):
                if parameter.grad.is_sparse != self._takes_sparse:
                    parameter.grad = self._fitting(parameter, group)
                if parameter.grad.is_inference():  # which nothing outside of a graph may write to
                    parameter.grad = parameter.grad.clone()
        self._move(loss)

    def _move(self, loss: Any) -> None:
        optimizer: Any = self.optimizer
        if self.failed is None:
            optimizer.step()
            return
        gradients = [p.grad for group in optimizer.param_groups for p in moving(group)]
        gradients = [g for g in gradients if g.numel()]
        largest = largest_magnitudes(gradients) if gradients else []
        loss = torch.as_tensor(loss, device=self.failed.device).detach().reshape(())
        finite = torch.stack([loss, *largest]).isfinite().all()
        self.failed.copy_(torch.maximum(self.failed, (~finite).to(self.failed)))
        optimizer.found_inf = self.failed
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf

    def _fitting(self, parameter: Tensor, group: dict[str, Any]) -> Any:
        """Return a gradient as the optimizer can take it, where it is (or is not) sparse.

        Raises:
            TypeError: where it cannot.
        """
        kind = type(self.optimizer)
        if self._takes_sparse or kind in _NO_SPARSE:
            found, other = ("dense", "sparse") if self._takes_sparse else ("sparse", "dense")
            raise TypeError(
                f"optim: the gradient of a parameter of shape {tuple(parameter.shape)} is {found} "
                f"(those of nn.Embedding(sparse=True) are sparse), and {kind.__name__} takes "
                f"{other} ones alone. Make the embedding with sparse=False, or take "
                "torch.optim.SGD or torch.optim.Adagrad, which take both"
            )
        # The fused kernels take dense ones alone; where they are zero, nothing moves.
        gradient: Any = parameter.grad
        return gradient.to_dense() if group.get("fused") else gradient

    def _is_recordable(self, last: _Repeated | None = None) -> bool:
        optimizer = self.optimizer
        if (
            self._refused or has_step_hooks(optimizer) or "step" in vars(optimizer)
        ):  # a learning rate scheduler's
            return False
        if last is not None:
            return not last.graph.capturable and last.holds()
        return all(group.get("fused") for group in optimizer.param_groups)

    def _capture(self, graph: Graph, given: list[Any]) -> None:
        """Go over to one launch, where a trial of it does as the graph does."""
        tensors = [p for group in self.optimizer.param_groups for p in moving(group)]
        for parameter in list(tensors):
            state = self.optimizer.state[parameter].values()
            tensors += [value for value in state if isinstance(value, Tensor)]
        tensors += [] if self.failed is None else [self.failed]
        before = [tensor.detach().clone() for tensor in tensors]

        def outcome() -> list[Tensor]:
            """Take a step and come back."""
            graph(*given)
            found = [tensor.detach().clone() for tensor in tensors]
            with torch.no_grad():
                for tensor, value in zip(tensors, before, strict=True):
                    tensor.copy_(value)
            return found

        wanted = outcome()
        try:
            # They lie where they lay, being themselves the results of one launch.
            graph.capture(*given, adopt=True)
            pairs = zip(wanted, outcome(), strict=True)
            if all(torch.allclose(*pair, equal_nan=True) for pair in pairs):
                return
            error: Any = "launched at once, they do not agree"
        except RuntimeError as raised:
            error = raised
        graph.release()
        logger.warning("the kernels of the optimizer's step are launched one by one: %s", error)

    def _recorded(self, given: list[Any]) -> Graph | None:
        """Take a step and return the graph of it; None where it cannot be recorded."""
        optimizer = self.optimizer
        parameters = [p for group in optimizer.param_groups for p in moving(group)]
        before = copy.deepcopy(optimizer.state_dict())
        marks = [] if self.failed is None else [self.failed]
        values = [tensor.detach().clone() for tensor in (*parameters, *marks)]

        def function(*tensors: Tensor) -> list[Tensor | None]:
            gradients = tensors[: len(parameters)]
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            self._move(tensors[-1])
            return []

        try:
            return trace(function, given)
        except UntraceableError as error:
            logger.info("the optimizer's step is not part of the graph: %s", error)
            self._refused = True
            with torch.no_grad():
                for tensor, value in zip((*parameters, *marks), values, strict=True):
                    tensor.copy_(value)
            for parameter, gradient in zip(parameters, given, strict=False):
                parameter.grad = gradient
            optimizer.load_state_dict(before)
            self._step(given[-1])
            return None


class _Repeated:
    """The graph of an update of all parameters, and what of the optimizer it is for.

    That nothing has changed is found by identity, in a fraction of the time of comparing values.

    Args:
        optimizer: a torch optimizer, after a step by the graph.
        graph: of the update.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, graph: Graph) -> None:
        self.graph = graph
        self._groups = optimizer.param_groups
        self._sizes = self._num_parameters()
        self._parameters = [p for group in self._groups for p in group["params"]]
        entries: list[tuple[Any, Any]] = [(self._groups, i) for i in range(len(self._groups))]
        entries += [(group, name) for group in self._groups for name in group]
        for parameter in self._parameters:
            state = optimizer.state[parameter]
            # load_state_dict and others put new tensors into the state.
            entries += [(optimizer.state, parameter), (state, next(iter(state)))]
        slots = [(optimizer, "param_groups"), (optimizer, "state")]
        self._has = identity_check(entries, slots=slots)
        self._expected = [holder[key] for holder, key in entries]
        self._expected += [getattr(optimizer, name) for _, name in slots]

    def _num_parameters(self) -> list[int]:
        return [len(group["params"]) for group in self._groups]

    def holds(self) -> bool:
        """Return whether settings, state and parameters are those of the graph."""
        return self._num_parameters() == self._sizes and self._has(self._expected)

    def gradients(self) -> list[Tensor] | None:
        """Return the gradients of all parameters; None where one has none."""
        found = []
        for parameter in self._parameters:
            if (gradient := parameter.grad) is None:
                return None
            found.append(gradient)
        return found


def moving(group: dict[str, Any]) -> list[Any]:
    return [parameter for parameter in group["params"] if parameter.grad is not None]
