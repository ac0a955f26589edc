"""MissingEncoder, and the arguments of a call, one of which may have missing values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pyro_vae.programs.state import call_network
from pyro_vae.recording import is_recording

# An argument by its position or its keyword; and all of a call.
Key: TypeAlias = int | str
Arguments: TypeAlias = dict[Key, Any]


class MissingEncoder(nn.Module):
    r"""An encoder that sees which values are missing: the data, filled in, beside their mask.

    .. math:: \mathrm{encoder}([\tilde x, m]), \quad
        m_d = 1\ \text{where}\ x_d\ \text{is seen, else}\ 0, \quad
        \tilde x_d = m_d x_d + (1 - m_d)\, \mathrm{fill}_d

    Args:
        encoder: takes the data with twice as many entries along ``dim``: [N, 2 D] for [N, D],
            [N, 2] for [N].
        fill: what stands in for a missing value: a number, or a tensor that broadcasts with a
            datum, such as the means of the columns.
        dim: where the mask is appended; 1 for images [N, channel, height, width].
        mask: as in :class:`MissingData`; the encoder does not get that argument.
        values: which argument may have missing values, by position or keyword; needed where
            several are floating-point tensors. With ``mask``, as in :class:`MissingData`.

    Raises:
        TypeError: for a mask that is not a boolean tensor.
        ValueError: where it is not plain which argument may have missing values, or ``dim`` is
            that of the data.

    Example:
        >>> import torch
        >>> import pyro_vae as pv
        >>> encoder = pv.MissingEncoder(torch.nn.Identity())
        >>> encoder(torch.tensor([[1.5, float("nan")]]))
        tensor([[1.5000, 0.0000, 1.0000, 0.0000]])
    """

    fill: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        *,
        fill: float | Tensor = 0.0,
        dim: int = -1,
        mask: str | None = None,
        values: Key | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("fill", torch.as_tensor(fill))
        self.dim, self.mask, self.values = dim, mask, values

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the encoder on a batch, missing values filled in and their mask appended."""
        arguments, key = arguments_of(args, kwargs), self.values
        if self.mask is not None:
            key, arguments = coded_by_nan(arguments, self.mask, key)
        elif key is None:
            found = [name for name, value in arguments.items() if floating(value) is not None]
            if len(found) != 1:
                raise ValueError(
                    f"MissingEncoder: the arguments {found} are floating-point tensors; say with "
                    "values= which one may have missing values (integer data need mask=)"
                )
            (key,) = found
        x = one_of(arguments, key)
        if x.ndim == 1:
            x = x.unsqueeze(-1)
        if self.dim % x.ndim == 0:
            raise ValueError(
                f"dim={self.dim} of data of shape {list(x.shape)} is that of the data themselves; "
                "choose the dimension of features or channels"
            )
        missing = x.isnan()
        both = torch.cat([torch.where(missing, self.fill.to(x), x), (~missing).to(x)], self.dim)
        try:
            return call_network(self.encoder, *as_called({**arguments, key: both}))
        except RuntimeError as error:
            error.add_note(
                f"MissingEncoder gave its encoder data of shape {list(both.shape)}: the mask "
                f"stands beside them, along dim={self.dim}"
            )
            raise


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
