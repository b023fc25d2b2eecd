"""From the images to the zero-shot path's shipped modules: caches, fusion, amortised bottleneck, evidence, card."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from FreqSegLib import weights
from FreqSegLib.clip.aligner import Aligner
from FreqSegLib.clip.lite_encoder import LiteEncoder
from FreqSegLib.clip.mini_lm import MiniLM
from FreqSegLib.clip.prompts import PromptMatcher
from FreqSegLib.clip.questions import apart_from_contrasts
from FreqSegLib.clip.vocabulary import targets
from FreqSegLib.download import file_digest
from FreqSegLib.embedding_cache import EmbeddingCache
from FreqSegLib.evaluation.cases import Case, chosen_cases, list_cases
from FreqSegLib.evaluation.paired import PairedTest, paired_test
from FreqSegLib.evaluation.segmentation_metrics import dice
from FreqSegLib.interaction.zero_shot_fusion import ZeroShotFusion, ZeroShotFusionConfig
from FreqSegLib.presets import PRESET_FILE, Tuning, preset, read_tuning
from FreqSegLib.saliency.amortised import AmortisedBottleneck, AmortisedConfig, amortised_information
from FreqSegLib.sam.lite_medsam import LiteMedSAM
from FreqSegLib.settings import Bottleneck, Branches, TextSegmentationSettings
from FreqSegLib.text_segmentation import TextSegmenter
from FreqSegLib.training.curves import draw_curves
from FreqSegLib.training.lite_data import TrainingSlice, cache, cache_file, plan, seconds_and_bytes
from FreqSegLib.training.loop import LoopConfig, fit
from FreqSegLib.training.work_folder import claim, write_text
from FreqSegLib.training.zero_shot import (
    BottleneckPhase,
    BottleneckTraining,
    FusionPhase,
    FusionTraining,
    best_thresholds,
    patient_dice,
    score,
)
from FreqSegLib.training.zero_shot_card import LICENCE, write_card
from FreqSegLib.training.zero_shot_data import (
    FREQUENCIES,
    BranchSlices,
    Look,
    Pairs,
    cache_frequencies,
    choose,
    held_back_slices,
    make_pairs,
    question,
    read_branches,
    scaled_by_patient,
)

SET_ID = "lite-zero-shot"
SHIPPED, CONTROL = "ffbi", "raw heads"
PANELS = {"training loss": ("loss",), "validation": ("score", "dice ")}
# what each form is: changes of the configuration, and what stands in for the frequency branches
FORMS: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "lf": ({"branches": "low", "interaction": "none"}, FREQUENCIES),
    "hf": ({"branches": "high", "interaction": "none"}, FREQUENCIES),
    "lf+hf": ({"interaction": "none"}, FREQUENCIES),
    "heads": ({"interaction": "heads"}, FREQUENCIES),
    "ffbi": ({"interaction": "ffbi"}, FREQUENCIES),
    "efficient": ({"interaction": "efficient"}, FREQUENCIES),
    CONTROL: ({"interaction": "heads"}, ("raw", "raw")),
}


@dataclass(frozen=True)
class ZeroShotRecipe:
    """Everything that decides the shipped modules, with its defaults; the keys of a configuration file.

    Attributes:
        embeddings, pictures: caches of ``train-lite`` and ``train text-guided``; what is missing is computed.
        work: frequency embeddings, saliencies, checkpoints, logs and curves; a stopped run goes on from here.
        models: gets ``lite-zero-shot/`` and an entry in ``manifest.json``.
        seed: of the plan, the start and every batch.
        train_slices, validation_slices, test_slices: at most so many that show a target, a modality.
        train_patient, validation_patient, test_patient: at most so many of them a patient.
        look: bottleneck that asks all three branches; "nib" because M2IB would cost thrice as much again.
        fusion, fusion_training, fusion_loop: see there; every form is trained alike.
        bottleneck, bottleneck_training, bottleneck_loop: see there.
        least_gain: mean DSC that whole runs with the branches must gain for a target to have them on.
        tune_cases: validation patients a modality (at most) that go through the whole pipeline with and without.
        tune_slices: longer stacks are thinned out to so many of their slices for that.
    """

    embeddings: str = "build/lite/slices"
    pictures: str = "build/text_guided/pictures"
    work: str = "build/zero_shot"
    models: str = "Resources/Models"
    seed: int = 0
    train_slices: int = 36
    validation_slices: int = 24
    test_slices: int = 10
    train_patient: int = 4
    validation_patient: int = 3
    test_patient: int = 2
    look: Bottleneck = "nib"
    fusion: ZeroShotFusionConfig = field(default_factory=ZeroShotFusionConfig)
    fusion_training: FusionTraining = field(default_factory=FusionTraining)
    fusion_loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            steps=300, learning_rate=5e-3, warmup=20, weight_decay=0.1, validate_every=30, patience=4
        )
    )
    bottleneck: AmortisedConfig = field(default_factory=AmortisedConfig)
    bottleneck_training: BottleneckTraining = field(default_factory=BottleneckTraining)
    bottleneck_loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=900, warmup=30, validate_every=100, patience=4)
    )
    least_gain: float = 0.01
    tune_cases: int = 6
    tune_slices: int = 3


@dataclass(frozen=True)
class _Lite:
    """The frozen lite encoder and what it is tuned to."""

    tower: LiteMedSAM
    aligner: Aligner
    encoder: LiteEncoder
    text: MiniLM
    tuning: dict[str, Tuning]
    key: str

    def settings(self, target: str) -> TextSegmentationSettings:
        return preset("lite").complete(TextSegmentationSettings(), self.tuning.get(target, Tuning()))

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        return self.encoder.encode_text(list(prompts)).clone()


def train_zero_shot(
    data: Path,
    recipe: ZeroShotRecipe | None = None,
    report: Callable[[str], None] = print,
    *,
    test: bool = False,
) -> Path:
    """Train fusion and bottleneck, decide on validation patients where the branches are on, write weights and card.

    Args:
        data: folder with ``segmentation/`` and ``fusion/``.
        recipe: see :class:`ZeroShotRecipe`.
        report: where lines of progress go.
        test: measure on the test folders too, when all is chosen.

    Returns:
        The folder of the weights.

    Raises:
        SettingsError: the work folder holds a run of another recipe.
        InputError: there are no training images.
    """
    recipe = recipe or ZeroShotRecipe()
    work = Path(recipe.work)
    # where things lie does not matter to the result
    claim(work, replace(recipe, work="", models="", embeddings="", pictures=""))
    lite = _lite()
    slices = plan(data, recipe.seed)
    pictures = Path(recipe.pictures)
    chosen = {
        "train": choose(data, pictures, slices, "train", recipe.train_slices, recipe.train_patient),
        "validation": choose(data, pictures, slices, "validation", recipe.validation_slices, recipe.validation_patient),
    }
    looked = {split: _looked(data, recipe, lite, chosen[split], split, report) for split in ("train", "validation")}
    forms, runs = _train_forms(recipe, looked["train"], looked["validation"], report)
    bottleneck, bottleneck_run = _train_bottleneck(recipe, lite, looked["train"][0], looked["validation"][0], report)
    folder = Path(recipe.models) / SET_ID
    folder.mkdir(parents=True, exist_ok=True)
    forms[SHIPPED].model.save(folder / "fusion.safetensors", {"licence": LICENCE})
    bottleneck.save(folder / "bottleneck.safetensors", {"licence": LICENCE})
    # what is shipped is half precision, so everything below is measured on that
    forms[SHIPPED].model = ZeroShotFusion.load(folder / "fusion.safetensors")
    bottleneck = AmortisedBottleneck.load(folder / "bottleneck.safetensors")
    cuts = {"none": best_thresholds(looked["train"][1].maps[:, :1], looked["train"][1])}
    cuts |= {name: best_thresholds(phase.maps(*looked["train"]), looked["train"][1]) for name, phase in forms.items()}
    found = {"validation": _scores(forms, cuts, looked["validation"])}
    started = time.monotonic()
    better = _better(found["validation"], "none")
    report(f"slices say that the shipped form helps for: {', '.join(better) or 'no target'}")
    pipeline = _through_the_pipeline(data, recipe, lite, forms[SHIPPED].model, cuts[SHIPPED], better, report)
    gained = [name for name, values in pipeline.items() if values["on"] - values["off"] >= recipe.least_gain]
    # what heads trained on the raw image's own tokens do as well is not the frequency branches' doing
    on = [name for name in _better(found["validation"], CONTROL) if name in gained]
    pipeline_seconds = time.monotonic() - started
    report(f"the frequency branches are on by default for: {', '.join(on) or 'no target'}")
    tuning = {name: asdict(Tuning(_settings(recipe, cut, name in on))) for name, cut in cuts[SHIPPED].items()}
    write_text(folder / PRESET_FILE, json.dumps({"tuning": tuning}, indent=1) + "\n")
    amortised = {"validation": _bottleneck_scores(bottleneck, lite, looked["train"], looked["validation"])}
    if test:
        held_back = choose(
            data,
            work / "pictures",
            held_back_slices(data, recipe.test_patient),
            "test",
            recipe.test_slices,
            recipe.test_patient,
        )
        chosen["test"] = held_back
        looked["test"] = _looked(data, recipe, lite, held_back, "test", report)
        found["test"] = _scores(forms, cuts, looked["test"])
        amortised["test"] = _bottleneck_scores(bottleneck, lite, looked["train"], looked["test"])
    frequencies = [
        seconds_and_bytes(work / "frequencies" / b, chosen["train"] + chosen["validation"]) for b in FREQUENCIES
    ]
    results: dict[str, Any] = {
        "recipe": asdict(recipe),
        "slices": {split: len(items) for split, items in chosen.items()},
        "pairs": {split: len(pairs.rows) for split, (_, pairs) in looked.items()},
        "patients": {split: len({item.group for item in items}) for split, items in chosen.items()},
        "parameters": {
            "fusion": sum(p.numel() for p in forms[SHIPPED].model.parameters()),
            "bottleneck": sum(p.numel() for p in bottleneck.parameters()),
        },
        "runs": runs,
        "bottleneck_run": bottleneck_run,
        "cuts": cuts,
        "scores": found,
        "compared": {
            split: {form: _described(_compared(found[split], form, "none")) for form in FORMS} for split in found
        },
        "ffbi_against_heads": {split: _described(_compared(found[split], SHIPPED, "heads")) for split in found},
        "ffbi_against_raw_heads": {split: _described(_compared(found[split], SHIPPED, CONTROL)) for split in found},
        "pipeline": pipeline,
        "on": on,
        "amortised": amortised,
        "seconds": {
            "frequencies": sum(s for s, _ in frequencies),
            "saliency": looked["train"][1].seconds + looked["validation"][1].seconds,
            "fusion": sum(run["seconds"] for run in runs.values()),
            "shipped fusion": runs[SHIPPED]["seconds"],
            "bottleneck": bottleneck_run["seconds"],
            "pipeline": pipeline_seconds,
        },
        "cache_bytes": sum(size for _, size in frequencies),
        "threads": torch.get_num_threads(),
    }
    write_text(work / "results.json", json.dumps(results, indent=1))
    write_card(folder / "README.md", results)
    weights.record_shipped(SET_ID, recipe.models)
    return folder


def _lite() -> _Lite:
    tower = LiteMedSAM.from_checkpoint(weights.require("litemedsam") / "lite_medsam.pth")
    text = MiniLM(weights.require("minilm"))
    folder = weights.require("lite-aligner")
    aligner = Aligner.load(folder / "aligner.safetensors")
    key = file_digest(folder / "aligner.safetensors")[:16]
    return _Lite(tower, aligner, LiteEncoder(tower, aligner, text), text, read_tuning(folder), key)


def _looked(
    data: Path,
    recipe: ZeroShotRecipe,
    lite: _Lite,
    slices: list[TrainingSlice],
    split: str,
    report: Callable[[str], None],
) -> tuple[BranchSlices, Pairs]:
    """Slices through the frozen encoder and the bottleneck, from caches where they are filled."""

    def told(done: int, total: int) -> None:
        if done % 50 == 0 or done == total:
            report(f"embeddings of {split} slices {done}/{total}")

    work, layer = Path(recipe.work), recipe.fusion.layer_idx
    raw = work / "raw" if split == "test" else Path(recipe.embeddings)
    pictures = work / "pictures" if split == "test" else Path(recipe.pictures)
    if not all(cache_file(raw, item).exists() for item in slices):
        cache(data, raw, lite.tower.embed, slices, told)
    waves = replace(
        lite.settings(""), wave=recipe.fusion.wave, levels=recipe.fusion.levels, wavelet_mode=recipe.fusion.wavelet_mode
    )
    if not all(cache_file(work / "frequencies" / b, item).exists() for b in FREQUENCIES for item in slices):
        cache_frequencies(data, work / "frequencies", lite.tower.embed, slices, waves, told)
    found = read_branches(lite.aligner, layer, slices, raw, work / "frequencies", pictures)
    looks = []
    for meaning in targets():
        settings = replace(lite.settings(meaning.name), layer_idx=layer, bottleneck=recipe.look)
        looks.append(Look(settings, question(meaning.name, settings, lite.encode_text)))
    pairs = make_pairs(found, looks, _suffix(lite, layer), work / "saliency", lite.key, report)
    return found, pairs


def _suffix(lite: _Lite, layer: int) -> Callable[[Tensor], Tensor]:
    return lambda z: lite.aligner.suffix(z, layer)


def _train_forms(
    recipe: ZeroShotRecipe,
    lesson: tuple[BranchSlices, Pairs],
    check: tuple[BranchSlices, Pairs],
    report: Callable[[str], None],
) -> tuple[dict[str, FusionPhase], dict[str, dict[str, float]]]:
    """Every form, trained alike from one seed; the best validated step of each."""
    phases, runs = {}, {}
    for name, (changes, branches) in FORMS.items():
        torch.manual_seed(recipe.seed)
        model = ZeroShotFusion(replace(recipe.fusion, **changes))
        if name == CONTROL:
            # a raw map minus itself is 0: behind a closed gate nothing would ever get a gradient
            nn.init.constant_(model.fusion.gate, 0.1)
        phase = FusionPhase(model, lesson, check, recipe.fusion_training, recipe.seed, branches)
        runs[name] = _fit(model, phase.batch_loss, phase.validate, recipe, name, recipe.fusion_loop, report)
        phases[name] = phase
    return phases, runs


def _train_bottleneck(
    recipe: ZeroShotRecipe, lite: _Lite, lesson: BranchSlices, check: BranchSlices, report: Callable[[str], None]
) -> tuple[AmortisedBottleneck, dict[str, float]]:
    layer = recipe.bottleneck.layer_idx
    torch.manual_seed(recipe.seed)
    model = AmortisedBottleneck(recipe.bottleneck)
    phase = BottleneckPhase(
        model, lesson, check, _questions(lite), _suffix(lite, layer), recipe.bottleneck_training, recipe.seed
    )
    loop = recipe.bottleneck_loop
    return model, _fit(model, phase.batch_loss, phase.validate, recipe, "bottleneck", loop, report)


def _fit(
    model: nn.Module,
    batch_loss: Callable[[int], Tensor],
    validate: Callable[[], dict[str, float]],
    recipe: ZeroShotRecipe,
    name: str,
    loop: LoopConfig,
    report: Callable[[str], None],
) -> dict[str, float]:
    folder = Path(recipe.work) / "run" / name.replace(" ", "-")

    def row(values: dict[str, float]) -> None:
        report(f"{name}: " + "  ".join(f"{key} {value:.4g}" for key, value in values.items()))
        draw_curves(folder / "log.csv", folder / "curves.png", PANELS)

    return fit(model, batch_loss, validate, folder, replace(loop, seed=recipe.seed), row)


def _questions(lite: _Lite) -> dict[str, Tensor]:
    """Every trained wording of every target, plain and apart from its contrasts, by modality."""
    found: dict[str, list[Tensor]] = {}
    for meaning in targets():
        for text in lite.encode_text(meaning.wordings):
            found.setdefault(meaning.modality, []).append(text)
            found[meaning.modality].append(apart_from_contrasts(text, meaning, lite.encode_text))
    return {modality: torch.stack(texts) for modality, texts in found.items()}


Scores = dict[str, dict[str, float]]


def _scores(
    forms: Mapping[str, FusionPhase], cuts: Mapping[str, Mapping[str, float]], looked: tuple[BranchSlices, Pairs]
) -> dict[str, Scores]:
    """Dice by form, target and patient, each form cut where the training patients' Dice is best."""
    found = {"none": patient_dice(looked[1].maps[:, :1], looked[1], cuts["none"])}
    return found | {name: patient_dice(phase.maps(*looked), looked[1], cuts[name]) for name, phase in forms.items()}


def _compared(scores: Mapping[str, Scores], form: str, against: str) -> dict[str, PairedTest]:
    return {
        name: paired_test(list(values.values()), list(scores[against][name].values()))
        for name, values in scores[form].items()
    }


def _better(scores: Mapping[str, Scores], against: str) -> list[str]:
    """Targets for which the shipped form is better than another, beyond the interval of the mean over patients."""
    return [name for name, test in _compared(scores, SHIPPED, against).items() if test.difference.low > 0]


def _described(tests: Mapping[str, PairedTest]) -> dict[str, dict[str, float]]:
    return {
        name: {"mean": t.difference.mean, "low": t.difference.low, "high": t.difference.high, "p": t.p}
        for name, t in tests.items()
    }


def _settings(recipe: ZeroShotRecipe, cut: float, on: bool) -> dict[str, Any]:
    return {
        "bottleneck": recipe.look,
        "frequency_branches": "on" if on else "off",
        "threshold": "fixed",
        "threshold_value": cut,
        # the cut was chosen with every part kept
        "confidence_threshold": 0.0,
        "num_contours": 0,
    }


def _through_the_pipeline(
    data: Path,
    recipe: ZeroShotRecipe,
    lite: _Lite,
    fusion: ZeroShotFusion,
    cuts: Mapping[str, float],
    wanted: Sequence[str],
    report: Callable[[str], None],
) -> dict[str, dict[str, float]]:
    """Mean DSC of whole runs on validation patients, gate and decoder included, branches off and on, by target."""
    modalities = [meaning.modality for meaning in targets() if meaning.name in wanted]
    if not wanted:
        return {}
    cases = list_cases(data, "train-validation", modalities=modalities, most_slices=recipe.tune_slices)
    found: dict[str, dict[str, list[float]]] = {name: {"off": [], "on": []} for name in wanted}
    with TemporaryDirectory(dir=recipe.work) as temporary:
        segmenter = TextSegmenter(
            lite.encoder,
            lite.tower,
            preset("lite"),
            weights_key="choosing",
            tuning=lite.tuning,
            matcher=PromptMatcher(lite.text),
            fusion=fusion,
            branch_tuning={name: Tuning(_settings(recipe, cut, False)) for name, cut in cuts.items()},
            cache=EmbeddingCache(Path(temporary), gigabytes=12.0),
        )
        for case in chosen_cases(cases, recipe.tune_cases):
            _run_case(segmenter, case, found)
            report(f"with and without the branches: {case.group}")
    return {
        name: {
            "off": float(np.mean(values["off"])),
            "on": float(np.mean(values["on"])),
            "cases": len(values["on"]),
            "p": paired_test(values["on"], values["off"]).p,
        }
        for name, values in found.items()
        if values["on"]
    }


def _run_case(segmenter: TextSegmenter, case: Case, found: dict[str, dict[str, list[float]]]) -> None:
    labelled = case.read()
    asked = [meaning.name for meaning in targets() if meaning.modality == case.modality and meaning.name in found]
    truths = {name: labelled.truth(name) for name in asked}
    names = [name for name, truth in truths.items() if truth.any()]
    if not names:
        return
    segmenter.set_volume(labelled.volume)
    ways: tuple[Branches, ...] = ("off", "on")
    for way in ways:
        settings = TextSegmentationSettings(method="zero-shot", frequency_branches=way)
        for name in names:
            found[name][way].append(dice(segmenter.segment([name], settings=settings)[0].mask, truths[name]))


def _bottleneck_scores(
    model: AmortisedBottleneck,
    lite: _Lite,
    lesson: tuple[BranchSlices, Pairs],
    check: tuple[BranchSlices, Pairs],
) -> dict[str, dict[str, float]]:
    """Dice of the raw map by the amortised bottleneck and by the recipe's, and how alike both rank the tokens."""
    other = patient_dice(check[1].maps[:, :1], check[1], best_thresholds(lesson[1].maps[:, :1], lesson[1]))
    maps = [_amortised_maps(model, lite, *split) for split in (lesson, check)]
    own = patient_dice(maps[1], check[1], best_thresholds(maps[0], lesson[1]))
    found = {}
    for target, meaning in enumerate(targets()):
        if meaning.name not in own:
            continue
        rows = check[1].of(target)
        test_ = paired_test(list(own[meaning.name].values()), list(other[meaning.name].values()))
        found[meaning.name] = {
            "amortised": float(np.mean(list(own[meaning.name].values()))),
            "other": float(np.mean(list(other[meaning.name].values()))),
            "difference_low": test_.difference.low,
            "difference_high": test_.difference.high,
            "rank_correlation": _rank_correlation(maps[1][rows], check[1].maps[rows, :1]),
        }
    return {**found, "score": {"amortised": score(own), "other": score(other)}}


@torch.inference_mode()
def _amortised_maps(model: AmortisedBottleneck, lite: _Lite, data: BranchSlices, pairs: Pairs) -> Tensor:
    found = torch.zeros_like(pairs.maps[:, :1])
    for target, meaning in enumerate(targets()):
        rows = pairs.of(target)
        if not len(rows):
            continue
        settings = lite.settings(meaning.name)
        text = question(meaning.name, settings, lite.encode_text)
        tokens = data.tokens["raw"][pairs.rows[rows]].float()
        assert settings.beta is not None
        values = amortised_information(model, tokens, text.expand(len(rows), -1), settings.beta)
        maps = values.view(len(rows), 1, *found.shape[2:])
        found[rows] = scaled_by_patient(maps, [pairs.patients[row] for row in rows])
    return found


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    """Mean Spearman correlation over items."""
    from scipy.stats import spearmanr

    pairs = zip(a.flatten(1).numpy(), b.flatten(1).numpy(), strict=True)
    found = [float(spearmanr(x, y).statistic) for x, y in pairs]
    return float(np.nanmean(found))
