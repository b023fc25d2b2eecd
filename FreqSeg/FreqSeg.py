"""FreqSeg: type what you look for, get a segmentation."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import ctk
import qt
import slicer
import vtk
from FreqSegPanel import fusion, geometry, segmentation_writer, spectral, vocabulary, volume_input
from FreqSegPanel.choices import Choices
from FreqSegPanel.fusion import FusionOptions, FusionReport
from FreqSegPanel.packages import Packages
from FreqSegPanel.run_section import noted
from FreqSegPanel.sample_data import register_sample_data
from FreqSegPanel.session import Options, Prompt, SegmentReport, Session, default_client
from FreqSegPanel.spectral import SpectralReport
from FreqSegPanel.tasks import Client, Progress, Task, Work
from FreqSegPanel.trouble import Trouble
from slicer import vtkMRMLMarkupsROINode, vtkMRMLScalarVolumeNode, vtkMRMLSegmentationNode
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.parameterNodeWrapper import parameterNodeWrapper
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleTest,
    ScriptedLoadableModuleWidget,
)
from slicer.util import VTKObservationMixin

TICK_MILLISECONDS = 25


class FreqSeg(ScriptedLoadableModule):
    """What Slicer shows of the module."""

    def __init__(self, parent) -> None:
        ScriptedLoadableModule.__init__(self, parent)
        self.parent.title = _("FreqSeg")
        self.parent.categories = [translate("qSlicerAbstractCoreModule", "Segmentation")]
        self.parent.dependencies = []
        self.parent.contributors = ["FreqSeg contributors"]
        self.parent.helpText = _(
            'Type what you look for, such as "brain tumour", and get a segmentation. Choose a volume, type, and press '
            "Apply. The built-in preset runs on a plain computer without a network. Trained models segment what they "
            "know without typing, and a CT and an MR can be fused into one volume. For research, not for diagnosis."
        )
        self.parent.helpText += self.getDefaultModuleDocumentationLink()
        self.parent.acknowledgementText = _(
            "Stands on LiteMedSAM, all-MiniLM-L6-v2, BiomedCLIP, Segment Anything, MONAI, PyTorch and 3D Slicer. The "
            "trained part of the built-in preset is for research, not for commercial use."
        )
        slicer.app.connect("startupCompleted()", register_sample_data)


@parameterNodeWrapper
class FreqSegParameterNode:
    """What the panel was set to; kept with the scene.

    ``prompts`` and ``settings`` are JSON: rows of text and colour, and the library's settings that differ from their
    defaults.
    """

    inputVolume: vtkMRMLScalarVolumeNode
    region: vtkMRMLMarkupsROINode
    segmentation: vtkMRMLSegmentationNode
    spectralVolume: vtkMRMLScalarVolumeNode
    spectralSegmentation: vtkMRMLSegmentationNode
    fuseCT: vtkMRMLScalarVolumeNode
    fuseMR: vtkMRMLScalarVolumeNode
    fuseOutput: vtkMRMLScalarVolumeNode
    prompts: str = ""
    preset: str = "lite"
    axis: str = "auto"
    method: str = ""
    device: str = "auto"
    settings: str = ""
    samModel: str = ""
    clipFolder: str = ""
    samFile: str = ""
    uncertainty: bool = False
    show3D: bool = False
    overlayOpacity: float = 0.6
    spectralModel: str = ""
    spectralUncertainty: bool = False
    spectralMethod: str = "flips"
    fuseMethod: str = ""
    fuseWave: str = ""
    fuseLevels: int = 0
    fuseRegister: bool = False
    fuseMasks: bool = False
    fuseShow: str = "alone"
    fuseOpacity: float = 0.5


class FreqSegWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """The panel: it shows and asks; work is done by the logic's session and the worker."""

    def __init__(self, parent=None, logic: FreqSegLogic | None = None, packages: Packages | None = None) -> None:
        """Args:
        parent: the parent widget.
        logic, packages: in place of the usual ones.
        """
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.logic = logic
        self.packages = packages or Packages()
        self._packages_found = False
        self._parameterNode: FreqSegParameterNode | None = None
        self._parameterNodeGuiTag = None
        self._updating = False
        self._task: Task | None = None
        self._observed_segmentation = None
        self._shown_volume = None
        self._has_message = False

    # Set-up and the scene

    def setup(self) -> None:
        """Build the panel. Neither torch nor the worker is started here."""
        ScriptedLoadableModuleWidget.setup(self)
        from FreqSegPanel.advanced_form import AdvancedForm
        from FreqSegPanel.fuse_section import FuseSection
        from FreqSegPanel.look_section import LookSection
        from FreqSegPanel.models_section import ModelsSection
        from FreqSegPanel.prompts_table import PromptsTable
        from FreqSegPanel.refine_section import RefineSection
        from FreqSegPanel.spectral_section import SpectralSection

        uiWidget = slicer.util.loadUI(self.resourcePath("UI/FreqSeg.ui"))
        self.layout.addWidget(uiWidget)
        self.ui = slicer.util.childWidgetVariables(uiWidget)
        uiWidget.setMRMLScene(slicer.mrmlScene)
        if self.logic is None:
            self.logic = FreqSegLogic()
        self.session: Session = self.logic.session

        for editor in (self.ui.clipFolderEdit, self.ui.spectralFolderEdit, self.ui.weightsFolderEdit):
            editor.filters = ctk.ctkPathLineEdit.Dirs

        self.timer = qt.QTimer()
        self.timer.setInterval(TICK_MILLISECONDS)
        self.timer.timeout.connect(self._tick)
        self._known_presets = vocabulary.presets()
        # light, but a blink at the first Apply
        importlib.import_module("FreqSegLib.worker_client")
        self._fill_choices()
        self.prompts = PromptsTable(self.ui.promptsTable, self._edited)
        self.advanced = AdvancedForm(self.ui.advancedLayout, self._edited)
        self.refine = RefineSection(self.ui, self)
        self.spectral = SpectralSection(self.ui, self)
        self.fuse = FuseSection(self.ui, self)
        self.look = LookSection(self.ui, self)
        self.models = ModelsSection(self.ui, self)

        for event, handler in (
            (slicer.mrmlScene.StartCloseEvent, self.onSceneStartClose),
            (slicer.mrmlScene.EndCloseEvent, self.onSceneEndClose),
            (slicer.mrmlScene.EndImportEvent, self.onSceneEndImport),
            (slicer.mrmlScene.NodeAboutToBeRemovedEvent, self.onNodeRemoved),
        ):
            self.addObserver(slicer.mrmlScene, event, handler)
        self.ui.addPromptButton.clicked.connect(lambda *ignored: self.prompts.add())
        self.ui.removePromptButton.clicked.connect(lambda *ignored: self.prompts.remove())
        for combo in (
            self.ui.presetComboBox,
            self.ui.methodComboBox,
            self.ui.axisComboBox,
            self.ui.deviceComboBox,
            self.ui.samModelComboBox,
        ):
            combo.currentIndexChanged.connect(self._edited)
        self.ui.clipFolderEdit.currentPathChanged.connect(self._edited)
        self.ui.samFileEdit.currentPathChanged.connect(self._edited)
        self.ui.regionSelector.connect("nodeAddedByUser(vtkMRMLNode*)", self._fit_region)
        self.ui.applyButton.clicked.connect(lambda *ignored: self.onApplyButton())
        self.ui.cancelButton.clicked.connect(lambda *ignored: self.onCancelButton())
        self.ui.previewButton.clicked.connect(lambda *ignored: self.onPreviewButton())
        self.ui.undoButton.clicked.connect(lambda *ignored: self.onUndoButton())
        self.ui.editorButton.clicked.connect(lambda *ignored: self.onEditorButton())
        self.ui.getMissingButton.clicked.connect(lambda *ignored: self._get_missing())
        self.ui.getMissingButton.setVisible(False)
        self.ui.progressBar.setVisible(False)
        self.initializeParameterNode()

    def cleanup(self) -> None:
        """Called when Slicer closes or the module is reloaded: the worker ends too."""
        self.timer.stop()
        self.removeObservers()
        self.refine.forget()
        self.logic.close()

    def enter(self) -> None:
        self.initializeParameterNode()

    def exit(self) -> None:
        if self._parameterNode:
            self._parameterNode.disconnectGui(self._parameterNodeGuiTag)
            self._parameterNodeGuiTag = None
            self.removeObserver(self._parameterNode, vtk.vtkCommand.ModifiedEvent, self._parameters_changed)
            self._parameterNode = None

    def onSceneStartClose(self, caller, event) -> None:
        sentence = _("The scene was closed; the run was stopped.")
        if self._task is not None:
            self.session.runner.abandon(self._task, sentence)
        self.spectral.abandon(sentence)
        self.fuse.abandon(sentence)
        self.refine.forget()
        self._observe_segmentation(None)
        self.setParameterNode(None)

    def onSceneEndClose(self, caller, event) -> None:
        if self.session.started:
            self.session.scene_closed()
        if self.parent.isEntered:
            self.initializeParameterNode()

    def onSceneEndImport(self, caller, event) -> None:
        if self.parent.isEntered:
            self.setParameterNode(None)
            self.initializeParameterNode()

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def onNodeRemoved(self, caller, event, node) -> None:
        if isinstance(node, vtkMRMLScalarVolumeNode) and self.session.started:
            self.session.forget_volume(node.GetID())
        if node is self._observed_segmentation:
            self._observe_segmentation(None)

    def initializeParameterNode(self) -> None:
        """Connect the panel to the scene's parameter node, choosing the first volume where none was chosen."""
        self.setParameterNode(self.logic.getParameterNode())
        parameters = self._parameterNode
        if not parameters.inputVolume:
            node = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLScalarVolumeNode")
            if node is not None and not node.IsA("vtkMRMLLabelMapVolumeNode"):
                parameters.inputVolume = node
        self.spectral.guess()
        self.fuse.guess()

    def setParameterNode(self, node: FreqSegParameterNode | None) -> None:
        if self._parameterNode:
            self._parameterNode.disconnectGui(self._parameterNodeGuiTag)
            self.removeObserver(self._parameterNode, vtk.vtkCommand.ModifiedEvent, self._parameters_changed)
        self._parameterNode = node
        if node:
            self._shown_volume = node.inputVolume
            self._has_message = False
            self._parameterNodeGuiTag = node.connectGui(self.ui)
            self.addObserver(node, vtk.vtkCommand.ModifiedEvent, self._parameters_changed)
            self._parameters_changed()

    # What the panel is set to

    @property
    def parameters(self) -> FreqSegParameterNode | None:
        """None while another module is open, or the scene is being closed."""
        return self._parameterNode

    @property
    def volume(self):
        return self._parameterNode.inputVolume if self._parameterNode else None

    @property
    def segmentation(self):
        return self._parameterNode.segmentation if self._parameterNode else None

    @property
    def opacity(self) -> float:
        return self._parameterNode.overlayOpacity if self._parameterNode else 0.6

    @property
    def busy(self) -> bool:
        return self._task is not None and not self._task.finished

    @property
    def device(self) -> str:
        return self._choices.chosen(self.ui.deviceComboBox)

    @property
    def preset(self) -> vocabulary.KnownPreset:
        return self._known_presets[max(self.ui.presetComboBox.currentIndex, 0)]

    def options(self) -> Options:
        """How to segment, as the panel is set."""
        settings = dict(self.advanced.values)
        axis = self._choices.chosen(self.ui.axisComboBox)
        if axis != "auto":
            settings["axis"] = axis
        method = self._choices.chosen(self.ui.methodComboBox)
        if method not in ("", "auto"):
            settings["method"] = method
        preset = self.preset
        own = preset.name == vocabulary.OWN_WEIGHTS
        return Options(
            preset.library_name,
            self.device,
            settings,
            self._parameterNode.uncertainty,
            (self._choices.chosen(self.ui.samModelComboBox) or None) if preset.takes_other_weights else None,
            self.ui.clipFolderEdit.currentPath.strip() or None if own else None,
            self.ui.samFileEdit.currentPath.strip() or None if own else None,
        )

    def why_not_apply(self) -> str:
        """Why Apply cannot be pressed, as a sentence; empty when it can."""
        if self._parameterNode is None:
            return _("The scene is being closed.")
        if self.busy:
            return _("A run is on its way.")
        sentence = volume_input.why_not(self.volume)
        if sentence:
            return sentence
        prompts = [prompt.text.lower() for prompt in self.prompts.prompts]
        if not prompts:
            return _('Type what to look for, such as "brain tumour".')
        if len(set(prompts)) < len(prompts):
            return _("Two rows look for the same thing. Remove one.")
        region = self._parameterNode.region
        if region is not None and geometry.roi_bounds(region, self.volume) is None:
            sentence = _("The region '{region}' lies outside '{volume}'. Move it onto the volume, or choose none.")
            return sentence.format(region=region.GetName(), volume=self.volume.GetName())
        if self.preset.name == vocabulary.OWN_WEIGHTS:
            for editor in (self.ui.clipFolderEdit, self.ui.samFileEdit):
                path = editor.currentPath.strip()
                if path and not os.path.exists(path):
                    return _("'{path}' is not there. Choose another file or folder.").format(path=path)
        return ""

    def _fill_choices(self) -> None:
        self._choices = Choices()
        self._choices.fill(self.ui.presetComboBox, [(preset.title, preset.name) for preset in self._known_presets])
        self._choices.fill(
            self.ui.axisComboBox,
            [
                (_("Automatic"), "auto"),
                (_("Axial"), "axial"),
                (_("Coronal"), "coronal"),
                (_("Sagittal"), "sagittal"),
            ],
        )
        self._choices.fill(
            self.ui.deviceComboBox,
            [(_("Automatic"), "auto"), (_("Processor"), "cpu"), (_("Graphics card (CUDA)"), "cuda")],
        )
        self._choices.fill(
            self.ui.samModelComboBox, [(_("The preset's own"), ""), *((n, n) for n in vocabulary.sam_choices())]
        )
        methods = vocabulary.methods()
        self._choices.fill(self.ui.methodComboBox, [(title, name) for name, title in methods])
        for widget in (self.ui.methodLabel, self.ui.methodComboBox):
            widget.setVisible(len(methods) > 1)

    def _edited(self, *ignored: Any) -> None:
        """From the widgets that the parameter node does not connect by itself."""
        if self._updating or self._parameterNode is None:
            return
        parameters = self._parameterNode
        wasModifying = parameters.StartModify() if hasattr(parameters, "StartModify") else None
        parameters.prompts = self.prompts.text
        parameters.settings = self.advanced.text
        parameters.preset = self.preset.name
        parameters.axis = self._choices.chosen(self.ui.axisComboBox)
        parameters.method = self._choices.chosen(self.ui.methodComboBox)
        parameters.device = self.device
        parameters.samModel = self._choices.chosen(self.ui.samModelComboBox)
        parameters.clipFolder = self.ui.clipFolderEdit.currentPath
        parameters.samFile = self.ui.samFileEdit.currentPath
        if wasModifying is not None:
            parameters.EndModify(wasModifying)
        self._parameters_changed()

    def _parameters_changed(self, caller=None, event=None) -> None:
        """From the parameter node to the widgets it does not connect by itself."""
        if self._updating or self._parameterNode is None:
            return
        self._updating = True
        parameters = self._parameterNode
        if parameters.inputVolume is not self._shown_volume:
            self._shown_volume = parameters.inputVolume
            self._go_to_results_of_the_volume()
        self._choices.choose(self.ui.presetComboBox, parameters.preset)
        self._choices.choose(self.ui.axisComboBox, parameters.axis)
        self._choices.choose(self.ui.methodComboBox, parameters.method)
        self._choices.choose(self.ui.deviceComboBox, parameters.device)
        self._choices.choose(self.ui.samModelComboBox, parameters.samModel)
        for editor, path in (
            (self.ui.clipFolderEdit, parameters.clipFolder),
            (self.ui.samFileEdit, parameters.samFile),
        ):
            if editor.currentPath != path:
                editor.setCurrentPath(path)
        preset = self.preset
        self.prompts.set_targets(list(preset.targets), preset.takes_any_prompt)
        self.prompts.text = parameters.prompts
        self.advanced.text = parameters.settings
        self.ui.targetsLabel.text = vocabulary.targets_sentence(preset)
        self.ui.presetComboBox.toolTip = preset.description
        own = preset.name == vocabulary.OWN_WEIGHTS
        self.ui.ownWeightsWidget.setVisible(preset.takes_other_weights)
        for widget in (self.ui.clipFolderLabel, self.ui.clipFolderEdit, self.ui.samFileLabel, self.ui.samFileEdit):
            widget.setVisible(own)
        self.spectral.show_parameters()
        self.fuse.show_parameters()
        self._observe_segmentation(parameters.segmentation)
        self._updating = False
        self._update()

    def _update(self) -> None:
        """Which buttons can be pressed, and why not."""
        reason = self.why_not_apply()
        self.ui.applyButton.setEnabled(not reason)
        self.ui.applyButton.toolTip = reason or _("Segment the volume.")
        self.ui.previewButton.setEnabled(not reason)
        self.ui.previewButton.toolTip = reason or _("Segment only the slice shown.")
        self.ui.cancelButton.setEnabled(self.busy)
        node = self.segmentation
        no_undo = self.session.writer.why_no_undo(node)
        self.ui.undoButton.setEnabled(not no_undo and not self.busy)
        self.ui.undoButton.toolTip = no_undo or _("Take the last result back; your other segments stay.")
        self.ui.editorButton.setEnabled(node is not None)
        if self._parameterNode is not None:
            self.refine.update()
            self.spectral.update()
            self.fuse.update()
            self.look.update()
        if not self.busy and not self._has_message:
            self.say(reason or self._caution())

    def _caution(self) -> str:
        """What the user should know before pressing Apply."""
        sentences = []
        for prompt in self.prompts.prompts:
            target = vocabulary.known_as(prompt.text, self.preset.targets)
            if target is not None:
                sentences.append(
                    volume_input.contrast_warning(self.volume, target.modality, target.modality_name, target.name)
                )
        sentences.append(segmentation_writer.other_grid_note(self.volume, self.segmentation))
        return "\n".join(dict.fromkeys(sentence for sentence in sentences if sentence))

    def _go_to_results_of_the_volume(self) -> None:
        """Another volume has results of its own: go to them, or to a new segmentation."""
        self._has_message = False
        if self.volume is not None and not self.busy:
            self._parameterNode.segmentation = segmentation_writer.results_of(self.volume, self.segmentation)

    def _fit_region(self, node) -> None:
        """A new region starts as the whole volume."""
        if node is None or self.volume is None:
            return
        bounds = [0.0] * 6
        self.volume.GetRASBounds(bounds)
        node.SetCenter([(bounds[0] + bounds[1]) / 2, (bounds[2] + bounds[3]) / 2, (bounds[4] + bounds[5]) / 2])
        node.SetSize([bounds[1] - bounds[0], bounds[3] - bounds[2], bounds[5] - bounds[4]])

    def _observe_segmentation(self, node) -> None:
        if node is self._observed_segmentation:
            return
        events = (
            slicer.vtkSegmentation.SegmentAdded,
            slicer.vtkSegmentation.SegmentRemoved,
            vtk.vtkCommand.ModifiedEvent,
        )
        if self._observed_segmentation is not None:
            self.removeObservers(self._segments_changed)
        self._observed_segmentation = node
        if node is not None:
            for event in events:
                self.addObserver(node.GetSegmentation(), event, self._segments_changed)

    def _segments_changed(self, caller, event) -> None:
        if not self._updating and not self.busy:
            self._update()

    # Work

    def start(
        self,
        work: Work,
        nodes: Sequence[Any] = (),
        on_done: Callable[[Any], None] | None = None,
        on_trouble: Callable[[Trouble], None] | None = None,
        say_progress: Callable[[Progress], None] | None = None,
    ) -> Task:
        """Start a task; the timer does the rest."""
        task = self.session.task(work, nodes, on_done=on_done, on_trouble=on_trouble, on_progress=say_progress)
        self.timer.start()
        return task

    def restart_worker(self) -> None:
        """After packages or folders changed: the next run starts another worker."""
        if self.session.started and not (self.busy or self.spectral.busy or self.fuse.busy):
            self.session.restart()

    def _tick(self) -> None:
        if not self.session.started or not self.session.runner.busy:
            self.timer.stop()
            return
        self.session.runner.tick()

    def onApplyButton(self) -> None:
        if self.why_not_apply() or not self.ready():
            return
        parameters = self._parameterNode
        self._has_message = True
        self.ui.getMissingButton.setVisible(False)
        self.session.clear_preview()
        self._run(
            self.session.segment_work(
                parameters.inputVolume,
                self.prompts.prompts,
                parameters.segmentation,
                self.options(),
                parameters.region,
                parameters.show3D,
            ),
            (parameters.inputVolume, parameters.segmentation),
            self._applied,
        )

    def onPreviewButton(self) -> None:
        if self.why_not_apply() or not self.ready():
            return
        volume = self.volume
        along = geometry.stack_axis(volume, self._choices.chosen(self.ui.axisComboBox))
        index = self._current_slice(along)
        self._has_message = True
        self._run(
            self.session.preview_work(volume, self.prompts.prompts, self.options(), along, index),
            (volume,),
            self._previewed,
        )

    def onCancelButton(self) -> None:
        if self.busy:
            self.say(_("Stopping …"))
            self.session.runner.cancel(self._task)

    def onUndoButton(self) -> None:
        self._has_message = True
        try:
            self.session.writer.undo(self.segmentation)
            self.say(_("The last result was taken back."))
        except Trouble as trouble:
            self.say(trouble.message, True)
        self.refine.done()
        self._update()

    def onEditorButton(self) -> None:
        """Go to the Segment Editor with this segmentation, this volume and the chosen segment."""
        try:
            # leaving the panel lets go of its parameter node
            segmentation, volume, segment_id = self.segmentation, self.volume, self.refine.segment_id
            slicer.util.selectModule("SegmentEditor")
            editor = slicer.modules.segmenteditor.widgetRepresentation().self().editor
            editor.setSegmentationNode(segmentation)
            editor.setSourceVolumeNode(volume)
            if segment_id:
                editor.setCurrentSegmentID(segment_id)
        except (AttributeError, RuntimeError):
            logging.exception("FreqSeg: the Segment Editor could not be opened")
            self._has_message = True
            self.say(_("The Segment Editor could not be opened. Choose it in the list of modules."), True)

    def ready(self, label=None) -> bool:
        """Whether the Python packages are there, after asking once; what is to be said is said in ``label``."""
        if self._packages_found:
            return True

        def say(sentence: str) -> None:
            self.say(sentence, label=label)
            slicer.app.processEvents()

        sentence = self.packages.ensure(say)
        self._has_message = bool(sentence)
        if sentence:
            self.say(sentence, True, label)
        self._packages_found = not sentence
        return self._packages_found

    def _run(self, work: Work, nodes: Sequence[Any], done: Callable[[Any], None]) -> None:
        def ended(result: Any) -> None:
            self._end()
            done(result)

        self._task = self.start(work, nodes, ended, self._failed, self._progress)
        self.ui.progressBar.setMaximum(0)
        self.ui.progressBar.setVisible(True)
        self.say(_("Handing the volume over …"))
        self._update()

    def _end(self) -> None:
        self._task = None
        self.ui.progressBar.setVisible(False)

    def _progress(self, progress: Progress) -> None:
        self.ui.progressBar.setMaximum(max(progress.total, 1))
        self.ui.progressBar.setValue(progress.done)
        self.say(progress.sentence)

    def _applied(self, report: SegmentReport) -> None:
        # the user may have gone to another module, or another volume, meanwhile
        parameters = self._parameterNode or self.logic.getParameterNode()
        if parameters.inputVolume is report.volume_node:
            parameters.segmentation = report.segmentation_node
        self._has_message = True
        self.say(noted(report.sentences, report.warnings))
        self._update()
        if report.segment_ids:
            self.refine.choose(report.segment_ids[0])

    def _previewed(self, sentences: list[str]) -> None:
        self._has_message = True
        self.say("\n".join(sentences))
        self._update()

    def _failed(self, trouble: Trouble) -> None:
        self._end()
        self._has_message = True
        self.say(trouble.message, trouble.code != "cancelled")
        self.ui.getMissingButton.setVisible(trouble.code == "weights")
        self._update()

    def result_changed(self) -> None:
        """After a refinement or a look."""
        self._update()

    def _get_missing(self) -> None:
        """Fetch what the preset needs, after asking."""
        preset = self.preset.library_name

        def listed(models: Any) -> None:
            wanted = self.models.missing_for(preset)
            if not wanted:
                self.say(_("Nothing is missing that can be downloaded. Press Apply again."))
                return
            self.models.get(wanted, then=self._weights_came)
            self.ui.modelsSection.setProperty("collapsed", False)

        self.start(self.models.list_work(), on_done=listed, on_trouble=self._failed)

    def _weights_came(self) -> None:
        self.ui.getMissingButton.setVisible(False)
        self.say(_("The models are here. Press Apply."))

    def _current_slice(self, along: int) -> int:
        """Number of the slice that is shown, along a voxel axis, from the slice view that looks along it."""
        volume = self.volume
        count = geometry.dimensions(volume)[along]
        best, found = -1.0, count // 2
        centre = [(size - 1) / 2 for size in geometry.dimensions(volume)]
        ahead = list(centre)
        ahead[along] += 1
        start, end = geometry.ijk_to_world(volume, [centre, ahead])
        direction = (end - start) / max(float(((end - start) ** 2).sum() ** 0.5), 1e-9)
        for node in slicer.util.getNodesByClass("vtkMRMLSliceNode"):
            matrix = geometry.matrix_array(node.GetSliceToRAS())
            fit = abs(float(direction @ matrix[:3, 2]))
            if fit > best + 1e-3:
                best = fit
                step = float(direction @ matrix[:3, 2])
                length = float(((end - start) ** 2).sum() ** 0.5)
                if abs(step) > 1e-3:
                    distance = float((matrix[:3, 3] - start) @ matrix[:3, 2]) / (step * length)
                    found = round(centre[along] + distance)
        return min(max(found, 0), count - 1)

    def say(self, sentence: str, is_trouble: bool = False, label=None) -> None:
        """Show a sentence in the panel."""
        label = label or self.ui.statusLabel
        label.text = sentence
        label.setStyleSheet("color: #c0392b;" if is_trouble else "")
        label.setVisible(bool(sentence))


class FreqSegLogic(ScriptedLoadableModuleLogic):
    """FreqSeg for scripts, without the panel.

    Example::

        from FreqSeg import FreqSegLogic

        logic = FreqSegLogic()
        report = logic.segment(volumeNode, ["brain tumour"])
        print(report.segmentation_node.GetName(), report.sentences)
        logic.close()
    """

    def __init__(self, make_client: Callable[[], Client] | None = None) -> None:
        """Args: make_client: makes the worker's client, when it is needed first."""
        ScriptedLoadableModuleLogic.__init__(self)
        self.session = Session(make_client or _client_of_the_user)

    def getParameterNode(self) -> FreqSegParameterNode:
        return FreqSegParameterNode(super().getParameterNode())

    def segment(
        self,
        volumeNode,
        prompts: Sequence[str] | str,
        segmentationNode=None,
        *,
        preset: str = "lite",
        settings: dict[str, Any] | None = None,
        uncertainty: bool = False,
        roiNode=None,
        device: str = "auto",
        progress: Callable[[Progress], None] | None = None,
        waitForCompletion: bool = True,
    ) -> SegmentReport | Task:
        """Segment a volume into a segmentation, one segment a prompt; other segments stay.

        Args:
            volumeNode: a scalar or colour volume.
            prompts: what to look for, such as ["brain tumour"].
            segmentationNode: where to write; a new one is made without it.
            preset: "lite" or another of the library's presets.
            settings: fields of FreqSegLib.settings.TextSegmentationSettings that differ from their defaults.
            uncertainty: measure it too.
            roiNode: look only inside this markups ROI.
            device: "auto", "cpu" or "cuda".
            progress: called with stage, done, total and seconds left.
            waitForCompletion: without it a task is returned at once, to be driven by ``logic.session.runner.tick()``.

        Returns:
            The report: segmentation node, segment ids in the order of the prompts, sentences and warnings.

        Raises:
            Trouble: with a sentence, and a code such as "weights" or "vocabulary".
        """
        sentence = volume_input.why_not(volumeNode)
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not sentence and not any(text.strip() for text in texts):
            sentence = _('No prompt was given. Say what to look for, such as "brain tumour".')
        if sentence:
            raise Trouble("input", sentence)
        options = Options(preset, device, dict(settings or {}), uncertainty)
        rows = [Prompt(text) for text in texts]
        work = self.session.segment_work(volumeNode, rows, segmentationNode, options, roiNode)
        task = self.session.task(work, (volumeNode, segmentationNode), on_progress=progress)
        return self.session.runner.finish(task) if waitForCompletion else task

    def segmentWithModel(
        self,
        volumeNode,
        model: str,
        segmentationNode=None,
        *,
        uncertainty: str | None = None,
        device: str = "auto",
        progress: Callable[[Progress], None] | None = None,
        waitForCompletion: bool = True,
    ) -> SpectralReport | Task:
        """Segment a volume with a trained spectral model, one segment for each structure it knows.

        Args:
            volumeNode: a volume or picture, as the model takes them.
            model: its name, such as "spectral-lungs", or its folder.
            segmentationNode: where to write; a new one is made without it.
            uncertainty: "auto", or "flips" or "dropout" where the model was trained for it, to measure it too.
            device: "auto", "cpu" or "cuda".
            progress: called with stage, done, total and seconds left.
            waitForCompletion: without it a task is returned at once, to be driven by ``logic.session.runner.tick()``.

        Returns:
            The report: segmentation node, segment ids, uncertainty volume, sentences and warnings.

        Raises:
            Trouble: with a sentence, and a code such as "input" or "weights".
        """
        from FreqSegPanel.models_section import weights_folder

        known = spectral.model_of(model, [weights_folder()])
        sentence = spectral.why_not(volumeNode, known)
        if sentence:
            raise Trouble("input", sentence)
        work = spectral.segment_work(
            self.session, volumeNode, segmentationNode, known, uncertainty=uncertainty, device=device
        )
        task = self.session.task(work, (volumeNode, segmentationNode), on_progress=progress)
        return self.session.runner.finish(task) if waitForCompletion else task

    def fuse(
        self,
        ctNode,
        mrNode,
        outputNode=None,
        *,
        method: str = "",
        wave: str | None = None,
        levels: int | None = None,
        register: bool = False,
        check: bool = True,
        masks: bool = False,
        device: str = "auto",
        progress: Callable[[Progress], None] | None = None,
        waitForCompletion: bool = True,
    ) -> FusionReport | Task:
        """Fuse a CT and an MR of one patient into a volume on the CT's grid, grey levels 0 to 255.

        Args:
            ctNode, mrNode: the two volumes, where their parent transforms put them.
            outputNode: the scalar volume to write into; a new one is made without it.
            method: one of FreqSegLib.fusion.METHODS; the first whose weights are here if left out.
            wave, levels: in place of the method's own.
            register: lay the MR on the CT first, rigidly. Neither source is moved in the scene.
            check: refuse a pair that does not lie on each other.
            masks: also make volumes of the CT's share of every band, in per cent.
            device: "auto", "cpu" or "cuda".
            progress: called with stage, done, total and seconds left.
            waitForCompletion: without it a task is returned at once, to be driven by ``logic.session.runner.tick()``.

        Returns:
            The report: the fused volume, the bands' volumes, sentences, warnings, and the record of how it was made.

        Raises:
            Trouble: with a sentence, and a code such as "input" or "not_registered".
        """
        sentence = fusion.why_not(ctNode, mrNode, outputNode)
        if sentence:
            raise Trouble("input", sentence)
        chosen = FusionOptions(method or fusion.usual_method(), wave, levels, register, check, masks, device)
        work = fusion.fuse_work(self.session, ctNode, mrNode, outputNode, chosen)
        task = self.session.task(work, (ctNode, mrNode, outputNode), on_progress=progress)
        return self.session.runner.finish(task) if waitForCompletion else task

    def close(self) -> None:
        """End the worker."""
        self.session.close()


def _client_of_the_user() -> Client:
    """A client whose worker keeps downloaded models where the user wants them."""
    from FreqSegPanel.models_section import weights_folder

    folder = weights_folder()
    return default_client({"FREQSEG_WEIGHTS": folder} if folder else {})


class FreqSegTest(ScriptedLoadableModuleTest):
    """Runs in Slicer: the simulated head's tumour, from the sample to the segment."""

    def setUp(self) -> None:
        slicer.mrmlScene.Clear()

    def runTest(self) -> None:
        self.setUp()
        self.test_the_simulated_tumour_is_found()
        self.setUp()
        self.test_the_simulated_pair_is_fused()

    def test_the_simulated_tumour_is_found(self) -> None:
        from FreqSegPanel.sample_data import sample_path

        path = sample_path("simulated_flair.nrrd")
        assert path is not None
        volume = slicer.util.loadVolume(str(path))
        missing = Packages().missing()
        if missing:
            self.delayDisplay(_("Packages are missing: {names}.").format(names=", ".join(missing)))
            return
        logic = FreqSegLogic()
        try:
            report = logic.segment(volume, ["brain tumour"])
        except Trouble as trouble:
            if trouble.code != "weights":
                raise
            self.delayDisplay(trouble.message)
            return
        finally:
            logic.close()
        mask = slicer.util.arrayFromSegmentBinaryLabelmap(report.segmentation_node, report.segment_ids[0], volume)
        assert mask.sum() > 0, "the simulated tumour was not found"
        self.delayDisplay(_("Test passed"))

    def test_the_simulated_pair_is_fused(self) -> None:
        from FreqSegPanel.sample_data import sample_path

        ct, mr = (slicer.util.loadVolume(str(sample_path(f"simulated_{kind}.nrrd"))) for kind in ("ct", "flair"))
        missing = Packages().missing()
        if missing:
            self.delayDisplay(_("Packages are missing: {names}.").format(names=", ".join(missing)))
            return
        logic = FreqSegLogic()
        try:
            report = logic.fuse(ct, mr, method="choose-max")
        finally:
            logic.close()
        fused, bone = slicer.util.arrayFromVolume(report.output_node), slicer.util.arrayFromVolume(ct) > 700
        assert fused[bone].mean() > 2 * fused[~bone].mean(), "the CT's bone is not in the fused volume"
        self.delayDisplay(_("Test passed"))
