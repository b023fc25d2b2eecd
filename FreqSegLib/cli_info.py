"""``freqseg info`` and ``freqseg cache``: what FreqSeg found on this computer, and what it keeps there."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from FreqSegLib import __version__
from FreqSegLib.cli_app import app, session_of
from FreqSegLib.presets import PRESETS

if TYPE_CHECKING:
    from rich.table import Table

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "SimpleITK",
    "monai",
    "open_clip_torch",
    "transformers",
    "segment-anything",
    "timm",
    "pytorch-wavelets",
    "PyWavelets",
    "scipy",
    "matplotlib",
    "typer",
    "numba",
)


@app.command()
def info(context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, devices, weights found and folders: what a report of a problem should hold."""
    found = gather()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    session = session_of(context)
    for title, rows in _sections(found):
        session.say(_heading(title))
        session.out.print(_table(rows))


@app.command()
def cache(
    context: typer.Context, clear: Annotated[bool, typer.Option("--clear", help="Remove everything in it.")] = False
) -> None:
    """Show, or clear, what is kept of volumes that were read, so that a second prompt is quick."""
    from FreqSegLib.download import readable_size
    from FreqSegLib.embedding_cache import EmbeddingCache

    session = session_of(context)
    kept = EmbeddingCache()
    size = kept.size()
    if clear:
        kept.clear()
        session.say(f"Cleared {kept.folder}: {readable_size(size)} are free again.")
        return
    session.say(f"{kept.folder}: {readable_size(size)} of at most {readable_size(kept.limit)}")
    session.say("Clear it with: freqseg cache --clear")


def gather() -> dict[str, Any]:
    """Everything ``freqseg info`` shows, as plain values."""
    from FreqSegLib import weights
    from FreqSegLib.embedding_cache import EmbeddingCache

    kept = EmbeddingCache()
    return {
        "freqseg": __version__,
        "python": platform.python_version(),
        "python_at": sys.executable,
        "system": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "compute": _compute(),
        "presets": {
            name: {one: _place(weights.find(one)) for one in preset.weights} for name, preset in PRESETS.items()
        },
        "weights": {
            status.id: {"state": status.state, "path": _place(status.path), "needs": status.needs}
            for status in weights.status()
        },
        "weight_folders": [str(folder) for folder in weights.search_folders()],
        "cache": {"folder": str(kept.folder), "bytes": kept.size(), "limit": kept.limit},
    }


def _compute() -> dict[str, Any]:
    import torch

    there = torch.cuda.is_available()
    return {
        "device": "cuda" if there else "cpu",
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if there else [],
        "cuda": torch.version.cuda if there else None,
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _place(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _sections(found: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    from FreqSegLib.download import readable_size

    compute, kept = found["compute"], found["cache"]
    return [
        (
            "FreqSeg",
            [
                ("freqseg", found["freqseg"]),
                ("python", f"{found['python']}  {found['python_at']}"),
                ("system", found["system"]),
                *((name, version or "not installed") for name, version in found["packages"].items()),
            ],
        ),
        (
            "Computing",
            [
                ("device", compute["device"]),
                (
                    "GPUs",
                    ", ".join(compute["gpus"]) + f", CUDA {compute['cuda']}" if compute["gpus"] else "none usable",
                ),
                ("threads", str(compute["threads"])),
            ],
        ),
        *(
            (
                f"Preset {name}{'' if all(places.values()) else ' (not complete)'}",
                [(one, place or f"missing. {found['weights'][one]['needs']}") for one, place in places.items()],
            )
            for name, places in found["presets"].items()
        ),
        (
            "Folders",
            [
                ("weights", "\n".join(found["weight_folders"])),
                ("cache", f"{kept['folder']}  {readable_size(kept['bytes'])} of {readable_size(kept['limit'])}"),
            ],
        ),
    ]


def _heading(title: str) -> Any:
    from rich.text import Text

    return Text(f"\n{title}", style="bold")


def _table(rows: list[tuple[str, str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    return table
