"""``freqseg models``: which weights there are, and fetching, checking and removing them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from FreqSegLib.cli_app import Session, app, session_of
from FreqSegLib.cli_progress import download_on
from FreqSegLib.errors import Cancelled, SettingsError, WeightsError
from FreqSegLib.presets import PRESETS

if TYPE_CHECKING:
    from FreqSegLib.weights import Finding

models = typer.Typer(help="List, fetch, check or remove the weights.", rich_markup_mode="rich")
app.add_typer(models, name="models")

Ids = Annotated[list[str], typer.Argument(help="Ids out of 'freqseg models list', or a preset for all of its.")]
SomeIds = Annotated[
    list[str] | None,
    typer.Argument(help="Ids, or a preset for all of its.", show_default="all that are here"),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@models.callback(invoke_without_command=True)
def _models(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@models.command("list")
def list_models(context: typer.Context) -> None:
    """Show the weights of every preset: size, licence, and whether they are here."""
    from rich.table import Table
    from rich.text import Text

    from FreqSegLib import weights
    from FreqSegLib.download import readable_size

    session = session_of(context)
    statuses = {status.id: status for status in weights.status()}
    styles = {"shipped": "green", "installed": "green", "missing": "dim", "damaged": "red"}
    groups = {name: (preset.title, _weights_of(name)) for name, preset in PRESETS.items()}
    named = {one for _, ids in groups.values() for one in ids}
    groups["others"] = ("not of a text-guided preset", tuple(one for one in statuses if one not in named))
    for name, (title, ids) in groups.items():
        if not ids:
            continue
        session.say(Text.assemble((name, "bold"), f"  {title}"))
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for column in range(4):
            table.add_column(no_wrap=column < 3, justify="right" if column == 1 else "left")
        for one in ids:
            status = statuses[one]
            size = readable_size(status.size) if status.size else ""
            about = Text.assemble(status.title, (f"; {status.licence}", "dim"))
            table.add_row(f"  {one}", size, Text(status.state, styles[status.state]), about)
        session.out.print(table)
        session.say("")
    session.say(f"Fetch with: freqseg models get ID    Downloads are stored in {weights.user_folder()}")


@models.command("get")
def get_models(context: typer.Context, ids: Ids, yes: Yes = False) -> None:
    """Fetch weights, after showing their size, licence and origin. A download that was cut is continued."""
    from FreqSegLib import weights

    session = session_of(context)
    wanted = _expanded(ids)
    for one in wanted:
        found = weights.find(one)
        if found is not None and not _blocking(weights.verify(one)):
            session.say(f"{one} is here already: {found}")
            continue
        if not all(file.sources for file in weights.catalogue()[one].files):
            weights.require(one)
        for sentence in weights.announcement(one):
            session.say(sentence)
        if not (yes or _agreed(f"Fetch {one}?")):
            session.say(f"{one} was not fetched.")
            continue
        session.say(f"{one} is ready: {_fetch(session, one)}")


@models.command("verify")
def verify_models(context: typer.Context, ids: SomeIds = None) -> None:
    """Read every file and compare it with its checksum. The exit code is 1 if one must not be used."""
    from FreqSegLib import weights

    session = session_of(context)
    wanted = _expanded(ids) if ids else [status.id for status in weights.status() if status.state != "missing"]
    if not wanted:
        session.say("No weights are here yet. Fetch some with: freqseg models get lite")
    bad = False
    for one in wanted:
        findings = weights.verify(one)
        for finding in findings:
            bad = bad or finding.blocking
            session.warn(f"{one}: {finding.message}")
        if not _blocking(findings):
            session.say(f"{one}: all files are sound" if not findings else f"{one}: usable")
    if bad:
        raise WeightsError("Some weights must not be used. Fetch them again with: freqseg models get ID")


@models.command("remove")
def remove_models(context: typer.Context, ids: Ids, yes: Yes = False) -> None:
    """Delete fetched weights from this computer."""
    from FreqSegLib import weights
    from FreqSegLib.download import readable_size

    session = session_of(context)
    for one in _expanded(ids):
        if not (yes or _agreed(f"Delete {one} from {weights.user_folder()}?")):
            session.say(f"{one} was kept.")
            continue
        session.say(f"{one} was deleted; {readable_size(weights.remove(one))} are free again.")


def _weights_of(preset_name: str) -> tuple[str, ...]:
    """What a preset takes, with the choices it offers."""
    from FreqSegLib.presets import SAM_CHOICES

    preset = PRESETS[preset_name]
    found = (*preset.weights, *preset.optional)
    return found if preset.encoder == "lite" else tuple(dict.fromkeys((*found, *SAM_CHOICES)))


def _expanded(names: Sequence[str]) -> list[str]:
    """Ids; a preset's name stands for the weights it takes by default.

    Raises:
        SettingsError: there is no such id or preset.
    """
    from FreqSegLib import weights

    found: list[str] = []
    for name in names:
        if name in PRESETS:
            found += PRESETS[name].weights
            continue
        try:
            weights.find(name)
        except WeightsError as error:
            raise SettingsError(f"{error} Presets: {', '.join(PRESETS)}.") from error
        found.append(name)
    return list(dict.fromkeys(found))


def _blocking(findings: Sequence[Finding]) -> bool:
    return any(finding.blocking for finding in findings)


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise SettingsError(f"{question} Nobody can answer here; add --yes to agree.")
    return typer.confirm(question, default=False)


def _fetch(session: Session, set_id: str) -> Path:
    from FreqSegLib import weights

    with download_on(session.err, set_id) as progress:
        try:
            return weights.get(set_id, progress=progress, cancel=session.interrupts.asked, say=lambda sentence: None)
        except (Cancelled, KeyboardInterrupt):
            raise Cancelled(
                "Cancelled. What was received of large files is kept; the same command goes on from there."
            ) from None
