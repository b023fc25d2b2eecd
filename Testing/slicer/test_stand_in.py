"""The stand-in behaves as the Slicer application does, seen from a module in the shape of Slicer's template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from stand_in import Application

EXAMPLE = Path(__file__).resolve().parent / "example_module" / "Brighten.py"


@pytest.fixture
def ball(app: Application) -> Any:
    """A scalar volume, oblique and anisotropic, with a bright ball of radius 8 mm at its centre."""
    import slicer

    spacing = np.array([1.0, 1.5, 2.0])
    k, j, i = np.mgrid[:20, :30, :40]
    distance = np.sqrt(((i - 20) * spacing[0]) ** 2 + ((j - 15) * spacing[1]) ** 2 + ((k - 10) * spacing[2]) ** 2)
    voxels = np.where(distance < 8, 300, 20).astype(np.int16)
    turn = np.deg2rad(20)
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    matrix = np.eye(4)
    matrix[:3, :3] = rotation * spacing
    matrix[:3, 3] = [5, -7, 11]
    return slicer.util.addVolumeFromArray(voxels, ijkToRAS=matrix, name="Ball")


@pytest.fixture
def widget(app: Application) -> Any:
    return app.load_module(EXAMPLE)


def test_selectors_list_the_nodes_of_their_class_and_follow_the_scene(widget: Any, ball: Any, app: Application) -> None:
    import slicer

    assert widget.ui.inputSelector.currentNode() is ball  # the first one is chosen where "None" is not offered
    assert widget.ui.outputSelector.currentNode() is None
    slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode", "labels")
    other = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "Other")
    assert widget.ui.inputSelector.nodeCount() == 2
    widget.ui.inputSelector.setCurrentNode(other)
    assert widget._parameterNode.inputVolume is other
    slicer.mrmlScene.RemoveNode(other)
    assert widget.ui.inputSelector.currentNode() is ball


def test_apply_is_enabled_by_the_selectors_and_a_click_makes_the_segment(
    widget: Any, ball: Any, app: Application
) -> None:
    import slicer

    assert not widget.ui.applyButton.enabled
    assert widget.ui.applyButton.toolTip == "Select input and output"
    node = widget.ui.outputSelector.addNode()
    assert widget.ui.applyButton.enabled
    with app.messages.none_expected():
        widget.ui.applyButton.click()
    segments = node.GetSegmentation()
    assert [segments.GetNthSegment(n).GetName() for n in range(segments.GetNumberOfSegments())] == ["bright"]
    mask = slicer.util.arrayFromSegmentBinaryLabelmap(node, segments.GetNthSegmentID(0), ball)
    np.testing.assert_array_equal(mask, slicer.util.arrayFromVolume(ball) >= 100)
    assert widget._parameterNode.history == ["100"]


def test_an_error_in_a_slot_becomes_one_popup(widget: Any, ball: Any, app: Application) -> None:
    widget.ui.outputSelector.addNode()
    widget.ui.thresholdSlider.value = 599
    with pytest.raises(ValueError, match="nothing is that bright"):
        widget.onApply()
    assert [message.kind for message in app.messages] == ["error"]
    assert "Failed to compute results." in app.messages[0].text
    assert "Traceback" in app.messages[0].details


def test_widgets_and_parameters_follow_each_other(widget: Any, app: Application) -> None:
    ui, parameters = widget.ui, widget._parameterNode
    assert (ui.thresholdSlider.minimum, ui.thresholdSlider.maximum, ui.thresholdSlider.value) == (-100, 600, 100)
    assert (ui.roundsBox.minimum, ui.roundsBox.value) == (1, 3)
    assert [ui.methodSelector.itemText(i) for i in range(ui.methodSelector.count)] == ["fast", "good"]
    ui.thresholdSlider.value = 42.5
    ui.invertBox.click()
    ui.methodSelector.currentIndex = 0
    ui.nameEdit.text = "Köpfchen"
    assert (parameters.threshold, parameters.invert, parameters.method) == (42.5, True, "fast")
    assert parameters.segmentName == "Köpfchen"
    parameters.threshold, parameters.invert, parameters.segmentName = 7.0, False, ""
    assert (ui.thresholdSlider.value, ui.invertBox.checked, ui.nameEdit.text) == (7.0, False, "")
    with pytest.raises(ValueError, match=r"within range \[-100, 600\]"):
        parameters.threshold = 601
    with pytest.raises(TypeError):
        parameters.rounds = "many"
    assert parameters.default("threshold").value == 100
    assert parameters.isCached("threshold")
    assert not parameters.isCached("inputVolume")


def test_a_member_of_a_type_that_slicer_cannot_store_is_refused(app: Application) -> None:
    from slicer import vtkMRMLModelNode
    from slicer.parameterNodeWrapper import parameterNodeWrapper

    class Bare:
        model: vtkMRMLModelNode | None

    Bare.__annotations__ = {"model": vtkMRMLModelNode | None}
    with pytest.raises(TypeError, match=r"typing\.Optional"):
        parameterNodeWrapper(Bare)
    Bare.__annotations__ = {"model": complex}
    with pytest.raises(TypeError, match="complex"):
        parameterNodeWrapper(Bare)


def test_closing_the_scene_empties_the_panel_and_it_works_again(widget: Any, ball: Any, app: Application) -> None:
    import slicer

    widget.ui.outputSelector.addNode()
    widget.ui.nameEdit.text = "changed"
    app.clear_scene()
    assert widget.ui.inputSelector.currentNode() is None
    assert not widget.ui.applyButton.enabled
    assert widget._parameterNode.segmentName == "bright"
    again = slicer.util.addVolumeFromArray(np.full((4, 5, 6), 200, np.int16), name="Again")
    assert widget.ui.inputSelector.currentNode() is again


@pytest.mark.parametrize("suffix", [".mrb", ".mrml"])
def test_a_saved_scene_restores_panel_and_voxels(
    widget: Any, ball: Any, app: Application, tmp_path: Path, suffix: str
) -> None:
    import slicer

    voxels = slicer.util.arrayFromVolume(ball).copy()
    node = widget.ui.outputSelector.addNode()
    widget.ui.thresholdSlider.value = 150
    widget.ui.nameEdit.text = "kept"
    widget.ui.applyButton.click()
    if suffix == ".mrml":
        for saved, name in ((ball, "ball.nrrd"), (node, "bright.seg.nrrd")):
            assert slicer.util.saveNode(saved, str(tmp_path / name), {})
    assert slicer.util.saveScene(str(tmp_path / f"scene{suffix}"), {})
    app.clear_scene()
    assert widget._parameterNode.segmentName == "bright"
    slicer.util.loadScene(str(tmp_path / f"scene{suffix}"), {})
    widget.initializeParameterNode()
    assert widget.ui.thresholdSlider.value == 150
    assert widget.ui.nameEdit.text == "kept"
    assert widget._parameterNode.history == ["150"]
    volume, segmentation = widget.ui.inputSelector.currentNode(), widget.ui.outputSelector.currentNode()
    np.testing.assert_array_equal(slicer.util.arrayFromVolume(volume), voxels)
    segment_id = segmentation.GetSegmentation().GetNthSegmentID(0)
    restored = slicer.util.arrayFromSegmentBinaryLabelmap(segmentation, segment_id, volume)
    np.testing.assert_array_equal(restored, voxels >= 150)


def test_entering_another_module_calls_exit_and_back_calls_enter(widget: Any, ball: Any, app: Application) -> None:
    import slicer

    slicer.util.selectModule("SegmentEditor")
    assert slicer.util.selectedModule() == "SegmentEditor"
    widget.ui.thresholdSlider.value = 33
    assert widget.logic.getParameterNode().threshold == 100  # not bound while another module is open
    slicer.util.selectModule("Brighten")
    assert widget.ui.thresholdSlider.value == 100


def test_reloading_a_module_makes_a_new_panel_and_cleans_up_the_old(widget: Any, app: Application) -> None:
    import slicer

    slicer.util.reloadScriptedModule("Brighten")
    fresh = slicer.modules.BrightenWidget
    assert fresh is not widget
    assert not widget.Observations
    assert slicer.util.getModuleWidget("Brighten") is fresh
    fresh.enter()
    assert fresh.ui.thresholdSlider.value == 100


def test_a_module_is_described_and_its_sample_data_registered(widget: Any, app: Application) -> None:
    import SampleData
    import slicer

    assert slicer.modules.brighten.title == "Brighten"
    assert slicer.modules.brighten.path == str(EXAMPLE)
    assert SampleData.SampleDataLogic.registered[-1].sampleName == "Bright"
