"""How far a run is, and where a cancelled one stops."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from FreqSegLib.errors import Cancelled


@dataclass(frozen=True)
class Progress:
    """Where a run stands: ``stage`` in words, ``done`` of ``total`` slices, seconds left (None: unknown)."""

    stage: str
    done: int
    total: int
    seconds_left: float | None


ProgressCallback = Callable[[Progress], None]
CancelCallback = Callable[[], bool]


class Stage:
    """Progress of one stage, and the place where a cancelled run stops."""

    def __init__(self, name: str, total: int, progress: ProgressCallback | None, cancel: CancelCallback | None) -> None:
        self.name, self.total, self.progress, self.cancel = name, total, progress, cancel
        self.started = time.monotonic()
        if total:
            self.advance(0)

    def advance(self, done: int) -> None:
        if self.cancel is not None and self.cancel():
            raise Cancelled("The run was cancelled; nothing was written.")
        if self.progress is not None:
            elapsed = time.monotonic() - self.started
            left = elapsed / done * (self.total - done) if done else None
            self.progress(Progress(self.name, done, self.total, left))
