"""Frozen result types; every estimate carries its standard error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["LogWeights"]


@dataclass(frozen=True)
class LogWeights:
    """Three log densities of each particle of each datum, in nats.

    Attributes:
        log_likelihood: sum over observed sites of log p(x | z), [K, N].
        log_prior: sum over latent sites of log p(z), [K, N].
        log_guide: sum over latent sites of log q(z | x), [K, N].
        given: global latent sites, and the values that they were fixed at.
    """

    log_likelihood: Tensor
    log_prior: Tensor
    log_guide: Tensor
    given: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = {self.log_likelihood.shape, self.log_prior.shape, self.log_guide.shape}
        if len(shapes) != 1:
            raise ValueError(
                "log_likelihood, log_prior and log_guide need one shape [K, N], found "
                f"{sorted(tuple(shape) for shape in shapes)}"
            )

    @property
    def log_joint(self) -> Tensor:
        """log p(x, z), [K, N]."""
        return self.log_likelihood + self.log_prior

    @property
    def total(self) -> Tensor:
        """log w = log p(x, z) - log q(z | x), [K, N]."""
        return self.log_joint - self.log_guide

    @property
    def num_particles(self) -> int:
        """K."""
        return self.log_likelihood.shape[0]

    @property
    def num_data(self) -> int:
        """N."""
        return self.log_likelihood.shape[1]

    @staticmethod
    def concatenate(chunks: Sequence[LogWeights], dim: int) -> LogWeights:
        """Join chunks along particles (dim 0) or data (dim 1)."""
        parts = zip(*((c.log_likelihood, c.log_prior, c.log_guide) for c in chunks), strict=True)
        log_likelihood, log_prior, log_guide = (torch.cat(part, dim) for part in parts)
        return LogWeights(log_likelihood, log_prior, log_guide)

    def __repr__(self) -> str:
        return f"LogWeights(num_particles={self.num_particles}, num_data={self.num_data})"
