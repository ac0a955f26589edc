"""Checkpoints on disk: written whole or not at all, read without running code."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["load", "save"]

_VERSION = 1


def save(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a checkpoint whole or not at all: a temporary file beside it, then a rename."""
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"pyro_vae_checkpoint": _VERSION, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint; no code in the file is run.

    Raises:
        ValueError: for a file that is not a checkpoint of :func:`save`.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{os.fspath(path)} is not a checkpoint of pyro_vae.fit") from error
    if not isinstance(content, dict) or content.get("pyro_vae_checkpoint") != _VERSION:
        raise ValueError(f"{os.fspath(path)} is not a checkpoint of pyro_vae.fit")
    return content
