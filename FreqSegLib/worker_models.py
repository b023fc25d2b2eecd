"""The worker's errands: which weights are here, fetching and removing them, and what this installation is."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from FreqSegLib import __version__, weights
from FreqSegLib.presets import PRESETS, SAM_CHOICES
from FreqSegLib.progress import Progress
from FreqSegLib.protocol import Models, RequestError

if TYPE_CHECKING:
    from FreqSegLib.worker import Job

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "SimpleITK", "monai", "open_clip_torch", "transformers")
MORE_PACKAGES = ("segment-anything", "timm", "pytorch-wavelets", "safetensors", "psutil", "requests", "platformdirs")


def answer_models(request: Models, job: Job) -> dict[str, Any]:
    """See :class:`FreqSegLib.protocol.Models`."""
    if request.action == "list":
        return {"models": listed()}
    if request.action == "folder":
        return {"folder": str(weights.user_folder()), "searched": [str(one) for one in weights.search_folders()]}
    if request.id is None:
        raise RequestError(f"models {request.action} needs the id of the weights.")
    if request.action == "verify":
        findings = weights.verify(request.id)
        sound = not any(finding.blocking for finding in findings)
        return {"sound": sound, "findings": [finding.message for finding in findings]}
    if request.action == "remove":
        return {"freed": weights.remove(request.id)}

    def progress(done: int, total: int | None) -> None:
        job.progress(Progress("Downloading", done, total or 0, None))

    return {"folder": str(weights.get(request.id, progress=progress, cancel=job.cancelled))}


def listed() -> list[dict[str, Any]]:
    """Every set of weights, as the panel's table shows it."""
    entries = weights.catalogue()
    user = weights.user_folder()
    rows = []
    for status in weights.status():
        entry = entries[status.id]
        rows.append(
            {
                "id": status.id,
                "title": status.title,
                "size": status.size,
                "licence": status.licence,
                "source": entry.homepage,
                "note": entry.note,
                "state": status.state,
                "installed": status.state in ("shipped", "installed"),
                "downloadable": all(file.sources for file in entry.files),
                "removable": status.state in ("installed", "damaged") and (user / status.id).is_dir(),
                "folder": None if status.path is None else str(status.path),
                "needed_by": [name for name in PRESETS if status.id in weights_of(name)],
                "needs": status.needs,
                "announcement": weights.announcement(status.id) if all(f.sources for f in entry.files) else [],
            }
        )
    return rows


def weights_of(preset: str) -> tuple[str, ...]:
    """What a preset takes, with the choices it offers."""
    found = PRESETS[preset]
    choices = () if found.encoder == "lite" else SAM_CHOICES
    return tuple(dict.fromkeys((*found.weights, *found.optional, *choices)))


def answer_info() -> dict[str, Any]:
    """See :class:`FreqSegLib.protocol.Info`."""
    from dataclasses import asdict

    from FreqSegLib.clip.vocabulary import MODALITIES, targets
    from FreqSegLib.embedding_cache import EmbeddingCache
    from FreqSegLib.settings import TextSegmentationSettings

    known = [{"name": t.name, "modality": MODALITIES[t.modality].name, "color": list(t.color)} for t in targets()]
    kept = EmbeddingCache()
    return {
        "versions": {
            "freqseg": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in (*PACKAGES, *MORE_PACKAGES)},
        },
        "python_at": sys.executable,
        "device": _device(),
        "presets": [
            {
                "name": preset.name,
                "title": preset.title,
                "description": preset.description,
                "licence": preset.licence,
                "has_vocabulary": preset.has_vocabulary,
                "encoder": preset.encoder,
                "sam": [] if preset.encoder == "lite" else list(SAM_CHOICES),
                "trained": preset.trained,
                "has_trained": bool(preset.trained and weights.find(preset.trained)),
                "targets": known if preset.has_vocabulary else [],
                "missing": [one for one in preset.weights if weights.find(one) is None],
            }
            for preset in PRESETS.values()
        ],
        "defaults": asdict(TextSegmentationSettings()),
        "cache": {"folder": str(kept.folder), "bytes": kept.size(), "limit": kept.limit},
        "available": {
            "fuse": find_spec("FreqSegLib.volume_fusion") is not None,
            "spectral_segment": find_spec("FreqSegLib.spectral_segmentation") is not None,
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device() -> str | None:
    try:
        import torch
    except ImportError:
        return None
    return "cuda" if torch.cuda.is_available() else "cpu"
