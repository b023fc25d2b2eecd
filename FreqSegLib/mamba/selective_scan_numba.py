"""The selective scan on a CPU by loops that numba compiles: several times as fast as whole tensors through torch.

Importing this does not need numba (the extra ``fast``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from itertools import starmap
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from FreqSegLib.device import lasting_threads
from FreqSegLib.mamba.selective_scan import (
    FEWEST_STATES,
    chunk_length,
    chunks_backward,
    chunks_forward,
    fake_forward,
    register_scan,
)

LANES = 16
"""Channels that the loops work on at once. What numba keeps on disk does not notice a change here: delete it then."""


@cache
def loops() -> ModuleType | None:
    """The compiled loops; None where numba is missing, does not fit the installed NumPy, or fails otherwise."""
    try:
        from FreqSegLib.mamba import selective_scan_loops
    except ImportError:
        return None
    except Exception:
        logging.getLogger(__name__).warning("numba cannot be used; the scan runs in torch", exc_info=True)
        return None
    from numba import config

    return None if _BROKEN or config.DISABLE_JIT else selective_scan_loops


_BROKEN: list[BaseException] = []


def _gives_up(error: Exception) -> None:
    """Compiling failed, or reading or writing what was compiled (a broken file, a full disk): torch from now on."""
    _BROKEN.append(error)
    loops.cache_clear()
    logging.getLogger(__name__).warning("numba cannot be used; the scan runs in torch", exc_info=error)


def is_installed() -> bool:
    """Is numba there? It may still not load; then the operators below do the chunks in torch."""
    return find_spec("numba") is not None


class _Work:
    """The scan's tensors as arrays, and its parts: a section of channels in a group of a batch item."""

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        first_reversed: int,
    ) -> None:
        self.batch, channels, self.length = delta.shape
        self.groups, self.states = B.shape[1:3]
        self.width = channels // self.groups
        self.all = self.batch * self.groups
        self.softplus = delta_softplus
        self.first_reversed = first_reversed
        self.u_groups = u.shape[1] // self.width
        self.u = _array(u, -1, self.width, self.length)
        self.delta = _array(delta, self.all, self.width, self.length)
        self.A = _array(A, self.groups, self.width, self.states)
        self.B, self.C = (_array(x, self.all, self.states, self.length) for x in (B, C))
        self.skip, self.bias = self._vectors(D), self._vectors(delta_bias)
        self.threads = lasting_threads(u.device)
        self.is_small = self.all * self.width * self.length * self.states <= FEWEST_STATES
        self.sections = self._sections()

    def _sections(self) -> list[tuple[int, int]]:
        """Channels of a group that one thread takes; more than one section where groups alone are too few."""
        blocks = -(-self.width // LANES)
        wanted = 1 if self.is_small else -(-self.threads.count // self.all)
        each = -(-blocks // min(blocks, wanted)) * LANES
        return [(first, min(first + each, self.width)) for first in range(0, self.width, each)]

    def _vectors(self, values: Tensor | None) -> Any:
        """(K d,) as (K, d + 16) with zeros behind; zeros for None."""
        padded = torch.zeros(self.groups, self.width + LANES, dtype=torch.float32)
        if values is not None:
            padded[:, : self.width] = values.detach().view(self.groups, self.width)
        return padded.numpy()

    def run(self, work: Callable[[int, int, int, int], None]) -> None:
        """``work(group, number of the section, its first and last channel)`` for every part, on torch's threads."""
        parts = [(group, number, *ends) for group in range(self.all) for number, ends in enumerate(self.sections)]
        for _ in starmap(work, parts) if self.is_small else self.threads.map(lambda part: work(*part), parts):
            pass

    def inputs(self, group: int, first: int, last: int) -> tuple[Any, ...]:
        """What both loops take of channels ``first`` to ``last``, in their order."""
        item, k = divmod(group, self.groups)
        return (
            self.u[item * self.u_groups + k % self.u_groups],
            self.delta[group],
            self.A[k],
            self.B[group],
            self.C[group],
            self.skip[k],
            self.bias[k],
            first,
            last,
            self.softplus,
            k >= self.first_reversed,
            chunk_length(self.length),
        )


def _array(x: Tensor, *shape: int) -> Any:
    return x.detach().contiguous().view(*shape).numpy()


def _forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Returns: y (b, K d, l), and the states at the chunks' starts (b K, M, n, d)."""
    compiled = loops()
    if compiled is None:
        return chunks_forward(u, delta, A, B, *rest)
    work = _Work(u, delta, A, B, *rest)
    y, starts = fake_forward(u, delta, A, B)
    results = _array(y, work.all, work.width, work.length), starts.numpy()
    try:
        work.run(
            lambda group, number, first, last: compiled.forward(
                *work.inputs(group, first, last), *(x[group] for x in results)
            )
        )
    except MemoryError:
        raise
    except Exception as error:
        _gives_up(error)
        return chunks_forward(u, delta, A, B, *rest)
    return y, starts


def _backward(
    grad: Tensor, starts: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns: gradients of u, delta (before bias and softplus), A, B, C."""
    compiled = loops()
    if compiled is None:
        return chunks_backward(grad, starts, u, delta, A, B, *rest)
    work = _Work(u, delta, A, B, *rest)
    wanted, starts_ = _array(grad, work.all, work.width, work.length), _array(starts, *starts.shape)
    grad_u, grad_delta = delta.new_empty(wanted.shape), delta.new_empty(wanted.shape)
    grad_A = delta.new_empty(work.all, work.width, work.states)
    grad_B, grad_C = delta.new_empty(2, len(work.sections), work.all, work.states, work.length)
    own = [x.numpy() for x in (grad_u, grad_delta, grad_A)]
    shared = [x.numpy() for x in (grad_B, grad_C)]
    try:
        work.run(
            lambda group, number, first, last: compiled.backward(
                wanted[group],
                starts_[group],
                *work.inputs(group, first, last),
                *(x[group] for x in own),
                *(x[number, group] for x in shared),
            )
        )
    except MemoryError:
        raise
    except Exception as error:
        _gives_up(error)
        return chunks_backward(grad, starts, u, delta, A, B, *rest)
    # groups share inputs, batch items share A, sections share B and C: summed in order, the same every time
    return (
        grad_u.view(work.batch, -1, *u.shape[1:]).sum(1),
        grad_delta.view(delta.shape),
        grad_A.view(work.batch, *A.shape).sum(0),
        grad_B.sum(0).view(B.shape),
        grad_C.sum(0).view(B.shape),
    )


register_scan("selective_scan_numba", _forward, _backward)
