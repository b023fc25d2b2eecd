"""Work that never holds the window: generators that stop for the worker's answers and for the user interface.

A task is a generator. It yields an :class:`Ask` to wait for the worker (and is given the answer's values), or None
where it may be interrupted so that the window stays alive. :class:`TaskRunner` is ticked by a timer, or by
:meth:`TaskRunner.finish` in a script.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from slicer.i18n import tr as _

from .trouble import Trouble

TICK_BUDGET = 0.015
"""Seconds of the window's time a tick may take."""

Work = Generator["Ask | None", Any, Any]


class Client(Protocol):
    """What is needed of ``FreqSegLib.worker_client.WorkerClient``."""

    running: bool

    def send(self, request: str, **values: Any) -> str: ...
    def poll(self) -> list[Any]: ...
    def cancel(self, request_id: str) -> None: ...
    def export(self, array: Any) -> Any: ...
    def read(self, described: dict) -> Any: ...
    def release(self, request_id: str) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Ask:
    """A question for the worker."""

    request: str
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """Where a task stands; ``seconds_left`` is None where it is not known."""

    stage: str
    done: int
    total: int
    seconds_left: float | None = None

    @property
    def sentence(self) -> str:
        """For people, e.g. "Reading slices: 12 of 150, about 40 s left"."""
        text = self.stage
        if self.total > 1:
            text = _("{stage}: {done} of {total}").format(stage=self.stage, done=self.done, total=self.total)
        if self.seconds_left is None or self.done >= self.total:
            return text
        seconds = round(self.seconds_left)
        if seconds >= 90:
            return _("{text}, about {minutes} min left").format(text=text, minutes=round(seconds / 60))
        return _("{text}, about {seconds} s left").format(text=text, seconds=max(seconds, 1))


class Task:
    """One generator on its way. ``result`` or ``trouble`` is set once ``finished``."""

    def __init__(
        self,
        work: Work,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        on_done: Callable[[Any], None] | None = None,
        on_trouble: Callable[[Trouble], None] | None = None,
        guard: Callable[[], str | None] | None = None,
    ) -> None:
        """Args:
        work: the generator.
        on_progress, on_done, on_trouble: called from the runner's tick.
        guard: asked every tick; a sentence ends the task, because what it works for is gone.
        """
        self.work, self.guard = work, guard
        self._on_progress, self._on_done, self._on_trouble = on_progress, on_done, on_trouble
        self.request_id: str | None = None
        self.finished = False
        self.result: Any = None
        self.trouble: Trouble | None = None
        self.requests: list[str] = []

    def report(self, progress: Progress) -> None:
        if self._on_progress is not None:
            self._on_progress(progress)

    def end(self, result: Any = None, trouble: Trouble | None = None) -> None:
        if self.finished:
            return
        self.finished, self.result, self.trouble = True, result, trouble
        if trouble is not None:
            if self._on_trouble is not None:
                self._on_trouble(trouble)
        elif self._on_done is not None:
            self._on_done(result)


class TaskRunner:
    """Runs tasks against one worker. Everything happens in :meth:`tick`, on the caller's thread."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._waiting: dict[str, Task] = {}
        self._working: list[Task] = []

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._working)

    def start(self, task: Task) -> Task:
        """Begin; the first step is taken at the next tick."""
        self._working.append(task)
        return task

    def cancel(self, task: Task) -> None:
        """Stop a task. One that waits ends when the worker (or its client) answers, within a second."""
        if task.finished:
            return
        if task.request_id is not None:
            self.client.cancel(task.request_id)
        else:
            self._drop(task, Trouble("cancelled", _("Cancelled. Nothing was changed.")))

    def abandon(self, task: Task, sentence: str) -> None:
        """End a task at once, whatever the worker does."""
        if task.finished:
            return
        if task.request_id is not None:
            self._waiting.pop(task.request_id, None)
            self.client.cancel(task.request_id)
        self._drop(task, Trouble("gone", sentence))

    def tick(self, budget: float = TICK_BUDGET) -> None:
        """Take the worker's answers, and work for about ``budget`` seconds."""
        deadline = time.monotonic() + budget
        for task in [*self._waiting.values(), *self._working]:
            sentence = task.guard() if task.guard is not None else None
            if sentence:
                self.abandon(task, sentence)
        for event in self.client.poll():
            self._take(event, deadline)
        for task in list(self._working):
            if not task.finished:
                self._advance(task, None, deadline)

    def finish(self, task: Task, every: Callable[[], None] | None = None) -> Any:
        """Tick until a task has ended; for scripts.

        Args:
            task: a started task.
            every: called between ticks.

        Returns:
            The task's result.

        Raises:
            Trouble: the task did not succeed.
        """
        while not task.finished:
            self.tick(0.2)
            if every is not None:
                every()
            if task.request_id is not None and not task.finished:
                time.sleep(0.005)
        if task.trouble is not None:
            raise task.trouble
        return task.result

    def _take(self, event: Any, deadline: float) -> None:
        task = self._waiting.get(event.request)
        if task is None:
            return
        if event.kind == "progress":
            task.report(Progress(event.stage, event.done, event.total, event.seconds_left))
            return
        del self._waiting[event.request]
        task.request_id = None
        self._working.append(task)
        if event.kind == "result":
            self._advance(task, event.values, deadline)
        else:
            self._advance(task, Trouble(event.code, event.message), deadline)

    def _advance(self, task: Task, answer: Any, deadline: float) -> None:
        """Resume a task until it asks, ends, or the time is up."""
        try:
            while True:
                failed = isinstance(answer, Trouble)
                asked = task.work.throw(answer) if failed else task.work.send(answer)
                answer = None
                if asked is not None:
                    self._working.remove(task)
                    task.request_id = self.client.send(asked.request, **asked.values)
                    task.requests.append(task.request_id)
                    self._waiting[task.request_id] = task
                    return
                if time.monotonic() >= deadline:
                    return
        except StopIteration as end:
            self._forget(task)
            task.end(result=end.value)
        except Trouble as trouble:
            self._forget(task)
            task.end(trouble=trouble)
        except Exception as error:
            logging.exception("FreqSeg: a task failed")
            self._forget(task)
            sentence = _("FreqSeg stumbled over something unforeseen ({error}). Details are in Slicer's error log.")
            task.end(trouble=Trouble("internal", sentence.format(error=error)))

    def _drop(self, task: Task, trouble: Trouble) -> None:
        self._forget(task)
        task.work.close()
        task.end(trouble=trouble)

    def _forget(self, task: Task) -> None:
        if task in self._working:
            self._working.remove(task)
