"""Settings are chosen through the whole pipeline: what the decoder draws decides, a patient at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from FreqSegLib.embedding_cache import EmbeddingCache
from FreqSegLib.presets import PRESETS, Tuning
from FreqSegLib.sam.promptable import Decoded
from FreqSegLib.settings import TextSegmentationSettings
from FreqSegLib.text_segmentation import TextSegmenter
from FreqSegLib.training.lite_tuning import tune
from FreqSegLib.volume import Volume

SIDE, GRID = 64, 16


class Bright:
    """Tokens are brightness; "breast lesion" asks for it, every other wording for something that is never there."""

    image_size, token_grid, width, num_layers, embed_dim, num_prefix_tokens = SIDE, (GRID, GRID), 2, 3, 4, 0

    def prefix(self, images: Tensor, layer_idx: int) -> Tensor:
        brightness = F.avg_pool2d(images[:, :1], SIDE // GRID).flatten(2).transpose(1, 2)
        return torch.cat([brightness, torch.full_like(brightness, 0.1)], -1)

    def suffix(self, tokens: Tensor, layer_idx: int) -> Tensor:
        brightness = (tokens[..., 0] - 0.5).clamp_min(0).sum(1)
        rest = torch.full_like(brightness, 0.05)
        return F.normalize(torch.stack([brightness, rest, rest * 0, rest * 0], -1), dim=-1)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.suffix(self.prefix(images, 3), 3)

    @torch.inference_mode()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        return torch.eye(4)[[0 if prompt == "breast lesion" else 1 for prompt in prompts]]

    def features(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        raise NotImplementedError


class Draws:
    """A decoder that draws exactly what is bright when it is given a box, and everything when it is given points."""

    name, image_size, embedding_shape, frame_mode = "draws", 256, (1, 256, 256), "pad"

    def embed(self, images: Tensor, valid: tuple[int, int] | None = None) -> Tensor:
        return images[:, :1]

    def decode(self, embedding: Tensor, *, boxes: Tensor | None = None, **_) -> Decoded:
        drawn = embedding - 0.5 if boxes is not None else torch.ones_like(embedding)
        return Decoded(drawn, torch.ones(1, 1))


@dataclass
class Patient:
    """Stands for an evaluation case: three slices, a bright lesion in the middle one (or nowhere)."""

    lesion: tuple[slice, slice] | None
    modality: str = "ultrasound"

    def read(self) -> Patient:
        return self

    @property
    def volume(self) -> Volume:
        array = np.random.default_rng(1).uniform(8, 12, (3, SIDE, SIDE)).astype(np.float32)
        array[1, :2, :2] = 100
        array[self.truth("breast lesion")] = 100
        return Volume(array, np.eye(4))

    def truth(self, target: str) -> np.ndarray:
        found = np.zeros((3, SIDE, SIDE), dtype=bool)
        if self.lesion and target == "breast lesion":
            found[1][self.lesion] = True
        return found


@pytest.fixture
def segmenter(tmp_path: Path) -> TextSegmenter:
    return TextSegmenter(
        Bright(),
        Draws(),
        replace(PRESETS["lite"], has_vocabulary=False),
        weights_key="fake",
        tuning={"breast lesion": Tuning({"threshold": "fixed"}, slope=20, offset=0.2)},
        cache=EmbeddingCache(tmp_path),
    )


LESIONS = [(slice(20, 40), slice(8, 30)), (slice(30, 50), slice(40, 60))]


def test_the_settings_chosen_draw_the_lesion(segmenter: TextSegmenter) -> None:
    said: list[str] = []
    chosen = tune(segmenter, [Patient(lesion) for lesion in LESIONS], said.append)
    assert list(chosen) == ["breast lesion"]
    found = chosen["breast lesion"]
    assert found.cases == 2
    assert found.dsc > 0.95
    assert found.dsc == pytest.approx(max(found.tried.values()), abs=0.011)
    # points make this decoder flood the slice, so a kind of prompt with boxes must win
    assert found.settings.get("prompt_kind", "boxes") != "points"
    # as good with NIB as with M2IB: the faster one
    assert found.settings["bottleneck"] == "nib"
    assert said
    assert "breast lesion" in said[0]

    TextSegmentationSettings(**found.settings)


def test_patients_without_the_target_and_other_modalities_decide_nothing(segmenter: TextSegmenter) -> None:
    assert tune(segmenter, [Patient(None), Patient(LESIONS[0], modality="ct")], print) == {}
    assert tune(segmenter, [], print) == {}
    found = tune(segmenter, [Patient(LESIONS[0]), Patient(None)], lambda line: None)
    assert found["breast lesion"].cases == 1


def test_m2ib_is_kept_where_it_is_clearly_better(segmenter: TextSegmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    """NIB's maps spoiled: what is left is M2IB."""
    monkeypatch.setattr(
        "FreqSegLib.text_stages.nib_contribution", lambda suffix, tokens, texts: torch.rand(tokens.shape[:2])
    )
    found = tune(segmenter, [Patient(LESIONS[1])], lambda line: None)["breast lesion"]
    assert found.settings["bottleneck"] == "m2ib"
    assert found.dsc > 0.9
