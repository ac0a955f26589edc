"""Densities that chains move in, by formula: no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.sampling.hmc import Point


@dataclass(frozen=True)
class ByFormula:
    """log f_0 and log r as functions of z [C, N, D], with slopes by autograd."""

    base: Callable[[Tensor], Tensor]
    ratio: Callable[[Tensor], Tensor]

    def __call__(self, z: Tensor) -> Point:
        z = z.detach().requires_grad_()
        base, ratio = self.base(z), self.ratio(z)
        slopes = [torch.autograd.grad(term.sum(), [z])[0] for term in (base, ratio)]
        return Point(z.detach(), base.detach(), ratio.detach(), *slopes)


def zero(z: Tensor) -> Tensor:
    return 0.0 * z.sum(-1)


def gaussian(precision: Tensor) -> ByFormula:
    """A centred Gaussian of a precision [N, D, D], at every power."""
    return ByFormula(lambda z: -0.5 * torch.einsum("cnd,nde,cne->cn", z, precision, z), zero)


# z = log g of g ~ Gamma(1.5 + 0.7 power): skewed, and known at every power.
log_gamma = ByFormula(lambda z: (1.5 * z - z.exp()).sum(-1), lambda z: 0.7 * z.sum(-1))
