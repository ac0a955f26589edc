"""The parameters of a model and a guide, in nn.Modules or Pyro's store."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.guides.table_file import copy_of
from pyro_vae.programs.batch import Batch
from pyro_vae.programs.guide_kinds import buffers_of_runs, is_given
from pyro_vae.programs.handlers import ParamStatements, constrained_parameters
from pyro_vae.programs.pair import Pair
from pyro_vae.programs.state import FirstValues, called_modules, looking, module_of
from pyro_vae.programs.traces import trace_pair
from pyro_vae.programs.types import Program
from pyro_vae.torch_internals import parameters_of

logger = logging.getLogger(__name__)


# Tensors by name, by their holder: "model" and "guide" (modules), "buffers" (of modules that
# plain functions call) and "store" (Pyro's parameter store).
State: TypeAlias = Mapping[str, Mapping[str, Tensor]]


class Parameters:
    """The parameters and buffers of a model and a guide, each once.

    nn.Modules hold some; plain functions keep theirs in Pyro's parameter store
    (pyro.param, pyro.module). One run of the pair finds the latter.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        batch: their arguments; None for no run, and the parameters of modules alone.
        seen: the three as a pair that has run.
        needed: whether there must be something to train.

    Attributes:
        trained: those that are not frozen, each once.
        unregistered: by role ("model", "guide"), the names of parameters of modules that are not
            registered with Pyro, which pyro.infer.SVI would not train.
        late: the names of those that the first step will initialize, in Pyro's store: until then
            others of their shape stand for them.

    Raises:
        ValueError: where there is nothing to train.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        batch: Batch | None,
        seen: Pair | None = None,
        *,
        needed: bool = True,
    ) -> None:
        self._pair, self._batch = (model, guide), batch
        self._needed = needed and batch is not None
        self._modules: dict[str, nn.Module] = {}
        for role, program in (("model", model), ("guide", guide)):
            module = module_of(program)
            if module is not None and all(module is not other for other in self._modules.values()):
                self._modules[role] = module
        _warn_of_sharing(self._modules)
        self.find(seen)

    def find(self, seen: Pair | None = None) -> None:
        """Find them in a run of the pair; again once a step has initialized the ``late`` ones."""
        self._first = FirstValues() if seen is None else seen.first
        known = None if seen is None else (seen.single.called, seen.single.statements)
        called, statements = known or self._run()
        if statements.clash:  # a module may have taken up what the store has by its name
            called, statements = self._run()
        roots = self._modules.values()
        held = {id(p): p for root in roots for p in root.parameters()}
        modules = [*(module for root in roots for module in root.modules()), *called]
        registered = sorted(statements.tensors(modules), key=lambda pair: pair[0])
        self._stored: dict[str, Tensor] = {}
        for name, tensor in registered:
            if id(tensor) not in held:
                # A network of the model's and one of the guide's may have one name.
                self._stored[name if name not in self._stored else f"{name} (guide)"] = tensor
        of_modules = {id(p) for module in modules for p in parameters_of(module).values()}
        first = {n: p for n, p in self._stored.items() if n in self._first.made and "$$$" not in n}
        self.late = tuple(name for name, p in first.items() if id(p) not in of_modules)
        self._buffers = self._find_buffers(called)
        self._infinite = {id(buffer) for buffer in self.buffers if not all_finite([buffer])}
        ids = {id(tensor) for _, tensor in registered}
        self.unregistered = {
            role: [n for n, p in root.named_parameters() if p.requires_grad and id(p) not in ids]
            for role, root in self._modules.items()
        }
        found = {**held, **{id(p): p for p in self._stored.values()}}
        self.trained = [parameter for parameter in found.values() if parameter.requires_grad]
        if not self.trained and self._needed:
            raise ValueError(
                "model and guide have no parameters to train. Plain functions register theirs with "
                "pyro.param or pyro.module(name, module); others are invisible to Pyro"
            )

    def _run(self) -> tuple[list[nn.Module], ParamStatements]:
        """Run the pair; return the modules that it calls, and its param statements."""
        if self._batch is None:
            return [], ParamStatements()
        statements = ParamStatements(checked=True)
        seen = looking(*self._pair, device=self._batch.device, first=self._first)
        with seen, called_modules() as called, statements:
            trace_pair(*self._pair, self._batch)
        return list(called.values()), statements

    def _find_buffers(self, called: Iterable[nn.Module]) -> dict[str, Tensor]:
        """Return the buffers (running means) of modules that plain functions call, in order."""
        held = {id(buffer) for module in self._modules.values() for buffer in module.buffers()}
        found = {id(buffer): buffer for module in called for buffer in module.buffers()}
        others = (buffer for key, buffer in found.items() if key not in held)
        return {str(number): buffer for number, buffer in enumerate(others)}

    @property
    def buffers(self) -> list[Tensor]:
        """The buffers of all modules that a step may write to."""
        parts = [part for module in self._modules.values() for part in module.modules()]
        return [*(b for part in parts for b in buffers_of_runs(part)), *self._buffers.values()]

    def initialize(self) -> None:
        """Give the ``late`` ones a value, which is to be replaced by another."""
        self._first.commit()
        self.late = ()

    @property
    def held(self) -> set[int]:
        """The identities of the parameters of modules."""
        return {id(p) for root in self._modules.values() for p in root.parameters()}

    def constraints(self) -> dict[str, str]:
        """Return in words what values in Pyro's store are kept to, by the names of parameters."""
        known = pyro.get_param_store().get_state()["constraints"]
        known = {**known, **{name: made[1] for name, made in self._first.made.items()}}
        return {name: repr(known[name]) for name in self._stored if name in known}

    def _tensors(self) -> State:
        """Return all parameters and buffers, themselves."""
        held = {role: module.state_dict() for role, module in self._modules.items()}
        return {**held, "buffers": self._buffers, "store": self._stored}

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters and buffers, themselves, by holder and name."""
        return {
            f"{holder} {name}": tensor
            for holder, tensors in self._tensors().items()
            for name, tensor in tensors.items()
        }

    def state(self) -> State:
        """Return a copy of all parameters and buffers, on disk where they are."""
        return {
            holder: {name: copy_of(value) for name, value in tensors.items()}
            for holder, tensors in self._tensors().items()
        }

    @torch.no_grad()
    def finite(self) -> bool:
        """Return whether all parameters are finite, and the buffers that were so at first.

        Some are not by what they are: a mask of minus infinity, what a table knows of its data.
        """
        buffers = [buffer for buffer in self.buffers if id(buffer) not in self._infinite]
        return all_finite([*self.trained, *buffers])

    def differ(self, state: State) -> str:
        """Return how a state differs from this pair's in names, shapes and dtypes; "" for none."""
        here, there = map(_forms, (self._tensors(), state))
        differ = [key for key in sorted(here | there) if here.get(key) != there.get(key)]
        first = [key for key in differ if key[0] == differ[0][0]]
        parts = []
        for key in first[:5]:
            (shape, dtype), (shape_here, dtype_here) = (
                form.get(key, ("none", None)) for form in (there, here)
            )
            if shape == shape_here:
                shape, shape_here = dtype, dtype_here
            parts.append(f"{key[1]}: saved {shape}, here {shape_here}")
        if not parts:
            return ""
        more = f" and {len(differ) - len(parts)} more" if len(differ) > len(parts) else ""
        return f"the saved parameters ({first[0][0]}) are not this pair's: {'; '.join(parts)}{more}"

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Put a state back, in place.

        Raises:
            ValueError: where its names, shapes or dtypes are not these.
        """
        if text := self.differ(state):
            raise ValueError(text)
        for role, module in self._modules.items():
            module.load_state_dict(state[role])
        for holder, tensors in (("buffers", self._buffers), ("store", self._stored)):
            for name, value in tensors.items():
                value.copy_(state[holder][name])


def _forms(state: State) -> dict[tuple[str, str], tuple[Any, Any]]:
    """Return shape and dtype by holder and name."""
    return {
        (holder, name): (tuple(value.shape), value.dtype)
        for holder, tensors in state.items()
        for name, value in tensors.items()
        if not is_given(name)
    }


def _warn_of_sharing(modules: Mapping[str, nn.Module]) -> None:
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
