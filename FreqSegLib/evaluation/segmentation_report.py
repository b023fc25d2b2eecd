"""An evaluation as one HTML page: what was run, the tables, pictures of telling cases, and what was not measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from FreqSegLib.clip.vocabulary import targets
from FreqSegLib.evaluation import html_page
from FreqSegLib.evaluation.calibration import SPREAD, Bins
from FreqSegLib.evaluation.drawing import LIGHT, WIDE, new_figure, place_axes, write
from FreqSegLib.evaluation.evaluate import CaseRow
from FreqSegLib.evaluation.report import Block

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from FreqSegLib.evaluation.calibration import TargetCalibration
    from FreqSegLib.evaluation.report import TargetSummary

FALSE_POSITIVE = "Worst false positive"
_TRUTH, _MASK = "#ffd166", "#4cc9f0"
_OWN, _ERROR, _PALE = "#0b6fa4", "#c8553d", "#9aa7b4"
_EDGE, _GAP = 0.3, 0.2


def report_page(
    main: Block,
    facts: Sequence[tuple[str, str]],
    notes: Sequence[str],
    rows: Sequence[CaseRow],
    found: Sequence[TargetSummary],
    calibrated: Sequence[TargetCalibration],
    others: Sequence[Block],
    settings: Block,
    missing: Sequence[str],
) -> str:
    """The whole report.

    Args:
        main: the table of targets; its title is the page's.
        facts: what was run, as (name, value).
        notes: what its numbers mean, a sentence each.
        rows: of ``evaluate_cases`` with views.
        found, calibrated: of ``report.summaries`` and ``report.calibrations``.
        others: further tables; that of the uncertainty, if there is one, is the last.
        settings: what each target was run with.
        missing: what was not measured, a sentence each.
    """
    first = [row for row in rows if row.wordings == rows[0].wordings] if rows else []
    parts = [
        html_page.heading("What was run"),
        html_page.facts(facts),
        html_page.heading(settings.title, 3),
        html_page.table(settings.headings, settings.rows, small=True),
        html_page.heading("Accuracy"),
        html_page.table(main.headings, main.rows),
        html_page.bullets(notes),
        html_page.heading("What was not measured"),
        html_page.bullets(missing),
        html_page.heading("DSC of every case"),
        html_page.picture(strip_figure(first, found), "DSC of every case, by target"),
    ]
    for block in others:
        parts += [html_page.heading(block.title), html_page.table(block.headings, block.rows)]
        parts.append(html_page.bullets(block.notes))
    for one in calibrated:
        parts.append(html_page.picture(calibration_figure(one), f"Uncertainty and error: {one.target}"))
    parts.append(html_page.heading("Best, median and worst cases"))
    parts.append(html_page.paragraph("By DSC, on the slice that holds most of the target, or most of a false answer."))
    for meaning in targets():
        cases = telling_cases(first, meaning.name)
        if cases:
            absent = sum(row.prompt == meaning.name and row.overlap is None for row in first)
            figure = cases_figure(meaning.name, cases, absent)
            parts.append(html_page.picture(figure, f"Telling cases: {meaning.name}"))
    parts += [html_page.heading("Every case"), _case_table([row for row in rows if row.belongs])]
    wrong = [row for row in rows if not row.belongs]
    drawn = [row for row in wrong if not row.empty]
    if wrong:
        parts.append(html_page.heading("Prompts for targets of other modalities"))
        count = f"{len(wrong)} were given, {len(wrong) - len(drawn)} came out empty"
        parts.append(html_page.paragraph(f"{count}{'; those that did not:' if drawn else '.'}"))
        parts.append(_case_table(drawn) if drawn else "")
    return html_page.page(main.title, "\n".join(parts), LIGHT)


def telling_cases(rows: Sequence[CaseRow], target: str) -> list[tuple[str, CaseRow]]:
    """Best, median and worst of the cases that hold a target, by DSC, and the largest mask where there is none of it.

    Args:
        rows: with views.
        target: its name; wrong prompts for it count among those without it.

    Returns:
        (what it is, row); a case is shown once, so that fewer than three have no median.
    """
    own = [row for row in rows if row.prompt == target and row.view is not None]
    present = sorted((row for row in own if row.overlap is not None), key=_dsc)
    last = len(present) - 1
    few = {-1: {}, 0: {"Only case": 0}, 1: {"Best": 1, "Worst": 0}}
    places = few.get(last, {"Best": last, "Median": last // 2, "Worst": 0})
    found = [(name, present[place]) for name, place in places.items()]
    absent = [row for row in own if row.overlap is None and not row.empty]
    if absent:
        found.append((FALSE_POSITIVE, max(absent, key=lambda row: row.drawn)))
    return found


def cases_figure(target: str, cases: Sequence[tuple[str, CaseRow]], absent: int = 0) -> Figure:
    """A column a case: the picture alone above, with the outlines of truth and mask below.

    Args:
        target: its name.
        cases: of :func:`telling_cases`.
        absent: how often it was asked for where it is not, said where that never drew anything.
    """
    columns = max(4, len(cases))
    side = (WIDE - 2 * _EDGE - (columns - 1) * _GAP) / columns
    views = [row.view for _, row in cases if row.view is not None]
    ratio = float(np.clip(max(v.image.shape[0] * v.aspect / v.image.shape[1] for v in views), 0.5, 1.3))
    tall, top = side * ratio, 1.3
    figure = new_figure(top + 2 * tall + 0.1 + 0.2, LIGHT)
    write(figure, _EDGE, 0.42, target, 17, LIGHT.text, bold=True)
    _legend(figure)
    for place, (name, row) in enumerate(cases):
        view = row.view
        assert view is not None
        left = _EDGE + place * (side + _GAP)
        title = f"{name}, “{row.asked}”" if name == FALSE_POSITIVE else f"{name}: DSC {_dsc(row):.3f}"
        write(figure, left, 0.9, title, 12, LIGHT.text, bold=True)
        write(figure, left, 1.16, "  ".join(part for part in (row.group, view.title) if part), 9.5, LIGHT.muted)
        for line in range(2):
            axes = place_axes(figure, left, top + line * (tall + 0.1), side, tall, LIGHT)
            axes.imshow(view.image, cmap="gray", vmin=0, vmax=255, aspect=view.aspect, interpolation="bilinear")
            if line:
                _outline(axes, view.prediction, _MASK, "solid")
                _outline(axes, view.truth, _TRUTH, "dashed")
    if FALSE_POSITIVE not in [name for name, _ in cases]:
        left = _EDGE + len(cases) * (side + _GAP)
        said = (
            f"asked for {absent} times where it is not, always empty" if absent else "never asked for where it is not"
        )
        write(figure, left, 0.9, "No false positive", 12, LIGHT.text, bold=True)
        write(figure, left, 1.16, said, 9.5, LIGHT.muted)
    return figure


def strip_figure(rows: Sequence[CaseRow], found: Sequence[TargetSummary]) -> Figure:
    """DSC of every case that holds the target, a strip a target, with the mean and its 95 % interval."""
    first = [row for row in found if row.wordings == found[0].wordings]
    each, top, left = 0.62, 0.25, 3.2
    figure = new_figure(top + each * max(len(first), 1) + 0.75, LIGHT)
    axes = place_axes(figure, left, top, WIDE - left - _EDGE, each * max(len(first), 1), LIGHT, chart=True)
    axes.set(xlim=(-0.02, 1.02), ylim=(len(first) - 0.5, -0.5), yticks=[])
    axes.set_xticks(np.linspace(0, 1, 11))
    axes.grid(axis="x", color=LIGHT.line, linewidth=0.6)
    axes.set_xlabel("DSC    open circle: nothing was drawn    bar: mean and its 95 % interval", color=LIGHT.muted)
    for line, summary in enumerate(first):
        own = [row for row in rows if row.belongs and row.prompt == summary.target and row.overlap is not None]
        own.sort(key=_dsc)
        # neighbours in DSC get heights far apart, the same every time
        heights = line + 0.5 * (np.arange(len(own)) * 0.618 % 1 - 0.5)
        for row, height in zip(own, heights, strict=True):
            axes.plot(_dsc(row), height, "o", ms=5, color=_OWN, alpha=0.65, mfc="none" if row.empty else _OWN)
        mean = summary.dsc
        if np.isfinite(mean.low):
            axes.plot([mean.low, mean.high], [line, line], color=_ERROR, lw=3, solid_capstyle="butt")
        if mean.n:
            axes.plot(mean.mean, line, "|", ms=20, mew=2.5, color=_ERROR)
        middle = top + (line + 0.5) * each
        write(figure, _EDGE, middle, summary.target, 12, LIGHT.text, bold=True)
        write(
            figure,
            _EDGE,
            middle + 0.2,
            f"{mean.n} case{'' if mean.n == 1 else 's'}, {summary.method}",
            9.5,
            LIGHT.muted,
        )
    return figure


def calibration_figure(one: TargetCalibration) -> Figure:
    """One target: reliability of the probability, error rate by uncertainty, and every case's uncertainty and error."""
    figure = new_figure(4.9, LIGHT)
    write(figure, _EDGE, 0.42, f"{one.target}: uncertainty and error", 15, LIGHT.text, bold=True)
    write(figure, WIDE - _EDGE, 0.42, f"{one.cases} cases, {one.method}", 11, LIGHT.muted, right=True)
    wide, gap = 4.3, 0.75
    lefts = [_EDGE + 0.55 + place * (wide + gap) for place in range(3)]
    chart, counts = _chart_pair(figure, lefts[0], wide, "Probability of the target: how often it is there")
    if one.probability:
        _reliability(chart, counts, one.probability["band"], one.probability["whole"])
    else:
        _say(chart, "zero-shot saliency is no probability")
        counts.set_axis_off()
    chart, counts = _chart_pair(figure, lefts[1], wide, f"Error rate by {SPREAD}, in the band")
    _error_rates(chart, counts, one.measures[SPREAD].errors["band"])
    _case_scatter(place_axes(figure, lefts[2], 0.95, wide, 3.35, LIGHT, chart=True), one)
    return figure


_CASE_HEADINGS = (
    *("case", "target", "asked", "method", "DSC", "NSD", "HD95", "slices with\ntarget", "absent slices\nempty"),
    *("score", "drawn"),
)


def _case_table(rows: Sequence[CaseRow]) -> str:
    return html_page.table(_CASE_HEADINGS, [_case_cells(row) for row in rows], small=True)


def _case_cells(row: CaseRow) -> tuple[str, ...]:
    found = row.overlap
    return (
        row.group,
        row.prompt,
        "" if row.asked == row.prompt else row.asked,
        row.method + (" (misread)" if row.misread else ""),
        *(("–",) * 3 if found is None else (f"{found.dsc:.3f}", f"{found.nsd:.3f}", f"{found.hd95:.1f} {row.unit}")),
        f"{row.target_slices} of {row.slices}",
        f"{row.absent_empty} of {row.absent_slices}" if row.absent_slices else "–",
        f"{row.score:.2f}",
        "nothing" + (" (missed)" if row.missed else "") if row.empty else f"{100 * row.drawn:.2g} %",
    )


def _chart_pair(figure: Figure, left: float, width: float, title: str) -> tuple[Axes, Axes]:
    """A chart over a narrow one for counts, on one x axis."""
    chart = place_axes(figure, left, 0.95, width, 2.5, LIGHT, chart=True)
    counts = place_axes(figure, left, 3.55, width, 0.75, LIGHT, chart=True)
    _title(chart, title)
    chart.tick_params(labelbottom=False)
    chart.grid(color=LIGHT.line, linewidth=0.6)
    counts.set_ylabel("voxels", color=LIGHT.muted, size=9)
    return chart, counts


def _reliability(chart: Axes, counts: Axes, band: Bins, whole: Bins) -> None:
    chart.plot([0, 1], [0, 1], color=_PALE, ls="dashed", lw=1)
    for bins, name, color in ((whole, "whole image", _PALE), (band, "band", _OWN)):
        error = bins.expected_calibration_error
        chart.plot(bins.means, bins.rates, "o-", ms=4, color=color, label=f"{name}: ECE {error:.3f}")
    chart.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    chart.set_ylabel("share in the target", color=LIGHT.muted, size=9)
    chart.legend(loc="upper left", fontsize=9, frameon=False, labelcolor=LIGHT.text)
    for bins, color in ((whole, _PALE), (band, _OWN)):
        counts.stairs(np.maximum(bins.counts, 0.5), bins.edges, color=color, fill=False, baseline=0.5)
    counts.set(xlim=(-0.02, 1.02), yscale="log", xlabel="probability")
    counts.xaxis.label.set(color=LIGHT.muted, size=9)


def _error_rates(chart: Axes, counts: Axes, bins: Bins) -> None:
    places = np.arange(len(bins.counts))
    chart.bar(places, np.nan_to_num(bins.rates), width=0.85, color=_ERROR)
    if np.isfinite(bins.rate):
        chart.axhline(bins.rate, color=_PALE, ls="dashed", lw=1, label=f"all voxels: {bins.rate:.3f}")
        chart.legend(loc="upper left", fontsize=9, frameon=False, labelcolor=LIGHT.text)
    chart.set(
        xlim=(-0.6, len(places) - 0.4), xticks=[], ylim=(0, max(0.6, 1.2 * float(np.nan_to_num(bins.rates).max())))
    )
    chart.set_ylabel("share wrong", color=LIGHT.muted, size=9)
    counts.bar(places, np.maximum(bins.counts, 0.5), width=0.85, color=_PALE, bottom=0)
    counts.set(xlim=(-0.6, len(places) - 0.4), yscale="log", ylim=(0.5, None), xlabel="standard deviation, from")
    counts.set_xticks(places, [f"{edge:g}" for edge in bins.edges[:-1]])
    counts.tick_params(labelsize=8)
    counts.xaxis.label.set(color=LIGHT.muted, size=9)


def _case_scatter(axes: Axes, one: TargetCalibration) -> None:
    found = one.measures[SPREAD].correlation
    said = f"Spearman {found.rho:+.2f} ({found.low:+.2f} to {found.high:+.2f})"
    _title(axes, f"Cases (n {found.n}): {said if np.isfinite(found.rho) else 'too few to rank'}")
    if not one.pairs:
        _say(axes, "no case has both")
        return
    uncertainty, error = zip(*one.pairs, strict=True)
    axes.plot(uncertainty, error, "o", ms=6, color=_OWN, alpha=0.7)
    axes.grid(color=LIGHT.line, linewidth=0.6)
    axes.set(xlim=(0, None), ylim=(0, None), xlabel=f"mean {SPREAD}", ylabel="1 - DSC")
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=LIGHT.muted, size=9)


def _say(axes: Axes, text: str) -> None:
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, color=LIGHT.text, size=9.5, ha="center", va="center")


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", size=11, color=LIGHT.text, pad=6)


def _outline(axes: Axes, mask: Any, color: str, style: str) -> None:
    if mask.any() and not mask.all():
        axes.contour(mask.astype(np.float32), levels=[0.5], colors=[color], linewidths=1.6, linestyles=style)


def _legend(figure: Figure) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color="#c99a1b", lw=2, ls="dashed", label="ground truth"),
        Line2D([], [], color=_MASK, lw=2, label="prediction"),
    ]
    figure.legend(
        handles=handles,
        loc="upper right",
        bbox_to_anchor=(1 - _EDGE / WIDE + 0.005, 1 - 0.12 / figure.get_figheight()),
        ncols=2,
        frameon=False,
        labelcolor=LIGHT.text,
        fontsize=11,
    )


def _dsc(row: CaseRow) -> float:
    assert row.overlap is not None
    return row.overlap.dsc
