"""What every fusion method takes and gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from FreqSegLib.errors import InputError


@dataclass(frozen=True, eq=False)
class Fused:
    """A batch of fused images, and how they came about.

    Attributes:
        image: (B, 1, H, W) in the units of the inputs.
        masks: share of the CT, one tensor (B, c, h, w) in [0, 1] a level or band, each at its own size. Wavelet
            methods give the details first, finest level first, with c = 3 bands LH, HL, HH, then the low band.
        names: what each of ``masks`` is, for people.
        weights: other numbers worth showing, such as the multi-scale network's ``levels`` (B, J); empty for rules.
    """

    image: Tensor
    masks: tuple[Tensor, ...] = ()
    names: tuple[str, ...] = ()
    weights: dict[str, Tensor] = field(default_factory=dict)


class FusionMethod(Protocol):
    """Anything that fuses a batch of registered pairs."""

    def __call__(self, ct: Tensor, mr: Tensor) -> Fused:
        """Fuse.

        Args:
            ct: (B, 1, H, W), windowed to [0, 1].
            mr: (B, 1, H, W), normalised to [0, 1], on the CT's grid.

        Raises:
            InputError: the tensors are no such pair.
        """
        ...


def check_pair(ct: Tensor, mr: Tensor) -> None:
    """Raise InputError unless both are (B, 1, H, W), floating point and of one shape, type and device."""
    for name, image in (("CT", ct), ("MR", mr)):
        if image.ndim != 4 or image.shape[1] != 1 or min(image.shape) < 1:
            raise InputError(f"the {name} must be (batch, 1, height, width), none of them 0, got {tuple(image.shape)}")
        if not image.dtype.is_floating_point:
            raise InputError(f"the {name} must be floating point in [0, 1], got {image.dtype}; convert it first")
    if ct.shape != mr.shape:
        raise InputError(
            f"CT and MR must have one size, got {tuple(ct.shape)} and {tuple(mr.shape)}: resample the MR on the CT grid"
        )
    if ct.dtype != mr.dtype or ct.device != mr.device:
        raise InputError(
            f"CT and MR must share a type and device, got {ct.dtype} on {ct.device} and {mr.dtype} on {mr.device}"
        )
