"""What a reader of an evaluation must know: what was run, with what, and what it does not tell."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from FreqSegLib import __version__, weights
from FreqSegLib.clip.vocabulary import targets
from FreqSegLib.evaluation.report import Block
from FreqSegLib.evaluation.wordings import KINDS, WordingKind, wordings_of
from FreqSegLib.presets import Tuning

if TYPE_CHECKING:
    from FreqSegLib.evaluation.calibration import TargetCalibration
    from FreqSegLib.evaluation.report import TargetSummary
    from FreqSegLib.settings import TextSegmentationSettings
    from FreqSegLib.text_segmentation import TextSegmenter

PACKAGES = ("torch", "monai", "numpy", "scipy", "SimpleITK")
FEW = 30
_SHOWN = (
    *(
        "bottleneck",
        "contrast",
        "threshold",
        "threshold_value",
        "confidence_threshold",
        "num_contours",
        "smallest_part",
        "slice_smoothing",
    ),
    *("refine", "prompt_kind", "box_margin"),
)


def versions() -> str:
    """Of this library and of those the numbers rest on."""
    found = [f"FreqSeg {__version__}", f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def weights_used(ids: Sequence[str]) -> str:
    """Sets of weights with the first digits of their files' sha256, as the catalogue states them."""
    known = weights.catalogue()
    said = []
    for name in ids:
        if name not in known:
            said.append(name)
            continue
        digests = [f"{file.filename} {file.sha256[:12]}" for file in known[name].files if file.sha256]
        said.append(f"{name} ({', '.join(digests)})" if digests else name)
    return "; ".join(said)


def run_facts(
    segmenter: TextSegmenter,
    found: Sequence[TargetSummary],
    *,
    cases: Sequence[str],
    kinds: Sequence[WordingKind],
    changed: str,
    uncertainty: str,
) -> list[tuple[str, str]]:
    """What was run, as (name, value).

    Args:
        segmenter: that ran.
        found: of ``report.summaries``.
        cases: of which split, and how many of each kind.
        kinds: of wordings.
        changed: settings that differ from their defaults.
        uncertainty: how it was computed, or that it was not.
    """
    preset = segmenter.preset
    ids = [*preset.weights, *([preset.trained] if preset.trained and segmenter.trained is not None else [])]
    by_method: dict[str, list[str]] = {}
    for row in found:
        if row.wordings == found[0].wordings:
            by_method.setdefault(row.method, []).append(row.target)
    every = "every target" if len(by_method) == 1 else ""
    return [
        ("Preset", f"{preset.name}: {preset.description}"),
        ("Method", "; ".join(f"{method}: {every or ', '.join(names)}" for method, names in by_method.items())),
        ("Weights", weights_used(ids)),
        ("Settings changed", changed),
        ("Seed", str(segmenter.settings.seed)),
        ("Cases", "; ".join(cases)),
        ("Asked in", "; ".join(_kind_said(kind) for kind in kinds)),
        ("Uncertainty", uncertainty),
        ("Device", _device(segmenter)),
        ("Versions", versions()),
        ("Date", date.today().isoformat()),
    ]


def settings_block(
    segmenter: TextSegmenter, settings: TextSegmentationSettings, found: Sequence[TargetSummary]
) -> Block:
    """The settings each target was run with: the user's, else those tuned for it, else the preset's."""
    rows = []
    for row in found:
        if row.wordings != found[0].wordings:
            continue
        trained = row.method.startswith("trained") and segmenter.trained is not None
        tuned = segmenter.trained.tuning if trained and segmenter.trained else segmenter.tuning
        tuning = tuned.get(row.target, tuned.get("*", Tuning()))
        full = segmenter.preset.complete(settings, tuning)
        values = [_plain(getattr(full, name)) for name in _SHOWN]
        if trained:
            values[: _SHOWN.index("threshold")] = ["–"] * _SHOWN.index("threshold")
        gate = f"{tuning.slice_threshold:.3g} slice\n{tuning.volume_threshold:.3g} volume" if full.gate else "off"
        rows.append((row.target, row.method, *values, gate))
    headings = ("target", "method", *(name.replace("_", " ") for name in _SHOWN), "gate at")
    return Block("Settings of each target", headings, tuple(rows))


def not_measured(
    found: Sequence[TargetSummary],
    calibrated: Sequence[TargetCalibration],
    kinds: Sequence[WordingKind],
    *,
    uncertainty: bool,
) -> list[str]:
    """What the numbers do not tell, a sentence each."""
    first = [row for row in found if row.wordings == found[0].wordings] if found else []
    said = [
        "Only agreement with the outlines that came with the data: not how far readers agree among themselves, and no "
        "use in a clinic. Other scanners, protocols, hospitals and diseases than those of the data are not covered.",
        "Prompts outside the vocabulary are not covered.",
    ]
    asked = {row.target for row in first}
    missing = [meaning.name for meaning in targets() if meaning.name not in asked]
    if missing:
        said.append(f"Targets not evaluated: {', '.join(missing)}.")
    fewer = [row for row in first if row.cases < row.available]
    if fewer:
        said.append(f"Not every case was used: {_listed([(r.target, f'{r.cases} of {r.available}') for r in fewer])}.")
    few = [row for row in first if row.dsc.n < FEW]
    if few:
        said.append(f"Few cases, wide intervals: {_listed([(row.target, str(row.dsc.n)) for row in few])}.")
    full = [row.target for row in first if not row.absent_slices]
    if full:
        said.append(f"Every slice holds the target, so that nothing is known of its absence: {', '.join(full)}.")
    if not any(row.wrong for row in first):
        said.append("No prompts for targets of other modalities were given.")
    others = [kind for kind in KINDS if kind not in kinds]
    if others:
        said.append(f"Wordings that were not asked: {', '.join(others)}.")
    if not uncertainty:
        said.append("Uncertainty was not computed, so whether it predicts error is not known from this run.")
    thin = [one for one in calibrated if any(m.correlation.n < FEW for m in one.measures.values())]
    if thin:
        counts = [(one.target, str(max(m.correlation.n for m in one.measures.values()))) for one in thin]
        said.append(f"Correlations of uncertainty and error rest on few cases: {_listed(counts)}.")
    if any(row.unit == "px" for row in first):
        said.append("Where distances are in pixels (px), the source records no spacing: HD95 in mm is not known.")
    if all(not row.box_dsc.n for row in first):
        said.append("The truth's own boxes were not decoded, so the decoder's ceiling is not known from this run.")
    untimed = [row.target for row in first if row.tower_seconds is None]
    if untimed:
        said.append(f"Image tower not timed, its embeddings were in the cache: {', '.join(untimed)}.")
    said.append("Seconds are of this machine in this run, whatever else it was doing; they are no benchmark.")
    return said


def _kind_said(kind: WordingKind) -> str:
    if kind == "canonical":
        return "canonical (each target's name)"
    count = sum(len(wordings_of(meaning, kind)) for meaning in targets())
    seen = "used in training" if kind == "trained" else "never used in training"
    return f"{kind} ({count} wordings {seen}, taking turns over the cases)"


def _device(segmenter: TextSegmenter) -> str:
    import torch

    if segmenter.device.type == "cuda":
        return f"{segmenter.device} ({torch.cuda.get_device_name(segmenter.device)})"
    threads = torch.get_num_threads()
    return f"{segmenter.device}, torch on {threads} thread{'' if threads == 1 else 's'}"


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else "–" if value is None else str(value)


def _listed(pairs: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in pairs)
