"""A worker's client without a worker: it thresholds. Light enough to test the panel in milliseconds."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_STAGES = {"set_volume": "Reading slices", "fuse": "Fusing", "spectral_segment": "Segmenting slices"}


@dataclass(frozen=True)
class FakeEvent:
    request: str
    kind: str
    stage: str = ""
    done: int = 0
    total: int = 0
    seconds_left: float | None = None
    values: dict[str, Any] = field(default_factory=dict)
    code: str = ""
    message: str = ""


class FakeExport:
    def __init__(self, array: np.ndarray, path: Path) -> None:
        self._array, self._path = array, path

    def step(self, seconds: float = 0.02) -> bool:
        self._array.tofile(self._path)
        return True

    def described(self) -> dict[str, Any]:
        return describe(self._path, self._array)


def describe(path: Path, array: np.ndarray) -> dict[str, Any]:
    return {"file": str(path), "dtype": array.dtype.str, "shape": list(array.shape), "offset": 0}


class FakeClient:
    """Answers a request after ``patience`` polls. ``requests`` holds what was sent.

    A prompt finds the voxels above ``level``; ``refuse`` makes a request fail with a code and a sentence.
    """

    def __init__(self, level: float = 100.0, patience: int = 2) -> None:
        self.level, self.patience = level, patience
        self.folder = Path(tempfile.mkdtemp(prefix="fake-client-"))
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.refuse: dict[str, tuple[str, str]] = {}
        self.running = False
        self.closed = False
        self.released: list[str] = []
        self.models: list[dict[str, Any]] = []
        self.transform: list[list[float]] | None = None
        self.fusion_warnings: list[str] = []
        self.warnings: list[str] = []
        self._volumes: dict[str, tuple[np.ndarray, dict[str, Any]]] = {}
        self._pending: dict[str, list[Any]] = {}
        self._events: deque[FakeEvent] = deque()
        self._count = 0

    def names(self) -> list[str]:
        return [name for name, _values in self.requests]

    def last(self, name: str) -> dict[str, Any]:
        return next(values for sent, values in reversed(self.requests) if sent == name)

    def send(self, request: str, **values: Any) -> str:
        self.running = True
        self._count += 1
        number = str(self._count)
        self.requests.append((request, values))
        self._pending[number] = [request, values, self.patience]
        return number

    def poll(self) -> list[FakeEvent]:
        for number in list(self._pending):
            pending = self._pending[number]
            pending[2] -= 1
            if pending[2] > 0:
                stage = _STAGES.get(pending[0], "Looking")
                self._events.append(FakeEvent(number, "progress", stage, 1, 4, 12.0))
                continue
            del self._pending[number]
            self._events.append(self._answer(number, pending[0], pending[1]))
        found = list(self._events)
        self._events.clear()
        return found

    def cancel(self, request_id: str) -> None:
        if self._pending.pop(request_id, None) is not None:
            self._events.append(FakeEvent(request_id, "error", code="cancelled", message="The run was cancelled."))

    def export(self, array: np.ndarray) -> FakeExport:
        self._count += 1
        return FakeExport(np.ascontiguousarray(array), self.folder / f"export-{self._count}.raw")

    def read(self, described: dict[str, Any]) -> np.ndarray:
        shape = tuple(described["shape"])
        return np.memmap(described["file"], dtype=described["dtype"], mode="r", shape=shape)

    def release(self, request_id: str) -> None:
        self.released.append(request_id)
        shutil.rmtree(self.folder / request_id, ignore_errors=True)

    def close(self) -> None:
        self.running, self.closed = False, True
        shutil.rmtree(self.folder, ignore_errors=True)

    def _answer(self, number: str, request: str, values: dict[str, Any]) -> FakeEvent:
        if request in self.refuse:
            code, message = self.refuse[request]
            return FakeEvent(number, "error", code=code, message=message)
        answer = getattr(self, f"_{request}")(number, **values)
        return FakeEvent(number, "result", values=answer)

    def _set_volume(self, number: str, volume: dict[str, Any], **rest: Any) -> dict[str, Any]:
        array = np.array(self.read(volume["array"]))
        volume_id = f"volume-{number}"
        self._volumes[volume_id] = (array, rest)
        return {
            "volume_id": volume_id,
            "slices": len(array),
            "axis": "axial",
            "array_axis": 0,
            "warnings": [],
            "ran": ["Reading slices"],
            "encoded": len(array),
        }

    def _segment(
        self, number: str, volume_id: str, prompts: list[str], uncertainty: bool = False, settings: Any = None
    ) -> dict[str, Any]:
        array, rest = self._volumes[volume_id]
        mask = (array > self.level).astype(np.uint8)
        if rest.get("roi"):
            inside = np.zeros_like(mask)
            (i0, i1), (j0, j1), (k0, k1) = rest["roi"]
            inside[k0:k1, j0:j1, i0:i1] = 1
            mask &= inside
        found = [self._found(number, prompt, mask, uncertainty) for prompt in prompts]
        return {"segments": found, "warnings": [], "ran": ["Looking", "Drawing"], "encoded": 0}

    def _found(self, number: str, prompt: str, mask: np.ndarray, uncertainty: bool) -> dict[str, Any]:
        if prompt.startswith("absent"):
            mask = np.zeros_like(mask)
        count = int(mask.sum())
        sentence = f"{prompt}: {count} voxels." if count else f"{prompt} was not found."
        spread = self._write(number, "uncertainty", mask.astype(np.float32) * 0.2) if uncertainty else None
        return {
            "name": prompt,
            "mask": self._write(number, f"mask-{prompt}", mask),
            "saliency": self._write(number, f"saliency-{prompt}", mask.astype(np.float32)),
            "uncertainty": spread,
            "score": 0.9 if count else 0.1,
            "slice_scores": [0.5] * len(mask),
            "color": [0.1, 0.2, 0.3],
            "meaning": prompt,
            "empty": not count,
            "sentence": sentence,
        }

    def _preview_slice(self, number: str, prompts: list[str], **values: Any) -> dict[str, Any]:
        if "volume_id" in values:
            array = np.take(self._volumes[values["volume_id"]][0], [values["index"]], axis=0)
        else:
            array = np.array(self.read(values["volume"]["array"]))
        mask = (array > self.level).astype(np.uint8)
        found = [self._found(number, prompt, mask, False) for prompt in prompts]
        alone = "volume" in values
        return {"segments": found, "alone": alone, "array_axis": 0, "index": None, "warnings": [], "ran": []}

    def _refine(self, number: str, volume_id: str, mask: dict[str, Any], points: Any = (), box: Any = None) -> Any:
        """Every point sets or clears its slice around it; a box is filled."""
        refined = np.array(self.read(mask))
        changed = set()
        for i, j, k, label in points:
            i, j, k = round(i), round(j), round(k)
            refined[k, max(j - 2, 0) : j + 3, max(i - 2, 0) : i + 3] = label
            changed.add(k)
        if box is not None:
            (i0, j0, k0), (i1, j1, k1) = [[round(x) for x in corner] for corner in box]
            refined[k0 : k1 + 1, j0 : j1 + 1, i0 : i1 + 1] = 1
            changed |= set(range(k0, k1 + 1))
        written = self._write(number, "refined", refined)
        return {"mask": written, "slices_changed": sorted(changed), "array_axis": 0, "warnings": [], "ran": []}

    def _frequency_images(self, number: str, volume_id: str, settings: Any = None) -> dict[str, Any]:
        array = self._volumes[volume_id][0].astype(np.float32)
        low = self._write(number, "low", array)
        high = self._write(number, "high", np.abs(array - array.mean()))
        return {"low": low, "high": high, "warnings": []}

    def _fuse(
        self, number: str, ct: Any, mr: Any, settings: Any = None, device: str = "auto", masks: bool = False
    ) -> dict[str, Any]:
        """The mean of the CT and of the MR's nearest voxel, 0 outside of the MR, by the places that were sent."""
        still, mobile = (np.array(self.read(one["array"])).astype(np.float32) for one in (ct, mr))
        k, j, i = np.indices(still.shape)
        between = np.linalg.inv(np.array(mr["affine"])) @ np.array(ct["affine"])
        x, y, z = np.rint(np.tensordot(between[:3], np.stack([i, j, k, np.ones_like(i)]), 1)).astype(int)
        depth, height, width = mobile.shape
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height) & (z >= 0) & (z < depth)
        there = np.zeros_like(still)
        there[inside] = mobile[z[inside], y[inside], x[inside]]
        bands = ("level 1 LH", "low") if masks else ()
        share = np.full(still.shape, 40, dtype=np.uint8)
        return {
            "fused": self._write(number, "fused", (still + there) / 2),
            "affine": ct["affine"],
            "name": "fused",
            "masks": [{"name": band, "share": self._write(number, band, share)} for band in bands],
            "record": json.dumps({"method": settings["method"], "transform": self.transform}),
            "warnings": list(self.fusion_warnings),
            "ran": ["Fusing"],
        }

    def _spectral_segment(
        self, number: str, volume: Any, model: str, device: str = "auto", uncertainty: str | None = None
    ) -> dict[str, Any]:
        """The first class is what is brighter than ``level``, each further one 100 brighter; the rest is background."""
        array = np.array(self.read(volume["array"])).astype(np.float32)
        classes = json.loads((Path(model) / "model.json").read_text(encoding="utf-8"))["classes"]
        labels = np.clip(np.floor((array - self.level) / 100) + 1, 0, len(classes))
        segments = [
            {
                "name": one["name"],
                "mask": self._write(number, f"mask-{label}", (labels == label).astype(np.uint8)),
                "color": one["color"],
            }
            for label, one in enumerate(classes, start=1)
        ]
        doubt = {
            kind: self._write(number, kind, (labels > 0).astype(np.float32) * 0.3)
            for kind in (("mean", "entropy", "mutual_information") if uncertainty else ())
        }
        return {"segments": segments, "uncertainty": doubt or None, "warnings": list(self.warnings), "ran": []}

    def _models(self, number: str, action: str, id: str | None = None) -> dict[str, Any]:
        if action == "list":
            return {"models": [dict(model) for model in self.models]}
        model = next(model for model in self.models if model["id"] == id)
        if action == "get":
            model |= {"installed": True, "state": "installed", "removable": True, "folder": "/weights"}
            return {"folder": "/weights"}
        if action == "remove":
            model |= {"installed": False, "state": "missing", "removable": False, "folder": None}
            return {"freed": model["size"]}
        return {"sound": True, "findings": []}

    def _write(self, number: str, name: str, array: np.ndarray) -> dict[str, Any]:
        folder = self.folder / number
        folder.mkdir(exist_ok=True)
        path = folder / f"{name.replace(' ', '-').replace('/', '-')}.raw"
        array.tofile(path)
        return describe(path, array)
