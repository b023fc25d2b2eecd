"""Triton kernels of the selective scan; ``selective_scan_triton`` calls them. Importing this needs Triton.

Shapes: u, delta, y and their gradients (rows, length), B and C (b K n, length), A (K d, n), states at chunk starts
(b K, chunks, n, d). Tiles in registers are (channels, states, steps).
"""

# Triton reads annotations of kernels as code, and knows only its own
# mypy: allow-untyped-defs

from __future__ import annotations

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]


@triton.jit
def _then(a1, x1, a2, x2):
    """One step of h -> a h + x after another."""
    return a1 * a2, x1 * a2 + x2


@triton.jit
def _softplus(x):
    # log(1 + z) loses small z to rounding; this form gives log1p to a few units in the last place
    z = tl.exp(-tl.abs(x))
    w = 1.0 + z
    log1p = tl.where(w == 1.0, z, tl.log(w) * z / tl.where(w == 1.0, 1.0, w - 1.0))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _tile(source, rows, row_mask, time, valid, length, backwards):
    """(rows, time) of a (.., length) tensor, 0 where there is nothing; time is turned round for some groups."""
    place = tl.where(backwards, length - 1 - time, time)
    return tl.load(source + rows[:, None] * length + place[None, :], mask=row_mask[:, None] & valid[None, :], other=0.0)


@triton.jit
def _put(target, values, rows, row_mask, time, valid, length, backwards):
    place = tl.where(backwards, length - 1 - time, time)
    tl.store(target + rows[:, None] * length + place[None, :], values, mask=row_mask[:, None] & valid[None, :])


@triton.jit
def _step_sizes(
    delta,
    bias,
    rows,
    row_mask,
    time,
    valid,
    length,
    backwards,
    SOFTPLUS: tl.constexpr,
):
    """Step sizes (rows, time), 0 where there are none: such a step changes nothing."""
    dt = _tile(delta, rows, row_mask, time, valid, length, backwards) + bias[:, None]
    if SOFTPLUS:
        dt = _softplus(dt)
    return tl.where(row_mask[:, None] & valid[None, :], dt, 0.0)


@triton.jit
def forward_kernel(
    u,
    delta,
    A,
    B,
    C,
    D,
    bias,
    y,
    starts,
    length,
    width,
    groups,
    u_groups,
    states,
    first_reversed,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    STEPS: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    k = group % groups
    backwards = k >= first_reversed
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    there = channel < width
    state = tl.arange(0, STATES)
    stated = state < states
    both = there[:, None] & stated[None, :]
    row = group * width + channel
    u_row = (group // groups * u_groups + k % u_groups) * width + channel
    own = k * width + channel
    rate = tl.load(A + own[:, None] * states + state[None, :], mask=both, other=0.0)
    offset = tl.load(bias + own, mask=there, other=0.0) if HAS_BIAS else tl.zeros([CHANNELS], rate.dtype)
    skip = tl.load(D + own, mask=there, other=0.0) if HAS_D else tl.zeros([CHANNELS], rate.dtype)
    h = tl.zeros([CHANNELS, STATES], rate.dtype)
    step = tl.arange(0, STEPS)
    chunks = tl.cdiv(length, STEPS)
    for chunk in range(chunks):
        time = chunk * STEPS + step
        valid = time < length
        place = ((group * chunks + chunk) * states + state[None, :]) * width + channel[:, None]
        tl.store(starts + place, h, mask=both)
        dt = _step_sizes(delta, offset, row, there, time, valid, length, backwards, SOFTPLUS)
        x = _tile(u, u_row, there, time, valid, length, backwards)
        b = _tile(B, group * states + state, stated, time, valid, length, backwards)
        c = _tile(C, group * states + state, stated, time, valid, length, backwards)
        left, gained = tl.associative_scan(
            (tl.exp(dt[:, None, :] * rate[:, :, None]), (dt * x)[:, None, :] * b[None, :, :]), 2, _then
        )
        h_all = left * h[:, :, None] + gained
        out = tl.sum(h_all * c[None, :, :], axis=1) + skip[:, None] * x
        _put(y, out, row, there, time, valid, length, backwards)
        h = tl.sum(tl.where(step[None, None, :] == STEPS - 1, h_all, 0.0), axis=2)


@triton.jit
def returning_kernel(
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
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """What flows back into each chunk's last state from the chunks after it."""
    group = tl.program_id(1).to(tl.int64)
    k = group % groups
    backwards = k >= first_reversed
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    there = channel < width
    state = tl.arange(0, STATES)
    stated = state < states
    both = there[:, None] & stated[None, :]
    row = group * width + channel
    own = k * width + channel
    rate = tl.load(A + own[:, None] * states + state[None, :], mask=both, other=0.0)
    offset = tl.load(bias + own, mask=there, other=0.0) if HAS_BIAS else tl.zeros([CHANNELS], rate.dtype)
    flow = tl.zeros([CHANNELS, STATES], rate.dtype)
    step = tl.arange(0, STEPS)
    chunks = tl.cdiv(length, STEPS)
    for done in range(chunks):
        chunk = chunks - 1 - done
        time = chunk * STEPS + step
        valid = time < length
        place = ((group * chunks + chunk) * states + state[None, :]) * width + channel[:, None]
        tl.store(returning + place, flow, mask=both)
        dt = _step_sizes(delta, offset, row, there, time, valid, length, backwards, SOFTPLUS)
        dy = _tile(grad, row, there, time, valid, length, backwards)
        c = _tile(C, group * states + state, stated, time, valid, length, backwards)
        left = tl.exp(tl.cumsum(dt, axis=1)[:, None, :] * rate[:, :, None])
        wanted = tl.sum(left * dy[:, None, :] * c[None, :, :], axis=2)
        flow = wanted + tl.exp(tl.sum(dt, axis=1)[:, None] * rate) * flow


@triton.jit
def backward_kernel(
    grad,
    starts,
    returning,
    u,
    delta,
    A,
    B,
    C,
    D,
    bias,
    grad_u,
    grad_delta,
    grad_A,
    grad_B,
    grad_C,
    length,
    width,
    groups,
    u_groups,
    states,
    first_reversed,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Every gradient of one chunk of one group. ``grad_u`` has a row for every channel of every group, ``grad_A``
    one for every chunk as well."""
    group = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(length, STEPS)
    k = group % groups
    backwards = k >= first_reversed
    state = tl.arange(0, STATES)
    stated = state < states
    state_row = group * states + state
    step = tl.arange(0, STEPS)
    time = chunk * STEPS + step
    valid = time < length
    # the step before and the step after, inside the chunk
    earlier = valid & (step > 0)
    later = (time + 1 < length) & (step < STEPS - 1)
    b = _tile(B, state_row, stated, time, valid, length, backwards)
    b_before = _tile(B, state_row, stated, time - 1, earlier, length, backwards)
    c = _tile(C, state_row, stated, time, valid, length, backwards)
    sum_b = tl.zeros([STATES, STEPS], b.dtype)
    sum_c = tl.zeros([STATES, STEPS], b.dtype)
    for first in range(0, width, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        there = channel < width
        both = there[:, None] & stated[None, :]
        row = group * width + channel
        u_row = (group // groups * u_groups + k % u_groups) * width + channel
        own = k * width + channel
        rate = tl.load(A + own[:, None] * states + state[None, :], mask=both, other=0.0)
        offset = tl.load(bias + own, mask=there, other=0.0) if HAS_BIAS else tl.zeros([CHANNELS], rate.dtype)
        skip = tl.load(D + own, mask=there, other=0.0) if HAS_D else tl.zeros([CHANNELS], rate.dtype)
        place = ((group * chunks + chunk) * states + state[None, :]) * width + channel[:, None]
        start = tl.load(starts + place, mask=both, other=0.0)
        flow = tl.load(returning + place, mask=both, other=0.0)
        dt = _step_sizes(delta, offset, row, there, time, valid, length, backwards, SOFTPLUS)
        dt_before = _step_sizes(delta, offset, row, there, time - 1, earlier, length, backwards, SOFTPLUS)
        dt_after = _step_sizes(delta, offset, row, there, time + 1, later, length, backwards, SOFTPLUS)
        x = _tile(u, u_row, there, time, valid, length, backwards)
        x_before = _tile(u, u_row, there, time - 1, earlier, length, backwards)
        dy = _tile(grad, row, there, time, valid, length, backwards)
        left, gained = tl.associative_scan(
            (
                tl.exp(dt_before[:, None, :] * rate[:, :, None]),
                (dt_before * x_before)[:, None, :] * b_before[None, :, :],
            ),
            2,
            _then,
        )
        h_before = left * start[:, :, None] + gained
        decayed = tl.exp(dt[:, None, :] * rate[:, :, None]) * h_before
        h = decayed + (dt * x)[:, None, :] * b[None, :, :]
        left, gained = tl.associative_scan(
            (tl.exp(dt_after[:, None, :] * rate[:, :, None]), dy[:, None, :] * c[None, :, :]),
            2,
            _then,
            reverse=True,
        )
        dh = left * flow[:, :, None] + gained
        sum_c += tl.sum(h * dy[:, None, :], axis=0)
        sum_b += tl.sum(dh * (dt * x)[:, None, :], axis=0)
        per_input = tl.sum(dh * b[None, :, :], axis=1)
        exponent = dh * decayed
        per_step = tl.sum(exponent * rate[:, :, None], axis=1) + per_input * x
        if SOFTPLUS:
            raw = _tile(delta, row, there, time, valid, length, backwards) + offset[:, None]
            # sigmoid without overflow
            tiny = tl.exp(-tl.abs(raw))
            per_step = per_step * tl.where(raw >= 0, 1.0, tiny) / (1.0 + tiny)
        _put(grad_u, per_input * dt + skip[:, None] * dy, row, there, time, valid, length, backwards)
        _put(grad_delta, per_step, row, there, time, valid, length, backwards)
        per_rate = tl.sum(exponent * dt[:, None, :], axis=2)
        line = ((group * chunks + chunk) * width + channel[:, None]) * states + state[None, :]
        tl.store(grad_A + line, per_rate, mask=both)
    _put(grad_B, sum_b, state_row, stated, time, valid, length, backwards)
    _put(grad_C, sum_c, state_row, stated, time, valid, length, backwards)
