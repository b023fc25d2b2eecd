"""Frozen image features for the perceptual loss.

Reference:
    Johnson, Alahi and Fei-Fei, "Perceptual Losses for Real-Time Style Transfer and Super-Resolution", ECCV 2016.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from FreqSegLib import weights
from FreqSegLib.checkpoint import read_state_dict
from FreqSegLib.errors import WeightsError

VGG_FILE = "vgg16-397923af.pth"
# Up to relu3_3, the end of VGG16's third block.
_VGG_LAYERS = 16
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VGG16Features(nn.Module):
    """VGG16 of ImageNet up to relu3_3: (B, 1, H, W) in [0, 1] -> (B, 256, H/4, W/4).

    Args:
        checkpoint: torchvision's ``vgg16-397923af.pth``.

    Raises:
        WeightsError: the file cannot be read, or is no VGG16.
    """

    name = "VGG16 (ImageNet) up to relu3_3"
    mean: Tensor
    std: Tensor

    def __init__(self, checkpoint: Path) -> None:
        super().__init__()
        from torchvision.models import vgg16  # type: ignore[import-untyped]

        with torch.device("meta"):
            layers = vgg16(weights=None).features[:_VGG_LAYERS]
        state = read_state_dict(checkpoint)
        wanted = {key: f"features.{key}" for key in layers.state_dict()}
        if not all(full in state for full in wanted.values()):
            raise WeightsError(f"'{checkpoint}' holds no VGG16; give torchvision's {VGG_FILE}.")
        layers.load_state_dict({key: state[full] for key, full in wanted.items()}, assign=True)
        self.layers = layers
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> Tensor:
        return self.layers((image - self.mean) / self.std)


class MedicalTowerFeatures(nn.Module):
    """Stem and first stage of LiteMedSAM's image tower: (B, 1, H, W) in [0, 1] -> (B, 128, H/2, W/2), H and W even.

    Args:
        checkpoint: ``lite_medsam.pth``.

    Raises:
        WeightsError: the file cannot be read, or belongs to another architecture.
    """

    name = "LiteMedSAM's image tower, stem and first stage"

    def __init__(self, checkpoint: Path) -> None:
        super().__init__()
        from FreqSegLib.sam.lite_medsam import LiteMedSAM

        tower = LiteMedSAM.from_checkpoint(checkpoint).image_encoder
        self.stem, self.stage = tower.patch_embed["seq"], tower.layers[0]
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> Tensor:
        return self.stage(self.stem(image.permute(0, 2, 3, 1).expand(-1, -1, -1, 3))).permute(0, 3, 1, 2)


def perceptual_features(folders: Sequence[Path] | None = None) -> VGG16Features | MedicalTowerFeatures:
    """VGG16 where its weights are on this machine, else LiteMedSAM's tower. Nothing is downloaded.

    Args:
        folders: searched for ``vgg16-397923af.pth``; torch's own cache and every weights folder (and its ``vgg16``)
            if left out.

    Raises:
        WeightsError: neither is here.
    """
    if folders is None:
        roots = weights.search_folders()
        folders = [Path(torch.hub.get_dir()) / "checkpoints", *roots, *(root / "vgg16" for root in roots)]
    for folder in folders:
        if (folder / VGG_FILE).is_file():
            return VGG16Features(folder / VGG_FILE)
    return MedicalTowerFeatures(weights.require("litemedsam") / "lite_medsam.pth")
