"""Settings of the pipelines, declared once: command line, worker, presets and panel are made from these."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_type_hints

from FreqSegLib.errors import SettingsError

Axis = Literal["auto", "axial", "coronal", "sagittal"]
Branches = Literal["auto", "off", "on"]
Method = Literal["auto", "trained", "zero-shot"]
Bottleneck = Literal["m2ib", "nib", "amortised"]
FusionMethod = Literal["adaptive", "simple", "cat_conv"]
Threshold = Literal["otsu", "kmeans", "fixed"]
PromptKind = Literal["boxes", "box", "points", "boxes+points"]
Vote = Literal["single", "best", "mrm", "staple", "mean"]
FusionName = Literal["multi-scale", "single-scale", "choose-max", "laplacian", "average", "max"]
Registration = Literal["rigid"]


def _option(default: Any, text: str, **limits: Any) -> Any:
    return field(default=default, metadata={"help": text, **limits})


@dataclass(frozen=True)
class TextSegmentationSettings:
    """Everything that shapes a result; None means the preset's own value."""

    method: Method = _option(
        "auto", "Coarse mask: trained on masks, zero-shot by saliency, or auto (trained for the targets it knows)."
    )
    axis: Axis = _option("auto", "Slice the volume along this axis (auto: axial, or the thick axis).")
    intensity: str = _option(
        "auto", "Grey levels: auto, percentile, a CT window (brain, lung, soft, bone) or LEVEL/WIDTH."
    )
    frequency_branches: Branches = _option("auto", "Low- and high-frequency branches beside the raw image.")
    wave: str = _option("haar", "Wavelet of the frequency images.")
    levels: int = _option(1, "Wavelet levels J.", least=1, most=8)
    wavelet_mode: str = _option("symmetric", "Wavelet border mode.")
    bottleneck: Bottleneck | None = _option(
        None, "Saliency: m2ib (as published), nib (faster, deterministic) or amortised (trained)."
    )
    contrast: bool | None = _option(
        None,
        "Ask what sets the target apart from its absence and its neighbours (off: the plain prompt, as published).",
    )
    layer_idx: int | None = _option(None, "Encoder block the bottleneck stands after.", least=1, most=64)
    beta: float | None = _option(None, "M2IB's weight of information.", least=0.0, most=100.0)
    train_steps: int | None = _option(None, "M2IB's Adam steps.", least=1, most=200)
    num_noise_samples: int | None = _option(None, "M2IB's noise samples a step.", least=1, most=100)
    fusion: FusionMethod = _option("adaptive", "How the frequency branches are fused.")
    threshold: Threshold | None = _option(None, "Coarse mask: otsu over the volume, kmeans (2 classes), or fixed.")
    threshold_value: float | None = _option(None, "Threshold in [0, 1] when it is fixed.", least=0.0, most=1.0)
    confidence_threshold: float | None = _option(
        None, "Drop components whose mean saliency is below this, in [0, 1].", least=0.0, most=1.0
    )
    num_contours: int | None = _option(None, "Largest components kept a slice (0: all).", least=0, most=100)
    smallest_part: float | None = _option(
        None, "Drop 3D parts smaller than this share of the largest (1: keep one).", least=0.0, most=1.0
    )
    slice_smoothing: float | None = _option(
        None,
        "Even the map out over neighbouring slices, in mm; draw slices this near to one that passed too (0: off).",
        least=0.0,
        most=50.0,
    )
    gate: bool = _option(True, "Leave slices empty where the target is judged absent.")
    refine: bool | None = _option(None, "Refine the coarse mask with the SAM-family model.")
    prompt_kind: PromptKind | None = _option(None, "Visual prompts given to it.")
    num_points: int = _option(3, "Positive points a component.", least=1, most=50)
    negative_points: int = _option(0, "Negative points a slice.", least=0, most=50)
    box_margin: float | None = _option(
        None, "Box margin in mm (pixels where no spacing is known).", least=0.0, most=200.0
    )
    vote: Vote = _option("single", "The decoder's single mask, or how its three candidates become one.")
    uncertainty: bool = _option(False, "Repeat the saliency with other noise and report its standard deviation.")
    replicas: int = _option(4, "Repeats when uncertainty is asked for.", least=2, most=64)
    seed: int = _option(0, "Seed of the noise; the same seed gives the same mask.", least=0, most=2**31 - 1)
    experimental: bool = _option(False, "Accept prompts outside the preset's vocabulary (results may be meaningless).")
    batch_size: int = _option(0, "Slices at once (0: chosen for the device).", least=0, most=1024)

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclass(frozen=True)
class FusionSettings:
    """Everything that shapes a fused volume; None means the method's own value."""

    method: FusionName = _option("multi-scale", "How to fuse: two trained networks, then classic rules.")
    wave: str | None = _option(
        None, "Wavelet of choose-max, or another one for a network (haar, db4 ...).", none="method's"
    )
    levels: int | None = _option(
        None, "Wavelet levels of choose-max, or levels of the Laplacian pyramid.", none="method's", least=1, most=8
    )
    register: Registration | None = _option(None, "Lay the MR on the CT first: rigid (3D only).", none="off")
    check: bool = _option(True, "Refuse pairs that do not lie on each other (off: take them as they are).")
    ct_window: str = _option(
        "auto",
        "CT grey levels: auto (brain window; 8-bit images as they are), a window (brain, soft, bone, lung), "
        "LEVEL/WIDTH or percentile.",
    )
    mr_intensity: str = _option("auto", "MR grey levels: auto (percentiles; 8-bit images as they are) or LEVEL/WIDTH.")
    axis: Axis = _option("auto", "Slice the CT along this axis (auto: axial, or the thick axis).")
    seed: int = _option(0, "Seed of the registration; the same seed gives the same result.", least=0, most=2**31 - 2)
    batch_size: int = _option(0, "Slices at once (0: chosen by measuring).", least=0, most=1024)

    def __post_init__(self) -> None:
        _check_fields(self)


def _check_fields(settings: Any) -> None:
    """Raises: SettingsError: a value of the wrong kind, or out of its field's choices or limits."""
    hints = get_type_hints(type(settings))
    for item in fields(settings):
        value = getattr(settings, item.name)
        if value is None:
            continue
        choices = _choices(hints[item.name])
        if choices and value not in choices:
            raise SettingsError(f"{item.name} must be one of {', '.join(choices)}, got {value!r}")
        for kind, (types, wanted) in _PLAIN.items():
            fits = isinstance(value, types) and (kind is bool or not isinstance(value, bool))
            if kind in (hints[item.name], *get_args(hints[item.name])) and not fits:
                raise SettingsError(f"{item.name} must be {wanted}, got {value!r}")
        least, most = item.metadata.get("least"), item.metadata.get("most")
        if least is not None and not least <= value <= most:
            raise SettingsError(f"{item.name} must lie in {least} to {most}, got {value}")


_PLAIN: dict[type, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "text"),
}


def _choices(hint: Any) -> tuple[str, ...]:
    found: list[str] = []
    for part in (hint, *get_args(hint)):
        found += [value for value in get_args(part) if isinstance(value, str)]
    return tuple(dict.fromkeys(found))
