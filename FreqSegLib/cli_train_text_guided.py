"""``freqseg train text-guided``: phase 2, and the group of commands for the training phases."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from FreqSegLib.cli_app import app, session_of
from FreqSegLib.cli_common_options import Device

train = typer.Typer(help="Train the text-guided models, phase by phase.", no_args_is_help=True)
app.add_typer(train, name="train")


@train.command("text-guided")
def text_guided(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="JSON or TOML; the shipped model's values for what it leaves out."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with the training images (default: FREQSEG_DATA, else ../shared/data).")
    ] = None,
    device: Device = "auto",
) -> None:
    """Train the lite preset's text-guided model on cached embeddings, choose its settings, write weights and card.

    A run that is stopped goes on from its last checkpoint when it is started again. Several processes, once the caches
    are filled: torchrun --nproc-per-node N -m FreqSegLib train text-guided CONFIG
    """
    from FreqSegLib.evaluation.cases import default_data_folder
    from FreqSegLib.mamba.model_config import read_config
    from FreqSegLib.training.text_guided_recipe import TextGuidedRecipe, train_text_guided

    session = session_of(context)
    recipe = TextGuidedRecipe() if config is None else read_config(config, TextGuidedRecipe)
    folder = train_text_guided(data or default_data_folder(), recipe, session.say, device=device)
    if os.environ.get("RANK", "0") == "0":
        session.say(f"Weights, settings and card are in {folder}")
