"""One saliency map out of three: the raw image's, the low-frequency branch's and the high-frequency branch's.

Reference:
    FreqMedCLIP, "Frequency Information for Text Guided Medical Image Segmentation", for the adaptive weighting of two
    frequency branches. The raw anchor and its gate are ours: they keep an untrained fusion from changing the result.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from FreqSegLib.errors import InputError, SettingsError

METHODS = ("simple", "cat_conv", "adaptive")


class AdaptiveFusion(nn.Module):
    """Fuse the branches' saliencies and move the raw saliency towards the result::

        simple      S_fused = (S_HF + S_LF) / 2
        cat_conv    S_fused = sigmoid(conv([S_HF, S_LF]))
        adaptive    S_fused = W S_HF + (1 - W) S_LF,    W = sigmoid(conv([S_HF, S_LF]))

        S = clamp(S_raw + tanh(g) (S_fused - S_raw), 0, 1)

    ``conv`` is a 3×3 convolution, ReLU and a 1×1 convolution. The gate g starts at zero, so that an untrained fusion
    returns S_raw. The weights of ``adaptive`` start at one half each.

    Args:
        method: one of :data:`METHODS`.
        hidden_channels: channels between the two convolutions.

    Raises:
        SettingsError: for an unknown method, or fewer than 1 hidden channel.
    """

    def __init__(self, method: str = "adaptive", hidden_channels: int = 16) -> None:
        super().__init__()
        if method not in METHODS:
            raise SettingsError(f"fusion method {method!r} does not exist; choose one of {', '.join(METHODS)}")
        if hidden_channels < 1:
            raise SettingsError(f"hidden_channels must be at least 1, got {hidden_channels}")
        self.method = method
        self.gate = nn.Parameter(torch.zeros(()))
        if method == "simple":
            return
        last = nn.Conv2d(hidden_channels, 1, 1)
        if method == "adaptive":
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.conv = nn.Sequential(nn.Conv2d(2, hidden_channels, 3, padding=1), nn.ReLU(), last)

    @property
    def is_identity(self) -> bool:
        """Whether the gate is exactly closed, so that the low and high branches need not be computed."""
        return self.gate.item() == 0

    def fuse(self, low: Tensor, high: Tensor) -> Tensor:
        """S_fused, without the raw anchor.

        Args:
            low: low-frequency saliency (B, 1, H, W) in [0, 1].
            high: high-frequency saliency, the same shape.

        Returns:
            (B, 1, H, W) in [0, 1].
        """
        if self.method == "simple":
            return (high + low) / 2
        weight = self.conv(torch.cat([high, low], dim=1)).sigmoid()
        return weight if self.method == "cat_conv" else weight * high + (1 - weight) * low

    def forward(self, raw: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
        """The fused saliency, anchored to the raw one.

        Args:
            raw: saliency of the raw image (B, 1, H, W) in [0, 1].
            low: saliency of the low-frequency image, the same shape; None is allowed while :attr:`is_identity`.
            high: saliency of the high-frequency image, as ``low``.

        Returns:
            (B, 1, H, W) in [0, 1].

        Raises:
            InputError: for maps of different shapes, or a missing branch where the gate is open.
        """
        if low is None or high is None:
            if self.is_identity:
                return raw
            raise InputError(f"the gate of the {self.method} fusion is open: it needs the low and the high saliency")
        _check_maps(raw=raw, low=low, high=high)
        return (raw + self.gate.tanh() * (self.fuse(low, high) - raw)).clamp(0, 1)


@torch.no_grad()
def compare_fusion(
    raw: Tensor,
    low: Tensor,
    high: Tensor,
    target: Tensor,
    methods: Mapping[str, AdaptiveFusion] | None = None,
    threshold: float | None = None,
) -> dict[str, float]:
    """Dice of each branch and of each fusion on labelled data.

    A map is cut at its own Otsu threshold, which looks at no label, or at ``threshold``. Dice is the mean over maps; a
    map where both the mask and the target are empty counts 1.

    Args:
        raw, low, high: saliencies (B, 1, H, W) in [0, 1].
        target: masks (B, 1, H, W); foreground where > 0.5.
        methods: trained fusions by the name to report them under; each is run as in the pipeline, with its own gate.
            ``cat_conv`` and ``adaptive`` mean nothing untrained, so they are reported only when given here.
        threshold: a fixed cut, foreground strictly above it; Otsu's for every map when None.

    Returns:
        Dice in [0, 1] by name: ``raw``, ``low``, ``high``, ``simple`` (the plain mean of low and high), then those of
        ``methods``.

    Raises:
        InputError: for maps of different shapes.
    """
    _check_maps(raw=raw, low=low, high=high, target=target)
    saliencies = {"raw": raw, "low": low, "high": high, "simple": AdaptiveFusion("simple").fuse(low, high)}
    for name, fusion in (methods or {}).items():
        training = fusion.training
        saliencies[name] = fusion.eval()(raw, low, high)
        fusion.train(training)
    return {name: _mean_dice(saliency, target > 0.5, threshold) for name, saliency in saliencies.items()}


def _mean_dice(saliency: Tensor, target: Tensor, threshold: float | None) -> float:
    maps = saliency.flatten(1)
    cuts = torch.stack([_otsu(values) for values in maps])[:, None] if threshold is None else threshold
    mask, truth = maps > cuts, target.flatten(1)
    overlap, total = 2 * (mask & truth).sum(1), mask.sum(1) + truth.sum(1)
    return float(torch.where(total == 0, 1.0, overlap / total.clamp(min=1)).mean())


def _otsu(values: Tensor) -> Tensor:
    """Otsu's threshold (1979) over the values themselves, without bins; the maximum where all are equal."""
    ordered = values.double().sort().values
    below = torch.arange(1, ordered.numel(), device=values.device, dtype=torch.float64)
    share = below / ordered.numel()
    partial = ordered.cumsum(0)[:-1] / ordered.numel()
    between = (ordered.mean() * share - partial).square() / (share * (1 - share))
    between[ordered[1:] == ordered[:-1]] = -1  # a cut between equal values is none
    if between.numel() == 0 or between.max() < 0:
        return ordered[-1]
    return ordered[between.argmax()]


def _check_maps(**maps: Tensor) -> None:
    shapes = {name: tuple(saliency.shape) for name, saliency in maps.items()}
    first = next(iter(shapes.values()))
    if any(shape != first for shape in shapes.values()) or len(first) != 4 or first[1] != 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise InputError(f"saliency maps must all be one (B, 1, H, W), got {listed}")
