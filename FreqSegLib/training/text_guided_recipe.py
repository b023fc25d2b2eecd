"""From the images to the shipped text-guided model: caches, phase 2, gates and settings, weights and their card."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from FreqSegLib import weights
from FreqSegLib.clip.aligner import Aligner
from FreqSegLib.clip.lite_encoder import LiteEncoder
from FreqSegLib.clip.mini_lm import MiniLM
from FreqSegLib.clip.vocabulary import targets
from FreqSegLib.device import resolve_device
from FreqSegLib.embedding_cache import EmbeddingCache
from FreqSegLib.errors import SettingsError
from FreqSegLib.evaluation.cases import chosen_cases, list_cases
from FreqSegLib.interaction.dual_stream import DualStreamConfig, DualStreamModel
from FreqSegLib.presets import PRESET_FILE, preset
from FreqSegLib.sam.lite_medsam import LiteMedSAM
from FreqSegLib.text_segmentation import TextSegmenter
from FreqSegLib.text_trained import WEIGHTS_FILE, TrainedMethod
from FreqSegLib.training.curves import draw_curves
from FreqSegLib.training.lite_data import TrainingSlice, cache, cache_file, plan, read_cache, seconds_and_bytes
from FreqSegLib.training.loop import LoopConfig, fit
from FreqSegLib.training.processes import Team, processes
from FreqSegLib.training.text_guided import PhaseTwo, TextGuidedConfig, summarise_answers
from FreqSegLib.training.text_guided_card import LICENCE, write_card
from FreqSegLib.training.text_guided_data import (
    Wording,
    cache_pictures,
    held_out_wordings,
    read_pictures,
    sentence_vectors,
    trained_wordings,
)
from FreqSegLib.training.text_guided_tuning import choose_gates, choose_settings, gate_tuning
from FreqSegLib.training.work_folder import claim, write_text

SET_ID = "lite-text-guided"
PANELS = {"training loss": ("loss",), "validation Dice": ("score", "dice ")}


@dataclass(frozen=True)
class TextGuidedRecipe:
    """Everything that decides the shipped model, with its defaults; the keys of a configuration file.

    Attributes:
        embeddings: folder of cached tower embeddings, shared with ``train-lite``; what is missing is computed.
        work: pictures, checkpoints, log and curves; a stopped run goes on from here.
        models: gets ``lite-text-guided/`` and an entry in ``manifest.json``.
        seed: of the plan, the start and every batch.
        loop, training, model: see there.
        tune_cases: validation patients a modality (at most) that choose their targets' settings.
        tune_slices: longer stacks are thinned out to so many of their slices for that.
    """

    embeddings: str = "build/lite/slices"
    work: str = "build/text_guided"
    models: str = "Resources/Models"
    seed: int = 0
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=1800, warmup=100, validate_every=200, patience=12)
    )
    training: TextGuidedConfig = field(default_factory=TextGuidedConfig)
    model: DualStreamConfig = field(default_factory=DualStreamConfig)
    tune_cases: int = 14
    tune_slices: int = 24


def train_text_guided(
    data: Path,
    recipe: TextGuidedRecipe | None = None,
    report: Callable[[str], None] = print,
    *,
    device: str = "auto",
) -> Path:
    """Train, choose gates and settings on validation patients, write weights, settings and card.

    Several processes may train together (``torchrun``), once the caches are filled: each makes its share of every
    batch, gradients are averaged, and the first one validates, chooses and writes.

    Args:
        data: folder with ``segmentation/`` and ``fusion/``.
        recipe: see :class:`TextGuidedRecipe`.
        report: where lines of progress go.
        device: to train on: auto, cpu or cuda[:N]. Settings are chosen on the CPU.

    Returns:
        The folder of the weights.

    Raises:
        SettingsError: the work folder holds a run of another recipe; several processes, and the caches are not full.
        InputError: there are no training images.
    """
    recipe = recipe or TextGuidedRecipe()
    work = Path(recipe.work)
    with processes(resolve_device(device)) as (rank, world, place):
        team = Team(rank, world)
        told: Callable[[str], None] = report if team.leads else lambda line: None
        if team.leads:
            # where the result goes does not matter to it
            claim(work, replace(recipe, work="", models="", embeddings=""))
        slices = plan(data, recipe.seed)
        tower = LiteMedSAM.from_checkpoint(weights.require("litemedsam") / "lite_medsam.pth")
        text = MiniLM(weights.require("minilm"))
        picture_seconds = _fill_caches(data, recipe, slices, tower, told, alone=world == 1)
        wordings = trained_wordings()
        phase = phase_two(recipe, slices, wordings, sentence_vectors(text, wordings), place, team)

        def row(values: dict[str, float]) -> None:
            told("  ".join(f"{key} {value:.4g}" for key, value in values.items()))
            if team.leads:
                draw_curves(work / "run" / "log.csv", work / "run" / "curves.png", PANELS)

        best = fit(
            phase.model,
            phase.batch_loss,
            phase.validate,
            work / "run",
            recipe.loop,
            row,
            writes=team.leads,
            wait=team.wait,
        )
    folder = Path(recipe.models) / SET_ID
    if not team.leads:
        return folder
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    names = json.dumps([meaning.name for meaning in targets()])
    phase.model.average.save(folder / WEIGHTS_FILE, {"licence": LICENCE, "meanings": names})
    # what is shipped is half precision, so everything below is measured on that
    model = DualStreamModel.load(folder / WEIGHTS_FILE)
    held_out = held_out_wordings()
    rows = [int(row) for row in phase.validation_rows]
    everything = phase.answers(model, phase.of_target, phase.vectors, rows, wrong=len(targets()))
    unseen = phase.answers(model, _by_target(held_out), sentence_vectors(text, held_out), rows)
    gates = choose_gates(everything)
    report(f"validation, trained wordings: {summarise_answers(everything)}")
    report(f"validation, held-out wordings: {summarise_answers(unseen)}")
    tuning = {name: gate_tuning(gate) for name, gate in gates.items()}
    method = TrainedMethod(model, text, tuple(m.name for m in targets()), tuning, "tuning")
    cases = chosen_cases(list_cases(data, "train-validation", most_slices=recipe.tune_slices), recipe.tune_cases)
    with TemporaryDirectory(dir=work) as temporary:
        chosen = choose_settings(_segmenter(tower, text, method, Path(temporary)), cases, report)
    tuning = {
        name: gate_tuning(gate, chosen[name].settings if name in chosen else None) for name, gate in gates.items()
    }
    write_text(folder / PRESET_FILE, json.dumps({"tuning": {n: asdict(t) for n, t in tuning.items()}}, indent=1) + "\n")
    seconds, size = seconds_and_bytes(Path(recipe.embeddings), slices)
    results: dict[str, Any] = {
        "recipe": asdict(recipe),
        "slices": {split: sum(s.split == split for s in slices) for split in ("train", "validation")},
        "parameters": sum(p.numel() for p in model.parameters()),
        "wordings": len(wordings),
        "best": best,
        "trained_wordings": summarise_answers(everything),
        "held_out_wordings": summarise_answers(unseen),
        "gates": {name: asdict(gate) for name, gate in gates.items()},
        "tuning": {name: asdict(choice) for name, choice in chosen.items()},
        "seconds": {
            "embeddings": seconds,
            "pictures": picture_seconds,
            "train": best["seconds"],
            "tune": time.monotonic() - started,
        },
        "cache_bytes": size,
        "picture_bytes": sum(f.stat().st_size for f in (work / "pictures").glob("*.npz")),
        "threads": torch.get_num_threads(),
    }
    write_text(work / "results.json", json.dumps(results, indent=1))
    write_card(folder / "README.md", results)
    weights.record_shipped(SET_ID, recipe.models)
    return folder


def phase_two(
    recipe: TextGuidedRecipe,
    slices: list[TrainingSlice],
    wordings: list[Wording],
    vectors: Tensor,
    device: torch.device | None = None,
    team: Team | None = None,
) -> PhaseTwo:
    """A fresh model of the recipe with its batches, from filled caches."""
    data = read_cache(Path(recipe.embeddings), slices)
    pictures = read_pictures(Path(recipe.work) / "pictures", data.slices)
    torch.manual_seed(recipe.seed)
    return PhaseTwo(
        DualStreamModel(recipe.model),
        data,
        pictures,
        wordings,
        vectors,
        recipe.training,
        recipe.seed,
        accumulate=recipe.loop.accumulate,
        device=device,
        team=team,
    )


def _fill_caches(
    data: Path,
    recipe: TextGuidedRecipe,
    slices: list[TrainingSlice],
    tower: LiteMedSAM,
    report: Callable[[str], None],
    *,
    alone: bool,
) -> float:
    """Embeddings and pictures that are missing; the seconds the pictures took.

    Raises:
        SettingsError: some are, and other processes would wait for them.
    """

    def told(what: str) -> Callable[[int, int], None]:
        return lambda done, total: report(f"{what} {done}/{total}") if done % 100 == 0 or done == total else None

    embeddings, pictures = Path(recipe.embeddings), Path(recipe.work) / "pictures"
    missing = sum(not cache_file(folder, item).exists() for folder in (embeddings, pictures) for item in slices)
    if missing and not alone:
        raise SettingsError(
            f"{missing} files of {embeddings} and {pictures} are not computed yet; fill these caches with one process "
            "first (the same command without torchrun), then start several"
        )
    if not all(cache_file(embeddings, item).exists() for item in slices):
        cache(data, embeddings, tower.embed, slices, told("embeddings"))
    started = time.monotonic()
    if not all(cache_file(pictures, item).exists() for item in slices):
        cache_pictures(data, pictures, slices, told("pictures"))
    return time.monotonic() - started


def _segmenter(tower: LiteMedSAM, text: MiniLM, method: TrainedMethod, folder: Path) -> TextSegmenter:
    """The lite preset with the new model; the shipped aligner, if there is one, only warns of another modality."""
    found = weights.find("lite-aligner")
    aligner = Aligner.load(found / "aligner.safetensors") if found else Aligner()
    return TextSegmenter(
        LiteEncoder(tower, aligner, text),
        tower,
        preset("lite"),
        weights_key="tuning",
        trained=method,
        cache=EmbeddingCache(folder, gigabytes=12.0),
    )


def _by_target(wordings: list[Wording]) -> list[np.ndarray]:
    return [np.array([i for i, w in enumerate(wordings) if w.target == t]) for t in range(len(targets()))]
