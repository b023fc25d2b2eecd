"""What ``freqseg train-spectral`` reads from a configuration file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from FreqSegLib.errors import SettingsError
from FreqSegLib.mamba.model_config import InputConfig, ModelConfig, SpectralModel, class_configs


@dataclass(frozen=True)
class LossConfig:
    """See :class:`FreqSegLib.mamba.losses.SpectralDualLoss`.

    Attributes:
        adversarial_weight: of a patch discriminator's hinge loss; 0 trains without one.
    """

    spatial_weight: float = 1.0
    freq_weight: float = 0.1
    boundary_weight: float = 0.05
    use_dice: bool = True
    use_focal: bool = True
    gamma: float = 2.0
    frequency_exponent: float = 1.0
    boundary_tolerance: int = 1
    adversarial_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("gamma", "adversarial_weight"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of every training image.

    Attributes:
        rotation: degrees at most, either way.
        scale: share by which the size changes at most, either way.
        shift: share of the side by which the image moves at most, either way.
        flip_axes: array axes, from 0, that are reversed half of the time; in 2D (rows, columns), in 3D (z, y, x).
        gamma: of the grey curve, in its logarithm, at most, either way.
        brightness, contrast: at most, either way, for greys in [0, 1].
        noise: standard deviation at most.
    """

    rotation: float = 15.0
    scale: float = 0.15
    shift: float = 0.05
    flip_axes: tuple[int, ...] = ()
    gamma: float = 0.3
    brightness: float = 0.1
    contrast: float = 0.15
    noise: float = 0.03

    def __post_init__(self) -> None:
        for name in ("rotation", "scale", "shift", "gamma", "brightness", "contrast", "noise"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise SettingsError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.scale >= 1:
            raise SettingsError(f"scale must be below 1, got {self.scale}")


@dataclass(frozen=True)
class TrainingConfig:
    """How long, how fast, and on what.

    Attributes:
        learning_rate: AdamW's, after ``warmup_epochs``, then a cosine.
        epochs: at most; an epoch shows as many images as there are.
        steps_per_epoch: batches of an epoch; 0 for as many as show every image once.
        batch_size: over all processes.
        mixed_precision: bfloat16 autocast on CUDA; the scan stays float32. Nothing on a CPU, where it is slower.
        workers: processes that prepare batches.
        warmup_epochs: while the rate rises linearly.
        patience: validations without a better score before stopping.
        validate_every: epochs.
        crop: sides of the random window a batch shows; empty for the whole frame.
        foreground_share: least share of images, or of windows, drawn so that they show a labelled voxel.
        checkpointing: recompute blocks in the backward pass, for memory.
        seed: of the start, the split, every batch and every augmentation.
        validation_share: of patients or images, by a hash of their names.
        stored: how the weights are written, of :data:`FreqSegLib.mamba.stored_weights.KINDS`; the card says what
            the stored weights score.
        tensorboard: also write TensorBoard's event files.
    """

    learning_rate: float = 1e-3
    epochs: int = 100
    steps_per_epoch: int = 0
    batch_size: int = 8
    mixed_precision: bool = True
    workers: int = 0
    warmup_epochs: float = 2.0
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    patience: int = 15
    validate_every: int = 1
    crop: tuple[int, ...] = ()
    foreground_share: float = 0.5
    checkpointing: bool = False
    seed: int = 0
    validation_share: float = 0.15
    stored: Literal["float32", "float16", "int8"] = "float16"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience", "validate_every"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("steps_per_epoch", "workers", "warmup_epochs", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.foreground_share <= 1:
            raise SettingsError(f"foreground_share must lie in [0, 1], got {self.foreground_share}")
        if not 0 < self.validation_share < 1:
            raise SettingsError(f"validation_share must lie between 0 and 1, got {self.validation_share}")


@dataclass(frozen=True)
class DataConfig:
    """Where images and labels are: files of the same name up to their endings, in two folders or one.

    Attributes:
        images, labels: folders; relative ones are looked for in the data folder given, else beside the configuration.
        image_ending, label_ending: how names end, the extension included.
        classes: names, in the order of the labels from 1.
        colors: red, green, blue in [0, 1] for each class; a palette where left out.
        binary: any label above 0 means 1.
        fill_nonfinite: value for voxels that are NaN or infinite, which are refused without it; in labels they are
            background then.
        test_images, test_labels: folders that nothing is trained or chosen on, to measure on at the end; may be empty.
    """

    images: str
    labels: str
    classes: tuple[str, ...]
    image_ending: str = ".nii.gz"
    label_ending: str = ".nii.gz"
    colors: tuple[tuple[float, ...], ...] = ()
    binary: bool = False
    fill_nonfinite: float | None = None
    test_images: str = ""
    test_labels: str = ""

    def __post_init__(self) -> None:
        if not self.classes:
            raise SettingsError("classes must name at least one class besides the background")
        twice = sorted({name for name in self.classes if self.classes.count(name) > 1})
        if twice:
            raise SettingsError(f"classes must differ, '{twice[0]}' is named twice")
        if bool(self.test_images) != bool(self.test_labels):
            raise SettingsError("test_images and test_labels belong together; give both, or neither")
        if self.binary and len(self.classes) != 1:
            raise SettingsError(f"binary labels have one class, got {len(self.classes)}: {', '.join(self.classes)}")
        if self.images == self.labels and self.image_ending == self.label_ending:
            raise SettingsError("images and labels lie in one folder, so image_ending and label_ending must differ")


@dataclass(frozen=True)
class SpectralRecipe:
    """A whole configuration file.

    Attributes:
        name: of the model, and of its folder.
        data, input, model, loss, augment, training: the file's sections.
        licence, description: for the model's card.
    """

    name: str
    data: DataConfig
    input: InputConfig = field(default_factory=InputConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    licence: str = ""
    description: str = ""

    def __post_init__(self) -> None:
        if not self.name or any(sign in self.name for sign in "/\\:") or self.name.startswith("."):
            raise SettingsError(f"name must do as a folder's name, got {self.name!r}")
        if self.model.in_channels != 1:
            raise SettingsError(f"images are read as grey, so in_channels must be 1, got {self.model.in_channels}")
        dimensions = self.model.dimensions
        if self.training.crop and len(self.training.crop) != dimensions:
            raise SettingsError(f"crop must have {dimensions} sides, got {self.training.crop}")
        if any(axis not in range(dimensions) for axis in self.augment.flip_axes):
            raise SettingsError(f"flip_axes must lie in 0 to {dimensions - 1}, got {self.augment.flip_axes}")
        patch = self.patch
        if self.input.form != "volume" and self.input.side < max(patch):
            raise SettingsError(
                f"side must be at least one patch of the network ({max(patch)} pixels), got {self.input.side}"
            )
        if any(side < least for side, least in zip(self.training.crop, patch, strict=False)):
            raise SettingsError(f"crop must be at least one patch of the network {patch}, got {self.training.crop}")
        self.described()

    @property
    def patch(self) -> tuple[int, ...]:
        """The network's patch along every axis: the least that it takes."""
        size = self.model.patch_size
        return (size,) * self.model.dimensions if isinstance(size, int) else tuple(size)

    def described(self) -> SpectralModel:
        """What is written beside the weights."""
        return SpectralModel(
            name=self.name,
            model=self.model,
            input=self.input,
            classes=class_configs(self.data.classes, self.data.colors),
            licence=self.licence,
            description=self.description,
            mirrors=self.augment.flip_axes,
        )
