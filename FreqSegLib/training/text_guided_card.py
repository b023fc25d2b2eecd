# ruff: noqa: E501
"""The text-guided model's card, written from what the run measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LICENCE = "research, non-commercial: trained on CC BY-NC-SA (LGG) and CC BY-SA (hippocampus) images, among others"


def write_card(path: Path, results: dict[str, Any]) -> None:
    """Write the card as Markdown, atomically.

    Args:
        path: the card.
        results: what ``text_guided_recipe.train_text_guided`` gathered.
    """
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(_card(results), encoding="utf-8")
    temporary.replace(path)


def _card(r: dict[str, Any]) -> str:
    recipe, seconds = r["recipe"], r["seconds"]
    training, loop, model = recipe["training"], recipe["loop"], recipe["model"]
    trained, unseen = r["trained_wordings"], r["held_out_wordings"]
    names = [key for key in trained if key.startswith("dice ")]
    dice = "\n".join(f"| {key[5:]} | {trained[key]:.3f} | {_number(unseen.get(key))} |" for key in names)
    gates = "\n".join(
        f"| {name} | {g['present']} | {_number(g['kept'])} | {g['absent']} | {_number(g['absent_empty'])} | {g['wrong']} "
        f"| {_number(g['wrong_empty'])} |"
        for name, g in r["gates"].items()
    )
    tuning = "\n".join(
        f"| {name} | {t['cases']} | {t['settings']['threshold_value']} | {t['settings']['num_contours'] or 'all'} | {t['settings']['smallest_part']:.0%} "
        f"| {t['settings']['slice_smoothing'] or '-'} "
        f"| {t['coarse_dsc']:.3f} | {t['refined_dsc']:.3f} "
        f"| {'redrawn, ' + t['settings']['prompt_kind'] if t['settings']['refine'] else 'as the model draws it'} |"
        for name, t in r["tuning"].items()
    )
    return f"""# lite-text-guided

Draws what a sentence names: a semantic stream on LiteMedSAM's embedding, a frequency stream on wavelet bands of the
slice, two decoders, one mask and one presence score a prompt. {r["parameters"] / 1e6:.2f} M parameters, stored in half
precision. For research, not for diagnosis.

- **Licence**: {LICENCE}. LiteMedSAM and MiniLM themselves are Apache-2.0 and are not in this file.
- **Knows**: {", ".join(name[5:] for name in names)}. Anything else is left to the zero-shot method.
- **Architecture**: bands {model["bands"]} ({model["wave"]}), interaction {model["interaction"]}, decoders with
  {"FMISeg's language gate (LFFI)" if model["language_gate"] else "FiLM"}, fusion {model["fusion"]}, {model["place_terms"]}² cosines for the places a sentence prefers; after FreqMedCLIP and FMISeg.
- **Data**: {r["slices"]["train"]} training and {r["slices"]["validation"]} validation slices (augmented copies of training
  slices included) of LGG FLAIR MR, Shenzhen chest X-rays, BUSI breast ultrasound, Decathlon hippocampus T1 MR, and
  Harvard CT and MR, in which nobody marked tumours, so that they are asked for the other targets only. Split by patient (X-ray: by image; ultrasound: by group of
  near-duplicate images). Test folders were not touched.
- **LiteMedSAM's own training set may hold some of these images**: its embeddings may have seen validation and test images.
- **Recipe**: {training["dice_weight"]} Dice + {training["bce_weight"]} BCE on probabilities, each decoder by
  {training["supervision_weight"]}, presence by {training["presence_weight"]}, naming the target from the sentence by {training["meaning_weight"]}; {r["wordings"]} wordings, about {training["absent_share"]:.0%} of the prompts
  for something that is not there; AdamW {loop["learning_rate"]}, cosine, batches of {training["batch_size"]} slices with up to
  {training["prompts"]} prompts, {loop["steps"]} steps, averaged weights, best validation Dice at step {int(r["rounds"][0]["step"])}; seed {recipe["seed"]}. Frozen tower
  and text encoder; from cached embeddings.{_second_round(r)}
- **Command**: `freqseg train text-guided` (images at `../shared/data` or `FREQSEG_DATA`).
- **Time and disk**: embeddings {seconds["embeddings"] / 60:.0f} min once ({r["cache_bytes"] / 1e9:.1f} GB, shared with the aligner's training),
  pictures {r["picture_bytes"] / 1e6:.0f} MB, training {seconds["train"] / 60:.0f} min, gates and settings {seconds["tune"] / 60:.0f} min on {r["threads"]} CPU threads of a
  machine shared with other work; no GPU.

## Validation slices, before settings were chosen

Mean Dice over patients (or images), all cached slices of a patient together, mask at probability 0.5, slices under a
presence probability of 0.5 empty. Asked by the words alone; the pipeline asks halfway between them and the target's name.

| target | trained wordings | wordings never trained |
| --- | --- | --- |
{dice}

Slices with the target that passed: {trained["present_kept"]:.3f}; slices of the right modality without it that came out empty:
{trained["absent_empty"]:.3f}; prompts for another modality's target that came out empty: {trained["wrong_empty"]:.3f}.

## The gate on validation slices

Threshold by Youden's index on these same slices, so expect a little less elsewhere.

| target | slices with it | passed | same modality without it | left empty | other modalities | left empty |
| --- | --- | --- | --- | --- | --- | --- |
{gates}

## Settings chosen on validation patients

Through the whole pipeline: mean DSC a patient (or image) that shows the target, of the model's mask and of what
LiteMedSAM's decoder makes of it. At most {recipe["tune_cases"]} patients a modality, stacks thinned out to {recipe["tune_slices"]} slices. Chosen on
these patients, so expect less elsewhere. Evened over slices: the probability map is averaged over neighbouring slices (a
Gaussian of that deviation) before the threshold, and slices that near to one that passed the gate are drawn too.

| target | patients | threshold | parts a slice | smallest part kept, of the largest | evened over slices, mm | DSC | redrawn | shipped |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{tuning}
"""


def _second_round(r: dict[str, Any]) -> str:
    finishing = r["recipe"]["finishing"]
    if finishing is None:
        return ""
    slices, loop = finishing["slices"], finishing["loop"]
    return f"""
- **Second round**: from these weights, {loop["steps"]} steps at {loop["learning_rate"]} and less, on {r["slices"]["finishing"]} slices:
  {slices["hippocampus"]} of every hippocampus volume in place of {r["recipe"]["slices"]["hippocampus"]}, {slices["xrays"]:.0%} of the X-rays, the others the same.
  Shipped are {finishing["blend"]:.0%} of the weights of its step {int(r["rounds"][1]["step"])} and {1 - finishing["blend"]:.0%} of the first round's."""


def _number(value: float | None) -> str:
    return "none to judge" if value is None or value != value else f"{value:.3f}"
