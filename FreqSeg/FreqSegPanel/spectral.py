"""Segment with a trained spectral model, without any widget: what panel and scripts share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import slicer
from slicer.i18n import tr as _

from . import geometry, look_inside, segmentation_writer, volume_input
from .library import find_library
from .look_inside import Look
from .segmentation_writer import NewSegment
from .session import Session
from .tasks import Ask, Work
from .trouble import Trouble

FLIPS, DROPOUT = "flips", "dropout"
PICTURES, SLICES, VOLUMES = "image", "slices", "volume"
MODEL_TAG = "FreqSeg.Model"


@dataclass(frozen=True)
class KnownModel:
    """A trained model as the panel shows it.

    Attributes:
        reference: what the worker is told.
        name: the model's own.
        description: a sentence; what it finds, and in which kind of picture.
        classes: what it finds, in the order of its labels.
        form: what it reads: "image", "slices" or "volume".
        licence: of its weights.
        repetitions: how it can be repeated for uncertainty: "flips", "dropout"; the better way first.
        fault: why it cannot be used, as a sentence; empty when it can.
    """

    reference: str
    name: str
    description: str = ""
    classes: tuple[str, ...] = ()
    form: str = SLICES
    licence: str = ""
    repetitions: tuple[str, ...] = ()
    fault: str = ""


@dataclass(frozen=True)
class SpectralReport:
    """What a run left: where the segments are, the uncertainty volume (None if not asked for), what to show."""

    volume_node: Any
    segmentation_node: Any
    segment_ids: tuple[str, ...]
    uncertainty_node: Any
    sentences: tuple[str, ...]
    warnings: tuple[str, ...]


def models(own_folders: Sequence[str] = ()) -> list[KnownModel]:
    """Every trained model on this computer.

    Args:
        own_folders: the user's, of one model or of several.
    """
    find_library()
    from FreqSegLib.mamba.model_folders import model_folders

    found = model_folders([Path(folder) for folder in own_folders if folder])
    return [
        KnownModel(
            one.reference,
            one.name,
            one.model.description,
            tuple(name.name for name in one.model.classes),
            one.model.input.form,
            one.model.licence,
            one.model.repetitions,
            one.fault,
        )
        if one.model is not None
        else KnownModel(one.reference, one.name, fault=one.fault)
        for one in found
    ]


def has_models(folder: str) -> bool:
    """Whether a folder is a model's, or holds some."""
    find_library()
    from FreqSegLib.mamba.model_config import MODEL_FILE

    place = Path(folder)
    return (place / MODEL_FILE).is_file() or next(place.glob(f"*/{MODEL_FILE}"), None) is not None


def model_of(reference: str, own_folders: Sequence[str] = ()) -> KnownModel:
    """The model of that name or folder.

    Raises:
        Trouble: there is none; the sentence names those that are here.
    """
    known = models([*own_folders, reference])
    for model in known:
        if reference in (model.reference, model.name):
            return model
    sentence = _("There is no trained model '{model}'. Here are: {names}.")
    names = ", ".join(model.name for model in known) or _("none")
    raise Trouble("weights", sentence.format(model=reference, names=names))


def why_not(volume_node, model: KnownModel | None) -> str:
    """Why a model cannot be run on a volume, as a sentence; empty when it can."""
    sentence = volume_input.why_not(volume_node)
    if sentence:
        return sentence
    if model is None:
        return _(
            "No trained model is here yet. Choose a folder with one under 'Own models', or train one: the tutorial "
            "says how."
        )
    if model.fault:
        return model.fault
    names = {"model": model.name, "volume": volume_node.GetName()}
    sides = geometry.dimensions(volume_node)
    if model.form == PICTURES and sides[2] != 1:
        sentence = _("'{model}' reads single pictures, but '{volume}' has {count} slices. Choose another of the two.")
        return sentence.format(**names, count=sides[2])
    if model.form == VOLUMES and sides[2] == 1:
        sentence = _("'{model}' reads whole volumes, but '{volume}' is a single picture. Choose another of the two.")
        return sentence.format(**names)
    return ""


def caution(volume_node, model: KnownModel) -> str:
    """A sentence where the volume seems to be another kind of picture than the model was trained on, else ""."""
    from FreqSegLib.contrast import contrast_in, contrast_name

    wanted = contrast_in(f"{model.description} {model.name}")
    found = volume_input.other_contrast(volume_node, wanted)
    if not found:
        return ""
    sentence = _("'{volume}' seems to be {found}; '{model}' was trained on {wanted}. Expect a poor result.")
    shown = contrast_name(wanted)
    return sentence.format(volume=volume_node.GetName(), found=found, model=model.name, wanted=shown)


def segment_work(
    session: Session,
    volume_node,
    segmentation_node,
    model: KnownModel,
    *,
    uncertainty: str | None = None,
    device: str = "auto",
) -> Work:
    """Segment a volume into a model's classes, one segment each, in one step that can be undone.

    Args:
        session: gives the worker and the writer.
        volume_node: the volume.
        segmentation_node: where to write; a new one is made without it.
        model: one of :func:`models`.
        uncertainty: "auto", "flips", "dropout", or None for none.
        device: "auto", "cpu" or "cuda".

    Returns a :class:`SpectralReport`. Nothing in the scene changes before the worker has answered.
    """
    sentence = why_not(volume_node, model)
    if sentence:
        raise Trouble("input", sentence)
    client = session.client
    volume, before = yield from volume_input.described_as_it_is(client, volume_node)
    values: dict[str, Any] = {"volume": volume, "model": model.reference, "device": device}
    if uncertainty:
        values["uncertainty"] = uncertainty
    reply = yield Ask("spectral_segment", values)
    warnings = list(reply["warnings"])
    target, notes = segmentation_writer.target_for(volume_node, segmentation_node, before)
    warnings += notes
    segment_ids, sentences = [], []
    session.writer.begin(target)
    for found in reply["segments"]:
        mask = client.read(found["mask"])
        tags = {MODEL_TAG: model.name, segmentation_writer.VOLUME_TAG: volume_node.GetID()}
        new = NewSegment(found["name"], mask, tuple(found["color"]), tags=tags)
        segment_ids.append((yield from session.writer.add(target, volume_node, new)))
        sentences.append((yield from _amount(volume_node, found["name"], mask)))
    session.writer.end(target)
    unsure = None
    if reply["uncertainty"]:
        unsure = yield from _add_uncertainty(client, volume_node, target, model, reply["uncertainty"])
        sentences.append(_("The volume '{name}' shows where the model is unsure.").format(name=unsure.GetName()))
    client.release(Path(reply["segments"][0]["mask"]["file"]).parent.name)
    return SpectralReport(volume_node, target, tuple(segment_ids), unsure, tuple(sentences), tuple(warnings))


def _amount(volume_node, name: str, mask: np.ndarray) -> Work:
    """Task part: how much was found, in words."""
    count = 0
    for layer in mask:
        count += int(np.count_nonzero(layer))
        yield None
    if not count:
        return _("{name}: not found.").format(name=name)
    if volume_input.is_picture(volume_node):
        return _("{name}: {count} pixels.").format(name=name, count=count)
    millilitres = count * abs(float(np.linalg.det(geometry.ijk_to_ras(volume_node)[:3, :3]))) / 1000
    return _("{name}: {millilitres} ml.").format(name=name, millilitres=f"{millilitres:.3g}")


def _add_uncertainty(client, volume_node, target, model: KnownModel, maps: Mapping[str, Any]) -> Work:
    """Task part: the doubt of every voxel as a volume, in [0, 1]; an earlier one of the same kind is replaced."""
    name = _("{volume}: uncertainty of {model}").format(volume=volume_node.GetName(), model=model.name)
    look = Look("uncertainty", name, client.read(maps["entropy"]), 0.0, 1.0, 0.05)
    return (yield from look_inside.add_work(volume_node, look, f"{target.GetID()} {model.reference}"))


def show_uncertainty(report: SpectralReport, opacity: float) -> None:
    """Lay the uncertainty over the picture."""
    node = report.uncertainty_node
    if node is not None and slicer.mrmlScene.IsNodePresent(node):
        look_inside.overlay(report.volume_node, node, opacity)
