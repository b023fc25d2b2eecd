"""``freqseg spectral``: a trained spectral model on a volume."""

from __future__ import annotations

import json
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from FreqSegLib.cli_app import app, session_of
from FreqSegLib.cli_common_options import Device, FillNonfinite, FrameNumber, Overwrite, Quiet, Series
from FreqSegLib.cli_output import Delivery, check_apart, check_target
from FreqSegLib.cli_progress import progress_on, readable_time
from FreqSegLib.errors import Cancelled, InputError, OutputError, SettingsError

if TYPE_CHECKING:
    from FreqSegLib.mamba.model_config import SpectralModel
    from FreqSegLib.volume import Volume


class Method(str, Enum):
    """Choices of ``--method``."""

    auto = "auto"
    flips = "flips"
    dropout = "dropout"


class Measure(str, Enum):
    """Choices of ``--measure``."""

    entropy = "entropy"
    mutual_information = "mutual-information"
    probability = "probability"


@app.command()
def spectral(
    context: typer.Context,
    volume: Annotated[
        Path,
        typer.Argument(
            metavar="VOLUME",
            help="NRRD, NIfTI, MetaImage, PNG, JPEG, TIFF, one DICOM file or a DICOM folder.",
            show_default=False,
        ),
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="A model's name, or its folder.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help=".seg.nrrd (names and colours), or a label map: .nrrd .nii.gz .mha .png .tif"
        ),
    ],
    uncertainty: Annotated[
        Path | None,
        typer.Option(
            help="Also write how unsure the model is, in [0, 1], as a volume (slower). The labels are then those of "
            "the mean of all repetitions, and differ here and there from those without it."
        ),
    ] = None,
    method: Annotated[
        Method,
        typer.Option(
            help="How predictions are repeated: as mirror images, or with random channels left out; auto: as the model "
            "was trained."
        ),
    ] = Method.auto,
    measure: Annotated[
        Measure, typer.Option(help="What is written: all doubt, what predictions disagree about, or the probability.")
    ] = Measure.entropy,
    samples: Annotated[int, typer.Option(min=2, help="Repetitions with dropout.")] = 8,
    seed: Annotated[int, typer.Option(help="Of dropout.")] = 0,
    device: Device = "auto",
    series: Series = None,
    frame: FrameNumber = None,
    fill_nonfinite: FillNonfinite = None,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Segment the classes a trained spectral model knows, in a 2D or 3D image.

    Nothing is written unless everything is.
    """
    import numpy as np

    session = session_of(context)
    started = time.monotonic()
    if not volume.exists():
        raise InputError(f"{volume}: no such file or folder")
    _check_repetitions(context, uncertainty)
    files = [path for path in (output, uncertainty) if path is not None]
    _check_formats(output, uncertainty)
    check_apart(files, [volume] if volume.is_file() else [])
    for path in files:
        check_target(path, overwrite=overwrite)

    with progress_on(session.err, quiet=quiet) as show:
        show("Opening the volume", 0, 0, None)
        from FreqSegLib.volume import Volume, write_segmentation

        image = Volume.read(volume, series=series, frame=frame, fill_nonfinite=fill_nonfinite)
        _check_formats(output, uncertainty, image)
        show("Loading the model", 0, 0, None)
        from FreqSegLib.spectral_segmentation import SpectralSegmenter

        segmenter = SpectralSegmenter.from_model(model, device)
        try:
            found = segmenter.segment(
                image,
                uncertainty=None if uncertainty is None else method.value,
                samples=samples,
                seed=seed,
                keep_probabilities=False,
                progress=lambda p: show(p.stage, p.done, p.total, p.seconds_left),
                cancel=session.interrupts.asked,
            )
        except Cancelled:
            raise KeyboardInterrupt from None
        show("Writing", 0, 0, None)
        with Delivery.prepared(overwrite=overwrite) as delivery:
            write_segmentation(delivery.place(output), [one.segment() for one in found], image)
            if uncertainty is not None and found.uncertainty is not None:
                maps = {
                    Measure.entropy: found.uncertainty.entropy,
                    Measure.mutual_information: found.uncertainty.mutual_information,
                    Measure.probability: found.uncertainty.mean,
                }
                maps[measure].write(delivery.place(uncertainty))
            with session.interrupts.held():
                delivery.deliver()
    millilitres = abs(float(np.linalg.det(image.affine[:3, :3]))) / 1000
    flat = image.spatial_dimension == 2
    warnings = [*_caution(image, segmenter.model), *found.warnings]
    for sentence in warnings:
        session.warn(sentence)
    if as_json:
        summary = {
            "volume": str(volume),
            "model": segmenter.model.name,
            "segments": [
                {"name": one.name, "voxels": int(one.mask.sum()), "label": index}
                | ({} if flat else {"millilitres": float(one.mask.sum()) * millilitres})
                for index, one in enumerate(found, start=1)
            ],
            "files": [str(path) for path in files],
            "warnings": warnings,
            "seconds": round(time.monotonic() - started, 2),
        }
        print(json.dumps(summary, indent=2))
    elif not quiet:
        for one in found:
            count = int(one.mask.sum())
            size = f"{count} pixels" if flat else f"{count} voxels, {count * millilitres:.3g} ml"
            session.say(f"{one.name}: {size if count else 'not found'}")
        for path in files:
            session.say(f"Wrote {path}")
        session.say(f"Took {readable_time(time.monotonic() - started)}.")


def _check_repetitions(context: typer.Context, uncertainty: Path | None) -> None:
    if uncertainty is not None:
        return
    for name in ("method", "measure", "samples", "seed"):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise SettingsError(f"--{name} says how uncertainty is measured; give --uncertainty FILE too")


def _check_formats(output: Path, uncertainty: Path | None, volume: Volume | None = None) -> None:
    """Whether the extensions are known and, once the volume is, whether their formats can hold what is written."""
    import numpy as np

    from FreqSegLib.image_file import WRITABLE, check_answer, suffix_of

    for path in (output, uncertainty):
        if path is not None and suffix_of(path) not in WRITABLE:
            raise OutputError(
                f"cannot write {path}: the extension must be one of {', '.join(WRITABLE)}, got '{suffix_of(path)}'"
            )
    if uncertainty is not None and suffix_of(uncertainty) == ".seg.nrrd":
        raise OutputError(f"cannot write {uncertainty}: .seg.nrrd holds segments, this is a map; use .nrrd")
    if volume is None:
        return
    check_answer(output, volume, np.uint8)
    if uncertainty is not None:
        check_answer(uncertainty, volume, np.float32)


def _caution(volume: Volume, model: SpectralModel) -> list[str]:
    """A sentence where the volume seems to be another kind of picture than the model was trained on."""
    from FreqSegLib.contrast import contrast_in, contrast_name, other_contrast

    wanted = contrast_in(f"{model.description} {model.name}")
    found = other_contrast(f"{volume.name} {volume.description}", volume.modality, wanted)
    if not found or wanted is None:
        return []
    shown = contrast_name(wanted)
    return [f"'{volume.name}' seems to be {found}; '{model.name}' was trained on {shown}. Expect a poor result."]
