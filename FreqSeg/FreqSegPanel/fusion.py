"""Fuse a CT and an MR, without any widget: what panel and scripts share."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import slicer
from slicer.i18n import tr as _

from . import geometry, look_inside, subject_hierarchy, vocabulary, volume_input
from .look_inside import LOOK_OF_ATTRIBUTE, Look
from .session import Session
from .tasks import Ask, Work
from .trouble import Trouble

CT_ROLE, MR_ROLE, RECORD_ATTRIBUTE = "FreqSeg.CT", "FreqSeg.MR", "FreqSeg.Fusion"
WHITE = 255.0
"""The brightest grey level of a fused volume."""
ALONE, OVER_CT, OVER_MR = "alone", "ct", "mr"
NOT_REGISTERED = "not_registered"
"""The worker's code for a pair that does not lie on each other."""
_PATIENT_ID, _FRAME_OF_REFERENCE, _MODALITY = "0010,0020", "0020,0052", "0008,0060"
_COMMAND_LINE = re.compile(r" \(--[^()]*\)")


@dataclass(frozen=True)
class FusionOptions:
    """How to fuse; None means the method's own value.

    Attributes:
        method: one of FreqSegLib.fusion.METHODS.
        wave: a wavelet such as "db4".
        levels: of the wavelet or the pyramid.
        register: lay the MR on the CT first, rigidly.
        check: refuse a pair that does not lie on each other.
        masks: also give the CT's share of every band, as volumes.
        device: "auto", "cpu" or "cuda".
    """

    method: str
    wave: str | None = None
    levels: int | None = None
    register: bool = False
    check: bool = True
    masks: bool = False
    device: str = "auto"

    @property
    def settings(self) -> dict[str, Any]:
        """What is sent to the worker; what is as usual is left out."""
        chosen: dict[str, Any] = {"method": self.method}
        if self.wave:
            chosen["wave"] = self.wave
        if self.levels:
            chosen["levels"] = self.levels
        if self.register:
            chosen["register"] = "rigid"
        if not self.check:
            chosen["check"] = False
        return chosen


@dataclass(frozen=True)
class FusionReport:
    """What a run left: the volumes, and the sentences to show. ``record`` says how it was made."""

    ct_node: Any
    mr_node: Any
    output_node: Any
    share_nodes: tuple[Any, ...]
    sentences: tuple[str, ...]
    warnings: tuple[str, ...]
    record: dict[str, Any] = field(default_factory=dict)


def usual_method() -> str:
    """The first method whose weights are here."""
    return next(one.name for one in vocabulary.fusions() if one.is_here)


def why_not(ct_node, mr_node, output_node=None) -> str:
    """Why two volumes cannot be fused, as a sentence; empty when they can."""
    if ct_node is None:
        return _("Choose the CT.")
    if mr_node is None:
        return _("Choose the MR.")
    if ct_node is mr_node:
        return _("'{volume}' is chosen twice. Choose a CT and an MR.").format(volume=ct_node.GetName())
    for node in (ct_node, mr_node):
        sentence = volume_input.why_not(node)
        if sentence:
            return sentence
    if output_node is not None and output_node in (ct_node, mr_node):
        sentence = _("The result would overwrite '{volume}'. Choose another volume to put it into.")
        return sentence.format(volume=output_node.GetName())
    if output_node is not None and output_node.GetClassName() != "vtkMRMLScalarVolumeNode":
        sentence = _("'{volume}' does not hold grey levels. Choose another volume to put the result into.")
        return sentence.format(volume=output_node.GetName())
    if geometry.ijk_to_ras_of(mr_node, ct_node) is None:
        sentence = _(
            "'{ct}' and '{mr}' lie under different transforms, one of them not linear. Harden it in the Transforms "
            "module."
        )
        return sentence.format(ct=ct_node.GetName(), mr=mr_node.GetName())
    return ""


def caution(ct_node, mr_node) -> str:
    """What the user should know of a pair before the run; empty for nothing."""
    ct_kind, mr_kind = _kind(ct_node), _kind(mr_node)
    names = {"ct": ct_node.GetName(), "mr": mr_node.GetName()}
    sentences = []
    if (ct_kind, mr_kind) == ("CT", "CT"):
        sentences.append(_("'{ct}' and '{mr}' both seem to be CTs."))
    elif (ct_kind, mr_kind) == ("MR", "CT"):
        sentences.append(_("'{ct}' seems to be an MR and '{mr}' a CT: are the two exchanged?"))
    elif ct_kind == "MR":
        sentences.append(_("'{ct}', chosen as the CT, seems to be an MR."))
    if _differ(ct_node, mr_node, _PATIENT_ID):
        sentences.append(_("By their DICOM headers, '{ct}' and '{mr}' belong to different patients."))
    if _differ(ct_node, mr_node, _FRAME_OF_REFERENCE) and not _moved(ct_node, mr_node):
        sentences.append(
            _("'{ct}' and '{mr}' have no common frame of reference, so they may not lie on each other: register them.")
        )
    return "\n".join(sentence.format(**names) for sentence in sentences)


def looks_like_ct(node) -> bool:
    return _kind(node) == "CT"


def looks_like_mr(node) -> bool:
    return _kind(node) == "MR"


def fuse_work(session: Session, ct_node, mr_node, output_node, options: FusionOptions) -> Work:
    """Fuse two volumes into a volume on the CT's grid, a new one without ``output_node``.

    Returns a :class:`FusionReport`. Nothing in the scene changes before the worker has answered.
    """
    sentence = why_not(ct_node, mr_node, output_node)
    if sentence:
        raise Trouble("input", sentence)
    client = session.client
    place = geometry.ijk_to_ras_of(mr_node, ct_node)
    ct, ct_before = yield from volume_input.described_as_it_is(client, ct_node)
    mr, mr_before = yield from volume_input.described_as_it_is(client, mr_node)
    if mr["spatial_dimension"] == 3:
        # the MR in the CT's own space: what transforms do to either is what the user sees
        mr["affine"] = [[float(value) for value in row] for row in geometry.RAS_TO_LPS @ place]
    values = {"ct": ct, "mr": mr, "settings": options.settings, "device": options.device, "masks": options.masks}
    try:
        reply = yield Ask("fuse", values)
    except Trouble as trouble:
        sentence = _COMMAND_LINE.sub("", trouble.message)
        raise Trouble(trouble.code, sentence if sentence.endswith((".", "!", "?")) else f"{sentence}.") from trouble
    warnings = list(reply["warnings"])
    for node, before in ((ct_node, ct_before), (mr_node, mr_before)):
        if not volume_input.require_unchanged_grid(node, before):
            sentence = _("The voxels of '{volume}' changed during the run; the result is that of the earlier ones.")
            warnings.append(sentence.format(volume=node.GetName()))
    now = geometry.ijk_to_ras_of(mr_node, ct_node)
    if now is None or not np.allclose(now, place, atol=1e-4):
        sentence = _("'{mr}' was moved against '{ct}' during the run; the result shows it where it was.")
        warnings.append(sentence.format(ct=ct_node.GetName(), mr=mr_node.GetName()))
    image = yield from look_inside.image_of(client.read(reply["fused"]))
    for node in (ct_node, mr_node, output_node):
        volume_input.require_present(node)
    output = output_node or _new_output(ct_node, mr_node)
    _fill(output, image, ct_node, mr_node, reply["record"])
    shares = yield from _add_shares(client, ct_node, output, reply["masks"])
    client.release(Path(reply["fused"]["file"]).parent.name)
    record = json.loads(reply["record"])
    sentences = [
        _("'{ct}' and '{mr}' were fused into '{output}'.").format(
            ct=ct_node.GetName(), mr=mr_node.GetName(), output=output.GetName()
        ),
        *_registered(record, ct),
    ]
    if shares:
        several = _("How much of every band came from the CT is in {count} volumes beside it.")
        single = _("How much came from the CT is in a volume beside it.")
        sentences.append((several if len(shares) > 1 else single).format(count=len(shares)))
    return FusionReport(ct_node, mr_node, output, tuple(shares), tuple(sentences), tuple(warnings), record)


def show(ct_node, mr_node, fused_node, how: str, opacity: float) -> None:
    """Show a fused volume in every slice view: alone, or over one of its sources.

    Args:
        ct_node, mr_node: its sources; the fused volume is shown alone where the one that is wanted is None.
        fused_node: the fused volume.
        how: "alone", "ct" or "mr".
        opacity: how much of it is seen over a source.
    """
    below = {OVER_CT: ct_node, OVER_MR: mr_node}.get(how)
    first = True
    for composite in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode"):
        before = composite.GetBackgroundVolumeID()
        first = first and before not in [node.GetID() for node in (ct_node, mr_node, fused_node) if node is not None]
        composite.SetBackgroundVolumeID((below or fused_node).GetID())
        composite.SetForegroundVolumeID(fused_node.GetID() if below is not None else None)
        composite.SetForegroundOpacity(opacity)
        composite.SetLabelVolumeID(None)
    if first:
        # another part of the patient was shown
        slicer.util.resetSliceViews()


def sources(fused_node) -> tuple[Any, Any]:
    """The CT and the MR a volume was fused from; None for what is not there."""
    return fused_node.GetNodeReference(CT_ROLE), fused_node.GetNodeReference(MR_ROLE)


def is_fused(node) -> bool:
    """Whether a volume was made here."""
    return node.GetAttribute(RECORD_ATTRIBUTE) is not None


def _new_output(ct_node, mr_node):
    """Its display is set before its voxels, so that Slicer need not measure their range."""
    name = _("{ct} fused with {mr}").format(ct=ct_node.GetName(), mr=mr_node.GetName())
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", slicer.mrmlScene.GenerateUniqueName(name))
    display = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeDisplayNode")
    display.AutoWindowLevelOff()
    node.SetAndObserveDisplayNodeID(display.GetID())
    return node


def _fill(node, image, ct_node, mr_node, record: str) -> None:
    if node.GetDisplayNode() is None:
        node.CreateDefaultDisplayNodes()
    display = node.GetDisplayNode()
    display.AutoWindowLevelOff()
    display.SetWindowLevelMinMax(0.0, WHITE)
    display.SetAndObserveColorNodeID("vtkMRMLColorTableNodeGrey")
    node.SetIJKToRASMatrix(geometry.vtk_matrix(geometry.ijk_to_ras(ct_node)))
    node.SetAndObserveTransformNodeID(ct_node.GetTransformNodeID())
    node.SetAndObserveImageData(image)
    node.SetNodeReferenceID(CT_ROLE, ct_node.GetID())
    node.SetNodeReferenceID(MR_ROLE, mr_node.GetID())
    node.SetAttribute(RECORD_ATTRIBUTE, record)
    subject_hierarchy.put_beside(node, ct_node)


def _add_shares(client, ct_node, output, masks) -> Work:
    """Task part: a volume a band, 0 where the MR alone was taken and 100 where the CT was; earlier ones go."""
    made = []
    for mask in masks:
        name = _("{output}: CT share, {band}").format(output=output.GetName(), band=mask["name"])
        look = Look("share", name, client.read(mask["share"]), 0.0, 100.0, None)
        made.append((yield from look_inside.add_work(ct_node, look, f"{output.GetID()} {mask['name']}")))
    for node in slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode"):
        if (node.GetAttribute(LOOK_OF_ATTRIBUTE) or "").startswith(f"{output.GetID()} ") and node not in made:
            slicer.mrmlScene.RemoveNode(node)
    return made


def _registered(record: dict[str, Any], ct: dict[str, Any]) -> list[str]:
    """How the MR was laid on the CT, as a sentence; nothing if it was not."""
    if not record.get("transform"):
        return []
    matrix = np.array(record["transform"])
    depth, height, width = ct["array"]["shape"]
    middle = np.array(ct["affine"]) @ [(width - 1) / 2, (height - 1) / 2, (depth - 1) / 2, 1.0]
    moved = float(np.linalg.norm((matrix @ middle - middle)[:3]))
    turned = float(np.degrees(np.arccos(np.clip((np.trace(matrix[:3, :3]) - 1) / 2, -1, 1))))
    sentence = _("Registered first: the MR was moved by {millimetres} mm and turned by {degrees}°.")
    return [sentence.format(millimetres=f"{moved:.1f}", degrees=f"{turned:.1f}")]


def _kind(node) -> str:
    """ "CT", "MR", or "" where neither header nor name tell."""
    modality = (volume_input.dicom_value(node, _MODALITY) or "").upper()
    if modality:
        return modality
    contrast = volume_input.contrast_of(node)
    if contrast == "ct":
        return "CT"
    return "MR" if contrast in ("flair", "t1 with contrast agent", "t2", "t1", "diffusion") else ""


def _differ(first, second, tag: str) -> bool:
    """Whether both have a DICOM value, and another one."""
    values = [volume_input.dicom_value(node, tag) for node in (first, second)]
    return all(values) and values[0] != values[1]


def _moved(ct_node, mr_node) -> bool:
    """Whether a transform lies between the two, as after a registration."""
    return ct_node.GetParentTransformNode() is not mr_node.GetParentTransformNode()
