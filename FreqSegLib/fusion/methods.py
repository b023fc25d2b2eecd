"""Every fusion method by its name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

import torch

from FreqSegLib import weights
from FreqSegLib.errors import SettingsError
from FreqSegLib.fusion import METHODS
from FreqSegLib.fusion.fused import FusionMethod
from FreqSegLib.fusion.multi_scale import MultiScaleWaveletFusionNet
from FreqSegLib.fusion.network import WEIGHTS_FILE, FusionNetwork
from FreqSegLib.fusion.rules import Average, ChooseMax, LaplacianPyramid, Maximum
from FreqSegLib.fusion.single_scale import WaveletFusionNet

NETWORKS: dict[str, type[FusionNetwork]] = {net.kind: net for net in (MultiScaleWaveletFusionNet, WaveletFusionNet)}


def fusion_method(
    name: str,
    *,
    wave: str | None = None,
    levels: int | None = None,
    weights_folder: Path | None = None,
    device: str | torch.device = "cpu",
) -> FusionMethod:
    """A fusion method, ready to call.

    Args:
        name: one of :data:`FreqSegLib.fusion.METHODS`.
        wave: wavelet of choose-max (haar if left out), or the one to run a network in (its own if left out; another
            one than it was trained in works, and is as good as it happens to be).
        levels: of choose-max (1 if left out) and of the Laplacian pyramid (3); a network has those it was trained with.
        weights_folder: holds a network's ``fusion.safetensors``; the shipped weights if left out.
        device: of the networks. The rules compute wherever the images are.

    Raises:
        SettingsError: an unknown name, or a setting that this method does not have.
        WeightsError: weights that are missing or damaged.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(str(name).lower(), METHODS, n=1, cutoff=0.4)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise SettingsError(f"there is no fusion method '{name}'{hint} Choose one of {', '.join(METHODS)}.")
    if name in NETWORKS:
        return _network(name, wave, levels, weights_folder, device)
    if weights_folder is not None:
        raise SettingsError(f"the method '{name}' has no weights; leave weights_folder={str(weights_folder)!r} out")
    if name == "choose-max":
        return ChooseMax(wave or "haar", 1 if levels is None else levels)
    if wave is not None:
        raise SettingsError(f"the method '{name}' has no wavelet; leave wave={wave!r} out")
    if name == "laplacian":
        return LaplacianPyramid(3 if levels is None else levels)
    if levels is not None:
        raise SettingsError(f"the method '{name}' has no levels; leave levels={levels!r} out")
    simple: dict[str, Callable[[], FusionMethod]] = {"average": Average, "max": Maximum}
    return simple[name]()


def _network(
    name: str, wave: str | None, levels: int | None, folder: Path | None, device: str | torch.device
) -> FusionNetwork:
    network = NETWORKS[name].load((folder or weights.require(f"fusion-{name}")) / WEIGHTS_FILE, device)
    if levels is not None and levels != network.J:
        raise SettingsError(
            f"these {name} weights were trained with {network.J} levels, not {levels}: leave levels out, or train "
            f"others with 'freqseg train-fusion'"
        )
    if wave is not None:
        network.wave = wave
    return network
