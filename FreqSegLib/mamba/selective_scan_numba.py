"""The selective scan on a CPU by loops that numba compiles: several times as fast as whole tensors through torch.

Importing this does not need numba (the extra ``fast``).
"""

from __future__ import annotations

from functools import cache
from itertools import starmap
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from FreqSegLib.device import lasting_threads
from FreqSegLib.mamba.selective_scan import (
    BACKWARD_SCHEMA,
    FEWEST_STATES,
    FORWARD_SCHEMA,
    LIBRARY,
    chunk_length,
    fake_backward,
    fake_forward,
    gradients,
    register,
    save_for_backward,
)

LANES = 16
"""Channels that the loops work on at once."""


@cache
def loops() -> ModuleType | None:
    """The compiled loops; None where numba is missing, or does not fit the installed NumPy."""
    try:
        from FreqSegLib.mamba import selective_scan_loops
    except ImportError:
        return None
    return selective_scan_loops


def is_available() -> bool:
    """Can numba be loaded here? The first answer takes a second."""
    return loops() is not None


class _Work:
    """The scan's tensors as arrays, and its parts: (group of a batch item, its first and last channel)."""

    def __init__(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, first_reversed: int) -> None:
        self.batch, channels, self.length = delta.shape
        self.groups, self.states = B.shape[1:3]
        self.width = channels // self.groups
        self.all = self.batch * self.groups
        self.chunk = chunk_length(self.length)
        self.first_reversed = first_reversed
        self.u_groups = u.shape[1] // self.width
        self.u = _array(u, -1, self.width, self.length)
        self.delta = _array(delta, self.all, self.width, self.length)
        self.A = _array(A, self.groups, self.width, self.states)
        self.B, self.C = (_array(x, self.all, self.states, self.length) for x in (B, C))
        self.threads = lasting_threads(u.device)
        self.is_small = self.all * self.width * self.length * self.states <= FEWEST_STATES
        self.sections = self._sections()

    def _sections(self) -> list[tuple[int, int]]:
        """Channels of a group that one thread takes; more than one section where groups alone are too few."""
        blocks = -(-self.width // LANES)
        wanted = 1 if self.is_small else -(-self.threads.count // self.all)
        each = -(-blocks // min(blocks, wanted)) * LANES
        return [(first, min(first + each, self.width)) for first in range(0, self.width, each)]

    def vectors(self, values: Tensor | None) -> Any:
        """(K d,) as (K, d + 16) with zeros behind; zeros for None."""
        padded = torch.zeros(self.groups, self.width + LANES)
        if values is not None:
            padded[:, : self.width] = values.detach().view(self.groups, self.width)
        return padded.numpy()

    def run(self, work: Any) -> None:
        """``work(group, number of the section, first channel, last channel)``, a thread each."""
        parts = [(group, number, *ends) for group in range(self.all) for number, ends in enumerate(self.sections)]
        for _ in starmap(work, parts) if self.is_small else self.threads.map(lambda part: work(*part), parts):
            pass

    def u_of(self, group: int) -> Any:
        return self.u[group // self.groups * self.u_groups + group % self.groups % self.u_groups]

    def backwards(self, group: int) -> bool:
        return group % self.groups >= self.first_reversed


def _array(x: Tensor, *shape: int) -> Any:
    return x.detach().contiguous().view(*shape).numpy()


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
    compiled = loops()
    assert compiled is not None
    work = _Work(u, delta, A, B, C, first_reversed)
    y, starts = fake_forward(u, delta, A, B)
    y_, starts_ = _array(y, work.all, work.width, work.length), starts.numpy()
    skip, bias = work.vectors(D), work.vectors(delta_bias)

    def part(group: int, number: int, first: int, last: int) -> None:
        k = group % work.groups
        compiled.forward(
            work.u_of(group),
            work.delta[group],
            work.A[k],
            work.B[group],
            work.C[group],
            skip[k],
            bias[k],
            first,
            last,
            delta_softplus,
            work.backwards(group),
            work.chunk,
            y_[group],
            starts_[group],
        )

    work.run(part)
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
    compiled = loops()
    assert compiled is not None
    work = _Work(u, delta, A, B, C, first_reversed)
    grad_ = _array(grad, work.all, work.width, work.length)
    starts_ = starts.detach().contiguous().numpy()
    grad_u, grad_delta = torch.empty_like(grad_view := delta.new_empty(grad_.shape)), grad_view
    grad_A = delta.new_empty(work.all, work.width, work.states)
    grad_B, grad_C = delta.new_empty(2, len(work.sections), work.all, work.states, work.length)
    skip, bias = work.vectors(D), work.vectors(delta_bias)
    results = [x.numpy() for x in (grad_u, grad_delta, grad_A)]
    shared = [x.numpy() for x in (grad_B, grad_C)]

    def part(group: int, number: int, first: int, last: int) -> None:
        k = group % work.groups
        compiled.backward(
            grad_[group],
            starts_[group],
            work.u_of(group),
            work.delta[group],
            work.A[k],
            work.B[group],
            work.C[group],
            skip[k],
            bias[k],
            first,
            last,
            delta_softplus,
            work.backwards(group),
            work.chunk,
            *[x[group] for x in results],
            *[x[number, group] for x in shared],
        )

    work.run(part)
    # groups share inputs, batch items share A, sections share B and C: summed in order, the same every time
    return (
        grad_u.view(work.batch, -1, *u.shape[1:]).sum(1),
        grad_delta.view(delta.shape),
        grad_A.view(work.batch, *A.shape).sum(0),
        grad_B.sum(0).view(B.shape),
        grad_C.sum(0).view(C.shape),
    )


def _autograd(ctx: Any, grad: Tensor, unused: Tensor | None) -> tuple[Any, ...]:
    return gradients(ctx, grad, torch.ops.freqseg.selective_scan_numba_backward)


register("selective_scan_numba", FORWARD_SCHEMA, _forward, fake_forward)
register("selective_scan_numba_backward", BACKWARD_SCHEMA, _backward, fake_backward)
torch.library.register_autograd(
    "freqseg::selective_scan_numba", _autograd, setup_context=save_for_backward, lib=LIBRARY
)
