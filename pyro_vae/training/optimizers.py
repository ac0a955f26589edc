"""Optimizers: one of torch for all parameters, and Pyro's objects kept in step with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyro
import pyro.optim
import torch
from torch import Tensor

# Have a fused kernel on the CPU and on CUDA, and all their state in tensors.
_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
# How a kernel is called: no setting of what it does.
KERNELS = frozenset({"fused", "foreach", "capturable", "differentiable"})
_OF_ITS_OWN = KERNELS | {"params", "param_names"}  # of a group


def make_optimizer(optim: Any, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Return one torch optimizer for all parameters.

    Args:
        optim: a function from parameters to a torch optimizer, a torch optimizer, or a
            pyro.optim object with plain arguments (see :class:`PyroLink`); None for Adam.
        parameters: to train.

    Raises:
        TypeError: for anything else.
        ValueError: for a pyro.optim object that cannot be translated, or an optimizer of
            other parameters.
    """
    if optim is None:
        adam = torch.optim.Adam
        return adam(parameters, **_fused_options(adam, parameters, {"lr": 1e-3}))
    if isinstance(optim, pyro.optim.PyroOptim):
        return PyroLink(optim, parameters).optimizer
    is_made = isinstance(optim, torch.optim.Optimizer) or not callable(optim)
    made = optim if is_made else optim(parameters)
    if not isinstance(made, torch.optim.Optimizer):
        what = "a function from parameters to a torch optimizer, or an optimizer, is needed"
        raise TypeError(f"optim={optim!r}: {what}")
    if set(map(id, parameters)).isdisjoint(map(id, parameters_in(made))):
        what = "none of its parameters is one of the model or the guide; pass a function from these"
        raise ValueError(f"optim: {what}")
    return made


def parameters_in(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return the parameters of an optimizer."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def drop_gradients(parameters: Iterable[Tensor]) -> None:
    """Do as Optimizer.zero_grad(), which takes as long as some operations of a small step."""
    for parameter in parameters:
        parameter.grad = None


class PyroLink:
    """One torch optimizer for what a pyro.optim object has an optimizer each for, in step with it.

    The two have one state: that of another pyro_vae.CompiledSVI, of pyro.infer.SVI with the same
    object, of ``optim.get_state()`` and ``optim.save(path)``; what ``optim.load(path)`` or
    ``optim.set_state(state)`` has brought waits for its parameters, as Pyro has it. Learning rates
    that are set in ``optim.optim_objs``, or in the torch optimizer, count in both.

    Args:
        optim: a pyro.optim object with plain arguments.
        parameters: to train.

    Attributes:
        optimizer: the torch optimizer, a fused one where PyTorch has it.

    Raises:
        ValueError: for an object whose arguments are not plain.
    """

    def __init__(self, optim: Any, parameters: list[Tensor]) -> None:
        _check_plain(optim)
        self._optim = optim
        self._options = _fused_options(optim.pt_optim_constructor, parameters, optim.pt_optim_args)
        self._parameters = list(parameters)
        self._of_groups: list[Any] = []  # their learning rates when last in step
        make: Callable[..., torch.optim.Optimizer] = optim.pt_optim_constructor
        self.optimizer = make(self._groups(), **self._options)
        self._share_state()
        self.optimizer.register_load_state_dict_post_hook(self._loaded)
        vars(self.optimizer)["pyro_link"] = self

    def add(self, parameters: list[Tensor]) -> None:
        """Take up more parameters."""
        self._parameters += parameters
        self._regroup()

    def pull(self) -> None:
        """Take over learning rates that were set in Pyro's object."""
        single = self._optim.optim_objs
        for parameter, rate in zip(self._parameters, self._rates, strict=True):
            if single[parameter].param_groups[0].get("lr") != rate:
                self._regroup()
                return

    def push(self) -> None:
        """Hand on learning rates that were set in the torch optimizer, or by its step."""
        groups = self.optimizer.param_groups
        rates = [group.get("lr") for group in groups]
        if rates == self._of_groups:
            return
        self._of_groups = rates
        found = {id(p): group.get("lr") for group in groups for p in group["params"]}
        self._rates = [found[id(parameter)] for parameter in self._parameters]
        for parameter, rate in zip(self._parameters, self._rates, strict=True):
            self.single(parameter).param_groups[0]["lr"] = rate

    def _regroup(self) -> None:
        """Give the torch optimizer the groups of the parameters as they are now."""
        defaults = self.optimizer.defaults
        self.optimizer.param_groups.clear()
        for group in self._groups():
            self.optimizer.add_param_group({**defaults, **group})
        self._share_state()

    def _groups(self) -> list[dict[str, Any]]:
        """Return groups of the parameters whose settings are the same; note the learning rates."""
        alike: list[dict[str, Any]] = []
        members: list[list[Tensor]] = []
        self._rates = []
        for parameter in self._parameters:
            group = self.single(parameter).param_groups[0]
            settings = {name: group[name] for name in group if name not in _OF_ITS_OWN}
            self._rates.append(settings.get("lr"))
            if settings not in alike:
                alike.append(settings)
                members.append([])
            members[alike.index(settings)].append(parameter)
        self._of_groups = [settings.get("lr") for settings in alike]
        return [{"params": p, **settings} for p, settings in zip(members, alike, strict=True)]

    def single(self, parameter: Tensor) -> torch.optim.Optimizer:
        """Return Pyro's optimizer of one parameter, made as Pyro does."""
        optim = self._optim
        if parameter not in optim.optim_objs:
            single = optim.optim_objs[parameter] = optim._get_optim(parameter)
            optim.grad_clip[parameter] = optim._get_grad_clip(parameter)
            for group in single.param_groups:  # its state is to be that of the same kernel
                group.update({n: v for n, v in self._options.items() if n in KERNELS})
            name = pyro.get_param_store().param_name(parameter)
            if (state := optim._state_waiting_to_be_consumed.pop(name, None)) is not None:
                single.load_state_dict(state)
        found: torch.optim.Optimizer = optim.optim_objs[parameter]
        return found

    def _share_state(self) -> None:
        """Make the state of each parameter one object in both."""
        for parameter in self._parameters:
            self.optimizer.state[parameter] = self.single(parameter).state[parameter]
        # A fused SGD fails where some parameters have a momentum and some not, as where one gets
        # its first gradient in a later step.
        is_sgd = isinstance(self.optimizer, torch.optim.SGD)
        for group in self.optimizer.param_groups if is_sgd else ():
            for parameter in group["params"] if group["fused"] and group["momentum"] else ():
                state = self.optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)

    def _loaded(self, optimizer: torch.optim.Optimizer) -> None:
        """Put a state that was loaded in the place of the one that is shared."""
        for parameter in self._parameters:
            shared = self.single(parameter).state[parameter]
            if optimizer.state[parameter] is not shared:
                loaded = dict(optimizer.state[parameter])
                shared.clear()
                shared.update(loaded)
                optimizer.state[parameter] = shared
        self.push()


def _check_plain(optim: Any) -> None:
    """Raise ValueError for a pyro.optim object that one torch optimizer cannot stand for."""
    if isinstance(optim, pyro.optim.PyroLRScheduler):
        what = "a learning rate scheduler"
        advice = "a scheduler of torch.optim.lr_scheduler, made with it, among the callbacks of fit"
    elif not isinstance(optim.pt_optim_args, dict):
        what = "arguments that are a function of the parameter"
        advice = "its groups of parameters say the same"
    elif optim.pt_clip_args:
        what = "clip_args"
        advice = "fit(clip_norm=...), or pyro.optim.ClippedAdam({...}), clips gradients"
    else:
        return
    raise ValueError(
        f"optim: a pyro.optim object with {what} cannot be translated; pass a function from "
        f"parameters to a torch optimizer, or a torch optimizer ({advice})"
    )


def _fused_options(
    make: Callable[..., torch.optim.Optimizer], parameters: list[Tensor], options: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments of an optimizer, with a fused kernel where the user chose no other."""
    # A first momentum that is dampened is not that which starts at zero.
    is_chosen = KERNELS & set(options) or options.get("dampening")
    if make in _FUSED and not is_chosen and all(map(torch.is_floating_point, parameters)):
        return {**options, "fused": True}
    return options
