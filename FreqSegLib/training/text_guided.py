"""Phase 2: the dual-stream model learns to draw what a sentence names, on cached tower embeddings.

Every slice of a batch is asked a few things in random wordings: a target it shows, a target it does not show (or one
of another modality), for which the answer is nothing. The tower and the text tower stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from FreqSegLib.clip.vocabulary import targets
from FreqSegLib.interaction.dual_stream import DualStreamModel, DualStreamOutput
from FreqSegLib.training.contrastive import FALSE, TRUE, UNKNOWN
from FreqSegLib.training.lite_data import CachedSlices
from FreqSegLib.training.processes import Team
from FreqSegLib.training.text_guided_data import (
    Pictures,
    Wording,
    mirrored,
    target_masks,
    truth_of,
    warped,
)

SHARES = {"flair": 1.3, "xray": 0.7, "ultrasound": 1.2, "t1": 1.3, "ct": 0.08, "mr": 0.08}
WATCHED = {"flair": 70, "xray": 36, "ultrasound": 30, "t1": 56, "ct": 4, "mr": 4}
SMOOTH = 20.0


@dataclass(frozen=True)
class TextGuidedConfig:
    """What is particular to phase 2.

    Attributes:
        batch_size: slices a step.
        prompts: asked of each slice; what depends on the image alone is computed once for them.
        absent_share: share of prompts for something that is not there.
        dice_weight, bce_weight: of the mask's loss on probabilities.
        supervision_weight: of each decoder's own loss.
        presence_weight: of the presence logit's loss.
        meaning_weight: of naming the target from the sentence alone, which pulls apart what MiniLM puts close together.
        feature_noise: standard deviation of the noise on the embedding, in units of each channel's own.
        text_noise: length of the noise on a sentence's unit vector, and twice the largest step to another wording.
        intensity: how far gamma and gain of the frequency stream's picture vary.
        turn, zoom, shift: largest rotation (radians), relative change of size, and displacement (share of the side);
            0 for all of them leaves the slices in place.
        average: how slowly the averaged weights follow, in [0, 1); they are what is validated and kept.
        mixed_precision: bfloat16 autocast on CUDA. Nothing on a CPU, where it is slower.
        checkpointing: compute the image's features again in the backward pass, and each prompt's, for memory.
    """

    batch_size: int = 8
    prompts: int = 2
    absent_share: float = 0.25
    dice_weight: float = 0.7
    bce_weight: float = 0.3
    supervision_weight: float = 0.4
    presence_weight: float = 0.2
    meaning_weight: float = 0.1
    feature_noise: float = 0.1
    text_noise: float = 0.25
    intensity: float = 0.25
    turn: float = 0.15
    zoom: float = 0.12
    shift: float = 0.06
    average: float = 0.99
    mixed_precision: bool = True
    checkpointing: bool = False


@dataclass(frozen=True)
class Batch:
    """B slices and P >= B prompts; ``counts`` (B) says how many prompts each slice has.

    Attributes:
        embedding: (B, 256, 32, 32).
        images: (B, 1, 256, 256) in [0, 1].
        counts: (B) whole numbers, P together.
        text: (P, 384).
        masks: (P, 1, 256, 256) in [0, 1], what should be drawn.
        present: (P) 1 where the target is there.
        asked: (P) the target, along ``vocabulary.targets()``.
    """

    embedding: Tensor
    images: Tensor
    counts: Tensor
    text: Tensor
    masks: Tensor
    present: Tensor
    asked: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(*(getattr(self, item.name).to(device) for item in fields(self)))


class WithAverage(nn.Module):
    """A model in training beside the running average of its weights, in one state, so that a resumed run has both."""

    def __init__(self, model: DualStreamModel, decay: float) -> None:
        super().__init__()
        self.model, self.decay = model, decay
        self.average = deepcopy(model).requires_grad_(False)
        # in training only
        self.meaning = nn.Linear(model.config.text_width, len(targets()))

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Move the average towards the weights; quickly at first."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for mean, now in zip(self.average.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(now, 1 - decay)
        for kept, value in zip(self.average.buffers(), self.model.buffers(), strict=True):
            kept.copy_(value)

    @torch.no_grad()
    def blend_with(self, other: WithAverage, share: float) -> None:
        """Make the average ``share`` of itself and the rest of another's."""
        for mean, first in zip(self.average.parameters(), other.average.parameters(), strict=True):
            mean.lerp_(first, 1 - share)

    def train(self, mode: bool = True) -> WithAverage:
        """The average is never in training mode."""
        super().train(mode)
        self.average.eval()
        return self


class Drawer(nn.Module):
    """A model that draws what a batch asks for: the module whose gradients several processes average."""

    def __init__(self, trained: WithAverage, checkpointing: bool) -> None:
        super().__init__()
        self.model, self.meaning, self.checkpointing = trained.model, trained.meaning, checkpointing

    def forward(self, batch: Batch) -> tuple[DualStreamOutput, Tensor]:
        """What is drawn for every prompt, and logits (P, T) of the target that its sentence names."""
        features = self._run(self.model.encode_image, batch.embedding, batch.images)
        output = self._run(self.model.segment, features.for_prompts(batch.counts), batch.text)
        return output, self.meaning(self.model.said(batch.text))

    def _run(self, part: Callable[..., Any], *given: Any) -> Any:
        return checkpoint(part, *given, use_reentrant=False) if self.checkpointing else part(*given)


class PhaseTwo:
    """Batches, loss and validation of phase 2, for :func:`FreqSegLib.training.loop.fit`."""

    def __init__(
        self,
        model: DualStreamModel,
        data: CachedSlices,
        pictures: Pictures,
        wordings: Sequence[Wording],
        vectors: Tensor,
        config: TextGuidedConfig | None = None,
        seed: int = 0,
        *,
        accumulate: int = 1,
        device: torch.device | None = None,
        team: Team | None = None,
    ) -> None:
        """Args:
        model: its channel statistics are set from the training slices.
        data, pictures: the same slices.
        wordings: of every target, the canonical one first.
        vectors: MiniLM's, (len(wordings), 384).
        config, seed: see there.
        accumulate: batches a step; see :class:`FreqSegLib.training.loop.LoopConfig`.
        device: to train on; the data stay where they are.
        team: the processes that train together, each with its share of the batch.
        """
        self.config = config or TextGuidedConfig()
        self.data, self.pictures, self.seed = data, pictures, seed
        self.vectors = vectors
        self.accumulate, self.device, self.team = accumulate, device or torch.device("cpu"), team or Team()
        self._slices = self.team.share(self.config.batch_size)
        self.of_target = [np.array([i for i, w in enumerate(wordings) if w.target == t]) for t in range(len(targets()))]
        self.truth = truth_of(data.slices, pictures.masks)
        self.train_rows, self.validation_rows = data.subset("train"), data.subset("validation")
        self._set_channel_statistics(model)
        self.model = WithAverage(model, self.config.average).to(self.device)
        self._drawer = self.team.averaging(Drawer(self.model, self.config.checkpointing))
        self._autocast = self.config.mixed_precision and self.device.type == "cuda"
        self._weights = self._balanced()

    def start_from(self, other: WithAverage) -> None:
        """Take the averaged weights of an earlier round, for the model and for its average."""
        state = other.average.state_dict()
        self.model.model.load_state_dict(state)
        self.model.average.load_state_dict(state)
        self.model.meaning.load_state_dict(other.meaning.state_dict())

    def batch_loss(self, number: int) -> Tensor:
        """The loss of one batch; what is in it, noise and dropout follow from its number and the seed alone."""
        step, part = divmod(number, self.accumulate)
        if step and not part:
            self.model.follow(step)
        rng = np.random.default_rng((self.seed, number, self.team.rank) if self.team.rank else (self.seed, number))
        batch = self.batch(rng).to(self.device)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(int(rng.integers(1 << 62)))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
                output, named = self._drawer(batch)
        return self.loss(output, batch) + self.config.meaning_weight * F.cross_entropy(named.float(), batch.asked)

    def loss(self, output: DualStreamOutput, batch: Batch) -> Tensor:
        """0.7 Dice + 0.3 BCE on probabilities, the same for each decoder at its own size, BCE of presence."""
        c = self.config
        # a Dice of thousands of pixels needs float32
        total = self._mask_loss(output.logits.float(), batch.masks)
        for logits in (output.semantic, output.frequency):
            if logits is not None:
                small = F.adaptive_avg_pool2d(batch.masks, (logits.shape[-2], logits.shape[-1]))
                total = total + c.supervision_weight * self._mask_loss(logits.float(), small)
        presence = F.binary_cross_entropy_with_logits(output.presence.float(), batch.present)
        return total + c.presence_weight * presence

    def _mask_loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        c = self.config
        probability, truth = logits.sigmoid().flatten(1), masks.flatten(1)
        # in pixels of the full size, so that both sizes treat small and empty targets alike
        smooth = SMOOTH * truth.shape[1] / 256**2
        overlap = (2 * (probability * truth).sum(1) + smooth) / (probability.sum(1) + truth.sum(1) + smooth)
        bce = F.binary_cross_entropy_with_logits(logits, masks)
        return c.dice_weight * (1 - overlap).mean() + c.bce_weight * bce

    def batch(self, rng: np.random.Generator) -> Batch:
        """Random slices, prompts and changes."""
        c = self.config
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        rows = rng.choice(self.train_rows, self._slices, p=self._weights)
        wanted = [self._asked(int(row), rng) for row in rows]
        counts = torch.tensor([len(w) for w in wanted])
        embedding, images, masks = self.fetch(rows)
        modality = [self.data.slices[row].modality for row in rows]
        flips = torch.from_numpy(rng.random(len(rows)) < 0.5)
        embedding, images, masks = mirrored(embedding, images, masks, flips, modality)
        if c.turn or c.zoom or c.shift:
            moves = torch.rand(len(rows), 4, generator=generator) * 2 - 1
            turn, zoom, shift = c.turn * moves[:, 0], 1 + c.zoom * moves[:, 1], 2 * c.shift * moves[:, 2:]
            embedding, images, masks = (warped(x, turn, zoom, shift) for x in (embedding, images, masks))
        noise = torch.randn(embedding.shape, generator=generator)
        embedding = embedding + c.feature_noise * self.model.model.channel_std.cpu() * noise
        images = self._changed(images, generator)
        asked = [target for targets_of_slice in wanted for target in targets_of_slice]
        masks = target_masks(masks.repeat_interleave(counts, 0), asked)
        present = torch.tensor(
            [float(self.truth[row, t] == TRUE) for row, w in zip(rows, wanted, strict=True) for t in w]
        )
        # what another modality calls its first target lies in the same channel
        masks = masks * present[:, None, None, None]
        said = self._said(asked, rng, generator)
        return Batch(embedding, images, counts, said, masks, present, torch.tensor(asked))

    def _asked(self, row: int, rng: np.random.Generator) -> list[int]:
        """Targets a slice is asked for, all different."""
        there = list(np.flatnonzero(self.truth[row] == TRUE))
        modality = self.data.slices[row].modality
        own = [i for i in np.flatnonzero(self.truth[row] == FALSE) if targets()[i].modality == modality]
        others = [i for i in np.flatnonzero(self.truth[row] == FALSE) if targets()[i].modality != modality]
        found: list[int] = []
        for _ in range(self.config.prompts):
            absent = own if own and rng.random() < 0.5 else others
            wants_absent = rng.random() < self.config.absent_share
            # a second prompt is left out rather than asked for one thing twice
            pools = [absent, there] if wants_absent else [there] if found else [there, own, others]
            pool = next((pool for pool in pools if pool), None)
            if pool is not None:
                found.append(int(pool.pop(int(rng.integers(len(pool))))))
        return found

    def _said(self, asked: Sequence[int], rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        """A vector a prompt: one wording, a step towards another of the same target, some noise; unit length."""
        first, second = (self.vectors[[int(rng.choice(self.of_target[target])) for target in asked]] for _ in range(2))
        step = torch.rand(len(asked), 1, generator=generator) * min(1.0, 2 * self.config.text_noise)
        noise = F.normalize(torch.randn(first.shape, generator=generator), dim=1) * self.config.text_noise
        return F.normalize(first + step * (second - first) + noise, dim=1)

    def _changed(self, images: Tensor, generator: torch.Generator) -> Tensor:
        change = 1 + self.config.intensity * (torch.rand(len(images), 2, generator=generator) * 2 - 1)
        gamma, gain = change[:, 0, None, None, None], change[:, 1, None, None, None]
        return (images.clamp(1e-4, 1) ** gamma * gain).clamp(0, 1)

    def fetch(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings (B, 256, 32, 32), images (B, 1, 256, 256) in [0, 1], masks (B, 2, 256, 256) of those rows."""
        return (
            torch.from_numpy(self.data.embeddings[rows]).float(),
            torch.from_numpy(self.pictures.images[rows])[:, None].float() / 255,
            torch.from_numpy(self.pictures.masks[rows]).float() / 255,
        )

    def validate(self) -> dict[str, float]:
        """Dice a patient on validation patients, and how often nothing is drawn where nothing is."""

        def answered() -> dict[str, float]:
            return summarise_answers(self.answers(self.model.average, self.of_target, self.vectors, self._watched()))

        return self.team.told_by_the_first(answered)()

    @torch.inference_mode()
    def answers(
        self,
        model: DualStreamModel,
        of_target: Sequence[NDArray[np.int64]],
        vectors: Tensor,
        rows: Sequence[int],
        wrong: int = 1,
    ) -> list[Answer]:
        """Ask slices for each target of their modality and for some that cannot be there.

        Args:
            model: in evaluation mode.
            of_target: rows of ``vectors`` that ask for each target; slices take turns.
            vectors: (V, 384).
            rows: of the data.
            wrong: targets of other modalities a slice is asked for.
        """
        found: list[Answer] = []
        for number, row in enumerate(rows):
            item = self.data.slices[row]
            own = [t for t, m in enumerate(targets()) if m.modality == item.modality and self.truth[row, t] != UNKNOWN]
            others = [int(t) for t in np.flatnonzero(self.truth[row] == FALSE) if t not in own]
            asked = [*own, *(others[(number + i) % len(others)] for i in range(min(wrong, len(others))))]
            said = vectors[[int(of_target[t][number % len(of_target[t])]) for t in asked]]
            embedding, images, masks = self.fetch(np.array([row]))
            device = next(model.parameters()).device
            features = model.encode_image(embedding.to(device), images.to(device))
            counts = torch.tensor([len(asked)], device=device)
            output = model.segment(features.for_prompts(counts), said.to(device))
            drawn = (output.logits > 0).cpu()
            truth = target_masks(masks.expand(len(asked), -1, -1, -1), asked) > 0.5
            for place, target in enumerate(asked):
                there = bool(self.truth[row, target] == TRUE)
                found.append(
                    Answer(
                        group=item.group,
                        target=target,
                        belongs=target in own,
                        there=there,
                        presence=float(output.presence[place]),
                        drawn=int(drawn[place].sum()),
                        truth=int(truth[place].sum()) if there else 0,
                        overlap=int((drawn[place] & truth[place]).sum()) if there else 0,
                    )
                )
        return found

    def _watched(self) -> list[int]:
        """Validation slices that are looked at while training: at most ``WATCHED`` a modality, evenly chosen."""
        found: list[int] = []
        for modality, most in WATCHED.items():
            own = [int(row) for row in self.validation_rows if self.data.slices[row].modality == modality]
            # patients lie in the plan's random order, so that any part of it holds most of them
            found += own[:most]
        return found

    def _set_channel_statistics(self, model: DualStreamModel) -> None:
        sample = self.train_rows[:: max(1, len(self.train_rows) // 300)]
        values = torch.from_numpy(self.data.embeddings[sample]).float()
        model.channel_mean.copy_(values.mean((0, 2, 3))[:, None, None])
        model.channel_std.copy_(values.std((0, 2, 3)).clamp_min(1e-3)[:, None, None])

    def _balanced(self) -> NDArray[np.float64]:
        """Modalities by ``SHARES``; within one, slices that show a target four times as often together."""
        kinds = [(self.data.slices[row].modality, bool((self.truth[row] == TRUE).any())) for row in self.train_rows]
        both = {m for m, _ in kinds if (m, True) in kinds and (m, False) in kinds}
        weights = []
        for modality, shows in kinds:
            share = SHARES[modality] * ((0.8 if shows else 0.2) if modality in both else 1.0)
            weights.append(share / kinds.count((modality, shows)))
        found = np.array(weights)
        return found / found.sum()


@dataclass(frozen=True)
class Answer:
    """One slice asked for one target.

    Attributes:
        group: patient or image.
        target: along ``vocabulary.targets()``.
        belongs: the target is one of the slice's modality.
        there: the slice shows it.
        presence: the model's logit.
        drawn, truth, overlap: pixels.
    """

    group: str
    target: int
    belongs: bool
    there: bool
    presence: float
    drawn: int
    truth: int
    overlap: int

    @property
    def kept(self) -> bool:
        """Passes the presence gate at one half."""
        return self.presence > 0


def summarise_answers(answers: Sequence[Answer]) -> dict[str, float]:
    """Dice of every target over patients (slices that the presence gate empties count as empty), and emptiness.

    ``score``, the mean of the modalities' Dice, chooses the checkpoint.
    """
    by_modality: dict[str, list[float]] = {}
    found: dict[str, float] = {}
    for number, meaning in enumerate(targets()):
        asked = [a for a in answers if a.belongs and a.target == number]
        patients = []
        for group in dict.fromkeys(a.group for a in asked):
            own = [a for a in asked if a.group == group]
            truth = sum(a.truth for a in own)
            drawn, overlap = sum(a.drawn for a in own if a.kept), sum(a.overlap for a in own if a.kept)
            if truth:
                patients.append(2 * overlap / (drawn + truth))
        if patients:
            found[f"dice {meaning.name}"] = float(np.mean(patients))
            by_modality.setdefault(meaning.modality, []).append(float(np.mean(patients)))
    there = [a.kept for a in answers if a.there]
    absent = [not a.kept or a.drawn == 0 for a in answers if a.belongs and not a.there]
    wrong = [not a.kept or a.drawn == 0 for a in answers if not a.belongs]
    score = float(np.mean([np.mean(values) for values in by_modality.values()])) if by_modality else float("nan")
    shares = {"present_kept": there, "absent_empty": absent, "wrong_empty": wrong}
    return {"score": score, **found, **{k: float(np.mean(v)) if v else float("nan") for k, v in shares.items()}}
