"""The checkpoints of a run: the last ones on disk, when the next is due, which one is good."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from pyro_vae.programs.messages import as_count, as_path
from pyro_vae.programs.processes import Processes
from pyro_vae.training import sealed

logger = logging.getLogger(__name__)

KEY, VERSION = "pyro_vae_checkpoint", 2
# Of the first format, which has no checksum.
UNSEALED = 1
_WHAT = "a checkpoint of pyro_vae.fit"

Every: TypeAlias = int | timedelta | None  # steps, or time; None for each epoch


def save(
    content: Mapping[str, Any],
    path: str | os.PathLike[str],
    before: Callable[[], None] | None = None,
) -> None:
    """Write a checkpoint whole or not at all; see :func:`sealed.write`.

    Raises:
        TypeError: for content that cannot be read without running code.
        OSError: where it cannot be written; the file that was there stays.
    """
    sealed.write({KEY: VERSION, **content}, path, before)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint; no code in the file is run.

    Raises:
        ValueError: for a file that is not a checkpoint of :func:`save`, is damaged or newer.
        OSError: where there is none.
    """
    return sealed.read(path, {KEY: VERSION}, _WHAT, {KEY: UNSEALED})


class Checkpoints:
    """The checkpoints of a run: a file, and those before it as ``file.prev1``, ``file.prev2``, ...

    Args:
        path: of the last one.
        every: steps, or time, between two; None to write one after each epoch.
        keep: how many are kept.
        processes: that train together, of which the first one reads and writes.

    Raises:
        FileNotFoundError: for a folder that does not exist.
        ValueError: for a path that is a folder, and for other intervals and numbers.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        every: Every,
        keep: int,
        processes: Processes | None = None,
    ) -> None:
        self.path, self._processes = as_path("checkpoint", path), processes or Processes()
        self._processes.by_first(self._check)
        self._every, self._keep = _as_interval(every), as_count("checkpoint_keep", keep)
        self._written = 0  # by this run
        self._step, self._time = 0, time.monotonic()  # of the last one
        self._last: int | None = None  # steps of the one that stays when another fails

    def _check(self) -> None:
        """Raise an error for a path that no file can be written to."""
        if not self.path.absolute().parent.is_dir():
            text = f"checkpoint={os.fspath(self.path)!r}: its folder does not exist"
            raise FileNotFoundError(text)
        if self.path.is_dir():
            raise ValueError(f"checkpoint={os.fspath(self.path)!r} is a folder; name a file in it")

    def due(self, step: int, *, whole: bool) -> bool:
        """Return whether it is time to write.

        Args:
            step: steps so far.
            whole: whether an epoch is at its end.
        """
        if self._every is None:
            return whole
        if isinstance(self._every, timedelta):
            passed, wanted = time.monotonic() - self._time, self._every.total_seconds()
            return self._processes.by_first(lambda: passed >= wanted)
        return step - self._step >= self._every

    def write(self, content: Mapping[str, Any], step: int) -> None:
        """Write one; a failure is told, and leaves those before it.

        Args:
            content: of the checkpoint.
            step: steps so far.

        Raises:
            OSError: where the first one of a run cannot be written.
        """
        self._step, self._time = step, time.monotonic()
        try:
            self._processes.by_first(lambda: save(content, self.path, self._shift))
        except OSError as error:
            if not self._written:
                error.add_note(
                    f"checkpoint={os.fspath(self.path)!r} cannot be written. Model and guide keep "
                    f"the parameters of step {step}"
                )
                raise
            text = (
                "%s cannot be written after step %d (%s); the checkpoint of step %s stays, and "
                "training goes on"
            )
            logger.warning(text, self.path, step, error, self._last)
            return
        self._written += 1
        self._last = step

    def _file(self, number: int) -> Path:
        """Return the path of the checkpoint of so many before the last one."""
        return self.path if number == 0 else self.path.with_name(f"{self.path.name}.prev{number}")

    def _shift(self) -> None:
        """Give each checkpoint its next name, the last one a second name: none is ever missing."""
        if self._keep < 2 or not self.path.exists():
            return
        link = self.path.with_name(f".{self.path.name}.link.tmp")
        link.unlink(missing_ok=True)
        try:
            os.link(self.path, link)
        except OSError:  # a file system without hard links
            shutil.copyfile(self.path, link)
        for number in range(self._keep - 2, 0, -1):
            if self._file(number).exists():
                os.replace(self._file(number), self._file(number + 1))
        os.replace(link, self._file(1))

    def resume(self, take_up: Callable[[Mapping[str, Any]], None]) -> Path | None:
        """Take up the last checkpoint that is good; a logged warning names those that are not.

        Args:
            take_up: goes on from a content; raises ValueError where it is of another run.

        Returns:
            Its path; None where there is none.

        Raises:
            ValueError: where all that there are are refused: what is wrong with the last one.
        """
        files = self._processes.by_first(self._files)
        refused: list[ValueError] = []
        for file in files:
            try:
                content = self._processes.by_first(partial(load, file))
                try:
                    take_up(content)
                except ValueError as error:
                    raise ValueError(f"{file}: {error}") from error
            except ValueError as error:
                refused.append(error)
                continue
            if file != self.path:
                self._processes.by_first(partial(self._set_aside, file, refused))
            self._step = content["progress"]["step"]
            return file
        for other in refused[1:]:
            refused[0].add_note(f"nor can one before it serve: {other}")
        if refused:
            raise refused[0]
        return None

    def _files(self) -> list[Path]:
        """Return the checkpoints that there are, the last one first."""
        sealed.remove_leftovers(self.path)
        return [file for i in range(self._keep) if (file := self._file(i)).exists()]

    def _set_aside(self, file: Path, refused: list[ValueError]) -> None:
        """Tell why a checkpoint before the last one is taken, and keep the last one from its place.

        Written over the good one, that is, when the next ones are shifted.
        """
        why: object = f"{self.path} is missing"
        if self.path.exists():
            aside = self.path.with_name(f"{self.path.name}.refused")
            os.replace(self.path, aside)
            why = f"{refused[0]} (it is now {aside.name})"
        logger.warning("%s. Training goes on from %s, written before it", why, file)


def _as_interval(every: Any) -> Every:
    """Return steps or a time between checkpoints; raise ValueError for anything else."""
    if isinstance(every, timedelta) and every > timedelta(0):
        return every
    if every is None:
        return None
    with contextlib.suppress(ValueError):
        return as_count("checkpoint_every", every)
    what = "steps, a whole number of at least 1, or a datetime.timedelta(minutes=10), is needed"
    raise ValueError(f"checkpoint_every={every!r}: {what}")
