"""Images with labels for the spectral segmenter: pairs of files, one split by name, batches that depend on the step."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from FreqSegLib.errors import InputError
from FreqSegLib.mamba.model_config import InputConfig
from FreqSegLib.mamba.spectral_input import SliceInput, VolumeInput
from FreqSegLib.registration import same_grid
from FreqSegLib.training.spectral_config import AugmentConfig, DataConfig, SpectralRecipe, TrainingConfig
from FreqSegLib.volume import Volume


@dataclass(frozen=True)
class Pair:
    """An image's file and its labels'. ``name`` is what their names share."""

    name: str
    image: Path
    label: Path


@dataclass(frozen=True)
class Item:
    """What a batch is made of: one slice, picture or volume.

    Attributes:
        case: name of the file it is from; the unit of the split and of the validation's average.
        name: with the slice's number, for messages.
        image: (*size) in [0, 1].
        label: (*size).
    """

    case: str
    name: str
    image: Tensor
    label: Tensor


@dataclass(frozen=True)
class Batch:
    """Images (b, 1, *size) in [0, 1], labels (b, *size), and what they are, for messages."""

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]


def find_pairs(config: DataConfig, folder: Path, *, test: bool = False) -> list[Pair]:
    """Files of both folders that belong together, by name.

    Args:
        config: the two folders and the endings.
        folder: what relative folders are relative to.
        test: of the test folders instead.

    Raises:
        InputError: a folder is missing or empty, or a file has no counterpart (the first is named).
    """
    found: list[dict[str, Path]] = []
    for kind, place, ending in (
        ("images", config.test_images if test else config.images, config.image_ending),
        ("labels", config.test_labels if test else config.labels, config.label_ending),
    ):
        inside = folder / place
        if not inside.is_dir():
            raise InputError(f"the folder of {kind} does not exist: {inside}. Give its path, or the data's folder.")
        files = {path.name.removesuffix(ending): path for path in inside.iterdir() if path.name.endswith(ending)}
        if not files:
            raise InputError(f"{inside} holds no {kind}: no file name ends with '{ending}'")
        found.append(files)
    images, labels = found
    for kind, there, missing in (("label", labels, images), ("image", images, labels)):
        alone = sorted(set(missing) - set(there))
        if alone:
            more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
            raise InputError(f"{missing[alone[0]]} has no {kind}{more}; add it, or take the file away")
    return [Pair(name, images[name], labels[name]) for name in sorted(images)]


def split(pairs: Sequence[Pair], share: float) -> tuple[list[Pair], list[Pair]]:
    """Training and validation pairs, by a hash of the name: the same whatever else is in the folder.

    Raises:
        InputError: there are fewer than two.
    """
    if len(pairs) < 2:
        raise InputError(f"training needs at least 2 images, one of them to validate on, got {len(pairs)}")
    ordered = sorted(pairs, key=lambda pair: _hash(pair.name))
    count = min(len(pairs) - 1, max(1, round(share * len(pairs))))
    return sorted(ordered[count:], key=lambda pair: pair.name), sorted(ordered[:count], key=lambda pair: pair.name)


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def read_pair(pair: Pair, data: DataConfig) -> tuple[Volume, NDArray[np.uint8]]:
    """An image, and its labels (k, j, i) from 0 to the number of classes.

    Raises:
        InputError: a file cannot be read, the files' grids differ, or a label lies outside the classes.
    """
    fill = data.fill_nonfinite
    with _naming(pair.image):
        volume = Volume.read(pair.image, fill_nonfinite=fill)
    with _naming(pair.label):
        label = Volume.read(pair.label, fill_nonfinite=None if fill is None else 0)
    if volume.shape != label.shape:
        raise InputError(f"{pair.image} has {volume.shape} voxels, its labels {label.shape}; they must be on one grid")
    if volume.spatial_dimension == label.spatial_dimension == 3 and not same_grid(volume, label, tolerance=0.5):
        raise InputError(
            f"{pair.image} and {pair.label} lie apart by more than half a voxel (origins {_said(volume.origin)} and "
            f"{_said(label.origin)}, spacings {_said(volume.spacing)} and {_said(label.spacing)} mm); they must be on "
            "one grid: resample the labels, or copy the image's geometry to them"
        )
    return volume, read_labels(label, data, pair.label)


def read_items(
    pair: Pair, data: DataConfig, config: InputConfig, warn: Callable[[str], None] = lambda sentence: None
) -> list[Item]:
    """A pair as the network sees it: every slice, or the volume.

    Args:
        pair, data, config: see there.
        warn: called with what is unusual about the image.

    Raises:
        InputError: see :func:`read_pair`; or the image is constant, or not of the form.
    """
    volume, array = read_pair(pair, data)
    for sentence in volume.warnings:
        warn(sentence)
    if config.form == "volume":
        with _naming(pair.image):
            whole = VolumeInput.of(volume, config)
        return [Item(pair.name, pair.name, whole.image()[0, 0], whole.labels(array)[0])]
    with _naming(pair.image):
        slices = SliceInput.of(volume, config)
    indices = range(slices.stack.count)
    images, labels = slices.images(indices)[:, 0], slices.labels(array, indices)
    return [
        Item(pair.name, f"{pair.name} slice {index}" if len(indices) > 1 else pair.name, images[index], labels[index])
        for index in indices
    ]


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors about a volume name its file: among hundreds its name alone does not tell where it is."""
    try:
        yield
    except InputError as error:
        if str(path) in str(error):
            raise
        raise InputError(f"{path}: {error}") from error


def _said(lengths: NDArray[np.float64]) -> str:
    return "(" + ", ".join(f"{length:g}" for length in lengths) + ")"


def read_labels(label: Volume, data: DataConfig, path: Path) -> NDArray[np.uint8]:
    """Labels (k, j, i) from 0 to the number of classes.

    Raises:
        InputError: one lies outside; ``path`` is named.
    """
    if data.binary:
        return (label.array > 0).astype(np.uint8)
    values = np.unique(label.array)
    wrong = [value for value in values if value not in range(len(data.classes) + 1)]
    if wrong:
        hint = "; set binary where any value above 0 means the class" if len(data.classes) == 1 else ""
        raise InputError(
            f"{path}: labels must be 0 (background) to {len(data.classes)} ({', '.join(data.classes)}), got "
            f"{wrong[0]:g}{hint}"
        )
    return label.array.astype(np.uint8)


class Batches(Dataset[Batch]):
    """Training batches, each made from its step alone, so that a resumed run repeats them.

    Args:
        items: of the training split.
        config, augment: see there.
        rank, world: which of how many processes this is; each makes its share of every batch.

    Raises:
        InputError: no item shows a labelled voxel.
    """

    def __init__(
        self, items: Sequence[Item], config: TrainingConfig, augment: AugmentConfig, rank: int = 0, world: int = 1
    ) -> None:
        self.items, self.config, self.augment = items, config, augment
        self.rank, self.world = rank, world
        self.shows = [bool((item.label > 0).any()) for item in items]
        self.foreground = [index for index, shows in enumerate(self.shows) if shows]
        if not self.foreground:
            raise InputError("no training image has a labelled voxel, so there is nothing to learn; check the labels")
        self.steps_per_epoch = config.steps_per_epoch or max(1, math.ceil(len(items) / config.batch_size))

    def __len__(self) -> int:
        return self.config.epochs * self.steps_per_epoch

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, augmented; on the CPU."""
        chosen = self.chosen(step)[self.rank :: self.world]
        rng = np.random.default_rng([self.config.seed, step, self.rank])
        images, labels = [], []
        for index in chosen:
            item = self.items[index]
            image, label = self._cropped(item, rng)
            image, label = augmented(image[None, None], label[None], self.augment, rng)
            images.append(image[0])
            labels.append(label[0])
        return Batch(torch.stack(images), torch.stack(labels).long(), tuple(self.items[i].name for i in chosen))

    def chosen(self, step: int) -> list[int]:
        """Which items a step shows: each once an epoch, but for those replaced so that enough show a label."""
        size = max(self.config.batch_size, self.world)
        epoch, place = divmod(step, self.steps_per_epoch)
        rng = np.random.default_rng([self.config.seed, epoch])
        order = np.resize(rng.permutation(len(self.items)), self.steps_per_epoch * size)
        batch = [int(index) for index in order[place * size : (place + 1) * size]]
        missing = math.ceil(self.config.foreground_share * size) - sum(self.shows[index] for index in batch)
        own = np.random.default_rng([self.config.seed, epoch, place])
        for position, index in enumerate(batch):
            if missing > 0 and not self.shows[index]:
                batch[position] = int(own.choice(self.foreground))
                missing -= 1
        return batch

    def _cropped(self, item: Item, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A random window; around a labelled voxel as often as ``foreground_share`` says."""
        image, label = item.image, item.label
        crop = self.config.crop
        if not crop:
            return image, label
        short = [max(0, side - have) for side, have in zip(crop, image.shape, strict=True)]
        if any(short):
            amounts = [value for amount in reversed(short) for value in (amount // 2, amount - amount // 2)]
            image, label = F.pad(image, amounts), F.pad(label, amounts)
        centre = [int(rng.integers(0, side)) for side in image.shape]
        if rng.random() < self.config.foreground_share:
            voxels = label.nonzero()
            if len(voxels):
                centre = voxels[int(rng.integers(len(voxels)))].tolist()
        window = []
        for side, have, middle in zip(crop, image.shape, centre, strict=True):
            first = int(np.clip(middle - side // 2 + int(rng.integers(-side // 4, side // 4 + 1)), 0, have - side))
            window.append(slice(first, first + side))
        return image[tuple(window)], label[tuple(window)]

    def loader(self, first: int, workers: int) -> DataLoader[Batch]:
        """Batches from step ``first`` on, in order."""
        return DataLoader(
            self, batch_size=None, sampler=range(first, len(self)), num_workers=workers, collate_fn=_unchanged
        )


def _unchanged(batch: Any) -> Any:
    return batch


def augmented(images: Tensor, labels: Tensor, config: AugmentConfig, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """One random turn, scale, shift, flip and change of greys for all images given.

    Args:
        images: (b, 1, *size) in [0, 1].
        labels: (b, *size).
        config: how far.
        rng: where from.

    Returns:
        The same shapes; images in [0, 1], labels of the type they had.
    """
    dimensions = labels.dim() - 1
    for axis in config.flip_axes:
        if rng.random() < 0.5:
            images, labels = images.flip(axis + 2), labels.flip(axis + 1)
    if config.rotation or config.scale or config.shift:
        grid = _grid(images, config, rng, dimensions)
        images = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
        turned = F.grid_sample(labels[:, None].float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
        labels = turned[:, 0].to(labels.dtype)
    if config.gamma:
        images = images.clamp(0, 1) ** math.exp(rng.uniform(-config.gamma, config.gamma))
    contrast = 1 + rng.uniform(-config.contrast, config.contrast)
    images = (images - 0.5) * contrast + 0.5 + rng.uniform(-config.brightness, config.brightness)
    if config.noise:
        noise = torch.from_numpy(rng.standard_normal(images.shape, dtype=np.float32))
        images = images + noise * rng.uniform(0, config.noise)
    return images.clamp(0, 1), labels


def _grid(images: Tensor, config: AugmentConfig, rng: np.random.Generator, dimensions: int) -> Tensor:
    """Sampling positions of a turn about the centre that keeps the aspect of pixels."""
    angles = np.deg2rad(rng.uniform(-config.rotation, config.rotation, 1 if dimensions == 2 else 3))
    matrix = np.eye(dimensions)
    planes = ((0, 1),) if dimensions == 2 else ((0, 1), (0, 2), (1, 2))
    for (first, second), angle in zip(planes, angles, strict=True):
        turn = np.eye(dimensions)
        turn[[first, first, second, second], [first, second, first, second]] = (
            np.cos(angle),
            -np.sin(angle),
            np.sin(angle),
            np.cos(angle),
        )
        matrix = matrix @ turn
    matrix = matrix / (1 + rng.uniform(-config.scale, config.scale))
    # grid_sample's coordinates run from -1 to 1 along each side, x (the last axis) first
    sides = np.array(images.shape[:1:-1], dtype=np.float64)
    matrix = matrix * sides[None, :] / sides[:, None]
    offset = rng.uniform(-2 * config.shift, 2 * config.shift, dimensions)
    theta = torch.from_numpy(np.concatenate([matrix, offset[:, None]], 1)).float()
    return F.affine_grid(theta[None].expand(images.shape[0], -1, -1), list(images.shape), align_corners=False)


def load_split(
    recipe: SpectralRecipe, folder: Path, warn: Callable[[str], None] = lambda sentence: None
) -> tuple[list[Item], list[Item]]:
    """Training and validation items, in memory.

    Args:
        recipe: says where they are.
        folder: what relative folders are relative to.
        warn: called with what is unusual about the images, once for what several have in common.

    Raises:
        InputError: see :func:`find_pairs`, :func:`split`, :func:`read_items`.
    """
    if recipe.data.test_images:
        # not read yet, but missing after hours of training they would be a pity
        find_pairs(recipe.data, folder, test=True)
    said: list[str] = []
    train, validation = (
        [item for pair in pairs for item in read_items(pair, recipe.data, recipe.input, said.append)]
        for pairs in split(find_pairs(recipe.data, folder), recipe.training.validation_share)
    )
    alike: dict[str, list[str]] = {}
    for sentence in said:
        # after the file's name
        alike.setdefault(re.sub(r"[\d.]+", "", sentence.partition(": ")[2]), []).append(sentence)
    for first, *others in alike.values():
        warn(first + (f" (and {len(others)} more images like it)" if others else ""))
    count = len(recipe.data.classes) + 1
    shown = torch.stack([torch.bincount(item.label.flatten(), minlength=count) for item in train]).sum(0)
    for number, name in enumerate(recipe.data.classes, start=1):
        if shown[1:].any() and not shown[number]:
            raise InputError(
                f"no training image shows '{name}' (label {number}), so it cannot be learned; take it out of classes, "
                "or check the labels"
            )
    return train, validation
