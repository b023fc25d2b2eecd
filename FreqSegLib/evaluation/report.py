"""The table of an evaluation, a row a target: for the terminal, as Markdown, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import TYPE_CHECKING

from FreqSegLib.clip.vocabulary import MODALITIES, targets
from FreqSegLib.evaluation.segmentation_metrics import NSD_TOLERANCE, Summary, summarise

if TYPE_CHECKING:
    from rich.table import Table

    from FreqSegLib.evaluation.evaluate import CaseRow

NOTES = (
    f"DSC, NSD (tolerance {NSD_TOLERANCE:g} in the row's unit) and HD95: mean ± standard deviation over the cases that "
    "hold the target (a patient's volume, or an image), and the mean's 95 % interval (bootstrap over cases).",
    'A mask that is empty although the target is there ("missed") counts with DSC 0, NSD 0 and the image\'s diagonal '
    "as HD95. Cases without the target do not enter these averages.",
    "Absent slices empty: of all slices without the target, those whose mask is empty. Wrong prompts empty: of the "
    "prompts for targets of other modalities given to the same cases, those that came out empty.",
    "Box ceiling: DSC of the same decoder given the truth's own boxes, one a component and slice.",
    "Distances are in mm where the source records a spacing, in pixels (px, slices one pixel apart) elsewhere.",
)
SEEN = "LiteMedSAM's own training set may contain some of these images: they may have been seen by the image tower."
_MISSING = "–"


@dataclass(frozen=True)
class TargetSummary:
    """One row of the table.

    Attributes:
        target, modality, unit: what, on which pictures, distances in what.
        cases, available: cases used, and cases the split has.
        missed: cases with the target whose mask came out empty.
        dsc, nsd, hd95, box_dsc: over cases with the target.
        absent_slices, absent_empty: slices without the target, and those that came out empty.
        wrong, wrong_empty: wrong prompts on these cases, and those that came out empty.
        tower_seconds: a slice through the image tower; None if everything was in the cache.
        prompt_seconds: of this prompt, a slice.
    """

    target: str
    modality: str
    unit: str
    cases: int
    available: int
    missed: int
    dsc: Summary
    nsd: Summary
    hd95: Summary
    box_dsc: Summary
    absent_slices: int
    absent_empty: int
    wrong: int
    wrong_empty: int
    tower_seconds: float | None
    prompt_seconds: float


def summaries(
    rows: Sequence[CaseRow], available: Mapping[str, int] | None = None, *, seed: int = 0
) -> list[TargetSummary]:
    """One a target, in the vocabulary's order.

    Args:
        rows: from ``evaluate_cases``.
        available: cases of the split by modality; the cases used if left out.
        seed: of the bootstrap.
    """
    found = []
    for meaning in targets():
        own = [row for row in rows if row.belongs and row.prompt == meaning.name]
        if not own:
            continue
        wrong = [row for row in rows if not row.belongs and row.modality == meaning.modality]
        present = [row.overlap for row in own if row.overlap is not None]
        tower_slices = sum(row.tower_slices for row in own)
        found.append(
            TargetSummary(
                target=meaning.name,
                modality=MODALITIES[meaning.modality].name,
                unit=own[0].unit,
                cases=len(own),
                available=(available or {}).get(meaning.modality, len(own)),
                missed=sum(row.missed for row in own),
                dsc=summarise([case.dsc for case in present], seed=seed),
                nsd=summarise([case.nsd for case in present], seed=seed),
                hd95=summarise([case.hd95 for case in present], seed=seed),
                box_dsc=summarise([row.box_dsc for row in own if row.box_dsc is not None], seed=seed),
                absent_slices=sum(row.absent_slices for row in own),
                absent_empty=sum(row.absent_empty for row in own),
                wrong=len(wrong),
                wrong_empty=sum(row.empty for row in wrong),
                tower_seconds=sum(row.tower_seconds for row in own) / tower_slices if tower_slices else None,
                prompt_seconds=sum(row.prompt_seconds for row in own) / sum(row.slices for row in own),
            )
        )
    return found


def terminal_tables(found: Sequence[TargetSummary], title: str, width: int) -> list[Table]:
    """For rich's console, intervals under the means; two tables where ``width`` columns are too few for one."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    columns = range(len(_HEADINGS))
    groups = [list(columns)] if width >= _ONE_TABLE else [[0, *columns[1:_HALF]], [0, *columns[_HALF:]]]
    tables = []
    for number, group in enumerate(groups):
        table = Table(title=title if number == 0 else None, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
        for column in group:
            table.add_column(
                _HEADINGS[column], justify="right" if column else "left", no_wrap=column > 0, overflow="fold"
            )
        for row in found:
            cells = _cells(row, "\n")
            table.add_row(*(cells[column] for column in group))
        tables.append(table)
    return tables


def markdown(found: Sequence[TargetSummary], title: str, notes: Sequence[str]) -> str:
    """A heading, the table, and what its numbers mean."""
    headings = [heading.replace("\n", " ") for heading in _HEADINGS]
    lines = [f"# {title}", "", "| " + " | ".join(headings) + " |"]
    lines.append("| --- |" + " ---: |" * (len(headings) - 1))
    lines += ["| " + " | ".join(_cells(row, " ")) + " |" for row in found]
    lines += ["", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def summary_csv(found: Sequence[TargetSummary]) -> str:
    """A line a target, numbers in full; empty where there is none."""
    columns = ["target", "modality", "unit", "cases", "available", "missed"]
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
    plain = ["group", "modality", "prompt", "belongs", "unit", "slices", "target_slices"]
    rest = [
        "absent_slices",
        "absent_empty",
        "empty",
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


_HEADINGS = (
    "target",
    "cases",
    "DSC",
    "NSD",
    "HD95",
    "absent slices\nempty",
    "wrong prompts\nempty",
    "box ceiling\nDSC",
    "tower\ns/slice",
    "prompt\ns/slice",
)
_HALF = 5
_ONE_TABLE = 150


def _cells(row: TargetSummary, gap: str) -> list[str]:
    missed = f"{gap}({row.missed} missed)" if row.missed else ""
    return [
        row.target,
        f"{row.cases} of {row.available}{missed}",
        _value(row.dsc, 3, gap),
        _value(row.nsd, 3, gap),
        _value(row.hd95, 1, gap, f" {row.unit}"),
        _share(row.absent_empty, row.absent_slices, gap),
        _share(row.wrong_empty, row.wrong, gap),
        _value(row.box_dsc, 3, gap),
        _MISSING if row.tower_seconds is None else f"{row.tower_seconds:.2f}",
        f"{row.prompt_seconds:.2f}",
    ]


def _value(summary: Summary, digits: int, gap: str, unit: str = "") -> str:
    if not summary.n:
        return _MISSING
    if isnan(summary.sd):
        return f"{summary.mean:.{digits}f}{unit}"
    mean, sd, low, high = (f"{value:.{digits}f}" for value in (summary.mean, summary.sd, summary.low, summary.high))
    return f"{mean} ± {sd}{unit}{gap}({low}–{high})"


def _share(part: int, whole: int, gap: str) -> str:
    return f"{100 * part / whole:.0f} %{gap}({part} of {whole})" if whole else _MISSING


def _csv(columns: Sequence[str], lines: Sequence[Mapping[str, object]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({k: "" if v is None or (isinstance(v, float) and isnan(v)) else v for k, v in line.items()})
    return text.getvalue()
