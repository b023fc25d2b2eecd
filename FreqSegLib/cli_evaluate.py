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
from FreqSegLib.cli_cases import MaxCases, MaxSlices, Split, SplitName, WrongPrompts
from FreqSegLib.cli_common_options import Device, NoProgress, Overwrite
from FreqSegLib.cli_options import option_name, with_settings
from FreqSegLib.cli_output import Delivery, check_apart, check_target
from FreqSegLib.cli_progress import progress_on, readable_time
from FreqSegLib.errors import Cancelled
from FreqSegLib.presets import Preset, preset
from FreqSegLib.settings import TextSegmentationSettings

if TYPE_CHECKING:
    from FreqSegLib.evaluation.cases import Case
    from FreqSegLib.evaluation.wordings import WordingKind

WIDE = 210


class WordingName(str, Enum):
    """Choices of ``--wordings``."""

    canonical = "canonical"
    trained = "trained"
    held_out = "held-out"


@app.command()
@with_settings(TextSegmentationSettings, leave_out=("uncertainty", "experimental"))
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
    max_cases: MaxCases = None,
    max_slices: MaxSlices = 0,
    split: Split = SplitName.test,
    preset_name: Annotated[str, typer.Option("--preset", help="Which weights and defaults.")] = "lite",
    sam: Annotated[str | None, typer.Option(help="SAM-family model, for presets that take one.")] = None,
    device: Device = "auto",
    wrong: WrongPrompts = 2,
    box_ceiling: Annotated[
        bool, typer.Option("--box-ceiling/--no-box-ceiling", help="Also decode the truth's own boxes.")
    ] = True,
    wordings: Annotated[
        list[WordingName] | None,
        typer.Option(
            help="Ask by the target's name, or in wordings used in training or kept from it, which take turns over the "
            "cases. Repeated: every kind is asked, and compared with the first.",
            show_default="canonical",
        ),
    ] = None,
    uncertainty: Annotated[
        bool | None,
        typer.Option(
            "--uncertainty/--no-uncertainty",
            help="Ask once more with uncertainty, and measure whether it predicts error.",
            show_default="on where the trained method can be used; zero-shot it takes long",
        ),
    ] = None,
    csv_path: Annotated[
        Path | None,
        typer.Option(
            "--csv",
            help="The table as CSV; beside it NAME_cases.csv, and NAME_calibration.csv, NAME_reliability.csv and "
            "NAME_wordings.csv where these were measured.",
        ),
    ] = None,
    markdown_path: Annotated[Path | None, typer.Option("--markdown", help="The tables as Markdown.")] = None,
    html_path: Annotated[
        Path | None,
        typer.Option(
            "--html", help="A page with tables, pictures of the best, median and worst cases, and every case."
        ),
    ] = None,
    overwrite: Overwrite = False,
    quiet: NoProgress = False,
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
    kinds: list[WordingKind] = [name.value for name in dict.fromkeys(wordings or [WordingName.canonical])]
    doubt = _affordable(chosen, settings) if uncertainty is None else uncertainty
    made = ["", "cases", *(["calibration", "reliability"] if doubt else []), *(["wordings"] if len(kinds) > 1 else [])]
    tables = {name: _beside(csv_path, name) for name in made} if csv_path is not None else {}
    files = [*tables.values(), *(path for path in (markdown_path, html_path) if path is not None)]
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
        from FreqSegLib.evaluation.evaluation_result import EvaluationResult
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
                wordings=kinds,
                uncertainty=doubt,
                views=html_path is not None,
                progress=told,
                cancel=session.interrupts.asked,
            )
        except Cancelled:
            raise KeyboardInterrupt from None
    title = f"Text-guided segmentation, preset {chosen.name}, {split.value} cases"
    notes = _notes(chosen, any(row.method == "trained" for row in rows), settings, cases, available, max_slices)
    result = EvaluationResult(title, rows, available, kinds, [*notes, f"Asked in: {', '.join(kinds)} wordings."])
    if not session.out.is_terminal:
        # in a file or pipe there is no width to keep to
        session.out.width = WIDE
    for part in result.terminal(session.out.width):
        session.out.print(part)
    for note in result.notes:
        session.say(note)
    session.say(f"Took {readable_time(time.monotonic() - started)}.")
    with Delivery.prepared(overwrite=overwrite) as delivery:
        for name, path in tables.items():
            delivery.place(path).write_text(result.csv(name), encoding="utf-8", newline="")
        if markdown_path is not None:
            delivery.place(markdown_path).write_text(result.markdown(), encoding="utf-8")
        if html_path is not None:
            about = [f"{split.value} cases", *_used(cases, available)]
            about += [f"at most {max_slices} slices of a volume"] if max_slices else []
            page = result.html(segmenter, settings, about, _changed(settings), uncertainty=doubt)
            delivery.place(html_path).write_text(page, encoding="utf-8")
        with session.interrupts.held():
            delivery.deliver()
    for path in files:
        session.say(f"Wrote {path}")


def _beside(csv_path: Path, name: str) -> Path:
    """Where another table goes: ``out.csv`` -> ``out_cases.csv``."""
    return csv_path.with_name(f"{csv_path.stem}_{name}{csv_path.suffix}") if name else csv_path


def _affordable(chosen: Preset, settings: TextSegmentationSettings) -> bool:
    """Uncertainty is computed unasked where the trained method can answer; zero-shot it would take several times."""
    from FreqSegLib import weights

    return settings.method != "zero-shot" and chosen.trained is not None and weights.find(chosen.trained) is not None


def _used(cases: Sequence[Case], available: dict[str, int]) -> list[str]:
    from FreqSegLib.evaluation.cases import LABELLED_SETS

    return [
        f"{kind.title}: {sum(c.modality == kind.modality for c in cases)} of {available[kind.modality]} cases"
        for kind in LABELLED_SETS
        if kind.modality in available
    ]


def _notes(
    chosen: Preset,
    trained: bool,
    settings: TextSegmentationSettings,
    cases: Sequence[Case],
    available: dict[str, int],
    max_slices: int,
) -> list[str]:
    from FreqSegLib import __version__
    from FreqSegLib.evaluation.report import NOTES, SEEN

    ids = [*chosen.weights, *([chosen.trained] if trained and chosen.trained else [])]
    said = f"FreqSeg {__version__}, preset {chosen.name} ({', '.join(ids)})"
    notes = [f"{said}; settings changed: {_changed(settings)}.", *NOTES]
    if len(cases) < sum(available.values()):
        notes.append(f"Not all cases were used: {'; '.join(_used(cases, available))}, evenly spaced by name.")
    if max_slices:
        notes.append(f"Volumes were thinned out evenly to at most {max_slices} slices.")
    if "litemedsam" in chosen.weights:
        notes.append(SEEN)
    return notes


def _changed(settings: TextSegmentationSettings) -> str:
    changed = [
        f"{option_name(item.name)} {getattr(settings, item.name)}"
        for item in fields(settings)
        if getattr(settings, item.name) != item.default
    ]
    return ", ".join(changed) or "none"
