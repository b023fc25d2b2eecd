"""Phase 1 on a user's own images and captions: from a configuration file to an image-text encoder's weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from FreqSegLib.device import resolve_device
from FreqSegLib.errors import SettingsError
from FreqSegLib.mamba.model_config import read_config
from FreqSegLib.training.contrastive_pairs import Pair, PairData, files_in_no_pair, listed, read_pairs
from FreqSegLib.training.contrastive_towers import LiteTowers, OpenClipTowers, Towers, check_clip_folder
from FreqSegLib.training.curves import draw_curves
from FreqSegLib.training.dhn_nce import DHNNCELoss
from FreqSegLib.training.loop import LoopConfig, fit
from FreqSegLib.training.processes import Team, processes
from FreqSegLib.training.work_folder import claim, write_text

RATES = {("lite", "all"): 1e-3, ("open_clip", "heads"): 1e-4, ("open_clip", "all"): 1e-5}
PANELS = {"training loss": ("loss",), "validation accuracy among meanings": ("accuracy", "text_accuracy")}


@dataclass(frozen=True)
class ContrastiveTraining:
    """How long, how fast, and with which loss.

    Attributes:
        epochs: at most; each shows every training pair once, but for what does not fill a batch.
        batch_size: pairs, over all processes; fewer where there are fewer.
        learning_rate: AdamW's, after ``warmup_epochs``, then a cosine to ``final_rate``. None: 1e-3 for the lite
            aligner, 1e-4 for open_clip's heads, 1e-5 for all of it.
        validate_every: epochs.
        patience: validations without a better accuracy before stopping.
        accumulate: batches a step. Negatives come from one batch, so this is not the same as a larger batch.
        temperature, beta1, beta2: of DHN-NCE.
        feature_noise: on the lite tower's embeddings, in units of each channel's standard deviation.
        mixed_precision: bfloat16 autocast on CUDA.
        checkpointing: compute open_clip's blocks again in the backward pass, for memory.
        seed: of the start and every batch.
    """

    epochs: int = 50
    batch_size: int = 48
    learning_rate: float | None = None
    final_rate: float = 1e-6
    warmup_epochs: float = 1.0
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    validate_every: int = 1
    patience: int = 10
    accumulate: int = 1
    temperature: float = 0.6
    beta1: float = 0.15
    beta2: float = 0.15
    feature_noise: float = 0.08
    mixed_precision: bool = True
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("epochs", 1),
            ("batch_size", 2),
            ("validate_every", 1),
            ("patience", 1),
            ("accumulate", 1),
        ):
            if getattr(self, name) < least:
                raise SettingsError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise SettingsError(f"temperature must be above 0, got {self.temperature}")


@dataclass(frozen=True)
class ContrastiveRecipe:
    """A whole configuration file.

    Attributes:
        name: of the result, and of its folder.
        data: images and captions.
        encoder: ``lite`` trains the aligner between LiteMedSAM and MiniLM, which stay as they are; ``open_clip`` a
            model such as BiomedCLIP.
        start: for lite ``shipped``, ``scratch`` or an aligner's weights; for open_clip the model's folder.
        tune: of open_clip, the projection ``heads`` or ``all`` of it.
        training: see there.
        licence: of the result, for its card.
        work: embeddings, checkpoints, log and curves; a stopped run goes on from here.
        models: gets the result, in a folder of its name.
    """

    name: str
    data: PairData
    encoder: Literal["lite", "open_clip"] = "lite"
    start: str = "shipped"
    tune: Literal["heads", "all"] = "heads"
    training: ContrastiveTraining = field(default_factory=ContrastiveTraining)
    licence: str = ""
    work: str = "build/contrastive"
    models: str = "build/contrastive_models"

    def __post_init__(self) -> None:
        if not self.name or any(sign in self.name for sign in "/\\:") or self.name.startswith("."):
            raise SettingsError(f"name must do as a folder's name, got {self.name!r}")

    @property
    def learning_rate(self) -> float:
        """The given one, or the encoder's own."""
        chosen = self.training.learning_rate
        return RATES[self.encoder, self.tune if self.encoder == "open_clip" else "all"] if chosen is None else chosen


def train_contrastive(config: Path, report: Callable[[str], None] = print, *, device: str = "auto") -> Path:
    """Train as a configuration file says; a stopped run goes on where it was.

    Several processes may train together (``torchrun``): each encodes its share of the batch, and the loss sees all.

    Args:
        config: JSON or TOML, a :class:`ContrastiveRecipe`; its relative paths are relative to the file, but for
            ``work`` and ``models``, which are relative to where the command runs.
        report: where lines of progress go.
        device: auto, cpu or cuda[:N].

    Returns:
        The folder of the result.

    Raises:
        SettingsError: the configuration is wrong (the key is named), or the work folder holds another run.
        InputError: the table does not fit its images; all lines at fault are listed.
        WeightsError: weights to start from are missing.
    """
    recipe = read_config(config, ContrastiveRecipe)
    pairs = read_pairs(recipe.data, config.parent)
    work, folder = Path(recipe.work) / recipe.name, Path(recipe.models) / recipe.name
    with processes(resolve_device(device)) as (rank, world, place):
        team = Team(rank, world)
        told: Callable[[str], None] = report if team.leads else lambda line: None
        if team.leads:
            claim(work, replace(recipe, work="", models=""))
        unnamed = files_in_no_pair(pairs)
        if unnamed:
            told(f"Left out: {len(unnamed)} files beside the images that no line names: {listed(unnamed)}")
        torch.manual_seed(recipe.training.seed)
        towers = _towers(recipe, pairs, config.parent, work, told).to(place)
        phase = PairPhase(towers, pairs, recipe, place, team)
        told(phase.described())

        def row(values: dict[str, float]) -> None:
            told("  ".join(f"{key} {value:.4g}" for key, value in values.items()))
            if team.leads:
                draw_curves(work / "run" / "log.csv", work / "run" / "curves.png", PANELS)

        before = phase.validate()
        told(f"before training: accuracy {before['accuracy']:.3f}")
        best = fit(
            towers,
            phase.batch_loss,
            phase.validate,
            work / "run",
            phase.loop_config(),
            row,
            writes=team.leads,
            wait=team.wait,
        )
    if team.leads:
        usage = towers.save(folder)
        results = {"recipe": asdict(recipe), "before": before, "best": best, **phase.counts()}
        write_text(work / "results.json", json.dumps(results, indent=1))
        write_text(folder / "README.md", _card(recipe, phase, before, best, usage))
        told(usage)
    return folder


class PairPhase:
    """Batches, loss and validation of phase 1 on pairs, for :func:`FreqSegLib.training.loop.fit`.

    Args:
        towers: trained.
        pairs: of both splits.
        recipe: see there.
        device, team: where, and with whom.
    """

    def __init__(
        self,
        towers: Towers,
        pairs: Sequence[Pair],
        recipe: ContrastiveRecipe,
        device: torch.device | None = None,
        team: Team | None = None,
    ) -> None:
        self.towers, self.pairs, self.recipe = towers, pairs, recipe
        self.device, self.team = device or torch.device("cpu"), team or Team()
        config = recipe.training
        self.train_rows, self.validation_rows = (
            np.array([row for row, pair in enumerate(pairs) if pair.split == split])
            for split in ("train", "validation")
        )
        self.batch_size = min(config.batch_size, len(self.train_rows) // self.team.world * self.team.world)
        self.team.share(self.batch_size)
        self._batches = max(1, len(self.train_rows) // self.batch_size)
        self.loss = DHNNCELoss(config.temperature, config.beta1, config.beta2)
        self._true_of: dict[int, set[str]] = {}
        for image, pair in zip(towers.image_of, pairs, strict=True):
            self._true_of.setdefault(int(image), set()).add(pair.meaning)
        self._step = self.team.averaging(towers)
        self._autocast = config.mixed_precision and self.device.type == "cuda"

    def loop_config(self) -> LoopConfig:
        """The recipe's epochs in steps."""
        config = self.recipe.training
        epoch = max(1, self._batches // config.accumulate)
        return LoopConfig(
            steps=config.epochs * epoch,
            learning_rate=self.recipe.learning_rate,
            final_rate=config.final_rate,
            warmup=round(config.warmup_epochs * epoch),
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
            validate_every=config.validate_every * epoch,
            patience=config.patience,
            seed=config.seed,
            accumulate=config.accumulate,
        )

    def batch_loss(self, number: int) -> Tensor:
        """DHN-NCE of one batch; what is in it follows from its number and the seed alone."""
        seed, world = self.recipe.training.seed, self.team.world
        epoch, place = divmod(number, self._batches)
        order = np.random.default_rng((seed, epoch)).permutation(self.train_rows)
        rows = order[place * self.batch_size : (place + 1) * self.batch_size]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        noise = self.towers.noise(len(rows), generator)
        mine = slice(self.team.rank, None, world)
        torch.manual_seed((seed * 1_000_003 + number) * world + self.team.rank)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            images, texts = self._step(rows[mine], None if noise is None else noise[mine])
        images, texts = (self.team.gathered(part.float()) for part in (images, texts))
        rows = np.concatenate([rows[rank::world] for rank in range(world)])
        loss = self.loss(images, texts, self._negatives(rows, rows).to(images.device))
        # each process has the gradient of its own part, and their mean is taken
        return loss if world == 1 else loss.detach() + world * (loss - loss.detach())

    def validate(self) -> dict[str, float]:
        """Accuracy among distinct meanings; see :func:`accuracies`. ``score`` is the accuracy."""
        return self.team.told_by_the_first(self._validated)()

    @torch.inference_mode()
    def _validated(self) -> dict[str, float]:
        self.towers.eval()
        rows, parts = self.validation_rows, []
        for start in range(0, len(rows), 32):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
                parts.append(self.towers(rows[start : start + 32]))
        images, texts = (torch.cat(part).float().cpu() for part in zip(*parts, strict=True))
        meanings = [self.pairs[row].meaning for row in rows]
        found = accuracies(images @ texts.T, self._negatives(rows, rows), meanings, self.recipe.data.absence)
        return {"score": found["accuracy"], **found}

    def _negatives(self, images: NDArray[np.int64], texts: NDArray[np.int64]) -> Tensor:
        """(I, T) bool: the caption is not true of the image."""
        said = [self.pairs[row].meaning for row in texts]
        true = [self._true_of[int(self.towers.image_of[row])] for row in images]
        return torch.tensor([[meaning not in of_image for meaning in said] for of_image in true])

    def counts(self) -> dict[str, Any]:
        """What was trained on, and how much."""
        pairs, splits = self.pairs, ("train", "validation")
        return {
            "pairs": {split: sum(pair.split == split for pair in pairs) for split in splits},
            "groups": {split: len({pair.group for pair in pairs if pair.split == split}) for split in splits},
            "meanings": len({pair.meaning for pair in pairs}),
            "trained_parameters": sum(p.numel() for p in self.towers.parameters() if p.requires_grad),
        }

    def described(self) -> str:
        """One line about the run."""
        found = self.counts()
        return (
            f"{self.recipe.name}: {found['trained_parameters'] / 1e6:.2f} M parameters to train, "
            f"{found['pairs']['train']} training and {found['pairs']['validation']} validation pairs of "
            f"{found['meanings']} meanings, {self._batches} batches of {self.batch_size} an epoch"
        )


def accuracies(scores: Tensor, negatives: Tensor, meanings: Sequence[str], absence: Sequence[str]) -> dict[str, float]:
    """How often a pair fits better than what is not true of it.

    Args:
        scores: (P, P), images along the rows, captions along the columns; pair i is (i, i).
        negatives: (P, P) bool, the caption is not true of the image.
        meanings: of the captions.
        absence: meanings that say that something is not there.

    Returns:
        ``accuracy``: the image's own caption scores above one caption of every other meaning that is not true of it;
        ``text_accuracy``: the caption's own image scores above every image it is not true of;
        ``accuracy_absence_apart``, where there are such meanings: ``accuracy`` among the others only. NaN where nothing
        competes.
    """
    own = scores.diagonal()
    first = torch.tensor([meanings.index(meaning) == place for place, meaning in enumerate(meanings)])
    speaks_of_absence = torch.tensor([meaning in absence for meaning in meanings])

    def share(rivals: Tensor, competing: Tensor, values: Tensor) -> float:
        rows = rivals.any(1) & competing
        best = values.masked_fill(~rivals, -torch.inf).amax(1)
        return float((own > best)[rows].double().mean()) if rows.any() else float("nan")

    everything = torch.ones_like(first)
    found = {
        "accuracy": share(negatives & first, everything, scores),
        "text_accuracy": share(negatives.T, everything, scores.T),
    }
    if absence:
        present = ~speaks_of_absence
        found["accuracy_absence_apart"] = share(negatives & first & present, present, scores)
    return found


def _towers(
    recipe: ContrastiveRecipe, pairs: Sequence[Pair], base: Path, work: Path, told: Callable[[str], None]
) -> Towers:
    training = recipe.training
    if recipe.encoder == "lite":
        start = recipe.start if recipe.start in ("shipped", "scratch") else str(base / recipe.start)
        return LiteTowers.prepared(start, pairs, recipe.data, work, training.feature_noise, told)
    folder = check_clip_folder(str(base / recipe.start) if recipe.start != "shipped" else "")
    return OpenClipTowers.prepared(folder, pairs, recipe.data, recipe.tune, told, checkpointing=training.checkpointing)


def _card(
    recipe: ContrastiveRecipe, phase: PairPhase, before: dict[str, float], best: dict[str, float], usage: str
) -> str:
    config, found = recipe.training, phase.counts()
    trained = f"{found['trained_parameters'] / 1e6:.2f} M parameters"
    what = "the lite aligner" if recipe.encoder == "lite" else f"open_clip, {recipe.tune}"
    lines = [
        f"# {recipe.name}",
        "",
        f"Image-text encoder trained by DHN-NCE (Koleilat et al., 2024): {what}, {trained}, from `{recipe.start}`.",
        "",
        f"- Pairs: {found['pairs']['train']} training of {found['groups']['train']} groups, "
        f"{found['pairs']['validation']} validation of {found['groups']['validation']}; {found['meanings']} meanings",
        f"- Loss: temperature {config.temperature}, beta {config.beta1} and {config.beta2}; captions true of an image "
        "are never its negatives",
        f"- AdamW {recipe.learning_rate:g}, cosine to {config.final_rate:g}, batches of {phase.batch_size}, best "
        f"validation accuracy after {best['step']:.0f} steps, {best['seconds'] / 60:.1f} minutes, seed {config.seed}",
        f"- Licence: {recipe.licence or 'not stated'}",
        "",
        "| accuracy on the validation pairs that chose the checkpoint | before | after |",
        "|---|---|---|",
        *(f"| {key} | {before[key]:.3f} | {best[key]:.3f} |" for key in before if key != "score"),
        "",
        usage,
        "",
        "Research use, not for diagnosis.",
        "",
    ]
    return "\n".join(lines)
