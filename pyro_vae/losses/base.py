"""The base of all losses: plans, gradients, the interface of pyro.infer.ELBO."""

from __future__ import annotations

import abc
import math
from collections.abc import Hashable, Mapping
from typing import Any

import pyro.infer
import torch
from torch import Tensor

from pyro_vae.particles.plan import DataNeed, Enumeration, Needs, Plan, plan
from pyro_vae.particles.training_run import Tracer, TrainingRun
from pyro_vae.programs.batch import Batch, arguments, as_batch
from pyro_vae.programs.messages import as_count
from pyro_vae.programs.pair import Pair
from pyro_vae.programs.state import evaluation, preserved_rng
from pyro_vae.programs.traces import trace_guide, trace_pair
from pyro_vae.programs.types import DataPlate, Node, Particles, Program, Trace
from pyro_vae.recording import is_recording

_PLANS = 16  # remembered at most


class Objective(pyro.infer.ELBO, abc.ABC):
    """A loss of Pyro's, a reduction of terms [K, N] per site; see the subclasses.

    Works in ``pyro.infer.SVI(model, guide, optim, loss=...)``, as an nn.Module through
    ``loss(model, guide)``, and in :func:`pyro_vae.fit`. A subclass gives
    :meth:`_loss` and :meth:`_explained`.

    Args:
        num_particles: draws of the guide for an estimate.
        vectorize_particles: as in :class:`pyro_vae.ELBO`.
        data_plate: as in :func:`pyro_vae.log_weights`.
    """

    num_particles: int
    # What a plan has to find out for the loss: see pyro_vae.particles.plan.Needs.
    _data: DataNeed = "no"
    _enumeration: Enumeration = "no"
    _share_globals = False
    _one_minibatch = False  # whether all particles share the minibatch that the model draws

    def __init__(
        self, num_particles: int, vectorize_particles: bool, data_plate: DataPlate
    ) -> None:
        super().__init__(  # type: ignore[no-untyped-call]
            num_particles=as_count("num_particles", num_particles),
            vectorize_particles=vectorize_particles,
        )
        self.data_plate = data_plate
        self._baselines: dict[str, Tensor] = {}  # of score-function gradients, by site
        self._plans: dict[tuple[Hashable, ...], tuple[Plan, Program, Program]] = {}
        self._known: dict[tuple[Hashable, ...], Pair] = {}  # pairs that were looked at

    def __getstate__(self) -> dict[str, Any]:
        # A plan holds its pair: a copy makes its own.
        return {**vars(self), "_plans": {}, "_known": {}}

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the loss, a scalar to differentiate, in nats."""
        return self._loss(model, guide, arguments(args, kwargs))

    @abc.abstractmethod
    def _loss(self, model: Program, guide: Program, batch: Batch) -> Tensor:
        """Return the loss, a scalar to differentiate, in nats."""

    def explain(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> dict[str, str]:
        """Return, for each latent site, how its part of the loss is computed, and why."""
        batch = arguments(args, kwargs)
        with torch.no_grad(), preserved_rng(batch.device), evaluation(model, guide):
            run = self._run(model, guide, batch)
        summed_out = "summed out: discrete, and not proposed by the guide"
        return {**dict.fromkeys(run.plan.summed_out, summed_out), **self._explained(run)}

    @abc.abstractmethod
    def _explained(self, run: TrainingRun) -> dict[str, str]:
        """Return, for each proposal, how its part of the loss is computed, and why."""

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return the loss as a number, in nats, without gradients."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def _checked(
        self, run: TrainingRun, loss: Tensor, kls: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return the loss; raise ValueError where it is infinite for values outside a support.

        Closed forms are infinite where a proposal reaches outside, whatever was drawn; there are
        none (None) of a bound, whose weights may be zero.
        """
        # An infinite term beside the baseline of its gradient is NaN.
        if is_recording() or not bool((loss == math.inf) | (loss.isnan() & (kls is not None))):
            return loss
        reaching = [f"{name!r}" for name, kl in (kls or {}).items() if bool((kl == math.inf).any())]
        if sites := run.outside() or reaching:
            raise ValueError(
                f"the loss is infinite: the guide proposes values of {', '.join(sites)} where the "
                "model's density is zero. Propose on the support of its distribution alone, as the "
                "guides of pyro_vae do; pv.WakeSleep takes proposals that are wider"
            )
        return loss

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Return the loss as a number, and add its gradients to the parameters'."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    @property
    def coupling(self) -> str:
        """What keeps the loss of a minibatch from being a sum over its data; empty if nothing."""
        return ""

    @property
    def carried(self) -> list[Tensor]:
        """The tensors that a step leaves to the next, and may write to."""
        return list(self._baselines.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that steps carry on, for a checkpoint: running baselines."""
        return {name: value.clone() for name, value in self._baselines.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state of :meth:`state_dict`."""
        for name in set(self._baselines) - set(state):
            del self._baselines[name]
        for name, value in state.items():  # in place, where a graph may read it
            self._baselines.setdefault(name, value.clone()).copy_(value)

    def _get_trace(
        self, model: Program, guide: Program, args: Any, kwargs: Any
    ) -> tuple[Trace, Trace]:
        return trace_pair(model, guide, arguments(args, kwargs))

    def _run(
        self, model: Program, guide: Program, batch: Batch, tracer: Tracer = trace_guide
    ) -> TrainingRun:
        """Run a pair by its plan, which is made anew where it does not fit."""
        key, shares = _key(model, guide, batch), self._one_minibatch
        for _ in range(2):
            found = self._plan(key, model, guide, batch)
            run = TrainingRun(
                found, model, guide, batch, self.num_particles, tracer=tracer, one_minibatch=shares
            )
            if run.as_planned:
                return run
            del self._plans[key]
        raise ValueError(
            "the latent sites of the model are not the same in two runs on the same arguments"
        )

    def take_up(self, pair: Pair) -> None:
        """Plan by what runs of a pair have shown already, in the first step that is like it."""
        self._known = {_key(pair.model, pair.user_guide, pair.batch): pair}

    def _plan(
        self, key: tuple[Hashable, ...], model: Program, guide: Program, batch: Batch
    ) -> Plan:
        """Return the plan of a pair on arguments of this signature; make it where there is none."""
        if key in self._plans and not self._plans[key][0].is_stale:
            return self._plans[key][0]
        self._plans.pop(key, None)
        while len(self._plans) >= _PLANS:
            del self._plans[next(iter(self._plans))]
        pair = self._known.pop(key, None) or Pair(model, guide, batch)
        particles: Particles = "auto" if self.vectorize_particles else "loop"
        needs = (self.data_plate, self._data, self._enumeration, self._share_globals)
        with pair.first.installed(), pair.its_rows():
            made = plan(pair, Needs(self.num_particles, particles, *needs))
        # With the pair, so that no other object takes its identity.
        self._plans[key] = (made, model, guide)
        return made


def explain(loss: Objective, model: Program, guide: Program, *batch: Any) -> dict[str, str]:
    """Return, for each latent site, whether a loss takes its KL analytically, and why.

    Args:
        loss: a loss of ours, for example ELBO().
        model: a Pyro model.
        guide: a Pyro guide.
        *batch: their arguments.

    Returns:
        Site name to "analytic: ..." or "sampled: ...".

    Raises:
        TypeError: for a loss that is not ours.
    """
    if not isinstance(loss, Objective):
        raise TypeError(f"explain knows the losses of pyro_vae, not {type(loss).__name__}")
    looked_at = as_batch(*batch)
    return loss.explain(model, guide, *looked_at.args, **looked_at.kwargs)


def _key(model: Program, guide: Program, batch: Batch) -> tuple[Hashable, ...]:
    """Return what tells pairs, and kinds of arguments, apart."""
    return _identity(model), _identity(guide), _signature(batch.args), _signature(batch.kwargs)


def _identity(fn: Program) -> tuple[int, int]:
    """Return the identity of a callable, and of its object if it is a bound method."""
    return id(getattr(fn, "__func__", fn)), id(getattr(fn, "__self__", None))


def _signature(value: Any) -> Hashable:
    """Return an argument's signature: types, dimensions and flags, not its numbers."""
    if isinstance(value, Mapping):
        return tuple((name, _signature(value[name])) for name in sorted(value, key=str))
    if isinstance(value, (tuple, list)):
        return tuple(map(_signature, value))
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.ndim == 0):
        return "number"  # which a graph may take as a tensor
    return type(value), getattr(value, "ndim", None)


def without_value(term: Tensor) -> Tensor:
    """Return zero, with the gradient of a term."""
    return term - term.detach()


def not_reparameterized(name: str, node: Node) -> ValueError:
    """Return the error for a proposal that pathwise gradients cannot go through."""
    return ValueError(
        f"the guide's site {name!r} ({type(node['fn']).__name__}) cannot be reparameterized, which "
        "pathwise gradients need. If it is discrete with few values, leave it out of the guide, "
        "and it is summed out; else use pv.ELBO(estimator='score') or pv.WakeSleep"
    )
