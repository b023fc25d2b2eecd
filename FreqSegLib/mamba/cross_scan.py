"""An image as sequences in every direction, and back: rows and columns (and slices), forwards and backwards.

The order of directions is VMamba's (Liu et al., 2024): every axis order forwards, then the same ones backwards. SS2D
lays out only the axis orders in memory; its scan reads a backward direction from the same memory's end.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ORDERS = {
    2: ((0, 1), (1, 0)),
    3: ((0, 1, 2), (1, 2, 0), (2, 0, 1)),
}
"""Which spatial axes are walked, outermost first; the last one is walked fastest."""


def scan_orders(x: Tensor) -> Tensor:
    """An image along each of its axes.

    Args:
        x: (b, d, h, w) or (b, d, z, h, w).

    Returns:
        (b, 2 or 3, d, l): with l positions. In 2D row by row, then column by column. In 3D the fastest axis is w, then
        z, then h.
    """
    dimensions = x.dim() - 2
    orders = [x.permute(0, 1, *(axis + 2 for axis in order)).flatten(2) for order in _ORDERS[dimensions]]
    return torch.stack(orders, 1)


def merge_orders(y: Tensor, size: tuple[int, ...]) -> Tensor:
    """The adjoint of :func:`scan_orders`: sequences put back into the image and added up.

    Args:
        y: (b, 2 or 3, d, l).
        size: (h, w) or (z, h, w).

    Returns:
        (b, d, *size).
    """
    merged = None
    for sequence, order in zip(y.unbind(1), _ORDERS[len(size)], strict=True):
        image = sequence.unflatten(-1, [size[axis] for axis in order])
        back = [order.index(axis) for axis in range(len(size))]
        image = image.permute(0, 1, *(axis + 2 for axis in back))
        merged = image if merged is None else merged + image
    assert merged is not None
    return merged


def cross_scan(x: Tensor) -> Tensor:
    """An image as sequences in all directions.

    Args:
        x: (b, d, h, w) or (b, d, z, h, w).

    Returns:
        (b, K, d, l), K = 4 or 6: the sequences of :func:`scan_orders`, then the same reversed.
    """
    forwards = scan_orders(x)
    return torch.cat([forwards, forwards.flip(-1)], 1)


def cross_merge(y: Tensor, size: tuple[int, ...]) -> Tensor:
    """The adjoint of :func:`cross_scan`.

    Args:
        y: (b, K, d, l).
        size: (h, w) or (z, h, w).

    Returns:
        (b, d, *size).
    """
    forwards, backwards = y.chunk(2, 1)
    return merge_orders(forwards + backwards.flip(-1), size)
