"""Fuse: a CT and an MR become one volume."""

from __future__ import annotations

from typing import Any

import slicer
from slicer.i18n import tr as _

from . import fusion, geometry, vocabulary, volume_input
from .choices import Choices
from .fusion import FusionOptions, FusionReport
from .run_section import RunSection, RunWidgets, noted
from .trouble import Trouble

WAVES = ("haar", *(f"db{number}" for number in range(2, 9)), "bior2.2", "bior4.4", "coif2", "coif4")


class FuseSection(RunSection):
    """Reads the choices, runs the fusion, shows the result; offers to register a pair that was refused."""

    def __init__(self, ui, panel) -> None:
        """Args:
        ui: the panel's widgets.
        panel: gives ``session``, ``parameters``, ``device``, ``start(work, ...)``, ``ready(label)`` and ``say(...)``.
        """
        widgets = RunWidgets(ui.fuseButton, ui.fuseCancelButton, ui.fuseProgressBar, ui.fuseStatusLabel)
        RunSection.__init__(self, panel, widgets)
        self.ui = ui
        self._methods = vocabulary.fusions()
        self._usual = fusion.usual_method()
        self._pair: tuple[Any, Any] = (None, None)
        self._cautioned: tuple[Any, str] | None = None
        self._updating = False
        self._choices = Choices()
        self._choices.fill(ui.fuseMethodComboBox, [(method.title, method.name) for method in self._methods])
        self._choices.fill(ui.fuseWaveComboBox, [(_("The method's own"), ""), *((wave, wave) for wave in WAVES)])
        shows = [
            (_("The fused volume alone"), fusion.ALONE),
            (_("Blended over the CT"), fusion.OVER_CT),
            (_("Blended over the MR"), fusion.OVER_MR),
        ]
        self._choices.fill(ui.fuseShowComboBox, shows)
        for combo in (ui.fuseMethodComboBox, ui.fuseWaveComboBox):
            combo.currentIndexChanged.connect(self._edited)
        ui.fuseShowComboBox.currentIndexChanged.connect(lambda *ignored: self._show_chosen())
        ui.fuseOpacitySlider.valueChanged.connect(self._set_opacity)
        ui.registerAndFuseButton.clicked.connect(lambda *ignored: self._register_and_fuse())
        ui.fuseAnywayButton.clicked.connect(lambda *ignored: self.apply(check=False))
        self._offer(False, False)

    # What the section is set to

    @property
    def method(self) -> vocabulary.KnownFusion:
        return self._methods[max(self.ui.fuseMethodComboBox.currentIndex, 0)]

    def options(self, check: bool = True) -> FusionOptions:
        """How to fuse, as the section is set. What the method does not have is left out."""
        parameters, method = self.panel.parameters, self.method
        return FusionOptions(
            method.name,
            (self._choices.chosen(self.ui.fuseWaveComboBox) or None) if method.takes_wave else None,
            (parameters.fuseLevels or None) if method.takes_levels else None,
            parameters.fuseRegister,
            check,
            parameters.fuseMasks,
            self.panel.device,
        )

    def why_not_apply(self) -> str:
        """Why Apply cannot be pressed, as a sentence; empty when it can."""
        parameters = self.panel.parameters
        if parameters is None:
            return _("The scene is being closed.")
        if self.busy:
            return _("A run is on its way.")
        sentence = fusion.why_not(parameters.fuseCT, parameters.fuseMR, parameters.fuseOutput)
        if not sentence and parameters.fuseRegister and volume_input.is_picture(parameters.fuseCT):
            sentence = _("Pictures have no place in the patient to register by. Untick 'Register first'.")
        return sentence

    def guess(self) -> None:
        """Choose the first CT and MR that names or DICOM headers tell of, where none was chosen."""
        parameters = self.panel.parameters
        nodes = [
            node
            for node in slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode")
            if not node.IsA("vtkMRMLLabelMapVolumeNode") and not fusion.is_fused(node)
        ]
        if not parameters.fuseCT:
            parameters.fuseCT = next(filter(fusion.looks_like_ct, nodes), None)
        if not parameters.fuseMR:
            parameters.fuseMR = next(filter(fusion.looks_like_mr, nodes), None)

    def show_parameters(self) -> None:
        """From the parameter node to the widgets it does not connect by itself."""
        parameters = self.panel.parameters
        self._updating = True
        self._choices.choose(self.ui.fuseMethodComboBox, parameters.fuseMethod or self._usual)
        self._choices.choose(self.ui.fuseWaveComboBox, parameters.fuseWave)
        self._choices.choose(self.ui.fuseShowComboBox, parameters.fuseShow)
        self._updating = False
        pair = (parameters.fuseCT, parameters.fuseMR)
        if pair != self._pair:
            self._pair = pair
            self._forget_message()
            output = parameters.fuseOutput
            if output is not None and fusion.is_fused(output) and fusion.sources(output) != pair and not self.busy:
                parameters.fuseOutput = None

    def update(self) -> None:
        """Which widgets can be used, and why not."""
        reason = self.why_not_apply()
        ui, parameters = self.ui, self.panel.parameters
        ui.fuseButton.setEnabled(not reason)
        ui.fuseButton.toolTip = reason or _("Fuse the two volumes.")
        ui.fuseCancelButton.setEnabled(self.busy)
        for widget in (ui.fuseWaveLabel, ui.fuseWaveComboBox):
            widget.setEnabled(self.method.takes_wave)
        for widget in (ui.fuseLevelsLabel, ui.fuseLevelsSpinBox):
            widget.setEnabled(self.method.takes_levels)
        blended = parameters is not None and parameters.fuseShow != fusion.ALONE
        for widget in (ui.fuseOpacityLabel, ui.fuseOpacitySlider):
            widget.setEnabled(blended)
        if parameters is not None:
            self._say_idle(reason or self._caution(parameters.fuseCT, parameters.fuseMR))

    def _caution(self, ct, mr) -> str:
        """Asked for often, and DICOM headers are slow to read: kept until something it depends on changes."""
        key = tuple((node.GetID(), node.GetName(), node.GetTransformNodeID()) for node in (ct, mr))
        if self._cautioned is None or self._cautioned[0] != key:
            self._cautioned = key, fusion.caution(ct, mr)
        return self._cautioned[1]

    def _edited(self, *ignored: Any) -> None:
        parameters = self.panel.parameters
        if self._updating or parameters is None:
            return
        self._forget_message()
        method = self._choices.chosen(self.ui.fuseMethodComboBox)
        # until another one is chosen, the best that is here
        if parameters.fuseMethod or method != self._usual:
            parameters.fuseMethod = method
        parameters.fuseWave = self._choices.chosen(self.ui.fuseWaveComboBox)

    # Work

    def apply(self, check: bool = True) -> None:
        """Start a run. ``check=False`` takes a pair as it lies."""
        if self.why_not_apply() or not self.panel.ready(self.ui.fuseStatusLabel):
            return
        parameters = self.panel.parameters
        ct, mr, output = parameters.fuseCT, parameters.fuseMR, parameters.fuseOutput
        self._offer(False, False)
        work = fusion.fuse_work(self.panel.session, ct, mr, output, self.options(check))
        self._run(work, (ct, mr, output), self._fused, _("Handing the volumes over …"))

    def abandon(self, sentence: str) -> None:
        """End a run at once, because its scene is gone."""
        RunSection.abandon(self, sentence)
        self._pair, self._cautioned = (None, None), None

    def _register_and_fuse(self) -> None:
        self.panel.parameters.fuseRegister = True
        self.apply()

    def _fused(self, report: FusionReport) -> None:
        # the user may have gone to another module, or another pair, meanwhile
        parameters = self.panel.parameters or self.panel.logic.getParameterNode()
        if (parameters.fuseCT, parameters.fuseMR) == (report.ct_node, report.mr_node):
            parameters.fuseOutput = report.output_node
        fusion.show(report.ct_node, report.mr_node, report.output_node, parameters.fuseShow, parameters.fuseOpacity)
        self._say(noted(report.sentences, report.warnings))
        self.panel.result_changed()

    def _failed(self, trouble: Trouble) -> None:
        RunSection._failed(self, trouble)
        parameters, refused = self.panel.parameters, trouble.code == fusion.NOT_REGISTERED
        if refused and parameters is not None and parameters.fuseCT and parameters.fuseMR:
            meet = geometry.boxes_meet(parameters.fuseMR, parameters.fuseCT)
            can_register = not parameters.fuseRegister and not volume_input.is_picture(parameters.fuseCT)
            self._offer(can_register, meet)

    def _offer(self, register: bool, anyway: bool) -> None:
        """Show what can be done about a pair that was refused."""
        self.ui.registerAndFuseButton.setVisible(register)
        self.ui.fuseAnywayButton.setVisible(anyway)

    def _forget_message(self) -> None:
        RunSection._forget_message(self)
        if not self.busy:
            self._offer(False, False)

    # Views

    def _show_chosen(self) -> None:
        """Show the volume that was fused before as it is wanted now."""
        parameters = self.panel.parameters
        if self._updating or parameters is None:
            return
        parameters.fuseShow = self._choices.chosen(self.ui.fuseShowComboBox)
        node = parameters.fuseOutput
        if node is not None and fusion.is_fused(node):
            fusion.show(*fusion.sources(node), node, parameters.fuseShow, parameters.fuseOpacity)

    def _set_opacity(self, opacity: float) -> None:
        parameters = self.panel.parameters
        node = parameters.fuseOutput if parameters is not None else None
        if node is None:
            return
        for composite in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode"):
            if composite.GetForegroundVolumeID() == node.GetID():
                composite.SetForegroundOpacity(opacity)
