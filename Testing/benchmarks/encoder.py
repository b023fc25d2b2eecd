"""Where LiteMedSAM's encoder spends its time on this CPU, and what helped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from FreqSegLib.sam import tiny_vit
from FreqSegLib.sam.tiny_vit import TinyViT
from Testing.benchmarks.lite_setup import plain_encoder
from Testing.benchmarks.measuring import Section, in_turns
from Testing.benchmarks.reference_tiny_vit import with_folded_norms

TOP = 10


@torch.inference_mode()
def encoder_time(repeats: int, batches: tuple[int, ...] = (1, 2, 4), side: int = 256) -> Section:
    """Args:
    repeats: of every measurement; the median counts.
    batches: slices at once.
    side: of the image; LiteMedSAM's is 256.
    """
    section = Section("Where the encoder's time goes, and what helped")
    ours = TinyViT().eval().requires_grad_(False)
    ours.load_checkpoint(plain_encoder().state_dict())
    folded, last = with_folded_norms(plain_encoder()), with_folded_norms(plain_encoder())
    last.to(memory_format=torch.channels_last)
    plain = plain_encoder()
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    image_last = image.contiguous(memory_format=torch.channels_last)
    section.check("Largest difference, ours and plain", float((ours(image) - plain(image)).abs().max()), 1e-3)
    works: dict[str, Callable[[], object]] = {
        "plain: batch norms, channels first": lambda: plain(image),
        "batch norms folded": lambda: folded(image),
        "batch norms folded, channels last": lambda: last(image_last),
        "ours, without strips and fused attention": lambda: _without_strips(ours, image, fused=False),
        "ours, without strips": lambda: _without_strips(ours, image, fused=True),
        "ours": lambda: ours(image),
    }
    taken = in_turns(works, repeats)
    first = taken["plain: batch norms, channels first"]
    rows = [[name, f"{value:.2f}", f"{first / value:.2f}"] for name, value in taken.items()]
    section.table(["encoder, one slice", "s", "times faster than plain"], rows)
    section.table(["threads", "s a slice (ours)"], [[str(n), f"{s:.2f}"] for n, s in _threads(ours, image, repeats)])
    by_batch = in_turns(
        {str(count): lambda count=count: ours(image.expand(count, -1, -1, -1)) for count in batches},  # type: ignore[misc]
        repeats,
    )
    section.table(["slices at once", "s a slice (ours)"], [[n, f"{s / int(n):.2f}"] for n, s in by_batch.items()])
    for name, work in (("plain", lambda: plain(image)), ("ours", lambda: ours(image))):
        section.table([f"operator ({name})", "calls", "own time, ms", "share"], _profile(work))
    return section


def _without_strips(model: TinyViT, image: torch.Tensor, *, fused: bool) -> torch.Tensor:
    rows = tiny_vit.STRIP_ROWS
    tiny_vit.STRIP_ROWS = image.shape[-2]
    try:
        if fused:
            return model(image)
        with sdpa_kernel(SDPBackend.MATH):
            return model(image)
    finally:
        tiny_vit.STRIP_ROWS = rows


def _threads(model: TinyViT, image: torch.Tensor, repeats: int) -> list[tuple[int, float]]:
    found = []
    for count in (1, 2):
        with _with_threads(count):
            found.append((count, in_turns({"": lambda: model(image)}, repeats)[""]))
    return found


@contextmanager
def _with_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _profile(work: Callable[[], object]) -> list[list[str]]:
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        work()
    found = sorted(recorded.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in found)
    return [
        [
            f"`{row.key}`",
            str(row.count),
            f"{row.self_cpu_time_total / 1e3:.1f}",
            f"{100 * row.self_cpu_time_total / total:.0f} %",
        ]
        for row in found[:TOP]
    ]
