"""Normal random numbers of a guide's draws, made ahead on several threads, from their own streams.

PyTorch fills a tensor with random numbers on one thread. Each draw has a stream of its own, so that
several of them can be made at once; the numbers are those that the guide would have drawn itself.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.programs.types import Values
from pyro_vae.torch_internals import DispatchMode, Operator

_NORMAL = torch.ops.aten.normal_.default
_MAKE = {torch.ops.aten.randn.default, torch.ops.aten.randn_like.default}  # tensors of their own
_MAX_THREADS = 8  # which bounds what is held ahead


@dataclass(frozen=True, slots=True)
class Noise:
    """A tensor that is filled with standard normal numbers, in one call.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
    """

    shape: torch.Size
    dtype: torch.dtype

    def filled(self, generator: torch.Generator) -> Tensor:
        """Return these numbers from a stream."""
        return torch.empty(self.shape, dtype=self.dtype).normal_(generator=generator)


def _is_standard(func: Operator, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> bool:
    """Return whether an operator draws standard normal numbers.

    Without a mean and a deviation, which may be others in a later draw.
    """
    return func in _MAKE or (func is _NORMAL and len(args) == 1 and not kwargs)


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


class SeenNoise(DispatchMode):
    """Notes which random numbers are drawn inside.

    Attributes:
        found: what is filled, in order; None where other random numbers are drawn too.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Noise] | None = []

    def __torch_dispatch__(
        self,
        func: Operator,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and self.found is not None:
            if (
                _is_standard(func, args, kwargs)
                and result.is_contiguous()
                and result.device.type == "cpu"
            ):
                self.found.append(Noise(result.shape, result.dtype))
            else:
                self.found = None
        return result


class OtherNoiseError(RuntimeError):
    """Other random numbers are drawn than the last time."""


class GivenNoise(DispatchMode):
    """Puts given numbers in the place of those that would be drawn inside.

    Args:
        noise: the tensors, in the order in which :class:`SeenNoise` found them.

    Raises:
        OtherNoiseError: at the end or before, where they are not all that is drawn.
    """

    def __init__(self, noise: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._noise = list(noise)

    def __torch_dispatch__(
        self,
        func: Operator,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        if not _is_standard(func, args, kwargs):
            raise OtherNoiseError(f"{func} draws what was not drawn before")
        made = args[0] if func is _NORMAL else self._empty(func, args, kwargs or {})
        if not self._noise or not _alike(self._noise[0], made):
            raise OtherNoiseError("something else is drawn than before")
        return made.copy_(self._noise.pop(0))

    def _empty(self, func: Operator, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the tensor that an operator would fill."""
        make = torch.empty if func is torch.ops.aten.randn.default else torch.empty_like
        return make(args[0], **kwargs)

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        super().__exit__(kind, *rest)  # type: ignore[no-untyped-call]
        if kind is None and self._noise:
            raise OtherNoiseError("less is drawn than before")


class NoiseAhead:
    """The numbers of draws to come, of as many streams at once as there are threads.

    The first draw of a kind tells what is drawn; where that is not normal numbers alone, on the
    CPU, there is nothing to be had ahead.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, list[Noise] | None] = {}
        self._made: dict[int, list[Tensor]] = {}  # by the seed of the stream

    def take(self, kind: Hashable, seeds: Iterable[int]) -> dict[str, Tensor]:
        """Return the numbers of a draw by name; none where they are not known ahead.

        Args:
            kind: what draws that fill the same tensors have in common.
            seeds: of the streams of this draw and of later ones of its kind.
        """
        noise, count = self._known.get(kind), min(torch.get_num_threads(), _MAX_THREADS)
        if not noise or count < 2:
            return {}
        coming = list(itertools.islice(seeds, count))
        if coming and coming[0] not in self._made:
            self._made = dict(zip(coming, from_streams(noise, coming), strict=True))
        found = self._made.pop(coming[0], []) if coming else []
        return {f"noise{i}": tensor for i, tensor in enumerate(found)}

    @contextlib.contextmanager
    def around(self, kind: Hashable, noise: Values) -> Iterator[None]:
        """Draw inside with the given numbers; without any, find out what is drawn."""
        if noise:
            with GivenNoise(noise.values()):
                yield
        elif kind in self._known or torch.get_num_threads() < 2:
            yield
        else:
            with SeenNoise() as seen:
                yield
            self._known[kind] = seen.found

    def refuse(self, kind: Hashable) -> None:
        """Let draws of a kind draw their own numbers: they are not the same each time."""
        self._known[kind] = None


def from_streams(noise: Sequence[Noise], seeds: Sequence[int]) -> list[list[Tensor]]:
    """Return the numbers of each stream, each on a thread of its own.

    Args:
        noise: what is filled, in order.
        seeds: of the streams.
    """

    def filled(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [each.filled(generator) for each in noise]

    with ThreadPoolExecutor(len(seeds)) as threads:
        return list(threads.map(filled, seeds))
