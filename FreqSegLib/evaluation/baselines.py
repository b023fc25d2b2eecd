"""A task's U-Net on labelled cases: from the slices of a volume back to its own grid, as the pipeline does it.

Threshold and parts kept are chosen on the validation patients on which the text-guided model's were chosen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from FreqSegLib.device import Batches, default_batch_size
from FreqSegLib.errors import Cancelled, InputError
from FreqSegLib.evaluation.ablation_scores import CaseScore
from FreqSegLib.evaluation.cases import Case
from FreqSegLib.evaluation.segmentation_metrics import NSD_TOLERANCE, dice, overlap
from FreqSegLib.intensity import normalise
from FreqSegLib.presets import SMALLEST_PART
from FreqSegLib.progress import CancelCallback
from FreqSegLib.sam.coarse_mask import coarse_mask, largest_components_3d, surrounding_background
from FreqSegLib.slices import Frame, SliceStack, evened
from FreqSegLib.training.baselines import Task
from FreqSegLib.training.text_guided_data import PICTURE_SIDE
from FreqSegLib.training.text_guided_tuning import CONTOURS, PARTS, SMOOTHINGS, THRESHOLDS, rule_cost
from FreqSegLib.training.work_folder import write_text
from FreqSegLib.volume import Volume

METHOD = "U-Net"


@dataclass(frozen=True)
class Rule:
    """How a probability becomes a mask.

    Attributes:
        threshold: pixels above it, in [0, 1].
        num_contours: largest parts kept a slice; 0 keeps all.
        smallest_part: parts of the volume under this share of the largest are dropped.
        slice_smoothing: mm over which the probability is averaged across slices; 0 takes each by itself.
    """

    threshold: float = 0.5
    num_contours: int = 0
    smallest_part: float = SMALLEST_PART
    slice_smoothing: float = 0.0

    @property
    def said(self) -> str:
        """In words."""
        parts = f"{self.num_contours} parts a slice" if self.num_contours else "all parts"
        evened_out = f", evened over slices by {self.slice_smoothing:g} mm" if self.slice_smoothing else ""
        return f"above {self.threshold:g}, {parts} of at least {self.smallest_part:.0%} of the largest{evened_out}"


@dataclass(frozen=True)
class Drawing:
    """What a U-Net says of one volume.

    Attributes:
        stack: the volume's slices.
        places: where anything may be, (S, h, w): outside the air around the patient.
        probability: by channel, (C, S, h, w) in [0, 1].
    """

    stack: SliceStack
    places: NDArray[np.bool_]
    probability: NDArray[np.float32]

    def mask(self, channels: Sequence[int], rule: Rule) -> NDArray[np.bool_]:
        """The union of some channels as (k, j, i) on the volume's grid, cut and cleaned as in the pipeline."""
        found = coarse_mask(
            evened(self.probability[list(channels)].max(0), self.stack, rule.slice_smoothing),
            self.places,
            threshold="fixed",
            value=rule.threshold,
            confidence_threshold=0.0,
            num_contours=rule.num_contours,
        )
        target = self.stack.empty(np.bool_)
        self.stack.displayed(target)[:] = largest_components_3d(found, rule.smallest_part)
        return target


@torch.inference_mode()
def draw(
    network: nn.Module, volume: Volume, device: torch.device | None = None, cancel: CancelCallback | None = None
) -> Drawing:
    """Every slice of a volume through a U-Net.

    Args:
        network: (B, 1, 256, 256) in [0, 1] -> logits (B, C, 256, 256), in evaluation mode.
        volume: its slices and grey levels are made as in the pipeline.
        device: where the network is.
        cancel: polled between batches.

    Raises:
        Cancelled: ``cancel`` answered True.
    """
    device = device or torch.device("cpu")
    stack, levels = SliceStack.of(volume), normalise(volume)
    frame = Frame.fit(stack.slice_shape, stack.pixel_spacing, PICTURE_SIDE)
    pictures = [levels.apply(np.ascontiguousarray(stack.take(index))) for index in range(stack.count)]
    found: list[NDArray[np.float32]] = []

    def work(positions: range) -> NDArray[np.float32]:
        images = frame.to_frame(torch.from_numpy(np.stack([pictures[p] for p in positions]))[:, None])
        return frame.from_frame(network(images.to(device)).sigmoid().cpu()).numpy()

    for _, maps in Batches(default_batch_size(device)).run(stack.count, work):
        if cancel is not None and cancel():
            raise Cancelled("The evaluation was cancelled; the trained networks are kept.")
        found.append(maps)
    places = np.stack([~surrounding_background(picture) for picture in pictures])
    return Drawing(stack, places, np.concatenate(found).swapaxes(0, 1))


def choose_rules(
    task: Task, network: nn.Module, cases: Sequence[Case], device: torch.device | None = None
) -> dict[str, Rule]:
    """Threshold and parts kept of every target, by mean DSC of validation patients.

    Args:
        task: whose network it is.
        network: see :func:`draw`.
        cases: labelled validation patients.
        device: where the network is.
    """
    rules = [
        Rule(threshold, parts, smallest, smoothing)
        for smoothing in SMOOTHINGS
        for smallest in PARTS
        for parts in CONTOURS
        for threshold in THRESHOLDS
    ]
    found: dict[str, list[list[float]]] = {meaning.name: [] for meaning in task.targets()}
    for case in cases:
        labelled = case.read()
        drawing = draw(network, labelled.volume, device)
        for meaning in task.targets():
            truth = labelled.truth(meaning.name)
            if truth.any():
                channels = _places_of(task, meaning.channels)
                found[meaning.name].append([dice(drawing.mask(channels, rule), truth) for rule in rules])
    chosen = {}
    for name, of_cases in found.items():
        if not of_cases:
            raise InputError(f"{task.title}: no validation patient shows '{name}', so nothing can be chosen on them")
        # on few patients keeping everything is preferred to a rule that is barely better
        costs = [rule_cost(rule.num_contours, rule.smallest_part, rule.slice_smoothing) for rule in rules]
        chosen[name] = rules[int((np.mean(of_cases, axis=0) - costs).argmax())]
    return chosen


def kept_rules(folder: Path, choose: Callable[[], dict[str, Rule]]) -> dict[str, Rule]:
    """Rules chosen once for the network of a folder, read from ``rules.json`` after that.

    Args:
        folder: with the network's checkpoints.
        choose: see :func:`choose_rules`.
    """
    path = folder / "rules.json"
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: Rule(**values) for name, values in content.items()}
    rules = choose()
    write_text(path, json.dumps({name: asdict(rule) for name, rule in rules.items()}, indent=1))
    return rules


def measure_baseline(
    task: Task,
    network: nn.Module,
    rules: dict[str, Rule],
    cases: Sequence[Case],
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancel: CancelCallback | None = None,
) -> list[CaseScore]:
    """DSC, NSD and HD95 of every case and target, as ``freqseg evaluate`` measures them.

    Args:
        task, network, device: see :func:`draw`.
        rules: by target.
        cases: of the task's modality.
        progress: called with (done, total) cases.
        cancel: polled between batches.

    Raises:
        Cancelled: ``cancel`` answered True.
    """
    scores: list[CaseScore] = []
    for number, case in enumerate(cases, start=1):
        labelled = case.read()
        drawing = draw(network, labelled.volume, device, cancel)
        spacing = [float(s) for s in labelled.volume.spacing[::-1]]
        for meaning in task.targets():
            truth = labelled.truth(meaning.name)
            mask = drawing.mask(_places_of(task, meaning.channels), rules[meaning.name])
            compared_to = overlap(mask, truth, spacing, NSD_TOLERANCE) if truth.any() else None
            absent, drawn = (~drawing.stack.displayed(truth).any((1, 2)), drawing.stack.displayed(mask).any((1, 2)))
            scores.append(
                CaseScore(
                    method=METHOD,
                    group=case.group,
                    modality=case.modality,
                    prompt=meaning.name,
                    belongs=True,
                    unit=case.unit,
                    dsc=None if compared_to is None else compared_to.dsc,
                    nsd=None if compared_to is None else compared_to.nsd,
                    hd95=None if compared_to is None else compared_to.hd95,
                    absent_slices=int(absent.sum()),
                    absent_empty=int((absent & ~drawn).sum()),
                    empty=not mask.any(),
                )
            )
        if progress is not None:
            progress(number, len(cases))
    return scores


def _places_of(task: Task, channels: Sequence[int]) -> list[int]:
    """A target's channels counted along the network's."""
    return [task.channels.index(channel) for channel in channels]
