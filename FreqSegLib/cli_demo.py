"""``freqseg demo``: the main job on the simulated head that comes with FreqSeg, and a picture of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from FreqSegLib.cli_app import Session, app, session_of
from FreqSegLib.cli_common_options import Device
from FreqSegLib.cli_output import Delivery, check_folder
from FreqSegLib.cli_progress import Show, progress_on, readable_time
from FreqSegLib.cli_segment import Targets, ask, check_request, check_weights, read_slices, write_results
from FreqSegLib.cli_summary import Found
from FreqSegLib.presets import preset

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from FreqSegLib.slices import SliceStack

PROMPT, ABSENT = "brain tumour", "lungs"
NOTE = "Simulated data; says nothing about how well it works on people"
PICTURE = "demo.png"


@app.command()
def demo(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.", metavar="FOLDER")] = Path(
        "freqseg-demo"
    ),
    device: Device = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but the outcome.")] = False,
) -> None:
    """Segment the brain tumour of a simulated FLAIR volume, and ask for lungs, which are not there.

    Results of an earlier demo in the same folder are replaced.
    """
    from FreqSegLib.samples import FLAIR, LESION, sample

    session = session_of(context)
    started = time.monotonic()
    check_weights(preset("lite"))
    flair, lesion = sample(FLAIR), sample(LESION)
    targets = Targets.planned(
        [PROMPT],
        output / "result.seg.nrrd",
        saliency=output / "saliency.nrrd",
        sheet=output / "sheets",
    )
    check_folder(output)
    with progress_on(session.err, quiet=quiet) as show:
        outcome = _run(session, flair, lesion, targets, device, show)
    for sentence in outcome.warnings:
        session.warn(sentence)
    session.say(f"{PROMPT}: {outcome.tumour.sentence}")
    session.say(
        f"  DSC {outcome.dice:.2f} against the truth of the simulated volume ({outcome.truth_millilitres:.1f} ml); "
        "simulated data says nothing about how well it works on people."
    )
    session.say(f"{ABSENT}: {outcome.absent.sentence}{', as it should be: a head has none' if outcome.refused else ''}")
    session.say(f"Wrote {output / PICTURE}, the segmentation, its maps and sheets to {output}")
    session.say(f"Took {readable_time(time.monotonic() - started)}.")


@dataclass(frozen=True)
class Outcome:
    """What the demo found."""

    tumour: Found
    absent: Found
    dice: float
    truth_millilitres: float
    warnings: tuple[str, ...]

    @property
    def refused(self) -> bool:
        """Was the target that is not there left empty?"""
        return self.absent.voxels == 0


def _run(session: Session, flair: Path, lesion: Path, targets: Targets, device: str, show: Show) -> Outcome:
    import numpy as np

    from FreqSegLib.volume import Volume

    show("Loading the models", 0, 0, None)
    from FreqSegLib.text_segmentation import TextSegmenter

    volume = Volume.read(flair)
    truth = Volume.read(lesion).array > 0
    segmenter = TextSegmenter.from_preset("lite", device=device)
    check_request(segmenter, [PROMPT, ABSENT], shown=volume)
    read_slices(session, segmenter, volume, show)
    found = ask(session, segmenter, [PROMPT], show, keep_stages=True)
    absent = ask(session, segmenter, [ABSENT], show, keep_stages=False)
    prepared = segmenter.prepared
    assert prepared is not None
    tumour = found[0]
    dice = float(2 * (tumour.mask & truth).sum() / max(1, tumour.mask.sum() + truth.sum()))
    voxel = abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1000
    outcome = Outcome(
        tumour=Found.of(tumour, prepared.stack),
        absent=Found.of(absent[0], prepared.stack),
        dice=dice,
        truth_millilitres=float(truth.sum()) * voxel,
        warnings=tuple(dict.fromkeys((*found.warnings, *absent.warnings))),
    )
    with Delivery.prepared(overwrite=True) as delivery:
        write_results(delivery, segmenter, found, targets, show)
        picture = _picture(outcome, prepared.stack, truth)
        delivery.place(targets.output.with_name(PICTURE)).write_bytes(picture)
        with session.interrupts.held():
            delivery.deliver()
    return outcome


def _picture(outcome: Outcome, stack: SliceStack, truth: NDArray[np.bool_]) -> bytes:
    from FreqSegLib.sheet import overview_figure, png

    tumour = outcome.tumour
    refused = f"“{ABSENT}”: left empty" if outcome.refused else f"“{ABSENT}”: drawn by mistake"
    figure = overview_figure(
        tumour.result,
        truth=stack.displayed(truth),
        label="simulated FLAIR",
        facts=f"{tumour.sentence}    DSC {outcome.dice:.2f}    {refused}",
        note=NOTE,
        pixel_spacing=stack.pixel_spacing,
    )
    return png(figure)
