"""SpectralVMUNet: a U-shaped network of spectral VSS blocks for images and volumes.

After VM-UNet (Ruan & Xiang, 2024), with a frequency path in every block. A stem of 4 x 4 patches alone cannot place a
boundary within a patch, so there is a shallow branch at full resolution beside it, or residual convolutions in its
place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from FreqSegLib.checkpoint import check_fit, read_state_dict
from FreqSegLib.errors import InputError, SettingsError
from FreqSegLib.mamba.blocks import (
    PatchEmbed,
    PatchExpanding,
    PatchMerging,
    SpectralVSSBlock,
    Stage,
    VSSBlock,
    convolution,
)
from FreqSegLib.mamba.model_config import Stem
from FreqSegLib.mamba.residual import ResidualDecoder, ResidualFeatures, ResidualStem, halvings
from FreqSegLib.mamba.selective_scan import Backend

LARGEST_FILTER = {2: 32, 3: 8}
SMALLEST_FILTER = 4


class VMambaEncoder(nn.Module):
    """Patch embedding and stages, with the names of VMamba's first release: ``patch_embed``, ``layers``."""

    def __init__(self, patch_embed: PatchEmbed, layers: Sequence[Stage]) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(b, in_channels, *size) to every stage's features (b, *n, c), the finest first."""
        x = self.patch_embed(x)
        features = []
        for stage in self.layers:
            x = stage(x)
            features.append(x)
            downsample = stage.downsample
            if isinstance(downsample, nn.Module):
                x = downsample(x)
        return features


class DecoderStage(nn.Module):
    """Enlarges, joins with the encoder's features of that resolution, and refines by blocks."""

    def __init__(self, channels: int, stage: Stage, scale: Sequence[int]) -> None:
        super().__init__()
        self.upsample = PatchExpanding(2 * channels, channels, scale)
        self.fuse = nn.Linear(2 * channels, channels)
        self.stage = stage

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.upsample(x, skip.shape[1:-1])
        return self.stage(self.fuse(torch.cat([x, skip], -1)))


class SpectralVMUNet(nn.Module):
    """Segmentation network for images or volumes of any size from one patch on.

    Args:
        in_channels: of the image.
        out_channels: classes, the background included.
        img_size: side it will mostly see; sets the frequencies that each stage's filter tells apart, nothing else.
        base_channels: of the first stage; doubled at each further one.
        num_stages: resolutions.
        depth: blocks a stage, or one number for each stage. The decoder takes the smallest.
        dimensions: 2 for images (h, w), 3 for volumes (z, h, w).
        patch_size: of the stem, one number or one for each axis; smaller along an axis with coarse spacing.
        spectral: with the frequency path; without it the blocks are VMamba's.
        filter_size: most frequencies of a filter along an axis; 32 for images and 8 for volumes if None.
        d_state, ssm_ratio: of SS2D.
        mlp_ratio: of the frequency path's hidden layer.
        stem: ``patches`` embeds whole patches (VMamba's), with a branch at full resolution beside everything;
            ``convolutions`` comes to the same resolution by residual blocks and strides of 2, and goes back that way,
            as in SegResNet and U-Mamba.
        detail_channels: of the branch at full resolution, where 0 leaves it out; or of the convolutions at full
            resolution, doubled at each halving.
        stage_convolutions: residual blocks of convolutions before each scan, in the encoder, the bottleneck and the
            decoder, as in U-Mamba; 0 leaves VMamba's stages. For the stem of convolutions.
        drop_path: stochastic depth of the last block; rises linearly from 0.
        dropout: of whole channels before the decoder's stages and the head, and of single elements of the first
            convolution's features where the stem is of convolutions; what MC dropout draws from.
        checkpointing: recompute blocks in the backward pass instead of keeping their activations.
        backend: of the selective scan.

    Raises:
        SettingsError: a number is out of range.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 3,
        img_size: int = 256,
        base_channels: int = 64,
        num_stages: int = 4,
        depth: int | Sequence[int] = 2,
        *,
        dimensions: int = 2,
        patch_size: int | Sequence[int] = 4,
        spectral: bool = True,
        filter_size: int | None = None,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        mlp_ratio: float = 2.0,
        stem: Stem = "patches",
        detail_channels: int = 16,
        stage_convolutions: int = 0,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        checkpointing: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        depths = [depth] * num_stages if isinstance(depth, int) else list(depth)
        patch = (patch_size,) * dimensions if isinstance(patch_size, int) else tuple(patch_size)
        _check(in_channels, out_channels, img_size, base_channels, num_stages, depths, dimensions, patch)
        if stem not in get_args(Stem):
            raise SettingsError(f"stem must be one of {', '.join(get_args(Stem))}, got {stem!r}")
        if detail_channels < (stem == "convolutions"):
            raise SettingsError(
                f"detail_channels must be at least {int(stem == 'convolutions')}, got {detail_channels}"
            )
        if stage_convolutions < 0:
            raise SettingsError(f"stage_convolutions must be at least 0, got {stage_convolutions}")
        if stage_convolutions and stem != "convolutions":
            # of an empty slice's patches, which are all the same, their norms would leave rounding errors alone
            raise SettingsError(f"stage_convolutions need the stem 'convolutions', got {stem!r}")
        if not (0 <= dropout < 1 and 0 <= drop_path < 1):
            raise SettingsError(f"dropout and drop_path must lie in [0, 1), got {dropout} and {drop_path}")
        self.in_channels, self.out_channels, self.dimensions, self.patch_size = (
            in_channels,
            out_channels,
            dimensions,
            patch,
        )
        self.dropout = dropout
        largest = LARGEST_FILTER[dimensions] if filter_size is None else filter_size
        common: dict[str, Any] = {
            "d_state": d_state,
            "ssm_ratio": ssm_ratio,
            "dimensions": dimensions,
            "backend": backend,
        }

        def blocks(stage: int, rates: Sequence[float]) -> list[nn.Module]:
            channels = base_channels * 2**stage
            side = -(-img_size // (max(patch) * 2**stage))
            filters = max(min(SMALLEST_FILTER, largest), min(largest, side))
            found: list[nn.Module] = []
            for rate in rates:
                found += [ResidualFeatures(channels, dimensions) for _ in range(stage_convolutions)]
                found.append(
                    SpectralVSSBlock(channels, drop_path=rate, filter_size=filters, mlp_ratio=mlp_ratio, **common)
                    if spectral
                    else VSSBlock(channels, drop_path=rate, **common)
                )
            return found

        rates = [drop_path * index / max(1, sum(depths) - 1) for index in range(sum(depths))]
        layers = []
        for stage in range(num_stages):
            own = rates[sum(depths[:stage]) : sum(depths[: stage + 1])]
            merging = PatchMerging(base_channels * 2**stage, dimensions) if stage < num_stages - 1 else None
            layers.append(Stage(blocks(stage, own), merging))
        strides = halvings(patch) if stem == "convolutions" else [patch]
        self.stem = ResidualStem(in_channels, detail_channels, strides, dropout) if stem == "convolutions" else None
        embedded = in_channels if self.stem is None else self.stem.widths[-1]
        self.encoder = VMambaEncoder(PatchEmbed(embedded, base_channels, strides[-1], normed=stem == "patches"), layers)
        self.bottleneck = Stage(blocks(num_stages - 1, [drop_path]))
        again = [0.0] * min(depths)
        self.decoder = nn.ModuleList(
            DecoderStage(base_channels * 2**stage, Stage(blocks(stage, again)), (2,) * dimensions)
            for stage in range(num_stages - 2, -1, -1)
        )
        if self.stem is not None:
            fine = detail_channels
            self.to_full = ResidualDecoder(base_channels, self.stem.widths, strides)
        else:
            fine = max(detail_channels, base_channels // 2)
            self.final = PatchExpanding(base_channels, fine, patch)
            self.detail = _convolutions(dimensions, in_channels, detail_channels, 2) if detail_channels else None
            self.refine = _convolutions(dimensions, fine + detail_channels, fine, 1)
        self.head = convolution(dimensions)(fine, out_channels, 1)
        self.drop = nn.Dropout(dropout)
        self.set_checkpointing(checkpointing)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of every pixel.

        Args:
            x: (b, in_channels, *size), size (h, w) or (z, h, w), each side at least one patch.

        Returns:
            (b, out_channels, *size).

        Raises:
            InputError: the shape does not fit.
        """
        self._check_input(x)
        size = tuple(x.shape[2:])
        fine = [] if self.stem is None else self.stem(x)
        features = self.encoder(fine[-1] if fine else x)
        y = self.bottleneck(features.pop())
        for stage, skip in zip(self.decoder, reversed(features), strict=True):
            y = stage(self._drop_channels(y), skip)
        y = self._drop_channels(y)
        if fine:
            return self.head(self.to_full(y, fine))
        y = self.final(y, size).movedim(-1, 1)
        if self.detail is not None:
            y = torch.cat([y, self.detail(x)], 1)
        return self.head(self.refine(y))

    def set_checkpointing(self, on: bool) -> None:
        """Recompute blocks in the backward pass (slower, far less memory), or keep their activations."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.checkpointing = on

    def _drop_channels(self, x: Tensor) -> Tensor:
        """Dropout of whole channels, channels last."""
        if self.drop.p == 0 or not self.drop.training:
            return x
        return x * self.drop(torch.ones_like(x[:, :1, :1] if self.dimensions == 2 else x[:, :1, :1, :1]))

    def _check_input(self, x: Tensor) -> None:
        axes = ("h", "w") if self.dimensions == 2 else ("z", "h", "w")
        if x.dim() != self.dimensions + 2 or x.shape[1] != self.in_channels or not x.is_floating_point():
            raise InputError(
                f"this network takes real tensors (b, {self.in_channels}, {', '.join(axes)}), got {tuple(x.shape)} of "
                f"{x.dtype}"
            )
        if any(side < patch for side, patch in zip(x.shape[2:], self.patch_size, strict=True)):
            raise InputError(
                f"the image must be at least one patch of {self.patch_size} pixels, got {tuple(x.shape[2:])}"
            )


def load_vmamba_encoder(model: SpectralVMUNet, source: str | Path | Mapping[str, Tensor]) -> list[str]:
    """Give the encoder the weights of VMamba's first release, or of a VM-UNet.

    As VM-UNet does, the first blocks of each stage are taken where the checkpoint's stages are deeper. The frequency
    paths keep their start, at which they change nothing.

    Args:
        model: 2D, with the checkpoint's channels: base_channels=96 and in_channels=3 for the published ones.
        source: a checkpoint file, or its tensors.

    Returns:
        Keys of the checkpoint that were left out: its head, its decoder, deeper blocks.

    Raises:
        WeightsError: a tensor is missing or has another shape (the key and both shapes are named); or the file is
            damaged.
        SettingsError: the network has convolutions where VMamba has none.
    """
    if model.stem is not None:
        raise SettingsError(
            "a network with a stem of convolutions has no place for VMamba's weights; build it with stem='patches'"
        )
    name = str(source) if isinstance(source, (str, Path)) else "the state dict"
    state = dict(source) if isinstance(source, Mapping) else read_state_dict(source)
    if state and all(key.startswith("vmunet.") for key in state):
        state = {key.removeprefix("vmunet."): value for key, value in state.items()}
    own = model.encoder.state_dict()
    spectral = {key: value for key, value in own.items() if set(key.split(".")) & set(SpectralVSSBlock.SPECTRAL)}
    taken, left_out = {}, []
    for key, value in state.items():
        if _belongs_to_encoder(key, model) and key not in spectral:
            taken[key] = value
        else:
            left_out.append(key)
    check_fit(own, {**taken, **spectral}, name)
    # copied, so that neither the source nor an optimiser that knows the parameters is cut off
    model.encoder.load_state_dict(taken, strict=False)
    return left_out


def _belongs_to_encoder(key: str, model: SpectralVMUNet) -> bool:
    parts = key.split(".")
    if parts[0] == "patch_embed":
        return True
    if parts[0] != "layers":
        return False
    if len(parts) > 3 and parts[2] == "blocks" and parts[1].isdigit() and parts[3].isdigit():
        stage = int(parts[1])
        depth = len(model.encoder.layers[stage].blocks) if stage < len(model.encoder.layers) else 0  # type: ignore[arg-type, union-attr, unused-ignore]
        return depth == 0 or int(parts[3]) < depth
    return True


def _check(
    in_channels: int,
    out_channels: int,
    img_size: int,
    base_channels: int,
    num_stages: int,
    depths: Sequence[int],
    dimensions: int,
    patch: Sequence[int],
) -> None:
    if dimensions not in (2, 3):
        raise SettingsError(f"dimensions must be 2 or 3, got {dimensions}")
    for name, value, least in (
        ("in_channels", in_channels, 1),
        ("out_channels", out_channels, 2),
        ("img_size", img_size, 1),
        ("base_channels", base_channels, 2),
        ("num_stages", num_stages, 1),
    ):
        if value < least:
            raise SettingsError(f"{name} must be at least {least}, got {value}")
    if len(depths) != num_stages or min(depths) < 1:
        raise SettingsError(f"depth must be at least 1 for each of {num_stages} stages, got {list(depths)}")
    if len(patch) != dimensions or min(patch) < 1:
        raise SettingsError(f"patch_size must be {dimensions} numbers of at least 1, got {tuple(patch)}")


def _convolutions(dimensions: int, in_channels: int, channels: int, count: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(count):
        layers += [
            convolution(dimensions)(in_channels if index == 0 else channels, channels, 3, padding=1),
            nn.GroupNorm(1, channels),
            nn.GELU(),
        ]
    return nn.Sequential(*layers)
