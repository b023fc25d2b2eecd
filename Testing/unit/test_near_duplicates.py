"""Images that show the same thing twice are found, and only those."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from FreqSegLib.training.near_duplicates import near_duplicates


def write(folder: Path, name: str, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name)
    return folder / name


@pytest.fixture
def scenes() -> list[np.ndarray]:
    """Smooth random pictures (80, 100) that do not resemble each other."""
    rng = np.random.default_rng(3)
    coarse = rng.uniform(20, 220, (3, 8, 10))
    return [np.kron(picture, np.ones((10, 10))) for picture in coarse]


def test_the_same_scene_cut_brighter_and_noisier_belongs_to_the_first(tmp_path: Path, scenes) -> None:
    rng = np.random.default_rng(0)
    first = write(tmp_path, "a.png", scenes[0])
    cropped = write(tmp_path, "b.png", scenes[0][:, 1:])
    brighter = write(tmp_path, "z.png", scenes[0] * 0.9 + 20 + rng.normal(0, 4, scenes[0].shape))
    other = write(tmp_path, "c.png", scenes[1])
    assert near_duplicates([other, brighter, cropped, first]) == {
        first: first,
        cropped: first,
        brighter: first,
        other: other,
    }


def test_what_resembles_through_another_is_one_group(tmp_path: Path, scenes) -> None:
    # mixtures: each resembles the next, the ends do not resemble each other
    mixed = [write(tmp_path, f"{i}.png", (1 - t) * scenes[0] + t * scenes[1]) for i, t in enumerate((0, 0.33, 0.66, 1))]
    found = near_duplicates(mixed, similarity=0.8)
    assert set(found.values()) == {mixed[0]}
    assert near_duplicates([mixed[0], mixed[3]], similarity=0.8) == {mixed[0]: mixed[0], mixed[3]: mixed[3]}


def test_constant_pictures_resemble_nothing_and_none_are_none(tmp_path: Path) -> None:
    flat = [write(tmp_path, f"{i}.png", np.full((20, 20), 90.0)) for i in range(2)]
    assert near_duplicates(flat) == {flat[0]: flat[0], flat[1]: flat[1]}
    assert near_duplicates([]) == {}
