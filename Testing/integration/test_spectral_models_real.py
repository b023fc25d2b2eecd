"""The shipped spectral models on real images that they were not trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from FreqSegLib import SpectralSegmenter, Volume

pytestmark = pytest.mark.data


@pytest.mark.parametrize(
    ("model", "image", "label", "least"),
    [
        (
            "spectral-glioma",
            "lgg_flair/test/TCGA_CS_6668_flair.nii.gz",
            "lgg_flair/test/TCGA_CS_6668_mask.nii.gz",
            (0.85,),
        ),
        ("spectral-lungs", "cxr_lungs/test/images/{first}", "cxr_lungs/test/masks/{first}", (0.85,)),
        (
            "spectral-hippocampus",
            "hippocampus/test/images/{first}",
            "hippocampus/test/labels/{first}",
            (0.7, 0.7),
        ),
    ],
)
def test_a_shipped_model_finds_what_it_names_on_a_test_image(
    shared_data: Path, model: str, image: str, label: str, least: tuple[float, ...]
) -> None:
    folder = shared_data / "segmentation"
    first = min(path.name for path in (folder / image).parent.iterdir() if path.is_file())
    volume, truth = (Volume.read(folder / path.format(first=first)) for path in (image, label))
    found = SpectralSegmenter.from_model(model, "cpu").segment(volume, keep_probabilities=False)
    assert found.labels.shape == volume.shape
    assert np.allclose(found.labels.affine, volume.affine)
    for number, (one, wanted) in enumerate(zip(found.classes, least, strict=True), start=1):
        real = truth.array == number if len(least) > 1 else truth.array > 0
        assert 2 * (one.mask & real).sum() / (one.mask.sum() + real.sum()) > wanted
