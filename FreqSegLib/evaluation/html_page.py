"""A report as one HTML page that holds its pictures inside, so that it can be sent as one file, and printed."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from FreqSegLib.evaluation.drawing import DARK, Theme
from FreqSegLib.sheet import FOOTER, png

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def page(title: str, body: str, theme: Theme = DARK) -> str:
    """A whole page.

    Args:
        title: plain text.
        body: HTML, made of the parts below.
        theme: on the screen; printed, every page is dark on white.
    """
    colours = {name: getattr(theme, name) for name in ("page", "card", "line", "text", "muted")}
    return _PAGE.format(title=html.escape(title), body=body, footer=html.escape(FOOTER), **colours)


def heading(text: str, level: int = 2) -> str:
    """A heading of plain text."""
    return f"<h{level}>{html.escape(text)}</h{level}>"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values, plain text."""
    told = "\n".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in pairs)
    return f"<dl>{told}</dl>"


def bullets(sentences: Sequence[str]) -> str:
    """A list of plain sentences; nothing for none."""
    said = "\n".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    return f"<ul>{said}</ul>" if said else ""


def picture(figure: Figure, alt: str) -> str:
    """A figure inside the page."""
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png(figure)).decode()}">'


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, small: bool = False) -> str:
    """A table of plain text, the first column to the left; line breaks are kept."""
    head = "".join(f"<th>{_cell(text)}</th>" for text in headings)
    lines = "\n".join(
        f"<tr><th>{_cell(first)}</th>{''.join(f'<td>{_cell(text)}</td>' for text in rest)}</tr>"
        for first, *rest in rows
    )
    kind = ' class="small"' if small else ""
    return f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead><tbody>\n{lines}\n</tbody></table></div>'


def _cell(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ --page: {page}; --card: {card}; --line: {line}; --text: {text}; --muted: {muted} }}
body {{ background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 1600px; padding: 0 1rem }}
img {{ width: 100%; border-radius: 6px; margin: .5rem 0 }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem }} dt {{ color: var(--muted) }}
dd {{ margin: 0 }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }}
div.wide {{ overflow-x: auto }}
th, td {{ padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }}
th:first-child, td.why {{ text-align: left; font-weight: normal }} span, td.why, footer {{ color: var(--muted) }}
table.small {{ font-size: 13px; line-height: 1.35 }} table.small th, table.small td {{ padding: .12rem .6rem }}
td.best {{ color: #ffb454; font-weight: bold }}
@media print {{
  :root {{ --page: white; --card: white; --line: #999; --text: black; --muted: #444 }}
  body {{ font-size: 10px; margin: 0; max-width: none }}
  table, table.small {{ font-size: 8px }} th, td {{ padding: .1rem .3rem }} div.wide {{ overflow: visible }}
  td {{ white-space: nowrap }} table.small td, td.why {{ white-space: normal }}
  img, tr, dl {{ break-inside: avoid }} h2, h3 {{ break-after: avoid }} thead {{ display: table-header-group }}
  td.best {{ color: black }}
}}
</style></head><body>
<h1>{title}</h1>
{body}
<footer><p>{footer}</p></footer>
</body></html>
"""
