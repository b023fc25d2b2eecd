"""What the text-guided pipeline gives back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.sam.visual_prompts import VisualPrompt
from FreqSegLib.settings import TextSegmentationSettings
from FreqSegLib.volume import Segment


@dataclass(frozen=True)
class Intermediate:
    """One slice's stages, kept when asked for. Images are (h, w); saliencies in [0, 1] by branch."""

    index: int
    image: NDArray[np.float32]
    frequency: dict[str, NDArray[np.float32]]
    saliency: dict[str, NDArray[np.float32]]
    fused: NDArray[np.float32]
    uncertainty: NDArray[np.float32] | None
    coarse: NDArray[np.bool_]
    prompts: tuple[VisualPrompt, ...]
    mask: NDArray[np.bool_]
    probability: float


@dataclass(frozen=True)
class PromptResult:
    """What was found for one prompt, on the input's own grid.

    Attributes:
        name: the prompt as typed.
        mask: (k, j, i) bool; empty where the target was judged absent.
        saliency: (k, j, i) float32 in [0, 1].
        uncertainty: (k, j, i) float32, standard deviation of the saliency over replicas; None unless asked for.
        score: probability in [0, 1] that the target is in the volume (calibrated where the preset has a gate).
        slice_scores: the same a slice, along the stack.
        color: RGB in [0, 1].
        meaning: what the prompt was understood as.
        intermediates: one a slice, when asked for.
        method: "trained" or "zero-shot": where the coarse mask came from. Trained, ``saliency`` is the probability that
            the pixel belongs to the target.
    """

    name: str
    mask: NDArray[np.bool_]
    saliency: NDArray[np.float32]
    uncertainty: NDArray[np.float32] | None
    score: float
    slice_scores: NDArray[np.float32]
    color: tuple[float, float, float]
    meaning: str | None
    intermediates: tuple[Intermediate, ...] = ()
    method: str = "zero-shot"

    @property
    def is_empty(self) -> bool:
        return not self.mask.any()

    def segment(self) -> Segment:
        """For :func:`FreqSegLib.volume.write_segmentation`."""
        return Segment(self.name, self.mask, self.color)


@dataclass(frozen=True)
class Segmentation:
    """Segments in the order of the prompts, and what the user should know."""

    segments: tuple[PromptResult, ...]
    warnings: tuple[str, ...]
    settings: TextSegmentationSettings

    def __iter__(self) -> Iterator[PromptResult]:
        return iter(self.segments)

    def __getitem__(self, index: int) -> PromptResult:
        return self.segments[index]

    def __len__(self) -> int:
        return len(self.segments)
