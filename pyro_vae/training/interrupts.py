"""Ctrl-C between steps: what a step leaves behind is then whole, and can be saved."""

from __future__ import annotations

import signal
import threading
from typing import Any


class HeldInterrupt:
    """A context that holds back a first Ctrl-C until it ends, and lets a second one through.

    Nothing is held back outside of the main thread, or where Ctrl-C has a handler of the user's.

    Attributes:
        pending: whether there was one.
    """

    def __init__(self) -> None:
        self.pending = False
        self._held = False

    def __enter__(self) -> HeldInterrupt:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._hold)
            self._held = True
        return self

    def _hold(self, number: int, frame: Any) -> None:
        if self.pending:
            signal.default_int_handler(number, frame)
        self.pending = True

    def __exit__(self, kind: object, *raised: object) -> None:
        if self._held:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.pending and kind is None:
            raise KeyboardInterrupt
