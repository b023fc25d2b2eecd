"""Training slices of the lite aligner: which ones, split by patient, and their tower embeddings cached once.

The tower takes about a second a slice on a CPU, the aligner microseconds, so every slice goes through the tower once;
its embedding (256 x 64 x 64) is averaged to 32 x 32 and kept in half precision (0.5 MB a slice), beside the fraction of
each cell that every target covers. A run that is stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from FreqSegLib.errors import InputError
from FreqSegLib.intensity import normalise
from FreqSegLib.slices import Frame, SliceStack
from FreqSegLib.volume import Volume

POOLED_SIDE = 32
CHANNELS = 2
VALIDATION_SHARE = 0.15
FLAIR_PRESENT, FLAIR_ABSENT = 10, 7
XRAY_COUNT = 260
SMALLEST_TARGET = 30


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
    """A patient's split, fixed by a hash of its name: about 15 % go to validation."""
    share = int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) / 0xFFFFFFFF
    return "validation" if share < VALIDATION_SHARE else "train"


def plan(data: Path, seed: int = 0) -> list[TrainingSlice]:
    """Choose at most about 2,500 slices of the training folders, in a shuffled order.

    Args:
        data: folder with ``segmentation/`` and ``fusion/`` (see its README).
        seed: of the choice and of the augmentations.
    """
    if not (data / "segmentation").is_dir():
        raise InputError(f"'{data}' holds no training images (no folder 'segmentation'); set FREQSEG_DATA.")
    rng = np.random.default_rng(seed)
    chosen: list[TrainingSlice] = []

    def add(image: Path, mask: Path | None, modality: str, group: str, index: int, copies: int = 0) -> None:
        split = split_of(group)
        relative = [str(path.relative_to(data)) if path else None for path in (image, mask)]
        assert relative[0] is not None
        for augment in [None, *[int(rng.integers(1 << 30)) for _ in range(copies if split == "train" else 0)]]:
            chosen.append(TrainingSlice(relative[0], relative[1], modality, group, split, index, augment))

    for image in sorted((data / "segmentation/lgg_flair/train").glob("*_flair.nii.gz")):
        mask = image.with_name(image.name.replace("_flair.nii", "_mask.nii"))
        truth, stack = _displayed(mask), _displayed(image)
        area = truth.reshape(len(truth), -1).sum(1)
        head = stack.reshape(len(stack), -1).mean(1) > 0.15 * stack.reshape(len(stack), -1).mean(1).max()
        for indices, count in ((area >= SMALLEST_TARGET, FLAIR_PRESENT), ((area == 0) & head, FLAIR_ABSENT)):
            for index in _spread(np.flatnonzero(indices), count):
                add(image, mask, "flair", f"lgg/{image.name[:12]}", int(index), copies=int(rng.random() < 0.35))

    xrays = sorted((data / "segmentation/cxr_lungs/train/images").glob("*.png"))
    for number in sorted(rng.permutation(len(xrays))[:XRAY_COUNT]):
        image = xrays[number]
        add(
            image,
            image.parents[1] / "masks" / image.name,
            "xray",
            f"cxr/{image.stem}",
            0,
            copies=int(rng.random() < 0.35),
        )

    for image in sorted((data / "segmentation/busi/train/images").glob("*.png")):
        add(image, image.parents[1] / "masks" / image.name, "ultrasound", f"busi/{image.stem}", 0, copies=2)

    for image in sorted((data / "segmentation/hippocampus/train/images").glob("*.nii.gz")):
        mask = image.parents[1] / "labels" / image.name
        truth = _displayed(mask) > 0
        area = truth.reshape(len(truth), -1).sum(1)
        group = f"hippocampus/{image.name.split('.')[0]}"
        present, absent = np.flatnonzero(area >= 10), np.flatnonzero(area == 0)
        for index in rng.permutation(present)[:2]:
            add(image, mask, "t1", group, int(index), copies=int(rng.random() < 0.15))
        if len(absent) and rng.random() < 0.6:
            add(image, mask, "t1", group, int(rng.choice(absent)))

    for folder, modality in (("CT", "ct"), ("MRI", "mr")):
        images = sorted((data / "fusion/harvard_ct_mri" / folder).glob("*.png"))
        for image in images[::2]:
            add(image, None, modality, f"harvard/{image.stem[:-3]}", 0)
    return [chosen[i] for i in rng.permutation(len(chosen))]


def cache(
    data: Path,
    folder: Path,
    embed: Callable[[Tensor], Tensor],
    slices: Sequence[TrainingSlice],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill ``folder`` with the slices' pooled embeddings; slices already there are kept.

    Args:
        data: the images' folder.
        folder: the cache: ``plan.json``, ``embeddings.npy``, ``coverage.npy``, ``visible.npy``,
            ``done.npy`` and what each slice took, ``seconds.npy``.
        embed: (1, 3, 256, 256) in [0, 1] -> (1, 256, 64, 64).
        slices: the plan.
        progress: called with (done, total).

    Raises:
        InputError: the folder holds the cache of another plan.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan_file = folder / "plan.json"
    described = json.dumps([asdict(item) for item in slices])
    if plan_file.exists() and plan_file.read_text(encoding="utf-8") != described:
        raise InputError(f"'{folder}' holds the embeddings of another plan; remove it or name another folder.")
    plan_file.write_text(described, encoding="utf-8")
    total = len(slices)
    embeddings = _array(folder / "embeddings.npy", (total, 256, POOLED_SIDE, POOLED_SIDE), np.float16)
    coverage = _array(folder / "coverage.npy", (total, CHANNELS, POOLED_SIDE, POOLED_SIDE), np.float16)
    visible = _array(folder / "visible.npy", (total, POOLED_SIDE, POOLED_SIDE), np.bool_)
    done = _array(folder / "done.npy", (total,), np.bool_)
    seconds = _array(folder / "seconds.npy", (total,), np.float32)
    for number, item in enumerate(slices):
        if not done[number]:
            started = time.monotonic()
            image, masks, valid = load(data, item)
            with torch.inference_mode():
                pooled = F.avg_pool2d(embed(image.expand(-1, 3, -1, -1)), 2)
            embeddings[number] = pooled[0].half().numpy()
            side = image.shape[-1] // POOLED_SIDE
            coverage[number] = F.avg_pool2d(masks, side)[0].half().numpy()
            visible[number] = (F.avg_pool2d(valid, side)[0, 0] > 0.5).numpy()
            seconds[number] = time.monotonic() - started
            done[number] = True
        if progress:
            progress(number + 1, total)


def read_cache(folder: Path) -> CachedSlices:
    """The finished part of a cache."""
    slices = [TrainingSlice(**item) for item in json.loads((folder / "plan.json").read_text(encoding="utf-8"))]
    done = np.flatnonzero(np.load(folder / "done.npy"))
    arrays = [np.load(folder / f"{name}.npy", mmap_mode="r")[done] for name in ("embeddings", "coverage", "visible")]
    return CachedSlices(tuple(slices[i] for i in done), *arrays)


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


def _array(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    if path.exists():
        return np.load(path, mmap_mode="r+")
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
