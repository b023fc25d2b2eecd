"""The text-guided pipeline with an encoder and a decoder that can be foreseen.

``Bright`` finds what is bright: its tokens are brightness, its embedding says how much of it there is, and its text
tower knows "bright" (there), "dark" (nowhere) and takes everything else for a null prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from FreqSegLib.clip.aligner import Aligner, AlignerConfig
from FreqSegLib.clip.lite_encoder import LiteEncoder
from FreqSegLib.clip.prompts import MatchedPrompt
from FreqSegLib.clip.vocabulary import meaning
from FreqSegLib.embedding_cache import EmbeddingCache
from FreqSegLib.errors import Cancelled, DeviceError, InputError, SettingsError, VocabularyError
from FreqSegLib.interaction.adaptive_fusion import AdaptiveFusion
from FreqSegLib.presets import PRESETS, Preset, Tuning
from FreqSegLib.sam.promptable import Decoded
from FreqSegLib.settings import TextSegmentationSettings
from FreqSegLib.text_segmentation import Progress, TextSegmenter
from FreqSegLib.volume import Volume

SIDE = 64
PRESET = replace(
    PRESETS["lite"],
    name="bright",
    has_vocabulary=False,
    defaults={**PRESETS["lite"].defaults, "layer_idx": 1, "bottleneck": "nib", "confidence_threshold": 0.3},
)
M2IB = TextSegmentationSettings(bottleneck="m2ib", train_steps=4, num_noise_samples=2)


class Bright:
    """An image-text encoder of 16 x 16 tokens (brightness in the first channel), counting the slices it reads."""

    image_size, token_grid, width, num_layers, embed_dim = SIDE, (16, 16), 3, 2, 4

    def __init__(self, num_prefix_tokens: int = 0, room: int = 1000) -> None:
        self.num_prefix_tokens, self.room = num_prefix_tokens, room
        self.read = 0

    def prefix(self, images: Tensor, layer_idx: int) -> Tensor:
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert images.shape[1:] == (3, SIDE, SIDE)
        self.read += len(images)
        brightness = F.avg_pool2d(images[:, :1], SIDE // 16).flatten(2).transpose(1, 2)
        tokens = torch.cat([brightness * layer_idx, torch.full_like(brightness, 0.1).expand(-1, -1, 2)], dim=-1)
        # class tokens brighter than anything: a map that keeps them would light up in the wrong place
        first = torch.full((len(images), self.num_prefix_tokens, 3), 0.2)
        return torch.cat([first, tokens], dim=1)

    def suffix(self, tokens: Tensor, layer_idx: int) -> Tensor:
        brightness = (tokens[:, self.num_prefix_tokens :, 0] / layer_idx - 0.5).clamp_min(0).sum(1)
        rest = torch.full_like(brightness, 0.05)
        return F.normalize(torch.stack([brightness, rest, rest * 0, rest * 0], dim=-1), dim=-1)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.suffix(self.prefix(images, 1), 1)

    @torch.inference_mode()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        known = {"bright": 0, "dark": 2}
        return torch.eye(4)[[next((i for word, i in known.items() if word in p), 1) for p in prompts]]

    def features(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        raise NotImplementedError


class Boxes:
    """A decoder that draws the boxes it is given, counting the slices it embeds and the calls to it."""

    name, image_size, embedding_shape, frame_mode = "boxes", 32, (1, 8, 8), "pad"
    frame_mode = "pad"

    def __init__(self) -> None:
        self.embedded, self.decoded = 0, 0

    def embed(self, images: Tensor, valid: tuple[int, int] | None = None) -> Tensor:
        assert images.shape[1:] == (3, 32, 32)
        assert valid is not None
        self.embedded += len(images)
        return F.avg_pool2d(images[:, :1], 4)

    def decode(self, embedding: Tensor, *, boxes: Tensor | None = None, multimask: bool = False, **_) -> Decoded:
        assert embedding.shape == (1, *self.embedding_shape)
        assert boxes is not None
        self.decoded += 1
        places = (torch.arange(256.0) + 0.5) / 8 - 0.5
        inside = [torch.minimum(places - low, high - places) for low, high in ((b[0], b[2]) for b in boxes)]
        across = torch.stack(inside)[:, None, None, :]
        down = torch.stack([torch.minimum(places - b[1], b[3] - places) for b in boxes])[:, None, :, None]
        return Decoded(torch.minimum(across, down), torch.full((len(boxes), 1), 0.9))


class Pixels(Boxes):
    """A decoder that draws exactly what is bright in the frame it was shown."""

    name, image_size, embedding_shape = "pixels", 256, (1, 256, 256)
    frame_mode = "pad"

    def embed(self, images: Tensor, valid: tuple[int, int] | None = None) -> Tensor:
        return images[:, :1]

    def decode(self, embedding: Tensor, **_) -> Decoded:
        return Decoded(embedding - 0.5, torch.ones(1, 1))


@dataclass
class Parts:
    segmenter: TextSegmenter
    encoder: Bright
    refiner: Boxes
    folder: Path
    made: list[TextSegmenter] = field(default_factory=list)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Parts]:
    def build(*, preset: Preset = PRESET, folder: str = "cache", encoder: Bright | None = None, **given) -> Parts:
        encoder, refiner = encoder or Bright(), Boxes()
        given.setdefault("refiner", refiner)
        given.setdefault("cache", EmbeddingCache(tmp_path / folder))
        segmenter = TextSegmenter(encoder, preset=preset, weights_key="fake", **given)
        return Parts(segmenter, encoder, refiner, tmp_path / folder)

    return build


def box_volume(
    shape: tuple[int, int, int] = (6, 64, 64),
    target: tuple[slice, slice, slice] = (slice(2, 4), slice(8, 24), slice(36, 56)),
    affine: np.ndarray | None = None,
    **given,
) -> tuple[Volume, np.ndarray]:
    """A bright box in dim noise, and where it is."""
    rng = np.random.default_rng(0)
    array = rng.uniform(10, 14, shape).astype(np.float32)
    truth = np.zeros(shape, dtype=bool)
    truth[target] = True
    array[truth] = rng.uniform(96, 100, int(truth.sum()))
    return Volume(array, np.eye(4) if affine is None else affine, **given), truth


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * float((one & other).sum()) / float(one.sum() + other.sum())


def test_what_is_there_is_found_where_it_is(make) -> None:
    parts = make()
    volume, truth = box_volume()
    parts.segmenter.set_volume(volume)
    (found,) = parts.segmenter.segment(["bright thing"])
    assert found.name == "bright thing"
    assert found.mask.shape == found.saliency.shape == volume.shape
    assert found.mask.dtype == bool
    assert dice(found.mask, truth) > 0.9
    assert found.saliency.dtype == np.float32
    assert found.saliency.min() == 0
    assert 0.99 < found.saliency.max() <= 1
    assert found.score > 0.9
    assert (found.slice_scores > 0.5).tolist() == [False, False, True, True, False, False]
    assert found.uncertainty is None
    assert not found.is_empty
    segment = found.segment()
    assert (segment.name, segment.color) == (found.name, found.color)
    assert segment.mask is found.mask


def test_slices_without_the_target_stay_empty_and_the_decoder_is_not_asked(make) -> None:
    parts = make()
    volume, _ = box_volume()
    parts.segmenter.set_volume(volume)
    (found,) = parts.segmenter.segment(["bright"])
    assert not found.mask[[0, 1, 4, 5]].any()
    assert not found.saliency[[0, 1, 4, 5]].any()
    assert (parts.refiner.embedded, parts.refiner.decoded) == (2, 2)


def test_a_target_that_is_nowhere_is_empty_and_said_so_by_its_score(make) -> None:
    parts = make()
    parts.segmenter.set_volume(box_volume()[0])
    (found,) = parts.segmenter.segment(["dark"])
    assert found.is_empty
    assert not found.saliency.any()
    assert found.score < 0.5
    assert (parts.refiner.embedded, parts.refiner.decoded) == (0, 0)


def test_without_the_gate_every_slice_is_looked_at(make) -> None:
    parts = make()
    volume, truth = box_volume()
    parts.segmenter.set_volume(volume)
    settings = TextSegmentationSettings(gate=False)
    (found,) = parts.segmenter.segment(["bright"], settings=settings)
    assert dice(found.mask, truth) > 0.9
    uncalibrated = make(preset=replace(PRESET, has_gate=False)).segmenter
    uncalibrated.set_volume(volume)
    result = uncalibrated.segment(["bright"])
    assert np.array_equal(result[0].mask, found.mask)
    assert any("cannot tell whether a target is there" in warning for warning in result.warnings)


def rotation(axis: int, degrees: float) -> np.ndarray:
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    matrix = np.eye(4)
    one, other = [a for a in range(3) if a != axis]
    matrix[[one, other, one, other], [one, other, other, one]] = cos, cos, -sin, sin
    return matrix


AFFINES = {
    "straight": np.eye(4),
    "flipped": np.diag([-1.0, 1.0, -1.0, 1.0]),
    "sagittal": np.array([[0.0, 0, 3, 5], [1, 0, 0, -9], [0, -1, 0, 2], [0, 0, 0, 1]]),
    "coronal, flipped": np.array([[-1.0, 0, 0, 0], [0, 0, 1.2, 0], [0, -1, 0, 0], [0, 0, 0, 1]]),
    "thick slices": np.diag([0.8, 0.8, 6.0, 1.0]),
    "oblique": rotation(0, 25) @ rotation(2, -15) @ np.diag([1.0, 0.7, 1.5, 1.0]),
    "thick across the rows": np.diag([1.0, 5.0, 1.0, 1.0]),
}


@pytest.mark.parametrize("name", AFFINES)
def test_the_mask_lands_on_the_volumes_own_grid(make, name: str) -> None:
    """The array is the same in every case, only its place in the patient differs; so is the answer."""
    shape, target = (24, 40, 52), (slice(3, 9), slice(24, 36), slice(8, 26))
    volume, truth = box_volume(shape, target, AFFINES[name])
    parts = make(refiner=Pixels())
    parts.segmenter.set_volume(volume)
    (found,) = parts.segmenter.segment(["bright"])
    assert found.mask.shape == shape
    assert dice(found.mask, truth) > 0.95
    # the coarse mask has the resolution of tokens, but it too is centred on the target
    (coarse,) = parts.segmenter.segment(["bright"], settings=TextSegmentationSettings(refine=False))
    assert dice(coarse.mask, truth) > 0.6
    centres = [np.argwhere(mask).mean(0) for mask in (coarse.mask, truth)]
    np.testing.assert_allclose(*centres, atol=1.0)


def test_a_decoder_that_wants_its_square_filled_finds_the_same_place(make) -> None:
    class Stretched(Pixels):
        frame_mode = "stretch"

        def embed(self, images: Tensor, valid: tuple[int, int] | None = None) -> Tensor:
            assert valid == (256, 256)
            return super().embed(images, valid)

    volume, truth = box_volume((5, 40, 80), (slice(1, 3), slice(6, 20), slice(48, 72)), np.diag([1.0, 1.5, 2.0, 1.0]))
    parts = make(refiner=Stretched())
    parts.segmenter.set_volume(volume)
    assert dice(parts.segmenter.segment(["bright"])[0].mask, truth) > 0.95


def test_a_2d_image_is_one_slice(make) -> None:
    volume, truth = box_volume((1, 50, 80), (slice(0, 1), slice(10, 30), slice(8, 32)), spatial_dimension=2)
    parts = make()
    parts.segmenter.set_volume(volume)
    assert dice(parts.segmenter.segment("bright")[0].mask, truth) > 0.85


def test_class_tokens_stand_for_no_place(make) -> None:
    volume, truth = box_volume()
    parts = make(encoder=Bright(num_prefix_tokens=2))
    parts.segmenter.set_volume(volume)
    (found,) = parts.segmenter.segment(["bright"])
    plain = make(folder="without").segmenter
    plain.set_volume(volume)
    np.testing.assert_allclose(found.saliency, plain.segment(["bright"])[0].saliency, atol=1e-6)
    (found,) = parts.segmenter.segment(["bright"], settings=M2IB)
    centre = np.average(np.argwhere(truth >= 0), axis=0, weights=found.saliency.ravel() ** 4)
    np.testing.assert_allclose(centre, np.argwhere(truth).mean(0), atol=2.5)


def test_a_volume_is_read_once_however_many_prompts(make) -> None:
    parts = make()
    volume, _ = box_volume()
    parts.segmenter.set_volume(volume)
    assert parts.encoder.read == 6
    parts.segmenter.segment(["bright"])
    parts.segmenter.segment(["bright thing", "dark", "another bright"])
    assert parts.encoder.read == 6
    assert parts.refiner.embedded == 2
    assert parts.refiner.decoded == 6
    parts.segmenter.set_volume(box_volume(target=(slice(0, 1), slice(8, 24), slice(8, 24)))[0])
    assert parts.encoder.read == 12


def test_a_prompt_in_company_is_the_prompt_alone(make) -> None:
    parts = make(settings=M2IB)
    parts.segmenter.set_volume(box_volume()[0])
    together = parts.segmenter.segment(["dark", "bright", "very bright"])
    assert [found.name for found in together] == ["dark", "bright", "very bright"]
    assert len(together) == 3
    for found in together:
        (alone,) = parts.segmenter.segment([found.name])
        assert np.array_equal(alone.mask, found.mask)
        assert np.array_equal(alone.saliency, found.saliency)
        assert alone.color == found.color


def test_the_seed_decides(make) -> None:
    parts = make()
    parts.segmenter.set_volume(box_volume()[0])
    one, again, other = (
        parts.segmenter.segment(["bright"], settings=replace(M2IB, seed=seed))[0] for seed in (1, 1, 2)
    )
    assert np.array_equal(one.mask, again.mask)
    assert np.array_equal(one.saliency, again.saliency)
    assert not np.array_equal(one.saliency, other.saliency)


def test_the_batch_size_does_not_change_the_result(make) -> None:
    found = []
    for size in (1, 2, 5):
        parts = make(folder=f"cache {size}", settings=replace(M2IB, batch_size=size))
        parts.segmenter.set_volume(box_volume(target=(slice(1, 5), slice(8, 24), slice(36, 56)))[0])
        found.append(parts.segmenter.segment(["bright"])[0])
    for other in found[1:]:
        assert np.array_equal(other.mask, found[0].mask)
        np.testing.assert_allclose(other.saliency, found[0].saliency, atol=1e-5)
    assert not found[0].is_empty


def test_memory_that_runs_out_steps_the_batch_down(make) -> None:
    volume, truth = box_volume()
    parts = make(encoder=Bright(room=2), settings=TextSegmentationSettings(batch_size=5))
    parts.segmenter.set_volume(volume)
    assert parts.encoder.read == 6
    assert dice(parts.segmenter.segment(["bright"])[0].mask, truth) > 0.9
    with pytest.raises(DeviceError, match="single slice"):
        make(encoder=Bright(room=0), folder="other").segmenter.set_volume(volume)


class Stop:
    """Cancels at the given poll."""

    def __init__(self, at: int) -> None:
        self.at, self.polls = at, 0

    def __call__(self) -> bool:
        self.polls += 1
        return self.polls == self.at


def test_a_run_can_be_cancelled_at_every_poll_of_every_stage(make) -> None:
    volume, _ = box_volume()
    watch = Stop(-1)
    parts = make(folder="watched")
    stages: list[str] = []
    parts.segmenter.set_volume(volume, cancel=watch, progress=lambda p: stages.append(p.stage))
    read_polls = watch.polls
    parts.segmenter.segment(["bright"], cancel=watch, progress=lambda p: stages.append(p.stage))
    assert [name.split(":")[0] for name in dict.fromkeys(stages)] == ["Reading slices", "Looking", "Drawing"]
    assert watch.polls == len(stages)
    for at in range(1, watch.polls + 1):
        parts = make(folder=f"cancelled {at}")
        stop = Stop(at)
        if at <= read_polls:
            with pytest.raises(Cancelled):
                parts.segmenter.set_volume(volume, cancel=stop)
            assert parts.segmenter.prepared is None
        else:
            parts.segmenter.set_volume(volume, cancel=stop)
            with pytest.raises(Cancelled):
                parts.segmenter.segment(["bright"], cancel=stop)


def test_after_a_cancelled_reading_what_was_read_is_kept_and_the_old_volume_stays(make) -> None:
    first, _ = box_volume()
    second, truth = box_volume(target=(slice(0, 2), slice(40, 60), slice(4, 20)))
    parts = make()
    parts.segmenter.set_volume(first)
    with pytest.raises(Cancelled):
        parts.segmenter.set_volume(second, cancel=Stop(4))
    assert parts.segmenter.prepared.volume is first
    before = parts.encoder.read
    parts.segmenter.set_volume(second)
    assert parts.encoder.read - before == 6 - 3
    assert dice(parts.segmenter.segment(["bright"])[0].mask, truth) > 0.9


def test_progress_runs_from_nothing_to_all_in_every_stage(make) -> None:
    parts = make()
    seen: list[Progress] = []
    parts.segmenter.set_volume(box_volume()[0], progress=seen.append)
    parts.segmenter.segment(["bright", "dark"], progress=seen.append)
    stages = {p.stage: [q for q in seen if q.stage == p.stage] for p in seen}
    assert list(stages) == ["Reading slices", "Looking: bright", "Drawing: bright"]
    assert [p.total for p in (steps[0] for steps in stages.values())] == [6, 2, 2]
    for steps in stages.values():
        assert [p.done for p in steps] == list(range(steps[0].total + 1))
        assert steps[0].seconds_left is None
        assert steps[-1].seconds_left == 0
        assert all(p.seconds_left >= 0 for p in steps[1:])


def test_cold_warm_evicted_damaged_and_absent_caches_give_the_same_masks(make, tmp_path: Path) -> None:
    volume, _ = box_volume()

    def run(parts: Parts) -> np.ndarray:
        parts.segmenter.set_volume(volume)
        (found,) = parts.segmenter.segment(["bright"], settings=M2IB)
        return np.concatenate([found.mask.ravel(), found.saliency.ravel()])

    cold = make()
    expected = run(cold)
    warm = make()
    assert np.array_equal(run(warm), expected)
    assert (warm.encoder.read, warm.refiner.embedded) == (0, 0)
    evicted = make()
    evicted.segmenter.set_volume(volume)
    evicted.segmenter.cache.clear()
    (found,) = evicted.segmenter.segment(["bright"], settings=M2IB)
    assert np.array_equal(np.concatenate([found.mask.ravel(), found.saliency.ravel()]), expected)
    assert evicted.encoder.read > 0
    for path in (tmp_path / "cache").rglob("*.npy"):
        path.write_bytes(path.read_bytes()[:-7])
    assert np.array_equal(run(make()), expected)
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    assert np.array_equal(run(make(folder="file")), expected)


def test_embeddings_are_told_apart_by_all_that_shaped_them(make) -> None:
    """Same voxels, other window, other weights, other place in the patient: nothing is taken over wrongly."""
    volume, _ = box_volume()
    keys = set()
    for affine in (np.eye(4), np.diag([-1.0, 1, 1, 1]), np.diag([1.0, 2, 1, 1])):
        for window in ("auto", "60/100"):
            parts = make()
            prepared = parts.segmenter.set_volume(
                replace(volume, affine=affine), settings=TextSegmentationSettings(intensity=window)
            )
            keys.add(prepared.key)
    parts = make()
    parts.segmenter._weights_key = "others"
    keys.add(parts.segmenter.set_volume(volume).key)
    keys.add(make().segmenter.set_volume(volume.with_array(volume.array + 1)).key)
    assert len(keys) == 8


def test_the_cache_is_kept_to_its_size_after_a_volume_too(make, tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path / "small", gigabytes=1e-6)
    parts = make(cache=cache)
    first = parts.segmenter.set_volume(box_volume()[0])
    second = parts.segmenter.set_volume(box_volume(target=(slice(0, 1), slice(8, 24), slice(8, 24)))[0])
    assert not cache.has(first.key, "tokens-1-0")
    assert cache.has(second.key, "tokens-1-0")


def test_uncertainty_is_the_spread_over_replicas(make) -> None:
    parts = make()
    volume, _ = box_volume()
    parts.segmenter.set_volume(volume)
    settings = replace(M2IB, uncertainty=True, replicas=3)
    (found,) = parts.segmenter.segment(["bright"], settings=settings)
    assert found.uncertainty is not None
    assert found.uncertainty.shape == volume.shape
    assert found.uncertainty[2:4].max() > 1e-4
    assert not found.uncertainty[[0, 1, 4, 5]].any()
    assert found.uncertainty.min() >= 0
    (sure,) = parts.segmenter.segment(["bright"], settings=TextSegmentationSettings(uncertainty=True))
    (alone,) = parts.segmenter.segment(["bright"], settings=TextSegmentationSettings())
    assert sure.uncertainty is not None
    assert sure.uncertainty[2:4].max() > 1e-4, "a deterministic bottleneck borrows the other one's spread"
    assert np.array_equal(sure.mask, alone.mask)
    (unasked,) = parts.segmenter.segment(["bright"], settings=M2IB)
    assert unasked.uncertainty is None


def test_without_refinement_the_coarse_mask_is_the_result(make) -> None:
    volume, _ = box_volume()
    refined, coarse = make(), make()
    refined.segmenter.set_volume(volume)
    result = refined.segmenter.segment(
        ["bright"], settings=TextSegmentationSettings(refine=False), return_intermediate=True
    )
    assert refined.refiner.embedded == 0
    for item in result[0].intermediates:
        assert np.array_equal(item.coarse, item.mask)
        assert np.array_equal(item.mask, result[0].mask[item.index])
    assert not any("SAM" in warning for warning in result.warnings)
    coarse = make(refiner=None)
    coarse.segmenter.set_volume(volume)
    alone = coarse.segmenter.segment(["bright"])
    assert np.array_equal(alone[0].mask, result[0].mask)
    assert any("No SAM weights" in warning for warning in alone.warnings)


def test_a_decoder_that_finds_nothing_leaves_the_coarse_mask(make) -> None:
    class Blind(Boxes):
        def decode(self, embedding: Tensor, **_) -> Decoded:
            return Decoded(torch.full((1, 1, 256, 256), -1.0), torch.zeros(1, 1))

    volume, truth = box_volume()
    parts = make(refiner=Blind())
    parts.segmenter.set_volume(volume)
    assert dice(parts.segmenter.segment(["bright"])[0].mask, truth) > 0.8


@pytest.mark.parametrize("settings", [TextSegmentationSettings(), M2IB], ids=["nib", "m2ib"])
def test_untrained_frequency_branches_change_nothing_and_say_so(make, settings: TextSegmentationSettings) -> None:
    parts = make()
    parts.segmenter.set_volume(box_volume()[0])
    raw = parts.segmenter.segment(["bright"], settings=settings)
    assert parts.encoder.read == 6
    for fusion in ("adaptive", "simple", "cat_conv"):
        with_branches = replace(settings, frequency_branches="on", fusion=fusion)
        both = parts.segmenter.segment(["bright"], settings=with_branches)
        assert np.array_equal(both[0].mask, raw[0].mask)
        np.testing.assert_allclose(both[0].saliency, raw[0].saliency, atol=1e-7)
        assert any("no fusion weights are trained" in warning for warning in both.warnings)
    assert not raw.warnings


def test_a_trained_fusion_does_change_the_saliency(make) -> None:
    fusion = AdaptiveFusion("simple")
    with torch.no_grad():
        fusion.gate.fill_(1.0)
    parts = make(fusion=fusion.requires_grad_(False))
    parts.segmenter.set_volume(box_volume()[0])
    raw = parts.segmenter.segment(["bright"])
    fused = parts.segmenter.segment(
        ["bright"], settings=TextSegmentationSettings(frequency_branches="on"), return_intermediate=True
    )
    assert np.abs(fused[0].saliency - raw[0].saliency).max() > 0.05
    item = fused[0].intermediates[2]
    weight = float(torch.tanh(torch.tensor(1.0)))
    expected = item.saliency["raw"] + weight * (
        (item.saliency["low"] + item.saliency["high"]) / 2 - item.saliency["raw"]
    )
    np.testing.assert_allclose(item.fused, expected.clip(0, 1), atol=1e-5)


def test_empty_slices_do_not_move_the_scale_of_the_saliency(make) -> None:
    """The same two slices with the target, with and without empty ones around them."""
    volume, _ = box_volume()
    parts = make(settings=M2IB)
    parts.segmenter.set_volume(volume)
    (among,) = parts.segmenter.segment(["bright"])
    alone = parts.segmenter
    alone.set_volume(Volume(volume.array[2:4].copy(), volume.affine))
    (only,) = alone.segment(["bright"])
    for found in (among.saliency[2:4], only.saliency):
        assert (found.min(), found.max()) == pytest.approx((0.0, 1.0), abs=0.01)


def test_every_stage_of_every_slice_is_kept_when_asked_for(make) -> None:
    parts = make()
    volume, _ = box_volume()
    parts.segmenter.set_volume(volume)
    settings = replace(M2IB, uncertainty=True, replicas=2, frequency_branches="on")
    (found,) = parts.segmenter.segment(["bright"], settings=settings, return_intermediate=True)
    assert [item.index for item in found.intermediates] == list(range(6))
    for item in found.intermediates:
        assert item.image.shape == item.fused.shape == item.mask.shape == (64, 64)
        assert set(item.frequency) == {"low", "high"}
        assert set(item.saliency) == {"raw", "low", "high"}
        assert np.array_equal(item.mask, found.mask[item.index])
        assert np.array_equal(item.fused, found.saliency[item.index])
        assert np.array_equal(item.uncertainty, found.uncertainty[item.index])
        assert item.probability == pytest.approx(found.slice_scores[item.index])
        assert bool(item.prompts) == bool(item.coarse.any())
        assert (item.image.min() >= 0) & (item.image.max() <= 1)
    box = found.intermediates[2].prompts[0].box
    assert box == pytest.approx((35.5, 7.5, 55.5, 23.5), abs=3)
    (plain,) = parts.segmenter.segment(["bright"])
    assert plain.intermediates == ()


def test_other_grey_levels_or_another_axis_read_the_volume_again(make) -> None:
    parts = make()
    volume, truth = box_volume((40, 44, 48), (slice(8, 20), slice(20, 36), slice(4, 24)))
    parts.segmenter.set_volume(volume)
    assert parts.segmenter.prepared.stack.axis == "axial"
    (found,) = parts.segmenter.segment(["bright"], settings=TextSegmentationSettings(axis="sagittal"))
    assert parts.segmenter.prepared.stack.axis == "sagittal"
    assert len(found.slice_scores) == 48
    assert dice(found.mask, truth) > 0.7
    (found,) = parts.segmenter.segment(["bright"])
    assert len(found.slice_scores) == 48


@pytest.mark.parametrize("prompts", [[], ["bright", "bright "], [""], ["\x00"]])
def test_unusable_prompts_are_refused_before_any_work(make, prompts: list[str]) -> None:
    parts = make()
    parts.segmenter.set_volume(box_volume()[0])
    with pytest.raises(SettingsError):
        parts.segmenter.segment(prompts)
    assert parts.refiner.decoded == 0


def test_what_cannot_be_segmented_is_refused(make) -> None:
    parts = make()
    with pytest.raises(SettingsError, match="set_volume"):
        parts.segmenter.segment(["bright"])
    with pytest.raises(InputError):
        parts.segmenter.set_volume(Volume(np.full((3, 8, 8), 7.0), np.eye(4)))
    with pytest.raises(SettingsError, match="layer_idx"):
        parts.segmenter.set_volume(box_volume()[0], settings=TextSegmentationSettings(layer_idx=3))


class Known:
    """A matcher that takes "bright" for a brain tumour and knows nothing else."""

    def match(self, prompt: str) -> MatchedPrompt:
        return MatchedPrompt(prompt, meaning("brain tumour") if "bright" in prompt else None, 0.9)

    def require(self, prompt: str) -> MatchedPrompt:
        found = self.match(prompt)
        if found.meaning is None:
            raise VocabularyError(f"does not know '{prompt}'")
        return found


def test_a_vocabulary_is_kept_unless_experiments_are_wanted(make) -> None:
    preset = replace(PRESET, has_vocabulary=True)
    parts = make(preset=preset, matcher=Known())
    volume, truth = box_volume()
    parts.segmenter.set_volume(volume)
    result = parts.segmenter.segment(["bright"])
    assert dice(result[0].mask, truth) > 0.9
    assert (result[0].meaning, result[0].color) == ("brain tumour", meaning("brain tumour").color)
    with pytest.raises(VocabularyError, match="dark"):
        parts.segmenter.segment(["bright", "dark"])
    (unknown,) = parts.segmenter.segment(["dark"], settings=TextSegmentationSettings(experimental=True))
    assert unknown.meaning is None


def test_what_was_tuned_for_a_meaning_is_used_for_it_alone(make) -> None:
    tuning = {"brain tumour": Tuning({"num_contours": 1}, slope=10.0, offset=5.0), "*": Tuning()}
    parts = make(matcher=Known(), tuning=tuning)
    parts.segmenter.set_volume(box_volume()[0])
    settings = TextSegmentationSettings(experimental=True)
    assert parts.segmenter.segment(["bright"], settings=settings)[0].is_empty
    tuning["brain tumour"] = replace(tuning["brain tumour"], offset=0.0)
    assert not parts.segmenter.segment(["bright"], settings=settings)[0].is_empty


class Tower:
    """LiteMedSAM's place in the lite preset: one image pass for encoder and decoder."""

    name, image_size, embedding_shape, frame_mode = "tower", SIDE, (4, 16, 16), "pad"
    frame_mode = "pad"

    def __init__(self) -> None:
        self.embedded, self.decoded = 0, 0

    def embed(self, images: Tensor, valid: tuple[int, int] | None = None) -> Tensor:
        self.embedded += len(images)
        pooled = F.avg_pool2d(images, 4)
        return torch.cat([pooled, 1 - pooled[:, :1]], dim=1)

    def decode(self, embedding: Tensor, *, boxes: Tensor | None = None, **_) -> Decoded:
        assert embedding.shape == (1, *self.embedding_shape)
        assert boxes is not None
        self.decoded += 1
        # the mask is read off the embedding: what is bright
        bright = F.interpolate(embedding[:, :1] - 0.5, (256, 256), mode="bilinear")
        return Decoded(bright.expand(len(boxes), -1, -1, -1), torch.ones(len(boxes), 1))


class Words:
    def encode(self, sentences: Sequence[str]) -> Tensor:
        with torch.inference_mode():
            return F.normalize(torch.tensor([[len(s), s.count("b"), s.count("e"), 1.0] * 2 for s in sentences]), dim=-1)


@pytest.fixture
def lite(tmp_path: Path) -> tuple[TextSegmenter, Tower]:
    torch.manual_seed(0)
    config = AlignerConfig(
        width=8, depth=3, class_depth=1, num_heads=2, embedding_channels=4, pooled_side=16, patch=2, embed_dim=8
    )
    aligner = Aligner(config).eval().requires_grad_(False)
    tower = Tower()
    encoder = LiteEncoder(tower, aligner, Words())
    settings = replace(M2IB, gate=False, threshold="fixed", threshold_value=0.2, confidence_threshold=0.0)
    preset = replace(PRESET, defaults={**PRESET.defaults, "layer_idx": 3})
    segmenter = TextSegmenter(
        encoder, tower, preset, weights_key="lite", settings=settings, cache=EmbeddingCache(tmp_path / "lite")
    )
    return segmenter, tower


def test_the_lite_encoder_runs_its_tower_once_a_slice_for_everything(lite: tuple[TextSegmenter, Tower]) -> None:
    segmenter, tower = lite
    segmenter.set_volume(box_volume()[0])
    assert tower.embedded == 6
    (first,) = segmenter.segment(["bright"])
    assert tower.decoded > 0
    segmenter.segment(["dark", "bright"])
    assert tower.embedded == 6
    # another layer of the aligner needs no other pass of the tower
    segmenter.segment(["bright"], settings=replace(segmenter.settings, layer_idx=2))
    assert tower.embedded == 6
    # the low- and the high-frequency branch take one pass each, the raw one none
    both = segmenter.segment(["bright"], settings=replace(segmenter.settings, frequency_branches="on"))
    assert tower.embedded == 18
    assert np.array_equal(both[0].mask, first.mask)


def test_the_lite_path_is_the_same_cold_warm_and_after_eviction(lite: tuple[TextSegmenter, Tower]) -> None:
    segmenter, tower = lite
    volume, _ = box_volume()
    segmenter.set_volume(volume)
    (cold,) = segmenter.segment(["bright"])
    segmenter.set_volume(volume)
    (warm,) = segmenter.segment(["bright"])
    assert tower.embedded == 6
    segmenter.cache.clear()
    (evicted,) = segmenter.segment(["bright"])
    for other in (warm, evicted):
        assert np.array_equal(cold.mask, other.mask)
        assert np.array_equal(cold.saliency, other.saliency)
    assert cold.mask.any()


def test_the_lite_encoder_is_prefix_and_suffix_of_its_tower(lite: tuple[TextSegmenter, Tower]) -> None:
    encoder = lite[0].encoder
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    expected = encoder.aligner(encoder.aligner.pool(encoder.tower.embed(images)))
    for layer in (1, 2, 3):
        torch.testing.assert_close(encoder.suffix(encoder.prefix(images, layer), layer), expected)
    torch.testing.assert_close(encoder.encode_image(images), expected)
    maps = encoder.features(images, [1, 3])
    for layer, found in zip((1, 3), maps, strict=True):
        assert found.shape == (2, 8, 8, 8)
        torch.testing.assert_close(found[1, :, 2, 5], encoder.prefix(images, layer)[1, 2 * 8 + 5])
    # before training the text is MiniLM's own
    torch.testing.assert_close(encoder.encode_text(["abc"]), Words().encode(["abc"]).clone())
