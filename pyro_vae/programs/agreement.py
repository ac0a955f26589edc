"""Whether two log densities, or two values, are equal to rounding, and by how much they differ."""

from __future__ import annotations

import torch
from torch import Tensor


def _close(reference: Tensor, found: Tensor) -> Tensor:
    """Return which numbers are equal to the rounding of the reference's dtype; NaN equals NaN."""
    tolerance = 1e-9 if reference.dtype == torch.float64 else 1e-4
    return torch.isclose(reference, found, rtol=tolerance, atol=tolerance, equal_nan=True)


def agree(reference: Tensor, found: Tensor) -> bool:
    """Return whether two tensors have one shape and are equal to rounding; integers exactly."""
    if not reference.is_floating_point():
        return torch.equal(reference, found)
    return found.shape == reference.shape and bool(_close(reference, found).all())


def largest_gap(reference: Tensor, found: Tensor) -> float:
    """Return the largest difference beyond rounding between two tensors that broadcast, or 0."""
    reference, found = torch.broadcast_tensors(reference, found)
    apart = ~_close(reference, found)
    return float((reference - found)[apart].abs().max()) if bool(apart.any()) else 0.0
