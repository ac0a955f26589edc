"""Files of images for the tests: grey pixels, idx files with and without gzip."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import torch

RNG_SEED = 20


def grey(num_images: int, height: int = 3, width: int = 4) -> np.ndarray:
    """Images with every intensity from 0 to 255 in reach; one pixel is 255 for sure."""
    images = np.random.default_rng(RNG_SEED + num_images).integers(
        0, 256, size=(num_images, height, width), dtype=np.uint8
    )
    images[0, 0, 0] = 255
    return images


def idx_bytes(array: np.ndarray, magic: int) -> bytes:
    return struct.pack(f">I{array.ndim}I", magic, *array.shape) + array.tobytes()


def write_images(path: Path, images: np.ndarray, magic: int = 0x803) -> Path:
    content = idx_bytes(images, magic)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_labels(path: Path, labels: np.ndarray) -> Path:
    return write_images(path, labels.astype(np.uint8), magic=0x801)


def write_mnist(directory: Path, suffix: str = "") -> tuple[np.ndarray, np.ndarray]:
    train, test = grey(7), grey(5)
    write_images(directory / f"train-images-idx3-ubyte{suffix}", train)
    write_images(directory / f"t10k-images-idx3-ubyte{suffix}", test)
    write_labels(directory / f"train-labels-idx1-ubyte{suffix}", np.arange(7))
    write_labels(directory / f"t10k-labels-idx1-ubyte{suffix}", np.arange(5))
    return train, test


def rows(images: torch.Tensor) -> list[tuple[int, ...]]:
    return sorted(tuple(row) for row in images.tolist())
