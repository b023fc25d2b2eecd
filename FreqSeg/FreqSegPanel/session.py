"""Everything FreqSeg does with nodes and the worker, without any widget: what panel and scripts share.

Each ``*_work`` method is a generator for :class:`~FreqSegPanel.tasks.Task`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import slicer
from slicer.i18n import tr as _

from . import geometry, segmentation_writer, volume_input
from .library import find_library
from .segmentation_writer import Color, NewSegment, SegmentationWriter
from .tasks import Ask, Client, Task, TaskRunner, Work
from .trouble import Trouble
from .volume_input import Fingerprint

PREVIEW_NAME = "FreqSeg preview"


@dataclass(frozen=True)
class Options:
    """How to segment: preset, device ("auto", "cpu", "cuda"), settings that differ from their defaults, own weights."""

    preset: str = "lite"
    device: str = "auto"
    settings: Mapping[str, Any] = field(default_factory=dict)
    uncertainty: bool = False
    sam: str | None = None
    clip_folder: str | None = None
    sam_checkpoint: str | None = None

    @property
    def weights(self) -> dict[str, str]:
        """The fields of a request that name other weights; empty ones are left out."""
        named = {"sam": self.sam, "clip_folder": self.clip_folder, "sam_checkpoint": self.sam_checkpoint}
        return {name: value for name, value in named.items() if value}

    @property
    def key(self) -> tuple[Any, ...]:
        """What a volume set in the worker depends on."""
        settings = tuple(sorted((name, str(value)) for name, value in self.settings.items()))
        return self.preset, self.device, settings, tuple(self.weights.items())


@dataclass(frozen=True)
class Prompt:
    """What to look for, and the colour of its segment (None: the terminology's)."""

    text: str
    color: Color | None = None


@dataclass(frozen=True)
class Finding:
    """One prompt's result, kept for a look inside it."""

    prompt: str
    segment_id: str
    volume_node_id: str
    segmentation_node_id: str
    request_id: str
    volume_id: str
    saliency: Mapping[str, Any]
    uncertainty: Mapping[str, Any] | None
    score: float


@dataclass(frozen=True)
class SegmentReport:
    """What a run left: where the segments are, and the sentences to show."""

    volume_node: Any
    segmentation_node: Any
    segment_ids: tuple[str, ...]
    sentences: tuple[str, ...]
    warnings: tuple[str, ...]
    stages: tuple[str, ...]
    """Names of the stages that did work in the worker."""


@dataclass(frozen=True)
class SetVolume:
    """A volume as the worker holds it."""

    fingerprint: Fingerprint
    key: tuple[Any, ...]
    volume_id: str
    axis: str
    along: int
    """Voxel axis (0 i, 1 j, 2 k) the slices are stacked along."""
    warnings: tuple[str, ...]
    stages: tuple[str, ...]


def default_client(environment: Mapping[str, str] | None = None) -> Client:
    """The worker's client, for the Python that runs Slicer; nothing is started yet."""
    find_library()
    from FreqSegLib.worker_client import WorkerClient

    return WorkerClient(environment=environment)


class Session:
    """One worker, the volumes it holds, and what came of them."""

    def __init__(self, make_client: Callable[[], Client] = default_client) -> None:
        """Args: make_client: called when the worker is needed first."""
        self._make_client = make_client
        self._runner: TaskRunner | None = None
        self._volumes: dict[str, SetVolume] = {}
        self.findings: list[Finding] = []
        self.writer = SegmentationWriter()

    @property
    def runner(self) -> TaskRunner:
        if self._runner is None:
            self._runner = TaskRunner(self._make_client())
        return self._runner

    @property
    def client(self) -> Client:
        return self.runner.client

    @property
    def started(self) -> bool:
        return self._runner is not None

    def restart(self) -> None:
        """End the worker; the next task starts another, with what is set by then. Findings are kept no longer."""
        self.runner.client.close()
        self._runner = None
        self._volumes.clear()
        self.findings.clear()

    def close(self) -> None:
        """End the worker."""
        if self._runner is not None:
            self._runner.client.close()
            self._runner = None
        self._volumes.clear()
        self.findings.clear()
        self.writer.forget()

    def scene_closed(self) -> None:
        """Forget the nodes of a scene that is gone; the worker stays warm."""
        self._volumes.clear()
        for request_id in {finding.request_id for finding in self.findings}:
            self.client.release(request_id)
        self.findings.clear()
        self.writer.forget()

    def task(self, work: Work, nodes: Sequence[Any] = (), **callbacks: Any) -> Task:
        """Start a task that ends by itself when one of ``nodes`` leaves the scene."""
        watched = [node for node in nodes if node is not None]

        def guard() -> str | None:
            return next((sentence for sentence in map(volume_input.gone, watched) if sentence), None)

        return self.runner.start(Task(work, guard=guard, **callbacks))

    # Volumes

    def held(self, volume_node, options: Options, roi: geometry.Bounds | None = None) -> SetVolume | None:
        """The volume as the worker has it already, or None if it must be sent."""
        known = self._volumes.get(volume_node.GetID())
        if known is None or known.key != (*options.key, roi) or known.fingerprint != Fingerprint.of(volume_node):
            return None
        return known

    def set_volume_work(self, volume_node, options: Options, roi: geometry.Bounds | None = None) -> Work:
        """Give the worker a volume, unless it has it."""
        known = self.held(volume_node, options, roi)
        if known is not None:
            return known
        volume, fingerprint = yield from volume_input.described_as_it_is(self.client, volume_node)
        values = {"volume": volume, "preset": options.preset, "device": options.device, **options.weights}
        if options.settings:
            values["settings"] = dict(options.settings)
        if roi is not None:
            values["roi"] = roi
        reply = yield Ask("set_volume", values)
        known = SetVolume(
            fingerprint,
            (*options.key, roi),
            reply["volume_id"],
            reply["axis"],
            2 - int(reply["array_axis"]),
            tuple(reply["warnings"]),
            tuple(reply["ran"]),
        )
        self._volumes[volume_node.GetID()] = known
        return known

    def roi_bounds(self, roi_node, volume_node) -> geometry.Bounds | None:
        """A region's voxel bounds, None for no region.

        Raises:
            Trouble: the two don't meet.
        """
        if roi_node is None:
            return None
        bounds = geometry.roi_bounds(roi_node, volume_node)
        if bounds is None:
            sentence = _("The region '{region}' lies outside '{volume}'. Move it onto the volume, or choose none.")
            raise Trouble("input", sentence.format(region=roi_node.GetName(), volume=volume_node.GetName()))
        return bounds

    # Segment

    def segment_work(
        self, volume_node, prompts: Sequence[Prompt], segmentation_node, options: Options, roi_node=None, in_3d=False
    ) -> Work:
        """Segment a volume: one segment a prompt, in one step that can be undone. Returns a :class:`SegmentReport`."""
        roi = self.roi_bounds(roi_node, volume_node)
        was_held = self.held(volume_node, options, roi) is not None
        held = yield from self.set_volume_work(volume_node, options, roi)
        values: dict[str, Any] = {"volume_id": held.volume_id, "prompts": [prompt.text for prompt in prompts]}
        if options.settings:
            values["settings"] = dict(options.settings)
        if options.uncertainty:
            values["uncertainty"] = True
        reply = yield Ask("segment", values)
        warnings = list(dict.fromkeys([*held.warnings, *reply["warnings"]]))
        target, notes = segmentation_writer.target_for(volume_node, segmentation_node, held.fingerprint)
        warnings += notes
        segment_ids, sentences = yield from self._write(volume_node, target, prompts, reply["segments"], options, held)
        if in_3d:
            yield None
            target.CreateClosedSurfaceRepresentation()
        return SegmentReport(
            volume_node,
            target,
            tuple(segment_ids),
            tuple(sentences),
            tuple(warnings),
            (*(() if was_held else held.stages), *reply["ran"]),
        )

    def _write(
        self,
        volume_node,
        target,
        prompts: Sequence[Prompt],
        segments: Iterable[Mapping[str, Any]],
        options: Options,
        held: SetVolume,
    ) -> Work:
        segment_ids, sentences = [], []
        self.writer.begin(target)
        for prompt, found in zip(prompts, segments, strict=True):
            tags = {
                segmentation_writer.PROMPT_TAG: found["name"],
                segmentation_writer.PRESET_TAG: options.preset,
                segmentation_writer.SCORE_TAG: f"{found['score']:.3f}",
                segmentation_writer.VOLUME_TAG: volume_node.GetID(),
            }
            new = NewSegment(found["name"], self.client.read(found["mask"]), prompt.color, tuple(found["color"]), tags)
            segment_id = yield from self.writer.add(target, volume_node, new)
            segment_ids.append(segment_id)
            sentences.append(found["sentence"])
            request_id = _request_of(found["saliency"])
            self.findings.append(
                Finding(
                    found["name"],
                    segment_id,
                    volume_node.GetID(),
                    target.GetID(),
                    request_id,
                    held.volume_id,
                    found["saliency"],
                    found.get("uncertainty"),
                    float(found["score"]),
                )
            )
            yield None
        self.writer.end(target)
        return segment_ids, sentences

    # Preview

    def preview_work(self, volume_node, prompts: Sequence[Prompt], options: Options, along: int, index: int) -> Work:
        """Segment one slice into the preview node; returns the sentences to show."""
        values: dict[str, Any] = {"prompts": [prompt.text for prompt in prompts]}
        if options.settings:
            values["settings"] = dict(options.settings)
        held = self.held(volume_node, options)
        if held is not None and held.along == along:
            values |= {"volume_id": held.volume_id, "index": index}
        else:
            volume = yield from volume_input.described(self.client, volume_node, along, index)
            values |= {"volume": volume, "preset": options.preset, "device": options.device, **options.weights}
        reply = yield Ask("preview_slice", values)
        volume_input.require_present(volume_node)
        self.clear_preview()
        node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", PREVIEW_NAME)
        node.SetSaveWithScene(False)
        node.CreateDefaultDisplayNodes()
        segmentation_writer.prepare(node, volume_node)
        mark = _("preview, this slice alone") if reply["alone"] else _("preview")
        for prompt, found in zip(prompts, reply["segments"], strict=True):
            mask = self.client.read(found["mask"])
            width, height, depth = geometry.dimensions(volume_node)
            whole = np.zeros((depth, height, width), dtype=np.uint8)
            place = [slice(None)] * 3
            place[2 - along] = slice(index, index + 1)
            whole[tuple(place)] = mask
            color = prompt.color or tuple(found["color"])
            new = NewSegment(_("{prompt} ({mark})").format(prompt=found["name"], mark=mark), whole, color)
            yield from self.writer.add(node, volume_node, new)
        sentences = [found["sentence"] for found in reply["segments"]]
        if reply["alone"]:
            sentences.insert(
                0,
                _("Preview, this slice alone: grey levels and thresholds of the whole volume may give another result."),
            )
        else:
            sentences.insert(0, _("Preview: this slice of the result."))
        return sentences + list(reply["warnings"])

    def clear_preview(self) -> None:
        """Remove the preview node."""
        for node in slicer.util.getNodesByClass("vtkMRMLSegmentationNode"):
            if node.GetName().startswith(PREVIEW_NAME) and not node.GetSaveWithScene():
                slicer.mrmlScene.RemoveNode(node)

    # Refine

    def refine_work(
        self,
        volume_node,
        segmentation_node,
        segment_id: str,
        base: np.ndarray,
        points: Sequence[tuple[float, float, float, int]],
        box: Sequence[Sequence[float]] | None,
        options: Options,
    ) -> Work:
        """Redraw a segment from points and a box; returns a sentence.

        Args:
            volume_node, segmentation_node, segment_id: the segment and what it was drawn on.
            base: (k, j, i) the segment as it was before the first point.
            points: (i, j, k, label) in voxels.
            box: two opposite corners (i, j, k), or None.
            options: as for the segment.
        """
        sentence = segmentation_writer.why_untouchable(segmentation_node, segment_id)
        if sentence:
            raise Trouble("input", sentence)
        held = self._held_for_refining(volume_node, options, points, box)
        if held is None:
            held = yield from self.set_volume_work(volume_node, options)
        export = self.client.export(base)
        while not export.step(volume_input.COPY_SECONDS):
            yield None
        values: dict[str, Any] = {"volume_id": held.volume_id, "mask": export.described()}
        values["points"] = [[float(x) for x in point[:3]] + [int(point[3])] for point in points]
        if box is not None:
            values["box"] = [[float(x) for x in corner] for corner in box]
        reply = yield Ask("refine", values)
        volume_input.require_unchanged_grid(volume_node, held.fingerprint)
        mask = self.client.read(reply["mask"])
        yield from self.writer.replace(segmentation_node, volume_node, segment_id, mask)
        self.writer.end(segmentation_node)
        self.client.release(_request_of(reply["mask"]))
        changed = len(reply["slices_changed"])
        sentence = _("Redrawn on {count} slices.") if changed != 1 else _("Redrawn on {count} slice.")
        return [sentence.format(count=changed), *reply["warnings"]]

    def _held_for_refining(
        self, volume_node, options: Options, points: Sequence[Sequence[float]], box: Sequence[Sequence[float]] | None
    ) -> SetVolume | None:
        """The volume as it was segmented, whatever the settings, if the marks lie within what was read of it."""
        known = self._volumes.get(volume_node.GetID())
        if known is None or known.fingerprint != Fingerprint.of(volume_node):
            return None
        preset, device, _settings, weights, roi = known.key
        if (preset, device, weights) != (options.preset, options.device, tuple(options.weights.items())):
            return None
        marks = [*(point[:3] for point in points), *(box or ())]
        if roi is not None and not all(
            low - 0.5 <= x < high - 0.5 for mark in marks for x, (low, high) in zip(mark, roi, strict=True)
        ):
            return None
        return known

    # Findings

    def findings_of(self, volume_node) -> list[Finding]:
        """Results of a volume that can be looked into, the latest first."""
        if volume_node is None:
            return []
        mine = [finding for finding in self.findings if finding.volume_node_id == volume_node.GetID()]
        return [finding for finding in reversed(mine) if _segment_of(finding) is not None]

    def forget_volume(self, node_id: str) -> None:
        """After a volume left the scene: give its files back."""
        self._volumes.pop(node_id, None)
        dropped = {finding.request_id for finding in self.findings if finding.volume_node_id == node_id}
        self.findings = [finding for finding in self.findings if finding.volume_node_id != node_id]
        for request_id in dropped:
            self.client.release(request_id)


def _segment_of(finding: Finding):
    node = slicer.mrmlScene.GetNodeByID(finding.segmentation_node_id)
    return node.GetSegmentation().GetSegment(finding.segment_id) if node is not None else None


def _request_of(described: Mapping[str, Any]) -> str:
    """The request a result's file belongs to: the name of its folder."""
    return Path(described["file"]).parent.name
