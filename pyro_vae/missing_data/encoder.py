"""MissingEncoder: an encoder that sees which values are missing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.missing_data.arguments import (
    Key,
    arguments_of,
    as_called,
    coded_by_nan,
    floating,
    one_of,
)
from pyro_vae.programs.state import call_network

__all__ = ["MissingEncoder"]


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
        filled = torch.where(missing, self.fill.to(x), x)
        both = torch.cat([filled, (~missing).to(x)], self.dim)
        try:
            return call_network(self.encoder, *as_called({**arguments, key: both}))
        except RuntimeError as error:
            error.add_note(
                f"MissingEncoder gave its encoder data of shape {list(both.shape)}: the mask "
                f"stands beside them, along dim={self.dim}"
            )
            raise
