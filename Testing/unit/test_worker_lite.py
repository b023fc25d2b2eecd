"""The worker with the lite preset's real models, on slices of the simulated head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from FreqSegLib.samples import FLAIR, LESION, sample
from FreqSegLib.settings import TextSegmentationSettings
from FreqSegLib.volume import Volume
from FreqSegLib.worker_client import WorkerClient

PATIENCE = 600.0


def test_a_tumour_by_text_then_by_hand_and_nothing_is_read_twice(
    lite_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from FreqSegLib.text_segmentation import TextSegmenter

    monkeypatch.setenv("FREQSEG_WEIGHTS", str(lite_weights))
    whole, lesion = Volume.read(sample(FLAIR)), Volume.read(sample(LESION)).array > 0
    middle = int(lesion.sum((1, 2)).argmax())
    low, high = middle - 1, middle + 1
    roi = [[0, whole.shape[2]], [0, whole.shape[1]], [low, high]]
    with WorkerClient(folder=tmp_path) as client:
        volume = {
            "array": client.export(whole.array).described(),
            "affine": whole.affine,
            "name": whole.name,
            "modality": "MR",
        }
        found = client.wait(client.send("set_volume", volume=volume, roi=roi), timeout=PATIENCE)
        assert (found["slices"], found["encoded"]) == (2, 2)
        assert found["ran"] == ["Loading models", "Reading slices"]
        settings = {"gate": False, "bottleneck": "nib"}
        request = client.send("segment", volume_id=found["volume_id"], prompts=["brain tumour"], settings=settings)
        answer = client.wait(request, timeout=PATIENCE)
        assert answer["encoded"] == 0
        assert "Reading slices" not in answer["ran"]
        (one,) = answer["segments"]
        assert one["meaning"] == "brain tumour"
        mask = client.read(one["mask"])

        corner = whole.affine.copy()
        corner[:3, 3] += low * corner[:3, 2]
        direct = TextSegmenter.from_preset("lite", device="cpu")
        crop = replace(whole, array=np.ascontiguousarray(whole.array[low:high]), affine=corner, modality="MR")
        direct.set_volume(crop)
        (expected,) = direct.segment(["brain tumour"], settings=TextSegmentationSettings(**settings))
        np.testing.assert_array_equal(mask[low:high] > 0, expected.mask)
        assert not mask[:low].any()
        assert not mask[high:].any()

        rows, columns = np.nonzero(lesion[middle])
        box = [[columns.min(), rows.min(), middle], [columns.max(), rows.max(), middle]]
        empty = client.export(np.zeros_like(mask)).described()
        request = client.send("refine", volume_id=found["volume_id"], mask=empty, box=box)
        refined = client.wait(request, timeout=PATIENCE)
        assert (refined["slices_changed"], refined["encoded"], refined["ran"]) == ([middle], 0, ["Refining"])
        drawn = client.read(refined["mask"])[middle] > 0
        assert 2 * (drawn & lesion[middle]).sum() / (drawn.sum() + lesion[middle].sum()) > 0.8
