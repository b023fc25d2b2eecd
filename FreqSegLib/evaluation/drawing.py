"""Figures of the reports: whole pixels, places in inches from the top left, two colour themes, no global state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE = 16.0
"""Width of every figure in inches; 1600 pixels."""


@dataclass(frozen=True)
class Theme:
    """Colours of a page and of the figures on it."""

    page: str
    card: str
    line: str
    text: str
    muted: str


DARK = Theme("#0e1217", "#171d25", "#2b3440", "#e9edf2", "#93a0af")
# a grey that the palette of ``sheet.png`` keeps, so that figures have no edge on the page
LIGHT = Theme("#f8f8f8", "#ffffff", "#cbd3dc", "#16202b", "#5a6876")


def new_figure(height: float, theme: Theme = DARK) -> Figure:
    """An empty figure, ``WIDE`` across and ``height`` inches down."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # whole pixels: a fraction of a row at the edge would be drawn half transparent
    figure = Figure(figsize=(WIDE, round(height * 100) / 100), dpi=100, facecolor=theme.page)
    FigureCanvasAgg(figure)
    return figure


def place_axes(
    figure: Figure, left: float, top: float, width: float, height: float, theme: Theme = DARK, *, chart: bool = False
) -> Axes:
    """Axes at a place in inches from the top left: for a picture, without ticks, or for a chart."""
    across, down = figure.get_figwidth(), figure.get_figheight()
    axes = figure.add_axes(
        (left / across, 1 - (top + height) / down, width / across, height / down),
        facecolor=theme.card if chart else "black",
    )
    for spine in axes.spines.values():
        spine.set(edgecolor=theme.line, linewidth=0.8)
    if chart:
        axes.tick_params(colors=theme.muted, labelcolor=theme.text, labelsize=9, length=3)
        axes.set_axisbelow(True)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
    return axes


def write(
    figure: Figure,
    left: float,
    down: float,
    text: str,
    size: float,
    color: str,
    *,
    bold: bool = False,
    right: bool = False,
) -> None:
    """Text whose baseline lies ``down`` inches below the top, from ``left`` on or, ``right``, up to it."""
    figure.text(
        left / figure.get_figwidth(),
        1 - down / figure.get_figheight(),
        text,
        size=size,
        color=color,
        weight="bold" if bold else "normal",
        ha="right" if right else "left",
        parse_math=False,
    )
