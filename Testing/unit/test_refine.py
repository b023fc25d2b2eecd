"""The refinement stage with a decoder that can be foreseen, and its votes against independent ones."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from torch import Tensor

from FreqSegLib.sam.promptable import Decoded
from FreqSegLib.sam.refine import one_of, refine_slice
from FreqSegLib.sam.visual_prompts import VisualPrompt, visual_prompts
from FreqSegLib.slices import Frame

NO_POINTS = np.zeros((0, 2))


class BoxDrawer:
    """Draws the box it is given as the mask, candidate m of three one pixel wider; keeps what it was asked."""

    name, image_size, embedding_shape, frame_mode = "box drawer", 256, (1, 64, 64), "pad"
    frame_mode = "pad"

    def __init__(self) -> None:
        self.asked: list[dict] = []

    def embed(self, images: Tensor, valid: tuple[int, int] | None = None) -> Tensor:
        return torch.zeros(len(images), *self.embedding_shape)

    def decode(self, embedding: Tensor, **given) -> Decoded:
        self.asked.append(given)
        ys, xs = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
        masks = []
        for box in given["boxes"]:
            candidates = []
            for wider in range(3 if given["multimask"] else 1):
                x0, y0, x1, y1 = (box + torch.tensor([-1.0, -1.0, 1.0, 1.0]) * wider).tolist()
                # positive inside, zero at the edge, falling off by one a pixel
                inside = torch.minimum(torch.minimum(xs - x0, x1 - xs), torch.minimum(ys - y0, y1 - ys))
                candidates.append(inside)
            masks.append(torch.stack(candidates))
        iou = torch.tensor([0.5, 0.9, 0.7])[: len(masks[0])].repeat(len(masks), 1)
        return Decoded(torch.stack(masks), iou)


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((40, 90), (1.0, 1.0)), ((90, 40), (1.0, 1.0)), ((60, 60), (3.0, 1.0)), ((300, 200), (0.5, 1.5))],
)
def test_a_box_comes_back_to_the_pixels_it_was_drawn_around(
    shape: tuple[int, int], spacing: tuple[float, float]
) -> None:
    coarse = np.zeros(shape, dtype=bool)
    coarse[shape[0] // 4 : shape[0] // 2, shape[1] // 3 : shape[1] // 2 + 3] = True
    coarse[-shape[0] // 5 :, -shape[1] // 6 :] = True
    prompts = visual_prompts(coarse, coarse.astype(np.float32), "boxes")
    frame = Frame.fit(shape, spacing, 256)
    found = refine_slice(BoxDrawer(), torch.zeros(1, 1, 64, 64), frame, prompts)
    # where the frame is coarser than the slice, an edge may move by part of a frame pixel
    slack = int(np.ceil(max(1 / frame.scale[0], 1 / frame.scale[1]))) if min(frame.scale) < 1 else 0
    wrong = np.argwhere(found.mask != coarse)
    if slack == 0:
        assert not len(wrong)
    else:
        from scipy.ndimage import binary_dilation, binary_erosion

        border = binary_dilation(coarse, iterations=slack) & ~binary_erosion(coarse, iterations=slack)
        assert border[tuple(wrong.T)].all()


def test_boxes_and_points_reach_the_decoder_in_frame_pixels() -> None:
    """A slice of 20 x 50 pixels of 2 x 1 mm fills 205 rows and all columns of the frame: 10.24 and 5.12 a pixel."""
    frame = Frame.fit((20, 50), (2.0, 1.0), 256)
    assert frame.valid == (205, 256)
    prompts = [
        VisualPrompt((-0.5, -0.5, 9.5, 4.5), np.array([[0.0, 0.0], [49.0, 19.0]]), np.array([1, 0])),
        VisualPrompt((39.5, 15.5, 49.5, 19.5), np.array([[24.5, 9.5]]), np.array([1])),
    ]
    drawer = BoxDrawer()
    refine_slice(drawer, torch.zeros(1, 1, 64, 64), frame, prompts)
    asked = drawer.asked[0]
    rows, columns = 205 / 20, 256 / 50
    expected = [[-0.5, -0.5, 10 * columns - 0.5, 5 * rows - 0.5], [40 * columns - 0.5, 16 * rows - 0.5, 255.5, 204.5]]
    torch.testing.assert_close(asked["boxes"], torch.tensor(expected))
    assert asked["point_labels"].tolist() == [[1, 0], [1, -1]]
    torch.testing.assert_close(
        asked["point_coords"][0],
        torch.tensor([[columns / 2 - 0.5, rows / 2 - 0.5], [255.5 - columns / 2, 204.5 - rows / 2]]),
    )
    torch.testing.assert_close(asked["point_coords"][1, 0], torch.tensor([127.5, 102.0]))


def test_points_alone_are_no_boxes() -> None:
    class PointTaker(BoxDrawer):
        def decode(self, embedding: Tensor, **given) -> Decoded:
            self.asked.append(given)
            return Decoded(torch.ones(1, 1, 256, 256), torch.ones(1, 1))

    taker = PointTaker()
    prompt = VisualPrompt(None, np.array([[3.0, 4.0]]), np.array([1]))
    refine_slice(taker, torch.zeros(1, 1, 64, 64), Frame.fit((10, 10), (1, 1), 256), [prompt])
    assert set(taker.asked[0]) == {"point_coords", "point_labels", "multimask"}


def test_no_prompts_ask_nothing_and_find_nothing() -> None:
    drawer = BoxDrawer()
    found = refine_slice(drawer, torch.zeros(1, 1, 64, 64), Frame.fit((7, 9), (1, 1), 256), [])
    assert drawer.asked == []
    assert found.mask.shape == (7, 9)
    assert not found.mask.any()


@pytest.mark.parametrize(("vote", "candidates", "wider"), [("single", 1, 0), ("best", 3, 1), ("mean", 3, 1)])
def test_the_vote_decides_how_many_candidates_are_asked_for(vote: str, candidates: int, wider: int) -> None:
    drawer = BoxDrawer()
    prompt = VisualPrompt((49.4, 59.4, 100.6, 90.6), NO_POINTS, np.zeros(0, dtype=np.int64))
    found = refine_slice(drawer, torch.zeros(1, 1, 64, 64), Frame.fit((256, 256), (1, 1), 256), [prompt], vote=vote)
    assert drawer.asked[0]["multimask"] == (candidates == 3)
    expected = np.zeros((256, 256), dtype=bool)
    expected[60 - wider : 91 + wider, 50 - wider : 101 + wider] = True
    assert np.array_equal(found.mask, expected)
    assert found.iou == pytest.approx(0.9 if candidates == 3 else 0.5)


def random_votes(seed: int) -> Tensor:
    """Logits of three raters of different skill on one disc of 48 x 48 pixels."""
    rng = np.random.default_rng(seed)
    ys, xs = np.mgrid[:48, :48]
    truth = (ys - 24) ** 2 + (xs - 22) ** 2 < 11**2
    masks = [truth ^ (rng.random(truth.shape) < wrong) for wrong in rng.permutation([0.02, 0.1, 0.25])]
    return torch.tensor(np.stack(masks)).float() * 8 - 4


@pytest.mark.parametrize("seed", range(4))
def test_staple_is_the_one_of_simpleitk(seed: int) -> None:
    logits = random_votes(seed)
    staple = sitk.STAPLEImageFilter()
    staple.SetForegroundValue(1)
    staple.SetMaximumIterations(200)
    images = [sitk.GetImageFromArray((mask > 0).numpy().astype(np.uint8)) for mask in logits]
    expected = sitk.GetArrayFromImage(staple.Execute(images)) > 0.5
    found = one_of(logits, torch.ones(3), "staple").numpy()
    assert np.array_equal(found, expected)
    majority = ((logits > 0).sum(0) >= 2).numpy()
    assert (found != majority).any()


def test_staple_of_agreeing_candidates_is_what_they_agree_on() -> None:
    for mask in (torch.zeros(5, 5), torch.ones(5, 5), torch.eye(5)):
        found = one_of((mask * 2 - 1).expand(3, 5, 5), torch.ones(3), "staple")
        assert torch.equal(found, mask.bool())


def test_mrm_weighs_each_candidate_by_its_own_estimate() -> None:
    logits = torch.tensor([[[1.0, 1.0, -1.0, -1.0]], [[1.0, -1.0, 1.0, -1.0]], [[1.0, -1.0, 1.0, -1.0]]])
    assert one_of(logits, torch.tensor([0.9, 0.3, 0.3]), "mrm").tolist() == [[True, True, False, False]]
    assert one_of(logits, torch.tensor([0.5, 0.3, 0.3]), "mrm").tolist() == [[True, False, True, False]]


def test_mean_adds_logits_and_best_takes_the_highest_estimate() -> None:
    logits = torch.tensor([[[5.0, -1.0]], [[-2.0, -1.0]], [[-2.0, 3.0]]])
    assert one_of(logits, torch.tensor([0.1, 0.8, 0.2]), "mean").tolist() == [[True, True]]
    assert one_of(logits, torch.tensor([0.1, 0.8, 0.2]), "best").tolist() == [[False, False]]
    assert one_of(logits[:1], torch.tensor([0.1]), "staple").tolist() == [[True, False]]
