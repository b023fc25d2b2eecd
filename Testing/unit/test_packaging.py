"""What a wheel holds: every module, the shipped weights and samples, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, project_root: Path) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    code = (
        "import os, sys; os.chdir(sys.argv[1]); from setuptools import build_meta; "
        "print(build_meta.build_wheel(sys.argv[2]))"
    )
    copy = tmp_path_factory.mktemp("source")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=project_root, capture_output=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout: what belongs to the project cannot be told")
    for name in filter(None, tracked.stdout.decode().split("\0")):
        if (project_root / name).is_file():
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((project_root / name).read_bytes())
    command = [sys.executable, "-c", code, str(copy), str(out)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-2000:]
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_every_tracked_module_is_in_the_wheel(wheel: zipfile.ZipFile, project_root: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "FreqSegLib"], cwd=project_root, capture_output=True, check=True)
    modules = {name for name in listed.stdout.decode().splitlines() if name.endswith(".py")}
    assert modules
    assert modules <= set(wheel.namelist())


def test_shipped_weights_and_samples_are_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert "FreqSegLib/Resources/Models/lite-aligner/aligner.safetensors" in names
    assert "FreqSegLib/Resources/Models/lite-aligner/preset.json" in names
    assert "FreqSegLib/Resources/Models/manifest.json" in names
    assert "FreqSegLib/Resources/Samples/simulated_flair.nrrd" in names


def test_nothing_else_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    foreign = [
        name for name in wheel.namelist() if not name.startswith("FreqSegLib/") and not name.startswith("freqseg-")
    ]
    assert foreign == []
    assert not [name for name in wheel.namelist() if "Testing" in name or name.endswith((".pyc", ".part"))]
