"""Phase 2 for the zero-shot path: fusion of the frequency branches, and the amortised bottleneck, each alone.

Tower, aligner and text tower stay as they are; both modules learn from cached tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from FreqSegLib.clip.vocabulary import targets
from FreqSegLib.interaction.zero_shot_fusion import ZeroShotFusion
from FreqSegLib.saliency.amortised import AmortisedBottleneck, bottleneck_objective
from FreqSegLib.training.zero_shot_data import MASK_SIDE, BranchSlices, Pairs

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))
SMOOTH = 20.0


@dataclass(frozen=True)
class FusionTraining:
    """What is particular to the fusion's training.

    Attributes:
        batch_size: pairs of slice and target a step.
        dice_weight, bce_weight: of the loss on probabilities.
    """

    batch_size: int = 8
    dice_weight: float = 0.7
    bce_weight: float = 0.3


@dataclass(frozen=True)
class BottleneckTraining:
    """What is particular to the amortised bottleneck's training.

    Attributes:
        batch_size: pictures a step, each asked one thing.
        noise_samples: draws of the noise a picture.
        other_share: share of the questions that are about another modality.
    """

    batch_size: int = 16
    noise_samples: int = 2
    other_share: float = 0.15


class FusionPhase:
    """Batches, loss and validation of the fusion, for :func:`FreqSegLib.training.loop.fit`."""

    def __init__(
        self,
        model: ZeroShotFusion,
        lesson: tuple[BranchSlices, Pairs],
        check: tuple[BranchSlices, Pairs],
        training: FusionTraining,
        seed: int,
        branches: tuple[str, str] = ("low", "high"),
    ) -> None:
        """Args:
        model: trained.
        lesson, check: slices and pairs of the training and the validation patients.
        training, seed: see there.
        branches: what is given for the low and the high branch; "raw" twice shows what the heads do without them.
        """
        self.model, self.training, self.seed, self.branches = model, training, seed, branches
        self.lesson, self.check = lesson, check
        self._targets = [t for t in range(len(targets())) if len(lesson[1].of(t))]

    def batch_loss(self, number: int) -> Tensor:
        """The loss of one batch; what is in it and dropout follow from its number and the seed alone."""
        rng = np.random.default_rng((self.seed, number))
        pairs = self.lesson[1]
        # every target as often as any other
        drawn = [int(rng.choice(pairs.of(int(rng.choice(self._targets))))) for _ in range(self.training.batch_size)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(1 << 62)))
            fused = self._fused(*self.lesson, np.array(drawn))
        return self._loss(fused, pairs.masks[drawn])

    def _loss(self, fused: Tensor, masks: Tensor) -> Tensor:
        c = self.training
        probability = enlarged(fused).clamp(1e-4, 1 - 1e-4)
        p, truth = probability.flatten(1), masks.flatten(1)
        smooth = SMOOTH * truth.shape[1] / 256**2
        overlap = (2 * (p * truth).sum(1) + smooth) / (p.sum(1) + truth.sum(1) + smooth)
        return c.dice_weight * (1 - overlap).mean() + c.bce_weight * F.binary_cross_entropy(p, truth)

    def _fused(self, data: BranchSlices, pairs: Pairs, drawn: NDArray[np.int64]) -> Tensor:
        return fused(self.model, data, pairs, drawn, self.branches)

    @torch.no_grad()
    def maps(self, data: BranchSlices, pairs: Pairs) -> Tensor:
        """The fused saliency of every pair, (P, 1, rows, columns)."""
        parts = [
            self._fused(data, pairs, np.arange(start, min(start + 32, len(pairs.rows))))
            for start in range(0, len(pairs.rows), 32)
        ]
        return torch.cat(parts)

    def validate(self) -> dict[str, float]:
        """Dice a validation patient, cut where the training patients' Dice is best."""
        thresholds = best_thresholds(self.maps(*self.lesson), self.lesson[1])
        scores = patient_dice(self.maps(*self.check), self.check[1], thresholds)
        return {"score": score(scores), **{f"dice {name}": float(np.mean(v)) for name, v in _lists(scores).items()}}


def fused(
    model: ZeroShotFusion,
    data: BranchSlices,
    pairs: Pairs,
    drawn: NDArray[np.int64],
    branches: tuple[str, str] = ("low", "high"),
) -> Tensor:
    """The fused saliency (B, 1, rows, columns) of some pairs."""
    order = {"raw": 0, "low": 1, "high": 2}
    raw, low, high = (pairs.maps[drawn, order[name]][:, None] for name in ("raw", *branches))
    if not model.needs_tokens:
        return model(raw, low, high)
    tokens = [data.tokens[name][pairs.rows[drawn]].float() for name in branches]
    return model(raw, low, high, *tokens)


def enlarged(maps: Tensor) -> Tensor:
    """Maps (P, 1, rows, columns) at the masks' size."""
    return F.interpolate(maps, (MASK_SIDE, MASK_SIDE), mode="bilinear", align_corners=False)


def patient_dice(maps: Tensor, pairs: Pairs, thresholds: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Dice by target and patient, a patient's slices together.

    Args:
        maps: (P, 1, rows, columns) in [0, 1].
        pairs: what they belong to.
        thresholds: by target's name; foreground above.
    """
    found: dict[str, dict[str, float]] = {}
    for target, meaning in enumerate(targets()):
        own = pairs.of(target)
        if len(own) and meaning.name in thresholds:
            sums = _sums(enlarged(maps[own]), pairs.masks[own], thresholds[meaning.name])
            found[meaning.name] = _by_patient(sums, [pairs.patients[i] for i in own])
    return found


def best_thresholds(maps: Tensor, pairs: Pairs) -> dict[str, float]:
    """The cut of :data:`THRESHOLDS` with the best mean Dice a patient, by target."""
    found = {}
    for target, meaning in enumerate(targets()):
        own = pairs.of(target)
        if not len(own):
            continue
        patients = [pairs.patients[i] for i in own]
        large, masks = enlarged(maps[own]), pairs.masks[own]
        means = [float(np.mean(list(_by_patient(_sums(large, masks, c), patients).values()))) for c in THRESHOLDS]
        found[meaning.name] = THRESHOLDS[int(np.argmax(means))]
    return found


def score(scores: Mapping[str, Mapping[str, float]]) -> float:
    """Mean of the modalities' mean Dice."""
    by_modality: dict[str, list[float]] = {}
    for meaning in targets():
        if meaning.name in scores:
            by_modality.setdefault(meaning.modality, []).append(float(np.mean(list(scores[meaning.name].values()))))
    return float(np.mean([np.mean(values) for values in by_modality.values()])) if by_modality else math.nan


def _lists(scores: Mapping[str, Mapping[str, float]]) -> dict[str, list[float]]:
    return {name: list(values.values()) for name, values in scores.items()}


def _sums(large: Tensor, masks: Tensor, threshold: float) -> NDArray[np.int64]:
    """Overlap, drawn and true pixels of each pair, (P, 3)."""
    drawn, truth = (large > threshold).flatten(1), (masks > 0.5).flatten(1)
    return torch.stack([(drawn & truth).sum(1), drawn.sum(1), truth.sum(1)], 1).numpy()


def _by_patient(sums: NDArray[np.int64], patients: Sequence[str]) -> dict[str, float]:
    found = {}
    for patient in dict.fromkeys(patients):
        overlap, drawn, truth = sums[[p == patient for p in patients]].sum(0)
        # a target that vanishes at this size is not judged
        if truth:
            found[patient] = float(2 * overlap / (drawn + truth))
    return found


class BottleneckPhase:
    """Batches, loss and validation of the amortised bottleneck, for :func:`FreqSegLib.training.loop.fit`."""

    def __init__(
        self,
        model: AmortisedBottleneck,
        lesson: BranchSlices,
        check: BranchSlices,
        questions: Mapping[str, Tensor],
        suffix: Callable[[Tensor], Tensor],
        training: BottleneckTraining,
        seed: int,
    ) -> None:
        """Args:
        model: trained.
        lesson, check: slices of the training and the validation patients; every branch is a picture of its own.
        questions: by modality, what may be asked of it, (Q, D) unit vectors.
        suffix: tokens -> unit image vectors, frozen.
        training, seed: see there.
        """
        self.model, self.lesson, self.check = model, lesson, check
        self.questions, self.suffix, self.training, self.seed = questions, suffix, training, seed

    def batch_loss(self, number: int) -> Tensor:
        """M2IB's objective on one batch; everything in it follows from its number and the seed alone."""
        rng = np.random.default_rng((self.seed, number))
        return self._objective(self.lesson, rng, self.training.batch_size).mean()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The same objective on validation patients, always on the same questions, betas and noise."""
        rng = np.random.default_rng(self.seed)
        values = torch.cat([self._objective(self.check, rng, 32) for _ in range(4)])
        return {"score": -float(values.mean()), "objective": float(values.mean())}

    def _objective(self, data: BranchSlices, rng: np.random.Generator, count: int) -> Tensor:
        c, config = self.training, self.model.config
        rows = rng.integers(len(data.slices), size=count)
        branches = rng.choice(list(data.tokens), size=count)
        tokens = torch.stack([data.tokens[b][int(r)] for b, r in zip(branches, rows, strict=True)]).float()
        texts = torch.stack([self._asked(data.slices[row].modality, rng) for row in rows])
        span = np.log(config.most_beta / config.least_beta)
        beta = torch.from_numpy(config.least_beta * np.exp(rng.random(count) * span)).float()
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        noise = torch.randn(c.noise_samples, *tokens.shape, generator=generator)
        return bottleneck_objective(self.suffix, self.model(tokens, texts, beta), tokens, texts, beta, noise)

    def _asked(self, modality: str, rng: np.random.Generator) -> Tensor:
        others = [name for name in self.questions if name != modality]
        if others and rng.random() < self.training.other_share:
            modality = str(rng.choice(others))
        pool = self.questions[modality]
        return pool[int(rng.integers(len(pool)))]
