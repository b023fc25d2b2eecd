"""``freqseg train-lite``: train the lite preset's aligner again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from FreqSegLib.cli_app import app, session_of


@app.command("train-lite")
def train_lite(
    context: typer.Context,
    data: Annotated[
        Path | None, typer.Option(help="Folder with the training images (default: FREQSEG_DATA, else ../shared/data).")
    ] = None,
    work: Annotated[
        Path, typer.Option(help="Cache of embeddings, checkpoints, log; a stopped run goes on here.")
    ] = Path("build/lite"),
    models: Annotated[Path, typer.Option(help="Where the weights and their card go.")] = Path("Resources/Models"),
    seed: Annotated[int, typer.Option(help="Seed of the slices chosen, the start and every batch.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps at most.")] = None,
) -> None:
    """Train the lite preset's aligner: embeddings once, then contrastive training, calibration, tuning and card."""
    from dataclasses import replace

    from FreqSegLib.evaluation.cases import default_data_folder
    from FreqSegLib.training.lite_recipe import LiteRecipe
    from FreqSegLib.training.lite_recipe import train_lite as run

    session = session_of(context)
    recipe = LiteRecipe(seed=seed)
    if steps is not None:
        recipe = replace(recipe, loop=replace(recipe.loop, steps=steps))
    folder = run(data or default_data_folder(), work, models, recipe, session.say)
    session.say(f"Weights, settings and card are in {folder}")
