"""A small scripted module in the shape of Slicer's template, for testing the stand-in."""
# ruff: noqa: F403, F405, UP045 (Slicer's modules import their base classes so, and its wrapper wants Optional)

import os
from typing import Annotated, Optional

import slicer
import vtk
from slicer import vtkMRMLMarkupsROINode, vtkMRMLScalarVolumeNode, vtkMRMLSegmentationNode
from slicer.i18n import tr as _
from slicer.parameterNodeWrapper import Choice, Default, Minimum, WithinRange, parameterNodeWrapper
from slicer.ScriptedLoadableModule import *
from slicer.util import VTKObservationMixin


class Brighten(ScriptedLoadableModule):
    def __init__(self, parent):
        ScriptedLoadableModule.__init__(self, parent)
        self.parent.title = _("Brighten")
        self.parent.categories = ["Examples"]
        self.parent.dependencies = []
        self.parent.contributors = ["the FreqSeg developers"]
        self.parent.helpText = _("Segments what is bright.")
        self.parent.acknowledgementText = ""
        slicer.app.connect("startupCompleted()", registerSampleData)


def registerSampleData():
    import SampleData

    SampleData.SampleDataLogic.registerCustomSampleDataSource(
        category="Brighten",
        sampleName="Bright",
        thumbnailFileName=os.path.join(os.path.dirname(__file__), "bright.png"),
        uris="https://example.org/bright.nrrd",
        fileNames="bright.nrrd",
        checksums="SHA256:" + 64 * "0",
        nodeNames="Bright",
    )


@parameterNodeWrapper
class BrightenParameterNode:
    inputVolume: vtkMRMLScalarVolumeNode
    roi: Optional[vtkMRMLMarkupsROINode]
    threshold: Annotated[float, WithinRange(-100, 600)] = 100
    invert: bool = False
    rounds: Annotated[int, Minimum(1), Default(3)]
    method: Annotated[str, Choice(["fast", "good"])] = "good"
    segmentName: str = "bright"
    history: list[str]
    output: vtkMRMLSegmentationNode


class BrightenWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    def __init__(self, parent=None):
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.logic = None
        self._parameterNode = None
        self._connection = None

    def setup(self):
        ScriptedLoadableModuleWidget.setup(self)
        uiWidget = slicer.util.loadUI(self.resourcePath("UI/Brighten.ui"))
        self.layout.addWidget(uiWidget)
        self.ui = slicer.util.childWidgetVariables(uiWidget)
        uiWidget.setMRMLScene(slicer.mrmlScene)
        self.logic = BrightenLogic()
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.StartCloseEvent, self.onSceneStartClose)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.EndCloseEvent, self.onSceneEndClose)
        self.ui.applyButton.connect("clicked(bool)", self.onApply)
        self.initializeParameterNode()

    def cleanup(self):
        self.removeObservers()

    def enter(self):
        self.initializeParameterNode()

    def exit(self):
        if self._connection is not None:
            self._parameterNode.disconnectGui(self._connection)
            self._connection = None
            self.removeObserver(self._parameterNode, vtk.vtkCommand.ModifiedEvent, self._checkCanApply)

    def onSceneStartClose(self, caller, event):
        self.setParameterNode(None)

    def onSceneEndClose(self, caller, event):
        if self.parent.isEntered:
            self.initializeParameterNode()

    def initializeParameterNode(self):
        self.setParameterNode(self.logic.getParameterNode())
        if not self._parameterNode.inputVolume:
            first = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLScalarVolumeNode")
            if first:
                self._parameterNode.inputVolume = first

    def setParameterNode(self, node):
        if self._connection is not None:
            self._parameterNode.disconnectGui(self._connection)
            self.removeObserver(self._parameterNode, vtk.vtkCommand.ModifiedEvent, self._checkCanApply)
            self._connection = None
        self._parameterNode = node
        if self._parameterNode:
            self._connection = self._parameterNode.connectGui(self.ui)
            self.addObserver(self._parameterNode, vtk.vtkCommand.ModifiedEvent, self._checkCanApply)
            self._checkCanApply()

    def _checkCanApply(self, caller=None, event=None):
        ready = bool(self._parameterNode and self._parameterNode.inputVolume and self._parameterNode.output)
        self.ui.applyButton.toolTip = _("Run") if ready else _("Select input and output")
        self.ui.applyButton.enabled = ready

    def onApply(self):
        with slicer.util.tryWithErrorDisplay(_("Failed to compute results."), waitCursor=True):
            node = self._parameterNode
            self.logic.process(node.inputVolume, node.output, node.threshold, node.invert, node.segmentName)
            node.history.append(f"{node.threshold:g}")


class BrightenLogic(ScriptedLoadableModuleLogic):
    def __init__(self):
        ScriptedLoadableModuleLogic.__init__(self)

    def getParameterNode(self):
        return BrightenParameterNode(super().getParameterNode())

    def process(self, volume, segmentation, threshold, invert, name):
        voxels = slicer.util.arrayFromVolume(volume)
        mask = (voxels < threshold) if invert else (voxels >= threshold)
        if not mask.any():
            raise ValueError("nothing is that bright")
        segmentation.CreateDefaultDisplayNodes()
        segmentation.SetReferenceImageGeometryParameterFromVolumeNode(volume)
        segmentId = segmentation.GetSegmentation().AddEmptySegment("", name, (1.0, 0.5, 0.0))
        slicer.util.updateSegmentBinaryLabelmapFromArray(mask.astype("uint8"), segmentation, segmentId, volume)
