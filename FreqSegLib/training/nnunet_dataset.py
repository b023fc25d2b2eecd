"""A raw dataset as nnU-Net v2 reads it: file names, endings, label numbers and ``dataset.json``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.errors import InputError, SettingsError
from FreqSegLib.intensity import normalise
from FreqSegLib.training.work_folder import write_text
from FreqSegLib.volume import Volume

PICTURES, VOLUMES = ".png", ".nii.gz"
LARGEST_GREY = 65535


@dataclass(frozen=True)
class RawDataset:
    """A dataset as nnU-Net v2 wants it, such as ``nnUNet_raw/Dataset501_Breast``.

    Attributes:
        folder: of the dataset.
        targets: names of the labels from 1.
        ending: of all its files: ``.png`` for pictures, ``.nii.gz`` for volumes.
    """

    folder: Path
    targets: tuple[str, ...]
    ending: str

    @classmethod
    def named(cls, raw: Path, number: int, name: str, targets: Sequence[str], ending: str) -> RawDataset:
        """The dataset of a number and a name.

        Raises:
            SettingsError: another dataset of that number is there.
        """
        folder = raw / f"Dataset{number:03d}_{name}"
        others = [path.name for path in raw.glob(f"Dataset{number:03d}_*") if path != folder]
        if others:
            raise SettingsError(f"{raw} has a dataset {number} already: {others[0]}; choose another dataset_id")
        return cls(folder, tuple(targets), ending)

    @property
    def test_images(self) -> Path:
        """Images to predict."""
        return self.folder / "imagesTs"

    def add_case(self, case: str, image: Volume, labels: NDArray[np.uint8]) -> None:
        """Write a training case; each file appears complete."""
        _written(_as_stored(image, self.ending), self.folder / "imagesTr" / f"{case}_0000{self.ending}")
        _written(image.with_array(labels), self.folder / "labelsTr" / f"{case}{self.ending}")

    def add_test_image(self, case: str, image: Volume) -> None:
        """Write an image to predict."""
        _written(_as_stored(image, self.ending), self.test_images / f"{case}_0000{self.ending}")

    def finish(self, cases: int, *, channel: str, ignores: bool) -> None:
        """Write ``dataset.json``.

        Args:
            cases: training cases.
            channel: what the grey values are; nnU-Net treats ``CT`` by a window, everything else by its mean.
            ignores: some labels are the ignore label.
        """
        labels = {"background": 0, **{name: number for number, name in enumerate(self.targets, start=1)}}
        if ignores:
            labels["ignore"] = len(self.targets) + 1
        content = {
            "channel_names": {"0": channel},
            "labels": labels,
            "numTraining": cases,
            "file_ending": self.ending,
            "overwrite_image_reader_writer": "NaturalImage2DIO" if self.ending == PICTURES else "SimpleITKIO",
        }
        write_text(self.folder / "dataset.json", json.dumps(content, indent=1) + "\n")


def ending_of(volume: Volume) -> str:
    """How nnU-Net is to store it."""
    return PICTURES if volume.spatial_dimension == 2 else VOLUMES


def label_name(text: str) -> str:
    """A target's name as nnU-Net can have it: words joined by underscores."""
    name = re.sub(r"\W+", "_", text.strip().lower()).strip("_")
    if name in ("", "background", "ignore"):
        raise SettingsError(f"'{text}' cannot name a label of nnU-Net's; give the target another name")
    return name


def case_names(files: Sequence[Path], ending: str) -> dict[str, Path]:
    """A name of letters, digits and hyphens for every file.

    Args:
        files: all end with ``ending``.
        ending: left out of the names.

    Raises:
        InputError: two files have one name.
    """
    found: dict[str, Path] = {}
    for file in files:
        name = re.sub(r"[^A-Za-z0-9]+", "-", file.name[: len(file.name) - len(ending)]).strip("-") or "case"
        if name in found:
            raise InputError(f"{found[name]} and {file} would both be called '{name}' in nnU-Net's dataset; rename one")
        found[name] = file
    return found


def _as_stored(image: Volume, ending: str) -> Volume:
    """Pictures hold whole numbers only."""
    if ending == VOLUMES or image.array.dtype in (np.uint8, np.uint16):
        return image
    scaled = normalise(image, "percentile").apply(image.array) * LARGEST_GREY
    return image.with_array(scaled.round().astype(np.uint16))


def _written(volume: Volume, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(volume, notes={}).write(path, overwrite=True)
