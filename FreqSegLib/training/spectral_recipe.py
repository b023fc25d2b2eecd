"""From a configuration file to a spectral model's folder: data, network, losses, the loop, weights, curves, card.

Several processes may train together (``torchrun``): each makes its share of every batch, gradients are averaged, cases
are validated by turns, and the first process writes the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from FreqSegLib.checkpoint import load_exactly
from FreqSegLib.device import resolve_device
from FreqSegLib.errors import FreqSegError, InputError, OutputError, SettingsError
from FreqSegLib.evaluation.segmentation_metrics import NSD_TOLERANCE
from FreqSegLib.mamba.losses import PatchDiscriminator, SpectralDualLoss, adversarial_losses
from FreqSegLib.mamba.model_config import MODEL_FILE, WEIGHTS_FILE, SpectralModel, read_config
from FreqSegLib.mamba.spectral_vmunet import SpectralVMUNet
from FreqSegLib.mamba.stored_weights import packed, unpacked
from FreqSegLib.output_file import replacing
from FreqSegLib.spectral_segmentation import SpectralSegmenter
from FreqSegLib.training.curves import draw_curves
from FreqSegLib.training.loop import LoopConfig, fit
from FreqSegLib.training.processes import processes
from FreqSegLib.training.spectral_config import LossConfig, SpectralRecipe
from FreqSegLib.training.spectral_data import Batch, Batches, Item, find_pairs, load_split, split
from FreqSegLib.training.spectral_test import CaseScore, choose_smallest_part, class_table, scored
from FreqSegLib.training.work_folder import RECIPE_FILE, claim

Row = dict[str, float]
PANELS: dict[str, tuple[str, ...]] = {"training loss": ("loss", "train_"), "validation DSC": ("score", "dsc_")}


def train_spectral(
    config: Path,
    work: Path,
    models: Path,
    *,
    data: Path | None = None,
    device: str = "auto",
    overwrite: bool = False,
    report: Callable[[str], None] = print,
) -> Path:
    """Train a model as a configuration file says; a stopped run goes on where it was.

    Args:
        config: JSON or TOML, a :class:`SpectralRecipe`.
        work: gets checkpoints, ``log.csv`` and ``curves.png``, in a folder of the model's name.
        models: gets the model, in a folder of its name: weights, ``model.json``, a card.
        data: what the data's relative folders are relative to; the configuration's own folder if None.
        device: auto, cpu or cuda[:N].
        overwrite: replace a model of that name; one that this ``work`` made is replaced without it.
        report: where lines of progress go.

    Returns:
        The model's folder.

    Raises:
        SettingsError: the configuration is wrong; the key is named.
        InputError: images or labels are missing or unusable.
        OutputError: ``models`` has another model of that name.
        FreqSegError: the loss is not finite; the batch is named.
    """
    recipe = read_config(config, SpectralRecipe)
    if (
        not overwrite
        and (models / recipe.name / MODEL_FILE).exists()
        and not (work / recipe.name / RECIPE_FILE).exists()
    ):
        raise OutputError(
            f"{models / recipe.name} holds a model already; give yours another name, or another folder (--models), or "
            "allow overwriting (--overwrite)"
        )
    with processes(resolve_device(device)) as (rank, world, place):
        quiet: Callable[[str], None] = report if rank == 0 else (lambda line: None)
        run = SpectralTraining(recipe, data or config.parent, work / recipe.name, place, rank, world, warn=quiet)
        quiet(run.described())
        best = run.fit(quiet)
        folder = models / recipe.name
        if rank == 0:
            run.write_model(folder, best, data or config.parent)
        if world > 1:
            distributed.barrier()
    return folder


def build_network(recipe: SpectralRecipe) -> SpectralVMUNet:
    """The network of a recipe, at its start."""
    return SpectralVMUNet(**asdict(recipe.model), checkpointing=recipe.training.checkpointing)


class Trainee(nn.Module):
    """The network and, where there is one, its adversary: a module whose output is the loss of a batch."""

    def __init__(self, network: nn.Module, config: LossConfig, in_channels: int, classes: int, dimensions: int) -> None:
        super().__init__()
        self.network = network
        values = asdict(config)
        self.adversarial_weight = values.pop("adversarial_weight")
        self.loss = SpectralDualLoss(**values)
        self.discriminator = (
            PatchDiscriminator(in_channels, classes, dimensions=dimensions) if self.adversarial_weight else None
        )

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Images (b, c, *size) and labels (b, *size) to the loss and its components."""
        logits = self.network(images)
        total, components = self.loss(logits.float(), labels, return_components=True)
        if self.discriminator is not None:
            deceive, detect = adversarial_losses(self.discriminator, images, logits.float(), labels)
            total = total + self.adversarial_weight * deceive + detect
            components = {**components, "adversarial": deceive, "discriminator": detect}
        return total, components


class SpectralTraining:
    """One run: what :func:`FreqSegLib.training.loop.fit` needs of a recipe.

    Args:
        recipe: the configuration.
        data: what its relative folders are relative to.
        work: checkpoints, log, curves.
        device: to compute on.
        rank, world: which of how many processes this is.
        network: to train in place of the recipe's, which must take and give the same shapes.
        warn: called with what is unusual about the images.
    """

    def __init__(
        self,
        recipe: SpectralRecipe,
        data: Path,
        work: Path,
        device: torch.device | None = None,
        rank: int = 0,
        world: int = 1,
        network: nn.Module | None = None,
        warn: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self.recipe, self.work = recipe, work
        self.device, self.rank, self.world = device or torch.device("cpu"), rank, world
        config = recipe.training
        if config.batch_size % world:
            raise SettingsError(f"batch_size must be a multiple of the {world} processes, got {config.batch_size}")
        train, validation = load_split(recipe, data, warn)
        self.validation = validation
        self.batches = Batches(train, config, recipe.augment, rank, world)
        _check_sizes(recipe, train, validation)
        torch.manual_seed(config.seed)
        network = network or build_network(recipe)
        model = recipe.model
        self.trainee = Trainee(network, recipe.loss, model.in_channels, model.out_channels, model.dimensions)
        self.trainee.to(self.device)
        self.network = network
        self._step: nn.Module = DistributedDataParallel(self.trainee) if world > 1 else self.trainee
        self._source: Iterator[Batch] | None = None
        self._sums: dict[str, float] = {}
        self._count = 0
        self._autocast = config.mixed_precision and self.device.type == "cuda"

    def described(self) -> str:
        """One line about the run."""
        cases = len({item.case for item in self.batches.items}), len({item.case for item in self.validation})
        parameters = sum(value.numel() for value in self.network.parameters())
        return (
            f"{self.recipe.name}: {parameters / 1e6:.2f} M parameters, {len(self.batches.items)} training images of "
            f"{cases[0]} cases, {len(self.validation)} validation images of {cases[1]}, "
            f"{self.batches.steps_per_epoch} steps an epoch"
        )

    def loop_config(self) -> LoopConfig:
        """The recipe's numbers in steps."""
        config, epoch = self.recipe.training, self.batches.steps_per_epoch
        return LoopConfig(
            steps=len(self.batches),
            learning_rate=config.learning_rate,
            warmup=round(config.warmup_epochs * epoch),
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
            validate_every=config.validate_every * epoch,
            patience=config.patience,
            seed=config.seed,
        )

    def fit(self, report: Callable[[str], None]) -> Row:
        """Train to the end; the network ends with the best validated weights.

        Returns:
            The best row of the log.

        Raises:
            SettingsError: the folder holds a run of another recipe.
        """
        if self.rank == 0:
            claim(self.work, _deciding(self.recipe))
            if (self.work / "last.pt").exists():
                report(f"going on from the checkpoint in {self.work}")
        board = self._board()

        def told(row: Row) -> None:
            report("  ".join(f"{key} {value:.4g}" for key, value in row.items()))
            if self.rank:
                return
            draw_curves(self.work / "log.csv", self.work / "curves.png", PANELS)
            if board is not None:
                for key, value in row.items():
                    if key != "step":
                        board.add_scalar(key, value, int(row["step"]))
                board.flush()

        return fit(
            self.trainee,
            self.batch_loss,
            self.validate,
            self.work,
            self.loop_config(),
            told,
            writes=self.rank == 0,
            wait=self._wait,
        )

    def _wait(self) -> None:
        if self.world > 1:
            distributed.barrier()

    def batch_loss(self, step: int) -> Tensor:
        """Loss of a step's batch.

        Raises:
            FreqSegError: it is not finite; the images are named.
        """
        if self._source is None:
            self._source = iter(self.batches.loader(step, self.recipe.training.workers))
        batch = next(self._source)
        # dropout is drawn from the step, so that a resumed run repeats it
        torch.manual_seed((self.recipe.training.seed * 1_000_003 + step) * self.world + self.rank)
        images, labels = batch.images.to(self.device), batch.labels.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            total, components = self._step(images, labels)
        if not torch.isfinite(total):
            kept = "The last checkpoint is intact. " if (self.work / "last.pt").exists() else ""
            said = ", ".join(f"{name} {float(value.detach()):.4g}" for name, value in components.items())
            raise FreqSegError(
                f"The loss became {float(total.detach())} at step {step} ({said}) on the images "
                f"{', '.join(batch.names)}. {kept}Look at these images, or lower learning_rate."
            )
        for name, value in components.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.detach())
        self._count += 1
        return total

    def validate(self) -> Row:
        """Mean DSC over cases and classes that are there, and over each class; the mean components since last time."""
        counts = self._counts(self.rank, self.world)
        if self.world > 1:
            counts = counts.to(self.device)
            distributed.all_reduce(counts)
            counts = counts.cpu()
        rows = self._dice(counts)
        parts = {f"train_{name}": value / max(1, self._count) for name, value in self._sums.items()}
        self._sums, self._count = {}, 0
        return {**rows, **parts}

    @torch.no_grad()
    def _counts(self, rank: int, world: int) -> Tensor:
        """Voxels in both, in what was found and in the truth: (cases, 3, classes) of this process's share."""
        classes = self.recipe.model.out_channels
        cases = list(dict.fromkeys(item.case for item in self.validation))
        counts = torch.zeros(len(cases), 3, classes, dtype=torch.float64)
        self.network.eval()
        for number, item in enumerate(self.validation):
            if number % world != rank:
                continue
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
                found = self.network(item.image[None, None].to(self.device))[0].argmax(0).cpu()
            truth = item.label.long()
            for label in range(1, classes):
                mask, real = found == label, truth == label
                row = torch.stack([(mask & real).sum(), mask.sum(), real.sum()]).double()
                counts[cases.index(item.case), :, label] += row
        return counts

    def _dice(self, counts: Tensor) -> Row:
        both, mine, real = counts[:, 0, 1:], counts[:, 1, 1:], counts[:, 2, 1:]
        there = real > 0
        if not there.any():
            raise InputError("no validation image has a labelled voxel; enlarge validation_share, or check the labels")
        dice = 2 * both / (mine + real).clamp(min=1)
        rows = {"score": float(dice[there].mean())}
        classes = self.recipe.model.out_channels
        if classes > 2:
            for label in range(classes - 1):
                if there[:, label].any():
                    rows[f"dsc_{label + 1}"] = float(dice[there[:, label], label].mean())
        return rows

    def write_model(self, folder: Path, best: Row, data: Path) -> None:
        """Weights, ``model.json`` and the card with what they score; all appear, or none.

        The network has the weights as they are stored from here on.

        Args:
            folder: of the model.
            best: the row of the log whose weights the network has.
            data: what the recipe's test folders, if there are any, are relative to.
        """
        from safetensors.torch import save_file

        state = packed(self.network.state_dict(), self.recipe.training.stored)
        load_exactly(self.network, unpacked(state, folder), folder)
        self.network.to(self.device)
        as_stored = self._dice(self._counts(0, 1))["score"]
        parts = self._parts(data)
        described = replace(self.recipe.described(), smallest_part=next(iter(parts)))
        tested = self._tested(data, described)
        paths = [folder / WEIGHTS_FILE, folder / "model.json", folder / "README.md"]
        with replacing(paths, overwrite=True) as (weights, model, card):
            save_file(state, weights)
            # safetensors leaves it to its owner alone
            weights.chmod(0o644)
            described.write(model.parent)
            card.write_text(self.card(best, as_stored, parts, tested), encoding="utf-8")

    def _segmenter(self, described: SpectralModel) -> SpectralSegmenter:
        # a network that takes and gives the same shapes has what a segmenter asks of one
        return SpectralSegmenter(cast(SpectralVMUNet, self.network), described, self.device)

    def _parts(self, data: Path) -> dict[float, float]:
        """Validation DSC by the share under which parts are dropped, the best share first."""
        recipe = self.recipe
        _, validation = split(find_pairs(recipe.data, data), recipe.training.validation_share)
        return choose_smallest_part(self._segmenter(recipe.described()), recipe, validation)

    def _tested(self, data: Path, described: SpectralModel) -> list[CaseScore]:
        recipe = self.recipe
        if not recipe.data.test_images:
            return []
        segmenter = self._segmenter(described)
        return [score for pair in find_pairs(recipe.data, data, test=True) for score in scored(segmenter, recipe, pair)]

    def card(self, best: Row, as_stored: float, parts: Mapping[float, float], tested: Sequence[CaseScore]) -> str:
        """What the model is, and what was measured.

        Args:
            best: the row of the log whose weights were kept.
            as_stored: DSC of the validation split with the weights as they are stored.
            parts: the same through the whole segmenter, by the share under which parts are dropped; the chosen first.
            tested: of the test images; empty where the recipe names none.
        """
        recipe = self.recipe
        cases = len({item.case for item in self.validation})
        parameters = sum(value.numel() for value in self.network.parameters())
        lines = [
            f"# {recipe.name}",
            "",
            recipe.description or f"Segments {', '.join(recipe.data.classes)}.",
            "",
            f"- Classes: {', '.join(recipe.data.classes)}",
            f"- Input: {recipe.input.form}, intensity {recipe.input.intensity}",
            f"- SpectralVMUNet with {parameters / 1e6:.2f} M parameters{_variant(recipe)}, stored as "
            f"{recipe.training.stored}",
            f"- Trained on {len({item.case for item in self.batches.items})} cases of {recipe.data.images}, seed "
            f"{recipe.training.seed}, best after {best['step']:.0f} steps, {best['seconds'] / 60:.0f} minutes; "
            "validation cases are drawn by a hash of their names",
            f"- DSC on {cases} validation cases that chose the checkpoint: {best['score']:.4f}; with the weights as "
            f"stored: {as_stored:.4f}",
            f"- {_said_of_parts(parts)}",
            f"- Licence: {recipe.licence or 'not stated'}",
            "",
        ]
        if tested:
            lines += [
                f"On the {len({score.case for score in tested})} images of {recipe.data.test_images}, looked at after "
                "training, mean ± standard deviation; NSD's tolerance is "
                f"{NSD_TOLERANCE:g} in the unit of the files' spacing (pixels where they record none):",
                "",
                *class_table(tested).splitlines(),
                "",
            ]
        lines += ["Research use, not for diagnosis.", ""]
        return "\n".join(lines)

    def _board(self) -> Any:
        if not self.recipe.training.tensorboard or self.rank:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise SettingsError(
                f"training.tensorboard is on, but cannot be loaded ({error}); run 'pip install tensorboard', or turn "
                "it off"
            ) from error
        return SummaryWriter(str(self.work / "tensorboard"))


def _deciding(recipe: SpectralRecipe) -> SpectralRecipe:
    """The recipe without what changes nothing in the network that comes of it."""
    return replace(
        recipe,
        description="",
        licence="",
        data=replace(recipe.data, colors=(), test_images="", test_labels=""),
        training=replace(recipe.training, workers=0, checkpointing=False, stored="float16", tensorboard=False),
    )


def _variant(recipe: SpectralRecipe) -> str:
    """What the method's name promises and this model goes without, and what it has in place of patches."""
    parts = {"the spectral path": recipe.model.spectral, "the loss's frequency term": recipe.loss.freq_weight}
    missing = [name for name, there in parts.items() if not there]
    said = ["with a stem of convolutions"] if recipe.model.stem == "convolutions" else []
    if recipe.model.stage_convolutions:
        said.append("with convolutions before each scan")
    said += [f"without {' and '.join(missing)}"] if missing else []
    return f" ({', '.join(said)})" if said else ""


def _said_of_parts(parts: Mapping[float, float]) -> str:
    chosen = next(iter(parts))
    what = f"Parts under {chosen:.0%} of the largest are dropped" if chosen else "All parts are kept"
    others = ", ".join(f"{share:.0%}: {parts[share]:.4f}" for share in sorted(parts))
    return f"{what}, chosen on the same cases on the files' own grids (DSC by share: {others})"


def _check_sizes(recipe: SpectralRecipe, train: list[Item], validation: list[Item]) -> None:
    """Raises:
    SettingsError: an image is smaller than the network takes, or training would have to stack different sizes.
    """
    # a crop fills up what is smaller
    for item in validation if recipe.training.crop else [*train, *validation]:
        if any(side < least for side, least in zip(item.image.shape, recipe.patch, strict=True)):
            raise SettingsError(
                f"{item.name} has {tuple(item.image.shape)} voxels (z, y, x), fewer than one patch of the network "
                f"{recipe.patch}; lower patch_size or spacing, or take the image away"
            )
    if recipe.training.crop or recipe.training.batch_size == 1:
        return
    sizes = {tuple(item.image.shape) for item in train}
    if len(sizes) > 1:
        raise SettingsError(
            f"the images have {len(sizes)} sizes, for example {sorted(sizes)[0]} and {sorted(sizes)[-1]}; set crop, so "
            "that they can be stacked, or batch_size 1"
        )
