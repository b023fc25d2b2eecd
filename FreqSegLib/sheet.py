"""Pictures of a result: a sheet a slice with every stage, and one overview for a page.

Drawn with matplotlib's objects on an Agg canvas, so neither a display nor global state is touched.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.errors import InputError
from FreqSegLib.output_file import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from FreqSegLib.text_segmentation import Intermediate, PromptResult

FOOTER = "FreqSeg - research use, not for diagnosis"
DPI = 100

_PAGE, _CARD, _LINE, _PALE = "#0e1217", "#171d25", "#2b3440", "#4a5766"
_TEXT, _MUTED = "#e9edf2", "#93a0af"
_TRUTH, _BOX, _POSITIVE, _NEGATIVE = "#ffd166", "#4cc9f0", "#80ed99", "#ff6b6b"
_HEAT, _DOUBT = "inferno", "viridis"

_PANEL_WIDTH, _GAP, _TITLE, _HEADER, _BOTTOM = 3.5, 0.18, 0.34, 0.86, 0.42
_SMALLEST_RATIO, _LARGEST_RATIO = 0.5, 1.4


def sheet_name(prompt: str, index: int) -> str:
    """File name of the sheet of slice ``index`` (from 0); names count from 1, as titles do."""
    return f"{_safe(prompt)}-slice-{index + 1:03d}.png"


def old_sheets(folder: Path, prompt: str | None = None) -> list[Path]:
    """Sheets that lie in a folder, of one prompt or of any."""
    pattern = re.compile(rf"{re.escape(_safe(prompt)) if prompt is not None else '.+'}-slice-\d{{3,}}\.png")
    return sorted(path for path in folder.glob("*.png") if pattern.fullmatch(path.name)) if folder.is_dir() else []


def write_sheets(
    result: PromptResult,
    folder: str | Path,
    *,
    pixel_spacing: tuple[float, float] = (1.0, 1.0),
    plane: str = "image",
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write a PNG a slice that shows every stage, from the input to the final outline.

    Args:
        result: of ``TextSegmenter.segment(..., return_intermediate=True)``.
        folder: where to; made if it is missing.
        pixel_spacing: distance of rows and of columns in mm, for the right aspect.
        plane: ``axial``, ``coronal``, ``sagittal`` or ``image``, for the title.
        overwrite: whether files of the same names may be replaced.
        progress: told how many are done.

    Returns:
        The files, in the order of the slices; all of them appear, or none.

    Raises:
        InputError: the result was made without its stages.
        OutputError: a file exists, or the folder cannot be written.
    """
    if not result.intermediates:
        raise InputError(f"'{result.name}' was segmented without keeping its stages; ask for return_intermediate=True")
    paths = [Path(folder) / sheet_name(result.name, item.index) for item in result.intermediates]
    with replacing(paths, overwrite=overwrite) as temporaries:
        for done, (item, path) in enumerate(zip(result.intermediates, temporaries, strict=True), start=1):
            figure = sheet_figure(result, item, pixel_spacing=pixel_spacing, plane=plane)
            path.write_bytes(png(figure, colours=None))
            if progress is not None:
                progress(done)
    return paths


def sheet_figure(
    result: PromptResult, item: Intermediate, *, pixel_spacing: tuple[float, float] = (1.0, 1.0), plane: str = "image"
) -> Figure:
    """One slice's sheet; see :func:`write_sheets`."""
    panels = _panels(result, item)
    wide = len(panels) % 2 == 0
    cells = len(panels) + (2 if wide else 1)
    columns = cells // 2
    height, width = item.image.shape
    ratio = float(np.clip(height * pixel_spacing[0] / (width * pixel_spacing[1]), _SMALLEST_RATIO, _LARGEST_RATIO))
    page = _Page(columns, 2, ratio)
    for position, panel in enumerate(panels):
        axes = page.cell(position, panel.title)
        _show_image(axes, item.image if panel.picture is None else panel.picture, pixel_spacing, panel.limits)
        panel.draw(axes)
        if panel.bar is not None:
            page.colour_bar(axes, *panel.bar)
    _draw_scores(page.cell(len(panels), "Score of each slice", span=2 if wide else 1), result, item)
    count = len(result.intermediates)
    where = "" if count == 1 else f"{plane + ' ' if plane != 'image' else ''}slice {item.index + 1} of {count}    "
    outcome = "outlined" if item.mask.any() else "left empty"
    page.header(f"“{result.name}”", f"{where}score {item.probability:.2f}    {outcome}", result.color)
    return page.figure


@dataclass(frozen=True)
class _Panel:
    title: str
    draw: Callable[[Axes], None] = lambda axes: None
    picture: NDArray[Any] | None = None
    limits: tuple[float, float] = (0.0, 1.0)
    bar: tuple[str, float, float] | None = None


def _panels(result: PromptResult, item: Intermediate) -> list[_Panel]:
    first = "Probability" if result.method == "trained" else "Saliency of the input"
    names = {"raw": first, "low": "Saliency, low frequencies", "high": "Saliency, high frequencies"}
    panels = [
        _Panel("Input"),
        *(
            _Panel(f"{'Low' if name == 'low' else 'High'}-frequency image", picture=item.frequency[name])
            for name in ("low", "high")
            if name in item.frequency
        ),
        *(
            _Panel(names[name], _heat(item.saliency[name], _HEAT, 1.0, opaque=True), bar=(_HEAT, 0.0, 1.0))
            for name in ("raw", "low", "high")
            if name in item.saliency
        ),
        _Panel("Fused saliency on the input", _heat(item.fused, _HEAT, 1.0), bar=(_HEAT, 0.0, 1.0)),
    ]
    if item.uncertainty is not None and result.uncertainty is not None and result.uncertainty.any():
        most = float(result.uncertainty.max())
        panels.append(
            _Panel(
                "Uncertainty (standard deviation)",
                _heat(item.uncertainty, _DOUBT, most, opaque=True),
                bar=(_DOUBT, 0.0, most),
            )
        )
    boxes, points = any(p.box is not None for p in item.prompts), any(len(p.points) for p in item.prompts)
    asked = " and ".join(kind for kind, there in (("boxes", boxes), ("points", points)) if there)
    title = f"Coarse mask, {asked} for SAM" if asked else "Coarse mask (empty)"
    panels.append(_Panel(title, lambda axes: _draw_prompts(axes, item, result.color)))
    panels.append(_Panel("Result", lambda axes: _draw_mask(axes, item.mask, result.color)))
    return panels


def overview_figure(
    result: PromptResult,
    *,
    truth: NDArray[np.bool_] | None = None,
    label: str = "input",
    facts: str = "",
    note: str = "",
    pixel_spacing: tuple[float, float] = (1.0, 1.0),
    neighbours: int = 9,
) -> Figure:
    """One picture for a page: input, saliency and result where there is most of it, and a strip of neighbours.

    Args:
        result: of ``TextSegmenter.segment(..., return_intermediate=True)``.
        truth: (S, h, w) reference mask in the stack's orientation, drawn as an outline.
        label: what the input is, like ``simulated FLAIR``.
        facts: numbers for the right of the header.
        note: a sentence for the right of the footer.
        pixel_spacing: distance of rows and of columns in mm.
        neighbours: slices in the strip at most.

    Returns:
        A figure 1600 pixels wide at ``DPI``.

    Raises:
        InputError: the result was made without its stages.
    """
    items = result.intermediates
    if not items:
        raise InputError(f"'{result.name}' was segmented without keeping its stages; ask for return_intermediate=True")
    crop = _content(np.stack([item.image for item in items]))
    best = _most(items, truth)
    height, width = items[best].image[crop].shape
    ratio = height * pixel_spacing[0] / (width * pixel_spacing[1])
    page = _Overview(float(np.clip(ratio, _SMALLEST_RATIO, _LARGEST_RATIO)), _strip(best, len(items), neighbours))
    item = items[best]

    def outline(axes: Axes, index: int, width: float) -> None:
        _draw_mask(axes, items[index].mask[crop], result.color, line=width)
        if truth is not None:
            _outline(axes, truth[index][crop], _TRUTH, width, dashed=True)

    axes = page.panel(0, label[:1].upper() + label[1:])
    _show_image(axes, item.image[crop], pixel_spacing)
    axes = page.panel(1, "Where the model looked")
    _show_image(axes, item.image[crop], pixel_spacing)
    most = float(item.fused.max()) or 1.0
    _heat(item.fused[crop], _HEAT, most)(axes)
    page.colour_bar(axes, _HEAT, 0.0, most)
    axes = page.panel(2, "Result" if truth is None else "Result and truth")
    _show_image(axes, item.image[crop], pixel_spacing)
    outline(axes, best, 2.2)
    _legend(axes, result, truth is not None)
    for position, index in enumerate(page.strip):
        axes = page.thumbnail(position, f"{index + 1}", index == best)
        _show_image(axes, items[index].image[crop], pixel_spacing)
        outline(axes, index, 1.2)
    page.header(f"“{result.name}”", facts, result.color)
    page.footer(note)
    return page.figure


def png(figure: Figure, *, colours: int | None = 256) -> bytes:
    """A figure as PNG; with at most ``colours`` in a palette it is a fraction of the size."""
    from PIL import Image

    buffer = io.BytesIO()
    fast = {"compress_level": 4}
    figure.savefig(buffer, format="png", dpi=DPI, facecolor=figure.get_facecolor(), pil_kwargs=fast)
    if colours is None:
        return buffer.getvalue()
    picture = Image.open(buffer).convert("RGB")
    picture = picture.quantize(palette=_palette(np.asarray(picture), colours), dither=Image.Dither.NONE)
    packed = io.BytesIO()
    picture.save(packed, format="png", optimize=True)
    return packed.getvalue()


def _palette(pixels: NDArray[np.uint8], colours: int) -> Any:
    """Greys and colours each get their share: left to themselves, the greys of a scan take all of a palette."""
    from matplotlib import colormaps
    from PIL import Image

    page = np.array([[int(name[i : i + 2], 16) for i in (1, 3, 5)] for name in (_PAGE, _CARD, _LINE, _TEXT, _MUTED)])
    greys = np.linspace(0, 255, colours // 3)[:, None].repeat(3, 1)
    coloured = pixels[np.ptp(pixels.astype(np.int16), axis=2) > 8]
    heat = 255 * np.asarray(colormaps[_HEAT](np.linspace(0, 1, colours // 8)))[:, :3]
    parts = [page, greys, heat]
    if len(coloured):
        # What is common counts for little more than what is rare, or the page would outweigh the maps.
        codes, counts = np.unique(coloured.astype(np.uint32) @ (65536, 256, 1), return_counts=True)
        shades = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=-1).astype(np.uint8)
        weighed = shades.repeat(np.minimum(counts, 40), axis=0)
        room = colours - sum(len(part) for part in parts)
        few = Image.fromarray(weighed[None]).quantize(room, method=Image.Quantize.MEDIANCUT).getpalette() or []
        parts.append(np.array(few[: 3 * room]).reshape(-1, 3))
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.concatenate(parts).astype(np.uint8).ravel().tolist())
    return palette


class _Page:
    """A dark page of equal cells under a header."""

    def __init__(self, columns: int, rows: int, ratio: float) -> None:
        self.columns = columns
        self._panel = (_PANEL_WIDTH, _PANEL_WIDTH * ratio)
        width = columns * (_PANEL_WIDTH + _GAP) + _GAP
        height = _HEADER + rows * (self._panel[1] + _TITLE + _GAP) + _BOTTOM
        self.figure = _figure(width, height)

    def cell(self, position: int, title: str, span: int = 1) -> Axes:
        """Axes of the cell number ``position``, row by row, over ``span`` columns."""
        row, column = divmod(position, self.columns)
        left = _GAP + column * (self._panel[0] + _GAP)
        top = _HEADER + row * (self._panel[1] + _TITLE + _GAP) + _TITLE
        width = span * self._panel[0] + (span - 1) * _GAP
        return _titled(_axes(self.figure, left, top, width, self._panel[1]), title, 10.5)

    def colour_bar(self, axes: Axes, colours: str, low: float, high: float) -> None:
        _colour_bar(axes, colours, low, high)

    def header(self, title: str, facts: str, color: tuple[float, float, float]) -> None:
        _header(self.figure, title, facts, color, _GAP)
        _write(self.figure, _GAP, self.figure.get_figheight() - 0.16, FOOTER, 9, _MUTED)


class _Overview:
    """Three large panels over a strip of small ones, 1600 pixels wide."""

    def __init__(self, ratio: float, strip: Sequence[int]) -> None:
        self.strip = strip if len(strip) > 1 else ()
        edge, gap = 0.3, 0.2
        self._edge, self._gap = edge, gap
        wide = (16 - 2 * edge - 2 * gap) / 3
        self._panel = (wide, wide * min(ratio, 1.2))
        small = (16 - 2 * edge - (max(len(strip), 7) - 1) * 0.1) / max(len(strip), 7)
        self._small = (small, small * min(ratio, 1.25))
        self._below = _HEADER + 0.34 + self._panel[1] + 0.2
        strip_height = self._small[1] + 0.1 if len(strip) > 1 else 0.0
        self.figure = _figure(16.0, self._below + strip_height + 0.45)

    def panel(self, position: int, title: str) -> Axes:
        left = self._edge + position * (self._panel[0] + self._gap)
        return _titled(_axes(self.figure, left, _HEADER + 0.34, *self._panel), title, 13)

    def thumbnail(self, position: int, title: str, chosen: bool) -> Axes:
        axes = _axes(self.figure, self._edge + position * (self._small[0] + 0.1), self._below, *self._small)
        axes.text(0.05, 0.95, title, transform=axes.transAxes, color=_TEXT if chosen else _MUTED, size=10, va="top")
        if chosen:
            for spine in axes.spines.values():
                spine.set(edgecolor=_TEXT, linewidth=1.5)
        return axes

    def colour_bar(self, axes: Axes, colours: str, low: float, high: float) -> None:
        _colour_bar(axes, colours, low, high)

    def header(self, title: str, facts: str, color: tuple[float, float, float]) -> None:
        _header(self.figure, title, facts, color, self._edge)

    def footer(self, note: str) -> None:
        bottom = self.figure.get_figheight() - 0.17
        _write(self.figure, self._edge, bottom, FOOTER, 10, _MUTED)
        _write(self.figure, 16 - self._edge, bottom, note, 10, _MUTED, right=True)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Whole pixels: a fraction of a row at the edge would be drawn half transparent.
    size = (round(width * DPI) / DPI, round(height * DPI) / DPI)
    figure = Figure(figsize=size, dpi=DPI, facecolor=_PAGE)
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in inches from the top left."""
    across, down = figure.get_figwidth(), figure.get_figheight()
    axes = figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down), facecolor="black")
    axes.xaxis.set_visible(False)
    axes.yaxis.set_visible(False)
    for spine in axes.spines.values():
        spine.set(edgecolor=_LINE, linewidth=0.8)
    return axes


def _titled(axes: Axes, title: str, size: float) -> Axes:
    axes.set_title(title, loc="left", size=size, color=_TEXT, pad=0.6 * size)
    return axes


def _write(
    figure: Figure,
    left: float,
    bottom: float,
    text: str,
    size: float,
    color: Any,
    *,
    bold: bool = False,
    right: bool = False,
) -> None:
    figure.text(
        left / figure.get_figwidth(),
        1 - bottom / figure.get_figheight(),
        text,
        size=size,
        color=color,
        weight="bold" if bold else "normal",
        ha="right" if right else "left",
        va="baseline",
        parse_math=False,
    )


def _header(figure: Figure, title: str, facts: str, color: tuple[float, float, float], edge: float) -> None:
    from matplotlib.patches import Rectangle

    across, down = figure.get_figwidth(), figure.get_figheight()
    figure.add_artist(
        Rectangle(
            (edge / across, 1 - 0.62 / down), 0.06 / across, 0.38 / down, color=color, transform=figure.transFigure
        )
    )
    longest = int(across * 4.2)
    shown = title if len(title) <= longest else title[: longest - 2] + "…”"
    _write(figure, edge + 0.18, 0.54, shown, 18, _TEXT, bold=True)
    _write(figure, across - edge, 0.54, facts, 12, _MUTED, right=True)


def _show_image(
    axes: Axes, picture: NDArray[Any], pixel_spacing: tuple[float, float], limits: tuple[float, float] = (0.0, 1.0)
) -> None:
    axes.imshow(
        picture,
        cmap="gray",
        vmin=limits[0],
        vmax=limits[1],
        aspect=pixel_spacing[0] / pixel_spacing[1],
        interpolation="bilinear",
    )


def _heat(values: NDArray[np.float32], colours: str, most: float, *, opaque: bool = False) -> Callable[[Axes], None]:
    """Draws a map over the panel's picture: alone, or so that low values let the picture through."""

    def draw(axes: Axes) -> None:
        scaled = np.clip(values / most, 0, 1)
        # The panel's own image fixes aspect and extent.
        axes.imshow(
            values,
            cmap=colours,
            vmin=0.0,
            vmax=most,
            alpha=None if opaque else np.clip(scaled * 1.15, 0, 0.82),
            aspect=axes.get_aspect(),
            interpolation="bilinear",
        )

    return draw


def _draw_mask(axes: Axes, mask: NDArray[np.bool_], color: tuple[float, float, float], line: float = 1.8) -> None:
    if mask.any():
        fill = np.zeros((*mask.shape, 4), dtype=np.float32)
        fill[mask] = (*color, 0.16)
        axes.imshow(fill, aspect=axes.get_aspect(), interpolation="nearest")
        _outline(axes, mask, color, line)


def _outline(axes: Axes, mask: NDArray[np.bool_], color: Any, line: float, *, dashed: bool = False) -> None:
    if not mask.any():
        return
    limits = axes.get_xlim(), axes.get_ylim()
    # A rim of background closes outlines at the border.
    padded = np.pad(mask, 1).astype(np.float32)
    height, width = padded.shape
    style = (0, (3, 2)) if dashed else "solid"
    axes.contour(
        np.arange(width) - 1,
        np.arange(height) - 1,
        padded,
        levels=[0.5],
        colors=[color],
        linewidths=line,
        linestyles=[style],
    )
    axes.set(xlim=limits[0], ylim=limits[1])


def _draw_prompts(axes: Axes, item: Intermediate, color: tuple[float, float, float]) -> None:
    from matplotlib.patches import Rectangle

    _draw_mask(axes, item.coarse, color, line=1.2)
    for prompt in item.prompts:
        if prompt.box is not None:
            x0, y0, x1, y1 = prompt.box
            axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=_BOX, linewidth=1.6))
        for (x, y), inside in zip(prompt.points, prompt.labels, strict=True):
            shape, tint = ("o", _POSITIVE) if inside else ("X", _NEGATIVE)
            axes.plot(x, y, shape, color=tint, markersize=7, markeredgecolor="black", markeredgewidth=0.8)


def _draw_scores(axes: Axes, result: PromptResult, item: Intermediate) -> None:
    """The score along the stack; this slice stands out."""
    scores = result.slice_scores
    places = np.arange(1, len(scores) + 1)
    outlined = np.array([one.mask.any() for one in result.intermediates])
    axes.set_facecolor(_CARD)
    colors = [result.color if found else _PALE for found in outlined]
    axes.bar(places, np.maximum(scores, 0.004), width=0.85 if len(scores) < 80 else 1.0, color=colors)
    axes.axvline(item.index + 1, color=_TEXT, linewidth=1, linestyle=(0, (2, 2)))
    axes.set(
        xlim=(0.3, len(scores) + 0.7), ylim=(0, 1.06), yticks=[0.5, 1], xticks=sorted({1, item.index + 1, len(scores)})
    )
    axes.xaxis.set_visible(True)
    axes.yaxis.set_visible(True)
    axes.tick_params(colors=_MUTED, labelsize=9, length=0)
    axes.tick_params(axis="y", pad=-4, labelcolor=_TEXT)
    axes.set_axisbelow(False)
    for text in axes.get_yticklabels():
        text.set(ha="left", va="bottom")
    for height in (0.5, 1):
        axes.axhline(height, color=_LINE, linewidth=0.6, zorder=0)


def _colour_bar(axes: Axes, colours: str, low: float, high: float) -> None:
    """A thin bar inside the panel, at the right."""
    inset = axes.inset_axes((0.945, 0.06, 0.022, 0.36))
    inset.imshow(np.linspace(1, 0, 128)[:, None], cmap=colours, aspect="auto")
    inset.xaxis.set_visible(False)
    inset.yaxis.set_visible(False)
    for spine in inset.spines.values():
        spine.set(edgecolor=_LINE, linewidth=0.6)
    for place, value in ((0.06, low), (0.42, high)):
        axes.text(
            0.93,
            place,
            f"{value:.2g}",
            transform=axes.transAxes,
            color=_TEXT,
            size=8,
            ha="right",
            va="bottom" if value == low else "top",
            bbox={"facecolor": _PAGE, "alpha": 0.6, "linewidth": 0, "pad": 1.5},
        )


def _legend(axes: Axes, result: PromptResult, with_truth: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=result.color, linewidth=2.2, label="FreqSeg")]
    if with_truth:
        handles.append(Line2D([], [], color=_TRUTH, linewidth=2.2, linestyle=(0, (3, 2)), label="truth"))
    axes.legend(
        handles=handles,
        loc="lower right",
        fontsize=11,
        labelcolor=_TEXT,
        facecolor=_PAGE,
        edgecolor=_LINE,
        framealpha=0.85,
    )


def _most(items: Sequence[Intermediate], truth: NDArray[np.bool_] | None) -> int:
    """The slice with the most result and truth; where there is neither, with the most saliency."""
    sizes = np.array([int(item.mask.sum()) for item in items])
    if truth is not None:
        sizes += truth.sum((1, 2))
    if not sizes.any():
        sizes = np.array([float(item.fused.sum()) for item in items])
    return int(sizes.argmax())


def _strip(best: int, count: int, most: int) -> list[int]:
    """At most ``most`` slices around ``best``."""
    shown = min(most, count)
    first = int(np.clip(best - shown // 2, 0, count - shown))
    return list(range(first, first + shown))


def _content(images: NDArray[np.float32]) -> tuple[slice, slice]:
    """Rows and columns of (S, h, w) that hold anything, with a small margin."""
    seen: NDArray[np.bool_] = np.any(images > 0.08, axis=0)
    if not seen.any():
        return slice(None), slice(None)
    margin = max(2, round(0.03 * max(seen.shape)))
    found = []
    for axis in (1, 0):
        places = np.flatnonzero(seen.any(axis))
        found.append(slice(max(0, int(places[0]) - margin), int(places[-1]) + 1 + margin))
    return found[0], found[1]


def _safe(prompt: str) -> str:
    return re.sub(r"\W+", "_", prompt).strip("_")[:60] or "segment"
