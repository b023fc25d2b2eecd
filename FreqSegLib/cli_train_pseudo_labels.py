"""``freqseg train pseudo-labels``: phase 3, weak supervision with nnU-Net."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from FreqSegLib.cli_app import session_of
from FreqSegLib.cli_common_options import Device
from FreqSegLib.cli_train_text_guided import train


@train.command("pseudo-labels")
def pseudo_labels(
    context: typer.Context,
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG", help="JSON or TOML: images without labels, targets.", show_default=False),
    ],
    device: Device = "auto",
    prepare_only: Annotated[
        bool, typer.Option("--prepare-only", help="Write nnU-Net's dataset and stop; needs no nnU-Net.")
    ] = False,
) -> None:
    """Label images by prompts, train nnU-Net v2 on what is certain, and join several checkpoints' predictions.

    nnU-Net is an extra: pip install 'freqseg[nnunet]'. A run that is stopped goes on when it is started again.
    """
    from FreqSegLib.training.pseudo_labels_recipe import train_pseudo_labels

    session = session_of(context)
    folder = train_pseudo_labels(config, session.say, device=device, prepare_only=prepare_only)
    session.say(f"{'The dataset is' if prepare_only else 'Labels and entropy are'} in {folder}")
