"""The biomedclip-sam preset from the command line, with random weights in the official layouts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from official_layouts import write_random_biomedclip, write_random_sam

from FreqSegLib.volume import Volume


@pytest.fixture(scope="module")
def volume_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    affine = np.diag([1.0, 1.5, 4.0, 1.0])
    path = tmp_path_factory.mktemp("volume") / "noise.nrrd"
    Volume(rng.integers(0, 200, (2, 40, 48)).astype(np.int16), affine).write(path)
    return path


def _segment(volume: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "FreqSegLib", "segment", str(volume), "--preset", "biomedclip-sam"]
    command += ["--prompt", "kidney stone", "--layer-idx", "1", "--train-steps", "2", "--num-noise-samples", "2"]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"}
    return subprocess.run(
        [*command, "-o", str(out), *options], capture_output=True, text=True, env=environment, timeout=500, check=False
    )


def test_any_prompt_runs_through_a_folder_of_ones_own_without_sam(volume_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my clip"
    write_random_biomedclip(folder, scale="tiny", seed=0)
    out = tmp_path / "out.seg.nrrd"

    ran = _segment(volume_path, out, "--clip-folder", str(folder))

    assert ran.returncode == 0, ran.stderr
    said = " ".join(ran.stderr.split())
    assert "cannot tell whether a target is there" in said
    assert "coarse mask is the result" in said
    assert out.exists()


def test_without_weights_the_way_to_get_them_is_said(
    volume_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FREQSEG_WEIGHTS", str(tmp_path))

    ran = _segment(volume_path, tmp_path / "out.seg.nrrd")

    assert ran.returncode == 1
    assert "freqseg models get biomedclip" in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_lite_preset_refuses_weights_of_ones_own(volume_path: Path, tmp_path: Path) -> None:
    from FreqSegLib.errors import SettingsError
    from FreqSegLib.text_segmentation import TextSegmenter

    with pytest.raises(SettingsError, match="biomedclip-sam"):
        TextSegmenter.from_preset("lite", clip_folder=tmp_path)


@pytest.mark.slow
def test_sam_vit_b_draws_on_top(volume_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    write_random_biomedclip(folder, scale="tiny", seed=0)
    checkpoint = write_random_sam(tmp_path, "vit_b", seed=0)
    out = tmp_path / "out.nii.gz"

    ran = _segment(volume_path, out, "--clip-folder", str(folder), "--sam-checkpoint", str(checkpoint))

    assert ran.returncode == 0, ran.stderr
    assert "coarse mask is the result" not in " ".join(ran.stderr.split())
    assert Volume.read(out).shape == (2, 40, 48)
