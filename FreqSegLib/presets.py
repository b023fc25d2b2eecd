"""Named sets of weights and settings. Light: nothing is loaded here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from FreqSegLib.errors import SettingsError, WeightsError
from FreqSegLib.settings import TextSegmentationSettings

PRESET_FILE = "preset.json"


@dataclass(frozen=True)
class Tuning:
    """What was chosen on validation patients for one meaning (or for all): settings and the gate's calibration."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    slope: float = 10.0
    offset: float = 0.0
    slice_threshold: float = 0.5
    volume_threshold: float = 0.5


@dataclass(frozen=True)
class Preset:
    """One named way to run the pipeline.

    Attributes:
        name, title, description: for people.
        weights: ids in the catalogue, all needed.
        encoder: "lite" or "open_clip".
        has_vocabulary: prompts outside the known meanings are refused.
        has_gate: presence is calibrated; otherwise absent targets cannot be told.
        frequency_branches: on by default (only where they helped on validation data).
        defaults: settings that are None take these.
        licence: of the weights together.
        trained: id of the weights of its trained method, which it can do without; None where there is no such method.
        zero_shot: id of the trained modules of its zero-shot method (fusion of the frequency branches, amortised
            bottleneck), which it can do without; None where there are none.
    """

    name: str
    title: str
    description: str
    weights: tuple[str, ...]
    encoder: str
    has_vocabulary: bool
    has_gate: bool
    frequency_branches: bool
    defaults: Mapping[str, Any]
    licence: str
    trained: str | None = None
    zero_shot: str | None = None

    @property
    def optional(self) -> tuple[str, ...]:
        """Ids of weights that it works without."""
        return tuple(one for one in (self.trained, self.zero_shot) if one is not None)

    def complete(self, settings: TextSegmentationSettings, tuning: Tuning | None = None) -> TextSegmentationSettings:
        """Fill every None: the user's value, else the meaning's tuning, else the preset's default."""
        found = {**self.defaults, **(tuning.settings if tuning else {})}
        empty = [item.name for item in fields(settings) if getattr(settings, item.name) is None]
        return replace(settings, **{name: found[name] for name in empty if name in found})


SMALLEST_PART = 0.05
"""Share of the largest 3D part under which another one is taken for a speck."""

_COMMON: dict[str, Any] = {
    "bottleneck": "m2ib",
    "train_steps": 10,
    "num_noise_samples": 10,
    "threshold": "otsu",
    "threshold_value": 0.5,
    "confidence_threshold": 0.5,
    "num_contours": 0,
    "smallest_part": SMALLEST_PART,
    "slice_smoothing": 0.0,
    "refine": True,
    "prompt_kind": "boxes",
    "box_margin": 0.0,
}

SAM_CHOICES = ("sam-vit-b", "sam-vit-l", "sam-vit-h", "medsam-vit-b")

PRESETS: dict[str, Preset] = {
    "lite": Preset(
        name="lite",
        title="Lite (built in)",
        description=(
            "LiteMedSAM, MiniLM and a small aligner trained here. Runs offline on a plain CPU, knows a few targets."
        ),
        weights=("litemedsam", "minilm", "lite-aligner"),
        encoder="lite",
        has_vocabulary=True,
        has_gate=True,
        frequency_branches=False,
        defaults={**_COMMON, "layer_idx": 3, "beta": 0.1, "contrast": True},
        licence="research, non-commercial (aligner trained on CC BY-NC-SA data); LiteMedSAM and MiniLM Apache-2.0",
        trained="lite-text-guided",
        zero_shot="lite-zero-shot",
    ),
    "biomedclip-sam": Preset(
        name="biomedclip-sam",
        title="BiomedCLIP and SAM",
        description=(
            "BiomedCLIP with a SAM or MedSAM decoder. Any prompt; weights are downloaded on request; slow on a CPU."
        ),
        weights=("biomedclip", "sam-vit-b"),
        encoder="open_clip",
        has_vocabulary=False,
        has_gate=False,
        frequency_branches=False,
        defaults={**_COMMON, "layer_idx": 7, "beta": 0.1, "contrast": False},
        licence="BiomedCLIP MIT, SAM Apache-2.0",
    ),
}


def preset(name: str, sam: str | None = None) -> Preset:
    """The preset of that name, with another SAM-family model where it takes one.

    Raises:
        SettingsError: there is none; the nearest is offered.
    """
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise SettingsError(f"There is no preset '{name}'.{hint} Presets: {', '.join(PRESETS)}.")
    found = PRESETS[name]
    if sam is None:
        return found
    if found.encoder == "lite":
        raise SettingsError(f"Preset '{name}' has its own decoder (LiteMedSAM); leave out the SAM model '{sam}'.")
    if sam not in SAM_CHOICES:
        raise SettingsError(f"SAM model must be one of {', '.join(SAM_CHOICES)}, got '{sam}'.")
    return replace(found, weights=(found.weights[0], sam))


def read_tuning(folder: Path) -> dict[str, Tuning]:
    """The tuning stored beside trained weights, by meaning; "*" for all others.

    Raises:
        WeightsError: the file is damaged.
    """
    path = folder / PRESET_FILE
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = {name: Tuning(**values) for name, values in content["tuning"].items()}
        for tuning in found.values():
            TextSegmentationSettings(**tuning.settings)
    except (ValueError, KeyError, TypeError, AttributeError, SettingsError) as error:
        raise WeightsError(f"'{path}' is damaged ({error}). Reinstall FreqSeg or run: make train-lite") from error
    return found
