"""Run the text-guided pipeline on labelled cases: one image-tower pass a slice, then every prompt, then the truth."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.clip.vocabulary import targets
from FreqSegLib.errors import Cancelled
from FreqSegLib.evaluation.cases import Case, LabelledVolume, wrong_prompts
from FreqSegLib.evaluation.segmentation_metrics import NSD_TOLERANCE, Overlap, dice, overlap
from FreqSegLib.sam.refine import refine_slice
from FreqSegLib.sam.visual_prompts import visual_prompts
from FreqSegLib.settings import TextSegmentationSettings
from FreqSegLib.slices import Frame, SliceStack
from FreqSegLib.text_segmentation import CancelCallback, PreparedVolume, Progress, PromptResult, TextSegmenter

WRONG_PROMPTS = 2


@dataclass(frozen=True)
class CaseRow:
    """One prompt on one case.

    Attributes:
        group: the case, like ``lgg/TCGA_CS_4941``.
        modality: of the case.
        prompt: what was asked for.
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
        progress: called before every case and with the pipeline's own progress.
        cancel: polled between slices.

    Returns:
        One row a case and prompt: targets of its modality, then wrong prompts.

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
        rows += [run.ask(m.name, True, box_ceiling) for m in wanted if m.modality == case.modality]
        rows += [run.ask(name, False, False) for name in wrong_prompts(number, case.modality, wrong)]
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

    def ask(self, prompt: str, belongs: bool, box_ceiling: bool) -> CaseRow:
        started = time.monotonic()
        result: PromptResult = self.segmenter.segment(
            [prompt], progress=self._progress, cancel=self.cancel, settings=self.settings
        )[0]
        seconds = time.monotonic() - started
        stack, volume = self.prepared.stack, self.labelled.volume
        truth = self.labelled.truth(prompt) if belongs else np.zeros(volume.shape, dtype=bool)
        in_slice, found_in_slice = _slices_with(stack, truth), _slices_with(stack, result.mask)
        compared, box_dsc = None, None
        if truth.any():
            compared = overlap(result.mask, truth, [float(s) for s in volume.spacing[::-1]], NSD_TOLERANCE)
            if box_ceiling and self.segmenter.refiner is not None:
                box_dsc = dice(self._from_boxes(truth), truth)
        return CaseRow(
            group=self.case.group,
            modality=self.case.modality,
            prompt=prompt,
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
