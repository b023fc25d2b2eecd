"""Run the text-guided pipeline on labelled cases: one image-tower pass a slice, then every prompt, then the truth."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.clip.vocabulary import Meaning, targets
from FreqSegLib.errors import Cancelled, VocabularyError
from FreqSegLib.evaluation.calibration import CaseCalibration, case_calibration
from FreqSegLib.evaluation.cases import Case, LabelledVolume, target_meaning, wrong_prompts
from FreqSegLib.evaluation.segmentation_metrics import NSD_TOLERANCE, Overlap, dice, overlap
from FreqSegLib.evaluation.wordings import WordingKind, wording
from FreqSegLib.sam.refine import refine_slice
from FreqSegLib.sam.visual_prompts import visual_prompts
from FreqSegLib.settings import TextSegmentationSettings
from FreqSegLib.slices import Frame, SliceStack
from FreqSegLib.text_segmentation import CancelCallback, PreparedVolume, Progress, PromptResult, TextSegmenter

WRONG_PROMPTS = 2
TRAINED, REFUSED = "trained", "refused"


@dataclass(frozen=True, eq=False)
class CaseView:
    """The slice of a case with most of the target, or with most of what was drawn where the target is absent.

    Attributes:
        title: which slice; empty for an image.
        image: (h, w) uint8 grey levels.
        truth, prediction: (h, w).
        aspect: height of a pixel over its width.
    """

    title: str
    image: NDArray[np.uint8]
    truth: NDArray[np.bool_]
    prediction: NDArray[np.bool_]
    aspect: float


@dataclass(frozen=True)
class CaseRow:
    """One prompt on one case.

    Attributes:
        group: the case, like ``lgg/TCGA_CS_4941``.
        modality: of the case.
        prompt: what was asked for, by its canonical name.
        belongs: whether the prompt is a target of this modality; a wrong prompt ("lungs" on a brain MR) has no truth.
        unit: of ``hd95`` and of NSD's tolerance, ``mm`` or ``px``.
        slices, target_slices: along the stack, and how many of them hold the target.
        overlap: against the truth; None where the target is absent.
        absent_empty: slices without the target that came out empty, of ``slices - target_slices``.
        empty: the whole mask is empty.
        box_dsc: DSC of the decoder given the truth's own boxes, one a component and slice; None where there are none.
        score: the pipeline's probability that the target is in the volume.
        tower_slices, tower_seconds: of this case, slices that went through the image tower (0 if the cache had all).
        prompt_seconds: time of this prompt.
        slice_scores: the pipeline's probability of each slice, along the stack.
        slice_truth: whether the slice holds the target.
        wordings, asked: which kind of wordings, and the words.
        method: that drew the coarse mask; "refused" where the preset did not understand the words.
        misread: the words were taken for another target.
        drawn: share of the voxels in the mask.
        calibration: of the uncertainty, where it was asked for.
        view: for pictures, where they were asked for.
    """

    group: str
    modality: str
    prompt: str
    belongs: bool
    unit: str
    slices: int
    target_slices: int
    overlap: Overlap | None
    absent_empty: int
    empty: bool
    box_dsc: float | None
    score: float
    tower_slices: int
    tower_seconds: float
    prompt_seconds: float
    slice_scores: tuple[float, ...]
    slice_truth: tuple[bool, ...]
    wordings: str = "canonical"
    asked: str = ""
    method: str = "zero-shot"
    misread: bool = False
    drawn: float = 0.0
    calibration: CaseCalibration | None = None
    view: CaseView | None = None

    @property
    def refused(self) -> bool:
        """The preset did not understand the words; a user would be told so and get no mask."""
        return self.method == REFUSED

    @property
    def absent_slices(self) -> int:
        return self.slices - self.target_slices

    @property
    def missed(self) -> bool:
        """The target is there and nothing was found."""
        return self.belongs and self.target_slices > 0 and self.empty


@dataclass(frozen=True)
class EvaluationProgress:
    """``done`` of ``total`` cases; ``stage`` says what is done on the one at hand; seconds left, None if unknown."""

    stage: str
    done: int
    total: int
    seconds_left: float | None


def evaluate_cases(
    segmenter: TextSegmenter,
    cases: Sequence[Case],
    prompts: Sequence[str] | None = None,
    settings: TextSegmentationSettings | None = None,
    *,
    wrong: int = WRONG_PROMPTS,
    box_ceiling: bool = True,
    wordings: Sequence[WordingKind] = ("canonical",),
    uncertainty: bool = False,
    views: bool = False,
    progress: Callable[[EvaluationProgress], None] | None = None,
    cancel: CancelCallback | None = None,
) -> list[CaseRow]:
    """Set each case once, then ask for its targets and for what cannot be there.

    A stopped run loses no image-tower pass: embeddings stay in the segmenter's cache, so the next run goes on quickly.

    Args:
        segmenter: the pipeline.
        cases: see :func:`FreqSegLib.evaluation.cases.list_cases`.
        prompts: names of targets; each case is asked for those of its modality. All of them if left out.
        settings: in place of the segmenter's.
        wrong: targets of other modalities each case is asked for.
        box_ceiling: also decode the truth's own boxes.
        wordings: kinds of wordings, one after the other on every case; box ceilings, uncertainty and views are of the
            first only.
        uncertainty: ask for each target once more with uncertainty, and compare it with the errors of that answer. The
            rows' own numbers are of the plain answer.
        views: keep a slice of every answer for pictures.
        progress: called before every case and with the pipeline's own progress.
        cancel: polled between slices.

    Returns:
        One row a case, kind of wordings and prompt: targets of its modality, then wrong prompts.

    Raises:
        InputError: a case cannot be read.
        Cancelled: ``cancel`` answered True.
    """
    rows: list[CaseRow] = []
    started = time.monotonic()
    wanted = [m for m in targets() if prompts is None or m.name in prompts]
    for number, case in enumerate(cases):
        left = (time.monotonic() - started) / number * (len(cases) - number) if number else None

        def tell(stage: str, done: int = number, left: float | None = left, case: Case = case) -> None:
            if progress is not None:
                progress(EvaluationProgress(f"{case.group}: {stage}", done, len(cases), left))

        tell("reading")
        if cancel is not None and cancel():
            raise Cancelled("The evaluation was cancelled; nothing was written. Embeddings made so far are kept.")
        run = _CaseRun(segmenter, case, settings, tell, cancel)
        own = [m for m in wanted if m.modality == case.modality]
        others = [target_meaning(name) for name in wrong_prompts(number, case.modality, wrong)]
        for kind in wordings:
            first = kind == wordings[0]
            for meaning in (*own, *others):
                belongs = meaning in own
                rows.append(
                    run.ask(
                        meaning,
                        wording(meaning, kind, number),
                        kind,
                        belongs=belongs,
                        box_ceiling=box_ceiling and belongs and first,
                        uncertainty=uncertainty and belongs and first,
                        view=views and first,
                    )
                )
    return rows


class _CaseRun:
    """One case, its slices through the image tower."""

    def __init__(
        self,
        segmenter: TextSegmenter,
        case: Case,
        settings: TextSegmentationSettings | None,
        tell: Callable[[str], None],
        cancel: CancelCallback | None,
    ) -> None:
        self.segmenter, self.case, self.settings, self.tell, self.cancel = segmenter, case, settings, tell, cancel
        self.labelled: LabelledVolume = case.read()
        self.tower_slices = 0
        started = time.monotonic()
        self.prepared: PreparedVolume = segmenter.set_volume(
            self.labelled.volume, progress=self._tower_progress, cancel=cancel, settings=settings
        )
        self.tower_seconds = time.monotonic() - started

    def ask(
        self,
        meaning: Meaning,
        words: str,
        kind: WordingKind,
        *,
        belongs: bool,
        box_ceiling: bool,
        uncertainty: bool,
        view: bool,
    ) -> CaseRow:
        started = time.monotonic()
        try:
            result = self._answer(words, self.settings)
        except VocabularyError:
            result = self._nothing(words)
        seconds = time.monotonic() - started
        stack, volume = self.prepared.stack, self.labelled.volume
        truth = self.labelled.truth(meaning.name) if belongs else np.zeros(volume.shape, dtype=bool)
        in_slice, found_in_slice = _slices_with(stack, truth), _slices_with(stack, result.mask)
        compared, box_dsc = None, None
        if truth.any():
            compared = overlap(result.mask, truth, [float(s) for s in volume.spacing[::-1]], NSD_TOLERANCE)
            if box_ceiling and self.segmenter.refiner is not None:
                box_dsc = dice(self._from_boxes(truth), truth)
        return CaseRow(
            group=self.case.group,
            modality=self.case.modality,
            prompt=meaning.name,
            belongs=belongs,
            unit=self.case.unit,
            slices=stack.count,
            target_slices=int(in_slice.sum()),
            overlap=compared,
            absent_empty=int((~in_slice & ~found_in_slice).sum()),
            empty=result.is_empty,
            box_dsc=box_dsc,
            score=float(result.score),
            tower_slices=self.tower_slices,
            tower_seconds=self.tower_seconds,
            prompt_seconds=seconds,
            slice_scores=tuple(float(score) for score in result.slice_scores),
            slice_truth=tuple(bool(present) for present in in_slice),
            wordings=kind,
            asked=words,
            method=result.method,
            misread=result.method != REFUSED and result.meaning not in (None, meaning.name),
            drawn=float(result.mask.mean()),
            calibration=self._calibration(words, truth) if uncertainty and result.method != REFUSED else None,
            view=self._view(truth, result.mask) if view and (truth.any() or not result.is_empty) else None,
        )

    def _answer(self, words: str, settings: TextSegmentationSettings | None) -> PromptResult:
        return self.segmenter.segment([words], progress=self._progress, cancel=self.cancel, settings=settings)[0]

    def _nothing(self, words: str) -> PromptResult:
        """What a user gets for words that the preset refuses."""
        shape, count = self.labelled.volume.shape, self.prepared.stack.count
        empty, scores = np.zeros(shape, dtype=np.bool_), np.zeros(count, dtype=np.float32)
        return PromptResult(words, empty, empty.astype(np.float32), None, 0.0, scores, (0, 0, 0), None, method=REFUSED)

    def _calibration(self, words: str, truth: NDArray[np.bool_]) -> CaseCalibration:
        """Of an answer of its own: the mean over several views draws another mask than one view does."""
        settings = replace(self.settings or self.segmenter.settings, uncertainty=True)
        result, stack = self._answer(words, settings), self.prepared.stack
        assert result.uncertainty is not None
        return case_calibration(
            result.method,
            np.array(stack.displayed(result.mask)),
            np.array(stack.displayed(truth)),
            np.array(stack.displayed(result.uncertainty)),
            np.array(stack.displayed(result.saliency)) if result.method == TRAINED else None,
        )

    def _view(self, truth: NDArray[np.bool_], mask: NDArray[np.bool_]) -> CaseView:
        stack = self.prepared.stack
        shown, drawn = stack.displayed(truth), stack.displayed(mask)
        index = int((shown if truth.any() else drawn).sum((1, 2)).argmax())
        return CaseView(
            "" if stack.count == 1 else f"{stack.axis} slice {index + 1} of {stack.count}",
            np.rint(255 * self.prepared.image(index)).astype(np.uint8),
            np.array(shown[index]),
            np.array(drawn[index]),
            stack.pixel_spacing[0] / stack.pixel_spacing[1],
        )

    def _from_boxes(self, truth: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """What the decoder draws when it is given the truth's own boxes: the most the boxes' way can reach."""
        model, stack = self.segmenter.refiner, self.prepared.stack
        assert model is not None
        self.tell("truth's boxes")
        frame = Frame.fit(stack.slice_shape, stack.pixel_spacing, model.image_size, model.frame_mode)
        mask = stack.empty(np.bool_)
        shown = stack.displayed(truth)
        for index in np.flatnonzero(_slices_with(stack, truth)):
            if self.cancel is not None and self.cancel():
                raise Cancelled("The evaluation was cancelled; nothing was written. Embeddings made so far are kept.")
            boxes = visual_prompts(shown[index], shown[index].astype(np.float32), "boxes")
            embedding = self.segmenter.embedding(self.prepared, int(index))
            stack.put(mask, int(index), refine_slice(model, embedding, frame, boxes).mask)
        return mask

    def _tower_progress(self, progress: Progress) -> None:
        self.tower_slices = max(self.tower_slices, progress.done)
        self._progress(progress)

    def _progress(self, progress: Progress) -> None:
        self.tell(f"{progress.stage}, {progress.done} of {progress.total}")


def _slices_with(stack: SliceStack, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which slices of the stack a (k, j, i) mask reaches, (S)."""
    return np.asarray(stack.displayed(mask).any((1, 2)), dtype=np.bool_)
