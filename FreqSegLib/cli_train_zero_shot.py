"""``freqseg train zero-shot``: phase 2 for the zero-shot path's own modules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from FreqSegLib.cli_app import session_of
from FreqSegLib.cli_train_text_guided import train


@train.command("zero-shot")
def zero_shot(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="JSON or TOML; the shipped modules' values for what it leaves out."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with the training images (default: FREQSEG_DATA, else ../shared/data).")
    ] = None,
    test: Annotated[
        bool, typer.Option("--test", help="Measure on the test folders too: at the end, when all is chosen.")
    ] = False,
) -> None:
    """Train the fusion of the frequency branches (FFBI) and the amortised bottleneck on frozen, cached tokens.

    Validation patients decide for which targets the branches are on by default. A run that is stopped goes on from its
    last checkpoint when it is started again.
    """
    from FreqSegLib.evaluation.cases import default_data_folder
    from FreqSegLib.mamba.model_config import read_config
    from FreqSegLib.training.zero_shot_recipe import ZeroShotRecipe, train_zero_shot

    session = session_of(context)
    recipe = ZeroShotRecipe() if config is None else read_config(config, ZeroShotRecipe)
    folder = train_zero_shot(data or default_data_folder(), recipe, session.say, test=test)
    session.say(f"Weights, settings and card are in {folder}")
