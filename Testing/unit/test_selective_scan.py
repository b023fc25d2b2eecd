"""The selective scan against the recurrence it stands for, stepped one by one in float64."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from scan_reference import assert_same, problem, relative, stepped, with_gradients
from torch import Tensor

from FreqSegLib.errors import DeviceError, InputError, SettingsError
from FreqSegLib.mamba import selective_scan as module
from FreqSegLib.mamba.selective_scan import chunk_length, plain_scan, selective_scan

LENGTHS = (1, 2, 3, 7, 8, 9, 31, 64, 67, 251)


@pytest.mark.parametrize("length", LENGTHS)
def test_values_and_gradients_equal_the_stepped_recurrence_for_large_steps(length: int) -> None:
    inputs = problem(length, largest_step=8.0)
    found = with_gradients(selective_scan(*inputs, delta_softplus=True), inputs)
    truth = with_gradients(stepped(*inputs, delta_softplus=True), inputs)
    assert_same(found, truth, 1e-12)


@pytest.mark.parametrize("length", [chunk_length(4096) * 3 + change for change in (-1, 0, 1)])
def test_around_whole_chunks_of_the_longest_kind(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setattr(module, "chunk_length", lambda length: 64)
    inputs = problem(length, largest_step=4.0, groups=1, width=2)
    found = with_gradients(selective_scan(*inputs, delta_softplus=True), inputs)
    assert_same(found, with_gradients(stepped(*inputs, delta_softplus=True), inputs), 1e-12)


def test_long_sequences_in_float32_stay_within_a_millionth_and_finite() -> None:
    inputs = problem(4099, largest_step=8.0, width=1, dtype=torch.float32, batch=1)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found = with_gradients(selective_scan(*inputs, delta_softplus=True, backend="torch"), inputs)
    truth = with_gradients(selective_scan(*exact, delta_softplus=True), exact)
    # the truth itself, at a length that a loop can still do
    assert relative(truth[0], stepped(*[tensor.detach() for tensor in exact], delta_softplus=True)) < 1e-12
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found)
    assert_same(found[:1], truth[:1], 1e-6)
    assert_same(found[1:], truth[1:], 5e-6)


@pytest.mark.parametrize("leave_out", [(5,), (6,), (5, 6)])
@pytest.mark.parametrize("softplus", [True, False])
def test_without_skip_or_bias(leave_out: tuple[int, ...], softplus: bool) -> None:
    inputs = problem(19)
    given = [None if index in leave_out else tensor for index, tensor in enumerate(inputs)]
    used = [tensor for tensor in given if tensor is not None]
    found = with_gradients(selective_scan(*given, delta_softplus=softplus), used)  # type: ignore[arg-type]
    truth = with_gradients(stepped(*given, delta_softplus=softplus), used)  # type: ignore[arg-type]
    assert_same(found, truth, 1e-12)


@pytest.mark.parametrize("length", [1, 10, 67])
def test_groups_that_run_backwards_and_share_their_input(length: int) -> None:
    inputs = problem(length, groups=4, u_groups=2, width=2)
    found = with_gradients(selective_scan(*inputs, delta_softplus=True, reversed_from=2), inputs)
    truth = with_gradients(stepped(*inputs, delta_softplus=True, reversed_from=2), inputs)
    assert_same(found, truth, 1e-12)


@pytest.mark.parametrize("length", [1, 5, 17])
def test_gradcheck(length: int) -> None:
    inputs = problem(length, largest_step=2.0, width=2, batch=1)
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, delta_softplus=True, reversed_from=1), inputs)


@pytest.mark.parametrize("states", [64, 2000])
def test_blocks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch, states: int) -> None:
    inputs = problem(40, groups=4, width=37)
    whole = with_gradients(selective_scan(*inputs, delta_softplus=True), inputs)
    monkeypatch.setitem(module.BLOCK_STATES, "cpu", states)
    assert_same(with_gradients(selective_scan(*inputs, delta_softplus=True), inputs), whole, 1e-12)


def test_the_plain_form_is_the_same() -> None:
    inputs = problem(37, groups=4, u_groups=2)
    found = with_gradients(plain_scan(*inputs, True, 2), inputs)
    truth = with_gradients(selective_scan(*inputs, delta_softplus=True, reversed_from=2), inputs)
    assert_same(found, truth, 1e-12)


def test_one_group_may_be_given_without_its_axis() -> None:
    u, delta, A, B, C, D, bias = problem(9, groups=1)
    with_axis = selective_scan(u, delta, A, B, C, D, bias)
    assert torch.equal(selective_scan(u, delta, A, B[:, 0], C[:, 0], D, bias), with_axis)


def test_inputs_need_not_be_contiguous() -> None:
    inputs = [tensor.detach() for tensor in problem(19)]
    strided = [
        tensor.transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() if tensor.dim() > 1 else tensor
        for tensor in inputs
    ]
    assert any(not tensor.is_contiguous() for tensor in strided)
    inputs = [tensor.requires_grad_(other.requires_grad) for tensor, other in zip(inputs, strided, strict=True)]
    own, other = ([tensor for tensor in given if tensor.requires_grad] for given in (inputs, strided))
    found = torch.autograd.grad(selective_scan(*strided, delta_softplus=True).square().sum(), other)
    expected = torch.autograd.grad(selective_scan(*inputs, delta_softplus=True).square().sum(), own)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_second_derivatives_are_refused_not_wrong(backend: str) -> None:
    inputs = problem(9, dtype=torch.float32)
    y = selective_scan(*inputs, backend=backend)  # type: ignore[arg-type]
    (first,) = torch.autograd.grad(y.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(SettingsError, match="first derivatives only"):
        torch.autograd.grad(first.square().sum(), inputs[:1])


def test_half_precision_in_is_computed_in_float32_and_float64_stays() -> None:
    inputs = [tensor.detach() for tensor in problem(33, dtype=torch.float32)]
    short = [tensor.bfloat16() for tensor in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        found = selective_scan(*short, delta_softplus=True)
        kept = selective_scan(*inputs, delta_softplus=True)
    assert found.dtype == torch.bfloat16
    truth = selective_scan(*[tensor.float() for tensor in short], delta_softplus=True)
    assert torch.equal(found, truth.bfloat16())
    assert torch.equal(kept, selective_scan(*inputs, delta_softplus=True))
    assert selective_scan(*[tensor.double() for tensor in inputs]).dtype == torch.float64


@pytest.mark.parametrize(
    ("index", "shape", "said"),
    [
        (0, (2, 4, 9), "u must have the shape"),
        (2, (6, 3), "B must have the shape"),
        (3, (2, 2, 2, 8), "B must have the shape"),
        (4, (1, 2, 2, 9), "C must have the shape"),
        (5, (5,), "D must have the shape"),
        (1, (2, 6, 0), "at least one element"),
    ],
)
def test_shapes_that_do_not_fit_are_named(index: int, shape: tuple[int, ...], said: str) -> None:
    inputs = [tensor.detach() for tensor in problem(9)]
    inputs[index] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(InputError, match=said):
        selective_scan(*inputs)


@pytest.mark.parametrize("shared_input", [False, True])
def test_threads_give_what_one_gives_and_the_same_every_time(
    monkeypatch: pytest.MonkeyPatch, shared_input: bool
) -> None:
    monkeypatch.setattr(module, "FEWEST_STATES", 64)
    given = problem(67, groups=4, width=40, states=3, u_groups=2 if shared_input else None)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            y = selective_scan(*given, True, reversed_from=2)
            found.append((y, *torch.autograd.grad(y.square().sum(), given)))
            with torch.inference_mode():
                assert torch.equal(selective_scan(*given, True, reversed_from=2), y)
    finally:
        torch.set_num_threads(before)
    for alone, together, again in zip(*found, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
        assert torch.equal(together, again)


def test_a_batch_of_several_blocks_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    monkeypatch.setattr(module, "FEWEST_STATES", 64)
    step_through = module._step_through
    monkeypatch.setattr(
        module, "_step_through", lambda *x: (names.add(threading.current_thread().name), step_through(*x))
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        selective_scan(*problem(67, groups=4, width=40, states=3))
    finally:
        torch.set_num_threads(before)
    assert names
    assert threading.current_thread().name not in names


def test_backends_that_cannot_be_used_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [tensor.detach() for tensor in problem(4)]
    with pytest.raises(SettingsError, match="auto, torch, numba, triton or mamba_ssm"):
        selective_scan(*inputs, backend="cuda")  # type: ignore[arg-type]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(DeviceError, match="Triton"):
        selective_scan(*inputs, backend="triton")
    with pytest.raises(DeviceError, match="mamba_ssm"):
        selective_scan(*inputs, backend="mamba_ssm")
    with pytest.raises(InputError, match="reversed_from must lie in 0 to 2"):
        selective_scan(*inputs, reversed_from=3)


def test_mamba_ssm_is_called_with_flipped_groups_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with that package's signature, which knows neither backward groups nor shared inputs."""

    def selective_scan_fn(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: None, bias: Tensor, softplus: bool
    ) -> Tensor:
        assert z is None
        return stepped(u, delta, A, B, C, D, bias, softplus)

    interface = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = selective_scan_fn  # type: ignore[attr-defined]
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    inputs = [tensor.detach() for tensor in problem(11, groups=4, u_groups=2)]
    found = selective_scan(*inputs, delta_softplus=True, reversed_from=2, backend="mamba_ssm")
    assert relative(found, selective_scan(*inputs, delta_softplus=True, reversed_from=2)) < 1e-12


TRITON = """
import torch
from FreqSegLib.mamba import selective_scan_triton
from FreqSegLib.mamba.selective_scan import selective_scan
selective_scan_triton.CHUNK = 8
worst = 0.0
# (length, groups of u, first reversed, with skip and bias, softplus)
for length, u_groups, turned, extras, softplus in (
    (5, 2, 2, False, False),
    (17, 1, 1, True, True),
    (24, 2, 1, True, True),
):
    made = torch.Generator().manual_seed(length)
    normal = lambda *shape: torch.randn(*shape, generator=made)
    width, groups, states = 3, 2, 3
    inputs = [normal(1, u_groups * width, length), torch.rand(1, 6, length, generator=made) * 8,
              -torch.rand(6, states, generator=made) * 4, normal(1, 2, states, length), normal(1, 2, states, length)]
    inputs += [normal(6), normal(6)] if extras else []
    inputs = [x.requires_grad_() for x in inputs]
    weight = normal(1, 6, length)
    results = []
    for backend in ("triton", "torch"):
        x = inputs if extras else [*inputs, None, None]
        y = selective_scan(*x, softplus, reversed_from=turned, backend=backend)
        results.append([y, *torch.autograd.grad((y * weight).sum(), inputs)])
    for a, b in zip(*results):
        worst = max(worst, float(((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).detach()))
print(worst)
"""


def test_the_triton_kernels_in_their_interpreter_give_the_same_numbers(project_root: Path) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", TRITON],
        cwd=project_root,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 1e-5


@pytest.mark.slow
def test_the_triton_kernels_compile_for_a_gpu_without_one() -> None:
    """The interpreter takes what the compiler refuses (and the other way round)."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from FreqSegLib.mamba import selective_scan_kernels as kernels

    fixed = {"HAS_D": True, "HAS_BIAS": True, "SOFTPLUS": True, "CHANNELS": 2, "STATES": 16, "STEPS": 64}
    whole = {"length", "width", "groups", "u_groups", "states", "first_reversed"}
    for kernel in (kernels.forward_kernel, kernels.returning_kernel, kernels.backward_kernel):
        names = kernel.arg_names
        types_ = {name: "constexpr" if name in fixed else "i32" if name in whole else "*fp32" for name in names}
        source = ASTSource(kernel, types_, constexprs={name: fixed[name] for name in names if name in fixed})
        assert compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["cubin"]


def test_the_first_scan_loads_neither_triton_nor_the_compiler(project_root: Path) -> None:
    code = (
        "import sys, torch\n"
        "for name in ('triton', 'torch._dynamo', 'mamba_ssm'): sys.modules[name] = None\n"
        "from FreqSegLib.mamba import selective_scan_triton\n"
        "from FreqSegLib.mamba.selective_scan import selective_scan\n"
        "x = torch.ones(1, 2, 3, requires_grad=True)\n"
        "selective_scan(x, x, -torch.ones(2, 1), x[:, None, :1], x[:, None, :1]).sum().backward()\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=project_root, check=True, timeout=300)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_a_gpu_triton_gives_what_torch_gives() -> None:
    for length in (1, 63, 64, 65, 1009):
        inputs = [x.detach().cuda().requires_grad_() for x in problem(length, groups=4, dtype=torch.float32)]
        both = []
        for backend in ("triton", "torch"):
            y = selective_scan(*inputs, delta_softplus=True, reversed_from=2, backend=backend)  # type: ignore[arg-type]
            both.append([x.cpu() for x in [y, *torch.autograd.grad(y.square().sum(), inputs)]])
        assert_same(both[0], both[1], 1e-5)


@pytest.mark.slow
def test_torch_compile_takes_it_whole() -> None:
    inputs = [tensor.detach().requires_grad_() for tensor in problem(33, dtype=torch.float32)]
    compiled = torch.compile(lambda *x: selective_scan(*x, delta_softplus=True), fullgraph=True, backend="aot_eager")
    found = with_gradients(compiled(*inputs), inputs)
    assert_same(found, with_gradients(selective_scan(*inputs, delta_softplus=True), inputs), 1e-6)
