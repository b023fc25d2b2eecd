"""Phase 2 and the trained method: what is asked and drawn, what a run repeats, and how the pipeline takes it in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_text_segmentation import PRESET, Boxes, Bright, box_volume, dice
from torch import Tensor

from FreqSegLib.cli import main
from FreqSegLib.clip.prompts import MatchedPrompt
from FreqSegLib.clip.vocabulary import meaning, targets
from FreqSegLib.embedding_cache import EmbeddingCache
from FreqSegLib.errors import SettingsError, WeightsError
from FreqSegLib.evaluation.cases import LabelledVolume
from FreqSegLib.interaction.dual_stream import (
    DualStreamConfig,
    DualStreamModel,
    DualStreamOutput,
    ImageFeatures,
    cosines,
)
from FreqSegLib.presets import Tuning
from FreqSegLib.settings import TextSegmentationSettings
from FreqSegLib.text_segmentation import TextSegmenter
from FreqSegLib.text_trained import TrainedMethod
from FreqSegLib.training.contrastive import FALSE, TRUE, UNKNOWN
from FreqSegLib.training.lite_data import CachedSlices, TrainingSlice
from FreqSegLib.training.loop import LoopConfig, fit
from FreqSegLib.training.text_guided import Answer, PhaseTwo, TextGuidedConfig, summarise_answers
from FreqSegLib.training.text_guided_data import (
    Pictures,
    Wording,
    held_out_wordings,
    mirrored,
    target_masks,
    trained_wordings,
    truth_of,
    warped,
)
from FreqSegLib.training.text_guided_recipe import train_rounds
from FreqSegLib.training.text_guided_tuning import choose_gates, choose_settings

NAMES = [m.name for m in targets()]
ANTERIOR, POSTERIOR = NAMES.index("anterior hippocampus"), NAMES.index("posterior hippocampus")
CHANNELS, TEXT = 6, 16
SMALL = DualStreamConfig(
    embedding_channels=CHANNELS,
    text_dim=TEXT,
    semantic_width=16,
    frequency_widths=(4, 8, 8, 16),
    frequency_depths=(1, 1, 1),
    decoder_widths=(8, 16),
    text_width=16,
    adapter_width=16,
    num_heads=4,
    dropout=0.0,
)
STILL = TextGuidedConfig(batch_size=4, turn=0, zoom=0, shift=0, intensity=0, text_noise=0.1, average=0.5)


def slice_of(number: int, modality: str = "t1", split: str = "train") -> TrainingSlice:
    return TrainingSlice(f"{modality}{number}.nii", "mask", modality, f"{modality}/{split}{number}", split, 0, None)


def made(count: int = 12, modality: str = "t1", seed: int = 0) -> tuple[CachedSlices, Pictures]:
    """Pictures of two squares, a bright one (first channel) and a grey one (second), at random places."""
    rng = np.random.default_rng(seed)
    images = rng.uniform(0, 0.1, (count, 256, 256))
    masks = np.zeros((count, 2, 256, 256), dtype=np.uint8)
    for row in range(count):
        places = rng.choice(9, 2, replace=False)
        for channel, grey in ((0, 0.9), (1, 0.5)):
            top, left = 16 + 80 * (places[channel] // 3), 16 + 80 * (places[channel] % 3)
            masks[row, channel, top : top + 56, left : left + 56] = 255
            images[row, top : top + 56, left : left + 56] = grey
    pooled = images.reshape(count, 32, 8, 32, 8).mean((2, 4))
    embeddings = pooled[:, None] * np.linspace(-2, 2, CHANNELS)[None, :, None, None] + rng.normal(
        0, 0.05, (count, CHANNELS, 32, 32)
    )
    slices = tuple(slice_of(n, modality, "validation" if n % 4 == 3 else "train") for n in range(count))
    coverage = masks.reshape(count, 2, 32, 8, 32, 8).mean((3, 5)) / 255
    data = CachedSlices(
        slices, embeddings.astype(np.float16), coverage.astype(np.float16), np.ones((count, 32, 32), bool)
    )
    return data, Pictures((images * 255).astype(np.uint8), masks)


def wordings() -> tuple[list[Wording], Tensor]:
    """Three wordings a target, whose vectors lie close together."""
    said = [Wording(f"{name} {n}", target) for target, name in enumerate(NAMES) for n in range(3)]
    generator = torch.Generator().manual_seed(1)
    centres = F.normalize(torch.randn(len(NAMES), TEXT, generator=generator), dim=1)
    noise = torch.randn(len(said), TEXT, generator=generator) * 0.05
    return said, F.normalize(centres[[w.target for w in said]] + noise, dim=1)


def phase_of(config: TextGuidedConfig = STILL, seed: int = 0, **given) -> PhaseTwo:
    data, pictures = made(**given)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PhaseTwo(DualStreamModel(SMALL), data, pictures, *wordings(), config, seed)


# ------------------------------------------------------------------------------------------------ what is asked for


def test_held_out_wordings_are_never_trained() -> None:
    trained = {w.text.lower() for w in trained_wordings()}
    held_out = {w.text.lower() for w in held_out_wordings()}
    assert len(held_out) >= 2 * len(NAMES)
    assert not trained & held_out
    for number, name in enumerate(NAMES):
        own = [w.text for w in trained_wordings() if w.target == number]
        assert own[0] == meaning(name).wordings[0]
        assert len(own) > 20


def test_what_a_slice_shows_is_told_from_its_masks() -> None:
    masks = np.zeros((4, 2, 256, 256), dtype=np.uint8)
    masks[0, 0, :10, :10] = 255
    masks[1, 1, :2, :2] = 255
    kinds = ("t1", "t1", "ct", "flair")
    table = truth_of([slice_of(n, kind) for n, kind in enumerate(kinds)], masks)
    by_name = {name: table[:, column].tolist() for column, name in enumerate(NAMES)}
    assert by_name["hippocampus"] == [TRUE, UNKNOWN, FALSE, FALSE]
    assert by_name["anterior hippocampus"] == [TRUE, FALSE, FALSE, FALSE]
    assert by_name["posterior hippocampus"] == [FALSE, UNKNOWN, FALSE, FALSE]
    # nobody marked tumours in the CT
    assert by_name["brain tumour"] == [FALSE, FALSE, UNKNOWN, FALSE]


def test_a_mirror_exchanges_the_sides_of_an_x_ray_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    embedding, images = torch.rand(3, 2, 4, 4, generator=generator), torch.rand(3, 1, 8, 8, generator=generator)
    masks = torch.rand(3, 2, 8, 8, generator=generator)
    which = torch.tensor([True, True, False])
    found = mirrored(embedding, images, masks, which, ["xray", "t1", "xray"])
    assert torch.equal(found[0][:2], embedding[:2].flip(-1))
    assert torch.equal(found[1][:2], images[:2].flip(-1))
    assert torch.equal(found[2][0], masks[0].flip(-1).flip(0))
    assert torch.equal(found[2][1], masks[1].flip(-1))
    assert all(torch.equal(new[2], old[2]) for new, old in zip(found, (embedding, images, masks), strict=True))
    left, right = NAMES.index("left lung"), NAMES.index("right lung")
    there = target_masks(masks[:1], [left])
    assert torch.equal(target_masks(found[2][:1], [right]), there.flip(-1))
    assert torch.equal(target_masks(masks[[0, 0]], [left, NAMES.index("lungs")])[1, 0], masks[0].amax(0))


def test_a_warp_moves_an_embedding_and_its_picture_alike() -> None:
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 256), torch.linspace(-1, 1, 256), indexing="ij")
    picture = torch.exp(-((rows - 0.2) ** 2 + (columns + 0.3) ** 2) / 0.3)[None, None]
    pooled = F.avg_pool2d(picture, 8)
    turn, zoom, shift = torch.tensor([0.3]), torch.tensor([1.1]), torch.tensor([[0.1, -0.05]])
    moved = F.avg_pool2d(warped(picture, turn, zoom, shift), 8)
    torch.testing.assert_close(warped(pooled, turn, zoom, shift), moved, atol=0.02, rtol=0)
    assert (moved - pooled).abs().max() > 0.1


# ------------------------------------------------------------------------------------------------------- training


def test_a_batch_follows_from_its_step_and_seed_alone() -> None:
    phase = phase_of(replace(STILL, turn=0.1, zoom=0.1, shift=0.1, intensity=0.2))
    one, again, other = (phase.batch(np.random.default_rng((0, step))) for step in (3, 3, 4))
    for name in ("embedding", "images", "counts", "text", "masks", "present"):
        assert torch.equal(getattr(one, name), getattr(again, name))
    assert not torch.equal(one.embedding, other.embedding)
    assert len(one.text) == len(one.masks) == len(one.present) == int(one.counts.sum())
    torch.testing.assert_close(one.text.norm(dim=1), torch.ones(len(one.text)))
    empty = one.masks.flatten(1).amax(1) == 0
    assert torch.equal(empty, one.present == 0)


def test_about_the_wanted_share_of_prompts_is_for_what_is_not_there() -> None:
    phase = phase_of(replace(STILL, absent_share=0.25), count=16)
    rng = np.random.default_rng(0)
    asked = [(row, target) for row in rng.choice(phase.train_rows, 600) for target in phase._asked(int(row), rng)]
    absent = np.mean([phase.truth[row, target] != TRUE for row, target in asked])
    assert 0.2 < absent < 0.3
    assert UNKNOWN not in [phase.truth[row, target] for row, target in asked]


def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    config = LoopConfig(steps=4, warmup=1, validate_every=2, learning_rate=1e-2)
    small = replace(STILL, batch_size=2)
    unbroken = phase_of(small)
    fit(unbroken.model, unbroken.batch_loss, unbroken.validate, tmp_path / "unbroken", config)
    stopped = phase_of(small)

    def cut(step: int) -> Tensor:
        if step == 3:
            raise KeyboardInterrupt
        return stopped.batch_loss(step)

    with pytest.raises(KeyboardInterrupt):
        fit(stopped.model, cut, stopped.validate, tmp_path / "stopped", config)
    resumed = phase_of(small)
    fit(resumed.model, resumed.batch_loss, resumed.validate, tmp_path / "stopped", config)
    for name, weight in unbroken.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    assert not torch.equal(unbroken.model.average.position, unbroken.model.model.position)


def test_a_second_round_starts_from_the_average_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    small, first = replace(STILL, batch_size=2), LoopConfig(steps=2, warmup=1, validate_every=2, learning_rate=1e-2)
    second = replace(first, steps=4, learning_rate=1e-3)
    told: list[str] = []

    def rounds(second: LoopConfig, stop: int | None = None) -> list:
        phase = phase_of(small, seed=1, count=16)
        batch_loss = phase.batch_loss

        def cut(number: int) -> Tensor:
            if number == stop:
                raise KeyboardInterrupt
            return batch_loss(number)

        phase.batch_loss = cut
        return [(lambda: phase_of(small), first), (lambda: phase, second)]

    unbroken, best = train_rounds(rounds(second), tmp_path / "unbroken", told.append)
    assert [row["step"] for row in best] in ([2, 2], [2, 4])
    assert len(told) == 3
    with pytest.raises(KeyboardInterrupt):
        train_rounds(rounds(second, stop=3), tmp_path / "stopped", told.append)
    resumed, again = train_rounds(rounds(second), tmp_path / "stopped", told.append)
    assert [row["score"] for row in again] == [row["score"] for row in best]
    for name, weight in unbroken.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    # with next to no rate the second round is the first one's average
    alone, _ = train_rounds(rounds(second)[:1], tmp_path / "alone", told.append)
    still, _ = train_rounds(rounds(replace(second, learning_rate=1e-12)), tmp_path / "still", told.append)
    for name, weight in alone.model.average.state_dict().items():
        assert torch.allclose(still.model.model.state_dict()[name], weight, atol=1e-7), name
    assert not torch.equal(alone.model.model.position, still.model.model.position)
    # a blend lies between the averages of both
    blended, _ = train_rounds(rounds(second), tmp_path / "unbroken", told.append, blend=0.25)
    expected = 0.75 * alone.model.average.position + 0.25 * unbroken.model.average.position
    assert torch.allclose(blended.model.average.position, expected, atol=1e-6)
    assert not torch.allclose(blended.model.average.position, unbroken.model.average.position, atol=1e-6)


def test_the_text_decides_what_is_drawn_in_wordings_it_never_saw() -> None:
    phase = phase_of(replace(STILL, absent_share=0.1), seed=1)
    phase.model.train()
    optimiser = torch.optim.AdamW(phase.model.model.parameters(), lr=8e-3)
    for step in range(50):
        loss = phase.batch_loss(step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model = phase.model.average.eval()
    _, vectors = wordings()
    generator = torch.Generator().manual_seed(5)
    said = torch.stack([vectors[[3 * t, 3 * t + 1]].mean(0) for t in (ANTERIOR, POSTERIOR)])
    said = F.normalize(said + 0.03 * torch.randn(said.shape, generator=generator), dim=1)
    embedding, images, masks = phase.fetch(phase.validation_rows)
    for asked, channel in ((said[0], 0), (said[1], 1)):
        with torch.inference_mode():
            drawn = model(embedding, images, asked.expand(len(images), -1)).logits[:, 0] > 0
        assert dice(drawn.numpy(), masks[:, channel].numpy() > 0.5) > 0.6
        assert dice(drawn.numpy(), masks[:, 1 - channel].numpy() > 0.5) < 0.3


def test_sentences_that_hardly_differ_are_told_apart_by_the_place_they_prefer() -> None:
    """Two squares that look the same, one above the other, asked for by vectors whose cosine is 0.92."""
    data, pictures = made()
    pictures.masks[:], pictures.images[:], data.embeddings[:] = 0, 20, 0
    for row in range(len(pictures.images)):
        for channel, top in ((0, 24), (1, 152)):
            left = 24 + 16 * (row * 5 % 9)
            pictures.masks[row, channel, top : top + 64, left : left + 64] = 255
            pictures.images[row, top : top + 64, left : left + 64] = 200
            data.embeddings[row, :, top // 8 : top // 8 + 8, left // 8 : left // 8 + 8] = 2
    said, vectors = wordings()
    chosen = {target: [row for row, w in enumerate(said) if w.target == target] for target in (ANTERIOR, POSTERIOR)}
    shared, apart = F.normalize(torch.randn(2, TEXT, generator=torch.Generator().manual_seed(3)), dim=1)
    apart = F.normalize(apart - (apart @ shared) * shared, dim=0)
    for target, sign in ((ANTERIOR, 1), (POSTERIOR, -1)):
        vectors[chosen[target]] = F.normalize(shared + sign * 0.204 * apart, dim=0)
    assert vectors[chosen[ANTERIOR][0]] @ vectors[chosen[POSTERIOR][0]] == pytest.approx(0.92, abs=0.005)
    torch.manual_seed(0)
    config = replace(STILL, absent_share=0.0, text_noise=0.0, feature_noise=0.0)
    phase = PhaseTwo(DualStreamModel(SMALL), data, pictures, said, vectors, config)
    assert not phase.model.model.preferred(torch.randn(2, SMALL.text_width)).any()
    optimiser = torch.optim.AdamW(phase.model.model.parameters(), lr=8e-3)
    for step in range(40):
        optimiser.zero_grad()
        phase.batch_loss(step).backward()
        optimiser.step()
    embedding, images, masks = phase.fetch(phase.validation_rows)
    for channel, target in enumerate((ANTERIOR, POSTERIOR)):
        with torch.inference_mode():
            asked = vectors[chosen[target][0]].expand(len(images), -1)
            drawn = phase.model.average(embedding, images, asked).logits[:, 0] > 0
        assert dice(drawn.numpy(), masks[:, channel].numpy() > 0.5) > 0.6
        assert dice(drawn.numpy(), masks[:, 1 - channel].numpy() > 0.5) < 0.2


def test_what_a_sentence_prefers_is_a_sum_of_orthogonal_cosines() -> None:
    waves = cosines(4, 16).flatten(1)
    product = waves @ waves.T
    assert torch.allclose(product, torch.diag(product.diagonal()), atol=1e-4)
    assert cosines(4, 16)[0].eq(1).all()


# -------------------------------------------------------------------------------------------- what validation counts


def answer(group: str, target: int = 0, *, there: bool = True, belongs: bool = True, presence: float = 2.0, **pixels):
    return Answer(group, target, belongs, there, presence, **{"drawn": 0, "truth": 0, "overlap": 0, **pixels})


def test_dice_is_of_patients_and_slices_behind_the_gate_are_empty() -> None:
    said = [
        answer("a", drawn=10, truth=10, overlap=5),
        answer("a", drawn=10, truth=10, overlap=10, presence=-1.0),
        answer("b", drawn=10, truth=10, overlap=10),
        answer("b", there=False, drawn=10),
        answer("b", there=False, drawn=10, presence=-1.0),
        answer("b", NAMES.index("lungs"), there=False, belongs=False, drawn=0),
    ]
    found = summarise_answers(said)
    assert found["dice brain tumour"] == pytest.approx((2 * 5 / (10 + 20) + 2 * 10 / (20 + 10)) / 2)
    assert found["score"] == found["dice brain tumour"]
    assert (found["present_kept"], found["absent_empty"], found["wrong_empty"]) == (2 / 3, 0.5, 1.0)


def test_gates_lie_between_what_is_there_and_what_is_not() -> None:
    said = [answer(f"p{n}", presence=2.0 + n) for n in range(3)]
    said += [answer(f"n{n}", there=False, presence=-1.0 - n) for n in range(3)]
    said += [
        answer("w", there=False, belongs=False, presence=1.0),
        answer("w", there=False, belongs=False, presence=-4),
    ]
    gate = choose_gates(said)["brain tumour"]
    low, high = 1 / (1 + np.exp(-1.0)), 1 / (1 + np.exp(-2.0))
    assert low < gate.slice_threshold < high
    assert gate.volume_threshold >= gate.slice_threshold
    assert (gate.kept, gate.absent_empty, gate.wrong_empty) == (1, 1, 1)
    assert choose_gates(said)["lungs"].slice_threshold == 0.5


# ----------------------------------------------------------------------------------------------------- the pipeline


class Drawer:
    """Draws what is bright. The text vector says whether it is taken for present, and which half to leave out."""

    def __init__(self) -> None:
        self.encoded = 0
        self.asked: list[list[float]] = []

    def encode_image(self, embedding: Tensor, images: Tensor) -> ImageFeatures:
        self.encoded += len(images)
        return ImageFeatures(images, ())

    def feature_shapes(self) -> list[tuple[int, int, int]]:
        return [(1, 64, 64)]

    def segment(self, features: ImageFeatures, text: Tensor) -> DualStreamOutput:
        self.asked.append(text[0].tolist())
        logits, present, side = 12 * (features.semantic - 0.5), text[:, 0], text[:, 1, None, None, None]
        half = torch.arange(64) < 32
        logits = torch.where((side > 0) & ~half | (side < 0) & half, -20.0, logits)
        presence = torch.where(present > 0, logits.amax((1, 2, 3)).clamp(-4, 4), -4.0)
        return DualStreamOutput(logits, presence, logits, None)


class Words:
    """Vectors for the drawer; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, sentences: Sequence[str]) -> Tensor:
        self.asked += sentences
        side = {"left": -1.0, "right": 1.0}
        rows = [
            [-1.0 if "nothing" in s else 1.0, next((v for word, v in side.items() if word in s), 0.0)]
            for s in sentences
        ]
        return torch.tensor(rows)


class Matcher:
    def match(self, text: str) -> MatchedPrompt:
        names = ("left lung", "right lung", "lungs", "hippocampus")
        return MatchedPrompt(text, next((meaning(n) for n in names if n in text), None), 1.0)


PLAIN = Tuning({"threshold": "fixed", "threshold_value": 0.5, "confidence_threshold": 0.0, "refine": False}, 1.0, 0.0)


@pytest.fixture
def trained(tmp_path: Path):
    def build(tuning: Tuning = PLAIN, **given) -> TextSegmenter:
        method = TrainedMethod(Drawer(), Words(), ("lungs", "left lung", "right lung"), {"*": tuning}, "k")
        parts = {"trained": method, "matcher": Matcher(), "cache": EmbeddingCache(tmp_path / "cache"), **given}
        segmenter = TextSegmenter(Bright(), Boxes(), PRESET, weights_key="fake", **parts)
        segmenter.set_volume(box_volume()[0])
        return segmenter

    return build


def test_known_targets_are_drawn_by_the_trained_model_and_others_zero_shot(trained) -> None:
    segmenter, (_, truth) = trained(), box_volume()
    lungs, bright = segmenter.segment(["lungs", "bright thing"])
    assert (lungs.method, bright.method) == ("trained", "zero-shot")
    # the picture is as large as the model's frame, so the mask is exact
    assert np.array_equal(lungs.mask, truth)
    assert (lungs.slice_scores > 0.5).tolist() == [False, False, True, True, False, False]
    assert not lungs.saliency[[0, 1, 4, 5]].any()
    assert lungs.saliency[truth].min() > 0.99
    assert lungs.meaning == "lungs"
    assert segmenter.refiner.decoded > 0
    zero_shot = segmenter.segment(["lungs"], settings=TextSegmentationSettings(method="zero-shot"))[0]
    assert zero_shot.method == "zero-shot"


def test_what_is_not_there_stays_empty(trained) -> None:
    (found,) = trained().segment(["nothing like lungs"])
    assert found.method == "trained"
    assert found.is_empty
    assert found.score < 0.5
    (drawn,) = trained().segment(["nothing like lungs"], settings=TextSegmentationSettings(gate=False))
    assert not drawn.is_empty


def faint_slice(trained, spacing: float = 1.0, **given) -> tuple[TextSegmenter, np.ndarray]:
    """A box through three slices, so faint in the middle one that the gate takes it for empty."""
    volume, truth = box_volume(target=(slice(1, 4), slice(8, 24), slice(36, 56)))
    volume.array[2][truth[2]] = 52
    segmenter = trained(**given)
    segmenter.set_volume(replace(volume, affine=np.diag([spacing, spacing, spacing, 1.0])))
    return segmenter, truth


@pytest.mark.parametrize(("millimetres", "drawn"), [(0.0, False), (0.9, False), (1.0, True), (1.2, True)])
def test_a_slice_beside_one_that_passes_is_drawn_with_its_neighbours_help(
    trained, millimetres: float, drawn: bool
) -> None:
    segmenter, truth = faint_slice(trained)
    settings = TextSegmentationSettings(slice_smoothing=millimetres, threshold_value=0.3)
    (found,) = segmenter.segment(["lungs"], settings=settings, return_intermediate=True)
    assert bool(found.mask[2].any()) == drawn
    assert bool(found.saliency[2].any()) == drawn
    assert not found.mask[~truth].any()
    assert np.array_equal(found.mask[1], truth[1])
    # the gate's own word on each slice is not changed
    assert (found.slice_scores > 0.5).tolist() == [False, True, False, True, False, False]
    assert np.array_equal(found.intermediates[2].saliency["raw"], found.saliency[2])


def test_slices_that_lie_far_apart_are_each_drawn_alone(trained) -> None:
    segmenter, _ = faint_slice(trained, spacing=6.0)
    alone, evened = (
        segmenter.segment(["lungs"], settings=TextSegmentationSettings(slice_smoothing=mm))[0] for mm in (0.0, 1.0)
    )
    assert np.array_equal(alone.mask, evened.mask)
    assert np.abs(alone.saliency - evened.saliency).max() < 1e-5


def test_what_was_chosen_for_a_target_is_evened_out_by_default_and_nothing_else(trained) -> None:
    tuned = replace(PLAIN, settings={**PLAIN.settings, "slice_smoothing": 1.0, "threshold_value": 0.3})
    segmenter, _ = faint_slice(trained, tuning=tuned)
    lungs, bright = segmenter.segment(["lungs", "bright thing"])
    assert lungs.mask[2].any()
    plain = faint_slice(trained)[0].segment(["bright thing"])[0]
    assert np.array_equal(bright.mask, plain.mask)
    assert np.array_equal(bright.saliency, plain.saliency)


class MadeCase:
    """A made volume as a validation patient."""

    modality = "xray"

    def __init__(self, segmenter: TextSegmenter, truth: np.ndarray) -> None:
        self.volume, self.labels = segmenter.prepared.volume, truth.astype(np.uint8)

    def read(self) -> LabelledVolume:
        return LabelledVolume(self.volume, self.labels, self.modality)


def test_slices_are_evened_out_only_where_validation_patients_gain_by_it(trained) -> None:
    segmenter, truth = faint_slice(trained)
    faint = MadeCase(segmenter, truth)
    assert choose_settings(segmenter, [faint], lambda line: None)["lungs"].settings["slice_smoothing"] >= 1
    clear = MadeCase(trained(), box_volume()[1])
    assert choose_settings(segmenter, [clear], lambda line: None)["lungs"].settings["slice_smoothing"] == 0


def test_an_absent_target_has_no_slice_to_reach_from(trained) -> None:
    segmenter, _ = faint_slice(trained)
    (found,) = segmenter.segment(["nothing like lungs"], settings=TextSegmentationSettings(slice_smoothing=3.0))
    assert found.is_empty
    assert not found.saliency.any()


def test_the_decoder_redraws_only_where_that_was_chosen_or_asked_for(trained) -> None:
    segmenter = trained()
    segmenter.segment(["lungs"])
    assert segmenter.refiner.decoded == 0
    segmenter.segment(["lungs"], settings=TextSegmentationSettings(refine=True))
    assert segmenter.refiner.decoded == 2
    redrawn = trained(replace(PLAIN, settings={**PLAIN.settings, "refine": True}))
    redrawn.segment(["lungs"])
    assert redrawn.refiner.decoded == 2


def test_the_picture_is_encoded_once_for_all_prompts(trained) -> None:
    segmenter = trained()
    alone = segmenter.segment(["left lung"])[0]
    assert segmenter.trained.model.encoded == 6
    together = segmenter.segment(["lungs", "right lung", "left lung"])
    assert segmenter.trained.model.encoded == 6
    assert np.array_equal(together[2].mask, alone.mask)
    assert np.array_equal(together[2].saliency, alone.saliency)


def test_uncertainty_looks_again_in_a_mirror_with_the_sides_exchanged(trained) -> None:
    segmenter = trained()
    settings = TextSegmentationSettings(uncertainty=True, replicas=2)
    (found,) = segmenter.segment(["right lung"], settings=settings)
    assert segmenter.trained.text.asked == ["right lung", "left lung"]
    # the drawer means sides of the picture, so both views agree
    assert found.uncertainty is not None
    assert found.uncertainty.max() < 1e-3
    (plain,) = segmenter.segment(["right lung"])
    assert np.array_equal(found.mask, plain.mask)
    assert plain.uncertainty is None
    (curved,) = segmenter.segment(["lungs"], settings=replace(settings, replicas=4))
    assert curved.uncertainty.max() > 0


def test_words_are_asked_halfway_to_the_name_of_their_target(trained) -> None:
    segmenter = trained()
    segmenter.segment(["the right side of the lungs"])
    assert segmenter.trained.text.asked == ["the right side of the lungs", "lungs"]
    halfway = torch.tensor([1.0, 1.0]) + torch.tensor([1.0, 0.0])
    assert segmenter.trained.model.asked[-1] == pytest.approx((halfway / halfway.norm()).tolist())
    # the name itself is asked as it is, to the last digit
    segmenter.segment(["right lung"])
    assert segmenter.trained.model.asked[-1] == [1.0, 1.0]


def test_words_and_name_both_change_sides_in_the_mirror(trained) -> None:
    segmenter = trained()
    settings = TextSegmentationSettings(uncertainty=True, replicas=2)
    (found,) = segmenter.segment(["the Right field, right lung"], settings=settings)
    words, name = "the left field, left lung", "left lung"
    assert segmenter.trained.text.asked == ["the Right field, right lung", "right lung", words, name]
    assert found.uncertainty.max() < 1e-3


def test_the_batch_size_does_not_change_what_is_drawn(trained) -> None:
    one, three = (
        trained().segment(["lungs"], settings=TextSegmentationSettings(batch_size=size))[0] for size in (1, 3)
    )
    assert np.array_equal(one.saliency, three.saliency)


def test_the_trained_method_is_refused_where_it_cannot_answer(trained) -> None:
    wanted = TextSegmentationSettings(method="trained")
    assert trained().segment(["lungs"], settings=wanted)[0].method == "trained"
    with pytest.raises(SettingsError, match=r"does not know 'hippocampus'\. It knows: lungs, left lung, right lung"):
        trained().segment(["hippocampus"], settings=wanted)
    with pytest.raises(WeightsError, match="'lite-text-guided' of the trained method are not installed"):
        trained(trained=None).segment(["lungs"], settings=wanted)
    assert trained(trained=None).segment(["lungs"])[0].method == "zero-shot"


# ------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"loop": {"stepz": 3}}, "there is no key 'stepz'; did you mean 'steps'?"),
        ({"modell": {}}, "there is no key 'modell'; did you mean 'model'?"),
        ({"model": {"bands": "all"}}, "bands must be one of none, low, high, both, got 'all'"),
        ({"slices": {"hippocampus": 0}}, "hippocampus is 0; at least one slice a volume is needed"),
        ({"slices": {"xrays": 1.5}}, "xrays is 1.5; it is a share between 0 (left out) and 1"),
        ({"slices": {"hippocampus_copies": -1}}, "hippocampus_copies is -1.0; it cannot be negative"),
        ({"finishing": {"blend": 0}}, "blend is 0.0; it is a share above 0 and at most 1"),
        ({"seed": "one"}, "seed must be a whole number, got 'one'"),
    ],
)
def test_a_configuration_with_an_unknown_key_is_refused_by_name(
    content: dict, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert main(["train", "text-guided", str(path)]) == 2
    assert said in capsys.readouterr().err.replace("\n", " ")
