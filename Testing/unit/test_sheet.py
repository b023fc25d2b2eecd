"""Pictures of a result: one sheet a slice, and an overview."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from FreqSegLib.errors import InputError, OutputError
from FreqSegLib.sam.visual_prompts import VisualPrompt
from FreqSegLib.sheet import old_sheets, overview_figure, png, sheet_figure, sheet_name, write_sheets
from FreqSegLib.text_segmentation import Intermediate, PromptResult

COLOR = (1.0, 0.0, 1.0)
SIDE = 40


def made(slices: int = 3, *, uncertainty: bool = False, branches: bool = False) -> PromptResult:
    """A grey square with a target in its middle slices."""
    image = np.full((slices, SIDE, SIDE), 0.5, dtype=np.float32)
    mask = np.zeros((slices, SIDE, SIDE), dtype=bool)
    mask[1:, 10:20, 12:30] = True
    saliency = mask * np.float32(0.8)
    box = VisualPrompt((12.0, 10.0, 30.0, 20.0), np.array([[20.0, 15.0], [2.0, 2.0]]), np.array([1, 0]))
    maps = ("raw", "low", "high") if branches else ("raw",)
    items = tuple(
        Intermediate(
            index=index,
            image=image[index],
            frequency={"low": image[index], "high": image[index]},
            saliency=dict.fromkeys(maps, saliency[index]),
            fused=saliency[index],
            uncertainty=saliency[index] / 4 if uncertainty else None,
            coarse=mask[index],
            prompts=(box,) if mask[index].any() else (),
            mask=mask[index],
            probability=0.9,
        )
        for index in range(slices)
    )
    return PromptResult(
        name="brain tumour",
        mask=mask,
        saliency=saliency,
        uncertainty=saliency / 4 if uncertainty else None,
        score=0.9,
        slice_scores=np.full(slices, 0.9, dtype=np.float32),
        color=COLOR,
        meaning=None,
        intermediates=items,
    )


def titles(result: PromptResult, index: int) -> list[str]:
    return [axes.get_title(loc="left") for axes in sheet_figure(result, result.intermediates[index]).axes]


def test_a_sheet_a_slice_is_written_all_or_none(tmp_path: Path) -> None:
    done: list[int] = []
    paths = write_sheets(made(), tmp_path / "new", progress=done.append)
    assert [path.name for path in paths] == [f"brain_tumour-slice-00{number}.png" for number in (1, 2, 3)]
    assert sorted((tmp_path / "new").iterdir()) == paths
    assert done == [1, 2, 3]
    before = paths[0].read_bytes()
    paths[2].unlink()
    with pytest.raises(OutputError, match="exists already"):
        write_sheets(made(), tmp_path / "new")
    assert not paths[2].exists()
    assert paths[0].read_bytes() == before


def test_a_sheet_shows_every_stage_there_is() -> None:
    plain = titles(made(), 1)
    for stage in ("Input", "Low-frequency image", "High-frequency image", "Saliency of the input", "Result"):
        assert stage in plain
    assert "Coarse mask, boxes and points for SAM" in plain
    assert "Coarse mask (empty)" in titles(made(), 0)
    assert not any("Uncertainty" in title or "low frequencies" in title for title in plain)
    full = titles(made(uncertainty=True, branches=True), 1)
    for stage in ("Uncertainty (standard deviation)", "Saliency, low frequencies", "Saliency, high frequencies"):
        assert stage in full


def test_an_uncertainty_that_is_zero_everywhere_is_not_shown() -> None:
    result = made(uncertainty=True)
    assert result.uncertainty is not None
    flat = replace(result, uncertainty=np.zeros_like(result.uncertainty))
    assert not any("Uncertainty" in title for title in titles(flat, 1))


def test_panels_lie_on_the_page_without_touching() -> None:
    for kind in ({}, {"uncertainty": True}, {"branches": True}, {"uncertainty": True, "branches": True}):
        result = made(**kind)
        figure = sheet_figure(result, result.intermediates[1], pixel_spacing=(3.0, 1.0))
        boxes = [axes.get_position() for axes in figure.axes]
        assert all(0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1 for box in boxes)
        for number, one in enumerate(boxes):
            assert not any(one.overlaps(other) for other in boxes[number + 1 :])


def test_the_outline_is_drawn_where_the_mask_is() -> None:
    result = made()
    figure = sheet_figure(result, result.intermediates[1])
    pixels = np.asarray(Image.open(io.BytesIO(png(figure, colours=None))).convert("RGB")).astype(int)
    (panel,) = [axes for axes in figure.axes if axes.get_title(loc="left") == "Result"]
    x0, y1 = panel.transData.transform((-0.5, -0.5))
    x1, y0 = panel.transData.transform((SIDE - 0.5, SIDE - 0.5))
    height = pixels.shape[0]
    shown = pixels[round(height - y1) : round(height - y0), round(x0) : round(x1)]
    strong = (shown[..., 0] > 220) & (shown[..., 2] > 220) & (shown[..., 1] < 60)
    rows, columns = np.nonzero(strong)
    scale = shown.shape[0] / SIDE
    assert (rows.min() / scale, rows.max() / scale) == pytest.approx((10, 20), abs=0.6)
    assert (columns.min() / scale, columns.max() / scale) == pytest.approx((12, 30), abs=0.6)
    middle = shown[round(15 * scale), round(25 * scale)]
    assert middle[0] == middle[2] > middle[1]


def test_names_of_sheets_are_recognised_by_prompt(tmp_path: Path) -> None:
    for name in (sheet_name("left lung", 0), sheet_name("lung", 11), "lung-slice-1.png", "lung.png"):
        (tmp_path / name).write_text("x")
    assert [path.name for path in old_sheets(tmp_path)] == ["left_lung-slice-001.png", "lung-slice-012.png"]
    assert [path.name for path in old_sheets(tmp_path, "lung")] == ["lung-slice-012.png"]
    assert old_sheets(tmp_path / "none") == []


def test_the_overview_is_1600_pixels_wide_and_small() -> None:
    noisy = made(12)
    noise = np.random.default_rng(0).normal(0.5, 0.05, (12, SIDE, SIDE)).astype(np.float32)
    items = tuple(replace(item, image=noise[item.index]) for item in noisy.intermediates)
    figure = overview_figure(replace(noisy, intermediates=items), truth=noisy.mask, label="simulated FLAIR")
    packed = png(figure)
    assert Image.open(io.BytesIO(packed)).width == 1600
    assert len(packed) < 0.7 * len(png(figure, colours=None))
    found = [axes.get_title(loc="left") for axes in figure.axes]
    assert {"Simulated FLAIR", "Where the model looked", "Result and truth"} <= set(found)
    assert sum(title == "" for title in found) == 9


@pytest.mark.parametrize("slices", [1, 2])
def test_the_overview_of_few_slices_or_an_empty_result_is_drawn(slices: int) -> None:
    assert png(overview_figure(made(slices))).startswith(b"\x89PNG")


def test_without_stages_there_is_nothing_to_draw(tmp_path: Path) -> None:
    bare = replace(made(), intermediates=())
    with pytest.raises(InputError, match="return_intermediate=True"):
        write_sheets(bare, tmp_path)
    with pytest.raises(InputError, match="return_intermediate=True"):
        overview_figure(bare)
