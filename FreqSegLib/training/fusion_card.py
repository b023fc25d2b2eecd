# ruff: noqa: E501
"""A fusion network's model card, written from what the run measured."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from FreqSegLib.training.fusion_score import KEYS, wins

LICENCE = "research, non-commercial: trained on slices of the Harvard Whole Brain Atlas, whose terms grant no licence"

_NETWORKS = {
    "single-scale": "Masks for every wavelet band from the low bands by three convolutions",
    "multi-scale": "Mask networks with channel and spatial attention at every level of one wavelet pyramid, dynamic importance of the bands, and a controller of the levels",
}


def write_card(path: Path, results: dict[str, Any]) -> None:
    """Write the card as Markdown, atomically.

    Args:
        path: the card.
        results: what ``fusion_recipe.train_fusion`` gathered.
    """
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(_card(results), encoding="utf-8")
    os.replace(temporary, path)


def _card(r: dict[str, Any]) -> str:
    recipe, slices, patients, best = r["recipe"], r["slices"], r["patients"], r["best"]
    network = recipe["network"]
    disclosed = (
        "differentiable surrogates of SD, SF, MI, SCD, VIF, Qabf and SSIM, so **the network is trained on what the tables below judge it by**"
        if recipe["loss"] == "metric"
        else f"the {recipe['loss']} loss"
    )
    test = _test_section(network, r["test"], slices["test"], patients["test"]) if "test" in r else ""
    limit = (
        f"; no fused pixel leaves the range of both sources within {recipe['halo_limit']} x {recipe['halo_limit']} pixels"
        if recipe["halo_limit"]
        else ""
    )
    command = (
        f"`{r['command']}`" if r["command"] else "`FreqSegLib.training.fusion_recipe.train_fusion` with this recipe"
    )
    return f"""# fusion-{network}

{_NETWORKS[network]}: {recipe["wave"]}, {recipe["levels"]} level(s), {r["parameters"]:,} parameters{limit}.
Fuses a registered CT (windowed to [0, 1]) and MR (normalised to [0, 1]). For research, not for diagnosis.

- **Licence**: {LICENCE}.
- **Data**: Harvard Whole Brain Atlas CT/MR slices, 256 x 256, 8 bit, split by patient: trained on patients
  {_list(patients["train"])} ({slices["train"]} slices), everything chosen on {_list(patients["validation"])} ({slices["validation"]} slices), {_list(patients["test"])} kept for the test.
- **Trained on** {disclosed}; {"whole slices" if not recipe["crop"] else f"{recipe['crop']}-pixel crops"} with flips, batch {recipe["batch_size"]},
  {"AdamW" if recipe["weight_decay"] else "Adam"} {recipe["learning_rate"]:g} ({recipe["rate"]}), at most {recipe["epochs"]} epochs; best validation score at step {int(best["step"])}; seed {recipe["seed"]}.
- **Command**: {command} (images at `../shared/data` or `FREQSEG_DATA`).
- **Time**: {best["seconds"] / 60:.0f} min on {r["threads"]} CPU thread(s) of a machine shared with other work; no GPU.

Metrics as in `FreqSegLib/evaluation/fusion_metrics.py` (EN and MI in bits, SD, SF and overshoot in grey levels, MI and VIF
summed over both sources, SSIM averaged); means over slices. Overshoot: how far beside the CT's bone edges the image
leaves the range of both sources. Score: see `training/fusion_score.py`.

## Validation patients, the network was chosen on them (score {best["score"]:.3f})

{_table({network: best, **r["baselines"]})}

{_wins(best, r["baselines"])}
{test}"""


def _test_section(network: str, table: Mapping[str, Mapping[str, float]], count: int, patients: list[str]) -> str:
    baselines = {name: row for name, row in table.items() if name != network}
    return f"""
## Test patients {_list(patients)} ({count} slices, looked at once)

{_table(table)}

{_wins(table[network], baselines)}
"""


def _table(table: Mapping[str, Mapping[str, float]]) -> str:
    columns = (*KEYS, "overshoot")
    lines = [f"| method | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    lines += [f"| {name} | {' | '.join(f'{row[key]:.3f}' for key in columns)} |" for name, row in table.items()]
    return "\n".join(lines)


def _wins(row: Mapping[str, float], baselines: Mapping[str, Mapping[str, float]]) -> str:
    won = wins(row, baselines)
    lines = []
    for name, keys in won.items():
        lost = [key for key in KEYS if key not in keys]
        lines.append(f"- against {name}: {len(keys)} of {len(KEYS)}" + (f"; loses {', '.join(lost)}" if lost else ""))
    return "\n".join(lines)


def _list(names: list[str] | tuple[str, ...]) -> str:
    return " and ".join(names) if len(names) < 3 else ", ".join(names[:-1]) + " and " + names[-1]
