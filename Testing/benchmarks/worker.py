"""A volume's way to the worker and its mask's way back, with everything but the models.

Run as a script this file is that worker: the real process, protocol and session around a pipeline that reads the whole
volume as the real one does (slices, grey levels, a hash of the voxels) and then draws what is bright.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.settings import TextSegmentationSettings
from FreqSegLib.volume import Volume
from FreqSegLib.worker_client import WorkerClient
from Testing.benchmarks.measuring import Section, seconds

COMMAND = [sys.executable, "-m", "Testing.benchmarks.worker"]
SHAPE = (150, 256, 256)
GOAL = 1.0
STEP = 0.02
STEP_GOAL = 0.05
WAIT = 600.0


def worker_round_trip(repeats: int, shapes: Sequence[tuple[int, int, int]]) -> Section:
    """Args:
    repeats: of each volume's way.
    shapes: (k, j, i) of the volumes; the first one's time is held against the goal.
    """
    section = Section("The worker: a volume there, its mask back, no model")
    with WorkerClient(COMMAND) as client:
        started = seconds(lambda: client.wait(client.send("models", action="folder"), timeout=WAIT))
        _round(client, _volume((4, 8, 8), 0))
        rows, totals = [], []
        for shape in shapes:
            rounds = [_round(client, _volume(shape, number)) for number in range(repeats)]
            totals.append(median(one["all"] for one in rounds))
            parts = [median(one[name] for one in rounds) for name in ("export", "set_volume", "segment", "read", "all")]
            longest = max(one["longest step"] for one in rounds)
            size = f"{shape[2]} x {shape[1]} x {shape[0]}"
            rows.append([size, *(f"{part:.3f}" for part in parts), f"{1000 * longest:.0f}"])
            wrong = max(one["wrong voxels"] for one in rounds)
            section.check(f"Voxels of the mask that are wrong, {size}", wrong, 0)
        section.table(
            ["int16 voxels", "export, s", "set_volume, s", "segment, s", "read, s", "all, s", "longest step, ms"], rows
        )
        section.say(
            f"Export in steps of {1000 * STEP:.0f} ms as the panel makes them; segment includes writing mask and "
            "saliency (float32). The longest step is of export, send and poll: what the panel's thread waits."
        )
        section.say(f"- Starting the worker (Python, numpy, the protocol; no torch): {started:.2f} s")
        section.goal(f"Round trip at {rows[0][0]}, s", totals[0], GOAL, at_least=False)
        steps = max(float(row[-1]) for row in rows) / 1000
        section.goal("Longest time the caller's thread was held, s", steps, STEP_GOAL, at_least=False)
    return section


def _volume(shape: tuple[int, int, int], number: int) -> NDArray[np.int16]:
    """Noise with a bright box, no two alike."""
    rng = np.random.default_rng(number)
    array = rng.integers(0, 400, shape, dtype=np.int16)
    array[tuple(slice(side // 4, side // 2) for side in shape)] += 600
    return array


def _round(client: WorkerClient, array: NDArray[np.int16]) -> dict[str, float]:
    steps: list[float] = []

    def measured(work: Any) -> Any:
        began = time.perf_counter()
        found = work()
        steps.append(time.perf_counter() - began)
        return found

    def asked(request: str, **values: Any) -> tuple[str, dict[str, Any]]:
        number = measured(lambda: client.send(request, **values))
        while True:
            for event in measured(client.poll):
                if event.request == number and event.kind == "result":
                    return number, event.values
                if event.kind == "error":
                    raise RuntimeError(event.message)
            time.sleep(0.002)

    began = time.perf_counter()
    export = measured(lambda: client.export(array))
    while not measured(lambda: export.step(STEP)):
        pass
    exported = time.perf_counter()
    volume = {"array": export.described(), "affine": np.eye(4)}
    first, found = asked("set_volume", volume=volume)
    was_set = time.perf_counter()
    second, answer = asked("segment", volume_id=found["volume_id"], prompts=["bright"])
    segmented = time.perf_counter()
    mask = np.array(client.read(answer["segments"][0]["mask"]))
    end = time.perf_counter()
    for number in (first, second):
        client.release(number)
    return {
        "export": exported - began,
        "set_volume": was_set - exported,
        "segment": segmented - was_set,
        "read": end - segmented,
        "all": end - began,
        "longest step": max(steps),
        "wrong voxels": float(np.count_nonzero(mask != (array > 500))),
    }


@dataclass
class _Found:
    name: str
    mask: NDArray[np.bool_]
    saliency: NDArray[np.float32]
    slice_scores: NDArray[np.float32]
    uncertainty: None = None
    score: float = 1.0
    color: tuple[float, float, float] = (0.5, 0.5, 0.5)
    meaning: None = None
    method: str = "zero-shot"
    is_empty: bool = False


class _Bright:
    """As much of a TextSegmenter as the worker asks for."""

    def use(self, prepared: Any) -> None:
        self.prepared = prepared

    def set_volume(self, volume: Volume, *, progress: Any, cancel: Any, settings: TextSegmentationSettings) -> Any:
        from FreqSegLib.intensity import normalise
        from FreqSegLib.slices import SliceStack

        key = hashlib.sha256(np.ascontiguousarray(volume.array).data).hexdigest()
        stack = SliceStack.of(volume, settings.axis)
        self.prepared = SimpleNamespace(volume=volume, stack=stack, intensity=normalise(volume), key=key)
        return self.prepared

    def segment(self, prompts: Sequence[str], *, progress: Any, cancel: Any, settings: Any) -> Any:
        mask = np.asarray(self.prepared.volume.array) > 500
        scores = np.ones(self.prepared.stack.count, dtype=np.float32)
        return _Answer(_Found(prompt, mask, mask.astype(np.float32), scores) for prompt in prompts)


class _Answer(list[_Found]):
    warnings: tuple[str, ...] = ()


def _serve() -> int:
    from FreqSegLib import worker
    from FreqSegLib.worker_session import Session

    return worker.main(lambda: Session(lambda choice, cache: _Bright()).handlers)


if __name__ == "__main__":
    sys.exit(_serve())
