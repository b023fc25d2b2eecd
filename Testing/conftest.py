"""Fixtures every test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# The same examples every run, so that a result does not depend on luck; HYPOTHESIS_PROFILE=explore tries new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def data_folder() -> Path | None:
    """The real images: FREQSEG_DATA, or ``../shared/data`` beside the checkout."""
    folder = Path(os.environ.get("FREQSEG_DATA", ROOT.parent / "shared" / "data"))
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = data_folder()
    if folder is None:
        pytest.skip("real images not found: put them at ../shared/data or set FREQSEG_DATA")
    return folder


@pytest.fixture(scope="session")
def project_root() -> Path:
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The embedding cache of this test run, also of the processes it starts; the user's own is never touched."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FREQSEG_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def lite_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for FREQSEG_WEIGHTS with which the lite preset loads.

    LiteMedSAM and MiniLM are the real ones, found where they are installed. The aligner is the shipped one, or an
    untrained one from a fixed seed where none is shipped: then masks mean nothing, but everything runs.
    """
    from FreqSegLib import weights

    missing = [name for name in ("litemedsam", "minilm") if weights.find(name) is None]
    if missing:
        pytest.skip(f"weights not installed: {', '.join(missing)}; run 'freqseg models get {' '.join(missing)}'")
    folder = tmp_path_factory.mktemp("weights")
    if weights.find("lite-aligner") is None:
        import torch

        from FreqSegLib.clip.aligner import Aligner

        (folder / "lite-aligner").mkdir()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            Aligner().save(folder / "lite-aligner" / "aligner.safetensors")
    return folder
