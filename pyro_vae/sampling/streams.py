"""Random numbers of chains, from a seed and a name alone."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae.programs.purposes import seed_of


class Stream:
    """Random numbers that depend on a key alone, drawn on the CPU whatever the device.

    Args:
        key: whole numbers from 0 on: the seed, then what tells this stream from others.
    """

    def __init__(self, *key: int) -> None:
        self._generator = torch.Generator().manual_seed(seed_of(*key))

    def normal(self, like: Tensor) -> Tensor:
        """Return standard normal numbers of a tensor's shape, dtype and device."""
        return torch.randn(like.shape, generator=self._generator, dtype=like.dtype).to(like.device)

    def uniform(self, like: Tensor) -> Tensor:
        """Return numbers uniform in [0, 1) of a tensor's shape, dtype and device."""
        return torch.rand(like.shape, generator=self._generator, dtype=like.dtype).to(like.device)
