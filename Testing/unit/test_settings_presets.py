"""Settings are checked where they are made; presets fill what the user left open."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from FreqSegLib import weights
from FreqSegLib.errors import SettingsError, WeightsError
from FreqSegLib.presets import PRESETS, SAM_CHOICES, Tuning, preset, read_tuning
from FreqSegLib.settings import TextSegmentationSettings


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"axis": "oblique"}, "axis must be one of auto, axial, coronal, sagittal, got 'oblique'"),
        ({"bottleneck": "M2IB"}, "bottleneck must be one of m2ib, nib, amortised, got 'M2IB'"),
        ({"vote": "majority"}, "vote must be one of single, best, mrm, staple, mean, got 'majority'"),
        ({"threshold_value": 1.5}, "threshold_value must lie in 0.0 to 1.0, got 1.5"),
        ({"beta": float("nan")}, "beta must lie in 0.0 to 100.0, got nan"),
        ({"seed": -1}, "seed must lie in 0 to 2147483647, got -1"),
        ({"replicas": 1}, "replicas must lie in 2 to 64, got 1"),
        ({"levels": 1.5}, "levels must be a whole number, got 1.5"),
        ({"levels": True}, "levels must be a whole number, got True"),
        ({"beta": "0.1"}, "beta must be a number, got '0.1'"),
        ({"gate": "no"}, "gate must be true or false, got 'no'"),
        ({"intensity": 40}, "intensity must be text, got 40"),
    ],
)
def test_a_bad_setting_is_named_with_its_value_and_what_would_do(given: dict, said: str) -> None:
    with pytest.raises(SettingsError) as error:
        TextSegmentationSettings(**given)
    assert str(error.value) == said


def test_limits_are_inclusive_and_whole_numbers_are_numbers() -> None:
    for item in fields(TextSegmentationSettings):
        for limit in ("least", "most"):
            if limit in item.metadata:
                TextSegmentationSettings(**{item.name: item.metadata[limit]})
    assert TextSegmentationSettings(beta=1).beta == 1


def test_every_setting_explains_itself_and_its_limits() -> None:
    for item in fields(TextSegmentationSettings):
        assert len(item.metadata["help"]) > 10
        assert ("least" in item.metadata) == ("most" in item.metadata)


def test_the_user_comes_before_the_tuning_and_the_tuning_before_the_preset() -> None:
    chosen = PRESETS["lite"]
    tuning = Tuning(settings={"beta": 2.0, "layer_idx": 1})
    found = chosen.complete(TextSegmentationSettings(beta=0.5), tuning)
    assert (found.beta, found.layer_idx, found.train_steps) == (0.5, 1, chosen.defaults["train_steps"])
    assert chosen.complete(TextSegmentationSettings()).layer_idx == chosen.defaults["layer_idx"]
    assert chosen.complete(TextSegmentationSettings(threshold_value=0.0)).threshold_value == 0.0
    assert chosen.complete(TextSegmentationSettings(num_contours=0), Tuning({"num_contours": 3})).num_contours == 0


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_leaves_nothing_open_and_names_weights_that_exist(name: str) -> None:
    chosen = PRESETS[name]
    completed = chosen.complete(TextSegmentationSettings())
    assert [item.name for item in fields(completed) if getattr(completed, item.name) is None] == []
    assert chosen.complete(completed) == completed
    assert chosen.name == name
    assert set(chosen.weights) <= set(weights.catalogue())
    assert set(SAM_CHOICES) <= set(weights.catalogue())
    assert set(chosen.defaults) <= {item.name for item in fields(TextSegmentationSettings)}


def test_an_unknown_preset_is_refused_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r"no preset 'biomedclip'.*Did you mean 'biomedclip-sam'.*lite"):
        preset("biomedclip")
    with pytest.raises(SettingsError, match="Presets: lite"):
        preset("zzz")


def test_another_sam_model_takes_the_place_of_the_presets_own() -> None:
    assert preset("biomedclip-sam", "medsam-vit-b").weights == ("biomedclip", "medsam-vit-b")
    assert preset("biomedclip-sam").weights == ("biomedclip", "sam-vit-b")
    with pytest.raises(SettingsError, match=r"must be one of sam-vit-b.*got 'sam2'"):
        preset("biomedclip-sam", "sam2")
    with pytest.raises(SettingsError, match="its own decoder"):
        preset("lite", "sam-vit-b")


def test_tuning_is_read_by_meaning(tmp_path: Path) -> None:
    assert read_tuning(tmp_path) == {}
    content = {"tuning": {"lungs": {"settings": {"beta": 1.0}, "offset": 0.2, "slice_threshold": 0.4}}}
    (tmp_path / "preset.json").write_text(json.dumps(content), encoding="utf-8")
    assert read_tuning(tmp_path) == {"lungs": Tuning({"beta": 1.0}, offset=0.2, slice_threshold=0.4)}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"tuning": []}',
        '{"tuning": {"lungs": {"slop": 1}}}',
        '{"tuning": {"lungs": {"settings": {"betta": 1}}}}',
        '{"tuning": {"lungs": {"settings": {"beta": -1}}}}',
        '{"tuning": {"lungs": 3}}',
    ],
)
def test_damaged_tuning_is_refused_with_its_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "preset.json").write_text(content, encoding="utf-8")
    with pytest.raises(WeightsError, match=r"preset\.json"):
        read_tuning(tmp_path)


def test_cached_embeddings_of_other_weights_are_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A retrained aligner has the same size; before it is recorded in a manifest its contents alone tell it apart."""
    from FreqSegLib import loading

    monkeypatch.setattr(weights, "search_folders", lambda: [tmp_path])
    folder = tmp_path / "lite-aligner"
    folder.mkdir()
    keys = []
    for content in (b"first run", b"other run", b"first run"):
        (folder / "aligner.safetensors").write_bytes(content)
        keys.append(loading._weights_key(("lite-aligner",)))
    assert keys[0] == keys[2] != keys[1]
    assert loading._weights_key(("lite-aligner", "sam-vit-b")) != keys[0]


def test_every_sam_choice_is_built_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from FreqSegLib import loading
    from FreqSegLib.clip.open_clip_encoder import OpenCLIPEncoder
    from FreqSegLib.sam import sam_model
    from FreqSegLib.sam.sam_model import SegmentAnything

    loaded = []
    monkeypatch.setattr(weights, "find", lambda set_id: tmp_path / set_id)
    monkeypatch.setattr(weights, "require", lambda set_id: tmp_path / set_id)
    monkeypatch.setattr(loading, "_weights_key", lambda ids: "key")
    monkeypatch.setattr(OpenCLIPEncoder, "from_folder", lambda folder, device: "encoder")
    monkeypatch.setattr(sam_model, "read_state_dict", lambda path: loaded.append(path) or {})
    monkeypatch.setattr(sam_model, "load_exactly", lambda module, state, path: None)
    monkeypatch.setattr(sam_model, "guess_model_type", lambda state, path: path.name.split("sam_")[1][:5])
    monkeypatch.setattr(sam_model, "build_sam", lambda architecture: torch.nn.Identity())
    monkeypatch.setattr(
        SegmentAnything, "__init__", lambda self, model, name, normalisation: setattr(self, "name", name)
    )
    names = {}
    for choice in SAM_CHOICES:
        own = loading.OwnWeights()
        made = loading.load_segmenter(lambda *given, **_: given, "biomedclip-sam", "cpu", choice, own, None, None)
        names[choice] = made[1].name
    assert names == {
        "sam-vit-b": "sam_vit_b",
        "sam-vit-l": "sam_vit_l",
        "sam-vit-h": "sam_vit_h",
        "medsam-vit-b": "medsam_vit_b",
    }


def test_settings_are_frozen_and_comparable() -> None:
    settings = TextSegmentationSettings(seed=3)
    assert replace(settings, seed=4) != settings == TextSegmentationSettings(seed=3)
    with pytest.raises(AttributeError):
        settings.seed = 5  # type: ignore[misc]
