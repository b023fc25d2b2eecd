"""The selective scan of Mamba, exact for every step size, forward and backward, on any device.

The recurrence (Gu & Dao, 2023), for each channel with its N states::

    h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t
    y_t = C_t . h_t + D u_t

is cut into chunks. All chunks step at once, first from zero to find what each adds to the next, then the carries are
joined in log2(chunks) doublings, then all chunks step again from their true start. Every factor is a product of
``exp(delta A)``, at most 1: nothing is divided and no ratio of cumulative products is taken, so nothing overflows. The
backward pass does the same the other way round, from the chunks' saved starts: no state is kept between the passes.
On a CPU every thread works on blocks of channels of its own.

On CUDA the same is one Triton kernel (``selective_scan_triton``); on a CPU, where numba is installed, it is compiled
loops that walk along time (``selective_scan_numba``). All are torch operators (``torch.ops.freqseg``), so
``torch.compile`` takes them as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from threading import local
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from FreqSegLib.device import lasting_threads
from FreqSegLib.errors import DeviceError, InputError, SettingsError

Result = TypeVar("Result")
Backend = Literal["auto", "torch", "numba", "triton", "mamba_ssm"]

LONGEST_CHUNK = 64
# States that are worked on at once, by each thread: small enough for a CPU's caches, large enough for its vector units.
BLOCK_STATES = {"cpu": 2**21, "cuda": 2**27}
# Blocks smaller than this are not worth handing to another thread.
FEWEST_STATES = 2**16
FEWEST_CHANNELS = 16


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    reversed_from: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Mamba's recurrence along the last axis, with gradients for every tensor.

    Args:
        u: (b, K d, l) input; or (b, k d, l) with k dividing K, then group g reads the input's group g mod k.
        delta: (b, K d, l) step sizes, before bias and softplus.
        A: (K d, n), below or equal to 0 where ``delta`` is positive: products of exp(delta A) must not exceed 1.
        B, C: (b, K, n, l), or (b, n, l) for one group: shared by the d channels of a group.
        D: (K d,) skip connection.
        delta_bias: (K d,) added to ``delta``.
        delta_softplus: softplus after the bias.
        reversed_from: groups from this one on run from the end to the start, without their tensors being flipped.
        backend: ``auto`` takes the Triton kernel for tensors on CUDA and the loops compiled by numba for tensors on a
            CPU, where that package is installed and nothing is float64, else ``torch``; ``mamba_ssm`` takes that
            package's kernel, which must be installed.

    Returns:
        (b, K d, l) in the type of ``u``. Computed in float32, or in float64 if an input is float64, whatever autocast
        says.

    Raises:
        InputError: shapes do not fit each other.
        SettingsError, DeviceError: the backend does not exist, or cannot be used here.
    """
    if B.dim() == 3 and C.dim() == 3:
        B, C = B[:, None], C[:, None]
    groups = _checked_shapes(u, delta, A, B, C, D, delta_bias)
    first_reversed = groups if reversed_from is None else reversed_from
    if not 0 <= first_reversed <= groups:
        raise InputError(f"reversed_from must lie in 0 to {groups}, the number of groups, got {reversed_from}")
    result_type = u.dtype
    exact = torch.float64 if torch.float64 in {x.dtype for x in (u, delta, A, B, C)} else torch.float32
    u, delta, A, B, C = (x.to(exact) for x in (u, delta, A, B, C))
    D, delta_bias = (None if x is None else x.to(exact) for x in (D, delta_bias))
    chosen = _backend(backend, u)
    if chosen == "mamba_ssm":
        y = _mamba_ssm(u, delta, A, B, C, D, delta_bias, delta_softplus, first_reversed)
    elif chosen == "triton":
        y, _ = torch.ops.freqseg.selective_scan_triton(u, delta, A, B, C, D, delta_bias, delta_softplus, first_reversed)
    elif chosen == "numba":
        y, _ = torch.ops.freqseg.selective_scan_numba(u, delta, A, B, C, D, delta_bias, delta_softplus, first_reversed)
    elif torch.jit.is_tracing() or torch.compiler.is_exporting():
        y = plain_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, first_reversed)
    else:
        y, _ = torch.ops.freqseg.selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, first_reversed)
    return y.to(result_type)


def chunk_length(length: int) -> int:
    """Steps of a chunk: about the square root of the length, so that steps and carries are balanced, at most 64."""
    return min(LONGEST_CHUNK, 2 ** max(0, round(length**0.5 - 1).bit_length()))


def _checked_shapes(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None
) -> int:
    """Returns: the number of groups K."""
    named = {"u": u, "delta": delta, "A": A, "B": B, "C": C}
    dims = {"u": 3, "delta": 3, "A": 2, "B": 4, "C": 4}
    for name, count in dims.items():
        if named[name].dim() != count or named[name].numel() == 0 or not named[name].is_floating_point():
            raise InputError(
                f"{name} must be a real tensor with {count} axes and at least one element, got "
                f"{tuple(named[name].shape)} of {named[name].dtype}"
            )
    batch, channels, length = delta.shape
    groups, states = B.shape[1], A.shape[1]
    wanted = {
        "A": (channels, states),
        "B": (batch, groups, states, length),
        "C": (batch, groups, states, length),
    }
    for name, shape in wanted.items():
        if tuple(named[name].shape) != shape:
            raise InputError(
                f"{name} must have the shape {shape} to fit delta {tuple(delta.shape)}, got {tuple(named[name].shape)}"
            )
    if channels % groups:
        raise InputError(f"delta has {channels} channels, which {groups} groups of B and C do not divide evenly")
    width = channels // groups
    if u.shape[0] != batch or u.shape[2] != length or u.shape[1] % width or groups % (u.shape[1] // width):
        raise InputError(
            f"u must have the shape {tuple(delta.shape)}, or fewer whole groups of {width} channels that divide "
            f"{groups}, got {tuple(u.shape)}"
        )
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None and tuple(vector.shape) != (channels,):
            raise InputError(f"{name} must have the shape {(channels,)}, got {tuple(vector.shape)}")
    return groups


def _backend(asked: Backend, u: Tensor) -> str:
    names = get_args(Backend)
    if asked not in names:
        raise SettingsError(f"scan backend must be {', '.join(names[:-1])} or {names[-1]}, got {asked!r}")
    if asked in ("torch", "mamba_ssm"):
        return asked
    from FreqSegLib.mamba import selective_scan_numba, selective_scan_triton

    if asked == "auto":
        if u.dtype != torch.float32 or torch.jit.is_tracing() or torch.compiler.is_exporting():
            return "torch"
        if u.is_cuda:
            return "triton" if selective_scan_triton.is_available() else "torch"
        return "numba" if u.device.type == "cpu" and selective_scan_numba.is_installed() else "torch"
    if asked == "numba":
        if selective_scan_numba.loops() is None:
            raise DeviceError(
                "the scan's compiled loops were asked for, but numba is not installed, or does not fit the installed "
                "NumPy; use 'torch'"
            )
        if u.device.type != "cpu" or u.dtype != torch.float32:
            raise DeviceError(
                f"the scan's compiled loops take float32 on a CPU, got {u.dtype} on {u.device}; use 'torch'"
            )
        return asked
    if not selective_scan_triton.is_available():
        raise DeviceError("the scan's Triton kernel was asked for, but Triton is not installed; use 'torch'")
    if not (u.is_cuda or selective_scan_triton.is_interpreted()):
        raise DeviceError(f"the scan's Triton kernel runs on CUDA, got tensors on {u.device}; use 'torch'")
    return asked


def _mamba_ssm(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    first_reversed: int,
) -> Tensor:
    try:
        from mamba_ssm.ops.selective_scan_interface import (  # type: ignore[import-not-found, unused-ignore]
            selective_scan_fn,
        )
    except ImportError as error:
        raise DeviceError(
            f"the scan of mamba_ssm was asked for, but that package cannot be loaded ({error}); use 'auto'"
        ) from error
    groups = B.shape[1]
    u = _repeat_groups(u, delta.shape[1])
    u, delta = (_flip_groups(x, groups, first_reversed) for x in (u, delta))
    B, C = (_flip_groups(x.flatten(1, 2), groups, first_reversed).view_as(x) for x in (B, C))
    y = selective_scan_fn(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
    return _flip_groups(y, groups, first_reversed)


def _repeat_groups(u: Tensor, channels: int) -> Tensor:
    return u if u.shape[1] == channels else u.repeat(1, channels // u.shape[1], 1)


def _flip_groups(x: Tensor, groups: int, first_reversed: int) -> Tensor:
    """(b, K c, l) with the last groups' time reversed."""
    if first_reversed == groups:
        return x
    first = x.shape[1] // groups * first_reversed
    return torch.cat([x[:, :first], x[:, first:].flip(-1)], 1)


def plain_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    first_reversed: int,
) -> Tensor:
    """The chunked scan in plain differentiable operators: for exporting, and to compare with. Arguments as above."""
    batch, channels, length = delta.shape
    groups = B.shape[1]
    steps = chunk_length(length)
    width = channels // groups
    skip = _repeat_groups(u, channels)
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)

    def laid_out(x: Tensor) -> Tensor:
        """(b, K c, l) -> (T, b, K, M, c)."""
        x = _flip_groups(x, groups, first_reversed)
        x = F.pad(x, (0, -length % steps))
        return x.reshape(batch, groups, x.shape[1] // groups, -1, steps).permute(4, 0, 1, 3, 2)

    dt, du = laid_out(delta), laid_out(delta * skip)
    a = torch.exp(dt[..., None, :] * A.reshape(groups, 1, width, -1).transpose(-1, -2))
    b = du[..., None, :] * laid_out(B.flatten(1, 2))[..., None]
    # unbound at once: a gradient of single slices would be a tensor of full size each
    factors, gains, reads = a.unbind(0), b.unbind(0), laid_out(C.flatten(1, 2)).unbind(0)
    end = gains[0]
    for factor, gain in zip(factors[1:], gains[1:], strict=True):
        end = factor * end + gain
    share = torch.exp(dt.sum(0)[..., None, :] * A.reshape(groups, 1, width, -1).transpose(-1, -2))
    h = _starts(end, share)
    outputs = []
    for factor, gain, read in zip(factors, gains, reads, strict=True):
        h = factor * h + gain
        outputs.append((read[..., None, :] @ h).squeeze(-2))
    y = torch.stack(outputs).permute(1, 2, 4, 3, 0).reshape(batch, channels, -1)[..., :length]
    y = _flip_groups(y, groups, first_reversed)
    return y if D is None else y + D[:, None] * skip


def _joined(ends: Tensor, shares: Tensor) -> Tensor:
    """True states at the chunks' ends.

    Args:
        ends: (..., M, n, d) ends of chunks that started from zero.
        shares: the same shape; how much of its start is left at a chunk's end.
    """
    count, shift = ends.shape[-3], 1
    while shift < count:
        before = ends.narrow(-3, 0, count - shift)
        later = torch.addcmul(ends.narrow(-3, shift, count - shift), shares.narrow(-3, shift, count - shift), before)
        longer = shares.narrow(-3, shift, count - shift) * shares.narrow(-3, 0, count - shift)
        ends = torch.cat([ends.narrow(-3, 0, shift), later], -3)
        shares = torch.cat([shares.narrow(-3, 0, shift), longer], -3)
        shift *= 2
    return ends


def _starts(ends: Tensor, shares: Tensor) -> Tensor:
    """True states at the chunks' starts, from the same arguments."""
    joined = _joined(ends, shares)
    count = joined.shape[-3]
    return torch.cat([torch.zeros_like(joined.narrow(-3, 0, 1)), joined.narrow(-3, 0, count - 1)], -3)


class _Problem:
    """The scan's tensors cut into blocks of (group, channel) that are worked on one after the other.

    A group here is one of a batch item: G = b K. A block's tensors are laid out as (T, G, M, n, d): steps of a chunk,
    groups, chunks, states, channels.
    """

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        first_reversed: int,
    ) -> None:
        self.batch, self.channels, self.length = delta.shape
        self.groups, self.states = B.shape[1:3]
        self.width = self.channels // self.groups
        self.steps = chunk_length(self.length)
        self.chunks = -(-self.length // self.steps)
        self.u_groups = u.shape[1] // self.width
        self.softplus = delta_softplus
        self.u = u.reshape(-1, self.width, self.length)
        self.delta = delta.reshape(-1, self.width, self.length)
        self.B = B.reshape(-1, self.states, self.length)
        self.C = C.reshape(-1, self.states, self.length)
        self.A = A.reshape(self.groups, self.width, self.states)
        self.bias = None if delta_bias is None else delta_bias.reshape(self.groups, self.width, 1)
        group = torch.arange(self.batch * self.groups, device=u.device)
        self.group = group % self.groups
        self.u_index = group // self.groups * self.u_groups + self.group % self.u_groups
        self.reversed = self.group >= first_reversed
        self.any_reversed = first_reversed < self.groups
        self.threads = lasting_threads(u.device)
        self._memory = local()

    def results(self, work: Callable[[slice, slice], Result]) -> Iterator[tuple[slice, slice, Result]]:
        """Groups and channels of each block, and what ``work`` makes of them; a CPU's threads take a block each.

        What blocks share is summed by whoever takes the results, which come in order: the sums are the same every time.
        """
        infers = torch.is_inference_mode_enabled()

        def alone(block: tuple[slice, slice]) -> Result:
            with torch.inference_mode(infers), torch.no_grad(), torch.autocast(self.u.device.type, enabled=False):
                return work(*block)

        blocks = list(self.blocks())
        for (groups, channels), found in zip(blocks, self.threads.map(alone, blocks), strict=True):
            yield groups, channels, found

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Groups and channels of each block."""
        budget = BLOCK_STATES.get(self.delta.device.type, BLOCK_STATES["cuda"])
        if self.threads.count > 1:
            whole = self.batch * self.channels * self.chunks * self.steps * self.states
            budget = min(budget, max(FEWEST_STATES, whole // self.threads.count))
        per_channel = self.chunks * self.steps * self.states
        channels = min(self.width, max(FEWEST_CHANNELS, budget // per_channel))
        # blocks of equal size, so that none is a small rest
        channels = -(-self.width // -(-self.width // channels))
        together = max(1, budget // (per_channel * channels)) if channels == self.width else 1
        for first in range(0, self.batch * self.groups, together):
            for start in range(0, self.width, channels):
                yield (
                    slice(first, min(first + together, self.batch * self.groups)),
                    slice(start, min(start + channels, self.width)),
                )

    def turned(self, x: Tensor, groups: slice) -> Tensor:
        """(G, c, l) with time reversed where the group runs backwards; its own inverse."""
        if not self.any_reversed:
            return x
        return torch.where(self.reversed[groups, None, None], x.flip(-1), x)

    def laid_out(self, x: Tensor, groups: slice) -> Tensor:
        """(G, c, l) -> (T, G, M, c), padded with zeros, which leave states as they are."""
        x = F.pad(self.turned(x, groups), (0, self.chunks * self.steps - self.length))
        return x.view(*x.shape[:2], self.chunks, self.steps).permute(3, 0, 2, 1).contiguous()

    def laid_back(self, x: Tensor, groups: slice) -> Tensor:
        """(T, G, M, c) -> (G, c, l)."""
        x = x.permute(1, 3, 2, 0).reshape(x.shape[1], x.shape[3], -1)[..., : self.length]
        return self.turned(x, groups)

    def inputs(self, groups: slice, channels: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Of a block: u and step sizes (T, G, M, d), A as (G, 1, n, d)."""
        u = self.u[self.u_index[groups], channels]
        delta = self.raw_steps(groups, channels)
        if self.softplus:
            delta = F.softplus(delta)
        A = self.A[self.group[groups], channels].transpose(1, 2)[:, None].contiguous()
        return self.laid_out(u, groups), self.laid_out(delta, groups), A

    def product(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """x y, broadcast, in memory that this thread's next product of this name will reuse.

        Fresh memory for every block would cost a CPU as much as the multiplication.
        """
        shape = torch.broadcast_shapes(x.shape, y.shape)
        count = math.prod(shape)
        kept = getattr(self._memory, name, None)
        if kept is None or kept.numel() < count:
            kept = x.new_empty(count)
            setattr(self._memory, name, kept)
        return torch.mul(x, y, out=kept[:count].view(shape))

    def raw_steps(self, groups: slice, channels: slice) -> Tensor:
        """(G, d, l) step sizes before softplus."""
        delta = self.delta[groups, channels]
        return delta if self.bias is None else delta + self.bias[self.group[groups], channels]


def chunks_forward(
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
    problem = _Problem(u, delta, A, B, C, delta_bias, delta_softplus, first_reversed)
    y = torch.empty_like(problem.delta)
    starts = delta.new_empty(problem.batch * problem.groups, problem.chunks, problem.states, problem.width)

    def work(groups: slice, channels: slice) -> tuple[Tensor, Tensor]:
        u_, dt, A_ = problem.inputs(groups, channels)
        B_, C_ = (problem.laid_out(x[groups], groups) for x in (problem.B, problem.C))
        a = problem.product("a", dt.unsqueeze(3), A_).exp_()
        h = problem.product("h", (dt * u_).unsqueeze(3), B_.unsqueeze(4))
        end = h[0]
        for t in range(1, problem.steps):
            end = torch.addcmul(h[t], a[t], end)
        start = _starts(end, torch.exp(dt.sum(0).unsqueeze(2) * A_))
        _step_through(h, a, start)
        out = torch.matmul(C_.unsqueeze(3), h).squeeze(3)
        return problem.laid_back(out, groups), start

    for groups, channels, (out, start) in problem.results(work):
        y[groups, channels], starts[groups, ..., channels] = out, start
    y = y.view(delta.shape)
    if D is not None:
        y += D[:, None] * _repeat_groups(u, delta.shape[1])
    return y, starts


def _step_through(h: Tensor, a: Tensor, start: Tensor) -> None:
    """What each step adds, ``h``, becomes the states after each step."""
    h[0].addcmul_(a[0], start)
    for t in range(1, h.shape[0]):
        h[t].addcmul_(a[t], h[t - 1])


def chunks_backward(
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
    """Returns: gradients of u, delta (before bias and softplus), A, B, C; those of D and delta_bias are their sums."""
    problem = _Problem(u, delta, A, B, C, delta_bias, delta_softplus, first_reversed)
    grad_y = grad.reshape(problem.delta.shape)
    grad_u = torch.zeros_like(problem.u)
    grad_delta = torch.empty_like(problem.delta)
    grad_A = torch.zeros_like(problem.A)
    grad_B, grad_C = torch.zeros_like(problem.B), torch.zeros_like(problem.C)

    def work(groups: slice, channels: slice) -> tuple[Tensor, ...]:
        u_, dt, A_ = problem.inputs(groups, channels)
        B_, C_ = (problem.laid_out(x[groups], groups) for x in (problem.B, problem.C))
        dy = problem.laid_out(grad_y[groups, channels], groups)
        start = starts[groups, ..., channels].contiguous()
        a = problem.product("a", dt.unsqueeze(3), A_).exp_()
        du = dt * u_
        h = problem.product("h", du.unsqueeze(3), B_.unsqueeze(4))
        _step_through(h, a, start)
        g = problem.product("g", dy.unsqueeze(3), C_.unsqueeze(4))
        _adjoint(g, a, torch.exp(dt.sum(0).unsqueeze(2) * A_))
        for_C = problem.laid_back(torch.matmul(h, dy.unsqueeze(4)).squeeze(4), groups)
        for_B = problem.laid_back(torch.matmul(g, du.unsqueeze(4)).squeeze(4), groups)
        grad_du = torch.matmul(B_.unsqueeze(3), g).squeeze(3)
        # gradient of the exponent delta A: g exp(delta A) h_before
        a.mul_(g)
        a[0].mul_(start)
        a[1:].mul_(h[:-1])
        grad_dt = torch.addcmul(torch.mul(a, A_, out=g).sum(3), grad_du, u_)
        for_A = _over_time(a, dt, out=g)
        for_u = problem.laid_back(grad_du * dt, groups)
        for_delta = problem.laid_back(grad_dt, groups)
        if delta_softplus:
            for_delta = for_delta * torch.sigmoid(problem.raw_steps(groups, channels))
        return for_u, for_delta, for_A, for_B, for_C

    for groups, channels, (for_u, for_delta, for_A, for_B, for_C) in problem.results(work):
        grad_delta[groups, channels] = for_delta
        grad_B[groups] += for_B
        grad_C[groups] += for_C
        # batch items share A, and groups may share their input
        grad_A[:, channels].index_add_(0, problem.group[groups], for_A)
        grad_u[:, channels].index_add_(0, problem.u_index[groups], for_u)
    grad_u = grad_u.view(u.shape)
    if D is not None:
        grad_u += (D[:, None] * grad).view(u.shape[0], -1, *u.shape[1:]).sum(1)
    return (
        grad_u,
        grad_delta.view(delta.shape),
        grad_A.view(A.shape),
        grad_B.view(B.shape),
        grad_C.view(C.shape),
    )


def _over_time(x: Tensor, dt: Tensor, out: Tensor) -> Tensor:
    """Sum over steps and chunks of x (T, G, M, n, d) times dt (T, G, M, d), as (G, d, n)."""
    return torch.mul(x, dt.unsqueeze(3), out=out).sum((0, 2)).transpose(1, 2)


def _adjoint(g: Tensor, a: Tensor, share: Tensor) -> None:
    """What each step's output wants of its state, ``g``, becomes the gradient of every state: the scan backwards.

    Args:
        g: (T, G, M, n, d), changed in place.
        a: factors of the same shape.
        share: (G, M, n, d) product of a chunk's factors.
    """
    first = g[-1]
    for t in range(g.shape[0] - 2, -1, -1):
        first = torch.addcmul(g[t], a[t + 1], first)
    wanted = a[0] * first
    incoming = _starts(wanted.flip(1), share.flip(1)).flip(1)
    g[-1].add_(incoming)
    for t in range(g.shape[0] - 2, -1, -1):
        g[t].addcmul_(a[t + 1], g[t + 1])


def fake_forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Empty tensors of the results' shapes: y, and the states at the chunks' starts."""
    batch, channels, length = delta.shape
    groups, states = B.shape[1:3]
    chunks = -(-length // chunk_length(length))
    y = torch.empty_like(delta, memory_format=torch.contiguous_format)
    return y, delta.new_empty(batch * groups, chunks, states, channels // groups)


def fake_backward(
    grad: Tensor, starts: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, delta, A, B, C))


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps the inputs and the chunks' starts."""
    u, delta, A, B, C, D, delta_bias, ctx.delta_softplus, ctx.first_reversed = inputs
    ctx.save_for_backward(output[1], u, delta, A, B, C, D, delta_bias)
    ctx.set_materialize_grads(True)


def gradients(ctx: Any, grad: Tensor, operator: Any) -> tuple[Any, ...]:
    """Of all inputs of a scan, by the operator given."""
    starts, u, delta, A, B, C, D, delta_bias = ctx.saved_tensors
    grad_u, grad_delta, grad_A, grad_B, grad_C = operator(
        grad.contiguous(), starts, u, delta, A, B, C, D, delta_bias, ctx.delta_softplus, ctx.first_reversed
    )
    grad_D = None if D is None else (grad * _repeat_groups(u, delta.shape[1])).sum((0, 2))
    grad_bias = None if delta_bias is None else grad_delta.sum((0, 2))
    return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias, None, None


def register(name: str, schema: str, work: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Make ``work`` a torch operator of the library ``freqseg``, on every device.

    Not by ``torch.library.custom_op``, whose first call imports the compiler, which takes seconds.
    """
    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, work, "CompositeExplicitAutograd")
    torch.library.register_fake(f"freqseg::{name}", fake, lib=LIBRARY)


LIBRARY = torch.library.Library("freqseg", "DEF")
FORWARD_SCHEMA = (
    "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, bool delta_softplus, "
    "int first_reversed) -> (Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor starts, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, "
    "bool delta_softplus, int first_reversed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def register_scan(
    name: str, forward: Callable[..., Any], backward: Callable[..., Any], fake: Callable[..., Any] = fake_forward
) -> None:
    """A scan as the operators ``name`` and ``name_backward``, joined for autograd.

    Args:
        name: of the operator.
        forward, backward: as :func:`chunks_forward` and :func:`chunks_backward`.
        fake: empty tensors of the shapes that ``forward`` returns.
    """
    register(name, FORWARD_SCHEMA, forward, fake)
    register(f"{name}_backward", BACKWARD_SCHEMA, backward, fake_backward)
    back = getattr(torch.ops.freqseg, f"{name}_backward")

    def autograd(ctx: Any, grad: Tensor, unused: Tensor | None) -> tuple[Any, ...]:
        return gradients(ctx, grad, back)

    torch.library.register_autograd(f"freqseg::{name}", autograd, setup_context=save_for_backward, lib=LIBRARY)
    torch.library.register_autograd(f"freqseg::{name}_backward", _no_second_derivatives, lib=LIBRARY)


def _no_second_derivatives(ctx: Any, *grads: Any) -> Any:
    """Raises:
    SettingsError: always; without it torch would take them for zero.
    """
    raise SettingsError(
        "the selective scan gives first derivatives only; for second ones (create_graph=True) call plain_scan, which "
        "keeps every state in memory"
    )


register_scan("selective_scan", chunks_forward, chunks_backward)
