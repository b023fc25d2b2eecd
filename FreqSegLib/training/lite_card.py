# ruff: noqa: E501
"""The lite aligner's model card, written from what the run measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LICENCE = "research, non-commercial: trained on CC BY-NC-SA (LGG) and CC BY-SA (hippocampus) images, among others"


def write_card(path: Path, results: dict[str, Any]) -> None:
    """Write the card as Markdown, atomically.

    Args:
        path: the card.
        results: what ``lite_recipe.train_lite`` gathered.
    """
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(_card(results), encoding="utf-8")
    temporary.replace(path)


def _card(r: dict[str, Any]) -> str:
    seconds, accuracy, recipe = r["seconds"], r["accuracy"], r["recipe"]
    gate = "\n".join(
        f"| {name} | {g['present']} | {g['sensitivity']:.3f} | {g['absent']} | {_share(g['specificity'])} | {g['others']} "
        f"| {_share(g['specificity_others'])} |"
        for name, g in r["gate"].items()
    )
    tuning = "\n".join(
        f"| {name} | {t['cases']} | {', '.join(f'{k} {v}' for k, v in t['settings'].items())} | {t['coarse_dsc']:.3f} "
        f"| {t['dsc']:.3f} |"
        for name, t in r["tuning"].items()
    )
    return f"""# lite-aligner

Maps LiteMedSAM's image embedding into MiniLM's sentence space: 16 x 16 patches, {r["parameters"] / 1e6:.2f} M parameters,
stored in half precision. For research, not for diagnosis.

- **Licence**: {LICENCE}. LiteMedSAM and MiniLM themselves are Apache-2.0 and are not in this file.
- **Task**: image-text contrast for eight targets; where a target is follows by M2IB or NIB, without any training on
  masks as outputs. Masks were used to make captions (target present, absent, its side, whole slice or a window of it).
- **Data**: {r["slices"]["train"]} training and {r["slices"]["validation"]} validation slices (augmented copies of training
  slices included) of LGG FLAIR MR, Shenzhen chest X-rays, BUSI breast ultrasound, Decathlon hippocampus T1 MR, and, for
  the modality alone, Harvard CT and MR. Split by patient (X-ray: by image; ultrasound: by
  group of near-duplicate images). Test folders were not touched.
- **LiteMedSAM's own training set may hold some of these images**: its embeddings may have seen validation and test images.
- **Recipe**: DHN-NCE (temperature {recipe["contrastive"]["temperature"]}, beta {recipe["contrastive"]["beta1"]}), pairs that
  are true of a picture are never its negatives; AdamW {recipe["loop"]["learning_rate"]}, batch
  {recipe["contrastive"]["batch_size"]} pictures in {recipe["contrastive"]["views"]} views, at most {recipe["loop"]["steps"]} steps, best validation score at step
  {int(r["best"]["step"])}; seed {recipe["seed"]}.
- **Command**: `make train-lite` (images at `../shared/data` or `FREQSEG_DATA`).
- **Time and disk**: embeddings {seconds["cache"] / 60:.0f} min once ({r["cache_bytes"] / 1e9:.1f} GB), training
  {seconds["train"] / 60:.0f} min, calibration and tuning {seconds["calibrate and tune"] / 60:.0f} min on {r["threads"]} CPU
  threads of a machine shared with other work; no GPU.

## Accuracy among distinct meanings, validation patients

A slice is right when the statement that fits best, of all meanings and modalities, is true of it.

| wordings | all statements | absence apart (slices that show a target) |
| --- | --- | --- |
| trained | {accuracy["accuracy_trained_wordings"]:.3f} | {accuracy["accuracy_trained_wordings_absence_apart"]:.3f} |
| never trained | {accuracy["accuracy_held_out_wordings"]:.3f} | {accuracy["accuracy_held_out_wordings_absence_apart"]:.3f} |

Through random windows of the slice (what the bottleneck needs): {r["best"]["window_accuracy"]:.3f}.

## The gate on validation slices

Threshold by Youden's index on these same slices, so expect a little less elsewhere.

| target | slices with it | found | same modality without it | left empty | other modalities | left empty |
| --- | --- | --- | --- | --- | --- | --- |
{gate}

## Settings chosen on validation patients

Through the whole pipeline, gate and decoder included: mean DSC a patient (or image) that shows the target, of the
coarse mask and of what the decoder draws. At most {recipe["tune_cases"]} patients a modality, stacks thinned out to
{recipe["tune_slices"]} slices. Chosen on these patients, so expect less elsewhere.

| target | patients | settings | coarse DSC | DSC |
| --- | --- | --- | --- | --- |
{tuning}
"""


def _share(value: float) -> str:
    return "none to judge" if value != value else f"{value:.3f}"
