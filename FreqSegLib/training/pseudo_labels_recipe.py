"""Phase 3, weak supervision: pseudo-labels from the text-guided pipeline teach nnU-Net v2, whose checkpoints agree.

MedCLIP-SAMv2 (Koleilat et al., 2025) trains nnU-Net on its zero-shot masks; the checkpoints of several cycles of the
learning rate make an ensemble whose entropy shows where it doubts (Zhao et al., MICCAI 2022).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from FreqSegLib.device import resolve_device
from FreqSegLib.errors import InputError, SettingsError
from FreqSegLib.mamba.model_config import read_config
from FreqSegLib.settings import TextSegmentationSettings
from FreqSegLib.slices import SliceStack
from FreqSegLib.text_segmentation import TextSegmenter
from FreqSegLib.training.checkpoint_ensemble import average, entropy, read_probabilities
from FreqSegLib.training.nnunet_commands import (
    TRAINER,
    Folders,
    NNUNetConfig,
    environment,
    find_commands,
    plan_command,
    predict_command,
    run_command,
    train_command,
)
from FreqSegLib.training.nnunet_dataset import RawDataset, case_names, ending_of, label_name
from FreqSegLib.training.pseudo_labels import PseudoLabel, SelectionConfig, pseudo_label
from FreqSegLib.training.work_folder import claim, write_text
from FreqSegLib.volume import Volume

CASES_FILE = "cases.csv"
Told = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """What to look for.

    Attributes:
        prompt: in words.
        name: of the label; the prompt's words if empty.
    """

    prompt: str
    name: str = ""


@dataclass(frozen=True)
class PseudoLabelRecipe:
    """A whole configuration file.

    Attributes:
        name: of the dataset: letters and digits.
        images: folder of images without labels; relative to the configuration.
        targets: in the order of the labels; where two overlap the first one wins.
        image_ending: of the images' file names.
        predict: folder of the images the trained network is used on; ``images`` if empty.
        channel: what the grey values are, for nnU-Net: ``CT``, or any other word.
        preset, settings: of the runs that make the labels, as in ``freqseg segment``.
        selection: which of them may teach.
        nnunet: see there.
        work: gets nnU-Net's folders, logs, ``cases.csv``, and the results; a stopped run goes on from here.
    """

    name: str
    images: str
    targets: tuple[Target, ...]
    image_ending: str = ".nii.gz"
    predict: str = ""
    channel: str = "image"
    preset: str = "lite"
    settings: TextSegmentationSettings = field(default_factory=TextSegmentationSettings)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    nnunet: NNUNetConfig = field(default_factory=NNUNetConfig)
    work: str = "build/pseudo_labels"

    def __post_init__(self) -> None:
        if not self.name.isalnum() or not self.name.isascii():
            raise SettingsError(f"name must be of letters and digits, as nnU-Net has it, got {self.name!r}")
        if not self.targets:
            raise SettingsError("targets must name at least one thing to look for")
        names = self.label_names
        if len(set(names)) < len(names):
            raise SettingsError(f"two targets have one name: {', '.join(names)}")

    @property
    def label_names(self) -> tuple[str, ...]:
        """Of the labels from 1."""
        return tuple(label_name(target.name or target.prompt) for target in self.targets)


def train_pseudo_labels(
    config: Path,
    report: Told = print,
    *,
    device: str = "auto",
    prepare_only: bool = False,
    segmenter: TextSegmenter | None = None,
) -> Path:
    """Label, train nnU-Net, predict with every cycle's checkpoint, and join what they say.

    Args:
        config: JSON or TOML, a :class:`PseudoLabelRecipe`; ``work`` is relative to where the command runs.
        report: where lines of progress go.
        device: auto, cpu or cuda[:N].
        prepare_only: write the dataset and stop.
        segmenter: in place of the preset's.

    Returns:
        The folder of nnU-Net's raw dataset (``prepare_only``), or of the results: ``labels/``, ``entropy/``.

    Raises:
        SettingsError: the configuration is wrong, nnU-Net is not installed, or the work folder holds another run.
        InputError: there are no images, or none gave a label that may teach.
        FreqSegError: one of nnU-Net's commands failed.
    """
    recipe = read_config(config, PseudoLabelRecipe)
    place = resolve_device(device)
    commands = {} if prepare_only else find_commands(recipe.nnunet.commands)
    images = _files(config.parent / recipe.images, recipe.image_ending)
    targets = _files(config.parent / recipe.predict, recipe.image_ending) if recipe.predict else images
    work = Path(recipe.work) / recipe.name
    claim(work, replace(recipe, work="", nnunet=replace(recipe.nnunet, commands="", processes=1)))
    if segmenter is None:
        segmenter = TextSegmenter.from_preset(recipe.preset, device=str(place))
    dataset = label_images(recipe, images, work, segmenter, report)
    if prepare_only:
        return dataset.folder
    _add_test_images(dataset, targets, report)
    run_nnunet(recipe.nnunet, dataset, Folders(work), commands, str(place), report)
    return join_cycles(recipe.nnunet, dataset, targets, work, report)


def label_images(
    recipe: PseudoLabelRecipe, images: dict[str, Path], work: Path, segmenter: TextSegmenter, report: Told
) -> RawDataset:
    """Segment every image, and write those that may teach as nnU-Net's training cases.

    Args:
        recipe: see there.
        images: case name to file.
        work: gets ``cases.csv``, a line an image; those that are in it already are not segmented again.
        segmenter: draws.
        report: told of every image.

    Raises:
        InputError: images are of two kinds (pictures and volumes), or none may teach.
    """
    settings = replace(recipe.settings, uncertainty=True)
    first = Volume.read(next(iter(images.values())))
    dataset = RawDataset.named(
        Folders(work).raw, recipe.nnunet.dataset_id, recipe.name, recipe.label_names, ending_of(first)
    )
    rows = _read_rows(work / CASES_FILE)
    for number, (case, file) in enumerate(images.items(), start=1):
        if case in rows:
            continue
        row = _labelled(recipe, case, file, dataset, segmenter, settings)
        _append_row(work / CASES_FILE, row)
        rows[case] = row
        told = "kept" if row["kept"] == "yes" else f"left out: {row['reason']}"
        report(f"{number} of {len(images)}: {case}, {told}")
    kept = [row for row in rows.values() if row["kept"] == "yes"]
    report(f"{len(kept)} of {len(rows)} images may teach; all are listed in {work / CASES_FILE}")
    if not kept:
        reasons = "; ".join(f"{row['case']}: {row['reason']}" for row in list(rows.values())[:5])
        raise InputError(
            f"none of the {len(rows)} images gave a label that may teach ({reasons}); loosen the selection"
        )
    dataset.finish(len(kept), channel=recipe.channel, ignores=any(row["uncertain_slices"] for row in kept))
    return dataset


def run_nnunet(
    config: NNUNetConfig, dataset: RawDataset, folders: Folders, commands: dict[str, str], device: str, report: Told
) -> None:
    """Plan, train and predict by nnU-Net's own commands; steps that are done are not repeated.

    Raises:
        FreqSegError: one of them failed.
    """

    def run(command: list[str], name: str) -> None:
        variables = environment(config, folders, device, training=name == "train")
        run_command(command, commands, variables, folders.logs / f"{name}.txt", report)

    planned = folders.preprocessed / dataset.folder.name / "planned.txt"
    if not planned.exists():
        run(plan_command(config), "plan")
        write_text(planned, "plans and preprocessed cases are complete\n")
    trained = folders.results / dataset.folder.name / f"{TRAINER}__nnUNetPlans__{config.configuration}"
    fold = trained / f"fold_{config.fold}"
    if not (fold / "checkpoint_final.pth").exists():
        run(train_command(config, device, resume=(fold / "checkpoint_latest.pth").exists()), "train")
    for cycle in range(1, config.cycles + 1):
        target = predictions(folders, cycle)
        done = target / "predicted.txt"
        if not done.exists():
            run(predict_command(config, dataset.test_images, target, cycle, device), f"predict_{cycle}")
            write_text(done, "every image has its probabilities\n")


def predictions(folders: Folders, cycle: int) -> Path:
    """Where a cycle's probabilities are."""
    return folders.base / "predictions" / f"cycle_{cycle}"


def join_cycles(config: NNUNetConfig, dataset: RawDataset, targets: dict[str, Path], work: Path, report: Told) -> Path:
    """Mean probabilities over the cycles: their most likely label, and their entropy, on each image's own grid.

    Returns:
        The folder with ``labels/`` (the dataset's ending), ``entropy/`` (NRRD, in [0, 1]) and ``entropy.csv``.
    """
    folder = work / "ensemble"
    cycles = [predictions(Folders(work), cycle) for cycle in range(1, config.cycles + 1)]
    rows: list[dict[str, Any]] = []
    for case, file in targets.items():
        image = Volume.read(file)
        mean = average([read_probabilities(cycle / f"{case}.npz") for cycle in cycles])
        doubt, labels = entropy(mean), mean.argmax(0).astype(np.uint8)
        for kind, array, ending in (("labels", labels, dataset.ending), ("entropy", doubt, ".nrrd")):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            result = replace(image.with_array(array), notes={})
            result.write(folder / kind / f"{case}{ending}", overwrite=True)
        drawn = labels > 0
        rows.append(
            {
                "case": case,
                "voxels": int(drawn.sum()),
                "mean_entropy": float(doubt.mean()),
                "mean_entropy_inside": float(doubt[drawn].mean()) if drawn.any() else float("nan"),
            }
        )
    _write_rows(folder / "entropy.csv", rows)
    report(f"{len(rows)} images: labels and entropy of {config.cycles} checkpoints are in {folder}")
    return folder


def _files(folder: Path, ending: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"the folder of images does not exist: {folder}")
    found = sorted(path for path in folder.iterdir() if path.is_file() and path.name.endswith(ending))
    if not found:
        raise InputError(f"{folder} holds no images: no file name ends with '{ending}' (image_ending)")
    return case_names(found, ending)


def _labelled(
    recipe: PseudoLabelRecipe,
    case: str,
    file: Path,
    dataset: RawDataset,
    segmenter: TextSegmenter,
    settings: TextSegmentationSettings,
) -> dict[str, str]:
    """One image's row of the table; written into the dataset where it may teach."""
    try:
        image = Volume.read(file)
        if ending_of(image) != dataset.ending:
            raise InputError(f"{file} is a {_kind(image)}, the first image is not; nnU-Net takes one kind at a time")
        prepared = segmenter.set_volume(image, settings=settings)
    except InputError as error:
        return _row(recipe, case, file, None, str(error))
    found = segmenter.segment([target.prompt for target in recipe.targets], settings=settings)
    label = pseudo_label(found.segments, SliceStack.of(image, prepared.axis), recipe.selection)
    if label.kept:
        dataset.add_case(case, image, label.labels)
    return _row(recipe, case, file, label, label.reason)


def _row(recipe: PseudoLabelRecipe, case: str, file: Path, label: PseudoLabel | None, reason: str) -> dict[str, str]:
    row = {"case": case, "file": str(file), "kept": "no" if reason else "yes", "reason": reason}
    for number, name in enumerate(recipe.label_names):
        row[f"score {name}"] = f"{label.scores[number]:.4f}" if label else ""
        row[f"uncertainty {name}"] = f"{label.uncertainties[number]:.4f}" if label else ""
        row[f"voxels {name}"] = str(label.voxels[number]) if label else ""
    row["uncertain_slices"] = " ".join(str(index + 1) for index in label.uncertain) if label else ""
    return row


def _kind(volume: Volume) -> str:
    return "picture" if volume.spatial_dimension == 2 else "volume"


def _add_test_images(dataset: RawDataset, targets: dict[str, Path], report: Told) -> None:
    written = {path.name for path in dataset.test_images.glob(f"*{dataset.ending}")}
    for case, file in targets.items():
        if f"{case}_0000{dataset.ending}" not in written:
            dataset.add_test_image(case, Volume.read(file))
    report(f"{len(targets)} images to predict are in {dataset.test_images}")


def _read_rows(path: Path) -> dict[str, dict[str, str]]:
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["case"]: dict(row) for row in csv.DictReader(file)}


def _append_row(path: Path, row: dict[str, str]) -> None:
    _write_rows(path, [*_read_rows(path).values(), row])


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
