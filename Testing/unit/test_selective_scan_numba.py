"""The selective scan's compiled loops against the chunks in float64, which other tests hold against the recurrence."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scan_reference import assert_same, problem, relative, stepped, with_gradients
from torch import Tensor

from FreqSegLib.errors import DeviceError
from FreqSegLib.mamba import selective_scan_numba as compiled
from FreqSegLib.mamba.selective_scan import selective_scan
from FreqSegLib.mamba.spectral_vmunet import SpectralVMUNet

loops = pytest.importorskip("FreqSegLib.mamba.selective_scan_loops", exc_type=ImportError)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def in_float64(inputs: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in inputs]


# around blocks of 16 channels and of 16 steps, and chunks of up to 64
@pytest.mark.parametrize(
    ("length", "width", "states", "u_groups"),
    [(1, 1, 1, 4), (7, 3, 2, 2), (16, 16, 16, 4), (67, 17, 5, 1), (64, 32, 3, 2), (251, 20, 16, 2), (321, 16, 1, 4)],
)
@pytest.mark.parametrize("softplus", [True, False])
def test_values_and_gradients_equal_those_of_the_chunks_in_float64(
    length: int, width: int, states: int, u_groups: int, softplus: bool
) -> None:
    inputs = problem(
        length, groups=4, width=width, states=states, u_groups=u_groups, dtype=torch.float32, batch=2, largest_step=2.0
    )
    if not softplus:
        with torch.no_grad():
            inputs[6].abs_()
    exact = in_float64(inputs)
    found = selective_scan(*inputs, delta_softplus=softplus, reversed_from=2, backend="numba")
    truth = selective_scan(*exact, delta_softplus=softplus, reversed_from=2)
    assert found.dtype == torch.float32
    assert_same(with_gradients(found, inputs), with_gradients(truth, exact), 3e-6)


@pytest.mark.parametrize("length", [1, 17, 37])
def test_values_and_gradients_equal_the_stepped_recurrence(length: int) -> None:
    inputs = problem(length, groups=2, width=3, states=2, dtype=torch.float32, largest_step=8.0)
    exact = in_float64(inputs)
    found = selective_scan(*inputs, delta_softplus=True, reversed_from=1, backend="numba")
    truth = stepped(*exact, delta_softplus=True, reversed_from=1)
    assert_same(with_gradients(found, inputs), with_gradients(truth, exact), 3e-6)


@pytest.mark.parametrize("leave_out", [(5,), (6,), (5, 6)])
def test_without_skip_or_bias(leave_out: tuple[int, ...]) -> None:
    inputs = problem(19, width=18, dtype=torch.float32)
    given = [None if index in leave_out else tensor for index, tensor in enumerate(inputs)]
    used = [tensor for tensor in given if tensor is not None]
    found = with_gradients(selective_scan(*given, delta_softplus=True, backend="numba"), used)  # type: ignore[arg-type]
    truth = with_gradients(selective_scan(*given, delta_softplus=True, backend="torch"), used)  # type: ignore[arg-type]
    assert_same(found, truth, 2e-6)


def test_long_sequences_with_large_steps_stay_exact_and_finite() -> None:
    inputs = problem(4099, largest_step=8.0, width=1, dtype=torch.float32, batch=1)
    exact = in_float64(inputs)
    found = with_gradients(selective_scan(*inputs, delta_softplus=True, backend="numba"), inputs)
    truth = with_gradients(selective_scan(*exact, delta_softplus=True), exact)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found)
    assert_same(found[:1], truth[:1], 2e-6)
    assert_same(found[1:], truth[1:], 5e-6)


def test_groups_are_shared_out_over_threads_and_come_out_the_same_every_time(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "FEWEST_STATES", 64)
    inputs = problem(70, groups=1, width=50, states=3, dtype=torch.float32, batch=1)
    sections = []
    make = compiled._Work._sections
    monkeypatch.setattr(compiled._Work, "_sections", lambda work: sections.append(make(work)) or sections[-1])
    runs = [with_gradients(selective_scan(*inputs, delta_softplus=True, backend="numba"), inputs) for _ in range(3)]
    assert sections[0] == [(0, 32), (32, 50)]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))
    torch.set_num_threads(1)
    assert_same(with_gradients(selective_scan(*inputs, delta_softplus=True, backend="numba"), inputs), runs[0], 1e-6)


def test_not_a_number_is_handed_on_and_only_forward() -> None:
    inputs = [tensor.detach() for tensor in problem(40, width=18, dtype=torch.float32, batch=1)]
    inputs[0][0, 17, 21] = float("nan")
    y = selective_scan(*inputs, delta_softplus=True, backend="numba")
    bad = torch.zeros(y.shape, dtype=torch.bool)
    bad[0, 17, 21:] = True
    assert torch.equal(y.isnan(), bad)


def _applied(intrinsic: Any, values: np.ndarray) -> np.ndarray:
    from numba import njit

    load, store = loops.load, loops.store

    @njit
    def apply(x: Any, out: Any) -> None:
        for i in range(0, len(x), 16):
            store(out, i, intrinsic(load(x, i)))

    out = np.empty_like(values)
    apply(values, out)
    return out


def _numbers(first: float, last: float) -> np.ndarray:
    return np.linspace(first, last, 1 << 16, dtype=np.float32)


def test_exponentials_are_right_to_two_last_places_and_held_at_the_ends() -> None:
    values = _numbers(-87, 88)
    found = _applied(loops.exponential, values).astype(np.float64)
    np.testing.assert_allclose(found, np.exp(values.astype(np.float64)), rtol=2.4e-7)
    ends = np.array([-np.inf, -1e30, -90, 90, 1e30, np.inf, np.nan, 0] * 2, dtype=np.float32)
    held = _applied(loops.exponential, ends)
    assert (held[:3] < 2e-38).all()
    assert (held[:3] >= 0).all()
    assert (held[3:6] > 1e38).all()
    assert np.isfinite(held[:6]).all()
    assert np.isnan(held[6])
    assert held[7] == 1


def test_softplus_and_its_slope_are_right_on_both_sides() -> None:
    values = _numbers(-80, 80)
    exact = values.astype(np.float64)
    np.testing.assert_allclose(_applied(loops.softplus, values), np.logaddexp(0, exact), rtol=4e-7)
    np.testing.assert_allclose(_applied(loops.sigmoid, values), 1 / (1 + np.exp(-exact)), rtol=4e-7)


def test_float32_on_a_cpu_takes_them_by_itself_and_float64_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = compiled.loops()
    monkeypatch.setattr(compiled, "loops", lambda: calls.append(1) or real)
    single = [tensor.detach() for tensor in problem(9, dtype=torch.float32)]
    selective_scan(*single, backend="torch")
    selective_scan(*[tensor.double() for tensor in single])
    assert calls == []
    selective_scan(*single)
    assert calls
    with pytest.raises(DeviceError, match=r"float32 on a CPU, got torch.float64 on cpu"):
        selective_scan(*[tensor.double() for tensor in single], backend="numba")


def test_without_numba_the_chunks_in_torch_do_it() -> None:
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import torch\n"
        "from FreqSegLib.errors import DeviceError\n"
        "from FreqSegLib.mamba.selective_scan import selective_scan\n"
        "x = [torch.ones(1, 2, 5), torch.ones(1, 2, 5), -torch.ones(2, 3), torch.ones(1, 1, 3, 5)]\n"
        "print(float(selective_scan(*x, x[3])[0, 0, 0]))\n"
        "try:\n"
        "    selective_scan(*x, x[3], backend='numba')\n"
        "except DeviceError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[0] == "3.0"
    assert "numba is not installed" in done.stdout


def test_a_numba_that_does_not_load_leaves_it_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem(21, width=18, dtype=torch.float32)
    wanted = with_gradients(selective_scan(*inputs, delta_softplus=True, backend="torch"), inputs)
    monkeypatch.setattr(compiled, "loops", lambda: None)
    found = with_gradients(selective_scan(*inputs, delta_softplus=True), inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    with pytest.raises(DeviceError, match="does not fit the installed NumPy"):
        selective_scan(*inputs, backend="numba")


def test_compiled_code_that_cannot_be_read_leaves_it_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise EOFError("Ran out of input")

    inputs = problem(21, width=18, dtype=torch.float32)
    wanted = with_gradients(selective_scan(*inputs, delta_softplus=True, backend="torch"), inputs)
    monkeypatch.setattr(compiled, "_BROKEN", [])
    try:
        for name in ("backward", "forward"):
            compiled._BROKEN.clear()
            compiled.loops.cache_clear()
            with monkeypatch.context() as patch:
                patch.setattr(loops, name, broken)
                found = with_gradients(selective_scan(*inputs, delta_softplus=True), inputs)
            assert_same(found, wanted, 2e-6)
            assert compiled.loops() is None
    finally:
        compiled._BROKEN.clear()
        compiled.loops.cache_clear()


def test_another_default_type_changes_nothing() -> None:
    inputs = problem(21, width=18, dtype=torch.float32)
    wanted = with_gradients(selective_scan(*inputs, delta_softplus=True, backend="numba"), inputs)
    torch.set_default_dtype(torch.float64)
    try:
        found = with_gradients(selective_scan(*inputs, delta_softplus=True, backend="numba"), inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(found, wanted, 1e-6)


def test_a_computer_without_a_place_for_compiled_code_compiles_without_keeping_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def njit(**options: Any) -> Any:
        asked.append(options.get("cache", False))
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(loops, "njit", njit)
    assert loops._compiled(len) is len
    assert asked == [True, False]


def test_a_network_draws_and_learns_the_same_either_way() -> None:
    results = []
    for backend in ("torch", "numba"):
        torch.manual_seed(3)
        network = SpectralVMUNet(1, 2, 32, base_channels=8, num_stages=2, depth=1, backend=backend)  # type: ignore[arg-type]
        drawn = network(torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(1)))
        first = drawn[0] if isinstance(drawn, (list, tuple)) else drawn
        first.square().mean().backward()
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        results.append([first.detach(), *gradients])
    largest = max(float(gradient.abs().max()) for gradient in results[0][1:])
    assert relative(results[1][0], results[0][0]) < 1e-5
    assert all(float((a - b).abs().max()) < 1e-5 * largest for a, b in zip(*[r[1:] for r in results], strict=True))
