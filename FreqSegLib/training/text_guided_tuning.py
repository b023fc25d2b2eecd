"""What the trained method's outputs are turned into masks with, chosen on validation patients for each target."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.clip.prompts import MatchedPrompt
from FreqSegLib.clip.vocabulary import Meaning, targets
from FreqSegLib.evaluation.cases import Case
from FreqSegLib.evaluation.segmentation_metrics import dice
from FreqSegLib.presets import SMALLEST_PART, Tuning
from FreqSegLib.saliency.gate import Presence
from FreqSegLib.settings import TextSegmentationSettings
from FreqSegLib.text_segmentation import TextSegmenter
from FreqSegLib.text_stages import PreparedVolume
from FreqSegLib.text_trained import TrainedRun
from FreqSegLib.training.text_guided import Answer

Settings = dict[str, Any]

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
CONTOURS = (0, 1, 2)
PARTS = (SMALLEST_PART, 0.3, 1.0)
# mm, of volumes (slices 1 apart in the data): under 1 maps alone are evened out, from 1 on the next slice passes too
SMOOTHINGS = (0.0, 0.75, 1.0, 1.25)
# one box around all parts of a slice would have the decoder fill what lies between them
PROMPT_KINDS = ("boxes", "boxes+points")
# on few patients a plainer rule is preferred to one that is barely better
RULE_COSTS, DECODER_COSTS = 0.002, 0.005


@dataclass(frozen=True)
class GateChoice:
    """The presence gate of one target on validation slices.

    Attributes:
        slice_threshold, volume_threshold: of ``presets.Tuning``, on the model's own probability.
        kept: share of slices with the target that pass.
        absent_empty: share of slices of the same modality without it that do not; NaN where there are none.
        wrong_empty: the same for slices of other modalities.
        present, absent, wrong: how many slices each number rests on.
    """

    slice_threshold: float
    volume_threshold: float
    kept: float
    absent_empty: float
    wrong_empty: float
    present: int
    absent: int
    wrong: int


@dataclass(frozen=True)
class TrainedChoice:
    """What was chosen for one target: settings, the mean DSC with and without the decoder, over how many cases."""

    settings: Settings
    dsc: float
    coarse_dsc: float
    refined_dsc: float
    cases: int


def choose_gates(answers: Sequence[Answer]) -> dict[str, GateChoice]:
    """Thresholds of the presence probability, by Youden's index over slices and over patients.

    Args:
        answers: validation slices asked for every target.
    """
    found = {}
    for number, meaning in enumerate(targets()):
        asked = [a for a in answers if a.target == number]
        present = _probabilities([a for a in asked if a.there])
        absent = _probabilities([a for a in asked if a.belongs and not a.there])
        wrong = _probabilities([a for a in asked if not a.belongs])
        cut = _youden(present, np.concatenate([absent, wrong]), _weights(len(absent), len(wrong)))
        best_there = _best_of_each([a for a in asked if a.there])
        best_wrong = _best_of_each([a for a in asked if not a.belongs])
        volume = max(cut, _youden(best_there, best_wrong, np.ones(len(best_wrong))))
        found[meaning.name] = GateChoice(
            round(cut, 4),
            round(volume, 4),
            _share(present >= cut),
            _share(absent < cut),
            _share(wrong < cut),
            len(present),
            len(absent),
            len(wrong),
        )
    return found


def gate_tuning(gate: GateChoice, settings: Settings | None = None) -> Tuning:
    """As the pipeline takes it: the model's logit is its own evidence."""
    chosen = {"threshold": "fixed", "threshold_value": 0.5, "confidence_threshold": 0.0, "refine": False}
    return Tuning({**chosen, **(settings or {})}, 1.0, 0.0, gate.slice_threshold, gate.volume_threshold)


def choose_settings(
    segmenter: TextSegmenter, cases: Sequence[Case], report: Callable[[str], None]
) -> dict[str, TrainedChoice]:
    """Threshold, parts kept, and whether the decoder redraws the mask, through the whole pipeline.

    Args:
        segmenter: with the trained method, its gates tuned.
        cases: labelled validation patients.
        report: where lines of progress go.
    """
    found = {}
    for meaning in targets():
        seen = list(_drawn(segmenter, meaning, [case for case in cases if case.modality == meaning.modality]))
        if not seen:
            continue
        scored = []
        for settings in _rules(volumes=any(one.volume.stack.count > 1 for one in seen)):
            costs = rule_cost(*(settings[name] for name in ("num_contours", "smallest_part", "slice_smoothing")))
            scored.append((float(np.mean([one.coarse(settings) for one in seen])), costs, settings))
        coarse_dsc, _, rule = max(scored, key=lambda entry: entry[0] - entry[1])
        refined = [
            (float(np.mean([one.refined(settings) for one in seen])), settings)
            for settings in ({**rule, "refine": True, "prompt_kind": kind} for kind in PROMPT_KINDS)
        ]
        refined_dsc, with_decoder = max(refined, key=lambda entry: entry[0])
        better = refined_dsc - DECODER_COSTS > coarse_dsc
        settings = with_decoder if better else {**rule, "refine": False}
        dsc = refined_dsc if better else coarse_dsc
        found[meaning.name] = TrainedChoice(settings, dsc, coarse_dsc, refined_dsc, len(seen))
        report(f"{meaning.name}: DSC {coarse_dsc:.3f}, redrawn by the decoder {refined_dsc:.3f}; {settings}")
    return found


def rule_cost(num_contours: int, smallest_part: float, slice_smoothing: float) -> float:
    """The DSC that a rule has to gain over keeping every slice and part as it is drawn."""
    changes = (num_contours != 0, smallest_part != SMALLEST_PART, slice_smoothing != 0)
    return RULE_COSTS * sum(changes)


@dataclass
class _Drawn:
    """One case and what the model said of it, by ``slice_smoothing``; the truth is (S, h, w), slices as shown."""

    segmenter: TextSegmenter
    volume: PreparedVolume
    prompt: MatchedPrompt
    said: dict[float, tuple[NDArray[np.float32], Presence]]
    truth: NDArray[np.bool_]

    def coarse(self, settings: Settings) -> float:
        return dice(self._run(settings).coarse(*self.said[settings["slice_smoothing"]]), self.truth)

    def refined(self, settings: Settings) -> float:
        run = self._run(settings)
        probability, present = self.said[settings["slice_smoothing"]]
        coarse = run.coarse(probability, present)
        return dice(run.refine(coarse, run.visual_prompts(coarse, probability)), self.truth)

    def _run(self, settings: Settings) -> TrainedRun:
        return trained_run(self.segmenter, self.volume, self.prompt, settings)


def trained_run(
    segmenter: TextSegmenter, volume: PreparedVolume, prompt: MatchedPrompt, settings: Settings
) -> TrainedRun:
    """The trained stages with given settings."""
    assert segmenter.trained is not None
    assert prompt.meaning is not None
    tuning = segmenter.trained.tuning.get(prompt.meaning.name, Tuning())
    chosen = segmenter.preset.complete(TextSegmentationSettings(**settings), tuning)
    return TrainedRun(segmenter, volume, prompt, chosen, tuning, None, None)


def _drawn(segmenter: TextSegmenter, meaning: Meaning, cases: Sequence[Case]) -> Iterator[_Drawn]:
    for case in cases:
        labelled = case.read()
        truth = labelled.truth(meaning.name)
        if truth.any():
            volume = segmenter.set_volume(labelled.volume)
            prompt = MatchedPrompt(meaning.name, meaning, 1.0)
            said = {}
            for smoothing in SMOOTHINGS:
                run = trained_run(segmenter, volume, prompt, {"slice_smoothing": smoothing})
                text, nulls = run.texts()
                present = run.gate(text, nulls)
                said[smoothing] = (run.fuse(run.saliency(text, present), present)[0], present)
            yield _Drawn(segmenter, volume, prompt, said, np.array(volume.stack.displayed(truth)))


def _rules(*, volumes: bool) -> list[Settings]:
    return [
        {
            "threshold": "fixed",
            "threshold_value": value,
            "confidence_threshold": 0.0,
            "num_contours": contours,
            "smallest_part": part,
            "slice_smoothing": smoothing,
        }
        for smoothing in (SMOOTHINGS if volumes else SMOOTHINGS[:1])
        for value in THRESHOLDS
        for contours in CONTOURS
        for part in PARTS
    ]


def _probabilities(answers: Sequence[Answer]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-np.array([a.presence for a in answers], dtype=np.float64)))


def _best_of_each(answers: Sequence[Answer]) -> NDArray[np.float64]:
    groups = dict.fromkeys(a.group for a in answers)
    return np.array([_probabilities([a for a in answers if a.group == g]).max() for g in groups], dtype=np.float64)


def _weights(absent: int, wrong: int) -> NDArray[np.float64]:
    """Absence in the right modality counts as much as the wrong modality, however many slices of each there are."""
    return np.concatenate([np.full(absent, 1 / max(absent, 1)), np.full(wrong, 1 / max(wrong, 1))])


def _youden(positive: NDArray[np.float64], negative: NDArray[np.float64], weight: NDArray[np.float64]) -> float:
    """The middle of the best cuts between both; one half where one side is missing."""
    if not len(positive) or not len(negative):
        return 0.5
    values = np.unique(np.concatenate([positive, negative, [0.0, 1.0]]))
    cuts = (values[:-1] + values[1:]) / 2
    weight = weight / weight.sum()
    gain = np.array([(positive >= cut).mean() + weight[negative < cut].sum() for cut in cuts])
    best = cuts[gain >= gain.max() - 1e-9]
    return float(best[np.abs(best - 0.5).argmin()])


def _share(passed: NDArray[np.bool_]) -> float:
    return float(passed.mean()) if len(passed) else float("nan")
