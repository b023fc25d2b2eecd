"""What the zero-shot path's own modules learn from: a small, even choice of slices, seen in three branches.

The slices are those of :mod:`FreqSegLib.training.lite_data`, without augmented copies, so that the raw image's
embedding is in its cache already. What is new is the tower's embedding of each low- and high-frequency image.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from FreqSegLib.clip.aligner import Aligner
from FreqSegLib.clip.questions import apart_from_contrasts
from FreqSegLib.clip.vocabulary import targets
from FreqSegLib.evaluation.cases import list_cases
from FreqSegLib.saliency.m2ib import BottleneckSettings, m2ib_information
from FreqSegLib.saliency.nib import nib_contribution
from FreqSegLib.settings import TextSegmentationSettings
from FreqSegLib.slices import SliceStack
from FreqSegLib.text_stages import branch_images
from FreqSegLib.training.contrastive import TRUE
from FreqSegLib.training.lite_data import TrainingSlice, cache, cache_file, read_cache
from FreqSegLib.training.text_guided_data import cache_pictures, read_pictures, target_masks, truth_of
from FreqSegLib.volume import Volume

FREQUENCIES = ("low", "high")
BRANCHES = ("raw", *FREQUENCIES)
MASK_SIDE = 128


def shows_a_target(data: Path, pictures: Path, item: TrainingSlice) -> bool:
    """Whether any target of the slice's modality is in it; its picture and masks are in the cache afterwards."""
    cache_pictures(data, pictures, [item])
    truth = truth_of([item], read_pictures(pictures, [item]).masks)
    return bool((truth == TRUE).any())


def choose(
    data: Path, pictures: Path, slices: Sequence[TrainingSlice], split: str, most: int, most_a_patient: int
) -> list[TrainingSlice]:
    """Slices that show a target, evenly over the modalities, whole patients in the plan's shuffled order.

    Args:
        data: the images' folder.
        pictures: cache of pictures and masks; what is looked at and missing is added.
        slices: the plan.
        split: "train", "validation" or "test".
        most: at most so many a modality.
        most_a_patient: at most so many a patient, evenly over those in the plan that show a target.
    """
    found: list[TrainingSlice] = []
    for modality in dict.fromkeys(meaning.modality for meaning in targets()):
        offered = [s for s in slices if s.split == split and s.modality == modality and s.augment is None]
        kept: list[TrainingSlice] = []
        for group in dict.fromkeys(item.group for item in offered):
            own = sorted((s for s in offered if s.group == group), key=lambda s: (s.image, s.index))
            showing = [s for s in own if shows_a_target(data, pictures, s)]
            few = np.unique(np.linspace(0, len(showing) - 1, min(most_a_patient, len(showing))).round().astype(int))
            kept += [showing[i] for i in few][: most - len(kept)]
            if len(kept) == most:
                break
        found += kept
    return found


def held_back_slices(data: Path, most_a_patient: int) -> list[TrainingSlice]:
    """Slices of the test folders that show something marked, a patient after the other.

    Args:
        data: the images' folder.
        most_a_patient: at most so many a patient, from the middles of as many equal parts of what is marked, so that
            few slices are not the first and the last one.
    """
    found = []
    for case in list_cases(data, "test"):
        labels = Volume.read(case.mask)
        stack = SliceStack.of(labels, "axial")
        marked = np.flatnonzero(stack.displayed(labels.array).reshape(stack.count, -1).any(1))
        parts = min(most_a_patient, len(marked))
        middles = ((np.arange(parts) + 0.5) * len(marked) / max(parts, 1)).astype(int)
        image, mask = (path.relative_to(data).as_posix() for path in (case.image, case.mask))
        found += [
            TrainingSlice(image, mask, case.modality, case.group, "test", int(index), None) for index in marked[middles]
        ]
    return found


def frequency_embed(
    embed: Callable[[Tensor], Tensor], branch: str, settings: TextSegmentationSettings
) -> Callable[[Tensor], Tensor]:
    """The tower behind one frequency image: (1, 3, 256, 256) raw, in [0, 1] -> (1, 256, 64, 64)."""

    def through(images: Tensor) -> Tensor:
        pictures = branch_images(images[:, :1], (branch,), settings)[branch]
        return embed(pictures.expand(-1, 3, -1, -1))

    return through


def cache_frequencies(
    data: Path,
    folder: Path,
    embed: Callable[[Tensor], Tensor],
    slices: Sequence[TrainingSlice],
    settings: TextSegmentationSettings,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill ``folder``/low and ``folder``/high with the pooled embeddings of both frequency images.

    Args:
        data: the images' folder.
        folder: a folder a branch is made in it; see :func:`FreqSegLib.training.lite_data.cache` for the files.
        embed: (1, 3, 256, 256) in [0, 1] -> (1, 256, 64, 64).
        slices: which.
        settings: whose wavelet makes the images.
        progress: called with (done, total) over both branches.
    """

    def told(before: int) -> Callable[[int, int], None]:
        return lambda done, total: progress(before + done, 2 * total) if progress else None

    for number, branch in enumerate(FREQUENCIES):
        with torch.inference_mode():
            cache(data, folder / branch, frequency_embed(embed, branch, settings), slices, told(number * len(slices)))


@dataclass(frozen=True)
class BranchSlices:
    """Slices as the bottleneck sees them, one a row.

    Attributes:
        slices: which.
        tokens: by branch (N, tokens, width), half precision.
        masks: target channels (N, 2, 256, 256), 255 is 1.
        truth: what is known of each target (N, T), see ``text_guided_data.truth_of``.
    """

    slices: tuple[TrainingSlice, ...]
    tokens: Mapping[str, Tensor]
    masks: NDArray[np.uint8]
    truth: NDArray[np.int8]


def read_branches(
    aligner: Aligner, layer_idx: int, slices: Sequence[TrainingSlice], raw: Path, frequencies: Path, pictures: Path
) -> BranchSlices:
    """From filled caches.

    Args:
        aligner: makes tokens of embeddings.
        layer_idx: block that the tokens stand after.
        slices: all of them cached.
        raw, frequencies, pictures: the folders.
    """
    tokens = {}
    for branch in BRANCHES:
        kept = read_cache(raw if branch == "raw" else frequencies / branch, slices)
        assert len(kept.slices) == len(slices)
        with torch.inference_mode():
            found = [
                aligner.prefix(torch.from_numpy(kept.embeddings[start : start + 16]).float(), layer_idx).half()
                for start in range(0, len(slices), 16)
            ]
        # made in inference mode, tokens could not enter a gradient
        tokens[branch] = torch.cat(found).clone()
    masks = read_pictures(pictures, slices).masks
    return BranchSlices(tuple(slices), tokens, masks, truth_of(slices, masks))


@dataclass(frozen=True)
class Pairs:
    """Slices asked for a target they show, one pair a row.

    Attributes:
        rows: of the slices, (P).
        asked: the target, along ``vocabulary.targets()``, (P).
        patients: the slice's group, P of them.
        maps: saliency of the raw, low and high image (P, 3, rows, columns) in [0, 1], scaled over a patient's slices.
        masks: where the target is, (P, 1, MASK_SIDE, MASK_SIDE) in [0, 1].
        seconds: what the saliencies took.
    """

    rows: NDArray[np.int64]
    asked: NDArray[np.int64]
    patients: tuple[str, ...]
    maps: Tensor
    masks: Tensor
    seconds: float = 0.0

    def of(self, target: int) -> NDArray[np.int64]:
        """Which pairs ask for a target."""
        return np.flatnonzero(self.asked == target)


@dataclass(frozen=True)
class Look:
    """How one target is looked for.

    Attributes:
        settings: complete; its bottleneck, layer, beta and so on.
        text: what the bottleneck is asked, (D) unit vector.
    """

    settings: TextSegmentationSettings
    text: Tensor


def question(name: str, settings: TextSegmentationSettings, encode_text: Callable[[Sequence[str]], Tensor]) -> Tensor:
    """What the bottleneck is asked for a target by its canonical name, (D)."""
    meaning = next(m for m in targets() if m.name == name)
    text = encode_text([meaning.name])[0]
    return apart_from_contrasts(text, meaning, encode_text) if settings.contrast else text


def make_pairs(
    data: BranchSlices,
    looks: Sequence[Look],
    suffix: Callable[[Tensor], Tensor],
    folder: Path,
    key: str,
    progress: Callable[[str], None] | None = None,
) -> Pairs:
    """Look for every target in the slices that show it, in all branches.

    Args:
        data: the slices.
        looks: one a target.
        suffix: tokens -> unit image vectors.
        folder: keeps the saliencies, a file a target.
        key: tells the encoder's weights from others.
        progress: told what is being looked for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, asked, maps, total = [], [], [], 0.0
    for target, look in enumerate(looks):
        own = np.flatnonzero(data.truth[:, target] == TRUE)
        if not len(own):
            continue
        if progress:
            progress(f"looking for {targets()[target].name} in {len(own)} slices ({look.settings.bottleneck})")
        found, seconds = _kept_saliency(data, own, look, suffix, folder, f"{key}-{target}")
        total += seconds
        patients = [data.slices[row].group for row in own]
        rows.append(own)
        asked.append(np.full(len(own), target))
        maps.append(scaled_by_patient(found, patients))
    row, target_of = np.concatenate(rows), np.concatenate(asked)
    masks = torch.from_numpy(data.masks[row]).float() / 255
    small = F.adaptive_avg_pool2d(target_masks(masks, [int(t) for t in target_of]), MASK_SIDE)
    return Pairs(row, target_of, tuple(data.slices[r].group for r in row), torch.cat(maps), small, total)


def saliency(look: Look, tokens: Tensor, suffix: Callable[[Tensor], Tensor], seeds: Sequence[int]) -> Tensor:
    """Tokens (B, N, width) -> (B, N) in the bottleneck's own unit, as the pipeline computes it without replicas."""
    s, texts = look.settings, look.text.expand(len(tokens), -1)
    if s.bottleneck == "nib":
        return nib_contribution(suffix, tokens, texts)
    assert s.beta is not None
    assert s.train_steps is not None
    assert s.num_noise_samples is not None
    return m2ib_information(
        suffix, tokens, texts, seeds, BottleneckSettings(s.beta, s.train_steps, s.num_noise_samples)
    )


def _kept_saliency(
    data: BranchSlices, rows: NDArray[np.int64], look: Look, suffix: Callable[[Tensor], Tensor], folder: Path, key: str
) -> tuple[Tensor, float]:
    """(P, 3, side, side) in the bottleneck's own unit, computed once, and the seconds that took."""
    shaped = (key, asdict(look.settings), [cache_file(folder, data.slices[row]).name for row in rows])
    path = folder / f"{hashlib.sha256(repr(shaped).encode()).hexdigest()[:32]}.npz"
    if path.exists():
        with np.load(path) as kept:
            return torch.from_numpy(kept["maps"]), float(kept["seconds"])
    started, branches = time.monotonic(), []
    for branch in BRANCHES:
        found = [
            saliency(look, data.tokens[branch][row][None].float(), suffix, [int(row)]) for row in torch.from_numpy(rows)
        ]
        branches.append(torch.cat(found))
    stacked = torch.stack(branches, 1)
    side = int(stacked.shape[-1] ** 0.5)
    stacked = stacked.unflatten(-1, (side, side))
    temporary = path.with_suffix(".part")
    with temporary.open("wb") as file:
        np.savez(file, maps=stacked.numpy(), seconds=np.float32(time.monotonic() - started))
    temporary.replace(path)
    return stacked, time.monotonic() - started


def scaled_by_patient(maps: Tensor, patients: Sequence[str]) -> Tensor:
    """Each branch to [0, 1] over a patient's slices, as the pipeline does over a volume; all equal gives zeros."""
    scaled = torch.zeros_like(maps)
    for patient in dict.fromkeys(patients):
        own = torch.tensor([p == patient for p in patients])
        values = maps[own]
        low, high = values.amin((0, 2, 3), keepdim=True), values.amax((0, 2, 3), keepdim=True)
        scaled[own] = torch.where(high > low, (values - low) / (high - low).clamp_min(1e-12), 0.0)
    return scaled
