"""Popups are not shown: they are written down, and answered as the test says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PySide6 import QtWidgets

_REFUSALS = ("Cancel", "No", "Close", "Abort", "Ignore", "Ok")


@dataclass(frozen=True)
class Message:
    """One popup: ``kind`` is "information", "warning", "error", "question", "text", or a dialog's class name."""

    kind: str
    title: str
    text: str
    details: str
    buttons: tuple[str, ...]
    answer: str


class Messages(list[Message]):
    """The popups so far, in order. A question without a scripted answer is refused (Cancel, No, Close)."""

    def __init__(self) -> None:
        super().__init__()
        self._answers: list[str] = []

    def answer(self, *buttons: str) -> None:
        """The next popups that ask something are answered with these buttons ("Ok", "Yes", "Cancel", ...)."""
        self._answers.extend(buttons)

    @contextmanager
    def none_expected(self) -> Iterator[None]:
        """Fail when the code in the block pops something up."""
        before = len(self)
        yield
        if len(self) > before:
            raise AssertionError(f"unexpected popup: {self[before:]}")

    def texts(self) -> list[str]:
        return [message.text for message in self]

    def clear(self) -> None:
        super().clear()
        self._answers.clear()

    def choose(self, buttons: tuple[str, ...]) -> str:
        """The answer to a popup with these buttons."""
        if len(buttons) > 1 and self._answers:
            chosen = self._answers.pop(0)
            if chosen not in buttons:
                raise AssertionError(f"the test answers {chosen!r}, but the popup offers {buttons}")
            return chosen
        return next((button for button in _REFUSALS if button in buttons), buttons[0] if buttons else "")

    def take_over(self) -> None:
        """From now on, modal dialogs are recorded here instead of shown."""
        messages = self

        def box_exec(box: Any) -> Any:
            return messages._record_box(box)

        def dialog_exec(dialog: Any) -> int:
            accepted = messages.choose(("Ok", "Cancel")) == "Ok"
            kind = dialog.metaObject().className()
            answer = "Ok" if accepted else "Cancel"
            messages.append(Message(kind, dialog.windowTitle, "", "", ("Ok", "Cancel"), answer))
            result = QtWidgets.QDialog.DialogCode.Accepted if accepted else QtWidgets.QDialog.DialogCode.Rejected
            dialog.done(int(result))
            return int(result)

        patched: Any = QtWidgets
        patched.QMessageBox.exec = patched.QMessageBox.exec_ = box_exec
        patched.QDialog.exec = patched.QDialog.exec_ = dialog_exec
        buttons = QtWidgets.QMessageBox.StandardButton
        for kind, default in (
            ("information", buttons.Ok),
            ("warning", buttons.Ok),
            ("critical", buttons.Ok),
            ("question", buttons.Yes | buttons.No),
        ):
            setattr(patched.QMessageBox, kind, staticmethod(self._static_box(kind, default)))
        patched.QInputDialog.getText = staticmethod(self._static_text)
        for name in ("getExistingDirectory", "getOpenFileName", "getSaveFileName", "getOpenFileNames"):
            setattr(patched.QFileDialog, name, staticmethod(self._static_file(name)))

    def _record_box(self, box: Any) -> Any:
        standard = [button for button in box.buttons() if box.standardButton(button).value]
        names = tuple(box.standardButton(button).name for button in standard) or ("Ok",)
        custom = tuple(button.text for button in box.buttons() if button not in standard)
        answer = self.choose(names + custom if box.buttons() else ("Ok",))
        kind = {"Information": "information", "Warning": "warning", "Critical": "error", "Question": "question"}.get(
            box.property("icon").name, "text"
        )
        self.append(Message(kind, box.windowTitle.strip(), box.text, box.detailedText, names + custom, answer))
        for button in box.buttons():
            if button.text == answer:
                button.click()
        return QtWidgets.QMessageBox.StandardButton.__members__.get(answer, 0)

    def _static_box(self, kind: str, default: Any) -> Any:
        def show(parent: Any, title: str, text: str, buttons: Any = default, *_: Any) -> Any:
            every = QtWidgets.QMessageBox.StandardButton.__members__
            single = {name: button for name, button in every.items() if button.value.bit_count() == 1}
            names = tuple(name for name, button in single.items() if button.value & int(buttons.value))
            answer = self.choose(names)
            self.append(Message("error" if kind == "critical" else kind, title, text, "", names, answer))
            return every[answer]

        return show

    def _static_text(self, parent: Any, title: str, label: str, *_: Any, text: str = "", **__: Any) -> tuple[str, bool]:
        answer = self._answers.pop(0) if self._answers else ""
        self.append(Message("input", title, label, text, ("Ok", "Cancel"), answer))
        return answer, bool(answer)

    def _static_file(self, name: str) -> Any:
        def ask(parent: Any = None, caption: str = "", *_: Any, **__: Any) -> Any:
            answer = self._answers.pop(0) if self._answers else ""
            self.append(Message("file", caption, name, "", ("Ok", "Cancel"), answer))
            if name == "getExistingDirectory":
                return answer
            return ([answer] if answer else [], "") if name == "getOpenFileNames" else (answer, "")

        return ask
