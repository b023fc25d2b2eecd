"""From the images to the shipped text-guided model: caches, phase 2, gates and settings, weights and their card."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
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
from FreqSegLib.training.lite_data import (
    SliceChoice,
    TrainingSlice,
    cache,
    cache_file,
    plan,
    read_cache,
    seconds_and_bytes,
)
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
ROUNDS = ("run", "finishing")
PANELS = {"training loss": ("loss",), "validation Dice": ("score", "dice ")}


@dataclass(frozen=True)
class Finishing:
    """A second round, from the first one's best averaged weights.

    Attributes:
        slices: what it is trained on.
        loop: how long and how fast. Its last weights are kept: late in the round validation scores differ by less than
            the few ultrasound images in them vary.
        blend: share of this round's weights in what is kept, the rest are the first round's, in (0, 1]: what one round
            learned and the other lost stays in part (weight interpolation after fine-tuning, Wortsman et al. 2022).
    """

    slices: SliceChoice = field(default_factory=lambda: SliceChoice(hippocampus=6, hippocampus_copies=0.0, xrays=0.5))
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            steps=800, learning_rate=3e-4, warmup=50, validate_every=100, patience=12, keep="last"
        )
    )
    blend: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.blend <= 1:
            raise SettingsError(f"blend is {self.blend}; it is a share above 0 and at most 1")


@dataclass(frozen=True)
class TextGuidedRecipe:
    """Everything that decides the shipped model, with its defaults; the keys of a configuration file.

    Attributes:
        embeddings: folder of cached tower embeddings, shared with ``train-lite``; what is missing is computed.
        work: pictures, checkpoints, log and curves; a stopped run goes on from here.
        models: gets ``lite-text-guided/`` and an entry in ``manifest.json``.
        seed: of the plan, the start and every batch.
        slices, loop, training, model: see there.
        finishing: a second round; None leaves it out.
        tune_cases: validation patients a modality (at most) that choose their targets' settings.
        tune_slices: longer stacks are thinned out to so many of their slices for that.
    """

    embeddings: str = "build/lite/slices"
    work: str = "build/text_guided"
    models: str = "Resources/Models"
    seed: int = 0
    slices: SliceChoice = field(default_factory=SliceChoice)
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=1800, warmup=100, validate_every=200, patience=12)
    )
    finishing: Finishing | None = field(default_factory=Finishing)
    training: TextGuidedConfig = field(default_factory=TextGuidedConfig)
    model: DualStreamConfig = field(default_factory=DualStreamConfig)
    tune_cases: int = 14
    tune_slices: int = 64


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
        slices = plan(data, recipe.seed, recipe.slices)
        last = slices if recipe.finishing is None else plan(data, recipe.seed, recipe.finishing.slices)
        together = list(dict.fromkeys([*slices, *last]))
        tower = LiteMedSAM.from_checkpoint(weights.require("litemedsam") / "lite_medsam.pth")
        text = MiniLM(weights.require("minilm"))
        picture_seconds = _fill_caches(data, recipe, together, tower, told, alone=world == 1)
        wordings = trained_wordings()
        vectors = sentence_vectors(text, wordings)
        rounds = [(lambda: phase_two(recipe, slices, wordings, vectors, place, team), recipe.loop)]
        if (finishing := recipe.finishing) is not None:
            other = replace(recipe, seed=recipe.seed + 1, loop=finishing.loop)
            rounds.append((lambda: phase_two(other, last, wordings, vectors, place, team), finishing.loop))
        phase, best = train_rounds(rounds, work, told, team, blend=finishing.blend if finishing else 1.0)
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
    answered = phase.answers(model, phase.of_target, phase.vectors, rows, wrong=len(targets()))
    unseen = phase.answers(model, _by_target(held_out), sentence_vectors(text, held_out), rows)
    gates = choose_gates(answered)
    report(f"validation, trained wordings: {summarise_answers(answered)}")
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
    seconds, size = seconds_and_bytes(Path(recipe.embeddings), together)
    results: dict[str, Any] = {
        "recipe": asdict(recipe),
        "slices": {
            "train": sum(s.split == "train" for s in slices),
            "finishing": sum(s.split == "train" for s in last),
            "validation": sum(s.split == "validation" for s in slices),
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "wordings": len(wordings),
        "rounds": best,
        "trained_wordings": summarise_answers(answered),
        "held_out_wordings": summarise_answers(unseen),
        "gates": {name: asdict(gate) for name, gate in gates.items()},
        "tuning": {name: asdict(choice) for name, choice in chosen.items()},
        "seconds": {
            "embeddings": seconds,
            "pictures": picture_seconds,
            "train": sum(one["seconds"] for one in best),
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


def train_rounds(
    rounds: Sequence[tuple[Callable[[], PhaseTwo], LoopConfig]],
    work: Path,
    report: Callable[[str], None] = print,
    team: Team | None = None,
    *,
    blend: float = 1.0,
) -> tuple[PhaseTwo, list[dict[str, float]]]:
    """One or two rounds of training, the second from the averaged weights that the first one kept.

    Args:
        rounds: what makes each one's batches, and how long it goes on.
        work: gets ``run`` and ``finishing``, each with its checkpoints, log and curves; a stopped round goes on there.
        report: where a line for each validation goes.
        team: the processes that train together.
        blend: share of the second round's averaged weights in the average that is returned.

    Returns:
        The last round, and the row of the weights that each round kept.
    """
    team = team or Team()
    phase: PhaseTwo | None = None
    before: PhaseTwo | None = None
    best: list[dict[str, float]] = []
    for name, (make, loop) in zip(ROUNDS, rounds, strict=False):
        folder, before, phase = work / name, phase, make()
        if before is not None:
            phase.start_from(before.model)

        def row(values: dict[str, float], folder: Path = folder) -> None:
            report("  ".join(f"{key} {value:.4g}" for key, value in values.items()))
            if team.leads:
                draw_curves(folder / "log.csv", folder / "curves.png", PANELS)

        writes, wait = team.leads, team.wait
        best.append(fit(phase.model, phase.batch_loss, phase.validate, folder, loop, row, writes=writes, wait=wait))
    assert phase is not None
    if before is not None:
        phase.model.blend_with(before.model, blend)
    return phase, best


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
