"""Modes of a datum's log p(x, z) in unconstrained coordinates, and the curvature there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_vae.refinement.blocks import Block, ScoredGuide
from pyro_vae.refinement.lbfgs import minimize_rows

_CLIMB, _POLISH = 60, 20  # iterations of L-BFGS, before the curvature is known and after
_MOVED = 0.1  # standard deviations: so far from where the curvature was taken it is taken anew
_LOWEST = 1e-2  # precision of a mode in units of the prior's: what is flatter says nothing
_WIDEST_HESSIAN = 256  # coordinates: its cost grows with them


def find_modes(block: Block, places: Tensor, prior: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the modes that L-BFGS finds from places, and how high they are.

    Args:
        block: of n data.
        places: unconstrained coordinates, [M, n, D].
        prior: its weight in log p(x, z).

    Returns:
        [M, n, D]; and log p(x, z) there, up to a constant, [M, n].
    """
    shape, calls = places.shape, 0

    def objective(flat: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        height, slope = _height(block, flat.reshape(shape), _CLIMB, prior, check=calls == 1)
        return -height.flatten(), -slope.flatten(0, 1)

    modes = minimize_rows(objective, places.flatten(0, 1), _CLIMB).rows.reshape(shape)
    height, _ = _height(block, modes, _CLIMB, prior)
    return modes, torch.nan_to_num(height, nan=-torch.inf, posinf=-torch.inf)


def gaussian_at(block: Block, mode: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the Gaussian of the curvature at a mode, searched for once more in whitened units.

    Args:
        block: of n data.
        mode: [n, D], near one.

    Returns:
        Its mean, [n, D], and scale_tril, [n, D, D]; None where the model cannot be differentiated
        twice, or has too many coordinates.
    """
    factor = _scale_tril(block, mode)
    if factor is None:
        return None
    white = factor

    def objective(y: Tensor) -> tuple[Tensor, Tensor]:
        z = mode + (white @ y.unsqueeze(-1)).squeeze(-1)
        height, slope = _height(block, z.unsqueeze(0), _POLISH)
        return -height[0], -(white.mT @ slope[0].unsqueeze(-1)).squeeze(-1)

    y = minimize_rows(objective, torch.zeros_like(mode), _POLISH).rows
    moved = mode + (white @ y.unsqueeze(-1)).squeeze(-1)
    if float(y.abs().max()) > _MOVED:
        factor = _scale_tril(block, moved)
    return None if factor is None else (moved, factor)


def _scale_tril(block: Block, mode: Tensor) -> Tensor | None:
    """Return the Cholesky factor of the inverse of the curvature, [n, D, D]."""
    if mode.shape[1] > _WIDEST_HESSIAN:
        return None
    precision = _curvature(block.flat, mode)
    if precision is None:
        return None
    scale = block.prior_scale.double()
    precision = precision.double() * scale * scale.unsqueeze(-1)
    eye = torch.eye(mode.shape[1], dtype=torch.float64, device=mode.device)
    usable = precision.isfinite().all(-1).all(-1)
    precision = torch.where(usable[:, None, None], precision, eye)
    values, vectors = torch.linalg.eigh(precision)
    flat = values < _LOWEST
    mended = (vectors * torch.where(flat, 1.0, values).unsqueeze(-2)) @ vectors.mT
    precision = torch.where(flat.any(-1)[:, None, None], mended, precision)
    # The Cholesky factor of an inverse, without the inverse.
    root, failed = torch.linalg.cholesky_ex(precision.flip(-2, -1))
    root = torch.where((failed > 0)[:, None, None], eye, root)
    factor = torch.linalg.solve_triangular(root.flip(-2, -1).mT, eye, upper=False)
    return (scale.unsqueeze(-1) * factor).to(mode)


def _curvature(flat: ScoredGuide, z: Tensor) -> Tensor | None:
    """Return minus the Hessian of log p(x, z) at z [n, D], [n, D, D]; None where there is none."""
    num_data, size = z.shape
    step = max(1, flat.evaluator.chunk_pairs // num_data)
    rows = []
    with torch.enable_grad():
        for some in torch.eye(size, dtype=z.dtype, device=z.device).split(step):
            at = z.expand(len(some), num_data, size).clone().requires_grad_()
            try:
                (slope,) = torch.autograd.grad(flat.log_joint(at).sum(), [at], create_graph=True)
                (row,) = torch.autograd.grad((slope * some.unsqueeze(1)).sum(), [at])
            except RuntimeError:  # an operation that can be differentiated once
                return None
            rows.append(-row)
    found = torch.cat(rows).movedim(0, 1)
    return (found + found.mT) / 2


def _height(
    block: Block, z: Tensor, calls: int, prior: float = 1.0, *, check: bool = False
) -> Sequence[Tensor]:
    """Return :func:`height` of z [K, n, D], by its graph."""
    # A tensor: a number would be a constant of the graph.
    return block.run(height, block.flat, [z.new_full((), prior), z], calls, check=check)


def height(flat: ScoredGuide, prior: Tensor, z: Tensor) -> list[Tensor]:
    """Return log p(x, z) with the prior to a power, [K, n], and its gradient, [K, n, D]."""
    z = z.detach().requires_grad_()
    height = flat.log_joint(z, prior)
    return [height.detach(), *torch.autograd.grad(height.sum(), [z])]
