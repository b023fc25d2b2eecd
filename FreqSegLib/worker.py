"""The pipelines as a process: ``python -m FreqSegLib.worker`` (requests and events: :mod:`FreqSegLib.protocol`).

File descriptor 1 belongs to the protocol alone: before anything else is loaded, descriptor 1 and ``sys.stdout`` are
pointed at stderr, so that neither Python nor a C library can write into it.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from FreqSegLib import __version__, protocol
from FreqSegLib.errors import Cancelled, FreqSegError
from FreqSegLib.progress import Progress
from FreqSegLib.protocol import Begin, Models, RequestError
from FreqSegLib.worker_processes import alive, end_children, remove_folder_of_the_dead, started

STOPPING = 1.2
"""Seconds a run has to stop at its next batch once nobody listens any more."""
PARENT_CHECK = 0.5
QUIET = 0.03
"""Seconds between two progress events of the same stage."""

Handler = Callable[[Any, "Job"], dict[str, Any]]


def main(make_handlers: Callable[[], dict[str, Handler]] | None = None) -> int:
    """Serve until stdin ends.

    Args:
        make_handlers: what answers each request that computes; by default the pipelines.
    """
    source, sink = take_protocol_descriptors()
    Worker(source, sink, (make_handlers or _pipelines)()).serve()
    return 0


def _pipelines() -> dict[str, Handler]:
    from FreqSegLib.worker_session import Session

    return Session().handlers


def take_protocol_descriptors() -> tuple[BinaryIO, BinaryIO]:
    """Keep stdin and stdout for the protocol; everything else in this process gets nothing to read, and stderr."""
    source, sink = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    if sys.platform == "win32":
        import msvcrt

        for descriptor in (source, sink):
            msvcrt.setmode(descriptor, os.O_BINARY)
    return os.fdopen(source, "rb"), os.fdopen(sink, "wb")


@dataclass
class Job:
    """One request on its way: where its files go, whether it was given up, which stages did work."""

    number: str
    name: str
    values: Any
    events: Events
    folder: Path | None
    stop: threading.Event
    begun: bool = False
    ran: list[str] = field(default_factory=list)
    _shown: tuple[str, float] = ("", 0.0)

    def cancelled(self) -> bool:
        """For pipelines, which poll it between batches."""
        return self.stop.is_set()

    def check(self) -> None:
        """Raises: Cancelled, if the request was given up."""
        if self.stop.is_set():
            raise Cancelled("The run was cancelled.")

    def progress(self, at: Progress) -> None:
        """For pipelines: tell the parent, at most some thirty times a second, and note the stage."""
        stage = at.stage.partition(":")[0]
        if at.total and stage not in self.ran:
            self.ran.append(stage)
        name, when = self._shown
        now = time.monotonic()
        if name == at.stage and now - when < QUIET and at.done < at.total:
            return
        self._shown = (at.stage, now)
        left = None if at.seconds_left is None else round(at.seconds_left, 1)
        self.events.send(
            self.number, "progress", stage=at.stage, done=int(at.done), total=int(at.total), seconds_left=left
        )

    def results(self) -> Path:
        """The folder for this request's files."""
        folder = self.parents_folder() / self.number
        folder.mkdir(exist_ok=True)
        return folder

    def parents_folder(self) -> Path:
        """The parent's temporary folder."""
        if self.folder is None:
            raise RequestError("The parent's folder is not known: send 'begin' first.")
        return self.folder


class Events:
    """The way out; several threads use it."""

    def __init__(self, sink: BinaryIO, on_broken: Callable[[], None]) -> None:
        self._sink, self._lock, self._on_broken = sink, threading.Lock(), on_broken

    def send(self, number: str | None, event: str, **values: Any) -> None:
        """One event. Where nobody reads any more nothing is raised, but the worker ends."""
        line = protocol.encode({"id": number, "event": event, **values})
        with self._lock:
            try:
                self._sink.write(line)
                self._sink.flush()
            except (OSError, ValueError):
                threading.Thread(target=self._on_broken, daemon=True).start()


class Worker:
    """One thread reads, the main thread computes one request after the other, errands have threads of their own."""

    def __init__(self, source: BinaryIO, sink: BinaryIO, handlers: dict[str, Handler]) -> None:
        self._source, self._handlers = source, handlers
        self._events = Events(sink, lambda: self._end(orderly=False))
        self._waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        self._begun: Begin | None = None
        self._parent_started: float | None = None
        self._ending = threading.Event()
        self._idle = threading.Event()
        self._idle.set()

    def serve(self) -> None:
        """Until stdin ends, the parent dies or ``shutdown`` is asked for; the process ends in here."""
        # Ctrl+C in a terminal reaches the whole group; the parent decides what it means
        with suppress(ValueError):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=self._read, name="requests", daemon=True).start()
        while not self._ending.is_set():
            job = self._waiting.get()
            if job is not None and self._taken(job):
                self._idle.clear()
                self._answer(job)
                self._idle.set()
        threading.Event().wait()

    def _taken(self, job: Job) -> bool:
        """Whether a job is still wanted when its turn comes."""
        with self._lock:
            job.begun = job.number in self._jobs
            return job.begun

    def _answer(self, job: Job) -> None:
        """Run a job and send its result or its error."""
        self._events.send(job.number, "begun")
        try:
            job.check()
            values = self._handlers[job.name](job.values, job)
            job.check()
        except BaseException as error:
            code, sentence = explained(error)
            if code == "internal":
                traceback.print_exc(file=sys.stderr)
            self._finish(job, "error", code=code, message=sentence)
            del error
            if code == "memory":
                _give_memory_back()
        else:
            self._finish(job, "result", values=values)

    def _finish(self, job: Job, event: str, **values: Any) -> None:
        with self._lock:
            if self._jobs.pop(job.number, None) is None:
                return
        self._events.send(job.number, event, **values)

    def _read(self) -> None:
        orderly = False
        try:
            while True:
                line = self._source.readline(protocol.LONGEST_LINE)
                if not line:
                    break
                if not line.endswith(b"\n") and len(line) >= protocol.LONGEST_LINE:
                    self._skip_line()
                    self._refuse(None, RequestError(f"A line is longer than {protocol.LONGEST_LINE} bytes."))
                elif line.strip():
                    orderly = self._on_line(line)
                    if orderly:
                        break
        except (OSError, ValueError):
            pass
        finally:
            self._end(orderly)

    def _skip_line(self) -> None:
        while True:
            rest = self._source.readline(protocol.LONGEST_LINE)
            if not rest or rest.endswith(b"\n"):
                return

    def _on_line(self, line: bytes) -> bool:
        """Returns: whether the worker is to end."""
        number: Any = None
        try:
            message = protocol.decode(line)
            number = message.get("id")
            number, name, values = protocol.parse(message)
            if number in self._jobs:
                raise RequestError(f"The id {number} is in use; give every request one of its own.")
        except FreqSegError as error:
            self._refuse(number if isinstance(number, str) else None, error)
            return False
        if name == "shutdown":
            self._events.send(number, "result", values={})
            return True
        if name == "cancel":
            self._events.send(number, "result", values={"found": self._cancel(values.target)})
        elif name == "begin":
            self._begin(number, values)
        else:
            folder = None if self._begun is None else Path(self._begun.folder)
            self._start(Job(number, name, values, self._events, folder, threading.Event()))
        return False

    def _refuse(self, number: str | None, error: FreqSegError) -> None:
        self._events.send(number, "error", code=error.code, message=str(error))

    def _begin(self, number: str, begin: Begin) -> None:
        if begin.protocol != protocol.PROTOCOL:
            self._refuse(
                number,
                RequestError(
                    f"The parent speaks protocol {begin.protocol}, this worker {protocol.PROTOCOL}: parts of FreqSeg "
                    "are of different versions. Install it again and restart."
                ),
            )
            return
        first = self._begun is None
        self._begun, self._parent_started = begin, started(begin.parent)
        if first:
            threading.Thread(target=self._watch_parent, name="parent", daemon=True).start()
        values = {"protocol": protocol.PROTOCOL, "version": __version__, "process": os.getpid()}
        self._events.send(number, "result", values=values)

    def _start(self, job: Job) -> None:
        with self._lock:
            self._jobs[job.number] = job
        if isinstance(job.values, Models):
            job.begun = True
            threading.Thread(target=self._answer, args=(job,), name=f"models {job.number}", daemon=True).start()
        else:
            self._waiting.put(job)

    def _cancel(self, target: str) -> bool:
        with self._lock:
            job = self._jobs.get(target)
            if job is None:
                return False
            job.stop.set()
            waits = not job.begun
        if waits:
            # answered now, and passed over when its turn comes
            self._finish(job, "error", code=Cancelled.code, message="The run was cancelled.")
        return True

    def _watch_parent(self) -> None:
        """The pipe stays open where another process holds its end too."""
        while self._begun is not None and alive(self._begun.parent, self._parent_started):
            time.sleep(PARENT_CHECK)
        self._end(orderly=False)

    def _end(self, orderly: bool) -> None:
        """Stop what runs, end what was started, remove what a dead parent cannot, and go."""
        if self._ending.is_set():
            return
        self._ending.set()
        with self._lock:
            for job in self._jobs.values():
                job.stop.set()
        self._waiting.put(None)
        self._idle.wait(STOPPING)
        end_children()
        if not orderly and self._begun is not None:
            self._remove_if_dead(self._begun)
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        # not sys.exit: neither a run in C code nor a library's threads may keep a worker that nobody hears
        os._exit(0)

    def _remove_if_dead(self, begin: Begin) -> None:
        """Its pipe closes a little before a dying process is gone."""
        end = time.monotonic() + 0.5
        while alive(begin.parent, self._parent_started):
            if time.monotonic() > end:
                return
            time.sleep(0.02)
        remove_folder_of_the_dead(Path(begin.folder))


def explained(error: BaseException) -> tuple[str, str]:
    """An error's code and its sentence for the user."""
    if _is_out_of_memory(error) or _is_out_of_memory(error.__cause__):
        return "memory", (
            "Memory ran out. Segment a smaller region of interest, close other programs, or compute on another device. "
            f"The system said: {_first_line(error)}"
        )
    if isinstance(error, FreqSegError):
        return error.code, str(error)
    if isinstance(error, ImportError) and not (error.name or "").startswith("FreqSegLib"):
        return "cannot_start", (
            f"A Python package FreqSeg needs cannot be loaded: {_first_line(error)}. Install FreqSeg's packages for "
            f"{sys.executable}."
        )
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return "output", f"A file could not be read or written{where}: {error.strerror or error}."
    return "internal", (
        f"FreqSeg failed ({type(error).__name__}: {_first_line(error)}). This is a defect; the worker's log says where."
    )


def _is_out_of_memory(error: BaseException | None) -> bool:
    if error is None or isinstance(error, MemoryError):
        return error is not None
    if "torch" not in sys.modules or isinstance(error, FreqSegError):
        return False
    from FreqSegLib.device import is_out_of_memory

    return is_out_of_memory(error)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def _give_memory_back() -> None:
    import gc

    gc.collect()
    if "torch" in sys.modules:
        from FreqSegLib.device import release_memory

        release_memory()


if __name__ == "__main__":
    sys.exit(main())
