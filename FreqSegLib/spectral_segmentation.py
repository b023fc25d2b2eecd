"""A trained spectral network on a volume: labels, probabilities, and how sure it is.

No prompt here: a model knows its classes. Slices and grey levels are those of the text-guided pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from FreqSegLib.checkpoint import load_exactly, read_state_dict
from FreqSegLib.device import Batches, default_batch_size, first_line, is_out_of_memory, resolve_device
from FreqSegLib.errors import DeviceError, SettingsError, WeightsError
from FreqSegLib.mamba.model_config import MODEL_FILE, WEIGHTS_FILE, SpectralModel
from FreqSegLib.mamba.model_folders import find_model
from FreqSegLib.mamba.spectral_input import SliceInput, VolumeInput
from FreqSegLib.mamba.spectral_vmunet import SpectralVMUNet
from FreqSegLib.mamba.stored_weights import unpacked
from FreqSegLib.progress import CancelCallback, ProgressCallback, Stage
from FreqSegLib.sam.coarse_mask import largest_components_3d
from FreqSegLib.volume import Segment, Volume

Uncertainty = Literal["auto", "flips", "dropout"]

WINDOW_OVERLAP = 0.25


@dataclass(frozen=True, eq=False)
class UncertaintyVolumes:
    """What repeated predictions say, on the input's grid, float32.

    Attributes:
        mean: highest of the classes' mean probabilities, in [0, 1].
        entropy: of the mean probabilities, over its largest value log(classes): in [0, 1]. All there is to doubt.
        mutual_information: entropy less the mean entropy of single predictions, on the same scale: what the
            predictions disagree about.
    """

    mean: Volume
    entropy: Volume
    mutual_information: Volume


@dataclass(frozen=True, eq=False)
class ClassResult:
    """One class: its name, mask (k, j, i), and colour in [0, 1]."""

    name: str
    mask: NDArray[np.bool_]
    color: tuple[float, float, float]

    def segment(self) -> Segment:
        """For :func:`FreqSegLib.volume.write_segmentation`."""
        return Segment(self.name, self.mask, self.color)


@dataclass(frozen=True, eq=False)
class SpectralSegmentation:
    """What was found, on the input's own grid.

    Attributes:
        labels: uint8 volume; 0 is background, n the n-th class.
        classes: in the order of the labels.
        probabilities: (classes + 1, k, j, i) float32, background first; None unless asked for.
        uncertainty: None unless asked for.
        warnings: what the user should know.
    """

    labels: Volume
    classes: tuple[ClassResult, ...]
    probabilities: NDArray[np.float32] | None
    uncertainty: UncertaintyVolumes | None
    warnings: tuple[str, ...]

    def __iter__(self) -> Iterator[ClassResult]:
        return iter(self.classes)

    def __len__(self) -> int:
        return len(self.classes)


class SpectralSegmenter:
    """A network and what it takes, ready for volumes.

    Example:
        >>> segmenter = SpectralSegmenter.from_model("spectral-hippocampus")
        >>> result = segmenter.segment(Volume.read("t1.nii.gz"), uncertainty="auto")
        >>> result.classes[0].name, result.classes[0].mask.sum()
    """

    def __init__(self, network: SpectralVMUNet, model: SpectralModel, device: torch.device | None = None) -> None:
        self.model, self.device = model, device or torch.device("cpu")
        self.network = network.to(self.device).eval()

    @classmethod
    def from_model(cls, name_or_folder: str | Path, device: str = "auto") -> SpectralSegmenter:
        """Load a model from this machine; nothing is downloaded.

        Args:
            name_or_folder: a model's name, looked for where weights are; or its folder.
            device: auto, cpu or cuda[:N].

        Raises:
            WeightsError: there is no such model, or its files are damaged or do not belong together.
            DeviceError: the device is absent.
        """
        folder = find_model(name_or_folder)
        chosen = resolve_device(device)
        model = SpectralModel.read(folder)
        try:
            network = SpectralVMUNet(**asdict(model.model))
        except SettingsError as error:
            raise WeightsError(f"{folder / MODEL_FILE} describes no network: {error}. Get the model again.") from error
        path = folder / WEIGHTS_FILE
        load_exactly(network, unpacked(read_state_dict(path), path), path)
        return cls(network, model, chosen)

    def segment(
        self,
        volume: Volume,
        *,
        uncertainty: Uncertainty | None = None,
        samples: int = 8,
        seed: int = 0,
        keep_probabilities: bool = True,
        progress: ProgressCallback | None = None,
        cancel: CancelCallback | None = None,
    ) -> SpectralSegmentation:
        """Segment a volume or picture.

        Args:
            volume: of any grid.
            uncertainty: ``flips`` predicts every mirror image along the axes the model was trained to be mirrored
                along; ``dropout`` repeats the prediction with random channels left out (Gal & Ghahramani, 2016);
                ``auto`` takes the first of them that the model was trained for. Labels are then those of the mean.
            samples: repetitions of ``dropout``.
            seed: of ``dropout``.
            keep_probabilities: return them; for large volumes they are large.
            progress: called with :class:`Progress`.
            cancel: polled between batches.

        Raises:
            InputError: the volume is constant, or not of the form the model takes.
            SettingsError: the model was not trained for that way of repeating, or a number is out of range.
            Cancelled: ``cancel`` answered True.
        """
        predict = self._predictor(self._repetition(uncertainty, samples), samples, seed)
        gathered = _Gathered(volume, len(self.model.classes) + 1, keep_probabilities, uncertainty is not None)
        if self.model.input.form == "volume":
            said = self._whole(volume, predict, gathered, progress, cancel)
        else:
            said = self._slices(volume, predict, gathered, progress, cancel)
        return gathered.result(self.model, (*volume.warnings, *said))

    def _repetition(self, uncertainty: Uncertainty | None, samples: int) -> str | None:
        """How predictions are repeated: ``flips``, ``dropout``, or not at all."""
        if uncertainty is None:
            return None
        if uncertainty not in ("auto", "flips", "dropout"):
            raise SettingsError(f"uncertainty must be auto, flips or dropout, got {uncertainty!r}")
        can = self.model.repetitions
        if not can:
            raise SettingsError(
                f"model '{self.model.name}' was trained neither on mirror images nor with dropout, so its uncertainty "
                "cannot be measured; leave it out, or train the model with one of them"
            )
        chosen = can[0] if uncertainty == "auto" else uncertainty
        if chosen not in can:
            trained = {"flips": "on mirror images, which would mislead it", "dropout": "with dropout"}[chosen]
            raise SettingsError(f"model '{self.model.name}' was not trained {trained}; use uncertainty '{can[0]}'")
        if chosen == "dropout" and samples < 2:
            raise SettingsError(f"dropout needs at least 2 samples, got {samples}")
        return chosen

    def _slices(
        self,
        volume: Volume,
        predict: Callable[[Tensor, int], Tensor],
        gathered: _Gathered,
        progress: ProgressCallback | None,
        cancel: CancelCallback | None,
    ) -> tuple[str, ...]:
        slices = SliceInput.of(volume, self.model.input)
        batches = Batches(default_batch_size(self.device))
        stage = Stage("Segmenting slices", slices.stack.count, progress, cancel)

        def work(indices: range) -> Tensor:
            found = predict(slices.images(indices).to(self.device), indices.start)
            samples, count = found.shape[:2]
            back = slices.frame.from_frame(found.flatten(0, 1))
            return back.unflatten(0, (samples, count)).cpu()

        for indices, found in batches.run(slices.stack.count, work):
            # (samples, B, classes, h, w) -> (samples, classes, B, h, w)
            gathered.put(found.transpose(1, 2), slices.stack.displayed, slice(indices.start, indices.stop))
            stage.advance(indices.stop)
        return slices.intensity.warnings

    def _whole(
        self,
        volume: Volume,
        predict: Callable[[Tensor, int], Tensor],
        gathered: _Gathered,
        progress: ProgressCallback | None,
        cancel: CancelCallback | None,
    ) -> tuple[str, ...]:
        whole = VolumeInput.of(volume, self.model.input)
        image = whole.image().to(self.device)
        stage = Stage("Segmenting the volume", 1, progress, cancel)
        try:
            found = predict(image, 0)[:, 0].cpu()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceError(
                "Not enough memory for this volume. Crop it, or use another device (--device cpu). The system said: "
                f"{first_line(error)}"
            ) from error
        back = torch.stack([whole.returned(one) for one in found])
        gathered.put(back, whole.stack.displayed, slice(None))
        stage.advance(1)
        return whole.intensity.warnings

    def _predictor(self, repetition: str | None, samples: int, seed: int) -> Callable[[Tensor, int], Tensor]:
        """Images (B, 1, *size), and the number of the first, to probabilities (samples, B, classes, *size)."""
        mirrors = tuple(axis + 2 for axis in self.model.mirrors)

        @torch.inference_mode()
        def predict(images: Tensor, first: int) -> Tensor:
            if repetition is None:
                return self._probabilities(images)[None]
            if repetition == "flips":
                mirrored = []
                for chosen in product((False, True), repeat=len(mirrors)):
                    axes = [axis for axis, flip in zip(mirrors, chosen, strict=True) if flip]
                    mirrored.append(self._probabilities(images.flip(axes)).flip(axes))
                return torch.stack(mirrored)
            with _dropping(self.network):
                repeated = []
                for sample in range(samples):
                    # each slice its own draw, whatever the batch: one at a time
                    single = []
                    for index, image in enumerate(images):
                        torch.manual_seed((seed * 1_000_003 + sample) * 1_000_003 + first + index)
                        single.append(self._probabilities(image[None])[0])
                    repeated.append(torch.stack(single))
                return torch.stack(repeated)

        return predict

    def _probabilities(self, images: Tensor) -> Tensor:
        """(B, 1, *size) to (B, classes, *size); volumes larger than the model's window are covered by windows."""
        window = self.model.input.window
        if self.model.input.form != "volume" or all(
            side <= most for side, most in zip(images.shape[2:], window, strict=True)
        ):
            return self._of_any_size(images)
        from monai.inferers import sliding_window_inference

        region = [min(side, most) for side, most in zip(images.shape[2:], window, strict=True)]
        found = sliding_window_inference(
            images, region, 1, self._of_any_size, overlap=WINDOW_OVERLAP, mode="gaussian", progress=False
        )
        assert isinstance(found, Tensor)
        return found / found.sum(1, keepdim=True)

    def _of_any_size(self, images: Tensor) -> Tensor:
        """Probabilities; an image smaller than a patch is padded to one."""
        size = images.shape[2:]
        short = [max(0, patch - side) for side, patch in zip(size, self.network.patch_size, strict=True)]
        if any(short):
            amounts = [value for amount in reversed(short) for value in (0, amount)]
            images = nn.functional.pad(images, amounts, mode="replicate")
        found = self.network(images).float().softmax(1)
        for axis, side in enumerate(size, start=2):
            found = found.narrow(axis, 0, side)
        return found


class _Gathered:
    """Answers as they come in, on the volume's grid."""

    def __init__(self, volume: Volume, outputs: int, keep_probabilities: bool, uncertain: bool) -> None:
        self.volume, self.outputs = volume, outputs
        self.labels = np.zeros(volume.shape, np.uint8)
        self.probabilities = np.zeros((outputs, *volume.shape), np.float32) if keep_probabilities else None
        self.maps = [np.zeros(volume.shape, np.float32) for _ in range(3)] if uncertain else []

    def put(self, found: Tensor, displayed: Callable[[NDArray[np.generic]], NDArray[np.generic]], where: slice) -> None:
        """Probabilities (samples, classes, slices, h, w) of the slices ``where``, as ``displayed`` shows the volume."""
        mean = found.mean(0)
        displayed(self.labels)[where] = mean.argmax(0).to(torch.uint8).numpy()
        if self.probabilities is not None:
            for kept, values in zip(self.probabilities, mean.numpy(), strict=True):
                displayed(kept)[where] = values
        if self.maps:
            scale = float(np.log(self.outputs))
            entropy = _entropy(mean, 0) / scale
            disagreement = (entropy - _entropy(found, 1).mean(0) / scale).clamp(min=0)
            for kept, values in zip(self.maps, (mean.amax(0), entropy, disagreement), strict=True):
                displayed(kept)[where] = values.numpy()

    def result(self, model: SpectralModel, warnings: tuple[str, ...]) -> SpectralSegmentation:
        """Everything, named; parts that the model takes for specks are background."""
        for index in range(1, self.outputs) if model.smallest_part else ():
            mask = self.labels == index
            self.labels[mask & ~largest_components_3d(mask, model.smallest_part)] = 0
        classes = tuple(
            ClassResult(one.name, self.labels == index, (one.color[0], one.color[1], one.color[2]))
            for index, one in enumerate(model.classes, start=1)
        )
        uncertainty = None
        if self.maps:
            names = ("probability", "entropy", "mutual information")
            uncertainty = UncertaintyVolumes(
                *(self.volume.with_array(values, name=name) for values, name in zip(self.maps, names, strict=True))
            )
        return SpectralSegmentation(
            self.volume.with_array(self.labels, name=f"{self.volume.name} labels"),
            classes,
            self.probabilities,
            uncertainty,
            tuple(dict.fromkeys(warnings)),
        )


def _entropy(probabilities: Tensor, axis: int) -> Tensor:
    return torch.special.entr(probabilities.clamp(min=0)).sum(axis)


@contextmanager
def _dropping(network: nn.Module) -> Iterator[None]:
    """Dropout on, everything else as in use; torch's random state is put back."""
    layers = [module for module in network.modules() if isinstance(module, nn.Dropout) and module.p > 0]
    state = torch.get_rng_state()
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        for layer in layers:
            layer.eval()
        torch.set_rng_state(state)
