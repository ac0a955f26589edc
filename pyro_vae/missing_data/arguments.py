"""The arguments of a call, one of which may have missing values, with a mask beside it or not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pyro_vae.recording import is_recording

# An argument by its position or its keyword; and all of a call.
Key: TypeAlias = int | str
Arguments: TypeAlias = dict[Key, Any]


def floating(value: object) -> Tensor | None:
    """Return a value that may have missing numbers: a floating-point tensor with rows."""
    if isinstance(value, Tensor) and value.ndim > 0 and value.is_floating_point():
        return value
    return None


def arguments_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    """Return the arguments of a call by position or keyword."""
    return dict[Key, Any]([*enumerate(args), *kwargs.items()])


def as_called(arguments: Arguments) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return args and kwargs."""
    args = tuple(value for key, value in arguments.items() if isinstance(key, int))
    return args, {key: value for key, value in arguments.items() if isinstance(key, str)}


def one_of(arguments: Arguments, key: Key) -> Any:
    """Return one argument; ValueError where there is none of that position or keyword."""
    if key not in arguments:
        raise ValueError(f"values={key!r}: the batch has the arguments {list(arguments)}")
    return arguments[key]


def coded_by_nan(arguments: Arguments, mask: str, values: Key | None) -> tuple[Key, Arguments]:
    """Return which argument a mask speaks of, and arguments with NaN where it is False.

    The mask is the keyword argument of this name, or the last positional one, and is dropped.
    """
    seen, rest = _split(arguments, mask)
    if values is None:
        alike = [k for k, v in rest.items() if isinstance(v, Tensor) and v.shape == seen.shape]
        if len(alike) != 1:
            raise ValueError(
                f"mask={mask!r} has shape {list(seen.shape)}, as have the arguments {alike} of "
                f"{list(rest)}; say with values= which one it speaks of, and give it that shape"
            )
        (values,) = alike
    x = one_of(rest, values)
    shape = getattr(x, "shape", None)
    if shape != seen.shape:
        raise ValueError(
            f"mask={mask!r} has shape {list(seen.shape)}, but the argument {values!r} that it "
            f"speaks of has {'none' if shape is None else list(shape)}; give it the data's shape"
        )
    if not x.is_floating_point():
        exact, x = x, x.to(torch.get_default_dtype())
        if not is_recording() and bool((x.to(exact.dtype) != exact).any()):
            raise ValueError(
                f"mask={mask!r}: the integers of argument {values!r} have no exact value in "
                f"{x.dtype}, in which missing ones are marked; give them as float64"
            )
    return values, {**rest, values: x.masked_fill(~seen, math.nan)}


def _split(arguments: Arguments, mask: str) -> tuple[Tensor, Arguments]:
    """Return the mask, and the other arguments."""
    key: Key
    if mask in arguments:
        key, where = mask, "that keyword argument"
    elif 0 in arguments:
        key = max(name for name in arguments if isinstance(name, int))
        where = "the last positional argument"
    else:
        raise TypeError(f"mask={mask!r}: there is no such argument among {list(arguments)}")
    seen, rest = arguments[key], {k: value for k, value in arguments.items() if k != key}
    if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
        kind = seen.dtype if isinstance(seen, Tensor) else type(seen).__name__
        raise TypeError(f"mask={mask!r}: {where} is no boolean tensor but {kind}")
    return seen, rest
