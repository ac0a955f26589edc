"""Checkpoints on disk: written whole or not at all, read without running code."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["load", "random_state", "save", "set_random_state"]

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
    except OSError:
        raise
    except Exception as error:  # of whatever kind: torch.load meets bytes that are not its own
        raise ValueError(f"{os.fspath(path)} is not a checkpoint of pyro_vae.fit") from error
    if not isinstance(content, dict) or content.get("pyro_vae_checkpoint") != _VERSION:
        raise ValueError(f"{os.fspath(path)} is not a checkpoint of pyro_vae.fit")
    return content


def random_state() -> dict[str, Any]:
    """Return the state of torch's random number generators, of all devices in use."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what :func:`random_state` returned; on a machine without CUDA, the CPU's."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
