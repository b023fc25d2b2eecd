"""``freqseg bands``: the wavelet decomposition of one slice as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from FreqSegLib.cli_app import app, session_of


@app.command()
def bands(
    context: typer.Context,
    volume: Annotated[Path, typer.Argument(metavar="VOLUME", help="As for freqseg segment.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture, a .png.")],
    index: Annotated[
        int | None, typer.Option("--slice", help="Number of the slice, from 1.", min=1, show_default="middle")
    ] = None,
    axis: Annotated[str, typer.Option(help="auto, axial, coronal or sagittal.")] = "auto",
    intensity: Annotated[str, typer.Option(help="Grey levels, as for freqseg segment.")] = "auto",
    wave: Annotated[str, typer.Option(help="Wavelet, like haar, db2, bior2.2.")] = "haar",
    levels: Annotated[int, typer.Option(help="Wavelet levels J.", min=1, max=8)] = 1,
    wavelet_mode: Annotated[str, typer.Option(help="Border mode.")] = "symmetric",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
) -> None:
    """Show what the wavelet stage makes of a slice: frequency images, every band, and where the energy lies."""
    from FreqSegLib.band_figure import band_figure, write_band_figure
    from FreqSegLib.errors import OutputError, SettingsError
    from FreqSegLib.intensity import normalise
    from FreqSegLib.slices import SliceStack
    from FreqSegLib.volume import Volume

    if output.suffix.lower() != ".png":
        raise OutputError(f"cannot write {output}: the picture must be a .png, got '{output.suffix}'")
    image = Volume.read(volume)
    stack = SliceStack.of(image, axis)
    chosen = (stack.count + 1) // 2 if index is None else index
    if chosen > stack.count:
        raise SettingsError(f"{volume} has {stack.count} slices along this axis, got slice {chosen}")
    pixels = normalise(image, intensity).apply(stack.take(chosen - 1))
    where = f", {stack.axis} slice {chosen} of {stack.count}" if stack.count > 1 else ""
    figure = band_figure(
        pixels, wave, levels, wavelet_mode, pixel_spacing=stack.pixel_spacing, title=f"{image.name}{where}"
    )
    write_band_figure(figure, output, overwrite=overwrite)
    session_of(context).say(f"The decomposition is in {output}")
