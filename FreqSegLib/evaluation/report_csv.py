"""The tables of an evaluation for programs: CSV with numbers in full, empty where there is none."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from math import isnan
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from FreqSegLib.evaluation.calibration import TargetCalibration
    from FreqSegLib.evaluation.evaluate import CaseRow
    from FreqSegLib.evaluation.report import TargetSummary
    from FreqSegLib.evaluation.wordings import WordingDifference


def summary_csv(found: Sequence[TargetSummary]) -> str:
    """A line a target, numbers in full; empty where there is none."""
    columns = ["target", "wordings", "method", "modality", "unit", "cases", "available", "missed"]
    measures = ("dsc", "nsd", "hd95", "box_dsc")
    parts = ("n", "mean", "sd", "low", "high")
    rest = ["absent_slices", "absent_empty", "wrong", "wrong_empty", "tower_seconds", "prompt_seconds"]
    lines = []
    for row in found:
        line = {name: getattr(row, name) for name in (*columns, *rest)}
        line |= {f"{name}_{part}": getattr(getattr(row, name), part) for name in measures for part in parts}
        lines.append(line)
    return _csv([*columns, *(f"{name}_{part}" for name in measures for part in parts), *rest], lines)


def case_csv(rows: Sequence[CaseRow]) -> str:
    """A line a case and prompt."""
    plain = ["group", "modality", "prompt", "wordings", "asked", "method", "misread", "belongs", "unit", "slices"]
    plain.append("target_slices")
    rest = [
        "absent_slices",
        "absent_empty",
        "empty",
        "drawn",
        "box_dsc",
        "score",
        "tower_slices",
        "tower_seconds",
        "prompt_seconds",
    ]
    measures = ("dsc", "nsd", "hd95")
    lines = []
    for row in rows:
        line = {name: getattr(row, name) for name in (*plain, *rest)}
        line |= {name: None if row.overlap is None else getattr(row.overlap, name) for name in measures}
        lines.append(line)
    return _csv([*plain, *measures, *rest], lines)


def wording_csv(differences: Sequence[WordingDifference]) -> str:
    """A line a target and other kind of wordings."""
    columns = ["target", "base", "other", "refused", "misread"]
    parts = ("n", "mean", "sd", "low", "high")
    lines = []
    for one in differences:
        line = {name: getattr(one, name) for name in columns}
        line |= {f"difference_{part}": getattr(one.test.difference, part) for part in parts}
        lines.append(line | {"p": one.test.p, "changed": one.test.changed})
    return _csv([*columns, *(f"difference_{part}" for part in parts), "p", "changed"], lines)


def calibration_csv(found: Sequence[TargetCalibration]) -> str:
    """A line a target, measure of uncertainty and region."""
    columns = ["target", "method", "cases", "dsc", "measure", "region", "voxels", "error_rate"]
    auroc, correlation = ("n", "mean", "sd", "low", "high"), ("rho", "low", "high", "p", "n", "left_out")
    lines = []
    for one in found:
        for name, measure in one.measures.items():
            for region, errors in measure.errors.items():
                probability = one.probability.get(region)
                line = {
                    "target": one.target,
                    "method": one.method,
                    "cases": one.cases,
                    "dsc": one.dsc.mean,
                    "measure": name,
                    "region": region,
                    "voxels": errors.total,
                    "error_rate": errors.rate,
                    "ece": probability.expected_calibration_error if probability else None,
                }
                line |= {f"auroc_{part}": getattr(measure.auroc[region], part) for part in auroc}
                line |= {f"spearman_{part}": getattr(measure.correlation, part) for part in correlation}
                lines.append(line)
    names = [*columns, "ece", *(f"auroc_{part}" for part in auroc), *(f"spearman_{part}" for part in correlation)]
    return _csv(names, lines)


def reliability_csv(found: Sequence[TargetCalibration]) -> str:
    """A line a bin: how often a voxel of that probability is the target, how often one of that uncertainty is wrong."""
    lines: list[dict[str, object]] = []
    for one in found:
        plots = {("probability", "target", region): bins for region, bins in one.probability.items()}
        for name, measure in one.measures.items():
            plots |= {(name, "error", region): bins for region, bins in measure.errors.items()}
        for (value, event, region), bins in plots.items():
            for place, count in enumerate(bins.counts):
                lines.append(
                    {
                        "target": one.target,
                        "value": value,
                        "event": event,
                        "region": region,
                        "low": float(bins.edges[place]),
                        "high": float(bins.edges[place + 1]),
                        "voxels": int(count),
                        "mean": float(bins.means[place]),
                        "rate": float(bins.rates[place]),
                    }
                )
    return _csv(["target", "value", "event", "region", "low", "high", "voxels", "mean", "rate"], lines)


def _csv(columns: Sequence[str], lines: Sequence[Mapping[str, object]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({k: "" if v is None or (isinstance(v, float) and isnan(v)) else v for k, v in line.items()})
    return text.getvalue()
