"""Look inside: what a result was made of, over the picture or beside it."""

from __future__ import annotations

from typing import Any

from slicer.i18n import tr as _

from . import look_inside
from .session import Finding
from .trouble import Trouble


class LookSection:
    """Buttons that turn findings into volumes and show them."""

    def __init__(self, ui, panel) -> None:
        """Args:
        ui: the panel's widgets.
        panel: gives ``session``, ``options``, ``volume``, ``segmentation``, ``opacity`` and ``start(work, ...)``.
        """
        self.ui, self.panel = ui, panel
        self._findings: list[Finding] = []
        self._shown: Any = None
        ui.saliencyButton.clicked.connect(lambda *ignored: self._show_finding(look_inside.saliency_work))
        ui.uncertaintyButton.clicked.connect(lambda *ignored: self._show_finding(look_inside.uncertainty_work))
        ui.frequencyButton.clicked.connect(lambda *ignored: self._show_frequencies())
        ui.maskButton.clicked.connect(lambda *ignored: self._show_mask())
        ui.sideBySideButton.clicked.connect(lambda *ignored: self._side_by_side())
        ui.hideLooksButton.clicked.connect(lambda *ignored: look_inside.hide(self.panel.volume))
        ui.opacitySlider.valueChanged.connect(lambda value: look_inside.set_opacity(value))
        ui.findingComboBox.currentIndexChanged.connect(lambda *ignored: self._update_buttons())

    @property
    def finding(self) -> Finding | None:
        index = self.ui.findingComboBox.currentIndex
        return self._findings[index] if 0 <= index < len(self._findings) else None

    def update(self) -> None:
        """After the volume or its findings changed."""
        findings = self.panel.session.findings_of(self.panel.volume)
        if findings != self._findings:
            self._findings = findings
            combo = self.ui.findingComboBox
            combo.blockSignals(True)
            combo.clear()
            combo.addItems([finding.prompt for finding in findings])
            combo.blockSignals(False)
        self._update_buttons()

    def _update_buttons(self) -> None:
        finding, idle = self.finding, not self.panel.busy
        self.ui.findingComboBox.setEnabled(bool(self._findings))
        self.ui.saliencyButton.setEnabled(idle and finding is not None)
        self.ui.uncertaintyButton.setEnabled(idle and finding is not None and finding.uncertainty is not None)
        self.ui.maskButton.setEnabled(idle and finding is not None)
        volume = self.panel.volume
        self.ui.frequencyButton.setEnabled(idle and volume is not None)
        self.ui.hideLooksButton.setEnabled(volume is not None)
        self.ui.sideBySideButton.setEnabled(volume is not None and bool(look_inside.looks_of(volume, finding)))
        if not self._findings:
            self.ui.lookLabel.text = _("Apply first: then you see here what the result was made of.")
        elif finding is not None and finding.uncertainty is None:
            self.ui.lookLabel.text = _("To see how unsure it was, tick 'Uncertainty' above and apply again.")
        else:
            self.ui.lookLabel.text = ""

    def _show_finding(self, work) -> None:
        finding, volume = self.finding, self.panel.volume
        if finding is not None and volume is not None:
            self._start(work(self.panel.session, finding, volume), volume)

    def _show_frequencies(self) -> None:
        volume = self.panel.volume
        if volume is not None:
            self._start(look_inside.frequency_work(self.panel.session, volume, self.panel.options()), volume)

    def _show_mask(self) -> None:
        from .segmentation_writer import gone_segment, segmentation_of

        finding, volume = self.finding, self.panel.volume
        if finding is None or volume is None:
            return
        node = segmentation_of(finding.segmentation_node_id)
        if node is None or gone_segment(node, finding.segment_id):
            self.ui.lookLabel.text = _("The segment is not there any more.")
            return
        self._start(look_inside.mask_work(node, finding.segment_id, volume), volume)

    def _start(self, work, volume) -> None:
        self.ui.lookLabel.text = _("Working …")
        self.panel.start(
            work,
            nodes=(volume,),
            on_done=lambda made: self._done(made, volume),
            on_trouble=self._failed,
            say_progress=lambda progress: setattr(self.ui.lookLabel, "text", progress.sentence),
        )

    def _done(self, made: Any, volume) -> None:
        self.panel.result_changed()
        nodes = made if isinstance(made, list) else [made]
        self._shown = nodes[-1]
        if len(nodes) > 1:
            look_inside.side_by_side(volume, nodes, self.panel.opacity)
        else:
            look_inside.overlay(volume, nodes[0], self.panel.opacity)
        self.ui.lookLabel.text = _("Shown: {names}.").format(names=", ".join(node.GetName() for node in nodes))

    def _failed(self, trouble: Trouble) -> None:
        self.panel.result_changed()
        self.ui.lookLabel.text = trouble.message

    def _side_by_side(self) -> None:
        volume = self.panel.volume
        if volume is not None:
            nodes = look_inside.looks_of(volume, self.finding)
            look_inside.side_by_side(volume, nodes, self.panel.opacity)
