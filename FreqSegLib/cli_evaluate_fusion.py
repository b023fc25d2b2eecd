"""``freqseg evaluate-fusion`` for one fused image or volume, and ``freqseg evaluate-fusion-set`` for every method."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from FreqSegLib.cli_app import app, session_of
from FreqSegLib.cli_common_options import NoProgress, Overwrite
from FreqSegLib.cli_fuse import recorded_beside
from FreqSegLib.cli_output import Delivery, check_apart, check_target
from FreqSegLib.cli_progress import progress_on
from FreqSegLib.errors import Cancelled, SettingsError
from FreqSegLib.settings import FusionSettings

if TYPE_CHECKING:
    from FreqSegLib.fusion import FusionMethod
    from FreqSegLib.progress import Progress

WIDE = 190


@app.command("evaluate-fusion")
def evaluate_fusion(
    context: typer.Context,
    fused: Annotated[Path, typer.Argument(metavar="FUSED", help="What was fused.", show_default=False)],
    ct: Annotated[Path, typer.Argument(metavar="CT", help="The CT it was made of.", show_default=False)],
    mr: Annotated[Path, typer.Argument(metavar="MR", help="The MR it was made of.", show_default=False)],
    csv_path: Annotated[Path | None, typer.Option("--csv", help="The table as CSV, numbers in full.")] = None,
    figure: Annotated[Path | None, typer.Option(help="The metrics as a picture (.png).")] = None,
    slices: Annotated[int, typer.Option(help="Measure at most so many slices, evenly spaced.", min=1)] = 24,
    ct_window: Annotated[str, typer.Option(help="CT grey levels, where the fused file does not record them.")] = "auto",
    mr_intensity: Annotated[str, typer.Option(help="MR grey levels, likewise.")] = "auto",
    overwrite: Overwrite = False,
    quiet: NoProgress = False,
) -> None:
    """Measure a fused image or volume in every metric, beside average, max, choose-max and Laplacian pyramid.

    The last column is the most that this pair allows (for Nabf the least).
    """
    session = session_of(context)
    files = [path for path in (csv_path, figure) if path is not None]
    if figure is not None and figure.suffix.lower() != ".png":
        raise SettingsError(f"the figure must be a .png, got {figure}")
    check_apart(files, [path for path in (fused, ct, mr) if path.is_file()])
    for path in files:
        check_target(path, overwrite=overwrite)

    with progress_on(session.err, quiet=quiet, unit="slices") as show:
        show("Opening the volumes", 0, 0, None)
        from FreqSegLib.evaluation.fusion_comparison import compare, comparison_csv, grey_levels, pair_of, table
        from FreqSegLib.volume import Volume

        settings = FusionSettings(ct_window=ct_window, mr_intensity=mr_intensity)
        measured, bone, soft = (Volume.read(path) for path in (fused, ct, mr))
        pair, levels = pair_of(measured, bone, soft, settings, recorded_beside(fused))

        def told(progress: Progress) -> None:
            show(progress.stage, progress.done, progress.total, progress.seconds_left)

        try:
            found = compare(
                pair,
                grey_levels(measured),
                "fused",
                most_slices=slices,
                progress=told,
                cancel=session.interrupts.asked,
            )
        except Cancelled:
            raise KeyboardInterrupt from None
    for volume in (measured, bone, soft):
        for sentence in volume.warnings:
            session.warn(sentence)
    if not session.out.is_terminal:
        session.out.width = WIDE
    session.out.print(table(found, f"{fused.name}: {found.measured}"))
    session.say(
        f"{levels}. MI, VIF and SCD are sums over both sources, CC, FMI and SSIM means; less is better in Nabf."
    )
    session.say("Ceiling: the most this pair allows (PSNR: the plain average); '–' where it sets none.")
    with Delivery.prepared(overwrite=overwrite) as delivery:
        if csv_path is not None:
            delivery.place(csv_path).write_text(comparison_csv(found), encoding="utf-8", newline="")
        if figure is not None:
            from FreqSegLib.evaluation.fusion_report import metrics_figure
            from FreqSegLib.sheet import png

            delivery.place(figure).write_bytes(png(metrics_figure(found)))
        with session.interrupts.held():
            delivery.deliver()
    for path in files:
        session.say(f"Wrote {path}")


class SplitName(str, Enum):
    """Choices of ``--split``."""

    test = "test"
    validation = "validation"


@app.command("evaluate-fusion-set")
def evaluate_fusion_set(
    context: typer.Context,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder that holds fusion/.", metavar="FOLDER", show_default="FREQSEG_DATA, else ../shared/data"
        ),
    ] = None,
    split: Annotated[SplitName, typer.Option(help="Which patients; no network was trained on either.")] = (
        SplitName.test
    ),
    weights_folder: Annotated[
        list[str] | None,
        typer.Option(help="NETWORK=FOLDER: other weights, like multi-scale=build/fusion; may be repeated."),
    ] = None,
    max_slices: Annotated[int, typer.Option(help="At most so many slices, evenly spaced (0: all).", min=0)] = 0,
    csv_path: Annotated[Path | None, typer.Option("--csv", help="Every slice and method, numbers in full.")] = None,
    markdown_path: Annotated[Path | None, typer.Option("--markdown", help="The tables as Markdown.")] = None,
    overwrite: Overwrite = False,
    quiet: NoProgress = False,
) -> None:
    """Every fusion method on CT/MR slices of patients that no network was trained on."""
    session = session_of(context)
    files = [path for path in (csv_path, markdown_path) if path is not None]
    check_apart(files)
    for path in files:
        check_target(path, overwrite=overwrite)
    with progress_on(session.err, quiet=quiet, unit="slices") as show:
        show("Loading the networks", 0, 0, None)
        import numpy as np

        from FreqSegLib.evaluation.cases import default_data_folder
        from FreqSegLib.evaluation.fusion_comparison import baselines
        from FreqSegLib.evaluation.fusion_set import evaluate_pairs, markdown, slices_csv
        from FreqSegLib.fusion.rules import ChooseMax
        from FreqSegLib.training.fusion_data import PATIENTS, read_pairs

        pairs = read_pairs(data or default_data_folder(), split.value)
        patients = ", ".join(PATIENTS[split.value])
        if max_slices and max_slices < len(pairs):
            pairs = pairs.subset(np.unique(np.linspace(0, len(pairs) - 1, max_slices).round().astype(int)).tolist())
        networks, missing = _networks(weights_folder or [])
        methods = {**baselines(), "choose-max db4, 3 levels": ChooseMax("db4", 3), **networks}

        def told(progress: Progress) -> None:
            show(progress.stage, progress.done, progress.total, progress.seconds_left)

        try:
            result = evaluate_pairs(pairs, methods, progress=told, cancel=session.interrupts.asked)
        except Cancelled:
            raise KeyboardInterrupt from None
    title = f"CT/MR fusion, {split.value} patients {patients}"
    notes = [f"Slices of the Harvard Whole Brain Atlas, patients {patients}, kept out of training.", *missing]
    page = markdown(result, title, notes)
    session.say(page)
    with Delivery.prepared(overwrite=overwrite) as delivery:
        if csv_path is not None:
            delivery.place(csv_path).write_text(slices_csv(result), encoding="utf-8", newline="")
        if markdown_path is not None:
            delivery.place(markdown_path).write_text(page, encoding="utf-8")
        with session.interrupts.held():
            delivery.deliver()
    for path in files:
        session.say(f"Wrote {path}")


def _networks(given: Sequence[str]) -> tuple[dict[str, FusionMethod], list[str]]:
    """Both networks with shipped or given weights, and what is missing."""
    from FreqSegLib import weights
    from FreqSegLib.evaluation.fusion_set import NETWORKS
    from FreqSegLib.fusion import fusion_method

    folders: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if name not in NETWORKS or not equals or not folder:
            raise SettingsError(f"--weights-folder must be NETWORK=FOLDER with {' or '.join(NETWORKS)}, got '{text}'")
        folders[name] = Path(folder)
    found: dict[str, FusionMethod] = {}
    missing = []
    for name in NETWORKS:
        if name in folders or weights.find(f"fusion-{name}") is not None:
            found[name] = fusion_method(name, weights_folder=folders.get(name))
        else:
            missing.append(f"The {name} network has no weights here; train it with: make train-fusion")
    return found, missing
