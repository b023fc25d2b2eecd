"""A worker without models: the real process, protocol and session, with a pipeline that only follows orders.

Run as a script in the worker's place: ``WorkerClient(command=[sys.executable, ".../fake_worker.py"])``. What it does is
said by the prompt: "bright" finds voxels above half of the maximum, "slowly" takes its time between slices and listens
to cancel, "stubborn" does neither, "memory", "torch memory", "bug", "print", "crash", "child", "exit" do just that.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from FreqSegLib import worker
from FreqSegLib.errors import DeviceError
from FreqSegLib.intensity import Normalised
from FreqSegLib.progress import Progress, Stage
from FreqSegLib.settings import TextSegmentationSettings
from FreqSegLib.slices import SliceStack
from FreqSegLib.volume import Volume
from FreqSegLib.worker_session import ModelChoice, Session

CHILD = [sys.executable, "-c", "import time; time.sleep(120)"]


@dataclass
class Prepared:
    volume: Volume
    stack: SliceStack
    intensity: Normalised
    key: str
    axis: str = "auto"


@dataclass
class Result:
    name: str
    mask: NDArray[np.bool_]
    saliency: NDArray[np.float32]
    slice_scores: NDArray[np.float32]
    uncertainty: NDArray[np.float32] | None = None
    score: float = 0.75
    color: tuple[float, float, float] = (0.1, 0.2, 0.3)
    meaning: str | None = None
    method: str = "zero-shot"

    @property
    def is_empty(self) -> bool:
        return not self.mask.any()


class Results(list[Result]):
    warnings: tuple[str, ...] = ()


class FakeSegmenter:
    """As much of a TextSegmenter as the session needs."""

    def __init__(self, choice: ModelChoice) -> None:
        self.choice = choice
        self.known: set[str] = set()
        self.prepared: Prepared | None = None

    def use(self, prepared: Prepared) -> None:
        self.prepared = prepared

    def set_volume(self, volume: Volume, *, progress, cancel, settings: TextSegmentationSettings) -> Prepared:
        stack = SliceStack.of(volume, settings.axis)
        key = f"{float(volume.array[0, 0, 0])} {volume.shape} {volume.name}"
        stage = Stage("Reading slices", 0 if key in self.known else stack.count, progress, cancel)
        if key not in self.known:
            for index in range(stack.count):
                if volume.name == "slowly":
                    time.sleep(0.1)
                stage.advance(index + 1)
        self.known.add(key)
        self.prepared = Prepared(volume, stack, Normalised(0, 1, "as it is"), key, settings.axis)
        return self.prepared

    def segment(self, prompts: Sequence[str], *, progress, cancel, settings: TextSegmentationSettings) -> Results:
        assert self.prepared is not None
        return Results(self._found(prompt, self.prepared, progress, cancel) for prompt in prompts)

    def _found(self, prompt: str, prepared: Prepared, progress: Any, cancel: Any) -> Result:
        volume = prepared.volume
        stage = Stage(f"Looking: {prompt}", 100, progress, cancel)
        if prompt == "slowly":
            # over a minute, in steps short enough to be cancelled between them
            for index in range(1300):
                time.sleep(0.05)
                stage.advance(min(index + 1, 100))
        if prompt == "stubborn":
            progress(Progress("Thinking", 50, 100, None))
            time.sleep(60)
        if prompt == "memory":
            raise MemoryError("cannot allocate 900 GB")
        if prompt == "torch memory":
            raise DeviceError("Not enough memory for a single slice.") from MemoryError("CUDA out of memory")
        if prompt == "bug":
            raise KeyError("a defect")
        if prompt == "print":
            print('{"id": "1", "event": "result", "values": {"from": "print"}}', flush=True)
            os.write(1, b'{"id": "1", "event": "result", "values": {"from": "write"}}\n')
            ctypes.CDLL(None).puts(b'{"id": "1", "event": "result", "values": {"from": "puts"}}')
            ctypes.CDLL(None).fflush(None)
            subprocess.run([sys.executable, "-c", "print('{}'); input()"], check=False)
        if prompt == "crash":
            os.abort()
        if prompt == "exit":
            os._exit(3)
        if prompt == "child":
            child = subprocess.Popen(CHILD)
            progress(Progress(f"child {child.pid}", 1, 2, None))
            time.sleep(60)
        array = np.asarray(volume.array)
        mask = array > array.max() / 2
        scores = prepared.stack.displayed(mask).any((1, 2)).astype(np.float32)
        return Result(prompt, mask, mask.astype(np.float32) / 2, scores)


if __name__ == "__main__":
    if "--no-start" in sys.argv:
        sys.exit("ModuleNotFoundError: No module named 'torch'")
    sys.exit(worker.main(lambda: Session(lambda choice, cache: FakeSegmenter(choice)).handlers))
