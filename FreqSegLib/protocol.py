"""What the worker and its parent say to each other: the one schema of requests, events and results.

One JSON object a line, UTF-8, on the worker's stdin (requests) and stdout (events). Standard library and numpy only.

A request is ``{"id": "7", "request": "segment", "values": {...}}`` with the fields of its dataclass below
(:data:`REQUESTS`) as values. An event is one of::

    {"id": "7", "event": "begun"}
    {"id": "7", "event": "progress", "stage": "Reading slices", "done": 3, "total": 40, "seconds_left": 12.5 | null}
    {"id": "7", "event": "result", "values": {...}}
    {"id": "7" | null, "event": "error", "code": "weights", "message": "One sentence for the user."}

Every request is answered by exactly one result or error (``id`` is null for a line that could not be read). Requests
that compute run one at a time, in their order; ``cancel``, ``shutdown`` and ``models`` are answered meanwhile.

Voxels travel as raw files (:class:`ArrayDescription`) in a temporary folder that the parent makes, names in ``begin``,
and removes; the worker writes a request's results into the subfolder of the request's id. The worker removes the whole
folder only when its parent has died. It ends when its stdin ends.

Geometry: arrays are (k, j, i), affines (i, j, k, 1) to LPS millimetres. Whole volumes are returned on the whole grid,
whatever the region of interest.

Codes of errors: ``cancelled``; ``request`` (unknown request, missing or wrong field, a line that is no JSON);
``volume_unknown`` (set the volume again; :class:`FreqSegLib.worker_client.WorkerClient` does so by itself);
``not_available`` (a pipeline this version lacks); ``weights``, ``input``, ``not_registered``, ``settings``,
``vocabulary``, ``output``, ``device``, ``error`` (:mod:`FreqSegLib.errors`); ``memory``; ``cannot_start``
(no worker, or a package is missing);
``worker_gone`` (the worker ended; the next request starts another); ``internal`` (a defect of FreqSeg).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from FreqSegLib import errors
from FreqSegLib.errors import FreqSegError, InputError, SettingsError

PROTOCOL = 1
LONGEST_LINE = 16 * 2**20
Region = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
Corner = tuple[float, float, float]
Parsed = TypeVar("Parsed")


class RequestError(FreqSegError):
    """A request the worker does not understand."""

    code = "request"


class WorkerError(FreqSegError):
    """What went wrong in or with the worker, by its code."""

    def __init__(self, message: str, code: str = "internal") -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class ArrayDescription:
    """A raw file in C order: path, numpy type ("<i2", "|u1", "<f4"), shape, and bytes before the first voxel."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    def open(self) -> NDArray[Any]:
        """The array, mapped into memory read-only.

        Raises:
            InputError: the file is gone, too short, or the description is wrong.
        """
        try:
            kind = np.dtype(self.dtype)
        except TypeError as error:
            raise InputError(f"'{self.dtype}' is no type of voxels; give one like '<i2' or '<f4'.") from error
        if kind.hasobject or not self.shape or min(self.shape) < 1 or self.offset < 0:
            raise InputError(f"An array of type {self.dtype} and shape {self.shape} holds no voxels.")
        needed = self.offset + kind.itemsize * int(np.prod(self.shape, dtype=np.int64))
        try:
            there = os.stat(self.file).st_size
            if there < needed:
                raise InputError(
                    f"'{self.file}' holds {there} bytes; {needed} are needed for its voxels. Send it again."
                )
            return np.memmap(self.file, dtype=kind, mode="r", offset=self.offset, shape=self.shape)
        except OSError as error:
            raise InputError(f"The voxels in '{self.file}' cannot be read: {error.strerror or error}.") from error

    def described(self) -> dict[str, Any]:
        """As it stands in a message."""
        return {"file": self.file, "dtype": self.dtype, "shape": list(self.shape), "offset": self.offset}


def write_array(path: Path, array: NDArray[Any]) -> ArrayDescription:
    """Write an array into a raw file, which appears complete or not at all."""
    temporary = path.with_name(f"{path.name}.part")
    plain = np.ascontiguousarray(array)
    try:
        with temporary.open("wb") as file:
            file.write(plain.reshape(-1).view(np.uint8).data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return ArrayDescription(str(path), plain.dtype.str, plain.shape)


@dataclass(frozen=True)
class VolumeDescription:
    """A volume: voxels (k, j, i), affine (4 x 4, i j k to LPS mm) and what is known of it.

    ``modality`` as in DICOM (CT, MR, US, CR, DX ...) or null; ``description`` is the series description;
    ``spatial_dimension`` 2 for an image without a place in the patient.
    """

    array: ArrayDescription
    affine: tuple[tuple[float, ...], ...]
    name: str = "volume"
    modality: str | None = None
    description: str = ""
    spatial_dimension: int = 3


@dataclass(frozen=True)
class Begin:
    """Sent first, by :class:`~FreqSegLib.worker_client.WorkerClient` itself: the parent's folder and process id.

    Result: ``{"protocol": 1, "version": "0.1.0", "process": 4711}``.
    """

    folder: str
    parent: int
    protocol: int = PROTOCOL


@dataclass(frozen=True)
class SetVolume:
    """Read a volume's slices once. Models and slices stay warm; the worker keeps the last two volumes.

    Fields:
        preset, device: "lite", "biomedclip-sam"; "auto", "cpu", "cuda[:N]".
        settings: the fields of TextSegmentationSettings that differ from their defaults.
        roi: half-open voxel bounds ((i0, i1), (j0, j1), (k0, k1)); what hangs over the volume is cut off, and the
            pipeline sees nothing but the region.
        sam, clip_folder, sam_checkpoint: another SAM-family model, or own weights, where the preset takes them.
        fill_nonfinite: value for NaN and infinite voxels, which are refused without one.

    Result:
        volume_id: for the requests that follow: a hash of voxels, place, region, preset and device.
        slices: how many the pipeline sees. axis: "axial", "coronal", "sagittal" or "image".
        array_axis: along which array axis they are stacked: 0 (k), 1 (j) or 2 (i).
        warnings: sentences. ran: names of the stages that did work ("Loading models", "Reading slices"); empty when
            everything was warm. encoded: how many slices went through an image tower (0: all were in the cache).
    """

    volume: VolumeDescription
    preset: str = "lite"
    device: str = "auto"
    settings: Mapping[str, Any] = field(default_factory=dict)
    roi: Region | None = None
    sam: str | None = None
    clip_folder: str | None = None
    sam_checkpoint: str | None = None
    fill_nonfinite: float | None = None


@dataclass(frozen=True)
class Segment:
    """Segment a volume set before, one segment a prompt.

    Fields:
        settings: as for ``set_volume``, and in place of its; null takes those.
        uncertainty: repeat the saliency with other noise (as the setting of that name).

    Result:
        segments: in the order of the prompts, each {name, mask: described uint8 (k, j, i), saliency: described float32
            in [0, 1], uncertainty: described float32 or null, score: probability that the target is there,
            slice_scores: the same a slice of the region, color: [r, g, b] in [0, 1], meaning: what the prompt was
            understood as or null, method: "trained" or "zero-shot", empty: bool, sentence: what was found, for the
            user}.
        warnings, ran ("Looking", "Drawing", ...), encoded: as for ``set_volume``. A prompt asked before with the same
            settings is answered from what was kept, and runs nothing.
    """

    volume_id: str
    prompts: tuple[str, ...]
    settings: Mapping[str, Any] | None = None
    uncertainty: bool = False


@dataclass(frozen=True)
class PreviewSlice:
    """Segment one slice: of a volume set before (``volume_id`` and ``index``), or sent along (``volume``).

    Fields:
        index: voxel number on the whole grid along ``array_axis``.
        volume: one slice: an array with a single voxel along one axis, and its affine.
        preset, device, sam, clip_folder, sam_checkpoint: with ``volume``. settings: as for ``segment``.

    Result:
        segments: as for ``segment``, of one voxel along ``array_axis``.
        alone: true when grey levels or thresholds came from this slice alone; false when the volume was segmented
            with this prompt and these settings, so the preview is exactly that result's slice.
        array_axis, index (null with ``volume``), warnings, ran, encoded.
    """

    prompts: tuple[str, ...]
    volume_id: str | None = None
    index: int | None = None
    volume: VolumeDescription | None = None
    preset: str = "lite"
    device: str = "auto"
    settings: Mapping[str, Any] | None = None
    sam: str | None = None
    clip_folder: str | None = None
    sam_checkpoint: str | None = None


@dataclass(frozen=True)
class Refine:
    """Redraw the slices that carry points, or a box, with the decoder alone.

    Fields:
        mask: the segment as it is, uint8 (k, j, i) on the whole grid.
        points: (i, j, k, label) in voxels, label 1 inside, 0 outside.
        box: two opposite corner voxels (i, j, k), both inside the box.

    Result: ``{"mask": described uint8, the whole segment, "slices_changed": [voxel numbers along array_axis],
    "array_axis": 0, "warnings": [...], "ran": [...], "encoded": 0}``.
    """

    volume_id: str
    mask: ArrayDescription
    points: tuple[tuple[float, float, float, float], ...] = ()
    box: tuple[Corner, Corner] | None = None


@dataclass(frozen=True)
class FrequencyImages:
    """The low- and high-frequency images of every slice.

    Result: ``{"low": described float32 (k, j, i), "high": described float32, "warnings": [...]}``.
    Both are 0 outside the region.
    """

    volume_id: str
    settings: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Models:
    """The weights: ``list``; ``get``, ``verify`` or ``remove`` the set ``id``; or the ``folder`` they are fetched to.

    Result:
        list: {"models": [{id, title, size (bytes), licence, source, installed, state ("shipped", "installed",
            "missing", "damaged"), downloadable, removable, folder or null, needed_by: [presets], needs: what to do when
            it is not usable, announcement: [sentences to show before a download]}]}
        get: {"folder"}, with progress of stage "Downloading", done and total in bytes (total 0: unknown).
        verify: {"sound": bool, "findings": [sentences]}. remove: {"freed": bytes}. folder: {"folder", "searched"}.
    """

    action: Literal["list", "get", "verify", "remove", "folder"]
    id: str | None = None


@dataclass(frozen=True)
class Info:
    """What is here.

    Result:
        versions: {"freqseg", "python", package: version or null}. device: "cuda", "cpu", or null without torch.
        presets: [{name, title, description, licence, has_vocabulary, encoder, sam: [choices],
            targets: [{name, modality, color}], missing: [ids of weights that are not here],
            trained: id of its trained method's weights or null, has_trained: whether they are here}].
        defaults: every setting's default. cache: {"folder", "bytes", "limit"}.
        available: {"fuse": bool, "spectral_segment": bool}.
    """


@dataclass(frozen=True)
class Fuse:
    """Fuse a CT and a registered MR volume.

    Fields:
        settings: the fields of FusionSettings that differ from their defaults (method, wave, register ...).
        masks: also return the CT's share of every band.

    Result: ``{"fused": described float32 in 0 to 255 on the CT's grid, "affine": 4 x 4 LPS, "name", "masks": [{name,
    share: described uint8 in per cent}], "record": how it was made, as JSON text, "warnings", "ran"}``.
    """

    ct: VolumeDescription
    mr: VolumeDescription
    preset: str = "lite"
    device: str = "auto"
    settings: Mapping[str, Any] = field(default_factory=dict)
    masks: bool = False


@dataclass(frozen=True)
class SpectralSegment:
    """Segment every voxel into a model's classes with the Spectral VMamba.

    Fields:
        model: a model's name or its folder.
        uncertainty, samples, seed: as for ``SpectralSegmenter.segment``.

    Result: ``{"segments": [{name, mask: described uint8, color}], "uncertainty": null or {"mean", "entropy",
    "mutual_information": described float32}, "warnings", "ran"}``.
    """

    volume: VolumeDescription
    model: str
    device: str = "auto"
    uncertainty: Literal["auto", "flips", "dropout"] | None = None
    samples: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Cancel:
    """Stop the request ``target`` at its next batch; it then answers ``cancelled``. Result: ``{"found": bool}``."""

    target: str


@dataclass(frozen=True)
class Shutdown:
    """End the worker, as the end of its stdin does. Result: ``{}``."""


REQUESTS: dict[str, type] = {
    "begin": Begin,
    "set_volume": SetVolume,
    "segment": Segment,
    "preview_slice": PreviewSlice,
    "refine": Refine,
    "frequency_images": FrequencyImages,
    "models": Models,
    "info": Info,
    "fuse": Fuse,
    "spectral_segment": SpectralSegment,
    "cancel": Cancel,
    "shutdown": Shutdown,
}


def encode(message: Mapping[str, Any]) -> bytes:
    """A message as one line.

    Raises:
        RequestError: it holds something JSON cannot say.
    """
    try:
        return json.dumps(message, default=_plain, allow_nan=False, separators=(",", ":")).encode("utf-8") + b"\n"
    except (TypeError, ValueError) as error:
        raise RequestError(f"A message cannot be written as JSON: {error}.") from error


def decode(line: bytes) -> dict[str, Any]:
    """A line as a message.

    Raises:
        RequestError: it is no JSON object.
    """
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"A line is no JSON: {line[:80]!r}. Send one JSON object a line.") from error
    if not isinstance(message, dict):
        raise RequestError(f"A line is no JSON object: {line[:80]!r}.")
    return message


def parse(message: Mapping[str, Any]) -> tuple[str, str, Any]:
    """Check a request against the schema.

    Returns:
        Its id, its name, and its values as the dataclass of :data:`REQUESTS`.

    Raises:
        RequestError: no id, an unknown request, or a missing, unknown or wrong field.
    """
    number, name = message.get("id"), message.get("request")
    if not isinstance(number, str) or not number or not set(number) <= _ID_CHARACTERS:
        raise RequestError(f"A request needs an id of letters, digits, '-' and '_', got {number!r}.")
    if not isinstance(name, str) or name not in REQUESTS:
        raise RequestError(f"There is no request {name!r}. Requests: {', '.join(REQUESTS)}.")
    strangers = [key for key in message if key not in ("id", "request", "values")]
    if strangers:
        raise RequestError(f"{name}: '{strangers[0]}' does not belong beside id and request; put it into values.")
    return number, name, _parsed(REQUESTS[name], message.get("values", {}), name)


def error_of(code: str, message: str) -> FreqSegError:
    """The exception that stands for an error event."""
    known = {
        kind.code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FreqSegError)
    }
    known[RequestError.code] = RequestError
    return known[code](message) if code in known else WorkerError(message, code)


def unknown_volume(volume_id: str) -> WorkerError:
    """The worker does not hold that volume (any more)."""
    return WorkerError(f"The volume {volume_id} is not set in this worker; set it again.", "volume_unknown")


_ID_CHARACTERS = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{value!r} is neither text, number, list nor object")


def _parsed(hint: Any, value: Any, where: str) -> Any:
    """``value`` as what ``hint`` says; ``where`` names it in the sentence that refuses it."""
    if hint is Any:
        return value
    if is_dataclass(hint):
        return _parsed_fields(hint, value, where)
    origin, inner = get_origin(hint), get_args(hint)
    if NoneType in inner:
        return None if value is None else _parsed(next(part for part in inner if part is not NoneType), value, where)
    if origin is Literal:
        if value not in inner:
            raise RequestError(f"{where} must be one of {', '.join(map(str, inner))}, got {value!r}.")
        return value
    if origin is tuple:
        return _parsed_list(inner, value, where)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise RequestError(f"{where} must be an object, got {value!r}.")
        return dict(value)
    right = {
        str: isinstance(value, str),
        bool: isinstance(value, bool),
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf"),
    }
    if not right[hint]:
        raise RequestError(f"{where} must be {_WORDS[hint]}, got {str(value)[:200]!r}.")
    return float(value) if hint is float else value


_WORDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


def _parsed_list(inner: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise RequestError(f"{where} must be a list, got {str(value)[:200]!r}.")
    if inner[-1] is Ellipsis:
        return tuple(_parsed(inner[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if len(value) != len(inner):
        raise RequestError(f"{where} must hold {len(inner)} items, got {len(value)}.")
    pairs = enumerate(zip(inner, value, strict=True))
    return tuple(_parsed(hint, item, f"{where}[{index}]") for index, (hint, item) in pairs)


def _parsed_fields(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise RequestError(f"{where} must be an object, got {str(value)[:200]!r}.")
    hints = get_type_hints(kind)
    known = {item.name: item for item in fields(kind)}
    strangers = [name for name in value if name not in known]
    if strangers:
        raise RequestError(f"{where} has no field '{strangers[0]}'. Fields: {', '.join(known) or 'none'}.")
    for name, item in known.items():
        if name not in value and item.default is MISSING and item.default_factory is MISSING:
            raise RequestError(f"{where} needs the field '{name}'.")
    return kind(**{name: _parsed(hints[name], one, f"{where}.{name}") for name, one in value.items()})


def settings_of(kind: type[Parsed], values: Mapping[str, Any]) -> Parsed:
    """A settings dataclass from the fields that differ from its defaults.

    Raises:
        SettingsError: there is no such setting, or a value is out of range.
    """
    known = [item.name for item in fields(kind)]  # type: ignore[arg-type]
    strangers = [name for name in values if name not in known]
    if strangers:
        raise SettingsError(f"There is no setting '{strangers[0]}'. Settings: {', '.join(known)}.")
    return kind(**values)
