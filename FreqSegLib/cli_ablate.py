"""``freqseg ablate``: what each part of the method adds, form by form."""

from __future__ import annotations

import time
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from FreqSegLib.cli_app import Session, app, session_of
from FreqSegLib.cli_cases import MaxCases, MaxSlices, Split, SplitName, TrainingData, WrongPrompts
from FreqSegLib.cli_common_options import Device, NoProgress, Overwrite
from FreqSegLib.cli_output import Delivery, check_target
from FreqSegLib.cli_progress import progress_on, readable_time
from FreqSegLib.errors import Cancelled

if TYPE_CHECKING:
    from collections.abc import Callable

    from FreqSegLib.evaluation.ablation import AblationPlan, Lessons
    from FreqSegLib.text_segmentation import TextSegmenter

TITLE = "What each part adds"
PRESET = "lite"


class PartChoice(str, Enum):
    """Choices of ``--part``."""

    trained = "trained"
    zero_shot = "zero-shot"
    both = "both"


@app.command()
def ablate(
    context: typer.Context,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FOLDER", help="Gets ablation.md, .csv, .png and ablation_cases.csv."),
    ],
    part: Annotated[PartChoice, typer.Option(help="The trained model, the zero-shot pipeline, or both.")] = (
        PartChoice.both
    ),
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Do only this form now, like hf+lf; may be repeated. The report holds all that are finished.",
            show_default="all but batch-normaliser, instance-normaliser, db4, placeless",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps of every form.", min=1)] = 400,
    seed: Annotated[int, typer.Option(help="Seed of the slices chosen, the start and every batch.", min=0)] = 0,
    data: TrainingData = None,
    max_cases: MaxCases = None,
    max_slices: MaxSlices = 0,
    split: Split = SplitName.test,
    wrong: WrongPrompts = 2,
    work: Annotated[Path, typer.Option(help="A folder a form; what is finished there is not done again.")] = Path(
        "build/ablation"
    ),
    embeddings: Annotated[
        Path, typer.Option(help="Cached tower embeddings of the training slices; what is missing is computed.")
    ] = Path("build/lite/slices"),
    pictures: Annotated[Path, typer.Option(help="Cached pictures of the training slices, likewise.")] = Path(
        "build/text_guided/pictures"
    ),
    device: Device = "auto",
    overwrite: Overwrite = False,
    quiet: NoProgress = False,
) -> None:
    """Train the text-guided model without its parts and with them, measure every form, and say what each part adds.

    A run that is stopped goes on where it was when it is started again.
    """
    files = [output / name for name in ("ablation.md", "ablation.csv", "ablation_cases.csv", "ablation.png")]
    for path in files:
        check_target(path, overwrite=overwrite)
    from FreqSegLib.evaluation.cases import chosen_cases, default_data_folder, list_cases

    session = session_of(context)
    started = time.monotonic()
    folder = data or default_data_folder()
    session.say("Loading the models")
    from FreqSegLib.evaluation.ablation import (
        AblationPlan,
        chosen_forms,
        measure_trained,
        measure_zero_shot,
        train_forms,
    )
    from FreqSegLib.evaluation.evaluate import EvaluationProgress
    from FreqSegLib.text_segmentation import TextSegmenter

    plan = AblationPlan(
        embeddings=str(embeddings),
        pictures=str(pictures),
        work=str(work),
        seed=seed,
        steps=steps,
        split=split.value,
        most_cases=max_cases,
        most_slices=max_slices,
        wrong=wrong,
    )
    trained, zero_shot = chosen_forms(only or [], part.value)
    every = list_cases(folder, plan.split, most_slices=max_slices)
    cases = chosen_cases(every, max_cases)
    segmenter = TextSegmenter.from_preset(PRESET, device=device)
    text = segmenter.encoder.text  # type: ignore[attr-defined]
    train_forms(trained, _lessons(session, folder, plan, segmenter), plan, session.say, segmenter.device)
    with progress_on(session.err, quiet=quiet, unit="cases") as show:

        def told(form: str, progress: EvaluationProgress) -> None:
            show(f"Measuring {form}", progress.done, progress.total, progress.seconds_left)

        try:
            measure_trained(trained, segmenter, text, cases, plan, told, session.interrupts.asked)
            measure_zero_shot(zero_shot, segmenter, _digest(), cases, plan, told, session.interrupts.asked)
        except Cancelled:
            raise KeyboardInterrupt from None
    _report(session, files, plan, part, len(cases), len(every), overwrite=overwrite)
    session.say(f"Took {readable_time(time.monotonic() - started)}.")
    for path in files:
        session.say(f"Wrote {path}")


def _lessons(session: Session, data: Path, plan: AblationPlan, segmenter: TextSegmenter) -> Callable[[], Lessons]:
    """Fills the caches that are not full and reads them, when it is called."""

    def read() -> Lessons:
        from FreqSegLib.evaluation.ablation import Lessons
        from FreqSegLib.training import lite_data, text_guided_data

        def counted(what: str) -> Callable[[int, int], None]:
            return lambda done, total: session.say(f"{what} {done}/{total}") if done % 100 == 0 else None

        assert segmenter.refiner is not None
        slices = lite_data.plan(data, plan.seed)
        kept, shown_in = Path(plan.embeddings), Path(plan.pictures)
        if not all(lite_data.cache_file(kept, item).exists() for item in slices):
            lite_data.cache(data, kept, segmenter.refiner.embed, slices, counted("embeddings"))
        if not all(lite_data.cache_file(shown_in, item).exists() for item in slices):
            text_guided_data.cache_pictures(data, shown_in, slices, counted("pictures"))
        cached = lite_data.read_cache(kept, slices)
        shown = text_guided_data.read_pictures(shown_in, cached.slices)
        wordings = text_guided_data.trained_wordings()
        text = segmenter.encoder.text  # type: ignore[attr-defined]
        return Lessons(cached, shown, tuple(wordings), text_guided_data.sentence_vectors(text, wordings))

    return read


def _digest() -> str:
    """Of the weights that a zero-shot run of the preset depends on."""
    from FreqSegLib import weights
    from FreqSegLib.download import file_digest
    from FreqSegLib.presets import preset

    found = [
        file_digest(weights.require(name) / file.filename)
        for name in preset(PRESET).weights
        for file in weights.catalogue()[name].files
    ]
    return " ".join(digest[:16] for digest in found)


def _report(
    session: Session,
    files: list[Path],
    plan: AblationPlan,
    part: PartChoice,
    used: int,
    available: int,
    *,
    overwrite: bool,
) -> None:
    from FreqSegLib import __version__
    from FreqSegLib.evaluation.ablation import finished_parts
    from FreqSegLib.evaluation.ablation_report import figure, markdown, table_csv
    from FreqSegLib.evaluation.ablation_scores import write_scores
    from FreqSegLib.evaluation.report import SEEN

    parts = finished_parts(plan, part.value)
    notes = [f"FreqSeg {__version__}, preset {PRESET}, {plan.split} cases: {used} of {available}.", SEEN]
    if plan.most_slices:
        notes.append(f"Volumes were thinned out evenly to at most {plan.most_slices} slices.")
    page, table, cases, picture = files
    with Delivery.prepared(overwrite=overwrite) as delivery:
        text = markdown(TITLE, parts, notes)
        delivery.place(page).write_text(text, encoding="utf-8")
        delivery.place(table).write_text(table_csv(parts), encoding="utf-8", newline="")
        scores = [replace(score, method=f"{found.title}: {score.method}") for found in parts for score in found.scores]
        write_scores(delivery.place(cases), scores)
        figure(parts, TITLE).savefig(delivery.place(picture), format="png", dpi=120)
        with session.interrupts.held():
            delivery.deliver()
    session.say(text)
