"""Networks trained and measured alike: comparable widths, one table, runs that go on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from FreqSegLib.errors import InputError, SettingsError
from FreqSegLib.mamba.model_config import InputConfig, ModelConfig
from FreqSegLib.training import spectral_comparison
from FreqSegLib.training.spectral_comparison import (
    PEERS,
    AnySize,
    ablated,
    as_csv,
    build,
    compare,
    count_parameters,
    table,
)
from FreqSegLib.training.spectral_config import DataConfig, SpectralRecipe
from FreqSegLib.volume import Volume


def write_squares(folder: Path, count: int, first: int) -> None:
    made = np.random.default_rng(first)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        image = made.integers(20, 60, (1, 24, 24)).astype(np.uint8)
        row, column = made.integers(1, 14, 2)
        mask = np.zeros_like(image)
        mask[0, row : row + 8, column : column + 8] = 255
        image[mask > 0] = 200
        for kind, array in (("images", image), ("masks", mask)):
            Volume(array, np.eye(4), spatial_dimension=2).write(folder / kind / f"x{number}.png")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A tiny recipe with four test images."""
    write_squares(tmp_path / "train", 8, 0)
    write_squares(tmp_path / "test", 4, 8)
    content: dict[str, Any] = {
        "name": "squares",
        "data": {
            "images": "train/images",
            "labels": "train/masks",
            "image_ending": ".png",
            "label_ending": ".png",
            "classes": ["square"],
            "binary": True,
            "test_images": "test/images",
            "test_labels": "test/masks",
        },
        "input": {"form": "image", "side": 24},
        "model": {"out_channels": 2, "img_size": 24, "base_channels": 8, "num_stages": 2, "depth": 1, "d_state": 2},
        "training": {"epochs": 1, "batch_size": 4, "warmup_epochs": 0},
    }
    path = tmp_path / "squares.json"
    path.write_text(json.dumps(content))
    return path


def recipe(**model: Any) -> SpectralRecipe:
    data = DataConfig("images", "labels", ("lungs",))
    inputs = InputConfig(form="volume" if model.get("dimensions") == 3 else "slices")
    small = ModelConfig(out_channels=2, base_channels=24, num_stages=3, depth=1, **model)
    return SpectralRecipe("x", data, inputs, small)


@pytest.mark.parametrize("name", ["UNet", "SegResNet"])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_peer_has_about_as_many_parameters_and_takes_any_size(name: str, dimensions: int) -> None:
    own = recipe(dimensions=dimensions, img_size=32)
    wanted = count_parameters(build("SpectralVMUNet", own))
    network = build(name, own).eval()
    assert 0.75 < count_parameters(network) / wanted < 1.25
    size = (17, 13) if dimensions == 2 else (9, 17, 10)
    with torch.inference_mode():
        assert network(torch.rand(1, 1, *size)).shape == (1, 2, *size)


def test_swin_unetr_takes_odd_sizes_too_or_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SettingsError, match="pip install einops"):
            build("SwinUNETR", recipe(img_size=32))
    pytest.importorskip("einops", reason="MONAI's SwinUNETR needs einops")
    network = build("SwinUNETR", recipe(img_size=32)).eval()
    with torch.inference_mode():
        assert network(torch.rand(1, 1, 33, 40)).shape == (1, 2, 33, 40)


def test_padding_changes_nothing_where_the_size_fits() -> None:
    inner = torch.nn.Conv2d(1, 2, 3, padding=1)
    x = torch.rand(1, 1, 16, 8)
    assert torch.equal(AnySize(inner, 8, 2)(x), inner(x))


def test_an_ablation_leaves_out_what_its_name_says() -> None:
    own = recipe()
    assert not ablated(own, "no spectral path").model.spectral
    assert ablated(own, "no spectral path").loss.freq_weight == own.loss.freq_weight > 0
    assert ablated(own, "no frequency loss").model.spectral
    assert ablated(own, "no frequency loss").loss.freq_weight == 0
    assert (ablated(own, "neither").model.spectral, ablated(own, "neither").loss.freq_weight) == (False, 0)
    assert all(ablated(own, peer) == own for peer in PEERS)
    names = [name for name, _ in build("no spectral path", own).named_parameters()]
    assert not any("spectral" in name for name in names)


def test_noise_below_zero_is_named_and_a_network_named_twice_is_run_once(config: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="noise must be above 0, got -1"):
        compare(config, tmp_path / "work", noise=(0.1, -1), report=lambda line: None)
    rows = compare(config, tmp_path / "work", networks=("UNet", "UNet"), seeds=(0, 0), report=lambda line: None)
    assert [(row["network"], row["seed"]) for row in rows] == [("UNet", 0)]


def test_small_parts_are_dropped_alike_for_every_network_where_asked(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def chosen(segmenter: Any, own: Any, pairs: Any) -> dict[float, float]:
        seen.append([pair.name for pair in pairs])
        return {0.3: 0.75, 0.0: 0.5}

    used: list[float] = []
    measured = spectral_comparison.scored
    monkeypatch.setattr(spectral_comparison, "choose_smallest_part", chosen)
    monkeypatch.setattr(
        spectral_comparison,
        "scored",
        lambda segmenter, *rest: used.append(segmenter.model.smallest_part) or measured(segmenter, *rest),
    )
    networks = ("SpectralVMUNet", "UNet")
    rows = compare(config, tmp_path / "work", networks=networks, drop_parts=True, report=lambda line: None)
    assert [row["smallest_part"] for row in rows] == [0.3, 0.3]
    assert len(seen) == 2
    assert not set(seen[0]) & {"x8", "x9", "x10", "x11"}
    assert used == [0.3] * 8
    assert "| UNet (parts under 30% dropped) |" in table(rows)
    assert "| 0.750 |" in table(rows)
    with pytest.raises(SettingsError, match="another configuration"):
        compare(config, tmp_path / "work", networks=networks, report=lambda line: None)


def test_every_network_is_measured_on_the_test_images_and_a_finished_run_is_read(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    networks = ("SpectralVMUNet", "UNet")
    rows = compare(config, tmp_path / "work", networks=networks, seeds=(0, 1), noise=(0.1,), report=said.append)
    assert [(row["network"], row["seed"]) for row in rows] == [(n, s) for s in (0, 1) for n in networks]
    for row in rows:
        assert sorted(row["test"]) == ["0", "0.1"]
        assert [score["case"] for score in row["test"]["0"]] == ["x10", "x11", "x8", "x9"]
    lines = table(rows).splitlines()
    assert lines[2].startswith("| SpectralVMUNet |")
    assert "| 2 |" in lines[3]
    assert "p = " in lines[3]
    mean = np.mean([score["dsc"] for row in rows if row["network"] == "UNet" for score in row["test"]["0"]])
    assert f"| {mean:.3f} ± " in lines[3]
    validation = np.mean([row["validation"] for row in rows if row["network"] == "UNet"])
    assert lines[0].split(" | ")[7] == "validation DSC"
    assert lines[3].split(" | ")[7] == f"{validation:.3f}"
    # header, and four images at two noise levels for each of four runs
    assert len(as_csv(rows).splitlines()) == 1 + 4 * 2 * 4

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(spectral_comparison, "SpectralTraining", refuse)
    assert compare(config, tmp_path / "work", networks=networks, seeds=(0, 1), noise=(0.1,)) == rows
    content = json.loads(config.read_text())
    for path in (tmp_path / "work").glob("*/*/test.json"):
        older = json.loads(path.read_text())
        del older["about"]["recipe"]["data"]["fill_nonfinite"]
        path.write_text(json.dumps(older))
    again = compare(config, tmp_path / "work", networks=networks, seeds=(0, 1), noise=(0.1,))
    assert [row["test"] for row in again] == [row["test"] for row in rows]
    config.write_text(json.dumps({**content, "description": "other words"}))
    assert compare(config, tmp_path / "work", networks=networks, seeds=(0, 1), noise=(0.1,)) == again
    with pytest.raises(SettingsError, match="another configuration"):
        compare(config, tmp_path / "work", networks=networks, noise=(0.2,))


def test_an_unknown_network_and_missing_test_folders_are_named(config: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no network 'Unet'; did you mean 'UNet'"):
        compare(config, tmp_path / "work", networks=("Unet",))
    content = json.loads(config.read_text())
    content["data"]["test_images"] = "nowhere"
    config.write_text(json.dumps(content))
    with pytest.raises(InputError, match="folder of images does not exist"):
        compare(config, tmp_path / "work", networks=("UNet",))
    del content["data"]["test_images"], content["data"]["test_labels"]
    config.write_text(json.dumps(content))
    with pytest.raises(SettingsError, match="names no test_images"):
        compare(config, tmp_path / "work", networks=("UNet",))
