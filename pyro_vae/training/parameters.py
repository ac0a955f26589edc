"""The parameters of a model and a guide, in nn.Modules or Pyro's store."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae.programs.batch import Batch
from pyro_vae.programs.handlers import ParamStatements, constrained_parameters
from pyro_vae.programs.state import (
    FirstValues,
    called_modules,
    evaluation,
    module_of,
    preserved_rng,
)
from pyro_vae.programs.traces import trace_pair

__all__ = ["Parameters", "all_finite"]

logger = logging.getLogger(__name__)


class Parameters:
    """The parameters and buffers of a model and a guide, each once.

    nn.Modules hold some; plain functions keep theirs in Pyro's parameter store
    (pyro.param, pyro.module). One run of the pair finds the latter.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        batch: their arguments.

    Attributes:
        trained: those that are not frozen, each once.
        untold: by role ("model", "guide"), the names of parameters of modules that Pyro is not
            told of; pyro.infer.SVI would not train them.
        late: the names of those that the first step will initialize, in Pyro's store: until then
            others of their shape stand for them.

    Raises:
        ValueError: where there is nothing to train.
    """

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any], batch: Batch) -> None:
        self._pair, self._batch = (model, guide), batch
        self._modules: dict[str, nn.Module] = {}
        for role, fn in (("model", model), ("guide", guide)):
            module = module_of(fn)
            if module is not None and all(module is not other for other in self._modules.values()):
                self._modules[role] = module
        _tell_of_sharing(self._modules)
        self.find()

    def find(self) -> None:
        """Run the pair to see what it has: once more where a step has initialized ``late`` ones."""
        self._first = FirstValues()
        called, statements = self._run()
        if statements.clash:  # a module may have taken up what the store has by its name
            called, statements = self._run()
        held = {id(p): p for module in self._modules.values() for p in module.parameters()}
        modules = [m for module in self._modules.values() for m in module.modules()]
        modules += called.values()
        told = sorted(statements.tensors(modules), key=lambda pair: pair[0])
        self._stored: dict[str, Tensor] = {}
        for name, tensor in told:
            if id(tensor) not in held:
                # A network of the model's and one of the guide's may have one name.
                self._stored[name if name not in self._stored else f"{name} (guide)"] = tensor
        of_modules = {id(p) for module in modules for p in module._parameters.values()}
        self.late = tuple(
            name
            for name, tensor in self._stored.items()
            if name in self._first.names and "$$$" not in name and id(tensor) not in of_modules
        )
        self._find_buffers(called.values())
        self.untold: dict[str, list[str]] = {}
        for role, module in self._modules.items():
            ids = {id(tensor) for _, tensor in told}
            trained = ((name, p) for name, p in module.named_parameters() if p.requires_grad)
            if names := [name for name, p in trained if id(p) not in ids]:
                self.untold[role] = names
        found = {**held, **{id(p): p for p in self._stored.values()}}
        self.trained = [parameter for parameter in found.values() if parameter.requires_grad]
        if not self.trained:
            raise ValueError(
                "model and guide have no parameters to train. Plain functions register theirs "
                "with pyro.param or pyro.module(name, module); a module they merely close over "
                "is invisible to Pyro"
            )

    def _run(self) -> tuple[dict[int, nn.Module], ParamStatements]:
        with (
            torch.no_grad(),
            preserved_rng(self._batch.device),
            evaluation(*self._pair, first=self._first),
            poutine.block(),
            called_modules() as called,
            ParamStatements(checked=True) as statements,
        ):
            trace_pair(*self._pair, self._batch.args, self._batch.kwargs)
        return called, statements

    def _find_buffers(self, called: Iterable[nn.Module]) -> None:
        """Find the buffers (running means) of modules that plain functions call."""
        held = {id(buffer) for module in self._modules.values() for buffer in module.buffers()}
        self._buffers: dict[str, Tensor] = {}  # by order of call
        for module in called:
            for buffer in module.buffers():
                if id(buffer) not in held:
                    held.add(id(buffer))
                    self._buffers[str(len(self._buffers))] = buffer

    def initialize(self) -> None:
        """Give the ``late`` ones a value, which is to be replaced by another."""
        self._first.commit()
        self.late = ()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return a copy of all parameters and buffers."""
        state = {
            role: {name: value.detach().clone() for name, value in module.state_dict().items()}
            for role, module in self._modules.items()
        }
        state["buffers"] = {name: value.clone() for name, value in self._buffers.items()}
        state["store"] = {name: value.detach().clone() for name, value in self._stored.items()}
        return state

    def finite(self) -> bool:
        """Return whether all parameters and buffers are finite."""
        return all(all_finite(values.values()) for values in self.state().values())

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put a state back, in place.

        Raises:
            ValueError: where its names or shapes are not these.
        """
        mine = self.state()
        for role in sorted(set(mine) | set(state)):
            here = {name: tuple(value.shape) for name, value in mine.get(role, {}).items()}
            there = {name: tuple(value.shape) for name, value in state.get(role, {}).items()}
            differ = [n for n in sorted(here | there) if here.get(n) != there.get(n)]
            if differ:
                told = "; ".join(
                    f"{n}: saved {there.get(n, 'none')}, here {here.get(n, 'none')}"
                    for n in differ[:5]
                )
                raise ValueError(f"the saved parameters ({role}) are not this pair's: {told}")
        for role, module in self._modules.items():
            module.load_state_dict(state[role])
        with torch.no_grad():
            for name, value in self._buffers.items():
                value.copy_(state["buffers"][name])
            for name, value in self._stored.items():
                value.copy_(state["store"][name])


def _tell_of_sharing(modules: Mapping[str, nn.Module]) -> None:
    """Warn where model and guide have a PyroParam of one name, and so one parameter."""
    if len(modules) < 2 or pyro.settings.get("module_local_params"):
        return
    of_model, of_guide = map(constrained_parameters, modules.values())
    if shared := [n for n, p in of_model.items() if n in of_guide and of_guide[n] is not p]:
        logger.warning(
            "model and guide have PyroParams of the names %s: in Pyro's parameter store they are "
            "one. Give them other names, or set pyro.settings.set(module_local_params=True) "
            "before model and guide are made",
            shared,
        )


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether no tensor holds NaN or an infinite value, by one transfer from the device."""
    dense = (t.coalesce().values() if t.is_sparse else t for t in tensors)
    extremes = [t.abs().max() for t in dense if t.is_floating_point() and t.numel()]
    return not extremes or bool(torch.isfinite(torch.stack(extremes)).all())
