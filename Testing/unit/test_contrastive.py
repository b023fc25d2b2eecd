"""Phase 1: what captions are true of a picture, who is in which split, and whether it learns."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from FreqSegLib.clip.aligner import Aligner, AlignerConfig
from FreqSegLib.clip.vocabulary import MODALITIES
from FreqSegLib.errors import InputError, WeightsError
from FreqSegLib.training import lite_data
from FreqSegLib.training.contrastive import FALSE, TRUE, UNKNOWN, ContrastiveConfig, PhaseOne, statements, truth_table
from FreqSegLib.training.lite_data import CachedSlices, SliceChoice, TrainingSlice, plan, split_of, target_channels

NAMES = [statement.name for statement in statements()]
SMALL = AlignerConfig(
    width=24, depth=1, class_depth=1, num_heads=2, embedding_channels=8, pooled_side=32, patch=2, embed_dim=16
)


def truth(modality: str, covered: tuple[float, float], total: tuple[float, float]) -> dict[str, int]:
    table = truth_table([modality], torch.tensor([covered]), torch.tensor([total]))
    return dict(zip(NAMES, table[0].tolist(), strict=True))


def test_a_window_with_the_left_lung_alone() -> None:
    found = truth("xray", (40.0, 0.0), (40.0, 50.0))
    assert found["left lung"] == TRUE
    assert found["right lung"] == FALSE
    assert found["lungs"] == UNKNOWN
    assert found["no lung"] == FALSE


@pytest.mark.parametrize(
    ("covered", "expected"),
    [
        ((40.0, 50.0), {"lungs": TRUE, "left lung": TRUE, "right lung": TRUE, "no lung": FALSE}),
        ((0.0, 0.0), {"lungs": FALSE, "left lung": FALSE, "right lung": FALSE, "no lung": TRUE}),
        # 36 and 30 of 90 cells: 73 % of both together
        ((36.0, 30.0), {"lungs": TRUE, "left lung": TRUE, "right lung": TRUE, "no lung": FALSE}),
        # 10 of 40 (a quarter) is too little to be there and too much to be away; 11 % of both lungs
        ((10.0, 0.0), {"lungs": UNKNOWN, "left lung": UNKNOWN, "right lung": FALSE, "no lung": UNKNOWN}),
        # 1 of 40 and 1 of 90 are less than 3 %
        ((1.0, 0.0), {"lungs": FALSE, "left lung": FALSE, "right lung": FALSE, "no lung": TRUE}),
    ],
)
def test_windows_on_the_lungs(covered: tuple[float, float], expected: dict[str, int]) -> None:
    found = truth("xray", covered, (40.0, 50.0))
    assert {name: found[name] for name in expected} == expected


def test_part_of_a_tumour_is_neither_there_nor_away() -> None:
    assert truth("flair", (2.0, 0.0), (10.0, 0.0))["brain tumour"] == UNKNOWN
    assert truth("flair", (2.0, 0.0), (10.0, 0.0))["no brain tumour"] == UNKNOWN
    assert truth("flair", (4.0, 0.0), (10.0, 0.0))["brain tumour"] == TRUE
    assert truth("flair", (0.0, 0.0), (10.0, 0.0))["no brain tumour"] == TRUE


def test_a_picture_without_the_target_says_so_whole_or_in_part() -> None:
    for modality, target in (("flair", "brain tumour"), ("ultrasound", "breast lesion"), ("t1", "hippocampus")):
        found = truth(modality, (0.0, 0.0), (0.0, 0.0))
        assert found[target] == FALSE
        assert found[f"no {target}"] == TRUE


def test_a_slice_through_the_body_of_the_hippocampus_alone() -> None:
    found = truth("t1", (0.0, 8.0), (0.0, 8.0))
    assert found["hippocampus"] == TRUE
    assert found["anterior hippocampus"] == FALSE
    assert found["posterior hippocampus"] == TRUE
    assert found["no hippocampus"] == FALSE


def test_of_another_modality_nothing_is_true_but_its_own_name() -> None:
    for modality in ("flair", "xray", "ultrasound", "t1"):
        found = truth(modality, (9.0, 9.0), (9.0, 9.0))
        for statement in statements():
            if statement.modality != modality:
                assert found[statement.name] == FALSE, (modality, statement.name)
        assert found[MODALITIES[modality].name] == TRUE


def test_nobody_marked_tumours_in_the_other_brain_pictures() -> None:
    for modality in ("ct", "mr"):
        found = truth(modality, (0.0, 0.0), (0.0, 0.0))
        assert found["brain tumour"] == found["no brain tumour"] == UNKNOWN
        assert found[MODALITIES[modality].name] == TRUE
        assert found["lungs"] == found["hippocampus"] == found["breast lesion"] == FALSE


def test_rows_of_a_batch_do_not_mix() -> None:
    covered, total = torch.tensor([[40.0, 0.0], [0.0, 0.0]]), torch.tensor([[40.0, 50.0], [0.0, 0.0]])
    both = truth_table(["xray", "flair"], covered, total)
    assert both[0].tolist() == list(truth("xray", (40.0, 0.0), (40.0, 50.0)).values())
    assert both[1].tolist() == list(truth("flair", (0.0, 0.0), (0.0, 0.0)).values())


def test_every_picture_has_a_caption() -> None:
    for modality in MODALITIES:
        assert TRUE in truth(modality, (1.0, 1.0), (5.0, 5.0)).values()


def test_the_split_is_fixed_and_about_a_seventh() -> None:
    splits = [split_of(f"patient {number}") for number in range(4000)]
    assert splits == [split_of(f"patient {number}") for number in range(4000)]
    assert splits.count("validation") == pytest.approx(600, abs=75)


def patient_of(path: str) -> str:
    """Who is in a picture, from its file name (see the data's README)."""
    name = Path(path).name
    if match := re.match(r"TCGA_[A-Z]{2}_[0-9]{4}", name):
        return match[0]
    if "harvard" in path:
        return "harvard " + str(int(Path(path).stem[:-3]))
    return "/".join(Path(path).parts[1:2]) + " " + name.split(".")[0]


@pytest.fixture(scope="module")
def chosen(shared_data: Path) -> list[TrainingSlice]:
    return plan(shared_data)


@pytest.mark.data
def test_the_plan_keeps_patients_apart_and_within_its_size(shared_data: Path, chosen: list[TrainingSlice]) -> None:
    assert 1500 < len(chosen) <= 2500
    splits, groups = defaultdict(set), defaultdict(set)
    for item in chosen:
        splits[patient_of(item.image)].add(item.split)
        groups[patient_of(item.image)].add(item.group)
        assert "/test/" not in item.image
        assert (shared_data / item.image).exists()
        assert item.mask is None or (shared_data / item.mask).exists()
        assert item.mask is not None or item.modality in ("ct", "mr")
        assert item.augment is None or item.split == "train"
    assert [patient for patient, both in splits.items() if len(both) > 1] == []
    assert [patient for patient, names in groups.items() if len(names) > 1] == []
    # the same breast again under another name
    scans = {Path(item.image).stem: item for item in chosen if item.modality == "ultrasound"}
    assert scans["malignant_004"].group == scans["malignant_005"].group == scans["malignant_009"].group
    assert scans["normal_038"].group == scans["normal_043"].group == scans["normal_050"].group
    assert len({item.group for item in scans.values()}) > 60
    for modality in MODALITIES:
        assert {item.split for item in chosen if item.modality == modality} == {"train", "validation"}
    assert len(set(chosen)) == len(chosen)
    assert plan(shared_data) == chosen


@pytest.mark.data
def test_another_choice_changes_training_slices_alone(shared_data: Path, chosen: list[TrainingSlice]) -> None:
    other = plan(shared_data, choice=SliceChoice(hippocampus=6, hippocampus_copies=0, xrays=0.5))
    assert [s for s in other if s.split == "validation"] == [s for s in chosen if s.split == "validation"]

    def kept(slices: list[TrainingSlice], modality: str) -> set[TrainingSlice]:
        return {s for s in slices if s.split == "train" and s.modality == modality and s.augment is None}

    for modality in ("flair", "ultrasound", "ct", "mr"):
        assert kept(other, modality) == kept(chosen, modality)
    assert kept(other, "t1") > kept(chosen, "t1")
    assert max(Counter(s.image for s in kept(other, "t1")).values()) in (6, 7)
    assert not [s for s in other if s.modality == "t1" and s.augment is not None]
    assert kept(other, "xray") < kept(chosen, "xray")
    assert len(kept(other, "xray")) == pytest.approx(0.5 * len(kept(chosen, "xray")), rel=0.15)
    assert plan(shared_data, choice=SliceChoice()) == chosen


@pytest.mark.data
def test_a_real_slice_is_loaded_with_its_mask_in_place(shared_data: Path, chosen: list[TrainingSlice]) -> None:
    for modality in ("xray", "ultrasound", "t1", "flair"):
        item = next(i for i in chosen if i.modality == modality and i.augment is None and "normal" not in i.image)
        image, masks, visible = lite_data.load(shared_data, item, size=64)
        assert image.shape == visible.shape == (1, 1, 64, 64)
        assert masks.shape == (1, 2, 64, 64)
        assert 0 <= float(image.min()) <= float(image.max()) <= 1
        assert float((masks * (visible < 0.01)).sum()) == 0
        if modality == "xray":
            # as radiographs are shown, the patient's left lung is on the right of the picture, and lungs are dark
            columns = [float((masks[0, c] * torch.arange(64.0)).sum() / masks[0, c].sum()) for c in (0, 1)]
            assert columns[0] > columns[1]
            lungs = masks[0].sum(0) > 0.5
            assert float(image[0, 0][lungs].mean()) < float(image[0, 0][~lungs].mean()) + 0.2


def test_lungs_are_told_apart_at_the_column_they_cover_least() -> None:
    labels = np.zeros((20, 30), dtype=np.uint8)
    labels[2:18, 3:13] = 255
    labels[4:18, 16:27] = 255
    labels[9, 13:16] = 255  # a bridge of one row
    left, right = target_channels(labels, "xray")
    assert left[:, 16:27].sum() == 14 * 11
    assert right[:, 3:13].sum() == 16 * 10
    assert left[:, :13].sum() == right[:, 16:].sum() == 0
    assert left.sum() + right.sum() == (labels > 0).sum()
    assert not target_channels(np.zeros((5, 5)), "xray").any()


def test_labels_become_channels_by_modality() -> None:
    labels = np.array([[0, 1, 2]])
    assert target_channels(labels, "t1").tolist() == [[[0, 1, 0]], [[0, 0, 1]]]
    assert target_channels(labels, "flair").tolist() == [[[0, 1, 1]], [[0, 0, 0]]]


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, list[TrainingSlice]]:
    """Three pictures with masks on disk, and the slices to cache from them."""
    data, rng = tmp_path / "data", np.random.default_rng(0)
    (data / "images").mkdir(parents=True)
    (data / "masks").mkdir()
    slices = []
    for number in range(3):
        mask = np.zeros((40, 60), dtype=np.uint8)
        mask[10 : 20 + 5 * number, 15:40] = 255
        image = (rng.uniform(0, 90, mask.shape) + 0.5 * mask).astype(np.uint8)
        for folder, pixels in (("images", image), ("masks", mask)):
            Image.fromarray(pixels).save(data / folder / f"{number}.png")
        slices.append(
            TrainingSlice(f"images/{number}.png", f"masks/{number}.png", "ultrasound", f"p{number}", "train", 0, None)
        )
    return data, [*slices, TrainingSlice("images/0.png", "masks/0.png", "ultrasound", "p0", "train", 0, 77)]


class Embed:
    def __init__(self, stop_after: int = 99) -> None:
        self.calls, self.stop_after = 0, stop_after

    def __call__(self, image: Tensor) -> Tensor:
        assert image.shape == (1, 3, 256, 256)
        self.calls += 1
        if self.calls > self.stop_after:
            raise KeyboardInterrupt
        return F.avg_pool2d(image[:, :1], 4).expand(-1, 256, -1, -1)


def test_a_stopped_caching_goes_on_where_it_was(pictures, tmp_path: Path) -> None:
    data, slices = pictures
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    lite_data.cache(data, whole, Embed(), slices)
    with pytest.raises(KeyboardInterrupt):
        lite_data.cache(data, broken, Embed(stop_after=2), slices)
    assert len(lite_data.read_cache(broken, slices).slices) == 2
    assert not list(broken.glob("*.part"))
    later = Embed()
    seen: list[tuple[int, int]] = []
    lite_data.cache(data, broken, later, slices, lambda done, total: seen.append((done, total)))
    assert later.calls == 2
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    one, other = lite_data.read_cache(whole, slices), lite_data.read_cache(broken, slices)
    assert one.slices == other.slices == tuple(slices)
    for name in ("embeddings", "coverage", "visible"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
    fewer = lite_data.read_cache(whole, slices[1:3])
    assert np.array_equal(fewer.embeddings, one.embeddings[1:3])
    seconds, size = lite_data.seconds_and_bytes(whole, slices)
    assert seconds > 0
    assert size == sum(path.stat().st_size for path in whole.iterdir()) > 4 * 256 * 32 * 32 * 2


def test_another_choice_of_slices_computes_only_the_new_ones(pictures, tmp_path: Path) -> None:
    data, slices = pictures
    lite_data.cache(data, tmp_path, Embed(), slices[:2])
    later = Embed()
    lite_data.cache(data, tmp_path, later, [slices[3], slices[1], slices[2]])
    assert later.calls == 2
    assert [item.augment for item in lite_data.read_cache(tmp_path, slices[::-1]).slices] == [77, None, None, None]


def test_what_is_cached_is_the_picture_and_its_mask_on_one_grid(pictures, tmp_path: Path) -> None:
    data, slices = pictures
    lite_data.cache(data, tmp_path / "cache", Embed(), slices)
    found = lite_data.read_cache(tmp_path / "cache", slices)
    assert found.embeddings.shape == (4, 256, 32, 32)
    for row in range(3):
        # 40 x 60 pixels fill 171 x 256 of the frame: the mask's rows 10 to 20 + 5 n, columns 15 to 40
        area = float(found.coverage[row, 0].astype(np.float32).sum())
        assert area == pytest.approx((10 + 5 * row) * 25 * (32 / 60) ** 2, rel=0.03)
        inside = found.coverage[row, 0] > 0.99
        assert inside.any()
        bright = found.embeddings[row, 0].astype(np.float32)
        visible = found.visible[row]
        assert bright[inside].min() > bright[visible & (found.coverage[row, 0] == 0)].max() - 0.05
    assert found.visible[0].sum() == pytest.approx(32 * 32 * 40 / 60, abs=33)
    assert not np.array_equal(found.embeddings[3], found.embeddings[0])
    # an augmentation moves picture and mask together
    inside = (found.coverage[3, 0] > 0.99) & found.visible[3]
    outside = (found.coverage[3, 0] == 0) & found.visible[3]
    moved = found.embeddings[3, 0].astype(np.float32)
    assert moved[inside].mean() > moved[outside].mean() + 0.15


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="FREQSEG_DATA"):
        plan(tmp_path)


@pytest.fixture(scope="module")
def cached() -> CachedSlices:
    """Embeddings that say their modality everywhere and their targets where they are."""
    rng = np.random.default_rng(0)
    keys = list(MODALITIES)
    slices, embeddings, coverage = [], [], []
    for number in range(84):
        modality = keys[number % len(keys)]
        embedding = rng.normal(0, 0.3, (8, 32, 32))
        embedding[number % len(keys)] += 2
        cover = np.zeros((2, 32, 32))
        if modality in ("flair", "xray", "ultrasound", "t1") and number % 4 < 3:
            for channel in (0, 1) if modality in ("xray", "t1") else (0,):
                top, left = rng.integers(2, 18, 2)
                cover[channel, top : top + 10, left : left + 10] = 1
                embedding[6 + channel] += 3 * cover[channel]
        split = "validation" if number >= 60 else "train"
        slices.append(TrainingSlice(f"{number}.png", None, modality, f"p{number}", split, 0, None))
        embeddings.append(embedding)
        coverage.append(cover)
    visible = np.ones((84, 32, 32), dtype=bool)
    return CachedSlices(tuple(slices), np.float16(embeddings), np.float16(coverage), visible)


@pytest.fixture(scope="module")
def sentences() -> dict[str, Tensor]:
    """A vector a wording; held-out wordings have none, so that training on one would fail."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for statement in statements():
        centre = torch.randn(16, generator=generator)
        for wording in statement.wordings:
            found[wording] = F.normalize(centre + 0.3 * torch.randn(16, generator=generator), dim=0)
    return found


def phase(cached: CachedSlices, sentences: dict[str, Tensor], seed: int = 3, **config) -> PhaseOne:
    torch.manual_seed(0)
    return PhaseOne(Aligner(SMALL), cached, sentences, ContrastiveConfig(batch_size=32, **config), seed)


def test_a_batch_is_drawn_from_its_step_and_seed_alone(cached: CachedSlices, sentences: dict[str, Tensor]) -> None:
    one, other = phase(cached, sentences), phase(cached, sentences)
    losses = [one.batch_loss(step).item() for step in (5, 6, 5)]
    torch.manual_seed(123)
    np.random.seed(123)
    assert other.batch_loss(5).item() == losses[0] == losses[2]
    assert losses[1] != losses[0]
    assert phase(cached, sentences, seed=4).batch_loss(5).item() != losses[0]


def test_true_and_unknown_pairs_are_no_negatives(
    cached: CachedSlices, sentences: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = phase(cached, sentences)
    seen: list[tuple[Tensor, Tensor]] = []
    captions = trained._captions

    def watched(table: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        vectors, chosen = captions(table, rng)
        seen.append((table, chosen))
        return vectors, chosen

    negatives: list[Tensor] = []
    monkeypatch.setattr(trained, "_captions", watched)
    monkeypatch.setattr(trained, "loss", lambda images, texts, mask: negatives.append(mask) or (images * texts).sum())
    for step in range(5):
        trained.batch_loss(step)
    for (table, chosen), mask in zip(seen, negatives, strict=True):
        assert not mask.diagonal().any()
        assert mask.any()
        for i in range(len(mask)):
            assert table[i, chosen[i]] == TRUE
            for j in range(len(mask)):
                assert bool(mask[i, j]) == (int(table[i, chosen[j]]) == FALSE)
                if chosen[i] == chosen[j]:
                    assert not mask[i, j]


def test_mirrored_radiographs_exchange_the_lungs(cached: CachedSlices, sentences: dict[str, Tensor]) -> None:
    class Always:
        def random(self, count: int) -> np.ndarray:
            return np.zeros(count)

    trained = phase(cached, sentences)
    rows = np.array([i for i, item in enumerate(cached.slices) if item.modality in ("xray", "t1")][:6])
    plain, coverage, modality = trained._fetch(rows)
    mirrored, turned, _ = trained._fetch(rows, Always())  # type: ignore[arg-type]
    assert torch.equal(mirrored, plain.flip(-1))
    for row, kind in enumerate(modality):
        expected = coverage[row].flip(-1)
        assert torch.equal(turned[row], expected.flip(0) if kind == "xray" else expected)


def test_windows_keep_the_inside_and_replace_the_outside_by_noise(
    cached: CachedSlices, sentences: dict[str, Tensor]
) -> None:
    trained = phase(cached, sentences)
    coverage = torch.zeros(200, 2, 16, 16)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    keep = trained._windows(coverage, rng, 0.5)
    whole = keep.flatten(1).all(1)
    assert 60 < int(whole.sum()) < 140
    assert keep.flatten(1).any(1).all()
    tokens = torch.full((200, 256, 24), 50.0)
    mixed = trained._through_window(tokens, keep, generator)
    assert torch.equal(mixed[whole], tokens[whole])
    flat = keep.flatten(1)
    assert float(mixed[flat].min()) > 0.7 * 50
    outside = mixed[~flat]
    assert float(outside.mean()) < 0.2 * 50
    assert float(outside.std()) > 0.5


def test_training_lowers_the_loss_and_raises_the_validation_score(
    cached: CachedSlices, sentences: dict[str, Tensor]
) -> None:
    trained = phase(cached, sentences)
    with torch.no_grad():
        before = sum(float(trained.batch_loss(step)) for step in range(1000, 1005))
    first = trained.validate()
    optimiser = torch.optim.AdamW(trained.model.parameters(), lr=3e-3)
    for step in range(40):
        loss = trained.batch_loss(step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        after = sum(float(trained.batch_loss(step)) for step in range(1000, 1005))
    last = trained.validate()
    assert after < before - 1.0
    assert last["score"] > first["score"] + 0.1
    assert last["accuracy"] > 0.7
    assert all(0 <= value <= 1 for value in last.values())
    assert trained.validate() == last


def test_channel_statistics_come_from_the_training_slices(cached: CachedSlices, sentences: dict[str, Tensor]) -> None:
    model = phase(cached, sentences).model
    values = torch.from_numpy(cached.embeddings[:60]).float()
    torch.testing.assert_close(model.channel_mean.flatten(), values.mean((0, 2, 3)))
    torch.testing.assert_close(model.channel_std.flatten(), values.std((0, 2, 3)))


def test_the_presence_auc_is_the_share_of_pairs_in_order(cached: CachedSlices, sentences: dict[str, Tensor]) -> None:
    trained = phase(cached, sentences)
    target, null = NAMES.index("breast lesion"), NAMES.index("no breast lesion")
    margins, present = [0.5, 0.1, 0.3, 0.3, -0.2], [True, True, False, True, False]
    scores = torch.zeros(6, len(NAMES))
    table = torch.full((6, len(NAMES)), FALSE, dtype=torch.int8)
    for row, (margin, there) in enumerate(zip(margins, present, strict=True)):
        scores[row, target] = margin
        table[row, target], table[row, null] = (TRUE, FALSE) if there else (FALSE, TRUE)
    scores[5, target] = 9.0  # another modality: does not count
    # present 0.5, 0.1, 0.3 against absent 0.3, -0.2: won 1, 1, 0, 1, 0.5, 1
    assert trained._presence_auc(scores, table) == {"breast lesion": pytest.approx(4.5 / 6)}


def test_trained_weights_are_stored_and_read_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Aligner(SMALL).eval()
    path = tmp_path / "aligner.safetensors"
    model.save(path, {"note": "x"})
    assert [file.name for file in tmp_path.iterdir()] == ["aligner.safetensors"]
    again = Aligner.load(path)
    assert again.config == SMALL
    assert not any(parameter.requires_grad for parameter in again.parameters())
    pooled = torch.randn(2, 8, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again(pooled), model(pooled), atol=2e-3, rtol=0)
    assert path.stat().st_size < 2.2 * sum(value.numel() for value in model.state_dict().values()) + 8000


@pytest.mark.parametrize("fault", ["shape", "missing", "unknown", "config", "cut", "absent"])
def test_weights_that_are_no_aligner_are_refused(tmp_path: Path, fault: str) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "aligner.safetensors"
    if fault != "absent":
        Aligner(SMALL).save(path)
    state = load_file(path) if fault != "absent" else {}
    said = {"shape": r"head\.weight.*\(3, 3\).*\(16, 24\)", "missing": r"head\.weight", "unknown": "odd"}
    metadata = {"config": json.dumps(asdict(SMALL))}
    if fault == "shape":
        state["head.weight"] = torch.zeros(3, 3)
    elif fault == "missing":
        del state["head.weight"]
    elif fault == "unknown":
        state["odd"] = torch.zeros(1)
    elif fault == "config":
        metadata = {"config": '{"breadth": 3}'}
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif fault != "absent":
        save_file(state, path, metadata)
    with pytest.raises(WeightsError, match=said.get(fault, r"aligner\.safetensors")):
        Aligner.load(path)
