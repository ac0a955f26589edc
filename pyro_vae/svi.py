"""CompiledSVI: a training step of a model and a guide, traced once and replayed as a graph."""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Callable
from typing import Any

import pyro.infer
import torch
from torch import Tensor

from pyro_vae.batches import Batch
from pyro_vae.graphs import Graph, UntraceableError, trace
from pyro_vae.handlers import keep_apart
from pyro_vae.identity_checks import identity_check
from pyro_vae.objectives import Objective
from pyro_vae.optimizers import link_of, make_optimizer
from pyro_vae.plain_errors import plain_errors
from pyro_vae.running import evaluation, module_of, one_thread, preserved_rng, unwrapped
from pyro_vae.traced_loss import TracedLoss
from pyro_vae.traces import OUTSIDE, non_finite_sites

__all__ = ["CompiledSVI", "Update"]

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


class CompiledSVI:
    r"""Stochastic variational inference as pyro.infer.SVI does it, without its interpreter.

    Has the arguments and methods of pyro.infer.SVI. The first step with a kind of arguments
    (shapes, dtypes, values of what is no tensor) runs eagerly. The second records every
    tensor operation of loss, gradients and update, and later ones repeat these, replayed one
    by one or compiled by TorchInductor. With one seed all of them give the same numbers to
    rounding: the same operations on random numbers drawn in the same order.

    What is recorded is proven: loss and gradients are compared with an eager step's when
    traced, and again in later steps, ever more rarely (the 8th, 32nd, 128th, ...). Where they
    differ, or cannot be traced (Python that reads numbers out of tensors), steps run eagerly
    and a logged warning says why. A graph is made anew for other shapes, after train() or
    eval(), and where plain attributes of modules, their parameters or buffers were replaced.
    Other state that Python keeps between steps is seen by the comparisons alone: hand it to
    the model as a tensor, and it stays an input of the graph.

    Distributions do not validate their arguments in a graph; the eager steps do.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        optim: a function from parameters to a torch optimizer; a torch optimizer, which moves
            its own parameters and no others; or a pyro.optim object with plain arguments, which is
            translated to one torch optimizer (a fused one, where PyTorch has it) for all
            parameters. Gradients that parameters have before a step are dropped. Trained are the
            parameters that Pyro is told of (pyro.param, pyro.module, a PyroModule's), as by
            pyro.infer.SVI, or those of the torch optimizer. A module that is given the name of
            another one is trained, which pyro.infer.SVI does not do.
        loss: a pyro.infer.ELBO, Pyro's or ours; or a function of model, guide and arguments.
        loss_and_grads: as in pyro.infer.SVI; by default that of loss.
        num_samples: 0: pyro.infer.SVI.run, which it serves, is deprecated in Pyro.
        num_steps: steps to expect, for compile="auto"; 0 if nobody knows.
        compile: how steps run: "replay" the recorded operations; True compiles them first;
            "auto" replays, and compiles once the run is, or has been, so long that this saves
            time (a logged message of level INFO says so); False runs eagerly.

    Attributes:
        optimizer: the torch optimizer; None before the first step.
        mode: how the last step ran: "eager", "replayed" or "compiled".

    Raises:
        TypeError: for an optimizer that is none.
        ValueError: for a pyro.optim object that cannot be translated, or an unknown option.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_vae as pv
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.zeros(5)
        >>> guide = pv.LocalGuide(model, num_data=5, example=x)
        >>> svi = pv.CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pv.ELBO())
        >>> losses = [svi.step(x) for _ in range(3)]
        >>> svi.mode
        'replayed'
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: Any,
        loss: Any,
        loss_and_grads: Callable[..., Any] | None = None,
        num_samples: int = 0,
        num_steps: int = 0,
        *,
        compile: str | bool = "auto",
    ) -> None:
        if num_samples:
            raise ValueError(
                f"num_samples={num_samples}: it serves pyro.infer.SVI.run, which Pyro deprecates; "
                "use pyro.infer.Predictive, or pyro_vae.to_arviz"
            )
        self.model, self.guide, self.optim = model, guide, optim
        for module in map(module_of, map(unwrapped, (model, guide))):
            if module is not None:
                keep_apart(module)
        is_elbo = isinstance(loss, pyro.infer.ELBO)
        self.loss = loss.loss if is_elbo else loss
        given = loss_and_grads
        if loss_and_grads is None:
            loss_and_grads = loss.loss_and_grads if is_elbo else self._differentiated
        self.loss_and_grads = loss_and_grads
        self._traced = TracedLoss(
            model,
            guide,
            loss_and_grads,
            compile=compile,
            steps=num_steps or None,
            state=loss if isinstance(loss, Objective) else None,
            owners=(loss, given),
            wanted=self._of_optimizer,
        )
        self._update: Update | None = None
        self._moved: set[int] = set()  # parameters that had a gradient
        self._filled: list[Tensor] | None = None  # of the last step, where all had one
        self._told = False

    @property
    def mode(self) -> str:
        """How the last step ran: "eager", "replayed" or "compiled"."""
        return self._traced.mode

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The torch optimizer; None before the first step."""
        return None if self._update is None else self._update.optimizer

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledSVI:
        other = copy.copy(self)
        memo[id(self)] = other
        vars(other).update(copy.deepcopy(vars(self), memo))
        return other

    def __copy__(self) -> CompiledSVI:
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __getstate__(self) -> Any:
        raise TypeError(
            "a CompiledSVI cannot be pickled, for its graphs are of this process. Save what it "
            "has trained: model.state_dict(), guide.state_dict() or "
            "pyro.get_param_store().save(path), and svi.optimizer.state_dict(); pyro_vae.fit "
            "writes checkpoints by itself (checkpoint=path)"
        )

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take a gradient step; return the loss, a number (or what the loss returns)."""
        with one_thread():
            return self._step(*args, **kwargs)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        loss = self._traced(*args, **kwargs)
        parameters = self._traced.parameters
        self._tell_of_unregistered()
        if self._update is None and (parameters or isinstance(self.optim, torch.optim.Optimizer)):
            self._update = Update(make_optimizer(self.optim, parameters))
        if self._update is None:  # nothing to move, yet
            return _number(loss)
        if not isinstance(self.optim, torch.optim.Optimizer):  # whose parameters are its maker's
            self._update.add(parameters)
        self._fill_gradients()
        self._update(traced=self._traced.mode != "eager")
        self._update.drop_gradients()
        number = _number(loss)
        if isinstance(number, float) and not math.isfinite(number):
            self._tell_outside(args, kwargs)
        return number

    def _tell_outside(self, args: Any, kwargs: Any) -> None:
        """Raise ValueError where a loss is infinite for values outside a support."""
        batch = Batch(args, kwargs)
        # Losses that are always infinite (TraceTailAdaptive_ELBO's) go on as if nobody had looked.
        with preserved_rng(batch.device), evaluation(self.model, self.guide):
            told = non_finite_sites(self.model, self.guide, batch)
        if outside := [site for site in told if site.endswith(OUTSIDE)]:
            raise ValueError(
                f"the loss is infinite, at sites {', '.join(outside)}: the guide proposes values "
                "where the model's density is zero. Propose on the support of its distribution "
                "alone, as the guides of pyro_vae do; pv.WakeSleep takes proposals that are wider"
            )

    def _of_optimizer(self) -> list[Tensor]:
        """Return the parameters of an optimizer that the user made: theirs are moved, no others."""
        if not isinstance(self.optim, torch.optim.Optimizer):
            return []
        return [p for group in self.optim.param_groups for p in group["params"]]

    def _fill_gradients(self) -> None:
        """Give zeros to parameters of this step that have no gradient, but had one.

        As pyro.infer.SVI does: momentum moves them on.
        """
        current = self._traced.current
        if current is self._filled and self._traced.mode != "eager":
            return  # a graph gives gradients to the same parameters each time
        missing = [parameter for parameter in current if parameter.grad is None]
        self._filled = None if missing else current
        for parameter in current:
            if parameter.grad is not None:
                self._moved.add(id(parameter))
            elif id(parameter) in self._moved:
                parameter.grad = torch.zeros_like(parameter)

    def _tell_of_unregistered(self) -> None:
        """Say once which parameters get a gradient and stay where they are."""
        if self._told or not self._traced.unregistered:
            return
        self._told = True
        shapes = [tuple(p.shape) for p in self._traced.unregistered]
        logger.warning(
            "%d parameters of modules, of shapes %s, have a gradient and are not trained, for Pyro "
            "does not know of them, as in pyro.infer.SVI. Register them by "
            "pyro.module(name, module), or freeze them by requires_grad_(False)",
            len(shapes),
            ", ".join(map(str, shapes[:5])) + (", ..." if len(shapes) > 5 else ""),
        )

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss, a number (or what the loss returns), without a step."""
        with one_thread(), torch.no_grad(), plain_errors():
            return _number(self.loss(self.model, self.guide, *args, **kwargs))

    def _differentiated(self, *args: Any, **kwargs: Any) -> Any:
        loss = self.loss(*args, **kwargs)
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.backward()
        return loss


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
            for parameter in _moving(group):
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
        gradients = [p.grad for group in optimizer.param_groups for p in _moving(group)]
        gradients = [g for g in gradients if g.numel()]
        largest = torch._foreach_norm(gradients, math.inf) if gradients else []
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
        hooked = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
        if self._refused or hooked or "step" in vars(optimizer):  # a learning rate scheduler's
            return False
        if last is not None:
            return not last.graph.capturable and last.holds()
        return all(group.get("fused") for group in optimizer.param_groups)

    def _capture(self, graph: Graph, given: list[Any]) -> None:
        """Go over to one launch, where a trial of it does as the graph does."""
        tensors = [p for group in self.optimizer.param_groups for p in _moving(group)]
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
        parameters = [p for group in optimizer.param_groups for p in _moving(group)]
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


def _moving(group: dict[str, Any]) -> list[Any]:
    return [parameter for parameter in group["params"] if parameter.grad is not None]


def _number(loss: Any) -> Any:
    if isinstance(loss, tuple):
        return type(loss)(map(_number, loss))
    return loss.item() if isinstance(loss, Tensor) else loss
