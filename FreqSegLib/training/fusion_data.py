"""The registered CT/MR slices that the fusion networks learn from, split by patient once and for all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from FreqSegLib.errors import InputError

Split = Literal["train", "validation", "test"]

PATIENTS: dict[Split, tuple[str, ...]] = {
    "train": ("2", "20", "33", "37"),
    "validation": ("28", "32"),
    "test": ("34", "41"),
}
"""Fixed before anything was trained. ``test`` is looked at once, after everything has been chosen on ``validation``."""

FOLDER = Path("fusion") / "harvard_ct_mri"


@dataclass(frozen=True, eq=False)
class Pairs:
    """Registered slices.

    Attributes:
        ct, mr: (N, 1, H, W), float32 in [0, 1], whole grey levels over 255.
        names: file names without suffix; the digits before the last three are the patient's.
    """

    ct: Tensor
    mr: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, indices: list[int] | range) -> Pairs:
        chosen = list(indices)
        return Pairs(self.ct[chosen], self.mr[chosen], tuple(self.names[index] for index in chosen))


def patient_of(name: str) -> str:
    """``28005`` -> ``28``: the last three digits number the slice."""
    return name[:-3]


def read_pairs(data: Path, split: Split) -> Pairs:
    """The slices of one split's patients, in the order of their names.

    Args:
        data: the folder that holds ``fusion/harvard_ct_mri``.
        split: see :data:`PATIENTS`.

    Raises:
        InputError: the folder is missing, a slice has no partner, or a patient of the split has no slices.
    """
    folder = data / FOLDER
    if not (folder / "CT").is_dir() or not (folder / "MRI").is_dir():
        raise InputError(f"no CT/MR pairs in {folder}: put the data there or set FREQSEG_DATA to the folder above")
    ct_files = {path.stem: path for path in folder.glob("CT/*.png")}
    mr_files = {path.stem: path for path in folder.glob("MRI/*.png")}
    alone = sorted(ct_files.keys() ^ mr_files.keys())
    if alone:
        raise InputError(f"{folder}: {len(alone)} slices are in one of CT and MRI only, the first is {alone[0]}.png")
    names = sorted((name for name in ct_files if patient_of(name) in PATIENTS[split]), key=int)
    lacking = set(PATIENTS[split]) - {patient_of(name) for name in names}
    if lacking:
        raise InputError(f"{folder} holds no slices of the {split} patients {', '.join(sorted(lacking))}")
    ct = torch.stack([_grey(ct_files[name]) for name in names])
    mr = torch.stack([_grey(mr_files[name]) for name in names])
    return Pairs(ct, mr, tuple(names))


def _grey(path: Path) -> Tensor:
    from PIL import Image

    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"), dtype=np.float32)
    return torch.from_numpy(pixels / 255.0)[None]
