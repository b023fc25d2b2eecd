"""Segments on a volume's grid as files: Slicer's ``.seg.nrrd``, or label maps.

A ``.seg.nrrd`` is an NRRD whose header names and colours the segments. Segments that overlap lie in different layers,
which are the components of the image. Format: Slicer's developer documentation, "Segmentation file format".
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.errors import InputError
from FreqSegLib.image_file import PICTURES, check_answer, save, stem_of, suffix_of
from FreqSegLib.output_file import replacing

if TYPE_CHECKING:
    from FreqSegLib.volume import Volume

# "Tissue" in Slicer's general anatomy list: true of every segment, and the user can refine it there.
_TERMINOLOGY = (
    "Segmentation category and type - 3D Slicer General Anatomy list~SCT^85756007^Tissue~SCT^85756007^Tissue~^^~"
    "Anatomic codes - DICOM master list~^^~^^"
)
_LONGEST_NAME = 60


@dataclass(frozen=True, eq=False)
class Segment:
    """One named structure on a volume's grid."""

    name: str
    mask: NDArray[np.bool_]
    """(k, j, i)."""
    color: tuple[float, float, float]
    """Red, green, blue in [0, 1]."""


def write_segmentation(
    path: str | Path,
    segments: Sequence[Segment],
    reference: Volume,
    *,
    overwrite: bool = False,
    one_file_per_segment: bool = False,
) -> list[Path]:
    """Write segments on the grid of ``reference``; all files appear complete, or none does.

    Args:
        path: ``.seg.nrrd`` keeps names, colours and overlaps. ``.nrrd``, ``.nii``, ``.nii.gz``, ``.mha`` and ``.mhd``,
            and ``.png`` or ``.tif`` for one slice, hold a label map: segment n has the value n (from 1), and where
            segments overlap the earlier one is kept.
        segments: at least one; they may overlap or be empty.
        reference: the volume the masks belong to.
        overwrite: whether existing files may be replaced.
        one_file_per_segment: write each segment to a file of its own, ``path`` with the segment's name added to the
            stem. There the value is 1, in pictures 255.

    Returns:
        The files written, in the order of the segments.

    Raises:
        InputError: there is no segment, or a mask is not on the reference's grid.
        OutputError: the files cannot be written there, exist already, or their format cannot hold this volume.
    """
    target = Path(path)
    if not segments:
        raise InputError(f"cannot write {target}: there is no segment to write")
    for segment in segments:
        if segment.mask.shape != reference.shape:
            raise InputError(
                f"segment {segment.name!r} has the shape {segment.mask.shape}, its volume {reference.shape}; "
                "they must lie on the same grid"
            )
    if not one_file_per_segment:
        _write([target], [segments], reference, overwrite)
        return [target]
    paths = paths_apart(target, [segment.name for segment in segments])
    _write(paths, [[segment] for segment in segments], reference, overwrite, foreground=255)
    return paths


def paths_apart(target: Path, names: Sequence[str], *, separator: str = "_") -> list[Path]:
    """A path for each segment: ``target`` with the name added to the stem, and a number where names are the same.

    Args:
        target: a path with its extension.
        names: of the segments; what a file name cannot hold becomes ``_``.
        separator: between the stem and the name.
    """
    paths: list[Path] = []
    for given in names:
        name = re.sub(r"\W+", "_", given).strip("_")[:_LONGEST_NAME] or "segment"
        taken = {path.name.lower() for path in paths}
        numbered = (name if number == 1 else f"{name}_{number}" for number in range(1, len(names) + 1))
        candidates = (f"{stem_of(target)}{separator}{one}{suffix_of(target)}" for one in numbered)
        paths.append(target.with_name(next(one for one in candidates if one.lower() not in taken)))
    return paths


def _write(
    paths: list[Path],
    contents: Sequence[Sequence[Segment]],
    reference: Volume,
    overwrite: bool,
    foreground: int = 1,
) -> None:
    """Write each group of segments to its path; ``foreground`` is a lone segment's value in a picture."""
    suffix = suffix_of(paths[0])
    if suffix != ".seg.nrrd":
        check_answer(paths[0], reference, np.uint8)
    with replacing(paths, overwrite=overwrite) as temporaries:
        for temporary, segments in zip(temporaries, contents, strict=True):
            if suffix == ".seg.nrrd":
                _save_segmentation(temporary, segments, reference)
            else:
                value = foreground if suffix in PICTURES else 1
                save(temporary, reference.with_array(_label_map(segments) * _label_type(1)(value)))


def _label_type(count: int) -> Any:
    return np.uint8 if count < 256 else np.uint16


def _label_map(segments: Sequence[Segment]) -> NDArray[Any]:
    """(k, j, i): 1, 2, ... in the order of the segments, the earlier one on top."""
    labels = np.zeros(segments[0].mask.shape, _label_type(len(segments)))
    for value in range(len(segments), 0, -1):
        labels[segments[value - 1].mask.astype(bool, copy=False)] = value
    return labels


def _layers(segments: Sequence[Segment]) -> tuple[list[NDArray[Any]], list[tuple[int, int]]]:
    """As few label maps as a greedy search finds, such that segments in one do not overlap.

    Returns:
        The layers (k, j, i), and for each segment its layer and its value in it.
    """
    layers: list[NDArray[Any]] = []
    used: list[int] = []
    places = []
    for segment in segments:
        mask = segment.mask.astype(bool, copy=False)
        layer = next((index for index, labels in enumerate(layers) if not labels[mask].any()), len(layers))
        if layer == len(layers):
            layers.append(np.zeros(mask.shape, _label_type(len(segments))))
            used.append(0)
        used[layer] += 1
        layers[layer][mask] = used[layer]
        places.append((layer, used[layer]))
    return layers, places


def _save_segmentation(path: Path, segments: Sequence[Segment], reference: Volume) -> None:
    """Written by hand, since pynrrd encodes headers as ASCII and segment names need not be."""
    layers, places = _layers(segments)
    data = layers[0] if len(layers) == 1 else np.stack(layers, axis=-1)
    header = [*_nrrd_fields(data, reference), *_segmentation_fields(reference)]
    for index, (segment, (layer, value)) in enumerate(zip(segments, places, strict=True)):
        header += _segment_fields(index, segment, layer, value, reference)
    with path.open("wb") as file:
        file.write("\n".join([*header, "", ""]).encode("utf-8"))
        with gzip.GzipFile(filename="", mode="wb", compresslevel=5, fileobj=file, mtime=0) as compressed:
            for part in data.astype(data.dtype.newbyteorder("<"), copy=False):
                compressed.write(np.ascontiguousarray(part).data)


def _nrrd_fields(data: NDArray[Any], reference: Volume) -> list[str]:
    layered = data.ndim == 4
    vectors = [f"({','.join(repr(float(value)) for value in axis)})" for axis in reference.affine[:3].T]
    fields = [
        "NRRD0004",
        f"type: {'unsigned char' if data.dtype == np.uint8 else 'unsigned short'}",
        f"dimension: {data.ndim}",
        "space: left-posterior-superior",
        f"sizes: {' '.join(str(count) for count in ((data.shape[3],) if layered else ()) + reference.shape[::-1])}",
        f"space directions: {'none ' if layered else ''}{' '.join(vectors[:3])}",
        f"kinds: {'list ' if layered else ''}domain domain domain",
        "encoding: gzip",
        f"space origin: {vectors[3]}",
    ]
    return fields if data.dtype == np.uint8 else [*fields, "endian: little"]


def _segmentation_fields(reference: Volume) -> list[str]:
    # Slicer keeps the grid of the source volume, in RAS, so that it can go back to it after cropping segments.
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ reference.affine
    extent = [value for count in reference.shape[::-1] for value in (0, count - 1)]
    geometry = "".join(f"{float(value)!r};" for value in to_ras.ravel()) + "".join(f"{value};" for value in extent)
    return [
        "Segmentation_ContainedRepresentationNames:=Binary labelmap|",
        f"Segmentation_ConversionParameters:=Reference image geometry|{geometry}|Grid of the segmented volume&",
        "Segmentation_MasterRepresentation:=Binary labelmap",
        "Segmentation_SourceRepresentation:=Binary labelmap",
        "Segmentation_ReferenceImageExtentOffset:=0 0 0",
    ]


def _segment_fields(index: int, segment: Segment, layer: int, value: int, reference: Volume) -> list[str]:
    k, j, i = reference.shape
    name = re.sub(r"[\x00-\x1f\x7f]+", " ", segment.name).strip() or f"Segment {index + 1}"
    fields = {
        "ID": f"Segment_{index + 1}",
        "Name": name.replace("\\", "\\\\"),
        "NameAutoGenerated": "0",
        "Color": " ".join(f"{channel:.6g}" for channel in segment.color),
        "ColorAutoGenerated": "0",
        "LabelValue": str(value),
        "Layer": str(layer),
        "Extent": f"0 {i - 1} 0 {j - 1} 0 {k - 1}",
        "Tags": f"TerminologyEntry:{_TERMINOLOGY}|",
    }
    return [f"Segment{index}_{key}:={text}" for key, text in fields.items()]
