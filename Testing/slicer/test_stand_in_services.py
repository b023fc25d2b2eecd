"""What a module asks of the application besides its panel: popups, packages, files, undo, terminology, Qt idiom."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from stand_in import Application


def test_questions_get_the_scripted_answer_and_are_refused_without_one(app: Application) -> None:
    import qt
    import slicer

    app.messages.answer("Yes")
    assert slicer.util.confirmYesNoDisplay("Download 91 MB?")
    assert not slicer.util.confirmYesNoDisplay("And again?")
    assert not slicer.util.confirmOkCancelDisplay("Really?")
    app.messages.answer("Cancel")
    answer = qt.QMessageBox.question(None, "Title", "Sure?", qt.QMessageBox.Ok | qt.QMessageBox.Cancel)
    assert answer == qt.QMessageBox.Cancel
    slicer.util.infoDisplay("Done.")
    assert [(message.kind, message.text, message.answer) for message in app.messages] == [
        ("question", "Download 91 MB?", "Yes"),
        ("question", "And again?", "No"),
        ("question", "Really?", "Cancel"),
        ("question", "Sure?", "Cancel"),
        ("information", "Done.", "Ok"),
    ]
    with pytest.raises(AssertionError, match="unexpected popup"), app.messages.none_expected():
        slicer.util.errorDisplay("Broken.")


def test_packages_are_asked_for_but_never_installed(app: Application) -> None:
    import slicer

    slicer.util.pip_install(["monai>=1.5", "PyWavelets"])
    app.packages.failure = RuntimeError("no network")
    with pytest.raises(RuntimeError, match="no network"):
        slicer.util.pip_install("open_clip_torch")
    assert app.packages.requested == ["monai>=1.5", "PyWavelets", "open_clip_torch"]


def test_the_heartbeat_sees_a_blocked_event_loop(app: Application) -> None:
    with app.heartbeat() as beat:
        app.process(0.1)
        quiet = beat.worst_gap
        time.sleep(0.3)
        app.process(0.05)
    assert beat.worst_gap >= 0.3
    assert quiet < beat.worst_gap


def test_what_a_slot_raises_is_kept(app: Application) -> None:
    import qt

    button = qt.QPushButton("Go")
    button.clicked.connect(lambda: 1 / 0)
    button.click()
    assert [type(exception) for exception in app.exceptions] == [ZeroDivisionError]
    app.exceptions.clear()


def test_qt_objects_follow_pythonqt(app: Application) -> None:
    import ctk
    import qt

    button = qt.QPushButton("Go")
    pressed: list[Any] = []
    button.connect("clicked()", lambda: pressed.append("clicked"))
    button.connect("toggled(bool)", pressed.append)
    button.checkable = True
    button.click()
    assert pressed == [True, "clicked"]
    assert (button.text, button.checked, button.className()) == ("Go", True, "QPushButton")
    with pytest.raises(AttributeError, match="tooltip"):
        button.tooltip = "misspelt"
    with pytest.raises(ValueError, match="no signal"):
        button.connect("pushed()", print)
    box = qt.QCheckBox()
    states: list[int] = []
    box.connect("stateChanged(int)", states.append)
    box.setChecked(True)
    assert states == [qt.Qt.Checked]
    holder = qt.QWidget()
    layout = qt.QVBoxLayout(holder)
    slider = ctk.ctkSliderWidget()
    slider.objectName = "amount"
    layout.addWidget(slider)
    slider.maximum = 5
    slider.value = 7.5
    assert slider.value == 5
    assert holder.findChild("ctkSliderWidget", "amount") is slider


def test_a_misspelt_property_in_a_ui_file_is_found(app: Application, tmp_path: Path) -> None:
    import slicer

    text = '<ui version="4.0"><widget class="QLabel" name="label"><property name="txt"><string>a</string></property>'
    (tmp_path / "bad.ui").write_text(text + "</widget></ui>")
    with pytest.raises(RuntimeError, match="has no property 'txt'"):
        slicer.util.loadUI(str(tmp_path / "bad.ui"))
    (tmp_path / "unknown.ui").write_text('<ui version="4.0"><widget class="qMRMLOddWidget" name="odd"/></ui>')
    with pytest.raises(RuntimeError, match="qMRMLOddWidget"):
        slicer.util.loadUI(str(tmp_path / "unknown.ui"))


def test_a_collapsible_section_hides_what_is_in_it(app: Application) -> None:
    import ctk
    import qt

    section = ctk.ctkCollapsibleButton()
    layout = qt.QFormLayout(section)
    label, hidden = qt.QLabel("text"), qt.QLabel("not shown")
    layout.addRow(label)
    layout.addRow(hidden)
    hidden.setVisible(False)
    section.show()
    section.click()
    assert section.collapsed
    assert not label.visible
    section.click()
    assert label.visible
    assert not hidden.visible


def test_files_come_and_go_through_the_io_manager(app: Application, tmp_path: Path) -> None:
    import slicer

    voxels = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    volume = slicer.util.addVolumeFromArray(voxels, ijkToRAS=np.diag([-0.5, -0.6, 3, 1]), name="Saved")
    assert slicer.util.saveNode(volume, str(tmp_path / "saved.nii.gz"), {})
    loaded = slicer.util.loadVolume(str(tmp_path / "saved.nii.gz"), {})
    np.testing.assert_array_equal(slicer.util.arrayFromVolume(loaded), voxels)
    assert loaded.GetName() == "saved"
    composite = slicer.app.layoutManager().sliceWidget("Green").mrmlSliceCompositeNode()
    assert composite.GetBackgroundVolumeID() == loaded.GetID()
    with pytest.raises(RuntimeError, match="file not found"):
        slicer.util.loadVolume(str(tmp_path / "missing.nrrd"), {})


def test_data_nodes_have_their_place_in_the_subject_hierarchy(app: Application) -> None:
    import slicer

    tree = slicer.mrmlScene.GetSubjectHierarchyNode()
    volume = slicer.util.addVolumeFromArray(np.zeros((3, 4, 5), np.uint8), name="Listed")
    item = tree.GetItemByDataNode(volume)
    assert item
    assert tree.GetItemName(item) == "Listed"
    study = tree.CreateStudyItem(tree.GetSceneItemID(), "Study")
    tree.SetItemParent(item, study)
    assert tree.GetItemParent(tree.GetItemByDataNode(volume)) == study
    slicer.mrmlScene.RemoveNode(volume)
    assert not tree.GetItemDataNode(item)


def test_a_segmentation_can_be_undone_and_a_term_found(app: Application) -> None:
    import slicer

    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "S")
    history = slicer.vtkSegmentationHistory()
    history.SetSegmentation(node.GetSegmentation())
    node.GetSegmentation().AddEmptySegment("a", "a")
    history.SaveState()
    node.GetSegmentation().AddEmptySegment("b", "b")
    assert history.RestorePreviousState()
    assert list(node.GetSegmentation().GetSegmentIDs()) == ["a"]
    entry = slicer.vtkSlicerTerminologyEntry()
    logic = slicer.modules.terminologies.logic()
    context = "Segmentation category and type - 3D Slicer General Anatomy list"
    assert logic.FindTypeInTerminologyBy3dSlicerLabel(context, "left kidney", entry)
    assert entry.GetTypeObject().GetCodeValue() == "64033007"


def test_the_segment_editor_gets_what_a_module_hands_over(app: Application) -> None:
    import slicer

    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "S")
    segment_id = node.GetSegmentation().AddEmptySegment("a", "a")
    slicer.util.selectModule("SegmentEditor")
    editor = slicer.modules.segmenteditor.widgetRepresentation().self().editor
    editor.setSegmentationNode(node)
    editor.setCurrentSegmentID(segment_id)
    assert slicer.modules.SegmentEditorWidget.editor.segmentationNode() is node
    assert editor.currentSegmentID() == "a"


def test_the_segment_selector_follows_the_segmentation(app: Application) -> None:
    import slicer

    selector = slicer.qMRMLSegmentSelectorWidget()
    selector.setMRMLScene(slicer.mrmlScene)
    chosen: list[str] = []
    selector.connect("currentSegmentChanged(QString)", chosen.append)
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "S")
    selector.setCurrentNode(node)
    for name in ("one", "two"):
        node.GetSegmentation().AddEmptySegment(name, name)
    assert selector.currentSegmentID() == "one"
    selector.setCurrentSegmentID("two")
    node.GetSegmentation().RemoveSegment("two")
    assert chosen == ["one", "two", "one"]
