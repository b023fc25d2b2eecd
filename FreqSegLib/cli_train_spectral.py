"""``freqseg train-spectral``: train a spectral model as a configuration file says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from FreqSegLib.cli_app import app, session_of
from FreqSegLib.cli_common_options import Device, Overwrite
from FreqSegLib.cli_output import check_folder


@app.command("train-spectral")
def train_spectral(
    context: typer.Context,
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="JSON or TOML; see Resources/Configs.", show_default=False)
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="What the configuration's folders are relative to.", show_default="beside CONFIG"),
    ] = None,
    work: Annotated[Path, typer.Option(help="Checkpoints, log and curves; a stopped run goes on here.")] = Path(
        "build/spectral"
    ),
    models: Annotated[Path, typer.Option(help="Where the model goes, in a folder of its name.")] = Path(
        "Resources/Models"
    ),
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Train a spectral model on images or volumes with labels.

    A model in a folder where weights are looked for is then known by its name: freqseg spectral VOLUME --model NAME.
    Several processes: torchrun --nproc-per-node N -m FreqSegLib train-spectral CONFIG
    """
    from FreqSegLib import weights
    from FreqSegLib.errors import Cancelled
    from FreqSegLib.training.spectral_recipe import train_spectral as run

    session = session_of(context)
    check_folder(work)
    check_folder(models)
    try:
        folder = run(config, work, models, data=data, device=device, overwrite=overwrite, report=session.say)
    except KeyboardInterrupt:
        raise Cancelled("Stopped; the same command goes on from the last checkpoint.") from None
    if os.environ.get("RANK", "0") != "0":
        return
    if folder.name in weights.catalogue():
        weights.record_shipped(folder.name, models)
    session.say(f"Weights, {folder.name}'s description and its card are in {folder}")
    session.say(f'Use it: freqseg spectral VOLUME --model "{folder.resolve()}" -o labels.seg.nrrd')
