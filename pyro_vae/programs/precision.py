"""Log densities in double precision, where single precision loses nats of them.

The terms of a count of a million are of the size of ten million nats, of which float32 keeps one:
their sum is small, and what it is has been rounded away.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
import torch.distributions as td
from torch import Tensor, nn

from pyro_vae.programs.types import Distribution


class _CannotWidenError(TypeError):
    """A part of a distribution that has no float64 copy."""


def widened(fn: Distribution) -> Distribution | None:
    """Return a distribution with the same parameters in float64; None for one made of a network."""
    with contextlib.suppress(_CannotWidenError):
        return _widened(fn)
    return None


def _widened(part: Any) -> Any:
    if isinstance(part, Tensor):
        return part.double() if part.is_floating_point() else part
    if isinstance(part, nn.Module):
        raise _CannotWidenError
    if isinstance(part, list | tuple):
        return type(part)(map(_widened, part))
    if isinstance(part, td.Distribution | td.Transform):
        wide, unused = copy.copy(part), ("_inv", "_cached_x_y")
        vars(wide).update({n: _widened(v) for n, v in vars(part).items() if n not in unused})
        if isinstance(part, td.Transform):  # whose last argument and value are of no use to it
            vars(wide)["_cached_x_y"] = None, None
        return wide
    return part


def rounding_of_parameters(fn: Distribution, value: Tensor) -> Tensor | None:
    r"""Return how much the rounding of a distribution's own parameters moves its log density.

    .. math:: \Bigl(\sum_i (\epsilon\, \theta_i\, \partial_{\theta_i} \log p)^2\Bigr)^{1/2}

    with the relative rounding of the parameters' dtype, over all of the value: to first order,
    and as if they were rounded independently.

    Args:
        fn: a distribution.
        value: to be scored.

    Returns:
        A number, in nats; None where the density has no gradient.
    """
    wide = widened(fn)
    if wide is None:
        return None
    with torch.enable_grad():
        leaves = _leaves(wide)
        try:
            slopes = torch.autograd.grad(
                wide.log_prob(_widened(value)).sum(), leaves, allow_unused=True
            )
        except RuntimeError:
            return None
    eps, pairs = torch.finfo(torch.float32).eps / 2, zip(leaves, slopes, strict=True)
    moved = [(eps * x.detach() * slope).square().sum() for x, slope in pairs if slope is not None]
    return torch.stack(moved).sum().sqrt() if moved else None


def _leaves(wide: td.Distribution) -> list[Tensor]:
    """Make the tensors of a widened distribution leaves of a graph, and return them."""
    found = []
    for name, value in list(vars(wide).items()):
        if isinstance(value, Tensor) and value.is_floating_point():
            leaf = vars(wide)[name] = value.detach().clone().requires_grad_()
            found.append(leaf)
        elif isinstance(value, td.Distribution):
            found.extend(_leaves(value))
    return found
