"""Views are rendered for real: what is segmented is coloured, where it is and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from stand_in import Application


@pytest.fixture
def scene_with_ball(app: Application) -> tuple[Any, Any]:
    """An oblique, anisotropic grey volume and a red ball (radius 10 mm) segmented off its centre."""
    import slicer

    spacing = np.array([1.0, 1.2, 2.0])
    k, j, i = np.mgrid[:30, :50, :60]
    distance = np.sqrt(((i - 40) * spacing[0]) ** 2 + ((j - 25) * spacing[1]) ** 2 + ((k - 15) * spacing[2]) ** 2)
    turn = np.deg2rad(15)
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    matrix = np.eye(4)
    matrix[:3, :3] = rotation * spacing * [-1, -1, 1]
    matrix[:3, 3] = [12, -30, 4]
    voxels = (100 + i).astype(np.float32)
    volume = slicer.util.addVolumeFromArray(voxels, ijkToRAS=matrix, name="Grey")
    segmentation = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Result")
    segmentation.CreateDefaultDisplayNodes()
    segmentation.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    segment_id = segmentation.GetSegmentation().AddEmptySegment("ball", "ball", (1.0, 0.0, 0.0))
    slicer.util.updateSegmentBinaryLabelmapFromArray((distance < 10).astype(np.uint8), segmentation, segment_id, volume)
    slicer.util.setSliceViewerLayers(background=volume, fit=True)
    return volume, segmentation


@pytest.mark.parametrize("view", ["Red", "Green", "Yellow"])
def test_the_segment_is_coloured_where_its_mask_is(
    app: Application, scene_with_ball: tuple[Any, Any], tmp_path: Path, view: str
) -> None:
    import slicer

    volume, segmentation = scene_with_ball
    center = segmentation.GetSegmentCenterRAS("ball")
    widget = slicer.app.layoutManager().sliceWidget(view)
    widget.sliceView().resize(300, 260)
    widget.fitSliceToBackground()
    widget.mrmlSliceNode().JumpSliceByOffsetting(*center)
    image = app.grab_slice(tmp_path / "slice.png", view=view, size=(300, 260)).astype(int)

    expected = mask_of_picture(widget.mrmlSliceNode(), volume, center, image.shape[:2])
    red = image[..., 0] - image[..., 2] > 40
    grey = np.ptp(image, axis=-1) == 0
    assert expected[0].sum() > 500
    assert red[expected[0]].all()
    assert grey[expected[1]].all()
    assert image[expected[1]].max() > 50  # the volume is there, not only black
    assert (tmp_path / "slice.png").stat().st_size > 1000


def mask_of_picture(slice_node: Any, volume: Any, center: Any, shape: tuple[int, int]) -> tuple[Any, Any]:
    """Pixels surely inside and surely outside the ball, from the slice node's own geometry."""
    import slicer

    rows, columns = np.mgrid[: shape[0], : shape[1]]
    to_ras = slicer.util.arrayFromVTKMatrix(slice_node.GetXYToRAS())
    pixels = np.stack([columns, shape[0] - 1 - rows, np.zeros(shape), np.ones(shape)])
    ras = np.einsum("ab,bij->aij", to_ras, pixels)[:3]
    distance = np.linalg.norm(ras - np.asarray(center)[:, None, None], axis=0)
    return distance < 7.5, distance > 12.5


def test_a_hidden_segmentation_is_not_drawn(app: Application, scene_with_ball: tuple[Any, Any], tmp_path: Path) -> None:
    import slicer

    _, segmentation = scene_with_ball
    slicer.app.layoutManager().sliceWidget("Red").mrmlSliceNode().JumpSliceByOffsetting(
        *segmentation.GetSegmentCenterRAS("ball")
    )
    assert np.ptp(app.grab_slice(tmp_path / "with.png").astype(int), axis=-1).max() > 40
    segmentation.GetDisplayNode().SetVisibility(False)
    assert np.ptp(app.grab_slice(tmp_path / "without.png").astype(int), axis=-1).max() == 0


def test_the_whole_window_has_the_panel_on_the_left_and_the_views_on_the_right(
    app: Application, scene_with_ball: tuple[Any, Any], tmp_path: Path
) -> None:
    from PySide6.QtGui import QColor, QImage

    volume, segmentation = scene_with_ball
    segmentation.CreateClosedSurfaceRepresentation()
    app.load_module(Path(__file__).resolve().parent / "example_module" / "Brighten.py")
    center = segmentation.GetSegmentCenterRAS("ball")
    app.grab_window(tmp_path / "window.png", volume=volume, size=(1000, 700), center=center, panel_width=400)
    picture = QImage(str(tmp_path / "window.png"))
    assert (picture.width(), picture.height()) == (1000, 700)
    colors = [[QColor(picture.pixel(x, y)).getRgb()[:3] for x in range(0, 1000, 4)] for y in range(0, 700, 4)]
    pixels = np.array(colors).astype(int)
    panel, views = pixels[:, :95], pixels[:, 105:]
    reddish = (views[..., 0] - views[..., 1] > 40) & (views[..., 0] - views[..., 2] > 40)
    assert panel.mean() > 180  # light widgets
    assert reddish.sum() > 300  # the ball in four views, and the bar of the red one
    assert (views.sum(axis=-1) == 0).mean() > 0.05  # black around the slices
