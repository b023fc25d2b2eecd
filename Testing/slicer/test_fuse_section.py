"""The panel's section Fuse, driven with clicks on real MRML; a light client stands for the worker, but at the end."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "Resources" / "Samples"


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


AXIAL = placed(np.diag([-1.0, -1.0, 1.0]), (1, 1, 1))
GEOMETRIES = {
    "anisotropic": placed(np.diag([-1.0, -1.0, 1.0]), (0.7, 0.9, 6.5)),
    "left-handed": placed(np.diag([-1.0, -1.0, -1.0]), (1, 1, 2)),
    "oblique": placed(rotation(25) @ np.diag([-1.0, -1.0, 1.0]), (0.8, 1.1, 3)),
}


def make_volume(name: str, array: np.ndarray, matrix: np.ndarray = AXIAL):
    import slicer

    node = slicer.util.addVolumeFromArray(array.astype(np.int16), name=name)
    node.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(matrix))
    return node


def make_pair(matrix: np.ndarray = AXIAL) -> tuple[Any, Any]:
    """A CT, and an MR of every second voxel of it along every axis, which counts its voxels from another corner."""
    ct = np.zeros((6, 12, 10))
    mr = np.arange(3 * 6 * 5).reshape(3, 6, 5)
    corner = np.diag([-2.0, -2.0, 2.0, 1.0])
    corner[:3, 3] = (8, 10, 0)
    return make_volume("Head CT", ct, matrix), make_volume("Head T1", mr, matrix @ corner)


def expected_of(mr) -> np.ndarray:
    """What the light client makes of a pair of ``make_pair`` that lies as it was made, where the two have a voxel."""
    import slicer

    return slicer.util.arrayFromVolume(mr)[:, ::-1, ::-1] / 2


def transform_node(matrix: np.ndarray):
    import slicer

    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode")
    node.SetMatrixTransformToParent(slicer.util.vtkMatrixFromArray(matrix))
    return node


def matrix_of(node) -> np.ndarray:
    import slicer
    import vtk

    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    return slicer.util.arrayFromVTKMatrix(matrix)


def apply(app, panel, timeout: float = 60) -> None:
    assert panel.ui.fuseButton.enabled, panel.ui.fuseButton.toolTip
    panel.ui.fuseButton.click()
    finish(app, panel, timeout)


def finish(app, panel, timeout: float = 60) -> None:
    app.wait_until(lambda: not panel.fuse.busy, timeout=timeout)


def status(panel) -> str:
    return panel.ui.fuseStatusLabel.text


def choose(panel, combo, title: str) -> None:
    index = combo.findText(title)
    assert index >= 0, title
    combo.setCurrentIndex(index)


def fused_nodes() -> list[Any]:
    import slicer

    return [node for node in slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode") if "fused" in node.GetName()]


def composites() -> list[Any]:
    import slicer

    return slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode")


def test_the_section_finds_a_ct_and_an_mr_by_their_names(app, open_panel, fake) -> None:
    mr = make_volume("FLAIR", np.ones((2, 3, 4)))
    ct = make_volume("brain_CT", np.ones((2, 3, 4)))
    panel = open_panel()
    assert panel.parameters.fuseCT is ct
    assert panel.parameters.fuseMR is mr
    assert panel.ui.fuseButton.enabled
    assert fake.requests == []


def test_what_is_missing_or_wrong_is_said(app, open_panel) -> None:
    first, second = make_volume("first", np.ones((2, 3, 4))), make_volume("second", np.ones((2, 3, 4)))
    panel = open_panel()
    ui = panel.ui
    assert "Choose the CT" in ui.fuseButton.toolTip
    ui.fuseCTSelector.setCurrentNode(first)
    assert "Choose the MR" in ui.fuseButton.toolTip
    ui.fuseMRSelector.setCurrentNode(first)
    assert "'first' is chosen twice" in status(panel)
    ui.fuseMRSelector.setCurrentNode(second)
    assert ui.fuseButton.enabled
    ui.fuseOutputSelector.setCurrentNode(second)
    assert "overwrite 'second'" in ui.fuseButton.toolTip
    ui.fuseOutputSelector.setCurrentNode(None)
    assert ui.fuseButton.enabled
    second.SetAndObserveImageData(None)
    panel.result_changed()
    assert "'second' holds no voxels" in ui.fuseButton.toolTip
    assert app.messages.texts() == []


def test_two_cts_and_an_exchanged_pair_are_warned_of(app, open_panel) -> None:
    first, second = make_volume("CT one", np.ones((2, 3, 4))), make_volume("CT two", np.ones((2, 3, 4)))
    mr = make_volume("FLAIR", np.ones((2, 3, 4)))
    panel = open_panel()
    panel.ui.fuseCTSelector.setCurrentNode(first)
    panel.ui.fuseMRSelector.setCurrentNode(second)
    assert "both seem to be CTs" in status(panel)
    panel.ui.fuseCTSelector.setCurrentNode(mr)
    assert "exchanged" in status(panel)
    panel.ui.fuseCTSelector.setCurrentNode(first)
    panel.ui.fuseMRSelector.setCurrentNode(mr)
    assert status(panel) == ""


@pytest.mark.parametrize("matrix", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_the_result_lies_on_the_ct_s_grid(app, open_panel, matrix) -> None:
    import slicer

    _ct, mr = make_pair(matrix)
    panel = open_panel()
    apply(app, panel)
    fused = panel.parameters.fuseOutput
    assert fused.GetName() == "Head CT fused with Head T1"
    assert np.allclose(matrix_of(fused), matrix)
    array = slicer.util.arrayFromVolume(fused)
    assert array.shape == (6, 12, 10)
    assert array.dtype == np.float32
    assert np.array_equal(array[::2, ::2, ::2], expected_of(mr))
    assert app.messages.texts() == []


def test_the_result_belongs_to_its_sources_and_says_how_it_was_made(app, open_panel) -> None:
    import slicer

    ct, mr = make_pair()
    tree = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    study = tree.CreateStudyItem(tree.GetSceneItemID(), "Study")
    tree.CreateItem(study, ct)
    panel = open_panel()
    choose(panel, panel.ui.fuseMethodComboBox, "Average")
    apply(app, panel)
    fused = panel.parameters.fuseOutput
    assert fused.GetNodeReference("FreqSeg.CT") is ct
    assert fused.GetNodeReference("FreqSeg.MR") is mr
    assert '"method": "average"' in fused.GetAttribute("FreqSeg.Fusion")
    assert tree.GetItemParent(tree.GetItemByDataNode(fused)) == study
    assert status(panel) == "'Head CT' and 'Head T1' were fused into 'Head CT fused with Head T1'."


def test_parent_transforms_put_the_mr_where_the_user_sees_it(app, open_panel, fake) -> None:
    import slicer

    ct, mr = make_pair(GEOMETRIES["oblique"])
    of_ct, of_mr = np.eye(4), np.eye(4)
    of_ct[:3, :3], of_ct[:3, 3] = rotation(70), (5, -8, 13)
    of_mr[:3, :3], of_mr[:3, 3] = rotation(40), (-3, 2, 6)
    # the MR lies where it lay before its own transform, seen from the CT
    mr.SetIJKToRASMatrix(slicer.util.vtkMatrixFromArray(np.linalg.inv(of_mr) @ of_ct @ matrix_of(mr)))
    ct_transform, mr_transform = transform_node(of_ct), transform_node(of_mr)
    ct.SetAndObserveTransformNodeID(ct_transform.GetID())
    mr.SetAndObserveTransformNodeID(mr_transform.GetID())
    panel = open_panel()
    apply(app, panel)
    fused = panel.parameters.fuseOutput
    assert fused.GetTransformNodeID() == ct_transform.GetID()
    assert np.allclose(matrix_of(fused), GEOMETRIES["oblique"])
    assert np.array_equal(slicer.util.arrayFromVolume(fused)[::2, ::2, ::2], expected_of(mr))


def test_a_transform_that_bends_one_of_them_is_a_sentence(app, open_panel) -> None:
    import slicer
    import vtk

    ct, mr = make_pair()
    bent = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTransformNode")
    splines = vtk.vtkThinPlateSplineTransform()
    points, moved = vtk.vtkPoints(), vtk.vtkPoints()
    for place in np.random.default_rng(0).uniform(-50, 50, (8, 3)):
        points.InsertNextPoint(*place)
        moved.InsertNextPoint(*(place + place**2 / 100))
    splines.SetSourceLandmarks(points)
    splines.SetTargetLandmarks(moved)
    splines.SetBasisToR()
    bent.SetAndObserveTransformToParent(splines)
    mr.SetAndObserveTransformNodeID(bent.GetID())
    panel = open_panel()
    assert "not linear" in panel.ui.fuseButton.toolTip
    ct.SetAndObserveTransformNodeID(bent.GetID())
    panel.result_changed()
    assert panel.ui.fuseButton.enabled


def test_the_result_is_shown_alone_or_blended(app, open_panel) -> None:
    ct, mr = make_pair()
    panel = open_panel()
    apply(app, panel)
    fused = panel.parameters.fuseOutput
    display = fused.GetDisplayNode()
    assert (display.GetWindowLevelMin(), display.GetWindowLevelMax()) == (0, 255)
    assert not display.GetAutoWindowLevel()
    assert {node.GetBackgroundVolumeID() for node in composites()} == {fused.GetID()}
    assert {node.GetForegroundVolumeID() for node in composites()} == {None}
    assert not panel.ui.fuseOpacitySlider.enabled
    choose(panel, panel.ui.fuseShowComboBox, "Blended over the CT")
    assert {node.GetBackgroundVolumeID() for node in composites()} == {ct.GetID()}
    assert {node.GetForegroundVolumeID() for node in composites()} == {fused.GetID()}
    panel.ui.fuseOpacitySlider.setValue(0.25)
    assert {node.GetForegroundOpacity() for node in composites()} == {0.25}
    choose(panel, panel.ui.fuseShowComboBox, "Blended over the MR")
    assert {node.GetBackgroundVolumeID() for node in composites()} == {mr.GetID()}
    assert "were fused" in status(panel)


def test_only_what_was_chosen_and_fits_the_method_is_sent(app, open_panel, fake) -> None:
    make_pair()
    panel = open_panel()
    ui = panel.ui
    choose(panel, ui.fuseMethodComboBox, "Wavelet choose-max")
    choose(panel, ui.fuseWaveComboBox, "db4")
    ui.fuseLevelsSpinBox.setValue(3)
    apply(app, panel)
    assert fake.last("fuse")["settings"] == {"method": "choose-max", "wave": "db4", "levels": 3}
    choose(panel, ui.fuseMethodComboBox, "Laplacian pyramid")
    assert not ui.fuseWaveComboBox.enabled
    apply(app, panel)
    assert fake.last("fuse")["settings"] == {"method": "laplacian", "levels": 3}
    choose(panel, ui.fuseMethodComboBox, "Multi-scale network")
    assert not ui.fuseLevelsSpinBox.enabled
    ui.fuseRegisterCheckBox.setChecked(True)
    apply(app, panel)
    wanted = {"method": "multi-scale", "wave": "db4", "register": "rigid"}
    assert fake.last("fuse")["settings"] == wanted
    assert fake.last("fuse")["masks"] is False


REFUSED = (
    "not_registered",
    "The CT and the MR do not seem to lie on each other. Register them (--register rigid), or take them as they are "
    "(--no-check)",
)


def test_a_pair_that_is_not_registered_can_be_registered_with_a_click(app, open_panel, fake) -> None:
    make_pair()
    fake.refuse["fuse"] = REFUSED
    panel = open_panel()
    ui = panel.ui
    assert ui.registerAndFuseButton.isHidden()
    apply(app, panel)
    assert status(panel).endswith("Register them, or take them as they are.")
    assert not ui.registerAndFuseButton.isHidden()
    assert not ui.fuseAnywayButton.isHidden()
    assert fused_nodes() == []
    fake.refuse.clear()
    # 2 mm along x
    fake.transform = [[1, 0, 0, 2], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    ui.registerAndFuseButton.click()
    assert ui.registerAndFuseButton.isHidden()
    finish(app, panel)
    assert ui.fuseRegisterCheckBox.checked
    assert fake.last("fuse")["settings"]["register"] == "rigid"
    assert "moved by 2.0 mm and turned by 0.0°" in status(panel)
    assert len(fused_nodes()) == 1
    assert app.messages.texts() == []


def test_a_pair_that_is_not_registered_can_be_taken_as_it_lies(app, open_panel, fake) -> None:
    make_pair()
    fake.refuse["fuse"] = REFUSED
    panel = open_panel()
    panel.ui.fuseRegisterCheckBox.setChecked(True)
    apply(app, panel)
    assert panel.ui.registerAndFuseButton.isHidden()
    fake.refuse.clear()
    panel.ui.fuseAnywayButton.click()
    finish(app, panel)
    assert fake.last("fuse")["settings"]["check"] is False
    assert panel.ui.fuseAnywayButton.isHidden()
    apply(app, panel)
    assert "check" not in fake.last("fuse")["settings"]


def test_a_pair_without_overlap_can_only_be_registered(app, open_panel, fake) -> None:
    _ct, mr = make_pair()
    mr.SetOrigin(500, 0, 0)
    fake.refuse["fuse"] = ("not_registered", "'Head CT' and the MR do not overlap.")
    panel = open_panel()
    apply(app, panel)
    assert "do not overlap" in status(panel)
    assert not panel.ui.registerAndFuseButton.isHidden()
    assert panel.ui.fuseAnywayButton.isHidden()


def test_another_pair_takes_the_offer_and_the_output_back(app, open_panel, fake) -> None:
    make_pair()
    other = make_volume("other T2", np.ones((6, 12, 10)))
    panel = open_panel()
    apply(app, panel)
    first = panel.parameters.fuseOutput
    apply(app, panel)
    assert panel.parameters.fuseOutput is first
    fake.refuse["fuse"] = REFUSED
    apply(app, panel)
    panel.ui.fuseMRSelector.setCurrentNode(other)
    assert panel.ui.registerAndFuseButton.isHidden()
    assert panel.parameters.fuseOutput is None
    assert status(panel) == ""


def test_an_existing_volume_takes_the_result_with_its_place(app, open_panel) -> None:
    import slicer

    _ct, mr = make_pair(GEOMETRIES["oblique"])
    existing = make_volume("mine", np.full((2, 2, 2), 900))
    existing.CreateDefaultDisplayNodes()
    panel = open_panel()
    panel.ui.fuseOutputSelector.setCurrentNode(existing)
    apply(app, panel)
    assert panel.parameters.fuseOutput is existing
    assert existing.GetName() == "mine"
    assert np.allclose(matrix_of(existing), GEOMETRIES["oblique"])
    assert np.array_equal(slicer.util.arrayFromVolume(existing)[::2, ::2, ::2], expected_of(mr))
    assert existing.GetDisplayNode().GetWindowLevelMax() == 255


def test_masks_become_volumes_and_never_outlive_their_result(app, open_panel, fake) -> None:
    import slicer

    make_pair(GEOMETRIES["oblique"])
    panel = open_panel()
    panel.ui.fuseMasksCheckBox.setChecked(True)
    apply(app, panel)
    assert fake.last("fuse")["masks"] is True
    share = slicer.util.getNode("Head CT fused with Head T1: CT share, level 1 LH")
    assert (slicer.util.arrayFromVolume(share) == 40).all()
    assert slicer.util.arrayFromVolume(share).dtype == np.uint8
    assert np.allclose(matrix_of(share), GEOMETRIES["oblique"])
    assert "2 volumes" in status(panel)
    apply(app, panel)
    assert len(slicer.util.getNodes("*CT share*")) == 2
    panel.ui.fuseMasksCheckBox.setChecked(False)
    apply(app, panel)
    assert slicer.util.getNodes("*CT share*") == {}
    assert len(fused_nodes()) == 1


def test_the_worker_s_warnings_are_notes(app, open_panel, fake) -> None:
    make_pair()
    fake.fusion_warnings = ["The MR covers 40 % of the CT; elsewhere the fused volume shows the CT alone."]
    panel = open_panel()
    apply(app, panel)
    assert "Note: The MR covers 40 %" in status(panel)


def test_cancel_leaves_the_scene_as_it_was(app, open_panel, fake) -> None:
    make_pair()
    fake.patience = 10**6
    panel = open_panel()
    panel.ui.fuseButton.click()
    app.wait_until(lambda: "Fusing: 1 of 4, about 12 s left" in status(panel), timeout=60)
    assert not panel.ui.fuseProgressBar.isHidden()
    assert not panel.ui.fuseButton.enabled
    panel.ui.fuseCancelButton.click()
    finish(app, panel)
    assert "cancelled" in status(panel).lower()
    assert panel.ui.fuseProgressBar.isHidden()
    assert panel.ui.fuseButton.enabled
    assert fused_nodes() == []


def test_a_volume_removed_during_the_run_ends_it_with_a_sentence(app, open_panel, fake) -> None:
    import slicer

    _ct, mr = make_pair()
    fake.patience = 10**6
    panel = open_panel()
    panel.ui.fuseButton.click()
    app.wait_until(lambda: "fuse" in fake.names(), timeout=60)
    slicer.mrmlScene.RemoveNode(mr)
    finish(app, panel)
    assert "'Head T1' was removed from the scene" in status(panel)
    assert fused_nodes() == []


def test_a_grid_or_place_changed_during_the_run_is_said(app, open_panel, fake) -> None:
    ct, mr = make_pair()
    fake.patience = 6
    panel = open_panel()
    panel.ui.fuseButton.click()
    app.wait_until(lambda: "fuse" in fake.names(), timeout=60)
    shift = np.eye(4)
    shift[0, 3] = 2.0
    mr.SetAndObserveTransformNodeID(transform_node(shift).GetID())
    finish(app, panel)
    assert "was moved against" in status(panel)
    panel.ui.fuseButton.click()
    app.wait_until(lambda: fake.names().count("fuse") == 2, timeout=60)
    ct.SetSpacing(3, 3, 3)
    finish(app, panel)
    assert "grid of 'Head CT' was changed" in status(panel)
    assert len(fused_nodes()) == 1


def test_closing_the_scene_during_a_run_is_safe(app, open_panel, fake) -> None:
    make_pair()
    fake.patience = 10**6
    panel = open_panel()
    panel.ui.fuseButton.click()
    app.wait_until(lambda: "fuse" in fake.names(), timeout=60)
    app.clear_scene()
    app.process(0.1)
    assert not panel.fuse.busy
    assert fused_nodes() == []
    fake.patience = 2
    ct, mr = make_pair()
    panel.ui.fuseCTSelector.setCurrentNode(ct)
    panel.ui.fuseMRSelector.setCurrentNode(mr)
    apply(app, panel)
    assert len(fused_nodes()) == 1


def test_a_run_goes_on_while_another_module_is_open(app, open_panel, fake) -> None:
    import slicer

    make_pair()
    fake.patience = 20
    panel = open_panel()
    panel.ui.fuseButton.click()
    app.process(0.05)
    slicer.util.selectModule("SegmentEditor")
    finish(app, panel)
    slicer.util.selectModule("FreqSeg")
    app.process()
    assert panel.parameters.fuseOutput is fused_nodes()[0]


def test_a_scene_brings_the_section_back(app, open_panel, tmp_path) -> None:
    import slicer

    make_pair()
    panel = open_panel()
    choose(panel, panel.ui.fuseMethodComboBox, "Wavelet choose-max")
    choose(panel, panel.ui.fuseWaveComboBox, "coif2")
    choose(panel, panel.ui.fuseShowComboBox, "Blended over the MR")
    panel.ui.fuseLevelsSpinBox.setValue(2)
    panel.ui.fuseMasksCheckBox.setChecked(True)
    panel.ui.fuseRegisterCheckBox.setChecked(True)
    apply(app, panel)
    wanted = panel.fuse.options()
    path = tmp_path / "scene.mrb"
    assert slicer.util.saveScene(str(path))
    app.clear_scene()
    assert panel.ui.fuseLevelsSpinBox.value == 0
    assert not panel.ui.fuseRegisterCheckBox.checked
    slicer.util.loadScene(str(path))
    app.process(0.1)
    assert panel.fuse.options() == wanted
    assert panel.ui.fuseShowComboBox.currentText == "Blended over the MR"
    assert panel.parameters.fuseCT.GetName() == "Head CT"
    assert panel.parameters.fuseOutput.GetNodeReference("FreqSeg.MR").GetName() == "Head T1"


def test_large_volumes_are_handed_over_and_written_piece_by_piece(app, open_panel, fake, monkeypatch) -> None:
    """Between two pieces the window lives; no piece is larger than a slice here."""
    import slicer

    pieces: list[int] = []
    ct, mr = make_pair()
    panel = open_panel()
    monkeypatch.setattr(sys.modules["FreqSegPanel.look_inside"], "COPY_VOXELS", 1)
    export_of = fake.export

    def slow_export(array: np.ndarray) -> Any:
        export = export_of(array)
        steps = iter([False] * 4 + [True])
        step = export.step

        def some(seconds: float) -> bool:
            assert seconds < 0.05
            pieces.append(1)
            return next(steps) and step(seconds)

        export.step = some
        return export

    monkeypatch.setattr(fake, "export", slow_export)
    fuse_work = sys.modules["FreqSegPanel.fusion"].fuse_work
    work = fuse_work(panel.session, ct, mr, None, panel.fuse.options())
    stops = []
    answer = None
    try:
        while True:
            asked = work.send(answer)
            answer = None
            stops.append(asked)
            if asked is not None:
                answer = fake._fuse("9", **asked.values)
    except StopIteration as end:
        report = end.value
    assert len(pieces) == 10
    # four stops a volume on the way there, one a slice on the way back
    assert stops.count(None) == 8 + 6
    assert np.array_equal(slicer.util.arrayFromVolume(report.output_node)[::2, ::2, ::2], expected_of(mr))


def test_a_script_fuses_and_is_told_what_was_made(app, open_panel, fake) -> None:
    import slicer

    ct, mr = make_pair(GEOMETRIES["oblique"])
    open_panel()
    module = sys.modules["FreqSeg"]
    logic = module.FreqSegLogic(make_client=lambda: fake)
    seen: list[Any] = []
    report = logic.fuse(ct, mr, method="choose-max", wave="haar", masks=True, progress=seen.append)
    assert report.record["method"] == "choose-max"
    assert len(report.share_nodes) == 2
    assert [progress.stage for progress in seen] == ["Fusing"]
    assert np.array_equal(slicer.util.arrayFromVolume(report.output_node)[::2, ::2, ::2], expected_of(mr))
    fake.refuse["fuse"] = REFUSED
    with pytest.raises(module.Trouble, match="do not seem to lie") as refused:
        logic.fuse(ct, mr, report.output_node)
    assert refused.value.code == "not_registered"
    with pytest.raises(module.Trouble, match="chosen twice"):
        logic.fuse(ct, ct)


# The real worker


def sample(kind: str, name: str, slices: slice):
    """A part of a volume of the simulated head, at half the resolution."""
    import slicer

    node = slicer.util.loadVolume(str(SAMPLES / f"simulated_{kind}.nrrd"), {"show": False})
    array, matrix = slicer.util.arrayFromVolume(node)[slices, ::2, ::2].copy(), matrix_of(node)
    slicer.mrmlScene.RemoveNode(node)
    return make_volume(name, array, matrix @ np.diag([2.0, 2.0, 1.0, 1.0]))


@pytest.fixture
def worker(app):
    """The real one."""
    client = importlib.import_module("FreqSegLib.worker_client").WorkerClient()
    yield client
    client.close()


@pytest.mark.slow
def test_the_real_worker_fuses_the_simulated_head(app, open_panel, worker) -> None:
    """Bone comes from the CT, the lesion from the FLAIR; a pair that does not fit is refused with its offer."""
    import slicer

    part = slice(8, 11)
    ct, mr, truth = (
        sample(kind, name, part) for kind, name in (("ct", "Head CT"), ("flair", "Head FLAIR"), ("lesion", "Truth"))
    )
    panel = open_panel(worker)
    panel.ui.deviceComboBox.setCurrentIndex(1)
    choose(panel, panel.ui.fuseMethodComboBox, "Wavelet choose-max")
    apply(app, panel, 500)
    fused = panel.parameters.fuseOutput
    assert fused is not None, status(panel)
    array, of_ct, of_mr = (slicer.util.arrayFromVolume(node) for node in (fused, ct, mr))
    assert array.min() >= 0
    assert array.max() <= 255
    assert array[of_ct > 700].mean() > 180
    lesion = slicer.util.arrayFromVolume(truth) > 0
    healthy = (of_ct > 20) & (of_ct < 60) & (of_mr > 60) & ~lesion
    assert of_ct[lesion].mean() < of_ct[healthy].mean()
    assert array[lesion].mean() > 1.2 * array[healthy].mean()
    assert array[of_ct < -900].mean() < 30
    mr.SetIJKToRASMatrix(
        slicer.util.vtkMatrixFromArray(
            matrix_of(mr) @ np.array([[-1, 0, 0, 103], [0, -1, 0, 119], [0, 0, 1, 0], [0, 0, 0, 1]])
        )
    )
    apply(app, panel, 300)
    assert "do not seem to lie on each other" in status(panel)
    assert "--" not in status(panel)
    assert not panel.ui.registerAndFuseButton.isHidden()
    assert app.messages.texts() == []


@pytest.mark.slow
def test_the_real_worker_registers_what_was_refused(app, open_panel, worker) -> None:
    """The FLAIR lies under a transform that turns it by 12 degrees; the offer finds that, and the fused head fits."""
    import slicer

    _ct, mr = (sample(kind, name, slice(None)) for kind, name in (("ct", "Head CT"), ("flair", "Head FLAIR")))
    displaced, angle = np.eye(4), np.radians(12)
    displaced[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    displaced[:3, 3] = (14, -9, 6)
    mr.SetAndObserveTransformNodeID(transform_node(displaced).GetID())
    panel = open_panel(worker)
    panel.ui.deviceComboBox.setCurrentIndex(1)
    choose(panel, panel.ui.fuseMethodComboBox, "Average")
    apply(app, panel, 300)
    assert "do not seem to lie on each other" in status(panel)
    panel.ui.registerAndFuseButton.click()
    finish(app, panel, 500)
    fused = panel.parameters.fuseOutput
    assert fused is not None, status(panel)
    turned = re.search(r"turned by ([\d.]+)°", status(panel))
    assert turned is not None, status(panel)
    assert abs(float(turned[1]) - 12) < 1
    assert fused.GetTransformNodeID() is None
    found = slicer.util.arrayFromVolume(fused).copy()
    mr.SetAndObserveTransformNodeID(None)
    panel.ui.fuseRegisterCheckBox.setChecked(False)
    panel.ui.fuseOutputSelector.setCurrentNode(None)
    apply(app, panel, 300)
    wanted = slicer.util.arrayFromVolume(panel.parameters.fuseOutput)
    head = slicer.util.arrayFromVolume(mr) > 20
    assert np.corrcoef(found[head], wanted[head])[0, 1] > 0.9
