"""Options that several commands have, declared once."""

from __future__ import annotations

from typing import Annotated

import typer

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Series = Annotated[str | None, typer.Option(help="Series of a DICOM folder: number, description or UID.")]
FrameNumber = Annotated[int | None, typer.Option(help="Volume of a time series or multi-channel file, from 0.", min=0)]
FillNonfinite = Annotated[
    float | None, typer.Option(help="Value for NaN and infinite voxels, instead of refusing them.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but warnings and errors.")]
NoProgress = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
