"""Whether a graph gives what an eager run gives: every tolerance for that is here.

Numbers a (eager) and b (graph) agree where ``|a - b| <= t (1 + |a|)``, with t from
:func:`tolerance`; gradients where ``|a - b| <= t max(largest |a|, floor)``, the floor that of
gradients that vanish. NaN agrees with NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# Gradients that vanish are a sum that cancels, and left of them is the rounding of its terms: they
# count as large as this share of the largest gradient, or of 1 + |loss|.
_FLOOR = 1e-3


def tolerance(*, double: bool, exact: bool) -> float:
    """Return how far two numbers may be apart.

    Args:
        double: whether both are made in float64.
        exact: whether both are made by the same operations in the same order; compiled code sums
            in another one.
    """
    if exact:
        return 1e-10 if double else 1e-5
    return 1e-7 if double else 1e-3


def numbers_agree(
    wanted: Sequence[Tensor],
    found: Sequence[Tensor | None],
    inputs: Iterable[Tensor],
    *,
    exact: bool,
) -> bool:
    """Return whether all results of a function agree.

    Args:
        wanted: of an eager run.
        found: of the graph.
        inputs: of both; results of float64 may be made of numbers of float32.
        exact: as in :func:`tolerance`.
    """
    double = not any(tensor.dtype == torch.float32 for tensor in inputs)
    return all(
        b is not None
        and _close(a, b.to(a), tolerance(double=double and _is_double(a), exact=exact))
        for a, b in zip(wanted, found, strict=True)
    )


def losses_differ(wanted: Tensor, found: Tensor, *, exact: bool) -> str | None:
    """Return how two losses differ, in words; None where they agree, or neither is finite."""
    if not bool(wanted.isfinite()) and not bool(found.isfinite()):
        return None
    if _close(wanted, found.to(wanted), tolerance(double=_is_double(wanted), exact=exact)):
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
        exact: as in :func:`tolerance`.
    """
    if not bool(loss.isfinite()):
        return None
    sizes = [_largest(gradient) for gradient in wanted]
    floor = _FLOOR * max(1 + abs(float(loss)), *sizes, 0.0)
    most = tolerance(double=_is_double(loss), exact=exact)
    for index, (a, b) in enumerate(zip(wanted, found, strict=True)):
        if (a is None) != (b is None):
            return f"parameter {index} has a gradient in one and none in the other"
        if a is None or b is None:
            continue
        if not _close(a, b, 0.0, most * max(sizes[index], floor)):
            gap = float((a - b).abs().max())
            return (
                f"the gradients of parameter {index}, of shape {tuple(a.shape)}, "
                f"differ by {gap:.3g}"
            )
    return None


def same_state(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Return whether parameters and an optimizer's state agree after one update of each kind."""
    pairs = zip(wanted, found, strict=True)
    return all(torch.allclose(*pair, equal_nan=True) for pair in pairs)


def _close(a: Tensor, b: Tensor, relative: float, absolute: float | None = None) -> bool:
    """Return whether two tensors agree, number by number."""
    absolute = relative if absolute is None else absolute
    return torch.allclose(a, b, rtol=relative, atol=absolute, equal_nan=True)


def _is_double(tensor: Tensor) -> bool:
    """Return whether a tensor is of float64."""
    return tensor.dtype == torch.float64


def _largest(gradient: Tensor | None) -> float:
    """Return the largest finite magnitude; 0 where there is no gradient, or NaN."""
    if gradient is None or not gradient.numel():
        return 0.0
    return float(gradient.abs().nan_to_num(posinf=0.0).max())
