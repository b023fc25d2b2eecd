"""Training the fusion networks: presets of recipes, one run, and the comparison of wavelets."""

from __future__ import annotations

import csv
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from FreqSegLib import weights
from FreqSegLib.errors import SettingsError
from FreqSegLib.fusion.losses import BasicLoss, FusionLoss, HybridLoss, MedicalLoss, MetricLoss
from FreqSegLib.fusion.multi_scale import MultiScaleWaveletFusionNet
from FreqSegLib.fusion.network import WEIGHTS_FILE, FusionNetwork
from FreqSegLib.fusion.single_scale import WaveletFusionNet
from FreqSegLib.training.curves import draw_curves
from FreqSegLib.training.fusion_card import LICENCE, write_card
from FreqSegLib.training.fusion_data import PATIENTS, Pairs, read_pairs
from FreqSegLib.training.fusion_score import baseline_table, score, table_of
from FreqSegLib.training.loop import LoopConfig, fit
from FreqSegLib.training.work_folder import claim, write_text

PHASES: tuple[dict[str, float], ...] = (
    {"l1": 2.0, "ssim": 1.0, "gradient": 0.5, "perceptual": 0.1, "frequency": 0.1},
    {"l1": 1.5, "ssim": 2.0, "gradient": 1.5, "perceptual": 0.3, "frequency": 0.2},
    {"l1": 1.0, "ssim": 2.0, "gradient": 1.5, "perceptual": 0.8, "frequency": 0.5},
)
"""Weights of the hybrid loss in each third of the progressive schedule: pixels, then structure, then perception."""
PANELS: dict[str, tuple[str, ...]] = {"training loss": ("loss",), "validation score": ("score",)}


@dataclass(frozen=True)
class FusionRecipe:
    """Everything that decides a trained fusion network.

    Attributes:
        network: ``single-scale`` or ``multi-scale``.
        loss: ``basic``, ``medical``, ``hybrid``, ``progressive`` (hybrid in three phases) or ``metric``.
        wave, levels, halo_limit: of the network.
        width, kernel_size, reduction: of the multi-scale network; the single-scale one has none of them.
        pixel_gate: how far open that network's pixel gate is when training starts, 0 to 1.
        batch_size: slices a step.
        epochs: passes over the training slices, at most.
        learning_rate: at the start.
        rate: ``step`` halves it every 20 epochs; ``cosine`` lowers it to 0 along half a cosine.
        weight_decay, clip_norm: of AdamW (Adam where the decay is 0) and of the gradient; ``inf`` clips nothing.
        crop: side in pixels of the random square cut from every slice; 0 takes whole slices.
        validate_every: epochs between validations.
        patience: validations without a better score before stopping.
        seed: of the start, the order of slices, crops and flips.
    """

    network: Literal["single-scale", "multi-scale"] = "single-scale"
    loss: Literal["basic", "medical", "hybrid", "progressive", "metric"] = "basic"
    wave: str = "haar"
    levels: int = 1
    halo_limit: int = 0
    width: int = 16
    kernel_size: int = 7
    reduction: int = 8
    pixel_gate: float = 0.0
    batch_size: int = 8
    epochs: int = 50
    learning_rate: float = 1e-3
    rate: Literal["step", "cosine"] = "step"
    weight_decay: float = 0.0
    clip_norm: float = math.inf
    crop: int = 128
    validate_every: int = 5
    patience: int = 4
    seed: int = 0


RECIPES: dict[str, FusionRecipe] = {
    "basic": FusionRecipe(),
    "medical": FusionRecipe(loss="medical", wave="db4", levels=2, batch_size=4, learning_rate=5e-4),
    "hybrid": FusionRecipe(
        network="multi-scale",
        loss="progressive",
        wave="db4",
        levels=3,
        batch_size=4,
        learning_rate=1e-4,
        rate="cosine",
        weight_decay=1e-5,
        clip_norm=1.0,
    ),
    "metric": FusionRecipe(
        network="multi-scale",
        loss="metric",
        wave="haar",
        levels=2,
        halo_limit=3,
        pixel_gate=0.5,
        batch_size=2,
        epochs=10,
        learning_rate=3e-3,
        rate="cosine",
        weight_decay=1e-5,
        clip_norm=1.0,
        crop=0,
        validate_every=2,
        patience=5,
    ),
}
"""Recipes by name. ``metric`` optimises surrogates of the metrics it is judged by, and says so wherever it is shown."""

SHIPPED: dict[str, FusionRecipe] = {
    "single-scale": replace(
        RECIPES["metric"], network="single-scale", levels=1, halo_limit=0, pixel_gate=0.0, epochs=6
    ),
    "multi-scale": RECIPES["metric"],
}
"""What the shipped weights were made with."""


def recipe_for(network: str, name: str) -> FusionRecipe:
    """A network's recipe by name; ``shipped`` is what its shipped weights were made with.

    Raises:
        SettingsError: an unknown network or recipe.
    """
    if network in SHIPPED:
        shipped = SHIPPED[network]
        recipes = {"shipped": shipped, **RECIPES}
        if name in recipes:
            return replace(recipes[name], network=shipped.network)
    raise SettingsError(
        f"there is no recipe '{name}' for a network '{network}'; networks: {', '.join(SHIPPED)}, "
        f"recipes: shipped, {', '.join(RECIPES)}"
    )


OPTIONS = ("wave", "levels", "epochs", "seed")
"""Fields of a recipe that the command line can change."""


def command_for(recipe: FusionRecipe, *, test: bool = False) -> str | None:
    """The command line that trains a recipe; None where no named recipe with other options is the same."""
    for name in ("shipped", *RECIPES):
        named = recipe_for(recipe.network, name)
        chosen = {key: getattr(recipe, key) for key in OPTIONS}
        if replace(named, **chosen) != recipe:
            continue
        words = ["freqseg train-fusion --network", recipe.network]
        words += [] if name == "shipped" else ["--recipe", name]
        words += [f"--{key} {value}" for key, value in chosen.items() if value != getattr(named, key)]
        return " ".join([*words, *(["--test"] if test else [])])
    return None


def build_network(recipe: FusionRecipe) -> FusionNetwork:
    """The network that a recipe starts from, by its seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if recipe.network == "single-scale":
            return WaveletFusionNet(recipe.wave, recipe.levels, recipe.halo_limit)
        if recipe.network == "multi-scale":
            network = MultiScaleWaveletFusionNet(
                recipe.wave,
                recipe.levels,
                width=recipe.width,
                reduction=recipe.reduction,
                kernel_size=recipe.kernel_size,
                halo_limit=recipe.halo_limit,
            )
            network.open_pixel_gate(recipe.pixel_gate)
            return network
    raise SettingsError(f"network must be 'single-scale' or 'multi-scale', got '{recipe.network}'")


def build_loss(recipe: FusionRecipe, report: Callable[[str], None] = print) -> FusionLoss:
    """The loss of a recipe, built once; says which features the perceptual term uses."""
    if recipe.loss in ("hybrid", "progressive"):
        from FreqSegLib.fusion.perceptual import perceptual_features

        features = perceptual_features()
        report(f"perceptual features: {features.name}")
        return HybridLoss(features)
    losses: dict[str, type[FusionLoss]] = {"basic": BasicLoss, "medical": MedicalLoss, "metric": MetricLoss}
    if recipe.loss not in losses:
        raise SettingsError(f"loss must be one of basic, medical, hybrid, progressive, metric, got '{recipe.loss}'")
    return losses[recipe.loss]()


def phase_of(epoch: int, epochs: int) -> int:
    """0, 1 or 2: the third of the schedule that an epoch, counted from 0, lies in; what is left over is the last's."""
    return min(2, epoch // max(1, epochs // 3))


def learning_rate(recipe: FusionRecipe, step: int, steps_per_epoch: int) -> float:
    """The rate at a step, by whole epochs."""
    epoch = step // steps_per_epoch
    if recipe.rate == "step":
        return recipe.learning_rate * 0.5 ** (epoch // 20)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / recipe.epochs))


class FusionTask:
    """What ``fit`` asks for: the loss of a step and the validation.

    Args:
        network: trained in place.
        recipe: see there.
        train: slices to learn from.
        validation: slices to choose by.
        baselines: table of the classics on the validation slices, see ``fusion_score``.
        loss: see :func:`build_loss`.
    """

    def __init__(
        self,
        network: FusionNetwork,
        recipe: FusionRecipe,
        train: Pairs,
        validation: Pairs,
        baselines: dict[str, dict[str, float]],
        loss: FusionLoss,
    ) -> None:
        self.network, self.recipe, self.loss = network, recipe, loss
        self.train, self.validation, self.baselines = train, validation, baselines
        self.steps_per_epoch = math.ceil(len(train) / recipe.batch_size)
        self._best: dict[int, dict[str, Tensor]] = {}

    def batch_loss(self, step: int) -> Tensor:
        """Loss of one batch, drawn from the seed and the step alone."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self.recipe.loss == "progressive":
            self.loss.set_weights(PHASES[phase_of(epoch, self.recipe.epochs)])
        order = torch.randperm(len(self.train), generator=_generator(self.recipe.seed, 1, epoch))
        indices = order[position * self.recipe.batch_size : (position + 1) * self.recipe.batch_size].tolist()
        ct, mr = self._augmented(indices, _generator(self.recipe.seed, 2, step))
        fused = self.network(ct, mr).image
        if isinstance(self.loss, MetricLoss) and not self.recipe.crop:
            return self.loss(fused, ct, mr, self._best_classic(indices)).total
        return self.loss(fused, ct, mr).total

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """``score`` (see ``fusion_score.score``) and the eight metrics on the validation slices."""
        table = table_of(lambda ct, mr: self.network(ct, mr), self.validation)
        return {"score": score(table, self.baselines), **table}

    def _augmented(self, indices: Sequence[int], random: torch.Generator) -> tuple[Tensor, Tensor]:
        pairs = []
        for index in indices:
            pair = torch.cat([self.train.ct[index], self.train.mr[index]])
            crop, (height, width) = self.recipe.crop, pair.shape[-2:]
            if crop and crop < min(height, width):
                top = int(torch.randint(height - crop + 1, (), generator=random))
                left = int(torch.randint(width - crop + 1, (), generator=random))
                pair = pair[:, top : top + crop, left : left + crop]
            flips = torch.rand(2, generator=random) < 0.5
            pairs.append(pair.flip([axis for axis, flip in zip((-2, -1), flips, strict=True) if flip]))
        both = torch.stack(pairs)
        return both[:, :1], both[:, 1:]

    def _best_classic(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The classics' values on whole slices, which a flip hardly changes, are computed once."""
        assert isinstance(self.loss, MetricLoss)
        for index in indices:
            if index not in self._best:
                one = self.train.subset([index])
                self._best[index] = self.loss.best_classic(one.ct, one.mr)
        names = self._best[indices[0]]
        return {name: torch.cat([self._best[index][name] for index in indices]) for name in names}


def train_network(
    data: Path, work: Path, recipe: FusionRecipe, report: Callable[[str], None] = print
) -> tuple[FusionNetwork, dict[str, Any]]:
    """Train one network; a stopped run goes on where it was.

    Args:
        data: folder with ``fusion/harvard_ct_mri``.
        work: gets checkpoints, ``log.csv``, ``curves.png``, ``recipe.json`` and ``results.json`` of this run alone.
        recipe: see :class:`FusionRecipe`.
        report: where lines of progress go.

    Returns:
        The network with its best validated weights, and what was measured.

    Raises:
        SettingsError: ``work`` holds a run of another recipe.
        InputError: the data are not there.
    """
    claim(work, recipe)
    train, validation = read_pairs(data, "train"), read_pairs(data, "validation")
    network = build_network(recipe)
    baselines = baseline_table(validation, work / "baselines.json")
    task = FusionTask(network, recipe, train, validation, baselines, build_loss(recipe, report))
    config = LoopConfig(
        steps=recipe.epochs * task.steps_per_epoch,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        clip_norm=recipe.clip_norm,
        validate_every=recipe.validate_every * task.steps_per_epoch,
        patience=recipe.patience,
        seed=recipe.seed,
    )

    def tell(row: dict[str, float]) -> None:
        report("  ".join(f"{key} {value:.4g}" for key, value in row.items()))

    untrained = task.validate() if not (work / "last.pt").exists() else None
    if untrained is not None:
        report(f"before training: score {untrained['score']:.4f}")
    best = fit(
        network,
        task.batch_loss,
        task.validate,
        work,
        config,
        tell,
        lambda step: learning_rate(recipe, step, task.steps_per_epoch),
    )
    draw_curves(work / "log.csv", work / "curves.png", PANELS)
    results = {
        "recipe": asdict(recipe),
        "patients": PATIENTS,
        "slices": {"train": len(train), "validation": len(validation)},
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "best": best,
        "baselines": baselines,
        "threads": torch.get_num_threads(),
    }
    write_text(work / "results.json", json.dumps(results, indent=1))
    return network.requires_grad_(False).eval(), results


def train_fusion(
    data: Path,
    work: Path,
    models: Path,
    recipe: FusionRecipe,
    report: Callable[[str], None] = print,
    *,
    test: bool = False,
) -> Path:
    """Train a network and put weights, card and checksum where the catalogue looks for them.

    Args:
        data, work, recipe, report: as for :func:`train_network`.
        models: gets ``fusion-single-scale/`` or ``fusion-multi-scale/`` and an entry in ``manifest.json``.
        test: measure on the test patients too. For the end, when nothing will be chosen any more.

    Returns:
        The folder of the weights.
    """
    started = time.monotonic()
    network, results = train_network(data, work, recipe, report)
    folder = models / f"fusion-{recipe.network}"
    folder.mkdir(parents=True, exist_ok=True)
    network.save(folder / WEIGHTS_FILE, {"licence": LICENCE})
    if test:
        pairs = read_pairs(data, "test")
        results["test"] = {recipe.network: table_of(network, pairs), **baseline_table(pairs)}
        results["slices"]["test"] = len(pairs)
    results["command"] = command_for(recipe, test=test)
    report(f"{time.monotonic() - started:.0f} s in this call")
    write_text(work / "results.json", json.dumps(results, indent=1))
    write_card(folder / "README.md", results)
    weights.record_shipped(f"fusion-{recipe.network}", models)
    return folder


def compare_wavelets(
    data: Path,
    work: Path,
    recipe: FusionRecipe,
    waves: Sequence[str] = ("haar", "db2", "db4", "bior2.2", "bior4.4", "coif2"),
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Train one recipe in several wavelets and rank them by the validation score.

    Args:
        data, recipe, report: as for :func:`train_network`.
        work: gets a folder a wavelet, and ``wavelets.csv``.
        waves: names out of :func:`FreqSegLib.wavelet.wavelets`.

    Returns:
        A row a wavelet (``wave``, ``score``, the eight metrics, ``seconds``), best first.
    """
    rows = []
    for wave in waves:
        report(f"wavelet {wave}")
        _, results = train_network(data, work / wave, replace(recipe, wave=wave), report)
        rows.append({"wave": wave, **{key: value for key, value in results["best"].items() if key != "rate"}})
    rows.sort(key=lambda row: -row["score"])
    temporary = work / "wavelets.csv.part"
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, work / "wavelets.csv")
    return rows


def _generator(*seeds: int) -> torch.Generator:
    """Random numbers that depend on all of ``seeds``."""
    seed = 0
    for number in seeds:
        seed = seed * 1_000_003 + number
    return torch.Generator().manual_seed(seed)
