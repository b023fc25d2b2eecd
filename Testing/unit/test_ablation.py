"""The ablation: its forms, that they are trained and measured alike and once, and what the report says of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_text_guided import CHANNELS, NAMES, SMALL, STILL, made, wordings
from test_text_segmentation import PRESET, Boxes, Bright
from torch import Tensor

from FreqSegLib.cli import main
from FreqSegLib.clip.prompts import MatchedPrompt
from FreqSegLib.clip.vocabulary import meaning
from FreqSegLib.embedding_cache import EmbeddingCache
from FreqSegLib.errors import Cancelled, InputError, SettingsError
from FreqSegLib.evaluation import ablation
from FreqSegLib.evaluation.ablation import (
    FULL,
    TRAINED_FORMS,
    ZERO_SHOT_FORMS,
    AblationPlan,
    FeaturesInMemory,
    HalfBranches,
    Lessons,
    chosen_forms,
    finished_parts,
    measure_trained,
    measure_zero_shot,
    train_forms,
)
from FreqSegLib.evaluation.ablation_report import Listed, Part, figure, markdown, table_csv
from FreqSegLib.evaluation.ablation_scores import CaseScore, compared, read_scores, standings, write_scores
from FreqSegLib.evaluation.cases import LabelledVolume
from FreqSegLib.evaluation.evaluate import CaseRow
from FreqSegLib.evaluation.report_csv import case_csv
from FreqSegLib.evaluation.segmentation_metrics import Overlap
from FreqSegLib.interaction.adaptive_fusion import AdaptiveFusion
from FreqSegLib.interaction.dual_stream import DualStreamConfig, DualStreamModel
from FreqSegLib.interaction.ffbi import FFBI, EfficientFFBI
from FreqSegLib.text_segmentation import TextSegmenter
from FreqSegLib.text_trained import TrainedMethod
from FreqSegLib.volume import Volume

FORMS = {form.name: form for form in TRAINED_FORMS}


def score(method: str, group: str, dsc: float | None, prompt: str = "brain tumour", **given) -> CaseScore:
    values = {"modality": "flair", "belongs": True, "unit": "px", "absent_slices": 4, "absent_empty": 3, "empty": False}
    nsd, hd95 = (None, None) if dsc is None else (dsc / 2, 10 * (1 - dsc))
    return CaseScore(method=method, group=group, prompt=prompt, dsc=dsc, nsd=nsd, hd95=hd95, **{**values, **given})


# --------------------------------------------------------------------------------------------------------- the forms


def test_every_form_differs_from_the_one_before_it_in_one_respect() -> None:
    full = DualStreamConfig()
    assert FORMS[FULL].config(full) == full
    for form in TRAINED_FORMS:
        if form.before is not None:
            one, other = (asdict(f.config(full)) for f in (form, FORMS[form.before]))
            assert sum(one[key] != other[key] for key in one) == 1, form.name


def test_every_form_is_made_of_what_it_names() -> None:
    made_of = {name: DualStreamModel(form.config(SMALL)) for name, form in FORMS.items()}
    assert not hasattr(made_of["none"], "frequency")
    assert [made_of[n].frequency.bands for n in ("hf", "lf", "hf+lf")] == ["high", "low", "both"]
    assert not hasattr(made_of["hf+lf"], "interaction")
    assert isinstance(made_of["efficient-ffbi"].interaction, EfficientFFBI)
    assert isinstance(made_of["ffbi"].interaction, FFBI)
    assert [made_of[n].config.language_gate for n in ("ffbi", "lffi")] == [False, True]
    assert [made_of[n].fusion.method for n in ("lffi", FULL)] == ["mean", "adaptive"]
    assert [made_of[n].config.normaliser for n in ("batch-normaliser", "instance-normaliser")] == ["batch", "instance"]


def test_forms_are_chosen_by_name_and_the_extra_ones_only_so() -> None:
    trained, zero_shot = chosen_forms([])
    assert [f.name for f in trained] == ["none", "hf", "lf", "hf+lf", "efficient-ffbi", "ffbi", "lffi", "adaptive"]
    assert [f.name for f in zero_shot] == ["none", "hf", "lf", "hf+lf", "fusion"]
    trained, zero_shot = chosen_forms(["db4", "lf"])
    assert ([f.name for f in trained], [f.name for f in zero_shot]) == (["lf", "db4"], ["lf"])
    assert chosen_forms([], "zero-shot")[0] == []
    with pytest.raises(SettingsError, match=r"There is no form 'fbi' to ablate\. Forms: none, hf, lf,"):
        chosen_forms(["fbi"])
    with pytest.raises(SettingsError, match="no form 'ffbi'"):
        chosen_forms(["ffbi"], "zero-shot")


def test_a_zero_shot_form_is_half_the_slice_and_half_its_branches() -> None:
    raw, low, high = (torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))
    expected = {"hf": (raw + high) / 2, "lf": (raw + low) / 2, "hf+lf": raw / 2 + low / 4 + high / 4}
    for form in ZERO_SHOT_FORMS:
        if form.name in expected:
            fusion = HalfBranches(form.branches)
            assert not fusion.is_identity
            with torch.no_grad():
                torch.testing.assert_close(fusion(raw, low, high), expected[form.name])


# ----------------------------------------------------------------------------------------- training and measuring


class Whole(Bright):
    """As ``Bright``, on the frame the trained model takes."""

    image_size = 256

    def prefix(self, images: Tensor, layer_idx: int) -> Tensor:
        return super().prefix(F.avg_pool2d(images, 4), layer_idx)


class Pooled(Boxes):
    """A tower whose embedding is that of ``made``'s slices."""

    name, image_size, embedding_shape = "pooled", 256, (CHANNELS, 32, 32)

    def embed(self, images: Tensor, valid: tuple[int, int] | None = None) -> Tensor:
        self.embedded += len(images)
        return F.avg_pool2d(images[:, :1], 8) * torch.linspace(-2, 2, CHANNELS)[None, :, None, None]


class Sentences:
    """The first wording's vector of the target a sentence names."""

    def encode(self, sentences: Sequence[str]) -> Tensor:
        return wordings()[1][[3 * NAMES.index(sentence) for sentence in sentences]]


class Named:
    def match(self, text: str) -> MatchedPrompt:
        return MatchedPrompt(text, meaning(text), 1.0)


@dataclass
class MadeCase:
    """A stack of two of ``made``'s slices: anterior bright, posterior grey; the first slice shows neither."""

    number: int
    modality: str = "t1"
    unit: str = "mm"

    @property
    def group(self) -> str:
        return f"hippocampus/{self.number}"

    def read(self) -> LabelledVolume:
        _, pictures = made(1, seed=100 + self.number)
        labels = np.zeros((2, 256, 256), dtype=np.uint8)
        for channel in (0, 1):
            labels[1][pictures.masks[0, channel] > 0] = channel + 1
        image = np.stack([np.full((256, 256), 10, dtype=np.uint8), pictures.images[0]])
        image[0, 0, 0] = 11
        return LabelledVolume(Volume(image, np.diag([-1.0, -1.0, 1.0, 1.0])), labels, self.modality)


@pytest.fixture
def plan(tmp_path: Path) -> AblationPlan:
    return AblationPlan(
        work=str(tmp_path / "work"), steps=4, wrong=1, training=replace(STILL, batch_size=2), model=SMALL
    )


@pytest.fixture
def segmenter(tmp_path: Path) -> TextSegmenter:
    cache = EmbeddingCache(tmp_path / "cache")
    return TextSegmenter(Whole(), Pooled(), PRESET, weights_key="fake", matcher=Named(), cache=cache)


class Teacher:
    """Gives the lessons, and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> Lessons:
        self.asked += 1
        said, vectors = wordings()
        return Lessons(*made(8), tuple(said), vectors)


CASES = [MadeCase(0), MadeCase(1)]


def test_forms_are_trained_and_measured_once(plan: AblationPlan, segmenter: TextSegmenter, tmp_path: Path) -> None:
    forms, teacher, lines = [FORMS["none"], FORMS["hf+lf"]], Teacher(), []
    train_forms(forms, teacher, plan, lines.append)
    assert teacher.asked == 1
    assert sum("steps" in line for line in lines) == 2
    measure_trained(forms, segmenter, Sentences(), CASES, plan)
    before = (segmenter.trained, type(segmenter.cache), segmenter.refiner.embedded)
    # the tower has read every slice once, and what a form computed does not fill the disk
    assert before == (None, EmbeddingCache, 4)
    assert not list(tmp_path.rglob("dual-*"))
    assert list((tmp_path / "cache").rglob("embedding-*"))
    (part,) = finished_parts(plan)
    assert {s.method for s in part.scores} == {"none", "hf+lf"}
    own = [s for s in part.scores if s.method == "none" and s.belongs]
    assert [(s.group, s.prompt) for s in own] == [
        (c.group, t) for c in CASES for t in NAMES if meaning(t).modality == "t1"
    ]
    assert all(s.absent_slices == 1 for s in own)
    assert sum(not s.belongs for s in part.scores) == 4

    again, said = Teacher(), []
    train_forms(forms, again, plan, said.append)
    measure_trained(forms, segmenter, Sentences(), [], plan)
    assert (again.asked, said) == (0, [])
    assert finished_parts(plan) == [part]
    # other cases are measured anew, with the weights that are there
    fewer = replace(plan, most_cases=1)
    measure_trained(forms[:1], segmenter, Sentences(), CASES[:1], fewer)
    assert len(finished_parts(fewer)[0].scores) < len(own) + 3
    with pytest.raises(SettingsError, match="none holds a run of another recipe"):
        train_forms(forms, again, replace(plan, steps=5), said.append)


def test_a_form_measured_in_memory_draws_what_it_draws_with_the_disk(
    plan: AblationPlan, segmenter: TextSegmenter
) -> None:
    train_forms([FORMS["hf"]], Teacher(), plan, lambda line: None)
    method = TrainedMethod.load(plan.run("trained", "hf"), "k", Sentences(), torch.device("cpu"))
    assert method.meanings == tuple(NAMES)
    segmenter.trained = method
    masks = []
    for cache in (segmenter.cache, FeaturesInMemory.beside(segmenter.cache)):
        segmenter.cache = cache
        segmenter.set_volume(CASES[0].read().volume)
        found = [segmenter.segment(["hippocampus"])[0] for _ in range(2)]
        assert np.array_equal(found[0].saliency, found[1].saliency)
        masks.append(found[0].saliency)
    assert np.array_equal(*masks)
    assert masks[0].max() > 0


def test_a_stopped_measurement_keeps_the_forms_that_are_finished(plan: AblationPlan, segmenter: TextSegmenter) -> None:
    forms = [FORMS["none"], FORMS["lf"]]
    train_forms(forms, Teacher(), plan, lambda line: None)
    seen: list[str] = []
    with pytest.raises(Cancelled):
        measure_trained(
            forms, segmenter, Sentences(), CASES, plan, lambda name, _: seen.append(name), lambda: "lf" in seen
        )
    assert segmenter.trained is None
    assert [part.measured()[0].name for part in finished_parts(plan)] == ["none"]
    assert not plan.scores_file("trained", "lf").exists()


def test_zero_shot_forms_are_measured_and_the_missing_fusion_is_left_out(
    plan: AblationPlan, segmenter: TextSegmenter
) -> None:
    class Seen(AdaptiveFusion):
        pass

    measure_zero_shot(ZERO_SHOT_FORMS, segmenter, "w", CASES[:1], plan)
    (part,) = finished_parts(plan)
    assert [way.name for way in part.measured()] == ["none", "hf", "lf", "hf+lf"]
    assert segmenter.fusion is None
    own = Seen("simple")
    segmenter.fusion = own
    measure_zero_shot(ZERO_SHOT_FORMS, segmenter, "w", CASES[:1], plan)
    assert [way.name for way in finished_parts(plan, "zero-shot")[0].measured()][-1] == "fusion"
    assert segmenter.fusion is own
    assert finished_parts(plan, "trained") == []
    with pytest.raises(SettingsError, match="another recipe"):
        measure_zero_shot(ZERO_SHOT_FORMS, segmenter, "other weights", CASES[:1], plan)


# ------------------------------------------------------------------------------------------------------- the scores


def test_scores_come_back_from_their_file(tmp_path: Path) -> None:
    scores = [score("a", "lgg/1", 0.123456789012345), score("b", "lgg/1", None, belongs=False, empty=True)]
    write_scores(tmp_path / "folder" / "scores.csv", scores)
    assert read_scores(tmp_path / "folder" / "scores.csv") == scores
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["scores.csv"]


def test_the_table_of_cases_of_evaluate_is_read(tmp_path: Path) -> None:
    row = CaseRow(
        group="lgg/1",
        modality="flair",
        prompt="brain tumour",
        belongs=True,
        unit="px",
        slices=9,
        target_slices=5,
        overlap=Overlap(0.5, 0.6, 7.0),
        absent_empty=3,
        empty=False,
        box_dsc=None,
        score=0.9,
        tower_slices=0,
        tower_seconds=0.0,
        prompt_seconds=0.1,
        slice_scores=(0.5,) * 9,
        slice_truth=(True,) * 9,
    )
    path = tmp_path / "evaluation_cases.csv"
    path.write_text(case_csv([row, replace(row, wordings="held-out")]), encoding="utf-8", newline="")
    assert read_scores(path, "text-guided") == [CaseScore.of("text-guided", row)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("True", "yes"), "line 2: a value does not fit its column"),
        (lambda text: text.replace("0.5,", "half,"), "line 2: a value does not fit its column"),
        (lambda text: text.replace("nsd", "NSD"), "line 2: there is no column nsd; give the table of cases that"),
    ],
)
def test_a_damaged_table_of_cases_is_named(change, said: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    write_scores(path, [score("a", "lgg/1", 0.5)])
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(InputError, match=said):
        read_scores(path)
    with pytest.raises(InputError, match="cannot read the table of cases"):
        read_scores(tmp_path / "nothing.csv")


def test_a_way_stands_with_its_own_cases() -> None:
    scores = [
        score("a", "lgg/1", 0.8),
        score("a", "lgg/2", 0.6),
        score("a", "lgg/3", None),
        score("a", "lgg/1", None, "lungs", belongs=False, empty=True),
        score("a", "lgg/2", None, "lungs", belongs=False),
        score("b", "lgg/1", 0.1),
        score("a", "hippocampus/1", 0.9, "hippocampus", modality="t1", unit="mm"),
    ]
    tumour_a, tumour_b, hippocampus = standings(scores)
    assert (tumour_a.method, tumour_b.method, hippocampus.target) == ("a", "b", "hippocampus")
    assert (tumour_a.dsc.n, tumour_a.dsc.mean, tumour_a.nsd.mean) == (2, pytest.approx(0.7), pytest.approx(0.35))
    assert (tumour_a.absent_slices, tumour_a.absent_empty, tumour_a.wrong, tumour_a.wrong_empty) == (12, 9, 2, 1)
    assert (hippocampus.unit, hippocampus.wrong) == ("mm", 0)


def test_ways_are_compared_on_the_cases_they_share() -> None:
    scores = [score("a", f"lgg/{n}", 0.5 + 0.01 * n) for n in range(8)]
    scores += [score("b", f"lgg/{n}", 0.4) for n in reversed(range(1, 9))]
    test = compared(scores, "brain tumour", "a", "b")
    assert test.difference.n == 7
    assert test.difference.mean == pytest.approx(0.14)
    # seven differences of one sign: 2 of 2^7 rankings are as extreme
    assert test.p == pytest.approx(2 / 2**7)
    assert compared(scores, "brain tumour", "b", "a", "hd95").difference.mean == pytest.approx(1.4)
    assert compared(scores, "lungs", "a", "b") is None


# ------------------------------------------------------------------------------------------------------- the report


WAYS = (Listed("none", "nothing"), Listed("hf+lf", "all bands", "none"), Listed("full", "the model", "hf+lf"))


def part(title: str = "Trained model", full: str | None = "full") -> Part:
    values = {"none": 0.60, "hf+lf": 0.63, "full": 0.70}
    scores = [
        score(name, f"{prompt}/{n}", value + 0.02 * n - (0.1 if prompt == "lungs" else 0), prompt)
        for name, value in values.items()
        for prompt in ("brain tumour", "lungs")
        for n in range(3)
    ]
    return Part(title, "What is compared.", WAYS, full, tuple(scores), (("none", "hf+lf"), ("none", "missing")))


def test_the_report_says_what_each_part_adds_and_what_is_claimed() -> None:
    text = markdown("What each part adds", [part(), part("Zero-shot pipeline", None)], ["A note."])
    assert "| **hf+lf**: all bands | 0.650 ± 0.020 | 0.550 ± 0.020 | 0.600 |" in text
    row = next(line for line in text.splitlines() if line.startswith("| brain tumour | full | 3 "))
    assert "+0.070 (+0.070 to +0.070), hf+lf" in row
    row = next(line for line in text.splitlines() if line.startswith("| brain tumour | none | 3 "))
    # against the full model in the first chapter, nothing before it
    assert " | – | – | -0.100 (-0.100 to -0.100) | 0.250 | 75 % of 12 | – |" in row
    assert "| brain MR | 76.52 → 79.15 | +2.63 | +3.00 | 0.250 | +3.00 | 0.250 |" in text
    assert "| chest X-ray | 75.79 → 77.85 | +2.06 | +3.00 |" in text
    assert "| breast ultrasound | 77.76 → 80.38 | +2.62 | – | – | – | – |" in text
    assert "| lung CT | 80.38 → 83.20 | +2.82 | not measured: no data | – | not measured: no data | – |" in text
    assert "| mean | – | +2.54 (of the four rows: +2.53) | +3.00 (of 2) |" in text
    assert "| claimed gain | trained model: hf+lf − none | p | zero-shot pipeline: hf+lf − none | p |" in text
    assert "- A note." in text
    assert "claimed" not in markdown("t", [part()], [], claims=False)


def test_the_csv_has_every_number_with_six_digits() -> None:
    lines = list(csv.DictReader(io.StringIO(table_csv([part()]))))
    assert len(lines) == 6
    (found,) = [line for line in lines if line["target"] == "lungs" and line["method"] == "hf+lf"]
    assert float(found["dsc_mean"]) == pytest.approx(0.55)
    assert (found["before"], found["full"], found["dsc_n"], found["unit"]) == ("none", "full", "3", "px")
    assert float(found["dsc_difference_before"]) == pytest.approx(0.03)
    assert float(found["hd95_difference_full"]) == pytest.approx(0.7)
    (first,) = [line for line in lines if line["target"] == "lungs" and line["method"] == "none"]
    assert (first["before"], first["dsc_difference_before"], first["dsc_p_before"]) == ("", "", "")
    assert max(len(line["dsc_sd"].lstrip("0.")) for line in lines) <= 6


def test_the_figure_has_a_panel_a_target_and_a_mark_a_way() -> None:
    drawn = figure([part(), part("Zero-shot pipeline", None)], "What each part adds")
    assert len(drawn.axes) == 4
    assert [axes.get_title(loc="left") for axes in drawn.axes] == [
        "Trained model\nbrain tumour",
        "lungs",
        "Zero-shot pipeline\nbrain tumour",
        "lungs",
    ]
    for axes in drawn.axes:
        heights = sorted(float(mark.lines[0].get_ydata()[0]) for mark in axes.containers)
        assert heights == [0, 1, 2]
    means = [float(mark.lines[0].get_xdata()[0]) for mark in drawn.axes[1].containers]
    assert means == pytest.approx([0.52, 0.55, 0.62])


# ------------------------------------------------------------------------------------------------------ the command


def test_files_that_exist_are_not_replaced_and_nothing_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ablation.csv").write_text("mine", encoding="utf-8")
    monkeypatch.setattr(ablation, "train_forms", lambda *_: pytest.fail("trained"))
    assert main(["ablate", "-o", str(tmp_path)]) == 1
    assert "ablation.csv exists already" in capsys.readouterr().err.replace("\n", "")
    assert (tmp_path / "ablation.csv").read_text(encoding="utf-8") == "mine"


def test_an_unknown_form_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", "-o", str(tmp_path / "out"), "--only", "fbi", "--data", str(tmp_path)]) == 2
    assert "There is no form 'fbi' to ablate" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_writes_its_report_and_goes_on_where_it_was(
    segmenter: TextSegmenter, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter.encoder.text = Sentences()
    monkeypatch.setattr(TextSegmenter, "from_preset", lambda *_, **__: segmenter)
    monkeypatch.setattr("FreqSegLib.evaluation.cases.list_cases", lambda *_, **__: CASES)
    monkeypatch.setattr("FreqSegLib.cli_ablate._digest", lambda: "w")
    command = ["ablate", "--part", "zero-shot", "--work", str(tmp_path / "work"), "--max-cases", "1", "-q", "--only"]
    assert main([*command, "none", "-o", str(tmp_path / "one")]) == 0
    embedded = segmenter.refiner.embedded
    assert main([*command, "hf", "-o", str(tmp_path / "two")]) == 0
    assert segmenter.refiner.embedded == embedded
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "ablation.csv",
        "ablation.md",
        "ablation.png",
        "ablation_cases.csv",
    ]
    page = (tmp_path / "two" / "ablation.md").read_text(encoding="utf-8")
    assert "| **none**: saliency of the slice itself |" in page
    assert "| **hf**: half of it from the high-frequency image |" in page
    assert "test cases: 1 of 2." in page
    assert {s.method for s in read_scores(tmp_path / "two" / "ablation_cases.csv")} == {
        "Zero-shot pipeline: none",
        "Zero-shot pipeline: hf",
    }
    assert (tmp_path / "two" / "ablation.png").read_bytes()[:4] == b"\x89PNG"
    assert page in capsys.readouterr().out
