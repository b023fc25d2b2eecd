"""Stop-watch, peak memory, child processes, and the Markdown that benchmarks print."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Section:
    """One part of the report: tables and sentences in order, and what was found to be wrong."""

    title: str
    blocks: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def say(self, sentence: str) -> None:
        """Add a sentence, and show it at once."""
        self.blocks.append(sentence)
        print(sentence, flush=True)

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table, first column left, others right."""
        lines = ["| " + " | ".join(headings) + " |", "| --- |" + " ---: |" * (len(headings) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        self.say("\n".join(lines))

    def goal(self, what: str, ratio: float, limit: float, *, at_least: bool) -> None:
        """Say whether a ratio reached its goal; missing one is no failure, the machine may be busy."""
        met = ratio >= limit if at_least else ratio <= limit
        wanted = f"at {'least' if at_least else 'most'} {limit:g}"
        self.say(f"- {what}: **{ratio:.2f}** (goal {wanted}: {'met' if met else 'missed'})")

    def check(self, what: str, difference: float, limit: float) -> None:
        """Two ways of computing the same thing must agree; if they do not, the benchmark fails."""
        agrees = difference <= limit
        self.say(f"- {what}: {difference:.1e} (must be at most {limit:.0e}: {'yes' if agrees else 'NO'})")
        if not agrees:
            self.failures.append(f"{what}: {difference:.1e} > {limit:.0e}")

    def markdown(self) -> str:
        return "\n\n".join([f"## {self.title}", *_joined(self.blocks)]) + "\n"


def _joined(blocks: Sequence[str]) -> list[str]:
    """List items that follow each other stay one list."""
    found: list[str] = []
    for block in blocks:
        if found and block.startswith("- ") and found[-1].startswith("- "):
            found[-1] += f"\n{block}"
        else:
            found.append(block)
    return found


@dataclass(frozen=True)
class Taken:
    """Seconds on the clock, and of the processor; other programs stretch the first much more than the second."""

    wall: float
    cpu: float

    def __add__(self, other: Taken) -> Taken:
        return Taken(self.wall + other.wall, self.cpu + other.cpu)

    def over(self, count: float) -> Taken:
        return Taken(self.wall / count, self.cpu / count)


def taken(work: Callable[[], Any]) -> Taken:
    """Both times of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Taken(time.perf_counter() - wall, time.process_time() - cpu)


def seconds(work: Callable[[], Any]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_turns(works: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taken in turns so that a busy moment of the machine hits all of them."""
    for work in works.values():
        work()
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            found[name].append(seconds(work))
    return {name: median(values) for name, values in found.items()}


def peak_memory() -> int:
    """Most bytes this process ever had in memory.

    Linux's getrusage starts a child at what its parent had, so the kernel's figure for the program itself is read.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import psutil

    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):
        return int(memory.peak_wset)
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def in_child(module: str, **arguments: Any) -> dict[str, Any]:
    """Run ``python -m module JSON`` and read the JSON on the last line it prints."""
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{module} {arguments} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def answer_parent(run: Callable[..., dict[str, Any]]) -> None:
    """The other end of :func:`in_child`."""
    print(json.dumps(run(**json.loads(sys.argv[1]))))


def megabytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MB"
