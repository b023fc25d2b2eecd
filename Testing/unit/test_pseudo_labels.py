"""Phase 3: which labels may teach, nnU-Net's dataset and commands, and what several checkpoints say together."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from test_text_segmentation import PRESET, Boxes, Bright, box_volume

from FreqSegLib.cli import main
from FreqSegLib.embedding_cache import EmbeddingCache
from FreqSegLib.errors import FreqSegError, InputError, SettingsError
from FreqSegLib.mamba.model_config import from_mapping
from FreqSegLib.slices import SliceStack
from FreqSegLib.text_results import PromptResult
from FreqSegLib.text_segmentation import TextSegmenter
from FreqSegLib.training.checkpoint_ensemble import average, entropy
from FreqSegLib.training.nnunet_commands import (
    TRAINER,
    TRAINER_FOLDER,
    Folders,
    NNUNetConfig,
    end_tree,
    environment,
    find_commands,
    run_command,
    train_command,
)
from FreqSegLib.training.nnunet_dataset import RawDataset, case_names, label_name
from FreqSegLib.training.pseudo_labels import SelectionConfig, pseudo_label
from FreqSegLib.training.pseudo_labels_recipe import PseudoLabelRecipe, train_pseudo_labels
from FreqSegLib.volume import Volume

# ---------------------------------------------------------------------------------------------------- what may teach


def result(mask: np.ndarray, scores: list[float], doubts: list[float], name: str = "a") -> PromptResult:
    """One target; ``doubts`` is the uncertainty everywhere on each slice."""
    uncertainty = np.broadcast_to(np.array(doubts, np.float32)[:, None, None], mask.shape)
    return PromptResult(
        name, mask, mask.astype(np.float32), uncertainty, max(scores), np.array(scores, np.float32), (1, 0, 0), None
    )


def stack_of(count: int = 4) -> SliceStack:
    return SliceStack.of(Volume(np.zeros((count, 6, 6), np.float32), np.diag([1.0, 1, 1, 1])), "axial")


def mask_on(slices: list[int], columns: slice = slice(1, 4), count: int = 4) -> np.ndarray:
    mask = np.zeros((count, 6, 6), dtype=bool)
    mask[slices, 1:4, columns] = True
    return mask


def test_uncertain_slices_of_a_volume_are_ignored_and_the_first_target_wins() -> None:
    one = result(mask_on([1, 2]), [0.1, 0.9, 0.9, 0.1], [0.0, 0.1, 0.3, 0.0])
    two = result(mask_on([1], slice(2, 6)), [0.1, 0.8, 0.2, 0.1], [0.0] * 4, "b")
    found = pseudo_label([one, two], stack_of(), SelectionConfig(max_uncertainty=0.2))
    assert found.kept
    assert found.uncertain == (2,)
    assert set(np.unique(found.labels[2])) == {3}
    assert not found.labels[[0, 3]].any()
    assert (found.labels[1, 1, 1:6] == [1, 1, 1, 2, 2]).all()
    assert found.voxels == (18, 12)
    assert found.uncertainties == pytest.approx((0.2, 0.0))


@pytest.mark.parametrize(
    ("scores", "doubts", "drawn", "reason"),
    [
        ([0.9] * 4, [0.5] * 4, [0, 1, 2, 3], "4 of 4 slices are uncertain"),
        ([0.3] * 4, [0.0] * 4, [0, 1, 2, 3], "4 of 4 slices are uncertain"),
        ([0.1, 0.1, 0.8, 0.1], [0.0] * 4, [], "nothing was found"),
        ([0.8, 0.8, 0.8, 0.1], [0.0] * 4, [], "3 of 4 slices are uncertain"),
        ([0.9, 0.1, 0.1, 0.1], [0.0] * 4, [0], ""),
    ],
)
def test_a_case_is_left_out_for_a_reason(
    scores: list[float], doubts: list[float], drawn: list[int], reason: str
) -> None:
    found = pseudo_label([result(mask_on(drawn), scores, doubts)], stack_of(), SelectionConfig())
    assert found.reason == reason
    assert found.kept == (not reason)


def test_an_empty_picture_teaches_only_where_that_is_asked_for() -> None:
    empty = result(mask_on([], count=1), [0.1], [0.0])
    assert not pseudo_label([empty], stack_of(1), SelectionConfig()).kept
    assert pseudo_label([empty], stack_of(1), SelectionConfig(keep_empty=True)).kept
    doubtful = result(mask_on([], count=1), [0.6], [0.0])
    assert pseudo_label([doubtful], stack_of(1), SelectionConfig(keep_empty=True)).reason == "uncertain"


def test_labels_without_uncertainty_are_refused() -> None:
    plain = replace(result(mask_on([1]), [0.9] * 4, [0.0] * 4), uncertainty=None)
    with pytest.raises(SettingsError, match="segmented without uncertainty"):
        pseudo_label([plain], stack_of(), SelectionConfig())


# ------------------------------------------------------------------------------------------------------- the dataset


def test_a_picture_and_its_labels_are_stored_as_nnunet_reads_them(tmp_path: Path) -> None:
    from PIL import Image

    dataset = RawDataset.named(tmp_path, 7, "Breast", ["lesion"], ".png")
    image = Volume(np.arange(48, dtype=np.uint8).reshape(1, 6, 8), np.eye(4), spatial_dimension=2)
    labels = (image.array > 20).astype(np.uint8)
    dataset.add_case("c1", image, labels)
    dataset.add_test_image("c1", image)
    dataset.finish(1, channel="ultrasound", ignores=False)
    folder = tmp_path / "Dataset007_Breast"
    assert np.array_equal(np.asarray(Image.open(folder / "imagesTr" / "c1_0000.png")), image.array[0])
    assert np.array_equal(np.asarray(Image.open(folder / "labelsTr" / "c1.png")), labels[0])
    assert (folder / "imagesTs" / "c1_0000.png").is_file()
    assert json.loads((folder / "dataset.json").read_text()) == {
        "channel_names": {"0": "ultrasound"},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": 1,
        "file_ending": ".png",
        "overwrite_image_reader_writer": "NaturalImage2DIO",
    }
    with pytest.raises(SettingsError, match="has a dataset 7 already: Dataset007_Breast"):
        RawDataset.named(tmp_path, 7, "Other", ["lesion"], ".png")


def test_a_volume_keeps_its_grid_and_has_the_ignore_label_last(tmp_path: Path) -> None:
    import SimpleITK as sitk

    affine = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, -7], [0, 0, 3, 11], [0, 0, 0, 1]])
    image = Volume(np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32), affine)
    dataset = RawDataset.named(tmp_path, 12, "Brain", ["tumour", "oedema"], ".nii.gz")
    labels = np.random.default_rng(0).integers(0, 4, image.shape).astype(np.uint8)
    dataset.add_case("c", image, labels)
    dataset.finish(1, channel="MR", ignores=True)
    stored = sitk.ReadImage(str(dataset.folder / "imagesTr" / "c_0000.nii.gz"))
    seen = sitk.ReadImage(str(dataset.folder / "labelsTr" / "c.nii.gz"))
    assert np.allclose(stored.GetOrigin(), (5, -7, 11), atol=1e-5)
    assert np.allclose(seen.GetDirection(), stored.GetDirection())
    assert np.array_equal(sitk.GetArrayFromImage(seen), labels)
    assert np.allclose(sitk.GetArrayFromImage(stored), image.array)
    content = json.loads((dataset.folder / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "tumour": 1, "oedema": 2, "ignore": 3}
    assert content["overwrite_image_reader_writer"] == "SimpleITKIO"


def test_names_are_made_fit_and_kept_apart() -> None:
    assert list(case_names([Path("a b_flair.nii.gz"), Path("c_flair.nii.gz")], "_flair.nii.gz")) == ["a-b", "c"]
    with pytest.raises(InputError, match=r"a b.png and a_b.png would both be called 'a-b'"):
        case_names([Path("a b.png"), Path("a_b.png")], ".png")
    assert label_name(" Left lung ") == "left_lung"
    for name in ("ignore", "--", "Background"):
        with pytest.raises(SettingsError, match="cannot name a label"):
            label_name(name)


# ------------------------------------------------------------------------------------------------------ the ensemble


def test_entropy_is_shannons_between_0_and_1() -> None:
    certain, alike = np.array([1.0, 0, 0]), np.full(3, 1 / 3)
    quarter = np.array([0.25, 0.75])
    assert entropy(certain[:, None])[0] == 0
    assert entropy(alike[:, None])[0] == pytest.approx(1)
    expected = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert entropy(quarter[:, None])[0] == pytest.approx(expected)


def test_checkpoints_that_disagree_are_averaged_and_doubtful() -> None:
    one, other = np.array([[0.9], [0.1]], np.float32), np.array([[0.1], [0.9]], np.float32)
    assert np.allclose(average([one, other]), 0.5)
    assert entropy(average([one, other]))[0] == pytest.approx(1)
    assert entropy(average([one, one]))[0] < 0.5
    with pytest.raises(InputError, match="predictions of one shape"):
        average([one, one[:1]])


# ------------------------------------------------------------------------------------------------- nnU-Net's commands


def test_its_variables_are_set_for_its_processes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", "mine")
    monkeypatch.delenv("nnUNet_raw", raising=False)
    found = environment(NNUNetConfig(cycles=4, epochs=6, iterations=9), Folders(tmp_path), "cuda:2")
    assert "nnUNet_raw" not in os.environ
    assert found["nnUNet_raw"] == str(tmp_path / "nnUNet_raw")
    assert found["nnUNet_extTrainer"].split(os.pathsep) == [str(TRAINER_FOLDER), "mine"]
    assert (found["FREQSEG_CYCLES"], found["FREQSEG_EPOCHS"], found["FREQSEG_ITERATIONS"]) == ("4", "6", "9")
    assert found["CUDA_VISIBLE_DEVICES"] == "2"
    assert found["PATH"] == os.environ["PATH"]
    assert train_command(NNUNetConfig(), "cuda:2", resume=True)[-3:] == ["-device", "cuda", "--c"]
    assert environment(NNUNetConfig(), Folders(tmp_path), "cpu")["nnUNet_compile"] == "f"
    assert environment(NNUNetConfig(), Folders(tmp_path), "cpu")["nnUNet_n_proc_DA"] == "2"
    assert environment(NNUNetConfig(), Folders(tmp_path), "cpu", training=True)["nnUNet_n_proc_DA"] == "0"
    assert f"class {TRAINER}(" in (TRAINER_FOLDER / "cycles.py").read_text(encoding="utf-8")


def test_without_nnunet_the_way_to_get_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    config = {"name": "X", "images": "images", "targets": [{"prompt": "lungs"}], "nnunet": {"commands": str(tmp_path)}}
    (tmp_path / "c.json").write_text(json.dumps(config))
    assert main(["train", "pseudo-labels", str(tmp_path / "c.json"), "--device", "cpu"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "nnUNetv2_plan_and_preprocess was not found" in told
    assert "pip install 'freqseg[nnunet]'" in told
    assert "--prepare-only" in told


def script(path: Path, body: str) -> str:
    """A command in Python."""
    if os.name == "nt":
        pytest.skip("stand-ins for nnU-Net's commands are scripts with a first line that Windows does not read")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{body}", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_what_it_says_of_an_epoch_is_passed_on_and_the_rest_is_in_the_log(tmp_path: Path) -> None:
    told: list[str] = []
    body = "print('2026-01-01 10:00:00.1: Epoch 3')\nprint('noise')\nprint('2026: Pseudo dice [0.5]')"
    commands = {"x": script(tmp_path / "x", body)}
    run_command(["x", "-d", "1"], commands, os.environ, tmp_path / "log.txt", told.append)
    assert told == ["x -d 1", "nnU-Net: Epoch 3", "nnU-Net: Pseudo dice [0.5]"]
    assert "noise" in (tmp_path / "log.txt").read_text()


def test_a_command_that_fails_says_why_and_where_the_rest_is(tmp_path: Path) -> None:
    commands = {"x": script(tmp_path / "x", "raise RuntimeError('no space for patches')")}
    with pytest.raises(FreqSegError, match=r"x ended with code 1: RuntimeError: no space for patches .*log.txt"):
        run_command(["x"], commands, os.environ, tmp_path / "log.txt", lambda line: None)


def test_ctrl_c_ends_the_command_and_what_it_started(tmp_path: Path) -> None:
    body = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('Epoch', child.pid, flush=True)\ntime.sleep(600)\n"
    )
    commands = {"x": script(tmp_path / "x", body)}
    started: list[psutil.Process] = []

    def interrupted(line: str) -> None:
        if "Epoch" in line:
            child = psutil.Process(int(line.split()[-1]))
            started.extend([child, psutil.Process(child.ppid())])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_command(["x"], commands, os.environ, tmp_path / "log.txt", interrupted)
    assert len(started) == 2
    assert psutil.wait_procs(started, timeout=10)[1] == []


def test_ending_what_has_ended_does_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE, text=True)
    process.wait()
    end_tree(process)
    assert process.returncode == 0


# ------------------------------------------------------------------------------------------------------ the whole way


class Counting(TextSegmenter):
    """Counts the volumes it is given."""

    seen = 0

    def set_volume(self, *given: Any, **more: Any) -> Any:
        self.seen += 1
        return super().set_volume(*given, **more)


def segmenter_of(folder: Path) -> Counting:
    return Counting(Bright(), Boxes(), PRESET, weights_key="fake", cache=EmbeddingCache(folder / "cache"))


def recipe_in(folder: Path, **changes: Any) -> Path:
    """Two volumes with a bright box, one without; commands that stand in for nnU-Net's."""
    images = folder / "images"
    images.mkdir()
    for name, place in (("one", slice(2, 4)), ("two", slice(1, 3))):
        box_volume(target=(place, slice(8, 24), slice(36, 56)))[0].write(images / f"{name}.nii.gz")
    # bright voxels here and there, but nothing that is bright
    empty = np.where(np.random.default_rng(1).random((6, 64, 64)) < 0.02, 100, 12).astype(np.float32)
    Volume(empty, np.eye(4)).write(images / "empty.nii.gz")
    config = {
        "name": "Bright",
        "images": "images",
        "targets": [{"prompt": "bright thing"}],
        "settings": {"bottleneck": "m2ib", "train_steps": 3, "num_noise_samples": 2, "replicas": 2},
        "selection": {"max_uncertainty": 0.5},
        "nnunet": {"cycles": 2, "commands": str(folder / "bin")},
        "work": str(folder / "work"),
        **changes,
    }
    path = folder / "c.json"
    path.write_text(json.dumps(config))
    return path


# Each appends its name to a file; training leaves its checkpoint, the prediction of cycle c has probability c / 4.
STAND_IN = """
import os, sys
from pathlib import Path
import numpy as np
import SimpleITK as sitk
name, words = Path(sys.argv[0]).name, sys.argv[1:]
results, raw = Path(os.environ["nnUNet_results"]), Path(os.environ["nnUNet_raw"])
results.mkdir(parents=True, exist_ok=True)
with (results.parent / "called.txt").open("a") as file:
    file.write(name + "\\n")
if name == "nnUNetv2_train":
    fold = results / "Dataset501_Bright" / "nnUNetTrainerCycles__nnUNetPlans__2d" / "fold_0"
    fold.mkdir(parents=True)
    (fold / "checkpoint_final.pth").write_text("")
if name == "nnUNetv2_predict":
    source, target = Path(words[words.index("-i") + 1]), Path(words[words.index("-o") + 1])
    cycle = int(words[words.index("-chk") + 1].split("_")[-1][0])
    assert "--save_probabilities" in words
    target.mkdir(parents=True, exist_ok=True)
    for path in source.glob("*_0000.nii.gz"):
        shape = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).shape
        high = np.full(shape, cycle / 4, dtype=np.float32)
        np.savez(target / (path.name.replace("_0000.nii.gz", ".npz")), probabilities=np.stack([1 - high, high]))
"""


def test_certain_cases_teach_and_the_others_are_listed(tmp_path: Path) -> None:
    told: list[str] = []
    segmenter = segmenter_of(tmp_path)
    folder = train_pseudo_labels(recipe_in(tmp_path), told.append, device="cpu", prepare_only=True, segmenter=segmenter)
    assert folder == tmp_path / "work" / "Bright" / "nnUNet_raw" / "Dataset501_Bright"
    assert sorted(path.name for path in (folder / "labelsTr").iterdir()) == ["one.nii.gz", "two.nii.gz"]
    labels = Volume.read(folder / "labelsTr" / "one.nii.gz").array == 1
    truth = box_volume()[1]
    assert 2 * (labels & truth).sum() / (labels.sum() + truth.sum()) > 0.9
    with (tmp_path / "work" / "Bright" / "cases.csv").open(newline="") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    assert {case: row["kept"] for case, row in rows.items()} == {"empty": "no", "one": "yes", "two": "yes"}
    assert rows["empty"]["reason"] == "nothing was found"
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 2
    assert "2 of 3 images may teach" in told[-1]
    assert segmenter.seen == 3
    # started again, nothing is segmented twice
    again = segmenter_of(tmp_path)
    train_pseudo_labels(tmp_path / "c.json", told.append, device="cpu", prepare_only=True, segmenter=again)
    assert again.seen == 0


def test_several_checkpoints_are_joined_and_steps_are_done_once(tmp_path: Path) -> None:
    for name in ("nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict"):
        script(tmp_path / "bin" / name, STAND_IN)
    config = recipe_in(tmp_path)
    found = train_pseudo_labels(config, lambda line: None, device="cpu", segmenter=segmenter_of(tmp_path))
    assert found == tmp_path / "work" / "Bright" / "ensemble"
    called = (tmp_path / "work" / "Bright" / "called.txt").read_text().split()
    assert called == ["nnUNetv2_plan_and_preprocess", "nnUNetv2_train", *["nnUNetv2_predict"] * 2]
    # cycles 1 and 2 say 1/4 and 2/4: on average 3/8, so background
    doubt = Volume.read(found / "entropy" / "empty.nrrd")
    expected = -(3 / 8 * math.log2(3 / 8) + 5 / 8 * math.log2(5 / 8))
    assert doubt.array.shape == (6, 64, 64)
    assert np.allclose(doubt.array, expected, atol=1e-6)
    assert not Volume.read(found / "labels" / "one.nii.gz").array.any()
    train_pseudo_labels(config, lambda line: None, device="cpu", segmenter=segmenter_of(tmp_path))
    assert (tmp_path / "work" / "Bright" / "called.txt").read_text().split() == called


def test_bad_images_are_listed_and_an_empty_harvest_says_why(tmp_path: Path) -> None:
    config = recipe_in(tmp_path, selection={"max_uncertainty": 0.5, "min_score": 1.0})
    (tmp_path / "images" / "damaged.nii.gz").write_bytes(b"no image")
    shutil.move(tmp_path / "images" / "damaged.nii.gz", tmp_path / "images" / "zz.nii.gz")
    with pytest.raises(InputError, match="none of the 4 images gave a label that may teach"):
        train_pseudo_labels(
            config, lambda line: None, device="cpu", prepare_only=True, segmenter=segmenter_of(tmp_path)
        )
    assert "zz.nii.gz" in (tmp_path / "work" / "Bright" / "cases.csv").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": "nowhere"}, "folder of images does not exist"),
        ({"image_ending": ".png"}, "no file name ends with '.png'"),
        ({"target": []}, "there is no key 'target'; did you mean 'targets'"),
        ({"targets": []}, "at least one thing to look for"),
        ({"name": "two words"}, "letters and digits"),
        ({"nnunet": {"fold": "5"}}, "fold must be one of 0, 1, 2, 3, 4, all, got '5'"),
    ],
)
def test_a_wrong_configuration_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((SettingsError, InputError), match=message):
        train_pseudo_labels(recipe_in(tmp_path, **changes), lambda line: None, device="cpu", prepare_only=True)


def test_two_targets_of_one_name_are_refused() -> None:
    with pytest.raises(SettingsError, match="two targets have one name: left_lung, left_lung"):
        from_mapping(
            PseudoLabelRecipe,
            {"name": "X", "images": "i", "targets": [{"prompt": "left lung"}, {"prompt": "Left  lung"}]},
            "test",
        )


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.timeout(3600)
def test_nnunet_itself_learns_from_pseudo_labels(shared_data: Path, lite_weights: Path, tmp_path: Path) -> None:
    """Its own commands on real ultrasound images: two cycles of one short epoch, on the CPU."""
    folder = os.environ.get("FREQSEG_NNUNET", "")
    try:
        find_commands(folder)
    except SettingsError:
        pytest.skip("nnU-Net is not installed (pip install 'freqseg[nnunet]', or FREQSEG_NNUNET: its commands' folder)")
    from PIL import Image

    images = tmp_path / "images"
    images.mkdir()
    source = sorted((shared_data / "segmentation" / "busi" / "train" / "images").glob("*.png"))
    for path in [path for path in source if path.name.startswith("benign")][:6]:
        Image.open(path).convert("L").resize((128, 128)).save(images / path.name)
    config = {
        "name": "Breast",
        "images": "images",
        "image_ending": ".png",
        "targets": [{"prompt": "breast lesion on ultrasound", "name": "lesion"}],
        "channel": "ultrasound",
        "settings": {"method": "zero-shot", "train_steps": 3, "num_noise_samples": 2, "replicas": 2},
        "selection": {"max_uncertainty": 1.0, "max_empty_score": 1.0, "keep_empty": True},
        "nnunet": {"cycles": 2, "epochs": 1, "iterations": 2, "processes": 1, "gpu_memory": 1, "commands": folder},
        "work": str(tmp_path / "work"),
    }
    (tmp_path / "c.json").write_text(json.dumps(config))
    told: list[str] = []
    found = train_pseudo_labels(tmp_path / "c.json", told.append, device="cpu")
    assert [line for line in told if line.startswith("nnU-Net: Epoch ")] == ["nnU-Net: Epoch 0", "nnU-Net: Epoch 1"]
    assert len(list((found / "labels").glob("*.png"))) == 6
    doubt = Volume.read(next((found / "entropy").glob("*.nrrd"))).array
    assert 0 < float(doubt.mean()) <= 1
    fold = next((tmp_path / "work" / "Breast" / "nnUNet_results").glob("*/*/fold_0"))
    assert {"checkpoint_cycle_1.pth", "checkpoint_cycle_2.pth", "checkpoint_final.pth"} <= {
        path.name for path in fold.iterdir()
    }
