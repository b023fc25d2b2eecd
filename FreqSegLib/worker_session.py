"""What the worker computes, and what stays warm between requests: the models, two volumes and their results.

Nothing heavy is imported before a request needs it.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.embedding_cache import FEATURES, EmbeddingCache
from FreqSegLib.errors import InputError
from FreqSegLib.progress import Progress, Stage
from FreqSegLib.protocol import (
    FrequencyImages,
    Fuse,
    Info,
    Models,
    PreviewSlice,
    Refine,
    Region,
    RequestError,
    Segment,
    SetVolume,
    SpectralSegment,
    VolumeDescription,
    WorkerError,
    settings_of,
    unknown_volume,
    write_array,
)
from FreqSegLib.settings import FusionSettings, TextSegmentationSettings
from FreqSegLib.volume import Volume

if TYPE_CHECKING:
    from FreqSegLib.text_results import PromptResult
    from FreqSegLib.text_segmentation import TextSegmenter
    from FreqSegLib.text_stages import PreparedVolume
    from FreqSegLib.worker import Handler, Job

KEPT_VOLUMES = 2
KEPT_BYTES = 500_000_000
FILTERED_AT_ONCE = 8


@dataclass(frozen=True)
class ModelChoice:
    """Which models, and where they compute."""

    preset: str = "lite"
    device: str = "auto"
    sam: str | None = None
    clip_folder: str | None = None
    sam_checkpoint: str | None = None


LoadSegmenter = Callable[[ModelChoice, EmbeddingCache], Any]


def load_segmenter(choice: ModelChoice, cache: EmbeddingCache) -> TextSegmenter:
    """The text-guided pipeline with that choice's weights."""
    from FreqSegLib.text_segmentation import TextSegmenter

    return TextSegmenter.from_preset(
        choice.preset,
        device=choice.device,
        sam=choice.sam,
        clip_folder=None if choice.clip_folder is None else Path(choice.clip_folder),
        sam_checkpoint=None if choice.sam_checkpoint is None else Path(choice.sam_checkpoint),
        cache=cache,
    )


@dataclass(frozen=True)
class KeptSegment:
    """A prompt's result, whose arrays lie in files of the worker's own."""

    values: dict[str, Any]
    files: dict[str, Path]
    warnings: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(
            math.prod(self.values[kind]["shape"]) * np.dtype(self.values[kind]["dtype"]).itemsize for kind in self.files
        )

    def remove(self) -> None:
        """Delete the files; on Windows one that the parent still reads stays until the folder goes."""
        for path in self.files.values():
            with suppress(OSError):
                path.unlink(missing_ok=True)


@dataclass
class KeptVolume:
    """A volume that was set. ``region`` are the (k, j, i) slices of the whole grid the pipeline sees."""

    number: str
    choice: ModelChoice
    whole: tuple[int, int, int]
    region: tuple[slice, slice, slice]
    settings: TextSegmentationSettings
    prepared: PreparedVolume
    results: OrderedDict[tuple[str, TextSegmentationSettings], KeptSegment] = field(default_factory=OrderedDict)

    @property
    def array_axis(self) -> int:
        """Along which the slices are stacked: 0 (k), 1 (j) or 2 (i)."""
        return int(self.prepared.stack.order[0])

    def on_whole(self, array: NDArray[Any]) -> NDArray[Any]:
        """An array of the region on the whole grid, zero elsewhere."""
        if array.shape == self.whole:
            return array
        target = np.zeros(self.whole, dtype=array.dtype)
        target[self.region] = array
        return target

    def stack_index(self, index: int) -> int:
        """Which slice of the stack lies at that voxel of the whole grid.

        Raises:
            InputError: none does.
        """
        here = self.region[self.array_axis]
        if not here.start <= index < here.stop:
            raise InputError(
                f"Slice {index} lies outside what is segmented (slices {here.start} to {here.stop - 1}). Choose "
                "another slice, or move the region of interest."
            )
        count = here.stop - here.start
        return count - 1 - (index - here.start) if self.prepared.stack.flips[0] else index - here.start

    def voxel_index(self, slice_index: int) -> int:
        """The inverse of :meth:`stack_index`."""
        here = self.region[self.array_axis]
        position = here.stop - here.start - 1 - slice_index if self.prepared.stack.flips[0] else slice_index
        return here.start + position


class Session:
    """Answers the requests. Not for several threads at once, but for ``models``."""

    def __init__(self, load: LoadSegmenter = load_segmenter) -> None:
        self._load = load
        self._cache = SliceCache()
        self._segmenter: tuple[ModelChoice, Any] | None = None
        self._other: tuple[tuple[Any, str, float, dict[str, Any]], Any] | None = None
        self._volumes: OrderedDict[str, KeptVolume] = OrderedDict()
        self._files = 0
        # set by another thread
        self._weights_changed = threading.Event()

    @property
    def handlers(self) -> dict[str, Handler]:
        """By the requests' names."""
        return {
            "set_volume": self.set_volume,
            "segment": self.segment,
            "preview_slice": self.preview_slice,
            "refine": self.refine,
            "frequency_images": self.frequency_images,
            "fuse": self.fuse,
            "spectral_segment": self.spectral_segment,
            "models": self.models,
            "info": self.info,
        }

    def set_volume(self, request: SetVolume, job: Job) -> dict[str, Any]:
        """See :class:`FreqSegLib.protocol.SetVolume`."""
        self._look_for_other_weights()
        settings = settings_of(TextSegmentationSettings, request.settings)
        volume, whole, region = _volume(request.volume, request.roi, request.fill_nonfinite)
        choice = _choice(request)
        with self._counted(job) as counts:
            prepared = self._models(choice, job).set_volume(
                volume, progress=job.progress, cancel=job.cancelled, settings=settings
            )
        number = _number(choice, whole, region, prepared)
        if number in self._volumes:
            # what was kept also holds what was computed since
            self._volumes.move_to_end(number)
            self._volumes[number].settings = settings
        else:
            self._volumes[number] = KeptVolume(number, choice, whole, region, settings, prepared)
        while len(self._volumes) > KEPT_VOLUMES:
            self._forget(self._volumes.popitem(last=False)[1])
        kept = self._volumes[number]
        return {
            "volume_id": number,
            "slices": prepared.stack.count,
            "axis": prepared.stack.axis,
            "array_axis": kept.array_axis,
            "warnings": [*volume.warnings, *prepared.intensity.warnings],
            "ran": job.ran,
            **counts,
        }

    def segment(self, request: Segment, job: Job) -> dict[str, Any]:
        """See :class:`FreqSegLib.protocol.Segment`."""
        from FreqSegLib.clip.prompts import clean_prompt

        kept = self._kept(request.volume_id)
        settings = _settings(kept.settings, request.settings, request.uncertainty)
        prompts = [clean_prompt(prompt) for prompt in request.prompts]
        known = {prompt for prompt in prompts if (prompt, settings) in kept.results}
        new = [prompt for prompt in prompts if prompt not in known] if len(set(prompts)) == len(prompts) else prompts
        with self._counted(job) as counts:
            if new or not prompts:
                segmenter = self._models(kept.choice, job)
                segmenter.use(kept.prepared)
                found = segmenter.segment(new, progress=job.progress, cancel=job.cancelled, settings=settings)
                for result in found:
                    others = [one.name for one in found if one is not result]
                    own = tuple(w for w in found.warnings if not any(f"'{other}'" in w for other in others))
                    self._keep(kept, settings, result, own, job)
        segments = [kept.results[prompt, settings] for prompt in prompts]
        answer = {
            "segments": [_given(segment, job.results()) for segment in segments],
            "warnings": list(dict.fromkeys(w for segment in segments for w in segment.warnings)),
            "ran": job.ran,
            **counts,
        }
        self._forget(kept, KEPT_BYTES)
        return answer

    def preview_slice(self, request: PreviewSlice, job: Job) -> dict[str, Any]:
        """See :class:`FreqSegLib.protocol.PreviewSlice`."""
        if request.volume is not None:
            return self._preview_sent(request, request.volume, job)
        if request.volume_id is None or request.index is None:
            raise RequestError("preview_slice needs a volume of one slice, or volume_id and index.")
        from FreqSegLib.clip.prompts import clean_prompt

        kept = self._kept(request.volume_id)
        settings = _settings(kept.settings, request.settings, False)
        prompts = [clean_prompt(prompt) for prompt in request.prompts]
        place = {"array_axis": kept.array_axis, "index": request.index}
        slice_index = kept.stack_index(request.index)
        segmented = all((prompt, settings) in kept.results for prompt in prompts)
        if prompts and segmented and settings.axis == kept.settings.axis:
            segments = [kept.results[prompt, settings] for prompt in prompts]
            given = [_slice_of(one, kept.array_axis, request.index, slice_index, job.results()) for one in segments]
            warnings = list(dict.fromkeys(w for one in segments for w in one.warnings))
            return {"segments": given, "alone": False, "warnings": warnings, "ran": [], "encoded": 0, **place}
        with self._counted(job) as counts:
            segmenter = self._models(kept.choice, job)
            alone = _one_slice(kept.prepared, slice_index)
            segmenter.use(alone)
            # its number counts along the axis the volume was set with
            settings = replace(settings, axis=kept.settings.axis)
            found = segmenter.segment(prompts, progress=job.progress, cancel=job.cancelled, settings=settings)
        given = [_given(_written(result, alone.volume, job.results(), str(n)), None) for n, result in enumerate(found)]
        return {
            "segments": given,
            "alone": True,
            "warnings": list(found.warnings),
            "ran": job.ran,
            **counts,
            **place,
        }

    def refine(self, request: Refine, job: Job) -> dict[str, Any]:
        """See :class:`FreqSegLib.protocol.Refine`."""
        from FreqSegLib.text_refinement import refine_segment

        kept = self._kept(request.volume_id)
        whole = request.mask.open()
        if whole.shape != kept.whole:
            raise InputError(
                f"The segment has {_by(whole.shape)} voxels, the volume {_by(kept.whole)}. Choose a segment on this "
                "volume's own grid."
            )
        corner = np.array([part.start for part in kept.region[::-1]], dtype=float)
        points = np.array(request.points, dtype=float).reshape(-1, 4)
        box = None if request.box is None else np.array(request.box) - corner
        with self._counted(job) as counts:
            refined = refine_segment(
                self._models(kept.choice, job),
                kept.prepared,
                np.ascontiguousarray(whole[kept.region]) != 0,
                points=points[:, :3] - corner,
                labels=points[:, 3],
                box=box,
                progress=job.progress,
                cancel=job.cancelled,
            )
        mask = np.array(whole, dtype=np.uint8)
        inside, drawn = (np.moveaxis(one, kept.array_axis, 0) for one in (mask[kept.region], refined.mask))
        changed = sorted(kept.voxel_index(index) for index in refined.slices_changed)
        for index in changed:
            position = index - kept.region[kept.array_axis].start
            inside[position] = drawn[position]
        return {
            "mask": write_array(job.results() / "mask.raw", mask).described(),
            "slices_changed": changed,
            "array_axis": kept.array_axis,
            "warnings": list(refined.warnings),
            "ran": job.ran,
            **counts,
        }

    def frequency_images(self, request: FrequencyImages, job: Job) -> dict[str, Any]:
        """See :class:`FreqSegLib.protocol.FrequencyImages`."""
        import torch

        from FreqSegLib.text_stages import branch_images

        kept = self._kept(request.volume_id)
        settings = _settings(kept.settings, request.settings, False)
        prepared, stack = kept.prepared, kept.prepared.stack
        found = {name: stack.empty(np.float32) for name in ("low", "high")}
        shown = {name: stack.displayed(array) for name, array in found.items()}
        stage = Stage("Filtering", stack.count, job.progress, job.cancelled)
        for start in range(0, stack.count, FILTERED_AT_ONCE):
            indices = range(start, min(start + FILTERED_AT_ONCE, stack.count))
            images = torch.from_numpy(np.stack([prepared.image(index) for index in indices]))[:, None]
            with torch.inference_mode():
                for name, pictures in branch_images(images, ("low", "high"), settings).items():
                    shown[name][indices.start : indices.stop] = pictures[:, 0].numpy()
            stage.advance(indices.stop)
        files = {
            name: write_array(job.results() / f"{name}.raw", kept.on_whole(array)).described()
            for name, array in found.items()
        }
        return {**files, "warnings": list(prepared.intensity.warnings), "ran": job.ran}

    def fuse(self, request: Fuse, job: Job) -> dict[str, Any]:
        """See :class:`FreqSegLib.protocol.Fuse`."""
        kind = _pipeline("FreqSegLib.volume_fusion", "VolumeFuser", "Fusing CT and MR")
        settings = settings_of(FusionSettings, request.settings)
        fuser = self._other_models(kind.from_preset, request.preset, job, device=request.device, settings=settings)
        ct, mr = _volume(request.ct)[0], _volume(request.mr)[0]
        result = fuser.fuse(ct, mr, masks=request.masks, progress=job.progress, cancel=job.cancelled)
        return {
            "fused": write_array(job.results() / "fused.raw", result.fused.array).described(),
            "affine": result.fused.affine.tolist(),
            "name": result.fused.name,
            "masks": [
                {"name": mask.name, "share": write_array(job.results() / f"mask-{n}.raw", mask.array).described()}
                for n, mask in enumerate(result.masks)
            ],
            "record": result.record.as_json(),
            "warnings": list(result.warnings),
            "ran": job.ran,
        }

    def spectral_segment(self, request: SpectralSegment, job: Job) -> dict[str, Any]:
        """See :class:`FreqSegLib.protocol.SpectralSegment`."""
        kind = _pipeline("FreqSegLib.spectral_segmentation", "SpectralSegmenter", "Spectral segmentation")
        segmenter = self._other_models(
            kind.from_model, request.model, job, stamp=_stamp(request.model), device=request.device
        )
        result = segmenter.segment(
            _volume(request.volume)[0],
            uncertainty=request.uncertainty,
            samples=request.samples,
            seed=request.seed,
            keep_probabilities=False,
            progress=job.progress,
            cancel=job.cancelled,
        )
        doubt = {} if result.uncertainty is None else vars(result.uncertainty)
        return {
            "segments": [
                {
                    "name": found.name,
                    "mask": write_array(job.results() / f"mask-{n}.raw", found.mask.astype(np.uint8)).described(),
                    "color": [float(part) for part in found.color],
                }
                for n, found in enumerate(result)
            ],
            "uncertainty": {
                name: write_array(job.results() / f"{name}.raw", one.array).described() for name, one in doubt.items()
            }
            or None,
            "warnings": list(result.warnings),
            "ran": job.ran,
        }

    def models(self, request: Models, job: Job) -> dict[str, Any]:
        """See :class:`FreqSegLib.protocol.Models`."""
        from FreqSegLib.worker_models import answer_models

        try:
            return answer_models(request, job)
        finally:
            if request.action in ("get", "remove"):
                self._weights_changed.set()

    def info(self, request: Info, job: Job) -> dict[str, Any]:
        """See :class:`FreqSegLib.protocol.Info`."""
        from FreqSegLib.worker_models import answer_info

        return answer_info()

    def _models(self, choice: ModelChoice, job: Job) -> Any:
        """The pipeline, loaded once as long as the choice stays."""
        if self._segmenter is None or self._segmenter[0] != choice:
            # let go of the old models first: two sets may not fit
            self._segmenter = None
            job.progress(Progress("Loading models", 0, 1, None))
            self._segmenter = (choice, self._load(choice, self._cache))
            job.progress(Progress("Loading models", 1, 1, 0.0))
        job.check()
        return self._segmenter[1]

    def _other_models(self, load: Callable[..., Any], name: str, job: Job, stamp: float = 0, **options: Any) -> Any:
        """Another pipeline's models, loaded once as long as the same, of the same ``stamp``, are asked for."""
        self._look_for_other_weights()
        wanted = (load, name, stamp, options)
        if self._other is None or self._other[0] != wanted:
            self._other = None
            job.progress(Progress("Loading models", 0, 1, None))
            self._other = (wanted, load(name, **options))
            job.progress(Progress("Loading models", 1, 1, 0.0))
        job.check()
        return self._other[1]

    def _look_for_other_weights(self) -> None:
        """What was fetched or removed since the models were loaded may change every result."""
        if self._weights_changed.is_set():
            self._weights_changed.clear()
            self._segmenter = self._other = None
            for kept in self._volumes.values():
                self._forget(kept)

    def _kept(self, number: str) -> KeptVolume:
        self._look_for_other_weights()
        if number not in self._volumes:
            raise unknown_volume(number)
        self._volumes.move_to_end(number)
        return self._volumes[number]

    @contextmanager
    def _counted(self, job: Job) -> Iterator[dict[str, int]]:
        """How many slices went through an image tower, filled in at the end."""
        counts = {"encoded": 0}
        before = self._cache.encoded
        yield counts
        counts["encoded"] = self._cache.encoded - before

    def _preview_sent(self, request: PreviewSlice, sent: VolumeDescription, job: Job) -> dict[str, Any]:
        volume, _, _ = _volume(sent)
        if 1 not in volume.shape:
            raise InputError(f"A preview takes one slice, got {_by(volume.shape)} voxels.")
        settings = _settings(TextSegmentationSettings(), request.settings, False)
        with self._counted(job) as counts:
            segmenter = self._models(_choice(request), job)
            prepared = segmenter.set_volume(volume, progress=job.progress, cancel=job.cancelled, settings=settings)
            found = segmenter.segment(request.prompts, progress=job.progress, cancel=job.cancelled, settings=settings)
        return {
            "segments": [_given(_written(one, volume, job.results(), str(n)), None) for n, one in enumerate(found)],
            "alone": True,
            "array_axis": int(prepared.stack.order[0]),
            "index": None,
            "warnings": list(found.warnings),
            "ran": job.ran,
            **counts,
        }

    def _keep(
        self,
        kept: KeptVolume,
        settings: TextSegmentationSettings,
        result: PromptResult,
        warnings: tuple[str, ...],
        job: Job,
    ) -> None:
        """Put a result on the whole grid and into files."""
        folder = job.parents_folder() / "kept"
        folder.mkdir(exist_ok=True)
        self._files += 1
        written = _written(result, kept.prepared.volume, folder, f"{kept.number}-{self._files}", kept.on_whole)
        old = kept.results.pop((result.name, settings), None)
        kept.results[result.name, settings] = replace(written, warnings=warnings)
        if old is not None:
            old.remove()

    def _forget(self, kept: KeptVolume, most_bytes: int = 0) -> None:
        """Let go of a volume's oldest results."""
        while sum(segment.size for segment in kept.results.values()) > most_bytes:
            kept.results.popitem(last=False)[1].remove()


class SliceCache(EmbeddingCache):
    """Knows single slices of a volume by a key of their own, and counts those that the image tower sees.

    Slice 7 of the volume ``abc``, looked at alone as slice 0 of ``abc:7``, shares the volume's embeddings.
    """

    def __init__(self, folder: Path | None = None, gigabytes: float | None = None) -> None:
        super().__init__(folder, gigabytes)
        self.encoded = 0
        self._last: tuple[str, str] = ("", "")

    def put(self, key: str, name: str, array: NDArray[np.float16]) -> None:
        """Store under the volume's key."""
        key, name = _shared(key, name)
        index = name.rpartition("-")[2]
        # a slice's embedding and its tokens come one after the other, and count once
        if not name.startswith(FEATURES):
            self.encoded += self._last != (key, index)
            self._last = (key, index)
        super().put(key, name, array)

    def has(self, key: str, name: str) -> bool:
        return super().has(*_shared(key, name))

    def get(self, key: str, name: str) -> NDArray[np.float16] | None:
        return super().get(*_shared(key, name))


def _shared(key: str, name: str) -> tuple[str, str]:
    volume, _, index = key.partition(":")
    return (volume, f"{name.rpartition('-')[0]}-{index}") if index else (key, name)


def _one_slice(prepared: PreparedVolume, slice_index: int) -> PreparedVolume:
    """A slice as a volume that shares grey levels and embeddings with the one it comes from."""
    stack = prepared.stack
    axis = stack.order[0]
    position = stack.count - 1 - slice_index if stack.flips[0] else slice_index
    affine = prepared.volume.affine.copy()
    affine[:3, 3] += position * affine[:3, 2 - axis]
    array = np.take(prepared.volume.array, [position], axis)
    volume = replace(prepared.volume, array=array, affine=affine)
    return replace(
        prepared,
        volume=volume,
        stack=replace(stack, volume=volume, count=1),
        key=f"{prepared.key}:{slice_index}",
        image_vectors={},
    )


def _volume(
    sent: VolumeDescription, roi: Region | None = None, fill: float | None = None
) -> tuple[Volume, tuple[int, int, int], tuple[slice, slice, slice]]:
    """The region of a volume that was sent; the shape of the whole, and where the region lies, both (k, j, i)."""
    array = sent.array.open()
    if array.ndim != 3:
        raise InputError(f"A volume has three axes (k, j, i), got {_by(array.shape)} voxels.")
    if len(sent.affine) != 4 or any(len(row) != 4 for row in sent.affine):
        raise InputError("A volume's affine must be 4 x 4 numbers.")
    k, j, i = array.shape
    region = _region(roi, (k, j, i))
    affine = np.array(sent.affine, dtype=np.float64)
    affine[:3, 3] += affine[:3, :3] @ [part.start for part in region[::-1]]
    cropped = array[region]
    # the whole is only mapped, so that a large volume is not in memory twice
    if cropped.shape != array.shape:
        cropped = np.ascontiguousarray(cropped)
    warnings: tuple[str, ...] = ()
    if fill is not None and cropped.dtype.kind == "f" and not np.isfinite(cropped).all():
        bad = ~np.isfinite(cropped)
        cropped = np.where(bad, cropped.dtype.type(fill), cropped)
        warnings = (f"{sent.name}: {int(bad.sum())} voxels were NaN or infinite and are now {fill:g}",)
    volume = Volume(
        cropped,
        affine,
        name=sent.name,
        modality=sent.modality,
        spatial_dimension=sent.spatial_dimension,
        description=sent.description,
        warnings=warnings,
    )
    return volume, (k, j, i), region


def _region(roi: Region | None, shape: tuple[int, int, int]) -> tuple[slice, slice, slice]:
    if roi is None:
        return slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2])
    bounds = list(roi[::-1])
    parts = [slice(max(0, low), min(side, high)) for (low, high), side in zip(bounds, shape, strict=True)]
    if any(part.start >= part.stop for part in parts):
        raise InputError(
            f"The region of interest (voxels {', '.join(f'{low} to {high - 1}' for low, high in roi)} along i, j, k) "
            f"holds nothing of the volume, which has {_by(shape[::-1])} voxels. Move it onto the volume."
        )
    return parts[0], parts[1], parts[2]


def _number(choice: ModelChoice, whole: Sequence[int], region: Sequence[slice], prepared: PreparedVolume) -> str:
    """The pipeline's own key already tells voxels, slicing, grey levels and weights apart."""
    described = (choice, tuple(whole), [(part.start, part.stop) for part in region], prepared.volume.affine.tolist())
    return hashlib.sha256(f"{prepared.key} {described}".encode()).hexdigest()[:16]


def _choice(request: SetVolume | PreviewSlice) -> ModelChoice:
    return ModelChoice(request.preset, request.device, request.sam, request.clip_folder, request.sam_checkpoint)


def _settings(
    before: TextSegmentationSettings, given: Mapping[str, Any] | None, uncertainty: bool
) -> TextSegmentationSettings:
    found = before if given is None else settings_of(TextSegmentationSettings, given)
    return replace(found, uncertainty=True) if uncertainty else found


def _written(
    result: PromptResult,
    volume: Volume,
    folder: Path,
    name: str,
    placed: Callable[[NDArray[Any]], NDArray[Any]] = lambda array: array,
) -> KeptSegment:
    """A result's arrays in files, and the rest of it as plain values."""
    arrays: dict[str, NDArray[Any]] = {
        "mask": result.mask.astype(np.uint8),
        "saliency": result.saliency.astype(np.float32, copy=False),
    }
    if result.uncertainty is not None:
        arrays["uncertainty"] = result.uncertainty.astype(np.float32, copy=False)
    described = {
        kind: write_array(folder / f"{name}-{kind}.raw", placed(array)).described() for kind, array in arrays.items()
    }
    values = {
        "name": result.name,
        "uncertainty": None,
        **described,
        "score": float(result.score),
        "slice_scores": [float(score) for score in result.slice_scores],
        "color": [float(part) for part in result.color],
        "meaning": result.meaning,
        "method": result.method,
        "empty": result.is_empty,
        "sentence": sentence(result, volume),
    }
    return KeptSegment(values, {kind: Path(one["file"]) for kind, one in described.items()}, ())


def sentence(result: PromptResult, volume: Volume) -> str:
    """What was found, in words."""
    sure = f"probability {result.score:.2f}"
    if result.is_empty:
        return f"{result.name}: not found ({sure})."
    voxels = int(result.mask.sum())
    if volume.spatial_dimension == 2:
        return f"{result.name}: {voxels} pixels ({sure})."
    millilitres = voxels * abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1000
    return f"{result.name}: {millilitres:.3g} ml ({sure})."


def _given(segment: KeptSegment, folder: Path | None) -> dict[str, Any]:
    """A segment for the parent, who may delete its files: other names of what is kept."""
    values = dict(segment.values)
    for kind, path in segment.files.items() if folder else ():
        assert folder is not None
        target = folder / path.name
        try:
            os.link(path, target)
        except OSError:
            shutil.copyfile(path, target)
        values[kind] = {**values[kind], "file": str(target)}
    return values


def _slice_of(segment: KeptSegment, axis: int, index: int, slice_index: int, folder: Path) -> dict[str, Any]:
    """One slice of a result that is kept."""
    values = dict(segment.values)
    for kind, path in segment.files.items():
        described = segment.values[kind]
        whole = np.memmap(path, dtype=described["dtype"], mode="r", shape=tuple(described["shape"]))
        part = np.take(whole, [index], axis)
        values[kind] = write_array(folder / path.name, part).described()
        if kind == "mask":
            values["empty"] = not part.any()
    values["slice_scores"] = [segment.values["slice_scores"][slice_index]]
    values["sentence"] = f"{values['name']}: {'nothing' if values['empty'] else 'found'} on this slice."
    return values


def _stamp(model: str) -> float:
    """When the weights of a spectral model were written: a model may be trained again while the worker runs."""
    from FreqSegLib.mamba.model_config import WEIGHTS_FILE
    from FreqSegLib.mamba.model_folders import find_model

    path = find_model(model) / WEIGHTS_FILE
    return path.stat().st_mtime if path.is_file() else 0


def _pipeline(module: str, name: str, what: str) -> Any:
    """A pipeline that this version may lack.

    Raises:
        WorkerError: it does.
    """
    if find_spec(module) is None:
        raise WorkerError(f"{what} is not available in this version of FreqSeg.", "not_available")
    return getattr(importlib.import_module(module), name)


def _by(shape: Sequence[int]) -> str:
    return " x ".join(str(side) for side in shape)
