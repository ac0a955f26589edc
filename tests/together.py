"""Functions that several processes run together, forked from the one that tests."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def together(function: Callable[[int], Any], folder: Path, size: int = 2) -> list[Any]:
    """Return what a function of the rank returns in each of some processes of one group.

    An exception that it raises is returned as a text, with the name of its type.
    """
    folder = Path(tempfile.mkdtemp(dir=folder))  # a group has a file of its own
    context = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # that threads do not go with a fork: there are none at work
        workers = [
            context.Process(target=_run, args=(function, folder, rank, size))
            for rank in range(size)
        ]
        for worker in workers:
            worker.start()
    for worker in workers:
        worker.join(900)
        if worker.is_alive():
            worker.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _run(function: Callable[[int], Any], folder: Path, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=size)
    try:
        found = function(rank)
    except Exception as error:  # noqa: BLE001 - told to the test
        found = f"{type(error).__name__}: {error}"
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
    torch.save(found, folder / f"{rank}.pt")
    os._exit(0)  # leave what the parent would do at its exit to it
