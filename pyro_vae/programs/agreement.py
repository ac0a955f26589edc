"""Whether two log densities, or two values, are equal to rounding, and by how much they differ."""

from __future__ import annotations

import torch
from torch import Tensor


def agree(reference: Tensor, found: Tensor, *, slack: float = 1.0) -> bool:
    """Return whether two tensors have one shape and are equal to rounding; integers exactly.

    Args:
        reference: whose dtype says what rounding is.
        found: to be compared.
        slack: by how much more than rounding they may differ.
    """
    if not reference.is_floating_point():
        return torch.equal(reference, found)
    return found.shape == reference.shape and bool(_close(reference, found, slack).all())


def largest_gap(reference: Tensor, found: Tensor) -> float:
    """Return the largest difference beyond rounding between two tensors that broadcast, or 0."""
    reference, found = torch.broadcast_tensors(reference, found)
    apart = ~_close(reference, found, 1.0)
    return float((reference - found)[apart].abs().max()) if bool(apart.any()) else 0.0


def _close(reference: Tensor, found: Tensor, slack: float) -> Tensor:
    """Return which numbers are equal to the rounding of the reference's dtype; NaN equals NaN."""
    tolerance = slack * (1e-9 if reference.dtype == torch.float64 else 1e-4)
    return torch.isclose(reference, found, rtol=tolerance, atol=tolerance, equal_nan=True)
