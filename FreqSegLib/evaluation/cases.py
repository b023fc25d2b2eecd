"""The labelled cases there are: the test folders, and the validation patients inside the training folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.clip.vocabulary import Meaning, targets
from FreqSegLib.errors import InputError, SettingsError
from FreqSegLib.slices import SliceStack
from FreqSegLib.volume import Volume

Split = Literal["test", "train-validation"]
Item = TypeVar("Item")


@dataclass(frozen=True)
class LabelledSet:
    """One kind of labelled images, in the layout of the data folder's README.

    Attributes:
        key: first part of its patients' group names (see ``training.lite_data.plan``).
        title: for people.
        modality: key of ``vocabulary.MODALITIES``.
        unit: of distances: ``mm`` where the source records a spacing, ``px`` elsewhere.
        folder: relative to the data folder; it holds ``train`` and ``test``.
        images, masks: subfolders of these; empty where both lie together.
        image_ending, mask_ending: what follows the case's name.
    """

    key: str
    title: str
    modality: str
    unit: str
    folder: str
    images: str
    masks: str
    image_ending: str
    mask_ending: str


LABELLED_SETS: tuple[LabelledSet, ...] = (
    LabelledSet("lgg", "glioma on FLAIR MR", "flair", "px", "lgg_flair", "", "", "_flair.nii.gz", "_mask.nii.gz"),
    LabelledSet("cxr", "lungs on X-ray", "xray", "px", "cxr_lungs", "images", "masks", ".png", ".png"),
    LabelledSet("busi", "breast lesion on ultrasound", "ultrasound", "px", "busi", "images", "masks", ".png", ".png"),
    LabelledSet(
        "hippocampus", "hippocampus on T1 MR", "t1", "mm", "hippocampus", "images", "labels", ".nii.gz", ".nii.gz"
    ),
)


@dataclass(frozen=True)
class Case:
    """One labelled image or volume.

    Attributes:
        group: patient or image, the unit of every split, like ``lgg/TCGA_CS_4941``.
        image, mask: files on one grid.
        modality: key of ``vocabulary.MODALITIES``.
        unit: of distances, ``mm`` or ``px``.
        most_slices: a longer stack is thinned out evenly to at most so many slices; 0 keeps all.
    """

    group: str
    image: Path
    mask: Path
    modality: str
    unit: str
    most_slices: int = 0

    def read(self) -> LabelledVolume:
        """The volume with its labels.

        Raises:
            InputError: a file is missing or damaged, or both are not on one grid.
        """
        volume, labels = Volume.read(self.image), Volume.read(self.mask)
        if volume.shape != labels.shape:
            raise InputError(f"{self.mask} has shape {labels.shape}, but {self.image} has {volume.shape}")
        if self.most_slices:
            volume, labels = thinned(volume, self.most_slices), thinned(labels, self.most_slices)
        return LabelledVolume(volume, labels.array, self.modality)


@dataclass(frozen=True)
class LabelledVolume:
    """A case in memory; ``labels`` is (k, j, i) on the volume's grid."""

    volume: Volume
    labels: NDArray[np.generic]
    modality: str

    def truth(self, target: str) -> NDArray[np.bool_]:
        """Where the target is, (k, j, i); the union of its meaning's channels, as in training."""
        from FreqSegLib.training.lite_data import target_channels

        channels = target_meaning(target).channels
        planes = [target_channels(plane, self.modality)[list(channels)].any(0) for plane in self.labels]
        return np.stack(planes)


def list_cases(
    data: Path, split: Split = "test", *, modalities: Sequence[str] | None = None, most_slices: int = 0
) -> list[Case]:
    """Every case of a split, set by set, sorted by name.

    Args:
        data: folder with ``segmentation/`` (see its README).
        split: ``test`` for the test folders; ``train-validation`` for the patients of the training folders that
            :func:`FreqSegLib.training.lite_data.split_of` keeps from training, on which settings may be chosen.
        modalities: only these.
        most_slices: see :class:`Case`.

    Raises:
        InputError: there are none.
        SettingsError: there is no such split.
    """
    if split not in get_args(Split):
        raise SettingsError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")
    found: list[Case] = []
    for kind in LABELLED_SETS:
        if modalities is None or kind.modality in modalities:
            found += _cases_of(kind, data, split)
    if not found:
        raise InputError(
            f"'{data}' holds no labelled images of the split '{split}' (folders segmentation/.../"
            f"{'test' if split == 'test' else 'train'}). Name the data's folder with --data, or set FREQSEG_DATA."
        )
    return [replace(case, most_slices=most_slices) for case in found]


def evenly_spaced(items: Sequence[Item], count: int | None) -> list[Item]:
    """At most ``count`` items, first and last among them, the same ones every time; None keeps all."""
    if count is None or len(items) <= count:
        return list(items)
    if count == 1:
        return [items[len(items) // 2]]
    return [items[int(position)] for position in np.linspace(0, len(items) - 1, count).round()]


def chosen_cases(cases: Sequence[Case], most: int | None) -> list[Case]:
    """At most ``most`` cases a modality, evenly spaced."""
    modalities = dict.fromkeys(case.modality for case in cases)
    return [case for m in modalities for case in evenly_spaced([c for c in cases if c.modality == m], most)]


def wrong_prompts(number: int, modality: str, count: int = 2) -> list[str]:
    """Targets that cannot be in a picture of ``modality``, each of another modality; they change with ``number``."""
    others: dict[str, list[str]] = {}
    for meaning in targets():
        if meaning.modality != modality:
            others.setdefault(meaning.modality, []).append(meaning.name)
    kinds = list(others.values())
    turns = [(number + step) % len(kinds) for step in range(min(count, len(kinds)))]
    return [kinds[turn][number // len(kinds) % len(kinds[turn])] for turn in turns]


def target_meaning(name: str) -> Meaning:
    """The target of that canonical name.

    Raises:
        SettingsError: there is none; all are listed.
    """
    for meaning in targets():
        if meaning.name == name:
            return meaning
    raise SettingsError(f"There is no labelled target '{name}'. Targets: {', '.join(m.name for m in targets())}.")


def thinned(volume: Volume, most: int) -> Volume:
    """Every n-th slice along the stacking axis, so that at most ``most`` remain; the grid's spacing grows with n."""
    stack = SliceStack.of(volume)
    step = ceil(stack.count / most)
    if step < 2:
        return volume
    axis = stack.order[0]
    first = (stack.count - 1) % step // 2
    column = 2 - axis
    affine = volume.affine.copy()
    affine[:3, 3] += first * affine[:3, column]
    affine[:3, column] *= step
    kept = (slice(None),) * axis + (slice(first, None, step),)
    return replace(volume, array=np.ascontiguousarray(volume.array[kept]), affine=affine)


def default_data_folder() -> Path:
    """FREQSEG_DATA, else ``shared/data`` beside the checkout."""
    given = os.environ.get("FREQSEG_DATA", "").strip()
    return Path(given) if given else Path(__file__).resolve().parents[3] / "shared" / "data"


def _cases_of(kind: LabelledSet, data: Path, split: Split) -> list[Case]:
    from FreqSegLib.training.lite_data import split_of, ultrasound_groups

    root = data / "segmentation" / kind.folder / ("test" if split == "test" else "train")
    cases = []
    images = sorted((root / kind.images).glob(f"*{kind.image_ending}"))
    grouped = ultrasound_groups(images) if kind.key == "busi" and split != "test" else {}
    for image in images:
        name = image.name.removesuffix(kind.image_ending)
        group = grouped.get(image, f"{kind.key}/{name}")
        if split == "test" or split_of(group) == "validation":
            mask = root / kind.masks / f"{name}{kind.mask_ending}"
            cases.append(Case(group, image, mask, kind.modality, kind.unit))
    return cases
