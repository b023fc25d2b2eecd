"""``python -m Testing.benchmarks``: measures, prints ratios of one run on one machine, and writes them as Markdown.

Ratios hold from machine to machine, seconds do not. Nothing here is a test; only results that should be equal and are
not make it fail.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Before torch is loaded: threads that wait by spinning make two busy processes many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from Testing.benchmarks.measuring import ROOT, Section

PARTS = ("m2ib", "lite", "memory", "encoder", "sam", "worker", "panel", "scan", "networks", "fusion", "fusion-memory")


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    steps: int = 10
    samples: int = 10
    scale: str = "full"
    slices: tuple[int, ...] = (5, 10, 20)
    frequency_slices: int = 5
    memory_slices: tuple[int, ...] = (20, 200)
    repeats: int = 3
    sam_repeats: int = 2
    fusion_slices: int = 24
    fusion_sides: tuple[int, ...] = (256, 512)
    fusion_repeats: int = 3
    worker_shapes: tuple[tuple[int, int, int], ...] = ((150, 256, 256), (400, 512, 512))


QUICK = Sizes(
    steps=3, slices=(2, 4, 8), frequency_slices=3, memory_slices=(10, 40), repeats=2, sam_repeats=1, fusion_slices=12
)
TINY = Sizes(
    steps=2,
    samples=2,
    scale="tiny",
    slices=(1, 2),
    frequency_slices=1,
    memory_slices=(1, 3),
    repeats=1,
    sam_repeats=1,
    fusion_slices=3,
    fusion_sides=(64,),
    fusion_repeats=1,
    worker_shapes=((4, 32, 32),),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns: 0, or 1 if two ways of computing the same thing disagreed."""
    options = _parser().parse_args(arguments)
    sizes = TINY if options.tiny else QUICK if options.quick else Sizes()
    runs = _runs(sizes, options.memory_slices or sizes.memory_slices)
    started = time.monotonic()
    sections = []
    for part in options.only or PARTS:
        began = time.monotonic()
        print(f"\n== {part}", flush=True)
        section = runs[part]()
        section.say(f"Took {time.monotonic() - began:.0f} s.")
        sections.append(section)
    report = _report(sections, sizes, time.monotonic() - started)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.out.with_name(options.out.name + ".part")
    temporary.write_text(report, encoding="utf-8")
    os.replace(temporary, options.out)
    print(f"\nWrote {options.out} after {time.monotonic() - started:.0f} s.")
    failures = [failure for section in sections for failure in section.failures]
    for failure in failures:
        print(f"DISAGREES: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m Testing.benchmarks", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer steps, slices and repeats")
    size.add_argument("--tiny", action="store_true", help="small models: only to see that everything runs")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part; may be repeated")
    parser.add_argument("--memory-slices", type=int, nargs="+", metavar="N", help="volumes whose peak memory is taken")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench.md", help="default: build/bench.md")
    return parser


def _runs(sizes: Sizes, memory_slices: Sequence[int]) -> dict[str, Callable[[], Section]]:
    def m2ib() -> Section:
        from Testing.benchmarks.m2ib import m2ib_time

        return m2ib_time(sizes.steps, sizes.samples, sizes.scale)

    def lite() -> Section:
        from Testing.benchmarks.lite import lite_time

        return lite_time(sizes.slices, sizes.frequency_slices)

    def memory() -> Section:
        from Testing.benchmarks.lite import lite_memory

        return lite_memory(memory_slices)

    def encoder() -> Section:
        from Testing.benchmarks.encoder import encoder_time

        return encoder_time(sizes.repeats, side=256 if sizes.scale == "full" else 64)

    def sam() -> Section:
        from Testing.benchmarks.sam import sam_time

        return sam_time(sizes.sam_repeats, sizes.scale)

    def worker() -> Section:
        from Testing.benchmarks.worker import worker_round_trip

        return worker_round_trip(sizes.repeats, sizes.worker_shapes)

    def panel() -> Section:
        from Testing.benchmarks.panel import panel_time

        return panel_time(sizes.repeats)

    def scan() -> Section:
        from Testing.benchmarks.scan import scan_time

        return scan_time(sizes.repeats, sizes.scale)

    def networks() -> Section:
        from Testing.benchmarks.scan import network_time

        return network_time(sizes.repeats, sizes.scale)

    def fusion() -> Section:
        from Testing.benchmarks.fusion import fusion_time

        return fusion_time(sizes.fusion_slices, sizes.fusion_sides, sizes.fusion_repeats)

    def fused_memory() -> Section:
        from Testing.benchmarks.fusion import fusion_memory

        return fusion_memory(memory_slices, min(sizes.fusion_sides))

    return {
        "m2ib": m2ib,
        "lite": lite,
        "memory": memory,
        "encoder": encoder,
        "sam": sam,
        "worker": worker,
        "panel": panel,
        "scan": scan,
        "networks": networks,
        "fusion": fusion,
        "fusion-memory": fused_memory,
    }


def _report(sections: Sequence[Section], sizes: Sizes, taken: float) -> str:
    import torch

    about = (
        f"Measured in one run of {taken / 60:.0f} min: {platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, torch {torch.__version__}, sizes {sizes}. Ratios hold elsewhere, seconds do not."
    )
    return "\n".join(["# Benchmarks\n", f"{about}\n", *(section.markdown() for section in sections)])


if __name__ == "__main__":
    sys.exit(main())
