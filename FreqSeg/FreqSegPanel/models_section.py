"""Models: every set of weights, where it is, what it may be used for; fetch, check, delete, and where they are kept."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

from .tasks import Ask, Progress, Task, Work
from .trouble import Trouble

NAME, SIZE, STATE, LICENCE = range(4)
FOLDER_KEY = "FreqSeg/WeightsFolder"


class ModelsSection:
    """Talks to the worker about weights; filled when it is opened first."""

    def __init__(self, ui, panel) -> None:
        """Args:
        ui: the panel's widgets.
        panel: gives ``session``, ``packages``, ``start(work, ...)`` and ``restart_worker()``.
        """
        self.ui, self.panel = ui, panel
        self.models: list[dict[str, Any]] = []
        self._task: Task | None = None
        table = ui.modelsTable
        table.setColumnCount(4)
        table.setHorizontalHeaderLabels([_("Model"), _("Size"), _("Here"), _("Licence")])
        table.verticalHeader().setVisible(False)
        table.setShowGrid(False)
        table.setAlternatingRowColors(True)
        header = table.horizontalHeader()
        header.setSectionResizeMode(NAME, qt.QHeaderView.Stretch)
        header.setSectionResizeMode(SIZE, qt.QHeaderView.ResizeToContents)
        header.setSectionResizeMode(STATE, qt.QHeaderView.ResizeToContents)
        header.setSectionResizeMode(LICENCE, qt.QHeaderView.Fixed)
        table.setColumnWidth(LICENCE, 110)
        table.itemSelectionChanged.connect(self._chosen)
        ui.modelsSection.contentsCollapsed.connect(self._folded)
        ui.getModelButton.clicked.connect(lambda *ignored: self.get([self.chosen["id"]] if self.chosen else []))
        ui.verifyModelButton.clicked.connect(lambda *ignored: self._ask("verify", self._verified))
        ui.removeModelButton.clicked.connect(lambda *ignored: self._remove())
        ui.cancelModelButton.clicked.connect(lambda *ignored: self._stop())
        ui.weightsFolderEdit.setCurrentPath(weights_folder())
        ui.weightsFolderEdit.currentPathChanged.connect(self._folder_chosen)
        ui.installButton.clicked.connect(lambda *ignored: self.install())
        ui.modelsProgressBar.setVisible(False)

    @property
    def chosen(self) -> dict[str, Any] | None:
        row = self.ui.modelsTable.currentRow()
        return self.models[row] if 0 <= row < len(self.models) else None

    @property
    def busy(self) -> bool:
        return self._task is not None and not self._task.finished

    def refresh(self) -> None:
        """Ask again what is here."""
        if not self.busy:
            self._start(_once("models", action="list"), self._listed)

    def get(self, ids: list[str], then: Callable[[], None] | None = None) -> None:
        """Fetch models after the user agreed to what there is to know about them."""
        wanted = [model for model in self.models if model["id"] in ids and not model["installed"]]
        if not wanted or self.busy:
            return
        lines = []
        for model in wanted:
            lines.append(
                _("{title}: {size}, {licence}").format(
                    title=model["title"], size=readable(model["size"]), licence=model["licence"]
                )
            )
            lines += model.get("announcement") or []
        question = _("Download to this computer?") + "\n\n" + "\n".join(dict.fromkeys(lines))
        if not slicer.util.confirmOkCancelDisplay(question, windowTitle="FreqSeg"):
            self._say(_("Nothing was downloaded."))
            return

        def work() -> Work:
            for model in wanted:
                yield Ask("models", {"action": "get", "id": model["id"]})
            return wanted

        def done(result: Any) -> None:
            self._say(_("Downloaded: {names}.").format(names=", ".join(model["title"] for model in wanted)))
            self.refresh_quietly()
            if then is not None:
                then()

        self._start(work(), done)

    def missing_for(self, preset: str) -> list[str]:
        """Ids of weights a preset needs and that are not here, as far as is known."""
        return [model["id"] for model in self.models if preset in model.get("needed_by", ()) and not model["installed"]]

    def list_work(self) -> Work:
        """Task part: the models as they are now."""
        reply = yield Ask("models", {"action": "list"})
        self.models = list(reply["models"])
        return self.models

    def install(self) -> None:
        """Install missing Python packages, asking again even after a refusal."""
        sentence = self.panel.packages.ensure(self._say_now, ask_again=True)
        self._say(sentence or _("All packages are installed."), bool(sentence))
        self.show_packages()
        if not sentence:
            self.panel.restart_worker()
            self.refresh()

    def show_packages(self) -> None:
        """What is missing, beside the button."""
        missing = self.panel.packages.missing()
        from .packages import name_of

        names = ", ".join(name_of(requirement) for requirement in missing)
        self.ui.packagesStateLabel.text = _("Missing: {names}").format(names=names) if missing else _("All installed")
        self.ui.installButton.setVisible(bool(missing))

    def refresh_quietly(self) -> None:
        """Ask what is here, keeping the sentence that is shown."""
        self._start(_once("models", action="list"), lambda reply: self._listed(reply, keep=True))

    def _folded(self, folded: bool) -> None:
        if not folded:
            self.show_packages()
            if not self.models:
                self.refresh()

    def _listed(self, reply: Mapping[str, Any], keep: bool = False) -> None:
        self.models = list(reply["models"])
        table = self.ui.modelsTable
        row = max(table.currentRow(), 0)
        table.setRowCount(len(self.models))
        states = {
            "shipped": _("built in"),
            "installed": _("yes"),
            "missing": _("no"),
            "damaged": _("damaged"),
        }
        for index, model in enumerate(self.models):
            texts = (
                model["title"],
                readable(model["size"]),
                states.get(model["state"], model["state"]),
                model["licence"],
            )
            for column, text in enumerate(texts):
                item = qt.QTableWidgetItem(text)
                item.setToolTip(text)
                if column == SIZE:
                    item.setTextAlignment(qt.Qt.AlignRight | qt.Qt.AlignVCenter)
                table.setItem(index, column, item)
        if self.models:
            table.selectRow(min(row, len(self.models) - 1))
        if not keep:
            self._say("")
        self._chosen()

    def _chosen(self) -> None:
        model, idle = self.chosen, not self.busy
        self.ui.getModelButton.setEnabled(
            bool(model) and idle and not model["installed"] and model.get("downloadable", True)
        )
        self.ui.verifyModelButton.setEnabled(bool(model) and idle and model["state"] != "missing")
        self.ui.removeModelButton.setEnabled(bool(model) and idle and bool(model.get("removable")))
        self.ui.cancelModelButton.setEnabled(self.busy)
        if model is None:
            self.ui.modelDetailsLabel.text = ""
            return
        parts = [_("<b>{title}</b>").format(title=html.escape(model["title"]))]
        parts.append(_("Licence: {licence}").format(licence=html.escape(model["licence"])))
        if model["source"]:
            parts.append(_("From: {source}").format(source=html.escape(model["source"])))
        if model.get("needed_by"):
            parts.append(_("Needed by: {presets}").format(presets=", ".join(model["needed_by"])))
        if model.get("folder"):
            parts.append(_("In: {folder}").format(folder=html.escape(shortened(model["folder"]))))
        self.ui.modelDetailsLabel.text = "<br>".join(parts)

    def _remove(self) -> None:
        model = self.chosen
        if model is None:
            return
        question = _("Delete the downloaded files of '{title}' ({size}) from this computer?")
        question = question.format(title=model["title"], size=readable(model["size"]))
        if slicer.util.confirmOkCancelDisplay(question, windowTitle="FreqSeg"):
            self._ask("remove", self._removed)

    def _ask(self, action: str, done: Callable[[Any], None]) -> None:
        if self.chosen is not None and not self.busy:
            self._start(_once("models", action=action, id=self.chosen["id"]), done)

    def _verified(self, reply: Mapping[str, Any]) -> None:
        title = self.chosen["title"] if self.chosen else ""
        if reply["sound"]:
            self._say("\n".join([_("'{title}' is sound.").format(title=title), *reply["findings"]]))
        else:
            self._say("\n".join(reply["findings"]), True)

    def _removed(self, reply: Mapping[str, Any]) -> None:
        self._say(_("Deleted; {size} are free again.").format(size=readable(reply["freed"])))
        self.refresh_quietly()

    def _stop(self) -> None:
        if self._task is not None:
            self.panel.session.runner.cancel(self._task)

    def _folder_chosen(self, *ignored: Any) -> None:
        folder = self.ui.weightsFolderEdit.currentPath.strip()
        if folder == weights_folder():
            return
        qt.QSettings().setValue(FOLDER_KEY, folder)
        self.panel.restart_worker()
        self.models = []
        if not self.ui.modelsSection.collapsed:
            self.refresh()

    def _start(self, work: Work, done: Callable[[Any], None]) -> None:
        self._task = self.panel.start(
            work, on_done=lambda result: self._ended(done, result), on_trouble=self._failed, say_progress=self._progress
        )
        self._chosen()

    def _ended(self, done: Callable[[Any], None], result: Any) -> None:
        self.ui.modelsProgressBar.setVisible(False)
        self._chosen()
        done(result)

    def _failed(self, trouble: Trouble) -> None:
        self.ui.modelsProgressBar.setVisible(False)
        self._chosen()
        if trouble.code == "cancelled":
            self._say(_("Stopped. What came is kept; 'Download' goes on from there."))
        else:
            self._say(trouble.message, True)

    def _progress(self, progress: Progress) -> None:
        bar = self.ui.modelsProgressBar
        bar.setVisible(True)
        bar.setMaximum(1000 if progress.total else 0)
        bar.setValue(int(1000 * progress.done / progress.total) if progress.total else 0)
        if progress.total:
            sentence = _("{stage}: {done} of {total}")
            self._say(
                sentence.format(stage=progress.stage, done=readable(progress.done), total=readable(progress.total))
            )

    def _say(self, sentence: str, is_trouble: bool = False) -> None:
        self.panel.say(sentence, is_trouble, label=self.ui.modelsLabel)

    def _say_now(self, sentence: str) -> None:
        self._say(sentence)
        slicer.app.processEvents()


def weights_folder() -> str:
    """Where the user wants models kept; empty for the usual place."""
    return str(qt.QSettings().value(FOLDER_KEY) or "")


def shortened(folder: str) -> str:
    """A folder with the user's home as ~."""
    home = str(Path.home())
    return f"~{folder[len(home) :]}" if folder.startswith(home + os.sep) else folder


def readable(size: int | None) -> str:
    """Bytes for people."""
    if not size:
        return ""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def _once(request: str, **values: Any) -> Work:
    return (yield Ask(request, values))
