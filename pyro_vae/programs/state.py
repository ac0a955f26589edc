"""The state that models and guides run in: modes, parameters, buffers and random numbers."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, TypedDict

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import unwrap
from torch import Tensor, nn
from torch.distributions.constraints import Constraint
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_vae.programs.batch import Batch, dtype_errors
from pyro_vae.programs.handlers import keep_apart
from pyro_vae.programs.pyro_internals import StoreContents, pyro_parameters
from pyro_vae.programs.types import Program
from pyro_vae.torch_internals import BatchNorm, Dropout, buffers_of, parameters_of, version_of

_SMALL = 2**20  # numbers
_lock = threading.RLock()


def module_of(fn: object) -> nn.Module | None:
    """Return the nn.Module that a model or guide is, or is a method of; None for others."""
    owner = getattr(fn, "__self__", fn)
    return owner if isinstance(owner, nn.Module) else None


def unwrapped(fn: Any) -> Any:
    """Return the model or guide inside Pyro's handlers."""
    inner = unwrap(fn)  # of a handler that was called on it
    while hasattr(inner, "__wrapped__"):  # of poutine's functions
        inner = unwrap(inner.__wrapped__)
    return inner


def arguments_of(model: Any) -> dict[str, bool]:
    """Return a model's positional arguments by name, and of each whether a call must have it.

    Of a wrapper that takes any arguments they are those of the model in it.
    """
    inner = unwrapped(model)
    while True:
        call = inner.forward if isinstance(inner, nn.Module) else inner
        try:
            parameters = inspect.signature(call).parameters.values()
        except (TypeError, ValueError):  # of a built-in: nothing says
            return {}
        each = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        wrapped = getattr(inner, "model", None)
        if each or not callable(wrapped):
            return {p.name: p.default is p.empty for p in each}
        inner = unwrapped(wrapped)


class FirstValues:
    """First values of parameters, kept out of Pyro's store.

    pyro.param(name, value) puts a value into the store in the first run, and later ones find it
    there. A run that is only a look, under the prior perhaps, must not decide where training
    starts; but several runs that belong together must have the same values.

    Attributes:
        made: their (unconstrained) tensors and constraints, by name.
    """

    def __init__(self) -> None:
        self.made: dict[str, tuple[Tensor, Constraint]] = {}
        self._installed = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Put them into the store; take them and all that is new out of it at the end."""
        if self._installed:
            yield
            return
        before = StoreContents()
        self.commit()
        self._installed = True
        try:
            yield
        finally:
            self._installed = False
            self.made = before.made_since()
            if self.made:
                before.restore()

    def commit(self) -> None:
        """Put them into the store for good, where it has no others by their names."""
        for name, (value, constraint) in self.made.items():
            if name not in pyro.get_param_store():
                StoreContents.add(name, value, constraint)


class _Held:
    """What modules hold beside their parameters' values, to put back."""

    def __init__(self) -> None:
        self._modules: dict[int, nn.Module] = {}
        self._buffers: list[tuple[dict[str, Any], str, Tensor, int, Tensor]] = []
        self._parameters: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def add(self, module: nn.Module) -> None:
        """Note what a module holds now."""
        if id(module) in self._modules:
            return
        self._modules[id(module)] = module
        held = buffers_of(module)
        for name, buffer in held.items():
            # What a module keeps count of is small; what is large are data.
            if buffer is not None and buffer.numel() <= _SMALL and not buffer.is_inference():
                value = buffer.detach().clone()
                self._buffers.append((held, name, buffer, version_of(buffer), value))
        if pyro_parameters(module):
            # Those of the store take their place, by name.
            self._parameters.append((parameters_of(module), dict(parameters_of(module))))

    def put_back(self, *, unseen: bool) -> None:
        """Undo what has changed; with ``unseen``, also as BatchNorm does, which marks no change."""
        for holder, name, buffer, version, value in self._buffers:
            holder[name] = buffer
            if unseen or version_of(buffer) != version:
                with torch.no_grad():
                    buffer.copy_(value)
        for now, before in self._parameters:
            now.update(before)


# Set in threads of which one goes on at a time, while the thread that started them waits inside.
by_turns: ContextVar[bool] = ContextVar("by_turns", default=False)


class one_thread:  # noqa: N801 - a context manager, without the time that a generator takes
    """Refuse to run beside another thread that runs models and guides.

    Pyro has one stack of handlers and one parameter store, and PyTorch one stream of random
    numbers: a second thread would be traced into the first one's loss.

    Raises:
        RuntimeError: where another thread is inside.
    """

    def __enter__(self) -> None:
        if by_turns.get():
            return
        if not _lock.acquire(blocking=False):
            raise RuntimeError(
                "pyro_vae is at work in another thread, with Pyro's handlers and parameters and "
                "PyTorch's random numbers, one for all threads of a process: run one after the "
                "other, or in processes of their own (multiprocessing, joblib's 'loky')"
            )

    def __exit__(self, *raised: object) -> None:
        if not by_turns.get():
            _lock.release()


@contextlib.contextmanager
def evaluation(*fns: Program | None, first: FirstValues | None = None) -> Iterator[None]:
    """Run models and guides in eval mode, and leave everything as it was found.

    The mode of each submodule, buffers, and Pyro's parameter store. Plain functions close over
    modules that cannot be seen: each is put in eval mode as it is called, and restored likewise.

    Runs inside share the first values of parameters, ``first``, with others; by default none.
    """
    roots = [module for module in map(module_of, map(unwrapped, fns)) if module is not None]
    modules = [module for root in roots for module in root.modules()]
    with one_thread():
        training = [module for module in modules if module.training]
        for root in roots:
            keep_apart(root)
        with _as_found(modules, training, first, every=True):
            yield


@contextlib.contextmanager
def looking(
    *fns: Program, device: torch.device, gradients: bool = False, first: FirstValues | None = None
) -> Iterator[None]:
    """Run models and guides to find something out: unseen from outside, as in :func:`evaluation`.

    The global random state is left as it was found, and handlers around see no statement.
    """
    with (
        torch.set_grad_enabled(gradients),
        evaluation(*fns, first=first),
        preserved_rng(device),
        poutine.block(),
    ):
        yield


@contextlib.contextmanager
def _as_found(
    modules: list[nn.Module], training: list[nn.Module], first: FirstValues | None, *, every: bool
) -> Iterator[None]:
    """Put back modes, buffers and Pyro's store at the end.

    Modules beside the given ones are noted as they are called. Those of ``training`` are in eval
    mode inside; with ``every``, so is each other one.
    """
    held = _Held()
    for module in modules:
        held.add(module)
    for module in training:
        module.training = False

    def note(module: nn.Module, inputs: object) -> None:
        held.add(module)
        if every and is_training(module):
            module.training = False
            training.append(module)

    try:
        with register_module_forward_pre_hook(note), (first or FirstValues()).installed():
            yield
    finally:
        for module in training:
            module.training = True
        held.put_back(unseen=not every)


@contextlib.contextmanager
def called_modules() -> Iterator[dict[int, nn.Module]]:
    """Collect the nn.Modules that are called inside the context, by identity."""
    found: dict[int, nn.Module] = {}
    with register_module_forward_pre_hook(lambda module, _: found.update({id(module): module})):
        yield found


@contextlib.contextmanager
def mode_reads() -> Iterator[dict[int, nn.Module]]:
    """Collect the modules whose mode, training or not, is read inside the context, by identity.

    Those of TorchScript, whose compiled code cannot be seen to, are collected as they are called.
    """
    read: dict[int, nn.Module] = {}

    def get(module: nn.Module) -> bool:
        read[id(module)] = module
        return is_training(module)

    def put(module: nn.Module, mode: bool) -> None:
        vars(module)["training"] = mode

    def note(module: nn.Module, inputs: object) -> None:
        if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
            read[id(module)] = module

    cls: Any = nn.Module  # of whose attribute there is but an annotation
    with register_module_forward_pre_hook(note):
        cls.training = property(get, put)
        try:
            yield read
        finally:
            del cls.training


def is_training(module: nn.Module) -> bool:
    """Return a module's mode, unseen by :func:`mode_reads`."""
    held = vars(module)
    return held["training"] if "training" in held else bool(module.__getattr__("training"))


class Look:
    """A look at a model or guide that may fail: a context whose exception is the answer "not so".

    Models that are right as they are may raise whatever they like on fewer rows, or run in
    another way.

    Attributes:
        error: what was raised inside the context; None where nothing was.
    """

    error: Exception | None = None

    def __enter__(self) -> Look:
        return self

    def __exit__(self, kind: object, value: BaseException | None, traceback: object) -> bool:
        if isinstance(value, Exception):
            self.error = value
        return self.error is not None


@contextlib.contextmanager
def batch_norms() -> Iterator[dict[str, int]]:
    """Collect how few values of a channel each BatchNorm saw in a call, of those in train mode."""
    seen: dict[nn.Module, int] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, BatchNorm) and inputs and inputs[0].ndim > 1:
            values = inputs[0].numel() // inputs[0].shape[1]
            seen[module] = min(values, seen.get(module, values))

    found: dict[str, int] = {}
    with register_module_forward_pre_hook(note):
        yield found
    # Outside of evaluation, so that modes are the user's again.
    for module, values in seen.items():
        if module.training:
            found[f"{type(module).__name__}({getattr(module, 'num_features', '')})"] = values


def as_in_training(
    modules: Iterable[nn.Module], first: FirstValues | None = None
) -> contextlib.AbstractContextManager[None]:
    """Leave modules in their modes, but let none drop out, and all else as it was found."""
    dropouts: list[nn.Module] = [m for m in modules if isinstance(m, Dropout) and m.training]
    # A guide's BatchNorms too, which are not among those that are compared, are put back.
    return _as_found([], dropouts, first, every=False)


def preserved_rng(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Leave the random state as it was found: looking must not change what is drawn next."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextlib.contextmanager
def seeded(device: torch.device, seed: int | None) -> Iterator[None]:
    """Draw by a seed, and leave the random state as it was found; None draws from that state."""
    if seed is None:
        yield
        return
    with preserved_rng(device):
        torch.manual_seed(seed)
        yield


def call_network(network: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a network on a batch; an nn.Sequential, which has no keywords, on its one tensor."""
    # Of a class: TorchScript's modules have a descriptor there, and functions nothing.
    plain = isinstance(network, nn.Sequential) and type(network).forward is nn.Sequential.forward
    if plain and not args and len(kwargs) == 1:
        args, kwargs = tuple(kwargs.values()), {}
    with dtype_errors(Batch(args, kwargs, has_rows=False)):
        return network(*args, **kwargs)


class RandomState(TypedDict):
    """The state of torch's random number generators: of the CPU, and of each device in use."""

    cpu: Tensor
    cuda: list[Tensor]


def random_state() -> RandomState:
    """Return the state of torch's random number generators, of all devices in use."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: RandomState) -> None:
    """Put back what :func:`random_state` returned; on a machine without CUDA, the CPU's."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
