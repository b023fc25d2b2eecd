# ruff: noqa: E501
"""The card of the zero-shot path's own modules, written from what the run measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from FreqSegLib.clip.vocabulary import targets
from FreqSegLib.training.work_folder import write_text

LICENCE = "research, non-commercial: trained on CC BY-NC-SA (LGG) and CC BY-SA (hippocampus) images, among others"
# Dice in per cent that the seed claims without and with its frequency path
CLAIMED = {"breast lesion": (77.76, 80.38), "brain tumour": (76.52, 79.15), "lungs": (75.79, 77.85)}
_ROWS = {
    "none": "none: the raw image's saliency",
    "lf": "LF",
    "hf": "HF",
    "lf+hf": "LF + HF, adaptive fusion",
    "heads": "LF + HF + heads, no exchange (control)",
    "efficient": "LF + HF + EfficientFFBI",
    "ffbi": "**LF + HF + FFBI (shipped)**",
    "raw heads": "heads on the raw image's own tokens, no frequency image (control)",
}


def write_card(path: Path, results: dict[str, Any]) -> None:
    """Write the card as Markdown, atomically.

    Args:
        path: the card.
        results: what ``zero_shot_recipe.train_zero_shot`` gathered.
    """
    write_text(path, _card(results))


def _card(r: dict[str, Any]) -> str:
    recipe, seconds, slices, patients = r["recipe"], r["seconds"], r["slices"], r["patients"]
    loop, bottleneck = recipe["fusion_loop"], recipe["bottleneck"]
    run, best = r["runs"]["ffbi"], r["bottleneck_run"]
    on = r["on"]
    said = (
        f"On by default for {', '.join(on)}; off for the other targets, where they did not pass."
        if on
        else "They passed for no target, so they are **off by default** everywhere; `--frequency-branches on` computes them."
    )
    splits = [s for s in ("validation", "test") if s in r["scores"]]
    tables = "\n\n".join(
        f"{'Validation' if s == 'validation' else 'Test'}: {slices[s]} slices of {patients[s]} patients or images.\n\n{_table(r['scores'][s])}"
        for s in splits
    )
    changes = _changes(r, "validation")
    amortised = "\n\n".join(
        f"{'Validation' if s == 'validation' else 'Test'}:\n\n{_bottleneck(r['amortised'][s], recipe['look'])}"
        for s in splits
    )
    test = (
        f"Test slices ({slices['test']}: the first patients of each test folder by name, the middles of what is marked) are measured when all is chosen."
        if "test" in slices
        else "Test folders were not touched."
    )
    return f"""# lite-zero-shot

The zero-shot path's own trained modules for the lite preset: `fusion.safetensors`, FFBI with a 1×1 head a branch and the
adaptive fusion of the low- and high-frequency saliency ({r["parameters"]["fusion"] / 1e3:.0f} k parameters), and
`bottleneck.safetensors`, the amortised bottleneck ({r["parameters"]["bottleneck"] / 1e3:.0f} k). Half precision. For research, not for diagnosis.

- **Licence**: {LICENCE}. LiteMedSAM and MiniLM themselves are Apache-2.0 and are not in these files.
- **Not quite zero-shot**: the fusion was trained on masks of the preset's eight targets. For anything else, and for other
  layers, wavelets or fusion methods than its own, the raw saliency is taken as it is, and the run says so. The amortised
  bottleneck saw no mask. `--method auto` still takes the trained method (`lite-text-guided`) for the eight targets.
- **Data**: {slices["train"]} training and {slices["validation"]} validation slices that show a target ({patients["train"]} and {patients["validation"]} patients or images; {r["pairs"]["train"]} and
  {r["pairs"]["validation"]} pairs of slice and target): LGG FLAIR MR, Shenzhen chest X-rays, BUSI breast ultrasound, Decathlon
  hippocampus T1 MR. Split by patient (X-ray: by image; ultrasound: by group of near-duplicate images). {test}
- **LiteMedSAM's own training set may hold some of these images**: its embeddings may have seen validation and test images.
- **Recipe, fusion**: frozen tower and aligner; saliency of the three branches by {recipe["look"].upper()}, asked as each target
  is tuned (see the aligner's card), scaled over a patient's slices; {recipe["fusion_training"]["dice_weight"]} Dice + {recipe["fusion_training"]["bce_weight"]} BCE on probabilities; AdamW {loop["learning_rate"]}, cosine, batches of
  {recipe["fusion_training"]["batch_size"]} pairs, every target as often; at most {loop["steps"]} steps, stopped after {loop["patience"]} validations without gain; best validation Dice at step
  {int(run["step"])} (training loss there {run["loss"]:.3f}); seed {recipe["seed"]}.
- **Recipe, bottleneck**: M2IB's own objective, beta · KL - cos, through the aligner's frozen suffix, beta drawn from
  {bottleneck["least_beta"]} to {bottleneck["most_beta"]}, tokens of all three branches, every trained wording, plain and apart from its contrasts; best
  validation loss {best["objective"]:.4f} at step {int(best["step"])}; seed {recipe["seed"]}.
- **Command**: `freqseg train zero-shot{" --test" if "test" in slices else ""}` (images at `../shared/data` or `FREQSEG_DATA`).
- **Time and disk**: frequency embeddings {seconds["frequencies"] / 60:.0f} min once ({r["cache_bytes"] / 1e9:.2f} GB), saliencies {seconds["saliency"] / 60:.0f} min, the shipped fusion
  {seconds["shipped fusion"] / 60:.0f} min (all {len(r["runs"])} forms of the table {seconds["fusion"] / 60:.0f} min), bottleneck {seconds["bottleneck"] / 60:.0f} min, whole runs on validation patients
  {seconds["pipeline"] / 60:.0f} min, wall clock, on {r["threads"]} CPU thread of a machine shared with other training; no GPU.

## What each frequency branch adds

Mean Dice of the coarse map a patient (or image), on slices that show the target: map enlarged to 128², cut at one threshold a
target that is best on the *training* patients for that row, no gate, no components dropped, no decoder. Every row below the
first was trained alike; what is trained on masks sees masks, so the control rows matter: heads on the raw image's own tokens
use no frequency image at all (their fusion gate starts at 0.1, since a raw map minus itself would leave a closed one closed).

{tables}

Validation, mean difference with the 95 % bootstrap interval over patients (* where it excludes 0):

{changes}

Beside what the seed claims for its frequency path (points of Dice, in per cent; other encoder, other images, decoder included):

{_claims(r["scores"])}

## Where the branches are on

Rule: on validation slices the shipped row is better than `none` and than the control without frequency images, both beyond
the interval, and whole runs (gate and decoder
included; at most {recipe["tune_cases"]} patients a modality, stacks thinned out to {recipe["tune_slices"]} slices) on validation patients gain at least {recipe["least_gain"]:.2f} DSC over the
raw image with the target's own settings. {said} A slice then takes three passes of the tower instead of one.

{_pipeline(r)}

## The amortised bottleneck

`--bottleneck amortised`: one pass in place of M2IB's optimisation or NIB's path; never chosen by default. Dice as above, of the raw
image's map alone, beside {recipe["look"].upper()}'s on the same slices, and the mean rank correlation of both maps.

{amortised}
"""


def _names(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    return [meaning.name for meaning in targets() if meaning.name in scores["none"]]


def _table(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    names = _names(scores)
    rows = [f"| frequency branches | {' | '.join(names)} | mean |", f"| --- |{' --- |' * (len(names) + 1)}"]
    for form, title in _ROWS.items():
        values = [_mean(scores[form][name]) for name in names]
        rows.append(f"| {title} | {' | '.join(f'{v:.3f}' for v in values)} | {np.mean(values):.3f} |")
    return "\n".join(rows)


def _changes(r: Mapping[str, Any], split: str) -> str:
    names = _names(r["scores"][split])
    rows = [f"| against `none` | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    compared = {_ROWS[form]: r["compared"][split][form] for form in _ROWS if form != "none"}
    compared["shipped against heads without exchange"] = r["ffbi_against_heads"][split]
    compared["shipped against heads on raw tokens"] = r["ffbi_against_raw_heads"][split]
    rows += [
        f"| {title} | {' | '.join(_change(values[name]) for name in names)} |" for title, values in compared.items()
    ]
    return "\n".join(rows)


def _claims(scores: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> str:
    names = [name for name in CLAIMED if name in scores["validation"]["none"]]
    rows = [f"| | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    claims = [
        f"{CLAIMED[name][0]:.2f} -> {CLAIMED[name][1]:.2f} ({CLAIMED[name][1] - CLAIMED[name][0]:+.2f})"
        for name in names
    ]
    rows.append(f"| claimed (chest X-ray for lungs) | {' | '.join(claims)} |")
    for split, found in scores.items():
        for form in ("lf", "hf", "lf+hf", "ffbi"):
            gains = [100 * (_mean(found[form][name]) - _mean(found["none"][name])) for name in names]
            rows.append(f"| {_ROWS[form]}, {split} | {' | '.join(f'{gain:+.2f}' for gain in gains)} |")
    rows.append("")
    rows.append("Claimed besides: lung CT 80.38 -> 83.20, mean +2.54. Lung CT: no data here, not measured.")
    return "\n".join(rows)


def _mean(values: Mapping[str, float]) -> float:
    return float(np.mean(list(values.values())))


def _change(test: Mapping[str, float]) -> str:
    star = "*" if test["low"] > 0 or test["high"] < 0 else ""
    return f"{test['mean']:+.3f}{star} ({test['low']:+.3f} to {test['high']:+.3f})"


def _pipeline(r: Mapping[str, Any]) -> str:
    if not r["pipeline"]:
        return "No target was better than `none` beyond the interval."
    rows = ["| target | patients | DSC off | DSC on | p | default |", "| --- | --- | --- | --- | --- | --- |"]
    rows += [
        f"| {name} | {v['cases']} | {v['off']:.3f} | {v['on']:.3f} | {v['p']:.3f} | {'on' if name in r['on'] else 'off'} |"
        for name, v in r["pipeline"].items()
    ]
    return "\n".join(rows)


def _bottleneck(found: Mapping[str, Mapping[str, float]], look: str) -> str:
    rows = [
        f"| target | {look.upper()} | amortised | difference | rank correlation |",
        "| --- | --- | --- | --- | --- |",
    ]
    rows += [
        f"| {name} | {v['other']:.3f} | {v['amortised']:.3f} "
        f"| {v['amortised'] - v['other']:+.3f} ({v['difference_low']:+.3f} to {v['difference_high']:+.3f}) | {v['rank_correlation']:.2f} |"
        for name, v in found.items()
        if name != "score"
    ]
    return "\n".join(rows)
