"""The zero-shot path's own trained part: FFBI corrects both frequency saliencies, adaptive fusion makes them one map.

References:
    FFBI: Yu et al., "Frequency-domain Multi-modal Fusion for Language-guided Medical Image Segmentation", FMISeg, 2025.
    Adaptive weighting: FreqMedCLIP, "Frequency Information for Text Guided Medical Image Segmentation".
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from FreqSegLib.checkpoint import module_of, save_half
from FreqSegLib.errors import InputError, SettingsError
from FreqSegLib.interaction.adaptive_fusion import AdaptiveFusion
from FreqSegLib.interaction.ffbi import FFBI, EfficientFFBI, SaliencyInteraction

Branches = Literal["low", "high", "both"]
Interaction = Literal["none", "heads", "ffbi", "efficient"]


@dataclass(frozen=True)
class ZeroShotFusionConfig:
    """Architecture, and what its inputs were made with; stored in the weights' file.

    Attributes:
        branches: which frequency saliencies have a say.
        interaction: what corrects them first: nothing, 1×1 heads on each branch's own tokens, heads behind FFBI, or
            heads behind EfficientFFBI.
        method: of :class:`AdaptiveFusion` where both branches have a say.
        width: of the tokens.
        num_heads, dropout: of FFBI.
        hidden_channels: of the adaptive fusion.
        layer_idx: encoder block that the tokens stand after.
        wave, levels, wavelet_mode: of the frequency images.
    """

    branches: Branches = "both"
    interaction: Interaction = "ffbi"
    method: str = "adaptive"
    width: int = 160
    num_heads: int = 8
    dropout: float = 0.1
    hidden_channels: int = 16
    layer_idx: int = 3
    wave: str = "haar"
    levels: int = 1
    wavelet_mode: str = "symmetric"

    def __post_init__(self) -> None:
        for name, choices in (("branches", get_args(Branches)), ("interaction", get_args(Interaction))):
            if getattr(self, name) not in choices:
                raise SettingsError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")


class ZeroShotFusion(nn.Module):
    """Three saliencies and two branches' tokens -> one saliency.

    :class:`SaliencyInteraction` corrects the low and the high saliency by what FFBI makes of their tokens;
    :class:`AdaptiveFusion` fuses them and moves the raw saliency towards the result. All gates start at zero: untrained
    it gives back the raw saliency, to the last bit.

    Args:
        config: see :class:`ZeroShotFusionConfig`.
    """

    def __init__(self, config: ZeroShotFusionConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ZeroShotFusionConfig()
        self.correction: SaliencyInteraction | None = None
        if config.interaction != "none":
            self.correction = SaliencyInteraction(config.width, config.width, interaction=_interaction(config))
        # of one branch alone the mean of both inputs is the branch itself
        method = config.method if config.branches == "both" else "simple"
        self.fusion = AdaptiveFusion(method, config.hidden_channels)

    @property
    def is_identity(self) -> bool:
        """Whether the raw saliency comes back unchanged."""
        return self.fusion.is_identity

    @property
    def needs_tokens(self) -> bool:
        """Whether the branches' tokens have to be given."""
        return self.correction is not None

    def forward(
        self,
        raw: Tensor,
        low: Tensor,
        high: Tensor,
        low_tokens: Tensor | None = None,
        high_tokens: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """The fused saliency.

        Args:
            raw, low, high: saliencies (B, 1, H, W) in [0, 1].
            low_tokens, high_tokens: the frequency images' tokens (B, N, width), without a class token; needed where
                :attr:`needs_tokens`.
            grid: rows and columns of the N tokens, row by row; square when None.

        Returns:
            (B, 1, H, W) in [0, 1].

        Raises:
            InputError: for other shapes, or missing tokens.
        """
        if self.correction is not None:
            if low_tokens is None or high_tokens is None:
                raise InputError("this fusion corrects the saliencies by the branches' tokens: give both")
            low, high = self.correction(low_tokens, high_tokens, low, high, grid)
        if self.config.branches != "both":
            low = high = low if self.config.branches == "low" else high
        return self.fusion(raw, low, high)

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        """Write the weights in half precision with their configuration, atomically."""
        save_half(self, path, {"config": json.dumps(asdict(self.config)), **(metadata or {})})

    @classmethod
    def load(cls, path: Path, device: str | torch.device = "cpu") -> ZeroShotFusion:
        """Read what :meth:`save` wrote, as float32, frozen.

        Raises:
            WeightsError: unreadable, or tensors that do not fit (key and shapes are named).
        """
        return module_of(path, "fusion", lambda config: cls(ZeroShotFusionConfig(**config))).to(device)


class _Apart(nn.Module):
    """Both streams as they are: the heads without an interaction, to see what that adds."""

    def forward(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return low, high


def _interaction(config: ZeroShotFusionConfig) -> Any:
    if config.interaction == "ffbi":
        return FFBI(config.width, config.width, config.num_heads, config.dropout)
    return EfficientFFBI(config.width, config.width) if config.interaction == "efficient" else _Apart()
