"""What goes wrong, as one sentence for the panel."""

from __future__ import annotations


class Trouble(Exception):
    """Ends a task; its message is shown in the panel as it is.

    Attributes:
        code: for programs: "cancelled", "weights", "cannot_start", "input" ... (the worker's codes, and the panel's).
        message: one human sentence or two: what is wrong, and what to do.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message
