"""What presets there are and what they know, from the library's torch-free parts."""

from __future__ import annotations

from dataclasses import dataclass

from slicer.i18n import tr as _

from .library import find_library

OWN_WEIGHTS = "custom"
OWN_WEIGHTS_BASE = "biomedclip-sam"


@dataclass(frozen=True)
class KnownTarget:
    """One thing a preset can be asked for: its name, its wordings, the pictures it was learned on, its colour."""

    name: str
    wordings: tuple[str, ...]
    modality: str
    modality_name: str
    color: tuple[float, float, float]


@dataclass(frozen=True)
class KnownFusion:
    """One way to fuse, and what can be set of it. ``is_here`` is false for a network without its weights."""

    name: str
    title: str
    takes_wave: bool
    takes_levels: bool
    is_here: bool


@dataclass(frozen=True)
class KnownPreset:
    """One entry of the preset list. ``library_name`` is what the worker is told."""

    name: str
    library_name: str
    title: str
    description: str
    takes_any_prompt: bool
    takes_other_weights: bool
    targets: tuple[KnownTarget, ...]


def presets() -> list[KnownPreset]:
    """All presets, the built-in one first, and one for the user's own files."""
    find_library()
    from FreqSegLib.presets import PRESETS

    found = [
        KnownPreset(
            preset.name,
            preset.name,
            preset.title,
            preset.description,
            not preset.has_vocabulary,
            preset.encoder != "lite",
            tuple(_targets()) if preset.has_vocabulary else (),
        )
        for preset in PRESETS.values()
    ]
    base = PRESETS.get(OWN_WEIGHTS_BASE)
    if base is not None:
        title, description = _("Custom (own files)"), _("Models of your own, in the layouts of open_clip and SAM.")
        found.append(KnownPreset(OWN_WEIGHTS, base.name, title, description, True, True, ()))
    return found


def methods() -> list[tuple[str, str]]:
    """Names and titles of the ways to find the outline the library has, more than one or none to choose from."""
    find_library()
    from dataclasses import fields
    from typing import get_args, get_type_hints

    from FreqSegLib.settings import TextSegmentationSettings

    if "method" not in {item.name for item in fields(TextSegmentationSettings)}:
        return []
    hint = get_type_hints(TextSegmentationSettings)["method"]
    names = [value for part in (hint, *get_args(hint)) for value in get_args(part) if isinstance(value, str)]
    titles: dict[str, str] = {
        "auto": _("Automatic"),
        "zero_shot": _("Zero-shot: nothing trained on outlines"),
        "zero-shot": _("Zero-shot: nothing trained on outlines"),
        "trained": _("Trained on outlines"),
    }
    return [(name, titles.get(name, name)) for name in names]


def fusions() -> list[KnownFusion]:
    """All ways to fuse a CT and an MR, trained networks first."""
    find_library()
    from FreqSegLib import weights
    from FreqSegLib.errors import WeightsError
    from FreqSegLib.fusion import METHODS

    networks = {
        "multi-scale": _("Multi-scale network"),
        "single-scale": _("Single-scale network"),
    }
    rules = {
        "choose-max": _("Wavelet choose-max"),
        "laplacian": _("Laplacian pyramid"),
        "average": _("Average"),
        "max": _("Brighter voxel"),
    }

    def is_here(name: str) -> bool:
        try:
            return weights.find(f"fusion-{name}") is not None
        except WeightsError:
            return False

    return [
        KnownFusion(
            name,
            networks.get(name) or rules.get(name, name),
            name in networks or name == "choose-max",
            name in ("choose-max", "laplacian"),
            name not in networks or is_here(name),
        )
        for name in METHODS
    ]


def sam_choices() -> list[str]:
    """Drawing models a preset may take in place of its own."""
    find_library()
    from FreqSegLib.presets import SAM_CHOICES

    return list(SAM_CHOICES)


def known_as(prompt: str, targets) -> KnownTarget | None:
    """The target a prompt words exactly as the preset learned it; others are understood when the run begins."""
    text = " ".join(prompt.lower().split())
    return next((target for target in targets if text and text in target.wordings), None)


def targets_sentence(preset: KnownPreset) -> str:
    """What a preset knows, by kind of picture."""
    if preset.takes_any_prompt:
        return _("Takes any prompt in English. It cannot tell whether a target is there at all.")
    groups: dict[str, list[str]] = {}
    for target in preset.targets:
        groups.setdefault(target.modality_name, []).append(target.name)
    parts = [f"<b>{modality}</b>: {', '.join(names)}" for modality, names in groups.items()]
    return _("Knows, on {list}.").format(list="; on ".join(parts))


def _targets() -> list[KnownTarget]:
    from FreqSegLib.clip.vocabulary import MODALITIES, targets

    return [
        KnownTarget(
            meaning.name,
            tuple(wording.lower() for wording in (meaning.name, *meaning.wordings, *meaning.held_out)),
            meaning.modality,
            MODALITIES[meaning.modality].name,
            meaning.color,
        )
        for meaning in targets()
    ]
