"""Images continued beyond their borders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def repeat_border(x: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Repeat the outermost pixels, like torch's padding of mode ``replicate``, whose gradient torch.compile gets wrong.

    Args:
        x: (b, c, *size).
        before, after: pixels to add at the start and the end of each axis of ``size``.

    Returns:
        (b, c, *(before + size + after)).
    """
    for axis, (early, late) in enumerate(zip(before, after, strict=True), start=2):
        if early or late:
            first, last = x.narrow(axis, 0, 1), x.narrow(axis, x.shape[axis] - 1, 1)
            x = torch.cat([*[first] * early, x, *[last] * late], axis)
    return x
