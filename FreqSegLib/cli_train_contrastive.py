"""``freqseg train contrastive``: phase 1 on a user's own images and captions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from FreqSegLib.cli_app import session_of
from FreqSegLib.cli_common_options import Device
from FreqSegLib.cli_train_text_guided import train


@train.command("contrastive")
def contrastive(
    context: typer.Context,
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG", help="JSON or TOML: images with captions, encoder, training.", show_default=False
        ),
    ],
    device: Device = "auto",
) -> None:
    """Train an image-text encoder on your own images and captions (DHN-NCE).

    The lite preset's aligner, or an open_clip model such as BiomedCLIP. A run that is stopped goes on from its last
    checkpoint when it is started again. Several processes: torchrun --nproc-per-node N -m FreqSegLib train contrastive
    CONFIG
    """
    from FreqSegLib.training.contrastive_recipe import train_contrastive

    session = session_of(context)
    folder = train_contrastive(config, session.say, device=device)
    if os.environ.get("RANK", "0") == "0":
        session.say(f"Weights and card are in {folder}")
