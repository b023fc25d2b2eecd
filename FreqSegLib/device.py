"""Which device to compute on, and batches that shrink when memory runs out instead of failing."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise
from threading import Barrier
from typing import TYPE_CHECKING, TypeVar

from FreqSegLib.errors import DeviceError

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

# CUDA; torch's CPU allocator on Linux and macOS, and on Windows; cuBLAS and cuDNN
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


def resolve_device(name: str = "auto") -> torch.device:
    """``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N`` as a torch device.

    Raises:
        DeviceError: CUDA was asked for and is absent, or the device is not supported.
    """
    import torch

    wanted = name.strip().lower()
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cpu":
        return torch.device("cpu")
    if wanted.startswith("cuda"):
        if not torch.cuda.is_available():
            raise DeviceError(f"device '{name}' was asked for, but this machine has no usable CUDA GPU. Use 'cpu'.")
        number = wanted.removeprefix("cuda").removeprefix(":") or "0"
        if not number.isdigit() or int(number) >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise DeviceError(f"device '{name}' does not exist; this machine has {count} CUDA GPU(s), from cuda:0.")
        return torch.device(f"cuda:{number}")
    raise DeviceError(f"device must be auto, cpu or cuda[:N], got '{name}'; others are untested, and so refused.")


def default_batch_size(device: torch.device) -> int:
    """Slices at once: 1 on a CPU, where one slice's feature maps already fill the caches; 8 on a GPU."""
    return 8 if device.type == "cuda" else 1


class Batches:
    """Runs work in batches; when memory runs out the batch is halved, and stays so for the rest of the run."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = max(1, batch_size)

    def run(self, count: int, work: Callable[[range], Result]) -> Iterator[tuple[range, Result]]:
        """Yield (indices, ``work(indices)``) until all of ``count`` are done.

        Raises:
            DeviceError: a single item does not fit.
        """
        start = 0
        while start < count:
            indices = range(start, min(start + self.batch_size, count))
            try:
                result = work(indices)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(indices) == 1:
                    raise DeviceError(
                        "Not enough memory for a single slice. Close other programs, crop the volume, or use another "
                        f"device (--device cpu). The system said: {first_line(error)}"
                    ) from error
            else:
                yield indices, result
                start = indices.stop
                continue
            # only after the except block has the error let go of the failed batch's tensors
            self.batch_size = len(indices) // 2
            release_memory()


class MeasuredBatches(Batches):
    """Batches whose size is found by measuring, while the work is done.

    Each size is tried three times, and the better of the last two counts, since other programs disturb single times.
    Sizes double as long as an item takes clearly less time than before, up to ``most``; then the best size stays. On a
    CPU that often is one item at a time.
    """

    GAIN = 0.9
    TRIES = 3

    def __init__(self, most: int) -> None:
        super().__init__(1)
        self.most = max(1, most)
        self.seconds: dict[int, float] = {}
        """Seconds an item, by batch size, as measured so far."""
        self._settled = most == 1
        self._times: list[float] = []

    def run(self, count: int, work: Callable[[range], Result]) -> Iterator[tuple[range, Result]]:
        """As :meth:`Batches.run`."""
        return super().run(count, self._timed(work))

    def _timed(self, work: Callable[[range], Result]) -> Callable[[range], Result]:
        def timed(indices: range) -> Result:
            size = self.batch_size
            started = time.perf_counter()
            try:
                result = work(indices)
            except Exception:
                # a size that does not fit must not be tried again
                self._settled = True
                raise
            if not self._settled and len(indices) == size:
                self._times.append((time.perf_counter() - started) / size)
                if len(self._times) == self.TRIES:
                    self._learn(size, min(self._times[1:]))
                    self._times = []
            return result

        return timed

    def _learn(self, size: int, seconds: float) -> None:
        before = self.seconds.get(size // 2)
        self.seconds[size] = seconds
        if before is not None and seconds > self.GAIN * before:
            self.batch_size, self._settled = size // 2, True
        elif 2 * size > self.most:
            self._settled = True
        else:
            self.batch_size = 2 * size


class SideBySide:
    """CPU threads that compute with one core each, side by side.

    Operations on small tensors gain little from several threads within one: two threads on a slice each were 1.6 to 2.3
    times as fast as two threads on one slice (the fusion networks, 256 and 512 pixels). On a GPU work stays whole.

    Example:
        >>> with SideBySide(device) as threads:
        ...     parts = threads.run(lambda start, stop: network(images[start:stop]), len(images))
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self.count = torch.get_num_threads() if device.type == "cpu" else 1
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> SideBySide:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def run(self, work: Callable[[int, int], Result], count: int) -> list[Result]:
        """``work(start, stop)`` for even parts of ``count`` items, one part a thread; the results in order.

        Raises:
            Exception: what ``work`` raised first, once all parts are done.
        """
        parts = max(1, min(self.count, count))
        cuts = [count * part // parts for part in range(parts + 1)]
        return list(self.map(lambda cut: work(*cut), list(pairwise(cuts))))

    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """``work(item)`` for every item, in order; a few are computed ahead.

        Threads know nothing of the caller's gradient or inference mode: without one, gradients are recorded.

        Raises:
            Exception: what ``work`` raised, once nothing is computed any more.
        """
        if min(self.count, len(items)) <= 1:
            yield from map(work, items)
            return
        pool = self._threads()
        ahead: deque[Future[Result]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(work, item))
                if len(ahead) > 2 * self.count:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            wait(ahead)

    def _threads(self) -> ThreadPoolExecutor:
        import torch

        if self._pool is None:
            everyone = Barrier(self.count + 1)

            def alone() -> None:
                # asking makes the thread take its number; without it the first operation would, and undo what is set
                torch.get_num_threads()
                torch.set_num_threads(1)
                everyone.wait()

            self._pool = ThreadPoolExecutor(self.count, "freqseg", initializer=alone)
            for _ in range(self.count):
                # a thread that still waits at the barrier is not idle, so every one of these starts another
                self._pool.submit(int)
            everyone.wait()
            # torch keeps a number for each thread and one for those to come, which the new threads have just changed
            torch.set_num_threads(self.count)
        return self._pool


def lasting_threads(device: torch.device) -> SideBySide:
    """Threads that stay for the next call, for work of milliseconds; new ones after a fork or another thread number."""
    threads = SideBySide(device)
    if threads.count == 1:
        # a thread that computes alone may itself be one of those
        return threads
    key = (os.getpid(), threads.count)
    if key not in _LASTING:
        _LASTING.clear()
        _LASTING[key] = threads
    return _LASTING[key]


_LASTING: dict[tuple[int, int], SideBySide] = {}


def is_out_of_memory(error: BaseException) -> bool:
    """Is this how torch or Python say that memory ran out?"""
    if isinstance(error, MemoryError):
        return True
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in text for phrase in OUT_OF_MEMORY)


def release_memory() -> None:
    """Give cached GPU memory back before the next, smaller try."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
