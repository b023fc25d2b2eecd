"""What both fusion networks share: soft choose-max, a learned correction of it, and the way back to an image."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from FreqSegLib.checkpoint import load_exactly
from FreqSegLib.errors import InputError, SettingsError, WeightsError
from FreqSegLib.fusion.fused import Fused, check_pair
from FreqSegLib.fusion.pyramid import PairPyramid, blend, decompose, mask_names, mix

SHARPNESS = 40.0
"""Start of k: a difference of 0.05, of images in [0, 1], gives the stronger source 0.88 of a coefficient."""
WEIGHTS_FILE = "fusion.safetensors"

Network = TypeVar("Network", bound="FusionNetwork")


class FusionNetwork(nn.Module, ABC):
    """Masks for every band of one wavelet pyramid, a convex mix a band, and the inverse transform.

    A band's mask is sigmoid(k (\\|ct\\| - \\|mr\\|) + learned), the low band's sigmoid(k (ct - mr) + learned), with k a
    parameter a band. The learned term is f(ct, mr) - f(mr, ct): exchanging the images exchanges their shares exactly,
    and equal images give masks of one half. It starts at zero, so an untrained network is a soft choose-max.

    Args:
        wave: a name out of :func:`FreqSegLib.wavelet.wavelets`.
        J: levels, 1 to 3 (more where the image is large enough to make sense of them).
        halo_limit: side in pixels of the neighbourhood, odd, whose smallest and largest source pixel bound the fused
            pixel: no halo can leave the range of what lies around it. 0 leaves the mix as it is.

    Raises:
        SettingsError: a number out of range; the wavelet's name is checked when it is first used.
    """

    kind: ClassVar[str]

    def __init__(self, wave: str, J: int, halo_limit: int) -> None:
        super().__init__()
        if isinstance(J, bool) or not isinstance(J, int) or J < 1:
            raise SettingsError(f"the number of wavelet levels must be a whole number >= 1, got {J!r}")
        if halo_limit < 0 or (halo_limit and halo_limit % 2 == 0):
            raise SettingsError(f"halo_limit must be 0 (off) or an odd number of pixels, got {halo_limit}")
        self.wave, self.J, self.halo_limit = wave, J, halo_limit
        start = torch.tensor(SHARPNESS).log()
        self.detail_sharpness = nn.Parameter(start.repeat(J, 3))
        self.low_sharpness = nn.Parameter(start.clone())

    @abstractmethod
    def correction(self, pyramid: PairPyramid, ct: Tensor, mr: Tensor) -> Correction:
        """What the network has learned, for every band."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, to be stored beside the weights."""

    def forward(self, ct: Tensor, mr: Tensor) -> Fused:
        """Fuse.

        Args:
            ct, mr: registered images (B, 1, H, W) in [0, 1], any H and W.

        Returns:
            Fused, with J + 1 masks, and one more, of single pixels, where the network has a pixel gate.

        Raises:
            InputError: the tensors are no such pair.
            SettingsError: the wavelet is not offered.
        """
        check_pair(ct, mr)
        pyramid = decompose(ct, mr, self.wave, self.J)
        learned = self.correction(pyramid, ct, mr)
        masks, names = self._masks(pyramid, learned), mask_names(self.J)
        if learned.pixel_mask is None:
            return Fused(self._image(pyramid, masks, ct, mr), masks, names, learned.weights)
        masks, names = (*masks, learned.pixel_mask), (*names, "pixels")
        image = self._image(pyramid, masks, ct, mr, learned.weights["pixel_gate"])
        return Fused(image, masks, names, learned.weights)

    def fuse_with_masks(
        self, ct: Tensor, mr: Tensor, masks: Sequence[Tensor], pixel_gate: Tensor | None = None
    ) -> Tensor:
        """The image that given CT shares make, (B, 1, H, W); ``forward``'s own masks give ``forward``'s image.

        Args:
            ct, mr: as for :meth:`forward`.
            masks: one a level's details, one of the low band, and with a ``pixel_gate`` one of the pixels.
            pixel_gate: (B, 1, H, W) in [0, 1], how much of the plain mix of pixels replaces the wavelets' image.

        Raises:
            InputError: a mask is missing, of another size, or leaves [0, 1].
        """
        check_pair(ct, mr)
        pyramid = decompose(ct, mr, self.wave, self.J)
        wanted = [detail.shape for detail in pyramid.ct_details] + [pyramid.ct_low[-1].shape]
        if pixel_gate is not None:
            wanted.append(ct.shape)
        if [mask.shape for mask in masks] != wanted:
            raise InputError(
                f"the masks must be of sizes {[tuple(shape) for shape in wanted]}, "
                f"got {[tuple(mask.shape) for mask in masks]}"
            )
        for mask in (*masks, *([] if pixel_gate is None else [pixel_gate])):
            if not (mask.min() >= 0 and mask.max() <= 1):
                raise InputError(f"masks must lie in [0, 1], got {mask.min().item():.3g} to {mask.max().item():.3g}")
        return self._image(pyramid, masks, ct, mr, pixel_gate)

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        """Write weights and configuration as safetensors, atomically."""
        from safetensors.torch import save_file

        temporary = path.with_name(path.name + ".part")
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in self.state_dict().items()}
        about = {"kind": self.kind, "config": json.dumps(self.config()), **(metadata or {})}
        save_file(tensors, temporary, metadata=about)
        temporary.chmod(0o644)
        temporary.replace(path)

    @classmethod
    def load(cls: type[Network], path: Path, device: str | torch.device = "cpu") -> Network:
        """Read what :meth:`save` wrote, frozen, ready to fuse.

        Raises:
            WeightsError: unreadable, of the other network, or tensors that do not fit (key and shapes are named).
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if about["kind"] != cls.kind:
                raise WeightsError(
                    f"'{path}' holds a {about['kind']} network, not a {cls.kind} one; give its own file."
                )
            model = cls(**json.loads(about["config"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"'{path}' holds no fusion weights ({error}); get or train them again.") from error
        load_exactly(model, state, path)
        return model.requires_grad_(False).eval().to(device)

    def for_inference(self: Network) -> Network:
        """A frozen copy with its batch norms folded into the convolutions before them: the same up to rounding."""
        copy = deepcopy(self).requires_grad_(False).eval()
        for module in copy.modules():
            if isinstance(module, nn.Sequential):
                for place, (first, second) in enumerate(pairwise(module)):
                    if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                        module[place], module[place + 1] = fuse_conv_bn_eval(first, second), nn.Identity()
        return copy

    def _masks(self, pyramid: PairPyramid, learned: Correction) -> tuple[Tensor, ...]:
        masks = []
        for level, (ct_detail, mr_detail) in enumerate(zip(pyramid.ct_details, pyramid.mr_details, strict=True)):
            sharpness = self.detail_sharpness[level].exp()[:, None, None]
            logit = sharpness * (ct_detail.abs() - mr_detail.abs()) + learned.details[level]
            masks.append((learned.detail_importance(level) * logit).sigmoid())
        logit = self.low_sharpness.exp() * (pyramid.ct_low[-1] - pyramid.mr_low[-1]) + learned.low
        masks.append((learned.low_importance() * logit).sigmoid())
        return tuple(masks)

    def _image(
        self,
        pyramid: PairPyramid,
        masks: Sequence[Tensor],
        ct: Tensor,
        mr: Tensor,
        pixel_gate: Tensor | None = None,
    ) -> Tensor:
        image = mix(pyramid, masks[: self.J + 1])
        if pixel_gate is not None:
            image = image + pixel_gate * (blend(masks[-1], ct, mr) - image)
        if not self.halo_limit:
            return image
        least, most = (
            _around(torch.minimum(ct, mr), self.halo_limit, -1),
            _around(torch.maximum(ct, mr), self.halo_limit, 1),
        )
        return torch.minimum(torch.maximum(image, least), most)


class Correction:
    """The learned part of the masks' logits.

    Args:
        details: (B, 3, h_j, w_j) a level, finest first.
        low: (B, 1, h_J, w_J).
        pixel_mask: CT share of single pixels (B, 1, H, W), where ``weights`` has a ``pixel_gate`` of that size.
        importance: factor on the whole logit of LL, LH, HL, HH, positive, (B, 4) a level; 1 everywhere if left out.
        weights: numbers to show with the result.
    """

    def __init__(
        self,
        details: Sequence[Tensor],
        low: Tensor,
        importance: Sequence[Tensor] | None = None,
        weights: dict[str, Tensor] | None = None,
        pixel_mask: Tensor | None = None,
    ) -> None:
        self.pixel_mask = pixel_mask
        self.details, self.low, self.importance, self.weights = tuple(details), low, importance, weights or {}

    def detail_importance(self, level: int) -> Tensor | float:
        return 1.0 if self.importance is None else self.importance[level][:, 1:, None, None]

    def low_importance(self) -> Tensor | float:
        return 1.0 if self.importance is None else self.importance[-1][:, :1, None, None]


def exchanged(features: nn.Module, ct: Tensor, mr: Tensor) -> tuple[Tensor, Tensor]:
    """Difference and mean of features(ct, mr) and features(mr, ct), both computed in one batch.

    A linear layer without bias behind the difference gives the difference of two networks, at the price of one.

    Args:
        features: (2B, 2c, h, w) -> (2B, n, h, w).
        ct, mr: (B, c, h, w).

    Returns:
        (B, n, h, w) of opposite sign when the images are exchanged, and (B, n, h, w) that does not change then.
    """
    both = torch.cat([torch.cat([ct, mr], 1), torch.cat([mr, ct], 1)])
    # convolutions with few channels run several times faster on a CPU in this layout
    seen = features(both.contiguous(memory_format=torch.channels_last))
    one, other = seen[: len(ct)], seen[len(ct) :]
    return one - other, (one + other) / 2


def _around(x: Tensor, side: int, sign: int) -> Tensor:
    """The largest (sign 1) or smallest (sign -1) value in the square around every pixel.

    Along rows, then along columns, as whole images: pooling, which also keeps indices, takes five times as long on a
    CPU.
    """
    choose = torch.maximum if sign > 0 else torch.minimum
    reach = side // 2
    for axis in (-1, -2):
        padded = F.pad(x, (reach, reach, 0, 0) if axis == -1 else (0, 0, reach, reach), value=-sign * torch.inf)
        size = x.shape[axis]
        x = padded.narrow(axis, 0, size)
        for start in range(1, side):
            x = choose(x, padded.narrow(axis, start, size))
    return x
