"""The worker as a process of its own, spoken to by hand: what it says, what it survives, and how it ends."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from FreqSegLib import protocol, worker_processes

FAKE = [sys.executable, str(Path(__file__).with_name("fake_worker.py"))]
# how long a busy machine may take to start a process; nothing waits that long when all is well
PATIENCE = 120
# what a worker does here would take a minute and more
FAR_SOONER = 30


class Spoken:
    """A worker and the lines it says."""

    def __init__(self, folder: Path | None, parent: int | None = None) -> None:
        self.process = subprocess.Popen(FAKE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.raw: list[bytes] = []
        self.log: list[bytes] = []
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=lambda: self.log.extend(self.process.stderr or []), daemon=True).start()
        if folder is not None:
            self.say("begin", "begin", folder=str(folder), parent=parent or os.getpid(), protocol=protocol.PROTOCOL)
            self.until(lambda said: said["id"] == "begin")

    def _read(self) -> None:
        for line in self.process.stdout or []:
            self.raw.append(line)
            self.lines.put(json.loads(line))
        self.lines.put(None)

    def say(self, number: str, request: str, **values: Any) -> None:
        self.write(protocol.encode({"id": number, "request": request, "values": values}))

    def write(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def until(self, wanted: Callable[[Mapping[str, Any]], bool]) -> dict[str, Any]:
        """The first event that is wanted; the ones before it are dropped."""
        while True:
            said = self.lines.get(timeout=PATIENCE)
            assert said is not None, b"".join(self.log).decode()
            if wanted(said):
                return said

    def answer(self, number: str) -> dict[str, Any]:
        return self.until(lambda said: said["id"] == number and said["event"] in ("result", "error"))

    def progress(self, number: str) -> dict[str, Any]:
        return self.until(lambda said: said["id"] == number and said["event"] == "progress")

    def set_volume(self, folder: Path, **given: Any) -> str:
        array = np.zeros((4, 5, 6), np.int16)
        array[1:3, 2:4, 1:5] = 100
        described = protocol.write_array(folder / "volume.raw", array).described()
        self.say("set", "set_volume", volume={"array": described, "affine": np.eye(4), **given})
        return str(self.answer("set")["values"]["volume_id"])

    def segment(self, number: str, volume: str, *prompts: str) -> None:
        self.say(number, "segment", volume_id=volume, prompts=prompts)

    def ends(self) -> None:
        """By itself; how soon is measured by the benchmark, here it only must not wait for what it was doing."""
        self.process.wait(FAR_SOONER)

    def close(self) -> None:
        if self.process.poll() is None:
            worker_processes.end_tree(self.process)
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError, ValueError):
                assert pipe is not None
                pipe.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A parent's temporary folder."""
    found = tmp_path / "freqseg-worker-test"
    found.mkdir()
    worker_processes.mark_folder(found)
    return found


@pytest.fixture
def spoken(folder: Path) -> Iterator[Spoken]:
    found = Spoken(folder)
    yield found
    found.close()


def gone(process: int) -> bool:
    return not worker_processes.alive(process)


def wait_until(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + FAR_SOONER
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.02)
    return true()


def test_only_the_protocol_reaches_stdout_whoever_prints(spoken: Spoken, folder: Path) -> None:
    volume = spoken.set_volume(folder)
    spoken.segment("1", volume, "print")
    values = spoken.answer("1")["values"]
    assert values["segments"][0]["name"] == "print"
    spoken.say("2", "shutdown")
    spoken.ends()
    assert all(set(json.loads(line)) >= {"id", "event"} for line in spoken.raw)
    log = b"".join(spoken.log)
    assert all(f'{{"from": "{way}"}}'.encode() in log for way in ("print", "write", "puts"))
    assert b"EOFError" in log, "a child found something to read on stdin"


def test_garbage_is_answered_and_the_worker_goes_on(spoken: Spoken, folder: Path) -> None:
    spoken.write(b"garbage\n\n\xff\xfe\n[1, 2]\n")
    for _ in range(3):
        said = spoken.until(lambda said: said["event"] == "error")
        assert (said["id"], said["code"]) == (None, "request")
    spoken.say("1", "nonsense")
    assert "no request 'nonsense'" in spoken.answer("1")["message"]
    spoken.say("2", "segment", volume_id="never set", prompts=["bright"])
    assert spoken.answer("2")["code"] == "volume_unknown"
    volume = spoken.set_volume(folder)
    spoken.segment("3", volume, "bright")
    assert spoken.answer("3")["event"] == "result"


def test_a_line_without_end_does_not_fill_the_memory(spoken: Spoken, monkeypatch: pytest.MonkeyPatch) -> None:
    spoken.write(b"x" * (protocol.LONGEST_LINE + 10) + b"\n")
    assert "longer than" in spoken.until(lambda said: said["event"] == "error")["message"]
    spoken.say("1", "models", action="folder")
    assert spoken.answer("1")["event"] == "result"


def test_what_goes_wrong_has_a_code_and_a_sentence_and_the_worker_stays(spoken: Spoken, folder: Path) -> None:
    volume = spoken.set_volume(folder)
    codes = {}
    for prompt in ("memory", "torch memory", "bug"):
        spoken.segment(prompt.replace(" ", "-"), volume, prompt)
        said = spoken.answer(prompt.replace(" ", "-"))
        codes[prompt] = said["code"]
        assert said["message"].endswith((".", "GB", "slice."))
    assert codes == {"memory": "memory", "torch memory": "memory", "bug": "internal"}
    spoken.segment("1", volume, "bright")
    assert spoken.answer("1")["values"]["ran"] == ["Looking"]


def test_a_pipeline_that_is_missing_is_said_so(spoken: Spoken, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from FreqSegLib import worker_session

    with pytest.raises(protocol.WorkerError, match="not available in this version") as raised:
        worker_session._pipeline("FreqSegLib.nothing_of_the_kind", "Segmenter", "Telepathy")
    assert raised.value.code == "not_available"
    assert worker_session._pipeline("FreqSegLib.volume", "Volume", "Volumes").__name__ == "Volume"


def test_while_one_request_computes_others_wait_and_errands_do_not(spoken: Spoken, folder: Path) -> None:
    volume = spoken.set_volume(folder)
    spoken.segment("1", volume, "slowly")
    spoken.progress("1")
    spoken.segment("2", volume, "bright")
    spoken.segment("3", volume, "bright")
    spoken.say("4", "models", action="list")
    spoken.say("5", "cancel", target="3")
    order = []
    while len(order) < 3:
        said = spoken.until(lambda said: said["event"] in ("result", "error"))
        order.append((said["id"], said.get("code", "")))
    assert set(order) == {("4", ""), ("5", ""), ("3", "cancelled")}
    spoken.say("6", "cancel", target="1")
    assert spoken.answer("1")["code"] == "cancelled"
    assert spoken.answer("2")["values"]["ran"] == ["Looking"], "the worker did not stay warm"
    spoken.say("7", "cancel", target="1")
    assert spoken.answer("7")["values"] == {"found": False}


def test_the_end_of_stdin_ends_an_idle_worker(spoken: Spoken) -> None:
    assert spoken.process.stdin is not None
    spoken.process.stdin.close()
    spoken.ends()
    assert spoken.process.returncode == 0


@pytest.mark.parametrize("prompt", ["slowly", "stubborn", "child"])
def test_the_end_of_stdin_ends_a_worker_in_the_middle_of_a_run(spoken: Spoken, folder: Path, prompt: str) -> None:
    volume = spoken.set_volume(folder)
    spoken.segment("1", volume, prompt)
    stage = spoken.progress("1")["stage"]
    if prompt == "child":
        stage = spoken.until(lambda said: said.get("stage", "").startswith("child"))["stage"]
    assert spoken.process.stdin is not None
    spoken.process.stdin.close()
    spoken.ends()
    if prompt == "child":
        assert wait_until(lambda: gone(int(stage.split()[1])))
    assert folder.is_dir(), "the parent lives; the folder is its own"


def test_a_broken_pipe_ends_the_worker(spoken: Spoken, folder: Path) -> None:
    volume = spoken.set_volume(folder)
    spoken.segment("1", volume, "slowly")
    spoken.progress("1")
    # the reading thread holds the pipe's object, so the descriptor itself is closed
    assert spoken.process.stdout is not None
    os.dup2(os.open(os.devnull, os.O_RDONLY), spoken.process.stdout.fileno())
    spoken.ends()


def test_a_worker_outlives_neither_its_parent_nor_its_parents_files(folder: Path, tmp_path: Path) -> None:
    """A parent that is killed, while another process still holds the worker's stdin open."""
    code = (
        "import os, subprocess, sys, time\n"
        "from FreqSegLib import protocol, worker_processes\n"
        f"folder = {str(folder)!r}\n"
        "worker_processes.mark_folder(__import__('pathlib').Path(folder))\n"
        f"worker = subprocess.Popen({FAKE!r}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "os.set_inheritable(worker.stdin.fileno(), True)\n"
        "holder = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'], close_fds=False)\n"
        "begin = {'folder': folder, 'parent': os.getpid(), 'protocol': protocol.PROTOCOL}\n"
        "worker.stdin.write(protocol.encode({'id': 'begin', 'request': 'begin', 'values': begin}))\n"
        "worker.stdin.flush()\n"
        "worker.stdout.readline()\n"
        "print(worker.pid, holder.pid, flush=True)\n"
        "time.sleep(100)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(protocol.__file__).parents[1])}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    worker, holder = (int(number) for number in parent.stdout.readline().split())
    try:
        parent.kill()
        parent.wait()
        assert wait_until(lambda: gone(worker))
        assert wait_until(lambda: not folder.exists())
    finally:
        for process in (worker, holder):
            with suppress(psutil.NoSuchProcess):
                psutil.Process(process).kill()
        parent.stdout.close()


def test_two_sides_of_different_versions_do_not_talk_past_each_other(tmp_path: Path) -> None:
    spoken = Spoken(None)
    try:
        spoken.say("1", "begin", folder=str(tmp_path), parent=os.getpid(), protocol=protocol.PROTOCOL + 1)
        assert "different versions" in spoken.answer("1")["message"]
        spoken.say("2", "segment", volume_id="x", prompts=[])
        assert spoken.answer("2")["event"] == "error"
    finally:
        spoken.close()
