"""SIGINT and SIGTERM ask a run to stop after the current step; a second one stops it at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Context manager; ``signum`` is None until a signal came.

    Outside the main thread Python allows no handlers: there it never asks to stop.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._owner = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in _SIGNALS:
                self._previous[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked data worker: Ctrl-C reaches it too, the parent decides
            return
        if self.signum is not None:
            os.write(2, b"\nsecond signal: leaving at once, nothing further is saved\n")
            os._exit(128 + signum)
        self.signum = signum
        name = signal.Signals(signum).name
        # os.write, because a handler may interrupt the very stream it would print to.
        os.write(2, f"\n{name}: finishing this step and saving; once more to leave at once\n".encode())
