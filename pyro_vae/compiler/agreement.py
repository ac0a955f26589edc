"""Whether a graph gives what an eager run gives: every tolerance for that is here.

Numbers a (eager) and b (graph) agree where ``|a - b| <= t (1 + |a|)``, with t a tolerance;
gradients where ``|a - b| <= t max(largest |a|, floor)``, the floor that of gradients that vanish.
NaN agrees with NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# By whether both are made in float64, and whether by the same operations in the same order:
# compiled code sums in another one.
_TOLERANCES = {(True, True): 1e-10, (False, True): 1e-5, (True, False): 1e-7, (False, False): 1e-3}
# A loss is a sum of many numbers, whose rounding is less than that of each. A KL weight that is a
# hundredth off, as one of the step before, changes it by more.
_COMPILED_LOSS = 1e-4
# Gradients that vanish are a sum that cancels, and left of them is the rounding of its terms: they
# count as large as this share of the largest gradient, or of 1 + |loss|.
_FLOOR = 1e-3


def numbers_agree(
    wanted: Sequence[Tensor], found: Sequence[Tensor | None], inputs: Iterable[Tensor], exact: bool
) -> bool:
    """Return whether all results of a function agree.

    Args:
        wanted: of an eager run.
        found: of the graph.
        inputs: of both; results of float64 may be made of numbers of float32.
        exact: whether both come from the same operations in the same order.
    """
    double = not any(tensor.dtype == torch.float32 for tensor in inputs)
    return all(
        b is not None and _close(a, b, double=double, exact=exact)
        for a, b in zip(wanted, found, strict=True)
    )


def losses_differ(wanted: Tensor, found: Tensor, *, exact: bool) -> str | None:
    """Return how two losses differ, in words; None where they agree, or neither is finite."""
    neither = not bool(wanted.isfinite()) and not bool(found.isfinite())
    whole = wanted.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    most = _COMPILED_LOSS if whole and not exact else math.inf
    if neither or _close(wanted, found, exact=exact, most=most):
        return None
    return f"its loss is {float(found):.7g}, and {float(wanted):.7g} in an eager step"


def gradients_differ(
    loss: Tensor, wanted: Sequence[Tensor | None], found: Sequence[Tensor | None], *, exact: bool
) -> str | None:
    """Return how the gradients of a loss differ, in words; None where they agree.

    Args:
        loss: of the eager run; gradients of one that is not finite are not compared.
        wanted: of the eager run, for each parameter.
        found: of the graph.
        exact: as in :func:`numbers_agree`.
    """
    if not bool(loss.isfinite()):
        return None
    sizes = [_largest(gradient) for gradient in wanted]
    floor = _FLOOR * max(1 + abs(float(loss)), *sizes, 0.0)
    most = _TOLERANCES[loss.dtype == torch.float64, exact]
    for index, (a, b) in enumerate(zip(wanted, found, strict=True)):
        if (a is None) != (b is None):
            return f"parameter {index} has a gradient in one and none in the other"
        if a is None or b is None:
            continue
        if not torch.allclose(a, b, 0.0, most * max(sizes[index], floor), equal_nan=True):
            gap, shape = float((a - b).abs().max()), tuple(a.shape)
            return f"the gradients of parameter {index}, of shape {shape}, differ by {gap:.3g}"
    return None


def same_state(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Return whether parameters and an optimizer's state agree after one update of each kind."""
    return all(torch.allclose(a, b, equal_nan=True) for a, b in zip(wanted, found, strict=True))


def _close(
    a: Tensor, b: Tensor, *, double: bool = True, exact: bool, most: float = math.inf
) -> bool:
    """Return whether two tensors agree, number by number, to a tolerance of ``most`` or less."""
    most = min(most, _TOLERANCES[double and a.dtype == torch.float64, exact])
    return torch.allclose(a, b.to(a), most, most, equal_nan=True)


def _largest(gradient: Tensor | None) -> float:
    """Return the largest finite magnitude; 0 where there is no gradient, or NaN."""
    if gradient is None or not gradient.numel():
        return 0.0
    return float(gradient.abs().nan_to_num(posinf=0.0).max())
