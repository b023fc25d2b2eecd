"""Phase 1: contrastive training of the lite aligner on cached tower embeddings.

Captions are made from the masks: modality, anatomy, target present or absent, side. A slice can be seen whole or
through a window: outside it the tokens at the bottleneck are replaced by N(0, 1) noise, which is what M2IB does to them
afterwards, and the caption speaks of the window alone. So a token must hold what is at its own place, and the saliency
that M2IB reads from the same tokens falls where the target is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from FreqSegLib.clip.aligner import Aligner
from FreqSegLib.clip.vocabulary import MEANINGS, MODALITIES
from FreqSegLib.training.dhn_nce import DHNNCELoss
from FreqSegLib.training.lite_data import CachedSlices

TRUE, UNKNOWN, FALSE = 1, 0, -1
SINGLE_SHARE, UNION_SHARE = 0.4, 0.7
ABSENT_SHARE = 0.03


@dataclass(frozen=True)
class ContrastiveConfig:
    """What is particular to phase 1.

    Attributes:
        batch_size: pictures a step.
        views: picture-caption pairs made of each: the whole picture, and windows of it.
        temperature, beta1, beta2: of DHN-NCE.
        modality_share: share of captions that name the modality alone.
        modality_concentration: how evenly a batch mixes the modalities (Dirichlet); small values give batches of one.
    """

    batch_size: int = 48
    views: int = 4
    temperature: float = 0.6
    beta1: float = 0.15
    beta2: float = 0.15
    modality_share: float = 0.08
    modality_concentration: float = 1.0
    feature_noise: float = 0.08


@dataclass(frozen=True)
class Statement:
    """Something that is true or false of a picture: a meaning, or a modality alone (``channels`` None)."""

    name: str
    modality: str
    channels: tuple[int, ...] | None
    wordings: tuple[str, ...]
    held_out: tuple[str, ...]


def statements() -> list[Statement]:
    """Every meaning of the vocabulary, then every modality."""
    meanings = [Statement(m.name, m.modality, m.channels, m.wordings, m.held_out) for m in MEANINGS]
    return meanings + [Statement(m.name, key, None, m.wordings, ()) for key, m in MODALITIES.items()]


def truth_table(modality: list[str], covered: Tensor, total: Tensor) -> Tensor:
    """What is true of each picture.

    Args:
        modality: (B) keys.
        covered: (B, 2) cells of each target channel that can be seen.
        total: (B, 2) cells of each target channel in the whole picture.

    Returns:
        (B, S) int8: TRUE, FALSE, or UNKNOWN (part of a target in the window; a target nobody marked).
    """
    said = statements()
    table = torch.full((len(modality), len(said)), FALSE, dtype=torch.int8)
    for column, statement in enumerate(said):
        same = torch.tensor([m == statement.modality for m in modality])
        if statement.channels is None:
            table[same, column] = TRUE
            continue
        channels = list(statement.channels) or [0, 1]
        seen, whole = covered[:, channels].sum(1), total[:, channels].sum(1)
        needed = (UNION_SHARE if len(channels) > 1 else SINGLE_SHARE) * whole
        present = (whole > 0) & (seen >= needed)
        absent = seen <= ABSENT_SHARE * whole
        if not statement.channels:
            present, absent = absent, seen > 0.2 * whole
        value = torch.where(present, TRUE, torch.where(absent, FALSE, UNKNOWN)).to(torch.int8)
        table[same, column] = value[same]
        # Harvard's patients may have tumours that no mask shows
        if statement.modality == "flair":
            table[torch.tensor([m in ("ct", "mr") for m in modality]), column] = UNKNOWN
    return table


class PhaseOne:
    """Batches, loss and validation of phase 1, for :func:`FreqSegLib.training.loop.fit`."""

    def __init__(
        self, model: Aligner, data: CachedSlices, sentences: dict[str, Tensor], config: ContrastiveConfig, seed: int
    ) -> None:
        """Args:
        model: the aligner; its channel statistics are set from the training slices.
        data: cached slices.
        sentences: MiniLM vector (384) of every wording.
        config, seed: see there.
        """
        self.model, self.data, self.config, self.seed = model, data, config, seed
        self.statements = statements()
        self.sentences = sentences
        self.loss = DHNNCELoss(config.temperature, config.beta1, config.beta2)
        self.train_rows, self.validation_rows = data.subset("train"), data.subset("validation")
        self.grid, self._depth = model.config.grid, model.config.depth
        self._set_channel_statistics()
        self._weights = self._balanced(self.train_rows)

    def batch_loss(self, step: int) -> Tensor:
        rng = np.random.default_rng((self.seed, step))
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        rows = rng.choice(self.train_rows, self.config.batch_size, p=self._mixed(rng))
        pooled, coverage, modality = self._fetch(rows, rng)
        noise = torch.randn(pooled.shape, generator=generator)
        tokens = self.model.prefix(pooled + self.config.feature_noise * noise * self.model.channel_std, self._depth)
        # the costly prefix runs once a picture, the cheap suffix once a view of it: whole, then windows
        views = self.config.views
        tokens, coverage = (part.repeat_interleave(views, 0) for part in (tokens, coverage))
        keep = self._windows(coverage, rng, 1.0)
        keep[::views] = True
        table = self._table(coverage, keep, [m for m in modality for _ in range(views)])
        captions, chosen = self._captions(table, rng)
        images = self.model.suffix(self._through_window(tokens, keep, generator), self._depth)
        return self.loss(images, self.model.align_text(captions), table[:, chosen] == FALSE)

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Accuracy among distinct meanings, whole slices and windows, and how well presence is told from absence."""
        rng, generator = np.random.default_rng(self.seed + 1), torch.Generator().manual_seed(self.seed + 1)
        texts = self.model.align_text(torch.stack([self.sentences[s.wordings[0]] for s in self.statements]))
        whole: list[Tensor] = []
        windows: list[Tensor] = []
        presence: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(self.validation_rows), 64):
            pooled, coverage, modality = self._fetch(self.validation_rows[start : start + 64])
            tokens = self.model.prefix(pooled, self._depth)
            for share, into in ((0.0, whole), (1.0, windows)):
                keep = self._windows(coverage, rng, share)
                table = self._table(coverage, keep, modality)
                scores = self.model.suffix(self._through_window(tokens, keep, generator), self._depth) @ texts.T
                into.append(_is_right(scores, table))
                if not share:
                    presence.append((scores, table))
        scores, table = (torch.cat(part) for part in zip(*presence, strict=True))
        area = self._presence_auc(scores, table)
        accuracy, window_accuracy = torch.cat(whole).mean().item(), torch.cat(windows).mean().item()
        mean_area = sum(area.values()) / len(area)
        return {
            "score": (accuracy + window_accuracy + mean_area) / 3,
            "accuracy": accuracy,
            "window_accuracy": window_accuracy,
            "presence_auc": mean_area,
            **{f"auc {name}": value for name, value in area.items()},
        }

    def _presence_auc(self, scores: Tensor, table: Tensor) -> dict[str, float]:
        names = [s.name for s in self.statements]
        found = {}
        for target, absence in (
            ("brain tumour", "no brain tumour"),
            ("breast lesion", "no breast lesion"),
            ("hippocampus", "no hippocampus"),
        ):
            column, null = names.index(target), names.index(absence)
            same = torch.tensor([True]).expand(len(table)) & (table[:, names.index(target)] != UNKNOWN)
            same &= (table[:, column] == TRUE) | (table[:, null] == TRUE)
            margin = (scores[:, column] - scores[:, null])[same]
            positive = (table[:, column] == TRUE)[same]
            if positive.any() and not positive.all():
                pairs = margin[positive][:, None] - margin[~positive][None]
                found[target] = ((pairs > 0).float() + 0.5 * (pairs == 0).float()).mean().item()
        return found

    def _set_channel_statistics(self) -> None:
        sample = self.train_rows[:: max(1, len(self.train_rows) // 300)]
        values = torch.from_numpy(self.data.embeddings[sample]).float()
        self.model.channel_mean.copy_(values.mean((0, 2, 3))[:, None, None])
        self.model.channel_std.copy_(values.std((0, 2, 3)).clamp_min(1e-3)[:, None, None])

    def _balanced(self, rows: np.ndarray) -> np.ndarray:
        """Every modality, and within it presence and absence, drawn equally often (CT and other MR half as often)."""
        kinds = [(self.data.slices[i].modality, bool(self.data.coverage[i].any())) for i in rows]
        share = {"flair": 1.5, "xray": 0.8, "ultrasound": 1.0, "t1": 1.0, "ct": 0.4, "mr": 0.5}
        per_modality = {m: len({k for k in kinds if k[0] == m}) for m, _ in kinds}
        weights = np.array([share[m] / per_modality[m] / kinds.count((m, p)) for m, p in kinds])
        return weights / weights.sum()

    def _mixed(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """Every batch leans to other modalities, so that its hard negatives (a target present or absent in one
        kind of picture) do not drown among easy ones.
        """
        lean = dict(zip(MODALITIES, rng.gamma(self.config.modality_concentration, size=len(MODALITIES)), strict=True))
        weights = self._weights * np.array([lean[self.data.slices[i].modality] for i in self.train_rows])
        return weights / weights.sum()

    def _fetch(self, rows: np.ndarray, rng: np.random.Generator | None = None) -> tuple[Tensor, Tensor, list[str]]:
        """Embeddings, coverage on the token grid, modalities; with ``rng`` half of them mirrored (sides exchanged)."""
        pooled = torch.from_numpy(self.data.embeddings[rows]).float()
        coverage = F.adaptive_avg_pool2d(torch.from_numpy(self.data.coverage[rows]).float(), self.grid)
        modality = [self.data.slices[i].modality for i in rows]
        if rng is not None:
            mirrored = torch.from_numpy(rng.random(len(rows)) < 0.5)
            pooled[mirrored] = pooled[mirrored].flip(-1)
            coverage[mirrored] = coverage[mirrored].flip(-1)
            lungs = mirrored & torch.tensor([m == "xray" for m in modality])
            coverage[lungs] = coverage[lungs].flip(1)
        return pooled, coverage, modality

    def _windows(self, coverage: Tensor, rng: np.random.Generator, share: float) -> Tensor:
        """What is kept of each picture, (B, grid, grid) bool: everything, a rectangle, or all but a rectangle."""
        keep = torch.ones(len(coverage), self.grid, self.grid, dtype=torch.bool)
        for row in range(len(coverage)):
            if rng.random() >= share:
                continue
            height, width = rng.integers(3, self.grid - 2, 2)
            target = torch.nonzero(coverage[row].sum(0) > 0)
            if len(target) and rng.random() < 0.5:
                y, x = target[int(rng.integers(len(target)))].tolist()
            else:
                y, x = rng.integers(0, self.grid, 2)
            top, left = max(0, int(y) - int(height) // 2), max(0, int(x) - int(width) // 2)
            inside = torch.zeros(self.grid, self.grid, dtype=torch.bool)
            inside[top : top + int(height), left : left + int(width)] = True
            keep[row] = inside if rng.random() < 0.6 else ~inside
        return keep

    def _table(self, coverage: Tensor, keep: Tensor, modality: list[str]) -> Tensor:
        covered = (coverage * keep[:, None]).sum((2, 3))
        return truth_table(modality, covered, coverage.sum((2, 3)))

    def _captions(self, table: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """One true statement a picture in one of its wordings: vectors (B, 384) and statement numbers (B)."""
        vectors, chosen = [], []
        first_modality = len(MEANINGS)
        for row in table:
            true = torch.nonzero(row == TRUE).flatten().tolist()
            specific = [s for s in true if s < first_modality]
            general = [s for s in true if s >= first_modality]
            pool = specific if specific and rng.random() > self.config.modality_share else general
            statement = int(rng.choice(pool))
            wording = self.statements[statement].wordings[int(rng.integers(len(self.statements[statement].wordings)))]
            vectors.append(self.sentences[wording])
            chosen.append(statement)
        return torch.stack(vectors), torch.tensor(chosen)

    def _through_window(self, tokens: Tensor, keep: Tensor, generator: torch.Generator) -> Tensor:
        """lambda h + (1 - lambda) eps: near 1 inside the window, near 0 outside, exactly 1 where all is kept."""
        batch = len(tokens)
        softness = 0.25 * torch.rand(batch, 1, generator=generator)
        flat = keep.flatten(1).float()
        gate = torch.where(keep.flatten(1).all(1, keepdim=True), flat, flat * (1 - 2 * softness) + softness)
        noise = torch.randn(tokens.shape, generator=generator)
        return gate[..., None] * tokens + (1 - gate[..., None]) * noise


def _is_right(scores: Tensor, table: Tensor) -> Tensor:
    """Is the best scored statement true? (B) float; statements of unknown truth do not compete."""
    best = scores.masked_fill(table == UNKNOWN, -torch.inf).argmax(1)
    return (table.gather(1, best[:, None])[:, 0] == TRUE).float()
