"""The arguments of a call, one of which may have missing values, with a mask beside it or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pyro_vae.recording import is_recording

# An argument by its position or its keyword.
Key: TypeAlias = int | str


def floating(value: object) -> Tensor | None:
    """Return a value that may have missing numbers: a floating-point tensor with rows."""
    if isinstance(value, Tensor) and value.ndim > 0 and value.is_floating_point():
        return value
    return None


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of one call: ``fn(*args, **kwargs)``."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def items(self) -> Iterator[tuple[Key, Any]]:
        """Yield each argument, with its position or keyword."""
        yield from enumerate(self.args)
        yield from self.kwargs.items()

    def __getitem__(self, key: Key) -> Any:
        named = dict(self.items())
        if key not in named:
            raise ValueError(f"values={key!r}: the batch has the arguments {list(named)}")
        return named[key]

    def map(self, change: Callable[[Key, Any], Any]) -> Arguments:
        """Return arguments with each value changed."""
        return Arguments(
            tuple(change(i, value) for i, value in enumerate(self.args)),
            {name: change(name, value) for name, value in self.kwargs.items()},
        )

    def put(self, key: Key, value: Tensor) -> Arguments:
        """Return arguments with another value of one of them."""
        return self.map(lambda name, old: value if name == key else old)

    def coded_by_nan(self, mask: str, values: Key | None) -> tuple[Key, Arguments]:
        """Return which argument a mask speaks of, and arguments with NaN where it is False.

        The mask is the keyword argument of this name, or the last positional one, and is dropped.
        """
        rest, seen = self._without(mask)
        key = rest._masked_by(mask, seen) if values is None else values
        x = rest[key]
        shape = getattr(x, "shape", None)
        if shape != seen.shape:
            raise ValueError(
                f"mask={mask!r} has shape {list(seen.shape)}, but the argument {key!r} that it "
                f"speaks of has {'none' if shape is None else list(shape)}; give a mask of the "
                "data's own shape"
            )
        if not x.is_floating_point():
            exact, x = x, x.to(torch.get_default_dtype())
            if not is_recording() and bool((x.to(exact.dtype) != exact).any()):
                raise ValueError(
                    f"mask={mask!r}: the integers of argument {key!r} have no exact value in "
                    f"{x.dtype}, in which missing ones are marked; give them as float64"
                )
        return key, rest.put(key, x.masked_fill(~seen, math.nan))

    def _without(self, mask: str) -> tuple[Arguments, Tensor]:
        """Return the other arguments, and the mask."""
        args, kwargs = self.args, dict(self.kwargs)
        if mask in kwargs:
            seen, where = kwargs.pop(mask), "that keyword argument"
        elif args:
            *first, seen = args
            args, where = tuple(first), "the last positional argument"
        else:
            raise TypeError(f"mask={mask!r}: there is no such argument among {list(kwargs)}")
        if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
            kind = seen.dtype if isinstance(seen, Tensor) else type(seen).__name__
            raise TypeError(f"mask={mask!r}: {where} is no boolean tensor but {kind}")
        return Arguments(args, kwargs), seen

    def _masked_by(self, mask: str, seen: Tensor) -> Key:
        """Return the one argument of a mask's shape."""
        alike = [
            key
            for key, value in self.items()
            if isinstance(value, Tensor) and value.shape == seen.shape
        ]
        if len(alike) != 1:
            raise ValueError(
                f"mask={mask!r} has shape {list(seen.shape)}, as have the arguments {alike} of "
                f"{[key for key, _ in self.items()]}; say with values= which one it speaks of, and "
                "give it that shape"
            )
        return alike[0]
