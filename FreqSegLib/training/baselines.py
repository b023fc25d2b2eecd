"""The usual way beside the text-guided one: a U-Net a task, which knows its targets and no language.

It learns from the same slices, in the same frame and with the same kind of augmentation as phase 2, so that its numbers
can stand beside the text-guided model's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from FreqSegLib.clip.vocabulary import Meaning, targets
from FreqSegLib.errors import InputError, SettingsError
from FreqSegLib.training.lite_data import TrainingSlice
from FreqSegLib.training.loop import LoopConfig, fit
from FreqSegLib.training.text_guided import Answer, TextGuidedConfig, summarise_answers
from FreqSegLib.training.text_guided_data import LEAST_PIXELS, Pictures, mirrored, target_masks, warped
from FreqSegLib.training.unet_peer import UNetPeer
from FreqSegLib.training.work_folder import claim


@dataclass(frozen=True)
class Task:
    """One U-Net's work.

    Attributes:
        name, title: on the command line, and for people.
        modality: key of ``vocabulary.MODALITIES``.
        channels: what it draws, channels of ``lite_data.target_channels``.
    """

    name: str
    title: str
    modality: str
    channels: tuple[int, ...]

    def targets(self) -> tuple[Meaning, ...]:
        """What can be read off its channels."""
        return tuple(meaning for meaning in targets() if meaning.modality == self.modality)


TASKS: tuple[Task, ...] = (
    Task("glioma", "glioma on FLAIR MR", "flair", (0,)),
    Task("lungs", "left and right lung on X-ray", "xray", (0, 1)),
    Task("breast", "breast lesion on ultrasound", "ultrasound", (0,)),
    Task("hippocampus", "anterior and posterior hippocampus on T1 MR", "t1", (0, 1)),
)


def task_of(name: str) -> Task:
    """The task of that name.

    Raises:
        SettingsError: there is none; all are listed.
    """
    for task in TASKS:
        if task.name == name:
            return task
    raise SettingsError(f"There is no baseline task '{name}'. Tasks: {', '.join(task.name for task in TASKS)}.")


@dataclass(frozen=True)
class BaselineConfig:
    """What a U-Net is and how it learns.

    Attributes:
        widths: channels of its levels, each half as large as the one above.
        residual_units: convolutions of a level's residual unit.
        batch_size: slices a step.
        present_share: of the slices drawn, how many show a target, where there are some that do not.
        loop: steps and rate.
        seed: of the start and every batch.
    """

    widths: tuple[int, ...] = (16, 32, 64, 128, 256)
    residual_units: int = 2
    batch_size: int = 8
    present_share: float = 0.8
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=600, learning_rate=3e-3, warmup=30, validate_every=100, patience=100)
    )
    seed: int = 0


@dataclass(frozen=True)
class BaselineRecipe:
    """What decides a U-Net's weights: the task, how many slices, and how it learns."""

    task: str
    slices: int
    config: BaselineConfig


def build_unet(channels: int, config: BaselineConfig) -> UNetPeer:
    """A network, (B, 1, S, S) in [0, 1] -> logits (B, channels, S, S), from the config's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        # most pixels are background: the prior of Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017
        return UNetPeer(2, 1, channels, config.widths, residual_units=config.residual_units, bias=-3.0)


class BaselineTraining:
    """Batches, loss and validation of one task, for :func:`FreqSegLib.training.loop.fit`.

    Args:
        task: which.
        slices: the plan's slices of the task's modality.
        pictures: the same slices.
        config: see there.
        device: where the network is.
    """

    def __init__(
        self,
        task: Task,
        slices: Sequence[TrainingSlice],
        pictures: Pictures,
        config: BaselineConfig,
        device: torch.device | None = None,
    ) -> None:
        from monai.losses import DiceLoss

        self.task, self.slices, self.pictures, self.config = task, slices, pictures, config
        self.device = device or torch.device("cpu")
        # the same changes as in phase 2
        self.changes = TextGuidedConfig()
        self.train_rows = _rows(slices, "train")
        self.validation_rows = _rows(slices, "validation")
        if not len(self.train_rows) or not len(self.validation_rows):
            raise InputError(
                f"{task.title}: {len(self.train_rows)} training and {len(self.validation_rows)} validation slices; at "
                "least one of each is needed"
            )
        self.network = build_unet(len(task.channels), config).to(self.device)
        # over the whole batch, so that a slice without the target does not divide by nothing
        self.dice_loss = DiceLoss(sigmoid=True, batch=True)
        self._weights = self._balanced()

    def batch_loss(self, step: int) -> Tensor:
        """Dice and binary cross-entropy of one step; the batch follows from the step and the seed alone."""
        images, masks = self.batch(np.random.default_rng((self.config.seed, step)))
        logits, masks = self.network(images.to(self.device)), masks.to(self.device)
        return self.dice_loss(logits, masks) + F.binary_cross_entropy_with_logits(logits, masks)

    def batch(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Random slices (B, 1, S, S) in [0, 1], mirrored, moved and with other grey curves, and the task's masks."""
        c, size = self.changes, self.config.batch_size
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        rows = rng.choice(self.train_rows, size, p=self._weights)
        images, masks = self.fetch(rows)
        flips = torch.from_numpy(rng.random(size) < 0.5)
        _, images, masks = mirrored(images, images, masks, flips, [self.task.modality] * size)
        moves = torch.rand(size, 4, generator=generator) * 2 - 1
        turn, zoom, shift = c.turn * moves[:, 0], 1 + c.zoom * moves[:, 1], 2 * c.shift * moves[:, 2:]
        images, masks = (warped(maps, turn, zoom, shift) for maps in (images, masks))
        curve = 1 + c.intensity * (torch.rand(size, 2, generator=generator) * 2 - 1)
        gamma, gain = curve[:, 0, None, None, None], curve[:, 1, None, None, None]
        images = (images.clamp(1e-4, 1) ** gamma * gain).clamp(0, 1)
        return images, masks[:, list(self.task.channels)]

    def fetch(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Images (B, 1, S, S) and all channels' masks (B, 2, S, S) of those rows, in [0, 1]."""
        return (
            torch.from_numpy(self.pictures.images[rows])[:, None].float() / 255,
            torch.from_numpy(self.pictures.masks[rows]).float() / 255,
        )

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Dice of every target over validation patients; ``score`` is their mean."""
        answers: list[Answer] = []
        for row in self.validation_rows:
            images, masks = self.fetch(np.array([row]))
            drawn = np.zeros((1, *masks.shape[1:]), dtype=np.float32)
            drawn[:, list(self.task.channels)] = self.network(images.to(self.device)).sigmoid().cpu().numpy()
            for number, meaning in enumerate(targets()):
                if meaning.modality != self.task.modality:
                    continue
                found, truth = (target_masks(m, [number]) > 0.5 for m in (torch.from_numpy(drawn), masks))
                there = int(truth.sum()) >= LEAST_PIXELS
                answers.append(
                    Answer(
                        group=self.slices[row].group,
                        target=number,
                        belongs=True,
                        there=there,
                        presence=1.0,
                        drawn=int(found.sum()),
                        truth=int(truth.sum()),
                        overlap=int((found & truth).sum()),
                    )
                )
        said = summarise_answers(answers)
        return {key: said[key] for key in said if key == "score" or key.startswith("dice ") or key == "absent_empty"}

    def _balanced(self) -> NDArray[np.float64]:
        """As phase 2 draws slices of one modality."""
        shows = np.asarray((self.pictures.masks[self.train_rows] > 127).any((1, 2, 3)))
        if shows.all() or not shows.any():
            return np.full(len(shows), 1 / len(shows))
        share = self.config.present_share
        return np.where(shows, share / shows.sum(), (1 - share) / (~shows).sum())


def train_baseline(
    task: Task,
    slices: Sequence[TrainingSlice],
    pictures: Pictures,
    folder: Path,
    config: BaselineConfig | None = None,
    device: torch.device | None = None,
    report: Callable[[dict[str, float]], None] | None = None,
) -> tuple[nn.Module, dict[str, float]]:
    """Train one task's U-Net; a stopped run goes on where it was, a finished one is read back.

    Args:
        task: which.
        slices, pictures: the plan's slices of its modality.
        folder: gets checkpoints, the log and ``recipe.json``.
        config: see there.
        device: where to compute.
        report: called with every validation's numbers.

    Returns:
        The network with its best validated weights, in evaluation mode, and that validation's numbers.

    Raises:
        SettingsError: the folder holds a run of another recipe.
        InputError: there is nothing to learn from, or to validate on.
    """
    config = config or BaselineConfig()
    claim(folder, BaselineRecipe(task.name, len(slices), config))
    training = BaselineTraining(task, slices, pictures, config, device)
    best = fit(training.network, training.batch_loss, training.validate, folder / "run", config.loop, report)
    return training.network.requires_grad_(False).eval(), best


def _rows(slices: Sequence[TrainingSlice], split: str) -> NDArray[np.int64]:
    return np.array([row for row, item in enumerate(slices) if item.split == split], dtype=np.int64)
