"""Training the fusion networks: split by patient, one score, exact resume, weights that the catalogue finds."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from FreqSegLib.errors import InputError, SettingsError
from FreqSegLib.fusion import fusion_method
from FreqSegLib.fusion.losses import HybridLoss, MetricLoss
from FreqSegLib.fusion.network import WEIGHTS_FILE
from FreqSegLib.fusion.rules import Average, Maximum
from FreqSegLib.training import fusion_recipe, fusion_score
from FreqSegLib.training.fusion_data import FOLDER, PATIENTS, Split, patient_of, read_pairs
from FreqSegLib.training.fusion_recipe import (
    PHASES,
    RECIPES,
    FusionRecipe,
    FusionTask,
    build_network,
    command_for,
    learning_rate,
    phase_of,
    recipe_for,
    train_fusion,
    train_network,
)

TINY = FusionRecipe(batch_size=2, epochs=4, crop=16, validate_every=1, patience=10)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder in the layout of the real one: one small slice a patient, two for the training ones."""
    random = np.random.default_rng(0)
    for split, patients in PATIENTS.items():
        for patient in patients:
            for number in range(2 if split == "train" else 1):
                for kind in ("CT", "MRI"):
                    folder = tmp_path / "data" / FOLDER / kind
                    folder.mkdir(parents=True, exist_ok=True)
                    noise = ndimage.gaussian_filter(random.standard_normal((24, 28)), 1.5)
                    grey = np.uint8(np.clip(128 + 300 * noise, 0, 255))
                    Image.fromarray(grey).save(folder / f"{patient}{5 + number:03d}.png")
    return tmp_path / "data"


def test_patients_are_in_one_split_only_and_slices_follow_their_patient(data: Path) -> None:
    every = [patient for patients in PATIENTS.values() for patient in patients]
    assert len(every) == len(set(every))
    assert [patient_of(name) for name in ("2004", "20005", "41023")] == ["2", "20", "41"]
    splits: tuple[Split, ...] = ("train", "validation", "test")
    for split in splits:
        assert {patient_of(name) for name in read_pairs(data, split).names} == set(PATIENTS[split])


@pytest.mark.data
def test_the_real_slices_are_all_used_once(shared_data: Path) -> None:
    splits: tuple[Split, ...] = ("train", "validation", "test")
    names = [name for split in splits for name in read_pairs(shared_data, split).names]
    assert sorted(names) == sorted(path.stem for path in (shared_data / FOLDER / "CT").glob("*.png"))
    assert len(names) == len(set(names)) == 149


def test_grey_levels_are_read_as_they_are(data: Path) -> None:
    pairs = read_pairs(data, "validation")
    with Image.open(data / FOLDER / "MRI" / f"{pairs.names[0]}.png") as image:
        assert np.array_equal(255 * pairs.mr[0, 0].numpy(), np.asarray(image, dtype=np.float32))


def test_a_slice_without_partner_and_a_missing_folder_are_named(data: Path) -> None:
    (data / FOLDER / "MRI" / "28005.png").unlink()
    with pytest.raises(InputError, match=r"1 slices are in one of CT and MRI only, the first is 28005\.png"):
        read_pairs(data, "train")
    with pytest.raises(InputError, match="set FREQSEG_DATA"):
        read_pairs(data / "nowhere", "train")


def test_the_score_counts_clear_leads_and_nothing_beyond() -> None:
    baseline = dict.fromkeys(fusion_score.KEYS, 1.0)
    assert fusion_score.score(baseline, {"a": baseline}) == 0
    assert fusion_score.score({**baseline, "SF": 5.0}, {"a": baseline}) == pytest.approx(1 / 8)
    assert fusion_score.score({**baseline, "SF": 1.01, "EN": 0.5}, {"a": baseline}) == pytest.approx((0.5 - 1) / 8)
    row = {**baseline, "SF": 1.01, "EN": 0.5}
    assert fusion_score.wins(row, {"a": baseline}) == {"a": ["SF"]}


def test_tables_hold_the_evaluations_metrics_and_are_kept_for_the_same_slices_only(data: Path, tmp_path: Path) -> None:
    from FreqSegLib.evaluation.fusion_metrics import fusion_table

    pairs = read_pairs(data, "validation")
    table = fusion_score.table_of(Maximum(), pairs)
    rows = []
    for ct, mr in zip(pairs.ct[:, 0], pairs.mr[:, 0], strict=True):
        grey = [np.rint(255 * image.double().numpy()) for image in (torch.maximum(ct, mr), ct, mr)]
        rows.append(fusion_table(*grey))
    for key in fusion_score.KEYS:
        assert table[key] == pytest.approx(np.mean([row[key] for row in rows])), key
    kept = tmp_path / "kept.json"
    first = fusion_score.baseline_table(pairs, kept)
    assert fusion_score.baseline_table(pairs, kept) == first
    other = fusion_score.baseline_table(pairs.subset([0]), kept)
    assert other["average"] == pytest.approx(fusion_score.table_of(Average(), pairs.subset([0])))


def test_rates_follow_the_seeds_schedules() -> None:
    basic, hybrid = RECIPES["basic"], RECIPES["hybrid"]
    assert [learning_rate(basic, epoch * 10, 10) for epoch in (0, 19, 20, 40)] == [1e-3, 1e-3, 5e-4, 2.5e-4]
    for epoch in (0, 10, 25, 49):
        expected = 1e-4 * 0.5 * (1 + math.cos(math.pi * epoch / 50))
        assert learning_rate(hybrid, epoch * 7 + 3, 7) == pytest.approx(expected)


def test_the_recipes_are_those_of_the_specification() -> None:
    basic, medical, hybrid = (RECIPES[name] for name in ("basic", "medical", "hybrid"))
    assert (basic.wave, basic.levels, basic.batch_size, basic.learning_rate, basic.epochs) == ("haar", 1, 8, 1e-3, 50)
    assert (medical.wave, medical.levels, medical.batch_size, medical.learning_rate) == ("db4", 2, 4, 5e-4)
    assert (hybrid.wave, hybrid.levels, hybrid.batch_size, hybrid.learning_rate) == ("db4", 3, 4, 1e-4)
    assert (hybrid.weight_decay, hybrid.clip_norm, hybrid.kernel_size, hybrid.reduction) == (1e-5, 1.0, 7, 8)


def test_the_progressive_schedule_has_three_phases_of_the_one_loss() -> None:
    assert [phase_of(epoch, 50) for epoch in (0, 15, 16, 31, 32, 49)] == [0, 0, 1, 1, 2, 2]
    assert [phase_of(epoch, 2) for epoch in (0, 1)] == [0, 1]
    assert PHASES[2] == {"l1": 1.0, "ssim": 2.0, "gradient": 1.5, "perceptual": 0.8, "frequency": 0.5}


def task(data: Path, recipe: FusionRecipe) -> FusionTask:
    loss = HybridLoss(torch.nn.Identity()) if recipe.loss == "progressive" else fusion_recipe.build_loss(recipe)
    return FusionTask(
        build_network(recipe), recipe, read_pairs(data, "train"), read_pairs(data, "validation"), {}, loss
    )


def test_a_step_changes_the_weights_of_the_loss_by_its_phase(data: Path) -> None:
    run = task(data, replace(TINY, loss="progressive", epochs=6))
    for epoch, phase in ((0, 0), (2, 1), (5, 2)):
        run.batch_loss(epoch * run.steps_per_epoch)
        assert run.loss.weights == PHASES[phase]


def test_a_batch_depends_on_the_seed_and_the_step_alone(data: Path) -> None:
    first, again, other = task(data, TINY), task(data, TINY), task(data, replace(TINY, seed=1))
    losses = [first.batch_loss(step).item() for step in range(4)]
    assert again.batch_loss(3).item() == losses[3]
    assert len(set(losses)) == 4
    assert other.batch_loss(3).item() != losses[3]


def test_the_classics_of_whole_slices_are_computed_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = task(data, replace(TINY, loss="metric", crop=0))
    assert isinstance(run.loss, MetricLoss)
    pairs = run.train.subset([3, 1])
    expected = run.loss.best_classic(pairs.ct, pairs.mr)
    run._best_classic([1, 3])
    monkeypatch.setattr(run.loss, "best_classic", None)
    for name, value in run._best_classic([3, 1]).items():
        assert torch.allclose(value, expected[name], rtol=1e-5), name
    monkeypatch.undo()
    assert math.isfinite(run.batch_loss(0).item())


@pytest.mark.data
def test_the_classics_of_a_real_slice_hardly_depend_on_a_flip(shared_data: Path) -> None:
    """So what was computed for a slice serves its mirror images; pyramids move their grid by a pixel then."""
    pair = read_pairs(shared_data, "train").subset([30])
    loss = MetricLoss()
    straight, flipped = loss.best_classic(pair.ct, pair.mr), loss.best_classic(pair.ct.flip(-1), pair.mr.flip(-1))
    for name, value in straight.items():
        assert value.item() == pytest.approx(flipped[name].item(), rel=0.01), name


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Call with a step to have training stopped there, as by Ctrl-C; with None to let it run."""
    original = FusionTask.batch_loss

    def at(stop: int | None) -> None:
        def batch_loss(self: FusionTask, step: int) -> torch.Tensor:
            if step == stop:
                raise KeyboardInterrupt
            return original(self, step)

        monkeypatch.setattr(FusionTask, "batch_loss", batch_loss)

    return at


@pytest.mark.parametrize("network", ["single-scale", "multi-scale"])
def test_a_stopped_run_goes_on_to_the_same_weights(
    network: str, data: Path, tmp_path: Path, stopping: Callable[[int | None], None]
) -> None:
    recipe = replace(TINY, network=network, width=4)  # type: ignore[arg-type]
    straight, results = train_network(data, tmp_path / "straight", recipe, lambda _: None)
    stopping(10)
    with pytest.raises(KeyboardInterrupt):
        train_network(data, tmp_path / "stopped", recipe, lambda _: None)
    stopping(None)
    resumed, _ = train_network(data, tmp_path / "stopped", recipe, lambda _: None)
    for one, other in zip(straight.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    with (tmp_path / "stopped" / "log.csv").open(encoding="utf-8") as file:
        assert [float(row["step"]) for row in csv.DictReader(file)] == [4, 8, 12, 16]
    assert (tmp_path / "straight" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert results["best"]["score"] <= 1


def test_a_folder_with_another_recipes_run_is_refused(data: Path, tmp_path: Path) -> None:
    short = replace(TINY, epochs=1)
    train_network(data, tmp_path / "run", short, lambda _: None)
    with pytest.raises(SettingsError, match="a run of another recipe"):
        train_network(data, tmp_path / "run", replace(short, wave="db2"), lambda _: None)


def test_trained_weights_are_found_and_their_card_says_what_was_measured(data: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    recipe = replace(TINY, loss="metric", epochs=1, halo_limit=3)
    folder = train_fusion(data, tmp_path / "run", models, recipe, lambda _: None, test=True)
    assert folder == models / "fusion-single-scale"
    manifest = json.loads((models / "manifest.json").read_text(encoding="utf-8"))
    assert set(manifest["fusion-single-scale"]) == {WEIGHTS_FILE}
    method = fusion_method("single-scale", weights_folder=folder)
    image = read_pairs(data, "test").ct
    assert torch.allclose(method(image, image).image, image, atol=1e-5)
    card = (folder / "README.md").read_text(encoding="utf-8")
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert "research, non-commercial" in card
    assert "trained on what the tables below judge it by" in card
    assert "Test patients 34 and 41 (2 slices" in card
    assert f"{results['best']['VIF']:.3f}" in card
    assert f"{results['test']['single-scale']['VIF']:.3f}" in card


def test_wavelets_are_compared_by_the_one_score(data: Path, tmp_path: Path) -> None:
    rows = fusion_recipe.compare_wavelets(
        data, tmp_path / "sweep", replace(TINY, epochs=1), ("haar", "db2"), lambda _: None
    )
    assert {row["wave"] for row in rows} == {"haar", "db2"}
    assert rows[0]["score"] >= rows[1]["score"]
    with (tmp_path / "sweep" / "wavelets.csv").open(encoding="utf-8") as file:
        assert [row["wave"] for row in csv.DictReader(file)] == [row["wave"] for row in rows]


@pytest.mark.parametrize("network", ["single-scale", "multi-scale"])
@pytest.mark.parametrize("name", ["shipped", *RECIPES])
@pytest.mark.parametrize("changes", [{}, {"wave": "coif2", "epochs": 3}, {"levels": 3, "seed": 7}])
def test_the_command_on_a_card_asks_for_the_very_recipe(network: str, name: str, changes: dict[str, Any]) -> None:
    recipe = replace(recipe_for(network, name), **changes)
    command = command_for(recipe, test=True)
    assert command is not None
    words = command.removeprefix("freqseg train-fusion ").removesuffix(" --test").split()
    given = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    asked = recipe_for(given.pop("network"), given.pop("recipe", "shipped"))
    assert replace(asked, **{key: type(getattr(asked, key))(value) for key, value in given.items()}) == recipe


def test_a_recipe_of_ones_own_has_no_command() -> None:
    assert command_for(TINY) is None


def test_unknown_recipes_are_refused() -> None:
    with pytest.raises(SettingsError, match="no recipe 'best' for a network 'multi-scale'"):
        fusion_recipe.recipe_for("multi-scale", "best")
    with pytest.raises(SettingsError, match="loss must be one of"):
        fusion_recipe.build_loss(replace(TINY, loss="l2"))  # type: ignore[arg-type]


def test_shipped_networks_beat_the_untrained_ones_data_free(tmp_path: Path) -> None:
    """Shipped weights load from the catalogue and keep the promises of an untrained network."""
    from FreqSegLib import weights

    missing = [name for name in ("fusion-single-scale", "fusion-multi-scale") if weights.find(name) is None]
    if missing:
        pytest.skip(f"not shipped in this checkout: {', '.join(missing)}; run 'make train-fusion'")
    ct, mr = torch.rand(1, 1, 33, 41), torch.rand(1, 1, 33, 41)
    for name in ("single-scale", "multi-scale"):
        method = fusion_method(name)
        assert (method(ct, ct).image - ct).abs().max() < 1e-5
        assert (method(ct, mr).image - method(mr, ct).image).abs().max() < 1e-5
