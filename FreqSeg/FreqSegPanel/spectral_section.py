"""Segment with a trained model: it knows its structures, nothing is typed."""

from __future__ import annotations

import html
from typing import Any

import qt
from slicer.i18n import tr as _

from . import segmentation_writer, spectral
from .choices import Choices
from .models_section import shortened, weights_folder
from .run_section import RunSection, RunWidgets, noted
from .spectral import DROPOUT, FLIPS, KnownModel, SpectralReport
from .trouble import Trouble

FOLDER_KEY = "FreqSeg/OwnModelsFolder"


class SpectralSection(RunSection):
    """Lists the models, says what each is for, runs the one that is chosen."""

    def __init__(self, ui, panel) -> None:
        """Args:
        ui: the panel's widgets.
        panel: gives ``session``, ``parameters``, ``device``, ``opacity``, ``start(work, ...)``, ``ready(label)`` and
            ``say(...)``.
        """
        buttons = (ui.spectralButton, ui.spectralCancelButton)
        RunSection.__init__(self, panel, RunWidgets(*buttons, ui.spectralProgressBar, ui.spectralStatusLabel))
        self.ui = ui
        self._models: list[KnownModel] = []
        self._shown: tuple[Any, str] = (None, "")
        self._updating = False
        self._choices = Choices()
        self._choices.fill(ui.spectralModelComboBox, [])
        self._choices.fill(
            ui.spectralMethodComboBox, [(_("By mirror images"), FLIPS), (_("By leaving out channels"), DROPOUT)]
        )
        for combo in (ui.spectralModelComboBox, ui.spectralMethodComboBox):
            combo.currentIndexChanged.connect(self._edited)
        ui.spectralFolderEdit.setCurrentPath(own_folder())
        ui.spectralFolderEdit.currentPathChanged.connect(self._folder_chosen)
        ui.spectralSection.contentsCollapsed.connect(lambda folded: None if folded else self.refresh())
        ui.spectralUndoButton.clicked.connect(lambda *ignored: self._undo())

    # What the section is set to

    @property
    def model(self) -> KnownModel | None:
        reference = self._choices.chosen(self.ui.spectralModelComboBox)
        return next((model for model in self._models if model.reference == reference), None)

    def why_not_apply(self) -> str:
        """Why Segment cannot be pressed, as a sentence; empty when it can."""
        parameters = self.panel.parameters
        if parameters is None:
            return _("The scene is being closed.")
        if self.busy:
            return _("A run is on its way.")
        return spectral.why_not(parameters.spectralVolume, self.model)

    def guess(self) -> None:
        """Choose the panel's volume where none was chosen, and look again which models are here."""
        parameters = self.panel.parameters
        if not parameters.spectralVolume and parameters.inputVolume:
            parameters.spectralVolume = parameters.inputVolume
        self.refresh()

    def refresh(self) -> None:
        """Look again which models are here."""
        known = spectral.models([weights_folder(), own_folder()])
        if known == self._models:
            return
        self._models = known
        names = [model.name for model in known]
        titles = [
            # two folders may hold models of one name
            f"{model.name} ({shortened(model.reference)})" if names.count(model.name) > 1 else model.name
            for model in known
        ]
        entries = [(title, model.reference) for title, model in zip(titles, known, strict=True)]
        self._updating = True
        self._choices.fill(self.ui.spectralModelComboBox, entries)
        self._updating = False
        if self.panel.parameters is not None:
            self._forget_message()
            self.show_parameters()
            self.update()

    def show_parameters(self) -> None:
        """From the parameter node to the widgets it does not connect by itself."""
        parameters = self.panel.parameters
        self._updating = True
        self._choices.choose(self.ui.spectralModelComboBox, parameters.spectralModel)
        self._choices.choose(self.ui.spectralMethodComboBox, parameters.spectralMethod)
        self._updating = False
        shown = (parameters.spectralVolume, self._choices.chosen(self.ui.spectralModelComboBox))
        if shown != self._shown:
            another_volume = shown[0] is not self._shown[0]
            self._shown = shown
            self._forget_message()
            if another_volume and shown[0] is not None and not self.busy:
                node = segmentation_writer.results_of(shown[0], parameters.spectralSegmentation)
                parameters.spectralSegmentation = node

    def update(self) -> None:
        """Which widgets can be used, and why not."""
        ui, parameters, model = self.ui, self.panel.parameters, self.model
        reason = self.why_not_apply()
        ui.spectralButton.setEnabled(not reason)
        ui.spectralButton.toolTip = reason or _("Segment the volume with this model.")
        ui.spectralCancelButton.setEnabled(self.busy)
        ui.spectralModelComboBox.setEnabled(bool(self._models))
        ways = () if model is None else model.repetitions
        cannot = model is not None and not model.fault and not ways
        ui.spectralUncertaintyCheckBox.setEnabled(not cannot)
        ui.spectralUncertaintyCheckBox.toolTip = (
            _("This model was trained for no way of repeating its runs, so how unsure it is cannot be measured.")
            if cannot
            else _(
                "Also make a volume that shows where the model is unsure. It repeats the run, so it takes several "
                "times as long."
            )
        )
        ui.spectralMethodComboBox.setEnabled(len(ways) > 1 and ui.spectralUncertaintyCheckBox.checked)
        if parameters is not None:
            # what will be done is what is shown; the user's own choice is kept for models that leave one
            updating, self._updating = self._updating, True
            self._choices.choose(ui.spectralMethodComboBox, ways[0] if len(ways) == 1 else parameters.spectralMethod)
            self._updating = updating
        ui.spectralDetailsLabel.text = described(model) if model is not None else ""
        ui.spectralDetailsLabel.setVisible(model is not None)
        if parameters is None:
            return
        no_undo = self.panel.session.writer.why_no_undo(parameters.spectralSegmentation)
        ui.spectralUndoButton.setEnabled(not no_undo and not self.busy)
        ui.spectralUndoButton.toolTip = no_undo or _("Take the last result back; your other segments stay.")
        if reason or model is None:
            self._say_idle(reason)
        else:
            note = segmentation_writer.other_grid_note(parameters.spectralVolume, parameters.spectralSegmentation)
            cautions = [spectral.caution(parameters.spectralVolume, model), note]
            self._say_idle("\n".join(filter(None, cautions)))

    def _edited(self, *ignored: Any) -> None:
        parameters = self.panel.parameters
        if self._updating or parameters is None:
            return
        self._forget_message()
        parameters.spectralModel = self._choices.chosen(self.ui.spectralModelComboBox)
        if self.ui.spectralMethodComboBox.enabled:
            parameters.spectralMethod = self._choices.chosen(self.ui.spectralMethodComboBox)
        self.update()

    def _folder_chosen(self, *ignored: Any) -> None:
        """The user's own models: those of the folder join the list, and the first of them is chosen."""
        folder = self.ui.spectralFolderEdit.currentPath.strip()
        if folder == own_folder():
            return
        qt.QSettings().setValue(FOLDER_KEY, folder)
        before = {model.reference for model in self._models}
        self.refresh()
        own = [model.reference for model in self._models if model.reference not in before]
        if own and self.panel.parameters is not None:
            self.panel.parameters.spectralModel = own[0]
        elif folder and not spectral.has_models(folder):
            self._has_message = True
            sentence = _("'{folder}' holds no model. A model's folder has the files model.json and model.safetensors.")
            self._say(sentence.format(folder=shortened(folder)), True)

    # Work

    def apply(self) -> None:
        if self.why_not_apply() or not self.panel.ready(self.ui.spectralStatusLabel):
            return
        parameters, model = self.panel.parameters, self.model
        volume, segmentation = parameters.spectralVolume, parameters.spectralSegmentation
        method = self._choices.chosen(self.ui.spectralMethodComboBox)
        wanted = parameters.spectralUncertainty and bool(model.repetitions)
        work = spectral.segment_work(
            self.panel.session,
            volume,
            segmentation,
            model,
            uncertainty=method if wanted else None,
            device=self.panel.device,
        )
        self._run(work, (volume, segmentation), self._segmented, _("Handing the volume over …"))

    def abandon(self, sentence: str) -> None:
        RunSection.abandon(self, sentence)
        self._shown = (None, "")

    def _segmented(self, report: SpectralReport) -> None:
        # the user may have gone to another module, or another volume, meanwhile
        parameters = self.panel.parameters or self.panel.logic.getParameterNode()
        if parameters.spectralVolume is report.volume_node:
            parameters.spectralSegmentation = report.segmentation_node
        spectral.show_uncertainty(report, self.panel.opacity)
        self._has_message = True
        self._say(noted(report.sentences, report.warnings))
        self.panel.result_changed()

    def _undo(self) -> None:
        self._has_message = True
        try:
            self.panel.session.writer.undo(self.panel.parameters.spectralSegmentation)
            self._say(_("The last result was taken back."))
        except Trouble as trouble:
            self._say(trouble.message, True)
        self.panel.result_changed()


def described(model: KnownModel) -> str:
    """What a model is, for people."""
    reads = {
        spectral.PICTURES: _("single pictures"),
        spectral.SLICES: _("volumes, slice by slice"),
        spectral.VOLUMES: _("whole volumes"),
    }
    lines = [html.escape(model.description)] if model.description else []
    if model.classes:
        lines.append(_("<b>Finds</b>: {names}").format(names=html.escape(", ".join(model.classes))))
        lines.append(_("<b>Reads</b>: {what}").format(what=reads.get(model.form, model.form)))
        lines.append(_("<b>Licence</b>: {licence}").format(licence=html.escape(model.licence or _("not stated"))))
    return "<br>".join(lines)


def own_folder() -> str:
    """The folder of the user's own models; empty for none."""
    return str(qt.QSettings().value(FOLDER_KEY) or "")
