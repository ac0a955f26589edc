"""CompiledSVI: a training step of a model and a guide, traced once and replayed as a graph."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import pyro.infer
import torch
from torch import Tensor

from pyro_vae.losses.base import Objective
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.guide_kinds import row_guide
from pyro_vae.programs.handlers import keep_apart
from pyro_vae.programs.messages import plain_errors
from pyro_vae.programs.state import evaluation, module_of, one_thread, preserved_rng, unwrapped
from pyro_vae.programs.traces import OUTSIDE, non_finite_sites
from pyro_vae.programs.types import Compile, Program
from pyro_vae.training.optimizers import make_optimizer, parameters_in
from pyro_vae.training.table_rows import TableRows
from pyro_vae.training.traced_loss import TracedLoss
from pyro_vae.training.update import Update

logger = logging.getLogger(__name__)


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

    Inside ``guide.rows(index)`` of a LocalGuide, a step moves these rows of its table alone, as in
    :func:`pyro_vae.fit`. A row that stands in the minibatch twice moves once, by the sum of its
    gradients.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        optim: a function from parameters to a torch optimizer; a torch optimizer, which moves
            its own parameters and no others; or a pyro.optim object with plain arguments, which is
            translated to one torch optimizer (a fused one, where PyTorch has it) for all
            parameters. Gradients that parameters have before a step are dropped. Trained are the
            parameters that Pyro knows of (pyro.param, pyro.module, a PyroModule's), as by
            pyro.infer.SVI, or those of the torch optimizer. A module that is given the name of
            another one is trained, which pyro.infer.SVI does not do.
        loss: a pyro.infer.ELBO, Pyro's or ours; or a function of model, guide and arguments.
        loss_and_grads: as in pyro.infer.SVI; by default that of loss.
        num_samples: 0, because pyro.infer.SVI.run, which it serves, is deprecated in Pyro.
        num_steps: steps to expect, for compile="auto"; 0 where that is not known.
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
        model: Program,
        guide: Program,
        optim: Any,
        loss: Any,
        loss_and_grads: Callable[..., Any] | None = None,
        num_samples: int = 0,
        num_steps: int = 0,
        *,
        compile: Compile = "auto",
    ) -> None:
        if num_samples:
            what = "it serves pyro.infer.SVI.run, which Pyro deprecates; use pyro_vae.to_arviz"
            raise ValueError(f"num_samples={num_samples}: {what}, or pyro.infer.Predictive")
        self.model, self.guide, self.optim = model, guide, optim
        for module in map(module_of, map(unwrapped, (model, guide))):
            if module is not None:
                keep_apart(module)
        is_elbo = isinstance(loss, pyro.infer.ELBO)
        self.loss = loss.loss if is_elbo else loss
        by_loss = loss.loss_and_grads if is_elbo else self._differentiated
        self.loss_and_grads = loss_and_grads or by_loss
        self._traced = TracedLoss(
            model,
            guide,
            self.loss_and_grads,
            compile=compile,
            steps=num_steps or None,
            state=loss if isinstance(loss, Objective) else None,
            owners=(loss, loss_and_grads),
            wanted=self._of_optimizer,
        )
        table = row_guide(guide)
        self._rows = None if table is None else TableRows(table)
        self._update: Update | None = None
        self._moved: set[int] = set()  # parameters that had a gradient
        self._filled: list[Tensor] | None = None  # of the last step, where all had one
        self._warned = False  # of parameters that are not trained

    @property
    def mode(self) -> str:
        """How the last step ran: "eager", "replayed" or "compiled"."""
        return self._traced.mode

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The torch optimizer; None before the first step."""
        return None if self._update is None else self._update.optimizer

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledSVI:
        other = memo[id(self)] = copy.copy(self)
        vars(other).update(copy.deepcopy(vars(self), memo))
        return other

    def __copy__(self) -> CompiledSVI:
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __getstate__(self) -> Any:
        raise TypeError(
            "a CompiledSVI cannot be pickled: its graphs are of this process. Save state_dict() of "
            "model, guide and svi.optimizer, or pyro.get_param_store().save(path); pyro_vae.fit "
            "writes checkpoints (checkpoint=path)"
        )

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take a gradient step; return the loss, a number (or what the loss returns)."""
        with one_thread():
            with self._using_rows():
                loss = self._traced(*args, **kwargs)
            self._warn_of_unregistered()
            moved = self._move()
            number = _number(loss)
            if moved and isinstance(number, float) and not math.isfinite(number):
                self._refuse_outside(args, kwargs)
            return number

    def _using_rows(self) -> contextlib.AbstractContextManager[None]:
        """Give the guide the rows of ``guide.rows(index)`` alone, where they alone are to move."""
        table = row_guide(self.guide)
        index = None if table is None else table.given_rows
        if self._rows is None or index is None:
            return contextlib.nullcontext()
        repeats = len(index.unique()) < len(index)
        if not self._rows.serves(index, repeats=repeats):
            return contextlib.nullcontext()
        return self._rows.taking(index, repeats=repeats)

    def _move(self) -> bool:
        """Update the parameters by the gradients that they have; return whether there are any."""
        parameters, is_made = self._traced.parameters, isinstance(self.optim, torch.optim.Optimizer)
        if self._update is None:
            if not (parameters or is_made):
                return False
            self._update = Update(make_optimizer(self.optim, parameters), rows=self._rows)
        if not is_made:  # else its parameters are its maker's
            self._update.add(parameters)
        self._fill_gradients()
        self._update(traced=self._traced.mode != "eager")
        self._update.drop_gradients()
        return True

    def _refuse_outside(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise ValueError where a loss is infinite for values outside a support."""
        batch = Batch(args, kwargs)
        # Losses that are always infinite (TraceTailAdaptive_ELBO's) go on as before.
        with preserved_rng(batch.device), evaluation(self.model, self.guide):
            sites = non_finite_sites(self.model, self.guide, batch)
        if outside := [site for site in sites if site.endswith(OUTSIDE)]:
            raise ValueError(
                f"the loss is infinite, at sites {', '.join(outside)}: the guide proposes values "
                "where the model's density is zero. Propose on the support of its distribution, as "
                "the guides of pyro_vae do; pv.WakeSleep takes wider proposals"
            )

    def _of_optimizer(self) -> list[Tensor]:
        """Return the parameters of an optimizer that the user made: it moves them, no others."""
        return parameters_in(self.optim) if isinstance(self.optim, torch.optim.Optimizer) else []

    def _fill_gradients(self) -> None:
        """Give zeros to parameters of this step that have no gradient, but had one.

        As pyro.infer.SVI does: momentum moves them on.
        """
        current = self._traced.current
        table = None if self._rows is None or self._rows.gradient is None else self._rows.table
        if current is self._filled and self._traced.mode != "eager":
            return  # a graph gives gradients to the same parameters each time
        missing = [p for p in current if p.grad is None and p is not table]
        self._filled = None if missing else current
        self._moved |= set(map(id, current)) - set(map(id, missing))
        for parameter in missing:
            if id(parameter) in self._moved:
                parameter.grad = torch.zeros_like(parameter)

    def _warn_of_unregistered(self) -> None:
        """Say once which parameters get a gradient and stay where they are."""
        if self._warned or not self._traced.unregistered:
            return
        self._warned = True
        shapes = [str(tuple(p.shape)) for p in self._traced.unregistered]
        told = ", ".join(shapes[:5] + ["..."] * (len(shapes) > 5))
        logger.warning(
            f"{len(shapes)} parameters of modules, of shapes {told}, have a gradient and are not "
            "trained, for Pyro does not know of them, as in pyro.infer.SVI. Register them by "
            "pyro.module(name, module), or freeze them by requires_grad_(False)"
        )

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss, a number (or what the loss returns), without a step."""
        with one_thread(), torch.no_grad(), plain_errors():
            return _number(self.loss(self.model, self.guide, *args, **kwargs))

    def _differentiated(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss that a function gives, and add its gradients."""
        loss = self.loss(*args, **kwargs)
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.backward()
        return loss


def _number(loss: Any) -> Any:
    """Return a loss as a number, or several; what is neither, as it is."""
    if isinstance(loss, tuple):
        return type(loss)(map(_number, loss))
    return loss.item() if isinstance(loss, Tensor) else loss
