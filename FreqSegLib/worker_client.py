"""The parent's end of the worker: send a request, poll for events, never wait.

Nothing here calls back from another thread: a panel polls from a timer, a script waits. Standard library and numpy
only; psutil is used where it is installed, to end a worker together with the processes it started.
"""

from __future__ import annotations

import atexit
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from FreqSegLib import protocol
from FreqSegLib.errors import FreqSegError, InputError
from FreqSegLib.protocol import ArrayDescription
from FreqSegLib.worker_processes import (
    TOKEN,
    end_marked,
    end_tree,
    forgotten_folders,
    mark_folder,
    remove_folder_of_the_dead,
)

GRACE = 10.0
"""Seconds a worker has to stop a cancelled request before it is ended."""
CLOSING = 2.0
REMEMBERED_VOLUMES = 4
EXPORT_BLOCK = 2**20
FOLDER_PREFIX = "freqseg-worker-"


@dataclass(frozen=True)
class Event:
    """Something that happened to a request; see :mod:`FreqSegLib.protocol` for values, stages and codes."""

    request: str
    kind: Literal["progress", "result", "error"]
    stage: str = ""
    done: int = 0
    total: int = 0
    seconds_left: float | None = None
    values: dict[str, Any] = field(default_factory=dict)
    code: str = ""
    message: str = ""


class ArrayExport:
    """An array on its way into a file of the client's temporary folder, a little at a time."""

    def __init__(self, array: NDArray[Any], path: Path) -> None:
        if array.size == 0 or array.dtype.kind not in "biuf":
            raise InputError(f"Voxels must be numbers, got an array of type {array.dtype} and shape {array.shape}.")
        plain = array.dtype.newbyteorder("=") if array.dtype.kind != "b" else np.dtype(np.uint8)
        self._array, self._type, self._path = array, plain, path
        self._description = ArrayDescription(str(path), plain.str, array.shape)
        rows = array.reshape(-1) if array.flags.c_contiguous else array
        self._rows, self._next = rows, 0
        self._step = max(1, EXPORT_BLOCK * len(rows) // max(1, array.nbytes))
        self._file: Any = None

    @property
    def fraction(self) -> float:
        """How much is done, in [0, 1]."""
        return self._next / len(self._rows)

    def step(self, seconds: float = 0.02) -> bool:
        """Copy for about that long.

        Returns:
            Whether everything is copied.

        Raises:
            OSError: the disk is full, or the folder was removed.
        """
        end = time.perf_counter() + seconds
        while self._next < len(self._rows):
            if self._file is None:
                self._file = self._path.open("wb")
            block = np.ascontiguousarray(self._rows[self._next : self._next + self._step], dtype=self._type)
            self._file.write(block.reshape(-1).view(np.uint8).data)
            self._next = min(len(self._rows), self._next + self._step)
            if time.perf_counter() >= end:
                break
        if self._next < len(self._rows):
            return False
        if self._file is not None:
            self._file.close()
            self._file = None
        return True

    def described(self) -> dict[str, Any]:
        """The array as a request names it; what is not copied yet is copied first."""
        self.step(float("inf"))
        return self._description.described()

    def remove(self) -> None:
        """Delete the file, finished or not."""
        if self._file is not None:
            self._file.close()
            self._file = None
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


@dataclass
class _Pending:
    """A request that was not answered yet."""

    name: str
    values: dict[str, Any]
    begun: bool = False
    sent_again: bool = False
    volume_set_again: bool = False
    hidden_for: str | None = None
    """The request this one, which nobody asked for, prepares the worker for."""


class WorkerClient:
    """Starts a worker when there is something to do, and another one when it ended.

    Example::

        client = WorkerClient()
        volume = {"array": client.export(array).described(), "affine": affine.tolist()}
        found = client.wait(client.send("set_volume", volume=volume))
        result = client.wait(client.send("segment", volume_id=found["volume_id"], prompts=["brain tumour"]))
        mask = client.read(result["segments"][0]["mask"])
        client.close()
    """

    def __init__(
        self,
        command: Sequence[str] | None = None,
        *,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        """Starts nothing yet.

        Args:
            command: how to start a worker; by default this Python (in Slicer: PythonSlicer) with
                ``-m FreqSegLib.worker``.
            environment: added to this process's.
            folder: where the temporary folder is made; by default the system's place for such.
        """
        self._command = None if command is None else list(command)
        self._environment = dict(environment or {})
        self._base = folder
        self._folder: Path | None = None
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._events: deque[Event] = deque()
        self._pending: OrderedDict[str, _Pending] = OrderedDict()
        self._stopping: dict[str, float] = {}
        self._volumes: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._exports: dict[str, ArrayExport] = {}
        self._used: dict[str, list[str]] = {}
        self._worker: _Worker | None = None
        self._count = 0
        self._closed = False
        self._log: deque[str] = deque(maxlen=500)
        self._timer: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether a worker process is there."""
        worker = self._worker
        return worker is not None and worker.alive

    @property
    def log(self) -> str:
        """What workers said on stderr, the last lines of it."""
        return "\n".join(self._log)

    @property
    def folder(self) -> Path:
        """The temporary folder; made at first use, removed by :meth:`close`."""
        with self._lock:
            if self._folder is None:
                base = Path(self._base or tempfile.gettempdir())
                base.mkdir(parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-", dir=base))
                threading.Thread(target=_mark_and_clean, args=(self._folder,), daemon=True).start()
            return self._folder

    def send(self, request: str, **values: Any) -> str:
        """Hand a request to the worker, starting one when none runs; returns at once with the request's id."""
        with self._lock:
            number = self._next_id()
            if self._closed:
                self._emit(Event(number, "error", code="cannot_start", message="This worker was closed."))
                return number
            self._used[number] = sorted(_files_in(values))
            self._send(number, _Pending(request, values))
            return number

    def poll(self) -> list[Event]:
        """Everything that happened since the last call; never waits."""
        with self._lock:
            found = list(self._events)
            self._events.clear()
            return found

    def cancel(self, request_id: str) -> None:
        """Give a request up: ``poll`` tells ``cancelled`` at once, and nothing of it afterwards.

        The worker stops at its next batch and stays warm; one that does not within :data:`GRACE` seconds is ended with
        its children, and requests waiting behind go to a new one.
        """
        with self._lock:
            if request_id not in self._pending:
                return
            self._emit(Event(request_id, "error", code="cancelled", message="The run was cancelled."))
            doomed = [request_id, *(n for n, one in self._pending.items() if one.hidden_for == request_id)]
            for number in doomed:
                del self._pending[number]
                self._stopping[number] = time.monotonic() + GRACE
                self._write(self._next_id(), "cancel", {"target": number})
            if self._timer is None or not self._timer.is_alive():
                self._timer = threading.Thread(target=self._watch_the_stopping, name="FreqSeg cancel", daemon=True)
                self._timer.start()

    def wait(
        self, request_id: str, on_event: Callable[[Event], None] | None = None, timeout: float | None = None
    ) -> dict[str, Any]:
        """Wait for a request's result, in scripts; the events of others stay for :meth:`poll`.

        Args:
            request_id: from :meth:`send`.
            on_event: given every event of the request, in this thread.
            timeout: seconds; the request goes on afterwards.

        Returns:
            The result's values.

        Raises:
            FreqSegError: of the error's code; :class:`FreqSegLib.protocol.WorkerError` where there is no other.
            TimeoutError: it took longer than ``timeout``.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._changed:
                mine = [event for event in self._events if event.request == request_id]
                if not mine:
                    left = None if end is None else end - time.monotonic()
                    if left is not None and left <= 0:
                        raise TimeoutError(f"The worker did not answer request {request_id} within {timeout} s.")
                    # a limit, so that Ctrl+C is heard on Windows too
                    self._changed.wait(0.2 if left is None else min(0.2, left))
                    continue
                self._events = deque(event for event in self._events if event.request != request_id)
            for event in mine:
                if on_event is not None:
                    on_event(event)
                if event.kind == "result":
                    return event.values
                if event.kind == "error":
                    raise protocol.error_of(event.code, event.message)

    def export(self, array: NDArray[Any]) -> ArrayExport:
        """Prepare to copy an array into a file; nothing is copied before :meth:`ArrayExport.step`."""
        path = self.folder / f"export-{uuid.uuid4().hex[:12]}.raw"
        export = ArrayExport(array, path)
        with self._lock:
            self._exports[str(path)] = export
        return export

    def read(self, described: Mapping[str, Any]) -> NDArray[Any]:
        """A result's array, mapped into memory read-only; copy it before :meth:`release`."""
        parsed = ArrayDescription(**{**described, "shape": tuple(described["shape"])})
        return parsed.open()

    def release(self, request_id: str) -> None:
        """Delete the files of a request: its results, and what was exported for it alone.

        A volume that is set is kept for the case that the worker must be given it again.
        """
        with self._lock:
            mine = self._used.pop(request_id, [])
            kept = {file for values in self._volumes.values() for file in _files_in(values)}
            kept |= {file for files in self._used.values() for file in files}
            for file in mine:
                if file not in kept and file in self._exports:
                    self._exports.pop(file).remove()
            folder = self._folder
        if folder is not None:
            shutil.rmtree(folder / request_id, ignore_errors=True)

    def stop(self) -> None:
        """End the worker and give its memory back; the next request starts another. Waits up to 2 s."""
        with self._lock:
            worker, self._worker = self._worker, None
            for number in [n for n, one in self._pending.items() if one.hidden_for is None]:
                self._emit(Event(number, "error", code="cancelled", message="The worker was ended."))
            self._pending.clear()
            self._stopping.clear()
        if worker is not None:
            worker.close()

    def close(self) -> None:
        """End the worker and everything it started, and remove the temporary folder. Waits up to 2 s."""
        self._closed = True
        self.stop()
        atexit.unregister(self.close)
        with self._lock:
            folder, self._folder = self._folder, None
            for export in self._exports.values():
                export.remove()
            self._exports.clear()
            self._volumes.clear()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def __enter__(self) -> WorkerClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next_id(self) -> str:
        self._count += 1
        return str(self._count)

    def _emit(self, event: Event) -> None:
        self._events.append(event)
        self._changed.notify_all()

    def _send(self, number: str, pending: _Pending) -> None:
        self._pending[number] = pending
        self._write(number, pending.name, pending.values)

    def _write(self, number: str, name: str, values: Mapping[str, Any]) -> None:
        try:
            line = protocol.encode({"id": number, "request": name, "values": values})
        except FreqSegError as error:
            self._pending.pop(number, None)
            self._emit(Event(number, "error", code=error.code, message=str(error)))
            return
        if self._worker is None:
            if name == "cancel":
                return
            self._worker = self._started()
        self._worker.lines.put(line)

    def _started(self) -> _Worker:
        worker = _Worker(self._on_message, self._on_end, self._log)
        # the first worker is what there is to clean up when the program ends
        atexit.unregister(self.close)
        atexit.register(self.close)
        worker.start(self._command, self._environment, lambda: self.folder)
        return worker

    def _on_message(self, worker: _Worker, message: Mapping[str, Any]) -> None:
        """From the thread that reads the worker's stdout."""
        number, kind = message.get("id"), message.get("event")
        if not isinstance(number, str):
            return
        with self._lock:
            if worker is not self._worker:
                return
            late = number in self._stopping
            if late and kind in ("result", "error"):
                del self._stopping[number]
            elif not late:
                self._on_event(number, kind, message)
        if late and kind == "result":
            self._discard(number)

    def _on_event(self, number: str, kind: Any, message: Mapping[str, Any]) -> None:
        pending = self._pending.get(number)
        if pending is None:
            return
        shown = pending.hidden_for or number
        if kind == "begun":
            pending.begun = True
        elif kind == "progress":
            self._emit(
                Event(
                    shown,
                    "progress",
                    stage=str(message.get("stage", "")),
                    done=int(message.get("done", 0)),
                    total=int(message.get("total", 0)),
                    seconds_left=message.get("seconds_left"),
                )
            )
        elif kind == "result":
            del self._pending[number]
            values = dict(message.get("values") or {})
            if pending.name == "set_volume":
                self._remember(values.get("volume_id"), pending.values)
            if pending.hidden_for is None:
                self._emit(Event(number, "result", values=values))
        elif kind == "error":
            self._on_error(number, pending, str(message.get("code")), str(message.get("message")))

    def _on_error(self, number: str, pending: _Pending, code: str, message: str) -> None:
        volume = self._volumes.get(str(pending.values.get("volume_id")))
        if code == "volume_unknown" and volume is not None and not pending.volume_set_again:
            # a new worker, or one that has seen other volumes since: set it again, then ask again
            self._send(self._next_id(), _Pending("set_volume", volume, hidden_for=number))
            pending.volume_set_again = True
            self._pending.move_to_end(number)
            self._write(number, pending.name, pending.values)
            return
        # of a volume set again for another request's sake, that one fails with the reason
        self._fail(number, code, message)

    def _remember(self, volume_id: Any, values: dict[str, Any]) -> None:
        self._volumes.pop(str(volume_id), None)
        self._volumes[str(volume_id)] = values
        while len(self._volumes) > REMEMBERED_VOLUMES:
            _, forgotten = self._volumes.popitem(last=False)
            still = {file for one in self._volumes.values() for file in _files_in(one)}
            still |= {file for files in self._used.values() for file in files}
            for file in _files_in(forgotten) - still:
                if file in self._exports:
                    self._exports.pop(file).remove()

    def _discard(self, number: str) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder / number, ignore_errors=True)

    def _on_end(self, worker: _Worker, code: str, sentence: str) -> None:
        """From a thread of the worker's: its process is gone, or never was."""
        with self._lock:
            if worker is not self._worker:
                return
            self._worker = None
            self._stopping.clear()
            for number, pending in list(self._pending.items()):
                if code == "cannot_start" or pending.begun or pending.sent_again:
                    self._fail(number, code, sentence)
            self._send_again()

    def _fail(self, number: str, code: str, sentence: str) -> None:
        pending = self._pending.pop(number, None)
        if pending is not None and pending.hidden_for is None:
            self._emit(Event(number, "error", code=code, message=sentence))
        elif pending is not None and pending.hidden_for is not None:
            self._fail(pending.hidden_for, code, sentence)

    def _send_again(self) -> None:
        """Give a new worker what the last one never began."""
        for number, pending in list(self._pending.items()):
            if pending.hidden_for is not None:
                del self._pending[number]
            else:
                pending.begun, pending.sent_again, pending.volume_set_again = False, True, False
                self._write(number, pending.name, pending.values)

    def _watch_the_stopping(self) -> None:
        """In a thread, while a cancelled request has not stopped yet."""
        while True:
            with self._lock:
                if not self._stopping:
                    self._timer = None
                    return
                late = min(self._stopping.values()) <= time.monotonic()
                if late:
                    worker, self._worker = self._worker, None
                    numbers = list(self._stopping)
                    self._stopping.clear()
                    self._send_again()
            if not late:
                time.sleep(0.05)
                continue
            if worker is not None:
                worker.kill()
            for number in numbers:
                self._discard(number)


class _Worker:
    """One worker process and the threads that speak with it."""

    def __init__(
        self,
        on_message: Callable[[_Worker, Mapping[str, Any]], None],
        on_end: Callable[[_Worker, str, str], None],
        log: deque[str],
    ) -> None:
        self.lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._on_message, self._on_end, self._log = on_message, on_end, log
        self._process: subprocess.Popen[bytes] | None = None
        self._token = uuid.uuid4().hex
        self._said = ""
        self._began = False
        self._finished = threading.Event()
        self._ready = threading.Event()
        self._readers: list[threading.Thread] = []

    @property
    def alive(self) -> bool:
        return not self._finished.is_set()

    def start(self, command: Sequence[str] | None, environment: Mapping[str, str], folder: Callable[[], Path]) -> None:
        """Returns at once; starting and writing happen in a thread."""
        threading.Thread(
            target=self._run, args=(command, environment, folder), name="FreqSeg to worker", daemon=True
        ).start()

    def kill(self) -> None:
        """End the process and everything it started, now."""
        self.lines.put(None)
        self._ready.wait(CLOSING)
        process = self._process
        if process is None:
            return
        end_tree(process)
        end_marked(self._token)

    def close(self) -> None:
        """Ask it to end, and see to it."""
        self.lines.put(protocol.encode({"id": "end", "request": "shutdown", "values": {}}))
        self.lines.put(None)
        self._ready.wait(CLOSING)
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(CLOSING)
        self.kill()

    def _run(self, command: Sequence[str] | None, environment: Mapping[str, str], folder: Callable[[], Path]) -> None:
        try:
            place = folder()
            process = subprocess.Popen(
                command or default_command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_environment(environment, self._token),
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except OSError as error:
            self._finished.set()
            self._ready.set()
            what = error.strerror or error
            self._on_end(self, "cannot_start", f"The worker could not be started: {what}. {_START_HELP}")
            return
        self._process = process
        self._ready.set()
        for name, work in (("from worker", self._read), ("worker's log", self._listen), ("worker's end", self._wait)):
            thread = threading.Thread(target=work, name=f"FreqSeg {name}", daemon=True)
            self._readers.append(thread)
            thread.start()
        begin = {"folder": place, "parent": os.getpid(), "protocol": protocol.PROTOCOL}
        line: bytes | None = protocol.encode({"id": "begin", "request": "begin", "values": begin})
        assert process.stdin is not None
        # its reader notices when the pipe is broken
        with suppress(OSError, ValueError):
            while line is not None:
                process.stdin.write(line)
                process.stdin.flush()
                line = self.lines.get()
        with suppress(OSError, ValueError):
            process.stdin.close()

    def _read(self) -> None:
        """Events, until the worker closes its stdout."""
        process = self._process
        assert process is not None
        assert process.stdout is not None
        with suppress(OSError, ValueError):
            for line in process.stdout:
                try:
                    message = protocol.decode(line)
                except FreqSegError as error:
                    self._note(f"not understood: {error}")
                    continue
                if message.get("id") == "begin" and message.get("event") == "result":
                    self._began = True
                elif message.get("event") == "error" and message.get("id") in (None, "begin"):
                    self._note(str(message.get("message")))
                self._on_message(self, message)

    def _listen(self) -> None:
        process = self._process
        assert process is not None
        assert process.stderr is not None
        with suppress(OSError, ValueError):
            for line in process.stderr:
                self._note(line.decode("utf-8", errors="replace").rstrip())

    def _note(self, sentence: str) -> None:
        self._log.append(sentence)
        if sentence.strip():
            self._said = sentence.strip()

    def _wait(self) -> None:
        """The process itself is watched: its children may hold its pipes open after its death."""
        process = self._process
        assert process is not None
        code = process.wait()
        end_marked(self._token)
        for reader in self._readers[:2]:
            reader.join(1)
        self._finished.set()
        self.lines.put(None)
        if self._began:
            self._on_end(self, "worker_gone", f"{_how_it_ended(code)} {_GONE_HELP}")
        else:
            said = f" It said: {self._said}" if self._said else ""
            self._on_end(self, "cannot_start", f"The worker could not be started.{said} {_START_HELP}")


_START_HELP = "Check that FreqSeg's Python packages are installed for it."
_GONE_HELP = "What it had not finished is lost; the next run starts a new one."


def default_command() -> list[str]:
    """This Python, or the one beside an application that holds Python, such as Slicer.

    Raises:
        FileNotFoundError: there is none.
    """
    here = Path(sys.executable or "")
    if here.name.lower().startswith("python"):
        return [str(here), "-m", "FreqSegLib.worker"]
    for folder in (here.parent, here.parent / "bin", here.parent.parent / "bin"):
        for name in ("PythonSlicer", "PythonSlicer.exe"):
            if (folder / name).is_file():
                return [str(folder / name), "-m", "FreqSegLib.worker"]
    raise FileNotFoundError(2, f"no Python was found beside {here}")


def _environment(added: Mapping[str, str], token: str) -> dict[str, str]:
    found = {**os.environ, "PYTHONSAFEPATH": "1", **added, TOKEN: token}
    # threads that wait by spinning make two busy processes many times slower
    found.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    package = str(Path(__file__).resolve().parents[1])
    paths = found.get("PYTHONPATH", "").split(os.pathsep)
    found["PYTHONPATH"] = os.pathsep.join([package, *(path for path in paths if path and path != package)])
    return found


def _how_it_ended(code: int) -> str:
    if code in (-9, 137):
        return "The worker was ended from outside, or by the system because memory ran out."
    if code == 0:
        return "The worker has ended."
    return f"The worker broke down (exit code {code})."


def _files_in(values: Mapping[str, Any]) -> set[str]:
    """Every array file a request names."""
    own = {values["file"]} if isinstance(values.get("file"), str) else set()
    return own.union(*(_files_in(value) for value in values.values() if isinstance(value, Mapping)))


def _mark_and_clean(folder: Path) -> None:
    """In a thread: asking for processes takes a while the first time."""
    with suppress(OSError):
        mark_folder(folder)
    for forgotten in forgotten_folders(folder.parent, FOLDER_PREFIX):
        remove_folder_of_the_dead(forgotten)
