"""Is the target in this slice at all? A calibrated image-text score against null prompts decides, before any saliency.

Saliency maps have no zero: the most salient place of an empty slice is as bright as a lesion once it is normalised, and
Otsu's threshold ignores scale. So each slice and the volume first pass this gate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """Logistic curve from margin to probability, fitted on validation patients.

    Attributes:
        slope, offset: probability = sigmoid(slope * (margin - offset)).
        slice_threshold: least probability of a slice.
        volume_threshold: least probability of the best slice of a volume.
    """

    slope: float = 10.0
    offset: float = 0.0
    slice_threshold: float = 0.5
    volume_threshold: float = 0.5

    def probability(self, margin: Tensor) -> Tensor:
        return torch.sigmoid(self.slope * (margin - self.offset))


@dataclass(frozen=True)
class Presence:
    """Outcome for one prompt: ``probability`` (S) of each slice, ``passed`` (S) bool."""

    probability: Tensor
    passed: Tensor

    @property
    def score(self) -> float:
        """Probability of the best slice, 0 for a volume without slices."""
        return float(self.probability.max()) if len(self.probability) else 0.0


def margins(images: Tensor, text: Tensor, nulls: Tensor) -> Tensor:
    """How much better the prompt fits than the best null prompt.

    Args:
        images: (S, D) unit vectors of the slices.
        text: (D) unit vector of the prompt.
        nulls: (K, D) unit vectors; with none, the plain cosine is returned.

    Returns:
        (S) in [-2, 2].
    """
    score = images @ text
    return score - (images @ nulls.T).amax(1) if len(nulls) else score


def presence(images: Tensor, text: Tensor, nulls: Tensor, calibration: Calibration) -> Presence:
    """Pass each slice, and then the volume, through the gate. See :func:`margins` for shapes."""
    return judged(margins(images, text, nulls), calibration)


def judged(evidence: Tensor, calibration: Calibration) -> Presence:
    """Pass each slice by its evidence (S), the higher the surer, and then the volume by its best slice."""
    probability = calibration.probability(evidence)
    passed = probability >= calibration.slice_threshold
    if len(probability) and probability.max() < calibration.volume_threshold:
        passed = torch.zeros_like(passed)
    return Presence(probability, passed)
