"""``freqseg evaluate`` on small made cases whose every number is known, with a pipeline that answers as it is told."""

from __future__ import annotations

import base64
import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from FreqSegLib.cli_app import Session
from FreqSegLib.cli_evaluate import evaluate
from FreqSegLib.clip.vocabulary import meaning, targets
from FreqSegLib.errors import Cancelled, InputError, OutputError, SettingsError, VocabularyError
from FreqSegLib.evaluation.calibration import SPREAD
from FreqSegLib.evaluation.cases import (
    Case,
    chosen_cases,
    evenly_spaced,
    list_cases,
    target_meaning,
    thinned,
    wrong_prompts,
)
from FreqSegLib.evaluation.evaluate import CaseRow, CaseView, EvaluationProgress, evaluate_cases
from FreqSegLib.evaluation.report import calibrations, markdown, summaries, target_block, wording_block
from FreqSegLib.evaluation.report_csv import case_csv, summary_csv, wording_csv
from FreqSegLib.evaluation.run_facts import not_measured
from FreqSegLib.evaluation.segmentation_metrics import Overlap, diagonal
from FreqSegLib.evaluation.segmentation_report import cases_figure, strip_figure, telling_cases
from FreqSegLib.evaluation.wordings import wording, wording_differences
from FreqSegLib.intensity import normalise
from FreqSegLib.presets import PRESETS, Tuning
from FreqSegLib.sam.promptable import Decoded
from FreqSegLib.settings import TextSegmentationSettings
from FreqSegLib.slices import Frame, SliceStack
from FreqSegLib.text_segmentation import PreparedVolume, Progress, PromptResult, Segmentation, TextSegmenter
from FreqSegLib.training import lite_data
from FreqSegLib.volume import Volume

UNIT_AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])


class BoxDrawer:
    """A decoder that fills the boxes it is given."""

    name, image_size, embedding_shape = "box drawer", 64, (1, 1, 1)
    frame_mode = "pad"

    def decode(self, embedding: torch.Tensor, *, boxes: torch.Tensor, multimask: bool = False) -> Decoded:
        y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
        x0, y0, x1, y1 = (boxes[:, i, None, None] for i in range(4))
        inside = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
        return Decoded(torch.where(inside, 5.0, -5.0)[:, None], torch.ones(len(boxes), 1))


class Scripted:
    """Answers every prompt with the mask ``answers`` holds for it on volumes of that name, or with nothing.

    Asked with uncertainty, it is uncertain exactly where ``doubts`` says.
    """

    preset, device, trained = PRESETS["lite"], torch.device("cpu"), None

    def __init__(
        self,
        answers: dict[tuple[str, str], np.ndarray] | None = None,
        refiner: BoxDrawer | None = None,
        *,
        doubts: dict[tuple[str, str], np.ndarray] | None = None,
        refuses: Sequence[str] = (),
        method: str = "zero-shot",
    ) -> None:
        self.answers, self.refiner, self.doubts, self.refuses = answers or {}, refiner, doubts or {}, refuses
        self.settings, self.tuning, self.method = TextSegmentationSettings(), {"*": Tuning()}, method
        self.calls: list[str] = []

    def set_volume(self, volume: Volume, *, progress=None, cancel=None, settings=None) -> PreparedVolume:
        self.calls.append(f"set {volume.name}")
        stack = SliceStack.of(volume)
        for done in range(stack.count + 1):
            if cancel is not None and cancel():
                raise Cancelled("stopped")
            if progress is not None:
                progress(Progress("Reading slices", done, stack.count, None))
        frame = Frame.fit(stack.slice_shape, stack.pixel_spacing, 64)
        self.prepared = PreparedVolume(volume, stack, normalise(volume, "auto"), frame, "key", ("raw",))
        return self.prepared

    def segment(self, prompts: Sequence[str], *, progress=None, cancel=None, settings=None) -> Segmentation:
        volume, unsure = self.prepared.volume, settings is not None and settings.uncertainty
        self.calls += [f"{'doubt' if unsure else 'ask'} {prompt}" for prompt in prompts]
        results = []
        for prompt in prompts:
            if prompt in self.refuses:
                raise VocabularyError(f"'{prompt}' is not known")
            mask = self.answers.get((volume.name, prompt), np.zeros(volume.shape, dtype=bool))
            doubt = (
                self.doubts.get((volume.name, prompt), np.zeros(volume.shape)).astype(np.float32) if unsure else None
            )
            scores = np.full(volume.shape[0], 0.25, dtype=np.float32)
            known = [m.name for m in targets() if prompt in (*m.wordings, *m.held_out)]
            meant = known[0] if known else None
            map_ = mask.astype(np.float32)
            results.append(PromptResult(prompt, mask, map_, doubt, 0.25, scores, (1, 0, 0), meant, method=self.method))
        return Segmentation(tuple(results), (), settings)

    def embedding(self, prepared: PreparedVolume, index: int) -> torch.Tensor:
        return torch.zeros(1, 1, 1, 1)


def block(shape: tuple[int, int, int], k: slice, j: slice, i: slice) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[k, j, i] = True
    return mask


def save(path: Path, array: np.ndarray, spacing: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = path.suffix == ".png"
    affine = np.eye(4) if flat else np.diag([spacing, spacing, spacing, 1.0]) @ UNIT_AFFINE
    Volume(array.astype(np.uint8), affine, spatial_dimension=2 if flat else 3).write(path)


def picture(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 200, shape).astype(np.uint8)


def name_of(path: Path) -> str:
    """What the library calls a volume read from that file."""
    return Volume.read(path).name


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with a few cases of every set, in the README's layout."""
    root = tmp_path / "data" / "segmentation"
    shape = (4, 20, 20)
    tumour = block(shape, slice(1, 3), slice(5, 15), slice(5, 15))
    for split, names in (("test", ("TCGA_CS_0001", "TCGA_CS_0002")), ("train", [f"TCGA_TT_{n:04}" for n in range(12)])):
        for number, name in enumerate(names):
            save(root / f"lgg_flair/{split}/{name}_flair.nii.gz", picture(shape, number))
            save(root / f"lgg_flair/{split}/{name}_mask.nii.gz", tumour)
    for split, count in (("test", 3), ("train", 12)):
        for number in range(count):
            lesion = (
                block((1, 24, 24), slice(None), slice(4, 12), slice(6, 14)) if number != 1 else np.zeros((1, 24, 24))
            )
            save(root / f"busi/{split}/images/case_{number:03}.png", picture((1, 24, 24), number))
            save(root / f"busi/{split}/masks/case_{number:03}.png", lesion * 255)
            lungs = np.zeros((1, 24, 24))
            lungs[0, 4:20, 2:10] = lungs[0, 4:20, 14:22] = 255
            save(root / f"cxr_lungs/{split}/images/xray_{number:03}.png", picture((1, 24, 24), number))
            save(root / f"cxr_lungs/{split}/masks/xray_{number:03}.png", lungs)
            labels = np.zeros((6, 12, 12))
            labels[1:4, 3:6, 3:9], labels[3:5, 6:9, 3:9] = 1, 2
            save(root / f"hippocampus/{split}/images/hippocampus_{number:03}.nii.gz", picture((6, 12, 12), number), 2.0)
            save(root / f"hippocampus/{split}/labels/hippocampus_{number:03}.nii.gz", labels, 2.0)
    return tmp_path / "data"


@pytest.fixture
def glioma(data: Path) -> list[Case]:
    return list_cases(data, modalities=["flair"])


def test_the_test_folders_hold_every_case_once(data: Path) -> None:
    cases = list_cases(data)
    assert [case.group for case in cases if case.modality == "flair"] == ["lgg/TCGA_CS_0001", "lgg/TCGA_CS_0002"]
    assert Counter(case.modality for case in cases) == {"flair": 2, "xray": 3, "ultrasound": 3, "t1": 3}
    assert {case.modality: case.unit for case in cases} == {"flair": "px", "xray": "px", "ultrasound": "px", "t1": "mm"}
    assert all(case.image.exists() and case.mask.exists() and case.image != case.mask for case in cases)


def test_validation_patients_are_those_the_aligner_is_not_trained_on(data: Path) -> None:
    planned = lite_data.plan(data_with_harvard(data))
    kept = {item.group for item in planned if item.split == "validation" and item.mask}
    trained = {item.group for item in planned if item.split == "train"}
    found = {case.group for case in list_cases(data, "train-validation")}
    assert kept
    assert found == kept
    assert not found & trained


def data_with_harvard(data: Path) -> Path:
    for folder in ("CT", "MRI"):
        (data / "fusion/harvard_ct_mri" / folder).mkdir(parents=True)
    return data


def test_a_folder_without_cases_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"'{tmp_path}' holds no labelled images"):
        list_cases(tmp_path)


def test_an_unknown_split_or_target_is_named(data: Path) -> None:
    with pytest.raises(SettingsError, match="test, train-validation, got 'validation'"):
        list_cases(data, "validation")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=r"no labelled target 'liver'.*brain tumour"):
        target_meaning("liver")


def test_fewer_cases_are_spread_evenly_and_always_the_same(data: Path) -> None:
    assert evenly_spaced(list(range(33)), 5) == [0, 8, 16, 24, 32]
    assert evenly_spaced(list(range(4)), None) == [0, 1, 2, 3]
    assert evenly_spaced(list(range(3)), 9) == [0, 1, 2]
    assert evenly_spaced([5, 6, 7], 1) == [6]
    chosen = chosen_cases(list_cases(data), 2)
    assert [case.group for case in chosen] == [
        "lgg/TCGA_CS_0001",
        "lgg/TCGA_CS_0002",
        "cxr/xray_000",
        "cxr/xray_002",
        "busi/case_000",
        "busi/case_002",
        "hippocampus/hippocampus_000",
        "hippocampus/hippocampus_002",
    ]


def test_wrong_prompts_are_two_known_targets_of_two_other_modalities() -> None:
    for modality in ("flair", "xray", "ultrasound", "t1"):
        asked = [wrong_prompts(number, modality) for number in range(30)]
        for pair in asked:
            modalities = [meaning(name).modality for name in pair]
            assert len(set(modalities)) == 2
            assert modality not in modalities
        everything_else = {m.name for m in targets() if m.modality != modality}
        assert {name for pair in asked for name in pair} == everything_else


def test_the_left_lung_is_on_the_right_of_the_picture(data: Path) -> None:
    case = list_cases(data, modalities=["xray"])[0].read()
    left, right, both = (case.truth(name) for name in ("left lung", "right lung", "lungs"))
    assert np.array_equal(left, block((1, 24, 24), slice(None), slice(4, 20), slice(14, 22)))
    assert np.array_equal(right, block((1, 24, 24), slice(None), slice(4, 20), slice(2, 10)))
    assert np.array_equal(both, left | right)


def test_parts_of_the_hippocampus_are_its_labels(data: Path) -> None:
    case = list_cases(data, modalities=["t1"])[0].read()
    assert case.truth("anterior hippocampus").sum() == 3 * 3 * 6
    assert case.truth("posterior hippocampus").sum() == 2 * 3 * 6
    assert case.truth("hippocampus").sum() == 3 * 3 * 6 + 2 * 3 * 6


def test_image_and_mask_must_share_a_grid(data: Path, glioma: list[Case]) -> None:
    save(glioma[0].mask.with_name("other.nii.gz"), np.ones((4, 20, 21)))
    broken = Case("lgg/x", glioma[0].image, glioma[0].mask.with_name("other.nii.gz"), "flair", "px")
    with pytest.raises(InputError, match=r"\(4, 20, 21\).*\(4, 20, 20\)"):
        broken.read()


@pytest.mark.parametrize(("count", "most", "expected"), [(10, 4, [0, 3, 6, 9]), (12, 4, [1, 4, 7, 10]), (4, 4, None)])
def test_a_thinned_volume_keeps_every_slice_in_its_place(count: int, most: int, expected: list[int] | None) -> None:
    array = np.arange(count, dtype=np.uint8)[:, None, None] * np.ones((1, 6, 5), dtype=np.uint8)
    affine = np.array([[0.5, 0, 0, 3], [0, -0.6, 0.2, 4], [0, 0.1, 0.9, 5], [0, 0, 0, 1]])
    volume = Volume(array, affine)
    found = thinned(volume, most)
    kept = found.array[:, 0, 0].tolist()
    assert kept == (expected or list(range(count)))
    for position, original in enumerate(kept):
        place = np.array([2.0, 3.0, position, 1])
        assert found.affine @ place == pytest.approx(volume.affine @ [2.0, 3.0, original, 1])
    assert SliceStack.of(found).axis == SliceStack.of(volume).axis


def test_a_case_is_set_once_and_asked_for_its_targets_then_for_others(data: Path) -> None:
    cases = list_cases(data, modalities=["t1", "flair"])
    segmenter = Scripted()
    rows = evaluate_cases(segmenter, cases[:3])
    done = " ".join(call.split()[0] for call in segmenter.calls)
    assert done == "set ask ask ask set ask ask ask set ask ask ask ask ask"
    assert rows[0].prompt == "brain tumour"
    own = [row.prompt for row in rows if row.group == "hippocampus/hippocampus_000" and row.belongs]
    assert own == ["hippocampus", "anterior hippocampus", "posterior hippocampus"]
    assert all(meaning(row.prompt).modality != row.modality for row in rows if not row.belongs)


def test_only_the_targets_asked_for_are_evaluated(data: Path) -> None:
    rows = evaluate_cases(Scripted(), list_cases(data, modalities=["xray"]), ["left lung"], wrong=0)
    assert [row.prompt for row in rows] == ["left lung"] * 3


def test_a_row_holds_hand_worked_numbers(glioma: list[Case]) -> None:
    truth = block((4, 20, 20), slice(1, 3), slice(5, 15), slice(5, 15))
    # the tumour's two slices, the first one only to half, and a false slice at the end
    found = block((4, 20, 20), slice(1, 2), slice(5, 10), slice(5, 15)) | block(
        (4, 20, 20), slice(2, 4), slice(5, 15), slice(5, 15)
    )
    segmenter = Scripted({(name_of(glioma[0].image), "brain tumour"): found})
    row = evaluate_cases(segmenter, glioma[:1], wrong=0)[0]
    assert row.overlap.dsc == pytest.approx(2 * 150 / (250 + truth.sum()))
    assert (row.slices, row.target_slices, row.absent_slices, row.absent_empty) == (4, 2, 2, 1)
    assert row.slice_truth == (False, True, True, False)
    assert row.slice_scores == (0.25,) * 4
    assert (row.empty, row.missed, row.tower_slices, row.unit) == (False, False, 4, "px")


def test_distances_of_the_hippocampus_are_in_millimetres(data: Path) -> None:
    cases = list_cases(data, modalities=["t1"])[:1]
    truth = cases[0].read().truth("posterior hippocampus")
    # one voxel of 2 mm further along a row: every boundary moves by at most 2 mm
    shifted = np.roll(truth, 1, axis=2)
    segmenter = Scripted({(name_of(cases[0].image), "posterior hippocampus"): shifted})
    row = evaluate_cases(segmenter, cases, ["posterior hippocampus"], wrong=0)[0]
    assert row.overlap.hd95 == pytest.approx(2)
    assert row.overlap.nsd == 1
    assert row.unit == "mm"


def test_an_empty_answer_where_the_target_is_counts_as_missed(glioma: list[Case]) -> None:
    row = evaluate_cases(Scripted(), glioma[:1], wrong=0)[0]
    assert row.missed
    assert (row.overlap.dsc, row.overlap.nsd) == (0, 0)
    assert row.overlap.hd95 == pytest.approx(diagonal((4, 20, 20), (1, 1, 1)))
    assert row.absent_empty == 2


def test_a_case_without_the_target_enters_no_average(data: Path) -> None:
    cases = list_cases(data, modalities=["ultrasound"])
    row = evaluate_cases(Scripted(), cases[1:2], wrong=0)[0]
    assert row.overlap is None
    assert not row.missed
    assert (row.absent_slices, row.absent_empty) == (1, 1)


def test_the_box_ceiling_decodes_the_truths_own_boxes(glioma: list[Case], data: Path) -> None:
    # boxes around rectangles, filled, are the rectangles, up to the frame's resampling of 20 to 64 pixels
    row = evaluate_cases(Scripted(refiner=BoxDrawer()), glioma[:1], wrong=0)[0]
    assert row.box_dsc > 0.97
    lungs = list_cases(data, modalities=["xray"])[:1]
    both = evaluate_cases(Scripted(refiner=BoxDrawer()), lungs, ["lungs"], wrong=1)
    # one box a lung: a single box around both would fill the space between them and reach 2 * 256 / (256 + 320)
    assert both[0].box_dsc > 0.93
    assert both[1].box_dsc is None
    assert evaluate_cases(Scripted(refiner=BoxDrawer()), glioma[:1], wrong=0, box_ceiling=False)[0].box_dsc is None
    assert evaluate_cases(Scripted(refiner=None), glioma[:1], wrong=0)[0].box_dsc is None


def test_a_stopped_run_says_so(glioma: list[Case]) -> None:
    told: list[EvaluationProgress] = []
    segmenter = Scripted()
    with pytest.raises(Cancelled):
        evaluate_cases(segmenter, glioma, progress=told.append, cancel=lambda: len(told) > 8)
    assert told[0].done == 0
    assert told[0].total == 2
    assert "TCGA_CS_0001" in told[0].stage
    assert "set" in segmenter.calls[0]


def test_the_table_adds_up(data: Path) -> None:
    cases = list_cases(data, modalities=["flair", "ultrasound"])
    truth = block((4, 20, 20), slice(1, 3), slice(5, 15), slice(5, 15))
    half = block((4, 20, 20), slice(1, 2), slice(5, 15), slice(5, 15))
    answers = {
        (name_of(cases[0].image), "brain tumour"): truth,
        (name_of(cases[1].image), "brain tumour"): half,
        (name_of(cases[0].image), wrong_prompts(0, "flair")[1]): half,
    }
    rows = evaluate_cases(Scripted(answers), cases)
    found = {row.target: row for row in summaries(rows, {"flair": 7, "ultrasound": 3})}
    assert list(found) == ["brain tumour", "breast lesion"]
    tumour = found["brain tumour"]
    assert (tumour.cases, tumour.available, tumour.missed, tumour.dsc.n) == (2, 7, 0, 2)
    assert tumour.dsc.mean == pytest.approx((1 + 2 / 3) / 2)
    assert (tumour.absent_slices, tumour.absent_empty) == (4, 4)
    assert (tumour.wrong, tumour.wrong_empty) == (4, 3)
    lesion = found["breast lesion"]
    assert (lesion.cases, lesion.missed, lesion.dsc.n, lesion.dsc.mean) == (3, 2, 2, 0)
    assert (lesion.absent_slices, lesion.absent_empty, lesion.wrong, lesion.wrong_empty) == (1, 1, 6, 6)


def test_the_files_hold_what_the_table_shows(glioma: list[Case]) -> None:
    truth = block((4, 20, 20), slice(1, 3), slice(5, 15), slice(5, 15))
    rows = evaluate_cases(Scripted({(name_of(glioma[0].image), "brain tumour"): truth}), glioma)
    table = summaries(rows)
    text = markdown(target_block(table, "Title"), ["a note"])
    assert "# Title" in text
    assert "0.500 ± 0.707 (0.000–1.000)" in text
    assert "100 % (4 of 4)" in text
    assert "px" in text
    assert "- a note" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    (line,) = csv.DictReader(summary_csv(table).splitlines())
    assert float(line["dsc_mean"]) == 0.5
    assert line["box_dsc_mean"] == ""
    lines = list(csv.DictReader(case_csv(rows).splitlines()))
    assert [(row["group"], row["prompt"], row["dsc"]) for row in lines[:1]] == [
        ("lgg/TCGA_CS_0001", "brain tumour", "1.0")
    ]
    assert [row["dsc"] for row in lines if row["belongs"] == "False"] == [""] * 4


# -------------------------------------------------------------------------------------------------------- wordings


def test_wordings_take_turns_over_the_cases_and_every_kind_is_asked_on_each(data: Path) -> None:
    cases = list_cases(data, modalities=["ultrasound"])
    segmenter = Scripted()
    rows = evaluate_cases(segmenter, cases, wrong=1, wordings=("canonical", "held-out"))
    lesion = meaning("breast lesion")
    own = [row for row in rows if row.belongs]
    assert [row.prompt for row in own] == ["breast lesion"] * 6
    assert [row.asked for row in own if row.wordings == "canonical"] == ["breast lesion"] * 3
    assert [row.asked for row in own if row.wordings == "held-out"] == list(lesion.held_out)
    assert sum(call.startswith("set") for call in segmenter.calls) == 3
    wrong = [row for row in rows if not row.belongs and row.wordings == "held-out"]
    assert all(row.asked in meaning(row.prompt).held_out for row in wrong)


def test_every_wording_is_of_its_kind() -> None:
    tumour = meaning("brain tumour")
    assert [wording(tumour, "canonical", n) for n in (0, 5)] == ["brain tumour"] * 2
    assert [wording(tumour, "trained", n) for n in range(11)] == list(tumour.wordings)
    assert [wording(tumour, "held-out", n) for n in range(5)] == [*tumour.held_out, tumour.held_out[0]]
    with pytest.raises(SettingsError, match="canonical, trained, held-out, got 'unseen'"):
        wording(tumour, "unseen", 0)  # type: ignore[arg-type]


def test_words_that_are_refused_or_misread_are_counted(data: Path) -> None:
    cases = list_cases(data, modalities=["ultrasound"])
    truth = block((1, 24, 24), slice(None), slice(4, 12), slice(6, 14))
    names = [name_of(case.image) for case in cases]
    lesion = meaning("breast lesion")
    answers = {(name, "breast lesion"): truth for name in names} | {(names[0], lesion.held_out[0]): truth}
    rows = evaluate_cases(
        Scripted(answers, refuses=lesion.held_out[2:]), cases, wrong=0, wordings=("canonical", "held-out")
    )
    refused = [row for row in rows if row.refused]
    assert [(row.group, row.empty, row.missed, row.overlap.dsc) for row in refused] == [
        ("busi/case_002", True, True, 0.0)
    ]
    (found,) = wording_differences(rows, ["canonical", "held-out"])
    # the second case has no lesion: one case as good as before, one lost
    assert (found.target, found.base, found.other, found.test.difference.n) == (
        "breast lesion",
        "canonical",
        "held-out",
        2,
    )
    assert found.test.difference.mean == pytest.approx(-0.5)
    assert (found.refused, found.misread) == (1, 0)
    table = {row.wordings: row for row in summaries(rows)}
    assert (table["canonical"].missed, table["held-out"].missed) == (0, 1)
    assert table["held-out"].method == "zero-shot 2, refused 1"
    shown = target_block(list(table.values()), "T")
    assert [cells[0] for cells in shown.rows] == ["breast lesion\n(canonical)", "breast lesion\n(held-out)"]
    assert wording_block([found]).rows[0][3].startswith("-0.500")
    (line,) = csv.DictReader(wording_csv([found]).splitlines())
    assert float(line["difference_mean"]) == pytest.approx(-0.5)


def test_words_taken_for_another_target_are_said_to_be(glioma: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = Scripted()
    plain = segmenter.segment

    def segment(prompts: Sequence[str], **given) -> Segmentation:
        found = plain(prompts, **given)
        return replace(found, segments=tuple(replace(one, meaning="lungs") for one in found))

    monkeypatch.setattr(segmenter, "segment", segment)
    assert [row.misread for row in evaluate_cases(segmenter, glioma[:1], wrong=0)] == [True]


# ----------------------------------------------------------------------------------------------------- uncertainty


def test_uncertainty_is_asked_for_apart_and_compared_with_its_own_answers_errors(glioma: list[Case]) -> None:
    shape = (4, 20, 20)
    truth = block(shape, slice(1, 3), slice(5, 15), slice(5, 15))
    found = block(shape, slice(1, 3), slice(5, 15), slice(5, 14))
    key = (name_of(glioma[0].image), "brain tumour")
    segmenter = Scripted({key: found}, doubts={key: np.where(found != truth, 0.3, 0.0)})
    row, wrong = evaluate_cases(segmenter, glioma[:1], wrong=1, uncertainty=True)
    asked = [call.split()[0] for call in segmenter.calls]
    assert asked == ["set", "ask", "doubt", "ask"]
    assert row.calibration.measures[SPREAD].auroc == {"band": 1, "whole": 1}
    assert row.calibration.dsc == row.overlap.dsc
    assert row.calibration.probability == {}
    assert wrong.calibration is None
    trained = evaluate_cases(Scripted({key: found}, method="trained"), glioma[:1], wrong=0, uncertainty=True)[0]
    assert trained.method == "trained"
    assert trained.calibration.probability["whole"].total == 4 * 20 * 20
    assert [one.target for one in calibrations([row, trained])] == ["brain tumour"]


# ---------------------------------------------------------------------------------------------------------- pictures


def test_a_view_is_the_slice_with_most_of_the_target_else_of_what_was_drawn(data: Path, glioma: list[Case]) -> None:
    false = block((4, 20, 20), slice(3, 4), slice(2, 6), slice(2, 6))
    answers = {(name_of(glioma[0].image), "brain tumour"): false, (name_of(glioma[0].image), "lungs"): false}
    rows = evaluate_cases(Scripted(answers), glioma[:1], wrong=3, views=True)
    view = rows[0].view
    # the file's rows run to the patient's front, the picture's to the back
    assert view.truth.sum() == 100
    assert not view.prediction.any()
    assert view.title == "axial slice 2 of 4"
    assert view.image.shape == (20, 20)
    others = {row.prompt: row for row in rows[1:]}
    assert others["lungs"].view.title == "axial slice 4 of 4"
    assert others["lungs"].view.prediction.sum() == 16
    assert others["lungs"].drawn == 16 / 1600
    assert all(row.view is None for name, row in others.items() if name != "lungs")
    assert evaluate_cases(Scripted(answers), glioma[:1], wrong=3)[0].view is None


def rows_of(*scores: float) -> list[CaseRow]:
    """A row a case; its truth is drawn with that DSC, or absent with a mask of -score of the image."""
    view = CaseView("", np.zeros((9, 9), np.uint8), np.eye(9, dtype=bool), np.eye(9, dtype=bool), 1.0)
    plain = {"modality": "ultrasound", "prompt": "breast lesion", "belongs": True, "unit": "px", "slices": 1}
    plain |= {"absent_empty": 0, "box_dsc": None, "score": 0.5, "tower_slices": 1, "tower_seconds": 1.0}
    plain |= {"prompt_seconds": 1.0, "slice_scores": (0.5,), "slice_truth": (True,), "view": view}
    return [
        CaseRow(
            group=f"busi/{number}",
            target_slices=int(score >= 0),
            overlap=Overlap(score, score, 1.0) if score >= 0 else None,
            empty=score == 0,
            drawn=abs(score),
            **plain,
        )
        for number, score in enumerate(scores)
    ]


def test_best_median_worst_and_the_worst_false_positive_are_told() -> None:
    rows = rows_of(0.5, 0.9, -0.1, 0.0, 0.7, 0.8, -0.3)
    found = [(name, row.group) for name, row in telling_cases(rows, "breast lesion")]
    assert found == [
        ("Best", "busi/1"),
        ("Median", "busi/4"),
        ("Worst", "busi/3"),
        ("Worst false positive", "busi/6"),
    ]
    assert [name for name, _ in telling_cases(rows_of(0.4), "breast lesion")] == ["Only case"]
    two = telling_cases(rows_of(0.4, 0.6), "breast lesion")
    assert [(name, row.group) for name, row in two] == [("Best", "busi/1"), ("Worst", "busi/0")]
    assert telling_cases(rows, "lungs") == []


def test_figures_show_what_they_say(glioma: list[Case]) -> None:
    rows = rows_of(0.5, 0.9, -0.1, 0.0)
    cases = telling_cases(rows, "breast lesion")
    figure = cases_figure("breast lesion", cases)
    assert len(figure.axes) == 2 * len(cases)
    said = [text.get_text() for text in figure.texts]
    assert "Best: DSC 0.900" in said
    assert "No false positive" not in said
    clean = cases_figure("breast lesion", telling_cases(rows_of(0.5, 0.9), "breast lesion"), absent=3)
    assert "asked for 3 times where it is not, always empty" in [text.get_text() for text in clean.texts]
    assert "Worst: DSC 0.000" in said
    strips = strip_figure(rows, summaries(rows))
    dots = [line for line in strips.axes[0].lines if line.get_marker() == "o"]
    assert sorted(float(dot.get_xdata()[0]) for dot in dots) == [0, 0.5, 0.9]
    assert [dot.get_markerfacecolor() for dot in dots].count("none") == 1


def test_what_was_not_measured_is_said() -> None:
    rows = rows_of(0.5, 0.9)
    said = " ".join(not_measured(summaries(rows, {"ultrasound": 25}), [], ["canonical"], uncertainty=False))
    assert "Targets not evaluated: brain tumour, lungs" in said
    assert "Not every case was used: breast lesion (2 of 25)" in said
    assert "Few cases, wide intervals: breast lesion (2)" in said
    assert "Every slice holds the target, so that nothing is known of its absence: breast lesion" in said
    assert "No prompts for targets of other modalities" in said
    assert "Wordings that were not asked: trained, held-out" in said
    assert "Uncertainty was not computed" in said


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, glioma: list[Case]):
    truth = block((4, 20, 20), slice(1, 3), slice(5, 15), slice(5, 15))
    answers = {(name_of(case.image), "brain tumour"): truth for case in glioma}
    monkeypatch.setattr(TextSegmenter, "from_preset", lambda *args, **kwargs: Scripted(answers))
    app = typer.Typer()
    # a lone command would be run without its name
    app.callback()(lambda: None)
    app.command()(evaluate)

    def run(*words: str) -> None:
        app(args=["evaluate", "--no-uncertainty", *words], prog_name="freqseg", standalone_mode=False, obj=Session())

    return run


def test_the_command_prints_and_writes_the_table(command, data: Path, tmp_path: Path, capsys) -> None:
    table, text = tmp_path / "out.csv", tmp_path / "out.md"
    command(
        "--data", str(data), "--max-cases", "1", "--csv", str(table), "--markdown", str(text), "--quiet", "--seed", "3"
    )
    shown = capsys.readouterr().out
    assert "glioma on FLAIR MR: 1 of 2 cases" in shown
    assert "brain tumour" in shown
    assert "posterior hippocampus" in shown
    assert "may have been seen by the image tower" in shown
    written = text.read_text(encoding="utf-8")
    assert "--seed 3" in written
    assert "Not all cases were used: glioma on FLAIR MR: 1 of 2 cases" in written
    assert len(list(csv.DictReader(table.open(encoding="utf-8")))) == len(targets())
    cases = list(csv.DictReader((tmp_path / "out_cases.csv").open(encoding="utf-8")))
    assert sum(row["belongs"] == "True" for row in cases) == len(targets())


def test_the_page_holds_tables_pictures_and_every_case(command, data: Path, tmp_path: Path, capsys) -> None:
    page, table, text = tmp_path / "out.html", tmp_path / "out.csv", tmp_path / "out.md"
    command(
        *("--data", str(data), "--quiet", "--html", str(page), "--csv", str(table), "--markdown", str(text)),
        *("--uncertainty", "--wordings", "canonical", "--wordings", "held-out", "--target", "brain tumour"),
    )
    written = page.read_text(encoding="utf-8")
    for heading in (
        *("What was run", "Accuracy", "What was not measured", "DSC of every case", "Other wordings"),
        *("Does the uncertainty predict error?", "Best, median and worst cases"),
        *("Every case", "Prompts for targets of other modalities"),
    ):
        assert f"<h2>{heading}</h2>" in written
    assert "<h3>Settings of each target</h3>" in written
    pictures = [Image.open(io.BytesIO(base64.b64decode(part))) for part in re.findall(r"base64,([^\"]+)\"", written)]
    assert len(pictures) == 3
    assert all(picture.size[0] == 1600 for picture in pictures)
    assert not re.search(r'(?:src|href)="(?!data:)', written)
    assert len(written) < 10e6
    # the same numbers in every form
    shown = "1.000 ± 0.000"
    assert shown in written
    assert shown in text.read_text(encoding="utf-8")
    lines = list(csv.DictReader(table.open(encoding="utf-8")))
    assert [(row["wordings"], row["method"], float(row["dsc_mean"])) for row in lines] == [
        ("canonical", "zero-shot", 1.0),
        ("held-out", "zero-shot", 0.0),
    ]
    for name in ("cases", "calibration", "reliability", "wordings"):
        assert list(csv.DictReader((tmp_path / f"out_{name}.csv").open(encoding="utf-8")))
    assert re.search(r"<th>lgg/TCGA_CS_0001</th><td>brain tumour</td><td>glial tumour of the brain</td>", written)
    assert "torch" in written
    assert "litemedsam" in written
    assert str(tmp_path) not in written


def test_a_single_target_reads_its_own_cases_alone(command, data: Path, capsys) -> None:
    command("--data", str(data), "--target", "breast lesion", "--quiet")
    shown = capsys.readouterr().out
    assert "breast lesion on ultrasound: 3 of 3 cases" in shown
    assert "glioma" not in shown


def test_an_existing_file_is_refused_before_the_work(command, data: Path, tmp_path: Path, monkeypatch) -> None:
    def never(*args, **kwargs):
        raise AssertionError("the work began")

    monkeypatch.setattr(TextSegmenter, "from_preset", never)
    (tmp_path / "out_cases.csv").write_text("mine")
    with pytest.raises(OutputError, match=r"out_cases\.csv exists already"):
        command("--data", str(data), "--csv", str(tmp_path / "out.csv"))
    assert (tmp_path / "out_cases.csv").read_text() == "mine"


@pytest.mark.data
def test_real_test_cases_have_their_masks(shared_data: Path) -> None:
    cases = list_cases(shared_data)
    assert Counter(case.modality for case in cases) == {"flair": 8, "xray": 69, "ultrasound": 35, "t1": 33}
    assert all(case.mask.exists() for case in cases)
    xray = next(case for case in cases if case.modality == "xray").read()
    left, right = xray.truth("left lung"), xray.truth("right lung")
    columns = np.arange(left.shape[2])
    assert (left.any((0, 1)) * columns).max() > (right.any((0, 1)) * columns).max()
    assert 0.5 < left.sum() / right.sum() < 2


@pytest.mark.data
def test_real_validation_patients_are_none_of_the_test_patients(shared_data: Path) -> None:
    validation = list_cases(shared_data, "train-validation")
    assert {case.modality for case in validation} == {"flair", "xray", "ultrasound", "t1"}
    assert all(lite_data.split_of(case.group) == "validation" for case in validation)
    assert not {case.group for case in validation} & {case.group for case in list_cases(shared_data)}
