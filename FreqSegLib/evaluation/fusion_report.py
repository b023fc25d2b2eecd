"""A fused pair as pictures: CT, MR, fused, differences, masks, and every metric beside the plain rules and its ceiling.

The page holds its pictures inside, so that it can be sent as one file.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.evaluation import html_page
from FreqSegLib.evaluation.drawing import DARK, WIDE, new_figure, place_axes, write
from FreqSegLib.evaluation.fusion_comparison import OVERSHOOT, Comparison, best_methods, number
from FreqSegLib.evaluation.fusion_metrics import METRICS
from FreqSegLib.sheet import FOOTER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from FreqSegLib.volume_fusion import Pair

_OWN, _LIMIT = "#ffb454", "#80ed99"
_RULES = ("#4cc9f0", "#ff6b6b", "#b892ff", "#5ad1a5", "#d0d7e2")
_MARKS = ("s", "^", "D", "v", "P")
_DIFFERENCE, _SHARE = "RdBu_r", "coolwarm"


@dataclass(frozen=True, eq=False)
class Shown:
    """One slice to draw, every picture (h, w) with grey levels 0 to 255.

    Attributes:
        title: which slice.
        ct, mr, fused: the pictures.
        masks: the CT's share of each band in per cent, by name, at the slice's size; may be empty.
        aspect: height of a pixel over its width.
    """

    title: str
    ct: NDArray[Any]
    mr: NDArray[Any]
    fused: NDArray[Any]
    masks: Mapping[str, NDArray[Any]]
    aspect: float = 1.0


def shown_slice(pair: Pair, fused: NDArray[Any], index: int, masks: Mapping[str, NDArray[Any]] | None = None) -> Shown:
    """Slice ``index`` of a fused pair.

    Args:
        pair: the sources.
        fused: (k, j, i) grey levels 0 to 255 on the CT's grid.
        index: of the slice in the stack.
        masks: (k, j, i) per cent by band.
    """
    stack = pair.stack
    ct, mr, _ = pair.slices(range(index, index + 1))
    title = "" if stack.count == 1 else f"{stack.axis} slice {index + 1} of {stack.count}"
    return Shown(
        title=title,
        ct=255 * ct[0],
        mr=255 * mr[0],
        fused=stack.displayed(fused)[index],
        masks={name: stack.displayed(values)[index] for name, values in (masks or {}).items()},
        aspect=stack.pixel_spacing[0] / stack.pixel_spacing[1],
    )


def best_slice(pair: Pair, indices: Sequence[int]) -> int:
    """The slice among ``indices`` with the most to see in both sources."""

    def content(index: int) -> float:
        ct, mr, _ = pair.slices(range(index, index + 1))
        return min(float(np.minimum(ct, 0.5).sum()), float(np.minimum(mr, 0.5).sum()))

    return max(indices, key=content)


def pictures_figure(shown: Shown, name: str) -> Figure:
    """CT, MR, fused image, its differences to both, and the masks, 1600 pixels wide.

    Args:
        shown: the slice.
        name: of the method.
    """
    panels = [
        ("CT", shown.ct, "gray", (0.0, 255.0)),
        ("MR", shown.mr, "gray", (0.0, 255.0)),
        (f"Fused: {name}", shown.fused, "gray", (0.0, 255.0)),
        ("Fused − CT", np.subtract(shown.fused, shown.ct), _DIFFERENCE, (-255.0, 255.0)),
        ("Fused − MR", np.subtract(shown.fused, shown.mr), _DIFFERENCE, (-255.0, 255.0)),
    ]
    masks = [(f"CT share, {band} (%)", values, _SHARE, (0.0, 100.0)) for band, values in shown.masks.items()]
    height, width = shown.ct.shape
    ratio = float(np.clip(height * shown.aspect / width, 0.4, 1.6))
    large, small = 5, max(5, min(len(masks), 5))
    edge, gap, title = 0.3, 0.18, 0.34
    side = (WIDE - 2 * edge - (large - 1) * gap) / large
    little = (WIDE - 2 * edge - (small - 1) * gap) / small
    lines = -(-len(masks) // small)
    top = 0.75
    down = top + title + side * ratio + lines * (title + little * ratio + 0.1) + 0.55
    figure = new_figure(down)
    write(figure, edge, 0.45, f"CT and MR fused by {name}", 17, DARK.text, bold=True)
    write(figure, WIDE - edge, 0.45, shown.title, 12, DARK.muted, right=True)
    for place, panel in enumerate(panels):
        _panel(figure, edge + place * (side + gap), top + title, side, side * ratio, *panel, shown.aspect)
    below = top + title + side * ratio + 0.1
    for place, panel in enumerate(masks):
        line, column = divmod(place, small)
        y = below + title + line * (little * ratio + title + 0.1)
        _panel(figure, edge + column * (little + gap), y, little, little * ratio, *panel, shown.aspect)
    write(figure, edge, down - 0.15, FOOTER, 10, DARK.muted)
    if masks:
        note = "Differences: red is brighter than the source, blue darker. Masks: red comes from the CT, blue the MR."
    else:
        note = "Differences: red is brighter than the source, blue darker."
    write(figure, WIDE - edge, down - 0.15, note, 10, DARK.muted, right=True)
    return figure


def metrics_figure(comparison: Comparison) -> Figure:
    """Every metric as a small scale of its own: the fused image, the plain rules, and the ceiling, 1600 pixels wide."""
    lines = [(m.key, f"{m.title}{f', {m.unit}' if m.unit else ''}", m.better) for m in METRICS]
    lines.append((OVERSHOOT, "at bone edges, grey levels", -1))
    columns, edge, gap = 2, 0.3, 0.5
    rows = -(-len(lines) // columns)
    each, top = 0.8, 1.25
    figure = new_figure(top + rows * each + 0.45)
    own, *rules = comparison.rows
    write(figure, edge, 0.45, "Every metric, with what the pair allows", 17, DARK.text, bold=True)
    write(figure, WIDE - edge, 0.45, comparison.measured, 12, DARK.muted, right=True)
    _legend(figure, own, rules, edge, 0.85)
    wide = (WIDE - 2 * edge - (columns - 1) * gap) / columns
    for place, (key, label, better) in enumerate(lines):
        column, row = divmod(place, rows)
        left, y = edge + column * (wide + gap), top + row * each
        write(figure, left, y + 0.3, key, 12, DARK.text, bold=True)
        write(figure, left, y + 0.5, label + ("" if better > 0 else " (less is better)"), 8, DARK.muted)
        axes = place_axes(figure, left + 2.75, y + 0.12, wide - 2.75 - 1.0, 0.3)
        _scale(axes, comparison, key)
        best = own in best_methods(comparison, key, better)
        value = number(comparison.rows[own][key])
        write(figure, left + wide, y + 0.36, value, 13, _OWN if best else DARK.text, bold=best, right=True)
    foot = "Right: the fused image's value, coloured where no plain rule beats it. Each scale ends at its extremes."
    bottom = figure.get_figheight() - 0.15
    write(figure, edge, bottom, FOOTER, 10, DARK.muted)
    write(figure, WIDE - edge, bottom, foot, 10, DARK.muted, right=True)
    return figure


def report_page(
    shown: Sequence[Shown], comparison: Comparison, name: str, facts: Sequence[tuple[str, str]], notes: Sequence[str]
) -> str:
    """The whole report as one HTML page.

    Args:
        shown: slices to draw, the most telling first.
        comparison: from ``fusion_comparison.compare``.
        name: of the method.
        facts: what the reader should know, as (name, value).
        notes: warnings and remarks, a sentence each.
    """
    images = [
        *(("CT, MR, fused image, differences and masks", pictures_figure(one, name)) for one in shown),
        ("Every metric with its ceiling", metrics_figure(comparison)),
    ]
    coloured = "Coloured: the best of each row. The plain rules are measured on the same slices."
    body = [
        html_page.facts(facts),
        html_page.bullets(notes),
        *(html_page.picture(figure, alt) for alt, figure in images),
        html_page.heading("The numbers"),
        html_page.paragraph(f"{comparison.measured}. {coloured}"),
        _html_table(comparison),
    ]
    return html_page.page(f"FreqSeg: CT and MR fused by {name}", "\n".join(body))


def _html_table(comparison: Comparison) -> str:
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in ("metric", *comparison.rows, "ceiling", "reached by"))
    lines = []
    for metric in METRICS:
        best = best_methods(comparison, metric.key, metric.better)
        limit = comparison.ceilings[metric.key]
        cells = "".join(
            f'<td class="{"best" if name in best else ""}">{number(row[metric.key])}</td>'
            for name, row in comparison.rows.items()
        )
        unit = f", {metric.unit}" if metric.unit else ""
        head = f"<b>{metric.key}</b> <span>{html.escape(metric.title)}{unit}; {html.escape(metric.of)}</span>"
        lines.append(
            f"<tr><th>{head}</th>{cells}<td>{number(limit.value)}</td>"
            f'<td class="why">{html.escape(limit.why)}</td></tr>'
        )
    cells = "".join(f"<td>{number(row[OVERSHOOT])}</td>" for row in comparison.rows.values())
    why = "0 where nothing leaves the sources' range"
    lines.append(
        f"<tr><th><b>overshoot</b> <span>beside the CT's bone edges, grey levels</span></th>{cells}"
        f'<td>0</td><td class="why">{why}</td></tr>'
    )
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _panel(
    figure: Figure,
    left: float,
    top: float,
    width: float,
    height: float,
    title: str,
    picture: NDArray[Any],
    colours: str,
    limits: tuple[float, float],
    aspect: float,
) -> None:
    axes = place_axes(figure, left, top, width, height)
    axes.set_title(title, loc="left", size=11, color=DARK.text, pad=6)
    axes.imshow(picture, cmap=colours, vmin=limits[0], vmax=limits[1], aspect=aspect, interpolation="nearest")


def _legend(figure: Figure, own: str, rules: Sequence[str], left: float, top: float) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker="o", ls="", color=_OWN, markersize=9, label=own)]
    handles += [
        Line2D([], [], marker=_MARKS[i], ls="", color=_RULES[i], markersize=6, label=rule)
        for i, rule in enumerate(rules)
    ]
    handles.append(Line2D([], [], color=_LIMIT, ls=(0, (2, 1.5)), lw=2, label="ceiling (for Nabf: floor)"))
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(left / figure.get_figwidth() - 0.005, 1 - (top - 0.22) / figure.get_figheight()),
        ncols=len(handles),
        frameon=False,
        labelcolor=DARK.text,
        fontsize=11,
        handletextpad=0.3,
        columnspacing=1.6,
    )


def _scale(axes: Axes, comparison: Comparison, key: str) -> None:
    """One metric: values as marks on a line, the ceiling as an upright."""
    axes.set_facecolor(DARK.card)
    limit = comparison.ceilings[key].value if key in comparison.ceilings else 0.0
    values = {name: row[key] for name, row in comparison.rows.items()}
    finite = [value for value in (*values.values(), limit) if value is not None and np.isfinite(value)]
    if not finite:
        return
    low, high = min(finite), max(finite)
    room = 0.06 * (high - low) or 0.5
    axes.set(xlim=(low - room, high + room), ylim=(-1, 1))
    axes.axhline(0, color=DARK.line, linewidth=1)
    if limit is not None:
        axes.axvline(limit, color=_LIMIT, linewidth=2, linestyle=(0, (2, 1.5)))
    own, *rules = values
    for place, rule in enumerate(rules):
        axes.plot(values[rule], 0, _MARKS[place], color=_RULES[place], markersize=6, alpha=0.95)
    axes.plot(values[own], 0, "o", color=_OWN, markersize=9.5, markeredgecolor=DARK.page, zorder=5)
    # the two ends as numbers, under the line they belong to
    for value, side in ((low, "left"), (high, "right")):
        axes.annotate(
            number(value),
            (value, -1),
            xytext=(0, -3),
            textcoords="offset points",
            color=DARK.muted,
            size=8,
            ha=side,
            va="top",
            annotation_clip=False,
        )
