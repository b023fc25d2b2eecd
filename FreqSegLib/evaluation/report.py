"""The tables of an evaluation, a row a target: for the terminal, as Markdown, and for a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import TYPE_CHECKING

from FreqSegLib.clip.vocabulary import MODALITIES, targets
from FreqSegLib.evaluation.segmentation_metrics import NSD_TOLERANCE, Summary, summarise

if TYPE_CHECKING:
    from rich.table import Table

    from FreqSegLib.evaluation.calibration import Bins, MeasureCalibration, TargetCalibration
    from FreqSegLib.evaluation.evaluate import CaseRow
    from FreqSegLib.evaluation.wordings import WordingDifference

NOTES = (
    "Method: what drew the coarse mask, the trained model or the image-text encoder's saliency (zero-shot).",
    f"DSC, NSD (tolerance {NSD_TOLERANCE:g} in the row's unit) and HD95: mean ± standard deviation over the cases that "
    "hold the target (a patient's volume, or an image), and the mean's 95 % interval (bootstrap over cases).",
    'A mask that is empty although the target is there ("missed") counts with DSC 0, NSD 0 and the image\'s diagonal '
    "as HD95. Cases without the target do not enter these averages.",
    "Absent slices empty: of all slices without the target, those whose mask is empty. Wrong prompts empty: of the "
    "prompts for targets of other modalities given to the same cases, those that came out empty.",
    "Box ceiling: DSC of the same decoder given the truth's own boxes, one a component and slice.",
    "Distances are in mm where the source records a spacing, in pixels (px, slices one pixel apart) elsewhere.",
)
WORDING_NOTES = (
    "Difference: DSC in the other words minus DSC in the first words, mean over the cases and its 95 % interval "
    "(bootstrap over cases); p of the two-sided Wilcoxon signed-rank test.",
    "Not understood: cases whose words the preset refused; they count with DSC 0. Misread: cases whose words were "
    "taken for another target.",
)
CALIBRATION_NOTES = (
    "Uncertainty is of answers of its own: the mean over several views of each slice, in which a mask can differ a "
    "little from the plain answer of the main table. DSC here is of those answers.",
    "Spread: standard deviation of the map over the views. Nearness to one half: 1 - |2p - 1| of the mean probability "
    "p, an uncertainty that needs no views; only where the method gives a probability.",
    "Correlation: Spearman's rank correlation over cases of the mean uncertainty, in the mask and as far around it as "
    "the band reaches, with the error 1 - DSC; its 95 % interval (bootstrap over cases). Cases with the target whose "
    "mask is empty have no such mean and are left out; fewer than five cases have no correlation.",
    "AUROC: how often a wrong voxel is more uncertain than a right one of the same case (ties count half; 0.5 is "
    "chance), mean over the cases that have both. Band: at most 5 % of the slice's shorter side (at least 2 pixels) to "
    "either side of an outline of mask or truth; whole: every voxel.",
    "ECE: expected calibration error of the probability that a voxel belongs to the target, 15 equal bins, all cases' "
    "voxels together. The probability is the coarse mask's; where the decoder redraws the mask, the errors are of the "
    "redrawn one. Zero-shot saliency is no probability and has none.",
)
SEEN = "LiteMedSAM's own training set may contain some of these images: they may have been seen by the image tower."
_MISSING = "–"


@dataclass(frozen=True)
class Block:
    """A table for people; line breaks part a cell's main number from what belongs to it."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


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
        method: that drew the coarse masks, with counts where there were several.
        wordings: the kind of words it was asked for in.
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
    method: str
    wordings: str


def summaries(
    rows: Sequence[CaseRow], available: Mapping[str, int] | None = None, *, seed: int = 0
) -> list[TargetSummary]:
    """One a kind of wordings and target, in the order they were asked and in the vocabulary's.

    Args:
        rows: from ``evaluate_cases``.
        available: cases of the split by modality; the cases used if left out.
        seed: of the bootstrap.
    """
    kinds = dict.fromkeys(row.wordings for row in rows)
    return [
        found
        for kind in kinds
        for found in _of_one_kind([row for row in rows if row.wordings == kind], available or {}, seed)
    ]


def _of_one_kind(rows: Sequence[CaseRow], available: Mapping[str, int], seed: int) -> list[TargetSummary]:
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
                available=available.get(meaning.modality, len(own)),
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
                method=methods_of(own),
                wordings=own[0].wordings,
            )
        )
    return found


def methods_of(rows: Sequence[CaseRow]) -> str:
    """The methods that answered, with counts where there were several: ``trained``, ``trained 7, refused 1``."""
    counts = Counter(row.method for row in rows)
    return ", ".join(counts) if len(counts) == 1 else ", ".join(f"{name} {n}" for name, n in counts.most_common())


def calibrations(rows: Sequence[CaseRow], *, seed: int = 0) -> list[TargetCalibration]:
    """One a target with uncertainty, in the vocabulary's order, of the method that answered most of its cases."""
    from FreqSegLib.evaluation.calibration import target_calibration

    found = []
    for meaning in targets():
        own = [row.calibration for row in rows if row.prompt == meaning.name and row.calibration is not None]
        if own:
            method = Counter(one.method for one in own).most_common(1)[0][0]
            found.append(target_calibration(meaning.name, [one for one in own if one.method == method], seed=seed))
    return found


def target_block(found: Sequence[TargetSummary], title: str) -> Block:
    """The main table; the kind of wordings is named where there are several."""
    several = len({row.wordings for row in found}) > 1
    rows = [_cells(row) for row in found]
    if several:
        rows = [(f"{cells[0]}\n({row.wordings})", *cells[1:]) for row, cells in zip(found, rows, strict=True)]
    return Block(title, _HEADINGS, tuple(rows))


def wording_block(differences: Sequence[WordingDifference]) -> Block:
    """Other words against the first, a row a target."""
    rows = tuple(
        (
            one.target,
            f"{one.other} - {one.base}",
            str(one.test.difference.n),
            _signed(one.test.difference),
            _p(one.test.p),
            str(one.refused),
            str(one.misread),
        )
        for one in differences
    )
    return Block("Other wordings", _WORDING_HEADINGS, rows, WORDING_NOTES)


def calibration_block(found: Sequence[TargetCalibration]) -> Block:
    """A row a target and measure of uncertainty."""
    rows = tuple(
        (
            one.target,
            one.method,
            name,
            _value(one.dsc, 3),
            _rho(measure),
            _p(measure.correlation.p),
            _value(measure.auroc["band"], 3),
            _value(measure.auroc["whole"], 3),
            _ece(one.probability.get("band")),
            _ece(one.probability.get("whole")),
        )
        for one in found
        for name, measure in one.measures.items()
    )
    return Block("Does the uncertainty predict error?", _CALIBRATION_HEADINGS, rows, CALIBRATION_NOTES)


def terminal_tables(block: Block, width: int) -> list[Table]:
    """For rich's console, intervals under the means; two tables where ``width`` columns are too few for one."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    columns = range(len(block.headings))
    half = (len(columns) + 1) // 2
    narrow = width < _COLUMN_WIDTH * len(columns)
    groups = [[0, *columns[1:half]], [0, *columns[half:]]] if narrow else [list(columns)]
    tables = []
    for number, group in enumerate(groups):
        table = Table(title=block.title if number == 0 else None, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
        for column in group:
            table.add_column(
                block.headings[column], justify="right" if column else "left", no_wrap=column > 0, overflow="fold"
            )
        for cells in block.rows:
            table.add_row(*(cells[column] for column in group))
        tables.append(table)
    return tables


def markdown(block: Block, notes: Sequence[str], others: Sequence[Block] = ()) -> str:
    """A heading, the table, what its numbers mean, then the other tables under headings of their own."""
    lines = [f"# {block.title}", *_markdown_table(block), "", *(f"- {note}" for note in (*block.notes, *notes))]
    for other in others:
        lines += ["", f"## {other.title}", *_markdown_table(other), "", *(f"- {note}" for note in other.notes)]
    return "\n".join(lines) + "\n"


def _markdown_table(block: Block) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("\n", " ") for cell in cells) + " |"

    rule = "| --- |" + " ---: |" * (len(block.headings) - 1)
    return ["", line(block.headings), rule, *(line(row) for row in block.rows)]


_HEADINGS = (
    "target",
    "method",
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
_WORDING_HEADINGS = ("target", "words", "cases", "difference\nin DSC", "p", "not\nunderstood", "misread")
_CALIBRATION_HEADINGS = (
    "target",
    "method",
    "uncertainty",
    "DSC",
    "correlation\nwith 1 - DSC",
    "p",
    "AUROC\nband",
    "AUROC\nwhole",
    "ECE\nband",
    "ECE\nwhole",
)
_COLUMN_WIDTH = 15


def _cells(row: TargetSummary) -> tuple[str, ...]:
    missed = f"\n({row.missed} missed)" if row.missed else ""
    return (
        row.target,
        row.method,
        f"{row.cases} of {row.available}{missed}",
        _value(row.dsc, 3),
        _value(row.nsd, 3),
        _value(row.hd95, 1, f" {row.unit}"),
        _share(row.absent_empty, row.absent_slices),
        _share(row.wrong_empty, row.wrong),
        _value(row.box_dsc, 3),
        _MISSING if row.tower_seconds is None else f"{row.tower_seconds:.2f}",
        f"{row.prompt_seconds:.2f}",
    )


def _value(summary: Summary, digits: int, unit: str = "") -> str:
    if not summary.n:
        return _MISSING
    if isnan(summary.sd):
        return f"{summary.mean:.{digits}f}{unit}"
    mean, sd, low, high = (f"{value:.{digits}f}" for value in (summary.mean, summary.sd, summary.low, summary.high))
    return f"{mean} ± {sd}{unit}\n({low}–{high})"


def _signed(summary: Summary) -> str:
    if isnan(summary.sd):
        return f"{summary.mean:+.3f}" if summary.n else _MISSING
    return f"{summary.mean:+.3f}\n({summary.low:+.3f} to {summary.high:+.3f})"


def _p(value: float) -> str:
    return _MISSING if isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _rho(measure: MeasureCalibration) -> str:
    found = measure.correlation
    about = f"n {found.n}" + (f", {found.left_out} left out" if found.left_out else "")
    if isnan(found.rho):
        return f"{_MISSING}\n({about})"
    return f"{found.rho:+.2f} ({found.low:+.2f} to {found.high:+.2f})\n{about}"


def _ece(bins: Bins | None) -> str:
    return _MISSING if bins is None or not bins.total else f"{bins.expected_calibration_error:.3f}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %\n({part} of {whole})" if whole else _MISSING
