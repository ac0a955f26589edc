"""Tables in memory-mapped files: larger than memory, and there after the process has ended."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.programs.messages import as_path

_NUMPY: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}
_PART = 2**24  # numbers that are written at a time


def open_table(path: str | os.PathLike[str], start: Tensor, num_data: int) -> Tensor:
    """Return a table [num_data, ...] whose numbers are those of a file, read and written in place.

    The file is an array of NumPy (``numpy.load(path, mmap_mode="r")`` reads it). One that is there
    is taken as it is; else it is made, with the same row throughout.

    Args:
        path: of the file.
        start: a row, [...]; of the dtype of the table.
        num_data: rows.

    Raises:
        FileNotFoundError: for a folder that is not there.
        ValueError: for a file that holds something else, and a dtype that NumPy lacks.
    """
    path, shape = as_path("storage", path).absolute(), (num_data, *start.shape)
    if start.dtype not in _NUMPY:
        raise ValueError(f"storage: a table on disk is of float32 or float64, not {start.dtype}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"storage={os.fspath(path)!r}: its folder does not exist")
    if path.is_dir():
        raise ValueError(f"storage={os.fspath(path)!r} is a folder; name a file in it")
    if not path.exists():
        _make(path, start, shape)
    dtype, offset = _look(path, shape, _NUMPY[start.dtype])
    return _mapped(path, offset, shape, dtype)


def _make(path: Path, start: Tensor, shape: tuple[int, ...]) -> None:
    """Write a file in which each row is ``start``: under its name once it is whole."""
    row = start.detach().cpu()
    rows = max(1, _PART // max(1, row.numel()))
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        array = np.lib.format.open_memmap(name, mode="w+", dtype=_NUMPY[row.dtype], shape=shape)
        _reserve(Path(name))
        for first in range(0, shape[0], rows):
            array[first : first + rows] = row.numpy()
        array.flush()
        del array
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _reserve(path: Path) -> None:
    """Take the space of a file on the disk: where it is full, a write to memory ends the process.

    Raises:
        OSError: where there is not as much.
    """
    if hasattr(os, "posix_fallocate") and (size := path.stat().st_size):
        handle = os.open(path, os.O_RDWR)
        try:
            os.posix_fallocate(handle, 0, size)
        finally:
            os.close(handle)


def _look(path: Path, shape: tuple[int, ...], wanted: np.dtype[Any]) -> tuple[torch.dtype, int]:
    """Return dtype and first byte of a file's numbers; raise ValueError where it is another's."""
    name = f"storage={os.fspath(path)!r}"
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:  # which may advise to unpickle the file
        what = "is no array of NumPy, or cut off"
        raise ValueError(f"{name} {what}. Give the name of a new file") from error
    if not isinstance(found, np.memmap) or (found.shape, found.dtype) != (shape, wanted):
        kind = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else "no array"
        raise ValueError(
            f"{name} holds {kind}, and the table of this guide is {wanted} {list(shape)}: it is "
            "another guide's. Give the name of a new file"
        )
    if found.ndim > 1 and not found.flags.c_contiguous:
        raise ValueError(f"{name} holds its numbers column by column; write it row by row")
    dtype = next(ours for ours, theirs in _NUMPY.items() if theirs == wanted)
    return dtype, int(found.offset)


def _mapped(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the numbers of a file from a byte on, shared with it."""
    size = math.prod(shape) * dtype.itemsize
    everything = torch.from_file(
        os.fspath(path), shared=True, size=offset + size, dtype=torch.uint8
    )
    return everything[offset:].view(dtype).view(shape)


def file_of(tensor: Tensor) -> Path | None:
    """Return the file that a tensor's numbers lie in; None where they lie in memory."""
    name = tensor.untyped_storage().filename
    return None if name is None else Path(name)


def empty_beside(table: Tensor) -> Tensor:
    """Return an empty tensor like a table in a file, in a file of its own without a name.

    Its space on the disk is free once nothing holds the tensor.
    """
    path = file_of(table)
    if path is None:
        return torch.empty_like(table, requires_grad=False)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        os.truncate(handle, table.numel() * table.element_size())
        _reserve(Path(name))
        return _mapped(Path(name), 0, tuple(table.shape), table.dtype)
    finally:
        os.close(handle)
        Path(name).unlink()


def copy_of(tensor: Tensor) -> Tensor:
    """Return a copy, on disk where the tensor is there."""
    source = tensor.detach()
    return source.clone() if file_of(source) is None else empty_beside(source).copy_(source)


def full_like(table: Tensor, value: float) -> Tensor:
    """Return a tensor like a table, of one number, on disk where the table is there."""
    return empty_beside(table.detach()).fill_(value)


def write_out(table: Tensor) -> None:
    """Wait until the numbers of a table in a file are on the disk itself."""
    if (path := file_of(table)) is not None:
        handle = os.open(path, os.O_RDWR)
        try:
            os.fsync(handle)  # of the file's pages, those too that were written as memory
        finally:
            os.close(handle)
