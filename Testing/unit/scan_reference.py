"""What tests of the selective scan share: problems, and the recurrence stepped one by one, as it is defined."""

from __future__ import annotations

import torch
from torch import Tensor


def stepped(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reversed_from: int | None = None,
) -> Tensor:
    """h = exp(delta A) h + delta B u; y = C h + D u, written as it is defined, group by group."""
    batch, channels, length = delta.shape
    groups, states = B.shape[1:3]
    width = channels // groups
    u = u.repeat(1, channels // u.shape[1], 1)
    y = []
    for channel in range(channels):
        group = channel // width
        times = range(length)
        if reversed_from is not None and group >= reversed_from:
            times = range(length - 1, -1, -1)
        h = torch.zeros(batch, states, dtype=u.dtype)
        row: list[Tensor] = [torch.zeros(0)] * length
        for t in times:
            step = delta[:, channel, t] + (0 if delta_bias is None else delta_bias[channel])
            if delta_softplus:
                step = torch.nn.functional.softplus(step)
            h = torch.exp(step[:, None] * A[channel]) * h + (step * u[:, channel, t])[:, None] * B[:, group, :, t]
            row[t] = (C[:, group, :, t] * h).sum(-1) + (0 if D is None else D[channel] * u[:, channel, t])
        y.append(torch.stack(row, -1))
    return torch.stack(y, 1)


def problem(
    length: int,
    *,
    largest_step: float = 1.0,
    groups: int = 2,
    width: int = 3,
    states: int = 2,
    u_groups: int | None = None,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """u, delta, A, B, C, D, delta_bias with gradients."""
    made = torch.Generator().manual_seed(length)
    channels = groups * width

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    tensors = [
        normal(batch, (u_groups or groups) * width, length),
        torch.rand(batch, channels, length, generator=made, dtype=torch.float64) * largest_step,
        -torch.rand(channels, states, generator=made, dtype=torch.float64) * 16,
        normal(batch, groups, states, length),
        normal(batch, groups, states, length),
        normal(channels),
        normal(channels),
    ]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def relative(found: Tensor, truth: Tensor) -> float:
    largest = float(truth.detach().abs().max())
    difference = float((found.double() - truth.double()).detach().abs().max())
    return difference if largest == 0 else difference / largest


def assert_same(found: list[Tensor], truth: list[Tensor], limit: float) -> None:
    assert [relative(a, b) < limit for a, b in zip(found, truth, strict=True)] == [True] * len(truth)


def with_gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad((y * weight).sum(), inputs)]
