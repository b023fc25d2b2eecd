"""What the worker computes, with the real pipeline around an encoder and a decoder that can be foreseen."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_text_segmentation import PRESET, Boxes, Bright, box_volume, dice, make  # noqa: F401

from FreqSegLib import protocol, worker, worker_session
from FreqSegLib.errors import Cancelled, FreqSegError, InputError, SettingsError, VocabularyError, WeightsError
from FreqSegLib.settings import TextSegmentationSettings
from FreqSegLib.slices import SliceStack
from FreqSegLib.text_segmentation import TextSegmenter
from FreqSegLib.volume import Volume
from FreqSegLib.worker_session import Session

OBLIQUE = np.array([[0.0, 0.4, -2.9, 12.0], [0.79, 0.0, 0.1, -7.0], [0.1, -0.69, -0.4, 30.0], [0.0, 0.0, 0.0, 1.0]])


class Asked:
    """A session, and questions to it as the worker puts them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loaded: list[str] = []
        self.encoder, self.refiner = Bright(), Boxes()
        self.session = Session(self._load)
        self.job: worker.Job | None = None
        self._count = 0

    def _load(self, choice: Any, cache: Any) -> TextSegmenter:
        self.loaded.append(choice.preset)
        cache.folder = self.folder / "cache"
        return TextSegmenter(self.encoder, self.refiner, PRESET, weights_key=choice.preset, cache=cache)

    def __call__(self, request: str, **values: Any) -> dict[str, Any]:
        self._count += 1
        number = str(self._count)
        line = protocol.encode({"id": number, "request": request, "values": values})
        _, name, parsed = protocol.parse(protocol.decode(line))
        events = worker.Events(io.BytesIO(), lambda: None)
        self.job = worker.Job(number, name, parsed, events, self.folder, threading.Event())
        answer = self.session.handlers[name](parsed, self.job)
        return protocol.decode(protocol.encode(answer))

    def volume(self, volume: Volume) -> dict[str, Any]:
        self._count += 1
        described = protocol.write_array(self.folder / f"volume-{self._count}.raw", volume.array).described()
        return {
            "array": described,
            "affine": volume.affine,
            "name": volume.name,
            "spatial_dimension": volume.spatial_dimension,
        }

    def set(self, volume: Volume, **values: Any) -> dict[str, Any]:
        return self("set_volume", volume=self.volume(volume), **values)


@pytest.fixture
def ask(tmp_path: Path) -> Asked:
    return Asked(tmp_path)


def array_of(described: Mapping[str, Any]) -> np.ndarray:
    return protocol.ArrayDescription(**{**described, "shape": tuple(described["shape"])}).open()


def test_a_result_is_the_pipelines_own(ask: Asked, make: Callable[..., Any]) -> None:  # noqa: F811
    volume, _ = box_volume()
    found = ask.set(volume)
    answer = ask("segment", volume_id=found["volume_id"], prompts=[" bright  thing "], settings={"seed": 3})
    (one,) = answer["segments"]
    direct = make().segmenter
    direct.set_volume(volume)
    (expected,) = direct.segment(["bright thing"], settings=TextSegmentationSettings(seed=3))
    np.testing.assert_array_equal(array_of(one["mask"]), expected.mask)
    np.testing.assert_array_equal(array_of(one["saliency"]), expected.saliency)
    assert one["slice_scores"] == pytest.approx(expected.slice_scores.tolist())
    assert one["score"] == pytest.approx(expected.score)
    assert (one["name"], one["empty"], one["color"]) == ("bright thing", False, list(expected.color))
    millilitres = expected.mask.sum() / 1000
    assert one["sentence"].startswith(f"bright thing: {millilitres:.3g} ml (probability ")
    assert ask("segment", volume_id=found["volume_id"], prompts=["dark"])["segments"][0]["sentence"].startswith(
        "dark: not found (probability 0."
    )


def test_what_ran_tells_that_a_second_prompt_reads_nothing_again(ask: Asked) -> None:
    first = ask.set(box_volume()[0])
    assert first["ran"] == ["Loading models", "Reading slices"]
    assert (first["encoded"], ask.encoder.read) == (6, 6)
    answer = ask("segment", volume_id=first["volume_id"], prompts=["bright"])
    assert answer["ran"] == ["Looking", "Drawing"]
    assert ask.encoder.read == 6
    again = ask("segment", volume_id=first["volume_id"], prompts=["bright", "bright spot"])
    assert (again["ran"], again["encoded"], ask.encoder.read) == (["Looking", "Drawing"], 0, 6)
    assert ask("segment", volume_id=first["volume_id"], prompts=["bright spot"])["ran"] == []
    assert ask.loaded == ["lite"]


def test_two_volumes_in_turn_are_read_once_each_and_keep_their_results(ask: Asked) -> None:
    one, other = box_volume()[0], box_volume(target=(slice(0, 2), slice(30, 50), slice(8, 24)))[0]
    numbers = [ask.set(volume)["volume_id"] for volume in (one, other)]
    masks = [
        array_of(ask("segment", volume_id=number, prompts=["bright"])["segments"][0]["mask"]) for number in numbers
    ]
    assert ask.encoder.read == 12
    for number, mask in zip(numbers, masks, strict=True):
        answer = ask("segment", volume_id=number, prompts=["bright"], settings={"num_contours": 1})
        np.testing.assert_array_equal(array_of(answer["segments"][0]["mask"]), mask)
    assert [ask.set(volume)["volume_id"] for volume in (one, other)] == numbers
    assert ask.encoder.read == 12
    third = ask.set(box_volume(shape=(3, 64, 64))[0])["volume_id"]
    assert third not in numbers
    with pytest.raises(protocol.WorkerError, match="set it again"):
        ask("segment", volume_id=numbers[0], prompts=["bright"])
    assert ask.set(one) == {**ask.set(one), "encoded": 0, "ran": []}


def test_another_place_region_or_preset_is_another_volume(ask: Asked) -> None:
    volume = box_volume()[0]
    same = ask.set(volume)["volume_id"]
    assert ask.set(Volume(volume.array.copy(), volume.affine, name="renamed"))["volume_id"] == same
    shifted = volume.affine.copy()
    shifted[0, 3] = 5
    others = [
        ask.set(Volume(volume.array, shifted))["volume_id"],
        ask.set(volume, roi=[[0, 64], [0, 64], [0, 5]])["volume_id"],
        ask.set(volume, preset="biomedclip-sam")["volume_id"],
        ask.set(volume, settings={"axis": "coronal"})["volume_id"],
    ]
    assert len({same, *others}) == 5


@pytest.mark.parametrize("affine", [np.eye(4), np.diag([-0.5, -0.5, 4, 1.0]), OBLIQUE])
def test_the_region_of_interest_is_all_the_pipeline_sees_and_results_are_on_the_whole_grid(
    ask: Asked,
    make: Callable[..., Any],  # noqa: F811
    affine: np.ndarray,
) -> None:
    volume, truth = box_volume(affine=affine)
    roi = [[20, 90], [-5, 40], [1, 5]]
    found = ask.set(volume, roi=roi)
    answer = ask("segment", volume_id=found["volume_id"], prompts=["bright"], uncertainty=True)
    crop = np.s_[1:5, 0:40, 20:64]
    corner = affine.copy()
    corner[:3, 3] = (affine @ [20, 0, 1, 1])[:3]
    alone = make().segmenter
    prepared = alone.set_volume(Volume(np.ascontiguousarray(volume.array[crop]), corner))
    (expected,) = alone.segment(["bright"], settings=TextSegmentationSettings(uncertainty=True))
    assert found["slices"] == prepared.stack.count
    (one,) = answer["segments"]
    for kind, part in (("mask", expected.mask), ("saliency", expected.saliency), ("uncertainty", expected.uncertainty)):
        whole = array_of(one[kind])
        assert whole.shape == volume.shape
        np.testing.assert_array_equal(whole[crop], part)
        assert np.count_nonzero(whole) == np.count_nonzero(part)
    assert dice(array_of(one["mask"]) > 0, truth) > 0.8


@pytest.mark.parametrize("roi", [[[64, 70], [0, 64], [0, 6]], [[5, 5], [0, 9], [0, 6]], [[0, 9], [0, 9], [-9, -1]]])
def test_a_region_that_misses_the_volume_is_refused(ask: Asked, roi: list[list[int]]) -> None:
    with pytest.raises(InputError, match="holds nothing of the volume, which has 64 x 64 x 6 voxels"):
        ask.set(box_volume()[0], roi=roi)


@pytest.mark.parametrize(
    ("values", "kind", "said"),
    [
        ({"settings": {"sead": 1}}, SettingsError, "no setting 'sead'"),
        ({"settings": {"levels": 0}}, SettingsError, "levels must lie in"),
    ],
)
def test_wrong_settings_are_refused(ask: Asked, values: dict[str, Any], kind: type[FreqSegError], said: str) -> None:
    with pytest.raises(kind, match=said):
        ask.set(box_volume()[0], **values)


def test_volumes_that_cannot_be_segmented_are_refused_with_a_sentence(ask: Asked) -> None:
    volume = box_volume()[0]
    bad = volume.array.copy()
    bad[2, 3, 4] = np.nan
    with pytest.raises(InputError, match="1 voxels are NaN or infinite"):
        ask.set(Volume(bad, volume.affine))
    found = ask.set(Volume(bad, volume.affine), fill_nonfinite=10)
    assert "1 voxels were NaN or infinite and are now 10" in found["warnings"][0]
    with pytest.raises(InputError, match="every voxel has the value 0"):
        ask.set(Volume(np.zeros((3, 4, 5)), np.eye(4)))
    described = {**ask.volume(volume), "affine": [[1, 0], [0, 1]]}
    with pytest.raises(InputError, match="affine must be 4 x 4"):
        ask("set_volume", volume=described)
    with pytest.raises(SettingsError, match="No prompt was given"):
        ask("segment", volume_id=found["volume_id"], prompts=[])
    with pytest.raises(SettingsError, match="given twice"):
        ask("segment", volume_id=found["volume_id"], prompts=["bright", "bright "])


def test_real_models_that_are_missing_are_a_matter_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from FreqSegLib import weights
    from FreqSegLib.embedding_cache import EmbeddingCache

    monkeypatch.setattr(weights, "search_folders", lambda: [tmp_path])
    with pytest.raises(WeightsError, match="not installed"):
        worker_session.load_segmenter(worker_session.ModelChoice("lite"), EmbeddingCache(tmp_path))
    assert issubclass(VocabularyError, SettingsError)


def test_a_preview_is_marked_alone_until_the_volume_was_segmented_like_that(ask: Asked) -> None:
    volume, truth = box_volume(affine=np.diag([1, 1, -2.5, 1.0]))
    found = ask.set(volume)
    before = ask.encoder.read
    # slices run from inferior to superior, against k
    assert SliceStack.of(volume).flips[0]
    # the decoder of this pipeline has a tower of its own, which has seen no slice so far
    assert ask("preview_slice", volume_id=found["volume_id"], index=3, prompts=["bright"])["encoded"] == 1
    preview = ask("preview_slice", volume_id=found["volume_id"], index=3, prompts=["bright"])
    assert preview["alone"] is True
    assert (preview["encoded"], ask.encoder.read) == (0, before), "the volume's embeddings were not used"
    (one,) = preview["segments"]
    mask = array_of(one["mask"])
    assert mask.shape == (1, 64, 64)
    assert dice(mask[0] > 0, truth[3]) > 0.9
    whole = ask("segment", volume_id=found["volume_id"], prompts=["bright"])["segments"][0]
    exact = ask("preview_slice", volume_id=found["volume_id"], index=3, prompts=["bright"])
    assert (exact["alone"], exact["ran"]) == (False, [])
    for kind in ("mask", "saliency"):
        np.testing.assert_array_equal(array_of(exact["segments"][0][kind])[0], array_of(whole[kind])[3])
    assert exact["segments"][0]["slice_scores"] == [whole["slice_scores"][2]]
    assert ask("preview_slice", volume_id=found["volume_id"], index=0, prompts=["bright"])["segments"][0]["empty"]
    other = ask("preview_slice", volume_id=found["volume_id"], index=3, prompts=["bright"], settings={"seed": 1})
    assert other["alone"] is True
    with pytest.raises(InputError, match="Slice 6 lies outside"):
        ask("preview_slice", volume_id=found["volume_id"], index=6, prompts=["bright"])


def test_a_preview_along_another_axis_and_in_a_region(ask: Asked) -> None:
    volume, truth = box_volume((48, 64, 64), (slice(16, 32), slice(8, 24), slice(36, 56)))
    found = ask.set(volume, roi=[[10, 60], [2, 60], [0, 48]], settings={"axis": "sagittal"})
    assert (found["array_axis"], found["axis"]) == (2, "sagittal")
    preview = ask("preview_slice", volume_id=found["volume_id"], index=40, prompts=["bright"])
    mask = array_of(preview["segments"][0]["mask"])
    assert mask.shape == (48, 58, 1)
    assert dice(mask[..., 0] > 0, truth[:, 2:60, 40]) > 0.7


def test_a_slice_can_be_previewed_before_its_volume_is_set(ask: Asked) -> None:
    volume, truth = box_volume()
    alone = Volume(volume.array[2:3], volume.affine)
    preview = ask("preview_slice", volume=ask.volume(alone), prompts=["bright"])
    assert (preview["alone"], preview["index"], preview["array_axis"]) == (True, None, 0)
    assert dice(array_of(preview["segments"][0]["mask"])[0] > 0, truth[2]) > 0.9
    with pytest.raises(InputError, match="takes one slice"):
        ask("preview_slice", volume=ask.volume(volume), prompts=["bright"])
    with pytest.raises(protocol.RequestError, match="volume_id and index"):
        ask("preview_slice", volume_id="x", prompts=["bright"])


def test_refining_changes_the_slices_that_carry_points_and_encodes_nothing(ask: Asked) -> None:
    volume, _ = box_volume(affine=np.diag([1, 1, -1, 1.0]))
    found = ask.set(volume, roi=[[0, 64], [4, 60], [1, 5]])
    segment = ask("segment", volume_id=found["volume_id"], prompts=["bright"])["segments"][0]
    read, embedded = ask.encoder.read, ask.refiner.embedded
    mask = array_of(segment["mask"]).copy()
    mask[0, 0, 0] = 1
    given = protocol.write_array(ask.folder / "given.raw", mask).described()
    answer = ask("refine", volume_id=found["volume_id"], mask=given, box=[[8, 8, 2], [30, 20, 2]])
    assert (answer["slices_changed"], answer["array_axis"]) == ([2], 0)
    refined = array_of(answer["mask"])
    assert refined[0, 0, 0] == 1, "what lies outside the region stays as it was"
    np.testing.assert_array_equal(refined[[0, 1, 3, 4, 5]], mask[[0, 1, 3, 4, 5]])
    # this decoder draws the boxes it is given
    assert refined[2, 8:21, 8:31].all()
    assert ask.encoder.read == read
    assert ask.refiner.embedded == embedded
    assert answer["ran"] == ["Refining"]
    assert ask("refine", volume_id=found["volume_id"], mask=given)["slices_changed"] == []
    with pytest.raises(InputError, match="lies outside what is segmented"):
        ask("refine", volume_id=found["volume_id"], mask=given, points=[[3, 10, 0, 1]])
    small = protocol.write_array(ask.folder / "small.raw", mask[:3]).described()
    with pytest.raises(InputError, match="3 x 64 x 64 voxels, the volume 6 x 64 x 64"):
        ask("refine", volume_id=found["volume_id"], mask=small)


def test_frequency_images_are_those_of_the_slices(ask: Asked) -> None:
    import torch

    from FreqSegLib.wavelet import frequency_images

    volume, _ = box_volume(affine=np.diag([1, 1, -1, 1.0]))
    found = ask.set(volume, roi=[[0, 64], [0, 64], [2, 6]])
    answer = ask("frequency_images", volume_id=found["volume_id"], settings={"wave": "db2", "levels": 2})
    low, high = array_of(answer["low"]), array_of(answer["high"])
    assert low.shape == high.shape == volume.shape
    assert not low[:2].any()
    from FreqSegLib.intensity import normalise

    crop = Volume(volume.array[2:], volume.affine)
    image = torch.from_numpy(normalise(crop).apply(volume.array[4]))[None, None]
    expected = frequency_images(image, "db2", 2)
    np.testing.assert_allclose(low[4], expected.low[0, 0].clamp(0, 1), atol=1e-6)
    np.testing.assert_allclose(high[4], expected.high[0, 0], atol=1e-6)


def test_a_cancelled_request_leaves_everything_as_it_was(ask: Asked) -> None:
    volume = box_volume()[0]
    found = ask.set(volume)
    load = ask.session._load

    def stop(choice: Any, cache: Any) -> Any:
        assert ask.job is not None
        ask.job.stop.set()
        return load(choice, cache)

    ask.session._load = stop
    with pytest.raises(Cancelled):
        ask.set(volume, preset="biomedclip-sam")
    ask.session._load = load
    assert ask("segment", volume_id=found["volume_id"], prompts=["bright"])["segments"]


def test_kept_results_do_not_fill_the_disk(ask: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ask.set(box_volume()[0])
    size = 6 * 64 * 64 * 5
    monkeypatch.setattr(worker_session, "KEPT_BYTES", 2 * size)
    for number in range(4):
        ask("segment", volume_id=found["volume_id"], prompts=[f"bright {number}"])
    kept = list((ask.folder / "kept").iterdir())
    assert sum(path.stat().st_size for path in kept) == 2 * size
    assert ask("segment", volume_id=found["volume_id"], prompts=["bright 3"])["ran"] == []
    for number in range(2):
        ask.set(box_volume(shape=(3 + number, 64, 64))[0])
    assert list((ask.folder / "kept").iterdir()) == []


def test_the_models_and_what_is_here_are_told(ask: Asked) -> None:
    from FreqSegLib import weights

    rows = {row["id"]: row for row in ask("models", action="list")["models"]}
    assert set(rows) == set(weights.catalogue())
    lite = rows["lite-aligner"]
    assert lite["needed_by"] == ["lite"]
    assert not lite["removable"]
    assert rows["sam-vit-b"]["needed_by"] == ["biomedclip-sam"]
    assert rows["sam-vit-b"]["downloadable"]
    assert "sha256" in " ".join(rows["sam-vit-b"]["announcement"])
    assert ask("models", action="folder")["folder"] == str(weights.user_folder())
    with pytest.raises(protocol.RequestError, match="needs the id"):
        ask("models", action="get")
    with pytest.raises(WeightsError, match="nothing-like-it"):
        ask("models", action="verify", id="nothing-like-it")
    told = ask("info")
    assert {one["name"] for one in told["presets"]} >= {"lite", "biomedclip-sam"}
    lite_preset = next(one for one in told["presets"] if one["name"] == "lite")
    assert {"name": "brain tumour", "modality": "brain FLAIR MR"}.items() <= lite_preset["targets"][0].items()
    assert told["defaults"]["wave"] == "haar"
    assert told["versions"]["torch"]


def test_a_pair_is_fused_as_the_pipeline_does_it(ask: Asked) -> None:
    from FreqSegLib.settings import FusionSettings
    from FreqSegLib.volume_fusion import VolumeFuser

    ct, mr = (Volume(box_volume()[0].array * scale, OBLIQUE, name=name) for name, scale in (("ct", 1), ("mr", 3)))
    asked = {"ct": ask.volume(ct), "mr": ask.volume(mr), "settings": {"method": "choose-max", "check": False}}
    answer = ask("fuse", **asked, masks=True)
    direct = VolumeFuser.from_preset(settings=FusionSettings(method="choose-max", check=False), device="cpu")
    expected = direct.fuse(ct, mr, masks=True)
    np.testing.assert_array_equal(array_of(answer["fused"]), expected.fused.array)
    np.testing.assert_allclose(answer["affine"], OBLIQUE)
    assert [mask["name"] for mask in answer["masks"]] == [mask.name for mask in expected.masks]
    for mask, wanted in zip(answer["masks"], expected.masks, strict=True):
        np.testing.assert_array_equal(array_of(mask["share"]), wanted.array)
    assert answer["record"] == expected.record.as_json()
    assert answer["ran"][0] == "Loading models"
    assert "Loading models" not in ask("fuse", **asked)["ran"]
    with pytest.raises(SettingsError, match="no setting 'metod'"):
        ask("fuse", **{**asked, "settings": {"metod": "average"}})


def test_a_spectral_model_labels_a_volume_as_the_pipeline_does_it(ask: Asked, tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from test_spectral_segmentation import WEIGHTS_FILE, described, stepped, trained_like

    from FreqSegLib.spectral_segmentation import SpectralSegmenter

    folder = tmp_path / "model"
    folder.mkdir()
    model = described()
    model.write(folder)
    save_file(trained_like(model).network.state_dict(), folder / WEIGHTS_FILE)
    volume = stepped()
    answer = ask("spectral_segment", volume=ask.volume(volume), model=str(folder), uncertainty="flips")
    expected = SpectralSegmenter.from_model(folder, "cpu").segment(volume, uncertainty="flips")
    assert [one["name"] for one in answer["segments"]] == ["grey", "white"]
    for one, wanted in zip(answer["segments"], expected, strict=True):
        np.testing.assert_array_equal(array_of(one["mask"]) > 0, wanted.mask)
        assert one["color"] == pytest.approx(list(wanted.color))
    assert expected.uncertainty is not None
    assert set(answer["uncertainty"]) == {"mean", "entropy", "mutual_information"}
    np.testing.assert_array_equal(array_of(answer["uncertainty"]["entropy"]), expected.uncertainty.entropy.array)
    plain = ask("spectral_segment", volume=ask.volume(volume), model=str(folder))
    assert plain["uncertainty"] is None
    assert "Loading models" not in plain["ran"]
    # trained again while the worker runs
    os.utime(folder / WEIGHTS_FILE, (0, 0))
    assert "Loading models" in ask("spectral_segment", volume=ask.volume(volume), model=str(folder))["ran"]


def test_weights_that_were_fetched_meanwhile_are_used(ask: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    from FreqSegLib import weights

    found = ask.set(box_volume()[0])
    ask("segment", volume_id=found["volume_id"], prompts=["bright"])
    monkeypatch.setattr(weights, "get", lambda name, **given: given["progress"](5, None) or Path("there"))
    assert ask("models", action="get", id="sam-vit-b") == {"folder": "there"}
    again = ask("segment", volume_id=found["volume_id"], prompts=["bright"])
    assert again["ran"] == ["Loading models", "Looking", "Drawing"]
    assert ask.encoder.read == 6
