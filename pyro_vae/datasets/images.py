"""Images to try a model on: the digits that ship with the package, and loaders for local files.

Everything here returns tensors of whole numbers, one flattened image per row. What the numbers
mean is left to the model: counts out of `max_value` (a Binomial likelihood), or intensities from
which `StochasticBinarization` draws black and white images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_vae.datasets.image_files import Arrays, read

_SPLIT_SEED = 0


@dataclass(frozen=True, eq=False)
class ImageData:
    """Grey images of one size, split into a training part and a held-out part.

    Args:
        name: Where the images come from, for titles and messages.
        train: Training images [N, H * W], uint8, from 0 to `max_value`.
        test: Held-out images [M, H * W], uint8, from 0 to `max_value`.
        train_labels: Classes of the training images [N], int64, or None.
        test_labels: Classes of the held-out images [M], int64, or None.
        shape: Height and width of an image, (H, W).
        max_value: The largest intensity a pixel can have: 1, 16 or 255 in the common encodings.
    """

    name: str
    train: Tensor
    test: Tensor
    train_labels: Tensor | None
    test_labels: Tensor | None
    shape: tuple[int, int]
    max_value: int

    def __repr__(self) -> str:
        labels = "without" if self.train_labels is None else "with"
        return (
            f"ImageData({self.name!r}: {len(self.train)} train, {len(self.test)} test, "
            f"{_size(self.shape)}, 0 to {self.max_value}, {labels} labels)"
        )


def digits(*, test_fraction: float = 0.2) -> ImageData:
    """Return the 1,797 handwritten digits of 8 x 8 pixels that ship with the package.

    A pixel counts the black ones among 16, so Binomial(16) is the natural likelihood. The images
    are shuffled once, by a permutation that never changes, and the last `test_fraction` of them
    are held out: 360 of 1,797 by default.

    Source: Optical Recognition of Handwritten Digits, Alpaydin and Kaynak (1998), UCI Machine
    Learning Repository, test part; CC BY 4.0.

    Args:
        test_fraction: Share of the images to hold out, strictly between 0 and 1.

    Returns:
        The images with their labels, `shape` (8, 8) and `max_value` 16.

    Raises:
        ValueError: `test_fraction` is not strictly between 0 and 1.

    Example:
        >>> from pyro_vae import datasets
        >>> datasets.digits()
        ImageData('digits': 1437 train, 360 test, 8 x 8, 0 to 16, with labels)
    """
    shipped = resources.files("pyro_vae") / "data" / "digits.npz"
    with shipped.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        images = Arrays(arrays["x"], arrays["y"])
    return _image_data("digits", images, test_fraction, max_value=16, where="digits.npz")


def load(
    path: str | Path, *, max_value: int | None = None, test_fraction: float = 1 / 6
) -> ImageData:
    """Return images from a local file: .npz, .npy, or MNIST's idx format, gzipped or not.

    Accepted are

    - an .npz file with the keys `x_train` and `x_test`, or `x_train` alone, or `x` alone; labels,
      if any, under `y_train`, `y_test`, `y`;
    - an .npy file with one array of images;
    - an idx file of images (`train-images-idx3-ubyte`, with or without .gz); labels are taken
      from the file of the matching name beside it (`train-labels-idx1-ubyte`), if it is there;
    - a directory with MNIST's four idx files, which gives the published split.

    Images are arrays [N, H, W], or [N, D] with D a square number, of whole numbers from 0 to
    `max_value`. A file without a test part is shuffled by a permutation that never changes, and
    the last `test_fraction` of it is held out.

    Args:
        path: The file or directory.
        max_value: The largest intensity a pixel can have, at most 255. By default the smallest of
            1, 16 and 255 that no pixel exceeds.
        test_fraction: Share of the images to hold out where the file has no test part of its own,
            strictly between 0 and 1.

    Returns:
        The images, with labels where the file has them.

    Raises:
        FileNotFoundError: There is nothing at `path`, or a directory lacks one of the four files.
        ValueError: The file is not what its name says, is cut short, lacks a key, or holds
            something else than images as above. The message says what was expected and found.

    Example:
        >>> import numpy as np, tempfile
        >>> from pathlib import Path
        >>> from pyro_vae import datasets
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "squares.npy"
        ...     np.save(file, np.full((12, 4, 4), 255, dtype=np.uint8))
        ...     datasets.load(file)
        ImageData('squares': 10 train, 2 test, 4 x 4, 0 to 255, without labels)
    """
    path = Path(path)
    name = path.resolve().name.split(".")[0]
    return _image_data(name, read(path), test_fraction, max_value, where=str(path))


class StochasticBinarization:
    """Black and white images drawn from grey ones, afresh whenever training meets them.

    A pixel of intensity v is 1 with probability v / max_value, independently of the others
    (Salakhutdinov and Murray, 2008, "On the quantitative analysis of deep belief networks").
    Training on a new draw at each epoch keeps a model from learning the noise of one draw; held-out
    bounds need one draw that stays, which `fixed` gives. :func:`pyro_vae.fit` draws a minibatch
    inside of its step: whole bytes that the images came in stay bytes, and there is no copy.

    Args:
        images: Grey images [N, ...], datum first, values from 0 to `max_value`.
        max_value: The intensity that is always drawn as 1.

    Raises:
        ValueError: There is no image, a value lies outside [0, max_value], or max_value < 1.

    Example:
        >>> import torch
        >>> from pyro_vae import datasets
        >>> data = datasets.digits()
        >>> train = datasets.StochasticBinarization(data.train, data.max_value)
        >>> train.epoch(torch.Generator().manual_seed(0)).shape
        torch.Size([1437, 64])
        >>> test = datasets.StochasticBinarization(data.test, data.max_value).fixed(seed=0)
    """

    def __init__(self, images: Tensor, max_value: int) -> None:
        if max_value < 1:
            raise ValueError(f"max_value must be at least 1, got {max_value}")
        if images.numel() == 0 or images.ndim < 2:
            wanted = "images of shape [N, ...] with N at least 1"
            raise ValueError(f"expected {wanted}, got {list(images.shape)}")
        # Written so that NaN fails as well.
        if not bool(((images >= 0) & (images <= max_value)).all()):
            found = f"values from {images.min().item()} to {images.max().item()}"
            raise ValueError(f"expected intensities from 0 to max_value={max_value}, found {found}")
        self.images = images
        self.max_value = max_value

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        shape = list(self.images.shape)
        return f"StochasticBinarization(images={shape}, max_value={self.max_value})"

    @property
    def source(self) -> Tensor:
        """The grey images, [N, ...]."""
        return self.images

    def draw(self, images: Tensor) -> Tensor:
        """Return a draw of some rows of `source`, by PyTorch's global random numbers.

        Args:
            images: Rows of `source`.

        Returns:
            Images of the same shape, float32, each value 0 or 1.
        """
        return torch.bernoulli(images.float() / self.max_value)

    def epoch(self, generator: torch.Generator) -> Tensor:
        """Return a fresh draw of every image, as :meth:`draw` of some.

        Args:
            generator: Source of randomness, on the device of the images. It moves on, so the next
                call gives another draw.
        """
        return torch.bernoulli(self.images.float() / self.max_value, generator=generator)

    def fixed(self, seed: int) -> Tensor:
        """Return one draw that depends on the seed alone, for held-out data.

        Args:
            seed: Seed of a generator of its own; the global state is left alone.
        """
        return self.epoch(torch.Generator(device=self.images.device).manual_seed(seed))


class _Part(NamedTuple):
    """Checked and flattened images [N, H * W], their classes [N], and their shape (H, W)."""

    images: Tensor
    labels: Tensor | None
    shape: tuple[int, int]

    def take(self, index: Tensor) -> _Part:
        labels = None if self.labels is None else self.labels[index]
        return self._replace(images=self.images[index], labels=labels)


def _size(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def _image_data(
    name: str, arrays: Arrays, test_fraction: float, max_value: int | None, where: str
) -> ImageData:
    """Check the arrays of a file, and hold out a part where it has none."""
    if arrays.test is None:
        whole = _checked(arrays.train, arrays.train_labels, where)
        train, test = _hold_out(whole, test_fraction, where)
    else:
        train = _checked(arrays.train, arrays.train_labels, f"{where} (train)")
        test = _checked(arrays.test, arrays.test_labels, f"{where} (test)")
        if train.shape != test.shape:
            sizes = f"training images are {_size(train.shape)}, test images {_size(test.shape)}"
            raise ValueError(f"{where}: {sizes}")
    largest = int(max(train.images.max(), test.images.max()))
    if max_value is None:
        max_value = next(top for top in (1, 16, 255) if largest <= top)
    if not 1 <= max_value <= 255:
        raise ValueError(f"max_value must lie between 1 and 255, got {max_value}")
    if largest > max_value:
        found = f"from 0 to {max_value}, found one of {largest}"
        raise ValueError(f"{where}: expected intensities {found}")
    labels = (train.labels, test.labels)
    return ImageData(name, train.images, test.images, *labels, train.shape, max_value)


def _hold_out(whole: _Part, test_fraction: float, where: str) -> tuple[_Part, _Part]:
    """Shuffle by a permutation that never changes, then hold out the last part."""
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must lie strictly between 0 and 1, got {test_fraction}")
    num_images = len(whole.images)
    num_test = math.ceil(test_fraction * num_images)
    if num_test == num_images:
        held = f"{test_fraction:.3g} of {num_images} images"
        raise ValueError(f"{where}: cannot hold out {held}, none would be left to train on")
    # RandomState and not default_rng: NumPy promises that its stream never changes, and a held-out
    # split must be the same one in every version.
    order = torch.from_numpy(np.random.RandomState(_SPLIT_SEED).permutation(num_images))
    return whole.take(order[:-num_test]), whole.take(order[-num_test:])


def _checked(images: np.ndarray, labels: np.ndarray | None, where: str) -> _Part:
    _, *shape = images.shape or (0,)
    if len(shape) == 1:  # flat images are squares
        shape = [math.isqrt(shape[0])] * 2
    if images.size == 0 or len(shape) != 2 or len(images) * math.prod(shape) != images.size:
        raise ValueError(
            f"{where}: expected images of shape [N, height, width], or [N, D] with D a square "
            f"number, none of them 0, found shape {list(images.shape)}"
        )
    _check_values(images, where)
    pixels = torch.from_numpy(images.reshape(len(images), -1).astype(np.uint8))
    if labels is None:
        return _Part(pixels, None, (shape[0], shape[1]))
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        found = f"shape {list(labels.shape)} and dtype {labels.dtype}"
        raise ValueError(
            f"{where}: expected labels of shape [N] and an integer type, found {found}"
        )
    if len(labels) != len(images):
        raise ValueError(f"{where}: {len(images)} images but {len(labels)} labels")
    return _Part(pixels, torch.from_numpy(labels.astype(np.int64)), (shape[0], shape[1]))


def _check_values(images: np.ndarray, where: str) -> None:
    """Raise ValueError for other than whole numbers from 0 to 255, of any type of real numbers."""
    if images.dtype.kind not in "biuf":
        raise ValueError(f"{where}: expected images of numbers, found dtype {images.dtype}")
    bad = ~np.isfinite(images)
    if bad.any():
        rows = np.unique(np.nonzero(bad)[0])
        found = f"in {len(rows)} images, the first of them image {rows[0]}"
        raise ValueError(f"{where}: {bad.sum()} values are NaN or infinite, {found}")
    low, high = images.min(), images.max()
    if images.dtype.kind == "f" and not np.array_equal(images, np.round(images)):
        raise ValueError(
            f"{where}: expected whole numbers from 0 to 255, found fractions between {low:.4g} and "
            f"{high:.4g}; store intensities in [0, 1] as np.round(255 * x).astype(np.uint8)"
        )
    if low < 0 or high > 255:
        found = f"values from {low} to {high}"
        raise ValueError(f"{where}: expected intensities from 0 to 255, found {found}")
