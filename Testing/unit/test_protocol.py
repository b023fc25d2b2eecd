"""The schema between panel and worker: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from FreqSegLib import protocol
from FreqSegLib.errors import Cancelled, InputError, SettingsError, WeightsError
from FreqSegLib.protocol import ArrayDescription, RequestError, WorkerError
from FreqSegLib.settings import TextSegmentationSettings

ARRAY = {"file": "/tmp/a.raw", "dtype": "<i2", "shape": [2, 3, 4]}
VOLUME = {"array": ARRAY, "affine": np.eye(4).tolist()}


def message(request: str, **values: object) -> dict[str, object]:
    return {"id": "1", "request": request, "values": values}


def test_a_request_becomes_what_its_dataclass_says() -> None:
    number, name, found = protocol.parse(
        message("set_volume", volume={**VOLUME, "modality": "MR"}, roi=[[0, 2], [1, 3], [0, 2]], settings={"seed": 3})
    )
    assert (number, name) == ("1", "set_volume")
    assert found.volume.array == ArrayDescription("/tmp/a.raw", "<i2", (2, 3, 4))
    assert (found.volume.modality, found.preset, found.settings) == ("MR", "lite", {"seed": 3})
    assert found.roi == ((0, 2), (1, 3), (0, 2))
    assert found.volume.affine[3] == (0.0, 0.0, 0.0, 1.0)


def test_what_numpy_and_paths_give_can_be_sent() -> None:
    line = protocol.encode({"a": np.int16(3), "b": np.eye(2), "c": Path("x"), "d": (1, 2), "e": "Größe"})
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert protocol.decode(line) == {"a": 3, "b": [[1, 0], [0, 1]], "c": "x", "d": [1, 2], "e": "Größe"}


@pytest.mark.parametrize("value", [float("nan"), object(), {1, 2}])
def test_what_json_cannot_say_is_refused_before_it_is_sent(value: object) -> None:
    with pytest.raises(RequestError, match="cannot be written as JSON"):
        protocol.encode({"a": value})


@pytest.mark.parametrize("line", [b"", b"hello\n", b"[1]\n", b"3\n", b"{\n", b"\xff\xfe\x00\n", b"[" * 100_000])
def test_a_line_that_is_no_object_is_refused(line: bytes) -> None:
    with pytest.raises(RequestError, match="line"):
        protocol.decode(line)


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ({"request": "info"}, "needs an id"),
        ({"id": 7, "request": "info"}, "needs an id"),
        ({"id": "../7", "request": "info"}, "needs an id"),
        ({"id": "1"}, "no request None"),
        (message("segments"), "no request 'segments'.*Requests: begin, set_volume, segment"),
        ({**message("info"), "action": "list"}, "'action' does not belong"),
        ({"id": "1", "request": "info", "values": [1]}, "info must be an object"),
        (message("info", device="cpu"), "info has no field 'device'"),
        (message("segment", prompts=["a"]), "segment needs the field 'volume_id'"),
        (message("segment", volume_id="a", prompts="tumour"), r"segment\.prompts must be a list"),
        (message("segment", volume_id="a", prompts=["a", 3]), r"segment\.prompts\[1\] must be text, got '3'"),
        (message("segment", volume_id="a", prompts=[], uncertainty=1), "uncertainty must be true or false"),
        (message("segment", volume_id="a", prompts=[], settings=[1]), "settings must be an object"),
        (message("set_volume", volume={"array": ARRAY}), r"volume needs the field 'affine'"),
        (message("set_volume", volume={**VOLUME, "affine": [[1, "x"]]}), r"affine\[0\]\[1\] must be a number"),
        (message("set_volume", volume=VOLUME, roi=[[0, 1], [0, 1]]), "roi must hold 3 items, got 2"),
        (message("set_volume", volume=VOLUME, roi=[[0, 1], [0, 1], [0, 1.5]]), r"roi\[2\]\[1\] must be a whole number"),
        (message("set_volume", volume={**VOLUME, "array": {**ARRAY, "shape": [True]}}), "must be a whole number"),
        (message("models", action="delete"), "action must be one of list, get, verify, remove, folder"),
        (message("refine", volume_id="a", mask=ARRAY, points=[[1, 2, 3]]), r"points\[0\] must hold 4 items"),
        (message("cancel"), "cancel needs the field 'target'"),
    ],
)
def test_a_wrong_request_is_refused_with_what_is_wrong(sent: dict[str, object], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        protocol.parse(json.loads(json.dumps(sent)))


def test_every_request_says_what_its_result_is() -> None:
    for name, kind in protocol.REQUESTS.items():
        assert "Result:" in (kind.__doc__ or ""), name
    assert set(protocol.REQUESTS) >= {"set_volume", "segment", "fuse", "spectral_segment", "preview_slice", "shutdown"}


def test_every_code_is_documented_and_becomes_its_exception() -> None:
    documented = set(re.findall(r"``([a-z_]+)``", (protocol.__doc__ or "").partition("Codes of errors:")[2]))
    assert {"cancelled", "request", "volume_unknown", "memory", "worker_gone", "cannot_start", "internal"} <= documented
    for code, kind in {"cancelled": Cancelled, "weights": WeightsError, "request": RequestError}.items():
        assert type(protocol.error_of(code, "a sentence")) is kind
    other = protocol.error_of("memory", "a sentence")
    assert isinstance(other, WorkerError)
    assert (other.code, str(other)) == ("memory", "a sentence")
    assert all(protocol.error_of(code, "x").code == code for code in documented)


def test_an_array_comes_back_as_it_was_written(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4).transpose(2, 0, 1)
    described = protocol.write_array(tmp_path / "a.raw", array)
    np.testing.assert_array_equal(described.open(), array)
    assert [path.name for path in tmp_path.iterdir()] == ["a.raw"]
    shifted = ArrayDescription(described.file, "<i2", (2, 2), offset=8)
    np.testing.assert_array_equal(shifted.open().ravel(), np.ascontiguousarray(array).ravel()[4:8])
    with pytest.raises(ValueError, match="read-only"):
        described.open()[0, 0, 0] = 1


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"shape": (5, 3, 4)}, "holds 48 bytes; 120 are needed"),
        ({"dtype": "voxels"}, "no type of voxels"),
        ({"dtype": "O"}, "holds no voxels"),
        ({"shape": (0, 3, 4)}, "holds no voxels"),
        ({"file": "nowhere.raw"}, "cannot be read"),
    ],
)
def test_a_wrong_description_of_an_array_is_refused(tmp_path: Path, changed: dict[str, object], said: str) -> None:
    described = protocol.write_array(tmp_path / "a.raw", np.zeros((2, 3, 4), np.int16))
    values = {item.name: getattr(described, item.name) for item in fields(described)}
    with pytest.raises(InputError, match=said):
        ArrayDescription(**{**values, **changed}).open()


def test_settings_take_only_what_differs_and_only_what_exists() -> None:
    assert protocol.settings_of(TextSegmentationSettings, {"seed": 3}) == TextSegmentationSettings(seed=3)
    with pytest.raises(SettingsError, match=r"no setting 'sead'. Settings: .*axis, intensity"):
        protocol.settings_of(TextSegmentationSettings, {"sead": 3})
    with pytest.raises(SettingsError, match="levels must lie in 1 to 8"):
        protocol.settings_of(TextSegmentationSettings, {"levels": 9})
