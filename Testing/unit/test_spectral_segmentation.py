"""A spectral model on volumes: every voxel back where it belongs, uncertainty, and what cannot be used."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from scipy import ndimage
from torch import Tensor, nn

from FreqSegLib.errors import Cancelled, InputError, SettingsError, WeightsError
from FreqSegLib.mamba.model_config import (
    MODEL_FILE,
    WEIGHTS_FILE,
    InputConfig,
    ModelConfig,
    SpectralModel,
    class_configs,
)
from FreqSegLib.mamba.model_folders import find_model, installed_models, model_folders
from FreqSegLib.mamba.spectral_vmunet import SpectralVMUNet
from FreqSegLib.progress import Progress
from FreqSegLib.spectral_segmentation import SpectralSegmenter
from FreqSegLib.volume import Volume

OBLIQUE = np.array([[0.0, -1.5, 0.0, 3.0], [0.8, 0.0, 0.0, -5.0], [0.0, 0.0, -2.0, 9.0], [0.0, 0.0, 0.0, 1.0]])


class Threshold(nn.Module):
    """Stands in for a network: class 1 above 0.4, class 2 above 0.7."""

    def __init__(self, patch: tuple[int, ...]) -> None:
        super().__init__()
        self.patch_size, self.dropout = patch, 0.0

    def forward(self, x: Tensor) -> Tensor:
        assert all(side >= patch for side, patch in zip(x.shape[2:], self.patch_size, strict=True))
        grey = x[:, 0]
        return 400 * torch.stack([0.4 - grey, torch.minimum(grey - 0.4, 0.7 - grey), grey - 0.7], 1)


def described(form: str = "slices", **changes: object) -> SpectralModel:
    dimensions = 3 if form == "volume" else 2
    return SpectralModel(
        name="made-up",
        model=ModelConfig(
            out_channels=3,
            img_size=16,
            base_channels=4,
            num_stages=2,
            depth=1,
            dimensions=dimensions,
            patch_size=2,
            d_state=2,
            detail_channels=2,
            dropout=0.3,
        ),
        input=InputConfig(form=form, **{"side": 24, "intensity": "500/1000", **changes}),  # type: ignore[arg-type]
        classes=class_configs(("grey", "white")),
        mirrors=tuple(range(dimensions)),
    )


def stepped(shape: tuple[int, int, int] = (4, 24, 16), affine: NDArray[np.float64] = OBLIQUE) -> Volume:
    """Three levels in boxes without any symmetry, from 0 to 1000."""
    array = np.zeros(shape, np.float32)
    k, j, i = shape
    array[: k // 2 + 1, 2 : j // 2, 1 : i // 2] = 550
    array[k // 2 :, j // 2 : j - 2, i // 2 : i - 1] = 1000
    return Volume(array, affine, name="steps")


def segmenter(model: SpectralModel, **changes: object) -> SpectralSegmenter:
    patch = (2,) * model.model.dimensions
    return SpectralSegmenter(Threshold(patch), model)  # type: ignore[arg-type]


def trained_like(model: SpectralModel) -> SpectralSegmenter:
    torch.manual_seed(0)
    from dataclasses import asdict

    return SpectralSegmenter(SpectralVMUNet(**asdict(model.model)), model)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder with random weights."""
    made = tmp_path / "models" / "made-up"
    made.mkdir(parents=True)
    model = described()
    model.write(made)
    save_file(trained_like(model).network.state_dict(), made / WEIGHTS_FILE)
    return made


@pytest.mark.parametrize(("share", "specks"), [(0.0, 2), (0.1, 1), (0.5, 0), (1.0, 0)])
def test_parts_smaller_than_the_models_share_become_background(share: float, specks: int) -> None:
    array = np.zeros((4, 24, 16), np.float32)
    array[:3, 2:12, 1:9] = 550
    array[0, 20, 12], array[3, 14:20, 10:15] = 550, 550
    array[1:3, 14:20, 2:6] = 1000
    found = segmenter(replace(described(), smallest_part=share)).segment(Volume(array, np.eye(4)))
    parts = ndimage.label(found.classes[0].mask)[1]
    assert parts == 1 + specks
    # the other class is judged by itself
    assert np.array_equal(found.classes[1].mask, array > 900)
    assert np.array_equal(found.labels.array == 1, found.classes[0].mask)
    assert found.probabilities is not None
    assert found.probabilities[1, 0, 20, 12] > 0.5


@pytest.mark.parametrize("form", ["slices", "volume"])
@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_every_voxel_comes_back_to_its_place(form: str, axis: str) -> None:
    """At the network's own size nothing is resampled, so labels equal the thresholds exactly."""
    shape, affine = (4, 24, 16), OBLIQUE.copy()
    affine[:3, :3] /= np.linalg.norm(affine[:3, :3], axis=0)
    volume = stepped(shape, affine)
    if form == "slices":
        sizes = {"axial": (24, 16), "coronal": (24, 4), "sagittal": (16, 4)}
        model = described(form, axis=axis, side=max(sizes[axis]) if axis != "sagittal" else 16)
    else:
        model = described(form)
    found = segmenter(model).segment(volume)
    expected = np.digitize(volume.array / 1000, [0.4, 0.7]).astype(np.uint8)
    assert np.array_equal(found.labels.array, expected)
    assert [one.name for one in found] == ["grey", "white"]
    assert all(np.array_equal(one.mask, expected == index) for index, one in enumerate(found, start=1))
    assert np.array_equal(found.labels.affine, volume.affine)
    assert found.probabilities is not None
    assert found.probabilities.shape == (3, *shape)
    assert np.allclose(found.probabilities.sum(0), 1, atol=1e-5)


def test_a_model_spacing_is_reached_and_left_again() -> None:
    affine = np.diag([0.5, 0.5, 1.0, 1.0])
    volume = stepped((8, 48, 32), affine)
    seen: list[tuple[int, ...]] = []

    class Watching(Threshold):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(tuple(x.shape[2:]))
            return super().forward(x)

    model = described("volume", spacing=(1.0, 1.0, 1.0))
    found = SpectralSegmenter(Watching((2, 2, 2)), model).segment(volume)  # type: ignore[arg-type]
    assert seen == [(8, 24, 16)]
    expected = np.digitize(volume.array / 1000, [0.4, 0.7])
    for label in (1, 2):
        both = np.sum((found.labels.array == label) & (expected == label))
        assert 2 * both / (np.sum(found.labels.array == label) + np.sum(expected == label)) > 0.9


def test_large_volumes_are_covered_by_windows() -> None:
    pytest.importorskip("monai")
    volume = stepped((10, 24, 16), np.eye(4))
    found = segmenter(described("volume", window=(6, 10, 40))).segment(volume)
    assert np.array_equal(found.labels.array, np.digitize(volume.array / 1000, [0.4, 0.7]))


def test_slices_of_any_size_and_pictures_thinner_than_a_patch() -> None:
    found = segmenter(described("slices", side=40)).segment(stepped((3, 30, 19), np.eye(4)))
    expected = np.digitize(stepped((3, 30, 19)).array / 1000, [0.4, 0.7])
    assert float(np.mean(found.labels.array == expected)) > 0.95
    picture = Volume(stepped((1, 24, 16)).array, np.eye(4), spatial_dimension=2)
    assert segmenter(described("image")).segment(picture).labels.shape == (1, 24, 16)
    line = Volume(np.linspace(0, 9, 24, dtype=np.float32).reshape(2, 12, 1), np.eye(4))
    assert trained_like(described("volume")).segment(line).labels.shape == (2, 12, 1)


@pytest.mark.parametrize("form", ["slices", "volume"])
def test_flips_agree_where_the_network_has_no_side(form: str) -> None:
    volume = stepped()
    found = segmenter(described(form)).segment(volume, uncertainty="flips")
    assert found.uncertainty is not None
    assert float(found.uncertainty.mutual_information.array.max()) < 1e-5
    single = segmenter(described(form)).segment(volume)
    assert np.array_equal(found.labels.array, single.labels.array)


def test_only_axes_that_the_model_was_mirrored_along_are_mirrored() -> None:
    seen: list[Tensor] = []

    class Watching(Threshold):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.clone())
            return super().forward(x)

    model = replace(described(), mirrors=(1,))
    made = SpectralSegmenter(Watching((2, 2)), model)  # type: ignore[arg-type]
    made.segment(stepped((1, 24, 16)), uncertainty="auto")
    plain, mirrored = seen
    assert torch.equal(mirrored, plain.flip(3))


def test_uncertainty_is_what_its_formulas_say() -> None:
    """Two equally likely answers, in turns: all doubt is disagreement."""
    calls = iter(range(100))

    class Undecided(Threshold):
        def forward(self, x: Tensor) -> Tensor:
            chosen = next(calls) % 2
            answer = torch.full((x.shape[0], 3, *x.shape[2:]), -1e4)
            answer[:, chosen] = 1e4
            return answer

    found = SpectralSegmenter(Undecided((2, 2)), described()).segment(stepped(), uncertainty="flips")  # type: ignore[arg-type]
    assert found.uncertainty is not None
    expected = np.log(2) / np.log(3)
    assert np.allclose(found.uncertainty.entropy.array, expected, atol=1e-5)
    assert np.allclose(found.uncertainty.mutual_information.array, expected, atol=1e-5)
    assert np.allclose(found.uncertainty.mean.array, 0.5, atol=1e-5)


def test_dropout_repeats_with_the_same_seed_and_differs_with_another() -> None:
    made, volume = trained_like(described()), stepped()
    state = torch.get_rng_state()
    first = made.segment(volume, uncertainty="dropout", samples=3, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    again = made.segment(volume, uncertainty="dropout", samples=3, seed=1)
    other = made.segment(volume, uncertainty="dropout", samples=3, seed=2)
    assert first.uncertainty is not None
    assert again.uncertainty is not None
    assert other.uncertainty is not None
    one, two, three = (r.uncertainty.mutual_information.array for r in (first, again, other) if r.uncertainty)
    assert np.array_equal(one, two)
    assert not np.array_equal(one, three)
    assert float(one.max()) > 0
    assert not any(module.training for module in made.network.modules())


def test_it_is_deterministic_and_keeps_the_volume() -> None:
    made, volume = trained_like(described()), stepped()
    before = volume.array.copy()
    assert np.array_equal(made.segment(volume).labels.array, made.segment(volume).labels.array)
    assert np.array_equal(volume.array, before)
    assert made.segment(volume, keep_probabilities=False).probabilities is None


def test_progress_is_told_and_cancelling_stops() -> None:
    told: list[Progress] = []
    segmenter(described()).segment(stepped(), progress=told.append)
    assert (told[0].done, told[-1].done, told[-1].total) == (0, 4, 4)
    with pytest.raises(Cancelled):
        segmenter(described()).segment(stepped(), cancel=lambda: True)


def test_forms_and_settings_that_do_not_fit_are_named() -> None:
    picture = Volume(stepped((1, 24, 16)).array, np.eye(4), spatial_dimension=2)
    with pytest.raises(InputError, match="takes 3D volumes"):
        segmenter(described("volume")).segment(picture)
    with pytest.raises(InputError, match="takes 2D pictures"):
        segmenter(described("image")).segment(stepped())
    model = described()
    steady = replace(model, model=replace(model.model, dropout=0.0))
    with pytest.raises(SettingsError, match="was not trained with dropout; use uncertainty 'flips'"):
        segmenter(steady).segment(stepped(), uncertainty="dropout")
    with pytest.raises(SettingsError, match=r"not trained on mirror images, which would mislead it; use .* 'dropout'"):
        segmenter(replace(model, mirrors=())).segment(stepped(), uncertainty="flips")
    with pytest.raises(SettingsError, match="trained neither on mirror images nor with dropout"):
        segmenter(replace(steady, mirrors=())).segment(stepped(), uncertainty="auto")
    with pytest.raises(SettingsError, match=r"mirrors must lie in 0 to 1, got \(2,\)"):
        replace(model, mirrors=(2,))
    with pytest.raises(SettingsError, match="auto, flips or dropout, got 'mc'"):
        segmenter(described()).segment(stepped(), uncertainty="mc")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="every voxel has the value 1"):
        segmenter(described()).segment(Volume(np.ones((2, 8, 8)), np.eye(4)))


def test_a_folder_is_loaded_and_found_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = SpectralSegmenter.from_model(folder, "cpu")
    assert np.array_equal(
        made.segment(stepped()).labels.array, trained_like(described()).segment(stepped()).labels.array
    )
    monkeypatch.setenv("FREQSEG_WEIGHTS", str(folder.parent))
    assert find_model("made-up") == folder
    assert "made-up" in installed_models()
    with pytest.raises(WeightsError, match=r"no spectral model 'made-down'.*made-up"):
        find_model("made-down")


def test_models_are_listed_with_what_they_are_and_why_they_cannot_be_used(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FREQSEG_WEIGHTS", str(folder.parent))
    own = tmp_path / "own"
    for name in ("torn", "weightless"):
        shutil.copytree(folder, own / name)
    (own / "torn" / MODEL_FILE).write_text("{", encoding="utf-8")
    (own / "weightless" / WEIGHTS_FILE).unlink()
    found = {one.reference: one for one in model_folders([own, folder])}
    assert found["made-up"].model == described()
    assert not found["made-up"].fault
    # the folder is known by its name already
    assert str(folder) not in found
    assert "is damaged" in found[str(own / "torn")].fault
    assert found[str(own / "torn")].name == "torn"
    assert f"has no {WEIGHTS_FILE}" in found[str(own / "weightless")].fault
    assert [one.reference for one in model_folders([own / "torn"])][-1] == str(own / "torn")
    assert not {str(own / "torn"), str(own / "weightless")} & set(installed_models())


def test_a_trained_model_is_known_by_its_name_and_its_files_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a configuration to a labelled picture, as ``make train-spectral`` ships a model of the catalogue."""
    from test_spectral_training import configuration, write_images

    models, out = tmp_path / "models", tmp_path / "labels.seg.nrrd"
    write_images(tmp_path)
    config = configuration(
        tmp_path, name="spectral-lungs", training={"epochs": 1, "batch_size": 4, "validation_share": 0.25}
    )
    monkeypatch.setenv("FREQSEG_WEIGHTS", str(models))
    asked = ("train-spectral", str(config), "--models", str(models), "--work", str(tmp_path / "work"))
    assert run(*asked, "--device", "cpu") == 0
    capsys.readouterr()
    assert run("models", "list") == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "spectral-lungs" in line)
    assert "installed" in row
    assert run("models", "verify", "spectral-lungs") == 0
    picture = tmp_path / "images" / "x0.png"
    assert run("spectral", str(picture), "--model", "spectral-lungs", "-o", str(out), "--device", "cpu") == 0
    assert out.is_file()
    weights_file = models / "spectral-lungs" / WEIGHTS_FILE
    content = bytearray(weights_file.read_bytes())
    content[-1] ^= 1
    weights_file.write_bytes(content)
    capsys.readouterr()
    assert run("spectral", str(picture), "--model", "spectral-lungs", "-o", str(out), "--overwrite") == 1
    assert "spectral-lungs' are damaged" in capsys.readouterr().err


def test_damaged_folders_are_named(folder: Path) -> None:
    content = json.loads((folder / MODEL_FILE).read_text(encoding="utf-8"))

    def with_content(**changes: object) -> None:
        (folder / MODEL_FILE).write_text(json.dumps({**content, **changes}), encoding="utf-8")

    for changes, said in (
        ({"format": 9}, "has format 9"),
        ({"classes": []}, "0 classes are named"),
        ({"modle": {}}, "no key 'modle'; did you mean 'model'"),
        ({"model": {**content["model"], "base_channels": 8}}, "does not fit this architecture: key"),
        ({"model": {**content["model"], "num_stages": 3, "depth": [1]}}, "describes no network"),
    ):
        with_content(**changes)
        with pytest.raises(WeightsError, match=said):
            SpectralSegmenter.from_model(folder, "cpu")
    with_content()
    (folder / WEIGHTS_FILE).write_bytes(b"no weights")
    with pytest.raises(WeightsError, match="damaged or not a safetensors file"):
        SpectralSegmenter.from_model(folder, "cpu")


def run(*arguments: str) -> int:
    from FreqSegLib import cli, cli_spectral, cli_train_spectral  # noqa: F401

    return cli.main(list(arguments))


def test_the_command_writes_segments_and_uncertainty(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    volume, labels, unsure = tmp_path / "v.nrrd", tmp_path / "l.seg.nrrd", tmp_path / "u.nrrd"
    stepped().write(volume)
    asked = ("spectral", str(volume), "--model", str(folder), "-o", str(labels), "--device", "cpu")
    assert run(*asked, "--uncertainty", str(unsure), "--method", "dropout", "--samples", "2", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in said["segments"]] == ["grey", "white"]
    expected = SpectralSegmenter.from_model(folder, "cpu").segment(stepped(), uncertainty="dropout", samples=2)
    written = sitk.GetArrayFromImage(sitk.ReadImage(str(labels)))
    assert np.array_equal(written, expected.labels.array)
    assert expected.uncertainty is not None
    assert np.allclose(Volume.read(unsure).array, expected.uncertainty.entropy.array)
    assert run(*asked) == 1
    assert "exists already" in capsys.readouterr().err
    assert run(*asked, "--overwrite", "-q") == 0


def test_another_kind_of_picture_is_warned_of_and_segmented_all_the_same(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = json.loads((folder / MODEL_FILE).read_text(encoding="utf-8"))
    model["description"] = "Greys in FLAIR volumes."
    (folder / MODEL_FILE).write_text(json.dumps(model), encoding="utf-8")
    for name, warned in (("patient_t2.nrrd", True), ("patient_flair.nrrd", False), ("patient.nrrd", False)):
        stepped().write(tmp_path / name)
        output = tmp_path / f"labels_{name}"
        assert run("spectral", str(tmp_path / name), "-m", str(folder), "-o", str(output), "--json", "-q") == 0
        said = capsys.readouterr()
        expected = f"'patient_t2' seems to be T2; '{model['name']}' was trained on FLAIR. Expect a poor result."
        assert (expected in json.loads(said.out)["warnings"]) == warned
        assert ("poor result" in said.out) == warned
        assert (expected in said.err) == warned
        assert output.exists()


def test_the_command_names_what_is_wrong_before_it_works(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    volume = tmp_path / "v.nrrd"
    stepped().write(volume)
    for arguments, code, said in (
        (("none.nrrd", "-m", str(folder), "-o", str(tmp_path / "a.nrrd")), 1, "no such file"),
        ((str(volume), "-m", "nothing", "-o", str(tmp_path / "a.nrrd")), 1, "no spectral model 'nothing'"),
        ((str(volume), "-m", str(folder), "-o", str(tmp_path / "a.xyz")), 1, "extension must be one of"),
        ((str(volume), "-m", str(folder), "-o", str(volume)), 1, "this is the input"),
        ((str(volume), "-m", "spectral-lung", "-o", str(tmp_path / "a.nrrd")), 1, "did you mean 'spectral-lungs'?"),
        ((str(volume), "-m", str(folder), "-o", str(tmp_path / "a.png")), 1, "a.png: a picture holds one slice"),
        (
            (str(volume), "-m", str(folder), "-o", str(tmp_path / "a.nrrd"), "--uncertainty", str(tmp_path / "u.tif")),
            1,
            "u.tif: a picture holds one slice",
        ),
        (
            (str(volume), "-m", str(folder), "-o", str(tmp_path / "a.nrrd"), "--samples", "4"),
            2,
            "--samples says how uncertainty is measured; give --uncertainty",
        ),
        ((str(volume), "-m", str(folder)), 2, "--output"),
    ):
        assert run("spectral", *arguments) == code
        assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "v.nrrd"]
    assert run("train-spectral", str(tmp_path / "none.json")) == 2
    assert "cannot read the configuration" in capsys.readouterr().err
