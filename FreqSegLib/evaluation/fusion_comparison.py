"""One fused image or volume beside the plain rules, in every metric, with what the pair itself allows."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.errors import InputError
from FreqSegLib.evaluation import fusion_metrics as metrics
from FreqSegLib.evaluation.fusion_metrics import METRICS, Ceiling
from FreqSegLib.progress import CancelCallback, ProgressCallback, Stage
from FreqSegLib.registration import OnGrid, RigidTransform, same_grid
from FreqSegLib.volume_fusion import Normalised, Pair, prepared_pair, read_record

if TYPE_CHECKING:
    from rich.table import Table

    from FreqSegLib.fusion import FusionMethod
    from FreqSegLib.settings import FusionSettings
    from FreqSegLib.volume import Volume

CEILING = "ceiling"
OVERSHOOT = "overshoot"
MOST_SLICES = 24
LEAST_SHOWN = 0.02
_DARK = 0.06
_MISSING = "–"


@dataclass(frozen=True)
class Comparison:
    """Means over the measured slices.

    Attributes:
        rows: by method, the fused image first; each holds the keys of ``fusion_table`` and ``overshoot``.
        ceilings: by metric, the mean of what each slice's pair allows.
        slices: which slices of the stack were measured.
        count: how many the stack has.
    """

    rows: Mapping[str, Mapping[str, float]]
    ceilings: Mapping[str, Ceiling]
    slices: tuple[int, ...]
    count: int

    @property
    def measured(self) -> str:
        """What was measured, in words."""
        if self.count == 1:
            return "one image"
        return f"means over {len(self.slices)} of {self.count} slices, evenly spaced among those that show CT and MR"


def baselines() -> dict[str, FusionMethod]:
    """The rules every fused image has to stand beside, always."""
    from FreqSegLib.fusion.rules import Average, ChooseMax, LaplacianPyramid, Maximum

    return {
        "average": Average(),
        "max": Maximum(),
        "choose-max haar": ChooseMax("haar", 1),
        "choose-max db4": ChooseMax("db4", 1),
        "laplacian": LaplacianPyramid(3),
    }


def pair_of(
    fused: Volume,
    ct: Volume,
    mr: Volume,
    settings: FusionSettings | None = None,
    record: Mapping[str, Any] | None = None,
) -> tuple[Pair, str]:
    """CT and MR as they were when the volume was fused, as far as its record tells.

    Args:
        fused: on the CT's grid.
        ct: as it was given to ``freqseg fuse``.
        mr: the same.
        settings: used where there is no record.
        record: of the fusion; the one in the fused volume's header if left out.

    Returns:
        The pair, and in words where its grey levels come from.

    Raises:
        InputError: the fused volume lies on another grid than the CT.
    """
    if fused.shape != ct.shape or (ct.spatial_dimension == 3 and not same_grid(fused, ct)):
        raise InputError(
            f"the fused image must lie on the CT's grid: '{fused.name}' has {fused.shape} voxels at "
            f"{fused.origin.round(2).tolist()} mm, '{ct.name}' {ct.shape} at {ct.origin.round(2).tolist()} mm"
        )
    if ct.spatial_dimension == 2 and mr.shape != ct.shape:
        raise InputError(f"the images must have one size: '{ct.name}' is {ct.shape[1:]}, '{mr.name}' {mr.shape[1:]}")
    record = read_record(fused) if record is None else record
    pair = prepared_pair(ct, mr, settings)
    try:
        assert record is not None
        levels = [
            Normalised(float(record[side]["low"]), float(record[side]["high"]), str(record[side]["intensity"]))
            for side in ("ct", "mr")
        ]
        rows = record["transform"]
        transform = None if rows is None else RigidTransform(np.array(rows, dtype=np.float64), 0.0, "recorded", 0)
    except (AssertionError, KeyError, TypeError, ValueError):
        return pair, f"CT: {pair.ct_levels.label}; MR: {pair.mr_levels.label} (no record of the fusion was found)"
    known = Pair(pair.stack, levels[0], levels[1], OnGrid(ct, mr, transform))
    return known, f"CT: {levels[0].label}; MR: {levels[1].label} (as recorded when it was fused)"


def grey_levels(fused: Volume) -> NDArray[np.float32]:
    """The voxels of a fused volume as grey levels 0 to 255.

    Raises:
        InputError: they are neither 0 to 255 nor 0 to 1.
    """
    low, high = float(fused.array.min()), float(fused.array.max())
    if not (np.isfinite([low, high]).all() and low >= -0.5 and high <= 255.5):
        raise InputError(
            f"'{fused.name}' holds values from {low:g} to {high:g}; a fused image has grey levels 0 to 255 (or 0 to 1)"
        )
    scale = 255.0 if high <= 1.0 and fused.array.dtype.kind == "f" else 1.0
    return np.asarray(fused.array, dtype=np.float32) * np.float32(scale)


def compare(
    pair: Pair,
    fused: NDArray[np.float32],
    name: str,
    *,
    most_slices: int = MOST_SLICES,
    progress: ProgressCallback | None = None,
    cancel: CancelCallback | None = None,
) -> Comparison:
    """Every metric of a fused volume and of the plain rules, on the same slices.

    Args:
        pair: the sources.
        fused: (k, j, i) grey levels 0 to 255 on the CT's grid; measured as whole levels, as they would be stored.
        name: of its row.
        most_slices: at most so many, evenly spaced.
        progress: told how many slices are done.
        cancel: asked between slices.

    Raises:
        InputError: no slice shows both, or slices are too small.
        Cancelled: ``cancel`` said so.
    """
    import torch

    stack = pair.stack
    chosen = _measured_slices(pair, most_slices, cancel)
    shown = stack.displayed(fused)
    rules = baselines()
    found: dict[str, list[dict[str, float]]] = {row: [] for row in (name, *rules)}
    limits: list[dict[str, Ceiling]] = []
    stage = Stage("Measuring", len(chosen), progress, cancel)
    for done, index in enumerate(chosen, start=1):
        ct, mr, there = pair.slices(range(index, index + 1))
        mr = np.where(there, mr, ct)
        sources = 255.0 * ct[0].astype(np.float64), 255.0 * mr[0].astype(np.float64)
        found[name].append(row_of(shown[index], *sources))
        tensors = torch.from_numpy(ct)[:, None], torch.from_numpy(mr)[:, None]
        for rule, method in rules.items():
            found[rule].append(row_of(255.0 * method(*tensors).image[0, 0].numpy(), *sources))
        limits.append(metrics.ceilings(*sources))
        stage.advance(done)
    rows = {row: mean_of(values) for row, values in found.items()}
    return Comparison(rows, _mean_ceilings(limits), tuple(chosen), stack.count)


def row_of(fused: metrics.Image, ct: metrics.Image, mr: metrics.Image) -> dict[str, float]:
    """``fusion_table`` of whole grey levels, as images store them, and the overshoot beside bone edges."""
    clipped = np.clip(np.asarray(fused, dtype=np.float64), 0, 255)
    return {**metrics.fusion_table(np.rint(clipped), ct, mr), OVERSHOOT: metrics.edge_overshoot(clipped, ct, mr)}


def mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means by key; NaN counts nowhere, an infinite PSNR makes an infinite mean."""
    return {key: _mean([row[key] for row in rows]) for key in rows[0]}


def table(comparison: Comparison, title: str) -> Table:
    """For rich's console: a row a metric, a column a method, the best of each row bold."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    shown.add_column("metric", no_wrap=True)
    for name in (*comparison.rows, CEILING):
        shown.add_column(name, justify="right")
    for key, label, better in _lines():
        best = best_methods(comparison, key, better)
        cells = [Text(number(row[key]), style="bold" if name in best else "") for name, row in comparison.rows.items()]
        limit = comparison.ceilings.get(key)
        shown.add_row(label, *cells, number(limit.value if limit else None))
    return shown


def comparison_csv(comparison: Comparison) -> str:
    """A line a metric, values in full; the sources' own values too."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["metric", "title", "unit", "of", "better", *comparison.rows, CEILING, "why"])
    known = {metric.key: metric for metric in METRICS}
    for key in next(iter(comparison.rows.values())):
        metric, limit = known.get(key), comparison.ceilings.get(key)
        about = (
            [metric.title, metric.unit, metric.of, "more" if metric.better > 0 else "less"]
            if metric
            else ["beside bone edges", "grey levels", "outside the sources' range", "less"]
            if key == OVERSHOOT
            else ["", "", f"{key.rpartition('_')[2]} alone", "more"]
        )
        values = [row[key] for row in comparison.rows.values()]
        cells = ["" if np.isnan(value) else repr(float(value)) for value in values]
        writer.writerow(
            [
                key,
                *about,
                *cells,
                "" if limit is None or limit.value is None else repr(limit.value),
                limit.why if limit else "",
            ]
        )
    return text.getvalue()


def best_methods(comparison: Comparison, key: str, better: int) -> set[str]:
    """The methods that no other beats in one metric."""
    values = {name: row[key] for name, row in comparison.rows.items() if not np.isnan(row[key])}
    if not values:
        return set()
    most = max(better * value for value in values.values())
    return {name for name, value in values.items() if better * value >= most - 1e-5 * max(1.0, abs(most))}


def number(value: float | None) -> str:
    """Four figures at most, a dash where there is none."""
    if value is None or np.isnan(value):
        return _MISSING
    if np.isinf(value):
        return "inf"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def _lines() -> list[tuple[str, str, int]]:
    """(key, label, which way is better) of every row for people."""
    lines = [
        (metric.key, f"{metric.key}{f' ({metric.unit})' if metric.unit else ''}", metric.better) for metric in METRICS
    ]
    return [*lines, (OVERSHOOT, "overshoot (grey levels)", -1)]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _mean_ceilings(limits: Sequence[Mapping[str, Ceiling]]) -> dict[str, Ceiling]:
    found = {}
    for key, first in limits[0].items():
        values = [limit[key].value for limit in limits]
        known = [value for value in values if value is not None]
        found[key] = Ceiling(_mean(known) if len(known) == len(values) else None, first.why)
    return found


def _measured_slices(pair: Pair, most: int, cancel: CancelCallback | None) -> list[int]:
    """Slices that show both sources, evenly thinned out."""
    if min(pair.stack.slice_shape) < metrics.SMALLEST_SIDE:
        raise InputError(
            f"metrics need slices of at least {metrics.SMALLEST_SIDE} pixels a side, got {pair.stack.slice_shape}"
        )
    stage = Stage("Measuring", 0, None, cancel)
    if pair.stack.count == 1:
        return [0]
    candidates = np.unique(np.linspace(0, pair.stack.count - 1, min(pair.stack.count, 4 * most)).round().astype(int))
    good = []
    for index in candidates.tolist():
        stage.advance(0)
        ct, mr, there = pair.slices(range(index, index + 1))
        if min(float((one > _DARK).mean()) for one in (ct, mr)) >= LEAST_SHOWN and there.mean() > 0.5:
            good.append(index)
    if not good:
        raise InputError("no slice shows both the CT and the MR, so there is nothing to measure")
    return [good[place] for place in np.unique(np.linspace(0, len(good) - 1, min(len(good), most)).round().astype(int))]
