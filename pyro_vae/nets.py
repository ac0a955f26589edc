"""Encoder and decoder networks, small and plain. Users bring their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

__all__ = ["MLP", "ConvDecoder", "ConvEncoder"]


class MLP(nn.Module):
    """A multilayer perceptron over the last dimension.

    The last layer is linear; the activation stands between layers, and also after
    the last where ``activate_last`` (an encoder's features). Where there is an activation,
    batch normalization comes before it and dropout after it.

    Args:
        sizes: width of each layer, input and output included: [in, hidden..., out].
        activation: makes the activation module.
        activate_last: whether the activation follows the last layer as well.
        input_scale: what the input is divided by, for example the largest intensity.
        batch_norm: whether to normalize over all rows of a batch (Ioffe & Szegedy 2015).
        dropout: probability of a unit to be left out in training.

    Raises:
        ValueError: for fewer than two sizes, and a dropout outside of [0, 1].

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
        batch_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"sizes={list(sizes)}: an MLP needs an input and an output size")
        self.input_scale = input_scale
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(sizes), start=2):
            layers.append(nn.Linear(before, after))
            if i < len(sizes) or activate_last:
                layers += [nn.BatchNorm1d(after)] if batch_norm else []
                layers.append(activation())
                layers += [nn.Dropout(dropout)] if dropout else []
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        # One dimension of rows: BatchNorm1d takes the second of three for its channels.
        y = self.layers(x.reshape(-1, x.shape[-1]) / self.input_scale)
        return y.reshape(*x.shape[:-1], y.shape[-1])


class ConvEncoder(nn.Module):
    """Features of an image: convolutions that halve it, and a linear layer.

    Each convolution (3 x 3, stride 2) is followed by batch normalization, the activation and
    dropout of whole channels, where they are asked for; the linear layer by the activation.

    Args:
        shape: of an image: channels, height, width.
        num_features: F, width of the output.
        channels: of each convolution, first to last.
        activation: makes the activation module.
        input_scale: what the input is divided by, for example the largest intensity.
        batch_norm: whether to normalize over all images of a batch (Ioffe & Szegedy 2015).
        dropout: probability of a channel to be left out in training.

    Raises:
        ValueError: for a shape that is not three sizes, no channels, or a dropout outside
            of [0, 1]; when called, for images of another shape.

    Example:
        >>> import torch
        >>> ConvEncoder((1, 8, 6), 20, channels=[4, 8])(torch.zeros(5, 1, 8, 6)).shape
        torch.Size([5, 20])
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_features: int,
        *,
        channels: Sequence[int] = (16, 32),
        activation: Callable[[], nn.Module] = nn.SiLU,
        input_scale: float = 1.0,
        batch_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        height, width = _halvings(shape, channels)[-1]
        self.shape = tuple(shape)
        self.input_scale = input_scale
        layers: list[nn.Module] = []
        for before, after in pairwise([shape[0], *channels]):
            layers.append(nn.Conv2d(before, after, 3, stride=2, padding=1))
            layers += _after_convolution(after, activation, batch_norm, dropout)
        last = nn.Linear(channels[-1] * height * width, num_features)
        self.layers = nn.Sequential(*layers, nn.Flatten(), last, activation())

    def forward(self, x: Tensor) -> Tensor:
        """Map images [..., C, H, W] to features [..., F]."""
        if x.shape[-3:] != self.shape:
            sizes = ", ".join(map(str, self.shape))
            raise ValueError(
                f"images of shape [..., {sizes}] (channels, height, width) are needed, got "
                f"{list(x.shape)}; x.reshape(-1, {sizes}) makes them of flat ones"
            )
        features = self.layers(x.reshape(-1, *self.shape) / self.input_scale)
        return features.reshape(*x.shape[:-3], features.shape[-1])


class ConvDecoder(nn.Module):
    """An image from latents: a linear layer, and transposed convolutions that double it.

    The mirror of :class:`ConvEncoder`; what comes out is linear (logits, means).

    Args:
        num_latents: L, width of the input.
        shape: of an image: channels, height, width.
        channels: before each transposed convolution, first to last.
        activation, batch_norm, dropout: as in :class:`ConvEncoder`, and the errors too.

    Example:
        >>> import torch
        >>> ConvDecoder(3, (1, 7, 5), channels=[8, 4])(torch.zeros(2, 5, 3)).shape
        torch.Size([2, 5, 1, 7, 5])
    """

    def __init__(
        self,
        num_latents: int,
        shape: Sequence[int],
        *,
        channels: Sequence[int] = (32, 16),
        activation: Callable[[], nn.Module] = nn.SiLU,
        batch_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = _halvings(shape, channels)[::-1]
        height, width = sizes[0]
        layers: list[nn.Module] = [
            nn.Linear(num_latents, channels[0] * height * width),
            nn.Unflatten(1, (channels[0], height, width)),
        ]
        widths, sides = pairwise([*channels, shape[0]]), pairwise(sizes)
        for (before, after), (smaller, larger) in zip(widths, sides, strict=True):
            layers += _after_convolution(before, activation, batch_norm, dropout)
            # From n the convolution makes 2 n - 1, or one more where that is asked for.
            tall, wide = (
                large - 2 * small + 1 for large, small in zip(larger, smaller, strict=True)
            )
            layers.append(nn.ConvTranspose2d(before, after, 3, 2, 1, (tall, wide)))
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """Map latents [..., L] to images [..., C, H, W]."""
        # A convolution takes one dimension before the channels; particles stand left of the data.
        images = self.layers(z.reshape(-1, z.shape[-1]))
        return images.reshape(*z.shape[:-1], *images.shape[1:])


def _halvings(shape: Sequence[int], channels: Sequence[int]) -> list[tuple[int, int]]:
    """Return height and width of an image, and after each convolution of stride two."""
    if len(shape) != 3 or min(shape) < 1:
        needed = "channels, height and width are needed, each at least 1"
        raise ValueError(f"shape={tuple(shape)}: {needed}")
    if not channels:
        raise ValueError("channels is empty: at least one convolution is needed")
    halved = (2**n for n in range(len(channels) + 1))  # rounding up each time
    return [(-(-shape[1] // by), -(-shape[2] // by)) for by in halved]


def _after_convolution(
    channels: int, activation: Callable[[], nn.Module], batch_norm: bool, dropout: float
) -> list[nn.Module]:
    norm = [nn.BatchNorm2d(channels)] if batch_norm else []
    return [*norm, activation(), *([nn.Dropout2d(dropout)] if dropout else [])]
