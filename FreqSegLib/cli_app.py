"""The ``freqseg`` application that commands are added to, and what all of them share.

A command lives in a file of its own: it imports :data:`app`, decorates its function with ``@app.command()``, and is
imported in ``cli.py``. Whatever is heavy (torch, SimpleITK, matplotlib) is imported inside the function, so that
``--help`` opens at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    name="freqseg",
    help="Type what you look for in a medical image, get a segmentation. Research use, not for diagnosis.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        from FreqSegLib import __version__

        typer.echo(f"freqseg {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


class Interrupts:
    """Ctrl-C and a request to end, as ``KeyboardInterrupt``, but never while results are being moved into place."""

    def __init__(self) -> None:
        self._signal: int | None = None
        self._held = False

    @property
    def exit_code(self) -> int:
        """What a shell expects of a command that a signal ended: 128 and its number."""
        return 128 + int(self._signal or signal.SIGINT)

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Answer signals until the block ends."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._arrived) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A block too short to be stopped half way; a signal that arrives in it is too late and does nothing."""
        self.check()
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self._signal = None

    def asked(self) -> bool:
        """Has one arrived? Libraries may swallow the exception; this remembers."""
        return self._signal is not None

    def check(self) -> None:
        """Raises: KeyboardInterrupt: one has arrived."""
        if self.asked():
            raise KeyboardInterrupt

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        # A second one while the first is answered would stop the cleaning up.
        first, self._signal = self._signal is None, number
        if first and not self._held:
            raise KeyboardInterrupt


class Session:
    """What one run of the command shares: where it speaks, and whether it was stopped."""

    def __init__(self) -> None:
        self.interrupts = Interrupts()

    @cached_property
    def out(self) -> Console:
        """Results."""
        return _console(stderr=False)

    @cached_property
    def err(self) -> Console:
        """Progress, warnings and errors, so that results can be piped."""
        return _console(stderr=True)

    def say(self, text: Any) -> None:
        """One line of result. Text is printed as it is, never read as markup."""
        _print(self.out, text)

    def warn(self, sentence: str) -> None:
        _print(self.err, f"Warning: {sentence}", "yellow")

    def fail(self, sentence: str) -> None:
        _print(self.err, sentence, "red")


def session_of(context: typer.Context) -> Session:
    """The running session."""
    return context.ensure_object(Session)


def _console(stderr: bool) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def _print(console: Console, text: Any, style: str = "") -> None:
    from rich.text import Text

    shown = Text(text, style=style) if isinstance(text, str) else text
    # In a file or pipe a sentence stays on one line, so that it can be searched for.
    console.print(shown, soft_wrap=not console.is_terminal)
