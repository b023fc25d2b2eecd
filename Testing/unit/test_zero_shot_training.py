"""Training of the zero-shot path's own modules, on slices made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from FreqSegLib.clip.vocabulary import targets
from FreqSegLib.errors import SettingsError
from FreqSegLib.evaluation.segmentation_metrics import dice
from FreqSegLib.interaction.zero_shot_fusion import ZeroShotFusion, ZeroShotFusionConfig
from FreqSegLib.mamba.model_config import read_config
from FreqSegLib.saliency.amortised import AmortisedBottleneck, AmortisedConfig
from FreqSegLib.settings import TextSegmentationSettings
from FreqSegLib.training.lite_data import TrainingSlice
from FreqSegLib.training.loop import LoopConfig, fit
from FreqSegLib.training.zero_shot import (
    BottleneckPhase,
    BottleneckTraining,
    FusionPhase,
    FusionTraining,
    best_thresholds,
    patient_dice,
    score,
)
from FreqSegLib.training.zero_shot_data import (
    MASK_SIDE,
    BranchSlices,
    Look,
    Pairs,
    choose,
    held_back_slices,
    make_pairs,
    saliency,
    scaled_by_patient,
)

NAMES = [meaning.name for meaning in targets()]
TUMOUR, BREAST = NAMES.index("brain tumour"), NAMES.index("breast lesion")


def suffix(z: Tensor) -> Tensor:
    """(M, 16, 8) -> (M, 4)."""
    return F.normalize(z[..., :4].mean(1), dim=-1)


def made(count: int, seed: int) -> tuple[BranchSlices, Pairs]:
    """Slices of 4 x 4 tokens: the low tokens know where the target is, the raw saliency only half."""
    rng = torch.Generator().manual_seed(seed)
    place = torch.randint(16, (count,), generator=rng)
    there = F.one_hot(place, 16).float()
    tokens = {b: torch.randn(count, 16, 8, generator=rng) * 0.3 for b in ("raw", "low", "high")}
    tokens["low"][..., 5] += 4 * there
    tokens["raw"][..., 0] += 2 * there
    raw = 0.3 + 0.15 * there + 0.4 * torch.rand(count, 16, generator=rng)
    maps = torch.stack([raw, raw, torch.rand(count, 16, generator=rng)], 1).view(count, 3, 4, 4)
    masks = F.interpolate(there.view(count, 1, 4, 4), (MASK_SIDE, MASK_SIDE))
    groups = [f"patient {i // 2}" for i in range(count)]
    modality = ["flair" if i % 4 < 2 else "ultrasound" for i in range(count)]
    slices = tuple(
        TrainingSlice(f"{i}.png", f"{i}.png", m, g, "train", 0, None)
        for i, (m, g) in enumerate(zip(modality, groups, strict=True))
    )
    truth = np.zeros((count, len(NAMES)), dtype=np.int8)
    asked = np.array([TUMOUR if m == "flair" else BREAST for m in modality])
    truth[np.arange(count), asked] = 1
    full = F.interpolate(masks, (256, 256)).expand(-1, 2, -1, -1) * 255
    data = BranchSlices(slices, tokens, full.byte().numpy(), truth)
    return data, Pairs(np.arange(count), asked, tuple(groups), maps, masks)


def phase(**changes) -> FusionPhase:
    torch.manual_seed(0)
    config = ZeroShotFusionConfig(width=8, num_heads=2, hidden_channels=4, **changes)
    return FusionPhase(ZeroShotFusion(config), made(24, 0), made(12, 1), FusionTraining(batch_size=6), 0)


def test_training_makes_the_fusion_better_than_the_raw_map_on_other_patients(tmp_path: Path) -> None:
    p = phase()
    before = p.validate()
    loop = LoopConfig(steps=120, learning_rate=0.02, warmup=5, weight_decay=0.0, validate_every=40, patience=5)
    best = fit(p.model, p.batch_loss, p.validate, tmp_path, loop)
    assert best["score"] > before["score"] + 0.1
    assert set(best) >= {"dice brain tumour", "dice breast lesion", "loss"}


def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(tmp_path: Path) -> None:
    loop = LoopConfig(steps=8, learning_rate=0.02, warmup=2, validate_every=2, patience=9)

    class Stop(Exception):
        pass

    whole = phase(dropout=0.3)
    fit(whole.model, whole.batch_loss, whole.validate, tmp_path / "whole", loop)
    halves = phase(dropout=0.3)

    def interrupted(number: int) -> Tensor:
        if number == 5:
            raise Stop
        return halves.batch_loss(number)

    with pytest.raises(Stop):
        fit(halves.model, interrupted, halves.validate, tmp_path / "halves", loop)
    halves = phase(dropout=0.3)
    fit(halves.model, halves.batch_loss, halves.validate, tmp_path / "halves", loop)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(halves.model.state_dict()[name], value), name
    assert (tmp_path / "whole/log.csv").read_text() == (tmp_path / "halves/log.csv").read_text()


def test_the_bottleneck_learns_its_objective_and_is_repeatable(tmp_path: Path) -> None:
    questions = {"flair": torch.eye(4)[:1], "ultrasound": torch.eye(4)[1:2]}

    def fresh() -> BottleneckPhase:
        torch.manual_seed(0)
        model = AmortisedBottleneck(AmortisedConfig(width=8, text_width=4, hidden=16))
        return BottleneckPhase(model, made(24, 0)[0], made(12, 1)[0], questions, suffix, BottleneckTraining(8), 0)

    p = fresh()
    before = p.validate()["objective"]
    assert p.validate()["objective"] == before
    loop = LoopConfig(steps=60, learning_rate=5e-3, warmup=2, validate_every=20)
    best = fit(p.model, p.batch_loss, p.validate, tmp_path, loop)
    assert best["objective"] < before - 0.05
    assert best["score"] == -best["objective"]
    assert float(fresh().batch_loss(3).detach()) == float(fresh().batch_loss(3).detach())


def test_dice_is_counted_over_a_patients_slices_together() -> None:
    _, pairs = made(8, 3)
    maps = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found = patient_dice(maps, pairs, dict.fromkeys(NAMES, 0.6))
    assert set(found) == {"brain tumour", "breast lesion"}
    drawn = F.interpolate(maps, (MASK_SIDE, MASK_SIDE), mode="bilinear", align_corners=False)[:2, 0] > 0.6
    expected = dice(drawn.numpy(), pairs.masks[:2, 0].numpy() > 0.5)
    assert found["brain tumour"]["patient 0"] == pytest.approx(expected)
    means = [np.mean(list(values.values())) for values in found.values()]
    assert score(found) == pytest.approx(np.mean(means))


def test_the_threshold_is_the_best_one_of_those_offered() -> None:
    _, pairs = made(8, 3)
    small = F.interpolate(pairs.masks, (4, 4), mode="area")
    cuts = best_thresholds(0.2 + 0.5 * small, pairs)
    exact = patient_dice(0.2 + 0.5 * small, pairs, cuts)["brain tumour"]
    for other in (0.25, 0.65):
        worse = patient_dice(0.2 + 0.5 * small, pairs, dict.fromkeys(NAMES, other))["brain tumour"]
        assert np.mean(list(worse.values())) <= np.mean(list(exact.values()))


def test_maps_are_scaled_over_each_patients_own_slices() -> None:
    maps = torch.tensor([1.0, 3.0, 10.0, 10.0]).view(4, 1, 1, 1).expand(4, 2, 1, 1).clone()
    maps[1, 1] = 2.0
    found = scaled_by_patient(maps, ["a", "a", "b", "b"])
    assert found[:, 0].flatten().tolist() == [0.0, 1.0, 0.0, 0.0]
    assert found[:, 1].flatten().tolist() == [0.0, 1.0, 0.0, 0.0]


def test_saliencies_are_computed_once_and_again_when_the_settings_change(tmp_path: Path) -> None:
    data, _ = made(8, 0)
    calls = []

    def counted(z: Tensor) -> Tensor:
        calls.append(len(z))
        return suffix(z)

    settings = TextSegmentationSettings(bottleneck="nib")
    looks = [Look(settings, torch.eye(4)[0]) for _ in NAMES]
    first = make_pairs(data, looks, counted, tmp_path, "key")
    assert first.asked.tolist() == [TUMOUR] * 4 + [BREAST] * 4
    assert first.maps.shape == (8, 3, 4, 4)
    values = torch.cat([saliency(looks[TUMOUR], data.tokens["raw"][i][None], suffix, [i]) for i in (0, 1)])
    expected = scaled_by_patient(values.view(2, 1, 4, 4), ["patient 0"] * 2)
    torch.testing.assert_close(first.maps[:2, :1], expected)
    calls.clear()
    again = make_pairs(data, looks, counted, tmp_path, "key")
    assert not calls
    assert torch.equal(again.maps, first.maps)
    make_pairs(data, [replace(look, settings=replace(settings, beta=2.0)) for look in looks], counted, tmp_path, "key")
    assert calls


def test_a_configuration_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    from FreqSegLib.training.zero_shot_recipe import ZeroShotRecipe

    path = tmp_path / "config.json"
    path.write_text('{"fusion": {"interaction": "efficient"}, "fusion_loop": {"steps": 7}, "seed": 3}')
    recipe = read_config(path, ZeroShotRecipe)
    assert (recipe.fusion.interaction, recipe.fusion_loop.steps, recipe.seed) == ("efficient", 7, 3)
    path.write_text('{"train_slice": 3}')
    with pytest.raises(SettingsError, match="there is no key 'train_slice'; did you mean 'train_slices'"):
        read_config(path, ZeroShotRecipe)


@pytest.mark.data
def test_slices_are_chosen_with_their_target_and_no_patient_twice_over(shared_data: Path, tmp_path: Path) -> None:
    images = sorted((shared_data / "segmentation/hippocampus/train/images").glob("*.nii.gz"))[:3]
    slices = [
        TrainingSlice(
            image.relative_to(shared_data).as_posix(),
            (image.parents[1] / "labels" / image.name).relative_to(shared_data).as_posix(),
            "t1",
            f"hippocampus/{image.name}",
            "train",
            index,
            None,
        )
        for image in images
        for index in (0, 12, 16, 18, 20)
    ]
    found = choose(shared_data, tmp_path, slices, "train", 5, 2)
    assert len(found) == 5
    groups = [item.group for item in found]
    assert [groups.count(group) for group in dict.fromkeys(groups)] == [2, 2, 1]
    assert all(item.index > 0 for item in found), "the first slice of a volume shows none"
    assert not choose(shared_data, tmp_path, slices, "validation", 5, 2)


def test_test_slices_come_from_the_middle_of_what_is_marked(tmp_path: Path) -> None:
    import SimpleITK as sitk

    folder = tmp_path / "segmentation/hippocampus/test"
    labels = np.zeros((20, 8, 8), dtype=np.uint8)
    labels[4:14, 2:6, 2:6] = 1
    for name, array in (("images", labels * 50), ("labels", labels)):
        (folder / name).mkdir(parents=True)
        sitk.WriteImage(sitk.GetImageFromArray(array), str(folder / name / "one.nii.gz"))
    found = held_back_slices(tmp_path, 2)
    assert sorted(item.index for item in found) in ([6, 11], [20 - 1 - 11, 20 - 1 - 6])
    assert {(item.split, item.group, item.modality) for item in found} == {("test", "hippocampus/one", "t1")}
