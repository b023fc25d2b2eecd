"""Several ways to segment side by side: Markdown, CSV and a figure, with the gains the method's description claims."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import TYPE_CHECKING

from FreqSegLib.clip.vocabulary import targets
from FreqSegLib.evaluation.ablation_scores import METRICS, CaseScore, Metric, compared, standings
from FreqSegLib.evaluation.paired import PairedTest
from FreqSegLib.evaluation.segmentation_metrics import NSD_TOLERANCE, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = "–"
NOT_MEASURED = "not measured: no data"
NOTES = (
    "DSC, NSD and HD95: mean ± standard deviation over the cases that hold the target (a patient's volume, or an "
    f"image); NSD's tolerance is {NSD_TOLERANCE:g} in the row's unit. An empty mask where the target is counts DSC 0, "
    "NSD 0 and the image's diagonal as HD95.",
    "Differences are of DSC, case by case: their mean, its 95 % interval (bootstrap over cases), and p of the "
    "two-sided Wilcoxon signed-rank test. No correction for the number of tests.",
    "Absent slices empty: of all slices without the target, those whose mask is empty. Wrong prompts empty: of the "
    "prompts for targets of other modalities, those that came out empty.",
)


@dataclass(frozen=True)
class Listed:
    """One way in a table.

    Attributes:
        name: as in the scores.
        title: what it is.
        before: the way it adds to; None for the first.
    """

    name: str
    title: str
    before: str | None = None


@dataclass(frozen=True)
class Claim:
    """A gain claimed for the frequency path: DSC in per cent without and with it, on what, and our target for it."""

    pictures: str
    without: float
    with_it: float
    target: str | None


CLAIMS = (
    Claim("breast ultrasound", 77.76, 80.38, "breast lesion"),
    Claim("brain MR", 76.52, 79.15, "brain tumour"),
    Claim("chest X-ray", 75.79, 77.85, "lungs"),
    Claim("lung CT", 80.38, 83.20, None),
)
CLAIMED_MEAN = 2.54


@dataclass(frozen=True)
class Part:
    """One table of ways and what was measured.

    Attributes:
        title, text: its heading, and a sentence or more on what is compared.
        ways: in their order.
        full: the way that all others stand against; None for none.
        scores: of those ways.
        paths: pairs of ways, without and with the frequency path, for the claims.
    """

    title: str
    text: str
    ways: tuple[Listed, ...]
    full: str | None
    scores: tuple[CaseScore, ...]
    paths: tuple[tuple[str, str], ...] = ()

    def measured(self) -> list[Listed]:
        """The ways that have scores."""
        there = {score.method for score in self.scores}
        return [way for way in self.ways if way.name in there]

    def against(self, target: str, method: str, other: str | None, metric: Metric = "dsc") -> PairedTest | None:
        """``method`` minus the other, case by case; None where that cannot be said."""
        if other is None or other == method:
            return None
        return compared(self.scores, target, method, other, metric)


def markdown(title: str, parts: Sequence[Part], notes: Sequence[str], *, claims: bool = True) -> str:
    """The whole report.

    Args:
        title: its heading.
        parts: a chapter each.
        notes: sentences on how it was measured, before those that hold always.
        claims: whether the claimed gains are printed beside the measured ones.
    """
    lines = [f"# {title}", ""]
    for part in parts:
        lines += [f"## {part.title}", "", part.text, "", *_overview(part), "", *_details(part), ""]
    if claims:
        lines += [*_claims(parts), ""]
    return "\n".join([*lines, *(f"- {note}" for note in (*notes, *NOTES))]) + "\n"


def table_csv(parts: Sequence[Part]) -> str:
    """A line a part, target and way, numbers with six digits; empty where there is none."""
    pieces = ("n", "mean", "sd", "low", "high")
    columns = ["part", "target", "method", "title", "unit"]
    columns += [f"{metric}_{piece}" for metric in METRICS for piece in pieces]
    columns += ["absent_slices", "absent_empty", "wrong", "wrong_empty"]
    others = ("before", "full")
    for other in others:
        columns += [other, *(f"{metric}_{what}_{other}" for metric in METRICS for what in ("difference", "p"))]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    for part in parts:
        ways = {way.name: way for way in part.ways}
        for row in standings(part.scores):
            way = ways[row.method]
            line: dict[str, object] = {
                "part": part.title,
                "title": way.title,
                **{name: getattr(row, name) for name in columns if hasattr(row, name)},
                **{f"{m}_{piece}": getattr(getattr(row, m), piece) for m in METRICS for piece in pieces},
            }
            for name, against in zip(others, (way.before, part.full), strict=True):
                line[name] = against
                for metric in METRICS:
                    test = part.against(row.target, row.method, against, metric)
                    line[f"{metric}_difference_{name}"] = None if test is None else test.difference.mean
                    line[f"{metric}_p_{name}"] = None if test is None else test.p
            writer.writerow({key: _digits(value) for key, value in line.items()})
    return text.getvalue()


def figure(parts: Sequence[Part], title: str) -> Figure:
    """Mean DSC and its 95 % interval, a panel a target, a row of panels a part."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [m.name for m in targets() if any(s.prompt == m.name and s.belongs for p in parts for s in p.scores)]
    tallest = max((len(part.measured()) for part in parts), default=1)
    drawn = Figure(
        figsize=(2.2 + 1.9 * max(1, len(names)), 1.2 + len(parts) * (0.9 + 0.3 * tallest)), layout="constrained"
    )
    FigureCanvasAgg(drawn)
    drawn.suptitle(f"{title}: mean DSC and its 95 % interval over cases", fontsize=11)
    grid = drawn.subplots(max(1, len(parts)), max(1, len(names)), squeeze=False)
    for part, line in zip(parts, grid, strict=False):
        found = {(row.target, row.method): row.dsc for row in standings(part.scores)}
        for place, (axes, name) in enumerate(zip(line, names, strict=False)):
            _panel(axes, part, name, found, labelled=place == 0)
    return drawn


def _panel(axes: Axes, part: Part, target: str, found: Mapping[tuple[str, str], Summary], *, labelled: bool) -> None:
    ways = part.measured()
    for height, way in enumerate(ways):
        values = found.get((target, way.name))
        if values is None or not values.n:
            continue
        low, high = (values.mean if isnan(v) else v for v in (values.low, values.high))
        colour = "tab:orange" if way.name == part.full else "tab:blue"
        error = [[max(0.0, values.mean - low)], [max(0.0, high - values.mean)]]
        axes.errorbar(values.mean, height, xerr=error, fmt="o", color=colour, capsize=3, markersize=5)
    axes.set_ylim(len(ways) - 0.5, -0.5)
    axes.set_yticks(range(len(ways)), [way.name for way in ways] if labelled else [])
    axes.set_title(f"{part.title}\n{target}" if labelled else target, fontsize=9, loc="left")
    axes.set_xlabel("DSC", fontsize=8)
    axes.tick_params(labelsize=8, left=labelled)
    axes.locator_params(axis="x", nbins=4)
    axes.grid(axis="x", alpha=0.3)


def _overview(part: Part) -> list[str]:
    """DSC of every way and target; the last column is the mean over targets."""
    rows = {(row.target, row.method): row for row in standings(part.scores)}
    names = list(dict.fromkeys(target for target, _ in rows))
    lines = ["| DSC | " + " | ".join([*names, "mean"]) + " |", "| --- |" + " ---: |" * (len(names) + 1)]
    for way in part.measured():
        own = [rows[name, way.name].dsc if (name, way.name) in rows else None for name in names]
        means = [summary.mean for summary in own if summary is not None and summary.n]
        mean = f"{sum(means) / len(means):.3f}" if len(means) == len(names) else MISSING
        cells = [MISSING if summary is None else _spread(summary, 3) for summary in own]
        lines.append(f"| **{way.name}**: {way.title} | " + " | ".join([*cells, mean]) + " |")
    return lines


def _details(part: Part) -> list[str]:
    headings = ["target", "way", "cases", "DSC", "NSD", "HD95"]
    headings += ["DSC − the one before", "p"]
    if part.full is not None:
        headings += [f"DSC − {part.full}", "p"]
    headings += ["absent slices empty", "wrong prompts empty"]
    lines = ["| " + " | ".join(headings) + " |", "| --- | --- |" + " ---: |" * (len(headings) - 2)]
    before = {way.name: way.before for way in part.ways}
    for row in standings(part.scores):
        cells = [row.target, row.method, str(row.dsc.n), _spread(row.dsc, 3), _spread(row.nsd, 3)]
        cells.append(f"{_spread(row.hd95, 1)} {row.unit}" if row.hd95.n else MISSING)
        cells += _difference(part.against(row.target, row.method, before[row.method]), before[row.method])
        if part.full is not None:
            cells += _difference(part.against(row.target, row.method, part.full))
        cells += [_share(row.absent_empty, row.absent_slices), _share(row.wrong_empty, row.wrong)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _claims(parts: Sequence[Part]) -> list[str]:
    """What the description of the method claims for the frequency path, beside what was measured here."""
    shown = [(part, path) for part in parts for path in part.paths if {*path} <= {way.name for way in part.measured()}]
    headings = ["pictures", "claimed DSC", "claimed gain"]
    for part, (without, with_it) in shown:
        headings += [f"{part.title.lower()}: {with_it} − {without}", "p"]
    lines = [
        "## The gain of the frequency path, claimed and measured",
        "",
        "In points of DSC (per cent). Claimed: by the description FreqSeg started from, on images of its own. "
        "Measured: on the cases above, the way with the frequency path minus the way without.",
        "",
        "| " + " | ".join(headings) + " |",
        "| --- |" + " ---: |" * (len(headings) - 1),
    ]
    gains: list[list[float]] = [[] for _ in shown]
    for claim in CLAIMS:
        claimed = f"{claim.without:.2f} → {claim.with_it:.2f}"
        cells = [claim.pictures, claimed, f"{claim.with_it - claim.without:+.2f}"]
        for (part, (without, with_it)), own in zip(shown, gains, strict=True):
            test = None if claim.target is None else part.against(claim.target, with_it, without)
            if test is None:
                cells += [NOT_MEASURED if claim.target is None else MISSING, MISSING]
            else:
                own.append(100 * test.difference.mean)
                cells += [f"{own[-1]:+.2f}", _p(test.p)]
        lines.append("| " + " | ".join(cells) + " |")
    average = sum(claim.with_it - claim.without for claim in CLAIMS) / len(CLAIMS)
    cells = ["mean", MISSING, f"{CLAIMED_MEAN:+.2f} (of the four rows: {average:+.2f})"]
    for own in gains:
        cells += [f"{sum(own) / len(own):+.2f} (of {len(own)})" if own else MISSING, MISSING]
    return [*lines, "| " + " | ".join(cells) + " |"]


def _spread(summary: Summary, digits: int) -> str:
    if not summary.n:
        return MISSING
    if isnan(summary.sd):
        return f"{summary.mean:.{digits}f}"
    return f"{summary.mean:.{digits}f} ± {summary.sd:.{digits}f}"


def _difference(test: PairedTest | None, against: str | None = None) -> list[str]:
    """The difference with its interval, and p."""
    if test is None:
        return [MISSING, MISSING]
    found = test.difference
    interval = "" if isnan(found.low) else f" ({found.low:+.3f} to {found.high:+.3f})"
    told = "" if against is None else f", {against}"
    return [f"{found.mean:+.3f}{interval}{told}", _p(test.p)]


def _p(value: float) -> str:
    return MISSING if isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} % of {whole}" if whole else MISSING


def _digits(value: object) -> object:
    if value is None or (isinstance(value, float) and isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
