"""What phase 2 learns from: cached tower embeddings, the pictures themselves, and prompts with what they should find.

The embeddings come from :mod:`FreqSegLib.training.lite_data`. Beside them every slice's picture and full-resolution
target masks are kept as bytes, so that no batch reads a volume again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from FreqSegLib.clip.mini_lm import MiniLM
from FreqSegLib.clip.vocabulary import MODALITIES, targets
from FreqSegLib.training.contrastive import FALSE, TRUE, UNKNOWN
from FreqSegLib.training.lite_data import CHANNELS, TrainingSlice, cache_file, load

PICTURE_SIDE = 256
LEAST_PIXELS = 16
_FRAMES = (
    "the {}",
    "segment the {}",
    "find the {}",
    "please outline the {} in this image",
    "show me the {}",
    "where is the {}?",
    "{} segmentation",
    "delineate the {} of this patient",
)


@dataclass(frozen=True)
class Pictures:
    """Slices in the tower's frame, one a row: ``images`` (N, 256, 256) and ``masks`` (N, 2, 256, 256), 255 is 1."""

    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]


def cache_pictures(
    data: Path,
    folder: Path,
    slices: Sequence[TrainingSlice],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill ``folder`` with the slices' pictures and masks, a file each; those already there are kept.

    Args:
        data: the images' folder.
        folder: the cache; a file holds ``image`` and ``masks`` as bytes.
        slices: the plan.
        progress: called with (done, total).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, item in enumerate(slices, start=1):
        path = cache_file(folder, item)
        if not path.exists():
            image, masks, _ = load(data, item, PICTURE_SIDE)
            temporary = path.with_suffix(".part")
            with temporary.open("wb") as file:
                np.savez_compressed(file, image=_bytes(image[0, 0]), masks=_bytes(masks[0]))
            temporary.replace(path)
        if progress:
            progress(number, len(slices))


def read_pictures(folder: Path, slices: Sequence[TrainingSlice]) -> Pictures:
    """The pictures of ``slices``, in their order; all of them must be in the cache."""
    images = np.empty((len(slices), PICTURE_SIDE, PICTURE_SIDE), dtype=np.uint8)
    masks = np.empty((len(slices), CHANNELS, PICTURE_SIDE, PICTURE_SIDE), dtype=np.uint8)
    for row, item in enumerate(slices):
        with np.load(cache_file(folder, item)) as kept:
            images[row], masks[row] = kept["image"], kept["masks"]
    return Pictures(images, masks)


@dataclass(frozen=True)
class Wording:
    """A way to ask for a target: ``target`` counts along ``vocabulary.targets()``."""

    text: str
    target: int


def trained_wordings() -> list[Wording]:
    """Every trained wording of every target, alone and in frames people put around it; never a held-out one."""
    held_out = {text.lower() for meaning in targets() for text in meaning.held_out}
    found: dict[str, Wording] = {}
    for number, meaning in enumerate(targets()):
        for wording in meaning.wordings:
            bare = wording.removeprefix("a ").removeprefix("the ")
            pictures = MODALITIES[meaning.modality].wordings
            frames = [wording, *(frame.format(bare) for frame in _FRAMES), *(f"{bare} on {p}" for p in pictures)]
            for text in frames:
                if text.lower() not in held_out:
                    found.setdefault(text.lower(), Wording(text, number))
    return list(found.values())


def held_out_wordings() -> list[Wording]:
    """Those nobody trains on, by target."""
    return [Wording(text, number) for number, meaning in enumerate(targets()) for text in meaning.held_out]


def sentence_vectors(text: MiniLM, wordings: Sequence[Wording]) -> Tensor:
    """MiniLM's vectors (len(wordings), 384)."""
    parts = [text.encode([w.text for w in wordings[i : i + 64]]) for i in range(0, len(wordings), 64)]
    return torch.cat(parts).clone()


def truth_of(slices: Sequence[TrainingSlice], masks: NDArray[np.uint8]) -> NDArray[np.int8]:
    """What is known of each slice and target, (N, T): TRUE, FALSE, or UNKNOWN.

    A target of a few pixels is not judged. Nobody marked tumours in the CT and MR of the fusion data.
    """
    table = np.full((len(slices), len(targets())), FALSE, dtype=np.int8)
    for row, item in enumerate(slices):
        for column, meaning in enumerate(targets()):
            if meaning.modality == item.modality:
                area = int((masks[row, list(meaning.channels)].max(0) > 127).sum())
                table[row, column] = TRUE if area >= LEAST_PIXELS else UNKNOWN if area else FALSE
            elif meaning.modality == "flair" and item.modality in ("ct", "mr"):
                table[row, column] = UNKNOWN
    return table


def target_masks(masks: Tensor, wanted: Sequence[int]) -> Tensor:
    """Slices' channels (P, 2, H, W) and a target each -> (P, 1, H, W): the union of the target's channels."""
    found = [masks[row, list(targets()[target].channels)].amax(0) for row, target in enumerate(wanted)]
    return torch.stack(found)[:, None]


def mirrored(
    embedding: Tensor, images: Tensor, masks: Tensor, which: Tensor, modality: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """Slices seen in a mirror where ``which`` (B) is True; on X-rays the sides' channels are exchanged with them.

    Args:
        embedding: (B, 256, 32, 32).
        images: (B, 1, H, W).
        masks: (B, 2, H, W).
        which: (B) bool.
        modality: (B) keys of ``vocabulary.MODALITIES``.
    """
    chosen = which[:, None, None, None]
    embedding, images, masks = (torch.where(chosen, x.flip(-1), x) for x in (embedding, images, masks))
    sides = which & torch.tensor([m == "xray" for m in modality])
    return embedding, images, torch.where(sides[:, None, None, None], masks.flip(1), masks)


def warped(maps: Tensor, turn: Tensor, zoom: Tensor, shift: Tensor) -> Tensor:
    """Maps (B, C, H, W) turned by ``turn`` (B) radians, zoomed by ``zoom`` (B), shifted by ``shift`` (B, 2) in [-1, 1].

    The same numbers move an embedding, its picture and its masks alike, whatever their sizes.
    """
    cos, sin = turn.cos() * zoom, turn.sin() * zoom
    rows = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(rows, list(maps.shape), align_corners=False)
    return F.grid_sample(maps, grid, align_corners=False, padding_mode="zeros")


def _bytes(values: Tensor) -> NDArray[np.uint8]:
    return (values.clamp(0, 1) * 255).round().byte().numpy()
