"""The U-Net beside the text-guided model: what it learns from, where its masks lie, and how it is measured."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ablation import MadeCase, score
from test_evaluate import data as data
from test_text_guided import made
from test_text_segmentation import box_volume, dice
from torch import Tensor, nn

from FreqSegLib.cli import main
from FreqSegLib.errors import Cancelled, InputError, SettingsError
from FreqSegLib.evaluation.ablation_scores import read_scores, write_scores
from FreqSegLib.evaluation.baselines import METHOD, Rule, choose_rules, draw, kept_rules, measure_baseline
from FreqSegLib.evaluation.cases import LabelledVolume
from FreqSegLib.evaluation.segmentation_metrics import overlap
from FreqSegLib.training.baselines import (
    TASKS,
    BaselineConfig,
    BaselineTraining,
    build_unet,
    task_of,
    train_baseline,
)
from FreqSegLib.training.loop import LoopConfig
from FreqSegLib.volume import Volume

HIPPOCAMPUS, LUNGS = task_of("hippocampus"), task_of("lungs")
SMALL = BaselineConfig(
    widths=(4, 8, 16), residual_units=1, batch_size=4, loop=LoopConfig(steps=2, warmup=1, validate_every=1)
)


def training_of(config: BaselineConfig = SMALL, modality: str = "t1", count: int = 12) -> BaselineTraining:
    cached, pictures = made(count, modality)
    return BaselineTraining(HIPPOCAMPUS if modality == "t1" else LUNGS, cached.slices, pictures, config)


class Greys(nn.Module):
    """Takes what is bright for the first channel, what is grey for the second."""

    def forward(self, images: Tensor) -> Tensor:
        return 20 * torch.cat([images - 0.75, 0.2 - (images - 0.5).abs()], dim=1)


# --------------------------------------------------------------------------------------------------------- training


def test_the_network_is_monais_of_the_size_that_is_stated() -> None:
    network = build_unet(2, BaselineConfig())
    assert type(network.body).__module__.startswith("monai.networks.nets")
    assert 1.5e6 < sum(weight.numel() for weight in network.parameters()) < 2.5e6
    with torch.no_grad():
        assert network(torch.rand(1, 1, 64, 64)).shape == (1, 2, 64, 64)


def test_networks_of_one_seed_are_equal_and_leave_the_global_seed_alone() -> None:
    before = torch.random.get_rng_state()
    one, same, other = (build_unet(1, replace(SMALL, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    first, again, different = (next(iter(network.parameters())) for network in (one, same, other))
    assert torch.equal(first, again)
    assert not torch.equal(first, different)


def test_every_target_can_be_read_off_its_tasks_channels() -> None:
    names = [meaning.name for task in TASKS for meaning in task.targets()]
    assert {"brain tumour", "lungs", "left lung", "breast lesion", "hippocampus", "posterior hippocampus"} <= {*names}
    for task in TASKS:
        assert all(set(meaning.channels) <= set(task.channels) for meaning in task.targets())
    with pytest.raises(SettingsError, match=r"no baseline task 'liver'\. Tasks: glioma, lungs, breast, hippocampus"):
        task_of("liver")


def test_a_batch_follows_from_its_step_and_seed_alone() -> None:
    training = training_of()
    (images, masks), again, other = (training.batch(np.random.default_rng((0, step))) for step in (3, 3, 4))
    assert images.shape == (4, 1, 256, 256)
    assert masks.shape == (4, 2, 256, 256)
    assert torch.equal(images, again[0])
    assert torch.equal(masks, again[1])
    assert not torch.equal(images, other[0])
    assert 0 <= float(images.min()) < float(images.max()) <= 1


def test_pictures_and_masks_move_together() -> None:
    training = training_of()
    for step in range(3):
        images, masks = training.batch(np.random.default_rng(step))
        # the bright square is the first channel, the grey one the second
        bright, grey = (float(images[masks[:, c : c + 1] > 0.9].mean()) for c in (0, 1))
        outside = float(images[masks.amax(1, keepdim=True) < 0.1].mean())
        assert bright > grey + 0.2 > outside + 0.4


def test_a_mirrored_x_ray_has_its_sides_exchanged() -> None:
    cached, pictures = made(8, "xray")
    for row in range(8):
        # left lung in the picture's right half
        pictures.masks[row] = 0
        pictures.masks[row, 0, 96:160, 160:224] = pictures.masks[row, 1, 96:160, 32:96] = 255
    training = BaselineTraining(LUNGS, cached.slices, pictures, replace(SMALL, batch_size=16))
    _, masks = training.batch(np.random.default_rng(0))
    columns = torch.arange(256.0)
    centres = (masks.sum(2) * columns).sum(2) / masks.sum((2, 3))
    assert bool((centres[:, 0] > 128).all())
    assert bool((centres[:, 1] < 128).all())


def test_slices_without_the_target_are_drawn_less_often() -> None:
    cached, pictures = made(16)
    pictures.masks[::2] = 0
    training = BaselineTraining(HIPPOCAMPUS, cached.slices, pictures, SMALL)
    rows = np.random.default_rng(0).choice(training.train_rows, 2000, p=training._weights)
    shown = float(np.mean(pictures.masks[rows].any((1, 2, 3))))
    assert 0.77 < shown < 0.83
    only = [item for item in cached.slices if item.split == "train"]
    with pytest.raises(InputError, match="12 training and 0 validation slices"):
        BaselineTraining(HIPPOCAMPUS, only, pictures, SMALL)


def test_validation_counts_parts_and_their_union_over_patients() -> None:
    training = training_of()
    training.network = Greys()
    found = training.validate()
    assert found["dice anterior hippocampus"] == pytest.approx(1, abs=1e-3)
    assert found["dice posterior hippocampus"] == pytest.approx(1, abs=1e-3)
    assert found["dice hippocampus"] == pytest.approx(1, abs=1e-3)
    training.network = nn.Sequential(Greys(), _Exchange())
    found = training.validate()
    assert found["dice anterior hippocampus"] == 0
    assert found["dice hippocampus"] == pytest.approx(1, abs=1e-3)
    assert found["score"] == pytest.approx(1 / 3, abs=1e-3)


class _Exchange(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return logits.flip(1)


def test_it_learns_to_draw_its_targets_and_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    cached, pictures = made(16, seed=3)
    loop = LoopConfig(steps=60, warmup=5, validate_every=30, learning_rate=2e-2)
    config = replace(SMALL, batch_size=2, loop=loop)
    rows: list[dict[str, float]] = []
    network, best = train_baseline(HIPPOCAMPUS, cached.slices, pictures, tmp_path, config, report=rows.append)
    assert len(rows) == 2
    assert best["dice hippocampus"] > 0.75
    assert best["score"] > 0.6
    again, same = train_baseline(HIPPOCAMPUS, cached.slices, pictures, tmp_path, config, report=rows.append)
    assert len(rows) == 2
    assert (same["step"], same["score"]) == (best["step"], best["score"])
    for one, other in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(SettingsError, match="holds a run of another recipe; give another work folder"):
        train_baseline(HIPPOCAMPUS, cached.slices, pictures, tmp_path, replace(config, seed=1))


# -------------------------------------------------------------------------------------------------------- measuring


@pytest.mark.parametrize(
    "affine",
    [
        np.eye(4),
        np.diag([-1.0, -1.0, 1.0, 1.0]),
        # an axial stack that is stored with its slices along the rows
        np.array([[0, 0, 1, 0], [0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1.0]]),
    ],
)
def test_a_mask_lies_where_the_target_is_on_the_volumes_own_grid(affine: np.ndarray) -> None:
    volume, truth = box_volume((24, 64, 64), (slice(8, 16), slice(8, 24), slice(36, 56)), affine)
    drawing = draw(Greys(), volume)
    mask = drawing.mask([0], Rule())
    assert mask.shape == volume.shape
    assert dice(mask, truth) > 0.97
    assert not drawing.mask([0], Rule(threshold=1.0)).any()


def test_a_stopped_measurement_says_so() -> None:
    with pytest.raises(Cancelled, match="the trained networks are kept"):
        draw(Greys(), box_volume()[0], cancel=lambda: True)


def test_every_case_and_target_is_measured_against_its_truth() -> None:
    cases = [MadeCase(0), MadeCase(1)]
    rules = {meaning.name: Rule() for meaning in HIPPOCAMPUS.targets()}
    told: list[tuple[int, int]] = []
    scores = measure_baseline(HIPPOCAMPUS, Greys(), rules, cases, progress=lambda *done: told.append(done))
    assert told == [(1, 2), (2, 2)]
    assert [(s.group, s.prompt) for s in scores] == [(c.group, m.name) for c in cases for m in HIPPOCAMPUS.targets()]
    labelled = cases[0].read()
    truth = labelled.truth("posterior hippocampus")
    expected = overlap(draw(Greys(), labelled.volume).mask([1], Rule()), truth, (1.0, 1.0, 1.0), 2.0)
    (found,) = [s for s in scores if s.group == cases[0].group and s.prompt == "posterior hippocampus"]
    assert (found.dsc, found.nsd, found.hd95) == (expected.dsc, expected.nsd, expected.hd95)
    assert found.dsc > 0.9
    assert (found.method, found.unit, found.belongs) == (METHOD, "mm", True)
    assert (found.absent_slices, found.absent_empty, found.empty) == (1, 1, False)


class Doubled(MadeCase):
    """The anterior part, and a smaller square as bright that is none."""

    def read(self) -> LabelledVolume:
        found = super().read()
        image = found.volume.array.copy()
        free = np.argwhere(image[1, 16::80, 16::80] < 60)[0] * 80 + 16
        image[1, free[0] : free[0] + 40, free[1] : free[1] + 40] = 230
        return LabelledVolume(Volume(image, found.volume.affine), found.labels, self.modality)


def test_the_rule_that_suits_the_validation_patients_is_chosen_once(tmp_path: Path) -> None:
    rules = kept_rules(tmp_path, lambda: choose_rules(HIPPOCAMPUS, Greys(), [Doubled(0), Doubled(1)]))
    assert rules["anterior hippocampus"].num_contours == 1
    assert rules["posterior hippocampus"].num_contours == 0
    assert kept_rules(tmp_path, lambda: pytest.fail("chosen again")) == rules
    with pytest.raises(InputError, match="no validation patient shows 'hippocampus'"):
        choose_rules(HIPPOCAMPUS, Greys(), [])


# ------------------------------------------------------------------------------------------------------ the command


def test_the_command_trains_measures_and_puts_both_into_one_table(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    beside, out = tmp_path / "theirs_cases.csv", tmp_path / "out"
    theirs = [score("x", f"busi/case_{n:03}", 0.5, "breast lesion", modality="ultrasound") for n in range(3)]
    write_scores(beside, [*theirs, score("x", "lgg/1", 0.9)])
    command = ["train-baseline", "breast", "-o", str(out), "--data", str(data), "--steps", "1", "--device", "cpu", "-q"]
    command += ["--work", str(tmp_path / "work"), "--pictures", str(tmp_path / "pictures"), "--beside", str(beside)]
    assert main(command) == 0
    page = (out / "baselines.md").read_text(encoding="utf-8")
    assert "breast lesion on ultrasound: MONAI's residual UNet, 1.63 M parameters" in page
    assert "test cases: 3 of 3." in page
    assert "claimed" not in page
    scores = read_scores(out / "baselines_cases.csv")
    assert [s.group for s in scores if s.method == METHOD] == [f"busi/case_{n:03}" for n in range(3)]
    assert {s.prompt for s in scores} == {"breast lesion"}
    with (out / "baselines.csv").open(encoding="utf-8") as file:
        lines = {line["method"]: line for line in csv.DictReader(file)}
    assert float(lines["text-guided"]["dsc_mean"]) == 0.5
    # the second image shows nothing
    assert (lines["text-guided"]["before"], lines[METHOD]["dsc_n"]) == (METHOD, "2")
    assert json.loads((tmp_path / "work" / "breast" / "run" / "rules.json").read_text(encoding="utf-8")).keys() == {
        "breast lesion"
    }
    capsys.readouterr()
    assert main(command) == 1
    assert "baselines.md exists already" in capsys.readouterr().err.replace("\n", "")


def test_a_task_that_does_not_exist_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train-baseline", "liver", "-o", str(tmp_path)]) == 2
    assert "'liver' is not one of 'glioma', 'lungs', 'breast', 'hippocampus', 'all'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.timeout(1800)
def test_breast_lesions_are_learned_from_real_images(shared_data: Path, tmp_path: Path) -> None:
    command = ["train-baseline", "breast", "-o", str(tmp_path), "--data", str(shared_data), "--steps", "150", "-q"]
    command += ["--work", str(tmp_path / "work"), "--pictures", str(tmp_path / "pictures"), "--max-cases", "12"]
    assert main(command) == 0
    with (tmp_path / "baselines.csv").open(encoding="utf-8") as file:
        (line,) = csv.DictReader(file)
    assert float(line["dsc_mean"]) > 0.3
