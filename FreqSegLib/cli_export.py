"""``freqseg export``: a trained model as a file that other programs run."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from FreqSegLib.cli_app import app, session_of
from FreqSegLib.cli_common_options import Overwrite, Quiet
from FreqSegLib.cli_output import check_folder
from FreqSegLib.errors import InputError


class Formats(str, Enum):
    """Choices of ``--format``."""

    torchscript = "torchscript"
    torch_export = "torch-export"
    onnx = "onnx"
    int8 = "int8"


@app.command()
def export(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A spectral model's name or folder, or lite-text-guided.", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the files and their report.")],
    formats: Annotated[
        list[Formats],
        typer.Option("--format", "-f", help="Give it again for several; int8 is ONNX with 8-bit linear layers."),
    ] = [Formats.onnx],  # noqa: B006
    size: Annotated[
        list[int] | None,
        typer.Option(help="A side of the image, once for each axis (h w, or z h w).", show_default="as in use", min=1),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Image or volume to compare on; may be given again.", show_default="random numbers"),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="For lite-text-guided: what to ask of the images; may be given again.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Write a trained model as TorchScript, as a torch.export program, or as ONNX, for inputs of one size.

    Each file is loaded again and compared with the model. TorchScript, torch.export and ONNX are delivered only if
    their numbers are the same to 1e-4 of the largest (or of 1, if that is more); for int8 the difference is measured
    and reported.
    """
    session = session_of(context)
    for path in image or []:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
    check_folder(output)
    from FreqSegLib.export import REPORT_FILE, export_model

    silent = quiet or as_json
    done = export_model(
        model,
        output,
        [one.value for one in formats],
        size=tuple(size or ()),
        images=tuple(image or ()),
        prompts=tuple(prompt or ()),
        overwrite=overwrite,
        say=(lambda sentence: None) if silent else session.say,
    )
    if as_json:
        print(json.dumps([asdict(one) for one in done], indent=2))
    elif not quiet:
        session.say(f"Wrote {output / REPORT_FILE}")
