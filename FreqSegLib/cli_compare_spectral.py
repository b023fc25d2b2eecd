"""``freqseg compare-spectral``: SpectralVMUNet beside other networks, trained and measured alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from FreqSegLib.cli_app import app, session_of
from FreqSegLib.cli_common_options import Device


@app.command("compare-spectral")
def compare_spectral(
    context: typer.Context,
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG", help="As for train-spectral, with test_images and test_labels.", show_default=False
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="What the configuration's folders are relative to.", show_default="beside CONFIG"),
    ] = None,
    network: Annotated[
        list[str] | None,
        typer.Option(
            help="SpectralVMUNet, 'no spectral path', 'no frequency loss', 'neither', UNet, SegResNet or SwinUNETR; "
            "may be repeated. The others are tested against the first.",
            show_default="SpectralVMUNet, UNet, SegResNet",
        ),
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="May be repeated.", show_default="0")] = None,
    noise: Annotated[
        list[float] | None,
        typer.Option(
            help="Also measure with noise of this standard deviation on the test images, as a share of their range; "
            "may be repeated.",
            show_default="none",
        ),
    ] = None,
    drop_parts: Annotated[
        bool,
        typer.Option(
            "--drop-parts",
            help="Also choose for every network, on the validation images, which small parts of a class are dropped.",
        ),
    ] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Runs (a stopped one goes on), comparison.md and comparison.csv.")
    ] = Path("build/spectral_comparison"),
    device: Device = "auto",
) -> None:
    """Train SpectralVMUNet and MONAI's networks on the same images in the same way, and measure them on test images."""
    from FreqSegLib.device import resolve_device
    from FreqSegLib.errors import Cancelled
    from FreqSegLib.output_file import replacing
    from FreqSegLib.training.spectral_comparison import OWN, as_csv, compare, table

    session = session_of(context)
    try:
        rows = compare(
            config,
            output,
            data=data,
            networks=network or (OWN, "UNet", "SegResNet"),
            seeds=seed or (0,),
            noise=noise or (),
            drop_parts=drop_parts,
            device=resolve_device(device),
            report=session.say,
        )
    except KeyboardInterrupt:
        raise Cancelled("Stopped; the same command goes on from the last checkpoint.") from None
    text = table(rows)
    for level in noise or ():
        text += f"\nWith noise of {level:g} of the range:\n\n{table(rows, f'{level:g}')}"
    folder = output / Path(config).stem
    with replacing([folder / "comparison.md", folder / "comparison.csv"], overwrite=True) as (markdown, cases):
        markdown.write_text(text, encoding="utf-8")
        cases.write_text(as_csv(rows), encoding="utf-8")
    session.say(text)
    session.say(f"Table and every case are in {folder}")
