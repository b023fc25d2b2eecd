"""The selective scan as loops over time that numba compiles for the CPU at hand; states stay in its caches.

Sixteen channels are worked on at once, as one vector of float32 for each state. The vectors are a numba type of their
own, so that none of it depends on a compiler finding them; where registers are narrower, they are worked on in parts.

Forward: a thread takes some channels of one group and walks along time; the states at the chunks' starts are kept with
the output. Backward: it walks from the end, chunk by chunk; each chunk's states are made again from its start.

Importing this needs numba. The compiled loops are kept on disk where a folder can be written to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, models, register_model
from numpy.typing import NDArray

from FreqSegLib.mamba.selective_scan_numba import LANES

Floats = NDArray[np.float32]

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTEGERS = ir.VectorType(ir.IntType(32), LANES)
# a product and a sum may become one instruction; anything else stays as written
_FUSED = ("contract",)
_ZERO = np.float32(0)


def _compiled(function: Any) -> Any:
    """``function`` compiled when it is first called, for threads that run side by side."""
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:
        # no folder for compiled code: every process compiles again
        return njit(nogil=True, error_model="numpy")(function)


class _LanesType(types.Type):  # type: ignore[misc, unused-ignore]
    """Sixteen float32."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


@register_model(_LanesType)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc, unused-ignore]
    def __init__(self, manager: Any, kind: _LanesType) -> None:
        super().__init__(manager, kind, _FLOATS)


_lanes = _LanesType()


def _all(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [float(np.float32(value))] * LANES)


def _integers(value: int) -> ir.Constant:
    return ir.Constant(_INTEGERS, [value] * LANES)


def _fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    return builder.fadd(builder.fmul(x, y, flags=_FUSED), z, flags=_FUSED)


def _polynomial(builder: Any, x: Any, coefficients: tuple[float, ...]) -> Any:
    """By Horner's rule, the highest power first."""
    value = _all(coefficients[0])
    for coefficient in coefficients[1:]:
        value = _fma(builder, value, x, _all(coefficient))
    return value


def _exp(builder: Any, x: Any) -> Any:
    """e^x to 2 units in the last place, for x held within -87 to 88; NaN stays NaN (Cephes' polynomial)."""
    x = builder.select(builder.fcmp_ordered("<", x, _all(-87.0)), _all(-87.0), x)
    x = builder.select(builder.fcmp_ordered(">", x, _all(88.0)), _all(88.0), x)
    # 1.5 x 2^23: the sum's last bits are the nearest whole number
    shifted = _fma(builder, x, _all(1.4426950408889634), _all(12582912.0))
    whole = builder.fsub(shifted, _all(12582912.0))
    rest = _fma(builder, whole, _all(-0.693359375), x)
    rest = _fma(builder, whole, _all(2.12194440e-4), rest)
    powers = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
    curved = builder.fmul(_polynomial(builder, rest, powers), rest, flags=_FUSED)
    near = builder.fadd(_fma(builder, curved, rest, rest), _all(1.0), flags=_FUSED)
    exponent = builder.shl(builder.add(builder.bitcast(shifted, _INTEGERS), _integers(127)), _integers(23))
    return builder.fmul(near, builder.bitcast(exponent, _FLOATS), flags=_FUSED)


def _log_1_plus(builder: Any, x: Any) -> Any:
    """log(1 + x) for x in 0 to 1: twice the area tangent of x / (2 + x)."""
    ratio = builder.fdiv(x, builder.fadd(x, _all(2.0)))
    square = builder.fmul(ratio, ratio)
    series = _polynomial(builder, square, tuple(2 / (2 * power + 1) for power in range(8, -1, -1)))
    return builder.fmul(ratio, series)


def _minus_size(builder: Any, x: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", x, _all(0.0)), builder.fneg(x), x)


def _place(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), _FLOATS.as_pointer())


def _spread(builder: Any, value: Any) -> Any:
    nothing = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, nothing, _integers(0))


def _of_lanes(count: int, make: Callable[..., Any]) -> Callable[..., Any]:
    """What an intrinsic of ``count`` vectors returns, its result a vector."""
    return lambda *given: (_lanes(*[_lanes] * count), lambda context, builder, signature, args: make(builder, *args))


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """Sixteen numbers of a contiguous array from ``index`` on."""

    def make(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_place(context, builder, signature.args[0], *args), align=4)

    return _lanes(array, types.intp), make


@intrinsic
def store(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Writes them there."""

    def make(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _place(context, builder, signature.args[0], *args[:2]), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, _lanes), make


@intrinsic
def turn(typing: Any, source: Any, index: Any, stride: Any, out: Any, place: Any, out_stride: Any) -> Any:
    """Sixteen rows of sixteen numbers, ``stride`` apart from ``index`` on, become columns of ``out`` (Eklundh 1972)."""

    def make(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, index, stride, out, place, out_stride = args
        rows = []
        for _ in range(LANES):
            rows.append(builder.load(_place(context, builder, signature.args[0], source, index), align=4))
            index = builder.add(index, stride)
        half = LANES // 2
        while half:
            upper = [lane if not lane & half else LANES + lane - half for lane in range(LANES)]
            lower = [lane + half if not lane & half else LANES + lane for lane in range(LANES)]
            for i in range(LANES):
                if not i & half:
                    pair = rows[i], rows[i + half]
                    rows[i], rows[i + half] = (
                        builder.shuffle_vector(*pair, ir.Constant(_INTEGERS, mask)) for mask in (upper, lower)
                    )
            half //= 2
        for row in rows:
            builder.store(row, _place(context, builder, signature.args[3], out, place), align=4)
            place = builder.add(place, out_stride)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, out, types.intp, types.intp), make


@intrinsic
def spread(typing: Any, value: Any) -> Any:
    """One number, sixteen times."""
    return _lanes(types.float32), lambda context, builder, signature, args: _spread(builder, args[0])


@intrinsic
def product(typing: Any, x: Any, y: Any) -> Any:
    """x y."""
    return _of_lanes(2, lambda builder, x, y: builder.fmul(x, y, flags=_FUSED))()


@intrinsic
def fma(typing: Any, x: Any, y: Any, z: Any) -> Any:
    """x y + z."""
    return _of_lanes(3, _fma)()


@intrinsic
def exponential(typing: Any, x: Any) -> Any:
    """e^x."""
    return _of_lanes(1, _exp)()


@intrinsic
def softplus(typing: Any, x: Any) -> Any:
    """log(1 + e^x), as max(x, 0) + log(1 + e^-|x|)."""

    def make(builder: Any, x: Any) -> Any:
        above = builder.select(builder.fcmp_ordered("<", x, _all(0.0)), _all(0.0), x)
        return builder.fadd(above, _log_1_plus(builder, _exp(builder, _minus_size(builder, x))))

    return _of_lanes(1, make)()


@intrinsic
def sigmoid(typing: Any, x: Any) -> Any:
    """1 / (1 + e^-x), as (1 or e^-|x|) / (1 + e^-|x|)."""

    def make(builder: Any, x: Any) -> Any:
        small = _exp(builder, _minus_size(builder, x))
        above = builder.select(builder.fcmp_ordered("<", x, _all(0.0)), small, _all(1.0))
        return builder.fdiv(above, builder.fadd(small, _all(1.0)))

    return _of_lanes(1, make)()


@_compiled
def _take(source: Floats, first: int, count: int, start: int, steps: int, backwards: bool, out: Floats) -> None:
    """Rows ``first`` on of ``source`` (rows, l), ``steps`` from ``start``, to ``out`` (T, 16) flat, other lanes 0."""
    length = source.shape[1]
    whole = steps - steps % LANES if count == LANES else 0
    if count < LANES:
        out[:] = _ZERO
    for t in range(0, whole, LANES):
        column = length - start - t - LANES if backwards else start + t
        place, apart = ((t + LANES - 1) * LANES, -LANES) if backwards else (t * LANES, LANES)
        turn(source, first * length + column, length, out, place, apart)
    for lane in range(count):
        for t in range(whole, steps):
            out[t * LANES + lane] = source[first + lane, length - 1 - start - t if backwards else start + t]


@_compiled
def _give(values: Floats, first: int, count: int, start: int, steps: int, backwards: bool, out: Floats) -> None:
    """The other way round."""
    length = out.shape[1]
    whole = steps - steps % LANES if count == LANES else 0
    for t in range(0, whole, LANES):
        column = length - start - t - LANES if backwards else start + t
        place, apart = ((t + LANES - 1) * LANES, -LANES) if backwards else (t * LANES, LANES)
        turn(values, place, apart, out, first * length + column, length)
    for lane in range(count):
        for t in range(whole, steps):
            out[first + lane, length - 1 - start - t if backwards else start + t] = values[t * LANES + lane]


@_compiled
def _take_states(source: Floats, start: int, steps: int, backwards: bool, out: Floats) -> None:
    """``source`` (n, l), ``steps`` from ``start``, to ``out`` (T, n) flat."""
    states, length = source.shape
    for n in range(states):
        for t in range(steps):
            out[t * states + n] = source[n, length - 1 - start - t if backwards else start + t]


@_compiled
def _three(count: int) -> tuple[Floats, Floats, Floats]:
    """Zeros."""
    return np.zeros(count, np.float32), np.zeros(count, np.float32), np.zeros(count, np.float32)


@_compiled
def _blocks_of(A: Floats, first: int, last: int) -> Floats:
    """Rows ``first`` to ``last`` of A (d, n) as blocks of lanes, (blocks, n 16)."""
    states = A.shape[1]
    blocks = np.zeros((-(-(last - first) // LANES), states * LANES), np.float32)
    for d in range(first, last):
        for n in range(states):
            blocks[(d - first) // LANES, n * LANES + (d - first) % LANES] = A[d, n]
    return blocks


@_compiled
def _make_steps(delta: Floats, bias: Floats, first: int, steps: int, soft: bool) -> None:
    """Raw step sizes (T, 16) flat become those with bias and softplus, in place."""
    shift = load(bias, first)
    one = spread(np.float32(1))
    for t in range(steps):
        value = fma(load(delta, t * LANES), one, shift)
        store(delta, t * LANES, softplus(value) if soft else value)


@_compiled
def _walk(
    u: Floats, dt: Floats, A: Floats, B: Floats, C: Floats, skip: Floats, first: int, h: Floats, y: Floats, steps: int
) -> None:
    """One block of lanes through one chunk: ``h`` (n, 16) is changed, ``y`` (T, 16) written; all flat."""
    states = len(A) // LANES
    share = load(skip, first)
    for t in range(steps):
        step, value = load(dt, t * LANES), load(u, t * LANES)
        gain = product(step, value)
        out = product(share, value)
        for n in range(states):
            place, number = n * LANES, t * states + n
            factor = exponential(product(step, load(A, place)))
            state = fma(factor, load(h, place), product(gain, spread(B[number])))
            store(h, place, state)
            out = fma(spread(C[number]), state, out)
        store(y, t * LANES, out)


@_compiled
def forward(
    u: Floats,
    delta: Floats,
    A: Floats,
    B: Floats,
    C: Floats,
    skip: Floats,
    bias: Floats,
    first: int,
    last: int,
    soft: bool,
    backwards: bool,
    chunk: int,
    y: Floats,
    starts: Floats,
) -> None:
    """Channels ``first`` to ``last`` of one group.

    Args:
        u, delta: (d, l) input and raw step sizes.
        A: (d, n).
        B, C: (n, l).
        skip, bias: (d + 16,) D and what is added to ``delta``, zeros behind the last channel.
        soft: softplus after the bias.
        backwards: from the end of time to its start.
        chunk: steps between two states that are kept.
        y: (d, l) result.
        starts: (M, n, d) result, states at the chunks' starts.
    """
    states, length = B.shape
    blocks = _blocks_of(A, first, last)
    h = np.zeros_like(blocks)
    u_, dt, out = _three(chunk * LANES)
    B_, C_, _ = _three(chunk * states)
    for m in range(-(-length // chunk)):
        start = m * chunk
        steps = min(chunk, length - start)
        _take_states(B, start, steps, backwards, B_)
        _take_states(C, start, steps, backwards, C_)
        for block in range(len(blocks)):
            at = first + block * LANES
            count = min(LANES, last - at)
            _take(u, at, count, start, steps, backwards, u_)
            _take(delta, at, count, start, steps, backwards, dt)
            _make_steps(dt, bias, at, steps, soft)
            for n in range(states):
                for lane in range(count):
                    starts[m, n, at + lane] = h[block, n * LANES + lane]
            _walk(u_, dt, blocks[block], B_, C_, skip, at, h[block], out, steps)
            _give(out, at, count, start, steps, backwards, y)


@_compiled
def _walk_again(u: Floats, dt: Floats, A: Floats, B: Floats, factors: Floats, h: Floats, steps: int) -> None:
    """Factors (T, n, 16) and states (T + 1, n, 16) of a chunk whose first state is in ``h``; all flat."""
    states = len(A) // LANES
    for t in range(steps):
        step = load(dt, t * LANES)
        gain = product(step, load(u, t * LANES))
        for n in range(states):
            place = (t * states + n) * LANES
            factor = exponential(product(step, load(A, n * LANES)))
            store(factors, place, factor)
            state = fma(factor, load(h, place), product(gain, spread(B[t * states + n])))
            store(h, place + states * LANES, state)


@_compiled
def _walk_back(
    u: Floats,
    dt: Floats,
    grad: Floats,
    A: Floats,
    B: Floats,
    C: Floats,
    factors: Floats,
    h: Floats,
    flowing: Floats,
    grad_u: Floats,
    grad_dt: Floats,
    grad_A: Floats,
    grad_B: Floats,
    grad_C: Floats,
    steps: int,
) -> None:
    """A chunk from its end to its start; ``flowing`` (n, 16) is what flows back into the state before it.

    Lanes of ``grad_B`` and ``grad_C`` (T, n, 16) and ``grad_A`` (n, 16) are added to; ``grad_u`` and ``grad_dt``
    (T, 16) are written, without D's part; all flat.
    """
    states = len(A) // LANES
    for t in range(steps - 1, -1, -1):
        step, value, wanted = load(dt, t * LANES), load(u, t * LANES), load(grad, t * LANES)
        gain = product(step, value)
        of_gain, of_step = spread(_ZERO), spread(_ZERO)
        for n in range(states):
            number, own = t * states + n, n * LANES
            place = number * LANES
            of_state = fma(wanted, spread(C[number]), load(flowing, own))
            store(grad_C, place, fma(wanted, load(h, place + states * LANES), load(grad_C, place)))
            store(grad_B, place, fma(of_state, gain, load(grad_B, place)))
            of_gain = fma(of_state, spread(B[number]), of_gain)
            before = product(of_state, load(factors, place))
            store(flowing, own, before)
            # gradient of the exponent delta A
            of_exponent = product(before, load(h, place))
            of_step = fma(of_exponent, load(A, own), of_step)
            store(grad_A, own, fma(of_exponent, step, load(grad_A, own)))
        store(grad_u, t * LANES, product(of_gain, step))
        store(grad_dt, t * LANES, fma(of_gain, value, of_step))


@_compiled
def _add_lanes(lanes: Floats, start: int, steps: int, backwards: bool, out: Floats) -> None:
    """Sums of ``lanes`` (T, n, 16) flat are written to ``out`` (n, l)."""
    states, length = out.shape
    for n in range(states):
        for t in range(steps):
            place = (t * states + n) * LANES
            total = _ZERO
            for lane in range(LANES):
                total += lanes[place + lane]
            out[n, length - 1 - start - t if backwards else start + t] = total


@_compiled
def backward(
    grad: Floats,
    starts: Floats,
    u: Floats,
    delta: Floats,
    A: Floats,
    B: Floats,
    C: Floats,
    skip: Floats,
    bias: Floats,
    first: int,
    last: int,
    soft: bool,
    backwards: bool,
    chunk: int,
    grad_u: Floats,
    grad_delta: Floats,
    grad_A: Floats,
    grad_B: Floats,
    grad_C: Floats,
) -> None:
    """Gradients of channels ``first`` to ``last`` of one group.

    Args:
        grad: (d, l) gradient of y.
        starts: (M, n, d) as from :func:`forward`.
        u ... chunk: as there.
        grad_u, grad_delta: (d, l) results; ``grad_delta`` before bias and softplus.
        grad_A: (d, n) result.
        grad_B, grad_C: (n, l) results, these channels' share.
    """
    states, length = B.shape
    blocks = _blocks_of(A, first, last)
    flowing, for_A = np.zeros_like(blocks), np.zeros_like(blocks)
    u_, raw, dt = _three(chunk * LANES)
    grad_, for_u, for_dt = _three(chunk * LANES)
    B_, C_, _ = _three(chunk * states)
    factors, for_B, for_C = _three(chunk * states * LANES)
    h = np.zeros((chunk + 1) * states * LANES, np.float32)
    chunk_A = np.zeros(states * LANES, np.float32)
    one = spread(np.float32(1))
    for m in range(-(-length // chunk) - 1, -1, -1):
        start = m * chunk
        steps = min(chunk, length - start)
        _take_states(B, start, steps, backwards, B_)
        _take_states(C, start, steps, backwards, C_)
        for_B[:] = _ZERO
        for_C[:] = _ZERO
        for block in range(len(blocks)):
            at = first + block * LANES
            count = min(LANES, last - at)
            _take(u, at, count, start, steps, backwards, u_)
            _take(grad, at, count, start, steps, backwards, grad_)
            _take(delta, at, count, start, steps, backwards, raw)
            dt[:] = raw
            _make_steps(dt, bias, at, steps, soft)
            for n in range(states):
                for lane in range(count):
                    h[n * LANES + lane] = starts[m, n, at + lane]
            chunk_A[:] = _ZERO
            _walk_again(u_, dt, blocks[block], B_, factors, h, steps)
            _walk_back(
                u_,
                dt,
                grad_,
                blocks[block],
                B_,
                C_,
                factors,
                h,
                flowing[block],
                for_u,
                for_dt,
                chunk_A,
                for_B,
                for_C,
                steps,
            )
            # chunk by chunk, so that rounding does not grow with the length
            for place in range(0, len(chunk_A), LANES):
                store(for_A[block], place, fma(load(chunk_A, place), one, load(for_A[block], place)))
            share, shift = load(skip, at), load(bias, at)
            for t in range(steps):
                place = t * LANES
                store(for_u, place, fma(share, load(grad_, place), load(for_u, place)))
                if soft:
                    slope = sigmoid(fma(load(raw, place), one, shift))
                    store(for_dt, place, product(load(for_dt, place), slope))
            _give(for_u, at, count, start, steps, backwards, grad_u)
            _give(for_dt, at, count, start, steps, backwards, grad_delta)
        _add_lanes(for_B, start, steps, backwards, grad_B)
        _add_lanes(for_C, start, steps, backwards, grad_C)
    for d in range(first, last):
        for n in range(states):
            grad_A[d, n] = for_A[(d - first) // LANES, n * LANES + (d - first) % LANES]
