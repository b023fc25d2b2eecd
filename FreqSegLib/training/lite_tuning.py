"""Choose the lite preset's settings a target on validation patients, through the whole pipeline, decoder included.

Every way to ask and look (contrast or plain prompt, NIB or M2IB) gives one saliency a case. Rules that turn it into a
coarse mask are ranked by the DSC of that mask on a thinned grid; the best few of all ways are drawn by the decoder, and
the DSC of what it draws decides, a volume or image at a time, as ``freqseg evaluate`` counts it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.clip.prompts import MatchedPrompt
from FreqSegLib.clip.vocabulary import Meaning, targets
from FreqSegLib.evaluation.cases import Case
from FreqSegLib.evaluation.segmentation_metrics import dice
from FreqSegLib.presets import Tuning
from FreqSegLib.saliency.gate import Presence
from FreqSegLib.sam.coarse_mask import coarse_mask
from FreqSegLib.settings import TextSegmentationSettings
from FreqSegLib.text_segmentation import TextSegmenter
from FreqSegLib.text_stages import PreparedVolume, PromptRun

Settings = dict[str, Any]

LOOKS: tuple[Settings, ...] = (
    {"bottleneck": "nib"},
    {"bottleneck": "m2ib", "beta": 0.1},
    {"bottleneck": "m2ib", "beta": 3.0},
)
THRESHOLDS: tuple[Settings, ...] = (
    {"threshold": "otsu"},
    {"threshold": "kmeans"},
    *({"threshold": "fixed", "threshold_value": round(0.1 * i, 1)} for i in range(1, 10)),
)
CONFIDENCES = (0.0, 0.5)
CONTOURS = (0, 1, 2)
PROMPT_KINDS = ("box", "points", "boxes+points")
DRAWN, DRAWN_A_LOOK = 10, 3
RANKING_SIDE = 72
# what adapts to the volume, and what is faster, is preferred to what is barely better on a few patients
FIXED_COSTS, M2IB_COSTS = 0.01, 0.01


@dataclass(frozen=True)
class Tuned:
    """What was chosen for one target.

    Attributes:
        settings: fields of ``TextSegmentationSettings``.
        dsc: mean over the cases that hold the target, after the decoder.
        coarse_dsc: of the same settings' coarse mask, on a thinned grid.
        tried: best DSC of every way to ask and look.
        cases: how many decided.
    """

    settings: Settings
    dsc: float
    coarse_dsc: float
    tried: dict[str, float]
    cases: int


@dataclass
class _Looked:
    """One case, looked at in one way; ``thin`` has saliency, places and truth with fewer rows and columns."""

    run: PromptRun
    saliency: NDArray[np.float32]
    present: Presence
    truth: NDArray[np.bool_]
    thin: tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]
    drawn: dict[str, NDArray[np.bool_]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Candidate:
    look: Settings
    rule: Settings
    coarse_dsc: float

    @property
    def settings(self) -> Settings:
        return {**self.look, **self.rule}

    @property
    def handicap(self) -> float:
        return FIXED_COSTS * (self.rule["threshold"] == "fixed") + M2IB_COSTS * (self.look["bottleneck"] == "m2ib")


def tune(
    segmenter: TextSegmenter,
    cases: Sequence[Case],
    report: Callable[[str], None],
) -> dict[str, Tuned]:
    """Settings of every target.

    Args:
        segmenter: the lite preset with the new weights, its gate calibrated.
        cases: labelled validation patients.
        report: where lines of progress go.

    Returns:
        By the target's name; without validation cases a target keeps the preset's own settings.
    """
    chosen: dict[str, Tuned] = {}
    for meaning in targets():
        found = _tune_one(segmenter, meaning, [case for case in cases if case.modality == meaning.modality])
        if found is not None:
            chosen[meaning.name] = found
            report(f"{meaning.name}: DSC {found.dsc:.3f} (coarse {found.coarse_dsc:.3f}) with {found.settings}")
    return chosen


def _tune_one(segmenter: TextSegmenter, meaning: Meaning, cases: Sequence[Case]) -> Tuned | None:
    prepared = list(_prepared(segmenter, meaning, cases))
    if not prepared:
        return None
    candidates: list[_Candidate] = []
    looked: dict[str, list[_Looked]] = {}
    for contrast in (True, False):
        for look in ({**look, "contrast": contrast} for look in LOOKS):
            seen = [_look(segmenter, meaning, volume, truth, look) for volume, truth in prepared]
            looked[str(look)] = seen
            ranked = sorted((_coarse(seen, look, rule) for rule in _rules()), key=_rank)
            candidates += ranked[:DRAWN_A_LOOK]
    scored: list[tuple[float, _Candidate]] = []
    tried: dict[str, float] = {}
    for candidate in sorted(candidates, key=_rank)[:DRAWN]:
        seen = looked[str(candidate.look)]
        options = [candidate]
        score = _drawn(seen, candidate.settings)
        if not scored or score > max(s for s, _ in scored) - 0.05:
            kinds = ({**candidate.rule, "prompt_kind": kind} for kind in PROMPT_KINDS)
            options += [replace(candidate, rule=rule) for rule in kinds]
        for option in options:
            score = _drawn(seen, option.settings)
            scored.append((score, option))
            name = _name(option.look)
            tried[name] = max(score, tried.get(name, 0.0))
    score, best = max(scored, key=lambda pair: pair[0] - pair[1].handicap)
    return Tuned(best.settings, score, best.coarse_dsc, tried, len(prepared))


def _prepared(
    segmenter: TextSegmenter, meaning: Meaning, cases: Sequence[Case]
) -> Iterator[tuple[PreparedVolume, NDArray[np.bool_]]]:
    """Cases that hold the target, through the tower; the truth (S, h, w) as the slices are shown."""
    for case in cases:
        labelled = case.read()
        truth = labelled.truth(meaning.name)
        if truth.any():
            volume = segmenter.set_volume(labelled.volume)
            yield volume, np.array(volume.stack.displayed(truth))


def _look(
    segmenter: TextSegmenter, meaning: Meaning, volume: PreparedVolume, truth: NDArray[np.bool_], look: Settings
) -> _Looked:
    prompt = MatchedPrompt(meaning.name, meaning, 1.0)
    run = _run(segmenter, volume, prompt, look)
    text, nulls = run.texts()
    present = run.gate(text, nulls)
    saliency, _ = run.fuse(run.saliency(run.question(text), present), present)
    step = max(1, -(-max(truth.shape[1:]) // RANKING_SIDE))
    thin = (
        saliency[:, ::step, ::step].copy(),
        run.places(present)[:, ::step, ::step].copy(),
        truth[:, ::step, ::step].copy(),
    )
    return _Looked(run, saliency, present, truth, thin)


def _run(segmenter: TextSegmenter, volume: PreparedVolume, prompt: MatchedPrompt, settings: Settings) -> PromptRun:
    assert prompt.meaning is not None
    tuning = segmenter.tuning.get(prompt.meaning.name, Tuning())
    complete = segmenter.preset.complete(TextSegmentationSettings(**settings))
    return PromptRun(segmenter, volume, prompt, complete, tuning, None, None)


def _rules() -> list[Settings]:
    return [
        {**threshold, "confidence_threshold": confidence, "num_contours": contours}
        for threshold in THRESHOLDS
        for confidence in CONFIDENCES
        for contours in CONTOURS
    ]


def _rank(candidate: _Candidate) -> float:
    return candidate.handicap - candidate.coarse_dsc


def _coarse(seen: Sequence[_Looked], look: Settings, rule: Settings) -> _Candidate:
    scores = []
    for one in seen:
        saliency, places, truth = one.thin
        mask = coarse_mask(
            saliency,
            places,
            threshold=rule["threshold"],
            value=rule.get("threshold_value", 0.5),
            confidence_threshold=rule["confidence_threshold"],
            num_contours=rule["num_contours"],
        )
        scores.append(2 * int((mask & truth).sum()) / max(int(mask.sum()) + int(truth.sum()), 1))
    return _Candidate(look, rule, float(np.mean(scores)))


def _drawn(seen: Sequence[_Looked], settings: Settings) -> float:
    """Mean DSC after the decoder; what was drawn once is kept."""
    scores = []
    for one in seen:
        key = str(settings)
        if key not in one.drawn:
            run = _with(one, settings)
            coarse = run.coarse(one.saliency, one.present)
            one.drawn[key] = run.refine(coarse, run.visual_prompts(coarse, one.saliency))
        scores.append(dice(one.drawn[key], one.truth))
    return float(np.mean(scores))


def _with(one: _Looked, settings: Settings) -> PromptRun:
    return _run(one.run.owner, one.run.prepared, one.run.prompt, settings)


def _name(look: Settings) -> str:
    beta = f" beta {look['beta']}" if "beta" in look else ""
    return f"{look['bottleneck']}{beta}{' contrast' if look['contrast'] else ''}"
