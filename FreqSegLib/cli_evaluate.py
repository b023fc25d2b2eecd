"""``freqseg evaluate``: the pipeline on labelled cases, a row a target."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from FreqSegLib.cli_app import app, session_of
from FreqSegLib.cli_options import option_name, with_settings
from FreqSegLib.cli_output import Delivery, check_apart, check_target
from FreqSegLib.cli_progress import progress_on, readable_time
from FreqSegLib.errors import Cancelled
from FreqSegLib.presets import Preset, preset
from FreqSegLib.settings import TextSegmentationSettings

if TYPE_CHECKING:
    from FreqSegLib.evaluation.cases import Case

CASES_SUFFIX = "_cases"
WIDE = 190


class SplitName(str, Enum):
    """Choices of ``--split``."""

    test = "test"
    train_validation = "train-validation"


@app.command()
@with_settings(TextSegmentationSettings, leave_out=("uncertainty", "replicas", "experimental"))
def evaluate(
    context: typer.Context,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder that holds segmentation/.", metavar="FOLDER", show_default="FREQSEG_DATA, else ../shared/data"
        ),
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help='Only this target, like "left lung"; may be repeated.', show_default="all")
    ] = None,
    max_cases: Annotated[
        int | None, typer.Option(help="At most so many cases a modality, evenly spaced, always the same.", min=1)
    ] = None,
    max_slices: Annotated[
        int, typer.Option(help="Thin volumes out evenly to at most so many slices (0: whole volumes).", min=0)
    ] = 0,
    split: Annotated[
        SplitName, typer.Option(help="The test folders, or the validation patients of the training folders.")
    ] = SplitName.test,
    preset_name: Annotated[str, typer.Option("--preset", help="Which weights and defaults.")] = "lite",
    sam: Annotated[str | None, typer.Option(help="SAM-family model, for presets that take one.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    wrong: Annotated[
        int, typer.Option("--wrong-prompts", help="Targets of other modalities each case is asked for.", min=0, max=3)
    ] = 2,
    box_ceiling: Annotated[
        bool, typer.Option("--box-ceiling/--no-box-ceiling", help="Also decode the truth's own boxes.")
    ] = True,
    csv_path: Annotated[
        Path | None,
        typer.Option("--csv", help=f"The table as CSV; every case goes into NAME{CASES_SUFFIX}.csv beside it."),
    ] = None,
    markdown_path: Annotated[Path | None, typer.Option("--markdown", help="The table as Markdown.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    *,
    settings: TextSegmentationSettings,
) -> None:
    """Measure the pipeline on real labelled images: DSC, NSD, HD95, and what comes out empty where it should.

    A run that is stopped goes on quickly when it is started again, as long as the embedding cache has room.
    """
    from FreqSegLib.evaluation.cases import chosen_cases, default_data_folder, list_cases, target_meaning

    session = session_of(context)
    started = time.monotonic()
    chosen = preset(preset_name, sam)
    names = list(dict.fromkeys(target)) if target else None
    modalities = None if names is None else sorted({target_meaning(name).modality for name in names})
    files = [path for path in (csv_path, csv_path and _cases_path(csv_path), markdown_path) if path is not None]
    check_apart(files)
    for path in files:
        check_target(path, overwrite=overwrite)
    every = list_cases(data or default_data_folder(), split.value, modalities=modalities, most_slices=max_slices)
    cases = chosen_cases(every, max_cases)
    available = {modality: sum(c.modality == modality for c in every) for modality in {c.modality for c in every}}
    for line in _used(cases, available):
        session.say(line)

    with progress_on(session.err, quiet=quiet, unit="cases") as show:
        show("Loading the models", 0, 0, None)
        from FreqSegLib.evaluation.evaluate import EvaluationProgress, evaluate_cases
        from FreqSegLib.evaluation.report import case_csv, markdown, summaries, summary_csv, terminal_tables
        from FreqSegLib.text_segmentation import TextSegmenter

        segmenter = TextSegmenter.from_preset(preset_name, device=device, sam=sam, settings=settings)

        def told(progress: EvaluationProgress) -> None:
            show("Evaluating", progress.done, progress.total, progress.seconds_left)

        try:
            rows = evaluate_cases(
                segmenter,
                cases,
                names,
                wrong=wrong,
                box_ceiling=box_ceiling,
                progress=told,
                cancel=session.interrupts.asked,
            )
        except Cancelled:
            raise KeyboardInterrupt from None
    table = summaries(rows, available)
    title = f"Text-guided segmentation, preset {chosen.name}, {split.value} cases"
    notes = _notes(chosen, settings, cases, available, max_slices)
    if not session.out.is_terminal:
        # in a file or pipe there is no width to keep to
        session.out.width = WIDE
    for part in terminal_tables(table, title, session.out.width):
        session.out.print(part)
    for note in notes:
        session.say(note)
    session.say(f"Took {readable_time(time.monotonic() - started)}.")
    with Delivery.prepared(overwrite=overwrite) as delivery:
        if csv_path is not None:
            delivery.place(csv_path).write_text(summary_csv(table), encoding="utf-8", newline="")
            delivery.place(_cases_path(csv_path)).write_text(case_csv(rows), encoding="utf-8", newline="")
        if markdown_path is not None:
            delivery.place(markdown_path).write_text(markdown(table, title, notes), encoding="utf-8")
        with session.interrupts.held():
            delivery.deliver()
    for path in files:
        session.say(f"Wrote {path}")


def _cases_path(csv_path: Path) -> Path:
    """Where the per-case table goes: ``out.csv`` -> ``out_cases.csv``."""
    return csv_path.with_name(f"{csv_path.stem}{CASES_SUFFIX}{csv_path.suffix}")


def _used(cases: Sequence[Case], available: dict[str, int]) -> list[str]:
    from FreqSegLib.evaluation.cases import LABELLED_SETS

    return [
        f"{kind.title}: {sum(c.modality == kind.modality for c in cases)} of {available[kind.modality]} cases"
        for kind in LABELLED_SETS
        if kind.modality in available
    ]


def _notes(
    chosen: Preset,
    settings: TextSegmentationSettings,
    cases: Sequence[Case],
    available: dict[str, int],
    max_slices: int,
) -> list[str]:
    from FreqSegLib import __version__
    from FreqSegLib.evaluation.report import NOTES, SEEN

    changed = [
        f"{option_name(item.name)} {getattr(settings, item.name)}"
        for item in fields(settings)
        if getattr(settings, item.name) != item.default
    ]
    said = f"FreqSeg {__version__}, preset {chosen.name} ({', '.join(chosen.weights)})"
    notes = [f"{said}; settings changed: {', '.join(changed) if changed else 'none'}.", *NOTES]
    if len(cases) < sum(available.values()):
        notes.append(f"Not all cases were used: {'; '.join(_used(cases, available))}, evenly spaced by name.")
    if max_slices:
        notes.append(f"Volumes were thinned out evenly to at most {max_slices} slices.")
    if "litemedsam" in chosen.weights:
        notes.append(SEEN)
    return notes
