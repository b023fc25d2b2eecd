"""``freqseg train-baseline``: a U-Net a task, on the text-guided model's own slices, to stand beside it."""

from __future__ import annotations

import time
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from FreqSegLib.cli_app import Session, app, session_of
from FreqSegLib.cli_cases import MaxCases, MaxSlices, Split, SplitName, TrainingData
from FreqSegLib.cli_common_options import Device, NoProgress, Overwrite
from FreqSegLib.cli_output import Delivery, check_target
from FreqSegLib.cli_progress import progress_on, readable_time
from FreqSegLib.errors import Cancelled

if TYPE_CHECKING:
    import torch
    from torch import nn

    from FreqSegLib.evaluation.ablation_scores import CaseScore
    from FreqSegLib.evaluation.baselines import Rule
    from FreqSegLib.training.baselines import BaselineConfig, Task

TITLE = "The text-guided model beside a U-Net a task"
BESIDE = "text-guided"


class TaskName(str, Enum):
    """The tasks, and all of them."""

    glioma = "glioma"
    lungs = "lungs"
    breast = "breast"
    hippocampus = "hippocampus"
    all = "all"


@app.command("train-baseline")
def train_baseline(
    context: typer.Context,
    task: Annotated[TaskName, typer.Argument(help="Which U-Net.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FOLDER", help="Gets baselines.md, .csv and baselines_cases.csv."),
    ],
    beside: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV",
            help="The text-guided model's table of cases (NAME_cases.csv of 'freqseg evaluate --csv NAME.csv' on the "
            "same cases), for one table of both.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps, of 8 slices each.", min=1)] = 600,
    learning_rate: Annotated[float, typer.Option(help="AdamW's, after a short warm-up; then a cosine.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Seed of the slices chosen, the start and every batch.", min=0)] = 0,
    data: TrainingData = None,
    max_cases: MaxCases = None,
    max_slices: MaxSlices = 0,
    split: Split = SplitName.test,
    work: Annotated[Path, typer.Option(help="A folder a task; what is finished there is not done again.")] = Path(
        "build/baselines"
    ),
    pictures: Annotated[
        Path, typer.Option(help="Cached pictures of the training slices; what is missing is made.")
    ] = Path("build/text_guided/pictures"),
    device: Device = "auto",
    overwrite: Overwrite = False,
    quiet: NoProgress = False,
) -> None:
    """Train MONAI's UNet for one task or all, on the slices of the text-guided model, and measure it on the same cases.

    Nothing is shipped: these are numbers to stand beside. A run that is stopped goes on from its last checkpoint.
    """
    files = [output / name for name in ("baselines.md", "baselines.csv", "baselines_cases.csv")]
    for path in files:
        check_target(path, overwrite=overwrite)
    from FreqSegLib.device import resolve_device
    from FreqSegLib.evaluation.ablation_scores import read_scores
    from FreqSegLib.evaluation.cases import chosen_cases, default_data_folder, list_cases
    from FreqSegLib.training.baselines import TASKS, BaselineConfig, task_of

    session = session_of(context)
    started = time.monotonic()
    theirs = [] if beside is None else read_scores(beside, BESIDE)
    folder, chosen_device = data or default_data_folder(), resolve_device(device)
    tasks = TASKS if task is TaskName.all else (task_of(task.value),)
    config = BaselineConfig(seed=seed)
    loop = replace(config.loop, steps=steps, learning_rate=learning_rate, seed=seed, validate_every=max(1, steps // 6))
    config = replace(config, loop=loop)
    modalities = [one.modality for one in tasks]
    every = list_cases(folder, split.value, modalities=modalities, most_slices=max_slices)
    cases = chosen_cases(every, max_cases)
    scores: list[CaseScore] = []
    facts: list[str] = []
    for one in tasks:
        network, rules, said = _trained(session, one, folder, pictures, work, config, chosen_device)
        facts.append(said)
        with progress_on(session.err, quiet=quiet, unit="cases") as show:
            from FreqSegLib.evaluation.baselines import measure_baseline

            def told(done: int, total: int, name: str = one.name) -> None:
                show(f"Measuring {name}", done, total, None)

            own = [case for case in cases if case.modality == one.modality]
            try:
                scores += measure_baseline(one, network, rules, own, chosen_device, told, session.interrupts.asked)
            except Cancelled:
                raise KeyboardInterrupt from None
    scores += [score for score in theirs if score.modality in modalities]
    facts.append(f"{split.value} cases: {len(cases)} of {len(every)}.")
    _report(session, files, scores, facts, overwrite=overwrite)
    session.say(f"Took {readable_time(time.monotonic() - started)}.")
    for path in files:
        session.say(f"Wrote {path}")


def _trained(
    session: Session, task: Task, data: Path, pictures: Path, work: Path, config: BaselineConfig, device: torch.device
) -> tuple[nn.Module, dict[str, Rule], str]:
    """A task's network, its rules, and what is to be said about both."""
    from FreqSegLib.evaluation.baselines import choose_rules, kept_rules
    from FreqSegLib.evaluation.cases import chosen_cases, list_cases
    from FreqSegLib.training.baselines import train_baseline as train
    from FreqSegLib.training.lite_data import plan
    from FreqSegLib.training.text_guided_data import cache_pictures, read_pictures
    from FreqSegLib.training.text_guided_recipe import TextGuidedRecipe

    def row(values: dict[str, float]) -> None:
        session.say(f"{task.name}: " + "  ".join(f"{key} {value:.4g}" for key, value in values.items()))

    recipe = TextGuidedRecipe()
    # whatever either of our rounds is trained on
    choices = [recipe.slices, *([recipe.finishing.slices] if recipe.finishing else [])]
    both = dict.fromkeys(item for choice in choices for item in plan(data, config.seed, choice))
    slices = [item for item in both if item.modality == task.modality]
    cache_pictures(data, pictures, slices)
    folder = work / task.name
    network, best = train(task, slices, read_pictures(pictures, slices), folder, config, device, row)
    tuned_on = chosen_cases(
        list_cases(data, "train-validation", modalities=[task.modality], most_slices=recipe.tune_slices),
        recipe.tune_cases,
    )
    rules = kept_rules(folder / "run", lambda: choose_rules(task, network, tuned_on, device))
    chosen = "; ".join(f"{name} {rule.said}" for name, rule in rules.items())
    size = sum(weight.numel() for weight in network.parameters()) / 1e6
    said = (
        f"{task.title}: MONAI's residual UNet, {size:.2f} M parameters, {sum(s.split == 'train' for s in slices)} "
        f"training slices (copies included), {config.loop.steps} steps of {config.batch_size} (rate "
        f"{config.loop.learning_rate:g}) in "
        f"{best['seconds'] / 60:.0f} min, best at step {int(best['step'])}; on {len(tuned_on)} validation patients: "
        f"{chosen}."
    )
    return network, rules, said


def _report(session: Session, files: list[Path], scores: list[CaseScore], facts: list[str], *, overwrite: bool) -> None:
    from FreqSegLib.evaluation.ablation_report import Listed, Part, markdown, table_csv
    from FreqSegLib.evaluation.ablation_scores import write_scores
    from FreqSegLib.evaluation.baselines import METHOD

    ways = (
        Listed(METHOD, "MONAI's UNet, one a task: it knows its task and no language"),
        Listed(BESIDE, "one model for all of them, which is told in words what to draw", METHOD),
    )
    text = (
        "Trained on the same slices, in the same frame, mirrored, moved and with other grey curves alike, by AdamW; "
        "loss: Dice and binary cross-entropy. Threshold, parts kept, their smallest size and evening out over slices "
        "were chosen on the same validation patients, and masks brought back to each image's grid the same way. A "
        "U-Net is not asked for what cannot be there."
    )
    page, table, cases = files
    parts = [Part("U-Net and text-guided model", text, ways, None, tuple(scores))]
    with Delivery.prepared(overwrite=overwrite) as delivery:
        said = markdown(TITLE, parts, facts, claims=False)
        delivery.place(page).write_text(said, encoding="utf-8")
        delivery.place(table).write_text(table_csv(parts), encoding="utf-8", newline="")
        write_scores(delivery.place(cases), scores)
        with session.interrupts.held():
            delivery.deliver()
    session.say(said)
