"""Exported networks: each file, loaded again, gives the network's numbers; what 8 bits cost is measured and told."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from network_forms import FORMS
from safetensors.torch import save_file
from torch import Tensor, nn

from FreqSegLib import export
from FreqSegLib.errors import DeviceError, OutputError, SettingsError, WeightsError
from FreqSegLib.export import REPORT_FILE, Exported, FixedFilter, Subject, export_model, export_subject, fixed
from FreqSegLib.interaction.dual_stream import DualStreamConfig, DualStreamModel
from FreqSegLib.mamba.model_config import WEIGHTS_FILE, InputConfig, ModelConfig, SpectralModel, class_configs
from FreqSegLib.mamba.spectral_gating import SpectralGating
from FreqSegLib.mamba.spectral_vmunet import SpectralVMUNet
from FreqSegLib.volume import Volume

needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="ONNX needs onnx, onnxscript and onnxruntime: pip install freqseg[export]",
)


def network_of(model: SpectralModel) -> SpectralVMUNet:
    """Random weights, and open gates, so that the frequency path counts."""
    torch.manual_seed(0)
    network = SpectralVMUNet(**asdict(model.model)).eval()
    for name, value in network.named_parameters():
        if "spectral_gate" in name:
            nn.init.normal_(value)
    return network


def described(form: str = "image", **changes: object) -> SpectralModel:
    dimensions = 3 if form == "volume" else 2
    small = {"img_size": 12, "num_stages": 1, "depth": 1, "d_state": 2, "detail_channels": 2, "filter_size": 4}
    model = ModelConfig(out_channels=3, base_channels=4, dimensions=dimensions, **small)  # type: ignore[arg-type]
    frame = InputConfig(form=form, side=12, window=(4, 8, 8))  # type: ignore[arg-type]
    return SpectralModel("made-up", replace(model, **changes), frame, class_configs(("one", "two")))  # type: ignore[arg-type]


def write_model(folder: Path, model: SpectralModel) -> Path:
    folder.mkdir(parents=True)
    model.write(folder)
    save_file(network_of(model).state_dict(), folder / WEIGHTS_FILE)
    return folder


def run_onnx(path: Path, *tensors: Tensor) -> list[Tensor]:
    """Apart from the code under test."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = {one.name: tensor.numpy() for one, tensor in zip(session.get_inputs(), tensors, strict=True)}
    return [torch.from_numpy(np.asarray(found)) for found in session.run(None, inputs)]


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("form", FORMS)
def test_torchscript_and_torch_export_give_the_same_numbers_when_loaded_again(
    tmp_path: Path, image: Tensor, form: str
) -> None:
    model = described(**FORMS[form])
    folder = write_model(tmp_path / "made-up", model)
    done = export_model(folder, tmp_path / "out", ["torch-export", "torchscript"])
    assert [one.format for one in done] == ["torchscript", "torch-export"]
    with torch.no_grad():
        expected = network_of(model)(image)
        script = torch.jit.load(str(tmp_path / "out" / "made-up.pt"))(image)
        program = torch.export.load(tmp_path / "out" / "made-up.pt2").module()(image)
    assert torch.allclose(script, expected, atol=1e-4)
    assert torch.allclose(program, expected, atol=1e-4)
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text(encoding="utf-8"))
    assert report["inputs"][0]["shape"] == [1, 1, 12, 12]
    assert "'freqseg spectral'" in report["inputs"][0]["holds"]
    assert report["classes"] == ["one", "two"]
    assert [one["file"] for one in report["files"]] == ["made-up.pt", "made-up.pt2"]
    assert report["files"][0]["largest_difference"] < 1e-4
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["export.json", "made-up.pt", "made-up.pt2"]


@needs_onnx
@pytest.mark.parametrize("form", FORMS)
def test_onnx_gives_the_same_numbers_and_8_bits_cost_what_is_told(tmp_path: Path, form: str) -> None:
    """Wide enough that weights are most of the file."""
    model = described(base_channels=48, **FORMS[form])
    picture = Volume(np.random.default_rng(0).integers(0, 255, (1, 30, 20)).astype(np.uint8), np.eye(4))
    picture = replace(picture, spatial_dimension=2)
    picture.write(tmp_path / "picture.png")
    folder = write_model(tmp_path / "made-up", model)
    plain, small = export_model(folder, tmp_path / "out", ["onnx", "int8"], images=[tmp_path / "picture.png"])
    image = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = network_of(model)(image)
    assert torch.allclose(run_onnx(tmp_path / "out" / "made-up.onnx", image)[0], expected, atol=1e-4)
    rounded = run_onnx(tmp_path / "out" / "made-up.int8.onnx", image)[0]
    assert 1e-4 < float((rounded - expected).abs().max()) < 0.5 * float(expected.abs().max())
    assert plain.largest_difference < 1e-4 < small.largest_difference
    # convolutions keep their precision
    assert small.megabytes < (0.9 if "every stage" in form else 0.7) * plain.megabytes
    assert small.megabytes == (tmp_path / "out" / "made-up.int8.onnx").stat().st_size / 1e6
    assert plain.same_labels == 1.0
    assert 0.8 < small.same_labels <= 1.0
    assert small.dsc is not None
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text(encoding="utf-8"))
    assert report["compared_on"] == "1 pieces of 1 images"
    assert report["files"][1]["largest_difference"] == small.largest_difference


@pytest.mark.slow
@needs_onnx
def test_a_network_for_volumes_is_exported_too(tmp_path: Path) -> None:
    model = described("volume", patch_size=4)
    folder = write_model(tmp_path / "made-up", model)
    export_model(folder, tmp_path / "out", ["onnx"])
    volume = torch.rand(1, 1, 4, 8, 8)
    with torch.no_grad():
        expected = network_of(model)(volume)
    assert torch.allclose(run_onnx(tmp_path / "out" / "made-up.onnx", volume)[0], expected, atol=1e-4)


def small_text_guided(path: Path) -> DualStreamModel:
    """As the trained one in every part, only narrow."""
    torch.manual_seed(1)
    narrow = {"semantic_width": 16, "frequency_widths": (4, 8, 8, 16), "frequency_depths": (1, 1, 1)}
    config = DualStreamConfig(decoder_widths=(8, 8), text_width=16, adapter_width=8, num_heads=2, **narrow)  # type: ignore[arg-type]
    model = DualStreamModel(config)
    # modules start as the identity: give everything something to do
    for value in model.parameters():
        if not value.any():
            nn.init.normal_(value, std=0.1)
    model.save(path / "text_guided.safetensors", {"meanings": "[]"})
    return DualStreamModel.load(path / "text_guided.safetensors")


@needs_onnx
def test_the_text_guided_model_is_exported_with_its_three_inputs(tmp_path: Path) -> None:
    model = small_text_guided(tmp_path)
    done = export_model(tmp_path, tmp_path / "out", ["onnx", "int8"])
    made = torch.Generator().manual_seed(3)
    inputs = (
        torch.randn(1, 256, 64, 64, generator=made),
        torch.rand(1, 1, 256, 256, generator=made),
        nn.functional.normalize(torch.randn(1, 384, generator=made), dim=1),
    )
    with torch.no_grad():
        expected = model(*inputs)
    logits, presence = run_onnx(tmp_path / "out" / "lite-text-guided.onnx", *inputs)
    assert torch.allclose(logits, expected.logits, atol=1e-4)
    assert torch.allclose(presence, expected.presence, atol=1e-4)
    assert done[0].largest_difference < 1e-4 < done[1].largest_difference
    assert done[1].megabytes < done[0].megabytes
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text(encoding="utf-8"))
    assert [one["name"] for one in report["inputs"]] == ["embedding", "image", "text"]
    assert report["outputs"] == ["logits", "presence"]


@pytest.mark.parametrize(("dimensions", "filter_size"), [(2, 5), (2, 8), (3, 4)])
def test_a_filter_written_out_is_the_filter(dimensions: int, filter_size: int) -> None:
    torch.manual_seed(0)
    gating = SpectralGating(3, filter_size, dimensions, noise=0.5)
    with torch.no_grad():
        gating.band_gain.normal_()
    x = torch.randn(2, 3, *(7, 9, 5)[:dimensions])
    network = nn.Sequential(nn.Identity(), gating)
    plain = fixed(network)
    assert isinstance(plain[1], FixedFilter)  # type: ignore[index]
    assert network[1] is gating
    assert torch.allclose(plain(x), gating(x), atol=1e-5)


class Growing(nn.Module):
    """Answers otherwise each time: no file can give the same."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.layer = nn.Conv2d(1, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) + self.calls


def test_a_file_that_would_answer_otherwise_is_not_delivered(tmp_path: Path, image: Tensor) -> None:
    subject = Subject(
        "growing", Growing(), {"image": (1, 1, 12, 12)}, {"image": ""}, ("logits",),
        lambda logits: logits[0].argmax(0), ("one",), ((image,), (image,)), "an image",
    )  # fmt: skip
    with pytest.raises(OutputError, match="would give other numbers than the network"):
        export_subject(subject, tmp_path / "out", ["torch-export"])
    assert list((tmp_path / "out").iterdir()) == []


def test_differences_labels_and_overlap_are_counted_as_by_hand(tmp_path: Path) -> None:
    logits = torch.tensor([[[[2.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [2.0, 2.0]]]])
    other = logits.clone()
    other[0, :, 1, 1] = torch.tensor([3.0, 2.5])
    subject = Subject(
        "by-hand", nn.Identity(), {"image": (1, 2, 2, 2)}, {"image": ""}, ("logits",),
        lambda found: found[0].argmax(0), ("one",), ((logits,),), "an image",
    )  # fmt: skip
    (tmp_path / "file").write_bytes(bytes(500_000))
    found = export.compared(subject, lambda x: (other,), "int8", tmp_path / "file")
    # one of two pixels of the class stays: 2 * 1 / (2 + 1)
    assert found == Exported("int8", "file", 0.5, 3.0, 2.0, 0.75, pytest.approx(2 / 3))
    assert "75.00 % of the labels" in found.sentence()


def test_what_cannot_be_exported_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = write_model(tmp_path / "made-up", described()), tmp_path / "out"
    with pytest.raises(SettingsError, match="got tflite"):
        export_model(folder, out, ["tflite"])  # type: ignore[list-item]
    with pytest.raises(SettingsError, match="got none"):
        export_model(folder, out, [])
    with pytest.raises(WeightsError, match="no spectral model 'nothing'"):
        export_model("nothing", out, ["torchscript"])
    with pytest.raises(SettingsError, match="2 sides of at least"):
        export_model(folder, out, ["torchscript"], size=(8, 8, 8))
    with pytest.raises(SettingsError, match="takes no prompts"):
        export_model(folder, out, ["torchscript"], prompts=["lung"])
    small_text_guided(tmp_path)
    with pytest.raises(SettingsError, match="give both images and prompts"):
        export_model(tmp_path, out, ["torchscript"], prompts=["lung"])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    with pytest.raises(DeviceError, match=r"packages .*onnxruntime, .*freqseg\[export\]"):
        export_model(folder, out, ["int8"])
    assert not out.exists()


def test_the_command_writes_and_says_what_it_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from FreqSegLib import cli

    folder, out = write_model(tmp_path / "made-up", described()), tmp_path / "out"
    asked = ["export", str(folder), "-o", str(out), "--format", "torchscript", "--size", "8", "--size", "12"]
    assert cli.main([*asked, "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)
    assert said["file"] == "made-up.pt"
    report = json.loads((out / REPORT_FILE).read_text(encoding="utf-8"))
    assert report["inputs"][0]["shape"] == [1, 1, 8, 12]
    assert cli.main(asked) == 1
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["export", str(folder), "-o", str(out), "--image", "none.png"]) == 1
    assert "none.png: no such file" in capsys.readouterr().err
