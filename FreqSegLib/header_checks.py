"""What is wrong with an image file that ITK would let pass.

ITK fills a NIfTI or JPEG that ends too early with zeros or grey, reads NaN in a NIfTI as 0, turns a negative spacing
into a flip, and writes some of its complaints straight to the console. These checks read the bytes that tell, and speak
first.
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.errors import InputError

_HEADER_LIMIT = 1 << 20
_CHUNK = 1 << 22
_NIFTI_FLOATS = {16: "f4", 64: "f8"}
_META_BYTES = {"UCHAR": 1, "CHAR": 1, "USHORT": 2, "SHORT": 2, "UINT": 4, "INT": 4, "FLOAT": 4, "DOUBLE": 8}

SFORM_CODE_AT = 254
"""Byte offset of the sform code, two bytes."""


@dataclass(frozen=True)
class NiftiHeader:
    """The fields of a NIfTI header that place the image and give its size."""

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    offset: int
    """Bytes before the voxels."""
    expected_bytes: int
    floats: np.dtype[np.floating] | None
    """How voxels are stored that are floating-point numbers, else None."""
    qform_code: int
    sform_code: int
    sform: NDArray[np.float64]
    """(4, 4) voxel to LPS in mm; meaningful where sform_code > 0."""


def check_spacing(path: Path, spacing: tuple[float, ...]) -> None:
    """Refuse spacings that are not positive numbers."""
    if not all(math.isfinite(value) and value > 0 for value in spacing):
        shown = ", ".join(f"{value:g}" for value in spacing)
        raise InputError(f"{path}: spacing must be > 0 on every axis, the file has ({shown}) mm; repair its header")


def open_plain(path: Path) -> BinaryIO:
    """The file's bytes, decompressed if it is gzipped."""
    with path.open("rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(path, "rb")) if gzipped else path.open("rb")


def read_nifti_header(path: Path) -> NiftiHeader | None:
    """The header of a single-file NIfTI, or None if this is none (an Analyze pair, say)."""
    try:
        with open_plain(path) as file:
            head = file.read(348)
    except (OSError, EOFError, zlib.error) as problem:
        raise InputError(f"{path}: the file is damaged or incomplete ({problem})") from problem
    if len(head) < 348:
        return None
    for order in "<>":
        size = struct.unpack_from(order + "i", head)[0]
        if size == 540 and head[4:7] == b"n+2":
            raise InputError(
                f"{path}: this is NIfTI-2, which ITK and 3D Slicer do not read; convert it to NIfTI-1 or NRRD"
            )
        if size != 348 or head[344:347] != b"n+1":
            continue
        dim = struct.unpack_from(order + "8h", head, 40)
        kind, bits = struct.unpack_from(order + "2h", head, 70)
        pixdim = struct.unpack_from(order + "8f", head, 76)
        offset = int(struct.unpack_from(order + "f", head, 108)[0])
        units = head[123]
        qform_code, sform_code = struct.unpack_from(order + "2h", head, 252)
        rows = struct.unpack_from(order + "12f", head, 280)
        if not 1 <= dim[0] <= 7 or min(dim[1 : dim[0] + 1]) < 1:
            raise InputError(f"{path}: the header gives impossible dimensions {dim[1:]}; the file is damaged")
        shape = dim[1 : dim[0] + 1]
        to_mm = {1: 1000.0, 3: 0.001}.get(units & 7, 1.0)
        sform = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.vstack([np.reshape(rows, (3, 4)) * to_mm, [0, 0, 0, 1]])
        return NiftiHeader(
            shape=shape,
            spacing=tuple(value * to_mm for value in pixdim[1 : min(dim[0], 3) + 1]),
            offset=offset,
            expected_bytes=offset + math.prod(shape) * bits // 8,
            floats=np.dtype(order + _NIFTI_FLOATS[kind]) if kind in _NIFTI_FLOATS else None,
            qform_code=qform_code,
            sform_code=sform_code,
            sform=sform,
        )
    return None


def check_nifti(path: Path, header: NiftiHeader) -> NDArray[np.int64]:
    """Refuse spacings that are not positive, and data that end early or fail their checksum.

    Returns:
        Where voxels are NaN or infinite, counted in the order of the file; ITK reads them as 0.
    """
    # A single-voxel axis needs no spacing; writers often leave 0 there, and ITK takes 1.
    check_spacing(path, tuple(s for s, count in zip(header.spacing, header.shape, strict=False) if count > 1 or s < 0))
    voxels = math.prod(header.shape)
    seen, bad = 0, []
    try:
        with open_plain(path) as file:
            found = len(file.read(max(0, header.offset)))
            for chunk in iter(lambda: file.read(_CHUNK), b""):
                found += len(chunk)
                if header.floats is None:
                    continue
                count = min(len(chunk) // header.floats.itemsize, voxels - seen)
                bad.append(seen + np.flatnonzero(~np.isfinite(np.frombuffer(chunk, header.floats, count))))
                seen += count
    except (OSError, EOFError, zlib.error) as problem:
        raise InputError(f"{path}: the file is damaged or incomplete ({problem}); fetch it again") from problem
    if found < header.expected_bytes:
        raise InputError(
            f"{path}: the file is incomplete: {found} of {header.expected_bytes} bytes are there; fetch it again"
        )
    return np.concatenate(bad) if bad else np.zeros(0, np.int64)


def check_nrrd(path: Path) -> None:
    """Refuse spacings that are not positive; teem itself finds missing data."""
    with path.open("rb") as file:
        head = re.split(rb"\r?\n\r?\n", file.read(_HEADER_LIMIT), maxsplit=1)[0]
    match = re.search(rb"^spacings:([^\r\n]*)", head, re.MULTILINE)
    if match:
        # "nan" marks an axis without a spacing, such as a list of components.
        check_spacing(path, tuple(value for value in _numbers(match[1]) if not math.isnan(value)))


def check_meta_image(path: Path) -> None:
    """Refuse spacings that are not positive and data that are missing or too short."""
    with path.open("rb") as file:
        head = file.read(_HEADER_LIMIT)
    end = re.search(rb"^\s*ElementDataFile\s*=\s*([^\r\n]*?)\s*\r?(?:\n|$)", head, re.MULTILINE)
    if not end:
        raise InputError(f"{path}: the MetaImage header is damaged or incomplete: it names no ElementDataFile")
    fields = {
        key.decode("latin1"): value.strip()
        for key, value in re.findall(rb"^\s*(\w+)\s*=([^\r\n]*)", head[: end.start()], re.MULTILINE)
    }
    for key in ("ElementSpacing", "ElementSize"):
        if key in fields:
            check_spacing(path, _numbers(fields[key]))
            break
    target = end[1].decode("utf-8", "replace")
    if target.upper() == "LOCAL":
        data, start = path, end.end()
    elif target.upper().startswith("LIST") or "%" in target:
        return
    else:
        data, start = path.parent / target, 0
        if not data.is_file():
            raise InputError(f"{path}: its voxels are in {target}, which is not beside it")
    expected = _meta_image_bytes(fields)
    found = data.stat().st_size - start
    if found < expected:
        raise InputError(f"{path}: the file is incomplete: {found} of {expected} bytes of voxels; fetch it again")


def check_picture(path: Path) -> None:
    """Refuse a PNG, JPEG, TIFF or BMP whose pixels are not all there."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                image.load()
    except Image.UnidentifiedImageError:
        # Not Pillow's kind of picture (a 64-bit TIFF, say): ITK decides.
        return
    except Image.DecompressionBombError:
        return
    except (OSError, SyntaxError, ValueError, EOFError) as problem:
        raise InputError(f"{path}: the picture is damaged or incomplete ({problem}); fetch it again") from problem


def _meta_image_bytes(fields: dict[str, bytes]) -> int:
    """How many bytes of voxels there must be at least; 0 where the header does not tell."""
    if fields.get("CompressedData", b"False").lower() == b"true":
        return int(fields.get("CompressedDataSize", b"0"))
    voxel = _META_BYTES.get(fields.get("ElementType", b"").decode("latin1").removeprefix("MET_"), 0)
    channels = int(fields.get("ElementNumberOfChannels", b"1"))
    return math.prod(int(value) for value in fields.get("DimSize", b"0").split()) * voxel * channels


def _numbers(text: bytes) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split())
    except ValueError:
        return ()
