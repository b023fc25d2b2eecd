"""``freqseg fuse`` and ``freqseg fuse-folder``: a CT and a registered MR in, one fused volume on the CT's grid out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from FreqSegLib.cli_app import Session, app, session_of
from FreqSegLib.cli_common_options import Device, FillNonfinite, Overwrite, Quiet
from FreqSegLib.cli_options import with_settings
from FreqSegLib.cli_output import Delivery, check_apart, check_folder, check_target
from FreqSegLib.cli_progress import Show, progress_on, readable_time
from FreqSegLib.errors import Cancelled, InputError, OutputError
from FreqSegLib.settings import FusionSettings

if TYPE_CHECKING:
    from FreqSegLib.progress import Progress
    from FreqSegLib.volume import Volume
    from FreqSegLib.volume_fusion import FusionResult, VolumeFuser

LOG = "fusion.json"
"""In the output folder of ``fuse-folder``: the settings its files were made with, so that a resumed run can compare."""

Result = TypeVar("Result")


@app.command()
@with_settings(FusionSettings)
def fuse(
    context: typer.Context,
    ct: Annotated[Path, typer.Argument(metavar="CT", help="Volume, image, DICOM file or folder.", show_default=False)],
    mr: Annotated[Path, typer.Argument(metavar="MR", help="The MR of the same patient.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Fused volume: .nrrd .nii.gz .mha, for single images .png .tif")
    ],
    masks: Annotated[
        Path | None, typer.Option(help="Also write the CT's share in per cent, a file a band named after it.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Also write pictures and every metric as one HTML page.")] = None,
    weights_folder: Annotated[Path | None, typer.Option(help="Folder with other weights of the network.")] = None,
    device: Device = "auto",
    ct_series: Annotated[str | None, typer.Option(help="Series of the CT's DICOM folder.")] = None,
    mr_series: Annotated[str | None, typer.Option(help="Series of the MR's DICOM folder.")] = None,
    fill_nonfinite: FillNonfinite = None,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print how it was made as JSON.")] = False,
    quiet: Quiet = False,
    *,
    settings: FusionSettings,
) -> None:
    """Fuse a CT and a registered MR of one patient into one volume on the CT's grid.

    Nothing is written unless everything is.
    """
    session = session_of(context)
    started = time.monotonic()
    for path in (ct, mr):
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
    files = [path for path in (output, note_file(output), masks, report) if path is not None]
    _check_formats(output, masks)
    check_apart(files, [path for path in (ct, mr) if path.is_file()])
    for path in files:
        check_target(path, overwrite=overwrite)

    with progress_on(session.err, quiet=quiet, unit="slices") as show:
        show("Opening the volumes", 0, 0, None)
        from FreqSegLib.volume import Volume
        from FreqSegLib.volume_fusion import VolumeFuser

        first = Volume.read(ct, series=ct_series, fill_nonfinite=fill_nonfinite)
        second = Volume.read(mr, series=mr_series, fill_nonfinite=fill_nonfinite)
        _check_holds(output, first)
        show("Loading the method", 0, 0, None)
        fuser = VolumeFuser.from_preset(device=device, settings=settings, weights_folder=weights_folder)
        result = _fused(session, fuser, first, second, show, masks=masks is not None or report is not None)
        with Delivery.prepared(overwrite=overwrite) as delivery:
            written = _write(delivery, result, output, masks)
            if report is not None:
                page = _stoppable(lambda: report_of(result, settings.method, _told(show), session))
                delivery.place(report).write_text(page, encoding="utf-8")
                written.append(report)
            with session.interrupts.held():
                delivery.deliver()
    for sentence in result.warnings:
        session.warn(sentence)
    if as_json:
        print(json.dumps({**result.metadata, "warnings": result.warnings, "files": [str(path) for path in written]}))
    elif not quiet:
        for line in _summary(result, written, time.monotonic() - started):
            session.say(line)


@app.command("fuse-folder")
@with_settings(FusionSettings)
def fuse_folder(
    context: typer.Context,
    ct_folder: Annotated[Path, typer.Argument(metavar="CT_FOLDER", show_default=False)],
    mr_folder: Annotated[Path, typer.Argument(metavar="MR_FOLDER", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the fused files.", metavar="FOLDER")],
    weights_folder: Annotated[Path | None, typer.Option(help="Folder with other weights of the network.")] = None,
    device: Device = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Fuse finished pairs again, instead of going on after them.")
    ] = False,
    quiet: Quiet = False,
    *,
    settings: FusionSettings,
) -> int:
    """Fuse all pairs of two folders, matched by file name; a run that was stopped goes on where it was.

    Images give .png, volumes .nrrd. A pair that cannot be fused is listed, and the others are fused all the same.
    """
    session = session_of(context)
    plan = Plan.of(ct_folder, mr_folder, output)
    for sentence in plan.warnings():
        session.warn(sentence)
    check_folder(output)
    _check_settings(output, settings, weights_folder, plan, overwrite=overwrite)
    waiting = [pair for pair in plan.pairs if overwrite or not pair.target.exists()]
    if not quiet and len(waiting) < len(plan.pairs):
        session.say(f"{len(plan.pairs) - len(waiting)} of {len(plan.pairs)} pairs are finished already.")
    failed: list[str] = []
    with progress_on(session.err, quiet=quiet, unit="pairs") as show:
        if waiting:
            show("Loading the method", 0, 0, None)
            from FreqSegLib.volume_fusion import VolumeFuser

            fuser = VolumeFuser.from_preset(device=device, settings=settings, weights_folder=weights_folder)
            output.mkdir(parents=True, exist_ok=True)
            _write_log(output, settings, weights_folder)
        started = time.monotonic()
        for done, pair in enumerate(waiting):
            left = (time.monotonic() - started) / done * (len(waiting) - done) if done else None
            show("Fusing", done, len(waiting), left)
            try:
                for sentence in _fuse_one(session, fuser, pair):
                    session.warn(f"{pair.target.stem}: {sentence}")
            except InputError as problem:
                failed.append(f"{pair.target.stem}: {problem}")
        if waiting:
            show("Fusing", len(waiting), len(waiting), 0.0)
    for sentence in failed:
        session.fail(f"Not fused: {sentence}")
    if not quiet:
        session.say(f"Fused {len(waiting) - len(failed)} of {len(waiting)} pairs into {output}.")
    return 1 if failed else 0


@dataclass(frozen=True)
class PairFiles:
    """One pair of a folder run."""

    ct: Path
    mr: Path
    target: Path


@dataclass(frozen=True)
class Plan:
    """What a folder run will do: pairs by file name (without the extension), and files without a partner."""

    pairs: tuple[PairFiles, ...]
    only_ct: tuple[str, ...]
    only_mr: tuple[str, ...]

    @classmethod
    def of(cls, ct_folder: Path, mr_folder: Path, output: Path) -> Plan:
        """Look at both folders.

        Raises:
            InputError: a folder is missing, has two files of one name, or no file has a partner.
        """
        from FreqSegLib.image_file import PICTURES, suffix_of

        ct, mr = _images(ct_folder), _images(mr_folder)
        both = sorted(ct.keys() & mr.keys())
        if not both:
            raise InputError(
                f"no image in {ct_folder} ({len(ct)} images) has the name of one in {mr_folder} ({len(mr)} images); "
                "pairs are matched by file name"
            )
        pairs = []
        for name in both:
            kind = ".png" if suffix_of(ct[name]) in PICTURES else ".nrrd"
            pairs.append(PairFiles(ct[name], mr[name], output / f"{name}{kind}"))
        check_apart([pair.target for pair in pairs], [*ct.values(), *mr.values()])
        return cls(tuple(pairs), tuple(sorted(ct.keys() - mr.keys())), tuple(sorted(mr.keys() - ct.keys())))

    def warnings(self) -> list[str]:
        """Who has no partner."""
        return [
            f"{len(names)} without a partner, only in the {side} folder: {_some(names)}"
            for side, names in (("CT", self.only_ct), ("MR", self.only_mr))
            if names
        ]


def note_file(output: Path) -> Path | None:
    """Where the record goes when the format's header cannot keep it: ``fused.png`` -> ``fused.json``."""
    from FreqSegLib.image_file import KEEP_NOTES, stem_of, suffix_of

    return None if suffix_of(output) in KEEP_NOTES else output.with_name(f"{stem_of(output)}.json")


def recorded_beside(output: Path) -> dict[str, Any] | None:
    """The record in the file beside a fused one; None if there is none, or it is something else."""
    note = note_file(output)
    if note is None or not note.is_file():
        return None
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def as_stored(fused: Volume, path: Path) -> Volume:
    """A fused volume in the type its format has: pictures hold whole grey levels in 8 bits."""
    import numpy as np

    from FreqSegLib.image_file import PICTURES, suffix_of

    if suffix_of(path) not in PICTURES:
        return fused
    return fused.with_array(np.clip(np.rint(fused.array), 0, 255).astype(np.uint8))


def report_of(result: FusionResult, method: str, progress: Callable[[Progress], None], session: Session) -> str:
    """The HTML report of a result with masks."""
    from FreqSegLib.evaluation.fusion_comparison import compare
    from FreqSegLib.evaluation.fusion_report import best_slice, report_page, shown_slice

    pair = result.pair
    comparison = compare(pair, result.fused.array, method, progress=progress, cancel=session.interrupts.asked)
    index = best_slice(pair, comparison.slices)
    masks = {volume.name: volume.array for volume in result.masks}
    return report_page(
        [shown_slice(pair, result.fused.array, index, masks)], comparison, method, _facts(result), result.warnings
    )


def _fused(session: Session, fuser: VolumeFuser, ct: Volume, mr: Volume, show: Show, *, masks: bool) -> FusionResult:
    return _stoppable(
        lambda: fuser.fuse(ct, mr, masks=masks, progress=_told(show), cancel=session.interrupts.asked),
    )


def _stoppable(work: Callable[[], Result]) -> Result:
    """Raises: KeyboardInterrupt: the user stopped it."""
    try:
        return work()
    except Cancelled:
        raise KeyboardInterrupt from None


def _told(show: Show) -> Callable[[Progress], None]:
    return lambda progress: show(progress.stage, progress.done, progress.total, progress.seconds_left)


def _write(delivery: Delivery, result: FusionResult, output: Path, masks: Path | None) -> list[Path]:
    """Everything but the report into a delivery; returns the final paths."""
    from FreqSegLib.segmentation_file import paths_apart

    written = [output]
    as_stored(result.fused, output).write(delivery.place(output))
    note = note_file(output)
    if note is not None:
        delivery.place(note).write_text(json.dumps(result.metadata, indent=2) + "\n", encoding="utf-8")
        written.append(note)
    if masks is not None:
        paths = paths_apart(masks, [volume.name for volume in result.masks], separator="-")
        for path, volume in zip(paths, result.masks, strict=True):
            volume.write(delivery.place(path))
        written += paths
    return written


def _fuse_one(session: Session, fuser: VolumeFuser, pair: PairFiles) -> Sequence[str]:
    """Fuse and write one pair of a folder.

    Raises:
        InputError: it cannot be fused.
        KeyboardInterrupt: the user stopped the run; pairs that are finished stay.
    """
    from FreqSegLib.volume import Volume

    try:
        result = fuser.fuse(Volume.read(pair.ct), Volume.read(pair.mr), cancel=session.interrupts.asked)
    except Cancelled:
        raise KeyboardInterrupt from None
    as_stored(result.fused, pair.target).write(pair.target, overwrite=True)
    return result.warnings


def _images(folder: Path) -> dict[str, Path]:
    """The images of a folder by file name without extension."""
    from FreqSegLib.image_file import PICTURES, WRITABLE, stem_of, suffix_of

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    known = {*PICTURES, *WRITABLE} - {".seg.nrrd"}
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if not path.is_file() or suffix_of(path) not in known or path.name.startswith("."):
            continue
        name = stem_of(path)
        if name in found:
            raise InputError(f"{folder} has two images called '{name}' ({found[name].name} and {path.name}); keep one")
        found[name] = path
    return found


def _made_with(settings: FusionSettings, weights_folder: Path | None) -> dict[str, object]:
    shaping = {key: value for key, value in asdict(settings).items() if key != "batch_size"}
    return {**shaping, "weights_folder": None if weights_folder is None else str(weights_folder)}


def _check_settings(
    output: Path, settings: FusionSettings, weights_folder: Path | None, plan: Plan, *, overwrite: bool
) -> None:
    """Going on with other settings would leave a folder of two kinds of files."""
    log = output / LOG
    if overwrite or not any(pair.target.exists() for pair in plan.pairs):
        return
    if not log.is_file():
        raise OutputError(
            f"{output} holds files of these names that 'freqseg fuse-folder' did not make; choose another folder or "
            "allow overwriting (--overwrite)"
        )
    try:
        before = json.loads(log.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{log} is damaged; choose another folder or allow overwriting (--overwrite)") from error
    now = _made_with(settings, weights_folder)
    changed = [f"{key} was {before.get(key)}, now {value}" for key, value in now.items() if before.get(key) != value]
    if changed:
        raise OutputError(
            f"the files in {output} were made with other settings ({'; '.join(changed)}); choose another folder or "
            "fuse them again (--overwrite)"
        )


def _write_log(output: Path, settings: FusionSettings, weights_folder: Path | None) -> None:
    from FreqSegLib import __version__

    content = {"version": __version__, "grey_levels": "0 to 255", "settings": _made_with(settings, weights_folder)}
    temporary = output / f".{LOG}.part"
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, output / LOG)


def _check_formats(output: Path, masks: Path | None) -> None:
    from FreqSegLib.image_file import WRITABLE, suffix_of

    for path in (output, masks):
        if path is None:
            continue
        if suffix_of(path) not in WRITABLE:
            raise OutputError(
                f"cannot write {path}: the extension must be one of {', '.join(WRITABLE)}, got '{suffix_of(path)}'"
            )
        if suffix_of(path) == ".seg.nrrd":
            raise OutputError(f"cannot write {path}: .seg.nrrd holds segments, this is an image; use .nrrd")


def _check_holds(output: Path, ct: Volume) -> None:
    """Refuse a format that cannot hold the result before anything is computed."""
    import numpy as np

    from FreqSegLib.image_file import check_writable

    fused = ct.with_array(np.broadcast_to(np.float32(0), ct.shape))
    check_writable(output, as_stored(fused, output))


def _summary(result: FusionResult, written: Sequence[Path], seconds: float) -> list[str]:
    return [f"{key}: {value}" for key, value in _facts(result)] + [
        *(f"Wrote {path}" for path in written),
        f"Took {readable_time(seconds)}.",
    ]


def _facts(result: FusionResult) -> list[tuple[str, str]]:
    record = result.record
    wave = f", wavelet {record.wave}" if record.wave else ""
    levels = f", {record.levels} levels" if record.levels else ""
    facts = [
        ("Method", f"{record.method}{wave}{levels}"),
        ("CT", f"{record.ct.name}: {record.ct.intensity}"),
        ("MR", f"{record.mr.name}: {record.mr.intensity}{', resampled onto the CT' if record.resampled else ''}"),
    ]
    if record.check is not None:
        facts.append(
            (
                "Registration",
                f"they share {record.check.own:.2f} bits, {record.check.best_copy:.2f} at most when displaced",
            )
        )
    if record.transform is not None:
        import numpy as np

        from FreqSegLib.registration import RigidTransform

        transform = RigidTransform(np.array(record.transform), 0.0, "recorded", record.seed or 0)
        volume = result.fused
        centre = (volume.affine @ [*((count - 1) / 2 for count in volume.shape[::-1]), 1.0])[:3]
        facts.append(
            (
                "Rigid registration",
                f"turned by {transform.angle:.1f} degrees, the centre moved by {transform.displacement(centre):.1f} mm",
            )
        )
    return facts


def _some(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
