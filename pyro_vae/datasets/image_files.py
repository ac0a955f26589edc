"""Arrays of images and labels from local files: .npz, .npy and MNIST's idx format.

Reading only: images.py checks that the arrays are images.
"""

from __future__ import annotations

import gzip
import itertools
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_GZIP_MAGIC = b"\x1f\x8b"
_IDX_IMAGES = 0x00000803
_IDX_LABELS = 0x00000801


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
        wanted = "an .npz, .npy or idx file, or a directory with MNIST's four idx files"
        raise FileNotFoundError(f"no file or directory at {path} (expected {wanted})")
    if path.is_dir():
        return _read_idx_directory(path)
    if path.suffix in (".npz", ".npy"):
        return _read_numpy(path)
    if path.suffix == ".gz" or "idx" in path.name or path.name.endswith("ubyte"):
        return _read_idx_pair(path)
    raise ValueError(
        f"cannot tell the format of {path} by its name: expected .npz, .npy, or an idx file such "
        "as train-images-idx3-ubyte or train-images-idx3-ubyte.gz"
    )


def _read_numpy(path: Path) -> Arrays:
    """Return the images of an .npy file, or images and labels of an .npz file by their names."""
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            arrays = loaded if isinstance(loaded, np.ndarray) else dict(loaded.items())
    except Exception as error:  # of whatever kind: np.load meets bytes that are not its own
        wanted = f"an {path.suffix} file of plain numeric arrays"
        raise ValueError(f"{path}: expected {wanted}, could not read it ({error})") from error
    if isinstance(arrays, np.ndarray):
        if path.suffix == ".npz":
            raise ValueError(f"{path}: expected an archive, found one array; is it an .npy file?")
        return Arrays(arrays)
    if path.suffix == ".npy":
        raise ValueError(f"{path}: expected one array, found an archive; is it an .npz file?")
    if broken := [name for name, value in arrays.items() if not isinstance(value, np.ndarray)]:
        raise ValueError(f"{path}: {broken[0]} in it is no array, or its header is damaged")
    if "x_train" in arrays:
        others = (arrays.get(name) for name in ("y_train", "x_test", "y_test"))
        return Arrays(arrays["x_train"], *others)
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
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: the gzip data are damaged or cut short ({error})") from error
    what, num_dims = ("labels", 1) if magic == _IDX_LABELS else ("images", 3)
    found = int.from_bytes(content[:4], "big")
    if len(content) >= 4 and found != magic:
        numbers = f"the magic number 0x{magic:08x}, found 0x{found:08x}"
        raise ValueError(f"{path}: expected an idx file of {what}, which begins with {numbers}")
    header, size = 4 * (1 + num_dims), len(content)
    if size < header:
        wanted = f"an idx header of {header} bytes"
        raise ValueError(f"{path}: cut short, expected {wanted}, found {size} bytes in all")
    sizes = np.frombuffer(content[4:header], dtype=">u4").tolist()
    expected = header + math.prod(sizes)
    if size != expected:
        problem = "cut short" if size < expected else "too long"
        promised = f"{what} of shape {sizes}, {expected} bytes in all"
        raise ValueError(f"{path}: {problem}, the header promises {promised}, found {size} bytes")
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
    kinds = {"images-idx3-ubyte": _IDX_IMAGES, "labels-idx1-ubyte": _IDX_LABELS}
    found, missing = [], []
    for part, (kind, magic) in itertools.product(("train", "t10k"), kinds.items()):
        name = f"{part}-{kind}"
        dotted = name.replace("-idx", ".idx")  # as some copies write it
        candidates = (directory / each for each in (name, f"{name}.gz", dotted, f"{dotted}.gz"))
        path = next(filter(Path.is_file, candidates), None)
        if path is None:
            missing.append(name)
        else:
            found.append((path, magic))
    if missing:
        there = sorted(entry.name for entry in directory.iterdir())
        listed = ", ".join(there[:10]) + (", ..." if len(there) > 10 else "")
        raise FileNotFoundError(
            f"{directory}: expected MNIST's four idx files, each with or without .gz; missing "
            f"{', '.join(missing)}; found {listed or 'an empty directory'}"
        )
    return Arrays(*itertools.starmap(_read_idx, found))
