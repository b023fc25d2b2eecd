"""The selective scan as fused Triton kernels: inputs are read once, states never leave the chip.

Forward: a program takes a few channels of one group and walks along time in chunks, joining each chunk's steps with an
associative scan; only the states at the chunks' starts are written beside the output. Backward: one kernel walks the
same way from the end, for what flows back into each chunk; another recomputes each chunk's states from its start and
writes every gradient, one program a chunk, so that sums over channels need no atomic operations and come out the same
every time.

Importing this needs neither a GPU nor Triton. With ``TRITON_INTERPRET=1`` the kernels run on CPU tensors.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from FreqSegLib.mamba.selective_scan import register_scan

CHUNK = 64
CHANNELS_AT_ONCE = 2
WARPS = 4


def is_available() -> bool:
    """Is Triton installed?"""
    return find_spec("triton") is not None


def is_interpreted() -> bool:
    """Do the kernels run on the CPU, step by step in Python?"""
    return is_available() and os.environ.get("TRITON_INTERPRET") == "1"


def _steps(length: int) -> int:
    return min(CHUNK, _power_of_two(length))


def _sizes(delta: Tensor, B: Tensor) -> tuple[int, int, int, int, int]:
    """Length, width of a group, groups, states, chunks."""
    length, groups, states = delta.shape[2], B.shape[1], B.shape[2]
    return length, delta.shape[1] // groups, groups, states, -(-length // _steps(length))


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    first_reversed: int,
) -> tuple[Tensor, Tensor]:
    """Returns: y (b, K d, l), and the states at the chunks' starts (b K, M, n, d)."""
    from FreqSegLib.mamba import selective_scan_kernels as kernels

    u, delta, A, B, C = (x.contiguous() for x in (u, delta, A, B, C))
    length, width, groups, states, chunks = _sizes(delta, B)
    batch = delta.shape[0]
    y = torch.empty_like(delta)
    starts = delta.new_empty(batch * groups, chunks, states, width)
    channels = min(CHANNELS_AT_ONCE, _power_of_two(width))
    with torch.cuda.device_of(u):
        kernels.forward_kernel[(-(-width // channels), batch * groups)](
            u,
            delta,
            A,
            B,
            C,
            # a pointer that is not read must still be one
            A if D is None else D.contiguous(),
            A if delta_bias is None else delta_bias.contiguous(),
            y,
            starts,
            length,
            width,
            groups,
            u.shape[1] // width,
            states,
            first_reversed,
            HAS_D=D is not None,
            HAS_BIAS=delta_bias is not None,
            SOFTPLUS=delta_softplus,
            CHANNELS=channels,
            STATES=_power_of_two(states),
            STEPS=_steps(length),
            num_warps=WARPS,
        )
    return y, starts


def _backward(
    grad: Tensor,
    starts: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    first_reversed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns: gradients of u, delta (before bias and softplus), A, B, C."""
    from FreqSegLib.mamba import selective_scan_kernels as kernels

    grad, u, delta, A, B, C = (x.contiguous() for x in (grad, u, delta, A, B, C))
    length, width, groups, states, chunks = _sizes(delta, B)
    batch = delta.shape[0]
    channels = min(CHANNELS_AT_ONCE, _power_of_two(width))
    bias = A if delta_bias is None else delta_bias.contiguous()
    shape = {"CHANNELS": channels, "STATES": _power_of_two(states), "STEPS": _steps(length), "num_warps": WARPS}
    returning = torch.empty_like(starts)
    grad_u, grad_delta = torch.empty_like(delta), torch.empty_like(delta)
    grad_A = delta.new_empty(batch, groups, chunks, width, states)
    grad_B, grad_C = torch.empty_like(B), torch.empty_like(C)
    with torch.cuda.device_of(u):
        kernels.returning_kernel[(-(-width // channels), batch * groups)](
            grad,
            delta,
            A,
            C,
            bias,
            returning,
            length,
            width,
            groups,
            states,
            first_reversed,
            HAS_BIAS=delta_bias is not None,
            SOFTPLUS=delta_softplus,
            **shape,
        )
        kernels.backward_kernel[(chunks, batch * groups)](
            grad,
            starts,
            returning,
            u,
            delta,
            A,
            B,
            C,
            A if D is None else D.contiguous(),
            bias,
            grad_u,
            grad_delta,
            grad_A,
            grad_B,
            grad_C,
            length,
            width,
            groups,
            u.shape[1] // width,
            states,
            first_reversed,
            HAS_D=D is not None,
            HAS_BIAS=delta_bias is not None,
            SOFTPLUS=delta_softplus,
            **shape,
        )
    per_input = grad_u.view(batch, -1, *u.shape[1:]).sum(1) if u.shape != delta.shape else grad_u
    return per_input, grad_delta, grad_A.sum((0, 2)).view(A.shape), grad_B, grad_C


def _fake_forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _, width, groups, states, chunks = _sizes(delta, B)
    y = torch.empty_like(delta, memory_format=torch.contiguous_format)
    return y, delta.new_empty(delta.shape[0] * groups, chunks, states, width)


register_scan("selective_scan_triton", _forward, _backward, _fake_forward)
