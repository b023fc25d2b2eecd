"""The trained text-guided model: a semantic and a frequency stream, two decoders, one mask a prompt.

What depends on the image alone is computed once (:meth:`DualStreamModel.encode_image`); every prompt then costs the
adapters, the interaction and the decoders (:meth:`DualStreamModel.segment`).

Reference:
    FreqMedCLIP, "Frequency Information for Text Guided Medical Image Segmentation", for the shape; FMISeg (Yu et al.,
    2025) for FFBI and LFFI. Here the semantic stream is the embedding that LiteMedSAM's tower made for SAM anyway.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from FreqSegLib.checkpoint import module_of, save_half
from FreqSegLib.errors import InputError, SettingsError, WeightsError
from FreqSegLib.interaction.dual_decoder import EdgeRefinement, Fusion, FusionHead, StreamDecoder
from FreqSegLib.interaction.feature_normaliser import FeatureNormaliser, Normaliser
from FreqSegLib.interaction.ffbi import FFBI, EfficientFFBI
from FreqSegLib.interaction.fpn import FPNAdapter
from FreqSegLib.interaction.frequency_pyramid import STRIDES, ConvNeXtBlock, FrequencyPyramid
from FreqSegLib.interaction.text_adapter import TextConditionedAdapter

Bands = Literal["none", "low", "high", "both"]
Interaction = Literal["none", "ffbi", "efficient"]
POOLED_SIDE = 32
BOTTLENECK_SIDE = 16


@dataclass(frozen=True)
class DualStreamConfig:
    """The architecture, stored in the weights file.

    Attributes:
        bands: what the frequency stream sees; ``none`` leaves it out, with everything that needs it.
        interaction: at the bottleneck: FFBI, EfficientFFBI or nothing.
        language_gate: LFFI in the decoders, else FiLM.
        fusion: of the two decoders' logits.
        normaliser: of the embedding.
        wave: the wavelet of the frequency stream.
        embedding_channels, text_dim: of what comes in.
        semantic_width: of the semantic stream at strides 8 and 16.
        frequency_widths, frequency_depths: see :class:`FrequencyPyramid`.
        decoder_widths: at strides 4 and 8.
        text_width: of the projected sentence.
        place_terms: cosines along each axis of the map by which a sentence may prefer places ("left", "anterior"); 0
            leaves it out.
        adapter_width: of the text-conditioned adapters' bottleneck.
        num_heads: of FFBI.
        dropout: of the bottleneck's channels.
        attention_dropout: of FFBI; any makes its attention several times slower on a CPU.
    """

    bands: Bands = "both"
    interaction: Interaction = "ffbi"
    language_gate: bool = True
    fusion: Fusion = "adaptive"
    normaliser: Normaliser = "layer"
    wave: str = "haar"
    embedding_channels: int = 256
    text_dim: int = 384
    semantic_width: int = 128
    frequency_widths: tuple[int, ...] = (16, 40, 80, 160)
    frequency_depths: tuple[int, ...] = (2, 2, 3)
    decoder_widths: tuple[int, ...] = (32, 64)
    text_width: int = 128
    place_terms: int = 6
    adapter_width: int = 48
    num_heads: int = 8
    dropout: float = 0.1
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, kind in (("bands", Bands), ("interaction", Interaction), ("fusion", Fusion)):
            if getattr(self, name) not in get_args(kind):
                raise SettingsError(f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")
        for name in ("frequency_widths", "frequency_depths", "decoder_widths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))


@dataclass(frozen=True)
class ImageFeatures:
    """What is known of B slices before any prompt: semantic maps at stride 8, frequency maps at strides 2 to 16."""

    semantic: Tensor
    frequency: tuple[Tensor, ...]

    def for_prompts(self, counts: Tensor) -> ImageFeatures:
        """Each slice's features as often as it has prompts, (B) whole numbers."""
        return ImageFeatures(
            self.semantic.repeat_interleave(counts, 0),
            tuple(x.repeat_interleave(counts, 0) for x in self.frequency),
        )


@dataclass(frozen=True)
class DualStreamOutput:
    """For P slice-prompt pairs.

    Attributes:
        logits: of the mask, (P, 1, 256, 256).
        presence: logit that the target is in the slice, (P).
        semantic, frequency: each decoder's own logits (P, 1, 64, 64), for deep supervision; None without the stream.
    """

    logits: Tensor
    presence: Tensor
    semantic: Tensor
    frequency: Tensor | None

    @property
    def probability(self) -> Tensor:
        """(P, 1, 256, 256) in [0, 1]."""
        return self.logits.sigmoid()


class DualStreamModel(nn.Module):
    """See the module. ``channel_mean`` and ``channel_std`` of the embedding are set from training slices.

    Args:
        config: the architecture.
    """

    channel_mean: Tensor
    channel_std: Tensor
    cosines: Tensor

    def __init__(self, config: DualStreamConfig | None = None) -> None:
        super().__init__()
        config = config or DualStreamConfig()
        self.config = config
        width, text = config.semantic_width, config.text_width
        fine, middle = config.decoder_widths
        self.register_buffer("channel_mean", torch.zeros(config.embedding_channels, 1, 1))
        self.register_buffer("channel_std", torch.ones(config.embedding_channels, 1, 1))
        self.normaliser = FeatureNormaliser(config.normaliser, config.embedding_channels)
        self.project = nn.Conv2d(config.embedding_channels, width, 1)
        self.text = nn.Sequential(nn.Linear(config.text_dim, text), nn.LayerNorm(text), nn.GELU())
        self.adapters = nn.ModuleList(TextConditionedAdapter(width, text, config.adapter_width) for _ in range(3))
        self.pyramid = FPNAdapter(width, (fine, middle, width), (2, 1, 0.5))
        # convolutions do not know left from right
        self.position = nn.Parameter(torch.randn(1, width, BOTTLENECK_SIDE, BOTTLENECK_SIDE) * 0.02)
        self.context = ConvNeXtBlock(width)
        self.dropout = nn.Dropout2d(config.dropout)
        self.semantic_decoder = StreamDecoder((fine, middle, width), (fine, middle), text, config.language_gate)
        pooled = width
        if config.bands != "none":
            widths = config.frequency_widths
            self.frequency = FrequencyPyramid(config.bands, config.wave, widths, config.frequency_depths)
            if config.interaction == "ffbi":
                self.interaction: nn.Module = FFBI(width, widths[3], config.num_heads, config.attention_dropout)
            elif config.interaction == "efficient":
                self.interaction = EfficientFFBI(width, widths[3])
            self.frequency_decoder = StreamDecoder(widths[1:], (fine, middle), text, config.language_gate)
            self.fusion = FusionHead(config.fusion, fine)
            self.edges = EdgeRefinement(2 * fine, widths[0])
            pooled += widths[3]
        if config.place_terms:
            # a sentence that names a side differs little from its opposite: what it says about places gets a way of its
            # own to the mask, since through the decoders alone training stays at drawing both sides
            self.place = nn.Linear(text, config.place_terms**2)
            nn.init.zeros_(self.place.weight)
            nn.init.zeros_(self.place.bias)
            self.register_buffer("cosines", cosines(config.place_terms, 2 * POOLED_SIDE), persistent=False)
        self.presence = nn.Sequential(nn.Linear(pooled + text + 2, 64), nn.GELU(), nn.Linear(64, 1))

    def feature_shapes(self) -> list[tuple[int, int, int]]:
        """Shapes (C, H, W) of :class:`ImageFeatures`: the semantic map, then the frequency maps."""
        shapes = [(self.config.semantic_width, POOLED_SIDE, POOLED_SIDE)]
        if self.config.bands != "none":
            sides = [8 * POOLED_SIDE // stride for stride in STRIDES]
            shapes += [(width, side, side) for width, side in zip(self.config.frequency_widths, sides, strict=True)]
        return shapes

    def encode_image(self, embedding: Tensor, images: Tensor) -> ImageFeatures:
        """What no prompt changes.

        Args:
            embedding: the tower's (B, 256, 64, 64), or averaged already to (B, 256, 32, 32).
            images: (B, 1, 256, 256) in [0, 1], the picture the tower saw.

        Raises:
            InputError: for other shapes.
        """
        if embedding.ndim != 4 or embedding.shape[1] != self.config.embedding_channels:
            raise InputError(
                f"the embedding must be (B, {self.config.embedding_channels}, H, W), got {tuple(embedding.shape)}"
            )
        side = 8 * POOLED_SIDE
        if images.shape != (len(embedding), 1, side, side):
            raise InputError(f"images must be ({len(embedding)}, 1, {side}, {side}), got {tuple(images.shape)}")
        pooled = embedding if embedding.shape[-1] == POOLED_SIDE else F.adaptive_avg_pool2d(embedding, POOLED_SIDE)
        pooled = pooled.contiguous(memory_format=torch.channels_last)
        semantic = self.project(self.normaliser((pooled - self.channel_mean) / self.channel_std))
        frequency = () if self.config.bands == "none" else tuple(self.frequency(images))
        return ImageFeatures(semantic, frequency)

    def segment(self, features: ImageFeatures, text: Tensor) -> DualStreamOutput:
        """One mask for each slice-prompt pair.

        Args:
            features: of P slices; see :meth:`ImageFeatures.for_prompts`.
            text: MiniLM's vectors (P, 384).

        Raises:
            InputError: not one vector a slice.
        """
        if text.shape != (len(features.semantic), self.config.text_dim):
            raise InputError(
                f"text must be ({len(features.semantic)}, {self.config.text_dim}), got {tuple(text.shape)}"
            )
        said = self.said(text)
        preferred = self.preferred(said) if self.config.place_terms else 0.0
        fine, middle, deep = self.pyramid([adapter(features.semantic, said) for adapter in self.adapters])
        deep = self.dropout(self.context(deep + self.position))
        pooled = [deep]
        if self.config.bands == "none":
            semantic = _added(self.semantic_decoder((fine, middle, deep), said), preferred)
            logits, frequency = semantic[1], None
        else:
            stride_2, stride_4, stride_8, stride_16 = features.frequency
            deep, stride_16 = self._interact(deep, stride_16)
            pooled = [deep, stride_16]
            semantic = _added(self.semantic_decoder((fine, middle, deep), said), preferred)
            frequency = _added(self.frequency_decoder((stride_4, stride_8, stride_16), said), preferred)
            logits = self.fusion(semantic, frequency)
        means = [x.mean((2, 3)) for x in pooled]
        seen = [logits.amax((2, 3)), logits.mean((2, 3))]
        presence = self.presence(torch.cat([*means, said, *seen], dim=1))[:, 0]
        if frequency is not None:
            logits = self.edges(torch.cat([semantic[0], frequency[0]], dim=1), logits, stride_2)
        logits = F.interpolate(logits, size=8 * POOLED_SIDE, mode="bilinear", align_corners=False)
        return DualStreamOutput(logits, presence, semantic[1], None if frequency is None else frequency[1])

    def said(self, text: Tensor) -> Tensor:
        """MiniLM's vectors (P, 384) as the model reads them, (P, text_width)."""
        # unit vectors of many channels are small numbers
        found: Tensor = self.text(text * math.sqrt(self.config.text_dim))
        return found

    def preferred(self, said: Tensor) -> Tensor:
        """What sentences (P, text_width) add to the logits of every place, (P, 1, 64, 64)."""
        return torch.einsum("pk,khw->phw", self.place(said), self.cosines)[:, None]

    def forward(self, embedding: Tensor, images: Tensor, text: Tensor) -> DualStreamOutput:
        """One prompt a slice; shapes as for :meth:`encode_image` and :meth:`segment`."""
        return self.segment(self.encode_image(embedding, images), text)

    def _interact(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """FFBI between both bottlenecks, (P, C, 16, 16) each."""
        if self.config.interaction == "none":
            return low, high
        if self.config.interaction == "efficient":
            return self.interaction(low, high)
        low_tokens, high_tokens = self.interaction(low.flatten(2).transpose(1, 2), high.flatten(2).transpose(1, 2))
        return tuple(
            tokens.transpose(1, 2).unflatten(2, maps.shape[-2:])
            for tokens, maps in ((low_tokens, low), (high_tokens, high))
        )

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        """Write the weights in half precision with their configuration, atomically."""
        save_half(self, path, {"config": json.dumps(asdict(self.config)), **(metadata or {})})

    @classmethod
    def load(cls, path: Path, device: str | torch.device = "cpu") -> DualStreamModel:
        """Read what :meth:`save` wrote, as float32, frozen.

        Raises:
            WeightsError: unreadable, or tensors that do not fit (key and shapes are named).
        """
        return module_of(path, "text-guided", lambda config: cls(DualStreamConfig(**config))).to(device)


def cosines(terms: int, side: int) -> Tensor:
    """Products of cosines along both axes, (terms², side, side): the first terms of the discrete cosine transform."""
    places = (torch.arange(side) + 0.5) * (math.pi / side)
    waves = torch.cos(torch.arange(terms)[:, None] * places)
    return torch.einsum("ay,bx->abyx", waves, waves).flatten(0, 1)


def _added(decoded: tuple[Tensor, Tensor], preferred: Tensor | float) -> tuple[Tensor, Tensor]:
    return decoded[0], decoded[1] + preferred


def read_metadata(path: Path) -> dict[str, str]:
    """What was stored beside the weights, without loading them.

    Raises:
        WeightsError: the file is unreadable.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"'{path}' holds no text-guided weights ({error}); reinstall FreqSeg or train them again."
        ) from error
