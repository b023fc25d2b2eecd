"""``freqseg`` as a user starts it: a process of its own, with the real image tower, on the simulated head."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from FreqSegLib.samples import FLAIR, LESION, sample
from FreqSegLib.volume import Volume

ROOT = Path(__file__).resolve().parents[2]
DRAW_ANYWAY = ("--no-gate", "--confidence-threshold", "0")
"""So that there is a mask whatever the aligner has learned."""


@pytest.fixture(scope="module")
def environment(lite_weights: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONIOENCODING": "utf-8",
        "OMP_WAIT_POLICY": "PASSIVE",
        "FREQSEG_WEIGHTS": str(lite_weights),
    }


@pytest.fixture(scope="module")
def two_slices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the simulated lesion is largest, tilted a little: any grid must come back as it was."""
    flair, lesion = Volume.read(sample(FLAIR)), Volume.read(sample(LESION))
    first = int(lesion.array.any((1, 2)).argmax()) + 5
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]]
    part = Volume(flair.array[first : first + 2].copy(), turn @ flair.affine)
    return part.write(tmp_path_factory.mktemp("in") / "två skivor.nii.gz")


def freqseg(environment: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "FreqSegLib", *(str(word) for word in words)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=500)


def test_a_volume_becomes_a_segmentation_and_the_same_label_map_again(
    environment: dict[str, str], two_slices: Path, tmp_path: Path
) -> None:
    words = ("segment", two_slices, "--prompt", "brain tumour", *DRAW_ANYWAY)
    out = tmp_path / "out folder"
    first = freqseg(environment, *words, "-o", out / "a.seg.nrrd", "--saliency", out / "s.nrrd", "--json")
    assert first.returncode == 0, first.stderr
    found = json.loads(first.stdout)
    (tumour,) = found["segments"]
    assert (tumour["name"], tumour["meaning"], tumour["found"]) == ("brain tumour", "brain tumour", True)
    assert (found["slices"], found["plane"], found["device"] != "") == (2, "axial", True)
    assert len(tumour["slice_scores"]) == 2

    source, mask = Volume.read(two_slices), Volume.read(out / "a.seg.nrrd")
    assert mask.array.shape == source.array.shape
    np.testing.assert_allclose(mask.affine, source.affine, atol=1e-4)
    assert set(np.unique(mask.array)) == {0, 1}
    assert int(mask.array.sum()) == tumour["voxels"]
    voxel = abs(np.linalg.det(source.affine[:3, :3]))
    assert tumour["millilitres"] == pytest.approx(tumour["voxels"] * voxel / 1000)
    assert b"Segment0_Name:=brain tumour\n" in (out / "a.seg.nrrd").read_bytes()
    saliency = Volume.read(out / "s.nrrd").array
    assert saliency.dtype == np.float32
    assert saliency.min() >= 0
    assert saliency.max() <= 1

    second = freqseg(environment, *words, "-o", out / "a.nii.gz")
    assert second.returncode == 0, second.stderr
    assert "1 = brain tumour" in second.stdout
    assert "Reading slices" not in second.stderr  # what the first run read is kept
    np.testing.assert_array_equal(Volume.read(out / "a.nii.gz").array, mask.array)
    assert {path.name for path in out.iterdir()} == {"a.seg.nrrd", "s.nrrd", "a.nii.gz"}


def test_a_picture_becomes_a_picture_and_a_sheet(environment: dict[str, str], tmp_path: Path) -> None:
    middle = Volume.read(sample(FLAIR)).array[9:10].astype(np.float64)
    picture = Volume((middle / middle.max() * 255).astype(np.uint8), np.eye(4), spatial_dimension=2)
    picture.write(tmp_path / "slice.png")
    words = ("-o", tmp_path / "mask.png", "--one-file-per-segment", "--sheet", tmp_path / "sheets", *DRAW_ANYWAY)
    done = freqseg(environment, "segment", tmp_path / "slice.png", "--prompt", "brain tumour", *words)
    assert done.returncode == 0, done.stderr
    assert re.search(r"brain tumour: [\d,]+ pixels, score \d\.\d\d", done.stdout)
    mask = Volume.read(tmp_path / "mask_brain_tumour.png")
    assert mask.shape == picture.shape
    assert set(np.unique(mask.array)) == {0, 255}
    assert [path.name for path in (tmp_path / "sheets").iterdir()] == ["brain_tumour-slice-001.png"]
    assert "Traceback" not in done.stderr
    assert "UNEXPECTED" not in done.stderr  # transformers' own report


@pytest.mark.skipif(os.name == "nt", reason="a POSIX signal stands for Ctrl-C")
def test_ctrl_c_leaves_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("segment", sample(FLAIR), "-p", "brain tumour", "-o", out / "a.nrrd", "--sheet", out / "sheets")
    command = [sys.executable, "-m", "FreqSegLib", *(str(word) for word in words), "--intensity", "40/333"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert running.stderr is not None
    said = ""
    while "Reading slices" not in said:
        line = running.stderr.readline()
        assert line, f"ended before a slice was read: {said}"
        said += line
    time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    output, rest = running.communicate(timeout=60)
    assert running.returncode == 130
    assert rest.splitlines()[-1] == "Cancelled; nothing was written."
    assert "Traceback" not in rest
    assert output == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--help"], 0, "segment"),
        (["segment", "missing.nrrd", "-p", "brain tumour", "-o", "a.nrrd"], 1, "missing.nrrd: no such file or folder"),
        (["segment", "in.nrrd", "-p", "  ", "-o", "a.nrrd"], 2, "The prompt is empty"),
        (["segment", "in.nrrd", "-p", "x", "-o", "a.nrrd", "--preset", "liet"], 2, "Did you mean 'lite'?"),
        (["segment", "in.nrrd", "-p", "x", "-o", "in.nrrd"], 1, "is the input"),
        (["segment", "in.nrrd", "-p", "x", "-o", "old.nrrd"], 1, "old.nrrd exists already"),
        (["segment", "in.nrrd", "-p", "x", "-o", "in.nrrd/a.nrrd"], 1, "cannot write into"),
        (["segment", "in.nrrd", "-p", "brain tumour", "-o", "a.nrrd"], 1, "damaged or incomplete"),
    ],
)
def test_what_goes_wrong_is_one_sentence(
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("in.nrrd", "old.nrrd"):
        Path(name).write_bytes(b"NRRD0004\ntype: short\ndimension: 3\nsizes: 9 9 9\nencoding: raw\n\nshort of data")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = freqseg(environment, *words)
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_the_demo_finds_the_simulated_lesion_and_leaves_lungs_empty(
    environment: dict[str, str], tmp_path: Path
) -> None:
    if not (ROOT / "Resources" / "Models" / "lite-aligner").is_dir():
        pytest.skip("the lite preset's aligner is not shipped in this checkout; run 'make train-lite'")
    done = freqseg(environment, "demo", "-o", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    dice = re.search(r"DSC (\d\.\d\d)", done.stdout)
    assert dice is not None
    assert float(dice[1]) > 0.5
    assert "lungs: not found" in done.stdout
    assert (tmp_path / "demo" / "demo.png").stat().st_size < 400_000
    assert len(list((tmp_path / "demo" / "sheets").iterdir())) == 25
