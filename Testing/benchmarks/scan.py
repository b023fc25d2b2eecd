"""The selective scan against a loop over time and against chunks left to autograd; the network against MONAI's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from FreqSegLib.mamba.selective_scan import plain_scan, selective_scan
from FreqSegLib.mamba.selective_scan_numba import loops
from Testing.benchmarks.measuring import (
    ROOT,
    Section,
    answer_parent,
    in_child,
    in_turns,
    megabytes,
    peak_memory,
    seconds,
)

GROUPS, STATES = 4, 16
FASTER_GOAL, LINEAR_GOAL, TOLERANCE = 4.0, 1.5, 1e-5


COMPILED, CHUNKS, AUTOGRAD = "compiled loops (ours)", "two-pass chunks in torch (ours)", "the same, plain autograd"
WORKS: dict[str, Callable[..., Tensor]] = {
    COMPILED: partial(selective_scan, backend="numba"),
    CHUNKS: partial(selective_scan, backend="torch"),
    AUTOGRAD: lambda *x: plain_scan(*x, False, GROUPS),
}


def scan_time(repeats: int, scale: str) -> Section:
    """Args:
    repeats: of each measurement; their median counts.
    scale: ``full`` for 4,096 steps of 192 channels, ``tiny`` to see that the benchmark runs.
    """
    length, channels = (4096, 192) if scale == "full" else (256, 8)
    section = Section("Selective scan")
    section.say(
        f"{GROUPS} groups of {channels} channels, {STATES} states, {length} steps, one image, float32, "
        f"{torch.get_num_threads()} threads. Forward as in training."
    )
    inputs = problem(length, channels)
    works: dict[str, Callable[..., Tensor]] = {**WORKS, "sequential loop": stepped}
    found, forwards, backwards = {}, {}, {}
    for name, work in works.items():
        times = [both_passes(work, inputs) for _ in range(1 if work is stepped else repeats + 1)]
        # the first call sets up what later ones reuse; a loop has nothing to reuse
        _, forward, backward = min(times[1:] or times, key=lambda item: item[1] + item[2])
        found[name] = times[-1][0]
        forwards[name], backwards[name] = forward, backward
    own, chunks, *others = works
    total = {name: forwards[name] + backwards[name] for name in works}
    section.table(
        ["scan", "forward s", "backward s", "times ours"],
        [[n, f"{forwards[n]:.2f}", f"{backwards[n]:.2f}", f"{total[n] / total[own]:.1f}"] for n in works],
    )
    for name in (chunks, *others):
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found[own], found[name], strict=True))
        section.check(f"Largest difference from '{name}', values and gradients, relative", worst, TOLERANCE)
    for name in others:
        for ours in (own, chunks):
            times = total[name] / total[ours]
            section.goal(f"'{ours}': times faster than '{name}', both passes", times, FASTER_GOAL, at_least=True)
    _linear(section, channels, length, repeats)
    _memory(section, channels, length)
    return section


def problem(length: int, channels: int) -> list[Tensor]:
    """u, delta, A, B, C, D, delta_bias."""
    made = torch.Generator().manual_seed(0)
    width = GROUPS * channels
    return [
        torch.randn(1, width, length, generator=made),
        torch.rand(1, width, length, generator=made) * 0.1,
        -torch.rand(width, STATES, generator=made) * 4,
        torch.randn(1, GROUPS, STATES, length, generator=made),
        torch.randn(1, GROUPS, STATES, length, generator=made),
        torch.randn(width, generator=made),
        torch.zeros(width),
    ]


def both_passes(work: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[list[Tensor], float, float]:
    """Values and gradients; seconds forward and backward."""
    given = [x.detach().requires_grad_() for x in inputs]
    kept: list[Any] = []
    forward = seconds(lambda: kept.append(work(*given)))
    weight = torch.randn(kept[0].shape, generator=torch.Generator().manual_seed(1))
    backward = seconds(lambda: kept.append(torch.autograd.grad(kept[0], given, weight)))
    return [kept[0].detach(), *kept[1]], forward, backward


def stepped(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
    """One step after the other, all channels at once."""
    batch, channels, _ = delta.shape
    width = channels // B.shape[1]
    step = delta + delta_bias[:, None]
    h = u.new_zeros(batch, channels, A.shape[1])
    outputs = []
    # unbound at once: a gradient of single steps would be a tensor of full size each
    parts = [x.unbind(-1) for x in (step, step * u, B, C)]
    for dt, gain, b, c in zip(*parts, strict=True):
        added = gain[..., None] * b.repeat_interleave(width, 1)
        h = torch.exp(dt[..., None] * A) * h + added
        outputs.append((h * c.repeat_interleave(width, 1)).sum(-1))
    return torch.stack(outputs, -1) + D[:, None] * u


def _linear(section: Section, channels: int, length: int, repeats: int) -> None:
    """Time a step, at the length above and at 4 and 16 times fewer steps."""
    lengths = [max(1, length // share) for share in (16, 4, 1)]
    times = in_turns(
        {str(n): (lambda n=n: both_passes(selective_scan, problem(n, channels))) for n in lengths}, repeats
    )  # type: ignore[misc]
    a_step = [times[str(n)] / n * 1e6 for n in lengths]
    section.table(
        ["steps", "s, both passes", "µs a step"],
        [[str(n), f"{times[str(n)]:.3f}", f"{cost:.1f}"] for n, cost in zip(lengths, a_step, strict=True)],
    )
    section.goal(
        "Cost of a step at the longest, over the shortest", a_step[-1] / a_step[0], LINEAR_GOAL, at_least=False
    )


def _memory(section: Section, channels: int, length: int) -> None:
    """Peak of a process that does both passes, over one that only makes the inputs."""
    base = in_child(__name__, name="nothing", channels=channels, length=length)["peak"]
    rows = []
    for name in (COMPILED, CHUNKS, AUTOGRAD):
        peak = in_child(__name__, name=name, channels=channels, length=length)["peak"]
        rows.append([name, megabytes(peak - base)])
    section.table(["scan", "peak memory above the inputs"], rows)


def memory_of(name: str, channels: int, length: int) -> dict[str, Any]:
    """In a child process."""
    inputs = problem(length, channels)
    if name in WORKS:
        both_passes(WORKS[name], inputs)
    else:
        # loading the compiler is no part of a scan
        loops()
    return {"peak": peak_memory()}


def network_time(repeats: int, scale: str) -> Section:
    """SpectralVMUNet at its defaults, small, and as it ships; MONAI's networks: an image, and a training step."""
    from FreqSegLib.mamba.model_config import read_config
    from FreqSegLib.mamba.spectral_vmunet import SpectralVMUNet
    from FreqSegLib.training.spectral_config import SpectralRecipe
    from FreqSegLib.training.spectral_recipe import build_network

    shipped = read_config(ROOT / "Resources" / "Configs" / "spectral-lungs.json", SpectralRecipe)
    side = 256 if scale == "full" else 32
    section = Section(f"Networks at {side} x {side}")
    networks: dict[str, nn.Module] = {
        "SpectralVMUNet, defaults": SpectralVMUNet(1, 3, side),
        "SpectralVMUNet, 32 channels, depth 1": SpectralVMUNet(1, 3, side, 32, depth=1, filter_size=16),
        "the same without the frequency path": SpectralVMUNet(1, 3, side, 32, depth=1, spectral=False),
        "spectral-lungs": build_network(shipped),
        **_monai_networks(),
    }
    image = torch.randn(1, 1, side, side, generator=torch.Generator().manual_seed(0))
    rows = []
    for name, network in networks.items():
        network.eval()
        with torch.inference_mode():
            use = in_turns({"use": lambda network=network: network(image)}, repeats)["use"]  # type: ignore[misc]
        network.train()
        step = in_turns({"step": lambda network=network: network(image).square().mean().backward()}, repeats)["step"]  # type: ignore[misc]
        parameters = sum(value.numel() for value in network.parameters()) / 1e6
        rows.append([name, f"{parameters:.2f}", f"{use:.2f}", f"{step:.2f}"])
    section.table(["network", "M parameters", "s an image", "s forward and backward"], rows)
    return section


def _monai_networks() -> dict[str, nn.Module]:
    from monai.networks.nets import SegResNet, SwinUNETR, UNet

    return {
        "MONAI UNet": UNet(2, 1, 3, (32, 64, 128, 256), (2, 2, 2), num_res_units=2),
        # of as many parameters as spectral-lungs
        "MONAI SegResNet": SegResNet(2, 12, 1, 2, norm="INSTANCE"),
        "MONAI SwinUNETR": SwinUNETR(1, 3, feature_size=24, spatial_dims=2),
    }


if __name__ == "__main__":
    answer_parent(memory_of)
