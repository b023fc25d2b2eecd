"""Process trees and temporary folders of the worker: ended and removed whatever happens to either side.

Standard library only; psutil does it better and is used where it is installed.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

TOKEN = "FREQSEG_WORKER_TOKEN"
"""Environment variable that a worker and everything it starts inherit: what is left of a dead one is found by it."""
_MARK = "freqseg-owner.json"


def _psutil() -> Any:
    try:
        import psutil
    except ImportError:
        return None
    return psutil


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """End a child together with its children: of PythonSlicer, the process itself is only a launcher."""
    if process.poll() is None:
        psutil = _psutil()
        if psutil is not None:
            _end_all(psutil, process.pid, itself=True)
        elif os.name == "nt":
            command = ["taskkill", "/F", "/T", "/PID", str(process.pid)]
            subprocess.run(
                command, capture_output=True, check=False, creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0)
            )
        with suppress(OSError):
            process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(2)


def end_children() -> None:
    """End everything this process started."""
    psutil = _psutil()
    if psutil is not None:
        _end_all(psutil, os.getpid(), itself=False)


def end_marked(token: str) -> None:
    """End what a worker left behind: every process with its token. Does nothing without psutil."""
    psutil = _psutil()
    if psutil is None:
        return
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(TOKEN) == token:
                process.kill()


def alive(process: int, started: float | None = None) -> bool:
    """Whether a process runs, and is the one that ``started`` then (seconds since 1970); True where nobody can tell."""
    psutil = _psutil()
    if psutil is not None:
        try:
            found = psutil.Process(process)
            if started is not None and abs(found.create_time() - started) > 2:
                return False
            return bool(found.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return True
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def started(process: int) -> float | None:
    """When a process started, in seconds since 1970; None where nobody can tell."""
    psutil = _psutil()
    if psutil is None:
        return None
    try:
        return float(psutil.Process(process).create_time())
    except psutil.Error:
        return None


def mark_folder(folder: Path) -> None:
    """Write down whose temporary folder it is."""
    owner = {"process": os.getpid(), "started": started(os.getpid()), "host": platform.node()}
    (folder / _MARK).write_text(json.dumps(owner), encoding="utf-8")


def forgotten_folders(base: Path, prefix: str) -> Iterator[Path]:
    """Marked folders whose owner is dead, as when both sides were killed at once."""
    for folder in base.glob(f"{prefix}*"):
        try:
            owner = json.loads((folder / _MARK).read_text(encoding="utf-8"))
            dead = owner["host"] == platform.node() and not alive(int(owner["process"]), owner["started"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if dead:
            yield folder


def remove_folder_of_the_dead(folder: Path) -> None:
    """Remove a temporary folder, but only one that :func:`mark_folder` marked."""
    if (folder / _MARK).is_file():
        shutil.rmtree(folder, ignore_errors=True)


def _end_all(psutil: Any, root: int, *, itself: bool) -> None:
    with suppress(psutil.Error):
        top = psutil.Process(root)
        doomed = top.children(recursive=True) + ([top] if itself else [])
        for process in doomed:
            with suppress(psutil.Error):
                process.kill()
        if not itself:
            psutil.wait_procs(doomed, timeout=1)
