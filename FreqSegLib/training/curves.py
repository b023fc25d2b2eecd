"""The log of a training run as a picture."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path


def draw_curves(log: Path, picture: Path, panels: Mapping[str, tuple[str, ...]]) -> None:
    """Columns of ``fit``'s log by step, a panel beside the other, as a PNG.

    Args:
        log: ``log.csv``.
        picture: the PNG; appears complete.
        panels: title to the beginnings of its columns' names, the first one drawn thick; panels of which the log has no
            column are left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with log.open(newline="", encoding="utf-8") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    found = {title: [key for key in rows[0] if key.startswith(starts)] for title, starts in panels.items()}
    shown = {title: keys for title, keys in found.items() if keys}
    figure = Figure(figsize=(5 * len(shown), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    steps = [row["step"] for row in rows]
    for axes, (title, keys) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        first = panels[title][0]
        for key in keys:
            thick = key == first
            axes.plot(
                steps,
                [row[key] for row in rows],
                linewidth=2.2 if thick else 1.0,
                marker="o" if thick else None,
                markersize=3,
                label=key,
            )
        axes.set(xlabel="step", title=title)
        axes.grid(alpha=0.3)
        if len(keys) > 1:
            axes.legend(fontsize=7)
    temporary = picture.with_name(picture.name + ".part")
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, picture)
