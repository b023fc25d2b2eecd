"""Training slices of the lite models: which ones, split by patient, and their tower embeddings cached once.

The tower takes about a second a slice on a CPU, the aligner microseconds, so every slice goes through the tower once;
its embedding (256 x 64 x 64) is averaged to 32 x 32 and kept in half precision (0.5 MB a slice), beside the fraction of
each cell that every target covers. Every slice has a file of its own, named by what shaped it: a run that is stopped
goes on where it was, and another choice of slices computes only those that are new.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from FreqSegLib.errors import InputError, SettingsError
from FreqSegLib.intensity import normalise
from FreqSegLib.slices import Frame, SliceStack
from FreqSegLib.training.near_duplicates import near_duplicates
from FreqSegLib.volume import Volume

POOLED_SIDE = 32
CHANNELS = 2
VALIDATION_SHARE = 0.15
# there are few ultrasound images, and the gate is calibrated on the normal ones among them
VALIDATION_SHARES = {"busi": 0.25}
FLAIR_PRESENT, FLAIR_ABSENT = 10, 7
VALIDATION_HIPPOCAMPUS = 3
SMALLEST_TARGET = 30


@dataclass(frozen=True)
class SliceChoice:
    """How much of each kind is trained on; validation slices are the same for every choice.

    Attributes:
        hippocampus: slices of each training volume that show it.
        hippocampus_copies: augmented copies of each of them, on average.
        xrays: share of the training X-rays, in (0, 1].

    Raises:
        SettingsError: a value is out of range.
    """

    hippocampus: int = 3
    hippocampus_copies: float = 0.15
    xrays: float = 1.0

    def __post_init__(self) -> None:
        if self.hippocampus < 1:
            raise SettingsError(f"hippocampus is {self.hippocampus}; at least one slice a volume is needed")
        if self.hippocampus_copies < 0:
            raise SettingsError(f"hippocampus_copies is {self.hippocampus_copies}; it cannot be negative")
        if not 0 < self.xrays <= 1:
            raise SettingsError(f"xrays is {self.xrays}; it is a share between 0 (left out) and 1")


@dataclass(frozen=True)
class TrainingSlice:
    """One slice to cache: where it comes from and how it is changed on the way.

    Attributes:
        image, mask: paths relative to the data folder; no mask for pictures that teach a modality alone.
        modality: key of ``vocabulary.MODALITIES``.
        group: patient or image, the unit of the split.
        split: "train" or "validation".
        index: slice along the stack's axis.
        augment: seed of a change of scale, angle, grey curve and noise; None for the slice as it is.
    """

    image: str
    mask: str | None
    modality: str
    group: str
    split: str
    index: int
    augment: int | None


@dataclass(frozen=True)
class CachedSlices:
    """The cache in memory: embeddings (N, 256, 32, 32) fp16, coverage (N, 2, 32, 32) in [0, 1], visible (N, 32, 32)."""

    slices: tuple[TrainingSlice, ...]
    embeddings: NDArray[np.float16]
    coverage: NDArray[np.float16]
    visible: NDArray[np.bool_]

    def subset(self, split: str) -> NDArray[np.int64]:
        return np.array([i for i, item in enumerate(self.slices) if item.split == split], dtype=np.int64)


def split_of(group: str) -> str:
    """A patient's split, fixed by a hash of its name: about 15 % go to validation (ultrasound: 25 %)."""
    limit = VALIDATION_SHARES.get(group.split("/")[0], VALIDATION_SHARE)
    return "validation" if _share(group) < limit else "train"


def ultrasound_groups(images: Sequence[Path]) -> dict[Path, str]:
    """Group of every image of BUSI's training folder: near-duplicates belong to the first of their names."""
    return {image: f"busi/{first.stem}" for image, first in near_duplicates(images).items()}


def plan(data: Path, seed: int = 0, choice: SliceChoice | None = None) -> list[TrainingSlice]:
    """Choose at most about 2,500 slices of the training folders, in a shuffled order.

    Every choice about a slice hangs on its own name and the seed, so that more or fewer images change no other slice.

    Args:
        data: folder with ``segmentation/`` and ``fusion/`` (see its README).
        seed: of the choice and of the augmentations.
        choice: how much of each kind.

    Raises:
        InputError: there are no training images.
    """
    if not (data / "segmentation").is_dir():
        raise InputError(f"'{data}' holds no training images (no folder 'segmentation'); set FREQSEG_DATA.")
    choice = choice or SliceChoice()
    chosen: list[TrainingSlice] = []

    def add(image: Path, mask: Path | None, modality: str, group: str, index: int, copies: float = 0) -> None:
        split = split_of(group)
        relative, labels = (path.relative_to(data).as_posix() if path else None for path in (image, mask))
        assert relative is not None
        wanted = 0
        if split == "train":
            wanted = int(copies) + (_share("copy", seed, relative, index) < copies % 1)
        for augment in [None, *(_number("augment", seed, relative, index, copy) % (1 << 30) for copy in range(wanted))]:
            chosen.append(TrainingSlice(relative, labels, modality, group, split, index, augment))

    for image in sorted((data / "segmentation/lgg_flair/train").glob("*_flair.nii.gz")):
        mask = image.with_name(image.name.replace("_flair.nii", "_mask.nii"))
        truth, stack = _displayed(mask), _displayed(image)
        area = truth.reshape(len(truth), -1).sum(1)
        head = stack.reshape(len(stack), -1).mean(1) > 0.15 * stack.reshape(len(stack), -1).mean(1).max()
        for indices, count in ((area >= SMALLEST_TARGET, FLAIR_PRESENT), ((area == 0) & head, FLAIR_ABSENT)):
            for index in _spread(np.flatnonzero(indices), count):
                add(image, mask, "flair", f"lgg/{image.name[:12]}", int(index), copies=0.35)

    for image in sorted((data / "segmentation/cxr_lungs/train/images").glob("*.png")):
        group = f"cxr/{image.stem}"
        if split_of(group) == "validation" or _share("xray", seed, group) < choice.xrays:
            add(image, image.parents[1] / "masks" / image.name, "xray", group, 0)

    scans = sorted((data / "segmentation/busi/train/images").glob("*.png"))
    for image, group in ultrasound_groups(scans).items():
        add(image, image.parents[1] / "masks" / image.name, "ultrasound", group, 0, copies=2)

    for image in sorted((data / "segmentation/hippocampus/train/images").glob("*.nii.gz")):
        mask = image.parents[1] / "labels" / image.name
        truth = _displayed(mask) > 0
        area = truth.reshape(len(truth), -1).sum(1)
        group = f"hippocampus/{image.name.split('.')[0]}"
        present, absent = np.flatnonzero(area >= 10), np.flatnonzero(area == 0)
        wanted = choice.hippocampus if split_of(group) == "train" else VALIDATION_HIPPOCAMPUS
        for index in _shuffled(present, seed, group)[:wanted]:
            add(image, mask, "t1", group, int(index), copies=choice.hippocampus_copies)
        if len(absent) and _share("absent", seed, group) < 0.6:
            add(image, mask, "t1", group, int(_shuffled(absent, seed, group)[0]))

    for folder, modality in (("CT", "ct"), ("MRI", "mr")):
        for image in sorted((data / "fusion/harvard_ct_mri" / folder).glob("*.png"))[::2]:
            add(image, None, modality, f"harvard/{image.stem[:-3]}", 0)
    return sorted(chosen, key=lambda item: _number("order", seed, item.image, item.index, item.augment))


def cache(
    data: Path,
    folder: Path,
    embed: Callable[[Tensor], Tensor],
    slices: Sequence[TrainingSlice],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill ``folder`` with the slices' pooled embeddings, a file each; those already there are kept.

    Args:
        data: the images' folder.
        folder: the cache; a file holds ``embedding``, ``coverage``, ``visible`` and the ``seconds`` it took.
        embed: (1, 3, 256, 256) in [0, 1] -> (1, 256, 64, 64).
        slices: the plan.
        progress: called with (done, total).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, item in enumerate(slices, start=1):
        path = cache_file(folder, item)
        if not path.exists():
            started = time.monotonic()
            image, masks, valid = load(data, item)
            with torch.inference_mode():
                pooled = F.avg_pool2d(embed(image.expand(-1, 3, -1, -1)), 2)
            side = image.shape[-1] // POOLED_SIDE
            temporary = path.with_suffix(".part")
            with temporary.open("wb") as file:
                np.savez(
                    file,
                    embedding=pooled[0].half().numpy(),
                    coverage=F.avg_pool2d(masks, side)[0].half().numpy(),
                    visible=(F.avg_pool2d(valid, side)[0, 0] > 0.5).numpy(),
                    seconds=np.float32(time.monotonic() - started),
                )
            temporary.replace(path)
        if progress:
            progress(number, len(slices))


def cache_file(folder: Path, item: TrainingSlice) -> Path:
    """Where a slice's embedding is kept; the name follows from everything that shapes the contents."""
    shaped = (item.image, item.mask, item.modality, item.index, item.augment)
    return folder / f"{hashlib.sha256(repr(shaped).encode()).hexdigest()[:32]}.npz"


def read_cache(folder: Path, slices: Sequence[TrainingSlice]) -> CachedSlices:
    """Those of ``slices`` that are in the cache, in their order."""
    found = [item for item in slices if cache_file(folder, item).exists()]
    count, side = len(found), POOLED_SIDE
    embeddings = np.empty((count, 256, side, side), dtype=np.float16)
    coverage = np.empty((count, CHANNELS, side, side), dtype=np.float16)
    visible = np.empty((count, side, side), dtype=np.bool_)
    for row, item in enumerate(found):
        with np.load(cache_file(folder, item)) as kept:
            embeddings[row], coverage[row], visible[row] = kept["embedding"], kept["coverage"], kept["visible"]
    return CachedSlices(tuple(found), embeddings, coverage, visible)


def seconds_and_bytes(folder: Path, slices: Sequence[TrainingSlice]) -> tuple[float, int]:
    """What the slices' embeddings took to compute, and the disk they fill."""
    files = [cache_file(folder, item) for item in slices]
    seconds = 0.0
    for file in files:
        with np.load(file) as kept:
            seconds += float(kept["seconds"])
    return seconds, sum(file.stat().st_size for file in files)


def load(data: Path, item: TrainingSlice, size: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """A slice in the tower's frame: image (1, 1, S, S) in [0, 1], targets (1, 2, S, S), visible (1, 1, S, S)."""
    volume = Volume.read(data / item.image)
    stack = SliceStack.of(volume, "axial")
    frame = Frame.fit(stack.slice_shape, stack.pixel_spacing, size)
    pixels = normalise(volume, "percentile").apply(stack.take(item.index))
    targets = np.zeros((CHANNELS, *stack.slice_shape), dtype=np.float32)
    if item.mask is not None:
        labels = SliceStack.of(Volume.read(data / item.mask), "axial").take(item.index)
        targets = target_channels(labels, item.modality)
    image = frame.to_frame(torch.from_numpy(np.ascontiguousarray(pixels))[None, None])
    masks = frame.to_frame(torch.from_numpy(targets)[None])
    visible = frame.to_frame(torch.ones(1, 1, *stack.slice_shape))
    if item.augment is None:
        return image, masks, visible
    return _augmented(image, masks, visible, item.augment)


def target_channels(labels: NDArray[Any], modality: str) -> NDArray[np.float32]:
    """Label slice (h, w) -> the modality's target channels (2, h, w).

    X-ray: left lung (on the picture's right), right lung. T1: anterior, posterior hippocampus. Others: one target.
    """
    channels = np.zeros((CHANNELS, *labels.shape), dtype=np.float32)
    if modality == "t1":
        channels[0], channels[1] = labels == 1, labels == 2
    elif modality == "xray":
        lungs = labels > 0
        if lungs.any():
            middle = int(np.median(np.flatnonzero(lungs.any(0))))
            central = slice(max(0, middle - labels.shape[1] // 6), middle + labels.shape[1] // 6 + 1)
            # the spine is the column between the lungs that they cover least
            cut = central.start + int(lungs[:, central].sum(0).argmin())
            channels[1, :, :cut], channels[0, :, cut:] = lungs[:, :cut], lungs[:, cut:]
    else:
        channels[0] = labels > 0
    return channels


def _augmented(image: Tensor, masks: Tensor, visible: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale, angle, gamma, gain, noise = torch.rand(5, generator=generator).tolist()
    turn = (angle - 0.5) * 0.35
    zoom = 0.85 + 0.35 * scale
    cos, sin = float(np.cos(turn)) * zoom, float(np.sin(turn)) * zoom
    shift = (torch.rand(2, generator=generator) - 0.5) * 0.12
    grid = F.affine_grid(
        torch.tensor([[[cos, -sin, shift[0]], [sin, cos, shift[1]]]]), list(image.shape), align_corners=False
    )
    image, masks, visible = (F.grid_sample(x, grid, align_corners=False) for x in (image, masks, visible))
    image = image.clamp(0, 1) ** (0.65 + 0.8 * gamma) * (0.8 + 0.4 * gain)
    image = image + torch.randn(image.shape, generator=generator) * 0.03 * noise
    return image.clamp(0, 1) * (visible > 0.5), masks, visible


def _displayed(path: Path) -> NDArray[Any]:
    volume = Volume.read(path)
    return SliceStack.of(volume, "axial").displayed(volume.array)


def _spread(indices: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    if len(indices) <= count:
        return indices
    return indices[np.linspace(0, len(indices) - 1, count).round().astype(int)]


def _shuffled(indices: NDArray[np.int64], seed: int, name: str) -> NDArray[np.int64]:
    return indices[np.random.default_rng(_number("shuffle", seed, name)).permutation(len(indices))]


def _number(*described: object) -> int:
    return int(hashlib.sha256("|".join(map(str, described)).encode()).hexdigest()[:8], 16)


def _share(*described: object) -> float:
    """A number in [0, 1] that follows from what is described."""
    return _number(*described) / 0xFFFFFFFF
