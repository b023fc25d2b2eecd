"""Images and captions of a user's own: a table of them, checked as a whole, and the pictures as a model sees them."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from FreqSegLib.errors import InputError, SettingsError
from FreqSegLib.intensity import normalise
from FreqSegLib.slices import Frame, SliceStack
from FreqSegLib.volume import Volume

MOST_LISTED = 10
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class PairData:
    """Where images and captions are.

    Attributes:
        table: a CSV file with a heading, a line a pair; relative to the configuration.
        folder: what the table's image paths are relative to; the table's own folder if empty.
        image, caption: names of the columns every table has.
        group: column of the patient (or whatever must not be in both splits); without it every image is its own.
        meaning: column of what a caption means, so that other wordings of it are no negatives; without it captions mean
            the same where they are the same text.
        split: column that says ``train`` or ``validation``; without it groups are split by a hash of their names.
        slice: column of the slice, from 1, for images that have several.
        absence: meanings that state that something is not there; accuracy is also given without them.
        axis, intensity: as in ``freqseg segment``.
        validation_share: of groups, where the table has no splits.
    """

    table: str
    folder: str = ""
    image: str = "image"
    caption: str = "caption"
    group: str = "group"
    meaning: str = "meaning"
    split: str = "split"
    slice: str = "slice"
    absence: tuple[str, ...] = ()
    axis: str = "auto"
    intensity: str = "auto"
    validation_share: float = 0.15

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1:
            raise SettingsError(f"validation_share must lie between 0 and 1, got {self.validation_share}")


@dataclass(frozen=True)
class Pair:
    """A line of the table.

    Attributes:
        line: its number in the file.
        image: the file.
        index: slice from 0; None where the table does not say.
        caption, group, meaning, split: see :class:`PairData`.
    """

    line: int
    image: Path
    index: int | None
    caption: str
    group: str
    meaning: str
    split: str


def read_pairs(data: PairData, base: Path) -> list[Pair]:
    """The pairs of a table.

    Args:
        data: see there.
        base: what a relative table is relative to.

    Raises:
        InputError: the table is missing or has no pairs; an image is missing, a caption empty, a slice no number, a
            group in both splits (all lines at fault are listed); there are too few pairs to train on.
        SettingsError: a column is missing.
    """
    table = base / data.table
    rows = _rows(table, data)
    folder = base / data.folder if data.folder else table.parent
    pairs = [_pair(line, row, folder, data) for line, row in rows]
    has_splits = any(pair.split for pair in pairs)
    faults = [
        fault for (_, row), pair in zip(rows, pairs, strict=True) for fault in _faults(row, pair, data, has_splits)
    ]
    if faults:
        raise InputError(f"{table} does not fit its images: {listed(faults)}")
    if not has_splits:
        held_out = _held_out({pair.group for pair in pairs}, data.validation_share)
        pairs = [replace(pair, split="validation" if pair.group in held_out else "train") for pair in pairs]
    shared = sorted(set.intersection(*({pair.group for pair in pairs if pair.split == split} for split in SPLITS)))
    if shared:
        raise InputError(f"{table}: a group must be in one split only, these are in both: {listed(shared)}")
    for split in SPLITS:
        meanings = {pair.meaning for pair in pairs if pair.split == split}
        if len(meanings) < 2:
            raise InputError(
                f"{table}: contrastive training needs pairs of at least 2 meanings in both splits; {split} has "
                f"{len(meanings)}. Add pairs, or name the splits in a column '{data.split}'."
            )
    unknown = sorted(set(data.absence) - {pair.meaning for pair in pairs})
    if unknown:
        raise SettingsError(f"absence names meanings that no line of {table} has: {listed(unknown)}")
    return pairs


def files_in_no_pair(pairs: Sequence[Pair]) -> list[Path]:
    """Files beside the images, with an ending of theirs, that no line names: perhaps misnamed."""
    named = {pair.image for pair in pairs}
    endings = {pair.image.suffix.lower() for pair in pairs}
    folders = {pair.image.parent for pair in pairs}
    beside = (path for folder in sorted(folders) for path in sorted(folder.iterdir()))
    return [path for path in beside if path.is_file() and path.suffix.lower() in endings and path not in named]


def read_picture(pair: Pair, data: PairData, side: int) -> Tensor:
    """The pair's image (1, 1, side, side) in [0, 1], its aspect kept, padded at the bottom or right.

    Raises:
        InputError: it cannot be read, or has several slices and the table names none of them.
    """
    volume = Volume.read(pair.image)
    stack = SliceStack.of(volume, data.axis)
    if pair.index is None and stack.count > 1:
        raise InputError(
            f"{pair.image} has {stack.count} slices; say in a column '{data.slice}' which one line {pair.line} means"
        )
    index = pair.index or 0
    if index >= stack.count:
        raise InputError(f"{pair.image} has {stack.count} slices, line {pair.line} asks for number {index + 1}")
    pixels = normalise(volume, data.intensity).apply(stack.take(index))
    frame = Frame.fit(stack.slice_shape, stack.pixel_spacing, side)
    return frame.to_frame(torch.from_numpy(np.ascontiguousarray(pixels))[None, None])


def listed(faults: Sequence[object]) -> str:
    """The first of them, and how many more there are."""
    shown = "; ".join(str(fault) for fault in faults[:MOST_LISTED])
    return shown + (f"; and {len(faults) - MOST_LISTED} more" if len(faults) > MOST_LISTED else "")


def _rows(table: Path, data: PairData) -> list[tuple[int, dict[str, str]]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or [])
            rows = [(reader.line_num, {k: (v or "").strip() for k, v in row.items() if k}) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read the table {table}: {error}; give a CSV file in UTF-8") from error
    for column in (data.image, data.caption):
        if column not in columns:
            near = get_close_matches(column, columns, 1)
            offered = f"did you mean '{near[0]}'?" if near else f"it has: {', '.join(columns) or 'none'}."
            raise SettingsError(f"{table} has no column '{column}'; {offered} Name the column in the configuration.")
    if not rows:
        raise InputError(f"{table} has a heading and no pairs; add a line for every image and caption")
    return rows


def _pair(line: int, row: dict[str, str], folder: Path, data: PairData) -> Pair:
    image, caption = folder / row[data.image], row[data.caption]
    number = row.get(data.slice, "")
    return Pair(
        line=line,
        image=image,
        index=int(number) - 1 if number.isdecimal() and int(number) else None,
        caption=caption,
        group=row.get(data.group) or row[data.image],
        meaning=row.get(data.meaning) or " ".join(caption.lower().split()),
        split=row.get(data.split, ""),
    )


def _faults(row: dict[str, str], pair: Pair, data: PairData, has_splits: bool) -> list[str]:
    found = []
    if not row[data.image]:
        found.append(f"line {pair.line} names no image")
    elif not pair.image.is_file():
        names = [path.name for path in pair.image.parent.iterdir()] if pair.image.parent.is_dir() else []
        near = get_close_matches(pair.image.name, names, 1)
        found.append(f"line {pair.line}: there is no file {pair.image}" + (f" (is it '{near[0]}'?)" if near else ""))
    if not pair.caption:
        found.append(f"line {pair.line} has no caption")
    if row.get(data.slice) and pair.index is None:
        found.append(f"line {pair.line}: the slice must be a number from 1, got '{row[data.slice]}'")
    if has_splits and pair.split not in SPLITS:
        found.append(f"line {pair.line}: the split must be train or validation, got '{pair.split}'")
    return found


def _held_out(groups: set[str], share: float) -> set[str]:
    """Groups to validate on: the same whatever else is in the table, at least one and never all."""
    ordered = sorted(groups, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return set(ordered[: min(len(ordered) - 1, max(1, round(share * len(ordered))))])
