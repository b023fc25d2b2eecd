"""What sections with an Apply button of their own have in common: one run, its progress, Cancel, and the last word."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from slicer.i18n import tr as _

from .tasks import Progress, Task, Work
from .trouble import Trouble


@dataclass(frozen=True)
class RunWidgets:
    """A section's buttons, its bar, and the label it speaks through."""

    apply: Any
    cancel: Any
    progress: Any
    status: Any


class RunSection(ABC):
    """One run at a time. A message stays until something is changed that it depends on."""

    def __init__(self, panel, widgets: RunWidgets) -> None:
        """Args:
        panel: gives ``session``, ``parameters``, ``start(work, ...)``, ``result_changed()`` and ``say(...)``.
        widgets: of the section.
        """
        self.panel, self._widgets = panel, widgets
        self._task: Task | None = None
        self._has_message = False
        widgets.apply.clicked.connect(lambda *ignored: self.apply())
        widgets.cancel.clicked.connect(lambda *ignored: self.cancel())
        widgets.progress.setVisible(False)

    @property
    def busy(self) -> bool:
        return self._task is not None and not self._task.finished

    @abstractmethod
    def apply(self) -> None:
        """Start a run, as the section is set."""

    @abstractmethod
    def update(self) -> None:
        """Which widgets can be used, and why not."""

    def cancel(self) -> None:
        if self.busy:
            self._say(_("Stopping …"))
            self.panel.session.runner.cancel(self._task)

    def abandon(self, sentence: str) -> None:
        """End a run at once, because its scene is gone."""
        if self.busy:
            self.panel.session.runner.abandon(self._task, sentence)

    def _run(self, work: Work, nodes: Sequence[Any], done: Callable[[Any], None], sentence: str) -> None:
        """Start ``work``; ``sentence`` is shown until it reports progress, ``done`` is called with its result."""

        def ended(result: Any) -> None:
            self._end()
            done(result)

        self._task = self.panel.start(
            work, nodes=nodes, on_done=ended, on_trouble=self._failed, say_progress=self._progress
        )
        self._widgets.progress.setMaximum(0)
        self._widgets.progress.setVisible(True)
        self._has_message = True
        self._say(sentence)
        self.update()

    def _progress(self, progress: Progress) -> None:
        self._widgets.progress.setMaximum(max(progress.total, 1) if progress.total > 1 else 0)
        self._widgets.progress.setValue(progress.done)
        self._say(progress.sentence)

    def _failed(self, trouble: Trouble) -> None:
        self._end()
        self._say(trouble.message, trouble.code != "cancelled")
        self.panel.result_changed()

    def _end(self) -> None:
        self._task = None
        self._has_message = True
        self._widgets.progress.setVisible(False)

    def _forget_message(self) -> None:
        if not self.busy:
            self._has_message = False

    def _say_idle(self, sentence: str) -> None:
        """What is to be said while nothing runs and no message is to be read."""
        if not self.busy and not self._has_message:
            self._say(sentence)

    def _say(self, sentence: str, is_trouble: bool = False) -> None:
        self.panel.say(sentence, is_trouble, self._widgets.status)


def noted(sentences: Sequence[str], warnings: Sequence[str]) -> str:
    """What a run found, and below it what the user should know of it."""
    return "\n".join([*sentences, *(_("Note: {warning}").format(warning=warning) for warning in warnings)])
