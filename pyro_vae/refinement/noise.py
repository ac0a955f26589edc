"""Noise that draws are made of: mirrored and orthogonal, or reaching far into the tails."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Noise", "heavy_noise", "orthogonal_noise"]

_WIDER = 3.0  # standard deviations of what goes into the tails


@dataclass(frozen=True, slots=True)
class Noise:
    """Numbers whose weighted mean stands for a mean over standard normal noise.

    Attributes:
        values: [K, num_noise].
        weight: [K], with mean about one.
    """

    values: Tensor
    weight: Tensor

    def to(self, like: Tensor) -> Noise:
        """Return the noise in the dtype and on the device of a tensor."""
        return Noise(self.values.to(like), self.weight.to(like))

    def spread(self, num_data: int) -> Tensor:
        """Return the values, the same for every datum, [K, N, num_noise]."""
        return self.values.unsqueeze(1).expand(-1, num_data, -1)


def orthogonal_noise(num_particles: int, size: int, key: tuple[int, ...]) -> Noise:
    """Return standard normal noise: mirrored pairs, in orthogonal directions.

    Each row is exactly normal. Together they cancel the gradient noise of a quadratic log
    density for the locations, and most of it for the scales.

    Args:
        num_particles: K.
        size: num_noise.
        key: tells the random numbers from others.
    """
    values = _orthogonal(num_particles, size, key)
    return Noise(values, torch.ones(len(values)))


def heavy_noise(num_particles: int, size: int, key: tuple[int, ...]) -> Noise:
    """Return noise that goes far into the tails of the standard normal.

    Half of it is normal, and half is so but for one coordinate, which is wider, each in turn. The
    weights are the ratio of the normal density to that of this mixture (the balance heuristic);
    none is above 2.

    Args:
        num_particles: K, rounded up to whole pairs of each coordinate.
        size: num_noise.
        key: tells the random numbers from others.
    """
    count = -(-num_particles // (2 * size)) * size
    plain, reaching = (_orthogonal(count, size, (*key, i)) for i in range(2))
    per_axis = count // size
    # Stratified along the axis: a tail has its share at each call.
    strata = torch.arange(per_axis, dtype=torch.float64).unsqueeze(1)
    uniform = torch.rand(per_axis, size, generator=_generator((*key, 2)), dtype=torch.float64)
    wide = _WIDER * torch.special.ndtri((strata + uniform) / per_axis)
    axis = torch.arange(size).repeat(per_axis)
    reaching[torch.arange(count), axis] = wide.flatten()
    values = torch.cat([plain, reaching])
    ratio = (0.5 * (1 - _WIDER**-2) * values.square()).exp() / _WIDER
    return Noise(values, 2 / (1 + ratio.mean(1)))


def _orthogonal(num_particles: int, size: int, key: tuple[int, ...]) -> Tensor:
    pairs = (num_particles + 1) // 2
    generator = _generator(key)
    turns = torch.randn(-(-pairs // size), size, size, generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(turns).Q.reshape(-1, size)[:pairs]
    radii = torch.randn(pairs, size, generator=generator, dtype=torch.float64).norm(dim=1)
    half = directions * radii.unsqueeze(1)
    return torch.cat([half, -half])[:num_particles]


def _generator(key: tuple[int, ...]) -> torch.Generator:
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
