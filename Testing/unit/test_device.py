"""Devices that are absent, and memory that runs out."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from FreqSegLib.device import Batches, SideBySide, default_batch_size, lasting_threads, resolve_device
from FreqSegLib.errors import DeviceError


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused() -> None:
    assert resolve_device("auto") == resolve_device(" CPU ") == torch.device("cpu")
    for name in ("cuda", "cuda:0", "CUDA:1"):
        with pytest.raises(DeviceError, match=rf"'{name}' was asked for.*no usable CUDA GPU.*cpu"):
            resolve_device(name)


@pytest.mark.usefixtures("two_gpus")
def test_with_gpus_auto_takes_one_and_numbers_are_checked() -> None:
    assert resolve_device("auto").type == "cuda"
    assert resolve_device("cuda") == torch.device("cuda:0")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    for name in ("cuda:2", "cuda:-1", "cuda:x", "cudax"):
        with pytest.raises(DeviceError, match=r"does not exist.*2 CUDA"):
            resolve_device(name)


@pytest.mark.parametrize("name", ["mps", "", "gpu", "xla"])
def test_untested_devices_are_refused(name: str) -> None:
    with pytest.raises(DeviceError, match="must be auto, cpu or cuda"):
        resolve_device(name)


def test_batches_are_larger_on_a_gpu() -> None:
    assert default_batch_size(torch.device("cpu")) == 1
    assert default_batch_size(torch.device("cuda")) > 1


class Memory:
    """Work that fits ``room`` items at once; keeps the batches it was given."""

    def __init__(self, room: int, error: BaseException | None = None) -> None:
        self.room, self.tried = room, []
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def __call__(self, indices: range) -> list[int]:
        self.tried.append((indices.start, indices.stop))
        if len(indices) > self.room:
            raise self.error
        return list(indices)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    MemoryError("Unable to allocate 8 GiB for an array"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
    RuntimeError("[enforce fail at alloc_cpu.cpp:82] . DefaultCPUAllocator: not enough memory: you tried to allocate"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:40])
def test_the_batch_steps_down_until_it_fits_and_stays_there(error: Exception) -> None:
    work = Memory(2, error)
    found = list(Batches(8).run(7, work))
    assert [item for _, items in found for item in items] == list(range(7))
    assert [len(indices) for indices, _ in found] == [1] * 7 or max(len(i) for i, _ in found) <= 2
    assert [indices.start for indices, _ in found] == sorted(indices.start for indices, _ in found)
    failures = [span for span in work.tried if span[1] - span[0] > 2]
    assert len(failures) <= 2
    assert work.tried.index(failures[-1]) == len(failures) - 1


def test_the_smaller_size_holds_for_the_next_run_too() -> None:
    batches = Batches(4)
    list(batches.run(4, Memory(1)))
    later = Memory(4)
    list(batches.run(3, later))
    assert later.tried == [(0, 1), (1, 2), (2, 3)]


def test_a_single_item_that_does_not_fit_ends_the_run_with_advice() -> None:
    work = Memory(0, RuntimeError("CUDA out of memory.\nlots of lines"))
    with pytest.raises(DeviceError, match=r"single slice.*--device cpu.*CUDA out of memory\.$") as error:
        list(Batches(4).run(3, work))
    assert isinstance(error.value.__cause__, RuntimeError)
    assert work.tried == [(0, 3), (0, 1)]


def test_what_is_done_stays_done_when_a_later_batch_does_not_fit() -> None:
    done = []

    def work(indices: range) -> None:
        if 5 in indices and len(indices) > 1:
            raise MemoryError
        done.extend(indices)

    assert [list(indices) for indices, _ in Batches(4).run(7, work)] == [[0, 1, 2, 3], [4], [5], [6]]
    assert done == list(range(7))


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("out of memory"), KeyboardInterrupt()]
)
def test_other_errors_pass_untouched(error: BaseException) -> None:
    work = Memory(0, error)
    with pytest.raises(type(error)) as raised:
        list(Batches(4).run(4, work))
    assert raised.value is error
    assert work.tried == [(0, 4)]


def test_an_error_of_the_consumer_is_not_taken_for_one_of_the_work() -> None:
    work = Memory(4)
    running = Batches(2).run(4, work)
    next(running)
    with pytest.raises(MemoryError):
        running.throw(MemoryError)  # type: ignore[attr-defined]
    assert work.tried == [(0, 2)]


def test_nothing_to_do_is_done() -> None:
    assert list(Batches(0).run(0, Memory(1))) == []
    assert [items for _, items in Batches(0).run(2, Memory(1))] == [[0], [1]]


@pytest.fixture
def three_threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8])
def test_side_by_side_every_item_is_done_once_and_in_order(three_threads: int, count: int) -> None:
    with SideBySide(torch.device("cpu")) as threads:
        parts = threads.run(lambda start, stop: list(range(start, stop)), count)
    assert [item for part in parts for item in part] == list(range(count))
    assert len(parts) == min(three_threads, count)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_side_by_side_each_thread_computes_alone_and_torch_keeps_its_number(three_threads: int) -> None:
    def work(start: int, stop: int) -> tuple[int, str]:
        # the first operation of a thread is where torch would give it the usual number
        torch.ones(1 << 16).sum()
        return torch.get_num_threads(), threading.current_thread().name

    before = set(threading.enumerate())
    with SideBySide(torch.device("cpu")) as threads:
        found = threads.run(work, 3)
        assert torch.get_num_threads() == three_threads
    assert [number for number, _ in found] == [1, 1, 1]
    assert threading.current_thread().name not in {name for _, name in found}
    later: list[int] = []
    another = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    another.start()
    another.join()
    assert later == [three_threads]
    assert set(threading.enumerate()) <= before


def test_side_by_side_the_first_error_is_raised_when_all_parts_are_done(three_threads: int) -> None:
    done: list[int] = []

    def work(start: int, stop: int) -> None:
        if start == 0:
            raise ValueError("first")
        time.sleep(0.05)
        done.append(start)

    with SideBySide(torch.device("cpu")) as threads, pytest.raises(ValueError, match="first"):
        threads.run(work, 3)
    assert sorted(done) == [1, 2]


@pytest.mark.parametrize("count", [0, 1, 5, 40])
def test_mapped_items_come_in_order_and_only_a_few_ahead(three_threads: int, count: int) -> None:
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        time.sleep(0.002 * (item % 3))
        return item

    with SideBySide(torch.device("cpu")) as threads:
        for number, found in enumerate(threads.map(work, range(count))):
            assert found == number
            assert len(started) <= number + 2 + 2 * three_threads
    assert sorted(started) == list(range(count))


def test_whoever_stops_taking_results_leaves_nothing_running(three_threads: int) -> None:
    ended: list[int] = []

    def work(item: int) -> int:
        time.sleep(0.01)
        ended.append(item)
        return item

    with SideBySide(torch.device("cpu")) as threads:
        results = threads.map(work, range(30))
        assert next(results) == 0
        results.close()  # type: ignore[attr-defined]
        done = len(ended)
        time.sleep(0.05)
        assert len(ended) == done < 30


def test_lasting_threads_stay_until_their_number_changes(three_threads: int) -> None:
    device = torch.device("cpu")
    threads = lasting_threads(device)
    assert threads is lasting_threads(device)
    assert list(threads.map(lambda item: torch.get_num_threads(), range(3))) == [1, 1, 1]
    # work that asks for them itself computes alone, and leaves them as they are
    assert list(threads.map(lambda item: lasting_threads(device).count, range(3))) == [1, 1, 1]
    assert threads is lasting_threads(device)
    torch.set_num_threads(2)
    assert lasting_threads(device).count == 2


def test_on_a_gpu_a_batch_stays_whole() -> None:
    with SideBySide(torch.device("cuda")) as threads:
        assert threads.run(lambda start, stop: (start, stop), 5) == [(0, 5)]
