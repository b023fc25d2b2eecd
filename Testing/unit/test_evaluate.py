"""``freqseg evaluate`` on small made cases whose every number is known, with a pipeline that answers as it is told."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from FreqSegLib.cli_app import Session
from FreqSegLib.cli_evaluate import evaluate
from FreqSegLib.clip.vocabulary import meaning, targets
from FreqSegLib.errors import Cancelled, InputError, OutputError, SettingsError
from FreqSegLib.evaluation.cases import (
    Case,
    chosen_cases,
    evenly_spaced,
    list_cases,
    target_meaning,
    thinned,
    wrong_prompts,
)
from FreqSegLib.evaluation.evaluate import EvaluationProgress, evaluate_cases
from FreqSegLib.evaluation.report import case_csv, markdown, summaries, summary_csv
from FreqSegLib.evaluation.segmentation_metrics import diagonal
from FreqSegLib.sam.promptable import Decoded
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
    """Answers every prompt with the mask ``answers`` holds for it on volumes of that name, or with nothing."""

    def __init__(
        self, answers: dict[tuple[str, str], np.ndarray] | None = None, refiner: BoxDrawer | None = None
    ) -> None:
        self.answers, self.refiner = answers or {}, refiner
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
        self.prepared = PreparedVolume(volume, stack, None, frame, "key", ("raw",))
        return self.prepared

    def segment(self, prompts: Sequence[str], *, progress=None, cancel=None, settings=None) -> Segmentation:
        volume = self.prepared.volume
        self.calls += [f"ask {prompt}" for prompt in prompts]
        results = []
        for prompt in prompts:
            mask = self.answers.get((volume.name, prompt), np.zeros(volume.shape, dtype=bool))
            scores = np.full(volume.shape[0], 0.25, dtype=np.float32)
            results.append(PromptResult(prompt, mask, mask.astype(np.float32), None, 0.25, scores, (1, 0, 0), prompt))
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
    text = markdown(table, "Title", ["a note"])
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
        app(args=["evaluate", *words], prog_name="freqseg", standalone_mode=False, obj=Session())

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
