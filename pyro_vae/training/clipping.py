"""Gradient clipping: by the norm of all gradients together, or number by number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.programs.messages import as_number

_AS_TORCH = 1e-6  # added to the norm by torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True)
class Clip:
    r"""Clips the gradients of a step, as PyTorch's utilities do.

    .. math::
        g \leftarrow g \min\Big(1, \frac{c}{\lVert g \rVert + 10^{-6}}\Big)
        \quad\text{or}\quad g_i \leftarrow \min(\max(g_i, -v), v)

    where g are the gradients of all parameters together (Pascanu, Mikolov & Bengio 2013).

    Args:
        norm: c, as in ``torch.nn.utils.clip_grad_norm_``; None for no such bound.
        value: v, as in ``torch.nn.utils.clip_grad_value_``; None for no such bound.

    Raises:
        ValueError: for a bound that is no finite number above 0, or for both at once.

    Example:
        >>> Clip(norm=1.0)([torch.tensor([3.0, 4.0])])
        [tensor([0.6000, 0.8000])]
    """

    norm: float | None = None
    value: float | None = None

    def __post_init__(self) -> None:
        for name, bound in (("clip_norm", self.norm), ("clip_value", self.value)):
            if bound is not None and not 0 < as_number(name, bound) < math.inf:
                raise ValueError(f"{name}={bound!r}: a finite number above 0 is needed")
        if self.norm is not None and self.value is not None:
            what = "which of them comes first makes a difference; give one"
            raise ValueError(f"clip_norm and clip_value: {what}")

    def __bool__(self) -> bool:
        return self.norm is not None or self.value is not None

    @torch.no_grad()
    def __call__(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of a step, clipped; new tensors.

        Raises:
            ValueError: for a sparse gradient.
        """
        if any(gradient.is_sparse for gradient in gradients):
            what = "a gradient is sparse, as of nn.Embedding(sparse=True); make it sparse=False"
            raise ValueError(f"clip_norm, clip_value: {what}")
        if self.value is not None:
            return [gradient.clamp(-self.value, self.value) for gradient in gradients]
        if self.norm is None or not gradients:
            return list(gradients)
        norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
        total = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
        factor = (self.norm / (total + _AS_TORCH)).clamp(max=1.0)
        return [gradient * factor.to(gradient.device) for gradient in gradients]
