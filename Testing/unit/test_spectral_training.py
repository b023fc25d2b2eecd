"""Training of spectral models on made-up images: from the configuration to a model's folder, broken off and resumed."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from two_processes import run_twice

from FreqSegLib.errors import FreqSegError, InputError, OutputError, SettingsError, WeightsError
from FreqSegLib.mamba.blocks import Stage
from FreqSegLib.mamba.model_config import WEIGHTS_FILE, InputConfig, ModelConfig, SpectralModel, read_config
from FreqSegLib.spectral_segmentation import SpectralSegmenter
from FreqSegLib.training import spectral_test
from FreqSegLib.training.spectral_config import AugmentConfig, DataConfig, LossConfig, SpectralRecipe, TrainingConfig
from FreqSegLib.training.spectral_data import Batches, Pair, augmented, find_pairs, load_split, read_items, split
from FreqSegLib.training.spectral_recipe import SpectralTraining, train_spectral
from FreqSegLib.volume import Volume

AFFINE = np.diag([1.0, 1.0, 1.0, 1.0])
VOLUMES: dict[str, Any] = {
    "data": {
        "labels": "labels",
        "image_ending": ".nii.gz",
        "label_ending": ".nii.gz",
        "classes": ["lower", "upper"],
        "binary": False,
    },
    "input": {"form": "volume"},
    "model": {"dimensions": 3, "out_channels": 3, "patch_size": 2},
}
"""Of a configuration for what :func:`write_volumes` writes."""


def write_images(folder: Path, count: int = 8, side: int = 24, labels: tuple[int, ...] = (255,)) -> None:
    """Grey pictures with a bright square a label; ``images/x0.png`` and ``masks/x0.png``."""
    made = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image = made.integers(20, 60, (1, side, side)).astype(np.uint8)
        mask = np.zeros_like(image)
        for value in labels:
            row, column = made.integers(1, side - 9, 2)
            image[0, row : row + 8, column : column + 8] = 200
            mask[0, row : row + 8, column : column + 8] = value
        for kind, array in (("images", image), ("masks", mask)):
            Volume(array, AFFINE, spatial_dimension=2).write(folder / kind / f"x{number}.png", overwrite=True)


def write_volumes(folder: Path, shapes: tuple[tuple[int, int, int], ...]) -> None:
    made = np.random.default_rng(1)
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number, shape in enumerate(shapes):
        image = made.normal(100, 5, shape).astype(np.float32)
        label = np.zeros(shape, np.uint8)
        label[2:5, 3:8, 3:9] = 1
        label[5:7, 3:8, 3:9] = 2
        image += label * 60
        for kind, array in (("images", image), ("labels", label)):
            Volume(array, AFFINE).write(folder / kind / f"v{number}.nii.gz", overwrite=True)


def configuration(folder: Path, **changes: Any) -> Path:
    """A tiny configuration beside the images; ``changes`` go into its sections."""
    content: dict[str, Any] = {
        "name": "tiny",
        "data": {
            "images": "images",
            "labels": "masks",
            "image_ending": ".png",
            "label_ending": ".png",
            "classes": ["square"],
            "binary": True,
        },
        "input": {"form": "image", "side": 24},
        "model": {
            "out_channels": 2,
            "img_size": 24,
            "base_channels": 4,
            "num_stages": 2,
            "depth": 1,
            "d_state": 2,
            "detail_channels": 2,
            "dropout": 0.1,
        },
        "training": {"epochs": 3, "batch_size": 4, "validation_share": 0.25, "warmup_epochs": 1},
    }
    for section, values in changes.items():
        content[section] = {**content.get(section, {}), **values} if isinstance(values, dict) else values
    path = folder / "tiny.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def recipe(folder: Path, **changes: Any) -> SpectralRecipe:
    return read_config(configuration(folder, **changes), SpectralRecipe)


def rows(work: Path) -> list[dict[str, str]]:
    with (work / "tiny" / "log.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder)
    return folder


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """(work folder, model folder, what was said) of an unbroken run."""
    folder = tmp_path_factory.mktemp("trained")
    said: list[str] = []
    model = train_spectral(configuration(images), folder / "work", folder / "models", device="cpu", report=said.append)
    return folder / "work", model, said


def test_a_run_leaves_weights_description_card_log_and_curves(trained: tuple[Path, Path, list[str]]) -> None:
    work, model, said = trained
    assert sorted(path.name for path in model.iterdir()) == ["README.md", "model.json", "model.safetensors"]
    assert SpectralModel.read(model).classes[0].name == "square"
    card = (model / "README.md").read_text(encoding="utf-8")
    found = rows(work)
    best = max(float(row["score"]) for row in found)
    assert f"DSC on 2 validation cases that chose the checkpoint: {best:.4f}; with the weights as stored: " in card
    chosen = SpectralModel.read(model).smallest_part
    assert (f"Parts under {chosen:.0%} of the largest" if chosen else "All parts are kept") in card
    assert "boundary IoU" not in card
    assert [float(row["step"]) for row in found] == [2, 4, 6]
    assert {"loss", "score", "train_dice", "train_focal", "train_frequency", "train_boundary"} <= set(found[0])
    assert (work / "tiny" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "6 training images of 6 cases, 2 validation images of 2" in said[0]


def test_the_card_says_what_the_weights_score_as_they_are_stored(
    images: Path, trained: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    shutil.copytree(trained[0], tmp_path / "work")
    config = configuration(images, data={"test_images": "images", "test_labels": "masks"}, training={"stored": "int8"})
    model = train_spectral(config, tmp_path / "work", tmp_path / "models", device="cpu", report=lambda line: None)
    assert rows(tmp_path / "work") == rows(trained[0])
    segmenter = SpectralSegmenter.from_model(model, "cpu")
    scores = []
    for pair in find_pairs(read_config(config, SpectralRecipe).data, images, test=True):
        mask = segmenter.segment(Volume.read(pair.image)).classes[0].mask
        truth = Volume.read(pair.label).array > 0
        scores.append(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))
    assert len(scores) == 8
    card = (model / "README.md").read_text(encoding="utf-8")
    assert f"| square | 8 | {np.mean(scores):.3f} ± {np.std(scores, ddof=1):.3f} |" in card
    assert "parameters, stored as int8" in card
    assert "On the 8 images of images, looked at after training" in card


def test_a_model_without_the_spectral_parts_says_so_and_is_smaller(
    images: Path, trained: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    config = configuration(images, model={"spectral": False}, loss={"freq_weight": 0}, training={"epochs": 1})
    said: list[str] = []
    model = train_spectral(config, tmp_path / "work", tmp_path / "models", device="cpu", report=said.append)
    card = (model / "README.md").read_text(encoding="utf-8")
    assert "parameters (without the spectral path and the loss's frequency term), stored as" in card
    assert "(without" not in (trained[1] / "README.md").read_text(encoding="utf-8")
    assert not SpectralModel.read(model).model.spectral
    assert (model / WEIGHTS_FILE).stat().st_size < (trained[1] / WEIGHTS_FILE).stat().st_size
    found = SpectralSegmenter.from_model(model, "cpu").segment(Volume.read(next((images / "images").glob("*.png"))))
    assert found.classes[0].mask.shape[0] == 1


def test_a_model_with_convolutions_says_so_and_is_used_again(images: Path, tmp_path: Path) -> None:
    config = configuration(
        images,
        model={"stem": "convolutions", "stage_convolutions": 1},
        loss={"freq_weight": 0},
        training={"epochs": 1, "stored": "int8"},
    )
    model = train_spectral(config, tmp_path / "work", tmp_path / "models", device="cpu", report=lambda line: None)
    card = (model / "README.md").read_text(encoding="utf-8")
    assert "parameters (with a stem of convolutions, with convolutions before each scan, without the loss's" in card
    assert SpectralModel.read(model).model.stem == "convolutions"
    found = SpectralSegmenter.from_model(model, "cpu").segment(Volume.read(next((images / "images").glob("*.png"))))
    assert found.classes[0].mask.shape[0] == 1


def test_a_run_killed_without_warning_goes_on_with_the_same_curve(
    trained: tuple[Path, Path, list[str]], images: Path, project_root: Path, tmp_path: Path
) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from FreqSegLib.training.spectral_recipe import train_spectral\n"
        "def told(line):\n    print(line, flush=True)\n    if line.startswith('step 2 '): time.sleep(600)\n"
        "train_spectral(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), device='cpu', report=told)\n"
    )
    config = configuration(images)
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(config), str(tmp_path), str(tmp_path / "models")],
        cwd=project_root,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("step 2 "):
            break
    child.kill() if os.name == "nt" else child.send_signal(signal.SIGKILL)
    child.wait(60)
    assert len(rows(tmp_path)) == 1
    train_spectral(config, tmp_path, tmp_path / "models", device="cpu", report=lambda line: None)
    work, model, _ = trained
    assert rows(tmp_path) == rows(work)
    assert (tmp_path / "models" / "tiny" / "model.safetensors").read_bytes() == (
        model / "model.safetensors"
    ).read_bytes()


def test_a_work_folder_belongs_to_one_configuration_but_for_words(images: Path, tmp_path: Path) -> None:
    def train(**changes: Any) -> None:
        config = configuration(images, **{"training": {"epochs": 1}, **changes})
        train_spectral(config, tmp_path / "work", tmp_path / "models", device="cpu", report=lambda line: None)

    train()
    before = rows(tmp_path / "work")
    train(description="in other words")
    assert rows(tmp_path / "work") == before
    with pytest.raises(SettingsError, match="holds a run of another recipe; give another work folder"):
        train(training={"epochs": 1, "learning_rate": 0.1})
    assert rows(tmp_path / "work") == before


@pytest.mark.parametrize("kept", [0, 500, 4000])
def test_a_damaged_checkpoint_is_named_and_nothing_is_lost(images: Path, tmp_path: Path, kept: int) -> None:
    config = configuration(images, training={"epochs": 1})
    train_spectral(config, tmp_path, tmp_path / "models", device="cpu", report=lambda line: None)
    checkpoint = tmp_path / "tiny" / "last.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:kept])
    before = {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()}
    with pytest.raises(WeightsError, match=r"last\.pt is damaged .* delete its folder to start anew"):
        train_spectral(config, tmp_path, tmp_path / "models", device="cpu", report=lambda line: None)
    assert {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()} == before


def test_two_processes_average_their_gradients(images: Path, project_root: Path, tmp_path: Path) -> None:
    """One step of two processes is one step on both halves of the batch, their gradients averaged."""
    changes = {
        "training": {"epochs": 1, "steps_per_epoch": 1, "batch_size": 4, "warmup_epochs": 0, "stored": "float32"},
        "model": {"dropout": 0.0},
    }
    config = configuration(images, **changes)
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from FreqSegLib.training.spectral_recipe import train_spectral\n"
        f"train_spectral(Path({str(config)!r}), Path(sys.argv[1]), Path(sys.argv[1]) / 'models', device='cpu')\n"
    )
    first, second = run_twice(code, tmp_path, project_root)
    assert "score" in first
    assert second == ""

    runs = [SpectralTraining(recipe(images, **changes), images, tmp_path, rank=rank, world=1) for rank in range(2)]
    halves = [
        Batches(run.batches.items, run.recipe.training, run.recipe.augment, rank, 2) for rank, run in enumerate(runs)
    ]
    for run, half in zip(runs, halves, strict=True):
        batch = half[0]
        run.trainee.train()
        run.trainee(batch.images, batch.labels)[0].backward()
    single = runs[0].trainee
    for one, other in zip(single.parameters(), runs[1].trainee.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        one.grad = (one.grad + other.grad) / 2
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in single.parameters() if p.dim() > 1], "weight_decay": 0.05},
            {"params": [p for p in single.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=1e-3,
    )
    torch.nn.utils.clip_grad_norm_(single.parameters(), 1.0)
    optimiser.step()
    from safetensors.torch import load_file

    written = load_file(tmp_path / "models" / "tiny" / "model.safetensors")
    truth = runs[0].network.state_dict()
    # Adam's first step is the rate in the gradient's direction, so rounding of gradients near zero shows at full size
    differences = torch.cat([(written[key] - value).abs().flatten() for key, value in truth.items()])
    assert float((differences > 1e-5).double().mean()) < 0.01


def test_a_typo_in_the_configuration_names_the_key_and_the_nearest(images: Path) -> None:
    with pytest.raises(SettingsError, match=r"tiny.json: training: there is no key 'learning_rat'.*'learning_rate'"):
        recipe(images, training={"learning_rat": 1})
    with pytest.raises(SettingsError, match="training: epochs must be a whole number, got 'ten'"):
        recipe(images, training={"epochs": "ten"})
    with pytest.raises(SettingsError, match="training: epochs must be at least 1, got 0"):
        recipe(images, training={"epochs": 0})
    with pytest.raises(SettingsError, match="input: form must be one of image, slices, volume, got 'picture'"):
        recipe(images, input={"form": "picture"})
    with pytest.raises(SettingsError, match="3 outputs, background included, but 1 classes"):
        recipe(images, model={"out_channels": 3})
    with pytest.raises(SettingsError, match="crop must have 2 sides"):
        recipe(images, training={"crop": [8, 8, 8]})


def test_toml_says_the_same_as_json(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("tomllib")
    path = tmp_path / "a.toml"
    path.write_text(
        'name = "a"\n[data]\nimages = "i"\nlabels = "l"\nclasses = ["x"]\n[model]\nout_channels = 2\ndepth = [2, 1]\n'
        "num_stages = 2\n",
        encoding="utf-8",
    )
    found = read_config(path, SpectralRecipe)
    assert found.model.depth == (2, 1)
    assert found.training == TrainingConfig()
    path.write_text("name = ", encoding="utf-8")
    with pytest.raises(SettingsError, match="cannot be parsed"):
        read_config(path, SpectralRecipe)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training": {"seed": -5}}, "seed must be at least 0, got -5"),
        ({"augment": {"noise": -0.1}}, "noise must be at least 0, got -0.1"),
        ({"augment": {"rotation": -400}}, "rotation must be at least 0, got -400"),
        ({"augment": {"scale": 1.0}}, "scale must be below 1, got 1.0"),
        ({"loss": {"gamma": -1}}, "gamma must be at least 0, got -1"),
        ({"loss": {"adversarial_weight": -1}}, "adversarial_weight must be at least 0, got -1"),
        ({"data": {"test_images": "test"}}, "test_images and test_labels belong together"),
        ({"data": {"binary": False, "classes": ["a", "a"]}}, "classes must differ, 'a' is named twice"),
    ],
)
def test_numbers_out_of_range_and_halves_of_pairs_are_named(images: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        recipe(images, **changes)


def test_missing_test_images_and_classes_that_nothing_shows_are_named_before_training(
    images: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"the folder of images does not exist: .*nowhere"):
        load_split(recipe(images, data={"test_images": "nowhere", "test_labels": "nowhere2"}), images)
    write_volumes(tmp_path, ((10, 12, 12),) * 3)
    data = {"labels": "labels", "image_ending": ".nii.gz", "label_ending": ".nii.gz", "binary": False}
    two = {"classes": ["one", "two"], **data}
    load_split(recipe(tmp_path, data=two, input={"form": "slices"}, model={"out_channels": 3}), tmp_path)
    three = recipe(
        tmp_path, data={**two, "classes": ["one", "two", "heart"]}, input={"form": "slices"}, model={"out_channels": 4}
    )
    with pytest.raises(InputError, match=r"no training image shows 'heart' \(label 3\)"):
        load_split(three, tmp_path)


def test_labels_that_lie_elsewhere_are_named(tmp_path: Path) -> None:
    write_volumes(tmp_path, ((10, 12, 12),) * 2)
    path = tmp_path / "labels" / "v0.nii.gz"
    moved = AFFINE.copy()
    moved[0, 3] = 50
    label = Volume.read(path)
    Volume(label.array, moved).write(path, overwrite=True)
    data = DataConfig("images", "labels", ("one", "two"))
    pair = next(pair for pair in find_pairs(data, tmp_path) if pair.name == "v0")
    with pytest.raises(InputError, match=r"lie apart by more than half a voxel \(origins .*50"):
        read_items(pair, data, InputConfig())


def test_every_key_of_a_configuration_is_documented(project_root: Path) -> None:
    page = (project_root / "docs" / "spectral.md").read_text(encoding="utf-8")
    kinds = (SpectralRecipe, DataConfig, InputConfig, ModelConfig, LossConfig, AugmentConfig, TrainingConfig)
    missing = [
        f"{kind.__name__}.{item.name}" for kind in kinds for item in fields(kind) if f"`{item.name}`" not in page
    ]
    assert not missing


def test_images_without_labels_and_empty_folders_are_named(tmp_path: Path) -> None:
    write_images(tmp_path, count=3)
    config = recipe(tmp_path).data
    (tmp_path / "masks" / "x1.png").unlink()
    with pytest.raises(InputError, match=r"x1.png has no label; add it"):
        find_pairs(config, tmp_path)
    (tmp_path / "images" / "x1.png").unlink()
    (tmp_path / "images" / "x2.png").unlink()
    with pytest.raises(InputError, match=r"masks.x2.png has no image"):
        find_pairs(config, tmp_path)
    (tmp_path / "masks" / "x2.png").unlink()
    with pytest.raises(InputError, match="at least 2 images"):
        split(find_pairs(config, tmp_path), 0.2)
    with pytest.raises(InputError, match="does not exist"):
        find_pairs(config, tmp_path / "nowhere")


def test_labels_outside_the_classes_and_labels_that_are_nowhere_are_named(tmp_path: Path) -> None:
    write_images(tmp_path, count=3, labels=(7,))
    with pytest.raises(InputError, match=r"x\d.png: labels must be 0 \(background\) to 1 \(square\), got 7"):
        load_split(recipe(tmp_path, data={"binary": False}), tmp_path)
    write_images(tmp_path, count=3, labels=())
    with pytest.raises(InputError, match="no training image has a labelled voxel"):
        SpectralTraining(recipe(tmp_path), tmp_path, tmp_path / "work")


def test_a_loss_that_is_not_finite_names_the_images(images: Path, tmp_path: Path) -> None:
    run = SpectralTraining(recipe(images), images, tmp_path)
    with torch.no_grad():
        run.network.head.bias.fill_(float("nan"))
    names = ", ".join(run.batches[3].names)
    with pytest.raises(FreqSegError, match=f"became nan at step 3 .* on the images {names}"):
        run.batch_loss(3)


def test_images_of_different_sizes_need_a_crop(tmp_path: Path) -> None:
    write_volumes(tmp_path, ((8, 10, 12), (9, 12, 12), (8, 10, 12)))
    with pytest.raises(SettingsError, match="2 sizes"):
        SpectralTraining(
            recipe(tmp_path, **VOLUMES, training={"validation_share": 0.34, "seed": 0}), tmp_path, tmp_path / "w"
        )
    changes = {**VOLUMES, "training": {"epochs": 1, "batch_size": 2, "crop": [8, 8, 16], "validation_share": 0.34}}
    folder = train_spectral(
        configuration(tmp_path, **changes), tmp_path / "work", tmp_path / "models", device="cpu", report=lambda x: None
    )
    assert SpectralModel.read(folder).input.form == "volume"
    found = rows(tmp_path / "work")
    assert {"dsc_1", "dsc_2"} <= set(found[0])


def test_an_adversary_trains_along_and_is_not_shipped(images: Path, tmp_path: Path) -> None:
    config = configuration(images, loss={"adversarial_weight": 0.01}, training={"epochs": 1})
    folder = train_spectral(config, tmp_path, tmp_path / "models", device="cpu", report=lambda line: None)
    assert {"train_adversarial", "train_discriminator"} <= set(rows(tmp_path)[0])
    from safetensors.torch import load_file

    assert not any("discriminator" in key for key in load_file(folder / "model.safetensors"))


def test_the_adversary_changes_the_network_and_checkpointing_does_not(images: Path, tmp_path: Path) -> None:
    trained = {}
    for name, changes in {
        "plain": {},
        "adversary": {"loss": {"adversarial_weight": 0.5}},
        "checkpointing": {"training": {"checkpointing": True}},
    }.items():
        training = {"epochs": 1, "stored": "float32", **changes.pop("training", {})}
        run = SpectralTraining(recipe(images, training=training, **changes), images, tmp_path / name)
        assert all(
            stage.checkpointing == (name == "checkpointing")
            for stage in run.network.modules()
            if isinstance(stage, Stage)
        )
        run.fit(lambda line: None)
        trained[name] = torch.cat([value.detach().flatten() for value in run.network.parameters()])
    assert torch.allclose(trained["plain"], trained["checkpointing"], atol=1e-5)
    assert not torch.allclose(trained["plain"], trained["adversary"], atol=1e-3)


def batches(images: Path, **training: Any) -> Batches:
    chosen = recipe(images, training=training)
    train, _ = load_split(chosen, images)
    return Batches(train, chosen.training, chosen.augment)


def test_a_batch_depends_on_its_step_alone_and_workers_change_nothing(images: Path) -> None:
    found = batches(images)
    in_turn = list(found.loader(2, workers=0))
    assert len(in_turn) == len(found) - 2
    assert torch.equal(in_turn[1].images, found[3].images)
    assert not torch.equal(found[2].images, found[3].images)
    for worked, plain in zip(found.loader(2, workers=1), in_turn, strict=True):
        assert torch.equal(worked.images, plain.images)
        assert worked.names == plain.names


def test_an_epoch_shows_every_image_once(images: Path) -> None:
    found = batches(images, batch_size=3, foreground_share=0.0)
    assert sorted(found.chosen(0) + found.chosen(1)) == list(range(6))
    assert found.chosen(0) != found.chosen(2)


def test_enough_of_a_batch_shows_a_label(images: Path) -> None:
    found = batches(images, batch_size=4, foreground_share=0.5)
    found.shows = [True, False, False, False, False, False]
    found.foreground = [0]
    assert all(sum(index == 0 for index in found.chosen(step)) >= 2 for step in range(6))


def test_augmentation_moves_image_and_labels_together_and_keeps_shapes() -> None:
    still = AugmentConfig(gamma=0, brightness=0, contrast=0, noise=0, flip_axes=(0, 1), rotation=40, scale=0, shift=0.1)
    for size in ((60, 36), (24, 36, 30)):
        places = torch.stack(torch.meshgrid(*[torch.arange(side) - side / 2 for side in size], indexing="ij"))
        label = (places.square().sum(0) < 49).to(torch.uint8)[None]
        for seed in range(5):
            image, moved = augmented(label[None].float(), label, still, np.random.default_rng(seed))
            assert float(((image[0] > 0.5) == (moved > 0)).float().mean()) > 0.97
            assert float(moved.sum()) == pytest.approx(float(label.sum()), rel=0.06)
            # a ball stays a ball, also where the sides differ
            spreads = moved[0].nonzero().float().std(0)
            assert float(spreads.max() / spreads.min()) < 1.06


def test_greys_stay_in_range_and_nothing_asked_changes_nothing() -> None:
    image, label = torch.rand(1, 1, 9, 9), torch.zeros(1, 9, 9, dtype=torch.uint8)
    none = AugmentConfig(0, 0, 0, (), 0, 0, 0, 0)
    kept, _ = augmented(image, label, none, np.random.default_rng(0))
    assert torch.allclose(kept, image, atol=1e-6)
    changed, _ = augmented(image, label, AugmentConfig(brightness=0.5), np.random.default_rng(0))
    assert float(changed.min()) >= 0
    assert float(changed.max()) <= 1


def test_the_share_of_parts_dropped_is_chosen_by_dsc_and_has_to_gain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = np.zeros((1, 40, 40), np.uint8)
    truth[0, 5:25, 5:25] = 1
    image, label = tmp_path / "image.nrrd", tmp_path / "label.nrrd"
    Volume(truth, np.eye(4)).write(image)
    Volume(truth, np.eye(4)).write(label)

    class Drawn:
        def __init__(self, mask: NDArray[np.uint8]) -> None:
            self.classes = (types.SimpleNamespace(mask=mask > 0),)

        def segment(self, volume: Volume, **settings: object) -> tuple[types.SimpleNamespace, ...]:
            return self.classes

    recipe = types.SimpleNamespace(data=DataConfig(images="images", labels="labels", classes=("square",)))

    def chosen(mask: NDArray[np.uint8]) -> dict[float, float]:
        return spectral_test.choose_smallest_part(Drawn(mask), recipe, [Pair("a", image, label)])  # type: ignore[arg-type]

    wrong = truth.copy()
    # a fifth of the square's size, far from it
    wrong[0, 30:38, 30:40] = 1
    found = chosen(wrong)
    assert next(iter(found)) == 0.3
    assert found[0.3] == found[1.0] == 1
    assert found[0.0] == pytest.approx(2 * 400 / (400 + 480))
    # one pixel more or less is no reason
    speck = truth.copy()
    speck[0, 38, 38] = 1
    assert next(iter(chosen(speck))) == 0


def test_the_split_does_not_change_when_images_are_added(tmp_path: Path) -> None:
    write_images(tmp_path, count=6)
    config = recipe(tmp_path).data
    before = {pair.name for pair in split(find_pairs(config, tmp_path), 0.34)[1]}
    write_images(tmp_path, count=7)
    after = {pair.name for pair in split(find_pairs(config, tmp_path), 0.3)[1]}
    assert len(before & after) >= len(before) - 1


def test_tensorboard_is_written_or_its_absence_said(images: Path, tmp_path: Path) -> None:
    run = SpectralTraining(recipe(images, training={"tensorboard": True}), images, tmp_path)
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(SettingsError, match="pip install tensorboard"):
            run.fit(lambda line: None)
        return
    run.fit(lambda line: None)
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_model_of_another_run_is_replaced_only_when_asked(
    trained: tuple[Path, Path, list[str]], images: Path, tmp_path: Path
) -> None:
    _, model, _ = trained
    models = tmp_path / "models"
    shutil.copytree(model, models / "tiny")
    before = (models / "tiny" / WEIGHTS_FILE).read_bytes()
    config = configuration(images, training={"seed": 5, "epochs": 1})
    with pytest.raises(OutputError, match=r"tiny holds a model already.*--overwrite"):
        train_spectral(config, tmp_path / "work", models, device="cpu", report=lambda line: None)
    assert not (tmp_path / "work").exists()
    assert (models / "tiny" / WEIGHTS_FILE).read_bytes() == before
    train_spectral(config, tmp_path / "work", models, device="cpu", overwrite=True, report=lambda line: None)
    assert (models / "tiny" / WEIGHTS_FILE).read_bytes() != before
    # its own is written again: the run is at its end
    train_spectral(config, tmp_path / "work", models, device="cpu", report=lambda line: None)


def test_what_is_unusual_about_the_images_is_said_once(tmp_path: Path) -> None:
    from PIL import Image

    write_images(tmp_path, count=4)
    for path in (tmp_path / "images").iterdir():
        picture = Image.open(path).convert("RGB")
        picture.putpixel((0, 0), (90, 20, 10))
        picture.save(path)
    said: list[str] = []
    load_split(recipe(tmp_path), tmp_path, said.append)
    assert len(said) == 1
    assert "luminance" in said[0]
    assert said[0].endswith("(and 3 more images like it)")


def test_images_that_cannot_be_used_are_named_with_their_file(tmp_path: Path) -> None:
    write_volumes(tmp_path, ((8, 10, 12),) * 3)
    path = tmp_path / "images" / "v1.nii.gz"
    array = np.array(Volume.read(path).array)
    array[0, 0, 0] = np.nan
    Volume(array, AFFINE).write(path, overwrite=True)
    with pytest.raises(InputError, match=r"images.v1\.nii\.gz: .*1 of 960 voxels are NaN.*fill_nonfinite"):
        load_split(recipe(tmp_path, **VOLUMES), tmp_path)
    filled = recipe(tmp_path, **{**VOLUMES, "data": {**VOLUMES["data"], "fill_nonfinite": 0}})
    said: list[str] = []
    load_split(filled, tmp_path, said.append)
    assert said == ["v1: 1 voxels were NaN or infinite and are now 0"]
    too_thick = {**VOLUMES, "model": {**VOLUMES["model"], "patch_size": [16, 2, 2]}}
    Volume(np.zeros((8, 10, 12), np.float32), AFFINE).write(path, overwrite=True)
    with pytest.raises(InputError, match=r"images.v1\.nii\.gz: "):
        load_split(filled, tmp_path)
    array[0, 0, 0] = 0
    Volume(array, AFFINE).write(path, overwrite=True)
    with pytest.raises(SettingsError, match=r"v\d has \(8, 10, 12\) voxels .* one patch of the network \(16, 2, 2\)"):
        SpectralTraining(recipe(tmp_path, **too_thick), tmp_path, tmp_path / "work")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"input": {"side": 24}, "model": {"patch_size": 32}},
            r"side must be at least one patch.*\(32 pixels\), got 24",
        ),
        ({"training": {"crop": [16, 2]}}, r"crop must be at least one patch of the network \(4, 4\), got \(16, 2\)"),
    ],
)
def test_sizes_below_a_patch_are_named_in_the_configuration(images: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        recipe(images, **changes)


def test_a_first_step_that_is_not_finite_promises_no_checkpoint(images: Path, tmp_path: Path) -> None:
    run = SpectralTraining(recipe(images), images, tmp_path)
    with torch.no_grad():
        run.network.head.bias.fill_(float("nan"))
    with pytest.raises(FreqSegError) as caught:
        run.batch_loss(0)
    assert "checkpoint" not in str(caught.value)
    (tmp_path / "last.pt").touch()
    with pytest.raises(FreqSegError, match="The last checkpoint is intact"):
        run.batch_loss(0)
