"""The processes of a run under torchrun: who they are, and what they tell one another."""

from __future__ import annotations

import atexit
import builtins
import contextlib
import functools
import io
import itertools
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from pyro_vae.programs.state import Look

logger = logging.getLogger(__name__)

_RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
_COUNTED = 2**20  # bytes at a time
_ONE_PRESS = 5.0  # seconds in which signals are one and the same Ctrl-C
_DROPPED = 0.2  # seconds in which the tensors of a call are dropped after it
_S = TypeVar("_S")
_T = TypeVar("_T")
_alone = [0]  # contexts in which this process works for itself


@dataclass(frozen=True)
class Share:
    """The part of some data that is one process's.

    Attributes:
        start: the first of its rows.
        count: how many they are.
        total: data of all processes.
    """

    start: int
    count: int
    total: int

    @property
    def rows(self) -> slice:
        """Its rows among all."""
        return slice(self.start, self.start + self.count)

    @property
    def is_all(self) -> bool:
        """Whether it is all data."""
        return self.count == self.total


@dataclass(frozen=True)
class Processes:
    """The processes that share a run, each with this number of its own.

    All methods but :meth:`share` are calls that all processes make, in the same order.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def share(self, total: int) -> Share:
        """Return this process's part of so many data; all of them, where some would get none."""
        if total < self.size:
            return Share(0, total, total)
        count, more = divmod(total, self.size)
        return Share(self.rank * count + min(self.rank, more), count + (self.rank < more), total)

    def add(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place; return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def take_first(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors the values that they have in the first process, in place."""
        for tensor in tensors if self.size > 1 else ():
            value = tensor.detach().contiguous()
            dist.broadcast(value, src=0)
            if value.data_ptr() != tensor.data_ptr():
                with torch.no_grad():
                    tensor.copy_(value)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in their order; tensors of a GPU on one's own."""
        if self.size == 1:
            return [value]
        file, found = io.BytesIO(), [b""] * self.size
        torch.save(value, file)
        dist.all_gather_object(found, file.getvalue())
        # What these processes wrote themselves, code among it.
        read = (io.BytesIO(content) for content in found)
        return [torch.load(each, map_location=_here, weights_only=False) for each in read]

    def any(self, value: bool) -> bool:
        """Return whether it is so in any process."""
        return any(self.gather(value))

    def by_first(self, function: Callable[[], _T]) -> _T:
        """Return what a function returns in the first process, which alone calls it.

        What it raises there is raised in all.
        """
        if self.size == 1:
            return function()
        return self._told([function] if self.is_first else [])[0]

    def _told(self, functions: Sequence[Callable[[], _T]]) -> list[_T]:
        """Return what the functions of all processes return, in their order.

        What one raises is raised in all, in the others as one of Python's own exceptions.
        """
        results: list[_T] = []
        with Look() as look, alone():
            results = [function() for function in functions]
        text = None if look.error is None else _described(look.error)
        found = self.gather((results, text))
        if look.error is not None:
            raise look.error
        if (told := next((text for _, text in found if text is not None), None)) is not None:
            raise _error_of(*told)
        return [result for results, _ in found for result in results]

    def by_turns(self, function: Callable[[_S], _T], items: Iterable[_S]) -> Iterator[_T]:
        """Yield what a function returns of each item, of which each process takes one in turn."""
        if self.size == 1:
            yield from map(function, items)
            return
        items = iter(items)
        while turn := list(itertools.islice(items, self.size)):
            mine = turn[self.rank : self.rank + 1]
            yield from self._told([functools.partial(function, item) for item in mine])

    def named_difference(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Return the name of a tensor whose bits are not the same in all processes, or None."""
        sums = {name: _bits(tensor) for name, tensor in tensors.items()}
        first, *others = self.gather(sums)
        return next((name for o in others for name in first if o.get(name) != first[name]), None)

    @contextlib.contextmanager
    def first_tells(self) -> Iterator[None]:
        """Have no other process than the first log warnings of this package."""
        package = logging.getLogger(__name__.partition(".")[0])
        level = package.level
        try:
            if not self.is_first:
                package.setLevel(logging.ERROR)
            yield
        finally:
            package.setLevel(level)


def _here(storage: Any, place: str) -> Any:
    """Return a storage that was read, on this process's device of its kind."""
    return storage.cuda() if place.startswith("cuda") else storage


def _described(error: Exception) -> tuple[str, str]:
    """Return an exception as the name of one of Python's own, and its text."""
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
    return kind.__name__, str(error)


def _error_of(name: str, text: str) -> Exception:
    """Return the exception that :func:`_described` has described."""
    try:
        made = getattr(builtins, name)(text)
    except TypeError:  # of one that is made of more than a text
        made = RuntimeError(f"{name}: {text}")
    return cast("Exception", made)


def _bits(tensor: Tensor) -> int:
    """Return a number that tells the bits of a tensor from others."""
    found = 0
    for content in tensor.detach().contiguous().reshape(-1).view(torch.uint8).split(_COUNTED):
        place = torch.arange(1, len(content) + 1, device=content.device)
        found = (31 * found + int((content * place).sum())) % 2**62
    return found


def processes() -> Processes:
    """Return the processes that share this run: those of an initialized group, or of torchrun.

    Where torchrun started this process and no group is initialized, one is: gloo on the CPU, NCCL
    between GPUs. This process alone where there are no others, and inside :func:`alone`.
    """
    if _alone[0] or not dist.is_available():
        return Processes()
    if not dist.is_initialized():
        if not _is_of_torchrun():
            return Processes()
        _initialize()
    _end_in_peace()
    return Processes(dist.get_rank(), dist.get_world_size())


@contextlib.contextmanager
def alone(wanted: bool = True) -> Iterator[None]:
    """Work for this process alone inside the context, whatever others do.

    Under torchrun, functions of this package are called by all processes, which share the work and
    wait for one another. Inside the context one may call them that the others do not.

    Args:
        wanted: False changes nothing.

    Example:
        >>> import pyro_vae as pv
        >>> with pv.alone():
        ...     pass  # if rank == 0: print(pv.elbo(model, guide, x).mean)
    """
    _alone[0] += wanted
    try:
        yield
    finally:
        _alone[0] -= wanted


@contextlib.contextmanager
def note_interrupts(function: Callable[[], None]) -> Iterator[None]:
    """Call a function at Ctrl-C inside the context; one that comes later raises as ever.

    Where processes wait for one another, all are to stop at one place. Each gets a signal from the
    terminal, and soon another one from torchrun, which is the same Ctrl-C.
    """
    first: list[float] = []

    def note(*_: object) -> None:
        if first and time.monotonic() - first[0] > _ONE_PRESS:
            raise KeyboardInterrupt
        first[:] = first or [time.monotonic()]
        function()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _is_of_torchrun() -> bool:
    """Return whether torchrun started this very process, and others beside it."""
    env = os.environ
    found = all(name in env for name in _RENDEZVOUS) and int(env["WORLD_SIZE"]) > 1
    return found and multiprocessing.parent_process() is None  # a child is none of them


def _initialize() -> None:
    """Initialize the group that torchrun describes."""
    backend = "gloo"
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", 0))
        size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        count = torch.cuda.device_count()
        torch.cuda.set_device(local % count)  # what "cuda" means from now on
        if size <= count:  # NCCL takes one process for each GPU
            backend = "cpu:gloo,cuda:nccl"
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # One agent keeps one store for all attempts: names of their own, for else a process that
        # was started again may read the address of one that has ended.
        names: Any = dist  # which PyTorch does not export by its types
        store, rank, size = next(names.rendezvous("env://"))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = names.PrefixStore(f"pyro_vae/{attempt}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    else:
        dist.init_process_group(backend)
    atexit.register(_destroy)
    size = dist.get_world_size()
    logger.info("process %d of %d that share the work (%s)", dist.get_rank(), size, backend)


@functools.cache
def _end_in_peace() -> None:
    """Have the process wait at its end for gloo's threads, to which it leaves the interpreter.

    They drop the tensors of the last call some time after it, and take Python's lock for that: one
    that asks for it while the interpreter ends aborts the process.
    """
    atexit.register(time.sleep, _DROPPED)


def _destroy() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
