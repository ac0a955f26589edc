"""Encoder and decoder networks, small and plain. Users bring their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

__all__ = ["MLP"]


class MLP(nn.Module):
    """A multilayer perceptron over the last dimension.

    The last layer is linear; the activation stands between layers, and also after
    the last where ``activate_last`` (an encoder's features).

    Args:
        sizes: width of each layer, input and output included: [in, hidden..., out].
        activation: makes the activation module.
        activate_last: whether the activation follows the last layer as well.
        input_scale: what the input is divided by, for example the largest intensity.

    Raises:
        ValueError: for fewer than two sizes.

    Example:
        >>> import torch
        >>> MLP([4, 8, 3])(torch.zeros(5, 4)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        activation: Callable[[], nn.Module] = nn.Tanh,
        activate_last: bool = False,
        input_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"sizes={list(sizes)}: an MLP needs an input and an output size")
        self.input_scale = input_scale
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), activation()]
        self.layers = nn.Sequential(*(layers if activate_last else layers[:-1]))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        return self.layers(x / self.input_scale)
