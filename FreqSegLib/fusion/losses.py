"""What fusion networks are trained on. Every loss takes (fused, ct, mr), each (B, 1, H, W) in [0, 1].

A loss returns a :class:`LossTerms`: the weighted total, and the terms without their weights for the log. Losses are
built once; a schedule changes ``weights`` between steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from FreqSegLib.errors import SettingsError
from FreqSegLib.fusion import metric_surrogates as surrogates
from FreqSegLib.fusion.filters import gradients, magnitude
from FreqSegLib.fusion.rules import ChooseMax, LaplacianPyramid, Maximum


@dataclass(frozen=True, eq=False)
class LossTerms:
    """``total`` to descend, and the unweighted ``terms`` (scalars)."""

    total: Tensor
    terms: dict[str, Tensor]


class FusionLoss(nn.Module, ABC):
    """A weighted sum of named terms.

    Args:
        weights: of the terms; those left out keep their defaults. A term of weight 0 is not computed.

    Raises:
        SettingsError: a name that is no term of this loss, or a negative weight.
    """

    defaults: ClassVar[dict[str, float]]

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.weights = dict(self.defaults)
        self.set_weights(weights or {})

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Change some weights."""
        for name, value in weights.items():
            if name not in self.defaults:
                raise SettingsError(f"{type(self).__name__} has no term '{name}'; it has {', '.join(self.defaults)}")
            if not value >= 0:
                raise SettingsError(f"the weight of '{name}' must be 0 or more, got {value}")
        self.weights.update(weights)

    def forward(self, fused: Tensor, ct: Tensor, mr: Tensor) -> LossTerms:
        computed = self.terms()
        terms = {name: computed[name](fused, ct, mr) for name, weight in self.weights.items() if weight}
        total = sum((self.weights[name] * term for name, term in terms.items()), fused.new_zeros(()))
        return LossTerms(total, terms)

    @abstractmethod
    def terms(self) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        """Every term by name."""


class BasicLoss(FusionLoss):
    """Mean squared error 1, SSIM 2, gradient 1."""

    defaults: ClassVar[dict[str, float]] = {"mse": 1.0, "ssim": 2.0, "gradient": 1.0}

    def terms(self) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        return {"mse": squared_error, "ssim": dissimilarity, "gradient": sobel_error}


class MedicalLoss(FusionLoss):
    """Mean squared error 0.5, SSIM 3, gradient 2, edge preservation 0.5, information 0.3."""

    defaults: ClassVar[dict[str, float]] = {"mse": 0.5, "ssim": 3.0, "gradient": 2.0, "edge": 0.5, "information": 0.3}

    def terms(self) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        return {
            "mse": squared_error,
            "ssim": dissimilarity,
            "gradient": sobel_error,
            "edge": edge_loss,
            "information": information_loss,
        }


class HybridLoss(FusionLoss):
    """L1 1, SSIM 2, Sobel and Prewitt gradient 1.5, perceptual 0.5, spectrum 0.3.

    Args:
        features: image -> feature maps, of the perceptual term (see :mod:`FreqSegLib.fusion.perceptual`); without it
            that term's weight must be 0.
        weights: as for :class:`FusionLoss`.

    Raises:
        SettingsError: the perceptual term has a weight and no features.
    """

    defaults: ClassVar[dict[str, float]] = {
        "l1": 1.0,
        "ssim": 2.0,
        "gradient": 1.5,
        "perceptual": 0.5,
        "frequency": 0.3,
    }

    def __init__(self, features: nn.Module | None = None, weights: Mapping[str, float] | None = None) -> None:
        super().__init__(weights)
        self.features = features

    def forward(self, fused: Tensor, ct: Tensor, mr: Tensor) -> LossTerms:
        if self.weights["perceptual"] and self.features is None:
            raise SettingsError("the perceptual term has a weight but no features; give features, or the weight 0")
        return super().forward(fused, ct, mr)

    def terms(self) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        return {
            "l1": lambda fused, ct, mr: F.l1_loss(fused, ct) + F.l1_loss(fused, mr),
            "ssim": lambda fused, ct, mr: 2 * dissimilarity(fused, ct, mr),
            "gradient": two_operator_error,
            "perceptual": self._perceptual,
            "frequency": spectrum_error,
        }

    def _perceptual(self, fused: Tensor, ct: Tensor, mr: Tensor) -> Tensor:
        assert self.features is not None
        with torch.no_grad():
            of_ct, of_mr = self.features(ct), self.features(mr)
        of_fused = self.features(fused)
        return (F.mse_loss(of_fused, of_ct) + F.mse_loss(of_fused, of_mr)) / 2


class MetricLoss(FusionLoss):
    """Surrogates of the evaluation's own metrics, each relative to the best of three classics on the same pair.

    A term is relu(lag + margin) + 0.05 lag with lag = 1 - value / best classic, averaged over the batch: what is ahead
    by the margin counts little. The classics are pixel maximum, haar choose-max and the Laplacian pyramid. A
    network trained on it is trained on what it is judged by, and its card says so.
    """

    margin: ClassVar[float] = 0.03
    defaults: ClassVar[dict[str, float]] = {
        "sd": 1.0,
        "sf": 1.5,
        "mi": 0.3,
        "scd": 4.0,
        "vif": 0.7,
        "qabf": 2.5,
        "ssim": 5.0,
    }

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        super().__init__(weights)
        self.classics = (Maximum(), ChooseMax("haar", 1), LaplacianPyramid(3))

    def forward(self, fused: Tensor, ct: Tensor, mr: Tensor, best: Mapping[str, Tensor] | None = None) -> LossTerms:
        """As every loss; ``best`` is what :meth:`best_classic` gave for these pairs, to save computing it again."""
        best = best or self.best_classic(ct, mr)
        terms = {}
        for name, measure in self.terms().items():
            if self.weights[name]:
                lag = 1 - measure(fused, ct, mr) / best[name].clamp_min(1e-3)
                terms[name] = ((lag + self.margin).relu() + 0.05 * lag).mean()
        total = sum((self.weights[name] * term for name, term in terms.items()), fused.new_zeros(()))
        return LossTerms(total, terms)

    @torch.no_grad()
    def best_classic(self, ct: Tensor, mr: Tensor) -> dict[str, Tensor]:
        """The largest value of every measure over the classics, (B,) each."""
        images = [classic(ct, mr).image.clamp(0, 1) for classic in self.classics]
        return {
            name: torch.stack([measure(image, ct, mr) for image in images]).amax(0)
            for name, measure in self.terms().items()
        }

    def terms(self) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        return {
            "sd": lambda fused, ct, mr: surrogates.standard_deviation(fused),
            "sf": lambda fused, ct, mr: surrogates.spatial_frequency(fused),
            "mi": _both(surrogates.mutual_information),
            "scd": surrogates.correlations_of_differences,
            "vif": _both(surrogates.visual_information_fidelity),
            "qabf": surrogates.edge_information,
            "ssim": _both(surrogates.structural_similarity),
        }


def squared_error(fused: Tensor, ct: Tensor, mr: Tensor) -> Tensor:
    """(MSE(F, CT) + MSE(F, MR)) / 2; least for the plain average."""
    return (F.mse_loss(fused, ct) + F.mse_loss(fused, mr)) / 2


def dissimilarity(fused: Tensor, ct: Tensor, mr: Tensor) -> Tensor:
    """1 - (SSIM(F, CT) + SSIM(F, MR)) / 2, 0 to 2."""
    similar = _both(surrogates.structural_similarity)(fused, ct, mr)
    return 1 - similar.mean() / 2


def sobel_error(fused: Tensor, ct: Tensor, mr: Tensor) -> Tensor:
    """Mean of | |grad F| - max(|grad CT|, |grad MR|) |, Sobel divided by 4, so in units of the image a pixel."""
    return _gradient_error(fused, ct, mr, "sobel")


def two_operator_error(fused: Tensor, ct: Tensor, mr: Tensor) -> Tensor:
    """The same with the mean of Sobel's and Prewitt's magnitudes."""
    strengths = [(_strength(image, "sobel") + _strength(image, "prewitt")) / 2 for image in (fused, ct, mr)]
    return F.l1_loss(strengths[0], torch.maximum(strengths[1], strengths[2]))


def edge_loss(fused: Tensor, ct: Tensor, mr: Tensor) -> Tensor:
    """1 - correlation of the fused image's Sobel magnitude with the larger of the sources', 0 to 2.

    It is the metric EP of the evaluation. An image without edges counts as correlation 0.
    """
    target = torch.maximum(_strength(ct, "sobel"), _strength(mr, "sobel"))
    found = _strength(fused, "sobel")
    a, b = (image.flatten(1) - image.flatten(1).mean(1, keepdim=True) for image in (found, target))
    return 1 - F.cosine_similarity(a, b, dim=1).mean()


def information_loss(fused: Tensor, ct: Tensor, mr: Tensor) -> Tensor:
    """1 - (I(F, CT) + I(F, MR)) / (I(CT, CT) + I(MR, MR)), 0 (all is told) to 1; of 32 triangular bins.

    I(X, X) is what a copy would score, so the ratio needs no units. Constant sources have nothing to tell: 0.
    """
    told = _both(lambda one, other: surrogates.mutual_information(one, other, 32))(fused, ct, mr)
    there = surrogates.mutual_information(ct, ct, 32) + surrogates.mutual_information(mr, mr, 32)
    return torch.where(there > 1e-6, 1 - told / there.clamp_min(1e-6), 0.0).mean()


def spectrum_error(fused: Tensor, ct: Tensor, mr: Tensor) -> Tensor:
    """Mean of | |FFT F| - max(|FFT CT|, |FFT MR|) | with the orthonormal transform, in units of the image.

    Without ``ortho`` the term would grow with the square root of the number of pixels and drown every other.
    """
    spectra = [torch.fft.fft2(image, norm="ortho") for image in (fused, ct, mr)]
    sizes = [magnitude(spectrum.real, spectrum.imag) for spectrum in spectra]
    return F.l1_loss(sizes[0], torch.maximum(sizes[1], sizes[2]))


def _gradient_error(fused: Tensor, ct: Tensor, mr: Tensor, operator: str) -> Tensor:
    strengths = [_strength(image, operator) for image in (fused, ct, mr)]
    return F.l1_loss(strengths[0], torch.maximum(strengths[1], strengths[2]))


def _strength(image: Tensor, operator: str) -> Tensor:
    """Gradient magnitude in which a clean step of height 1 is 1."""
    return magnitude(*gradients(image, operator)) / (4.0 if operator == "sobel" else 3.0)


def _both(measure: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Sum over both sources."""
    return lambda fused, ct, mr: measure(fused, ct) + measure(fused, mr)
