"""Slices and frames against coordinates worked out from the affine, over every orientation."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.transform import Rotation

from FreqSegLib.errors import InputError, SettingsError
from FreqSegLib.slices import Frame, SliceStack, evened
from FreqSegLib.volume import Volume

SIGNED_PERMUTATIONS = [
    np.eye(3)[list(order)] * np.array(signs) for order in permutations(range(3)) for signs in product((1, -1), repeat=3)
]


def affine(direction: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = direction * np.array(spacing)
    matrix[:3, 3] = (12.5, -40.0, 7.25)
    return matrix


def positions(volume: Volume) -> np.ndarray:
    """(k, j, i, 3) LPS of every voxel."""
    k, j, i = np.indices(volume.shape)
    return np.stack([i, j, k, np.ones_like(i)], axis=-1) @ volume.affine[:3].T


@st.composite
def volumes(draw: st.DrawFn) -> Volume:
    turn = Rotation.from_euler("xyz", [draw(st.floats(-40, 40)) for _ in range(3)], degrees=True).as_matrix()
    direction = turn @ draw(st.sampled_from(SIGNED_PERMUTATIONS))
    matrix = affine(direction, tuple(draw(st.floats(0.2, 8)) for _ in range(3)))
    if draw(st.booleans()):
        matrix[:3, 2] += 0.3 * matrix[:3, 1]
    shape = tuple(draw(st.integers(1, 6)) for _ in range(3))
    return Volume(np.arange(np.prod(shape), dtype=np.int32).reshape(shape), matrix)


@given(volumes(), st.sampled_from(["auto", "axial", "coronal", "sagittal"]))
@settings(max_examples=150, deadline=None)
def test_putting_back_every_slice_gives_the_volume(volume: Volume, axis: str) -> None:
    stack = SliceStack.of(volume, axis)
    target = stack.empty(np.float32)
    for index in range(stack.count):
        taken = stack.take(index)
        assert taken.shape == stack.slice_shape
        assert np.shares_memory(taken, volume.array)
        stack.put(target, index, taken)
    assert target.shape == volume.array.shape
    np.testing.assert_array_equal(target, volume.array)


@given(volumes(), st.sampled_from(["axial", "coronal", "sagittal"]))
@settings(max_examples=80, deadline=None)
def test_spacing_of_a_stack_is_the_distance_of_its_voxels(volume: Volume, axis: str) -> None:
    stack = SliceStack.of(volume, axis)
    place = positions(volume)
    shown = np.stack([stack.displayed(place[..., axis]) for axis in range(3)], axis=-1)
    for dimension, spacing in enumerate((stack.slice_spacing, *stack.pixel_spacing)):
        steps = np.linalg.norm(np.diff(shown, axis=dimension), axis=-1)
        np.testing.assert_allclose(steps, spacing, rtol=1e-6)


@pytest.mark.parametrize("direction", SIGNED_PERMUTATIONS, ids=lambda d: "".join("LPS"[r.argmax()] for r in abs(d.T)))
@pytest.mark.parametrize("tilt", [0.0, 25.0])
def test_planes_are_shown_as_radiologists_see_them(direction: np.ndarray, tilt: float) -> None:
    """Down the rows and along the columns, anatomy runs the way the plane's convention says."""
    turned = Rotation.from_euler("zyx", [tilt, -tilt / 2, tilt / 3], degrees=True).as_matrix() @ direction
    volume = Volume(np.zeros((3, 4, 5)), affine(turned, (1.0, 1.5, 1.2)))
    left, posterior, superior = np.moveaxis(positions(volume), -1, 0)
    # (along slices, down rows, along columns): the coordinate, and whether it must grow.
    expected = {
        "axial": [(superior, True), (posterior, True), (left, True)],
        "coronal": [(posterior, True), (superior, False), (left, True)],
        "sagittal": [(left, True), (superior, False), (posterior, True)],
    }
    for axis, rules in expected.items():
        stack = SliceStack.of(volume, axis)
        for dimension, (coordinate, grows) in enumerate(rules):
            steps = np.diff(stack.displayed(coordinate), axis=dimension)
            assert ((steps > 0) == grows).all(), f"{axis} dimension {dimension}"


@pytest.mark.parametrize(
    ("spacing", "shape", "expected"),
    [
        ((1.0, 1.0, 1.0), (4, 5, 6), "axial"),
        ((0.8, 0.8, 6.5), (4, 5, 6), "axial"),
        ((1.0, 1.0, 1.9), (4, 5, 6), "axial"),
        ((5.0, 1.0, 1.0), (4, 5, 6), "sagittal"),
        ((1.0, 5.0, 1.0), (4, 5, 6), "coronal"),
        ((1.0, 1.0, 5.0), (4, 1, 6), "coronal"),
        ((1.0, 1.0, 5.0), (4, 1, 1), "axial"),
        ((1.0, 1.0, 1.0), (1, 1, 1), "axial"),
    ],
)
def test_auto_takes_axial_or_the_thick_or_the_single_axis(
    spacing: tuple[float, float, float], shape: tuple[int, int, int], expected: str
) -> None:
    assert SliceStack.of(Volume(np.zeros(shape), affine(np.eye(3), spacing))).axis == expected


def test_auto_follows_the_thick_axis_wherever_it_is_stored() -> None:
    """A coronal acquisition: the k axis is thick and runs front to back."""
    direction = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    stack = SliceStack.of(Volume(np.zeros((7, 8, 9)), affine(direction, (0.5, 0.5, 4.0))))
    assert (stack.axis, stack.count, stack.slice_shape) == ("coronal", 7, (8, 9))
    assert stack.pixel_spacing == (0.5, 0.5)


def test_a_picture_is_one_slice_as_stored() -> None:
    picture = Volume(np.arange(12).reshape(1, 3, 4), np.diag([-1.0, 1, 1, 1]), spatial_dimension=2)
    stack = SliceStack.of(picture, "sagittal")
    assert (stack.axis, stack.count) == ("image", 1)
    np.testing.assert_array_equal(stack.take(0), picture.array[0])


@given(st.integers(2, 9), st.floats(0.3, 6), st.floats(0.3, 4), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_evening_out_is_a_gaussian_mean_over_slices_by_their_distance(
    count: int, spacing: float, millimetres: float, seed: int
) -> None:
    matrix = np.diag([spacing / 3, spacing / 3, spacing, 1.0])
    stack = SliceStack.of(Volume(np.zeros((count, 4, 3), dtype=np.float32), matrix))
    maps = np.random.default_rng(seed).random((count, 2, 3, 2)).astype(np.float32)
    found = evened(maps, stack, millimetres)
    # in slices, as it is rounded to a whole number of them: three deviations
    deviation = millimetres / spacing
    reach = int(3.0 * deviation + 0.5)
    steps = np.arange(-reach, reach + 1)
    weights = np.exp(-((steps * spacing) ** 2) / (2 * millimetres**2))
    for index in range(count):
        seen = maps[np.clip(index + steps, 0, count - 1)]
        expected = (weights[:, None, None, None] * seen).sum(0) / weights.sum()
        np.testing.assert_allclose(found[index], expected, rtol=0, atol=1e-6)
    assert evened(maps, stack, 0) is maps


def test_a_picture_has_no_neighbours_to_be_evened_out_with() -> None:
    maps = np.ones((1, 4, 4), dtype=np.float32)
    assert evened(maps, SliceStack.of(Volume(np.zeros((1, 4, 4), dtype=np.uint8), np.eye(4))), 5.0) is maps


def test_wrong_axis_index_or_shape_is_refused_with_its_value() -> None:
    volume = Volume(np.zeros((3, 4, 5)), np.eye(4))
    with pytest.raises(SettingsError, match="oblique"):
        SliceStack.of(volume, "oblique")
    stack = SliceStack.of(volume)
    with pytest.raises(IndexError, match="0 to 2, got 3"):
        stack.take(3)
    with pytest.raises(IndexError, match="got -1"):
        stack.take(-1)
    with pytest.raises(InputError, match=r"\(5, 4\)"):
        stack.put(stack.empty(np.uint8), 0, np.zeros((5, 4)))
    with pytest.raises(InputError, match=r"\(4, 4, 5\)"):
        stack.put(np.zeros((4, 4, 5)), 0, np.zeros((4, 5)))


# ---- frames

frames = st.builds(
    Frame.fit,
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)),
    st.sampled_from([64, 224, 256]),
    st.sampled_from(["pad", "stretch"]),
)


@given(frames, st.lists(st.tuples(st.floats(-5, 305), st.floats(-5, 305)), min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_points_come_back_to_where_they_were(frame: Frame, points: list[tuple[float, float]]) -> None:
    xy = np.array(points)
    np.testing.assert_allclose(frame.points_from_frame(frame.points_to_frame(xy)), xy, atol=1e-4)
    tensor = torch.tensor(points, dtype=torch.float64)
    back = frame.points_from_frame(frame.points_to_frame(tensor))
    assert isinstance(back, torch.Tensor)
    np.testing.assert_allclose(back.numpy(), xy, atol=1e-4)


@given(st.tuples(st.integers(2, 120), st.integers(2, 120)), st.floats(0.3, 3), st.sampled_from([32, 64, 100]))
@settings(max_examples=80, deadline=None)
def test_an_image_of_its_own_coordinates_says_where_points_go(shape: tuple[int, int], aspect: float, size: int) -> None:
    """Each frame pixel of a ramp holds the slice coordinate that points_from_frame gives for it, and back."""
    frame = Frame.fit(shape, (aspect, 1.0), size)
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij")
    placed = frame.to_frame(torch.stack([columns, rows])[None])[0]
    y, x = np.indices(frame.valid)
    truth = frame.points_from_frame(np.stack([x, y], axis=-1).astype(float))
    # The ramp is flat beyond the outermost pixel centres, and antialiasing reaches one shrunken pixel further in.
    inside = np.ones(frame.valid, bool)
    for axis, (length, scale) in enumerate(zip(shape[::-1], frame.scale[::-1], strict=True)):
        margin = max(0.0, 1 / scale - 0.5) if scale < 1 else 0.0
        inside &= (truth[..., axis] >= margin) & (truth[..., axis] <= length - 1 - margin)
    found = placed[:, : frame.valid[0], : frame.valid[1]].permute(1, 2, 0).numpy()
    # The antialiasing triangle, sampled at whole pixels, follows a ramp only to a few hundredths of a pixel.
    np.testing.assert_allclose(found[inside], truth[inside], atol=1e-6 if min(frame.scale) >= 1 else 0.1)


@given(st.tuples(st.integers(2, 90), st.integers(2, 90)), st.floats(0.3, 3), st.sampled_from([16, 64, 100]))
@settings(max_examples=80, deadline=None)
def test_a_map_of_any_scale_is_sampled_at_the_pixel_centres(shape: tuple[int, int], aspect: float, side: int) -> None:
    """A map holding frame coordinates, at any resolution, comes back as points_to_frame of each slice pixel."""
    frame = Frame.fit(shape, (1.0, aspect), 256)
    centres = (torch.arange(side, dtype=torch.float64) + 0.5) * (256 / side) - 0.5
    rows, columns = torch.meshgrid(centres, centres, indexing="ij")
    found = frame.from_frame(torch.stack([columns, rows])[None])[0].permute(1, 2, 0).numpy()
    y, x = np.indices(shape)
    truth = frame.points_to_frame(np.stack([x, y], axis=-1).astype(float))
    last = [centres[max(0, int(np.floor(n * side / 256 - 0.5)))].item() for n in frame.valid[::-1]]
    np.testing.assert_allclose(found, np.clip(truth, centres[0].item(), last), atol=1e-6)


@given(frames.filter(lambda frame: frame.size == 64), st.floats(-3, 3))
@settings(max_examples=25, deadline=None)
def test_a_constant_stays_constant_and_padding_is_zero(frame: Frame, value: float) -> None:
    placed = frame.to_frame(torch.full((1, 2, *frame.slice_shape), value, dtype=torch.float64))
    assert placed.shape == (1, 2, frame.size, frame.size)
    rows, columns = frame.valid
    torch.testing.assert_close(placed[..., :rows, :columns], torch.full((1, 2, rows, columns), value).double())
    assert placed[..., rows:, :].abs().sum() == 0
    assert placed[..., columns:].abs().sum() == 0


@pytest.mark.parametrize("side", [16, 64, 256, 300])
def test_padding_never_leaks_into_the_slice(side: int) -> None:
    frame = Frame.fit((200, 90), (1.0, 1.3), 256)
    maps = torch.full((1, 1, side, side), 1e6)
    cells = [n * side / 256 for n in frame.valid]
    maps[..., : round(cells[0]), : round(cells[1])] = 0.25
    back = frame.from_frame(maps)
    assert back.shape == (1, 1, 200, 90)
    torch.testing.assert_close(back, torch.full_like(back, 0.25))


@pytest.mark.parametrize("size", [256, 1024])
@pytest.mark.parametrize("shape", [(256, 256), (100, 173), (240, 31)])
def test_from_frame_equals_cropping_and_interpolating(size: int, shape: tuple[int, int]) -> None:
    frame = Frame.fit(shape, (1.0, 1.0), size)
    maps = torch.rand(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cropped = maps[..., : frame.valid[0], : frame.valid[1]]
    expected = F.interpolate(cropped, size=shape, mode="bilinear", align_corners=False)
    torch.testing.assert_close(frame.from_frame(maps), expected, rtol=1e-9, atol=1e-9)


@given(
    arrays(bool, st.tuples(st.integers(1, 30), st.integers(1, 30))),
    st.floats(0.5, 2),
    st.floats(1.0, 4.0),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_a_mask_lands_where_it_came_from(coarse: np.ndarray, aspect: float, enlarge: float, stretch: bool) -> None:
    """Any mask whose parts are at least two pixels wide, in any frame that does not shrink it."""
    mask = np.kron(coarse, np.ones((2, 2), bool))
    size = int(np.ceil(enlarge * max(mask.shape)))
    frame = Frame.fit(mask.shape, (aspect, 1.0), size, "stretch" if stretch else "pad")
    assume(min(frame.scale) >= 1)
    tensor = torch.from_numpy(mask).double()[None, None]
    assert torch.equal(frame.from_frame(frame.to_frame(tensor)) > 0.5, tensor.bool())


@given(arrays(bool, st.tuples(st.integers(1, 24), st.integers(1, 24))), st.floats(1.75, 6), st.floats(1, 1.9))
@settings(max_examples=150, deadline=None)
def test_any_mask_survives_a_frame_that_is_clearly_larger(mask: np.ndarray, enlarge: float, aspect: float) -> None:
    frame = Frame.fit(mask.shape, (aspect, 1.0), int(np.ceil(enlarge * 2 * max(mask.shape))))
    assume(min(frame.scale) >= 1.75)
    tensor = torch.from_numpy(mask).double()[None, None]
    assert torch.equal(frame.from_frame(frame.to_frame(tensor)) > 0.5, tensor.bool())


def test_labels_stay_labels_with_nearest() -> None:
    labels = torch.randint(0, 9, (1, 1, 37, 52), generator=torch.Generator().manual_seed(1)).float()
    frame = Frame.fit((37, 52), (1.3, 1.0), 256)
    placed = frame.to_frame(labels, order="nearest")
    assert set(placed.unique().tolist()) <= set(labels.unique().tolist()) | {0.0}
    torch.testing.assert_close(frame.from_frame(placed, order="nearest"), labels)


def test_shrinking_is_antialiased() -> None:
    """One-pixel stripes average out; sampling them would keep stripes."""
    stripes = (torch.arange(512) % 2).float().expand(1, 1, 512, 512)
    inner = Frame.fit((512, 512), (1.0, 1.0), 128).to_frame(stripes)[..., 4:-4, 4:-4]
    torch.testing.assert_close(inner, torch.full_like(inner, 0.5), atol=1e-4, rtol=0)


def test_the_frame_keeps_the_physical_aspect() -> None:
    assert Frame.fit((256, 256), (2.0, 1.0), 256).valid == (256, 128)
    assert Frame.fit((100, 400), (1.0, 1.0), 1024).valid == (256, 1024)
    assert Frame.fit((5, 4000), (0.01, 1.0), 256).valid == (1, 256)
    assert Frame.fit((100, 400), (1.0, 1.0), 1024, "stretch").valid == (1024, 1024)


def test_gradients_pass_through_the_frame_and_back() -> None:
    frame = Frame.fit((5, 7), (1.0, 1.4), 16)
    image = torch.rand(1, 1, 5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: frame.from_frame(frame.to_frame(x)), (image,))


@pytest.mark.parametrize(
    ("shape", "spacing", "size", "mode", "message"),
    [
        ((10, 10), (0.0, 1.0), 64, "pad", "spacing must be > 0"),
        ((10, 10), (float("nan"), 1.0), 64, "pad", "spacing must be > 0"),
        ((0, 10), (1.0, 1.0), 64, "pad", "at least 1 pixel"),
        ((10, 10), (1.0, 1.0), 64, "crop", "crop"),
    ],
)
def test_a_frame_that_cannot_be_is_refused(
    shape: tuple[int, int], spacing: tuple[float, float], size: int, mode: str, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        Frame.fit(shape, spacing, size, mode)  # type: ignore[arg-type]


def test_images_of_another_shape_are_refused() -> None:
    frame = Frame.fit((10, 12), (1.0, 1.0), 64)
    with pytest.raises(InputError, match=r"\(12, 10\)"):
        frame.to_frame(torch.zeros(1, 1, 12, 10))
    with pytest.raises(InputError, match=r"\(64, 32\)"):
        frame.from_frame(torch.zeros(1, 1, 64, 32))
