"""The panel, driven with clicks on real MRML nodes; a light client stands for the worker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


def make_volume(name="FLAIR", shape=(6, 12, 10), matrix=None, node_class="vtkMRMLScalarVolumeNode"):
    """A volume with a bright box of 2 x 3 x 4 voxels (k, j, i) in it."""
    import slicer

    array = np.full(shape, 10, dtype=np.int16)
    array[2:4, 3:6, 4:8] = 200
    node = slicer.util.addVolumeFromArray(array, name=name, nodeClassName=node_class)
    if matrix is not None:
        node.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(np.asarray(matrix, dtype=float)))
    return node


def bright(volume) -> np.ndarray:
    import slicer

    return slicer.util.arrayFromVolume(volume) > 100


def mask_of(segmentation, segment_id, volume) -> np.ndarray:
    import slicer

    return slicer.util.arrayFromSegmentBinaryLabelmap(segmentation, segment_id, volume) > 0


def names(segmentation) -> list[str]:
    part = segmentation.GetSegmentation()
    return [part.GetNthSegment(index).GetName() for index in range(part.GetNumberOfSegments())]


def tag(segment, name: str) -> str:
    import vtk

    value = vtk.reference("")
    segment.GetTag(name, value)
    return str(value)


def type_prompt(panel, text: str, row: int = 0) -> None:
    panel.ui.promptsTable.cellWidget(row, 0).setEditText(text)


def apply(app, panel, prompt: str | None = "brain tumour") -> None:
    if prompt is not None:
        type_prompt(panel, prompt)
    assert panel.ui.applyButton.enabled, panel.ui.applyButton.toolTip
    panel.ui.applyButton.click()
    app.wait_until(lambda: not panel.busy)


def status(panel) -> str:
    return panel.ui.statusLabel.text


def test_the_panel_opens_without_a_worker(app, open_panel, fake) -> None:
    panel = open_panel()
    assert not panel.session.started
    assert fake.requests == []
    assert not panel.ui.applyButton.enabled
    assert "Choose a volume" in panel.ui.applyButton.toolTip
    assert "diagnosis" in panel.ui.researchLabel.text


def test_apply_puts_a_named_coded_segment_in_its_place(app, open_panel) -> None:
    volume = make_volume()
    panel = open_panel()
    apply(app, panel)
    node = panel.segmentation
    assert names(node) == ["brain tumour"]
    segment = node.GetSegmentation().GetNthSegment(0)
    assert np.array_equal(mask_of(node, node.GetSegmentation().GetNthSegmentID(0), volume), bright(volume))
    assert "49755003^Morphologically Altered Structure~SCT^4147007^Mass" in tag(segment, "TerminologyEntry")
    assert "12738006^Brain" in tag(segment, "TerminologyEntry")
    assert np.allclose(segment.GetColor(), np.array([144, 238, 144]) / 255)
    assert node.GetNodeReference(node.GetReferenceImageGeometryReferenceRole()) is volume
    assert status(panel) == "brain tumour: 24 voxels."
    assert app.messages.texts() == []


def test_the_segmentation_lies_beside_its_volume_in_the_study(app, open_panel) -> None:
    import slicer

    volume = make_volume()
    tree = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    study = tree.CreateStudyItem(tree.GetSceneItemID(), "Study")
    tree.CreateItem(study, volume)
    panel = open_panel()
    apply(app, panel)
    assert tree.GetItemParent(tree.GetItemByDataNode(panel.segmentation)) == study


def center_of(segmentation, segment_id) -> np.ndarray:
    """World position of the middle of a segment's box, through the segmentation's transform."""
    import slicer
    import vtk

    image = segmentation.GetSegmentation().GetSegment(segment_id).GetRepresentation("Binary labelmap")
    extent = image.GetExtent()
    matrix = vtk.vtkMatrix4x4()
    image.GetImageToWorldMatrix(matrix)
    local = matrix.MultiplyPoint([*((extent[axis] + extent[axis + 1]) / 2 for axis in (0, 2, 4)), 1.0])[:3]
    to_world = vtk.vtkGeneralTransform()
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(segmentation.GetParentTransformNode(), None, to_world)
    return np.array(to_world.TransformPoint(local))


def rotation(degrees: float) -> np.ndarray:
    angle = np.radians(degrees)
    x = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    z = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    return x @ z


def placed(directions: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = directions * np.array(spacing)
    matrix[:3, 3] = (-31.0, 12.5, 47.25)
    return matrix


GEOMETRIES = {
    "LPS": placed(np.diag([-1.0, -1.0, 1.0]), (1, 1, 1)),
    "anisotropic": placed(np.diag([-1.0, -1.0, 1.0]), (0.7, 0.9, 6.5)),
    "flipped": placed(np.diag([1.0, -1.0, -1.0]), (1, 2, 3)),
    "left-handed": placed(np.diag([-1.0, -1.0, -1.0]), (1, 1, 2)),
    "sagittal": placed(np.array([[0.0, 0, -1], [-1, 0, 0], [0, -1, 0]]), (1, 1, 1.3)),
    "oblique": placed(rotation(25) @ np.diag([-1.0, -1.0, 1.0]), (0.8, 1.1, 3)),
}


@pytest.mark.parametrize("matrix", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_every_geometry_comes_back_voxel_for_voxel(app, open_panel, fake, matrix) -> None:
    import slicer

    volume = make_volume(matrix=matrix)
    panel = open_panel()
    apply(app, panel)
    segment_id = panel.segmentation.GetSegmentation().GetNthSegmentID(0)
    assert np.array_equal(mask_of(panel.segmentation, segment_id, volume), bright(volume))
    expected = matrix @ [5.5, 4.0, 2.5, 1.0]
    assert np.allclose(center_of(panel.segmentation, segment_id), expected[:3], atol=1e-4)
    sent = np.array(fake.last("set_volume")["volume"]["affine"])
    assert np.allclose(sent, np.diag([-1, -1, 1, 1]) @ matrix)
    assert slicer.util.arrayFromVolume(volume).dtype == np.int16


def test_a_parent_transform_moves_volume_and_result_alike(app, open_panel) -> None:
    import slicer

    volume = make_volume(matrix=GEOMETRIES["oblique"])
    transform = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode")
    turned = np.eye(4)
    turned[:3, :3] = rotation(70)
    turned[:3, 3] = (5, -8, 13)
    transform.SetMatrixTransformToParent(slicer.util.vtkMatrixFromArray(turned))
    volume.SetAndObserveTransformNodeID(transform.GetID())
    panel = open_panel()
    apply(app, panel)
    node = panel.segmentation
    assert node.GetTransformNodeID() == transform.GetID()
    expected = turned @ GEOMETRIES["oblique"] @ [5.5, 4.0, 2.5, 1.0]
    assert np.allclose(center_of(node, node.GetSegmentation().GetNthSegmentID(0)), expected[:3], atol=1e-4)


def test_a_segmentation_elsewhere_gets_the_result_where_the_volume_is(app, open_panel) -> None:
    """The volume lies under a transform, the existing segmentation does not."""
    import slicer

    volume = make_volume()
    transform = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode")
    moved = np.eye(4)
    moved[:3, 3] = (4.0, 3.0, -2.0)
    transform.SetMatrixTransformToParent(slicer.util.vtkMatrixFromArray(moved))
    panel = open_panel()
    apply(app, panel)
    node = panel.segmentation
    volume.SetAndObserveTransformNodeID(transform.GetID())
    apply(app, panel, "glioma")
    ids = node.GetSegmentation().GetSegmentIDs()
    first, second = (center_of(node, segment_id) for segment_id in ids)
    assert np.allclose(second - first, moved[:3, 3], atol=1e-6)


def test_other_segments_stay_and_one_click_takes_the_result_back(app, open_panel) -> None:
    volume = make_volume()
    panel = open_panel()
    apply(app, panel)
    node = panel.segmentation
    first = node.GetSegmentation().GetNthSegmentID(0)
    node.GetSegmentation().GetSegment(first).SetName("mine")
    before = mask_of(node, first, volume).copy()
    panel.ui.addPromptButton.click()
    type_prompt(panel, "hippocampus")
    type_prompt(panel, "lungs", row=1)
    apply(app, panel, None)
    assert names(node) == ["mine", "hippocampus", "lungs"]
    assert np.array_equal(mask_of(node, first, volume), before)
    panel.ui.undoButton.click()
    assert names(node) == ["mine"]
    assert np.array_equal(mask_of(node, first, volume), before)
    panel.ui.undoButton.click()
    assert names(node) == []
    assert not panel.ui.undoButton.enabled


def test_undo_never_loses_what_was_drawn_since(app, open_panel) -> None:
    import slicer

    volume = make_volume()
    panel = open_panel()
    apply(app, panel)
    node = panel.segmentation
    segment_id = node.GetSegmentation().GetNthSegmentID(0)
    drawn = np.ones((6, 12, 10), dtype=np.uint8)
    slicer.util.updateSegmentBinaryLabelmapFromArray(drawn, node, segment_id, volume)
    panel.ui.undoButton.click()
    assert mask_of(node, segment_id, volume).all()
    assert "edited since" in status(panel) or "edited since" in panel.ui.undoButton.toolTip


def test_the_same_prompt_again_makes_a_second_segment(app, open_panel) -> None:
    make_volume()
    panel = open_panel()
    apply(app, panel)
    apply(app, panel)
    assert names(panel.segmentation) == ["brain tumour", "brain tumour_1"]


def test_a_second_prompt_neither_sends_nor_reads_the_volume_again(app, open_panel, fake) -> None:
    make_volume()
    panel = open_panel()
    apply(app, panel)
    apply(app, panel, "glioma")
    assert fake.names() == ["set_volume", "segment", "segment"]


def test_changed_voxels_are_sent_again(app, open_panel, fake) -> None:
    import slicer

    volume = make_volume()
    panel = open_panel()
    apply(app, panel)
    slicer.util.arrayFromVolume(volume)[0, 0, 0] = 500
    slicer.util.arrayFromVolumeModified(volume)
    apply(app, panel, "glioma")
    assert fake.names().count("set_volume") == 2
    node = panel.segmentation
    assert mask_of(node, node.GetSegmentation().GetNthSegmentID(1), volume)[0, 0, 0]


def test_two_volumes_in_turn_keep_their_own_results(app, open_panel, fake) -> None:
    import slicer

    first, second = make_volume("first"), make_volume("second", matrix=GEOMETRIES["oblique"])
    slicer.util.arrayFromVolume(second)[:] = 10
    slicer.util.arrayFromVolume(second)[5, 11, 9] = 300
    panel = open_panel()
    panel.ui.inputVolumeSelector.setCurrentNode(first)
    apply(app, panel)
    mine = panel.segmentation
    panel.ui.inputVolumeSelector.setCurrentNode(second)
    assert panel.segmentation is None
    apply(app, panel, None)
    assert panel.segmentation is not mine
    assert mask_of(panel.segmentation, "brain tumour", second).sum() == 1
    panel.ui.inputVolumeSelector.setCurrentNode(first)
    assert panel.segmentation is mine
    assert np.array_equal(mask_of(mine, "brain tumour", first), bright(first))
    apply(app, panel, "glioma")
    assert fake.names().count("set_volume") == 2


def test_another_grid_is_said_and_the_result_moved_onto_it(app, open_panel) -> None:
    """A segmentation of a coarser volume of the same place."""
    coarse = make_volume("coarse", shape=(6, 12, 10), matrix=np.diag([-2.0, -2.0, 2.0, 1.0]))
    fine = make_volume("fine", shape=(12, 24, 20), matrix=np.diag([-1.0, -1.0, 1.0, 1.0]))
    panel = open_panel()
    panel.ui.inputVolumeSelector.setCurrentNode(coarse)
    apply(app, panel)
    node = panel.segmentation
    panel.ui.inputVolumeSelector.setCurrentNode(fine)
    panel.ui.segmentationSelector.setCurrentNode(node)
    app.process()
    assert "another grid" in status(panel)
    apply(app, panel, "glioma")
    assert "another grid" in status(panel)
    image = node.GetSegmentation().GetSegment("glioma").GetRepresentation("Binary labelmap")
    assert image.GetSpacing() == (2.0, 2.0, 2.0)
    expected = np.zeros((6, 12, 10), dtype=bool)
    for k, j, i in np.argwhere(np.ones_like(expected)):
        expected[k, j, i] = bright(fine)[2 * k, 2 * j, 2 * i]
    assert np.array_equal(mask_of(node, "glioma", coarse), expected)
    assert np.array_equal(mask_of(node, "brain tumour", coarse), bright(coarse))


def test_what_is_missing_is_said_where_apply_is(app, open_panel) -> None:
    import slicer

    volume = make_volume()
    panel = open_panel()
    assert "Type what to look for" in panel.ui.applyButton.toolTip
    type_prompt(panel, "   ")
    assert not panel.ui.applyButton.enabled
    type_prompt(panel, "Lungs")
    panel.ui.addPromptButton.click()
    type_prompt(panel, "lungs", row=1)
    assert "same thing" in panel.ui.applyButton.toolTip
    panel.ui.removePromptButton.click()
    assert panel.ui.applyButton.enabled
    region = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "far")
    region.SetCenter([900.0, 0, 0])
    region.SetSize([10, 10, 10])
    panel.ui.regionSelector.setCurrentNode(region)
    assert "outside 'FLAIR'" in panel.ui.applyButton.toolTip
    panel.ui.regionSelector.setCurrentNode(None)
    volume.SetAndObserveImageData(None)
    type_prompt(panel, "lungs")
    assert "holds no voxels" in panel.ui.applyButton.toolTip
    assert app.messages.texts() == []


def test_a_region_is_told_in_voxels_and_bounds_the_result(app, open_panel, fake) -> None:
    import slicer

    volume = make_volume(matrix=np.diag([-2.0, -1.0, 3.0, 1.0]))
    region = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "region")
    # voxel centres i 5..9 (x -10..-18), j 0..4 (y 0..-4), k 0..2 (z 0..6)
    region.SetCenter([-14.0, -2.0, 3.0])
    region.SetSize([8.2, 4.2, 6.2])
    panel = open_panel()
    panel.ui.regionSelector.setCurrentNode(region)
    apply(app, panel)
    assert fake.last("set_volume")["roi"] == ((5, 10), (0, 5), (0, 3))
    expected = bright(volume).copy()
    expected[3:], expected[:, 5:], expected[:, :, :5] = False, False, False
    assert np.array_equal(mask_of(panel.segmentation, "brain tumour", volume), expected)


def test_a_new_region_starts_as_the_whole_volume(app, open_panel) -> None:
    import slicer
    from FreqSegPanel import geometry

    volume = make_volume(matrix=GEOMETRIES["anisotropic"])
    panel = open_panel()
    region = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsROINode")
    panel._fit_region(region)
    assert geometry.roi_bounds(region, volume) == ((0, 10), (0, 12), (0, 6))


def test_cancel_leaves_the_scene_as_it_was(app, open_panel, fake) -> None:
    import slicer

    make_volume()
    fake.patience = 10**6
    panel = open_panel()
    type_prompt(panel, "lungs")
    panel.ui.applyButton.click()
    app.wait_until(lambda: "Reading slices" in status(panel))
    assert "about 12 s left" in status(panel)
    assert panel.ui.cancelButton.enabled
    assert not panel.ui.applyButton.enabled
    panel.ui.cancelButton.click()
    app.wait_until(lambda: not panel.busy, timeout=1)
    assert "cancelled" in status(panel).lower()
    assert slicer.util.getNodesByClass("vtkMRMLSegmentationNode") == []
    assert panel.ui.applyButton.enabled


def test_a_volume_removed_during_the_run_ends_it_with_a_sentence(app, open_panel, fake) -> None:
    import slicer

    volume = make_volume()
    fake.patience = 10**6
    panel = open_panel()
    type_prompt(panel, "lungs")
    panel.ui.applyButton.click()
    app.process(0.1)
    slicer.mrmlScene.RemoveNode(volume)
    app.wait_until(lambda: not panel.busy, timeout=1)
    assert "removed from the scene" in status(panel)
    assert slicer.util.getNodesByClass("vtkMRMLSegmentationNode") == []


def test_a_segmentation_removed_during_the_run_ends_it_with_a_sentence(app, open_panel, fake) -> None:
    import slicer

    make_volume()
    panel = open_panel()
    apply(app, panel)
    fake.patience = 10**6
    panel.ui.applyButton.click()
    app.process(0.1)
    slicer.mrmlScene.RemoveNode(panel.segmentation)
    app.wait_until(lambda: not panel.busy, timeout=1)
    assert "removed from the scene" in status(panel)


def test_voxels_changed_during_the_run_are_said(app, open_panel, fake) -> None:
    import slicer

    volume = make_volume()
    fake.patience = 6
    panel = open_panel()
    type_prompt(panel, "brain tumour")
    panel.ui.applyButton.click()
    app.wait_until(lambda: "segment" in fake.names())
    slicer.util.arrayFromVolume(volume)[0] = 300
    slicer.util.arrayFromVolumeModified(volume)
    app.wait_until(lambda: not panel.busy)
    assert "changed during the run" in status(panel)
    assert not mask_of(panel.segmentation, "brain tumour", volume)[0].any()


def test_a_grid_changed_during_the_run_writes_nothing(app, open_panel, fake) -> None:
    import slicer

    volume = make_volume()
    fake.patience = 6
    panel = open_panel()
    type_prompt(panel, "brain tumour")
    panel.ui.applyButton.click()
    app.wait_until(lambda: "segment" in fake.names())
    volume.SetSpacing(3, 3, 3)
    app.wait_until(lambda: not panel.busy)
    assert "grid of 'FLAIR' was changed" in status(panel)
    assert slicer.util.getNodesByClass("vtkMRMLSegmentationNode") == []


def test_closing_the_scene_during_a_run_is_safe(app, open_panel, fake) -> None:
    import slicer

    make_volume()
    fake.patience = 10**6
    panel = open_panel()
    type_prompt(panel, "lungs")
    panel.ui.applyButton.click()
    app.process(0.1)
    app.clear_scene()
    app.process(0.1)
    assert not panel.busy
    assert panel.volume is None
    assert slicer.util.getNodesByClass("vtkMRMLSegmentationNode") == []
    fake.patience = 2
    volume = make_volume("next")
    panel.ui.inputVolumeSelector.setCurrentNode(volume)
    apply(app, panel)
    assert np.array_equal(mask_of(panel.segmentation, "brain tumour", volume), bright(volume))


def test_a_worker_that_cannot_start_is_a_sentence(app, open_panel, fake) -> None:
    make_volume()
    fake.refuse["set_volume"] = ("cannot_start", "The worker could not be started. It said: No module named 'torch'")
    panel = open_panel()
    apply(app, panel)
    assert "could not be started" in status(panel)
    assert app.messages.texts() == []
    assert panel.ui.applyButton.enabled
    fake.refuse.clear()
    apply(app, panel)
    assert names(panel.segmentation) == ["brain tumour"]


MODELS = [
    {
        "id": "litemedsam",
        "title": "LiteMedSAM",
        "size": 39_370_479,
        "licence": "Apache-2.0",
        "source": "https://github.com/bowang-lab/MedSAM",
        "installed": False,
        "state": "missing",
        "downloadable": True,
        "removable": False,
        "folder": None,
        "needed_by": ["lite"],
        "needs": "",
        "announcement": ["Research only."],
    },
    {
        "id": "lite-aligner",
        "title": "Aligner",
        "size": 4_300_000,
        "licence": "research, non-commercial",
        "source": "",
        "installed": True,
        "state": "shipped",
        "downloadable": False,
        "removable": False,
        "folder": "/shipped",
        "needed_by": ["lite"],
        "needs": "",
        "announcement": [],
    },
]


def test_missing_weights_are_offered_and_fetched(app, open_panel, fake) -> None:
    make_volume()
    fake.models = [dict(model) for model in MODELS]
    fake.refuse["set_volume"] = ("weights", "LiteMedSAM is not on this computer.")
    panel = open_panel()
    assert panel.ui.getMissingButton.isHidden()
    apply(app, panel)
    assert status(panel) == "LiteMedSAM is not on this computer."
    assert not panel.ui.getMissingButton.isHidden()
    app.messages.answer("Ok")
    panel.ui.getMissingButton.click()
    app.wait_until(lambda: "Press Apply" in status(panel))
    assert "39.4 MB" in app.messages.texts()[0]
    assert "Research only." in app.messages.texts()[0]
    assert [values["id"] for name, values in fake.requests if values.get("action") == "get"] == ["litemedsam"]


def test_models_are_listed_checked_and_deleted(app, open_panel, fake) -> None:
    fake.models = [dict(MODELS[0], installed=True, state="installed", removable=True, folder="/w"), dict(MODELS[1])]
    panel = open_panel()
    panel.ui.modelsSection.setProperty("collapsed", False)
    app.wait_until(lambda: panel.ui.modelsTable.rowCount == 2 and not panel.models.busy)
    assert panel.ui.modelsTable.item(0, 0).text() == "LiteMedSAM"
    assert panel.ui.modelsTable.item(1, 2).text() == "built in"
    panel.ui.modelsTable.selectRow(1)
    assert not panel.ui.removeModelButton.enabled, panel.models.chosen
    panel.ui.modelsTable.selectRow(0)
    panel.ui.verifyModelButton.click()
    app.wait_until(lambda: "sound" in panel.ui.modelsLabel.text)
    panel.ui.removeModelButton.click()  # unanswered: refused
    assert fake.names().count("models") == 2
    app.messages.answer("Ok")
    panel.ui.removeModelButton.click()
    app.wait_until(lambda: "free again" in panel.ui.modelsLabel.text)
    app.wait_until(lambda: not panel.models.models[0]["installed"])


def test_preview_says_that_it_knows_only_this_slice(app, open_panel, fake) -> None:
    import slicer

    volume = make_volume()
    panel = open_panel()
    type_prompt(panel, "lungs")
    slice_node = slicer.mrmlScene.GetNodeByID("vtkMRMLSliceNodeRed")
    slice_node.SetOrientationToAxial()
    slice_node.SetSliceOffset(3.0)
    panel.ui.previewButton.click()
    app.wait_until(lambda: not panel.busy)
    assert "this slice alone" in status(panel)
    preview = slicer.util.getNode("FreqSeg preview")
    expected = np.zeros_like(bright(volume))
    expected[3] = bright(volume)[3]
    assert np.array_equal(mask_of(preview, preview.GetSegmentation().GetNthSegmentID(0), volume), expected)
    assert panel.segmentation is None
    apply(app, panel, None)
    assert slicer.util.getNodes("FreqSeg preview*") == {}
    slice_node.SetSliceOffset(2.0)
    panel.ui.previewButton.click()
    app.wait_until(lambda: not panel.busy)
    assert "this slice alone" not in status(panel)
    assert fake.last("preview_slice")["index"] == 2
    assert "volume" not in fake.last("preview_slice")


def refine_with(app, panel, role: str, ijk) -> None:
    from FreqSegPanel import geometry

    place = geometry.ijk_to_world(panel.volume, [ijk])[0]
    panel.refine.marks(role).AddControlPointWorld(*place)
    app.wait_until(lambda: panel.refine._timer.active or panel.refine._task is not None)
    app.wait_until(lambda: not panel.refine._timer.active and panel.refine._task.finished)


def test_refining_redraws_the_segment_and_is_one_step_to_undo(app, open_panel, fake) -> None:
    volume = make_volume(matrix=GEOMETRIES["oblique"])
    panel = open_panel()
    apply(app, panel)
    node = panel.segmentation
    refine_with(app, panel, "Inside", (2, 8, 1))
    refine_with(app, panel, "Outside", (5, 4, 2))
    sent = fake.last("refine")["points"]
    assert np.allclose(sent, [[2, 8, 1, 1], [5, 4, 2, 0]], atol=1e-5)
    expected = bright(volume).copy()
    expected[1, 6:11, 0:5] = True
    expected[2, 2:7, 3:8] = False
    assert np.array_equal(mask_of(node, "brain tumour", volume), expected)
    assert names(node) == ["brain tumour"]
    assert "49755003" in tag(node.GetSegmentation().GetSegment("brain tumour"), "TerminologyEntry")
    assert "2 slices" in panel.ui.refineLabel.text
    panel.ui.clearPointsButton.click()
    assert np.array_equal(mask_of(node, "brain tumour", volume), expected)
    panel.ui.undoButton.click()
    assert np.array_equal(mask_of(node, "brain tumour", volume), bright(volume))


def test_a_removed_point_gives_the_segment_back(app, open_panel) -> None:
    volume = make_volume()
    panel = open_panel()
    apply(app, panel)
    refine_with(app, panel, "Inside", (2, 8, 1))
    assert not np.array_equal(mask_of(panel.segmentation, "brain tumour", volume), bright(volume))
    panel.refine.nodes["Inside"].RemoveNthControlPoint(0)
    app.wait_until(lambda: "as it was" in panel.ui.refineLabel.text)
    assert np.array_equal(mask_of(panel.segmentation, "brain tumour", volume), bright(volume))


def test_a_box_redraws_what_lies_in_it(app, open_panel, fake) -> None:
    """Drawn as Slicer draws a region: the node gets its size while points are placed, and says so at the end."""
    import slicer

    volume = make_volume(matrix=np.diag([-2.0, -1.0, 3.0, 1.0]))
    panel = open_panel()
    apply(app, panel)
    panel.ui.boxButton.click()
    interaction = slicer.mrmlScene.GetNodeByID("vtkMRMLInteractionNodeSingleton")
    assert interaction.GetCurrentInteractionMode() == interaction.Place
    box = panel.refine.marks("RefineBox")
    # voxel centres i 1..3 (x -2..-6), j 8..10 (y -8..-10), k 1..2 (z 3..6)
    box.SetCenter([-4.0, -9.0, 4.5])
    box.SetSize([4.2, 2.2, 3.2])
    box.InvokeCustomModifiedEvent(slicer.vtkMRMLMarkupsNode.PointEndInteractionEvent)
    app.wait_until(lambda: panel.refine._task is not None and panel.refine._task.finished)
    assert fake.last("refine")["box"] == [[1, 8, 1], [3, 10, 2]]
    expected = bright(volume).copy()
    expected[1:3, 8:11, 1:4] = True
    assert np.array_equal(mask_of(panel.segmentation, "brain tumour", volume), expected)
    assert "2 slices" in panel.ui.refineLabel.text
    panel.ui.clearPointsButton.click()
    panel.ui.undoButton.click()
    assert np.array_equal(mask_of(panel.segmentation, "brain tumour", volume), bright(volume))


def test_the_place_buttons_put_slicer_into_place_mode(app, open_panel) -> None:
    import slicer

    make_volume()
    panel = open_panel()
    apply(app, panel)
    interaction = slicer.mrmlScene.GetNodeByID("vtkMRMLInteractionNodeSingleton")
    panel.ui.insideButton.click()
    assert interaction.GetCurrentInteractionMode() == interaction.Place
    assert panel.ui.insideButton.checked
    panel.ui.outsideButton.click()
    assert not panel.ui.insideButton.checked
    interaction.SetCurrentInteractionMode(interaction.ViewTransform)
    assert not panel.ui.outsideButton.checked


@pytest.mark.parametrize("how", ["hidden", "completed"])
def test_a_hidden_or_completed_segment_is_not_redrawn(app, open_panel, fake, how) -> None:
    import slicer

    volume = make_volume()
    panel = open_panel()
    apply(app, panel)
    node = panel.segmentation
    if how == "hidden":
        node.GetDisplayNode().SetSegmentVisibility("brain tumour", False)
    else:
        logic = slicer.vtkSlicerSegmentationsModuleLogic
        logic.SetSegmentStatus(node.GetSegmentation().GetSegment("brain tumour"), logic.Completed)
    panel.ui.insideButton.click()
    assert how in panel.ui.refineLabel.text
    assert not panel.ui.insideButton.checked
    refine_with(app, panel, "Inside", (2, 8, 1))
    assert how in panel.ui.refineLabel.text
    assert "refine" not in fake.names()
    assert np.array_equal(mask_of(node, "brain tumour", volume), bright(volume))


def test_looking_inside_makes_volumes_on_the_same_grid(app, open_panel) -> None:
    import slicer

    volume = make_volume(matrix=GEOMETRIES["oblique"])
    panel = open_panel()
    panel.ui.uncertaintyCheckBox.setChecked(True)
    apply(app, panel)
    for button in (panel.ui.saliencyButton, panel.ui.uncertaintyButton, panel.ui.maskButton, panel.ui.frequencyButton):
        assert button.enabled
        button.click()
        app.wait_until(lambda: panel.ui.lookLabel.text.startswith("Shown"))
        panel.ui.lookLabel.text = ""
    expected = {
        "brain tumour: where it looked": bright(volume).astype(float),
        "brain tumour: how unsure it was": bright(volume) * np.float32(0.2),
        "brain tumour: mask": bright(volume).astype(float),
        "FLAIR: low frequencies": slicer.util.arrayFromVolume(volume).astype(float),
    }
    for name, array in expected.items():
        node = slicer.util.getNode(name)
        assert np.allclose(slicer.util.arrayFromVolume(node), array)
        assert np.allclose(slicer.util.arrayFromVTKMatrix(matrix_of(node)), GEOMETRIES["oblique"])
    panel.ui.saliencyButton.click()
    app.wait_until(lambda: panel.ui.lookLabel.text.startswith("Shown"))
    looked = slicer.util.getNode("brain tumour: where it looked")
    assert len(slicer.util.getNodes("brain tumour: where it looked*")) == 1
    composite = slicer.mrmlScene.GetNodeByID("vtkMRMLSliceCompositeNodeRed")
    assert composite.GetForegroundVolumeID() == looked.GetID()
    assert composite.GetBackgroundVolumeID() == volume.GetID()
    panel.ui.opacitySlider.setValue(0.25)
    assert composite.GetForegroundOpacity() == 0.25
    panel.ui.hideLooksButton.click()
    assert composite.GetForegroundVolumeID() is None
    panel.ui.sideBySideButton.click()
    layout = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLLayoutNode")
    assert layout.GetViewArrangement() == slicer.vtkMRMLLayoutNode.SlicerLayoutFourUpView
    shown = [slicer.mrmlScene.GetNodeByID(f"vtkMRMLSliceCompositeNode{name}") for name in ("Red", "Yellow", "Green")]
    assert [node.GetBackgroundVolumeID() for node in shown] == [volume.GetID()] * 3
    assert shown[0].GetForegroundVolumeID() is None
    assert shown[1].GetForegroundVolumeID() == looked.GetID()
    assert shown[2].GetForegroundVolumeID() == slicer.util.getNode("brain tumour: how unsure it was").GetID()


def matrix_of(node):
    import vtk

    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    return matrix


def test_without_a_result_there_is_nothing_to_look_into(app, open_panel) -> None:
    make_volume()
    panel = open_panel()
    assert not panel.ui.saliencyButton.enabled
    assert "Apply first" in panel.ui.lookLabel.text
    apply(app, panel)
    assert panel.ui.saliencyButton.enabled
    assert not panel.ui.uncertaintyButton.enabled


def test_a_target_that_is_not_there_is_said(app, open_panel) -> None:
    make_volume()
    panel = open_panel()
    apply(app, panel, "absent thing")
    assert status(panel) == "absent thing was not found."
    assert names(panel.segmentation) == ["absent thing"]


def test_a_colour_picture_is_read_as_grey(app, open_panel, fake) -> None:
    import slicer

    array = np.zeros((1, 8, 9, 3), dtype=np.uint8)
    array[0, 2:5, 3:6] = (255, 255, 255)
    array[0, 6, 7] = (255, 0, 0)
    volume = slicer.util.addVolumeFromArray(array, name="photo", nodeClassName="vtkMRMLVectorVolumeNode")
    panel = open_panel()
    panel.ui.inputVolumeSelector.setCurrentNode(volume)
    apply(app, panel)
    sent = np.array(fake._volumes[next(iter(fake._volumes))][0])
    assert sent.shape == (1, 8, 9)
    assert sent[0, 6, 7] == 76  # 0.299 * 255
    expected = np.zeros((1, 8, 9), dtype=bool)
    expected[0, 2:5, 3:6] = True
    segment = panel.segmentation.GetSegmentation().GetSegment("brain tumour")
    assert segment.GetRepresentation("Binary labelmap").GetExtent() == (3, 5, 2, 4, 0, 0)


def test_a_slice_of_its_own_is_a_volume_too(app, open_panel) -> None:
    volume = make_volume(shape=(4, 12, 10))
    import slicer

    slicer.util.updateVolumeFromArray(volume, slicer.util.arrayFromVolume(volume)[2:3].copy())
    panel = open_panel()
    apply(app, panel)
    assert np.array_equal(mask_of(panel.segmentation, "brain tumour", volume), bright(volume))


def test_a_scene_brings_the_panel_back(app, open_panel, tmp_path) -> None:
    import slicer

    make_volume()
    panel = open_panel()
    panel.ui.axisComboBox.setCurrentIndex(2)
    panel.advanced.editor("num_contours").setValue(3)
    panel.ui.addPromptButton.click()
    type_prompt(panel, "lungs", row=1)
    panel.ui.uncertaintyCheckBox.setChecked(True)
    apply(app, panel)
    wanted = panel.options()
    path = tmp_path / "scene.mrb"
    assert slicer.util.saveScene(str(path))
    app.clear_scene()
    assert panel.ui.promptsTable.rowCount == 1
    slicer.util.loadScene(str(path))
    app.process(0.1)
    assert [prompt.text for prompt in panel.prompts.prompts] == ["brain tumour", "lungs"]
    assert panel.options() == wanted
    assert panel.volume.GetName() == "FLAIR"
    assert names(panel.segmentation) == ["brain tumour", "lungs"]
    assert np.array_equal(mask_of(panel.segmentation, "brain tumour", panel.volume), bright(panel.volume))


def test_settings_go_to_the_worker_only_where_they_differ(app, open_panel, fake) -> None:
    make_volume()
    panel = open_panel()
    apply(app, panel)
    assert "settings" not in fake.last("segment")
    panel.advanced.editor("num_contours").setValue(3)
    panel.advanced.editor("layer_idx").setValue(4)
    panel.advanced.editor("frequency_branches").setCurrentIndex(2)
    panel.ui.axisComboBox.setCurrentIndex(3)
    apply(app, panel)
    wanted = {"num_contours": 3, "layer_idx": 4, "frequency_branches": "on", "axis": "sagittal"}
    assert fake.last("segment")["settings"] == wanted
    assert fake.last("set_volume")["settings"] == wanted


def test_every_setting_of_the_library_is_in_the_panel(app, open_panel) -> None:
    from dataclasses import fields

    from FreqSegPanel.advanced_form import SHOWN_ELSEWHERE, labels

    from FreqSegLib.settings import TextSegmentationSettings

    panel = open_panel()
    for item in fields(TextSegmentationSettings):
        if item.name not in SHOWN_ELSEWHERE:
            assert panel.advanced.editor(item.name) is not None
            assert item.name in labels()
    assert panel.advanced.values == {}


def test_presets_say_what_they_know(app, open_panel) -> None:
    make_volume()
    panel = open_panel()
    assert "brain tumour" in panel.ui.targetsLabel.text
    assert "FLAIR" in panel.ui.targetsLabel.text
    type_prompt(panel, "glioma")
    assert panel.ui.promptsTable.item(0, 1).text() == "brain tumour"
    type_prompt(panel, "Brain  tumour")
    assert panel.ui.promptsTable.item(0, 1).text() == "brain FLAIR MR"
    type_prompt(panel, "left foot")
    assert panel.ui.promptsTable.item(0, 1).text() == "not one of its words"
    assert panel.ui.ownWeightsWidget.isHidden()
    panel.ui.presetComboBox.setCurrentIndex(2)
    assert "any prompt" in panel.ui.targetsLabel.text
    assert not panel.ui.ownWeightsWidget.isHidden()
    panel.ui.clipFolderEdit.setCurrentPath("/not/there")
    assert "'/not/there' is not there" in panel.ui.applyButton.toolTip


def test_another_contrast_is_warned_of_before_the_run(app, open_panel) -> None:
    volume = make_volume("T1 post gad")
    panel = open_panel()
    type_prompt(panel, "brain tumour")
    assert "learned on brain FLAIR MR" in status(panel)
    volume.SetName("ax FLAIR")
    type_prompt(panel, "brain tumor")
    assert "learned on" not in status(panel)


def test_own_colours_are_kept(app, open_panel) -> None:
    make_volume()
    panel = open_panel()
    panel.prompts.text = '[{"prompt": "lungs", "color": "#ff8000"}]'
    panel._edited()
    apply(app, panel, None)
    color = panel.segmentation.GetSegmentation().GetSegment("lungs").GetColor()
    assert np.allclose(color, (1.0, 128 / 255, 0.0))


def test_the_segment_editor_opens_on_the_result(app, open_panel) -> None:
    import slicer

    volume = make_volume()
    panel = open_panel()
    apply(app, panel)
    node = panel.segmentation
    panel.ui.editorButton.click()
    assert slicer.util.selectedModule() == "SegmentEditor"
    editor = slicer.modules.segmenteditor.widgetRepresentation().self().editor
    assert editor.segmentationNode() is node
    assert editor.sourceVolumeNode() is volume


def test_a_run_goes_on_while_another_module_is_open(app, open_panel, fake) -> None:
    import slicer

    volume = make_volume()
    fake.patience = 20
    panel = open_panel()
    type_prompt(panel, "brain tumour")
    panel.ui.applyButton.click()
    app.process(0.05)
    slicer.util.selectModule("SegmentEditor")
    app.wait_until(lambda: not panel.busy)
    slicer.util.selectModule("FreqSeg")
    app.process()
    assert np.array_equal(mask_of(panel.segmentation, "brain tumour", volume), bright(volume))


def test_a_surface_is_made_on_request(app, open_panel) -> None:
    make_volume()
    panel = open_panel()
    apply(app, panel)
    assert not panel.segmentation.GetSegmentation().ContainsRepresentation("Closed surface")
    panel.ui.show3DCheckBox.setChecked(True)
    apply(app, panel, "glioma")
    assert panel.segmentation.GetSegmentation().ContainsRepresentation("Closed surface")


def test_unloading_the_module_ends_the_worker(app, open_panel, fake) -> None:
    make_volume()
    panel = open_panel()
    apply(app, panel)
    app.unload_module("FreqSeg")
    assert fake.closed


def test_sample_data_is_registered_with_checksums(app, open_panel) -> None:
    import hashlib
    from urllib.request import url2pathname

    import slicer
    from SampleData import SampleDataLogic

    open_panel()
    registered = getattr(slicer.modules, "sampleDataSources", {}).get("FreqSeg") or SampleDataLogic.registered
    sources = {source.sampleName: source for source in registered if source.category == "FreqSeg"}
    assert {"FreqSegFLAIR", "FreqSegCT", "FreqSegMRHead", "FreqSegCTChest"} <= set(sources)
    for source in sources.values():
        uri, checksum = (one if isinstance(one, str) else one[0] for one in (source.uris, source.checksums))
        assert checksum.startswith("SHA256:")
        if uri.startswith("file://"):
            content = Path(url2pathname(uri.removeprefix("file://"))).read_bytes()
            assert checksum == f"SHA256:{hashlib.sha256(content).hexdigest()}"
        else:
            assert uri.endswith(checksum.removeprefix("SHA256:"))
