"""Files that are written whole or not at all, carry a checksum, and run no code when read."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import numpy as np
import torch

_SEAL = b"\npyro_vae sha256 %s\n"
_SEAL_SIZE = len(_SEAL % bytes(64))
_SEAL_PATTERN = re.compile(rb"\npyro_vae sha256 ([0-9a-f]{64})\n")
_CHUNK = 2**20  # bytes
_KINDS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def write(
    content: Mapping[str, Any],
    path: str | os.PathLike[str],
    before: Callable[[], None] | None = None,
) -> None:
    """Write numbers, tensors and text in mappings and lists, whole or not at all.

    To a temporary file beside the target, which is on the disk before it takes the target's name.
    ``torch.load(path, weights_only=True)`` reads it too.

    Args:
        content: to write.
        path: of the target.
        before: called when the new file is on the disk, before it takes the name.

    Raises:
        TypeError: for what cannot be read without running code, saying where it is.
        OSError: where the disk is full, say; the file that was there stays.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{os.fspath(path)}: its folder does not exist")
    plain = _plain(content, target.name)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            hashed: Any = _Hashed(file)
            try:
                torch.save(plain, hashed)
            except RuntimeError as error:  # PyTorch's, where a write has failed in its midst
                raise hashed.failure or error from error
            file.write(_SEAL % hashed.digest())
            file.flush()
            os.fsync(file.fileno())
        if before is not None:
            before()
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def read(
    path: str | os.PathLike[str],
    versions: Mapping[str, int],
    what: str,
    unsealed: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, Any]:
    """Read a file of :func:`write`; no code in it is run.

    Args:
        path: of the file.
        versions: the kinds of files that are read: the key of a kind's format in its content, and
            the highest format that is known.
        what: the file is, for messages.
        unsealed: the highest format of a kind that has no checksum, of those that have one such.

    Raises:
        ValueError: for a file that is damaged, cut off, of another kind or a newer version.
        OSError: where there is none.
    """
    path = os.fspath(path)
    with open(path, "rb") as file:
        sealed = _check_seal(file, path)
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of whatever kind: torch.load meets bytes that are not its own
            if sealed and isinstance(error, MemoryError):
                raise
            raise ValueError(f"{path} is not {what}, or is cut off") from error
    kinds = [key for key in versions if key in content] if isinstance(content, dict) else []
    key, *others = kinds or [""]
    found = content[key] if kinds and not others else None
    if type(found) is not int or found < 1:
        raise ValueError(f"{path} is not {what}")
    if found > versions[key]:
        raise ValueError(
            f"{path} was written by a newer version of pyro_vae (format {found}, and this one "
            f"reads up to {versions[key]}): update pyro_vae"
        )
    if found > unsealed.get(key, 0) and not sealed:
        raise ValueError(f"{path} is cut off: its last bytes, the checksum, are missing")
    return content


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove temporary files that a process which was killed left beside a target."""
    target = Path(os.path.realpath(path))
    for left in target.parent.glob(f".{_literal(target.name)}.*.tmp"):
        left.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have names in a folder on the disk, where the system can (not on Windows)."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class _Hashed:
    """A file that is written to, the hash of what was, and the first write that failed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash = file, hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, part: bytes) -> int:
        self._hash.update(part)
        try:
            return self._file.write(part)
        except OSError as error:
            self.failure = self.failure or error
            raise

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> bytes:
        return self._hash.hexdigest().encode()


def _check_seal(file: IO[bytes], path: str) -> bool:
    """Return whether a file has a checksum, and stand at its begin; raise where it is wrong."""
    size = file.seek(0, os.SEEK_END)
    body = max(size - _SEAL_SIZE, 0)
    file.seek(body)
    seal = _SEAL_PATTERN.fullmatch(file.read())
    file.seek(0)
    if seal is None:
        return False
    found = hashlib.sha256()
    while body > 0 and (part := file.read(min(body, _CHUNK))):
        found.update(part)
        body -= len(part)
    file.seek(0)
    if found.hexdigest().encode() != seal[1]:
        raise ValueError(f"{path} is damaged: it is not what was written, by its checksum")
    return True


def _plain(value: Any, where: str) -> Any:
    """Return content as it can be read without running code: NumPy's numbers as Python's.

    Raises:
        TypeError: where it cannot, saying where it is.
    """
    if isinstance(value, torch.Tensor):
        value, whole = value.detach(), value.numel() * value.element_size()
        # Of a view, all that it looks into would be written.
        is_view = value.layout is torch.strided and value.untyped_storage().nbytes() > whole
        return value.clone() if is_view else value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.ascontiguousarray(value))
    if type(value) in _KINDS:
        return value
    if isinstance(value, Mapping):
        made = {_plain(k, where): _plain(v, f"{where}[{k!r}]") for k, v in value.items()}
        kind: Any = type(value)
        return kind(made) if kind in (Counter, OrderedDict) else made
    if isinstance(value, (list, tuple, set)):
        parts = [_plain(part, f"{where}[{i}]") for i, part in enumerate(value)]
        return (
            parts if isinstance(value, list) else (set if isinstance(value, set) else tuple)(parts)
        )
    raise TypeError(
        f"{where} is of type {type(value).__name__}, which no file could hold and be read without "
        "running code; numbers, text, tensors, and mappings and lists of them can be saved"
    )


def _literal(name: str) -> str:
    """Return a name as a pattern that matches it alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)
