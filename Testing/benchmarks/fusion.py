"""CT/MR fusion: slices a second of both networks beside a plain loop and PyWavelets' choose-max, and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pywt
import torch
from numpy.typing import NDArray

from FreqSegLib import weights
from FreqSegLib.fusion import fusion_method
from FreqSegLib.fusion.multi_scale import MultiScaleWaveletFusionNet
from FreqSegLib.fusion.network import FusionNetwork
from FreqSegLib.fusion.single_scale import WaveletFusionNet
from FreqSegLib.settings import FusionSettings
from FreqSegLib.volume import Volume
from FreqSegLib.volume_fusion import VolumeFuser, prepared_pair
from Testing.benchmarks.measuring import Section, answer_parent, in_child, in_turns, megabytes, peak_memory

NETWORKS: dict[str, Callable[[], FusionNetwork]] = {
    "single-scale": WaveletFusionNet,
    "multi-scale": MultiScaleWaveletFusionNet,
}
CPU_GOAL, CUDA_GOAL, CLASSIC_GOAL = 1.0, 2.0, 2.0


def fusion_time(slices: int, sides: Sequence[int], repeats: int) -> Section:
    """Args:
    slices: of each volume.
    sides: of its slices in pixels.
    repeats: of every measurement.
    """
    section = Section("CT/MR fusion: time")
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        section.say(
            f"{device}, {torch.get_num_threads()} threads, {slices} slices, medians of {repeats} runs taken in turns. "
            "Every way normalises, fuses and puts the slice into the volume."
        )
        rows = []
        for side in sides:
            ct, mr = simulated_pair(slices, side)
            works: dict[str, Callable[[], NDArray[Any]]] = {}
            for name in NETWORKS:
                method = network(name, device)
                works[name] = _whole(method, device, ct, mr)
                works[f"{name}, plain loop"] = _plain(method, device, ct, mr)
            works["choose-max haar, PyWavelets"] = _classic(ct, mr)
            for name in NETWORKS:
                apart = float(np.abs(works[name]() - works[f"{name}, plain loop"]()).max())
                section.check(f"{name} {side}² on {device}: volume against plain loop, grey levels", apart, 0.05)
            taken = in_turns(works, repeats)
            rows += [[f"{name}, {side}²", f"{slices / seconds:.1f}"] for name, seconds in taken.items()]
            for name in NETWORKS:
                ratio = taken[f"{name}, plain loop"] / taken[name]
                goal = CUDA_GOAL if device == "cuda" else CPU_GOAL
                section.goal(f"{name} {side}²: times the plain loop's speed", ratio, goal, at_least=True)
            ratio = taken["single-scale"] / taken["choose-max haar, PyWavelets"]
            if device == "cpu":
                section.goal(
                    f"single-scale {side}²: times PyWavelets' choose-max's time", ratio, CLASSIC_GOAL, at_least=False
                )
        section.table([f"on {device}", "slices a second"], rows)
    section.say(f"Weights: {', '.join(f'{name} {_origin(name)}' for name in NETWORKS)}.")
    return section


def fusion_memory(counts: Sequence[int], side: int) -> Section:
    """Peak memory of whole runs, each in a process of its own.

    Args:
        counts: slices of the volumes, ascending.
        side: of the slices in pixels.
    """
    section = Section("CT/MR fusion: memory over slices")
    rows = []
    beyond = {}
    for count in counts:
        found = in_child("Testing.benchmarks.fusion", count=count, side=side)
        beyond[count] = found["peak"] - found["before"] - found["output"]
        rows.append(
            [str(count), *(megabytes(found[key]) for key in ("peak", "input", "output")), megabytes(beyond[count])]
        )
    section.table(["slices", "peak", "CT and MR", "fused volume", "added beside the volumes"], rows)
    section.say(
        f"Added beside the volumes themselves from {counts[0]} to {counts[-1]} slices: "
        f"{megabytes(beyond[counts[-1]] - beyond[counts[0]])}."
    )
    return section


def simulated_pair(count: int, side: int) -> tuple[Volume, Volume]:
    """A CT in Hounsfield units and an MR of ``count`` slices with a head-like picture."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side - 0.5
    radius = np.hypot(y / 0.45, x / 0.36)
    texture = rng.normal(0, 1, (side, side))
    ct = np.select([radius < 0.85, radius < 0.95, radius < 1], [36 + 5 * texture, 1100.0, 30.0], -1000.0)
    mr = np.select([radius < 0.85, radius < 0.95, radius < 1], [500 - 60 * texture, 60.0, 800.0], 5.0)

    def stacked(picture: NDArray[Any], name: str) -> Volume:
        array = np.empty((count, side, side), dtype=np.int16)
        for index in range(count):
            array[index] = np.roll(picture, index, 1)
        return Volume(array, np.eye(4), name=name)

    return stacked(ct, "ct"), stacked(mr, "mr")


def network(name: str, device: str) -> FusionNetwork:
    """With shipped weights, or untrained from a fixed seed where there are none: the work is the same."""
    if weights.find(f"fusion-{name}") is not None:
        found = fusion_method(name, device=device)
        assert isinstance(found, FusionNetwork)
        return found
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NETWORKS[name]().requires_grad_(False).eval().to(device)


def _origin(name: str) -> str:
    return "shipped" if weights.find(f"fusion-{name}") is not None else "untrained"


def _whole(method: FusionNetwork, device: str, ct: Volume, mr: Volume) -> Callable[[], NDArray[Any]]:
    fuser = VolumeFuser(method, FusionSettings(check=False), device=torch.device(device))
    return lambda: fuser.fuse(ct, mr).fused.array


def _plain(method: FusionNetwork, device: str, ct: Volume, mr: Volume) -> Callable[[], NDArray[Any]]:
    def work() -> NDArray[Any]:
        pair = prepared_pair(ct, mr)
        fused = np.empty(ct.shape, np.float32)
        with torch.inference_mode():
            for index in range(len(fused)):
                one = torch.from_numpy(pair.ct_levels.apply(ct.array[index]))[None, None].to(device)
                other = torch.from_numpy(pair.mr_levels.apply(mr.array[index]))[None, None].to(device)
                fused[index] = method(one, other).image[0, 0].clamp(0, 1).mul(255).cpu().numpy()
        return fused

    return work


def _classic(ct: Volume, mr: Volume) -> Callable[[], NDArray[Any]]:
    def work() -> NDArray[Any]:
        pair = prepared_pair(ct, mr)
        fused = np.empty(ct.shape, np.float32)
        for index in range(len(fused)):
            one, other = (
                pywt.dwt2(levels.apply(volume.array[index]), "haar")
                for volume, levels in ((ct, pair.ct_levels), (mr, pair.mr_levels))
            )
            details = tuple(np.where(np.abs(a) > np.abs(b), a, b) for a, b in zip(one[1], other[1], strict=True))
            image = pywt.idwt2((np.maximum(one[0], other[0]), details), "haar")
            fused[index] = 255 * np.clip(image, 0, 1)[: ct.shape[1], : ct.shape[2]]
        return fused

    return work


def _child(count: int, side: int) -> dict[str, Any]:
    # the first run of anything pays for loading and for buffers
    fuser = VolumeFuser(network("multi-scale", "cpu"), FusionSettings(check=True), device=torch.device("cpu"))
    fuser.fuse(*simulated_pair(9, side))
    ct, mr = simulated_pair(count, side)
    before = peak_memory()
    fused = fuser.fuse(ct, mr).fused.array
    return {
        "before": before,
        "peak": peak_memory(),
        "input": ct.array.nbytes + mr.array.nbytes,
        "output": fused.nbytes,
    }


if __name__ == "__main__":
    answer_parent(_child)
