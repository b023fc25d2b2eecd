"""Losses of SpectralVMUNet: overlap and focal terms, the spectrum of the error, boundaries, and an adversary.

All take logits (b, classes, *size) and targets (b, *size) of whole numbers from 0 (background) to classes - 1, for
images and volumes, and reduce to a scalar. They compute in float32 at least.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from FreqSegLib.errors import InputError, SettingsError

Components = dict[str, Tensor]


class DiceLoss(nn.Module):
    """1 - soft Dice, averaged over the classes besides the background (MONAI's, over the batch as a whole).

    Over the batch, and over the classes that it shows: overlap with a class that is not there would be a loss of 1
    that hardly anything lowers, and is left to the other terms.
    """

    def __init__(self) -> None:
        super().__init__()
        from monai.losses import DiceLoss as Dice

        self.loss = Dice(
            include_background=False, softmax=True, to_onehot_y=True, batch=True, smooth_dr=1e-5, reduction="none"
        )

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        _check_shape(logits, target)
        losses = self.loss(_exact(logits), target[:, None]).flatten()
        there = torch.stack([(target == label).any() for label in range(1, logits.shape[1])])
        return (losses * there).sum() / there.sum().clamp(min=1)


class FocalLoss(nn.Module):
    """Cross-entropy that easy pixels hardly weigh in (Lin et al., 2017; MONAI's with softmax).

    Args:
        gamma: 0 is cross-entropy; the larger, the less a pixel counts that is right already.
    """

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        from monai.losses import FocalLoss as Focal

        self.classes_loss = Focal(include_background=True, to_onehot_y=True, use_softmax=True, gamma=gamma)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        _check_shape(logits, target)
        # MONAI averages over classes as well; cross-entropy is their sum
        return self.classes_loss(_exact(logits), target[:, None]) * logits.shape[1]


class FrequencyLoss(nn.Module):
    """Squared error of the probabilities' spectrum, the more expensive the higher the frequency.

    A plain squared error of spectra is the pixels' own (Parseval). Weighted with |f|^``exponent``, scaled to a mean of
    1 over all frequencies, an error at edges costs more than one of the same size that is spread smoothly; white noise
    costs the same as in pixels.

    Args:
        exponent: of the radial weight; 0 gives the mean squared error of the pixels.
        include_background: count the background's channel, which repeats the others where there are two classes.
    """

    def __init__(self, exponent: float = 1.0, include_background: bool = False) -> None:
        super().__init__()
        if exponent < 0:
            raise SettingsError(f"the frequency loss needs an exponent of at least 0, got {exponent}")
        self.exponent, self.include_background = exponent, include_background

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        probabilities, truth = _probabilities(logits, target, self.include_background)
        return self.of_difference(probabilities - truth)

    def of_difference(self, difference: Tensor) -> Tensor:
        """The loss of errors (b, c, *size) in probability."""
        axes = tuple(range(2, difference.dim()))
        with torch.autocast(difference.device.type, enabled=False):
            power = torch.fft.rfftn(_exact(difference), dim=axes, norm="ortho").abs().square()
            weight = self.weight(tuple(difference.shape[2:]), power)
            return (power * weight).sum(axes).mean() / difference[0, 0].numel()

    def weight(self, size: tuple[int, ...], like: Tensor) -> Tensor:
        """Of each frequency of the half spectrum, counting those that it leaves out: they sum to the pixels' number."""
        frequencies = [torch.fft.fftfreq(side, dtype=torch.float64) for side in size[:-1]]
        frequencies.append(torch.fft.rfftfreq(size[-1], dtype=torch.float64))
        radius = torch.stack(torch.meshgrid(*frequencies, indexing="ij")).square().sum(0).sqrt()
        twice = torch.full((radius.shape[-1],), 2.0, dtype=torch.float64)
        twice[0] = 1.0
        if size[-1] % 2 == 0:
            twice[-1] = 1.0
        weight = radius**self.exponent
        total = float((weight * twice).sum())
        count = float(torch.tensor(size).prod())
        # a single pixel has no frequency besides the constant one
        weight = weight * (count / total) if total > 0 else torch.ones_like(weight)
        return (weight * twice).to(like)


class BoundaryLoss(nn.Module):
    """1 - F1 of the boundaries, soft so that it has gradients (Bokhovkin & Burnaev, 2019).

    A boundary is what a mask loses when eroded by a pixel, plus what it gains when dilated. Precision is the share
    of the predicted boundary near the true one, recall the other way round. Classes absent from a batch, truth and
    prediction alike, cost nothing.

    Args:
        tolerance: pixels by which boundaries may be apart and still count as the same.
    """

    def __init__(self, tolerance: int = 1) -> None:
        super().__init__()
        if tolerance < 0:
            raise SettingsError(f"the boundary loss needs a tolerance of at least 0 pixels, got {tolerance}")
        self.tolerance = tolerance

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        probabilities, truth = _probabilities(logits, target, False)
        found, real = boundary(probabilities), boundary(truth)
        axes = (0, *range(2, logits.dim()))
        smooth = 1.0
        precision = ((found * self._near(real)).sum(axes) + smooth) / (found.sum(axes) + smooth)
        recall = ((real * self._near(found)).sum(axes) + smooth) / (real.sum(axes) + smooth)
        return (1 - 2 * precision * recall / (precision + recall)).mean()

    def _near(self, edges: Tensor) -> Tensor:
        return _dilated(edges, self.tolerance) if self.tolerance else edges


def boundary(masks: Tensor) -> Tensor:
    """Soft boundaries of (b, c, *size) in [0, 1]: dilation minus erosion by one pixel."""
    return _dilated(masks, 1) + _dilated(-masks, 1)


def _dilated(x: Tensor, reach: int) -> Tensor:
    """Maximum within ``reach`` pixels; outside the image lies nothing."""
    pool = F.max_pool2d if x.dim() == 4 else F.max_pool3d
    return pool(x, 2 * reach + 1, stride=1, padding=reach)


class SpectralDualLoss(nn.Module):
    """What SpectralVMUNet is trained with: overlap and focal terms in space, the error's spectrum, the boundary.

    Args:
        spatial_weight: of Dice + focal.
        freq_weight: of :class:`FrequencyLoss`.
        boundary_weight: of :class:`BoundaryLoss`.
        use_dice, use_focal: which spatial terms there are; at least one, unless ``spatial_weight`` is 0.
        gamma: of the focal term.
        frequency_exponent: of the frequency term.
        boundary_tolerance: of the boundary term, in pixels.

    Raises:
        SettingsError: a weight is negative, all are 0, or there is no spatial term to weigh.
    """

    def __init__(
        self,
        spatial_weight: float = 1.0,
        freq_weight: float = 0.1,
        boundary_weight: float = 0.05,
        use_dice: bool = True,
        use_focal: bool = True,
        *,
        gamma: float = 2.0,
        frequency_exponent: float = 1.0,
        boundary_tolerance: int = 1,
    ) -> None:
        super().__init__()
        weights = {"spatial_weight": spatial_weight, "freq_weight": freq_weight, "boundary_weight": boundary_weight}
        for name, value in weights.items():
            if not value >= 0:
                raise SettingsError(f"{name} must be at least 0, got {value}")
        if not any(weights.values()):
            raise SettingsError("all weights of the loss are 0, so there is nothing to learn from")
        if spatial_weight and not (use_dice or use_focal):
            raise SettingsError("spatial_weight is above 0, but both use_dice and use_focal are off; turn one on")
        self.terms = nn.ModuleDict()
        self.weights: dict[str, float] = {}
        for name, module, weight in (
            ("dice", DiceLoss() if use_dice else None, spatial_weight),
            ("focal", FocalLoss(gamma) if use_focal else None, spatial_weight),
            ("frequency", FrequencyLoss(frequency_exponent), freq_weight),
            ("boundary", BoundaryLoss(boundary_tolerance), boundary_weight),
        ):
            if module is not None and weight:
                self.terms[name] = module
                self.weights[name] = weight

    @overload
    def forward(self, logits: Tensor, target: Tensor, return_components: Literal[False] = False) -> Tensor: ...

    @overload
    def forward(
        self, logits: Tensor, target: Tensor, return_components: Literal[True]
    ) -> tuple[Tensor, Components]: ...

    def forward(
        self, logits: Tensor, target: Tensor, return_components: bool = False
    ) -> Tensor | tuple[Tensor, Components]:
        """Args:
            logits: (b, classes, *size).
            target: (b, *size), whole numbers from 0 to classes - 1.
            return_components: also return each term before it is weighed.

        Raises:
            InputError: shapes do not fit, or a label lies outside the classes.
        """
        check_target(logits, target)
        components = {name: term(logits, target) for name, term in self.terms.items()}
        total = torch.stack([self.weights[name] * value for name, value in components.items()]).sum()
        return (total, components) if return_components else total


def check_target(logits: Tensor, target: Tensor) -> None:
    """Raises:
    InputError: the target does not fit the logits.
    """
    _check_shape(logits, target)
    low, high = int(target.min()), int(target.max())
    if low < 0 or high >= logits.shape[1]:
        raise InputError(
            f"labels must lie in 0 to {logits.shape[1] - 1}, the number of classes less one, got {low} to {high}"
        )


def _check_shape(logits: Tensor, target: Tensor) -> None:
    if logits.dim() not in (4, 5) or logits.shape[1] < 2:
        raise InputError(
            f"logits must be (b, classes, *size) with the background and at least one class, got {tuple(logits.shape)}"
        )
    if target.shape != (logits.shape[0], *logits.shape[2:]) or target.is_floating_point():
        raise InputError(
            f"targets must be whole numbers of the shape {(logits.shape[0], *logits.shape[2:])}, got "
            f"{tuple(target.shape)} of {target.dtype}"
        )
    if not target.numel():
        raise InputError(f"the batch is empty: logits of {tuple(logits.shape)}")


class PatchDiscriminator(nn.Module):
    """Tells true masks from predicted ones, patch by patch, with the image beside them (PatchGAN, Isola et al., 2017).

    Spectral normalisation keeps it from growing too steep (Miyato et al., 2018).

    Args:
        in_channels: of the image.
        classes: of the masks.
        width: channels of the first layer.
        dimensions: 2 or 3.
    """

    def __init__(self, in_channels: int, classes: int, width: int = 16, dimensions: int = 2) -> None:
        super().__init__()
        convolution = nn.Conv2d if dimensions == 2 else nn.Conv3d
        widths = [in_channels + classes, width, 2 * width, 4 * width]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layer = convolution(before, after, 4, stride=2, padding=2)
            layers += [nn.utils.parametrizations.spectral_norm(layer), nn.LeakyReLU(0.2)]
        layers.append(nn.utils.parametrizations.spectral_norm(convolution(widths[-1], 1, 3, padding=1)))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        """(b, in_channels, *size) and (b, classes, *size) in [0, 1] to scores (b, 1, *patches); high means true."""
        return self.layers(torch.cat([images, masks], 1))


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator lowers (Lim & Ye, 2017): scores of true masks above 1, of predicted ones below -1."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """What the segmentation network lowers: high scores for its masks."""
    return -fake.mean()


def adversarial_losses(
    discriminator: nn.Module, images: Tensor, logits: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Both players' losses of one batch, so that one backward pass of their sum trains both.

    Returns:
        The network's loss, without gradients for the discriminator; the discriminator's, without any for the network.
    """
    probabilities, truth = _probabilities(logits, target, True)
    frozen = {name: value.detach() for name, value in discriminator.named_parameters()}
    scores = torch.func.functional_call(discriminator, frozen, (images, probabilities))
    own = hinge_discriminator_loss(discriminator(images, truth), discriminator(images, probabilities.detach()))
    return hinge_generator_loss(scores), own


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _probabilities(logits: Tensor, target: Tensor, include_background: bool) -> tuple[Tensor, Tensor]:
    """Softmax and one-hot, (b, classes, *size) each."""
    _check_shape(logits, target)
    probabilities = _exact(logits).softmax(1)
    truth = F.one_hot(target.long(), logits.shape[1]).movedim(-1, 1).to(probabilities.dtype)
    first = 0 if include_background else 1
    return probabilities[:, first:], truth[:, first:]
