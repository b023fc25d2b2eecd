"""``freqseg``: where the command starts, and where everything that goes wrong becomes a sentence and an exit code.

Exit codes: 0 all went well, 2 the command or a setting is wrong, 130 stopped with Ctrl-C, 1 anything else.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TextIO

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
CANCELLED = "Cancelled; nothing was written."
REPORT = (
    "FreqSeg ran into something it did not expect, which is a defect of FreqSeg. Please report it together with the "
    "lines below and what 'freqseg info' prints."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after ``freqseg``; those of this process if left out.

    Returns:
        The exit code.
    """
    _tolerate_any_character(sys.stdout, sys.stderr)
    _quieten_libraries()
    try:
        return _run(sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt:
        # Only before the commands are loaded; from then on _run answers for it.
        print(CANCELLED, file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(arguments: list[str]) -> int:
    from FreqSegLib.cli_app import Session, app
    from FreqSegLib.errors import Cancelled, FreqSegError, SettingsError

    # Each of these adds its commands to the app, in the order in which --help lists them.
    from FreqSegLib import cli_segment, cli_models, cli_info, cli_demo  # noqa: F401  # isort: skip
    from FreqSegLib import cli_fuse, cli_spectral, cli_export, cli_evaluate, cli_evaluate_fusion  # noqa: F401  # isort: skip
    from FreqSegLib import cli_train, cli_train_text_guided, cli_train_fusion, cli_train_spectral, cli_compare_spectral  # noqa: F401  # isort: skip
    from FreqSegLib import cli_ablate, cli_train_baseline  # noqa: F401  # isort: skip
    from FreqSegLib import cli_train_contrastive, cli_train_pseudo_labels, cli_train_zero_shot, cli_bands  # noqa: F401  # isort: skip

    session = Session()
    with session.interrupts.caught():
        try:
            answer = app(args=arguments, prog_name="freqseg", standalone_mode=False, obj=session)
            sys.stdout.flush()
            if answer == EXIT_INTERRUPTED:
                # How some versions of typer put a KeyboardInterrupt.
                raise KeyboardInterrupt
            return answer if isinstance(answer, int) else 0
        except Cancelled as error:
            session.fail(str(error))
            return session.interrupts.exit_code
        except FreqSegError as error:
            session.fail(str(error))
            return EXIT_USAGE if isinstance(error, SettingsError) else EXIT_ERROR
        except BrokenPipeError:
            # What read our output has gone (freqseg ... | head); nobody is left to be told.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_ERROR
        except (KeyboardInterrupt, EOFError):
            session.fail(CANCELLED)
            return session.interrupts.exit_code
        except MemoryError:
            session.fail("Not enough memory. Close other programs, or crop the volume, and try again.")
            return EXIT_ERROR
        except Exception as error:
            if type(error).__name__ == "Abort":
                session.fail(CANCELLED)
                return session.interrupts.exit_code
            usage = _usage(error)
            if usage is not None:
                session.fail(usage)
                return EXIT_USAGE
            session.fail(REPORT)
            traceback.print_exc()
            return EXIT_ERROR


def _usage(error: Exception) -> str | None:
    """What the command line's parser has to say, as a sentence; None if the error is not the parser's.

    Known by its shape: typer brings a parser of its own or takes click's, depending on its version.
    """
    say = getattr(error, "format_message", None)
    if say is None:
        return None
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "freqseg"
    return f"{str(say()).rstrip('.')}. See: {path} --help"


def _quieten_libraries() -> None:
    """transformers reports on every load; what matters of it is checked where the weights are loaded."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _tolerate_any_character(*streams: TextIO) -> None:
    """A prompt or path that the console's encoding lacks must not end a run."""
    for stream in streams:
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[attr-defined]
