"""``freqseg segment``: a volume and prompts in, segments on the volume's own grid out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from FreqSegLib.cli_app import Session, app, session_of
from FreqSegLib.cli_common_options import Device, FillNonfinite, FrameNumber, Overwrite, Quiet, Series
from FreqSegLib.cli_options import with_settings
from FreqSegLib.cli_output import Delivery, check_apart, check_folder, check_target
from FreqSegLib.cli_progress import Show, progress_on
from FreqSegLib.cli_summary import Summary
from FreqSegLib.errors import Cancelled, InputError, OutputError, SettingsError
from FreqSegLib.presets import Preset, preset
from FreqSegLib.settings import TextSegmentationSettings

if TYPE_CHECKING:
    from FreqSegLib.text_segmentation import Progress, Segmentation, TextSegmenter
    from FreqSegLib.volume import Volume


@dataclass(frozen=True)
class Targets:
    """Every file a run will write, known before it starts."""

    output: Path
    segmentation: tuple[Path, ...]
    saliency: tuple[Path, ...] = ()
    uncertainty: tuple[Path, ...] = ()
    sheet: Path | None = None
    one_file_per_segment: bool = False

    @classmethod
    def planned(
        cls,
        prompts: Sequence[str],
        output: Path,
        *,
        saliency: Path | None = None,
        uncertainty: Path | None = None,
        sheet: Path | None = None,
        one_file_per_segment: bool = False,
    ) -> Targets:
        """Name them: a map of several prompts gets a file for each.

        Raises:
            OutputError: an extension stands for no format that can be written.
        """
        from FreqSegLib.image_file import WRITABLE, suffix_of
        from FreqSegLib.segmentation_file import paths_apart

        for path in (output, saliency, uncertainty):
            if path is not None and suffix_of(path) not in WRITABLE:
                raise OutputError(
                    f"cannot write {path}: the extension must be one of {', '.join(WRITABLE)}, got '{suffix_of(path)}'"
                )
        for path in (saliency, uncertainty):
            if path is not None and suffix_of(path) == ".seg.nrrd":
                raise OutputError(f"cannot write {path}: .seg.nrrd holds segments, this is a map; use .nrrd")

        def apart(path: Path | None) -> tuple[Path, ...]:
            if path is None:
                return ()
            return (path,) if len(prompts) == 1 else tuple(paths_apart(path, prompts, separator="-"))

        return cls(
            output=output,
            segmentation=tuple(paths_apart(output, prompts)) if one_file_per_segment else (output,),
            saliency=apart(saliency),
            uncertainty=apart(uncertainty),
            sheet=sheet,
            one_file_per_segment=one_file_per_segment,
        )

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self.segmentation, *self.saliency, *self.uncertainty)

    def check(self, source: Path, *, overwrite: bool) -> None:
        """Whether all of them may be written.

        Raises:
            OutputError, SettingsError: one may not.
        """
        check_apart(self.files, [source] if source.is_file() else [])
        for path in self.files:
            check_target(path, overwrite=overwrite)
        if self.sheet is not None:
            from FreqSegLib.sheet import old_sheets

            if old_sheets(self.sheet) and not overwrite:
                raise OutputError(f"{self.sheet} holds sheets already; choose another folder or add --overwrite")
            check_folder(self.sheet)

    def check_formats(self, volume: Volume) -> None:
        """Whether the formats can hold this volume.

        Raises:
            OutputError: one cannot.
        """
        import numpy as np

        from FreqSegLib.image_file import check_answer

        for path in self.segmentation:
            check_answer(path, volume, np.uint8)
        for path in (*self.saliency, *self.uncertainty):
            check_answer(path, volume, np.float32)


@app.command()
@with_settings(TextSegmentationSettings, leave_out=("uncertainty",))
def segment(
    context: typer.Context,
    volume: Annotated[
        Path,
        typer.Argument(
            metavar="VOLUME",
            help="NRRD, NIfTI, MetaImage, PNG, JPEG, TIFF, one DICOM file or a DICOM folder.",
            show_default=False,
        ),
    ],
    prompt: Annotated[
        list[str],
        typer.Option("--prompt", "-p", help='What to look for, like "brain tumour". Repeat it for more segments.'),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help=".seg.nrrd (names and colours), or a label map: .nrrd .nii.gz .mha .png .tif"
        ),
    ],
    preset_name: Annotated[
        str, typer.Option("--preset", help="Which weights and defaults; see: freqseg models list")
    ] = "lite",
    sam: Annotated[
        str | None, typer.Option(help="SAM-family model, for presets that take one.", show_default="preset's")
    ] = None,
    clip_folder: Annotated[
        Path | None, typer.Option(help="Your own image-text weights in open_clip's layout (biomedclip-sam).")
    ] = None,
    sam_checkpoint: Annotated[
        Path | None, typer.Option(help="Your own SAM or MedSAM weights (biomedclip-sam).")
    ] = None,
    device: Device = "auto",
    series: Series = None,
    frame: FrameNumber = None,
    fill_nonfinite: FillNonfinite = None,
    overwrite: Overwrite = False,
    one_file_per_segment: Annotated[
        bool, typer.Option("--one-file-per-segment", help="A file for each prompt, named after it.")
    ] = False,
    saliency: Annotated[
        Path | None, typer.Option(help="Also write where the model looked, in [0, 1], as a volume.")
    ] = None,
    uncertainty: Annotated[
        Path | None, typer.Option(help="Also write how far that varies when repeated (slower), as a volume.")
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Folder for a PNG a slice that shows every stage.", metavar="FOLDER")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    quiet: Quiet = False,
    *,
    settings: TextSegmentationSettings,
) -> None:
    """Segment what a prompt names, slice by slice, in a 2D or 3D image.

    Nothing is written unless everything is.
    """
    session = session_of(context)
    started = time.monotonic()
    if uncertainty is not None:
        settings = replace(settings, uncertainty=True)
    prompts = checked_prompts(prompt)
    chosen = preset(preset_name, sam)
    if not volume.exists():
        raise InputError(f"{volume}: no such file or folder")
    targets = Targets.planned(
        prompts,
        output,
        saliency=saliency,
        uncertainty=uncertainty,
        sheet=sheet,
        one_file_per_segment=one_file_per_segment,
    )
    targets.check(volume, overwrite=overwrite)
    if clip_folder is None:
        check_weights(chosen)

    with progress_on(session.err, quiet=quiet) as show:
        show("Opening the volume", 0, 0, None)
        from FreqSegLib.volume import Volume

        image = Volume.read(volume, series=series, frame=frame, fill_nonfinite=fill_nonfinite)
        targets.check_formats(image)
        check_image(image, settings)
        show("Loading the models", 0, 0, None)
        from FreqSegLib.text_segmentation import TextSegmenter

        segmenter = TextSegmenter.from_preset(
            preset_name,
            device=device,
            sam=sam,
            clip_folder=clip_folder,
            sam_checkpoint=sam_checkpoint,
            settings=settings,
        )
        check_request(segmenter, prompts, shown=image if sheet is not None else None)
        read_slices(session, segmenter, image, show)
        found = ask(session, segmenter, prompts, show, keep_stages=sheet is not None)
        with Delivery.prepared(overwrite=overwrite) as delivery:
            notes = write_results(delivery, segmenter, found, targets, show)
            with session.interrupts.held():
                delivery.deliver()
    summary = Summary.of(segmenter, found, targets, source=volume, notes=notes, seconds=time.monotonic() - started)
    for sentence in summary.warnings:
        session.warn(sentence)
    if as_json:
        print(json.dumps(summary.as_dict(), indent=2))
    elif not quiet:
        for line in summary.lines():
            session.say(line)


def checked_prompts(prompts: Sequence[str]) -> list[str]:
    """Prompts as the pipeline takes them.

    Raises:
        SettingsError: one is unusable or given twice.
    """
    from FreqSegLib.clip.prompts import clean_prompt

    cleaned = [clean_prompt(text) for text in prompts]
    for text in cleaned:
        if cleaned.count(text) > 1:
            raise SettingsError(f"The prompt '{text}' was given twice; name each target once.")
    return cleaned


def check_weights(chosen: Preset) -> None:
    """Whether the weights a preset cannot do without are here; their contents are checked when they are loaded.

    Raises:
        WeightsError: they are not; the message says how to get them.
    """
    from FreqSegLib import weights

    needed = chosen.weights if chosen.encoder == "lite" else chosen.weights[:1]
    for one in needed:
        if weights.find(one) is None:
            weights.require(one)


def check_image(volume: Volume, settings: TextSegmentationSettings) -> None:
    """Whether there is anything to see; costs nothing beside loading the models.

    Raises:
        InputError, SettingsError: a constant volume, or a window that holds none of it.
    """
    from FreqSegLib.intensity import normalise

    normalise(volume, settings.intensity)


def check_request(segmenter: TextSegmenter, prompts: Sequence[str], *, shown: Volume | None = None) -> None:
    """What can be told once the models are there, but before any slice is read.

    Args:
        segmenter: with its settings.
        prompts: what will be asked.
        shown: the volume, where its frequency images will be drawn.

    Raises:
        VocabularyError: the preset does not know a prompt.
        SettingsError, InputError: the wavelet is not offered, or does not fit the slices.
    """
    settings = segmenter.settings
    if segmenter.matcher is not None and segmenter.preset.has_vocabulary and not settings.experimental:
        for text in prompts:
            segmenter.matcher.require(text)
    _check_wavelet(segmenter, shown)


def read_slices(session: Session, segmenter: TextSegmenter, volume: Volume, show: Show) -> None:
    """All slices through the image tower.

    Raises:
        KeyboardInterrupt: the user stopped it.
    """
    try:
        segmenter.set_volume(volume, progress=_shown(show), cancel=session.interrupts.asked)
    except Cancelled:
        raise KeyboardInterrupt from None


def ask(
    session: Session, segmenter: TextSegmenter, prompts: Sequence[str], show: Show, *, keep_stages: bool
) -> Segmentation:
    """Every prompt on the volume that was read.

    Raises:
        KeyboardInterrupt: the user stopped it.
    """
    try:
        return segmenter.segment(
            prompts, progress=_shown(show), cancel=session.interrupts.asked, return_intermediate=keep_stages
        )
    except Cancelled:
        raise KeyboardInterrupt from None


def _shown(show: Show) -> Callable[[Progress], None]:
    return lambda progress: show(progress.stage, progress.done, progress.total, progress.seconds_left)


def _check_wavelet(segmenter: TextSegmenter, shown: Volume | None) -> None:
    """The wavelet may be needed only for the sheets at the end; a wrong name should not wait until then."""
    import torch

    from FreqSegLib.slices import SliceStack
    from FreqSegLib.wavelet import frequency_images

    settings, side = segmenter.settings, segmenter.encoder.image_size
    shapes = [(side, side)] + ([SliceStack.of(shown, settings.axis).slice_shape] if shown is not None else [])
    for shape in shapes:
        frequency_images(torch.zeros(1, 1, *shape), settings.wave, settings.levels, settings.wavelet_mode)


def write_results(
    delivery: Delivery, segmenter: TextSegmenter, found: Segmentation, targets: Targets, show: Show
) -> list[str]:
    """Write every target into a delivery.

    Returns:
        What the user should know.
    """
    from FreqSegLib.volume import write_segmentation

    prepared = segmenter.prepared
    assert prepared is not None
    notes: list[str] = []
    show("Writing", 0, 0, None)
    write_segmentation(
        delivery.place(targets.output),
        [result.segment() for result in found],
        prepared.volume,
        one_file_per_segment=targets.one_file_per_segment,
    )
    for kind, paths in (("saliency", targets.saliency), ("uncertainty", targets.uncertainty)):
        for path, result in zip(paths, found, strict=False):
            values = getattr(result, kind)
            if values is None:
                notes.append(f"'{result.name}' has no {kind} map with its settings, so {path} was not written.")
                continue
            prepared.volume.with_array(values, name=f"{kind} of {result.name}").write(delivery.place(path))
    if targets.sheet is not None:
        _draw_sheets(delivery, segmenter, found, targets.sheet, show)
    return notes


def _draw_sheets(delivery: Delivery, segmenter: TextSegmenter, found: Segmentation, folder: Path, show: Show) -> None:
    from FreqSegLib.sheet import old_sheets, sheet_name, write_sheets

    prepared = segmenter.prepared
    assert prepared is not None
    stack = prepared.stack
    for number, result in enumerate(found):

        def told(done: int, before: int = number * stack.count) -> None:
            show("Drawing sheets", before + done, stack.count * len(found), None)

        told(0)
        new = [sheet_name(result.name, item.index) for item in result.intermediates]
        aside = delivery.place(folder / new[0]).parent
        write_sheets(result, aside, pixel_spacing=stack.pixel_spacing, plane=stack.axis, progress=told)
        for old in old_sheets(folder, result.name):
            # Sheets of another volume with more slices would be taken for this one's.
            if old.name not in new:
                delivery.retire(old)
