"""Weights as they lie in a file: whole, in half precision, or large arrays as whole numbers with a scale a channel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from FreqSegLib.errors import WeightsError

KINDS = ("float32", "float16", "int8")
SCALE = ".scale"
SMALLEST = 4096
"""Arrays with fewer elements stay in half precision: they weigh nothing, and biases, norms and gates are among them."""


def packed(state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """A state dict as it is stored.

    Args:
        state: key to tensor.
        kind: of :data:`KINDS`. ``int8`` rounds every floating-point array of two or more axes and at least 4,096
            elements to -127..127 times a scale for each index of its first axis, which is stored beside it; what is
            smaller goes in half precision. The largest error is half a 127th of a channel's largest value.

    Returns:
        Contiguous tensors on the CPU.
    """
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        value = value.detach().cpu().contiguous()
        if not value.is_floating_point():
            found[key] = value
        elif kind == "int8" and value.dim() > 1 and value.numel() >= SMALLEST:
            scale = (value.float().flatten(1).abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
            columns = scale.view(-1, *[1] * (value.dim() - 1))
            found[key] = (value.float() / columns).round().clamp(-127, 127).to(torch.int8)
            found[key + SCALE] = scale
        else:
            found[key] = value.to(torch.float32 if kind == "float32" else torch.float16)
    return found


def unpacked(stored: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """What :func:`packed` stored, in any of its ways: int8 arrays as float32, anything else as it is.

    Args:
        stored: key to tensor.
        source: where it came from, for the message.

    Raises:
        WeightsError: an int8 array has no scale, or one of another length.
    """
    found: dict[str, Tensor] = {}
    scaled = {key for key, value in stored.items() if value.dtype == torch.int8}
    for key, value in stored.items():
        if key in scaled:
            scale = stored.get(key + SCALE)
            if scale is None or scale.shape != value.shape[:1]:
                shape = "none" if scale is None else tuple(scale.shape)
                raise WeightsError(
                    f"{source}: {key} is stored as whole numbers and needs {len(value)} scales, got {shape}. Get the "
                    "model again, or train it."
                )
            found[key] = value.float() * scale.float().view(-1, *[1] * (value.dim() - 1))
        elif not (key.endswith(SCALE) and key.removesuffix(SCALE) in scaled):
            found[key] = value
    return found
