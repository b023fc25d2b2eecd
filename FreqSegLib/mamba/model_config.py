"""What a spectral model is and what it takes, as files beside its weights: needs no torch.

Also how every configuration file of the spectral segmenter becomes a frozen dataclass, with the faults in it named.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from FreqSegLib.errors import SettingsError, WeightsError

MODEL_FILE, WEIGHTS_FILE = "model.json", "model.safetensors"
FORMAT = 1

Form = Literal["image", "slices", "volume"]
Stem = Literal["patches", "convolutions"]
Config = TypeVar("Config")

COLORS = (
    (0.90, 0.35, 0.30),
    (0.25, 0.65, 0.95),
    (0.45, 0.80, 0.40),
    (0.95, 0.75, 0.25),
    (0.70, 0.50, 0.90),
    (0.30, 0.80, 0.75),
)


@dataclass(frozen=True)
class ModelConfig:
    """The network; see :class:`FreqSegLib.mamba.spectral_vmunet.SpectralVMUNet` for each number."""

    in_channels: int = 1
    out_channels: int = 3
    img_size: int = 256
    base_channels: int = 64
    num_stages: int = 4
    depth: int | tuple[int, ...] = 2
    dimensions: int = 2
    patch_size: int | tuple[int, ...] = 4
    spectral: bool = True
    filter_size: int | None = None
    d_state: int = 16
    ssm_ratio: float = 2.0
    mlp_ratio: float = 2.0
    stem: Stem = "patches"
    detail_channels: int = 16
    stage_convolutions: int = 0
    drop_path: float = 0.0
    dropout: float = 0.0


@dataclass(frozen=True)
class InputConfig:
    """How an image or volume reaches the network.

    Attributes:
        form: ``image`` (2D pictures), ``slices`` (a volume slice by slice) or ``volume`` (3D).
        side: pixels of the square frame that slices and pictures are fitted into, their aspect kept.
        axis: slices are taken along it: auto, axial, coronal or sagittal.
        intensity: as in ``freqseg segment``: auto, percentile, a CT window or level/width.
        spacing: of 3D volumes in mm along (z, y, x) of the axial view; None takes the grid as it is.
        window: voxels (z, y, x) the network sees at once; larger volumes are covered by overlapping windows.
    """

    form: Form = "slices"
    side: int = 256
    axis: str = "auto"
    intensity: str = "auto"
    spacing: tuple[float, ...] | None = None
    window: tuple[int, ...] = (96, 96, 96)

    def __post_init__(self) -> None:
        if self.side < 1:
            raise SettingsError(f"side must be at least 1 pixel, got {self.side}")
        if self.spacing is not None and (len(self.spacing) != 3 or not min(self.spacing) > 0):
            raise SettingsError(f"spacing must be three lengths above 0 in mm, got {self.spacing}")
        if len(self.window) != 3 or min(self.window) < 1:
            raise SettingsError(f"window must be three numbers of at least 1 voxel, got {self.window}")
        if self.axis not in ("auto", "axial", "coronal", "sagittal"):
            raise SettingsError(f"axis must be auto, axial, coronal or sagittal, got {self.axis!r}")


@dataclass(frozen=True)
class ClassConfig:
    """A class besides the background: its name, and its colour as red, green, blue in [0, 1]."""

    name: str
    color: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.name.strip() or len(self.color) != 3 or not all(0 <= part <= 1 for part in self.color):
            raise SettingsError(
                f"a class needs a name and three colour parts in [0, 1], got {self.name!r} {self.color}"
            )


@dataclass(frozen=True)
class SpectralModel:
    """Everything in ``model.json``.

    Attributes:
        name: of the model.
        model, input: see there.
        classes: in the order of the labels from 1; the background is label 0.
        licence: of the weights.
        description: a sentence for lists.
        mirrors: array axes, from 0, along which it was trained on mirror images too; in 2D (rows, columns), in 3D
            (z, y, x). Along others a mirror image is a picture it has never seen.
        smallest_part: connected parts of a class smaller than this share of its largest are taken for background; 0
            keeps all, 1 keeps one. Chosen on validation cases.
    """

    name: str
    model: ModelConfig
    input: InputConfig
    classes: tuple[ClassConfig, ...]
    licence: str = ""
    description: str = ""
    mirrors: tuple[int, ...] = ()
    smallest_part: float = 0.0
    format: int = field(default=FORMAT)

    def __post_init__(self) -> None:
        if len(self.classes) != self.model.out_channels - 1:
            raise SettingsError(
                f"model '{self.name}' has {self.model.out_channels} outputs, background included, but "
                f"{len(self.classes)} classes are named"
            )
        needed = 3 if self.input.form == "volume" else 2
        if self.model.dimensions != needed:
            raise SettingsError(
                f"form '{self.input.form}' needs a network of {needed} dimensions, got {self.model.dimensions}"
            )
        if any(axis not in range(needed) for axis in self.mirrors):
            raise SettingsError(f"mirrors must lie in 0 to {needed - 1}, got {self.mirrors}")
        if not 0 <= self.smallest_part <= 1:
            raise SettingsError(f"smallest_part must lie in 0 to 1, got {self.smallest_part}")

    @property
    def repetitions(self) -> tuple[str, ...]:
        """How its predictions can be repeated for uncertainty, the better way first: ``flips``, ``dropout``."""
        return (*(("flips",) if self.mirrors else ()), *(("dropout",) if self.model.dropout > 0 else ()))

    @classmethod
    def read(cls, folder: Path) -> SpectralModel:
        """Read a model's folder.

        Raises:
            WeightsError: the file is missing, damaged, or of a newer version.
        """
        path = folder / MODEL_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise WeightsError(
                f"no spectral model in {folder}: {MODEL_FILE} cannot be read ({error.strerror})"
            ) from error
        except ValueError as error:
            raise WeightsError(f"{path} is damaged: {error}. Get the model again.") from error
        if isinstance(content, dict) and content.get("format", 0) != FORMAT:
            raise WeightsError(
                f"{path} has format {content.get('format')}, this FreqSeg reads {FORMAT}; update FreqSeg"
            )
        try:
            return from_mapping(cls, content, str(path))
        except SettingsError as error:
            raise WeightsError(f"{error}. Get the model again.") from error

    def write(self, folder: Path) -> Path:
        """Write ``model.json``."""
        path = folder / MODEL_FILE
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
        return path


def class_configs(names: tuple[str, ...], colors: tuple[tuple[float, ...], ...] = ()) -> tuple[ClassConfig, ...]:
    """Classes with the colours given, and others from a palette."""
    palette = [colors[index] if index < len(colors) else COLORS[index % len(COLORS)] for index in range(len(names))]
    return tuple(ClassConfig(name, color) for name, color in zip(names, palette, strict=True))


def read_config(path: Path, kind: type[Config]) -> Config:
    """A JSON or TOML file as a dataclass.

    Raises:
        SettingsError: the file is missing or cannot be parsed; a key is unknown (the nearest one is offered), missing,
            or has a value of another kind.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read the configuration {path}: {error}") from error
    try:
        if path.suffix.lower() == ".toml":
            content: Any = _toml(text, path)
        elif path.suffix.lower() == ".json":
            content = json.loads(text)
        else:
            raise SettingsError(f"a configuration is a .json or .toml file, got {path}")
    except ValueError as error:
        raise SettingsError(f"{path} cannot be parsed: {error}") from error
    return from_mapping(kind, content, str(path))


def _toml(text: str, path: Path) -> Any:
    try:
        import tomllib  # type: ignore[import-not-found, unused-ignore]
    except ModuleNotFoundError as error:
        raise SettingsError(f"{path}: TOML needs Python 3.11; write the configuration as JSON") from error
    return tomllib.loads(text)


def from_mapping(kind: type[Config], content: Any, where: str) -> Config:
    """A mapping as a frozen dataclass, checked field by field, nested ones too.

    Raises:
        SettingsError: names the key at fault, and the nearest that exists.
    """
    if not isinstance(content, Mapping):
        raise SettingsError(f"{where}: expected keys and values, got {content!r}")
    known = [item.name for item in fields(kind)]  # type: ignore[arg-type]
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            offered = f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(known)}"
            raise SettingsError(f"{where}: there is no key '{key}'{offered}")
    hints = get_type_hints(kind)
    values = {}
    for item in fields(kind):  # type: ignore[arg-type]
        if item.name in content:
            values[item.name] = _value(hints[item.name], content[item.name], f"{where}: {item.name}")
        elif item.default is MISSING and item.default_factory is MISSING:
            raise SettingsError(f"{where}: the key '{item.name}' is missing")
    try:
        return kind(**values)
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the type that the hint names."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and type(None) in parts:
            return None
        faults = []
        for part in parts:
            if part is type(None):
                continue
            try:
                return _value(part, value, where)
            except SettingsError as error:
                faults.append(error)
        raise faults[-1]
    if origin is Literal:
        if value not in parts:
            raise SettingsError(f"{where} must be one of {', '.join(map(str, parts))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise SettingsError(f"{where} must be a list, got {value!r}")
        return tuple(_value(parts[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if hasattr(hint, "__dataclass_fields__"):
        return from_mapping(hint, value, where)
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]
    fits = isinstance(value, (int, float) if hint is float else hint) and (hint is bool or not isinstance(value, bool))
    if not fits or (hint is float and value != value):
        raise SettingsError(f"{where} must be {wanted}, got {value!r}")
    return float(value) if hint is float else value
