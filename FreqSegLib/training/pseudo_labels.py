"""Pseudo-labels: what the text-guided pipeline draws, as one label map a case, and how far it is to be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.errors import SettingsError
from FreqSegLib.slices import SliceStack
from FreqSegLib.text_results import PromptResult


@dataclass(frozen=True)
class SelectionConfig:
    """Which cases, and which of their slices, may teach.

    Attributes:
        max_uncertainty: mean standard deviation of the saliency over replicas, inside what is drawn on a slice; slices
            above it are uncertain.
        min_score: probability that the target is there; slices drawn on with less are uncertain.
        max_empty_score: the same; slices left empty with more are uncertain. Without a calibrated gate (a preset other
            than lite) set it to 1.
        min_certain: share of a case's slices that must be certain for it to be kept. In volumes the others get
            nnU-Net's ignore label.
        keep_empty: also keep cases in which nothing is drawn.
    """

    max_uncertainty: float = 0.05
    min_score: float = 0.5
    max_empty_score: float = 0.5
    min_certain: float = 0.5
    keep_empty: bool = False

    def __post_init__(self) -> None:
        for name in ("min_score", "max_empty_score", "min_certain"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if not self.max_uncertainty >= 0:
            raise SettingsError(f"max_uncertainty must be at least 0, got {self.max_uncertainty}")


@dataclass(frozen=True)
class PseudoLabel:
    """One case's labels, and whether they may teach.

    Attributes:
        labels: (k, j, i) whole numbers: 0 background, then the targets in their order (the first one wins where two
            overlap), then the ignore label on uncertain slices.
        kept: they may.
        reason: why not, in words; empty where they may.
        scores: probability that each target is there.
        uncertainties: of each target, over all that is drawn; NaN where nothing is.
        voxels: of each target, before anything is ignored.
        uncertain: slices, from 0, along the stack.
    """

    labels: NDArray[np.uint8]
    kept: bool
    reason: str
    scores: tuple[float, ...]
    uncertainties: tuple[float, ...]
    voxels: tuple[int, ...]
    uncertain: tuple[int, ...]


def pseudo_label(results: Sequence[PromptResult], stack: SliceStack, config: SelectionConfig) -> PseudoLabel:
    """Make one case's labels.

    Args:
        results: one a target, segmented with ``uncertainty``.
        stack: the slices they were drawn on.
        config: see there.

    Raises:
        SettingsError: they were segmented without uncertainty.
    """
    labels = stack.empty(np.uint8)
    for number, result in reversed(list(enumerate(results, start=1))):
        labels[result.mask] = number
    certain = np.all([_certain(result, stack, config) for result in results], axis=0)
    uncertain = tuple(int(index) for index in np.flatnonzero(~certain))
    drawn = any(np.any(stack.displayed(labels)[index]) for index in np.flatnonzero(certain))
    reason = ""
    if certain.mean() < config.min_certain:
        reason = f"{len(uncertain)} of {stack.count} slices are uncertain" if stack.count > 1 else "uncertain"
    elif not drawn and not config.keep_empty:
        reason = "nothing was found"
    for index in uncertain:
        stack.displayed(labels)[index] = len(results) + 1
    return PseudoLabel(
        labels=labels,
        kept=not reason,
        reason=reason,
        scores=tuple(result.score for result in results),
        uncertainties=tuple(_mean(_uncertainty(result), result.mask) for result in results),
        voxels=tuple(int(result.mask.sum()) for result in results),
        uncertain=uncertain,
    )


def _certain(result: PromptResult, stack: SliceStack, config: SelectionConfig) -> NDArray[np.bool_]:
    """Of each slice."""
    masks, doubts = stack.displayed(result.mask), stack.displayed(_uncertainty(result))
    found = np.zeros(stack.count, dtype=np.bool_)
    for index in range(stack.count):
        score = float(result.slice_scores[index])
        if masks[index].any():
            doubt = _mean(doubts[index], masks[index])
            found[index] = score >= config.min_score and doubt <= config.max_uncertainty
        else:
            found[index] = score <= config.max_empty_score
    return found


def _uncertainty(result: PromptResult) -> NDArray[np.float32]:
    if result.uncertainty is None:
        raise SettingsError(f"'{result.name}' was segmented without uncertainty; set uncertainty")
    return result.uncertainty


def _mean(values: NDArray[np.float32], mask: NDArray[np.bool_]) -> float:
    return float(values[mask].mean()) if mask.any() else float("nan")
