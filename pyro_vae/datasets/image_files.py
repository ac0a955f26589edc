"""Arrays of images and labels from local files: .npz, .npy and MNIST's idx format.

Reading only: images.py checks that the arrays are images.
"""

from __future__ import annotations

import gzip
import io
import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["Arrays", "read"]

_GZIP_MAGIC = b"\x1f\x8b"
_IDX_IMAGES = 0x00000803
_IDX_LABELS = 0x00000801

# What np.load raises on a file that is cut short, is something else, or holds pickled objects.
_UNREADABLE = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, slots=True)
class Arrays:
    """Arrays as they stand in the file; `test` is None where the file has no test part."""

    train: np.ndarray
    train_labels: np.ndarray | None = None
    test: np.ndarray | None = None
    test_labels: np.ndarray | None = None


def read(path: Path) -> Arrays:
    """Read a file, or a directory with MNIST's four idx files.

    Raises:
        FileNotFoundError: There is nothing at `path`, or a directory lacks one of the four files.
        ValueError: The file is not what its name says, is cut short or lacks a key.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"no file or directory at {path} (expected an .npz, .npy or idx file, "
            f"or a directory with MNIST's four idx files)"
        )
    if path.is_dir():
        return _read_idx_directory(path)
    if path.suffix == ".npz":
        archive = _load(path, "an .npz archive of plain numeric arrays")
        if isinstance(archive, np.ndarray):
            raise ValueError(f"{path}: expected an archive, found one array; is it an .npy file?")
        return _from_npz(archive, path)
    if path.suffix == ".npy":
        array = _load(path, "an .npy file with a plain numeric array")
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{path}: expected one array, found an archive; is it an .npz file?")
        return Arrays(array)
    if path.suffix == ".gz" or "idx" in path.name or path.name.endswith("ubyte"):
        return _read_idx_pair(path)
    raise ValueError(
        f"cannot tell the format of {path} by its name: expected .npz, .npy, or an idx file "
        f"such as train-images-idx3-ubyte or train-images-idx3-ubyte.gz"
    )


def _load(path: Path, wanted: str) -> np.ndarray | dict[str, np.ndarray]:
    """Return what NumPy reads from a file: one array, or an archive of them."""
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            return loaded if isinstance(loaded, np.ndarray) else dict(loaded.items())
    except _UNREADABLE as error:
        raise ValueError(f"{path}: expected {wanted}, could not read it ({error})") from error


def _from_npz(arrays: Mapping[str, np.ndarray], path: Path) -> Arrays:
    """Return the images and labels of an archive, by the names of its arrays."""
    if "x_train" in arrays:
        return Arrays(
            train=arrays["x_train"],
            train_labels=arrays.get("y_train"),
            test=arrays.get("x_test"),
            test_labels=arrays.get("y_test"),
        )
    if "x" in arrays:
        return Arrays(arrays["x"], arrays.get("y"))
    raise ValueError(
        f"{path}: expected the keys x_train and x_test (labels y_train and y_test), or x "
        f"(labels y), found {sorted(arrays) if arrays else 'no key'}"
    )


# The idx format of MNIST (LeCun, Cortes and Burges, 1998): a big-endian header (the magic number,
# then one size per dimension), then unsigned bytes.


def _read_idx(path: Path, magic: int) -> np.ndarray:
    """Return the array of an idx file with this magic number, gzipped or not."""
    content = path.read_bytes()
    if content.startswith(_GZIP_MAGIC):
        try:
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read()
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: the gzip data are damaged or cut short ({error})") from error
    what, num_dims = ("labels", 1) if magic == _IDX_LABELS else ("images", 3)
    found = int.from_bytes(content[:4], "big")
    if len(content) >= 4 and found != magic:
        raise ValueError(
            f"{path}: expected an idx file of {what}, which begins with the magic number "
            f"0x{magic:08x}, found 0x{found:08x}"
        )
    header = 4 * (1 + num_dims)
    if len(content) < header:
        raise ValueError(
            f"{path}: cut short, expected an idx header of {header} bytes, "
            f"found {len(content)} bytes in all"
        )
    sizes = [int(size) for size in np.frombuffer(content[4:header], dtype=">u4")]
    expected = header + math.prod(sizes)
    if len(content) != expected:
        problem = "cut short" if len(content) < expected else "too long"
        raise ValueError(
            f"{path}: {problem}, the header promises {what} of shape {sizes}, {expected} bytes "
            f"in all, found {len(content)} bytes"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(sizes)


def _read_idx_pair(path: Path) -> Arrays:
    """Return the images of a file, with the labels in the file beside it if it is there."""
    images = _read_idx(path, _IDX_IMAGES)
    stem = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    for name in (stem, f"{stem}.gz"):
        beside = path.with_name(name)
        if beside != path and beside.is_file():
            return Arrays(images, _read_idx(beside, _IDX_LABELS))
    return Arrays(images)


def _read_idx_directory(directory: Path) -> Arrays:
    """Return the images and labels of MNIST's four files."""
    names = (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )
    paths = {name: _standard_file(directory, name) for name in names}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        there = sorted(entry.name for entry in directory.iterdir())
        listed = ", ".join(there[:10]) + (", ..." if len(there) > 10 else "")
        raise FileNotFoundError(
            f"{directory}: expected MNIST's four idx files, each with or without .gz; missing "
            f"{', '.join(missing)}; found {listed or 'an empty directory'}"
        )
    return Arrays(
        *(
            _read_idx(path, _IDX_IMAGES if "images" in name else _IDX_LABELS)
            for name, path in paths.items()
            if path is not None
        )
    )


def _standard_file(directory: Path, name: str) -> Path | None:
    """Return the file of a standard name, gzipped or not; some copies write a dot for the dash."""
    dotted = name.replace("-idx", ".idx")
    for candidate in (name, f"{name}.gz", dotted, f"{dotted}.gz"):
        if (directory / candidate).is_file():
            return directory / candidate
    return None
