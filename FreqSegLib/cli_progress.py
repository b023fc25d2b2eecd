"""Progress on the console: a bar for every stage on a terminal, a few plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

SECONDS_BETWEEN_LINES = 10.0

Show = Callable[[str, int, int, "float | None"], None]
"""Given the stage in words, how many of how many are done (0 of 0: unknown), and the seconds left (None: unknown)."""


@contextmanager
def progress_on(console: Console, *, quiet: bool = False, unit: str = "") -> Iterator[Show]:
    """A display of stages that follow each other; it ends with the block.

    Args:
        console: where to.
        quiet: show nothing.
        unit: what is counted, where the stages do not say so.
    """
    if quiet:
        yield lambda stage, done, total, seconds_left: None
    elif console.is_terminal:
        with _bars(console) as progress:
            bars = _Bars(progress, unit)
            yield bars
            bars.finish()
    else:
        yield _Lines(console, unit)


@contextmanager
def download_on(console: Console, name: str) -> Iterator[Callable[[int, int | None], None]]:
    """A display of one download, told the bytes that are here and the bytes in all (None: unknown)."""
    if not console.is_terminal:
        yield _DownloadLines(console, name)
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30, complete_style="cyan", finished_style="green"),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console) as progress:
        task: TaskID | None = None

        def show(done: int, total: int | None) -> None:
            nonlocal task
            if task is None:
                # What an earlier run received must not count as this one's speed.
                task = progress.add_task(name, total=total, completed=done)
            progress.update(task, completed=done, total=total)

        yield show


def readable_time(seconds: float) -> str:
    """``8 s``, ``1 min 20 s``, ``2 h 5 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _bars(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    plain = not (console.encoding or "").lower().startswith("utf")
    return Progress(
        SpinnerColumn("line" if plain else "dots", finished_text="+" if plain else "[green]✓[/green]"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30, complete_style="cyan", finished_style="green"),
        TextColumn("{task.fields[counted]}", style="bold"),
        TextColumn("{task.fields[clock]}", style="dim"),
        console=console,
    )


class _Bars:
    def __init__(self, progress: Progress, unit: str) -> None:
        self._progress, self._unit = progress, unit
        self._stage: str | None = None
        self._task: TaskID | None = None
        self._started = 0.0
        self._total = 0

    def __call__(self, stage: str, done: int, total: int, seconds_left: float | None) -> None:
        new = stage != self._stage or self._task is None
        if new:
            self.finish()
            self._stage, self._started = stage, time.monotonic()
            self._task = self._progress.add_task(stage, total=total or None, counted="", clock="")
        self._total = total
        finished = total > 0 and done >= total
        if finished:
            clock = readable_time(time.monotonic() - self._started)
        else:
            clock = "" if seconds_left is None else f"{readable_time(seconds_left)} left"
        counted = f"{done} of {total} {self._unit}".rstrip() if total else ""
        assert self._task is not None
        self._progress.update(
            self._task, completed=done, total=total or None, counted=counted, clock=clock, refresh=new
        )

    def finish(self) -> None:
        """Show the stage as done: it may have had nothing to count, or less to do than it thought."""
        if self._task is not None:
            clock = readable_time(time.monotonic() - self._started)
            total = self._total or 1
            self._progress.update(self._task, completed=total, total=total, clock=clock)


class _Lines:
    def __init__(self, console: Console, unit: str) -> None:
        self._console, self._unit = console, unit
        self._stage: str | None = None
        self._last = 0.0

    def __call__(self, stage: str, done: int, total: int, seconds_left: float | None) -> None:
        now = time.monotonic()
        if stage == self._stage and now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._stage, self._last = stage, now
        number = f"{done} of {total} {self._unit}".rstrip()
        counted = f" ({number}{_about(seconds_left, done, total)})" if total else ""
        self._console.print(f"{stage}{counted}", markup=False, soft_wrap=True)


def _about(seconds_left: float | None, done: int, total: int) -> str:
    return f", about {readable_time(seconds_left)} left" if seconds_left is not None and done < total else ""


class _DownloadLines:
    def __init__(self, console: Console, name: str) -> None:
        self._console, self._name = console, name
        self._last = -SECONDS_BETWEEN_LINES

    def __call__(self, done: int, total: int | None) -> None:
        from FreqSegLib.download import readable_size

        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_LINES and done != total:
            return
        self._last = now
        whole = f" of {readable_size(total)}" if total else ""
        self._console.print(f"{self._name}: {readable_size(done)}{whole}", markup=False, soft_wrap=True)
