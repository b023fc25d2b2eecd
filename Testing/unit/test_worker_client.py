"""The parent's end: nothing waits, nothing is lost, whatever the worker does."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from FreqSegLib import worker_client, worker_processes
from FreqSegLib.errors import Cancelled, FreqSegError, InputError
from FreqSegLib.protocol import RequestError, WorkerError
from FreqSegLib.worker_client import Event, WorkerClient

FAKE = [sys.executable, str(Path(__file__).with_name("fake_worker.py"))]
PATIENCE = 120.0


@pytest.fixture
def client(tmp_path: Path) -> Iterator[WorkerClient]:
    with WorkerClient(FAKE, folder=tmp_path / "with space") as found:
        yield found


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerClient]:
    """One worker for all tests that leave it as they found it."""
    with WorkerClient(FAKE, folder=tmp_path_factory.mktemp("warm")) as found:
        yield found


def volume_of(client: WorkerClient, array: np.ndarray | None = None, name: str = "volume") -> dict[str, Any]:
    return {"array": client.export(bright() if array is None else array).described(), "affine": np.eye(4), "name": name}


def bright(value: int = 100) -> np.ndarray:
    array = np.zeros((4, 5, 6), np.int16)
    array[1:3, 2:4, 1:5] = value
    return array


def set_volume(client: WorkerClient, array: np.ndarray | None = None, name: str = "volume") -> str:
    request = client.send("set_volume", volume=volume_of(client, array, name))
    return str(client.wait(request, timeout=PATIENCE)["volume_id"])


def segment(client: WorkerClient, volume: str, *prompts: str) -> dict[str, Any]:
    return client.wait(client.send("segment", volume_id=volume, prompts=prompts), timeout=PATIENCE)


def event(client: WorkerClient, wanted: Callable[[Event], bool]) -> Event:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        for one in client.poll():
            if wanted(one):
                return one
        time.sleep(0.01)
    raise AssertionError(client.log)


def process_of(client: WorkerClient) -> psutil.Process:
    assert client._worker is not None
    assert client._worker._process is not None
    return psutil.Process(client._worker._process.pid)


def until(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and not true():
        time.sleep(0.02)
    return true()


def test_a_volume_goes_there_and_its_mask_comes_back(warm: WorkerClient) -> None:
    request = warm.send("set_volume", volume=volume_of(warm), roi=[[0, 6], [1, 5], [0, 3]])
    found = warm.wait(request, timeout=PATIENCE)
    assert (found["slices"], found["axis"], found["array_axis"]) == (3, "axial", 0)
    seen: list[Event] = []
    request = warm.send("segment", volume_id=found["volume_id"], prompts=["bright"])
    (one,) = warm.wait(request, seen.append, timeout=PATIENCE)["segments"]
    assert [said.kind for said in seen][-1] == "result"
    assert any(said.kind == "progress" and said.stage == "Looking: bright" and said.total == 100 for said in seen)
    expected = bright() > 50
    expected[3:] = False
    np.testing.assert_array_equal(warm.read(one["mask"]), expected)
    assert warm.read(one["mask"]).dtype == np.uint8
    np.testing.assert_array_equal(warm.read(one["saliency"]), expected.astype(np.float32) / 2)
    assert (one["name"], one["empty"], one["uncertainty"]) == ("bright", False, None)
    assert one["sentence"] == "bright: 0.016 ml (probability 0.75)."
    folder = Path(one["mask"]["file"]).parent
    warm.release(request)
    assert not folder.exists()


def test_nothing_is_started_before_it_is_needed(tmp_path: Path) -> None:
    client = WorkerClient(FAKE, folder=tmp_path)
    assert not client.running
    assert client.poll() == []
    client.cancel("7")
    client.release("7")
    client.close()
    assert list(tmp_path.iterdir()) == []


def test_models_and_slices_stay_warm_and_two_volumes_keep_their_own(warm: WorkerClient) -> None:
    one, other = bright(101), bright(102)[::-1]
    first = warm.wait(warm.send("set_volume", volume=volume_of(warm, one, "one")), timeout=PATIENCE)
    segment(warm, first["volume_id"], "bright")
    second = warm.wait(warm.send("set_volume", volume=volume_of(warm, other, "other")), timeout=PATIENCE)
    assert first["volume_id"] != second["volume_id"]
    again = segment(warm, first["volume_id"], "bright", "more")
    assert again["ran"] == ["Looking"]
    np.testing.assert_array_equal(warm.read(again["segments"][0]["mask"]), one > 50)
    assert segment(warm, first["volume_id"], "bright", "more")["ran"] == []
    np.testing.assert_array_equal(
        warm.read(segment(warm, second["volume_id"], "bright")["segments"][0]["mask"]), other > 50
    )
    same = warm.wait(warm.send("set_volume", volume=volume_of(warm, one, "one")), timeout=PATIENCE)
    assert (same["volume_id"], same["ran"]) == (first["volume_id"], [])


def test_a_volume_the_worker_has_let_go_of_is_given_to_it_again(warm: WorkerClient) -> None:
    volumes = {name: set_volume(warm, bright(number), name) for number, name in ((90, "a"), (91, "b"), (92, "c"))}
    np.testing.assert_array_equal(
        warm.read(segment(warm, volumes["a"], "bright")["segments"][0]["mask"]), bright() > 50
    )
    for number in range(60, 65):
        set_volume(warm, bright(number), f"another {number}")
    with pytest.raises(WorkerError, match="set it again") as raised:
        segment(warm, volumes["a"], "bright")
    assert raised.value.code == "volume_unknown"


def test_files_of_what_is_released_go_and_those_of_a_volume_that_is_set_stay(client: WorkerClient) -> None:
    export = client.export(bright())
    volume = {"array": export.described(), "affine": np.eye(4)}
    request = client.send("set_volume", volume=volume)
    client.wait(request, timeout=PATIENCE)
    client.release(request)
    assert Path(volume["array"]["file"]).exists()
    bad = client.send("set_volume", volume={**volume_of(client), "affine": np.zeros((4, 4))})
    with pytest.raises(InputError, match="spacing must be > 0"):
        client.wait(bad, timeout=PATIENCE)
    client.release(bad)
    assert len(list(client.folder.glob("export-*"))) == 1


def test_an_array_is_copied_a_little_at_a_time(client: WorkerClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_client, "EXPORT_BLOCK", 1000)
    for array in (
        np.arange(6000, dtype=np.int16).reshape(10, 20, 30),
        np.arange(6000, dtype=">f4").reshape(10, 20, 30).transpose(2, 0, 1),
        np.arange(6000).reshape(10, 20, 30)[::2, ::-1] % 7 == 0,
    ):
        export = client.export(array)
        steps = 1
        while not export.step(0):
            steps += 1
            assert 0 < export.fraction < 1
        assert steps >= 3
        back = client.read(export.described())
        np.testing.assert_array_equal(back, array)
        assert back.dtype.isnative
        assert Path(export.described()["file"]).stat().st_size == back.nbytes
    with pytest.raises(InputError, match="must be numbers"):
        client.export(np.array(["text"]))


def test_a_wrong_request_is_an_answer_not_an_exception(warm: WorkerClient) -> None:
    with pytest.raises(RequestError, match="no request 'nonsense'"):
        warm.wait(warm.send("nonsense"), timeout=PATIENCE)
    with pytest.raises(RequestError, match="written as JSON"):
        warm.wait(warm.send("segment", volume_id=object(), prompts=[]), timeout=PATIENCE)
    with pytest.raises(FreqSegError, match="The prompt is empty"):
        segment(warm, set_volume(warm), " ")


def test_waiting_ends_at_its_time_and_leaves_others_events_alone(warm: WorkerClient) -> None:
    volume = set_volume(warm)
    long = warm.send("segment", volume_id=volume, prompts=["slowly"])
    with pytest.raises(TimeoutError, match="did not answer"):
        warm.wait(long, timeout=0.2)
    warm.wait(warm.send("models", action="folder"), timeout=PATIENCE)
    warm.cancel(long)
    assert event(warm, lambda one: one.kind == "error").request == long


def test_cancel_is_told_at_once_and_the_worker_stays(warm: WorkerClient) -> None:
    volume = set_volume(warm)
    process = process_of(warm)
    request = warm.send("segment", volume_id=volume, prompts=["slowly"])
    event(warm, lambda one: one.kind == "progress" and one.done > 1)
    warm.cancel(request)
    (told,) = [one for one in warm.poll() if one.kind == "error"]
    assert (told.request, told.code) == (request, "cancelled")
    assert segment(warm, volume, "bright")["segments"]
    assert process_of(warm) == process
    assert not [one for one in warm.poll() if one.request == request]
    again = warm.send("segment", volume_id=volume, prompts=["slowly"])
    warm.cancel(again)
    with pytest.raises(Cancelled):
        warm.wait(again, timeout=PATIENCE)


def test_a_worker_that_does_not_stop_is_ended_and_what_waited_goes_to_another(
    client: WorkerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = set_volume(client)
    monkeypatch.setattr(worker_client, "GRACE", 0.5)
    request = client.send("segment", volume_id=volume, prompts=["child"])
    stage = event(client, lambda one: one.stage.startswith("child")).stage
    process = process_of(client)
    client.cancel(request)
    assert client.poll()[-1].code == "cancelled"
    found = segment(client, volume, "bright")
    np.testing.assert_array_equal(client.read(found["segments"][0]["mask"]), bright() > 50)
    assert until(lambda: not worker_processes.alive(process.pid))
    assert until(lambda: not worker_processes.alive(int(stage.split()[1]))), "a child outlived its worker"
    assert client.running


@pytest.mark.parametrize("busy", [False, True])
def test_a_worker_that_is_killed_is_missed_and_the_next_request_works(client: WorkerClient, busy: bool) -> None:
    volume = set_volume(client)
    stage = ""
    if busy:
        request = client.send("segment", volume_id=volume, prompts=["child"])
        stage = event(client, lambda one: one.stage.startswith("child")).stage
    process_of(client).kill()
    if busy:
        told = event(client, lambda one: one.kind == "error")
        assert (told.request, told.code) == (request, "worker_gone")
        assert "memory ran out" in told.message or os.name == "nt"
        assert until(lambda: not worker_processes.alive(int(stage.split()[1]))), "a child was left behind"
    # sent at once, perhaps before anybody could notice
    found = segment(client, volume, "bright")
    np.testing.assert_array_equal(client.read(found["segments"][0]["mask"]), bright() > 50)


@pytest.mark.parametrize("prompt", ["crash", "exit"])
def test_a_worker_that_breaks_down_is_missed_and_the_next_request_works(client: WorkerClient, prompt: str) -> None:
    volume = set_volume(client)
    with pytest.raises(WorkerError, match="broke down") as raised:
        segment(client, volume, prompt)
    assert raised.value.code == "worker_gone"
    assert until(lambda: not client.running)
    assert segment(client, volume, "bright")["segments"]


def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    for command, said in (
        ([*FAKE, "--no-start"], "No module named 'torch'"),
        ([str(tmp_path / "none")], "No such file"),
    ):
        with WorkerClient(command, folder=tmp_path) as client:
            for _ in range(2):
                with pytest.raises(WorkerError, match=said if os.name != "nt" else "") as raised:
                    client.wait(client.send("info"), timeout=PATIENCE)
                assert raised.value.code == "cannot_start"


def test_closing_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    client = WorkerClient(FAKE, folder=tmp_path)
    volume = set_volume(client)
    segment(client, volume, "bright")
    client.send("segment", volume_id=volume, prompts=["child"])
    stage = event(client, lambda one: one.stage.startswith("child")).stage
    process = process_of(client)
    folder = client.folder
    assert folder.parent == tmp_path
    client.close()
    assert not process.is_running()
    assert until(lambda: not worker_processes.alive(int(stage.split()[1])))
    assert not folder.exists()
    told = [one for one in client.poll() if one.kind == "error"]
    assert [one.code for one in told] == ["cancelled"]
    client.close()
    with pytest.raises(WorkerError, match="was closed"):
        client.wait(client.send("info"))


def test_a_stopped_worker_is_started_again(client: WorkerClient) -> None:
    volume = set_volume(client)
    process = process_of(client)
    client.stop()
    assert not process.is_running()
    assert not client.running
    assert segment(client, volume, "bright")["segments"]


def test_what_a_killed_parent_and_worker_left_is_removed_by_the_next(tmp_path: Path) -> None:
    left, foreign, living = (
        tmp_path / f"{worker_client.FOLDER_PREFIX}{name}" for name in ("1-left", "foreign", "live")
    )
    for folder in (left, foreign, living):
        folder.mkdir()
    worker_processes.mark_folder(living)
    mark = (living / "freqseg-owner.json").read_text()
    started = f'"started": {worker_processes.started(os.getpid())}'
    assert started in mark
    (left / "freqseg-owner.json").write_text(mark.replace(started, '"started": 1.0'))
    with WorkerClient(FAKE, folder=tmp_path) as client:
        client.export(bright())
        assert until(lambda: not left.exists())
        assert foreign.exists()
        assert living.exists()


def test_everything_works_without_psutil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_processes, "_psutil", lambda: None)
    with WorkerClient(FAKE, folder=tmp_path) as client:
        volume = set_volume(client)
        assert segment(client, volume, "bright")["segments"]
        client._worker._process.kill()  # type: ignore[union-attr]
        assert segment(client, volume, "more")["segments"]
        monkeypatch.setattr(worker_client, "GRACE", 0.2)
        request = client.send("segment", volume_id=volume, prompts=["stubborn"])
        event(client, lambda one: one.stage == "Thinking")
        client.cancel(request)
        assert segment(client, volume, "bright")["segments"]
        folder = client.folder
    assert not folder.exists()


def test_events_come_only_from_poll(client: WorkerClient) -> None:
    """Nothing of the caller's is ever called from a thread of the client's."""
    volume = set_volume(client)
    threads = set()
    request = client.send("segment", volume_id=volume, prompts=["bright"])
    client.wait(request, lambda one: threads.add(threading.current_thread()), timeout=PATIENCE)
    assert threads == {threading.current_thread()}


def test_the_default_command_is_this_python_or_the_one_beside_slicer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert worker_client.default_command() == [sys.executable, "-m", "FreqSegLib.worker"]
    (tmp_path / "bin").mkdir()
    shutil.copy(__file__, tmp_path / "bin" / "PythonSlicer")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "SlicerApp-real"))
    assert worker_client.default_command()[0] == str(tmp_path / "bin" / "PythonSlicer")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "Slicer"))
    assert worker_client.default_command()[0] == str(tmp_path / "bin" / "PythonSlicer")
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(FileNotFoundError):
        worker_client.default_command()
