"""From the images to the shipped lite aligner: cache, train, calibrate the gate, write weights and their card."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from FreqSegLib import weights
from FreqSegLib.clip.aligner import Aligner
from FreqSegLib.clip.lite_encoder import LiteEncoder
from FreqSegLib.clip.mini_lm import MiniLM
from FreqSegLib.clip.questions import null_prompts
from FreqSegLib.clip.vocabulary import Meaning, targets
from FreqSegLib.embedding_cache import EmbeddingCache
from FreqSegLib.evaluation.cases import chosen_cases, list_cases
from FreqSegLib.presets import Tuning, preset
from FreqSegLib.saliency.gate import margins
from FreqSegLib.sam.lite_medsam import LiteMedSAM
from FreqSegLib.text_segmentation import TextSegmenter
from FreqSegLib.training.contrastive import FALSE, TRUE, ContrastiveConfig, PhaseOne, statements, truth_table
from FreqSegLib.training.lite_card import LICENCE, write_card
from FreqSegLib.training.lite_data import CachedSlices, cache, plan, read_cache, seconds_and_bytes
from FreqSegLib.training.lite_tuning import tune
from FreqSegLib.training.loop import LoopConfig, fit

LARGEST_SLOPE = 60.0


@dataclass(frozen=True)
class GateReport:
    """How the calibrated gate does on validation slices.

    Attributes:
        slope, offset, slice_threshold: of ``presets.Tuning``.
        sensitivity: share of slices with the target that pass.
        specificity: share of slices of the same modality without it that stay empty; NaN where there are none.
        specificity_others: the same for slices of other modalities.
        present, absent, others: how many slices each number rests on.
    """

    slope: float
    offset: float
    slice_threshold: float
    sensitivity: float
    specificity: float
    specificity_others: float
    present: int
    absent: int
    others: int


def sentence_vectors(text: MiniLM) -> dict[str, Tensor]:
    """MiniLM's vector of every wording of every statement."""
    wordings = sorted({w for s in statements() for w in (*s.wordings, *s.held_out)})
    return dict(zip(wordings, text.encode(wordings).clone(), strict=True))


@torch.inference_mode()
def image_vectors(model: Aligner, data: CachedSlices, rows: Sequence[int]) -> Tensor:
    """(len(rows), 384) unit vectors of whole slices."""
    found = []
    for start in range(0, len(rows), 64):
        chosen = list(rows[start : start + 64])
        found.append(model(torch.from_numpy(data.embeddings[chosen]).float()))
    return torch.cat(found)


def calibrate(
    model: Aligner, data: CachedSlices, rows: Sequence[int], encode_text: Callable[[Sequence[str]], Tensor]
) -> dict[str, GateReport]:
    """Fit the gate's logistic curve and threshold for every target on the slices ``rows``."""
    rows = list(rows)
    images = image_vectors(model, data, rows)
    total = torch.from_numpy(data.coverage[rows]).float().sum((2, 3)) / 4
    modality = [data.slices[i].modality for i in rows]
    table = truth_table(modality, total, total)
    names = [s.name for s in statements()]
    reports = {}
    for meaning in targets():
        truth = table[:, names.index(meaning.name)]
        margin = _margin(meaning, images, encode_text)
        same = torch.tensor([m == meaning.modality for m in modality])
        present, absent, others = truth == TRUE, (truth == FALSE) & same, (truth == FALSE) & ~same
        reports[meaning.name] = _gate(margin, present, absent, others)
    return reports


def _margin(meaning: Meaning, images: Tensor, encode_text: Callable[[Sequence[str]], Tensor]) -> Tensor:
    """Mean margin over the trained wordings, so that no single one decides."""
    nulls = encode_text(null_prompts(meaning))
    texts = encode_text(meaning.wordings)
    return torch.stack([margins(images, text, nulls) for text in texts]).mean(0)


def _gate(margin: Tensor, present: Tensor, absent: Tensor, others: Tensor) -> GateReport:
    """Logistic fit with equal weight for presence, absence and (less) other modalities; threshold by Youden's index."""
    weight = torch.zeros_like(margin)
    for group, importance in ((present, 1.0), (absent, 0.7), (others, 0.3)):
        if group.any():
            weight[group] = importance / group.sum()
    known = weight > 0
    x, y, w = margin[known].double(), present[known].double(), weight[known].double()
    parameters = torch.tensor([10.0, float(x.mean())], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([parameters], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        logits = parameters[0] * (x - parameters[1])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, weight=w, reduction="sum")
        loss = loss + 1e-4 * parameters[0] ** 2
        loss.backward()
        return loss

    optimiser.step(closure)
    slope, offset = float(parameters[0].detach().clamp(1.0, LARGEST_SLOPE)), float(parameters[1].detach())
    probability = torch.sigmoid(slope * (x - offset))
    candidates = torch.cat([probability.unique(), torch.tensor([0.5])])
    candidates = (candidates[:-1] + candidates[1:]) / 2 if len(candidates) > 2 else candidates
    gain = [float((w * torch.where(y > 0, 1.0, -1.0))[probability >= c].sum()) for c in candidates]
    best = max(gain)
    # the middle of the thresholds that are as good as the best one
    threshold = float(torch.stack([c for c, g in zip(candidates, gain, strict=True) if g >= best - 1e-9]).median())
    passed = torch.sigmoid(slope * (margin.double() - offset)) >= threshold

    def share(group: Tensor, value: bool) -> float:
        return float((passed[group] == value).double().mean()) if group.any() else float("nan")

    return GateReport(
        slope,
        offset,
        threshold,
        share(present, True),
        share(absent, False),
        share(others, False),
        int(present.sum()),
        int(absent.sum()),
        int(others.sum()),
    )


@torch.inference_mode()
def held_out_accuracy(phase: PhaseOne, encode_text: Callable[[Sequence[str]], Tensor]) -> dict[str, float]:
    """Accuracy among distinct meanings on validation patients, with trained and with held-out wordings.

    A whole slice is right when the statement that fits best is true of it. "absence apart": only target statements and
    modalities compete, and only slices that show a target count.
    """
    data, rows = phase.data, list(phase.validation_rows)
    images = image_vectors(phase.model, data, rows)
    total = torch.from_numpy(data.coverage[rows]).float().sum((2, 3)) / 4
    table = truth_table([data.slices[i].modality for i in rows], total, total)
    said = statements()
    results = {}
    for kind in ("trained", "held_out"):
        wordings = [s.wordings[0] if kind == "trained" or not s.held_out else s.held_out[0] for s in said]
        scores = images @ encode_text(wordings).T
        results[f"accuracy_{kind}_wordings"] = _accuracy(scores, table)
        meanings = torch.tensor([s.channels is None or bool(s.channels) for s in said])
        targets_only = torch.tensor([bool(s.channels) for s in said])
        shows = (table[:, targets_only] == TRUE).any(1)
        results[f"accuracy_{kind}_wordings_absence_apart"] = _accuracy(
            scores[shows][:, meanings], table[shows][:, meanings]
        )
    return results


def _accuracy(scores: Tensor, table: Tensor) -> float:
    best = scores.masked_fill(table == 0, -torch.inf).argmax(1)
    return float((table.gather(1, best[:, None]) == TRUE).float().mean())


def write_preset_file(folder: Path, reports: dict[str, GateReport], settings: dict[str, dict[str, object]]) -> Path:
    """``preset.json`` beside the weights: tuned settings and the gate's calibration, by meaning."""
    tuning = {name: asdict(_tuning(report, settings.get(name, {}))) for name, report in reports.items()}
    path = folder / "preset.json"
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps({"tuning": tuning}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def _tuning(report: GateReport, settings: dict[str, object] | None = None) -> Tuning:
    """As it is written: rounded."""
    threshold = round(report.slice_threshold, 4)
    return Tuning(settings or {}, round(report.slope, 4), round(report.offset, 5), threshold, threshold)


@dataclass(frozen=True)
class LiteRecipe:
    """Everything that decides the shipped aligner, with its defaults.

    Attributes:
        seed: of the plan, the start and every batch.
        loop, contrastive: see there.
        tune_cases: validation patients a modality (at most) that choose their targets' settings.
        tune_slices: longer stacks are thinned out to so many of their slices for that.
    """

    seed: int = 0
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=400, validate_every=40, patience=6))
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    tune_cases: int = 8
    tune_slices: int = 10


def train_lite(
    data: Path,
    work: Path,
    models: Path,
    recipe: LiteRecipe | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Cache the embeddings, train, calibrate and tune on validation patients, write weights, settings and card.

    Args:
        data: folder with ``segmentation/`` and ``fusion/``.
        work: cache, checkpoints and log; a stopped run goes on from here.
        models: gets ``lite-aligner/`` and an entry in ``manifest.json``.
        recipe: see :class:`LiteRecipe`.
        report: where lines of progress go.

    Returns:
        The folder of the weights.
    """
    recipe = recipe or LiteRecipe()
    slices = plan(data, recipe.seed)
    tower = LiteMedSAM.from_checkpoint(weights.require("litemedsam") / "lite_medsam.pth")
    text = MiniLM(weights.require("minilm"))

    def told(done: int, total: int) -> None:
        if done % 50 == 0 or done == total:
            report(f"embeddings {done}/{total}")

    cache(data, work / "slices", tower.embed, slices, told)
    cached = read_cache(work / "slices", slices)
    torch.manual_seed(recipe.seed)
    model = Aligner()
    phase = PhaseOne(model, cached, sentence_vectors(text), recipe.contrastive, recipe.seed)

    def row(values: dict[str, float]) -> None:
        report("  ".join(f"{key} {value:.4g}" for key, value in values.items()))

    best = fit(model, phase.batch_loss, phase.validate, work / "run", recipe.loop, row)
    started = time.monotonic()
    folder = models / "lite-aligner"
    folder.mkdir(parents=True, exist_ok=True)
    model.save(folder / "aligner.safetensors", {"licence": LICENCE})
    # what is shipped is half precision, so everything below is measured on that
    model = phase.model = Aligner.load(folder / "aligner.safetensors")

    @torch.no_grad()
    def encode_text(prompts: Sequence[str]) -> Tensor:
        return model.align_text(text.encode(list(prompts)))

    rows = list(phase.validation_rows)
    reports = calibrate(model, cached, rows, encode_text)
    accuracy = held_out_accuracy(phase, encode_text)
    cases = chosen_cases(list_cases(data, "train-validation", most_slices=recipe.tune_slices), recipe.tune_cases)
    with TemporaryDirectory(dir=work) as temporary:
        segmenter = TextSegmenter(
            LiteEncoder(tower, model, text),
            tower,
            preset("lite"),
            weights_key="tuning",
            tuning={name: _tuning(value) for name, value in reports.items()},
            cache=EmbeddingCache(Path(temporary)),
        )
        chosen = tune(segmenter, cases, report)
    write_preset_file(folder, reports, {name: result.settings for name, result in chosen.items()})
    seconds, size = seconds_and_bytes(work / "slices", slices)
    results = {
        "recipe": asdict(recipe),
        "slices": {split: len(cached.subset(split)) for split in ("train", "validation")},
        "parameters": sum(p.numel() for p in model.parameters()),
        "best": best,
        "accuracy": accuracy,
        "gate": {name: asdict(value) for name, value in reports.items()},
        "tuning": {name: asdict(value) for name, value in chosen.items()},
        "seconds": {
            "cache": seconds,
            "train": best["seconds"],
            "calibrate and tune": time.monotonic() - started,
        },
        "cache_bytes": size,
        "threads": torch.get_num_threads(),
    }
    (work / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    write_card(folder / "README.md", results)
    weights.record_shipped("lite-aligner", models)
    return folder
